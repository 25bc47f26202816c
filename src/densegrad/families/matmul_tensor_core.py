"""Matrix products on tensor cores: plans, and the launch of the kernel."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PlanError
from ..facts import ITEM_BYTES, TILE_DEPTH_BYTES
from ..launches import Launch, Result
from ..signatures import MatmulArguments, MatmulTensorCore
from .common import check_capability, check_choice, check_integers, check_sizes, constants_of, epilogue_of, named
from .tiling import FAR, ORIENTATIONS, Product, Tiling, square

#: (tile_rows, tile_cols, warp_rows, warp_cols, stages), from large to small; their transposes are tried too
TENSOR_CORE_TILES = (
    (128, 256, 64, 64, 3),
    (128, 128, 64, 64, 3),
    (128, 128, 64, 32, 3),
    (128, 64, 64, 32, 4),
    (64, 64, 32, 32, 4),
    (64, 32, 32, 32, 4),
    (32, 32, 32, 32, 4),
)
#: what stages may take of shared memory that a launch asks for, on every GPU with all of these instructions
DYNAMIC_SHARED_BYTES = 99 * 1024
#: the first compute capability with bfloat16, TF32, 16 depths of float16 an instruction and asynchronous copies
TENSOR_CORE_CAPABILITY = (8, 0)
#: the first one with 8 depths of float16 an instruction, and what stages may take of shared memory there
FLOAT16_CAPABILITY, FLOAT16_SHARED_BYTES = (7, 5), 64 * 1024
#: those on which float64 is faster on tensor cores: by 8 rows an instruction, and by 16, which newer ones have too
FLOAT64_CAPABILITIES = ((8, 0), (9, 0))


@dataclass(frozen=True)
class TensorCorePlan(Tiling):
    """How result (rows, cols) = left (rows, depth) @ right (depth, cols) is computed on tensor cores.

    Parameters
    ----------
    rows, cols, depth : int
        Sizes, as of a MatmulPlan.
    dtype : str
        Of the operands: float16, bfloat16, float32 or float64.
    precision : str or None
        What float32 is multiplied as: "tf32" or "tf32x3". None for float16 and bfloat16, whose products are exact, and
        for float64, which is multiplied and added as on FMA units.
    tile_rows, tile_cols, tile_depth : int
        What a block multiplies at a time; powers of two, the depth 64 bytes.
    warp_rows, warp_cols : int
        The results of one warp; powers of two, at least 32.
    stages : int
        Slots for tiles in shared memory, all but one of which are on their way while one is multiplied.
    parts : int
        How many pieces the depth is cut into, which are added in ascending order afterwards.
    capability : tuple of int
        The compute capability whose instructions are taken, which the GPU must have: (8, 0); (7, 5) for float16 by 8
        depths an instruction and copies that pass through registers, for which two stages are enough; or (9, 0) for
        float64 by 16 rows an instruction, twice as fast there.

    Raises
    ------
    PlanError
        If no kernel can carry it out.
    """

    rows: int
    cols: int
    depth: int
    dtype: str
    precision: str | None
    tile_rows: int
    tile_cols: int
    tile_depth: int
    warp_rows: int
    warp_cols: int
    stages: int
    parts: int = 1
    capability: tuple[int, int] = TENSOR_CORE_CAPABILITY

    def __post_init__(self) -> None:
        check_integers(self)
        check_choice("plan: dtype", self.dtype, ITEM_BYTES)
        self._check_precision()
        check_sizes(rows=self.rows, cols=self.cols, depth=self.depth)
        for name in ("tile_rows", "tile_cols", "warp_rows", "warp_cols"):
            value = getattr(self, name)
            if value < 32 or value & (value - 1):
                raise PlanError(f"{name} must be a power of two, at least 32; got {value}")
        if self.warp_rows > self.tile_rows or self.warp_cols > self.tile_cols:
            raise PlanError(f"warps must fit into tiles of {self.tile_rows} x {self.tile_cols}; got {self.warp_rows} x "
                            f"{self.warp_cols}")
        item = ITEM_BYTES[self.dtype]
        if self.tile_depth * item != TILE_DEPTH_BYTES:
            raise PlanError(f"tile_depth must be {TILE_DEPTH_BYTES} bytes, {TILE_DEPTH_BYTES // item} of {self.dtype}; "
                            f"got {self.tile_depth}")
        if self.sums > 128:
            raise PlanError(f"a thread has 128 registers for sums; got warps with {self.sums} (make them smaller)")
        most, least = 4 * min(self.tile_rows, self.tile_cols), max(self.tile_rows, self.tile_cols) * item // 16
        if not least <= self.threads <= min(most, 1024):
            raise PlanError(f"these tiles are copied by {least} to {min(most, 1024)} threads; got {self.threads} "
                            "(change the warps' tiles)")
        known = {"float16": (FLOAT16_CAPABILITY, TENSOR_CORE_CAPABILITY), "float64": FLOAT64_CAPABILITIES}.get(
            self.dtype, (TENSOR_CORE_CAPABILITY,))
        if self.capability not in known:
            raise PlanError(f"capability must be {' or '.join(map(str, known))} for {self.dtype}; got "
                            f"{self.capability!r}")
        limit = FLOAT16_SHARED_BYTES if self.capability == FLOAT16_CAPABILITY else DYNAMIC_SHARED_BYTES
        if self.stages < 2 or self.shared_bytes > limit:
            raise PlanError(f"stages must be at least 2 and take at most {limit} bytes of shared "
                            f"memory; got {self.stages}, which take {self.shared_bytes}")
        self._check_parts()

    @property
    def T(self) -> TensorCorePlan:
        """The plan of the transposed result, right.T @ left.T."""
        return replace(self, rows=self.cols, cols=self.rows, tile_rows=self.tile_cols, tile_cols=self.tile_rows,
                       warp_rows=self.warp_cols, warp_cols=self.warp_rows)

    @property
    def kind(self) -> str:
        """What the operands are multiplied as, in the kernel's words."""
        older = {("float16", FLOAT16_CAPABILITY): "k8", ("float64", FLOAT64_CAPABILITIES[0]): "m8"}
        return self.precision or self.dtype + older.get((self.dtype, self.capability), "")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * (self.tile_rows // self.warp_rows) * (self.tile_cols // self.warp_cols)

    @property
    def sums(self) -> int:
        """Registers of a thread for sums; "tf32x3" keeps its corrections apart, and float64 takes two for each."""
        twice = self.precision == "tf32x3" or self.dtype == "float64"
        return self.warp_rows * self.warp_cols // 32 * (2 if twice else 1)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the stages."""
        return self.stages * TILE_DEPTH_BYTES * (self.tile_rows + self.tile_cols)

    @property
    def unit(self) -> tuple[int, int]:
        """The results of a warp."""
        return self.warp_rows, self.warp_cols

    @property
    def step_cycles(self) -> int:
        """For which a warp of float64 keeps its scheduler's tensor core busy in each tile, on an H200."""
        return self.warp_rows * self.warp_cols * self.tile_depth // 32

    def explain(self) -> str:
        """The plan in words, with its reasons and what the model says."""
        unit = "tensor cores" + (f" in {self.precision}" if self.precision else "")
        if self.capability != TENSOR_CORE_CAPABILITY:
            unit += " of compute capability {}.{}".format(*self.capability)
        unit += " with the bits of FMA units" if self.dtype == "float64" else ""
        text = self._explain(unit,
                             f"{self.warp_rows} x {self.warp_cols} results a warp, {self.threads} threads a block, "
                             f"{self.stages} stages")
        if self.capability == TENSOR_CORE_CAPABILITY and self.dtype != "float64":
            text += ("\non compute capability 9.0 taken where rows of operands do not begin at multiples of 16 bytes, "
                     "or where the model of a HopperPlan promises less than a tenth more")
        return text

    def launch(self, product: Product, target: Result, sums: Result | None, arguments: MatmulArguments, *,
               free_at: int) -> Launch:
        """The launch of the kernel, with these arguments."""
        (left, _), (right, _) = product.sides(16 // ITEM_BYTES[self.dtype])
        constants = constants_of(MatmulTensorCore, self, {
            "left": left, "right": right, "result": epilogue_of(target, 8, self.accumulator),
            "sums_of": product.sums_of, "sums": sums and epilogue_of(sums, 1, self.accumulator),
            "offset_bits": product.offset_bits(self)})
        return Launch("densegrad.kernels.matmul_tensor_core", "matmul_tensor_core", constants, arguments, self.grid,
                      self.threads, plan=self, shared_bytes=self.shared_bytes, capability=self.capability)


def plan_of_tile(rows: int, cols: int, depth: int, dtype: str, precision: str | None,
                 tile: tuple[int, int, int, int, int], *, capability: tuple[int, int] = TENSOR_CORE_CAPABILITY,
                 parts: int = 1) -> TensorCorePlan:
    """The plan with one of TENSOR_CORE_TILES. Copies that pass through registers fill one stage ahead, so two do."""
    check_choice("dtype", dtype, ITEM_BYTES)
    check_capability(capability)
    tile_rows, tile_cols, warp_rows, warp_cols, stages = tile
    return TensorCorePlan(rows, cols, depth, dtype, precision, tile_rows=tile_rows, tile_cols=tile_cols,
                          tile_depth=TILE_DEPTH_BYTES // ITEM_BYTES[dtype], warp_rows=warp_rows, warp_cols=warp_cols,
                          stages=stages if capability >= TENSOR_CORE_CAPABILITY else 2, parts=parts,
                          capability=capability)


def transposed_tile(tile: tuple[int, int, int, int, int]) -> tuple[int, int, int, int, int]:
    """The tile of the transposed result."""
    rows, cols, warp_rows, warp_cols, stages = tile
    return cols, rows, warp_cols, warp_rows, stages


def fits(tile: tuple[int, int, int, int, int], dtype: str, precision: str | None) -> bool:
    """Whether a thread has registers for the sums of such a tile."""
    return tile[2] * tile[3] <= 64 * (32 if precision == "tf32x3" or dtype == "float64" else 64)


def variants() -> Iterator[tuple[str, Launch]]:
    """The kernels for all kinds of products, orientations and tiles, by name."""
    for dtype, precision, capability in (
            *((*kind, TENSOR_CORE_CAPABILITY) for kind in (("float16", None), ("bfloat16", None), ("float32", "tf32"),
                                                           ("float32", "tf32x3"))),
            *(("float64", None, capability) for capability in FLOAT64_CAPABILITIES)):
        kind, on = (dtype, precision), {"capability": capability}
        large, small = next(tile for tile in TENSOR_CORE_TILES if fits(tile, *kind)), TENSOR_CORE_TILES[-1]
        for along_depth in ORIENTATIONS:
            yield from _variant(kind, large, along_depth, how=on)
            if along_depth[0] == along_depth[1]:
                yield from _variant(kind, large, along_depth, how=on | {"sums": True})
                yield from _variant(kind, large, along_depth, 1023, on)
            yield from _variant(kind, small, along_depth, 1023, on | {"accumulate": True, "sums": True,
                                                                      "result": "float64"})
        yield from _variant(kind, large, how=on | {"pitch": FAR})
        yield from _variant(kind, small, length=1023, how=on)
        yield from _variant(kind, small, how=on | {"result": "float32", "accumulate": True, "sums": True})
        if dtype == "float64":
            for tile in TENSOR_CORE_TILES:
                for turned in {tile, transposed_tile(tile)} if fits(tile, *kind) else ():
                    for along_depth in ORIENTATIONS[:2]:
                        yield from _variant(kind, turned, along_depth, how=on | {"sums": True})
    for tile in TENSOR_CORE_TILES:
        yield from _variant(("bfloat16", None), tile)
    for along_depth in ORIENTATIONS[:2]:
        for tile in (TENSOR_CORE_TILES[0], TENSOR_CORE_TILES[-1]):
            yield from _variant(("float16", None), tile, along_depth,
                                how={"sums": True, "capability": FLOAT16_CAPABILITY})


def _variant(kind: tuple[str, str | None], tile: tuple[int, int, int, int, int],
             along_depth: tuple[bool, bool] = (False, False), length: int = 1024,
             how: dict[str, Any] | None = None) -> Iterator[tuple[str, Launch]]:
    how = how or {}
    plan = plan_of_tile(length, length, length, *kind, tile,
                        capability=how.get("capability", TENSOR_CORE_CAPABILITY))
    title, found = square(plan, along_depth, how)
    return named("-".join([plan.kind, "x".join(map(str, tile[:2])), "x".join(map(str, tile[2:4])), title]), found)
