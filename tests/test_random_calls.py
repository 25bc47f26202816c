"""Some 12 random calls of every public function; `python -m tests.random_calls` makes as many as one likes."""
import itertools

import numpy as np
import pytest

from densegrad.plans import ACTIVATIONS
from densegrad.testing import check_within
from tests.random_calls import FUNCTIONS, Call

#: whose alpha multiplies sums, and not a dZ that is rounded
SUMS = ("bias_grad", "weight_grad", "weight_bias_grad", "input_grad", "dense_grads")


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_random_calls(function, seed, xp):
    Call(function, seed).check(xp)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_order_of_four_axes(function, xp):
    met = set()
    for seed, order in enumerate(itertools.permutations(range(4))):
        call = Call(function, seed, order, dtype="float32", precision=None, activation="relu", sample_weight=None,
                    given=False, accumulate=False, sizes=((2, 3, 4), 5, 3))
        assert not call.check(xp)
        met |= {order for name, order in call.orders_of_four_axes() if name == "dz"}
    assert len(met) == 24


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("function", SUMS)
def test_alpha_scales_sums_and_their_errors(function, dtype, xp):
    """Powers of two: whatever a call with alpha = 1 is off by, the same call with a smaller alpha is by that less."""
    activations = (None, *ACTIVATIONS) if function == "dense_grads" else (None,) * 6
    order = (0, 1) if function == "dense_grads" else None  # many kernels as it is, without those of many layouts
    for seed, activation in enumerate(activations):
        weights = (None, "bool", "float16", "bfloat16", "float32")[seed % 5]
        call = Call(function, seed, order, dtype=dtype, out_dtype="float32", alpha=1.0, accumulate=False,
                    refusals=False, magnitude="small" if dtype == "float16" else "usual", activation=activation,
                    sample_weight=weights, axes=1, sizes=((9,), 6, 10))
        _, launches = call.run(xp)
        exactly = call.expected(launches)
        alpha = 2.0 ** -(3 + seed if seed % 2 else 20)
        found, _ = call.run(xp, alpha)
        for name, (exact, bound) in exactly.items():
            check_within(found[name], alpha * exact, alpha * np.asarray(bound))
