"""What cross-entropy needs of every sample whose row no block can hold, from a first reading of its logits.

    result[0, s] = max over m of z[s, m]                                     all matrices (samples, outputs)
    result[1, s] = log(sum over m of exp(z[s, m] - result[0, s]))            not a number if the label is no class
    result[2, s] = Q[s] = sum over m of q[s, m]                              as in cross_entropy, if not always 1
    loss[s]      = weight[s] (Q[s] result[1, s] + sum over m of q[s, m] (result[0, s] - z[s, m]))
                   of which the label's part is taken as result[0, s] - z[s, label] where targets need no sum

and what each block's samples weigh, for the divisor of a mean, and their losses.

How the work is cut
    A block has a few samples at a time, and `adders` threads for each: thread a takes the vectors a, a + adders, ... of
    16 bytes, of which the first begins where 32 bytes of memory do, whatever the row does: those at its ends are read
    element by element. It keeps the largest value so far and the sum of the exponentials of what the others are less
    than it; where they are asked for, also the sums of q and of q times what the values are less than it. Where samples
    lie side by side, a thread takes one output after another. The threads that lie side by side are those of one sample
    where its outputs are contiguous, else those of neighbouring samples: memory is read in whole lines. The lanes of
    warps are merged in pairs, what is left in order.
Threads
    adders * samples of the block, whole warps.
Grid
    As many blocks as the samples take, up to 1,024; a block goes on with the samples of every gridDim-th group.
Shared memory
    4 accumulators for each warp of a sample, or each adder where samples lie side by side; 2 a sample.
Bytes and flops
    Reads samples * outputs elements once, and probabilities once; one exponential and 6 flops each.

Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from numba import cuda

from . import primitives
from .lanes import over_lanes
from .primitives.factories import cache
from .primitives.layout import ITEM_BYTES, LANES, SECTOR, WIDEST
from .weigh_samples import weight_of_sample

LOWEST, NOT_A_NUMBER = float("-inf"), float("nan")


@cache
def make_log_sum_exp(constants):
    """The kernel for these types and threads; features_first says that samples lie side by side."""
    dtype, accumulator, adders, samples_of_block, features_first, targets, loss, mean = constants
    labels, class_weights, weights = targets
    threads, item = adders * samples_of_block, ITEM_BYTES[dtype]
    count = 1 if features_first else WIDEST // item
    of_labels, of_classes, dense = labels != "", class_weights != "", targets.dense
    weighted, masked, with_loss, each_loss = weights not in ("", "bool"), weights == "bool", loss != "", loss == "each"
    leaves = mean or loss == "sum"
    number, fill = primitives.typed(accumulator), primitives.fill(accumulator, 1)
    zero, add = primitives.zeros(accumulator, 1), primitives.add(accumulator, 1)
    divide, subtract = primitives.divide(accumulator), primitives.minus(accumulator, 1, 1)
    load_all, load_edge = (primitives.load_vector(dtype, count, accumulator),
                           primitives.load_between(dtype, count, accumulator, LOWEST))
    load_element = primitives.load_each(dtype, 1, accumulator)
    between = primitives.between(accumulator, count)
    # What is held against softmax, element by element.
    labelled, smooth = (primitives.labelled(accumulator, tuple(range(count)), 1),
                        primitives.smooth(accumulator, count))
    load_probabilities = primitives.load_between(dtype, count, accumulator, 0.0)
    load_classes = primitives.load_between(class_weights or accumulator, count, accumulator, 0.0)
    weigh_classes = primitives.weigh(accumulator, count, count)
    fill_all = primitives.fill(accumulator, count)
    # States are (largest, total), then Q and the sum of q times what z is less than the largest.
    nothing, no_targets = primitives.no_exponentials(accumulator), primitives.zeros(accumulator, 2)
    add_values = primitives.add_exponentials(dtype, accumulator, count)
    add_targets, merge = primitives.add_targets(dtype, accumulator, count), primitives.merge_targets(accumulator)
    both, front, turn = (primitives.join(accumulator, (2, 2)), primitives.head(accumulator, 4, 2),
                         primitives.rotate(accumulator, 4, 2))

    def others(distance):
        return primitives.of_lane(accumulator, 4, distance)

    over_warp = over_lanes(merge, others, 0 if features_first else LANES // 2)
    shares = adders if features_first else adders // LANES
    # One place more a sample, so that samples begin at different banks.
    pitch = 4 * (shares + 1)
    state_array = primitives.shared_array("states", accumulator, samples_of_block * pitch)
    load_state, store_state = primitives.load_shared(accumulator, 4), primitives.store_shared(accumulator, 4)
    left_array = primitives.shared_array("left", accumulator, 2 * samples_of_block)
    store_left, add_left = primitives.store_shared(accumulator, 1), primitives.add_shared(accumulator, samples_of_block)
    load_label = primitives.load_integers(labels or "int64", (0,))
    load_kept = primitives.load_integers("bool", (0,))
    load_weight = primitives.load_each(weights if weighted else accumulator, 1, accumulator)
    weight_of, log_of = weight_of_sample(accumulator, targets), primitives.log_of_exponentials(accumulator)
    store = primitives.store_vector(accumulator, 1, accumulator)

    @primitives.jit(threads)
    def log_sum_exp(z, z_down, z_across, probabilities, probabilities_down, probabilities_across, labels, labels_step,
                    class_weights, class_weights_step, weights, weights_step, losses, losses_step, left, ignored,
                    smoothing, samples, outputs, result):
        thread, block, blocks = cuda.threadIdx.x, cuda.blockIdx.x, cuda.gridDim.x
        if features_first:
            row, adder = thread % samples_of_block, thread // samples_of_block
        else:
            row, adder = thread // adders, thread % adders
        elsewhere = divide(number(smoothing), number(outputs))
        more = number(1) - number(smoothing)
        states, weight_sum, loss_sum = state_array(), zero(), zero()
        for first in range(block * samples_of_block, samples, blocks * samples_of_block):
            # 1. This thread's share of its sample; one beyond the last adds nothing.
            sample = first + row
            inside = sample < samples
            there = 1 if inside else 0
            start = sample * z_down
            label = load_label(labels, sample * labels_step, 1, there, ignored)[0] if of_labels else 0
            shift = 0 if features_first else (int(z) // item + start) % (SECTOR // item)
            state = both(nothing(), no_targets())
            for vector in range(adder, (outputs + shift + count - 1) // count if inside else 0, adders):
                position = vector * count - shift
                if position >= 0 and position + count <= outputs:
                    values = load_all(z, start + position * z_across)
                else:
                    values = load_edge(z, start + position * z_across, z_across, position, outputs)
                if dense:
                    if of_labels:
                        q = labelled((label,), position, elsewhere, more)
                    else:
                        q = smooth(load_probabilities(
                            probabilities, sample * probabilities_down + position * probabilities_across,
                            probabilities_across, position, outputs), elsewhere, more)
                    if of_classes:
                        q = weigh_classes(q, load_classes(class_weights, position, 1, position, outputs))
                    state = add_targets(state, values, between(q, position, outputs))
                elif with_loss and elsewhere != 0:
                    state = add_targets(state, values, between(fill_all(elsewhere), position, outputs))
                else:
                    state = both(add_values(front(state), values), no_targets())
            state = over_warp(state)
            if features_first:
                store_state(states, row * pitch + 4 * adder, state)
            elif adder % LANES == 0:
                store_state(states, row * pitch + 4 * (adder // LANES), state)
            cuda.syncthreads()

            # 2. The shares are merged in ascending order, and the sample's results are written.
            sample = first + thread
            if thread < min(samples_of_block, samples - first):
                state = both(nothing(), no_targets())
                for share in range(shares):
                    state = merge(state, load_state(states, thread * pitch + 4 * share))
                found, of_targets = log_of(front(state)), front(turn(state))
                log_total, target_sum, lost = found[1], of_targets[0] if dense else number(1), of_targets[1]
                left_out = False
                if of_labels:
                    label = load_label(labels, sample * labels_step, 1, 1, ignored)[0]
                    left_out = label == ignored
                    if label < 0 or label >= outputs:
                        log_total = number(NOT_A_NUMBER)
                store(result, sample, fill(found[0]))
                store(result, samples + sample, fill(log_total))
                if dense:
                    store(result, 2 * samples + sample, fill(target_sum))
                if with_loss:
                    if not dense and label >= 0 and label < outputs and more != 0:
                        at_label = load_element(z, sample * z_down + label * z_across, 1, 1)
                        lost += more * subtract(at_label, fill(found[0]))[0]
                    row_loss = target_sum * log_total - lost
                    if weighted:
                        row_loss *= load_weight(weights, sample * weights_step, 1, 1)[0]
                    if masked:
                        left_out = left_out or load_kept(weights, sample * weights_step, 1, 1, 0)[0] == 0
                    if left_out:
                        row_loss = number(0)
                    if each_loss:
                        store(losses, sample * losses_step, fill(row_loss))
                    loss_sum = add(loss_sum, fill(row_loss))
                if mean:
                    weight_sum = add(weight_sum, weight_of(sample, labels, labels_step, class_weights,
                                                           class_weights_step, weights, weights_step, ignored, outputs))
            cuda.syncthreads()

        # 3. What the block's samples weigh and lose, in ascending order.
        if leaves:
            cells = left_array()
            if thread < samples_of_block:
                store_left(cells, thread, weight_sum)
                store_left(cells, samples_of_block + thread, loss_sum)
            cuda.syncthreads()
            if thread == 0:
                store(left, block, add_left(zero(), cells, 0, 1))
                store(left, blocks + block, add_left(zero(), cells, samples_of_block, 1))

    return log_sum_exp
