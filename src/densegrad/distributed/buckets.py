"""Gradients as one flat bucket in the dtype that travels, and results of the kind, dtype and structure that came in."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .. import containers, device, tensors
from ..errors import DTypeError, OutError
from ..facts import ITEM_BYTES, accumulator_of
from ..slips import in_place_of
from .engines import GPU, HOST, place_of, poll


def opened(name: str, array: Any) -> Any:
    """The array as one of NumPy or CuPy over the same memory.

    Raises
    ------
    TypeError
        If it is no array, or has no memory that could be used.
    DTypeError
        If its dtype is none of densegrad's.
    """
    kind = containers.kind_of(array)
    if kind is containers.UNREAD:
        raise TypeError(f"{name} must be an array; got {type(array).__name__} ({in_place_of(name, array)})")
    takers = dict.fromkeys(containers.HOST_TYPES, containers.take_on_host)
    if "cupy" in sys.modules:
        takers |= dict.fromkeys(containers.GPU_TYPES, lambda handed: sys.modules["cupy"].from_dlpack(handed))
    found = containers.Guest(array, kind, takers) if kind.handed_over else array
    problem = containers.problem(found, ("cpu", "cuda"))
    if problem:
        raise TypeError(f"{name} is no array whose memory can be used: {problem}")
    found = containers.host_array(found)
    if tensors.is_tensor(found):
        found = sys.modules["cupy"].from_dlpack(found.detach())
    elif not isinstance(found, np.ndarray) and kind.name == "Numba":
        found = sys.modules["cupy"].asarray(containers.on_stream(found, None))
    if found.dtype.name not in ITEM_BYTES:
        *others, last = ITEM_BYTES
        raise DTypeError(f"{name} must be {', '.join(others)} or {last}; got {found.dtype} (convert it with "
                         f"{name}.astype('float32'))")
    return found


def check_own(name: str, array: Any) -> None:
    """Hold an array to be one of NumPy or CuPy.

    Raises
    ------
    TypeError
        If it is another.
    """
    if containers.kind_of(array).name not in ("NumPy", "CuPy"):
        raise TypeError(f"{name} must hold arrays of NumPy or CuPy; got {type(array).__name__} (convert it with "
                        "numpy.asarray or cupy.asarray)")


def module_of(array: Any) -> Any:
    """NumPy, or CuPy of an array on a GPU."""
    return module_at(place_of(array))


def module_at(place: str) -> Any:
    """NumPy, or CuPy on a GPU."""
    return np if place == HOST else sys.modules["cupy"]


class Structure(NamedTuple):
    """How the arrays that came in were held together: an array alone, a tuple, a named tuple or a list."""

    names: tuple[str, ...]
    rebuilt: Callable[[list[Any]], Any]


def structure_of(name: str, grads: Any) -> tuple[Structure, list[Any]]:
    """How they are held together, and what is held: arrays or None.

    Raises
    ------
    TypeError
        If there is no array.
    """
    if isinstance(grads, (tuple, list)):
        fields = getattr(grads, "_fields", range(len(grads)))
        names = tuple(f"{name}.{field}" if isinstance(field, str) else f"{name}[{field}]" for field in fields)
        make = getattr(type(grads), "_make", type(grads))
        held = list(grads)
    else:
        names, make, held = (name,), _alone, [grads]
    if all(one is None for one in held):
        raise TypeError(f"{name} must be an array, or a tuple or list with an array in it; got "
                        f"{'None' if grads is None else 'no array'} (an empty batch has gradients of zeros, which "
                        "dense_grads gives)")
    return Structure(names, make), held


def _alone(held: list[Any]) -> Any:
    return held[0]


class Bucket:
    """The arrays of one reduction: what is read, and where results are written."""

    def __init__(self, grads: Any, out: Any):
        structure, held = structure_of("grads", grads)
        self.structure, self.given = structure, held
        self.sources = [None if one is None else opened(name, one)
                        for name, one in zip(structure.names, held, strict=True)]
        self.arrays = [one for one in self.sources if one is not None]
        if len({place_of(one) for one in self.arrays}) != 1:
            raise TypeError("grads must hold arrays that lie all on the host or all on a GPU; got both (move some)")
        self.place, self.size = place_of(self.arrays[0]), sum(one.size for one in self.arrays)
        if out is None:
            made = [None if one is None else _like(array, one)
                    for one, array in zip(held, self.sources, strict=True)]
        else:
            made = self._checked(out)
        self._targets = [one for one in made if one is not None]
        self._out = out

    def _checked(self, out: Any) -> list[Any]:
        """Where results are written that a user has given, as arrays of NumPy or CuPy."""
        structure, held = structure_of("out", out)
        if len(held) != len(self.given):
            raise OutError(f"out must have the structure of grads, {len(self.given)} fields; got {len(held)}")
        found = []
        for name, one, source in zip(structure.names, held, self.sources, strict=True):
            if (one is None) != (source is None):
                raise OutError(f"{name} must be {'None' if source is None else 'an array'}, as in grads")
            target = None if one is None else opened(name, one)
            if target is not None and source is not None:
                same = target.shape == source.shape and target.dtype == source.dtype
                if not same or place_of(target) != self.place:
                    raise OutError(f"{name} must have the shape {source.shape}, the dtype {source.dtype} and the place "
                                   f"of its gradient, {self.place}; got {target.shape}, {target.dtype}, "
                                   f"{place_of(target)}")
                if not containers.kind_of(one).written or (self.place == HOST and not target.flags.writeable):
                    raise OutError(f"{name} is read-only (leave out= away, and take the new array)")
            found.append(target)
        return found

    @property
    def description(self) -> str:
        """Shapes and dtypes, and which fields are None: what all ranks must have alike."""
        return "; ".join("None" if one is None else f"{one.dtype.name} {tuple(one.shape)}" for one in self.sources)

    def usual_wire(self) -> str:
        """The dtype of the sums of these gradients: the widest, if they differ."""
        return max((accumulator_of(one.dtype.name) for one in self.arrays), key=ITEM_BYTES.__getitem__)

    def flat(self, wire: str) -> Any:
        """All of them in a row, copied, in this dtype."""
        xp, dtype = module_of(self.arrays[0]), device.dtype_of(wire)
        flat = xp.empty(self.size, dtype)
        for one, span in zip(self.arrays, spans([one.size for one in self.arrays]), strict=True):
            flat[span] = one.reshape(-1).astype(dtype, copy=False)
        return flat

    def write(self, flat: Any) -> None:
        """Write what is in a row into the results, each rounded to its dtype."""
        for one, span in zip(self._targets, spans([one.size for one in self._targets]), strict=True):
            one[...] = flat[span].reshape(one.shape).astype(one.dtype, copy=False)

    def results(self) -> Any:
        """What the user gets: `out`, or new arrays of the kinds that came in."""
        if self._out is not None:
            return self._out
        made = iter(self._targets)
        return self.structure.rebuilt([None if one is None else _delivered(next(made), one) for one in self.given])


def _like(array: Any, given: Any) -> Any:
    """A new array of NumPy or CuPy for a result; of a tensor on a GPU in PyTorch's memory."""
    if tensors.is_tensor(given) and place_of(array) == GPU:
        return sys.modules["cupy"].from_dlpack(given.detach().new_empty(given.shape))
    return module_of(array).empty(array.shape, array.dtype)


def _delivered(array: Any, given: Any) -> Any:
    if tensors.is_tensor(given) and place_of(array) == GPU:
        return sys.modules["torch"].from_dlpack(array)
    return containers.kind_of(given).result(array, given)


def spans(sizes: Sequence[int]) -> list[slice]:
    """Where arrays of these sizes lie in a row."""
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def split(flat: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Views of what is in a row, with these shapes."""
    parts = spans([prod(shape) for shape in shapes])
    return [flat[span].reshape(shape) for span, shape in zip(parts, shapes, strict=True)]


def queued_at(given: Any, stream: Any) -> Callable[[float], AbstractContextManager[None]]:
    """What a reduction enters, with the time at which it must be done: there its work is queued.

    On a GPU that is a stream of its own, behind what is queued now where `given` is written: on `stream`, or the
    current one of its library. The with block ends when the work is done, or Late is raised.
    """
    array = opened("grads", given)
    if place_of(array) == HOST:
        return lambda until: nullcontext()
    gpu = device.current().serving(given)
    place = gpu.memory(given).place
    written = gpu.mark(stream, place)

    @contextmanager
    def beside(until: float) -> Iterator[None]:
        with gpu.beside(written, place) as finished:
            yield
            poll(finished(), until)

    return beside
