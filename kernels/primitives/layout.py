"""How tiles lie in shared memory, and which thread copies what. Pure values, shared by both kinds of primitives."""
from typing import NamedTuple


class TileLayout(NamedTuple):
    """A tile in shared memory: element (outer, depth) at depth * outer_size + (outer ^ flip of that depth).

    A thread's fragment is `groups` vectors of 16 bytes, `spacing` elements apart. The flip moves neighbouring depths to
    other banks, so that a copy which transposes stores without conflicts; it never splits a vector.
    """

    outer_size: int
    groups: int
    spacing: int
    flip_every: int  # depths
    flip_count: int
    flip_unit: int  # elements

    def flip(self, depth: int) -> int:
        """What the outer index is combined with at this depth, by exclusive or."""
        return depth // self.flip_every % self.flip_count * self.flip_unit


class TileCopy(NamedTuple):
    """A copy of a tile of outer_size by depth_size elements by all threads of a block, access elements at a time."""

    dtype: str
    wide: str
    outer_size: int
    depth_size: int
    access: int
    along_depth: bool  # whether neighbours in global memory are neighbours in depth
    neighbours: int  # accesses that lie side by side in global memory before the next outer index follows
    threads: int
    offset_bits: int  # that count the elements from the tile's first to any other: 32, or 64 for huge strides
    layout: TileLayout

    @property
    def accesses(self) -> int:
        """Of the whole tile."""
        return self.outer_size * self.depth_size // self.access

    @property
    def rounds(self) -> int:
        """Accesses of one thread."""
        return -(-self.accesses // self.threads)

    @property
    def partial(self) -> bool:
        """Whether some threads have no access in the last round."""
        return self.accesses % self.threads != 0

    @property
    def outers(self) -> int:
        """How many outer indices the accesses that lie side by side before the depth moves on cover."""
        return self.outer_size if self.along_depth else self.outer_size // self.access

    def steps(self) -> list[tuple[int, int]]:
        """(outer, depth) of each round's access, counted from the thread's first.

        Exact, since a round of all threads covers whole rows of the tile, or a whole fraction of one.
        """
        steps = []
        for number in range(self.rounds):
            outers = number * self.threads // self.neighbours
            outer, far = outers % self.outers, outers // self.outers
            steps.append((outer, far * self.neighbours * self.access) if self.along_depth
                         else (outer * self.access, far))
        return steps


class TileShare(NamedTuple):
    """How the threads of a block add up a tile in shared memory along its depth.

    Thread t takes `groups` vectors of outer indices, those of number t % across, at depths t // across, + depths, ...;
    threads of other number than the first across * depths repeat what others do, and their sums are not used.
    """

    dtype: str
    depth_size: int
    across: int
    depths: int
    groups: int
    layout: TileLayout


def tile_share(copy: TileCopy) -> TileShare:
    """The share of each thread of the block that fills the tile by this copy."""
    vectors = copy.outer_size // (2 if copy.wide == "float64" else 4)
    across = min(vectors, copy.threads)
    return TileShare(copy.wide, copy.depth_size, across, min(copy.threads // across, copy.depth_size), vectors // across,
                     copy.layout)


def tile_copy(dtype: str, wide: str, outer_size: int, depth_size: int, access: int, along_depth: bool, threads: int,
              thread_outer: int, offset_bits: int) -> TileCopy:
    """The copy of one operand's tiles, and where they lie in shared memory.

    thread_outer is the length of a thread's fragment. Along depth, a warp reads sectors of 32 bytes: as many neighbouring
    accesses as a sector holds, then the next outer index.
    """
    item_bytes = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
    vector = 16 // item_bytes[wide]
    groups = thread_outer // vector
    spacing, banks = outer_size // groups, 128 // item_bytes[wide]
    neighbours, flips = 1, 1
    if along_depth:
        neighbours = min(max(32 // (access * item_bytes[dtype]), 1), depth_size // access, threads)
        flips = min(neighbours, banks // vector) if spacing % banks == 0 else 1
    layout = TileLayout(outer_size, groups, spacing, access if along_depth else 1, flips, banks // flips)
    return TileCopy(dtype, wide, outer_size, depth_size, access, along_depth, neighbours, threads,
                    offset_bits, layout)


#: A tile of a tensor core's operand is this deep, in two steps of one instruction's depth; and its unit of copying.
TILE_DEPTH_BYTES, STEP_BYTES, CHUNK_BYTES = 64, 32, 16


class ChunkTile(NamedTuple):
    """A tile in shared memory as lines of 16-byte chunks: chunk c of line l is number l * chunks + (c ^ flip of that line).

    Lines are outer indices where the operand is contiguous along the depth, else depths. The flip spreads the chunks that are
    read or written together over all 32 banks.
    """

    lines: int
    chunks: int  # of a line, a power of two
    flip_every: int  # lines
    flip_count: int
    flip_unit: int  # chunks

    @property
    def period(self) -> int:
        """After how many lines the flips repeat."""
        return self.flip_every * self.flip_count

    @property
    def size(self) -> int:
        """In bytes."""
        return self.lines * self.chunks * CHUNK_BYTES

    def flip(self, line: int) -> int:
        """What the number of a chunk is combined with in this line, by exclusive or."""
        return line // self.flip_every % self.flip_count * self.flip_unit


class ChunkCopy(NamedTuple):
    """An asynchronous copy of a ChunkTile by all threads of a block: thread t takes the chunks t, t + threads, ...

    A chunk comes in pieces of `access` elements: one if all is aligned to 16 bytes.
    """

    tile: ChunkTile
    item_bytes: int
    access: int
    along_depth: bool  # whether a line runs along the depth
    threads: int  # a multiple of the chunks of a line
    offset_bits: int  # that count the bytes from one of a thread's chunks to the next: 32, or 64 for huge strides

    @property
    def rounds(self) -> int:
        """Chunks of one thread."""
        return self.tile.lines * self.tile.chunks // self.threads

    @property
    def lines_a_round(self) -> int:
        """From one of a thread's chunks to its next one, which stands in the same column."""
        return self.threads // self.tile.chunks

    @property
    def elements(self) -> int:
        """Of a chunk."""
        return CHUNK_BYTES // self.item_bytes


class FragmentLayout(NamedTuple):
    """How a warp holds its part of an operand for one mma step: one register of each lane per (8 outer indices, 16 bytes of depth).

    Lane 4 g + q holds, for block b and half h, the 4 bytes at 16 h + 4 q of the step's depth, of outer index outer(b, g). The
    operand is contiguous along the depth, or not and then of 16-bit elements or `wide`.
    """

    tile: ChunkTile
    along_depth: bool
    wide: bool  # 32-bit elements that are not contiguous along the depth: a lane's four neighbours belong to four blocks
    left: bool  # whether blocks come in pairs, as mma takes its left operand
    blocks: int  # of 8 outer indices

    def outer(self, block: int, lane: int) -> int:
        """The outer index that lanes of this g hold of a block."""
        return block // 4 * 32 + 4 * lane + block % 4 if self.wide else 8 * block + lane

    @property
    def order(self) -> list[tuple[int, int]]:
        """(block, half) of each register."""
        if self.left:
            return [(pair + block, half) for pair in range(0, self.blocks, 2) for half in (0, 1) for block in (0, 1)]
        return [(block, half) for block in range(self.blocks) for half in (0, 1)]

    def runs(self, access: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """(first, spread, (block, parity) of each): neighbouring columns, from first + spread * q on, that lanes hold.

        q is lane % 4. Where `paired` lanes swap results it is 2 (lane % 2) + lane // 2 % 2.
        """
        if self.wide:
            return [(8 * first, 8, [(first + block, parity) for parity in (0, 1) for block in range(4)])
                    for first in range(0, self.blocks, 4)]
        if self.paired(access):
            return [(8 * block, 4, [(block, 0), (block, 1), (block + 1, 0), (block + 1, 1)]) for block in range(0, self.blocks, 2)]
        return [(8 * block, 2, [(block, 0), (block, 1)]) for block in range(self.blocks)]

    def paired(self, access: int) -> bool:
        """Whether a lane holds only two neighbouring columns, but is to store more at a time."""
        return access > 2 and not self.wide


def chunk_tile(item_bytes: int, outer_size: int, along_depth: bool) -> ChunkTile:
    """A tile of outer_size outer indices and TILE_DEPTH_BYTES of depth, which is read and written without bank conflicts.

    Eight lanes are served together: eight lines of one chunk where ldmatrix reads, four lines of two where wide loads do, and
    eight neighbouring chunks where copies write.
    """
    if along_depth:
        lines, chunks = outer_size, TILE_DEPTH_BYTES // CHUNK_BYTES
    else:
        lines, chunks = TILE_DEPTH_BYTES // item_bytes, outer_size * item_bytes // CHUNK_BYTES
        if item_bytes == 4:
            return ChunkTile(lines, chunks, 1, 4, 2)
    return ChunkTile(lines, chunks, max(8 // chunks, 1), min(chunks, 8), 1)


def fragment_layout(item_bytes: int, outer_size: int, along_depth: bool, left: bool, warp_outer: int) -> FragmentLayout:
    """The fragments of a warp that takes warp_outer of a tile's outer indices."""
    return FragmentLayout(chunk_tile(item_bytes, outer_size, along_depth), along_depth, item_bytes == 4 and not along_depth,
                          left, warp_outer // 8)
