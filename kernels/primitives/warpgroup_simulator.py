"""Hopper's tensor cores in NumPy: products of warpgroups, copies of boxes, and barriers that count their bytes.

Copies and products are done when they are begun; who reads their results too early is not found here. Tiles lie in
shared memory as on a device, swizzled.
"""
import threading

import numpy as np

from .factories import cache
from .layout import GROUP_THREADS, LANES, LINE_BYTES, PIECE_BYTES, sum_pieces
from .number_simulator import _stored
from .simulator import _quiet
from .warp_simulator import PATIENCE, _lock, exchange, shared_bytes

#: where the bytes of a line lie that the swizzle has moved, by the line's number modulo 8
_SWIZZLED = [np.concatenate([np.arange(16) + 16 * (chunk ^ line) for chunk in range(8)]) for line in range(8)]


def _nothing(*given):
    """For what only orders a device's memory or registers."""


@cache
def shared_tiles(size):
    """() -> the block's dynamic shared memory from a multiple of 1,024 bytes on, which its launch leaves room for."""
    return shared_bytes(size)


@cache
def quotient():
    """(a, b) -> a // b of numbers from 0 on, by 32 bits."""
    return lambda a, b: np.int32(a // b)


@cache
def more_registers(count):
    """(): every thread of the warpgroup has this many registers from here on, once others have given theirs up."""
    return _nothing


@cache
def fewer_registers(count):
    """(): every thread of the warpgroup has this many registers from here on."""
    return _nothing


def _of_block(name, make):
    """What the threads of this block share under this name, made by the first that asks."""
    block = threading.current_thread()._manager
    with _lock:
        found = block.__dict__.setdefault("densegrad_warpgroups", {})
        if name not in found:
            found[name] = make()
        return found[name]


@cache
def meet(threads):
    """(number): this many threads wait for each other at the block's barrier of this number, from 1 on."""

    def run(number):
        if not 1 <= number <= 15:
            raise IndexError(f"a block has barriers 1 to 15 beside that of all its threads; got {number}")
        _of_block(("meet", int(number)), lambda: threading.Barrier(threads, timeout=PATIENCE)).wait()

    return run


@cache
def meet_warp():
    """(): the lanes of this warp wait for each other."""
    return lambda: exchange(_nothings, None)


def _nothings(values):
    return values


# -- barriers in shared memory. A phase ends when all have arrived and all bytes that it expects have.


class _Counted:
    """A barrier that counts arrivals and bytes."""

    def __init__(self, arrivals):
        self.arrivals = self.missing = arrivals
        self.bytes_missing, self.phase = 0, 0
        self.changed = threading.Condition()

    def count(self, arrivals, expected=0, arrived=0):
        """Arrivals, bytes that are to come, and bytes that have."""
        with self.changed:
            self.missing -= arrivals
            self.bytes_missing += expected - arrived
            if self.missing < 0:
                raise RuntimeError("more threads have arrived at a barrier than it counts")
            if not self.missing and not self.bytes_missing:
                self.missing, self.phase = self.arrivals, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity):
        """Until the phase of this parity has ended; the one before the first has the parity 1."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE):
                raise RuntimeError(f"a barrier waited in vain for {self.missing} arrivals and {self.bytes_missing} "
                                   "bytes")


def _barrier(index):
    return _of_block(("barrier", int(index)), lambda: None)


@cache
def start_barrier(arrivals):
    """(array, index): a barrier of 8 bytes there, every phase of which ends after so many arrivals."""

    def run(array, index):
        array.span(index, 8)
        _of_block(("barrier", int(index)), lambda: _Counted(arrivals))

    return run


@cache
def barriers_started():
    """(): copies may count on the barriers that this thread has started."""
    return _nothing


@cache
def expect_bytes(count):
    """(array, index): arrives at the barrier, whose phase ends no sooner than so many bytes more have arrived."""
    return lambda array, index: _barrier(index).count(1, expected=count)


@cache
def arrive():
    """(array, index): arrives at the barrier."""
    return lambda array, index: _barrier(index).count(1)


@cache
def passed():
    """(array, index, parity) -> whether the barrier's phase of this parity has ended; waits a while for that."""

    def run(array, index, parity):
        _barrier(index).wait(parity)
        return True

    return run


# -- tensor maps and copies of boxes


@cache
def write_map():
    """(maps, number, map): a tensor map among those at the address, for copies of every thread after maps_written."""

    def run(maps, number, found):
        maps.read(16 * number, 1)
        maps.read(16 * number + 15, 1)
        _of_block(("map", int(number)), lambda: found)

    return run


@cache
def maps_written():
    """(): what this thread wrote of maps may be read by threads that meet it and ask map_at."""
    return _nothing


@cache
def map_at():
    """(maps, number) -> a map that was written, for the copies of this thread."""
    return lambda maps, number: _of_block(("map", int(number)), lambda: None)


def _lines(array, index, count):
    """The bytes of `count` lines of 128 bytes from the index on, in the places that the swizzle gives them."""
    for line in range(count):
        cells = array.cells[index + line * LINE_BYTES:index + (line + 1) * LINE_BYTES]
        yield cells, _SWIZZLED[(index // LINE_BYTES + line) % 8]


@cache
def copy_box():
    """(map, across, down, array, index, barrier): the box whose first element has these coordinates comes to the index.

    What lies beyond the matrix comes as zeros. Of "tfloat32" each number is rounded to the nearest tf32. The bytes
    arrive at the barrier, which is another index.
    """

    def run(there, across, down, array, index, barrier):
        lines = there.read((int(across), int(down)))
        if there.numbers.dtype == "tfloat32":
            lines = _nearest_tf32(lines)
        for line, (cells, places) in zip(lines, _lines(array, index, len(lines)), strict=True):
            cells[places] = line.view(np.uint8)
        _barrier(barrier).count(0, arrived=lines.nbytes)

    return run


def _nearest_tf32(numbers):
    """Ties go to the even one, infinities and NaN stay what they are."""
    bits = numbers.view(np.uint32)
    rounded = (bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(numbers), rounded, bits)


@cache
def store_box(adds):
    """(map, across, down, part, array, index): what lies at the index becomes the box there, or is added to it.

    Nothing is stored beyond the matrix.
    """

    def run(there, across, down, part, array, index):
        lines = np.array([cells[places] for cells, places in _lines(array, index, PIECE_BYTES // LINE_BYTES)])
        there.write((int(across), int(down), int(part)), lines.view(there.address.cells.dtype), adds)

    return run


@cache
def commit_stores():
    """(): the boxes that this thread has stored since the last commit are a group."""
    return _nothing


@cache
def stores_read():
    """(): of all of this thread's groups shared memory has been read, and may be written anew."""
    return _nothing


@cache
def stores_done():
    """(): all of this thread's groups have been stored."""
    return _nothing


@cache
def show_to_copies():
    """(): what this thread has stored to shared memory is what copies of boxes read from here on."""
    return _nothing


# -- products of a warpgroup


def _tile(array, index, boxes, across, kind):
    """A tile (64 * boxes, depths of a line) of numbers, in float64."""
    lines = np.array([cells[places] for cells, places in _lines(array, index, 64 * boxes)])
    if kind == "bfloat16":
        numbers = (lines.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif kind == "tf32":
        numbers = (lines.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    else:
        numbers = lines.view(np.float16)
    numbers = numbers.astype(np.float64)
    return numbers.reshape(boxes, 64, 64).swapaxes(1, 2).reshape(-1, 64) if across else numbers


@cache
def multiply_tiles(kind, cols, left_across, right_across):
    """(array, left index, right index, sums) -> sums plus the product of two tiles, a line deep, once products_done.

    The left tile has 64 rows, the right one `cols` columns. Each lies as boxes of 64 lines of 128 bytes, swizzled: a
    line is a depth where the operand is contiguous across it, else a row or column. Of "tf32" it is never a depth, and
    the last 13 bits of a number count as zeros.
    """

    def product(values):
        array, left_index, right_index, _ = values[0]
        left = _tile(array, int(left_index), 1, left_across, kind)
        right = _tile(array, int(right_index), cols // 64, right_across, kind)
        sums = _matrix(np.array([sums for *_, sums in values]), cols)
        for depths in np.split(np.arange(left.shape[1]), 4):
            sums = (left[:, depths] @ right[:, depths].T + sums).astype(np.float32)
        return _registers(sums, cols)

    product = _quiet(product)
    return lambda array, left_index, right_index, sums: exchange(
        product, (array, left_index, right_index, sums), GROUP_THREADS)


def _matrix(registers, cols):
    """The registers of a warpgroup's threads -> its sums (64, cols)."""
    # thread (warp, g, q), register (j, half of rows, parity) -> row (warp, half of rows, g), column (j, q, parity)
    return registers.reshape(4, 8, 4, cols // 8, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(64, cols)


def _registers(sums, cols):
    return sums.reshape(4, 2, 8, cols // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5).reshape(GROUP_THREADS, cols // 2)


@cache
def products_before_done(groups):
    """(): all products but those of the last calls of multiply_tiles, so many, have been added, and their tiles may be
    overwritten.
    """
    return _nothing


@cache
def products_done(count):
    """(sums) -> sums that hold all products."""
    return lambda sums: sums


@cache
def stage_sums(dtype, cols, first, pieces):
    """(array, index, thread, sums): a warpgroup's 64 x cols sums, rounded to dtype, as boxes of 64 lines, swizzled.

    A box, or piece, has 128 bytes of columns; `pieces` of them are stored, from piece `first` on. thread counts within
    the warpgroup.
    """
    size = 4 if dtype == "float32" else 2

    def run(array, index, thread, sums):
        warp, lane = divmod(int(thread), LANES)
        for piece, step, begin in sum_pieces(dtype, first, pieces):
            for register in range(begin, begin + 16 // size):
                # Two neighbours in a row, two in the row eight further, then 8 columns on.
                column = (register - begin) // 4 * 8 + lane % 4 * 2 + register % 2
                line = 16 * warp + lane // 4 + register // 2 % 2 * 8
                byte = 32 * step + column * size
                place = index + piece * PIECE_BYTES + line * LINE_BYTES + ((byte // 16 ^ line % 8) * 16 + byte % 16)
                array.span(place, size)[:] = np.array([sums[register]]).astype(_stored(dtype)).view(np.uint8)

    return _quiet(run)


@cache
def add_lines(dtype):
    """(array, index, chunk, totals) -> the eight totals plus those numbers of eight lines, from the index on, in order.

    A chunk is eight numbers of a line, where the swizzle has put them; the index is a multiple of 1 KiB.
    """

    def run(array, index, chunk, totals):
        for cells, places in _lines(array, int(index), 8):
            numbers = cells[places[16 * chunk:16 * chunk + 16]].view(_stored(dtype))
            totals = totals + numbers.astype(np.float32)
        return totals

    return _quiet(run)
