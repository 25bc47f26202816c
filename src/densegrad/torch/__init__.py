"""densegrad in PyTorch: linear layers whose backward it is, and cross-entropy with its gradient."""
try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("densegrad.torch needs PyTorch, 2.6 or newer (pip install 'torch>=2.6')",
                              name="torch") from error

from .layers import Converted, Linear, MainGrads, convert, linear
from .loss import cross_entropy
from .main_grads import reduce_main_grads

__all__ = ["Converted", "Linear", "MainGrads", "convert", "cross_entropy", "linear", "reduce_main_grads"]
