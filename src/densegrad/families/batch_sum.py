"""Sums over the batch, dL/db: plans, the choice among them, launches."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from math import gcd, isqrt
from typing import Any

from ..errors import PlanError
from ..facts import ITEM_BYTES, accumulator_of
from ..launches import ALPHA, ONE, Launch, Matrix, Result, Slot, scratch
from ..signatures import (
    Scale,
    SumFlat,
    SumFlatArguments,
    SumParts,
    SumPartsArguments,
    SumRuns,
    SumRunsArguments,
    SumStrided,
    SumStridedArguments,
)
from .common import (
    ceil_div,
    check_choice,
    check_integers,
    check_positive,
    check_sizes,
    constants_of,
    named,
    nth,
    power_of_two,
    remembered,
)

#: where the kernels' factories stand
KERNELS = "densegrad.kernels.batch_sum"

#: Threads of the largest block that plans choose
MOST_THREADS = 256
#: How the matrix of (samples, outputs) lies in memory: outputs side by side; that without gaps between the samples;
#: samples side by side. plan_batch_sum says when each applies.
LAYOUTS = ("rows", "flat", "features_first")


def check_matrix(samples: int, outputs: int, dtype: str, layout: str) -> None:
    """Hold what a matrix (samples, outputs) is described by to what it can be.

    Raises
    ------
    PlanError
        If one of these is none.
    """
    check_sizes(samples=samples, outputs=outputs)
    check_choice("dtype", dtype, ITEM_BYTES)
    check_choice("layout", layout, LAYOUTS)


@dataclass(frozen=True)
class SumPartsPlan:
    """How the sums of parts are added, rows of a workspace: each lane every lanes-th of them, then lane after lane."""

    rows: int  # the parts; if compensated, what each of them lost is a row of its own behind it
    outputs: int
    dtype: str  # of the sums
    lanes: int
    compensated: bool

    @property
    def tile_cols(self) -> int:
        """Columns of a block: of a sector or more, so that there are many blocks, of two warps or more."""
        least = max(32 // ITEM_BYTES[self.dtype], 64 // self.lanes)
        return min(least, power_of_two(self.outputs), MOST_THREADS // self.lanes)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.lanes * self.tile_cols

    @property
    def grid(self) -> tuple[int]:
        """Blocks along the outputs."""
        return (ceil_div(self.outputs, self.tile_cols),)

    @property
    def pitch(self) -> int:
        """Elements from one row of the workspace to the next."""
        return pitch_of(self.outputs, self.dtype)

    @property
    def chain(self) -> int:
        """The longest chain of additions that one result goes through."""
        return ceil_div(self.rows, self.lanes) + (1 + self.compensated) * self.lanes

    def explain(self) -> str:
        """The plan in words."""
        return (f"{self.rows} rows of {self.outputs} {self.dtype} sums are added by {self.lanes} lanes, then lane "
                f"after lane; {self.grid[0]} blocks of {self.threads} threads")


@lru_cache(maxsize=4096)
def plan_sum_parts(rows: int, outputs: int, accumulator: str, compensated: bool = False) -> SumPartsPlan:
    """The plan for adding so many rows: by as many lanes as the sum of such a matrix has."""
    return SumPartsPlan(rows, outputs, accumulator, _one_part(rows, outputs, accumulator, compensated).lanes,
                        compensated)


def pitch_of(outputs: int, accumulator: str) -> int:
    """Elements from one row of sums in the workspace to the next: whole sectors."""
    size = 32 // ITEM_BYTES[accumulator]
    return ceil_div(outputs, size) * size


class Cut:
    """What follows from how a matrix is cut: threads_x threads side by side, lanes of them, parts of the samples."""

    samples: int
    dtype: str
    threads_x: int
    lanes: int
    samples_per_part: int

    @property
    def accumulator(self) -> str:
        """The type of the sums."""
        return accumulator_of(self.dtype)

    @property
    def vector(self) -> int:
        """Elements of 16 bytes, a thread's access."""
        return 16 // ITEM_BYTES[self.dtype]

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.threads_x * self.lanes

    @property
    def parts(self) -> int:
        """Parts of the batch; more than one are added by another launch."""
        return max(1, ceil_div(self.samples, self.samples_per_part))


@dataclass(frozen=True)
class BatchSumPlan(Cut):
    """How the sum over the samples of a matrix (samples, outputs) is computed.

    threads_x threads side by side read memory that lies side by side, `lanes` of such groups work in a block, each
    thread with `in_flight` times `vectors` loads of 16 bytes under way. Which field means what in detail is told by
    `explain`.
    """

    samples: int
    outputs: int
    dtype: str
    layout: str
    threads_x: int
    lanes: int
    in_flight: int
    samples_per_part: int
    vectors: int = 1
    runs_per_block: int = 1
    folders: int = 1
    compensated: bool = False

    def __post_init__(self) -> None:
        check_integers(self)
        check_choice("plan: dtype", self.dtype, ITEM_BYTES)
        check_choice("plan: layout", self.layout, LAYOUTS)
        check_sizes(samples=self.samples, outputs=self.outputs)
        check_positive(self, "samples", "outputs")
        if self.threads > 1024:
            raise PlanError(f"plan: threads_x * lanes must be at most 1024; got {self.threads}")
        if self.tile * ITEM_BYTES[self.dtype] % (16 if self.layout == "flat" else 32) or self.tile < 2 * self.sector:
            raise PlanError(f"plan: a line of {self.tile} elements must be 64 bytes or a greater multiple of 32 (of 16 "
                            "if flat)")
        if self.samples_per_part * self.period + (self.in_flight + 1) * self.tile >= 2 ** 31:
            raise PlanError(f"plan: a part of {self.samples_per_part} samples is too long for a block, which counts to "
                            "2^31")
        if self.layout != "rows" and self.folders * self.period > self.tile:
            raise PlanError(f"plan: folders times the period {self.period} must not exceed the line of {self.tile} "
                            "elements")
        if self.parts > 65535:
            raise PlanError(f"plan: at most 65535 parts; got {self.parts}")
        if self.shared_bytes > 49152:
            raise PlanError(f"plan: at most 49152 bytes of shared memory; got {self.shared_bytes}")
        if self.layout == "rows":
            if self.lanes % self.sector and self.samples_per_part > self.lanes:
                raise PlanError(f"plan: lanes must be a multiple of {self.sector} or as many as samples_per_part; "
                                f"got {self.lanes}")
        elif self.layout == "flat":
            if self.lanes > 1 or self.runs_per_block > 1:
                raise PlanError("plan: a flat matrix is one run: lanes and runs_per_block must be 1")
            if not self.outputs or self.tile % self.outputs or (
                    self.parts > 1 and self.samples_per_part * self.outputs % self.tile):
                raise PlanError(f"plan: a line of {self.tile} elements must be a multiple of the {self.outputs} "
                                "outputs, and a part a multiple of lines")
        elif self.runs_per_block % self.lanes or (self.parts > 1 and self.samples_per_part % self.tile):
            raise PlanError(f"plan: runs_per_block must be a multiple of the {self.lanes} lanes, and a part one of "
                            f"lines of {self.tile}")
        elif self.line_pitch * ITEM_BYTES[self.accumulator] % 16:
            raise PlanError(f"plan: lines of {self.tile} elements folded by {self.folders} threads lie "
                            f"{self.line_pitch} cells apart, no multiple of 16 bytes (take another number of folders)")

    @property
    def sector(self) -> int:
        """Elements in 32 bytes: what memory is moved in, and where shifted loads begin."""
        return 32 // ITEM_BYTES[self.dtype]

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks the registers have to leave room for: the fewer sums a thread keeps, the more threads."""
        sums = self.vectors * self.vector * (1 + self.compensated) * ITEM_BYTES[self.accumulator] // 4
        light = sums <= 8 and _light(self.dtype, self.compensated)
        resident = 1536 if light else 1024 if sums <= 16 else 768 if sums <= 32 else 512
        return min(16, ceil_div(resident, 32 * ceil_div(self.most_threads, 32)))

    @property
    def in_runs(self) -> bool:
        """Whether the samples of an output lie side by side; those of a single one do in a flat matrix, too."""
        return self.layout == "features_first" or (self.layout == "flat" and self.outputs == 1)

    @property
    def most_lanes(self) -> int:
        """Lanes that the kernel has room for: in "features_first" as many as make a block of the most threads."""
        return max(self.lanes, MOST_THREADS // self.threads_x) if self.layout == "features_first" else self.lanes

    @property
    def most_threads(self) -> int:
        """Threads of the largest block that the kernel can be launched with: how many there are is up to the launch.

        "rows" has a kernel for each number of threads.
        """
        threads = self.threads_x * self.most_lanes
        return max(threads, MOST_THREADS) if self.layout == "flat" else threads

    @property
    def tile(self) -> int:
        """Elements that threads_x threads read side by side."""
        return self.threads_x * self.vectors * self.vector

    @property
    def period(self) -> int:
        """Elements after which the columns repeat along a run."""
        return self.outputs if self.layout == "flat" else 1

    @cached_property
    def second(self) -> SumPartsPlan | None:
        """The plan by which the parts are added, if there are several."""
        if self.parts == 1:
            return None
        return plan_sum_parts(self.parts * (1 + self.compensated), self.outputs, self.accumulator, self.compensated)

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks: (along the outputs, parts); of "rows", where all rows begin at a multiple of 32 bytes."""
        if self.layout == "rows":
            return ceil_div(self.outputs, self.tile), self.parts
        return (1 if self.layout == "flat" else ceil_div(self.outputs, self.runs_per_block)), self.parts

    @property
    def pitch(self) -> int:
        """Elements from one row of the workspace to the next."""
        return pitch_of(self.outputs, self.accumulator)

    @property
    def workspace_bytes(self) -> int:
        """What the sums of the parts take, with what was lost by rounding if compensated."""
        if self.parts == 1:
            return 0
        return self.parts * (1 + self.compensated) * self.pitch * ITEM_BYTES[self.accumulator]

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        cells = self.most_lanes * self.line_pitch
        if self.in_runs:
            cells += self.folders * self.fold_pitch
        return cells * (1 + self.compensated) * ITEM_BYTES[self.accumulator]

    @property
    def line_pitch(self) -> int:
        """Cells from one lane's line of sums in shared memory to the next.

        Behind a line of "flat" or "features_first" is room for what shifts move there, and so much more that lanes
        which fold together meet other banks.
        """
        if self.layout == "rows":
            return self.tile
        if self.most_lanes == 1:
            return self.most_threads * self.vector + self.sector
        banks = 128 // ITEM_BYTES[self.accumulator]
        return self.tile + self.folders + max(0, ceil_div(self.sector - self.folders, banks)) * banks

    @property
    def fold_pitch(self) -> int:
        """Cells from one folder's sums to the next folder's, likewise."""
        if self.most_lanes == 1:
            return 1
        together = max(1, 128 // ITEM_BYTES[self.accumulator] // self.folders)
        return together * (ceil_div(self.most_lanes, together) | 1)

    @property
    def chain(self) -> int:
        """The longest chain of additions that one result goes through."""
        # Sums of sums take in what was lost beside each sum as well.
        halves = 1 + self.compensated
        if self.layout == "rows":
            chain = ceil_div(self.samples_per_part, self.lanes) + halves * self.lanes
        else:
            copies = self.tile // self.period
            chain = ceil_div(self.samples_per_part, copies) + halves * (ceil_div(copies, self.folders) + self.folders)
        return chain + (self.second.chain if self.second else 0)

    def explain(self) -> str:
        """The plan in words, with reasons."""
        item = ITEM_BYTES[self.dtype]
        if self.layout == "rows":
            how = (f"{self.lanes} lanes of {self.threads_x} threads: a lane adds every {nth(self.lanes)} sample of "
                   f"its part, {self.tile * item} contiguous bytes of it (32 fewer where rows begin between multiples "
                   f"of 32 bytes), {self.in_flight} samples in flight; the lanes are added in order")
        else:
            source = f"the samples of {self.runs_per_block} outputs, {self.lanes} of them at a time"
            if self.layout == "flat":
                source = f"the matrix as one run, whose columns repeat every {self.outputs} elements"
            how = (f"a block reads {source}, in lines of {self.tile * item} contiguous bytes, {self.in_flight} in "
                   f"flight; {self.folders} threads fold the sums of a line")
        what = (f"sum of {self.samples} samples of {self.outputs} outputs, {self.dtype}, {self.layout}: each element "
                f"read once, {self.samples * self.outputs * item} bytes")
        blocks = explain_blocks(self.grid, self.threads, self.shared_bytes, self.blocks_per_multiprocessor)
        return "\n".join([what, how, blocks, *explain_sums(self)])


def explain_blocks(grid: tuple[int, int], threads: int, shared_bytes: int, blocks_per_multiprocessor: int) -> str:
    """What a launch takes, in words."""
    return (f"grid {grid[0]} x {grid[1]} blocks of {threads} threads, {shared_bytes} bytes of shared memory; registers "
            f"for {blocks_per_multiprocessor} blocks a multiprocessor")


def explain_sums(plan: BatchSumPlan) -> list[str]:
    """The parts of the batch and the rounding of the sums, in words."""
    lines = []
    if plan.second:
        lines.append(f"{plan.parts} parts of {plan.samples_per_part} samples, so that the blocks fill a GPU; a second "
                     f"launch adds them from a workspace of {plan.workspace_bytes} bytes, by {plan.second.grid[0]} x "
                     f"{plan.second.threads} threads in {plan.second.lanes} lanes")
    rounding = f"{plan.chain + 1} u sum |dz|"
    if plan.compensated:
        lines.append("compensated: what additions round away is added up beside the sums, 7 additions for one")
        rounding = f"({plan.chain + 1} u)^2 sum |dz|"
    lines.append(f"sums in {plan.accumulator}; longest chain of additions {plan.chain}: |error| <= {rounding}, then "
                 "the result is rounded")
    return lines


#: Blocks of 256 threads for large sums: two at least for each of 132 multiprocessors, and six at most for each of 108.
LEAST_BLOCKS, MOST_BLOCKS = 280, 648
#: Loads of 16 bytes that a thread has under way: of 1,024 threads they fill the memory's pipe, 64 KiB on the largest
#: GPUs.
IN_FLIGHT = 4
#: Up to so many elements, what counts is how few threads there are, not how much memory they have under way.
SMALL = 2 ** 14


@remembered
def plan_batch_sum(samples: int, outputs: int, dtype: str, layout: str, compensated: bool = False) -> BatchSumPlan:
    """The plan for these sizes, this dtype and this layout.

    Parameters
    ----------
    samples, outputs : int
        Sizes, S and M.
    dtype : "float16", "bfloat16", "float32" or "float64"
        Of dz.
    layout : "rows", "flat" or "features_first"
        How dz lies in memory, LAYOUTS. "flat": the outputs of a sample side by side and no gap between samples, as in
        a new array (S, M) in C order. "rows": with gaps, as in a slice of columns, or where there is one sample.
        "features_first": the samples of an output side by side, as in Fortran order, or in a new array (M, S) that is
        passed with batch_axis=1.
    compensated : bool
        Whether sums are compensated.

    Raises
    ------
    PlanError
        If one of these is none.
    """
    check_matrix(samples, outputs, dtype, layout)
    if not samples or not outputs:
        return replace(_one_part(samples or 1, outputs or 1, dtype, compensated), samples=samples, outputs=outputs)
    if layout == "features_first":
        return _plan_runs(samples, outputs, dtype, compensated)
    flat = _flat_threads(samples, outputs, dtype) if layout == "flat" else 0
    if flat:
        return _plan_flat(samples, outputs, dtype, flat, compensated)
    # 16 lanes of 16 threads took 0.87 of what 8 of 32 took on an H200: 146 pairs of float32 plans with all else equal.
    plan = _one_part(samples, outputs, dtype, compensated, least_lanes=16 if dtype == "float32" else 8)
    if samples * outputs <= SMALL or plan.vectors > 1:
        return plan
    tiles, shifted_tiles = ceil_div(outputs, plan.tile), ceil_div(outputs, plan.tile - plan.sector)
    most = _most_blocks(samples * outputs, dtype, compensated)
    steps = steps_of_a_part(ceil_div(samples, plan.lanes), ceil_div(worthy_blocks(samples * outputs, most), tiles),
                            max(most // shifted_tiles, LEAST_BLOCKS // tiles))
    return replace(plan, samples_per_part=min(samples, steps * plan.lanes), in_flight=_under_way(steps))


def batch_sum_candidates(samples: int, outputs: int, dtype: str, layout: str,
                         compensated: bool = False) -> list[BatchSumPlan]:
    """The plan of plan_batch_sum, and others near it: other blocks, loads under way and lengths of parts."""
    model = plan_batch_sum(samples, outputs, dtype, layout, compensated)
    found = dict.fromkeys([model])
    if not samples or not outputs:
        return list(found)
    for threads_x, lanes in ((2 * model.threads_x, model.lanes // 2), (model.threads_x, model.lanes),
                             (model.threads_x // 2, 2 * model.lanes)):
        line = threads_x * model.vectors * model.vector
        step, least = lanes, 1  # a part is whole steps
        cut: dict[str, Any] = {"lanes": lanes}
        if model.layout == "flat":
            step, least = line // outputs, 2
            cut = {"folders": _folders(step)}
        elif model.layout == "features_first":
            step, least = line, 2
            cut = {"lanes": lanes, "folders": _folders(line),
                   "runs_per_block": ceil_div(model.runs_per_block, max(lanes, 1)) * lanes}
        for quarters, in_flight in product((1, 2, 4, 8, 16), (1, 2, 4, 8)) if step else ():
            steps = ceil_div(ceil_div(4 * samples, quarters * model.parts), step)
            if least <= in_flight <= max(steps, least):
                with suppress(PlanError):  # blocks too large or lines too short
                    found[replace(model, threads_x=threads_x, in_flight=in_flight,
                                  samples_per_part=min(samples, steps * step), **cut)] = None
    return list(found)


def _light(dtype: str, compensated: bool) -> bool:
    """Whether a vector's sums take so few registers that 1,536 threads fit on a multiprocessor, and not only 1,024."""
    return dtype != "float64" and not compensated


def _most_blocks(elements: int, dtype: str, compensated: bool) -> int:
    """As many blocks as 108 multiprocessors hold at once, where they have much to do: more were a small second wave."""
    fewer = MOST_BLOCKS * 2 // 3
    return MOST_BLOCKS if _light(dtype, compensated) or elements < 16384 * fewer else fewer


def worthy_blocks(elements: int, most: int = MOST_BLOCKS) -> int:
    """How many blocks are worth it: two for each of 132 multiprocessors from a million elements, most from nine."""
    return min(most * 8 // 9, max(min(LEAST_BLOCKS, ceil_div(elements, 3584)), elements // 16384))


def steps_of_a_part(steps: int, wanted: int, most: int) -> int:
    """Steps of a part, so that about `wanted` parts result and at most `most`."""
    return max(1, ceil_div(steps, max(most, 1)), steps // wanted)


def _one_part(samples: int, outputs: int, dtype: str, compensated: bool, least_lanes: int = 8) -> BatchSumPlan:
    """The plan for rows, by a single launch; many rows have at least so many lanes."""
    vector, sector = 16 // ITEM_BYTES[dtype], 32 // ITEM_BYTES[dtype]
    small = samples * outputs <= SMALL
    needed = power_of_two(ceil_div(outputs + sector - 1, vector))
    if samples <= 64 and outputs > 16 * vector:
        # Few rows: several vectors of each under way, so that the bytes read twice at the seams of tiles are few.
        lanes = min(power_of_two(samples), max(sector, 8))
        threads_x = min(max((64 if small else 128) // lanes, 8 if small else 16), needed)
        # Compensated halves keep 16 registers of sums a vector: with three of them too few threads would be left.
        vectors = 4 if dtype == "float64" else 2 if compensated and sector == 16 else 3
        return BatchSumPlan(samples, outputs, dtype, "rows", threads_x, lanes, in_flight=1, samples_per_part=samples,
                            vectors=vectors, compensated=compensated)
    threads = 64 if small else 256
    threads_x = min(max(4, needed), threads // max(sector, 8 if small else least_lanes))
    lanes = threads // threads_x
    return BatchSumPlan(samples, outputs, dtype, "rows", threads_x, lanes, samples_per_part=samples,
                        in_flight=_under_way(ceil_div(samples, lanes)), compensated=compensated)


def _plan_runs(samples: int, outputs: int, dtype: str, compensated: bool) -> BatchSumPlan:
    """The plan for outputs whose samples lie side by side: runs as long as the batch."""
    vector = 16 // ITEM_BYTES[dtype]
    small = samples * outputs <= SMALL
    threads = 64 if small else 256
    threads_x = min(max(4 if small else 8, power_of_two(samples // (4 * vector) // 2 + 1)), threads)
    lanes = min(threads // threads_x, power_of_two(outputs))
    tile = threads_x * vector
    lines, groups = ceil_div(samples, tile), ceil_div(outputs, lanes)
    most = _most_blocks(samples * outputs, dtype, compensated)
    if not small:
        lines = steps_of_a_part(lines, ceil_div(worthy_blocks(samples * outputs, most), groups), most // groups)
    return BatchSumPlan(samples, outputs, dtype, "features_first", threads_x, lanes,
                        in_flight=_under_way(lines, least=2), samples_per_part=min(samples, lines * tile),
                        runs_per_block=ceil_div(groups, 32 if small else most) * lanes, folders=_folders(tile),
                        compensated=compensated)


def _plan_flat(samples: int, outputs: int, dtype: str, threads: int, compensated: bool) -> BatchSumPlan:
    """The plan for a narrow matrix without gaps: one run."""
    tile = threads * 16 // ITEM_BYTES[dtype]
    lines = ceil_div(samples * outputs, tile)
    if samples * outputs > SMALL:
        most = _most_blocks(samples * outputs, dtype, compensated)
        lines = steps_of_a_part(lines, worthy_blocks(samples * outputs, most), most)
    return BatchSumPlan(samples, outputs, dtype, "flat", threads, lanes=1, in_flight=_under_way(lines, least=2),
                        samples_per_part=min(samples, lines * tile // outputs), folders=_folders(tile // outputs),
                        compensated=compensated)


def _flat_threads(samples: int, outputs: int, dtype: str) -> int:
    """Threads whose vectors are a multiple of the outputs and of 32 bytes, with few idle lanes; 0 if there are none."""
    if outputs > 256:
        return 0
    unit = outputs // gcd(outputs, 16 // ITEM_BYTES[dtype])
    if samples * outputs <= SMALL:
        return 64 // unit * unit
    # Eight warps; an odd number of threads only if need be, since every other line then begins inside of 32 bytes.
    fitting = [256 // step * step for step in (unit * (1 + unit % 2), unit)]
    return next((threads for threads in fitting if threads > 7 * 32), 0)


def _under_way(steps: int, least: int = 1) -> int:
    """As many loads as there are steps, up to IN_FLIGHT; a power of two, so that kernels are few.

    Runs take a line that is left over alone, and so have no kernel for less than two.
    """
    return min(IN_FLIGHT, max(least, 1 << steps.bit_length() - 1))


def _folders(copies: int) -> int:
    """Threads that fold so many copies, so that neither they nor the one that adds them up has much to do."""
    return min(32, power_of_two(isqrt(copies) // 2 + 1))


def launches(plan: BatchSumPlan, source: Matrix, result: Result, alpha: Scale = ALPHA,
             workspace_at: int = 0) -> tuple[Launch, ...]:
    """result (1, outputs) = alpha * the sum of the rows of source (samples, outputs), or that added into result.

    The sums of parts are kept in the workspace from the byte workspace_at on.
    """
    if not result.matrix.cols or (result.accumulate and not source.rows):
        return ()
    if plan.second is None:
        return (_launch(plan, source, result, alpha),)
    return (_launch(plan, source, Result(parts_of(plan, workspace_at)), ONE, partial=True),
            *add_parts_of(plan, result, alpha, workspace_at))


def parts_of(plan: BatchSumPlan, workspace_at: int) -> Matrix:
    """The sums of a plan's parts in the workspace, which its second plan adds."""
    return scratch(workspace_at, plan.parts * (1 + plan.compensated), plan.outputs, plan.accumulator, plan.pitch)


def add_parts_of(plan: BatchSumPlan, result: Result, alpha: Scale, workspace_at: int) -> tuple[Launch, ...]:
    """What adds the sums of the parts that another launch left there, if there are several, as the second plan says."""
    second = plan.second
    return () if second is None else (sum_parts(second, parts_of(plan, workspace_at), result, alpha),)


def sum_parts(second: SumPartsPlan, parts: Matrix, result: Result, alpha: Scale,
              beside: Matrix | None = None) -> Launch:
    """What adds the rows of parts to the result; if there is one beside it, their last column to that, as it is."""
    target = result.matrix
    constants = SumParts(second.dtype, target.dtype, MOST_THREADS, result.accumulate, second.compensated,
                         beside is not None)
    arguments = SumPartsArguments(parts.address, parts.row_stride, second.rows, second.outputs, second.tile_cols,
                                  second.lanes, target.address, target.col_stride,
                                  beside.address if beside is not None else 0, alpha)
    return Launch(KERNELS, "sum_parts", constants, arguments, second.grid, second.threads, plan=second)


def _launch(plan: BatchSumPlan, source: Matrix, result: Result, alpha: Scale, *, partial: bool = False) -> Launch:
    """Writes the sum or, if partial, each part's sums and what they lost."""
    target = result.matrix
    of_call = {"result": target.dtype, "accumulate": result.accumulate,
               "keeps_lost": partial and plan.compensated}
    written = (target.address, target.row_stride * (1 + plan.compensated) if partial else 0, target.col_stride,
               target.row_stride, alpha)
    if plan.layout == "rows":
        # A row is shifted to where 32 bytes begin, for which tiles have room unless all rows begin there.
        aligned = source.alignment >= 32 and source.row_stride % plan.sector == 0
        tile_cols = plan.tile if aligned else plan.tile - plan.sector
        return Launch(KERNELS, "sum_strided", constants_of(SumStrided, plan, of_call), SumStridedArguments(
            source.address, source.row_stride, plan.samples, plan.outputs, plan.samples_per_part, tile_cols, *written),
            (ceil_div(plan.outputs, tile_cols), plan.parts), plan.threads, plan=plan)
    if not plan.in_runs:
        return Launch(KERNELS, "sum_flat", constants_of(SumFlat, plan, of_call), SumFlatArguments(
            source.address, plan.samples * plan.outputs, plan.samples_per_part * plan.outputs, plan.outputs,
            plan.folders, plan.tile // (plan.folders * plan.outputs), *written), plan.grid, plan.threads, plan=plan)
    return Launch(KERNELS, "sum_runs", constants_of(SumRuns, plan, of_call), SumRunsArguments(
        source.address, source.col_stride, plan.samples, plan.outputs, plan.runs_per_block, plan.samples_per_part,
        *written), plan.grid, plan.threads, plan=plan)


def variants() -> Iterator[tuple[str, Launch]]:
    """The kernels for layers of all dtypes and layouts, by name."""
    for dtype in ITEM_BYTES:
        for samples, outputs, layout in ((8192, 3072, "rows"), (33, 50257, "rows"), (64, 10, "rows"),
                                         (65536, 10, "flat"), (64, 10, "flat"), (8192, 3072, "features_first"),
                                         (64, 10, "features_first"), (8191, 3071, "rows"), (33, 23, "flat"),
                                         (33, 23, "rows"), (8191, 3071, "features_first")):
            yield from _variant(plan_batch_sum(samples, outputs, dtype, layout))
        for layout in LAYOUTS:
            plan = plan_batch_sum(65536, 10, dtype, layout, compensated=True)
            yield from _variant(plan, plan.accumulator, accumulate=True)
            yield from _variant(plan_batch_sum(33, 7, dtype, layout), "float64", accumulate=True)
            yield from _variant(plan_batch_sum(33, 7, dtype, layout, compensated=True), "float32")


def _variant(plan: BatchSumPlan, result: str = "", accumulate: bool = False) -> Iterator[tuple[str, Launch]]:
    result = result or plan.dtype
    strides = (1, plan.samples) if plan.layout == "features_first" else (plan.outputs, 1)
    source = Matrix(Slot("dz"), plan.dtype, plan.samples, plan.outputs, *strides)
    target = Matrix(Slot("db"), result, 1, plan.outputs, plan.outputs, 1)
    title = "-".join([plan.dtype, f"{plan.samples}x{plan.outputs}", plan.layout] + [f"to-{result}"] * (
        result != plan.dtype) + ["accumulate"] * accumulate + ["compensated"] * plan.compensated)
    return named(title, launches(plan, source, Result(target, accumulate)))
