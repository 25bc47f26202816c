"""A kernel from outside of the package: one line in the list of families, and it is like the others.

Its blocks count their arrivals in memory that is zeroed before each launch, so it is also the proof that counters work:
whatever the workspace holds, call after call, in graphs that are replayed.
"""
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import densegrad
from densegrad import cache, compiler
from densegrad.calls import recorded
from densegrad.catalogue import kernel_variants
from densegrad.families import FAMILIES
from densegrad.launches import Clear, Launch
from densegrad.testing import LAYOUTS, Placed, bits, check_within, host, normal, poisoned
from tests.example_family import meaning
from tests.example_family.family import SquareNormsPlan, launches, plan_square_norms
from tests.example_family.function import square_norms

ROOT = Path(__file__).parents[1]
FAMILY = "tests.example_family.family"
DTYPES = ("float32", "float16", "bfloat16", "float64")
SHAPE = 21, 50
#: several blocks along the rows and several parts, the last of them shorter
IN_PARTS = {dtype: SquareNormsPlan(*SHAPE, dtype, cols_per_part=20) for dtype in DTYPES}


@pytest.fixture
def listed():
    """The family in the list: the one line."""
    FAMILIES.append(FAMILY)
    yield
    FAMILIES.remove(FAMILY)


def with_the_family(*arguments):
    """The command line in a process that has the family in the list, and has not been told about the simulator."""
    program = (f"from densegrad.families import FAMILIES; FAMILIES.append({FAMILY!r}); import os; "
               "os.environ.pop('NUMBA_ENABLE_CUDASIM', None); from densegrad.commands.cli import main; main()")
    found = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True,
                           timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_one_line_lists_it(listed):
    names = [name for name, launch in kernel_variants().items() if launch.kernel == "square_norms"]
    assert len(names) == 2 * len(DTYPES)
    assert "square_norms-float32-accumulate" in names


def test_the_command_line_lists_and_compiles_it():
    assert "square_norms" in with_the_family("ptx")
    assert len(with_the_family("ptx", "square_norms").split()) == 2 * len(DTYPES)
    ptx = with_the_family("ptx", "square_norms-bfloat16", "--cc", "8.0")
    assert "atom.relaxed.gpu.global.add.u32" in ptx
    assert "square_norms" in ptx


def test_what_its_machine_code_depends_on_is_known(listed):
    """Its own files and those of the package that they read: who changes one of them compiles anew."""
    launch = kernel_variants()["square_norms-float32"]
    read = {source.module for source in cache.sources(launch.module)}
    assert {"tests.example_family.kernel", "tests.example_family.arrivals", "densegrad.kernels.columns",
            "densegrad.kernels.primitives.ptx", "densegrad.facts"} <= read
    assert len({compiler.key_of(one) for one in kernel_variants().values()}) == len(kernel_variants())


def test_its_plan_explains_itself():
    assert plan_square_norms(64, 5000, "float32").explain().splitlines() == [
        "squared norms of 64 rows of 5000 float32, each element read once",
        "grid 16 x 5 blocks of 32 threads, 8 for each row; the block that comes last adds the parts in ascending order",
        "longest chain of additions 141"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_computes_squared_norms(xp, dtype):
    x = normal(SHAPE, dtype, 1)
    for out_dtype, accumulate in ((dtype, False), (dtype, True), ("float32", False)):
        out = poisoned(SHAPE[:1], out_dtype, "C", xp)
        old = normal(SHAPE[:1], out_dtype, 2) if accumulate else None
        if accumulate:
            out.array[...] = xp.asarray(old)
        with recorded() as launched:
            result = square_norms(Placed(x, "C", xp).array, alpha=0.5, out=out.array, accumulate=accumulate,
                                  plan=IN_PARTS[dtype])
        assert result is out.array
        (launch,) = launched
        check_within(out.read(), *meaning.expected(x, launch.plan.chain, out_dtype, 0.5, old))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout(xp, layout):
    x = normal(SHAPE, "float32", 1)
    result = square_norms(Placed(x, layout, xp).array, plan=IN_PARTS["float32"])
    check_within(result, *meaning.expected(x, IN_PARTS["float32"].chain, "float32"))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (4, 8), (5, 1025)])
def test_every_size(xp, shape):
    x = normal(shape, "float32", 3)
    result = square_norms(xp.asarray(x))
    check_within(result, *meaning.expected(x, plan_square_norms(*shape, "float32").chain, "float32"))


def test_rows_may_have_several_axes(xp):
    x = normal((3, 2, 5), "float32", 4)
    result = square_norms(xp.asarray(x))
    check_within(result, *meaning.expected(x, plan_square_norms(6, 5, "float32").chain, "float32"))


@pytest.mark.parametrize(("fields", "message"), [
    ({"adders": 0}, "adders must be at least 1"), ({"cols_per_part": 2.0}, "cols_per_part must be an int"),
    ({"adders": 512}, "at most 1024 threads"), ({"dtype": "int8"}, "dtype"), ({"cols": 2 ** 21}, "at most 65535 parts")
])
def test_a_plan_refuses_what_the_kernel_cannot_do(fields, message):
    with pytest.raises(densegrad.PlanError, match=message):
        replace(IN_PARTS["float32"], **fields)


def test_bad_input_is_told_as_everywhere(xp):
    x = xp.asarray(normal(SHAPE, "float32"))
    for arguments, error, message in (
            ({"x": xp.zeros((2, 3), "int32")}, densegrad.DTypeError, "x must be float16, bfloat16, float32 or float64"),
            ({"x": x, "out": xp.zeros(3, "float32")}, densegrad.ShapeError, r"out must have shape \(21,\)"),
            ({"x": x, "out": x[:, 0]}, densegrad.OutError, "out overlaps x"),
            ({"x": x, "plan": plan_square_norms(3, 3, "float32")}, densegrad.PlanError, "plan was made for rows 3")):
        with pytest.raises(error, match=message):
            square_norms(**arguments)


# -- counters


def test_its_launches_zero_the_counters_first():
    from densegrad.launches import Matrix, Result, Slot

    plan = IN_PARTS["float32"]
    source = Matrix(Slot("x"), "float32", *SHAPE, SHAPE[1], 1)
    clear, launch = launches(plan, source, Result(Matrix(Slot("out"), "float32", SHAPE[0], 1, 1, 1)))
    assert isinstance(clear, Clear)
    assert isinstance(launch, Launch)
    assert clear.room == launch.arguments.arrivals
    assert launch.arguments.partial.end <= clear.room.offset
    assert str(clear) == "zeros[6 int32](<workspace + 256>)"


def test_a_clear_counts_as_no_launch(xp):
    with recorded() as launched:
        square_norms(xp.asarray(normal(SHAPE, "float32")), plan=IN_PARTS["float32"])
    assert [launch.kernel for launch in launched] == ["square_norms"]


def prepared_in_garbage(xp, x, byte):
    """(the prepared call, its workspace), which holds this byte everywhere."""
    needed = densegrad.prepare(square_norms, x, plan=IN_PARTS["float32"]).workspace_bytes
    memory = densegrad.device.current().workspace(needed)()[0][:needed]
    memory[...] = byte
    return densegrad.prepare(square_norms, x, plan=IN_PARTS["float32"], workspace=memory), memory


@pytest.mark.parametrize("byte", [0, 1, 0x7F, 0xFF])
def test_counters_in_a_workspace_full_of_garbage(xp, byte):
    x = xp.asarray(normal(SHAPE, "float32", 4))
    ordinary = square_norms(x, plan=IN_PARTS["float32"])
    check_within(ordinary, *meaning.expected(host(x), IN_PARTS["float32"].chain, "float32"))
    prepared, memory = prepared_in_garbage(xp, x, byte)
    for again in range(3):
        prepared.result[...] = float("nan")
        assert (bits(prepared()) == bits(ordinary)).all(), again
    memory[...] = byte
    prepared.result[...] = float("nan")
    assert (bits(prepared()) == bits(ordinary)).all()


def test_without_the_zeros_it_would_be_wrong(xp):
    """What the counters hold matters: the launch alone, in a workspace of ones, ends without a result."""
    x = xp.asarray(normal(SHAPE, "float32", 4))
    prepared, _ = prepared_in_garbage(xp, x, 1)
    bound = prepared._bound
    prepared.result[...] = -1
    _, launch = prepared.launches  # a memset and a kernel, which a device queues apart
    assert isinstance(launch, Launch)
    _, loaded = bound.kept.loaded
    loaded(bound.values, bound.stream)
    assert (host(prepared.result) == -1).all()


@pytest.mark.only("gpu")
def test_counters_are_zeroed_by_each_replay(xp):
    """The memset is captured with the launches; what the workspace holds in between does not matter."""
    x = xp.asarray(normal(SHAPE, "float32", 5))
    ordinary = square_norms(x, plan=IN_PARTS["float32"])
    prepared, memory = prepared_in_garbage(xp, x, 0xFF)
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        prepared(stream=stream)
        graph = stream.end_capture()
    for byte in (0xFF, 3):
        prepared.result[...] = float("nan")
        memory[...] = byte
        xp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert (bits(prepared.result) == bits(ordinary)).all()
    graph.launch(stream)
    stream.synchronize()
    assert (bits(prepared.result) == bits(ordinary)).all()


def test_its_bits_are_the_same_whichever_block_comes_last(xp):
    x = xp.asarray(normal((16, 60), "float32", 6))
    plan = SquareNormsPlan(16, 60, "float32", cols_per_part=6)
    first = bits(square_norms(x, plan=plan)).copy()
    for _ in range(3):
        assert (bits(square_norms(x, plan=plan)) == first).all()
    total = np.zeros(16, "float32")
    for begin in range(0, 60, 6):
        total = total + host(square_norms(xp.asarray(host(x)[:, begin:begin + 6].copy())))
    assert (first == bits(total)).all()
