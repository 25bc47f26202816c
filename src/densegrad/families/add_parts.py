"""Adding the parts of a product: matrices that follow one another in the workspace."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..facts import ITEM_BYTES, accumulator_of
from ..launches import ALPHA, Launch, Matrix, Result, Slot
from ..signatures import AddParts, AddPartsArguments, Scale
from .common import ceil_div, epilogue_of, named

#: results up to which blocks are small, so that there is one for each of 132 multiprocessors
SMALL = 64 * 132


@dataclass(frozen=True)
class AddPartsPlan:
    """How `parts` matrices (rows, cols) of accumulators are added in ascending order.

    A thread adds the parts of one vector of 16 bytes; rows of the parts are `pitch` accumulators apart.
    """

    parts: int
    rows: int
    cols: int
    pitch: int
    accumulator: str

    @property
    def vector(self) -> int:
        """Elements in an access of 16 bytes."""
        return 16 // ITEM_BYTES[self.accumulator]

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 64 if self.rows * self.pitch <= SMALL * self.vector else 256

    @property
    def in_flight(self) -> int:
        """Parts under way: many, where one after the other they would take long, few where they are few anyway."""
        return 16 if self.parts > 8 else 4

    @property
    def grid(self) -> tuple[int]:
        """Blocks."""
        return (ceil_div(self.rows * self.pitch // self.vector, self.threads),)

    @property
    def chain(self) -> int:
        """The longest chain of additions that one result goes through."""
        return self.parts - 1

    def explain(self) -> str:
        """The plan in words."""
        return (f"{self.parts} parts of {self.rows} x {self.cols} {self.accumulator} are added in ascending order\n"
                f"{self.grid[0]} blocks of {self.threads} threads, {self.vector} results a thread, {self.in_flight} "
                "parts under way")


def launches(plan: AddPartsPlan, parts: Matrix, result: Result, alpha: Scale = ALPHA) -> tuple[Launch, ...]:
    """result = alpha * the sum of the parts, or that added into result; `parts` is the first of them."""
    target, epilogue = result.matrix, epilogue_of(result, plan.vector, plan.accumulator)
    constants = AddParts(plan.accumulator, epilogue, plan.threads, plan.in_flight)
    return (Launch("densegrad.kernels.add_parts", "add_parts", constants,
                   AddPartsArguments(parts.address, plan.parts, plan.rows * plan.pitch, plan.pitch, target.at,
                                     plan.rows, plan.cols, alpha), plan.grid, plan.threads, plan=plan),)


def variants() -> Iterator[tuple[str, Launch]]:
    """The kernels for parts of all types, overwriting and adding, by name."""
    for dtype in ITEM_BYTES:
        accumulator = accumulator_of(dtype)
        for result in dict.fromkeys((dtype, accumulator, "float64")):
            for parts, accumulate in ((4, False), (4, True), (33, False), (33, True)):
                plan = AddPartsPlan(parts, 1024, 1024, 1024, accumulator)
                title = "-".join([accumulator, f"to-{result}"] + ["many"] * (parts > 8) + ["accumulate"] * accumulate)
                target = Matrix(Slot("dw"), result, 1024, 1024, 1024, 1)
                yield from named(title, launches(plan, Matrix(Slot("parts"), accumulator, 1024, 1024, 1024, 1),
                                                 Result(target, accumulate)))
