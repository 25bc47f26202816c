"""Where kernels run: a GPU, with CuPy's memory and streams, or the Numba CUDA simulator, with NumPy's memory.

Beside PyTorch's tensors on a GPU memory and streams are PyTorch's; its tensors on the CPU are taken as NumPy's arrays.

The only module that knows which. Both kinds of device have the same methods, and ``current`` finds the one to use.
Loading makes a launch ready for many calls: its kernel is compiled or brought from the cache, and what no call changes
is packed. A call fills in the rest, by the names of the slots, and launches.
"""
from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import accumulate, groupby
from math import prod
from typing import Any

import numpy as np

from . import compiler, containers, tensors
from .errors import DeviceError
from .estimate import duration, simulated_seconds
from .launches import ALIGNMENT, OPERAND_ALIGNMENT, Clear, Launch, Room, Slot, TensorMap
from .packing import PackedLaunches, result_of
from .staging import Fields, PinnedStaging, Staging

log = logging.getLogger("densegrad")

NO_DEVICE = ("densegrad found no GPU ({reason}): install CuPy on a machine with one (pip install 'numba-cuda[cu13]' "
             "cupy-cuda13x), or set NUMBA_ENABLE_CUDASIM=1 before Python starts to run on the CPU in Numba's CUDA "
             "simulator")

#: dynamic shared memory that every kernel may have
SHARED_BYTES_UNASKED = 49152

#: how many kernels are kept loaded, those used last
MOST_FUNCTIONS = 1024

#: how long a thread of the simulator runs before another does: Python's own 5 ms make barriers slow, and in much less
#: those that wait take turns in vain
TURN_SECONDS = 2e-3

#: from which estimate on the simulator says how long a call will take
PATIENCE_SECONDS = 10

#: the place of NumPy arrays on a machine whose kernels run on a GPU
HOST = "the host"


def _place(device_id: int | str) -> str:
    return f"GPU {device_id}"


_instead: ContextVar[Any] = ContextVar("densegrad_device", default=None)


def current() -> Any:
    """The device of this process, or what stands in for it.

    Raises
    ------
    DeviceError
        If there is neither a GPU nor the simulator.
    """
    return _instead.get() or _own()


@cache
def _own() -> Gpu | Simulator:
    return Simulator() if simulated() else _gpu()


@contextlib.contextmanager
def standing_in(other: Any) -> Iterator[None]:
    """Another device in the with block, for this thread: one with the methods of these."""
    token = _instead.set(other)
    try:
        yield
    finally:
        _instead.reset(token)


def simulated() -> bool:
    """Whether Numba's simulator was asked for. Never imports Numba, which reads the environment when it is imported."""
    numba = sys.modules.get("numba")
    if numba is not None:
        return bool(numba.config.ENABLE_CUDASIM)
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "").strip() not in ("", "0")


def environment_of_compilers() -> dict[str, str]:
    """The environment of processes in which Numba compiles, whatever it does in this one."""
    return {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}


def _gpu() -> Gpu:
    reason = gpu_missing()
    if reason:
        raise DeviceError(NO_DEVICE.format(reason=reason))
    return Gpu()


def gpu_missing() -> str:
    """Why no GPU can be used, or an empty string if one can. Never imports Numba."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy says: {error}"
    return "" if count else "CuPy sees no device"


@lru_cache(maxsize=16)
def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of this name, bfloat16 included."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@dataclass(frozen=True)
class Memory:
    """Where an array's elements lie and how: strides in bytes, from the byte address of element (0, ..., 0)."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype
    byte: int
    readonly: bool
    place: str
    stream: int | None = None


#: makes a new array of one layout: gives it, and where it lies, for a kernel
Maker = Callable[[], tuple[Any, Any]]


@dataclass(slots=True)
class Seen:
    """What a call sees of an array: what its launches follow from, the address of its first element, its stream."""

    layout: tuple[Any, ...]
    address: int
    stream: int | None = None

    def fits(self, other: Seen) -> bool:
        """Whether what follows from the other's layout serves this array, too: the same, or aligned to more."""
        (*mine, alignment), (*others, needed) = self.layout, other.layout
        return mine == others and alignment >= needed

    def __str__(self) -> str:
        shape, strides, dtype, place, *others, alignment = self.layout
        read_only, kind = others or (False, None)
        return (f"shape {tuple(shape)}, strides {strides}, {dtype}, {'read-only ' * read_only}on "
                f"{_place(place) if isinstance(place, int) else place}, at a multiple of {alignment} bytes"
                + (f" ({kind.__name__})" if kind else ""))


def alignment_of(address: int) -> int:
    """The largest power of two, up to OPERAND_ALIGNMENT, that divides the address."""
    return (address | OPERAND_ALIGNMENT) & -(address | OPERAND_ALIGNMENT)


def _seen(memory: Memory | None, kind: type) -> Seen | None:
    if memory is None:
        return None
    return Seen((memory.shape, memory.strides, memory.dtype, memory.place, memory.readonly, kind,
                 alignment_of(memory.byte)), memory.byte, memory.stream)


def seen_tensor(tensor: Any) -> Seen | None:
    """What a call sees of a CUDA tensor, or None if kernels cannot use it; strides are PyTorch's, in elements.

    Of its dtype that says nothing, which is for others to look at.
    """
    types, kind = tensors.plain()
    if type(tensor) not in types and tensors.cure(tensor, ("cuda",)):
        return None
    try:
        address, shape, strides = tensor.data_ptr(), tensor.shape, tensor.stride()
    except RuntimeError:  # sparse, nested and torch.func's tensors lack one of them
        return None
    if tensor.is_neg() or (not address and tensor.numel()):
        return None
    return Seen((shape, strides, tensor.dtype, tensor.get_device(), False, kind, alignment_of(address)), address)


def _taken_over(array: Any, takers: dict[int, Callable[[Any], Any]]) -> Any:
    """The array, or a guest if its library hands it over by DLPack: from devices of these types."""
    kind = containers.kind_of(array)
    taken = isinstance(array, containers.Guest)
    return containers.Guest(array, kind, takers) if kind.handed_over and not taken else array


def _host_memory(array: np.ndarray, place: str) -> Memory:
    return Memory(array.shape, array.strides, array.dtype, array.__array_interface__["data"][0],
                  not array.flags.writeable, place)


def _laid_out(empty: Any, shape: tuple[int, ...], dtype: np.dtype, features_first: bool) -> Any:
    """An array of NumPy or CuPy with undefined elements."""
    if not features_first:
        return empty(shape, dtype)
    *batch, features = shape
    array = empty((features, *batch), dtype)
    for axis in range(len(batch)):
        array = array.swapaxes(axis, axis + 1)
    return array


def tensor_maker(torch: Any, where: Any, shape: tuple[int, ...], dtype: str, features_first: bool) -> Maker:
    """What makes tensors of this layout on a device of PyTorch."""
    order = (*shape[-1:], *shape[:-1]) if features_first else shape
    steps = tuple(accumulate(reversed(order[1:]), lambda step, length: step * max(length, 1), initial=1))[::-1]
    if features_first:
        steps = (*steps[1:], *steps[:1])
    # With strides PyTorch takes half the time that empty takes.
    empty = partial(torch.empty_strided, shape, steps, dtype=getattr(torch, dtype), device=where)

    def make() -> tuple[Any, int]:
        tensor = empty()
        return tensor, tensor.data_ptr()

    return make


def _aligned(size: int) -> np.ndarray:
    """Undefined bytes, at least so many, that begin at a multiple of ALIGNMENT."""
    cells = np.empty(size + ALIGNMENT, np.uint8)
    return cells[-cells.ctypes.data % ALIGNMENT:][:max(size, 1)]


class Simulator:
    """Numba's CUDA simulator. Its memory is NumPy's; it has no streams."""

    kind = "simulator"
    name = "Numba CUDA simulator"
    array_kinds = "a NumPy array, a CPU tensor of PyTorch, an array of JAX on the CPU or one with __dlpack__"
    tensor_devices: tuple[str, ...] = ("cpu",)
    is_host = True  # whether its memory is the host's

    def memory(self, array: Any) -> Memory | None:
        """Where the array lies, or None if it is no array that kernels can use."""
        array = containers.host_array(array)
        return _host_memory(array, "the simulator") if isinstance(array, np.ndarray) else None

    def seen(self, array: Any) -> Seen | None:
        """What a call sees of the array, or None if it is none that kernels can use."""
        return _seen(self.memory(array), containers.type_of(array))

    def taken_over(self, array: Any, stream: Any) -> Any:
        """The array, or what its library hands over by DLPack."""
        return _taken_over(array, dict.fromkeys(containers.HOST_TYPES, containers.take_on_host))

    def settle(self, arrays: Any, streams: set[int], stream: int) -> None:
        """Let other streams wait for what is queued on one, which is done here when it has been queued."""

    def serving(self, like: Any) -> Simulator:
        """The device with the memory and the streams of the library whose array this is."""
        return self if containers.kind_of(like).stays else SimulatorOfAlignedResults()

    def placed(self, array: Any, compact: bool) -> Any:
        """The array where kernels can read it: itself, or an aligned copy in C order if compact."""
        if not compact:
            return array
        array = containers.host_array(array)
        copy = _aligned(array.nbytes)[:array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    def wait_for(self, memory: Memory | Seen, stream: int) -> None:
        """Let the stream wait for the work that writes this memory."""

    def workspace(self, size: int) -> Maker:
        """What makes undefined bytes, at least so many, that begin at a multiple of ALIGNMENT."""
        def make() -> tuple[np.ndarray, np.ndarray]:
            workspace = _aligned(size)
            return workspace, workspace

        return make

    def maker(self, shape: tuple[int, ...], dtype: str, features_first: bool) -> Maker:
        """What makes arrays with undefined elements, whose last axis is the first in memory if features_first."""
        kind = dtype_of(dtype)

        def make() -> tuple[Any, Any]:
            array = _laid_out(np.empty, shape, kind, features_first)
            return array, self.address(array)

        return make

    def staging(self, block: int, fields: Fields, on_host: bool) -> Staging:
        """Memory for blocks of rows on their way to kernels."""
        aligned = SimulatorOfAlignedResults()
        return Staging(block, fields, lambda shape, dtype: aligned.maker(shape, dtype, False)()[0])

    def deliver(self, array: np.ndarray, like: Any) -> Any:
        """The array as the kind of container that like is."""
        return containers.kind_of(like).result(array, containers.given_back(like))

    def address(self, array: Any) -> SimulatedAddress:
        """Where the element (0, ..., 0) lies, for a kernel."""
        return SimulatedAddress(containers.host_array(array))

    @contextlib.contextmanager
    def using(self, stream: Any, place: str) -> Iterator[int]:
        """No stream, whichever is asked for."""
        yield 0 if stream is None else self.pointer(stream)

    def current_stream(self, place: str) -> int | None:
        """The stream that is used where none is asked for."""
        return 0

    def argument(self, array: Any, seen: Seen) -> SimulatedAddress:
        """Where an array lies that was seen, for a kernel."""
        return SimulatedAddress(containers.host_array(array))

    def hands_over(self, like: Any) -> bool:
        """Whether arrays that the device makes are of the kind of container that like is."""
        return isinstance(like, np.ndarray)

    def workspace_address(self, workspace: np.ndarray) -> np.ndarray:
        """Where a workspace lies, for a launch."""
        return workspace

    def number_memory(self, value: Any, accumulator: str) -> Memory | None:
        """Where a number lies that kernels can read as one of this type, or None if it is one of the host's."""
        value = containers.host_array(value)
        on_device = type(value) is np.ndarray and value.ndim == 0 and value.dtype == accumulator
        return self.memory(value) if on_device else None

    def pointer(self, stream: Any) -> int:
        """No stream, whichever is asked for. What is neither a stream nor Numba's stand-in for one is refused."""
        from numba import cuda

        if not isinstance(stream, cuda.stream):
            stream_pointer(stream)
        return 0

    def stream_in_use(self) -> None:
        """What has to be kept so that the stream in use stays: nothing."""

    def capturing(self, stream: int) -> bool:
        """Whether what is queued on the stream is recorded and not done."""
        return False

    def name_of(self, place: str) -> str:
        """The name of the device where arrays lie."""
        return self.name

    def capability(self, place: str) -> tuple[int, int]:
        """The compute capability whose instructions the simulator's kernels are made of."""
        return 8, 0

    def loaded(self, launches: tuple[Launch | Clear, ...], place: str) -> tuple[Any, ...]:
        """The launches of a call, ready for many calls; those that take long say so before they begin."""
        seconds = simulated_seconds(launches)
        before = (_Announcement(seconds),) if seconds > PATIENCE_SECONDS else ()
        return (*before, *(self.load(launch, place) for launch in launches))

    def load(self, launch: Launch | Clear, place: str) -> Any:
        """The launch, ready for many calls: with values of its slots and a stream."""
        return _SimulatedClear(launch) if isinstance(launch, Clear) else _SimulatedLaunch(launch)


class SimulatorOfAlignedResults(Simulator):
    """The same beside arrays of libraries that take memory over without a copy only if it is aligned, as JAX does."""

    def maker(self, shape: tuple[int, ...], dtype: str, features_first: bool) -> Maker:
        """What makes arrays with undefined elements, whose last axis is the first in memory if features_first."""
        kind = dtype_of(dtype)

        def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            size = prod(shape) * dtype.itemsize
            return _aligned(size)[:size].view(dtype).reshape(shape)

        def make() -> tuple[Any, Any]:
            array = _laid_out(empty, shape, kind, features_first)
            return array, self.address(array)

        return make


class _Announcement:
    """What is said of a call before its launches begin."""

    def __init__(self, seconds: float):
        self.words = f"the simulator will take about {duration(seconds)} for this call, which a GPU is made for"

    def __call__(self, values: Mapping[str, Any], stream: int) -> None:
        log.warning("%s", self.words)


class _SimulatedClear:
    """A memset."""

    def __init__(self, clear: Clear):
        self.room = clear.room

    def __call__(self, values: Mapping[str, Any], stream: int) -> None:
        _room(values["workspace"], self.room)[...] = 0


class _SimulatedLaunch:
    """A launch in the simulator. Several threads take turns at building and launching: the simulator's state is the
    process's."""

    _turn = threading.RLock()

    def __init__(self, launch: Launch):
        with self._turn:
            self.kernel = compiler.kernel_of(launch.module, launch.kernel, launch.constants)
        self.shape = launch.grid, launch.block, 0, launch.shared_bytes
        self.arguments = tuple(zip(launch.values, launch.types, strict=True))

    def __call__(self, values: Mapping[str, Any], stream: int) -> None:
        arguments = tuple(_simulated(values, value, kind) for value, kind in self.arguments)
        with self._turn:
            # Its threads take turns often, as most of them wait for others at barriers.
            interval = sys.getswitchinterval()
            sys.setswitchinterval(TURN_SECONDS)
            try:
                self.kernel[self.shape](*arguments)
            finally:
                sys.setswitchinterval(interval)


def _simulated(values: Mapping[str, Any], value: Any, kind: str) -> Any:
    """An argument as the simulator's kernels take it."""
    if isinstance(value, TensorMap):
        return SimulatedMap(_simulated(values, value.address, "int64"), value)
    if isinstance(value, Room):
        return SimulatedAddress(_room(values["workspace"], value))
    if isinstance(value, Slot):
        value = values[value.name]
    return value if kind == "int64" else np.dtype(kind).type(value)


def _room(workspace: np.ndarray, room: Room) -> np.ndarray:
    dtype = dtype_of(room.dtype)
    return workspace[room.offset:room.offset + room.items * dtype.itemsize].view(dtype)


class SimulatedAddress:
    """The address of an array's first element, as kernels of the simulator see it.

    Elements are counted from there, as on a device, but accesses outside the array's own memory, and vectors that are
    not aligned to their size, are errors.
    """

    def __init__(self, array: np.ndarray):
        if not array.size:
            self.origin, self.cells, self.byte = 0, array.ravel(), 0
            return
        lowest = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in array.strides)
        first = sum((size - 1) * -stride for size, stride in zip(array.shape, array.strides, strict=True) if stride < 0)
        span = sum((size - 1) * abs(stride) for size, stride in zip(array.shape, array.strides, strict=True))
        self.origin = first // array.itemsize
        self.cells = np.lib.stride_tricks.as_strided(
            array[lowest] if lowest else array, (span // array.itemsize + 1,), (array.itemsize,),
            writeable=array.flags.writeable)
        self.byte = self.cells.__array_interface__["data"][0] + first

    def __int__(self) -> int:
        return self.byte

    def read(self, index: int, count: int) -> np.ndarray:
        """The elements of one access."""
        return self.cells[self._span(index, count)]

    def write(self, index: int, values: np.ndarray) -> None:
        """Store the elements of one access."""
        self.cells[self._span(index, len(values))] = values.astype(self.cells.dtype)

    def read_each(self, index: int, count: int) -> np.ndarray:
        """Neighbouring elements, each accessed by itself."""
        return self.cells[self._within(index, count)]

    def write_each(self, index: int, values: np.ndarray) -> None:
        """Store neighbouring elements, each by itself."""
        self.cells[self._within(index, len(values))] = values

    def _within(self, index: int, count: int) -> slice:
        first = self.origin + index
        if first < 0 or first + count > len(self.cells):
            raise IndexError(f"elements {first} to {first + count - 1} of {len(self.cells)}")
        return slice(first, first + count)

    def _span(self, index: int, count: int) -> slice:
        size = self.cells.itemsize
        if (self.byte + index * size) % (count * size):
            raise IndexError(f"{count} elements of {size} bytes at byte {index * size}: not aligned")
        return self._within(index, count)


class SimulatedMap:
    """A tensor map, as kernels of the simulator see it: the boxes of a matrix, in lines."""

    def __init__(self, address: SimulatedAddress, numbers: TensorMap):
        self.address, self.numbers = address, numbers
        self.size = address.cells.itemsize

    def _lines(self, first: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
        """(line of the box, index of its first element, elements within the matrix) of the lines within the matrix."""
        (length, *outer), steps = self.numbers.lengths, self.numbers.steps
        across, *others = first
        count = min(max(length - across, 0), self.numbers.box[0])
        for line, where in enumerate(np.ndindex(*self.numbers.box[:0:-1])):
            at = [one + other for one, other in zip(where[::-1], others, strict=True)]
            if count and all(0 <= one < most for one, most in zip(at, outer, strict=True)):
                yield line, across + sum(one * step // self.size for one, step in zip(at, steps, strict=True)), count

    def read(self, first: tuple[int, ...]) -> np.ndarray:
        """The lines of a box, zeros beyond the matrix, by the coordinates of its first element."""
        found = np.zeros((prod(self.numbers.box[1:]), self.numbers.box[0]), self.address.cells.dtype)
        for line, index, count in self._lines(first):
            found[line, :count] = self.address.read_each(index, count)
        return found

    def write(self, first: tuple[int, ...], lines: np.ndarray, adds: bool) -> None:
        """Store the lines of a box, or add them to what is there; nothing beyond the matrix."""
        for line, index, count in self._lines(first):
            values = lines[line, :count].astype(self.address.cells.dtype)
            self.address.write_each(index, self.address.read_each(index, count) + values if adds else values)


class Gpu:
    """CUDA devices. Memory and streams are CuPy's; kernels are launched by Numba and nothing is synchronised."""

    kind = "gpu"
    argument: Any = None  # kernels take addresses as they are seen
    array_kinds = ("a CuPy or NumPy array, a tensor of PyTorch, an array of JAX or one with __dlpack__ or "
                   "__cuda_array_interface__")
    tensor_devices: tuple[str, ...] = ("cpu", "cuda")
    is_host = False

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self._array = cupy.ndarray
        self._functions: OrderedDict[tuple, Any] = OrderedDict()
        self._loading = threading.RLock()
        self._models: dict[int, tuple[str, tuple[int, int], int]] = {}
        self._of_tensors: dict[int, GpuOfTensors] = {}
        self._busy: dict[int, deque[tuple[Any, Any]]] = {}  # by streams: events, and arrays that are used until then
        self._settling = threading.Lock()

    @property
    def name(self) -> str:
        """The name of the device in use."""
        return self.name_of(HOST)

    def memory(self, array: Any) -> Memory | None:
        """Where the array lies, or None if it is no array that kernels can use."""
        if isinstance(array, self.cupy.ndarray):
            return Memory(array.shape, array.strides, array.dtype, array.data.ptr, False, _place(array.device.id))
        if tensors.is_tensor(array):
            return self._tensor_memory(array)
        if isinstance(array, np.ndarray):
            return _host_memory(array, HOST)
        if isinstance(array, containers.Guest):
            memory = self.memory(array.array)
            return memory and replace(memory, readonly=array.readonly)
        kind = containers.kind_of(array)
        if kind is containers.UNREAD or kind.handed_over:
            return None
        try:
            shape, strides, dtype, byte, readonly, stream = containers.interface_of(array)
        except ValueError:  # which `containers.problem` says
            return None
        return Memory(shape, strides, dtype, byte, readonly, place=_place(self._device_of(byte)), stream=stream)

    def seen(self, array: Any) -> Seen | None:
        """What a call sees of the array, or None if it is none that kernels can use."""
        if type(array) is not self._array:
            if tensors.is_tensor(array) and array.is_cuda:
                return seen_tensor(array)
            return _seen(self.memory(array), containers.type_of(array))
        data = array.data
        address = data.ptr
        return Seen((array.shape, array.strides, array.dtype, data.device_id, alignment_of(address)), address)

    def _tensor_memory(self, tensor: Any) -> Memory | None:
        host = tensors.host_array(tensor)
        if isinstance(host, np.ndarray):
            return _host_memory(host, HOST)
        if tensors.cure(tensor, self.tensor_devices):
            return None
        return Memory(tuple(tensor.shape), tensors.strides(tensor), dtype_of(tensors.dtype_name(tensor)),
                      tensor.data_ptr(), False, _place(tensor.get_device()))

    def taken_over(self, array: Any, stream: Any) -> Any:
        """The array, or what its library hands over by DLPack: for use on this stream, by default the current one."""
        def take(handed: Any) -> Any:
            with self.using(stream, _place(handed.__dlpack_device__()[1])):
                return self.cupy.from_dlpack(handed)

        return _taken_over(array, dict.fromkeys(containers.HOST_TYPES, containers.take_on_host)
                           | dict.fromkeys(containers.GPU_TYPES, take))

    def settle(self, arrays: Any, streams: set[int], stream: int) -> None:
        """Let other streams wait for what is queued on one, and keep the arrays until it is done.

        What is done is noticed here, when the next call settles: nothing waits for a GPU. While a stream is captured,
        order and lifetimes are those of the graph.
        """
        if self.capturing(stream):
            return
        of = self.cupy.cuda.Stream.from_external
        done = of(_ForeignStream(stream, None)).record(self.cupy.cuda.Event(disable_timing=True))
        for other in streams:
            of(_ForeignStream(other, None)).wait_event(done)
        let_go = []  # until the lock is another thread's
        with self._settling:
            self._busy.setdefault(stream, deque()).append((done, arrays))
            for known, waiting in [*self._busy.items()]:
                while waiting and waiting[0][0].done:
                    let_go.append(waiting.popleft())
                if not waiting:
                    del self._busy[known]

    def serving(self, like: Any) -> Gpu:
        """The device with the memory and the streams of the library whose array this is."""
        if not (tensors.is_tensor(like) and like.is_cuda):
            return self
        index = like.get_device()
        if index not in self._of_tensors:
            self._of_tensors[index] = GpuOfTensors(self, index)
        return self._of_tensors[index]

    def _device_of(self, byte: int) -> int:
        runtime = self.cupy.cuda.runtime
        if runtime.getDeviceCount() == 1 or not byte:
            return runtime.getDevice()
        return runtime.pointerGetAttributes(byte).device

    def placed(self, array: Any, compact: bool) -> Any:
        """The array where kernels can read it: itself, its copy on the device, or a copy in C order if compact."""
        array = containers.host_array(array)
        if isinstance(array, np.ndarray):
            return self.cupy.asarray(np.ascontiguousarray(array))
        if not compact:
            return array
        if not isinstance(array, self.cupy.ndarray):
            array = self.cupy.asarray(containers.on_stream(array, None))
        return array.copy(order="C")

    def wait_for(self, memory: Memory | Seen, stream: int) -> None:
        """Let the stream wait for the work that writes this memory."""
        if memory.stream is not None and memory.stream != stream:
            streams = self.cupy.cuda.Stream
            written = streams.from_external(_ForeignStream(memory.stream, None)).record()
            streams.from_external(_ForeignStream(stream, None)).wait_event(written)

    def mark(self, stream: Any, place: str) -> Any:
        """An event behind what is queued now, on this stream or the current one."""
        with self.using(stream, place) as pointer:
            return self.cupy.cuda.Stream.from_external(_ForeignStream(pointer, None)).record()

    @contextlib.contextmanager
    def beside(self, written: Any, place: str) -> Iterator[Callable[[], Callable[[], bool]]]:
        """A new stream behind an event, CuPy's current one in the with block.

        Gives a function which asks, when all is queued, for another one: that says whether it is done.
        """
        cuda = self.cupy.cuda
        with cuda.Device(self._device_id(place)), cuda.Stream(non_blocking=True) as own:
            own.wait_event(written)

            def finished() -> Callable[[], bool]:
                event = own.record()
                return lambda: event.done

            yield finished

    def maker(self, shape: tuple[int, ...], dtype: str, features_first: bool) -> Maker:
        """What makes arrays with undefined elements, whose last axis is the first in memory if features_first."""
        kind = dtype_of(dtype)

        def make() -> tuple[Any, int]:
            array = _laid_out(self.cupy.empty, shape, kind, features_first)
            return array, array.data.ptr

        return make

    def staging(self, block: int, fields: Fields, on_host: bool) -> Staging | PinnedStaging:
        """Memory for blocks of rows on their way to kernels, from the host or from the device itself."""
        if on_host:
            return PinnedStaging(block, fields, self.cupy, dtype_of)
        return Staging(block, fields, lambda shape, dtype: self.maker(shape, dtype, False)()[0])

    def workspace(self, size: int) -> Maker:
        """What makes undefined bytes, at least so many, that begin at a multiple of ALIGNMENT."""
        return self.maker((max(size, 1),), "uint8", False)

    def deliver(self, array: Any, like: Any) -> Any:
        """The array as the kind of container that like is."""
        if isinstance(containers.host_array(like), np.ndarray):
            array = array.get()
        return containers.kind_of(like).result(array, containers.given_back(like))

    def address(self, array: Any) -> int:
        """Where the element (0, ..., 0) lies, for a kernel."""
        array = containers.opened(array)
        if isinstance(array, self.cupy.ndarray):
            return array.data.ptr
        if tensors.is_tensor(array):
            return array.data_ptr()
        return array.__cuda_array_interface__["data"][0]

    @contextlib.contextmanager
    def using(self, stream: Any, place: str) -> Iterator[int]:
        """The stream and device that memory is allocated and kernels are launched on, as that stream's pointer."""
        cuda = self.cupy.cuda
        device_id = self._device_id(place)
        with contextlib.ExitStack() as stack:
            if device_id != cuda.runtime.getDevice():
                stack.enter_context(cuda.Device(device_id))
            if stream is None:
                yield cuda.get_current_stream().ptr
            else:
                pointer = stream_pointer(stream)
                stack.enter_context(cuda.Stream.from_external(_ForeignStream(pointer, stream)))
                yield pointer

    def hands_over(self, like: Any) -> bool:
        """Whether arrays that the device makes are of the kind of container that like is."""
        return containers.kind_of(like).result is containers.as_made and not isinstance(
            containers.host_array(like), np.ndarray)

    def workspace_address(self, workspace: Any) -> int:
        """Where a workspace lies, for a launch."""
        return self.address(workspace)

    def number_memory(self, value: Any, accumulator: str) -> Memory | None:
        """Where a number lies that kernels can read, or None if it is one of the host's."""
        if isinstance(containers.host_array(value), (np.ndarray, np.generic, float, int)):
            return None
        return self.memory(value)

    def current_stream(self, place: str) -> int | None:
        """The stream that is used where none is asked for, or None if that is one of a device that is not in use."""
        cuda = self.cupy.cuda
        if place != HOST and place != _place(cuda.runtime.getDevice()):
            return None
        return cuda.get_current_stream().ptr

    def pointer(self, stream: Any) -> int:
        """The pointer of a stream, as `stream_pointer` finds it."""
        return stream_pointer(stream)

    def stream_in_use(self) -> Any:
        """CuPy's current stream, which lives as long as this is kept."""
        return self.cupy.cuda.get_current_stream()

    def capturing(self, stream: int) -> bool:
        """Whether what is queued on the stream is recorded and not done."""
        return bool(self.cupy.cuda.runtime.streamIsCapturing(stream))

    def _device_id(self, place: str) -> int:
        return self.cupy.cuda.runtime.getDevice() if place == HOST else int(place.removeprefix(_place("")))

    def capability(self, place: str) -> tuple[int, int]:
        """The compute capability of the device where arrays lie, or are brought to from the host."""
        return self._model(place)[1]

    def name_of(self, place: str) -> str:
        """The name of that device."""
        return self._model(place)[0]

    def multiprocessors(self, place: str) -> int:
        """How many that device has."""
        return self._model(place)[2]

    def _model(self, place: str) -> tuple[str, tuple[int, int], int]:
        """The name of a device, its compute capability, and its multiprocessors."""
        device_id = self._device_id(place)
        if device_id not in self._models:
            properties = self.cupy.cuda.runtime.getDeviceProperties(device_id)
            self._models[device_id] = (properties["name"].decode(), (properties["major"], properties["minor"]),
                                       properties["multiProcessorCount"])
        return self._models[device_id]

    def loaded(self, launches: tuple[Launch | Clear, ...], place: str) -> tuple[Any, ...]:
        """The launches of a call, ready for many calls: with values of its slots and the pointer of a stream.

        Kernels are compiled, or brought from the cache, once a device. Those between which nothing is cleared are one.
        """
        from cuda.bindings.driver import cuLaunchKernel

        device_id = self._device_id(place)
        ready: list[Any] = []
        for _, group in groupby(launches, type):
            together = list(group)
            kernels = [launch.on(self.multiprocessors(place)) for launch in together if isinstance(launch, Launch)]
            ready += [_LoadedClear(clear, self.cupy.cuda.runtime.memsetAsync) for clear in together
                      if isinstance(clear, Clear)]
            if kernels:
                ready.append(PackedLaunches(kernels, [self._function(launch, place, device_id) for launch in kernels],
                                            cuLaunchKernel, lambda: self.cupy.cuda.Device(device_id).use()))
        return tuple(ready)

    def _function(self, launch: Launch, place: str, device_id: int) -> Any:
        """The handle of a launch's kernel, those used last kept."""
        key = device_id, compiler.key_of(launch)
        with self._loading:
            function = self._functions.get(key)
            if function is None:
                from .cache import code_of

                code = code_of(launch, self.capability(place))
                function = self._functions[key] = self._function_of(code, launch, device_id)
                if len(self._functions) > MOST_FUNCTIONS:
                    self._functions.popitem(last=False)  # its machine code stays where it is: it may be running
            self._functions.move_to_end(key)
        return function

    def _function_of(self, code: compiler.Code, launch: Launch, device_id: int) -> Any:
        """The handle of a kernel of this machine code."""
        from cuda.bindings import driver

        self.cupy.cuda.Device(device_id).use()
        library = result_of(driver.cuLibraryLoadData(code.cubin, [], [], 0, [], [], 0))
        kernel = result_of(driver.cuLibraryGetKernel(library, code.entry.encode()))
        if launch.shared_bytes > SHARED_BYTES_UNASKED:
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            status, = driver.cuKernelSetAttribute(limit, launch.shared_bytes, kernel, device_id)
            if status:
                raise DeviceError(f"{self.name} refuses {launch.shared_bytes} bytes of shared memory a block: {status} "
                                  "(pass a plan with fewer stages or smaller tiles)")
        return driver.CUfunction(int(kernel))


class GpuOfTensors(Gpu):
    """A CUDA device beside PyTorch's tensors: results and workspaces are of PyTorch's allocator, streams are its own.

    Kernels that one of the two has loaded serve the other.
    """

    def __init__(self, gpu: Gpu, index: int):
        vars(self).update(vars(gpu))
        self.torch, self.index = sys.modules["torch"], index
        self.torch_device = self.torch.device("cuda", index)

    def address(self, array: Any) -> int:
        """Where the element (0, ..., 0) lies, for a kernel."""
        return array.data_ptr() if tensors.is_tensor(array) else super().address(array)

    def placed(self, array: Any, compact: bool) -> Any:
        """The array where kernels can read it: itself, or a copy in C order if compact."""
        if not compact:
            return array
        return array.detach().clone(memory_format=self.torch.contiguous_format)

    def maker(self, shape: tuple[int, ...], dtype: str, features_first: bool) -> Maker:
        """What makes tensors with undefined elements, whose last axis is the first in memory if features_first."""
        return tensor_maker(self.torch, self.torch_device, shape, dtype, features_first)

    def deliver(self, array: Any, like: Any) -> Any:
        """The tensor, which is one already."""
        return array

    def hands_over(self, like: Any) -> bool:
        """Tensors are."""
        return True

    def current_stream(self, place: str) -> int | None:
        """PyTorch's current stream, or None if that is one of a device that is not in use."""
        if self.cupy.cuda.runtime.getDevice() != self.index:
            return None
        return self.torch.cuda.current_stream(self.index).cuda_stream

    @contextlib.contextmanager
    def using(self, stream: Any, place: str) -> Iterator[int]:
        """The stream and device that memory is allocated and kernels are launched on, as that stream's pointer."""
        cuda = self.torch.cuda
        with cuda.device(self.index):
            current = cuda.current_stream(self.index).cuda_stream
            pointer = current if stream is None else stream_pointer(stream)
            if pointer == current:
                yield pointer
            else:
                with cuda.stream(cuda.ExternalStream(pointer, device=self.torch_device)):
                    yield pointer

    def stream_in_use(self) -> Any:
        """PyTorch's current stream, which lives as long as this is kept."""
        return self.torch.cuda.current_stream(self.index)

    def capturing(self, stream: int) -> bool:
        """Never in the way: a graph that PyTorch captures keeps the memory that was allocated meanwhile."""
        return False


class _LoadedClear:
    """A memset on the stream of the launches."""

    def __init__(self, clear: Clear, memset: Any):
        self.offset, self.size, self.memset = clear.room.offset, clear.room.end - clear.room.offset, memset

    def __call__(self, values: Mapping[str, int], stream: int) -> None:
        self.memset(values["workspace"] + self.offset, 0, self.size, stream)


class _ForeignStream:
    """A stream known by its pointer, under the CUDA stream protocol; keeps the user's object alive."""

    def __init__(self, pointer: int, owner: Any):
        self.pointer, self.owner = pointer, owner

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def stream_pointer(stream: Any) -> int:
    """The pointer of a CuPy or Numba stream, an int, or anything with ``__cuda_stream__``.

    Raises
    ------
    TypeError
        If it is none of these.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    if hasattr(stream, "cuda_stream"):
        return int(stream.cuda_stream)
    if hasattr(stream, "ptr"):
        return int(stream.ptr)
    if hasattr(stream, "handle"):
        return int(getattr(stream.handle, "value", stream.handle) or 0)
    raise TypeError(f"stream must be a CuPy stream, a Numba stream, an int pointer or have __cuda_stream__; got "
                    f"{type(stream).__name__}")
