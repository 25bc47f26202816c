"""Linear layers of PyTorch whose backward is densegrad's: `linear`, `Linear`, and `convert` for models that exist.

    forward          z = x Wᵀ + b, a = f(z)     PyTorch's
    backward         dx, dw, db                 one call of dense_grads, behind an operator of PyTorch
    double backward                             PyTorch's

`cross_entropy` is densegrad's in the forward too, which makes the gradient beside the loss.

The operators have no gradient of their own. `_Linear` calls one in its backward, through `_Backward` where that is
differentiated in turn: so autograd, torch.func and torch.compile all find what they look for.
"""
from __future__ import annotations

import inspect
from typing import Any, NamedTuple

try:
    import torch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("densegrad.torch needs PyTorch, 2.6 or newer (pip install 'torch>=2.6')",
                              name="torch") from error

from torch import Tensor
from torch.nn import functional

from . import device, tensors
from .activations import ACTIVATIONS, NEGATIVE_SLOPE
from .errors import DensegradError, DeviceError, DTypeError, ShapeError
from .gradients import DenseGrads, dense_grads
from .losses import IGNORED, REDUCTIONS, LossGrads
from .losses import cross_entropy as loss_grads

__all__ = ["Converted", "Linear", "MainGrads", "convert", "cross_entropy", "linear"]

#: PyTorch's functions, by the names that activations have here
_FORWARD = {
    "identity": lambda z: z,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "elu": functional.elu,
    "selu": functional.selu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": functional.softplus,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "mish": functional.mish,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class MainGrads(NamedTuple):
    """Where gradients are added: tensors with the shapes of weight and bias, or None for what requires no gradient."""

    weight: Tensor | None = None
    bias: Tensor | None = None


#: the operators; defined by the library itself, since custom_op takes longer than what it wraps
_operators = torch.library.Library("densegrad", "DEF")
_operators.define("linear_backward(Tensor da, Tensor x, Tensor weight, Tensor? z, *, str? activation, "
                  "float? negative_slope, str[] need) -> Tensor[]")
_operators.define("linear_backward_into(Tensor da, Tensor x, Tensor weight, Tensor? z, Tensor(a!)? dw, Tensor(b!)? db, "
                  "*, str? activation, float? negative_slope, bool need_dx) -> Tensor")


def _linear_backward_on_device(da, x, weight, z, *, activation, negative_slope, need):
    """Those of the gradients dx, dw and db that are needed, in this order."""
    if x.dim() > 1:
        grads = dense_grads(x, weight, da, need=need, activation=activation, z=z, negative_slope=negative_slope,
                            weight_layout="out_in")
    else:
        grads = _dense_grads(da, x, weight, z, activation=activation, negative_slope=negative_slope, need=need)
    return [grad for grad in grads if grad is not None]


def _linear_backward_into_on_device(da, x, weight, z, dw, db, *, activation, negative_slope, need_dx):
    """dw and db added into these; dx, or a tensor of no elements where it is not needed."""
    into = {name: out for name, out in (("dw", dw), ("db", db)) if out is not None}
    dx = _dense_grads(da, x, weight, z, activation=activation, negative_slope=negative_slope,
                      need=(*["dx"] * need_dx, *into), out=DenseGrads(**into), accumulate=tuple(into)).dx
    torch.autograd.graph.increment_version(list(into.values()))
    return x.new_empty(0) if dx is None else dx


def _dense_grads(da, x, weight, z, **options):
    """Those of a layer of PyTorch, or of one sample without a batch axis."""
    if x.dim() > 1:
        return dense_grads(x, weight, da, z=z, weight_layout="out_in", **options)
    grads = _dense_grads(da[None], x[None], weight, None if z is None else z[None], **options)
    return grads if grads.dx is None else grads._replace(dx=grads.dx[0])


for _key in ("CPU", "CUDA"):
    _operators.impl("linear_backward", _linear_backward_on_device, _key)
    _operators.impl("linear_backward_into", _linear_backward_into_on_device, _key)
_linear_backward = torch.ops.densegrad.linear_backward.default
_linear_backward_into = torch.ops.densegrad.linear_backward_into.default


@torch.library.register_fake("densegrad::linear_backward", lib=_operators)
def _(da, x, weight, z, *, activation, negative_slope, need):
    made = {"dx": (x, x.shape), "dw": (weight, weight.shape), "db": (da, da.shape[-1:])}
    return [tensor.new_empty(shape) for name, (tensor, shape) in made.items() if name in need]


@torch.library.register_fake("densegrad::linear_backward_into", lib=_operators)
def _(da, x, weight, z, dw, db, *, activation, negative_slope, need_dx):
    return x.new_empty(x.shape if need_dx else 0)


class _Options(NamedTuple):
    """The activation above a layer."""

    activation: str | None
    negative_slope: float | None


def _activated(z: Tensor, options: _Options) -> Tensor:
    activation, negative_slope = options
    if activation is None:
        return z
    if activation == "leaky_relu":
        return functional.leaky_relu(z, NEGATIVE_SLOPE.default if negative_slope is None else negative_slope)
    return _FORWARD[activation](z)


def _refuse_vmap(info, in_dims, *given):
    raise NotImplementedError("densegrad.torch.linear is not mapped by torch.vmap, or by what is built on it (pass the "
                              "batch axes in x: all axes but the last are samples)")


def _refuse_jvp(ctx, *tangents):
    raise NotImplementedError("densegrad.torch.linear has no forward-mode derivatives (differentiate backwards, or "
                              "call torch.nn.functional.linear there)")


def _with_its_signature(function):
    """The function with its signature kept, which autograd asks for at every call."""
    function.__signature__ = inspect.signature(function)
    return function


class _Linear(torch.autograd.Function):
    """PyTorch's forward with densegrad's backward: a, and the z that an activation was applied to."""

    vmap = staticmethod(_refuse_vmap)

    @staticmethod
    @_with_its_signature
    def forward(x, weight, bias, options, into_weight, into_bias):
        z = functional.linear(x, weight, bias)
        return z if options.activation is None else (_activated(z, options), z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.options, ctx.into_weight, ctx.into_bias = inputs
        ctx.set_materialize_grads(False)
        if ctx.options.activation is None:  # no gradient depends on the bias
            ctx.save_for_backward(x, weight, None, None)
        else:
            _, z = output
            ctx.mark_non_differentiable(z)
            ctx.save_for_backward(x, weight, bias, z)

    @staticmethod
    def backward(ctx, da, *_):
        if da is None:
            return (None,) * 6
        x, weight, bias, z = ctx.saved_tensors
        needed, (activation, negative_slope) = ctx.needs_input_grad, ctx.options
        if ctx.into_weight is not None or ctx.into_bias is not None:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise NotImplementedError("gradients that are added into main gradients cannot be differentiated again "
                                          "(call backward without create_graph=True)")
            dx = _linear_backward_into(da, x, weight, z, ctx.into_weight if needed[1] else None,
                                       ctx.into_bias if needed[2] else None, activation=activation,
                                       negative_slope=negative_slope, need_dx=needed[0])
            return dx if needed[0] else None, *[None] * 5
        need = [name for name, wanted in zip(("dx", "dw", "db"), needed, strict=False) if wanted]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _Backward.apply(da, x, weight, bias, z, (ctx.options, need))
        else:
            grads = _linear_backward(da, x, weight, z, activation=activation, negative_slope=negative_slope, need=need)
        found = iter(grads)
        return *[next(found) if wanted else None for wanted in needed[:3]], *[None] * 3


class _RefusingJvp(_Linear):
    """The same outside of torch.compile, which traces no Function that says what its forward mode is."""

    jvp = staticmethod(_refuse_jvp)


class _Backward(torch.autograd.Function):
    """The gradients that are needed, which PyTorch differentiates further by its own formulas."""

    vmap = staticmethod(_refuse_vmap)

    @staticmethod
    @_with_its_signature
    def forward(da, x, weight, bias, z, how):
        options, need = how
        return tuple(_linear_backward(da, x, weight, z, **options._asdict(), need=need))

    @staticmethod
    def setup_context(ctx, inputs, output):
        da, x, weight, bias, _, ctx.how = inputs
        ctx.save_for_backward(da, x, weight, bias)

    @staticmethod
    def backward(ctx, *cotangents):
        da, x, weight, bias = ctx.saved_tensors
        options, need = ctx.how
        # The bias's gradient may be one of those that are needed, though none depends on it.
        offset = weight.new_zeros(weight.shape[0]) if bias is None else bias

        def gradients(da, *operands):
            _, back = torch.func.vjp(lambda *given: _activated(functional.linear(*given), options), *operands)
            return [grad for name, grad in zip(("dx", "dw", "db"), back(da), strict=True) if name in need]

        _, back = torch.func.vjp(gradients, da, x, weight, offset)
        *below, of_bias = back(list(cotangents))
        return *below, None if bias is None else of_bias, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None,
           negative_slope: float | None = None, into: MainGrads | None = None, fallback: bool = False) -> Tensor:
    """A linear layer with PyTorch's forward and densegrad's backward, and an activation if one is named.

        z = x @ weight.T + bias          a = f(z)

    Parameters
    ----------
    x : Tensor, (..., D), float16 | bfloat16 | float32 | float64
        The layer's input, on a GPU, or on the CPU where Numba's simulator is used.
    weight : Tensor, (M, D), dtype of x
        The layer's weights.
    bias : Tensor, (M,), dtype of x, optional
        The layer's bias.
    activation, negative_slope
        As in `densegrad.dense_grads`: the gradient below it, and the bias's, are made in one pass over memory.
    into : MainGrads of Tensors or None, optional
        Main gradients: float32, or float64 of float64, with the shapes of weight and bias. The gradients of both are
        added there by the kernel that makes them, and `.grad` stays None. Not under DistributedDataParallel, which
        reduces `.grad` alone. What requires no gradient gets none, and may be None here.
    fallback : bool
        Whether what densegrad has no kernel for, a dtype or a device, is left to PyTorch altogether; never with main
        gradients.

    Returns
    -------
    Tensor, (..., M)
        z, or a with an activation.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, TypeError, ValueError
        Naming what densegrad cannot differentiate, before the forward.
    NotImplementedError
        Of torch.vmap and forward-mode derivatives, and where gradients that went `into` main gradients are
        differentiated again.

    Notes
    -----
    The bits of the forward are PyTorch's. Those of the backward are `densegrad.dense_grads`'s, the same on every run.
    Under autocast x, weight and bias are cast as PyTorch's linear does, before they are saved, and the activation is
    computed in that dtype. Double backward is
    computed by PyTorch's products; torch.compile has none. An activation saves z beside x and weight.

    Examples
    --------
    >>> x, weight = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    >>> linear(x, weight).sum().backward()
    >>> weight.grad[0]
    tensor([2., 2., 2.])
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, or None; got {activation!r}")
    if negative_slope is not None and activation != "leaky_relu":
        raise TypeError(f'negative_slope is the derivative of "leaky_relu" alone; got {negative_slope!r} with '
                        f"activation={activation!r} (leave it out)")
    options = _Options(None if activation == "identity" else activation, negative_slope)
    problem = _problem(x, weight, bias)
    if problem is not None:
        if not fallback or into is not None:
            raise problem
        return _activated(functional.linear(x, weight, bias), options)
    into = MainGrads() if into is None else MainGrads(*into)
    _check_into(into, weight, bias)
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        operands = (one if one is None or one.dtype == torch.float64 else one.to(low) for one in (x, weight, bias))
        with torch.autocast(kind, enabled=False):
            return linear(*operands, activation=activation, negative_slope=negative_slope, into=into)
    function = _Linear if torch.compiler.is_compiling() else _RefusingJvp
    found = function.apply(x, weight, bias, options, *into)
    return found if options.activation is None else found[0]


def _problem(x: Tensor, weight: Tensor, bias: Tensor | None) -> DensegradError | TypeError | None:
    """Why densegrad cannot differentiate this layer, if it cannot."""
    given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in given.items():
        if tensor.dtype not in _DTYPES:
            return DTypeError(f"{name} must be float16, bfloat16, float32 or float64; got {tensor.dtype} (convert it "
                              "with float(), or pass fallback=True for PyTorch's backward)")
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return ShapeError(f"weight must have 2 dimensions (out_features, in_features), and bias (out_features,); got "
                          f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}")
    return _unreadable(given)


def _unreadable(given: dict[str, Tensor]) -> DeviceError | TypeError | None:
    """Why kernels cannot use these tensors, if they cannot."""
    if torch.compiler.is_compiling():  # the operator says the rest when it is run
        return None
    try:
        devices = "meta", *device.current().tensor_devices  # of meta shapes alone, which are enough for a forward
    except DeviceError as error:
        return error
    for name, tensor in given.items():
        reason = tensors.cure(tensor, devices, of_memory=False)
        if reason:
            return TypeError(f"{name} is no tensor that kernels can use: {reason}, or fallback=True for PyTorch's "
                             "backward")
    return None


def _check_into(into: MainGrads, weight: Tensor, bias: Tensor | None) -> None:
    """Hold main gradients to the parameters that they are of."""
    if into == (None, None):
        return
    for name, main, parameter in (("weight", into.weight, weight), ("bias", into.bias, bias)):
        if main is None:
            if parameter is not None and parameter.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"into.{name} is missing, and {name} requires a gradient (pass a tensor for it, or "
                                 f"{name}.detach())")
            continue
        if parameter is None:
            raise ShapeError(f"into.{name} was given, but there is no {name} (leave it out)")
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        if main.shape != parameter.shape:
            raise ShapeError(f"into.{name} must have the shape of {name}, {tuple(parameter.shape)}; got "
                             f"{tuple(main.shape)}")
        if main.dtype != wide or main.device != parameter.device:
            raise DTypeError(f"into.{name} must be {wide} on {parameter.device}; got {main.dtype} on {main.device}")
    # set by DistributedDataParallel for as long as its forward runs
    if getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None:
        raise NotImplementedError("DistributedDataParallel reduces .grad alone, and main gradients would stay those of "
                                  "one process (leave main_grad and into out, or reduce main gradients yourself "
                                  "without DistributedDataParallel)")


class Linear(torch.nn.Linear):
    """torch.nn.Linear with densegrad's backward: the same parameters, initialisation and state_dict.

    Parameters
    ----------
    in_features, out_features, bias, device, dtype
        As in torch.nn.Linear.
    main_grad : bool
        Whether gradients are added into `weight.main_grad` and `bias.main_grad` in the kernels that make them, instead
        of `.grad`, which stays None. A parameter without one gets zeros: float32, or float64 of float64. Zeroing and
        reducing them, and handing them to the optimizer, is the caller's.
    fallback : bool
        As in `linear`.
    """

    main_grad = False
    fallback = False

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
                 main_grad: bool = False, fallback: bool = False):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.main_grad, self.fallback = main_grad, fallback
        self._main_grads()

    def forward(self, input: Tensor) -> Tensor:
        """z, or what `fallback` lets PyTorch compute."""
        return linear(input, self.weight, self.bias, into=self._main_grads(), fallback=self.fallback)

    def _main_grads(self) -> MainGrads | None:
        return MainGrads(_main_grad(self.weight), _main_grad(self.bias)) if self.main_grad else None

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        """Main gradients follow their parameters to another device, and keep their dtype."""
        super()._apply(fn, recurse)
        for parameter in (self.weight, self.bias):
            main = getattr(parameter, "main_grad", None)
            if main is not None and main.device != parameter.device:
                parameter.main_grad = None if main.is_meta else main.to(parameter.device)
        self._main_grads()
        return self

    def _get_name(self) -> str:
        return "densegrad.Linear"


def _main_grad(parameter: Any) -> Tensor | None:
    """A parameter's main gradient, zeros if it had none; None if it requires no gradient."""
    if parameter is None or not parameter.requires_grad:
        return None
    main = getattr(parameter, "main_grad", None)
    if main is None:
        if torch.compiler.is_compiling():
            raise RuntimeError("a main gradient cannot be made within torch.compile (call the layer once before)")
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        main = parameter.main_grad = torch.zeros_like(parameter, dtype=wide, requires_grad=False)
    return main


class Converted(NamedTuple):
    """What `convert` did: the names of the modules that it swapped, and of those that it left with the reason."""

    swapped: list[str]
    left: dict[str, str]


def convert(model: torch.nn.Module, *, main_grad: bool = False, fallback: bool = False) -> Converted:
    """Give every plain torch.nn.Linear of a model densegrad's backward, in place, the model itself included.

    Parameters
    ----------
    model : torch.nn.Module
        Its parameters, hooks, ties, dtypes, devices and training mode stay as they are, and so do optimizers.
    main_grad, fallback
        As in `Linear`, for all that are swapped.

    Returns
    -------
    Converted
        `(swapped, left)`: names as in `model.named_modules()`, where "" is the model itself. What is left has a
        reason: subclasses have a forward of their own, as far as can be known; `torch.nn.MultiheadAttention` reads
        the weight of its out_proj and never calls it.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    >>> convert(model)
    Converted(swapped=['0'], left={})
    """
    swapped, left = [], {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, torch.nn.Linear):
            continue
        if type(module) is Linear:
            left[name] = "it has densegrad's backward already"
        elif type(module) is not torch.nn.Linear:
            left[name] = _why_left(module)
        elif "forward" in vars(module):
            left[name] = "its forward was replaced"
        elif module.weight.dtype not in _DTYPES and not fallback:
            left[name] = f"its weight is {module.weight.dtype}"
        else:
            swapped.append(name)
    for name in swapped:
        module = model.get_submodule(name)
        module.__class__ = Linear
        module.main_grad, module.fallback = main_grad, fallback
        module._main_grads()
    return Converted(swapped, left)


def _why_left(module: torch.nn.Module) -> str:
    kind = type(module)
    if kind is torch.nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "torch.nn.MultiheadAttention reads its weight and never calls it"
    if isinstance(module, torch.nn.LazyLinear):
        return "it is a LazyLinear without weights (call the model once before)"
    return f"it is a {kind.__module__}.{kind.__qualname__}, a subclass"


# Cross-entropy

_operators.define("cross_entropy(Tensor z, Tensor target, Tensor? weight, *, int ignore_index, str reduction, "
                  "float label_smoothing) -> (Tensor, Tensor)")


def _cross_entropy_on_device(z, target, weight, *, ignore_index, reduction, label_smoothing):
    """The loss in the type of the sums, and dz; classes last."""
    if z.dim() == 1:
        loss, dz = _cross_entropy_on_device(z[None], target[None], weight, ignore_index=ignore_index,
                                            reduction=reduction, label_smoothing=label_smoothing)
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


for _key in ("CPU", "CUDA"):
    _operators.impl("cross_entropy", _cross_entropy_on_device, _key)
_cross_entropy = torch.ops.densegrad.cross_entropy.default


@torch.library.register_fake("densegrad::cross_entropy", lib=_operators)
def _(z, target, weight, *, ignore_index, reduction, label_smoothing):
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    return z.new_empty(z.shape[:-1] if reduction == "none" else (), dtype=wide), _gradient_of(z)


class _LossOptions(NamedTuple):
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
                      options: _LossOptions) -> Tensor:
    """The gradient of class probabilities, by PyTorch's operations."""
    z = _classes_last(input)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    factor = _beside(z, dloss).to(wide) * (options.label_smoothing - 1)
    if options.reduction == "mean":
        factor = factor / (z.numel() // z.shape[-1])
    if weight is not None:
        factor = factor * weight
    return (functional.log_softmax(z, -1, dtype=wide) * factor).movedim(-1, min(1, z.dim() - 1)).to(target.dtype)


def _refuse_loss_vmap(info, in_dims, *given):
    raise NotImplementedError("densegrad.torch.cross_entropy is not mapped by torch.vmap, or by what is built on it "
                              '(pass all samples in input, and reduction="none" for a loss of each)')


def _refuse_loss_jvp(ctx, *tangents):
    raise NotImplementedError("densegrad.torch.cross_entropy has no forward-mode derivatives (differentiate backwards, "
                              "or call torch.nn.functional.cross_entropy there)")


class _CrossEntropy(torch.autograd.Function):
    """The loss and, made beside it, its gradient, which the backward multiplies by what comes in."""

    vmap = staticmethod(_refuse_loss_vmap)

    @staticmethod
    @_with_its_signature
    def forward(input, target, weight, options):
        held = _classes_last(target) if target.is_floating_point() else target
        *numbers, dtype = options
        loss, dz = _cross_entropy(_classes_last(input), held, weight,
                                  **dict(zip(_LossOptions._fields, numbers, strict=False)))
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

    jvp = staticmethod(_refuse_loss_jvp)


class _CrossEntropyBackward(torch.autograd.Function):
    """The gradient of the logits, which PyTorch differentiates further by its own formulas."""

    vmap = staticmethod(_refuse_loss_vmap)

    @staticmethod
    @_with_its_signature
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
        options = dict(zip(_LossOptions._fields, numbers, strict=False))
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
                  reduction: str = "mean", label_smoothing: float = 0.0, fallback: bool = False) -> Tensor:
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
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
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
    return function.apply(*given, weight, _LossOptions(ignore_index, reduction, float(label_smoothing), dtype))[0]


def _loss_problem(input: Tensor, target: Tensor, weight: Tensor | None,
                  ignore_index: int) -> DensegradError | TypeError | ValueError | None:
    """Why densegrad cannot compute this loss, if it cannot."""
    if input.dtype not in _DTYPES:
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
        if weight.dtype not in _DTYPES or (weight.dtype == torch.float64 != input.dtype):
            return DTypeError(f"weight must be float16, bfloat16 or float32, or float64 beside float64; got "
                              f"{weight.dtype} beside {input.dtype} (convert it with weight.to(input.dtype))")
        if weight.requires_grad and torch.is_grad_enabled():
            return TypeError("weight requires a gradient, which densegrad has none of (pass weight.detach(), or "
                             "fallback=True for PyTorch's loss)")
    return _unreadable(given)


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
