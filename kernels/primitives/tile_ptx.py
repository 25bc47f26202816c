"""Tiles in shared memory as LLVM and PTX: copies into them, products and sums of them, lines of results out of them."""
from llvmlite import ir
from numba import types

from ...facts import ITEM_BYTES
from .factories import cache
from .layout import SECTOR
from .ptx import (
    _INT32,
    _INT64,
    _NUMBA,
    _SHARED,
    _STORED,
    _again,
    _expand,
    _fragment_type,
    _load_bytes,
    _load_shared,
    _narrowed,
    _pack,
    _shared_pointer,
    _store_bytes,
    _store_shared,
    _unpack,
    _widen,
    _widened,
)


@cache
def tile_turn(copy):
    """(address, outer, depth, stride, thread) -> by how many elements a tile's row begins after a sector, if rows turn.

    The tile's first element is (outer, depth), the row that of the thread's first access; stride is the distance of
    neighbours along the axis that is not contiguous.
    """

    def body(builder, address, outer, depth, stride, thread):
        if not copy.turns:
            return ir.Constant(_INT32, 0)
        row = builder.add(depth, builder.zext(_first_access(builder, copy, thread)[1], _INT64))
        element = builder.add(outer, builder.mul(row, stride))
        byte = builder.add(address, builder.mul(element, ir.Constant(_INT64, ITEM_BYTES[copy.dtype])))
        return builder.udiv(builder.and_(builder.trunc(byte, _INT32), ir.Constant(_INT32, SECTOR - 1)),
                            ir.Constant(_INT32, ITEM_BYTES[copy.dtype]))

    return _expand(types.int32, (types.int64, types.int64, types.int64, types.int64, types.int32), body)


@cache
def thread_lanes(lanes):
    """(thread) -> (down, across, of its warp's first thread down, across) in a block of these Lanes.

    Warps go across first.
    """

    def body(builder, thread):
        def split(value, by):
            return builder.udiv(value, ir.Constant(_INT32, by)), builder.urem(value, ir.Constant(_INT32, by))

        warp, lane = split(thread, lanes.warp_down * lanes.warp_across)
        below, beside = split(warp, lanes.across // lanes.warp_across)
        first_down = builder.mul(below, ir.Constant(_INT32, lanes.warp_down))
        first_across = builder.mul(beside, ir.Constant(_INT32, lanes.warp_across))
        down, across = split(lane, lanes.warp_across)
        own = builder.add(first_down, down), builder.add(first_across, across)
        return _pack(builder, [*own, first_down, first_across])

    return _expand(types.UniTuple(types.int32, 4), (types.int32,), body)


@cache
def again():
    """(number) -> the same, of which the compiler does not know it.

    So what follows from it is computed again, and takes no registers up to there.
    """
    return _expand(types.int32, (types.int32,), _again)


@cache
def split(size):
    """(number) -> (number // size, number % size), of a number that is not negative."""
    return _expand(types.UniTuple(types.int32, 2), (types.int32,), lambda builder, number: _pack(builder, [
        operation(number, ir.Constant(_INT32, size)) for operation in (builder.udiv, builder.urem)]))


@cache
def fill_line(line, groups, vector, spacing):
    """(array, number, first, fragment): stores `groups` vectors in this Line, `spacing` apart, from `first` on."""

    def body(builder, array, number, first, fragment):
        def constant(value):
            return ir.Constant(_INT32, value)

        values = _unpack(builder, fragment)
        row = builder.mul(number, constant(line.length))
        flip = builder.mul(builder.and_(number, constant(1)), constant(line.flip))
        for group in range(groups):
            # Whole periods of the flip apart, groups lie at constant distances.
            apart = group * spacing if line.flip and spacing % (2 * line.flip) == 0 else 0
            column = builder.add(first, constant(group * spacing - apart))
            place = builder.add(builder.add(row, builder.xor(column, flip)), constant(apart))
            _store_shared(builder, _shared_pointer(builder, array, place, line.dtype), line.dtype,
                          values[group * vector:(group + 1) * vector])

    return _expand(types.none, (types.int32, types.int32, types.int32, _fragment_type(line.dtype, groups * vector)),
                   body)


@cache
def store_line(line, dtype, wide):
    """(array, number, place, step, lane, left, factor): stores a thread's elements of a Line in shared memory.

    Times factor, element c goes to place + c * step elements of dtype, the first `left` of them. Neighbouring lanes
    take neighbouring elements, from a sector of the result on: what comes before that comes last. The products are
    computed in wide and rounded once; if the Line accumulates, what is there is added before that.
    """
    size = ITEM_BYTES[dtype]

    def body(builder, array, number, place, step, lane, left, factor):
        def constant(value):
            return ir.Constant(_INT32, value)

        far = builder.mul(step, ir.Constant(_INT64, size))
        turn = builder.and_(builder.trunc(place, _INT32), constant(min(SECTOR, line.lanes * size) - 1))
        begin = builder.sub(lane, builder.udiv(turn, constant(size)))
        before = builder.icmp_signed("<", begin, constant(0))
        row = builder.mul(number, constant(line.length))
        flip = builder.mul(builder.and_(number, constant(1)), constant(line.flip))
        for first in range(0, line.length, line.lanes):
            # The first element may be the last of the line; from the second on, those that are whole periods of the
            # flip apart lie at constant distances.
            period = max(line.lanes, 2 * line.flip)
            origin = first % period or min(first, period)
            start = builder.add(begin, constant(origin)) if first else builder.select(
                before, builder.add(begin, constant(line.length)), begin)
            column = builder.add(start, constant(first - origin))
            with builder.if_then(builder.icmp_signed("<", column, left)):
                pointer = _shared_pointer(builder, array, builder.add(row, builder.xor(start, flip)), line.dtype)
                pointer = builder.gep(pointer, [ir.Constant(_INT64, first - origin)], inbounds=True,
                                      source_etype=_STORED[line.dtype])
                value = _load_shared(builder, pointer, line.dtype, 1)[0]
                value = builder.fmul(_widen(builder, value, line.dtype, wide), factor)
                place_of_start = builder.add(place, builder.mul(builder.zext(start, _INT64), far))
                target = builder.add(place_of_start, builder.mul(ir.Constant(_INT64, first - origin), far))
                if line.accumulate:
                    old = _load_bytes(builder, target, dtype, 1)[0]
                    value = builder.fadd(value, _widen(builder, old, dtype, wide))
                _store_bytes(builder, target, dtype, _narrowed(builder, [value], wide, dtype))

    return _expand(types.none, (types.int32, types.int32, types.int64, types.int64, types.int32, types.int32,
                                _NUMBA[wide]), body)


@cache
def place(dtype):
    """(address, index) -> the place of an element, to which bytes may be added."""
    return _expand(types.int64, (types.int64, types.int64), lambda builder, address, index: builder.add(
        address, builder.mul(index, ir.Constant(_INT64, ITEM_BYTES[dtype]))))


@cache
def tile_offset(copy):
    """(stride, turn, thread) -> how many bytes from a tile's first element the thread's first access lies."""
    kind = _offset_type(copy)

    def body(builder, stride, turn, thread):
        outer, depth = (builder.zext(step, _INT64) for step in _first_access(builder, copy, thread))
        outer = builder.sub(outer, builder.zext(turn, _INT64))
        near, far = (depth, outer) if copy.along_depth else (outer, depth)
        element = builder.add(near, builder.mul(far, stride))
        byte = builder.mul(element, ir.Constant(_INT64, ITEM_BYTES[copy.dtype]))
        return byte if kind == types.int64 else builder.trunc(byte, _INT32)

    return _expand(kind, (types.int64, types.int32, types.int32), body)


def _offset_type(copy):
    """The type of such offsets; turned rows may begin before the operand."""
    if copy.offset_bits == 64:
        return types.int64
    return types.int32 if copy.turns else types.uint32


@cache
def deeper(copy):
    """(place, depth, stride) -> the place of the same element of the tile that lies `depth` deeper.

    One instruction where bytes are counted in 32 bits.
    """
    size = ITEM_BYTES[copy.dtype]

    def body(builder, place, depth, stride):
        step = ir.Constant(_INT64, size) if copy.along_depth else builder.mul(stride, ir.Constant(_INT64, size))
        if copy.offset_bits == 64:
            return builder.add(place, builder.mul(builder.sext(depth, _INT64), step))
        function = ir.FunctionType(_INT64, [_INT32, _INT32, _INT64])
        return builder.asm(function, "mad.wide.s32 $0, $1, $2, $3;", "=l,r,r,l",
                           [depth, builder.trunc(step, _INT32), place], side_effect=False)

    return _expand(types.int64, (types.int64, types.int32, types.int64), body)


@cache
def load_tile(copy):
    """(place, offset, stride, turn, outer left, depth left, thread) -> the thread's share of a TileCopy.

    Zeros beyond what is left; place is that of the tile's first element.
    """

    def body(builder, place, offset, stride, turn, outer_left, depth_left, thread):
        _, first_depth = _first_access(builder, copy, thread)
        bounds = []
        for step in copy.steps():
            base, further = _outer(builder, copy, step, stride, turn, thread)
            bounds.append(((builder.add(base, ir.Constant(_INT32, further)), outer_left),
                           (builder.add(first_depth, ir.Constant(_INT32, step[1])), depth_left)))
        return _load_places(builder, copy, place, offset, stride, turn, thread, bounds)

    return _expand(_fragment_type(copy.wide, copy.count),
                   (types.int64, _offset_type(copy), types.int64, *[types.int32] * 4), body)


@cache
def load_whole_tile(copy):
    """(place, offset, stride, turn, thread) -> the thread's share of a TileCopy that lies inside the operand."""

    def body(builder, place, offset, stride, turn, thread):
        return _load_places(builder, copy, place, offset, stride, turn, thread, [()] * len(copy.steps()))

    return _expand(_fragment_type(copy.wide, copy.count),
                   (types.int64, _offset_type(copy), types.int64, types.int32, types.int32), body)


def _load_places(builder, copy, place, offset, stride, turn, thread, bounds):
    """The thread's accesses, of those whose bounds hold. Only whole rows and turned ones lie at runtime distances."""
    first, _ = _first_access(builder, copy, thread)
    has_share = _has_share(builder, copy, thread) if copy.partial else None
    widen, size = builder.sext if copy.turns else builder.zext, ITEM_BYTES[copy.dtype]
    place = builder.add(place, widen(offset, _INT64))
    values = []
    for step, pairs in zip(copy.steps(), bounds, strict=True):
        base, further = _outer(builder, copy, step, stride, turn, thread)
        turned = builder.sub(base, builder.sub(first, turn)) if copy.turns else ir.Constant(_INT32, 0)
        outer = builder.sext(turned, _INT64)
        if copy.along_depth:
            constant, distance = step[1], builder.mul(ir.Constant(_INT64, further), stride)
        else:
            constant, distance = further, builder.add(outer, builder.mul(ir.Constant(_INT64, step[1]), stride))
        pointer = builder.add(place, builder.mul(distance, ir.Constant(_INT64, size)))
        loaded = _load_bytes(builder, pointer, copy.dtype, copy.access, has_share, pairs, constant * size)
        values += _widened(builder, loaded, copy.dtype, copy.wide)
    return _pack(builder, values)


@cache
def store_tile(copy):
    """(array, stage, fragment, stride, turn, thread): stores what load_tile brought.

    A stage is how many bytes after the beginning of the array it begins.
    """
    layout = copy.layout

    def store(builder, array, stage, values, stride, turn, thread):
        _, first_depth = _first_access(builder, copy, thread)
        for number, step in enumerate(copy.steps()):
            place, further = _stored(builder, copy, step, first_depth, stride, turn, thread)
            start = _stage_pointer(builder, array, place, stage, copy.wide)
            share = values[number * copy.access:(number + 1) * copy.access]
            width = min(copy.access, layout.depths) if copy.along_depth else copy.access
            for depth in range(0, copy.access, width):
                offset = ir.Constant(_INT64, further + depth // layout.depths * layout.layer)
                pointer = builder.gep(start, [offset], inbounds=True, source_etype=_STORED[copy.wide])
                _store_shared(builder, pointer, copy.wide, share[depth:depth + width])

    def body(builder, array, stage, fragment, stride, turn, thread):
        with builder.if_then(_has_share(builder, copy, thread)):
            store(builder, array, stage, _unpack(builder, fragment), stride, turn, thread)

    return _expand(types.none, (types.int32, types.int32, _fragment_type(copy.wide, copy.count), types.int64,
                                types.int32, types.int32), body)


def _stored(builder, copy, step, first_depth, stride, turn, thread):
    """(value, constant), whose sum is the place in a stage of a thread's access."""
    def constant(value):
        return ir.Constant(_INT32, value)

    layout, (outer, depth) = copy.layout, step
    layer = builder.udiv(first_depth, constant(layout.depths))
    row = builder.add(constant(layout.start), builder.mul(layer, constant(layout.layer)))
    if not copy.along_depth:
        base, further = _outer(builder, copy, step, stride, turn, thread)
        return builder.add(row, base), depth * layout.layer + further
    # Steps of whole flip periods leave the flipped bits alone, and so are constant offsets.
    position = layout.position(outer)
    rest = position % (layout.flip_count * layout.flip_unit)
    first = builder.mul(_first_piece(builder, copy, thread), constant(layout.depths))
    flipped = builder.xor(builder.add(first, constant(rest)), _flip(builder, layout, layer))
    within = builder.urem(first_depth, constant(layout.depths))
    return (builder.add(builder.add(row, flipped), within),
            position - rest + depth // layout.depths * layout.layer + depth % layout.depths)


def _first_piece(builder, copy, thread):
    """The piece of a thread's first access, of an operand contiguous along the depth."""
    return builder.urem(builder.udiv(thread, ir.Constant(_INT32, copy.side)), ir.Constant(_INT32, copy.lanes))


def _first_access(builder, copy, thread):
    """(outer, depth) of a thread's first access, where its row is not turned."""
    def constant(value):
        return ir.Constant(_INT32, value)

    near, rest = builder.urem(thread, constant(copy.side)), builder.udiv(thread, constant(copy.side))
    if not copy.along_depth:
        return builder.mul(near, constant(copy.access)), rest
    depth = builder.add(near, builder.mul(builder.udiv(rest, constant(copy.lanes)), constant(copy.side)))
    return (_outer_of(builder, copy.layout, _first_piece(builder, copy, thread)),
            builder.mul(depth, constant(copy.access)))


def _outer(builder, copy, step, stride, turn, thread):
    """(value, constant), whose sum is the outer index of a thread's access.

    A turned row begins with the sector that its first element lies in: what would come before that element comes last.
    """
    first, _ = _first_access(builder, copy, thread)
    outer, depth = step
    if not copy.turns:
        return first, outer
    if depth * ITEM_BYTES[copy.dtype] % SECTOR:
        turn = builder.add(turn, builder.mul(ir.Constant(_INT32, depth), builder.trunc(stride, _INT32)))
        turn = builder.and_(turn, ir.Constant(_INT32, SECTOR // ITEM_BYTES[copy.dtype] - 1))
    base = builder.sub(first, turn)
    if outer:
        width = copy.side * copy.access
        return builder.add(base, ir.Constant(_INT32, width)), outer - width
    before = builder.icmp_signed("<", base, ir.Constant(_INT32, 0))
    return builder.select(before, builder.add(base, ir.Constant(_INT32, copy.outer_size)), base), 0


def _has_share(builder, copy, thread):
    """Whether a thread has anything to copy."""
    if not copy.partial:
        return ir.Constant(ir.IntType(1), 1)
    return builder.icmp_signed("<", _first_access(builder, copy, thread)[1], ir.Constant(_INT32, copy.depth_size))


def _flip(builder, layout, layer):
    """TileLayout.flip of a layer that is not a constant."""
    flip = builder.udiv(layer, ir.Constant(_INT32, layout.flip_every))
    flip = builder.urem(flip, ir.Constant(_INT32, layout.flip_count))
    return builder.mul(flip, ir.Constant(_INT32, layout.flip_unit))


def _outer_of(builder, layout, piece):
    """TileLayout.outer_of a piece that is not a constant."""
    outer = ir.Constant(_INT32, 0)
    for size, weight in layout.fields:
        part = builder.urem(piece, ir.Constant(_INT32, size))
        outer = builder.add(outer, builder.mul(part, ir.Constant(_INT32, weight)))
        piece = builder.udiv(piece, ir.Constant(_INT32, size))
    return outer


def _stage_pointer(builder, array, place, stage, dtype):
    """A pointer to an element of a stage: only the stage changes from one tile to the next."""
    byte = builder.add(builder.add(array, builder.mul(place, ir.Constant(_INT32, ITEM_BYTES[dtype]))), stage)
    return builder.inttoptr(byte, ir.PointerType(_STORED[dtype], _SHARED))


@cache
def add_tile(share):
    """(array, stage, sums, thread) -> sums plus the thread's TileShare of the tile in that stage."""
    layout = share.layout

    def body(builder, array, stage, sums, thread):
        first, first_layer = _first_vector(builder, share, thread)
        totals, vector, classes = _unpack(builder, sums), layout.vector, share.held
        for step in range(0, share.depth_size // layout.depths, share.layers):
            layer = builder.add(first_layer, ir.Constant(_INT32, step))
            row = builder.add(ir.Constant(_INT32, layout.start), builder.mul(layer, ir.Constant(_INT32, layout.layer)))
            for number in range(share.vectors):
                position = builder.add(first, ir.Constant(_INT32, number * share.across * vector))
                place = builder.add(row, builder.xor(position, _flip(builder, layout, layer)))
                pointer = _stage_pointer(builder, array, place, stage, share.dtype)
                for element, value in enumerate(_load_shared(builder, pointer, share.dtype, vector), number * vector):
                    depth = step * layout.depths + element % layout.depths
                    held = element // layout.depths * len(classes) + classes.index(depth % share.classes)
                    totals[held] = builder.fadd(totals[held], value)
        return _pack(builder, totals)

    fragment = _fragment_type(share.dtype, share.count)
    return _expand(fragment, (types.int32, types.int32, fragment, types.int32), body)


@cache
def store_tile_sums(share):
    """(array, sums, thread): stores a TileShare's sums, those of class c and outer index o at c * outer_size + o."""
    layout = share.layout

    def body(builder, array, sums, thread):
        def constant(value):
            return ir.Constant(_INT32, value)

        first, first_layer = _first_vector(builder, share, thread)
        values, classes = _unpack(builder, sums), share.held
        size = layout.vector // layout.depths * len(classes)
        with builder.if_then(builder.icmp_signed("<", thread, constant(share.across * share.layers))):
            for number in range(share.vectors):
                position = builder.add(first, constant(number * share.across * layout.vector))
                outer = _outer_of(builder, layout, builder.udiv(position, constant(layout.depths)))
                place = builder.add(builder.mul(first_layer, constant(layout.layer)), outer)
                own = values[number * size:(number + 1) * size]
                for begin, held in enumerate(classes):
                    pointer = _shared_pointer(builder, array, builder.add(place, constant(held * layout.outer_size)),
                                              share.dtype)
                    _store_shared(builder, pointer, share.dtype, own[begin::len(classes)])

    return _expand(types.none, (types.int32, _fragment_type(share.dtype, share.count), types.int32), body)


def _first_vector(builder, share, thread):
    """(position, layer) of the first vector that a thread adds."""
    across = ir.Constant(_INT32, share.across)
    layer = builder.urem(builder.udiv(thread, across), ir.Constant(_INT32, share.layers))
    return builder.mul(builder.urem(thread, across), ir.Constant(_INT32, share.layout.vector)), layer


@cache
def multiply_tile(dtype, depth, left, right):
    """(array, stage, left outer, right outer, sums) -> sums plus the outer products of the tiles in that stage.

    left and right are TileLayouts; the outer indices are those of the thread's first elements. All is written out: one
    fused multiply-add for each pair of a left and a right element, in ascending order of the depth.
    """
    rows, columns, depths = left.groups * left.vector, right.groups * right.vector, max(left.depths, right.depths)
    # Within a depth the order is free. The assembler spills or delays loads in the other one; benchmarks.counted tells.
    by_rows = depths == 1 and (rows != columns or max(left.flip_count, right.flip_count) > 1)

    def body(builder, array, stage, left_outer, right_outer, sums):
        totals = _unpack(builder, sums)

        def multiply(row, column, step, left_value, right_value):
            number = row * columns + column
            totals[number] = builder.fma(left_value[row, step], right_value[column, step], totals[number])

        for first in range(0, depth, depths):
            held, passing = {}, {}
            for vector in _fragment(builder, left, dtype, array, stage, left_outer, first, depths):
                held |= vector
            for vector in _fragment(builder, right, dtype, array, stage, right_outer, first, depths):
                passing |= vector
                for column, step in {} if by_rows else vector:
                    for row in range(rows):
                        multiply(row, column, step, held, vector)
            for row, step in held if by_rows else {}:
                for column in range(columns):
                    multiply(row, column, step, held, passing)
        return _pack(builder, totals)

    fragment = _fragment_type(dtype, rows * columns)
    return _expand(fragment, (types.int32, types.int32, types.int32, types.int32, fragment), body)


def _fragment(builder, layout, dtype, array, stage, outer, first_depth, depths):
    """Yields {(number in the fragment, depth): element} of each vector of a thread's fragment at these depths."""
    if layout.stretch < layout.layer:
        spacing = ir.Constant(_INT32, layout.spacing)
        position = builder.add(builder.urem(outer, spacing),
                               builder.mul(builder.udiv(outer, spacing), ir.Constant(_INT32, layout.stretch)))
    else:
        position = outer
    outers = layout.vector // layout.depths
    for layer in range(first_depth // layout.depths, (first_depth + depths) // layout.depths):
        # A flip by whole spacings swaps the thread's own vectors: a constant.
        flip = layout.flip(layer)
        swap = flip % layout.stretch if flip % layout.spacing == 0 else 0
        place = builder.add(builder.xor(position, ir.Constant(_INT32, flip ^ swap)), ir.Constant(_INT32, layout.start))
        start = _stage_pointer(builder, array, place, stage, dtype)
        for vector in range(layout.vectors):
            offset = ir.Constant(_INT64, layer * layout.layer + (vector * layout.spacing ^ swap))
            pointer = builder.gep(start, [offset], inbounds=True, source_etype=_STORED[dtype])
            values = _load_shared(builder, pointer, dtype, layout.vector)
            yield {(vector * outers + element // layout.depths, layer * layout.depths + element % layout.depths): value
                   for element, value in enumerate(values)}


@cache
def load_thread_tile(tile, outer_edge, depth_edge):
    """(place, stride, outer left, depth left) -> a ThreadTile whose first element lies at that place.

    Zeros for the elements beyond what is left, of the axes that may have an edge in it.
    """
    size = ITEM_BYTES[tile.dtype]

    def body(builder, place, stride, outer_left, depth_left):
        values = [None] * tile.count
        for outer, depth, numbers in tile.accesses:
            near, far = (depth, outer) if tile.along_depth else (outer, depth)
            pointer = builder.add(place, builder.mul(stride, ir.Constant(_INT64, far * size)))
            bounds = [(ir.Constant(_INT32, first), left) for first, left, edge in
                      ((outer, outer_left, outer_edge), (depth, depth_left, depth_edge)) if edge]
            loaded = _load_bytes(builder, pointer, tile.dtype, tile.access, None, bounds, near * size)
            for number, value in zip(numbers, _widened(builder, loaded, tile.dtype, tile.wide), strict=True):
                values[number] = value
        return _pack(builder, values)

    return _expand(_fragment_type(tile.wide, tile.count), (types.int64, types.int64, types.int32, types.int32), body)


@cache
def multiply_thread_tiles(dtype, rows, cols, depth, sums_of_right):
    """(sums, left, right) -> sums plus the outer products of two fragments of ThreadTiles, in ascending order of depth.

    If sums_of_right, the sums have one row more: those of the right fragment along the depth.
    """

    def body(builder, sums, left, right):
        totals, lefts, rights = _unpack(builder, sums), _unpack(builder, left), _unpack(builder, right)
        for step in range(depth):
            for col in range(cols):
                value = rights[step * cols + col]
                for row in range(rows):
                    number = row * cols + col
                    totals[number] = builder.fma(lefts[step * rows + row], value, totals[number])
                if sums_of_right:
                    totals[rows * cols + col] = builder.fadd(totals[rows * cols + col], value)
        return _pack(builder, totals)

    fragment = _fragment_type(dtype, (rows + sums_of_right) * cols)
    return _expand(fragment, (fragment, _fragment_type(dtype, rows * depth), _fragment_type(dtype, cols * depth)), body)
