"""The meaning of every function, in float64 NumPy."""
import numpy as np

from .activations import ENTRIES


def bias_grad(dz, *, batch_axis=0, keepdims=False):
    """db[m] = sum over s of dz[s, m]."""
    return _as_matrix(dz, batch_axis).sum(axis=0, keepdims=keepdims)


def weight_grad(x, dz, *, batch_axis=0, weight_layout="in_out"):
    """dw[d, m] = sum over s of x[s, d] dz[s, m]."""
    dw = _samples_first(x).T @ _as_matrix(dz, batch_axis)
    return dw if weight_layout == "in_out" else dw.T


def input_grad(dz, w, *, batch_axis=0, weight_layout="in_out"):
    """dx[s, d] = sum over m of dz[s, m] w[d, m]."""
    w = np.asarray(w, np.float64)
    dx = _as_matrix(dz, batch_axis) @ (w.T if weight_layout == "in_out" else w)
    return dx if batch_axis else dx.reshape(*np.shape(dz)[:-1], dx.shape[1])


def _samples_first(array):
    array = np.asarray(array, np.float64)
    return array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])


def _as_matrix(dz, batch_axis):
    return np.asarray(dz, np.float64).T if batch_axis else _samples_first(dz)


def activation_grad(da, z=None, activation=None, *, sample_weight=None, negative_slope=0.01, batch_axis=0, alpha=1.0):
    """(dz, db): dz[s, m] = alpha sample_weight[s] da[s, m] f'(z[s, m]), and its sum over s."""
    da = _as_matrix(da, batch_axis)
    if activation not in (None, "identity"):
        da = ENTRIES[activation].reference(np, da, _as_matrix(z, batch_axis), negative_slope)
    return _weighted(da, sample_weight, alpha, batch_axis)


def cross_entropy(z, labels, *, class_weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean",
                  sample_weight=None, batch_axis=0, alpha=1.0):
    """(loss, dz, db) of the samples' losses, their sum or mean; labels are classes or their probabilities."""
    z, labels = _as_matrix(z, batch_axis), np.asarray(labels)
    q, kept = targets(z.shape, labels, class_weight, ignore_index, label_smoothing, batch_axis)
    highest = z.max(axis=1, keepdims=True, initial=-np.inf)
    shifted = np.exp(z - highest)
    total = shifted.sum(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        loss = np.where(q == 0, 0, q * (np.log(total) + (highest - z))).sum(axis=1)
    weigh = {"sample_weight": sample_weight, "kept": kept}
    losses, summed = _weighted(loss[:, None], alpha=1.0, batch_axis=0, **weigh)
    share = 1.0
    if reduction == "mean":
        share = np.divide(1.0, divisor(z.shape, labels, class_weight, ignore_index, sample_weight))
    dz, db = _weighted(shifted / total * q.sum(axis=1, keepdims=True) - q, alpha=alpha * share, batch_axis=batch_axis,
                       **weigh)
    return (losses[:, 0] if reduction == "none" else summed[0] * share), dz, db


def cross_entropy_grad(z, labels, *, reduction="sum", **options):
    """(dz, db) of cross_entropy."""
    return cross_entropy(z, labels, reduction=reduction, **options)[1:]


def targets(shape, labels, class_weight=None, ignore_index=-100, label_smoothing=0.0, batch_axis=0):
    """(q, kept): what softmax of a matrix (samples, outputs) is held against, and the samples that count."""
    samples, outputs = shape
    if labels.dtype.kind not in "iu":
        target, kept = _as_matrix(labels, batch_axis), np.ones(samples, bool)
    else:
        labels = labels.reshape(-1)
        kept = labels != ignore_index
        target = np.zeros(shape)
        target[kept, np.clip(labels[kept], 0, outputs - 1)] = 1
        target[kept & ((labels < 0) | (labels >= outputs))] = np.nan
    q = (1 - label_smoothing) * target + label_smoothing / max(outputs, 1)
    return (q if class_weight is None else q * np.asarray(class_weight, np.float64)), kept


def divisor(shape, labels, class_weight=None, ignore_index=-100, sample_weight=None):
    """What the mean of so many (samples, outputs) is divided by; a label that is no class weighs nothing."""
    samples, outputs = shape
    weights, kept = np.ones(samples), np.ones(samples, bool)
    if labels.dtype.kind in "iu":
        labels = labels.reshape(-1)
        kept = (labels != ignore_index) & (labels >= 0) & (labels < outputs)
        if class_weight is not None:
            weights[kept] = np.asarray(class_weight, np.float64)[labels[kept]]
    return _weighted(weights[:, None], sample_weight, 1.0, 0, kept)[1][0]


def derivative(activation, z, parameter=0.01):
    """f'(z) of an activation; its limits at infinity."""
    return ENTRIES[activation].reference(np, np.ones(np.shape(z)), z, parameter)


def _weighted(dz, sample_weight, alpha, batch_axis, kept=True):
    if sample_weight is not None:
        weight = np.asarray(sample_weight).reshape(-1)
        if weight.dtype == bool:
            kept = kept & weight
        else:
            dz = dz * weight[:, None].astype(np.float64)
    dz = np.where(np.broadcast_to(kept, len(dz))[:, None], alpha * dz, 0.0)
    return (dz.T if batch_axis else dz), dz.sum(axis=0)
