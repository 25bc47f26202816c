"""Hopper's tensor cores as inline PTX: products of warpgroups, copies of boxes, and barriers that count their bytes.

Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions" with its matrix descriptors and
pictures of fragments, "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor", "mbarrier", "setmaxnreg".
"""
from llvmlite import ir
from numba import types

from .factories import cache
from .layout import LINE_BYTES, MAP_BYTES, PIECE_BYTES, SWIZZLE_BYTES, sum_pieces
from .ptx import _INT32, _INT64, _SHARED, _expand, _fragment_type, _pack, _split, _unpack, _widened
from .warp_ptx import _dynamic_shared, _int32, _together

_FLOAT, _INDEX = ir.FloatType(), types.int32
#: what a descriptor says of a tile's layout: the swizzle of 128 bytes, and how far eight lines lie from the next eight
_SWIZZLED = 1 << 62 | 8 * LINE_BYTES // 16 << 32


def _code(text, constraints="~{memory}", parameters=()):
    """An intrinsic that is one piece of PTX without a result."""

    def body(builder, *values):
        _together(builder, ir.VoidType(), text, constraints, list(values))

    return _expand(types.none, parameters, body)


@cache
def shared_tiles(size):
    """() -> the block's dynamic shared memory from a multiple of 1,024 bytes on, which its launch leaves room for."""

    def body(builder):
        start = builder.add(_dynamic_shared(builder), _int32(SWIZZLE_BYTES - 1))
        return builder.and_(start, _int32(-SWIZZLE_BYTES))

    return _expand(types.int32, (), body)


@cache
def quotient():
    """(a, b) -> a // b of numbers from 0 on, by 32 bits: the division of 64 bits is a call, which spills sums."""
    return _expand(types.int32, (types.int32, types.int32), lambda builder, a, b: builder.udiv(a, b))


@cache
def more_registers(count):
    """(): every thread of the warpgroup has this many registers from here on, once others have given theirs up."""
    return _code(f"setmaxnreg.inc.sync.aligned.u32 {count};")


@cache
def fewer_registers(count):
    """(): every thread of the warpgroup has this many registers from here on."""
    return _code(f"setmaxnreg.dec.sync.aligned.u32 {count};")


@cache
def meet(threads):
    """(number): this many threads wait for each other at the block's barrier of this number, from 1 on."""
    return _code(f"bar.sync $0, {threads};", "r,~{memory}", (_INDEX,))


@cache
def meet_warp():
    """(): the lanes of this warp wait for each other."""
    return _code("bar.warp.sync 0xffffffff;")


# -- barriers in shared memory. A phase ends when all have arrived and all bytes that it expects have.


def _barrier(text, constraints, parameters=()):
    """(array, index, ...), of which the text names the address of the barrier as $0."""

    def body(builder, array, index, *values):
        _together(builder, ir.VoidType(), text, "r," + constraints, [builder.add(array, index), *values])

    return _expand(types.none, (_INDEX, _INDEX, *parameters), body)


@cache
def start_barrier(arrivals):
    """(array, index): a barrier of 8 bytes there, every phase of which ends after so many arrivals."""
    return _barrier(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", "~{memory}")


@cache
def barriers_started():
    """(): copies may count on the barriers that this thread has started."""
    return _code("fence.mbarrier_init.release.cluster;")


@cache
def expect_bytes(count):
    """(array, index): arrives at the barrier, whose phase ends no sooner than so many bytes more have arrived."""
    return _barrier(f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {count};", "~{memory}")


@cache
def arrive():
    """(array, index): arrives at the barrier."""
    return _barrier("mbarrier.arrive.shared::cta.b64 _, [$0];", "~{memory}")


@cache
def passed():
    """(array, index, parity) -> whether the barrier's phase of this parity has ended; waits a while for that."""

    def body(builder, array, index, parity):
        code = ("{ .reg .pred ended; mbarrier.try_wait.parity.shared::cta.b64 ended, [$1], $2; "
                "selp.u32 $0, 1, 0, ended; }")
        function = ir.FunctionType(_INT32, [_INT32, _INT32])
        ended = builder.asm(function, code, "=r,r,r,~{memory}", [builder.add(array, index), parity], side_effect=True)
        return builder.icmp_unsigned("!=", ended, _int32(0))

    return _expand(types.boolean, (_INDEX, _INDEX, _INDEX), body)


# -- tensor maps and copies of boxes


@cache
def write_map():
    """(maps, number, map): a tensor map among those at the address, for copies of every thread after maps_written."""

    def body(builder, maps, number, words):
        at = _map_address(builder, maps, number)
        for position, word in enumerate(_unpack(builder, words)):
            place = builder.inttoptr(builder.add(at, ir.Constant(_INT64, 8 * position)), ir.PointerType(_INT64, 1))
            builder.store(word, place, align=8)

    return _expand(types.none, (types.int64, types.int64, types.UniTuple(types.int64, MAP_BYTES // 8)), body)


def _map_address(builder, maps, number):
    return builder.add(maps, builder.mul(number, ir.Constant(_INT64, MAP_BYTES)))


@cache
def maps_written():
    """(): what this thread wrote of maps may be read by threads that meet it and ask map_at."""
    return _code("fence.proxy.tensormap::generic.release.gpu;")


@cache
def map_at():
    """(maps, number) -> a map that was written, for the copies of this thread."""

    def body(builder, maps, number):
        at = _map_address(builder, maps, number)
        _together(builder, ir.VoidType(), f"fence.proxy.tensormap::generic.acquire.gpu [$0], {MAP_BYTES};",
                  "l,~{memory}", [at])
        return at

    return _expand(types.int64, (types.int64, types.int64), body)


@cache
def copy_box():
    """(map, across, down, array, index, barrier): the box whose first element has these coordinates comes to the index.

    What lies beyond the matrix comes as zeros. Of "tfloat32" each number is rounded to the nearest tf32. The bytes
    arrive at the barrier, which is another index.
    """
    code = ("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [$3], [$0, {$1, $2}], "
            "[$4];")

    def body(builder, there, across, down, array, index, barrier):
        _together(builder, ir.VoidType(), code, "l,r,r,r,r,~{memory}",
                  [there, across, down, builder.add(array, index), builder.add(array, barrier)])

    return _expand(types.none, (types.int64, *[_INDEX] * 5), body)


@cache
def store_box(adds):
    """(map, across, down, part, array, index): what lies at the index becomes the box there, or is added to it.

    Nothing is stored beyond the matrix.
    """
    name = "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add" if adds else (
        "cp.async.bulk.tensor.3d.global.shared::cta")

    def body(builder, there, across, down, part, array, index):
        _together(builder, ir.VoidType(), name + ".tile.bulk_group [$0, {$1, $2, $3}], [$4];", "l,r,r,r,r,~{memory}",
                  [there, across, down, part, builder.add(array, index)])

    return _expand(types.none, (types.int64, *[_INDEX] * 5), body)


@cache
def commit_stores():
    """(): the boxes that this thread has stored since the last commit are a group."""
    return _code("cp.async.bulk.commit_group;")


@cache
def stores_read():
    """(): of all of this thread's groups shared memory has been read, and may be written anew."""
    return _code("cp.async.bulk.wait_group.read 0;")


@cache
def stores_done():
    """(): all of this thread's groups have been stored."""
    return _code("cp.async.bulk.wait_group 0;")


@cache
def show_to_copies():
    """(): what this thread has stored to shared memory is what copies of boxes read from here on."""
    return _code("fence.proxy.async.shared::cta;")


# -- products of a warpgroup


@cache
def multiply_tiles(kind, cols, left_across, right_across):
    """(array, left index, right index, sums) -> sums plus the product of two tiles, a line deep, once products_done.

    The left tile has 64 rows, the right one `cols` columns. Each lies as boxes of 64 lines of 128 bytes, swizzled: a
    line is a depth where the operand is contiguous across it, else a row or column. Of "tf32" it is never a depth, and
    the last 13 bits of a number count as zeros.
    """
    count, (depth, short) = cols // 2, {"float16": (16, "f16"), "bfloat16": (16, "bf16"), "tf32": (8, "tf32")}[kind]
    orders = "" if kind == "tf32" else f", {int(left_across)}, {int(right_across)}"
    fragment, wide = _fragment_type("float32", count), ir.IntType(64)
    names = ", ".join(f"${number}" for number in range(count))
    code = (f"wgmma.mma_async.sync.aligned.m64n{cols}k{depth}.f32.{short}.{short} {{{names}}}, ${2 * count}, "
            f"${2 * count + 1}, 1, 1, 1{orders};")
    constraints = ",".join(["=f"] * count + [str(number) for number in range(count)] + ["l", "l"])
    function = ir.FunctionType(ir.LiteralStructType([_FLOAT] * count), [_FLOAT] * count + [wide] * 2)

    def descriptor(builder, array, index, across):
        # Only 14 bits of the address have room; where lines are depths, 64 values lie from the next 64 a piece.
        form = _SWIZZLED | (PIECE_BYTES // 16 << 16 if across else 1 << 16)
        sixteens = builder.and_(builder.lshr(builder.add(array, index), _int32(4)), _int32(0x3FFF))
        return builder.or_(builder.zext(sixteens, wide), ir.Constant(wide, form))

    def body(builder, array, left_index, right_index, sums):
        left = descriptor(builder, array, left_index, left_across)
        right = descriptor(builder, array, right_index, right_across)
        _together(builder, ir.VoidType(), "wgmma.fence.sync.aligned;", "~{memory}", [])
        values = _unpack(builder, sums)
        for step in range(4):
            ends = [builder.add(one, ir.Constant(wide, step * (16 * LINE_BYTES if across else 32) // 16))
                    for one, across in ((left, left_across), (right, right_across))]
            called = builder.asm(function, code, constraints, [*values, *ends], side_effect=True)
            called.attributes.add("convergent")
            values = [builder.extract_value(called, number) for number in range(count)]
        _together(builder, ir.VoidType(), "wgmma.commit_group.sync.aligned;", "~{memory}", [])
        return _pack(builder, values)

    return _expand(fragment, (_INDEX, _INDEX, _INDEX, fragment), body)


@cache
def products_before_done(groups):
    """(): all products but those of the last calls of multiply_tiles, so many, have been added, and their tiles may be
    overwritten.
    """
    return _code(f"wgmma.wait_group.sync.aligned {groups};")


@cache
def products_done(count):
    """(sums) -> sums that hold all products."""
    fragment = _fragment_type("float32", count)
    function = ir.FunctionType(ir.LiteralStructType([_FLOAT] * count), [_FLOAT] * count)
    constraints = ",".join(["=f"] * count + [str(number) for number in range(count)] + ["~{memory}"])

    def body(builder, sums):
        # The sums are named, so that no instruction that reads them comes before.
        called = builder.asm(function, "wgmma.wait_group.sync.aligned 0;", constraints, _unpack(builder, sums),
                             side_effect=True)
        called.attributes.add("convergent")
        return _pack(builder, [builder.extract_value(called, number) for number in range(count)])

    return _expand(fragment, (fragment,), body)


@cache
def stage_sums(dtype, cols, first, pieces):
    """(array, index, thread, sums): a warpgroup's 64 x cols sums, rounded to dtype, as boxes of 64 lines, swizzled.

    A box, or piece, has 128 bytes of columns; `pieces` of them are stored, from piece `first` on. thread counts within
    the warpgroup.
    """
    half = dtype != "float32"
    short = {"float16": "f16x2", "bfloat16": "bf16x2"}.get(dtype)

    def number(value):
        return ir.Constant(_INT32, value)

    def store_pair(builder, at, low, high):
        pair = ir.Constant(ir.VectorType(_FLOAT, 2), ir.Undefined)
        for position, value in enumerate((low, high)):
            pair = builder.insert_element(pair, value, number(position))
        builder.store(pair, builder.inttoptr(at, ir.PointerType(pair.type, _SHARED)), align=8)

    def store_matrices(builder, at, values):
        packed = [builder.asm(ir.FunctionType(_INT32, [_FLOAT] * 2), f"cvt.rn.{short}.f32 $0, $2, $1;", "=r,f,f",
                              pair, side_effect=False) for pair in zip(values[::2], values[1::2], strict=True)]
        _together(builder, ir.VoidType(), "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};",
                  "r,r,r,r,r,~{memory}", [at, *packed])

    def body(builder, array, index, thread, sums):
        values = _unpack(builder, sums)
        lane, warp = builder.urem(thread, number(32)), builder.udiv(thread, number(32))
        if half:  # a lane names a line of one of four matrices
            line, chunk, further = builder.urem(lane, number(16)), builder.udiv(lane, number(16)), number(0)
        else:
            quarter = builder.urem(lane, number(4))
            line, chunk = builder.udiv(lane, number(4)), builder.udiv(quarter, number(2))
            further = builder.mul(builder.urem(quarter, number(2)), number(8))
        flipped = builder.xor(chunk, builder.urem(line, number(8)))
        line = builder.add(line, builder.mul(warp, number(16)))
        place = builder.add(builder.add(array, index), builder.mul(line, number(LINE_BYTES)))
        place = builder.add(place, builder.add(builder.mul(flipped, number(16)), further))
        for piece, step, begin in sum_pieces(dtype, first, pieces):
            at = builder.add(builder.xor(place, number(32 * step)), number(piece * PIECE_BYTES))
            if half:
                store_matrices(builder, at, values[begin:begin + 8])
            else:
                store_pair(builder, at, *values[begin:begin + 2])
                store_pair(builder, builder.add(at, number(8 * LINE_BYTES)), *values[begin + 2:begin + 4])

    return _expand(types.none, (_INDEX, _INDEX, _INDEX, _fragment_type("float32", cols // 2)), body)


@cache
def add_lines(dtype):
    """(array, index, chunk, totals) -> the eight totals plus those numbers of eight lines, from the index on, in order.

    A chunk is eight numbers of a line, where the swizzle has put them; the index is a multiple of 1 KiB.
    """
    totals_type = _fragment_type("float32", 8)

    def body(builder, array, index, chunk, totals):
        values, start = _unpack(builder, totals), builder.add(array, index)
        for line in range(8):
            place = builder.add(start, builder.mul(builder.xor(chunk, _int32(line)), _int32(16)))
            place = builder.add(place, _int32(line * LINE_BYTES))
            four = builder.load(builder.inttoptr(place, ir.PointerType(ir.VectorType(_INT32, 4), _SHARED)), align=16)
            words = [builder.extract_element(four, _int32(word)) for word in range(4)]
            numbers = _widened(builder, _split(builder, words, dtype, 8), dtype, "float32")
            values = [builder.fadd(total, number) for total, number in zip(values, numbers, strict=True)]
        return _pack(builder, values)

    return _expand(totals_type, (_INDEX, _INDEX, _INDEX, totals_type), body)
