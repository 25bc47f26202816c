"""dL/dZ from what comes from above the layer, and dL/db summed on the way.

    dZ[s, m] = alpha weight[s] dA[s, m] f'(Z[s, m])                           below an activation A = f(Z)
    dZ[s, m] = alpha / divisor weight[s] (Q[s] softmax(Z[s])[m] - q[s, m])    below softmax and cross-entropy, wide rows
    result[m] = sum_alpha * sum over s of dZ[s, m]                            all matrices (samples, outputs)

alpha is for who wants dZ, which is rounded to its dtype with alpha in it; sum_alpha is for who wants the sum alone,
and is multiplied in the type of the sums.

softmax(Z[s])[m] = exp(Z[s, m] - largest[s] - log_total[s]), which log_sum_exp finds, and Q[s]; q is what cross_entropy
says. log_sum_exp leaves what its blocks' samples weigh, which makes up the divisor of a mean, and what they lose.
Samples that are left out, by their label or by a mask, have a dZ of zero whatever all else is.

How the work is cut
    One pass: every element is read once, and dZ is written while it is summed. Blocks walk down the batch like those of
    batch_sum: each has one part of it and one tile of outputs. The next elements are on their way while dZ is formed
    from those before. Parts leave their sums in a workspace, which batch_sum.sum_parts adds.
What is summed
    dZ as it is stored, rounded to its dtype: dL/db is the sum of the dZ that the caller gets.
Alignment
    Accesses are as wide as every matrix allows, up to 16 bytes. Where that is less, a thread's elements lie apart, so
    that neighbouring threads still touch neighbouring memory; the order of additions stays the same.
Threads
    threads_x side by side in memory, each with some elements, times lanes. With outputs side by side, lane y takes the
    samples y, y + lanes, ... and the lanes are added in ascending order. With samples side by side a lane is an output:
    threads_x threads fold its line of sums, one thread adds the folds.
Grid
    (tiles of outputs, parts).
Shared memory
    lanes * threads_x * elements accumulators; with samples side by side, lanes * (threads_x + 1) more.
Bytes and flops
    Reads one matrix, or two below an activation, and writes one. 3 flops an element, and 1 to 40 for f' or exp.

Source: Goodfellow, Bengio, Courville, "Deep Learning", 2016, sections 6.2 and 6.5.
"""

from numba import cuda, int32

from . import primitives
from .columns import add_copies, finish_column
from .primitives.factories import cache
from .primitives.layout import ITEM_BYTES, WIDEST

CROSS_ENTROPY = "cross_entropy"


@cache
def _absent(load):
    """In place of a loader, where there is nothing to load."""
    @cuda.jit(device=True, inline="always")
    def absent(address, index, stride, left):
        return load()

    return absent


@cache
def _load_values(dtype, accumulator, samples, together):
    """(address, index, stride, left) -> one value for each of the samples, of which so many lie together."""
    width = min(together, WIDEST // ITEM_BYTES[dtype])
    return primitives.load_pieces(dtype, width, samples[::width], accumulator)


@cuda.jit(device=True, inline="always")
def _no_labels(address, index, stride, left, absent):
    return absent


@cuda.jit(device=True, inline="always")
def _all_kept(values, labels, ignored):
    return values


@cache
def _form(constants, columns, samples):
    """What makes dZ before its weight of what is loaded; see make_upstream_sum."""
    above, dtype, accumulator, targets = constants.above, constants.dtype, constants.accumulator, constants.targets
    count = len(columns)
    if above != CROSS_ENTROPY:
        backward = primitives.backward(above, dtype, accumulator, count)

        @cuda.jit(device=True, inline="always")
        def form(gradient, z, largest, log_total, target_sum, labels, class_weights, output, elsewhere, parameter):
            return backward(gradient, z, parameter)

        return form

    minus, subtract = (primitives.minus(accumulator, count, each) for each in (samples, count))
    exponentials = primitives.exponentials(dtype, accumulator, count, samples)
    labelled, smooth = primitives.labelled(accumulator, columns, samples), primitives.smooth(accumulator, count)
    weigh, weigh_classes = (primitives.weigh(accumulator, count, each)
                            for each in (samples, 1 if constants.features_first else count))
    number, of_labels, of_classes, dense = (primitives.typed(accumulator), targets.labels != "",
                                            targets.class_weights != "", targets.dense)

    @cuda.jit(device=True, inline="always")
    def form(gradient, z, largest, log_total, target_sum, labels, class_weights, output, elsewhere, parameter):
        if of_labels:
            q = labelled(labels, output, elsewhere, number(1) - parameter)
        else:
            q = smooth(gradient, elsewhere, number(1) - parameter)
        if of_classes:
            q = weigh_classes(q, class_weights)
        values = exponentials(minus(z, largest), log_total)
        if dense:
            values = weigh(values, target_sum)
        return subtract(values, q)

    return form


@cache
def _sum_left(accumulator, threads):
    """(cells, address, first, count, thread) -> the sum of so many numbers there, for every thread."""
    zero, add = primitives.zeros(accumulator, 1), primitives.add(accumulator, 1)
    load, store = primitives.load_vector(accumulator, 1, accumulator), primitives.store_shared(accumulator, 1)
    add_cells = add_copies(accumulator, False, 0)

    @cuda.jit(device=True, inline="always")
    def sum_left(cells, address, first, count, thread):
        total = zero()
        for item in range(thread, count, threads):
            total = add(total, load(address, first + item))
        store(cells, thread, total)
        cuda.syncthreads()
        total = add_cells(cells, int32(0), int32(1), int32(min(threads, count)))
        cuda.syncthreads()
        return total

    return sum_left


@cache
def make_upstream_sum(constants):
    """The kernel for what lies above the layer: the name of an activation, or CROSS_ENTROPY.

    A thread has `elements`, and an access takes `width` of them. Weights of dtype "bool" choose samples: the others'
    dZ is zero, whatever their gradients are.
    """
    (above, dtype, accumulator, result, elements, width, threads_x, lanes, features_first, blocks_per_multiprocessor,
     targets, weights_width, mean, with_loss, accumulate) = constants
    labels, class_weights, weights = targets
    threads, spacing, line = threads_x * lanes, threads_x * width, threads_x * elements
    tile, step = (lanes, line) if features_first else (line, lanes)
    pieces = tuple(piece * spacing for piece in range(elements // width))
    places = tuple(piece + element for piece in pieces for element in range(width))
    # Which of a thread's elements need a sample's value each, and how far their outputs lie apart.
    of_samples, columns = (places, (0,) * elements) if features_first else ((0,), places)
    has_totals, has_z, dense = above == CROSS_ENTROPY, above != "identity", above == CROSS_ENTROPY and targets.dense
    has_gradient, of_classes = not has_totals or labels == "", class_weights != ""
    zeros = primitives.zeros(accumulator, elements)
    load = primitives.load_pieces(dtype, width, pieces, accumulator)
    load_gradient = load if has_gradient else _absent(zeros)
    load_z = load if has_z else _absent(zeros)
    load_total = _load_values(accumulator, accumulator, of_samples, width if features_first else 1) if (
        has_totals) else _absent(primitives.zeros(accumulator, len(of_samples)))
    of_outputs = (0,) if features_first else places
    load_classes = primitives.load_row(class_weights or accumulator, 1, of_outputs, accumulator)
    no_classes = primitives.zeros(accumulator, len(of_outputs))
    load_labels = primitives.load_integers(labels, of_samples) if labels else _no_labels
    weighted, chosen = weights not in ("", "bool"), weights == "bool"
    load_weights = _load_values(weights if weighted else accumulator, accumulator, of_samples, weights_width)
    load_chosen = primitives.load_integers("bool", of_samples)
    weigh = primitives.weigh(accumulator, elements, len(of_samples))
    leave_out = primitives.leave_out(accumulator, elements, len(of_samples))
    leave_out_labels = leave_out if labels else _all_kept
    form, divide = _form(constants, columns, len(of_samples)), primitives.divide(accumulator)
    scale, rounded = primitives.scale(accumulator, elements), primitives.rounded(dtype, accumulator, elements)
    store, add = primitives.store_pieces(dtype, width, pieces, accumulator), primitives.add(accumulator, elements)
    line_array = primitives.shared_array("lines", accumulator, lanes * line)
    fold_array = primitives.shared_array("folds", accumulator, lanes * (threads_x + 1))
    first, turn = primitives.head(accumulator, elements, width), primitives.rotate(accumulator, elements, width)
    store_sums = primitives.store_spread(accumulator, width, 1, 0)
    store_sum, zero = primitives.store_shared(accumulator, 1), primitives.zeros(accumulator, 1)
    add_lanes = primitives.add_shared(accumulator, lanes)
    add_places = primitives.add_shared(accumulator, elements)
    add_folds = primitives.add_shared(accumulator, threads_x)
    finish = finish_column(accumulator, result, accumulate)
    number, alpha_at = primitives.typed(accumulator), primitives.scale_at(constants.number, accumulator)
    # Smoothed, the target of a sample beyond the last is not zero, though its probabilities were loaded as zeros.
    beyond, inside = has_totals and labels == "" and features_first, primitives.inside(accumulator, width, pieces)
    sum_left = _sum_left(accumulator, threads)
    store_loss, scale_loss = primitives.store_vector(accumulator, 1, accumulator), primitives.scale(accumulator, 1)

    @primitives.jit(threads, blocks_per_multiprocessor)
    def upstream_sum(gradient, gradient_down, gradient_across, z, z_down, z_across, dz, dz_down, dz_across, weights,
                     weights_step, labels, labels_step, class_weights, class_weights_step, totals, left_by_blocks,
                     left_count, loss, ignored, parameter, alpha, alpha_address, sum_alpha, sum_alpha_address, samples,
                     outputs, samples_per_part, target, part_stride, col_stride):
        thread = cuda.threadIdx.x
        lane, place = thread // threads_x, thread % threads_x * width

        # 1. This block's part of the samples and tile of outputs; this thread's first element, and how many are left
        #    from there on along the axis on which its pieces lie.
        part, first_output = cuda.blockIdx.y, cuda.blockIdx.x * tile
        start = part * samples_per_part
        end = min(samples, start + samples_per_part)
        if features_first:
            sample, output = start + place, first_output + lane
            left = end - sample if output < outputs else 0
            gradient_along, z_along, dz_along = gradient_down, z_down, dz_down
        else:
            sample, output = start + lane, first_output + place
            left = outputs - output if sample < end else 0
            gradient_along, z_along, dz_along = gradient_across, z_across, dz_across

        # 2. dZ is written, and sums[j] is the sum of the thread's j-th elements; the next ones travel meanwhile.
        sums, lines, share = zeros(), line_array(), number(1)
        parameter, alpha = number(parameter), number(alpha_at(alpha, alpha_address))
        if mean:
            share = divide(number(1), sum_left(lines, left_by_blocks, 0, left_count, thread)[0])
            alpha = alpha * share
        if with_loss and part == 0 and cuda.blockIdx.x == 0:
            total = sum_left(lines, left_by_blocks, left_count, left_count, thread)
            if thread == 0:
                store_loss(loss, 0, scale_loss(total, share))
        elsewhere = divide(parameter, number(outputs))
        next_gradient = load_gradient(gradient, sample * gradient_down + output * gradient_across, gradient_along, left)
        next_z = load_z(z, sample * z_down + output * z_across, z_along, left)
        while left > 0:
            this_gradient, this_z, this_sample, this_left = next_gradient, next_z, sample, left
            sample += step
            left = left - step if features_first else left if sample < end else 0
            next_gradient = load_gradient(gradient, sample * gradient_down + output * gradient_across, gradient_along,
                                          left)
            next_z = load_z(z, sample * z_down + output * z_across, z_along, left)
            label = load_labels(labels, this_sample * labels_step, labels_step, this_left, ignored)
            of_output, target_sum = no_classes(), load_total(totals, this_sample, 1, this_left)
            largest = target_sum
            if of_classes:
                of_output = load_classes(class_weights, output, int32(min(outputs - output, line)))
            if dense:
                target_sum = load_total(totals, 2 * samples + this_sample, 1, this_left)
            values = form(this_gradient, this_z, largest, load_total(totals, samples + this_sample, 1, this_left),
                          target_sum, label, of_output, output, elsewhere, parameter)
            if weighted:
                values = weigh(values, load_weights(weights, this_sample * weights_step, weights_step, this_left))
            values = scale(values, alpha)
            if beyond:
                values = inside(values, int32(min(this_left, line)))
            if chosen:
                wanted = load_chosen(weights, this_sample * weights_step, weights_step, this_left, 0)
                values = leave_out(values, wanted, 0)
            values = leave_out_labels(values, label, ignored)
            store(dz, this_sample * dz_down + output * dz_across, dz_along, this_left, values)
            sums = add(sums, rounded(values))
        sum_alpha = alpha_at(sum_alpha, sum_alpha_address)
        for piece in range(elements // width):
            store_sums(lines, lane * line + piece * spacing + place, first(sums), thread)
            sums = turn(sums)
        cuda.syncthreads()

        # 3. An output is the sum of its lanes, or of its line, of which folds[f] has the places f, f + threads_x, ...
        if features_first:
            folds, fold = fold_array(), thread % threads_x
            store_sum(folds, lane * (threads_x + 1) + fold, add_places(zero(), lines, lane * line + fold, threads_x))
            cuda.syncthreads()
            for row in range(thread, min(lanes, outputs - first_output), threads):
                total = add_folds(zero(), folds, row * (threads_x + 1), 1)
                finish(total, target, part * part_stride + (first_output + row) * col_stride, 0, sum_alpha)
        else:
            for column in range(thread, min(line, outputs - first_output), threads):
                total = add_lanes(zero(), lines, column, line)
                finish(total, target, part * part_stride + (first_output + column) * col_stride, 0, sum_alpha)

    return upstream_sum
