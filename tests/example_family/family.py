"""Squared norms of rows: the plan, the choice of one, its launches, the variants worth compiling."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from densegrad.errors import PlanError
from densegrad.facts import ITEM_BYTES, accumulator_of
from densegrad.families.common import (
    GRID_Y,
    ceil_div,
    check_choice,
    check_integers,
    check_positive,
    check_sizes,
    constants_of,
    named,
)
from densegrad.launches import ALPHA, Clear, Launch, Matrix, Result, Room, Slot, scratch
from densegrad.signatures import ColumnAt

from .signatures import SquareNorms, SquareNormsArguments


@dataclass(frozen=True)
class SquareNormsPlan:
    """How the squared norms of the rows of a matrix (rows, cols) are computed."""

    rows: int
    cols: int
    dtype: str
    cols_per_part: int
    adders: int = 8
    rows_of_block: int = 4

    def __post_init__(self) -> None:
        check_integers(self)
        check_choice("plan: dtype", self.dtype, ITEM_BYTES)
        check_sizes(rows=self.rows, cols=self.cols)
        check_positive(self, "rows", "cols")
        if self.threads > 1024:
            raise PlanError(f"a block has at most 1024 threads; got adders * rows_of_block = {self.threads}")
        if self.parts > GRID_Y:
            raise PlanError(f"there are at most {GRID_Y} parts; got {self.parts} (take more cols_per_part)")

    @property
    def accumulator(self) -> str:
        """The type of the sums."""
        return accumulator_of(self.dtype)

    @property
    def parts(self) -> int:
        """Parts of the columns."""
        return max(1, ceil_div(self.cols, self.cols_per_part))

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.adders * self.rows_of_block

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks: (along the rows, parts)."""
        return ceil_div(self.rows, self.rows_of_block), self.parts

    @property
    def chain(self) -> int:
        """The longest chain of additions that one result goes through."""
        return ceil_div(self.cols_per_part, self.adders) + self.adders + self.parts

    def explain(self) -> str:
        """The plan in words."""
        return (f"squared norms of {self.rows} rows of {self.cols} {self.dtype}, each element read once\n"
                f"grid {self.grid[0]} x {self.grid[1]} blocks of {self.threads} threads, {self.adders} for each row; "
                "the block that comes last adds the parts in ascending order\n"
                f"longest chain of additions {self.chain}")


def plan_square_norms(rows: int, cols: int, dtype: str) -> SquareNormsPlan:
    """The plan for these sizes and this dtype: parts of at least 1,024 columns."""
    check_sizes(rows=rows, cols=cols)
    return SquareNormsPlan(rows, cols, dtype, max(1024, ceil_div(cols, GRID_Y)))


def launches(plan: SquareNormsPlan, source: Matrix, result: Result) -> tuple[Launch | Clear, ...]:
    """result (rows, 1) = alpha * the squared norms of the rows of source, or that added into result."""
    if not plan.rows:
        return ()
    target, blocks = result.matrix, plan.grid[0]
    partial = scratch(0, plan.parts, plan.rows, plan.accumulator)
    arrivals = Room(partial.end, blocks, "int32")
    constants = constants_of(SquareNorms, plan, {"result": target.dtype, "accumulate": result.accumulate})
    arguments = SquareNormsArguments(source.at, plan.rows, plan.cols, plan.cols_per_part, partial.address, arrivals,
                                     ColumnAt(target.address, target.row_stride), ALPHA)
    return Clear(arrivals), Launch("tests.example_family.kernel", "square_norms", constants, arguments, plan.grid,
                                   plan.threads, plan=plan)


def variants() -> Iterator[tuple[str, Launch]]:
    """The kernels of all dtypes, overwriting and adding, by name."""
    for dtype in ITEM_BYTES:
        for accumulate in (False, True):
            plan = plan_square_norms(1024, 4096, dtype)
            source = Matrix(Slot("x"), dtype, plan.rows, plan.cols, plan.cols, 1)
            result = Result(Matrix(Slot("out"), dtype, plan.rows, 1, 1, 1), accumulate)
            yield from named("-".join([dtype] + ["accumulate"] * accumulate),
                             [one for one in launches(plan, source, result) if isinstance(one, Launch)])
