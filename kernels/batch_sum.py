"""Sums over the batch axis: dL/db, and the sums of its parts.

    result[m] = sum over s of source[s, m]      source (samples, outputs); for dL/db it is dZ

Four kernels. `sum_strided` adds rows whose elements lie side by side, `sum_flat` a narrow matrix without gaps as one
run, `sum_runs` the runs of outputs whose samples lie side by side; `sum_parts` adds what parts of them come to.

How the work is cut
    Every element is read once, in vectors of 16 bytes. Threads that sit side by side read memory that lies side by
    side; each keeps one chain of additions for every column of its vectors and has several vectors in flight. The
    chains of a block meet in shared memory. A long batch is cut into parts, one block each: their sums go to a
    workspace of one row for each part, which a second launch, of `sum_parts`, adds.
Alignment
    Vectors begin at multiples of 32 bytes, wherever the data begins: a row's vectors are shifted to the left by the
    elements between such a place and its first column, and whoever reads the sums in shared memory reads as many places
    to the right. Vectors that stick out of the data are read one element at a time, as far as they lie inside.
Order of additions
    Set by the plan alone. The shift decides which thread adds a column, never in which order: the same numbers give the
    same bits wherever they lie.
Bytes and flops
    Reads samples * outputs elements and, where there are parts, 2 * parts * outputs accumulators more; that many
    additions.

Source: Harris, "Optimizing Parallel Reduction in CUDA", 2007; Ogita, Rump, Oishi, "Accurate Sum and Dot Product", SIAM
J. Sci. Comput. 26, 2005 (Sum2: the same sums as Neumaier's of 1974).
"""

from numba import cuda, int32

from ..facts import number_of
from . import primitives
from .columns import add_copies, finish_column
from .primitives.factories import cache
from .primitives.layout import ITEM_BYTES, LANES, SECTOR, WIDEST

#: Parts' sums that a thread has under way.
PARTS = 16
#: Elements under way where they are picked singly: few, since that takes registers.
EDGE_ELEMENTS = 8


@cache
def make_sum_strided(constants):
    """The kernel that adds rows: source[s, m] lies at s * row_stride + m.

    Threads
        threads_x side by side, times lanes. Lane y adds the rows y, y + lanes, ... of its part, `vectors` vectors of
        each row and `in_flight` rows at a time; then the lanes are added in ascending order. Lanes are as many as 32
        bytes have elements or a multiple (or there is a row for each), so that a lane's shift is the same for all of
        its rows.
    Grid
        (tiles of columns, parts). A tile is tile_cols columns: all that a lane reads or, where rows are shifted, 32
        bytes less.
    Shared memory
        lanes * threads_x * vectors accumulators of 16 / itemsize each; twice that for compensated sums.
    """
    (dtype, accumulator, result, threads_x, lanes, vectors, in_flight, blocks_per_multiprocessor, accumulate,
     compensated, keeps_lost) = constants
    item = ITEM_BYTES[dtype]
    vector, sector = WIDEST // item, SECTOR // item
    threads, spacing = threads_x * lanes, threads_x * vector
    width = spacing * vectors
    halves = 1 + compensated
    pitch = width * halves
    zeros = primitives.zeros(accumulator, vector * vectors * halves)
    add_rows = primitives.add_vectors(dtype, vector, accumulator, in_flight, vectors, spacing, compensated)
    at_edge = min(in_flight, EDGE_ELEMENTS // vector)
    add_edge = primitives.add_inside(dtype, vector, accumulator, at_edge, vectors, spacing, compensated)
    shared_array = primitives.shared_array("lanes", accumulator, lanes * pitch)
    store_sums = primitives.store_spread(accumulator, vector, vectors * halves, spacing)
    load_sum = primitives.load_shared(accumulator, 1)
    zero = primitives.zeros(accumulator, halves)
    plus = primitives.plus(accumulator, 1, compensated)
    tidy = primitives.tidy(accumulator, vector * vectors, compensated)
    finish = finish_column(accumulator, result, accumulate, compensated, keeps_lost)
    alpha_at = primitives.scale_at(number_of(constants), accumulator)

    @primitives.jit(threads, blocks_per_multiprocessor)
    def sum_strided(source, row_stride, samples, outputs, samples_per_part, tile_cols, target, part_stride, col_stride,
                    lost_step, alpha, alpha_address):
        thread = cuda.threadIdx.x
        lane, across = thread // threads_x, thread % threads_x * vector

        # 1. This block's tile of columns and part of the rows; this lane's first row and its shift.
        tile, part = cuda.blockIdx.x * tile_cols, cuda.blockIdx.y
        start = part * samples_per_part
        end = min(samples, start + samples_per_part)
        row = start + lane
        origin = int(source) // item + tile
        shift = origin + row * row_stride & sector - 1

        # 2. sums[j] is the sum of the lane's rows in column tile - shift + across + j.
        sums = zeros()
        column = tile - shift
        inside = column >= 0 and column + width <= outputs
        column += across
        index, step = row * row_stride + column, lanes * row_stride
        left = int32((end - row + lanes - 1) // lanes)
        while left > 0:
            if inside and left >= in_flight:
                sums = add_rows(sums, source, index, step)
                index += in_flight * step
                left = int32(left - in_flight)
            else:
                sums = add_edge(sums, source, index, step, left, column, outputs)
                index += at_edge * step
                left = int32(left - at_edge)
        shared = shared_array()
        store_sums(shared, lane * pitch + across, tidy(sums), thread)
        cuda.syncthreads()

        # 3. Column tile + c is the sum of all lanes at c + their shift.
        alpha = alpha_at(alpha, alpha_address)
        for c in range(thread, min(tile_cols, outputs - tile), threads):
            total = zero()
            for y in range(lanes):
                place = y * pitch + c + (origin + (start + y) * row_stride & sector - 1)
                for half in range(halves):
                    total = plus(total, load_sum(shared, place + half * width))
            finish(total, target, part * part_stride + (tile + c) * col_stride, lost_step, alpha)

    return sum_strided


def walk_run(dtype, accumulator, in_flight, compensated, width):
    """(sums, source, index, line, position, ahead, end) -> sums plus a thread's elements of a run, line after line.

    Its first vector lies at index, `ahead` elements behind `position`, the first of the `width` places that its warp
    has side by side; those in [0, end) count. So a warp takes one way, and not one after the other.
    """
    vector = WIDEST // ITEM_BYTES[dtype]
    add_lines, add_one = (primitives.add_vectors(dtype, vector, accumulator, lines, 1, 0, compensated)
                          for lines in (in_flight, 1))
    add_edge = primitives.add_inside(dtype, vector, accumulator, 1, 1, 0, compensated)

    @cuda.jit(device=True, inline="always")
    def walk(sums, source, index, line, position, ahead, end):
        step, last = int(line), int32(end - width)
        while int32(position + ahead) < end:
            while position >= 0 and position <= int32(last - (in_flight - 1) * line):
                sums = add_lines(sums, source, index, step)
                index += in_flight * step
                position = int32(position + in_flight * line)
            if position >= 0 and position <= last:
                sums = add_one(sums, source, index, step)
            elif int32(position + ahead) < end:
                sums = add_edge(sums, source, index, step, 1, position + ahead, end)
            index += step
            position = int32(position + line)
        return sums

    return walk


def keep_line(dtype, accumulator, compensated, line_pitch):
    """(cells, place, line, across, sums, thread): keeps a thread's sums of a line that begins at place of the cells."""
    vector, sector = WIDEST // ITEM_BYTES[dtype], SECTOR // ITEM_BYTES[dtype]
    tidy = primitives.tidy(accumulator, vector, compensated)
    store = primitives.store_spread(accumulator, vector, 1 + compensated, line_pitch)

    @cuda.jit(device=True, inline="always")
    def keep(cells, place, line, across, sums, thread):
        sums = tidy(sums)
        store(cells, place + across, sums, thread)
        if across < sector:
            # What a shift has moved to the front is read behind the end, where it belongs.
            store(cells, place + line + across, sums, thread)

    return keep


def keep_fold(accumulator, compensated):
    """(cells, place, lost step, total): keeps a total and, a lost step further, what it lost."""
    values = 1 + compensated
    tidy = primitives.tidy(accumulator, 1, compensated)
    first, turn = primitives.head(accumulator, values, 1), primitives.rotate(accumulator, values, 1)
    store = primitives.store_shared(accumulator, 1)

    @cuda.jit(device=True, inline="always")
    def keep(cells, place, lost_step, total):
        total = tidy(total)
        for value in range(values):
            store(cells, place + value * lost_step, first(total))
            total = turn(total)

    return keep


@cache
def make_sum_flat(constants):
    """The kernel that adds a whole matrix in C order as one run: element i belongs to column i % period.

    Threads
        As many as the launch says: the kernel is the same for all numbers of outputs. A line is what they read at once,
        a multiple of the period: a thread meets the same columns in every line. It adds the lines of its part in
        ascending order, `in_flight` at a time. A shifted thread's first elements may belong to the line before; they
        are left out at the start of the part and made up for at its end.
    Folding
        A column's copies in a line are added by `folders` threads, each every folders-th of them, in place; then one
        adds what the folders came to.
    Grid
        (1, parts).
    Shared memory
        line_pitch accumulators, a line of most_threads and what is behind it; twice that for compensated sums.
    """
    (dtype, accumulator, result, most_threads, in_flight, line_pitch, blocks_per_multiprocessor, accumulate,
     compensated, keeps_lost) = constants
    item = ITEM_BYTES[dtype]
    vector, sector = WIDEST // item, SECTOR // item
    halves, width = 1 + compensated, LANES * vector
    zeros = primitives.zeros(accumulator, vector * halves)
    walk = walk_run(dtype, accumulator, in_flight, compensated, width)
    line_array = primitives.shared_array("line", accumulator, line_pitch * halves)
    keep_sums, keep_sum = keep_line(dtype, accumulator, compensated, line_pitch), keep_fold(accumulator, compensated)
    add_each = add_copies(accumulator, compensated, line_pitch)
    finish = finish_column(accumulator, result, accumulate, compensated, keeps_lost)
    alpha_at = primitives.scale_at(number_of(constants), accumulator)

    @primitives.jit(most_threads, blocks_per_multiprocessor)
    def sum_flat(source, length, length_per_part, period, folders, copies, target, part_stride, col_stride, lost_step,
                 alpha, alpha_address):
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        line, across = int32(threads * vector), int32(thread * vector)
        ahead = int32(across % width)

        # 1. This block's part of the run, and how far it begins behind a multiple of 32 bytes.
        part = cuda.blockIdx.y
        start = part * length_per_part
        end = int32(min(length - start, length_per_part))
        shift = int32(int(source) // item + start & sector - 1)

        # 2. sums[j] is the sum over the lines at across + j - shift, of the elements inside the part.
        sums = walk(zeros(), source, start + int(across - shift), line, int32(across - ahead - shift), ahead, end)
        cells = line_array()
        keep_sums(cells, 0, line, across, sums, thread)
        cuda.syncthreads()

        # 3. Cell f behind the shift becomes the sum of f, f + folded, ...; f % period is their column.
        folded = int32(folders * period)
        each = int32(copies)
        more = int32(line - each * folded)
        fold = thread
        while fold < folded:
            total = add_each(cells, int32(shift + fold), folded, int32(each + 1 if fold < more else each))
            keep_sum(cells, shift + fold, line_pitch, total)
            fold += threads
        cuda.syncthreads()

        # 4. A column is the sum of its folds.
        alpha = alpha_at(alpha, alpha_address)
        column = thread
        while column < period:
            total = add_each(cells, int32(shift + column), int32(period), int32(folders))
            finish(total, target, part * part_stride + column * col_stride, lost_step, alpha)
            column += threads

    return sum_flat


@cache
def make_sum_runs(constants):
    """The kernel that adds runs: element s of run r, at r * run_stride + s, is sample s of output r.

    Threads
        threads_x side by side on a run, times as many lanes as the launch says, each of which has a run of its own. A
        line is what a lane reads at once. It adds the lines of its part as sum_flat does.
    Folding
        `folders` threads add every folders-th of a line's sums, then one adds what the folders came to.
    Grid
        (groups of runs_per_block runs, parts).
    Shared memory
        For most_lanes lanes, line_pitch and folders * fold_pitch / most_lanes accumulators each; twice that for
        compensated sums. The pitches are such that accesses which are served together meet different banks.
    """
    (dtype, accumulator, result, threads_x, most_lanes, in_flight, folders, line_pitch, fold_pitch,
     blocks_per_multiprocessor, accumulate, compensated, keeps_lost) = constants
    item = ITEM_BYTES[dtype]
    vector, sector = WIDEST // item, SECTOR // item
    line, width = threads_x * vector, min(LANES, threads_x) * vector
    halves = 1 + compensated
    pitch, fold_size = line_pitch * halves, folders * fold_pitch
    # Every fold has as many places, some have one more.
    places, more = line // folders, line % folders
    zeros = primitives.zeros(accumulator, vector * halves)
    walk = walk_run(dtype, accumulator, in_flight, compensated, width)
    line_array = primitives.shared_array("lines", accumulator, most_lanes * pitch)
    fold_array = primitives.shared_array("folds", accumulator, fold_size * halves)
    keep_sums, keep_sum = keep_line(dtype, accumulator, compensated, line_pitch), keep_fold(accumulator, compensated)
    zero = primitives.zeros(accumulator, halves)
    add_places = primitives.add_shared(accumulator, places, compensated, line_pitch)
    add_place = primitives.add_shared(accumulator, 1, compensated, line_pitch)
    add_folds = primitives.add_shared(accumulator, folders, compensated, fold_size)
    finish = finish_column(accumulator, result, accumulate, compensated, keeps_lost)
    alpha_at = primitives.scale_at(number_of(constants), accumulator)

    @primitives.jit(threads_x * most_lanes, blocks_per_multiprocessor)
    def sum_runs(source, run_stride, run_length, runs, runs_per_block, length_per_part, target, part_stride, col_stride,
                 lost_step, alpha, alpha_address):
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        lanes = threads // threads_x if most_lanes > 1 else 1
        lane, across = (thread // threads_x, thread % threads_x * vector) if most_lanes > 1 else (0, thread * vector)
        ahead = int32(across % width)

        # 1. This block's part of every run, and its runs.
        part = cuda.blockIdx.y
        start = part * length_per_part
        length = int32(min(run_length - start, length_per_part))
        origin = int(source) // item + start
        first_run = cuda.blockIdx.x * runs_per_block
        alpha = alpha_at(alpha, alpha_address)
        lines, folds = line_array(), fold_array()
        base, end_run = first_run, min(first_run + runs_per_block, runs)
        while base < end_run:
            run = base + lane

            # 2. sums[j] is the sum over the lines at across + j - shift, of the elements inside the part.
            position = int32(across - ahead - (origin + run * run_stride & sector - 1))
            index = run * run_stride + start + int(position + ahead)
            sums = walk(zeros(), source, index, line, position, ahead, length if run < runs else int32(0))
            keep_sums(lines, lane * pitch, line, across, sums, thread)
            cuda.syncthreads()

            # 3. folds[f] of a lane is the sum of places f, f + folders, ... of its line.
            fold = thread
            while fold < lanes * folders:
                y, f = (fold // folders, fold % folders) if most_lanes > 1 else (0, fold)
                cell = y * pitch + f + (origin + (base + y) * run_stride & sector - 1)
                total = add_places(zero(), lines, cell, folders)
                if f < more:
                    total = add_place(total, lines, cell + places * folders, folders)
                keep_sum(folds, f * fold_pitch + y, fold_size, total)
                fold += threads
            cuda.syncthreads()

            # 4. An output is the sum of its folds.
            if thread < min(lanes, runs - base):
                total = add_folds(zero(), folds, thread, fold_pitch)
                finish(total, target, part * part_stride + (base + thread) * col_stride, lost_step, alpha)
            base += lanes

    return sum_runs


@cache
def make_sum_parts(constants):
    """The kernel that adds rows which follow one another in the workspace, row_pitch apart.

    They are few, and there is nothing else to do: what counts is that many are on their way at once.

    Threads
        As many as the launch says: lanes times tile_cols. Lane y adds the rows y, y + lanes, ... of its column, PARTS
        at a time; then a thread for each column adds the lanes in ascending order.
    Grid
        (tiles of tile_cols columns).
    Beside
        Sums that are not compensated may have a last column of another meaning, whose sum goes to a place of its own.
    Shared memory
        most_threads accumulators, twice that for compensated sums.
    """
    accumulator, result, most_threads, accumulate, compensated, has_beside = constants
    sums_array = primitives.shared_array("sums", accumulator, most_threads * (1 + compensated))
    zero = primitives.zeros(accumulator, 1 + compensated)
    load, add_rows = (primitives.load_each(accumulator, PARTS, accumulator),
                      primitives.add_each(accumulator, PARTS, compensated))
    keep_sum = keep_fold(accumulator, compensated)
    add_lanes = add_copies(accumulator, compensated, most_threads)
    finish = finish_column(accumulator, result, accumulate, compensated)
    store_beside = primitives.store_vector(accumulator, 1, accumulator)
    alpha_at = primitives.scale_at(number_of(constants), accumulator)

    @primitives.jit(most_threads)
    def sum_parts(source, row_pitch, rows, outputs, tile_cols, lanes, target, col_stride, beside, alpha,
                  alpha_address):
        thread, width = cuda.threadIdx.x, int32(tile_cols)
        lane, column = int(thread // width), cuda.blockIdx.x * tile_cols + int(thread % width)
        index, step = lane * row_pitch + column, lanes * row_pitch
        left = (rows - lane + lanes - 1) // lanes if column < outputs else 0
        total = zero()
        while left > 0:
            # No sum is -0.0, which a zero in place of a row that is not there would change.
            total = add_rows(total, load(source, index, step, left))
            index += PARTS * step
            left -= PARTS
        sums = sums_array()
        keep_sum(sums, thread, most_threads, total)
        cuda.syncthreads()
        if lane == 0 and column < outputs:
            total = add_lanes(sums, int32(thread), width, int32(lanes))
            if has_beside and column == outputs - 1:
                store_beside(beside, 0, total)
            else:
                finish(total, target, column * col_stride, 0, alpha_at(alpha, alpha_address))

    return sum_parts
