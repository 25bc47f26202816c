"""The last steps of a column: what threads have left of it in shared memory is added, scaled, rounded once, stored."""

from numba import cuda, int32

from ..facts import wide_of
from . import primitives
from .primitives.factories import cache

#: Cells of shared memory under way where their number is the launch's.
CELLS = 4


@cache
def finish_column(accumulator, result, accumulate, compensated=False, keeps_lost=False):
    """(sums of one column, target, index, lost step, alpha): writes alpha times the result.

    If keeps_lost, it writes the sum and, a lost step further, what it lost.
    """
    values = 1 + compensated
    wide = wide_of(accumulator, result)
    tidy = primitives.tidy(wide, 1, compensated)
    if keeps_lost:
        keep = primitives.store_each(accumulator, values, accumulator)

        @cuda.jit(device=True, inline="always")
        def finish(sums, target, index, lost_step, alpha):
            keep(target, index, lost_step, values, tidy(sums))

        return finish

    widen = primitives.convert(accumulator, wide, values)
    settle = primitives.settle(wide, 1, compensated)
    scale = primitives.scale(wide, values)
    load = primitives.load_vector(result, 1, wide)
    plus = primitives.plus(wide, 1, compensated)
    store = primitives.store_vector(result, 1, wide)
    if accumulate:
        @cuda.jit(device=True, inline="always")
        def finish(sums, target, index, lost_step, alpha):
            store(target, index, settle(tidy(plus(scale(widen(sums), alpha), load(target, index)))))
    else:
        @cuda.jit(device=True, inline="always")
        def finish(sums, target, index, lost_step, alpha):
            store(target, index, settle(tidy(scale(widen(sums), alpha))))

    return finish


def add_copies(accumulator, compensated, lost):
    """(cells, cell, step, count): the sum of the cells at cell, cell + step, ..., each with its loss `lost` further."""
    zero = primitives.zeros(accumulator, 1 + compensated)
    add_cells, add_cell = (primitives.add_shared(accumulator, together, compensated, lost) for together in (CELLS, 1))

    @cuda.jit(device=True, inline="always")
    def add(cells, cell, step, count):
        total = zero()
        while count >= CELLS:
            total = add_cells(total, cells, cell, step)
            cell, count = int32(cell + CELLS * step), int32(count - CELLS)
        while count > 0:
            total = add_cell(total, cells, cell, step)
            cell, count = int32(cell + step), int32(count - 1)
        return total

    return add
