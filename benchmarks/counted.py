"""What the kernels read, write and execute, counted: every load, store and instruction of the linked PTX, executed.

Nothing here is a time. PTX is executed by tools that are not part of this repository, and whose driver imports this
module. On a GPU Nsight Compute counts the same, into the same columns:

    python -m benchmarks.counted --ncu [--table NAME] [--only SUBSTRING]

Each module in benchmarks/tables is a table, whose rows say what must hold; benchmarks/results/counted has a file for
each. Rows that are counted again replace those of the same name.
"""
import argparse
import sys
from collections.abc import Sequence
from typing import Any

from densegrad import device

from . import records, tables
from .counting import Profiled, Skipped, broken, machine, profile

NEEDS = ("benchmarks.counted counts on a GPU, with Nsight Compute: python -m benchmarks.counted --ncu. (It also counts "
         "where PTX is executed, by a tool that is not part of this repository and is not running.)")
RESULTS = records.RESULTS / "counted"
KEY = ("name", "source")


def count_table(table: str, only: str, where: Any, keep: bool = True, missing: bool = False) -> tuple[int, int]:
    """Count the rows of a table whose names contain `only`, keeping each at once; how many hold, of how many.

    With missing, those that this source has counted before are left out.
    """
    path, held, counted = RESULTS / f"{table}.csv", 0, 0
    rows = list(tables.rows(table))
    if keep:  # what the table no longer has goes
        names = {row.name for row in rows}
        records.write(path, [row for row in records.read(path) if row["name"] in names])
    known = {row["name"] for row in records.read(path) if missing and row["source"] == where.source}
    for row in rows:
        if only not in row.name or row.name in known:
            continue
        try:
            values = row.measure(where)
        except Skipped as reason:
            print(f"{row.name}: skipped: {reason}")
            continue
        failures = broken(row, values)
        held, counted = held + (not failures), counted + 1
        texts = {column: records.text(value) for column, value in values.items()}
        if keep:
            new = {"name": row.name, "source": where.source} | texts | {"broken": " ".join(failures)}
            records.write(path, records.replaced(records.read(path), [new], KEY))
        shown = "  ".join(f"{column} {value}" for column, value in texts.items() if value)
        print(f"{row.name}: {shown}  {'BROKEN: ' + ' '.join(failures) if failures else 'holds'}", flush=True)
    return held, counted


def main(arguments: Sequence[str] | None = None) -> int:
    """Count the tables that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counted", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=tables.names(), action="append",
                        help="this table, instead of all; may be repeated")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="rows whose name contains this")
    parser.add_argument("--missing", action="store_true", help="rows that were not counted before")
    parser.add_argument("--ncu", action="store_true", help="count with Nsight Compute, on this machine's GPU")
    parser.add_argument("--under-ncu", action="store_true", help=argparse.SUPPRESS)  # the process that ncu watches
    options = parser.parse_args(arguments)
    where: Any = machine()
    on_gpu = options.ncu or options.under_ncu
    if where is None and (not on_gpu or device.gpu_missing()):
        print(f"{NEEDS}{f' Here there is no GPU: {device.gpu_missing()}.' if on_gpu else ''}")
        return 2
    all_held = True
    for table in options.table or tables.names():
        if options.under_ncu:
            count_table(table, options.only, Profiled("", None), keep=False)
            continue
        if options.ncu:
            watched = ["-m", "benchmarks.counted", "--under-ncu", "--table", table, "--only", options.only]
            try:
                where = profile(watched, device.current().name)
            except Skipped as reason:
                print(f"{table}: skipped: {reason}")
                return 2
        held, counted = count_table(table, options.only, where, missing=options.missing and not options.ncu)
        print(f"{table}: {held} of {counted} rows hold")
        all_held &= held == counted
    return 0 if all_held else 1


if __name__ == "__main__":
    sys.exit(main())
