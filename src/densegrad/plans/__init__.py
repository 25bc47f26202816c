"""Plans: how a gradient is computed, as printable values. Pure: shapes and dtypes in, a frozen dataclass out.

A plan never looks at a device, so that the same inputs give the same bits on every one.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import gcd, isqrt, prod
from typing import Any, TypeVar

from ..errors import PlanError

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


Product = TypeVar("Product", "MatmulPlan", "TensorCorePlan")

#: the largest grid along y and z
GRID_Y = 65535


def accumulator_of(dtype: str) -> str:
    """The type that sums of this dtype are kept in."""
    return "float64" if dtype == "float64" else "float32"


def check_plan(plan: Any, kind: type | tuple[type, ...], sizes: dict[str, Any]) -> Any:
    """The plan that a user passed, or None.

    Raises
    ------
    PlanError
        If it was made for other sizes than these.
    TypeError
        If it is no plan of this kind, or of one of these.
    """
    if plan is None:
        return None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(plan, kinds):
        raise TypeError(f"plan must be a {' or a '.join(kind.__name__ for kind in kinds)}; got {type(plan).__name__}")
    for name, wanted in sizes.items():
        if getattr(plan, name) != wanted:
            raise PlanError(f"plan was made for {name} {getattr(plan, name)}, but the inputs have {wanted} (make one for them, "
                            f"for example with dataclasses.replace(plan, {name}={wanted!r}))")
    return plan


class Tiling:
    """What the plans of matrix products have in common: the result in tiles, the depth in parts."""

    rows: int
    cols: int
    depth: int
    dtype: str
    tile_rows: int
    tile_cols: int
    tile_depth: int
    parts: int

    @property
    def accumulator(self) -> str:
        """The type of sums."""
        return accumulator_of(self.dtype)

    @property
    def depth_per_part(self) -> int:
        """The depth of every part but the last, a multiple of tile_depth."""
        return max(_ceil(_ceil(self.depth, self.parts), self.tile_depth), 1) * self.tile_depth

    @property
    def tiles(self) -> int:
        """Of the result."""
        return _ceil(self.rows, self.tile_rows) * _ceil(self.cols, self.tile_cols)

    @cached_property
    def group_bits(self) -> int:
        """Binary logarithm of how many tile rows are walked together.

        8 of them, less where that would leave blocks without a tile, more where a grid's y has no room.
        """
        down = _ceil(self.rows, self.tile_rows)
        fits = [bits for bits in (3, 2, 1) if 16 * ((_ceil(down, 1 << bits) << bits) - down) <= down]
        return max([*fits, (_ceil(down, GRID_Y) - 1).bit_length(), 0])

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks: (tile columns times group, groups of tile rows, parts)."""
        group = 1 << self.group_bits
        return _ceil(self.cols, self.tile_cols) * group, _ceil(_ceil(self.rows, self.tile_rows), group), self.parts

    @property
    def pitch(self) -> int:
        """The length of a row of the workspace: cols in whole vectors of 16 bytes."""
        vector = 16 // ITEM_BYTES[self.accumulator]
        return _ceil(self.cols, vector) * vector

    @property
    def workspace_bytes(self) -> int:
        """Memory for the parts of the result."""
        return self.parts * self.rows * self.pitch * ITEM_BYTES[self.accumulator] if self.parts > 1 else 0

    @property
    def chain(self) -> int:
        """The longest chain of additions that one result goes through."""
        return min(self.depth_per_part, max(self.depth, 1)) + self.parts - 1

    @property
    def loaded_bytes(self) -> int:
        """What the blocks read from global memory, most of it from cache: each operand once per tile of the other axis."""
        down, across = _ceil(self.rows, self.tile_rows), _ceil(self.cols, self.tile_cols)
        return (self.rows * across + self.cols * down) * self.depth * ITEM_BYTES[self.dtype]

    def _explain(self, unit: str, threads: str, error: str, cost: MatmulCost) -> str:
        tiles = self.tiles
        used = self.rows * self.cols / (tiles * self.tile_rows * self.tile_cols) if self.rows and self.cols else 0.0
        lines = [
            f"({self.rows}, {self.depth}) @ ({self.depth}, {self.cols}), {self.dtype}, {unit}, sums in {self.accumulator}",
            f"tiles of {self.tile_rows} x {self.tile_cols}, {self.tile_depth} deep: {tiles} tiles, {used:.0%} of them results; "
            + threads,
        ]
        if 1 in (self.rows, self.cols, self.depth):
            kind = "an outer product" if self.depth == 1 else "a product of matrix and vector"
            lines.append(f"{kind}, bound by memory: no path of its own, since these tiles read each operand once or "
                         "nearly so")
        if self.parts > 1:
            lines.append(f"the depth is cut into {self.parts} parts of {self.depth_per_part}, since {tiles} tiles alone would "
                         f"leave multiprocessors idle; {self.workspace_bytes} bytes of workspace, added in ascending order")
        else:
            lines.append("the depth is not cut: the tiles alone are enough blocks, or cutting would cost more than it gains")
        lines.append(f"longest chain of additions {self.chain}: |error| <= {error} (|left| @ |right|)")
        lines.append(f"model, not measured: {cost.total:.0f} cycles on {MODEL_MULTIPROCESSORS} multiprocessors, bound by "
                     f"{cost.bound} (arithmetic {cost.arithmetic:.0f}, memory {cost.memory:.0f}, parts {cost.parts:.0f})")
        return "\n".join(lines)


@dataclass(frozen=True)
class MatmulPlan(Tiling):
    """How result (rows, cols) = left (rows, depth) @ right (depth, cols) is computed on FMA units.

    Parameters
    ----------
    rows, cols, depth : int
        Sizes. For dL/dW: in_features, out_features, samples; for dL/dX: samples, in_features, out_features.
    dtype : str
        Of the operands.
    tile_rows, tile_cols, tile_depth : int
        What a block multiplies at a time; powers of two.
    thread_rows, thread_cols : int
        The results of one thread; powers of two, whole vectors of 16 bytes.
    parts : int
        How many pieces the depth is cut into, which are added in ascending order afterwards.

    Raises
    ------
    PlanError
        If no kernel can carry it out.
    """

    rows: int
    cols: int
    depth: int
    dtype: str
    tile_rows: int
    tile_cols: int
    tile_depth: int
    thread_rows: int
    thread_cols: int
    parts: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise PlanError(f"dtype must be one of {', '.join(ITEM_BYTES)}; got {self.dtype!r}")
        for name in ("tile_rows", "tile_cols", "tile_depth", "thread_rows", "thread_cols"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise PlanError(f"{name} must be a power of two; got {value}")
        vector = 16 // ITEM_BYTES[self.accumulator]
        for name, thread, tile in (("rows", self.thread_rows, self.tile_rows), ("cols", self.thread_cols, self.tile_cols)):
            if not vector <= thread <= tile:
                raise PlanError(f"thread_{name} must be between {vector} and tile_{name}, {tile}; got {thread}")
        if self.tile_depth < vector:
            raise PlanError(f"tile_depth must be at least {vector}; got {self.tile_depth}")
        if self.threads > 1024:
            raise PlanError(f"a block has at most 1024 threads; got tiles for {self.threads}")
        if self.shared_bytes > SHARED_BYTES:
            raise PlanError(f"two stages of these tiles take {self.shared_bytes} bytes of shared memory; at most "
                            f"{SHARED_BYTES} fit (make the tiles smaller)")
        if not 1 <= self.parts <= GRID_Y:
            raise PlanError(f"parts must be between 1 and {GRID_Y}; got {self.parts}")
        if self.depth_per_part > 2**30:
            raise PlanError(f"a part has at most {2**30} depths; got {self.depth_per_part} (take more parts)")

    @property
    def T(self) -> MatmulPlan:
        """The plan of the transposed result, right.T @ left.T."""
        tile_rows, tile_cols, _, thread_rows, thread_cols = transposed_tile(
            (self.tile_rows, self.tile_cols, self.tile_depth, self.thread_rows, self.thread_cols))
        return replace(self, rows=self.cols, cols=self.rows, tile_rows=tile_rows, tile_cols=tile_cols,
                       thread_rows=thread_rows, thread_cols=thread_cols)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.tile_rows // self.thread_rows * (self.tile_cols // self.thread_cols)

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks the registers have to leave room for: 512 threads, or 256 with over 64 registers of sums.

        384 of smaller blocks: a few more than 128 registers keep the linked code from spilling.
        """
        sums = self.thread_rows * self.thread_cols * ITEM_BYTES[self.accumulator] // 4
        resident = 256 if sums > 64 else 512 if self.threads >= 256 else 384
        return max(min(resident // self.threads, 16), 1)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: two stages of both tiles."""
        return 2 * self.tile_depth * (self.tile_rows + self.tile_cols) * ITEM_BYTES[self.accumulator]

    @cached_property
    def cost(self) -> MatmulCost:
        """What the model says this plan takes."""
        return _matmul_cost(self)

    def explain(self) -> str:
        """The plan in words, with its reasons and what the model says."""
        threads = f"{self.thread_rows} x {self.thread_cols} results a thread, {self.threads} threads a block"
        return self._explain("FMA units", threads, f"{self.chain + 1} u", self.cost)


@dataclass(frozen=True)
class TensorCorePlan(Tiling):
    """How result (rows, cols) = left (rows, depth) @ right (depth, cols) is computed on tensor cores.

    Parameters
    ----------
    rows, cols, depth : int
        Sizes, as of a MatmulPlan.
    dtype : str
        Of the operands: float16, bfloat16 or float32.
    precision : str or None
        What float32 is multiplied as: "tf32" or "tf32x3". None for float16 and bfloat16, whose products are exact.
    tile_rows, tile_cols, tile_depth : int
        What a block multiplies at a time; powers of two, the depth 64 bytes.
    warp_rows, warp_cols : int
        The results of one warp; powers of two, at least 32.
    stages : int
        Slots for tiles in shared memory, all but one of which are on their way while one is multiplied.
    parts : int
        How many pieces the depth is cut into, which are added in ascending order afterwards.

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

    def __post_init__(self) -> None:
        wanted: tuple[str | None, ...] = {"float16": (None,), "bfloat16": (None,), "float32": TF32}.get(self.dtype, ())
        if self.precision not in wanted:
            raise PlanError(f"tensor cores take float16 and bfloat16 with precision None, float32 with one of {TF32}; "
                            f"got {self.dtype} with {self.precision!r}")
        for name in ("tile_rows", "tile_cols", "warp_rows", "warp_cols"):
            value = getattr(self, name)
            if value < 32 or value & (value - 1):
                raise PlanError(f"{name} must be a power of two, at least 32; got {value}")
        if self.warp_rows > self.tile_rows or self.warp_cols > self.tile_cols:
            raise PlanError(f"warps must fit into tiles of {self.tile_rows} x {self.tile_cols}; got {self.warp_rows} x "
                            f"{self.warp_cols}")
        item = ITEM_BYTES[self.dtype]
        if self.tile_depth * item != 64:
            raise PlanError(f"tile_depth must be 64 bytes, {64 // item} of {self.dtype}; got {self.tile_depth}")
        if self.sums > 128:
            raise PlanError(f"a thread has registers for 128 sums; got warps with {self.sums} (make them smaller)")
        most, least = 4 * min(self.tile_rows, self.tile_cols), max(self.tile_rows, self.tile_cols) * item // 16
        if not least <= self.threads <= min(most, 1024):
            raise PlanError(f"these tiles are copied by {least} to {min(most, 1024)} threads; got {self.threads} "
                            "(change the warps' tiles)")
        if self.stages < 2 or self.shared_bytes > DYNAMIC_SHARED_BYTES:
            raise PlanError(f"stages must be at least 2 and take at most {DYNAMIC_SHARED_BYTES} bytes of shared memory; "
                            f"got {self.stages}, which take {self.shared_bytes}")
        if not 1 <= self.parts <= GRID_Y:
            raise PlanError(f"parts must be between 1 and {GRID_Y}; got {self.parts}")
        if self.depth_per_part > 2**30:
            raise PlanError(f"a part has at most {2**30} depths; got {self.depth_per_part} (take more parts)")

    @property
    def T(self) -> TensorCorePlan:
        """The plan of the transposed result, right.T @ left.T."""
        return replace(self, rows=self.cols, cols=self.rows, tile_rows=self.tile_cols, tile_cols=self.tile_rows,
                       warp_rows=self.warp_cols, warp_cols=self.warp_rows)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * (self.tile_rows // self.warp_rows) * (self.tile_cols // self.warp_cols)

    @property
    def sums(self) -> int:
        """Registers of a thread for sums; "tf32x3" keeps its corrections apart."""
        return self.warp_rows * self.warp_cols // 32 * (2 if self.precision == "tf32x3" else 1)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the stages."""
        return self.stages * 64 * (self.tile_rows + self.tile_cols)

    @property
    def chain(self) -> int:
        """The longest chain of additions that one result goes through."""
        return super().chain + (self.precision == "tf32x3")

    @property
    def product_error(self) -> float:
        """What each product may be off by, of its magnitude.

        "tf32" rounds each factor by 2⁻¹¹. "tf32x3" rounds what is left of each by 2⁻¹¹ again, and leaves out the
        product of what is left; the sums of what is left are rounded, too, each addition by 2⁻²⁴ of 2⁻¹⁰.
        """
        if self.precision == "tf32":
            return 2.0 ** -10 + 2.0 ** -22
        return 3.01 * 2.0 ** -22 + self.chain * 2.0 ** -33 if self.precision == "tf32x3" else 0.0

    @cached_property
    def cost(self) -> MatmulCost:
        """What the model says this plan takes."""
        return _tensor_core_cost(self)

    def explain(self) -> str:
        """The plan in words, with its reasons and what the model says."""
        error = f"{self.chain + 1} u"
        if self.precision is not None:
            error = f"({error} + {self.product_error:.2g})"
        return self._explain("tensor cores" + (f" in {self.precision}" if self.precision else ""),
                             f"{self.warp_rows} x {self.warp_cols} results a warp, {self.threads} threads a block, "
                             f"{self.stages} stages", error, self.cost)


@dataclass(frozen=True)
class MatmulCost:
    """The model's cycles: of arithmetic and of memory, which overlap, and of adding up the parts, which does not."""

    arithmetic: float
    memory: float
    parts: float

    @property
    def total(self) -> float:
        """All of it."""
        return max(self.arithmetic, self.memory) + self.parts

    @property
    def bound(self) -> str:
        """Which of the two that overlap is longer."""
        return "arithmetic" if self.arithmetic >= self.memory else "memory"


#: A nominal GPU, so that plans are the same on every one: an H100's multiprocessors and bytes per clock cycle.
MODEL_MULTIPROCESSORS = 132
MODEL_DRAM_BYTES = 15.0  # per multiprocessor and cycle
MODEL_L2_BYTES = 40.0
MODEL_SHARED_ACCESS = 16  # cycles of a scheduler in which shared memory serves an access of 16 bytes a thread
MODEL_LATENCY = 700.0  # cycles from a load to its data, which the next tile's loads take at the least
MODEL_BLOCK = 1500.0  # cycles to start a block, fill its first stage and store its results
MODEL_LAUNCH = 5000.0  # cycles of a second kernel; it has four parts in flight

MODEL_MMA = 6.35  # cycles of an mma instruction, of which each of a multiprocessor's four schedulers has its own unit
MODEL_REGISTERS = 65536
MODEL_SHARED = 227 * 1024

#: (tile_rows, tile_cols, tile_depth, thread_rows, thread_cols), from large to small; their transposes are tried too
MATMUL_TILES = (
    (256, 128, 16, 8, 16),
    (128, 128, 8, 8, 8),
    (128, 64, 8, 8, 8),
    (64, 64, 8, 8, 8),
    (64, 32, 8, 8, 4),
    (32, 32, 8, 4, 4),
    (128, 16, 8, 8, 4),
    (64, 16, 8, 8, 4),
    (128, 4, 8, 4, 4),
    (16, 16, 8, 4, 4),
)
#: what two stages may take of shared memory that a kernel declares
SHARED_BYTES = 49152

#: how float32 can be multiplied on tensor cores
TF32 = ("tf32", "tf32x3")
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


def _matmul_cost(plan: MatmulPlan) -> MatmulCost:
    """Cycles on the nominal GPU, when nothing else runs there."""
    sum_bytes = ITEM_BYTES[plan.accumulator]
    blocks = plan.tiles * plan.parts
    warps = _ceil(plan.threads, 32)
    # A warp's issue slots for one step of tile_depth, of which a float64 multiply-add takes two; or, if that is longer,
    # the cycles in which shared memory, which the four schedulers share, serves its accesses of 16 bytes a thread.
    fragments = (plan.thread_rows + plan.thread_cols) * sum_bytes // 16
    copies = _ceil((plan.tile_rows + plan.tile_cols) * plan.tile_depth * sum_bytes // 16, plan.threads)
    step = max(plan.tile_depth * (plan.thread_rows * plan.thread_cols * sum_bytes // 4 + fragments) + 4 * copies + 16,
               MODEL_SHARED_ACCESS * (plan.tile_depth * fragments + copies))
    # Blocks that share a multiprocessor share its four schedulers, and hide one another's latency.
    each = _ceil(blocks, MODEL_MULTIPROCESSORS)
    registers = plan.thread_rows * plan.thread_cols * sum_bytes // 4 + 64
    resident = max(min(each, MODEL_REGISTERS // (registers * warps * 32), 32), 1)
    steps = _ceil(min(plan.depth_per_part, max(plan.depth, 1)), plan.tile_depth)
    busy = max(step * _ceil(warps * resident, 4), MODEL_LATENCY)
    arithmetic = _ceil(each, resident) * (steps * busy + MODEL_BLOCK)
    return MatmulCost(arithmetic, _memory_cycles(plan), _parts_cycles(plan))


def _memory_cycles(plan: Tiling) -> float:
    operands = (plan.rows * plan.depth + plan.depth * plan.cols + plan.rows * plan.cols) * ITEM_BYTES[plan.dtype]
    return max((operands + 2 * plan.workspace_bytes) / MODEL_DRAM_BYTES,
               (plan.loaded_bytes + 2 * plan.workspace_bytes) / MODEL_L2_BYTES) / MODEL_MULTIPROCESSORS


def _parts_cycles(plan: Tiling) -> float:
    return MODEL_LAUNCH + plan.parts * MODEL_LATENCY / 4 if plan.parts > 1 else 0.0


def _tensor_core_cost(plan: TensorCorePlan) -> MatmulCost:
    """Cycles on the nominal GPU, when nothing else runs there."""
    warps, blocks = plan.threads // 32, plan.tiles * plan.parts
    # Instructions of a warp for a tile's two steps: products, fragments and what rounds them, copies, counting.
    products = 2 * plan.warp_rows // 16 * plan.warp_cols // 8
    fragments = 2 * (plan.warp_rows + plan.warp_cols) // 4  # registers
    copies = 4 * (plan.tile_rows + plan.tile_cols) // plan.threads
    products, rounding = {None: (products, 0), "tf32": (products, 2), "tf32x3": (3 * products, 6)}[plan.precision]
    issue = products + fragments // 4 + rounding * fragments + 3 * copies + 20
    each = _ceil(blocks, MODEL_MULTIPROCESSORS)
    registers = plan.sums + fragments + 40
    fitting = min(MODEL_REGISTERS // (registers * plan.threads), MODEL_SHARED // (plan.shared_bytes + 1024), 32)
    resident = max(min(each, fitting), 1)
    tiles = _ceil(min(plan.depth_per_part, max(plan.depth, 1)), plan.tile_depth)
    busy = max(max(products * MODEL_MMA, issue) * _ceil(warps * resident, 4), MODEL_LATENCY / (plan.stages - 1))
    arithmetic = _ceil(each, resident) * (tiles * busy + MODEL_BLOCK)
    return MatmulCost(arithmetic, _memory_cycles(plan), _parts_cycles(plan))


def transposed_tile(tile: tuple[int, int, int, int, int]) -> tuple[int, int, int, int, int]:
    """The tile of the transposed result. 8 x 16 results a thread stay so: 16 x 8 do not fit into 255 registers."""
    rows, cols, depth, thread_rows, thread_cols = tile
    if (thread_rows, thread_cols) == (8, 16) and rows % 16 == 0:
        return cols, rows, depth, thread_rows, thread_cols
    return cols, rows, depth, thread_cols, thread_rows


def matmul_candidates(rows: int, cols: int, depth: int, dtype: str) -> list[MatmulPlan]:
    """Every plan that plan_matmul chooses from."""
    double = dtype == "float64"
    tiles = dict.fromkeys(tile for r, c, k, i, j in MATMUL_TILES for tile in ((r, c, k, i, j), transposed_tile((r, c, k, i, j))))
    plans: list[MatmulPlan] = []
    for tile_rows, tile_cols, tile_depth, thread_rows, thread_cols in tiles:
        if double and thread_rows * thread_cols > 32:
            continue
        whole = MatmulPlan(rows, cols, depth, dtype, tile_rows, tile_cols, tile_depth, thread_rows, thread_cols,
                           _ceil(max(depth, 1), 2**30))
        plans += _cut_into_parts(whole)
    return plans


def tensor_core_candidates(rows: int, cols: int, depth: int, dtype: str, precision: str | None) -> list[TensorCorePlan]:
    """Every plan that plan_tensor_core chooses from."""
    tiles = dict.fromkeys(tile for r, c, i, j, stages in TENSOR_CORE_TILES
                          for tile in ((r, c, i, j, stages), (c, r, j, i, stages)))
    plans: list[TensorCorePlan] = []
    for tile_rows, tile_cols, warp_rows, warp_cols, stages in tiles:
        if warp_rows * warp_cols > 64 * (32 if precision == "tf32x3" else 64):
            continue
        plans += _cut_into_parts(TensorCorePlan(
            rows, cols, depth, dtype, precision, tile_rows, tile_cols, 64 // ITEM_BYTES[dtype], warp_rows, warp_cols, stages,
            _ceil(max(depth, 1), 2**30)))
    return plans


def _cut_into_parts(whole: Product) -> list[Product]:
    """The plan and those with more parts whose workspace is small beside the operands."""
    plans = [whole]
    input_bytes = (whole.rows + whole.cols) * whole.depth * ITEM_BYTES[whole.dtype]
    waves = {_ceil(number * MODEL_MULTIPROCESSORS, whole.tiles) for number in range(1, 9)} if whole.tiles else set()
    for parts in sorted(waves | {2, 3, 4, 6, 9}):
        if whole.parts < parts <= min(whole.depth // (MIN_TILES_OF_A_PART * whole.tile_depth), GRID_Y):
            plan = replace(whole, parts=parts)
            if 2 * plan.workspace_bytes <= max(input_bytes // 50, SMALL_WORKSPACE):
                plans.append(plan)
    return plans


def bias_rides_along(plan: MatmulPlan | TensorCorePlan) -> bool:
    """Whether adding dZ up within dL/dW's blocks is cheaper than reading it once more, by the model.

    The blocks of the first tile row spend about 2 % more instructions on it, and they end up to that much later.
    """
    cost = plan.cost
    extra = 0.02 * cost.arithmetic / _ceil(max(plan.rows, 1), plan.tile_rows)
    again = plan.depth * plan.cols * ITEM_BYTES[plan.dtype] / (MODEL_DRAM_BYTES * MODEL_MULTIPROCESSORS)
    return extra < again + MODEL_LAUNCH


#: a part is at least this many tile depths long
MIN_TILES_OF_A_PART = 4
#: workspace traffic in bytes that always may be spent; beyond it, at most 2 % of the operands
SMALL_WORKSPACE = 2**23


@lru_cache(maxsize=4096)
def plan_matmul(rows: int, cols: int, depth: int, dtype: str) -> MatmulPlan:
    """The plan for these sizes and this dtype: the fewest warps among those within 5 % of the model's best.

    Depends on nothing else, so that it is the same on every device. Fewer warps leave room for what runs beside them. A
    depth is cut only where that is cheaper than the best plan that leaves it whole, and then into enough parts for a
    GPU if there are such plans.
    """
    return _cheapest(matmul_candidates(rows, cols, depth, dtype))


@lru_cache(maxsize=4096)
def plan_tensor_core(rows: int, cols: int, depth: int, dtype: str, precision: str | None = None) -> TensorCorePlan:
    """The plan for these sizes, dtype and precision, chosen as by plan_matmul."""
    return _cheapest(tensor_core_candidates(rows, cols, depth, dtype, precision))


def _cheapest(candidates: list[Product]) -> Product:
    costs = {plan: plan.cost.total for plan in candidates}
    fewest = min(plan.parts for plan in costs)
    whole = min(cost for plan, cost in costs.items() if plan.parts == fewest)
    worthy = {plan: cost for plan, cost in costs.items() if plan.parts == fewest or cost < whole}
    good = [plan for plan, cost in worthy.items() if cost <= 1.05 * min(worthy.values())]

    def order(plan: Product) -> tuple[bool, int, int, float]:
        idle = plan.parts > fewest and prod(plan.grid) < MODEL_MULTIPROCESSORS
        return idle, prod(plan.grid) * _ceil(plan.threads, 32), plan.tile_rows * plan.tile_cols, costs[plan]

    return min(good, key=order)


def plan_product(rows: int, cols: int, depth: int, dtype: str, precision: str | None,
                 capability: tuple[int, int]) -> MatmulPlan | TensorCorePlan:
    """The plan for these sizes and dtype at a precision on a GPU of this compute capability.

    Depends on nothing else of the GPU than whether it has the instructions: from 8.0 on.

    Parameters
    ----------
    precision : None, "ieee", "tf32" or "tf32x3"
        "ieee" multiplies on FMA units, and is what None means for float32 and float64. float16 and bfloat16 go to
        tensor cores by default, where there are any with the instructions.

    Raises
    ------
    ValueError
        If precision is none of these.
    PlanError
        If the dtype cannot be multiplied so, or the GPU cannot do it.
    """
    if _on_tensor_cores(dtype, precision, capability):
        return plan_tensor_core(rows, cols, depth, dtype, precision if precision in TF32 else None)
    return plan_matmul(rows, cols, depth, dtype)


def _on_tensor_cores(dtype: str, precision: str | None, capability: tuple[int, int]) -> bool:
    half, able = dtype in ("float16", "bfloat16"), capability >= TENSOR_CORE_CAPABILITY
    if precision not in (None, "ieee", *TF32):
        raise ValueError(f'precision must be None, "ieee", "tf32" or "tf32x3"; got {precision!r}')
    if precision not in TF32:
        return precision is None and half and able
    if dtype != "float32":
        cure = "float16 and bfloat16 are multiplied exactly" if half else "float64 is multiplied as it is"
        raise PlanError(f'precision="{precision}" is a way to multiply float32; the inputs are {dtype} ({cure}: leave '
                        'precision out)')
    if not able:
        raise PlanError(f'precision="{precision}" needs compute capability 8.0; this GPU has '
                        f'{capability[0]}.{capability[1]} (take precision="ieee")')
    return True


def check_precision(plan: MatmulPlan | TensorCorePlan, precision: str | None, capability: tuple[int, int]) -> None:
    """Hold a user's plan to the precision that was asked for beside it, and to the GPU.

    Raises
    ------
    ValueError, PlanError
        As plan_product; PlanError too if the plan multiplies in another way, or with instructions that the GPU has not.
    """
    _on_tensor_cores(plan.dtype, precision, capability)
    own = plan.precision if isinstance(plan, TensorCorePlan) else "ieee"
    if precision not in (None, own):
        raise PlanError(f'plan multiplies with precision {own!r}, but precision={precision!r} was asked for (leave one '
                        'of them out)')
    if isinstance(plan, TensorCorePlan) and capability < TENSOR_CORE_CAPABILITY:
        raise PlanError("plan needs tensor cores of compute capability 8.0; this GPU has "
                        f"{capability[0]}.{capability[1]} (pass a MatmulPlan, or none)")


def _ceil(length: int, step: int) -> int:
    return -(-length // step)


#: How the matrix of (samples, outputs) lies in memory: outputs side by side; that without gaps between the samples; samples
#: side by side.
LAYOUTS = ("rows", "flat", "features_first")


@dataclass(frozen=True)
class BatchSumPlan:
    """How the sum over the samples of a matrix (samples, outputs) is computed.

    threads_x threads side by side read memory that lies side by side, `lanes` of such groups work in a block, each thread with
    `in_flight` times `vectors` loads of 16 bytes under way. Which field means what in detail is told by `explain`.
    """

    samples: int
    outputs: int
    dtype: str
    layout: str
    threads_x: int
    lanes: int
    in_flight: int
    samples_per_part: int
    vectors: int = 1
    runs_per_block: int = 1
    folders: int = 1
    compensated: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise PlanError(f"plan: dtype must be one of {', '.join(ITEM_BYTES)}; got {self.dtype!r}")
        if self.layout not in LAYOUTS:
            raise PlanError(f"plan: layout must be one of {', '.join(LAYOUTS)}; got {self.layout!r}")
        for name in ("threads_x", "lanes", "in_flight", "samples_per_part", "vectors", "runs_per_block", "folders"):
            if getattr(self, name) < 1:
                raise PlanError(f"plan: {name} must be at least 1; got {getattr(self, name)}")
        if self.threads > 1024:
            raise PlanError(f"plan: threads_x * lanes must be at most 1024; got {self.threads}")
        if self.tile * ITEM_BYTES[self.dtype] % (16 if self.layout == "flat" else 32) or self.tile < 2 * self.sector:
            raise PlanError(f"plan: a line of {self.tile} elements must be 64 bytes or a greater multiple of 32 (of 16 if flat)")
        if self.samples_per_part * self.period + (self.in_flight + 1) * self.tile >= 2 ** 31:
            raise PlanError(f"plan: a part of {self.samples_per_part} samples is too long for a block, which counts to 2^31")
        if self.layout != "rows" and self.folders * self.period > self.tile:
            raise PlanError(f"plan: folders times the period {self.period} must not exceed the line of {self.tile} elements")
        if self.parts > 65535:
            raise PlanError(f"plan: at most 65535 parts; got {self.parts}")
        if self.shared_bytes > 49152:
            raise PlanError(f"plan: at most 49152 bytes of shared memory; got {self.shared_bytes}")
        if self.layout == "rows":
            if self.lanes % self.sector and self.samples_per_part > self.lanes:
                raise PlanError(f"plan: lanes must be a multiple of {self.sector} or as many as samples_per_part; "
                                f"got {self.lanes}")
        elif self.layout == "flat":
            if self.lanes > 1 or self.runs_per_block > 1:
                raise PlanError("plan: a flat matrix is one run: lanes and runs_per_block must be 1")
            if self.tile % self.outputs or (self.parts > 1 and self.samples_per_part * self.outputs % self.tile):
                raise PlanError(f"plan: a line of {self.tile} elements must be a multiple of the {self.outputs} outputs, and "
                                "a part a multiple of lines")
        elif self.runs_per_block % self.lanes or (self.parts > 1 and self.samples_per_part % self.tile):
            raise PlanError(f"plan: runs_per_block must be a multiple of the {self.lanes} lanes, and a part one of lines of "
                            f"{self.tile}")

    @property
    def accumulator(self) -> str:
        """The type of the sums."""
        return accumulator_of(self.dtype)

    @property
    def vector(self) -> int:
        """Elements in a load of 16 bytes."""
        return 16 // ITEM_BYTES[self.dtype]

    @property
    def sector(self) -> int:
        """Elements in 32 bytes: what memory is moved in, and where shifted loads begin."""
        return 32 // ITEM_BYTES[self.dtype]

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.threads_x * self.lanes

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks the registers have to leave room for: the fewer sums a thread keeps, the more threads."""
        sums = self.vectors * self.vector * (1 + self.compensated) * ITEM_BYTES[self.accumulator] // 4
        light = sums <= 8 and _light(self.dtype, self.compensated)
        resident = 1536 if light else 1024 if sums <= 16 else 768 if sums <= 32 else 512
        return min(16, _ceil(resident, 32 * _ceil(self.threads, 32)))

    @property
    def tile(self) -> int:
        """Elements that threads_x threads read side by side."""
        return self.threads_x * self.vectors * self.vector

    @property
    def period(self) -> int:
        """Elements after which the columns repeat along a run."""
        return self.outputs if self.layout == "flat" else 1

    @property
    def parts(self) -> int:
        """Parts of the batch; more than one are added by a second launch."""
        return max(1, _ceil(self.samples, self.samples_per_part))

    @cached_property
    def second(self) -> BatchSumPlan | None:
        """The plan by which the parts are added, if there are several."""
        if self.parts == 1:
            return None
        return _one_part(self.parts * (1 + self.compensated), self.outputs, self.accumulator, self.compensated)

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks: (along the outputs, parts); of "rows", where all rows begin at a multiple of 32 bytes."""
        if self.layout == "rows":
            return _ceil(self.outputs, self.tile), self.parts
        return (1 if self.layout == "flat" else _ceil(self.outputs, self.runs_per_block)), self.parts

    @property
    def pitch(self) -> int:
        """Elements from one row of the workspace to the next."""
        size = 32 // ITEM_BYTES[self.accumulator]
        return _ceil(self.outputs, size) * size

    @property
    def workspace_bytes(self) -> int:
        """What the sums of the parts take, with what was lost by rounding if compensated."""
        if self.parts == 1:
            return 0
        return self.parts * (1 + self.compensated) * self.pitch * ITEM_BYTES[self.accumulator]

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        cells = self.lanes * self.line_pitch
        if self.layout != "rows":
            cells += self.folders * self.period * self.fold_pitch
        return cells * (1 + self.compensated) * ITEM_BYTES[self.accumulator]

    @property
    def line_pitch(self) -> int:
        """Cells from one lane's line of sums in shared memory to the next.

        Behind a line of "flat" or "features_first" is room for what shifts move there, and so much more that lanes which
        fold together meet other banks.
        """
        if self.layout == "rows":
            return self.tile
        banks, folded = 128 // ITEM_BYTES[self.accumulator], self.folders * self.period
        if self.lanes == 1:
            return self.tile + self.sector
        return self.tile + folded + max(0, _ceil(self.sector - folded, banks)) * banks

    @property
    def fold_pitch(self) -> int:
        """Cells from one folder's sums to the next folder's, likewise."""
        if self.lanes == 1:
            return 1
        together = max(1, 128 // ITEM_BYTES[self.accumulator] // self.folders)
        return together * (_ceil(self.lanes, together) | 1)

    @property
    def chain(self) -> int:
        """The longest chain of additions that one result goes through."""
        # Sums of sums take in what was lost beside each sum as well.
        halves = 1 + self.compensated
        if self.layout == "rows":
            chain = _ceil(self.samples_per_part, self.lanes) + halves * self.lanes
        else:
            copies = self.tile // self.period
            chain = _ceil(self.samples_per_part, copies) + halves * (_ceil(copies, self.folders) + self.folders)
        return chain + (self.second.chain if self.second else 0)

    def explain(self) -> str:
        """The plan in words, with reasons."""
        item = ITEM_BYTES[self.dtype]
        if self.layout == "rows":
            how = (f"{self.lanes} lanes of {self.threads_x} threads: a lane adds every {_nth(self.lanes)} sample of its part, "
                   f"{self.tile * item} contiguous bytes of it (32 fewer where rows begin between multiples of 32 "
                   f"bytes), {self.in_flight} samples in flight; the lanes are added in order")
        else:
            what = f"the samples of {self.runs_per_block} outputs, {self.lanes} of them at a time"
            if self.layout == "flat":
                what = f"the matrix as one run, whose columns repeat every {self.outputs} elements"
            how = (f"a block reads {what}, in lines of {self.tile * item} contiguous bytes, {self.in_flight} in "
                   f"flight; {self.folders} threads fold the sums of a line")
        lines = [f"sum of {self.samples} samples of {self.outputs} outputs, {self.dtype}, {self.layout}: each element "
                 f"read once, {self.samples * self.outputs * item} bytes",
                 how,
                 f"grid {self.grid[0]} x {self.grid[1]} blocks of {self.threads} threads, {self.shared_bytes} bytes of shared "
                 f"memory; registers for {self.blocks_per_multiprocessor} blocks a multiprocessor"]
        if self.second:
            lines.append(f"{self.parts} parts of {self.samples_per_part} samples, so that the blocks fill a GPU; a second "
                         f"launch adds them from a workspace of {self.workspace_bytes} bytes")
        rounding = f"{self.chain + 1} u sum |dz|"
        if self.compensated:
            lines.append("compensated: what additions round away is added up beside the sums, 7 additions for one")
            rounding = f"({self.chain + 1} u)^2 sum |dz|"
        lines.append(f"sums in {self.accumulator}; longest chain of additions {self.chain}: |error| <= {rounding}, "
                     "then the result is rounded")
        return "\n".join(lines)


#: Blocks of 256 threads for large sums: two at least for each of 132 multiprocessors, and six at most for each of 108.
LEAST_BLOCKS, MOST_BLOCKS = 280, 648
#: Loads of 16 bytes that a thread has under way: of 1,024 threads they fill the memory's pipe, 64 KiB on the largest GPUs.
IN_FLIGHT = 4
#: Up to so many elements, what counts is how few threads there are, not how much memory they have under way.
SMALL = 2 ** 14


@lru_cache(maxsize=4096)
def plan_batch_sum(samples: int, outputs: int, dtype: str, layout: str, compensated: bool = False) -> BatchSumPlan:
    """The plan for these sizes, this dtype and this layout (one of LAYOUTS)."""
    if not samples or not outputs:
        return replace(_one_part(samples or 1, outputs or 1, dtype, compensated), samples=samples, outputs=outputs)
    if layout == "features_first":
        return _plan_runs(samples, outputs, dtype, compensated)
    flat = _flat_threads(samples, outputs, dtype) if layout == "flat" else 0
    if flat:
        return _plan_flat(samples, outputs, dtype, flat, compensated)
    plan = _one_part(samples, outputs, dtype, compensated)
    if samples * outputs <= SMALL or plan.vectors > 1:
        return plan
    tiles, shifted_tiles = _ceil(outputs, plan.tile), _ceil(outputs, plan.tile - plan.sector)
    most = _most_blocks(samples * outputs, dtype, compensated)
    steps = _cut(_ceil(samples, plan.lanes), _ceil(_blocks(samples * outputs, most), tiles),
                 max(most // shifted_tiles, LEAST_BLOCKS // tiles))
    return replace(plan, samples_per_part=min(samples, steps * plan.lanes), in_flight=min(plan.in_flight, steps))


def _light(dtype: str, compensated: bool) -> bool:
    """Whether a vector's sums take so few registers that 1,536 threads fit on a multiprocessor, and not only 1,024."""
    return dtype != "float64" and not compensated


def _most_blocks(elements: int, dtype: str, compensated: bool) -> int:
    """As many blocks as 108 multiprocessors hold at once, where they have much to do: more were a small second wave."""
    fewer = MOST_BLOCKS * 2 // 3
    return MOST_BLOCKS if _light(dtype, compensated) or elements < 16384 * fewer else fewer


def _blocks(elements: int, most: int = MOST_BLOCKS) -> int:
    """How many blocks are worth their while: two for each of 132 multiprocessors from a million elements, most from nine."""
    return min(most * 8 // 9, max(min(LEAST_BLOCKS, _ceil(elements, 3584)), elements // 16384))


@lru_cache(maxsize=4096)
def log_sum_exp_block(samples: int, outputs: int, features_first: bool) -> tuple[int, int]:
    """(threads that add up one sample, samples of a block) for the log-sum-exp: more for each where there are few samples."""
    few = samples < 2048 and outputs >= 2048
    if features_first:
        return (32, 8) if few else (8, 32)
    return (256, 1) if few else (32, 8)


def plan_upstream(samples: int, outputs: int, dtype: str, layout: str) -> BatchSumPlan:
    """The plan for forming dZ of these sizes in one of LAYOUTS, and summing it on the way.

    A thread keeps the elements of two steps, so that 1,024 threads have as much under way as those of a sum.
    """
    vector, sector = 16 // ITEM_BYTES[dtype], 32 // ITEM_BYTES[dtype]
    rows, cols = max(samples, 1), max(outputs, 1)
    small = rows * cols <= SMALL
    threads = 64 if small else 256
    if layout == "features_first" or cols == 1:
        lanes = min(threads // 32, _power_of_two(cols))
        plan = BatchSumPlan(rows, cols, dtype, "features_first", 32, lanes, 2, rows, runs_per_block=lanes, folders=32)
        step, tiles = plan.tile, _ceil(cols, lanes)
    else:
        # Narrow rows take no more threads than reading them without a gap from one row to the next takes, but an even number.
        threads_x = max((cols // gcd(cols, vector) + 1) // 2 * 2, 4)
        lanes = max(threads // threads_x // sector, 1) * sector
        if cols > 128 or threads_x * lanes > 1024:
            threads_x = min(_power_of_two(_ceil(cols, vector)), threads // max(sector, 8))
            lanes = threads // threads_x
        plan = BatchSumPlan(rows, cols, dtype, "rows", threads_x, lanes, 2, rows)
        step, tiles = lanes, _ceil(cols, plan.tile)
    steps = _ceil(rows, step)
    if not small:
        steps = _cut(steps, _ceil(_blocks(rows * cols), tiles), MOST_BLOCKS // tiles)
    return replace(plan, samples=samples, outputs=outputs, samples_per_part=min(rows, steps * step))


def _cut(steps: int, wanted: int, most: int) -> int:
    """Steps of a part, so that about `wanted` parts result and at most `most`."""
    return max(1, _ceil(steps, max(most, 1)), steps // wanted)


def _one_part(samples: int, outputs: int, dtype: str, compensated: bool) -> BatchSumPlan:
    """The plan for rows, by a single launch."""
    vector, sector = 16 // ITEM_BYTES[dtype], 32 // ITEM_BYTES[dtype]
    small = samples * outputs <= SMALL
    needed = _power_of_two(_ceil(outputs + sector - 1, vector))
    if samples <= 64 and outputs > 16 * vector:
        # Few rows: several vectors of each under way, so that the bytes read twice at the seams of tiles are few.
        lanes = min(_power_of_two(samples), max(sector, 8))
        threads_x = min(max((64 if small else 128) // lanes, 8 if small else 16), needed)
        # Compensated halves keep 16 registers of sums a vector: with three of them too few threads would be left.
        vectors = 4 if dtype == "float64" else 2 if compensated and sector == 16 else 3
        return BatchSumPlan(samples, outputs, dtype, "rows", threads_x, lanes, 1, samples, vectors=vectors,
                            compensated=compensated)
    threads = 64 if small else 256
    threads_x = min(max(4, needed), threads // max(sector, 8))
    lanes = threads // threads_x
    return BatchSumPlan(samples, outputs, dtype, "rows", threads_x, lanes, min(_ceil(samples, lanes), IN_FLIGHT),
                        samples, compensated=compensated)


def _plan_runs(samples: int, outputs: int, dtype: str, compensated: bool) -> BatchSumPlan:
    """The plan for outputs whose samples lie side by side: runs as long as the batch."""
    vector = 16 // ITEM_BYTES[dtype]
    small = samples * outputs <= SMALL
    threads = 64 if small else 256
    threads_x = min(max(4 if small else 8, _power_of_two(samples // (4 * vector) // 2 + 1)), threads)
    lanes = min(threads // threads_x, _power_of_two(outputs))
    tile = threads_x * vector
    lines, groups = _ceil(samples, tile), _ceil(outputs, lanes)
    most = _most_blocks(samples * outputs, dtype, compensated)
    if not small:
        lines = _cut(lines, _ceil(_blocks(samples * outputs, most), groups), most // groups)
    return BatchSumPlan(samples, outputs, dtype, "features_first", threads_x, lanes, min(lines, IN_FLIGHT),
                        min(samples, lines * tile), runs_per_block=_ceil(groups, 32 if small else most) * lanes,
                        folders=_folders(tile), compensated=compensated)


def _plan_flat(samples: int, outputs: int, dtype: str, threads: int, compensated: bool) -> BatchSumPlan:
    """The plan for a narrow matrix without gaps: one run."""
    tile = threads * 16 // ITEM_BYTES[dtype]
    lines = _ceil(samples * outputs, tile)
    if samples * outputs > SMALL:
        most = _most_blocks(samples * outputs, dtype, compensated)
        lines = _cut(lines, _blocks(samples * outputs, most), most)
    return BatchSumPlan(samples, outputs, dtype, "flat", threads, 1, min(lines, IN_FLIGHT),
                        min(samples, lines * tile // outputs), folders=_folders(tile // outputs), compensated=compensated)


def _flat_threads(samples: int, outputs: int, dtype: str) -> int:
    """Threads whose vectors are a multiple of the outputs and of 32 bytes, with few idle lanes; 0 if there are none."""
    if outputs > 256:
        return 0
    unit = outputs // gcd(outputs, 16 // ITEM_BYTES[dtype])
    if samples * outputs <= SMALL:
        return 64 // unit * unit
    # Eight warps; an odd number of threads only if need be, since every other line then begins inside of 32 bytes.
    fitting = [256 // step * step for step in (unit * (1 + unit % 2), unit)]
    return next((threads for threads in fitting if threads > 7 * 32), 0)


def _folders(copies: int) -> int:
    """Threads that fold so many copies, so that neither they nor the one that adds them up has much to do."""
    return min(32, _power_of_two(isqrt(copies) // 2 + 1))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def _nth(number: int) -> str:
    return f"{number}{'th' if 10 < number % 100 < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
