"""Tensor cores and copies into shared memory in NumPy: what the 32 lanes of a warp do together, for the simulator.

The simulator runs every lane as a thread of its own and knows no warps. Lanes meet at a barrier; the last one to come
does the work of all. Asynchronous copies are as late as they may be: their target is poisoned until the wait that
covers them.
"""
import threading

import numpy as np

from .factories import cache
from .layout import CHUNK_BYTES, LANES, STEP_BYTES
from .number_simulator import _round_tf32
from .simulator import _TYPE, _quiet

#: seconds after which lanes stop waiting for one that does not come
PATIENCE = 20.0

_lock = threading.Lock()


class Warp:
    """32 threads of a block, or a warpgroup's 128, and what they bring to one another."""

    def __init__(self, lanes):
        self._brought = [None] * lanes
        self._taken = None
        self._fault = None
        self._barrier = threading.Barrier(lanes, self._meet, PATIENCE)

    def exchange(self, lane, meaning, value):
        """What meaning(the values of all lanes, in order) gives this lane; all lanes must mean the same."""
        self._brought[lane] = meaning, value
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise RuntimeError(f"lane {lane} waited for the others of its warp, which did not come") from None
        if self._fault is not None:
            raise self._fault
        return self._taken[lane]

    def _meet(self):
        try:
            meanings = {meaning for meaning, _ in self._brought}
            if len(meanings) > 1:
                raise RuntimeError("the lanes of a warp met in different instructions")
            self._taken = meanings.pop()([value for _, value in self._brought])
        except Exception as fault:  # every lane raises it
            self._fault = fault


def exchange(meaning, value, lanes=LANES):
    """What meaning(the values of the 32 lanes of this thread's warp, or of its warpgroup's 128) gives this thread."""
    thread = threading.current_thread()
    number, lane = divmod(thread.thread_id, lanes)
    block = thread._manager
    with _lock:
        warps = block.__dict__.setdefault("densegrad_warps", {})
        if (number, lanes) not in warps:
            if int(np.prod(block._block_dim)) % lanes:
                raise RuntimeError(f"a block of {int(np.prod(block._block_dim))} threads is not made of whole warps")
            warps[number, lanes] = Warp(lanes)
    return warps[number, lanes].exchange(lane, meaning, value)


@cache
def of_lane(dtype, count, distance):
    """(fragment) -> that of the lane whose number differs in the bit `distance`; all lanes of the warp together."""
    def swap(fragments):
        return [fragments[lane ^ distance] for lane in range(LANES)]

    return lambda fragment: exchange(swap, fragment)


# -- shared memory


class _Bytes:
    """A block's dynamic shared memory: all bits set, which is NaN in every type, until it is written."""

    def __init__(self, size):
        self.cells = np.full(size, 0xFF, np.uint8)

    def span(self, index, count):
        """The bytes of one access."""
        if not 0 <= index <= len(self.cells) - count or index % count:
            raise IndexError(f"shared bytes {index} to {index + count - 1} of {len(self.cells)}, {count} aligned")
        return self.cells[index:index + count]


@cache
def shared_bytes(size):
    """() -> the block's dynamic shared memory, which its launch says the size of. Indices of it count bytes."""

    def run():
        block = threading.current_thread()._manager
        with _lock:
            return block.__dict__.setdefault("densegrad_dynamic", _Bytes(size))

    return run


# -- copies of chunks


class _Copies:
    """One thread's copies that are under way: groups, the newest last, the last of all not yet committed."""

    def __init__(self):
        self.groups = [[]]

    def start(self, target, values):
        target[:] = 0xFF
        self.groups[-1].append((target, values))

    def commit(self):
        self.groups.append([])

    def wait(self, newest):
        """All but the newest groups arrive."""
        while len(self.groups) - 1 > newest:
            for target, values in self.groups.pop(0):
                target[:] = values


def _copies():
    return threading.current_thread().__dict__.setdefault("densegrad_copies", _Copies())


@cache
def copy_place(copy):
    """(place, stride, thread) -> where the thread's first chunk of a ChunkCopy comes from, for copy_chunks.

    place is that of the tile's first element; line l begins l * stride elements further.
    """

    def run(place, stride, thread):
        line, chunk = divmod(thread, copy.tile.chunks)
        return place + (line * stride + chunk * copy.elements) * copy.item_bytes

    return run


@cache
def copy_chunks(copy, ragged):
    """(array, index, place, stride, outer left, depth left, thread): copies the thread's share of a ChunkCopy.

    place is what copy_place gave for the tile, which comes to index of shared memory. Outer indices from `outer left`
    on and, if ragged, depths from `depth left` on come as zeros and are not read. They have arrived after wait_copies;
    pieces of two bytes, which no asynchronous copy takes, when this returns, and so do all if the copy is not
    asynchronous.
    """
    tile, width = copy.tile, copy.access * copy.item_bytes

    def run(array, index, place, stride, outer_left, depth_left, thread):
        copies = _copies()
        for number in range(thread, tile.lines * tile.chunks, copy.threads):
            line, chunk = divmod(number, tile.chunks)
            for piece in range(0, copy.elements, copy.access):
                along = chunk * copy.elements + piece
                outer, depth = (line, along) if copy.along_depth else (along, line)
                values = np.zeros(width, np.uint8)
                if outer < outer_left and (depth < depth_left or not ragged):
                    where = place.index + (line - thread // tile.chunks) * stride + piece
                    values = place.address.read(where, copy.access).copy().view(np.uint8)
                start = index + CHUNK_BYTES * (line * tile.chunks + (chunk ^ tile.flip(line))) + piece * copy.item_bytes
                if width == 2 or not copy.asynchronous:
                    array.span(start, width)[:] = values
                else:
                    copies.start(array.span(start, width), values)

    return run


@cache
def commit_copies():
    """(): the thread's copies since the last commit are a group."""
    return lambda: _copies().commit()


@cache
def wait_copies(groups):
    """(): all of the thread's groups but the newest `groups` have arrived."""
    return lambda: _copies().wait(groups)


# -- fragments of a warp


@cache
def fragment_places(layout):
    """(first outer, lane) -> where the lane reads a FragmentLayout in a tile, for load_fragments."""
    return lambda first, lane: (int(first), int(lane))


@cache
def load_fragments(layout, step):
    """(array, index, places) -> the registers of a FragmentLayout for a step of the tile at index.

    Wide elements are read by the lane that holds them, others as ldmatrix does it: each lane names a row of a matrix,
    and takes two of its 16-bit elements or, transposed, of a column.
    """
    tile, order = layout.tile, layout.order

    def place(line, chunk):
        return CHUNK_BYTES * (line * tile.chunks + (chunk ^ tile.flip(line)))

    def wide(array, index, places):
        """Each lane reads what it holds, in vectors or one by one."""
        (first, lane), size = places, layout.item_bytes
        found = np.zeros(len(order), np.float64 if size == 8 else np.uint32)
        for position, (block, half) in enumerate(order):
            outer, depth = first + layout.outer(block, lane // 4), STEP_BYTES // size * step + 4 * half + lane % 4
            line, along = (outer, depth) if layout.along_depth else (depth, outer)
            chunk, number = divmod(along * size, CHUNK_BYTES)
            found[position] = array.span(index + place(line, chunk) + number, size).view(found.dtype)[0]
        return found

    def matrices(rows):
        """rows[lane, number] are 16 bytes -> every lane's registers."""
        matrix = np.array(rows).view(np.uint16).reshape(4, 8, -1, 8).transpose(2, 0, 1, 3)
        if not layout.along_depth:
            matrix = matrix.swapaxes(2, 3)
        return np.ascontiguousarray(matrix).view(np.uint32).reshape(-1, LANES).T

    def by_matrix(array, index, places):
        first, lane = places
        rows = []
        for number in range(0, len(order), 4):
            block, half = order[number + lane // 8]
            if layout.along_depth:
                start = place(first + 8 * block + lane % 8, 2 * step + half)
            else:
                start = place(16 * step + 8 * half + lane % 8, first // 8 + block)
            rows.append(array.span(index + start, CHUNK_BYTES))
        return exchange(matrices, np.array(rows))

    return wide if layout.neighbours > 1 or layout.item_bytes == 8 else by_matrix


@cache
def mma(kind, down, across):
    """(left, right, sums) -> sums plus the products of `down` times 16 rows and `across` times 8 columns, for one step.

    Sums are those of row block after row block, four a lane for each pair of blocks. "float16k8" is float16 in two
    instructions of 8 depths each, all that compute capability 7.5 has. Of "tf32" the operands are rounded to nearest
    first. "tf32x3" cuts each operand into two such terms; its sums are twice as many: the products of the first terms,
    then those of a first and a second one. Products are exact, and each instruction's sum is rounded once. "float64"
    and "float64m8" are added in ascending order of the depth, each product and each sum rounded, where the device
    rounds once.
    """

    def all_lanes(values):
        left, right, sums = (np.array(part) for part in zip(*values, strict=True))
        if kind == "tf32x3":
            (left, low_left), (right, low_right) = _split_tf32(left), _split_tf32(right)
            main, corrections = sums[:, :4 * down * across], sums[:, 4 * down * across:]
            corrections = product(low_left, right, corrections)
            return np.hstack([product(left, right, main), product(left, low_right, corrections)])
        if kind == "tf32":
            left, right = _round_tf32(left), _round_tf32(right)
        return (in_order if kind.startswith("float64") else product)(left, right, sums)

    def product(left, right, sums):
        """The lanes' registers as matrices, multiplied, and the sums back in registers."""
        # left: lane (g, q), blocks (i, half of depth, half of rows) -> rows (i, half of rows, g), depth (half of
        # depth, q, ...)
        rows = _numbers(left, kind).reshape(8, 4, down, 2, 2, -1).transpose(2, 4, 0, 3, 1, 5).reshape(16 * down, -1)
        cols = _numbers(right, kind).reshape(8, 4, across, 2, -1).transpose(2, 0, 3, 1, 4).reshape(8 * across, -1)
        old = matrix_of(sums)
        for depths in np.split(np.arange(rows.shape[1]), 2 if kind == "float16k8" else 1):
            old = (rows[:, depths] @ cols[:, depths].T + old).astype(np.float32)
        return registers_of(old)

    def in_order(left, right, sums):
        """The same for float64, of which a lane holds one depth."""
        # left: lane (g, q), blocks (i, half of rows) -> depth q, rows (i, half of rows, g)
        rows = left.reshape(8, 4, down, 2).transpose(1, 2, 3, 0).reshape(4, 16 * down)
        cols = right.reshape(8, 4, across).transpose(1, 2, 0).reshape(4, 8 * across)
        old = matrix_of(sums)
        for row, col in zip(rows, cols, strict=True):
            old = old + row[:, None] * col
        return registers_of(old)

    def matrix_of(sums):
        # lane (g, q), (i, j, half of rows, parity) -> rows (i, half of rows, g), columns (j, q, parity)
        return sums.reshape(8, 4, down, across, 2, 2).transpose(2, 4, 0, 3, 1, 5).reshape(16 * down, 8 * across)

    def registers_of(matrix):
        return matrix.reshape(down, 2, 8, across, 4, 2).transpose(2, 4, 0, 3, 1, 5).reshape(LANES, -1)

    all_lanes = _quiet(all_lanes)
    return lambda left, right, sums: exchange(all_lanes, (left, right, sums))


def _numbers(registers, kind):
    """Registers of every lane -> the float64 numbers in each."""
    if kind.startswith("float16"):
        return registers[..., None].view(np.float16).astype(np.float64)
    if kind == "bfloat16":
        halves = registers[..., None].view(np.uint16).astype(np.uint32) << np.uint32(16)
        return halves.view(np.float32).astype(np.float64)
    return (registers[..., None] & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def _split_tf32(bits):
    """(first, second) tf32 term of a float32."""
    first = _round_tf32(bits) & np.uint32(0xFFFFE000)
    return first, _round_tf32((bits.view(np.float32) - first.view(np.float32)).view(np.uint32))


@cache
def add_depths(kind, layout):
    """(first, second, totals) -> totals plus the sums along the depth of a tile's two steps, as left operands.

    There is a sum for each outer index of a FragmentLayout. Half precision is multiplied by ones: totals are mma's
    four sums for each two blocks, of which the second and fourth repeat the others. float32 is added as it is, not as
    TF32, and float64: one total for each block and lane, of the depths that the lane holds, in ascending order.
    """
    held = [[layout.order.index((block, half)) for half in range(layout.halves)] for block in range(layout.blocks)]

    def all_lanes(values):
        *steps, totals = (np.array(part) for part in zip(*values, strict=True))
        for fragments in steps:
            for halves in np.split(np.arange(2), 2 if kind == "float16k8" else 1):
                numbers = _numbers(fragments[:, held][:, :, halves], kind)
                numbers = numbers.sum(axis=(2, 3)).reshape(8, 4, -1).sum(axis=1)
                totals = (np.repeat(np.repeat(numbers, 4, axis=0), 2, axis=1) + totals).astype(np.float32)
        return totals

    def alone(values):
        *steps, totals = values
        for fragments in steps:
            for places in zip(*held, strict=True):
                totals = totals + fragments[[*places]].view(totals.dtype)
        return totals

    all_lanes = _quiet(all_lanes)
    together = layout.item_bytes == 2
    add = (lambda values: exchange(all_lanes, values)) if together else _quiet(alone)
    return lambda first, second, totals: add((first, second, totals))


@cache
def store_depth_sums(kind, layout, dtype, access, wide, accumulate):
    """(address, index, step, left, alpha, lane, totals): stores alpha times the sums of the first `left` outer indices.

    They go to index, index + step, ... Each is computed in the type `wide`, if accumulate added to what is there, and
    rounded once to dtype; one by one, so access is 1.
    """

    def over_quarters(values):
        pairs = np.array(values).reshape(8, 2, 2, -1).sum(axis=2)
        return np.repeat(pairs.sum(axis=1), 4, axis=0)

    def in_order(values):
        quarters = np.array(values).reshape(8, 4, -1)
        total = quarters[:, 0]
        for quarter in range(1, 4):
            total = total + quarters[:, quarter]
        return np.repeat(total, 4, axis=0)

    over_quarters = _quiet(in_order if layout.item_bytes == 8 else over_quarters)

    def run(address, index, step, left, alpha, lane, totals):
        sums = totals[::2] if layout.item_bytes == 2 else exchange(over_quarters, totals)
        for block, total in enumerate(sums):
            outer = layout.outer(block, lane // 4)
            if lane % 4 == 0 and outer < left:
                place = index + outer * step
                value = np.array([total]).astype(_TYPE[wide]) * alpha
                if accumulate:
                    value = value + address.read(place, 1).astype(_TYPE[wide])
                address.write(place, value)

    return _quiet(run)


# -- results


@cache
def store_products(rows, cols, dtype, access, wide, accumulate):
    """(address, index, row stride, col stride, rows left, cols left, alpha, lane, sums): stores alpha times a warp's
    results.

    rows and cols are the FragmentLayouts of the operands. The warp's first result belongs at index; those beyond what
    is left are not stored. Each is computed in the type `wide`, if accumulate added to what is there, and rounded
    once. Up to access neighbours of a row are stored at a time, for which lanes swap results with the lanes beside
    them.
    """
    to_odd, to_next, to_second = cols.steps(access)
    runs = cols.runs(access)
    half = len(runs[0][1]) // 2

    def in_runs(sums):
        """Each block of rows' runs, a run's halves and their values."""
        values = sums.reshape(rows.blocks // 2, cols.blocks, 2, 2)
        return np.array([[[values[block // 2, j, block % 2, parity] for j, parity in run] for _, run in runs]
                         for block in range(rows.blocks)]).reshape(rows.blocks, len(runs), 2, half)

    def swap(values):
        """Even lanes get what they and odd ones hold of the first halves, odd lanes of the second."""
        pairs = np.array(values).reshape(LANES // 2, 2, rows.blocks, len(runs), 2, half)
        return pairs.transpose(0, 4, 2, 3, 1, 5).reshape(LANES, rows.blocks, len(runs), 2, half)

    def run(address, index, row_stride, col_stride, rows_left, cols_left, alpha, lane, sums):
        values = in_runs(sums)
        if cols.paired(access):
            values = exchange(swap, values)
        lane_col = lane % 2 * to_odd + lane // 2 % 2 * to_next
        for block, number in np.ndindex(values.shape[:2]):
            row, (first, run) = rows.outer(block, lane // 4), runs[number]
            width = min(access, len(run))
            for position in range(0, len(run), width):
                col = first + lane_col + position // half * to_second + position % half
                if row >= rows_left or col >= cols_left:
                    continue
                part = values[block, number].ravel()[position:position + width].astype(_TYPE[wide]) * alpha
                place = index + row * row_stride + col * col_stride
                if accumulate:
                    part = part + address.read(place, width).astype(_TYPE[wide])
                address.write(place, part)

    return _quiet(run)
