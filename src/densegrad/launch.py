"""Plans and operands -> kernels on a device. The only caller of densegrad.kernels."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from .operands import Argument, Inputs, Operand, Target
from .plans import ITEM_BYTES, BatchSumPlan, MatmulPlan, accumulator_of


@dataclass(frozen=True)
class Launch:
    """One kernel that was launched, and the plan it was part of."""

    kernel: str
    grid: tuple[int, ...]
    block: int
    plan: Any


_record: ContextVar[list[Launch] | None] = ContextVar("densegrad_launches", default=None)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """A list that receives every launch made in the with block."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)


class Session:
    """The launches of one call: its inputs where kernels can read them, its stream, its results."""

    def __init__(self, inputs: Inputs, stream: int):
        self.device, self.inputs, self.stream = inputs.device, inputs, stream
        self._placed: dict[str, Any] = {}
        self._results: dict[str, tuple[Target, Any]] = {}

    def place(self, argument: Argument) -> Operand:
        """The argument where kernels can read it; copied at most once."""
        if argument.name not in self._placed:
            self.device.wait_for(argument.memory, self.stream)
            self._placed[argument.name] = self.device.placed(argument.array, argument.compact)
        return self._operand(argument, self._placed[argument.name])

    def result(self, target: Target) -> Operand:
        """Where kernels are to write a result."""
        argument, upload = target.argument, target.argument is not None and target.argument.compact
        if argument is None:
            array = self.device.empty(target.shape, target.dtype)
        elif upload and not target.accumulate:
            array = self.device.empty(target.shape, target.dtype)
        else:
            self.device.wait_for(argument.memory, self.stream)
            array = self.device.placed(argument.array, upload)
        self._results[target.name] = target, array
        return self._operand(argument or _matrix(target), array)

    def _operand(self, matrix: Any, array: Any) -> Operand:
        return Operand(matrix.name, array, self.device.address(array), matrix.dtype, matrix.rows, matrix.cols,
                       matrix.row_stride, matrix.col_stride)

    def deliver(self, target: Target) -> Any:
        """The finished result, in the container that the user gave or expects."""
        target, array = self._results[target.name]
        if target.argument is None:
            return self.device.deliver(array, self.inputs.dz.array)
        if target.argument.compact:
            target.argument.array[...] = self.device.deliver(array, target.argument.array)
        return target.argument.array

    def launch(self, kernel: Any, grid: tuple[int, ...], block: int, arguments: tuple, plan: Any) -> None:
        """Launch one kernel."""
        launches = _record.get()
        if launches is not None:
            launches.append(Launch(kernel.__name__, grid, block, plan))
        self.device.launch(kernel, grid, block, arguments, self.stream)


@contextmanager
def session(inputs: Inputs, stream: Any) -> Iterator[Session]:
    """A session on the device of the inputs and on the stream."""
    with inputs.device.using(stream, inputs.place) as pointer:
        yield Session(inputs, pointer)


def _matrix(target: Target) -> Operand:
    """A new result in C order, seen as a matrix."""
    *batch, cols = target.shape
    return Operand(target.name, None, 0, target.dtype, int(np.prod(batch, dtype=np.int64)), cols, cols, 1)


def run_matmul(session: Session, plan: MatmulPlan, left: Operand, right: Operand, result: Operand, accumulate: bool,
               alpha: float = 1.0) -> None:
    """result = alpha * left @ right, or that added into result."""
    from .kernels.matmul_simt import make_matmul

    if not result.rows or not result.cols or (accumulate and not plan.depth):
        return
    if result.row_stride == 1 and result.col_stride != 1:
        plan, left, right, result = plan.T, right.T, left.T, result.T
    accumulator = accumulator_of(plan.dtype)
    vector = 16 // np.dtype(accumulator).itemsize
    split = plan.parts > 1
    pitch = -(-result.cols // vector) * vector
    if split:
        workspace = session.device.empty(plan.parts * result.rows * pitch, accumulator)
        target = Operand("workspace", workspace, session.device.address(workspace), accumulator, result.rows, pitch, pitch, 1)
    else:
        target = result
    epilogue = "float64" if target.dtype == "float64" else accumulator
    left_side, right_side = _side(left, vector), _side(right.T, vector)
    kernel = make_matmul(plan.dtype, accumulator, plan.tile_rows, plan.tile_cols, plan.tile_depth, plan.thread_rows,
                         plan.thread_cols, plan.blocks_per_multiprocessor, left_side.access, left_side.along_depth,
                         right_side.access, right_side.along_depth,
                         _offset_bits(plan, left_side, right_side), target.dtype, target.access(vector), epilogue,
                         accumulate and not split)
    session.launch(kernel, plan.grid, plan.threads, (
        left.address, left_side.stride, right.address, right_side.stride, target.address, target.row_stride,
        target.col_stride, target.rows * target.row_stride, plan.rows, plan.cols, plan.depth, plan.depth_per_part,
        plan.group_bits, np.dtype(epilogue).type(1.0 if split else alpha)), plan)
    if split:
        wider = "float64" if result.dtype == "float64" else accumulator
        run_add_parts(session, target, plan.parts, result, accumulate, np.dtype(wider).type(alpha), plan)


def run_batch_sum(session: Session, plan: BatchSumPlan, source: Operand, result: Operand, accumulate: bool) -> None:
    """result (1, outputs) = the sum of the rows of source (samples, outputs), or that added into result."""
    if not result.cols or (accumulate and not source.rows):
        return
    second = plan.second
    if second is None:
        _launch_batch_sum(session, plan, source, result, accumulate, partial=False)
        return
    array = session.device.empty((second.samples, plan.pitch), plan.accumulator)
    workspace = Operand("workspace", array, session.device.address(array), plan.accumulator, second.samples, plan.outputs,
                        plan.pitch, 1)
    _launch_batch_sum(session, plan, source, workspace, False, partial=True)
    _launch_batch_sum(session, second, workspace, result, accumulate, partial=False)


def _launch_batch_sum(session: Session, plan: BatchSumPlan, source: Operand, target: Operand, accumulate: bool,
                      partial: bool) -> None:
    from .kernels.batch_sum import make_sum_contiguous, make_sum_strided

    written = (target.address, target.row_stride * (1 + plan.compensated) if partial else 0, target.col_stride,
               target.row_stride)
    if plan.layout == "rows":
        kernel = make_sum_strided(plan.dtype, plan.accumulator, target.dtype, plan.threads_x, plan.lanes, plan.vectors,
                                  plan.in_flight, plan.blocks_per_multiprocessor, accumulate, plan.compensated, partial)
        item = 32 // plan.sector
        aligned = int(source.address) % 32 == 0 and source.row_stride * item % 32 == 0
        tile_cols = plan.tile if aligned else plan.tile - plan.sector
        grid = -(-plan.outputs // tile_cols), plan.parts
        arguments: tuple = (source.address, source.row_stride, plan.samples, plan.outputs, plan.samples_per_part, tile_cols)
    else:
        kernel = make_sum_contiguous(plan.dtype, plan.accumulator, target.dtype, plan.period, plan.threads_x, plan.lanes,
                                     plan.in_flight, plan.folders, plan.line_pitch, plan.fold_pitch,
                                     plan.blocks_per_multiprocessor, accumulate, plan.compensated, partial)
        grid = plan.grid
        period = plan.period
        arguments = (source.address, source.col_stride, plan.samples * period, plan.outputs // period, plan.runs_per_block,
                     plan.samples_per_part * period)
    session.launch(kernel, grid, plan.threads, arguments + written, plan)


def run_add_parts(session: Session, workspace: Operand, parts: int, result: Operand, accumulate: bool, alpha: Any,
                  plan: Any) -> None:
    """result = alpha * the sum of `parts` matrices that follow one another in workspace, or that added into result.

    workspace is the first of them, as wide as result or padded; alpha has the type of result or of the accumulator,
    whichever is wider.
    """
    from .kernels.batch_sum import make_add_parts

    vector = 16 // np.dtype(workspace.dtype).itemsize
    threads = 64 if result.rows * workspace.row_stride <= 64 * vector * 132 else 256
    kernel = make_add_parts(workspace.dtype, result.dtype, result.access(vector), threads, accumulate)
    items = result.rows * workspace.row_stride // vector
    session.launch(kernel, (-(-items // threads),), threads, (
        workspace.address, parts, workspace.rows * workspace.row_stride, workspace.row_stride, result.address, result.rows,
        result.cols, result.row_stride, result.col_stride, alpha), plan)


@dataclass(frozen=True)
class _Side:
    """How a kernel walks through one operand, seen as (outer, depth)."""

    along_depth: bool
    stride: int
    access: int


def _offset_bits(plan: MatmulPlan, left: _Side, right: _Side) -> int:
    """Whether 32 bits can count the bytes within every tile."""
    def reach(side: _Side, outer: int) -> int:
        return (outer if side.along_depth else plan.tile_depth) * abs(side.stride) * ITEM_BYTES[plan.dtype]

    small = max(reach(left, plan.tile_rows), reach(right, plan.tile_cols)) < 2**31
    return 32 if small and left.stride >= 0 and right.stride >= 0 else 64


def _side(operand: Operand, vector: int) -> _Side:
    if operand.row_stride == 1:
        return _Side(False, operand.col_stride, operand.T.access(vector))
    return _Side(True, operand.row_stride, operand.access(vector))
