"""Plans of dL/dZ: how it is formed from what lies above the layer, and summed to dL/db on the way."""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import gcd

from .batch_sum import MOST_BLOCKS, SMALL, BatchSumPlan, steps_of_a_part, worthy_blocks
from .common import ITEM_BYTES, ceil_div, power_of_two


@lru_cache(maxsize=4096)
def log_sum_exp_block(samples: int, outputs: int, features_first: bool) -> tuple[int, int]:
    """(threads that add up one sample, samples of a block) for the log-sum-exp: more threads where samples are few."""
    few = samples < 2048 and outputs >= 2048
    if features_first:
        return (32, 8) if few else (8, 32)
    return (256, 1) if few else (32, 8)


def plan_upstream(samples: int, outputs: int, dtype: str, layout: str) -> BatchSumPlan:
    """The plan for forming dZ of these sizes in one of LAYOUTS, and summing it on the way.

    A thread keeps the elements of two steps, so that 1,024 threads have as much under way as those of a sum.
    """
    vector, sector = 16 // ITEM_BYTES[dtype], 32 // ITEM_BYTES[dtype]
    rows, cols = max(samples, 1), max(outputs, 1)
    small = rows * cols <= SMALL
    threads = 64 if small else 256
    if layout == "features_first" or cols == 1:
        lanes = min(threads // 32, power_of_two(cols))
        plan = BatchSumPlan(rows, cols, dtype, "features_first", 32, lanes, 2, rows, runs_per_block=lanes, folders=32)
        step, tiles = plan.tile, ceil_div(cols, lanes)
    else:
        # Narrow rows take no more threads than reading them without a gap from one row to the next takes, but an even
        # number.
        threads_x = max((cols // gcd(cols, vector) + 1) // 2 * 2, 4)
        lanes = max(threads // threads_x // sector, 1) * sector
        if cols > 128 or threads_x * lanes > 1024:
            threads_x = min(power_of_two(ceil_div(cols, vector)), threads // max(sector, 8))
            lanes = threads // threads_x
        plan = BatchSumPlan(rows, cols, dtype, "rows", threads_x, lanes, 2, rows)
        step, tiles = lanes, ceil_div(cols, plan.tile)
    steps = ceil_div(rows, step)
    if not small:
        steps = steps_of_a_part(steps, ceil_div(worthy_blocks(rows * cols), tiles), MOST_BLOCKS // tiles)
    return replace(plan, samples=samples, outputs=outputs, samples_per_part=min(rows, steps * step))
