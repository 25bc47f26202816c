"""Tiles in shared memory in NumPy: copies into them, products and sums of them, lines of results out of them."""
import numpy as np

from .factories import cache
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
def again():
    """(number) -> the same, of which the compiler does not know it."""
    return lambda number: number


@cache
def split(size):
    """(number) -> (number // size, number % size), of a number that is not negative."""
    return lambda number: divmod(number, size)


@cache
def fill_line(line, groups, vector, spacing):
    """(array, number, first, fragment): stores `groups` vectors in this Line, `spacing` apart, from `first` on."""

    def run(array, number, first, fragment):
        for group in range(groups):
            place = number * line.length + (first + group * spacing ^ number % 2 * line.flip)
            array.span(place, vector)[:] = fragment[group * vector:(group + 1) * vector]

    return run


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

    Here none, since each access is found by itself.
    """
    return lambda stride, turn, thread: 0


@cache
def deeper(copy):
    """(place, depth, stride) -> the place of the same element of the tile that lies `depth` deeper."""
    size = ITEM_BYTES[copy.dtype]
    return lambda place, depth, stride: place + int(depth) * size * (1 if copy.along_depth else stride)


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
    """(array, stage, fragment, stride, turn, thread): stores what load_tile brought.

    A stage is how many bytes after the beginning of the array it begins.
    """

    def run(array, stage, fragment, stride, turn, thread):
        values = fragment.reshape(-1, copy.access)
        width = min(copy.access, copy.layout.depths) if copy.along_depth else copy.access
        for (outer, depth), part in zip(_accesses(copy, thread, turn, stride), values, strict=False):
            for start in range(0, copy.access, width):
                place = stage // ITEM_BYTES[copy.wide] + copy.layout.place(outer, depth + start)
                array.span(place, width)[:] = part[start:start + width]

    return run


def _accesses(copy, thread, turn, stride):
    """(outer, depth) of each access of a thread."""
    places = []
    for outer, depth in copy.steps():
        if copy.along_depth:
            far, piece = divmod(thread // copy.side, copy.lanes)
            outer += copy.layout.outer_of(piece)
            depth += (far * copy.side + thread % copy.side) * copy.access
        else:
            turned = (turn + depth * stride) % (SECTOR // ITEM_BYTES[copy.dtype]) if copy.turns else 0
            outer = (outer + thread % copy.side * copy.access - turned) % copy.outer_size
            depth += thread // copy.side
        if depth < copy.depth_size:
            places.append((outer, depth))
    return places


@cache
def add_tile(share):
    """(array, stage, sums, thread) -> sums plus the thread's TileShare of the tile in that stage."""

    def run(array, stage, sums, thread):
        totals, start = sums.copy(), stage // ITEM_BYTES[share.dtype]
        for number, outer, depth in _summed(share, thread):
            totals[number] += array.span(start + share.layout.place(outer, depth), 1)[0]
        return totals

    return _quiet(run)


@cache
def store_tile_sums(share):
    """(array, sums, thread): stores a TileShare's sums, those of class c and outer index o at c * outer_size + o."""

    def run(array, sums, thread):
        if thread < share.across * share.layers:
            for number, outer, depth in _summed(share, thread):
                array.span(depth % share.classes * share.layout.outer_size + outer, 1)[0] = sums[number]

    return run


@cache
def _summed(share, thread):
    """(which of its sums, outer, depth) of each element that a thread adds, in this order."""
    layout, classes, places = share.layout, share.held, []
    thread_layer, thread_vector = divmod(thread, share.across)
    for depth in range(share.depth_size):
        if depth // layout.depths % share.layers != thread_layer % share.layers:
            continue
        for outer in range(layout.outer_size):
            vector, within = divmod(layout.position(outer), layout.vector)
            if vector % share.across == thread_vector:
                piece = vector // share.across * (layout.vector // layout.depths) + within // layout.depths
                held = (depth - thread_layer % share.layers * layout.depths) % share.classes
                places.append((piece * len(classes) + classes.index(held), outer, depth))
    return places


@cache
def multiply_tile(dtype, depth, left, right):
    """(array, stage, left outer, right outer, sums) -> sums plus the outer products of the tiles in that stage.

    left and right are TileLayouts; the outer indices are those of the thread's first elements. Products are added in
    ascending order of the depth; product and sum are rounded one after the other, where the device rounds once.
    """

    def fragment(layout, array, start, outer, step):
        size = layout.vector // layout.depths
        first = [outer + group * layout.group_spacing + number
                 for group in range(layout.groups) for number in range(0, layout.vector, size)]
        layer = step // layout.depths * layout.depths
        return np.concatenate([array.span(start + layout.place(one, layer), layout.vector)[step - layer::layout.depths]
                               for one in first])

    def run(array, stage, left_outer, right_outer, sums):
        totals, start = sums.reshape(left.groups * left.vector, -1), stage // ITEM_BYTES[dtype]
        for step in range(depth):
            rows = fragment(left, array, start, left_outer, step)
            totals = totals + rows[:, None] * fragment(right, array, start, right_outer, step)
        return totals.ravel()

    return _quiet(run)


@cache
def load_thread_tile(tile, outer_edge, depth_edge):
    """(place, stride, outer left, depth left) -> a ThreadTile whose first element lies at that place.

    Zeros for the elements beyond what is left, of the axes that may have an edge in it.
    """

    def run(place, stride, outer_left, depth_left):
        values = np.zeros(tile.count, _TYPE[tile.wide])
        for outer, depth, numbers in tile.accesses:
            if (outer < outer_left or not outer_edge) and (depth < depth_left or not depth_edge):
                near, far = (depth, outer) if tile.along_depth else (outer, depth)
                values[numbers] = place.address.read(place.index + near + far * stride, tile.access)
        return values

    return run


@cache
def multiply_thread_tiles(dtype, rows, cols, depth, sums_of_right):
    """(sums, left, right) -> sums plus the outer products of two fragments of ThreadTiles, in ascending order of depth.

    If sums_of_right, the sums have one row more: those of the right fragment along the depth.
    """

    def run(sums, left, right):
        sums = sums.reshape(rows + sums_of_right, cols)
        for step, values in enumerate(right.reshape(depth, cols)):
            factors = np.append(left[step * rows:(step + 1) * rows], np.ones(int(sums_of_right), _TYPE[dtype]))
            sums = sums + factors[:, None] * values
        return sums.ravel()

    return _quiet(run)
