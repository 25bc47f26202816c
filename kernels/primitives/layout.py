"""How tiles lie in shared memory, and which thread copies what. Pure values, shared by both kinds of primitives."""
from typing import NamedTuple

from ...facts import BOX_LINES, ITEM_BYTES, LINE_BYTES, MAP_WORDS, TILE_DEPTH_BYTES

#: what global memory is moved in, what all banks of shared memory serve at once, and the widest access, in bytes
SECTOR, LINE, WIDEST = 32, 128, 16
#: threads of a warp, and of a warpgroup
LANES, GROUP_THREADS = 32, 128
#: of a box in shared memory, of lines after which its swizzle repeats, and of a tensor map
PIECE_BYTES, SWIZZLE_BYTES, MAP_BYTES = BOX_LINES * LINE_BYTES, 8 * LINE_BYTES, 8 * MAP_WORDS
#: float64 sums along the depth that ride along add every so manyth depth of a part: those of one mma instruction
FLOAT64_CLASSES = 4


class TileLayout(NamedTuple):
    """A tile in shared memory, in layers of `depths` depths each, one after the other from start on.

    A layer is made of vectors of 16 bytes, `vector` elements: those of neighbouring outer indices, `depths` of each. A
    thread's fragment is `groups` times `vector` neighbouring outer indices, so groups * depths vectors of a layer.
    These are `spacing` elements apart; as many threads as fit into the spacing share such a stretch of memory, then the
    next stretch begins.

    The flip moves neighbouring layers to other banks, so that a copy which transposes stores without conflicts: what
    would be element p of a layer is element p ^ flip. It never splits a vector.
    """

    start: int
    outer_size: int
    vector: int
    groups: int
    depths: int
    spacing: int
    flip_every: int  # layers
    flip_count: int
    flip_unit: int  # elements

    @property
    def lanes(self) -> int:
        """Threads whose fragments make up the tile."""
        return self.outer_size // (self.groups * self.vector)

    @property
    def layer(self) -> int:
        """Elements of a layer."""
        return self.outer_size * self.depths

    @property
    def vectors(self) -> int:
        """Of a thread's fragment in a layer."""
        return self.groups * self.depths

    @property
    def stretch(self) -> int:
        """Elements that the fragments of threads beside one another make up."""
        return self.vectors * self.spacing

    @property
    def group_spacing(self) -> int:
        """Outer indices from one group of a thread to the next."""
        return self.outer_size // self.groups

    def flip(self, layer: int) -> int:
        """What the number of an element is combined with in this layer, by exclusive or."""
        return layer // self.flip_every % self.flip_count * self.flip_unit

    def first_of(self, lane: int) -> int:
        """Where the fragment of the thread with this number down (or across) begins in an unflipped layer."""
        return lane * self.vector % self.spacing + lane * self.vector // self.spacing * self.stretch

    def position(self, outer: int) -> int:
        """Where the elements of an outer index begin in an unflipped layer: at `depths` times its piece."""
        group, rest = divmod(outer, self.group_spacing)
        lane, number = divmod(rest, self.vector)
        vector, within = divmod(number, self.vector // self.depths)
        return self.first_of(lane) + (group * self.depths + vector) * self.spacing + within * self.depths

    @property
    def fields(self) -> list[tuple[int, int]]:
        """(size, weight) of what the number of a piece is made of, from its least significant part on.

        A piece is an outer index's part of a layer. Their numbers count them as they lie in an unflipped layer; what
        these are made of, times the weights, makes up the outer index.
        """
        within, beside = self.vector // self.depths, min(self.spacing // self.vector, self.lanes)
        return [(within, 1), (beside, self.vector), (self.depths, within), (self.groups, self.group_spacing),
                (self.lanes // beside, beside * self.vector)]

    def outer_of(self, piece: int) -> int:
        """The outer index of this piece."""
        outer = 0
        for size, weight in self.fields:
            outer += piece % size * weight
            piece //= size
        return outer

    def place(self, outer: int, depth: int) -> int:
        """Where an element lies."""
        layer, within = divmod(depth, self.depths)
        return self.start + layer * self.layer + (self.position(outer) ^ self.flip(layer)) + within


class Lanes(NamedTuple):
    """How the threads of a block share its tile: so many down and across, in warps of warp_down by warp_across."""

    down: int
    across: int
    warp_down: int
    warp_across: int

    @property
    def threads(self) -> int:
        """Of the block."""
        return self.down * self.across


def lanes_of(down: int, across: int, beside: int) -> Lanes:
    """Warps of 4 by 8 threads, as far as there are so many; narrower where only `beside` fragments are neighbours."""
    warp_across = min(8, across, beside)
    return Lanes(down, across, min(32 // warp_across, down), warp_across)


class TileCopy(NamedTuple):
    """A copy of a tile of outer_size by depth_size elements by all threads of a block, access elements at a time.

    Where the operand is contiguous along the other axis than the depth, `side` neighbouring threads read accesses that
    lie side by side in a row of memory, and on, as far as the tile goes; the next threads take the next depth. So all
    accesses of a thread have constant distances, if the threads cover all depths.

    Where it is contiguous along the depth, `side` neighbouring threads read a sector of 32 bytes, the next threads that
    of the outer index whose piece of a layer is the next one.
    """

    dtype: str
    wide: str
    outer_size: int
    depth_size: int
    access: int
    along_depth: bool
    side: int
    threads: int
    offset_bits: int  # that count the bytes from a tile's first element to any other: 32, or 64 for huge strides
    layout: TileLayout

    @property
    def lanes(self) -> int:
        """Threads that share the outer indices of one depth (or of one sector's depths)."""
        return min(self.outer_size, self.threads // self.side) if self.along_depth else self.side

    @property
    def rows(self) -> int:
        """Depths, or accesses along the depth, that a round of all threads covers."""
        return max(1, self.threads // (self.side * self.lanes)) * self.side if self.along_depth else (
            self.threads // self.side)

    @property
    def partial(self) -> bool:
        """Whether the threads cover more depths than there are, so that some have nothing to copy."""
        return self.rows * (self.access if self.along_depth else 1) > self.depth_size

    @property
    def turns(self) -> bool:
        """Whether rows that do not begin with a sector are read from the sector on; see turn_of.

        For any stride, the rows of the next tile must begin as far from a sector as the rows of this one.
        """
        item = ITEM_BYTES[self.dtype]
        return (not self.along_depth and self.access * item < WIDEST and self.depth_size * item % SECTOR == 0
                and self.side * self.access * item % SECTOR == 0 and self.outer_size * item > SECTOR)

    def steps(self) -> list[tuple[int, int]]:
        """(outer, depth) of each of a thread's accesses, counted from its first."""
        depths = range(0, self.depth_size, self.rows * (self.access if self.along_depth else 1))
        if self.along_depth:
            outers = [self.layout.outer_of(piece) for piece in range(0, self.outer_size, self.lanes)]
        else:
            outers = list(range(0, self.outer_size, self.side * self.access))
        return [(outer, depth) for depth in depths for outer in outers]

    @property
    def count(self) -> int:
        """Elements of one thread."""
        return len(self.steps()) * self.access


class Line(NamedTuple):
    """A row of a result in shared memory, which `lanes` threads store: `length` elements, and whether they are added.

    Lines follow one another; in odd ones, element c lies at c ^ flip, so that two lines are written to all banks.
    """

    dtype: str
    length: int
    lanes: int
    accumulate: bool

    @property
    def flip(self) -> int:
        """Half of the banks, where a line is as long as all of them."""
        banks = LINE // ITEM_BYTES[self.dtype]
        return banks // 2 if self.length >= banks else 0


class TileShare(NamedTuple):
    """How the threads of a block add up a tile in shared memory along its depth, into `classes` sums of an outer index.

    Depths d, d + classes, ... are added up in this order. Thread t takes `vectors` vectors of a layer, those of number
    t % across, + across, ..., in the layers t // across, + layers, ...; threads of other number than the first across *
    layers repeat what others do, and their sums are not used.
    """

    dtype: str
    depth_size: int
    classes: int
    across: int
    layers: int
    layout: TileLayout

    @property
    def vectors(self) -> int:
        """That a thread reads of a layer."""
        return self.layout.layer // self.layout.vector // self.across

    @property
    def held(self) -> list[int]:
        """The classes of the sums of an outer index that a thread holds, counted from that of its first depth."""
        depths = self.layout.depths
        return sorted({(step * depths + within) % self.classes
                       for step in range(0, self.depth_size // depths, self.layers) for within in range(depths)})

    @property
    def count(self) -> int:
        """Sums of a thread."""
        return self.vectors * self.layout.vector // self.layout.depths * len(self.held)


def tile_share(copy: TileCopy) -> TileShare:
    """The share of each thread of the block that fills the tile by this copy; the sums do not depend on the layout.

    Those of float64 do not depend on the tile either: their classes are the depths that one lane of a tensor core
    holds, so that either kernel adds in the same order.
    """
    across = min(copy.outer_size // copy.layout.vector, copy.threads)
    sharing = min(copy.threads // across, copy.depth_size)
    classes = FLOAT64_CLASSES if copy.wide == "float64" else sharing
    sharing = min(sharing, classes)
    layers = max(sharing // copy.layout.depths, 1)
    return TileShare(copy.wide, copy.depth_size, classes, across * sharing // layers, layers, copy.layout)


def tile_copy(dtype: str, wide: str, outer_size: int, depth_size: int, access: int, along_depth: bool, threads: int,
              thread_outer: int, offset_bits: int, start: int = 0) -> TileCopy:
    """The copy of one operand's tiles, and where they lie in shared memory.

    thread_outer is the length of a thread's fragment, start where the tile begins in a stage of shared memory.
    """
    vector, banks = WIDEST // ITEM_BYTES[wide], LINE // ITEM_BYTES[wide]
    groups = thread_outer // vector
    spacing, flips, depths = outer_size // groups, 1, 1
    if along_depth:
        # Two depths side by side are stored at once; in shallow tiles, of threads with few registers, one.
        depths = min(access, vector // 2) if depth_size > 8 else 1
        side = min(max(SECTOR // (access * ITEM_BYTES[dtype]), 1), depth_size // access, threads)
        if spacing % banks == 0:
            flips = min(side, banks // vector)
        if flips == 2 and groups * depths > 1:
            # A thread's vectors lie where the flip swaps them, so that it reads all of them at constant distances.
            spacing = banks // 2
    else:
        side = min(max(threads // depth_size, banks // access), outer_size // access, threads)
    flip_every = access // depths if along_depth else 1
    layout = TileLayout(start, outer_size, vector, groups, depths, spacing, flip_every, flips, banks // flips)
    return TileCopy(dtype, wide, outer_size, depth_size, access, along_depth, side, threads, offset_bits, layout)


class ThreadTile(NamedTuple):
    """What a thread reads of an operand straight into registers: the elements at all of these outer indices and depths.

    Both count from the thread's first element. `access` neighbours are read at a time, along the axis that is
    contiguous. Element (outer o, depth d) of the tile is number d * len(outers) + o of the fragment.
    """

    dtype: str
    wide: str  # type of the fragment
    along_depth: bool
    access: int
    outers: tuple[int, ...]
    depths: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements of the fragment."""
        return len(self.outers) * len(self.depths)

    @property
    def accesses(self) -> list[tuple[int, int, list[int]]]:
        """(outer index, depth, numbers of its elements in the fragment) of each access."""
        outers, depths = len(self.outers), len(self.depths)
        if self.along_depth:
            return [(self.outers[o], self.depths[d], [(d + n) * outers + o for n in range(self.access)])
                    for d in range(0, depths, self.access) for o in range(outers)]
        return [(self.outers[o], self.depths[d], [d * outers + o + n for n in range(self.access)])
                for d in range(depths) for o in range(0, outers, self.access)]


#: Bytes of one instruction's depth of a tensor core's operand, two of which make a tile; and its unit of copying.
STEP_BYTES, CHUNK_BYTES = 32, 16


class ChunkTile(NamedTuple):
    """A tile in shared memory as lines of 16-byte chunks: chunk c of line l is number l * chunks + (c ^ flip of that
    line).

    Lines are outer indices where the operand is contiguous along the depth, else depths. The flip spreads the chunks
    that are read or written together over all 32 banks.
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
    """A copy of a ChunkTile by all threads of a block: thread t takes the chunks t, t + threads, ...

    A chunk comes in pieces of `access` elements: one if all is aligned to 16 bytes. Copies are asynchronous, or pass
    through registers.
    """

    tile: ChunkTile
    item_bytes: int
    access: int
    along_depth: bool  # whether a line runs along the depth
    threads: int  # a multiple of the chunks of a line
    offset_bits: int  # that count the bytes from one of a thread's chunks to the next: 32, or 64 for huge strides
    asynchronous: bool = True

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
    """How a warp holds its part of an operand for one mma step, in registers of 4 bytes, or of 8 for float64.

    A register of each lane holds 8 outer indices of 16 bytes of depth, or 32: lane 4 g + q holds, for block b and half
    h, the 4 bytes at 16 h + 4 q of the step's depth, of outer index outer(b, g); of float64 the 8 bytes at 8 q, in one
    half alone.
    """

    tile: ChunkTile
    item_bytes: int
    along_depth: bool
    left: bool  # whether blocks come in pairs, as mma takes its left operand
    blocks: int  # of 8 outer indices

    @property
    def accumulator(self) -> str:
        """The type of sums."""
        return "float64" if self.item_bytes == 8 else "float32"

    @property
    def halves(self) -> int:
        """Registers of a block."""
        return 1 if self.item_bytes == 8 else 2

    @property
    def neighbours(self) -> int:
        """Elements that a lane reads at once which belong to as many blocks.

        Those of 16 bytes where the operand is not contiguous along the depth and ldmatrix cannot transpose it, else 1.
        """
        return 1 if self.along_depth or self.item_bytes == 2 else CHUNK_BYTES // self.item_bytes

    def outer(self, block: int, lane: int) -> int:
        """The outer index that lanes of this g hold of a block."""
        group, number = divmod(block, self.neighbours)
        return self.neighbours * (8 * group + lane) + number

    @property
    def order(self) -> list[tuple[int, int]]:
        """(block, half) of each register."""
        together = 2 if self.left else 1
        return [(first + block, half) for first in range(0, self.blocks, together)
                for half in range(self.halves) for block in range(together)]

    def runs(self, access: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """(first, (block, parity) of each): neighbouring columns that a lane holds, those of lane 0 from `first` on.

        `paired` lanes hold half of such a run and half of the next one.
        """
        together = self.neighbours
        if together == 1 and self.paired(access):
            return [(8 * block, [(block, 0), (block, 1), (block + 1, 0), (block + 1, 1)])
                    for block in range(0, self.blocks, 2)]
        return [(8 * first, [(first + block, parity) for parity in (0, 1) for block in range(together)])
                for first in range(0, self.blocks, together)]

    def paired(self, access: int) -> bool:
        """Whether lanes swap results with their neighbours, so that what is stored at once makes whole sectors.

        Even lanes keep the first half of a run and receive one, odd lanes the second half.
        """
        return access == self.neighbours if self.neighbours > 1 else access > 2

    def steps(self, access: int) -> tuple[int, int, int]:
        """Columns from even to odd lanes, from two lanes to the next two, and from half to half of a run."""
        together = self.neighbours
        if self.paired(access):
            return (8, 4, 2) if together == 1 else (together, 4 * together, 2 * together)
        return 2 * together, 4 * together, together


def chunk_tile(item_bytes: int, outer_size: int, along_depth: bool) -> ChunkTile:
    """A tile of outer_size outer indices and TILE_DEPTH_BYTES of depth, which is read and written without bank
    conflicts.

    Eight lanes are served together: eight lines of one chunk where ldmatrix reads, four lines of two where wide loads
    do, and eight neighbouring chunks where copies write. Where loads take 8 bytes, 16 lanes are: four lines of two
    chunks again.
    """
    if along_depth:
        lines, chunks = outer_size, TILE_DEPTH_BYTES // CHUNK_BYTES
        if item_bytes == 8:
            return ChunkTile(lines, chunks, 2, 2, 2)
    else:
        lines, chunks = TILE_DEPTH_BYTES // item_bytes, outer_size * item_bytes // CHUNK_BYTES
        if item_bytes > 2:
            return ChunkTile(lines, chunks, 1, 4, 2)
    return ChunkTile(lines, chunks, max(8 // chunks, 1), min(chunks, 8), 1)


def fragment_layout(item_bytes: int, outer_size: int, along_depth: bool, left: bool, warp_outer: int) -> FragmentLayout:
    """The fragments of a warp that takes warp_outer of a tile's outer indices."""
    tile = chunk_tile(item_bytes, outer_size, along_depth)
    return FragmentLayout(tile, item_bytes, along_depth, left, warp_outer // 8)


def sum_pieces(dtype: str, first: int, pieces: int) -> list[tuple[int, int, int]]:
    """(piece, 32 bytes of its lines, first register): where a warpgroup's float32 sums go that are stored as dtype.

    A thread's registers are four for each 8 columns: two neighbours in one row, two in the row eight further.
    """
    of_piece, of_step = (16, 4) if dtype == "float32" else (32, 8)
    return [(piece, step, (first + piece) * of_piece + step * of_step) for piece in range(pieces) for step in range(4)]
