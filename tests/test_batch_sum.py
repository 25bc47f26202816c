"""dL/db: every layout, dtype and alignment, held to integers, float64 and a NumPy model of the order of additions."""
from dataclasses import replace
from math import fsum

import numpy as np
import pytest
from batch_sum_model import model, small_plan

import densegrad as dg
from densegrad import reference
from densegrad.calls import recorded
from densegrad.device import alignment_of, current, dtype_of
from densegrad.errors import PlanError
from densegrad.families import add_parts
from densegrad.families.add_parts import AddPartsPlan
from densegrad.launches import Matrix, Result, Slot
from densegrad.plans import ITEM_BYTES, BatchSumPlan, accumulator_of, plan_batch_sum
from densegrad.testing import Placed, bits, check_within, error_bound, host, integers, normal, poisoned

DTYPES = ("float16", "bfloat16", "float32", "float64")
#: a layout of the plan, and how the memory of dz then lies: (name of a memory layout, batch_axis)
MEMORY = {"rows": (("padded", 0), ("gaps", 0), ("F", 1), ("upside down", 0)), "flat": (("C", 0), ("offset", 0)),
          "features_first": (("C", 1), ("offset", 1), ("padded", 1), ("F", 0), ("gaps", 1))}
CASES = [(layout, *memory) for layout, memories in MEMORY.items() for memory in memories]


def placed(values, memory, batch_axis, xp):
    """values (samples, outputs) on the lane's device, in this memory layout, as batch_axis says."""
    return Placed(values.T if batch_axis else values, memory, xp).array


@pytest.mark.parametrize(("layout", "memory", "batch_axis"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact_and_nothing_else_is_touched(layout, memory, batch_axis, dtype, xp):
    values = integers((37, 9), dtype)
    out = poisoned((9,), dtype, module=xp)
    dg.bias_grad(placed(values, memory, batch_axis, xp), batch_axis=batch_axis, out=out.array,
                 plan=small_plan(37, 9, dtype, layout, parts=2))
    np.testing.assert_array_equal(out.read().astype(float), reference.bias_grad(values))


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(("layout", "memory", "batch_axis"), CASES)
@pytest.mark.parametrize("parts", [1, 3])
def test_bits_are_those_of_the_plans_order(layout, memory, batch_axis, parts, compensated, xp):
    """Of samples that cancel, so that what is left is what rounding took, and lost, in this order and no other."""
    values = normal((53, 10), "float32", seed=3) * 10.0 ** np.arange(10, dtype="float32")
    values[26:52] = -np.random.default_rng(4).permutation(values[:26])
    values[52] *= 1e-14
    plan = small_plan(53, 10, "float32", layout, parts, compensated)
    result = dg.bias_grad(placed(values, memory, batch_axis, xp), batch_axis=batch_axis, plan=plan)
    np.testing.assert_array_equal(bits(result), bits(model(plan, values)))


@pytest.mark.parametrize("memory", ["C", "offset"])
@pytest.mark.parametrize("compensated", [False, True])
def test_lines_of_an_odd_number_of_vectors_keep_the_plans_order(memory, compensated, xp):
    """Every other line begins inside of 32 bytes, and so does every other part of three lines."""
    values = normal((53, 5), "float32", seed=4) * 10.0 ** np.arange(5, dtype="float32")
    plan = BatchSumPlan(53, 5, "float32", "flat", threads_x=5, lanes=1, in_flight=2, samples_per_part=12, folders=2,
                        compensated=compensated)
    found = dg.bias_grad(placed(values, memory, 0, xp), plan=plan)
    np.testing.assert_array_equal(bits(found), bits(model(plan, values)))


@pytest.mark.parametrize("outputs", [1, 3, 4, 5, 17, 40])
@pytest.mark.parametrize("samples", [1, 2, 7, 33])
@pytest.mark.parametrize("batch_axis", [0, 1])
def test_planned_sums_are_within_the_bound_and_in_the_plans_order(samples, outputs, batch_axis, xp):
    values = normal((samples, outputs), "float32", seed=samples)
    dz = placed(values, "C", batch_axis, xp)
    with recorded() as launches:
        result = dg.bias_grad(dz, batch_axis=batch_axis)
    plan, exact = launches[0].plan, reference.bias_grad(values)
    bound = error_bound(np.abs(values.astype(float)).sum(axis=0), exact, plan.chain, samples, "float32")
    check_within(result, exact, bound)
    np.testing.assert_array_equal(bits(result), bits(model(plan, values)))


@pytest.mark.parametrize(("layout", "memory", "batch_axis"), CASES)
@pytest.mark.parametrize("compensated", [False, True])
def test_nan_and_infinities_stay_in_their_columns(layout, memory, batch_axis, compensated, xp):
    values = np.ones((37, 9), "float32")
    values[0, 0] = values[36, 8] = np.nan
    values[17, 3], values[30, 4], values[2, 6], values[33, 6] = np.inf, -np.inf, np.inf, -np.inf
    expected = np.full(9, 37.0)
    expected[[0, 3, 4, 6, 8]] = np.nan, np.inf, -np.inf, np.nan, np.nan
    plan = small_plan(37, 9, "float32", layout, 2, compensated)
    dz = placed(values, memory, batch_axis, xp)
    np.testing.assert_array_equal(host(dg.bias_grad(dz, batch_axis=batch_axis, plan=plan)), expected)
    out = xp.asarray(np.where(np.arange(9) == 1, np.inf, 0).astype("float32"))
    dg.bias_grad(dz, batch_axis=batch_axis, plan=plan, out=out, accumulate=True)
    expected[1] = np.inf
    np.testing.assert_array_equal(host(out), expected)


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("compensated", [False, True])
def test_every_element_counts_once(layout, compensated, xp):
    memory, batch_axis = MEMORY[layout][0]
    values = np.arange(41 * 7).reshape(41, 7).astype("float64") ** 2 + 1
    plan = small_plan(41, 7, "float64", layout, 3, compensated)
    for row, col in [(0, 0), (40, 6), (13, 5), (14, 0), (27, 3), (28, 2)]:
        marked = values.copy()
        marked[row, col] = 2.0 ** 40
        difference = (host(dg.bias_grad(placed(marked, memory, batch_axis, xp), batch_axis=batch_axis, plan=plan))
                      - reference.bias_grad(values))
        np.testing.assert_array_equal(np.flatnonzero(difference), [col])
        assert difference[col] == 2.0 ** 40 - values[row, col]


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize(("dtype", "out_dtype"), [
    ("float16", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float64"),
    ("float32", "float16"), ("float64", "float32")])
@pytest.mark.parametrize("parts", [1, 2])
def test_accumulating_rounds_once(layout, dtype, out_dtype, parts, xp):
    memory, batch_axis = MEMORY[layout][0]
    values, before = normal((37, 9), dtype, seed=5), normal((9,), out_dtype, seed=6)
    out = Placed(before, "C", xp, -99.0)
    plan = small_plan(37, 9, dtype, layout, parts)
    dg.bias_grad(placed(values, memory, batch_axis, xp), batch_axis=batch_axis, out=out.array, accumulate=True,
                 plan=plan)
    np.testing.assert_array_equal(bits(out.read()), bits(model(plan, values, out_dtype, before=before)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_alpha_scales_is_rounded_before_it_is_added(dtype, xp):
    """3 times the float32 next to 1/3 is 1 and a little more, which a fused multiply-add would keep."""
    number = {"float32": 3, "float64": 49}[dtype]
    dz, out = xp.full((1, 1), number, dtype), xp.full(1, -1, dtype)
    dg.bias_grad(dz, alpha=1 / number, out=out, accumulate=True)
    one = np.dtype(dtype).type
    assert host(out).item() == one(number) * one(1 / number) - 1


def test_small_bfloat16_steps_do_not_stick(xp):
    values = np.ones((300, 2), dtype_of("bfloat16"))
    values[0] = 256
    out = xp.zeros(2, "float32")
    dg.bias_grad(placed(values, "C", 0, xp), out=out)
    np.testing.assert_array_equal(host(out), [555, 555])


def cancelling(samples, outputs, left):
    """Numbers of nine magnitudes, of whose sum in each column only this share is left: plain sums lose digits there."""
    draw = np.random.default_rng(1)
    values = draw.standard_normal((samples, outputs)) * 10.0 ** draw.integers(-4, 5, (samples, outputs))
    values = values.astype("float32")
    middle = 3 * samples // 5
    values[middle] = (left - 1) * (values.sum(axis=0, dtype=float) - values[middle])
    return values


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("parts", [1, 3])
def test_compensated_sums_are_within_two_units_in_the_last_place(layout, parts, xp):
    memory, batch_axis = MEMORY[layout][0]
    values = cancelling(101, 6, 0.01)
    plan = small_plan(101, 6, "float32", layout, parts, compensated=True)
    result = host(dg.bias_grad(placed(values, memory, batch_axis, xp), batch_axis=batch_axis, plan=plan))
    exact = np.array([fsum(column) for column in values.T.astype(float)])
    assert (np.abs(result - exact) <= 2 * np.spacing(np.abs(result))).all()
    plain = model(replace(plan, compensated=False), values)
    assert (np.abs(plain - exact) > 2 * np.spacing(np.abs(plain))).any()


@pytest.mark.parametrize("batch_axis", [0, 1])
@pytest.mark.parametrize("left", [1e-2, 1e-5, 0])
def test_compensated_sums_that_nearly_cancel_are_within_their_bound(batch_axis, left, xp):
    values = cancelling(101, 6, left)
    with recorded() as launches:
        result = dg.bias_grad(placed(values, "C", batch_axis, xp), batch_axis=batch_axis, compensated=True)
    plan, exact = launches[0].plan, np.array([fsum(column) for column in values.T.astype(float)])
    assert plan == plan_batch_sum(101, 6, "float32", plan.layout, compensated=True)
    np.testing.assert_array_equal(bits(result), bits(model(plan, values)))
    bound = error_bound(np.abs(values.astype(float)).sum(axis=0), exact, plan.chain, 1, "float32", compensated=True)
    check_within(result, exact, bound)
    plain = dg.bias_grad(placed(values, "C", batch_axis, xp), batch_axis=batch_axis)
    assert (np.abs(host(plain) - exact) > bound).any()


def test_a_compensated_plan_and_the_keyword_agree_or_are_refused(xp):
    dz = xp.asarray(np.array([[1e8], [1], [-1e8]], "float32"))
    plain = plan_batch_sum(3, 1, "float32", "flat")
    compensated = replace(plain, compensated=True)
    for options, expected in (({}, 0), ({"plan": plain}, 0), ({"compensated": True}, 1), ({"plan": compensated}, 1),
                              ({"plan": compensated, "compensated": True}, 1)):
        assert host(dg.bias_grad(dz, **options)).item() == expected
    out = xp.full(1, 7, "float32")
    with pytest.raises(PlanError, match=r"plan is not compensated.*replace\(plan, compensated=True\)"):
        dg.bias_grad(dz, plan=plain, compensated=True, out=out)
    assert host(out).item() == 7


@pytest.mark.parametrize("layout", MEMORY)
def test_an_empty_batch_gives_zeros_or_leaves_out_alone(layout, xp):
    dz = xp.empty((3, 0) if layout == "features_first" else (0, 3), "float32")
    batch_axis = int(layout == "features_first")
    np.testing.assert_array_equal(host(dg.bias_grad(dz, batch_axis=batch_axis)), np.zeros(3))
    out = xp.full(3, 7, "float32")
    dg.bias_grad(dz, batch_axis=batch_axis, out=out, accumulate=True)
    np.testing.assert_array_equal(host(out), np.full(3, 7))


def test_a_broadcast_sample_is_summed_where_it_is(xp):
    row = xp.arange(9, dtype="float32")
    np.testing.assert_array_equal(host(dg.bias_grad(xp.broadcast_to(row, (33, 9)))), 33 * np.arange(9))
    np.testing.assert_array_equal(host(dg.bias_grad(xp.broadcast_to(row[:, None], (9, 33)))), np.full(33, 36))


@pytest.mark.parametrize(("dtype", "out_dtype"), [
    ("float32", "float32"), ("float32", "bfloat16"), ("float64", "float64")])
@pytest.mark.parametrize(("memory", "cols"), [("C", 6), ("padded", 8), ("gaps", 5), ("F", 6)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_parts_of_a_product_are_added_in_order(dtype, out_dtype, memory, cols, accumulate, xp):
    where, vector = current(), 16 // ITEM_BYTES[dtype]
    pitch, parts, rows, alpha = -(-cols // vector) * vector, 6, 3, np.dtype(dtype).type(2.0)
    values, before = normal((parts, rows, cols), dtype, seed=2), normal((rows, cols), out_dtype, seed=3)
    padded = np.full((parts, rows, pitch), np.nan, dtype)
    padded[:, :, :cols] = values
    array = xp.asarray(padded)
    out = Placed(before, memory, xp, -99.0)
    strides = (stride // ITEM_BYTES[out_dtype] for stride in out.array.strides)
    result = Matrix(Slot("out"), out_dtype, rows, cols, *strides, alignment=alignment_of(int(where.address(out.array))))
    plan = AddPartsPlan(parts, rows, cols, pitch, dtype)
    assert plan.chain == parts - 1
    launch, = add_parts.launches(plan, Matrix(Slot("parts"), dtype, rows, pitch, pitch, 1), Result(result, accumulate))
    place = where.memory(array).place
    loaded, = where.loaded((launch,), place)
    loaded({"parts": where.address(array), "out": where.address(out.array), "alpha": float(alpha), "alpha_address": 0},
           where.current_stream(place))
    total = np.zeros((rows, cols), dtype)
    for part in values:
        total += part
    total *= alpha
    if accumulate:
        total += before.astype(dtype)
    np.testing.assert_array_equal(bits(out.read()), bits(total.astype(dtype_of(out_dtype))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("compensated", [False, True])
def test_plans_fill_a_gpu_and_keep_what_they_write_small(dtype, layout, compensated):
    for samples, outputs in [(8192, 3072), (65536, 1024), (1_000_003, 1), (1_000_003, 17), (1_000_003, 100),
                             (1024, 1024), (5000, 256), (200, 20_000), (100_000, 12), (4096, 4096)]:
        plan = plan_batch_sum(samples, outputs, dtype, layout, compensated)
        blocks = plan.grid[0] * plan.grid[1]
        # At once on 108 multiprocessors, where a second wave would have much to do.
        most = 108 * plan.blocks_per_multiprocessor if samples * outputs > 9e6 else 648
        assert 264 <= blocks <= most, (plan, blocks)
        assert 1 <= (plan.parts - 1) * plan.samples_per_part + 1 <= samples
        if samples * outputs * ITEM_BYTES[dtype] > 64e6 and not compensated:
            written = plan.workspace_bytes + outputs * ITEM_BYTES[dtype]
            assert written <= 0.008 * samples * outputs * ITEM_BYTES[dtype]
        assert f"{blocks // plan.grid[1]} x {plan.parts} blocks of {plan.threads} threads" in plan.explain()


@pytest.mark.parametrize("layout", MEMORY)
def test_small_sums_take_few_threads(layout):
    for samples, outputs in [(1, 1), (128, 10), (16, 64), (1797, 9), (256, 64), (2, 8000)]:
        plan = plan_batch_sum(samples, outputs, "float32", layout)
        assert plan.threads <= 64
        assert plan.threads * plan.grid[0] * plan.grid[1] <= max(64, samples * outputs // 4)


@pytest.mark.parametrize("wrong", [
    {"dtype": "int32"}, {"layout": "sideways"}, {"lanes": 0}, {"lanes": 300}, {"threads_x": 3}, {"lanes": 5},
    {"vectors": 400}, {"samples": 10 ** 6, "samples_per_part": 8}, {"samples_per_part": 2 ** 31},
    {"layout": "flat"}, {"layout": "features_first"}])
def test_a_plan_that_no_kernel_can_carry_out_is_refused(wrong):
    plan = BatchSumPlan(64, 10, "float32", "rows", threads_x=4, lanes=8, in_flight=2, samples_per_part=16)
    with pytest.raises(PlanError, match="plan: "):
        replace(plan, **wrong)


def test_sums_of_halves_are_kept_in_float32():
    assert [accumulator_of(dtype) for dtype in DTYPES] == ["float32", "float32", "float32", "float64"]
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, float64; got 'float31'"):
        accumulator_of("float31")


@pytest.mark.parametrize(("samples", "outputs"), [(101, outputs) for outputs in range(1, 14)] + [(1700, 10)])
def test_a_matrix_without_gaps_of_every_width(samples, outputs, xp):
    """Some folders add a copy of a column more than others: of 3 and 6 outputs, and of 10 where blocks are large."""
    dz = integers((samples, outputs), "float32", outputs)
    np.testing.assert_array_equal(host(dg.bias_grad(xp.asarray(dz))), dz.sum(0))
