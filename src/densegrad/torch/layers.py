"""Linear layers of PyTorch whose backward is densegrad's: `linear`, `Linear`, and `convert` for models that exist.

    forward          z = x Wᵀ + b, a = f(z)     PyTorch's
    backward         dx, dw, db                 one call of dense_grads, behind an operator of PyTorch
    double backward                             PyTorch's

The operators have no gradient of their own. `_Linear` calls one in its backward, through `_Backward` where that is
differentiated in turn: so autograd, torch.func and torch.compile all find what they look for.
"""
from __future__ import annotations

from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..activations import ACTIVATIONS, NEGATIVE_SLOPE
from ..errors import DensegradError, DTypeError, ShapeError
from ..gradients import DenseGrads, dense_grads, grads_of_layer
from ..operands import accept_tuple
from ..slips import meant
from ..typing import ActivationName
from .common import DTYPES, check_tensors, no_memory, operator, refusing, unreadable, with_its_signature

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


class MainGrads(NamedTuple):
    """Where gradients are added: tensors with the shapes of weight and bias, or None for what requires no gradient."""

    weight: Tensor | None = None
    bias: Tensor | None = None


def _linear_backward_on_device(da, x, weight, z, *how):
    """Those of the gradients dx, dw and db that are needed, in this order."""
    activation, negative_slope, need = how
    if da.dim() > 1:
        arrays = x if need[1] else None, weight if need[0] else None, da, z, None
        grads = grads_of_layer(arrays, tuple(need), activation, negative_slope)
    else:
        grads = _dense_grads(da, x, weight, z, activation=activation, negative_slope=negative_slope,
                             need=compress(DenseGrads._fields, need))
    return list(compress(grads, need))


def _linear_backward_into_on_device(da, x, weight, z, *how):
    """dw and db added into these; dx, or a tensor of no elements where it is not needed."""
    dw, db, activation, negative_slope, need_dx = how
    into = {name: out for name, out in (("dw", dw), ("db", db)) if out is not None}
    dx = _dense_grads(da, x, weight, z, activation=activation, negative_slope=negative_slope,
                      need=(*["dx"] * need_dx, *into), out=DenseGrads(**into), accumulate=tuple(into)).dx
    torch.autograd.graph.increment_version(list(into.values()))
    return da.new_empty(0) if dx is None else dx


def _dense_grads(da, x, weight, z, **options):
    """Those of a layer of PyTorch, or of one sample without a batch axis."""
    if da.dim() > 1:
        return dense_grads(x, weight, da, z=z, weight_layout="out_in", **options)
    x, z = (None if one is None else one[None] for one in (x, z))
    grads = _dense_grads(da[None], x, weight, z, **options)
    return grads if grads.dx is None else grads._replace(dx=grads.dx[0])


def _linear_backward_of_shapes(da, x, weight, z, *how):
    *_, need = how
    return [da.new_empty(shape()) for shape in compress((
        lambda: (*da.shape[:-1], weight.shape[1]), lambda: (da.shape[-1], x.shape[-1]), lambda: da.shape[-1:]), need)]


def _linear_backward_into_of_shapes(da, x, weight, z, *how):
    *_, need_dx = how
    return da.new_empty((*da.shape[:-1], weight.shape[1]) if need_dx else 0)


_linear_backward = operator(
    "linear_backward", "(Tensor da, Tensor? x, Tensor? weight, Tensor? z, str? activation, float? negative_slope, "
    "bool[3] need) -> Tensor[]", _linear_backward_on_device, _linear_backward_of_shapes)
_linear_backward_into = operator(
    "linear_backward_into", "(Tensor da, Tensor? x, Tensor? weight, Tensor? z, Tensor(a!)? dw, Tensor(b!)? db, "
    "str? activation, float? negative_slope, bool need_dx) -> Tensor", _linear_backward_into_on_device,
    _linear_backward_into_of_shapes)


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


_REFUSED = refusing("linear", "pass the batch axes in x: all axes but the last are samples")


class _Linear(torch.autograd.Function):
    """PyTorch's forward with densegrad's backward: a, and the z that an activation was applied to."""

    vmap = _REFUSED.vmap

    @staticmethod
    @with_its_signature
    def forward(x, weight, bias, options, into_weight, into_bias):
        z = functional.linear(x, weight, bias)
        return z if options.activation is None else (_activated(z, options), z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.options, ctx.into_weight, ctx.into_bias = inputs
        ctx.set_materialize_grads(False)
        if ctx.options.activation is None:  # dx is made of the weight, dw of x, and none of the bias
            of_x, of_weight, *_ = ctx.needs_input_grad
            ctx.save_for_backward(x if of_weight else None, weight if of_x else None, None, None)
        else:
            _, z = output
            ctx.mark_non_differentiable(z)
            ctx.save_for_backward(x, weight, bias, z)

    @staticmethod
    def backward(ctx, da, *_):
        if da is None:
            return (None,) * 6
        x, weight, bias, z = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if ctx.into_weight is not None or ctx.into_bias is not None:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise NotImplementedError("gradients that are added into main gradients cannot be differentiated again "
                                          "(call backward without create_graph=True)")
            if not torch.compiler.is_compiling():
                needed = [one and _goes_on(ctx, number) for number, one in enumerate(needed[:3])]
            how = (ctx.into_weight if needed[1] else None, ctx.into_bias if needed[2] else None, *ctx.options,
                   needed[0])
            dx = _linear_backward_into(da, x, weight, z, *how)
            return dx if needed[0] else None, *[None] * 5
        need = needed[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _Backward.apply(da, x, weight, bias, z, (ctx.options, need))
        else:
            grads = _linear_backward(da, x, weight, z, *ctx.options, need)
        found = iter(grads)
        return *[next(found) if wanted else None for wanted in need], *[None] * 3


def _goes_on(ctx: Any, number: int) -> bool:
    """Whether the backward that runs goes on to this input: autograd.grad may ask for others alone."""
    node = ctx.next_functions[number][0]
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # what autograd.grad asks for itself
        return True


class _RefusingJvp(_Linear):
    """The same outside of torch.compile, which traces no Function that says what its forward mode is."""

    jvp = _REFUSED.jvp


class _Backward(torch.autograd.Function):
    """The gradients that are needed, which PyTorch differentiates further by its own formulas."""

    vmap = _REFUSED.vmap

    @staticmethod
    @with_its_signature
    def forward(da, x, weight, bias, z, how):
        options, need = how
        return tuple(_linear_backward(da, x, weight, z, *options, need))

    @staticmethod
    def setup_context(ctx, inputs, output):
        da, x, weight, bias, _, ctx.how = inputs
        ctx.save_for_backward(da, x, weight, bias)

    @staticmethod
    def backward(ctx, *cotangents):
        da, *operands = ctx.saved_tensors
        options, need = ctx.how
        inputs = next((one.shape[-1] for one in operands[:2] if one is not None), 0)
        # Nothing that is needed depends on what was not saved; of these the shapes are enough.
        shapes = (*da.shape[:-1], inputs), (da.shape[-1], inputs), da.shape[-1:]
        given = [da.new_zeros(()).expand(shape) if one is None else one
                 for one, shape in zip(operands, shapes, strict=True)]

        def gradients(da, *operands):
            _, back = torch.func.vjp(lambda *given: _activated(functional.linear(*given), options), *operands)
            return list(compress(back(da), need))

        _, back = torch.func.vjp(gradients, da, *given)
        of_da, *below = back(list(cotangents))
        return of_da, *[None if one is None else found for one, found in zip(operands, below, strict=True)], None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: ActivationName | None = None,
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
        reduces `.grad` alone: `reduce_main_grads` is for that. What requires no gradient gets none, and may be None
        here.
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
    check_tensors(x=x, weight=weight, bias=bias)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, or None; got {activation!r}"
                         f"{meant(activation, ACTIVATIONS)}")
    if negative_slope is not None and activation != "leaky_relu":
        raise TypeError(f'negative_slope is the derivative of "leaky_relu" alone; got {negative_slope!r} with '
                        f"activation={activation!r} (leave it out)")
    options = _Options(None if activation == "identity" else activation, negative_slope)
    problem = _problem(x, weight, bias)
    if problem is not None:
        if not fallback or into is not None:
            raise problem
        return _activated(functional.linear(x, weight, bias), options)
    into = accept_tuple("into", into, MainGrads)
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
        if tensor.dtype not in DTYPES:
            return DTypeError(f"{name} must be float16, bfloat16, float32 or float64; got {tensor.dtype} (convert it "
                              "with float(), or pass fallback=True for PyTorch's backward)")
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return ShapeError(f"weight must have 2 dimensions (out_features, in_features), and bias (out_features,); got "
                          f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}")
    return unreadable(given)


def _check_into(into: MainGrads, weight: Tensor, bias: Tensor | None) -> None:
    """Hold main gradients to the parameters that they are of."""
    if into.weight is None and into.bias is None:
        return
    check_tensors(**{f"into.{name}": main for name, main in into._asdict().items()})
    for name, main, parameter in (("weight", into.weight, weight), ("bias", into.bias, bias)):
        if main is None:
            if parameter is not None and parameter.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"into.{name} is missing, and {name} requires a gradient (pass a tensor for it, or "
                                 f"{name}.detach())")
            continue
        if parameter is None:
            raise ShapeError(f"into.{name} was given, but there is no {name} (leave it out)")
        wide = _wide(parameter)
        if main.shape != parameter.shape:
            raise ShapeError(f"into.{name} must have the shape of {name}, {tuple(parameter.shape)}; got "
                             f"{tuple(main.shape)}")
        if main.dtype != wide or main.device != parameter.device:
            raise DTypeError(f"into.{name} must be {wide} on {parameter.device}; got {main.dtype} on {main.device}")
        reason = no_memory(main, (main.device.type,))
        if reason:
            raise TypeError(f"into.{name} is no tensor that kernels can use: {reason}")
    # set by DistributedDataParallel for as long as its forward runs
    if getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None:
        raise NotImplementedError("DistributedDataParallel reduces .grad alone, and main gradients would stay those of "
                                  "one process (leave DistributedDataParallel out, and call "
                                  "densegrad.torch.reduce_main_grads(model) after backward, or leave main_grad and "
                                  "into out)")


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
        """Main gradients follow their parameters to another device, and are float64 where these are."""
        super()._apply(fn, recurse)
        for parameter in (self.weight, self.bias):
            main = getattr(parameter, "main_grad", None)
            if main is not None:
                parameter.main_grad = None if main.is_meta else main.to(parameter.device, _wide(parameter))
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
        if not parameter.is_leaf:
            raise NotImplementedError("main gradients are those of parameters, and what is computed from parameters, "
                                      "by pruning or spectral_norm for example, passes none on to them (leave "
                                      "main_grad out of this layer)")
        with torch.inference_mode(False):  # for the training that follows, too
            main = parameter.main_grad = torch.zeros_like(parameter, dtype=_wide(parameter), requires_grad=False)
    return main


def _wide(parameter: Tensor) -> torch.dtype:
    """Of its main gradient."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


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
        elif module.weight.dtype not in DTYPES and not fallback:
            left[name] = f"its weight is {module.weight.dtype}"
        elif main_grad and not all(isinstance(one, torch.nn.Parameter | None) for one in (module.weight, module.bias)):
            left[name] = "its weight or bias is computed from parameters, which would get no main gradient"
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
