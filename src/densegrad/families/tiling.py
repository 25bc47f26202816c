"""What matrix products have in common: a result in tiles, a depth in parts, a model of the cost, and their launches."""
from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import PlanError
from ..facts import ITEM_BYTES, accumulator_of
from ..launches import ALPHA, ONE, Launch, Matrix, Result, Slot, scratch
from ..signatures import NO_COLUMN, ColumnAt, MatmulArguments, Scale, Side
from . import add_parts, batch_sum
from .add_parts import AddPartsPlan
from .batch_sum import SumPartsPlan
from .common import GRID_Y, ceil_div, check_choice
from .cost import MULTIPROCESSORS, ORDERS, ProductCost, cost_of

#: how float32 can be multiplied on tensor cores
TF32 = ("tf32", "tf32x3")
#: the step between tf32's subnormal numbers, and from which power of two on operands lose no more than product_error
TF32_STEP = 2.0 ** -136
_SMALLEST = {"tf32": -126, "tf32x3": -114}


class Tiling:
    """What the plans of matrix products have in common: the result in tiles, the depth in parts."""

    rows: int
    cols: int
    depth: int
    dtype: str
    tile_rows: int
    tile_cols: int
    tile_depth: int
    parts: int
    precision: str | None

    @property
    def accumulator(self) -> str:
        """The type of sums."""
        return accumulator_of(self.dtype)

    @property
    def depth_per_part(self) -> int:
        """The depth of every part but the last, a multiple of tile_depth."""
        return self._depth_of_parts(self.parts)

    def filled_parts(self, parts: int) -> int:
        """How many parts there are something to do for, where the depth is cut into so many."""
        return ceil_div(self.depth, self._depth_of_parts(parts))

    def _depth_of_parts(self, parts: int) -> int:
        return max(ceil_div(ceil_div(self.depth, parts), self.tile_depth), 1) * self.tile_depth

    @property
    def tiles(self) -> int:
        """Of the result."""
        return ceil_div(self.rows, self.tile_rows) * ceil_div(self.cols, self.tile_cols)

    @cached_property
    def group_bits(self) -> int:
        """Binary logarithm of how many tile rows are walked together.

        8 of them, less where that would leave blocks without a tile, more where a grid's y has no room.
        """
        down = ceil_div(self.rows, self.tile_rows)
        fits = [bits for bits in (3, 2, 1) if 16 * ((ceil_div(down, 1 << bits) << bits) - down) <= down]
        return max([*fits, (ceil_div(down, GRID_Y) - 1).bit_length(), 0])

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks: (tile columns times group, groups of tile rows, parts)."""
        group = 1 << self.group_bits
        down, across = ceil_div(self.rows, self.tile_rows), ceil_div(self.cols, self.tile_cols)
        return across * group, ceil_div(down, group), self.parts

    @property
    def pitch(self) -> int:
        """The length of a row of the workspace: cols in whole vectors of 16 bytes."""
        vector = 16 // ITEM_BYTES[self.accumulator]
        return ceil_div(self.cols, vector) * vector

    @property
    def workspace_bytes(self) -> int:
        """Memory for the parts of the result."""
        return self.parts * self.rows * self.pitch * ITEM_BYTES[self.accumulator] if self.parts > 1 else 0

    @property
    def chain(self) -> int:
        """The longest chain of additions that one result goes through; "tf32x3" adds its corrections at the end."""
        return min(self.depth_per_part, max(self.depth, 1)) + self.parts - 1 + (self.precision == "tf32x3")

    @property
    def product_error(self) -> float:
        """What each product may be off by, of its magnitude.

        "tf32" rounds each factor by 2⁻¹¹. "tf32x3" rounds what is left of each by 2⁻¹¹ again, and leaves out the
        product of what is left; the sums of what is left are rounded, too, each addition by 2⁻²⁴ of 2⁻¹⁰.
        """
        if self.precision == "tf32":
            return 2.0 ** -10 + 2.0 ** -22
        return 3.01 * 2.0 ** -22 + self.chain * 2.0 ** -33 if self.precision == "tf32x3" else 0.0

    @property
    def smallest_operand(self) -> float:
        """The smallest magnitude but 0 of operands for which product_error holds; smaller ones are operand_error off.

        What is left of a float32 below 2⁻¹¹⁴ may be less than the smallest normal number, and then has fewer bits.
        """
        return 2.0 ** _SMALLEST[self.precision] if self.precision in _SMALLEST else 0.0

    @property
    def operand_error(self) -> float:
        """What an operand below smallest_operand may be off by: the step between tf32's subnormal numbers."""
        return TF32_STEP if self.precision in _SMALLEST else 0.0

    @property
    def loaded_bytes(self) -> int:
        """What blocks read from global memory, most of it from cache: each operand once per tile of the other axis."""
        down, across = ceil_div(self.rows, self.tile_rows), ceil_div(self.cols, self.tile_cols)
        return (self.rows * across + self.cols * down) * self.depth * ITEM_BYTES[self.dtype]

    @property
    @abstractmethod
    def kind(self) -> str:
        """What the operands are multiplied as."""

    @property
    @abstractmethod
    def unit(self) -> tuple[int, int]:
        """The results of a thread, or of a warp on tensor cores."""

    @property
    @abstractmethod
    def T(self) -> Any:
        """The plan of the transposed result, right.T @ left.T."""

    def turned(self, result: Matrix) -> bool:
        """Whether the transposed product is computed instead: where columns of the result are contiguous."""
        return result.row_stride == 1 and (result.col_stride != 1 or result.cols == 1)

    def sums_ride(self, product: Product) -> bool:
        """Whether the right operand can be added up along the depth on the way."""
        return True

    def kept_sums(self, product: Product) -> int:
        """Rows of sums that the kernel keeps in the workspace; 0 if it writes the sums itself."""
        return self.parts if self.parts > 1 else 0

    def added_sums(self, kept: int, count: int) -> AddPartsPlan | SumPartsPlan:
        """How so many rows of so many sums are added by another launch."""
        return AddPartsPlan(kept, 1, count, ceil_div(count, 8) * 8, self.accumulator)

    def cost(self, order: str) -> ProductCost | None:
        """What the plan takes for operands of this order; None if no plan with its tile was measured."""
        return cost_of(self, order)

    def stores(self, result: Result) -> bool:
        """Whether the kernel can write this result, or add to it, if the depth is not cut: else add_parts does."""
        return True

    def first_pass(self, product: Product, free_at: int) -> tuple[Product, tuple[Launch, ...], int]:
        """The product as the kernel reads it, the launches before that write operands anew, into the workspace from the
        byte free_at on, and the byte from which it is free then.
        """
        return product, (), free_at

    @abstractmethod
    def launch(self, product: Product, target: Result, sums: Result | None, arguments: MatmulArguments, *,
               free_at: int) -> Launch:
        """The launch of the kernel, with these arguments; from the byte free_at on the workspace is not in use."""

    def _check_precision(self) -> None:
        if self.dtype == "float32":
            check_choice("plan: precision of float32", self.precision, TF32)
        elif self.precision is not None:
            raise PlanError(f"plan: precision of {self.dtype} must be None; got {self.precision!r}")

    def _check_parts(self) -> None:
        if not 1 <= self.parts <= GRID_Y:
            raise PlanError(f"parts must be between 1 and {GRID_Y}; got {self.parts}")
        if self.depth_per_part > 2**30:
            raise PlanError(f"a part has at most {2**30} depths; got {self.depth_per_part} (take more parts)")

    def _explain(self, unit: str, threads: str) -> str:
        tiles = self.tiles
        error, where = f"{self.chain + 1} u", ""
        if self.precision in _SMALLEST:
            error = f"({error} + {self.product_error:.2g})"
            where = f" where operands are 0 or at least 2^{_SMALLEST[self.precision]} in magnitude"
        used = self.rows * self.cols / (tiles * self.tile_rows * self.tile_cols) if self.rows and self.cols else 0.0
        lines = [
            f"({self.rows}, {self.depth}) @ ({self.depth}, {self.cols}), {self.dtype}, {unit}, "
            f"sums in {self.accumulator}",
            f"tiles of {self.tile_rows} x {self.tile_cols}, {self.tile_depth} deep: {tiles} tiles, {used:.0%} of them "
            f"results; {threads}",
        ]
        if 1 in (self.rows, self.cols, self.depth):
            kind = "an outer product" if self.depth == 1 else "a product of matrix and vector"
            lines.append(f"{kind}, bound by memory")
        if self.parts > 1:
            lines.append(f"the depth is cut into {self.parts} parts of {self.depth_per_part}: the tiles alone would be "
                         f"{tiles} blocks for {MULTIPROCESSORS} multiprocessors; {self.workspace_bytes} bytes of "
                         "workspace, added in ascending order")
        else:
            enough = tiles >= MULTIPROCESSORS
            lines.append("the depth is not cut: " + ("the tiles alone are enough blocks" if enough else
                                                     "cutting would cost more than it gains"))
        lines.append(f"longest chain of additions {self.chain}: |error| <= {error} (|left| @ |right|){where}")
        lines += explain_cost(self)
        return "\n".join(lines)


def explain_cost(plan: Tiling) -> list[str]:
    """What the plan takes for operands of either order, and where that is known from."""
    lines = []
    for order, what in zip(ORDERS, ("dL/dW", "dL/dX"), strict=True):
        cost = plan.cost(order)
        if cost is None:
            lines.append(f"operands {order} the depth ({what}): not measured, as no plan with this tile was")
            continue
        source = "by a nominal model, not measured"
        if cost.rows:
            source = f"by a model fitted to {cost.rows} measured plans" + (
                "" if cost.measured else ", of which none is of this kind or cut so far: not measured")
        lines.append(f"operands {order} the depth ({what}): {cost.total:.1f} us on an H200 (main loop {cost.loop:.1f}, "
                     f"blocks {cost.blocks:.1f}, memory {cost.memory:.1f}, parts {cost.parts:.1f}), {source}")
    return lines


@dataclass(frozen=True)
class Product:
    """left @ right as a kernel walks through it, and which operand is added up along the depth on the way, if any."""

    left: Matrix
    right: Matrix
    sums_of: str = ""

    @property
    def order(self) -> str:
        """How the operands lie, of what plans tell apart: "along" the depth if both do."""
        (left, _), (right, _) = self.sides(1)
        return "along" if left.along_depth and right.along_depth else "across"

    @property
    def T(self) -> Product:
        """The transposed product, right.T @ left.T."""
        return Product(self.right.T, self.left.T, {"left": "right", "right": "left"}.get(self.sums_of, ""))

    def sides(self, vector: int) -> tuple[tuple[Side, int], tuple[Side, int]]:
        """How either operand lies, in accesses of at most vector elements, and the stride that a kernel takes."""
        return side_of(self.left, vector), side_of(self.right.T, vector)

    def offset_bits(self, plan: Tiling) -> int:
        """Whether 32 bits can count the bytes within every tile."""
        def reach(operand: tuple[Side, int], outer: int) -> int:
            side, stride = operand
            return (outer if side.along_depth else plan.tile_depth) * abs(stride) * ITEM_BYTES[plan.dtype]

        left, right = self.sides(1)
        small = max(reach(left, plan.tile_rows), reach(right, plan.tile_cols)) < 2**31
        return 32 if small and left[1] >= 0 and right[1] >= 0 else 64


def side_of(operand: Matrix, vector: int) -> tuple[Side, int]:
    """An operand (outer, depth) is contiguous along the depth if it can be; a vector along the depth counts as that.

    A stride over a single row or column is taken as 0.
    """
    if operand.row_stride == 1 and (operand.rows > 1 or operand.col_stride != 1):
        return Side(False, operand.T.access(vector)), operand.col_stride if operand.cols > 1 else 0
    return Side(True, operand.access(vector)), operand.row_stride if operand.rows > 1 else 0


def launches(plan: Tiling, product: Product, result: Result, sums: Result | None = None,
             workspace_at: int = 0) -> tuple[Launch, ...]:
    """result = alpha * left @ right, and sums (1, cols) = alpha * the sum of the rows of right on the way.

    Each is overwritten or added to. Sums are only wanted of a result that has elements, and of a depth that is not 0.
    The parts of both are kept in the workspace from the byte workspace_at on.
    """
    if not result.matrix.rows or not result.matrix.cols or (result.accumulate and not plan.depth):
        return ()
    if sums is not None:
        product = Product(product.left, product.right, "right")
    if plan.turned(result.matrix):
        plan, product, result = plan.T, product.T, Result(result.matrix.T, result.accumulate)
    target, alpha, free_at = result, ALPHA, workspace_at
    later: tuple[Launch, ...] = ()
    if plan.parts > 1 or not plan.stores(result):
        parts = AddPartsPlan(plan.parts, plan.rows, plan.cols, plan.pitch, plan.accumulator)
        workspace = scratch(free_at, plan.parts * plan.rows, plan.pitch, plan.accumulator)
        target, alpha, free_at = Result(replace(workspace, rows=plan.rows)), ONE, workspace.end
        later += add_parts.launches(parts, target.matrix, result)
    summed = sums
    kept = plan.kept_sums(product) if sums is not None else 0
    if sums is not None and kept:
        added = plan.added_sums(kept, sums.matrix.cols)
        partial = scratch(free_at, kept, added.pitch, plan.accumulator)
        summed, free_at = Result(partial), partial.end
        later += ((batch_sum.sum_parts(added, partial, sums, ALPHA),) if isinstance(added, SumPartsPlan)
                  else add_parts.launches(added, partial, sums))
    product, before, free_at = plan.first_pass(product, free_at)
    return *before, _launch(plan, product, (target, summed), alpha, free_at), *later


def _launch(plan: Tiling, product: Product, results: tuple[Result, Result | None], alpha: Scale,
            free_at: int) -> Launch:
    """The kernel's launch; result and sums are those of the first part where they are kept in the workspace."""
    result, sums = results
    target = result.matrix
    left, right = product.sides(1)
    summed, sums_part_stride = NO_COLUMN, 0
    if sums is not None:
        summed = ColumnAt(sums.matrix.address, sums.matrix.col_stride)
        sums_part_stride = sums.matrix.row_stride if plan.parts > 1 else 0
    return plan.launch(product, result, sums, MatmulArguments(
        product.left.address, left[1], product.right.address, right[1], target.at, target.rows * target.row_stride,
        plan.rows, plan.cols, plan.depth, plan.depth_per_part, plan.group_bits, alpha, summed, sums_part_stride),
        free_at=free_at)


def square(plan: Tiling, along_depth: tuple[bool, bool], how: dict[str, Any]) -> tuple[str, tuple[Launch, ...]]:
    """A title and the launches of a product of square operands, contiguous along the depth or the other axis.

    `how` may name another dtype of the "result", whether it is "turned", whether to "accumulate", whether "sums" ride
    along, and how far rows lie apart, as "pitch".
    """
    result, accumulate, sums = how.get("result", plan.dtype), how.get("accumulate", False), how.get("sums", False)
    length, (left_along, right_along) = plan.depth, along_depth
    pitch, turned = how.get("pitch", length), how.get("turned", False)
    left, right, target = (Matrix(Slot(name), dtype, length, length, pitch, 1)
                           for name, dtype in (("left", plan.dtype), ("right", plan.dtype), ("result", result)))
    product = Product(left if left_along else left.T, right.T if right_along else right)
    title = "-".join(["depth" if left_along else "rows", "depth" if right_along else "cols"]
                     + [f"to-{result}"] * (result != plan.dtype) + ["odd"] * (length % 2)
                     + ["far"] * (pitch > length) + ["turned"] * turned + ["accumulate"] * accumulate + ["sums"] * sums)
    summed = Result(Matrix(Slot("sums"), result, 1, length, length, 1), accumulate) if sums else None
    return title, launches(plan, product, Result(target.T if turned else target, accumulate), summed)


#: elements from row to row, so many that 32 bits do not count the bytes of a tile
FAR = 2 ** 30
#: whether the left and the right operand are contiguous along the depth
ORIENTATIONS = ((False, False), (True, True), (True, False), (False, True))
