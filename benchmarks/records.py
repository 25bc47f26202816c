"""Rows of results as CSV files in benchmarks/results."""
import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
RESULTS = Path(__file__).parent / "results"


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows, each with the columns it has; the file is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(column for row in rows for column in row)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


def replaced(old: Iterable[Row], new: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The old rows, those of the new that have equal keys in their places, and the other new ones after them."""
    rows: dict[tuple[str, ...], Row] = {}
    for row in (*old, *new):
        rows[tuple(text(row.get(column)) for column in key)] = row
    return list(rows.values())


def text(value: Any) -> str:
    """A value as the files have it: floats with four decimals."""
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
