"""Compiling ahead: what is compiled is what calls launch, and nothing is left for them to compile."""
import os

import numpy as np
import pytest
from typer.testing import CliRunner

import densegrad
from densegrad import cache, compiler, device, warming
from densegrad.calls import recorded
from densegrad.commands import cli, kept
from densegrad.warming import Warmed, foreseen

HOPPER = 9, 0
LAYER = 40, 24, 16


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder, empty."""
    monkeypatch.setenv("DENSEGRAD_CACHE_DIR", str(tmp_path / "kernels"))
    cache._say_once.cache_clear()
    return tmp_path / "kernels"


@pytest.fixture
def run(monkeypatch):
    """A command's exit status and what it says."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        return done.exit_code, done.output

    return run


def arrays(xp, dtype, batch_axis=0, weight_layout="in_out"):
    samples, in_features, out_features = LAYER
    dz = (out_features, samples) if batch_axis else (samples, out_features)
    w = (out_features, in_features) if weight_layout == "out_in" else (in_features, out_features)
    return [xp.ones(shape, dtype) for shape in ((samples, in_features), w, dz)]


@pytest.mark.parametrize("options", [{}, {"batch_axis": 1}, {"weight_layout": "out_in"}, {"accumulate": True}],
                         ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_foreseen_is_what_calls_launch(dtype, options, xp, monkeypatch):
    """By calls of this device, arrays and all: each kernel that one launches has been foreseen, and no other."""
    where = device.current()
    monkeypatch.setattr(type(where), "loaded", lambda self, launches, place: ())
    ahead = foreseen([LAYER], [dtype], ["gelu", "cross_entropy"], where.capability(device.HOST), **options)
    of_layout = {name: value for name, value in options.items() if name != "accumulate"}
    of_axis = {name: value for name, value in of_layout.items() if name == "batch_axis"}
    x, w, dz = arrays(xp, dtype, **of_layout)
    dx, labels = xp.empty_like(x), xp.zeros(LAYER[0], "int64")
    main = "float32" if "accumulate" in options else dtype
    dw, db = xp.empty(w.shape, main), xp.empty(LAYER[2], main)
    with recorded() as launches:
        for out in (True,) if "accumulate" in options else (False, True):
            def given(*results, out=out):
                return results if out else tuple(None for _ in results)

            add = {"accumulate": "accumulate" in options}
            both = {"accumulate": ("dw", "db") if add["accumulate"] else False}
            densegrad.bias_grad(dz, **of_axis, **add, out=given(db)[0])
            densegrad.weight_grad(x, dz, **of_layout, **add, out=given(dw)[0])
            densegrad.input_grad(dz, w, **of_layout, out=given(dx)[0])
            densegrad.weight_bias_grad(x, dz, **of_layout, **both, out=densegrad.WeightBiasGrads(*given(dw, db)))
            densegrad.dense_grads(x, w, dz, **of_layout, **both, out=densegrad.DenseGrads(*given(dx, dw, db)))
            into = densegrad.OutputGrads(*given(dz, db))
            densegrad.activation_grad(dz, xp.ones_like(dz), "gelu", **of_axis, **add, out=into)
            densegrad.cross_entropy_grad(dz, labels, **of_axis, **add, out=into)
            densegrad.cross_entropy(dz, labels, **of_axis, **add, out=densegrad.LossGrads(None, *into))
            densegrad.dense_grads(x, w, dz, activation="gelu", z=xp.ones_like(dz), **of_layout, **both,
                                  out=densegrad.DenseGrads(*given(dx, dw, db)))
    launched = {compiler.key_of(launch) for launch in launches}
    assert launched == {compiler.key_of(launch) for launch in ahead}


def test_foreseeing_leaves_the_device_as_it_is():
    where = device.current()
    foreseen([LAYER], ["float32"], [], HOPPER)
    assert device.current() is where


def test_kernels_are_compiled_once_and_kept(folder):
    seen = []
    found = densegrad.warmup([(5, 1, 3)], capability=HOPPER, processes=2, watch=lambda *counts: seen.append(counts))
    assert found == Warmed(found.kernels, found.kernels)
    assert seen == [(done, found.kernels) for done in range(found.kernels + 1)]
    assert len(cache.kept()) == found.kernels
    assert all(cache.load(cache.name_of(launch, HOPPER)) for launch in foreseen([(5, 1, 3)], ["float32"], [], HOPPER))
    assert densegrad.warmup([(5, 1, 3)], capability=HOPPER) == Warmed(found.kernels, 0)


@pytest.mark.only("gpu")
def test_after_warming_up_calls_compile_nothing(folder, xp, monkeypatch):
    where = device.current()
    monkeypatch.setattr(warming, "_compile", lambda launches, capability, processes, watch: [
        cache.code_of(launch, capability) for launch in launches])  # in this process, whose machine code this lane runs
    densegrad.warmup([LAYER], activations=["relu"])
    monkeypatch.setattr(where, "_functions", type(where._functions)())
    monkeypatch.setattr(densegrad.calls, "_kept", type(densegrad.calls._kept)())
    monkeypatch.setattr(compiler, "library_of", lambda *of: pytest.fail("compiled in spite of warming up"))
    x, w, dz = arrays(xp, "float32")
    assert densegrad.dense_grads(x, w, dz).db.tolist() == [40] * 16
    assert densegrad.activation_grad(dz, dz, "relu").db.tolist() == [40] * 16


@pytest.mark.parametrize(("layers", "options", "error", "words"), [
    ([(1, 2)], {}, ValueError, r"a layer must be three sizes"),
    ([(1, 2, 0)], {}, ValueError, r"each at least 1; got \(1, 2, 0\)"),
    ([LAYER], {"dtypes": ["float8"]}, ValueError, "dtypes must be float16, .*got 'float8'"),
    ([LAYER], {"activations": ["reglu"]}, ValueError, "activation must be one of identity, relu"),
    ([LAYER], {"capability": (7, 0)}, densegrad.DeviceError, "compute capability 7.5 or newer; got 7.0"),
    ([LAYER], {"capability": (9, 9)}, RuntimeError, "was not compiled: ValueError: the compiler that is installed"),
], ids=["two", "none", "dtype", "activation", "old", "unknown"])
def test_what_cannot_be_compiled_is_refused(layers, options, error, words, folder):
    with pytest.raises(error, match=words):
        densegrad.warmup(layers, **{"capability": HOPPER, **options})
    assert cache.kept() == []


def test_without_a_folder_nothing_is_compiled(monkeypatch):
    monkeypatch.setenv("DENSEGRAD_CACHE_DIR", "")
    with pytest.raises(RuntimeError, match="no folder to keep kernels in"):
        densegrad.warmup([LAYER], capability=HOPPER)


def test_kernels_that_cannot_be_kept_are_no_success(folder, monkeypatch):
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(warming, "_WORKER", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99)); "
                        + warming._WORKER)
    with pytest.raises(RuntimeError, match="could not be kept"):
        densegrad.warmup([(5, 1, 3)], capability=HOPPER, processes=1)


def test_a_process_that_ends_is_said(folder, monkeypatch):
    monkeypatch.setattr(warming, "_WORKER", "")
    with pytest.raises(RuntimeError, match="the process that compiled it ended"):
        densegrad.warmup([LAYER], capability=HOPPER)


@pytest.mark.only("simulator")
def test_without_a_gpu_the_capability_must_be_said(folder, run):
    with pytest.raises(densegrad.DeviceError, match="pass capability="):
        densegrad.warmup([LAYER])
    assert run("warmup", "1,2,3") == (1, "error: --cc must say which GPU kernels are compiled for where there is none, "
                                         "such as --cc 9.0\n")


# -- commands


def test_the_commands_warm_up_show_and_clear(folder, run, tmp_path):
    listed = tmp_path / "layers.txt"
    listed.write_text("# the last one\n5, 1, 3\n\n")
    status, said = run("warmup", "--layers", listed, "--cc", "9.0")
    kernels = len(cache.kept())
    assert (status, kernels > 2) == (0, True)
    assert f"{kernels} kernels are ready, of which {kernels} had to be compiled." in said
    assert run("warmup", "5,1,3", "--cc", "9.0")[1].endswith(f"{kernels} kernels are ready, of which 0 had to be "
                                                              "compiled.\n")
    size = sum(file.bytes for file in cache.kept())
    shown = run("cache")[1]
    assert [line.split() for line in shown.splitlines()] == [
        ["folder", str(folder)], ["kernels", str(kernels)],
        ["bytes", f"{size:,}", "of", "at", "most", f"{cache.MOST_BYTES:,}"]]
    assert f"{kernels} kernels, {size:,} bytes in {folder}" in run("info")[1]
    assert run("cache", "--clear") == (0, f"Removed {kernels} kernels, {size:,} bytes.\n")
    assert os.listdir(folder) == []


def test_without_a_folder_the_commands_say_so(run, monkeypatch):
    monkeypatch.setenv("DENSEGRAD_CACHE_DIR", "")
    assert "none, as DENSEGRAD_CACHE_DIR is empty" in run("cache")[1]
    assert "none, as DENSEGRAD_CACHE_DIR is empty" in run("info")[1]


@pytest.mark.parametrize("words", ["1,2", "1,2,3,4", "a,b,c", "0,1,1", "1,2,-3", "1,2,²", ""])
def test_a_layer_is_three_sizes(words):
    with pytest.raises(ValueError, match="a layer must be S,D,M"):
        kept.layer_of(words)


def test_layers_are_asked_for(run, folder):
    status, said = run("warmup", "--cc", "9.0")
    assert status == 1
    assert said.startswith("error: no layers: give S,D,M")
    assert np.array_equal(kept.layer_of(" 1, 2,3"), (1, 2, 3))
