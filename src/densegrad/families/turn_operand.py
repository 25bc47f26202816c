"""Turning an operand for Hopper's tensor cores: along the depth, in one or two terms of tf32, in the workspace."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import PlanError
from ..facts import LINE_BYTES, SIZES
from ..launches import Launch, Matrix, Slot, scratch
from ..signatures import TurnOperand, TurnOperandArguments
from .common import ceil_div, named
from .tiling import side_of

#: threads of a block, which takes as many outer indices as depths: those of a line of 128 bytes
THREADS, SIDE = 256, LINE_BYTES // SIZES["float32"]


@dataclass(frozen=True)
class TurnPlan:
    """How an operand (outer, depth) of float32 becomes a matrix whose rows are contiguous along the depth.

    A row has `terms` lines of 32 numbers for each 32 depths: the numbers rounded to tf32 and, of two, what is left of
    them.

    Raises
    ------
    PlanError
        If it takes 2^31 blocks or more.
    """

    outer: int
    depth: int
    terms: int

    chain = 0

    def __post_init__(self) -> None:
        if self.grid[0] >= 2**31:
            raise PlanError(f"an operand is turned by fewer than 2^31 blocks; got {self.outer} x {self.depth} numbers")

    @property
    def steps(self) -> int:
        """Lines of a term in a row."""
        return ceil_div(self.depth, SIDE)

    @property
    def pitch(self) -> int:
        """Numbers of a row, zeros beyond the depth included."""
        return self.steps * self.terms * SIDE

    @property
    def grid(self) -> tuple[int]:
        """Blocks."""
        return (ceil_div(self.outer, SIDE) * self.steps,)

    @property
    def moved_bytes(self) -> int:
        """What is read and written."""
        return self.outer * (self.depth + self.pitch) * SIZES["float32"]

    def explain(self) -> str:
        """The plan in words."""
        how = "rounded to tf32" if self.terms == 1 else "split into two terms of tf32"
        return (f"{self.outer} x {self.depth} float32 are {how}, along the depth\n"
                f"{self.grid[0]} blocks of {THREADS} threads, {self.moved_bytes} bytes read and written")


def turned(plan: TurnPlan, operand: Matrix, free_at: int) -> tuple[Matrix, Launch]:
    """The operand (outer, depth) as the plan leaves it in the workspace, from the byte free_at on, and the launch."""
    side, stride = side_of(operand, 4)
    result = scratch(free_at, plan.outer, plan.pitch, "float32")
    return result, Launch(
        "densegrad.kernels.turn_operand", "turn_operand",
        TurnOperand(side.along_depth, side.access if side.along_depth else 1, plan.terms),
        TurnOperandArguments(operand.address, stride, result.address, plan.pitch, plan.outer, plan.depth, plan.steps),
        plan.grid, THREADS, plan=plan)


def variants() -> Iterator[tuple[str, Launch]]:
    """The kernels for both orders and numbers of terms, by name."""
    for length in (1024, 1023):
        whole = Matrix(Slot("operand"), "float32", length, length, length, 1)
        for along, terms in ((False, 1), (False, 2), (True, 2)):
            if along or length % 2 == 0:
                _, launch = turned(TurnPlan(length, length, terms), whole if along else whole.T, 0)
                yield from named("-".join(["depth" if along else "outer", f"{terms}-terms"]
                                          + ["odd"] * (length % 2)), [launch])
