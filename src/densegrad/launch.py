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
    FLOAT16_CAPABILITY,
    ITEM_BYTES,
    MATMUL_TILES,
    TENSOR_CORE_CAPABILITY,
    TENSOR_CORE_TILES,
    BatchSumPlan,
    MatmulPlan,
    TensorCorePlan,
    Tiling,
    UpstreamPlan,
    accumulator_of,
    plan_batch_sum,
    plan_upstream,
    transposed_tile,
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
            turned = target.turned and argument is None
            array = self.device.empty(target.shape[::-1] if turned else target.shape, target.dtype)
            array = array.T if turned else array
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
    return Operand(target.name, None, 0, target.dtype, rows, cols, *((1, rows) if target.turned else (cols, 1)))


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
    multiply: Any = _launch_matmul if isinstance(plan, MatmulPlan) else _launch_tensor_core
    multiply(session, plan, left, right, target, accumulate and not split, 1.0 if split else alpha, sums_of,
             partial_sums)
    if split:
        run_add_parts(session, target, plan.parts, result, accumulate, alpha, plan)
    if sums is not None and partial_sums is not None:
        run_add_parts(session, partial_sums, plan.parts, sums, accumulate, alpha, plan)


def _workspace(session: Session, parts: int, rows: int, pitch: int, dtype: str) -> Operand:
    """Room for parts that follow one another; the operand is the first of them."""
    array = session.device.empty((parts, rows, pitch), dtype)
    return Operand("workspace", array, session.device.address(array), dtype, rows, pitch, pitch, 1)


def _launch_matmul(session: Session, plan: MatmulPlan, left: Operand, right: Operand, target: Operand, accumulate: bool,
                   alpha: float, sums_of: str, sums: Operand | None) -> None:
    from .kernels.matmul_simt import Epilogue, Side, Tiles, make_matmul

    vector = 16 // ITEM_BYTES[plan.accumulator]
    wide = "float64" if target.dtype == "float64" else plan.accumulator
    left_side, right_side = _side(left, vector), _side(right.T, vector)
    tiles = Tiles(plan.dtype, plan.accumulator, plan.tile_rows, plan.tile_cols, plan.tile_depth, plan.thread_rows,
                  plan.thread_cols, plan.blocks_per_multiprocessor, _offset_bits(plan, left_side, right_side))
    kernel = make_matmul(tiles, Side(left_side.along_depth, left_side.access),
                         Side(right_side.along_depth, right_side.access),
                         Epilogue(target.dtype, target.access(vector), wide, accumulate), sums_of)
    session.launch(kernel, plan.grid, plan.threads, (
        left.address, left_side.stride, right.address, right_side.stride, target.address, target.row_stride,
        target.col_stride, target.rows * target.row_stride, plan.rows, plan.cols, plan.depth, plan.depth_per_part,
        plan.group_bits, np.dtype(wide).type(alpha), sums.address if sums else 0, sums.row_stride if sums else 0), plan)


def _launch_tensor_core(session: Session, plan: TensorCorePlan, left: Operand, right: Operand, target: Operand,
                        accumulate: bool, alpha: float, sums_of: str, sums: Operand | None) -> None:
    from .kernels.matmul_tensor_core import make_matmul

    vector = 16 // ITEM_BYTES[plan.dtype]
    epilogue = "float64" if target.dtype == "float64" else plan.accumulator
    left_side, right_side = _side(left, vector), _side(right.T, vector)
    kernel = make_matmul(plan.dtype, plan.kind, plan.tile_rows, plan.tile_cols, plan.warp_rows,
                         plan.warp_cols, plan.stages, left_side.access, left_side.along_depth, right_side.access,
                         right_side.along_depth, _offset_bits(plan, left_side, right_side), target.dtype,
                         target.access(16 // ITEM_BYTES[target.dtype]), epilogue, accumulate, sums_of)
    session.launch(kernel, plan.grid, plan.threads, (
        left.address, left_side.stride, right.address, right_side.stride, target.address, target.row_stride,
        target.col_stride, target.rows * target.row_stride, plan.rows, plan.cols, plan.depth, plan.depth_per_part,
        plan.group_bits, np.dtype(epilogue).type(alpha), sums.address if sums else 0, sums.row_stride if sums else 0),
        plan, plan.shared_bytes)


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
                 labels: Operand | None = None, ignored: int = 0, alpha: float = 1.0, accumulate: bool = False) -> None:
    """dz = alpha * weights * what the plan's activation or cross-entropy makes of the gradient and z, result its sum.

    All but result (1, outputs) are (samples, outputs), weights and labels (samples, 1). With accumulate, the sum is
    added into result.
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
    wide = np.dtype(cut.accumulator).type

    def placed(matrix: Operand | None) -> tuple:
        return (matrix.address, matrix.row_stride, matrix.col_stride) if matrix else (0, 0, 0)

    session.launch(kernel, plan.grid, plan.threads, (
        *placed(gradient), *placed(z), *placed(dz), *placed(weights)[:2], *placed(labels)[:2], *placed(totals)[:1],
        ignored, wide(parameter), wide(alpha), dz.rows, dz.cols, cut.samples_per_part, target.address,
        target.row_stride if second else 0, target.col_stride), plan)
    if second is not None:
        _launch_batch_sum(session, second, target, result, accumulate)


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


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched for some layer, with what the compiler needs to know of it."""

    kernel: Any
    signature: tuple
    threads: int
    min_cc: tuple[int, int]
    description: str


class _Catalogue(Session):
    """A session without a device, which keeps the kernels that it would have launched. Its arrays are aligned."""

    def __init__(self) -> None:
        self.device: Any = self
        self.variants: dict[str, Variant] = {}
        self.title = ""

    def empty(self, shape: tuple[int, ...], dtype: str) -> None:
        """No memory."""

    def address(self, array: None) -> int:
        """Where no memory begins."""
        return 0

    def launch(self, kernel: Any, grid: tuple[int, ...], block: int, arguments: tuple, plan: Any,
               shared_bytes: int = 0) -> None:
        """Keep the kernel under its own name and the title, "-second" for another one of these."""
        from numba import typeof

        if all(variant.kernel is not kernel for variant in self.variants.values()):
            name = f"{kernel.__name__}-{self.title}"
            self.variants[name + "-second" * (name in self.variants)] = Variant(
                kernel, tuple(typeof(argument) for argument in arguments), block,
                plan.capability if isinstance(plan, TensorCorePlan) else (7, 5), plan.explain().partition("\n")[0])

    def add_matmul(self, dtype: str, tile: tuple[int, int, int, int, int],
                   along_depth: tuple[bool, bool] = (False, False), length: int = 1024, result: str = "",
                   accumulate: bool = False, sums: bool = False) -> None:
        """Keep the kernel on FMA units for square operands, contiguous along the depth or the other axis."""
        self.title = "-".join([dtype, "x".join(map(str, tile[:3])), "x".join(map(str, tile[3:]))])
        plan = MatmulPlan(length, length, length, dtype, *tile)
        self._add_product(plan, along_depth, result or dtype, accumulate, sums)

    def add_tensor_core(self, dtype: str, precision: str | None, tile: tuple[int, int, int, int, int],
                        along_depth: tuple[bool, bool] = (False, False), length: int = 1024, result: str = "",
                        accumulate: bool = False, sums: bool = False,
                        capability: tuple[int, int] = TENSOR_CORE_CAPABILITY) -> None:
        """The same on tensor cores."""
        rows, cols, warp_rows, warp_cols, stages = tile
        plan = TensorCorePlan(length, length, length, dtype, precision, rows, cols, 64 // ITEM_BYTES[dtype], warp_rows,
                              warp_cols, stages if capability == TENSOR_CORE_CAPABILITY else 2, capability=capability)
        self.title = "-".join([plan.kind, "x".join(map(str, tile[:2])), "x".join(map(str, tile[2:4]))])
        self._add_product(plan, along_depth, result or dtype, accumulate, sums)

    def _add_product(self, plan: MatmulPlan | TensorCorePlan, along_depth: tuple[bool, bool], result: str,
                     accumulate: bool, sums: bool) -> None:
        left_along, right_along = along_depth
        length = plan.depth
        self.title = "-".join([self.title, "depth" if left_along else "rows", "depth" if right_along else "cols"]
                              + [f"to-{result}"] * (result != plan.dtype) + ["odd"] * (length % 2)
                              + ["accumulate"] * accumulate + ["sums"] * sums)
        left, right, whole = (Operand(name, None, 0, kind, length, length, length, 1)
                              for name, kind in (("left", plan.dtype), ("right", plan.dtype), ("result", result)))
        run_matmul(self, plan, left if left_along else left.T, right.T if right_along else right, whole, accumulate,
                   sums=Operand("sums", None, 0, result, 1, length, length, 1) if sums else None)

    def add_batch_sum(self, samples: int, outputs: int, dtype: str, layout: str, result: str = "",
                      accumulate: bool = False, compensated: bool = False) -> None:
        """Keep the kernels for a batch of this shape."""
        result = result or dtype
        self.title = "-".join([dtype, f"{samples}x{outputs}", layout] + [f"to-{result}"] * (result != dtype)
                              + ["accumulate"] * accumulate + ["compensated"] * compensated)
        strides = (1, samples) if layout == "features_first" else (outputs, 1)
        source = Operand("dz", None, 0, dtype, samples, outputs, *strides)
        run_batch_sum(self, plan_batch_sum(samples, outputs, dtype, layout, compensated), source,
                      Operand("db", None, 0, result, 1, outputs, outputs, 1), accumulate)

    def add_upstream(self, above: str, samples: int, outputs: int, dtype: str, layout: str, weights: str = "") -> None:
        """Keep the kernels that form dZ of this shape."""
        self.title = "-".join([dtype, above, f"{samples}x{outputs}", layout] + [f"weights-{weights}"] * bool(weights))
        turned = layout == "features_first"
        matrix = Operand("dz", None, 0, dtype, samples, outputs, *((1, samples) if turned else (outputs, 1)))
        column = Operand("weights", None, 0, weights or "int64", samples, 1, 1, 1)
        labels = above == CROSS_ENTROPY
        run_upstream(self, plan_upstream(samples, outputs, dtype, layout, above), 0.0, None if labels else matrix,
                     None if above == "identity" else matrix, matrix,
                     Operand("db", None, 0, dtype, 1, outputs, outputs, 1), weights=column if weights else None,
                     labels=replace(column, dtype="int64") if labels else None)


def kernel_variants() -> dict[str, Variant]:
    """The kernels for all dtypes, tiles, layouts and options, by name. Needs a compiler, but no device."""
    catalogue = _Catalogue()
    for dtype in ITEM_BYTES:
        accumulator = accumulator_of(dtype)
        medium, large = (MATMUL_TILES[4], MATMUL_TILES[5]) if dtype == "float64" else (MATMUL_TILES[3], MATMUL_TILES[1])
        for along_depth in ((False, False), (True, True), (True, False), (False, True)):
            catalogue.add_matmul(dtype, large, along_depth)
            catalogue.add_matmul(dtype, medium, along_depth, length=1023)
        catalogue.add_matmul(dtype, medium, sums=True)
        catalogue.add_matmul(dtype, medium, accumulate=True)
        if accumulator != dtype:
            catalogue.add_matmul(dtype, medium, result=accumulator, accumulate=True)
        for samples, outputs, layout in ((8192, 3072, "rows"), (33, 50257, "rows"), (64, 10, "rows"),
                                         (65536, 10, "flat"), (64, 10, "flat"), (8192, 3072, "features_first"),
                                         (64, 10, "features_first")):
            catalogue.add_batch_sum(samples, outputs, dtype, layout)
        for layout in ("rows", "flat", "features_first"):
            catalogue.add_batch_sum(65536, 10, dtype, layout, result=accumulator, accumulate=True, compensated=True)
        for layout in ("flat", "features_first"):
            for above, weights in (("relu", ""), ("gelu", ""), ("gelu_tanh", "float32"), (CROSS_ENTROPY, ""),
                                   ("identity", "bool")):
                catalogue.add_upstream(above, 8192, 3072, dtype, layout, weights)
        catalogue.add_upstream("silu", 65536, 10, dtype, "flat")
    for tile in MATMUL_TILES:
        catalogue.add_matmul("float32", tile)
        catalogue.add_matmul("float32", transposed_tile(tile))
    for dtype, precision in (("float16", None), ("bfloat16", None), ("float32", "tf32"), ("float32", "tf32x3")):
        large, small = TENSOR_CORE_TILES[2 if precision == "tf32x3" else 0], TENSOR_CORE_TILES[-1]
        for along_depth in ((False, False), (True, True), (True, False), (False, True)):
            catalogue.add_tensor_core(dtype, precision, large, along_depth)
            if along_depth[0] == along_depth[1]:
                catalogue.add_tensor_core(dtype, precision, large, along_depth, sums=True)
        catalogue.add_tensor_core(dtype, precision, small, length=1023)
        catalogue.add_tensor_core(dtype, precision, small, result="float32", accumulate=True)
    for tile in TENSOR_CORE_TILES:
        catalogue.add_tensor_core("bfloat16", None, tile)
    for along_depth in ((False, False), (True, True)):
        for tile in (TENSOR_CORE_TILES[0], TENSOR_CORE_TILES[-1]):
            catalogue.add_tensor_core("float16", None, tile, along_depth, sums=True, capability=FLOAT16_CAPABILITY)
    return catalogue.variants
