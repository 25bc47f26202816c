"""dL/dZ below softmax and cross-entropy, the loss, and dL/db summed on the way, all from one reading of the logits.

    p[s, m]  = exp(z[s, m] - largest[s]) / total[s]              total[s] = sum over m of exp(z[s, m] - largest[s])
    q[s, m]  = class_weights[m] ((1 - smoothing) t[s, m] + smoothing / outputs)          t[s, m]: 1 at the label of s,
    dz[s, m] = alpha / divisor weight[s] (Q[s] p[s, m] - q[s, m])                        else 0, or its probability
    loss[s]  = weight[s] (Q[s] log(total[s]) + sum over m of q[s, m] (largest[s] - z[s, m]))
    result[m] = sum over s of dz[s, m]                 Q[s] = sum over m of q[s, m]      all matrices (samples, outputs)

The divisor is what a mean is divided by: what the samples weigh, as weigh_samples says. Samples that are left out, by
their label or by a mask, are not read: their dz and loss are zero. One whose label is no class has a dz and a loss that
are not a number.

How the work is cut
    A block takes the samples of its part in turn, as many lanes as it has at a time. The threads of a lane keep the
    row's logits in registers as they are stored: first they find the largest, then the sums, then dz, and as soon as
    dz of a piece is stored, the next row's piece begins to travel into its place. dL/db of its columns stays with each
    thread until the part is done; then the lanes are added in ascending order. Parts leave their sums in a workspace,
    and their loss behind the last output, which batch_sum.sum_parts adds.
Threads
    threads_x side by side in a row, times lanes, whole warps. A piece is 16 bytes of each thread. Sums over a row are
    those of the threads, then over the lanes of warps, then over warps, in pairs.
Grid
    (parts).
Shared memory
    For the sums of one piece, threads * 16 bytes' elements; 4 cells for each warp of a row, and one a lane.
Bytes and flops
    Reads the logits once, class probabilities twice, the second time from a cache; writes dz. Two exponentials and
    about 12 flops an element.

Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018; Szegedy et al., "Rethinking the
Inception Architecture for Computer Vision", 2016, section 7 (smoothing).
"""

from numba import cuda, int32

from ..facts import number_of
from . import primitives
from .columns import finish_column
from .lanes import over_row
from .primitives.factories import cache
from .primitives.layout import ITEM_BYTES, LANES, WIDEST
from .weigh_samples import weight_of_sample

LOWEST, NOT_A_NUMBER = float("-inf"), float("nan")
#: in place of a label that is no class
NO_CLASS = -2
#: where a record of what _target takes says how many elements are left of the row
LEFT = 5


@cache
def _look_at_sample(constants):
    """(labels, their step, weights, theirs, ignored, sample, end, outputs) -> label, weight, whether it is left out.

    The label of what is left out, or has none, is -1; one that is no class is NO_CLASS.
    """
    (labels, _, weights), number = constants.targets, primitives.typed(constants.accumulator)
    of_labels, weighted, masked = labels != "", weights not in ("", "bool"), weights == "bool"
    load_label = primitives.load_integers(labels or "int64", (0,))
    load_kept = primitives.load_integers("bool", (0,))
    load_weight = primitives.load_each(weights if weighted else constants.accumulator, 1, constants.accumulator)

    @cuda.jit(device=True, inline="always")
    def look_at(labels, labels_step, weights, weights_step, ignored, sample, end, outputs):
        label, weight, left_out = -1, number(1), sample >= end
        there = 0 if left_out else 1
        if of_labels:
            label = load_label(labels, sample * labels_step, 1, there, ignored)[0]
            left_out = left_out or label == ignored
        if weighted:
            weight = load_weight(weights, sample * weights_step, 1, there)[0]
        if masked:
            left_out = left_out or load_kept(weights, sample * weights_step, 1, there, 0)[0] == 0
        if left_out:
            label = -1
        elif label < 0 or label >= outputs:
            label = NO_CLASS
        return int32(label), weight, left_out

    return look_at


# -- of the pieces of a row


def _vector(constants):
    """Elements of a piece of one thread."""
    return WIDEST // ITEM_BYTES[constants.dtype]


def _offsets(constants, piece):
    """Of a thread's accesses of a piece, from its first element of a row."""
    line = constants.threads_x * _vector(constants)
    return tuple(range(piece * line, (piece + 1) * line, constants.threads_x * constants.width))


def _columns(constants, piece):
    """Of a thread's elements of a piece, from its first one of a row."""
    return tuple(offset + element for offset in _offsets(constants, piece) for element in range(constants.width))


@cache
def _begin(constants, first, count):
    """(address, index, left) -> so many pieces of a row as they are stored, and sums of nothing: in pairs of pairs."""
    if count == 1:
        keep = primitives.keep(constants.dtype, constants.width, _offsets(constants, first))
        zeros = primitives.zeros(constants.accumulator, _vector(constants))

        @cuda.jit(device=True, inline="always")
        def begin(address, index, left):
            return keep(address, index, left), zeros()
    else:
        half = count // 2
        begin_first, begin_second = _begin(constants, first, half), _begin(constants, first + half, half)

        @cuda.jit(device=True, inline="always")
        def begin(address, index, left):
            one, one_sums = begin_first(address, index, left)
            other, other_sums = begin_second(address, index, left)
            return (one, other), (one_sums, other_sums)

    return begin


@cache
def _walk(of_piece, constants, first, count):
    """(outputs, kept, sums, state, row) -> (kept, sums, state) after each piece's function has had its turn, in order.

    of_piece(constants, piece) makes that: (the piece as kept, its sums, state, row) -> the same three. So what belongs
    to a piece is in registers of its own, and its place is known when the kernel is compiled. Pieces that no row
    reaches are left out, by a branch that the whole grid takes alike. Beyond a branch the compiler begins no other
    piece's work: it would take more registers than there are.
    """
    if count == 1:
        one, first_column = of_piece(constants, first), _offsets(constants, first)[0]

        @cuda.jit(device=True, inline="always")
        def walk(outputs, kept, sums, state, row):
            if outputs > first_column:
                kept, sums, state = one(kept, sums, state, row)
            return kept, sums, state
    else:
        half = count // 2
        walk_first = _walk(of_piece, constants, first, half)
        walk_second = _walk(of_piece, constants, first + half, half)

        @cuda.jit(device=True, inline="always")
        def walk(outputs, kept, sums, state, row):
            one, one_sums, state = walk_first(outputs, kept[0], sums[0], state, row)
            other, other_sums, state = walk_second(outputs, kept[1], sums[1], state, row)
            return (one, other), (one_sums, other_sums), state

    return walk


@cache
def _largest(constants, piece):
    """state: the largest so far."""
    largest = primitives.largest_kept(constants.dtype, constants.accumulator)

    @cuda.jit(device=True, inline="always")
    def largest_of(kept, sums, state, row):
        return kept, sums, largest(state, kept)

    return largest_of


@cache
def _target(constants, piece):
    """(label, across, probabilities, index in these, class weights, left, elsewhere, more) -> q, of one argument.

    elsewhere is smoothing / outputs, more is 1 - smoothing; left is how many elements the row has from across on.
    """
    accumulator, vector = constants.accumulator, _vector(constants)
    offsets, columns = _offsets(constants, piece), _columns(constants, piece)
    labelled, smooth = primitives.labelled(accumulator, columns, 1), primitives.smooth(accumulator, vector)
    load = primitives.load_row(constants.dtype, constants.width, offsets, accumulator)
    load_classes = primitives.load_row(constants.targets.class_weights or accumulator, 1, columns, accumulator)
    weigh = primitives.weigh(accumulator, vector, vector)
    of_labels, of_classes = constants.targets.labels != "", constants.targets.class_weights != ""

    @cuda.jit(device=True, inline="always")
    def target(of_target):
        label, across, probabilities, index, class_weights, left, elsewhere, more = of_target
        if of_labels:
            q = labelled((label,), across, elsewhere, more)
        else:
            q = smooth(load(probabilities, index, left), elsewhere, more)
        if of_classes:
            q = weigh(q, load_classes(class_weights, across, left))
        return q

    return target


@cache
def _measure(constants, piece):
    """state: (sum of exponentials, Q, sum of q (z - largest)); row: (largest, what _target takes)."""
    accumulator, vector = constants.accumulator, _vector(constants)
    unpack, minus = primitives.kept(constants.dtype, accumulator), primitives.minus(accumulator, vector, 1)
    exponentials = primitives.exponentials(constants.dtype, accumulator, vector, 1)
    zero = primitives.zeros(accumulator, 1)
    add_each, add_products = primitives.add_each_now(accumulator, vector), primitives.weighted_sum(accumulator, vector)
    inside = primitives.inside(accumulator, constants.width, _offsets(constants, piece))
    target, dense, with_loss = _target(constants, piece), constants.targets.dense, constants.loss != ""

    @cuda.jit(device=True, inline="always")
    def measure(kept, sums, state, row):
        total, target_sum, lost = state
        largest, of_target = row
        below = minus(unpack(kept), largest)
        total = add_each(total, exponentials(below, zero()))
        if dense:
            q = inside(target(of_target), of_target[LEFT])
            target_sum = add_each(target_sum, q)
            if with_loss:
                lost = add_products(lost, q, below)
        return kept, sums, (total, target_sum, lost)

    return measure


@cache
def _lose(constants, piece):
    """state: how much less than the row's largest all elements are, and the label's; row: (largest, column, left)."""
    accumulator, vector = constants.accumulator, _vector(constants)
    unpack, minus = primitives.kept(constants.dtype, accumulator), primitives.minus(accumulator, vector, 1)
    inside = primitives.inside(accumulator, constants.width, _offsets(constants, piece))
    chosen, add = primitives.chosen(accumulator, _columns(constants, piece)), primitives.add(accumulator, 1)
    add_each = primitives.add_each(accumulator, vector, False)

    @cuda.jit(device=True, inline="always")
    def lose(kept, sums, state, row):
        everywhere, at_label = state
        largest, column, left = row
        below = minus(unpack(kept), largest)
        return kept, sums, (add_each(everywhere, inside(below, left)), add(at_label, chosen(below, column)))

    return lose


@cache
def _form(constants, piece):
    """row: (of softmax, what _target takes, where dz lies, where the next row lies); see make_cross_entropy_rows."""
    dtype, accumulator, vector = constants.dtype, constants.accumulator, _vector(constants)
    offsets = _offsets(constants, piece)
    unpack, minus = primitives.kept(dtype, accumulator), primitives.minus(accumulator, vector, 1)
    exponentials = primitives.exponentials(dtype, accumulator, vector, 1)
    subtract, scale = primitives.minus(accumulator, vector, vector), primitives.scale(accumulator, vector)
    add, rounded = primitives.add_now(accumulator, vector), primitives.rounded(dtype, accumulator, vector)
    store = primitives.store_row(dtype, constants.width, offsets, accumulator)
    keep = primitives.keep(dtype, constants.width, offsets)
    target, dense = _target(constants, piece), constants.targets.dense
    fill, minus_at = primitives.fill(accumulator, 1), primitives.minus_at(accumulator, _columns(constants, piece))
    first, last = offsets[0], _columns(constants, piece)[-1]

    @cuda.jit(device=True, inline="always")
    def form(kept, sums, state, row):
        of_softmax, of_target, of_result, of_next = row
        largest, log_total, target_sum, factor = of_softmax
        values = exponentials(minus(unpack(kept), largest), log_total)
        if dense:
            values = subtract(scale(values, target_sum), target(of_target))
        else:
            label, across, _, _, _, _, elsewhere, more = of_target
            values, column = minus(values, fill(elsewhere)), int32(label - across)
            # One thread has the label among its elements.
            if column >= first and column <= last:
                values = minus_at(values, column, more)
        values = scale(values, factor)
        address, index, left = of_result
        store(address, index, left, values)
        address, index, left = of_next
        return keep(address, index, left), add(sums, rounded(values)), state

    return form


@cache
def _leave(constants, piece):
    """row: what writes the piece's sums, each added over the lanes."""
    accumulator, lanes, width = constants.accumulator, constants.lanes, constants.width
    threads, vector = constants.threads_x * lanes, _vector(constants)
    line, spacing = constants.threads_x * vector, constants.threads_x * width
    line_array = primitives.shared_array("lines", accumulator, lanes * line)
    first, turn = primitives.head(accumulator, vector, width), primitives.rotate(accumulator, vector, width)
    store_sums = primitives.store_spread(accumulator, width, 1, 0)
    zero, add_lanes = primitives.zeros(accumulator, 1), primitives.add_shared(accumulator, lanes)
    finish = finish_column(accumulator, constants.result, constants.accumulate)
    number = primitives.typed(number_of(constants))

    @cuda.jit(device=True, inline="always")
    def leave(kept, sums, state, row):
        thread, lane, across, outputs, target, start, col_stride = row
        lines, values = line_array(), sums
        for access in range(vector // width):
            store_sums(lines, lane * line + access * spacing + across, first(values), thread)
            values = turn(values)
        cuda.syncthreads()
        for column in range(thread, min(line, outputs - piece * line), threads):
            total = add_lanes(zero(), lines, column, line)
            finish(total, target, start + (piece * line + column) * col_stride, 0, number(1))
        cuda.syncthreads()
        return kept, sums, state

    return leave


# -- kernels


@cache
def make_cross_entropy_rows(constants):
    """The kernel for these types and this cut of rows; the record of the signature says what each constant is."""
    dtype, accumulator, result, width, threads_x, lanes, pieces, targets, divisor, loss, accumulate = (  # noqa: RUF059
        constants)
    threads, warps, dense = threads_x * lanes, max(threads_x // LANES, 1), constants.targets.dense
    of_labels, with_loss, each_loss, of_part = targets.labels != "", loss != "", loss == "each", loss == "part"
    spacing, add_loss = threads_x * width, loss in ("sum", "part")
    known, counted, left_by_parts = divisor == "known", divisor == "samples", divisor == "parts"
    # A row's sums are those of exponentials, of what is lost and of targets, as many of these as are asked for.
    summed = 4 if dense else 2 if with_loss else 1
    join, front = primitives.join(accumulator, (1, 1, 1, 1)), primitives.head(accumulator, 4, summed)
    lost_at, whole_at = min(1, summed - 1), min(2, summed - 1)
    number, alpha_at = primitives.typed(accumulator), primitives.scale_at(number_of(constants), accumulator)
    divide, fill = primitives.divide(accumulator), primitives.fill(accumulator, 1)
    zero, add = primitives.zeros(accumulator, 1), primitives.add(accumulator, 1)
    scale, add_product = primitives.scale(accumulator, 1), primitives.weighted_sum(accumulator, 1)
    # The threads of a row, and those of a block, for its divisor.
    largest_of_row = over_row(accumulator, primitives.largest(accumulator), 1, threads_x)
    sums_of_row = over_row(accumulator, primitives.add(accumulator, summed), summed, threads_x)
    sum_of_block = over_row(accumulator, add, 1, threads)
    weight_of = weight_of_sample(accumulator, targets)
    load_part = primitives.load_vector(accumulator, 1, accumulator)
    find_largest, measure, lose, form, leave = (
        _walk(of_piece, constants, 0, pieces) for of_piece in (_largest, _measure, _lose, _form, _leave))
    begin, look_at = _begin(constants, 0, pieces), _look_at_sample(constants)
    two, logarithm = primitives.join(accumulator, (1, 1)), primitives.log_of_exponentials(accumulator)
    top_array = primitives.shared_array("tops", accumulator, lanes * warps)
    cell_array = primitives.shared_array("cells", accumulator, max(lanes * warps * summed, threads // LANES))
    # Each lane's loss, and the share that is multiplied by in the end: registers are for the row.
    loss_array = primitives.shared_array("losses", accumulator, lanes + 1)
    load_cell, store_cell = primitives.load_shared(accumulator, 1), primitives.store_shared(accumulator, 1)
    add_lanes = primitives.add_shared(accumulator, lanes)
    store_loss = primitives.store_vector(accumulator, 1, accumulator)

    @primitives.jit(threads)
    def cross_entropy_rows(z, z_down, z_across, dz, dz_down, dz_across, probabilities, probabilities_down,
                           probabilities_across, labels, labels_step, class_weights, class_weights_step, weights,
                           weights_step, losses, losses_step, divisors, divisors_count, ignored, smoothing, alpha,
                           alpha_address, samples, outputs, samples_per_part, target, part_stride, col_stride):
        thread = cuda.threadIdx.x
        # All of a single lane's threads have one sample: registers of warps hold what belongs to it.
        lane, across = (thread // threads_x, thread % threads_x * width) if lanes > 1 else (0, thread * width)
        tops, cells, lane_losses = top_array(), cell_array(), loss_array()

        # 1. What all of dz is multiplied by: alpha over the divisor, which is added up from the weights of all samples,
        #    or of parts of them that another launch has left.
        share = divide(number(1), number(samples)) if known else number(1)
        if counted or left_by_parts:
            total = zero()
            for item in range(thread, divisors_count, threads):
                if counted:
                    total = add(total, weight_of(item, labels, labels_step, class_weights, class_weights_step, weights,
                                                 weights_step, ignored, outputs))
                else:
                    total = add(total, load_part(divisors, item))
            share = divide(number(1), sum_of_block(cells, 0, thread, total)[0])
        if add_loss and thread == 0:
            store_cell(lane_losses, lanes, fill(share))
        factor = number(alpha_at(alpha, alpha_address)) * share
        elsewhere = divide(number(smoothing), number(outputs))
        more = number(1) - number(smoothing)

        # 2. This block's samples in turn; the first row of each lane begins to travel. Samples that are left out are
        #    not read.
        start = cuda.blockIdx.x * samples_per_part
        end = min(samples, start + samples_per_part)
        left = int32(outputs - across)
        if add_loss and across == 0:
            store_cell(lane_losses, lane, zero())
        next_label, next_weight, next_out = look_at(labels, labels_step, weights, weights_step, ignored, start + lane,
                                                    end, outputs)
        kept, sums = begin(z, (start + lane) * z_down + across, int32(0) if next_out else left)
        for first in range(start, end, lanes):
            sample = first + lane
            label, weight, left_out = next_label, next_weight, next_out
            next_label, next_weight, next_out = look_at(labels, labels_step, weights, weights_step, ignored,
                                                        sample + lanes, end, outputs)
            of_target = (label, across, probabilities, sample * probabilities_down + across, class_weights,
                         int32(0) if left_out else left, elsewhere, more)

            # 3. The row's largest logit, then the sums that need it.
            _, _, top = find_largest(outputs, kept, sums, fill(number(LOWEST)), 0)
            top = largest_of_row(tops, lane, thread, top)
            _, _, (total, target_sum, lost) = measure(outputs, kept, sums, (zero(), zero(), zero()), (top, of_target))
            column = int32(label - across)
            if with_loss and not dense and (elsewhere != 0 or (column >= 0 and column % spacing < width)):
                of_row = top, column, of_target[LEFT]
                _, _, (everywhere, at_label) = lose(outputs, kept, sums, (zero(), zero()), of_row)
                lost = add_product(add_product(zero(), fill(elsewhere), everywhere), fill(more), at_label)
            found = sums_of_row(cells, lane, thread, front(join(total, lost, target_sum, target_sum)))
            log_total = logarithm(two(top, fill(found[0])))[1]
            if of_labels and label == NO_CLASS:
                log_total = number(NOT_A_NUMBER)
            whole = found[whole_at] if dense else number(1)

            # 4. The loss, once a row.
            if with_loss:
                row_loss = weight * (whole * log_total - found[lost_at])
                if left_out:
                    row_loss = number(0)
                if each_loss:
                    if across == 0 and sample < end:
                        store_loss(losses, sample * losses_step, fill(row_loss))
                elif across == 0:
                    store_cell(lane_losses, lane, add(load_cell(lane_losses, lane), fill(row_loss)))

            # 5. dz is stored and added to the sums of its columns, and the next row takes its place. What is left out
            #    was loaded as minus infinity, which makes it zero.
            of_softmax = (top, fill(log_total), whole, weight * factor)
            if left_out:
                of_softmax = (zero(), zero(), number(0), number(0))
            kept, sums, _ = form(outputs, kept, sums, 0, (
                of_softmax, of_target, (dz, sample * dz_down + across, left if sample < end else int32(0)),
                (z, (sample + lanes) * z_down + across, int32(0) if next_out else left)))

        # 6. The loss and the sums of the part: those of the lanes in ascending order.
        part = cuda.blockIdx.x
        if add_loss:
            cuda.syncthreads()
            if thread == 0:
                total = add_lanes(zero(), lane_losses, 0, 1)
                total = scale(total, load_cell(lane_losses, lanes)[0])
                if of_part:
                    store_loss(target, part * part_stride + outputs, total)
                else:
                    store_loss(losses, 0, total)
        leave(outputs, sums, sums, 0, (thread, lane, across, outputs, target, part * part_stride, col_stride))

    return cross_entropy_rows
