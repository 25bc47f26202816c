"""The public functions against float64: every size around a tile, orientation, dtype and way to receive the result."""
import itertools
from dataclasses import fields, replace

import numpy as np
import pytest

import densegrad
from densegrad import reference, testing
from densegrad.calls import recorded
from densegrad.plans import MatmulPlan, plan_batch_sum
from densegrad.testing import LAYOUTS, Placed, bits, check_within, expected, host, integers, normal, poisoned

DTYPES = ("float32", "float16", "bfloat16", "float64")
TILE, TILE_DEPTH = 8, 4
#: nothing, one, around one tile, and a prime beyond it
SIZES = (0, 1, TILE - 1, TILE, TILE + 1, 13)
#: every way to hand a layer over
ORIENTATIONS = tuple(itertools.product((0, 1), ("in_out", "out_in")))
FUNCTIONS = ("bias_grad", "weight_grad", "input_grad")


def small_plan(rows, cols, depth, dtype, parts=1):
    """Few threads and small tiles, so that small matrices have edges and the simulator is quick."""
    return MatmulPlan(rows, cols, depth, dtype, TILE, TILE, TILE_DEPTH, 4, 4, parts)


class Layer:
    """One layer's arrays: x (S, D), w (D, M) and dz (S, M) of the textbook, and as one function takes them."""

    def __init__(self, function, sizes, dtype, make=normal, batch_axis=0, weight_layout="in_out", parts=1):
        samples, in_features, out_features = sizes
        self.function, self.dtype = function, dtype
        self.x = make((samples, in_features), dtype, 1)
        self.w = make((in_features, out_features), dtype, 2)
        self.dz = make((samples, out_features), dtype, 3)
        if function == "weight_grad":
            self.plan = small_plan(in_features, out_features, samples, dtype, parts)
        elif function == "input_grad":
            self.plan = small_plan(samples, in_features, out_features, dtype, parts)
        else:
            self.plan = None
        self.options = {"batch_axis": batch_axis}
        if function != "bias_grad":
            self.options["weight_layout"] = weight_layout

    @property
    def arrays(self):
        dz = self.dz.T if self.options["batch_axis"] else self.dz
        w = self.w.T if self.options.get("weight_layout") == "out_in" else self.w
        return {"bias_grad": (dz,), "weight_grad": (self.x, dz), "input_grad": (dz, w)}[self.function]

    @property
    def exact(self):
        with np.errstate(invalid="ignore"):
            return getattr(reference, self.function)(*self.arrays, **self.options)

    def placed(self, xp, layouts=("C", "C")):
        return [Placed(array, layout, xp).array for array, layout in zip(self.arrays, layouts, strict=False)]

    def run(self, arrays, **more):
        """(result, longest chain of additions): what the function gives for the arrays."""
        with recorded() as launches:
            result = getattr(densegrad, self.function)(*arrays, plan=self.plan, **self.options, **more)
        return result, max((launch.plan.chain for launch in launches), default=0)

    def check(self, xp, layouts=("C", "C"), out_layout="C", out_dtype=None):
        """Compute into an output full of NaN between sentinels, and hold what comes out to float64."""
        out = poisoned(self.exact.shape, out_dtype or self.dtype, out_layout, xp)
        result, chain = self.run(self.placed(xp, layouts), out=out.array)
        assert result is out.array
        check_within(out.read(), *expected(self.function, self.arrays, self.options, chain, out_dtype))


def test_float64_reference_by_central_differences():
    x, w, dz_weight = (normal(shape, "float64", n) for n, shape in enumerate([(5, 4), (4, 3), (5, 3)]))
    b, step = np.zeros(3), 2.0 ** -17

    def loss():
        return (np.sin(x @ w + b) * dz_weight).sum()

    dz = np.cos(x @ w + b) * dz_weight
    found = reference.input_grad(dz, w), reference.weight_grad(x, dz), reference.bias_grad(dz)
    for parameter, gradient in zip((x, w, b), found, strict=True):
        for index in np.ndindex(parameter.shape):
            kept = parameter[index]
            parameter[index] = kept + step
            above = loss()
            parameter[index] = kept - step
            difference = (above - loss()) / (2 * step)
            parameter[index] = kept
            # The third derivative is at most sum |dz_weight| |factor|³; a loss is rounded in about 100 operations.
            steepest = max(1, np.abs(x).max(), np.abs(w).max()) ** 3 * np.abs(dz_weight).sum()
            assert abs(difference - gradient[index]) <= steepest * (step ** 2 / 6 + 100 * 2.0 ** -53 / step)
    assert (reference.bias_grad(dz.T, batch_axis=1, keepdims=True) == found[2][None]).all()
    assert (reference.input_grad(dz.T, w.T, batch_axis=1, weight_layout="out_in") == found[0]).all()
    assert (reference.weight_grad(x, dz.T, batch_axis=1, weight_layout="out_in") == found[1].T).all()


@pytest.mark.parametrize("function", ["weight_grad", "input_grad"])
@pytest.mark.parametrize("samples", SIZES)
def test_every_size_around_a_tile(xp, function, samples):
    for in_features, out_features in itertools.product(SIZES, SIZES):
        Layer(function, (samples, in_features, out_features), "float32").check(xp)


@pytest.mark.parametrize(("dtype", "batch_axis"), [("float32", 0), ("float32", 1), ("bfloat16", 1)])
def test_one_output_or_one_sample_beside_any_length(xp, dtype, batch_axis):
    """The stride of the axis of length 1 means nothing, and nothing may be made of it."""
    for length in (1, 6):
        for sizes in ((length, 2, 1), (2, length, 1), (1, length, 6), (1, 6, length), (length, 1, 2)):
            for function in ("weight_grad", "input_grad"):
                layer = Layer(function, sizes, dtype, batch_axis=batch_axis)
                layer.plan = None
                layer.check(xp)


@pytest.mark.parametrize("samples", SIZES)
def test_bias_grad_of_every_size(xp, samples):
    for out_features, axis in itertools.product(SIZES, (0, 1)):
        Layer("bias_grad", (samples, 4, out_features), "float32", batch_axis=axis).check(xp)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout(xp, function, layout):
    layer = Layer(function, (9, 7, 16), "float32")
    layer.check(xp, (layout, "C"))
    layer.check(xp, ("C", layout))
    layer.check(xp, (layout, layout), layout)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_orientation(xp, function, dtype):
    for axis, weight_layout in ORIENTATIONS if function != "bias_grad" else ORIENTATIONS[::2]:
        Layer(function, (9, 7, 16), dtype, batch_axis=axis, weight_layout=weight_layout).check(xp)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("dtype", "out_dtype"), [
    ("float16", "float32"), ("bfloat16", "float32"), ("bfloat16", "float16"), ("float32", "float64"),
    ("float32", "bfloat16"), ("float64", "float32")])
def test_out_of_another_dtype(xp, function, dtype, out_dtype):
    Layer(function, (13, 7, 9), dtype).check(xp, out_dtype=out_dtype)


@pytest.mark.parametrize("parts", [1, 2])
def test_float64_results_of_float32_are_written_in_at_most_16_bytes(xp, parts):
    """Wherever they lie: no GPU before compute capability 10.0 has wider accesses."""
    x, dz = (integers((16, 8), "float32", seed) for seed in (1, 2))
    out = xp.zeros((8, 8), "float64")
    densegrad.weight_grad(xp.asarray(x), xp.asarray(dz), out=out, plan=small_plan(8, 8, 16, "float32", parts))
    check_within(host(out), reference.weight_grad(x, dz), 0)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("dtype", "out_dtype"), [
    ("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
def test_accumulate_adds_to_what_was_there(xp, function, dtype, out_dtype, parts):
    layer = Layer(function, (13, 9, 7), dtype, parts=parts)
    old = normal(layer.exact.shape, out_dtype, 9)
    out = Placed(old, "C", xp, testing.SENTINEL)
    _, chain = layer.run(layer.placed(xp), out=out.array, accumulate=True)
    check_within(out.read(), *expected(function, layer.arrays, layer.options, chain, out_dtype, old))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact(xp, function, dtype):
    for axis, weight_layout in ORIENTATIONS if function != "bias_grad" else ORIENTATIONS[::2]:
        layer = Layer(function, (9, 13, 11), dtype, integers, axis, weight_layout)
        result, _ = layer.run(layer.placed(xp))
        check_within(result, layer.exact, 0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_hot_probes_find_every_element(xp, function):
    """All factors but one are zero: each wrong entry shows, by its number, which element of dz came out there."""
    layer = Layer(function, (9, 10, 11), "float32")
    layer.dz = np.arange(1, 100, dtype=np.float32).reshape(9, 11)
    for here in ((0, 0), (8, 9), (7, 8), (3, 4), (5, 2)):
        layer.x, layer.w = np.zeros((9, 10), np.float32), np.zeros((10, 11), np.float32)
        layer.x[here] = layer.w[here[::-1]] = 1
        result, _ = layer.run(layer.placed(xp))
        check_within(result, layer.exact, 0)
        if function == "bias_grad":
            layer.dz = np.where(layer.dz == layer.dz[here], layer.dz, 0)


@pytest.mark.parametrize("function", ["weight_grad", "input_grad"])
@pytest.mark.parametrize("parts", [2, 3, 4, 7])
def test_parts_of_the_depth_are_added(xp, function, parts):
    for depth in (3, 8, 21):
        sizes = (depth, 9, 10) if function == "weight_grad" else (9, 10, depth)
        Layer(function, sizes, "float32", parts=parts).check(xp)


def test_parts_are_added_in_ascending_order(xp):
    """The parts come to 1, 2²⁴ and -2²⁴: in float32 only this order gives 0."""
    x, dz = np.zeros((3 * TILE_DEPTH, 4), np.float32), np.ones((3 * TILE_DEPTH, 4), np.float32)
    x[::TILE_DEPTH] = np.array([[1], [2.0 ** 24], [-2.0 ** 24]])
    plan = small_plan(4, 4, len(x), "float32", parts=3)
    ordered = densegrad.weight_grad(xp.asarray(x), xp.asarray(dz), plan=plan)
    check_within(ordered, np.zeros((4, 4)), 0)
    reversed_batch = densegrad.weight_grad(xp.asarray(x[::-1].copy()), xp.asarray(dz), plan=plan)
    check_within(reversed_batch, np.ones((4, 4)), 0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_not_finite_numbers_land_where_mathematics_puts_them(xp, function):
    """One infinity or NaN in the last row and column as well, where zeros that fill a tile up could meet it."""
    layer = Layer(function, (9, 9, 9), "float32")
    arrays = {"bias_grad": (layer.dz,), "weight_grad": (layer.x, layer.dz), "input_grad": (layer.w, layer.dz)}
    for array in arrays[function]:
        for bad, place in ((np.inf, (8, 8)), (np.nan, (0, 0)), (-np.inf, (4, 6))):
            array[place] = bad
            layer.check(xp)
            array[place] = 0
    layer.dz[2, 3], layer.dz[6, 3] = np.inf, -np.inf
    layer.check(xp)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_runs_give_the_same_bits(xp, function, dtype):
    layer = Layer(function, (29, 9, 10), dtype, parts=2)
    first, second = (layer.run(layer.placed(xp))[0] for _ in range(2))
    assert (bits(first) == bits(second)).all()


@pytest.mark.parametrize("function", ["weight_grad", "input_grad"])
def test_tiles_and_layouts_leave_the_bits_alone(xp, function):
    """One part is one chain in ascending order, whatever the tiles are and however operands and result lie."""
    layer = Layer(function, (29, 9, 10), "float32")
    first, _ = layer.run(layer.placed(xp))
    for layouts, out_layout in ((("F", "C"), "C"), (("C", "F"), "F"), (("spread", "padded F"), "spread")):
        out = poisoned(first.shape, "float32", out_layout, xp)
        layer.run(layer.placed(xp, layouts), out=out.array)
        assert (bits(out.read()) == bits(first)).all(), (layouts, out_layout)
    plan, layer.plan = layer.plan, None
    with_default, _ = layer.run(layer.placed(xp))
    assert (bits(with_default) == bits(first)).all(), plan


def test_dense_grads_is_all_three(xp):
    sizes, dtype = (9, 10, 7), "float32"
    layers = [Layer(function, sizes, dtype, batch_axis=1, weight_layout="out_in") for function in FUNCTIONS]
    db, dw, dx = (layer.run(layer.placed(xp))[0] for layer in layers)
    x, w, dz = (Placed(array, "C", xp).array for array in (layers[0].x, layers[0].w.T, layers[0].dz.T))
    plans = densegrad.DenseGrads(layers[2].plan, layers[1].plan, None)
    together = densegrad.dense_grads(x, w, dz, batch_axis=1, weight_layout="out_in", keepdims=True, plan=plans)
    assert together.db.shape == (1, 7)
    riding = densegrad.weight_bias_grad(x, dz, batch_axis=1, weight_layout="out_in", plan=layers[1].plan)
    for one, other in zip(together, (dx, dw, riding.db), strict=True):
        assert (bits(one).reshape(-1) == bits(other).reshape(-1)).all()
    apart = densegrad.dense_grads(x, w, dz, batch_axis=1, weight_layout="out_in", need=["db", "dx"])
    assert (bits(apart.db) == bits(db)).all()
    assert apart.dw is None


@pytest.mark.parametrize(("name", "call"), [
    ("x", lambda one: densegrad.weight_grad(None, one)), ("x", lambda one: densegrad.weight_bias_grad(None, one)),
    ("w", lambda one: densegrad.input_grad(one, None))])
def test_an_array_that_is_missing(name, call):
    with pytest.raises(TypeError, match=f"{name} must be an array; got None"):
        call(np.ones((2, 3), "float32"))


@pytest.mark.parametrize("batch_axis", [True, 1.0, "0", None])
def test_an_axis_is_an_int(batch_axis):
    with pytest.raises(TypeError, match="batch_axis must be the int 0 or 1; got"):
        densegrad.bias_grad(np.ones((2, 3), "float32"), batch_axis=batch_axis)


def test_plans_of_dense_grads_are_named_in_errors():
    x, w, dz = (np.ones(shape, "float32") for shape in ((4, 3), (3, 2), (4, 2)))
    wrong = MatmulPlan(5, 2, 4, "float32", 8, 8, 4, 4, 4)
    for plans, name in ((densegrad.DenseGrads(dw=wrong), "plan.dw"), (densegrad.DenseGrads(dx=wrong), "plan.dx")):
        with pytest.raises(densegrad.PlanError, match=f"{name} was made for rows 5"):
            densegrad.dense_grads(x, w, dz, plan=plans)
    with pytest.raises(TypeError, match=r"plan\.db must be an UpstreamPlan"):
        densegrad.dense_grads(x, w, dz, sample_weight=np.ones(4, "float32"),
                              plan=densegrad.DenseGrads(db=plan_batch_sum(4, 2, "float32", "flat")))
    with pytest.raises(densegrad.OutError, match=r"accumulate=\('dw',\) adds into out\.dw.*or leave 'dw' out"):
        densegrad.dense_grads(x, w, dz, accumulate=("dw",))


@pytest.mark.parametrize("make", [
    lambda: plan_batch_sum(20, 6, "float32", "flat"), lambda: MatmulPlan(5, 2, 4, "float32", 8, 8, 4, 4, 4),
    lambda: densegrad.plans.plan_tensor_core(64, 64, 64, "float16")])
def test_plans_count_in_ints(make):
    """A plan with 2.0 would equal the one with 2, and calls that were prepared for the one be taken for the other."""
    plan = make()
    for field in fields(plan):
        if field.type == "int":
            with pytest.raises(densegrad.PlanError, match=f"plan: {field.name} must be an int; got"):
                replace(plan, **{field.name: float(getattr(plan, field.name))})


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"sample_weight": True}])
@pytest.mark.parametrize("batch_axis", [0, 1])
def test_a_compensated_bias_gradient_of_all_three(xp, batch_axis, options):
    """It has the bits of bias_grad, of the dz that is formed where there is something above; dx and dw are the same."""
    x, w, dz, z = (xp.asarray(normal(shape, "float32", seed)) for seed, shape in enumerate(
        ((41, 5), (5, 7), *[(7, 41) if batch_axis else (41, 7)] * 2)))
    formed = dict(options)
    if "sample_weight" in options:
        formed["sample_weight"] = xp.asarray(np.arange(41) % 3 > 0)
    given = formed | ({"z": z} if "activation" in options else {})
    together = densegrad.dense_grads(x, w, dz, batch_axis=batch_axis, compensated=True, alpha=0.5, **given)
    plain = densegrad.dense_grads(x, w, dz, batch_axis=batch_axis, alpha=0.5, **given)
    below = dz if not options else densegrad.activation_grad(
        dz, given.get("z"), formed.pop("activation", "identity"), batch_axis=batch_axis, **formed).dz
    alone = densegrad.bias_grad(below, batch_axis=batch_axis, compensated=True, alpha=0.5)
    for one, other in zip(together, (plain.dx, plain.dw, alone), strict=True):
        assert (bits(one) == bits(other)).all()
    with pytest.raises(ValueError, match="compensated is about db, which is not needed"):
        densegrad.dense_grads(x, w, dz, batch_axis=batch_axis, compensated=True, need=["dx"])
    if not options:
        plan = plan_batch_sum(41, 7, "float32", "features_first" if batch_axis else "flat")
        with pytest.raises(densegrad.PlanError, match=r"plan\.db is not compensated"):
            densegrad.dense_grads(x, w, dz, batch_axis=batch_axis, compensated=True, plan=densegrad.DenseGrads(db=plan))


@pytest.mark.parametrize("weight_layout", ["in_out", "out_in"])
@pytest.mark.parametrize("batch_axis", [0, 1])
@pytest.mark.parametrize(("sizes", "tile", "parts"), [
    ((29, 9, 10), (8, 8, 8, 4, 4), 3), ((37, 20, 70), (16, 64, 8, 8, 8), 1), ((3, 17, 5), (16, 8, 4, 4, 4), 1),
    ((0, 3, 5), (8, 8, 8, 4, 4), 1), ((5, 0, 3), (8, 8, 8, 4, 4), 1), ((40, 33, 64), (32, 32, 16, 8, 4), 2)])
def test_the_bias_gradient_rides_along_exactly(xp, sizes, tile, parts, batch_axis, weight_layout):
    """Small integers, scaled by a power of two and added into what is there: any lost or repeated row shows."""
    samples, inputs, outputs = sizes
    draw = np.random.default_rng(5)
    x, dz = (draw.integers(-4, 5, shape).astype("float32") for shape in ((samples, inputs), (samples, outputs)))
    expected_dw, expected_db = 3 + 0.5 * x.T @ dz, 7 + 0.5 * dz.sum(axis=0)
    out = densegrad.WeightBiasGrads(dw=xp.full((inputs, outputs), 3, "float32"), db=xp.full(outputs, 7, "float32"))
    if weight_layout == "out_in":
        expected_dw, out = expected_dw.T, out._replace(dw=xp.full((outputs, inputs), 3, "float32"))
    plan = densegrad.plans.MatmulPlan(inputs, outputs, samples, "float32", *tile, parts)
    densegrad.weight_bias_grad(xp.asarray(x), xp.asarray(np.ascontiguousarray(dz.T) if batch_axis else dz), plan=plan,
                               batch_axis=batch_axis, weight_layout=weight_layout, alpha=0.5, out=out, accumulate=True)
    np.testing.assert_array_equal(host(out.dw), expected_dw)
    np.testing.assert_array_equal(host(out.db), expected_db)


@pytest.mark.parametrize("parts", [1, 2])
def test_alpha_scales_each_gradient(xp, parts):
    x = xp.asarray(np.arange(36, dtype="float32").reshape(9, 4))
    plan = densegrad.plans.MatmulPlan(4, 4, 9, "float32", 8, 8, 4, 4, 4, parts)
    for scaled, whole in ((densegrad.bias_grad(x, alpha=0.25), densegrad.bias_grad(x)),
                          (densegrad.weight_grad(x, x, alpha=0.25, plan=plan), densegrad.weight_grad(x, x, plan=plan)),
                          (densegrad.input_grad(x, x[:4], alpha=0.25), densegrad.input_grad(x, x[:4]))):
        assert (bits(scaled) == bits(whole / 4)).all()


@pytest.mark.parametrize("need", [("dx",), ("dw",), ("db",), ("db", "dw"), "dx"])
def test_need_chooses_gradients(xp, need):
    layer = Layer("weight_grad", (5, 4, 3), "float32")
    x, w, dz = (xp.asarray(array) for array in (layer.x, layer.w, layer.dz))
    named = {need} if isinstance(need, str) else set(need)
    found = densegrad.dense_grads(x if "dw" in named else None, w if "dx" in named else None, dz, need=need)
    assert {name for name, value in found._asdict().items() if value is not None} == named


def test_leading_batch_axes_are_flattened(xp):
    x, dz, w = (normal(shape, "float32", 5) for shape in ((2, 3, 5, 7), (2, 3, 5, 4), (7, 4)))
    for name, arrays, plan in (("weight_grad", (x, dz), small_plan(7, 4, 30, "float32")), ("bias_grad", (dz,), None),
                               ("input_grad", (dz, w), small_plan(30, 7, 4, "float32"))):
        meaning, function = getattr(reference, name), getattr(densegrad, name)
        for turn in (lambda array: array, lambda array: np.swapaxes(array, 0, 1) if array.ndim == 4 else array):
            given = [turn(xp.asarray(array)) for array in arrays]
            with recorded() as launches:
                result = function(*given, plan=plan)
            exact, bound = expected(name, tuple(turn(array) for array in arrays), {}, launches[0].plan.chain)
            check_within(result, exact, bound)
            assert exact.shape == meaning(*(turn(array) for array in arrays)).shape


@pytest.mark.parametrize("sizes", [(0, 4, 3), (5, 0, 3), (5, 4, 0), (0, 0, 0)])
def test_empty_layers(xp, sizes):
    for function in FUNCTIONS:
        layer = Layer(function, sizes, "float32", integers)
        layer.check(xp)
        old = integers(layer.exact.shape, "float32", 4)
        out = Placed(old, "C", xp, testing.SENTINEL)
        layer.run(layer.placed(xp), out=out.array, accumulate=True)
        check_within(out.read(), layer.exact + old, 0)


def test_an_empty_out_lies_as_well_as_any(xp):
    """Its strides say nothing, and are no reason to refuse it."""
    out = xp.empty((2, 4, 3), "float32")[:, :0]
    assert densegrad.input_grad(xp.empty((2, 0, 5), "float32"), xp.empty((3, 5), "float32"), out=out) is out


def test_broadcast_inputs(xp):
    row, column = integers((1, 9), "float32", 1), integers((13, 1), "float32", 2)
    x = normal((13, 10), "float32", 3)
    plan = small_plan(10, 9, 13, "float32")
    for dz in (row, column):
        spread = np.broadcast_to(dz, (13, 9))
        on_device = xp.broadcast_to(xp.asarray(dz), (13, 9))
        exact, bound = expected("weight_grad", (x, spread), {}, plan.chain)
        check_within(densegrad.weight_grad(xp.asarray(x), on_device, plan=plan), exact, bound)
        check_within(densegrad.bias_grad(on_device), reference.bias_grad(spread), 0)


@pytest.mark.large
def test_elements_beyond_two_to_the_31st(xp):
    """Rows 2³⁰ + 8 elements apart: the third lies beyond what 32 bits count, in elements and in bytes."""
    stride, rows, cols = 2 ** 30 + 8, 3, 5
    memory = xp.empty(2 * stride + cols, np.float16)
    far = xp.lib.stride_tricks.as_strided(memory, (rows, cols), (2 * stride, 2))
    shapes = (rows, cols), (rows, 4), (4, cols)
    values, other, w = (integers(shape, "float16", seed) for seed, shape in enumerate(shapes))
    far[...] = xp.asarray(values)
    near, weights = xp.asarray(other), xp.asarray(w)
    check_within(densegrad.bias_grad(far), reference.bias_grad(values), 0)
    check_within(densegrad.bias_grad(far.T, batch_axis=1), reference.bias_grad(values), 0)
    check_within(densegrad.weight_grad(far, near, plan=small_plan(cols, 4, rows, "float16")),
                 reference.weight_grad(values, other), 0)
    check_within(densegrad.weight_grad(near, far.T, batch_axis=1, plan=small_plan(4, cols, rows, "float16")),
                 reference.weight_grad(other, values), 0)
    check_within(densegrad.input_grad(far, weights, plan=small_plan(rows, 4, cols, "float16")),
                 reference.input_grad(values, w), 0)
    del near
    upstream = integers((rows, 4), "float16", 7)
    plan = small_plan(rows, cols, 4, "float16")
    densegrad.input_grad(xp.asarray(upstream), xp.asarray(w.T.copy()), out=far, plan=plan)
    check_within(host(far.copy()), reference.input_grad(upstream, w.T), 0)


@pytest.mark.parametrize("layouts", [("C", "C"), ("F", "F")])
def test_several_warps_share_their_tiles(xp, layouts):
    """Two warps fill and read each stage: a missing barrier is a race between them."""
    draw = np.random.default_rng(11)
    x, dz = (draw.integers(-4, 5, shape).astype("float32") for shape in ((29, 40), (29, 50)))
    plan = MatmulPlan(40, 50, 29, "float32", 32, 32, 8, 4, 4)
    placed = (xp.asarray(np.asarray(a, order=order)) for a, order in zip((x, dz), layouts, strict=True))
    grads = densegrad.weight_bias_grad(*placed, plan=plan)
    np.testing.assert_array_equal(host(grads.dw), x.T @ dz)
    np.testing.assert_array_equal(host(grads.db), dz.sum(axis=0))


def test_results_in_float64_are_stored_in_accesses_of_16_bytes(xp):
    """Wider ones are for GPUs from capability 10.0 on, and no others link them."""
    x, dz = (xp.asarray(normal((40, 16), "float32", n)) for n in range(2))
    for parts in (1, 3):
        with recorded() as launches:
            densegrad.weight_grad(x, dz, out=xp.zeros((16, 16), "float64"),
                                  plan=small_plan(16, 16, 40, "float32", parts))
        assert launches[-1].constants.result.access == 2


@pytest.mark.parametrize("sizes", [(0, 4, 3), (5, 4, 0)])
def test_without_samples_or_outputs_dz_is_formed_in_no_memory(sizes, xp):
    """What has no elements lies in the workspace all the same."""
    samples, inputs, outputs = sizes
    x, w, dz = (xp.ones(shape, "float32") for shape in ((samples, inputs), (inputs, outputs), (samples, outputs)))
    found = densegrad.dense_grads(x, w, dz, activation="relu", z=dz)
    assert [gradient.shape for gradient in found] == [(samples, inputs), (inputs, outputs), (outputs,)]
    assert not any(host(gradient).any() for gradient in found)
