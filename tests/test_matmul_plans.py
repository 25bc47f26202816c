"""Which plan a product gets: its choice against plans that were measured on a GPU, and when it cuts the depth."""
import csv
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import densegrad
from densegrad.families.cost import ORDERS, cost_of
from densegrad.families.matmul_simt import UNTRIED_TILES
from densegrad.families.product import MOST_WORKSPACE
from densegrad.layers import LAYERS
from densegrad.plans import (
    MATMUL_TILES,
    TENSOR_CORE_TILES,
    MatmulPlan,
    matmul_candidates,
    plan_matmul,
    plan_of_tile,
    plan_product,
    plan_tensor_core,
)
from densegrad.testing import check_within, expected, normal

MEASURED = Path(__file__).parent.parent / "benchmarks" / "results" / "nvidia-h200-2026-11-27-05b0320-plans.csv"
CUBLAS = MEASURED.with_name("nvidia-h200-2026-11-27-05b0320-cublas.csv")
ORDER = dict(zip(("dw", "dx"), ORDERS, strict=True))
KINDS = {"float32": ("float32", None), "bfloat16": ("bfloat16", None), "tf32": ("float32", "tf32"),
         "tf32x3": ("float32", "tf32x3")}
#: (tile_rows, tile_cols, warp_rows, warp_cols) -> the tile with its stages
TENSOR_CORE = {tile[:4]: tile for rows, cols, i, j, stages in TENSOR_CORE_TILES
               for tile in ((rows, cols, i, j, stages), (cols, rows, j, i, stages))}

#: (rows, cols, depth) of dL/dW and of dL/dX for each layer
PRODUCTS = {f"{name}, {gradient}": sizes for name, (samples, inputs, outputs) in LAYERS.items()
            for gradient, sizes in (("dw", (inputs, outputs, samples)), ("dx", (samples, inputs, outputs)))}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured(kind, operation):
    """layer -> {plan: microseconds}, of the rows that nothing disturbed."""
    found = {}
    for row in rows_of(MEASURED):
        if (row["kind"], row["operation"], row["disturbed"]) == (kind, operation, "0"):
            tile = [int(row[name]) for name in ("tile_rows", "tile_cols", "tile_depth", "unit_rows", "unit_cols")]
            sizes, parts = PRODUCTS[f"{row['layer']}, {operation}"], int(row["parts"])
            plan = MatmulPlan(*sizes, "float32", *tile, parts) if kind == "float32" else plan_of_tile(
                *sizes, *KINDS[kind], TENSOR_CORE[tile[0], tile[1], tile[3], tile[4]], parts=parts)
            found.setdefault(row["layer"], {})[plan] = float(row["us"])
    return found


def chosen_of(plans, operation):
    """The one of these plans that the model chooses."""
    return min(plans, key=lambda plan: cost_of(plan, ORDER[operation]).total)


@pytest.mark.parametrize("operation", ORDER)
@pytest.mark.parametrize("kind", KINDS)
def test_of_the_plans_that_were_measured_the_choice_is_near_the_fastest(kind, operation):
    lost = {}
    for layer, us in measured(kind, operation).items():
        lost[layer] = us[chosen_of(us, operation)] / min(us.values())
    assert statistics.geometric_mean(lost.values()) <= 1.04
    assert max(lost[layer] for layer in lost if min(LAYERS[layer]) > 8) <= 1.25


@pytest.mark.parametrize(("operation", "least"), [("dw", 0.86), ("dx", 1.02)])
def test_the_measured_choice_in_float32_beside_cublas(operation, least):
    cublas = {row["layer"]: float(row["us"]) for row in rows_of(CUBLAS)
              if (row["kind"], row["operation"]) == ("float32", operation)}
    ratios = [cublas[layer] / us[chosen_of(us, operation)] for layer, us in measured("float32", operation).items()]
    assert statistics.geometric_mean(ratios) >= least


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_no_part_is_empty_and_the_workspace_has_a_bound(name, dtype):
    sizes = PRODUCTS[name]
    plans = [*matmul_candidates(*sizes, dtype), plan_product(*sizes, dtype, order=ORDER[name[-2:]])]
    for plan in plans:
        assert plan.depth_per_part * (plan.parts - 1) < max(plan.depth, 1)
        assert plan.workspace_bytes <= MOST_WORKSPACE
    assert 9 not in {plan.parts for plan in matmul_candidates(8, 8, 512, dtype) if plan.tile_depth == 8}


@pytest.mark.parametrize("order", ORDERS)
def test_a_cut_beyond_all_rows_has_to_promise_a_tenth(order):
    for sizes in PRODUCTS.values():
        chosen = plan_matmul(*sizes, "float32", order)
        cost = cost_of(chosen, order)
        if cost.beyond:
            others = [cost_of(plan, order) for plan in matmul_candidates(*sizes, "float32")]
            assert 1.1 * cost.total <= min(other.total for other in others if other and not other.beyond)
            assert "not measured" in chosen.explain()


def test_the_largest_tile_on_fma_units_is_left_to_weight_gradients():
    """For dL/dX it runs at the limit of registers, where their banks conflict: measured, 40 instead of 51 TFLOP/s."""
    draw, chosen = np.random.default_rng(0), {order: set() for order in ORDERS}
    for _ in range(500):
        sizes = [int(size) for size in 2 ** draw.uniform(8, 15, 3)]
        for order in ORDERS:
            plan = plan_matmul(*sizes, "float32", order)
            chosen[order].add((plan.tile_rows * plan.tile_cols, plan.thread_rows * plan.thread_cols))
    assert (256 * 128, 8 * 16) in chosen["across"] - chosen["along"]


@pytest.mark.parametrize("name", ["tall and narrow, dw", "tall and square, dw"])
def test_a_long_batch_fills_a_gpu(name):
    plan = plan_matmul(*PRODUCTS[name], "float32")
    assert plan.grid[0] * plan.grid[1] * plan.grid[2] >= 132


@pytest.mark.parametrize("sizes", [(4096, 4096, 1), (1, 4096, 4096), (4096, 1, 4096), (1, 1, 100_000), (1, 1, 1)])
def test_vectors_get_tiles_of_their_shape(sizes):
    """No tile is over 16 times as long as a side of length 1 beside a longer one; explain says what product it is."""
    plan = plan_matmul(*sizes, "float32")
    for size, tile in zip(sizes[:2], (plan.tile_rows, plan.tile_cols), strict=True):
        assert size > 1 or tile <= 16 or max(sizes[:2]) == 1
    kind = "outer product" if sizes[2] == 1 else "matrix and vector" if 1 in sizes[:2] else ""
    assert kind in plan.explain()


def test_explain_gives_the_reasons():
    text = plan_matmul(128, 128, 1_000_003, "float32").explain()
    for reason in ("FMA units", "results a thread", "parts of", "workspace", "longest chain", "measured plans"):
        assert reason in text
    assert "the depth is not cut" in plan_matmul(4096, 4096, 4096, "float32").explain()
    for unmeasured in (plan_matmul(64, 64, 64, "float64"), plan_tensor_core(64, 64, 64, "float16"),
                       plan_matmul(64, 64, 64, "bfloat16")):
        assert unmeasured.explain().count("not measured") == 2


@pytest.mark.parametrize(("wrong", "told"), [
    ({"tile_rows": 24}, "tile_rows must be a power of two; got 24"),
    ({"thread_rows": 2}, "thread_rows must be between 4 and tile_rows, 128; got 2"),
    ({"thread_cols": 256}, "thread_cols must be between 4 and tile_cols, 128; got 256"),
    ({"tile_depth": 2}, "tile_depth must be at least 4; got 2"),
    ({"thread_rows": 4, "thread_cols": 4, "tile_rows": 256}, "at most 1024 threads; got tiles for 2048"),
    ({"tile_depth": 64}, "at most 49152 fit"),
    ({"parts": 0}, "parts must be between 1 and 65535; got 0"),
    ({"dtype": "int32"}, "dtype must be one of"),
])
def test_plans_that_no_kernel_carries_out_are_refused(wrong, told):
    with pytest.raises(densegrad.PlanError, match=told):
        replace(MatmulPlan(1024, 1024, 1024, "float32", *MATMUL_TILES[1]), **wrong)


@pytest.mark.parametrize("order", ORDERS)
def test_tiles_that_nobody_has_measured_are_candidates_and_not_chosen(order):
    for sizes in (*PRODUCTS.values(), (512, 512, 512), (1023, 1025, 1021), (2048, 2048, 2048)):
        plans = matmul_candidates(*sizes, "float32")
        untried = [plan for plan in plans if (plan.tile_depth, plan.tile_rows) == (16, 64)]
        assert untried
        assert {plan.cost(order) for plan in untried} == {None}
        assert "not measured" in untried[0].explain()
        assert plan_matmul(*sizes, "float32", order) not in untried
    assert not [plan for plan in matmul_candidates(512, 512, 512, "float64") if plan.tile_depth == 16]


@pytest.mark.parametrize("tile", UNTRIED_TILES, ids=str)
def test_tiles_that_nobody_has_measured_are_right(xp, tile):
    x, dz = normal((50, 70), "float32", 1), normal((50, 66), "float32", 2)
    plan = MatmulPlan(70, 66, 50, "float32", *tile)
    found = densegrad.weight_grad(xp.asarray(x), xp.asarray(dz), plan=plan)
    check_within(found, *expected("weight_grad", (x, dz), {}, plan.chain))
