"""Loss, dL/dZ and dL/db of cross-entropy: what is read of the logits and written, and the kernel's machine code.

Each row of logits is read as every other one is, so that a few of them are executed, with the plan of the whole shape
but for its parts: two, where its own are several, so that these are added.
"""
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import densegrad as dg
from benchmarks.counting import Counts, Limit, Rehearsed, Shown, Skipped, total
from densegrad.device import dtype_of
from densegrad.facts import accumulator_of
from densegrad.families.cross_entropy import launches
from densegrad.families.upstream import Upstream
from densegrad.launches import Matrix, Result, Slot
from densegrad.plans import ITEM_BYTES, CrossEntropyPlan, UpstreamPlan, plan_cross_entropy

README = [Shown(
    "Cross-entropy, the mean of the losses with dL/dZ and dL/db: sectors over those of the logits",
    (("shape", "logits (S, M)", ""), ("dtype", "dtype", ""), ("readings", "readings", ""),
     ("logits_read", "logits read", ".3f"), ("dz_written", "dZ written", ".3f"), ("active_lanes", "lanes of 32", ".1f"),
     ("launches", "launches", "")),
    ("(65536, 1000) bfloat16", "(2048, 32000) bfloat16", "(2048, 16000) float32", "(2048, 50256) bfloat16",
     "(2048, 50257) bfloat16"),
    "Of few rows, by the instructions that load logits and store dZ; labels and parts of db come beside them. Rows of "
    "50,257 begin where accesses of two bytes alone are aligned.",
), Shown(
    "Cross-entropy in bfloat16: the linked machine code for rows of 32,000 logits, 9.0",
    (("kernels", "kernel", ""), ("instructions", "instructions an element", ".1f"), ("registers", "registers", ""),
     ("local_instructions", "accesses of local memory", ""), ("resident_threads", "threads a multiprocessor", "")),
    ("code (2048, 32000) bfloat16",),
    "An H200 at 1.9 GHz issues 35 of them while DRAM moves an element of two matrices of bfloat16 (*modelled*).",
)]
#: instructions an element that may take 1.3 times as long to issue as DRAM takes to move it, in and out, modelled so
MOST = 45


def few_rows(plan: CrossEntropyPlan | UpstreamPlan) -> CrossEntropyPlan | UpstreamPlan:
    """The plan for two parts, if it has several, else one: of a step each, and of two where logits are read once."""
    if isinstance(plan, UpstreamPlan):
        lanes = plan.sum.lanes
        samples = lanes * (2 if plan.sum.second else 1)
        return replace(plan, sum=replace(plan.sum, samples=samples, samples_per_part=lanes))
    return replace(plan, samples=2 * plan.lanes * min(plan.parts, 2), samples_per_part=2 * plan.lanes)


def launched(plan: CrossEntropyPlan | UpstreamPlan, samples: int, outputs: int, dtype: str) -> int:
    """How many launches the loss and the gradients of the whole shape are."""
    accumulator = accumulator_of(dtype)
    z, dz = (Matrix(Slot(name), dtype, samples, outputs, outputs, 1) for name in ("z", "dz"))
    labels, loss = Matrix(Slot("labels"), "int64", samples, 1, 1, 1), Matrix(Slot("loss"), accumulator, 1, 1, 1, 1)
    upstream = Upstream(None, z, labels=labels, reduction="mean", loss=loss)
    return len(launches(plan, upstream, dz, Result(Matrix(Slot("db"), dtype, 1, outputs, outputs, 1))))


def counted(machine: Rehearsed, plan: CrossEntropyPlan | UpstreamPlan, samples: int, outputs: int,
            dtype: str) -> list[Counts]:
    """Execute it, and check that the loss is the mean and that db is the sum of dz."""
    import cupy

    draw = np.random.default_rng(0)
    logits = draw.integers(-2, 3, (samples, outputs)).astype(dtype_of(dtype))
    chosen = draw.integers(0, outputs, samples)
    z, labels = cupy.asarray(logits), cupy.asarray(chosen)
    results = []
    counts = machine.count(lambda: results.append(dg.cross_entropy(z, labels, plan=plan)))
    loss, dz, db = (np.asarray(result.get(), float) for result in results[0])
    wide = logits.astype(float)
    exact = np.mean(np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(samples), chosen])
    if abs(loss - exact) > 1e-4 * abs(exact):
        raise SystemExit(f"({samples}, {outputs}) {dtype}: the loss is {loss}, not {exact}")
    if np.abs(dz.sum(axis=0) - db).max() > 2.0 ** -8 * np.abs(dz).sum(axis=0).max():
        raise SystemExit(f"({samples}, {outputs}) {dtype}: db is not the sum of dz")
    return counts


@dataclass(frozen=True)
class Counted:
    """The loss of a mean, and the gradients, of one shape."""

    samples: int
    outputs: int
    dtype: str
    readings: int
    most: float  # sectors of the logits that may be read, over those that they have
    most_written: float = 1.04  # the same of dZ

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"({self.samples}, {self.outputs}) {self.dtype}"

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return (Limit("readings", self.readings, self.readings), Limit("logits_read", most=self.most),
                Limit("dz_written", most=self.most_written), Limit("launches", most=3),
                Limit("shared_load_degree", most=1.05),
                Limit("shared_store_degree", most=1.05))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Logits are loaded and dz is stored by 2 or 16 bytes a thread, labels and parts of sums by 4 or 8."""
        whole = plan_cross_entropy(self.samples, self.outputs, self.dtype, "flat")
        plan = few_rows(whole)
        once = isinstance(plan, CrossEntropyPlan)
        samples = plan.sum.samples if isinstance(plan, UpstreamPlan) else plan.samples
        item = ITEM_BYTES[self.dtype]
        matrix, width = samples * self.outputs * item / 32, min(16, (self.outputs & -self.outputs) * item)
        counts = counted(machine, plan, samples, self.outputs, self.dtype)
        added = total(counts)
        rows = [one for one in counts if one.kernel != "sum_parts"]
        read: float | None = None
        dz_written: float | None = None
        with suppress(Skipped):  # if who counts here does not tell accesses apart
            read = sum(one.loaded[2] + one.loaded[16] for one in rows) / matrix
            dz_written = sum(one.stored[width] for one in rows) / matrix
        return {
            "shape": f"{self.samples}x{self.outputs}", "dtype": self.dtype, "cut": f"{samples}x{self.outputs}",
            "kernels": added.kernel, "readings": 1 if once else 2,
            "launches": launched(whole, self.samples, self.outputs, self.dtype),
            "logits_read": read, "dz_written": dz_written, "read": added.load_sectors / matrix,
            "written": added.store_sectors / matrix,
            "active_lanes": added.active_lanes, "shared_load_degree": added.shared_load_degree,
            "shared_store_degree": added.shared_store_degree,
        }


@dataclass(frozen=True)
class MachineCode:
    """The kernel of rows, with the loss, as linked for 9.0."""

    samples: int
    outputs: int
    dtype: str

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"code ({self.samples}, {self.outputs}) {self.dtype}"

    @property
    def limits(self) -> Iterable[Limit]:
        """What must hold."""
        return (Limit("instructions", most=MOST), Limit("local_instructions", most=0), Limit("stack_bytes", most=0),
                Limit("registers", most=65536 // 512), Limit("resident_threads", least=512))

    def measure(self, machine: Rehearsed) -> dict[str, Any]:
        """Launch it on a few rows, for the linker to see it, and judge what was linked."""
        plan = few_rows(plan_cross_entropy(self.samples, self.outputs, self.dtype, "flat"))
        if not isinstance(plan, CrossEntropyPlan):
            raise SystemExit(f"{self.name}: logits are read twice")
        counts = next(one for one in counted(machine, plan, plan.samples, self.outputs, self.dtype)
                      if one.kernel == "cross_entropy_rows")
        code = machine.code(counts, "9.0")
        return {
            "shape": f"{self.samples}x{self.outputs}", "dtype": self.dtype, "capability": "9.0",
            "kernels": counts.kernel, "threads": plan.threads,
            "instructions": code.loop_instructions / (plan.pieces * plan.vector), "registers": code.registers,
            "local_instructions": code.local_instructions, "stack_bytes": code.stack_bytes,
            "resident_threads": code.resident_threads,
        }


def rows() -> list[Counted | MachineCode]:
    """The table of what must hold: logits that fit into a block's registers are read once, wider ones twice."""
    return [
        Counted(65536, 1000, "bfloat16", 1, 1.04), Counted(2048, 32000, "bfloat16", 1, 1.04),
        Counted(2048, 16000, "float32", 1, 1.04), Counted(2048, 50256, "bfloat16", 2, 2.04),
        Counted(2048, 50257, "bfloat16", 2, 2.5, 1.5), MachineCode(2048, 32000, "bfloat16"),
    ]
