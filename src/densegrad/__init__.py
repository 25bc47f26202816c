"""densegrad: the gradients of a dense layer Z = X W + b, as Numba CUDA kernels.

dL/db is the sum of dL/dZ over the batch axis, dL/dW = Xᵀ dL/dZ and dL/dX = dL/dZ Wᵀ.
"""
from .errors import (
    DensegradError,
    DeviceError,
    DTypeError,
    OutDeviceError,
    OutError,
    PlanError,
    PrepareError,
    ShapeError,
)
from .gradients import DenseGrads, WeightBiasGrads, bias_grad, dense_grads, input_grad, weight_bias_grad, weight_grad
from .prepared import Prepared, prepare
from .upstream import OutputGrads, activation_grad, cross_entropy_grad

__all__ = [
    "DTypeError",
    "DenseGrads",
    "DensegradError",
    "DeviceError",
    "OutDeviceError",
    "OutError",
    "OutputGrads",
    "PlanError",
    "PrepareError",
    "Prepared",
    "ShapeError",
    "WeightBiasGrads",
    "activation_grad",
    "bias_grad",
    "cross_entropy_grad",
    "dense_grads",
    "input_grad",
    "prepare",
    "weight_bias_grad",
    "weight_grad",
]

__version__ = "0.1.0"
