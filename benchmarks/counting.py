"""What is counted: the loads, stores and instructions of executed kernels, and what their machine code is made of.

A table is a module in benchmarks/tables with a function `rows()`. A row is any object with

    name               what the table calls it, unique there
    limits             what must hold of its values, as `Limit`s
    measure(machine)   {column: value}; the columns of a table's rows need not be the same

and what the README shows of it, as `README`, a list of `Shown`s.

`machine.count(call)` runs a call and gives the `Counts` of each kernel that it launched, in order; `total` adds them.
`machine.code(counts, "9.0")` judges the linked machine code of such a kernel, as `Code`, for any compute capability;
where that cannot be read the row is skipped, so give machine code rows of its own.
"""
from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from densegrad import cache
from densegrad.calls import recorded
from densegrad.compiler import compile_launch
from densegrad.launches import Launch


@dataclass(frozen=True)
class Limit:
    """Bounds of one value."""

    column: str
    least: float = float("-inf")
    most: float = float("inf")

    def holds(self, value: float) -> bool:
        """Whether the value is within them."""
        return self.least <= value <= self.most


class Row(Protocol):
    """One line of a table."""

    @property
    def name(self) -> str:
        """What the table calls it."""

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""

    def measure(self, machine: Rehearsed) -> Mapping[str, Any]:
        """The values."""


@dataclass(frozen=True)
class Shown:
    """A part of a table that the README shows."""

    title: str
    columns: tuple[tuple[str, str, str], ...]  # (column, heading, how to format its numbers or "")
    rows: tuple[str, ...]  # their names
    note: str = ""


def broken(row: Row, values: Mapping[str, Any]) -> list[str]:
    """The columns whose limits do not hold; a value of None is not known."""
    return [limit.column for limit in row.limits
            if values[limit.column] is not None and not limit.holds(values[limit.column])]


class Skipped(Exception):
    """A row cannot be measured here; the message says what is missing."""


class Unseen(Counter):
    """What Nsight Compute does not tell: a row that asks for it is skipped."""

    def __getitem__(self, key: Any) -> Any:
        raise Skipped("Nsight Compute does not tell the widths of accesses or the classes of instructions")

    def __add__(self, other: Any) -> Any:
        return self


@dataclass(frozen=True)
class Counts:
    """What a launch did, or several. Sectors are 32 bytes of global memory; asynchronous copies are loads."""

    kernel: str
    block: int
    shared_bytes: int
    load_sectors: int
    store_sectors: int
    loads: Counter  # warps' requests to global memory by bytes a thread
    stores: Counter
    loaded: Counter  # sectors loaded, by bytes a thread
    stored: Counter
    warp_instructions: int
    thread_instructions: int
    by_class: Counter  # warps' instructions by ptxsim's classes: "ffma", "mma", "ld.global.128", "barrier"...
    shared_load_wavefronts: int
    shared_load_ideal: int
    shared_store_wavefronts: int
    shared_store_ideal: int
    launched: Any = field(default=None, repr=False, compare=False)  # a Launch, or Numba's library of another kernel
    dynamic_bytes: int = 0  # of shared memory, beside what the kernel declares
    copied_bytes: int | None = None  # by bulk copies into shared memory, what lies beyond an edge included; if told

    @property
    def active_lanes(self) -> float:
        """Of 32, on average over the instructions."""
        return self.thread_instructions / max(self.warp_instructions, 1)

    @property
    def wide_loads(self) -> float | None:
        """The share of 16-byte loads among the requests to global memory, if their widths were seen."""
        return None if isinstance(self.loads, Unseen) else self.loads[16] / max(self.loads.total(), 1)

    @property
    def wide_stores(self) -> float | None:
        """The share of 16-byte stores."""
        return None if isinstance(self.stores, Unseen) else self.stores[16] / max(self.stores.total(), 1)

    @property
    def shared_load_degree(self) -> float:
        """Wavefronts of loads from shared memory over the fewest possible; 1 is free of bank conflicts."""
        return self.shared_load_wavefronts / max(self.shared_load_ideal, 1)

    @property
    def shared_store_degree(self) -> float:
        """The same of stores."""
        return self.shared_store_wavefronts / max(self.shared_store_ideal, 1)


def total(counts: Iterable[Counts]) -> Counts:
    """All launches together; block, shared memory and machine code are those of the first."""
    first, *rest = counts
    added = {item.name: getattr(first, item.name) for item in fields(Counts)}
    for count in rest:
        added["kernel"] += "+" + count.kernel
        for item in fields(Counts):
            if item.name not in ("kernel", "block", "shared_bytes", "launched", "dynamic_bytes"):
                added[item.name] = added[item.name] + getattr(count, item.name)
    return Counts(**added)


@dataclass(frozen=True)
class Code:
    """The linked machine code of a kernel. Shares are of the issue slots of its main loop; what is modelled says so."""

    capability: str
    registers: int
    local_instructions: int  # loads and stores of local memory: spills, or arrays
    stack_bytes: int
    blocks_per_multiprocessor: int
    resident_threads: int  # of a multiprocessor
    loop_instructions: int
    ffma_share: float
    mma_share: float
    integer_share: float
    load_to_use: float | None  # instructions between a global load, or a group of copies, and what needs it
    percent_peak: float | None  # modelled, of the FP32 or tensor peak, at the full cost of shared loads
    percent_peak_merged: float | None  # the same where pairs of lanes read equal addresses, which costs half
    percent_dram: float | None  # modelled, of the DRAM's rate, for loops without multiply-adds
    report: Any = field(repr=False, compare=False)  # sasscheck's, with all there is


class Rehearsed:
    """The machine that executes linked PTX, with counters."""

    def __init__(self, machine: Any):
        self._machine = machine
        self.capability = ".".join(map(str, machine.cc))
        self.source = f"executed PTX, {self.capability}"

    def count(self, call: Callable[[], Any]) -> list[Counts]:
        """Run a call and count what each of its launches does. Kernels not densegrad's own go by their symbols."""
        before = len(self._machine.launches)
        with recorded() as launches:
            call()
        executed = self._machine.launches[before:]
        if not launches:
            return [self._counts(one.name, one, self._machine.functions[one.name].library) for one in executed]
        return [self._counts(launch.kernel, one, launch) for launch, one in zip(launches, executed, strict=True)]

    def _counts(self, kernel: str, executed: Any, launched: Any) -> Counts:
        counters = executed.counters
        requests: dict[str, Counter] = {"load": Counter(), "store": Counter(), "atomic": Counter()}
        sectors: dict[str, Counter] = {"load": Counter(), "store": Counter(), "atomic": Counter()}
        for line in counters.lines:
            if line.space == "global" and line.threads:
                requests[line.kind][line.width] += line.requests
                sectors[line.kind][line.width] += line.sectors
        return Counts(
            kernel, executed.block[0] * executed.block[1] * executed.block[2],
            shared_bytes=counters.shared_bytes_per_cta,
            load_sectors=counters.global_load_sectors, store_sectors=counters.global_store_sectors,
            loads=requests["load"], stores=requests["store"], loaded=sectors["load"],
            stored=sectors["store"],
            warp_instructions=counters.warp_instructions, thread_instructions=counters.thread_instructions,
            by_class=counters.warp_by_class,
            shared_load_wavefronts=counters.shared_load_wavefronts, shared_load_ideal=counters.shared_load_ideal,
            shared_store_wavefronts=counters.shared_store_wavefronts, shared_store_ideal=counters.shared_store_ideal,
            launched=launched, dynamic_bytes=executed.shared, copied_bytes=counters.bulk_load_bytes)

    def code(self, counts: Counts, capability: str) -> Code:
        """Judge the kernel as linked for this compute capability.

        Raises
        ------
        Skipped
            If what reads machine code is not here.
        """
        try:
            import sasscheck
        except ImportError:
            raise Skipped("machine code is read by the sasscheck tool, which is not importable (PYTHONPATH)") from None
        launched, target = counts.launched, (int(capability.split(".")[0]), int(capability.split(".")[1]))
        if isinstance(launched, Launch):
            linked = (cache.load(cache.name_of(launched, target)) or compile_launch(launched, target)).cubin
        else:
            linked = launched.get_cubin(cc=target).code
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(linked)
            try:
                (report,) = sasscheck.check(str(path), f"sm_{capability.replace('.', '')}", block=counts.block,
                                            dynamic_smem=counts.dynamic_bytes)
            except sasscheck.ToolError as error:
                raise Skipped(f"machine code could not be read: {error}") from error
        loop = report.main or {}
        distances = loop.get("load_to_use", {})
        asynchronous = distances.get("cp_async") is not None
        multiplies = loop.get("mma_share", 0.0) > 0 or loop.get("ffma_share", 0.0) > 0.02
        blocks = report.occupancy["blocks"]
        return Code(
            capability, report.registers, report.local_instructions, report.stack, blocks_per_multiprocessor=blocks,
            resident_threads=blocks * counts.block, loop_instructions=loop.get("instructions", 0),
            ffma_share=loop.get("ffma_share", 0.0), mma_share=loop.get("mma_share", 0.0),
            integer_share=loop.get("integer_share", 0.0),
            load_to_use=distances.get("cp_async" if asynchronous else "ldg"),
            percent_peak=loop["percent_peak"] if multiplies else None,
            percent_peak_merged=loop["percent_peak_merged"] if multiplies else None,
            percent_dram=None if multiplies or "stream" not in loop else loop["stream"]["percent_dram"], report=report)


#: what ncu is asked for; the widths of accesses and the classes of instructions are not among it
METRICS = {
    "load_sectors": ("l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
                     "l1tex__t_sectors_pipe_lsu_mem_global_op_ldgsts.sum"),
    "store_sectors": ("l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum",),
    "warp_instructions": ("smsp__inst_executed.sum",),
    "thread_instructions": ("smsp__thread_inst_executed.sum",),
    "shared_load_wavefronts": ("l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum",),
    "shared_store_wavefronts": ("l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum",),
    "shared_load_conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",),
    "shared_store_conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",),
}


class Profiled:
    """A GPU whose counts come from Nsight Compute's report on a process that ran the same rows before.

    In that process itself there is no report yet: the rows run, and what they make of ones is thrown away.
    """

    def __init__(self, gpu: str, report: Iterable[Mapping[str, int]] | None):
        self.source = f"Nsight Compute, {gpu}"
        self._report = None if report is None else iter(report)

    def count(self, call: Callable[[], Any]) -> list[Counts]:
        """Run a call; the counts of its launches are the next of the report."""
        with recorded() as launches:
            call()
        return [self._counts(launch) for launch in launches]

    def _counts(self, launch: Launch) -> Counts:
        try:
            seen = dict.fromkeys(METRICS, 1) if self._report is None else next(self._report)
        except StopIteration:
            raise Skipped("Nsight Compute's report has fewer launches than the rows made") from None
        ideal = {kind: seen[f"shared_{kind}_wavefronts"] - seen[f"shared_{kind}_conflicts"]
                 for kind in ("load", "store")}
        return Counts(launch.kernel, launch.block, 0, load_sectors=seen["load_sectors"],
                      store_sectors=seen["store_sectors"], loads=Unseen(), stores=Unseen(), loaded=Unseen(),
                      stored=Unseen(),
                      warp_instructions=seen["warp_instructions"], thread_instructions=seen["thread_instructions"],
                      by_class=Unseen(),
                      shared_load_wavefronts=seen["shared_load_wavefronts"], shared_load_ideal=ideal["load"],
                      shared_store_wavefronts=seen["shared_store_wavefronts"], shared_store_ideal=ideal["store"])

    def code(self, counts: Counts, capability: str) -> Code:
        """Not here."""
        raise Skipped("machine code is judged where PTX is executed, not by Nsight Compute")


def profile(command: Sequence[str], gpu: str) -> Profiled:
    """Run a Python command under ncu, and count from its report.

    Raises
    ------
    Skipped
        If ncu is not installed, or may not read the counters.
    """
    tool = shutil.which("ncu")
    if tool is None:
        raise Skipped("Nsight Compute's ncu is not on PATH")
    asked = ",".join(metric for metrics in METRICS.values() for metric in metrics)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.csv"
        done = subprocess.run([tool, "--csv", "--page", "raw", "--print-units", "base", "--kernel-name-base", "mangled",
                               "--log-file", report, "--metrics", asked, sys.executable, *command],
                              capture_output=True, text=True)
        text = report.read_text(encoding="utf-8") if report.exists() else ""
    errors = [line for line in text.splitlines() if line.startswith("==ERROR==")]
    if done.returncode or errors:
        raise Skipped(f"ncu failed: {' '.join(errors) or (done.stderr or done.stdout).strip()[-300:]}")
    return Profiled(gpu, launches_of(text))


def launches_of(report: str) -> list[dict[str, int]]:
    """The launches of our own kernels in ncu's CSV: a line of names, a line of units, and one for each launch."""
    lines = [line for line in report.splitlines() if line.startswith('"')]
    _, *launched = list(csv.DictReader(lines)) or [{}]

    def number(row: Mapping[str, str], metric: str) -> int:
        digits = row.get(metric, "").replace(",", "")
        return round(float(digits)) if digits.replace(".", "", 1).isdigit() else 0

    return [{name: sum(number(row, metric) for metric in metrics) for name, metrics in METRICS.items()}
            for row in launched if any(package in row["Kernel Name"] for package in ("densegrad", "benchmarks"))]


def machine() -> Rehearsed | None:
    """The machine that this process runs on, if it counts."""
    found = getattr(sys.modules.get("rehearsal"), "machine", None)
    return Rehearsed(found()) if found else None
