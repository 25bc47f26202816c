"""Sums of exponentials and cross-entropy, each formula written once for both kinds of primitives.

The values and `number` are those of the formulas of activations, which have a module of their own.
Exponentials are only taken of numbers that are not positive, so that they neither overflow nor cancel.

Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
"""


def add_exponentials(number, state, values):
    """(largest, total) with more values: total is the sum of exp(value - largest) over the values."""
    largest, total = state
    highest = largest
    for value in values:
        highest = number.where(value > highest, value, highest)
    # Minus infinities alone have no difference, and add nothing.
    base = _finite_or_zero(number, highest)
    total = total * number.exp(largest - base)
    for value in values:
        total = total + number.exp(value - base)
    return highest, total


def merge_exponentials(number, left, right):
    """(largest, total) of both: total is the sum of exp(value - largest) over the values."""
    (largest, total), (other_largest, other_total) = left, right
    rises = other_largest > largest
    low, high = number.where(rises, largest, other_largest), number.where(rises, other_largest, largest)
    # Where nothing was added yet, or minus infinities alone, there is no difference to take.
    share = number.where(low == -number.inf, 0, number.exp(low - high))
    return high, number.where(rises, total * share + other_total, total + other_total * share)


def add_targets(number, state, values, targets):
    """(largest, total, target_sum, lost) with more values and what is held against them.

    lost is the sum of each target times what its value is less than the largest, or than 0 where that is minus
    infinity; where a target is 0, nothing, whatever the value is.
    """
    largest, total, target_sum, lost = state
    highest, total = add_exponentials(number, (largest, total), values)
    base = _finite_or_zero(number, highest)
    lost = lost + _moved(number, target_sum, largest, base)
    for value, target in zip(values, targets, strict=True):
        lost = lost + number.where(target == 0, 0, target * (value - base))
        target_sum = target_sum + target
    return highest, total, target_sum, lost


def merge_targets(number, left, right):
    """(largest, total, target_sum, lost) of both."""
    highest, total = merge_exponentials(number, left[:2], right[:2])
    base, lost = _finite_or_zero(number, highest), 0
    for largest, _, target_sum, part in (left, right):
        lost = part + _moved(number, target_sum, largest, base) + lost
    return highest, total, left[2] + right[2], lost


def _moved(number, target_sum, largest, base):
    """What a sum of targets' products changes by when its values are taken from another base than the largest."""
    return number.where(target_sum == 0, 0, target_sum * (_finite_or_zero(number, largest) - base))


def _finite_or_zero(number, largest):
    return number.where(largest == -number.inf, 0, largest)


def log_of_exponentials(number, state):
    """(largest, log_total): the logarithm of the sum of exp(value) over the values is their sum.

    They are kept apart, since beside a large value the logarithm's digits would be lost. Where the largest value is
    infinite, log_total is not a number.
    """
    largest, total = state
    return largest, number.log(total) + (largest - largest)
