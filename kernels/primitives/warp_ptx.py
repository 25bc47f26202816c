"""Tensor cores and copies into shared memory as inline PTX: what the 32 lanes of a warp do together.

Source: PTX ISA, "Warp-level matrix instructions: mma, ldmatrix" with their pictures of the fragments, and "cp.async".
"""
from llvmlite import ir
from numba import types

from .factories import cache
from .layout import CHUNK_BYTES, STEP_BYTES
from .number_ptx import _round_tf32
from .ptx import (
    _INT16,
    _INT32,
    _INT64,
    _NUMBA,
    _SHARED,
    _again,
    _expand,
    _fragment_type,
    _load_bytes,
    _load_global,
    _narrowed,
    _pack,
    _store_global,
    _times,
    _unpack,
    _widen,
)

#: 16 rows, 8 columns and one step's depth in one instruction: the registers that it takes of left, right and sums
_WHOLE = ((slice(4), slice(2), slice(4)),)
#: kind -> shape and types of the instruction, and what each of those takes that make up 16 rows and 8 columns
_MMA = {
    "float16": ("m16n8k16.row.col.f32.f16.f16.f32", _WHOLE),
    "float16k8": ("m16n8k8.row.col.f32.f16.f16.f32",
                  ((slice(2), slice(1), slice(4)), (slice(2, 4), slice(1, 2), slice(4)))),
    "bfloat16": ("m16n8k16.row.col.f32.bf16.bf16.f32", _WHOLE),
    "tf32": ("m16n8k8.row.col.f32.tf32.tf32.f32", _WHOLE),
    "tf32x3": ("m16n8k8.row.col.f32.tf32.tf32.f32", _WHOLE),
    "float64": ("m16n8k4.row.col.f64.f64.f64.f64", ((slice(2), slice(1), slice(4)),)),
    "float64m8": ("m8n8k4.row.col.f64.f64.f64.f64",
                  ((slice(1), slice(1), slice(2)), (slice(1, 2), slice(1), slice(2, 4)))),
}


def _int32(value):
    return ir.Constant(_INT32, value)


def _together(builder, result, code, constraints, arguments, side_effect=True):
    """Inline PTX that all lanes of a warp execute together."""
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    called = builder.asm(function, code, constraints, arguments, side_effect=side_effect)
    called.attributes.add("convergent")
    return called


def _registers(count, item_bytes=4):
    return types.UniTuple(types.float64 if item_bytes == 8 else types.uint32, count)


# -- shared memory


@cache
def shared_bytes(size):
    """() -> the block's dynamic shared memory, which its launch says the size of. Indices of it count bytes."""

    return _expand(types.int32, (), _dynamic_shared)


def _dynamic_shared(builder):
    """The address of the block's dynamic shared memory."""
    array = builder.module.globals.get("densegrad_dynamic")
    if array is None:
        cells = ir.ArrayType(ir.IntType(8), 0)
        array = ir.GlobalVariable(builder.module, cells, "densegrad_dynamic", addrspace=_SHARED)
        array.linkage, array.align = "external", 128
    return builder.ptrtoint(array, _INT32)


# -- copies of chunks


@cache
def copy_place(copy):
    """(place, stride, thread) -> where the thread's first chunk of a ChunkCopy comes from, for copy_chunks.

    place is that of the tile's first element; line l begins l * stride elements further.
    """

    def body(builder, place, stride, thread):
        line, chunk = _first_chunk(builder, copy, thread)
        skipped = builder.add(builder.mul(builder.zext(line, _INT64), stride),
                              builder.zext(builder.mul(chunk, _int32(copy.elements)), _INT64))
        return builder.add(place, builder.mul(skipped, ir.Constant(_INT64, copy.item_bytes)))

    return _expand(types.int64, (types.int64, types.int64, types.int32), body)


def _first_chunk(builder, copy, thread):
    """(line, chunk) of a thread's first chunk."""
    return builder.udiv(thread, _int32(copy.tile.chunks)), builder.urem(thread, _int32(copy.tile.chunks))


@cache
def copy_chunks(copy, ragged):
    """(array, index, place, stride, outer left, depth left, thread): copies the thread's share of a ChunkCopy.

    place is what copy_place gave for the tile, which comes to index of shared memory. Outer indices from `outer left`
    on and, if ragged, depths from `depth left` on come as zeros and are not read. They have arrived after wait_copies;
    pieces of two bytes, which no asynchronous copy takes, when this returns, and so do all if the copy is not
    asynchronous.
    """
    tile = copy.tile
    width = copy.access * copy.item_bytes
    narrow = copy.offset_bits == 32

    def next_source(builder, source, step):
        # One instruction where the compiler would take two to add 32 bits to 64.
        function = ir.FunctionType(_INT64, [step.type, _INT64])
        code = f"mad.{'wide.s32' if narrow else 'lo.s64'} $0, $1, {copy.item_bytes}, $2;"
        return builder.asm(function, code, "=l,r,l" if narrow else "=l,l,l", [step, source], side_effect=False)

    def body(builder, array, index, source, stride, outer_left, depth_left, thread):
        if width == 2:
            # So many pieces that no registers are left to keep where each belongs: it is computed for each tile.
            thread = _again(builder, thread)
        line, chunk = _first_chunk(builder, copy, thread)
        start = builder.add(array, index)
        step = builder.mul(stride, ir.Constant(_INT64, copy.lines_a_round))
        step = builder.trunc(step, _INT32) if narrow else step
        lines_left, elements_left = (outer_left, depth_left) if copy.along_depth else (depth_left, outer_left)
        check_lines, check_elements = (True, ragged) if copy.along_depth else (ragged, True)
        pieces = range(0, copy.elements, copy.access)
        first = builder.mul(chunk, _int32(copy.elements))
        whole = [builder.icmp_signed("<", builder.add(first, _int32(piece)), elements_left) for piece in pieces] \
            if check_elements else [ir.Constant(ir.IntType(1), 1)] * len(pieces)
        targets, loaded = {}, []
        for number in range(copy.rounds):
            down = number * copy.lines_a_round
            rest = down % tile.period
            if rest not in targets:
                targets[rest] = _chunk_place(builder, tile, start, builder.add(line, _int32(rest)), chunk)
            offset = (down - rest) * tile.chunks * CHUNK_BYTES
            there = builder.icmp_signed("<", builder.add(line, _int32(down)), lines_left) if check_lines else None
            if number:
                source = next_source(builder, source, step)
            for piece, inside in zip(pieces, whole, strict=True):
                inside = inside if there is None else builder.and_(there, inside)
                shift = piece * copy.item_bytes
                target = f"[$0 + {offset + shift}]"
                if copy.asynchronous and width > 2:
                    _copy_piece(builder, targets[rest], target, source, shift, width, inside)
                else:
                    loaded.append((targets[rest], target, _load_piece(builder, source, shift, width, inside)))
        # All of this operand's loads are on their way before the first store waits for one.
        for pointer, target, values in loaded:
            _store_piece(builder, pointer, target, values)

    return _expand(types.none, (types.int32, types.int32, types.int64, types.int64, *[types.int32] * 3), body)


def _chunk_place(builder, tile, start, line, chunk):
    """Where a chunk of a line lies."""
    flip = builder.urem(builder.udiv(line, _int32(tile.flip_every)), _int32(tile.flip_count))
    flipped = builder.xor(chunk, builder.mul(flip, _int32(tile.flip_unit)))
    number = builder.add(builder.mul(line, _int32(tile.chunks)), flipped)
    return builder.add(start, builder.mul(number, _int32(CHUNK_BYTES)))


def _copy_piece(builder, pointer, target, source, shift, width, wanted):
    size = builder.select(wanted, _int32(width), _int32(0))
    cached = "cg" if width == CHUNK_BYTES else "ca"
    function = ir.FunctionType(ir.VoidType(), [_INT32, _INT64, _INT32])
    builder.asm(function, f"cp.async.{cached}.shared.global {target}, [$1 + {shift}], {width}, $2;", "r,l,r",
                [pointer, source, size], side_effect=True)


def _load_piece(builder, source, shift, width, wanted):
    dtype, count = ("bfloat16", 1) if width == 2 else ("float32", width // 4)
    return _load_bytes(builder, source, dtype, count, wanted, further=shift)


def _store_piece(builder, pointer, target, values):
    letter = "h" if values[0].type == _INT16 else "f"
    form = {"h": "b16", "f": "f32"}[letter]
    vector = f".v{len(values)}" if len(values) > 1 else ""
    registers = ", ".join(f"${number}" for number in range(1, len(values) + 1))
    function = ir.FunctionType(ir.VoidType(), [_INT32, *(value.type for value in values)])
    builder.asm(function, f"st.shared{vector}.{form} {target}, {{{registers}}};" if vector else
                f"st.shared.{form} {target}, $1;", ",".join(["r", *[letter] * len(values)]), [pointer, *values],
                side_effect=True)


@cache
def commit_copies():
    """(): the thread's copies since the last commit are a group."""
    return _expand(types.none, (), lambda builder: _statement(builder, "cp.async.commit_group;"))


@cache
def wait_copies(groups):
    """(): all of the thread's groups but the newest `groups` have arrived."""
    return _expand(types.none, (), lambda builder: _statement(builder, f"cp.async.wait_group {groups};"))


def _statement(builder, code):
    builder.asm(ir.FunctionType(ir.VoidType(), []), code, "~{memory}", [], side_effect=True)


# -- fragments of a warp


@cache
def fragment_places(layout):
    """(first outer, lane) -> where the lane reads a FragmentLayout in a tile, in bytes, for load_fragments."""

    def body(builder, first, lane):
        tile = layout.tile
        eighth, row = builder.udiv(lane, _int32(8)), builder.urem(lane, _int32(8))
        low, high = builder.urem(eighth, _int32(2)), builder.udiv(eighth, _int32(2))
        block, half = (low, high) if layout.left else (high, low)
        nowhere = _int32(0)
        if layout.neighbours > 1:
            depth, chunk = builder.urem(lane, _int32(4)), builder.udiv(lane, _int32(4))
            chunk = builder.add(builder.udiv(first, _int32(layout.neighbours)), chunk)
            return _pack(builder, [_chunk_place(builder, tile, nowhere, depth, chunk)])
        if layout.item_bytes == 8:
            line, depth = builder.add(first, builder.udiv(lane, _int32(4))), builder.urem(lane, _int32(4))
            within = builder.mul(builder.urem(depth, _int32(2)), _int32(8))
            chunk = builder.udiv(depth, _int32(2))
            return _pack(builder, [builder.add(within, _chunk_place(builder, tile, nowhere, line, builder.add(
                chunk, _int32(2 * step)))) for step in (0, 1)])
        if layout.along_depth:
            line = builder.add(builder.add(first, builder.mul(block, _int32(8))), row)
            return _pack(builder, [_chunk_place(builder, tile, nowhere, line, builder.add(half, _int32(2 * step)))
                                   for step in (0, 1)])
        line = builder.add(builder.mul(half, _int32(8)), row)
        chunk = builder.add(builder.udiv(first, _int32(8)), block)
        return _pack(builder, [_chunk_place(builder, tile, nowhere, line, builder.add(chunk, _int32(pair)))
                               for pair in range(0, layout.blocks, 2)])

    return _expand(_places_type(layout), (types.int32, types.int32), body)


def _places_type(layout):
    return types.UniTuple(types.int32, 1 if layout.neighbours > 1 else 2 if layout.along_depth else layout.blocks // 2)


@cache
def load_fragments(layout, step):
    """(array, index, places) -> the registers of a FragmentLayout for a step of the tile at index.

    By ldmatrix, four registers at a time, transposed where the operand is not contiguous along the depth; wide
    elements, which ldmatrix cannot transpose, by vectors of 16 bytes whose elements are several blocks' registers, and
    float64 along the depth, which it cannot move as a whole, one by one.
    """
    item_bytes, line_bytes = layout.item_bytes, layout.tile.chunks * CHUNK_BYTES
    together = layout.neighbours if layout.neighbours > 1 else 2 if item_bytes == 8 else 4
    letter, register = ("d", ir.DoubleType()) if item_bytes == 8 else ("r", _INT32)
    constraints = ",".join([f"={letter}"] * together + ["r"])
    registers = ", ".join(f"${number}" for number in range(together))

    def access(number):
        """(code, which place, (block, half) of each register)"""
        if layout.neighbours > 1:
            group, half = divmod(number, layout.halves)
            offset = (STEP_BYTES // item_bytes * step + 4 * half) * line_bytes + group * 8 * CHUNK_BYTES
            return (f"ld.shared.v{together}.b{8 * item_bytes} {{{registers}}}, [${together} + {offset}];", 0,
                    [(group * together + block, half) for block in range(together)])
        held = layout.order[together * number:together * (number + 1)]
        if item_bytes == 8:
            return " ".join(f"ld.shared.b64 ${place}, [${together} + {block * 8 * line_bytes}];"
                            for place, (block, _) in enumerate(held)), step, held
        offset, place = (number * 16 * line_bytes, step) if layout.along_depth else (
            STEP_BYTES // 2 * step * line_bytes, number)
        transposed = "" if layout.along_depth else ".trans"
        return (f"ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 {{{registers}}}, [${together} + {offset}];",
                place, held)

    def body(builder, array, index, places):
        start, at = builder.add(array, index), _unpack(builder, places)
        found = {}
        for number in range(len(layout.order) // together):
            code, place, held = access(number)
            loaded = _together(builder, ir.LiteralStructType([register] * together), code, constraints,
                               [builder.add(start, at[place])])
            found |= {one: builder.extract_value(loaded, part) for part, one in enumerate(held)}
        return _pack(builder, [found[one] for one in layout.order])

    return _expand(_registers(len(layout.order), item_bytes), (types.int32, types.int32, _places_type(layout)), body)


@cache
def mma(kind, down, across):
    """(left, right, sums) -> sums plus the products of `down` times 16 rows and `across` times 8 columns, for one step.

    Sums are those of row block after row block, four a lane for each pair of blocks. "float16k8" is float16 in two
    instructions of 8 depths each, all that compute capability 7.5 has. Of "tf32" the operands are rounded to nearest
    first. "tf32x3" cuts each operand into two such terms; its sums are twice as many: the products of the first terms,
    then those of a first and a second one. "float64" is added by fused multiply-adds in ascending order of the depth;
    "float64m8" in two instructions of 8 rows each, all that compute capability 8.0 has.
    """
    halves = 2 if kind == "tf32x3" else 1
    count = 4 * down * across

    def body(builder, left, right, sums):
        lefts, rights, totals = (_unpack(builder, values) for values in (left, right, sums))
        if kind == "tf32":
            lefts, rights = ([_round_tf32(builder, value) for value in values] for values in (lefts, rights))
        if kind != "tf32x3":
            return _pack(builder, _products(builder, kind, lefts, rights, totals, down, across))
        (lefts, low_lefts), (rights, low_rights) = (
            zip(*(_split_tf32(builder, value) for value in values), strict=True) for values in (lefts, rights))
        main, corrections = totals[:count], totals[count:]
        main = _products(builder, kind, lefts, rights, main, down, across)
        corrections = _products(builder, kind, low_lefts, rights, corrections, down, across)
        corrections = _products(builder, kind, lefts, low_rights, corrections, down, across)
        return _pack(builder, main + corrections)

    lefts, rights = (one.stop for one in _MMA[kind][1][-1][:2])
    accumulator, item_bytes = ("float64", 8) if kind.startswith("float64") else ("float32", 4)
    fragment = _fragment_type(accumulator, halves * count)
    return _expand(fragment, (_registers(lefts * down, item_bytes), _registers(rights * across, item_bytes), fragment),
                   body)


#: two ones of half precision
_ONES = {"float16": 0x3C003C00, "float16k8": 0x3C003C00, "bfloat16": 0x3F803F80}


@cache
def add_depths(kind, layout):
    """(first, second, totals) -> totals plus the sums along the depth of a tile's two steps, as left operands.

    There is a sum for each outer index of a FragmentLayout. Half precision is multiplied by ones: totals are mma's
    four sums for each two blocks, of which the second and fourth repeat the others. float32 is added as it is, not as
    TF32, and float64: one total for each block and lane, of the depths that the lane holds, in ascending order.
    """
    half = kind in _ONES
    add = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _INT32])

    def body(builder, first, second, totals):
        sums = _unpack(builder, totals)
        for registers in (_unpack(builder, fragments) for fragments in (first, second)):
            if half:
                sums = _products(builder, kind, registers, [_int32(_ONES[kind])] * 2, sums, layout.blocks // 2, 1)
                continue
            for (block, _), register in zip(layout.order, registers, strict=True):
                sums[block] = builder.fadd(sums[block], register) if layout.item_bytes == 8 else builder.asm(
                    add, "add.f32 $0, $1, $2;", "=f,f,r", [sums[block], register], side_effect=False)
        return _pack(builder, sums)

    fragment = _fragment_type(layout.accumulator, layout.blocks * (1 + half))
    registers = _registers(len(layout.order), layout.item_bytes)
    return _expand(fragment, (registers, registers, fragment), body)


@cache
def store_depth_sums(kind, layout, dtype, access, wide, accumulate):
    """(address, index, step, left, alpha, lane, totals): stores alpha times the sums of the first `left` outer indices.

    They go to index, index + step, ... Each is computed in the type `wide`, if accumulate added to what is there, and
    rounded once to dtype; one by one, so access is 1.
    """
    half = kind in _ONES
    over_quarters = _in_order_over_quarters if layout.item_bytes == 8 else _over_quarters

    def body(builder, address, index, step, left, alpha, lane, totals):
        sums = _unpack(builder, totals)
        sums = sums[::2] if half else [over_quarters(builder, total) for total in sums]
        group = builder.udiv(lane, _int32(4))
        first = builder.icmp_unsigned("==", builder.urem(lane, _int32(4)), _int32(0))
        for block, total in enumerate(sums):
            outer = builder.add(builder.mul(group, _int32(layout.outer(0, 1))), _int32(layout.outer(block, 0)))
            with builder.if_then(builder.and_(first, builder.icmp_signed("<", outer, left))):
                place = builder.add(index, builder.mul(builder.sext(outer, _INT64), step))
                value = _times(builder, _widen(builder, total, layout.accumulator, wide), alpha)
                if accumulate:
                    before, = _load_global(builder, address, place, dtype, 1)
                    value = builder.fadd(value, _widen(builder, before, dtype, wide))
                _store_global(builder, address, place, dtype, _narrowed(builder, [value], wide, dtype))

    return _expand(types.none, (types.int64, types.int64, types.int64, types.int32, _NUMBA[wide], types.int32,
                                _fragment_type(layout.accumulator, layout.blocks * (1 + half))), body)


def _over_quarters(builder, value):
    """(0 + 1) + (2 + 3) of the four lanes that differ in lane % 4."""
    for distance in (1, 2):
        value = builder.fadd(value, _of_lane(builder, value, distance))
    return value


def _in_order_over_quarters(builder, value):
    """((0 + 1) + 2) + 3 of them, in the first one."""
    total = value
    for distance in (1, 2, 3):
        total = builder.fadd(total, _of_lane(builder, value, distance))
    return total


def _of_lane(builder, value, distance):
    """The value of the lane whose number differs in this bit."""
    if value.type == ir.DoubleType():
        halves = ".reg .b32 low, high;"
        moved = " ".join(f"shfl.sync.bfly.b32 {half}, {half}, {distance}, 31, -1;" for half in ("low", "high"))
        return _together(builder, value.type, f"{{ {halves} mov.b64 {{low, high}}, $1; {moved} mov.b64 $0, "
                         "{low, high}; }", "=d,d", [value])
    return _together(builder, ir.FloatType(), f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;", "=f,f", [value])


@cache
def of_lane(dtype, count, distance):
    """(fragment) -> that of the lane whose number differs in the bit `distance`; all lanes of the warp together."""
    fragment = _fragment_type(dtype, count)
    return _expand(fragment, (fragment,), lambda builder, values: _pack(
        builder, [_of_lane(builder, value, distance) for value in _unpack(builder, values)]))


def _products(builder, kind, left, right, sums, down, across):
    shape, pieces = _MMA[kind]
    double = kind.startswith("float64")
    letter, of_operands, register = ("d", "d", ir.DoubleType()) if double else ("f", "r", ir.FloatType())
    of_left, of_right, of_sums = (one.stop for one in pieces[0])
    lefts, rights = (one.stop for one in pieces[-1][:2])
    counts = of_sums, of_left, of_right, of_sums
    numbers = iter(range(sum(counts)))
    operands = ", ".join("{" + ", ".join(f"${next(numbers)}" for _ in range(count)) + "}" for count in counts)
    code = f"mma.sync.aligned.{shape} {operands};"
    constraints = ",".join([f"={letter}"] * of_sums + [of_operands] * (of_left + of_right) + [letter] * of_sums)
    result = ir.LiteralStructType([register] * of_sums)
    totals = []
    for i in range(down):
        for j in range(across):
            place = 4 * (i * across + j)
            total = sums[place:place + 4]
            rows, cols = left[lefts * i:lefts * (i + 1)], right[rights * j:rights * (j + 1)]
            for some_rows, some_cols, some in pieces:
                product = _together(builder, result, code, constraints,
                                    [*rows[some_rows], *cols[some_cols], *total[some]], side_effect=False)
                total[some] = [builder.extract_value(product, part) for part in range(of_sums)]
            totals += total
    return totals


def _split_tf32(builder, bits):
    """(first, second) tf32 term of a float32."""
    first = builder.and_(_round_tf32(builder, bits), ir.Constant(_INT32, 0xFFFFE000))
    rest = builder.fsub(builder.bitcast(bits, ir.FloatType()), builder.bitcast(first, ir.FloatType()))
    return first, _round_tf32(builder, builder.bitcast(rest, _INT32))


# -- results


def _paired(builder, odd, values):
    """Even lanes keep the first half and receive their neighbours' first half, odd lanes likewise the second."""
    first, second = values[:len(values) // 2], values[len(values) // 2:]
    received = [_of_lane(builder, builder.select(odd, a, b), 1) for a, b in zip(first, second, strict=True)]
    return [*(builder.select(odd, other, own) for other, own in zip(received, first, strict=True)),
            *(builder.select(odd, own, other) for other, own in zip(received, second, strict=True))]


@cache
def store_products(rows, cols, dtype, access, wide, accumulate):
    """(address, index, row stride, col stride, rows left, cols left, alpha, lane, sums): stores alpha times a warp's
    results.

    rows and cols are the FragmentLayouts of the operands. The warp's first result belongs at index; those beyond what
    is left are not stored. Each is computed in the type `wide`, if accumulate added to what is there, and rounded
    once. Up to access neighbours of a row are stored at a time, for which lanes swap results with the lanes beside
    them.
    """
    across, accumulator = cols.blocks, rows.accumulator
    to_odd, to_next, to_second = cols.steps(access)

    def body(builder, address, index, row_stride, col_stride, rows_left, cols_left, alpha, lane, sums):
        values = _unpack(builder, sums)
        group, quarter = builder.udiv(lane, _int32(4)), builder.urem(lane, _int32(4))
        odd, pair = builder.urem(quarter, _int32(2)), builder.udiv(quarter, _int32(2))
        lane_col = builder.add(builder.mul(odd, _int32(to_odd)), builder.mul(pair, _int32(to_next)))
        for block in range(rows.blocks):
            row = builder.add(builder.mul(group, _int32(rows.outer(0, 1))), _int32(rows.outer(block, 0)))
            row_inside = builder.icmp_signed("<", row, rows_left)
            start = builder.add(index, builder.mul(builder.sext(row, _INT64), row_stride))
            pieces = []
            for first, run in cols.runs(access):
                held = [values[4 * (block // 2 * across + j) + 2 * (block % 2) + parity] for j, parity in run]
                held = _paired(builder, builder.trunc(odd, ir.IntType(1)), held) if cols.paired(access) else held
                width, half = min(access, len(run)), len(run) // 2
                for position in range(0, len(run), width):
                    after = position // half * to_second + position % half
                    col = builder.add(lane_col, _int32(first + after))
                    inside = builder.and_(row_inside, builder.icmp_signed("<", col, cols_left))
                    place = builder.add(start, builder.mul(builder.sext(col, _INT64), col_stride))
                    part = [_times(builder, _widen(builder, value, accumulator, wide), alpha)
                            for value in held[position:position + width]]
                    old = _load_global(builder, address, place, dtype, width, inside) if accumulate else None
                    pieces.append((inside, place, part, old))
            for inside, place, part, old in pieces:
                with builder.if_then(inside):
                    if old is not None:
                        part = [builder.fadd(value, _widen(builder, before, dtype, wide))
                                for value, before in zip(part, old, strict=True)]
                    _store_global(builder, address, place, dtype, _narrowed(builder, part, wide, dtype))

    alpha_type = types.float64 if wide == "float64" else types.float32
    return _expand(types.none, (types.int64, types.int64, types.int64, types.int64, types.int32, types.int32,
                                alpha_type, types.int32, _fragment_type(accumulator, 2 * rows.blocks * across)), body)
