"""Tiles in shared memory in NumPy: copies into them, products and sums of them, lines of results out of them."""
from functools import cache

import numpy as np

from .layout import ITEM_BYTES, SECTOR
from .simulator import _TYPE, _quiet


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
