"""Kernels compiled ahead: what calls of some layers would launch, in several processes, whatever device is here.

A call is made for a device that is only stated, by which the very functions that users call say what they launch. Each
process compiles one kernel after another, with Numba's compiler even if this process is one of the simulator.
"""
from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal, NamedTuple

from . import cache, device, gradients, losses, output_gradients
from .compiler import check_capability, key_of
from .errors import DeviceError
from .facts import ITEM_BYTES, accumulator_of
from .families.upstream import CROSS_ENTROPY
from .launches import ALIGNMENT, Clear, Launch
from .slips import meant
from .typing import ActivationName, DTypeName, Precision, WeightLayout

#: the name of a GPU of which only the compute capability is known
_UNNAMED = "a GPU that is foreseen"
_WORKER = "from densegrad.warming import _serve; _serve()"


class Warmed(NamedTuple):
    """How many kernels the calls launch, and how many of them had to be compiled."""

    kernels: int
    compiled: int


def warmup(layers: Iterable[tuple[int, int, int]], dtypes: Iterable[DTypeName] = ("float32",), *,
           activations: Iterable[ActivationName | Literal["cross_entropy"]] = (), precision: Precision | None = None,
           batch_axis: int = 0, weight_layout: WeightLayout = "in_out", accumulate: bool = False,
           capability: tuple[int, int] | None = None, processes: int | None = None,
           watch: Callable[[int, int], None] | None = None) -> Warmed:
    """Compile ahead what the gradients of these layers launch, so that such calls do not wait for a compiler.

    Foreseen are `bias_grad`, `weight_grad`, `input_grad`, `weight_bias_grad`, `dense_grads`, and with activations
    `activation_grad`; with new results and with `out`, or with accumulate into `out` alone, of arrays that lie in C
    order. Not foreseen are weights and masks, compensated sums, plans of one's own and results of other dtypes.

    Parameters
    ----------
    layers : tuples of int
        (samples, in_features, out_features) of each layer.
    dtypes : names among "float16", "bfloat16", "float32" and "float64"
        Of the arrays.
    activations : names
        Of the functions above layers, as `activation_grad` takes them; "cross_entropy" for that and
        `cross_entropy_grad`.
    precision, batch_axis, weight_layout
        As in `weight_grad`; precision for float32 alone.
    accumulate : bool
        Whether dw and db are added into gradients of the type of the sums, as main gradients are, instead of written.
    capability : (int, int), optional
        The compute capability to compile for; of the GPU that is here if none is given.
    processes : int, optional
        How many compile at the same time; one for each processor if not given.
    watch : function, optional
        Called with how many kernels are compiled, and how many will be, at the beginning and after each.

    Returns
    -------
    Warmed
        `(kernels, compiled)`.

    Raises
    ------
    DeviceError
        If no capability is given and there is no GPU, or the compiler does not know it.
    RuntimeError
        If there is no folder to keep kernels in, or one of them cannot be compiled.
    ShapeError, ValueError, TypeError
        As the functions raise it.

    Examples
    --------
    >>> warmup([(128, 784, 512), (128, 512, 10)], ["float32", "bfloat16"], capability=(9, 0))
    Warmed(kernels=20, compiled=20)
    """
    if not cache.usable():
        raise RuntimeError("there is no folder to keep kernels in (set DENSEGRAD_CACHE_DIR to one of your own)")
    gpu = _UNNAMED
    if capability is None:
        where = device.current()
        if where.kind != "gpu":
            raise DeviceError("which GPU kernels are compiled for must be said where there is none (pass capability=, "
                              "for example (9, 0))")
        capability, gpu = where.capability(device.HOST), where.name_of(device.HOST)
    launches = foreseen([check_layer(layer) for layer in layers], list(dtypes), list(activations), capability, gpu=gpu,
                        precision=precision, batch_axis=batch_axis, weight_layout=weight_layout, accumulate=accumulate)
    missing = [launch for launch in launches if cache.load(cache.name_of(launch, capability)) is None]
    _compile(missing, capability, processes or os.cpu_count() or 1, watch or (lambda done, of: None))
    return Warmed(len(launches), len(missing))


def check_layer(layer: Any) -> tuple[int, int, int]:
    """Hold the sizes of a layer to what they can be.

    Raises
    ------
    ValueError
        If they are not three integers, at least 1.
    """
    if not (isinstance(layer, (tuple, list)) and len(layer) == 3 and all(
            isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in layer)):
        raise ValueError(f"a layer must be three sizes (samples, in_features, out_features), each at least 1; got "
                         f"{layer!r}")
    samples, in_features, out_features = layer
    return samples, in_features, out_features


def foreseen(layers: list[tuple[int, int, int]], dtypes: list[str], activations: list[Any],
             capability: tuple[int, int], *, gpu: str = _UNNAMED, precision: str | None = None, batch_axis: int = 0,
             weight_layout: str = "in_out", accumulate: bool = False) -> list[Launch]:
    """A launch of each kernel that calls of these layers would launch on a GPU of this compute capability and name."""
    for name in dtypes:
        if not isinstance(name, str) or name not in ITEM_BYTES:
            raise ValueError(f"dtypes must be {', '.join(ITEM_BYTES)}; got {name!r}{meant(name, ITEM_BYTES)}")
    where = _Foreseen(capability, gpu)
    with device.standing_in(where):
        for layer in layers:
            for dtype in dtypes:
                options = {"batch_axis": batch_axis, "weight_layout": weight_layout,
                           "precision": precision if dtype == "float32" else None}
                arrays = _arrays(where, layer, dtype, options)
                if accumulate:
                    arrays |= {name: where.array(arrays[name].shape, accumulator_of(dtype)) for name in ("dw", "db")}
                for out in (True,) if accumulate else (False, True):
                    _call(arrays, options, activations, out, accumulate)
    needed = max((launch.capability for launch in where.launches), default=capability)
    if capability < needed:
        raise DeviceError("kernels need compute capability {}.{} or newer; got {}.{}".format(*needed, *capability))
    return list({key_of(launch): launch for launch in where.launches}.values())


def _arrays(where: _Foreseen, layer: tuple[int, int, int], dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    samples, in_features, out_features = layer
    x: tuple[int, ...] = (samples, in_features)
    w = (out_features, in_features) if options["weight_layout"] == "out_in" else (in_features, out_features)
    dz = (out_features, samples) if options["batch_axis"] else (samples, out_features)
    shapes = {"x": x, "w": w, "dz": dz, "z": dz, "dx": x, "dw": w, "db": (out_features,)}
    arrays = {name: where.array(shape, dtype) for name, shape in shapes.items()}
    return arrays | {"labels": where.array((samples,), "int64")}


def _call(arrays: dict[str, Any], options: dict[str, Any], activations: list[Any], out: bool, accumulate: bool) -> None:
    """Make every call once, with new results or with `out`."""
    x, w, dz, z, labels = (arrays[name] for name in ("x", "w", "dz", "z", "labels"))
    dx, dw, db = (arrays[name] if out else None for name in ("dx", "dw", "db"))
    axis = {"batch_axis": options["batch_axis"]}
    alone: Any = {"accumulate": accumulate}
    both: Any = {"accumulate": ("dw", "db") if accumulate else False}
    gradients.bias_grad(dz, **axis, **alone, out=db)
    gradients.weight_grad(x, dz, **options, **alone, out=dw)
    gradients.input_grad(dz, w, **options, out=dx)
    gradients.weight_bias_grad(x, dz, **options, **both, out=gradients.WeightBiasGrads(dw, db))
    gradients.dense_grads(x, w, dz, **options, **both, out=gradients.DenseGrads(dx, dw, db))
    for name in activations:
        into = output_gradients.OutputGrads(dz if out else None, db)
        if name == CROSS_ENTROPY:
            losses.cross_entropy(dz, labels, **axis, **alone, out=losses.LossGrads(None, *into))
            losses.cross_entropy_grad(dz, labels, **axis, **alone, out=into)
        else:
            output_gradients.activation_grad(dz, z, name, **axis, **alone, out=into)
            gradients.dense_grads(x, w, dz, activation=name, z=z, **options, **both,
                                  out=gradients.DenseGrads(dx, dw, db))


class _Foreseen:
    """A GPU of this compute capability that is not here. Keeps what would be launched; its arrays are nowhere."""

    kind, place = "gpu", "GPU 0"
    argument = None
    array_kinds = "an array"

    def __init__(self, capability: tuple[int, int], name: str):
        self._capability, self.name = capability, name
        self._next = ALIGNMENT
        self.launches: list[Launch] = []

    def array(self, shape: tuple[int, ...], dtype: str) -> device.Memory:
        """An array in C order, apart from all others."""
        kind = device.dtype_of(dtype)
        strides, size = [], kind.itemsize
        for length in reversed(shape):
            strides.append(size)
            size *= length
        begin, self._next = self._next, self._next - size // -ALIGNMENT * ALIGNMENT
        return device.Memory(shape, tuple(reversed(strides)), kind, begin, False, self.place)

    def memory(self, array: Any) -> device.Memory:
        """Where the array lies."""
        return array

    def seen(self, array: device.Memory) -> device.Seen:
        """What a call sees of the array."""
        return device.Seen((array.shape, array.strides, array.dtype, device.alignment_of(array.byte)), array.byte)

    def taken_over(self, array: Any, stream: Any) -> Any:
        """The array, which no other library has."""
        return array

    def serving(self, like: Any) -> _Foreseen:
        """Itself, for all arrays."""
        return self

    def maker(self, shape: tuple[int, ...], dtype: str, features_first: bool) -> device.Maker:
        """What makes new results, which lie nowhere."""
        return lambda: (None, 0)

    def workspace(self, size: int) -> device.Maker:
        """What makes workspaces, which lie nowhere."""
        return lambda: (None, 0)

    def hands_over(self, like: Any) -> bool:
        """All of them."""
        return True

    def number_memory(self, value: Any, accumulator: str) -> None:
        """Numbers are the host's."""

    def capturing(self, stream: int) -> bool:
        """Nothing is recorded."""
        return False

    def current_stream(self, place: str) -> int:
        """The default stream."""
        return 0

    @contextlib.contextmanager
    def using(self, stream: Any, place: str) -> Iterator[int]:
        """The default stream."""
        yield 0

    def name_of(self, place: str) -> str:
        """The name that was stated."""
        return self.name

    def capability(self, place: str) -> tuple[int, int]:
        """The compute capability that was stated."""
        return self._capability

    def loaded(self, launches: tuple[Launch | Clear, ...], place: str) -> tuple[()]:
        """Keep the launches: there is nothing to launch."""
        self.launches += [launch for launch in launches if isinstance(launch, Launch)]
        return ()


def _compile(launches: list[Launch], capability: tuple[int, int], processes: int,
             watch: Callable[[int, int], None]) -> None:
    """Compile and keep the kernels of these launches, so many at a time."""
    watch(0, len(launches))
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def compiled(launch: Launch) -> None:
        worker = idle.get()
        try:
            worker.compile(launch, capability)
        finally:
            idle.put(worker)

    count = min(processes, len(launches))
    if not count:
        return
    with contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor(count)
        stack.callback(pool.shutdown, cancel_futures=True)
        for _ in range(count):  # they end before the pool does, which waits for what still runs
            idle.put(stack.enter_context(_Worker()))
        waiting = [pool.submit(compiled, launch) for launch in launches]
        for done, future in enumerate(as_completed(waiting), 1):
            future.result()
            watch(done, len(launches))


class _Worker:
    """A process that compiles the launches that it is given."""

    def __enter__(self) -> _Worker:
        environment = {**device.environment_of_compilers(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen([sys.executable, "-c", _WORKER], env=environment, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE)
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def compile(self, launch: Launch, capability: tuple[int, int]) -> None:
        """Compile and keep the kernel of a launch."""
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a process that compiles has no pipes")
        with contextlib.suppress(BrokenPipeError):
            pickle.dump((launch, capability), process.stdin)
            process.stdin.flush()
        said = process.stdout.readline()
        problem = json.loads(said) if said else "the process that compiled it ended"
        if problem:
            raise RuntimeError(f"{launch.kernel} was not compiled: {problem}")


def _serve() -> None:
    """Compile what comes in on stdin; say on stdout, in one line for each, what went wrong."""
    answers, sys.stdout = sys.stdout, sys.stderr
    while True:
        try:
            launch, capability = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            check_capability(capability)
            cache.code_of(launch, capability)
            kept = cache.load(cache.name_of(launch, capability))
            problem = "" if kept else "it could not be kept, as the log says"
        except Exception as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())
        print(json.dumps(problem), file=answers, flush=True)
