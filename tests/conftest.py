"""Lanes: where the tests' kernels run. `simulator` is Numba's CUDA simulator on the CPU, `gpu` a device to CuPy.

Any lane may run in several processes, `pytest -n auto`: on an H200 the gpu lane took a minute with 15.
"""
import os
import sys
from collections import Counter

import pytest

from densegrad import device

LANES = ("simulator", "gpu")


def pytest_addoption(parser):
    parser.addoption("--lane", choices=LANES, help="where kernels run: by default gpu if CuPy sees one, else simulator")
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="of the cases of each test only every Nth, "
                                                                        "beginning with the first")
    parser.addoption("--large", action="store_true", help="on a GPU too, run the tests that take 5 GB of its memory")


def pytest_configure(config):
    config.addinivalue_line("markers", "only(lane): the test asks about what only this lane has, and is left out of "
                                       "the other")
    config.addinivalue_line("markers", "hopper: needs the instructions of compute capability 9.0, and is left out on "
                                       "other GPUs")
    config.addinivalue_line("markers", "large: takes 5 GB of memory, of which few pages are touched on the CPU")
    asked, missing = config.getoption("--lane"), device.gpu_missing()
    lane = asked or ("simulator" if missing else "gpu")
    if lane == "gpu" and missing:
        raise pytest.UsageError(f"--lane gpu cannot run here: {missing}")
    if lane == "simulator":
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    numba = sys.modules.get("numba")
    simulated = numba.config.ENABLE_CUDASIM if numba else os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0"
    if simulated != (lane == "simulator"):
        raise pytest.UsageError(f"--lane {lane} cannot run here: Numba's CUDA simulator is "
                                f"{'on' if simulated else 'off'} (NUMBA_ENABLE_CUDASIM, read when numba is first "
                                "imported)")
    config.lane = lane


def pytest_report_header(config):
    return f"lane: {config.lane} ({device.current().name})"


def pytest_collection_modifyitems(config, items):
    kept, left_out, cases = [], [], Counter()
    one_in = config.getoption("--one-in")
    other = config.lane == "gpu" and device.current().capability(device.HOST) != (9, 0)
    for item in items:
        marker = item.get_closest_marker("only")
        too_large = item.get_closest_marker("large") and config.lane == "gpu" and not config.getoption("--large")
        lacking = other and item.get_closest_marker("hopper")
        if too_large or lacking or (marker and marker.args != (config.lane,)):
            left_out.append(item)
            continue
        test = item.nodeid.partition("[")[0]
        (left_out if cases[test] % one_in else kept).append(item)
        cases[test] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"{item.nodeid} skipped itself, but a lane runs all of its tests"


@pytest.fixture(scope="session")
def lane(request):
    """The name of the lane."""
    return request.config.lane


@pytest.fixture(scope="session")
def xp(lane):
    """The module that makes the lane's own arrays: NumPy or CuPy."""
    if lane == "gpu":
        import cupy

        return cupy
    import numpy

    return numpy
