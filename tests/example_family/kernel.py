"""The squared norms of rows.

    result[r] = alpha * sum over c of source[r, c]²      (+ result[r]); source (rows, cols)

How the work is cut
    A block has a few rows and one part of their columns, and `adders` threads for each row: thread a adds the columns
    a, a + adders, ... The first of them adds what they have in ascending order and leaves it in the workspace. Blocks
    are counted as they come; the last one of its rows adds the parts, in ascending order whichever it is.
Threads
    adders * rows_of_block.
Grid
    (blocks along the rows, parts).
Shared memory
    One accumulator a thread.
Bytes and flops
    Reads rows * cols elements once and twice parts * rows accumulators; 2 flops an element.

Source: CUDA sample threadFenceReduction.
"""
from numba import cuda, int32

from densegrad.facts import number_of
from densegrad.kernels import primitives
from densegrad.kernels.columns import finish_column
from densegrad.kernels.primitives.factories import cache

from .arrivals import arrive


@cache
def make_square_norms(constants):
    """The kernel for these types and threads."""
    dtype, accumulator, result, adders, rows_of_block, accumulate = constants
    threads = adders * rows_of_block
    zero, add = primitives.zeros(accumulator, 1), primitives.add(accumulator, 1)
    load, square = primitives.load_pieces(dtype, 1, (0,), accumulator), primitives.multiply_add(accumulator, 1)
    sum_array = primitives.shared_array("sums", accumulator, threads)
    load_sum, store_sum = primitives.load_shared(accumulator, 1), primitives.store_shared(accumulator, 1)
    load_part = primitives.load_vector(accumulator, 1, accumulator)
    store_part = primitives.store_vector(accumulator, 1, accumulator)
    alpha_at = primitives.scale_at(number_of(constants), accumulator)
    finish = finish_column(accumulator, result, accumulate, False, False)

    @primitives.jit(threads)
    def square_norms(source, source_down, source_across, rows, cols, cols_per_part, partial, arrivals, target,
                     target_step, alpha, alpha_address):
        thread = cuda.threadIdx.x
        row, adder = cuda.blockIdx.x * rows_of_block + thread // adders, thread % adders
        part, parts = cuda.blockIdx.y, cuda.gridDim.y

        # 1. This thread's share of its row's part is in shared memory; one beyond the last row has nothing.
        first = part * cols_per_part
        end = min(cols, first + cols_per_part) if row < rows else first
        total = zero()
        for col in range(first + adder, end, adders):
            value = load(source, row * source_down + col * source_across, 1, 1)
            total = square(total, value, value)
        sums = sum_array()
        store_sum(sums, thread, total)
        cuda.syncthreads()

        # 2. The part's sum of each row is in the workspace, and the block is counted.
        if adder == 0 and row < rows:
            total = zero()
            for other in range(adders):
                total = add(total, load_sum(sums, thread + other))
            store_part(partial, part * rows + row, total)
        cuda.syncthreads()
        last = int32(0)
        if thread == 0 and arrive(arrivals, cuda.blockIdx.x) == parts - 1:
            last = int32(1)

        # 3. All parts of these rows are there for the block that came last.
        if cuda.syncthreads_or(last) and adder == 0 and row < rows:
            total = zero()
            for other in range(parts):
                total = add(total, load_part(partial, other * rows + row))
            finish(total, target, row * target_step, 0, alpha_at(alpha, alpha_address))

    return square_norms
