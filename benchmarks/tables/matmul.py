"""The matrix product on FMA units: its machine code, what it reads, and what each idea buys over the two baselines.

Machine code is that of the linked kernel. Counted shapes are cut where counters are exactly proportional: a count grows
by the same amount with every tile_depth samples, so that of the whole batch follows from two short ones. `counted` says
which.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

import densegrad as dg
from benchmarks import baselines
from benchmarks.counting import Counts, Limit, Rehearsed, Shown, total
from densegrad.device import dtype_of
from densegrad.families.matmul_simt import UNTRIED_TILES
from densegrad.plans import ITEM_BYTES, MatmulPlan, plan_matmul

#: (tile_rows, tile_cols, tile_depth, thread_rows, thread_cols) of 8 x 8 results a thread, and the best large one: the
#: longer side is that of the operand which is not transposed, if one is
MEDIUM, LARGE, LARGE_ACROSS = (128, 128, 8, 8, 8), (256, 128, 16, 8, 16), (128, 256, 16, 8, 16)
#: which of x and dz are contiguous along the batch, so that their tiles are transposed into shared memory
ORIENTATIONS = {"x and dz by samples": (False, False), "x by features": (True, False), "dz by features": (False, True),
                "both by features": (True, True)}

README = [Shown(
    "dL/dW, float32: the main loop of the linked machine code; what it allows at most of the FP32 peak is *modelled*",
    (("tile", "tile and results a thread", ""), ("capability", "capability", ""), ("registers", "registers", ""),
     ("local_instructions", "spills", ""), ("ffma_share", "multiply-adds", ".1%"),
     ("bound_modelled", "of the peak", ".0%"), ("load_to_use", "instructions from load to use", "")),
    tuple(f"code, float32 {tile}, x and dz by samples, {capability}" for tile in ("128x128x8 8x8", "256x128x16 8x16")
          for capability in ("8.0", "8.6", "8.9", "9.0", "12.0")),
), Shown(
    "dL/dW, float32: one idea more in every row (256 samples, 256 x 256 results; machine code for 9.0)",
    (("name", "kernel", ""), ("instructions_per_multiply_add", "instructions for a multiply-add", ".2f"),
     ("sectors_over_floor", "sectors read over the fewest", ".1f"), ("registers", "registers", ""),
     ("ffma_share", "multiply-adds", ".0%"), ("bound_modelled", "of the peak, modelled", ".0%")),
    ("idea: one thread for each result", "idea: 16 x 16 tiles in shared memory",
     "idea: 4 x 4 results in registers, 16-byte accesses", "idea: 8 x 8 results in registers",
     "idea: 8 x 16 results in registers, twice as deep"),
), Shown(
    "dL/dW, float32: what dL/db, ragged sizes and a long batch cost",
    (("name", "case", ""), ("instructions_over_reference", "instructions over the reference", ".3f"),
     ("sectors_over_reference", "sectors over it", ".3f"), ("blocks", "blocks", ""),
     ("workspace_traffic", "workspace over operands", ".2%")),
    ("dW and db against dW, (4096, 1024, 1024)", "ragged against 1024 cubed, (1023, 1025, 1021)",
     "parts, (1000003, 64, 10)", "parts, (1000003, 128, 128)"),
)]


def _draw(shape: tuple[int, int], dtype: str, seed: int, along_batch: bool) -> Any:
    """Small integers, whose sums are exact, in either memory order."""
    import cupy

    values = np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype_of(dtype))
    return cupy.asarray(np.ascontiguousarray(values.T)).T if along_batch else cupy.asarray(values)


def _plan(sizes: tuple[int, int, int], tile: tuple[int, ...], dtype: str = "float32", parts: int = 1) -> MatmulPlan:
    samples, in_features, out_features = sizes
    rows, cols, depth, thread_rows, thread_cols = tile
    return MatmulPlan(in_features, out_features, samples, dtype, rows, cols, tile_depth=depth, thread_rows=thread_rows,
                      thread_cols=thread_cols, parts=parts)


def _weight_grad(machine: Rehearsed, sizes: tuple[int, int, int], tile: tuple[int, ...], dtype: str = "float32",
                 *, along_batch: tuple[bool, bool] = (False, False), parts: int = 1,
                 bias: bool = False) -> list[Counts]:
    """The counts of weight_grad, or of weight_bias_grad, whose results are checked."""
    samples, in_features, out_features = sizes
    x = _draw((samples, in_features), dtype, 1, along_batch[0])
    dz = _draw((samples, out_features), dtype, 2, along_batch[1])
    plan = _plan(sizes, tile, dtype, parts)
    given, axis = (dz.T, 1) if along_batch[1] else (dz, 0)
    results: list[Any] = []

    def call() -> None:
        if bias:
            results.append(dg.weight_bias_grad(x, given, batch_axis=axis, plan=plan).dw)
        else:
            results.append(dg.weight_grad(x, given, batch_axis=axis, plan=plan))

    counts = machine.count(call)
    exact = x.get().astype("float32").T @ dz.get().astype("float32")
    if not (results[0].get() == exact.astype(dtype_of(dtype))).all():
        raise SystemExit(f"weight_grad of {sizes} with {tile}: the sums are wrong")
    return counts


@dataclass(frozen=True)
class MainLoop:
    """The machine code of weight_grad's kernel for one tile, orientation and compute capability."""

    tile: tuple[int, ...]
    orientation: str
    capability: str
    must: tuple[Limit, ...]
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """As the table shows it."""
        rows, cols, depth, thread_rows, thread_cols = self.tile
        return (f"code, {self.dtype} {rows}x{cols}x{depth} {thread_rows}x{thread_cols}, {self.orientation}, "
                f"{self.capability}")

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return (*self.must, Limit("local_instructions", most=0))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute it once, link it for the compute capability, and read its main loop."""
        rows, cols, depth, *_ = self.tile
        counts, *_ = _weight_grad(machine, (2 * depth, rows, cols), self.tile, self.dtype,
                                  along_batch=ORIENTATIONS[self.orientation])
        code = machine.code(counts, self.capability)
        return {
            "tile": "x".join(map(str, self.tile)), "orientation": self.orientation, "dtype": self.dtype,
            "capability": self.capability, "registers": code.registers, "local_instructions": code.local_instructions,
            "blocks_per_multiprocessor": code.blocks_per_multiprocessor, "loop_instructions": code.loop_instructions,
            "ffma_share": code.ffma_share, "bound_modelled": (code.percent_peak or 0.0) / 100,
            "bound_below_share": code.ffma_share - (code.percent_peak or 0.0) / 100, "load_to_use": code.load_to_use,
        }


@dataclass(frozen=True)
class Traffic:
    """What weight_grad of 1024 x 1024 results moves with one tile, in one orientation."""

    tile: tuple[int, ...]
    orientation: str

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"traffic, {self.tile[0]}x{self.tile[1]}x{self.tile[2]}, {self.orientation}"

    limits = (Limit("read_over_formula", 1, 1), Limit("read_efficiency", 1, 1), Limit("written_efficiency", 1, 1),
              Limit("wide_loads", least=1), Limit("wide_stores", least=1), Limit("shared_load_degree", most=1),
              Limit("shared_store_degree", most=1.10))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute it for 64 samples."""
        sizes = 64, 1024, 1024
        (counts,) = _weight_grad(machine, sizes, self.tile, along_batch=ORIENTATIONS[self.orientation])
        loaded = _plan(sizes, self.tile).loaded_bytes
        asked = sum(32 * width * requests for width, requests in counts.loads.items())
        written = sum(32 * width * requests for width, requests in counts.stores.items())
        return {
            "tile": "x".join(map(str, self.tile)), "orientation": self.orientation, "counted": "64 of 1024 samples",
            "read_over_formula": 32 * counts.load_sectors / loaded,
            "read_efficiency": asked / (32 * counts.load_sectors),
            "written_efficiency": written / (32 * counts.store_sectors), "wide_loads": counts.wide_loads,
            "wide_stores": counts.wide_stores, "shared_load_degree": counts.shared_load_degree,
            "shared_store_degree": counts.shared_store_degree,
        }


@dataclass(frozen=True)
class Against:
    """weight_grad of one shape against another, or with and without dL/db, by counts that grow with the batch."""

    name: str
    sizes: tuple[int, int, int]  # samples, in_features, out_features
    reference: tuple[int, int, int]
    limits: tuple[Limit, ...]
    orientation: str = "x and dz by samples"
    bias: bool = False

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Extrapolate both from two short batches each."""
        instructions, sectors = self._whole(machine, self.sizes, self.bias)
        fewest_instructions, fewest_sectors = self._whole(machine, self.reference, False)
        return {"tile": "x".join(map(str, MEDIUM)), "orientation": self.orientation,
                "counted": "the samples' last partial tile and 2 or 4 whole ones", "instructions": round(instructions),
                "sectors": round(sectors), "instructions_over_reference": instructions / fewest_instructions,
                "sectors_over_reference": sectors / fewest_sectors}

    def _whole(self, machine: Rehearsed, sizes: tuple[int, int, int], bias: bool) -> tuple[float, float]:
        """(warps' instructions, sectors read and written) of all launches."""
        samples, depth = sizes[0], MEDIUM[2]
        short = [samples % depth + number * depth for number in (2, 4)]
        counted = [total(_weight_grad(machine, (few, *sizes[1:]), MEDIUM, along_batch=ORIENTATIONS[self.orientation],
                                      bias=bias)) for few in short]
        found = [(counts.warp_instructions, counts.load_sectors + counts.store_sectors) for counts in counted]
        tiles = (samples - short[0]) / (short[1] - short[0])
        first, second = (few + (more - few) * tiles for few, more in zip(*found, strict=True))
        return first, second


@dataclass(frozen=True)
class LongBatch:
    """A batch of a million samples with few results: whether its parts fill a GPU, and what their workspace costs."""

    in_features: int
    out_features: int
    samples: int = 1_000_003

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"parts, ({self.samples}, {self.in_features}, {self.out_features})"

    limits = (Limit("blocks", least=132), Limit("workspace_traffic", most=0.02))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute two of the parts; the figures of the workspace are the plan's, and hold for all of them."""
        plan = plan_matmul(self.in_features, self.out_features, self.samples, "float32")
        tile = plan.tile_rows, plan.tile_cols, plan.tile_depth, plan.thread_rows, plan.thread_cols
        sizes = 2 * plan.depth_per_part, self.in_features, self.out_features
        counts = _weight_grad(machine, sizes, tile, parts=2)
        read = sizes[0] * (self.in_features + self.out_features) * ITEM_BYTES["float32"]
        return {
            "tile": "x".join(map(str, tile)), "counted": f"2 of {plan.parts} parts",
            "blocks": plan.grid[0] * plan.grid[1] * plan.grid[2],
            "workspace_traffic": 2 * plan.workspace_bytes / (self.samples * (self.in_features + self.out_features) * 4),
            "read_over_operands": 32 * counts[0].load_sectors / read, "active_lanes": counts[0].active_lanes,
        }


@dataclass(frozen=True)
class Vectors:
    """weight_grad where one size is 1: sectors over the fewest that operands and result take."""

    samples: int
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"vectors, ({self.samples}, {self.in_features}, {self.out_features})"

    limits = (Limit("sectors_over_floor", most=1.10),)

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute the whole shape by its own plan."""
        x = _draw((self.samples, self.in_features), "float32", 1, False)
        dz = _draw((self.samples, self.out_features), "float32", 2, False)
        plan = plan_matmul(self.in_features, self.out_features, self.samples, "float32")
        counts = total(machine.count(lambda: dg.weight_grad(x, dz, plan=plan)))
        elements = self.samples * (self.in_features + self.out_features) + self.in_features * self.out_features
        return {"tile": f"{plan.tile_rows}x{plan.tile_cols}x{plan.tile_depth}x{plan.thread_rows}x{plan.thread_cols}",
                "blocks": plan.grid[0] * plan.grid[1] * plan.grid[2],
                "sectors": counts.load_sectors + counts.store_sectors,
                "sectors_over_floor": (counts.load_sectors + counts.store_sectors) / (elements / 8),
                "active_lanes": counts.active_lanes}


@dataclass(frozen=True)
class Accuracy:
    """The error of weight_grad by its own plan on normally distributed numbers."""

    samples: int
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"accuracy, ({self.samples}, {self.in_features}, {self.out_features})"

    limits = (Limit("error_over_bound", most=1), Limit("error_over_numpy", most=1.5))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Hold it and NumPy's float32 product to float64."""
        import cupy

        draw = np.random.default_rng(7)
        x, dz = (draw.standard_normal((self.samples, size)).astype("float32")
                 for size in (self.in_features, self.out_features))
        plan = plan_matmul(self.in_features, self.out_features, self.samples, "float32")
        found = dg.weight_grad(cupy.asarray(x), cupy.asarray(dz), plan=plan).get()
        exact = x.astype("float64").T @ dz.astype("float64")
        bound = (plan.chain + 1) * 2.0 ** -24 * (np.abs(x).astype("float64").T @ np.abs(dz).astype("float64"))
        error, numpy_error = (np.sqrt(np.mean((value - exact) ** 2)) for value in (found, x.T @ dz))
        return {"chain": plan.chain, "error_over_bound": (np.abs(found - exact) / bound).max(),
                "error": f"{error:.3g}", "error_over_numpy": error / numpy_error}


@dataclass(frozen=True)
class Idea:
    """What one multiply-add costs, with one more idea than in the row before: 256 samples, 256 x 256 results."""

    name: str
    kernel: str  # one of baselines.BASELINES, or a tile of densegrad's
    limits = ()

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Execute it, and read its main loop on 9.0."""
        import cupy

        size = 256
        if self.kernel in baselines.BASELINES:
            x, dz = _draw((size, size), "float32", 1, False), _draw((size, size), "float32", 2, False)
            dw = cupy.empty((size, size), "float32")
            counts = total(machine.count(lambda: baselines.weight_grad(self.kernel, x, dz, dw)))
        else:
            tile = tuple(map(int, self.kernel.split("x")))
            counts = total(_weight_grad(machine, (size, size, size), tile))
        code = machine.code(counts, "9.0")
        return {"tile": self.kernel, "instructions_per_multiply_add": 32 * counts.warp_instructions / size**3,
                "sectors": counts.load_sectors, "sectors_over_floor": counts.load_sectors / (2 * size * size / 8),
                "registers": code.registers, "ffma_share": code.ffma_share,
                "bound_modelled": (code.percent_peak or 0.0) / 100}


def rows() -> list[Any]:
    """The table of what must hold."""
    table: list[Any] = [
        Idea("idea: one thread for each result", "naive"),
        Idea("idea: 16 x 16 tiles in shared memory", "shared tiles"),
        Idea("idea: 4 x 4 results in registers, 16-byte accesses", "32x32x8x4x4"),
        Idea("idea: 8 x 8 results in registers", "128x128x8x8x8"),
        Idea("idea: 8 x 16 results in registers, twice as deep", "256x128x16x8x16"),
    ]
    ahead = Limit("load_to_use", least=250)
    for capability in ("8.0", "8.6", "8.9", "9.0", "12.0"):
        # On 8.0 an FFMA takes two issue slots, so that half of them are enough.
        medium, large = {"8.0": (0.5, 0.5), "9.0": (0.88, 0.93)}.get(capability, (0.88, 0.94))
        for orientation in ORIENTATIONS:
            table.append(MainLoop(MEDIUM, orientation, capability, (
                Limit("ffma_share", least=medium), Limit("blocks_per_multiprocessor", least=2), ahead)))
            equal = () if capability == "8.0" else (Limit("bound_below_share", most=0.0005),)
            tile = LARGE_ACROSS if orientation == "x by features" else LARGE
            table.append(MainLoop(tile, orientation, capability, (Limit("ffma_share", least=large), ahead, *equal)))
    for tile in UNTRIED_TILES:
        table += [MainLoop(tile, orientation, "9.0", ()) for orientation in ORIENTATIONS]
    table.append(Traffic(UNTRIED_TILES[0], "x and dz by samples"))
    for dtype, tile in (("float64", (64, 32, 8, 8, 4)), ("float16", (128, 128, 8, 8, 8)),
                        ("bfloat16", (64, 64, 8, 8, 8))):
        table += [MainLoop(tile, "x and dz by samples", capability, (), dtype) for capability in ("8.0", "9.0")]
    table += [Traffic(tile, orientation) for tile in (MEDIUM, LARGE) for orientation in ORIENTATIONS]
    ragged = Limit("instructions_over_reference", most=1.12), Limit("sectors_over_reference", most=1.15)
    table += [
        Against("dW and db against dW, (4096, 1024, 1024)", (4096, 1024, 1024), (4096, 1024, 1024), (
            Limit("instructions_over_reference", most=1.01), Limit("sectors_over_reference", most=1.005)), bias=True),
        Against("ragged against 1024 cubed, (1023, 1025, 1021)", (1023, 1025, 1021), (1024, 1024, 1024), ragged),
        Against("ragged against 1024 cubed, both by features", (1023, 1025, 1021), (1024, 1024, 1024), ragged,
                "both by features"),
        LongBatch(64, 10), LongBatch(128, 128),
        Vectors(1, 1024, 1024), Vectors(16384, 1, 256), Vectors(16384, 256, 1), Vectors(65536, 1, 1),
        Accuracy(4096, 64, 64), Accuracy(65536, 16, 10),
    ]
    return table
