"""What plans of matrix products take: microseconds on an H200, by a model that is fitted to measured plans.

A plan's time is a sum of terms that follow from its sizes, each times a coefficient that is not negative. Those of the
main loop and of a wave belong to the tile, the others to the kind of product and the order of its operands. They were
fitted by `python -m benchmarks.fit` and stand in data/plan_costs.json, with the number of rows behind each. What no row
covers is an extrapolation, which the cost calls "not measured". float64 has no rows, on FMA units and on tensor cores:
a nominal model stands in.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

from ..facts import ITEM_BYTES
from .common import ceil_div

#: of the GPU that was measured: its multiprocessors, and what its memory moves in a microsecond
MULTIPROCESSORS, BYTES_A_MICROSECOND = 132, 4.2e6
#: floating-point operations in a microsecond, which no plan of this kind exceeds
FLOPS_A_MICROSECOND = {"float32": 5.2e7, "bfloat16": 5.2e8, "tf32": 2.6e8, "tf32x3": 8.7e7}
#: microseconds of a launch more
LAUNCH = 3.0
#: how the operands lie: both contiguous across the depth, as for dL/dW, or both along it, as for dL/dX
ORDERS = ("across", "along")

#: the terms whose coefficients belong to a tile: its waves' steps along the depth, one wave after the other; the steps
#: shared out evenly over the multiprocessors; and the waves, which start, fill their stages and store
TILE_TERMS = ("steps of waves", "steps shared out", "waves")
#: the others: a thousand accesses that are narrower than 16 bytes, in steps of waves and shared out; ten thousand
#: results stored by a multiprocessor; microseconds in which memory moves the parts, each operand once for every tile
#: that reads it, and every matrix once; a second launch, 16 parts that it adds, and the first launch
SHARED_TERMS = ("narrow accesses of waves", "narrow accesses shared out", "stored", "workspace", "operands by tile",
                "matrices once", "second launch", "parts", "launch")


@dataclass(frozen=True)
class ProductCost:
    """Microseconds that a plan takes: of the main loop, of the rest of its blocks, of memory, and of adding parts."""

    loop: float
    blocks: float
    memory: float
    parts: float
    least: float  # what memory's rate and the arithmetic units' allow at the best
    measured: bool  # whether rows cover this kind, this tile and such a cut
    rows: int  # measured plans that the model was fitted to; 0 of a nominal model
    beyond: bool = False  # whether the depth is cut further than in any row: into more parts, or larger ones in all

    @property
    def total(self) -> float:
        """All of it."""
        return max(self.loop + self.blocks + self.memory + self.parts, self.least)


@lru_cache(maxsize=1)
def fitted() -> dict[str, Any]:
    """The coefficients, by kind and order, and what they were fitted to."""
    return json.loads((Path(__file__).parent.parent / "data" / "plan_costs.json").read_text())


def group_of(plan: Any, order: str) -> dict[str, Any]:
    """The coefficients of a plan's kind, or of what was measured that is next to it.

    float16 is multiplied by the like of bfloat16's instructions, half types on FMA units by those of float32.
    """
    name = {"float16": "bfloat16", "float16k8": "bfloat16"}.get(plan.kind, plan.kind)
    return fitted()["groups"][f"{name}, {order}"]


def tile_name(plan: Any) -> str:
    """A plan's tile, as the table of coefficients names it."""
    return f"{plan.tile_rows} x {plan.tile_cols} x {plan.tile_depth}, {plan.unit[0]} x {plan.unit[1]}"


def cost_of(plan: Any, order: str) -> ProductCost | None:
    """What a plan takes for operands of this order; None if no plan with its tile was measured."""
    if plan.dtype == "float64":
        return _nominal(plan)
    group = group_of(plan, order)
    tile = group["tiles"].get(tile_name(plan))
    if tile is None:
        return None
    own, shared = terms(plan, order, tile["resident"])
    of_tile = [term * coefficient for term, coefficient in zip(own, tile["coefficients"], strict=True)]
    shares = dict(zip(SHARED_TERMS, (term * coefficient for term, coefficient in zip(
        shared, group["coefficients"], strict=True)), strict=True))
    least = max(matrices_bytes(plan) / BYTES_A_MICROSECOND,
                2 * plan.rows * plan.cols * plan.depth / FLOPS_A_MICROSECOND[group["kind"]])
    kept = plan.parts * plan.rows * plan.cols * 4 * (plan.parts > 1)
    beyond = plan.parts > group["most parts"] or kept > group["most workspace"]
    as_measured = plan.kind == group["kind"] and (plan.dtype == "bfloat16") == (plan.kind == "bfloat16")
    return ProductCost(
        of_tile[0] + of_tile[1] + shares["narrow accesses of waves"] + shares["narrow accesses shared out"],
        of_tile[2] + shares["stored"] + shares["launch"], shares["operands by tile"] + shares["matrices once"],
        shares["workspace"] + shares["second launch"] + shares["parts"], least=least,
        measured=as_measured and not beyond, rows=group["rows"], beyond=beyond)


def _nominal(plan: Any) -> ProductCost:
    """A float64 plan on a nominal GPU: 132 multiprocessors, 1.9 GHz, an H100's bytes a cycle. Nothing is measured."""
    warps, each = ceil_div(plan.threads, 32), ceil_div(plan.tiles * plan.parts, MULTIPROCESSORS)
    resident = max(min(each, 65536 // ((plan.sums + 64) * warps * 32), 32), 1)
    steps = ceil_div(min(plan.depth_per_part, max(plan.depth, 1)), plan.tile_depth)

    def wave(blocks: int) -> int:
        """Blocks that share a multiprocessor share its four schedulers, and hide one another's latency of 700 cycles,
        in which all stages but one are filled."""
        return steps * max(plan.step_cycles * ceil_div(warps * blocks, 4), 700 // (plan.stages - 1)) if blocks else 0

    loop, rest = each // resident * wave(resident) + wave(each % resident), 1500 * ceil_div(each, resident)
    moved, workspace = matrices_bytes(plan), 2 * plan.workspace_bytes
    memory = max((moved + workspace) / 15, (plan.loaded_bytes + workspace) / 24) / MULTIPROCESSORS
    parts = 5000 + 175 * plan.parts if plan.parts > 1 else 0
    overlapping = max(memory - loop - rest, 0.0)
    return ProductCost(loop / 1900, rest / 1900, overlapping / 1900, parts / 1900,
                       least=0.0, measured=False, rows=0)


def terms(plan: Any, order: str, resident: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A plan's terms: the tile's and the shared ones; `resident` blocks of it share a multiprocessor."""
    down, across = ceil_div(plan.rows, plan.tile_rows), ceil_div(plan.cols, plan.tile_cols)
    blocks, steps = down * across * plan.parts, ceil_div(ceil_div(plan.depth, plan.parts), plan.tile_depth)
    waves, share = ceil(blocks / (MULTIPROCESSORS * resident)), blocks / MULTIPROCESSORS
    narrow = _narrow_accesses(plan, order) / 1e3
    item, split = ITEM_BYTES[plan.dtype], plan.parts > 1
    by_tile = (plan.rows * across + plan.cols * down) * plan.depth * item
    return (waves * steps, share * steps, waves), (
        waves * steps * narrow, share * steps * narrow, share * plan.tile_rows * plan.tile_cols / 1e4,
        split * 8 * plan.parts * plan.rows * plan.cols / BYTES_A_MICROSECOND, by_tile / BYTES_A_MICROSECOND,
        matrices_bytes(plan) / BYTES_A_MICROSECOND, float(split), split * plan.parts / 16, 1.0)


def matrices_bytes(plan: Any) -> int:
    """The bytes of both operands and the result."""
    return (plan.rows * plan.depth + plan.depth * plan.cols + plan.rows * plan.cols) * ITEM_BYTES[plan.dtype]


def _narrow_accesses(plan: Any, order: str) -> float:
    """How many accesses more than vectors of 16 bytes take a block's tiles of one step."""
    vector = 16 // ITEM_BYTES[plan.dtype]
    lengths = (plan.rows, plan.cols) if order == "across" else (plan.depth, plan.depth)
    widths = [_width(length, vector) for length in lengths]
    return (plan.tile_rows / widths[0] + plan.tile_cols / widths[1] - (plan.tile_rows + plan.tile_cols) / vector
            ) * plan.tile_depth


def _width(length: int, most: int) -> int:
    """Elements of an access to rows of this length."""
    while most > 1 and length % most:
        most //= 2
    return most
