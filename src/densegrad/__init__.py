"""densegrad: the gradients of a dense layer Z = X W + b, as Numba CUDA kernels.

dL/db is the sum of dL/dZ over the batch axis, dL/dW = Xᵀ dL/dZ and dL/dX = dL/dZ Wᵀ.
"""
from time import time as _time
from typing import TYPE_CHECKING

#: when this process may first have imported one of the package's files
_IMPORTED = _time()

if TYPE_CHECKING:
    from . import accumulator as accumulator
    from . import calls as calls
    from . import device as device
    from . import errors as errors
    from . import launches as launches
    from . import layers as layers
    from . import plans as plans
    from . import reference as reference
    from . import typing as typing
    from .accumulator import GradientAccumulator
    from .errors import (
        AccumulatorError,
        DensegradError,
        DeviceError,
        DTypeError,
        OutDeviceError,
        OutError,
        PlanError,
        PrepareError,
        ShapeError,
    )
    from .gradients import (
        DenseGrads,
        WeightBiasGrads,
        bias_grad,
        dense_grads,
        input_grad,
        weight_bias_grad,
        weight_grad,
    )
    from .losses import LossGrads, cross_entropy, cross_entropy_grad
    from .output_gradients import OutputGrads, activation_grad
    from .prepared import Prepared, prepare
    from .tuned import use_plans
    from .warming import Warmed, warmup
else:
    from importlib import import_module as _import_module

    def __getattr__(name):
        """What the package offers, imported when it is first asked for: importing the package alone takes no time."""
        if name in _MODULES:
            return _import_module(f".{name}", __name__)
        if name in __all__:
            for module in map(__getattr__, _WHERE):
                if name in vars(module):
                    return globals().setdefault(name, vars(module)[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__, *_MODULES})

#: where the names of __all__ stand, and the modules that are reached as attributes of the package
_WHERE = ("accumulator", "errors", "gradients", "losses", "output_gradients", "prepared", "tuned", "warming")
_MODULES = ("calls", "device", "launches", "layers", "plans", "reference", "typing", *_WHERE)

__all__ = [
    "AccumulatorError",
    "DTypeError",
    "DenseGrads",
    "DensegradError",
    "DeviceError",
    "GradientAccumulator",
    "LossGrads",
    "OutDeviceError",
    "OutError",
    "OutputGrads",
    "PlanError",
    "PrepareError",
    "Prepared",
    "ShapeError",
    "Warmed",
    "WeightBiasGrads",
    "activation_grad",
    "bias_grad",
    "cross_entropy",
    "cross_entropy_grad",
    "dense_grads",
    "input_grad",
    "prepare",
    "use_plans",
    "warmup",
    "weight_bias_grad",
    "weight_grad",
]

__version__ = "0.1.0"
