"""dL/dW and dL/dX on Hopper's tensor cores: main loops as linked, what copies bring, and what dL/db adds to it."""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

import densegrad as dg
from benchmarks.counting import Limit, Rehearsed, Shown
from benchmarks.tables.tensor_core import ORIENTATIONS
from densegrad.device import dtype_of
from densegrad.facts import SIZES
from densegrad.families.common import ceil_div
from densegrad.families.matmul_hopper import stages_of
from densegrad.plans import HOPPER_STAGES, TF32, HopperPlan

README = [Shown(
    "Hopper's kernel: the main loop of those that multiply, as linked for 9.0",
    (("dtype", "multiplied", ""), ("orientation", "gradient", ""), ("tile", "tile", ""),
     ("products", "HGMMA a stage", ".0f"), ("loop_instructions", "instructions", ""), ("registers", "registers", ""),
     ("local_instructions", "accesses of local memory", "")),
    ("loop bfloat16 dW 128x256", "loop bfloat16 dW and db 128x256", "loop bfloat16 dX 128x256",
     "loop tf32 dW 128x256", "loop tf32 dX 128x256", "loop tf32x3 dW 128x128"),
    "The prototype that ran on an H100 has 79 to 83 instructions in this loop. A warpgroup's products of a stage take "
    "512 cycles of its tensor core (*modelled*), 768 of tf32x3, in which a scheduler issues as many instructions of "
    "its warp.",
)]
#: instructions of the prototype's loop, of which no variant has more, and HGMMA of a stage
PROTOTYPE, PRODUCTS = 83, 4
#: how often tf32x3 does what others do once
TIMES = {"tf32x3": 3}


@dataclass(frozen=True)
class Case:
    """One function of one orientation, with a tile; float32 goes by how it is multiplied."""

    dtype: str
    orientation: str
    tile_cols: int
    sums: bool = False
    parts: int = 1

    def _of(self, kind: str) -> str:
        also = " and db" if self.sums else ""
        return f"{kind} {self.dtype} {self.orientation}{also} 128x{self.tile_cols}"

    def run(self, machine: Rehearsed, sizes: tuple[int, int, int]) -> tuple[dict[str, Any], HopperPlan]:
        """What is counted of the call's launches, by their kernels, and the product's plan; results are checked."""
        import cupy

        samples, in_features, out_features = sizes
        function, axis, layout = ORIENTATIONS[self.orientation]
        dtype, precision = ("float32", self.dtype) if self.dtype in TF32 else (self.dtype, None)
        draw = np.random.default_rng(1)
        x, w, dz = (draw.integers(-2, 3, shape).astype(dtype_of(dtype)) for shape in (
            (samples, in_features), (in_features, out_features), (samples, out_features)))
        weights = function == "weight_grad"
        rows, cols, depth = (in_features, out_features, samples) if weights else (samples, in_features, out_features)
        exact = x.astype(float).T @ dz.astype(float) if weights else dz.astype(float) @ w.astype(float).T
        plan = HopperPlan(rows, cols, depth, dtype, self.tile_cols, parts=self.parts, precision=precision)
        dz, w = dz.T if axis else dz, w.T if layout == "out_in" else w
        given = [cupy.asarray(np.ascontiguousarray(array)) for array in ((x, dz) if weights else (dz, w))]
        results: list[Any] = []
        name = "weight_bias_grad" if self.sums else function
        counts = machine.count(lambda: results.append(getattr(dg, name)(
            *given, batch_axis=axis, weight_layout=layout, plan=plan)))
        found = (results[0][0] if self.sums else results[0]).get().astype(float)
        found = found.T if weights and layout == "out_in" else found
        if (found != exact.astype(dtype_of(dtype)).astype(float)).any():
            raise SystemExit(f"{self}: the result is wrong")
        return {count.kernel: count for count in counts}, plan


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
        times = TIMES.get(self.dtype, 1)
        return (Limit("products", times * PRODUCTS, times * PRODUCTS),
                Limit("loop_instructions", most=times * PROTOTYPE),
                Limit("local_instructions", most=0), Limit("stack_bytes", most=0))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Launch it on one tile, for the linker to see it, and judge what was linked."""
        counts, plan = self.run(machine, (64, 128, 128))
        code = machine.code(counts["matmul_hopper"], "9.0")
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
        return self._of("memory") + " " + "x".join(map(str, self.sizes)) + f" in {self.parts} parts" * (self.parts > 1)

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return (Limit("read", 1, 1), Limit("copied", 1, 1), Limit("written", 1, 1),
                Limit("shared_load_degree", most=1))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Every tile of the result reads whole tiles of both operands, as sizes are multiples of the tiles'.

        Beside the results each block writes its maps, word by word, and rows of sums are written by 16 bytes at a time,
        two for 32 bytes: a sector each.
        """
        found, plan = self.run(machine, self.sizes)
        counts, steps = found["matmul_hopper"], ceil_div(plan.depth, plan.tile_depth)
        read = plan.tiles * steps * plan.terms * (plan.tile_rows + plan.tile_cols) * 128
        results = plan.workspace_bytes or plan.rows * plan.cols * SIZES[plan.dtype]
        sums = 2 * plan.cols * 4 * 3 * ceil_div(plan.rows, plan.tile_rows) if self.sums else 0
        maps = 3 * 16 * 32 * plan.workers
        return {
            "orientation": self.orientation + " and db" * self.sums, "dtype": self.dtype,
            "read": counts.load_sectors * 32 / read,
            "copied": None if counts.copied_bytes is None else counts.copied_bytes / read,
            "written": counts.store_sectors * 32 / (results + sums + maps),
            "shared_load_degree": counts.shared_load_degree,
        }


@dataclass(frozen=True)
class Turned(Memory):
    """What the first pass reads and writes, over each number once."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        return self._of("turned") + " " + "x".join(map(str, self.sizes))

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return (Limit("read", 1, 1), Limit("written", 1, 1), Limit("shared_load_degree", most=1),
                Limit("shared_store_degree", most=1), Limit("wide_stores", 1, 1))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """The last operand's pass, of whose sizes all are multiples of 32."""
        found, plan = self.run(machine, self.sizes)
        counts = found["turn_operand"]
        once = counts.launched.plan.outer * plan.depth * SIZES[plan.dtype]
        return {
            "orientation": self.orientation, "dtype": self.dtype, "read": counts.load_sectors * 32 / once,
            "written": counts.store_sectors * 32 / (once * plan.terms),
            "shared_load_degree": counts.shared_load_degree, "shared_store_degree": counts.shared_store_degree,
            "wide_stores": counts.wide_stores,
        }


def rows() -> list[Loop | Memory]:
    """The table of what must hold: every tile, order and type of operand, with db and without."""
    orders = "dW", "dX", "dW, dZ features first", "dX, dZ features first"
    loops = [Loop(dtype, orientation, tile_cols) for dtype in ("bfloat16", "float16")
             for orientation in orders for tile_cols in HOPPER_STAGES]
    with_sums = [Loop("bfloat16", "dW", tile_cols, sums=True) for tile_cols in HOPPER_STAGES]
    loops += [Loop(precision, orientation, tile_cols) for precision in TF32 for orientation in ("dW", "dX")
              for tile_cols in stages_of(precision)]
    memory = [Memory("bfloat16", "dW", 256), Memory("bfloat16", "dX", 256), Memory("float16", "dW", 128),
              Memory("bfloat16", "dW", 256, sums=True), Memory("tf32", "dX", 256), Memory("tf32", "dW", 256),
              Memory("tf32x3", "dX", 128), Memory("bfloat16", "dW", 128, parts=3, sizes=(320, 128, 128))]
    turned = [Turned("tf32", "dW", 256), Turned("tf32x3", "dW", 128), Turned("tf32x3", "dX", 128)]
    return [*loops, *with_sums, *memory, *turned]
