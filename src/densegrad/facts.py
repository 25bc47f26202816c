"""Names and sizes of element types, the types that sums and results are computed in, and the form of copied boxes."""
from __future__ import annotations

from typing import Any

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
#: of all that kernels read, labels and masks too
SIZES = {**ITEM_BYTES, "bool": 1, "int32": 4, "int64": 8}
#: of boxes that are copied by a tensor map: bytes of a line, lines of a box in shared memory; 64-bit integers of a map
LINE_BYTES, BOX_LINES, MAP_WORDS = 128, 64, 16
#: how deep tiles of mma.sync are: two steps of one instruction
TILE_DEPTH_BYTES = 64


def accumulator_of(dtype: str) -> str:
    """The type that sums of this dtype are kept in.

    Raises
    ------
    ValueError
        If it is none of ITEM_BYTES.
    """
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(ITEM_BYTES)}; got {dtype!r}")
    return "float64" if dtype == "float64" else "float32"


def wide_of(accumulator: str, result: str) -> str:
    """The type in which a sum is scaled and added to what is there, before its one rounding to the result's."""
    return "float64" if result == "float64" else accumulator


def number_of(constants: Any) -> str:
    """The type of the numbers that a kernel takes, by its constants: the wider of its sums' and its results'."""
    parts = [getattr(constants, name, None) for name in ("accumulator", "result", "sums")]
    return "float64" if "float64" in [getattr(part, "wide", part) for part in parts] else "float32"
