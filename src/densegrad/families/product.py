"""Which plan a matrix product gets: the candidates of both kinds, and the choice among them by what they take."""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import inf, prod
from typing import TypeVar

from ..errors import PlanError
from ..facts import ITEM_BYTES
from ..slips import meant
from .common import GRID_Y, ceil_div, check_capability, check_choice, check_sizes, remembered
from .cost import BYTES_A_MICROSECOND, LAUNCH, MULTIPROCESSORS, ORDERS
from .matmul_hopper import HALF_TYPES, HOPPER, HopperPlan, counts, stages_of
from .matmul_simt import MATMUL_TILES, UNTRIED_TILES, MatmulPlan, transposed_tile
from .matmul_tensor_core import (
    FLOAT16_CAPABILITY,
    FLOAT64_CAPABILITIES,
    TENSOR_CORE_CAPABILITY,
    TENSOR_CORE_TILES,
    TensorCorePlan,
    fits,
    plan_of_tile,
)
from .matmul_tensor_core import transposed_tile as transposed_warp_tile
from .matmul_thin import THIN, ThinPlan, threads_of
from .tiling import TF32

ProductPlan = MatmulPlan | TensorCorePlan | ThinPlan | HopperPlan
#: the kinds of plans of products
PRODUCT_PLANS = (MatmulPlan, TensorCorePlan, ThinPlan, HopperPlan)
Chosen = TypeVar("Chosen", bound=MatmulPlan | TensorCorePlan | ThinPlan | HopperPlan)

#: a part is at least this many tile depths long
MIN_TILES_OF_A_PART = 4
#: what the parts of a product may take of memory at most, in bytes
MOST_WORKSPACE = 2**26
#: what counts for a plan whose depth is cut further than in any row, and for a thin one beside others, which no row
#: covers: it has to promise a tenth
EXTRAPOLATED = 1.1
#: how long Hopper's warps add a tile's columns up, of the time of its products, and for what share of that time tiles
#: are held up of which 32 share the adding: figures of a prototype of the kernel on an H100
ADDING, SHARED = 2.0, 0.03
#: rows of sums that are loaded at once by the lanes that add them, and microseconds until they come: nominal
ROWS_AT_ONCE, LOADED = 16 * 32, 0.5


@remembered
def plan_matmul(rows: int, cols: int, depth: int, dtype: str, order: str = "across") -> MatmulPlan:
    """The plan on FMA units for these sizes, this dtype and operands that both lie across the depth or along it.

    It is the candidate that takes least by the model that is fitted to an H200's rows, and the same on every device.
    """
    return _cheapest(matmul_candidates(rows, cols, depth, dtype), order)


@remembered
def plan_tensor_core(rows: int, cols: int, depth: int, dtype: str, precision: str | None = None,
                     capability: tuple[int, int] = TENSOR_CORE_CAPABILITY, *,
                     order: str = "across") -> TensorCorePlan:
    """The plan with instructions that this compute capability has, chosen as by plan_matmul."""
    check_capability(capability)
    return _cheapest(
        tensor_core_candidates(rows, cols, depth, dtype, precision, _instructions(dtype, capability)), order)


@lru_cache(maxsize=4096, typed=True)
def float64_parts(rows: int, cols: int, depth: int) -> int:
    """How many parts the depth of a float64 product is cut into.

    It follows from the sizes alone, so that kernels on FMA units and on tensor cores give the same bits: the number
    with which, by the nominal model, both together lose least over the numbers that are best for each.
    """
    kinds: list[list[ProductPlan]] = [[*_uncut_on_fma_units(rows, cols, depth, "float64")],
                                      [*_uncut_on_tensor_cores((rows, cols, depth), "float64", None)]]
    numbers = sorted({plan.parts for wholes in kinds for whole in wholes for plan in _cuts(whole)})
    losses = [0.0] * len(numbers)
    for wholes in kinds:
        least = [min(_microseconds(replace(whole, parts=parts)) for whole in wholes) for parts in numbers]
        losses = [lost + one / min(least) for lost, one in zip(losses, least, strict=True)]
    return numbers[losses.index(min(losses))]


@remembered
def plan_thin(rows: int, cols: int, depth: int, dtype: str, order: str = "across") -> ThinPlan:
    """The plan for a product of which one operand is thin, rows or cols being at most 8, chosen as by plan_matmul.

    No thin plan was measured: the model is a nominal one.
    """
    return _cheapest(thin_candidates(rows, cols, depth, dtype, order), order)


@remembered
def plan_hopper(rows: int, cols: int, depth: int, dtype: str, precision: str | None = None, *,
                order: str = "across") -> HopperPlan:
    """The plan with Hopper's own tensor-core instructions, for aligned operands, chosen as by plan_matmul.

    This kernel was not measured: the model is a nominal one.
    """
    return _cheapest(hopper_candidates(rows, cols, depth, dtype, precision), order)


def _cheapest(candidates: list[Chosen], order: str) -> Chosen:
    check_choice("order", order, ORDERS)
    costs = {}
    for plan in candidates:
        cost = plan.cost(order)
        if cost is not None:
            total = cost.total * (EXTRAPOLATED if cost.beyond else 1)
            costs[plan] = total, plan.parts, prod(plan.grid), plan.tile_rows * plan.tile_cols, plan.tile_rows
    return min(costs, key=costs.__getitem__)


def plan_product(rows: int, cols: int, depth: int, dtype: str, precision: str | None = None,
                 capability: tuple[int, int] = TENSOR_CORE_CAPABILITY, *, order: str = "across",
                 aligned: bool = True) -> ProductPlan:
    """The plan for these sizes and dtype at a precision on a GPU of this compute capability.

    Depends on nothing else of the GPU than whether it has the instructions: all from 8.0 on, float16's from 7.5 on;
    9.0 has more of them for half types, and those with which float64 is faster are on 8.0 and 9.0 alone.

    Parameters
    ----------
    precision : None, "ieee", "tf32" or "tf32x3"
        "ieee" multiplies on FMA units, and is what None means for float32. float16 and bfloat16 go to tensor cores by
        default, where there are any with the instructions; not where one operand is thin, and memory sets the time.
        float64 goes wherever it is faster by the model: the bits are the same.
    order : "across" or "along"
        How the operands lie in memory: contiguous across the depth, as for dL/dW of x and dz in C order, or both along
        it, as for dL/dX. Where one lies each way, "across".
    aligned : bool
        Whether both operands, and each of their rows, begin at multiples of 16 bytes, as Hopper's copies ask for.

    Raises
    ------
    ValueError
        If precision is none of these.
    PlanError
        If a size is negative, the dtype cannot be multiplied so, or the GPU cannot do it.
    """
    check_capability(capability)
    plans: list[ProductPlan] = []
    on_tensor_cores = _on_tensor_cores(dtype, precision, capability)
    if on_tensor_cores:
        plans.append(plan_tensor_core(rows, cols, depth, dtype, precision if precision in TF32 else None, capability,
                                      order=order))
    if not on_tensor_cores or dtype == "float64":
        plans.append(plan_matmul(rows, cols, depth, dtype, order))
    plan = min(plans, key=lambda plan: _microseconds(plan, order))
    if aligned and _may_be_hopper((rows, cols, depth), dtype, precision, capability):
        hopper = plan_hopper(rows, cols, depth, dtype, precision, order=order)
        if _microseconds(hopper, order) * EXTRAPOLATED < _microseconds(plan, order):
            plan = hopper
    if _may_be_thin(rows, cols, dtype, precision, on_tensor_cores):
        thin = plan_thin(rows, cols, depth, dtype, order)
        if _microseconds(thin, order) * EXTRAPOLATED < _microseconds(plan, order):
            return thin
    return plan


def _microseconds(plan: ProductPlan, order: str = ORDERS[0]) -> float:
    """What the plan takes, if its tile was measured."""
    cost = plan.cost(order)
    return inf if cost is None else cost.total


def product_candidates(rows: int, cols: int, depth: int, dtype: str, precision: str | None = None,
                       capability: tuple[int, int] = TENSOR_CORE_CAPABILITY, *, order: str = "across",
                       aligned: bool = True) -> list[ProductPlan]:
    """Every plan that plan_product chooses from, of all kinds."""
    check_capability(capability)
    plans: list[ProductPlan] = []
    on_tensor_cores = _on_tensor_cores(dtype, precision, capability)
    if on_tensor_cores:
        plans += tensor_core_candidates(rows, cols, depth, dtype, precision if precision in TF32 else None,
                                        _instructions(dtype, capability))
    if not on_tensor_cores or dtype == "float64":
        plans += matmul_candidates(rows, cols, depth, dtype)
    if aligned and _may_be_hopper((rows, cols, depth), dtype, precision, capability):
        plans += hopper_candidates(rows, cols, depth, dtype, precision)
    if _may_be_thin(rows, cols, dtype, precision, on_tensor_cores):
        plans += thin_candidates(rows, cols, depth, dtype, order)
    return plans


def _may_be_hopper(sizes: tuple[int, int, int], dtype: str, precision: str | None,
                   capability: tuple[int, int]) -> bool:
    """Whether a plan with Hopper's own instructions is among the choices."""
    able = dtype in HALF_TYPES if precision is None else precision in TF32
    return capability == HOPPER and able and counts(sizes, precision)


def _may_be_thin(rows: int, cols: int, dtype: str, precision: str | None, on_tensor_cores: bool) -> bool:
    """Whether a thin plan is among the choices: of half types only beside tensor cores.

    None of float64: the cut of its depth and whether db rides along follow from the sizes alone.
    """
    return min(rows, cols) <= THIN and dtype != "float64" and (
        precision not in TF32 if dtype == "float32" else on_tensor_cores)


def _instructions(dtype: str, capability: tuple[int, int]) -> tuple[int, int]:
    """The first compute capability that has those instructions of tensor cores which this one has."""
    if dtype == "float64" and capability >= FLOAT64_CAPABILITIES[-1]:
        return FLOAT64_CAPABILITIES[-1]
    return TENSOR_CORE_CAPABILITY if capability >= TENSOR_CORE_CAPABILITY else FLOAT16_CAPABILITY


def _on_tensor_cores(dtype: str, precision: str | None, capability: tuple[int, int]) -> bool:
    half = dtype in ("float16", "bfloat16")
    able = capability >= (FLOAT16_CAPABILITY if dtype == "float16" else TENSOR_CORE_CAPABILITY)
    check_known(precision)
    if precision not in TF32:
        if dtype == "float64":
            return capability in FLOAT64_CAPABILITIES
        return precision is None and half and able
    if dtype != "float32":
        cure = "float16 and bfloat16 are multiplied exactly" if half else "float64 is multiplied as it is"
        raise PlanError(f'precision="{precision}" is a way to multiply float32; the inputs are {dtype} ({cure}: leave '
                        'precision out)')
    if not able:
        raise PlanError(f'precision="{precision}" needs compute capability 8.0 or newer; this GPU has '
                        f'{capability[0]}.{capability[1]} (take precision="ieee")')
    return True


def check_known(precision: str | None) -> None:
    """Hold a precision to those that there are.

    Raises
    ------
    ValueError
        If it is none of them.
    """
    if precision not in (None, "ieee", *TF32):
        raise ValueError(f'precision must be None, "ieee", "tf32" or "tf32x3"; got {precision!r}'
                         f"{meant(precision, ('ieee', *TF32))}")


def check_precision(plan: ProductPlan, precision: str | None, capability: tuple[int, int]) -> None:
    """Hold a user's plan to the precision that was asked for beside it, and to the GPU.

    Raises
    ------
    ValueError, PlanError
        As plan_product; PlanError too if the plan multiplies in another way, or with instructions that the GPU has not.
    """
    check_capability(capability)
    _on_tensor_cores(plan.dtype, precision, capability)
    own = "ieee" if plan.dtype == "float64" else plan.precision
    if precision not in (None, own):
        how = "exactly on tensor cores" if own is None else f"with precision {own!r}"
        raise PlanError(f"plan multiplies {how}, but precision={precision!r} was asked for (leave one of them out)")
    if isinstance(plan, HopperPlan) and capability != HOPPER:
        raise PlanError("plan needs a GPU of compute capability {}.{}; this one has {}.{} (pass a TensorCorePlan, or "
                        "none)".format(*HOPPER, *capability))
    if isinstance(plan, TensorCorePlan) and capability < plan.capability:
        raise PlanError("plan needs tensor cores of compute capability {}.{}; this GPU has {}.{} (pass a MatmulPlan, "
                        "or none)".format(*plan.capability, *capability))


def matmul_candidates(rows: int, cols: int, depth: int, dtype: str) -> list[MatmulPlan]:
    """Every plan that plan_matmul chooses from, and those with tiles that nobody measured, which it leaves alone."""
    check_sizes(rows=rows, cols=cols, depth=depth)
    return [plan for whole in _uncut_on_fma_units(rows, cols, depth, dtype) for plan in _cut_into_parts(whole)]


def _uncut_on_fma_units(rows: int, cols: int, depth: int, dtype: str) -> list[MatmulPlan]:
    """The plan with each tile, in as few parts as can be."""
    double = dtype == "float64"
    listed = MATMUL_TILES if double else MATMUL_TILES + UNTRIED_TILES
    tiles = dict.fromkeys(tile for one in listed for tile in (one, transposed_tile(one)))
    return [MatmulPlan(rows, cols, depth, dtype, tile_rows, tile_cols, tile_depth=tile_depth, thread_rows=thread_rows,
                       thread_cols=thread_cols, parts=_least_parts(depth))
            for tile_rows, tile_cols, tile_depth, thread_rows, thread_cols in tiles
            if not double or thread_rows * thread_cols <= 32]


def tensor_core_candidates(rows: int, cols: int, depth: int, dtype: str, precision: str | None,
                           capability: tuple[int, int] = TENSOR_CORE_CAPABILITY) -> list[TensorCorePlan]:
    """Every plan that plan_tensor_core chooses from."""
    check_sizes(rows=rows, cols=cols, depth=depth)
    check_capability(capability)
    return [plan for whole in _uncut_on_tensor_cores((rows, cols, depth), dtype, precision, capability)
            for plan in _cut_into_parts(whole)]


def _uncut_on_tensor_cores(sizes: tuple[int, int, int], dtype: str, precision: str | None,
                           capability: tuple[int, int] = TENSOR_CORE_CAPABILITY) -> list[TensorCorePlan]:
    """The plan with each tile for rows, cols and depth, in as few parts as can be."""
    tiles = dict.fromkeys(tile for one in TENSOR_CORE_TILES if fits(one, dtype, precision)
                          for tile in (one, transposed_warp_tile(one)))
    return [plan_of_tile(*sizes, dtype, precision, tile, capability=capability, parts=_least_parts(sizes[-1]))
            for tile in tiles]


def hopper_candidates(rows: int, cols: int, depth: int, dtype: str, precision: str | None = None) -> list[HopperPlan]:
    """Every plan that plan_hopper chooses from."""
    return [plan for tile_cols in stages_of(precision) for plan in _cut_into_parts(
        HopperPlan(rows, cols, depth, dtype, tile_cols, parts=_least_parts(depth), precision=precision))]


def thin_candidates(rows: int, cols: int, depth: int, dtype: str, order: str) -> list[ThinPlan]:
    """Every plan that plan_thin chooses from."""
    check_sizes(rows=rows, cols=cols, depth=depth)
    check_choice("dtype", dtype, ITEM_BYTES)
    check_choice("order", order, ORDERS)
    plans: list[ThinPlan] = []
    for across, along in threads_of(order, dtype, max(rows, cols), depth):
        plans += _cut_into_parts(ThinPlan(rows, cols, depth, dtype, across, along, parts=_least_parts(depth)))
    return plans


def _least_parts(depth: int) -> int:
    """How many parts there must be."""
    return ceil_div(max(depth, 1), 2**30)


def _cut_into_parts(whole: Chosen) -> list[Chosen]:
    """The plan in each number of parts that it may have, which of float64 is one."""
    if whole.dtype == "float64":
        return [replace(whole, parts=float64_parts(whole.rows, whole.cols, whole.depth))]
    return _cuts(whole)


def _cuts(whole: Chosen) -> list[Chosen]:
    """The plan and those with more parts, none of them empty, whose workspace is within its bound."""
    waves = {ceil_div(number * MULTIPROCESSORS, whole.tiles) for number in range(1, 9)} if whole.tiles else set()
    most = min(whole.depth // (MIN_TILES_OF_A_PART * whole.tile_depth), GRID_Y)
    filled = {whole.filled_parts(wanted) for wanted in waves | {2, 3, 4, 6, 9} if whole.parts < wanted <= most}
    more = (replace(whole, parts=parts) for parts in sorted(filled - {whole.parts}))
    return [whole, *(plan for plan in more if plan.workspace_bytes <= MOST_WORKSPACE)]


def bias_rides_along(plan: ProductPlan) -> bool:
    """Whether adding dZ up within dL/dW's blocks is cheaper than reading it once more, by the model.

    The blocks of the first tile row spend about 2 % more instructions on it on FMA units, 10 % on tensor cores, and
    end up to that much later. Hopper's kernel has warps for it, which would take twice as long as the products do: n
    tile rows share it, and a second launch adds the rows of sums. Of float64 it always rides along, whatever kernel
    runs: so db's bits follow from the sizes.
    """
    if isinstance(plan, ThinPlan) and plan.rows > THIN:
        return False
    if plan.dtype == "float64":
        return True
    cost = plan.cost("across")
    if cost is None:
        return True
    tile_rows = ceil_div(max(plan.rows, 1), plan.tile_rows)
    if isinstance(plan, HopperPlan):
        extra = cost.loop * max(ADDING / tile_rows - 1, SHARED) + LAUNCH
        extra += LOADED * ceil_div(plan.rows_of_sums(of_left=False), ROWS_AT_ONCE)
    else:
        extra = cost.loop * (0.1 if isinstance(plan, TensorCorePlan) else 0.02) / tile_rows
    again = plan.depth * plan.cols * ITEM_BYTES[plan.dtype] / BYTES_A_MICROSECOND
    return extra < again + LAUNCH
