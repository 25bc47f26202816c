"""Plans and operands -> kernels on a device. The only caller of densegrad.kernels."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from .operands import Argument, Inputs, Operand, Target
from .plans import (
    CROSS_ENTROPY,
    ITEM_BYTES,
    BatchSumPlan,
    MatmulPlan,
    TensorCorePlan,
    Tiling,
    UpstreamPlan,
)


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
        self._instead: dict[str, Operand] = {}
        self._results: dict[str, tuple[Target, Any]] = {}

    def place(self, argument: Argument | None) -> Operand:
        """The argument, which has been given, where kernels can read it; copied at most once."""
        if argument is None:
            raise TypeError("only an argument that was given can be placed")
        if argument.name in self._instead:
            return self._instead[argument.name]
        if argument.name not in self._placed:
            self.device.wait_for(argument.memory, self.stream)
            self._placed[argument.name] = self.device.placed(argument.array, argument.compact)
        return self._operand(argument, self._placed[argument.name])

    def result(self, target: Target) -> Operand:
        """Where kernels are to write a result."""
        argument, upload = target.argument, target.argument is not None and target.argument.compact
        if argument is None or (upload and not target.accumulate):
            features_first = target.features_first and argument is None
            *batch, features = target.shape
            array = self.device.empty((features, *batch) if features_first else target.shape, target.dtype)
            array = array.transpose(*range(1, array.ndim), 0) if features_first else array
        else:
            self.device.wait_for(argument.memory, self.stream)
            array = self.device.placed(argument.array, upload)
        self._results[target.name] = target, array
        return self._operand(argument or _matrix(target), array)

    def scratch(self, name: str, rows: int, cols: int, dtype: str) -> Operand:
        """A matrix in C order that nobody else has."""
        array = self.device.empty((rows, cols), dtype)
        return Operand(name, array, self.device.address(array), dtype, rows, cols, cols, 1)

    def like(self, argument: Argument) -> Operand:
        """A new matrix in the memory order of the argument."""
        if argument.layout == "features_first":
            return self.scratch(argument.name, argument.cols, argument.rows, argument.dtype).T
        return self.scratch(argument.name, argument.rows, argument.cols, argument.dtype)

    def use(self, argument: Argument, operand: Operand) -> None:
        """Let the operand take the argument's place from now on."""
        self._instead[argument.name] = operand

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

    def launch(self, kernel: Any, grid: tuple[int, ...], block: int, arguments: tuple, plan: Any,
               shared_bytes: int = 0) -> None:
        """Launch one kernel, with this much dynamic shared memory."""
        launches = _record.get()
        if launches is not None:
            launches.append(Launch(kernel.__name__, grid, block, plan))
        self.device.launch(kernel, grid, block, arguments, self.stream, shared_bytes)


@contextmanager
def session(inputs: Inputs, stream: Any) -> Iterator[Session]:
    """A session on the device of the inputs and on the stream."""
    with inputs.device.using(stream, inputs.place) as pointer:
        yield Session(inputs, pointer)


def _matrix(target: Target) -> Operand:
    """A new result seen as a matrix."""
    *batch, cols = target.shape
    rows = prod(batch)
    return Operand(target.name, None, 0, target.dtype, rows, cols, *((1, rows) if target.features_first else (cols, 1)))


def run_matmul(session: Session, plan: MatmulPlan | TensorCorePlan, left: Operand, right: Operand, result: Operand,
               accumulate: bool, alpha: float = 1.0, sums: Operand | None = None) -> None:
    """result = alpha * left @ right, and sums (1, cols) = alpha * the sum of the rows of right, if wanted on the way.

    With accumulate, both are added into what is there. Sums are only wanted of a result that has elements.
    """
    if not result.rows or not result.cols or (accumulate and not plan.depth):
        return
    sums_of = "right" if sums is not None else ""
    if result.row_stride == 1 and (result.col_stride != 1 or result.cols == 1):
        plan, left, right, result = plan.T, right.T, left.T, result.T
        sums_of = "left" if sums_of else ""
    split = plan.parts > 1
    target = _workspace(session, plan.parts, result.rows, plan.pitch, plan.accumulator) if split else result
    partial_sums = None
    if sums is not None:
        partial_sums = _workspace(session, plan.parts, 1, -(-sums.cols // 4) * 4, plan.accumulator)
    _launch_product(session, plan, left, right, target, accumulate and not split, 1.0 if split else alpha, sums_of,
                    partial_sums)
    if split:
        run_add_parts(session, target, plan.parts, result, accumulate, alpha, plan)
    if sums is not None and partial_sums is not None:
        run_add_parts(session, partial_sums, plan.parts, sums, accumulate, alpha, plan)


def _workspace(session: Session, parts: int, rows: int, pitch: int, dtype: str) -> Operand:
    """Room for parts that follow one another; the operand is the first of them."""
    array = session.device.empty((parts, rows, pitch), dtype)
    return Operand("workspace", array, session.device.address(array), dtype, rows, pitch, pitch, 1)


def _launch_product(session: Session, plan: MatmulPlan | TensorCorePlan, left: Operand, right: Operand, target: Operand,
                    accumulate: bool, alpha: float, sums_of: str, sums: Operand | None) -> None:
    from .kernels import matmul_simt, matmul_tensor_core
    from .kernels.primitives.layout import Epilogue, Side

    # FMA units read operands into registers in the type of the sums, and store results from there.
    on_fma_units = isinstance(plan, MatmulPlan)
    vector = 16 // ITEM_BYTES[plan.accumulator if on_fma_units else plan.dtype]
    result_vector = vector if on_fma_units else 16 // ITEM_BYTES[target.dtype]
    wide = "float64" if target.dtype == "float64" else plan.accumulator
    left_side, right_side = _side(left, vector), _side(right.T, vector)
    offset_bits = _offset_bits(plan, left_side, right_side)
    how = (Side(left_side.along_depth, left_side.access), Side(right_side.along_depth, right_side.access),
           Epilogue(target.dtype, target.access(result_vector), wide, accumulate), sums_of)
    if isinstance(plan, MatmulPlan):
        kernel = matmul_simt.make_matmul(matmul_simt.Tiles(
            plan.dtype, plan.accumulator, plan.tile_rows, plan.tile_cols, plan.tile_depth, plan.thread_rows,
            plan.thread_cols, plan.blocks_per_multiprocessor, offset_bits), *how)
    else:
        kernel = matmul_tensor_core.make_matmul(matmul_tensor_core.Tiles(
            plan.dtype, plan.kind, plan.tile_rows, plan.tile_cols, plan.warp_rows, plan.warp_cols, plan.stages,
            offset_bits), *how)
    session.launch(kernel, plan.grid, plan.threads, (
        left.address, left_side.stride, right.address, right_side.stride, target.address, target.row_stride,
        target.col_stride, target.rows * target.row_stride, plan.rows, plan.cols, plan.depth, plan.depth_per_part,
        plan.group_bits, np.dtype(wide).type(alpha), sums.address if sums else 0, sums.row_stride if sums else 0),
        plan, 0 if on_fma_units else plan.shared_bytes)


def run_batch_sum(session: Session, plan: BatchSumPlan, source: Operand, result: Operand, accumulate: bool,
                  alpha: float = 1.0) -> None:
    """result (1, outputs) = alpha * the sum of the rows of source (samples, outputs), or that added into result."""
    if not result.cols or (accumulate and not source.rows):
        return
    second = plan.second
    if second is None:
        _launch_batch_sum(session, plan, source, result, accumulate, alpha)
        return
    workspace = _parts_of_sum(session, plan, second)
    _launch_batch_sum(session, plan, source, workspace, partial=True)
    _launch_batch_sum(session, second, workspace, result, accumulate, alpha)


def _parts_of_sum(session: Session, plan: BatchSumPlan, second: BatchSumPlan) -> Operand:
    """Room for the sums of the parts, which the second plan adds."""
    return replace(session.scratch("workspace", second.samples, plan.pitch, plan.accumulator), cols=plan.outputs)


def _launch_batch_sum(session: Session, plan: BatchSumPlan, source: Operand, target: Operand, accumulate: bool = False,
                      alpha: float = 1.0, *, partial: bool = False) -> None:
    """The target gets the sum, or each part's sums and what they lost if `partial`, for another launch to add."""
    from .kernels.batch_sum import make_sum_contiguous, make_sum_strided

    wide = "float64" if target.dtype == "float64" else plan.accumulator
    written = (target.address, target.row_stride * (1 + plan.compensated) if partial else 0, target.col_stride,
               target.row_stride, np.dtype(wide).type(alpha))
    if plan.layout == "rows":
        kernel = make_sum_strided(plan.dtype, plan.accumulator, target.dtype, plan.threads_x, plan.lanes, plan.vectors,
                                  plan.in_flight, plan.blocks_per_multiprocessor, accumulate, plan.compensated, partial)
        item = 32 // plan.sector
        aligned = int(source.address) % 32 == 0 and source.row_stride * item % 32 == 0
        tile_cols = plan.tile if aligned else plan.tile - plan.sector
        grid = -(-plan.outputs // tile_cols), plan.parts
        arguments: tuple = (source.address, source.row_stride, plan.samples, plan.outputs, plan.samples_per_part,
                            tile_cols)
    else:
        kernel = make_sum_contiguous(plan.dtype, plan.accumulator, target.dtype, plan.period, plan.threads_x,
                                     plan.lanes, plan.in_flight, plan.folders, plan.line_pitch, plan.fold_pitch,
                                     plan.blocks_per_multiprocessor, accumulate, plan.compensated, partial)
        grid = plan.grid
        period = plan.period
        arguments = (source.address, source.col_stride, plan.samples * period, plan.outputs // period,
                     plan.runs_per_block, plan.samples_per_part * period)
    session.launch(kernel, grid, plan.threads, arguments + written, plan)


def run_upstream(session: Session, plan: UpstreamPlan, parameter: float, gradient: Operand | None,
                 z: Operand | None, dz: Operand, result: Operand, *, weights: Operand | None = None,
                 labels: Operand | None = None, ignored: int = 0, alpha: float = 1.0, sum_alpha: float = 1.0,
                 accumulate: bool = False) -> None:
    """dz = alpha * weights * what the plan's activation or cross-entropy makes of the gradient and z.

    result is sum_alpha times the sum of dz, or that added into result with accumulate. All but result (1, outputs) are
    (samples, outputs), weights and labels (samples, 1).
    """
    if not dz.cols or (accumulate and not dz.rows):
        return
    from .kernels.log_sum_exp import make_log_sum_exp
    from .kernels.upstream import make_upstream_sum

    cut, second, features_first = plan.sum, plan.sum.second, plan.features_first
    totals: Operand | None = None
    if plan.above == CROSS_ENTROPY and z is not None:
        adders, rows = plan.log_sum_exp_block
        totals = session.scratch("totals", 2, max(dz.rows, 1), cut.accumulator)
        session.launch(make_log_sum_exp(cut.dtype, cut.accumulator, adders, rows, features_first),
                       (max(-(-dz.rows // rows), 1),), adders * rows,
                       (z.address, z.row_stride, z.col_stride, dz.rows, dz.cols, totals.address), plan)
    width = min((matrix.T if features_first else matrix).access(plan.elements)
                for matrix in (gradient, z, dz) if matrix is not None)
    of_pieces = weights is not None and features_first and weights.T.access(width) == width
    target = result if second is None else _parts_of_sum(session, cut, second)
    kernel = make_upstream_sum(plan.above, cut.dtype, cut.accumulator, target.dtype, plan.elements, width,
                               cut.threads_x, cut.lanes, features_first, plan.blocks_per_multiprocessor,
                               weights.dtype if weights else "", width if of_pieces else 1,
                               labels.dtype if labels else "", accumulate and second is None, second is not None)
    inner = np.dtype(cut.accumulator).type
    wide = np.float64 if target.dtype == "float64" else inner

    def placed(matrix: Operand | None) -> tuple:
        return (matrix.address, matrix.row_stride, matrix.col_stride) if matrix else (0, 0, 0)

    session.launch(kernel, plan.grid, plan.threads, (
        *placed(gradient), *placed(z), *placed(dz), *placed(weights)[:2], *placed(labels)[:2], *placed(totals)[:1],
        ignored, inner(parameter), inner(alpha), dz.rows, dz.cols, cut.samples_per_part, target.address,
        target.row_stride if second else 0, target.col_stride, wide(sum_alpha)), plan)
    if second is not None:
        _launch_batch_sum(session, second, target, result, accumulate, sum_alpha)


def run_add_parts(session: Session, workspace: Operand, parts: int, result: Operand, accumulate: bool, alpha: float,
                  plan: Any) -> None:
    """result = alpha * the sum of `parts` matrices that follow one another in workspace, or that added into result.

    workspace is the first of them, as wide as result or padded.
    """
    from .kernels.batch_sum import make_add_parts

    vector = 16 // np.dtype(workspace.dtype).itemsize
    threads = 64 if result.rows * workspace.row_stride <= 64 * vector * 132 else 256
    kernel = make_add_parts(workspace.dtype, result.dtype, result.access(vector), threads, accumulate)
    items = result.rows * workspace.row_stride // vector
    session.launch(kernel, (-(-items // threads),), threads, (
        workspace.address, parts, workspace.rows * workspace.row_stride, workspace.row_stride, result.address,
        result.rows, result.cols, result.row_stride, result.col_stride,
        np.dtype("float64" if result.dtype == "float64" else workspace.dtype).type(alpha)), plan)


@dataclass(frozen=True)
class _Side:
    """How a kernel walks through one operand, seen as (outer, depth)."""

    along_depth: bool
    stride: int
    access: int


def _offset_bits(plan: Tiling, left: _Side, right: _Side) -> int:
    """Whether 32 bits can count the bytes within every tile."""
    def reach(side: _Side, outer: int) -> int:
        return (outer if side.along_depth else plan.tile_depth) * abs(side.stride) * ITEM_BYTES[plan.dtype]

    small = max(reach(left, plan.tile_rows), reach(right, plan.tile_cols)) < 2**31
    return 32 if small and left.stride >= 0 and right.stride >= 0 else 64


def _side(operand: Operand, vector: int) -> _Side:
    """Contiguous along the depth if it can be: a vector along it counts as that.

    Where there is nothing to step to, the stride is 0, whatever the array's says.
    """
    if operand.row_stride == 1 and (operand.rows > 1 or operand.col_stride != 1):
        return _Side(False, operand.col_stride if operand.cols > 1 else 0, operand.T.access(vector))
    return _Side(True, operand.row_stride if operand.rows > 1 else 0, operand.access(vector))
