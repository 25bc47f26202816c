"""PyTorch's autograd in float64 against these functions: losses with every option, activations, layers of any batch.

Left out without PyTorch, which is no dependency and large: the one accepted skip. What is drawn, and the bounds, are
those of random calls.
"""
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import densegrad
from benchmarks import operations, peers
from benchmarks.operations import Case, Truth
from densegrad.plans import ACTIVATIONS
from densegrad.testing import Strided, activation_roundings, check_within, dz_bound
from tests.random_calls import DTYPES, Call

torch = pytest.importorskip("torch")
functional = torch.nn.functional

FUNCTIONS = {
    "identity": lambda z: z, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "silu": functional.silu, "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"), "softplus": functional.softplus,
    "elu": functional.elu, "selu": functional.selu, "mish": functional.mish, "hardswish": functional.hardswish,
    "relu6": functional.relu6,
}


def leaf(array):
    """The numbers in float64, to be differentiated by."""
    return torch.from_numpy(np.array(array, np.float64, order="C")).requires_grad_()


def samples_first(call, name):
    """An array of a call with the outputs last, and zeros for what a mask leaves out."""
    array = np.moveaxis(call.values[name], 0, -1) if call.batch_axis else call.values[name]
    return np.nan_to_num(array.astype(np.float64))


def check(call, xp, alpha, z, bias, **more):
    """Hold a call's dz and db to what z and bias, which was added to it, have as gradients, and what it has more."""
    found, launches = call.run(xp, alpha)
    expected = call.expected(launches, alpha)
    dz = z.grad.numpy()
    exact = more | {"dz": np.moveaxis(dz, -1, 0) if call.batch_axis else dz,
                    "db": bias.grad.numpy().reshape(found["db"].shape)}
    for name, (_, bound) in expected.items():
        check_within(found[name], exact[name], bound)


#: reduction, label_smoothing, ignore_index or None of class probabilities, class_weight
LOSSES = list(itertools.product(("mean", "sum", "none"), (0.0, 0.1, 1.0), (-100, 1, None), (None, "float32")))


@pytest.mark.parametrize(("reduction", "label_smoothing", "ignore_index", "class_weight"), LOSSES)
def test_cross_entropy_with_every_option(reduction, label_smoothing, ignore_index, class_weight, xp):
    """Loss, gradient and its sum over the batch, with the classes on axis 1; PyTorch's mask is ignored labels."""
    number = LOSSES.index((reduction, label_smoothing, ignore_index, class_weight))
    axes, dense = number % 4 + 1, ignore_index is None
    kinds = {"mean": (None, None if dense else "bool"), "sum": (None, "bool"), "none": ("float32", "bool")}
    call = classifier(number, axes=axes, label_smoothing=label_smoothing, reduction=reduction, probabilities=dense,
                      class_weight=class_weight, sample_weight=kinds[reduction][number // 3 % 2],
                      dtype=DTYPES[number // 4 % 4], batch_axis=number // 4 % 2 if axes == 1 else 0,
                      **{} if dense else {"ignore_index": ignore_index})
    if number % 2 and axes > 1 and not call.in_place:
        # The classes on axis 1 in memory, where PyTorch has them.
        call.layouts["dz"] = Strided.of(call.values["dz"].shape, (0, axes, *range(1, axes)))
    weights = call.values.get("sample_weight", np.ones(call.batch))
    if dense:
        labels = torch.from_numpy(samples_first(call, "labels")).movedim(-1, 1)
    else:
        labels = call.values["labels"].astype("int64")
        labels = torch.from_numpy(np.where(weights, labels, ignore_index) if weights.dtype == bool else labels)
    z, bias = leaf(samples_first(call, "dz")), leaf(np.zeros(call.out_features))
    classes = call.values.get("class_weight")
    separate = reduction == "none" or (dense and weights.dtype == bool)
    loss = functional.cross_entropy(
        (z + bias).movedim(-1, 1), labels, None if classes is None else leaf(classes).detach(),
        label_smoothing=label_smoothing, reduction="none" if separate else reduction,
        **{} if dense else {"ignore_index": ignore_index})
    if separate:
        loss = loss * leaf(weights).detach()
    value = loss.sum() if reduction == "sum" else loss
    (call.alpha * loss.sum()).backward()
    check(call, xp, call.alpha, z, bias, loss=value.detach().numpy())


def classifier(seed, **fixed):
    """A call of which not all samples are left out."""
    for drawn in itertools.count(seed, 1000):
        call = Call("cross_entropy", drawn, accumulate=False, refusals=False, empty="", **fixed)
        kept = call.values["labels"] != call.options["ignore_index"] if "ignore_index" in call.options else True
        if (kept & (call.values.get("sample_weight", np.ones(call.batch)) != 0)).any():
            return call
    raise AssertionError("itertools.count came to an end")


@pytest.mark.parametrize(("weights", "axes"), [
    (None, 1), (None, 3), ("bool", 1), ("bool", 4), ("float32", 2), ("float32", 4)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, weights, axes, xp):
    seed = ACTIVATIONS.index(activation) + axes
    call = Call("activation_grad", seed, dtype=DTYPES[seed % 4], axes=axes, activation=activation,
                sample_weight=weights, accumulate=False, refusals=False, empty="",
                batch_axis=seed % 2 if axes == 1 else 0)
    da, bias = torch.from_numpy(samples_first(call, "dz")), leaf(np.zeros(call.out_features))
    z = leaf(samples_first(call, "z") if "z" in call.values else np.zeros(da.shape))
    if activation == "leaky_relu":
        a = functional.leaky_relu(z + bias, call.options["negative_slope"])
    else:
        a = FUNCTIONS[activation](z + bias)
    weight = call.values.get("sample_weight", np.ones(call.batch)).astype(np.float64)
    a.backward(call.alpha * torch.from_numpy(weight)[..., None] * da)
    check(call, xp, call.alpha, z, bias)


#: where derivatives jump, with both neighbours, and what is no finite number
EDGES = (*(float(side) for edge in (-3.0, 0.0, 3.0, 6.0, 20.0) for side in (np.nextafter(edge, -99), edge,
                                                                             np.nextafter(edge, 99))),
         -0.0, 1000.0, -1000.0, np.nan, np.inf, -np.inf)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_edges_of_activations(activation, dtype, xp):
    """One element at a time: for many at once PyTorch's vector instructions answer NaN otherwise, on CPUs alone."""
    z, function = np.array(EDGES, dtype), {**FUNCTIONS, "leaky_relu": functional.leaky_relu}[activation]
    exact = []
    for value in z:
        one = leaf([value])
        function(one).backward(torch.full_like(one, 2.0))
        exact.append(one.grad.item())
    if activation in ("silu", "gelu", "gelu_tanh", "mish"):
        # PyTorch multiplies infinity by zero, which is not a number; densegrad gives the limit.
        assert np.isnan(exact[-2:]).all()
        exact[-2:] = 2.0, 0.0
    dz, _ = densegrad.activation_grad(xp.asarray(np.full((len(z), 1), 2.0, dtype)), xp.asarray(z[:, None]), activation)
    exact = np.array(exact)[:, None]
    check_within(dz, exact, dz_bound(exact, 2.0, activation_roundings(activation, dtype), dtype))


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_linear_layers_in_every_memory_order(axes, xp):
    for seed, order in enumerate(itertools.permutations(range(axes + 1))):
        if seed % 3 and axes == 4:
            continue  # 40 of the 120 orders of five axes: the random calls draw others
        call = Call("dense_grads", seed, order, dtype=DTYPES[seed % 4], need=("dx", "dw", "db"), activation=None,
                    sample_weight=None, weight_layout="out_in", precision=None, accumulate=False,
                    refusals=False, empty="")
        x, w, dz = (call.values[name].astype(np.float64) for name in ("x", "w", "dz"))
        layer = torch.nn.Linear(call.in_features, call.out_features, dtype=torch.float64)
        layer.weight.data[...] = torch.from_numpy(w)
        x = leaf(x)
        layer(x).backward(torch.from_numpy(call.alpha * dz))
        found, launches = call.run(xp)
        for name, gradient in (("dx", x.grad), ("dw", layer.weight.grad), ("db", layer.bias.grad)):
            _, bound = call.expected(launches)[name]
            check_within(found[name], gradient.numpy().reshape(found[name].shape), bound)


# -- peers of the benchmarks


@pytest.fixture
def in_pytorch(monkeypatch):
    """PyTorch on the CPU with a compiler and a Liger that are stand-ins; how a peer by this name does a case."""
    def tensor(array):
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16) if array.dtype.name == "bfloat16" else (
            torch.from_numpy(array))

    class InPlace(torch.autograd.Function):
        """The loss, whose gradient is written over the logits."""

        @staticmethod
        def forward(ctx, z, labels, reduction):
            with torch.enable_grad():
                leaf = z.detach().clone().requires_grad_()
                loss = torch.nn.functional.cross_entropy(leaf, labels, reduction=reduction)
            z.detach().copy_(torch.autograd.grad(loss, leaf)[0])
            ctx.save_for_backward(z.detach())
            return loss.detach()

        @staticmethod
        def backward(ctx, gradient):
            return ctx.saved_tensors[0] * gradient, None, None

    liger = SimpleNamespace(
        LigerCrossEntropyLoss=lambda reduction: lambda z, labels: InPlace.apply(z, labels, reduction))
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    monkeypatch.setattr(peers, "_as_tensor", tensor)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    peers._compiled_cross_entropy.cache_clear()

    def results(name, case, arrays):
        (one,) = [one for one in peers.IMPLEMENTATIONS if one.name == name and case.operation in one.operations]
        return [found.double().numpy() for found in one.prepare(case, arrays)()]

    yield results
    peers._compiled_cross_entropy.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", operations.REDUCTIONS)
def test_losses_of_peers_are_held_to_bounds_that_they_keep(operation, dtype, in_pytorch):
    case = Case(operation, 27, 1, 300, dtype)  # one over 27 is rounded
    data = case.data()
    truth, before = Truth(case, data), data["z"].copy()
    arrays = data | {name: np.zeros(()) for name in case.does.results}
    for name in ("PyTorch", "PyTorch compiled", "Liger"):
        found = in_pytorch(name, case, arrays)
        assert (data["z"] == before).all()
        for result, got in zip(case.does.results, found, strict=True):
            assert truth.worst(result, got, None) < 1
            assert truth.worst(result, got * 1.25, None) > 1
            assert truth.worst(result, np.full_like(got, np.nan), None) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", ["weight_grad", "input_grad", *peers.MAIN_GRADIENTS])
def test_products_of_pytorch_are_held_to_bounds_that_they_keep(operation, dtype, in_pytorch, monkeypatch):
    """With a stand-in for results of another type, which PyTorch has on GPUs alone."""
    def widened(of):
        def function(*given, out, out_dtype=None):
            return out.copy_(of(*(one.to(out_dtype or one.dtype) for one in given)))
        return function

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, widened(getattr(torch, name)))
    case = Case(operation, 27, 30, 13, dtype)
    data, (name,) = case.data(), case.does.results
    made = operations.RESULTS[name]
    into = np.full(made.array.shape(*case.sizes), 1 if made.added else np.nan, made.array.dtype(dtype))
    (found,) = in_pytorch("PyTorch", case, data | {name: into})
    truth = Truth(case, data)
    assert truth.worst(name, found, None) < 1
    assert truth.worst(name, found * 1.25, None) > 1
    np.testing.assert_array_equal(found, into.astype(np.float64))
