"""The last step of a column: what its sums come to is scaled, added to what is there, rounded once and stored."""

from numba import cuda

from ..facts import wide_of
from . import primitives
from .primitives.factories import cache


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
