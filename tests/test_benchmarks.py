"""The benchmark scripts: that they run to their end, never time what is wrong, and keep their rows."""
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import densegrad
from benchmarks import host, operations, peers, records, run, timing
from benchmarks.operations import Case

ROOT = Path(__file__).parents[1]


class StubClock:
    """A clock on which a sample takes a microsecond of the GPU and ten of Python; the first `late` come too late."""

    l2_bytes, device = 4096, "0"

    def __init__(self, late=0):
        self.host, self.gpu, self.late, self.occupied = 0.0, 0.0, late, []

    def now(self):
        self.host += 1e-5
        return self.host

    def occupy(self, seconds):
        self.occupied.append(seconds)

    def mark(self):
        self.gpu += 1e-6
        return self.gpu

    def passed(self, mark):
        self.late -= 1
        return self.late >= 0

    def seconds(self, start, end):
        return end - start


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Run benchmarks.run with a stub clock on one small shape; its status and its rows."""
    monkeypatch.setattr(run, "ROOF_SIZE", 32)
    monkeypatch.setattr(timing, "QUICK", timing.Effort(warm_up=1e-5, sample=2e-6, samples=3, calls=2))
    (tmp_path / "shapes.csv").write_text("S,D,M\n70,33,20\n")

    def measured(*options):
        places = "--shapes", str(tmp_path / "shapes.csv"), "--out", str(tmp_path / "out")
        status = run.main(["--quick", *places, *options], StubClock())
        (path,) = (tmp_path / "out").glob("*.csv")
        return status, records.read(path)

    return measured


def parted(call):
    def prepare(case, arrays):
        return lambda: call(arrays)
    return prepare


@pytest.fixture
def peer(monkeypatch):
    """Register a peer for one test."""
    def register(name, call, operation="bias_grad", requires=()):
        made = peers.Implementation(name, (operation,), requires, parted(call))
        monkeypatch.setattr(run, "IMPLEMENTATIONS", [*run.IMPLEMENTATIONS, made])
    return register


@pytest.mark.only("gpu")
def test_every_operation_is_timed_with_its_peers(bench):
    status, rows = bench("--dtype", "float32")
    assert status == 0
    assert not [row["remark"] for row in rows if row["remark"]]
    timed = {(row["operation"], row["implementation"]) for row in rows}
    assert timed >= {(name, who) for name in operations.OPERATIONS for who in ("densegrad", "CuPy")}
    assert timed >= {("weight_grad", "naive"), ("weight_grad", "shared tiles"), ("roof", "device copy"),
                     ("roof", "cuBLAS")}
    for row in rows:
        assert float(row["median_us"]) > 0
        assert float(row["roof"]) > 0
        assert (row["operation"] == "roof") == (row["worst_error_over_bound"] == "")
        assert ("Plan(" in row["plan"]) == (row["implementation"] == "densegrad")


@pytest.mark.only("gpu")
def test_what_is_wrong_or_fails_is_a_row_without_a_time(bench, peer):
    def wrong(arrays):
        return (arrays["dz"].sum(axis=0) * 1.001,)

    peer("careless", wrong)
    _, rows = bench("--op", "bias_grad", "--peers", "careless")
    row = next(row for row in rows if row["implementation"] == "careless")
    assert row["remark"].startswith("wrong: an error of ")
    assert (row["median_us"], row["host_us"]) == ("", "")


@pytest.mark.only("gpu")
def test_a_peer_is_added_in_one_place_and_may_fail(bench, peer):
    def out_of_order(arrays):
        raise RuntimeError("no such\nepilogue")

    peer("mine", out_of_order)
    peer("not installed", out_of_order, requires=("no_such_package",))
    status, rows = bench("--op", "bias_grad", "--peers", "mine", "not installed")
    assert status == 0
    remarks = {row["implementation"]: row["remark"] for row in rows}
    assert remarks["mine"] == "failed: RuntimeError: no such epilogue"
    assert "not installed" not in remarks


@pytest.mark.only("gpu")
def test_an_operation_is_added_in_one_place(bench, monkeypatch):
    monkeypatch.setattr(densegrad, "another_grad", densegrad.input_grad, raising=False)
    monkeypatch.setitem(operations.OPERATIONS, "another_grad", operations.Operation(("dz", "w"), ("dx",)))
    _, rows = bench("--op", "another_grad", "--peers")
    (row,) = [row for row in rows if row["operation"] == "another_grad"]
    assert row["implementation"] == "densegrad"
    assert float(row["worst_error_over_bound"]) <= 1


@pytest.mark.only("gpu")
def test_running_again_replaces_equal_rows(bench):
    _, first = bench("--op", "bias_grad", "--peers")
    _, again = bench("--op", "bias_grad", "--peers")
    assert len(again) == len(first)
    _, more = bench("--op", "bias_grad", "--peers", "--dtype", "float64")
    assert len(more) == len(first) + 3  # cuBLAS, and both orientations


@pytest.mark.only("gpu")
def test_an_interrupt_keeps_the_rows_so_far(bench, monkeypatch):
    whole, seen = run.Bench.measure, []

    def measure(self, case, implementations):
        if seen:
            raise KeyboardInterrupt
        seen.append(case)
        whole(self, case, implementations)

    monkeypatch.setattr(run.Bench, "measure", measure)
    status, rows = bench("--op", "bias_grad", "--peers")
    assert status == 130
    assert [row["operation"] for row in rows] == ["roof", "roof", "bias_grad"]


@pytest.mark.only("simulator")
def test_without_a_gpu_run_names_what_runs_instead(capsys):
    assert run.main([]) == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for module in ("counted", "host", "simulator"):
        assert f"python -m benchmarks.{module}" in said


def test_shapes_that_are_wrong_are_refused(tmp_path, capsys):
    path = tmp_path / "shapes.csv"
    for text in ("S,D\n1,2\n", "S,D,M\n1,2,x\n", "S,D,M\n1,2,0\n", "S,D,M\n"):
        path.write_text(text)
        assert run.main(["--shapes", str(path)]) == 2
        assert "error: " in capsys.readouterr().err
    assert run.main(["--shapes", "round"]) == 2
    assert "layers, tall, square or a CSV file" in capsys.readouterr().err


def test_tf32_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert run.main([]) == 2
    assert "TF32" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["run", "counted", "host", "simulator"])
def test_help_reads(module):
    found = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", "--help"], cwd=ROOT, capture_output=True,
                           text=True, timeout=60)
    assert found.returncode == 0
    assert f"usage: python -m benchmarks.{module}" in found.stdout


# What is measured


def test_every_error_is_held_to_its_bound():
    case = Case("weight_grad", 40, 5, 3, "float32")
    data = case.data()
    exact = data["x"].astype(float).T @ data["dz"].astype(float)
    assert case.worst("dw", exact.astype("float32"), data, None) < 1
    assert case.worst("dw", exact.astype("float32"), data, 1) < 1
    for wrong in (exact * 1.0001, np.where(np.arange(15).reshape(5, 3) == 14, np.nan, exact), exact[:4], exact.T):
        assert case.worst("dw", wrong, data, None) > 1
    assert case.worst("dw", exact * 1.0001, data, None) == pytest.approx(1.0001e-4 / 41 / 2 ** -24, rel=1)


def test_large_results_are_checked_at_rows_from_the_first_to_the_last(monkeypatch):
    monkeypatch.setattr(operations, "CHECKED_PRODUCTS", 100)
    case = Case("input_grad", 1000, 4, 3, "float32")
    data = case.data()
    dx = (data["dz"] @ data["w"].T).astype("float32")
    assert case.worst("dx", dx, data, None) < 1
    for row in (0, 63, 999, 936):
        wrong = dx.copy()
        wrong[row, 3] += 1
        assert case.worst("dx", wrong, data, None) > 1
    assert len(operations.checked_rows(1000)) <= operations.CHECKED_ROWS
    assert operations.checked_rows(5).tolist() == [0, 1, 2, 3, 4]


def test_the_least_traffic_of_a_case():
    assert Case("dense_grads", 7, 5, 3, "float16").bytes == 2 * (2 * 7 * 5 + 2 * 5 * 3 + 7 * 3 + 3)
    assert Case("dense_grads", 7, 5, 3, "float16").flops == 2 * 2 * 7 * 5 * 3 + 7 * 3
    assert Case("bias_grad", 7, 1, 3, "float64", "features first").data()["dz"].shape == (3, 7)


def test_what_does_not_depend_on_the_inputs_is_measured_once():
    found = list(operations.cases(["bias_grad", "weight_grad"], ((8, 2, 3), (8, 4, 3)), ["float32"]))
    assert [case.operation for case in found].count("bias_grad") == 2  # one for each orientation
    assert [case.operation for case in found].count("weight_grad") == 2


# Timing


def test_a_sample_that_was_queued_too_late_is_taken_again_behind_more_work():
    clock, timed = StubClock(late=2), timing.Timed(calls=3)
    timing.sample(clock, timed, [lambda: None])
    assert len(timed.gpu) == 1
    assert not timed.waited
    assert clock.occupied == sorted(clock.occupied)
    assert len(clock.occupied) == 3
    timing.sample(StubClock(late=9), timed, [lambda: None])
    assert timed.waited


def test_samples_go_round_the_buffers():
    seen = []
    timing.sample(StubClock(), timing.Timed(calls=5), [lambda n=n: seen.append(n) for n in range(3)])
    assert seen == [0, 1, 2, 0, 1]


def test_implementations_take_turns():
    assert list(timing.interleaved("abc", 2)) == ["a", "b", "c", "b", "c", "a"]


def test_quantiles_lie_between_samples():
    timed = timing.Timed(1, gpu=[5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert [timed.quantile(share) for share in (0, 0.2, 0.5, 1)] == [1, 2, 3.5, 6]


# Rows


def test_rows_replace_those_of_equal_keys_in_their_places(tmp_path):
    path = tmp_path / "rows.csv"
    records.write(path, [{"name": "a", "value": 1}, {"name": "b", "value": 2}])
    new = [{"name": "c", "value": 3}, {"name": "a", "value": 4, "more": "x"}]
    records.write(path, records.replaced(records.read(path), new, ["name"]))
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [["name", "value", "more"], ["a", "4", "x"], ["b", "2", ""], ["c", "3", ""]]
    assert [item.name for item in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.only("simulator")
def test_python_is_timed_where_there_is_no_gpu(capsys):
    assert host.main(["--rounds", "3", "--repeats", "2", "--dry"]) == 0
    said = capsys.readouterr().out
    assert "bias_grad(dz)" in said
