"""dL/dW and dL/dX on tensor cores: main loops as linked, what is read and written, what dL/db costs, and accuracy.

Limits are those of CUTLASS's Ampere kernels or better: its bf16 loop of 128 x 256 x 32 tiles has 46 % mma
instructions, its TF32 loops 21 to 26 %. mma.sync reaches 63 % of an H100's tensor rate by the model, which is others'
measurement.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

import densegrad as dg
from benchmarks.counting import Limit, Rehearsed, Shown, total
from densegrad import reference
from densegrad.device import dtype_of
from densegrad.plans import (
    FLOAT16_CAPABILITY,
    ITEM_BYTES,
    TENSOR_CORE_CAPABILITY,
    TENSOR_CORE_TILES,
    TensorCorePlan,
    plan_matmul,
    plan_of_tile,
)

#: how numbers are multiplied: (dtype, precision); "float16k8" with what compute capability 7.5 has
KINDS: dict[str, tuple[str, str | None]] = {
    "float16": ("float16", None), "bfloat16": ("bfloat16", None), "tf32": ("float32", "tf32"),
    "tf32x3": ("float32", "tf32x3"), "float16k8": ("float16", None)}
#: the function, batch_axis and weight_layout whose operands lie along rows or cols and along the depth
ORIENTATIONS = {
    "dW": ("weight_grad", 0, "in_out"), "dW, dZ features first": ("weight_grad", 1, "in_out"),
    "dW out_in": ("weight_grad", 0, "out_in"), "dW out_in, dZ features first": ("weight_grad", 1, "out_in"),
    "dX": ("input_grad", 0, "in_out"), "dX, dZ features first": ("input_grad", 1, "in_out")}
#: the kinds that every GPU from 8.0 on has
NEWER = tuple(kind for kind in KINDS if kind != "float16k8")
#: of the tensor rate, in percent; mma.sync reaches 63 on 9.0
LEAST_PEAK = {"7.5": 99.9, "8.0": 99.9, "8.6": 99.9, "8.9": 99.9, "9.0": 62.9}
LEAST_MMA = {"float16": 0.46, "float16k8": 0.46, "bfloat16": 0.46, "tf32": 0.26}


def plan_of(kind: str, function: str, samples: int, in_features: int, out_features: int) -> TensorCorePlan:
    """The largest tiles, in one part."""
    dtype, precision = KINDS[kind]
    sizes = (in_features, out_features, samples) if function == "weight_grad" else (samples, in_features, out_features)
    return plan_of_tile(*sizes, dtype, precision, TENSOR_CORE_TILES[2 if kind == "tf32x3" else 0],
                        capability=TENSOR_CORE_CAPABILITY if kind in NEWER else FLOAT16_CAPABILITY)


def arrays_of(kind: str, orientation: str, samples: int, in_features: int, out_features: int) -> tuple[Any, ...]:
    """What the orientation's function takes, on the device: small integers."""
    import cupy

    function, axis, layout = ORIENTATIONS[orientation]
    dtype, draw = dtype_of(KINDS[kind][0]), np.random.default_rng(1)
    x, w, dz = (draw.integers(-2, 3, shape).astype(dtype) for shape in (
        (samples, in_features), (in_features, out_features), (samples, out_features)))
    dz, w = dz.T if axis else dz, w.T if layout == "out_in" else w
    arrays = (x, dz) if function == "weight_grad" else (dz, w)
    return tuple(cupy.asarray(np.ascontiguousarray(array)) for array in arrays)


@dataclass(frozen=True)
class Loop:
    """The main loop of one kernel, as linked for one compute capability."""

    kind: str
    orientation: str
    capability: str

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"loop {self.kind} {self.orientation} {self.capability}"

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        least = [Limit("mma_share", LEAST_MMA[self.kind])] if self.kind in LEAST_MMA else []
        return [Limit("percent_peak", LEAST_PEAK[self.capability]),
                Limit("local_instructions", most=0), Limit("stack_bytes", most=0), *least]

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Link it, and judge the machine code."""
        function, axis, layout = ORIENTATIONS[self.orientation]
        sizes = 64, 128, 256
        arrays = arrays_of(self.kind, self.orientation, *sizes)
        plan = plan_of(self.kind, function, *sizes)
        (counts,) = machine.count(
            lambda: getattr(dg, function)(*arrays, batch_axis=axis, weight_layout=layout, plan=plan))
        code = machine.code(counts, self.capability)
        return {
            "kind": self.kind, "orientation": self.orientation, "capability": self.capability,
            "tile": f"{plan.tile_rows}x{plan.tile_cols}x{plan.tile_depth}", "stages": plan.stages,
            "registers": code.registers, "shared_bytes": counts.shared_bytes,
            "local_instructions": code.local_instructions, "stack_bytes": code.stack_bytes,
            "loop_instructions": code.loop_instructions, "mma_share": code.mma_share, "load_to_use": code.load_to_use,
            "percent_peak": code.percent_peak,
        }


@dataclass(frozen=True)
class Memory:
    """What one function reads and writes, of tiles with and without edges."""

    kind: str
    orientation: str
    sizes: tuple[int, int, int] = (256, 256, 512)

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"memory {self.kind} {self.orientation} {'x'.join(map(str, self.sizes))}"

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return [Limit("read", 1, 1), Limit("written", 1, 1), Limit("wide_loads", 1),
                Limit("shared_load_degree", most=1), Limit("shared_store_degree", most=1)]

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute it."""
        function, axis, layout = ORIENTATIONS[self.orientation]
        arrays = arrays_of(self.kind, self.orientation, *self.sizes)
        plan = plan_of(self.kind, function, *self.sizes)
        (counts,) = machine.count(
            lambda: getattr(dg, function)(*arrays, batch_axis=axis, weight_layout=layout, plan=plan))
        swapped = plan.T if layout == "out_in" and function == "weight_grad" else plan
        return {
            "kind": self.kind, "orientation": self.orientation,
            "read": counts.load_sectors * 32 / swapped.loaded_bytes,
            "written": counts.store_sectors * 32 / (plan.rows * plan.cols * ITEM_BYTES[plan.dtype]),
            "wide_loads": counts.wide_loads, "shared_load_degree": counts.shared_load_degree,
            "shared_store_degree": counts.shared_store_degree,
        }


@dataclass(frozen=True)
class Ride:
    """What dL/db adds to the executed instructions of dL/dW of 1024 samples, 1024 x 256: eight tile rows share it."""

    kind: str
    orientation: str

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"db {self.kind} {self.orientation}"

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return [Limit("more_instructions", most=0.02), Limit("shared_load_degree", most=1)]

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute dL/dW with and without dL/db."""
        _, axis, layout = ORIENTATIONS[self.orientation]
        sizes = 1024, 1024, 256
        x, dz = arrays_of(self.kind, self.orientation, *sizes)
        plan = plan_of(self.kind, "weight_grad", *sizes)
        options: dict[str, Any] = {"batch_axis": axis, "weight_layout": layout, "plan": plan}
        alone = total(machine.count(lambda: dg.weight_grad(x, dz, **options)))
        grads = []
        both = total(machine.count(lambda: grads.append(dg.weight_bias_grad(x, dz, **options))))
        exact = reference.bias_grad(dz.get(), batch_axis=axis)
        if not (grads[0].db.get() == exact.astype(dtype_of(plan.dtype))).all():
            raise SystemExit(f"{self.name}: the sums are wrong")
        return {"kind": self.kind, "orientation": self.orientation, "instructions": alone.warp_instructions,
                "more_instructions": both.warp_instructions / alone.warp_instructions - 1,
                "shared_load_degree": both.shared_load_degree}


@dataclass(frozen=True)
class RideLoop:
    """The main loops of dL/dW with dL/db as linked: that of the blocks that add dZ up, and that of the others."""

    kind: str
    orientation: str
    capability: str

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"db loop {self.kind} {self.orientation} {self.capability}"

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return [Limit("more_in_others", most=0.02), Limit("percent_peak", LEAST_PEAK[self.capability]),
                Limit("local_instructions", most=0), Limit("stack_bytes", most=0)]

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Link both kernels, and compare the loops that copy tiles; the peak is that of the loop that adds."""
        _, axis, layout = ORIENTATIONS[self.orientation]
        sizes = 64, 128, 256
        x, dz = arrays_of(self.kind, self.orientation, *sizes)
        plan = plan_of(self.kind, "weight_grad", *sizes)
        options: dict[str, Any] = {"batch_axis": axis, "weight_layout": layout, "plan": plan}
        (alone,) = machine.count(lambda: dg.weight_grad(x, dz, **options))
        both, *_ = machine.count(lambda: dg.weight_bias_grad(x, dz, **options))
        code = machine.code(both, self.capability)
        without = machine.code(alone, self.capability).loop_instructions
        others, adding = sorted(loop.analysis["instructions"] for loop in code.report.loops
                                if loop.analysis["mma_share"] and loop.analysis["load_to_use"].get("cp_async"))
        return {"kind": self.kind, "orientation": self.orientation, "capability": self.capability,
                "registers": code.registers, "local_instructions": code.local_instructions,
                "stack_bytes": code.stack_bytes, "loop_instructions": without, "loop_of_others": others,
                "loop_that_adds": adding, "more_in_others": others / without - 1,
                "percent_peak": code.percent_peak}


DATA = {
    "normal": lambda draw, shape: draw.standard_normal(shape),
    "positive": lambda draw, shape: np.abs(draw.standard_normal(shape)),
    "badly scaled": lambda draw, shape: draw.standard_normal(shape) * 10.0 ** draw.uniform(-4, 4, shape),
}


@dataclass(frozen=True)
class Accuracy:
    """The error of dL/dW against float64, over the sum of the products' magnitudes: 32 x 32 sums of `samples`."""

    kind: str
    samples: int
    data: str

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"accuracy {self.kind} {self.samples} {self.data}"

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold: the plan's bound and, where float32's accuracy is promised, four times float32's error."""
        same = [Limit("worst_over_ieee", most=4)] if self.kind == "tf32x3" else []
        return [Limit("share_of_bound", most=1), *same]

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute it, into float32."""
        import cupy

        dtype, precision = KINDS.get(self.kind, ("float32", "ieee"))
        draw = np.random.default_rng(7)
        x, dz = (DATA[self.data](draw, (self.samples, 32)).astype(dtype_of(dtype)) for _ in range(2))
        magnitude = np.abs(x.astype(np.float64)).T @ np.abs(dz.astype(np.float64))

        def errors(**options: Any) -> np.ndarray:
            out = cupy.zeros((32, 32), "float32")
            machine.count(lambda: dg.weight_grad(cupy.asarray(x), cupy.asarray(dz), out=out, **options))
            return np.abs(out.get() - reference.weight_grad(x, dz)) / magnitude

        found, plan = errors(precision=precision), dg.plans.plan_product(32, 32, self.samples, dtype, precision, (8, 0))
        bound = (plan.chain + 2) * 2.0 ** -24 + getattr(plan, "product_error", 0.0)
        values = {"kind": self.kind, "samples": self.samples, "data": self.data, "worst_error": f"{found.max():.1e}",
                  "mean_error": f"{found.mean():.1e}", "share_of_bound": found.max() / bound}
        if self.kind == "tf32x3":
            ieee = errors(plan=plan_matmul(32, 32, self.samples, dtype))
            values["worst_over_ieee"] = found.max() / ieee.max()
        return values


def rows() -> list[Any]:
    """The table of what must hold."""
    table: list[Any] = [Loop(kind, orientation, capability) for kind in KINDS
                        for orientation in ("dW", "dW, dZ features first", "dX", "dX, dZ features first")
                        for capability in (("8.0", "8.6", "8.9", "9.0") if kind in NEWER else ("7.5",))]
    table += [Memory(kind, orientation) for kind in KINDS for orientation in ORIENTATIONS]
    table += [Ride(kind, orientation) for kind in KINDS for orientation in ORIENTATIONS if orientation.startswith("dW")]
    table += [RideLoop(kind, orientation, capability) for kind in NEWER for orientation in ORIENTATIONS
              if orientation.startswith("dW") for capability in ("8.0", "9.0")]
    table += [Accuracy(kind, samples, data) for samples in (1024, 32768) for data in DATA for kind in ("ieee", *NEWER)]
    return table


README = [
    Shown("dL/dW and dL/dX on tensor cores: main loops as linked",
          (("kind", "products of", ""), ("orientation", "gradient", ""), ("capability", "compute capability", ""),
           ("registers", "registers", ""), ("loop_instructions", "instructions", ""),
           ("mma_share", "of them mma", ".3f"),
           ("percent_peak", "% of the tensor rate, modelled", ".0f")),
          (*(f"loop {kind} {orientation} {capability}" for kind in ("bfloat16", "tf32", "tf32x3")
             for orientation in ("dW", "dX") for capability in ("8.0", "9.0")),
           *(f"loop float16k8 {orientation} 7.5" for orientation in ("dW", "dX"))),
          "No spills in any. float16k8 is float16 with the instructions of compute capability 7.5. mma.sync, which "
          "these kernels use, reaches 63 % of an H100's tensor rate by the model."),
    Shown("Accuracy of dL/dW (D = M = 32, into float32): the error over the sum of the products' magnitudes, executed "
          "PTX against float64",
          (("kind", "products of", ""), ("samples", "S", ""), ("data", "data", ""), ("worst_error", "worst", ""),
           ("mean_error", "mean", "")),
          tuple(f"accuracy {kind} {samples} {data}"
                for samples in (1024, 32768) for data in DATA for kind in ("ieee", *NEWER)),
          "ieee is float32 on FMA units. A tensor core of silicon rounds sums in its own way, which the executed PTX "
          "does not show: each instruction's sum is exact there and rounded once."),
]
