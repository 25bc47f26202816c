"""What softmax needs of every sample: its largest value, and the logarithm of its sum of exponentials less that.

    result[0, s] = max over m of z[s, m]                                        z (samples, outputs)
    result[1, s] = log(sum over m of exp(z[s, m] - result[0, s]))               result (2, samples)

How the work is cut
    A block has a few samples, and `adders` threads for each: thread a adds the outputs a, a + adders, ..., keeping the
    largest value so far and the sum of the exponentials of what the others are less than it; the first thread merges
    them in order. The threads that lie side by side are those of one sample where outputs are contiguous, else those of
    neighbouring samples: memory is read in whole lines.
Threads
    adders * samples of the block.
Grid
    As many blocks as the samples take.
Shared memory
    2 accumulators a thread, and 2 a sample.
Bytes and flops
    Reads samples * outputs elements once; one exponential and 6 flops each.

Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from numba import cuda

from . import primitives
from .primitives.factories import cache


@cache
def make_log_sum_exp(constants):
    """The kernel for these types and threads; features_first says that samples lie side by side."""
    dtype, accumulator, adders, samples_of_block, features_first = constants
    threads = adders * samples_of_block
    load = primitives.load_pieces(dtype, 1, (0,), accumulator)
    nothing, exponential = primitives.no_exponentials(accumulator), primitives.exponential(accumulator)
    merge, logarithm = primitives.merge_exponentials(accumulator), primitives.log_of_exponentials(accumulator)
    # One place more a sample, so that samples begin at different banks.
    pitch = 2 * (adders + 1)
    state_array = primitives.shared_array("states", accumulator, samples_of_block * pitch)
    load_state, store_state = primitives.load_shared(accumulator, 2), primitives.store_shared(accumulator, 2)
    store = primitives.store_each(accumulator, 2, accumulator)

    @primitives.jit(threads)
    def log_sum_exp(z, z_down, z_across, samples, outputs, result):
        thread = cuda.threadIdx.x
        first = cuda.blockIdx.x * samples_of_block
        if features_first:
            row, adder = thread % samples_of_block, thread // samples_of_block
        else:
            row, adder = thread // adders, thread % adders

        # 1. This thread's share of its sample is in shared memory; one beyond the last adds nothing.
        state = nothing()
        for output in range(adder, outputs if first + row < samples else 0, adders):
            state = merge(state, exponential(load(z, (first + row) * z_down + output * z_across, 1, 1)))
        states = state_array()
        store_state(states, row * pitch + 2 * adder, state)
        cuda.syncthreads()

        # 2. The shares are merged in ascending order.
        for row in range(thread, min(samples_of_block, samples - first), threads):
            state = nothing()
            for adder in range(adders):
                state = merge(state, load_state(states, row * pitch + 2 * adder))
            store(result, first + row, samples, 2, logarithm(state))

    return log_sum_exp
