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


def cross_entropy_grad(z, labels, *, ignore_index=-100, label_smoothing=0.0, sample_weight=None, batch_axis=0,
                       alpha=1.0):
    """(dz, db): dz[s, m] = alpha sample_weight[s] (softmax(z[s])[m] - target[s, m]), and its sum over s."""
    z, labels = _as_matrix(z, batch_axis), np.asarray(labels).reshape(-1)
    outputs, kept = z.shape[1], labels != ignore_index
    shifted = np.exp(z - z.max(axis=1, keepdims=True, initial=-np.inf))
    target = np.full(z.shape, label_smoothing / max(outputs, 1))
    target[kept, np.clip(labels[kept], 0, outputs - 1)] += 1 - label_smoothing
    target[kept & ((labels < 0) | (labels >= outputs))] = np.nan
    dz = shifted / shifted.sum(axis=1, keepdims=True) - target
    return _weighted(dz, sample_weight, alpha, batch_axis, kept)


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
