"""Blocks of a batch on their way to kernels: rows that users hand over in pieces, gathered in memory of the device.

    rows of users' arrays --written--> rows() --sent--> arrays at multiples of 256 bytes --read--> the next block

Where rows are on the device already, one block of its memory is enough: what is queued on a stream is done in order.
Rows of the host go through page-locked memory, twice, on a stream of copies: while the launches of one block run, the
next block is copied.

    host      write 0 | write 1 | wait, write 2 | ...
    copies            | copy 0  | copy 1        | copy 2, when the launches of block 0 are done
    launches                    | block 0       | block 1 ...
"""
from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

#: what one row is made of, by name: the shape of a row, and the dtype
Fields = Mapping[str, tuple[tuple[int, ...], str]]


class Staging:
    """One block of rows in the device's memory."""

    def __init__(self, block: int, fields: Fields, make: Callable[[tuple[int, ...], str], Any]):
        self._arrays = {name: make((block, *shape), dtype) for name, (shape, dtype) in fields.items()}

    def rows(self) -> dict[str, Any]:
        """Arrays (block, ...) to write the next block into."""
        return self._arrays

    def sent(self, count: int, stream: int) -> dict[str, Any]:
        """The first `count` rows of what was written, for launches on this stream."""
        return {name: array[:count] for name, array in self._arrays.items()}

    def read(self, stream: int) -> None:
        """The launches that read what was sent are queued on this stream."""

    def close(self) -> None:
        """Give the memory back."""
        self._arrays = {}


class PinnedStaging:
    """Two blocks of rows in page-locked memory of the host, two on the device, and the stream of the copies."""

    def __init__(self, block: int, fields: Fields, cupy: Any, dtype_of: Callable[[str], Any]):
        self._cupy, self._turn = cupy, 0
        self._copies = cupy.cuda.Stream(non_blocking=True)
        started = cupy.cuda.get_current_stream().record(cupy.cuda.Event(disable_timing=True))
        self._copies.wait_event(started)  # the pool's memory may still be read by what was queued before
        self._blocks = [_Block(block, fields, cupy, dtype_of) for _ in range(2)]
        # Memory that a copy is under way from must outlive it, whoever forgets this.
        self._finish = weakref.finalize(self, self._copies.synchronize)

    def rows(self) -> dict[str, Any]:
        """NumPy arrays (block, ...) to write the next block into, when the copy before the last has been made."""
        block = self._blocks[self._turn]
        if block.copied is not None:
            block.copied.synchronize()
            block.copied = None
        return block.host

    def sent(self, count: int, stream: int) -> dict[str, Any]:
        """The first `count` rows of what was written, on the device, for launches on this stream."""
        block, cuda = self._blocks[self._turn], self._cupy.cuda
        if block.read is not None:
            self._copies.wait_event(block.read)
        arrays = {name: array[:count] for name, array in block.device.items()}
        for name, array in arrays.items():
            array.set(block.host[name][:count], stream=self._copies)
        block.copied = self._copies.record(cuda.Event(disable_timing=True))
        cuda.ExternalStream(stream).wait_event(block.copied)
        return arrays

    def read(self, stream: int) -> None:
        """The launches that read what was sent are queued on this stream; the other block is next."""
        cuda = self._cupy.cuda
        self._blocks[self._turn].read = cuda.ExternalStream(stream).record(cuda.Event(disable_timing=True))
        self._turn = 1 - self._turn

    def close(self) -> None:
        """Give the memory back, when the last copy has been made."""
        self._finish()
        self._blocks = []


class _Block:
    """Memory of a block on the host and on the device, the event behind its copy, and that behind its launches."""

    def __init__(self, block: int, fields: Fields, cupy: Any, dtype_of: Callable[[str], Any]):
        from numba import cuda

        self.host, self.device = {}, {}
        for name, (shape, dtype) in fields.items():
            kind, shape = dtype_of(dtype), (block, *shape)
            size = prod(shape) * kind.itemsize
            self.host[name] = cuda.pinned_array((max(size, 1),), "uint8")[:size].view(kind).reshape(shape)
            self.device[name] = cupy.empty(shape, kind)
        self.copied: Any = None
        self.read: Any = None
