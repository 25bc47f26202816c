"""Products of which one operand is thin: at most 8 inputs, outputs or samples."""
import itertools
from dataclasses import replace

import numpy as np
import pytest

import densegrad
from densegrad import reference
from densegrad.calls import recorded
from densegrad.families.cost import ORDERS
from densegrad.families.product import EXTRAPOLATED
from densegrad.layers import LAYERS
from densegrad.plans import (
    MatmulPlan,
    ThinPlan,
    bias_rides_along,
    plan_matmul,
    plan_product,
    plan_tensor_core,
    plan_thin,
    thin_candidates,
)
from densegrad.testing import (
    LAYOUTS,
    SENTINEL,
    Placed,
    Strided,
    bits,
    check_within,
    expected,
    host,
    integers,
    normal,
    poisoned,
)

DTYPES = ("float32", "float16", "bfloat16", "float64")
#: threads across the depth and along it: few, so that small matrices have edges
THREADS = (8, 4)
#: which of (in_features, out_features) of dL/dW is few, or of (samples, in_features) of dL/dX
CASES = tuple(itertools.product(("weight_grad", "input_grad"), (0, 1)))


def problem(function, rows, cols, depth, dtype, make=normal):
    """The arrays of a function whose result has so many rows and columns."""
    if function == "weight_grad":
        return make((depth, rows), dtype, 1), make((depth, cols), dtype, 2)
    return make((rows, depth), dtype, 1), make((cols, depth), dtype, 2)


def sizes_of(few, thin, long):
    return (thin, long) if few == 0 else (long, thin)


@pytest.mark.parametrize(("function", "few", "thin"), [
    *((*case, 8) for case in CASES), *((*case, thin) for case in CASES[1:3] for thin in (0, 1, 3))])
def test_every_size_around_a_tile_and_a_step(xp, function, few, thin):
    """Integers, so that an element too many or too few is seen however small it is."""
    step = 8 * THREADS[1] if thin <= 4 else 4 * THREADS[1]
    for long, depth in itertools.product((1, 32, 33), (0, 1, step - 1, 3 * step + 5)):
        rows, cols = sizes_of(few, thin, long)
        arrays = problem(function, rows, cols, depth, "float32", integers)
        out = poisoned((rows, cols), "float32", "C", xp)
        getattr(densegrad, function)(*(Placed(array, "C", xp).array for array in arrays), out=out.array,
                                     plan=ThinPlan(rows, cols, depth, "float32", *THREADS, parts=1 + depth // step))
        assert (out.read() == getattr(reference, function)(*arrays)).all()


@pytest.mark.parametrize(("dtype", "function", "few"), [
    *(("float32", *case) for case in CASES), ("bfloat16", *CASES[0]), ("bfloat16", *CASES[3]), ("float16", *CASES[1]),
    ("float64", *CASES[2])])
def test_every_layout_and_dtype(xp, dtype, function, few):
    rows, cols = sizes_of(few, 3, 34)
    arrays = problem(function, rows, cols, 20, dtype)
    for number, (first, second) in enumerate(zip(LAYOUTS, itertools.cycle("CCFF"))):
        layouts, parts = (first, second) if number % 2 else (second, first), 1 + number % 3
        plan = ThinPlan(rows, cols, 20, dtype, *THREADS, parts)
        out_dtype = "float64" if dtype == "bfloat16" else dtype
        out = poisoned((rows, cols), out_dtype, first, xp)
        getattr(densegrad, function)(*(Placed(array, layout, xp).array for array, layout in
                                       zip(arrays, layouts, strict=True)), out=out.array, plan=plan)
        check_within(out.read(), *expected(function, arrays, {}, plan.chain, out_dtype))


@pytest.mark.parametrize("threads", [(1, 32), (4, 16), (32, 8), (256, 1)])
def test_every_number_of_threads(xp, threads):
    x, dz = integers((77, 2), "float32", 1), integers((77, 150), "float32", 2)
    for layout in "CF":
        given = Placed(x, "C", xp).array, Placed(dz, layout, xp).array
        found = densegrad.weight_grad(*given, plan=ThinPlan(2, 150, 77, "float32", *threads))
        assert (host(found) == reference.weight_grad(x, dz)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["C", "F"])
def test_the_bias_rides_along_where_inputs_are_few(xp, dtype, layout):
    for samples, inputs, parts in ((37, 1, 1), (130, 7, 3)):
        x, dz = normal((samples, inputs), dtype, 1), normal((samples, 45), dtype, 2)
        plan = ThinPlan(inputs, 45, samples, dtype, 8, 4, parts)
        assert bias_rides_along(plan)
        old = normal((inputs, 45), "float32", 3), normal((45,), "float64", 4)
        dw, db = Placed(old[0], "C", xp, SENTINEL), Placed(old[1], "C", xp, SENTINEL)
        with recorded() as launches:
            densegrad.weight_bias_grad(Placed(x, "C", xp).array, Placed(dz, layout, xp).array, plan=plan,
                                       out=densegrad.WeightBiasGrads(dw.array, db.array), accumulate=("db",))
        assert {launch.kernel for launch in launches} <= {"matmul_thin", "add_parts"}
        check_within(dw.read(), *expected("weight_grad", (x, dz), {}, plan.chain, "float32"))
        check_within(db.read(), *expected("bias_grad", (dz,), {}, plan.chain, "float64", old[1]))


def test_the_bias_of_few_outputs_has_launches_of_its_own(xp):
    x, dz = normal((50, 20), "float32", 1), normal((50, 4), "float32", 2)
    plan = ThinPlan(20, 4, 50, "float32", *THREADS)
    assert not bias_rides_along(plan)
    given = [Placed(array, "C", xp).array for array in (x, dz)]
    found = densegrad.weight_bias_grad(*given, plan=plan)
    assert (bits(found.db) == bits(densegrad.bias_grad(given[1]))).all()
    check_within(found.dw, *expected("weight_grad", (x, dz), {}, plan.chain))


def modelled(left, right, plan, along):
    """The sum for each column in the order that kernels/matmul_thin.py states: left (depth,), right (depth, cols)."""
    vector, threads, parts = plan.thread_cols if along else 1, plan.threads_along, []
    for start in range(0, plan.depth, plan.depth_per_part):
        depths = np.arange(start, min(start + plan.depth_per_part, plan.depth))
        whose = (depths - start) // vector % threads
        total = np.zeros(right.shape[1], np.float32)
        for thread in range(threads):
            chain = np.zeros(right.shape[1], np.float32)
            for depth in depths[whose == thread]:
                chain = chain + left[depth] * right[depth]
            total = total + chain
        parts.append(total)
    return np.add.accumulate(parts, axis=0, dtype=np.float32)[-1]


@pytest.mark.parametrize("parts", [1, 19])
@pytest.mark.parametrize("along", [False, True])
def test_the_order_of_additions_is_the_stated_one_however_wide_accesses_are(xp, along, parts):
    """The thin operand holds powers of two, so that products are exact, fused or not."""
    depth, cols = 632, 36
    left = (2.0 ** np.random.default_rng(0).integers(-2, 3, depth)).astype("float32")
    right = normal((depth, cols), "float32", 2)
    plan = ThinPlan(1, cols, depth, "float32", 8, 4, parts)
    wanted = modelled(left, right, plan, along)
    of_a_thread = -(-min(plan.depth_per_part, depth) // 4)
    assert of_a_thread <= plan.chain - (4 - 1) - (parts - 1) <= of_a_thread + 4
    for gap, offset in ((0, 0), (2, 2), (1, 3)):
        order, between = ((1, 0), (0, gap)) if along else ((0, 1), (gap, 0))
        dz = Placed(right, Strided.of(right.shape, order, between, offset=offset), xp).array
        found = densegrad.weight_grad(Placed(left[:, None], "C", xp).array, dz, plan=plan)
        assert (bits(found)[0] == bits(wanted)).all()


def test_what_is_not_finite_stays_where_it_belongs(xp):
    for function, few in CASES:
        rows, cols = sizes_of(few, 3, 40)
        arrays = problem(function, rows, cols, 50, "float32")
        arrays[0][2, 2], arrays[1][1, 0] = np.inf, np.nan
        plan = ThinPlan(rows, cols, 50, "float32", *THREADS)
        found = getattr(densegrad, function)(*(Placed(array, "C", xp).array for array in arrays), plan=plan)
        check_within(found, *expected(function, arrays, {}, plan.chain))


def test_more_than_a_grid_of_parts_or_columns(xp):
    x, dz = normal((300, 2), "float32", 1), normal((300, 5), "float32", 2)
    plan = ThinPlan(2, 5, 300, "float32", 1, 32, parts=2)
    found = densegrad.weight_grad(Placed(x, "C", xp).array, Placed(dz, "C", xp).array, plan=plan)
    check_within(found, *expected("weight_grad", (x, dz), {}, plan.chain))


LONG = {"one output": ["dw"], "one feature": ["dw", "dx"], "one sample": ["dx"], "recommender, last": ["dw"],
        "wide and shallow": ["dx"]}


@pytest.mark.parametrize(("layer", "operation"), [(layer, one) for layer, many in LONG.items() for one in many])
def test_thin_layers_get_thin_plans(layer, operation):
    samples, inputs, outputs = LAYERS[layer]
    sizes = (inputs, outputs, samples) if operation == "dw" else (samples, inputs, outputs)
    plan = plan_product(*sizes, "float32", order=ORDERS[operation == "dx"])
    assert isinstance(plan, ThinPlan)
    assert plan.explain().count("not measured") == 2
    assert "product of matrix and vector" in plan.explain() or layer == "wide and shallow"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_a_thin_plan_has_to_promise_a_tenth(dtype, order):
    draw, chosen, exact = np.random.default_rng(0), 0, dtype == "float64"
    for thin in (1, 2, 3, 5, 8, 9, 64):
        for _ in range(8):
            other, depth = (int(size) for size in 2 ** draw.uniform(0, 20, 2))
            for rows, cols in ((thin, other), (other, thin)):
                plan = plan_product(rows, cols, depth, dtype, order=order)
                rival = (plan_tensor_core if dtype in ("float16", "bfloat16") else plan_matmul)(
                    rows, cols, depth, dtype, order=order).cost(order).total
                chosen += isinstance(plan, ThinPlan)
                if min(rows, cols) > 8 or exact:
                    assert not isinstance(plan, ThinPlan)
                else:
                    best = min(one.cost(order).total for one in thin_candidates(rows, cols, depth, dtype, order))
                    assert isinstance(plan, ThinPlan) == (best * EXTRAPOLATED < rival)
    assert chosen > 8 or exact
    assert not isinstance(plan_product(1, 1024, 16384, "float32", "tf32", order=order), ThinPlan)
    assert not isinstance(plan_product(1, 1024, 16384, "bfloat16", "ieee", order=order), ThinPlan)
    assert not isinstance(plan_product(1, 1024, 16384, "bfloat16", None, (7, 5), order=order), ThinPlan)


@pytest.mark.parametrize("order", ORDERS)
def test_no_part_is_empty(order):
    for rows, cols, depth in ((8, 8, 512), (8, 8, 4096), (1, 1, 1_000_003), (2, 100, 77), (1, 1, 1), (0, 5, 0)):
        for plan in thin_candidates(rows, cols, depth, "float32", order):
            assert plan.depth_per_part * (plan.parts - 1) < max(plan.depth, 1)
    assert plan_thin(1, 1, 10 ** 7, "float32", order).parts > 32


def test_the_transposed_plan_is_of_the_transposed_product(xp):
    plan = ThinPlan(5, 70, 90, "float32", *THREADS)
    assert ThinPlan(70, 5, 90, "float32", *THREADS) == plan.T
    assert plan == plan.T.T
    x, dz = normal((90, 5), "float32", 1), normal((90, 70), "float32", 2)
    one, other = (Placed(array, "C", xp).array for array in (x, dz))
    assert (bits(densegrad.weight_grad(one, other, plan=plan))
            == bits(host(densegrad.weight_grad(other, one, plan=plan.T)).T)).all()


@pytest.mark.parametrize(("wrong", "told"), [
    ({"rows": 9}, "rows or cols must be at most 8; got 9 and 64"),
    ({"threads_across": 12}, "threads_across must be a power of two; got 12"),
    ({"threads_along": 2}, "a block has 32 to 256 threads; got 16"),
    ({"threads_along": 64}, "a block has 32 to 256 threads; got 512"),
    ({"parts": 0}, "parts must be between 1 and 65535; got 0"),
    ({"depth": 2 ** 32, "parts": 2}, "take more parts"),
])
def test_plans_that_no_kernel_carries_out_are_refused(wrong, told):
    with pytest.raises(densegrad.PlanError, match=told):
        replace(ThinPlan(8, 64, 128, "float32", *THREADS), **wrong)


def test_a_thin_plan_is_no_way_to_multiply_in_tf32():
    x, dz = np.ones((4, 3), "float32"), np.ones((4, 5), "float32")
    with pytest.raises(densegrad.PlanError, match="precision='tf32' was asked for"):
        densegrad.weight_grad(x, dz, precision="tf32", plan=ThinPlan(3, 5, 4, "float32", *THREADS))
    with pytest.raises(TypeError, match="must be a MatmulPlan or a TensorCorePlan or a ThinPlan or a HopperPlan; got"):
        densegrad.weight_grad(x, dz, plan="thin")
    assert isinstance(plan_product(64, 64, 64, "float32"), MatmulPlan)
