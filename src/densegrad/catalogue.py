"""Every kernel as some layer launches it, by name: what the compile check and `densegrad ptx` compile."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .launch import Session, run_batch_sum, run_matmul, run_upstream
from .operands import Operand
from .plans import (
    CROSS_ENTROPY,
    FLOAT16_CAPABILITY,
    ITEM_BYTES,
    MATMUL_TILES,
    TENSOR_CORE_CAPABILITY,
    TENSOR_CORE_TILES,
    MatmulPlan,
    TensorCorePlan,
    accumulator_of,
    plan_batch_sum,
    plan_of_tile,
    plan_upstream,
    transposed_tile,
)


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched for some layer, with what the compiler needs to know of it."""

    kernel: Any
    signature: tuple
    threads: int
    min_cc: tuple[int, int]
    description: str


class Catalogue(Session):
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
        plan = plan_of_tile(length, length, length, dtype, precision, tile, capability)
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
    catalogue = Catalogue()
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
