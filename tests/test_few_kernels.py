"""How many kernels calls of random shapes need: each is a compilation on somebody's first visit.

What counts is the kernels of one dtype and one set of options: whether compensated, above what, the dtypes of results,
overwritten or added to. Every family states its number here.
"""
import numpy as np
import pytest

from densegrad.families import add_parts, batch_sum, tiling, upstream
from densegrad.families.add_parts import AddPartsPlan
from densegrad.families.batch_sum import plan_batch_sum
from densegrad.families.product import plan_product
from densegrad.families.tiling import Product
from densegrad.families.upstream import Upstream, plan_upstream
from densegrad.launches import ALPHA, ONE, Matrix, Result, Slot

DTYPES = ("float16", "bfloat16", "float32", "float64")
SUMS = {"rows": 24, "flat": 24, "features_first": 40}
PRODUCTS, BELOW_AN_ACTIVATION, ADDED_PARTS = 260, 192, 8


def matrix(name, dtype, rows, cols, features_first=False):
    return Matrix(Slot(name), dtype, rows, cols, *((1, rows) if features_first else (cols, 1)))


def shapes(layout):
    """(samples, outputs): every small number of outputs, and of each magnitude as many."""
    draw = np.random.default_rng(0)
    most = 2 ** 8 if layout == "flat" else 2 ** 14
    yield from ((samples, outputs) for outputs in range(1, 257) for samples in (1, 7, 64, 1000, 30_000, 1_000_003))
    yield from ((int(2 ** draw.uniform(0, 20)), int(most ** draw.uniform(0, 1))) for _ in range(3000))


def held(found, most, what):
    print(f"{len(found)} kernels {what}")
    assert len(found) <= most


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("layout", SUMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(dtype, layout, compensated):
    found = set()
    for samples, outputs in shapes(layout):
        plan = plan_batch_sum(samples, outputs, dtype, layout, compensated)
        source = matrix("dz", dtype, samples, outputs, layout == "features_first")
        for launch in batch_sum.launches(plan, source, Result(matrix("db", dtype, 1, outputs))):
            found.add((launch.kernel, launch.constants))
    held(found, SUMS[layout], f"add {dtype}, {layout}{', compensated' * compensated}")


@pytest.mark.parametrize("layout", SUMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_below_an_activation(dtype, layout):
    """Narrow rows have a kernel for each number of threads, since each thread keeps to its columns."""
    found = set()
    for samples, outputs in shapes(layout):
        z, da, dz = (matrix(name, dtype, samples, outputs, layout == "features_first") for name in ("z", "da", "dz"))
        launches = upstream.launches(plan_upstream(samples, outputs, dtype, layout, "gelu"), Upstream(da, z), dz,
                                     Result(matrix("db", dtype, 1, outputs)), (ALPHA, ONE))
        found |= {launch.constants for launch in launches if launch.kernel == "upstream_sum"}
    held(found, BELOW_AN_ACTIVATION, f"form {dtype} below an activation, {layout}")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_products(dtype):
    """dL/dW with dL/db, and dL/dX, of 1,000 layers in C order; other dtypes and precisions have fewer tiles."""
    found, draw = set(), np.random.default_rng(0)
    for _ in range(1000):
        samples, features, outputs = map(int, draw.integers(1, [65536, 4096, 4096], endpoint=True))
        x, w = matrix("x", dtype, samples, features), matrix("w", dtype, features, outputs)
        dz = matrix("dz", dtype, samples, outputs)
        for product, result, sums in ((Product(x.T, dz), "dw", Result(matrix("db", dtype, 1, outputs))),
                                      (Product(dz, w.T), "dx", None)):
            rows, depth, cols = product.left.rows, product.left.cols, product.right.cols
            plan = plan_product(rows, cols, depth, dtype, order=product.order)
            launches = tiling.launches(plan, product, Result(matrix(result, dtype, rows, cols)), sums)
            found |= {launch.constants for launch in launches if launch.plan is plan}
    held(found, PRODUCTS, f"multiply {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_products(dtype):
    found, draw = set(), np.random.default_rng(0)
    accumulator = "float64" if dtype == "float64" else "float32"
    for rows, cols in draw.integers(1, 4096, (2000, 2)).tolist():
        plan = AddPartsPlan(4, rows, cols, -(-cols // 4) * 4, accumulator)
        parts = matrix("parts", accumulator, rows, plan.pitch)
        target = Result(matrix("dw", dtype, rows, cols))
        found |= {launch.constants for launch in add_parts.launches(plan, parts, target)}
    held(found, ADDED_PARTS, f"add parts into {dtype}")
