"""The meaning of every function, in float64 NumPy."""
import numpy as np


def bias_grad(dz, *, batch_axis=0, keepdims=False):
    """db[m] = sum over s of dz[s, m]."""
    return _upstream(dz, batch_axis).sum(axis=0, keepdims=keepdims)


def weight_grad(x, dz, *, batch_axis=0, weight_layout="in_out"):
    """dw[d, m] = sum over s of x[s, d] dz[s, m]."""
    dw = _samples_first(x).T @ _upstream(dz, batch_axis)
    return dw if weight_layout == "in_out" else dw.T


def input_grad(dz, w, *, batch_axis=0, weight_layout="in_out"):
    """dx[s, d] = sum over m of dz[s, m] w[d, m]."""
    w = np.asarray(w, np.float64)
    dx = _upstream(dz, batch_axis) @ (w.T if weight_layout == "in_out" else w)
    return dx if batch_axis else dx.reshape(*np.shape(dz)[:-1], dx.shape[1])


def _samples_first(array):
    array = np.asarray(array, np.float64)
    return array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])


def _upstream(dz, batch_axis):
    return np.asarray(dz, np.float64).T if batch_axis else _samples_first(dz)
