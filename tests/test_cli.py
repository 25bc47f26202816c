"""The command line, run in this process on the lane's device, or in its own where start-up is what is tested."""
import dataclasses
import io
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import densegrad
from densegrad import accumulator, device, reference
from densegrad.commands import checks, cli, demo, explain, picture, streamed

ROOT = Path(__file__).parent.parent
COMMANDS = ("demo", "grads", "explain", "info", "check", "ptx", "tune")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


def run_alone(*arguments, **more):
    """A process that has not been told about the simulator."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"} | more
    return subprocess.run([sys.executable, "-m", "densegrad", *map(str, arguments)], env=environment, check=False,
                          capture_output=True, text=True, encoding=more.get("PYTHONIOENCODING", "utf-8"), timeout=120)


def assert_one_line_error(result, *words):
    assert result.exit_code == 1
    remarks = ("Running on", "NUMBA_ENABLE_CUDASIM is set")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(remarks)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    examples = result.output.split("Examples:")[1]
    assert f"densegrad {command}" in examples


def test_help_lists_every_command():
    result = run("--help")
    for command in COMMANDS:
        assert f" {command} " in result.output


# grads


@pytest.fixture
def layer(tmp_path):
    draw = np.random.default_rng(3)
    arrays = {name: draw.integers(-4, 5, shape).astype(np.float32) for name, shape in
              (("x", (6, 3)), ("w", (3, 5)), ("dz", (6, 5)))}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    return arrays


def test_grads_of_integers_are_exact(layer, tmp_path):
    result = run("grads", "--x", tmp_path / "x.npy", "--w", tmp_path / "w.npy", "--dz", tmp_path / "dz.npy",
                 "--out", tmp_path / "out.npz")
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "out.npz") as out:
        assert sorted(out) == ["db", "dw", "dx"]
        np.testing.assert_array_equal(out["db"], reference.bias_grad(layer["dz"]))
        np.testing.assert_array_equal(out["dw"], reference.weight_grad(layer["x"], layer["dz"]))
        np.testing.assert_array_equal(out["dx"], reference.input_grad(layer["dz"], layer["w"]))
        assert out["dw"].dtype == np.float32


def test_grads_of_a_transposed_upstream_without_weights(layer, tmp_path):
    np.save(tmp_path / "dz_t.npy", layer["dz"].T)
    result = run("grads", "--x", tmp_path / "x.npy", "--dz", tmp_path / "dz_t.npy", "--batch-axis", 1,
                 "--weight-layout", "out_in", "--out", tmp_path / "out.npz")
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "out.npz") as out:
        assert sorted(out) == ["db", "dw"]
        np.testing.assert_array_equal(out["db"], reference.bias_grad(layer["dz"]))
        np.testing.assert_array_equal(out["dw"], reference.weight_grad(layer["x"], layer["dz"]).T)


def test_grads_compensates_where_asked(layer, tmp_path):
    layer["dz"][:] = np.array([[1e8], [1], [0], [0], [0], [-1e8]], "float32")
    np.save(tmp_path / "dz.npy", layer["dz"])
    for options, expected in (((), 0), (("--compensated",), 1)):
        out = tmp_path / "out.npz"
        result = run("grads", "--x", tmp_path / "x.npy", "--dz", tmp_path / "dz.npy", "--out", out, "--force", *options)
        assert result.exit_code == 0, result.output
        with np.load(out) as written:
            assert sorted(written) == ["db", "dw"]
            np.testing.assert_array_equal(written["db"], np.full(5, expected))


@pytest.mark.parametrize("options", [(), ("--batch-axis", 1), ("--weight-layout", "out_in"), ("--compensated",)])
def test_grads_in_little_memory_have_the_accumulators_bits(options, layer, tmp_path, monkeypatch):
    monkeypatch.setattr(accumulator, "BLOCK_BYTES", 2 * 4 * (layer["x"].shape[1] + layer["dz"].shape[1]))
    if "--batch-axis" in options:
        np.save(tmp_path / "dz.npy", layer["dz"].T)
    if "out_in" in options:
        np.save(tmp_path / "w.npy", layer["w"].T)
    result = run("grads", "--x", tmp_path / "x.npy", "--w", tmp_path / "w.npy", "--dz", tmp_path / "dz.npy",
                 "--out", tmp_path / "out.npz", "--memory", "1MB", *options)
    assert result.exit_code == 0, result.output
    one_call = densegrad.dense_grads(layer["x"], layer["w"], layer["dz"])
    with np.load(tmp_path / "out.npz") as out:
        assert list(out) == ["dx", "dw", "db"]
        np.testing.assert_array_equal(out["dx"], one_call.dx)  # of integers, which are exact in any order
        np.testing.assert_array_equal(out["dw"], one_call.dw.T if "out_in" in options else one_call.dw)
        np.testing.assert_array_equal(out["db"], one_call.db)
    for name in ("dx", "dw", "db"):
        largest = re.search(rf"{name} +\(.*float32 +([\d.]+)", result.output)[1]
        assert float(largest) == np.abs(getattr(one_call, name)).max()


@pytest.mark.parametrize("memory", [(), ("--memory", "100MB")])
def test_one_gradient_alone_is_an_array_file(memory, layer, tmp_path):
    command = ("grads", "--x", tmp_path / "x.npy", "--w", tmp_path / "w.npy", "--dz", tmp_path / "dz.npy", *memory)
    for name in ("dx", "dw", "db"):
        result = run(*command, "--need", name, "--out", tmp_path / f"{name}.npy")
        assert result.exit_code == 0, result.output
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"),
                                      getattr(densegrad.dense_grads(layer["x"], layer["w"], layer["dz"]), name))
    assert_one_line_error(run(*command, "--out", tmp_path / "all.npy"), "can hold one array", "dx, dw, db", "--need")
    assert_one_line_error(run(*command[:3], *command[5:], "--need", "dx", "--out", tmp_path / "x.npz"), "w must be")
    assert not (tmp_path / "all.npy").exists()


@pytest.mark.parametrize(("words", "size"), [("300MB", 300_000_000), ("2 GiB", 2**31), ("500000", 500_000),
                                             ("1.5k", 1500)])
def test_sizes_are_read(words, size):
    assert streamed.bytes_of(words) == size


@pytest.mark.parametrize("words", ["much", "-3MB", "3XB", ""])
def test_what_is_no_size_is_refused(words, layer, tmp_path):
    result = run("grads", "--x", tmp_path / "x.npy", "--dz", tmp_path / "dz.npy", "--out", tmp_path / "out.npz",
                 "--memory", words)
    assert_one_line_error(result, "--memory must be a number of bytes, for example 300MB")


def test_too_little_memory_is_an_error_that_names_what_is_needed(layer, tmp_path):
    command = ("grads", "--x", tmp_path / "x.npy", "--dz", tmp_path / "dz.npy", "--out", tmp_path / "out.npz",
               "--memory")
    result = run(*command, "1kB")
    assert_one_line_error(result, "--memory must be at least", "blocks", "sums", "whatever the limit")
    assert not (tmp_path / "out.npz").exists()
    needed = re.search(r"at least ([\d.]+MB)", result.stderr)[1]
    assert run(*command, needed).exit_code == 0


def test_grads_in_little_memory_that_fail_half_way_leave_nothing(layer, tmp_path, monkeypatch):
    monkeypatch.setattr(accumulator, "BLOCK_BYTES", 2 * 4 * (layer["x"].shape[1] + layer["dz"].shape[1]))
    add = accumulator.GradientAccumulator.add

    def fails(self, *arguments, **options):
        if self.samples:
            raise OSError(5, "Input/output error")
        return add(self, *arguments, **options)

    monkeypatch.setattr(accumulator.GradientAccumulator, "add", fails)
    before = sorted(tmp_path.iterdir())
    assert_one_line_error(run("grads", "--x", tmp_path / "x.npy", "--w", tmp_path / "w.npy", "--dz",
                              tmp_path / "dz.npy", "--out", tmp_path / "out.npz", "--memory", "1MB"), "Input/output")
    assert sorted(tmp_path.iterdir()) == before


def test_grads_overwrites_only_by_force(layer, tmp_path):
    out = tmp_path / "out.npz"
    out.write_bytes(b"precious")
    command = ("grads", "--x", tmp_path / "x.npy", "--dz", tmp_path / "dz.npy", "--out", out)
    assert_one_line_error(run(*command), "exists", "--force")
    assert out.read_bytes() == b"precious"
    assert run(*command, "--force").exit_code == 0
    with np.load(out) as written:
        assert sorted(written) == ["db", "dw"]


@pytest.mark.only("simulator")
def test_grads_into_standard_output_are_nothing_but_the_archive(layer, tmp_path):
    command = [sys.executable, "-m", "densegrad", "grads", "--x", tmp_path / "x.npy", "--dz", tmp_path / "dz.npy",
               "--out", "/dev/stdout"]
    result = subprocess.run(command, capture_output=True, check=True, timeout=120)
    with np.load(io.BytesIO(result.stdout)) as out:
        np.testing.assert_array_equal(out["db"], reference.bias_grad(layer["dz"]))
    assert b"largest magnitude" in result.stderr


def test_grads_that_fails_half_way_leaves_nothing(layer, tmp_path, monkeypatch):
    def full_disk(entry, rows):
        entry.file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streamed.Entry, "write", full_disk)
    out = tmp_path / "out.npz"
    out.write_bytes(b"precious")
    before = sorted(tmp_path.iterdir())
    result = run("grads", "--x", tmp_path / "x.npy", "--dz", tmp_path / "dz.npy", "--out", out, "--force")
    assert_one_line_error(result, "No space left")
    assert out.read_bytes() == b"precious"
    assert sorted(tmp_path.iterdir()) == before


def test_grads_says_what_is_wrong_with_the_arrays(layer, tmp_path):
    np.save(tmp_path / "dz_t.npy", layer["dz"].T)
    result = run("grads", "--x", tmp_path / "x.npy", "--dz", tmp_path / "dz_t.npy", "--out", tmp_path / "out.npz")
    assert_one_line_error(result, "did you mean --batch-axis 1?")
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(("content", "words"), [
    (None, "No such file"),
    (b"", "not a NumPy array file"),
    (b"neither text nor array", "not a NumPy array file"),
    ("objects", "not a NumPy array file"),
    ("archive", "archive of several arrays"),
    ("integers", "dz must be float16"),
    ("bfloat16", "|V2, which is how numpy.save writes bfloat16: save array.astype('float32') instead"),
])
def test_grads_refuses_bad_files(layer, tmp_path, content, words):
    bad = tmp_path / "bad.npy"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    elif content == "objects":
        np.save(bad, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif content == "archive":
        with bad.open("wb") as file:
            np.savez(file, a=layer["x"])
    elif content == "integers":
        np.save(bad, np.ones((6, 5), np.int64))
    elif content == "bfloat16":
        np.save(bad, layer["dz"].astype(device.dtype_of("bfloat16")))
    result = run("grads", "--x", tmp_path / "x.npy", "--dz", bad, "--out", tmp_path / "out.npz")
    assert_one_line_error(result, words)
    assert not (tmp_path / "out.npz").exists()


def test_grads_speaks_of_options(layer, tmp_path):
    def of(w):
        return run("grads", "--x", tmp_path / "x.npy", "--dz", tmp_path / "dz.npy", "--w", tmp_path / w,
                   "--out", tmp_path / "out.npz")

    np.save(tmp_path / "w_t.npy", layer["w"].T)
    assert_one_line_error(of("w_t.npy"), 'did you mean --weight-layout "out_in"?')
    result = of("x.npy")
    assert_one_line_error(result, "is --batch-axis right?")
    assert "batch_axis" not in result.stderr


# explain


@pytest.fixture(scope="module")
def example():
    return explain.work_out()


@pytest.mark.parametrize("sizes", [(2, 4, 3), (1, 1, 1), (3, 2, 3), (8, 8, 8)])
def test_the_example_is_right(sizes):
    worked = explain.work_out(*sizes)
    samples, features, outputs = sizes
    assert worked.dz.shape == worked.z.shape == (samples, outputs)
    for m in range(outputs):
        assert worked.db[m] == sum(int(worked.dz[s, m]) for s in range(samples))
        for d in range(features):
            assert worked.dw[d, m] == sum(int(worked.x[s, d]) * int(worked.dz[s, m]) for s in range(samples))
    assert worked.agrees
    ElementTree.fromstring(picture.draw(worked))


def test_the_example_tells_when_one_way_disagrees(example):
    *ways, last = example.bias_ways["the kernels"]
    wrong = dataclasses.replace(last, value=last.value + np.float32([0, 0, 1]))
    broken = dataclasses.replace(example, bias_ways={**example.bias_ways, "the kernels": (*ways, wrong)})
    assert not broken.agrees
    assert "NOT ALL EQUAL" in dict(explain.pages(broken))["dL/db: add up the samples"]


def test_explain_answers_the_question(example):
    result = run("explain")
    assert result.exit_code == 0, result.output
    for words in ("dZᵀ·1", "np.sum(dz, axis=0, keepdims=True)", "np.sum(dz_t, axis=1)",
                  "densegrad.bias_grad(dz_t, batch_axis=1)", '"Sum the rows" is "sum over axis 0"',
                  "whose length is the batch size", "dL/dW = Xᵀ dZ", "All equal"):
        assert words in result.output
    numbers = " ".join(f"{int(value):2d}" for value in example.db)
    assert result.output.count(numbers) >= 8


@pytest.mark.parametrize("sizes", [(2, 4, 3), (1, 1, 1), (8, 8, 8), (2, 1, 8), (4, 1, 7), (8, 1, 1)])
def test_no_line_of_the_explanation_is_longer_than_80_signs(sizes):
    for title, body in explain.pages(explain.work_out(*sizes)):
        assert max(map(len, body.splitlines())) <= 80, title


def test_explain_says_nothing_untrue_where_sizes_are_equal():
    alone = " ".join(run("explain", "--samples", 1, "--outputs", 1).stdout.split())
    assert "which here is the same number" in alone
    for output in (alone, " ".join(run("explain", "--samples", 3, "--outputs", 3).stdout.split())):
        assert "cannot be the gradient of b" not in output
        assert "never the one whose length" not in output
    assert "never the one whose length is the number of outputs, 3." in " ".join(run("explain").stdout.split())


def test_the_picture_says_nothing_untrue_where_sizes_are_equal(example):
    def foot(of):
        return [text for text in ElementTree.fromstring(picture.draw(of)).itertext() if text.startswith("Sum the axis")]

    assert foot(example) == ["Sum the axis whose length is "]
    assert foot(explain.work_out(3, 2, 3)) == ["Sum the axis that counts the "]


def test_explain_shows_what_compensation_keeps(example):
    plain, compensated = example.rounding_ways
    assert (plain.value.item(), compensated.value.item()) == (0, 1)
    assert "compensated=True" in dict(explain.pages(example))["What rounding takes from dL/db, and how to keep it"]


def test_explain_warns_where_the_shape_cannot_tell():
    assert "the shape cannot tell" in run("explain", "--samples", 3, "--outputs", 3).output


def test_the_picture_in_the_readme_is_the_one_drawn(tmp_path):
    result = run("explain", "--svg", tmp_path / "explain.svg")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "explain.svg").read_bytes() == (ROOT / "docs" / "explain.svg").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["explain.svg"]


def test_the_picture_shows_both_orientations_with_the_same_answer(example):
    root = ElementTree.fromstring(picture.draw(example))
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for words in ("samples · axis 1", "outputs · axis 1", "dz.shape is (2, 3)", "dz_t.shape is (3, 2)",
                  "densegrad.bias_grad(dz)", "densegrad.bias_grad(dz_t, batch_axis=1)", "the same"):
        assert words in texts
    minus = "\N{MINUS SIGN}"
    bold = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")
            if element.get("font-weight") == "700" and (element.text or "").lstrip(minus).isdecimal()]
    db = [f"{int(value)}".replace("-", minus) for value in example.db]
    assert bold[:6] == db + db


# demo


def test_the_digits_are_whole():
    digits = demo.load_digits()
    labels = np.concatenate([digits.train_y, digits.test_y])
    pixels = np.concatenate([digits.train_x, digits.test_x])
    assert pixels.shape == (1797, 64)
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert pixels.astype(np.float64).sum() * 16 == 561718


def test_demo():
    result = run("demo", "--steps", 2)
    assert result.exit_code == 0, result.output
    assert result.output.count("pass") == 3
    for words in ("dW", "db", "dX", "After 2 steps:", "held-out digits", "What ran", device.current().name,
                  "CC BY 4.0"):
        assert words in result.output


def test_demo_keeps_the_steps_before_an_interruption(monkeypatch):
    right = demo.train

    def stopped(digits, steps):
        yield next(right(digits, steps))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", stopped)
    result = run("demo")
    assert result.exit_code == cli.INTERRUPTED
    assert "Interrupted. After 1 step: loss" in result.output


def test_demo_fails_if_a_gradient_is_wrong(monkeypatch):
    right = densegrad.bias_grad
    monkeypatch.setattr(densegrad, "bias_grad", lambda dz, **options: right(dz, **options) + np.float32(1e-3))
    dw, db, dx = demo.compare_gradients(demo.load_digits())
    assert dw.passed
    assert dx.passed
    assert db.share > 1
    assert db.difference_share > 1
    assert not db.passed


def test_training_learns():
    *_, last = demo.train(demo.load_digits(), 5)
    assert last.number == 5
    assert last.loss < np.log(10)
    assert last.accuracy > 0.5


# check


def test_check_passes_here(monkeypatch):
    some = checks.cases(device.current().kind, quick=True)[::5]
    monkeypatch.setattr(checks, "cases", lambda *_: some)
    result = run("check", "--quick")
    assert result.exit_code == 0, result.output
    assert f"{len(some)} of {len(some)} pass" in result.output


def test_check_covers_every_orientation_and_dtype():
    for kind in ("simulator", "gpu"):
        cases = checks.cases(kind)
        assert len(set(cases)) == len(cases)
        for function in ("weight_grad", "input_grad", "weight_bias_grad", "dense_grads"):
            covered = {(c.dtype, c.batch_axis, c.weight_layout) for c in cases if c.function == function}
            assert len(covered) == 4 * 2 * 2
        for function in ("weight_grad", "input_grad", "weight_bias_grad"):
            assert {(c.precision, c.batch_axis) for c in cases if c.function == function and c.precision} == {
                (precision, axis) for precision in ("tf32", "tf32x3") for axis in (0, 1)}
        assert not any(c.precision for c in checks.cases(kind, tensor_cores=False))
        assert {(c.dtype, c.batch_axis, c.compensated) for c in cases if c.function == "bias_grad"} == {
            (dtype, axis, compensated) for dtype in checks.ROUNDOFF for axis in (0, 1) for compensated in (False, True)}


CASE = checks.Case("bias_grad", 5, 1, 3, "float32", 0, "in_out")


def test_check_notices_a_wrong_sum(monkeypatch):
    right = densegrad.bias_grad

    def without_the_last(dz, *, out, **options):
        return right(dz[:-1], out=out, **options)

    monkeypatch.setattr(densegrad, "bias_grad", without_the_last)
    monkeypatch.setattr(checks, "cases", lambda *_: [CASE])
    assert checks.run(CASE).share > 1
    result = run("check")
    assert result.exit_code == 1
    assert "FAIL" in result.output


def test_check_notices_a_sum_that_is_not_compensated(monkeypatch):
    right = densegrad.bias_grad
    monkeypatch.setattr(densegrad, "bias_grad", lambda dz, *, compensated, **options: right(dz, **options))
    case = dataclasses.replace(CASE, samples=300, compensated=True)
    monkeypatch.setattr(checks, "cases", lambda *_: [case])
    assert checks.run(case).share > 1
    assert "bias_grad of S, D, M = 300, 1, 3, float32, axis 0, compensated: the error exceeds" in run("check").output


@pytest.mark.parametrize("asked", [None, "tf32x3"])
def test_check_notices_products_that_are_rounded_more_than_was_asked_for(monkeypatch, asked):
    right = densegrad.weight_grad
    monkeypatch.setattr(densegrad, "weight_grad",
                        lambda x, dz, *, precision=None, **options: right(x, dz, precision="tf32", **options))
    case = dataclasses.replace(CASE, function="weight_grad", samples=16, in_features=4, precision=asked)
    assert checks.run(case).share > 1
    assert checks.run(dataclasses.replace(case, precision="tf32")).passed


def test_check_notices_an_entry_that_is_not_written(monkeypatch):
    right = densegrad.bias_grad

    def forgetful(dz, *, out, **options):
        out[:-1] = right(dz, **options)[:-1]
        return out

    monkeypatch.setattr(densegrad, "bias_grad", forgetful)
    assert checks.run(CASE).error == np.inf


def test_check_notices_bits_that_differ(monkeypatch):
    right, calls = densegrad.bias_grad, []

    def restless(dz, *, out, **options):
        right(dz, out=out, **options)
        calls.append(out)
        out[0] = np.nextafter(out[0], np.float32(np.inf)) if len(calls) % 2 else out[0]
        return out

    monkeypatch.setattr(densegrad, "bias_grad", restless)
    outcome = checks.run(CASE)
    assert outcome.share <= 1
    assert not outcome.repeats
    assert not outcome.passed
    monkeypatch.setattr(checks, "cases", lambda *_: [CASE])
    assert "two runs gave different bits" in run("check").output


def test_check_keeps_the_rows_before_an_interruption(monkeypatch):
    right, started = checks.run, []

    def stopped(case):
        started.append(case)
        if len(started) == 2:
            raise KeyboardInterrupt
        return right(case)

    monkeypatch.setattr(checks, "cases", lambda *_: [CASE] * 3)
    monkeypatch.setattr(checks, "run", stopped)
    result = run("check")
    assert result.exit_code == cli.INTERRUPTED
    assert result.output.count("5, 1, 3") == 1
    assert "Interrupted after 1 of 3 cases. 1 of 1 pass" in result.output


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_widest_rows_of_check_fit(monkeypatch, columns):
    widest = [dataclasses.replace(CASE, function=case.function, samples=case.samples, in_features=case.in_features,
                                  out_features=case.out_features, dtype="bfloat16", compensated=case.compensated,
                                  weight_layout=case.weight_layout, precision=case.precision)
              for case in checks.cases("gpu")]
    monkeypatch.setattr(checks, "cases", lambda *_: widest)
    monkeypatch.setattr(checks, "run", lambda case: checks.Outcome(case, 1e-10, 1e-10, 2.0, True))
    result = CliRunner().invoke(cli.app, ["check"], env={"COLUMNS": columns})
    lines = [line.rstrip() for line in result.stdout.split("S, D, M", 1)[1].split("\n\n")[0].splitlines()[1:]]
    assert len(lines) == len(widest) + len({case.function for case in widest})
    assert all(line in {case.function for case in widest} or line.endswith("FAIL") for line in lines)
    assert max(map(len, lines)) <= 80


def test_check_goes_on_after_an_error(monkeypatch):
    def broken(dz, **options):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(densegrad, "bias_grad", broken)
    monkeypatch.setattr(checks, "cases", lambda *_: [CASE, dataclasses.replace(CASE, function="weight_grad")])
    result = run("check")
    assert result.exit_code == 1
    assert "out of luck" in result.output
    assert "1 of 2 pass" in result.output


# info, ptx, errors, start


def test_info_names_versions_and_cures(monkeypatch):
    monkeypatch.setattr(device, "gpu_missing", lambda: "CuPy is not installed")
    monkeypatch.setattr(cli, "_installed", lambda package: "" if "cupy" in package else "1.2.3")
    result = run("info")
    assert result.exit_code == 0, result.output
    for words in ("numba-cuda", "1.2.3", "simulator", "CuPy is missing", 'pip install "numba-cuda[cu13]" cupy-cuda13x'):
        assert words in result.output


def test_unknown_errors_are_one_line(monkeypatch):
    def broken(*sizes):
        raise KeyError("tile")

    monkeypatch.setattr(explain, "work_out", broken)
    assert_one_line_error(run("explain"), "KeyError", "--traceback")
    result = run("--traceback", "explain")
    assert isinstance(result.exception, KeyError)


def test_ptx_lists_and_compiles_without_a_gpu(tmp_path):
    kernels = run_alone("ptx")
    assert kernels.returncode == 0, kernels.stderr
    names = []
    for kernel in ("add_parts", "sum_strided"):
        assert kernel in kernels.stdout
        listed = run_alone("ptx", kernel)
        assert listed.returncode == 0, listed.stderr
        names += listed.stdout.split()
    assert len(set(names)) == len(names) > 10
    output = tmp_path / "kernel.ptx"
    compiled = run_alone("ptx", names[0], "--cc", "8.0", "-o", output)
    assert compiled.returncode == 0, compiled.stderr
    assert ".target sm_80" in output.read_text()
    assert ".entry" in output.read_text()
    unknown = run_alone("ptx", names[0], "--cc", "99.0")
    assert unknown.returncode == 1
    assert "no code for sm_990" in unknown.stderr


@pytest.mark.parametrize(("arguments", "words"), [
    (("--cc", "nine"), "compute capability"),
    (("no_such_kernel",), "densegrad ptx lists them"),
    (("add_part",), "did you mean add_parts-"),
])
def test_ptx_refuses(arguments, words):
    refused = run_alone("ptx", *arguments)
    assert refused.returncode == 1
    assert words in refused.stderr.splitlines()[-1]


@pytest.mark.only("simulator")
@pytest.mark.parametrize(("encoding", "arguments", "words"), [
    ("ascii", ("explain",), "features v |  2  2 |  *  samples v |"),
    ("latin-1", ("explain",), "dL/dW = X^T dZ"),
    ("ascii", ("demo", "--steps", "1"), " .#'"),
    ("ascii", ("--help",), "| explain "),
])
def test_a_terminal_without_unicode_gets_what_it_can_show(encoding, arguments, words):
    result = run_alone(*arguments, PYTHONIOENCODING=encoding, NUMBA_ENABLE_CUDASIM="1", COLUMNS="80")
    assert result.returncode == 0, result.stderr
    assert words in result.stdout
    assert "\\" not in result.stdout + result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_signs_without_a_stand_in_become_escapes(tmp_path):
    result = run_alone("grads", "--x", "\N{SNOWMAN}.npy", "--dz", "dz.npy", "--out", tmp_path / "out.npz",
                       PYTHONIOENCODING="ascii")
    assert result.returncode == 1
    assert result.stderr == "error: \\u2603.npy: No such file or directory\n"


def test_the_module_and_the_command_are_the_same():
    (entry,) = metadata.entry_points(group="console_scripts", name="densegrad")
    assert entry.load() is cli.main


def test_version():
    result = run_alone("--version")
    assert result.stdout.split() == ["densegrad", densegrad.__version__]


@pytest.mark.only("simulator")
def test_a_fresh_process_finds_its_device_and_says_so():
    result = run_alone("explain")
    assert result.returncode == 0, result.stderr
    assert "CUDA simulator" in result.stderr or "Running on" in result.stderr
    assert "All equal" in result.stdout
