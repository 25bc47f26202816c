"""A lane that was asked for and cannot run fails."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run(program, **environment):
    """Run Python in the tests' folder, with no GPU to be seen and none of pytest's plugins and options from outside."""
    kept = {name: value for name, value in os.environ.items()
            if name not in ("NUMBA_ENABLE_CUDASIM", "PYTHONPATH") and not name.startswith("PYTEST_")}
    alone = {"CUDA_VISIBLE_DEVICES": "-1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = subprocess.run([sys.executable, "-c", program], cwd=TESTS, capture_output=True, text=True, timeout=120,
                           env={**kept, **alone, **environment})
    return found.returncode, found.stdout + found.stderr


def pytest_with(*options):
    return f"import sys, pytest; sys.exit(pytest.main([*{options!r}, '-p', 'no:cacheprovider']))"


def test_the_gpu_lane_fails_without_a_gpu():
    status, output = run(pytest_with("--lane", "gpu", "--collect-only", "test_layering.py"))
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "--lane gpu cannot run here: CuPy" in output


def test_the_simulator_lane_fails_where_numba_was_imported_without_it():
    status, output = run("import numba; " + pytest_with("--lane", "simulator", "--collect-only", "test_layering.py"))
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "--lane simulator cannot run here: Numba's CUDA simulator is off" in output


def test_without_a_gpu_the_simulator_is_the_default_and_announced():
    status, output = run(pytest_with("--collect-only", "test_layering.py"))
    assert status == pytest.ExitCode.OK
    assert "lane: simulator (Numba CUDA simulator)" in output


def test_what_else_the_machine_has_for_pytest_plays_no_part(tmp_path):
    about = tmp_path / "bystander.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bystander\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[pytest11]\nbystander = bystander\n")
    (tmp_path / "bystander.py").write_text("raise RuntimeError('loaded')\n")
    status, output = run(pytest_with("--collect-only", "test_layering.py"), PYTHONPATH=str(tmp_path))
    assert status == pytest.ExitCode.OK, output


def test_a_test_that_skips_itself_fails(tmp_path):
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_skip.py").write_text("import pytest\ndef test_idle():\n    pytest.skip('no GPU')\n")
    status, output = run(pytest_with(str(tmp_path)))
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "a lane runs all of its tests" in output


def test_every_nth_case_of_each_test_is_run(tmp_path):
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_cases.py").write_text(
        "import pytest\n@pytest.mark.parametrize('case', range(5))\ndef test_many(case): assert case % 2 == 0\n"
        "def test_alone(): pass\n")
    status, output = run(pytest_with("--one-in", "2", str(tmp_path)))
    assert status == pytest.ExitCode.OK, output
    assert "4 passed, 2 deselected" in output


def test_this_session_announced_the_lane_it_runs_on(lane):
    from numba import config

    from densegrad import device

    assert device.current().kind == lane
    assert bool(config.ENABLE_CUDASIM) == (lane == "simulator")
