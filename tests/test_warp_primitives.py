"""What the lanes of a warp do together, against plain NumPy, in every lane: so that the two twins do the same."""
import itertools
import re

import numpy as np
import pytest
from numba import cuda

from densegrad import compiler, device
from densegrad.catalogue import kernel_variants
from densegrad.kernels import primitives
from densegrad.kernels.primitives.layout import CHUNK_BYTES, ChunkCopy, chunk_tile, fragment_layout
from densegrad.signatures import Epilogue
from densegrad.testing import bits, host, integers, launch_kernel, normal

WARP = 32
ITEM = {"float16": 2, "float16k8": 2, "bfloat16": 2, "tf32": 4, "tf32x3": 4, "float64": 8, "float64m8": 8}
DTYPE = {"float16": "float16", "float16k8": "float16", "bfloat16": "bfloat16", "tf32": "float32", "tf32x3": "float32",
         "float64": "float64", "float64m8": "float64"}
#: of which this has 16 rows an instruction on 9.0 alone
KINDS = [pytest.param(kind, marks=[pytest.mark.hopper] * (kind == "float64")) for kind in ITEM]
#: the type of sums
WIDE = {kind: "float64" if ITEM[kind] == 8 else "float32" for kind in ITEM}


def run(kernel, *arguments, threads=WARP, shared_bytes=0):
    """Launch one block; arrays are passed as addresses."""
    launch_kernel(kernel, (1, 1), threads, arguments, shared_bytes)


def product_kernel(kind, along_depth, outers=(WARP, WARP), access=(0, 0), wait=True):
    """left (rows, one tile's depth) times right (cols, the same), both at index 64 of shared memory, by one warp."""
    item, dtype, wide = ITEM[kind], DTYPE[kind], WIDE[kind]
    layouts = [fragment_layout(item, outer, along, left, outer)
               for outer, along, left in zip(outers, along_depth, (True, False), strict=True)]
    copies = [ChunkCopy(layout.tile, item, pieces or 16 // item, along, WARP, 32, kind != "float16k8")
              for layout, along, pieces in zip(layouts, along_depth, access, strict=True)]
    left_layout, right_layout = layouts
    start = 64
    right_start = start + left_layout.tile.size
    size = right_start + right_layout.tile.size
    place = primitives.place(dtype)
    left_place, right_place = (primitives.copy_place(copy) for copy in copies)
    copy_left, copy_right = (primitives.copy_chunks(copy, True) for copy in copies)
    shared_bytes, commit = primitives.shared_bytes(size), primitives.commit_copies()
    wait_for = primitives.wait_copies(0 if wait else 1)  # the one group that there is may still be on its way
    left_places, right_places = primitives.fragment_places(left_layout), primitives.fragment_places(right_layout)
    left_first, left_second = (primitives.load_fragments(left_layout, step) for step in (0, 1))
    right_first, right_second = (primitives.load_fragments(right_layout, step) for step in (0, 1))
    down, across = outers[0] // 16, outers[1] // 8
    multiply = primitives.mma(kind, down, across)
    count = 4 * down * across
    split = kind == "tf32x3"
    zeros = primitives.zeros(wide, count * (1 + split))
    settle = primitives.settle(wide, count, split)
    tidy = primitives.tidy(wide, count, True) if split else None
    store = primitives.store_products(left_layout, right_layout, wide, 1, wide, False)
    # Depths are added up in the order of left operands, whichever they are.
    share = fragment_layout(item, outers[1], along_depth[1], True, outers[1])
    share_places = primitives.fragment_places(share)
    share_first, share_second = (primitives.load_fragments(share, step) for step in (0, 1))
    left_totals, right_totals = (primitives.zeros(wide, outer // 8 * max(4 // item, 1)) for outer in outers)
    add_left, add_right = (primitives.add_depths(kind, layout) for layout in (left_layout, share))
    kept = Epilogue(wide, 1, wide, False)
    store_left, store_right = (primitives.store_depth_sums(kind, layout, *kept) for layout in (left_layout, share))

    one = np.dtype(wide).type(1)

    @primitives.jit(WARP)
    def kernel(left, left_stride, right, right_stride, left_rows, right_rows, depth, out, left_sums, right_sums):
        lane = cuda.threadIdx.x
        shared = shared_bytes()
        left_at, right_at = (left_place(place(left, 0), left_stride, lane),
                             right_place(place(right, 0), right_stride, lane))
        copy_left(shared, start, left_at, left_stride, left_rows, depth, lane)
        copy_right(shared, right_start, right_at, right_stride, right_rows, depth, lane)
        commit()
        wait_for()
        cuda.syncthreads()
        a, b = left_places(0, lane), right_places(0, lane)
        lefts, rights = left_first(shared, start, a), right_first(shared, right_start, b)
        more_lefts, more_rights = left_second(shared, start, a), right_second(shared, right_start, b)
        sums = multiply(more_lefts, more_rights, multiply(lefts, rights, zeros()))
        c = share_places(0, lane)
        shares, more_shares = share_first(shared, right_start, c), share_second(shared, right_start, c)
        of_left = add_left(lefts, more_lefts, left_totals())
        of_right = add_right(shares, more_shares, right_totals())
        if split:
            sums = tidy(sums)
        store(out, 0, WARP, 1, WARP, WARP, one, lane, settle(sums))
        store_left(left_sums, 0, 1, WARP, one, lane, of_left)
        store_right(right_sums, 0, 1, WARP, one, lane, of_right)

    return kernel, size


def multiply(xp, kind, left, right, along_depth=(True, True), access=(0, 0), pad=0, wait=True):
    """(left @ right.T, sums of left, sums of right along the depth) as a warp computes them, and what it left alone."""
    kernel, size = product_kernel(kind, along_depth, access=access, wait=wait)
    memories, strides = [], []
    for matrix, along in zip((left, right), along_depth, strict=True):
        rows = matrix if along else matrix.T
        padded = np.full((rows.shape[0], rows.shape[1] + pad), np.nan, rows.dtype)
        padded[:, :rows.shape[1]] = rows
        memories.append(xp.asarray(padded))
        strides.append(padded.shape[1])
    out, *sums = (xp.asarray(np.full(shape, np.nan, WIDE[kind])) for shape in ((WARP, WARP), WARP, WARP))
    run(kernel, memories[0], strides[0], memories[1], strides[1], len(left), len(right), left.shape[1], out, *sums,
        shared_bytes=size)
    return host(out), *map(host, sums)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("along_depth", list(itertools.product((False, True), repeat=2)))
def test_a_warp_multiplies_tiles_of_any_orientation(xp, kind, along_depth):
    """Whole tiles, and such that end early, beyond which is NaN: zeros take its place."""
    depth = 64 // ITEM[kind]
    for rows, cols, deep in ((WARP, WARP, depth), (24, 16, depth - 8 if depth > 8 else 6)):
        left, right = integers((rows, deep), DTYPE[kind], 1), integers((cols, deep), DTYPE[kind], 2)
        found = multiply(xp, kind, left, right, along_depth, pad=8)
        wide = [np.zeros((WARP, depth)), np.zeros((WARP, depth))]
        wide[0][:rows, :deep], wide[1][:cols, :deep] = left, right
        for result, wanted in zip(found, (wide[0] @ wide[1].T, wide[0].sum(1), wide[1].sum(1)), strict=True):
            np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize(("kind", "access"), [
    ("bfloat16", (1, 2)), ("float16", (4, 1)), ("float16k8", (4, 2)), ("tf32", (1, 2)), ("float64m8", (1, 2))])
def test_chunks_come_in_pieces(xp, kind, access):
    """Of 2 to 8 bytes, where memory is aligned to no more; the edges lie between any two of them."""
    deep = 64 // ITEM[kind] - 3 * max(access)
    left, right = integers((29, deep), DTYPE[kind], 1), integers((30, deep), DTYPE[kind], 2)
    found, _, _ = multiply(xp, kind, left, right, access=access, pad=max(access))
    np.testing.assert_array_equal(found[:29, :30], left.astype(float) @ right.astype(float).T)


def one_in_each_row(values):
    """A (32, 16) matrix with one of these numbers in each row, in ever other columns."""
    matrix = np.zeros((WARP, 16), np.float32)
    matrix[np.arange(WARP), np.arange(WARP) * 5 % 16] = values
    return matrix


def test_tf32_is_rounded_to_nearest_and_ties_away_from_zero(xp):
    """On 13 dropped bits: below, at and above the half, a carry into the exponent, over- and underflow, infinity."""
    patterns = [0x3F800000 | low for low in (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000)]
    patterns += [0x3FFFF000, 0x3FFFEFFF, 0xBFFFF000, 0xC0001000, 0x7F7FEFFF, 0x7F7FF000, 0x7F7FFFFF, 0xFF7FFFFF,
                 0x7F800000, 0xFF800000, 0x00800000, 0x00801000, 0x80800FFF, 0, 0x80000000]
    values = np.concatenate([np.array(patterns, np.uint32), bits(normal((WARP - len(patterns),), "float32"))])
    found, _, _ = multiply(xp, "tf32", one_in_each_row(values.view(np.float32)), np.ones((WARP, 16), np.float32))
    finite = values & 0x7F800000 != 0x7F800000
    wanted = np.where(finite, values + 0x1000, values) & np.uint32(0xFFFFE000)
    # A zero of either sign is added to zeros: its sign is lost.
    np.testing.assert_array_equal(found, np.repeat(wanted.view(np.float32)[:, None], WARP, axis=1))


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001])
def test_every_nan_stays_one_in_tf32(xp, pattern):
    values = np.full(WARP, pattern, np.uint32).view(np.float32)
    for kind in ("tf32", "tf32x3"):
        assert np.isnan(multiply(xp, kind, one_in_each_row(values), np.ones((WARP, 16), np.float32))[0]).all()


def test_three_products_of_tf32_recover_float32(xp):
    """Of one product at a time: what is left out is at most 3 x 2⁻²², and infinity stays what it is."""
    values, factors = normal((WARP,), "float32", 1), normal((WARP, 1), "float32", 2)
    right = np.repeat(factors, 16, axis=1)
    values[3] = np.inf
    found, _, _ = multiply(xp, "tf32x3", one_in_each_row(values), right)
    exact = values.astype(np.float64)[:, None] * factors.astype(np.float64).T
    assert (np.isinf(found) == np.isinf(exact)).all()
    finite = np.isfinite(exact)
    error = np.abs(found[finite] - exact[finite]) / np.abs(exact[finite])
    assert error.max() <= 3.01 * 2.0 ** -22 + 2.0 ** -24
    coarse, _, _ = multiply(xp, "tf32", one_in_each_row(values), right)
    assert np.abs(coarse[finite] - exact[finite]).max() > 2.0 ** -14


@pytest.mark.parametrize(("item", "outer", "along_depth"), [
    (2, 32, True), (2, 128, True), (2, 32, False), (2, 64, False), (2, 256, False), (4, 64, True), (4, 32, False),
    (4, 256, False), (8, 64, True), (8, 32, False), (8, 128, False)])
def test_tiles_have_no_bank_conflicts(item, outer, along_depth):
    """Eight chunks at a time fill all 32 banks: neighbours, which are written, and those that fragments are read from.

    Of float64 along the depth 16 lanes read halves of eight chunks.
    """
    tile = chunk_tile(item, outer, along_depth)
    place = {(line, chunk): line * tile.chunks + (chunk ^ tile.flip(line))
             for line, chunk in np.ndindex(tile.lines, tile.chunks)}
    assert sorted(place.values()) == list(range(tile.lines * tile.chunks))
    assert tile.size == CHUNK_BYTES * len(place)
    written = [[divmod(first + n, tile.chunks) for n in range(8)] for first in range(0, len(place), 8)]
    if item == 8 and along_depth:
        read = [[(line + n, chunk + half) for half in (0, 1) for n in range(4)]
                for line in range(0, tile.lines, 4) for chunk in range(0, tile.chunks, 2)]
    elif item > 2 and not along_depth:
        read = [[(line + q, chunk + g) for g in (0, 1) for q in range(4)]
                for line in range(0, tile.lines, 4) for chunk in range(0, tile.chunks, 2)]
    else:
        read = [[(line + n, chunk) for n in range(8)]
                for line in range(0, tile.lines, 8) for chunk in range(tile.chunks)]
    for eight in written + read:
        assert len({place[where] % 8 for where in eight}) == 8


@pytest.mark.parametrize(("dtype", "count", "distance"), [
    ("float32", 1, 16), ("float32", 4, 1), ("float32", 2, 8), ("float64", 1, 2), ("float64", 4, 4)])
def test_lanes_take_the_values_of_one_another(xp, dtype, count, distance):
    """Of the one whose number differs in a bit, whatever is in them, and in the second warp as in the first."""
    load, store = primitives.load_each(dtype, count, dtype), primitives.store_each(dtype, count, dtype)
    other = primitives.of_lane(dtype, count, distance)

    @primitives.jit(2 * WARP)
    def kernel(source, out):
        thread = cuda.threadIdx.x
        store(out, thread * count, 1, count, other(load(source, thread * count, 1, count)))

    values = normal((2 * WARP, count), dtype, 7)
    values[5], values[40], values[63] = np.nan, -0.0, -np.inf
    out = xp.zeros(values.shape, dtype)
    run(kernel, xp.asarray(values), out, threads=2 * WARP)
    assert (bits(out) == bits(values[np.arange(2 * WARP) ^ distance])).all()


# the simulator's warps


@pytest.mark.only("simulator")
def test_copies_arrive_no_earlier_than_at_the_wait(xp):
    left = right = np.ones((WARP, 32), device.dtype_of("bfloat16"))
    assert np.isnan(multiply(xp, "bfloat16", left, right, wait=False)[0]).all()
    assert (multiply(xp, "bfloat16", left, right)[0] == 32).all()


def exchanging_kernel(threads, body):
    from densegrad.kernels.primitives.warp_simulator import exchange

    @primitives.jit(threads)
    def kernel(out):
        body(exchange, cuda.threadIdx.x, out)

    return kernel


def reverse(values):
    return values[::-1]


def add_up(values):
    return [sum(values)] * len(values)


@pytest.mark.only("simulator")
def test_lanes_of_a_warp_exchange_values():
    def body(exchange, thread, out):
        for turn in range(3):
            out.write(thread * 3 + turn, np.array([exchange(reverse, 100.0 * turn + thread)]))

    out = np.zeros((64, 3))
    run(exchanging_kernel(64, body), out, threads=64)
    thread = np.arange(64)
    np.testing.assert_array_equal(out, (thread // 32 * 32 + 31 - thread % 32)[:, None] + 100.0 * np.arange(3))


@pytest.mark.only("simulator")
@pytest.mark.parametrize(("threads", "lanes", "words"), [
    (32, lambda thread, exchange: thread != 5 and exchange(reverse, thread), "waited for the others of its warp"),
    (32, lambda thread, exchange: exchange(reverse if thread else add_up, thread), "met in different instructions"),
    (48, lambda thread, exchange: exchange(reverse, thread), "48 threads is not made of whole warps")])
def test_lanes_that_do_not_meet_are_errors(monkeypatch, threads, lanes, words):
    from densegrad.kernels.primitives import warp_simulator

    monkeypatch.setattr(warp_simulator, "PATIENCE", 0.5)
    with pytest.raises(RuntimeError, match=words):
        run(exchanging_kernel(threads, lambda exchange, thread, out: lanes(thread, exchange)), np.zeros(1),
            threads=threads)


@pytest.mark.only("simulator")
def test_a_fault_in_an_exchange_reaches_every_lane():
    def fail(values):
        raise ValueError("no such thing")

    def body(exchange, thread, out):
        with pytest.raises(ValueError, match="no such thing"):
            exchange(fail, thread)
        out.write(thread, np.ones(1))

    out = np.zeros(WARP)
    run(exchanging_kernel(WARP, body), out)
    assert out.all()


@pytest.mark.only("gpu")  # where a compiler is at hand
@pytest.mark.parametrize(("kernel", "capability"), [
    ("log_sum_exp", (8, 0)), ("matmul_tensor_core", (8, 0)), ("matmul_hopper", (9, 0))])
def test_no_instruction_of_a_whole_warp_is_moved_into_a_branch(kernel, capability):
    """The compiler is told of each of them; what comes of it where it is not cannot be seen for certain."""
    launch = next(launch for launch in kernel_variants().values() if launch.kernel == kernel)
    called = re.findall(r"(?m)^.* call .* asm .*\.sync\b.*$", compiler.library_of(launch, capability).get_llvm_str())
    assert called
    assert all(line.endswith(" convergent") for line in called)
