"""The public function that forms dL/dZ below an activation, and sums dL/db in the same pass over memory."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, SupportsFloat

from typing_extensions import NamedTuple

from .activations import ACTIVATIONS, ENTRIES, NEGATIVE_SLOPE
from .calls import Recipe, call, recipe_of
from .errors import PlanError
from .families.batch_sum import BatchSumPlan
from .families.common import check_plan
from .families.upstream import Upstream, UpstreamPlan, launches, plan_upstream
from .launches import ALPHA, ONE
from .operands import (
    Argument,
    Inputs,
    accept,
    accept_beside,
    accept_bias_out,
    accept_dz_out,
    accept_outs,
    accept_sample_weight,
    accept_tuple,
    as_names,
    check_apart,
)
from .slips import answered, meant
from .typing import ActivationName, Array, Kind, Kind_co, Out


class OutputGrads(NamedTuple, Generic[Kind_co]):
    """The gradients of a layer's output before its activation, and of its bias. Also what `out` takes."""

    dz: Kind_co = None  # type: ignore[assignment]
    db: Kind_co = None  # type: ignore[assignment]


@dataclass(frozen=True)
class UpstreamArguments:
    """What lies above a layer, checked: an activation, and the weights of the samples."""

    name: str
    z: Argument | None = None
    weights: Argument | None = None

    @property
    def parameter(self) -> tuple[str, str]:
        """The slot of an activation's parameter and what users call it: nothing where it means nothing."""
        return "parameter", "negative_slope" if self.name == "leaky_relu" else ""

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The arrays that it reads beside the gradient."""
        return tuple(argument for argument in (self.z, self.weights) if argument is not None)

    def matrices(self, inputs: Inputs) -> Upstream:
        """What dz is formed from."""
        z, weights = (None if argument is None else argument.matrix for argument in (self.z, self.weights))
        return Upstream(inputs.dz.matrix, z, weights)


def parameter_of(negative_slope: float | None) -> float:
    """The derivative of "leaky_relu" where z <= 0."""
    return NEGATIVE_SLOPE.default if negative_slope is None else negative_slope


def stray_slope(activation: Any, negative_slope: Any) -> Any:
    """A slope that was given beside another activation than "leaky_relu", which is a mistake; else None."""
    entry = ENTRIES.get(activation) if isinstance(activation, str) else None
    return None if entry is not None and entry.parameter == NEGATIVE_SLOPE else negative_slope


def accept_activation(inputs: Inputs, activation: tuple[Any, Any], z: Any, batch_axis: int,
                      sample_weight: Any) -> UpstreamArguments:
    """Check an activation's name and arrays against the gradient above it; (name, stray slope).

    Raises
    ------
    ShapeError, DTypeError, DeviceError, TypeError, ValueError
        Naming the argument, what was expected, what came and the cure.
    """
    given, stray = activation
    name = "identity" if given is None else given
    if not isinstance(name, str) or name not in ACTIVATIONS:
        got = repr(name) if isinstance(name, str) else type(name).__name__
        cure = " (pass a name; in activation_grad the order is da, z, activation)" * (not isinstance(name, str))
        got += meant(name, ACTIVATIONS) or cure
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, or None; got {got}")
    if z is None and name != "identity":
        raise TypeError(f"activation={name!r} needs z, what it was applied to; got None (pass z=, the layer's output)")
    if isinstance(z, str):
        raise TypeError(f"z must be an array, what the activation was applied to; got {z!r} (pass z=, and "
                        f"activation={z!r} if that is meant)")
    if z is not None and given is None:
        raise TypeError(f"z is of no use without an activation; got {type(z).__name__} (name the activation, or leave "
                        "z out)")
    if stray is not None:
        raise TypeError(f'negative_slope is the derivative of "leaky_relu" alone; got {stray!r} with '
                        f"activation={given!r} (leave it out)")
    beside = None if z is None else accept_beside("z", z, inputs, batch_axis)
    return UpstreamArguments(name, None if name == "identity" else beside,
                 None if sample_weight is None else accept_sample_weight(sample_weight, inputs))


def upstream_plan(plan: UpstreamPlan | None, inputs: Inputs, above: str, name: str = "plan") -> UpstreamPlan:
    """The plan that a user passed, checked, or the one for these inputs and what lies above them.

    Raises
    ------
    PlanError, TypeError
        If it was made for other sizes or something else above, or is no plan of forming dz.
    """
    usual = plan_upstream(inputs.samples, inputs.out_features, inputs.dtype, inputs.dz.layout, above)
    if plan is None:
        return usual
    if isinstance(plan, BatchSumPlan):
        raise TypeError(f"{name} must be an UpstreamPlan, which says what dz is formed from; got BatchSumPlan (make "
                        "one with densegrad.plans.plan_upstream)")
    check_plan(plan, UpstreamPlan, {}, name)
    if plan.above != above:
        raise PlanError(f"{name} forms dz below {plan.above}, but it is {above} that lies above (make one for "
                        f'that, for example with dataclasses.replace(plan, above="{above}"))')
    sizes = {name: getattr(usual.sum, name) for name in ("samples", "outputs", "dtype", "layout")}
    check_plan(plan.sum, BatchSumPlan, sizes, f"{name}.sum")
    return plan


@answered
def activation_grad(da: Array[Kind], z: Array[Any] | None = None, activation: ActivationName | None = None, *,
                    sample_weight: Array[Any] | None = None, negative_slope: float | None = None,
                    batch_axis: int = 0, keepdims: bool = False, alpha: SupportsFloat = 1.0,
                    out: OutputGrads[Out | None] | None = None, accumulate: bool | Literal["db"] = False,
                    plan: UpstreamPlan | None = None, stream: Any = None) -> OutputGrads[Kind | Out]:
    """Gradients of the loss below an activation a = f(z), and of the bias, in one pass over memory.

        dz[s, m] = alpha sample_weight[s] da[s, m] f'(z[s, m])          db[m] = sum over s of dz[s, m]

    Parameters
    ----------
    da : array, (..., M) for batch_axis 0 or (M, S) for batch_axis 1, float16 | bfloat16 | float32 | float64
        Gradient with respect to the activation's output. Any strides; copied once if neither axis is contiguous.
    z : array, shape and dtype of da
        What the activation was applied to: the layer's output. Left out where there is no activation; not read by
        "identity".
    activation : str or None
        f: "relu", "relu6", "leaky_relu", "elu", "selu", "sigmoid", "tanh", "softplus", "silu", "hardswish", "mish",
        "gelu", "gelu_tanh" or "identity". "gelu" is the exact one, by the error function; "gelu_tanh" its approximation
        by a hyperbolic tangent. "elu" has alpha 1, "softplus" beta 1 and threshold 20, as PyTorch's defaults.
    sample_weight : array, the shape of the batch: (...), or (S,) for batch_axis 1; bool or a float type, optional
        What each sample's gradients are multiplied by. A boolean mask instead chooses samples: those with False,
        padding for example, contribute exactly nothing and their dz is zero, even if they hold NaN. float64 only beside
        float64.
    negative_slope : float, optional
        The derivative of "leaky_relu" where z <= 0, 0.01 if left out; an error beside other activations.
    batch_axis : int
        Which axis of da and z counts samples: 0, or 1 if they are handed over transposed.
    keepdims : bool
        Whether db has shape (1, M) instead of (M,).
    alpha : float, or array of no dimensions on the device
        What dz is multiplied by besides: 1/S of a mean loss, for example; see `bias_grad`. dz is rounded to its dtype
        with alpha in it, so that a small alpha loses what float16 has no room for: scale the loss up against that, and
        the sums down. `dense_grads` scales its sums only.
    out : OutputGrads of arrays or None, optional
        Where to write dz and db, each as in `bias_grad`. `out.dz` has the dtype of da, and may be da or z itself.
    accumulate : bool or "db"
        Whether db is added into `out.db`; dz is overwritten always.
    plan : UpstreamPlan, optional
        How to cut the work, instead of what `plans.plan_upstream` says.
    stream : CuPy stream, Numba stream, int or object with `__cuda_stream__`, optional
        Where to queue the work instead of CuPy's current stream, or PyTorch's beside its tensors. Nothing is
        synchronised.

    Returns
    -------
    OutputGrads
        `(dz, db)`: dz with the shape and dtype of da, db (M,) or (1, M).

    Raises
    ------
    ShapeError, DTypeError, DeviceError, OutError, PlanError, TypeError, ValueError
        Naming the argument, what was expected, what came and the cure, before anything is written.

    Notes
    -----
    Computed in float32, in float64 for float64, and rounded once; db is the sum of dz as it is stored, with the bits
    that `bias_grad(dz, plan=plan.sum)` has. Each element of da and z is read once and each of dz written once. Equal
    inputs give equal bits on every run; on different devices too for identity, relu, relu6 and leaky_relu, while the
    others may differ in their last bits between the simulator and GPUs. Where a derivative jumps, it is PyTorch's: 0 at
    0 for relu, at 0 and 6 for relu6, at -3 for hardswish. Where z is NaN, relu, relu6, hardswish and elu pass da on,
    leaky_relu and selu scale it, as PyTorch's do on GPUs, and the others give NaN. Where z is infinite, all give their
    limit. A new dz is in C order, or features first where da is; z or `out.dz` in another order are touched element by
    element.
    Source: Goodfellow, Bengio, Courville, "Deep Learning", 2016, section 6.5; Hendrycks, Gimpel, "Gaussian Error Linear
    Units", 2016.

    Examples
    --------
    >>> z = numpy.array([[-1, 2], [3, 4]], dtype="float32")
    >>> activation_grad(numpy.ones((2, 2), dtype="float32"), z, "relu").db
    array([1., 2.], dtype=float32)
    """
    options = activation, stray_slope(activation, negative_slope), batch_axis, keepdims, as_names(accumulate), plan
    outs = accept_tuple("out", out, OutputGrads)
    return OutputGrads(*call(_describe_activation, (da, z, sample_weight), outs, options,
                             (alpha, parameter_of(negative_slope)), stream))


def _describe_activation(arrays: tuple, outs: tuple, options: tuple) -> Recipe:
    activation, stray, batch_axis, *rest = options
    da, z, sample_weight = arrays
    inputs = accept(dz=da, batch_axis=batch_axis, name="da")
    layer_above = accept_activation(inputs, (activation, stray), z, batch_axis, sample_weight)
    recipe = _describe(inputs, layer_above, outs, (batch_axis, *rest), (layer_above.parameter,))
    return replace(recipe, in_place=((0, 0), (0, 1)))


def _describe(inputs: Inputs, layer_above: UpstreamArguments, outs: tuple, options: tuple, numbers: tuple) -> Recipe:
    batch_axis, keepdims, accumulate, plan = options
    added = accept_outs(OutputGrads(*outs), accumulate, added=("db",))
    inputs = replace(inputs, beside=layer_above.arguments)
    dz = accept_dz_out("out.dz", outs[0], inputs, batch_axis, (inputs.dz, layer_above.z))
    db = accept_bias_out("out.db", outs[1], inputs, keepdims, "db" in added)
    check_apart([dz, db])
    plan = upstream_plan(plan, inputs, layer_above.name)
    matrix = dz.matrix.T if batch_axis else dz.matrix
    return recipe_of(inputs, (inputs.dz, layer_above.z, layer_above.weights), (dz, db),
                     launches(plan, layer_above.matrices(inputs), matrix, db.result, (ALPHA, ONE)), numbers)
