"""Cross-entropy against float64: loss, dz, and db, which is the sum of dz as it is stored, to the last bit."""
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import densegrad as dg
from densegrad import reference
from densegrad.calls import recorded
from densegrad.device import dtype_of
from densegrad.errors import DeviceError, DTypeError, OutError, PlanError, ShapeError
from densegrad.families import cross_entropy as family
from densegrad.families.upstream import Upstream
from densegrad.launches import Matrix, Result, Slot
from densegrad.plans import (
    BatchSumPlan,
    CrossEntropyPlan,
    UpstreamPlan,
    accumulator_of,
    plan_cross_entropy,
    plan_upstream,
)
from densegrad.testing import (
    Placed,
    Strided,
    bits,
    check_within,
    expected_cross_entropy,
    host,
    normal,
    poisoned,
)
from tests.batch_sum_model import model

DTYPES = ("float16", "bfloat16", "float32", "float64")
REDUCTIONS = ("mean", "sum", "none")
INF, NAN = np.inf, np.nan


def data(shape, dtype, seed=0):
    """Normal numbers times 3."""
    return (3 * normal(shape, "float64", seed)).astype(dtype_of(dtype))


def shares(shape, dtype, seed=0):
    """Probabilities: rows that add up to about 1, some of them exactly 0."""
    numbers = np.random.default_rng(seed).random(shape)
    numbers[numbers < 0.2] = 0
    return (numbers / np.maximum(numbers.sum(axis=-1, keepdims=True), 0.1)).astype(dtype_of(dtype))


def weights(size, dtype, seed=0):
    """Numbers from 1/2 to 3/2, or a mask."""
    numbers = np.random.default_rng(seed).random(size)
    return numbers > 0.3 if dtype == "bool" else (numbers + 0.5).astype(dtype_of(dtype))


def two_readings(samples, outputs, dtype, features_first, parts=1):
    """A plan of few threads with several lanes and parts."""
    if features_first:
        line = 4 * 16 // np.dtype(dtype_of(dtype)).itemsize
        return UpstreamPlan("cross_entropy", BatchSumPlan(
            samples, outputs, dtype, "features_first", 4, 4, 2, -(-samples // (line * parts)) * line, runs_per_block=4,
            folders=4))
    return UpstreamPlan("cross_entropy", BatchSumPlan(samples, outputs, dtype, "rows", 4, 16, 2, -(-samples // parts)))


def on(xp, value):
    """An array as the lane's own; what is none, as it is."""
    return xp.asarray(value) if isinstance(value, np.ndarray) else value


def sum_of(plan, dz, **more):
    """db of dz (samples, outputs) as it is stored, by the plan's order of additions."""
    if isinstance(plan, UpstreamPlan):
        return model(plan.sum, dz, **more)
    cut = SimpleNamespace(outputs=plan.outputs, dtype=plan.dtype, accumulator=plan.accumulator, layout="rows",
                          samples_per_part=plan.samples_per_part, lanes=plan.lanes, second=plan.second,
                          compensated=False)
    return model(cut, dz, **more)


def check(xp, z, labels, plan, kinds=("C", "C", "C"), alone=False, **options):
    """Hold a call's results to float64, into outputs full of NaN between sentinels, and db to the sum of dz.

    kinds are the memory layouts of z, dz and probabilities. `alone` makes the gradient without the loss, too.
    """
    batch_axis, dtype = options.get("batch_axis", 0), z.dtype.name
    batch = z.shape[1:] if batch_axis else z.shape[:-1]
    given = [Placed(z, kinds[0], xp).array, Placed(labels, kinds[2], xp).array if labels.shape == z.shape else
             on(xp, labels)]
    shape = batch if options.get("reduction") == "none" else ()
    loss = poisoned(shape, accumulator_of(dtype), Strided.of(shape), xp)
    dz, db = poisoned(z.shape, dtype, kinds[1], xp), poisoned((plan_sizes(plan)[1],), dtype, "C", xp)
    found = dg.cross_entropy(*given, out=dg.LossGrads(loss.array, dz.array, db.array), plan=plan,
                             **{name: on(xp, value) for name, value in options.items()})
    assert all(one is other.array for one, other in zip(found, (loss, dz, db), strict=True))
    exact, bounds = expected_cross_entropy(z, labels, plan, **options)
    shapes = shape, z.shape, db.array.shape
    for name, one, right, bound, size in zip(found._fields, (loss, dz, db), exact, bounds, shapes, strict=True):
        try:
            check_within(one.read(), np.reshape(right, size), np.reshape(bound, size))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    stored = dz.read().T if batch_axis else dz.read().reshape(-1, z.shape[-1])
    assert (bits(db.read()) == bits(sum_of(plan, stored))).all()
    if alone:
        options = {"reduction": "mean"} | {name: on(xp, value) for name, value in options.items()}
        grads = dg.cross_entropy_grad(*given, out=dg.OutputGrads(dz=poisoned(z.shape, dtype, kinds[1], xp).array),
                                      plan=plan, **options)
        assert (bits(grads.dz) == bits(dz.read())).all()
        assert (bits(grads.db) == bits(db.read())).all()


def plan_sizes(plan):
    """(samples, outputs)"""
    cut = plan.sum if isinstance(plan, UpstreamPlan) else plan
    return cut.samples, cut.outputs


# -- what it computes


#: samples, outputs, dtype, (threads_x, lanes, pieces, samples_per_part), labels, classes', samples' weights, options
ONE_READING = {
    "a thread a row": (41, 13, "bfloat16", (1, 32, 2, 41), "int64", "", "", {}),
    "eight threads": (23, 120, "bfloat16", (8, 8, 2, 9), "int32", "float32", "bool",
                      {"label_smoothing": 0.125, "alpha": 0.75}),
    "two warps": (3, 250, "float32", (64, 2, 1, 2), "", "", "float32", {"reduction": "sum", "label_smoothing": 0.25}),
    "float64": (10, 15, "float64", (4, 8, 2, 10), "int64", "float64", "", {"label_smoothing": 0.1, "alpha": -3.0}),
    "four warps of halves": (3, 999, "float16", (128, 1, 1, 2), "int64", "", "bfloat16",
                             {"reduction": "none", "label_smoothing": 0.1, "ignore_index": 7}),
    "narrow rows": (40, 10, "bfloat16", (2, 16, 1, 16), "int32", "", "float16", {"reduction": "sum"}),
}
#: samples, outputs, dtype, features_first, parts, and the same
TWO_READINGS = {
    "rows": (9, 37, "float32", False, 2, "int64", "float16", "", {}),
    # More than 16 of the 32 threads of a sample have something to add, and the last vector has an edge.
    "rows of probabilities": (5, 45, "float64", False, 1, "", "", "float32",
                              {"reduction": "sum", "label_smoothing": 0.25}),
    "samples side by side": (37, 9, "bfloat16", True, 2, "int32", "float32", "bool",
                             {"label_smoothing": 0.25, "alpha": 0.5}),
    "probabilities side by side": (18, 12, "float16", True, 1, "", "", "float32",
                                   {"reduction": "none", "label_smoothing": 0.5}),
}


def problem(samples, outputs, dtype, labels, classes, of_samples, options, seed=1):
    """(z, labels, options) of a case; some labels are ignored."""
    z, ignored = data((samples, outputs), dtype, seed), options.get("ignore_index", -100)
    if labels:
        given = np.random.default_rng(seed).integers(0, outputs, samples).astype(labels)
        given[samples // 3::5] = ignored
    else:
        given = shares((samples, outputs), dtype, seed)
    more = {"class_weight": weights(outputs, classes, seed + 1)} if classes else {}
    if of_samples:
        more["sample_weight"] = weights(samples, of_samples, seed + 2)
    # What is left out is not looked at.
    left_out = given == ignored if labels else np.zeros(samples, bool)
    if of_samples == "bool":
        left_out |= ~more["sample_weight"]
        if not labels:
            given[left_out] = np.nan
    z[left_out] = np.nan
    return z, given, options | more


@pytest.mark.parametrize("name", ONE_READING)
def test_rows_that_are_read_once(name, xp):
    samples, outputs, dtype, cut, *rest = ONE_READING[name]
    z, labels, options = problem(samples, outputs, dtype, *rest)
    plan = CrossEntropyPlan(samples, outputs, dtype, *cut)
    check(xp, z, labels, plan, alone=name in ("eight threads", "a thread a row"), **options)


@pytest.mark.parametrize("name", TWO_READINGS)
def test_rows_that_are_read_twice(name, xp):
    samples, outputs, dtype, features_first, parts, *rest = TWO_READINGS[name]
    z, labels, options = problem(samples, outputs, dtype, *rest)
    if features_first:
        z, labels = (np.ascontiguousarray(one.T) if one.ndim == 2 else one for one in (z, labels))
        options["batch_axis"] = 1
    check(xp, z, labels, two_readings(samples, outputs, dtype, features_first, parts), alone=name == "rows", **options)


#: layouts in which every row lies in one piece
IN_PIECES = ("C", "padded", "offset", "gaps", "upside down")
#: and others, all but those of which neither axis is contiguous
ANYHOW = (*IN_PIECES, "spread", "mirrored")


@pytest.mark.only("simulator")
@pytest.mark.parametrize("seed", range(20))
def test_options_crossed(seed, xp):
    """Drawn: each would take a compiler seconds, and random calls make such on a device."""
    draw = np.random.default_rng([30, seed])

    def one_of(*choices):
        return choices[draw.integers(len(choices))]

    dtype, kind = DTYPES[seed % 4], ("one reading", "one reading", "two readings", "side by side")[seed // 4 % 4]
    vector = 16 // np.dtype(dtype_of(dtype)).itemsize
    samples = int(draw.integers(1, 17))
    threads_x, pieces = int(one_of(1, 2, 4, 8, 16, 32)), int(one_of(1, 2, 4, 8))
    if threads_x > 8:
        pieces, samples = min(pieces, 2), min(samples, 5)
    outputs = int(draw.integers(1, min(threads_x * pieces * vector, 300) + 1))
    wider = ("float64",) if dtype == "float64" else ()
    floats = ("float16", "bfloat16", "float32", *wider)
    labels, reduction = one_of("int32", "int64", ""), REDUCTIONS[seed // 4 % 3]
    options = {"reduction": reduction, "label_smoothing": float(one_of(0.0, 0.1, 1.0)),
               "alpha": float(one_of(1.0, -0.75, 2.0 ** -10))}
    if labels:
        options["ignore_index"] = int(one_of(-100, -1, 0, outputs - 1))
    z, given, options = problem(samples, outputs, dtype, labels, one_of("", *floats), one_of("", "bool", *floats),
                                options, seed)
    parts = int(draw.integers(1, 4))
    if kind == "one reading":
        plan = CrossEntropyPlan(samples, outputs, dtype, threads_x, max(32 // threads_x, int(one_of(1, 2))), pieces,
                                -(-samples // parts))
        kinds = [one_of(*IN_PIECES) for _ in range(3)]
    else:
        plan = two_readings(samples, outputs, dtype, kind == "side by side", parts)
        kinds = [one_of(*ANYHOW) for _ in range(3)]
        kinds[0] = one_of(*IN_PIECES)  # z: its layout is the plan's
    if kind == "side by side":
        z, given = (np.ascontiguousarray(one.T) if one.ndim == 2 else one for one in (z, given))
        options["batch_axis"] = 1
    check(xp, z, given, plan, kinds, alone=seed % 3 == 0, **options)


# -- rows that are not like others

KINDS = ("one reading", "two readings", "side by side")


def few(kind, samples, outputs, parts=1):
    """A plan of few threads for float32."""
    if kind == "one reading":
        return CrossEntropyPlan(samples, outputs, "float32", 8, 4, 1, -(-samples // parts))
    return two_readings(samples, outputs, "float32", kind == "side by side", parts)


def called(xp, kind, z, labels, parts=1, function=dg.cross_entropy, **options):
    """(loss, dz, db) of NumPy by a plan of few threads, dz with samples first."""
    plan = few(kind, *z.shape, parts)
    if kind == "side by side":
        z, labels = (np.ascontiguousarray(one.T) if one.ndim == 2 else one for one in (z, labels))
        options["batch_axis"] = 1
    found = function(on(xp, z), on(xp, labels), plan=plan, **{name: on(xp, value) for name, value in options.items()})
    *loss, dz, db = map(host, found)
    return (*loss, dz.T if kind == "side by side" else dz, db)


#: a row of seven logits, its label
ODD = {
    "usual": ([0, 1, -2, 3, 2, 1, 0], 3), "the last label": ([0, 1, -2, 3, 2, 1, 0], 6),
    "infinity": ([INF, 1, 2, 3, 4, 5, 6], 1), "two infinities": ([0, 1, INF, 3, 4, 5, INF], 2),
    "not a number": ([0, 1, NAN, 3, 4, 5, 6], 1), "no more than minus infinities": ([-INF] * 7, 0),
    "minus infinities": ([-INF, 1, -INF, 3, 2, 1, -INF], 1), "the label's is": ([0, 1, 2, 3, -INF, 1, 0], 4),
    "the first, the label's, is": ([-INF, 1, 2, 3, 0, 1, 0], 0), "far from zero": ([1e4, 10001, 9999, 1e4, 0, 1, 2], 2),
    "far below zero": ([-3e4, -30001, -29999, -3e4, -3e4, -4e4, -3e4], 2), "all equal": ([1e30] * 7, 5),
    "far apart": ([-3e38, 3e38, 0, 0, 0, 0, 0], 1),
    "the first is hidden": ([-1e9, 1, 2, 3, 0, 1, 0], 3),
    "left out": ([NAN, INF, -INF, 0, 0, 0, 0], -100),
    "another usual one": ([0, 1, -2, 3, 2, 1, 0], 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_odd_rows_spoil_themselves_alone(kind, xp):
    z, labels = np.array([row for row, _ in ODD.values()], "float32"), np.array([label for _, label in ODD.values()])
    names, plan = list(ODD), few(kind, *z.shape)
    spoilt = ["infinity", "two infinities", "not a number", "no more than minus infinities"]
    for smoothing in (0.0, 0.25):
        if smoothing:
            z[names.index("far apart")] = 0  # float32 has no room for these differences
        loss, dz, db = called(xp, kind, z, labels, reduction="none", label_smoothing=smoothing)
        exact, bounds = expected_cross_entropy(z, labels, plan, reduction="none", label_smoothing=smoothing)
        check_within(loss, exact[0], bounds[0])
        check_within(dz, exact[1], bounds[1])
        assert [name for name, row in zip(names, dz, strict=True) if np.isnan(row).any()] == spoilt
        assert [name for name, one in zip(names, loss, strict=True) if np.isnan(one)] == spoilt
        infinite = {name for name, one in zip(names, loss, strict=True) if one == INF}
        assert infinite >= {"the label's is", "the first, the label's, is"} | ({"minus infinities"} if smoothing
                                                                               else set())
        assert np.isnan(db).all()
        left_out = names.index("left out")
        assert loss[left_out] == 0
        assert (dz[left_out] == 0).all()
        assert (bits(dz[0]) == bits(dz[-1])).all()


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_zero_lose_nothing_and_rows_are_taken_as_they_are(kind, xp):
    z = np.array([[-INF, 1, 2, 3, 0, 1, -INF], [0, 1, 2, 3, 4, -INF, 6], [0, 1, 2, 3, 4, 5, 6], [NAN, 0, 0, 0, 0, 0, 0],
                  [5, 1, 2, 1, 1, 1, 1]], "float32")
    targets = np.array([[0, 0.5, 0, 0.5, 0, 0, 0], [0, 0, 0, 0, 0.5, 0.5, 0], [2, 0, -1, 0, 3, 0, 0.5], [0.5] * 7,
                        [0] * 7], "float32")
    loss, dz, _ = called(xp, kind, z, targets, reduction="none")
    exact, bounds = expected_cross_entropy(z, targets, few(kind, *z.shape), reduction="none")
    check_within(loss, exact[0], bounds[0])
    check_within(dz, exact[1], bounds[1])
    assert (np.isfinite(loss) == [True, False, True, False, True]).all()
    assert loss[1] == INF
    assert loss[4] == 0
    assert not dz[4].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_logit_far_off_takes_no_digits_from_what_targets_lose(kind, xp):
    z, targets = data((6, 30), "float32", 61), np.abs(data((6, 30), "float32", 62))
    z[:, 0], targets[:, 0], z[3, 20] = -1e9, 0, -1e9
    targets[3, 20] = 0
    found = called(xp, kind, z, targets, reduction="none")
    near = z.copy()
    near[:, 0] = near[3, 20] = -200
    exact, bounds = expected_cross_entropy(near, targets, few(kind, *z.shape), reduction="none")
    check_within(found[0], exact[0], bounds[0])
    check_within(found[1], exact[1], bounds[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_that_is_no_class(kind, lane, xp):
    z, labels = data((6, 7), "float32", 3), np.array([0, 7, -7, 2, -100, 2 ** 33])
    if lane == "simulator":
        with pytest.raises(ValueError, match="labels must be classes from 0 to 6, or ignore_index -100; got 7 for "
                                             "sample 1"):
            called(xp, kind, z, labels, reduction="none")
        return
    loss, dz, db = called(xp, kind, z, labels, reduction="none")
    wrong = [False, True, True, False, False, True]
    np.testing.assert_array_equal(np.isnan(loss), wrong)
    np.testing.assert_array_equal(np.isnan(dz), np.repeat(np.array(wrong)[:, None], 7, axis=1))
    assert np.isnan(db).all()
    exact, bounds = expected_cross_entropy(z, labels, few(kind, *z.shape), reduction="none")
    check_within(loss, exact[0], bounds[0])
    check_within(dz, exact[1], bounds[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_that_is_no_class_may_be_left_out(kind, xp):
    """By ignore_index, also one of the classes, or by a mask."""
    z, labels = data((5, 7), "float32", 4), np.array([3, 0, 99, 6, 3])
    z[2] = NAN
    for ignored in (99, 2 ** 40):
        labels[2] = ignored
        loss, dz, _ = called(xp, kind, z, labels, reduction="none", ignore_index=ignored)
        assert loss[2] == 0
        assert not dz[2].any()
        assert (loss[[0, 1, 3, 4]] > 0).all()
    labels[2] = 1
    z[2] = 0
    loss, dz, _ = called(xp, kind, z, labels, reduction="none", ignore_index=3)
    np.testing.assert_array_equal(loss > 0, [False, True, True, True, False])
    np.testing.assert_array_equal(dz.any(axis=1), [False, True, True, True, False])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_adds_exactly_nothing(kind, xp):
    """Whatever it holds: with zeros in its place, and no mask, the sums have the same bits."""
    z, labels = data((15, 7), "float32", 5), np.random.default_rng(5).integers(0, 7, 15)
    mask = np.arange(15) % 3 > 0
    z[~mask] = np.array([NAN, INF, -INF, 1, 2, 3, 4], "float32")
    labels[~mask] = 1000
    loss, dz, db = called(xp, kind, z, labels, parts=2, sample_weight=mask)
    assert not dz[~mask].any()
    ignored = called(xp, kind, np.where(mask[:, None], z, np.float32(0)), np.where(mask, labels, -100), parts=2)
    for one, other in zip((loss, dz, db), ignored, strict=True):
        assert (one == other).all()


@pytest.mark.only("simulator")
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_no_number_of_a_sample_that_is_ignored(kind, xp):
    z, labels = data((9, 7), "float32", 5), np.array([0, 1, -100, 3, 4, -100, 6, 0, -100])
    weight = np.where(labels < 0, np.float32(NAN), np.float32(1))
    weighted = called(xp, kind, z, labels, sample_weight=weight)
    for one, other in zip(weighted, called(xp, kind, z, labels), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("kind", KINDS)
def test_if_no_sample_counts_the_mean_is_no_number_and_dz_zero(kind, xp):
    z, labels = data((15, 7), "float32", 6), np.full(15, -100)
    loss, dz, db = called(xp, kind, z, labels, parts=2)
    assert np.isnan(loss)
    assert not dz.any()
    assert not db.any()


@pytest.mark.only("simulator")
def test_a_sum_of_no_samples_that_count_is_zero(xp):
    z, labels = data((9, 7), "float32", 6), np.full(9, -100)
    loss, dz, db = map(host, dg.cross_entropy(*(xp.asarray(one) for one in (z, labels)), reduction="sum"))
    assert loss == 0
    assert not dz.any()
    assert not db.any()


@pytest.mark.parametrize(("reduction", "batch_axis"), [
    ("mean", 0), ("none", 0), *(pytest.param(*drawn, marks=pytest.mark.only("simulator"))
                                for drawn in (("sum", 0), ("mean", 1), ("sum", 1), ("none", 1)))])
def test_an_empty_batch(reduction, batch_axis, xp):
    z, labels = xp.zeros((7, 0) if batch_axis else (0, 7), "float32"), xp.zeros(0, "int64")
    plan = None if batch_axis else replace(few("one reading", 1, 7), samples=0)
    loss, dz, db = dg.cross_entropy(z, labels, reduction=reduction, batch_axis=batch_axis, plan=plan)
    assert loss.shape == ((0,) if reduction == "none" else ())
    if reduction != "none":
        assert host(loss) == 0 if reduction == "sum" else np.isnan(host(loss))
    assert dz.shape == z.shape
    np.testing.assert_array_equal(host(db), 0)


@pytest.mark.only("simulator")
@pytest.mark.parametrize("batch_axis", [0, 1])
def test_an_empty_batch_adds_nothing(batch_axis, xp):
    z, labels = xp.zeros((5, 0) if batch_axis else (0, 5), "float32"), xp.zeros(0, "int64")
    old = xp.asarray(np.full(5, 2, "float32"))
    loss, _, _ = dg.cross_entropy(z, labels, batch_axis=batch_axis, out=dg.LossGrads(db=old), accumulate=True)
    assert np.isnan(host(loss))
    dg.cross_entropy_grad(z, labels, batch_axis=batch_axis, out=dg.OutputGrads(db=old), accumulate="db")
    np.testing.assert_array_equal(host(old), 2)
    assert dg.cross_entropy_grad(z[:0] if batch_axis else z[:, :0], labels, batch_axis=batch_axis).db.shape == (0,)


@pytest.mark.parametrize("kind", ["one reading", "side by side"])
def test_one_class_loses_nothing(kind, xp):
    z = np.array([[3], [-1000], [0], [NAN], [1e30]], "float32")
    loss, dz, _ = called(xp, kind, z, np.array([0, 0, 0, -100, 0]), reduction="none", label_smoothing=0.5)
    assert not loss.any()
    assert not dz.any()


def test_float64_by_central_differences():
    """Class weights, smoothing and the mean's divisor, of which the loss says how dz must be."""
    z, labels = normal((6, 5), "float64"), np.array([0, 4, -100, 2, 2, 1])
    options = {"label_smoothing": 0.2, "sample_weight": np.arange(1.0, 7.0), "class_weight": np.arange(2.0, 7.0)}
    for given in (labels, shares((6, 5), "float64")):
        _, dz, db = reference.cross_entropy(z, given, **options)
        step = 2.0 ** -17
        for index in np.ndindex(z.shape):
            kept = z[index]
            losses = []
            for moved in (kept + step, kept - step):
                z[index] = moved
                losses.append(reference.cross_entropy(z, given, **options)[0])
            z[index] = kept
            # The third derivative is at most 1 times the weight, 36; a loss is rounded in about 100 operations.
            assert abs((losses[0] - losses[1]) / (2 * step) - dz[index]) <= (
                36 * step ** 2 / 6 + 100 * 100 * 2.0 ** -53 / step)
        np.testing.assert_allclose(db, dz.sum(axis=0), rtol=1e-13, atol=1e-16)


# -- sums, divisors, launches


def test_db_is_added_to_and_the_loss_is_not(xp):
    z, labels = data((23, 7), "float32", 7), np.random.default_rng(7).integers(0, 7, 23)
    old = data((1, 7), "float32", 8)
    for kind in ("one reading", "two readings"):
        plan, db, loss = few(kind, 23, 7, 2), xp.asarray(old.copy()), xp.asarray(np.array(5, "float32"))
        found = dg.cross_entropy(on(xp, z), on(xp, labels), out=dg.LossGrads(loss=loss, db=db), keepdims=True,
                                 accumulate="db", alpha=0.5, plan=plan)
        assert found.db is db
        assert found.loss is loss
        assert (bits(db) == bits(sum_of(plan, host(found.dz), before=old[0]))).all()
        exact, bounds = expected_cross_entropy(z, labels, plan, alpha=0.5)
        check_within(loss, exact[0], bounds[0])


def test_db_has_the_same_bits_with_and_without_a_loss_by_many_parts(xp):
    """Nine columns alone would be added by 16 lanes, and ten by 8."""
    z, labels = data((24, 9), "float32", 9), np.random.default_rng(9).integers(0, 9, 24)
    plan = few("one reading", 24, 9, 12)
    found = dg.cross_entropy(on(xp, z), on(xp, labels), plan=plan)
    alone = dg.cross_entropy_grad(on(xp, z), on(xp, labels), reduction="mean", plan=plan)
    assert (bits(found.dz) == bits(alone.dz)).all()
    assert (bits(found.db) == bits(alone.db)).all()
    assert (bits(found.db) == bits(sum_of(plan, host(found.dz)))).all()
    again = dg.cross_entropy(on(xp, z), on(xp, labels), plan=plan)
    assert all((bits(one) == bits(other)).all() for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_added_by_the_same_lanes_with_and_without_a_loss(dtype):
    for outputs, parts in itertools.product((1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 1000), (2, 8, 33, 64, 65, 132)):
        plan = CrossEntropyPlan(parts, outputs, dtype, 32, 1, 64 // (16 // np.dtype(dtype_of(dtype)).itemsize), 1) if (
            outputs < 1000) else plan_cross_entropy(512 * parts, outputs, dtype, "flat")
        lanes = {launched(plan, loss)[-1].plan.lanes for loss in (True, False)}
        assert len(lanes) == 1, (outputs, parts)


def launched(plan, loss, reduction="mean", layout="rows"):
    """The launches of a call with these results, none of which is made."""
    samples, outputs = plan_sizes(plan)
    strides = (1, samples) if layout == "features_first" else (outputs, 1)
    z = Matrix(Slot("z"), plan.sum.dtype if isinstance(plan, UpstreamPlan) else plan.dtype, samples, outputs, *strides)
    labels = Matrix(Slot("labels"), "int64", samples, 1, 1, 1)
    where = Matrix(Slot("loss"), accumulator_of(z.dtype), samples if reduction == "none" else 1, 1, 1, 1)
    upstream = Upstream(None, z, labels=labels, reduction=reduction, loss=where if loss else None)
    return family.launches(plan, upstream, replace(z, address=Slot("dz")),
                           Result(Matrix(Slot("db"), z.dtype, 1, outputs, outputs, 1)))


@pytest.mark.parametrize("layout", ["flat", "rows", "features_first"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_launches_are_no_more_than_of_the_gradient_by_two_readings(dtype, layout):
    """Two of one part, three of several."""
    sizes = [*itertools.product((1, 64, 1000, 1025, 1797, 2048, 4096, 8192, 65536), (1, 10, 100, 1000, 3072, 32000))]
    for samples, outputs in sizes:
        before = 2 + (plan_upstream(samples, outputs, dtype, layout, "cross_entropy").sum.parts > 1)
        plan = plan_cross_entropy(samples, outputs, dtype, layout)
        for reduction in REDUCTIONS:
            assert len(launched(plan, True, reduction, layout)) <= before, (samples, outputs, reduction)


def test_more_samples_than_a_block_weighs(xp, monkeypatch):
    """Another launch adds up the weights; a block would take more than 1,024 of them, or 100 here."""
    assert [plan_cross_entropy(samples, 3, "float32", "flat").weighing_blocks for samples in (1024, 1025)] == [0, 2]
    monkeypatch.setattr("densegrad.families.cross_entropy.WEIGHED_IN_PLACE", 100)
    monkeypatch.setattr("densegrad.families.cross_entropy.WEIGHING_THREADS", 64)
    samples, plan = 111, CrossEntropyPlan(111, 3, "float32", 1, 64, 1, 60)
    z, labels, options = problem(samples, 3, "float32", "int64", "float32", "bool", {}, 11)
    with recorded() as launches:
        check(xp, z, labels, plan, **options)
    assert [launch.kernel for launch in launches] == ["weigh_samples", "cross_entropy_rows", "sum_parts"]
    assert launches[0].grid == (2,)


def test_more_blocks_than_threads_leave_what_their_samples_weigh(xp):
    """Of log_sum_exp, added up by the 16 threads of each block of the next launch."""
    plan = two_readings(520, 2, "float32", True)
    z, labels, options = problem(520, 2, "float32", "int64", "", "float32", {"batch_axis": 1}, 12)
    assert plan.log_sum_exp_grid > plan.threads
    check(xp, np.ascontiguousarray(z.T), labels, plan, **options)


def test_what_is_launched_is_what_the_plan_says():
    plan = two_readings(37, 9, "float32", False, 2)
    launches = launched(plan, False, "sum")
    (threads, samples), second = plan.log_sum_exp_block, plan.sum.second
    assert [(one.kernel, one.block, one.plan) for one in launches] == [
        ("log_sum_exp", threads * samples, plan), ("upstream_sum", plan.threads, plan),
        ("sum_parts", second.threads, second)]
    assert [one.grid for one in launches] == [(-(-37 // samples),), plan.grid, second.grid]
    made_of = launches[1].constants
    assert (made_of.above, made_of.elements, made_of.blocks_per_multiprocessor, made_of.threads_x, made_of.lanes) == (
        plan.above, plan.elements, plan.blocks_per_multiprocessor, plan.sum.threads_x, plan.sum.lanes)
    plan = CrossEntropyPlan(1100, 40, "float32", 8, 4, 2, 600)
    launches = launched(plan, True)
    assert [(one.kernel, one.grid, one.block) for one in launches] == [
        ("weigh_samples", (plan.weighing_blocks,), 1024), ("cross_entropy_rows", (2,), 32),
        ("sum_parts", plan.second.grid, plan.second.threads)]
    made_of = launches[1].constants
    assert (made_of.threads_x, made_of.lanes, made_of.pieces, made_of.loss, made_of.divisor) == (8, 4, 2, "part",
                                                                                                 "parts")


@pytest.mark.parametrize(("sizes", "kind", "words"), [
    ((2048, 32000, "bfloat16", "flat"), CrossEntropyPlan,
     ("the logits are read once, since a row of 64000 bytes fits into the registers", "another launch adds the",
      "2 blocks of a launch before add up the weights")),
    ((64, 10, "float32", "flat"), CrossEntropyPlan, ("a row of 40 bytes fits", "1 blocks of 64 threads",
                                                     "each block adds up all weights")),
    ((2048, 50257, "bfloat16", "flat"), UpstreamPlan,
     ("two readings, since a row of 100514 bytes does not fit into the registers of a block",)),
    ((2048, 100, "float32", "features_first"), UpstreamPlan, ("two readings, since the samples lie side by side",)),
])
def test_a_plan_says_how_often_logits_are_read_and_why(sizes, kind, words):
    plan = plan_cross_entropy(*sizes)
    assert isinstance(plan, kind)
    said = plan.explain()
    for fact in (*words, f"longest chain of additions {plan.chain}"):
        assert fact in said
    assert said.startswith(f"dz of {sizes[0]} samples of {sizes[1]} outputs, {sizes[2]}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_up_to_64_kilobytes_are_read_once_by_no_more_registers_than_there_are(dtype):
    most = 65536 // np.dtype(dtype_of(dtype)).itemsize
    for outputs in (1, 2, 3, 10, 127, 1000, most - 1, most):
        for samples in (1, 100, 10_000):
            plan = plan_cross_entropy(samples, outputs, dtype, "flat")
            assert isinstance(plan, CrossEntropyPlan)
            assert plan.threads * plan.registers <= 65536
            assert plan.shared_bytes <= 49152
            assert plan.parts <= 132 or samples <= 132
    assert isinstance(plan_cross_entropy(100, most + 1, dtype, "flat"), UpstreamPlan)


# -- memory


@pytest.mark.parametrize("layout", [*IN_PIECES, "F", "padded F", "spread", "mirrored"])
def test_memory_of_every_kind(layout, xp):
    """As the plan of each has it; strided labels, weights and classes' weights; what may not be written."""
    z, labels = data((6, 7), "float32", 13), np.array([0, 6, 3, -100, 2, 2])
    options = {"class_weight": weights(14, "float32", 1)[::2], "sample_weight": weights(12, "float32", 2)[::2]}
    spread = xp.asarray(np.repeat(labels, 3))[::3]
    z_there = Placed(z, layout, xp).array
    wide = {"class_weight": xp.asarray(np.repeat(options["class_weight"], 2))[::2],
            "sample_weight": xp.asarray(np.repeat(options["sample_weight"], 2))[::2]}
    plain = dg.cross_entropy(on(xp, z), on(xp, labels), **{name: on(xp, one.copy()) for name, one in options.items()})
    with recorded() as launches:
        found = dg.cross_entropy(z_there, spread, **wide)
    plan = launches[-1].plan
    assert isinstance(plan, UpstreamPlan if layout in ("F", "padded F") else CrossEntropyPlan)
    exact, bounds = expected_cross_entropy(z, labels, plan, **options)
    for one, right, bound in zip(found, exact, bounds, strict=True):
        check_within(one, right, bound)
    if layout in ("C", "padded", "gaps", "upside down", "spread"):
        assert all((bits(one) == bits(other)).all() for one, other in zip(found, plain, strict=True))


@pytest.mark.only("simulator")
def test_arrays_that_may_not_be_written(xp):
    z, labels = data((6, 7), "float32", 13), np.array([0, 6, 3, -100, 2, 2])
    plain = dg.cross_entropy(z, labels)
    for array in (z, labels):
        array.flags.writeable = False
    assert all((bits(one) == bits(other)).all() for one, other in zip(dg.cross_entropy(z, labels), plain, strict=True))
    with pytest.raises(OutError, match=r"out\.dz is read-only"):
        dg.cross_entropy(z, labels, out=dg.LossGrads(dz=z))


@pytest.mark.parametrize("kind", KINDS)
def test_dz_in_the_place_of_z(kind, xp):
    z, labels = data((9, 7), "float32", 14), np.random.default_rng(14).integers(0, 7, 9)
    plan, batch_axis = few(kind, 9, 7, 2), int(kind == "side by side")
    memory = xp.asarray(np.ascontiguousarray(z.T) if batch_axis else z)
    options = {"plan": plan, "batch_axis": batch_axis}
    apart = dg.cross_entropy(memory, on(xp, labels), **options)
    kept = memory.copy()
    together = dg.cross_entropy(kept, on(xp, labels), out=dg.LossGrads(dz=kept), **options)
    assert together.dz is kept
    assert all((bits(one) == bits(other)).all() for one, other in zip(together, apart, strict=True))


def test_batches_of_several_axes_and_a_dz_in_the_order_of_z(xp):
    """With samples side by side in memory and two batch axes that flatten to one, too."""
    z, labels = data((2, 3, 4, 7), "float32", 15), np.random.default_rng(15).integers(0, 7, (2, 3, 4))
    weight = weights((2, 3, 4), "float32", 15)
    flat = dg.cross_entropy(on(xp, z.reshape(24, 7)), on(xp, labels.ravel()), sample_weight=on(xp, weight.ravel()),
                            reduction="none", keepdims=True)
    found = dg.cross_entropy(on(xp, z), on(xp, labels), sample_weight=on(xp, weight), reduction="none", keepdims=True)
    assert found.loss.shape == (2, 3, 4)
    assert found.dz.shape == z.shape
    assert found.db.shape == (1, 7)
    assert all((bits(one).ravel() == bits(other).ravel()).all() for one, other in zip(found, flat, strict=True))
    memory = xp.asarray(np.ascontiguousarray(np.moveaxis(z, -1, 0)))
    turned = memory.transpose(1, 2, 3, 0)
    found = dg.cross_entropy(turned, on(xp, labels), reduction="none")
    assert found.dz.strides == turned.strides
    plan = plan_upstream(24, 7, "float32", "features_first", "cross_entropy")
    exact, bounds = expected_cross_entropy(z, labels, plan, reduction="none")
    check_within(found.loss, exact[0].reshape(2, 3, 4), bounds[0].reshape(2, 3, 4))
    check_within(found.dz, exact[1].reshape(z.shape), bounds[1].reshape(z.shape))
    # A loss of one's own with gaps.
    loss = poisoned((2, 3, 4), "float32", Strided((2, 3, 4), (24, 8, 2), 0), xp)
    dg.cross_entropy(turned, on(xp, labels), reduction="none", out=dg.LossGrads(loss=loss.array))
    assert (bits(loss.read()) == bits(found.loss)).all()


@pytest.mark.only("gpu")
def test_few_samples_of_many_classes(xp):
    """By 256 threads a sample, which take the simulator long."""
    z, labels = data((1, 2300), "float32", 25), np.array([2299])
    check(xp, z, labels, plan_upstream(1, 2300, "float32", "rows", "cross_entropy"))


# -- mistakes

CLASSES = np.array([0, 1, 2, 3, 0, 1])
WRONG = {
    "reduction": (ValueError, "reduction must be one of mean, sum, none; got 'average'",
                  lambda z, y: dg.cross_entropy(z, y, reduction="average")),
    "no reduction": (ValueError, "reduction must be one of mean, sum, none; got None",
                     lambda z, y: dg.cross_entropy_grad(z, y, reduction=None)),
    "length of class weights": (
        ShapeError, r"class_weight must have one weight for each class, shape \(4,\); got \(6,\)",
        lambda z, y: dg.cross_entropy(z, y, class_weight=z[:, 0].copy())),
    "dtype of class weights": (DTypeError, r"class_weight must be float32, float16 or bfloat16; got int64 \(convert it "
                               r"with astype\('float32'\)\)", lambda z, y: dg.cross_entropy(z, y, class_weight=y[:4])),
    "class weights of float64": (DTypeError, "class_weight must be float32, float16 or bfloat16; got float64",
                                 lambda z, y: dg.cross_entropy(z, y, class_weight=z[0].astype("float64"))),
    "one-hot": (DTypeError, r"labels of the shape of z, \(6, 4\), are class probabilities and must be float32; got "
                r"int64 \(one-hot\? pass labels.astype\('float32'\), or labels.argmax\(axis=-1\)",
                lambda z, y: dg.cross_entropy(z, (z > 0).astype("int64"))),
    "one-hot, transposed": (DTypeError, r"labels.argmax\(axis=0\) for the class of each sample",
                            lambda z, y: dg.cross_entropy(z, z > 0, batch_axis=1)),
    "dtype of probabilities": (DTypeError, "labels and z must have the same dtype; labels is float64 and z is float32",
                               lambda z, y: dg.cross_entropy(z, z.astype("float64"))),
    "shape of probabilities": (
        ShapeError, r"labels of floats are class probabilities and must have the shape of z, \(6, 4\); got \(6, 3\)",
        lambda z, y: dg.cross_entropy(z, z[:, :3])),
    "shape of labels": (ShapeError, r"labels must have one value for each sample, shape \(6,\); got \(5,\)",
                        lambda z, y: dg.cross_entropy(z, y[:5])),
    "labels of torch's order": (
        ShapeError, r"labels must have one value for each sample, shape \(2, 3\); got \(2, 4\); are the classes on "
        r"axis 1 of z\? then pass numpy.moveaxis\(z, 1, -1\)",
        lambda z, y: dg.cross_entropy(z.reshape(2, 3, 4), (z.reshape(2, 3, 4)[:, 0] > 0).astype("int64"))),
    "float labels": (DTypeError, "labels must be int64 or int32", lambda z, y: dg.cross_entropy_grad(z, z[:, 0])),
    "ignore_index": (TypeError, "ignore_index must be an integer of 64 bits; got 1.5",
                     lambda z, y: dg.cross_entropy(z, y, ignore_index=1.5)),
    "ignore_index of probabilities": (
        ValueError, r"ignore_index is a label, and labels are probabilities here; got 0 \(leave out samples by "
        r"sample_weight, a mask\)", lambda z, y: dg.cross_entropy(z, z * 0, ignore_index=0)),
    "smoothing": (ValueError, "label_smoothing must be between 0 and 1; got 2",
                  lambda z, y: dg.cross_entropy(z, y, label_smoothing=2)),
    "no classes": (ShapeError, r"z must have one class at least, to have a loss; got shape \(6, 0\)",
                   lambda z, y: dg.cross_entropy(z[:, :0], y)),
    "dtype of the loss": (DTypeError, "out.loss must have the type of the sums, float32; got float64", lambda z, y: (
        dg.cross_entropy(z, y, out=dg.LossGrads(loss=z[0, 0:1].reshape(()).astype("float64"))))),
    "shape of the loss": (ShapeError, r"out.loss must have shape \(\); got \(6,\)", lambda z, y: dg.cross_entropy(
        z, y, out=dg.LossGrads(loss=z[:, 0].copy()))),
    "loss in z": (OutError, "out.loss overlaps z in memory", lambda z, y: dg.cross_entropy(
        z, y, reduction="none", out=dg.LossGrads(loss=z[:, 0]))),
    "loss in db": (OutError, "out.db overlaps out.loss in memory", lambda z, y: both(dg.cross_entropy, z, y)),
    "dz in probabilities": (OutError, "out.dz overlaps labels in memory", lambda z, y: in_place(z)),
    "out of another function": (TypeError, r"out must be LossGrads\(loss=, dz=, db=\) or a tuple of 3",
                                lambda z, y: dg.cross_entropy(z, y, out=dg.OutputGrads(dz=z))),
    "adding to dz": (ValueError, "accumulate must be True, False or names among db; got", lambda z, y: (
        dg.cross_entropy(z, y, out=dg.LossGrads(dz=z), accumulate="dz"))),
    "plan of other sizes": (PlanError, r"plan was made for samples 7, .*make one for samples 6, outputs 4",
                            lambda z, y: dg.cross_entropy(z, y, plan=plan_cross_entropy(7, 4, "float32", "flat"))),
    "plan of something else": (
        PlanError, "plan forms dz below relu, but it is cross_entropy that lies above",
        lambda z, y: dg.cross_entropy(z, y, plan=plan_upstream(6, 4, "float32", "flat", "relu"))),
    "no plan": (TypeError, "plan must be a CrossEntropyPlan or an UpstreamPlan; got str",
                lambda z, y: dg.cross_entropy(z, y, plan="fast")),
    "one reading of what lies side by side": (
        PlanError, "a CrossEntropyPlan needs z, dz and probabilities whose rows lie in one piece each", lambda z, y: (
            dg.cross_entropy(z, y[:4], batch_axis=1, plan=plan_cross_entropy(4, 6, "float32", "flat")))),
}


def both(function, z, y):
    """A loss that lies where db does."""
    memory = z.reshape(-1)[:8].copy()
    return function(z, y, out=dg.LossGrads(loss=memory[0:1].reshape(()), db=memory[:4]))


def in_place(z):
    """dz in the place of probabilities."""
    targets = z.copy()
    return dg.cross_entropy(z, targets, out=dg.LossGrads(dz=targets))


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_answered_before_anything_runs(mistake, xp):
    error, message, call = WRONG[mistake]
    z = xp.asarray(data((6, 4), "float32"))
    before = host(z).copy()
    with pytest.raises(error, match=message):
        call(z, xp.asarray(CLASSES))
    np.testing.assert_array_equal(host(z), before)


@pytest.mark.only("gpu")
def test_class_weights_on_the_host(xp):
    z = xp.asarray(data((6, 4), "float32"))
    with pytest.raises(DeviceError, match="class_weight and z must lie on the same device"):
        dg.cross_entropy(z, xp.asarray(CLASSES), class_weight=np.ones(4, "float32"))


@pytest.mark.parametrize(("change", "message"), [
    ({"threads_x": 3}, "threads_x must be a power of two; got 3"),
    ({"lanes": 6}, "lanes must be a power of two; got 6"),
    ({"pieces": 0}, "pieces must be at least 1; got 0"), ({"lanes": 2}, r"must be from 32 to 1024; got 16"),
    ({"lanes": 256}, "must be from 32 to 1024; got 2048"),
    ({"outputs": 65}, "a row of 65 outputs does not fit into 2 pieces of 8 threads, 4 elements each"),
    ({"dtype": "int8"}, "dtype must be"), ({"lanes": 128, "pieces": 8}, "more than the 65536 that a block may have"),
    ({"samples_per_part": 0}, "samples_per_part must be at least 1; got 0"),
])
def test_plans_that_no_kernel_carries_out_are_refused(change, message):
    with pytest.raises((PlanError, ValueError), match=message):
        replace(CrossEntropyPlan(40, 64, "float32", 8, 4, 2, 10), **change)


def test_plans_of_what_is_none_are_refused():
    for arguments, message in (((5, 6, "int8", "flat"), "dtype must be"), ((5, 6, "float32", "F"), "layout must be"),
                               ((-1, 6, "float32", "flat"), "samples must")):
        with pytest.raises(PlanError, match=message):
            plan_cross_entropy(*arguments)


@pytest.mark.parametrize("samples", [1, 5, 37])
@pytest.mark.parametrize("class_weight", [False, True])
def test_smoothed_probabilities_side_by_side_add_nothing_beyond_the_last_sample(samples, class_weight, xp):
    z, targets = data((3, samples), "float32", 71), np.abs(data((3, samples), "float32", 72))
    plan = two_readings(samples, 3, "float32", True)
    weights = {"class_weight": np.array([1, 2, 3], "float32")} if class_weight else {}
    found = dg.cross_entropy(on(xp, z), on(xp, targets), label_smoothing=0.4, batch_axis=1, plan=plan,
                             **{name: on(xp, value) for name, value in weights.items()})
    exact, bounds = expected_cross_entropy(z, targets, plan, label_smoothing=0.4, batch_axis=1, **weights)
    for got, right, bound in zip(found, exact, bounds, strict=True):
        check_within(got, right, bound)
