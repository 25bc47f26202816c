"""Sums over ranks without ranks: what they agree on, what is refused, what NCCL is told, what sums cost on paper."""
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import densegrad as dg
from densegrad import calls, device, distributed
from densegrad.distributed import buckets, engines, messages, reductions
from densegrad.distributed.agreement import State
from densegrad.distributed.messages import Answer, Descriptor, Numbers
from densegrad.facts import ITEM_BYTES
from densegrad.testing import bits, host, normal
from tests import ranks_model

PAGE = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")


class Pair:
    """An engine of two ranks, of which the other is made up: rank 0, which has the same numbers as this one."""

    name, rank, size, carries = "a pair", 1, 2, frozenset(ITEM_BYTES)

    def __init__(self, place):
        self.places, self.said = frozenset((place,)), []

    def send(self, buffer, to):
        raise AssertionError("the last rank sends nothing")

    def receive(self, buffer, source):
        self.said.append(("receive", buffer.size, source))
        buffer[...] = 2
        return engines.Done()

    def broadcast(self, buffer, root):
        self.said.append(("broadcast", buffer.size, root))
        return engines.Done()

    def all_reduce(self, buffer):
        self.said.append(("all_reduce", buffer.size, buffer.dtype.name))
        buffer *= 2
        return engines.Done()

    def abort(self):
        self.said.append("abort")


@pytest.fixture
def pair(lane, monkeypatch):
    """A communicator of this engine."""
    engine = Pair(engines.GPU if lane == "gpu" else engines.HOST)
    monkeypatch.setattr(engines, "engine_of", lambda comm, cuda_aware: engine)
    return engine


# -- what ranks agree on


def said(*words, **options):
    return [None if one is None else messages.unpacked(Descriptor(3, one, version="1", **options).packed())
            for one in words]


def test_messages_have_one_size_and_come_back():
    for words in ("", "sum of float32 (3, 4)", "ß" * 5000):
        message = Descriptor(7, words, 11, 2, True, "0.1.0").packed()
        assert len(message) == messages.MESSAGE_BYTES
        found = messages.unpacked(message)
        assert found[:1] + found[2:6] == (7, 11, 2, True, "0.1.0")
        assert words.startswith(found.words.rstrip("\N{REPLACEMENT CHARACTER}"))
    numbers = Numbers((5, 0, 2 ** 40), (1, 0, 3))
    answer = Answer(9, "rank 2 failed", (2,), (True, False, True), numbers)
    assert len(answer.packed()) == messages.answer_bytes(3)
    assert messages.unpacked_answer(answer.packed()) == answer


@pytest.mark.parametrize(("descriptors", "words", "blamed"), [
    (said("a", "a", "a"), "", ()),
    (said("a", "b", "a"), "the ranks differ in what is reduced: rank 1 has b; rank 0 has a", (1,)),
    (said("b", "a", "a", "c"), "ranks 0, 3 has b; rank 1 has a", (0, 3)),
    (said("a", "b"), "rank 1 has b; rank 0 has a", (1,)),
    (said("x" * 2000 + "a", "x" * 2000 + "b"), "the ranks differ in what is reduced", (1,)),
    (said("a", None, "a", None), "ranks 1, 3 did not come within 2 s", (1, 3)),
    ([*said("a"), None, *said("KeyError: 1", failed=True)], "rank 2 failed: KeyError: 1", (2,)),
    ([*said("a", "a"), said("a")[0]._replace(version="2")], "differ in densegrad's version: rank 2 has 2; rank 0 has 1",
     (2,)),
])
def test_the_rank_that_is_the_reason_is_named(descriptors, words, blamed):
    found, ranks = messages.problem(descriptors, 2)
    assert ranks == blamed
    assert words in found
    assert bool(found) == bool(blamed)


def test_a_message_of_another_form_is_another_version():
    message = b"dgr9" + Descriptor(1, "").packed()[4:]
    assert "differ in what is reduced" in messages.problem(
        [messages.unpacked(Descriptor(1, "a").packed()), messages.unpacked(message)], 1)[0]


# -- what is refused


@pytest.mark.parametrize(("options", "words"), [
    ({"op": "avg"}, r'op must be "sum" or "mean"; got \'avg\' \(did you mean "mean"\?\)'),
    ({"order": "rank"}, r'order must be None or "ranks"; got \'rank\''),
    ({"wire": "bf16"}, r"wire must be None or one of .*; got 'bf16' \(did you mean \"bfloat16\"\?\)"),
    ({"samples": 3}, r'samples weights a mean; got samples=3 with op="sum"'),
    ({"op": "mean", "samples": -1}, "samples must be a whole number, 0 or more; got -1"),
    ({"op": "mean", "samples": 1.5}, "samples must be a whole number, 0 or more; got 1.5"),
    ({"check": True}, r"check=True needs a way between the hosts of the ranks, which a pair has not \(pass "),
    ({"grads": None}, "grads must be an array, or a tuple or list with an array in it; got None"),
    ({"grads": (None, "a")}, r"grads\[1\] must be an array; got str"),
    ({"grads": np.ones(3, "int64")}, "grads must be float16, bfloat16, float32 or float64; got int64"),
    ({"out": [np.ones(3, "float32")]}, ""),
    ({"out": np.ones(3)}, r"out must have the shape \(3,\), the dtype float32 .*; got \(3,\), float64"),
    ({"out": (np.ones(3, "float32"), None)}, "out must have the structure of grads, 1 fields; got 2"),
    ({"average": True}, r"all_reduce\(\) takes no average; got average=True"),
])
@pytest.mark.only("simulator")
def test_what_cannot_be_reduced_is_refused_with_the_cure(options, words, pair):
    given = {"grads": np.ones(3, "float32"), "comm": pair} | options
    if not words:
        distributed.all_reduce(**given)
        return
    with pytest.raises((TypeError, ValueError), match=words):
        distributed.all_reduce(**given)
    assert pair.said == []


def test_what_is_no_communicator_is_refused_with_the_cure():
    with pytest.raises(TypeError, match=r"comm must be a communicator of mpi4py, .*; got int \(pass mpi4py\.MPI\."):
        distributed.all_reduce(np.ones(3), 5)
    with pytest.raises(TypeError, match="cuda_aware is about MPI's communicators; got int"):
        distributed.all_reduce(np.ones(3), distributed.Ranks(5, cuda_aware=True))


@pytest.mark.parametrize(("addends", "like", "words"), [
    ([], [np.ones(3, "float16")], "like must hold arrays that are all float32 or all float64, .*; got float16"),
    ([], [np.ones(3), np.ones(3, "float32")], "got float32, float64"),
    ([], [], "got none"),
    ([], [[1.0]], r"like must hold arrays of NumPy or CuPy; got list \(convert it with numpy.asarray or cupy.asarray"),
    ([[np.ones(2)]], [np.ones(3)], r"every addend must have the shapes of like, \[\(3,\)\]; got \[\(2,\)\]"),
    ([[np.ones(3, "float32")]], [np.ones(3)], "every addend must have the dtype of like, float64; got float32"),
])
@pytest.mark.only("simulator")
def test_addends_that_do_not_fit_are_refused(addends, like, words, pair):
    with pytest.raises((TypeError, ValueError), match=words):
        distributed.fold_along_ranks(pair, addends, like)
    assert pair.said == []


@pytest.mark.only("simulator")
def test_arrays_on_the_host_are_refused_by_engines_of_gpus(pair):
    pair.places = frozenset((engines.GPU,))
    with pytest.raises(TypeError, match="a pair carries arrays on GPUs; got arrays on the host"):
        distributed.all_reduce(np.ones(3), pair)


@pytest.mark.parametrize(("options", "words"), [
    ({"need": "dx"}, 'need must name "dw" or "db" with comm='),
    ({"accumulate": True, "out": True}, "adds before the ranks' sum"),
    ({"accumulate": "dw", "out": True}, "adds before the ranks' sum"),
    ({"w": np.ones((3, 5), "float32")}, "w must"),
])
@pytest.mark.only("simulator")
def test_dense_grads_over_ranks_refuses_before_anything_is_sent(options, words, pair):
    given = {"x": normal((4, 2), "float32"), "w": normal((2, 3), "float32"), "dz": normal((4, 3), "float32")} | options
    if "out" in given:
        given["out"] = dg.DenseGrads(*(np.ones(shape, "float32") for shape in ((4, 2), (2, 3), 3)))
    with pytest.raises((ValueError, TypeError), match=words):
        dg.dense_grads(**given, comm=pair)
    with pytest.raises(dg.PrepareError, match=r"dense_grads\(\.\.\., comm=\) cannot be prepared"):
        dg.prepare(dg.dense_grads, given["x"], given["w"], given["dz"], comm=pair)
    assert pair.said == []


# -- arrays on either device, over a rank that is made up


def test_sums_of_a_bucket_are_rounded_once(pair, xp):
    grads = dg.DenseGrads(None, xp.asarray(normal((5, 3), "float32")), xp.asarray(normal((3,), "float16")))
    found = distributed.all_reduce(grads, pair)
    assert pair.said == [("all_reduce", 18, "float32")]
    assert type(found.dw) is type(grads.dw)
    for one, given in zip(found[1:], grads[1:], strict=True):
        np.testing.assert_array_equal(host(one), 2 * host(given))
        assert one.dtype == given.dtype
    handle = distributed.all_reduce(grads, pair, order="ranks", out=grads, async_op=True)
    dw = 2 + host(found.dw) / 2
    assert handle.wait() is grads
    assert (handle.done, repr(handle)) == (True, "<Reduction, done>")
    np.testing.assert_array_equal(host(grads.dw), dw)
    assert pair.said[1:] == [("receive", 18, 0), ("broadcast", 18, 1)]


def test_without_a_way_between_hosts_ranks_count_by_a_sum(pair, xp):
    """The other rank has as many samples as this one, so that each has half of them."""
    ones = xp.asarray(np.full(3, 8.0, "float32"))
    counted = []
    pair.all_reduce = lambda buffer: (counted.append(host(buffer).tolist()),
                                      buffer.__setitem__(slice(0, 2), buffer[2:4] if buffer.size == 4 else buffer[:2]),
                                      engines.Done())[2]
    assert host(distributed.all_reduce(ones, pair, "mean", samples=6)).tolist() == [4] * 3
    assert counted == [[0, 0, 6, 1], [4, 4, 4]]


def test_folds_travel_in_pieces(pair, xp, monkeypatch):
    monkeypatch.setattr(reductions, "PIECE_BYTES", 16)
    pair.all_reduce = lambda buffer: (buffer.__setitem__(slice(0, 2), buffer[2:4]), engines.Done())[1]
    blocks = [[xp.asarray(normal((2, 3), "float32", seed)), xp.asarray(normal((3,), "float32", 9))] for seed in (1, 2)]
    (dw, db), = distributed.fold_along_ranks(pair, blocks, blocks[0])
    expected = [2 + host(one) + host(other) for one, other in zip(*blocks, strict=True)]
    np.testing.assert_array_equal(host(dw), expected[0])
    np.testing.assert_array_equal(host(db), expected[1])
    assert type(dw) is type(blocks[0][0])
    assert pair.said == [("receive", 4, 0), ("receive", 4, 0), ("receive", 1, 0), ("broadcast", 9, 1)]


@pytest.mark.parametrize("how", [{}, {"activation": "relu", "z": True}])
def test_the_reduction_starts_before_dx_is_launched(how, pair, xp, monkeypatch):
    """The order of starts: dz if it is formed, dw, db; the reduction, queued behind them; dx; as one call has them."""
    x, w, dz, z = (xp.asarray(normal(shape, "float32", seed))
                   for seed, shape in enumerate(((6, 4), (4, 3), (6, 3), (6, 3))))
    how = how | ({"z": z} if how else {})
    order, launch, start = [], calls._launch, State.start
    monkeypatch.setattr(calls, "_launch", lambda kept, values, stream: (
        order.extend(one.kernel for one in kept.recipe.launches), launch(kept, values, stream))[1])
    monkeypatch.setattr(State, "start", lambda state, work: (order.append("reduction"), start(state, work))[1])
    own = dg.dense_grads(x, w, dz, **how)
    alone, order[:] = sorted(order), []
    grads = dg.dense_grads(x, w, dz, comm=pair, **how)
    assert sorted(one for one in order if one != "reduction") == alone
    dg.input_grad(dz, w)
    of_dx = order[order.index("reduction") + 1:]
    assert of_dx[:len(of_dx) // 2] == of_dx[len(of_dx) // 2:]
    dx, dw, db = grads
    assert grads.reduction.wait().dw is dw
    assert (bits(dx) == bits(own.dx)).all()
    np.testing.assert_array_equal(host(dw), 2 * host(own.dw))
    np.testing.assert_array_equal(host(db), 2 * host(own.db))


@pytest.mark.parametrize(("dtype", "shape", "order", "how"), [
    ("float32", (9, 6, 5), "C", {"activation": "gelu", "alpha": 0.3}),
    ("bfloat16", (16, 8, 8), "C", {"activation": "gelu", "batch_axis": 1}),
    ("float16", (24, 16, 8), "F", {"activation": "relu", "keepdims": True, "weight_layout": "out_in"}),
    ("bfloat16", (9, 8, 10), "F", {"activation": "relu", "batch_axis": 1, "compensated": True}),
    ("float32", (8, 1, 3), "C", {"sample_weight": True}),
    ("float64", (8, 3, 1), "F", {"batch_axis": 1}),
])
def test_over_one_rank_dense_grads_has_the_bits_of_the_plain_call(dtype, shape, order, how, pair, xp):
    pair.rank, pair.size = 0, 1
    samples, inputs, outputs = shape
    turned = how.get("weight_layout") == "out_in"
    x, w = (xp.asarray(normal(size, dtype, seed)) for seed, size in enumerate(
        ((samples, inputs), (outputs, inputs) if turned else (inputs, outputs))))
    given = [normal((samples, outputs), dtype, seed) for seed in (2, 3)]
    dz, z = (xp.asarray(np.array(one.T if how.get("batch_axis") else one, order=order)) for one in given)
    how = how | ({"z": z} if "activation" in how else {})
    if "sample_weight" in how:
        how["sample_weight"] = xp.asarray(normal((samples,), "float32", 4))
    grads, plain = dg.dense_grads(x, w, dz, comm=pair, **how), dg.dense_grads(x, w, dz, **how)
    grads.reduction.wait()
    for one, other in zip(grads, plain, strict=True):
        assert (one.shape, one.strides) == (other.shape, other.strides)
        assert (bits(one) == bits(other)).all()


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("rows", [0, 7, 19])
def test_over_one_rank_an_accumulator_has_the_bits_of_its_result(rows, compensated, pair, xp):
    pair.rank, pair.size = 0, 1
    x, dz = xp.asarray(normal((rows, 6), "bfloat16")), xp.asarray(normal((rows, 5), "bfloat16", 1))
    found = []
    for keep_blocks in (False, True):
        accumulator = dg.GradientAccumulator(6, 5, "bfloat16", block=8, reduction="mean", compensated=compensated,
                                             keep_blocks=keep_blocks)
        accumulator.add(x, dz)
        found.append(accumulator.all_reduce(pair) if keep_blocks else accumulator.result())
        assert accumulator.result() is found[-1]
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert isinstance(other, xp.ndarray)
        assert (bits(one) == bits(other)).all()


@pytest.mark.only("gpu")
def test_a_reduction_has_a_stream_of_its_own_between_that_of_its_gradients_and_the_host(pair, xp, monkeypatch):
    order, streams, marks = [], xp.cuda.Stream, device.Gpu.mark
    wait, poll, add = streams.wait_event, buckets.poll, pair.all_reduce
    monkeypatch.setattr(device.Gpu, "mark", lambda *given: (order.append((xp.cuda.get_current_stream().ptr,
                                                                          marks(*given))), order[-1][1])[1])
    monkeypatch.setattr(streams, "wait_event", lambda stream, event: (order.append((stream.ptr, event)),
                                                                      wait(stream, event))[1])
    monkeypatch.setattr(buckets, "poll", lambda done, until: (poll(done, until), order.append("done"))[0])
    pair.all_reduce = lambda buffer: (order.append(xp.cuda.get_current_stream().ptr), add(buffer))[1]
    with xp.cuda.Stream(non_blocking=True) as current:
        ones = xp.asarray(np.ones(3, "float32"))
        found = distributed.all_reduce(ones, pair)
        assert host(found).tolist() == [2] * 3
    (written, event), (own, waited), added, done = order
    assert (written, waited, added, done) == (current.ptr, event, own, "done")
    assert own != current.ptr


@pytest.mark.only("simulator")
def test_a_sum_that_is_not_done_in_time_is_given_up(pair):
    def late(buffer):
        return SimpleNamespace(wait=lambda until: (_ for _ in ()).throw(engines.Late()))

    pair.all_reduce = late
    with pytest.raises(distributed.DistributedError, match="within 60 s: rank 1 waited for the others") as one:
        distributed.all_reduce(np.ones(3), pair)
    assert not one.value.agreed
    assert pair.said == ["abort"]


# -- what NCCL is told


@pytest.fixture
def cupy(monkeypatch):
    """What engines look for in CuPy."""
    nccl = SimpleNamespace(NCCL_FLOAT32=7, NCCL_BFLOAT16=9, NCCL_SUM=0, NcclCommunicator=type("NcclCommunicator", (), {
        "rank_id": lambda self: 1, "size": lambda self: 3}))
    stream = SimpleNamespace(ptr=77)
    module = SimpleNamespace(cuda=SimpleNamespace(nccl=nccl, get_current_stream=lambda: stream))
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", nccl)
    return module


def recorder(said, *names):
    return {name: (lambda self, *given, _name=name, **named: said.append((_name, *given, *named.values())))
            for name in names}


BUFFER = SimpleNamespace(data=SimpleNamespace(ptr=4096), size=10, dtype=np.dtype("float32"))


@pytest.mark.only("simulator")
def test_cupys_communicator_is_told_addresses_and_the_stream(cupy):
    told = []
    for name, method in recorder(told, "send", "recv", "bcast", "allReduce", "abort").items():
        setattr(cupy.cuda.nccl.NcclCommunicator, name, method)
    engine = engines.engine_of(cupy.cuda.nccl.NcclCommunicator())
    assert (engine.rank, engine.size, engine.places) == (1, 3, {engines.GPU})
    for one in (engine.send(BUFFER, 2), engine.receive(BUFFER, 0), engine.broadcast(BUFFER, 2),
                engine.all_reduce(BUFFER)):
        one.wait(0)
    engine.abort()
    assert told == [("send", 4096, 10, 7, 2, 77), ("recv", 4096, 10, 7, 0, 77), ("bcast", 4096, 10, 7, 2, 77),
                    ("allReduce", 4096, 4096, 10, 7, 0, 77), ("abort",)]


@pytest.mark.only("simulator")
def test_cupyx_backend_and_nccl4py_are_told_arrays_and_the_stream(cupy, monkeypatch):
    told = []
    stream = cupy.cuda.get_current_stream()
    backend = type("NCCLBackend", (), {"rank": 1, "_n_devices": 3, **recorder(told, "send", "recv", "broadcast",
                                                                             "all_reduce")})
    monkeypatch.setitem(sys.modules, "cupyx.distributed", SimpleNamespace(NCCLBackend=backend))
    communicator = type("Communicator", (), {"rank": 1, "nranks": 3, **recorder(told, "send", "recv", "broadcast",
                                                                               "allreduce", "abort")})
    monkeypatch.setitem(sys.modules, "nccl.core", SimpleNamespace(Communicator=communicator, SUM="SUM"))
    for comm, where in ((backend(), stream), (communicator(), 77)):
        told.clear()
        engine = engines.engine_of(comm)
        assert (engine.rank, engine.size) == (1, 3)
        engine.send(BUFFER, 2)
        engine.receive(BUFFER, 0)
        engine.broadcast(BUFFER, 2)
        engine.all_reduce(BUFFER)
        assert [one[0] for one in told[:3]] == ["send", "recv", "broadcast"]
        assert [one[-2:] for one in told[:3]] == [(2, where), (0, where), (2, where)]
        assert told[3][1:3] == (BUFFER, BUFFER)
        assert told[3][-1] == where


# -- on paper


MODELS = {"ring": (ranks_model.ring, ranks_model.played_ring), "tree": (ranks_model.tree, ranks_model.played_tree)}


@pytest.mark.parametrize("ranks", [2, 4, 8, 64, 1024])
@pytest.mark.parametrize("way", MODELS)
def test_closed_forms_are_what_playing_the_steps_gives(way, ranks):
    form, played = MODELS[way]
    seconds, most = played(ranks, 2.0 ** 20, 3e-6, 1e9)
    assert seconds == pytest.approx(form(ranks, 2.0 ** 20, 3e-6, 1e9), rel=1e-9)
    assert most == pytest.approx(ranks_model.sent(ranks, 2.0 ** 20, way), rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 3, 8, 64, 300])
@pytest.mark.parametrize("piece", [2.0 ** 20, 2.0 ** 14, 1e4])
def test_the_chains_form_is_what_playing_its_steps_gives(ranks, piece):
    seconds, most = ranks_model.played_chain(ranks, 2.0 ** 20, 3e-6, 1e9, piece)
    assert seconds == pytest.approx(ranks_model.chain(ranks, 2.0 ** 20, 3e-6, 1e9, piece), rel=1e-9)
    assert most == pytest.approx(ranks_model.sent(ranks, 2.0 ** 20, "chain"), rel=1e-9)


def test_the_pages_table_is_of_the_forms():
    rows = re.findall(r"(?m)^\| (\d[\d,]*) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE)
    assert [int(one[0].replace(",", "")) for one in rows] == [8, 16, 32, 64, 128, 256, 512, 1024]
    for ranks, *shown in rows:
        assert shown == row(int(ranks.replace(",", "")))


def row(ranks):
    """Of the page's table, in milliseconds: ring, tree, chain in pieces of 1 MiB and of the best size, what is seen."""
    size, alpha, rate, behind = 2 * 2 ** 30, 10e-6, 50e9, 100e-3
    ring = ranks_model.ring(ranks, size, alpha, rate)
    chain = ranks_model.chain(ranks, size, alpha, rate, reductions.PIECE_BYTES)
    best = ranks_model.chain(ranks, size, alpha, rate, ranks_model.best_piece(ranks, size, alpha, rate))
    seconds = ring, ranks_model.tree(ranks, size, alpha, rate), chain, best, ranks_model.exposed(chain, behind)
    return [f"{1e3 * one:.1f}" for one in seconds]
