"""Matrix product on FMA units: dL/dW = Xᵀ dZ and dL/dX = dZ Wᵀ.

    result[r, c] = alpha * sum over k of left[r, k] right[k, c]      left (rows, depth), right (depth, cols)

For dL/dW the depth is the batch: rows = in_features, cols = out_features, depth = samples. For dL/dX it is the outputs.

How the work is cut
    A block computes one tile_rows x tile_cols tile of the result for one part of the depth. It walks along the depth in
    steps of tile_depth: the two input tiles come from global memory into registers while the tiles before them, in shared
    memory, are multiplied. A thread owns thread_rows x thread_cols results in registers: for each depth it reads
    thread_rows + thread_cols numbers from shared memory and does thread_rows * thread_cols multiply-adds, which is what
    keeps the FMA units busy. Long depths (the batch of dL/dW) are cut into parts, which batch_sum.add_parts adds up.
Order of additions
    Each result is one chain of fused multiply-adds in ascending order of the depth, whatever the tiles are; parts are
    added in ascending order.
Threads
    (tile_rows / thread_rows) * (tile_cols / thread_cols), a warp as 4 x 8 of them, so that its reads of shared memory
    are broadcasts and whole lines. A thread's rows and columns come in vectors of 16 bytes, spread over the tile.
Grid
    (tile columns * group, groups of tile rows, parts), where a group is 1 << group_bits tile rows: tiles are walked down a
    group, then across, so that the tiles in flight share operands in L2.
Shared memory
    2 stages * tile_depth * (tile_rows + tile_cols) accumulators: one stage is multiplied while the other is filled.
    Operands contiguous along the depth are transposed on the way in; see primitives.layout for how that avoids conflicts.
Bytes and flops
    Reads each operand once per tile of the other axis: rows * depth * (cols / tile_cols) + depth * cols *
    (rows / tile_rows) elements; writes rows * cols * parts. 2 * rows * cols * depth flops.
Edges
    Copies beyond an edge are predicated off and count as zeros on both sides, so that no edge meets another's infinity:
    such products only reach results which are not stored.

Source: Boehm, "How to optimize a CUDA matmul kernel for cuBLAS-like performance", 2022; the CUTLASS documentation,
"Efficient GEMM in CUDA".
"""
from functools import cache

from numba import cuda, int32

from . import primitives
from .primitives.layout import tile_copy, tile_share

ENDLESS = 2**31 - 1
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@cache
def make_matmul(dtype, accumulator, tile_rows, tile_cols, tile_depth, thread_rows, thread_cols, blocks_per_multiprocessor,
                left_access, left_along_depth, right_access, right_along_depth, offset_bits, result_dtype, result_access,
                epilogue, accumulate, sums_of):
    """The kernel for these tiles, types and orientations.

    epilogue is the type that alpha * sum (+ result, if accumulate) is computed in before it is rounded to result_dtype.
    sums_of is "right" or "left" for the kernel that also adds that operand up along the depth, else "".
    """
    lanes_down, lanes_across = tile_rows // thread_rows, tile_cols // thread_cols
    threads = lanes_down * lanes_across
    warp_across = min(8, lanes_across)
    warp_down = min(max(32 // warp_across, 1), lanes_down)
    warp = warp_down * warp_across
    warps_across = lanes_across // warp_across
    vector = 2 if accumulator == "float64" else 4
    row_spacing, col_spacing = tile_rows * vector // thread_rows, tile_cols * vector // thread_cols
    col_groups = thread_cols // vector
    stores = vector // result_access
    item_bytes = ITEM_BYTES[dtype]
    sums_count, left_stage, right_stage = thread_rows * thread_cols, tile_depth * tile_rows, tile_depth * tile_cols

    left_copy = tile_copy(dtype, accumulator, tile_rows, tile_depth, left_access, left_along_depth, threads, thread_rows,
                          offset_bits)
    right_copy = tile_copy(dtype, accumulator, tile_cols, tile_depth, right_access, right_along_depth, threads, thread_cols,
                           offset_bits)
    left_place = right_place = primitives.place(dtype)
    left_places, right_places = primitives.tile_offsets(left_copy), primitives.tile_offsets(right_copy)
    left_shared = primitives.shared_array("left", accumulator, 2 * left_stage)
    right_shared = primitives.shared_array("right", accumulator, 2 * right_stage)
    load_left, store_left = primitives.load_tile(left_copy), primitives.store_tile(left_copy)
    load_right, store_right = primitives.load_tile(right_copy), primitives.store_tile(right_copy)
    load_whole_left, load_whole_right = primitives.load_whole_tile(left_copy), primitives.load_whole_tile(right_copy)
    multiply = primitives.multiply_tile(accumulator, tile_depth, left_copy.layout, right_copy.layout)
    zeros = primitives.zeros(accumulator, sums_count)
    staged = result_access == 1 and lanes_down <= 2 * tile_depth
    liners, sector, result_bytes = min(32, threads), 32 // ITEM_BYTES[result_dtype], ITEM_BYTES[result_dtype]
    first_vector = primitives.head(accumulator, sums_count, vector)
    turn_vector = primitives.rotate(accumulator, sums_count, vector)
    stage_vector, load_staged = primitives.store_shared(accumulator, vector), primitives.load_shared(accumulator, 1)
    first = primitives.head(accumulator, sums_count, result_access)
    turn = primitives.rotate(accumulator, sums_count, result_access)
    convert = primitives.convert(accumulator, epilogue, result_access)
    scale = primitives.scale(epilogue, result_access)
    add = primitives.add(epilogue, result_access)
    load_result = primitives.load_vector(result_dtype, result_access, epilogue)
    store_result = primitives.store_vector(result_dtype, result_access, epilogue)

    has_sums, of_left = bool(sums_of), sums_of == "left"
    summed = left_copy if of_left else right_copy
    share = tile_share(summed)
    add_tile, no_sums = primitives.add_tile(share), primitives.zeros(accumulator, share.groups * vector)
    first_sums = primitives.head(accumulator, share.groups * vector, vector)
    turn_sums = primitives.rotate(accumulator, share.groups * vector, vector)
    add_sum, no_sum = primitives.add(accumulator, 1), primitives.zeros(accumulator, 1)
    store_sum = primitives.store_vector(accumulator, 1, accumulator)
    sums_outer = summed.outer_size

    @primitives.jit(threads, blocks_per_multiprocessor)
    def matmul_simt(left, left_stride, right, right_stride, result, row_stride, col_stride, part_stride, rows, cols, depth,
                    depth_per_part, group_bits, alpha,
                    depth_sums, sums_stride):
        thread = cuda.threadIdx.x

        # 1. This block's tile of the result, and its part of the depth. Blocks below the result have nothing to do.
        row = ((cuda.blockIdx.y << group_bits) + (cuda.blockIdx.x & ((1 << group_bits) - 1))) * tile_rows
        col = (cuda.blockIdx.x >> group_bits) * tile_cols
        part = cuda.blockIdx.z
        start = part * depth_per_part
        depth_left = int32(min(depth_per_part, depth - start) if row < rows else 0)

        # 2. This thread's place in the tile: warps across, then down; lanes likewise within a warp.
        lane, its_warp = thread % warp, thread // warp
        down = its_warp // warps_across * warp_down + lane // warp_across
        across = its_warp % warps_across * warp_across + lane % warp_across

        # 3. The first tiles are in stage 0 of shared memory.
        left_tiles, right_tiles = left_shared(), right_shared()
        left_at = left_place(left, row * left_stride + start if left_along_depth else row + start * left_stride)
        right_at = right_place(right, col * right_stride + start if right_along_depth else col + start * right_stride)
        left_step = tile_depth * item_bytes * (1 if left_along_depth else left_stride)
        right_step = tile_depth * item_bytes * (1 if right_along_depth else right_stride)
        left_offsets, right_offsets = left_places(left_stride, thread), right_places(right_stride, thread)
        rows_left, cols_left = int32(min(rows - row, tile_rows)), int32(min(cols - col, tile_cols))
        left_next = load_left(left_at, left_offsets, rows_left, depth_left, thread)
        right_next = load_right(right_at, right_offsets, cols_left, depth_left, thread)
        store_left(left_tiles, 0, left_next, thread)
        store_right(right_tiles, 0, right_next, thread)
        cuda.syncthreads()

        # dL/db rides along: dZ's tile is in shared memory, and the blocks of the first tile row (or column) add it up.
        depth_total = no_sums()
        sums_here = col == 0 if of_left else row == 0

        # 4. While one stage is multiplied, the next tiles travel to registers and from there to the other stage.
        sums = zeros()
        left_now, right_now = int32(0), int32(0)
        inside = rows_left == tile_rows and cols_left == tile_cols
        least = int32(2 * tile_depth if inside else ENDLESS)
        while depth_left >= least:
            depth_left = int32(depth_left - tile_depth)
            left_at += left_step
            right_at += right_step
            left_next = load_whole_left(left_at, left_offsets, thread)
            right_next = load_whole_right(right_at, right_offsets, thread)
            if has_sums and sums_here:
                depth_total = add_tile(left_tiles if of_left else right_tiles,
                                       left_now if of_left else right_now, depth_total, thread)
            sums = multiply(left_tiles, left_now + down * vector, right_tiles, right_now + across * vector, sums)
            left_now, right_now = int32(left_stage - left_now), int32(right_stage - right_now)
            store_left(left_tiles, left_now, left_next, thread)
            store_right(right_tiles, right_now, right_next, thread)
            cuda.syncthreads()

        # 5. The same where tiles are cut off by an edge; warps beyond it rest, and after the last there is nothing to load.
        works = its_warp // warps_across * warp_down * vector < rows_left
        works = works and its_warp % warps_across * warp_across * vector < cols_left
        while depth_left > 0:
            depth_left = int32(depth_left - tile_depth)
            left_at += left_step
            right_at += right_step
            left_next = load_left(left_at, left_offsets, rows_left, depth_left, thread)
            right_next = load_right(right_at, right_offsets, cols_left, depth_left, thread)
            if has_sums and sums_here:
                depth_total = add_tile(left_tiles if of_left else right_tiles,
                                       left_now if of_left else right_now, depth_total, thread)
            if works:
                sums = multiply(left_tiles, left_now + down * vector, right_tiles, right_now + across * vector, sums)
            left_now, right_now = int32(left_stage - left_now), int32(right_stage - right_now)
            store_left(left_tiles, left_now, left_next, thread)
            store_right(right_tiles, right_now, right_next, thread)
            cuda.syncthreads()

        # 6. Shared memory is free again: threads that took the same columns at other depths meet there.
        if has_sums:
            for group in range(share.groups):
                if thread < share.across * share.depths:
                    place = thread // share.across * sums_outer + (thread % share.across * share.groups + group) * vector
                    stage_vector(left_tiles if of_left else right_tiles, place, first_sums(depth_total))
                depth_total = turn_sums(depth_total)
            cuda.syncthreads()
            begin, end = (row, rows) if of_left else (col, cols)
            for outer in range(thread, sums_outer if sums_here else 0, threads):
                if begin + outer < end:
                    total = no_sum()
                    for place in range(outer, share.depths * sums_outer, sums_outer):
                        total = add_sum(total, load_staged(left_tiles if of_left else right_tiles, place))
                    store_sum(depth_sums, part * sums_stride + begin + outer, total)
            cuda.syncthreads()

        # 7. The results at the front of `sums` are stored and turned to its end, a row of each thread after the other.
        for i in range(thread_rows):
            first_row = row + i // vector * row_spacing + i % vector
            if staged:
                # Where the result takes no vectors, its rows pass through shared memory, so that neighbouring threads
                # write neighbouring elements, from whole sectors on.
                for j in range(col_groups):
                    place = down * tile_cols + across * vector + j * col_spacing
                    stage_vector(right_tiles, place, first_vector(sums))
                    sums = turn_vector(sums)
                cuda.syncthreads()
                for line in range(thread // liners, lanes_down, threads // liners):
                    index = (first_row + line * vector) * row_stride + col * col_stride
                    shift = (int(result) // result_bytes + index) % sector
                    for start_c in range(-shift, cols_left, liners):
                        c = start_c + thread % liners
                        if 0 <= c < cols_left and first_row + line * vector < rows:
                            value = scale(convert(load_staged(right_tiles, line * tile_cols + c)), alpha)
                            if accumulate:
                                value = add(value, load_result(result, index + c * col_stride))
                            store_result(result, index + c * col_stride, value)
                cuda.syncthreads()
            else:
                r = first_row + down * vector
                for j in range(col_groups * stores):
                    c = col + j // stores * col_spacing + across * vector + j % stores * result_access
                    if r < rows and c < cols:
                        index = part * part_stride + r * row_stride + c * col_stride
                        value = scale(convert(first(sums)), alpha)
                        if accumulate:
                            value = add(value, load_result(result, index))
                        store_result(result, index, value)
                    sums = turn(sums)

    return matmul_simt
