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
