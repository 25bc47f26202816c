"""Rows of results as CSV files in benchmarks/results, and what they say of where they were made."""
import contextlib
import csv
import io
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from densegrad.commands.files import written

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
    with written(path, force=True) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(lines, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        lines.detach()


def replaced(old: Iterable[Row], new: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The old rows, those of the new that have equal keys in their places, and the other new ones after them."""
    rows: dict[tuple[str, ...], Row] = {}
    for row in (*old, *new):
        rows[tuple(text(row.get(column)) for column in key)] = row
    return list(rows.values())


def text(value: Any) -> str:
    """A value as the files have it: floats with four decimals."""
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def today() -> str:
    """The date."""
    return time.strftime("%Y-%m-%d")


def installed(package: str) -> str:
    """The version of an installed package, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of this checkout, with a plus sign if files differ from it."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor() -> str:
    """The CPU's name, as the system tells it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
