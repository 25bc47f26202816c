"""The sum of the parts that a split product left in a workspace.

    result[r, c] = alpha * sum over p of part[p, r, c]      (+ result[r, c]); parts (parts, rows, cols) of accumulators

How the work is cut
    A thread adds one vector of 16 bytes of every part, in ascending order, in_flight parts at a time. Part p of element
    (r, c) lies at p * part_stride + r * row_pitch + c of the workspace, row_pitch a multiple of 16 bytes. The result is
    stored `access` columns at a time: more than one only where they lie side by side and all of it is aligned to that.
Threads
    One for each vector of a row.
Grid
    As many blocks as that takes.
Bytes and flops
    Reads parts * rows * row_pitch accumulators, writes rows * cols results; as many additions as it reads.

Source: Harris, "Optimizing Parallel Reduction in CUDA", 2007.
"""

from numba import cuda

from . import primitives
from .primitives.factories import cache
from .primitives.layout import ITEM_BYTES, WIDEST


@cache
def make_add_parts(constants):
    """The kernel for these types."""
    accumulator, (result, access, wide, accumulate), threads, in_flight = constants
    vector = WIDEST // ITEM_BYTES[accumulator]
    zeros = primitives.zeros(accumulator, vector)
    add_all = primitives.add_vectors(accumulator, vector, accumulator, in_flight)
    add_edge = primitives.add_inside(accumulator, vector, accumulator, in_flight)
    convert = primitives.convert(accumulator, wide, vector)
    plus, scale = primitives.plus(wide, access, False), primitives.scale(wide, access)
    first, turn = primitives.head(wide, vector, access), primitives.rotate(wide, vector, access)
    alpha_at = primitives.scale_at(wide, accumulator)
    load, store = primitives.load_vector(result, access, wide), primitives.store_vector(result, access, wide)

    @primitives.jit(threads)
    def add_parts(workspace, parts, part_stride, row_pitch, target, target_down, target_across, rows, cols, alpha,
                  alpha_address):
        # 1. This thread's row and first column.
        item = cuda.blockIdx.x * threads + cuda.threadIdx.x
        vectors = row_pitch // vector
        row = item // vectors
        col = (item - row * vectors) * vector
        if row < rows:
            # 2. sums is the sum of the parts.
            sums = zeros()
            index, left = row * row_pitch + col, parts
            while left > 0:
                if left >= in_flight and col + vector <= cols:
                    sums = add_all(sums, workspace, index, part_stride)
                else:
                    sums = add_edge(sums, workspace, index, part_stride, left, col, cols)
                index += in_flight * part_stride
                left -= in_flight

            # 3. The results at the front of `values` are stored and turned to its end.
            values = convert(sums)
            alpha = alpha_at(alpha, alpha_address)
            for c in range(col, min(col + vector, cols), access):
                place = row * target_down + c * target_across
                value = scale(first(values), alpha)
                if accumulate:
                    value = plus(value, load(target, place))
                store(target, place, value)
                values = turn(values)

    return add_parts
