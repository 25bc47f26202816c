"""Matrix product on Hopper's tensor cores: dL/dW = Xᵀ dZ and dL/dX = dZ Wᵀ in float16, bfloat16 and TF32.

    result[r, c] = alpha * sum over k of left[r, k] right[k, c]      left (rows, depth), right (depth, cols)

For dL/dW the depth is the batch: rows = in_features, cols = out_features, depth = samples. For dL/dX it is the outputs.

How the work is cut
    A piece of work is a tile of 128 x tile_cols results for one part of the depth. `workers` blocks stay on their
    multiprocessors and take pieces in turn: worker w those of numbers w, w + workers, ... Pieces are numbered part
    after part, so that blocks which work at the same time stand at about the same depth and share operands in L2; the
    tiles of a part go down a group of eight tile rows, then across. Parts are added by add_parts.
Three warpgroups
    One thread of the first brings tiles, 128 bytes deep: it waits until a stage of shared memory is empty and starts
    its copies. The two others wait until the stage is full and multiply it, 64 rows of the tile each. No thread
    computes an address of an element: a copy brings a whole box, named by its first coordinates in a tensor map, and
    what lies beyond the matrix arrives as zeros. The first warpgroup gives registers up to the others, which hold
    tile_cols / 2 sums a thread.

        first            second, third
        wait empty <---- arrive, when the products that read the stage are done
        expect bytes
        copy boxes ----> wait full (all bytes have arrived)
                         wgmma: 64 rows x tile_cols x 64 (TF32: x 32)

Barriers
    A stage has two in shared memory: full (one arrival, which says how many bytes are to come, and those bytes) and
    empty (eight arrivals, one a warp of those that multiply, and three of those that add dL/db). Both count phases, of
    which a thread remembers the parity; the first wait for an empty stage is for the phase before the first, which
    counts as ended.
Tiles in shared memory
    Lines of 128 bytes, 64 numbers: along the depth a line is a row (or column) and has 64 depths, across it a line is a
    depth and has 64 rows (or columns), and 64 lines are a box of 8 KiB. Lines of TF32 have 32 numbers, and lie along
    the depth: wgmma takes it in no other order. Chunk c of 16 bytes of line l lies at place
    c xor (l mod 8) of its line, where tensor cores look for it ("128-byte swizzle").

        along the depth                              across the depth
        line r: [k 0..7][k 8..15] ... [k 56..63]      line k: [r 0..7][r 8..15] ... [r 56..63]

    A matrix descriptor says where a tile begins, how eight lines follow eight lines (1 KiB on) and, across the depth,
    how boxes follow one another (8 KiB on). 16 depths further are 32 bytes along the depth, 16 lines across it; 8
    depths of TF32 are 32 bytes, too.
TF32
    wgmma cuts what TF32 has no bits for; so operands are rounded to its 11 significant bits before: by the copies,
    whose map says so, where float32 lies along the depth, else by turn_operand, which turns such an operand and leaves
    it in the workspace. For "tf32x3" it leaves two terms of every operand, first + second, line beside line: a stage
    has the lines of an operand's first terms, then those of its second ones. first * first goes into one set of sums,
    second * first and first * second into another, which is added at the end; where that is not a number, as beside an
    infinite operand, it counts as nothing.
Results
    Sums times alpha are rounded to the type of the result, staged in shared memory as boxes of the same form, and
    stored by bulk copies, which leave out what lies beyond the result; or, into float32, added by bulk reductions. The
    next piece's tiles arrive meanwhile. Their map has three axes: columns, rows and parts, which lie in the workspace
    one behind the other, of one row too.
Order of additions
    A part's sums begin at 0 and take 16 depths at a time, 8 of TF32, in ascending order, each step as the hardware
    adds: products and sum are aligned to the largest and cut toward zero. Neither workers nor the order of pieces
    change a bit.
dL/db
    May ride along where dZ is contiguous across the depth: three warps of the first warpgroup add its lines up, which
    lie in shared memory anyway. A thread adds a chunk of eight columns in eight lines a round: in round i of a step in
    the lines 8 g .. 8 g + 7 of g = i * shares + share, if there are so many, in ascending order. All rounds of 256
    columns take twice as long as the products of their stage, as a prototype showed. So the tiles that read the same
    columns of dZ share the rounds: sharer s of n, at most 32, takes the rounds s, s + n, ... of each part, counted
    through its steps, and no stage is held up for long. What a thread has added goes into a row of the workspace: row
    (part * n + s) * shares + share. sum_parts adds the rows in another launch, as its plan says.
Tensor maps
    Arrive as arguments, 16 integers each. The first thread of each block writes them to its own place of the workspace,
    since copies read them from global memory.
Threads
    384: three warpgroups.
Grid
    (workers,): as many as there are pieces, 132 at most, or fewer where the GPU has fewer multiprocessors.
Shared memory
    stages * 128 * (128 + tile_cols) bytes, twice that of two terms; most_staged boxes of results for each of two
    warpgroups: four, or of two terms two, which leaves room for a third stage; 16 bytes of barriers a stage, and 1 KiB
    to begin at a multiple of it.
Bytes and flops
    Reads each operand once per tile of the other axis: rows * depth * (cols / tile_cols) + depth * cols * (rows / 128)
    elements; writes rows * cols * parts. 2 * rows * cols * depth flops, three times that for "tf32x3".
Ranges
    Pieces, coordinates and steps are 32-bit integers; a plan holds rows, cols, depth and the number of pieces to that.

Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions", "Tensors", "mbarrier"; CUDA
C++ Programming Guide, "Using TMA to transfer multi-dimensional arrays"; CUTLASS,
sm90_mma_tma_gmma_ss_warpspecialized.hpp, whose copies round float32, too.
"""

from numba import cuda, int32, int64

from . import primitives
from .primitives.factories import cache, group
from .primitives.layout import GROUP_THREADS, LANES, LINE_BYTES, PIECE_BYTES

#: tile rows that are walked together, and a count of steps that none takes
GROUP, NEVER = 8, 2**31 - 1
#: of the maps that a block writes
LEFT, RIGHT, RESULT, MAPS = 0, 1, 2, 3


def _barriers(stage_bytes, arrivals):
    """Those of a stage: full when its bytes have arrived, empty after so many arrivals."""
    return group(start_full=primitives.start_barrier(1), start_empty=primitives.start_barrier(arrivals),
                 started=primitives.barriers_started(), passed=primitives.passed(), arrive=primitives.arrive(),
                 expect_stage=primitives.expect_bytes(stage_bytes))


def _maps():
    """Tensor maps: written to memory by each block, and found there."""
    return group(write=primitives.write_map(), written=primitives.maps_written(), at=primitives.map_at())


def _sums_of(kind):
    """The sums of eight columns along the depth, stored four at a time."""
    return group(none=primitives.zeros("float32", 8), add_lines=primitives.add_lines(kind),
                 first=primitives.head("float32", 8, 4), turn=primitives.rotate("float32", 8, 4),
                 store=primitives.store_vector("float32", 4, "float32"))


def _products(kind, tile_cols, left_across, right_across):
    """A warpgroup's products of a stage, and what they come to: of two terms a second set of sums is added."""
    count, split = tile_cols // 2, kind == "tf32x3"
    return group(none=primitives.zeros("float32", count),
                 multiply=primitives.multiply_tiles("tf32" if split else kind, tile_cols, left_across, right_across),
                 before_done=primitives.products_before_done(3 if split else 1), done=primitives.products_done(count),
                 join=primitives.join("float32", (count, count)), tidy=primitives.tidy("float32", count, True),
                 settle=primitives.settle("float32", count, True), scale=primitives.scale("float32", count))


def _results(target, tile_cols, at_once, pieces, accumulate):
    """Results on their way through shared memory: so many boxes at once, then the others."""
    return group(stage_first=primitives.stage_sums(target, tile_cols, 0, at_once),
                 stage_rest=primitives.stage_sums(target, tile_cols, at_once, pieces - at_once),
                 show=primitives.show_to_copies(), store_box=primitives.store_box(accumulate),
                 commit=primitives.commit_stores(), read=primitives.stores_read(), done=primitives.stores_done())


@cache
def make_matmul_hopper(constants):
    """The kernel for these tiles, orientations and results."""
    (kind, tile_rows, tile_cols, tile_depth, stages, most_staged, left_across, right_across, target, accumulate,
     sums_of, adders) = constants
    split = kind == "tf32x3"
    terms = 2 if split else 1
    left_term, right_term = tile_rows * LINE_BYTES, tile_cols * LINE_BYTES
    left_bytes = terms * left_term
    stage_bytes = left_bytes + terms * right_term
    piece_cols = LINE_BYTES // (4 if target == "float32" else 2)
    pieces = tile_cols // piece_cols
    at_once = min(pieces, most_staged)
    staged_at, staged_bytes = stages * stage_bytes, at_once * PIECE_BYTES
    full_at = staged_at + 2 * staged_bytes
    empty_at = full_at + 8 * stages

    has_sums, of_left = bool(sums_of), sums_of == "left"
    summed_size, summed_at = (tile_rows, 0) if of_left else (tile_cols, left_bytes)
    chunks = summed_size // 8
    shares = adders // chunks
    rounds = -(-8 // shares)

    shared_tiles, quotient = primitives.shared_tiles(empty_at + 8 * stages), primitives.quotient()
    barriers = _barriers(stage_bytes, 2 * GROUP_THREADS // LANES + (adders // LANES if has_sums else 0))
    map_of, copy_box = _maps(), primitives.copy_box()
    fewer, more = (72, 216) if has_sums else (24, 240)
    fewer_registers, more_registers = primitives.fewer_registers(fewer), primitives.more_registers(more)
    depth_sum, products = _sums_of(kind), _products(kind, tile_cols, left_across, right_across)
    alpha_at = primitives.scale_at("float32", "float32")
    results = _results(target, tile_cols, at_once, pieces, accumulate)
    meet, meet_warp = primitives.meet(GROUP_THREADS), primitives.meet_warp()

    @cuda.jit(device=True, inline="always")
    def piece_of_work(number, tiles_down, tiles_across, steps, steps_per_part):
        """(row, col, part, first step, end) of the piece of this number."""
        part = quotient(number, int32(tiles_down * tiles_across))
        tile = int32(number - part * tiles_down * tiles_across)
        top = int32(quotient(tile, int32(GROUP * tiles_across)) * GROUP)
        local = int32(tile - top * tiles_across)
        high = min(int32(tiles_down - top), int32(GROUP))
        across = quotient(local, high)
        first = int32(part * steps_per_part)
        return (int32((top + local - across * high) * tile_rows), int32(across * tile_cols), part, first,
                min(int32(first + steps_per_part), steps))

    @cuda.jit(device=True, inline="always")
    def after(stage, parity):
        """The next stage, and the parity of its phase."""
        last = stage == stages - 1
        return int32(0 if last else stage + 1), int32(parity ^ 1 if last else parity)

    @cuda.jit(device=True, inline="always")
    def wait(shared, barrier, parity):
        while not barriers.passed(shared, barrier, parity):
            pass

    @cuda.jit(device=True, inline="always")
    def copy_stage(shared, start, full, left_map, right_map, row, col, depth):
        if left_across:
            for box in range(tile_rows // 64):
                copy_box(left_map, int32(row + 64 * box), depth, shared, int32(start + box * PIECE_BYTES), full)
        else:
            for term in range(terms):
                copy_box(left_map, int32(depth + term * tile_depth), row, shared, int32(start + term * left_term), full)
        if right_across:
            for box in range(tile_cols // 64):
                copy_box(right_map, int32(col + 64 * box), depth, shared,
                         int32(start + left_bytes + box * PIECE_BYTES), full)
        else:
            for term in range(terms):
                copy_box(right_map, int32(depth + term * tile_depth), col, shared,
                         int32(start + left_bytes + term * right_term), full)

    @cuda.jit(device=True, inline="always")
    def store_staged(shared, staged, result_map, row, col, part, boxes):
        results.show()
        meet(int32(cuda.threadIdx.x // GROUP_THREADS))
        if cuda.threadIdx.x % GROUP_THREADS == 0:
            for box in range(boxes):
                results.store_box(result_map, int32(col + box * piece_cols), row, part, shared,
                          int32(staged + box * PIECE_BYTES))
            results.commit()

    @cuda.jit(device=True, inline="always")
    def may_stage():
        """Nothing staged before is still to be read."""
        if cuda.threadIdx.x % GROUP_THREADS == 0:
            results.read()
        meet(int32(cuda.threadIdx.x // GROUP_THREADS))

    @primitives.jit(3 * GROUP_THREADS)
    def matmul_hopper(left, right, result, maps, pieces_of_work, tiles_down, tiles_across, steps,
                      steps_per_part, alpha, alpha_address, depth_sums, depth_sums_pitch, sharers):
        thread = int32(cuda.threadIdx.x)
        shared = shared_tiles()

        # 1. One thread starts the barriers and writes the maps.
        first_map = cuda.blockIdx.x * MAPS
        if thread == 0:
            for stage in range(stages):
                barriers.start_full(shared, int32(full_at + 8 * stage))
                barriers.start_empty(shared, int32(empty_at + 8 * stage))
            barriers.started()
            map_of.write(maps, first_map + LEFT, left)
            map_of.write(maps, first_map + RIGHT, right)
            map_of.write(maps, first_map + RESULT, result)
            map_of.written()
        cuda.syncthreads()
        number, stage = int32(cuda.blockIdx.x), int32(0)

        if thread < GROUP_THREADS:
            fewer_registers()
            if thread == 0:
                # 2. The thread that copies goes ahead of those that multiply by as many stages as there are.
                left_map, right_map = map_of.at(maps, first_map + LEFT), map_of.at(maps, first_map + RIGHT)
                parity = int32(1)
                while number < pieces_of_work:
                    row, col, part, first, end = piece_of_work(number, tiles_down, tiles_across, int32(steps),
                                                               steps_per_part)
                    for step in range(first, end):
                        wait(shared, int32(empty_at + 8 * stage), parity)
                        full = int32(full_at + 8 * stage)
                        barriers.expect_stage(shared, full)
                        copy_stage(shared, int32(stage * stage_bytes), full, left_map, right_map, row, col,
                                   int32(step * terms * tile_depth))
                        stage, parity = after(stage, parity)
                    number = int32(number + cuda.gridDim.x)
            elif has_sums and thread >= LANES:
                # 3. The other warps add the summed operand up in every sharers-th round, of a few in each step: a
                #    thread a chunk of eight columns in eight of the lines, into a row of its own.
                chunk, share = int32((thread - LANES) % chunks), int32((thread - LANES) // chunks)
                box_at = int32(summed_at + chunk // 8 * PIECE_BYTES)
                parity = int32(0)
                while number < pieces_of_work:
                    row, col, part, first, end = piece_of_work(number, tiles_down, tiles_across, int32(steps),
                                                               steps_per_part)
                    sharer = quotient(col, int32(tile_cols)) if of_left else quotient(row, int32(tile_rows))
                    until = sharer if sharer < sharers else NEVER
                    totals = depth_sum.none()
                    for _ in range(first, end):
                        wait(shared, int32(full_at + 8 * stage), parity)
                        start = int32(stage * stage_bytes + box_at)
                        for eight in range(share, rounds * shares, shares):
                            if until == 0:
                                if eight < 8:
                                    lines_at = int32(start + eight * 8 * LINE_BYTES)
                                    totals = depth_sum.add_lines(shared, lines_at, int32(chunk % 8), totals)
                                until = int32(sharers)
                            until = int32(until - 1)
                        meet_warp()
                        if thread % LANES == 0:
                            barriers.arrive(shared, int32(empty_at + 8 * stage))
                        stage, parity = after(stage, parity)
                    begin = int32((row if of_left else col) + 8 * chunk)
                    if sharer < sharers and begin < depth_sums_pitch:
                        index = int64((part * sharers + sharer) * shares + share) * depth_sums_pitch + begin
                        depth_sum.store(depth_sums, index, depth_sum.first(totals))
                        depth_sum.store(depth_sums, index + 4, depth_sum.first(depth_sum.turn(totals)))
                    number = int32(number + cuda.gridDim.x)
        else:
            more_registers()
            group = int32(thread // GROUP_THREADS - 1)
            result_map = map_of.at(maps, first_map + RESULT)
            chief = thread % LANES == 0
            rows_at, staged = int32(group * PIECE_BYTES), int32(staged_at + group * staged_bytes)
            before, parity = int32(0), int32(0)
            while number < pieces_of_work:
                # 4. Products of a stage begin while those of the stage before end, which is empty then.
                row, col, part, first, end = piece_of_work(number, tiles_down, tiles_across, int32(steps),
                                                           steps_per_part)
                sums, corrections = products.none(), products.none()
                for step in range(first, end):
                    wait(shared, int32(full_at + 8 * stage), parity)
                    left_at = int32(stage * stage_bytes + rows_at)
                    right_at = int32(stage * stage_bytes + left_bytes)
                    sums = products.multiply(shared, left_at, right_at, sums)
                    if split:
                        corrections = products.multiply(shared, int32(left_at + left_term), right_at, corrections)
                        corrections = products.multiply(shared, left_at, int32(right_at + right_term), corrections)
                    products.before_done()
                    if step > first and chief:
                        barriers.arrive(shared, int32(empty_at + 8 * before))
                    before = stage
                    stage, parity = after(stage, parity)
                sums = products.done(sums)
                if split:
                    sums = products.settle(products.tidy(products.join(sums, products.done(corrections))))
                if end > first and chief:
                    barriers.arrive(shared, int32(empty_at + 8 * before))

                # 5. Results leave through shared memory, at most four boxes at a time.
                sums = products.scale(sums, alpha_at(alpha, alpha_address))
                row = int32(row + 64 * group)
                may_stage()
                results.stage_first(shared, staged, int32(thread % GROUP_THREADS), sums)
                store_staged(shared, staged, result_map, row, col, part, at_once)
                if pieces > at_once:
                    may_stage()
                    results.stage_rest(shared, staged, int32(thread % GROUP_THREADS), sums)
                    store_staged(shared, staged, result_map, row, int32(col + at_once * piece_cols), part,
                                 pieces - at_once)
                number = int32(number + cuda.gridDim.x)
            results.done()

    return matmul_hopper
