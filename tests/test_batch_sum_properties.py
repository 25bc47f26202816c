"""dL/db of drawn shapes, memory and options, bit for bit as the plan's order of additions gives it."""
from dataclasses import dataclass

import numpy as np
import pytest
from batch_sum_model import model, small_plan
from hypothesis import given, settings
from hypothesis import strategies as st

import densegrad as dg
from densegrad.device import dtype_of
from densegrad.testing import LAYOUTS, SENTINEL, Placed, Strided, bits, normal


@dataclass(frozen=True)
class Kernels:
    """What the compiler needs to know: few of these, since each takes it a second."""

    layout: str
    dtype: str
    out_dtype: str
    accumulate: bool = False
    compensated: bool = False
    outputs: tuple[int, int] = (2, 40)

    def __str__(self):
        options = ["accumulate"] * self.accumulate + ["compensated"] * self.compensated
        return "-".join([self.layout, self.dtype, "to", self.out_dtype, *options])


KERNELS = (
    Kernels("rows", "float32", "float32"),
    Kernels("rows", "bfloat16", "float32", accumulate=True),
    Kernels("rows", "float64", "float32", compensated=True),
    Kernels("flat", "float32", "float32", accumulate=True, compensated=True, outputs=(3, 3)),
    Kernels("flat", "float16", "float16", outputs=(10, 10)),
    Kernels("flat", "float64", "float64", accumulate=True, outputs=(5, 5)),
    Kernels("features_first", "float32", "float64"),
    Kernels("features_first", "bfloat16", "bfloat16", accumulate=True),
    Kernels("features_first", "float16", "float32", compensated=True),
)


@st.composite
def problems(draw, kernels):
    """(values, where they lie, the caller's batch axis, plan): of a shape and in memory that call for these kernels."""
    samples, outputs = draw(st.integers(2, 90)), draw(st.integers(*kernels.outputs))
    plan = small_plan(samples, outputs, kernels.dtype, kernels.layout, draw(st.integers(1, 2)), kernels.compensated)
    values = normal((samples, outputs), kernels.dtype, seed=draw(st.integers(0, 9)))
    # Magnitudes differ, so that another order of additions has other bits; what halves hold does not overflow.
    spread = 2 if "16" in kernels.dtype else 12
    powers = np.random.default_rng(samples).integers(-spread, spread + 1, values.shape)
    values = np.ldexp(values.astype("float64"), powers).astype(values.dtype)
    if draw(st.booleans()):
        # Samples cancel, so that what is left is what rounding took.
        half = samples // 2
        values[half:2 * half] = -np.random.default_rng(half).permutation(values[:half])
    gap = 0 if kernels.layout == "flat" else draw(st.integers(0, 9))
    backwards = kernels.layout != "flat" and draw(st.booleans())
    order = (1, 0) if kernels.layout == "features_first" else (0, 1)
    layout = Strided.of(values.shape, order, [gap * (axis == order[0]) for axis in (0, 1)], order[:1] * backwards,
                        offset=draw(st.integers(0, 33)))
    return values, layout, draw(st.booleans()), plan


@pytest.mark.parametrize("kernels", KERNELS, ids=str)
def test_every_sum_has_the_bits_of_its_plans_order_and_touches_nothing_else(kernels, xp):
    @settings(deadline=None, derandomize=True, max_examples=10)
    @given(problems(kernels), st.sampled_from(sorted(LAYOUTS)), st.sampled_from([1.0, 0.5, -1.75, 1 / 3]))
    def holds(problem, out_memory, alpha):
        values, layout, batch_axis, plan = problem
        before = normal((plan.outputs,), kernels.out_dtype, seed=3) if kernels.accumulate else None
        out = Placed(np.full(plan.outputs, np.nan, dtype_of(kernels.out_dtype)) if before is None else before,
                     out_memory, xp, SENTINEL)
        dz = Placed(values, layout, xp).array
        dg.bias_grad(dz.T if batch_axis else dz, batch_axis=int(batch_axis), alpha=alpha, out=out.array,
                     accumulate=kernels.accumulate, compensated=kernels.compensated, plan=plan)
        expected = model(plan, values, kernels.out_dtype, alpha, before)
        np.testing.assert_array_equal(bits(out.read()), bits(expected))

    holds()
