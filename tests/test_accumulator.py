"""Gradients of a batch in chunks: the bits of a plain loop over blocks, whatever the chunks; and what holds besides."""
import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest

import densegrad as dg
from benchmarks import counting
from densegrad import device, reference
from densegrad.accumulator import BLOCK_BYTES, block_samples
from densegrad.calls import recorded
from densegrad.testing import bits, check_within, error_bound, host, integers, normal

D, M, BLOCK = 10, 7, 16
DTYPES = ("float16", "bfloat16", "float32", "float64")


# In the simulator the host's memory is the device's.
@pytest.fixture(params=[pytest.param("host", marks=pytest.mark.only("gpu")), "device"])
def place(request, xp):
    """What makes the arrays of a chunk: of NumPy, or of the device's own."""
    return np.asarray if request.param == "host" else xp.asarray


def arrays(samples, dtype, seed=0):
    return tuple(normal(shape, dtype, seed + n) for n, shape in enumerate(((samples, D), (samples, M), (D, M))))


def aligned(array):
    """A copy on the host that begins where blocks of the device may."""
    memory = np.empty(array.nbytes + 256, np.uint8)
    copy = memory[-memory.ctypes.data % 256:][:array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def cuts(samples, seed):
    """Random sizes of chunks, some of them 0, that add up to the samples."""
    rng = np.random.default_rng(seed)
    points = np.sort(rng.integers(0, samples + 1, rng.integers(1, 8)))
    return np.diff(points, prepend=0, append=samples)


def looped(x, w, dz, *, need=("dw", "db"), batch_axis=0, sum_dtype=None, beside=(), **options):
    """The plain loop over blocks that the documentation prints: dx of each, dw and db of all."""
    samples, made, sums = len(x), [], None
    for start in range(0, samples, BLOCK):
        rows = slice(start, start + BLOCK)
        if sums is None:
            shape = (M, D) if options.get("weight_layout") == "out_in" else (D, M)
            dtype = sum_dtype or ("float64" if x.dtype == "float64" else "float32")
            sums = dg.DenseGrads(dw=np.empty(shape, dtype) if "dw" in need else None,
                                 db=np.empty(M, dtype) if "db" in need else None)
        names = [name for name in ("dw", "db") if name in need]
        given = {name: array[rows].copy() for name, array in dict(beside).items()}
        part = dg.dense_grads(x[rows].copy(), w, dz[rows].copy(), need=need, out=sums,
                              accumulate=names if start else (), **given, **options)
        made.append(part.dx)
    return made, sums


OPTIONS = {
    "plain": {}, "out_in": {"weight_layout": "out_in"}, "batch_axis": {"batch_axis": 1},
    "gelu": {"activation": "gelu"}, "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.3},
    "sum_dtype": {"sum_dtype": "float64"}, "tf32": {"precision": "tf32"}, "weights": {}, "mask": {}, "only dw": {},
}


def beside(name, samples, dtype):
    """What stands beside dz for these options."""
    if name == "weights":
        return {"sample_weight": np.random.default_rng(9).random(samples, "float32")}
    if name == "mask":
        return {"sample_weight": np.random.default_rng(9).random(samples) < 0.5}
    return {"z": normal((samples, M), dtype, 5)} if "activation" in OPTIONS[name] else {}


CASES = [*(("plain", dtype) for dtype in DTYPES), *((name, "float32") for name in OPTIONS if name != "plain"),
         ("out_in", "float64"), ("batch_axis", "float16"), ("gelu", "bfloat16"), ("sum_dtype", "bfloat16"),
         ("weights", "bfloat16"), ("mask", "float16")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_any_chunks_give_the_bits_of_a_loop_over_blocks(name, dtype, place):
    options = dict(OPTIONS[name])
    samples, seed = 2 * BLOCK + 5, sum(map(ord, name + dtype))
    x, dz, w = arrays(samples, dtype)
    more = beside(name, samples, dtype)
    need = ("dw",) if name == "only dw" else ("dx", "dw", "db")
    weights = w.T.copy() if options.get("weight_layout") == "out_in" else w
    plain = {key: value for key, value in options.items() if key != "batch_axis"}
    expected_dx, expected = looped(x, weights if "dx" in need else None, dz, need=need, beside=more, **plain)
    accumulator = dg.GradientAccumulator(D, M, dtype, block=BLOCK, need=need, w=place(weights), **options)
    dx, at = place(np.zeros((samples, D), dtype)), 0
    for count in cuts(samples, seed):
        rows = slice(at, at + count)
        axes = {"dz", "z"} if options.get("batch_axis") else ()
        chunk = {key: place(np.ascontiguousarray(array[rows].T if key in axes else array[rows]))
                 for key, array in {"x": x, "dz": dz, **more}.items()}
        accumulator.add(**chunk, dx=dx[rows] if "dx" in need else None)
        at += count
    found = accumulator.result()
    assert accumulator.samples == samples
    for field in ("dw", "db"):
        if field in need:
            np.testing.assert_array_equal(bits(getattr(found, field)), bits(getattr(expected, field)))
            assert isinstance(getattr(found, field), type(dx))
    assert found.dx is None
    if "dx" in need:
        np.testing.assert_array_equal(bits(dx), bits(np.concatenate(expected_dx)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_within_the_bound_of_one_call(dtype, place):
    samples = 5 * BLOCK + 3
    x, dz, _ = arrays(samples, dtype)
    accumulator = dg.GradientAccumulator(D, M, dtype, block=BLOCK)
    accumulator.add(place(x), place(dz))
    found = accumulator.result()
    wide, of_sums = (x.astype("float64"), dz.astype("float64")), found.dw.dtype.name
    exact = reference.weight_grad(*wide), reference.bias_grad(wide[1])
    sizes = reference.weight_grad(*map(np.abs, wide)), reference.bias_grad(np.abs(wide[1]))
    # A block has at most BLOCK - 1 additions in any order, and what is kept of it is rounded to the type of the sums.
    chain = BLOCK + samples // BLOCK + 1
    for result, one, size in zip((found.dw, found.db), exact, sizes, strict=True):
        check_within(result, one, error_bound(size, one, chain, samples, of_sums))


def test_compensated_sums_lose_nothing_from_block_to_block(place):
    large, samples = 2.0 ** 30, 4 * BLOCK
    dz = np.zeros((samples, M), "float32")
    dz[0], dz[BLOCK:2 * BLOCK], dz[-1] = large, 1, -large
    x = np.ones((samples, D), "float32")
    for compensated, kept in ((True, BLOCK), (False, 0)):
        accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK, compensated=compensated)
        accumulator.update((place(part), place(other))
                           for part, other in zip(np.split(x, 8), np.split(dz, 8), strict=True))
        assert (host(accumulator.result().dw) == kept).all()
        assert (host(accumulator.result().db) == kept).all()


def test_what_is_infinite_stays_so_in_compensated_sums(place):
    x, dz, _ = arrays(3 * BLOCK, "float32")
    dz[5, 0], dz[BLOCK, 1], dz[-1, 1] = np.inf, np.inf, -np.inf
    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK, compensated=True)
    accumulator.add(place(x), place(dz))
    db = host(accumulator.result().db)
    assert db[0] == np.inf
    assert np.isnan(db[1])
    assert np.isfinite(db[2:]).all()


@pytest.mark.parametrize(("features", "outputs", "compensated"), [
    (D, M, False), (D, M, True), (64, 128, False)])  # the last by Hopper's own kernel, where there is one
def test_blocks_that_are_kept_give_the_same_bits(features, outputs, compensated, place):
    x, dz = normal((4 * BLOCK + 1, features), "bfloat16"), normal((4 * BLOCK + 1, outputs), "bfloat16", 1)
    found = []
    for keep_blocks in (False, True):
        accumulator = dg.GradientAccumulator(features, outputs, x.dtype, block=BLOCK, compensated=compensated,
                                             keep_blocks=keep_blocks)
        accumulator.add(place(x), place(dz))
        found.append(accumulator.result())
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


def test_a_mean_is_the_sum_over_the_number_of_samples(place):
    x, dz = integers((3 * BLOCK, D), "float32"), integers((3 * BLOCK, M), "float32", 1)
    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK, reduction="mean")
    accumulator.add(place(x), place(dz))
    dw = reference.weight_grad(x.astype("float64"), dz.astype("float64"))
    np.testing.assert_array_equal(host(accumulator.result().dw), (dw.astype("float32") / np.float32(3 * BLOCK)))


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_an_empty_batch_gives_zeros(chunks, place):
    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK, reduction="mean")
    accumulator.update([(place(np.ones((0, D), "float32")), place(np.ones((0, M), "float32")))] * chunks)
    found = accumulator.result()
    assert (host(found.dw) == np.zeros((D, M))).all()
    assert (host(found.db) == np.zeros(M)).all()
    assert isinstance(found.db, type(place(np.ones(1)) if chunks else np.ones(1)))


def test_views_of_any_strides_are_chunks(place):
    x, dz, _ = arrays(3 * BLOCK, "float32")
    _, expected = looped(x, None, dz)
    wide = np.zeros((3 * BLOCK, 2 * D), "float32")
    wide[:, ::2] = x
    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK)
    strided, turned = place(wide)[:, ::2], place(np.asfortranarray(dz))
    accumulator.add(strided[:7], turned[:7])
    read_only = place(x)[7:]
    if isinstance(read_only, np.ndarray):
        read_only.flags.writeable = False
    accumulator.add(read_only, turned[7:])
    np.testing.assert_array_equal(bits(accumulator.result().dw), bits(expected.dw))


@pytest.mark.only("simulator")
def test_maps_of_files_and_tensors_are_chunks(tmp_path):
    x, dz, _ = arrays(3 * BLOCK, "float32")
    _, expected = looped(x, None, dz)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK)
    accumulator.add(mapped, dz)
    np.testing.assert_array_equal(bits(accumulator.result().dw), bits(expected.dw))


def test_begun_anew_it_is_as_new_and_earlier_results_stay(place):
    (x, dz, w), (_, other, _) = arrays(2 * BLOCK + 3, "float32"), arrays(2 * BLOCK + 3, "float32", 7)
    weights = place(w.copy())
    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK, w=weights)
    dx = place(np.zeros_like(x))
    accumulator.add(place(x), place(other), dx=dx)
    first = accumulator.result()
    before = bits(first.dw)
    weights *= 2  # as an optimizer does between steps
    accumulator.reset()
    accumulator.add(place(x), place(dz), dx=dx)
    second = accumulator.result()
    np.testing.assert_array_equal(bits(first.dw), before)
    np.testing.assert_array_equal(bits(second.dw), bits(looped(x, None, dz)[1].dw))
    np.testing.assert_array_equal(bits(dx), bits(np.concatenate(looped(x, 2 * w, dz, need=("dx", "dw", "db"))[0])))
    with pytest.raises(dg.AccumulatorError, match=r"it has given its result \(reset\(\) begins anew\)"):
        accumulator.add(place(x), place(dz), dx=dx)
    assert accumulator.result() is second


# Errors

def test_a_chunk_that_is_refused_changes_nothing(place):
    x, dz, _ = arrays(2 * BLOCK, "float32")
    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK)
    accumulator.add(place(x[:5]), place(dz[:5]))
    rest = place(x[5:]), place(dz[5:])
    for chunk, error, words in (
            ((rest[0], rest[1][1:]), dg.ShapeError, "samples"),
            ((rest[0][:, :-1], rest[1]), dg.ShapeError, f"x must have {D} features"),
            ((rest[0], rest[1][:, :-1]), dg.ShapeError, f"dz must have {M} features"),
            ((rest[0].astype("float64"), rest[1].astype("float64")), dg.DTypeError, "must be float32, as"),
            ((rest[0].tolist(), rest[1]), TypeError, "x must be"), ((None, rest[1]), TypeError, "x must be an array"),
            ((rest[0][None], rest[1][None]), dg.ShapeError, "2 dimensions")):
        with pytest.raises(error, match=words):
            accumulator.add(*chunk)
    for more, error, words in (({"dx": place(x[5:].copy())}, ValueError, "dx was given"),
                               ({"z": rest[1]}, TypeError, "without an activation"),
                               ({"sample_weight": place(np.ones(2 * BLOCK - 5, "float32"))}, TypeError,
                                "all chunks must be alike: those before had")):
        with pytest.raises(error, match=words):
            accumulator.add(*rest, **more)
    accumulator.add(*rest)
    np.testing.assert_array_equal(bits(accumulator.result().dw), bits(looped(x, None, dz)[1].dw))


@pytest.mark.only("gpu")
def test_chunks_lie_all_on_the_host_or_all_on_the_device(xp):
    x, dz, _ = arrays(4, "float32")
    accumulator = dg.GradientAccumulator(D, M, "float32")
    accumulator.add(x, dz)
    with pytest.raises(TypeError, match=r"NumPy, on the host\); got .*CuPy, on GPU 0"):
        accumulator.add(xp.asarray(x), xp.asarray(dz))


@pytest.mark.parametrize(("arguments", "options", "error", "words"), [
    ((D, M, "float33"), {}, dg.DTypeError, 'did you mean "float32"'),
    ((D, M, "int32"), {}, dg.DTypeError, "dtype must"), ((D, M, None), {}, dg.DTypeError, "dtype must"),
    ((D, M, "float32"), {"progress": 3}, TypeError, "progress must be a function"),
    ((-1, M, "float32"), {}, ValueError, "in_features must be an integer, 0 or more; got -1"),
    ((D, 2.5, "float32"), {}, TypeError, "out_features must be an integer"),
    ((D, M, "float32"), {"block": 0}, ValueError, "block must be an integer, 1 or more"),
    ((D, M, "float32"), {"block": True}, TypeError, "block must be"),
    ((D, M, "float32"), {"reduction": "average"}, ValueError, 'did you mean "mean"'),
    ((D, M, "float64"), {"sum_dtype": "float32"}, dg.DTypeError, "sum_dtype must be float64"),
    ((D, M, "float32"), {"need": ("dx",)}, TypeError, "w must be an array, since dx is needed"),
    ((D, M, "float32"), {"need": ()}, ValueError, "need must name some"),
    ((D, M, "float32"), {"activation": "swish"}, ValueError, 'did you mean "silu"'),
    ((D, M, "float32"), {"weight_layout": "in-out"}, ValueError, "weight_layout must be"),
    ((D, M, "float32"), {"batch_axis": 2}, ValueError, "batch_axis must be 0"),
    ((D, M, "float32"), {"precision": "fp8"}, ValueError, "precision"),
    ((D, M, "float32"), {"keep_blocks": 1}, TypeError, "keep_blocks must be"),
])
def test_options_are_checked_when_it_is_made(arguments, options, error, words):
    with pytest.raises(error, match=words):
        dg.GradientAccumulator(*arguments, **options)


def test_after_a_failure_there_is_no_half_result(place):
    x, dz, _ = arrays(3 * BLOCK, "float32")

    def fails(done):
        if done > BLOCK:
            raise KeyboardInterrupt

    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK, progress=fails)
    with pytest.raises(KeyboardInterrupt):
        accumulator.add(place(x), place(dz))
    for use in (accumulator.result, lambda: accumulator.add(place(x), place(dz))):
        with pytest.raises(dg.AccumulatorError, match="part of a chunk is missing"):
            use()


@pytest.mark.parametrize("keep_blocks", [False, True])
def test_after_an_interrupted_result_there_is_none(keep_blocks, place, monkeypatch):
    x, dz, _ = arrays(BLOCK + 3, "float32")
    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK, keep_blocks=keep_blocks)
    accumulator.add(place(x), place(dz))
    with monkeypatch.context() as patched:
        patched.setattr(dg.GradientAccumulator, "_compute", lambda *arguments: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            accumulator.result()
    with pytest.raises(dg.AccumulatorError, match="taking its result was interrupted"):
        accumulator.result()


def test_progress_is_told_after_every_block(place):
    x, dz, _ = arrays(2 * BLOCK + 3, "float32")
    told = []
    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK, progress=told.append)
    accumulator.add(place(x), place(dz))
    assert told == [BLOCK, 2 * BLOCK]
    accumulator.result()
    assert told == [BLOCK, 2 * BLOCK, 2 * BLOCK + 3]


def test_an_exception_leaves_nothing_behind(place):
    x, dz, _ = arrays(BLOCK + 3, "float32")
    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK)
    held = []

    def fails():
        with accumulator:
            accumulator.add(place(x), place(dz))
            held.extend(map(weakref.ref, [*accumulator._staging.rows().values(), accumulator._staging]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    gc.collect()
    assert [one() for one in held] == [None] * 3
    for use in (accumulator.result, accumulator.reset, lambda: accumulator.add(place(x), place(dz))):
        with pytest.raises(dg.AccumulatorError, match=r"it is closed \(make a new one\)"):
            use()


# Blocks and memory

@pytest.mark.parametrize(("features", "outputs", "dtype", "samples"), [
    (4096, 4096, "float32", 1024), (4096, 4096, "bfloat16", 2048), (768, 3072, "float32", 2048),
    (1, 1, "float64", 2**21), (2**26, 1, "float32", 1), (0, 0, "float32", 2**23)])
def test_a_block_follows_from_the_layer_and_the_dtype_alone(features, outputs, dtype, samples):
    assert block_samples(features, outputs, dtype) == samples
    row = (features + outputs) * np.dtype("float16" if dtype == "bfloat16" else dtype).itemsize
    assert samples == 1 or samples * row <= BLOCK_BYTES
    assert dg.GradientAccumulator(D, M, "float32").block == block_samples(D, M, "float32")
    assert f"in blocks of {block_samples(D, M, 'float32')} " in repr(dg.GradientAccumulator(D, M, "float32"))


def test_whole_blocks_on_the_device_are_read_where_they_are(xp, monkeypatch):
    monkeypatch.setattr(dg.GradientAccumulator, "_flush", None)  # which sends what was copied
    rows = 64  # of 256 bytes, so that blocks begin at multiples of that
    memory = device.current().staging(2 * rows, {"x": ((64,), "float32"), "dz": ((64,), "float32")}, False).rows()
    memory["x"][...], memory["dz"][...] = xp.asarray(normal((2 * rows, 64), "float32")), 1
    accumulator = dg.GradientAccumulator(64, 64, "float32", block=rows)
    accumulator.add(memory["x"], memory["dz"])
    assert accumulator.samples == 2 * rows
    expected = host(memory["x"]).sum(axis=0, dtype="float64")
    np.testing.assert_allclose(host(accumulator.result().dw)[:, 0], expected, 1e-4, 1e-4)


@pytest.mark.parametrize("other", ["address", "gap", "order"])
def test_blocks_that_lie_otherwise_are_copied_once(other, xp, monkeypatch):
    sent, flush = [], dg.GradientAccumulator._flush
    monkeypatch.setattr(dg.GradientAccumulator, "_flush", lambda self, *arguments: (sent.append(self._filled),
                                                                                     flush(self, *arguments)))
    rows, fields = 64, {"x": ((64 + 4 * (other == "gap"),), "float32"), "dz": ((64,), "float32")}
    memory = device.current().staging(3 * rows, fields, False).rows()
    x, dz = memory["x"][:2 * rows, :64], memory["dz"][:2 * rows]
    if other == "address":
        x = memory["x"].reshape(-1)[4:4 + x.size].reshape(x.shape)
    x[...], dz[...] = 1, 1
    if other == "order":
        x = xp.asfortranarray(x)
    accumulator = dg.GradientAccumulator(64, 64, "float32", block=rows)
    accumulator.add(x, dz)
    assert sent == [rows, rows]
    assert (host(accumulator.result().dw) == 2 * rows).all()


@pytest.mark.only("gpu")
def test_the_next_chunk_is_copied_while_this_one_is_added(xp):
    machine = counting.machine() and sys.modules["rehearsal"].machine()
    if machine is None:
        return  # only the stand-in of a device tells what was queued
    x, dz = (aligned(array) for array in arrays(4 * BLOCK, "float32")[:2])
    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK)
    accumulator.add(x[:BLOCK], dz[:BLOCK])
    machine.transfers.clear(), machine.waits.clear(), machine.synchronised.clear()
    launched = len(machine.launches)
    accumulator.add(x[BLOCK:2 * BLOCK], dz[BLOCK:2 * BLOCK])
    copies = {one.stream for one in machine.transfers}
    assert [one.kind for one in machine.transfers] == ["HtoD", "HtoD"]
    assert all(one.asynchronous for one in machine.transfers)
    launches = {one.stream for one in machine.launches[launched:]}
    assert len(copies) == len(launches) == 1
    assert copies != launches
    # The launches wait for the copies, and these for nothing: their block is another one than that of the sums before.
    assert machine.waits == [(*launches, *copies)]
    assert not machine.synchronised
    accumulator.add(x[2 * BLOCK:3 * BLOCK], dz[2 * BLOCK:3 * BLOCK])
    # The third block is copied into the memory of the first, when its copy has been made and its sums have been added.
    assert machine.waits[1:] == [(*copies, *launches), (*launches, *copies)]
    assert [one.kind for one in machine.synchronised] == ["event"]


def test_a_block_is_added_in_the_launches_of_overwriting(place):
    x, dz, _ = arrays(3 * BLOCK, "float32")
    accumulator = dg.GradientAccumulator(D, M, "float32", block=BLOCK)
    counted = []
    for start in range(0, 3 * BLOCK, BLOCK):
        with recorded() as launches:
            accumulator.add(place(x[start:start + BLOCK]), place(dz[start:start + BLOCK]))
        counted.append([one.kernel for one in launches])
    assert counted[0] == counted[1] == counted[2] != []


LARGE = """
import sys
import numpy as np
from densegrad import device
device.Simulator.loaded = lambda self, launches, place: ()  # what would take days; memory is taken as ever

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

import densegrad as dg
from densegrad.commands import cli
from typer.testing import CliRunner
folder, samples, features = sys.argv[1], 2**19, 1024
small = np.ones((8, features), "float32")
dg.GradientAccumulator(features, features, "float32", block=8).add(small, small)
before, most = anonymous(), 0

def look(done):
    global most
    most = max(most, anonymous() - before)

x, dz = (np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("x", "dz"))
with dg.GradientAccumulator(features, features, "float32", progress=look) as accumulator:
    accumulator.add(x, dz)
    accumulator.result()
    assert accumulator.samples == samples
    assert sum(accumulator.host_bytes.values()) < 300e6
print(most)

from densegrad.commands import streamed
told = streamed.GradientAccumulator._compute
def compute(self, *arguments):
    told(self, *arguments)
    look(0)
streamed.GradientAccumulator._compute, most = compute, 0
result = CliRunner().invoke(cli.app, ["grads", "--x", f"{folder}/x.npy", "--dz", f"{folder}/dz.npy", "--w",
                                      f"{folder}/w.npy", "--out", f"{folder}/out.npz", "--memory", "300MB",
                                      *"--need dw --need db".split()])
assert result.exit_code == 0, result.output
print(most)
"""


@pytest.mark.large
@pytest.mark.only("simulator")
def test_a_map_of_4_gigabytes_takes_300_megabytes(tmp_path):
    for name, samples in (("x", 2**19), ("dz", 2**19), ("w", 1024)):
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", "float32", (samples, 1024))  # holes, read as zeros
    found = subprocess.run([sys.executable, "-c", LARGE, tmp_path], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    of_accumulator, of_command = map(int, found.stdout.split())
    assert 2**25 <= of_accumulator <= 300e6
    assert 2**25 <= of_command <= 300e6
