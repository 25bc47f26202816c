"""What a reader is told: commands and code that run, links that lead somewhere, every public name in the reference.

Commands stand in blocks marked bash, one a line, and in the text between backticks. Each has a row here that says how
it is run. Code in blocks marked python runs from the top of its page to the bottom.
"""
import inspect
import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import densegrad
from tests.docstring_examples import check_example

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md",
                      *sorted((ROOT / "docs").glob("*.md")))}

#: command -> what .ci/run does for it
IN_CI = {
    "pip install -e .": "pip install -q -e .",
    "pip install -e . && densegrad demo": "pip install -q -e . && densegrad demo",
    'pip install -e ".[test]" && pytest -n auto': 'pip install -q -e ".[test]" && pytest -n auto',
    'pip install -e ".[docs]"': 'pip install -q -e ".[dev]"',  # which has it
    "python -m mkdocs build --strict -f .mkdocs.yml": "python -m mkdocs build --strict -f .mkdocs.yml",
    'pip install -e ".[dev]"': 'pip install -q -e ".[dev]"',
}
#: commands that install an extra -> the extra
EXTRAS = {f'pip install -e ".[{extra}]"': extra for extra in ("cuda12", "cuda13", "jax", "mpi", "nccl", "torch")}
#: what tests/test_distributed.py runs
ON_RANKS = {"mpiexec -n 4 python -m mpi4py digits.py"}
#: command -> the command that is run here, shorter or dry
HERE = {
    "bash .ci/run": "bash -n .ci/run",
    "python .ci/compile_check.py": "python .ci/compile_check.py --help",
    "python .ci/compile_check.py --only NAME": "python .ci/compile_check.py --help",
    "python -m benchmarks.fit benchmarks/results/nvidia-h200-2026-11-27-05b0320-plans.csv":
        "python -m benchmarks.fit --help",
    "densegrad cache": "densegrad cache",
    "densegrad cache --clear": "densegrad cache --help",
    "densegrad check": "densegrad check --help",
    "densegrad demo": "densegrad demo --steps 1",
    "densegrad explain": "densegrad explain",
    "densegrad explain --samples 3 --outputs 3": "densegrad explain --samples 3 --outputs 3",
    "densegrad grads": "densegrad grads --help",
    "densegrad grads --x x.npy --dz dz.npy --out grads.npz --memory 300MB": "densegrad grads --help",
    "densegrad grads --x x.npy --dz dz.npy --w w.npy --need dx --out dx.npy --memory 300MB": "densegrad grads --help",
    "densegrad info": "densegrad info",
    "densegrad ptx": "densegrad ptx --help",
    "densegrad warmup": "densegrad warmup --help",
    "densegrad warmup --layers layers.txt --dtype bfloat16 --activation gelu --accumulate --cc 9.0":
        "densegrad warmup --help",
    "pytest --lane simulator": "pytest --lane simulator --collect-only -q tests/test_layering.py",
    "python -m benchmarks.host": "python -m benchmarks.host --rounds 2 --repeats 2",
    "python -m benchmarks.report": "python -m benchmarks.report --check",
    "python -m benchmarks.report --check": "python -m benchmarks.report --check",
    "python -m benchmarks.simulator": "python -m benchmarks.simulator --repeats 1 --size 8 8 8",
}
#: commands that need a GPU -> how far they go without one
ON_A_GPU = {
    "densegrad tune": "densegrad tune --help",
    "densegrad tune 8192,768,3072 64,1024,10": "densegrad tune --help",
    "densegrad tune 8192,768,3072 --dtype bfloat16 --weight-layout out_in --out plans.json": "densegrad tune --help",
    "densegrad warmup 128,784,512 128,512,10": "densegrad warmup --help",
    "pytest --lane gpu": "pytest --help",
    "python -m benchmarks.counted --ncu": "python -m benchmarks.counted --help",
    "python -m torch.distributed.run --nproc-per-node 8 -m benchmarks.ranks": "python -m benchmarks.ranks --help",
    "python -m benchmarks.run": "python -m benchmarks.run --help",
    "python -m benchmarks.run --quick": "python -m benchmarks.run --help",
    "python -m benchmarks.run --op cross_entropy cross_entropy_grad --shapes losses --dtype bfloat16 float32":
        "python -m benchmarks.run --help",
    "python -m benchmarks.run --op layer_backward --dtype float32 bfloat16": "python -m benchmarks.run --help",
    "python -m benchmarks.run --op micro_batches --dtype bfloat16": "python -m benchmarks.run --help",
    "python -m benchmarks.run --shapes hopper --dtype bfloat16 --op weight_grad weight_grad_float32 weight_grad_added":
        "python -m benchmarks.run --help",
    "python -m benchmarks.run --shapes hopper --dtype bfloat16 --op weight_bias_grad input_grad":
        "python -m benchmarks.run --help",
    "python -m benchmarks.run --shapes hopper --dtype float32 float64 --op weight_grad input_grad":
        "python -m benchmarks.run --help",
}
PROGRAMS = {"python": [sys.executable], "densegrad": [sys.executable, "-m", "densegrad"],
            "pytest": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"], "bash": ["bash"]}


def blocks(text, language):
    """(the paragraph before it, its text) of every block in this language."""
    for found in re.finditer(rf"(?ms)^```{language}\n(.*?)^```$", text):
        yield text[:found.start()].rstrip().rpartition("\n\n")[2], found[1]


def commands(text):
    """(command, what is said before it) of a page."""
    for before, block in blocks(text, "bash"):
        yield from ((line, before) for line in block.splitlines())
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    for line in prose.splitlines():
        yield from ((found, line) for found in re.findall(
            r"`((?:densegrad|pip|pytest|python|bash) [^`]+|\.ci/[\w.]+ [^`]+)`", line))


def test_every_command_has_its_row_and_every_row_its_command():
    told = {command for text in PAGES.values() for command, _ in commands(text)}
    assert told == set(IN_CI) | set(EXTRAS) | set(HERE) | set(ON_A_GPU) | ON_RANKS


def test_commands_stand_in_marked_blocks_and_use_nothing_from_elsewhere():
    for name, text in PAGES.items():
        assert not re.search(r"(?m)^    (densegrad|pip|pytest|python|bash) ", text), name
        assert not set(re.findall(r"(?m)^```(\w*)$", text)) - {"", "bash", "python"}, name
        assert "rehears" not in text, name


def test_what_needs_a_gpu_says_so():
    for name, text in PAGES.items():
        for command, before in commands(text):
            assert command not in ON_A_GPU or re.search(r"GPU|gpu", before), (name, command)


@pytest.mark.parametrize("command", IN_CI)
def test_the_checks_run(command):
    assert IN_CI[command] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", EXTRAS)
def test_there_is_such_an_extra(command):
    assert EXTRAS[command] in metadata.metadata("densegrad").get_all("Provides-Extra")


@pytest.mark.only("simulator")
@pytest.mark.parametrize("command", sorted({*HERE.values(), *ON_A_GPU.values()}))
def test_commands_run(command):
    program, *arguments = shlex.split(command)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    found = subprocess.run([*PROGRAMS[program], *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
                           env=kept | {"NUMBA_ENABLE_CUDASIM": "1"})
    assert found.returncode == 0, found.stdout + found.stderr


def code(*, gpu):
    """(page, its blocks of Python): those that need a GPU say so by importing CuPy, and stand alone.

    Without the gallery, which .ci/run executes as a notebook, and what tests/test_torch.py, tests/test_distributed.py
    and tests/test_jax.py run: the pages on PyTorch and on ranks, and blocks that import JAX.
    """
    for name, text in PAGES.items():
        if name in ("docs/distributed.md", "docs/gallery.md", "docs/pytorch.md"):
            continue
        chosen = [block for _, block in blocks(text, "python")
                  if ("import cupy" in block) == gpu and "import jax" not in block]
        if chosen:
            yield pytest.param(name, chosen, id=name)


@pytest.mark.only("simulator")
@pytest.mark.parametrize(("page", "found"), list(code(gpu=False)))
def test_code_runs(page, found):
    names = {}
    for block in found:
        exec(compile(block, page, "exec"), names)


@pytest.mark.only("gpu")
@pytest.mark.parametrize(("page", "found"), list(code(gpu=True)))
def test_code_for_a_gpu_runs(page, found):
    for block in found:
        exec(compile(block, page, "exec"), {})


#: the public names whose docstrings have examples, without those of PyTorch, which tests/test_torch.py runs
EXAMPLES = [name for name in densegrad.__all__ if ">>>" in (getattr(densegrad, name).__doc__ or "")]


def test_every_public_function_has_an_example():
    assert set(EXAMPLES) >= {name for name in densegrad.__all__ if inspect.isfunction(getattr(densegrad, name))}


@pytest.mark.only("simulator")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_give_what_they_show(name, monkeypatch):
    """With NumPy and the public names at hand, as they have them; `warmup` finds no kernel and compiles none."""
    monkeypatch.setattr("densegrad.warming._compile", lambda *arguments: None)
    monkeypatch.setattr("densegrad.warming.cache.load", lambda kept: None)
    check_example(getattr(densegrad, name),
                  {"numpy": np, **{other: getattr(densegrad, other) for other in densegrad.__all__}})


def test_the_readme_shows_an_error_as_it_is():
    x, dz = np.ones((32, 64), "float32"), np.ones((10, 32), "float32")
    with pytest.raises(densegrad.ShapeError) as error:
        densegrad.weight_grad(x, dz)
    assert f"    ShapeError: {error.value}\n" in PAGES["README.md"]


@pytest.mark.only("simulator")
def test_the_call_that_is_followed_launches_what_is_shown(capsys):
    page = PAGES["CONTRIBUTING.md"]
    (_, block), = blocks(page, "python")
    shown = re.search(re.escape(block) + r"```\n\n((?:    .*\n)+)", page)[1].splitlines()
    exec(compile(block, "CONTRIBUTING.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    for line, now in zip(shown, printed, strict=True):
        assert re.fullmatch(".*".join(map(re.escape, line.strip().split("..."))), now)


def test_files_that_pages_name_are_there():
    """Those between backticks: of the repository, or of the package."""
    for name in ("CONTRIBUTING.md", "docs/how-a-call-flows.md"):
        for path in re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", PAGES[name]):
            assert (ROOT / path).exists() or (ROOT / "src" / "densegrad" / path).exists(), (name, path)


def test_the_reference_has_every_public_name_once():
    named = re.findall(r"(?m)^::: densegrad\.(\w+)$", PAGES["docs/reference.md"])
    assert sorted(named) == sorted(densegrad.__all__)


def test_links_to_the_repository_lead_to_files():
    """Links between the pages of the site are held by its build, which fails on a warning."""
    home = r"https://(?:github\.com/densegrad/densegrad/(?:blob|tree)|raw\.githubusercontent\.com/densegrad/densegrad)"
    for name, text in PAGES.items():
        for path in re.findall(rf"{home}/main/([^)#\s]+)", text):
            assert (ROOT / path).exists(), (name, path)


def test_the_readme_has_no_relative_links():
    """It is shown by package indexes too, where there are no files beside it."""
    assert not re.findall(r"\]\((?!https://)[^)]*\)", PAGES["README.md"])
