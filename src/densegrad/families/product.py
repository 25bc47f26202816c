"""Which plan a matrix product gets: the candidates of both kinds, and the choice among them by the model."""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import TypeVar

from ..errors import PlanError
from ..facts import ITEM_BYTES
from .common import GRID_Y, ceil_div, check_sizes
from .matmul_simt import MATMUL_TILES, MatmulPlan, transposed_tile
from .matmul_tensor_core import (
    FLOAT16_CAPABILITY,
    TENSOR_CORE_CAPABILITY,
    TENSOR_CORE_TILES,
    TF32,
    TensorCorePlan,
    plan_of_tile,
)
from .tiling import MODEL_DRAM_BYTES, MODEL_LAUNCH, MODEL_MULTIPROCESSORS

ProductPlan = MatmulPlan | TensorCorePlan
Chosen = TypeVar("Chosen", MatmulPlan, TensorCorePlan)

#: a part is at least this many tile depths long
MIN_TILES_OF_A_PART = 4
#: workspace traffic in bytes that always may be spent; beyond it, at most 2 % of the operands
SMALL_WORKSPACE = 2**23


@lru_cache(maxsize=4096, typed=True)
def plan_matmul(rows: int, cols: int, depth: int, dtype: str) -> MatmulPlan:
    """The plan for these sizes and this dtype: the fewest warps among those within 5 % of the model's best.

    Depends on nothing else, so that it is the same on every device. Fewer warps leave room for what runs beside them. A
    depth is cut only where that is cheaper than the best plan that leaves it whole, and then into enough parts for a
    GPU if there are such plans.
    """
    return _cheapest(matmul_candidates(rows, cols, depth, dtype))


@lru_cache(maxsize=4096, typed=True)
def plan_tensor_core(rows: int, cols: int, depth: int, dtype: str, precision: str | None = None,
                     capability: tuple[int, int] = TENSOR_CORE_CAPABILITY) -> TensorCorePlan:
    """The plan with instructions that this compute capability has, chosen as by plan_matmul."""
    _check_capability(capability)
    instructions = TENSOR_CORE_CAPABILITY if capability >= TENSOR_CORE_CAPABILITY else FLOAT16_CAPABILITY
    return _cheapest(tensor_core_candidates(rows, cols, depth, dtype, precision, instructions))


def _cheapest(candidates: list[Chosen]) -> Chosen:
    costs = {plan: plan.cost.total for plan in candidates}
    fewest = min(plan.parts for plan in costs)
    whole = min(cost for plan, cost in costs.items() if plan.parts == fewest)
    worthy = {plan: cost for plan, cost in costs.items() if plan.parts == fewest or cost < whole}
    good = [plan for plan, cost in worthy.items() if cost <= 1.05 * min(worthy.values())]

    def order(plan: Chosen) -> tuple[bool, int, int, float]:
        idle = plan.parts > fewest and prod(plan.grid) < MODEL_MULTIPROCESSORS
        return idle, prod(plan.grid) * ceil_div(plan.threads, 32), plan.tile_rows * plan.tile_cols, costs[plan]

    return min(good, key=order)


def plan_product(rows: int, cols: int, depth: int, dtype: str, precision: str | None = None,
                 capability: tuple[int, int] = TENSOR_CORE_CAPABILITY) -> ProductPlan:
    """The plan for these sizes and dtype at a precision on a GPU of this compute capability.

    Depends on nothing else of the GPU than whether it has the instructions: all from 8.0 on, float16's from 7.5 on.

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
        If a size is negative, the dtype cannot be multiplied so, or the GPU cannot do it.
    """
    _check_capability(capability)
    if _on_tensor_cores(dtype, precision, capability):
        return plan_tensor_core(rows, cols, depth, dtype, precision if precision in TF32 else None, capability)
    return plan_matmul(rows, cols, depth, dtype)


def _check_capability(capability: tuple[int, int]) -> None:
    if not isinstance(capability, tuple) or [*map(type, capability)] != [int, int]:
        raise PlanError(f"capability must be a tuple of two ints, such as (9, 0); got {capability!r}")


def _on_tensor_cores(dtype: str, precision: str | None, capability: tuple[int, int]) -> bool:
    half = dtype in ("float16", "bfloat16")
    able = capability >= (FLOAT16_CAPABILITY if dtype == "float16" else TENSOR_CORE_CAPABILITY)
    if precision not in (None, "ieee", *TF32):
        raise ValueError(f'precision must be None, "ieee", "tf32" or "tf32x3"; got {precision!r}')
    if precision not in TF32:
        return precision is None and half and able
    if dtype != "float32":
        cure = "float16 and bfloat16 are multiplied exactly" if half else "float64 is multiplied as it is"
        raise PlanError(f'precision="{precision}" is a way to multiply float32; the inputs are {dtype} ({cure}: leave '
                        'precision out)')
    if not able:
        raise PlanError(f'precision="{precision}" needs compute capability 8.0 or newer; this GPU has '
                        f'{capability[0]}.{capability[1]} (take precision="ieee")')
    return True


def check_precision(plan: ProductPlan, precision: str | None, capability: tuple[int, int]) -> None:
    """Hold a user's plan to the precision that was asked for beside it, and to the GPU.

    Raises
    ------
    ValueError, PlanError
        As plan_product; PlanError too if the plan multiplies in another way, or with instructions that the GPU has not.
    """
    _on_tensor_cores(plan.dtype, precision, capability)
    own = plan.precision if isinstance(plan, TensorCorePlan) else "ieee"
    if precision not in (None, own):
        how = "exactly on tensor cores" if own is None else f"with precision {own!r}"
        raise PlanError(f"plan multiplies {how}, but precision={precision!r} was asked for (leave one of them out)")
    if isinstance(plan, TensorCorePlan) and capability < plan.capability:
        raise PlanError("plan needs tensor cores of compute capability {}.{}; this GPU has {}.{} (pass a MatmulPlan, "
                        "or none)".format(*plan.capability, *capability))


def matmul_candidates(rows: int, cols: int, depth: int, dtype: str) -> list[MatmulPlan]:
    """Every plan that plan_matmul chooses from."""
    check_sizes(rows=rows, cols=cols, depth=depth)
    double = dtype == "float64"
    tiles = dict.fromkeys(tile for listed in MATMUL_TILES for tile in (listed, transposed_tile(listed)))
    plans: list[MatmulPlan] = []
    for tile_rows, tile_cols, tile_depth, thread_rows, thread_cols in tiles:
        if double and thread_rows * thread_cols > 32:
            continue
        whole = MatmulPlan(rows, cols, depth, dtype, tile_rows, tile_cols, tile_depth, thread_rows, thread_cols,
                           ceil_div(max(depth, 1), 2**30))
        plans += _cut_into_parts(whole)
    return plans


def tensor_core_candidates(rows: int, cols: int, depth: int, dtype: str, precision: str | None,
                           capability: tuple[int, int] = TENSOR_CORE_CAPABILITY) -> list[TensorCorePlan]:
    """Every plan that plan_tensor_core chooses from."""
    check_sizes(rows=rows, cols=cols, depth=depth)
    tiles = dict.fromkeys(tile for r, c, i, j, stages in TENSOR_CORE_TILES
                          for tile in ((r, c, i, j, stages), (c, r, j, i, stages)))
    plans: list[TensorCorePlan] = []
    parts = ceil_div(max(depth, 1), 2**30)
    for tile in tiles:
        if tile[2] * tile[3] <= 64 * (32 if precision == "tf32x3" else 64):
            plans += _cut_into_parts(plan_of_tile(rows, cols, depth, dtype, precision, tile, capability, parts))
    return plans


def _cut_into_parts(whole: Chosen) -> list[Chosen]:
    """The plan and those with more parts whose workspace is small beside the operands."""
    plans = [whole]
    input_bytes = (whole.rows + whole.cols) * whole.depth * ITEM_BYTES[whole.dtype]
    waves = {ceil_div(number * MODEL_MULTIPROCESSORS, whole.tiles) for number in range(1, 9)} if whole.tiles else set()
    for parts in sorted(waves | {2, 3, 4, 6, 9}):
        if whole.parts < parts <= min(whole.depth // (MIN_TILES_OF_A_PART * whole.tile_depth), GRID_Y):
            plan = replace(whole, parts=parts)
            if 2 * plan.workspace_bytes <= max(input_bytes // 50, SMALL_WORKSPACE):
                plans.append(plan)
    return plans


def bias_rides_along(plan: ProductPlan) -> bool:
    """Whether adding dZ up within dL/dW's blocks is cheaper than reading it once more, by the model.

    The blocks of the first tile row spend about 2 % more instructions on it on FMA units, 10 % on tensor cores, and
    end up to that much later.
    """
    cost = plan.cost
    share = 0.1 if isinstance(plan, TensorCorePlan) else 0.02
    extra = share * cost.arithmetic / ceil_div(max(plan.rows, 1), plan.tile_rows)
    again = plan.depth * plan.cols * ITEM_BYTES[plan.dtype] / (MODEL_DRAM_BYTES * MODEL_MULTIPROCESSORS)
    return extra < again + MODEL_LAUNCH
