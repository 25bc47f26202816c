"""What is accepted and what is refused: containers, streams, outputs, and errors that say what to do."""
import sys
import warnings
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import densegrad
from densegrad import DenseGrads, device, errors, operands, packing, testing
from densegrad.launches import Matrix, Slot
from densegrad.plans import MatmulPlan, plan_batch_sum, plan_matmul
from densegrad.testing import Placed, bits, check_within, host, integers


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, device.dtype_of(dtype))


def read_only(array):
    array.flags.writeable = False
    return array


X, W, DZ = zeros(6, 4), zeros(4, 3), zeros(6, 3)
PLAN = MatmulPlan(4, 3, 6, "float32", 8, 8, 4, 4, 4)

#: what is wrong -> (call, class of the built-in error, class of ours or None, what the message says)
REFUSED = {
    "bias: list": (lambda: densegrad.bias_grad([[1.0]]), TypeError, None, ["dz must be", "got list", "asarray"]),
    "bias: scalar": (lambda: densegrad.bias_grad(1.0), TypeError, None, ["dz must be", "got float"]),
    "bias: None": (lambda: densegrad.bias_grad(None), TypeError, None, ["dz must be", "got NoneType"]),
    "bias: masked": (lambda: densegrad.bias_grad(np.ma.masked_array(DZ)), TypeError, None,
                     ["dz must be", "mask", "filled"]),
    "bias: vector": (lambda: densegrad.bias_grad(zeros(6)), ValueError, densegrad.ShapeError,
                     ["dz must have at least 2 dimensions", "(6,)", "dz[None, :]"]),
    "bias: cube, axis 1": (lambda: densegrad.bias_grad(zeros(2, 3, 4), batch_axis=1), ValueError, densegrad.ShapeError,
                           ["dz must have 2 dimensions", "batch_axis=1", "(2, 3, 4)"]),
    "axis 2": (lambda: densegrad.bias_grad(DZ, batch_axis=2), ValueError, None, ["batch_axis must be 0", "got 2"]),
    "axis -1": (lambda: densegrad.bias_grad(DZ, batch_axis=-1), ValueError, None, ["batch_axis must be 0", "got -1"]),
    "axis None": (lambda: densegrad.bias_grad(DZ, batch_axis=None), TypeError, None,
                  ["batch_axis must be", "got None"]),
    "weight layout": (lambda: densegrad.weight_grad(X, DZ, weight_layout="oi"), ValueError, None,
                      ["weight_layout must be", "in_out", "out_in", "'oi'"]),
    "integers": (lambda: densegrad.bias_grad(zeros(6, 3, dtype="int64")), TypeError, densegrad.DTypeError,
                 ["dz must be float16", "got int64", "astype"]),
    "complex": (lambda: densegrad.bias_grad(zeros(6, 3, dtype="complex64")), TypeError, densegrad.DTypeError,
                ["dz", "complex64"]),
    "object": (lambda: densegrad.bias_grad(zeros(6, 3, dtype="object")), TypeError, densegrad.DTypeError,
               ["dz", "object"]),
    "bool": (lambda: densegrad.bias_grad(zeros(6, 3, dtype="bool")), TypeError, densegrad.DTypeError, ["dz", "bool"]),
    "nameless": (lambda: densegrad.bias_grad(np.zeros((6, 3), "V2")), TypeError, densegrad.DTypeError,
                 ["dz must be float16", "got |V2", "dz.view(ml_dtypes.bfloat16)"]),
    "byte order": (lambda: densegrad.bias_grad(DZ.astype(">f4")), TypeError, densegrad.DTypeError,
                   ["dz", "byte order"]),
    "mixed": (lambda: densegrad.weight_grad(X.astype("float64"), DZ), TypeError, densegrad.DTypeError,
              ["x and dz must have the same dtype", "float64", "float32", "astype"]),
    "mixed w": (lambda: densegrad.input_grad(DZ, W.astype("float16")), TypeError, densegrad.DTypeError,
                ["w and dz must have the same dtype", "float16"]),
    "samples differ": (lambda: densegrad.weight_grad(zeros(5, 4), DZ), ValueError, densegrad.ShapeError,
                       ["x has 5 samples on axis 0", "dz has 6"]),
    "other axis": (lambda: densegrad.weight_grad(zeros(3, 4), DZ), ValueError, densegrad.ShapeError,
                   ["x has 3 samples", "did you mean batch_axis=1?"]),
    "other axis, back": (lambda: densegrad.weight_grad(X, DZ, batch_axis=1), ValueError, densegrad.ShapeError,
                         ["x has 6 samples", "did you mean batch_axis=0?"]),
    "x transposed": (lambda: densegrad.weight_grad(X.T, DZ), ValueError, densegrad.ShapeError, ["did you mean x.T?"]),
    "x vector": (lambda: densegrad.weight_grad(zeros(6), DZ), ValueError, densegrad.ShapeError,
                 ["x must have at least 2", "(6,)"]),
    "batch axes": (lambda: densegrad.weight_grad(zeros(3, 2, 4), DZ), ValueError, densegrad.ShapeError,
                   ["x and dz must have the same batch axes", "(3, 2)", "(6,)"]),
    "w vector": (lambda: densegrad.input_grad(DZ, zeros(3)), ValueError, densegrad.ShapeError,
                 ["w must have 2 dimensions"]),
    "w transposed": (lambda: densegrad.input_grad(DZ, W.T), ValueError, densegrad.ShapeError,
                     ["w must have shape", "(3, 4)", 'did you mean weight_layout="out_in"?']),
    "w, other layout": (lambda: densegrad.input_grad(DZ, W, weight_layout="out_in"), ValueError, densegrad.ShapeError,
                        ["w must have shape", 'did you mean weight_layout="in_out"?']),
    "w, no fit": (lambda: densegrad.input_grad(DZ, zeros(4, 5)), ValueError, densegrad.ShapeError,
                  ["w must have shape (in_features, 3)", "(4, 5)", "batch_axis"]),
    "w against x": (lambda: densegrad.dense_grads(X, zeros(5, 3), DZ), ValueError, densegrad.ShapeError,
                    ["w must have shape (4, 3)", "(5, 3)"]),
    "need nothing": (lambda: densegrad.dense_grads(X, W, DZ, need=()), ValueError, None, ["need must name some of"]),
    "need unknown": (lambda: densegrad.dense_grads(X, W, DZ, need=("dy",)), ValueError, None, ["need must name", "dy"]),
    "need without w": (lambda: densegrad.dense_grads(X, None, DZ), TypeError, None,
                       ["w must be an array", "dx is needed", "None"]),
    "out of one": (lambda: densegrad.dense_grads(X, W, DZ, out=zeros(4, 3)), TypeError, None,
                   ["out must be DenseGrads("]),
    "accumulate, no out": (lambda: densegrad.bias_grad(DZ, accumulate=True), ValueError, densegrad.OutError,
                           ["accumulate=True", "out", "not given"]),
    "accumulate, no out.db": (lambda: densegrad.dense_grads(X, W, DZ, out=DenseGrads(dw=zeros(4, 3)), need=("dw", "db"),
                                                            accumulate=True),
                              ValueError, densegrad.OutError, ["adds into out.db", "pass out=DenseGrads(db=...), or"]),
    "accumulate, no out of two": (lambda: densegrad.weight_bias_grad(X, DZ, accumulate=True), ValueError,
                                  densegrad.OutError, ["adds into out.dw", "pass out=WeightBiasGrads(dw=...), or"]),
    "out, not needed": (lambda: densegrad.dense_grads(X, W, DZ, need=("db",), out=DenseGrads(dw=zeros(4, 3))),
                        ValueError, densegrad.OutError,
                        ["out.dw was given, but dw is not needed", "name it in need=, or leave it out"]),
    "plan, not needed": (lambda: densegrad.dense_grads(X, W, DZ, need="db", plan=DenseGrads(dw=PLAN)), ValueError,
                         densegrad.PlanError, ["plan.dw was given, but dw is not needed"]),
    "precision without a product": (lambda: densegrad.dense_grads(X, W, DZ, need="db", precision="tf16"), ValueError,
                                    None, ["precision must be None", "got 'tf16'"]),
    "plan of another kind": (lambda: densegrad.bias_grad(DZ, plan=PLAN), TypeError, None,
                             ["plan must be a BatchSumPlan"]),
    "plan of another shape": (lambda: densegrad.weight_grad(X, DZ, plan=replace(PLAN, rows=9)), ValueError,
                              densegrad.PlanError, ["plan was made for rows 9", "have 4", "make one for rows 4, cols"]),
    "plan of another dtype": (lambda: densegrad.weight_grad(X, DZ, plan=replace(PLAN, dtype="float16")), ValueError,
                              densegrad.PlanError, ["plan was made for dtype float16"]),
    "alpha past float32": (lambda: densegrad.bias_grad(DZ, alpha=1e300), ValueError, None,
                           ["alpha must be within 3.4e+38 of 0", "float32", "got 1e+300", "float64"]),
    "alpha past float32, of products": (lambda: densegrad.weight_bias_grad(X, DZ, alpha=-1e39), ValueError, None,
                                        ["alpha must be", "got -1e+39"]),
    "alpha past float32, for one of three": (
        lambda: densegrad.dense_grads(X, W, DZ, alpha=1e39, out=DenseGrads(dw=zeros(4, 3, dtype="float64"))),
        ValueError, None, ["alpha must be", "got 1e+39"]),
    "alpha past float32, below an activation": (
        lambda: densegrad.dense_grads(X, W, DZ, alpha=1e39, activation="relu", z=DZ, need=("dw", "db"),
                                      out=DenseGrads(db=zeros(3, dtype="float64"))),
        ValueError, None, ["alpha must be", "got 1e+39"]),
    "alpha past float64": (lambda: densegrad.bias_grad(DZ.astype("float64"), alpha=10 ** 400), ValueError, None,
                           ["alpha must be within 1.8e+308 of 0", "float64", "got 100000"]),
    "slope past float32": (lambda: densegrad.activation_grad(DZ, DZ, "leaky_relu", negative_slope=1e39), ValueError,
                           None, ["negative_slope must be within 3.4e+38 of 0"]),
}

#: what is wrong with an output -> (output for a sum of three, classes of the built-in error and of ours, what is said)
REFUSED_OUTS = {
    "shape": (lambda: zeros(4), ValueError, densegrad.ShapeError, ["out must have shape (3,)", "(4,)"]),
    "dimensions": (lambda: zeros(1, 3), ValueError, densegrad.ShapeError, ["out must have shape (3,)", "(1, 3)"]),
    "dtype": (lambda: zeros(3, dtype="int32"), TypeError, densegrad.DTypeError, ["out must be float16", "int32"]),
    "list": (lambda: [0.0] * 3, TypeError, None, ["out must be", "list"]),
    "read-only": (lambda: read_only(zeros(3)), ValueError, densegrad.OutError, ["out is read-only"]),
    "broadcast": (lambda: np.lib.stride_tricks.as_strided(zeros(1), (3,), (0,)), ValueError, densegrad.OutError,
                  ["several elements of out share memory", "copy"]),
    "overlapping": (lambda: DZ[0], ValueError, densegrad.OutError, ["out overlaps dz"]),
}


def refused(call, builtin, ours, fragments):
    with pytest.raises(builtin) as raised:
        call()
    if ours is not None:
        assert isinstance(raised.value, ours)
    missing = [fragment for fragment in fragments if fragment not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_named_with_its_cure(case):
    refused(*REFUSED[case])


@pytest.mark.parametrize("case", REFUSED_OUTS)
def test_bad_outputs_are_named(case):
    make, *raised = REFUSED_OUTS[case]
    refused(lambda: densegrad.bias_grad(DZ, out=make()), *raised)


@pytest.mark.parametrize("alpha", [1e39, np.inf, np.nan])
def test_alpha_is_a_number_of_what_it_is_multiplied_in(xp, alpha):
    """float64 where that is what comes out; infinity and NaN are numbers of both."""
    dz = xp.asarray(np.ones((2, 3), "float32"))
    wide = densegrad.bias_grad(dz, alpha=alpha, out=xp.zeros(3, "float64"))
    np.testing.assert_array_equal(host(wide), [2 * alpha] * 3)
    if not np.isfinite(alpha):
        np.testing.assert_array_equal(host(densegrad.bias_grad(dz, alpha=alpha)), [alpha] * 3)


def test_numbers_of_numpy_are_numbers():
    """Those of few bits, too, in which the largest float64 is infinite; huge integers are out of range."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for two in (np.float16(2), np.float32(2), np.array(2, "int8"), np.array(2, ml_dtypes.bfloat16), Fraction(2)):
            assert densegrad.bias_grad(DZ + 1, alpha=two).tolist() == [2 * DZ.shape[0]] * 3
    refused(lambda: densegrad.bias_grad(DZ, alpha=10 ** 400), ValueError, None, ["alpha must be within 3.4e+38 of 0"])


@pytest.mark.parametrize("alpha", [np.ma.masked, np.ma.array(1.0), np.array(True), np.array(1j), np.array("1")])
def test_what_is_no_number(alpha):
    refused(lambda: densegrad.bias_grad(DZ, alpha=alpha), TypeError, None, ["alpha must be a number", "got"])


def test_options_without_a_hash():
    """An array of one number is an index as good as its number; lists within lists are no names."""
    assert densegrad.bias_grad(DZ + 1, batch_axis=np.array(0)).tolist() == [DZ.shape[0]] * 3
    for names in (np.array(0), [["dx"]], [3]):
        refused(lambda need=names: densegrad.dense_grads(X, W, DZ, need=need), ValueError, None,
                ["need must name some of"])
    refused(lambda: densegrad.dense_grads(X, W, DZ, accumulate=np.array(0)), TypeError, None,
            ["accumulate must be True or False"])
    refused(lambda: densegrad.dense_grads(X, W, DZ, accumulate=[["dx"]]), ValueError, None,
            ["accumulate must be True, False or names among dx, dw, db"])


def test_float64_does_not_go_into_half(xp):
    refused(lambda: densegrad.bias_grad(DZ.astype("float64"), out=zeros(3, dtype="float16")), TypeError,
            densegrad.DTypeError, ["out must be float64 or float32", "float16"])


def test_interleaved_arrays_do_not_overlap(xp):
    """Odd and even columns of one array share no byte, although their address ranges do."""
    both = xp.asarray(integers((7, 6), "float32"))
    exact = host(both)[:, ::2].sum(axis=0)
    out = both[0, 1::2]
    densegrad.bias_grad(both[:, ::2], out=out)
    check_within(out, exact, 0)


def strided(xp, shape, strides, dtype="float32", offset=0):
    """An array of zeros with these strides in elements."""
    cells = xp.zeros(64, dtype)
    return xp.lib.stride_tricks.as_strided(cells[offset:], shape, tuple(cells.itemsize * step for step in strides))


#: (shape, strides in elements, first element, whether two of the elements are one)
INTERLEAVED = {
    "the diagonal": ((2, 2), (1, 1), 0, True), "windows": ((3, 4), (2, 1), 0, True),
    "meet in the end": ((4, 3), (2, 3), 0, True), "would meet later": ((3, 3), (3, 4), 0, False),
    "would meet one later": ((3, 2), (2, 3), 0, False), "backwards": ((2, 2), (-1, 1), 8, True),
    "between": ((3, 2), (4, 2), 0, False), "broadcast": ((1, 3), (5, 0), 0, True), "one": ((1, 3), (0, 1), 0, False)}


@pytest.mark.parametrize("case", INTERLEAVED)
def test_an_output_may_interleave_with_itself_but_not_overlap(xp, case):
    shape, strides, offset, overlaps = INTERLEAVED[case]
    x, dz = xp.asarray(np.ones((3, shape[0]), "float32")), xp.asarray(np.ones((3, shape[1]), "float32"))
    out = strided(xp, shape, strides, offset=offset)
    if overlaps:
        refused(lambda: densegrad.weight_grad(x, dz, out=out), ValueError, densegrad.OutError,
                ["several elements of out share memory", "pass out.copy()"])
        refused(lambda: densegrad.activation_grad(xp.ones(shape, "float32"), out=densegrad.OutputGrads(dz=out)),
                ValueError, densegrad.OutError, ["several elements of out.dz share memory"])
        np.testing.assert_array_equal(host(out), 0)
    else:
        np.testing.assert_array_equal(host(densegrad.weight_grad(x, dz, out=out)), np.full(shape, 3))


@pytest.mark.parametrize("seed", range(4))
def test_an_output_overlaps_itself_where_two_indices_have_one_address(seed):
    """Against every address written out, of one to four axes, strides within an element too."""
    draw, verdicts = np.random.default_rng(seed), []
    for _ in range(250):
        axes = draw.integers(1, 5)
        shape, itemsize = tuple(map(int, draw.choice((0, 1, 2, 2, 3, 3, 4, 4), axes))), int(draw.choice((2, 4)))
        strides = tuple(map(int, draw.integers(-12, 13, axes)))
        memory = device.Memory(shape, strides, np.dtype(f"V{itemsize}"), 1024, False, "nowhere")
        begins = sum((index * stride for index, stride in zip(np.indices(shape), strides, strict=True)), start=0)
        touched = np.add.outer(np.ravel(begins), np.arange(itemsize))
        verdicts.append(operands.overlaps_itself(memory))
        assert verdicts[-1] == (len(np.unique(touched)) < touched.size), (shape, strides, itemsize)
    assert {True, False} == set(verdicts)


@pytest.mark.parametrize("backwards", [False, True])
def test_an_output_next_to_the_input_does_not_overlap_but_one_byte_further_does(backwards, xp):
    """Whichever way the input is walked through: its address range ends where its last element does."""
    memory = xp.asarray(np.ones(20, "float32"))
    dz = memory[3:15].reshape(4, 3)[::-1 if backwards else 1]
    for near in (memory[:3], memory[15:18]):
        densegrad.bias_grad(dz, out=near)
        check_within(near, np.full(3, 4.0), 0)
    for touching in (memory[1:4], memory[14:17]):
        refused(lambda out=touching: densegrad.bias_grad(dz, out=out), ValueError, densegrad.OutError,
                ["out overlaps dz"])


def test_outputs_may_not_overlap_one_another(xp):
    memory = xp.zeros((5, 3), np.float32)
    outs = DenseGrads(dw=memory[:4], db=memory[3])
    arrays = [xp.asarray(array) for array in (X, W, DZ)]
    refused(lambda: densegrad.dense_grads(*arrays, need=("dw", "db"), out=outs), ValueError, densegrad.OutError,
            ["out.db overlaps out.dw"])


@pytest.mark.parametrize("wrong", [
    {"stream": "fast"}, {"plan": plan_matmul(9, 9, 9, "float32")}, {"batch_axis": 1}, {"weight_layout": "out_in"}])
def test_a_failed_call_leaves_out_untouched(xp, wrong):
    out = Placed(integers((4, 3), "float32"), "C", xp, testing.SENTINEL)
    before = bits(out.read())
    with pytest.raises((ValueError, TypeError)):
        densegrad.weight_grad(xp.asarray(X), xp.asarray(DZ), out=out.array, **wrong)
    assert (bits(out.read()) == before).all()


def test_a_failed_step_of_dense_grads_leaves_every_out_untouched(xp):
    outs = [Placed(integers(shape, "float32"), "C", xp, testing.SENTINEL) for shape in ((6, 4), (4, 3), (4,))]
    before = [bits(out.read()) for out in outs]
    arrays = [xp.asarray(array) for array in (X, W, DZ)]
    refused(lambda: densegrad.dense_grads(*arrays, out=DenseGrads(*(out.array for out in outs))), ValueError,
            densegrad.ShapeError, ["out.db must have shape (3,)"])
    for out, kept in zip(outs, before, strict=True):
        assert (bits(out.read()) == kept).all()


def test_the_container_that_goes_in_comes_out(xp):
    for module in {np, xp}:
        result = densegrad.bias_grad(module.asarray(integers((5, 3), "float32")))
        assert isinstance(result, module.ndarray)
        assert result.dtype == np.float32


def test_numpy_arrays_of_every_layout_are_moved_and_brought_back():
    values = integers((6, 5), "float32")
    for layout in testing.LAYOUTS:
        out = testing.poisoned((5,), "float32", layout)
        assert densegrad.bias_grad(Placed(values, layout).array, out=out.array) is out.array
        check_within(out.read(), values.sum(axis=0), 0)
        densegrad.bias_grad(Placed(values, layout).array, out=out.array, accumulate=True)
        check_within(out.read(), 2 * values.sum(axis=0), 0)


class Foreign:
    """An array of another library: nothing but the CUDA array interface."""

    def __init__(self, array, stream=None, readonly=False):
        self.__cuda_array_interface__ = {
            **array.__cuda_array_interface__, "stream": stream, "data": (array.data.ptr, readonly)}
        self.kept = array


@pytest.mark.only("gpu")
def test_foreign_arrays_go_in_and_out(xp):
    x, dz = integers((6, 4), "float32", 1), integers((6, 3), "float32", 2)
    out = xp.full((4, 3), np.nan, np.float32)
    given = Foreign(out)
    assert densegrad.weight_grad(Foreign(xp.asarray(x)), Foreign(xp.asarray(dz.T).T), out=given) is given
    check_within(out, x.T @ dz, 0)
    assert isinstance(densegrad.bias_grad(Foreign(xp.asarray(dz))), xp.ndarray)
    refused(lambda: densegrad.bias_grad(Foreign(xp.asarray(dz)), out=Foreign(xp.zeros(3, np.float32), readonly=True)),
            ValueError, densegrad.OutError, ["out is read-only"])


@pytest.mark.only("gpu")
def test_outputs_of_another_place_are_refused(xp):
    on_device = xp.asarray(DZ)
    refused(lambda: densegrad.bias_grad(on_device, out=zeros(3)), ValueError, densegrad.OutDeviceError,
            ["out must lie where the inputs do"])
    refused(lambda: densegrad.weight_grad(X, on_device), RuntimeError, densegrad.DeviceError,
            ["x and dz must lie on the same device", "the host"])


class Stream:
    """A stream of another library: nothing but the CUDA stream protocol."""

    def __init__(self, pointer):
        self.pointer = pointer

    def __cuda_stream__(self):
        return 0, self.pointer


@pytest.fixture
def launched_on(monkeypatch):
    """The streams that launches were queued on, in order."""
    streams = []
    launch = packing.PackedLaunches.__call__

    def watch(self, values, stream):
        streams.append((stream, sys.modules["cupy"].cuda.get_current_stream().ptr))
        launch(self, values, stream)

    monkeypatch.setattr(packing.PackedLaunches, "__call__", watch)
    return streams


@pytest.mark.only("gpu")
@pytest.mark.parametrize("kind", ["CuPy", "Numba", "int", "protocol", "current", "default"])
def test_work_and_memory_are_on_the_stream(xp, launched_on, kind):
    """Every launch, and the allocation of what it writes, is on the stream that was asked for."""
    from numba import cuda

    stream = xp.cuda.Stream(non_blocking=True)
    asked = {"CuPy": stream, "Numba": cuda.external_stream(stream.ptr), "int": stream.ptr,
             "protocol": Stream(stream.ptr), "current": None, "default": 0}[kind]
    pointer = 0 if kind == "default" else stream.ptr
    dz = integers((6, 3), "float32")
    if kind == "current":
        with stream:
            result = densegrad.bias_grad(xp.asarray(dz))
    else:
        given = xp.asarray(dz)
        xp.cuda.Device().synchronize()
        result = densegrad.bias_grad(given, stream=asked)
    assert set(launched_on) == {(pointer, pointer)}
    stream.synchronize()
    check_within(result, dz.sum(axis=0), 0)


@pytest.mark.only("simulator")
def test_streams_of_the_simulator_and_pointers_are_taken_where_nothing_is_queued():
    from numba import cuda

    for stream in (cuda.stream(), cuda.default_stream(), 0, Stream(0)):
        check_within(densegrad.bias_grad(DZ, stream=stream), DZ.sum(axis=0), 0)


@pytest.mark.parametrize("stream", ["fast", 1.5, True, object()])
def test_what_is_no_stream_is_refused(xp, stream):
    refused(lambda: densegrad.bias_grad(xp.asarray(DZ), stream=stream), TypeError, None,
            ["stream must be", "__cuda_stream__"])


@pytest.mark.only("gpu")
def test_a_foreign_array_is_waited_for_on_the_stream_that_writes_it(xp, monkeypatch):
    written, asked = xp.cuda.Stream(non_blocking=True), []
    monkeypatch.setattr(device.Gpu, "wait_for", lambda self, memory, stream: asked.append((memory.stream, stream)))
    with written:
        dz = xp.asarray(integers((6, 3), "float32"))
    densegrad.bias_grad(Foreign(dz, stream=written.ptr), stream=0)
    assert asked == [(written.ptr, 0)]
    monkeypatch.undo()
    check_within(densegrad.bias_grad(Foreign(dz, stream=written.ptr), stream=0), host(dz).sum(axis=0), 0)


def test_views_with_a_contiguous_axis_are_not_copied(xp):
    place = device.current()
    for layout in ("C", "F", "padded", "padded F", "offset", "gaps", "upside down"):
        array = Placed(integers((6, 5), "float32"), layout, xp).array
        argument = operands.accept(dz=array).dz
        assert not argument.compact, layout
        assert int(place.address(place.placed(argument.array, argument.compact))) == place.memory(array).byte, layout
    for layout in ("spread", "mirrored"):
        assert operands.accept(dz=Placed(integers((6, 5), "float32"), layout, xp).array).dz.compact, layout


@pytest.mark.parametrize(("cols", "row_stride", "address", "access"), [
    (8, 8, 256, 4), (8, 9, 256, 1), (8, 10, 256, 2), (6, 8, 256, 2), (7, 8, 256, 1), (8, 8, 264, 2), (8, 8, 260, 1)])
def test_the_widest_access_is_aligned_in_every_row(cols, row_stride, address, access):
    alignment = device.alignment_of(address)
    assert Matrix(Slot("x"), "float32", 3, cols, row_stride, 1, alignment).access(4) == access
    assert Matrix(Slot("x"), "float32", 3, cols, row_stride, 2, alignment).access(4) == 1


def test_plans_know_their_sizes():
    sum_plan = plan_batch_sum(6, 3, "float32", "flat")
    refused(lambda: densegrad.bias_grad(zeros(7, 3), plan=sum_plan), ValueError, densegrad.PlanError,
            ["plan was made for samples 6"])


def test_every_error_is_of_one_family():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(classes) > 5
    assert all(issubclass(one, densegrad.DensegradError) for one in classes)
