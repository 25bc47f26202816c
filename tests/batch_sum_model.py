"""The batch sum's order of additions in NumPy, which kernels are held to bit for bit, and small plans."""
from math import lcm

import numpy as np

from densegrad.device import dtype_of
from densegrad.plans import ITEM_BYTES, BatchSumPlan


class Sums:
    """Sums that grow by one addition after another, as a kernel's do."""

    def __init__(self, count, plan):
        self.total = np.zeros(count, plan.accumulator)
        self.lost = np.zeros(count, plan.accumulator) if plan.compensated else None

    def add(self, values):
        """One addition to the first of them."""
        total, n = self.total[:len(values)], len(values)
        rounded = total + values
        if self.lost is not None:
            larger = np.abs(total) >= np.abs(values)
            self.lost[:n] += np.where(larger, (total - rounded) + values, (values - rounded) + total)
        self.total[:n] = rounded

    @property
    def rows(self):
        """What is added where these sums are added to others."""
        return [self.total] if self.lost is None else [self.total, self.lost]


def model(plan, dz, result=None, alpha=1, before=None):
    """alpha times the sum over the first axis of dz, and `before` if given, in the plan's order, as this dtype."""
    sums, result = _sums(plan, dz), result or plan.dtype
    wide = "float64" if result == "float64" else plan.accumulator
    sums.total, *lost = (row.astype(wide) * np.dtype(wide).type(alpha) for row in sums.rows)
    sums.lost = lost[0] if lost else None
    if before is not None:
        sums.add(before.astype(wide))
    whole = sums.total if sums.lost is None else sums.total + sums.lost
    return whole.astype(dtype_of(result))


def _sums(plan, dz):
    dz = dz.astype(plan.accumulator)
    parts = [dz[start:start + plan.samples_per_part] for start in range(0, max(len(dz), 1), plan.samples_per_part)]
    parts = [_by_lanes(plan, part, plan.lanes) if plan.layout == "rows" else _by_lines(plan, part) for part in parts]
    if not plan.second:
        return parts[0]
    return _by_lanes(plan, np.array([row for part in parts for row in part.rows]), plan.second.lanes)


def _by_lanes(plan, part, lanes):
    result = Sums(plan.outputs, plan)
    for lane in range(lanes):
        sums = Sums(plan.outputs, plan)
        for row in part[lane::lanes]:
            sums.add(row)
        for row in sums.rows:
            result.add(row)
    return result


def _by_lines(plan, part):
    line, period = plan.threads_x * 16 // ITEM_BYTES[plan.dtype], plan.period
    columns = []
    for run in [part.ravel()] if plan.layout == "flat" else part.T:
        cells, folds, result = Sums(line, plan), Sums(plan.folders * period, plan), Sums(period, plan)
        for start in range(0, len(run), line):
            cells.add(run[start:start + line])
        for start in range(0, line, plan.folders * period):
            for row in cells.rows:
                folds.add(row[start:start + plan.folders * period])
        for start in range(0, plan.folders * period, period):
            for row in folds.rows:
                result.add(row[start:start + period])
        columns.append(result)
    whole = Sums(plan.outputs, plan)
    whole.total = np.concatenate([column.total for column in columns])
    if plan.compensated:
        whole.lost = np.concatenate([column.lost for column in columns])
    return whole


def small_plan(samples, outputs, dtype, layout, parts=1, compensated=False):
    """A plan of few threads that has everything in it: lanes, several vectors in flight, an edge, parts."""
    vector, sector = 16 // ITEM_BYTES[dtype], 32 // ITEM_BYTES[dtype]
    if layout == "rows":
        return BatchSumPlan(samples, outputs, dtype, layout, threads_x=4, lanes=sector, in_flight=2,
                            samples_per_part=-(-samples // parts), vectors=1 + parts % 2, compensated=compensated)
    threads_x = 4 if layout == "features_first" else max(4, lcm(outputs, 2 * vector) // vector)
    line = threads_x * vector
    if layout == "flat":
        lines = -(-samples * outputs // (line * parts))
        return BatchSumPlan(samples, outputs, dtype, layout, threads_x, 1, 2, lines * line // outputs, folders=2,
                            compensated=compensated)
    return BatchSumPlan(samples, outputs, dtype, layout, threads_x, 4, 2, -(-samples // (line * parts)) * line,
                        runs_per_block=8, folders=4, compensated=compensated)
