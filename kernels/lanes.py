"""What the threads of a row come to, combined in pairs: the lanes of warps, then the warps."""

from numba import cuda

from . import primitives
from .primitives.factories import cache
from .primitives.layout import LANES


@cache
def over_lanes(combine, of_lane, distance):
    """(value) -> what the value of all lanes come to that differ in the bits below 2 * distance, combined in pairs."""
    if not distance:
        @cuda.jit(device=True, inline="always")
        def over(value):
            return value

        return over

    others, rest = of_lane(distance), over_lanes(combine, of_lane, distance // 2)

    @cuda.jit(device=True, inline="always")
    def over(value):
        return rest(combine(value, others(value)))

    return over


@cache
def over_row(accumulator, combine, count, threads_x):
    """(cells, row, thread, value) -> what the `count` values of a row's threads_x threads come to, combined in pairs.

    The block's threads meet at a barrier where a row has more than a warp.
    """
    def others(distance):
        return primitives.of_lane(accumulator, count, distance)

    warps = threads_x // LANES
    over_warp = over_lanes(combine, others, min(threads_x, LANES) // 2)
    if warps < 2:
        @cuda.jit(device=True, inline="always")
        def over(cells, row, thread, value):
            return over_warp(value)

        return over

    over_warps = over_lanes(combine, others, warps // 2)
    store, load = primitives.store_shared(accumulator, count), primitives.load_shared(accumulator, count)

    @cuda.jit(device=True, inline="always")
    def over(cells, row, thread, value):
        value, lane = over_warp(value), thread % LANES
        if lane == 0:
            store(cells, thread // LANES * count, value)
        cuda.syncthreads()
        return over_warps(load(cells, (row * warps + lane % warps) * count))

    return over
