"""The simulator: how long it says it takes, and calls from many threads and from forked processes."""
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from typer.testing import CliRunner

import densegrad
from densegrad import calls, device
from densegrad.commands import cli
from densegrad.estimate import duration, simulated_seconds
from densegrad.warming import foreseen


def seconds(*layer, dtype="float32"):
    return simulated_seconds(foreseen([layer], [dtype], [], (8, 0)))


def test_small_layers_take_no_time_and_large_ones_hours():
    assert seconds(4, 3, 2) < 3
    assert 3600 < seconds(8192, 768, 3072) < 24 * 3600
    assert seconds(1024, 64, 64) < seconds(4096, 64, 64) < seconds(4096, 256, 64)


@pytest.mark.parametrize(("time", "words"), [(11, "11 seconds"), (119, "119 seconds"), (120, "2 minutes"),
                                             (7199, "120 minutes"), (20_000, "6 hours")])
def test_durations_are_words(time, words):
    assert duration(time) == words


def cpu_seconds(call):
    begun = time.process_time()
    call()
    return time.process_time() - begun


@pytest.mark.only("simulator")
@pytest.mark.parametrize("call", [lambda: densegrad.bias_grad(np.ones((256, 16), "float32")),
                                  lambda: densegrad.weight_grad(*np.ones((2, 64, 32), "float32")),
                                  lambda: densegrad.weight_grad(*np.ones((2, 128, 32), "float16"))],
                         ids=["sum", "fma", "tensor_cores"])
def test_the_estimate_is_of_the_right_magnitude(call):
    """Ten times more or less would tell a user nothing; CPU time, since other processes take their share."""
    call()
    with calls.recorded() as launches:
        taken = min(cpu_seconds(call) for _ in range(3))
    assert taken / 8 < simulated_seconds(launches) / 3 < 8 * taken


@pytest.mark.only("simulator")
def test_a_long_call_says_so_before_it_begins_every_time(monkeypatch, caplog):
    monkeypatch.setattr(device, "simulated_seconds", lambda launches: 8000.0)
    monkeypatch.setattr(calls, "_kept", type(calls._kept)())
    said = "the simulator will take about 2 hours for this call, which a GPU is made for"

    def launched(self, values, stream):
        assert [record.getMessage() for record in caplog.records] == [said]

    monkeypatch.setattr(device._SimulatedLaunch, "__call__", launched)
    for _ in range(2):
        caplog.clear()
        densegrad.bias_grad(np.ones((2, 3), "float32"))
        assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.only("simulator")
def test_a_short_call_says_nothing(caplog):
    densegrad.bias_grad(np.ones((2, 3), "float32"))
    assert not caplog.records


@pytest.mark.only("simulator")
def test_grads_shows_the_estimate_before_it_starts(monkeypatch, tmp_path):
    class StartedError(Exception):
        pass

    def started(self, values, stream):
        raise StartedError("it has started")

    monkeypatch.setattr(device._SimulatedLaunch, "__call__", started)
    monkeypatch.setenv("COLUMNS", "200")
    for name, shape in (("x", (2048, 512)), ("dz", (2048, 512))):
        np.save(tmp_path / name, np.ones(shape, "float32"))
    done = CliRunner().invoke(cli.app, ["grads", "--x", str(tmp_path / "x.npy"), "--dz", str(tmp_path / "dz.npy"),
                                        "--out", str(tmp_path / "out.npz")])
    assert "the simulator will take about" in done.output
    assert done.output.index("will take about") < done.output.index("it has started")


def test_many_threads_call_compile_and_prepare_at_once(xp, monkeypatch):
    """Calls of few layouts, so that threads meet in them; what was loaded is forgotten, so that they compile, too."""
    if device.current().kind == "gpu":
        from cuda.bindings import driver

        launch, turn = driver.cuLaunchKernel, threading.Lock()

        def in_turn(*arguments):  # what is tested is what leads there; the driver sees to itself
            with turn:
                return launch(*arguments)

        monkeypatch.setattr(driver, "cuLaunchKernel", in_turn)
        monkeypatch.setattr(device.current(), "_functions", type(device.current()._functions)())
    monkeypatch.setattr(calls, "_kept", type(calls._kept)())
    monkeypatch.setattr(calls, "MOST_LAYOUTS", 3)
    dtypes = "float32", "float64", "float16"

    def work(number):
        samples, dtype = 2 + number % 4, dtypes[number % 3]
        x, dz = xp.full((samples, 3), number, dtype), xp.ones((samples, 2), dtype)
        if number % 2:
            return densegrad.prepare(densegrad.bias_grad, x)().tolist(), [samples * number] * 3
        found = densegrad.weight_bias_grad(x, dz)
        return (found.dw.tolist(), found.db.tolist()), ([[samples * number] * 2] * 3, [samples] * 2)

    with ThreadPoolExecutor(8) as pool:
        found, expected = zip(*pool.map(work, range(40)), strict=True)
    assert found == expected
    assert len(calls._kept) <= 3


@pytest.mark.only("simulator")
def test_a_kernel_is_not_built_while_another_runs():
    """The simulator puts a stand-in for `cuda` into the modules of what runs, which makes no kernels."""
    with calls.recorded() as launches:
        densegrad.bias_grad(np.ones((2, 3), "float32"))
    running, going_on, ended = device.current().load(launches[0], "the simulator"), threading.Event(), threading.Event()
    running.arguments = ()
    running.kernel = {running.shape: lambda: going_on.set() or ended.wait(60)}
    with ThreadPoolExecutor(2) as pool:
        pool.submit(running, {}, 0)
        assert going_on.wait(60)
        built = pool.submit(device.current().load, launches[0], "the simulator")
        assert not wait([built], 0.2).done
        ended.set()
        assert built.result(60).kernel


@pytest.mark.only("simulator")
def test_two_threads_that_call_forty_times():
    dz = np.ones((3, 4), "float32")
    with ThreadPoolExecutor(2) as pool:
        assert [db.tolist() for db in pool.map(lambda _: densegrad.bias_grad(dz), range(40))] == 40 * [[3] * 4]


@pytest.mark.only("simulator")
def test_a_forked_child_can_call():
    dz = np.ones((3, 4), "float32")
    densegrad.bias_grad(dz)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(writing, densegrad.bias_grad(dz).tobytes() + densegrad.bias_grad(dz[:2]).tobytes())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert np.frombuffer(pipe.read(), "float32").tolist() == [3] * 4 + [2] * 4
    assert os.waitpid(child, 0) == (child, 0)
