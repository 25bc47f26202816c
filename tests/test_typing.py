"""Types that editors and checkers see, held to the lists that calls are held to."""
from typing import get_args, get_type_hints

import numpy as np

import densegrad
from densegrad import activations, facts, gradients, losses, operands, plans, typing

#: alias -> the names that calls take
LITERALS = {
    "ActivationName": activations.ACTIVATIONS,
    "DTypeName": tuple(facts.ITEM_BYTES),
    "GradName": gradients.DenseGrads._fields,
    "Precision": ("ieee", *plans.TF32),
    "Reduction": losses.REDUCTIONS,
    "WeightLayout": operands.WEIGHT_LAYOUTS,
}


def test_every_literal_has_the_names_that_calls_take():
    literals = {name: get_args(value) for name, value in vars(typing).items()
                if getattr(value, "__origin__", None) is typing.Literal}
    assert {name: sorted(values) for name, values in literals.items()} == {
        name: sorted(values) for name, values in LITERALS.items()}


def test_signatures_can_be_asked_for_their_types():
    for name in densegrad.__all__:
        assert get_type_hints(getattr(densegrad, name)) is not None
    hints = get_type_hints(densegrad.activation_grad)
    assert set(get_args(get_args(hints["activation"])[0])) == set(activations.ACTIVATIONS)


def test_the_gradients_of_a_kind_are_tuples_with_names():
    """A generic one keeps what a plain one has, on the oldest Python too."""
    made = densegrad.DenseGrads[np.ndarray](dw=1)
    assert made == (None, 1, None)
    assert made._replace(db=2)._asdict() == {"dx": None, "dw": 1, "db": 2}
    assert type(made) is densegrad.DenseGrads
    assert repr(made) == "DenseGrads(dx=None, dw=1, db=None)"
