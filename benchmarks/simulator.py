"""Times Numba's CUDA simulator: densegrad's kernels against the plain kernel of 16 x 16 tiles, one element a thread.

The simulator runs a thread of Python for each CUDA thread. Kernels on fragments have fewer threads and do the work of
many elements in one NumPy operation, so that layers can be tested where there is no GPU. These are seconds of the CPU
that they are measured on, and say nothing about a GPU. With --save
rows go to benchmarks/results/simulator.csv.
"""
from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from . import records

SIZES = ((32, 32, 32), (64, 64, 64), (128, 64, 10))
KEY = ("S", "D", "M", "processor")
RESULTS = records.RESULTS / "simulator.csv"


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of some calls."""
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return min(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Time weight_grad at several sizes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="calls, of which the fastest counts (default: 3)")
    parser.add_argument("--size", type=int, nargs=3, action="append", metavar=("S", "D", "M"),
                        help=f"samples, inputs and outputs; may be repeated (default: {SIZES})")
    parser.add_argument("--save", action="store_true", help="keep the rows in benchmarks/results/simulator.csv")
    options = parser.parse_args(arguments)
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # before Numba is first imported

    import densegrad
    from densegrad import device

    if device.current().kind != "simulator":
        print("Numba was imported without its simulator: set NUMBA_ENABLE_CUDASIM=1")
        return 2
    from . import baselines  # kernels, which are made for the device that Numba was imported for

    new = []
    table = Table("S x D x M", "16 x 16 tiles", "densegrad", "faster", title="Seconds of weight_grad in the simulator",
                  title_justify="left")
    for samples, inputs, outputs in options.size or SIZES:
        draw = np.random.default_rng(0)
        x, dz = (draw.standard_normal((samples, cols)).astype("float32") for cols in (inputs, outputs))
        dw = np.empty((inputs, outputs), "float32")
        plain = seconds(lambda: baselines.weight_grad("shared tiles", x, dz, dw), options.repeats)  # noqa: B023
        ours = seconds(lambda: densegrad.weight_grad(x, dz, out=dw), options.repeats)  # noqa: B023
        table.add_row(f"{samples} x {inputs} x {outputs}", f"{plain:.2f}", f"{ours:.2f}", f"{plain / ours:.0f} x")
        new.append({"S": samples, "D": inputs, "M": outputs, "processor": records.processor(), "date": records.today(),
                    "commit": records.commit(), "plain_s": f"{plain:.3f}", "densegrad_s": f"{ours:.3f}"})
    Console().print(table)
    if options.save:
        records.write(RESULTS, records.replaced(records.read(RESULTS), new, KEY))
    return 0


if __name__ == "__main__":
    sys.exit(main())
