"""Every primitive against one table of plain NumPy, in every lane: so that its two twins do the same."""
import numpy as np
import pytest
from numba import cuda

from densegrad import device
from densegrad.device import dtype_of
from densegrad.kernels import primitives
from densegrad.kernels.primitives.layout import ITEM_BYTES, Line, ThreadTile, lanes_of, tile_copy, tile_share
from densegrad.testing import bits, host, integers, launch_kernel, normal

DTYPES = ("float16", "bfloat16", "float32", "float64")
WIDE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


def run(kernel, *arguments, threads=1):
    """Launch one block; arrays are passed as addresses."""
    launch_kernel(kernel, (1, 1), threads, arguments)


def same(found, wanted):
    """Equal bits, save which NaN it is."""
    found = host(found)
    assert found.dtype == wanted.dtype
    different = (bits(found) != bits(wanted)) & ~(np.isnan(found) & np.isnan(wanted))
    assert not different.any(), f"{np.flatnonzero(different)}: {found[different]} instead of {wanted[different]}"


#: name -> (primitive of float32 fragments, sizes of its fragments and of its result, the same in NumPy)
FRAGMENTS = {
    "zeros": (lambda: primitives.zeros("float32", 5), (), 5, lambda: np.zeros(5, np.float32)),
    "add": (lambda: primitives.add("float32", 5), (5, 5), 5, lambda a, b: a + b),
    "plus": (lambda: primitives.plus("float32", 5, False), (5, 5), 5, lambda a, b: a + b),
    "plus, compensated": (lambda: primitives.plus("float32", 4, True), (8, 4), 8,
                          lambda a, b: np.concatenate([a[:4] + b, a[4:] + two_sum_error(a[:4], b)])),
    "add each": (lambda: primitives.add_each("float32", 5, False), (1, 5), 1,
                 lambda a, b: np.cumsum(np.concatenate([a, b]), dtype=np.float32)[-1:]),
    "add each, compensated": (lambda: primitives.add_each("float32", 2, True), (2, 2), 2, lambda a, b: np.array([
        (a[0] + b[0]) + b[1], (a[1] + two_sum_error(a[0], b[0])) + two_sum_error(a[0] + b[0], b[1])], np.float32)),
    "tidy": (lambda: primitives.tidy("float32", 4, False), (4,), 4, lambda a: a),
    "tidy, compensated": (lambda: primitives.tidy("float32", 4, True), (8,), 8,
                          lambda a: np.concatenate([a[:4], np.where(np.isfinite(a[4:]), a[4:], np.float32(0))])),
    "settle": (lambda: primitives.settle("float32", 4, False), (4,), 4, lambda a: a),
    "settle, compensated": (lambda: primitives.settle("float32", 4, True), (8,), 4, lambda a: a[:4] + a[4:]),
    "add now": (lambda: primitives.add_now("float32", 5), (5, 5), 5, lambda a, b: a + b),
    "add each now": (lambda: primitives.add_each_now("float32", 5), (1, 5), 1,
                     lambda a, b: np.cumsum(np.concatenate([a, b]), dtype=np.float32)[-1:]),
    "larger": (lambda: primitives.largest("float32"), (1, 1), 1, np.fmax),
    "join": (lambda: primitives.join("float32", (2, 3)), (2, 3), 5, lambda a, b: np.concatenate([a, b])),
    "minus": (lambda: primitives.minus("float32", 4, 1), (4, 1), 4, lambda a, b: a - b),
    "weigh, all": (lambda: primitives.weigh("float32", 4, 1), (4, 1), 4, lambda a, b: a * b),
    "weigh, each": (lambda: primitives.weigh("float32", 4, 4), (4, 4), 4, lambda a, b: a * b),
    "rounded": (lambda: primitives.rounded("float16", "float32", 4), (4,), 4,
                lambda a: a.astype("float16").astype("float32")),
    "round tf32": (lambda: primitives.round_tf32(5), (5,), 5, lambda a: nearest_tf32(a)),
    "head": (lambda: primitives.head("float32", 6, 2), (6,), 2, lambda a: a[:2]),
    "rotate": (lambda: primitives.rotate("float32", 6, 2), (6,), 6, lambda a: np.roll(a, -2)),
}


def nearest_tf32(a):
    """To 11 significant bits, ties away from zero."""
    mantissa, exponent = np.frexp(a.astype(np.float64))
    return np.ldexp(np.copysign(np.floor(np.abs(mantissa) * 2 ** 11 + 0.5), a), exponent - 11).astype(np.float32)


def two_sum_error(a, b):
    """What rounding a + b loses, by Knuth's branch-free method where the sum is finite."""
    total = a + b
    back = total - a
    return (a - (total - back)) + (b - back)


def kernel_of(operation, counts, result_count):
    loads = [primitives.load_each("float32", count, "float32") for count in counts]
    store = primitives.store_each("float32", result_count, "float32")
    if not counts:
        @primitives.jit(1)
        def kernel(out):
            store(out, 0, 1, result_count, operation())
    elif len(counts) == 1:
        load_a, count_a = loads[0], counts[0]

        @primitives.jit(1)
        def kernel(a, out):
            store(out, 0, 1, result_count, operation(load_a(a, 0, 1, count_a)))
    else:
        (load_a, load_b), (count_a, count_b) = loads, counts

        @primitives.jit(1)
        def kernel(a, b, out):
            store(out, 0, 1, result_count, operation(load_a(a, 0, 1, count_a), load_b(b, 0, 1, count_b)))
    return kernel


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragments(xp, name):
    make, counts, result_count, meaning = FRAGMENTS[name]
    kernel = kernel_of(make(), counts, result_count)
    for seed in range(3):
        values = [normal((count,), "float32", seed + 10 * n) * np.float32(10) ** n for n, count in enumerate(counts)]
        if "tidy" in name:
            values[0][-2:] = np.inf, np.nan
        out = xp.asarray(np.full(result_count, np.nan, np.float32))
        run(kernel, *(xp.asarray(array) for array in values), out)
        same(out, meaning(*values))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scale_and_convert(xp, dtype):
    load, convert = primitives.load_vector("float32", 4, "float32"), primitives.convert("float32", dtype, 4)
    scale, store = primitives.scale(dtype, 4), primitives.store_each(dtype, 4, dtype)

    @primitives.jit(1)
    def kernel(a, factor, out):
        store(out, 0, 1, 4, scale(convert(load(a, 0)), factor))

    values, out = normal((4,), "float32"), xp.zeros(4, dtype)
    run(kernel, xp.asarray(values), np.dtype(dtype).type(1 / 3), out)
    same(out, values.astype(dtype) * np.dtype(dtype).type(1 / 3))


def special(dtype):
    """Halfway cases between neighbours of dtype, over- and underflow, zeros of both signs, infinities and NaN."""
    wide = WIDE[dtype]
    draw = np.random.default_rng(5).integers(0, 2 ** 16, 40).astype(np.uint16)
    near = draw.view(device.dtype_of("bfloat16")) if dtype == "bfloat16" else draw.view(np.float16)
    near = near[np.isfinite(near)].astype(wide)[:24]
    kind = device.dtype_of(dtype)
    with np.errstate(all="ignore"):
        neighbour = np.nextafter(near.astype(kind), np.array(np.inf, kind)).astype(wide)
        halfway = (near + neighbour) / np.array(2, wide)
        edges = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.9, 65520, -65520, 3.4e38, 1e-45, 6e-8,
                          2.9e-8], wide)
        values = np.concatenate([near, halfway, edges, normal((16,), wide)])
    return values[:len(values) // 8 * 8]


@pytest.mark.parametrize(("dtype", "count"), [
    ("float16", 1), ("float16", 2), ("float16", 4), ("float16", 8), ("bfloat16", 1), ("bfloat16", 4), ("bfloat16", 8),
    ("float32", 1), ("float32", 4), ("float64", 1), ("float64", 2)])
def test_vectors_are_widened_exactly_and_rounded_once(xp, dtype, count):
    wide = WIDE[dtype]
    gather, store = primitives.load_each(wide, count, wide), primitives.store_vector(dtype, count, wide)
    widen, keep = primitives.load_vector(dtype, count, wide), primitives.store_each(wide, count, wide)

    @primitives.jit(1)
    def kernel(values, total, narrow, back):
        for index in range(0, total, count):
            store(narrow, index, gather(values, index, 1, count))
            keep(back, index, 1, count, widen(narrow, index))

    values = special(dtype)
    narrow, back = xp.zeros(len(values), device.dtype_of(dtype)), xp.zeros(len(values), wide)
    run(kernel, xp.asarray(values), len(values), narrow, back)
    with np.errstate(all="ignore"):
        rounded = values.astype(device.dtype_of(dtype))
    same(narrow, rounded)
    same(back, rounded.astype(wide))


def test_float64_results_and_float32_results_of_float64(xp):
    for dtype, wide in (("float64", "float32"), ("float32", "float64")):
        load, store = primitives.load_vector(wide, 2, wide), primitives.store_vector(dtype, 2, wide)
        if dtype == "float64":
            widen, store = primitives.convert(wide, dtype, 2), primitives.store_vector(dtype, 2, dtype)

            @primitives.jit(1)
            def kernel(values, out):
                store(out, 0, widen(load(values, 0)))
        else:
            @primitives.jit(1)
            def kernel(values, out):
                store(out, 0, load(values, 0))

        values, out = normal((2,), wide), xp.zeros(2, dtype)
        run(kernel, xp.asarray(values), out)
        same(out, values.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_predicated_loads_and_stores(xp, dtype):
    wide = WIDE[dtype]
    load_each, store_each = primitives.load_each(dtype, 5, wide), primitives.store_each(dtype, 5, wide)

    @primitives.jit(1)
    def kernel(values, each):
        for left in range(6):
            store_each(each, 32 * left, 3, left, load_each(values, 1, 2, left))
            store_each(each, 32 * left + 1, 3, 5, load_each(values, 1, 2, left))

    values = integers((12,), dtype, 3) + device.dtype_of(dtype).type(4)
    each = xp.asarray(np.full((6, 32), -1, device.dtype_of(dtype)))
    run(kernel, xp.asarray(values), each)
    wanted = np.full((6, 32), -1, values.dtype)
    for left in range(6):
        taken = values[1:1 + 2 * left:2]
        wanted[left, 0:3 * left:3] = taken
        wanted[left, 1:16:3] = np.concatenate([taken, np.zeros(5 - left, values.dtype)])
    same(each, wanted)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(("dtype", "count", "across"), [
    ("float32", 4, 2), ("float16", 8, 1), ("bfloat16", 8, 1), ("float64", 2, 2)])
def test_rows_of_vectors_are_added_in_order(xp, dtype, count, across, compensated):
    """Whole vectors, and vectors of which only what lies inside may be touched."""
    wide, rows, spacing, step, advance = WIDE[dtype], 3, 16, 48, 5
    width = across * count
    total = width * (1 + compensated)
    load, store = primitives.load_each(wide, total, wide), primitives.store_each(wide, total, wide)
    add_vectors = primitives.add_vectors(dtype, count, wide, rows, across, spacing, compensated)
    add_inside = primitives.add_inside(dtype, count, wide, rows, across, spacing, compensated, advance)

    @primitives.jit(1)
    def whole(sums, values, out):
        store(out, 0, 1, total, add_vectors(load(sums, 0, 1, total), values, 16, step))

    @primitives.jit(1)
    def partly(sums, values, left, position, end, out):
        store(out, 0, 1, total, add_inside(load(sums, 0, 1, total), values, 16, step, left, position, end))

    sums, values = normal((total,), wide, 1), normal((16 + rows * step,), dtype, 2)
    values = (values * 10).astype(device.dtype_of(dtype))

    def meaning(wanted):
        totals = sums
        for row in range(rows):
            places = [16 + row * step + vector * spacing + n for vector in range(across) for n in range(count)]
            added = np.where(wanted[row], values[places].astype(wide), 0).astype(wide)
            if compensated:
                lost = two_sum_error(totals[:width], added)
                totals = np.concatenate([totals[:width] + added, totals[width:] + lost])
            else:
                totals = totals + added
        return totals

    out = xp.zeros(total, wide)
    run(whole, xp.asarray(sums), xp.asarray(values), out)
    same(out, meaning(np.ones((rows, width), bool)))
    offsets = np.array([vector * spacing + n for vector in range(across) for n in range(count)])
    for left, position, end in ((3, 0, 100), (2, 0, 100), (0, 0, 100), (3, -1, 100), (3, -3, 7), (3, 2, 9), (3, 0, 17),
                                (3, 1, 0)):
        stands = offsets + position + advance * np.arange(rows)[:, None]
        wanted = (stands >= 0) & (stands < end) & (np.arange(rows)[:, None] < left)
        run(partly, xp.asarray(sums), xp.asarray(values), left, position, end, out)
        same(out, meaning(wanted))


@pytest.mark.parametrize(("dtype", "count", "across"), [
    ("float32", 4, 2), ("float32", 8, 1), ("float64", 2, 1), ("float64", 4, 2)])
def test_shared_memory(xp, dtype, count, across):
    threads, width = 8, across * count
    spacing = threads * count
    array = primitives.shared_array("sums", dtype, across * spacing)
    other = primitives.shared_array("other", dtype, threads)
    load, spread = primitives.load_each(dtype, width, dtype), primitives.store_spread(dtype, count, across, spacing)
    put, one = primitives.store_shared(dtype, 1), primitives.load_each(dtype, 1, dtype)
    get, get_pair = primitives.load_shared(dtype, 1), primitives.load_shared(dtype, 2)
    keep, keep_pair = primitives.store_vector(dtype, 1, dtype), primitives.store_vector(dtype, 2, dtype)

    @primitives.jit(threads)
    def kernel(values, singles, out, pairs, turned):
        thread = cuda.threadIdx.x
        shared, second = array(), other()
        spread(shared, thread * count, load(values, thread * width, 1, width), thread)
        put(second, thread, one(singles, thread, 1, 1))
        cuda.syncthreads()
        for index in range(thread, across * spacing, threads):
            keep(out, index, get(shared, index))
        for index in range(2 * thread, across * spacing, 2 * threads):
            keep_pair(pairs, index, get_pair(shared, index))
        keep(turned, thread, get(second, threads - 1 - thread))

    values, singles = normal((threads, across, count), dtype, 1), normal((threads,), dtype, 2)
    out, pairs, turned = xp.zeros(across * spacing, dtype), xp.zeros(across * spacing, dtype), xp.zeros(threads, dtype)
    run(kernel, xp.asarray(values), xp.asarray(singles), out, pairs, turned, threads=threads)
    wanted = values.swapaxes(0, 1).reshape(-1)
    same(out, wanted)
    same(pairs, wanted)
    same(turned, singles[::-1])


#: (dtype, outer_size, depth_size, access, along_depth, threads, thread_outer, offset_bits)
TILES = [
    ("float32", 8, 4, 4, False, 4, 4, 32), ("float32", 8, 4, 4, True, 4, 4, 32), ("float32", 8, 4, 1, True, 4, 4, 64),
    ("float32", 16, 8, 2, False, 32, 8, 64), ("float32", 64, 8, 1, True, 32, 8, 32),
    ("float32", 64, 8, 4, True, 32, 8, 32), ("float16", 64, 8, 4, True, 32, 8, 32),
    ("bfloat16", 8, 4, 4, False, 4, 4, 32), ("float64", 32, 4, 2, True, 16, 4, 32),
    ("float64", 8, 4, 2, False, 32, 4, 64), ("float32", 64, 8, 1, False, 32, 8, 32),
    ("float32", 32, 16, 2, False, 32, 4, 32), ("float16", 32, 16, 1, False, 64, 4, 32),
    ("float64", 16, 8, 1, False, 16, 4, 64), ("float32", 128, 16, 4, True, 64, 16, 32),
    ("float16", 64, 16, 4, True, 32, 8, 32), ("float32", 64, 16, 2, True, 64, 8, 64),
]


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "-".join(map(str, tile)))
@pytest.mark.parametrize("shift", [0, 3])
def test_tiles_come_into_shared_memory(xp, tile, shift):
    """Element (outer, depth) comes to its place in the layout, and zeros where the operand has ended.

    shift accesses lie before the first element, so that rows begin anywhere in a sector.
    """
    dtype, outer_size, depth_size, access, along_depth, threads, thread_outer, offset_bits = tile
    wide = WIDE[dtype]
    size = outer_size * depth_size
    copy = tile_copy(dtype, wide, outer_size, depth_size, access, along_depth, threads, thread_outer, offset_bits,
                     start=size)
    array = primitives.shared_array("tile", wide, 3 * size)
    turn_of, offset_of, place_of = primitives.tile_turn(copy), primitives.tile_offset(copy), primitives.place(dtype)
    deeper, stage = primitives.deeper(copy), size * np.dtype(wide).itemsize
    load, load_whole, store = primitives.load_tile(copy), primitives.load_whole_tile(copy), primitives.store_tile(copy)
    get, keep, typed = primitives.load_shared(wide, 1), primitives.store_vector(wide, 1, wide), np.int32

    @primitives.jit(threads)
    def kernel(values, first, stride, outer_left, depth_left, out):
        thread = cuda.threadIdx.x
        shared = array()
        turn = turn_of(values, first, 0, stride, thread)
        offset = offset_of(stride, turn, thread)
        place = deeper(place_of(values, first - 2 * (1 if along_depth else stride)), typed(2), stride)
        whole = load_whole(place, offset, stride, turn, thread)
        cut = load(place, offset, stride, turn, typed(outer_left), typed(depth_left), thread)
        store(shared, typed(stage), whole, stride, turn, thread)
        store(shared, 0, cut, stride, turn, thread)
        cuda.syncthreads()
        for index in range(thread, 2 * size, threads):
            keep(out, index, get(shared, size + index))

    near, far = (depth_size, outer_size) if along_depth else (outer_size, depth_size)
    stride, first = near + 3 * access, shift * access
    values = normal((far, stride), dtype, 4)
    memory = xp.asarray(np.concatenate([np.full(first, np.nan, values.dtype), values.reshape(-1)]))
    matrix = values[:, :near].astype(wide)
    matrix = matrix if along_depth else matrix.T
    for outer_left, depth_left in ((outer_size, depth_size), (outer_size - access, depth_size - access),
                                   (access, access)):
        out = xp.zeros(2 * size, wide)
        run(kernel, memory, first, stride, outer_left, depth_left, out, threads=threads)
        cut = np.zeros_like(matrix)
        cut[:outer_left, :depth_left] = matrix[:outer_left, :depth_left]
        wanted = np.zeros(2 * size, wide)
        for outer in range(outer_size):
            for depth in range(depth_size):
                place = copy.layout.place(outer, depth) - size
                wanted[place], wanted[size + place] = cut[outer, depth], matrix[outer, depth]
        same(out, wanted)


@pytest.mark.parametrize("edges", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("dtype", "along_depth", "access", "outers", "depths"), [
    ("float32", False, 4, (0, 1, 2, 3), (0, 5, 10)), ("bfloat16", False, 2, (0, 1, 8, 9), (0, 3)),
    ("float16", True, 4, (0, 2), (0, 1, 2, 3, 8, 9, 10, 11)), ("float64", True, 1, (0, 3, 6), (0, 1, 4, 5)),
])
def test_threads_read_tiles_into_registers(xp, dtype, along_depth, access, outers, depths, edges):
    tile = ThreadTile(dtype, WIDE[dtype], along_depth, access, outers, depths)
    load, place_of = primitives.load_thread_tile(tile, *edges), primitives.place(dtype)
    keep, typed, count = primitives.store_each(tile.wide, tile.count, tile.wide), np.int32, tile.count

    @primitives.jit(1)
    def kernel(values, first, stride, outer_left, depth_left, out):
        keep(out, 0, 1, count, load(place_of(values, first), stride, typed(outer_left), typed(depth_left)))

    values = normal((13, 16), dtype, 1)
    inside = values.astype(tile.wide) if along_depth else values.astype(tile.wide).T
    last = outers[-1] - (access - 1) * (not along_depth), depths[-1] - (access - 1) * along_depth  # of the last access
    for outer_left, depth_left in ((99, 99), last, (access, access), (0, 0), (-3, -1)):
        out = xp.zeros(tile.count, tile.wide)
        run(kernel, xp.asarray(values.reshape(-1)), 0, 16, outer_left, depth_left, out)
        wanted = [inside[outer, depth] if (outer < outer_left or not edges[0]) and (depth < depth_left or not edges[1])
                  else 0 for depth in depths for outer in outers]
        same(out, np.array(wanted, tile.wide))


@pytest.mark.parametrize("sums_of_right", [False, True])
@pytest.mark.parametrize(("dtype", "rows", "cols", "depth"), [("float32", 1, 4, 8), ("float64", 3, 2, 2)])
def test_threads_multiply_what_is_in_registers(xp, dtype, rows, cols, depth, sums_of_right):
    """Powers of two on the left, so that products are exact, fused or not: the order of the depth shows in the bits."""
    counts = (rows + sums_of_right) * cols, rows * depth, cols * depth
    load_sums, load_left, load_right = (primitives.load_each(dtype, count, dtype) for count in counts)
    multiply = primitives.multiply_thread_tiles(dtype, rows, cols, depth, sums_of_right)
    keep, (count, left_count, right_count) = primitives.store_each(dtype, counts[0], dtype), counts

    @primitives.jit(1)
    def kernel(sums, left, right, out):
        keep(out, 0, 1, count, multiply(load_sums(sums, 0, 1, count), load_left(left, 0, 1, left_count),
                                        load_right(right, 0, 1, right_count)))

    left = (2.0 ** np.random.default_rng(0).integers(-3, 4, (depth, rows))).astype(dtype)
    sums, right = normal((rows + sums_of_right, cols), dtype, 1), normal((depth, cols), dtype, 2)
    out = xp.zeros(count, dtype)
    run(kernel, *(xp.asarray(array.reshape(-1)) for array in (sums, left, right)), out)
    wanted = sums.copy()
    for step in range(depth):
        factors = np.append(left[step], np.ones(int(sums_of_right), dtype))
        wanted = wanted + factors[:, None] * right[step]
    same(out, wanted.reshape(-1))


@pytest.mark.parametrize(("down", "across", "beside"), [
    (1, 1, 1), (2, 2, 2), (8, 16, 4), (8, 16, 16), (4, 8, 8), (64, 2, 2)])
def test_threads_share_a_tile(xp, down, across, beside):
    """Warps of 4 by 8 or 8 by 4 threads, across first."""
    lanes = lanes_of(down, across, beside)
    place = primitives.thread_lanes(lanes)
    one, keep = primitives.load_vector("float32", 1, "float32"), primitives.store_vector("float32", 1, "float32")

    @primitives.jit(lanes.threads)
    def kernel(numbers, threads, warps):
        thread = cuda.threadIdx.x
        mine_down, mine_across, warp_down, warp_across = place(thread)
        keep(threads, mine_down * across + mine_across, one(numbers, thread))
        keep(warps, mine_down * across + mine_across, one(numbers, warp_down * across + warp_across))

    threads, warps = xp.full((down, across), -1, "float32"), xp.full((down, across), -1, "float32")
    run(kernel, xp.arange(lanes.threads, dtype="float32"), threads, warps, threads=lanes.threads)
    wide = min(8, across, beside)
    high = min(32 // wide, down)
    wanted = np.empty((down, across), "float32")
    for thread in range(lanes.threads):
        warp, lane = divmod(thread, high * wide)
        wanted[warp // (across // wide) * high + lane // wide, warp % (across // wide) * wide + lane % wide] = thread
    same(threads, wanted)
    firsts = [[i // high * high * across + j // wide * wide for j in range(across)] for i in range(down)]
    same(warps, np.float32(firsts))


@pytest.mark.parametrize(("dtype", "left", "right", "along_depth"), [
    ("float32", (16, 8), (8, 4), (False, True)), ("float32", (64, 8), (64, 8), (True, True)),
    ("float32", (64, 8), (128, 16), (True, True)), ("float64", (8, 4), (4, 2), (True, False))])
@pytest.mark.parametrize("access", [1, "widest"])
@pytest.mark.parametrize("depth", [8, 16])
def test_tiles_are_multiplied(xp, dtype, left, right, along_depth, access, depth):
    """Small integers, for which the device's fused multiply-add and the simulator's two roundings are both exact."""
    vector = 16 // np.dtype(dtype).itemsize
    (rows, thread_rows), (cols, thread_cols) = left, right
    access = vector if access == "widest" else access
    layouts = [tile_copy(dtype, dtype, outer, depth, access, along, 4, thread, 32, start).layout
               for (outer, thread), along, start in zip((left, right), along_depth, (0, rows * depth), strict=True)]
    stages = primitives.shared_array("stages", dtype, 2 * (rows + cols) * depth)
    count = thread_rows * thread_cols
    multiply = primitives.multiply_tile(dtype, depth, *layouts)
    put, one = primitives.store_shared(dtype, 1), primitives.load_vector(dtype, 1, dtype)
    load, keep = primitives.load_each(dtype, count, dtype), primitives.store_each(dtype, count, dtype)
    stage, int32 = (rows + cols) * depth, np.int32
    stage_bytes = stage * np.dtype(dtype).itemsize

    @primitives.jit(1)
    def kernel(images, left_outer, right_outer, sums, out):
        shared = stages()
        for index in range(stage):
            put(shared, stage + index, one(images, index))
        found = multiply(shared, int32(stage_bytes), int32(left_outer), int32(right_outer), load(sums, 0, 1, count))
        keep(out, 0, 1, count, found)

    matrices, images = [integers((rows, depth), dtype, 1), integers((cols, depth), dtype, 2)], np.zeros(stage, dtype)
    for matrix, layout in zip(matrices, layouts, strict=True):
        for outer, k in np.ndindex(matrix.shape):
            images[layout.place(outer, k)] = matrix[outer, k]
    sums = integers((count,), dtype, 3)
    for left_outer, right_outer in ((0, 0), tuple((layout.lanes - 1) * vector for layout in layouts)):
        mine = [[outer + group * layout.group_spacing + n for group in range(layout.groups) for n in range(vector)]
                for outer, layout in zip((left_outer, right_outer), layouts, strict=True)]
        out = xp.zeros(count, dtype)
        run(kernel, xp.asarray(images), left_outer, right_outer, xp.asarray(sums), out, threads=1)
        same(out, sums + (matrices[0][mine[0]] @ matrices[1][mine[1]].T).reshape(-1))


@pytest.mark.parametrize(("dtype", "outer_size", "depth_size", "access", "along_depth", "threads"), [
    ("float32", 16, 8, 4, False, 16), ("float32", 64, 8, 4, True, 64), ("float32", 128, 16, 4, True, 64),
    ("float32", 128, 16, 4, True, 16), ("float32", 64, 16, 1, True, 32), ("float64", 16, 8, 2, False, 16),
    ("float64", 8, 4, 1, False, 64), ("float64", 64, 16, 2, False, 16), ("float64", 32, 16, 2, True, 64)])
def test_tiles_are_summed(xp, dtype, outer_size, depth_size, access, along_depth, threads):
    """Along the depth, into sums of every n-th depth: a number that the layout does not change, nor float64's tile."""
    copy = tile_copy(dtype, dtype, outer_size, depth_size, access, along_depth, threads, 8, 32)
    layout, share = copy.layout, tile_share(copy)
    size, vector = outer_size * depth_size, 16 // ITEM_BYTES[dtype]
    classes = 4 if dtype == "float64" else min(vector * threads // outer_size or 1, depth_size)
    array = primitives.shared_array("tile", dtype, 2 * size)
    zeros, add = primitives.zeros(dtype, share.count), primitives.add_tile(share)
    store, typed, stage = primitives.store_tile_sums(share), np.int32, ITEM_BYTES[dtype] * size
    put, get = primitives.store_shared(dtype, 1), primitives.load_shared(dtype, 1)
    one, keep = primitives.load_vector(dtype, 1, dtype), primitives.store_vector(dtype, 1, dtype)

    @primitives.jit(threads)
    def kernel(image, out):
        thread, shared = cuda.threadIdx.x, array()
        for index in range(thread, size, threads):
            put(shared, size + index, one(image, index))
        cuda.syncthreads()
        sums = add(shared, typed(stage), zeros(), thread)
        cuda.syncthreads()
        store(shared, sums, thread)
        cuda.syncthreads()
        for index in range(thread, classes * outer_size, threads):
            keep(out, index, get(shared, index))

    matrix, image = normal((outer_size, depth_size), dtype, 5), np.empty(size, dtype)
    for outer, depth in np.ndindex(matrix.shape):
        image[layout.place(outer, depth)] = matrix[outer, depth]
    out = xp.zeros((classes, outer_size), dtype)
    run(kernel, xp.asarray(image), out, threads=threads)
    wanted = np.zeros((classes, outer_size), dtype)
    for depth in range(depth_size):
        wanted[depth % classes] += matrix[:, depth]
    same(out, wanted)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_are_added(xp, dtype):
    """Small integers, for which one rounding and two are both exact."""
    multiply_add, load = primitives.multiply_add(dtype, 3), primitives.load_each(dtype, 3, dtype)
    store = primitives.store_each(dtype, 3, dtype)

    @primitives.jit(1)
    def kernel(sums, left, right, out):
        store(out, 0, 1, 3, multiply_add(load(sums, 0, 1, 3), load(left, 0, 1, 3), load(right, 0, 1, 3)))

    sums, left, right = (integers((3,), dtype, seed) for seed in range(3))
    out = xp.zeros(3, dtype)
    run(kernel, *map(xp.asarray, (sums, left, right)), out)
    same(out, sums + left * right)


@pytest.mark.parametrize(("dtype", "length", "lanes", "accumulate"), [
    ("float32", 128, 32, False), ("float16", 32, 8, False), ("bfloat16", 4, 4, False), ("float32", 64, 8, True),
    ("float64", 16, 16, True)])
def test_lines_are_stored_from_any_place_in_a_sector(xp, dtype, length, lanes, accumulate):
    """Odd lines are flipped in shared memory; each element comes to its place, whatever sector the first lies in."""
    wide = WIDE[dtype]
    line = Line(wide, length, lanes, accumulate)
    array, line_of = primitives.shared_array("lines", wide, 2 * length), primitives.split(lanes)
    place_of, store = primitives.place(dtype), primitives.store_line(line, dtype, wide)
    put, one, typed = primitives.store_shared(wide, 1), primitives.load_vector(wide, 1, wide), primitives.typed(wide)

    @primitives.jit(2 * lanes)
    def kernel(image, out, first, step, pitch, left):
        thread = cuda.threadIdx.x
        shared = array()
        for index in range(thread, 2 * length, 2 * lanes):
            put(shared, index, one(image, index))
        cuda.syncthreads()
        number, lane = line_of(thread)
        store(shared, number, place_of(out, first + number * pitch), step, lane, left, typed(0.5))

    values = integers((2, length), wide, 6)
    image = np.stack([values[0], values[1][np.arange(length) ^ line.flip]])
    for first, step, left in ((0, 1, length), (3, 1, length - 1), (7, 2, length), (5, 1, 1)):
        pitch = step * length + 3
        out = integers((first + 2 * pitch,), dtype, 7)
        wanted = out.copy()
        for number in range(2):
            row = slice(first + number * pitch, first + number * pitch + step * left, step)
            wanted[row] = (values[number, :left] / 2 + (wanted[row] if accumulate else 0)).astype(out.dtype)
        result = xp.asarray(out)
        run(kernel, xp.asarray(image), result, first, step, pitch, left, threads=2 * lanes)
        same(result, wanted)


@pytest.mark.parametrize(("dtype", "length", "groups"), [
    ("float32", 128, 2), ("float32", 32, 2), ("float32", 8, 1), ("float64", 16, 2), ("float64", 64, 2)])
def test_lines_are_filled_flipped(xp, dtype, length, groups):
    """Threads beside one another have neighbouring vectors of each group; of odd lines c lies at c ^ flip."""
    vector, spacing = 16 // np.dtype(dtype).itemsize, length // groups
    line, count, lanes = Line(dtype, length, 1, False), groups * vector, spacing // vector
    array, lane_of = primitives.shared_array("lines", dtype, 2 * length), primitives.split(lanes)
    load, fill = primitives.load_each(dtype, count, dtype), primitives.fill_line(line, groups, vector, spacing)
    one, put = primitives.load_shared(dtype, 1), primitives.store_vector(dtype, 1, dtype)

    @primitives.jit(2 * lanes)
    def kernel(fragments, out):
        thread = cuda.threadIdx.x
        shared = array()
        number, lane = lane_of(thread)
        fill(shared, number, lane * vector, load(fragments, thread * count, 1, count))
        cuda.syncthreads()
        for index in range(thread, 2 * length, 2 * lanes):
            put(out, index, one(shared, index))

    values = integers((2, length), dtype, 6)
    fragments = values.reshape(2, groups, lanes, vector).transpose(0, 2, 1, 3)
    out = xp.zeros((2, length), dtype)
    run(kernel, xp.asarray(np.ascontiguousarray(fragments)), out, threads=2 * lanes)
    same(out, np.stack([values[0], values[1][np.arange(length) ^ line.flip]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "offsets", "stride"), [
    (4, (0, 12), 1), (2, (0, 8, 16), 1), (1, (0, 3, 5), 2), (1, (0, 3), -1)])
def test_pieces_are_touched_where_they_are_left(xp, dtype, width, offsets, stride):
    wide, count = WIDE[dtype], width * len(offsets)
    if width * np.dtype(dtype_of(dtype)).itemsize > 16:
        width, count = 2, 2 * len(offsets)
    load, store = (make(dtype, width, offsets, wide) for make in (primitives.load_pieces, primitives.store_pieces))
    keep_all = primitives.store_each(wide, count, wide)
    start = 8 if stride < 0 else 0

    @primitives.jit(1)
    def kernel(source, target, whole, left):
        values = load(source, start, stride, left)
        keep_all(whole, 0, 1, count, values)
        store(target, start, stride, left, values)

    memory = normal((40,), dtype, 5)
    for left in (0, 1, offsets[-1], offsets[-1] + 1):
        wanted, copied = np.zeros(count, wide), np.full(40, -99, memory.dtype)
        for piece, offset in enumerate(offsets):
            if offset < left:
                places = start + offset * stride + np.arange(width)
                wanted[piece * width:(piece + 1) * width] = memory[places]
                copied[places] = memory[places]
        target, whole = xp.asarray(np.full(40, -99, memory.dtype)), xp.zeros(count, wide)
        run(kernel, xp.asarray(memory), target, whole, left)
        same(whole, wanted)
        same(target, copied)


@pytest.mark.parametrize("dtype", ["bool", "int32", "int64"])
def test_integers_choose_elements(xp, dtype):
    load = primitives.load_integers(dtype, (0, 2, 3))
    choose, whole = primitives.leave_out("float32", 3, 3), primitives.load_each("float32", 3, "float32")
    store = primitives.store_each("float32", 3, "float32")

    @primitives.jit(1)
    def kernel(source, values, out, left, absent):
        store(out, 0, 1, 3, choose(whole(values, 0, 1, 3), load(source, 1, 2, left, absent), 0))

    source = np.array([9, 0, 9, 9, 9, -5, 9, 0], "int64").astype(dtype)
    values = np.array([np.nan, 2, 3], "float32")
    for left, absent, wanted in ((4, 0, [0, 2, 0]), (3, 7, [0, 2, 3]), (0, 0, [0, 0, 0])):
        out = xp.full(3, np.nan, "float32")
        run(kernel, xp.asarray(source), xp.asarray(values), out, left, absent)
        same(out, np.array(wanted, "float32"))


@pytest.mark.parametrize(("dtype", "width"), [
    ("float16", 8), ("float16", 1), ("bfloat16", 8), ("bfloat16", 2), ("bfloat16", 1), ("float32", 4), ("float32", 1),
    ("float64", 2), ("float64", 1)])
def test_rows_are_kept_as_they_are_stored(xp, dtype, width):
    """What is not touched is minus infinity, of which no number is less; NaN is passed over."""
    wide, count = WIDE[dtype], 16 // np.dtype(dtype_of(dtype)).itemsize
    offsets = tuple(range(0, 3 * count, 3 * width))[:count // width]
    keep, kept = primitives.keep(dtype, width, offsets), primitives.kept(dtype, wide)
    largest, store_row = primitives.largest_kept(dtype, wide), primitives.store_row(dtype, width, offsets, wide)
    load_row, one = primitives.load_row(dtype, width, offsets, wide), primitives.load_vector(wide, 1, wide)
    whole, single, typed = primitives.store_each(wide, count, wide), primitives.store_vector(wide, 1, wide), np.int32

    @primitives.jit(1)
    def kernel(source, start, left, least, target, kept_out, loaded, top):
        row = keep(source, start, typed(left))
        whole(kept_out, 0, 1, count, kept(row))
        store_row(target, start, typed(left), kept(row))
        whole(loaded, 0, 1, count, load_row(source, start, typed(left)))
        single(top, 0, largest(one(least, 0), row))

    memory = normal((2 * count + offsets[-1],), dtype, 5)
    memory[count + offsets[-1]] = np.nan
    places = np.array([offset + element for offset in offsets for element in range(width)])
    for left in (0, 1, offsets[-1], offsets[-1] + 1):
        inside = np.repeat(np.array(offsets) < left, width)
        values = memory[count + places].astype(wide)
        target = xp.asarray(np.full(len(memory), -99, memory.dtype))
        kept_out, loaded, top = xp.zeros(count, wide), xp.zeros(count, wide), xp.zeros(1, wide)
        least = np.array([-1], wide)
        run(kernel, xp.asarray(memory), count, left, xp.asarray(least), target, kept_out, loaded, top)
        same(kept_out, np.where(inside, values, np.array(-np.inf, wide)))
        same(loaded, np.where(inside, values, np.array(0, wide)))
        same(top, np.fmax.reduce(np.append(values[inside], least))[None].astype(wide))
        wanted = np.full(len(memory), -99, memory.dtype)
        wanted[count + places[inside]] = memory[count + places[inside]]
        same(target, wanted)


def test_elements_of_a_row_are_chosen_by_their_columns(xp):
    columns, offsets = (0, 1, 8, 9), (0, 8)
    labelled, labelled_each = (primitives.labelled("float32", columns, each) for each in (1, 4))
    smooth, inside = primitives.smooth("float32", 4), primitives.inside("float32", 2, offsets)
    chosen, minus_at = primitives.chosen("float32", columns), primitives.minus_at("float32", columns)
    between, fill = primitives.between("float32", 4), primitives.fill("float32", 4)
    load, typed = primitives.load_each("float32", 4, "float32"), np.int32
    store, store_one = primitives.store_each("float32", 4, "float32"), primitives.store_each("float32", 1, "float32")

    @primitives.jit(1)
    def kernel(source, out, label, first, left, elsewhere, more):
        values = load(source, 0, 1, 4)
        store(out, 0, 1, 4, labelled((label,), first, elsewhere, more))
        store(out, 4, 1, 4, labelled_each((label, label - 1, label - 8, label - 9), first, elsewhere, more))
        store(out, 8, 1, 4, smooth(values, elsewhere, more))
        store(out, 12, 1, 4, inside(values, typed(left)))
        store(out, 16, 1, 4, minus_at(values, typed(label - first), more))
        store(out, 20, 1, 4, between(values, first - 4, left))
        store(out, 24, 1, 4, fill(elsewhere))
        store_one(out, 28, 1, 1, chosen(values, typed(label - first)))

    values = np.array([1.5, np.nan, -np.inf, 3], "float32")
    elsewhere, more = np.float32(0.1), np.float32(0.7)
    for label, first, left in ((4, 4, 0), (5, 4, 1), (13, 4, 8), (12, 4, 9), (6, 4, 20), (-1, 0, 3), (1, 2, 2)):
        out, zero, there = xp.zeros(29, "float32"), np.zeros(4, "float32"), elsewhere + more
        run(kernel, xp.asarray(values), out, label, first, left, elsewhere, more)
        at_label = np.array(columns) == label - first
        each = np.array(columns) == np.array([label, label - 1, label - 8, label - 9]) - first
        stands = np.arange(4) + first - 4
        with np.errstate(all="ignore"):
            wanted = [np.where(at_label, there, elsewhere), np.where(each, there, elsewhere), elsewhere + values * more,
                      np.where(np.repeat(np.array(offsets) < left, 2), values, zero),
                      np.where(at_label, values - more, values),
                      np.where((stands >= 0) & (stands < left), values, zero), np.full(4, elsewhere),
                      values[at_label] if at_label.any() else zero[:1]]
        same(out, np.concatenate(wanted).astype("float32"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_of_what_counts_are_added_and_numbers_divided(xp, dtype):
    add, divide = primitives.weighted_sum(dtype, 3), primitives.divide(dtype)
    load, one, store = (primitives.load_each(dtype, 3, dtype), primitives.load_each(dtype, 1, dtype),
                        primitives.store_each(dtype, 1, dtype))
    fill = primitives.fill(dtype, 1)

    @primitives.jit(1)
    def kernel(total, weights, values, out):
        store(out, 0, 1, 1, add(one(total, 0, 1, 1), load(weights, 0, 1, 3), load(values, 0, 1, 3)))
        store(out, 1, 1, 1, fill(divide(one(total, 0, 1, 1)[0], one(weights, 0, 1, 1)[0])))

    # Powers of two, so that products are exact, fused or not.
    for weights, values in (([2, 0, 0.5], [0.3, np.inf, -1.7]), ([0, -0.0, 4], [np.nan, -np.inf, 1 / 3]),
                            ([-0.25, 2, 1], [np.inf, 1, 1])):
        weights, values, total = (np.array(one, dtype) for one in (weights, values, [1 / 3]))
        out, wanted = xp.zeros(2, dtype), total[0]
        run(kernel, *(xp.asarray(array) for array in (total, weights, values)), out)
        for weight, value in zip(weights, values, strict=True):
            wanted = wanted + weight * value if weight else wanted
        with np.errstate(all="ignore"):
            same(out, np.array([wanted, total[0] / weights[0]], dtype))


@pytest.mark.parametrize(("dtype", "absent"), [("float32", -np.inf), ("bfloat16", 0.0)])
def test_vectors_over_the_edges_of_a_row(xp, dtype, absent):
    """Those elements alone are touched that stand in the row, wherever it begins and ends."""
    wide = WIDE[dtype]
    load, store = primitives.load_between(dtype, 4, wide, absent), primitives.store_each(wide, 4, wide)

    @primitives.jit(1)
    def kernel(source, out, index, stride, position, end):
        store(out, 0, 1, 4, load(source, index, stride, position, end))

    memory = normal((20,), dtype, 6)
    for index, stride, position, end in ((4, 1, 0, 9), (-2, 1, -2, 5), (17, 1, 6, 9), (4, 3, 1, 4), (9, -2, -1, 9),
                                         (10 ** 9, 1, 5, 5), (0, 1, -4, 3)):
        out = xp.zeros(4, wide)
        run(kernel, xp.asarray(memory), out, index, stride, position, end)
        places = [index + n * stride if 0 <= position + n < end else None for n in range(4)]
        same(out, np.array([absent if place is None else memory[place] for place in places], wide))


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize(("dtype", "wide"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
def test_exponentials_of_differences(xp, dtype, wide, samples):
    """As near as the bound of cross-entropy has them, approximate ones too; of minus infinity it is zero."""
    exponentials, unit = primitives.exponentials(dtype, wide, 4, samples), 2.0 ** (-53 if wide == "float64" else -24)
    load, less = primitives.load_each(wide, 4, wide), primitives.load_each(wide, samples, wide)
    store = primitives.store_each(wide, 4, wide)

    @primitives.jit(1)
    def kernel(values, others, out):
        store(out, 0, 1, 4, exponentials(load(values, 0, 1, 4), less(others, 0, 1, samples)))

    for values, others in (([0, -0.5, -20, -np.inf], [0, 0, 0, 0]), ([-1, -2, 0, -60], [1.5, 0.25, 7, 1.5]),
                           ([np.nan, -3, -np.inf, 0], [2, 2, np.nan, 2])):
        values, others = np.array(values, wide), np.array(others[:samples], wide)
        out = xp.zeros(4, wide)
        run(kernel, xp.asarray(values), xp.asarray(others), out)
        exact = np.exp(values.astype("float64") - others)
        # Of the two and of their difference the larger rounds most.
        sizes = 4 + 3 * (np.abs(values) + np.abs(others))
        found = host(out).astype("float64")
        finite = np.isfinite(exact) & np.isfinite(values)
        right = np.where(finite, np.abs(found - exact) <= np.where(finite, sizes, 0) * unit * exact,
                         (found == exact) | (np.isnan(found) & np.isnan(exact)))
        assert right.all(), (values, others, found, exact)


def test_exponentials_are_merged_without_overflow(xp):
    nothing, add_values = primitives.no_exponentials("float32"), primitives.add_exponentials("float32", "float32", 1)
    merge, logarithm = primitives.merge_targets("float32"), primitives.log_of_exponentials("float32")
    no_targets, both = primitives.zeros("float32", 2), primitives.join("float32", (2, 2))
    front = primitives.head("float32", 4, 2)
    load, store = primitives.load_vector("float32", 1, "float32"), primitives.store_each("float32", 2, "float32")

    @primitives.jit(1)
    def kernel(source, out, count):
        state = both(nothing(), no_targets())
        for index in range(count):
            state = merge(both(add_values(nothing(), load(source, index)), no_targets()), state)
        store(out, 0, 1, 2, logarithm(front(state)))

    for values in ([3.0], [-1.0, 2.0, 0.5], [1000.0, 999.0], [-np.inf, 0.0], [-np.inf], []):
        out = xp.zeros(2, "float32")
        run(kernel, xp.asarray(np.array([*values, 0], "float32")), out, len(values))
        largest, total = host(out)
        assert largest == max(values, default=-np.inf)
        if np.isfinite(largest):
            exact = np.log(np.exp(np.array(values, "float64") - largest).sum())
            # A merge rounds three times and its exponential is 2 units off; the logarithm rounds.
            assert abs(total - exact) <= 2.0 ** -24 * 8 * len(values)
        else:
            assert np.isnan(total)


@pytest.mark.parametrize(("dtype", "wide", "count"), [("float32", "float32", 4), ("bfloat16", "float32", 8),
                                                      ("float64", "float64", 2)])
def test_exponentials_are_added_to_a_state(xp, dtype, wide, count):
    """Vector by vector, whichever is the largest; minus infinities add nothing, also where there is no other number."""
    nothing, add_values = primitives.no_exponentials(wide), primitives.add_exponentials(dtype, wide, count)
    load, store = primitives.load_each(wide, count, wide), primitives.store_each(wide, 2, wide)

    @primitives.jit(1)
    def kernel(source, out, vectors):
        state = nothing()
        for vector in range(vectors):
            state = add_values(state, load(source, vector * count, 1, count))
        store(out, 0, 1, 2, state)

    lowest = np.full(count, -np.inf)
    for vectors in ([lowest], [lowest, np.arange(count)], [np.arange(count), lowest], [np.arange(count), -np.arange(
            count) - 50.0, np.arange(count) + 3.0], [np.full(count, 1000.0), np.full(count, 999.0)]):
        values, out = np.concatenate(vectors).astype(wide), xp.zeros(2, wide)
        run(kernel, xp.asarray(values), out, len(vectors))
        largest, total = host(out)
        assert largest == values.max()
        exact = np.exp(values.astype("float64") - (largest if np.isfinite(largest) else 0)).sum()
        unit, finite = 2.0 ** (-53 if wide == "float64" else -24), values[np.isfinite(values)]
        spread = np.ptp(finite) if finite.size else 0
        assert abs(total - exact) <= (5 * (len(values) + 1) + 16 + 3 * spread) * unit * exact
