"""What the kernel of squared norms is made of and what it takes."""
from __future__ import annotations

from typing import NamedTuple

from densegrad.signatures import Address, ColumnAt, Integer, MatrixAt, Scale


class SquareNorms(NamedTuple):
    """The squared norms of rows."""

    dtype: str  # of the source
    accumulator: str  # type of the sums
    result: str  # dtype of the result
    adders: int  # threads of a row
    rows_of_block: int
    accumulate: bool  # whether the result is added to


class SquareNormsArguments(NamedTuple):
    """target[r] = alpha * sum over c of source[r, c]²."""

    source: MatrixAt
    rows: Integer
    cols: Integer
    cols_per_part: Integer
    partial: Address  # (parts, rows): the sum of each part
    arrivals: Address  # one for each block along the rows, zeros: how many parts are there
    target: ColumnAt
    alpha: Scale
