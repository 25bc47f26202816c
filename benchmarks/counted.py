"""What the batch sum reads, writes and executes, counted: every load, store and instruction of the linked PTX, executed.

Nothing here is a time. On a GPU the same counts are Nsight Compute's (see NCU below). Where neither is at hand the script says
what it needs.

    PYTHONPATH=../shared/ptxsim:../shared/rehearsal python -m rehearsal benchmarks/counted.py [--only SUBSTRING]

Large shapes are cut to what can be executed in minutes, with the plan of the whole shape: fewer tiles of columns, or fewer
parts of the batch, which are equal pieces of work. `cut` says to what. Cut shapes have relatively more seams and edges and
a relatively longer second launch than the whole ones.
"""
import argparse
import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import densegrad as dg
from densegrad.device import dtype_of
from densegrad.launch import recorded
from densegrad.plans import ITEM_BYTES, BatchSumPlan, plan_batch_sum

NCU = ("ncu --metrics l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum,l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum,"
       "smsp__thread_inst_executed_per_inst_executed.ratio,l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum "
       "python -c \"import cupy, densegrad; densegrad.bias_grad(cupy.ones((8192, 3072), 'float32'))\"")
RESULTS = Path(__file__).parent / "results" / "counted.csv"
ELEMENTS = 3_000_000  # that a row executes, about


@dataclass(frozen=True)
class Row:
    """One line of the table: a shape, where its memory begins, and what must hold."""

    samples: int
    outputs: int
    dtype: str = "float32"
    layout: str = "flat"
    offset: int = 0  # elements before the first
    pad: int = 0  # elements between rows
    most_read: float = 1.05
    most_written: float | None = None
    least_lanes: float | None = None
    least_blocks: int | None = None
    only_vectors: bool = False

    @property
    def name(self) -> str:
        """As the table shows it."""
        where = f" offset {self.offset}" if self.offset else f" stride +{self.pad}" if self.pad else ""
        return f"({self.samples}, {self.outputs}) {self.dtype} {self.layout}{where}"


def rows() -> list[Row]:
    """The table of what must hold."""
    table = []
    for samples, outputs in ((8192, 3072), (65536, 1024)):
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            table += [Row(samples, outputs, dtype, layout, most_read=1.01, most_written=0.01, only_vectors=True)
                      for layout in ("rows", "features_first")]
            table += [Row(samples, outputs, dtype, "rows", offset, pad, most_read=1.30) for offset, pad in ((1, 0), (0, 1))]
    for outputs in (1, 2, 3, 5, 10, 17, 33, 100):
        table += [Row(1_000_003, outputs, "float32", layout, least_lanes=28, least_blocks=264)
                  for layout in ("flat", "features_first")]
    table += [Row(samples, outputs, "float32", "rows") for samples, outputs in ((1, 1_000_003), (7, 4096), (33, 50257))]
    return table


def cut(row: Row, plan: BatchSumPlan) -> BatchSumPlan:
    """The plan for as much of the shape as is executed."""
    if row.samples * row.outputs <= ELEMENTS:
        return plan
    if row.offset or row.pad or plan.layout == "flat" or (plan.layout == "features_first" and plan.parts > 1):
        # Rows that are shifted have edges: they stay whole.
        parts = max(1, ELEMENTS // (plan.samples_per_part * row.outputs))
        outputs = min(row.outputs, max(1, ELEMENTS // plan.samples_per_part))
        return replace(plan, samples=min(row.samples, parts * plan.samples_per_part + 3),
                       outputs=outputs if plan.layout == "features_first" else row.outputs)
    unit = plan.tile if plan.layout == "rows" else plan.runs_per_block
    return replace(plan, outputs=min(row.outputs, max(1, ELEMENTS // row.samples // unit) * unit))


def measure(row: Row, launches: list) -> dict:
    """Execute one line of the table; launches is where the machine notes them."""
    import cupy

    plan = plan_batch_sum(row.samples, row.outputs, row.dtype, row.layout)
    part = cut(row, plan)
    length, count = (part.samples, part.outputs) if row.layout == "features_first" else (part.outputs, part.samples)
    pitch = length + row.pad
    if row.layout == "features_first" and part.samples < row.samples:
        pitch += (row.samples - length) % 8  # neighbours begin as far from 32 bytes as in the whole shape
    memory = cupy.asarray(np.ones(row.offset + count * pitch, dtype_of(row.dtype)))
    dz = memory[row.offset:row.offset + count * pitch].reshape(count, pitch)[:, :length]
    before = len(launches)
    with recorded() as kernels:
        result = dg.bias_grad(dz, batch_axis=int(row.layout == "features_first"), plan=part)
    with np.errstate(over="ignore"):
        expected = np.float32(part.samples).astype(dtype_of(row.dtype))
    if not (result.get() == expected).all():
        raise SystemExit(f"{row.name}: the sums are wrong")
    counters = [launch.counters for launch in launches[before:]]

    def total(name: str) -> int:
        return sum(getattr(counter, name) for counter in counters)

    loads = [line for counter in counters for line in counter.lines
             if line.space == "global" and line.kind == "load" and line.threads]
    bytes_read = part.samples * part.outputs * ITEM_BYTES[row.dtype]
    return {
        "shape": f"{row.samples}x{row.outputs}", "dtype": row.dtype, "layout": plan.layout, "offset": row.offset,
        "pad": row.pad, "cut": "" if part == plan else f"{part.samples}x{part.outputs}",
        "kernels": "+".join(launch.kernel for launch in kernels), "blocks": plan.grid[0] * plan.grid[1],
        "threads": plan.threads, "workspace_share": plan.workspace_bytes / (row.samples * row.outputs * ITEM_BYTES[row.dtype]),
        "wide_loads": sum(line.requests for line in loads if line.width == 16) / max(1, sum(line.requests for line in loads)),
        "read": total("global_load_sectors") / (bytes_read / 32),
        "written": total("global_store_sectors") / total("global_load_sectors"),
        "active_lanes": total("thread_instructions") / total("warp_instructions"),
        "shared_load_degree": total("shared_load_wavefronts") / max(1, total("shared_load_ideal")),
        "shared_store_degree": total("shared_store_wavefronts") / max(1, total("shared_store_ideal")),
    }


def broken(row: Row, found: dict) -> list[str]:
    """What does not hold."""
    limits = [("read", row.most_read, True), ("written", row.most_written, True), ("active_lanes", row.least_lanes, False),
              ("blocks", row.least_blocks, False), ("shared_load_degree", 1.05, True), ("shared_store_degree", 1.05, True),
              ("wide_loads", 1.0 if row.only_vectors else None, False)]
    return [name for name, limit, upper in limits
            if limit is not None and (found[name] > limit if upper else found[name] < limit)]


def main() -> int:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description="Counts of the batch sum's memory accesses and instructions.")
    parser.add_argument("--only", default="", help="rows whose name contains this; nothing is written")
    options = parser.parse_args()
    machine = getattr(sys.modules.get("rehearsal"), "machine", None)
    if machine is None:
        print(f"counted.py executes PTX with the rehearsal tool, which is not running (python -m rehearsal {sys.argv[0]});\n"
              f"on a GPU, Nsight Compute counts the same:\n  {NCU}")
        return 2
    table, wrong = [], 0
    for row in rows():
        if options.only not in row.name:
            continue
        found = measure(row, machine().launches)
        failures = broken(row, found)
        wrong += bool(failures)
        table.append({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in found.items()}
                     | {"broken": " ".join(failures)})
        print(f"{row.name:42} {found['cut']:>14} blocks {found['blocks']:4} x {found['threads']:3}  read {found['read']:.4f}  "
              f"written {found['written']:.4f}  lanes {found['active_lanes']:5.2f}  wide {found['wide_loads']:.3f}  shared "
              f"{found['shared_load_degree']:.3f} {found['shared_store_degree']:.3f}  {' '.join(failures) or 'holds'}", flush=True)
    if not options.only:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0].keys())
            writer.writeheader()
            writer.writerows(table)
    print(f"{len(table) - wrong} of {len(table)} rows hold")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
