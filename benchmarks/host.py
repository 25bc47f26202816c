"""Times Python: the CPU time that a call of densegrad takes until its work is queued, whatever the GPU does then.

On a GPU a call is timed whole, launches included, at a size that the GPU is done with sooner than Python asks again.
Without one it is timed up to its launches, which do nothing: arguments are checked, plans looked up, kernels found and
their arguments made, in NumPy's memory instead of CuPy's. What Numba does for a launch is missing then. The table says
which of the two it shows; with --save rows go to benchmarks/results/host.csv.
"""
from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import densegrad
from densegrad import device
from densegrad.device import Memory, PackedLaunch, Seen, Simulator, alignment_of

from . import records

SAMPLES, IN_FEATURES, OUT_FEATURES = 128, 64, 32
KEY = ("call", "device", "processor")
RESULTS = records.RESULTS / "host.csv"


class Unlaunched(Simulator):
    """A device in NumPy's memory whose launches do nothing."""

    name = "no GPU, launches do nothing"

    def memory(self, array: Any) -> Memory | None:
        """Where the array lies."""
        return Memory(array.shape, array.strides, array.dtype, self.address(array), False, "NumPy's memory")

    def seen(self, array: Any) -> Seen:
        """What a call sees of the array."""
        address = self.address(array)
        return Seen((array.shape, array.strides, array.dtype, alignment_of(address)), address)

    def address(self, array: np.ndarray) -> Any:
        """A number, as kernels take it."""
        return array.__array_interface__["data"][0]

    def argument(self, array: np.ndarray, seen: Seen) -> Any:
        """A number, as kernels take it."""
        return seen.address

    def workspace_address(self, workspace: np.ndarray) -> Any:
        """A number, as kernels take it."""
        return self.address(workspace)

    def load(self, launch: Any, place: str) -> PackedLaunch:
        """The launch with its arguments packed, which are filled in at each call and queued nowhere."""
        return PackedLaunch(launch, None, lambda *arguments: (0,), None)

    def launch(self, loaded: PackedLaunch, values: Any, stream: int) -> None:
        """Fill the arguments in."""
        loaded(values, stream)


@contextlib.contextmanager
def somewhere() -> Iterator[tuple[Any, str]]:
    """The module that makes arrays and the device's name, which is Unlaunched's where there is no GPU."""
    if not device.gpu_missing():
        import cupy

        yield cupy, device.current().name
        return
    found, stand_in = device.current, Unlaunched()
    device.current = lambda: stand_in  # type: ignore[assignment]
    try:
        yield np, stand_in.name
    finally:
        device.current = found


def calls(module: Any) -> dict[str, Callable[[], Any]]:
    """What is timed, by the line that a user writes."""
    x, w, dz = (module.asarray(np.ones(shape, "float32")) for shape in (
        (SAMPLES, IN_FEATURES), (IN_FEATURES, OUT_FEATURES), (SAMPLES, OUT_FEATURES)))
    db = module.asarray(np.zeros(OUT_FEATURES, "float32"))
    return {
        "bias_grad(dz)": lambda: densegrad.bias_grad(dz),
        "bias_grad(dz, out=db)": lambda: densegrad.bias_grad(dz, out=db),
        "weight_grad(x, dz)": lambda: densegrad.weight_grad(x, dz),
        "input_grad(dz, w)": lambda: densegrad.input_grad(dz, w),
        "weight_bias_grad(x, dz)": lambda: densegrad.weight_bias_grad(x, dz),
        "dense_grads(x, w, dz)": lambda: densegrad.dense_grads(x, w, dz),
        'activation_grad(dz, z, "relu")': lambda: densegrad.activation_grad(dz, dz, "relu"),
    }


def microseconds(call: Callable[[], Any], rounds: int, repeats: int) -> list[float]:
    """Microseconds a call, the mean of each round, in ascending order."""
    for _ in range(repeats):  # kernels are made and plans found
        call()
    found = []
    for _ in range(rounds):
        begun = time.thread_time()
        for _ in range(repeats):
            call()
        found.append((time.thread_time() - begun) / repeats * 1e6)
    return sorted(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Time every call and show the rows; keep them if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="samples of each call (default: 21)")
    parser.add_argument("--repeats", type=int, default=200, help="calls of a sample (default: 200)")
    parser.add_argument("--save", action="store_true", help="keep the rows in benchmarks/results/host.csv")
    options = parser.parse_args(arguments)
    new = []
    with somewhere() as (module, name):
        for label, call in calls(module).items():
            found = microseconds(call, options.rounds, options.repeats)
            fifth = len(found) // 5
            new.append({"call": label, "device": name, "processor": records.processor(),
                        "python": platform.python_version(), "date": records.today(), "commit": records.commit(),
                        "median_us": f"{statistics.median(found):.1f}", "p20_us": f"{found[fifth]:.1f}",
                        "p80_us": f"{found[-1 - fifth]:.1f}"})
    table = Table("call", "microseconds", "20 %", "80 %", title=f"Python's time a call on {name}", title_justify="left")
    for row in new:
        table.add_row(row["call"], row["median_us"], row["p20_us"], row["p80_us"])
    Console().print(table)
    if options.save:
        records.write(RESULTS, records.replaced(records.read(RESULTS), new, KEY))
    return 0


if __name__ == "__main__":
    sys.exit(main())
