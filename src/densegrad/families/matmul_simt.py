"""Matrix products on FMA units: plans, and the launch of the kernel."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PlanError
from ..facts import ITEM_BYTES, accumulator_of
from ..launches import Launch, Result
from ..signatures import MatmulArguments, MatmulSimt, Side
from .common import ceil_div, check_choice, check_integers, check_sizes, constants_of, epilogue_of, named
from .tiling import FAR, ORIENTATIONS, Product, Tiling, square

#: (tile_rows, tile_cols, tile_depth, thread_rows, thread_cols), from large to small; their transposes are tried too
MATMUL_TILES = (
    (256, 128, 16, 8, 16),
    (128, 128, 8, 8, 8),
    (128, 64, 8, 8, 8),
    (64, 64, 8, 8, 8),
    (64, 32, 8, 8, 4),
    (32, 32, 8, 4, 4),
    (128, 16, 8, 8, 4),
    (64, 16, 8, 8, 4),
    (128, 4, 8, 4, 4),
    (16, 16, 8, 4, 4),
)
#: such tiles for sizes between 512 and 2048, twice as deep and with more warps: candidates that no row covers, and so
#: not chosen before somebody measures them
UNTRIED_TILES = ((64, 64, 16, 8, 4), (64, 64, 16, 4, 4))
#: how deep tiles are at the least: a vector of float32, and the depths that float64's dL/db adds up apart
LEAST_DEPTH = 4
#: what two stages may take of shared memory that a kernel declares
SHARED_BYTES = 49152


@dataclass(frozen=True)
class MatmulPlan(Tiling):
    """How result (rows, cols) = left (rows, depth) @ right (depth, cols) is computed on FMA units.

    Parameters
    ----------
    rows, cols, depth : int
        Sizes. For dL/dW: in_features, out_features, samples; for dL/dX: samples, in_features, out_features.
    dtype : str
        Of the operands.
    tile_rows, tile_cols, tile_depth : int
        What a block multiplies at a time; powers of two.
    thread_rows, thread_cols : int
        The results of one thread; powers of two, whole vectors of 16 bytes.
    parts : int
        How many pieces the depth is cut into, which are added in ascending order afterwards.

    Raises
    ------
    PlanError
        If no kernel can carry it out.
    """

    rows: int
    cols: int
    depth: int
    dtype: str
    tile_rows: int
    tile_cols: int
    tile_depth: int
    thread_rows: int
    thread_cols: int
    parts: int = 1

    precision = "ieee"

    def __post_init__(self) -> None:
        check_integers(self)
        check_choice("dtype", self.dtype, ITEM_BYTES)
        check_sizes(rows=self.rows, cols=self.cols, depth=self.depth)
        for name in ("tile_rows", "tile_cols", "tile_depth", "thread_rows", "thread_cols"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise PlanError(f"{name} must be a power of two; got {value}")
        vector = 16 // ITEM_BYTES[self.accumulator]
        for name, thread, tile in (("rows", self.thread_rows, self.tile_rows),
                                   ("cols", self.thread_cols, self.tile_cols)):
            if not vector <= thread <= tile:
                raise PlanError(f"thread_{name} must be between {vector} and tile_{name}, {tile}; got {thread}")
        if self.tile_depth < LEAST_DEPTH:
            raise PlanError(f"tile_depth must be at least {LEAST_DEPTH}; got {self.tile_depth}")
        if self.threads > 1024:
            raise PlanError(f"a block has at most 1024 threads; got tiles for {self.threads}")
        if self.shared_bytes > SHARED_BYTES:
            raise PlanError(f"two stages of these tiles take {self.shared_bytes} bytes of shared memory; at most "
                            f"{SHARED_BYTES} fit (make the tiles smaller)")
        self._check_parts()

    @property
    def T(self) -> MatmulPlan:
        """The plan of the transposed result, right.T @ left.T."""
        tile_rows, tile_cols, _, thread_rows, thread_cols = transposed_tile(
            (self.tile_rows, self.tile_cols, self.tile_depth, self.thread_rows, self.thread_cols))
        return replace(self, rows=self.cols, cols=self.rows, tile_rows=tile_rows, tile_cols=tile_cols,
                       thread_rows=thread_rows, thread_cols=thread_cols)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.tile_rows // self.thread_rows * (self.tile_cols // self.thread_cols)

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks the registers have to leave room for: 512 threads, or 256 with over 64 registers of sums.

        384 of smaller blocks: a few more than 128 registers keep the linked code from spilling.
        """
        resident = 256 if self.sums > 64 else 512 if self.threads >= 256 else 384
        return max(min(resident // (32 * ceil_div(self.threads, 32)), 16), 1)

    def _blocks_for(self, *sides: Side, offset_bits: int) -> int:
        """As many, but 256 threads of float64, of single warps and of far elements where rows of memory are turned.

        Those are rows that do not begin with a sector. They take registers that these have not; nor have half types
        with 64 sums a thread where one operand lies along the depth and the other across it.
        """
        if (self.dtype != self.accumulator and self.thread_rows * self.thread_cols >= 64
                and len({side.along_depth for side in sides}) > 1):
            return max(self.blocks_per_multiprocessor // 2, 1)
        turned = any(not side.along_depth and side.access * ITEM_BYTES[self.dtype] < 16 for side in sides)
        if turned and (self.accumulator == "float64" or self.threads <= 32 or offset_bits > 32):
            return max(min(self.blocks_per_multiprocessor, 8 // ceil_div(self.threads, 32)), 1)
        return self.blocks_per_multiprocessor

    @property
    def stages(self) -> int:
        """Slots for tiles in shared memory."""
        return 2

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: two stages of both tiles."""
        return self.stages * self.tile_depth * (self.tile_rows + self.tile_cols) * ITEM_BYTES[self.accumulator]

    @property
    def kind(self) -> str:
        """What the operands are multiplied as: half types as float32."""
        return self.accumulator

    @property
    def unit(self) -> tuple[int, int]:
        """The results of a thread."""
        return self.thread_rows, self.thread_cols

    @property
    def step_cycles(self) -> int:
        """For which a warp of float64 keeps its scheduler busy in each tile.

        Issue slots, of which a multiply-add takes two; or, if that is longer, the cycles in which shared memory, which
        four schedulers share, serves its accesses of 16 bytes a thread.
        """
        fragments = (self.thread_rows + self.thread_cols) // 2
        copies = ceil_div((self.tile_rows + self.tile_cols) * self.tile_depth // 2, self.threads)
        return max(self.tile_depth * (2 * self.thread_rows * self.thread_cols + fragments) + 4 * copies + 16,
                   16 * (self.tile_depth * fragments + copies))

    @property
    def sums(self) -> int:
        """Registers of a thread for sums."""
        return self.thread_rows * self.thread_cols * ITEM_BYTES[self.accumulator] // 4

    def explain(self) -> str:
        """The plan in words, with its reasons and what the model says."""
        threads = f"{self.thread_rows} x {self.thread_cols} results a thread, {self.threads} threads a block"
        return self._explain("FMA units", threads)

    def launch(self, product: Product, target: Result, sums: Result | None, arguments: MatmulArguments, *,
               free_at: int) -> Launch:
        """The launch of the kernel, with these arguments. Results are stored from registers in the type of the sums."""
        vector = 16 // ITEM_BYTES[self.accumulator]
        (left, _), (right, _) = product.sides(vector)
        constants = constants_of(MatmulSimt, self, {
            "left": left, "right": right, "result": epilogue_of(target, vector, self.accumulator),
            "sums_of": product.sums_of, "sums": sums and epilogue_of(sums, 1, self.accumulator),
            "offset_bits": (bits := product.offset_bits(self)),
            "blocks_per_multiprocessor": self._blocks_for(left, right, offset_bits=bits)})
        return Launch("densegrad.kernels.matmul_simt", "matmul_simt", constants, arguments, self.grid, self.threads,
                      plan=self)


def transposed_tile(tile: tuple[int, int, int, int, int]) -> tuple[int, int, int, int, int]:
    """The tile of the transposed result. 8 x 16 results a thread stay so: 16 x 8 do not fit into 255 registers."""
    rows, cols, depth, thread_rows, thread_cols = tile
    if (thread_rows, thread_cols) == (8, 16) and rows % 16 == 0:
        return cols, rows, depth, thread_rows, thread_cols
    return cols, rows, depth, thread_cols, thread_rows


def variants() -> Iterator[tuple[str, Launch]]:
    """The kernels for all dtypes, orientations and tiles, by name."""
    for dtype in ITEM_BYTES:
        medium, large = (MATMUL_TILES[4], MATMUL_TILES[5]) if dtype == "float64" else (MATMUL_TILES[3], MATMUL_TILES[1])
        for along_depth in ORIENTATIONS:
            yield from _variant(dtype, large, along_depth)
            yield from _variant(dtype, medium, along_depth, length=1023)
        for how in ({"sums": True}, {"accumulate": True}, {"accumulate": True, "sums": True,
                                                           "result": accumulator_of(dtype)}):
            yield from _variant(dtype, medium, how=how)
        for along_depth in ORIENTATIONS:
            yield from _variant(dtype, MATMUL_TILES[-1], along_depth, 1023, {"accumulate": True, "sums": True,
                                                                             "result": "float64"})
            yield from _variant(dtype, medium, along_depth, 1023, {"sums": True, "pitch": FAR})
        yield from _variant(dtype, large, how={"pitch": FAR})
        for tile in MATMUL_TILES + UNTRIED_TILES:
            if dtype == "float32" or (dtype == "float64" and tile in MATMUL_TILES and tile[3] * tile[4] <= 32):
                for turned in (tile, transposed_tile(tile)):
                    yield from _variant(dtype, turned)
                    yield from _variant(dtype, turned, length=1023)


def _variant(dtype: str, tile: tuple[int, ...], along_depth: tuple[bool, bool] = (False, False), length: int = 1024,
             how: dict[str, Any] | None = None) -> Iterator[tuple[str, Launch]]:
    title, found = square(MatmulPlan(length, length, length, dtype, *tile), along_depth, how or {})
    return named("-".join([dtype, "x".join(map(str, tile[:3])), "x".join(map(str, tile[3:])), title]), found)
