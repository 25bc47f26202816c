"""Matrix product of which one operand is thin: dL/dW of few inputs or outputs, dL/dX of few inputs or samples.

    result[r, c] = alpha * sum over k of left[r, k] right[k, c]      left (rows, depth), right (depth, cols), rows <= 8

The thin operand is the left one; where it is the other, the transposed product is computed. The right operand is a
matrix that is read once, so that its bytes set the time: a sum over the depth that is weighted in `rows` ways.

How the work is cut
    A block computes all rows of thread_cols * threads_across columns, for one part of the depth. Threads share its
    depths: in each step a thread reads thread_cols columns of thread_depth depths of the right operand, and all rows of
    the left one at these depths, straight into registers, and multiplies all pairs. Every load of a step is issued
    before its first product. Nothing passes through shared memory but, in the end, the sums of threads that share
    columns. A long depth is cut into parts, which add_parts adds up.
    Threads that sit side by side read memory that lies side by side: neighbouring columns where the right operand is
    contiguous across the depth, else neighbouring depths, vector by vector.
Order of additions
    A thread adds the products of its depths in ascending order: of depths that lie threads_along apart or, where the
    right operand is contiguous along the depth, of vectors of thread_cols depths that do. Then the threads that share a
    column, in ascending order, then the parts. How wide an access is does not matter.
    dL/db rides along where dZ is the right operand, in the same order.
Threads
    threads_across * threads_along.
Grid
    (tiles of columns, 1, parts).
Shared memory
    For each thread (rows + 1 if sums ride along) * thread_cols accumulators; a little more where threads that share the
    depth are neighbours, so that they meet different banks.
Bytes and flops
    Reads the right operand once, and the left one once for every tile of columns, from cache; writes rows * cols *
    parts. 2 * rows * cols * depth flops.
Edges
    What lies beyond an edge is not touched and counts as zeros.

Source: Harris, "Optimizing Parallel Reduction in CUDA", 2007; Ernst, Hager, Thies, Wellein, "Performance engineering
for real and complex tall & skinny matrix multiplication kernels on GPUs", Int. J. High Perform. Comput. Appl. 35, 2021.
"""

from numba import cuda, int32

from ..facts import number_of
from . import primitives
from .columns import add_copies, finish_column
from .primitives.factories import cache, group
from .primitives.layout import ITEM_BYTES, LANES, ThreadTile


def _cells(accumulator, count, spread, step, size):
    """The sums of threads in shared memory, and the sum of some of them."""
    return group(array=primitives.shared_array("sums", accumulator, size),
                 store=primitives.store_spread(accumulator, spread, count // spread, step),
                 add=add_copies(accumulator, False, 0))


def _finished(accumulator, epilogue):
    """What becomes of a sum that all threads have added to."""
    return group(column=finish_column(accumulator, epilogue.dtype, epilogue.accumulate),
                 number=primitives.typed(epilogue.wide))


@cache
def make_matmul_thin(constants):
    """The kernel for these numbers of threads, orientations and results."""
    (dtype, accumulator, threads_across, threads_along, thread_rows, thread_cols, thread_depth,
     blocks_per_multiprocessor, left_side, right_side, epilogue, sums_epilogue) = constants
    threads, tile_cols = threads_across * threads_along, threads_across * thread_cols

    # A thread's elements of the right operand: vectors of its contiguous axis, and single steps of the other one.
    along_depth, access, vector = right_side.along_depth, right_side.access, thread_cols
    if along_depth:
        first_of_col, first_of_depth = 1, vector
        cols = tuple(range(0, tile_cols, threads_across))
        depths = tuple(step + n for step in range(0, thread_depth * threads_along, vector * threads_along)
                       for n in range(vector))
    else:
        first_of_col, first_of_depth = access, 1
        cols = tuple(step + n for step in range(0, tile_cols, access * threads_across) for n in range(access))
        depths = tuple(range(0, thread_depth * threads_along, threads_along))
    step_depth = thread_depth * threads_along
    step_bytes = step_depth * ITEM_BYTES[dtype]
    right_tile = ThreadTile(dtype, accumulator, along_depth, access, cols, depths)
    left_tile = ThreadTile(dtype, accumulator, left_side.along_depth, left_side.access, tuple(range(thread_rows)),
                           depths)
    place_of = primitives.place(dtype)
    load_left, load_whole_left = (primitives.load_thread_tile(left_tile, True, edge) for edge in (True, False))
    load_right, load_whole_right = (primitives.load_thread_tile(right_tile, edge, edge) for edge in (True, False))

    # The products, and where the threads that share columns leave them.
    has_sums = sums_epilogue is not None
    rows_of_sums = thread_rows + has_sums
    multiply = primitives.multiply_thread_tiles(accumulator, thread_rows, thread_cols, thread_depth, has_sums)
    zeros = primitives.zeros(accumulator, rows_of_sums * thread_cols)
    neighbours = max(LANES // threads_along, 1)  # threads of a warp that have the same depths
    pitch = rows_of_sums * tile_cols
    if along_depth:
        # An odd multiple of the neighbours: the first of them spread over the banks, and they fill what is between.
        pitch = -(-pitch // neighbours) * neighbours
        pitch += neighbours * (pitch // neighbours % 2 == 0)
    spread = 1 if along_depth else access
    cells_of_threads = _cells(accumulator, rows_of_sums * thread_cols, spread, threads_across * spread,
                              threads_along * pitch)
    alpha_at = primitives.scale_at(number_of(constants), accumulator)
    finished, finished_sum = _finished(accumulator, epilogue), _finished(accumulator, sums_epilogue or epilogue)

    @primitives.jit(threads, blocks_per_multiprocessor)
    def matmul_thin(left, left_stride, right, right_stride, result, result_down, result_across, part_stride, rows, cols,
                    depth, depth_per_part, group_bits, alpha, alpha_address, depth_sums, depth_sums_step,
                    depth_sums_part_stride):
        thread = cuda.threadIdx.x

        # 1. This block's columns and part of the depth, and this thread's first column and depth of them.
        col, part = cuda.blockIdx.x * tile_cols, cuda.blockIdx.z
        start = part * depth_per_part
        depth_left, cols_left = int32(min(depth_per_part, depth - start)), int32(min(cols - col, tile_cols))
        across = int32(thread // threads_along if along_depth else thread % threads_across)
        along = int32(thread % threads_along if along_depth else thread // threads_across)
        first_col, first_depth = int32(across * first_of_col), int32(along * first_of_depth)
        inside = cols_left == tile_cols

        # 2. sums holds this thread's share of the results, over its depths.
        at_col, at_depth = col + int(first_col), start + int(first_depth)
        left_deep = 1 if left_side.along_depth else left_stride
        across_stride, right_deep = (right_stride, 1) if along_depth else (1, right_stride)
        left_at = place_of(left, at_depth * left_deep)
        right_at = place_of(right, at_col * across_stride + at_depth * right_deep)
        sums, left_rows = zeros(), int32(rows)
        cols_left = int32(cols_left - first_col)
        while depth_left > 0:
            if inside and depth_left >= step_depth:
                rights = load_whole_right(right_at, right_stride, cols_left, depth_left)
                lefts = load_whole_left(left_at, left_stride, left_rows, depth_left)
            else:
                here = int32(depth_left - first_depth)
                rights = load_right(right_at, right_stride, cols_left, here)
                lefts = load_left(left_at, left_stride, left_rows, here)
            sums = multiply(sums, lefts, rights)
            left_at += step_bytes * left_deep
            right_at += step_bytes * right_deep
            depth_left = int32(depth_left - step_depth)

        # 3. The sums of threads that share columns lie one below the other.
        shared = cells_of_threads.array()
        cells_of_threads.store(shared, int32(along * pitch + first_col), sums, thread)
        cuda.syncthreads()

        # 4. A result is the sum of theirs.
        alpha = alpha_at(alpha, alpha_address)
        for cell in range(thread, rows_of_sums * tile_cols, threads):
            row, place = cell // tile_cols, col + cell % tile_cols
            if place < cols:
                if row < rows:
                    total = cells_of_threads.add(shared, int32(cell), int32(pitch), int32(threads_along))
                    finished.column(total, result, part * part_stride + row * result_down + place * result_across, 0,
                                    finished.number(alpha))
                elif has_sums and row == thread_rows:
                    total = cells_of_threads.add(shared, int32(cell), int32(pitch), int32(threads_along))
                    finished_sum.column(total, depth_sums, part * depth_sums_part_stride + place * depth_sums_step, 0,
                                        finished_sum.number(alpha))

    return matmul_thin
