"""The batch sum: what it reads and writes over what it must, and how its threads are used.

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
)]


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
        counts = total(machine.count(
            lambda: results.append(dg.bias_grad(dz, batch_axis=int(self.layout == "features_first"), plan=part))))
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
            "wide_loads": counts.wide_loads,
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


def rows() -> list[Sum]:
    """The table of what must hold."""
    table = []
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
    return table
