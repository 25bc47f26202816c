"""dL/dW and dL/dX on tensor cores against float64: precisions, orientations, edges, options, what a plan promises."""
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import densegrad
from densegrad import reference, testing
from densegrad.calls import recorded
from densegrad.errors import PlanError
from densegrad.plans import ITEM_BYTES, MatmulPlan, TensorCorePlan, plan_product
from densegrad.testing import Placed, bits, check_within, expected, host, integers, normal, poisoned

#: how numbers are multiplied: (dtype, precision)
KINDS = {"float16": ("float16", None), "float16k8": ("float16", None), "bfloat16": ("bfloat16", None),
         "tf32": ("float32", "tf32"), "tf32x3": ("float32", "tf32x3"), "float64m8": ("float64", None),
         "float64": ("float64", None)}
#: the compute capability of those that have another one than most
CAPABILITIES = {"float16k8": (7, 5), "float64": (9, 0)}
ALL_KINDS = [pytest.param(kind, marks=[pytest.mark.hopper] * (kind == "float64")) for kind in KINDS]
ORIENTATIONS = tuple(itertools.product((0, 1), ("in_out", "out_in")))
FUNCTIONS = ("weight_grad", "input_grad")


def small_plan(rows, cols, depth, kind, parts=1, stages=3, tile=(32, 32, 32, 32)):
    """One warp to a block, and tiles that small matrices have edges of."""
    dtype, precision = KINDS[kind]
    tile_rows, tile_cols, warp_rows, warp_cols = tile
    return TensorCorePlan(rows, cols, depth, dtype, precision, tile_rows, tile_cols, 64 // ITEM_BYTES[dtype],
                          warp_rows, warp_cols, stages, parts, CAPABILITIES.get(kind, (8, 0)))


class Layer:
    """One layer's arrays as one function takes them, and how they are multiplied."""

    def __init__(self, function, sizes, kind, make=normal, orientation=(0, "in_out"), **plan):
        samples, in_features, out_features = sizes
        self.function, self.kind, self.dtype = function, kind, KINDS[kind][0]
        self.x = make((samples, in_features), self.dtype, 1)
        self.w = make((in_features, out_features), self.dtype, 2)
        self.dz = make((samples, out_features), self.dtype, 3)
        self.options = dict(zip(("batch_axis", "weight_layout"), orientation, strict=True))
        weights = function == "weight_grad"
        shape = (in_features, out_features, samples) if weights else (samples, in_features, out_features)
        self.plan = small_plan(*shape, kind, **plan)

    @property
    def arrays(self):
        dz = np.ascontiguousarray(self.dz.T) if self.options["batch_axis"] else self.dz
        w = np.ascontiguousarray(self.w.T) if self.options["weight_layout"] == "out_in" else self.w
        return (self.x, dz) if self.function == "weight_grad" else (dz, w)

    @property
    def exact(self):
        with np.errstate(invalid="ignore"):
            return getattr(reference, self.function)(*self.arrays, **self.options)

    def run(self, xp, layouts=("C", "C"), **more):
        arrays = [Placed(array, layout, xp).array for array, layout in zip(self.arrays, layouts, strict=True)]
        with recorded() as launches:
            result = getattr(densegrad, self.function)(*arrays, plan=self.plan, **self.options, **more)
        assert [launch.kernel for launch in launches][:1] == ["matmul_tensor_core"] * bool(launches)
        return result

    def check(self, xp, layouts=("C", "C"), out_layout="C", out_dtype=None, exactly=False):
        out = poisoned(self.exact.shape, out_dtype or self.dtype, out_layout, xp)
        self.run(xp, layouts, out=out.array)
        exact, bound = expected(self.function, self.arrays, self.options, self.plan.chain, out_dtype,
                                product_error=self.plan.product_error)
        check_within(out.read(), exact, 0 if exactly else bound)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kinds", [("float16", "tf32x3"), ("bfloat16", "tf32"), ("float64m8", "float64m8")])
def test_small_integers_are_exact_in_every_orientation(xp, function, orientation, kinds):
    kind = kinds[(orientation[0] + (function == "weight_grad")) % 2]
    Layer(function, (37, 40, 34), kind, integers, orientation).check(xp, exactly=True)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_any_size(xp, lane, kind):
    """Aligned and odd sizes, from nothing to across tiles, with one part and with two."""
    sizes = st.sampled_from((0, 1, 8, 32, 33, 72))

    @settings(max_examples=5 if lane == "gpu" else 3, deadline=None, derandomize=True, database=None)
    @given(function=st.sampled_from(FUNCTIONS), shape=st.tuples(sizes, sizes, sizes), parts=st.sampled_from((1, 2)))
    def check(function, shape, parts):
        Layer(function, shape, kind, parts=parts).check(xp)

    check()


@pytest.mark.parametrize("kind", ["bfloat16", "tf32", "float64m8"])
@pytest.mark.parametrize("layout", ["padded", "offset", "gaps", "upside down"])
def test_operands_of_any_alignment(xp, kind, layout):
    """From pieces of one element to whole chunks, and strides that go backwards."""
    Layer("weight_grad", (37, 40, 34), kind).check(xp, (layout, "padded F"))
    Layer("input_grad", (37, 40, 34), kind).check(xp, ("padded", layout), "F")


@pytest.mark.parametrize(("kind", "out_dtype"), [("bfloat16", "float32"), ("float16", "bfloat16"), ("tf32", "float64"),
                                                 ("float64m8", "float64"), ("float64m8", "float32")])
@pytest.mark.parametrize("parts", [1, 2])
def test_accumulate_and_alpha(xp, kind, out_dtype, parts):
    layer = Layer("weight_grad", (70, 40, 34), kind, integers, parts=parts)
    old = integers(layer.exact.shape, out_dtype, 9)
    out = Placed(old, "C", xp, testing.SENTINEL)
    layer.run(xp, out=out.array, accumulate=True, alpha=0.5)
    wanted = (layer.exact / 2 + old.astype(np.float64)).astype(old.dtype)
    check_within(out.read(), wanted.astype(np.float64), 0)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_not_finite_numbers_land_where_mathematics_puts_them(xp, kind):
    layer = Layer("weight_grad", (33, 34, 35), kind)
    layer.x[32, 33], layer.x[0, 0], layer.dz[5, 34] = np.inf, np.nan, -np.inf
    layer.check(xp)


@pytest.mark.parametrize(("kind", "orientation"), [
    ("float16", (0, "in_out")), ("float16k8", (0, "in_out")), ("bfloat16", (1, "out_in")), ("tf32", (0, "out_in")),
    ("tf32", (1, "in_out")), ("tf32x3", (0, "in_out")), ("float64m8", (0, "in_out")), ("float64m8", (1, "out_in"))])
def test_bias_rides_along(xp, kind, orientation):
    """db is the float32 sum of dz, or float64, never of TF32; an infinity makes one entry of it infinite."""
    # Also of two warps that add up half of a tile each, and of two of which one adds up.
    tile = {"bfloat16": (32, 64, 32, 32), "tf32": (32, 64, 32, 32), "float16": (64, 32, 32, 32)}.get(kind, (32,) * 4)
    layer = Layer("weight_grad", (70, 40, 36), kind, orientation=orientation, parts=2, tile=tile)
    layer.dz[3, 7] = np.inf
    grads = densegrad.weight_bias_grad(*map(xp.asarray, layer.arrays), plan=layer.plan, **layer.options)
    for found, name, arrays, error in ((grads.dw, "weight_grad", layer.arrays, layer.plan.product_error),
                                       (grads.db, "bias_grad", layer.arrays[1:], 0.0)):
        options = layer.options if name == "weight_grad" else {"batch_axis": layer.options["batch_axis"]}
        check_within(found, *expected(name, arrays, options, layer.plan.chain, product_error=error))


@pytest.mark.parametrize("kind", ["bfloat16", "float16k8", "tf32", "float64m8"])
def test_several_warps_share_their_tiles(xp, kind):
    """A missing barrier, wait or stage is a race between them."""
    for function, stages in (("weight_grad", 2), ("input_grad", 4)):
        Layer(function, (90, 40, 72), kind, integers, stages=stages, tile=(64, 64, 32, 32)).check(xp, exactly=True)


@pytest.mark.only("gpu")
@pytest.mark.parametrize("kind", ["float16", "tf32"])
def test_the_largest_tiles_take_more_shared_memory_than_a_kernel_may_declare(xp, kind):
    layer = Layer("weight_grad", (100, 136, 264), kind, integers, tile=(128, 256, 64, 64))
    assert layer.plan.shared_bytes > 49152
    layer.check(xp, exactly=True)


def test_two_runs_give_the_same_bits(xp):
    layer = Layer("weight_grad", (70, 40, 36), "bfloat16", parts=2)
    first, second = layer.run(xp), layer.run(xp)
    assert (bits(first) == bits(second)).all()


@pytest.mark.parametrize("make", [normal, lambda *arguments: np.abs(normal(*arguments))], ids=["normal", "positive"])
def test_three_tf32_products_are_as_good_as_float32(xp, lane, make):
    """At most four times the error of FMA units; one TF32 product is far beyond that."""
    samples = 512 if lane == "gpu" else 64
    errors = {}
    for kind in ("tf32x3", "tf32"):
        layer = Layer("weight_grad", (samples, 32, 32), kind, make)
        magnitude = np.abs(layer.x.astype(np.float64)).T @ np.abs(layer.dz.astype(np.float64))
        errors[kind] = (np.abs(host(layer.run(xp)) - layer.exact) / magnitude).max()
    fused = densegrad.weight_grad(xp.asarray(layer.x), xp.asarray(layer.dz),
                                  plan=MatmulPlan(32, 32, samples, "float32", 16, 16, 8, 4, 4))
    errors["ieee"] = (np.abs(host(fused) - layer.exact) / magnitude).max()
    assert errors["tf32x3"] <= 4 * errors["ieee"]
    assert errors["tf32"] > 16 * errors["ieee"]


def magnitudes(shape, low, high, seed):
    """Numbers of either sign between two powers of two, whose exponents are spread evenly."""
    draw = np.random.default_rng(seed)
    exponents = draw.integers(low, high, shape)
    return (np.ldexp(1 + draw.random(shape), exponents) * draw.choice((-1, 1), shape)).astype(np.float32)


@pytest.mark.parametrize(("precision", "smallest"), [("tf32", -126), ("tf32x3", -114)])
@pytest.mark.parametrize("samples", [1, 20])
def test_operands_from_zero_and_from_the_smallest_on_keep_the_bound(xp, precision, smallest, samples):
    """Products one by one, and sums of them; other operands are large, so that no result underflows."""
    x, dz = magnitudes((samples, 60), smallest, smallest + 14, 1), magnitudes((samples, 33), -4, 40, 2)
    x[:, 0], x[:, 1] = 0, 2.0 ** smallest
    for arrays in ((x, dz), (dz, x)):
        plan = small_plan(arrays[0].shape[1], arrays[1].shape[1], samples, precision)
        assert plan.smallest_operand == 2.0 ** smallest
        found = densegrad.weight_grad(*map(xp.asarray, arrays), plan=plan)
        exact, bound = expected("weight_grad", arrays, {}, plan.chain, product_error=plan.product_error)
        check_within(found, exact, bound)


@pytest.mark.parametrize(("precision", "smallest"), [("tf32", -126), ("tf32x3", -114)])
def test_smaller_operands_are_off_by_less_than_the_step_of_tf32(xp, precision, smallest):
    x, dz = magnitudes((1, 60), -149, smallest, 3), magnitudes((1, 33), -4, 40, 4)
    x[0, :3] = 2e-38, 2.0 ** -149, np.nextafter(np.float32(2.0 ** smallest), np.float32(0))
    plan = small_plan(60, 33, 1, precision)
    found = densegrad.weight_grad(*map(xp.asarray, (x, dz)), plan=plan)
    exact, bound = expected("weight_grad", (x, dz), {}, plan.chain, product_error=plan.product_error,
                            operand_error=plan.operand_error)
    check_within(found, exact, bound)
    # That is not what operands in the range may be off by.
    _, narrow = expected("weight_grad", (x, dz), {}, plan.chain, product_error=plan.product_error)
    assert (np.abs(host(found) - exact) > narrow).any()


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_what_counts_as_zero_beside_infinity(xp, precision):
    x, dz = np.array([[2.0 ** -149, 2.0 ** -137, 2.0 ** -136, 1]], np.float32), np.array([[np.inf]], np.float32)
    found = host(densegrad.weight_grad(*map(xp.asarray, (x, dz)), precision=precision))[:, 0]
    np.testing.assert_array_equal(found, [np.inf] * 4 if precision == "ieee" else [np.nan, np.nan, np.inf, np.inf])


# plans and the argument


@pytest.mark.parametrize(("dtype", "precision", "wanted"), [
    ("bfloat16", None, TensorCorePlan), ("bfloat16", "ieee", MatmulPlan), ("float32", None, MatmulPlan),
    ("float32", "tf32x3", TensorCorePlan)])
def test_precision_chooses_the_unit(xp, dtype, precision, wanted):
    """By the plans that are launched, of every function where tensor cores are asked for by name."""
    x, w, dz = (xp.asarray(integers((8, 8), dtype, seed)) for seed in (1, 2, 3))
    with recorded() as launches:
        densegrad.weight_grad(x, dz, precision=precision)
        if precision == "tf32x3":
            densegrad.input_grad(dz, w, precision=precision)
            densegrad.weight_bias_grad(x, dz, precision=precision)
            densegrad.dense_grads(x, w, dz, need=("dx", "dw"), precision=precision)
    plans = [launch.plan for launch in launches if "matmul" in launch.kernel]
    assert len(plans) == (5 if precision == "tf32x3" else 1)
    assert {type(plan) for plan in plans} == {wanted}
    assert wanted is MatmulPlan or {plan.precision for plan in plans} == {precision}


def test_a_plan_follows_from_the_capability_not_from_trying():
    sizes = 768, 3072, 8192
    for dtype, precision in (("float16", None), ("bfloat16", None), ("float32", "tf32")):
        newer = {plan_product(*sizes, dtype, precision, capability, aligned=False)
                 for capability in ((8, 0), (8, 9), (9, 0), (12, 0))}
        assert len(newer) == 1
        assert isinstance(newer.pop(), TensorCorePlan)
    turing = plan_product(*sizes, "float16", None, (7, 5))
    assert isinstance(turing, TensorCorePlan)
    assert turing.capability == (7, 5)
    assert "tensor cores of compute capability 7.5, sums in float32" in turing.explain()
    assert isinstance(plan_product(*sizes, "bfloat16", None, (7, 5)), MatmulPlan)
    assert isinstance(plan_product(*sizes, "float16", "ieee", (9, 0)), MatmulPlan)
    with pytest.raises(PlanError, match=r'"tf32" needs compute capability 8.0 or newer; this GPU has 7.5 \(take'):
        plan_product(*sizes, "float32", "tf32", (7, 5))


@pytest.mark.parametrize(("dtype", "precision", "error", "words"), [
    ("float64", "tf32", PlanError, "the inputs are float64 .float64 is multiplied as it is: leave precision out"),
    ("bfloat16", "tf32x3", PlanError, "the inputs are bfloat16 .float16 and bfloat16 are multiplied exactly"),
    ("float32", "fp8", ValueError, """precision must be None, "ieee", "tf32" or "tf32x3"; got 'fp8'"""),
    ("float32", True, ValueError, "got True")])
def test_combinations_that_make_no_sense_are_refused(xp, dtype, precision, error, words):
    x = xp.asarray(integers((3, 4), dtype, 1))
    for call in (lambda: densegrad.weight_grad(x, x, precision=precision),
                 lambda: densegrad.input_grad(x, x, precision=precision),
                 lambda: densegrad.weight_bias_grad(x, x, precision=precision),
                 lambda: densegrad.dense_grads(x, None, x, need="dw", precision=precision)):
        with recorded() as launches, pytest.raises(error, match=words):
            call()
        assert not launches


def test_a_plan_and_a_precision_that_disagree_are_refused(xp):
    x = xp.asarray(integers((3, 4), "float32", 1))
    with pytest.raises(PlanError, match="plan multiplies with precision 'tf32', but precision='tf32x3' was asked for"):
        densegrad.weight_grad(x, x, precision="tf32x3", plan=small_plan(4, 4, 3, "tf32"))
    with pytest.raises(PlanError, match="plan multiplies with precision 'ieee'"):
        densegrad.weight_grad(x, x, precision="tf32", plan=MatmulPlan(4, 4, 3, "float32", 8, 8, 4, 4, 4))
    with pytest.raises(TypeError, match="must be a MatmulPlan or a TensorCorePlan or a ThinPlan or a HopperPlan; got"):
        densegrad.weight_grad(x, x, plan="fast")


@pytest.mark.parametrize(("change", "words"), [
    ({"precision": "ieee"}, "precision of float32 must be one of tf32, tf32x3"), ({"dtype": "float64"}, "float64"),
    ({"tile_rows": 48}, "tile_rows must be"),
    ({"warp_cols": 64}, "warps must fit into tiles of 32 x 32"), ({"tile_depth": 32}, "tile_depth must be 64 bytes"),
    ({"stages": 1}, "stages must be at least 2"), ({"stages": 64}, "at most 101376 bytes"),
    ({"capability": (7, 5)}, r"capability must be \(8, 0\) for float32; got \(7, 5\)"),
    ({"dtype": "float16", "precision": None, "tile_depth": 32, "stages": 17, "capability": (7, 5)},
     "at most 65536 bytes"),
    ({"parts": 0}, "parts must be"),
    ({"tile_rows": 128, "tile_cols": 128, "warp_rows": 128, "warp_cols": 128}, "128 registers for sums"),
    ({"tile_cols": 256}, "copied by")])
def test_plans_that_no_kernel_can_carry_out(change, words):
    values = {"rows": 9, "cols": 9, "depth": 9, "dtype": "float32", "precision": "tf32", "tile_rows": 32,
              "tile_cols": 32, "tile_depth": 16, "warp_rows": 32, "warp_cols": 32, "stages": 3}
    with pytest.raises(PlanError, match=words):
        TensorCorePlan(**values | change)


def test_a_plan_says_unit_and_error_bound():
    assert "tensor cores, sums in float32" in plan_product(768, 3072, 8192, "bfloat16", None, (8, 0)).explain()
    text = plan_product(768, 3072, 8192, "float32", "tf32", (8, 0)).explain()
    assert "tensor cores in tf32" in text
    assert "u + 0.00098) (|left| @ |right|) where operands are 0 or at least 2^-126 in magnitude" in text
    thrice = plan_product(768, 3072, 8192, "float32", "tf32x3", (8, 0)).explain()
    assert "(|left| @ |right|) where operands are 0 or at least 2^-114 in magnitude" in thrice
    assert "FMA units" in plan_product(768, 3072, 8192, "float32", None, (8, 0)).explain()
