"""The public functions, and how a call of each is described: accept the user's arrays, plan, list the launches."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import compress
from typing import Any, Generic, Literal, SupportsFloat, overload

from typing_extensions import NamedTuple

from . import containers, tuned
from .calls import Recipe, call, is_preparing, recipe_of
from .errors import PlanError, PrepareError, ShapeError
from .families import batch_sum, tiling, upstream
from .families.batch_sum import BatchSumPlan, plan_batch_sum
from .families.common import check_plan
from .families.matmul_hopper import HopperPlan, has_maps
from .families.product import (
    PRODUCT_PLANS,
    ProductPlan,
    bias_rides_along,
    check_known,
    check_precision,
    plan_product,
)
from .families.tiling import Product
from .launches import ALPHA, ONE, Launch, Matrix, Result, scratch
from .operands import (
    WEIGHT_LAYOUTS,
    Inputs,
    Target,
    accept,
    accept_bias_out,
    accept_flag,
    accept_out,
    accept_outs,
    accept_tuple,
    are_names,
    as_names,
    check_apart,
    given,
)
from .output_gradients import accept_activation, parameter_of, stray_slope, upstream_plan
from .slips import answered
from .typing import ActivationName, Array, GradName, Kind, Kind_co, Out, Precision, WeightLayout


class DenseGrads(NamedTuple, Generic[Kind_co]):
    """The gradients of a dense layer; those that were not asked for are None. Also what `out` and `plan` take."""

    dx: Kind_co = None  # type: ignore[assignment]
    dw: Kind_co = None  # type: ignore[assignment]
    db: Kind_co = None  # type: ignore[assignment]

    @property
    def reduction(self) -> Any:
        """Of gradients that are added up over ranks what waits for that, a `densegrad.distributed.Reduction`."""
        return getattr(self, "_reduction", None)


class ReducedGrads(DenseGrads[Any]):
    """DenseGrads of which dw and db are every rank's when `reduction.wait()` has returned, and undefined until then."""

    _reduction: Any


_NO_OUTS: DenseGrads[None] = DenseGrads()


@answered
def bias_grad(dz: Array[Kind], *, batch_axis: int = 0, keepdims: bool = False, compensated: bool = False,
              alpha: SupportsFloat = 1.0, out: Out | None = None, accumulate: bool = False,
              plan: BatchSumPlan | None = None, stream: Any = None) -> Out:
    """Gradient of the loss with respect to a dense layer's bias: the sum over the batch axis.

        db[m] = sum over s of dz[s, m]                      db = dz.sum(axis=0)

    Parameters
    ----------
    dz : array, (..., M) for batch_axis 0 or (M, S) for batch_axis 1, float16 | bfloat16 | float32 | float64
        Gradient with respect to the layer's output. Any strides; copied once if neither axis is contiguous.
    batch_axis : int
        Which axis of dz counts samples: 0, or 1 if dz is handed over transposed.
    keepdims : bool
        Whether db has shape (1, M), as `numpy.sum(dz, axis=0, keepdims=True)` has, instead of (M,).
    compensated : bool
        Whether exactly what the additions of a sum round away is added up beside it, and to it in the end: within 2
        units in the last place of the exact sum, unless that nearly cancels (see Notes). About 7 additions an element
        instead of 1, and no more bytes to read.
    alpha : float, or array of no dimensions on the device
        What the sum is multiplied by, before it is added into `out` or rounded: 1/S of a mean loss, for example. An
        array has the type of the sums and is read by the kernels, never fetched: the gradient of a loss that is further
        scaled, for example.
    out : array, optional
        Where to write db; its dtype may be another one, and is rounded to once. Any strides that keep its elements
        apart, of whole elements and with leading axes that flatten to one; NumPy's arrays beside a GPU may have others.
    accumulate : bool
        Whether to add into `out` instead of overwriting it.
    plan : BatchSumPlan, optional
        How to compute it, compensated or not, instead of what `plans.plan_batch_sum` says, which tells the layouts.
    stream : CuPy stream, Numba stream, int or object with `__cuda_stream__`, optional
        Where to queue the work instead of CuPy's current stream, PyTorch's beside its tensors, or the one that dz's
        `__cuda_array_interface__` names. Nothing is synchronised.

    Returns
    -------
    array, (M,) or (1, M)
        `out` if given, else a new array of the same kind and dtype as dz: of NumPy, CuPy, PyTorch, JAX or Numba. Of
        another library that hands dz over by `__dlpack__` or `__cuda_array_interface__` it is what the `from_dlpack` of
        its `__array_namespace__()` makes of a CuPy array, or that array if it has none; in the simulator a NumPy array.

    Raises
    ------
    ShapeError
        If dz has too few dimensions or `out` another shape.
    DTypeError
        If dz or `out` has another dtype than those above.
    DeviceError
        If there is no GPU and the simulator is off.
    OutError
        If `out` is read-only, overlaps dz, lies elsewhere, or is missing with accumulate=True.
    PlanError
        If `plan` was made for other sizes, or is not compensated though `compensated` is True.
    TypeError, ValueError
        If an argument is no array, batch_axis neither 0 nor 1, or alpha finite but infinite in the type of the sums.

    Notes
    -----
    Sums are kept in float32, in float64 for float64. The order of additions follows from shape, dtype and memory
    layout, so equal inputs give equal bits on every run and on every device. S * M additions; reads S * M elements
    once. An empty batch gives zeros. db is a sum: whoever averages the loss over the batch has 1/S in dz already, or
    passes it as alpha.

    With n the plan's longest chain of additions, u = 2^-24 (2^-53 for float64) and alpha a power of two, the error
    before the result is rounded is at most (n + 1) u sum |dz|, or ((n + 1) u)^2 sum |dz| if compensated.
    Source: Goodfellow, Bengio, Courville, "Deep Learning", 2016, section 6.5; of compensated sums, Ogita, Rump, Oishi,
    "Accurate Sum and Dot Product", SIAM J. Sci. Comput. 26, 2005 (Sum2).

    Examples
    --------
    >>> bias_grad(numpy.array([[1, 2, 3], [10, 20, 30]], dtype="float32"))
    array([11., 22., 33.], dtype=float32)
    >>> bias_grad(numpy.array([[1e8], [1], [-1e8]], dtype="float32"), compensated=True)
    array([1.], dtype=float32)
    """
    return call(_describe_bias, (dz,), (out,), (batch_axis, keepdims, compensated, accumulate, plan), (alpha,),
                stream)[0]


def _describe_bias(arrays: tuple, outs: tuple, options: tuple) -> Recipe:
    batch_axis, keepdims, compensated, accumulate, plan = options
    compensated = accept_flag("compensated", compensated)
    inputs = accept(dz=arrays[0], batch_axis=batch_axis)
    target = accept_bias_out("out", outs[0], inputs, keepdims, accumulate)
    plan = _bias_plan(plan, inputs, compensated)
    return recipe_of(inputs, (inputs.dz,), (target,), batch_sum.launches(plan, inputs.dz.matrix, target.result))


@answered
def weight_grad(x: Array[Kind], dz: Array[Kind], *, batch_axis: int = 0, weight_layout: WeightLayout = "in_out",
                alpha: SupportsFloat = 1.0, precision: Precision | None = None, out: Out | None = None,
                accumulate: bool = False, plan: ProductPlan | None = None, stream: Any = None) -> Out:
    """Gradient of the loss with respect to a dense layer's weights.

        dw[d, m] = sum over s of x[s, d] dz[s, m]           dw = x.T @ dz

    Parameters
    ----------
    x : array, (..., D), float16 | bfloat16 | float32 | float64
        The layer's input. Any strides; copied once if neither axis is contiguous.
    dz : array, (..., M) for batch_axis 0 or (M, S) for batch_axis 1, dtype of x
        Gradient with respect to the layer's output; its batch axes are those of x.
    batch_axis : int
        Which axis of dz counts samples: 0, or 1 if dz is handed over transposed.
    weight_layout : "in_out" or "out_in"
        Whether dw has shape (D, M), or (M, D) as in PyTorch.
    alpha, out, accumulate, stream
        As in `bias_grad`.
    precision : None, "ieee", "tf32" or "tf32x3"
        How products are computed: "ieee" on FMA units, as IEEE 754 says. float16 and bfloat16 go to tensor cores by
        default, where their products are exact. float32 does not: "tf32" rounds it to 11 significant bits there,
        "tf32x3" multiplies two such terms of it, to float32's accuracy. That holds for operands that are 0 or at least
        2^-126 in magnitude ("tf32x3": 2^-114); smaller ones are off by up to 2^-136, below which they count as 0.
        float64 is multiplied and added as IEEE 754 says wherever that is done.
    plan : MatmulPlan, TensorCorePlan, HopperPlan or ThinPlan, optional
        How to compute it, instead of what `plans.plan_product` says.

    Returns
    -------
    array, (D, M) or (M, D)
        `out` if given, else a new array of the same kind and dtype as x.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, OutError, PlanError, TypeError, ValueError
        As in `bias_grad`; ShapeError too if x and dz hold different numbers of samples, PlanError if the precision is
        none of this dtype or GPU.

    Notes
    -----
    Without `precision`, float32 is true float32 and never TF32. Sums are float32, for float64 float64. Equal inputs
    give equal bits on every run; on every GPU, too, except from tensor cores, whose sums are rounded differently by
    each generation (float64's are not). 2 * S * D * M flops. An empty batch gives zeros.
    Source: Goodfellow, Bengio, Courville, "Deep Learning", 2016, section 6.5.

    Examples
    --------
    >>> x = numpy.array([[1, 2], [3, 4]], dtype="float32")
    >>> weight_grad(x, numpy.array([[1], [10]], dtype="float32"))
    array([[31.],
           [42.]], dtype=float32)
    """
    return call(_describe_weight, (x, dz), (out,), (batch_axis, weight_layout, precision, accumulate, plan), (alpha,),
                stream)[0]


def _describe_weight(arrays: tuple, outs: tuple, options: tuple) -> Recipe:
    batch_axis, weight_layout, precision, accumulate, plan = options
    inputs = accept(x=given("x", arrays[0]), dz=arrays[1], batch_axis=batch_axis, weight_layout=weight_layout)
    target = _weight_target("out", outs[0], inputs, weight_layout, accumulate)
    plan = _weight_plan(plan, inputs, inputs.dz.matrix, precision)
    return recipe_of(inputs, (inputs.x, inputs.dz), (target,),
                     _weight_launches(plan, inputs, inputs.dz.matrix, (target, None), weight_layout))


class WeightBiasGrads(NamedTuple, Generic[Kind_co]):
    """The gradients of a dense layer's parameters. Also what `out` takes."""

    dw: Kind_co = None  # type: ignore[assignment]
    db: Kind_co = None  # type: ignore[assignment]


@answered
def weight_bias_grad(x: Array[Kind], dz: Array[Kind], *, batch_axis: int = 0,
                     weight_layout: WeightLayout = "in_out", keepdims: bool = False, alpha: SupportsFloat = 1.0,
                     precision: Precision | None = None, out: WeightBiasGrads[Out | None] | None = None,
                     accumulate: bool | Iterable[Literal["dw", "db"]] = False, plan: ProductPlan | None = None,
                     stream: Any = None) -> WeightBiasGrads[Kind | Out]:
    """Gradients with respect to weights and bias, together: db is added up while dw is multiplied.

        dw = x.T @ dz          db = dz.sum(axis=0)

    Parameters
    ----------
    x, dz, batch_axis, weight_layout, alpha, precision, accumulate, plan, stream
        As in `weight_grad`; alpha scales both. db is summed in float32 whatever the precision. accumulate may name
        "dw" or "db" alone, and each has a dtype of its own in `out`.
    keepdims : bool
        Whether db has shape (1, M) instead of (M,).
    out : WeightBiasGrads of arrays or None, optional
        Where to write each of them.

    Returns
    -------
    WeightBiasGrads
        `(dw, db)`.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, OutError, PlanError, TypeError, ValueError
        As in `weight_grad`, before anything is written.

    Notes
    -----
    db has the same bits on every run, and from FMA units on every device, but not those of `bias_grad`, since its order
    of additions follows the plan of dw. By a MatmulPlan thread row r of R adds the samples r, r + R, ... of each part,
    the R sums are added in ascending order, then the parts; of float64 R is 4, by any plan. By a ThinPlan db is added
    as each row of dw is; by a HopperPlan the tiles that read the same columns of dz share its samples in steps of 64.
    It leaves db of float32 and of a transposed dz to a sum of its own, with the bits of `bias_grad`; so does a ThinPlan
    for at most 8 outputs and over 8 inputs.

    Examples
    --------
    >>> one = numpy.ones((2, 2), dtype="float32")
    >>> weight_bias_grad(one, one).db
    array([2., 2.], dtype=float32)
    """
    outs = accept_tuple("out", out, WeightBiasGrads)
    options = batch_axis, weight_layout, keepdims, precision, as_names(accumulate), plan
    return WeightBiasGrads(*call(_describe_weight_bias, (x, dz), outs, options, (alpha,), stream))


def _describe_weight_bias(arrays: tuple, outs: tuple, options: tuple) -> Recipe:
    batch_axis, weight_layout, keepdims, precision, accumulate, plan = options
    added = accept_outs(WeightBiasGrads(*outs), accumulate)
    inputs = accept(x=given("x", arrays[0]), dz=arrays[1], batch_axis=batch_axis, weight_layout=weight_layout)
    weight = _weight_target("out.dw", outs[0], inputs, weight_layout, "dw" in added)
    bias = accept_bias_out("out.db", outs[1], inputs, keepdims, "db" in added)
    check_apart([weight, bias])
    plan = _weight_plan(plan, inputs, inputs.dz.matrix, precision)
    return recipe_of(inputs, (inputs.x, inputs.dz), (weight, bias),
                     _weight_launches(plan, inputs, inputs.dz.matrix, (weight, bias), weight_layout))


@answered
def input_grad(dz: Array[Kind], w: Array[Kind], *, batch_axis: int = 0, weight_layout: WeightLayout = "in_out",
               alpha: SupportsFloat = 1.0, precision: Precision | None = None, out: Out | None = None,
               accumulate: bool = False, plan: ProductPlan | None = None, stream: Any = None) -> Out:
    """Gradient of the loss with respect to a dense layer's input.

        dx[s, d] = sum over m of dz[s, m] w[d, m]           dx = dz @ w.T

    Parameters
    ----------
    dz : array, (..., M) for batch_axis 0 or (M, S) for batch_axis 1, float16 | bfloat16 | float32 | float64
        Gradient with respect to the layer's output. Any strides; copied once if neither axis is contiguous.
    w : array, (D, M) or (M, D), dtype of dz
        The layer's weights.
    batch_axis : int
        Which axis of dz counts samples: 0, or 1 if dz is handed over transposed.
    weight_layout : "in_out" or "out_in"
        Whether w has shape (D, M), or (M, D) as in PyTorch.
    alpha, precision, out, accumulate, plan, stream
        As in `weight_grad`.

    Returns
    -------
    array, (..., D)
        `out` if given, else a new array of the same kind and dtype as dz. Samples first, whatever batch_axis is.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, OutError, PlanError, TypeError, ValueError
        As in `bias_grad`; ShapeError too if dz and w have different numbers of outputs.

    Notes
    -----
    Precision and reproducibility as in `weight_grad`. 2 * S * D * M flops. No outputs (M = 0) give zeros.
    Source: Goodfellow, Bengio, Courville, "Deep Learning", 2016, section 6.5.

    Examples
    --------
    >>> w = numpy.array([[1, 2], [3, 4]], dtype="float32")
    >>> input_grad(numpy.array([[1, 10]], dtype="float32"), w)
    array([[21., 43.]], dtype=float32)
    """
    return call(_describe_input, (dz, w), (out,), (batch_axis, weight_layout, precision, accumulate, plan), (alpha,),
                stream)[0]


def _describe_input(arrays: tuple, outs: tuple, options: tuple) -> Recipe:
    batch_axis, weight_layout, precision, accumulate, plan = options
    inputs = accept(w=given("w", arrays[1]), dz=arrays[0], batch_axis=batch_axis, weight_layout=weight_layout)
    target = _input_target("out", outs[0], inputs, accumulate)
    plan = _input_plan(plan, inputs, inputs.dz.matrix, precision)
    return recipe_of(inputs, (inputs.dz, inputs.w), (target,), _input_launches(plan, inputs, inputs.dz.matrix, target))


@overload
def dense_grads(x: Array[Kind], w: Array[Kind], dz: Array[Kind], *, activation: ActivationName | None = None,
                z: Array[Any] | None = None, negative_slope: float | None = None,
                sample_weight: Array[Any] | None = None, batch_axis: int = 0,
                weight_layout: WeightLayout = "in_out", keepdims: bool = False, compensated: bool = False,
                alpha: SupportsFloat = 1.0, precision: Precision | None = None,
                out: DenseGrads[Out | None] | None = None, accumulate: bool | Iterable[GradName] = False,
                plan: DenseGrads[Any] | None = None, stream: Any = None,
                comm: Any = None) -> DenseGrads[Kind | Out]: ...


@overload
def dense_grads(x: Array[Kind] | None, w: Array[Kind] | None, dz: Array[Kind], *, need: Iterable[GradName],
                activation: ActivationName | None = None, z: Array[Any] | None = None,
                negative_slope: float | None = None, sample_weight: Array[Any] | None = None, batch_axis: int = 0,
                weight_layout: WeightLayout = "in_out", keepdims: bool = False, compensated: bool = False,
                alpha: SupportsFloat = 1.0, precision: Precision | None = None,
                out: DenseGrads[Out | None] | None = None, accumulate: bool | Iterable[GradName] = False,
                plan: DenseGrads[Any] | None = None, stream: Any = None,
                comm: Any = None) -> DenseGrads[Kind | Out | None]: ...


@answered
def dense_grads(x: Array[Kind] | None, w: Array[Kind] | None, dz: Array[Kind], *,
                need: Iterable[GradName] = ("dx", "dw", "db"), activation: ActivationName | None = None,
                z: Array[Any] | None = None, negative_slope: float | None = None,
                sample_weight: Array[Any] | None = None, batch_axis: int = 0,
                weight_layout: WeightLayout = "in_out", keepdims: bool = False, compensated: bool = False,
                alpha: SupportsFloat = 1.0, precision: Precision | None = None,
                out: DenseGrads[Out | None] | None = None, accumulate: bool | Iterable[GradName] = False,
                plan: DenseGrads[Any] | None = None, stream: Any = None,
                comm: Any = None) -> DenseGrads[Kind | Out | None]:
    """All gradients of a dense layer z = x @ w + b, or with an activation a = f(x @ w + b).

        dx = dz @ w.T          dw = x.T @ dz          db = dz.sum(axis=0)

    Parameters
    ----------
    x : array, (..., D), float16 | bfloat16 | float32 | float64
        The layer's input; may be None if dw is not needed.
    w : array, (D, M) or (M, D), dtype of x
        The layer's weights; may be None if dx is not needed.
    dz : array, (..., M) for batch_axis 0 or (M, S) for batch_axis 1, dtype of x
        Gradient with respect to the layer's output: to z, or to a = f(z) with an activation.
    need : names among "dx", "dw", "db"
        Which gradients to compute.
    activation, z, negative_slope, sample_weight
        As in `activation_grad`, with dz for da, and its activations: "relu", "relu6", "leaky_relu", "elu", "selu",
        "sigmoid", "tanh", "softplus", "silu", "hardswish", "mish", "gelu", "gelu_tanh" and "identity". The gradient
        below the activation, weighted, is formed in one pass over memory while db is summed, and goes into dx and dw.
        Samples that a mask leaves out have a gradient of zero; for dw their rows of x must be finite.
    batch_axis, weight_layout, keepdims, alpha, precision, stream
        As in `bias_grad` and `weight_grad`; alpha scales all three, and never the dz that is formed below an activation
        or with weights.
    compensated : bool
        Whether db is a compensated sum, as in `bias_grad`. It reads dz, or what is formed below an activation, once
        more.
    out : DenseGrads of arrays or None, optional
        Where to write each of them, for example `DenseGrads(dw=main_grad)`; none that is not needed.
    accumulate : bool or names among "dx", "dw", "db"
        Which of the gradients are added into `out`, which must then hold them: none, all that are needed, or those
        that are named. The others are overwritten, and each may have a dtype of its own.
    plan : DenseGrads of plans or None, optional
        How to compute each of them; below an activation or with weights db takes an UpstreamPlan, that of forming dz.
    comm : communicator or Ranks, optional
        Over what dw and db are added up, as `densegrad.distributed.all_reduce` takes it: started before dx is launched,
        and under way when this returns. dx stays this rank's. They cannot be added into `out` then.

    Returns
    -------
    DenseGrads
        `(dx, dw, db)`, each as its own function returns it. With `comm` its `reduction` says whether dw and db are
        `done`, and has `wait()`, before which they are undefined.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, OutError, PlanError, TypeError, ValueError
        As in `bias_grad` and `activation_grad`, before anything is written.
    DistributedError
        With `comm`, where `reduction` is waited for.

    Notes
    -----
    db rides along with dw as in `weight_bias_grad`, with its bits, where the model of the plans says that this is
    cheaper and no plan for db is given. Below an activation, or with weights, it has those of `activation_grad`, and if
    compensated those of `bias_grad` of the dz that `activation_grad` gives.

    Examples
    --------
    >>> one = numpy.ones((2, 2), dtype="float32")
    >>> dense_grads(one, one, one).db
    array([2., 2.], dtype=float32)
    """
    needed = as_names(need)
    names = needed if isinstance(needed, tuple) else ()
    arrays = x if "dw" in names else None, w if "dx" in names else None, dz, z, sample_weight
    options = (needed, activation, stray_slope(activation, negative_slope), batch_axis, weight_layout, keepdims,
               compensated, precision, as_names(accumulate), plan)
    outs = _NO_OUTS if out is None else accept_tuple("out", out, DenseGrads)
    numbers = alpha, parameter_of(negative_slope)
    if comm is not None:
        return _over_ranks(comm, arrays, outs, options, numbers, stream)
    return DenseGrads._make(call(describe_dense, arrays, outs, options, numbers, stream))


def _over_ranks(comm: Any, arrays: tuple, outs: tuple, options: tuple, numbers: tuple, stream: Any) -> DenseGrads:
    """dense_grads in two calls: of dw and db, whose reduction is started, then of dx.

    Below an activation the first keeps the dz that it forms for the second. The launches are those of one call.
    """
    from .distributed import all_reduce, telling_ranks

    need, activation, slope, batch_axis, weight_layout, *others, precision, accumulate, plan = options
    x, w, dz, z, sample_weight = arrays
    with telling_ranks(comm):
        if is_preparing():
            raise PrepareError("dense_grads(..., comm=) cannot be prepared, since it waits for other ranks (prepare it "
                               "without comm, and reduce with densegrad.distributed.all_reduce)")
        if containers.kind_of(dz).handed_over:
            raise TypeError(f"dense_grads(..., comm=) writes into dw and db again, and arrays of "
                            f"{containers.kind_of(dz).name} are not written (leave comm out, and pass what it returns "
                            "to densegrad.distributed.all_reduce)")
        describe_dense(arrays, outs, options)  # what is wrong with dx is found before anything is sent
        parameters = tuple(name for name in ("dw", "db") if name in need)
        if not parameters:
            raise ValueError('need must name "dw" or "db" with comm=, which adds them up over ranks; got '
                             f"{need!r} (leave comm out)")
        added = DenseGrads._fields if accumulate is True else accumulate or ()
        if not set(added).isdisjoint(parameters):
            raise ValueError(f"accumulate={accumulate!r} adds before the ranks' sum, which would count what out holds "
                             "once a rank (leave out.dw and out.db to be overwritten, and add them afterwards)")
        plans = accept_tuple("plan", plan, DenseGrads)
        forms = "dx" in need and (activation is not None or sample_weight is not None)
        of_parameters = (parameters, activation, slope, batch_axis, weight_layout, *others, precision, (),
                         plans._replace(dx=None))
        _, dw, db, formed = call(_describe_parameters, (x if "dw" in need else None, None, dz, z, sample_weight),
                                 (None, *outs[1:], None), (forms, *of_parameters), numbers, stream)
        summed: Any = DenseGrads(None, dw, db)
        reduction = all_reduce(summed, comm, out=summed, async_op=True, stream=stream)
    dx = None
    if "dx" in need:
        dx = input_grad(formed if forms else dz, w, batch_axis=0 if forms else batch_axis, weight_layout=weight_layout,
                        alpha=numbers[0], precision=precision, out=outs[0], accumulate="dx" in added, plan=plans.dx,
                        stream=stream)
    grads = ReducedGrads(dx, dw, db)
    grads._reduction = reduction
    return grads


def _describe_parameters(arrays: tuple, outs: tuple, options: tuple) -> Recipe:
    """dw and db, and a new array of the dz that they are made of if one is formed and asked for."""
    forms, *others = options
    return describe_dense(arrays, outs, tuple(others), forms)


def grads_of_layer(arrays: tuple[Any, ...], need: tuple[bool, ...], activation: ActivationName | None,
                   negative_slope: float | None) -> list[Any]:
    """dx, dw and db as dense_grads gives them of (x, w, dz, z, None) with weights (M, D).

    need says which of the three are made; x and w may be None where none needs them.
    """
    return call(_layer(need, activation), arrays, _NO_OUTS, (), (1.0, parameter_of(negative_slope)))


@lru_cache(maxsize=256)
def _layer(need: tuple[bool, ...], activation: ActivationName | None) -> Callable[..., Recipe]:
    """What describes the calls of such a layer: made once, so that later ones are told apart by it alone."""
    needed = tuple(compress(DenseGrads._fields, need))
    options = needed, activation, None, 0, "out_in", False, False, None, False, None
    return lambda arrays, outs, _: describe_dense(arrays, outs, options)


def describe_dense(arrays: tuple, outs: tuple, options: tuple, keeps_dz: bool = False) -> Recipe:
    """What dense_grads does with (x, w, dz, z, sample_weight); it checks all that is no number."""
    need, activation, stray, batch_axis, weight_layout, keepdims, compensated, precision, accumulate, plan = options
    x, w, dz, z, sample_weight = arrays
    needed = _needed(need, x, w)
    compensated = accept_flag("compensated", compensated)
    if compensated and "db" not in needed:
        raise ValueError("compensated is about db, which is not needed (name it in need=, or leave compensated out)")
    added = accept_outs(DenseGrads(*outs[:3]), accumulate, needed)
    plans = accept_tuple("plan", plan, DenseGrads)
    # Below an activation the plan for db forms dz, which all of them are made of.
    planned = needed | {"db"} if activation or sample_weight is not None else needed
    for field, one in zip(DenseGrads._fields, plans, strict=True):
        if one is not None and field not in planned:
            raise PlanError(f"plan.{field} was given, but {field} is not needed (name it in need=, or leave it out)")
    check_known(precision)
    inputs = accept(x=x, w=w, dz=dz, batch_axis=batch_axis, weight_layout=weight_layout)
    layer_above = accept_activation(inputs, (activation, stray), z, batch_axis, sample_weight)
    inputs = replace(inputs, beside=layer_above.arguments)
    dx = _input_target("out.dx", outs[0], inputs, "dx" in added) if "dx" in needed else None
    dw = _weight_target("out.dw", outs[1], inputs, weight_layout, "dw" in added) if "dw" in needed else None
    db = accept_bias_out("out.db", outs[2], inputs, keepdims, "db" in added) if "db" in needed else None
    formed: Target | None = None

    check_apart([target for target in (dx, dw, db) if target is not None])
    launches: tuple[Launch, ...] = ()
    gradient, behind, with_weight, alone, bias_plan = inputs.dz.matrix, 0, None, db, plans.db
    if layer_above.arguments:
        # dZ is formed first, in the order of what it is formed from; its sum is db, unless that is to be compensated.
        gradient = _like(gradient)
        behind, alone, bias_plan = gradient.end, db if compensated else None, None
        if keeps_dz:
            formed = Target("formed", (*inputs.batch_shape, inputs.out_features), inputs.dtype, None, False,
                            gradient.row_stride == 1 and gradient.col_stride != 1)
            gradient, behind = formed.matrix, 0
        result = Result(scratch(behind, 1, inputs.out_features, inputs.dtype))
        if db is not None and not compensated:
            result = db.result
        form = upstream_plan(plans.db, inputs, layer_above.name, "plan.db")
        launches = upstream.launches(form, layer_above.matrices(inputs), gradient, result, (ONE, ALPHA),
                                     max(behind, result.matrix.end))
    weight_plan = _weight_plan(plans.dw, inputs, gradient, precision, "plan.dw") if dw is not None else None
    if (alone is not None and weight_plan is not None and bias_plan is None and not compensated
            and bias_rides_along(weight_plan)):
        with_weight, alone = alone, None
    if dx is not None:
        input_plan = _input_plan(plans.dx, inputs, gradient, precision, "plan.dx")
        launches += _input_launches(input_plan, inputs, gradient, dx, behind)
    if dw is not None and weight_plan is not None:
        launches += _weight_launches(weight_plan, inputs, gradient, (dw, with_weight), weight_layout, behind)
    if alone is not None:
        bias_plan = _bias_plan(bias_plan, inputs, compensated, "plan.db")
        launches += batch_sum.launches(bias_plan, gradient, alone.result, ALPHA, behind)
    return recipe_of(inputs, (inputs.x, inputs.w, inputs.dz, layer_above.z, layer_above.weights),
                     (dx, dw, db, formed), launches, (layer_above.parameter,))


def _like(matrix: Matrix) -> Matrix:
    """A new matrix at the front of the workspace, in the memory order of this one."""
    if matrix.row_stride == 1 and (matrix.col_stride != 1 or matrix.cols == 1):
        return scratch(0, matrix.cols, matrix.rows, matrix.dtype).T
    return scratch(0, matrix.rows, matrix.cols, matrix.dtype)


def _needed(need: Any, x: Any, w: Any) -> set[str]:
    if not isinstance(need, tuple) or not need or not are_names(need, DenseGrads._fields):
        raise ValueError(f'need must name some of "dx", "dw" and "db"; got {need!r}')
    needed = set(need)
    for name, gradient, array in (("x", "dw", x), ("w", "dx", w)):
        if array is None and gradient in needed:
            raise TypeError(f"{name} must be an array, since {gradient} is needed; got None (leave {gradient} out of "
                            "need=)")
    return needed


def _bias_plan(plan: BatchSumPlan | None, inputs: Inputs, compensated: bool = False,
               name: str = "plan") -> BatchSumPlan:
    sizes: dict[str, Any] = {"samples": inputs.samples, "outputs": inputs.out_features, "dtype": inputs.dtype,
                             "layout": inputs.dz.layout}
    if (isinstance(plan, BatchSumPlan) and inputs.dz.layout == "flat"
            and (plan.layout == "rows" or inputs.out_features == 1)):
        # Rows without gaps are rows all the same, and one output's samples lie side by side.
        sizes["layout"] = plan.layout
    plan = check_plan(plan, BatchSumPlan, sizes, name)
    if plan is None:
        return tuned.instead_of(plan_batch_sum(**sizes, compensated=compensated), inputs.device, inputs.place)
    if compensated and not plan.compensated:
        raise PlanError(f"{name} is not compensated, but compensated=True asks for that (leave one out, or pass "
                        f"dataclasses.replace({name}, compensated=True))")
    return plan


def _weight_target(name: str, out: Any, inputs: Inputs, weight_layout: str, accumulate: bool) -> Target:
    shape = inputs.in_features, inputs.out_features
    if weight_layout == "out_in":
        shape = shape[::-1]
    try:
        return accept_out(name, out, inputs, shape, accumulate)
    except ShapeError as error:
        if getattr(out, "shape", None) != shape[::-1]:
            raise
        other = WEIGHT_LAYOUTS[weight_layout == "in_out"]
        raise ShapeError(f'{error}; did you mean weight_layout="{other}", or x and dz swapped?') from None


def _weight_plan(plan: ProductPlan | None, inputs: Inputs, dz: Matrix, precision: str | None,
                 name: str = "plan") -> ProductPlan:
    return _product_plan(plan, _weight_product(inputs, dz), inputs, precision, name)


def _weight_product(inputs: Inputs, dz: Matrix) -> Product:
    if inputs.x is None:
        raise TypeError("dw is the product of x and dz; got no x")
    return Product(inputs.x.matrix.T, dz)


def _product_plan(plan: ProductPlan | None, product: Product, inputs: Inputs, precision: str | None,
                  name: str) -> ProductPlan:
    capability, (left, right) = inputs.device.capability(inputs.place), (product.left, product.right)
    sizes: dict[str, Any] = {"rows": left.rows, "cols": right.cols, "depth": right.rows, "dtype": inputs.dtype}
    plan = check_plan(plan, PRODUCT_PLANS, sizes, name)
    if plan is None:
        aligned = has_maps(product, precision)
        plan = plan_product(**sizes, precision=precision, capability=capability, order=product.order, aligned=aligned)
        tuned_plan = tuned.instead_of(plan, inputs.device, inputs.place, product.order)
        return plan if isinstance(tuned_plan, HopperPlan) and not aligned else tuned_plan
    if inputs.device.kind == "simulator":  # which has the instructions of every GPU
        capability = getattr(plan, "capability", capability)
    check_precision(plan, precision, capability)
    return plan


def _weight_launches(plan: ProductPlan, inputs: Inputs, dz: Matrix, targets: tuple[Target, Target | None],
                     weight_layout: str, behind: int = 0) -> tuple[Launch, ...]:
    """dW and, where it rides along, db; their parts are kept in the workspace from the byte behind on."""
    weight, bias = targets
    if bias is not None and not (inputs.in_features and inputs.samples
                                 and plan.sums_ride(_weight_product(inputs, dz))):
        # No tiles that db could ride along with, or the kernel adds none of dz's up.
        return (*_weight_launches(plan, inputs, dz, (weight, None), weight_layout, behind),
                *batch_sum.launches(_bias_plan(None, inputs), dz, bias.result, ALPHA, behind))
    dw = weight.matrix if weight_layout == "in_out" else weight.matrix.T
    return tiling.launches(plan, _weight_product(inputs, dz), Result(dw, weight.accumulate),
                           None if bias is None else bias.result, behind)


def _input_target(name: str, out: Any, inputs: Inputs, accumulate: bool) -> Target:
    return accept_out(name, out, inputs, (*inputs.batch_shape, inputs.in_features), accumulate)


def _input_plan(plan: ProductPlan | None, inputs: Inputs, dz: Matrix, precision: str | None,
                name: str = "plan") -> ProductPlan:
    return _product_plan(plan, _input_product(inputs, dz), inputs, precision, name)


def _input_product(inputs: Inputs, dz: Matrix) -> Product:
    if inputs.w is None:
        raise TypeError("dx is the product of dz and w; got no w")
    return Product(dz, inputs.w.matrix.T)


def _input_launches(plan: ProductPlan, inputs: Inputs, dz: Matrix, target: Target,
                    behind: int = 0) -> tuple[Launch, ...]:
    return tiling.launches(plan, _input_product(inputs, dz), target.result, None, behind)
