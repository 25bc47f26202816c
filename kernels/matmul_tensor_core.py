"""Matrix product on tensor cores: dL/dW = Xᵀ dZ and dL/dX = dZ Wᵀ in float16, bfloat16, TF32 and float64.

    result[r, c] = alpha * sum over k of left[r, k] right[k, c]      left (rows, depth), right (depth, cols)

For dL/dW the depth is the batch: rows = in_features, cols = out_features, depth = samples. For dL/dX it is the outputs.

How the work is cut
    A block computes one tile_rows x tile_cols tile of the result for one part of the depth, a warp warp_rows x
    warp_cols of it in registers. The block walks along the depth in tiles 64 bytes deep, which are two steps of one
    mma instruction's depth: 16 half-precision numbers, 8 of TF32 or 4 of float64. Asynchronous copies bring tiles into
    `stages` slots of shared memory, so that stages - 1 of them are on their way while one is multiplied; a step's
    fragments come into registers while the step before it is multiplied. Long depths (the batch of dL/dW) are cut into
    parts, which add_parts adds up.
Fragments
    What a lane holds of the operands and of the result, lane = 4 g + q (PTX ISA, "Matrix fragments for mma.m16n8k16"
    and "mma.m16n8k8"). A register holds 4 bytes along the depth: two numbers of half precision (k and k + 1), or one
    of TF32. Of float64 ("mma.m16n8k4") it holds 8: there are a0, a1 and b0, which hold depth q.

        left 16 x 32 bytes                      right 32 bytes x 8            result 16 x 8

                 4 q ..  16 + 4 q ..                      col g                        cols 2 q, 2 q + 1
        row g     [ a0 ]   [ a2 ]               4 q ..    [ b0 ]              row g      [ c0   c1 ]
        row g + 8 [ a1 ]   [ a3 ]          16 + 4 q ..    [ b1 ]              row g + 8  [ c2   c3 ]

    ldmatrix brings four such registers at a time, and transposes 16-bit elements where an operand lies along rows or
    cols instead of the depth. It cannot transpose the 32-bit elements of TF32. There a lane reads 16 bytes, four
    neighbouring rows (or cols) at one depth, and calls them the row g of four different blocks: row 4 g + b of the
    matrix is row g of block b. Of float64 they are two; where it lies along the depth, each number is read by itself,
    since ldmatrix would give a lane half of it. Which rows make up a block is free, as long as the result is stored
    accordingly; so is the order of depths, which is kept.

        matrix row      0  1  2  3   4  5  6  7  ...  28 29 30 31
        block, row g   0,0 1,0 2,0 3,0 0,1 1,1 2,1 3,1  ...  0,7 1,7 2,7 3,7
Order of additions
    float64 is added as on FMA units, to the bit: each result is one chain of fused multiply-adds in ascending order of
    the depth, zeros behind it up to the end of the last tile included, since they make the sum -0 a +0. Lane q of four
    adds up every fourth depth of dL/db, and the four sums are added in ascending order. The other kinds are added in
    the order and rounding of the hardware.
Precision
    Products of half-precision numbers are exact. "tf32" rounds operands to 11 significant bits, to nearest. "tf32x3"
    cuts each of them into two such terms, first + second, and multiplies first * first into one set of sums, second *
    first and first * second into another, which is added at the end: what is left out is of the order of 2⁻²². Where
    an operand is infinite the second sums are not numbers and are left out. (Three terms of bfloat16 would be no
    better: six products at twice the rate take as long, and there is one more term to form.) Sums are float32, of
    float64 float64.
Threads
    32 for each warp tile; warps across, then down.
Grid
    (tile columns * group, groups of tile rows, parts), where a group is 1 << group_bits tile rows: tiles are walked
    down a group, then across, so that the tiles in flight share operands in L2.
Shared memory
    stages * 64 * (tile_rows + tile_cols) bytes, dynamic: primitives.layout says how tiles lie there so that neither
    copies nor fragments meet bank conflicts.
Bytes and flops
    Reads each operand once per tile of the other axis: rows * depth * (cols / tile_cols) + depth * cols *
    (rows / tile_rows) elements; writes rows * cols * parts. 2 * rows * cols * depth flops, three times that for
    "tf32x3".
Edges
    The first tile of a part takes what is left over when its depth is cut into whole tiles; of float64 the last one
    does, for the order. Copies beyond an edge bring zeros. Zero times infinity is not a number, but where an edge of
    the rows or columns meets an infinity, the result lies outside and is not stored; beyond the depth both factors are
    zero. Operands that are not aligned to 16 bytes come in smaller pieces.

Compute capability 7.5
    Has mma for 8 depths of float16 and no asynchronous copies: a step takes two instructions, and copies pass through
    registers: the compiler puts products of the tile before between their loads and their stores.

float64
    Compute capability 9.0 has mma for 16 rows, at twice the rate of that for 8, which is all that 8.0 has: there a step
    takes two instructions. Elsewhere FMA units are as fast.

Source: PTX ISA, "mma", "ldmatrix", "cp.async"; Thakkar et al., the CUTLASS documentation, "Efficient GEMM in CUDA";
Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
performance", 2022.
"""

from numba import cuda, int32

from ..facts import accumulator_of, number_of
from . import primitives
from .primitives.factories import cache, group
from .primitives.layout import ITEM_BYTES, LANES, TILE_DEPTH_BYTES, ChunkCopy, fragment_layout

#: outer indices of which a warp adds up the depths, at the least
LEAST_SHARE = 32


def _tile(copy, layout, ragged):
    """The tiles of an operand: copied to shared memory in chunks, and read from there as fragments of both steps.

    `copy_first` is of a tile that an edge of the depth may cut; so is `copy` if ragged.
    """
    return group(start=primitives.copy_place(copy), copy_first=primitives.copy_chunks(copy, True),
                 copy=primitives.copy_chunks(copy, ragged), places=primitives.fragment_places(layout),
                 load=primitives.load_fragments(layout, 0), load_second=primitives.load_fragments(layout, 1))


def _sums_of(kind, layout, epilogue, accumulator, item_bytes):
    """The sums of an operand along the depth, of which a warp has a share."""
    return group(none=primitives.zeros(accumulator, layout.blocks * max(4 // item_bytes, 1)),
                 places=primitives.fragment_places(layout), load=primitives.load_fragments(layout, 0),
                 load_second=primitives.load_fragments(layout, 1), add=primitives.add_depths(kind, layout),
                 store=primitives.store_depth_sums(kind, layout, *epilogue), number=primitives.typed(epilogue.wide))


@cache
def make_matmul_tensor_core(constants):
    """The kernel for these tiles, orientations and results.

    sums_of is "right" or "left" for the kernel that also adds that operand up along the depth.
    """
    (dtype, kind, tile_rows, tile_cols, warp_rows, warp_cols, stages, offset_bits, left_side, right_side, epilogue,
     sums_of, sums_epilogue) = constants
    left_along_depth, right_along_depth = left_side.along_depth, right_side.along_depth
    warps_across = tile_cols // warp_cols
    threads = LANES * (tile_rows // warp_rows) * warps_across
    item_bytes, accumulator = ITEM_BYTES[dtype], accumulator_of(dtype)
    in_order = accumulator == "float64"
    tile_depth = TILE_DEPTH_BYTES // item_bytes
    left_layout = fragment_layout(item_bytes, tile_rows, left_along_depth, True, warp_rows)
    right_layout = fragment_layout(item_bytes, tile_cols, right_along_depth, False, warp_cols)
    left_bytes = left_layout.tile.size
    stage_bytes = left_bytes + right_layout.tile.size
    none_left = int32(1 - stages)
    all_bytes, last_stage = stages * stage_bytes, (stages - 1) * stage_bytes

    shared_bytes, place_of = primitives.shared_bytes(all_bytes), primitives.place(dtype)
    # Registers are scarcest where both operands lie along the depth, and where copies of two bytes pass through them.
    scarce = (left_along_depth and right_along_depth) or item_bytes * min(left_side.access, right_side.access) == 2
    again = primitives.again() if scarce else _same
    asynchronous = kind != "float16k8"
    left_tile, right_tile = (
        _tile(ChunkCopy(layout.tile, item_bytes, side.access, side.along_depth, threads, offset_bits, asynchronous),
              layout, in_order)
        for layout, side in ((left_layout, left_side), (right_layout, right_side)))
    commit, wait_for_next, wait_for_all = (
        primitives.commit_copies(), primitives.wait_copies(stages - 2), primitives.wait_copies(0)
    ) if asynchronous else (_nothing, _nothing, _nothing)
    down, across = warp_rows // 16, warp_cols // 8
    multiply = primitives.mma(kind, down, across)
    split = kind == "tf32x3"
    count = 4 * down * across
    zeros = primitives.zeros(accumulator, count * (1 + split))
    tidy, settle = (make(accumulator, count, True) if split else _same for make in (primitives.tidy, primitives.settle))
    store = primitives.store_products(left_layout, right_layout, epilogue.dtype, epilogue.access, epilogue.wide,
                                      epilogue.accumulate)
    alpha_at, number = primitives.scale_at(number_of(constants), accumulator), primitives.typed(epilogue.wide)

    # dL/db rides along in the blocks of the first tile row (or column): their warps share dZ's tile among them, and
    # read it once more, as a left operand.
    has_sums, of_left = bool(sums_of), sums_of == "left"
    summed_size, summed_along_depth = (tile_rows, left_along_depth) if of_left else (tile_cols, right_along_depth)
    share_size = max(LEAST_SHARE, summed_size * LANES // threads)
    shares, summed_start = summed_size // share_size, 0 if of_left else left_bytes
    depth_sum = _sums_of(kind, fragment_layout(item_bytes, summed_size, summed_along_depth, True, share_size),
                         sums_epilogue or epilogue, accumulator, item_bytes)

    @cuda.jit(device=True, inline="always")
    def add_share(shared, stage, places, totals):
        return depth_sum.add(depth_sum.load(shared, int32(stage + summed_start), places),
                             depth_sum.load_second(shared, int32(stage + summed_start), places), totals)

    def walk_along_depth(adds):
        """The main loop: all tiles are multiplied and, if it adds, the warp's share of dZ's tiles is added up."""

        @cuda.jit(device=True, inline="always")
        def walk(shared, tiles, left_over, left_at, left_stride, left_step, rows_left, left_places, right_at,
                 right_stride, right_step, cols_left, right_places, share_places, thread):
            # 4. The first tile has arrived, for all warps; its first step is in registers.
            wait_for_next()
            cuda.syncthreads()
            now, free = int32(0), int32(last_stage)
            left_first = left_tile.load(shared, now, left_places)
            right_first = right_tile.load(shared, int32(now + left_bytes), right_places)
            sums, totals = zeros(), depth_sum.none()
            to_come = int32(tiles - stages + 1)
            while to_come > 0:
                # 5. While the first step is multiplied, the second comes into registers and a tile sets out to the
                #    free stage, which all warps have read.
                left_second = left_tile.load_second(shared, now, left_places)
                right_second = right_tile.load_second(shared, int32(now + left_bytes), right_places)
                left_at += left_step
                right_at += right_step
                depth_left = int32(left_over + (to_come - 1) * tile_depth)
                left_tile.copy(shared, free, left_at, left_stride, rows_left, depth_left, thread)
                right_tile.copy(shared, int32(free + left_bytes), right_at, right_stride, cols_left, depth_left, thread)
                commit()
                to_come = int32(to_come - 1)
                sums = multiply(left_first, right_first, sums)
                if adds:
                    totals = add_share(shared, now, share_places, totals)

                # 6. While the second step is multiplied, the first of the next tile comes into registers.
                wait_for_next()
                cuda.syncthreads()
                free = now
                now = int32(now + stage_bytes if now < last_stage else 0)
                left_first = left_tile.load(shared, now, left_places)
                right_first = right_tile.load(shared, int32(now + left_bytes), right_places)
                sums = multiply(left_second, right_second, sums)

            # 7. The last tiles, all of which have arrived.
            wait_for_all()
            cuda.syncthreads()
            while to_come > none_left:
                left_second = left_tile.load_second(shared, now, left_places)
                right_second = right_tile.load_second(shared, int32(now + left_bytes), right_places)
                to_come = int32(to_come - 1)
                sums = multiply(left_first, right_first, sums)
                if adds:
                    totals = add_share(shared, now, share_places, totals)
                if to_come > none_left:
                    now = int32(now + stage_bytes if now < last_stage else 0)
                    left_first = left_tile.load(shared, now, left_places)
                    right_first = right_tile.load(shared, int32(now + left_bytes), right_places)
                sums = multiply(left_second, right_second, sums)
            return sums, totals

        return walk

    walk, walk_and_add = walk_along_depth(False), walk_along_depth(True)

    @primitives.jit(threads)
    def matmul_tensor_core(left, left_stride, right, right_stride, result, result_down, result_across, part_stride,
                           rows, cols, depth, depth_per_part, group_bits, alpha, alpha_address, depth_sums,
                           depth_sums_step, depth_sums_part_stride):
        thread = cuda.threadIdx.x

        # 1. This block's tile of the result, and its part of the depth. Blocks below the result have nothing to do.
        row = ((cuda.blockIdx.y << group_bits) + (cuda.blockIdx.x & ((1 << group_bits) - 1))) * tile_rows
        col = (cuda.blockIdx.x >> group_bits) * tile_cols
        part = cuda.blockIdx.z
        start = part * depth_per_part
        depth_in_part = min(depth_per_part, depth - start) if row < rows else 0
        tiles = (depth_in_part + tile_depth - 1) // tile_depth
        left_over = depth_in_part - (tiles - 1) * tile_depth if tiles > 0 else 0
        first_depth = min(depth_in_part, tile_depth) if in_order else left_over
        rows_left, cols_left = int32(min(rows - row, tile_rows)), int32(min(cols - col, tile_cols))

        # 2. This warp's place in the tile, and where its lanes read.
        lane, warp = thread % LANES, thread // LANES
        warp_row, warp_col = warp // warps_across * warp_rows, warp % warps_across * warp_cols
        left_places, right_places = left_tile.places(warp_row, lane), right_tile.places(warp_col, lane)

        # 3. All stages but the last are on their way; tiles beyond the depth come as zeros.
        shared = shared_bytes()
        left_at = place_of(left, row * left_stride + start if left_along_depth else row + start * left_stride)
        right_at = place_of(right, col * right_stride + start if right_along_depth else col + start * right_stride)
        left_at = left_tile.start(left_at, left_stride, thread)
        right_at = right_tile.start(right_at, right_stride, thread)
        left_unit = item_bytes * (1 if left_along_depth else left_stride)
        right_unit = item_bytes * (1 if right_along_depth else right_stride)
        left_tile.copy_first(shared, 0, left_at, left_stride, rows_left, int32(first_depth), thread)
        right_tile.copy_first(shared, left_bytes, right_at, right_stride, cols_left, int32(first_depth), thread)
        commit()
        left_step, right_step = tile_depth * left_unit, tile_depth * right_unit
        left_at += first_depth * left_unit - left_step
        right_at += first_depth * right_unit - right_step
        for stage in range(1, stages - 1):
            left_at += left_step
            right_at += right_step
            rows_here, cols_here = (rows_left, cols_left) if stage < tiles else (0, 0)
            depth_left = int32(left_over + (tiles - 1 - stage) * tile_depth)
            left_tile.copy(shared, stage * stage_bytes, left_at, left_stride, rows_here, depth_left, thread)
            right_tile.copy(shared, stage * stage_bytes + left_bytes, right_at, right_stride, cols_here, depth_left,
                            thread)
            commit()

        # 4 to 7. Along the depth, above: the few blocks that add dZ up have a loop of their own, so that the others
        # spend nothing on it.
        if has_sums and (col == 0 if of_left else row == 0):
            which = warp % shares
            share_places = depth_sum.places(which * share_size, lane)
            sums, totals = walk_and_add(shared, tiles, int32(left_over), left_at, left_stride, left_step, rows_left,
                                        left_places, right_at, right_stride, right_step, cols_left, right_places,
                                        share_places, thread)
            begin, summed_left = (row, rows_left) if of_left else (col, cols_left)
            begin += which * share_size
            summed_left -= which * share_size
            depth_sum.store(depth_sums, part * depth_sums_part_stride + begin * depth_sums_step, depth_sums_step,
                            summed_left if warp < shares else 0, depth_sum.number(alpha_at(alpha, alpha_address)), lane,
                            totals)
        else:
            sums, _ = walk(shared, tiles, int32(left_over), left_at, left_stride, left_step, rows_left, left_places,
                           right_at, right_stride, right_step, cols_left, right_places, (), thread)

        # 8. Each warp stores its results from registers. Where it is in the tile may be computed again, so that it took
        #    no registers up to here.
        thread = again(cuda.threadIdx.x)
        lane, warp = thread % LANES, thread // LANES
        warp_row, warp_col = warp // warps_across * warp_rows, warp % warps_across * warp_cols
        index = part * part_stride + (row + warp_row) * result_down + (col + warp_col) * result_across
        store(result, index, result_down, result_across, rows_left - warp_row, cols_left - warp_col,
              number(alpha_at(alpha, alpha_address)), lane, settle(tidy(sums)))

    return matmul_tensor_core


@cuda.jit(device=True, inline="always")
def _nothing():
    pass


@cuda.jit(device=True, inline="always")
def _same(sums):
    return sums
