"""dL/dZ below activations against float64, and dL/db: the sum of what was stored, to the last bit."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import densegrad as dg
from densegrad import reference
from densegrad.activations import ENTRIES, SELU_ALPHA, SELU_SCALE, Formula, normal_tail
from densegrad.device import dtype_of
from densegrad.errors import DTypeError, OutError, PlanError, ShapeError
from densegrad.plans import ACTIVATIONS, BatchSumPlan, UpstreamPlan, accumulator_of, plan_upstream
from densegrad.testing import (
    LAYOUTS,
    ROUNDOFF,
    SENTINEL,
    Placed,
    activation_roundings,
    bits,
    check_within,
    dz_bound,
    host,
    normal,
    poisoned,
)

DTYPES = ("float16", "bfloat16", "float32", "float64")


def data(shape, dtype, seed=0):
    """Normal numbers times 3, so that activations bend."""
    return (3 * normal(shape, "float64", seed)).astype(dtype_of(dtype))


def small_plan(above, samples, outputs, dtype, features_first, parts=1):
    """A plan of few threads with several lanes and parts."""
    if features_first:
        line = 4 * 16 // np.dtype(dtype_of(dtype)).itemsize
        return UpstreamPlan(above, BatchSumPlan(samples, outputs, dtype, "features_first", 4, 4, 2,
                                                -(-samples // (line * parts)) * line, runs_per_block=4, folders=4))
    return UpstreamPlan(above, BatchSumPlan(samples, outputs, dtype, "rows", 4, 16, 2, -(-samples // parts)))


def on(xp, *arrays):
    return [None if array is None else xp.asarray(array) for array in arrays]


def placed_as_it_is(xp, array):
    """The lane's own array, with its axes in the order that they have in memory."""
    order = np.argsort([-stride for stride in array.strides], kind="stable")
    return xp.asarray(np.ascontiguousarray(array.transpose(order))).transpose(*map(int, np.argsort(order)))


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_float64_derivatives_by_central_differences(activation):
    functions = {
        "relu": lambda z: np.maximum(z, 0), "leaky_relu": lambda z: np.where(z > 0, z, 0.01 * z),
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)), "tanh": np.tanh, "silu": lambda z: z / (1 + np.exp(-z)),
        "gelu": lambda z: z * normal_tail(np, -z),
        "gelu_tanh": lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z ** 3))),
        "softplus": lambda z: np.log1p(np.exp(z)), "elu": lambda z: np.where(z > 0, z, np.expm1(z)),
        "selu": lambda z: SELU_SCALE * np.where(z > 0, z, SELU_ALPHA * np.expm1(z)),
        "mish": lambda z: z * np.tanh(np.log1p(np.exp(z))),
        "hardswish": lambda z: z * np.clip(z + 3, 0, 6) / 6, "relu6": lambda z: np.clip(z, 0, 6)}
    z, step = np.linspace(-7, 7, 96), 2.0 ** -17
    function = functions[activation]
    difference = (function(z + step) - function(z - step)) / (2 * step)
    # No third derivative is over 6, and a value is rounded in about 20 operations of numbers up to 8.
    bound = 6 * step ** 2 / 6 + 20 * 8 * 2.0 ** -53 / step
    assert (np.abs(difference - reference.derivative(activation, z)) <= bound).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "batch_axis"), [("float32", 0), ("bfloat16", 1)])
def test_every_activation(activation, dtype, batch_axis, xp):
    shape = (9, 37) if batch_axis else (37, 9)
    da, z = data(shape, dtype, 1), data(shape, dtype, 2)
    z.flat[:5] = 0, 30, -30, 200, -200
    given = None if activation == "identity" else z
    plan = small_plan(activation, 37, 9, dtype, batch_axis, parts=2)
    out = poisoned(shape, dtype, module=xp)
    options = {"batch_axis": batch_axis, "alpha": 0.75}
    options |= {"negative_slope": 0.3} if activation == "leaky_relu" else {}
    _, db = dg.activation_grad(*on(xp, da, given), activation, out=dg.OutputGrads(dz=out.array), plan=plan, **options)
    exact, _ = reference.activation_grad(da, given, activation, **options)
    check_within(out.read(), exact, dz_bound(exact, np.abs(0.75 * da.astype(float)),
                                             activation_roundings(activation, dtype), dtype))
    assert (bits(db) == bits(dg.bias_grad(out.array, batch_axis=batch_axis, plan=plan.sum))).all()


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_derivatives_have_their_limits_at_infinity(activation, xp):
    z = np.array([[np.inf, -np.inf, 1e30, -1e30]], "float32")
    dz, _ = dg.activation_grad(xp.asarray(np.full((1, 4), 3, "float32")), xp.asarray(z), activation)
    above = {"sigmoid": 0, "tanh": 0, "relu6": 0, "selu": np.float32(3) * np.float32(SELU_SCALE)}.get(activation, 3)
    below = np.float32(3) * np.float32(0.01) if activation == "leaky_relu" else 0
    np.testing.assert_array_equal(host(dz), np.array([[above, below, above, below]], "float32"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name not in ("identity", "leaky_relu")])
def test_derivatives_keep_their_bounds_from_end_to_end(activation, dtype, xp):
    """Where exponentials are large, small and all between, and at thresholds: a factor above of 1, so of f' itself."""
    z = np.concatenate([np.linspace(-30, 30, 2401), np.linspace(-3.1, 3.1, 625), -np.geomspace(1e-7, 100, 301)])
    z = z[:3325].reshape(25, 133).astype(dtype_of(dtype))
    da = np.ones(z.shape, z.dtype)
    dz, _ = dg.activation_grad(*on(xp, da, z), activation)
    exact, _ = reference.activation_grad(da, z, activation)
    check_within(dz, exact, dz_bound(exact, 1.0, activation_roundings(activation, dtype), dtype))


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_where_nothing_passes_dz_is_zero_whatever_da_is(activation, xp):
    da = np.array([[np.nan, np.inf, np.nan, np.nan, -np.inf]], "float32")
    z = np.array([[-3, -4, -np.inf, -7, -3]], "float32")
    dz, _ = dg.activation_grad(*on(xp, da, z), activation)
    np.testing.assert_array_equal(host(dz), 0)
    exact, _ = reference.activation_grad(da, z, activation)
    np.testing.assert_array_equal(exact, 0)


def test_half_types_may_have_a_formula_and_a_bound_of_their_own(monkeypatch, xp):
    """An entry of which only the half types' formula is twice the other."""
    relu = ENTRIES["relu"]
    twice = Formula(lambda number, above, z, parameter: number.where(z <= 0, 0, 2 * above), 7, 1)
    monkeypatch.setenv("DENSEGRAD_CACHE_DIR", "")
    monkeypatch.setitem(ENTRIES, "twice", replace(relu, name="twice", half=twice))
    monkeypatch.setattr("densegrad.families.upstream.ACTIVATIONS", (*ACTIVATIONS, "twice"))
    monkeypatch.setattr("densegrad.output_gradients.ACTIVATIONS", (*ACTIVATIONS, "twice"))
    da = data((16, 40), "float32", 50)
    for dtype, factor, roundings, threads in (("bfloat16", 2, 7, 512), ("float32", 1, 0, 1024)):
        one = da.astype(dtype_of(dtype))
        dz, _ = dg.activation_grad(*on(xp, one, np.abs(one)), "twice")
        np.testing.assert_array_equal(host(dz), factor * one)
        assert activation_roundings("twice", dtype) == roundings
        plan = plan_upstream(8192, 3072, dtype, "rows", "twice")
        assert plan.blocks_per_multiprocessor == threads // plan.threads


@pytest.mark.parametrize("batch_axis", [0, 1])
@pytest.mark.parametrize("weights", ["float32", "float16", "bfloat16", "bool"])
@pytest.mark.parametrize("shape", [(37, 9), (130, 16), (5, 1)])
def test_samples_are_weighted_or_chosen(shape, weights, batch_axis, xp):
    samples, outputs = shape
    da = data(shape, "float32", 3)
    weight = normal((samples,), "float32", 4)
    weight = weight > 0 if weights == "bool" else weight.astype(dtype_of(weights))
    given = np.ascontiguousarray(da.T) if batch_axis else da
    exact, _ = reference.activation_grad(given, sample_weight=weight, batch_axis=batch_axis)
    found = dg.activation_grad(xp.asarray(given), sample_weight=xp.asarray(weight), batch_axis=batch_axis)
    check_within(found.dz, exact, dz_bound(exact, np.abs(exact), 0, "float32"))
    plan = plan_upstream(samples, outputs, "float32", "features_first" if batch_axis else "flat", "identity")
    assert (bits(found.db) == bits(dg.bias_grad(found.dz, batch_axis=batch_axis, plan=plan.sum))).all()


@pytest.mark.parametrize("batch_axis", [0, 1])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_padding_contributes_exactly_nothing(activation, batch_axis, xp):
    da, z = data((29, 6), "float32", 5), data((29, 6), "float32", 6)
    mask = np.arange(29) % 3 > 0
    da[~mask], z[~mask] = np.nan, np.inf

    def grads(da, z, **options):
        given = (da, None if activation is None else z)
        oriented = (array.T.copy() if batch_axis and array is not None else array for array in given)
        return dg.activation_grad(*on(xp, *oriented), activation, batch_axis=batch_axis, **options)

    weighted = grads(da, z, sample_weight=xp.asarray(mask))
    dz = host(weighted.dz).T if batch_axis else host(weighted.dz)
    assert (dz[~mask] == 0).all()
    assert np.isfinite(host(weighted.db)).all()
    # Zeros in place of the padding give the same bits: adding them changes none.
    kept, kept_z = np.where(mask[:, None], da, 0).astype("float32"), np.where(mask[:, None], z, 0).astype("float32")
    np.testing.assert_array_equal(host(weighted.db), host(grads(kept, kept_z).db))


@pytest.mark.parametrize("batch_axis", [0, 1])
def test_what_is_left_out_is_zero_whatever_its_factors_are(batch_axis, xp):
    da, mask = np.ones((2, 2), "float32"), np.array([True, False])
    dz, _ = dg.activation_grad(xp.asarray(da), sample_weight=xp.asarray(mask), alpha=np.inf, batch_axis=batch_axis)
    lost = host(dz)[:, 1] if batch_axis else host(dz)[1]
    np.testing.assert_array_equal(lost, 0)


def test_an_f_ordered_gradient_gives_an_f_ordered_dz(xp):
    da = xp.asarray(data((20, 3), "float32", 24).T.copy()).T
    plan = plan_upstream(20, 3, "float32", "features_first", "identity")
    dz, db = dg.activation_grad(da, alpha=0.5, plan=plan)
    assert dz.strides == da.strides
    np.testing.assert_array_equal(host(dz), host(da) / 2)
    assert (bits(db) == bits(dg.bias_grad(dz, plan=plan.sum))).all()


@pytest.mark.parametrize("batch", [(2, 2), (3, 2, 4)])
@pytest.mark.parametrize("above", ["identity", "relu", "mask"])
def test_a_new_dz_has_features_first_and_batch_axes_in_their_own_order(above, batch, xp):
    """Two batch axes that flatten to one, with samples side by side in memory: turning all axes would permute them."""
    def memory_order(array):
        return np.moveaxis(np.moveaxis(array, -1, 0).copy(), 0, -1)

    z, samples = memory_order(data((*batch, 3), "float32", 26)), np.arange(np.prod(batch)).reshape(batch)
    arguments, options = (z,), {}
    if above == "relu":
        arguments = z, memory_order(data((*batch, 3), "float32", 27)), "relu"
    elif above == "mask":
        options = {"sample_weight": samples % 3 > 0}
    exact = reference.activation_grad(*arguments, **options)[0].reshape(z.shape)
    given = [argument if isinstance(argument, str) else placed_as_it_is(xp, argument) for argument in arguments]
    dz, _ = dg.activation_grad(*given, **{name: xp.asarray(value) for name, value in options.items()})
    check_within(dz, exact, dz_bound(exact, np.abs(z), 0, "float32"))
    assert dz.strides == z.strides


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features_first", [False, True])
def test_memory_layouts_leave_the_bits_alone(layout, features_first, xp):
    """Each of the matrices lies otherwise once; with samples side by side all of them are handed over transposed."""
    shape = (16, 24)
    da, z = data(shape, "float32", 11), data(shape, "float32", 12)
    samples, outputs = shape[::-1] if features_first else shape
    plan = small_plan("silu", samples, outputs, "float32", features_first, 2)
    options = {"batch_axis": int(features_first), "sample_weight": xp.arange(samples, dtype="float32")}
    if layout in ("F", "padded F"):
        options["sample_weight"] = xp.asarray(np.repeat(host(options["sample_weight"]), 2))[::2]
    plain = dg.activation_grad(*on(xp, da, z), "silu", plan=plan, **options)
    for where in range(3):
        kinds = [layout if where == place else "C" for place in range(3)]
        if where == 0 and layout in ("F", "padded F"):
            continue  # another order of memory, hence another plan
        out = poisoned(shape, "float32", kinds[2], xp)
        sources = (Placed(array, kind, xp).array for array, kind in zip((da, z), kinds, strict=False))
        dz, db = dg.activation_grad(*sources, "silu", out=dg.OutputGrads(dz=out.array), plan=plan, **options)
        assert dz is out.array
        assert (bits(out.read()) == bits(plain.dz)).all()
        assert (bits(db) == bits(plain.db)).all()


#: (dtype, activation, dtype of weights or None, batch_axis): few, since each takes the compiler seconds
DRAWN = (("float32", "relu", None, 0), ("float32", "leaky_relu", "bool", 1), ("float16", "identity", "float32", 0),
         ("float32", "relu6", None, 1),
         ("bfloat16", "relu", "bfloat16", 1), ("float64", "leaky_relu", "float64", 0))
#: layouts in which neither axis of the matrix is reversed in memory or takes its place in another order of axes
KEPT = sorted(set(LAYOUTS) - {"F", "padded F"})


@pytest.mark.parametrize(("dtype", "activation", "weights", "batch_axis"), DRAWN)
def test_drawn_shapes_and_memory(dtype, activation, weights, batch_axis, xp):
    """Where there is no exponential, each element has the bits that its formula's roundings give it."""
    wide = np.dtype(accumulator_of(dtype)).type

    @settings(deadline=None, derandomize=True, max_examples=5)
    @given(st.integers(1, 40), st.integers(2, 20), st.integers(1, 2), st.tuples(*[st.sampled_from(KEPT)] * 3),
           st.sampled_from([1.0, -0.75, 1 / 3]), st.integers(1, 3))
    def holds(samples, outputs, parts, kinds, alpha, step):
        shape = (outputs, samples) if batch_axis else (samples, outputs)
        da, z = data(shape, dtype, samples), data(shape, dtype, outputs)
        spread = data((step * samples,), "float32", 5)
        weight = None if weights is None else spread > 0 if weights == "bool" else spread.astype(dtype_of(weights))
        plan = small_plan(activation, samples, outputs, dtype, batch_axis, parts)
        out = poisoned(shape, dtype, kinds[2], xp)
        below = {"identity": da, "relu": np.where(z <= 0, 0, da), "relu6": np.where((z > 0) & (z < 6), da, 0),
                 "leaky_relu": np.where(z > 0, da, da.astype(wide) * wide(0.01))}[activation].astype(wide)
        if weights == "bool":
            below = below * wide(alpha)
        if weight is not None:
            row = weight[::step] if batch_axis else weight[::step, None]
            below = np.where(row, below, wide(0)) if weights == "bool" else below * row.astype(wide)
        below = below if weights == "bool" else below * wide(alpha)
        sources = [Placed(array, kind, xp).array for array, kind in zip((da, z), kinds, strict=False)]
        _, db = dg.activation_grad(sources[0], None if activation == "identity" else sources[1], activation,
                                   sample_weight=None if weight is None else xp.asarray(weight)[::step], alpha=alpha,
                                   batch_axis=batch_axis, out=dg.OutputGrads(dz=out.array), plan=plan)
        np.testing.assert_array_equal(bits(out.read()), bits(below.astype(da.dtype)))
        dense = xp.asarray(np.ascontiguousarray(out.read()))
        np.testing.assert_array_equal(bits(db), bits(dg.bias_grad(dense, batch_axis=batch_axis, plan=plan.sum)))

    holds()


@pytest.mark.parametrize("replaced", ["da", "z"])
def test_dz_may_take_the_place_of_an_input(replaced, xp):
    da, z = data((21, 10), "float16", 13), data((21, 10), "float16", 14)
    apart = dg.activation_grad(*on(xp, da, z), "tanh")
    arrays = {"da": xp.asarray(da.copy()), "z": xp.asarray(z.copy())}
    together = dg.activation_grad(arrays["da"], arrays["z"], "tanh", out=dg.OutputGrads(dz=arrays[replaced]))
    assert together.dz is arrays[replaced]
    assert (bits(together.dz) == bits(apart.dz)).all()
    assert (bits(together.db) == bits(apart.db)).all()


@pytest.mark.parametrize("samples", [0, 1, 9])
@pytest.mark.parametrize(("outputs", "batch_axis"), [
    (0, 0), (1, 0), (3, 0), (10, 0), (33, 0), (130, 0), (0, 1), (1, 1), (5, 1)])
def test_planned_sums_of_every_width(samples, outputs, batch_axis, xp):
    shape = (outputs, samples) if batch_axis else (samples, outputs)
    da, z = data(shape, "float32", 15), data(shape, "float32", 16)
    old = np.full(outputs, 2, "float32")
    db = Placed(old, "C", xp, SENTINEL)
    dz, _ = dg.activation_grad(*on(xp, da, z), "relu", batch_axis=batch_axis, out=dg.OutputGrads(db=db.array),
                               accumulate=True)
    exact, total = reference.activation_grad(da, z, "relu", batch_axis=batch_axis)
    np.testing.assert_array_equal(host(dz), exact.astype("float32"))
    magnitude = np.abs(exact).sum(axis=int(batch_axis)) + 2
    check_within(db.read(), total + 2, (samples + 3) * ROUNDOFF["float32"] * magnitude)


def test_a_long_batch_is_cut_into_parts(xp):
    z = np.ones((2500, 7), "float32")
    z[::2, 3] = -1
    dz, db = dg.activation_grad(*on(xp, 2 * np.ones_like(z), z), "relu")
    np.testing.assert_array_equal(host(db), [5000, 5000, 5000, 2500, 5000, 5000, 5000])
    assert host(dz)[:2, 3].tolist() == [0, 2]
    assert plan_upstream(2500, 7, "float32", "flat", "relu").sum.parts > 1


@pytest.mark.parametrize("batch_axis", [0, 1])
def test_dense_grads_goes_below_the_activation(batch_axis, xp):
    x, w = data((23, 7), "float32", 17), data((7, 12), "float32", 18)
    da, z = (data((12, 23) if batch_axis else (23, 12), "float32", seed) for seed in (19, 20))
    weight = np.arange(23) % 4 != 0
    x, w, da, z, weight = on(xp, x, w, da, z, weight)
    options = {"batch_axis": batch_axis, "alpha": 0.5}
    together = dg.dense_grads(x, w, da, activation="gelu", z=z, sample_weight=weight, **options)
    dz, db = dg.activation_grad(da, z, "gelu", sample_weight=weight, **options)
    assert (bits(together.db) == bits(db)).all()
    assert (bits(together.dx) == bits(dg.input_grad(dz, w, batch_axis=batch_axis))).all()
    assert (bits(together.dw) == bits(dg.weight_grad(x, dz, batch_axis=batch_axis))).all()
    weighted = dg.dense_grads(None, w, da, need="dx", sample_weight=weight, **options)
    dz, _ = dg.activation_grad(da, sample_weight=weight, **options)
    assert (bits(weighted.dx) == bits(dg.input_grad(dz, w, batch_axis=batch_axis))).all()


@pytest.mark.parametrize(("dtype", "option", "batch_axis", "parts"), [
    ("float16", "relu", 0, 1), ("bfloat16", "gelu", 1, 1), ("float16", "mask", 1, 1), ("float16", "weights", 0, 2)])
def test_alpha_scales_sums_and_not_what_is_rounded_to_half(dtype, option, batch_axis, parts, xp):
    """An alpha that float16 has no room for, with results in float32: those without alpha, scaled."""
    shape = (4, 23) if batch_axis else (23, 4)
    x, w, dz, z = on(xp, data((23, 5), dtype, 28), data((5, 4), dtype, 29), data(shape, dtype, 30) / dtype_of(dtype)
                     .type(2048), data(shape, dtype, 31))
    options = {"mask": {"sample_weight": xp.arange(23) % 4 > 0},
               "weights": {"sample_weight": xp.arange(23, dtype="float32") / xp.float32(32)},
               }.get(option, {"activation": option, "z": z})
    # Cut into parts, it is the second launch that scales db.
    plan = small_plan(option if "z" in options else "identity", 23, 4, dtype, batch_axis, parts)
    assert plan.sum.parts == parts

    def grads(alpha, accumulate):
        outs = dg.DenseGrads(*(xp.full(size, 1 if accumulate else np.nan, "float32") for size in ((23, 5), (5, 4), 4)))
        return map(host, dg.dense_grads(x, w, dz, alpha=alpha, out=outs, accumulate=accumulate, batch_axis=batch_axis,
                                        plan=dg.DenseGrads(db=plan), **options))

    unscaled = [whole.astype(np.float64) for whole in grads(1.0, False)]
    assert all(np.abs(whole).max() > 2.0 ** -12 for whole in unscaled)
    for alpha in (2.0 ** -16, 2.0 ** -20):
        for found, whole in zip(grads(alpha, False), unscaled, strict=True):
            check_within(found, alpha * whole, 0)
    for found, whole in zip(grads(2.0 ** -8, True), unscaled, strict=True):
        exact = 1 + whole / 256
        check_within(found, exact, ROUNDOFF["float32"] * np.abs(exact))


def test_alpha_is_multiplied_in_the_type_of_the_result_below_activations_too(xp):
    """A float64 db of float32 inputs takes an alpha that float32 has no room for."""
    da = xp.asarray(np.ones((3, 2), "float32"))
    grads = dg.dense_grads(None, None, da, need="db", activation="relu", z=da, alpha=1e39,
                           out=dg.DenseGrads(db=xp.zeros(2, "float64")))
    np.testing.assert_array_equal(host(grads.db), [3e39, 3e39])


def test_leading_batch_axes(xp):
    da, z, weight = data((2, 5, 6), "float32", 21), data((2, 5, 6), "float32", 22), normal((2, 5), "float32", 23)
    found = dg.activation_grad(*on(xp, da, z), "sigmoid", sample_weight=xp.asarray(weight), keepdims=True)
    flat = dg.activation_grad(*on(xp, da.reshape(10, 6), z.reshape(10, 6)), "sigmoid",
                              sample_weight=xp.asarray(weight.ravel()))
    assert found.dz.shape == (2, 5, 6)
    assert found.db.shape == (1, 6)
    assert (bits(found.dz).ravel() == bits(flat.dz).ravel()).all()
    assert (bits(found.db).ravel() == bits(flat.db)).all()


WRONG = {
    "rellu": (ValueError, "activation must be one of identity, relu,", lambda a: dg.activation_grad(a, a, "rellu")),
    "z and activation": (ValueError, r"the order is da, z, activation", lambda a: dg.activation_grad(a, "relu", a)),
    "no z": (TypeError, r"z must be an array.*got 'relu' \(pass z=, and activation='relu'",
             lambda a: dg.activation_grad(a, "relu")),
    "compensated": (TypeError, "compensated must be True or False; got 2", lambda a: dg.bias_grad(a, compensated=2)),
    "keepdims": (TypeError, "keepdims must be True or False; got 'no'", lambda a: dg.bias_grad(a, keepdims="no")),
    "accumulate": (TypeError, "accumulate must be True or False; got 1", lambda a: dg.weight_grad(a, a, accumulate=1)),
    "need": (ValueError, 'need must name some of "dx", "dw" and "db"; got None',
             lambda a: dg.dense_grads(a, a, a, need=None)),
    "z is None": (TypeError, "activation='relu' needs z", lambda a: dg.activation_grad(a, None, "relu")),
    "z alone": (TypeError, "z is of no use without an activation", lambda a: dg.activation_grad(a, a)),
    "slope of another": (
        TypeError, "negative_slope is the derivative of .leaky_relu. alone; got 0.2 with activation='gelu' .leave it",
        lambda a: dg.activation_grad(a, a, "gelu", negative_slope=0.2)),
    "slope of none": (TypeError, "got 0.01 with activation=None .leave it out", lambda a: dg.dense_grads(
        None, None, a, need="db", negative_slope=0.01)),
    "shape of z that is not read": (ShapeError, r"z must have the shape of da, \(6, 4\); got \(5, 4\)",
                                    lambda a: dg.activation_grad(a, a[:5], "identity")),
    "shape of z": (ShapeError, r"z must have the shape of da, \(6, 4\); got \(5, 4\)",
                   lambda a: dg.activation_grad(a, a[:5], "relu")),
    "dtype of z": (DTypeError, "z and da must have the same dtype",
                   lambda a: dg.activation_grad(a, a.astype("float64"), "relu")),
    "one axis": (ShapeError, "da must have at least 2 dimensions", lambda a: dg.activation_grad(a[0], a[0], "relu")),
    "weights of outputs": (ShapeError, r"sample_weight must have one value for each sample, shape \(6,\); got \(4,\)",
                           lambda a: dg.activation_grad(a, sample_weight=a[0])),
    "float64 weights": (DTypeError, "sample_weight must be float32, bool,",
                        lambda a: dg.activation_grad(a, sample_weight=a[:, 0].astype("float64"))),
    "weights in dz": (OutError, "out.dz overlaps sample_weight in memory", lambda a: dg.activation_grad(
        a[:, :1].copy(), sample_weight=a[:, 0], out=dg.OutputGrads(dz=a[:, :1]))),
    "integer mask": (DTypeError, r"astype\('bool'\) if they choose samples",
                     lambda a: dg.activation_grad(a, sample_weight=a[:, 0].astype("uint8"))),
    "alpha": (TypeError, "alpha must be a number; got NoneType", lambda a: dg.activation_grad(a, alpha=None)),
    "alphas": (TypeError, "alpha must be a number", lambda a: dg.bias_grad(a, alpha=host(a[0]))),
    "slope": (TypeError, "negative_slope must be a number",
              lambda a: dg.activation_grad(a, a, "leaky_relu", negative_slope="1")),
    "dtype of dz": (DTypeError, "out.dz must be float32, as the inputs are; got float64",
                    lambda a: dg.activation_grad(a, a, "relu", out=dg.OutputGrads(dz=a.astype("float64")))),
    "shifted dz": (OutError, "out.dz overlaps da in memory", lambda a: dg.activation_grad(
        a[:5], sample_weight=a[:5, 0], out=dg.OutputGrads(dz=a[1:]))),
    "db in the weights": (OutError, "out.db overlaps sample_weight in memory", lambda a: dg.activation_grad(
        a[:4].copy(), sample_weight=a[0], out=dg.OutputGrads(db=a[0]))),
    "nothing to add to": (OutError, r"adds into out.db, which was not given \(pass out=OutputGrads\(db=...\), or",
                          lambda a: dg.activation_grad(a, a, "relu", accumulate=True)),
    "not a tuple": (TypeError, r"out must be OutputGrads\(dz=, db=\)",
                    lambda a: dg.activation_grad(a, a, "relu", out=a)),
    "other plan": (PlanError, "plan.sum was made for samples 7, .*make one for samples 6, outputs",
                   lambda a: dg.activation_grad(a, a, "relu", plan=plan_upstream(7, 4, "float32", "flat", "relu"))),
    "plan for another activation": (
        PlanError, r'plan forms dz below gelu, but it is relu that lies above .*replace\(plan, above="relu"\)',
        lambda a: dg.activation_grad(a, a, "relu", plan=plan_upstream(6, 4, "float32", "flat", "gelu"))),
    "plan of a sum": (TypeError, "plan must be an UpstreamPlan, .*; got BatchSumPlan .*plans.plan_upstream",
                      lambda a: dg.activation_grad(
                          a, a, "relu", plan=plan_upstream(6, 4, "float32", "flat", "relu").sum)),
    "no plan": (TypeError, "plan must be an UpstreamPlan; got str", lambda a: dg.activation_grad(a, plan="fast")),
    "plan of dz for a sum": (TypeError, "plan must be a BatchSumPlan; got UpstreamPlan", lambda a: dg.bias_grad(
        a, plan=plan_upstream(6, 4, "float32", "flat", "relu"))),
}


def test_identity_takes_z_and_does_not_read_it(xp):
    """So that a loop over all activations needs no exception; z may hold anything, and be overwritten by dz."""
    da, z = data((6, 4), "float32", 34), xp.asarray(np.full((6, 4), np.nan, "float32"))
    for activation in ACTIVATIONS:
        dg.activation_grad(xp.asarray(da), z, activation)
    found = dg.activation_grad(xp.asarray(da), z, "identity", out=dg.OutputGrads(dz=z))
    np.testing.assert_array_equal(host(z), da)
    assert (bits(found.db) == bits(dg.activation_grad(xp.asarray(da)).db)).all()
    together = dg.dense_grads(None, None, xp.asarray(da), need="db", activation="identity", z=z)
    assert (bits(together.db) == bits(dg.bias_grad(xp.asarray(da)))).all()


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_answered_before_anything_runs(mistake, xp):
    error, message, call = WRONG[mistake]
    array = xp.asarray(data((6, 4), "float32"))
    before = host(array).copy()
    with pytest.raises(error, match=message):
        call(array)
    np.testing.assert_array_equal(host(array), before)


@pytest.mark.parametrize(("layout", "change", "message"), [
    ("features_first", {"folders": 16}, "folders of the sum must be 32; got 16"),
    ("features_first", {"runs_per_block": 4}, "runs_per_block of the sum must be 2; got 4"),
    ("flat", {"in_flight": 4}, "in_flight of the sum must be 2; got 4"),
    ("flat", {"vectors": 2}, "vectors of the sum must be 1; got 2"),
    ("flat", {"compensated": True}, "compensated of the sum must be False; got True"),
    ("flat", {"layout": "flat", "threads_x": 4, "lanes": 1}, 'layout of the sum must be "rows" or "features_first"'),
])
def test_sums_that_no_kernel_carries_out_are_refused(layout, change, message):
    plan = plan_upstream(64, 4, "float32", layout, "relu")
    with pytest.raises(PlanError, match=message):
        UpstreamPlan("relu", replace(plan.sum, **change))


def test_a_plan_for_nothing_that_lies_above_is_refused():
    with pytest.raises(PlanError, match=r"above must be one of identity, relu, .*cross_entropy; got 'softmax'"):
        UpstreamPlan("softmax", plan_upstream(6, 4, "float32", "flat", "relu").sum)


@pytest.mark.parametrize(("above", "dtype", "layout", "outputs", "elements", "threads"), [
    ("identity", "float32", "rows", 3072, 4, 1536), ("identity", "float32", "features_first", 3072, 4, 512),
    ("relu", "bfloat16", "rows", 3072, 8, 768), ("gelu", "bfloat16", "rows", 3072, 8, 512),
    ("gelu", "bfloat16", "rows", 10, 2, 1024), ("cross_entropy", "float32", "rows", 3072, 4, 1024),
])
def test_registers_leave_room_for_threads(above, dtype, layout, outputs, elements, threads):
    """Exponentials of eight elements take most, one matrix alone takes fewest."""
    plan = plan_upstream(8192, outputs, dtype, layout, above)
    assert plan.elements == elements
    # As many whole blocks as have room.
    assert plan.blocks_per_multiprocessor == threads // plan.threads


@pytest.mark.parametrize(("above", "words"), [
    ("identity", "da is read once, dz is written once: 201326592 bytes"),
    ("gelu", "da and z are read once, dz is written once: 301989888 bytes"),
    ("cross_entropy", "reads z for each sample's log-sum-exp, by blocks of 8 samples and 32 threads for each"),
])
def test_a_plan_says_what_is_formed_and_what_it_takes(above, words):
    plan = plan_upstream(8192, 3072, "float32", "rows", above)
    said = plan.explain()
    assert said.startswith(f"dz of 8192 samples of 3072 outputs, float32, rows, below {above}: formed, written and ")
    for fact in (words, "4 elements a thread, in accesses of 16 bytes", f"blocks of {plan.threads} threads",
                 f"{plan.shared_bytes} bytes of shared memory", f"workspace of {plan.sum.workspace_bytes} bytes",
                 f"{plan.blocks_per_multiprocessor} blocks a multiprocessor",
                 f"longest chain of additions {plan.chain}"):
        assert fact in said
