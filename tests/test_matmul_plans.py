"""plan_matmul over the shapes of real layers: its choice against its own model, and when it cuts the batch."""
from dataclasses import replace
from functools import cache

import pytest

import densegrad
from densegrad.layers import LAYERS
from densegrad.plans import (
    ITEM_BYTES,
    MATMUL_TILES,
    MatmulPlan,
    matmul_candidates,
    plan_matmul,
)

#: (rows, cols, depth) of dL/dW and of dL/dX for each layer
PRODUCTS = {f"{name}, {gradient}": sizes for name, (samples, inputs, outputs) in LAYERS.items()
            for gradient, sizes in (("dw", (inputs, outputs, samples)), ("dx", (samples, inputs, outputs)))}


@cache
def considered(name, dtype):
    """{candidate: what the model says it costs}"""
    return {plan: plan.cost.total for plan in matmul_candidates(*PRODUCTS[name], dtype)}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_choice_is_within_a_tenth_of_the_models_best(name, dtype):
    chosen = plan_matmul(*PRODUCTS[name], dtype)
    assert considered(name, dtype)[chosen] <= 1.1 * min(considered(name, dtype).values())


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_depth_is_cut_only_where_it_pays(name, dtype):
    """By the model's own count: cheaper than every plan that leaves it whole."""
    chosen = plan_matmul(*PRODUCTS[name], dtype)
    if chosen.parts > 1:
        assert chosen.cost.total < min(cost for plan, cost in considered(name, dtype).items() if plan.parts == 1)


@pytest.mark.parametrize("name", ["tall and narrow, dw", "tall and square, dw"])
def test_a_long_batch_fills_a_gpu_and_its_workspace_is_small(name):
    rows, cols, depth = PRODUCTS[name]
    plan = plan_matmul(rows, cols, depth, "float32")
    assert plan.grid[0] * plan.grid[1] * plan.grid[2] >= 132
    assert 2 * plan.workspace_bytes <= 0.02 * (rows + cols) * depth * ITEM_BYTES["float32"]


@pytest.mark.parametrize("sizes", [(4096, 4096, 1), (1, 4096, 4096), (4096, 1, 4096), (1, 1, 100_000), (1, 1, 1)])
def test_vectors_get_tiles_of_their_shape(sizes):
    """No tile is more than 16 times as long as a side of length 1, and explain says what kind of product it is."""
    plan = plan_matmul(*sizes, "float32")
    for size, tile in zip(sizes[:2], (plan.tile_rows, plan.tile_cols), strict=True):
        assert size > 1 or tile <= 16
    kind = "outer product" if sizes[2] == 1 else "matrix and vector" if 1 in sizes[:2] else ""
    assert kind in plan.explain()


def test_explain_gives_the_reasons():
    text = plan_matmul(128, 128, 1_000_003, "float32").explain()
    for reason in ("FMA units", "results a thread", "parts of", "workspace", "longest chain", "model, not measured"):
        assert reason in text
    assert "the depth is not cut" in plan_matmul(4096, 4096, 4096, "float32").explain()


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
