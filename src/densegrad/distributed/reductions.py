"""Sums over ranks: of finished gradients in one flat bucket, and folds that go from rank to rank in their order."""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from .. import containers, device
from ..errors import DistributedError, DTypeError, OutError, ShapeError
from ..facts import ITEM_BYTES, accumulator_of
from ..slips import answered, meant
from .agreement import DEADLINE, Descriptor, Group, Numbers, Ranks, group_of
from .engines import Broken, Late

#: bytes of a sum that are passed on to the next rank at once: see docs/distributed.md
PIECE_BYTES = 1 << 20


class Fold(NamedTuple):
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
    total += addend
    return state


#: a plain sum
SUM = Fold(_begin, _add)


def fold_along_ranks(comm: Any, addends: Sequence[Sequence[Any]], like: Sequence[Any], *, fold: Fold = SUM,
                     of: str = "", samples: int = 0, accept: Callable[[Numbers], None] | None = None,
                     check: bool | None = None, deadline: float = DEADLINE) -> list[list[Any]]:
    """Add up what all ranks have, in the order of the ranks and on each in its own order: one left fold.

        state = begin(a[0]); state = add(state, a[1]); ...    a: rank 0's addends, then rank 1's, ...

    The bits are those of one process that adds the same addends in the same order, however they are spread over ranks.

    Parameters
    ----------
    comm : communicator or Ranks
        As in `all_reduce`.
    addends : sequence of sequences of arrays
        Of this rank, in their order; each is a sequence of arrays with the shapes and the dtype of `like`. A rank may
        have none: it passes nothing on and hears the result. They are read while the call runs, and not changed.
    like : sequence of arrays
        With the shapes and the dtype of one addend, all float32 or all float64, NumPy's or CuPy's; only these are
        looked at. The same on every rank.
    fold : Fold
        What is done with each addend: `SUM`, or a sum of more than one array.
    of : str
        In words, what all ranks must have alike beside shapes and dtype: the number of samples of a block, for example.
    samples : int
        This rank's, for `accept`.
    accept : function of Numbers, optional
        Called on every rank with the samples and the numbers of addends of all, before anything is added. It must raise
        on all ranks or on none.
    check, deadline
        As in `all_reduce`.

    Returns
    -------
    list of `fold.planes` lists of arrays
        New arrays like `like`, with the same bits on every rank; zeros if no rank has an addend.

    Raises
    ------
    DistributedError
        As in `all_reduce`.
    ShapeError, DTypeError
        If an addend differs from `like`, or that has several dtypes or another one. The other ranks raise
        DistributedError.

    Notes
    -----
    Numbers travel in pieces of 1 MiB: while one rank adds to a piece, the rank before it adds to the next. The last
    rank broadcasts the sum. Every addend is added once; nothing is gathered.
    """
    raise NotImplementedError
