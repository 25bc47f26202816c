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
from .primitives.factories import cache, group
from .primitives.layout import ITEM_BYTES, LANES, SECTOR, WIDEST
from .weigh_samples import weight_of_sample

LOWEST, NOT_A_NUMBER = float("-inf"), float("nan")


def _logits(dtype, accumulator, count):
    """The logits of a sample: so many at a time, those at its ends, and one alone."""
    return group(whole=primitives.load_vector(dtype, count, accumulator),
                 edge=primitives.load_between(dtype, count, accumulator, LOWEST),
                 one=primitives.load_each(dtype, 1, accumulator))


def _targets(dtype, accumulator, count, targets):
    """What is held against softmax, element by element, and what a sample weighs."""
    labels, class_weights, weights = targets
    return group(labelled=primitives.labelled(accumulator, tuple(range(count)), 1),
                 smooth=primitives.smooth(accumulator, count), fill=primitives.fill(accumulator, count),
                 between=primitives.between(accumulator, count), weigh=primitives.weigh(accumulator, count, count),
                 probabilities=primitives.load_between(dtype, count, accumulator, 0.0),
                 class_weights=primitives.load_between(class_weights or accumulator, count, accumulator, 0.0),
                 label=primitives.load_integers(labels or "int64", (0,)), kept=primitives.load_integers("bool", (0,)),
                 weight=primitives.load_each(accumulator if weights in ("", "bool") else weights, 1, accumulator),
                 weight_of=weight_of_sample(accumulator, targets))


def _states(dtype, accumulator, count, over_one_lane):
    """States are (largest, total), then Q and the sum of q times what z is less than the largest."""
    merge = primitives.merge_targets(accumulator)

    def others(distance):
        return primitives.of_lane(accumulator, 4, distance)

    return group(none=primitives.no_exponentials(accumulator), no_targets=primitives.zeros(accumulator, 2),
                 both=primitives.join(accumulator, (2, 2)), front=primitives.head(accumulator, 4, 2),
                 turn=primitives.rotate(accumulator, 4, 2), add=primitives.add_exponentials(dtype, accumulator, count),
                 add_targets=primitives.add_targets(dtype, accumulator, count), merge=merge,
                 over_warp=over_lanes(merge, others, 0 if over_one_lane else LANES // 2),
                 load=primitives.load_shared(accumulator, 4), store=primitives.store_shared(accumulator, 4),
                 log=primitives.log_of_exponentials(accumulator))



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
    logits, target_of = _logits(dtype, accumulator, count), _targets(dtype, accumulator, count, targets)
    state_of = _states(dtype, accumulator, count, features_first)
    number, fill = primitives.typed(accumulator), primitives.fill(accumulator, 1)
    zero, add = primitives.zeros(accumulator, 1), primitives.add(accumulator, 1)
    divide, subtract = primitives.divide(accumulator), primitives.minus(accumulator, 1, 1)
    store = primitives.store_vector(accumulator, 1, accumulator)
    shares = adders if features_first else adders // LANES
    # One place more a sample, so that samples begin at different banks.
    pitch = 4 * (shares + 1)
    state_array = primitives.shared_array("states", accumulator, samples_of_block * pitch)
    left_array = primitives.shared_array("left", accumulator, 2 * samples_of_block)
    store_left, add_left = primitives.store_shared(accumulator, 1), primitives.add_shared(accumulator, samples_of_block)

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
            label = target_of.label(labels, sample * labels_step, 1, there, ignored)[0] if of_labels else 0
            shift = 0 if features_first else (int(z) // item + start) % (SECTOR // item)
            state = state_of.both(state_of.none(), state_of.no_targets())
            for vector in range(adder, (outputs + shift + count - 1) // count if inside else 0, adders):
                position = vector * count - shift
                if position >= 0 and position + count <= outputs:
                    values = logits.whole(z, start + position * z_across)
                else:
                    values = logits.edge(z, start + position * z_across, z_across, position, outputs)
                if dense:
                    if of_labels:
                        q = target_of.labelled((label,), position, elsewhere, more)
                    else:
                        q = target_of.smooth(target_of.probabilities(
                            probabilities, sample * probabilities_down + position * probabilities_across,
                            probabilities_across, position, outputs), elsewhere, more)
                    if of_classes:
                        q = target_of.weigh(q, target_of.class_weights(class_weights, position, 1, position, outputs))
                    state = state_of.add_targets(state, values, target_of.between(q, position, outputs))
                elif with_loss and elsewhere != 0:
                    q = target_of.between(target_of.fill(elsewhere), position, outputs)
                    state = state_of.add_targets(state, values, q)
                else:
                    state = state_of.both(state_of.add(state_of.front(state), values), state_of.no_targets())
            state = state_of.over_warp(state)
            if features_first:
                state_of.store(states, row * pitch + 4 * adder, state)
            elif adder % LANES == 0:
                state_of.store(states, row * pitch + 4 * (adder // LANES), state)
            cuda.syncthreads()

            # 2. The shares are merged in ascending order, and the sample's results are written.
            sample = first + thread
            if thread < min(samples_of_block, samples - first):
                state = state_of.both(state_of.none(), state_of.no_targets())
                for share in range(shares):
                    state = state_of.merge(state, state_of.load(states, thread * pitch + 4 * share))
                found, of_targets = state_of.log(state_of.front(state)), state_of.front(state_of.turn(state))
                log_total, target_sum, lost = found[1], of_targets[0] if dense else number(1), of_targets[1]
                left_out = False
                if of_labels:
                    label = target_of.label(labels, sample * labels_step, 1, 1, ignored)[0]
                    left_out = label == ignored
                    if label < 0 or label >= outputs:
                        log_total = number(NOT_A_NUMBER)
                store(result, sample, fill(found[0]))
                store(result, samples + sample, fill(log_total))
                if dense:
                    store(result, 2 * samples + sample, fill(target_sum))
                if with_loss:
                    if not dense and label >= 0 and label < outputs and more != 0:
                        at_label = logits.one(z, sample * z_down + label * z_across, 1, 1)
                        lost += more * subtract(at_label, fill(found[0]))[0]
                    row_loss = target_sum * log_total - lost
                    if weighted:
                        row_loss *= target_of.weight(weights, sample * weights_step, 1, 1)[0]
                    if masked:
                        left_out = left_out or target_of.kept(weights, sample * weights_step, 1, 1, 0)[0] == 0
                    if left_out:
                        row_loss = number(0)
                    if each_loss:
                        store(losses, sample * losses_step, fill(row_loss))
                    loss_sum = add(loss_sum, fill(row_loss))
                if mean:
                    weight_sum = add(weight_sum, target_of.weight_of(
                        sample, labels, labels_step, class_weights, class_weights_step, weights, weights_step, ignored,
                        outputs))
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
