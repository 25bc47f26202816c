"""Products of which one operand is thin: how often memory is read, and whether its rate sets the time.

A layer is cut to two tiles and one part of its plan, of which all are alike.
"""
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import densegrad as dg
from benchmarks.counting import Limit, Rehearsed, Shown, total
from densegrad.device import dtype_of
from densegrad.families.cost import BYTES_A_MICROSECOND, MULTIPROCESSORS, ORDERS
from densegrad.plans import ITEM_BYTES, THIN, ThinPlan, plan_thin
from densegrad.testing import host

#: instructions of a warp that an H200 issues in a microsecond: four a cycle of each multiprocessor, at 1.9 GHz
WARPS_A_MICROSECOND = MULTIPROCESSORS * 4 * 1900

README = [Shown(
    "Products of which one operand is thin: what is read, and instructions",
    (("product", "result", ""), ("layer", "S, D, M", ""), ("dtype", "dtype", ""), ("blocks", "blocks", ""),
     ("parts", "parts", ""), ("read", "sectors read over the other operand's", ".2f"),
     ("instructions", "instructions an element", ".1f"), ("issue_us", "issue, us", ".1f"),
     ("memory_us", "memory, us", ".1f"), ("model_us", "in all, us", ".1f")),
    ("dL/dW 16384, 1024, 1 float32", "dL/dW, dL/db 16384, 1, 1024 float32", "dL/dX 1, 4096, 4096 float32",
     "dL/dX 8, 50257, 768 float32", "dL/dW 65536, 1024, 8 float32", "dL/dW 16384, 1024, 1 bfloat16"),
    "What is read beyond 1 is the thin operand, from cache. Microseconds are *modelled* for an H200: what its issue "
    "slots and its memory take, and the nominal model of the plan. Not measured.",
)]


@dataclass(frozen=True)
class Thin:
    """A product of one layer, of which an operand is thin."""

    function: str
    samples: int
    inputs: int
    outputs: int
    dtype: str
    most_read: float

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.product} {self.layer} {self.dtype}"

    @property
    def product(self) -> str:
        """What is computed."""
        return {"weight_grad": "dL/dW", "weight_bias_grad": "dL/dW, dL/db", "input_grad": "dL/dX"}[self.function]

    @property
    def layer(self) -> str:
        """Its sizes."""
        return f"{self.samples}, {self.inputs}, {self.outputs}"

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold: the other operand is read once, and its bytes set the time, not the instructions."""
        return (Limit("read", most=self.most_read), Limit("issue_over_memory", most=0.9),
                Limit("shared_load_degree", most=1.05), Limit("local_instructions", most=0))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute one tile, and check the result, which is exact for small integers."""
        import cupy

        of_input = self.function == "input_grad"
        sizes = ((self.samples, self.inputs, self.outputs) if of_input else (self.inputs, self.outputs, self.samples))
        order = ORDERS[of_input]
        whole = plan_thin(*sizes, self.dtype, order)
        part = cut_of(whole)
        draw = np.random.default_rng(0)
        shapes = (((part.rows, part.depth), (part.cols, part.depth)) if of_input
                  else ((part.depth, part.rows), (part.depth, part.cols)))
        arrays = [cupy.asarray(draw.integers(-1, 2, shape).astype(dtype_of(self.dtype))) for shape in shapes]
        results = []
        counts = total(machine.count(lambda: results.append(getattr(dg, self.function)(*arrays, plan=part))))
        left, right = (np.asarray(host(array), float) for array in arrays)
        wanted = left @ right.T if of_input else left.T @ right
        found = results[0].dw if self.function == "weight_bias_grad" else results[0]
        if not (np.asarray(host(found), float) == wanted.astype(dtype_of(self.dtype)).astype(float)).all():
            raise SystemExit(f"{self.name}: the result is wrong")
        other = part.depth * max(part.rows, part.cols)
        share = whole.depth * max(whole.rows, whole.cols) / other
        issue, memory = counts.warp_instructions * share / WARPS_A_MICROSECOND, (
            whole.depth * (whole.rows + whole.cols) + whole.rows * whole.cols) * ITEM_BYTES[self.dtype] / (
                BYTES_A_MICROSECOND)
        code = machine.code(counts, "9.0")
        return {
            "product": self.product, "layer": self.layer, "dtype": self.dtype,
            "cut": f"{part.rows}x{part.cols}x{part.depth}", "kernels": counts.kernel,
            "threads": f"{whole.threads_across}x{whole.threads_along}", "blocks": whole.tiles * whole.parts,
            "parts": whole.parts, "read": counts.load_sectors * 32 / (other * ITEM_BYTES[self.dtype]),
            "wide_loads": counts.wide_loads, "instructions": counts.warp_instructions * 32 / other,
            "issue_us": issue, "memory_us": memory, "issue_over_memory": issue / memory,
            "model_us": whole.cost(order).total, "shared_load_degree": counts.shared_load_degree,
            "shared_store_degree": counts.shared_store_degree, "registers": code.registers,
            "local_instructions": code.local_instructions, "resident_threads": code.resident_threads,
        }


def cut_of(plan: ThinPlan) -> ThinPlan:
    """Two tiles of the plan and at most 8 steps of one part."""
    depth = min(plan.depth, plan.depth_per_part, 8 * plan.tile_depth)
    if plan.rows <= THIN:
        return replace(plan, cols=min(plan.cols, 2 * plan.tile_cols), depth=depth, parts=1)
    return replace(plan, rows=min(plan.rows, 2 * plan.tile_rows), depth=depth, parts=1)


def rows() -> list[Thin]:
    """The table of what must hold; what is read beyond 1 is the thin operand."""
    return [
        Thin("weight_grad", 16384, 1024, 1, "float32", 1.13),
        Thin("weight_grad", 65536, 256, 1, "float32", 1.13),
        Thin("weight_bias_grad", 16384, 1, 1024, "float32", 1.13),
        Thin("input_grad", 1, 4096, 4096, "float32", 1.3),
        Thin("input_grad", 16384, 1, 1024, "float32", 1.3),
        Thin("input_grad", 8, 50257, 768, "float32", 1.55),
        Thin("weight_grad", 65536, 1024, 8, "float32", 1.15),
        Thin("weight_bias_grad", 65536, 8, 1024, "float32", 1.15),
        Thin("weight_grad", 1_000_003, 33, 3, "float32", 1.6),
        Thin("weight_grad", 16384, 1024, 1, "bfloat16", 1.13),
        Thin("input_grad", 1, 4096, 4096, "bfloat16", 1.3),
        Thin("weight_grad", 16384, 1024, 1, "float64", 1.13),
        Thin("input_grad", 1, 4096, 4096, "float64", 1.3),
    ]
