"""Prepared calls: what they compute, that they only launch, what can be bound anew, and what is refused."""
import gc
import itertools
from dataclasses import replace

import numpy as np
import pytest

import densegrad
from densegrad import (
    DenseGrads,
    DTypeError,
    LossGrads,
    OutError,
    OutputGrads,
    PrepareError,
    ShapeError,
    WeightBiasGrads,
    activation_grad,
    bias_grad,
    calls,
    cross_entropy,
    cross_entropy_grad,
    dense_grads,
    device,
    input_grad,
    prepare,
    weight_bias_grad,
    weight_grad,
)
from densegrad.calls import recorded
from densegrad.launches import ALIGNMENT, Launch
from densegrad.plans import CrossEntropyPlan, MatmulPlan, plan_batch_sum
from densegrad.testing import ROUNDOFF, bits, host, integers, normal

SAMPLES, INPUTS, OUTPUTS = 40, 12, 9
#: parts of the batch, so that launches leave something for one another
BATCH_IN_PARTS = plan_batch_sum(SAMPLES, OUTPUTS, "float32", "rows")
LOSS_IN_PARTS = CrossEntropyPlan(SAMPLES, OUTPUTS, "float32", 4, 8, 1, 16)
IN_PARTS = MatmulPlan(INPUTS, OUTPUTS, SAMPLES, "float32", 8, 8, 4, 4, 4, parts=3)


def memory_at(xp, size, beyond=0):
    """Bytes that begin so many beyond a multiple of ALIGNMENT."""
    memory = xp.zeros(size + 2 * ALIGNMENT, "uint8")
    begin = -device.current().memory(memory).byte % ALIGNMENT + beyond
    return memory[begin:begin + size]


def placed(xp, values):
    """The values in the lane's memory, aligned as the device's is: NumPy promises less."""
    array = memory_at(xp, values.nbytes).view(values.dtype).reshape(values.shape)
    array[...] = xp.asarray(values)
    return array


def arrays_of(xp, seed=0, dtype="float32"):
    """A layer's arrays by their names, the lane's own."""
    shapes = {"x": (SAMPLES, INPUTS), "w": (INPUTS, OUTPUTS), "dz": (SAMPLES, OUTPUTS), "z": (SAMPLES, OUTPUTS)}
    found = {name: placed(xp, normal(shape, dtype, seed + n)) for n, (name, shape) in enumerate(shapes.items())}
    labels = np.random.default_rng(seed).integers(0, OUTPUTS, SAMPLES)
    weights = np.abs(normal((SAMPLES,), "float32", seed + 9))
    classes, targets = (np.abs(normal(shape, "float32", seed + 10)) for shape in ((OUTPUTS,), (SAMPLES, OUTPUTS)))
    return found | {"da": found["dz"], "labels": placed(xp, labels), "sample_weight": placed(xp, weights),
                    "class_weight": placed(xp, classes), "probabilities": placed(xp, targets)}


#: every public function, and those of one that differ in what they launch: the arrays in order, and options
CALLS = {
    "bias_grad": (bias_grad, ("dz",), {}),
    "bias_grad compensated": (bias_grad, ("dz",), {"compensated": True, "keepdims": True}),
    "weight_grad": (weight_grad, ("x", "dz"), {}),
    "weight_grad in parts": (weight_grad, ("x", "dz"), {"plan": IN_PARTS, "alpha": 0.5}),
    "weight_bias_grad": (weight_bias_grad, ("x", "dz"), {"plan": IN_PARTS}),
    "input_grad": (input_grad, ("dz", "w"), {}),
    "dense_grads": (dense_grads, ("x", "w", "dz"), {"plan": DenseGrads(dw=IN_PARTS)}),
    "dense_grads of some": (dense_grads, ("x", "w", "dz"), {"need": ("dx", "db")}),
    "activation_grad": (activation_grad, ("da", "z"), {"activation": "gelu"}),
    "activation_grad weighted": (activation_grad, ("da",), {"sample_weight": "sample_weight", "alpha": 0.25}),
    "cross_entropy_grad": (cross_entropy_grad, ("z", "labels"), {"label_smoothing": 0.125}),
    "cross_entropy": (cross_entropy, ("z", "labels"), {"reduction": "none", "alpha": 0.5}),
    "cross_entropy in parts": (cross_entropy, ("z", "labels"), {"plan": LOSS_IN_PARTS, "class_weight": "class_weight"}),
}
BELOW_AN_ACTIVATION = (dense_grads, ("x", "w", "dz"), {"activation": "leaky_relu", "z": "z", "negative_slope": 0.25})
#: those that need memory of their own
NEEDY = {name: CALLS[name] for name in ("weight_grad in parts", "weight_bias_grad", "dense_grads",
                                        "cross_entropy in parts")} | {"dense_grads below": BELOW_AN_ACTIVATION}
EVERY_CALL = CALLS | NEEDY


def given(xp, of_call, seed=0):
    """(function, arrays, options) with the lane's arrays in the places of their names."""
    function, names, options = of_call
    arrays = arrays_of(xp, seed)
    return function, [arrays[name] for name in names], {
        name: arrays[value] if isinstance(value, str) and value in arrays else value for name, value in options.items()}


def results(result):
    """Every array of a result."""
    return [array for array in (result if isinstance(result, tuple) else (result,)) if array is not None]


def same_bits(left, right):
    pairs = zip(results(left), results(right), strict=True)
    return all((bits(one) == bits(other)).all() for one, other in pairs)


def forbid(monkeypatch, owner, but=()):
    """Make every function of an object raise."""
    for name in dir(owner):
        if callable(getattr(owner, name)) and not name.startswith("__") and name not in but:
            def refuse(*arguments, name=name, **options):
                raise AssertionError(f"a prepared call used {name}")

            monkeypatch.setattr(owner, name, refuse)


def watched(monkeypatch, prepared):
    """A list that receives the stream of each launch and memset that the prepared call makes."""
    streams, bound = [], prepared._bound

    def watch(loaded):
        count = len(getattr(loaded, "queued", [loaded]))  # on a GPU one queues several
        return lambda values, stream: (streams.extend([stream] * count), loaded(values, stream))

    monkeypatch.setattr(bound, "kept", bound.kept._replace(loaded=tuple(map(watch, bound.kept.loaded))))
    return streams


@pytest.mark.parametrize("name", EVERY_CALL)
def test_a_prepared_call_has_the_bits_of_the_ordinary_one(xp, name):
    function, arrays, options = given(xp, EVERY_CALL[name])
    ordinary = function(*arrays, **options)
    prepared = prepare(function, *arrays, **options)
    for array in results(prepared.result):
        array[...] = float("nan")
    assert prepared() is prepared.result
    assert type(prepared.result) is type(ordinary)
    assert same_bits(prepared.result, ordinary)
    for array in results(prepared.result):
        array[...] = float("nan")
    assert same_bits(prepared(), ordinary)


@pytest.mark.parametrize("name", EVERY_CALL)
def test_it_only_launches(xp, lane, monkeypatch, name):
    """No allocation, no synchronisation, no question, no check: whatever else of the device it used would raise."""
    function, arrays, options = given(xp, EVERY_CALL[name])
    ordinary = function(*arrays, **options)
    prepared = prepare(function, *arrays, **options)
    launches = len([one for one in prepared.launches if isinstance(one, Launch)])
    with monkeypatch.context() as patch:
        launched = watched(patch, prepared)
        forbid(patch, type(device.current()))
        patch.setattr(calls, "call", None)
        patch.setattr(calls, "Recipe", None)
        if lane == "gpu":
            forbid(patch, xp.cuda.runtime, but=("memsetAsync",))
            for owner, names in ((xp, ("empty", "zeros", "asarray", "array")),
                                 (xp.cuda, ("alloc", "Stream", "Event", "Device", "get_current_stream"))):
                for forbidden in names:
                    patch.setattr(owner, forbidden, None)
        prepared()
    assert len(launched) == len(prepared.launches) >= launches > 0
    assert same_bits(prepared.result, ordinary)


def test_the_stand_ins_would_notice(xp, monkeypatch):
    function, arrays, options = given(xp, CALLS["dense_grads"])
    function(*arrays, **options)
    with monkeypatch.context() as patch:
        forbid(patch, type(device.current()))
        with pytest.raises(AssertionError, match="a prepared call used seen"):
            function(*arrays, **options)


def test_it_checks_once(xp, monkeypatch):
    arrays = arrays_of(xp)
    described = []
    describe = densegrad.gradients._describe_input
    monkeypatch.setattr("densegrad.gradients._describe_input",
                        lambda *given: (described.append(given), describe(*given))[1])
    prepared = prepare(input_grad, arrays["dz"], arrays["w"])
    for _ in range(3):
        prepared()
    prepared.rebind(dz=arrays_of(xp, 5)["dz"])()
    assert len(described) == 1


def test_writing_into_its_arrays_changes_what_it_computes(xp):
    arrays = arrays_of(xp)
    prepared = prepare(bias_grad, arrays["dz"])
    prepared()
    arrays["dz"][...] = 2
    assert (host(prepared()) == 2 * SAMPLES).all()


# -- binding anew


@pytest.mark.parametrize("name", EVERY_CALL)
def test_other_arrays(xp, name):
    of_call = EVERY_CALL[name]
    function, arrays, options = given(xp, of_call)
    prepared = prepare(function, *arrays, **options)
    prepared()
    other = arrays_of(xp, 100)
    names = [*of_call[1], *(value for value in of_call[2].values() if isinstance(value, str) and value in other)]
    if "dw" not in options.get("need", ("dw",)):
        names.remove("x")
    assert prepared.rebind(**{one: other[one] for one in names}) is prepared
    function, arrays, options = given(xp, of_call, 100)
    assert same_bits(prepared(), function(*arrays, **options))


def test_another_out_and_alpha(xp):
    arrays = arrays_of(xp)
    first, second = (placed(xp, np.full((INPUTS, OUTPUTS), np.nan, "float32")) for _ in range(2))
    prepared = prepare(weight_grad, arrays["x"], arrays["dz"], out=first)
    prepared()
    before = bits(first).copy()
    assert prepared.rebind(out=second, alpha=2.0)() is second
    assert same_bits(second, weight_grad(arrays["x"], arrays["dz"], alpha=2.0))
    assert (bits(first) == before).all()


def test_some_of_several_outs(xp):
    arrays = arrays_of(xp)
    made = {"dw": (INPUTS, OUTPUTS), "db": (OUTPUTS,)}
    first, second = ({name: placed(xp, np.zeros(shape, "float32")) for name, shape in made.items()} for _ in range(2))
    prepared = prepare(weight_bias_grad, arrays["x"], arrays["dz"], out=WeightBiasGrads(**first))
    result = prepared.rebind(out=WeightBiasGrads(db=second["db"]))()
    assert result.dw is first["dw"]
    assert result.db is second["db"]
    assert same_bits(result, weight_bias_grad(arrays["x"], arrays["dz"]))
    assert not host(second["dw"]).any()


def test_parameters_and_labels(xp):
    arrays = arrays_of(xp)
    prepared = prepare(activation_grad, arrays["da"], arrays["z"], "leaky_relu")
    prepared.rebind(negative_slope=-0.5, alpha=3)
    assert same_bits(prepared(), activation_grad(arrays["da"], arrays["z"], "leaky_relu", negative_slope=-0.5, alpha=3))
    prepared = prepare(cross_entropy_grad, arrays["z"], arrays["labels"])
    prepared.rebind(label_smoothing=0.5, ignore_index=3)
    assert same_bits(prepared(), cross_entropy_grad(arrays["z"], arrays["labels"], label_smoothing=0.5, ignore_index=3))
    given = {"class_weight": arrays["class_weight"], "plan": LOSS_IN_PARTS}
    prepared = prepare(cross_entropy, arrays["z"], arrays["labels"], **given)
    prepared.rebind(label_smoothing=0.5, ignore_index=3, alpha=-2.0)
    assert same_bits(prepared(), cross_entropy(arrays["z"], arrays["labels"], label_smoothing=0.5, ignore_index=3,
                                               alpha=-2.0, **given))
    loss = placed(xp, np.zeros((), "float32"))
    prepared = prepare(cross_entropy, arrays["z"], arrays["probabilities"])
    with pytest.raises(PrepareError, match=r"out\.loss cannot be bound anew, since the call was prepared without it"):
        prepared.rebind(out=LossGrads(loss=loss))
    other = arrays_of(xp, 5)["probabilities"]
    assert same_bits(prepared.rebind(labels=other)(), cross_entropy(arrays["z"], other))
    with pytest.raises(ValueError, match="ignore_index is a label, and labels are probabilities here; got 3"):
        prepared.rebind(ignore_index=3)


def test_more_aligned_arrays_and_back(xp):
    """The launches are for the alignment that the call was prepared with, whatever was bound in between."""
    memory, begin = placed(xp, np.zeros(2 * SAMPLES * OUTPUTS + 64, "float32")), 4

    def at(first):
        array = memory[first:first + SAMPLES * OUTPUTS].reshape(SAMPLES, OUTPUTS)
        array[...] = xp.asarray(normal((SAMPLES, OUTPUTS), "float32", first))
        return array

    prepared = prepare(bias_grad, at(begin))
    for first in (begin + 4, begin):
        dz = at(first)
        assert same_bits(prepared.rebind(dz=dz)(), bias_grad(dz))
    with pytest.raises(PrepareError, match=r"dz must have the layout .* at a multiple of 16 bytes.*; got .* at a "
                                           r"multiple of 4 bytes"):
        prepared.rebind(dz=at(begin + 1))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"dz": (SAMPLES + 1, OUTPUTS)}, PrepareError, r"dz must have the layout that the call was prepared for, shape "
                                                   r"\(40, 9\), .*; got shape \(41, 9\).*prepare another call"),
    ({"x": "float64"}, PrepareError, r"x must have the layout .*float32.*; got .*float64"),
    ({"x": "turned"}, PrepareError, r"x must have the layout .*strides \(48, 4\).*; got .*strides \(4, 160\)"),
    ({"x": None}, PrepareError, "x must have the layout .*; got NoneType"),
    ({"y": (2, 2)}, PrepareError, "this call has no y that can be bound anew; it has x, dz, out, alpha"),
    ({"precision": "ieee"}, PrepareError, "this call has no precision that can be bound anew"),
    ({"alpha": "many"}, TypeError, "alpha must be a number"),
    ({"alpha": 1e300}, ValueError, "alpha must be within"),
    ({"out": "a tuple"}, PrepareError, "out must have the layout .*; got tuple"),
    ({"out": "read-only"}, OutError, "out is read-only"),
    ({"out": "x"}, OutError, "out overlaps x"),
])
def test_what_cannot_be_bound(xp, lane, change, error, message):
    arrays = arrays_of(xp)
    out = placed(xp, np.zeros((INPUTS, OUTPUTS), "float32"))
    memory = placed(xp, host(arrays["x"]).ravel())
    x = memory.reshape(SAMPLES, INPUTS)
    prepared = prepare(weight_grad, x, arrays["dz"], out=out)
    before = [bits(array).copy() for array in results(prepared())]
    (name, value), = change.items()
    more = {} if name == "dz" else {"dz": arrays_of(xp, 7)["dz"]}
    if value == "read-only":
        value = read_only(out, lane)
    elif name == "x" and value is not None:
        value = placed(xp, host(x).astype("float64")) if value == "float64" else placed(xp, host(x).T.copy()).T
    elif name == "out":
        value = (out,) if value == "a tuple" else memory[8:8 + INPUTS * OUTPUTS].reshape(INPUTS, OUTPUTS)
    elif isinstance(value, tuple):
        value = placed(xp, np.zeros(value, "float32"))
    with pytest.raises(error, match=message):
        prepared.rebind(**more, **{name: value})
    out[...] = 0
    assert all((bits(now) == then).all() for now, then in zip(results(prepared()), before, strict=True))


class Foreign:
    """An array of another library, which says that it may not be written."""

    def __init__(self, array):
        interface = array.__cuda_array_interface__
        self.array, self.__cuda_array_interface__ = array, interface | {"data": (interface["data"][0], True)}


def read_only(array, lane):
    """The array as one that may not be written: CuPy has none of its own."""
    if lane == "gpu":
        return Foreign(array)
    view = array.view()
    view.flags.writeable = False
    return view


def test_what_cannot_be_bound_to_several_results(xp):
    arrays = arrays_of(xp)
    db = xp.zeros(OUTPUTS, "float32")
    prepared = prepare(weight_bias_grad, arrays["x"], arrays["dz"], out=WeightBiasGrads(db=db))
    with pytest.raises(PrepareError, match=r"out\.dw cannot be bound anew, since the call was prepared without it"):
        prepared.rebind(out=WeightBiasGrads(dw=xp.zeros((INPUTS, OUTPUTS), "float32")))
    with pytest.raises(TypeError, match=r"out must be WeightBiasGrads\(dw=, db=\) or a tuple of 2"):
        prepared.rebind(out=db)
    with pytest.raises(PrepareError, match="this call has no negative_slope that can be bound anew"):
        prepare(activation_grad, arrays["da"], arrays["z"], "relu").rebind(negative_slope=0.5)


def test_outs_that_overlap_one_another(xp):
    arrays = arrays_of(xp)
    outs = WeightBiasGrads(placed(xp, np.zeros((INPUTS, OUTPUTS), "float32")), placed(xp, np.zeros(OUTPUTS, "float32")))
    prepared = prepare(weight_bias_grad, arrays["x"], arrays["dz"], out=outs)
    with pytest.raises(OutError, match=r"out\.db overlaps out\.dw"):
        prepared.rebind(out=WeightBiasGrads(db=outs.dw.ravel()[8:8 + OUTPUTS]))


def test_wrong_labels_and_smoothing(lane, xp):
    arrays = arrays_of(xp)
    prepared = prepare(cross_entropy_grad, arrays["z"], arrays["labels"])
    with pytest.raises(ValueError, match=r"label_smoothing must be between 0 and 1; got 1\.5"):
        prepared.rebind(label_smoothing=1.5)
    if lane == "simulator":
        wrong = placed(xp, arrays["labels"])
        wrong[3] = OUTPUTS
        with pytest.raises(ValueError, match=f"labels must be classes from 0 to {OUTPUTS - 1}.* got {OUTPUTS}"):
            prepared.rebind(labels=wrong)


# -- what cannot be prepared


def test_an_array_that_would_be_compacted(xp):
    spread = xp.zeros((2 * SAMPLES, 3 * OUTPUTS), "float32")[::2, ::3]
    with pytest.raises(PrepareError, match="dz would have to be copied at each call"):
        prepare(bias_grad, spread)


@pytest.mark.only("gpu")
@pytest.mark.parametrize("name", ["x", "labels", "out"])
def test_arrays_of_the_host(xp, name):
    """Refused before anything is written, too: what the out holds stays."""
    arrays = {key: host(array) for key, array in arrays_of(xp).items()}
    out = np.full(OUTPUTS, 7, "float32")
    function, names, more = {"x": (weight_grad, ("x", "dz"), {}), "labels": (cross_entropy_grad, ("z", "labels"), {}),
                             "out": (bias_grad, ("dz",), {"out": out})}[name]
    with pytest.raises(PrepareError, match=f"{names[0]} would have to be copied at each call: it lies on the host"):
        prepare(function, *(arrays[one] for one in names), **more)
    assert (out == 7).all()


def test_another_function(xp):
    with pytest.raises(TypeError, match="function must be one of this package's"):
        prepare(np.zeros, 3)
    dz = arrays_of(xp)["dz"]
    with pytest.raises(TypeError, match="function must be one of this package's"):
        prepare(lambda array: (bias_grad(array), bias_grad(array)), dz)


@pytest.mark.parametrize("name", EVERY_CALL)
def test_bad_input_is_told_in_the_words_of_the_call(xp, name):
    function, arrays, options = given(xp, EVERY_CALL[name])
    wrong = [*arrays[:-1], xp.zeros(4, "float32")]
    for arguments, more in ((wrong, {}), (arrays, {"accumulate": True}), (arrays, {"alpha": "one"}),
                            (arrays, {"batch_axis": 7})):
        with pytest.raises((TypeError, ValueError)) as ordinary:
            function(*arguments, **options | more)
        with pytest.raises(type(ordinary.value)) as prepared:
            prepare(function, *arguments, **options | more)
        assert str(prepared.value) == str(ordinary.value)


# -- the workspace


@pytest.mark.parametrize("name", NEEDY)
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_workspace_of_ones_own_may_hold_anything(xp, name, byte):
    function, arrays, options = given(xp, NEEDY[name])
    ordinary = function(*arrays, **options)
    needed = prepare(function, *arrays, **options).workspace_bytes
    assert needed > 0
    memory = memory_at(xp, needed + 16)
    prepared = prepare(function, *arrays, workspace=memory[:needed], **options)
    for _ in range(2):
        memory[...] = byte
        assert same_bits(prepared(), ordinary)
        assert (host(memory[needed:]) == byte).all()
        assert (host(memory) != byte).any()


def test_a_call_without_one_takes_one(xp):
    dz = arrays_of(xp)["dz"]
    memory = memory_at(xp, 16)
    assert prepare(bias_grad, dz, workspace=memory_at(xp, 16, 1)[:0]).workspace_bytes == 0
    prepared = prepare(bias_grad, dz, workspace=memory)
    assert prepared.workspace_bytes == 0
    assert same_bits(prepared(), bias_grad(dz))


def test_a_workspace_that_does_not_do(xp, lane):
    function, arrays, options = given(xp, NEEDY["weight_bias_grad"])
    needed = prepare(function, *arrays, **options).workspace_bytes
    for wrong, message in (
            (memory_at(xp, needed - 1), f"workspace must be {needed} contiguous bytes or more.*got shape"),
            (memory_at(xp, 4 * needed).view("float32"), r"workspace must be .* bytes.*float32"),
            (memory_at(xp, 2 * needed)[::2], "workspace must be .* contiguous"),
            (memory_at(xp, needed, 16), "workspace must begin at a multiple of 256 bytes.*got one at byte"),
            (read_only(memory_at(xp, needed), lane), "workspace must .*be writable.*got a read-only one"),
            ([0] * needed, "workspace must be a .*; got list")):
        with pytest.raises(PrepareError, match=message):
            prepare(function, *arrays, workspace=wrong, **options)
    if lane == "gpu":
        elsewhere = np.zeros(needed + ALIGNMENT, "uint8")
        begin = -elsewhere.ctypes.data % ALIGNMENT
        with pytest.raises(PrepareError, match=r"workspace must .*lie on GPU 0; got one at .* on the host"):
            prepare(function, *arrays, workspace=elsewhere[begin:begin + needed], **options)


def test_a_workspace_apart_from_the_arrays(xp):
    function, arrays, options = given(xp, NEEDY["weight_bias_grad"])
    needed = prepare(function, *arrays, **options).workspace_bytes
    memory = memory_at(xp, needed + arrays[0].nbytes)
    x = memory[:arrays[0].nbytes].view("float32").reshape(arrays[0].shape)
    with pytest.raises(PrepareError, match="workspace overlaps an array of the call"):
        prepare(function, x, arrays[1], workspace=memory[:needed], **options)
    prepared = prepare(function, *arrays, workspace=memory[:needed], **options)
    with pytest.raises(PrepareError, match="workspace overlaps an array of the call"):
        prepared.rebind(x=x)


# -- what it says, and streams


def test_it_prints_what_it_launches(xp):
    function, arrays, options = given(xp, CALLS["weight_grad in parts"])
    prepared = prepare(function, *arrays, **options)
    product, added = str(prepared).splitlines()
    assert product.startswith("matmul_simt[4 x 1 x 3 blocks of 4 threads](left=<x>, ")
    assert "result=<workspace + 0>" in product
    assert added.startswith("add_parts[")
    assert "alpha=<alpha>" in added
    assert str(prepare(weight_grad, arrays[0][:, :0], arrays[1])) == "nothing to launch"


def test_launches_are_recorded(xp):
    function, arrays, options = given(xp, CALLS["dense_grads"])
    with recorded() as ordinary:
        function(*arrays, **options)
    with recorded() as launches:
        prepared = prepare(function, *arrays, **options)
    assert not launches
    with recorded() as launches:
        prepared()
    assert launches == ordinary == list(prepared.launches)


@pytest.mark.only("simulator")
def test_streams_in_the_simulator(xp):
    from numba import cuda

    dz = arrays_of(xp)["dz"]
    prepared = prepare(bias_grad, dz, stream=cuda.stream())
    assert same_bits(prepared(stream=cuda.stream()), bias_grad(dz))
    with pytest.raises(TypeError, match="stream must be"):
        prepared(stream="fast")


@pytest.mark.only("gpu")
def test_it_launches_on_its_stream_or_another(xp, monkeypatch):
    arrays = arrays_of(xp)
    streams = [xp.cuda.Stream(non_blocking=True) for _ in range(3)]
    prepared = prepare(bias_grad, arrays["dz"], stream=streams[0])
    seen = watched(monkeypatch, prepared)
    prepared()
    prepared(stream=streams[1])
    prepared(stream=streams[1].ptr)
    with streams[2]:
        prepared()
        other = prepare(bias_grad, arrays["dz"])
    seen_of_other = watched(monkeypatch, other)
    other()
    assert seen == [streams[n].ptr for n in (0, 1, 1, 0)]
    assert seen_of_other == [streams[2].ptr]
    with pytest.raises(TypeError, match="stream must be"):
        prepared(stream="fast")


@pytest.mark.only("gpu")
def test_it_keeps_its_stream(xp):
    dz = arrays_of(xp)["dz"]
    stream = xp.cuda.Stream(non_blocking=True)
    prepared = prepare(bias_grad, dz, stream=stream)
    pointer = stream.ptr
    del stream
    gc.collect()
    held = prepared._bound.hold["stream"]
    assert held.ptr == pointer


# -- graphs


def captured(xp, queue):
    """The graph of what `queue`, given a stream, queues there."""
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            queue(stream)
        finally:
            graph = stream.end_capture()
    return graph, stream


@pytest.mark.only("gpu")
@pytest.mark.parametrize("name", EVERY_CALL)
def test_it_is_captured_and_replayed(xp, name):
    """Between replays others allocate and write, and what the arrays hold changes."""
    function, arrays, options = given(xp, EVERY_CALL[name])
    prepared = prepare(function, *arrays, **options)
    graph, stream = captured(xp, lambda stream: prepared(stream=stream))
    for array in results(prepared.result):
        array[...] = float("nan")
    xp.cuda.Device().synchronize()
    for seed in (0, 50):
        _, now, _ = given(xp, EVERY_CALL[name], seed)
        for array, value in zip(arrays, now, strict=True):
            array[...] = value
        others = [xp.full(size, xp.nan, "float32") for size in (64, 1024, 65536)]
        xp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert same_bits(prepared.result, function(*arrays, **options))
        assert all(np.isnan(host(other)).all() for other in others)


@pytest.mark.only("gpu")
@pytest.mark.parametrize("name", NEEDY)
def test_an_ordinary_call_that_needs_memory_is_not_captured(xp, name):
    function, arrays, options = given(xp, NEEDY[name])
    function(*arrays, **options)

    def queue(stream):
        with pytest.raises(PrepareError, match=r"cannot be captured.*densegrad\.prepare\("):
            function(*arrays, **options)

    captured(xp, queue)


@pytest.mark.only("gpu")
def test_an_ordinary_call_that_needs_none_is_captured(xp):
    arrays = arrays_of(xp)
    out = xp.full((SAMPLES, INPUTS), xp.nan, "float32")
    input_grad(arrays["dz"], arrays["w"], out=out)
    out[...] = xp.nan
    graph, stream = captured(xp, lambda stream: input_grad(arrays["dz"], arrays["w"], out=out))
    xp.cuda.Device().synchronize()
    for _ in range(2):
        graph.launch(stream)
        stream.synchronize()
    assert same_bits(out, input_grad(arrays["dz"], arrays["w"]))


# -- results each their own way, and alpha on the device

#: function -> its arrays, options, results by name and which of them can be added into
SEVERAL = {
    "weight_bias_grad": (weight_bias_grad, ("x", "dz"), {}, WeightBiasGrads, ("dw", "db")),
    "dense_grads": (dense_grads, ("x", "w", "dz"), {"plan": DenseGrads(dw=IN_PARTS)}, DenseGrads, ("dx", "dw", "db")),
    "dense_grads below": (*BELOW_AN_ACTIVATION, DenseGrads, ("dx", "dw", "db")),
    "activation_grad": (activation_grad, ("da", "z"), {"activation": "silu"}, OutputGrads, ("db",)),
    "cross_entropy_grad": (cross_entropy_grad, ("z", "labels"), {}, OutputGrads, ("db",)),
}
ALPHA = 0.75


@pytest.mark.parametrize(("dtype", "out_dtypes"), [
    ("float32", ("float64", "float32", "float16")), ("bfloat16", ("bfloat16", "float32", "float32"))])
@pytest.mark.parametrize("name", SEVERAL)
def test_results_each_their_own_way(xp, name, dtype, out_dtypes):
    """Every mix of overwritten and added, in these dtypes, by an alpha as a number or on the device.

    Those that are overwritten have the bits of a call that overwrites all, which other tests hold to float64; those
    that are added to are the old value more, but for roundings.
    """
    function, names, options, kind, able = SEVERAL[name]
    arrays = {key: xp.asarray(integers(array.shape, dtype, 3)) if array.dtype == "float32" else array
              for key, array in arrays_of(xp).items()}
    given_arrays = [arrays[one] for one in names]
    options = {key: arrays.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    if "plan" in options:
        options["plan"] = DenseGrads(dw=replace(IN_PARTS, dtype=dtype))
    with recorded() as plain_launches:
        plain = function(*given_arrays, **options)
    wide = {field: xp.zeros(array.shape, device.dtype_of(dtype if field == "dz" else out_dtype))
            for field, array, out_dtype in zip(kind._fields, plain, out_dtypes, strict=False)}
    scaled = function(*given_arrays, alpha=ALPHA, out=kind(**wide), **options)
    for count in range(len(able) + 1):
        for added in itertools.combinations(able, count):
            outs = {field: xp.full(array.shape, 2 if field in added else xp.nan, array.dtype)
                    for field, array in wide.items()}
            alpha = xp.asarray(np.array(ALPHA, "float32")) if (len(added) + out_dtypes.index("float32")) % 2 else ALPHA
            with recorded() as launches:
                result = function(*given_arrays, alpha=alpha, out=kind(**outs), accumulate=added, **options)
            assert [one.kernel for one in launches] == [one.kernel for one in plain_launches]
            for field in kind._fields:
                now, exact = host(getattr(result, field)), host(getattr(scaled, field))
                assert now.dtype == host(outs[field]).dtype
                if field not in added:
                    assert (bits(now) == bits(exact)).all(), (field, added)
                else:
                    # Each is rounded to its dtype, and the sum that was added to in the accumulator's before.
                    now, exact = now.astype("float64"), exact.astype("float64")
                    roundings = 2 * ROUNDOFF[host(wide[field]).dtype.name] + ROUNDOFF["float32"]
                    assert (np.abs(now - 2 - exact) <= roundings * (np.abs(exact) + np.abs(now))).all(), (field, added)


@pytest.mark.parametrize("name", ["bias_grad compensated", "weight_grad in parts", "input_grad", "dense_grads",
                                  "dense_grads below", "activation_grad weighted", "cross_entropy_grad",
                                  "cross_entropy in parts"])
def test_alpha_on_the_device(xp, name):
    """Read by the launches: never fetched, and what it holds when they run counts."""
    function, arrays, options = given(xp, EVERY_CALL[name])
    alpha = xp.asarray(np.array(3.0, "float32"))
    options = options | {"alpha": alpha}
    prepared = prepare(function, *arrays, **options)
    for value in (3.0, -0.5):
        alpha[...] = value
        ordinary = function(*arrays, **options | {"alpha": value})
        assert same_bits(function(*arrays, **options), ordinary)
        assert same_bits(prepared(), ordinary)
    assert same_bits(prepared.rebind(alpha=2.0)(), function(*arrays, **options | {"alpha": 2.0}))


def test_alpha_on_the_device_of_float64(xp):
    dz = xp.asarray(normal((SAMPLES, OUTPUTS), "float64", 3))
    alpha = xp.asarray(np.array(1 / 3, "float64"))
    assert same_bits(bias_grad(dz, alpha=alpha), bias_grad(dz, alpha=1 / 3))


def test_alpha_apart_from_the_workspace(xp):
    function, arrays, options = given(xp, NEEDY["weight_bias_grad"])
    memory = memory_at(xp, prepare(function, *arrays, **options).workspace_bytes)
    prepared = prepare(function, *arrays, workspace=memory, **options)
    with pytest.raises(PrepareError, match="workspace overlaps"):
        prepared.rebind(alpha=memory[:4].view("float32").reshape(()))


@pytest.mark.parametrize("function", [None, "bias_grad", np.ones((2, 3), "float32"), np.sum])
def test_what_is_no_function_of_the_package(function):
    with pytest.raises(TypeError, match="function must be one of this package's that computes gradients"):
        prepare(function, np.ones((2, 3), "float32"))


def test_alpha_apart_from_the_results(xp):
    dz = arrays_of(xp)["dz"]
    out = placed(xp, np.zeros(OUTPUTS, "float32"))
    with pytest.raises(OutError, match="out overlaps alpha"):
        bias_grad(dz, out=out, alpha=out[2:3].reshape(()))
    prepared = prepare(bias_grad, dz, out=out)
    with pytest.raises(OutError, match="out overlaps alpha"):
        prepared.rebind(alpha=out[2:3].reshape(()))
    elsewhere = placed(xp, np.array([2, 0, 0, 0, 0, 0, 0, 0, 0], "float32"))
    prepared.rebind(alpha=elsewhere[:1].reshape(()))
    with pytest.raises(OutError, match="out overlaps alpha"):
        prepared.rebind(out=elsewhere)


def test_results_of_its_own_apart_from_what_is_bound_to_it(xp):
    arrays = arrays_of(xp)
    prepared = prepare(weight_bias_grad, arrays["x"], arrays["dz"],
                       out=WeightBiasGrads(db=placed(xp, np.zeros(OUTPUTS + 1, "float32"))[1:]))
    dw = prepared.result.dw
    for change in ({"alpha": dw[0, 1:2].reshape(())}, {"out": WeightBiasGrads(db=dw[0])}):
        with pytest.raises(OutError, match="overlaps a result of this call in memory"):
            prepared.rebind(**change)
    square = placed(xp, np.ones((4, 3), "float32"))[1:]
    prepared = prepare(weight_grad, square, square)
    with pytest.raises(OutError, match="x overlaps a result of this call in memory"):
        prepared.rebind(x=prepared.result)
    assert same_bits(prepared(), weight_grad(square, square))


def test_an_out_has_no_name_of_its_own(xp):
    arrays = arrays_of(xp)
    prepared = prepare(weight_bias_grad, arrays["x"], arrays["dz"])
    with pytest.raises(PrepareError, match=r"out.dw cannot be bound by that name \(pass out=WeightBiasGrads"):
        prepared.rebind(**{"out.dw": prepared.result.dw})


@pytest.mark.only("gpu")
def test_alpha_that_kernels_cannot_read(xp):
    dz = arrays_of(xp)["dz"]
    for wrong, error, message in (
            (xp.zeros(2, "float32"), ShapeError, "alpha must be a number, or an array of one number; got"),
            (xp.zeros((), "float64"), DTypeError, "alpha on the device must have the type of the sums, float32"),
            (xp.zeros((), "float16"), DTypeError, "alpha on the device must have the type of the sums, float32"),
            (xp.zeros(8, "uint8")[1:5].view("float32").reshape(()), ShapeError, "alpha must begin at a multiple of")):
        with pytest.raises(error, match=message):
            bias_grad(dz, alpha=wrong)
