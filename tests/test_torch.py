"""PyTorch: its tensors as arrays, and layers whose backward is densegrad's.

Left out without PyTorch, as tests/test_against_torch.py is. What a layer's backward gives has the bits of dense_grads
of NumPy arrays, which other tests hold to float64; PyTorch's own backward is held to the same bounds beside it.
"""
import copy
import functools
import io
import itertools
import pickle
import re
import shutil
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import densegrad as dg
from benchmarks import host, operations, peers, run
from densegrad import calls, device, tensors
from densegrad.commands.demo import load_digits
from densegrad.plans import ACTIVATIONS
from densegrad.testing import bits, check_within, error_bound
from tests.docstring_examples import check_example

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")

from torch.nn.utils import prune  # noqa: E402

import densegrad.torch as dt  # noqa: E402
from densegrad.torch import MainGrads, convert, layers, linear  # noqa: E402

functional = torch.nn.functional
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def place(lane):
    """Where tensors lie: on the GPU if PyTorch has one, else on the CPU, from which both lanes take them."""
    return "cuda" if lane == "gpu" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """torch.compile as in a process that has compiled nothing before, here or in files."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()


@pytest.fixture
def draw(place):
    """Tensors of normally distributed numbers that require gradients."""
    generator = torch.Generator().manual_seed(7)

    def make(*shapes, dtype=torch.float32):
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(place, dtype) for shape in shapes]
        return [one.requires_grad_() for one in drawn]

    return make


def numpy_of(tensor):
    """A tensor's values, bfloat16 too."""
    return tensors.host_array(tensor.detach().cpu())


@contextmanager
def recorded():
    """The launches of backwards, too, which run in this thread and not in one of a GPU's."""
    with torch.autograd.set_multithreading_enabled(False), calls.recorded() as launches:
        yield launches


def same_bits(found, expected):
    """Hold tensors to the bits of others, or of arrays."""
    for one, other in zip(found, expected, strict=True):
        other = numpy_of(other) if isinstance(other, torch.Tensor) else other
        assert one.dtype == tensors.host_tensor(other).dtype
        np.testing.assert_array_equal(bits(numpy_of(one)), bits(other))


def gradients(function, given, dz):
    """Of what the function gives, by those of the given tensors that require gradients."""
    return torch.autograd.grad(function(*given), [one for one in given if one is not None and one.requires_grad], dz)


# Tensors in the core


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_read_as_their_values_and_come_back_as_tensors(dtype, draw, place):
    x, w, dz = draw((6, 4), (4, 3), (6, 3), dtype=dtype)
    arrays = [numpy_of(one) for one in (x, w, dz)]
    found = dg.dense_grads(x, torch.nn.Parameter(w), dz)
    assert all(type(one) is torch.Tensor and one.device.type == place and not one.requires_grad for one in found)
    same_bits(found, dg.dense_grads(*arrays))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_results_are_written_into_tensors(dtype, draw, place):
    x, dz = draw((6, 4), (6, 3), dtype=dtype)
    out = torch.full((4, 3), 2.0, dtype=torch.float32, device=place, requires_grad=True)
    half = torch.zeros(4, 3, dtype=dtype, device=place)
    wide, narrow = np.full((4, 3), 2, "float32"), np.zeros((4, 3), tensors.host_array(half.cpu()).dtype)
    assert dg.weight_grad(x, dz, out=out, accumulate=True) is out
    assert dg.weight_grad(x, dz, out=half) is half
    dg.weight_grad(numpy_of(x), numpy_of(dz), out=wide, accumulate=True)
    dg.weight_grad(numpy_of(x), numpy_of(dz), out=narrow)
    same_bits((out, half), (wide, narrow))


def test_a_tensor_may_be_resized_afterwards(place):
    """As FSDP does with gathered weights; tensor.numpy() would forbid it for good."""
    dz = torch.ones(6, 4, device=place)
    dg.bias_grad(dz)
    dz.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="has no memory of its own"):
        dg.bias_grad(dz)


def test_tensors_without_elements(place):
    for dtype in DTYPES:
        found = dg.dense_grads(*(torch.zeros(shape, dtype=dtype, device=place) for shape in ((0, 4), (4, 3), (0, 3))))
        assert [tuple(one.shape) for one in found] == [(0, 4), (4, 3), (3,)]
        assert not any(one.any() for one in found)


def test_any_strides_axes_and_places_in_memory(draw):
    z, da = draw((3, 2, 4), (3, 2, 4))
    z, da = z.permute(1, 2, 0), da.permute(1, 2, 0)
    found = dg.activation_grad(da, z, "relu")
    expected = dg.activation_grad(numpy_of(da), numpy_of(z), "relu")
    same_bits(found, expected)
    assert tuple(step * 4 for step in found.dz.stride()) == expected.dz.strides
    spread, = draw((6, 8))
    same_bits([dg.bias_grad(spread[::2, ::3])], [dg.bias_grad(numpy_of(spread)[::2, ::3].copy())])


def test_labels_masks_and_alpha_are_tensors_too(draw, place):
    z, = draw((4, 3))
    labels, mask = torch.tensor([0, 2, -100, 1], device=place), torch.tensor([True, True, True, False], device=place)
    alpha = torch.tensor(0.25, device=place)
    found = dg.cross_entropy_grad(z, labels, sample_weight=mask, alpha=alpha)
    same_bits(found, dg.cross_entropy_grad(numpy_of(z), numpy_of(labels), sample_weight=numpy_of(mask), alpha=0.25))
    if place == "cpu":
        with pytest.raises(ValueError, match=r"labels must be classes from 0 to 2.*got 3 for sample 1"):
            dg.cross_entropy_grad(z, torch.tensor([0, 3, 1, 1]))


def test_a_prepared_call_takes_other_tensors(draw, place):
    if device.current().kind == "gpu" and place == "cpu":
        with pytest.raises(dg.PrepareError, match="lies on the host"):
            dg.prepare(dg.bias_grad, draw((4, 3))[0])
        return
    first, second = draw((4, 3), (4, 3))
    step = dg.prepare(dg.bias_grad, first)
    same_bits([step().clone(), step.rebind(dz=second)()], [dg.bias_grad(numpy_of(one)) for one in (first, second)])
    with pytest.raises(dg.PrepareError, match="must have the layout that the call was prepared for"):
        step.rebind(dz=numpy_of(second))


def without_warnings(make):
    """What it makes, without the warnings of what is in beta or about to leave."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


UNREADABLE = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "to_dense()"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "to_dense()"),
    "blocked": (lambda: torch.ones(3, 3).to_mkldnn(), "to_dense()"),
    "meta": (lambda: torch.ones(3, 3, device="meta"), "torch.empty_like(tensor, device="),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8), "dequantize()"),
    "conjugate": (lambda: torch.ones(3, 3, dtype=torch.complex64).conj(), "resolve_conj()"),
    "negative": (lambda: torch.ones(3, 3, dtype=torch.complex64).conj().imag, "resolve_neg()"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged), "unbind()"),
    "nested of lengths": (lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), "unbind()"),
    "8 bits": (lambda: torch.ones(3, 3).to(torch.float8_e4m3fn), "to(torch.float32)"),
    "fake": (lambda: torch._subclasses.FakeTensorMode().from_tensor(torch.ones(3, 3)), "densegrad.torch.linear"),
}


@pytest.mark.parametrize("kind", sorted(UNREADABLE.keys() - {"quantised", "conjugate", "8 bits"}))
def test_what_is_no_memory_is_not_seen_as_that_of_a_cuda_tensor_whatever_its_dtype(kind):
    # of tensors on the CPU, which say the same of themselves
    assert device.seen_tensor(without_warnings(UNREADABLE[kind][0])) is None
    assert device.seen_tensor(torch.ones(3, 3)) is not None


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_memory_is_refused_with_the_cure(kind):
    make, cure = UNREADABLE[kind]
    tensor = without_warnings(make)
    for name, call in (("dz", lambda: dg.bias_grad(tensor)), ("x", lambda: dg.weight_grad(tensor, torch.ones(3, 2)))):
        with pytest.raises(TypeError, match=f"{name} must be .*got .*{re.escape(cure)}"):
            call()


def test_distributed_tensors_are_refused_with_the_cure():
    class Distributed(torch.Tensor):
        """What a DTensor looks like from outside, without a process group."""

        def to_local(self):
            return self

    with pytest.raises(TypeError, match=r"it is distributed: .*to_local\(\)"):
        dg.bias_grad(torch.ones(3, 3).as_subclass(Distributed))


def test_within_transforms_tensors_are_refused_with_the_cure():
    for transform in (torch.func.grad, torch.vmap):
        with pytest.raises(TypeError, match=r"call densegrad\.torch\.linear there"):
            transform(lambda dz: dg.bias_grad(dz).sum())(torch.ones(2, 3, 4))


def test_integers_are_refused_as_those_of_numpy_are():
    with pytest.raises(dg.DTypeError, match=r"got int32 \(convert it.*dz\.float\(\) of PyTorch"):
        dg.bias_grad(torch.ones(3, 4, dtype=torch.int32))


# linear


def bounds(x, weight, dz):
    """(exact gradients in float64, their bounds for sums in any order) of a layer."""
    rows, below = x.reshape(-1, x.shape[-1]), dz.reshape(-1, dz.shape[-1])
    name = str(x.dtype).removeprefix("torch.")
    for left, right, shape in ((below, weight, x.shape), (below.T, rows, weight.shape),
                               (below.T, torch.ones_like(rows[:, :1]), dz.shape[-1:])):
        left, right = (numpy_of(one).astype(np.float64) for one in (left, right))
        exact = (left @ right).reshape(shape)
        depth = left.shape[1]
        magnitude = (np.abs(left) @ np.abs(right)).reshape(shape)
        yield exact, error_bound(magnitude, exact, depth, depth, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_pytorch_for_linear(dtype, place):
    from torch.testing._internal.common_methods_invocations import op_db

    info, = (one for one in op_db if one.name == "nn.functional.linear")
    samples = list(info.sample_inputs(place, dtype, requires_grad=True))
    assert len(samples) >= 18
    for sample in samples if dtype in (torch.float32, torch.bfloat16) else samples[::3]:
        x, weight, bias = (sample.input, *sample.args, None)[:3]
        given = x, weight, bias
        z, own = linear(*given), functional.linear(*given)
        same_bits([z], [own])
        dz = torch.randn(z.shape, dtype=torch.float64).to(place, dtype)
        found = gradients(linear, given, dz)
        at_least_2d = [one[None] if one.dim() == 1 else one for one in (x, weight, dz)]
        need = ("dx", "dw", "db")[:len(found)]
        expected = dg.dense_grads(*map(numpy_of, at_least_2d), need=need, weight_layout="out_in")
        same_bits(found, [one.reshape(given[n].shape) for n, one in enumerate(expected) if one is not None])
        for ours, theirs, (exact, bound) in zip(found, gradients(functional.linear, given, dz), bounds(x, weight, dz),
                                                strict=False):
            check_within(numpy_of(ours), exact, bound)
            if place == "cpu":  # on a GPU cuBLAS may add up in half types
                check_within(numpy_of(theirs), exact, bound + np.abs(exact) * torch.finfo(dtype).eps)


@pytest.mark.parametrize("needed", list(itertools.product((True, False), repeat=3))[:-1])
def test_only_what_is_needed_is_computed(needed, draw):
    given = draw((5, 4), (3, 4), (3,))
    for one, wanted in zip(given, needed, strict=True):
        one.requires_grad_(wanted)
    dz, = draw((5, 3))
    with recorded() as launches:
        found = gradients(linear, given, dz)
    need = [name for name, wanted in zip(("dx", "dw", "db"), needed, strict=True) if wanted]
    with calls.recorded() as alone:
        expected = dg.dense_grads(*map(numpy_of, (given[0], given[1], dz)), need=need, weight_layout="out_in")
    same_bits(found, [one for one in expected if one is not None])
    assert [one.kernel for one in launches] == [one.kernel for one in alone]


def test_every_activation_has_its_forward():
    assert {*layers._FORWARD, "leaky_relu"} == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_and_the_layer_below_it_are_one_backward(activation, draw):
    given, (da,) = draw((5, 4), (3, 4), (3,)), draw((5, 3))
    options = {"negative_slope": 0.3} if activation == "leaky_relu" else {}
    forward = (lambda z: functional.leaky_relu(z, 0.3)) if options else layers._FORWARD[activation]
    z = functional.linear(*given)
    same_bits([linear(*given, activation=activation, **options)], [forward(z)])
    found = gradients(lambda *given: linear(*given, activation=activation, **options), given, da)
    named = {} if activation == "identity" else {"activation": activation, "z": numpy_of(z), **options}
    same_bits(found, dg.dense_grads(*map(numpy_of, (given[0], given[1], da)), **named, weight_layout="out_in"))
    wide = [one.detach().double().requires_grad_() for one in given]
    exact = gradients(lambda *given: forward(functional.linear(*given)), wide, da.double())
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)  # that it is this activation's


@pytest.mark.only("simulator")
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradcheck_and_gradgradcheck(activation, draw):
    given = draw((2, 3), (2, 3), (2,), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *given: linear(*given, activation=activation), given)
    assert torch.autograd.gradgradcheck(lambda *given: linear(*given, activation=activation), given)


@pytest.mark.only("simulator")
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradgradcheck_without_a_bias_and_of_a_part(activation, draw):
    x, weight = draw((2, 2), (2, 2), dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda *given: linear(*given, activation=activation), (x, weight),
                                        fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda weight: linear(x.detach(), weight, activation=activation), weight,
                                        fast_mode=True)


def test_torch_func_grad_and_its_own_gradient(draw):
    x, weight, bias = draw((3, 2), (2, 2), (2,), dtype=torch.float64)

    def loss(function):
        return lambda *given: function(*given).pow(3).sum()

    def twice(function):
        return lambda weight: sum(one.pow(2).sum() for one in torch.func.grad(loss(function), (0, 1, 2))(
            x.detach(), weight, bias.detach()))

    for one, other in zip(torch.func.grad(loss(linear), (0, 1, 2))(x, weight, bias),
                          torch.func.grad(loss(functional.linear), (0, 1, 2))(x, weight, bias), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(torch.func.grad(twice(linear))(weight.detach()),
                               torch.func.grad(twice(functional.linear))(weight.detach()))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # which torch.func.jvp calls
def test_vmap_and_forward_mode_are_refused_with_a_sentence(draw):
    x, weight = draw((3, 4), (2, 4))
    mapped = (lambda: torch.vmap(lambda row: linear(row, weight))(x),
              lambda: torch.vmap(torch.func.grad(lambda row: linear(row, weight).sum()))(x),
              lambda: torch.func.jacrev(lambda x: linear(x, weight))(x))
    for call in mapped:
        with pytest.raises(NotImplementedError, match=r"not mapped by torch\.vmap.*pass the batch axes in x"):
            call()
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_opcheck(activation, draw, place):
    da, x, weight, z = (one.detach() for one in draw((5, 3), (5, 4), (3, 4), (5, 3)))
    given, options = (da, x, weight, z if activation else None), {"activation": activation, "negative_slope": None}
    operators = torch.ops.densegrad
    for need in ([True, True, True], [False, True, False]):
        torch.library.opcheck(operators.linear_backward, given, {**options, "need": need})
    for of_bias, need_dx in ((torch.zeros(3, device=place), True), (None, False)):
        torch.library.opcheck(operators.linear_backward_into, (*given, torch.zeros(3, 4, device=place), of_bias),
                              {**options, "need_dx": need_dx})


def test_the_fake_results_of_a_single_sample_have_the_shapes_of_the_real_ones(draw):
    da, x, weight = (one.detach() for one in draw((1,), (4,), (1, 4)))
    options = {"activation": None, "negative_slope": None}
    torch.library.opcheck(torch.ops.densegrad.linear_backward, (da, x, weight, None),
                          {**options, "need": [True] * 3})
    torch.library.opcheck(torch.ops.densegrad.linear_backward_into,
                          (da, x, weight, None, torch.zeros_like(weight), None), {**options, "need_dx": True})


#: inductor compiles C++ for tensors on the CPU
BACKENDS = ["aot_eager", *["inductor"] * bool(shutil.which("g++"))]


@pytest.mark.filterwarnings("ignore")  # those of torch.compile's parts are not about this package
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole_it_gives_the_bits_of_the_plain_call(backend, compiler, draw):
    given, (dz,) = draw((5, 4), (3, 4), (3,)), draw((5, 3))
    for options in ({}, {"activation": "gelu"}):
        compiled = torch.compile(lambda *given, options=options: linear(*given, **options), fullgraph=True,
                                 backend=backend)
        found = gradients(compiled, given, dz)
        for one, other in zip(found, gradients(lambda *given, options=options: linear(*given, **options), given, dz),
                              strict=True):
            # of gelu the forward is compiled too, and the z that it saves is another one in its last bits
            torch.testing.assert_close(one, other, rtol=1e-5 * bool(options), atol=1e-5 * bool(options))

    def twice():
        first, = torch.autograd.grad(compiled(*given).sum(), given[1], create_graph=True)
        first.sum().backward()

    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        twice()


@pytest.mark.filterwarnings("ignore")
def test_compiled_for_any_size(compiler, draw):
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (5, 2, 7):
        given, (dz,) = draw((samples, 4), (3, 4), (3,)), draw((samples, 3))
        same_bits(gradients(compiled, given, dz), gradients(linear, given, dz))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant, draw):
    from torch.utils.checkpoint import checkpoint

    given, (dz,) = draw((5, 4), (3, 4), (3,)), draw((5, 3))
    expected = gradients(lambda *given: linear(*given, activation="gelu"), given, dz)
    checkpoint(lambda *given: linear(*given, activation="gelu"), *given, use_reentrant=reentrant).backward(dz)
    same_bits([one.grad for one in given], expected)


def test_autocast_casts_before_it_saves(draw, place):
    given, (dz,) = draw((5, 4), (3, 4), (3,)), draw((5, 3), dtype=torch.bfloat16)
    with torch.autocast(place, dtype=torch.bfloat16):
        found, own = linear(*given), functional.linear(*given)
    same_bits([found], [own])
    assert {one.dtype for one in found.grad_fn.saved_tensors if one is not None} == {torch.bfloat16}
    low = [one.detach().bfloat16().requires_grad_() for one in given]
    same_bits(torch.autograd.grad(found, given, dz), [one.float() for one in gradients(linear, low, dz)])
    for options in ({"activation": "softplus"}, {"into": MainGrads(torch.zeros(3, 4, device=place),
                                                                   torch.zeros(3, device=place))}):
        with torch.autocast(place, dtype=torch.bfloat16):
            found = linear(*given, **options)
        own = linear(*low, **options)
        same_bits([found], [own])
        if "activation" in options:
            same_bits(torch.autograd.grad(found, given, dz), [one.float() for one in torch.autograd.grad(own, low, dz)])
        else:
            found.backward(dz)
            assert given[1].grad is None
            assert options["into"].weight.any()
    wide = draw((2, 3), (2, 3), dtype=torch.float64)
    with torch.autocast(place, dtype=torch.bfloat16):
        assert linear(*wide).dtype == functional.linear(*wide).dtype == torch.float64


def test_two_threads(draw):
    cases = [(draw((5, 4), (3, 4), (3,)), draw((5, 3))[0]) for _ in range(2)]
    expected = [gradients(linear, *case) for case in cases]
    found = [None] * len(cases)

    def work(number):
        found[number] = [gradients(linear, *cases[number]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for repeats, once in zip(found, expected, strict=True):
        for repeated in repeats:
            same_bits(repeated, once)


def test_retained_graphs_shared_weights_and_expanded_gradients(draw):
    x, weight = draw((5, 4), (4, 4))
    z = linear(linear(x, weight), weight).sum()
    first = torch.autograd.grad(z, (x, weight), retain_graph=True)
    same_bits(first, torch.autograd.grad(z, (x, weight)))
    for one, other in zip(first, gradients(lambda x, weight: functional.linear(functional.linear(x, weight),
                                                                               weight).sum(), (x, weight), None),
                          strict=True):
        torch.testing.assert_close(one, other)


def test_what_cannot_be_differentiated_is_refused_by_name_or_left_to_pytorch(draw):
    x, weight, bias = draw((3, 4), (2, 4), (2,))
    refused = {
        "x must be float16, bfloat16, float32 or float64; got torch.complex64": (x.to(torch.complex64),
                                                                                 weight.to(torch.complex64)),
        "x must be .*got torch.int32": (x.int(), weight.int()),
        r"weight is no tensor that kernels can use: .*to_dense\(\)": (x, weight.detach().to_sparse()),
        r"weight must have 2 dimensions.*got \(4,\)": (x, weight[0]),
        r"bias \(out_features,\); got \(2, 4\) and \(1,\)": (x, weight, bias[:1]),
    }
    for words, given in refused.items():
        with pytest.raises((TypeError, ValueError), match=words):
            linear(*given)
        found = linear(*given, fallback=True)
        torch.testing.assert_close(found, functional.linear(*given))
        assert type(found.grad_fn).__name__ != "_RefusingJvpBackward"
    with pytest.raises(dg.DTypeError):
        linear(x.int(), weight.int(), into=MainGrads(torch.zeros(2, 4)), fallback=True)
    with pytest.raises(ValueError, match=r"activation must be one of identity.*got 'swish' \(did you mean .silu"):
        linear(x, weight, activation="swish")
    with pytest.raises(TypeError, match=r"weight must be a tensor; got Linear \(pass one of its tensors.*weight\)"):
        linear(x, torch.nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"x must be a tensor; got ndarray \(pass torch\.as_tensor\(x\)\)"):
        linear(np.ones((3, 4), "float32"), weight)
    with pytest.raises(TypeError, match="negative_slope is the derivative"):
        linear(x, weight, activation="relu", negative_slope=0.1)


def test_without_a_device_pytorch_is_taken_only_if_asked(monkeypatch, draw):
    given = draw((3, 4), (2, 4))

    def none():
        raise dg.DeviceError("densegrad found no GPU")

    monkeypatch.setattr(device, "current", none)
    with pytest.raises(dg.DeviceError, match="found no GPU"):
        linear(*given)
    torch.testing.assert_close(linear(*given, fallback=True, activation="relu"),
                               torch.relu(functional.linear(*given)))


def test_shapes_alone_have_a_forward_and_a_backward():
    x, weight = torch.ones(5, 4, device="meta"), torch.ones(3, 4, device="meta", requires_grad=True)
    linear(x, weight).sum().backward()
    assert weight.grad.shape == (3, 4)
    assert weight.grad.is_meta


# cross_entropy


def classes_last(tensor):
    """PyTorch's order of axes as densegrad's, with a batch axis."""
    return tensor[None] if tensor.dim() == 1 else tensor.movedim(1, -1)


def drawn_target(shape, place, probabilities=False, dtype=torch.float32):
    """Classes, or class probabilities that require a gradient, for logits of this shape."""
    generator = torch.Generator().manual_seed(11)
    if probabilities:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(place, dtype).requires_grad_()
    batch = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    return torch.randint(shape[min(1, len(shape) - 1)], batch, generator=generator).to(place)


def held_to_the_core_and_to_pytorch(z, target, dloss=None, **options):
    """Hold the loss to the bits of densegrad.cross_entropy, and all gradients to PyTorch's in float64."""
    probabilities = target.is_floating_point()
    given = (z, target) if probabilities else (z,)

    def of(function, given, options):
        return function(*given, *[target] * (not probabilities), **options)

    loss = of(dt.cross_entropy, given, options)
    assert (loss.dtype, loss.device) == (z.dtype, z.device)
    dloss = torch.randn(loss.shape, dtype=torch.float64).to(loss) if dloss is None else dloss
    found = torch.autograd.grad(loss, given, dloss)

    wide = torch.float32 if z.dtype == torch.float16 else z.dtype
    arrays = [numpy_of(classes_last(z.detach().to(wide))),
              numpy_of(classes_last(target.detach().to(wide)) if probabilities else target[None] if z.dim() == 1 else
                       target)]
    named = {"class_weight" if name == "weight" else name: numpy_of(one) if name == "weight" else one
             for name, one in options.items()}
    of_core = dg.cross_entropy(*arrays, **named)
    same_bits([loss], [tensors.host_tensor(np.asarray(of_core.loss).reshape(loss.shape)).to(z.dtype)])
    factor = dloss.cpu().reshape(*dloss.shape, *[1] * (max(z.dim(), 2) - dloss.dim()))
    saved = tensors.host_tensor(np.asarray(of_core.dz))
    same_bits([classes_last(found[0])], [(saved * factor.to(saved.dtype)).to(z.dtype)])

    exactly = [one.detach().double().requires_grad_() for one in given]
    exact = of(functional.cross_entropy, exactly,
               {name: one.double() if name == "weight" else one for name, one in options.items()})
    several = 16 * torch.finfo(z.dtype).eps  # that it is the same function; bounds are the core's
    for one, other in zip((loss, *found), (exact, *torch.autograd.grad(exact, exactly, dloss.double())), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=several, atol=several, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_pytorch_for_cross_entropy(dtype, place):
    from torch.testing._internal.common_methods_invocations import op_db

    info, = (one for one in op_db if one.name == "nn.functional.cross_entropy")
    samples = list(info.sample_inputs(place, dtype, requires_grad=True))
    assert len(samples) >= 20
    for sample in samples if dtype == torch.float32 else samples[::3]:
        held_to_the_core_and_to_pytorch(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_number_of_axes_with_all_options(reduction, draw, place):
    options = {"reduction": reduction, "label_smoothing": 0.2, "weight": torch.tensor([0.5, 2.0, 1.0], device=place)}
    for shape in {"mean": ((3,), (2, 3, 2)), "sum": ((0, 3),), "none": ((3,), (1, 3, 2, 2))}[reduction]:
        z, = draw(shape)
        held_to_the_core_and_to_pytorch(z, drawn_target(shape, place), ignore_index=1 if len(shape) > 1 else -1,
                                        **options)
        held_to_the_core_and_to_pytorch(z, drawn_target(shape, place, probabilities=True), **options)


def test_samples_or_classes_side_by_side_are_read_and_written_as_they_lie(place):
    target = drawn_target((5, 3), place)
    for z, strides in ((torch.ones(5, 3), (3, 1)), (torch.ones(3, 5).T, (1, 5)), (torch.ones(5, 8)[:, :3], (3, 1)),
                       (torch.ones(5, 6)[:, ::2], (3, 1)), (torch.ones(1, 3, 5), (5, 1))):
        z = z.to(place).detach().requires_grad_()
        held = target if z.dim() == 2 else target[None]
        found, = torch.autograd.grad(dt.cross_entropy(z, held), z)
        assert found.squeeze(0).stride() == strides
        torch.testing.assert_close(found, torch.autograd.grad(functional.cross_entropy(z, held), z)[0])


@pytest.mark.only("simulator")
@pytest.mark.parametrize("probabilities", [False, True])
def test_gradcheck_and_gradgradcheck_of_cross_entropy(probabilities, draw, place):
    z, = draw((2, 2), dtype=torch.float64)
    target = drawn_target((2, 2), place, probabilities, torch.float64)
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64, device=place)
    given = (z, target) if probabilities else (z,)
    for options in ({"label_smoothing": 0.2, "weight": weight}, {"reduction": "none"}):
        def loss(*given, options=options):
            return dt.cross_entropy(*given, *[target] * (not probabilities), **options)

        assert torch.autograd.gradcheck(loss, given)
        assert torch.autograd.gradgradcheck(loss, given, fast_mode=probabilities or "weight" not in options)


def test_torch_func_grad_of_cross_entropy_and_its_own_gradient(draw, place):
    z, target = draw((2, 3), dtype=torch.float64)[0].detach(), drawn_target((2, 3), place)

    def once(function):
        return torch.func.grad(lambda z: function(z, target, label_smoothing=0.1))

    def twice(function):
        return torch.func.grad(lambda z: once(function)(z).pow(2).sum())

    for derived in (once, twice):
        torch.testing.assert_close(derived(dt.cross_entropy)(z), derived(functional.cross_entropy)(z))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # which torch.func.jvp calls
def test_vmap_and_forward_mode_of_cross_entropy_are_refused_with_a_sentence(draw, place):
    z, = draw((4, 2, 3))
    target = drawn_target((4, 2, 3), place)[:, :2]
    for function in (dt.cross_entropy, torch.func.grad(dt.cross_entropy)):
        with pytest.raises(NotImplementedError, match=r"cross_entropy is not mapped by torch\.vmap.*pass all samples"):
            torch.vmap(function)(z, target)
    with pytest.raises(NotImplementedError, match="cross_entropy has no forward-mode derivatives"):
        torch.func.jvp(lambda z: dt.cross_entropy(z, target[0]), (z[0],), (z[0],))


def test_opcheck_of_cross_entropy(place):
    for z, target, weight, reduction in (
            (torch.ones(3), torch.tensor(1), None, "none"),
            (torch.ones(3, 4, dtype=torch.float16).T, torch.ones(4, 3, dtype=torch.float16), None, "mean"),
            (torch.ones(2, 3, 4).movedim(1, -1), torch.zeros(2, 4, dtype=torch.int64), torch.ones(3), "none")):
        given = z.to(place), target.to(place), None if weight is None else weight.to(place)
        torch.library.opcheck(torch.ops.densegrad.cross_entropy, given,
                              {"ignore_index": -100, "reduction": reduction, "label_smoothing": 0.1})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_compiled_whole_gives_the_bits_of_the_plain_call(backend, compiler, draw, place):
    def total(z, target, weight):
        return dt.cross_entropy(z, target, weight, reduction="none" if weight is None else "mean").sum()

    compiled = torch.compile(total, fullgraph=True, backend=backend)
    z, = draw((4, 3))
    transposed = z.detach().T.contiguous().T.requires_grad_()
    cases = ((transposed, drawn_target((4, 3), place), None),
             (z, drawn_target((4, 3), place, probabilities=True), None),
             (z, drawn_target((4, 3), place), torch.tensor([0.5, 2.0, 1.0], device=place)))
    for case in cases[:1] if backend == "inductor" else cases:  # which takes its time for C++
        found, own = gradients(compiled, case, None), gradients(total, case, None)
        same_bits(found[:1], own[:1])
        torch.testing.assert_close(found, own)  # of probabilities the gradient is compiled too

    def again():
        first, = torch.autograd.grad(compiled(*cases[0]), transposed, create_graph=True)
        first.sum().backward()

    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        again()


@pytest.mark.filterwarnings("ignore")
def test_cross_entropy_compiled_for_any_size_and_under_autocast(compiler, draw, place):
    compiled = torch.compile(dt.cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (5, 2):
        z, = draw((samples, 3), dtype=torch.bfloat16)
        case = z, drawn_target((samples, 3), place)
        with torch.autocast(place, dtype=torch.bfloat16):
            same_bits([compiled(*case)], [dt.cross_entropy(*case)])
        same_bits(gradients(compiled, case, None), gradients(dt.cross_entropy, case, None))


@pytest.mark.parametrize("reentrant", [True, False])
def test_cross_entropy_checkpointed(reentrant, draw, place):
    from torch.utils.checkpoint import checkpoint

    z, = draw((4, 3))
    target = drawn_target((4, 3), place)
    checkpoint(dt.cross_entropy, z, target, use_reentrant=reentrant).backward()
    same_bits([z.grad], gradients(dt.cross_entropy, (z, target), None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_autocast_the_loss_is_float32_as_pytorchs(dtype, draw, place):
    z, = draw((4, 3), dtype=dtype)
    dloss = torch.tensor(1 / 3, device=place)
    for target in (drawn_target((4, 3), place), drawn_target((4, 3), place, True, dtype),
                   drawn_target((4, 3), place, True, torch.float32 if dtype != torch.float64 else dtype)):
        with torch.autocast(place, dtype=torch.bfloat16):
            found, own = dt.cross_entropy(z, target), functional.cross_entropy(z, target)
        torch.testing.assert_close(found, own)  # the dtype too
        # half types are read as they are
        assert {one.dtype for one in found.grad_fn.saved_tensors[:1]} <= {z.dtype, target.dtype}
        torch.testing.assert_close(*(torch.autograd.grad(one, z, dloss.to(one.dtype))[0] for one in (found, own)))


def test_a_loss_that_is_scaled_loses_nothing_of_float16(draw, place):
    """Of a mean over many samples, gradients below what float16 has room for before they are scaled."""
    z = torch.zeros(2, 3, dtype=torch.float16, device=place)
    z[:, 0] = 16
    z.requires_grad_()
    target = torch.zeros(2, dtype=torch.int64, device=place)
    with torch.autocast(place, dtype=torch.bfloat16):
        found, = torch.autograd.grad(dt.cross_entropy(z, target) * 2.0 ** 16, z)
    exact = z.detach().double().requires_grad_()
    expected, = torch.autograd.grad(functional.cross_entropy(exact, target) * 2.0 ** 16, exact)
    torch.testing.assert_close(found[:, 1:].double(), expected[:, 1:], rtol=1e-3, atol=0)


def test_a_backward_is_one_multiplication_and_a_retained_graph_gives_it_again(draw, place):
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **kwargs or {})

    for dtype, reduction in itertools.product((torch.float32, torch.float16), ("mean", "none")):
        z, = draw((4, 3), dtype=dtype)
        loss = dt.cross_entropy(z, drawn_target((4, 3), place), reduction=reduction)
        dloss = torch.full_like(loss, 0.3)
        called.clear()
        with calls.recorded() as launches, Listening():
            first, = torch.autograd.grad(loss, z, dloss, retain_graph=True)
        assert not launches
        views = {"aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.permute.default",
                 "aten.movedim.int", "aten.detach.default"}
        assert [one for one in called if one not in views] == ["aten.empty_like.default", "aten.mul.out"]
        same_bits([first], torch.autograd.grad(loss, z, dloss))


def test_cross_entropy_in_two_threads(draw, place):
    cases = [(draw((4, 3))[0], drawn_target((4, 3), place)) for _ in range(2)]
    expected = [gradients(dt.cross_entropy, case, None) for case in cases]
    found = [None] * len(cases)

    def work(number):
        found[number] = [gradients(dt.cross_entropy, cases[number], None) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for repeats, once in zip(found, expected, strict=True):
        for repeated in repeats:
            same_bits(repeated, once)


def test_a_loss_that_densegrad_has_not_is_refused_by_name_or_left_to_pytorch(draw, place):
    z, wide = draw((4, 3))[0], draw((4, 3), dtype=torch.float64)[0]
    target, given = drawn_target((4, 3), place), drawn_target((4, 3), place, probabilities=True)
    one = torch.ones(3, device=place)
    refused = {
        r"target must be classes of int64 or int32, or .*got torch\.uint8": (z, target.byte(), {}),
        r"target must have the dtype of input .*torch\.float32; got torch\.float64": (z, given.double(), {}),
        r"weight requires a gradient": (z, given, {"weight": one.clone().requires_grad_()}),
        r"weight must be float16.*got torch\.float64 beside torch\.float32": (z, given, {"weight": one.double()}),
        r"input is no tensor that kernels can use: .*to_dense\(\)": (z.detach().to_sparse(), target, {}),
        r"input must be float16.*got torch\.complex64": (z.to(torch.complex64), given, {}),
        r"input must be \(C,\).*got \(\)": (z[0, 0], target[0], {}),
        r"target must have a class for each sample, shape \(4,\).*got \(4, 3\) of torch\.int64":
            (z, target[:, None].expand(4, 3), {}),
        r"target is of class probabilities.*got \(4,\) \(convert classes with long": (z, target.float(), {}),
        r"weight must have one number for each class, shape \(3,\); got \(2,\)": (z, target, {"weight": one[:2]}),
        r"ignore_index is a class.*got 1": (z, given, {"ignore_index": 1}),
        r"input must be .*one class at least; got \(4, 0\)": (z[:, :0], target, {}),
    }
    left = 0
    for words, (*tensors_given, options) in refused.items():
        with pytest.raises((TypeError, ValueError), match=words):
            dt.cross_entropy(*tensors_given, **options)
        try:
            own = functional.cross_entropy(*tensors_given, **options)
        except (RuntimeError, ValueError, IndexError):  # PyTorch has no such loss either
            continue
        left += 1
        torch.testing.assert_close(dt.cross_entropy(*tensors_given, **options, fallback=True), own)
    assert left >= 3
    with pytest.raises(ValueError, match=r"reduction must be one of mean, sum, none; got 'batchmean' \(did you m"):
        dt.cross_entropy(z, target, reduction="batchmean")
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1"):
        dt.cross_entropy(z, target, label_smoothing=1.5)
    with pytest.raises(TypeError, match=r"target must be a tensor; got list \(pass torch\.as_tensor\(target\)\)"):
        dt.cross_entropy(z, target.tolist())
    if place == "cpu":
        with pytest.raises(ValueError, match=r"labels must be classes from 0 to 2.*got 3 for sample 0"):
            dt.cross_entropy(wide, target + 3)
    same_bits([dt.cross_entropy(z, target.int(), weight=one.requires_grad_().detach())],
              [dt.cross_entropy(z, target, weight=one.detach())])


def test_shapes_alone_have_a_loss_and_its_gradient():
    z, target = torch.ones(4, 3, 2, device="meta", requires_grad=True), torch.ones(4, 2, device="meta").long()
    dt.cross_entropy(z, target).backward()
    assert z.grad.shape == (4, 3, 2)
    assert z.grad.is_meta


# Main gradients


def micro_batches(draw, count=8):
    layer = draw((3, 4), (3,), dtype=torch.bfloat16)
    return [torch.nn.Parameter(one.detach()) for one in layer], [
        (draw((5, 4), dtype=torch.bfloat16)[0], draw((5, 3), dtype=torch.bfloat16)[0]) for _ in range(count)]


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_micro_batches_add_into_main_gradients_in_the_launches_of_overwriting(activation, draw, place):
    (weight, bias), batches = micro_batches(draw)
    main = MainGrads(torch.zeros(3, 4, device=place), torch.zeros(3, device=place))
    dw, db = np.zeros((3, 4), "float32"), np.zeros(3, "float32")
    for x, dz in batches:
        with recorded() as overwriting:
            linear(x, weight, bias, activation=activation).backward(dz)
        own, x.grad, weight.grad, bias.grad = x.grad, None, None, None
        with recorded() as adding:
            linear(x, weight, bias, activation=activation, into=main).backward(dz)
        assert overwriting
        assert [one.kernel for one in adding] == [one.kernel for one in overwriting]
        assert weight.grad is bias.grad is None
        same_bits([x.grad], [own])
        z = {} if activation is None else {"activation": activation, "z": numpy_of(functional.linear(x, weight, bias))}
        dg.dense_grads(numpy_of(x), None, numpy_of(dz), **z, need=("dw", "db"), weight_layout="out_in",
                       out=dg.DenseGrads(dw=dw, db=db), accumulate=True)
    same_bits(main, (dw, db))


def test_main_gradients_that_are_no_memory_are_refused_before_the_forward(draw, place):
    x, weight = draw((5, 4), (3, 4))
    with pytest.raises(TypeError, match=r"into\.weight is no tensor that kernels can use: it is sparse"):
        linear(x, weight, into=MainGrads(torch.zeros(3, 4, device=place).to_sparse()))


def test_main_gradients_get_what_autograd_is_asked_for_and_nothing_else(draw, place):
    """Where dx alone is wanted, nothing is added; a gradient that goes into a main one cannot be asked for itself."""
    x, weight, bias = draw((5, 4), (3, 4), (3,))
    main = MainGrads(torch.zeros(3, 4, device=place), torch.zeros(3, device=place))
    wanted, = torch.autograd.grad(linear(x, weight, bias).sum(), x)
    found, = torch.autograd.grad(linear(x, weight, bias, into=main).sum(), x)
    same_bits([found], [wanted])
    linear(x, weight, bias, into=main).sum().backward(inputs=[x])
    assert not any(one.any() for one in main)
    linear(x, weight, bias, into=main).sum().backward(inputs=[bias])
    assert not main.weight.any()
    same_bits([main.bias], [torch.full((3,), 5.0)])
    linear(x, weight, bias, into=main).sum().backward()
    assert main.weight.any()
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(linear(x, weight, bias, into=main).sum(), weight)


@pytest.mark.parametrize("needed", list(itertools.product((True, False), repeat=3))[:-1])
def test_no_more_is_saved_than_the_gradients_are_made_of(needed, draw):
    """As by PyTorch: x for dw, the weight for dx; and what is not saved may change. Double backward needs no more."""
    given, (da,) = draw((5, 4), (3, 4), (3,), dtype=torch.float64), draw((5, 3), dtype=torch.float64)
    for one, wanted in zip(given, needed, strict=True):
        one.requires_grad_(wanted)
    asked = [one for one in given if one.requires_grad]
    x, weight, _ = given
    saved = [one for one in linear(*given).grad_fn.saved_tensors if one is not None]
    assert [id(one) for one in saved] == [id(one) for one, wanted in ((x, needed[1]), (weight, needed[0])) if wanted]
    twice = []
    for layer in (linear, functional.linear):
        found = torch.autograd.grad(layer(*given), asked, da, create_graph=True)
        twice.append(torch.autograd.grad(sum((one ** 2).sum() for one in found), [da, *asked], materialize_grads=True))
    for one, other in zip(*twice, strict=True):
        torch.testing.assert_close(one, other)


def test_main_gradients_are_changed_as_autograd_can_see(draw, place):
    x, weight = draw((5, 4), (3, 4))
    main = MainGrads(torch.zeros(3, 4, device=place))
    before = main.weight._version
    linear(x, weight, into=main).sum().backward()
    assert main.weight._version > before
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.autograd.grad(linear(x, weight, into=main).sum(), x, create_graph=True)


def test_a_weight_that_is_used_twice_or_frozen(draw, place):
    x, weight, bias = draw((5, 4), (3, 4), (3,))
    bias.requires_grad_(False)
    main = MainGrads(torch.zeros(3, 4, device=place), torch.zeros(3, device=place))
    (linear(x, weight, bias, into=main) + linear(x, weight, bias, into=main)).sum().backward()
    torch.testing.assert_close(main.weight, 2 * x.detach().sum(0).expand(3, 4))
    assert not main.bias.any()
    assert x.grad is not None


@pytest.mark.parametrize(("into", "words"), [
    (MainGrads(torch.zeros(4, 3)), r"into\.weight must have the shape of weight, \(3, 4\); got \(4, 3\)"),
    (MainGrads(torch.zeros(3, 4, dtype=torch.bfloat16)), r"into\.weight must be torch\.float32"),
    (MainGrads(torch.zeros(3, 4), torch.zeros(3)), r"into\.bias was given, but there is no bias"),
    (MainGrads(bias=torch.zeros(3)), r"into\.weight is missing, and weight requires a gradient"),
    (MainGrads(np.zeros((3, 4))), r"into\.weight must be a tensor; got ndarray"),
    (torch.zeros(3, 4), r"into must be MainGrads\(weight=, bias=\) or a tuple of 2; got Tensor"),
])
def test_main_gradients_that_do_not_fit_are_refused(into, words, draw, place):
    if isinstance(into, MainGrads):
        into = MainGrads(*(one.to(place) if isinstance(one, torch.Tensor) else one for one in into))
    with pytest.raises((ValueError, TypeError), match=words):
        linear(*draw((5, 4), (3, 4)), into=into)


def test_main_gradients_of_what_is_computed_from_parameters_are_refused(place):
    # Added to a tensor that the next forward makes anew, they would be lost, and the parameters get none.
    def pruned():
        return prune.random_unstructured(torch.nn.Linear(4, 3, device=place), "weight", 0.5)

    model = torch.nn.Sequential(pruned(), torch.nn.Linear(3, 2, device=place))
    found = convert(model, main_grad=True)
    assert (found.swapped, list(found.left)) == (["1"], ["0"])
    assert "computed from parameters" in found.left["0"]
    model(torch.ones(5, 4, device=place)).sum().backward()
    assert model[0].weight_orig.grad is not None
    alone = pruned()
    assert convert(alone).swapped == [""]
    alone.main_grad = True
    with pytest.raises(NotImplementedError, match=r"pruning or spectral_norm.*leave main_grad out"):
        alone(torch.ones(5, 4, device=place))


@pytest.mark.filterwarnings("ignore")
def test_main_gradients_are_refused_under_distributed_data_parallel(place):
    group = torch.distributed
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    try:
        x = torch.ones(5, 4, device=place)
        layer = dt.Linear(4, 3, device=place)
        parallel = torch.nn.parallel.DistributedDataParallel(layer)
        parallel(x).sum().backward()
        torch.testing.assert_close(layer.bias.grad, torch.full((3,), 5.0, device=place))
        layer.main_grad = True
        with pytest.raises(NotImplementedError, match=r"reduces \.grad alone.*reduce_main_grads\(model\) after"):
            parallel(x)
        layer(x).sum().backward()
        check_example(dt.reduce_main_grads, {"torch": torch, "reduce_main_grads": dt.reduce_main_grads})
    finally:
        group.destroy_process_group()


def test_main_gradients_are_not_reduced_without_a_group():
    with pytest.raises(ValueError, match=r"no process group yet \(call torch\.distributed\.init_process_group"):
        dt.reduce_main_grads(torch.nn.Linear(2, 3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
def test_main_gradients_under_torch_compile(backend, compiler, place):
    layer = dt.Linear(4, 3, device=place, main_grad=True)
    plain = copy.deepcopy(layer)
    x = torch.ones(5, 4, device=place)
    for _ in range(2):
        torch.compile(layer, fullgraph=True, backend=backend)(x).pow(2).sum().backward()
        plain(x).pow(2).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close([layer.weight.main_grad, layer.bias.main_grad],
                               [plain.weight.main_grad, plain.bias.main_grad])


# Linear and convert


def test_linear_is_a_linear_of_pytorch_with_another_backward(place):
    torch.manual_seed(1)
    theirs = torch.nn.Linear(4, 3, device=place)
    torch.manual_seed(1)
    ours = dt.Linear(4, 3, device=place)
    assert isinstance(ours, torch.nn.Linear)
    same_bits(ours.state_dict().values(), theirs.state_dict().values())
    assert repr(ours) == f"densegrad.{theirs}"
    x = torch.ones(5, 4, device=place)
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    others = [pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), torch.load(stream, weights_only=False)]
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, *others):
        assert type(layer) is dt.Linear
        z = layer(x)
        assert type(z.grad_fn).__name__ == "_RefusingJvpBackward"
        same_bits([z], [theirs(x)])


def test_main_gradients_follow_their_parameters(place):
    layer = dt.Linear(4, 3, device="meta", dtype=torch.bfloat16, main_grad=True)
    layer.to_empty(device=place)
    layer.reset_parameters()
    assert (layer.weight.main_grad.dtype, layer.weight.main_grad.device.type) == (torch.float32, place)
    assert not layer.weight.main_grad.any()
    layer(torch.ones(5, 4, dtype=torch.bfloat16, device=place)).sum().backward()
    same_bits([layer.bias.main_grad], [np.full(3, 5, "float32")])
    assert layer.to(torch.float32).bias.main_grad.tolist() == [5, 5, 5]
    left_behind = torch.zeros(3, device="meta")  # as the device that the layer was on before
    layer.bias.main_grad = left_behind
    assert layer.float().bias.main_grad.device.type == place
    elsewhere = dt.Linear(4, 3, device="meta", main_grad=True)
    elsewhere.bias.main_grad = torch.zeros(3, device=place)
    assert elsewhere.half().bias.main_grad.is_meta
    assert [one.main_grad.dtype for one in layer.double().parameters()] == [torch.float64] * 2
    with torch.inference_mode():
        copied = copy.deepcopy(layer)
        copied(torch.ones(5, 4, dtype=torch.float64, device=place))
    assert not copied.weight.main_grad.is_inference()
    assert elsewhere.bias.main_grad.dtype == torch.float32
    frozen = dt.Linear(4, 3, device=place, main_grad=True).requires_grad_(False)
    assert not frozen(torch.ones(5, 4, device=place)).requires_grad


class Own(torch.nn.Linear):
    """A subclass with a forward that nobody knows."""


def test_convert_swaps_in_place_and_says_what_it_left(place):
    tied = torch.nn.Linear(4, 4)
    replaced = torch.nn.Linear(4, 4)
    replaced.forward = lambda x: x
    model = torch.nn.ModuleDict({
        "one": tied, "again": tied, "deep": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()),
        "attention": torch.nn.MultiheadAttention(4, 2), "own": Own(4, 4), "lazy": torch.nn.LazyLinear(4),
        "replaced": replaced, "ours": dt.Linear(4, 4), "complex": torch.nn.Linear(4, 4, dtype=torch.complex64),
    }).to(place).eval()
    heard = []
    tied.register_forward_hook(lambda *given: heard.append(given))
    parameters = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()
                  if not name.startswith("lazy")}
    found = convert(model)
    assert found.swapped == ["one", "again", "deep.0"]
    assert found.left == {
        "attention.out_proj": "torch.nn.MultiheadAttention reads its weight and never calls it",
        "own": f"it is a {Own.__module__}.Own, a subclass",
        "lazy": "it is a LazyLinear without weights (call the model once before)",
        "replaced": "its forward was replaced", "ours": "it has densegrad's backward already",
        "complex": "its weight is torch.complex64"}
    assert type(model["one"]) is type(model["deep"][0]) is dt.Linear
    assert model["one"] is model["again"] is tied
    assert not model["one"].training
    assert {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()
            if name in parameters} == parameters
    model["one"](torch.ones(5, 4, device=place))
    assert len(heard) == 1


def test_the_root_is_converted_too_and_its_optimizer_goes_on(place):
    model = torch.nn.Linear(4, 3, device=place)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    assert convert(model, main_grad=True) == ([""], {})
    assert type(model) is dt.Linear
    before = model.bias.detach().clone()
    model(torch.ones(2, 4, device=place)).sum().backward()
    for parameter in model.parameters():
        parameter.grad = parameter.main_grad
    optimizer.step()
    same_bits([model.bias], [before - 1])
    assert convert(model).left == {"": "it has densegrad's backward already"}


def network(dtype, place):
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10)).to(place, dtype)


def digits(count, place):
    data = load_digits()
    return (torch.from_numpy(data.train_x[:count].astype("float32")).to(place),
            torch.from_numpy(data.train_y[:count].astype("int64")).to(place))


def losses(model, x, labels, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        loss = functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def test_a_network_learns_digits_as_pytorchs_own_does(place):
    x, labels = digits(8, place)
    theirs, ours = network(torch.float32, place), network(torch.float32, place)
    assert convert(ours) == (["0", "2"], {})
    pairs = list(zip(losses(theirs, x, labels, 20), losses(ours, x, labels, 20), strict=True))
    assert pairs[-1][0] < 0.7 * pairs[0][0]
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5)


def test_main_gradients_from_bfloat16_are_closer_to_float64_than_pytorchs_own(place):
    x, labels = digits(24, place)
    exact, theirs, ours = (network(dtype, place) for dtype in (torch.float64, torch.bfloat16, torch.bfloat16))
    for one in exact.parameters():  # the same numbers in all three
        one.data = one.data.bfloat16().double()
    convert(ours, main_grad=True)
    for model in (theirs, ours):
        model.load_state_dict({name: one.bfloat16() for name, one in exact.state_dict().items()})
    x = x.bfloat16()
    for part in range(0, 24, 2):
        for model in (exact, theirs, ours):
            z = model(x[part:part + 2].to(next(model.parameters()).dtype))
            functional.cross_entropy(z.double() if model is exact else z.float(), labels[part:part + 2]).backward()
    for true, own, main in zip(exact.parameters(), theirs.parameters(), ours.parameters(), strict=True):
        off = [(one.double() - true.grad).norm().item() for one in (own.grad, main.main_grad)]
        print(f"off by {off[1] / off[0]:.2f} of what PyTorch's own is")
        assert off[1] < off[0]


# What a backward costs Python


@pytest.mark.only("simulator")
def test_the_benchmark_of_pythons_time_calls_the_backward_whole_and_without_densegrad():
    with host.somewhere():
        whole, allocating = host.backwards().values()
        with calls.recorded() as launches:
            assert [one.shape for one in whole()] == [one.shape for one in allocating()]
    assert launches
    with calls.recorded() as launches, host.somewhere():
        allocating()
    assert not launches


# What is raced in the benchmarks


RACED = [(name, one) for name, does in operations.OPERATIONS.items() if does.in_pytorch
         for one in peers.IMPLEMENTATIONS if name in one.operations]


@pytest.mark.only("simulator")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("operation", "one"), RACED, ids=lambda value: getattr(value, "name", value))
def test_what_is_raced_in_pytorch_is_right_before_it_is_timed(operation, one, compiler, monkeypatch):
    monkeypatch.setattr(peers, "_as_tensor", tensors.host_tensor)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for samples, dtype in ((3, operations.OPERATIONS[operation].dtypes[0]), (13, "bfloat16")):
        case = operations.Case(operation, samples, 5, 4, dtype)  # micro-batches of several sizes, and empty ones
        data = case.data()
        blank = {name: np.full(made.array.shape(*case.sizes), np.nan, made.array.dtype(dtype))
                 for name, made in operations.RESULTS.items() if name in case.does.results}
        call = one.prepare(case, data | blank)
        for _ in range(2):  # main gradients begin anew
            worst, plans = run.gate(call, operations.Truth(case, data), one)
            assert worst <= 1
            assert bool(plans) == one.ours
    if operation == "micro_batches":
        less = {name: array[:12] for name, array in data.items()}  # as if a part had been left out
        assert run.gate(call, operations.Truth(replace(case, samples=12), less), one)[0] > 1


def test_layers_in_pytorch_are_raced_where_torch_is_and_of_dtypes_that_have_main_gradients():
    assert {operation for operation, _ in RACED} == {"layer_backward", "micro_batches"}
    assert {one.name for _, one in RACED} == {f"{who}{how}" for who in ("densegrad in PyTorch", "PyTorch")
                                              for how in ("", " compiled")}
    assert all(one.requires == ("torch",) for _, one in RACED)
    cases = operations.cases(["layer_backward", "micro_batches"], ((64, 8, 4),), ["float32", "bfloat16"])
    assert [(case.operation, case.dtype) for case in cases] == [
        ("layer_backward", "float32"), ("layer_backward", "bfloat16"), ("micro_batches", "bfloat16")]


# Importing


def ran(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_importing_densegrad_imports_no_torch_and_calls_need_none():
    found = ran("import sys, numpy, densegrad; densegrad.dense_grads; print('torch' in sys.modules)")
    assert (found.returncode, found.stdout) == (0, "False\n")


def test_without_torch_the_import_says_what_installs_it():
    found = ran("import sys; sys.modules['torch'] = None; import densegrad.torch")
    assert found.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: densegrad.torch needs PyTorch, 2.6 or newer (pip install 'torch>=2.6')")


@pytest.mark.only("simulator")
@pytest.mark.parametrize("name", ["convert", "cross_entropy", "linear"])
def test_examples_in_docstrings_give_what_they_show(name):
    check_example(getattr(dt, name), {"torch": torch, **{other: getattr(dt, other) for other in dt.__all__}})


PAGE = Path(__file__).parents[1] / "docs" / "pytorch.md"


@pytest.mark.only("simulator")
@pytest.mark.filterwarnings("ignore")
def test_the_program_of_the_page_runs(compiler, monkeypatch):
    if "inductor" not in BACKENDS:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"))
    names = {}
    for block in blocks:
        exec(compile(block, "docs/pytorch.md", "exec"), names)
    assert blocks
