"""dL/dW with and without dL/db, and dL/dX, of drawn shapes, memory and options, within the plan's bound of float64."""
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import densegrad
from densegrad import reference
from densegrad.plans import MatmulPlan
from densegrad.testing import SENTINEL, Placed, Strided, check_within, error_bound, normal


@dataclass(frozen=True)
class Kernels:
    """What the compiler needs to know: few of these, since each takes it seconds.

    by_columns says which of the two inputs are contiguous along their first axis; vectors, whether all rows of memory
    are whole vectors of 16 bytes, or begin anywhere.
    """

    function: str
    dtype: str
    out_dtype: str
    by_columns: tuple[bool, bool]
    out_layout: str
    vectors: bool
    accumulate: bool = False
    tile: tuple[int, int, int, int, int] = (16, 16, 8, 4, 4)

    def __str__(self):
        orders = "".join("FC"[not by_columns] for by_columns in self.by_columns)
        options = ["vectors"] * self.vectors + ["accumulate"] * self.accumulate
        return "-".join([self.function, self.dtype, "to", self.out_dtype, orders, self.out_layout, *options])


KERNELS = (
    Kernels("weight_grad", "float32", "float32", (False, False), "C", vectors=True),
    Kernels("weight_grad", "float32", "float32", (False, True), "F", vectors=False, accumulate=True),
    Kernels("weight_grad", "float32", "float64", (True, False), "spread", vectors=False, tile=(8, 32, 16, 4, 8)),
    Kernels("weight_bias_grad", "float32", "float32", (False, False), "gaps", vectors=False),
    Kernels("weight_bias_grad", "bfloat16", "float32", (True, True), "C", vectors=True, accumulate=True),
    Kernels("input_grad", "float32", "float32", (False, False), "offset", vectors=False),
    Kernels("input_grad", "float64", "float64", (True, False), "C", vectors=True, accumulate=True),
    Kernels("input_grad", "float16", "float16", (False, True), "padded F", vectors=False, tile=(32, 8, 16, 8, 4)),
)


@st.composite
def problems(draw, kernels):
    """(sizes, gaps and offset of the inputs, parts, alpha, seed) that call for these kernels."""
    unit = 8 if kernels.vectors else 1
    sizes = [unit * draw(st.integers(1, 40 // unit)) for _ in range(3)]
    if kernels.vectors:
        return sizes, (unit * draw(st.integers(0, 2)), 0), unit * draw(st.integers(0, 3)), *draw(rest())
    # An odd pitch, so that no row but some begins with a vector.
    lengths = row_lengths(kernels, sizes)
    gaps = tuple(2 * draw(st.integers(1, 4)) + (length + 1) % 2 for length in lengths)
    return sizes, gaps, draw(st.integers(0, 17)), *draw(rest())


def rest():
    """(parts, alpha, seed)"""
    return st.tuples(st.integers(1, 3), st.sampled_from([1.0, -0.5, 0.3]), st.integers(0, 9))


def row_lengths(kernels, sizes):
    """How long the rows of the two inputs are in memory."""
    samples, inputs, outputs = sizes
    shapes = ((samples, outputs), (inputs, outputs)) if kernels.function == "input_grad" else (
        (samples, inputs), (samples, outputs))
    return [shape[not by_columns] for shape, by_columns in zip(shapes, kernels.by_columns, strict=True)]


@pytest.mark.parametrize("kernels", KERNELS, ids=str)
@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_drawn_layers_are_within_the_bound(kernels, data, xp):
    (samples, inputs, outputs), gaps, offset, parts, alpha, seed = data.draw(problems(kernels))
    dz, of_input = normal((samples, outputs), kernels.dtype, seed), kernels.function == "input_grad"
    other = normal((inputs, outputs) if of_input else (samples, inputs), kernels.dtype, seed + 10)
    arrays = (dz, other) if of_input else (other, dz)
    rows, cols, depth = (samples, inputs, outputs) if of_input else (inputs, outputs, samples)
    plan = MatmulPlan(rows, cols, depth, kernels.dtype, *kernels.tile, parts)
    old = normal((rows, cols), kernels.out_dtype, seed + 20)
    out = Placed(old, kernels.out_layout, xp, SENTINEL)
    given_arrays = []
    for array, by_columns, gap in zip(arrays, kernels.by_columns, gaps, strict=True):
        order, between = ((1, 0), (0, gap)) if by_columns else ((0, 1), (gap, 0))
        given_arrays.append(Placed(array, Strided.of(array.shape, order, between, offset=offset), xp).array)
    options = {"plan": plan, "alpha": alpha, "accumulate": kernels.accumulate}

    def check(found, meaning, chain, before):
        wide = [array.astype("float64") for array in meaning[1]]
        exact, magnitude = alpha * meaning[0](*wide), abs(alpha) * meaning[0](*map(np.abs, wide))
        if kernels.accumulate:
            exact, magnitude = exact + before.astype("float64"), magnitude + np.abs(before.astype("float64"))
        check_within(found, exact, error_bound(magnitude, exact, chain + kernels.accumulate, depth, kernels.dtype,
                                               kernels.out_dtype, alpha=alpha))

    if kernels.function == "weight_bias_grad":
        old_bias = normal((outputs,), kernels.out_dtype, seed + 30)
        bias = Placed(old_bias, "C", xp, SENTINEL)
        densegrad.weight_bias_grad(*given_arrays, out=densegrad.WeightBiasGrads(dw=out.array, db=bias.array), **options)
        # db: a thread adds the depths of a tile that it shares with others, and then the others' sums.
        check(bias.read(), (reference.bias_grad, (dz,)), plan.chain + plan.tile_depth, old_bias)
        check(out.read(), (reference.weight_grad, arrays), plan.chain, old)
    else:
        getattr(densegrad, kernels.function)(*given_arrays, out=out.array, **options)
        check(out.read(), (getattr(reference, kernels.function), arrays), plan.chain, old)
