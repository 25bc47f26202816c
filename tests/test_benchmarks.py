"""The benchmark scripts: that they run to their end, never time what is wrong, and keep their rows."""
import csv
import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import densegrad
from benchmarks import (
    counted,
    counting,
    host,
    operations,
    peers,
    plots,
    records,
    report,
    run,
    simulator,
    tables,
)
from benchmarks.operations import Case, Truth
from densegrad.commands import timing
from tests.stub_clock import StubClock

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Run benchmarks.run with a stub clock on one small shape; its status and its rows."""
    monkeypatch.setattr(run, "ROOF_SIZE", 32)
    monkeypatch.setattr(timing, "QUICK", timing.Effort(warm_up=5e-6, sample=2e-6, samples=1, calls=2))
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
@pytest.mark.filterwarnings("ignore:.*no current CUDA context:UserWarning")  # torch's, if a backward pass comes first
def test_every_operation_is_timed_with_its_peers(bench, monkeypatch):
    torch = importlib.util.find_spec("torch") and importlib.import_module("torch")
    fewer = [replace(one, operations=("weight_grad",)) if one.ours and "tf32" in one.name else one
             for one in run.IMPLEMENTATIONS if "torch" not in one.requires or (torch and torch.cuda.is_available())]
    monkeypatch.setattr(run, "IMPLEMENTATIONS", fewer)  # executing tensor cores takes long
    status, rows = bench("--dtype", "float32")
    assert status == 0
    cublas = not any(row["remark"] for row in rows if row["implementation"] == "cuBLAS")  # CuPy comes without it
    failed = [row for row in rows if row["remark"]]
    no_tf32 = sys.modules["cupy"].__name__ != "cupy"  # a stand-in for CuPy
    if no_tf32:
        assert failed.pop(0)["implementation"] == "cuBLAS tf32"
    assert not failed if cublas else {row["implementation"] for row in failed} <= {"cuBLAS", "CuPy"}
    timed = {(row["operation"], row["implementation"]) for row in rows}
    assert timed >= {(name, who) for name, does in operations.OPERATIONS.items()
                     if "float32" in does.dtypes and not does.in_pytorch for who in ("densegrad", "CuPy")}
    assert timed >= {("weight_grad", "densegrad tf32"), ("weight_grad", "densegrad tf32x3")}
    assert timed >= {("weight_grad", "naive"), ("weight_grad", "shared tiles"), ("roof", "device copy"),
                     ("roof", "cuBLAS")}
    for row in rows:
        if not row["remark"]:
            assert float(row["median_us"]) > 0
            unroofed = not cublas or (no_tf32 and row["implementation"].endswith(" tf32"))
            assert unroofed or float(row["roof"]) > 0
            assert (row["operation"] == "roof") == (row["worst_error_over_bound"] == "")
            assert ("Plan(" in row["plan"]) == row["implementation"].startswith("densegrad")


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
def test_results_that_another_implementation_left_behind_do_not_count(bench, peer):
    peer("idle", lambda arrays: (arrays["db"],))
    _, rows = bench("--op", "bias_grad", "--peers", "idle")
    assert {row["remark"] for row in rows if row["implementation"] == "idle"} == {
        "wrong: an error of inf times its bound; not timed"}


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
    assert len(more) == len(first) + 3  # the roof of products, and both orientations


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
    assert [row["operation"] for row in rows if row["operation"] != "roof"] == ["bias_grad"]


@pytest.mark.only("simulator")
def test_without_a_gpu_run_names_what_runs_instead(capsys):
    assert run.main([]) == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for module in ("host", "simulator"):
        assert f"python -m benchmarks.{module}" in said


def test_shapes_that_are_wrong_are_refused(tmp_path, capsys):
    path = tmp_path / "shapes.csv"
    for text in ("S,D\n1,2\n", "S,D,M\n1,2,x\n", "S,D,M\n1,2,0\n", "S,D,M\n"):
        path.write_text(text)
        assert run.main(["--shapes", str(path)]) == 2
        assert "error: " in capsys.readouterr().err
    assert run.main(["--shapes", "round"]) == 2
    assert "layers, tall, hopper, losses, square or a CSV file" in capsys.readouterr().err


def test_tf32_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert run.main([]) == 2
    assert "TF32" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["run", "counted", "host", "simulator", "report"])
def test_help_reads(module):
    found = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", "--help"], cwd=ROOT, capture_output=True,
                           text=True, timeout=60)
    assert found.returncode == 0
    assert f"usage: python -m benchmarks.{module}" in found.stdout


# What is measured


def test_every_error_is_held_to_its_bound():
    case = Case("weight_grad", 40, 5, 3, "float32")
    data = case.data()
    truth = Truth(case, data)
    exact = data["x"].astype(float).T @ data["dz"].astype(float)
    for chain in (None, 1):
        assert truth.worst("dw", exact.astype("float32"), chain) < 1
    for wrong in (exact * 1.0001, np.where(np.arange(15).reshape(5, 3) == 14, np.nan, exact), exact[:4], exact.T):
        assert truth.worst("dw", wrong, None) > 1
    assert truth.worst("dw", exact * 1.00001, 1) > truth.worst("dw", exact * 1.00001, None) > 1


@pytest.mark.parametrize(("dtype", "wrong"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_cross_entropy_is_held_to_its_bound(dtype, wrong):
    case = Case("cross_entropy_grad", 50, 1, 40, dtype)
    data = case.data()
    assert set(data["labels"]) <= set(range(40))
    truth = Truth(case, data)
    softmax = np.exp(data["z"].astype(float))
    dz = softmax / softmax.sum(axis=1, keepdims=True) - np.eye(40)[data["labels"]]
    stored = dz.astype(data["z"].dtype)
    for chain in (None, 50):
        for name, right in (("dz below cross-entropy", stored),
                            ("db below cross-entropy", stored.astype(float).sum(axis=0).astype(stored.dtype))):
            assert truth.worst(name, right, chain) < 1
            off = right.astype(float)
            off.flat[7] += wrong if name.startswith("dz") else 50 * wrong
            assert truth.worst(name, off, chain) > 1


@pytest.mark.only("simulator")
def test_our_loss_is_timed_into_results_that_are_checked():
    case = Case("cross_entropy", 24, 1, 40, "float32")
    data = case.data()
    blank = {name: np.full(operations.RESULTS[name].array.shape(*case.sizes), np.nan, "float32")
             for name in case.does.results}
    ours = next(one for one in peers.IMPLEMENTATIONS if one.name == peers.OURS)
    found = ours.prepare(case, data | blank)()
    truth = Truth(case, data)
    for (name, into), got in zip(blank.items(), found, strict=True):
        assert np.shares_memory(into, got)
        assert truth.worst(name, got, 1) < 1
        assert truth.worst(name, got * np.float32(1.001), 1) > 1


@pytest.mark.only("simulator")
@pytest.mark.parametrize("operation", peers.MAIN_GRADIENTS)
def test_main_gradients_are_timed_into_results_that_are_checked(operation):
    """Overwritten where NaN is, or added to 1; another call adds again."""
    case = Case(operation, 24, 5, 4, "bfloat16")
    data, truth = case.data(), Truth(case, case.data())
    name, = case.does.results
    main = np.full((5, 4), 1 if case.does.added else np.nan, "float32")
    ours = next(one for one in peers.IMPLEMENTATIONS if one.name == peers.OURS)
    call = ours.prepare(case, data | {name: main})
    worst, plans = run.gate(call, truth, ours)
    assert worst < 1
    assert plans
    assert truth.worst(name, main * np.float32(1.001), 24) > 1
    call()
    assert (truth.worst(name, main, 24) > 1) == case.does.added


def test_large_results_are_checked_at_rows_from_the_first_to_the_last(monkeypatch):
    monkeypatch.setattr(operations, "CHECKED_PRODUCTS", 100)
    case = Case("input_grad", 1000, 4, 3, "float32")
    data = case.data()
    truth = Truth(case, data)
    dx = (data["dz"] @ data["w"].T).astype("float32")
    assert truth.worst("dx", dx, None) < 1
    for row in (0, 63, 950, 999):
        wrong = dx.copy()
        wrong[row, 3] += 1
        assert truth.worst("dx", wrong, None) > 1
    assert len(operations.checked_rows(1000)) <= operations.CHECKED_ROWS
    assert operations.checked_rows(5).tolist() == [0, 1, 2, 3, 4]


def test_the_least_traffic_of_a_case():
    assert Case("dense_grads", 7, 5, 3, "float16").bytes == 2 * (2 * 7 * 5 + 2 * 5 * 3 + 7 * 3 + 3)
    assert Case("dense_grads", 7, 5, 3, "float16").flops == 2 * 2 * 7 * 5 * 3 + 7 * 3
    assert Case("bias_grad", 7, 1, 3, "float64", "features first").data()["dz"].shape == (3, 7)
    assert Case("cross_entropy_grad", 7, 1, 3, "float16").bytes == 2 * (2 * 7 * 3 + 3) + 8 * 7
    assert Case("cross_entropy", 7, 1, 3, "float16").bytes == 2 * (2 * 7 * 3 + 3) + 8 * 7 + 4


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


def test_the_gpus_clock_counts_events_and_fills_the_queue_with_copies():
    """With a stand-in for the part of CuPy that it uses: an event's time is the number of copies before it, in ms."""
    copies = []

    class Event:
        done = True

        def record(self):
            self.at = len(copies)

        def synchronize(self):
            pass

    runtime = SimpleNamespace(getDevice=lambda: 0, deviceGetPCIBusId=lambda device: "0000:01:00.0",
                              getDeviceProperties=lambda device: {"l2CacheSize": 1000})
    clock = timing.GpuClock(SimpleNamespace(
        cuda=SimpleNamespace(runtime=runtime, Event=Event, get_elapsed_time=lambda start, end: end.at - start.at),
        empty=lambda size, dtype: np.empty(size, dtype), copyto=lambda to, source: copies.append(to.nbytes)))
    assert (clock.device, clock.l2_bytes, set(copies)) == ("0000:01:00.0", 1000, {2000})
    start, before = clock.mark(), len(copies)
    clock.occupy(0.0045)
    assert len(copies) - before == 5
    assert clock.seconds(start, clock.mark()) == 0.005
    assert clock.passed(start)


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
def test_python_is_timed_where_there_is_no_gpu_and_kept_only_if_asked(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "RESULTS", tmp_path / "host.csv")
    assert host.main(["--rounds", "3", "--repeats", "2"]) == 0
    assert "bias_grad(dz)" in capsys.readouterr().out
    assert not host.RESULTS.exists()
    assert host.main(["--rounds", "3", "--repeats", "2", "--save"]) == 0
    assert "bias_grad(dz)" in {row["call"] for row in records.read(host.RESULTS)}


@pytest.mark.only("simulator")
def test_another_state_is_timed_in_the_same_run(capsys):
    assert host.main(["--rounds", "1", "--repeats", "1", "--beside", sys.executable, str(ROOT)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "bias_grad(dz)" in line]
    assert re.fullmatch(r"\D+" + r"[0-9.]+\D+" * 5, rows[0])
    with pytest.raises(SystemExit, match=r"--beside: .* ended with 1"):
        host.main(["--rounds", "1", "--repeats", "1", "--beside", sys.executable, str(ROOT / "docs")])


@pytest.mark.only("simulator")
def test_python_is_timed_where_neither_a_gpu_nor_the_simulator_is():
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    found = subprocess.run([sys.executable, "-m", "benchmarks.host", "--rounds", "2", "--repeats", "2"], cwd=ROOT,
                           env=environment, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (0, "")
    assert "prepared dense_grads" in found.stdout
    assert "open" in found.stdout


@pytest.mark.only("simulator")
def test_the_simulator_is_timed_and_kept_only_if_asked(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(simulator, "RESULTS", tmp_path / "simulator.csv")
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    sizes = ("--repeats", "1", "--size", "8", "8", "8")
    assert simulator.main([*sizes]) == 0
    assert "8 x 8 x 8" in capsys.readouterr().out
    assert not simulator.RESULTS.exists()
    assert simulator.main([*sizes, "--save"]) == 0
    assert [row["S"] for row in records.read(simulator.RESULTS)] == ["8"]


def test_rows_are_written_through_links(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "rows.csv").symlink_to("kept/rows.csv")
    for value in "12":
        records.write(tmp_path / "rows.csv", [{"name": "a", "value": value}])
    assert (tmp_path / "rows.csv").is_symlink()
    assert (tmp_path / "kept" / "rows.csv").read_text() == "name,value\na,2\n"
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["rows.csv"]


# Counting


NCU_REPORT = """==PROF== Connected to process 1 (/usr/bin/python)
==PROF== Disconnected from process 1
"ID","Process ID","Kernel Name","l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum","smsp__inst_executed.sum"
"","","","sector","inst"
"0","1","_ZN5cupy_4fillE","7","7"
"1","1","_ZN9densegrad7kernels9batch_sum16make_sum_strided11sum_stridedE","3,584","1,000"
"2","1","_ZN9densegrad7kernels9batch_sum16make_sum_strided11sum_stridedE","32","n/a"
"""


def test_nsight_computes_report_is_read_launch_by_launch():
    first, second = counting.launches_of(NCU_REPORT)
    assert first == dict.fromkeys(counting.METRICS, 0) | {"load_sectors": 3584, "warp_instructions": 1000}
    assert second == dict.fromkeys(counting.METRICS, 0) | {"load_sectors": 32}
    assert counting.launches_of("") == []


def test_ncu_is_asked_for_every_metric_and_its_errors_are_told(tmp_path, monkeypatch):
    """With a stand-in for ncu that keeps what it was asked and writes a report."""
    tool = tmp_path / "ncu"
    tool.write_text(f"""#!{sys.executable}
import pathlib, sys
arguments = sys.argv[1:]
pathlib.Path({str(tmp_path)!r}, "asked").write_text(" ".join(arguments))
report = pathlib.Path({str(tmp_path)!r}, "report").read_text()
pathlib.Path(arguments[arguments.index("--log-file") + 1]).write_text(report)
""")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "report").write_text(NCU_REPORT)
    profiled = counting.profile(["-m", "some.module", "--only", "a row"], "GPU 5000")
    asked = (tmp_path / "asked").read_text()
    assert asked.endswith(f"{sys.executable} -m some.module --only a row")
    assert all(metric in asked for metrics in counting.METRICS.values() for metric in metrics)
    assert profiled.source == "Nsight Compute, GPU 5000"
    assert next(profiled._report)["load_sectors"] == 3584
    (tmp_path / "report").write_text("==ERROR== ERR_NVGPUCTRPERM: no permission")
    with pytest.raises(counting.Skipped, match="no permission"):
        counting.profile([], "GPU")
    tool.unlink()
    with pytest.raises(counting.Skipped, match="not on PATH"):
        counting.profile([], "GPU")


@pytest.mark.only("gpu")
def test_a_row_has_the_same_columns_whoever_counts():
    row = next(row for row in tables.rows("batch_sum") if row.name == "(7, 4096) float32 rows")
    seen = {"load_sectors": 3584, "thread_instructions": 31, "warp_instructions": 1}
    report = dict.fromkeys(counting.METRICS, 0) | seen
    profiled = row.measure(counting.Profiled("GPU", [report]))
    assert (profiled["read"], profiled["active_lanes"], profiled["wide_loads"]) == (1, 31, None)
    assert not counting.broken(row, profiled)
    watched = row.measure(counting.Profiled("GPU", None))
    assert watched.keys() == profiled.keys()
    with pytest.raises(counting.Skipped, match="fewer launches"):
        row.measure(counting.Profiled("GPU", []))


def test_a_row_names_every_limit_that_it_misses():
    class Row:
        limits = (counting.Limit("read", most=1.05), counting.Limit("lanes", least=28), counting.Limit("wide", least=1))

    assert counting.broken(Row, {"read": 1.05, "lanes": 28, "wide": 1}) == []
    assert counting.broken(Row, {"read": 1.06, "lanes": 27.9, "wide": None}) == ["read", "lanes"]


@pytest.mark.only("simulator")
def test_without_its_tools_counted_says_what_it_needs(capsys):
    for options in ([], ["--ncu"]):
        assert counted.main(options) == 2
        assert "python -m benchmarks.counted --ncu" in capsys.readouterr().out


# The report


def test_readme_and_plots_say_what_the_rows_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


@pytest.fixture
def measured(tmp_path):
    """A file of rows as if of a GPU."""
    rows = []

    def add(operation, implementation, sizes, us, gb_per_s, tflop_per_s, **more):
        row = dict.fromkeys(run.COLUMNS, "") | dict(zip("SDM", sizes, strict=True)) | {
            "gpu": "Sum Machine 3000", "date": "2030-01-02", "cuda": "13.1", "numba_cuda": "0.30", "commit": "abc",
            "dtype": "float32", "orientation": "samples first", "operation": operation,
            "implementation": implementation, "median_us": us, "p20_us": us, "p80_us": us, "gb_per_s": gb_per_s,
            "tflop_per_s": tflop_per_s, "roof": 0.5, "host_us": 9.5, "effort": "full"}
        rows.append(row | more)

    add("roof", "device copy", (10 ** 9, "", ""), 700.0, 3000.0, 0)
    add("roof", "cuBLAS", (8192, 8192, 8192), 20_000.0, 40.0, 55.0)
    for samples in (1000, 10_000, 100_000):
        for outputs in (1, 10):
            gb_per_s = samples * outputs / 1e3
            add("bias_grad", "densegrad", (samples, 1, outputs), 4.0, gb_per_s, gb_per_s / 4000)
            add("bias_grad", "CuPy", (samples, 1, outputs), 8.0, gb_per_s / 2, gb_per_s / 8000)
    add("weight_grad", "densegrad", (4096, 4096, 4096), 2800.0, 70.0, 49.0)
    add("weight_grad", "CuPy", (4096, 4096, 4096), 2700.0, 75.0, 51.0)
    add("weight_grad", "naive", (4096, 4096, 4096), "", "", "", remark="wrong: an error of 7 times its bound")
    records.write(tmp_path / "sum-machine-3000.csv", rows)
    return tmp_path


def test_measured_rows_make_tables_and_plots(measured):
    text, made = report.section(measured, "results")
    assert "times against peers and roofs | measured | Sum Machine 3000 |" in text
    assert "3000 GB/s copied; 55.0 TFLOP/s by cuBLAS in float32" in text
    assert "| weight_grad | 4096 x 4096 x 4096 | float32 | 2800.0 (2800.0 to 2800.0) | 50% | 9.5 | CuPy 2700.0" in text
    assert "| bias_grad | 1000 x 1 | float32 |" in text
    assert "naive: wrong: an error of 7 times its bound" in text
    assert {name.rpartition("-")[2] for name in made} == {"peers.svg", "roofline.svg", "narrow.svg"}
    for name, plot in made.items():
        words = "".join(ElementTree.fromstring(plot).itertext())
        assert "Sum Machine 3000" in words
        assert f"(results/{name})" in text
        assert "prefers-color-scheme: dark" in plot


def test_a_whole_race_on_tensor_cores_has_its_means(measured):
    (path,) = measured.glob("*.csv")
    rows = records.read(path)
    row = next(dict(row) for row in rows if row["operation"] == "weight_grad")
    shapes = operations.SHAPES["hopper"]
    for place, sizes in enumerate(shapes):
        same = row | dict(zip("SDM", map(str, sizes), strict=True)) | {
            "operation": "weight_grad_added", "dtype": "float16"}
        rows += [same | {"median_us": "100.0"},
                 same | {"implementation": "PyTorch", "median_us": "50.0" if place == 1 else "120.0"}]
    records.write(path, rows)
    text, _ = report.section(measured, "results")
    assert "| weight_grad_added | float16 | 1.20 | 0.50 | 1.20 | 0.50 |" in text
    records.write(path, rows[:-1])
    assert "The race on tensor cores" not in report.section(measured, "results")[0]


def headline(operation, sizes, dtype="float32", precision=""):
    return report.Headline("dL/d?", operation, dtype, sizes, precision)


@pytest.fixture
def with_products(measured):
    """Beside them chosen plans, of which one was disturbed, and cuBLAS's times."""
    (path,) = measured.glob("*.csv")
    columns = ("operation", "kind", "layer", "S", "D", "M", "tile_rows", "tile_cols", "tile_depth", "parts", "us",
               "disturbed")
    rows = [("dw", "bfloat16", "square", 64, 64, 64, 8, 8, 8, 1, 20.0, 0),
            ("dw", "bfloat16", "down", 64, 128, 32, 8, 8, 8, 1, 900.0, 1),
            ("dw", "bfloat16", "up", 64, 32, 128, 8, 8, 8, 1, 40.0, 0),
            ("dx", "tf32x3", "up", 64, 32, 128, 8, 8, 8, 1, 30.0, 0)]
    records.write(measured / f"{path.stem}-products.csv", [dict(zip(columns, row, strict=True)) for row in rows])
    records.write(measured / f"{path.stem}-cublas.csv", [
        {"operation": "dw", "kind": "bfloat16", "layer": layer, "us": us}
        for layer, us in (("square", 10.0), ("down", 9.0), ("up", 80.0))])
    return measured


def test_the_first_look_has_the_fastest_peer_of_the_same_precision(with_products):
    (one,) = report.measured_files(with_products)
    result = report.duel(headline("bias_grad", (1000, 1, 10)), one)
    assert (result.ours, result.peer, result.theirs, result.ratio, result.python) == (4, "CuPy", 8, 2, "10/10")
    product = report.duel(headline("weight_grad", (64, 64, 64), "bfloat16"), one)
    assert (product.peer, product.ratio, product.python) == ("torch.mm", 0.5, "-")
    assert report.duel(headline("weight_grad", (64, 64, 64), precision="tf32"), one) is None


def test_peers_are_those_of_the_same_precision(measured):
    (path,) = measured.glob("*.csv")
    rows = records.read(path)
    mine, other = (dict(row) for row in rows if row["operation"] == "weight_grad" and row["median_us"])
    records.write(path, [*rows, mine | {"implementation": "densegrad tf32", "median_us": "700.0"},
                         mine | {"implementation": "densegrad tf32x3", "median_us": "2000.0"},
                         other | {"implementation": "CuPy tf32", "median_us": "600.0", "tflop_per_s": "229"}])
    text, made = report.section(measured, "results")
    assert "| 9.5 | CuPy 2700.0 (0.96 x) |" in text
    assert "| 9.5 | CuPy tf32 600.0 (0.86 x) |" in text
    assert "| 9.5 | CuPy 2700.0 (1.35 x) |" in text
    (roofline,) = (plot for name, plot in made.items() if name.endswith("roofline.svg"))
    assert "tf32" not in "".join(ElementTree.fromstring(roofline).itertext())


def test_what_was_disturbed_or_has_no_peer_is_shown_but_compares_with_nothing(with_products):
    (one,) = report.measured_files(with_products)
    assert report.duel(headline("weight_grad", (64, 128, 32), "bfloat16"), one) is None
    assert report.means(one) == "bfloat16 1.00 dL/dW"
    text, _ = report.section(with_products, "results")
    assert "| dL/dW | bfloat16 | down | 64 x 128 x 32 | 8x8x8, 1 | 900.0 (disturbed) | 0.0 | 9.0 | 0.01 x |" in text
    assert "| dL/dX | tf32x3 | up | 64 x 32 x 128 | 8x8x8, 1 | 30.0 | 0.0 | - | - |" in text


def test_the_first_look_leaves_open_what_has_no_row_and_draws_the_rest(with_products, monkeypatch):
    monkeypatch.setattr(report, "HEADLINES", {"sums": (headline("bias_grad", (1000, 1, 10)),),
                                              "products": (headline("dense_grads", (8, 8, 8)),)})
    text, made = report.first_look(with_products, "https://pictures")
    assert "| dL/d?, 1000x10, float32 | 4.0 | 8.0 (CuPy) | 2.00 | 10/10 |" in text
    assert "| dL/d?, 8x8x8, float32 | open | - | - | - |" in text
    assert "one Sum Machine 3000 (2030-01-02, commit abc, CUDA 13.1, numba-cuda 0.30)" in text
    assert "by `python -m benchmarks.run`:" in text
    ((name, plot),) = made.items()
    assert f"(https://pictures/{name})" in text
    words = "".join(ElementTree.fromstring(plot).itertext())
    assert "2.00 x (4.0 us, CuPy 8.0 us)" in words
    assert "8x8x8" not in words
    assert report.first_look(with_products / "counted", "") == ("Nothing has been measured on a GPU.\n", {})


def test_a_changed_row_or_a_lost_marker_is_noticed(measured):
    before, _ = report.section(measured, "results")
    (path,) = measured.glob("*.csv")
    path.write_text(path.read_text().replace("2800.0", "2801.0"))
    assert report.section(measured, "results")[0] != before
    with pytest.raises(ValueError, match="lacks the markers"):
        report.placed("# densegrad", before)


def test_the_report_writes_both_pages_and_their_plots_and_deletes_those_that_no_page_shows(with_products, monkeypatch):
    pages = [with_products / "README.md", with_products / "benchmarks" / "README.md"]
    pages[1].parent.mkdir()
    for page in pages:
        page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    (with_products / "stale.svg").write_text("<svg/>")
    monkeypatch.setattr(report, "ROOT", with_products)
    monkeypatch.setattr(records, "RESULTS", with_products)
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    for page in pages:
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "\nold\n" not in text
        assert "Sum Machine 3000" in text
    plots_shown = {path.name for path in with_products.glob("*.svg")}
    assert plots_shown == {f"sum-machine-3000-{name}.svg" for name in ("first-look", "narrow", "peers", "roofline")}


def test_rows_that_were_not_counted_are_said_to_be_missing(tmp_path):
    names = [row.name for row in tables.rows("batch_sum")]
    records.write(tmp_path / "counted" / "batch_sum.csv", [
        {"name": names[0], "source": "executed PTX, 9.0", "broken": ""},
        {"name": names[1], "source": "executed PTX, 9.0", "broken": "read blocks"}])
    line = next(line for line in report.holding(tmp_path) if "batch_sum" in line[0])
    assert line[1] == f"1 of {len(names)}"
    assert line[2] == f"{names[1]}: read, blocks; {len(names) - 2} not counted"


def test_a_figure_that_misses_its_limit_says_so():
    shown = counting.Shown("Table", (("name", "shape", ""), ("read", "read", ".2f")), ("a", "b", "not counted"))
    rows = {name: {"name": name, "read": "1.234", "broken": broken} for name, broken in (("a", ""), ("b", "read"))}
    assert report.counted_part(shown, rows)[-2:] == ["| a | 1.23 |", "| b | 1.23 (missed) |"]


def test_what_the_readme_shows_and_what_has_been_counted_are_rows_of_the_tables():
    for name in tables.names():
        rows, names = report.counted_rows(records.RESULTS, name), [row.name for row in tables.rows(name)]
        assert len(set(names)) == len(names)
        assert rows.keys() <= set(names)
        for shown in tables.shown(name):
            assert set(shown.rows) <= set(names)
            assert all(column in rows[row] for row in shown.rows if row in rows for column, _, _ in shown.columns)


def test_bars_are_as_long_as_their_values():
    bars = [plots.Bar("one", "us", 10, "10 %"), plots.Bar("two", "them", 20, "20 %"),
            plots.Bar("off", "us", 400, "400 %")]
    root = ElementTree.fromstring(plots.bars("Title <1>", "note & more", bars, 100, " %"))
    widths = [float(item.get("width")) for item in root.iter() if item.tag.endswith("rect")][-3:]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(10 * widths[0], abs=0.6)
    assert plots.ticks(30) == [0, 5, 10, 15, 20, 25, 30]
    assert [plots.number(value) for value in (0.1, 1000, 2.5e6)] == ["0.1", "1k", "2.5M"]


def test_rows_are_kept_as_they_are_counted_and_those_that_the_table_lost_go(tmp_path, monkeypatch):
    class Row:
        limits = (counting.Limit("read", most=1.5),)

        def __init__(self, name, value):
            self.name, self.value = name, value

        def measure(self, machine):
            if self.value is None:
                raise KeyboardInterrupt
            return {"read": self.value}

    monkeypatch.setattr(counted, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "rows", lambda name: [Row("a", 1.0), Row("b", 2.0), Row("c", None)])
    records.write(tmp_path / "some.csv", [{"name": name, "source": "PTX", "read": "9"} for name in ("lost", "c", "a")])
    with pytest.raises(KeyboardInterrupt):
        counted.count_table("some", "", SimpleNamespace(source="PTX"))
    assert [(row["name"], row["read"], row["broken"]) for row in records.read(tmp_path / "some.csv")] == [
        ("c", "9", ""), ("a", "1.0000", ""), ("b", "2.0000", "read")]
    assert counted.count_table("some", "", SimpleNamespace(source="PTX"), missing=True) == (0, 0)
