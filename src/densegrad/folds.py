"""Sums that go on addend by addend: a plain one, and one with what its additions lose beside it.

A state is a tuple of arrays, and goes on by operators alone, which arrays of NumPy and CuPy and tensors have.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fold:
    """How a sum goes on: elementwise functions of flat arrays of the sums' dtype, NumPy's or CuPy's.

    Parameters
    ----------
    begin : function
        From the first addend to the state of a sum of it alone: a tuple of new arrays.
    add : function
        From (state, addend) to the state of the sum with it. The arrays of the state may be changed and returned.
    planes : int
        How many arrays a state has: 1 for a plain sum, 2 for a sum and what its additions have lost.
    """

    begin: Callable[[Any], tuple[Any, ...]]
    add: Callable[[tuple[Any, ...], Any], tuple[Any, ...]]
    planes: int = 1


def _begin(addend: Any) -> tuple[Any, ...]:
    return (addend.copy(),)


def _add(state: tuple[Any, ...], addend: Any) -> tuple[Any, ...]:
    total, = state
    with np.errstate(over="ignore", invalid="ignore"):
        total += addend
    return state


def _begin_exactly(addend: Any) -> tuple[Any, ...]:
    lost = addend.copy()
    lost.fill(0)
    return addend.copy(), lost


def _add_exactly(state: tuple[Any, ...], addend: Any) -> tuple[Any, ...]:
    """Exactly what the addition rounds away goes into what was lost (Knuth's two-sum)."""
    total, lost = state
    with np.errstate(over="ignore", invalid="ignore"):
        new = total + addend
        back = new - total
        return new, lost + ((total - (new - back)) + (addend - back))


SUM, COMPENSATED = Fold(_begin, _add), Fold(_begin_exactly, _add_exactly, 2)


def total_of(state: tuple[Any, ...]) -> Any:
    """The sum of one of these folds. What was lost beside one that is infinite or NaN says nothing."""
    total, *others = state
    for lost in others:
        lost[lost != lost] = 0
        total = total + lost
    return total
