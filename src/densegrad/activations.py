"""The activations, an entry each: all that the kernels, plans, bounds and the reference in float64 know of them.

To add one, write its formula and its reference, and list it in ENTRIES. A formula takes (number, gradient, z,
parameter), where the gradient is that with respect to the activation, and gives it times f'(z). Its values are NumPy
arrays in the simulator and the compiler's values on the device; both take Python's operators and plain numbers.
`number` is the module of functions that goes with them: exp, log, erfc, inverse, minimum, maximum and where, of which
minimum and maximum leave what is not a number as it is. A reference takes NumPy instead, `np`: what says what is
launched reads this file, and loads without NumPy.

Exponentials are only taken of numbers that are not positive, so that they neither overflow nor cancel. Arguments beyond
which a derivative is constant in every dtype are held there, so that infinite ones give its limit.

How errors are counted
    u is the unit roundoff of what is computed in. An operation is off by u times its result. exp is off by at most 3
    units in the last place (NVIDIA's tables say 2, NumPy's say 3), which is 6 u of its result, and erfc by 6, 12 u. In
    float64 exp is off by 1; the rest is left to what the float64 reference is off by itself.
    Half types are computed in float32 by the device's approximations, `ex2.approx` and `rcp.approx`: exp(x) is off by
    (4 + 2 |x|) u of itself, of which 2 |x| u are the exponent's, and `inverse` by 2 u.
    A formula's `roundings` say how far off f'(z) is: so many roundings of a number of at most 2, each 2 u. They are no
    less than what the comments beside the entries derive, and than what a running error analysis of each formula comes
    to, for half types too: `tests/test_activations.py`. What the gradient is multiplied by afterwards is counted by
    `testing.dz_bound`.

Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016; Abramowitz, Stegun, "Handbook of Mathematical
Functions", 1964, 7.1.26 (the tail of gelu for half types); Clevert, Unterthiner, Hochreiter, "Fast and accurate
deep network learning by exponential linear units", 2016; Klambauer et al., "Self-normalizing neural networks", 2017;
Misra, "Mish: a self regularized non-monotonic activation function", 2019; Howard et al., "Searching for MobileNetV3",
2019. Parameters, and answers for z that is not a number, are those of PyTorch on GPUs.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any


@dataclass(frozen=True)
class Formula:
    """How the gradient below an activation is computed, on the device and in the simulator."""

    #: (number, gradient, z, parameter) -> the gradient below
    backward: Callable[[Any, Any, Any, Any], Any]
    #: how far off f'(z) is at most: roundings of a number of at most 2
    roundings: int
    #: how many exp and erfc an element takes; what takes any needs more registers
    exponentials: int = 0


@dataclass(frozen=True)
class Parameter:
    """The number that an activation takes: what the public functions call it, and what it is if left out."""

    name: str
    default: float


@dataclass(frozen=True)
class Activation:
    """One activation a = f(z)."""

    name: str
    formula: Formula
    #: (NumPy, gradient, z, parameter) -> the gradient below, of arrays of float64
    reference: Callable[[Any, Any, Any, float], Any]
    parameter: Parameter | None = None
    #: the formula for float16 and bfloat16, where it is another one
    half: Formula | None = None

    def formula_of(self, dtype: str) -> Formula:
        """The formula for matrices of this dtype."""
        return self.half if self.half is not None and dtype in ("float16", "bfloat16") else self.formula


#: what leaky_relu takes
NEGATIVE_SLOPE = Parameter("negative_slope", 0.01)
#: PyTorch's constants of selu: what it multiplies elu by, and elu's alpha
SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717
#: where PyTorch's softplus goes over to z itself
SOFTPLUS_THRESHOLD = 20


def _identity(number, gradient, z, parameter):
    """The gradient: without an activation."""
    return gradient


def _relu(number, gradient, z, parameter):
    """0 where z <= 0, whatever the gradient is, else gradient: where z is not a number, too."""
    return number.where(z <= 0, 0, gradient)


def _leaky_relu(number, gradient, z, slope):
    """gradient where z > 0, else slope * gradient: where z is not a number, too."""
    return number.where(z > 0, gradient, gradient * slope)


def _sigmoid(number, gradient, z, parameter):
    """gradient * p (1 - p), where p = 1 / (1 + exp(-z))."""
    small = number.exp(-abs(z))
    rest = number.inverse(1 + small)
    return gradient * (small * rest * rest)


def _tanh(number, gradient, z, parameter):
    """gradient * (1 - tanh(z)²)."""
    return 4 * _sigmoid(number, gradient, 2 * z, parameter)


def _silu(number, gradient, z, parameter):
    """gradient * p (1 + z (1 - p)), where p = 1 / (1 + exp(-z))."""
    z = _held(number, z, 1000)
    p, q = _logistic(number, z)
    return gradient * (p * (1 + z * q))


def _gelu(number, gradient, z, parameter):
    """gradient * (P(z) + z P'(z)), where P is the normal distribution's cumulative function."""
    z = _held(number, z, 40)
    density = number.exp(z * z * -0.5) * (1 / sqrt(2 * pi))
    return gradient * (number.erfc(z * -sqrt(0.5)) * 0.5 + z * density)


def _gelu_half(number, gradient, z, parameter):
    """The same by one exponential: P(-|z|) is exp(-z²/2) times a polynomial in 1 / (1 + c |z|), but for 7.5e-8."""
    z = _held(number, z, 40)
    exponential = number.exp(z * z * -0.5)
    share = number.inverse(abs(z) * (0.3275911 * sqrt(0.5)) + 1)
    tail = 0.5 * 1.061405429
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = tail * share + 0.5 * coefficient
    tail *= share * exponential
    return gradient * (number.where(z < 0, tail, 1 - tail) + z * (exponential * (1 / sqrt(2 * pi))))


def _gelu_tanh(number, gradient, z, parameter):
    """gradient * the derivative of z p, where p = 1 / (1 + exp(-2 u)) and u = sqrt(2 / pi) (z + 0.044715 z³)."""
    z = _held(number, z, 20)
    square = z * z
    p, q = _logistic(number, (z * (square * 0.044715 + 1)) * (2 * sqrt(2 / pi)))
    return gradient * (p + z * (p * q) * ((square * (3 * 0.044715) + 1) * (2 * sqrt(2 / pi))))


def _softplus(number, gradient, z, parameter):
    """gradient * 1 / (1 + exp(-z)), and gradient itself beyond the threshold."""
    p, _ = _logistic(number, z)
    return number.where(z > SOFTPLUS_THRESHOLD, gradient, gradient * p)


def _elu(number, gradient, z, parameter):
    """gradient * exp(z) where z <= 0, else gradient: where z is not a number, too."""
    return number.where(z <= 0, gradient * number.exp(-abs(z)), gradient)


def _selu(number, gradient, z, parameter):
    """gradient * scale * alpha exp(z) where z <= 0, else gradient * scale: where z is not a number, too."""
    return gradient * number.where(z <= 0, number.exp(-abs(z)) * (SELU_SCALE * SELU_ALPHA), SELU_SCALE)


def _mish(number, gradient, z, parameter):
    """gradient * (t + z p (1 - t²)), where t = tanh(log(1 + exp(z))) and p = 1 / (1 + exp(-z)).

    With s = exp(-|z|), t is n / (n + r), where n = s (s + 2) and r = 2 for z < 0, else n = 1 + 2 s and r = 2 s².
    1 - t is r / (n + r), so that nothing cancels.
    """
    z = _held(number, z, 1000)
    small = number.exp(-abs(z))
    risen = number.where(z < 0, small * (small + 2), 2 * small + 1)
    left = number.where(z < 0, 2, 2 * small * small)
    whole = number.inverse(risen + left)
    t, p = risen * whole, number.where(z < 0, small, 1) * number.inverse(1 + small)
    return gradient * (t + z * p * (left * whole) * (1 + t))


def _hardswish(number, gradient, z, parameter):
    """0 where z <= -3, whatever the gradient is, gradient * (z / 3 + 1 / 2) where z < 3, else gradient.

    So it is where z is not a number.
    """
    return number.where(z <= -3, 0, number.where(z < 3, gradient * (z * (1 / 3) + 0.5), gradient))


def _relu6(number, gradient, z, parameter):
    """0 where z <= 0 or z >= 6, whatever the gradient is, else gradient: where z is not a number, too."""
    return number.where(z <= 0, 0, number.where(z >= 6, 0, gradient))


def _held(number, z, limit):
    return number.maximum(number.minimum(z, limit), -limit)


def _logistic(number, z):
    """(p, 1 - p), where p = 1 / (1 + exp(-z)); neither cancels."""
    small = number.exp(-abs(z))
    rest = number.inverse(1 + small)
    return number.where(z < 0, small * rest, rest), number.where(z < 0, rest, small * rest)


def _selected(chosen: Callable[[Any], Any]) -> Callable[[Any, Any, Any, float], Any]:
    """The reference of what lets the gradient pass where chosen(z), and gives 0 elsewhere, whatever it is."""
    return lambda np, gradient, z, parameter: np.where(chosen(z), gradient, 0.0)


def _times(derivative: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any, float], Any]:
    """The reference of what multiplies the gradient by derivative(NumPy, z), at z or at most ±1e150."""
    return lambda np, gradient, z, parameter: gradient * derivative(np, np.clip(z, -1e150, 1e150))


def normal_tail(np: Any, z: Any) -> Any:
    """The probability that a normal number is above z."""
    return np.vectorize(lambda value: math.erfc(value / math.sqrt(2)) / 2, otypes=[float])(z)


def _exact_logistic(np: Any, z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


def _exact_gelu_tanh(np: Any, z: Any) -> Any:
    z, factor = np.clip(z, -50, 50), math.sqrt(2 / math.pi)
    tangent = np.tanh(factor * (z + 0.044715 * z ** 3))
    slope = factor * (1 + 3 * 0.044715 * z ** 2)
    return (1 + tangent) / 2 + z * (1 - tangent ** 2) * slope / 2


def _exact_mish(np: Any, z: Any) -> Any:
    rises = np.logaddexp(0, np.clip(z, -1e150, 300))
    return np.tanh(rises) + np.clip(z, -1e150, 300) * _exact_logistic(np, z) / np.cosh(rises) ** 2


def _exact_hardswish(np: Any, gradient: Any, z: Any, parameter: float) -> Any:
    inside = np.where(np.abs(z) < 3, z, 0.0)
    return np.where(z <= -3, 0.0, np.where(z < 3, gradient * (inside / 3 + 0.5), gradient))


ENTRIES: dict[str, Activation] = {entry.name: entry for entry in (
    Activation("identity", Formula(_identity, 0), lambda np, gradient, z, parameter: gradient),
    Activation("relu", Formula(_relu, 0), _selected(lambda z: ~(z <= 0))),
    # The slope is rounded to the type of the sums.
    Activation("leaky_relu", Formula(_leaky_relu, 1),
               lambda np, gradient, z, slope: gradient * np.where(z > 0, 1.0, slope), NEGATIVE_SLOPE),
    # exp 6 u, 1 + exp and its inverse 2 u each, since rest is there twice, two products 2 u: 12 u of at most 1/4.
    Activation("sigmoid", Formula(_sigmoid, 8, 1), _times(
        lambda np, z: _exact_logistic(np, z) * _exact_logistic(np, -z))),
    # sigmoid's 12 u, of at most 1: products with 2 and 4 are exact.
    Activation("tanh", Formula(_tanh, 10, 1), _times(lambda np, z: 1 / np.cosh(np.clip(z, -700, 700)) ** 2)),
    # p and q 12 u each: exp 6 u, 1 + exp 4 u, its inverse and the product. f' is at most 1.1, and off by p's 12 u and
    # 2 u for the sum and the last product; z p q is at most 0.23, and off by q's 12 u and u for a product: 19 u.
    Activation("silu", Formula(_silu, 14, 1),
               _times(lambda np, z: _exact_logistic(np, z) * (1 + z * _exact_logistic(np, -z)))),
    # P: erfc 12 u, and less than u for its rounded argument, since x exp(-x²) is at most 0.43. z P' is at most 0.25,
    # and off by exp's 6 u, 3 u for constant and products; its rounded argument moves it by z³ P' / 2, less than 0.24,
    # times u. The sum, at most 1.13, is rounded once: 17 u.
    Activation("gelu", Formula(_gelu, 20, 2),
               _times(lambda np, z: normal_tail(np, -z) + z * np.exp(-z ** 2 / 2) / math.sqrt(2 * math.pi)),
               half=Formula(_gelu_half, 20, 1)),
    # The argument a of the exponential is off by 7 u a. p: 7 u a p q, where a p q is at most 0.23, exp 6 u of p q, and
    # 3 u for sum, inverse and product: 7 u. z p q a' is at most 0.27, and off by 20 u for exp, sums, inverses, products
    # and constants, and by 7 u a, where a times it is at most 0.52: 10 u. The sum, at most 1.13: 18 u. In float64 the
    # reference takes tanh² from 1, which cancels, times up to 9: 26 u more.
    Activation("gelu_tanh", Formula(_gelu_tanh, 24, 1), _times(_exact_gelu_tanh)),
    # 1 + exp is off by 4 u, of which exp's 6 u are 3, its inverse by 5 u. Below 0 that is multiplied by exp: 12 u, of
    # at most 1/2. In float64 exp is better by 4 u, and the reference off by as much.
    Activation("softplus", Formula(_softplus, 4, 1),
               lambda np, gradient, z, parameter: gradient * np.where(
                   z > SOFTPLUS_THRESHOLD, 1.0, _exact_logistic(np, z))),
    # exp 6 u, of at most 1.
    Activation("elu", Formula(_elu, 3, 1),
               lambda np, gradient, z, parameter: gradient * np.where(z <= 0, np.exp(np.minimum(z, 0)), 1.0)),
    # exp 6 u, constant and product u each, of at most 1.76. The three products that follow are of 1.76 too, and not of
    # 1: 2.3 u more, 17 u in all.
    Activation("selu", Formula(_selu, 9, 1), lambda np, gradient, z, parameter: gradient * SELU_SCALE * np.where(
        z <= 0, SELU_ALPHA * np.exp(np.minimum(z, 0)), 1.0)),
    # z < 0: n 10 u, n + r, of which n is at most 0.6, 7 u, t 19 u, of at most 0.6. z >= 0: n 5 u, r 13 u, n + r 10 u,
    # t 17 u. 1 - t 25 u, 1 + t 13 u, p 11 u, and three products: 52 u of z p (1 - t²), which is at most 0.27. With t's
    # 17 u and the sum, at most 1.09: 33 u.
    Activation("mish", Formula(_mish, 17, 1), _times(_exact_mish)),
    # The constant 1 / 3 and the product, of at most 1, u each, and the sum, of at most 1.5, u times 1.5: 4 u. The
    # reference rounds twice in float64.
    Activation("hardswish", Formula(_hardswish, 3), _exact_hardswish),
    Activation("relu6", Formula(_relu6, 0), _selected(lambda z: ~((z <= 0) | (z >= 6)))),
)}
#: their names
ACTIVATIONS = tuple(ENTRIES)
