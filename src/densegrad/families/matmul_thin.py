"""Matrix products of which one operand is thin, a matrix of at most 8 rows or columns: plans, cost, launch."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import PlanError
from ..facts import ITEM_BYTES, accumulator_of
from ..launches import Launch, Matrix, Result, Slot
from ..signatures import MatmulArguments, MatmulThin, Side
from .common import ceil_div, check_choice, check_integers, check_sizes, constants_of, epilogue_of, named, power_of_two
from .cost import BYTES_A_MICROSECOND, LAUNCH, MULTIPROCESSORS, ProductCost, matrices_bytes
from .tiling import ORIENTATIONS, Product, Tiling, launches

#: rows or columns of the result up to which one operand counts as thin
THIN = 8
#: threads of a block
THREADS = 256
#: microseconds between a load and what it brings, in which bytes under way are not there yet: assumed, not measured
LATENCY = 0.8
#: bytes that the L2 cache hands out in a microsecond; assumed, not measured
L2_BYTES_A_MICROSECOND = 5.5e6
#: microseconds in which a block begins, adds its threads up and stores; assumed, not measured
BLOCK = 1.5
#: microseconds of adding 16 parts, which are loaded together; assumed, not measured
SIXTEEN_PARTS = 1.0


@dataclass(frozen=True)
class ThinPlan(Tiling):
    """How result (rows, cols) = left (rows, depth) @ right (depth, cols) is computed where rows or cols are few.

    Parameters
    ----------
    rows, cols, depth : int
        Sizes, as of a MatmulPlan. At least one of rows and cols is at most 8: if rows are, the left operand is the thin
        one, else the right one.
    dtype : str
        Of the operands.
    threads_across : int
        Threads side by side across the depth; a power of two.
    threads_along : int
        Threads that share the depth; a power of two.
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
    threads_across: int
    threads_along: int
    parts: int = 1

    precision = "ieee"

    def __post_init__(self) -> None:
        check_integers(self)
        check_choice("dtype", self.dtype, ITEM_BYTES)
        check_sizes(rows=self.rows, cols=self.cols, depth=self.depth)
        if min(self.rows, self.cols) > THIN:
            raise PlanError(f"rows or cols must be at most {THIN}; got {self.rows} and {self.cols} (make a MatmulPlan)")
        for name in ("threads_across", "threads_along"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise PlanError(f"{name} must be a power of two; got {value}")
        if not 32 <= self.threads <= THREADS:
            raise PlanError(f"a block has 32 to {THREADS} threads; got {self.threads}")
        self._check_parts()

    @property
    def T(self) -> ThinPlan:
        """The plan of the transposed result, right.T @ left.T."""
        return replace(self, rows=self.cols, cols=self.rows)

    def turned(self, result: Matrix) -> bool:
        """Whether the transposed product is computed: where the right operand is the thin one."""
        return self.rows > THIN

    def sums_ride(self, product: Product) -> bool:
        """Whether the right operand can be added up along the depth on the way: not if it is the thin one."""
        return self.rows <= THIN

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.threads_across * self.threads_along

    @property
    def thread_rows(self) -> int:
        """Results of a thread across the thin operand, a power of two."""
        return power_of_two(max(self.rows if self.rows <= THIN else self.cols, 1))

    @property
    def thread_cols(self) -> int:
        """Results of a thread across the other operand: 16 bytes of sums."""
        return 16 // ITEM_BYTES[self.accumulator]

    @property
    def thread_depth(self) -> int:
        """Depths of a thread in each step: as many as registers have room for beside the sums."""
        few = self.thread_rows * ITEM_BYTES[self.accumulator] <= 16
        return max(self.thread_cols, 8 if few else 4)

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks the registers have to leave room for."""
        return 1 if self.accumulator == "float64" and self.thread_rows > 4 else 2

    @property
    def tile_rows(self) -> int:  # type: ignore[override]
        """Of the result."""
        return self.thread_rows if self.rows <= THIN else self.thread_cols * self.threads_across

    @property
    def tile_cols(self) -> int:  # type: ignore[override]
        """Of the result."""
        return self.thread_cols * self.threads_across if self.rows <= THIN else self.thread_rows

    @property
    def tile_depth(self) -> int:  # type: ignore[override]
        """Of a step."""
        return self.thread_depth * self.threads_along

    @property
    def chain(self) -> int:
        """The longest chain of additions that one result goes through."""
        each = self.threads_along * self.thread_cols
        of_thread = ceil_div(min(self.depth_per_part, max(self.depth, 1)), each) * self.thread_cols
        return of_thread + self.threads_along + self.parts - 2

    @property
    def kind(self) -> str:
        """What the operands are multiplied as: half types as float32."""
        return self.accumulator

    @property
    def unit(self) -> tuple[int, int]:
        """The results of a thread."""
        rows, cols = self.thread_rows, self.thread_cols
        return (rows, cols) if self.rows <= THIN else (cols, rows)

    def explain(self) -> str:
        """The plan in words, with its reasons and what the model says."""
        which = "left" if self.rows <= THIN else "right"
        threads = (f"{self.threads_across} threads across the depth and {self.threads_along} along it, which read the "
                   f"{which} operand, the thin one, again for every tile and the other once")
        return self._explain("FMA units", threads)

    def cost(self, order: str) -> ProductCost:
        """What the plan takes by a nominal model: the bytes that a multiprocessor reads, at the rate that those which
        it has under way allow; or, if that is longer, what all tiles read, at the rate of the L2 cache.
        """
        blocks = max(self.tiles, 1) * self.parts
        share = ceil_div(blocks, MULTIPROCESSORS)
        resident = min(share, 2 * self.blocks_per_multiprocessor * THREADS // self.threads)
        step = min(min(self.depth_per_part, max(self.depth, 1)) / self.tile_depth, 1)
        used = step * max(self.rows * self.cols, 1) / (max(self.tiles, 1) * self.tile_rows * self.tile_cols)
        under_way = resident * self.threads * self.thread_cols * self.thread_depth * ITEM_BYTES[self.dtype] * used
        rate = min(BYTES_A_MICROSECOND / MULTIPROCESSORS, under_way / LATENCY)
        loop = share / blocks * max(matrices_bytes(self) / rate,
                                    self.loaded_bytes / (L2_BYTES_A_MICROSECOND / MULTIPROCESSORS))
        memory = 2 * self.workspace_bytes / BYTES_A_MICROSECOND
        parts = LAUNCH + SIXTEEN_PARTS * ceil_div(self.parts, 16) if self.parts > 1 else 0.0
        return ProductCost(loop, LAUNCH + BLOCK * ceil_div(share, resident), memory, parts,
                           least=matrices_bytes(self) / BYTES_A_MICROSECOND, measured=False, rows=0)

    def launch(self, product: Product, target: Result, sums: Result | None, arguments: MatmulArguments, *,
               free_at: int) -> Launch:
        """The launch of the kernel, with these arguments; the left operand is the thin one."""
        (left, _), (right, _) = product.sides(16 // ITEM_BYTES[self.dtype])
        most = self.thread_rows
        if left.along_depth:
            most = self.thread_cols if right.along_depth else 1
        constants = constants_of(MatmulThin, self, {
            "left": Side(left.along_depth, min(left.access, most)),
            "right": Side(right.along_depth, min(right.access, self.thread_cols)),
            "result": epilogue_of(target, 1, self.accumulator),
            "sums": sums and epilogue_of(sums, 1, self.accumulator)})
        return Launch("densegrad.kernels.matmul_thin", "matmul_thin", constants, arguments, self.grid, self.threads,
                      plan=self)


def threads_of(order: str, dtype: str, cols: int, depth: int) -> list[tuple[int, int]]:
    """(across, along): the threads of a block that plans are made of, for the operand that is not thin.

    Threads side by side read at least 64 bytes that lie side by side, and none lies beyond the operand for nothing.
    """
    vector = 16 // ITEM_BYTES[accumulator_of(dtype)]
    beside = max(64 // (vector * ITEM_BYTES[dtype]), 1)
    found = []
    for along in (4, 8, 16, 32, 64, 128):
        across = THREADS // along
        near, length = (across, cols) if order == "across" else (along, depth)
        if near >= beside and (near == beside or near * vector < 2 * max(length, 1)):
            found.append((across, along))
    return found


def variants() -> Iterator[tuple[str, Launch]]:
    """The kernels for all dtypes and orientations, of one, two, four and eight rows, by name."""
    for dtype in ITEM_BYTES:
        for along_depth in ORIENTATIONS:
            yield from _variant(dtype, 1, along_depth)
        for rows, length in ((2, 1024), (4, 1023), (8, 1024), (8, 1023)):
            for along_depth in ORIENTATIONS[:2]:
                yield from _variant(dtype, rows, along_depth, length)


def _variant(dtype: str, rows: int, along_depth: tuple[bool, bool], length: int = 1024) -> Iterator[tuple[str, Launch]]:
    """Sums ride along where the right operand is contiguous across the depth; else the result is added to."""
    left_along, right_along = along_depth
    plan = ThinPlan(rows, length, length, dtype, *((8, 32) if right_along else (32, 8)))
    left, right = (Matrix(Slot(name), dtype, *shape, shape[1], 1) for name, shape in (
        ("left", (rows, length) if left_along else (length, rows)), ("right", (length, length))))
    product = Product(left if left_along else left.T, right.T if right_along else right)
    result, sums = (Matrix(Slot(name), dtype, count, length, length, 1)
                    for name, count in (("result", rows), ("sums", 1)))
    title = "-".join([dtype, str(rows), "depth" if left_along else "rows", "depth" if right_along else "cols"]
                     + ["odd"] * (length % 2) + ["accumulate" if right_along else "sums"])
    return named(title, launches(plan, product, Result(result, right_along), None if right_along else Result(sums)))
