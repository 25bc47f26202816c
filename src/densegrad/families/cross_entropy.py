"""dL/dZ below softmax and cross-entropy from one reading of the logits, with its sum and the loss: plans, launches."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import PlanError
from ..facts import ITEM_BYTES, accumulator_of
from ..launches import ALPHA, ONE, Launch, Matrix, Result, Room, Slot, scratch
from ..signatures import (
    CrossEntropyRows,
    CrossEntropyRowsArguments,
    Scale,
    Targets,
    WeighSamples,
    WeighSamplesArguments,
)
from .batch_sum import SMALL, Cut, SumPartsPlan, check_matrix, plan_sum_parts, sum_parts
from .common import (
    ceil_div,
    check_choice,
    check_integers,
    check_positive,
    check_sizes,
    constants_of,
    named,
    power_of_two,
    remembered,
)
from .upstream import CROSS_ENTROPY, ROW_BYTES, Upstream, UpstreamPlan, column_at, matrix_at, plan_upstream
from .upstream import launches as two_readings

#: Threads of a block, and blocks of a launch: one for each multiprocessor of the largest GPUs that were at hand.
THREADS, BLOCKS = 512, 132
#: Registers of a block, and what a thread needs beside a row and its sums.
REGISTERS, OTHER_REGISTERS = 65536, 30
#: Up to so many samples each block adds up all their weights for a mean's divisor; of more, another launch leaves at
#: most WEIGHING_BLOCKS sums, of blocks of WEIGHING_THREADS threads.
WEIGHED_IN_PLACE, WEIGHING_BLOCKS, WEIGHING_THREADS = 1024, 128, 1024


@dataclass(frozen=True)
class CrossEntropyPlan(Cut):
    """How dZ (samples, outputs) is made from logits that are read once, with dL/db and the loss.

    threads_x threads side by side hold a row, each `pieces` times 16 bytes of it; `lanes` rows are in a block at a
    time, which takes samples_per_part of them in turn.

    Raises
    ------
    PlanError
        If no kernel can carry it out.
    """

    samples: int
    outputs: int
    dtype: str
    threads_x: int
    lanes: int
    pieces: int
    samples_per_part: int

    def __post_init__(self) -> None:
        check_integers(self)
        check_choice("plan: dtype", self.dtype, ITEM_BYTES)
        check_sizes(samples=self.samples, outputs=self.outputs)
        check_positive(self, "samples", "outputs")
        for name in ("threads_x", "lanes", "pieces"):
            if getattr(self, name) & getattr(self, name) - 1:
                raise PlanError(f"plan: {name} must be a power of two; got {getattr(self, name)}")
        if not 32 <= self.threads <= 1024:
            raise PlanError(f"plan: threads_x * lanes must be from 32 to 1024; got {self.threads}")
        if self.outputs > self.threads_x * self.pieces * self.vector:
            raise PlanError(f"plan: a row of {self.outputs} outputs does not fit into {self.pieces} pieces of "
                            f"{self.threads_x} threads, {self.vector} elements each")
        if self.threads * self.registers > REGISTERS:
            raise PlanError(f"plan: {self.threads} threads of {self.registers} registers are more than the "
                            f"{REGISTERS} that a block may have")
        if self.shared_bytes > 49152:
            raise PlanError(f"plan: at most 49152 bytes of shared memory; got {self.shared_bytes}")

    @property
    def registers(self) -> int:
        """Registers of a thread: for its share of a row, a sum for each element, and what else it needs."""
        return self.pieces * (4 + self.vector * ITEM_BYTES[self.accumulator] // 4) + OTHER_REGISTERS

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, at most: for the sums of a piece, and a few cells for each warp and lane."""
        warps = self.lanes * max(self.threads_x // 32, 1)
        cells = self.threads * self.vector + 5 * max(warps, self.threads // 32) + self.lanes + 1
        return cells * ITEM_BYTES[self.accumulator]

    @property
    def second(self) -> SumPartsPlan | None:
        """The plan by which the parts are added, if there are several: the sums of the outputs, then the loss."""
        return plan_sum_parts(self.parts, self.outputs + 1, self.accumulator) if self.parts > 1 else None

    @property
    def chain(self) -> int:
        """The longest chain of additions that an entry of dL/db goes through."""
        return ceil_div(self.samples_per_part, self.lanes) + self.lanes + (self.second.chain if self.second else 0)

    @property
    def row_chain(self) -> int:
        """The longest chain of additions that the sum of a row goes through."""
        return self.pieces * self.vector + self.threads_x.bit_length() - 1

    @property
    def weighing_blocks(self) -> int:
        """Blocks of the launch that adds up weights for a mean's divisor; 0 if each block does that for itself."""
        few = self.samples <= WEIGHED_IN_PLACE
        return 0 if few else min(WEIGHING_BLOCKS, ceil_div(self.samples, WEIGHING_THREADS))

    def explain(self) -> str:
        """The plan in words, with reasons."""
        item, samples = ITEM_BYTES[self.dtype], self.samples
        moved = 2 * samples * self.outputs * item
        lines = [
            f"dz of {samples} samples of {self.outputs} outputs, {self.dtype}, below {CROSS_ENTROPY}: the logits are "
            f"read once, since a row of {self.outputs * item} bytes fits into the registers of a block (up to "
            f"{ROW_BYTES} do); dz is written once: {moved} bytes",
            f"a row is held by {self.threads_x} threads, {self.pieces} times 16 bytes each, with a sum for each "
            f"element: {self.registers} registers a thread; the next row's bytes travel while dz of this one is stored",
            f"{self.parts} blocks of {self.threads} threads, {self.shared_bytes} bytes of shared memory: each takes "
            f"{self.samples_per_part} samples, {self.lanes} at a time",
        ]
        if self.second:
            lines.append(f"another launch adds the {self.parts} parts of db and of the loss, by {self.second.grid[0]} "
                         f"x {self.second.threads} threads in {self.second.lanes} lanes")
        how = (f"{self.weighing_blocks} blocks of a launch before add up the weights" if self.weighing_blocks
               else "each block adds up all weights")
        lines.append(f"of a mean, the divisor is found on the device: {how}")
        lines.append(f"sums in {self.accumulator}; longest chain of additions {self.chain}: |error| <= "
                     f"{self.chain + 1} u sum |dz|, then the result is rounded")
        return "\n".join(lines)


@remembered
def plan_cross_entropy(samples: int, outputs: int, dtype: str, layout: str) -> CrossEntropyPlan | UpstreamPlan:
    """The plan for cross-entropy of logits of these sizes, in one of LAYOUTS.

    One reading of the logits where a row lies in one piece and fits into a block's registers, ROW_BYTES; else two, as
    `plan_upstream` has them.

    Raises
    ------
    PlanError
        If one of these is none.
    """
    check_matrix(samples, outputs, dtype, layout)
    if layout == "features_first" or outputs * ITEM_BYTES[dtype] > ROW_BYTES:
        return plan_upstream(samples, outputs, dtype, layout, CROSS_ENTROPY)
    rows, cols, vector = max(samples, 1), max(outputs, 1), 16 // ITEM_BYTES[dtype]
    vectors = ceil_div(cols, vector)
    # Four pieces a thread are enough under way, and eight hold the longest rows; neighbours read 128 bytes at least,
    # where a row has them.
    access = min(vector, cols & -cols)
    least = min(power_of_two(vectors), 32, 128 // (access * ITEM_BYTES[dtype]))
    threads_x = min(max(power_of_two(ceil_div(vectors, 4)), least), THREADS)
    pieces = power_of_two(ceil_div(vectors, threads_x))
    if rows * cols <= SMALL:
        lanes = max(64 // threads_x, 1)
        return CrossEntropyPlan(samples, outputs, dtype, threads_x, lanes, pieces=pieces, samples_per_part=rows)
    lanes = THREADS // threads_x
    while lanes > 1 and threads_x * lanes > 128 and ceil_div(rows, lanes) < BLOCKS:
        lanes //= 2
    steps = ceil_div(ceil_div(rows, lanes), BLOCKS)
    return CrossEntropyPlan(samples, outputs, dtype, threads_x, lanes, pieces=pieces,
                            samples_per_part=min(rows, steps * lanes))


def launches(plan: CrossEntropyPlan | UpstreamPlan, upstream: Upstream, dz: Matrix, result: Result,
             scale: Scale = ALPHA) -> tuple[Launch, ...]:
    """dz = scale times the gradient of the loss that upstream describes, result = its sum, and the loss if asked for.

    The slot "parameter" holds the smoothing of labels, "ignored" the label that is left out.
    """
    if isinstance(plan, UpstreamPlan):
        return two_readings(plan, upstream, dz, result, (scale, ONE))
    z, loss = upstream.z, upstream.loss
    if z is None or not dz.cols or (result.accumulate and not dz.rows and loss is None):
        return ()
    summed = loss is not None and upstream.reduction != "none"
    before, divisor, weights_at = _divisor(plan, upstream)
    # With a loss or without one, by the same lanes: so that db has the same bits.
    second = replace(plan.second, outputs=plan.outputs + summed) if plan.second else None
    kind = "" if loss is None else "each" if not summed else "part" if second else "sum"
    target, stride = result.matrix, 0
    if second:
        target = scratch(weights_at.end if before else 0, second.rows, second.outputs, plan.accumulator, second.pitch)
        stride = second.pitch
    width = min(matrix.access(plan.vector) for matrix in (z, dz, upstream.probabilities) if matrix is not None)
    constants = constants_of(CrossEntropyRows, plan, {
        "result": target.dtype, "width": width, "targets": upstream.targets, "divisor": divisor, "loss": kind,
        "accumulate": result.accumulate and not second})
    arguments = CrossEntropyRowsArguments(
        z.at, dz.at, matrix_at(upstream.probabilities), column_at(upstream.labels), column_at(upstream.class_weights),
        column_at(upstream.weights), column_at(loss if kind in ("each", "sum") else None),
        weights_at if before else 0, plan.weighing_blocks or plan.samples, Slot("ignored") if upstream.labels else 0,
        Slot("parameter"), scale, dz.rows, dz.cols, plan.samples_per_part, target.address, stride, target.col_stride)
    rows = Launch("densegrad.kernels.cross_entropy", "cross_entropy_rows", constants, arguments, (plan.parts,),
                  plan.threads, plan=plan)
    if not second:
        return *before, rows
    return *before, rows, sum_parts(second, target, result, ONE, loss if summed else None)


def _divisor(plan: CrossEntropyPlan, upstream: Upstream) -> tuple[tuple[Launch, ...], str, Room]:
    """(the launch that adds up weights, how the kernel of rows finds the divisor of a mean, what is left for it)."""
    blocks, labels = plan.weighing_blocks, upstream.labels
    room = Room(0, max(blocks, 1), plan.accumulator)
    if upstream.reduction != "mean":
        return (), "", room
    if upstream.targets == Targets("", upstream.targets.class_weights, ""):
        return (), "known", room
    if not blocks:
        return (), "samples", room
    arguments = WeighSamplesArguments(
        column_at(labels), column_at(upstream.class_weights), column_at(upstream.weights),
        Slot("ignored") if labels else 0, plan.samples, plan.outputs, room)
    constants = WeighSamples(plan.accumulator, upstream.targets, WEIGHING_THREADS)
    weighing = Launch("densegrad.kernels.weigh_samples", "weigh_samples", constants, arguments, (blocks,),
                      WEIGHING_THREADS, plan=plan)
    return (weighing,), "parts", room


#: layers of the catalogue: samples, outputs or None for the longest row that is read once, layout, dtypes of labels, of
#: class weights and of the samples' weights, reduction
LAYERS = (
    (2048, None, "flat", ("int64", "", ""), "mean"), (8192, 3072, "flat", ("int64", "", "bool"), "sum"),
    (8191, 999, "flat", ("int32", "float32", ""), "mean"), (65536, 10, "flat", ("int64", "", "float32"), "none"),
    (4096, 1000, "flat", ("", "float32", ""), "mean"), (64, 10, "flat", ("", "", ""), "sum"),
    (2048, 50257, "flat", ("int64", "", ""), "mean"), (2047, 50256, "rows", ("", "float32", "bool"), "none"),
    (8192, 3072, "features_first", ("int64", "", "bool"), "mean"), (33, 11, "features_first", ("", "", ""), "sum"))


def variants() -> Iterator[tuple[str, Launch]]:
    """The kernels of one reading, for rows of one piece to eight, and of two, by name."""
    for dtype in ITEM_BYTES:
        for samples, outputs, layout, columns, reduction in LAYERS:
            outputs = ROW_BYTES // ITEM_BYTES[dtype] if outputs is None else outputs
            yield from _variant((samples, outputs, dtype, layout), Targets(*columns), reduction)


def _variant(matrix_of: tuple[int, int, str, str], targets: Targets, reduction: str) -> Iterator[tuple[str, Launch]]:
    samples, outputs, dtype, layout = matrix_of
    plan, turned = plan_cross_entropy(*matrix_of), layout == "features_first"
    matrix = Matrix(Slot("dz"), dtype, samples, outputs, *((1, samples) if turned else (outputs, 1)))
    names = ("labels", "class_weight", "sample_weight")
    labels, classes, weights = (
        Matrix(Slot(name), kind, rows, 1, 1, 1) if kind else None
        for name, kind, rows in zip(names, targets, (samples, outputs, samples), strict=True))
    loss = Matrix(Slot("loss"), accumulator_of(dtype), samples if reduction == "none" else 1, 1, 1, 1)
    upstream = Upstream(None, matrix, weights, labels, probabilities=None if labels else matrix, class_weights=classes,
                        reduction=reduction, loss=loss)
    title = "-".join([dtype, f"{samples}x{outputs}", "features_first" if turned else "rows", targets.labels or (
        "probabilities"), *([f"classes-{targets.class_weights}"] * bool(targets.class_weights)), *(
        [f"weights-{targets.weights}"] * bool(targets.weights)), reduction])
    result = Result(Matrix(Slot("db"), dtype, 1, outputs, outputs, 1))
    return named(title, launches(plan, upstream, matrix, result))
