"""Cross-entropy of PyTorch's signature: densegrad's loss, with the gradient made beside it in the forward.

    forward          loss, dz                   one call of cross_entropy, behind an operator of PyTorch
    backward         dz times what comes in     one launch of PyTorch
    double backward                             PyTorch's
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import DensegradError, DTypeError, ShapeError
from ..losses import IGNORED, REDUCTIONS, LossGrads
from ..losses import cross_entropy as loss_grads
from ..slips import meant
from ..typing import Reduction
from .common import DTYPES, check_tensors, operator, refusing, unreadable, with_its_signature


def _cross_entropy_on_device(z, target, weight, ignore_index, reduction, label_smoothing):
    """The loss in the type of the sums, and dz; classes last."""
    if z.dim() == 1:
        loss, dz = _cross_entropy_on_device(z[None], target[None], weight, ignore_index, reduction, label_smoothing)
        return loss.reshape(()), dz[0]
    dz = _gradient_of(z)
    # Probabilities have no label, and none that is ignored.
    ignored = IGNORED if target.is_floating_point() else ignore_index
    held = target.to(dz.dtype) if target.is_floating_point() else target
    return loss_grads(z.to(dz.dtype), held, class_weight=weight, ignore_index=ignored, reduction=reduction,
                      label_smoothing=label_smoothing, out=LossGrads(dz=dz))[:2]


def _gradient_of(z: Tensor) -> Tensor:
    """Room for dz, whose samples lie side by side where z's do, and else its classes.

    float32 of float16: divided by the number of samples, the gradient has no room there before a loss scale comes in.
    """
    dtype = torch.float32 if z.dtype == torch.float16 else z.dtype
    if z.stride(-1) != 1 and z.select(-1, 0).is_contiguous():
        return z.new_empty((z.shape[-1], *z.shape[:-1]), dtype=dtype).movedim(0, -1)
    return z.new_empty(z.shape, dtype=dtype)


def _cross_entropy_of_shapes(z, target, weight, ignore_index, reduction, label_smoothing):
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    return z.new_empty(z.shape[:-1] if reduction == "none" else (), dtype=wide), _gradient_of(z)


_cross_entropy = operator(
    "cross_entropy", "(Tensor z, Tensor target, Tensor? weight, int ignore_index, str reduction, "
    "float label_smoothing) -> (Tensor, Tensor)", _cross_entropy_on_device, _cross_entropy_of_shapes)


class _Options(NamedTuple):
    """What cross-entropy is of beside tensors, and the dtype of its loss."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    dtype: torch.dtype


def _classes_last(tensor: Tensor) -> Tensor:
    """PyTorch's order of axes, (C,) or (N, C, ...), as (C,) or (N, ..., C): a view."""
    return tensor.movedim(min(1, tensor.dim() - 1), -1)


def _beside(z: Tensor, dloss: Tensor) -> Tensor:
    """The gradient of the loss, or of each sample's, with as many dimensions as z.

    As one of no dimensions, PyTorch would round float32 to the half type of z before multiplying.
    """
    return dloss.reshape(*dloss.shape, *[1] * (z.dim() - dloss.dim()))


def _times(dz: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the logits in PyTorch's order of axes: a new tensor, in one launch and with one rounding."""
    factor = _beside(dz, dloss)
    if torch.compiler.is_compiling():
        found = (dz * factor).to(dtype)
    else:
        found = torch.mul(dz, factor, out=torch.empty_like(dz, dtype=dtype))
    return found.movedim(-1, min(1, dz.dim() - 1))


def _of_probabilities(dloss: Tensor, input: Tensor, target: Tensor, weight: Tensor | None,
                      options: _Options) -> Tensor:
    """The gradient of class probabilities, by PyTorch's operations."""
    z = _classes_last(input)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    factor = _beside(z, dloss).to(wide) * (options.label_smoothing - 1)
    if options.reduction == "mean":
        factor = factor / (z.numel() // z.shape[-1])
    if weight is not None:
        factor = factor * weight
    return (functional.log_softmax(z, -1, dtype=wide) * factor).movedim(-1, min(1, z.dim() - 1)).to(target.dtype)


_REFUSED = refusing("cross_entropy", 'pass all samples in input, and reduction="none" for a loss of each')


class _CrossEntropy(torch.autograd.Function):
    """The loss and, made beside it, its gradient, which the backward multiplies by what comes in."""

    vmap = _REFUSED.vmap

    @staticmethod
    @with_its_signature
    def forward(input, target, weight, options):
        held = _classes_last(target) if target.is_floating_point() else target
        *numbers, dtype = options
        loss, dz = _cross_entropy(_classes_last(input), held, weight, *numbers)
        return loss.to(dtype), dz

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, weight, ctx.options = inputs
        _, dz = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(dz)
        ctx.save_for_backward(input, target, weight, dz)

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 4
        input, target, weight, dz = ctx.saved_tensors
        dinput = dtarget = None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                dinput = _CrossEntropyBackward.apply(dloss, input, target, weight, dz, ctx.options)
            else:
                dinput = _times(dz, dloss, input.dtype)
        if ctx.needs_input_grad[1]:
            dtarget = _of_probabilities(dloss, input, target, weight, ctx.options)
        return dinput, dtarget, None, None


class _CrossEntropyRefusingJvp(_CrossEntropy):
    """The same outside of torch.compile, as `_RefusingJvp` is of a layer."""

    jvp = _REFUSED.jvp


class _CrossEntropyBackward(torch.autograd.Function):
    """The gradient of the logits, which PyTorch differentiates further by its own formulas."""

    vmap = _REFUSED.vmap

    @staticmethod
    @with_its_signature
    def forward(dloss, input, target, weight, dz, options):
        return _times(dz, dloss, input.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dloss, input, target, weight, _, ctx.options = inputs
        ctx.save_for_backward(dloss, input, target, weight)

    @staticmethod
    def backward(ctx, cotangent):
        dloss, input, target, weight = ctx.saved_tensors
        *numbers, dtype = ctx.options
        options = dict(zip(_Options._fields, numbers, strict=False))
        weight = None if weight is None else weight.to(dtype)
        probabilities = target.is_floating_point()

        def gradient(dloss, input, *given):
            held = given[0].to(dtype) if given else target.long()
            _, back = torch.func.vjp(lambda input: functional.cross_entropy(input.to(dtype), held, weight, **options),
                                     input)
            return back(dloss)[0]

        _, back = torch.func.vjp(gradient, dloss, input, *[target] * probabilities)
        return *back(cotangent), *[None] * (4 - probabilities)


def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = IGNORED,
                  reduction: Reduction = "mean", label_smoothing: float = 0.0, fallback: bool = False) -> Tensor:
    """Softmax cross-entropy as torch.nn.functional.cross_entropy, from one reading of the logits with its gradient.

    PyTorch's signature without `size_average` and `reduce`, which are deprecated there.

    Parameters
    ----------
    input : Tensor, (C,), (N, C) or (N, C, d1, ...), float16 | bfloat16 | float32 | float64
        The logits, on a GPU, or on the CPU where Numba's simulator is used. Read as they are where the classes or the
        samples lie side by side; else, as of (N, C, d1, ...) in C order with N > 1, densegrad makes a copy. float16 is
        copied to float32.
    target : Tensor, () or (N, d1, ...), int64 | int32; or the shape and dtype of input
        Classes from 0 to C - 1; or class probabilities.
    weight : Tensor, (C,), float16 | bfloat16 | float32, or float64 beside float64; optional
        What each class's target is multiplied by.
    ignore_index : int
        A class whose samples contribute nothing; not for probabilities.
    reduction : "mean", "sum" or "none"
        As in PyTorch.
    label_smoothing : float, 0 to 1
        How much of the target is spread evenly over all classes.
    fallback : bool
        Whether what densegrad has no kernel for, a dtype or a device, is left to PyTorch altogether.

    Returns
    -------
    Tensor
        The loss, of the dtype of input, or float32 under autocast, of no dimensions; of the shape of the batch with
        reduction "none".

    Raises
    ------
    ShapeError, DTypeError, DeviceError, TypeError, ValueError
        Naming what densegrad cannot compute; ValueError too for targets on the CPU that are no class. On a GPU the
        loss of such a sample is NaN.
    NotImplementedError
        Of torch.vmap and forward-mode derivatives.

    Notes
    -----
    The gradient is made in the forward, whether or not it is asked for, and saved beside input. The backward multiplies
    it by what comes in, in one launch that writes a new tensor; nothing waits for the GPU. Of half types the loss is
    that of float32 sums, rounded to the dtype of input, and not rounded under autocast. There PyTorch copies bfloat16
    to float32 first; here it is read as it is, and its gradient is rounded to bfloat16 once more before it is
    multiplied.
    The bits of the loss and of the saved gradient are `densegrad.cross_entropy`'s, the same on every run. The gradient
    of probabilities, and double backward, are computed by PyTorch; torch.compile has no double backward.

    Examples
    --------
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> cross_entropy(logits, torch.tensor([0, 3])).backward()
    >>> logits.grad[0]
    tensor([-0.3750,  0.1250,  0.1250,  0.1250])
    """
    check_tensors(input=input, target=target, weight=weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}"
                         f"{meant(reduction, REDUCTIONS)}")
    kind = input.device.type
    dtype, given = input.dtype, (input, target)
    if dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.float32
        if target.is_floating_point() and target.dtype not in (input.dtype, torch.float64):
            given = input.float(), target.float()
    problem = _loss_problem(*given, weight, ignore_index)
    if problem is not None:
        if not fallback:
            raise problem
        return functional.cross_entropy(input, target, weight, ignore_index=ignore_index, reduction=reduction,
                                        label_smoothing=label_smoothing)
    function = _CrossEntropy if torch.compiler.is_compiling() else _CrossEntropyRefusingJvp
    return function.apply(*given, weight, _Options(ignore_index, reduction, float(label_smoothing), dtype))[0]


def _loss_problem(input: Tensor, target: Tensor, weight: Tensor | None,
                  ignore_index: int) -> DensegradError | TypeError | ValueError | None:
    """Why densegrad cannot compute this loss, if it cannot."""
    if input.dtype not in DTYPES:
        return DTypeError(f"input must be float16, bfloat16, float32 or float64; got {input.dtype} (convert it with "
                          "float(), or pass fallback=True for PyTorch's loss)")
    if not input.dim() or not input.shape[min(1, input.dim() - 1)]:
        return ShapeError(f"input must be (C,), (N, C) or (N, C, d1, ...), with one class at least; got "
                          f"{tuple(input.shape)}")
    problem = _target_problem(input, target, ignore_index)
    if problem is not None:
        return problem
    given = {"input": input, "target": target}
    if weight is not None:
        given["weight"] = weight
        classes = input.shape[min(1, input.dim() - 1)]
        if weight.shape != (classes,):
            return ShapeError(f"weight must have one number for each class, shape ({classes},); got "
                              f"{tuple(weight.shape)}")
        if weight.dtype not in DTYPES or (weight.dtype == torch.float64 != input.dtype):
            return DTypeError(f"weight must be float16, bfloat16 or float32, or float64 beside float64; got "
                              f"{weight.dtype} beside {input.dtype} (convert it with weight.to(input.dtype))")
        if weight.requires_grad and torch.is_grad_enabled():
            return TypeError("weight requires a gradient, which densegrad has none of (pass weight.detach(), or "
                             "fallback=True for PyTorch's loss)")
    return unreadable(given)


def _target_problem(input: Tensor, target: Tensor, ignore_index: int) -> DensegradError | ValueError | None:
    """What is wrong with classes or class probabilities, if anything is."""
    if target.is_floating_point():
        if target.shape != input.shape:
            return ShapeError(f"target is of class probabilities, {target.dtype}, and must have the shape of input, "
                              f"{tuple(input.shape)}; got {tuple(target.shape)} (convert classes with long())")
        if target.dtype != input.dtype:
            return DTypeError(f"target must have the dtype of input where it is of class probabilities, {input.dtype}; "
                              f"got {target.dtype} (convert it with target.to(input.dtype))")
        return None if ignore_index < 0 else ValueError(
            f"ignore_index is a class, and target is of class probabilities here; got {ignore_index} (leave it out)")
    batch = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if target.shape != batch:
        return ShapeError(f"target must have a class for each sample, shape {batch}, or be class probabilities of the "
                          f"shape and dtype of input; got {tuple(target.shape)} of {target.dtype}")
    if target.dtype not in (torch.int64, torch.int32):
        return DTypeError("target must be classes of int64 or int32, or class probabilities of the dtype of input; "
                          f"got {target.dtype} (convert it with long())")
    return None
