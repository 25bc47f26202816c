"""dL/dZ formed below activations and losses while dL/db is summed: what is read and written, and instructions.

Large shapes are cut to one tile of outputs, of which all are alike, with the plan of the whole shape; narrow ones to a
few parts of the batch.
"""
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import densegrad as dg
from benchmarks.counting import Limit, Rehearsed, Shown, total
from densegrad.activations import ACTIVATIONS
from densegrad.device import dtype_of
from densegrad.plans import ITEM_BYTES, plan_upstream

README = [Shown(
    "dL/dZ and dL/db in one pass: sectors read and written over those of one matrix",
    (("shape", "dZ (S, M)", ""), ("dtype", "dtype", ""), ("above", "below", ""), ("read", "read", ".3f"),
     ("written", "written", ".3f"), ("active_lanes", "lanes of 32", ".1f"), ("blocks", "blocks", "")),
    ("(8192, 3072) float32 relu", "(8192, 3072) bfloat16 gelu", "(8192, 3072) float32 weights",
     "(1000003, 10) float32 relu"),
    "Below an activation two matrices must be read and one written: 2 and 1.",
), Shown(
    "dL/dZ and dL/db in bfloat16: instructions an element in the loop of the linked machine code, 9.0",
    (("above", "below", ""), ("instructions", "instructions an element", ".1f"), ("registers", "registers", ""),
     ("resident_threads", "threads a multiprocessor", "")),
    tuple(f"code bfloat16 {name}" for name in ACTIVATIONS),
    "An H200 at 1.9 GHz issues 52 of them while DRAM moves an element of three matrices of bfloat16 (*modelled*).",
)]
#: instructions an element that a bfloat16 kernel may take at the most
MOST = {"gelu": 45, "gelu_tanh": 40, "silu": 36, "relu": 12}


@dataclass(frozen=True)
class Formed:
    """activation_grad or cross_entropy_grad of one shape."""

    samples: int
    outputs: int
    dtype: str
    above: Any  # an activation, "weights" alone, or "cross_entropy"
    batch_axis: int = 0
    must: tuple[Limit, ...] = ()

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"({self.samples}, {self.outputs}) {self.dtype} {self.above}{' features_first' * self.batch_axis}"

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return (*self.must, Limit("shared_load_degree", most=1.05), Limit("shared_store_degree", most=1.05))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute it, and check that db is the sum of dz."""
        import cupy

        activation: Any = "identity" if self.above == "weights" else self.above
        plan = plan_upstream(self.samples, self.outputs, self.dtype, "features_first" if self.batch_axis else "flat",
                             activation)
        whole = plan.sum
        if plan.features_first:
            part = replace(whole, outputs=min(self.outputs, whole.runs_per_block))
        elif self.outputs > whole.tile:
            part = replace(whole, outputs=whole.tile)
        else:
            part = replace(whole, samples=min(self.samples, 8 * whole.samples_per_part))
        plan = replace(plan, sum=part)
        shape = (part.outputs, part.samples) if self.batch_axis else (part.samples, part.outputs)
        draw = np.random.default_rng(0)
        above, z = (cupy.asarray(draw.integers(-2, 3, shape).astype(dtype_of(self.dtype))) for _ in range(2))
        weights = cupy.asarray(np.ones(part.samples, "float32")) if self.above == "weights" else None
        labels = cupy.asarray(draw.integers(0, part.outputs, part.samples))
        results = []

        def call() -> None:
            if self.above == "cross_entropy":
                results.append(dg.cross_entropy_grad(z, labels, batch_axis=self.batch_axis, plan=plan))
            else:
                given = None if activation == "identity" else z
                results.append(dg.activation_grad(above, given, activation, sample_weight=weights,
                                                  batch_axis=self.batch_axis, plan=plan))

        counts = total(machine.count(call))
        dz, db = (np.asarray(result.get(), float) for result in results[0])
        if np.abs(dz.sum(axis=self.batch_axis) - db).max() > 2.0 ** -8 * np.abs(dz).sum(axis=self.batch_axis).max():
            raise SystemExit(f"{self.name}: db is not the sum of dz")
        matrix = part.samples * part.outputs * ITEM_BYTES[self.dtype] / 32
        return {
            "shape": f"{self.samples}x{self.outputs}", "dtype": self.dtype, "above": self.above, "layout": whole.layout,
            "cut": "" if part == whole else f"{part.samples}x{part.outputs}", "kernels": counts.kernel,
            "blocks": whole.grid[0] * whole.grid[1], "threads": whole.threads,
            "wide_loads": counts.wide_loads, "read": counts.load_sectors / matrix,
            "written": counts.store_sectors / matrix,
            "moved": (counts.load_sectors + counts.store_sectors) / matrix, "active_lanes": counts.active_lanes,
            "shared_load_degree": counts.shared_load_degree, "shared_store_degree": counts.shared_store_degree,
        }


@dataclass(frozen=True)
class MachineCode:
    """The bfloat16 kernel below an activation, all that is wide, as linked for 9.0."""

    above: Any

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"code bfloat16 {self.above}"

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return (Limit("instructions", most=MOST.get(self.above, 52)), Limit("local_instructions", most=0),
                Limit("stack_bytes", most=0))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Launch it on as little as is wide, for the linker to see it, and judge what was linked."""
        import cupy

        plan = plan_upstream(8192, 3072, "bfloat16", "rows", self.above)
        part = replace(plan.sum, samples=plan.sum.lanes, samples_per_part=plan.sum.lanes, outputs=plan.sum.tile)
        da, z = (cupy.asarray(np.ones((part.samples, part.outputs), dtype_of("bfloat16"))) for _ in range(2))
        given = None if self.above == "identity" else z
        counts = machine.count(lambda: dg.activation_grad(da, given, self.above, plan=replace(plan, sum=part)))[0]
        code = machine.code(counts, "9.0")
        return {
            "dtype": "bfloat16", "above": self.above, "capability": "9.0", "kernels": counts.kernel,
            "threads": plan.threads, "instructions": code.loop_instructions / plan.elements,
            "registers": code.registers, "local_instructions": code.local_instructions, "stack_bytes": code.stack_bytes,
            "resident_threads": code.resident_threads,
        }


def rows() -> list[Formed | MachineCode]:
    """The table of what must hold: below an activation, two matrices read and one written, within 2 %."""
    table: list[Formed | MachineCode] = [
        Formed(8192, 3072, dtype, above, axis, (Limit("moved", most=3.06),))
        for dtype, above, axis in (("float32", "relu", 0), ("float32", "gelu", 0), ("bfloat16", "gelu", 0),
                                   ("float16", "relu", 0), ("float64", "tanh", 0), ("float32", "relu", 1))]
    table += [Formed(8192, 3072, "float32", above, axis)
              for above, axis in (("weights", 0), ("weights", 1), ("cross_entropy", 1))]
    table += [Formed(1_000_003, outputs, "float32", "relu", axis) for outputs in (1, 3, 10, 33) for axis in (0, 1)]
    return table + [MachineCode(name) for name in ACTIVATIONS]
