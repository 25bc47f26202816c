"""float64 on tensor cores and on FMA units: equal bits, whatever the numbers, and which of them is chosen where."""
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import densegrad
from densegrad.calls import recorded
from densegrad.families.cost import LAUNCH
from densegrad.families.product import MOST_WORKSPACE, bias_rides_along
from densegrad.layers import LAYERS
from densegrad.plans import (
    MatmulPlan,
    TensorCorePlan,
    matmul_candidates,
    plan_matmul,
    plan_product,
    plan_tensor_core,
)
from densegrad.testing import bits, host, normal

#: the compute capabilities whose instructions there are for float64
CAPABILITIES = [(8, 0), pytest.param((9, 0), marks=pytest.mark.hopper)]
ORIENTATIONS = tuple(itertools.product((0, 1), ("in_out", "out_in")))
FUNCTIONS = ("weight_bias_grad", "input_grad")
#: (rows, cols, depth) of dL/dW and of dL/dX for each layer
PRODUCTS = [sizes for samples, inputs, outputs in LAYERS.values()
            for sizes in ((inputs, outputs, samples), (samples, inputs, outputs))]


def strange(shape, dtype, seed):
    """Numbers of every magnitude; zeros of either sign, subnormal and largest ones, and a few that are not finite."""
    draw = np.random.default_rng(seed)
    values = np.ldexp(draw.uniform(-2, 2, shape), draw.integers(-1080, 500, shape))
    finite, others = np.array([0, -0.0, 5e-324, -5e-324, 1e308, -1e308]), np.array([np.inf, -np.inf, np.nan])
    chance = draw.random(shape)
    values = np.where(chance < 0.15, draw.choice(finite, shape), values)
    return np.where(chance > 0.995, draw.choice(others, shape), values)


def tiny(shape, dtype, seed):
    """Numbers whose products are at most subnormal: sums are zeros of either sign, too."""
    draw = np.random.default_rng(seed)
    return np.ldexp(draw.uniform(-2, 2, shape), draw.integers(-620, -530, shape))


def same(found, wanted):
    """Equal bits, or both not a number."""
    found, wanted = host(found), host(wanted)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    numbers = ~np.isnan(wanted)
    np.testing.assert_array_equal(bits(found)[numbers], bits(wanted)[numbers])


@dataclass(frozen=True)
class Kernels:
    """What the compiler needs to know: few of these, since each takes it seconds."""

    function: str
    options: tuple  # (batch_axis, weight_layout)
    vectors: bool  # whether all rows of memory are whole vectors of 16 bytes
    accumulate: bool = False
    out_dtype: str = "float64"
    tile: tuple = (32, 32, 32, 32)
    thread_tile: tuple = (16, 16, 8, 4, 4)

    def __str__(self):
        return "-".join([self.function, *map(str, self.options), "vectors" * self.vectors, "added" * self.accumulate,
                         self.out_dtype])

    def arrays(self, sizes, make):
        """(what the function takes, rows, cols and depth)"""
        samples, inputs, outputs = sizes
        batch_axis, weight_layout = self.options
        x, dz = make((samples, inputs), "float64", 1), make((samples, outputs), "float64", 3)
        dz = np.ascontiguousarray(dz.T) if batch_axis else dz
        if self.function == "weight_bias_grad":
            return (x, dz), (inputs, outputs, samples)
        w = make((inputs, outputs), "float64", 2)
        return (dz, np.ascontiguousarray(w.T) if weight_layout == "out_in" else w), (samples, inputs, outputs)

    def plans(self, sizes, parts, capability):
        """The same cut of the depth on tensor cores and on FMA units."""
        rows, cols, warp_rows, warp_cols = self.tile
        return (TensorCorePlan(*sizes, "float64", None, rows, cols, 8, warp_rows, warp_cols, 3, parts, capability),
                MatmulPlan(*sizes, "float64", *self.thread_tile, parts))

    def run(self, xp, arrays, plan, alpha=1.0):
        """The results, in a tuple."""
        batch_axis, weight_layout = self.options
        shapes = [(plan.rows, plan.cols), (plan.cols,)][:1 + (self.function != "input_grad")]
        if weight_layout == "out_in" and self.function != "input_grad":
            shapes[0] = shapes[0][::-1]
        outs = [xp.asarray(normal(shape, self.out_dtype, 9)) for shape in shapes]
        with recorded() as launches:
            getattr(densegrad, self.function)(
                *map(xp.asarray, arrays), batch_axis=batch_axis, weight_layout=weight_layout, plan=plan, alpha=alpha,
                accumulate=self.accumulate, out=outs[0] if len(outs) == 1 else densegrad.WeightBiasGrads(*outs))
        assert launches[0].plan in (plan, plan.T)
        return outs

    def check(self, xp, sizes, parts, capability, make, alpha=1.0):
        """Both results of FMA units and of tensor cores; returns them."""
        arrays, product = self.arrays(sizes, make)
        found, wanted = (self.run(xp, arrays, plan, alpha) for plan in self.plans(product, parts, capability))
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
        return found


@pytest.mark.only("gpu")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("options", ORIENTATIONS)
def test_tensor_cores_give_the_bits_of_fma_units(xp, capability, function, options):
    """In every order of the operands: of subnormal numbers, infinities, and zeros of either sign.

    Sums of whole tiles may be -0; zeros that fill up the last one make it +0.
    """
    kernels = Kernels(function, options, vectors=options[0] == 0)
    sizes = (40, 34, 40) if kernels.vectors else (45, 35, 37)
    kernels.check(xp, sizes, 2, capability, strange)
    result = host(kernels.check(xp, sizes, 1, capability, tiny)[0])
    assert np.signbit(result[result == 0]).any() == kernels.vectors


#: tiles of several warps, and thread tiles of which few threads add dz up
DRAWN = (
    Kernels("weight_bias_grad", (0, "in_out"), vectors=True, tile=(64, 64, 32, 32), thread_tile=(32, 64, 8, 4, 8)),
    Kernels("weight_bias_grad", (1, "out_in"), vectors=False, accumulate=True, tile=(64, 32, 32, 32),
            thread_tile=(4, 128, 8, 4, 4)),
    Kernels("weight_bias_grad", (0, "in_out"), vectors=False, out_dtype="float32", thread_tile=(64, 16, 8, 8, 4)),
    Kernels("input_grad", (0, "in_out"), vectors=False, tile=(32, 64, 32, 32), thread_tile=(64, 32, 8, 8, 4)),
)


@pytest.mark.only("gpu")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernels", DRAWN, ids=str)
def test_drawn_products_have_equal_bits(xp, kernels, capability):
    unit = 2 if kernels.vectors else 1
    size = st.integers(1, 36 // unit)

    @settings(max_examples=5, deadline=None, derandomize=True, database=None)
    @given(sizes=st.tuples(size, size, size), parts=st.integers(1, 3), make=st.sampled_from((strange, tiny, normal)),
           alpha=st.sampled_from((1.0, -0.5, 1 / 3)))
    def check(sizes, parts, make, alpha):
        kernels.check(xp, [unit * one + (not kernels.vectors) for one in sizes], parts, capability, make, alpha)

    check()


@pytest.mark.parametrize("capability", [(8, 0), pytest.param((9, 0), marks=[
    pytest.mark.hopper, pytest.mark.only("gpu")])])
def test_what_is_chosen_has_equal_bits(xp, capability):
    """By the plan for this capability and by that for one without such tensor cores; db rides along with both."""
    samples, inputs, outputs = 260, 9, 10
    x, w, dz = (normal(shape, "float64", 1) for shape in ((samples, inputs), (inputs, outputs), (samples, outputs)))
    found = []
    for where in (capability, (12, 0)):
        dw = plan_product(inputs, outputs, samples, "float64", None, where)
        dx = plan_product(samples, inputs, outputs, "float64", None, where, order="along")
        found.append(densegrad.dense_grads(*map(xp.asarray, (x, w, dz)), plan=densegrad.DenseGrads(dx, dw, None)))
        assert isinstance(dw, MatmulPlan if where == (12, 0) else TensorCorePlan)
        assert dw.parts > 1
    for one, other in zip(*found, strict=True):
        same(one, other)


# plans


def test_float64_goes_to_tensor_cores_where_it_is_faster_there():
    """On A100 and Hopper alone, by instructions of their own; whether precision is "ieee" or left out."""
    for sizes in ((768, 3072, 8192), (4096, 4096, 4096)):
        for precision in (None, "ieee"):
            for capability in ((8, 0), (9, 0)):
                plan = plan_product(*sizes, "float64", precision, capability)
                assert isinstance(plan, TensorCorePlan)
                assert plan.capability == capability
                assert "with the bits of FMA units, sums in float64" in plan.explain()
            for capability in ((7, 5), (8, 6), (8, 9), (10, 0), (12, 0)):
                assert plan_product(*sizes, "float64", precision, capability) == plan_matmul(*sizes, "float64")
    assert "tensor cores of compute capability 9.0 with" in plan_product(64, 64, 64, "float64", None, (9, 0)).explain()


def test_a_product_of_one_depth_is_left_to_fma_units():
    """Where neither is faster: both wait for memory."""
    assert isinstance(plan_product(65536, 256, 1, "float64", None, (9, 0)), MatmulPlan)


@pytest.mark.parametrize("order", ["across", "along"])
def test_the_cut_of_the_depth_follows_from_the_sizes_alone(order):
    """So does whether db rides along; and every tile is as deep as the others, so that parts end at the same depths."""
    for sizes in (*PRODUCTS, (33, 7, 5), (1, 1, 100_000), (3, 3, 0)):
        plans = [plan_matmul(*sizes, "float64", order),
                 plan_tensor_core(*sizes, "float64", None, (8, 0), order=order),
                 plan_tensor_core(*sizes, "float64", None, (9, 0), order=order),
                 *matmul_candidates(*sizes, "float64")]
        assert len({(plan.parts, plan.depth_per_part, plan.tile_depth) for plan in plans}) == 1
        assert all(map(bias_rides_along, plans))


def test_the_cut_loses_little_for_either_kernel():
    """Against the number of parts that would be best for its tile, by the nominal model: a sixth, or a launch."""
    for sizes in PRODUCTS:
        for plan in (plan_matmul(*sizes, "float64"), plan_tensor_core(*sizes, "float64", None, (9, 0))):
            others = [replace(plan, parts=parts) for parts in range(1, max(min(200, plan.depth // 32), 1) + 1)]
            best = min(other.cost("across").total for other in others if other.workspace_bytes <= MOST_WORKSPACE)
            assert plan.cost("across").total <= max(7 / 6 * best, best + LAUNCH)
