"""Sums over the batch axis: dL/db, and the sums of its parts.

    result[m] = sum over s of source[s, m]      source (samples, outputs); for dL/db it is dZ

Two kernels. `sum_strided` adds rows whose elements lie side by side, `sum_contiguous` adds runs along which the batch
lies side by side.

How the work is cut
    Every element is read once, in vectors of 16 bytes. Threads that sit side by side read memory that lies side by
    side; each keeps one chain of additions for every column of its vectors and has several vectors in flight. The
    chains of a block meet in shared memory. A long batch is cut into parts, one block each: their sums go to a
    workspace of one row for each part, which a second launch of `sum_strided` adds.
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

from . import primitives
from .columns import finish_column
from .primitives.factories import cache
from .primitives.layout import ITEM_BYTES, SECTOR, WIDEST

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
     compensated, partial) = constants
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
    finish = finish_column(accumulator, result, accumulate, compensated, partial)
    alpha_at = primitives.scale_at(constants.number, accumulator)

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


@cache
def make_sum_contiguous(constants):
    """The kernel that adds along runs: element i of run r belongs to column r * period + i % period.

    It lies at r * run_stride + i. With period 1 a run is one output's batch; with one run and period = outputs it is a
    whole matrix in C order.

    Threads
        threads_x side by side on a run, times lanes, each of which has a run of its own. A line is what a lane reads at
        once, a multiple of the period: a thread meets the same columns in every line. It adds the lines of its part in
        ascending order, `in_flight` at a time. A shifted thread's first elements may belong to the line before; they
        are left out at the start of the part and made up for at its end.
    Folding
        `folders` threads add every folders-th of a column's copies in a line, then one adds what the folders came to.
    Grid
        (groups of runs_per_block runs, parts).
    Shared memory
        lanes * line_pitch and folders * period * fold_pitch accumulators; twice that for compensated sums. The pitches
        are such that accesses which are served together meet different banks.
    """
    (dtype, accumulator, result, period, threads_x, lanes, in_flight, folders, line_pitch, fold_pitch,
     blocks_per_multiprocessor, accumulate, compensated, partial) = constants
    item = ITEM_BYTES[dtype]
    vector, sector = WIDEST // item, SECTOR // item
    threads, line = threads_x * lanes, threads_x * vector
    warp_width = min(32, threads_x) * vector
    folded = folders * period
    halves = 1 + compensated
    pitch, fold_size = line_pitch * halves, folded * fold_pitch
    # Every fold has as many places, some have one more.
    places, more = line // folded, line % folded
    zeros = primitives.zeros(accumulator, vector * halves)
    add_lines = primitives.add_vectors(dtype, vector, accumulator, in_flight, 1, 0, compensated)
    add_edge = primitives.add_inside(dtype, vector, accumulator, 1, 1, 0, compensated, line)
    line_array = primitives.shared_array("lines", accumulator, lanes * pitch)
    fold_array = primitives.shared_array("folds", accumulator, fold_size * halves)
    store_sums = primitives.store_spread(accumulator, vector, halves, line_pitch)
    store_sum = primitives.store_shared(accumulator, 1)
    zero = primitives.zeros(accumulator, halves)
    add_places = primitives.add_shared(accumulator, places, folded, compensated, line_pitch)
    add_place = primitives.add_shared(accumulator, 1, folded, compensated, line_pitch)
    add_folds = primitives.add_shared(accumulator, folders, period * fold_pitch, compensated, fold_size)
    tidy, tidy_one = (primitives.tidy(accumulator, count, compensated) for count in (vector, 1))
    first, turn = primitives.head(accumulator, halves, 1), primitives.rotate(accumulator, halves, 1)
    finish = finish_column(accumulator, result, accumulate, compensated, partial)
    alpha_at = primitives.scale_at(constants.number, accumulator)

    @primitives.jit(threads, blocks_per_multiprocessor)
    def sum_contiguous(source, run_stride, run_length, runs, runs_per_block, length_per_part, target, part_stride,
                       col_stride, lost_step, alpha, alpha_address):
        thread = cuda.threadIdx.x
        lane, across = (thread // threads_x, thread % threads_x * vector) if lanes > 1 else (0, thread * vector)
        ahead = int32(across % warp_width)

        # 1. This block's part of every run, and its runs.
        part = cuda.blockIdx.y
        start = part * length_per_part
        length = int32(min(run_length - start, length_per_part))
        origin = int(source) // item + start
        first_run = cuda.blockIdx.x * runs_per_block
        alpha = alpha_at(alpha, alpha_address)
        lines, folds = line_array(), fold_array()
        for base in range(first_run, min(first_run + runs_per_block, runs), lanes):
            run = base + lane

            # 2. sums[j] is the sum over the lines at across + j - shift, of the elements inside the part.
            sums = zeros()
            position = int32(across - ahead - (origin + run * run_stride & sector - 1))
            index = run * run_stride + start + int(position + ahead)
            end = length if run < runs else int32(0)
            while int32(position + ahead) < end:
                # position is that of the warp's first thread: so a warp takes one way, and not one after the other.
                if position >= 0 and int32(position + (in_flight - 1) * line + warp_width) <= end:
                    sums = add_lines(sums, source, index, line)
                    index += in_flight * line
                    position = int32(position + in_flight * line)
                else:
                    sums = add_edge(sums, source, index, line, 1, position + ahead, end)
                    index += line
                    position = int32(position + line)
            sums = tidy(sums)
            store_sums(lines, lane * pitch + across, sums, thread)
            if across < sector:
                # What a shift has moved to the front is read behind the end, where it belongs.
                store_sums(lines, lane * pitch + line + across, sums, thread)
            cuda.syncthreads()

            # 3. folds[f] of a lane is the sum of places f, f + folded, ... of its line; f % period is their column.
            for fold in range(thread, lanes * folded, threads):
                y, f = (fold // folded, fold % folded) if lanes > 1 else (0, fold)
                cell = y * pitch + f + (origin + (base + y) * run_stride & sector - 1)
                total = add_places(zero(), lines, cell)
                if f < more:
                    total = add_place(total, lines, cell + places * folded)
                total = tidy_one(total)
                for half in range(halves):
                    store_sum(folds, half * fold_size + f * fold_pitch + y, first(total))
                    total = turn(total)
            cuda.syncthreads()

            # 4. A column is the sum of its folds.
            for column in range(thread, min(lanes, runs - base) * period, threads):
                y, c = (column, 0) if period == 1 else (0, column)
                total = add_folds(zero(), folds, c * fold_pitch + y)
                finish(total, target, part * part_stride + (base * period + column) * col_stride, lost_step, alpha)

    return sum_contiguous
