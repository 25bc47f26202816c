"""Sums over ranks, by ranks: processes that the tests start, over MPI and, where PyTorch is, over gloo.

Left out without mpi4py and an MPI from the same environment, as tests/test_torch.py is without PyTorch. What the ranks
do stands in tests/ranks.py; all cases of one engine and one number of ranks are one launch.
"""
import functools
import importlib.util
import json
import math
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import densegrad as dg
from densegrad import distributed
from densegrad.testing import ROUNDOFF
from tests import ranks
from tests.docstring_examples import check_example

pytest.importorskip("mpi4py")
ROOT = Path(__file__).parents[1]
MPIEXEC = Path(sys.executable).with_name("mpiexec")
if not MPIEXEC.exists():
    pytest.skip(f"there is no {MPIEXEC} (pip install mpich)", allow_module_level=True)

PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.only("simulator")
ENGINES = ("mpi", "gloo") if importlib.util.find_spec("torch") else ("mpi",)
CASES = tuple(name for name in vars(ranks) if name.startswith("case_"))
#: what of the simulator's kernels two ranks show
OF_KERNELS = "case_dense_grads_start_their_reduction", "case_accumulators_have_the_bits_of_one_process"


def launched(engine, size, arguments, timeout=150):
    """Run a program on so many ranks; gives its exit status, and what it has said."""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    if engine == "mpi":
        found = subprocess.run([MPIEXEC, "-n", str(size), sys.executable, "-m", "mpi4py", *arguments], cwd=ROOT,
                               env=environment, capture_output=True, text=True, timeout=timeout)
        return found.returncode, found.stdout + found.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    with tempfile.TemporaryFile("w+") as said:
        started = [subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=said, stderr=said,
                                    env=environment | {"RANK": str(rank)}) for rank in range(size)]
        try:
            until = time.monotonic() + timeout
            status = [one.wait(max(until - time.monotonic(), 0)) for one in started]
        finally:
            for one in started:
                one.kill()
                one.wait()
        said.seek(0)
        return next((one for one in status if one), 0), said.read()


@functools.cache
def outcomes(engine, size, *names):
    """By rank: what each case has given there; with the exit status, and what was said."""
    with tempfile.TemporaryDirectory() as folder:
        status, said = launched(engine, size, ["-m", "tests.ranks", engine, folder, *names])
        found = {int(path.stem): pickle.loads(path.read_bytes()) for path in Path(folder).glob("*.pickle")}
    return found, status, said


def cases_on(size):
    return tuple(case for case in CASES if size == 2 or case not in OF_KERNELS)


@pytest.mark.parametrize(("engine", "size", "case"), [
    (engine, size, case) for engine in ENGINES for size in (2, 4) for case in cases_on(size)])
def test_on_ranks(engine, size, case):
    """Every rank gets through the case, and has the same from it, bits of results included."""
    found, status, said = outcomes(engine, size, *cases_on(size))
    assert len(found) == size, (status, said)
    errors = {rank: cases[case][0] for rank, cases in found.items() if cases[case][0]}
    assert not errors, "\n".join(errors.values())
    given = [cases[case][1] for cases in found.values()]
    assert all(one == given[0] for one in given)


@pytest.mark.parametrize("name", ["all_reduce", "fold_along_ranks", "together"])
def test_examples_in_docstrings_give_what_they_show(name):
    """On one rank, this process."""
    from mpi4py import MPI

    names = {"numpy": np, "MPI": MPI, "comm": MPI.COMM_SELF, "dense_grads": dg.dense_grads,
             **{other: getattr(distributed, other) for other in distributed.__all__}}
    names |= dict(zip(("x", "w", "dz"), (np.ones(shape, "float32") for shape in ((4, 3), (3, 2), (4, 2))), strict=True))
    check_example(getattr(distributed, name), names)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_an_answer_from_rank_0_every_rank_raises_by_itself(engine):
    found, status, said = outcomes(engine, 2, "alone_rank_0_comes_late")
    assert found.keys() == {0, 1}, (status, said)
    for rank, cases in found.items():
        error, (agreed, blamed, words), _ = cases["alone_rank_0_comes_late"]
        assert not error
        assert not agreed
        if rank:
            assert blamed == (0,)
            assert "rank 0 did not answer within 1 s, twice the deadline" in words
        else:
            assert re.search("rank 0 (waited for|lost) the others", words)


@pytest.mark.parametrize("engine", ENGINES)
def test_when_a_rank_is_killed_the_job_ends_and_nothing_is_written(engine):
    with tempfile.TemporaryDirectory() as folder:
        status, said = launched(engine, 3, ["-m", "tests.ranks", engine, folder, "alone_a_rank_is_killed"])
        killed, = Path(folder).iterdir()
        assert killed.name == "killed", said
        assert time.time() - killed.stat().st_mtime < ranks.SECONDS
    assert status


def test_the_pages_program_gives_the_same_on_1_2_and_4_ranks(tmp_path):
    """Folds of blocks to the last bit; other sums within the bound of their roundings.

    Elements of a block's gradients are at most 16 in magnitude, a pixel being at most 1, so that sums of 4 blocks in
    two orders differ by at most 2 * 4 u * 64, and the weights of the second step by RATE / 64 of that and two
    roundings of numbers below RATE each. A loss changes by at most that times 1, for each of the 650 weights and
    biases. It is itself off by one rounding an operation of numbers below 2 |logit| + log 10 + 1, with logits below
    65 RATE.
    """
    program, = (block for block in re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE) if "MPI" in block)
    (tmp_path / "digits.py").write_text(program)
    found = {}
    for size in (1, 2, 4):
        status, said = launched("mpi", size, [str(tmp_path / "digits.py")])
        assert status == 0, said
        found[size] = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    folded = found[1]["folded"]
    rate, u = 0.05, ROUNDOFF["float32"]
    bound = 650 * (8 * u * rate + 4 * u * rate) + 2 * (65 + 10 + 64 + 8) * u * (2 * 65 * rate + math.log(10) + 1)
    for one in found.values():
        assert one["folded"] == folded
        losses, _ = one["reduced"]
        assert max(abs(loss - other) for loss, other in zip(losses, folded[0], strict=True)) <= bound
    assert folded[0][0] - folded[0][1] > 10 * bound


if "gloo" in ENGINES:
    def test_the_check_of_several_gpus_runs_over_gloo():
        status, said = launched("gloo", 2, ["-m", "benchmarks.ranks", "--megabytes", "0.01", "--layer", "6", "4", "3",
                                            "--repeats", "1"])
        assert status == 0, said
        assert "2 ranks, gloo, CPU" in said
        assert len(re.findall(r"order=\w+: [\d.]+ ms", said)) == 2
