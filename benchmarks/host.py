"""Times Python: the CPU time that a call of densegrad takes until its work is queued, whatever the GPU does then.

On a GPU a call is timed whole, launches included, at a size that the GPU is done with sooner than Python asks again,
and beside it the like of CuPy and of PyTorch, if that is installed. Without a GPU a call is timed up to its launches,
which do nothing: arrays are looked at, launches found and their arguments filled in, in NumPy's memory instead of
CuPy's. The rows that only a GPU can fill are left open then. With --save rows go to benchmarks/results/host.csv.

With --beside another state of this repository is timed before it, by its own benchmarks.host in an environment of its
own, and what of its time each call takes is shown.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import densegrad
from densegrad import device, tensors
from densegrad.device import Maker, Memory, Seen, Simulator, alignment_of, seen_tensor, tensor_maker
from densegrad.launches import Launch
from densegrad.packing import PackedLaunches

from . import records

SAMPLES, IN_FEATURES, OUT_FEATURES = 128, 64, 32
KEY = ("call", "device", "processor")
RESULTS = records.RESULTS / "host.csv"


class Unlaunched(Simulator):
    """A device in NumPy's memory whose launches do nothing."""

    name = "no GPU, launches do nothing"
    argument: Any = None  # addresses are numbers

    def memory(self, array: Any) -> Memory | None:
        """Where the array lies."""
        array = tensors.host_array(array)
        return Memory(array.shape, array.strides, array.dtype, self.address(array), False, "NumPy's memory")

    def serving(self, like: Any) -> Unlaunched:
        """Itself, or what allocates tensors where this is one."""
        return self if isinstance(like, np.ndarray) else UnlaunchedBesideTensors()

    def seen(self, array: Any) -> Seen | None:
        """What a call sees of the array, of a tensor as on a GPU."""
        if type(array) is not np.ndarray:
            return seen_tensor(array)
        address = self.address(array)
        return Seen((array.shape, array.strides, array.dtype, alignment_of(address)), address)

    def address(self, array: np.ndarray) -> Any:
        """A number, as kernels take it."""
        return array.__array_interface__["data"][0]

    def workspace_address(self, workspace: np.ndarray) -> Any:
        """A number, as kernels take it."""
        return self.address(workspace)

    def loaded(self, launches: tuple[Any, ...], place: str) -> tuple[PackedLaunches, ...]:
        """The launches with their arguments packed, which are filled in at each call and queued nowhere."""
        kernels = [launch for launch in launches if isinstance(launch, Launch)]
        return (PackedLaunches(kernels, [None] * len(kernels), lambda *arguments: (0,), None),)

    def workspace(self, size: int) -> Maker:
        """What makes undefined bytes."""
        return self.maker((size,), "uint8", False)

    def pointer(self, stream: Any) -> int:
        """No stream, whichever is asked for."""
        return 0


class UnlaunchedBesideTensors(Unlaunched):
    """The same with the memory of PyTorch's allocator."""

    def __init__(self) -> None:
        self.torch = sys.modules["torch"]
        self.torch_device = self.torch.device("cpu")

    def maker(self, shape: tuple[int, ...], dtype: str, features_first: bool) -> Maker:
        """What makes tensors with undefined elements."""
        return tensor_maker(self.torch, self.torch_device, shape, dtype, features_first)

    def address(self, array: Any) -> Any:
        """A number, as kernels take it."""
        return array.data_ptr() if tensors.is_tensor(array) else super().address(array)

    def deliver(self, array: Any, like: Any) -> Any:
        """The tensor."""
        return array

    def hands_over(self, like: Any) -> bool:
        """Tensors are."""
        return True


@contextlib.contextmanager
def somewhere() -> Iterator[tuple[Any, str]]:
    """The module that makes arrays and the device's name, which is Unlaunched's where there is no GPU."""
    if not device.gpu_missing():
        import cupy

        yield cupy, device.current().name
        return
    stand_in = Unlaunched()
    with device.standing_in(stand_in):
        yield np, stand_in.name


def calls(module: Any) -> dict[str, Callable[[], Any]]:
    """What is timed anywhere, by the line that a user writes."""
    x, w, dz = (module.asarray(np.ones(shape, "float32")) for shape in (
        (SAMPLES, IN_FEATURES), (IN_FEATURES, OUT_FEATURES), (SAMPLES, OUT_FEATURES)))
    dx, dw, db = (module.zeros(shape, "float32") for shape in (
        (SAMPLES, IN_FEATURES), (IN_FEATURES, OUT_FEATURES), OUT_FEATURES))
    out = densegrad.DenseGrads(dx, dw, db)
    prepared = densegrad.prepare(densegrad.dense_grads, x, w, dz, out=out)
    return {
        "bias_grad(dz)": lambda: densegrad.bias_grad(dz),
        "bias_grad(dz, out=db)": lambda: densegrad.bias_grad(dz, out=db),
        "weight_grad(x, dz)": lambda: densegrad.weight_grad(x, dz),
        "weight_grad(x, dz, out=dw)": lambda: densegrad.weight_grad(x, dz, out=dw),
        "input_grad(dz, w)": lambda: densegrad.input_grad(dz, w),
        "weight_bias_grad(x, dz)": lambda: densegrad.weight_bias_grad(x, dz),
        "dense_grads(x, w, dz)": lambda: densegrad.dense_grads(x, w, dz),
        "dense_grads(x, w, dz, out=out)": lambda: densegrad.dense_grads(x, w, dz, out=out),
        'activation_grad(dz, z, "relu")': lambda: densegrad.activation_grad(dz, dz, "relu"),
        f"prepared dense_grads, {len(prepared.launches)} launches": prepared,
        "its launches alone, nothing filled in": bare(prepared),
    }


def bare(prepared: densegrad.Prepared) -> Callable[[], Any]:
    """The driver's launches of a prepared call as they were filled in last."""
    queued = [pair for one in prepared._bound.kept.loaded if isinstance(one, PackedLaunches) for pair in one.queued]

    def launch() -> None:
        for queue, arguments in queued:
            queue(0, arguments, 0)

    return launch


#: what else is timed on a GPU: the library that it takes, and what makes the call of x, w, dz, dw and db
PEERS: dict[str, tuple[str, Callable[..., Callable[[], Any]]]] = {
    "cupy.sum(dz, axis=0, out=db)": ("cupy", lambda cupy, x, w, dz, dw, db: lambda: cupy.sum(dz, axis=0, out=db)),
    "cupy.matmul(x.T, dz, out=dw)": ("cupy", lambda cupy, x, w, dz, dw, db: lambda: cupy.matmul(x.T, dz, out=dw)),
    "torch: backward of nn.functional.linear": ("torch", lambda torch, *arrays: _backward(torch, *arrays)),
}


def _backward(torch: Any, x: Any, w: Any, dz: Any, dw: Any, db: Any) -> Callable[[], Any]:
    """PyTorch's whole backward of a linear layer, through autograd."""
    x, w, dz, b = (torch.as_tensor(array, device="cuda") for array in (x, w.T, dz, db))
    given = [array.contiguous().requires_grad_() for array in (x, w, b)]
    z = torch.nn.functional.linear(*given)
    return lambda: torch.autograd.grad(z, given, dz, retain_graph=True)


def backwards() -> dict[str, Callable[[], Any] | None]:
    """The backward of densegrad.torch.linear, whole, and the same around an operator that only allocates.

    None in their place without PyTorch, or beside a GPU that it does not see.
    """
    labels = "backward of densegrad.torch.linear", "the same, around an operator that only allocates"
    if importlib.util.find_spec("torch") is None:
        return dict.fromkeys(labels)
    import torch

    from densegrad.torch import layers as ours

    where = "cpu" if device.gpu_missing() else "cuda"
    if where == "cuda" and not torch.cuda.is_available():
        return dict.fromkeys(labels)
    given = [torch.ones(shape, device=where, requires_grad=True) for shape in (
        (SAMPLES, IN_FEATURES), (OUT_FEATURES, IN_FEATURES), (OUT_FEATURES,))]
    z, dz = ours.linear(*given), torch.ones(SAMPLES, OUT_FEATURES, device=where)
    _, allocating = _allocating_operator()

    def backward() -> Any:
        return torch.autograd.grad(z, given, dz, retain_graph=True)

    def allocate() -> Any:
        operator, ours._linear_backward = ours._linear_backward, allocating
        try:
            return backward()
        finally:
            ours._linear_backward = operator

    return dict(zip(labels, (backward, allocate), strict=True))


@functools.cache
def _allocating_operator() -> Any:
    """An operator like the backward's that only allocates its results."""
    import torch

    from densegrad.torch import layers as ours

    def allocate(da: Any, x: Any, weight: Any, *options: Any) -> Any:
        return [torch.empty_like(x), torch.empty_like(weight), da.new_empty(da.shape[-1:])]

    operators = torch.library.Library("densegrad_benchmarks", "DEF")
    operators.define(str(ours._linear_backward._schema).partition("::")[2].replace("linear_backward", "allocate", 1))
    for key in ("CPU", "CUDA"):
        operators.impl("allocate", allocate, key)
    return operators, torch.ops.densegrad_benchmarks.allocate.default


def peers(module: Any) -> dict[str, Callable[[], Any] | None]:
    """Those that can be called here; None in place of the others."""
    if module is np:
        return dict.fromkeys(PEERS)
    arrays = [module.asarray(np.ones(shape, "float32")) for shape in (
        (SAMPLES, IN_FEATURES), (IN_FEATURES, OUT_FEATURES), (SAMPLES, OUT_FEATURES), (IN_FEATURES, OUT_FEATURES),
        OUT_FEATURES)]
    found: dict[str, Callable[[], Any] | None] = {}
    for label, (library, make) in PEERS.items():
        there = importlib.util.find_spec(library) is not None
        found[label] = make(importlib.import_module(library), *arrays) if there else None
    return found


def microseconds(timed: Sequence[Callable[[], Any]], rounds: int, repeats: int) -> list[list[float]]:
    """Microseconds a call of each, the mean of each round, in ascending order.

    All take turns in each round, so that a slower minute of the processor is in every row.
    """
    for call in timed:
        for _ in range(repeats):  # kernels are made and plans found
            call()
    found: list[list[float]] = [[] for _ in timed]
    for _ in range(rounds):
        for call, samples in zip(timed, found, strict=True):
            begun = time.process_time()
            for _ in range(repeats):
                call()
            samples.append((time.process_time() - begun) / repeats * 1e6)
    return [sorted(samples) for samples in found]


def _of_another_state(python: str, checkout: str, rounds: int, repeats: int) -> dict[str, float]:
    """The median microseconds of each call, as the table of another state's benchmarks.host shows them."""
    command = [python, "-m", "benchmarks.host", "--rounds", str(rounds), "--repeats", str(repeats)]
    done = subprocess.run(command, cwd=checkout, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"--beside: {' '.join(command)} in {checkout} ended with {done.returncode}: "
                         f"{done.stderr[-500:]}")
    cells = ([cell.strip() for cell in re.split("[│|]", line)[1:-1]] for line in done.stdout.splitlines())
    return {row[0]: float(row[1]) for row in cells if len(row) >= 2 and re.fullmatch(r"[0-9.]+", row[1])}


def main(arguments: Sequence[str] | None = None) -> int:
    """Time every call and show the rows; keep them if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="samples of each call (default: 21)")
    parser.add_argument("--repeats", type=int, default=200, help="calls of a sample (default: 200)")
    parser.add_argument("--save", action="store_true", help="keep the rows in benchmarks/results/host.csv")
    parser.add_argument("--beside", nargs=2, metavar=("PYTHON", "CHECKOUT"),
                        help="another state to compare with: the Python that it is installed for, and its folder")
    options = parser.parse_args(arguments)
    old: dict[str, float] = {}
    if options.beside:
        python, checkout = options.beside
        old = _of_another_state(python, checkout, options.rounds, options.repeats)
    new = []
    with somewhere() as (module, name):
        listed = calls(module) | backwards() | peers(module)
        timed = {label: call for label, call in listed.items() if call is not None}
        rows = microseconds(list(timed.values()), options.rounds, options.repeats)
        for label, found in zip(timed, rows, strict=True):
            fifth = len(found) // 5
            new.append({"call": label, "device": name, "processor": records.processor(),
                        "python": platform.python_version(), "date": records.today(), "commit": records.commit(),
                        "median_us": f"{statistics.median(found):.1f}", "p20_us": f"{found[fifth]:.1f}",
                        "p80_us": f"{found[-1 - fifth]:.1f}"})
    table = Table("call", "microseconds", "20 %", "80 %", title=f"Python's time a call on {name}", title_justify="left")
    if options.beside:
        table.add_column("other state")
        table.add_column("share of it")
    for row in new:
        before = old.get(row["call"])
        share = () if before is None else (f"{before:.1f}", f"{float(row['median_us']) / before:.2f}")
        table.add_row(row["call"], row["median_us"], row["p20_us"], row["p80_us"], *share)
    for label in listed.keys() - timed.keys():
        table.add_row(label, "open", "", "")
    Console().print(table)
    if options.save:
        records.write(RESULTS, records.replaced(records.read(RESULTS), new, KEY))
    return 0


if __name__ == "__main__":
    sys.exit(main())
