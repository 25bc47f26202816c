"""Plans: how a gradient is computed, as printable values. Pure: shapes and dtypes in, a frozen dataclass out.

A plan never looks at a device. Those of products on tensor cores also follow from a stated compute capability; all
others give the same bits on every GPU.
"""
from .facts import ITEM_BYTES, accumulator_of
from .families.batch_sum import LAYOUTS, BatchSumPlan, batch_sum_candidates, plan_batch_sum
from .families.common import GRID_Y, check_plan
from .families.cost import ProductCost
from .families.cross_entropy import CrossEntropyPlan, plan_cross_entropy
from .families.matmul_hopper import HOPPER, HOPPER_STAGES, HopperPlan
from .families.matmul_simt import MATMUL_TILES, SHARED_BYTES, MatmulPlan, transposed_tile
from .families.matmul_tensor_core import (
    DYNAMIC_SHARED_BYTES,
    FLOAT16_CAPABILITY,
    FLOAT64_CAPABILITIES,
    TENSOR_CORE_CAPABILITY,
    TENSOR_CORE_TILES,
    TensorCorePlan,
    plan_of_tile,
)
from .families.matmul_thin import THIN, ThinPlan
from .families.product import (
    bias_rides_along,
    check_precision,
    hopper_candidates,
    matmul_candidates,
    plan_hopper,
    plan_matmul,
    plan_product,
    plan_tensor_core,
    plan_thin,
    product_candidates,
    tensor_core_candidates,
    thin_candidates,
)
from .families.tiling import TF32, Tiling
from .families.upstream import ACTIVATIONS, CROSS_ENTROPY, UpstreamPlan, log_sum_exp_block, plan_upstream

__all__ = [
    "ACTIVATIONS",
    "CROSS_ENTROPY",
    "DYNAMIC_SHARED_BYTES",
    "FLOAT16_CAPABILITY",
    "FLOAT64_CAPABILITIES",
    "GRID_Y",
    "HOPPER",
    "HOPPER_STAGES",
    "ITEM_BYTES",
    "LAYOUTS",
    "MATMUL_TILES",
    "SHARED_BYTES",
    "TENSOR_CORE_CAPABILITY",
    "TENSOR_CORE_TILES",
    "TF32",
    "THIN",
    "BatchSumPlan",
    "CrossEntropyPlan",
    "HopperPlan",
    "MatmulPlan",
    "ProductCost",
    "TensorCorePlan",
    "ThinPlan",
    "Tiling",
    "UpstreamPlan",
    "accumulator_of",
    "batch_sum_candidates",
    "bias_rides_along",
    "check_plan",
    "check_precision",
    "hopper_candidates",
    "log_sum_exp_block",
    "matmul_candidates",
    "plan_batch_sum",
    "plan_cross_entropy",
    "plan_hopper",
    "plan_matmul",
    "plan_of_tile",
    "plan_product",
    "plan_tensor_core",
    "plan_thin",
    "plan_upstream",
    "product_candidates",
    "tensor_core_candidates",
    "thin_candidates",
    "transposed_tile",
]
