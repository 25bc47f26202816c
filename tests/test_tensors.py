"""CUDA tensors of PyTorch, played by a stand-in for torch over CuPy's memory: whose stream and memory, what is copied.

A torch with CUDA runs tests/test_torch.py instead; here stands what can be seen without one.
"""
import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import densegrad as dg
from benchmarks import counting
from densegrad import calls, device, packing, tensors
from densegrad.testing import bits, host

pytestmark = pytest.mark.only("gpu")


class DType(str):
    """torch.float32, say."""

    __slots__ = ()


class Tensor:
    """A CUDA tensor, as far as densegrad looks at one."""

    layout, is_cuda, is_nested, is_meta, is_quantized = "strided", True, False, False, False
    device = SimpleNamespace(type="cuda")

    def __init__(self, array):
        self.array, self.shape = array, array.shape
        self.dtype = DType(f"torch.{array.dtype.name}")

    def stride(self):
        if self.layout != "strided" or self.is_nested:
            raise RuntimeError  # as PyTorch's do, which have none
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def data_ptr(self):
        return self.array.data.ptr

    def get_device(self):
        return self.array.device.id

    def element_size(self):
        return self.array.itemsize

    def numel(self):
        return self.array.size

    def is_neg(self):
        return False

    def is_conj(self):
        return False

    def detach(self):
        return self

    def __len__(self):
        return len(self.array)

    def __getitem__(self, key):
        return Tensor(self.array[key])

    def __setitem__(self, key, value):
        self.array[key] = value.array

    def swapaxes(self, one, other):
        return Tensor(self.array.swapaxes(one, other))

    def clone(self, memory_format):
        assert memory_format == "C"
        self.torch.copied.append(self)
        return Tensor(self.array.copy(order="C"))


@pytest.fixture
def torch(xp, monkeypatch):
    """The stand-in, which remembers what was asked of it."""
    of_torch, current = xp.cuda.Stream(non_blocking=True), []
    made = SimpleNamespace(
        Tensor=Tensor, nn=SimpleNamespace(Parameter=type("Parameter", (Tensor,), {})), strided="strided",
        contiguous_format="C", float32=DType("torch.float32"), bfloat16=DType("torch.bfloat16"),
        uint8=DType("torch.uint8"), device=lambda kind, index: (kind, index), allocated=[], copied=[], used=[])

    def empty_strided(shape, steps, dtype, device):
        assert device == ("cuda", 0)
        made.used.append(made.cuda.current_stream(0).cuda_stream)
        order = sorted(range(len(shape)), key=lambda axis: -steps[axis])
        made.allocated.append(Tensor(xp.empty([shape[axis] for axis in order], tensors_dtype(dtype)).transpose(
            [order.index(axis) for axis in range(len(shape))])))
        assert made.allocated[-1].stride() == tuple(steps)
        return made.allocated[-1]

    @contextlib.contextmanager
    def stream(other):
        current.append(other)
        yield
        current.pop()

    made.empty_strided = empty_strided
    made.cuda = SimpleNamespace(
        device=lambda index: contextlib.nullcontext(), stream=stream,
        ExternalStream=lambda pointer, device: SimpleNamespace(cuda_stream=pointer),
        current_stream=lambda index: current[-1] if current else SimpleNamespace(cuda_stream=of_torch.ptr))
    made.own = of_torch
    monkeypatch.setattr(Tensor, "torch", made, raising=False)
    monkeypatch.setitem(sys.modules, "torch", made)
    monkeypatch.setattr(calls, "_kept", type(calls._kept)())
    monkeypatch.setattr(device.current(), "_of_tensors", {})
    tensors.plain.cache_clear()
    yield made
    tensors.plain.cache_clear()


def tensors_dtype(dtype):
    return device.dtype_of(dtype.removeprefix("torch."))


@pytest.fixture
def streams(monkeypatch):
    """The streams of all launches."""
    found, launch = [], packing.PackedLaunches.__call__

    def record(self, values, stream):
        found.append(stream)
        launch(self, values, stream)

    monkeypatch.setattr(packing.PackedLaunches, "__call__", record)
    return found


def drawn(*shapes, dtype="float32"):
    draw = np.random.default_rng(3)
    return [draw.integers(-3, 4, shape).astype(device.dtype_of(dtype)) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_and_workspace_are_pytorchs_on_its_current_stream(dtype, torch, streams, xp):
    arrays = drawn((70, 12), (12, 5), (70, 5), dtype=dtype)
    for _ in range(2):  # as described, and as kept
        torch.allocated.clear()
        streams.clear()
        x, w, dz = (Tensor(xp.asarray(one)) for one in arrays)
        found = dg.dense_grads(x, w, dz, activation="relu", z=dz)
        assert {*streams} == {*torch.used} == {torch.own.ptr}
        assert len(torch.allocated) == 4  # a workspace, too
        assert all(any(one is made for made in torch.allocated) for one in found)
        x, w, dz = map(xp.asarray, arrays)
        for one, other in zip(found, dg.dense_grads(x, w, dz, activation="relu", z=dz), strict=True):
            np.testing.assert_array_equal(bits(one.array), bits(other))
    assert not torch.copied


def test_what_is_kept_of_one_layout_serves_no_other(torch, xp):
    dz, = drawn((64, 16))
    cells = xp.zeros(64 * 16 + 1, "float32")
    offset = cells[1:].reshape(64, 16)
    offset[...] = xp.asarray(dz)
    for given in (xp.asarray(dz), xp.asarray(dz.T.copy()).T, xp.asarray(dz.astype(device.dtype_of("bfloat16"))), offset,
                  xp.asarray(dz[:4]), xp.asarray(dz)):
        np.testing.assert_array_equal(host(dg.bias_grad(Tensor(given)).array).astype("float32"),
                                      host(given).astype("float32").sum(axis=0))
    assert device.current().seen(Tensor(offset)).layout[-1] == 4  # bytes that the address is a multiple of


def test_arrays_of_cupy_keep_its_stream_and_memory(torch, streams, xp):
    dz, = drawn((6, 4))
    assert type(dg.bias_grad(xp.asarray(dz))) is xp.ndarray
    assert not torch.allocated
    assert {*streams} == {xp.cuda.get_current_stream().ptr}


def test_another_stream_is_pytorchs_current_one_for_the_time_of_the_call(torch, streams, xp):
    dz, = drawn((6, 4))
    other = xp.cuda.Stream(non_blocking=True)
    dg.bias_grad(Tensor(xp.asarray(dz)), stream=other)
    assert {*streams} == {*torch.used} == {other.ptr}
    assert torch.cuda.current_stream(0).cuda_stream == torch.own.ptr


def test_a_stream_of_pytorch_is_taken_as_a_stream(xp, streams):
    other = xp.cuda.Stream(non_blocking=True)
    dg.bias_grad(xp.asarray(drawn((6, 4))[0]), stream=SimpleNamespace(cuda_stream=other.ptr))
    assert {*streams} == {other.ptr}


def test_outs_views_and_alpha_are_tensors(torch, xp):
    z, da = (xp.asarray(one) for one in drawn((3, 2, 4), (3, 2, 4)))
    da, z = da.transpose(1, 2, 0), z.transpose(1, 2, 0)
    alpha = xp.asarray(np.float32(2))
    found = dg.activation_grad(Tensor(da), Tensor(z), "relu", alpha=Tensor(alpha))
    expected = dg.activation_grad(da, z, "relu", alpha=alpha)
    assert found.dz.stride() == Tensor(expected.dz).stride()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(bits(one.array), bits(other))
    out = Tensor(xp.zeros(4, "float32"))
    spread = xp.asarray(drawn((12, 8))[0])[::2, ::2]
    assert dg.bias_grad(Tensor(spread), out=out) is out
    assert len(torch.copied) == 1
    np.testing.assert_array_equal(host(out.array), host(spread).sum(axis=0))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_micro_batches_into_main_gradients_are_the_launches_of_overwriting_and_no_pass_beyond(activation, torch, xp):
    """Counted where that can be: main gradients are read once more than overwriting reads, and nothing else moves."""
    x, w, dz = (Tensor(xp.asarray(one)) for one in drawn((64, 32), (16, 32), (64, 16), dtype="bfloat16"))
    options = {"activation": activation, "z": dz if activation else None, "weight_layout": "out_in"}
    main = dg.DenseGrads(dw=Tensor(xp.zeros((16, 32), "float32")), db=Tensor(xp.zeros(16, "float32")))

    def overwriting():
        return dg.dense_grads(x, w, dz, out=main, **options)

    def adding():
        return dg.dense_grads(x, w, dz, out=main, accumulate=("dw", "db"), **options)

    machine = counting.machine()

    def looked_at(call):
        """(launches, bytes allocated, what was counted) of a call, which copies nothing."""
        torch.allocated.clear()
        transfers = sys.modules["rehearsal"].machine().transfers if machine else []
        transfers.clear()
        with calls.recorded() as launches:
            counts = machine.count(call) if machine else call() and []
        assert not transfers
        return ([(one.kernel, one.grid, one.block) for one in launches],
                [one.array.nbytes for one in torch.allocated], counts)

    for call in (overwriting, adding):  # described, and their kernels brought to the device
        call()
    launches, allocated, counts = looked_at(overwriting)
    for _ in range(8):
        of_adding, allocated_by_adding, more = looked_at(adding)
        assert (of_adding, allocated_by_adding) == (launches, allocated)
        if counts:
            assert counting.total(more).store_sectors == counting.total(counts).store_sectors
            # Bulk reductions, with which Hopper's kernel adds, do not load.
            loaded = 16 + 16 * 32 * ("matmul_hopper" not in [kernel for kernel, *_ in launches])
            assert (counting.total(more).load_sectors - counting.total(counts).load_sectors) * 32 == loaded * 4
    assert not torch.copied


def test_a_prepared_call_stays_pytorchs(torch, streams, xp):
    first, second = drawn((6, 4), (6, 4))
    step = dg.prepare(dg.bias_grad, Tensor(xp.asarray(first)))
    step.rebind(dz=Tensor(xp.asarray(second)))
    assert step() is step.result
    assert {*streams} == {torch.own.ptr}
    np.testing.assert_array_equal(host(step.result.array), second.sum(axis=0))
    with pytest.raises(dg.PrepareError, match="must have the layout"):
        step.rebind(dz=xp.asarray(second))


@pytest.mark.parametrize("cut", [5, 16])
def test_chunks_are_added_in_pytorchs_memory_on_its_stream(cut, torch, streams, xp):
    x, dz = drawn((32, 64), (32, 128), dtype="bfloat16")
    accumulator = dg.GradientAccumulator(64, 128, "bfloat16", block=16)
    chunks = Tensor(xp.asarray(x)), Tensor(xp.asarray(dz))
    for rows in (slice(0, cut), slice(cut, 32)):
        accumulator.add(*(one[rows] for one in chunks))
    found = accumulator.result()
    assert {*streams} == {*torch.used} == {torch.own.ptr}
    assert not torch.copied
    np.testing.assert_array_equal(host(found.dw.array), x.astype("float32").T @ dz.astype("float32"))
    np.testing.assert_array_equal(host(found.db.array), dz.astype("float32").sum(axis=0))


@pytest.mark.parametrize(("attribute", "value", "cure"), [
    ("layout", "sparse", r"to_dense\(\)"), ("is_nested", True, r"unbind\(\)"), ("is_neg", lambda: True, "resolve_neg")])
def test_what_is_no_memory_is_refused_with_the_cure(attribute, value, cure, torch, xp):
    tensor = Tensor(xp.zeros((6, 4), "float32"))
    dg.bias_grad(tensor)
    setattr(tensor, attribute, value)
    with pytest.raises(TypeError, match=cure):
        dg.bias_grad(tensor)
