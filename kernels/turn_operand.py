"""An operand as Hopper's tensor cores take float32: contiguous along the depth, in terms of tf32.

    result[o, s, t, k] = term t of source[o, 32 s + k]       source (outer, depth), result (outer, steps, terms, 32)

The first term is the number rounded to the 11 significant bits of tf32; of two, the second is what is left of it,
rounded so, too. Beyond the depth terms are zeros. outer are the rows of a product's left operand, or the columns of its
right one.

How the work is cut
    A block takes 32 outer indices and 32 depths, a step. A thread reads four depths of one outer index: where the
    source is contiguous across the depth, neighbouring lanes read neighbouring outer indices, and the numbers are
    turned through shared memory. It stores four depths of a row by 16 bytes: eight lanes have a line of 128.

        read across the depth: o = lane, k = 4 warp ..             stored: o = thread / 8, k = 4 (thread % 8) ..
Shared memory
    32 rows of 32 numbers, 36 apart: eight threads at a time write and read 16 bytes each, which lie in different banks.
Threads
    256.
Grid
    Steps of the depth, for each 32 outer indices.
Bytes and flops
    Reads the operand once and writes it `terms` times, in whole steps: outer * depth * 4 * (1 + terms) bytes.

Source: Harris, "An Efficient Matrix Transpose in CUDA C/C++", 2013; Ootomo and Yokota, "Recovering single precision
accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", 2022.
"""

from numba import cuda, int32, int64

from . import primitives
from .primitives.factories import cache
from .primitives.layout import LANES

#: outer indices and depths of a block; depths of a thread; numbers from row to row of shared memory
SIDE, FOUR, PITCH = 32, 4, 36
THREADS = SIDE * SIDE // FOUR


@cache
def make_turn_operand(constants):
    """The kernel for operands of this order, and so many terms."""
    along_depth, access, terms = constants
    load = primitives.load_pieces("float32", access, tuple(range(0, FOUR, access)), "float32")
    cell_array = primitives.shared_array("cells", "float32", SIDE * PITCH)
    store_cells, load_cells = primitives.store_shared("float32", FOUR), primitives.load_shared("float32", FOUR)
    rounded, minus = primitives.round_tf32(FOUR), primitives.minus("float32", FOUR, FOUR)
    store, quotient = primitives.store_vector("float32", FOUR, "float32"), primitives.quotient()

    @primitives.jit(THREADS, 8)
    def turn_operand(source, stride, result, pitch, outer, depth, steps):
        # 1. The step and the outer indices of this block; this thread's row and depths of the result.
        thread, block = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        group = quotient(block, int32(steps))
        step = int64(block - group * int32(steps))
        line, chunk = int32(thread // (SIDE // FOUR)), int32(thread % (SIDE // FOUR) * FOUR)
        row = int64(group) * SIDE + line

        # 2. It has the four numbers there, zeros beyond the depth.
        if along_depth:
            first = step * SIDE + chunk
            values = load(source, row * stride + first, 1, depth - first if row < outer else 0)
        else:
            lane, warp = int32(thread % LANES), int32(thread // LANES)
            first, other = step * SIDE + warp * FOUR, int64(group) * SIDE + lane
            values = load(source, first * stride + other, stride, depth - first if other < outer else 0)
            store_cells(cell_array(), int32(lane * PITCH + warp * FOUR), values)
            cuda.syncthreads()
            values = load_cells(cell_array(), int32(line * PITCH + chunk))

        # 3. Their terms are stored, a step's first terms before its second ones.
        if row < outer:
            index = row * pitch + step * (terms * SIDE) + chunk
            near = rounded(values)
            store(result, index, near)
            if terms == 2:
                store(result, index + SIDE, rounded(minus(values, near)))

    return turn_operand
