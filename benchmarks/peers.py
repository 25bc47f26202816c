"""Who is measured: densegrad and its peers. A peer is added here, in one place.

`prepare(case, arrays)` gives a function that does the case's operation once on CuPy's current stream, and returns its
results in the order of the operation; `arrays` holds the inputs and room for the results by their names. What can be
done beforehand is done in `prepare`. float32 is float32: TF32 is off but where an implementation's precision says so.
"""
from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import densegrad

from . import baselines
from .operations import ACTIVATION, MICRO_BATCHES, REDUCTIONS, Case

Call = Callable[[], tuple]
Prepare = Callable[[Case, Mapping[str, Any]], Call]


class NotApplicable(Exception):
    """The implementation does not offer this case; the message says what."""


@dataclass(frozen=True)
class Implementation:
    """One way to do some of the operations, or all where none is named."""

    name: str
    operations: tuple[str, ...]
    requires: tuple[str, ...]
    prepare: Prepare
    precision: str = ""  # "tf32" if that is what float32 factors are rounded to

    @property
    def ours(self) -> bool:
        """Whether it is densegrad, which says by its plans how far it may be off."""
        return self.name.partition(" ")[0] == OURS

    def offers(self, operation: str) -> bool:
        """Whether it does this operation, for some cases at least."""
        return not self.operations or operation in self.operations

    @property
    def missing(self) -> str:
        """The module that is not installed, or an empty string."""
        for module in self.requires:
            try:
                if importlib.util.find_spec(module) is None:
                    return module
            except ModuleNotFoundError:  # of the package that it is in
                return module
        return ""


IMPLEMENTATIONS: list[Implementation] = []
OURS = "densegrad"


def implementation(name: str, *operations: str, requires: tuple[str, ...] = (),
                   precision: str = "") -> Callable[[Prepare], Prepare]:
    """Register a prepare function."""
    def register(prepare: Prepare) -> Prepare:
        IMPLEMENTATIONS.append(Implementation(name, operations, requires, prepare, precision))
        return prepare
    return register


PRODUCTS = ("weight_grad", "input_grad", "weight_bias_grad", "dense_grads")
MAIN_GRADIENTS = ("weight_grad_float32", "weight_grad_added")


def _densegrad(precision: str | None) -> Prepare:
    """Our own functions; a precision is a choice that products of float32 have."""
    def prepare(case: Case, arrays: Mapping[str, Any]) -> Call:
        if precision and case.dtype != "float32":
            raise NotApplicable("precision is a choice for float32")
        if case.does.in_pytorch:
            raise NotApplicable("densegrad in PyTorch does it")
        does = case.does
        function = getattr(densegrad, does.function or case.operation)
        inputs = [arrays[name] for name in does.inputs]
        given = {name: arrays[name] for name in does.results}
        out: Any = next(iter(given.values()))
        if case.operation == "weight_bias_grad":
            out = densegrad.WeightBiasGrads(**given)
        elif case.operation == "dense_grads":
            out = densegrad.DenseGrads(**given)
        elif case.operation in ("activation_grad", "cross_entropy_grad"):
            out = densegrad.OutputGrads(*given.values())
            inputs += [ACTIVATION] * (case.operation == "activation_grad")
        elif case.operation == "cross_entropy":
            out = densegrad.LossGrads(*given.values())
        options = {"batch_axis": case.batch_axis, "out": out} | ({"precision": precision} if precision else {})
        options |= {"accumulate": True} if does.added else {}

        def call() -> tuple:
            results = function(*inputs, **options)
            return results if isinstance(results, tuple) else (results,)

        return call
    return prepare


implementation(OURS)(_densegrad(None))
implementation(f"{OURS} tf32", *PRODUCTS, precision="tf32")(_densegrad("tf32"))
implementation(f"{OURS} tf32x3", *PRODUCTS)(_densegrad("tf32x3"))


@implementation("CuPy", "bias_grad", *PRODUCTS, "activation_grad", *REDUCTIONS, requires=("cupy",))
def _cupy(case: Case, arrays: Mapping[str, Any]) -> Call:
    import cupy

    def below_cross_entropy() -> None:
        z = arrays["z"].astype("float64" if case.dtype == "float64" else "float32", copy=False)
        shifted, at_label = z - z.max(axis=1, keepdims=True), (cupy.arange(case.samples), arrays["labels"])
        softmax = cupy.exp(shifted)
        total = softmax.sum(axis=1, keepdims=True)
        softmax /= total
        softmax[at_label] -= 1
        if "loss" in arrays:
            arrays["loss"][...] = (cupy.log(total[:, 0]) - shifted[at_label]).mean()
            softmax /= case.samples
        arrays["dz below cross-entropy"][...] = softmax

    steps: dict[str, Callable[[], Any]] = {
        "dx": lambda: cupy.matmul(arrays["dz"], arrays["w"].T, out=arrays["dx"]),
        "dw": lambda: cupy.matmul(arrays["x"].T, arrays["dz"], out=arrays["dw"]),
        "db": lambda: cupy.sum(arrays["dz"], axis=case.batch_axis, out=arrays["db"]),
        "dz below relu": lambda: cupy.multiply(arrays["da"], arrays["z"] > 0, out=arrays["dz below relu"]),
        "db below relu": lambda: cupy.sum(arrays["dz below relu"], axis=0, out=arrays["db below relu"]),
        "loss": lambda: None,  # with dz
        "dz below cross-entropy": below_cross_entropy,
        "db below cross-entropy": lambda: cupy.sum(arrays["dz below cross-entropy"], axis=0,
                                                   out=arrays["db below cross-entropy"]),
    }
    chosen = [(steps[name], arrays[name]) for name in case.does.results]

    def call() -> tuple:
        for step, _ in chosen:
            step()
        return tuple(result for _, result in chosen)

    return call


@implementation("PyTorch", "bias_grad", *PRODUCTS, *MAIN_GRADIENTS, "activation_grad", "cross_entropy_grad",
                requires=("torch",))
def _torch(case: Case, arrays: Mapping[str, Any]) -> Call:
    """torch.sum, mm, addmm, and backward passes: of relu, of cross_entropy, and of linear, whose weight is (M, D)."""
    import torch

    tensors = _fair_tensors(arrays)
    if case.operation == "bias_grad":
        return lambda: (torch.sum(tensors["dz"], case.batch_axis, out=tensors["db"]),)
    if case.operation in ("activation_grad", "cross_entropy_grad"):
        below = tensors["z"].detach().requires_grad_()
        above = (torch.relu(below) if case.operation == "activation_grad" else
                 torch.nn.functional.cross_entropy(below, tensors["labels"], reduction="sum"))

        def backward() -> tuple:
            dz, = torch.autograd.grad(above, below, tensors.get("da"), retain_graph=True)
            return dz, torch.sum(dz, 0)

        return backward
    if len(case.does.results) == 1:
        return _product(case, tensors)
    return _linear_backward(case, tensors)


def _product(case: Case, tensors: Mapping[str, Any]) -> Call:
    """One product into its result, which may be float32 of half types, or added there."""
    import torch

    name, = case.does.results
    out, factors = tensors[name], ((tensors["dz"], tensors["w"].T) if name == "dx" else (tensors["x"].T, tensors["dz"]))
    options = {"out": out} | ({} if out.dtype == factors[0].dtype else {"out_dtype": out.dtype})
    if case.does.added:
        return lambda: (torch.addmm(out, *factors, **options),)
    return lambda: (torch.mm(*factors, **options),)


@implementation("PyTorch tf32", *PRODUCTS, requires=("torch",), precision="tf32")
def _torch_tf32(case: Case, arrays: Mapping[str, Any]) -> Call:
    import torch

    if case.dtype != "float32":
        raise NotApplicable("TF32 is what float32 is rounded to")
    matmul, backward = torch.backends.cuda.matmul, _torch(case, arrays)

    def call() -> tuple:
        matmul.allow_tf32 = True
        try:
            return backward()
        finally:
            matmul.allow_tf32 = False

    return call


def _fair_tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The same memory as tensors, whose products are from now on neither rounded nor reduced to less than float32."""
    import torch

    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    return {name: _as_tensor(array) for name, array in arrays.items()}


def _linear_backward(case: Case, tensors: Mapping[str, Any], linear: Any = None) -> Call:
    """The backward of PyTorch's linear, or of another one."""
    import torch

    needed = {"dw": "w", "db": "b"} | ({"dx": "x"} if "dx" in case.does.results else {})
    leaves = {"x": tensors["x"], "b": torch.zeros_like(tensors["db"]),
              "w": tensors["w"].T.contiguous() if "w" in tensors else torch.empty_like(tensors["dw"].T.contiguous())}
    for leaf in needed.values():
        leaves[leaf] = leaves[leaf].detach().requires_grad_()
    z = (linear or torch.nn.functional.linear)(leaves["x"], leaves["w"], leaves["b"])
    wanted = [leaves[needed[name]] for name in case.does.results]

    def call() -> tuple:
        results = torch.autograd.grad(z, wanted, tensors["dz"], retain_graph=True)
        return tuple(result.T if name == "dw" else result
                     for name, result in zip(case.does.results, results, strict=True))

    return call


def _as_tensor(array: Any) -> Any:
    """The same memory as a tensor; the array interface has no bfloat16, so it passes as integers."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.as_tensor(array.view("int16"), device="cuda").view(torch.bfloat16)
    return torch.as_tensor(array, device="cuda")


def _in_pytorch(ours: bool, compiled: bool) -> Prepare:
    """An operation of layers in PyTorch: with densegrad's backward or PyTorch's own, eager or compiled."""
    return lambda case, arrays: _OF_LAYERS[case.operation](case, arrays, ours, compiled)


def _layer_backward(case: Case, arrays: Mapping[str, Any], ours: bool, compiled: bool) -> Call:
    """One backward of a layer, through autograd."""
    from densegrad import torch as layers

    return _linear_backward(case, _fair_tensors(arrays), _compiled(compiled, layers.linear if ours else None))


def _micro_batches(case: Case, arrays: Mapping[str, Any], ours: bool, compiled: bool) -> Call:
    """Main gradients of a step: zeroed, then those of one micro-batch after another are added.

    densegrad's kernels add them themselves. PyTorch's own way is a .grad in the dtype of the weights, which is added.
    """
    import torch

    from densegrad import torch as layers

    tensors = _fair_tensors(arrays)
    # no gradient depends on either
    weight, bias = (torch.zeros(shape, dtype=tensors["x"].dtype, device=tensors["x"].device, requires_grad=True)
                    for shape in ((case.out_features, case.in_features), case.out_features))
    main = [torch.empty_like(one, dtype=torch.float32, requires_grad=False) for one in (weight, bias)]
    into = layers.MainGrads(*main)
    linear = _compiled(compiled, (lambda *given: layers.linear(*given, into=into)) if ours else None)
    add = _compiled(compiled, lambda main, grad: main.add_(grad))
    parts = [(linear(x, weight, bias), dz) for x, dz in zip(
        tensors["x"].tensor_split(MICRO_BATCHES), tensors["dz"].tensor_split(MICRO_BATCHES), strict=True) if len(x)]

    def call() -> tuple:
        for one in main:
            one.zero_()
        for z, dz in parts:
            z.backward(dz, retain_graph=True)
            if not ours:
                for one, parameter in zip(main, (weight, bias), strict=True):
                    add(one, parameter.grad)
                    parameter.grad = None
        return main[0].T, main[1]

    return call


#: what is measured of layers in PyTorch
_OF_LAYERS: dict[str, Callable[[Case, Mapping[str, Any], bool, bool], Call]] = {
    "layer_backward": _layer_backward, "micro_batches": _micro_batches}
for _compiles in (False, True):
    _how = " compiled" if _compiles else ""
    implementation(f"{OURS} in PyTorch{_how}", *_OF_LAYERS, requires=("torch",))(_in_pytorch(True, _compiles))
    implementation(f"PyTorch{_how}", *_OF_LAYERS, requires=("torch",))(_in_pytorch(False, _compiles))


def _compiled(compiled: bool, function: Any) -> Any:
    """The function, PyTorch's own linear if none is given, as torch.compile makes it if that is asked for."""
    import torch

    function = function or torch.nn.functional.linear
    return torch.compile(function, fullgraph=True) if compiled else function


# -- losses: forward and backward through autograd, and db as the sum of dz


def _loss(case: Case, arrays: Mapping[str, Any], loss_of: Callable[[Any, Any], Any], in_place: bool = False) -> Call:
    """The loss of logits and labels, dz from it, and db; a loss that writes dz over the logits is given a copy."""
    import torch

    below, labels = _as_tensor(arrays["z"]).detach(), _as_tensor(arrays["labels"])
    below = (below.clone() if in_place else below).requires_grad_()

    def call() -> tuple:
        loss = loss_of(below, labels)
        dz, = torch.autograd.grad(loss, below)
        results = loss.detach(), dz, torch.sum(dz, 0)
        return results if "loss" in case.does.results else results[1:]

    return call


def _torch_cross_entropy(case: Case) -> Callable[[Any, Any], Any]:
    import torch

    reduction = REDUCTIONS[case.operation]
    return lambda z, labels: torch.nn.functional.cross_entropy(z, labels, reduction=reduction)


@implementation("PyTorch", "cross_entropy", requires=("torch",))
def _torch_loss(case: Case, arrays: Mapping[str, Any]) -> Call:
    return _loss(case, arrays, _torch_cross_entropy(case))


@implementation("PyTorch compiled", *REDUCTIONS, requires=("torch",))
def _torch_loss_compiled(case: Case, arrays: Mapping[str, Any]) -> Call:
    """The gradient alone takes a forward pass too, as ours does: from logits."""
    return _loss(case, arrays, _compiled_cross_entropy(case))


@lru_cache(maxsize=1)
def _compiled_cross_entropy(case: Case) -> Callable[[Any, Any], Any]:
    """Compiled for this case alone: not once for each set of buffers, and never for sizes that vary.

    What was compiled for other cases is dropped first: PyTorch compiles one function for a few cases only.
    """
    import torch

    torch.compiler.reset()
    return torch.compile(_torch_cross_entropy(case), fullgraph=True, dynamic=False)


@implementation("Liger", *REDUCTIONS, requires=("torch", "liger_kernel"))
def _liger(case: Case, arrays: Mapping[str, Any]) -> Call:
    """It writes dz over the logits, so that calls after the first, which is checked, do the same work on other values.

    Its backward pass waits for the GPU, to see whether the loss is multiplied by anything.
    """
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return _loss(case, arrays, LigerCrossEntropyLoss(reduction=REDUCTIONS[case.operation]), in_place=True)


@implementation("cuBLASLt BGRADB", "weight_bias_grad", requires=("nvmath",))
def _cublaslt(case: Case, arrays: Mapping[str, Any]) -> Call:
    """nvmath-python's matrix product, whose epilogue adds up the columns of the right factor."""
    from nvmath.linalg.advanced import Matmul, MatmulEpilog

    product = Matmul(arrays["x"].T, arrays["dz"], options={"blocking": "auto"})
    product.plan(epilog=MatmulEpilog.BGRADB)

    def call() -> tuple:
        dw, extra = product.execute()
        return dw, extra["bgradb"]

    return call


@implementation("cuda.compute", "bias_grad", requires=("cuda.compute",))
def _cuda_compute(case: Case, arrays: Mapping[str, Any]) -> Call:
    """A segmented reduction, whose segments are contiguous: dz features first, and no half sums."""
    if not case.batch_axis or case.dtype not in ("float32", "float64"):
        raise NotApplicable("segments are contiguous, and sums have the type of their elements")
    import cupy
    import numpy as np
    from cuda.compute import OpKind, make_segmented_reduce

    ends = np.arange(1, case.out_features + 1, dtype=np.int64) * case.samples
    given = {"d_in": arrays["dz"].ravel(), "d_out": arrays["db"], "start_offsets_in": cupy.asarray(ends - case.samples),
             "end_offsets_in": cupy.asarray(ends), "op": OpKind.PLUS, "h_init": np.zeros(1, case.dtype)}
    reduce = make_segmented_reduce(**given)
    size = reduce(temp_storage=None, num_segments=case.out_features, **given)
    room = cupy.empty(max(size, 1), np.uint8)

    def call() -> tuple:
        reduce(temp_storage=room, num_segments=case.out_features, **given)
        return (arrays["db"],)

    return call


def _baseline(baseline: str) -> Prepare:
    def prepare(case: Case, arrays: Mapping[str, Any]) -> Call:
        if case.dtype not in ("float32", "float64"):
            raise NotApplicable("written for float32 and float64")

        def call() -> tuple:
            baselines.weight_grad(baseline, arrays["x"], arrays["dz"], arrays["dw"])
            return (arrays["dw"],)

        return call
    return prepare


for _name in baselines.BASELINES:
    implementation(_name, "weight_grad")(_baseline(_name))
