"""Matrix products on Hopper's tensor cores: plans, and the launch of the kernel."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from ..errors import PlanError
from ..facts import BOX_LINES, ITEM_BYTES, LINE_BYTES, MAP_WORDS, SIZES
from ..launches import Launch, Matrix, Result, Room, Slot, TensorMap
from ..signatures import MatmulArguments, MatmulHopper, MatmulHopperArguments
from .batch_sum import SumPartsPlan
from .common import ceil_div, check_choice, check_integers, check_sizes, constants_of, named, power_of_two
from .cost import BYTES_A_MICROSECOND, LAUNCH, MULTIPROCESSORS, ProductCost, matrices_bytes
from .tiling import ORIENTATIONS, TF32, Product, Tiling, side_of, square
from .turn_operand import TurnPlan, turned

#: the only compute capability with these instructions
HOPPER = (9, 0)
HALF_TYPES = ("float16", "bfloat16")
#: columns of a tile, and the stages that shared memory has room for beside staged results
HOPPER_STAGES = {256: 3, 192: 4, 128: 5}
#: the same of "tf32x3": a stage has two terms of each operand, and a thread two sums for each result
SPLIT_STAGES = {128: 3}
#: microseconds in which a block starts its barriers, writes its maps and fills its stages
START = 2.0
#: microseconds of a stage where all multiprocessors work, and what share of them it takes where half or fewer do
STEP_MICROSECONDS, ALONE = {256: 0.82, 192: 0.63, 128: 0.43}, 0.78
#: how many tiles share the rounds of sums along the depth at the most, and the threads of each that add
MOST_SHARERS, ADDERS = 32, 96
#: the lanes that add the rows of sums which they leave
SUM_LANES = 32
#: three warpgroups, of which two multiply 64 rows of a tile each
THREADS, TILE_ROWS = 384, 128
#: the largest depth, and the largest number of rows or columns: coordinates have 32 bits
MOST_DEPTH, MOST_LENGTH = 2**31, 2**31 - 256
#: what addresses and steps of a tensor map are multiples of, and what its steps stay below, in bytes
MAP_ALIGNMENT, MOST_STEP = 16, 2**40


@dataclass(frozen=True)
class HopperPlan(Tiling):
    """How result (rows, cols) = left (rows, depth) @ right (depth, cols) is computed on Hopper's tensor cores.

    Both operands must begin at multiples of 16 bytes, and so must each of their rows; not those of float32 that a
    launch before writes anew into the workspace: "tf32" has those turned that do not lie along the depth, "tf32x3" has
    each split into two terms.

    Parameters
    ----------
    rows, cols, depth : int
        Sizes, as of a MatmulPlan; none is 0.
    dtype : str
        Of the operands: float16, bfloat16 or float32.
    tile_cols : int
        Columns of a tile of 128 rows: 256, 192 or 128; of "tf32x3" 128.
    parts : int
        How many pieces the depth is cut into, which are added in ascending order afterwards.
    precision : str or None
        What float32 is multiplied as: "tf32" or "tf32x3". None for float16 and bfloat16.

    Raises
    ------
    PlanError
        If no kernel can carry it out.
    """

    rows: int
    cols: int
    depth: int
    dtype: str
    tile_cols: int
    parts: int = 1
    precision: str | None = None

    capability = HOPPER
    tile_rows = TILE_ROWS
    adders = ADDERS

    def __post_init__(self) -> None:
        check_integers(self)
        check_choice("plan: dtype", self.dtype, (*HALF_TYPES, "float32"))
        self._check_precision()
        check_sizes(rows=self.rows, cols=self.cols, depth=self.depth)
        widths = stages_of(self.precision)
        if self.tile_cols not in widths:
            raise PlanError(f"tile_cols must be one of {', '.join(map(str, widths))}; got {self.tile_cols}")
        if not self.rows or not self.cols or not self.depth:
            raise PlanError(f"rows, cols and depth must be at least 1; got {self.rows}, {self.cols} and {self.depth} "
                            "(nothing is to be multiplied: pass no plan)")
        if not counts((self.rows, self.cols, self.depth), self.precision):
            raise PlanError(f"rows and cols must be at most {MOST_LENGTH}, depth at most {MOST_DEPTH // self.terms}; "
                            f"got {self.rows}, {self.cols} and {self.depth}")
        self._check_parts()
        if self.pieces >= 2**31 - MULTIPROCESSORS:
            raise PlanError(f"tiles times parts must be below 2^31 - {MULTIPROCESSORS}; got {self.pieces}")

    @property
    def tile_depth(self) -> int:  # type: ignore[override]
        """Depths of a stage: a line."""
        return LINE_BYTES // ITEM_BYTES[self.dtype]

    @property
    def terms(self) -> int:
        """Matrices that stand for an operand."""
        return terms_of(self.precision)

    @property
    def stages(self) -> int:
        """Slots for tiles in shared memory."""
        return stages_of(self.precision)[self.tile_cols]

    @property
    def most_staged(self) -> int:
        """Boxes of results that a warpgroup stores at a time."""
        return 4 // self.terms

    @property
    def pieces(self) -> int:
        """Tiles of all parts."""
        return self.tiles * self.parts

    @property
    def workers(self) -> int:
        """Blocks, which take pieces in turn: on a GPU of fewer multiprocessors as many as it has."""
        return min(self.pieces, MULTIPROCESSORS)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return THREADS

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks."""
        return self.workers, 1, 1

    @property
    def kind(self) -> str:
        """What the operands are multiplied as."""
        return self.precision or self.dtype

    @property
    def unit(self) -> tuple[int, int]:
        """The results of a warpgroup."""
        return 64, self.tile_cols

    @property
    def T(self) -> HopperPlan:
        """The plan of the transposed result, right.T @ left.T."""
        return replace(self, rows=self.cols, cols=self.rows)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the stages, boxes of results for each of two warpgroups, two barriers a stage, and
        what is lost where memory begins between two multiples of 1 KiB.
        """
        stage = self.terms * LINE_BYTES * (TILE_ROWS + self.tile_cols) + 16
        return self.stages * stage + 2 * self.most_staged * BOX_LINES * LINE_BYTES + 1024

    def sums_ride(self, product: Product) -> bool:
        """Whether the right operand can be added up along the depth on the way: only if it is contiguous across it,
        and of a half type.
        """
        return self.dtype in HALF_TYPES and not side_of(product.right.T, 1)[0].along_depth

    def sharers(self, of_left: bool) -> int:
        """How many of the tiles that read the same part of the summed operand share the rounds of adding it up."""
        return min(ceil_div(self.cols, self.tile_cols) if of_left else ceil_div(self.rows, TILE_ROWS), MOST_SHARERS)

    def shares(self, of_left: bool) -> int:
        """How many threads add the same columns of a stage, each in other lines."""
        return ADDERS // ((TILE_ROWS if of_left else self.tile_cols) // 8)

    def rows_of_sums(self, of_left: bool) -> int:
        """Rows of sums that the kernel keeps in the workspace: one for every share of lines of each part's sharers."""
        return self.parts * self.sharers(of_left) * self.shares(of_left)

    def kept_sums(self, product: Product) -> int:
        """Rows of sums that the kernel keeps in the workspace."""
        return self.rows_of_sums(product.sums_of == "left")

    def added_sums(self, kept: int, count: int) -> SumPartsPlan:
        """How the rows of sums are added: they may be thousands."""
        return SumPartsPlan(kept, count, self.accumulator, min(SUM_LANES, power_of_two(kept)), compensated=False)

    @property
    def sums_chain(self) -> int:
        """The longest chain of additions that one sum along the depth goes through, which rides along."""
        return max(self._sums_chain(of_left) for of_left in (False, True))

    def _sums_chain(self, of_left: bool) -> int:
        rounds = self.depth_per_part // self.tile_depth * ceil_div(8, self.shares(of_left))
        added = self.added_sums(self.rows_of_sums(of_left), 1)
        return 8 * ceil_div(rounds, self.sharers(of_left)) - 1 + added.chain

    def stores(self, result: Result) -> bool:
        """Whether boxes can be stored: in the operands' type, or in float32, which can be added to; aligned."""
        target = result.matrix
        known = target.dtype == "float32" or (target.dtype == self.dtype and not result.accumulate)
        return known and _takes_boxes(target)

    def cost(self, order: str) -> ProductCost:
        """What the plan takes by a nominal model: waves of pieces, whose steps take less where fewer work at a time.

        Its numbers are those of a prototype of the kernel on an H100, the same for operands of either order; a step of
        "tf32x3" counts as three. Operands of float32 that a first pass turns, both of them, take the time that memory
        moves them in.
        """
        steps = self.depth_per_part // self.tile_depth
        waves, rest = divmod(self.pieces, MULTIPROCESSORS)
        share = rest / MULTIPROCESSORS
        alone = ALONE + (1 - ALONE) * max(2 * share - 1, 0)
        each = STEP_MICROSECONDS[self.tile_cols] * (3 if self.precision == "tf32x3" else 1)
        loop = each * steps * (waves + (alone if rest else 0))
        parts = 0.0
        if self.parts > 1:
            parts = LAUNCH + 2 * self.workspace_bytes / BYTES_A_MICROSECOND
        before = 0.0
        if self.precision == "tf32x3" or (self.precision and order != "along"):
            moved = sum(TurnPlan(outer, self.depth, self.terms).moved_bytes for outer in (self.rows, self.cols))
            before = 2 * LAUNCH + moved / BYTES_A_MICROSECOND
        return ProductCost(loop, LAUNCH + START + ceil_div(self.pieces, MULTIPROCESSORS), before, parts,
                           least=matrices_bytes(self) / BYTES_A_MICROSECOND, measured=False, rows=0)

    def explain(self) -> str:
        """The plan in words, with its reasons and what the model says."""
        unit = f"tensor cores in {self.precision}" if self.precision else "tensor cores"
        aligned = "operands aligned to 16 bytes"
        operands = {"tf32": f"{aligned}, or turned in a launch before where they lie across the depth",
                    "tf32x3": "each operand split into two terms in a launch before"}.get(self.kind, aligned)
        text = self._explain(f"{unit} of compute capability 9.0",
                             f"{self.workers} blocks of {THREADS} threads take pieces in turn, {self.stages} stages; "
                             f"{operands}")
        if self.dtype in HALF_TYPES:
            text += f"\nlongest chain of additions of db, where it rides along: {self.sums_chain}"
        return text

    def first_pass(self, product: Product, free_at: int) -> tuple[Product, tuple[Launch, ...], int]:
        """Operands of float32 that do not lie along the depth, or are split, as TurnPlans leave them."""
        before: list[Launch] = []
        operands = [product.left, product.right.T]
        for number, operand in enumerate(operands):
            if self.precision and not _lies_ready(operand, self.precision):
                operands[number], launch = turned(TurnPlan(operand.rows, self.depth, self.terms), operand, free_at)
                before.append(launch)
                free_at = operands[number].end
        return Product(operands[0], operands[1].T, product.sums_of), tuple(before), free_at

    def launch(self, product: Product, target: Result, sums: Result | None, arguments: MatmulArguments, *,
               free_at: int) -> Launch:
        """The launch of the kernel, with these arguments; from the byte free_at on the workspace is not in use.

        Raises
        ------
        PlanError
            If an operand has no tensor map.
        """
        for name, operand in (("left", product.left), ("right", product.right.T)):
            if not _has_map(operand):
                raise PlanError(f"plan is for operands whose rows begin at multiples of {MAP_ALIGNMENT} bytes, and the "
                                f"{name} one does not (pass another plan or none, or arrays that are aligned so)")
        left, left_across = _map_of(product.left, TILE_ROWS)
        right, right_across = _map_of(product.right.T, self.tile_cols)
        constants = constants_of(MatmulHopper, self, {
            "left_across": left_across, "right_across": right_across, "target": target.matrix.dtype,
            "accumulate": target.accumulate, "sums_of": product.sums_of if sums else ""})
        summed = (sums.matrix.address, sums.matrix.row_stride, self.sharers(product.sums_of == "left")) if sums else (
            0, 0, 1)
        down, across = ceil_div(self.rows, TILE_ROWS), ceil_div(self.cols, self.tile_cols)
        return Launch("densegrad.kernels.matmul_hopper", "matmul_hopper", constants, MatmulHopperArguments(
            left, right, _map_of_result(target.matrix, self.rows, self.parts),
            Room(free_at, 3 * MAP_WORDS * self.workers, "int64"), self.pieces, down, across,
            ceil_div(self.depth, self.tile_depth), self.depth_per_part // self.tile_depth, arguments.alpha,
            *summed),
            self.grid, THREADS, plan=self, shared_bytes=self.shared_bytes, capability=HOPPER,
            alone=True, in_turn=True)


def terms_of(precision: str | None) -> int:
    """Matrices that stand for an operand at this precision."""
    return 2 if precision == "tf32x3" else 1


def stages_of(precision: str | None) -> dict[int, int]:
    """Columns of the tiles that there are at this precision, and their stages."""
    return SPLIT_STAGES if precision == "tf32x3" else HOPPER_STAGES


def counts(sizes: tuple[int, int, int], precision: str | None) -> bool:
    """Whether 32 bits count rows, cols and depth, which are at least 1."""
    rows, cols, depth = sizes
    return min(sizes) > 0 and max(rows, cols) <= MOST_LENGTH and depth <= MOST_DEPTH // terms_of(precision)


def has_maps(product: Product, precision: str | None) -> bool:
    """Whether both operands have tensor maps, or get them where a launch before leaves them in the workspace."""
    return all(_has_map(operand) or (precision in TF32 and not _lies_ready(operand, precision))
               for operand in (product.left, product.right.T))


def _lies_ready(operand: Matrix, precision: str | None) -> bool:
    """Whether an operand (outer, depth) of float32 lies as it is multiplied: along the depth, in one term."""
    return precision == "tf32" and side_of(operand, 1)[0].along_depth


def _has_map(operand: Matrix) -> bool:
    """Whether boxes of an operand (outer, depth) can be copied, in lines along the axis that is contiguous."""
    side, _ = side_of(operand, 1)
    return _takes_boxes(operand if side.along_depth else operand.T)


def _takes_boxes(matrix: Matrix) -> bool:
    """Whether boxes of a matrix can be copied, or stored to, whose lines lie along its rows."""
    step = matrix.row_stride * SIZES[matrix.dtype]
    contiguous = matrix.col_stride == 1 or matrix.cols == 1
    apart = matrix.rows == 1 or (0 < step < MOST_STEP and step % MAP_ALIGNMENT == 0)
    return bool(matrix.rows and matrix.cols and contiguous and apart and matrix.alignment >= MAP_ALIGNMENT)


def _map_of(operand: Matrix, outer: int) -> tuple[TensorMap, bool]:
    """The map of an operand (outer, depth), in boxes of `outer` rows where lines are rows; whether lines are depths.

    float32 is rounded to tf32 on the way.
    """
    side, stride = side_of(operand, 1)
    size = SIZES[operand.dtype]
    line, rounded = LINE_BYTES // size, {"float32": "tfloat32"}.get(operand.dtype, "")
    if side.along_depth:
        return _map(operand, (operand.cols, operand.rows), (stride * size,), (line, outer), rounded), False
    return _map(operand, (operand.rows, operand.cols), (stride * size,), (line, line)), True


def _map_of_result(result: Matrix, rows: int, parts: int) -> TensorMap:
    """The map of a result, or of its parts, which follow one another."""
    size = SIZES[result.dtype]
    step = result.row_stride * size if rows > 1 or parts > 1 else 0
    return _map(result, (result.cols, rows, parts), (step, rows * step if parts > 1 else 0),
                (LINE_BYTES // size, BOX_LINES, 1))


def _map(matrix: Matrix, lengths: tuple[int, ...], steps: tuple[int, ...], box: tuple[int, ...],
         rounded: str = "") -> TensorMap:
    """A map; a step of 0, along an axis of length 1, is taken as one that maps may have."""
    address = cast("Slot | Room", matrix.address)
    return TensorMap(address, rounded or matrix.dtype, lengths, tuple(step or MAP_ALIGNMENT for step in steps), box)


def variants() -> Iterator[tuple[str, Launch]]:
    """The kernels for all dtypes, tiles, orientations and results, by name."""
    for dtype in HALF_TYPES:
        for tile_cols in HOPPER_STAGES:
            for along_depth in ORIENTATIONS:
                yield from _variant(dtype, tile_cols, along_depth)
            yield from _variant(dtype, tile_cols, how={"result": "float32"})
            yield from _variant(dtype, tile_cols, how={"result": "float32", "accumulate": True})
            for of_left in (False, True):
                yield from _variant(dtype, tile_cols, how={"sums": True, "turned": of_left})
                yield from _variant(dtype, tile_cols, how={"result": "float32", "accumulate": True, "sums": True,
                                                           "turned": of_left})
    for precision in TF32:
        for tile_cols in stages_of(precision):
            for accumulate in (False, True):
                yield from _variant("float32", tile_cols, (True, True), {"accumulate": accumulate}, precision)


def _variant(dtype: str, tile_cols: int, along_depth: tuple[bool, bool] = (False, False),
             how: dict[str, Any] | None = None, precision: str | None = None) -> Iterator[tuple[str, Launch]]:
    plan = HopperPlan(1024, 1024, 1024, dtype, tile_cols, precision=precision)
    title, found = square(plan, along_depth, how or {})
    return named(f"{plan.kind}-128x{tile_cols}-{title}", found)
