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

from ..facts import number_of
from . import primitives
from .columns import add_copies, finish_column
from .primitives.factories import cache, group
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


def _loaders(constants, pieces, places, of_samples):
    """What a thread loads for its elements, as fragments: what is absent is zero, or nothing."""
    dtype, accumulator, width = constants.dtype, constants.accumulator, constants.width
    labels, class_weights, weights = constants.targets
    of_outputs = (0,) if constants.features_first else places
    load, zeros = primitives.load_pieces(dtype, width, pieces, accumulator), primitives.zeros(accumulator, len(places))
    load_total = _load_values(accumulator, accumulator, of_samples, width if constants.features_first else 1)
    above_entropy = constants.above == CROSS_ENTROPY
    return group(
        gradient=_absent(zeros) if above_entropy and labels else load,
        z=_absent(zeros) if constants.above == "identity" else load,
        total=load_total if above_entropy else _absent(primitives.zeros(accumulator, len(of_samples))),
        classes=primitives.load_row(class_weights or accumulator, 1, of_outputs, accumulator),
        no_classes=primitives.zeros(accumulator, len(of_outputs)),
        labels=primitives.load_integers(labels, of_samples) if labels else _no_labels,
        weights=_load_values(weights if weights not in ("", "bool") else accumulator, accumulator, of_samples,
                             constants.weights_width),
        chosen=primitives.load_integers("bool", of_samples))


def _formed(constants, columns, pieces, samples):
    """What becomes of what was loaded: dZ, weighed, left out where it is to be, and rounded as it is stored."""
    dtype, accumulator, elements, width = (constants.dtype, constants.accumulator, constants.elements, constants.width)
    leave_out = primitives.leave_out(accumulator, elements, samples)
    return group(
        form=_form(constants, columns, samples), weigh=primitives.weigh(accumulator, elements, samples),
        scale=primitives.scale(accumulator, elements), inside=primitives.inside(accumulator, width, pieces),
        leave_out=leave_out, leave_out_labels=leave_out if constants.targets.labels else _all_kept,
        store=primitives.store_pieces(dtype, width, pieces, accumulator),
        rounded=primitives.rounded(dtype, accumulator, elements))


def _sums(constants, lanes, threads_x, line):
    """The sums of a thread's elements, and what all threads' come to in shared memory."""
    accumulator, elements, width = constants.accumulator, constants.elements, constants.width
    return group(
        none=primitives.zeros(accumulator, elements), add=primitives.add(accumulator, elements),
        first=primitives.head(accumulator, elements, width), turn=primitives.rotate(accumulator, elements, width),
        lines=primitives.shared_array("lines", accumulator, lanes * line),
        folds=primitives.shared_array("folds", accumulator, lanes * (threads_x + 1)),
        store=primitives.store_spread(accumulator, width, 1, 0), store_fold=primitives.store_shared(accumulator, 1),
        zero=primitives.zeros(accumulator, 1), add_lanes=primitives.add_shared(accumulator, lanes),
        add_places=primitives.add_shared(accumulator, elements),
        add_folds=primitives.add_shared(accumulator, threads_x),
        finish=finish_column(accumulator, constants.result, constants.accumulate))


@cache
def make_upstream_sum(constants):
    """The kernel for what lies above the layer: the name of an activation, or CROSS_ENTROPY.

    A thread has `elements`, and an access takes `width` of them. Weights of dtype "bool" choose samples: the others'
    dZ is zero, whatever their gradients are.
    """
    (above, _, accumulator, _, elements, width, threads_x, lanes, features_first, blocks_per_multiprocessor, targets, _,
     mean, with_loss, _) = constants
    labels, class_weights, weights = targets
    threads, spacing, line = threads_x * lanes, threads_x * width, threads_x * elements
    tile, step = (lanes, line) if features_first else (line, lanes)
    pieces = tuple(piece * spacing for piece in range(elements // width))
    places = tuple(piece + element for piece in pieces for element in range(width))
    # Which of a thread's elements need a sample's value each, and how far their outputs lie apart.
    of_samples, columns = (places, (0,) * elements) if features_first else ((0,), places)
    dense, of_classes = above == CROSS_ENTROPY and targets.dense, class_weights != ""
    weighted, chosen = weights not in ("", "bool"), weights == "bool"
    # Smoothed, the target of a sample beyond the last is not zero, though its probabilities were loaded as zeros.
    beyond = above == CROSS_ENTROPY and labels == "" and features_first
    load, dz_of = _loaders(constants, pieces, places, of_samples), _formed(constants, columns, pieces, len(of_samples))
    db, sum_left = _sums(constants, lanes, threads_x, line), _sum_left(accumulator, threads)
    number, alpha_at = primitives.typed(accumulator), primitives.scale_at(number_of(constants), accumulator)
    divide, again = primitives.divide(accumulator), primitives.again()
    store_loss, scale_loss = primitives.store_vector(accumulator, 1, accumulator), primitives.scale(accumulator, 1)

    @primitives.jit(threads, blocks_per_multiprocessor)
    def upstream_sum(gradient, gradient_down, gradient_across, z, z_down, z_across, dz, dz_down, dz_across, weights,
                     weights_step, labels, labels_step, class_weights, class_weights_step, totals, left_by_blocks,
                     left_count, loss, ignored, parameter, alpha, alpha_address, sum_alpha, sum_alpha_address, samples,
                     outputs, samples_per_part, target, part_stride, col_stride):
        thread = cuda.threadIdx.x
        lane, across = thread // threads_x, thread % threads_x * width

        # 1. This block's part of the samples and tile of outputs; this thread's first element, and how many are left
        #    from there on along the axis on which its pieces lie.
        part, first_output = cuda.blockIdx.y, cuda.blockIdx.x * tile
        start = part * samples_per_part
        end = min(samples, start + samples_per_part)
        if features_first:
            sample, output = start + across, first_output + lane
            left = end - sample if output < outputs else 0
            gradient_along, z_along, dz_along = gradient_down, z_down, dz_down
        else:
            sample, output = start + lane, first_output + across
            left = outputs - output if sample < end else 0
            gradient_along, z_along, dz_along = gradient_across, z_across, dz_across

        # 2. dZ is written, and sums[j] is the sum of the thread's j-th elements; the next ones travel meanwhile.
        sums, lines, share = db.none(), db.lines(), number(1)
        parameter, alpha = number(parameter), number(alpha_at(alpha, alpha_address))
        if mean:
            share = divide(number(1), sum_left(lines, left_by_blocks, 0, left_count, thread)[0])
            alpha = alpha * share
        if with_loss and part == 0 and cuda.blockIdx.x == 0:
            total = sum_left(lines, left_by_blocks, left_count, left_count, thread)
            if thread == 0:
                store_loss(loss, 0, scale_loss(total, share))
        elsewhere = divide(parameter, number(outputs))
        next_gradient = load.gradient(gradient, sample * gradient_down + output * gradient_across, gradient_along, left)
        next_z = load.z(z, sample * z_down + output * z_across, z_along, left)
        while left > 0:
            this_gradient, this_z, this_sample, this_left = next_gradient, next_z, sample, left
            sample += step
            left = left - step if features_first else left if sample < end else 0
            next_gradient = load.gradient(gradient, sample * gradient_down + output * gradient_across, gradient_along,
                                          left)
            next_z = load.z(z, sample * z_down + output * z_across, z_along, left)
            label = load.labels(labels, this_sample * labels_step, labels_step, this_left, ignored)
            of_output, target_sum = load.no_classes(), load.total(totals, this_sample, 1, this_left)
            largest = target_sum
            if of_classes:
                of_output = load.classes(class_weights, output, int32(min(outputs - output, line)))
            if dense:
                target_sum = load.total(totals, 2 * samples + this_sample, 1, this_left)
            values = dz_of.form(this_gradient, this_z, largest, load.total(totals, samples + this_sample, 1, this_left),
                          target_sum, label, of_output, output, elsewhere, parameter)
            if weighted:
                values = dz_of.weigh(values, load.weights(weights, this_sample * weights_step, weights_step, this_left))
            values = dz_of.scale(values, alpha)
            if beyond:
                values = dz_of.inside(values, int32(min(this_left, line)))
            if chosen:
                wanted = load.chosen(weights, this_sample * weights_step, weights_step, this_left, 0)
                values = dz_of.leave_out(values, wanted, 0)
            values = dz_of.leave_out_labels(values, label, ignored)
            dz_of.store(dz, this_sample * dz_down + output * dz_across, dz_along, this_left, values)
            sums = db.add(sums, dz_of.rounded(values))

        # Where the thread is is computed again, so that it took no registers up to here.
        sum_alpha, thread = alpha_at(sum_alpha, sum_alpha_address), again(cuda.threadIdx.x)
        lane, across = thread // threads_x, thread % threads_x * width
        for piece in range(elements // width):
            db.store(lines, lane * line + piece * spacing + across, db.first(sums), thread)
            sums = db.turn(sums)
        cuda.syncthreads()

        # 3. An output is the sum of its lanes, or of its line, of which folds[f] has the places f, f + threads_x, ...
        if features_first:
            folds, fold = db.folds(), thread % threads_x
            db.store_fold(folds, lane * (threads_x + 1) + fold,
                          db.add_places(db.zero(), lines, lane * line + fold, threads_x))
            cuda.syncthreads()
            for row in range(thread, min(lanes, outputs - first_output), threads):
                total = db.add_folds(db.zero(), folds, row * (threads_x + 1), 1)
                db.finish(total, target, part * part_stride + (first_output + row) * col_stride, 0, sum_alpha)
        else:
            for column in range(thread, min(line, outputs - first_output), threads):
                total = db.add_lanes(db.zero(), lines, column, line)
                db.finish(total, target, part * part_stride + (first_output + column) * col_stride, 0, sum_alpha)

    return upstream_sum
