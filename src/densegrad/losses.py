"""The public functions of softmax cross-entropy: its loss, dL/dZ and dL/db, from one reading of the logits."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, SupportsFloat

from typing_extensions import NamedTuple

from .calls import Recipe, call, recipe_of
from .errors import DTypeError, PlanError, ShapeError
from .families.common import check_plan
from .families.cross_entropy import CrossEntropyPlan, launches, plan_cross_entropy
from .families.upstream import CROSS_ENTROPY, Upstream, UpstreamPlan, plan_upstream
from .launches import Matrix
from .operands import (
    Argument,
    Inputs,
    accept,
    accept_bias_out,
    accept_class_weight,
    accept_dz_out,
    accept_labels,
    accept_loss_out,
    accept_number,
    accept_outs,
    accept_sample_weight,
    accept_tuple,
    as_names,
    check_apart,
    check_label_values,
)
from .output_gradients import OutputGrads, upstream_plan
from .slips import answered, meant
from .typing import Array, Kind, Kind_co, Out, Reduction

#: how the samples' losses become one, or stay what they are
REDUCTIONS = ("mean", "sum", "none")
#: the label that is ignored unless another one is named, as in PyTorch
IGNORED = -100


class LossGrads(NamedTuple, Generic[Kind_co]):
    """A loss, and its gradients with respect to a layer's output and its bias. Also what `out` takes."""

    loss: Kind_co = None  # type: ignore[assignment]
    dz: Kind_co = None  # type: ignore[assignment]
    db: Kind_co = None  # type: ignore[assignment]


@answered
def cross_entropy(z: Array[Kind], labels: Array[Any], *, class_weight: Array[Any] | None = None,
                  ignore_index: int = IGNORED, label_smoothing: float = 0.0, reduction: Reduction = "mean",
                  sample_weight: Array[Any] | None = None, batch_axis: int = 0, keepdims: bool = False,
                  alpha: SupportsFloat = 1.0, out: LossGrads[Out | None] | None = None,
                  accumulate: bool | Literal["db"] = False, plan: CrossEntropyPlan | UpstreamPlan | None = None,
                  stream: Any = None) -> LossGrads[Kind | Out]:
    """Softmax cross-entropy and its gradients with respect to a layer's output, the logits, and its bias.

        loss[s]  = sample_weight[s] sum over m of q[s, m] (log(sum over k of exp(z[s, k])) - z[s, m])
        q[s, m]  = class_weight[m] ((1 - label_smoothing) target[s, m] + label_smoothing / M)
        dz[s, m] = alpha / divisor sample_weight[s] (softmax(z[s])[m] (sum over k of q[s, k]) - q[s, m])
        db[m]    = sum over s of dz[s, m]

    target[s, m] is 1 where m is labels[s], else 0; or labels[s, m], a probability.

    Parameters
    ----------
    z : array, (..., M) for batch_axis 0 or (M, S) for batch_axis 1, float16 | bfloat16 | float32 | float64
        The logits, classes last. Any strides; copied once if neither axis is contiguous. PyTorch's order for more than
        one batch axis, (N, C, d), is read as classes last too where C == d: pass `numpy.moveaxis(z, 1, -1)`, a view.
    labels : array, the shape of the batch: (...), or (S,) for batch_axis 1; int32 | int64
        The class of each sample, from 0 to M - 1; or class probabilities, an array of the shape and dtype of z. A row
        of these is taken as it is: it need not add up to 1. They are read twice, the second time from a cache where
        the logits are read once.
    class_weight : array, (M,), float16 | bfloat16 | float32, or float64 beside float64; optional
        What each class's target is multiplied by.
    ignore_index : int
        A label whose samples contribute exactly nothing: their loss and dz are zero, whatever z holds. Not for
        probabilities.
    label_smoothing : float, 0 to 1
        How much of the target is spread evenly over all classes.
    reduction : "mean", "sum" or "none"
        The loss is the mean of the samples' losses, weighted as the losses are: divided by the sum of class_weight and
        sample_weight of the samples that count, by their number without weights. Of probabilities class weights do not
        enter the divisor, as in PyTorch. Or the sum of the losses; or each of them, and dz is that of their sum.
    sample_weight, batch_axis, keepdims, accumulate, stream
        As in `activation_grad`. The loss is overwritten always.
    alpha : float, or array of no dimensions on the device
        What dz and db are multiplied by, and the loss is not: the gradient of what is made of the loss. dz is rounded
        to its dtype with alpha in it, as in `activation_grad`.
    out : LossGrads of arrays or None, optional
        Where to write the results. `out.loss` has the type of the sums, float32, or float64 of float64; `out.dz` may be
        z itself.
    plan : CrossEntropyPlan or UpstreamPlan, optional
        How to cut the work, instead of what `plans.plan_cross_entropy` says.

    Returns
    -------
    LossGrads
        `(loss, dz, db)`: the loss in the type of the sums, of no dimensions, or with reduction "none" of the shape of
        the batch; dz with the shape and dtype of z; db (M,) or (1, M).

    Raises
    ------
    ShapeError, DTypeError, DeviceError, OutError, PlanError, TypeError, ValueError
        As in `activation_grad`; ValueError too for NumPy labels that are no class. To check labels on a GPU would take
        waiting for it: there a sample whose label is no class gets NaN.

    Notes
    -----
    Where a row of logits fits into a block's registers, 65,536 bytes, and lies in one piece, as that of dz and of
    probabilities, the logits are read once. Wider rows, and samples that lie side by side, are read twice. `plan` says
    which, and `densegrad.plans.plan_cross_entropy(...).explain()` why. Nothing is fetched to the host: the divisor of a
    mean is found on the device. If no sample counts, the mean is NaN, and all of dz is zero, as in PyTorch. A target of
    zero loses nothing where a logit is minus infinity; PyTorch's loss of probabilities is NaN there.
    Precision and reproducibility as in `activation_grad`: equal inputs of one layout, alignment included, give equal
    bits on every run, and the same dz and db with and without a loss.
    Source: Goodfellow, Bengio, Courville, "Deep Learning", 2016, section 6.2.2.3; Szegedy et al., "Rethinking the
    Inception Architecture for Computer Vision", 2016, section 7.

    Examples
    --------
    Labels, and the three reductions:

    >>> z, labels = numpy.zeros((3, 2), dtype="float32"), numpy.array([0, 1, -100])
    >>> loss, dz, db = cross_entropy(z, labels)
    >>> print(loss, dz[0])
    0.6931472 [-0.25  0.25]
    >>> loss, dz, db = cross_entropy(z, labels, reduction="sum")
    >>> print(loss, dz[0])
    1.3862944 [-0.5  0.5]
    >>> print(cross_entropy(z, labels, reduction="none").loss)
    [0.6931472 0.6931472 0.       ]

    Probabilities:

    >>> print(cross_entropy(z[:1], numpy.array([[0.25, 0.75]], dtype="float32")).dz)
    [[ 0.25 -0.25]]

    Class weights, of which the mean is divided by those of the labels that count:

    >>> print(cross_entropy(z, labels, class_weight=numpy.array([3, 1], dtype="float32")).db)
    [-0.25  0.25]
    """
    return LossGrads(*_call((z, labels, sample_weight, class_weight), accept_tuple("out", out, LossGrads),
                            (True, reduction, batch_axis, keepdims, as_names(accumulate), plan),
                            (alpha, label_smoothing, ignore_index), stream))


@answered
def cross_entropy_grad(z: Array[Kind], labels: Array[Any], *, class_weight: Array[Any] | None = None,
                       ignore_index: int = IGNORED, label_smoothing: float = 0.0, reduction: Reduction = "sum",
                       sample_weight: Array[Any] | None = None, batch_axis: int = 0, keepdims: bool = False,
                       alpha: SupportsFloat = 1.0, out: OutputGrads[Out | None] | None = None,
                       accumulate: bool | Literal["db"] = False, plan: CrossEntropyPlan | UpstreamPlan | None = None,
                       stream: Any = None) -> OutputGrads[Kind | Out]:
    """Gradients of softmax cross-entropy with respect to a layer's output, the logits, and its bias.

    `cross_entropy` without the loss, and with the same bits.

    Parameters
    ----------
    z, labels, class_weight, ignore_index, label_smoothing, sample_weight, batch_axis, keepdims
        As in `cross_entropy`.
    reduction : "sum", "mean" or "none"
        What the gradients are of: the sum of the losses, or their mean; "none" means the sum.
    alpha, accumulate, plan, stream
        As in `cross_entropy`.
    out : OutputGrads of arrays or None, optional
        Where to write dz and db; `out.dz` may be z itself.

    Returns
    -------
    OutputGrads
        `(dz, db)`: dz with the shape and dtype of z, db (M,) or (1, M).

    Raises
    ------
    ShapeError, DTypeError, DeviceError, OutError, PlanError, TypeError, ValueError
        As in `cross_entropy`.

    Examples
    --------
    >>> cross_entropy_grad(numpy.zeros((1, 4), dtype="float32"), numpy.array([2])).dz
    array([[ 0.25,  0.25, -0.75,  0.25]], dtype=float32)

    The sum of the samples' losses, and their mean:

    >>> z, labels = numpy.zeros((3, 2), dtype="float32"), numpy.array([0, 1, -100])
    >>> cross_entropy_grad(z, labels).dz[0]
    array([-0.5,  0.5], dtype=float32)
    >>> cross_entropy_grad(z, labels, reduction="mean").dz[0]
    array([-0.25,  0.25], dtype=float32)
    """
    outs = accept_tuple("out", out, OutputGrads)
    return OutputGrads(*_call((z, labels, sample_weight, class_weight), (None, *outs),
                              (False, reduction, batch_axis, keepdims, as_names(accumulate), plan),
                              (alpha, label_smoothing, ignore_index), stream)[1:])


def _call(arrays: tuple, outs: tuple, options: tuple, numbers: tuple, stream: Any) -> list[Any]:
    alpha, smoothing, ignored = numbers
    return call(_describe, arrays, tuple(outs), options, (alpha, _accept_smoothing(smoothing), ignored), stream)


def _accept_smoothing(label_smoothing: Any) -> float:
    smoothing = accept_number("label_smoothing", label_smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1; got {label_smoothing}")
    return smoothing


@dataclass(frozen=True)
class _Held:
    """What softmax is held against, checked."""

    labels: Argument  # or class probabilities
    weights: Argument | None
    class_weights: Argument | None

    @property
    def probabilities(self) -> Matrix | None:
        """The class probabilities, if that is what the labels are."""
        return self.labels.matrix if self.labels.dtype not in ("int32", "int64") else None

    def matrices(self, z: Matrix, reduction: str, loss: Matrix | None) -> Upstream:
        """What dz is formed from."""
        weights, classes = (None if one is None else one.matrix for one in (self.weights, self.class_weights))
        probabilities = self.probabilities
        return Upstream(None, z, weights, None if probabilities else self.labels.matrix, probabilities=probabilities,
                        class_weights=classes, reduction=reduction, loss=loss)


def _describe(arrays: tuple, outs: tuple, options: tuple) -> Recipe:
    with_loss, reduction, batch_axis, keepdims, accumulate, plan = options
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}"
                         f"{meant(reduction, REDUCTIONS)}")
    z, labels, sample_weight, class_weight = arrays
    try:
        inputs = accept(dz=z, batch_axis=batch_axis, name="z")
    except (DTypeError, ShapeError) as error:
        shape = getattr(labels, "shape", ())
        if len(shape) < 2 or getattr(z, "shape", None) != (shape[1:] if batch_axis else shape[:-1]):
            raise
        raise type(error)(f"{error} (z and labels fit if they are swapped)") from None
    if with_loss and not inputs.out_features:
        raise ShapeError(f"z must have one class at least, to have a loss; got shape {inputs.dz.memory.shape} (pass "
                         "logits with classes, or take cross_entropy_grad)")
    held = _Held(accept_labels(labels, inputs, batch_axis),
                 None if sample_weight is None else accept_sample_weight(sample_weight, inputs),
                 None if class_weight is None else accept_class_weight(class_weight, inputs))
    beside = held.labels, held.weights, held.class_weights
    added = accept_outs(LossGrads(*outs) if with_loss else OutputGrads(*outs[1:]), accumulate, added=("db",))
    inputs = replace(inputs, beside=tuple(one for one in beside if one is not None))
    dz = accept_dz_out("out.dz", outs[1], inputs, batch_axis, (inputs.dz,))
    db = accept_bias_out("out.db", outs[2], inputs, keepdims, "db" in added)
    loss = accept_loss_out("out.loss", outs[0], inputs,
                           inputs.batch_shape if reduction == "none" else ()) if with_loss else None
    check_apart([one for one in (loss, dz, db) if one is not None])
    matrix = dz.matrix.T if batch_axis else dz.matrix
    upstream = held.matrices(inputs.dz.matrix, reduction, None if loss is None else loss.matrix)
    recipe = recipe_of(inputs, (inputs.dz, *beside), (loss, dz, db),
                       launches(_plan(plan, inputs, matrix, held.probabilities), upstream, matrix, db.result),
                       (("parameter", "label_smoothing"), ("ignored", "ignore_index")))
    classes, of_labels = inputs.out_features, held.probabilities is None

    def check_values(arrays: tuple, numbers: tuple) -> None:
        _accept_smoothing(numbers[1])
        if of_labels:
            check_label_values(arrays[1], classes, numbers[2], arrays[2])
        elif numbers[2] != IGNORED:
            raise ValueError(f"ignore_index is a label, and labels are probabilities here; got {numbers[2]} (leave out "
                             "samples by sample_weight, a mask)")

    return replace(recipe, in_place=((1, 0),), check_values=check_values)


def _plan(plan: Any, inputs: Inputs, dz: Matrix, probabilities: Matrix | None) -> CrossEntropyPlan | UpstreamPlan:
    """The plan that a user passed, checked, or the one for these inputs."""
    samples, outputs, dtype, layout = inputs.samples, inputs.out_features, inputs.dtype, inputs.dz.layout
    rows = all(matrix is None or matrix.col_stride == 1 for matrix in (inputs.dz.matrix, dz, probabilities))
    if plan is None:
        return plan_cross_entropy(samples, outputs, dtype, layout) if rows else (
            plan_upstream(samples, outputs, dtype, layout, CROSS_ENTROPY))
    check_plan(plan, (CrossEntropyPlan, UpstreamPlan), {})
    if isinstance(plan, UpstreamPlan):
        return upstream_plan(plan, inputs, CROSS_ENTROPY)
    if not rows:
        raise PlanError("plan: a CrossEntropyPlan needs z, dz and probabilities whose rows lie in one piece each (pass "
                        "arrays in C order, or a plan of densegrad.plans.plan_upstream)")
    return check_plan(plan, CrossEntropyPlan, {"samples": samples, "outputs": outputs, "dtype": dtype})
