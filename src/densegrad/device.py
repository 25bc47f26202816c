"""Where kernels run: a GPU, with CuPy's memory and streams, or the Numba CUDA simulator, with NumPy's memory.

The only module that knows which. Both kinds of device have the same methods, and ``current`` finds the one to use.
"""
from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .errors import DeviceError

NO_DEVICE = ("densegrad found no GPU ({reason}): install CuPy on a machine with one (pip install 'numba-cuda[cu13]' "
             "cupy-cuda13x), or set NUMBA_ENABLE_CUDASIM=1 before Python starts to run on the CPU in Numba's CUDA "
             "simulator")

#: dynamic shared memory that every kernel may have
SHARED_BYTES_UNASKED = 49152

#: how long a thread of the simulator runs before another does, where Python's own 5 ms make barriers slow
TURN_SECONDS = 2e-4

#: the place of NumPy arrays on a machine whose kernels run on a GPU
HOST = "the host"


def _place(device_id: int | str) -> str:
    return f"GPU {device_id}"


def current() -> Gpu | Simulator:
    """The device of this process.

    Raises
    ------
    DeviceError
        If there is neither a GPU nor the simulator.
    """
    from numba import config

    return _simulator() if config.ENABLE_CUDASIM else _gpu()


@cache
def _simulator() -> Simulator:
    return Simulator()


@cache
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


@cache
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


def _host_memory(array: np.ndarray, place: str) -> Memory:
    return Memory(array.shape, array.strides, array.dtype, array.__array_interface__["data"][0],
                  not array.flags.writeable, place)


class Simulator:
    """Numba's CUDA simulator. Its memory is NumPy's; it has no streams."""

    kind = "simulator"
    name = "Numba CUDA simulator"
    array_kinds = "a NumPy array"

    def memory(self, array: Any) -> Memory | None:
        """Where the array lies, or None if it is no array that kernels can use."""
        return _host_memory(array, "the simulator") if isinstance(array, np.ndarray) else None

    def placed(self, array: np.ndarray, compact: bool) -> np.ndarray:
        """The array where kernels can read it: itself, or a copy in C order if compact."""
        return array.copy(order="C") if compact else array

    def wait_for(self, memory: Memory, stream: int) -> None:
        """Let the stream wait for the work that writes this memory."""

    def empty(self, shape: tuple[int, ...] | int, dtype: str) -> np.ndarray:
        """An array with undefined elements."""
        return np.empty(shape, dtype_of(dtype))

    def deliver(self, array: np.ndarray, like: Any) -> Any:
        """The array as the kind of container that like is."""
        return array

    def address(self, array: np.ndarray) -> SimulatedAddress:
        """Where the element (0, ..., 0) lies, for a kernel."""
        return SimulatedAddress(array)

    @contextlib.contextmanager
    def using(self, stream: Any, place: str) -> Iterator[int]:
        """No stream, whichever is asked for. What is neither a stream nor Numba's stand-in for one is refused."""
        from numba import cuda

        if stream is not None and not isinstance(stream, cuda.stream):
            stream_pointer(stream)
        yield 0

    def capability(self, place: str) -> tuple[int, int]:
        """The compute capability whose instructions the simulator's kernels are made of."""
        return 8, 0

    def launch(self, kernel: Any, grid: tuple[int, ...], block: int, arguments: tuple, stream: int,
               shared_bytes: int = 0) -> None:
        """Run a kernel. Its threads take turns often, as most of them wait for others at barriers."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(TURN_SECONDS)
        try:
            kernel[grid, block, 0, shared_bytes](*arguments)
        finally:
            sys.setswitchinterval(interval)


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
            array[lowest], (span // array.itemsize + 1,), (array.itemsize,), writeable=array.flags.writeable)
        self.byte = self.cells.__array_interface__["data"][0] + first

    def __int__(self) -> int:
        return self.byte

    def read(self, index: int, count: int) -> np.ndarray:
        """The elements of one access."""
        return self.cells[self._span(index, count)]

    def write(self, index: int, values: np.ndarray) -> None:
        """Store the elements of one access."""
        self.cells[self._span(index, len(values))] = values.astype(self.cells.dtype)

    def _span(self, index: int, count: int) -> slice:
        first, size = self.origin + index, self.cells.itemsize
        if first < 0 or first + count > len(self.cells):
            raise IndexError(f"elements {first} to {first + count - 1} of {len(self.cells)}")
        if (self.byte + index * size) % (count * size):
            raise IndexError(f"{count} elements of {size} bytes at byte {index * size}: not aligned")
        return slice(first, first + count)


class Gpu:
    """CUDA devices. Memory and streams are CuPy's; kernels are launched by Numba and nothing is synchronised."""

    kind = "gpu"
    array_kinds = "a CuPy or NumPy array, or one with __cuda_array_interface__"

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self._launchers: dict[tuple, Any] = {}
        self._capabilities: dict[int, tuple[int, int]] = {}

    @property
    def name(self) -> str:
        """The name of the device in use."""
        runtime = self.cupy.cuda.runtime
        return runtime.getDeviceProperties(runtime.getDevice())["name"].decode()

    def memory(self, array: Any) -> Memory | None:
        """Where the array lies, or None if it is no array that kernels can use."""
        if isinstance(array, self.cupy.ndarray):
            return Memory(array.shape, array.strides, array.dtype, array.data.ptr, False, _place(array.device.id))
        if isinstance(array, np.ndarray):
            return _host_memory(array, HOST)
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            return None
        byte, readonly = interface["data"]
        shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
        strides = interface.get("strides") or np.empty(shape, np.void(dtype.itemsize).dtype).strides
        return Memory(shape, tuple(strides), dtype, byte, readonly, _place(self._device_of(byte)),
                      interface.get("stream"))

    def _device_of(self, byte: int) -> int:
        runtime = self.cupy.cuda.runtime
        if runtime.getDeviceCount() == 1 or not byte:
            return runtime.getDevice()
        return runtime.pointerGetAttributes(byte).device

    def placed(self, array: Any, compact: bool) -> Any:
        """The array where kernels can read it: itself, its copy on the device, or a copy in C order if compact."""
        if isinstance(array, np.ndarray):
            return self.cupy.asarray(np.ascontiguousarray(array))
        return self.cupy.asarray(array).copy(order="C") if compact else array

    def wait_for(self, memory: Memory, stream: int) -> None:
        """Let the stream wait for the work that writes this memory."""
        if memory.stream is not None and memory.stream != stream:
            streams = self.cupy.cuda.Stream
            written = streams.from_external(_ForeignStream(memory.stream, None)).record()
            streams.from_external(_ForeignStream(stream, None)).wait_event(written)

    def empty(self, shape: tuple[int, ...] | int, dtype: str) -> Any:
        """An array with undefined elements."""
        return self.cupy.empty(shape, dtype_of(dtype))

    def deliver(self, array: Any, like: Any) -> Any:
        """The array as the kind of container that like is: NumPy's, PyTorch's, Numba's, or CuPy's for all others."""
        library = type(like).__module__.partition(".")[0]
        if isinstance(like, np.ndarray):
            return array.get()
        if library == "torch":
            return sys.modules["torch"].as_tensor(array)
        if library == "numba":
            return sys.modules["numba.cuda"].as_cuda_array(array)
        return array

    def address(self, array: Any) -> int:
        """Where the element (0, ..., 0) lies, for a kernel."""
        if isinstance(array, self.cupy.ndarray):
            return array.data.ptr
        return array.__cuda_array_interface__["data"][0]

    @contextlib.contextmanager
    def using(self, stream: Any, place: str) -> Iterator[int]:
        """The stream and device that memory is allocated and kernels are launched on, as that stream's pointer."""
        cuda = self.cupy.cuda
        device_id = cuda.runtime.getDevice() if place == HOST else int(place.removeprefix(_place("")))
        with contextlib.ExitStack() as stack:
            if device_id != cuda.runtime.getDevice():
                from numba import cuda as numba_cuda

                stack.enter_context(cuda.Device(device_id))
                stack.enter_context(numba_cuda.gpus[device_id])
            if stream is None:
                yield cuda.get_current_stream().ptr
            else:
                pointer = stream_pointer(stream)
                stack.enter_context(cuda.Stream.from_external(_ForeignStream(pointer, stream)))
                yield pointer

    def capability(self, place: str) -> tuple[int, int]:
        """The compute capability of the device where arrays lie, or are brought to from the host."""
        device_id = self.cupy.cuda.runtime.getDevice() if place == HOST else int(place.removeprefix(_place("")))
        if device_id not in self._capabilities:
            properties = self.cupy.cuda.runtime.getDeviceProperties(device_id)
            self._capabilities[device_id] = properties["major"], properties["minor"]
        return self._capabilities[device_id]

    def launch(self, kernel: Any, grid: tuple[int, ...], block: int, arguments: tuple, stream: int,
               shared_bytes: int = 0) -> None:
        """Queue a kernel on the stream of this pointer, with this much dynamic shared memory."""
        key = (kernel, grid, block, stream, shared_bytes, self.cupy.cuda.runtime.getDevice())
        launcher = self._launchers.get(key)
        if launcher is None:
            if shared_bytes > SHARED_BYTES_UNASKED:
                self._allow_shared(kernel, arguments, shared_bytes)
            launcher = self._configure(kernel, grid, block, stream, shared_bytes)
            if len(self._launchers) >= 1024:
                self._launchers.clear()
            self._launchers[key] = launcher
        launcher(*arguments)

    def _allow_shared(self, kernel: Any, arguments: tuple, shared_bytes: int) -> None:
        """Raise the limit of dynamic shared memory for a kernel, which Numba leaves where it is."""
        from cuda.bindings import driver
        from numba import typeof

        compiled = kernel.compile(tuple(typeof(argument) for argument in arguments))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        status, = driver.cuKernelSetAttribute(limit, shared_bytes, compiled._codelibrary.get_cufunc().handle,
                                              self.cupy.cuda.runtime.getDevice())
        if status != driver.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"{self.name} refuses {shared_bytes} bytes of shared memory a block: {status} (pass a "
                              "plan with fewer stages or smaller tiles)")

    @staticmethod
    def _configure(kernel: Any, grid: tuple[int, ...], block: int, stream: int, shared_bytes: int) -> Any:
        from numba import cuda
        from numba.cuda.core.errors import NumbaPerformanceWarning

        with warnings.catch_warnings():
            # Small grids are what small layers need.
            warnings.simplefilter("ignore", NumbaPerformanceWarning)
            return kernel[grid, block, cuda.external_stream(stream) if stream else 0, shared_bytes]


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
    if hasattr(stream, "ptr"):
        return int(stream.ptr)
    if hasattr(stream, "handle"):
        return int(getattr(stream.handle, "value", stream.handle) or 0)
    raise TypeError(f"stream must be a CuPy stream, a Numba stream, an int pointer or have __cuda_stream__; got "
                    f"{type(stream).__name__}")
