"""Users' arrays -> what kernels take. All validation is here, and happens before anything is copied or launched."""
from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

from . import containers, device
from .errors import DeviceError, DTypeError, OutDeviceError, OutError, ShapeError
from .facts import ITEM_BYTES, accumulator_of
from .launches import ALIGNMENT, Matrix, Result, Slot
from .slips import in_place_of, meant

DTYPES = tuple(ITEM_BYTES)
#: the largest finite number of the types that kernels take numbers in
LARGEST = {name: float(np.finfo(name).max) for name in ("float32", "float64")}
WEIGHT_LAYOUTS = ("in_out", "out_in")
#: what every new array's address is a multiple of, in bytes: NumPy promises no more
NEW_ALIGNMENT = 16

Named = TypeVar("Named", bound=tuple)


@dataclass(frozen=True)
class Argument:
    """One array that a user passed, seen as a matrix of `rows` by `cols`; strides in elements."""

    name: str
    array: Any
    memory: device.Memory
    dtype: str
    rows: int
    cols: int
    row_stride: int
    col_stride: int
    compact: bool  # whether kernels need a copy: no axis is contiguous, or it lies on the host

    @classmethod
    def of(cls, name: str, array: Any, memory: device.Memory, dtype: str, *, any_strides: bool = False) -> Argument:
        """The array with all but its last axis flattened; any_strides lets neither axis be contiguous."""
        *batch, cols = memory.shape
        rows, itemsize = math.prod(batch), memory.dtype.itemsize
        down, across = _flat_stride(batch, memory.strides[:-1]), memory.strides[-1] if cols > 1 else itemsize
        if not rows or not cols:
            down, across = cols * itemsize, itemsize  # of no elements, strides say nothing
        row_stride, col_stride, compact = cols, 1, True
        if down is not None and not (down % itemsize or across % itemsize or memory.byte % itemsize
                                     or memory.place == device.HOST):
            row_stride, col_stride, compact = down // itemsize, across // itemsize, False
        if rows <= 1:
            row_stride = cols
        if rows and cols and col_stride != 1 and row_stride != 1 and not any_strides:
            row_stride, col_stride, compact = cols, 1, True
        return cls(name, array, memory, dtype, rows, cols, row_stride=row_stride, col_stride=col_stride,
                   compact=compact)

    @property
    def layout(self) -> str:
        """How the rows lie in memory, where they are samples: "features_first", "flat" (no gaps) or "rows"."""
        if self.col_stride == 1 and self.row_stride == self.cols and self.rows > 1:
            return "flat"
        return "features_first" if self.row_stride == 1 else "rows"

    @property
    def matrix(self) -> Matrix:
        """What launches know of it; its slot has its name."""
        alignment = ALIGNMENT if self.compact else device.alignment_of(self.memory.byte)
        return Matrix(Slot(self.name), self.dtype, self.rows, self.cols, self.row_stride, self.col_stride,
                      alignment=alignment)

    @property
    def T(self) -> Argument:
        """The transposed matrix."""
        return replace(self, rows=self.cols, cols=self.rows, row_stride=self.col_stride, col_stride=self.row_stride)


def _flat_stride(shape: Iterable[int], strides: Iterable[int]) -> int | None:
    """The stride in bytes that walks through all of these axes in C order, or None if there is none."""
    flat: int | None = 0
    size = 1
    for length, stride in reversed(list(zip(shape, strides, strict=True))):
        if length == 1:
            continue
        if size == 1:
            flat = stride
        elif flat is None or stride != flat * size:
            return None
        size *= length
    return flat


@dataclass(frozen=True)
class Inputs:
    """Accepted inputs of one layer as matrices.

    x is (samples, in_features), w (in_features, out_features), dz (samples, out_features).
    """

    device: Any
    place: str
    dtype: str
    batch_shape: tuple[int, ...]
    x: Argument | None
    w: Argument | None
    dz: Argument
    beside: tuple[Argument, ...] = ()  # what is read besides, to form dz

    @property
    def samples(self) -> int:
        """S, the length of the flattened batch."""
        return self.dz.rows

    @property
    def out_features(self) -> int:
        """M, the number of outputs."""
        return self.dz.cols

    @cached_property
    def in_features(self) -> int:
        """D, the number of inputs."""
        known = self.x.cols if self.x is not None else self.w.rows if self.w is not None else None
        if known is None:
            raise ShapeError("neither x nor w was given, so the number of input features is not known")
        return known

    @property
    def arguments(self) -> list[Argument]:
        """Those that were given."""
        return [argument for argument in (self.x, self.w, self.dz, *self.beside) if argument is not None]


def accept(*, dz: Any, x: Any = None, w: Any = None, batch_axis: int = 0, weight_layout: str = "in_out",
           name: str = "dz") -> Inputs:
    """Check one layer's arrays against one another; name is what the user calls dz.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, TypeError, ValueError
        Naming the argument, what was expected, what came and the cure.
    """
    batch_axis = _batch_axis(batch_axis)
    if weight_layout not in WEIGHT_LAYOUTS:
        raise ValueError(f'weight_layout must be "in_out" for w (in_features, out_features) or "out_in" for '
                         f"(out_features, in_features); got {weight_layout!r}{meant(weight_layout, WEIGHT_LAYOUTS)}")
    where = device.current()
    given = {key: array for key, array in (("x", x), ("w", w), ("dz", dz)) if array is not None or key == "dz"}
    names = {"x": "x", "w": "w", "dz": name}
    memories = {key: _memory(where, names[key], array) for key, array in given.items()}
    dtypes = {key: _dtype(names[key], memory.dtype) for key, memory in memories.items()}
    _same(memories, dtypes)
    for key in given:
        check_kind(names[key], given[key], name, containers.kind_of(dz))
    shapes = {key: memory.shape for key, memory in memories.items()}
    try:
        _check_shapes(shapes, batch_axis, weight_layout, name)
    except ShapeError as error:
        raise ShapeError(f"{error}{_swapped(shapes, batch_axis, weight_layout, name)}") from None

    arguments = {key: Argument.of(names[key], given[key], memories[key], dtypes[key]) for key in given}
    if batch_axis:
        arguments["dz"] = arguments["dz"].T
    if weight_layout == "out_in" and "w" in arguments:
        arguments["w"] = arguments["w"].T
    batch_shape = shapes["dz"][1:] if batch_axis else shapes["dz"][:-1]
    return Inputs(where, memories["dz"].place, dtypes["dz"], batch_shape,
                  x=arguments.get("x"), w=arguments.get("w"), dz=arguments["dz"])


def _batch_axis(batch_axis: Any) -> int:
    try:
        axis = None if isinstance(batch_axis, bool) else operator.index(batch_axis)
    except TypeError:
        axis = None
    if axis is None:
        raise TypeError(f"batch_axis must be the int 0 or 1; got {batch_axis!r}")
    if axis not in (0, 1):
        raise ValueError(f"batch_axis must be 0 for (samples, outputs) or 1 for (outputs, samples); got {axis}")
    return axis


def given(name: str, array: Any) -> Any:
    """The array, which a call cannot do without.

    Raises
    ------
    TypeError
        If it is None.
    """
    if array is None:
        raise TypeError(f"{name} must be an array; got None")
    return array


def _memory(where: Any, name: str, array: Any) -> device.Memory:
    memory = None if isinstance(array, np.ma.MaskedArray) else where.memory(array)
    if memory is None:
        cure = containers.problem(array, where.tensor_devices) or in_place_of(name, array)
        got = type(containers.given_back(array)).__name__
        raise TypeError(f"{name} must be {where.array_kinds}; got {got} ({cure})")
    return memory


@lru_cache(maxsize=64)
def _name_of(dtype: np.dtype) -> str:
    """The name of a dtype, which NumPy puts together anew for everyone who asks."""
    return dtype.name


def _dtype(name: str, dtype: np.dtype) -> str:
    if _name_of(dtype) not in DTYPES:
        cure = f"convert it, for example with {name}.astype('float32'), or {name}.float() of PyTorch"
        if dtype == "V2":
            cure = f"if that was bfloat16 before numpy.save, {name}.view(ml_dtypes.bfloat16) makes it so again"
        raise DTypeError(f"{name} must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}; got {dtype} ({cure})")
    if not dtype.isnative:
        raise DTypeError(f"{name} must be in the machine's byte order; got {dtype.str} "
                         f"(convert it with {name}.astype({dtype.newbyteorder('=').str!r}))")
    return _name_of(dtype)


def _same(memories: dict[str, device.Memory], dtypes: dict[str, str], dz: str = "dz") -> None:
    for name in memories:
        if dtypes[name] != dtypes["dz"]:
            raise DTypeError(f"{name} and {dz} must have the same dtype; {name} is {dtypes[name]} and {dz} is "
                             f"{dtypes['dz']} (convert one of them with astype)")
        if memories[name].place != memories["dz"].place:
            raise DeviceError(f"{name} and {dz} must lie on the same device; {name} is on {memories[name].place} and "
                              f"{dz} on {memories['dz'].place} (move one of them, for example with cupy.asarray)")


def check_kind(name: str, array: Any, others: str, theirs: containers.Kind) -> None:
    """Hold an array to the kind of others, by their name: what is queued for two libraries is in no order.

    Raises
    ------
    TypeError
        If it is of another kind.
    """
    kind = containers.kind_of(array)
    if kind.company != theirs.company:
        raise TypeError(f"the arrays of a call must be of one kind; {name} is an array of {kind.name} and {others} one "
                        f"of {theirs.name} (hand one over to the other's library: its from_dlpack does so without a "
                        "copy)")


def _check_shapes(shapes: dict[str, tuple[int, ...]], batch_axis: int, weight_layout: str, name: str) -> None:
    dz = shapes["dz"]
    if batch_axis and len(dz) != 2:
        raise ShapeError(f"{name} must have 2 dimensions (outputs, samples) for batch_axis=1; got shape {dz}")
    if len(dz) < 2:
        raise ShapeError(f"{name} must have at least 2 dimensions (samples, outputs); got shape {dz} "
                         f"({name}[None, :] is one sample, {name}[:, None] is one output)")
    if "x" in shapes:
        _check_x(shapes["x"], dz, batch_axis)
    if "w" in shapes:
        _check_w(shapes, dz[0] if batch_axis else dz[-1], weight_layout)


def _swapped(shapes: dict[str, tuple[int, ...]], batch_axis: int, weight_layout: str, name: str) -> str:
    """Which of the arrays fit if they are swapped, to be put behind a message; empty where none do."""
    for one, other in itertools.combinations(shapes, 2):
        with contextlib.suppress(ShapeError):
            _check_shapes(shapes | {one: shapes[other], other: shapes[one]}, batch_axis, weight_layout, name)
            return f" ({one} and {other} fit if they are swapped)"
    return ""


def _check_x(x: tuple[int, ...], dz: tuple[int, ...], batch_axis: int) -> None:
    if len(x) < 2:
        raise ShapeError(f"x must have at least 2 dimensions (samples, in_features); got shape {x} "
                         "(x[None, :] is one sample, x[:, None] is one feature)")
    batch = dz[1:] if batch_axis else dz[:-1]
    if x[:-1] == batch:
        return
    if len(x) != 2 or len(dz) != 2:
        raise ShapeError(f"x and dz must have the same batch axes; x has {x[:-1]} before its last axis and dz has "
                         f"{batch}")
    other = 1 - batch_axis
    message = f"x has {x[0]} samples on axis 0 but dz has {batch[0]} on axis {batch_axis}"
    if dz[other] == x[0]:
        message += f"; dz.shape[{other}] is {x[0]}: did you mean batch_axis={other}?"
    elif x[1] == batch[0]:
        message += f"; x.shape[1] is {x[1]}: did you mean x.T?"
    else:
        message += "; both must hold the same samples"
    raise ShapeError(message)


def _check_w(shapes: dict[str, tuple[int, ...]], outputs: int, weight_layout: str) -> None:
    w = shapes["w"]
    if len(w) != 2:
        raise ShapeError(f"w must have 2 dimensions; got shape {w}")
    inputs = shapes["x"][-1] if "x" in shapes else None

    def fits(shape: tuple[int, ...]) -> bool:
        return shape[1] == outputs and inputs in (None, shape[0])

    if fits(w if weight_layout == "in_out" else w[::-1]):
        return
    wanted = [str(inputs if inputs is not None else "in_features"), str(outputs)]
    wanted = wanted if weight_layout == "in_out" else wanted[::-1]
    message = f'w must have shape ({", ".join(wanted)}) for weight_layout="{weight_layout}"; got {w}'
    if fits(w[::-1] if weight_layout == "in_out" else w):
        other = WEIGHT_LAYOUTS[weight_layout == "in_out"]
        message += f'; w.T would fit: did you mean weight_layout="{other}"?'
    elif "x" not in shapes or len(shapes["dz"]) == 2:
        message += f" (dz has shape {shapes['dz']}: is batch_axis right?)"
    raise ShapeError(message)


def accept_beside(name: str, array: Any, inputs: Inputs, batch_axis: int) -> Argument:
    """Check a matrix that stands beside dz, element by element.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, TypeError
        If it has another shape, dtype or device than dz.
    """
    memory, dz = _memory(inputs.device, name, array), inputs.dz
    dtype = _dtype(name, memory.dtype)
    _same({name: memory, "dz": dz.memory}, {name: dtype, "dz": dz.dtype}, dz.name)
    check_kind(name, array, dz.name, containers.kind_of(dz.array))
    if memory.shape != dz.memory.shape:
        raise ShapeError(f"{name} must have the shape of {dz.name}, {dz.memory.shape}; got {memory.shape}")
    argument = Argument.of(name, array, memory, dtype)
    return argument.T if batch_axis else argument


def accept_sample_weight(array: Any, inputs: Inputs) -> Argument:
    """Check the weights of the samples, or a mask.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, TypeError
        As for any array of one value for each sample.
    """
    dtypes = ("float32", "bool", "float16", "bfloat16") + ("float64",) * (inputs.dtype == "float64")
    return _accept_per_sample("sample_weight", array, inputs, dtypes, "astype('float32') if these are weights, "
                              "astype('bool') if they choose samples")


def accept_labels(array: Any, inputs: Inputs, batch_axis: int) -> Argument:
    """Check the array of the samples' classes, or of their class probabilities: a matrix then, of floats.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, TypeError
        As for any array of one value for each sample, or of a matrix beside z.
    """
    shape, z = getattr(array, "shape", None), inputs.dz.memory.shape
    if shape == z:
        dtype = _memory(inputs.device, "labels", array).dtype
        if dtype.kind in "iub":
            raise DTypeError(f"labels of the shape of z, {shape}, are class probabilities and must be {inputs.dtype}; "
                             f"got {dtype} (one-hot? pass labels.astype({inputs.dtype!r}), or "
                             f"labels.argmax(axis={0 if batch_axis else -1}) for the class of each sample)")
        return accept_beside("labels", array, inputs, batch_axis)
    if len(z) > 2 and shape == (*z[:1], *z[2:]) != inputs.batch_shape:
        raise ShapeError(f"labels must have one value for each sample, shape {inputs.batch_shape}; got {shape}; are "
                         "the classes on axis 1 of z? then pass numpy.moveaxis(z, 1, -1)")
    if shape != inputs.batch_shape and _memory(inputs.device, "labels", array).dtype.name in ITEM_BYTES:
        raise ShapeError(f"labels of floats are class probabilities and must have the shape of z, {z}; got {shape} "
                         "(pass one probability for each class, or the class of each sample as int64)")
    return _accept_per_sample("labels", array, inputs, ("int64", "int32"), "astype('int64')")


def accept_class_weight(array: Any, inputs: Inputs) -> Argument:
    """Check the weights of the classes, one for each output; seen as a column without gaps.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, TypeError
        If they have another length than there are classes, another device, or a dtype that kernels do not read.
    """
    known = ("float32", "float16", "bfloat16") + ("float64",) * (inputs.dtype == "float64")
    memory = _memory_of("class_weight", array, inputs, known, "astype('float32')")
    if memory.shape != (inputs.out_features,):
        raise ShapeError(f"class_weight must have one weight for each class, shape ({inputs.out_features},); got "
                         f"{memory.shape}")
    row = Argument.of("class_weight", array, replace(memory, shape=(1, *memory.shape), strides=(0, *memory.strides)),
                      memory.dtype.name, any_strides=True)
    return replace(row, row_stride=row.cols, col_stride=1, compact=row.compact or row.col_stride != 1).T


def check_label_values(array: Any, classes: int, ignored: int, sample_weight: Any) -> None:
    """Hold labels on the host to the classes that there are, but for those that are ignored or masked out.

    Raises
    ------
    ValueError
        If one is no class. Labels on a GPU are not looked at, since that would take waiting for it.
    """
    array, sample_weight = containers.host_array(array), containers.host_array(sample_weight)
    if isinstance(array, np.ndarray):
        wrong = (array != ignored) & ((array < 0) | (array >= classes))
        if isinstance(sample_weight, np.ndarray) and sample_weight.dtype == bool:
            wrong &= sample_weight
        if wrong.any():
            where = tuple(int(index) for index in np.argwhere(wrong)[0])
            raise ValueError(f"labels must be classes from 0 to {classes - 1}, or ignore_index {ignored}; "
                             f"got {array[where]} for sample {where[0] if len(where) == 1 else where}")


def alpha_type(inputs: Inputs, targets: Iterable[Target]) -> str:
    """The type whose range alpha is held to: float64 where the inputs or all results are that."""
    doubled = inputs.dtype == "float64" or {target.dtype for target in targets} == {"float64"}
    return "float64" if doubled else "float32"


def accept_number(name: str, value: Any, dtype: str = "float64") -> float:
    """A number that scales or shapes a result, which kernels take as one of this dtype.

    Raises
    ------
    TypeError
        If it is none that the host knows.
    ValueError
        If it is finite, but infinite to the kernels.
    """
    value = containers.host_array(value)
    if isinstance(value, np.ndarray):
        scalar = value.ndim == 0 and not isinstance(value, np.ma.MaskedArray) and (
            value.dtype.kind in "iuf" or value.dtype.name in DTYPES)
    else:
        scalar = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    if not scalar:
        cure = f" (bring one from a GPU to the host with float({name}))"
        raise TypeError(f"{name} must be a number; got {type(value).__name__}"
                        f"{cure * hasattr(value, '__cuda_array_interface__')}")
    with contextlib.suppress(OverflowError):
        number = float(value)
        if not abs(number) > LARGEST[dtype] or abs(value) == math.inf:
            return number
    cure, got = "scale the inputs instead" + ", or convert them to float64" * (dtype == "float32"), str(value)
    raise ValueError(f"{name} must be within {LARGEST[dtype]:.2g} of 0, the range of {dtype} that it is multiplied "
                     f"in, or infinite; got {got[:20]}{'...' * (len(got) > 20)} ({cure})")


def accept_flag(name: str, value: Any) -> bool:
    """True or False.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def accept_integer(name: str, value: Any) -> int:
    """An integer of 64 bits.

    Raises
    ------
    TypeError
        If it is none.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 2 ** 63
    if not -2 ** 63 <= number < 2 ** 63:
        raise TypeError(f"{name} must be an integer of 64 bits; got {value!r}")
    return number


def _accept_per_sample(name: str, array: Any, inputs: Inputs, dtypes: tuple[str, ...], cure: str) -> Argument:
    memory = _memory_of(name, array, inputs, dtypes, cure)
    if memory.shape != inputs.batch_shape:
        raise ShapeError(f"{name} must have one value for each sample, shape {inputs.batch_shape}; got {memory.shape}")
    return Argument.of(name, array, _as_column(memory), memory.dtype.name, any_strides=True)


def _memory_of(name: str, array: Any, inputs: Inputs, dtypes: tuple[str, ...], cure: str) -> device.Memory:
    """The memory of an array that stands beside the inputs: of one of these dtypes, and on their device."""
    memory = _memory(inputs.device, name, array)
    if memory.dtype.name not in dtypes or not memory.dtype.isnative:
        raise DTypeError(f"{name} must be {', '.join(dtypes[:-1])} or {dtypes[-1]}; got {memory.dtype} (convert it "
                         f"with {cure})")
    if memory.place != inputs.place:
        raise DeviceError(f"{name} and {inputs.dz.name} must lie on the same device; {name} is on {memory.place} and "
                          f"{inputs.dz.name} on {inputs.place} (move one of them, for example with cupy.asarray)")
    check_kind(name, array, inputs.dz.name, containers.kind_of(inputs.dz.array))
    return memory


@dataclass(frozen=True)
class Target:
    """Where a result goes: the user's array, or None for a new one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    argument: Argument | None
    accumulate: bool
    #: whether a new array has its last axis first in memory, before the batch axes in their own order
    features_first: bool = False
    column: bool = False  # whether it has one value for each sample, or in all, and no axis of features

    @property
    def result(self) -> Result:
        """What launches know of it: a matrix, overwritten or added to."""
        return Result(self.matrix, self.accumulate)

    @property
    def matrix(self) -> Matrix:
        """What launches know of it, seen as a matrix; its slot has its name."""
        if self.argument is not None:
            # A copy of what lies on the host is a new array, too.
            alignment = NEW_ALIGNMENT if self.argument.compact else self.argument.matrix.alignment
            return replace(self.argument.matrix, address=Slot(self.name), alignment=alignment)
        *batch, cols = (*self.shape, 1) if self.column else self.shape
        rows = math.prod(batch)
        row_stride, col_stride = (1, rows) if self.features_first else (cols, 1)
        return Matrix(Slot(self.name), self.dtype, rows, cols, row_stride, col_stride, alignment=NEW_ALIGNMENT)


def accept_out(name: str, out: Any, inputs: Inputs, shape: tuple[int, ...], accumulate: bool,
               in_place: tuple[Argument | None, ...] = (), *, column: bool = False) -> Target:
    """Check an array that a result is to be written to; in_place are inputs that it may be, of whose dtype it then is.

    A column has no axis of features: all of its axes, or none, count samples.

    Raises
    ------
    OutError, OutDeviceError, ShapeError, DTypeError, TypeError
        Naming the argument, what was expected, what came and the cure.
    """
    if out is None:
        if accept_flag("accumulate", accumulate):
            raise OutError(f"accumulate=True adds into {name}, which was not given (pass {name}=, or accumulate=False)")
        return Target(name, shape, inputs.dtype, None, False, column=column)
    accumulate = accept_flag("accumulate", accumulate)
    memory = _memory(inputs.device, name, out)
    dtype = _dtype(name, memory.dtype)
    if inputs.dtype == "float64" and dtype in ("float16", "bfloat16"):
        raise DTypeError(f"{name} must be float64 or float32 for float64 inputs; got {dtype}")
    if memory.shape != shape:
        raise ShapeError(f"{name} must have shape {shape}; got {memory.shape}")
    if memory.readonly:
        raise OutError(f"{name} is read-only ({cure_of_read_only(out)})")
    if memory.place != inputs.place:
        raise OutDeviceError(f"{name} must lie where the inputs do, on {inputs.place}; got one on {memory.place}")
    check_kind(name, out, inputs.dz.name, containers.kind_of(inputs.dz.array))
    if overlaps_itself(memory):
        raise OutError(f"several elements of {name} share memory, so that not all of them can be written; got strides "
                       f"{memory.strides} for shape {shape} (pass {name}.copy())")
    if in_place and dtype != inputs.dtype:
        raise DTypeError(f"{name} must be {inputs.dtype}, as the inputs are; got {dtype}")
    for argument in inputs.arguments:
        if argument in in_place and replace(argument.memory, readonly=False, stream=memory.stream) == memory:
            continue
        if overlap(memory, argument.memory):
            raise OutError(f"{name} overlaps {argument.name} in memory (pass another array)")
    argument = _writable(name, out, _as_column(memory) if column else memory, dtype)
    return Target(name, shape, dtype, argument, accumulate, column=column)


def cure_of_read_only(out: Any) -> str:
    """What to do about an out that cannot be written."""
    kind = containers.kind_of(out)
    if kind.written:
        return "pass an array that can be written"
    return f"no array of {kind.name} can be written: leave it out, and take what is returned"


def _writable(name: str, out: Any, memory: device.Memory, dtype: str) -> Argument:
    """The array that kernels write to, or write a copy of if it lies on the host."""
    flat = Argument.of(name, out, memory, dtype, any_strides=True)
    if flat.compact and memory.place != device.HOST:
        raise OutError(f"{name} must be aligned, with leading axes that flatten to one; got strides {memory.strides} "
                       "(pass a new array and copy from it)")
    return flat


def accept_loss_out(name: str, out: Any, inputs: Inputs, shape: tuple[int, ...]) -> Target:
    """Check an array that losses are to be written to, of the type of the sums, as `accept_out` does."""
    accumulator = accumulator_of(inputs.dtype)
    target = accept_out(name, out, inputs, shape, False, column=True)
    if out is None:
        return replace(target, dtype=accumulator)
    if target.dtype != accumulator:
        raise DTypeError(f"{name} must have the type of the sums, {accumulator}; got {target.dtype}")
    return target


def _as_column(memory: device.Memory) -> device.Memory:
    """The same memory with another axis of one behind the others: one value for each sample."""
    return replace(memory, shape=(*memory.shape, 1), strides=(*memory.strides, memory.dtype.itemsize))


def accept_dz_out(name: str, out: Any, inputs: Inputs, batch_axis: int,
                  in_place: tuple[Argument | None, ...]) -> Target:
    """Check an array that dz is to be written to, as `accept_out` does; a new one has the order of the input's axes."""
    dz = accept_out(name, out, inputs, inputs.dz.memory.shape, False, in_place)
    return replace(dz, features_first=inputs.dz.layout == "features_first" and not batch_axis)


def accept_bias_out(name: str, out: Any, inputs: Inputs, keepdims: bool, accumulate: bool) -> Target:
    """Check an array that db is to be written to, as `accept_out` does."""
    shape = (1, inputs.out_features) if accept_flag("keepdims", keepdims) else (inputs.out_features,)
    return accept_out(name, out, inputs, shape, accumulate)


def accept_tuple(name: str, given: Any, kind: type[Named]) -> Named:
    """The tuple that a user passed as a named one.

    Raises
    ------
    TypeError
        If it is no tuple, or of another length.
    """
    if given is None:
        return kind()
    fields = kind._fields  # type: ignore[attr-defined]
    if not isinstance(given, tuple) or len(given) != len(fields):
        raise TypeError(f"{name} must be {kind.__name__}({', '.join(f'{field}=' for field in fields)}) or a tuple of "
                        f"{len(fields)}; got {type(given).__name__}")
    return kind(*given)


def as_names(value: Any) -> Any:
    """Names as a tuple, which a call can be looked up by; what is none, a flag for example, as it is."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bool):
        return value
    try:
        return tuple(value)
    except TypeError:
        return value


def are_names(values: tuple, known: Iterable[str]) -> bool:
    """Whether all of the values are among these names."""
    return all(isinstance(value, str) for value in values) and set(values) <= set(known)


def accept_outs(outs: tuple, accumulate: Any, needed: Iterable[str] | None = None,
                added: Iterable[str] | None = None) -> frozenset[str]:
    """Which of the results are added into their outs: of added, or of those that are needed.

    Raises
    ------
    OutError
        If an out is given that is not needed, or one is missing that is added into.
    TypeError, ValueError
        If accumulate is neither a flag nor names of results.
    """
    kind = type(outs)
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    needed = set(fields if needed is None else needed)
    able = [field for field in fields if field in (needed if added is None else added)]
    by_names = isinstance(accumulate, tuple)
    if by_names:
        if not are_names(accumulate, able):
            raise ValueError(f"accumulate must be True, False or names among {', '.join(able)}; got {accumulate}")
    else:
        accumulate = able if accept_flag("accumulate", accumulate) else ()
    for field, array in zip(fields, outs, strict=True):
        if array is not None and field not in needed:
            raise OutError(f"out.{field} was given, but {field} is not needed (name it in need=, or leave it out)")
        if array is None and field in accumulate:
            named, cure = (accumulate, f"leave {field!r} out") if by_names else (True, "accumulate=False")
            raise OutError(f"accumulate={named!r} adds into out.{field}, which was not given (pass "
                           f"out={kind.__name__}({field}=...), or {cure})")
    return frozenset(accumulate)


def check_apart(targets: list[Target]) -> None:
    """Hold the arrays that results are written to apart.

    Raises
    ------
    OutError
        If two of them overlap.
    """
    given = [(target.name, target.argument.memory) for target in targets if target.argument is not None]
    for (other_name, other), (name, memory) in itertools.combinations(given, 2):
        if overlap(memory, other):
            raise OutError(f"{name} overlaps {other_name} in memory (pass separate arrays)")


def overlap(left: device.Memory, right: device.Memory) -> bool:
    """Whether two arrays have a byte in common."""
    if left.place != right.place or 0 in left.shape or 0 in right.shape:
        return False
    (left_begin, left_end), (right_begin, right_end) = extent(left), extent(right)
    if left_end <= right_begin or right_end <= left_begin:
        return False
    try:
        return np.shares_memory(_ghost(left), _ghost(right), max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(memory: device.Memory) -> bool:
    """Whether two elements of an array have a byte in common."""
    if 0 in memory.shape:
        return False
    reach = memory.dtype.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(memory.strides, memory.shape, strict=True)
                               if size > 1):
        if stride < reach:
            break
        reach += (size - 1) * stride
    else:
        return False  # every step goes beyond all that shorter steps reach
    # Two elements that differ on an axis are as far apart as one at its beginning and one behind that.
    return any(overlap(_part(memory, axis, 0, 1), _part(memory, axis, 1, size))
               for axis, size in enumerate(memory.shape))


def _part(memory: device.Memory, axis: int, begin: int, end: int) -> device.Memory:
    """What lies between two indices of an axis."""
    shape = *memory.shape[:axis], end - begin, *memory.shape[axis + 1:]
    return replace(memory, shape=shape, byte=memory.byte + begin * memory.strides[axis])


def extent(memory: device.Memory) -> tuple[int, int]:
    """The first byte of an array with elements, and the one behind its last."""
    begin = end = memory.byte
    for size, stride in zip(memory.shape, memory.strides, strict=True):
        if stride < 0:
            begin += (size - 1) * stride
        else:
            end += (size - 1) * stride
    return begin, end + memory.dtype.itemsize


def _ghost(memory: device.Memory) -> np.ndarray:
    """A NumPy array at the same addresses, of which only the addresses may be used."""

    return np.asarray(SimpleNamespace(__array_interface__={
        "shape": memory.shape, "strides": memory.strides, "version": 3,
        "typestr": f"|V{memory.dtype.itemsize}", "data": (memory.byte, True)}))
