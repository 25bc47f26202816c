"""What a process remembers between calls is bounded, however many calls it makes and of however many shapes."""
import functools
import gc
import importlib
import inspect

import numpy as np
import pytest

import densegrad
from benchmarks.host import Unlaunched
from densegrad import calls, catalogue, compiler, device

SHAPES, CALLS = 2_000, 100_000


@pytest.fixture
def unlaunched(monkeypatch):
    """Launches do nothing, so that what is left is what Python remembers."""
    stand_in = Unlaunched()
    monkeypatch.setattr(device, "current", lambda: stand_in)


def memories():
    """Every function of this package that remembers what it has given, by its name."""
    return {f"{found.__module__}.{found.__qualname__}": found for found in gc.get_objects()
            if type(found) is functools._lru_cache_wrapper and found.__module__.startswith("densegrad.")}


def test_every_memory_has_a_bound():
    for launch in catalogue.kernel_variants().values():
        importlib.import_module(launch.module)
    importlib.import_module("densegrad.cache")
    found = memories()
    assert {"densegrad.compiler.kernel_of", "densegrad.kernels.batch_sum.make_sum_strided",
            "densegrad.families.batch_sum.plan_batch_sum"} <= found.keys()
    unbounded = {name for name, memory in found.items() if memory.cache_parameters()["maxsize"] is None}
    assert unbounded == {name for name in unbounded if not inspect.signature(found[name]).parameters}


def test_memory_stays_within_its_bounds(unlaunched, monkeypatch):
    monkeypatch.setattr(calls, "MOST_LAYOUTS", 500)
    monkeypatch.setattr(calls, "_kept", type(calls._kept)())
    cells = np.ones((SHAPES, 8), "float32")
    db, most = np.empty(8, "float32"), 0
    for samples in range(1, SHAPES + 1):
        dz = cells[:samples]
        for _ in range(CALLS // SHAPES):
            densegrad.bias_grad(dz, out=db)
        most = max(most, len(calls._kept))
    assert most == len(calls._kept) == 500
    assert all(memory.cache_info().currsize <= memory.cache_info().maxsize for memory in memories().values()
               if memory.cache_info().maxsize is not None)


def test_a_layout_that_was_forgotten_is_worked_out_again(unlaunched, monkeypatch):
    monkeypatch.setattr(calls, "MOST_LAYOUTS", 2)
    monkeypatch.setattr(calls, "_kept", type(calls._kept)())
    for samples in (3, 4, 5, 3):
        with calls.recorded() as launches:
            densegrad.bias_grad(np.ones((samples, 8), "float32"))
        assert launches[0].plan.samples == samples


def test_kernels_stay_loaded_within_their_bound(xp, monkeypatch):
    if device.current().kind == "gpu":
        monkeypatch.setattr(device.current(), "_functions", type(device.current()._functions)())
    monkeypatch.setattr(device, "MOST_FUNCTIONS", 2)
    monkeypatch.setattr(compiler, "kernel_of", functools.lru_cache(maxsize=2)(compiler.kernel_of.__wrapped__))
    for dtype in ("float32", "float64", "float16", "float32"):
        assert densegrad.bias_grad(xp.ones((3, 4), dtype)).tolist() == [3] * 4
    loaded = getattr(device.current(), "_functions", ())
    assert len(loaded) <= 2
    assert compiler.kernel_of.cache_info().currsize <= 2
