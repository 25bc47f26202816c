"""Arguments of kernels as the CUDA driver takes them: packed once a layout, but for what each call fills in."""
from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

from .errors import DeviceError
from .facts import MAP_WORDS
from .launches import Launch, Room, Slot, TensorMap

_NUMBERS = {"float32": ctypes.c_float, "float64": ctypes.c_double}


def result_of(outcome: tuple) -> Any:
    """What a call of the driver gave, if it succeeded."""
    status, *values = outcome
    if status:
        raise DeviceError(f"the CUDA driver says {status.name}")
    return values[0] if values else None


class PackedLaunches:
    """Kernels one after another with their arguments packed, each in a cell of 8 bytes, and what queues them.

    What several of them take stands in one cell and is filled in once. `queue` is cuLaunchKernel or its like: arguments
    are read before it returns; a lock keeps threads from filling them in at the same time.
    """

    def __init__(self, launches: Sequence[Launch], functions: Sequence[Any], queue: Any, use_device: Any):
        takes = [list(zip(launch.values, launch.types, strict=True)) for launch in launches]
        # by what is printed of them, since -0.0 equals 0.0
        alike = {(repr(value), kind): (value, kind) for taken in takes for value, kind in taken}
        sizes = [MAP_WORDS if kind == "tensor_map" else 1 for _, kind in alike]
        number_of = dict(zip(alike, accumulate(sizes, initial=0), strict=False))
        self.cells = (ctypes.c_int64 * sum(sizes))()
        self.addresses: list[tuple[int, str, int]] = []  # cell, slot, bytes further on
        self.numbers: list[tuple[Any, str]] = []  # cell, slot
        self.maps: list[_PackedMap] = []
        for name, (value, kind) in alike.items():
            cell = number_of[name]
            if kind == "tensor_map":
                self.maps.append(_PackedMap(value, cell))
            elif kind != "int64":
                number = _NUMBERS[kind].from_buffer(self.cells, 8 * cell)
                if isinstance(value, Slot):
                    self.numbers.append((number, value.name))
                else:
                    number.value = value
            elif isinstance(value, Room):
                self.addresses.append((cell, "workspace", value.offset))
            elif isinstance(value, Slot):
                self.addresses.append((cell, value.name, 0))
            else:
                self.cells[cell] = value
        begin = ctypes.addressof(self.cells)
        places = [[begin + 8 * (number_of[repr(value), kind] + word) for value, kind in taken
                   for word in range(MAP_WORDS if kind == "tensor_map" else 1)] for taken in takes]
        self.pointers = [(ctypes.c_void_p * len(taken))(*taken) for taken in places]
        self.queued = [
            (partial(queue, function, *(*one.grid, 1, 1)[:3], one.block, 1, 1, one.shared_bytes), ctypes.addressof(at))
            for one, function, at in zip(launches, functions, self.pointers, strict=True)]
        self.use_device, self.turn = use_device, threading.Lock()

    def __call__(self, values: Mapping[str, Any], stream: int) -> None:
        cells = self.cells
        with self.turn:
            for cell, name, further in self.addresses:
                cells[cell] = values[name] + further
            for number, name in self.numbers:
                number.value = values[name]
            for packed in self.maps:
                packed.fill(cells, values)
            for queue, arguments in self.queued:
                status, = queue(stream, arguments, 0)
                if status and status.name in ("CUDA_ERROR_INVALID_CONTEXT", "CUDA_ERROR_NOT_INITIALIZED"):
                    self.use_device()  # the first launch of this thread
                    status, = queue(stream, arguments, 0)
                if status:
                    raise DeviceError(f"the CUDA driver says {status.name}")


class _PackedMap:
    """A tensor map in cells of its own, which change when the address does."""

    def __init__(self, numbers: TensorMap, cell: int):
        self.numbers, self.cell, self.address = numbers, cell, -1
        address = numbers.address
        self.slot, self.further = ("workspace", address.offset) if isinstance(address, Room) else (address.name, 0)

    def fill(self, cells: Any, values: Mapping[str, Any]) -> None:
        """Fill in the map of the address that the call has."""
        address = values[self.slot] + self.further
        if address != self.address:
            cells[self.cell:self.cell + MAP_WORDS] = list(encoded(self.numbers, address))
            self.address = address


@lru_cache(maxsize=4096)
def encoded(numbers: TensorMap, address: int) -> tuple[int, ...]:
    """A tensor map of a matrix that lies at this address, in the driver's encoding."""
    from cuda.bindings import driver

    kind = getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{numbers.dtype.upper()}")
    made = result_of(driver.cuTensorMapEncodeTiled(
        kind, len(numbers.lengths), address, [driver.cuuint64_t(length) for length in numbers.lengths],
        [driver.cuuint64_t(step) for step in numbers.steps], [driver.cuuint32_t(length) for length in numbers.box],
        [driver.cuuint32_t(1)] * len(numbers.lengths), driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
    words = [int(word) for word in made.opaque]
    return tuple(word - 2**64 if word >= 2**63 else word for word in words)
