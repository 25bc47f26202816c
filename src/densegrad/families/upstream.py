"""dL/dZ formed from what lies above the layer, and summed to dL/db on the way: plans and launches."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from ..activations import ACTIVATIONS, ENTRIES
from ..errors import PlanError
from ..facts import ITEM_BYTES
from ..launches import ALPHA, ONE, Launch, Matrix, Result, Slot, scratch
from ..signatures import (
    NO_COLUMN,
    NO_MATRIX,
    ColumnAt,
    LogSumExp,
    LogSumExpArguments,
    MatrixAt,
    Scale,
    Targets,
    UpstreamSum,
    UpstreamSumArguments,
)
from .batch_sum import (
    MOST_BLOCKS,
    SMALL,
    BatchSumPlan,
    add_parts_of,
    check_matrix,
    explain_blocks,
    explain_sums,
    parts_of,
    steps_of_a_part,
    worthy_blocks,
)
from .common import ceil_div, check_choice, check_sizes, named, nth, power_of_two, remembered

#: what lies above beside activations: softmax and cross-entropy
CROSS_ENTROPY = "cross_entropy"
#: Bytes of a row of logits that a block's registers hold, beside a sum for each element, on every GPU: cross_entropy
#: reads such rows once.
ROW_BYTES = 65536
#: blocks of the launch that reads logits first
MOST_LOG_SUM_EXP_BLOCKS = 1024


@dataclass(frozen=True)
class UpstreamPlan:
    """How dZ (samples, outputs) is formed from what lies above it, written, and summed over the samples in one pass.

    Parameters
    ----------
    above : str
        What lies above the layer: one of ACTIVATIONS, or CROSS_ENTROPY.
    sum : BatchSumPlan
        How the work is cut, and the order of additions: dL/db has the bits of `bias_grad(dz, plan=plan.sum)`. Its
        layout is "rows" or "features_first", and a thread has one vector of each of two steps under way.

    Raises
    ------
    PlanError
        If no kernel can carry it out.
    """

    above: str
    sum: BatchSumPlan

    def __post_init__(self) -> None:
        check_choice("plan: above", self.above, (*ACTIVATIONS, CROSS_ENTROPY))
        if self.sum.layout == "flat":
            raise PlanError('plan: to form dz, the layout of the sum must be "rows" or "features_first"; got "flat"')
        wanted = {"vectors": 1, "in_flight": 2, "compensated": False}
        if self.features_first:
            wanted |= {"folders": self.sum.threads_x, "runs_per_block": self.sum.lanes}
        for name, value in wanted.items():
            if getattr(self.sum, name) != value:
                raise PlanError(f"plan: to form dz in {self.sum.layout} by {self.sum.lanes} lanes of "
                                f"{self.sum.threads_x} threads, {name} of the sum must be {value}; got "
                                f"{getattr(self.sum, name)} (dataclasses.replace(plan, {name}={value}) makes it so)")
        if self.shared_bytes > 49152:
            raise PlanError(f"plan: at most 49152 bytes of shared memory; got {self.shared_bytes}")

    @property
    def features_first(self) -> bool:
        """Whether the samples of an output lie side by side, and not the outputs of a sample."""
        return self.sum.layout == "features_first"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.sum.threads

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks: (tiles of outputs, parts of the batch)."""
        return self.sum.grid

    @property
    def elements(self) -> int:
        """Elements of a thread in each step, which an access takes at most: fewer where rows are too narrow for all."""
        if self.features_first:
            return self.sum.vector
        return min(self.sum.vector, power_of_two(ceil_div(self.sum.outputs, self.sum.threads_x)))

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks the registers have to leave room for.

        Exponentials of eight elements take many registers, float64 and eight elements a few more than 64, and so do
        elements that each have a sample of their own; one matrix alone takes few.
        """
        threads = 32 * ceil_div(self.threads, 32)
        if self.above == "identity" and self.elements < 8 and not self.features_first:
            resident = min(16 * threads, 1024 if self.sum.accumulator == "float64" else 1536)
        elif self.features_first or self.sum.accumulator == "float64" or (
                self.elements >= 8 and self._takes_exponentials):
            resident = 512
        else:
            resident = 768 if self.elements >= 8 else 1024
        return max(1, resident // threads)

    @property
    def _takes_exponentials(self) -> bool:
        return self.above == CROSS_ENTROPY or ENTRIES[self.above].formula_of(self.sum.dtype).exponentials > 0

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: each thread's sums, and the folds of every output's."""
        cells = self.threads * self.elements
        if self.features_first:
            cells += self.sum.lanes * (self.sum.threads_x + 1)
        return cells * ITEM_BYTES[self.sum.accumulator]

    @property
    def log_sum_exp_block(self) -> tuple[int, int]:
        """Of the launch before this one, below cross-entropy: (threads that add up one sample, samples of a block)."""
        return log_sum_exp_block(self.sum.samples, self.sum.outputs, self.features_first)

    @property
    def log_sum_exp_grid(self) -> int:
        """Blocks of that launch: few enough for what they leave to be added up by every block of the next one."""
        return min(max(ceil_div(self.sum.samples, self.log_sum_exp_block[1]), 1), MOST_LOG_SUM_EXP_BLOCKS)

    @property
    def chain(self) -> int:
        """The longest chain of additions that an entry of dL/db goes through."""
        return self.sum.chain

    @property
    def row_chain(self) -> int:
        """The longest chain of additions that the sum of a row goes through, below cross-entropy."""
        adders, _ = self.log_sum_exp_block
        vector = 1 if self.features_first else self.sum.vector
        merges = adders if self.features_first else 5 + adders // 32
        return (ceil_div(self.sum.outputs + vector, vector * adders)) * (vector + 1) + merges

    def explain(self) -> str:
        """The plan in words, with reasons."""
        cut, width = self.sum, self.elements * ITEM_BYTES[self.sum.dtype]
        lines = [f"dz of {cut.samples} samples of {cut.outputs} outputs, {cut.dtype}, {cut.layout}, below "
                 f"{self.above}: formed, written and summed over the samples in one pass"]
        reads, matrices = {"identity": ("da is", 2), CROSS_ENTROPY: ("z is", 2)}.get(self.above, ("da and z are", 3))
        moved = matrices * cut.samples * cut.outputs * ITEM_BYTES[cut.dtype]
        lines.append(f"{reads} read once, dz is written once: {moved} bytes")
        if self.above == CROSS_ENTROPY:
            threads, samples = self.log_sum_exp_block
            row = cut.outputs * ITEM_BYTES[cut.dtype]
            why = "the samples lie side by side" if self.features_first else (
                f"a row of {row} bytes does not fit into the registers of a block, up to {ROW_BYTES} do"
                if row > ROW_BYTES else "rows do not lie in one piece each, or this plan was asked for")
            lines.append(f"before that another launch reads z for each sample's log-sum-exp, by blocks of {samples} "
                         f"samples and {threads} threads for each: two readings, since {why}")
        elements = f"{self.elements} element{'s' * (self.elements > 1)}"
        what = f"{elements} a thread, in accesses of {width} bytes where every matrix allows them"
        if self.features_first:
            lines.append(f"a block forms {cut.lanes} outputs, each by {cut.threads_x} threads side by side along the "
                         f"samples: {what}; they fold the output's sums")
        else:
            lines.append(f"{cut.lanes} lanes of {cut.threads_x} threads: a lane forms every {nth(cut.lanes)} sample of "
                         f"its part, {what}; the lanes are added in order")
        lines.append("the next step's elements travel while dz is formed from this step's, and what is summed is dz as "
                     "it is stored")
        lines.append(explain_blocks(self.grid, self.threads, self.shared_bytes, self.blocks_per_multiprocessor))
        return "\n".join(lines + explain_sums(cut))


@remembered
def log_sum_exp_block(samples: int, outputs: int, features_first: bool) -> tuple[int, int]:
    """(threads that add up one sample, samples of a block) for the log-sum-exp: more threads where samples are few."""
    check_sizes(samples=samples, outputs=outputs)
    few = samples < 2048 and outputs >= 2048
    if features_first:
        return (32, 8) if few else (8, 32)
    return (256, 1) if few else (32, 8)


@remembered
def plan_upstream(samples: int, outputs: int, dtype: str, layout: str, above: str) -> UpstreamPlan:
    """The plan for forming dZ of these sizes, in one of LAYOUTS, below one of ACTIVATIONS or CROSS_ENTROPY.

    A thread keeps the elements of two steps, so that 1,024 threads have as much under way as those of a sum. Sizes,
    dtype and layout are those of `plan_batch_sum`.

    Raises
    ------
    PlanError
        If one of these is none.
    """
    check_matrix(samples, outputs, dtype, layout)
    vector, sector = 16 // ITEM_BYTES[dtype], 32 // ITEM_BYTES[dtype]
    rows, cols = max(samples, 1), max(outputs, 1)
    small = rows * cols <= SMALL
    threads = 64 if small else 256
    if above == CROSS_ENTROPY and cols > 128 and cols % vector and ITEM_BYTES[dtype] == 2:
        threads *= 2  # so that a warp reads one row, two bytes a lane
    if layout == "features_first" or cols == 1:
        lanes = min(threads // 32, power_of_two(cols))
        plan = BatchSumPlan(rows, cols, dtype, "features_first", 32, lanes, in_flight=2, samples_per_part=rows,
                            runs_per_block=lanes, folders=32)
        step, tiles = plan.tile, ceil_div(cols, lanes)
    else:
        # Narrow rows take no more threads than reading them without a gap from one row to the next takes, but an even
        # number.
        threads_x = max((cols // gcd(cols, vector) + 1) // 2 * 2, 4)
        lanes = max(threads // threads_x // sector, 1) * sector
        if cols > 128 or threads_x * lanes > 1024:
            threads_x = min(power_of_two(ceil_div(cols, vector)), threads // max(sector, 8))
            lanes = threads // threads_x
        plan = BatchSumPlan(rows, cols, dtype, "rows", threads_x, lanes, in_flight=2, samples_per_part=rows)
        step, tiles = lanes, ceil_div(cols, plan.tile)
    steps = ceil_div(rows, step)
    if not small:
        steps = steps_of_a_part(steps, ceil_div(worthy_blocks(rows * cols), tiles), MOST_BLOCKS // tiles)
    return UpstreamPlan(above, replace(plan, samples=samples, outputs=outputs,
                                       samples_per_part=min(rows, steps * step)))


@dataclass(frozen=True)
class Upstream:
    """What dZ is formed from: matrices (samples, outputs), columns (samples, 1); None where there is none.

    Below cross-entropy z holds the logits; there are labels or class probabilities, and no gradient.
    """

    gradient: Matrix | None
    z: Matrix | None
    weights: Matrix | None = None
    labels: Matrix | None = None
    probabilities: Matrix | None = None
    class_weights: Matrix | None = None  # (outputs, 1)
    reduction: str = "sum"  # of the loss: or "mean", "none"
    loss: Matrix | None = None  # where it goes: (1, 1), or (samples, 1) of each sample

    @property
    def targets(self) -> Targets:
        """The dtypes of what softmax is held against, and of weights."""
        columns = self.labels, self.class_weights, self.weights
        return Targets(*("" if column is None else column.dtype for column in columns))


def column_at(column: Matrix | None) -> ColumnAt:
    """What a kernel takes of a column."""
    return NO_COLUMN if column is None else ColumnAt(column.address, column.row_stride)


def matrix_at(matrix: Matrix | None) -> MatrixAt:
    """What a kernel takes of a matrix."""
    return NO_MATRIX if matrix is None else matrix.at


def launches(plan: UpstreamPlan, upstream: Upstream, dz: Matrix, result: Result, scales: tuple[Scale, Scale],
             workspace_at: int = 0) -> tuple[Launch, ...]:
    """dz = weights * what the plan's activation or cross-entropy makes of upstream, and result = its sum.

    dz is multiplied by the first of the scales before it is rounded and summed, the sum by the second one. The slot
    "parameter" holds the activation's or the smoothing of labels, "ignored" the label that is left out.
    """
    if not dz.cols or (result.accumulate and not dz.rows and upstream.loss is None):
        return ()
    cut = plan.sum
    totals = scratch(workspace_at, 3, max(dz.rows, 1), cut.accumulator)
    left = scratch(totals.end, 2, plan.log_sum_exp_grid, cut.accumulator)
    before: tuple[Launch, ...] = ()
    if plan.above == CROSS_ENTROPY:
        workspace_at = left.end
        before = (_log_sum_exp(plan, upstream, totals, left),)
    partial = cut.second is not None
    target = Result(parts_of(cut, workspace_at)) if partial else result
    constants = _constants(plan, upstream, dz, target)
    arguments = UpstreamSumArguments(
        matrix_at(upstream.gradient or upstream.probabilities), matrix_at(upstream.z), dz.at,
        column_at(upstream.weights), column_at(upstream.labels), column_at(upstream.class_weights),
        totals.address if before else 0, left.address if before else 0, left.cols if before else 0,
        upstream.loss.address if constants.with_loss and upstream.loss else 0,
        Slot("ignored") if upstream.labels else 0, Slot("parameter"), scales[0], ONE if partial else scales[1],
        dz.rows, dz.cols, cut.samples_per_part, target.matrix.address,
        target.matrix.row_stride if partial else 0, target.matrix.col_stride)
    launch = Launch("densegrad.kernels.upstream", "upstream_sum", constants, arguments, plan.grid, plan.threads,
                    plan=plan)
    return *before, launch, *add_parts_of(cut, result, scales[1], workspace_at)


def _constants(plan: UpstreamPlan, upstream: Upstream, dz: Matrix, target: Result) -> UpstreamSum:
    """Accesses are as wide as every matrix allows; weights come in such pieces, too, or one by one."""
    features_first, weights = plan.features_first, upstream.weights
    width = min((matrix.T if features_first else matrix).access(plan.elements)
                for matrix in (upstream.gradient, upstream.z, upstream.probabilities, dz) if matrix is not None)
    of_pieces = weights is not None and features_first and weights.T.access(width) == width
    return UpstreamSum(plan.above, plan.sum.dtype, plan.sum.accumulator, target.matrix.dtype, plan.elements, width,
                       plan.sum.threads_x, plan.sum.lanes, features_first, plan.blocks_per_multiprocessor,
                       upstream.targets, width if of_pieces else 1, upstream.reduction == "mean",
                       upstream.loss is not None and upstream.reduction != "none", target.accumulate)


def _log_sum_exp(plan: UpstreamPlan, upstream: Upstream, totals: Matrix, left: Matrix) -> Launch:
    adders, samples = plan.log_sum_exp_block
    z, reduction, loss = upstream.z, upstream.reduction, upstream.loss
    if z is None:
        raise PlanError("plan: cross-entropy needs the logits")
    kind = "" if loss is None else "each" if reduction == "none" else "sum"
    mean = reduction == "mean"
    return Launch("densegrad.kernels.log_sum_exp", "log_sum_exp",
                  LogSumExp(z.dtype, plan.sum.accumulator, adders, samples, plan.features_first, upstream.targets, kind,
                            mean),
                  LogSumExpArguments(
                      z.at, matrix_at(upstream.probabilities), column_at(upstream.labels),
                      column_at(upstream.class_weights), column_at(upstream.weights),
                      column_at(loss if kind == "each" else None), left.address if mean or kind == "sum" else 0,
                      Slot("ignored") if upstream.labels else 0, Slot("parameter"), z.rows, z.cols, totals.address),
                  (plan.log_sum_exp_grid,), adders * samples, plan=plan)


def variants() -> Iterator[tuple[str, Launch]]:
    """The kernels below activations, for all dtypes and layouts, by name."""
    for dtype in ITEM_BYTES:
        for layout in ("flat", "features_first"):
            for above, weights in (("relu", ""), ("gelu", ""), ("gelu_tanh", "float32"), ("identity", "bool")):
                yield from _variant(plan_upstream(8192, 3072, dtype, layout, above), weights)
            for above, weights in (("silu", "float16"), ("leaky_relu", "bfloat16")):
                yield from _variant(plan_upstream(8191, 3071, dtype, layout, above), weights)
            for above, weights in (("tanh", "bool"), ("identity", "float16")):
                yield from _variant(plan_upstream(33, 11, dtype, layout, above), weights, accumulate=True)
        yield from _variant(plan_upstream(65536, 10, dtype, "flat", "silu"))
        yield from _variant(plan_upstream(64, 10, dtype, "flat", "sigmoid"))
    for above in ACTIVATIONS:
        # Eight elements a thread, which take most registers, and float64.
        for dtype in ("bfloat16", "float64"):
            yield from _variant(plan_upstream(8192, 3072, dtype, "flat", above))


def _variant(plan: UpstreamPlan, weights: str = "", accumulate: bool = False) -> Iterator[tuple[str, Launch]]:
    """The launches of a plan; those that add do so in the type of the sums."""
    cut, turned = plan.sum, plan.features_first
    strides = (1, cut.samples) if turned else (cut.outputs, 1)
    matrix = Matrix(Slot("dz"), cut.dtype, cut.samples, cut.outputs, *strides)
    column = Matrix(Slot("column"), weights, cut.samples, 1, 1, 1) if weights else None
    formed = Upstream(matrix, None if plan.above == "identity" else matrix, column)
    target = cut.accumulator if accumulate else cut.dtype
    result = Result(Matrix(Slot("db"), target, 1, cut.outputs, cut.outputs, 1), accumulate)
    layout = "features_first" if turned else "rows"
    title = "-".join([cut.dtype, plan.above, f"{cut.samples}x{cut.outputs}", layout] + [f"weights-{weights}"] * bool(
        weights) + ["accumulate"] * accumulate)
    return named(title, launches(plan, formed, matrix, result, (ALPHA, ONE)))
