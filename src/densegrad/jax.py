"""densegrad in JAX: a dense layer whose backward it is.

    forward     z = x w + b, a = f(z)     JAX's
    backward    dx, dw, db                one call of dense_grads: on the CPU in a pure callback, on GPUs in a callback
                                          that reads and writes XLA's own buffers, on its stream

Every shape and dtype is known while JAX traces, and checked then.
"""
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

try:
    import jax
    from jax.experimental.buffer_callback import buffer_callback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("densegrad.jax needs JAX, 0.6.1 or newer (pip install 'jax>=0.6.1')",
                              name=error.name) from error

import jax.numpy as jnp

from . import containers, device
from .activations import ACTIVATIONS, NEGATIVE_SLOPE
from .errors import DeviceError, DTypeError, ShapeError
from .facts import accumulator_of
from .gradients import DenseGrads, dense_grads
from .operands import DTYPES, accept_number
from .slips import answered, meant
from .typing import ActivationName, GradName

__all__ = ["dense"]

#: JAX's functions, by the names that activations have here
_FORWARD = {
    "identity": lambda z: z,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "hardswish": jax.nn.hard_swish,
    "mish": jax.nn.mish,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class _Options(NamedTuple):
    """The activation above a layer."""

    activation: ActivationName | None
    negative_slope: float | None


class _Saved(NamedTuple):
    """What the backward reads: z is None without an activation; needed has the names of the gradients as its keys."""

    x: Any
    w: Any
    z: Any
    needed: dict[GradName, None]


@answered
def dense(x: jax.Array, w: jax.Array, b: jax.Array | None = None, *, activation: ActivationName | None = None,
          negative_slope: float | None = None) -> jax.Array:
    """A dense layer with JAX's forward and densegrad's backward, and an activation if one is named.

        z = x @ w + b          a = f(z)

    Parameters
    ----------
    x : array, (..., D), float16 | bfloat16 | float32 | float64
        The layer's input.
    w : array, (D, M), dtype of x
        The layer's weights.
    b : array, (M,), dtype of x, optional
        The layer's bias.
    activation, negative_slope
        As in `densegrad.dense_grads`: the gradient below it, and the bias's, are made in one pass over memory. A slope
        is a number, not an array.

    Returns
    -------
    array, (..., M)
        z, or a with an activation.

    Raises
    ------
    ShapeError, DTypeError, TypeError, ValueError
        While JAX traces, naming the argument, what was expected, what came and the cure.
    NotImplementedError
        Where gradients are differentiated again.
    DeviceError
        Where the backward is compiled for arrays that are spread over several devices; under jit it comes as a
        JaxRuntimeError with that in its text.

    Notes
    -----
    The bits of the forward are JAX's. Those of the backward are `densegrad.dense_grads`'s, the same on every run. Works
    under jit, grad, value_and_grad, checkpoint; under vmap each sample is a call of its own, so pass the batch axes in
    x instead. Has no forward-mode derivatives: JAX says so. On the CPU Numba's simulator runs it. On GPUs it
    stands on `jax.experimental.buffer_callback`, which JAX may change, and was not yet run there.

    Examples
    --------
    >>> x, w, b = jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.zeros(4)
    >>> print(jax.grad(lambda b: dense(x, w, b, activation="relu").sum())(b))
    [2. 2. 2. 2.]
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, or None; got {activation!r}"
                         f"{meant(activation, ACTIVATIONS)}")
    if negative_slope is not None and activation != "leaky_relu":
        raise TypeError(f'negative_slope is the derivative of "leaky_relu" alone; got {negative_slope!r} with '
                        f"activation={activation!r} (leave it out)")
    x, w, b = (_array(name, one) for name, one in (("x", x), ("w", w), ("b", b)))
    _check(x, w, b)
    if negative_slope is not None:
        negative_slope = accept_number("negative_slope", negative_slope, accumulator_of(x.dtype.name))
    options = _Options(None if activation == "identity" else activation, negative_slope)
    a = _dense(options, x[None] if x.ndim == 1 else x, w, b)
    return a[0] if x.ndim == 1 else a


def _array(name: str, array: Any) -> Any:
    """The array as one of JAX, as its own functions take NumPy's; b may be None."""
    if array is None and name == "b":
        return None
    kind = containers.kind_of(array)
    if kind.name not in ("JAX", "NumPy"):
        raise TypeError(f"{name} must be an array of JAX or NumPy; got {type(array).__name__} (pass "
                        "jax.numpy.asarray(...) of it)")
    if array.dtype.name not in DTYPES:
        raise DTypeError(f"{name} must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}; got {array.dtype} (convert it with "
                         f"{name}.astype('float32'))")
    if array.dtype != jax.dtypes.canonicalize_dtype(array.dtype):
        raise DTypeError(f"{name} is {array.dtype}, which JAX would round (convert it with {name}.astype('float32'), "
                         'or have JAX take it: jax.config.update("jax_enable_x64", True))')
    return jnp.asarray(array)


def _check(x: Any, w: Any, b: Any) -> None:
    if not x.ndim:
        raise ShapeError("x must have at least 1 dimension, in_features; got shape ()")
    if w.ndim != 2 or w.shape[0] != x.shape[-1]:
        turned = w.ndim == 2 and w.shape[1] == x.shape[-1]
        raise ShapeError(f"w must have shape ({x.shape[-1]}, out_features), as x has shape {x.shape}; got {w.shape}"
                         + "; w.T would fit: did you mean that?" * turned)
    if b is not None and b.shape != w.shape[1:]:
        raise ShapeError(f"b must have shape {w.shape[1:]}, as w has shape {w.shape}; got {b.shape}")
    for name, array in (("w", w), ("b", b)):
        if array is not None and array.dtype != x.dtype:
            raise DTypeError(f"{name} and x must have the same dtype; {name} is {array.dtype} and x is {x.dtype} "
                             "(convert one of them with astype)")


def _forward(options: _Options, x: Any, w: Any, b: Any) -> tuple[Any, Any]:
    """z and a."""
    z = jnp.matmul(x, w) if b is None else jnp.matmul(x, w) + b
    activation, slope = options
    if activation is None:
        return z, z
    if activation == "leaky_relu":
        return z, jax.nn.leaky_relu(z, NEGATIVE_SLOPE.default if slope is None else slope)
    return z, _FORWARD[activation](z)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(options: _Options, x: Any, w: Any, b: Any) -> Any:
    return _forward(options, x, w, b)[1]


def _dense_forward(options: _Options, x: Any, w: Any, b: Any) -> tuple[Any, _Saved]:
    given: dict[GradName, Any] = {"dx": x, "dw": w, "db": b}
    needed: dict[GradName, None] = {name: None for name, one in given.items() if one is not None and one.perturbed}
    x, w, b = (None if one is None else one.value for one in given.values())
    z, a = _forward(options, x, w, b)
    return a, _Saved(x, w, None if options.activation is None else z, needed)


def _dense_backward(options: _Options, saved: _Saved, da: Any) -> tuple[Any, Any, Any]:
    x, w, z, needed = saved
    if not needed or isinstance(da, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    names: tuple[GradName, ...] = ("dx", "dw", "db")
    need = tuple(name for name in names if name in needed)  # JAX sorts the keys of a dict
    found = dict(zip(need, _gradients(_How(options, need), da, x, w, z), strict=True))
    return found.get("dx"), found.get("dw"), found.get("db")


_dense.defvjp(_dense_forward, _dense_backward, symbolic_zeros=True)


class _How(NamedTuple):
    """What a call of dense_grads is told beside its arrays."""

    options: _Options
    need: tuple[GradName, ...]

    def __call__(self, arrays: list[Any], out: DenseGrads | None = None, stream: Any = None) -> DenseGrads:
        da, x, w, z = arrays
        activation, negative_slope = self.options
        return dense_grads(x, w, da, need=self.need, activation=activation, z=z, negative_slope=negative_slope, out=out,
                           stream=stream)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(how: _How, da: Any, x: Any, w: Any, z: Any) -> tuple[Any, ...]:
    """The gradients that are needed, in their order."""
    for array in (da, x, w):  # where they lie is known at once, or where jit compiles
        jax.debug.inspect_array_sharding(array, callback=_refuse_several)
    shapes = {"dx": x.shape, "dw": w.shape, "db": da.shape[-1:]}
    results = tuple(jax.ShapeDtypeStruct(shapes[name], x.dtype) for name in how.need)
    return jax.lax.platform_dependent(
        da, x, w, z,
        cpu=lambda *arrays: jax.pure_callback(partial(_on_host, how), results, *arrays, vmap_method="sequential"),
        cuda=lambda *arrays: _by_buffers(how, results, *arrays))


@_gradients.defjvp
def _refuse_jvp(how: _How, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError("gradients of densegrad.jax.dense cannot be differentiated again (write the layer in "
                              "jax.numpy where second derivatives are taken)")


def _on_host(how: _How, *arrays: Any) -> tuple[Any, ...]:
    """The gradients, as NumPy arrays."""
    found = how([_opened(array, None) for array in arrays])
    return tuple(grad for grad in found if grad is not None)


def _by_buffers(how: _How, results: tuple[Any, ...], *arrays: Any) -> tuple[Any, ...]:
    """The gradients, written into buffers that XLA has for them."""
    return buffer_callback(partial(_into_buffers, how), results, vmap_method="sequential")(*arrays)


def _into_buffers(how: _How, context: Any, out: tuple[Any, ...], *arrays: Any) -> None:
    """Queue the launches that write them on XLA's stream, which keeps its buffers until they are done."""
    stream = context.stream
    outs = DenseGrads(**{name: _opened(buffer, stream) for name, buffer in zip(how.need, out, strict=True)})
    how([_opened(array, stream) for array in arrays], outs, stream)


def _opened(array: Any, stream: Any) -> Any:
    """The device's own array over the memory of one of JAX, or of a buffer of XLA's."""
    if array is None:
        return None
    taken = device.current().taken_over(array, stream)
    if isinstance(taken, containers.Guest) and taken.problem:
        raise DeviceError(f"an array of JAX cannot be read: {taken.problem}")
    return containers.opened(taken)


def _refuse_several(sharding: Any) -> None:
    if len(sharding.device_set) > 1:
        raise DeviceError(f"densegrad.jax.dense has gradients of arrays on one device alone; got one with {sharding} "
                          "(move it with jax.device_put, or write the layer in jax.numpy there)")
