"""Times densegrad and its peers on this machine's GPU, and writes a row for each.

For each case every implementation is first held to float64, within the bound that follows from its additions: one that
is wrong is reported and not timed, as is one that fails. The others are warmed up and take turns. Times are of the GPU,
by CUDA events, with cold L2; the median and the 20th and 80th percentile of the samples are kept. `roof` is the share
of what this GPU does when it only copies or only multiplies (cuBLAS at the same precision), measured in the same run.

Peers take part where they are installed; for CUDA 13: pip install "cupy-cuda13x[ctk]" torch "nvmath-python[cu13]"
"cuda-cccl[cu13]". [ctk] brings cuBLAS, which CuPy's products and the roof of products need.

Rows go to benchmarks/results/GPU.csv, where those of an equal case and implementation are replaced; `python -m
benchmarks.report` puts them into README.md and benchmarks/README.md. Ctrl-C keeps the rows so far.
"""
from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from densegrad import device
from densegrad.calls import recorded
from densegrad.commands import timing
from densegrad.device import dtype_of
from densegrad.errors import DeviceError
from densegrad.plans import ITEM_BYTES
from densegrad.testing import ROUNDOFF, host

from . import records
from .operations import OPERATIONS, RESULTS, SHAPES, Case, Truth, cases, shapes
from .peers import IMPLEMENTATIONS, OURS, Call, Implementation, NotApplicable

NO_GPU = ("benchmarks.run times kernels on a GPU, and there is none here: {reason}. What runs without one: python -m "
          "benchmarks.host (Python's time) and python -m benchmarks.simulator (the simulator's time).")
TF32 = "{name}={value} lets cuBLAS round float32 to TF32, which is no fair peer of float32 arithmetic (unset it)"
KEY = ("operation", "implementation", "dtype", "S", "D", "M", "orientation")
#: rows of this operation are roofs
ROOF = "roof"
#: of a product of two factors that are rounded to TF32's 11 significant bits, over its magnitude
TF32_ERROR = 2.0 ** -10 + 2.0 ** -22


@dataclass(frozen=True)
class Roofs:
    """What this GPU can do: bytes a second, and flops a second by dtype, as far as they could be measured."""

    bytes: float
    flops: Mapping[str, float]

    def seconds(self, case: Case, precision: str) -> float | None:
        """The least time that a case takes by them, if its products are rounded to this precision or not ("")."""
        moving, kind = case.bytes / self.bytes, precision or case.dtype
        if not case.product_flops:
            return moving
        return max(moving, case.product_flops / self.flops[kind]) if kind in self.flops else None


class Bench:
    """One run: its clock, its machine, and the rows it has made."""

    def __init__(self, clock: timing.Clock, quick: bool, console: Console):
        import cupy

        self.cupy, self.clock, self.console = cupy, clock, console
        self.effort = timing.QUICK if quick else timing.Effort()
        self.rows: list[dict[str, Any]] = []
        self.machine = machine() | {"effort": "quick" if quick else "full"}
        self.roofs = Roofs(1.0, {})

    # Roofs.

    def measure_roofs(self, dtypes: Iterable[str], size: int) -> None:
        """Copy a large array, and multiply square matrices of this size in each dtype."""
        free, _ = self.cupy.cuda.runtime.memGetInfo()
        nbytes = min(max(4 * self.clock.l2_bytes, 16 * size * size), free // 4)
        pair = [self.cupy.empty(nbytes, "uint8") for _ in range(2)]
        timed = self._alone(lambda: self.cupy.copyto(*pair))
        self._add({"operation": ROOF, "implementation": "device copy", "S": nbytes},
                  timed, bytes=2 * nbytes, flops=0, fraction=1.0)
        rates: dict[str, float] = {}
        for kind in dict.fromkeys(kind for dtype in dtypes for kind in (dtype, *["tf32"] * (dtype == "float32"))):
            dtype = "float32" if kind == "tf32" else kind
            values = np.random.default_rng(0).standard_normal((size, size), np.float32).astype(dtype_of(dtype))
            factors = [self.cupy.asarray(values) for _ in range(2)]
            product = self.cupy.empty((size, size), factors[0].dtype)
            row = {"operation": ROOF, "implementation": "cuBLAS tf32" if kind == "tf32" else "cuBLAS", "dtype": dtype,
                   "S": size, "D": size, "M": size}
            try:
                with self._tf32() if kind == "tf32" else nullcontext():
                    timed = self._alone(lambda f=factors, p=product: self.cupy.matmul(*f, out=p))  # type: ignore[misc]
            except Exception as error:  # the roof is missing, and says why; what needs none is measured all the same
                self._failed(row, error)
                continue
            rates[kind] = 2 * size ** 3 / timed.quantile(0.5)
            self._add(row, timed, bytes=3 * size * size * ITEM_BYTES[dtype], flops=2 * size ** 3, fraction=1.0)
        self.roofs = Roofs(2 * nbytes / self._seconds("device copy"), rates)

    @contextmanager
    def _tf32(self) -> Iterator[None]:
        """CuPy's products of float32 in TF32."""
        linalg = self.cupy._core._routines_linalg
        linalg.set_compute_type(np.float32, linalg.COMPUTE_TYPE_TF32)
        try:
            yield
        finally:
            linalg.set_compute_type(np.float32, linalg.COMPUTE_TYPE_DEFAULT)

    def _seconds(self, implementation: str) -> float:
        return next(row["median_us"] for row in self.rows if row["implementation"] == implementation) / 1e6

    def _alone(self, call: Call | Any) -> timing.Timed:
        seconds = timing.warm_up(self.clock, call, self.effort)
        timed = timing.Timed(timing.calls_of_a_sample(seconds, self.effort))
        for _ in range(self.effort.samples):
            timing.sample(self.clock, timed, [call])
        return timed

    # Cases.

    def measure(self, case: Case, implementations: Sequence[Implementation]) -> None:
        """Add a row for every implementation that offers this case."""
        try:
            self._measure(case, implementations)
        except Exception as error:  # too little memory, for example; the cases after it still count
            self._failed(_named(case, OURS), error)
        self.cupy.get_default_memory_pool().free_all_blocks()

    def _measure(self, case: Case, implementations: Sequence[Implementation]) -> None:
        data = case.data()
        truth = Truth(case, data)
        arrays = {name: self.cupy.asarray(values) for name, values in data.items()}
        nothing = self._nothing(case)
        arrays |= {name: self.cupy.array(array) for name, array in nothing.items()}
        plans: dict[str, str] = {}
        share: dict[str, float] = {}
        right: list[Implementation] = []
        for one in implementations:
            for name, array in nothing.items():
                self.cupy.copyto(arrays[name], array)
            try:
                call = one.prepare(case, arrays)
                share[one.name], plans[one.name] = gate(call, truth, one)
            except NotApplicable:
                continue
            except Exception as error:  # a peer that fails is a row too
                self._failed(_named(case, one.name), error)
                continue
            if share[one.name] <= 1:
                right.append(one)
            else:
                row = {"plan": plans[one.name], "worst_error_over_bound": share[one.name]}
                self._failed(_named(case, one.name) | row,
                             f"wrong: an error of {share[one.name]:.3g} times its bound; not timed")
        if right:
            precisions = {one.name: one.precision for one in right}
            for name, timed, cold, clocks in self._race(case, right, arrays):
                least = self.roofs.seconds(case, precisions[name])
                self._add(_named(case, name) | {
                    "plan": plans[name], "cold_l2": "yes" if cold else "no", "worst_error_over_bound": share[name],
                    "sm_mhz": clocks.multiprocessor, "memory_mhz": clocks.memory,
                }, timed, case.bytes, case.flops, least and least / timed.quantile(0.5))

    def _nothing(self, case: Case) -> dict[str, Any]:
        """Results full of NaN, which an implementation has to replace, or of 1, which it has to add to."""
        blank = {name: np.full(result.array.shape(*case.sizes), 1 if result.added else np.nan,
                               result.array.dtype(case.dtype))
                 for name, result in ((name, RESULTS[name]) for name in case.does.results)}
        return {name: self.cupy.asarray(array) for name, array in blank.items()}

    def _race(self, case: Case, racers: Sequence[Implementation],
              arrays: dict[str, Any]) -> Iterable[tuple[str, timing.Timed, bool, timing.Clocks]]:
        timed, calls = {}, {}
        for one in racers:
            calls[one.name] = [one.prepare(case, arrays)]
            seconds = timing.warm_up(self.clock, calls[one.name][0], self.effort)
            timed[one.name] = timing.Timed(timing.calls_of_a_sample(seconds, self.effort))
        sets = self._sets(case, max(each.calls for each in timed.values()))
        for _ in range(sets - 1):
            copies = {name: self.cupy.array(array) for name, array in arrays.items()}
            for one in racers:
                calls[one.name].append(one.prepare(case, copies))
        for one in racers:  # what is made on first use, per set of buffers, is made now
            for call in calls[one.name]:
                call()
        with timing.watched(self.clock.device) as clocks:
            for name in timing.interleaved([one.name for one in racers], self.effort.samples):
                timing.sample(self.clock, timed[name], calls[name])
        for name, each in timed.items():
            yield name, each, each.calls <= sets or sets * case.bytes >= 2 * self.clock.l2_bytes, clocks

    def _sets(self, case: Case, calls: int) -> int:
        """How many sets of buffers calls rotate over: enough to fill the cache thrice, where memory allows."""
        free, _ = self.cupy.cuda.runtime.memGetInfo()
        return max(1, min(timing.sets_of_buffers(self.clock, calls, case.bytes), free // 4 // case.bytes))

    # Rows.

    def _add(self, row: dict[str, Any], timed: timing.Timed, bytes: int, flops: int, fraction: float | None) -> None:
        median = timed.quantile(0.5)
        self.rows.append(self.machine | row | {
            "n": len(timed.gpu), "calls": timed.calls, "median_us": median * 1e6, "p20_us": timed.quantile(0.2) * 1e6,
            "p80_us": timed.quantile(0.8) * 1e6, "gb_per_s": bytes / median / 1e9, "tflop_per_s": flops / median / 1e12,
            "roof": fraction, "host_us": timed.host_median * 1e6,
            "remark": "the GPU may have waited for Python" if timed.waited else "",
        })
        roof = "" if fraction is None else f"  {fraction:6.1%} of the roof"
        self.console.print(f"{_shown(row)}: {median * 1e6:.1f} us{roof}")

    def _failed(self, row: dict[str, Any], error: Exception | str) -> None:
        remark = error if isinstance(error, str) else f"failed: {type(error).__name__}: {error}"
        self.rows.append(self.machine | row | {"remark": " ".join(remark.split())[:300]})
        self.console.print(f"{_shown(row)}: {remark}", style="red", markup=False)


def gate(call: Call, truth: Truth, one: Implementation) -> tuple[float, str]:
    """The worst error of all results as a share of its bound, and the plans of what was launched."""
    with recorded() as launches:
        results = call()
    plans = list(dict.fromkeys(launch.plan for launch in launches))
    chain, product_error = None, TF32_ERROR if one.precision == "tf32" else 0.0
    if truth.case.does.in_parts and not one.ours:  # all parts of a sum weigh no more than its magnitude
        product_error += ROUNDOFF[truth.case.dtype]
    if plans and one.ours:  # autograd may launch from a thread of its own, of which nothing is recorded
        chain = max(plan.chain for plan in plans)
        product_error = max(getattr(plan, "product_error", 0.0) for plan in plans)
    got = [result.double().cpu().numpy() if hasattr(result, "cpu") else host(result) for result in results]
    worst = max(truth.worst(name, values, chain, product_error)
                for name, values in zip(truth.case.does.results, got, strict=True))
    return worst, "; ".join(map(repr, plans)) if one.ours else ""


def _named(case: Case, implementation: str) -> dict[str, Any]:
    return {"operation": case.operation, "implementation": implementation, "dtype": case.dtype, "S": case.samples,
            "D": case.in_features, "M": case.out_features, "orientation": case.orientation}


def _shown(row: Mapping[str, Any]) -> str:
    return " ".join(str(row[column]) for column in KEY if column in row)


COLUMNS = ("date", "densegrad", "commit", "gpu", "driver", "cuda", "numba_cuda", *KEY, "plan", "effort", "cold_l2", "n",
           "calls", "median_us", "p20_us", "p80_us", "gb_per_s", "tflop_per_s", "roof", "host_us",
           "worst_error_over_bound", "sm_mhz", "memory_mhz", "remark")


def machine() -> dict[str, str]:
    """What was measured with, as columns."""
    import cupy

    runtime = cupy.cuda.runtime
    return {"date": records.today(), "densegrad": records.installed("densegrad"), "commit": records.commit(),
            "gpu": device.current().name, "driver": _release(runtime.driverGetVersion()),
            "cuda": _release(runtime.runtimeGetVersion()), "numba_cuda": records.installed("numba-cuda")}


def _release(number: int) -> str:
    """13020 is 13.2: the newest CUDA that a driver takes, or that of the runtime."""
    return f"{number // 1000}.{number % 1000 // 10}"


def file_of(gpu: str, folder: Path) -> Path:
    """Where the rows of a GPU are kept."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.csv"


def save(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace rows of equal keys in the file."""
    texts = [{column: _text(row.get(column)) for column in COLUMNS} for row in rows]
    records.write(path, records.replaced(records.read(path), texts, KEY))


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else records.text(value)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="less time for each case: a first look, not a result")
    made.add_argument("--op", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS), metavar="NAME",
                      help=f"operations: {', '.join(OPERATIONS)} (default: all)")
    made.add_argument("--shapes", default="layers",
                      help=f"{', '.join(SHAPES)}, or a CSV file with columns S, D and M (default: layers)")
    made.add_argument("--dtype", nargs="+", choices=list(ITEM_BYTES), default=["float32"], metavar="DTYPE",
                      help=f"{', '.join(ITEM_BYTES)} (default: float32)")
    names = list(dict.fromkeys(one.name for one in IMPLEMENTATIONS if not one.ours))
    quoted = ", ".join(f'"{name}"' if " " in name else name for name in names)
    made.add_argument("--peers", nargs="*", choices=names, default=names, metavar="PEER",
                      help=f"peers to compare with, none if no name follows: {quoted} (default: those installed)")
    made.add_argument("--out", type=Path, default=records.RESULTS, metavar="FOLDER",
                      help="where the GPU's file of rows is kept (default: benchmarks/results)")
    return made


def main(arguments: Sequence[str] | None = None, clock: timing.Clock | None = None) -> int:
    """Run; a clock of one's own takes the place of the GPU's."""
    options = parser().parse_args(arguments)
    try:
        sizes = shapes(options.shapes)
        _check_precision()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    reason = "Numba's CUDA simulator is on" if _simulated() else device.gpu_missing()
    if reason:
        print(NO_GPU.format(reason=reason))
        return 2
    console = Console()
    bench = Bench(clock or timing.GpuClock(device.current().cupy), options.quick, console)
    chosen = [one for one in IMPLEMENTATIONS if one.ours or one.name in options.peers]
    for name in dict.fromkeys(one.name for one in chosen if one.missing):
        missing = next(one.missing for one in chosen if one.name == name)
        console.print(f"{name} is left out: {missing} is not installed")
    work = list(cases(options.op, sizes, options.dtype))
    path = file_of(bench.machine["gpu"], options.out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    interrupted = False
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("roofs", total=len(work))
        try:
            bench.measure_roofs(options.dtype, ROOF_SIZE)
            for case in work:
                progress.update(task, description=str(case))
                bench.measure(case, [one for one in chosen if one.offers(case.operation) and not one.missing])
                save(path, bench.rows)
                progress.advance(task)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            save(path, bench.rows)
    print(f"{'interrupted; ' if interrupted else ''}{len(bench.rows)} rows are in {path}")
    return 130 if interrupted else 0


#: of the square matrices that cuBLAS multiplies for its roof
ROOF_SIZE = 8192


def _check_precision() -> None:
    for name in ("CUPY_TF32", "NVIDIA_TF32_OVERRIDE"):
        value = os.environ.get(name, "0")
        if value != "0":
            raise ValueError(TF32.format(name=name, value=value))


def _simulated() -> bool:
    try:
        return device.current().kind == "simulator"
    except DeviceError:
        return False


if __name__ == "__main__":
    sys.exit(main())
