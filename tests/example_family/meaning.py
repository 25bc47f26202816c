"""The meaning of squared norms, in float64 NumPy, and how far a result may be off."""
import numpy as np

from densegrad.testing import error_bound


def square_norms(x, alpha=1.0):
    """alpha * sum over d of x[..., d]²."""
    return alpha * np.square(x.astype(np.float64)).sum(axis=-1)


def expected(x, chain, result_dtype, alpha=1.0, old=None):
    """(what the function should give, how far it may be off): every term is positive and rounded in a sum only."""
    exact = square_norms(x, alpha)
    magnitude = np.abs(exact)
    if old is not None:
        exact, magnitude = exact + old.astype(np.float64), magnitude + np.abs(old.astype(np.float64))
    return exact, error_bound(magnitude, exact, chain + (old is not None), x.shape[-1], x.dtype.name, result_dtype,
                              alpha=alpha)
