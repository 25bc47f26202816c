"""dL/dW and dL/dX on Hopper's tensor cores: main loops as linked, what copies bring, and what dL/db adds to it."""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

import densegrad as dg
from benchmarks.counting import Limit, Rehearsed, Shown
from benchmarks.tables.tensor_core import ORIENTATIONS
from densegrad.device import dtype_of
from densegrad.families.common import ceil_div
from densegrad.plans import HOPPER_STAGES, HopperPlan

README = [Shown(
    "Hopper's kernel in bfloat16: the main loop of those that multiply, as linked for 9.0",
    (("orientation", "gradient", ""), ("tile", "tile", ""), ("products", "HGMMA for 64 depths", ".0f"),
     ("loop_instructions", "instructions", ""), ("registers", "registers", ""),
     ("local_instructions", "accesses of local memory", "")),
    ("loop bfloat16 dW 128x256", "loop bfloat16 dW and db 128x256", "loop bfloat16 dX 128x256"),
    "The prototype that ran on an H100 has 79 to 83 instructions in this loop. A warpgroup's products of a stage take "
    "512 cycles of its tensor core (*modelled*), in which a scheduler issues as many instructions of its warp.",
)]
#: instructions of the prototype's loop, of which no variant has more
PROTOTYPE = 83


@dataclass(frozen=True)
class Case:
    """One function of one orientation, with a tile."""

    dtype: str
    orientation: str
    tile_cols: int
    sums: bool = False

    def _of(self, kind: str) -> str:
        also = " and db" if self.sums else ""
        return f"{kind} {self.dtype} {self.orientation}{also} 128x{self.tile_cols}"

    def run(self, machine: Rehearsed, sizes: tuple[int, int, int]) -> tuple[Any, HopperPlan]:
        """What is counted of the product's launch, whose results are checked, and its plan."""
        import cupy

        samples, in_features, out_features = sizes
        function, axis, layout = ORIENTATIONS[self.orientation]
        draw = np.random.default_rng(1)
        x, w, dz = (draw.integers(-2, 3, shape).astype(dtype_of(self.dtype)) for shape in (
            (samples, in_features), (in_features, out_features), (samples, out_features)))
        weights = function == "weight_grad"
        rows, cols, depth = (in_features, out_features, samples) if weights else (samples, in_features, out_features)
        exact = x.astype(float).T @ dz.astype(float) if weights else dz.astype(float) @ w.astype(float).T
        plan = HopperPlan(rows, cols, depth, self.dtype, self.tile_cols)
        dz, w = dz.T if axis else dz, w.T if layout == "out_in" else w
        given = [cupy.asarray(np.ascontiguousarray(array)) for array in ((x, dz) if weights else (dz, w))]
        results: list[Any] = []
        name = "weight_bias_grad" if self.sums else function
        counts = machine.count(lambda: results.append(getattr(dg, name)(
            *given, batch_axis=axis, weight_layout=layout, plan=plan)))
        found = (results[0][0] if self.sums else results[0]).get().astype(float)
        found = found.T if weights and layout == "out_in" else found
        if (found != exact.astype(dtype_of(self.dtype)).astype(float)).any():
            raise SystemExit(f"{self}: the result is wrong")
        return counts[0], plan


@dataclass(frozen=True)
class Loop(Case):
    """The loop of the warpgroups that multiply, as linked."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        return self._of("loop")

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return (Limit("products", 4, 4), Limit("loop_instructions", most=PROTOTYPE),
                Limit("local_instructions", most=0), Limit("stack_bytes", most=0))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Launch it on one tile, for the linker to see it, and judge what was linked."""
        counts, plan = self.run(machine, (64, 128, 128))
        code = machine.code(counts, "9.0")
        return {
            "orientation": self.orientation + " and db" * self.sums, "dtype": self.dtype, "capability": "9.0",
            "tile": f"{plan.tile_rows}x{plan.tile_cols}x{plan.tile_depth}", "stages": plan.stages,
            "registers": code.registers, "local_instructions": code.local_instructions,
            "stack_bytes": code.stack_bytes, "loop_instructions": code.loop_instructions,
            "products": code.mma_share * code.loop_instructions,
        }


@dataclass(frozen=True)
class Memory(Case):
    """What is read and written, over what the tiling says: whole boxes, at the edges too."""

    sizes: tuple[int, int, int] = (256, 256, 512)

    @property
    def name(self) -> str:
        """As the table shows it."""
        return self._of("memory") + " " + "x".join(map(str, self.sizes))

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return Limit("read", 1, 1), Limit("written", 1, 1), Limit("shared_load_degree", most=1)

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Every tile of the result reads whole tiles of both operands, as sizes are multiples of the tiles'.

        Beside the results each block writes its maps, word by word, and rows of sums are written by 16 bytes at a time,
        two for 32 bytes: a sector each.
        """
        counts, plan = self.run(machine, self.sizes)
        steps = ceil_div(plan.depth, plan.tile_depth)
        read = plan.tiles * steps * (plan.tile_rows + plan.tile_cols) * 128
        sums = 2 * plan.cols * 4 * 3 * ceil_div(plan.rows, plan.tile_rows) if self.sums else 0
        maps = 3 * 16 * 32 * plan.workers
        return {
            "orientation": self.orientation + " and db" * self.sums, "dtype": self.dtype,
            "read": counts.load_sectors * 32 / read,
            "written": counts.store_sectors * 32 / (plan.rows * plan.cols * 2 + sums + maps),
            "shared_load_degree": counts.shared_load_degree,
        }


def rows() -> list[Loop | Memory]:
    """The table of what must hold: every tile, order and type of operand, with db and without."""
    orders = "dW", "dX", "dW, dZ features first", "dX, dZ features first"
    loops = [Loop(dtype, orientation, tile_cols) for dtype in ("bfloat16", "float16")
             for orientation in orders for tile_cols in HOPPER_STAGES]
    with_sums = [Loop("bfloat16", "dW", tile_cols, sums=True) for tile_cols in HOPPER_STAGES]
    return [*loops, *with_sums, Memory("bfloat16", "dW", 256), Memory("bfloat16", "dX", 256),
            Memory("float16", "dW", 128), Memory("bfloat16", "dW", 256, sums=True)]
