"""The primitives in plain Python and NumPy, for the Numba CUDA simulator.

A fragment is a NumPy array, so that one Python operation does the work of many instructions. Shared memory starts as
NaN, and every access is checked against the end of its array.
"""
import threading
from functools import cache

import numpy as np
from numba import cuda

from .layout import ITEM_BYTES, SECTOR

_TYPE = {"float32": np.float32, "float64": np.float64}


def jit(threads, blocks_per_multiprocessor=1):
    """Decorator of a kernel that is launched with this many threads a block."""
    return cuda.jit


def typed(dtype):
    """The type that makes a literal of this dtype inside a kernel."""
    return _TYPE[dtype]


# -- fragments


@cache
def zeros(dtype, count):
    """() -> a fragment of zeros."""
    return lambda: np.zeros(count, _TYPE[dtype])


@cache
def add(dtype, count):
    """(left, right) -> their sum, element by element."""
    return _quiet(lambda left, right: left + right)


@cache
def multiply_add(dtype, count):
    """(sums, left, right) -> sums + left * right, element by element, rounded twice."""
    return _quiet(lambda sums, left, right: sums + left * right)


@cache
def plus(dtype, count, compensated):
    """(sums, values) -> sums plus values.

    Compensated sums are a fragment of twice the length: the sums, then what their roundings lost.
    """
    return _quiet(lambda sums, values: _plus(sums, values, compensated))


@cache
def tidy(dtype, count, compensated):
    """(sums) -> the same; what was lost counts as nothing where it is not a number, as beside an infinite sum."""
    return lambda sums: np.concatenate([sums[:count], np.where(np.isfinite(sums[count:]), sums[count:], _TYPE[dtype](0))])


@cache
def settle(dtype, count, compensated):
    """(tidy sums) -> what they come to."""
    return _quiet(lambda sums: sums[:count] + sums[count:]) if compensated else lambda sums: sums


def _plus(sums, values, compensated):
    if not compensated:
        return sums + values
    totals, lost = sums[:len(values)], sums[len(values):]
    rounded = totals + values
    of_values = rounded - totals
    of_totals = rounded - of_values
    return np.concatenate([rounded, lost + ((totals - of_totals) + (values - of_values))])


@cache
def scale(dtype, count):
    """(fragment, factor) -> their product."""
    return _quiet(lambda fragment, factor: fragment * factor)


@cache
def convert(dtype, wide, count):
    """(fragment of dtype) -> the same values as wide."""
    return lambda fragment: fragment.astype(_TYPE[wide])


@cache
def head(dtype, total, count):
    """(fragment of total) -> its first count elements."""
    return lambda fragment: fragment[:count]


@cache
def rotate(dtype, total, count):
    """(fragment of total) -> the same with its first count elements moved to the end."""
    return lambda fragment: np.roll(fragment, -count)


# -- global memory


@cache
def load_vector(dtype, count, wide):
    """(address, index) -> count neighbouring elements as a fragment of type wide, in one access."""
    return lambda address, index: address.read(index, count).astype(_TYPE[wide])


@cache
def load_if(dtype, count, wide):
    """(address, index, condition) -> as load_vector where the condition holds, else zeros; never a branch."""
    return lambda address, index, condition: (
        address.read(index, count).astype(_TYPE[wide]) if condition else np.zeros(count, _TYPE[wide]))


@cache
def add_vectors(dtype, count, wide, rows, across=1, spacing=0, compensated=False):
    """(sums, address, index, step) -> sums plus the vectors at index, index + step, ..., added in that order.

    Every row is `across` vectors of count elements, `spacing` apart.
    """

    def run(sums, address, index, step):
        for row in range(rows):
            values = [address.read(index + row * step + vector * spacing, count) for vector in range(across)]
            sums = _plus(sums, np.concatenate(values).astype(_TYPE[wide]), compensated)
        return sums

    return _quiet(run)


@cache
def add_inside(dtype, count, wide, rows, across=1, spacing=0, compensated=False, advance=0):
    """(sums, address, index, step, left, position, end) -> as add_vectors, but only of what lies inside.

    The first element stands at `position`, the next row's at position + advance: those in [0, end) of the first `left` rows
    count, the others are neither touched nor added.
    """

    def run(sums, address, index, step, left, position, end):
        position, end = int(position), int(end)
        for row in range(min(rows, left)):
            values = np.zeros((across, count), _TYPE[wide])
            for vector in range(across):
                place, stands = index + row * step + vector * spacing, position + row * advance + vector * spacing
                first, last = min(max(-stands, 0), count), min(max(end - stands, 0), count)
                element = first
                while element < last:
                    width = count
                    while element % width or element + width > last:
                        width //= 2
                    values[vector, element:element + width] = address.read(place + element, width)
                    element += width
            sums = _plus(sums, values.ravel(), compensated)
        return sums

    return _quiet(run)


@cache
def store_vector(dtype, count, wide):
    """(address, index, fragment): stores neighbouring elements in one access, each rounded once to dtype."""
    return _quiet(lambda address, index, fragment: address.write(index, fragment))


@cache
def load_each(dtype, count, wide):
    """(address, index, step, left) -> the elements at index, index + step, ...: the first `left`, zeros for the others."""

    def run(address, index, step, left):
        values = np.zeros(count, _TYPE[wide])
        for element in range(min(count, left)):
            values[element] = address.read(index + element * step, 1)[0]
        return values

    return run


@cache
def store_each(dtype, count, wide):
    """(address, index, step, left, fragment): stores the first `left` elements at index, index + step, ..."""

    def run(address, index, step, left, fragment):
        for element in range(min(count, left)):
            address.write(index + element * step, fragment[element:element + 1])

    return _quiet(run)


@cache
def load_pieces(dtype, width, offsets, wide):
    """(address, index, stride, left) -> pieces of `width` neighbouring elements, those at offset * stride from the index.

    Only pieces whose offset is less than `left` are touched, the others are zeros. The stride is 1 where width is not.
    """

    def run(address, index, stride, left):
        values = np.zeros((len(offsets), width), _TYPE[wide])
        for piece, offset in enumerate(offsets):
            if offset < left:
                values[piece] = address.read(index + offset * stride, width)
        return values.ravel()

    return run


@cache
def store_pieces(dtype, width, offsets, wide):
    """(address, index, stride, left, fragment): stores what load_pieces would load, each element rounded once."""

    def run(address, index, stride, left, fragment):
        for piece, offset in enumerate(offsets):
            if offset < left:
                address.write(index + offset * stride, fragment[piece * width:(piece + 1) * width])

    return _quiet(run)


@cache
def load_integers(dtype, offsets):
    """(address, index, stride, left, absent) -> as load_pieces of single integers or truth values, as 64-bit integers.

    Those that are not touched are `absent`.
    """
    return lambda address, index, stride, left, absent: tuple(
        int(address.read(index + offset * stride, 1)[0]) if offset < left else absent for offset in offsets)


# -- shared memory


class _Shared:
    """One block's array: like the device, it may not be read or written past its end."""

    def __init__(self, size, dtype):
        self.cells = np.full(size, np.nan, dtype)

    def span(self, index, count):
        """The cells of one access."""
        if not 0 <= index <= len(self.cells) - count or index % count:
            raise IndexError(f"shared elements {index} to {index + count - 1} of {len(self.cells)}, {count} aligned")
        return self.cells[index:index + count]


@cache
def shared_array(name, dtype, size):
    """() -> the block's array of this name."""

    def run():
        block = threading.current_thread()._manager
        with _shared_lock:
            arrays = block.__dict__.setdefault("densegrad_shared", {})
            if name not in arrays:
                arrays[name] = _Shared(size, _TYPE[dtype])
            return arrays[name]

    return run


_shared_lock = threading.Lock()


@cache
def load_shared(dtype, count):
    """(array, index) -> count neighbouring elements as a fragment, in one access."""
    return lambda array, index: array.span(index, count).copy()


@cache
def store_shared(dtype, count):
    """(array, index, fragment): stores neighbouring elements in one access."""

    def run(array, index, fragment):
        array.span(index, count)[:] = fragment

    return run


@cache
def add_shared(dtype, count, step, compensated=False, lost=0):
    """(sums of one column, array, index) -> sums plus the cells at index, index + step, ..., added in that order.

    If compensated, each of them is followed by what was lost, `lost` cells further.
    """

    def run(sums, array, index):
        for cell in range(count):
            for offset in (0, lost) if compensated else (0,):
                sums = _plus(sums, array.span(index + cell * step + offset, 1), compensated)
        return sums

    return _quiet(run)


@cache
def store_spread(dtype, count, across, spacing):
    """(array, index, fragment, thread): stores `across` vectors of count elements, `spacing` apart, at most 16 bytes at once."""
    width = min(16 // _TYPE[dtype]().itemsize, count)

    def run(array, index, fragment, thread):
        for start in range(0, across * count, width):
            array.span(index + start // count * spacing + start % count, width)[:] = fragment[start:start + width]

    return run


@cache
def tile_turn(copy):
    """(address, outer, depth, stride, thread) -> by how many elements a tile's row begins after a sector, if rows turn.

    The tile's first element is (outer, depth), the row that of the thread's first access; stride is the distance of
    neighbours along the axis that is not contiguous.
    """

    def run(address, outer, depth, stride, thread):
        item = address.cells.itemsize
        byte = int(address) + (outer + (depth + thread // copy.side) * stride) * item
        return byte % SECTOR // item if copy.turns else 0

    return run


@cache
def thread_lanes(lanes):
    """(thread) -> (down, across, of its warp's first thread down, across) in a block of these Lanes.

    Warps go across first.
    """

    def run(thread):
        warp, lane = divmod(thread, lanes.warp_down * lanes.warp_across)
        below, beside = divmod(warp, lanes.across // lanes.warp_across)
        first_down, first_across = below * lanes.warp_down, beside * lanes.warp_across
        return first_down + lane // lanes.warp_across, first_across + lane % lanes.warp_across, first_down, first_across

    return run


@cache
def fragment_start(layout):
    """(lane) -> the outer index that the fragment of the thread with this number down (or across) begins at."""
    return lambda lane: lane * layout.vector // layout.spacing * layout.stretch + lane * layout.vector % layout.spacing


@cache
def split(size):
    """(number) -> (number // size, number % size), of a number that is not negative."""
    return lambda number: divmod(number, size)


@cache
def store_line(line, dtype, wide):
    """(array, number, place, step, lane, left, factor): stores a thread's elements of a Line in shared memory.

    Times factor, element c goes to place + c * step elements of dtype, the first `left` of them. Neighbouring lanes
    take neighbouring elements, from a sector of the result on: what comes before that comes last. The products are
    computed in wide and rounded once; if the Line accumulates, what is there is added before that.
    """
    size = ITEM_BYTES[dtype]

    def run(array, number, place, step, lane, left, factor):
        address, index = place.address, place.index
        turn = (int(address) + index * size) % min(SECTOR, line.lanes * size) // size
        for first in range(lane, line.length, line.lanes):
            column = (first - turn) % line.length
            if column < left:
                cell = array.span(number * line.length + (column ^ number % 2 * line.flip), 1)
                value = cell.astype(_TYPE[wide]) * factor
                if line.accumulate:
                    value = value + address.read(index + column * step, 1).astype(_TYPE[wide])
                address.write(index + column * step, value)

    return _quiet(run)


@cache
def place(dtype):
    """(address, index) -> the place of an element, to which bytes may be added."""
    return lambda address, index: _Place(address, index)


class _Place:
    """On the device a place is an integer, which advances by bytes."""

    def __init__(self, address, index):
        self.address, self.index = address, index

    def __add__(self, size):
        return _Place(self.address, self.index + size // self.address.cells.itemsize)


@cache
def tile_offset(copy):
    """(stride, turn, thread) -> how many bytes from a tile's first element the thread's first access lies.

    Those from there to another tile may be added. Here these are all, since each access is found by itself.
    """
    return lambda stride, turn, thread: 0


def offset_type(copy):
    """The type of such offsets."""
    return int


@cache
def load_tile(copy):
    """(place, offset, stride, turn, outer left, depth left, thread) -> the thread's share of a TileCopy.

    Zeros beyond what is left; place is that of the tile's first element.
    """

    def run(place, offset, stride, turn, outer_left, depth_left, thread):
        first = place + offset
        values = np.zeros((len(copy.steps()), copy.access), _TYPE[copy.wide])
        for number, (outer, depth) in enumerate(_accesses(copy, thread, turn, stride)):
            if outer < outer_left and depth < depth_left:
                index = outer * stride + depth if copy.along_depth else outer + depth * stride
                values[number] = first.address.read(first.index + index, copy.access)
        return values.ravel()

    return _quiet(run)


@cache
def load_whole_tile(copy):
    """(place, offset, stride, turn, thread) -> the thread's share of a TileCopy that lies inside the operand."""
    load = load_tile(copy)
    return lambda place, offset, stride, turn, thread: load(place, offset, stride, turn, copy.outer_size,
                                                            copy.depth_size, thread)


@cache
def store_tile(copy):
    """(array, index, fragment, stride, turn, thread): stores what load_tile brought into the array's stage at index."""
    layout = copy.layout

    def run(array, index, fragment, stride, turn, thread):
        values = fragment.reshape(-1, copy.access)
        for (outer, depth), part in zip(_accesses(copy, thread, turn, stride), values, strict=False):
            for step, value in enumerate(part) if copy.along_depth else [(0, part)]:
                place = layout.start + (depth + step) * layout.outer_size + (outer ^ layout.flip(depth))
                array.span(index + place, np.size(value))[:] = value

    return run


def _accesses(copy, thread, turn, stride):
    """(outer, depth) of each access of a thread."""
    places = []
    for outer, depth in copy.steps():
        if copy.along_depth:
            far, group = divmod(thread // copy.side, copy.lanes)
            outer, depth = outer + group, depth + (far * copy.side + thread % copy.side) * copy.access
        else:
            turned = (turn + depth * stride) % (SECTOR // ITEM_BYTES[copy.dtype]) if copy.turns else 0
            outer = (outer + thread % copy.side * copy.access - turned) % copy.outer_size
            depth += thread // copy.side
        if depth < copy.depth_size:
            places.append((outer, depth))
    return places


@cache
def add_tile(share):
    """(array, index, sums, thread) -> sums plus the thread's TileShare of the tile in the stage at index.

    In ascending order of the depth.
    """
    layout, vector = share.layout, 16 // _TYPE[share.dtype]().itemsize

    def run(array, index, sums, thread):
        totals = sums.reshape(share.groups, vector).copy()
        first_outer = thread % share.across * share.groups * vector
        for depth in range(thread // share.across % share.depths, share.depth_size, share.depths):
            for group in range(share.groups):
                outer = first_outer + group * vector ^ layout.flip(depth)
                totals[group] += array.span(index + layout.start + depth * layout.outer_size + outer, vector)
        return totals.ravel()

    return _quiet(run)


@cache
def multiply_tile(dtype, depth, left, right):
    """(array, index, left outer, right outer, sums) -> sums plus the outer products of the stage at index.

    left and right are TileLayouts; the outer indices are those of the thread's first elements. The steps are taken in
    ascending order; product and sum are rounded one after the other, where the device rounds once.
    """
    vector = 16 // _TYPE[dtype]().itemsize

    def fragment(layout, array, index, outer, step):
        first, flip = index + layout.start + step * layout.outer_size, layout.flip(step)
        return np.concatenate([array.span(first + (outer + group * layout.spacing ^ flip), vector)
                               for group in range(layout.groups)])

    def run(array, index, left_outer, right_outer, sums):
        totals = sums.reshape(vector * left.groups, vector * right.groups)
        for step in range(depth):
            rows = fragment(left, array, index, left_outer, step)
            totals = totals + rows[:, None] * fragment(right, array, index, right_outer, step)
        return totals.ravel()

    return _quiet(run)


def _quiet(run):
    """A device neither warns of overflow nor of NaN."""

    def wrapped(*arguments):
        with np.errstate(all="ignore"):
            return run(*arguments)

    return wrapped
