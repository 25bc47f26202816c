"""What happens to numbers between memory and sums, in NumPy: the formulas on arrays, weights and exponentials."""
import math

import ml_dtypes
import numpy as np

from ...activations import ENTRIES
from . import formulas
from .factories import cache
from .simulator import _TYPE, _quiet


class _Arrays:
    """The functions that formulas take of NumPy arrays."""

    inf = np.inf
    exp, log, where = staticmethod(np.exp), staticmethod(np.log), staticmethod(np.where)
    inverse, minimum, maximum = staticmethod(np.reciprocal), staticmethod(np.minimum), staticmethod(np.maximum)

    @staticmethod
    def erfc(values):
        return np.array([math.erfc(value) for value in values], values.dtype)


@cache
def rounded(dtype, wide, count):
    """(fragment of wide) -> the same values as memory of dtype would give them back."""
    return _quiet(lambda fragment: fragment.astype(_stored(dtype)).astype(_TYPE[wide]))


@cache
def round_tf32(count):
    """(float32 fragment) -> the nearest numbers of tf32's 11 significant bits, ties away from zero."""
    return _quiet(lambda values: (_round_tf32(values.view(np.uint32)) & np.uint32(0xFFFFE000)).view(np.float32))


def _round_tf32(bits):
    """The nearest tf32, ties away from zero, in bits of which mma drops the last 13."""
    half_place = (bits & np.uint32(0xFF800000)).view(np.float32) * np.float32(2.0 ** -11)
    return (bits.view(np.float32) + half_place).view(np.uint32)


def _stored(dtype):
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@cache
def backward(activation, dtype, wide, count):
    """(gradient above an activation, its argument, parameter) -> the gradient below it, element by element, in wide."""
    formula = ENTRIES[activation].formula_of(dtype).backward
    return _quiet(lambda gradient, z, parameter: formula(_Arrays, gradient, z, parameter))


@cache
def weigh(dtype, count, samples):
    """(fragment, weights) -> their product; one weight for all, or one for each element."""
    return _quiet(lambda fragment, weights: fragment * weights)


@cache
def minus(dtype, count, samples):
    """(fragment, values) -> their difference; one value for all, or one for each element."""
    return _quiet(lambda fragment, values: fragment - values)


@cache
def leave_out(dtype, count, samples):
    """(fragment, integers, integer) -> zeros where the integers are this one, whatever the fragment holds there."""
    return lambda fragment, integers, left_out: np.where(np.array(integers) == left_out, _TYPE[dtype](0), fragment)


@cache
def no_exponentials(dtype):
    """() -> the state of a sum of exponentials to which nothing was added."""
    return lambda: np.array([-np.inf, 0], _TYPE[dtype])


@cache
def add_exponentials(dtype, wide, count):
    """(state, fragment) -> the state of the sum with its exponentials, as exact as values of dtype need them."""
    return _quiet(lambda state, values: np.array(formulas.add_exponentials(_Arrays, state, values), _TYPE[wide]))


@cache
def add_targets(dtype, wide, count):
    """(state, fragment, targets) -> the state of a row, as the formula says, with these values and their targets."""
    return _quiet(lambda state, values, targets: np.array(
        formulas.add_targets(_Arrays, state, values, targets), _TYPE[wide]))


@cache
def merge_targets(dtype):
    """(state, state) -> the state of both parts of a row."""
    return _quiet(lambda left, right: np.array(formulas.merge_targets(_Arrays, left, right), _TYPE[dtype]))


@cache
def log_of_exponentials(dtype):
    """(state) -> the largest value, and the logarithm of the sum less it."""
    return _quiet(lambda state: np.array(formulas.log_of_exponentials(_Arrays, state), _TYPE[dtype]))
