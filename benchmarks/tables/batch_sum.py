"""The batch sum: what it reads and writes over what it must, how its threads are used, and what its machine code needs.

Large shapes are cut to what can be executed in minutes, with the plan of the whole shape: fewer tiles of columns, or
fewer parts of the batch, which are equal pieces of work. `cut` says to what. Cut shapes have relatively more seams and
edges and a relatively longer second launch than the whole ones.
"""
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import densegrad as dg
from benchmarks.counting import Limit, Rehearsed, Shown, total
from densegrad.device import dtype_of
from densegrad.plans import ITEM_BYTES, BatchSumPlan, plan_batch_sum

ELEMENTS = 3_000_000  # that a row executes, about

README = [Shown(
    "dL/db: 32-byte sectors read over the fewest that hold dZ, those written over those read",
    (("shape", "dZ (S, M)", ""), ("dtype", "dtype", ""), ("layout", "memory", ""), ("offset", "elements before it", ""),
     ("pad", "between rows", ""), ("read", "read", ".3f"), ("written", "written", ".3f"),
     ("active_lanes", "lanes of 32", ".1f"), ("blocks", "blocks", "")),
    ("(8192, 3072) float16 rows", "(65536, 1024) bfloat16 features_first", "(65536, 1024) float32 rows",
     "(65536, 1024) float32 rows offset 1", "(65536, 1024) float32 rows stride +1", "(1000003, 1) float32 flat",
     "(1000003, 10) float32 flat", "(1000003, 33) float32 features_first", "(1, 1000003) float32 rows",
     "(33, 50257) float32 rows"),
    "Large shapes are cut to what can be executed, where every figure is proportional; the column `cut` of the file "
    "says to what.",
), Shown(
    "dL/db: the linked machine code; DRAM is the share of its rate that the bytes in flight can reach, *modelled*",
    (("shape", "dZ (S, M)", ""), ("dtype", "dtype", ""), ("layout", "memory", ""), ("sums", "sums", ""),
     ("capability", "capability", ""), ("registers", "registers", ""), ("local_instructions", "spills", ""),
     ("resident_threads", "threads a multiprocessor", ""), ("waves", "waves", ".2f"),
     ("percent_dram", "DRAM %", ".0f")),
    tuple(f"code {kind}, {capability}" for kind in (
        "(8192, 3072) float32 rows", "(8192, 3072) bfloat16 rows", "(8192, 3072) float32 rows compensated",
        "(8192, 3072) float32 features_first", "(1000003, 10) float32 flat") for capability in ("8.0", "9.0")),
    "A wave is what 108 multiprocessors of an 8.0 or 132 of a 9.0 hold at once.",
)]

#: compute capabilities whose machine code is judged -> multiprocessors of the GPU that waves are told for
CAPABILITIES = {"8.0": 108, "9.0": 132, "10.0": 148}


@dataclass(frozen=True)
class Sum:
    """bias_grad of one shape, and where its memory begins."""

    samples: int
    outputs: int
    dtype: str = "float32"
    layout: str = "flat"
    offset: int = 0  # elements before the first
    pad: int = 0  # elements between rows
    must: tuple[Limit, ...] = (Limit("read", most=1.05),)

    @property
    def name(self) -> str:
        """As the table shows it."""
        where = f" offset {self.offset}" if self.offset else f" stride +{self.pad}" if self.pad else ""
        return f"({self.samples}, {self.outputs}) {self.dtype} {self.layout}{where}"

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return (*self.must, Limit("shared_load_degree", most=1.05), Limit("shared_store_degree", most=1.05))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute it, and check the sums."""
        import cupy

        plan = plan_batch_sum(self.samples, self.outputs, self.dtype, self.layout)
        part = self._cut(plan)
        lines, length = part.samples, part.outputs
        if self.layout == "features_first":
            lines, length = length, lines
        pitch = length + self.pad
        if self.layout == "features_first" and part.samples < self.samples:
            pitch += (self.samples - length) % 8  # neighbours begin as far from 32 bytes as in the whole shape
        memory = cupy.asarray(np.ones(self.offset + lines * pitch, dtype_of(self.dtype)))
        dz = memory[self.offset:self.offset + lines * pitch].reshape(lines, pitch)[:, :length]
        results = []
        of_each = machine.count(
            lambda: results.append(dg.bias_grad(dz, batch_axis=int(self.layout == "features_first"), plan=part)))
        counts = total(of_each)
        with np.errstate(over="ignore"):
            expected = np.float32(part.samples).astype(dtype_of(self.dtype))
        if not (results[0].get() == expected).all():
            raise SystemExit(f"{self.name}: the sums are wrong")
        item = ITEM_BYTES[self.dtype]
        return {
            "shape": f"{self.samples}x{self.outputs}", "dtype": self.dtype, "layout": plan.layout,
            "offset": self.offset, "pad": self.pad, "cut": "" if part == plan else f"{part.samples}x{part.outputs}",
            "kernels": counts.kernel, "blocks": plan.grid[0] * plan.grid[1], "threads": plan.threads,
            "workspace_share": plan.workspace_bytes / (self.samples * self.outputs * item),
            "wide_loads": of_each[0].wide_loads,  # of dZ
            "read": counts.load_sectors / (part.samples * part.outputs * item / 32),
            "written": counts.store_sectors / counts.load_sectors,
            "active_lanes": counts.active_lanes,
            "shared_load_degree": counts.shared_load_degree, "shared_store_degree": counts.shared_store_degree,
        }

    def _cut(self, plan: BatchSumPlan) -> BatchSumPlan:
        """The plan for as much of the shape as is executed."""
        if self.samples * self.outputs <= ELEMENTS:
            return plan
        if self.offset or self.pad or plan.layout == "flat" or (plan.layout == "features_first" and plan.parts > 1):
            # Rows that are shifted have edges: they stay whole.
            parts = max(1, ELEMENTS // (plan.samples_per_part * self.outputs))
            outputs = min(self.outputs, max(1, ELEMENTS // plan.samples_per_part))
            return replace(plan, samples=min(self.samples, parts * plan.samples_per_part + 3),
                           outputs=outputs if plan.layout == "features_first" else self.outputs)
        unit = plan.tile if plan.layout == "rows" else plan.runs_per_block
        return replace(plan, outputs=min(self.outputs, max(1, ELEMENTS // self.samples // unit) * unit))


@dataclass(frozen=True)
class MachineCode:
    """The kernel that reads dZ by a plan, or the one that adds its parts, as linked for one capability."""

    plan: BatchSumPlan
    capability: str
    large: bool = False  # of a shape that has to fill a GPU
    of_parts: bool = False

    @property
    def name(self) -> str:
        """As the table shows it."""
        plan = self.plan
        return (f"{'parts' if self.of_parts else 'code'} ({plan.samples}, {plan.outputs}) {plan.dtype} {plan.layout}"
                f"{' compensated' * plan.compensated}, {self.capability}")

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        must = [Limit("local_instructions", most=0), Limit("stack_bytes", most=0)]
        if self.of_parts:
            return must
        must.append(Limit("percent_dram", least=95))
        if self.large and self.capability in ("8.0", "9.0"):
            must.append(Limit("waves", most=1))
            if self.plan.dtype != "float64" and not self.plan.compensated:
                must.append(Limit("resident_threads", least=1536))
        return must

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Launch it on as little as has everything in it, for the linker to see it, and judge what was linked."""
        import cupy

        plan = self.plan
        step = plan.lanes if plan.layout == "rows" else plan.tile // plan.period
        parts = min(plan.parts, 2)
        outputs = {"rows": min(plan.outputs, plan.tile), "flat": plan.outputs, "features_first": plan.runs_per_block}
        part = replace(plan, samples=step * parts if parts > 1 else min(step, plan.samples), samples_per_part=step,
                       outputs=outputs[plan.layout])
        across = int(plan.layout == "features_first")
        shape = (part.outputs, part.samples) if across else (part.samples, part.outputs)
        dz = cupy.asarray(np.ones(shape, dtype_of(plan.dtype)))
        counts = machine.count(lambda: dg.bias_grad(dz, batch_axis=across, plan=part))[self.of_parts]
        code = machine.code(counts, self.capability)
        if self.of_parts:
            return {
                "shape": f"{plan.samples}x{plan.outputs}", "dtype": plan.dtype, "layout": plan.layout,
                "sums": "compensated" if plan.compensated else "plain", "capability": self.capability,
                "kernels": counts.kernel, "registers": code.registers, "local_instructions": code.local_instructions,
                "stack_bytes": code.stack_bytes,
            }
        resident = code.blocks_per_multiprocessor * -(-plan.threads // 32) * 32
        return {
            "shape": f"{plan.samples}x{plan.outputs}", "dtype": plan.dtype, "layout": plan.layout,
            "sums": "compensated" if plan.compensated else "plain", "capability": self.capability,
            "kernels": counts.kernel, "blocks": plan.grid[0] * plan.grid[1], "threads": plan.threads,
            "registers": code.registers, "local_instructions": code.local_instructions, "stack_bytes": code.stack_bytes,
            "resident_threads": resident,
            "waves": plan.grid[0] * plan.grid[1] / (code.blocks_per_multiprocessor * CAPABILITIES[self.capability]),
            "percent_dram": code.percent_dram,
        }


def machine_code() -> list[MachineCode]:
    """Every variant: layouts, types, plain and compensated, few rows, narrow, and what adds the parts."""
    table = []
    for dtype in ITEM_BYTES:
        large = [plan_batch_sum(samples, outputs, dtype, layout, compensated) for layout in ("rows", "features_first")
                 for samples, outputs, compensated in ((8192, 3072, False), (65536, 1024, False), (8192, 3072, True))]
        small = [plan_batch_sum(samples, outputs, dtype, layout, compensated)
                 for samples, outputs, layout, compensated in (
                     (1_000_003, 1, "flat", False), (1_000_003, 10, "flat", False), (1_000_003, 10, "flat", True),
                     (1_000_003, 33, "flat", False), (33, 50257, "rows", False), (33, 50257, "rows", True))]
        in_parts = [plan_batch_sum(1_000_003, 10, dtype, "flat", compensated) for compensated in (False, True)]
        for capability in CAPABILITIES:
            table += [MachineCode(plan, capability, large=True) for plan in large]
            table += [MachineCode(plan, capability) for plan in small]
            table += [MachineCode(plan, capability, of_parts=True) for plan in in_parts]
    return table


def rows() -> list[Sum | MachineCode]:
    """The table of what must hold."""
    table: list[Sum | MachineCode] = []
    aligned = Limit("read", most=1.01), Limit("written", most=0.01), Limit("wide_loads", least=1)
    for samples, outputs in ((8192, 3072), (65536, 1024)):
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            table += [Sum(samples, outputs, dtype, layout, must=aligned) for layout in ("rows", "features_first")]
            table += [Sum(samples, outputs, dtype, "rows", offset, pad, must=(Limit("read", most=1.30),))
                      for offset, pad in ((1, 0), (0, 1))]
    narrow = Limit("read", most=1.05), Limit("active_lanes", least=28), Limit("blocks", least=264)
    for outputs in (1, 2, 3, 5, 10, 17, 33, 100):
        table += [Sum(1_000_003, outputs, layout=layout, must=narrow) for layout in ("flat", "features_first")]
    table += [Sum(samples, outputs, layout="rows") for samples, outputs in ((1, 1_000_003), (7, 4096), (33, 50257))]
    return table + machine_code()
