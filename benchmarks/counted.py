"""What the kernels read, write and execute, counted: every load, store and instruction of the linked PTX, executed.

Nothing here is a time. On a GPU the same counts are Nsight Compute's (see NCU below). Where neither is at hand the
script says what it needs.

    export PYTHONPATH=../shared/ptxsim:../shared/rehearsal:../shared/sasscheck
    python -m rehearsal -m benchmarks.counted [--table NAME] [--only SUBSTRING]

Each module in benchmarks/tables is a table, whose rows say what must hold; benchmarks/results/counted has a file for
each. Rows that are counted again replace those of the same name.
"""
import argparse
import sys

from . import records, tables
from .counting import Rehearsed, Skipped, broken, machine

NCU = ("ncu --metrics l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum,l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum,"
       "smsp__thread_inst_executed_per_inst_executed.ratio,l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum "
       "python -c \"import cupy, densegrad; densegrad.bias_grad(cupy.ones((8192, 3072), 'float32'))\"")
RESULTS = records.RESULTS / "counted"
KEY = ("name", "source")


def count_table(table: str, only: str, where: Rehearsed) -> tuple[int, int]:
    """Count the rows of a table whose names contain `only`, and write them; how many hold, of how many."""
    new: list[dict[str, str]] = []
    held = 0
    for row in tables.rows(table):
        if only not in row.name:
            continue
        try:
            values = row.measure(where)
        except Skipped as reason:
            print(f"{row.name}: skipped: {reason}")
            continue
        failures = broken(row, values)
        held += not failures
        texts = {column: records.text(value) for column, value in values.items()}
        new.append({"name": row.name, "source": where.source} | texts | {"broken": " ".join(failures)})
        shown = "  ".join(f"{column} {value}" for column, value in texts.items() if value)
        print(f"{row.name}: {shown}  {'BROKEN: ' + ' '.join(failures) if failures else 'holds'}", flush=True)
    path = RESULTS / f"{table}.csv"
    # A whole table leaves nothing of the last one; what another source counted stays.
    old = [row for row in records.read(path) if only or row["source"] != where.source]
    records.write(path, records.replaced(old, new, KEY))
    return held, len(new)


def main() -> int:
    """Count the tables that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counted", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=tables.names(), action="append",
                        help="this table, instead of all; may be repeated")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="rows whose name contains this")
    options = parser.parse_args()
    where = machine()
    if where is None:
        print("benchmarks.counted executes PTX with the rehearsal tool, which is not running (python -m rehearsal -m "
              f"benchmarks.counted);\non a GPU, Nsight Compute counts the same:\n  {NCU}")
        return 2
    all_held = True
    for table in options.table or tables.names():
        held, counted = count_table(table, options.only, where)
        print(f"{table}: {held} of {counted} rows hold")
        all_held &= held == counted
    return 0 if all_held else 1


if __name__ == "__main__":
    sys.exit(main())
