"""dL/dW, dL/db and dL/dX of float64 on tensor cores: the bits of FMA units, main loops as linked, and memory.

The rate that a main loop is held to is that of float64's mma, 64 multiply-adds a cycle of an A100's multiprocessor and
128 of an H100's. On an H100 m16n8k4, m16n8k8 and m16n8k16 reached 65 to 66.5 of its 67 TFLOP/s, m8n8k4 33.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import densegrad as dg
from benchmarks.counting import Limit, Rehearsed, Shown
from benchmarks.tables.tensor_core import ORIENTATIONS
from densegrad.plans import (
    FLOAT64_CAPABILITIES,
    ITEM_BYTES,
    TENSOR_CORE_TILES,
    MatmulPlan,
    TensorCorePlan,
    plan_of_tile,
)
from densegrad.testing import bits

CAPABILITIES = tuple("{}.{}".format(*one) for one in FLOAT64_CAPABILITIES)
#: the largest tile
TILE = TENSOR_CORE_TILES[2]


def sizes_of(function: str, samples: int, in_features: int, out_features: int) -> tuple[int, int, int]:
    """(rows, cols, depth)"""
    return (samples, in_features, out_features) if function == "input_grad" else (in_features, out_features, samples)


def plan_of(function: str, capability: str, *sizes: int, tile: tuple[int, int, int, int, int] = TILE,
            parts: int = 1) -> TensorCorePlan:
    """With this capability's instructions."""
    return plan_of_tile(*sizes_of(function, *sizes), "float64", None, tile, parts=parts,
                        capability=FLOAT64_CAPABILITIES[CAPABILITIES.index(capability)])


def arrays_of(orientation: str, samples: int, in_features: int, out_features: int) -> tuple[Any, ...]:
    """What the orientation's function takes, on the device: numbers of every magnitude, zeros and infinities."""
    import cupy

    function, axis, layout = ORIENTATIONS[orientation]
    draw = np.random.default_rng(1)

    def drawn(rows: int, cols: int) -> np.ndarray:
        values = np.ldexp(draw.uniform(-2, 2, (rows, cols)), draw.integers(-1080, 500, (rows, cols)))
        values[draw.random((rows, cols)) < 0.05] = -0.0
        values[rows // 2, cols // 3] = np.inf
        return values

    x, w, dz = drawn(samples, in_features), drawn(in_features, out_features), drawn(samples, out_features)
    dz, w = dz.T if axis else dz, w.T if layout == "out_in" else w
    arrays = (x, dz) if function == "weight_grad" else (dz, w)
    return tuple(cupy.asarray(np.ascontiguousarray(array)) for array in arrays)


def percent_of_rate(loop: Mapping[str, Any]) -> float:
    """The share of the rate of float64's mma that a loop leaves attainable, by the busiest other resource.

    The general model has all of mma.sync reach 63 % of an H100's rate, which is what half types were seen to do.
    """
    useful = loop["percent_peak"] / 100 * max(loop["cycles"].values())
    return 100 * min(1.0, useful / max(cycles for name, cycles in loop["cycles"].items() if name != "tensor"))


@dataclass(frozen=True)
class EqualBits:
    """dL/dW with dL/db, or dL/dX, by either kernel in the same two parts."""

    orientation: str
    capability: str

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"bits {self.orientation} {self.capability}"

    limits = (Limit("other_bits", most=0), Limit("other_nan", most=0))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute both."""
        function, axis, layout = ORIENTATIONS[self.orientation]
        function = {"weight_grad": "weight_bias_grad"}.get(function, function)
        sizes = 45, 42, 40
        arrays = arrays_of(self.orientation, *sizes)
        tensor = plan_of(function, self.capability, *sizes, tile=TENSOR_CORE_TILES[-1], parts=2)
        fused = MatmulPlan(*sizes_of(function, *sizes), "float64", tile_rows=32, tile_cols=32, tile_depth=8,
                           thread_rows=4, thread_cols=4, parts=2)
        found = []
        for plan in (tensor, fused):
            result = getattr(dg, function)(*arrays, batch_axis=axis, weight_layout=layout, plan=plan)
            one = [result] if function == "input_grad" else [*result]
            found.append(np.concatenate([array.get().ravel() for array in one]))
        nan = [np.isnan(values) for values in found]
        numbers = ~(nan[0] | nan[1])
        return {"orientation": self.orientation, "capability": self.capability, "results": len(numbers),
                "not_finite": int((~np.isfinite(found[0])).sum()), "other_nan": int((nan[0] != nan[1]).sum()),
                "other_bits": int((bits(found[0])[numbers] != bits(found[1])[numbers]).sum())}


@dataclass(frozen=True)
class Loop:
    """The main loop of one kernel, as linked: that of dL/dW with dL/db, or of dL/dX."""

    orientation: str
    capability: str
    tile: tuple[int, int, int, int, int] = TILE

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"loop {self.orientation} {'x'.join(map(str, self.tile[:4]))} {self.capability}"

    limits = (Limit("percent_of_rate", least=95), Limit("local_instructions", most=0), Limit("stack_bytes", most=0))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Link it, and judge the machine code."""
        function, axis, layout = ORIENTATIONS[self.orientation]
        function = {"weight_grad": "weight_bias_grad"}.get(function, function)
        sizes = 8, 16, 16
        arrays = arrays_of(self.orientation, *sizes)
        plan = plan_of(function, self.capability, *sizes, tile=self.tile)
        counts, *_ = machine.count(
            lambda: getattr(dg, function)(*arrays, batch_axis=axis, weight_layout=layout, plan=plan))
        code = machine.code(counts, self.capability)
        return {
            "orientation": self.orientation, "capability": self.capability, "stages": plan.stages,
            "tile": "x".join(map(str, self.tile[:2])), "warp": "x".join(map(str, self.tile[2:4])),
            "registers": code.registers, "shared_bytes": counts.shared_bytes,
            "local_instructions": code.local_instructions, "stack_bytes": code.stack_bytes,
            "blocks_per_multiprocessor": code.blocks_per_multiprocessor, "loop_instructions": code.loop_instructions,
            "mma_share": code.mma_share, "load_to_use": code.load_to_use,
            "percent_of_rate": percent_of_rate(code.report.main),
        }


@dataclass(frozen=True)
class Memory:
    """What one function reads and writes for a tile, 16 deep."""

    orientation: str

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"memory {self.orientation}"

    limits = (Limit("read", 1, 1), Limit("written", 1, 1), Limit("wide_loads", 1), Limit("shared_load_degree", most=1),
              Limit("shared_store_degree", most=1))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute it."""
        function, axis, layout = ORIENTATIONS[self.orientation]
        sizes = (128, 128, 16) if function == "input_grad" else (16, 128, 128)
        arrays = arrays_of(self.orientation, *sizes)
        plan = plan_of(function, CAPABILITIES[0], *sizes)
        (counts,) = machine.count(
            lambda: getattr(dg, function)(*arrays, batch_axis=axis, weight_layout=layout, plan=plan))
        return {
            "orientation": self.orientation, "read": counts.load_sectors * 32 / plan.loaded_bytes,
            "written": counts.store_sectors * 32 / (plan.rows * plan.cols * ITEM_BYTES[plan.dtype]),
            "wide_loads": counts.wide_loads, "shared_load_degree": counts.shared_load_degree,
            "shared_store_degree": counts.shared_store_degree,
        }


@dataclass(frozen=True)
class Ride:
    """The main loops of dL/dW with dL/db as linked: that of the blocks that add dZ up, and that of the others."""

    orientation: str
    capability: str

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"db {self.orientation} {self.capability}"

    limits = (Limit("percent_of_rate", least=95),)

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Link both kernels, and compare the loops that copy tiles; the rate is that of the slower one.

        Instructions take no time beside mma here: of the slots in which they issue, a third are in use.
        """
        _, axis, layout = ORIENTATIONS[self.orientation]
        sizes = 8, 16, 16
        x, dz = arrays_of(self.orientation, *sizes)
        plan = plan_of("weight_grad", self.capability, *sizes)
        options: dict[str, Any] = {"batch_axis": axis, "weight_layout": layout, "plan": plan}
        (alone,) = machine.count(lambda: dg.weight_grad(x, dz, **options))
        both, *_ = machine.count(lambda: dg.weight_bias_grad(x, dz, **options))
        without = machine.code(alone, self.capability).loop_instructions
        loops = [loop.analysis for loop in machine.code(both, self.capability).report.loops
                 if loop.analysis["mma_share"] and loop.analysis["load_to_use"].get("cp_async")]
        others, adding = sorted(loops, key=lambda loop: loop["instructions"])
        return {"orientation": self.orientation, "capability": self.capability, "loop_instructions": without,
                "loop_of_others": others["instructions"], "loop_that_adds": adding["instructions"],
                "more_in_others": others["instructions"] / without - 1,
                "percent_of_rate": min(map(percent_of_rate, loops))}


def rows() -> list[Any]:
    """The table of what must hold."""
    table: list[Any] = [EqualBits(orientation, capability) for orientation in ORIENTATIONS
                        for capability in CAPABILITIES]
    table += [Loop(orientation, capability) for orientation in ORIENTATIONS for capability in CAPABILITIES]
    table += [Loop(orientation, capability, tile) for tile in TENSOR_CORE_TILES[3:] for orientation in ("dW", "dX")
              for capability in CAPABILITIES]
    table += [Memory(orientation) for orientation in ORIENTATIONS]
    return [*table, *(Ride(orientation, capability) for orientation in ORIENTATIONS if orientation.startswith("dW")
                      for capability in CAPABILITIES)]


README = [
    Shown("dL/dW with dL/db, and dL/dX, in float64 on tensor cores: main loops as linked",
          (("orientation", "gradient", ""), ("tile", "tile", ""), ("capability", "compute capability", ""),
           ("registers", "registers", ""), ("loop_instructions", "instructions", ""),
           ("mma_share", "of them mma", ".3f"), ("percent_of_rate", "% of float64's mma rate, modelled", ".0f")),
          tuple(f"loop {orientation} {'x'.join(map(str, tile[:4]))} {capability}"
                for tile in (TENSOR_CORE_TILES[2], TENSOR_CORE_TILES[4]) for orientation in ("dW", "dX")
                for capability in CAPABILITIES),
          "No spills in any. Timed on no GPU yet."),
    Shown("float64 on tensor cores and on FMA units: results with other bits, executed PTX",
          (("orientation", "gradient", ""), ("capability", "instructions of", ""), ("results", "results", ""),
           ("not_finite", "of them not finite", ""), ("other_bits", "other bits", ""), ("other_nan", "other NaN", "")),
          tuple(f"bits {orientation} {capability}" for orientation in ORIENTATIONS for capability in CAPABILITIES),
          "Two parts, of numbers from the subnormal to 2^500, zeros of either sign and infinities; dW with db."),
]
