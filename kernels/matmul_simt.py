"""Matrix product on FMA units: dL/dW = Xᵀ dZ and dL/dX = dZ Wᵀ.

    result[r, c] = alpha * sum over k of left[r, k] right[k, c]      left (rows, depth), right (depth, cols)

For dL/dW the depth is the batch: rows = in_features, cols = out_features, depth = samples. For dL/dX it is the outputs.

How the work is cut
    A block computes one tile_rows x tile_cols tile of the result for one part of the depth. It walks along the depth
    in steps of tile_depth: the two input tiles come from global memory into registers while the tiles before them, in
    shared memory, are multiplied. A thread owns thread_rows x thread_cols results in registers: for each depth it reads
    thread_rows + thread_cols numbers from shared memory and does thread_rows * thread_cols multiply-adds, which is what
    keeps the FMA units busy. Long depths (the batch of dL/dW) are cut into parts, which add_parts adds up.
Order of additions
    Each result is one chain of fused multiply-adds in ascending order of the depth, whatever the tiles are; parts are
    added in ascending order. A thread of dL/db adds every n-th depth of each tile, ascending; the n sums are added in
    ascending order, and the parts likewise. For float64 n is 4 and every chosen tile 8 deep, whatever its other sides
    are: so the bits follow from the sizes alone, and matmul_tensor_core has the same.
Threads
    (tile_rows / thread_rows) * (tile_cols / thread_cols). Warps are 4 x 8 of them, so that what they read of shared
    memory are broadcasts and whole lines; 8 x 4 where the right tile is transposed. A thread's rows and columns come in
    vectors of 16 bytes, spread over the tile.
Grid
    (tile columns * group, groups of tile rows, parts), where a group is 1 << group_bits tile rows: tiles are walked
    down a group, then across, so that the tiles in flight share operands in L2.
Shared memory
    2 stages * tile_depth * (tile_rows + tile_cols) accumulators: one stage is multiplied while the other is filled.
    Operands contiguous along the depth are transposed on the way in, in deep tiles two depths at a time, which halves
    the stores; see primitives.layout for how that avoids conflicts. In the end the results of rows that take no vectors
    pass through it, too.
The main loop
    Besides 512 (or 2048) multiply-adds it should hold loads, stores and a barrier only. So all of a thread's accesses
    lie at constant distances from one place in each operand, which is one multiply-add away from that of the first
    tile, and from one place in a stage for reading and one for writing; and only tiles that no edge cuts are in it.
Bytes and flops
    Reads each operand once per tile of the other axis: rows * depth * (cols / tile_cols) + depth * cols *
    (rows / tile_rows) elements; writes rows * cols * parts. 2 * rows * cols * depth flops.
Edges
    Copies beyond an edge are predicated off and count as zeros. Zero times infinity is not a number, but where an edge
    of the rows or columns meets an infinity, the result lies outside and is not stored; beyond the depth both factors
    are zero. Rows of memory that do not begin with a sector of 32 bytes are turned: they are read and written from a
    sector on, and what comes before that comes last.

Source: Boehm, "How to optimize a CUDA matmul kernel for cuBLAS-like performance", 2022; the CUTLASS documentation,
"Efficient GEMM in CUDA".
"""

from numba import cuda, int32

from ..facts import number_of
from . import primitives
from .columns import finish_column
from .primitives.factories import cache, group
from .primitives.layout import ITEM_BYTES, WIDEST, Line, lanes_of, tile_copy, tile_share


def _tile(copy):
    """The tiles of an operand, on their way through registers into shared memory."""
    return group(turn=primitives.tile_turn(copy), offset=primitives.tile_offset(copy), deeper=primitives.deeper(copy),
                 load=primitives.load_tile(copy), load_whole=primitives.load_whole_tile(copy),
                 store=primitives.store_tile(copy))


def _sums_of(share, accumulator, epilogue):
    """The sums of an operand along the depth, of which threads have a share each."""
    return group(none=primitives.zeros(accumulator, share.count), add_tile=primitives.add_tile(share),
                 store=primitives.store_tile_sums(share), zero=primitives.zeros(accumulator, 1),
                 load=primitives.load_shared(accumulator, 1), add=primitives.add(accumulator, 1),
                 number=primitives.typed(epilogue.wide),
                 finish=finish_column(accumulator, epilogue.dtype, epilogue.accumulate))


def _results(accumulator, epilogue, count, access):
    """A thread's results: an access of them is scaled, added to what is there and stored, then the next turns up."""
    dtype, wide = epilogue.dtype, epilogue.wide
    return group(first=primitives.head(accumulator, count, access), turn=primitives.rotate(accumulator, count, access),
                 convert=primitives.convert(accumulator, wide, access), number=primitives.typed(wide),
                 scale=primitives.scale(wide, access), add=primitives.add(wide, access), place=primitives.place(dtype),
                 load=primitives.load_vector(dtype, access, wide), store=primitives.store_vector(dtype, access, wide))


def _lines(line, epilogue, count, thread_cols, spacing):
    """Rows of results that pass through shared memory: lines, which some lanes store each."""
    vector = WIDEST // ITEM_BYTES[line.dtype]
    return group(first_row=primitives.head(line.dtype, count, thread_cols),
                 turn=primitives.rotate(line.dtype, count, thread_cols),
                 fill=primitives.fill_line(line, thread_cols // vector, vector, spacing),
                 of=primitives.split(line.lanes), store=primitives.store_line(line, epilogue.dtype, epilogue.wide))


@cache
def make_matmul_simt(constants):
    """The kernel for these tiles, orientations and results.

    sums_of is "right" or "left" for the kernel that also adds that operand up along the depth.
    """
    (dtype, accumulator, tile_rows, tile_cols, tile_depth, thread_rows, thread_cols, blocks_per_multiprocessor,
     offset_bits, left_side, right_side, epilogue, sums_of, sums_epilogue) = constants
    lanes_down, lanes_across = tile_rows // thread_rows, tile_cols // thread_cols
    threads = lanes_down * lanes_across
    vector = WIDEST // ITEM_BYTES[accumulator]
    sums_count, stage_size = thread_rows * thread_cols, tile_depth * (tile_rows + tile_cols)
    stage_bytes = stage_size * ITEM_BYTES[accumulator]

    # Copies of tiles, and what multiplies them.
    left_along_depth, right_along_depth = left_side.along_depth, right_side.along_depth
    left_copy = tile_copy(dtype, accumulator, tile_rows, tile_depth, left_side.access, left_along_depth,
                          threads, thread_rows, offset_bits)
    right_copy = tile_copy(dtype, accumulator, tile_cols, tile_depth, right_side.access, right_along_depth,
                           threads, thread_cols, offset_bits, start=tile_depth * tile_rows)
    row_spacing, col_spacing = left_copy.layout.group_spacing, right_copy.layout.group_spacing
    left_tile, right_tile, place_of = _tile(left_copy), _tile(right_copy), primitives.place(dtype)
    lanes_of_thread = primitives.thread_lanes(lanes_of(lanes_down, lanes_across, right_copy.layout.spacing // vector))
    both_stages = primitives.shared_array("stages", accumulator, 2 * stage_size)
    multiply = primitives.multiply_tile(accumulator, tile_depth, left_copy.layout, right_copy.layout)
    zeros, again = primitives.zeros(accumulator, sums_count), primitives.again()
    turns = left_copy.turns or right_copy.turns

    # The way of the results from registers to memory, and the sums along the depth that ride along.
    access, accumulate = epilogue.access, epilogue.accumulate
    col_groups, stores = thread_cols // vector, vector // access
    through_shared = access == 1 and lanes_down * tile_cols <= 2 * stage_size
    line = Line(accumulator, tile_cols, min(32, threads, tile_cols), accumulate)
    lines, lines_at_once = _lines(line, epilogue, sums_count, thread_cols, col_spacing), threads // line.lanes
    results = _results(accumulator, epilogue, sums_count, access)
    alpha_at = primitives.scale_at(number_of(constants), accumulator)
    has_sums, of_left = bool(sums_of), sums_of == "left"
    summed = left_copy if of_left else right_copy
    share, sums_outer = tile_share(summed), summed.outer_size
    depth_sum = _sums_of(share, accumulator, sums_epilogue or epilogue)

    @primitives.jit(threads, blocks_per_multiprocessor)
    def matmul_simt(left, left_stride, right, right_stride, result, result_down, result_across, part_stride, rows, cols,
                    depth, depth_per_part, group_bits, alpha, alpha_address, depth_sums, depth_sums_step,
                    depth_sums_part_stride):
        thread = cuda.threadIdx.x

        # 1. This block's tile of the result, and its part of the depth. Blocks below the result have nothing to do.
        row = ((cuda.blockIdx.y << group_bits) + (cuda.blockIdx.x & ((1 << group_bits) - 1))) * tile_rows
        col = (cuda.blockIdx.x >> group_bits) * tile_cols
        part = cuda.blockIdx.z
        start = part * depth_per_part
        depth_here = int32(min(depth_per_part, depth - start) if row < rows else 0)
        rows_left, cols_left = int32(min(rows - row, tile_rows)), int32(min(cols - col, tile_cols))

        # 2. This thread's place in the tile, and that of its warp.
        down, across, warp_down, warp_across = lanes_of_thread(thread)
        first_row, first_col = int32(down * vector), int32(across * vector)

        # 3. The first tiles are in stage 0 of shared memory.
        left_turn = left_tile.turn(left, row, start, left_stride, thread)
        right_turn = right_tile.turn(right, col, start, right_stride, thread)
        left_at = place_of(left, row * left_stride + start if left_along_depth else row + start * left_stride)
        left_offset = left_tile.offset(left_stride, left_turn, thread)
        right_at = place_of(right, col * right_stride + start if right_along_depth else col + start * right_stride)
        right_offset = right_tile.offset(right_stride, right_turn, thread)
        stages = both_stages()
        left_next = left_tile.load(left_at, left_offset, left_stride, left_turn, rows_left, depth_here, thread)
        right_next = right_tile.load(right_at, right_offset, right_stride, right_turn, cols_left, depth_here, thread)
        left_tile.store(stages, 0, left_next, left_stride, left_turn, thread)
        right_tile.store(stages, 0, right_next, right_stride, right_turn, thread)
        cuda.syncthreads()

        # dL/db rides along: dZ's tile is in shared memory, and the blocks of the first tile row (or column) add it.
        depth_total = depth_sum.none()
        sums_here = col == 0 if of_left else row == 0

        # 4. While one stage is multiplied, the next tiles travel to registers and from there to the other stage.
        sums = zeros()
        now, done = int32(0), int32(0)
        inside = rows_left == tile_rows and cols_left == tile_cols
        last = int32(depth_here - 2 * tile_depth if inside else -1)
        while done <= last:
            done = int32(done + tile_depth)
            left_to = left_tile.deeper(left_at, done, left_stride)
            right_to = right_tile.deeper(right_at, done, right_stride)
            left_next = left_tile.load_whole(left_to, left_offset, left_stride, left_turn, thread)
            right_next = right_tile.load_whole(right_to, right_offset, right_stride, right_turn, thread)
            if has_sums and sums_here:
                depth_total = depth_sum.add_tile(stages, now, depth_total, thread)
            other = int32(stage_bytes - now)
            sums = multiply(stages, now, first_row, first_col, sums)
            left_tile.store(stages, other, left_next, left_stride, left_turn, thread)
            right_tile.store(stages, other, right_next, right_stride, right_turn, thread)
            now = other
            cuda.syncthreads()

        # 5. The same where an edge cuts tiles off; warps beyond it rest, and after the last tile nothing is loaded.
        # Where the thread is in the tile is computed again, so that it took no registers up to here.
        thread = again(cuda.threadIdx.x)
        down, across, warp_down, warp_across = lanes_of_thread(thread)
        first_row, first_col = int32(down * vector), int32(across * vector)
        works = warp_down * vector < rows_left and warp_across * vector < cols_left
        while done < depth_here:
            done = int32(done + tile_depth)
            left_to = left_tile.deeper(left_at, done, left_stride)
            right_to = right_tile.deeper(right_at, done, right_stride)
            depth_left = depth_here - done
            if turns:
                # Where turned rows end is computed in each step: there are no registers for it beside the sums.
                left_turn, right_turn, thread = again(left_turn), again(right_turn), again(thread)
            left_next = left_tile.load(left_to, left_offset, left_stride, left_turn, rows_left, depth_left, thread)
            right_next = right_tile.load(right_to, right_offset, right_stride, right_turn, cols_left, depth_left,
                                         thread)
            if has_sums and sums_here:
                depth_total = depth_sum.add_tile(stages, now, depth_total, thread)
            other = int32(stage_bytes - now)
            if works:
                sums = multiply(stages, now, first_row, first_col, sums)
            left_tile.store(stages, other, left_next, left_stride, left_turn, thread)
            right_tile.store(stages, other, right_next, right_stride, right_turn, thread)
            now = other
            cuda.syncthreads()

        # Where the thread is in the tile is computed once more, for the same reason.
        alpha = alpha_at(alpha, alpha_address)
        thread = again(cuda.threadIdx.x)
        down, across, _, _ = lanes_of_thread(thread)
        first_row, first_col = int32(down * vector), int32(across * vector)

        # 6. Shared memory is free again: threads that took the same columns at other depths meet there.
        if has_sums:
            depth_sum.store(stages, depth_total, thread)
            cuda.syncthreads()
            begin, end = (row, rows) if of_left else (col, cols)
            for outer in range(thread, sums_outer if sums_here else 0, threads):
                if begin + outer < end:
                    total = depth_sum.zero()
                    for place in range(outer, share.classes * sums_outer, sums_outer):
                        total = depth_sum.add(total, depth_sum.load(stages, place))
                    depth_sum.finish(total, depth_sums,
                                     part * depth_sums_part_stride + (begin + outer) * depth_sums_step, 0,
                                     depth_sum.number(alpha))
            cuda.syncthreads()

        # 7. The results at the front of `sums` are stored and turned to its end, a row of each thread after the other.
        for i in range(thread_rows):
            below = i // vector * row_spacing + i % vector
            if through_shared:
                # Where the result takes no vectors, its rows pass through shared memory, so that neighbouring threads
                # write neighbouring elements, from whole sectors on.
                lines.fill(stages, down, first_col, lines.first_row(sums))
                sums = lines.turn(sums)
                cuda.syncthreads()
                first_line, line_lane = lines.of(again(thread))
                for number in range(first_line, lanes_down, lines_at_once):
                    r = row + number * vector + below
                    place = results.place(result, r * result_down + col * result_across)
                    lines.store(stages, number, place, result_across, line_lane, cols_left if r < rows else 0,
                                results.number(alpha))
                cuda.syncthreads()
            else:
                r = row + int(first_row) + below
                for j in range(col_groups * stores):
                    c = col + int(first_col) + j // stores * col_spacing + j % stores * access
                    if r < rows and c < cols:
                        index = part * part_stride + r * result_down + c * result_across
                        value = results.scale(results.convert(results.first(sums)), results.number(alpha))
                        if accumulate:
                            value = results.add(value, results.load(result, index))
                        results.store(result, index, value)
                    sums = results.turn(sums)

    return matmul_simt
