"""What happens to numbers between memory and sums, each formula written once for both kinds of primitives.

The values are NumPy arrays in the simulator and the compiler's values on the device; both take Python's operators and
plain numbers. `number` is the module of functions that goes with them: exp, log, erfc and where.

Exponentials are only taken of numbers that are not positive, so that they neither overflow nor cancel. Arguments beyond
which a derivative is constant in every dtype are held there, so that infinite ones give its limit.

Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016; Milakov, Gimelshein, "Online normalizer calculation for
softmax", 2018.
"""
from math import pi, sqrt


def identity(number, above, z, slope):
    """above: without an activation."""
    return above


def relu(number, above, z, slope):
    """0 where z <= 0, whatever above is, else above: where z is not a number, too."""
    return number.where(z <= 0, 0, above)


def leaky_relu(number, above, z, slope):
    """above where z > 0, else slope * above: where z is not a number, too."""
    return number.where(z > 0, above, above * slope)


def sigmoid(number, above, z, slope):
    """above * p (1 - p), where p = 1 / (1 + exp(-z))."""
    small = number.exp(-abs(z))
    rest = 1 / (1 + small)
    return above * (small * rest * rest)


def tanh(number, above, z, slope):
    """above * (1 - tanh(z)²)."""
    return 4 * sigmoid(number, above, 2 * z, slope)


def silu(number, above, z, slope):
    """above * p (1 + z (1 - p)), where p = 1 / (1 + exp(-z))."""
    z = _held(number, z, 1000)
    p, q = _logistic(number, z)
    return above * (p * (1 + z * q))


def gelu(number, above, z, slope):
    """above * (P(z) + z P'(z)), where P is the normal distribution's cumulative function."""
    z = _held(number, z, 40)
    density = number.exp(z * z * -0.5) * (1 / sqrt(2 * pi))
    return above * (number.erfc(z * -sqrt(0.5)) * 0.5 + z * density)


def gelu_tanh(number, above, z, slope):
    """above * the derivative of z p, where p = 1 / (1 + exp(-2 u)) and u = sqrt(2 / pi) (z + 0.044715 z³)."""
    z = _held(number, z, 20)
    square = z * z
    p, q = _logistic(number, (z * (square * 0.044715 + 1)) * (2 * sqrt(2 / pi)))
    return above * (p + z * (p * q) * ((square * (3 * 0.044715) + 1) * (2 * sqrt(2 / pi))))


ACTIVATIONS = {function.__name__: function
               for function in (identity, relu, leaky_relu, sigmoid, tanh, silu, gelu, gelu_tanh)}


def _held(number, z, limit):
    return number.where(z > limit, limit, number.where(z < -limit, -limit, z))


def _logistic(number, z):
    """(p, 1 - p), where p = 1 / (1 + exp(-z)); neither cancels."""
    small = number.exp(-abs(z))
    rest = 1 / (1 + small)
    return number.where(z < 0, small * rest, rest), number.where(z < 0, rest, small * rest)


def cross_entropy(number, below, log_total, is_label, smoothing, outputs):
    """Softmax minus target, which is smoothing / outputs, and at the label 1 - smoothing more.

    below is how much less than the sample's largest the value is, and log_total as log_of_exponentials gives it.
    """
    target = smoothing / outputs
    return number.exp(below - log_total) - number.where(is_label, target + (1 - smoothing), target)


def merge_exponentials(number, left, right):
    """(largest, total) of both: total is the sum of exp(value - largest) over the values."""
    (largest, total), (other_largest, other_total) = left, right
    rises = other_largest > largest
    low, high = number.where(rises, largest, other_largest), number.where(rises, other_largest, largest)
    # Where nothing was added yet, or minus infinities alone, there is no difference to take.
    share = number.where(low == -number.inf, 0, number.exp(low - high))
    return high, number.where(rises, total * share + other_total, total + other_total * share)


def log_of_exponentials(number, state):
    """(largest, log_total): the logarithm of the sum of exp(value) over the values is their sum.

    They are kept apart, since beside a large value the logarithm's digits would be lost. Where the largest value is
    infinite, log_total is not a number.
    """
    largest, total = state
    return largest, number.log(total) + (largest - largest)
