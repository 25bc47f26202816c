"""Error counts of activations: a running error analysis of each formula, in units of the roundoff.

Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.3.
"""
import math

import numpy as np
import pytest

from densegrad import activations
from densegrad.activations import ACTIVATIONS, ENTRIES

UNIT = 2.0 ** -24
#: what a half type's formula may differ from f' by, where it is another function: Abramowitz and Stegun say 7.5e-8
POLYNOMIAL = {"gelu": 7.5e-8}


class Rounded:
    """A number, and how many units of roundoff it may be off by: where operations and functions round it up."""

    def __init__(self, value, error=0.0):
        self.value = np.asarray(value, float)
        self.error = np.broadcast_to(error, self.value.shape)

    @staticmethod
    def of(number):
        """A plain number: a constant, rounded unless float32 has it."""
        if isinstance(number, Rounded):
            return number
        return Rounded(number, 0 if np.float32(number) == number else abs(number))

    def __add__(self, other):
        other = Rounded.of(other)
        total = self.value + other.value
        return Rounded(total, self.error + other.error + np.abs(total))

    def __mul__(self, other):
        other = Rounded.of(other)
        product = self.value * other.value
        # By a power of two.
        exact = any(one.value.ndim == 0 and math.frexp(abs(one.value))[0] == 0.5 for one in (self, other))
        return Rounded(product, np.abs(self.value) * other.error + np.abs(other.value) * self.error
                       + (0 if exact else np.abs(product)))

    def __rtruediv__(self, one):
        quotient = one / self.value
        return Rounded(quotient, np.abs(quotient / self.value) * self.error + np.abs(quotient))

    def __neg__(self):
        return Rounded(-self.value, self.error)

    def __abs__(self):
        return Rounded(np.abs(self.value), self.error)

    def __sub__(self, other):
        return self + -Rounded.of(other)

    def __rsub__(self, other):
        return -self + other

    __radd__, __rmul__ = __add__, __mul__

    def __lt__(self, other):
        return self.value < other

    def __le__(self, other):
        return self.value <= other

    def __gt__(self, other):
        return self.value > other

    def __ge__(self, other):
        return self.value >= other


class Functions:
    """The functions that formulas take, with the errors that `activations` states."""

    def __init__(self, half):
        self.half = half

    def where(self, condition, left, right):
        left, right = Rounded.of(left), Rounded.of(right)
        return Rounded(np.where(condition, left.value, right.value), np.where(condition, left.error, right.error))

    def minimum(self, number, limit):
        return self.where(number > limit, limit, number)

    def maximum(self, number, limit):
        return self.where(number < limit, limit, number)

    def exp(self, number):
        value = np.exp(number.value)
        return Rounded(value, value * (number.error + (4 + 2 * np.abs(number.value) if self.half else 6)))

    def inverse(self, number):
        quotient = 1 / number
        return Rounded(quotient.value, quotient.error + self.half * np.abs(quotient.value))

    def erfc(self, number):
        value = np.vectorize(math.erfc)(number.value)
        return Rounded(value, 2 / math.sqrt(math.pi) * np.exp(-number.value ** 2) * number.error + 12 * value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_roundings_are_no_fewer_than_a_running_error_analysis_finds(name, dtype):
    z = np.concatenate([np.linspace(-45, 45, 36001), np.geomspace(1e-6, 300, 3000), -np.geomspace(1e-6, 300, 3000)])
    entry, half = ENTRIES[name], dtype == "bfloat16"
    formula = entry.formula_of(dtype)
    found = Rounded.of(formula.backward(Functions(half), Rounded(1.0), Rounded(z), Rounded(0.01, 0.01)))
    wrong = np.abs(found.value - entry.reference(np, np.ones_like(z), z, 0.01))
    assert (wrong <= (POLYNOMIAL.get(name, 0) if half else 0) + 1e-13).all()
    # A rounding is of a number of at most 2.
    assert (found.error + wrong / UNIT <= 2 * formula.roundings).all()


def test_the_analysis_finds_a_count_that_is_too_low():
    formula = activations._tanh(Functions(False), Rounded(1.0), Rounded(1e-3), None)
    assert 17 < formula.error < 20
