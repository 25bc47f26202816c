"""dL/dW, dL/dX and db by Hopper's kernel against float64: tiles, orders, results, options, what a plan promises."""
import functools
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import densegrad
from benchmarks import counting, tables
from densegrad import compiler, reference
from densegrad.calls import recorded
from densegrad.errors import PlanError
from densegrad.families import matmul_hopper, tiling
from densegrad.families.cost import BYTES_A_MICROSECOND, LAUNCH
from densegrad.families.product import check_precision
from densegrad.families.tiling import Product
from densegrad.families.turn_operand import TurnPlan
from densegrad.launches import Matrix, Result, Slot
from densegrad.plans import (
    HOPPER,
    HOPPER_STAGES,
    TF32,
    HopperPlan,
    MatmulPlan,
    TensorCorePlan,
    bias_rides_along,
    plan_product,
)
from densegrad.testing import (
    Placed,
    Strided,
    bits,
    check_within,
    error_bound,
    expected,
    host,
    integers,
    normal,
    poisoned,
)

#: where an axis of dz counts samples, and the layout of w or dw: every way in which both operands can lie
ORIENTATIONS = tuple(itertools.product((0, 1), ("in_out", "out_in")))
DTYPES = ("bfloat16", "float16")
#: the simulator takes seconds for each tile: there the smallest one stands for the others
TILES = [pytest.param(tile_cols, marks=[] if tile_cols == 128 else pytest.mark.only("gpu"))
         for tile_cols in HOPPER_STAGES]
pytestmark = pytest.mark.hopper


@pytest.fixture(autouse=True)
def _two_blocks(request, monkeypatch):
    """Kernels are launched with two blocks, so that these take several pieces of work in turn."""
    if "xp" in request.fixturenames:
        monkeypatch.setattr(matmul_hopper, "MULTIPROCESSORS", 2)


class Layer:
    """One layer's arrays as one function takes them, with a plan of Hopper's; float32 goes by its precision."""

    def __init__(self, function, sizes, dtype="bfloat16", make=integers, orientation=(0, "in_out"), **plan):
        samples, in_features, out_features = sizes
        dtype, plan["precision"] = ("float32", dtype) if dtype in TF32 else (dtype, None)
        self.function, self.dtype = function, dtype
        self.x = make((samples, in_features), dtype, 1)
        self.w = make((in_features, out_features), dtype, 2)
        self.dz = make((samples, out_features), dtype, 3)
        self.options = dict(zip(("batch_axis", "weight_layout"), orientation, strict=True))
        shape = (samples, in_features, out_features) if function == "input_grad" else (
            in_features, out_features, samples)
        self.plan = HopperPlan(*shape, dtype, **{"tile_cols": 128, **plan})

    @property
    def arrays(self):
        dz = np.ascontiguousarray(self.dz.T) if self.options["batch_axis"] else self.dz
        w = np.ascontiguousarray(self.w.T) if self.options["weight_layout"] == "out_in" else self.w
        return (dz, w) if self.function == "input_grad" else (self.x, dz)

    def run(self, xp, **more):
        with recorded() as launches:
            found = getattr(densegrad, self.function)(*map(xp.asarray, self.arrays), plan=self.plan, **self.options,
                                                      **more)
        kernels = [launch.kernel for launch in launches]
        assert kernels.count("matmul_hopper") == 1
        return found, kernels

    def exact(self, function=None):
        return getattr(reference, function or self.function)(*self.arrays, **self.options)


@pytest.mark.parametrize("tile_cols", TILES)
@pytest.mark.parametrize("orientation", [ORIENTATIONS[0], *(
    pytest.param(orientation, marks=pytest.mark.only("gpu")) for orientation in ORIENTATIONS[1:])])
def test_small_integers_are_exact_in_every_orientation(xp, tile_cols, orientation):
    for function in ("weight_grad", "input_grad"):
        dtype = DTYPES[(orientation[0] + (function == "input_grad")) % 2]
        layer = Layer(function, (72, 136, tile_cols + 8), dtype, orientation=orientation, tile_cols=tile_cols)
        found, _ = layer.run(xp)
        assert (host(found) == layer.exact().astype(found.dtype)).all()


@pytest.mark.parametrize("sizes", [(8, 8, 8), (1, 8, 8), (200, 8, 136), (65, 128, 16)])
def test_any_size_that_maps_take(xp, sizes):
    for layer in (Layer("weight_grad", sizes), Layer("input_grad", sizes, "tf32")):
        found, _ = layer.run(xp)
        assert (host(found) == layer.exact().astype(found.dtype)).all()


@pytest.mark.parametrize(("precision", "orientation"), [
    pytest.param(precision, orientation, marks=[pytest.mark.only("gpu")] if (number + turn) % 4 else [])
    for turn, precision in enumerate(TF32) for number, orientation in enumerate(ORIENTATIONS)])
def test_small_integers_of_float32_in_every_orientation(xp, precision, orientation):
    """What does not lie along the depth, and all that is split, is written anew before; it may have any sizes."""
    for function, along in (("input_grad", (not orientation[0]) + (orientation[1] == "in_out")),
                            ("weight_grad", orientation[0])):
        layer = Layer(function, (36, 44, 68) if precision == "tf32" else (33, 45, 67), precision,
                      orientation=orientation)
        found, kernels = layer.run(xp)
        assert kernels.count("turn_operand") == 2 - along * (precision == "tf32")
        assert (host(found) == layer.exact()).all()


@pytest.mark.only("gpu")
@pytest.mark.parametrize("tile_cols", [256, 192])
def test_wider_tiles_in_tf32(xp, tile_cols):
    for function in ("input_grad", "weight_grad"):
        layer = Layer(function, (136, 72, tile_cols + 4), "tf32", tile_cols=tile_cols)
        assert (host(layer.run(xp)[0]) == layer.exact()).all()


@pytest.mark.only("gpu")
@pytest.mark.parametrize("precision", TF32)
def test_stages_of_float32_are_filled_anew_when_they_were_read(xp, precision):
    layer = Layer("input_grad", (72, 132, 420), precision)
    assert layer.plan.depth > 2 * layer.plan.stages * layer.plan.tile_depth
    assert (host(layer.run(xp)[0]) == layer.exact()).all()


def test_copies_round_tf32_to_nearest(xp):
    """A number times 1: half of the last place kept goes to the even one; what is not finite, and zeros, stay so."""
    kept, half = 2.0 ** -10, 2.0 ** -11
    numbers = np.float32([1 + half, 1 + kept + half, 1 + half + 2.0 ** -23, 2 - half, -1 - 1.5 * half, 2.0 ** -126 * (
        1 + kept), 2.0 ** -130, 2.0 ** 128 * (1 - 2.0 ** -12), np.inf, -np.inf, np.nan, -0.0])
    rounded = np.float64([1, 1 + 2 * kept, 1 + kept, 2, -1 - kept, 2.0 ** -126 * (
        1 + kept), 2.0 ** -130, np.inf, np.inf, -np.inf, np.nan, 0])
    layer = Layer("input_grad", (len(numbers), 8, 4), "tf32")
    layer.dz[:], layer.dz[:, 1] = 0, numbers
    layer.w[:] = 0
    layer.w[3, 1] = 1
    found = host(layer.run(xp)[0])[:, 3]
    # Copies of a stand-in for CuPy may leave numbers as they are; products then cut them.
    cut = (numbers.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    allowed = [rounded] if xp.__name__ in ("numpy", "cupy") else [rounded, cut]
    assert any(np.array_equal(found, one, equal_nan=True) for one in allowed)


@pytest.mark.parametrize(("precision", "smallest"), [("tf32", -126), ("tf32x3", -114)])
def test_float32_written_anew_keeps_the_bound(xp, precision, smallest):
    """Products one by one, of numbers of any magnitude from the smallest operand on, of either sign."""
    layer = Layer("weight_grad", (1, 52, 36), precision)
    draw = np.random.default_rng(1)
    for array, low, high in ((layer.x, smallest, smallest + 14), (layer.dz, -4, 40)):
        array[:] = np.ldexp(1 + draw.random(array.shape), draw.integers(low, high, array.shape))
    layer.dz[:, ::2] *= -1
    layer.x[:, 0], layer.x[:, 1] = 0, 2.0 ** smallest
    assert layer.plan.smallest_operand == 2.0 ** smallest
    check_within(layer.run(xp)[0], *expected(layer.function, layer.arrays, {}, layer.plan.chain,
                                             product_error=layer.plan.product_error))


@pytest.mark.parametrize("make", [normal, pytest.param(
    lambda *arguments: np.abs(normal(*arguments)), marks=pytest.mark.only("gpu"))], ids=["normal", "positive"])
def test_three_tf32_products_are_as_good_as_float32(xp, make):
    """At most four times the error of FMA units; one TF32 product is far beyond that."""
    errors = {}
    for precision in TF32:
        layer = Layer("weight_grad", (96, 32, 32), precision, make)
        magnitude = np.abs(layer.x.astype(np.float64)).T @ np.abs(layer.dz.astype(np.float64))
        errors[precision] = (np.abs(host(layer.run(xp)[0]) - layer.exact()) / magnitude).max()
    fused = densegrad.weight_grad(*map(xp.asarray, layer.arrays),
                                  plan=MatmulPlan(32, 32, 96, "float32", 16, 16, 8, 4, 4))
    errors["ieee"] = (np.abs(host(fused) - layer.exact()) / magnitude).max()
    assert errors["tf32x3"] <= 4 * errors["ieee"]
    assert errors["tf32"] > 16 * errors["ieee"]


def test_infinite_operands_of_tf32x3(xp):
    """Corrections beside them count as nothing: what is finite times infinity is infinite, as of float32."""
    layer = Layer("input_grad", (36, 40, 36), "tf32x3", lambda *arguments: np.abs(normal(*arguments)))
    layer.dz[3, 5], layer.dz[7, 0], layer.dz[9, 1] = np.inf, -np.inf, np.nan
    found = host(layer.run(xp)[0])
    for row, wanted in ((3, np.inf), (7, -np.inf), (9, np.nan)):
        np.testing.assert_array_equal(found[row], np.full(40, wanted, np.float32))
    assert np.isfinite(np.delete(found, (3, 7, 9), axis=0)).all()


@pytest.mark.parametrize("precision", [pytest.param("tf32", marks=pytest.mark.only("gpu")), "tf32x3"])
def test_results_of_float32(xp, precision):
    """Added into by the kernel, turned, of other types, and in parts."""
    for out_dtype, layout, parts, more in (("float32", "C", 1, 0), ("float32", "F", 2, 1), ("float64", "C", 1, 1),
                                           ("bfloat16", "C", 1, 1)):
        layer = Layer("weight_grad", (72, 40, 36), precision, parts=parts)
        before = integers((40, 36), out_dtype, 4)
        out = Placed(before, layout, xp)
        _, kernels = layer.run(xp, out=out.array, accumulate=True, alpha=0.5)
        assert kernels == ["turn_operand"] * 2 + ["matmul_hopper"] + ["add_parts"] * more
        assert (out.read() == (0.5 * layer.exact() + before.astype(np.float64)).astype(before.dtype)).all()


@pytest.mark.parametrize("precision", TF32)
def test_db_of_float32_is_a_sum_of_its_own(xp, precision):
    """Of numbers as they are, never of TF32."""
    layer = Layer("weight_bias_grad", (72, 40, 36), precision)
    layer.dz[:] = 1 + 2.0 ** -16 * layer.dz
    (dw, db), kernels = layer.run(xp)
    assert "sum_flat" in kernels or "sum_columns" in kernels
    assert (host(db) == layer.dz.astype(np.float64).sum(axis=0)).all()
    assert np.isfinite(host(dw)).all()


@pytest.mark.parametrize("parts", [2, pytest.param(3, marks=pytest.mark.only("gpu"))])
def test_parts_are_added_in_ascending_order(xp, parts):
    layer = Layer("weight_grad", (200, 64, 40), make=normal, parts=parts)
    found, kernels = layer.run(xp, out=xp.zeros((64, 40), "float32"))
    assert kernels == ["matmul_hopper", "add_parts"]
    total = np.zeros((64, 40), np.float32)
    step = layer.plan.depth_per_part
    for begin in range(0, 200, step):
        one = Layer("weight_grad", (len(layer.x[begin:begin + step]), 64, 40))
        one.x, one.dz = layer.x[begin:begin + step], layer.dz[begin:begin + step]
        part, _ = one.run(xp, out=xp.zeros((64, 40), "float32"))
        total += host(part)
    assert (bits(found) == bits(total)).all()


@pytest.mark.parametrize(("function", "sizes", "kind"), [
    ("weight_grad", (200, 1, 40), "bfloat16"), *(pytest.param(*case, marks=pytest.mark.only("gpu")) for case in (
        ("weight_grad", (200, 40, 1), "tf32"),
        ("weight_grad", (200, 40, 1), "bfloat16"), ("weight_grad", (200, 1, 40), "tf32x3"),
        ("input_grad", (1, 40, 200), "float16"), ("input_grad", (1, 40, 200), "tf32"),
        ("input_grad", (40, 1, 200), "bfloat16"), ("weight_grad", (200, 1, 1), "float16")))])
def test_one_row_or_column_in_parts(xp, function, sizes, kind):
    for parts in (2, 3):
        layer = Layer(function, sizes, kind, parts=parts)
        found, _ = layer.run(xp)
        assert (host(found) == layer.exact().astype(found.dtype)).all()


@pytest.mark.parametrize("gaps", [(0, 7), (7, 0), pytest.param((8, 15), marks=pytest.mark.only("gpu"))])
@pytest.mark.parametrize("features", [(1, 72), (72, 1)])
def test_one_row_or_column_with_gaps(xp, features, gaps):
    """Nothing is written between the elements of a result, nor read there of an operand of one row or column."""
    layer = Layer("weight_grad", (40, *features), "tf32")
    placed = [Placed(array, Strided.of(array.shape, (0, 1), gaps), xp) for array in
              (layer.x, layer.dz, np.zeros(features, np.float32))]
    x, dz, out = placed
    densegrad.weight_grad(x.array, dz.array, out=out.array, plan=layer.plan)
    assert (out.read() == layer.exact()).all()


def test_an_empty_part_is_zero(xp):
    layer = Layer("weight_grad", (64, 64, 64), parts=3)
    found, _ = layer.run(xp)
    assert (host(found) == layer.exact().astype(found.dtype)).all()


@pytest.mark.parametrize(("out_dtype", "accumulate", "stored"), [
    (None, False, True), ("float32", True, True), ("float64", True, False), *(
        pytest.param(*case, marks=pytest.mark.only("gpu")) for case in (
            (None, True, False), ("float32", False, True), ("float64", False, False)))])
@pytest.mark.parametrize("tile_cols", TILES[1:])
def test_results_of_every_dtype_overwritten_and_added(xp, out_dtype, accumulate, stored, tile_cols):
    """What the kernel cannot store goes through the workspace, in a launch more."""
    layer = Layer("weight_grad", (40, 72, tile_cols - 40), tile_cols=tile_cols)
    before = integers((72, tile_cols - 40), out_dtype or layer.dtype, 4)
    out = Placed(before, "C", xp)
    _, kernels = layer.run(xp, out=out.array, accumulate=accumulate, alpha=0.5)
    assert kernels == ["matmul_hopper"] + ["add_parts"] * (not stored)
    wanted = 0.5 * layer.exact() + (before.astype(np.float64) if accumulate else 0)
    assert (out.read() == wanted.astype(before.dtype)).all()


@pytest.mark.parametrize("layout", ["padded", "F", "offset"])
def test_results_that_lie_otherwise(xp, layout):
    """Nothing beside a result is written; one whose rows are not aligned goes through the workspace."""
    layer = Layer("weight_grad", (40, 72, 72))
    out = poisoned((72, 72), layer.dtype, layout, xp)
    layer.run(xp, out=out.array)
    assert (out.read() == layer.exact().astype(layer.x.dtype)).all()


def test_alpha_on_the_device(xp):
    layer = Layer("weight_grad", (72, 64, 64))
    found, _ = layer.run(xp, alpha=xp.asarray(np.float32(0.25)))
    assert (host(found) == (0.25 * layer.exact()).astype(found.dtype)).all()


@pytest.mark.parametrize("tile_cols", TILES)
@pytest.mark.parametrize("weight_layout", [pytest.param("in_out", marks=pytest.mark.only("gpu")), "out_in"])
def test_db_rides_along_on_either_side(xp, tile_cols, weight_layout):
    """dZ is the right operand, or the left one where dW is written transposed."""
    layer = Layer("weight_bias_grad", (136, 136, 40), DTYPES[weight_layout == "in_out"],
                  orientation=(0, weight_layout), tile_cols=tile_cols, parts=2)
    (dw, db), kernels = layer.run(xp, alpha=2.0)
    assert kernels == ["matmul_hopper", "add_parts", "sum_parts"]
    assert (host(dw) == (2 * layer.exact("weight_grad")).astype(dw.dtype)).all()
    assert (host(db) == (2 * layer.dz.astype(np.float64).sum(axis=0)).astype(db.dtype)).all()


def test_db_of_a_transposed_dz_is_a_sum_of_its_own(xp):
    layer = Layer("weight_bias_grad", (72, 64, 64), orientation=(1, "in_out"))
    (_, db), kernels = layer.run(xp)
    assert "sum_runs" in kernels
    assert (host(db) == layer.dz.astype(np.float64).sum(axis=0).astype(db.dtype)).all()


@pytest.mark.only("gpu")
@pytest.mark.parametrize("parts", [1, 2])
def test_the_sharers_of_db_take_every_round_once(xp, parts):
    """With more tiles than steps, and with fewer, the bits are those of the order that the kernel's file states."""
    for samples, in_features, tile_cols in ((130, 400, 256), (700, 136, 128), (450, 264, 192), (72, 4232, 128)):
        layer = Layer("weight_bias_grad", (samples, in_features, 64), make=normal, parts=parts, tile_cols=tile_cols)
        (_, db), _ = layer.run(xp, out=densegrad.WeightBiasGrads(db=xp.zeros(64, "float32")))
        assert (bits(db) == bits(added_by_sharers(layer.dz.astype(np.float32), layer.plan))).all()


def added_by_sharers(dz, plan):
    """The sum of dZ over its rows, as the tiles of a plan share it, whose rows of sums 32 lanes add."""
    shares, sharers = plan.adders // (plan.tile_cols // 8), min(-(-plan.rows // 128), 32)
    rounds, rows = -(-8 // shares), []
    for part, sharer, share in itertools.product(range(plan.parts), range(sharers), range(shares)):
        rows.append(np.zeros(dz.shape[1], np.float32))
        lines = dz[part * plan.depth_per_part:(part + 1) * plan.depth_per_part]
        for number in range(sharer, rounds * -(-plan.depth_per_part // 64), sharers):
            step, turn = divmod(number, rounds)
            group = turn * shares + share
            for line in lines[64 * step + 8 * group:64 * step + 8 * (group + 1)] if group < 8 else ():
                rows[-1] += line
    lanes = plan.added_sums(len(rows), dz.shape[1]).lanes
    return in_order(in_order(rows[lane::lanes]) for lane in range(lanes))


def in_order(rows):
    """The sum of some rows, in ascending order."""
    return functools.reduce(np.add, rows, np.float32(0))


@pytest.mark.only("gpu")
def test_db_keeps_the_bound_of_its_own_chain(xp):
    """Of more rows of sums than lanes load at once: positive numbers, whose errors do not cancel."""
    layer = Layer("weight_bias_grad", (2048, 264, 40), make=lambda *given: np.abs(normal(*given)), parts=32)
    (_, db), _ = layer.run(xp, out=densegrad.WeightBiasGrads(db=xp.zeros(40, "float32")))
    exact = layer.dz.astype(np.float64).sum(axis=0)
    assert layer.plan.sums_chain < layer.plan.chain
    check_within(db, exact, error_bound(exact, exact, layer.plan.sums_chain, 2048, "float32"))


@pytest.mark.only("gpu")
@settings(max_examples=16, deadline=None)
@given(st.data())
def test_the_bound_holds_for_any_sizes_and_orders(xp, data):
    sizes = tuple(data.draw(st.integers(1, 160)) for _ in range(3))
    kind = data.draw(st.sampled_from((*DTYPES, *TF32)))
    layer = Layer(data.draw(st.sampled_from(["weight_grad", "input_grad"])), sizes, kind, of_tf32 if kind == "tf32" else
                  normal, data.draw(st.sampled_from(ORIENTATIONS)),
                  tile_cols=data.draw(st.sampled_from(list(matmul_hopper.stages_of(kind)))),
                  parts=data.draw(st.integers(1, 3)))
    function = getattr(densegrad, layer.function)
    found = function(*(in_aligned_rows(array, xp) for array in layer.arrays), plan=layer.plan, **layer.options)
    exact, bound = expected(layer.function, layer.arrays, layer.options, layer.plan.chain,
                            product_error=layer.plan.product_error if kind == "tf32x3" else 0.0)
    check_within(found, exact, bound)


def in_aligned_rows(array, xp):
    """The array in memory whose rows begin at multiples of 16 bytes, with NaN behind each."""
    gap = -array.shape[1] % 8
    return Placed(array, Strided.of(array.shape, gaps=(gap, 0)), xp).array


def of_tf32(*arguments):
    """Normal numbers that tf32 has: their products are exact."""
    return (normal(*arguments).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def test_values_that_are_not_finite(xp):
    """They reach the results that they are factors of, and no other: what lies beyond an edge is zero on both sides."""
    layer = Layer("weight_grad", (72, 136, 72))
    layer.x[3, 5], layer.dz[7, 9] = np.inf, np.nan
    found, _ = layer.run(xp)
    found = host(found).astype(np.float32)
    reached = np.zeros(found.shape, bool)
    reached[5], reached[:, 9] = True, True
    assert np.isfinite(found[~reached]).all()
    assert not np.isfinite(found[reached]).any()


@pytest.mark.only("gpu")  # NumPy's arrays are aligned alike by chance alone
def test_a_prepared_call_takes_other_arrays(xp):
    """Maps follow the addresses."""
    layer = Layer("weight_grad", (72, 64, 64))
    x, dz = map(xp.asarray, layer.arrays)
    call = densegrad.prepare(densegrad.weight_grad, x, dz, plan=layer.plan)
    call()
    other = integers(layer.x.shape, layer.dtype, 9)
    found = call.rebind(x=xp.asarray(other))()
    assert (host(found) == reference.weight_grad(other, layer.dz).astype(found.dtype)).all()


def test_below_an_activation(xp):
    """dZ is formed in the workspace, from where boxes are copied, too."""
    layer = Layer("weight_grad", (72, 64, 136))
    z = integers(layer.dz.shape, layer.dtype, 5)
    x, w, dz = (xp.asarray(array) for array in (layer.x, layer.w, layer.dz))
    plans = densegrad.DenseGrads(dx=Layer("input_grad", (72, 64, 136)).plan, dw=layer.plan)
    with recorded() as launches:
        grads = densegrad.dense_grads(x, w, dz, activation="relu", z=xp.asarray(z), plan=plans)
    assert [launch.kernel for launch in launches].count("matmul_hopper") == 2
    below = np.where(z.astype(np.float64) > 0, layer.dz.astype(np.float64), 0)
    assert (host(grads.dw) == (layer.x.astype(np.float64).T @ below).astype(grads.dw.dtype)).all()
    assert (host(grads.dx) == (below @ layer.w.astype(np.float64).T).astype(grads.dx.dtype)).all()


# -- plans


@pytest.mark.parametrize("dtype", [*DTYPES, *TF32])
def test_the_plan_for_hopper_alone(dtype):
    """Other GPUs, unaligned operands and other types keep their kernels."""
    kind = ("float32", dtype) if dtype in TF32 else (dtype, None)
    for order in ("across", "along"):
        assert isinstance(plan_product(4096, 4096, 4096, *kind, HOPPER, order=order), HopperPlan)
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert isinstance(plan_product(4096, 4096, 4096, *kind, capability), TensorCorePlan)
    assert isinstance(plan_product(4096, 4096, 4096, *kind, HOPPER, aligned=False), TensorCorePlan)
    assert not isinstance(plan_product(4096, 4096, 0, *kind, HOPPER), HopperPlan)
    assert not isinstance(plan_product(64, 64, 64, *kind, HOPPER), HopperPlan)
    assert not isinstance(plan_product(4096, 4096, 4096, "float32", "ieee", HOPPER), HopperPlan)


def test_db_rides_along_by_the_model():
    assert bias_rides_along(plan_product(4096, 4096, 4096, "bfloat16", None, HOPPER))


def test_what_float32_takes_beside_the_product():
    """A first pass takes the time in which memory moves what it reads and writes, and its launches."""
    costs = {(precision, order): HopperPlan(1024, 2048, 4096, "float32", 128, precision=precision).cost(order)
             for precision in TF32 for order in ("across", "along")}
    assert costs["tf32", "along"].memory == 0
    numbers = (1024 + 2048) * 4096
    for key, moved in {("tf32", "across"): 2, ("tf32x3", "across"): 3, ("tf32x3", "along"): 3}.items():
        assert costs[key].memory == pytest.approx(2 * LAUNCH + 4 * moved * numbers / BYTES_A_MICROSECOND)
    assert costs["tf32x3", "along"].loop == pytest.approx(3 * costs["tf32", "along"].loop)
    assert not any(cost.measured for cost in costs.values())


def test_plans_for_what_no_map_takes_say_so():
    for kind in (("bfloat16", None), ("float32", "tf32")):
        text = plan_product(4096, 4096, 4096, *kind, HOPPER, aligned=False).explain()
        assert "on compute capability 9.0 taken where rows of operands do not begin at multiples of 16 bytes" in text
    assert "9.0 taken" not in plan_product(4096, 4096, 4096, "float64", None, HOPPER).explain()


def test_explain_says_what_runs_and_that_nothing_was_measured():
    text = HopperPlan(4096, 4096, 4096, "bfloat16", 256).explain()
    assert "tensor cores of compute capability 9.0" in text
    assert "aligned to 16 bytes" in text
    assert "not measured" in text
    for precision, words in (("tf32", "turned in a launch before"), ("tf32x3", "each operand split into two terms")):
        text = HopperPlan(4096, 4096, 4096, "float32", 128, precision=precision).explain()
        assert f"tensor cores in {precision} of compute capability 9.0" in text
        assert words in text


@pytest.mark.parametrize(("change", "message"), [
    ({"tile_cols": 64}, "tile_cols must be one of 256, 192, 128; got 64"),
    ({"dtype": "float64"}, "dtype must be one of float16, bfloat16, float32; got 'float64'"),
    ({"dtype": "float32"}, "precision of float32 must be one of tf32, tf32x3; got None"),
    ({"precision": "tf32"}, "precision of bfloat16 must be None; got 'tf32'"),
    ({"dtype": "float32", "precision": "tf32x3", "tile_cols": 256}, "tile_cols must be one of 128; got 256"),
    ({"dtype": "float32", "precision": "tf32x3", "depth": 2**30 + 1, "parts": 2}, "depth at most 1073741824"),
    ({"depth": 0}, "rows, cols and depth must be at least 1"),
    ({"depth": 2**31 + 1}, "depth at most 2147483648"),
    ({"rows": 2**31}, "rows and cols must be at most"),
    ({"parts": 0}, "parts must be between 1"),
    ({"rows": 2**30, "cols": 2**30}, r"tiles times parts must be below 2\^31"),
])
def test_plans_that_no_kernel_carries_out(change, message):
    with pytest.raises(PlanError, match=message):
        HopperPlan(**{"rows": 64, "cols": 64, "depth": 64, "dtype": "bfloat16", "tile_cols": 128, **change})


def test_the_ends_of_its_ranges():
    """Coordinates and counts of steps stay within 32 bits for 2^31 samples, and at most so many rows."""
    plan = HopperPlan(64, 64, 2**31, "bfloat16", 128, parts=2)
    arguments = launches_of(plan)[0].arguments
    assert (arguments.steps - 1) * plan.tile_depth < 2**31
    assert arguments.steps_per_part * plan.parts <= 2**31
    rows = matmul_hopper.MOST_LENGTH
    assert -(-rows // 128) * 128 + 64 < 2**31


def launches_of(plan):
    """The launches of a plan for operands of its sizes, across the depth."""
    left, right = (Matrix(Slot(name), plan.dtype, plan.depth, length, length, 1)
                   for name, length in (("x", plan.rows), ("dz", plan.cols)))
    result = Matrix(Slot("dw"), plan.dtype, plan.rows, plan.cols, plan.cols, 1)
    return tiling.launches(plan, Product(left.T, right), Result(result))


def test_the_ends_of_the_ranges_of_two_terms():
    """Coordinates of both terms stay within 32 bits, and so do numbers of blocks of the first pass."""
    plan = HopperPlan(64, 64, 2**30, "float32", 128, parts=2, precision="tf32x3")
    *before, launch = launches_of(plan)[:3]
    assert launch.arguments.steps * plan.terms * plan.tile_depth <= 2**31
    for turned, operand in zip(before, (launch.arguments.left, launch.arguments.right), strict=True):
        assert operand.lengths == (turned.plan.pitch, 64)
        assert turned.grid[0] < 2**31
    with pytest.raises(PlanError, match="an operand is turned by fewer than"):
        TurnPlan(2**31 - 256, 2**20, 1)


@pytest.mark.parametrize("precision", TF32)
def test_float32_that_is_not_aligned(xp, precision):
    """It is refused where the kernel reads it itself, not where it is written anew."""
    for function, refused in (("input_grad", precision == "tf32"), ("weight_grad", False)):
        layer = Layer(function, (36, 40, 44), precision)
        given = [Placed(array, "offset", xp).array for array in layer.arrays]
        if refused:
            with pytest.raises(PlanError, match="begin at multiples of 16 bytes"):
                densegrad.input_grad(*given, plan=layer.plan)
        else:
            assert (host(getattr(densegrad, function)(*given, plan=layer.plan)) == layer.exact()).all()


@pytest.mark.parametrize("name", ["x", "dz"])
def test_operands_without_maps_are_refused_before_anything_is_launched(xp, name):
    layer = Layer("weight_grad", (72, 64, 64))
    arrays = {"x": layer.x, "dz": layer.dz}
    arrays = {one: Placed(array, "offset" if one == name else "C", xp).array for one, array in arrays.items()}
    with recorded() as launches, pytest.raises(PlanError, match="begin at multiples of 16 bytes"):
        densegrad.weight_grad(**arrays, plan=layer.plan)
    assert not launches


def test_a_gpu_of_fewer_multiprocessors_launches_fewer_blocks():
    """Each takes more pieces; other kernels' grids are their plans'."""
    launch, *later = launches_of(HopperPlan(4096, 4096, 4096, "bfloat16", 128, parts=2))
    assert [launch.on(count).grid[0] for count in (78, 132, 144)] == [78, 132, 132]
    assert later
    assert [one.on(1) for one in later] == later


def test_other_gpus_refuse_the_plan():
    plan = HopperPlan(64, 64, 64, "bfloat16", 128)
    for capability in ((8, 0), (10, 0)):
        with pytest.raises(PlanError, match=r"needs a GPU of compute capability 9\.0"):
            check_precision(plan, None, capability)
    check_precision(plan, None, HOPPER)


# what no result shows


@pytest.mark.only("gpu")
@pytest.mark.parametrize("row", ["memory bfloat16 dW 128x128 320x128x128 in 3 parts"])
def test_no_more_is_copied_than_the_tiling_says(row):
    """Where copies are counted; the last part has fewer steps than the others."""
    where = counting.machine()
    if where is None:
        pytest.skip("nothing counts copies here")
    (row,) = [one for one in tables.rows("hopper") if one.name == row]
    assert not counting.broken(row, row.measure(where))


@pytest.mark.only("gpu")  # where a compiler is at hand
def test_what_no_execution_shows_stands_in_the_code():
    """Barriers are seen started, warps have read before they say so, stores have ended before the block does.

    Where warps run one after another and memory is one, as in any execution here, nothing depends on that.
    """
    launch = dict(matmul_hopper.variants())["matmul_hopper-bfloat16-128x128-rows-cols-sums"]
    kinds = r"mbarrier\.init|fence\.mbarrier_init|bar\.warp\.sync|bar\.sync|mbarrier\.arrive(?!\.expect)|" \
            r"fence\.proxy\.tensormap::generic\.(?:acquire|release)|" \
            r"cp\.async\.bulk\.wait_group(?:\.read)?|ret(?=;)"
    order = re.findall(rf"(?m)^\s*({kinds})\b", compiler.ptx_of(launch, (9, 0)))
    starts = 2 * launch.plan.stages
    maps = "fence.proxy.tensormap::generic"
    assert order[:starts + 3] == ["mbarrier.init"] * starts + ["fence.mbarrier_init", f"{maps}.release", "bar.sync"]
    assert order.count(f"{maps}.acquire") == 3  # of either operand, and of the result
    reads = order.index("bar.warp.sync")
    assert order[reads + 1] == "mbarrier.arrive"
    assert order.count("bar.warp.sync") == 1
    ends = order.index("cp.async.bulk.wait_group")
    assert order[ends + 1] == "ret"
