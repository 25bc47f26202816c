"""What layers and losses of PyTorch share: the library of operators, what is refused, what kernels cannot use."""
from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import device, tensors
from ..errors import DeviceError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: the operators; defined by the library itself, since custom_op takes longer than what it wraps, and without arguments
#: by keyword alone, which PyTorch takes longer to pass on
operators = torch.library.Library("densegrad", "DEF")


def operator(name: str, schema: str, on_device: Any, fake: Any) -> Any:
    """A new operator without a gradient of its own, by this function on every device and by that of shapes alone."""
    operators.define(name + schema)
    for key in ("CPU", "CUDA"):
        operators.impl(name, on_device, key)
    torch.library.register_fake(f"densegrad::{name}", fake, lib=operators)
    return getattr(torch.ops.densegrad, name).default


class Refusing(NamedTuple):
    """What raises an error in place of a transformation that a Function does not have."""

    vmap: Any
    jvp: Any


def refusing(name: str, instead_of_vmap: str) -> Refusing:
    """Of the function by this name; what to do instead of mapping it."""
    def vmap(info, in_dims, *given):
        raise NotImplementedError(f"densegrad.torch.{name} is not mapped by torch.vmap, or by what is built on it "
                                  f"({instead_of_vmap})")

    def jvp(ctx, *tangents):
        raise NotImplementedError(f"densegrad.torch.{name} has no forward-mode derivatives (differentiate backwards, "
                                  f"or call torch.nn.functional.{name} there)")

    return Refusing(staticmethod(vmap), staticmethod(jvp))


def with_its_signature(function: Any) -> Any:
    """The function with its signature kept, which autograd asks for at every call."""
    function.__signature__ = inspect.signature(function)
    return function


def check_tensors(**given: Any) -> None:
    """Hold arguments to tensors, or None.

    Raises
    ------
    TypeError
        If one is something else.
    """
    for name, one in given.items():
        if one is not None and not isinstance(one, Tensor):
            cure = ("pass one of its tensors, for example its weight" if isinstance(one, torch.nn.Module) else
                    f"pass torch.as_tensor({name})")
            raise TypeError(f"{name} must be a tensor; got {type(one).__name__} ({cure})")


def no_memory(tensor: Tensor, devices: tuple[str, ...]) -> str:
    """What makes memory of these devices that kernels can use of a tensor that is none, or an empty string."""
    # while torch.compile traces, the operator says the rest when it is run
    return "" if torch.compiler.is_compiling() else tensors.cure(tensor, devices, of_memory=False)


def unreadable(given: dict[str, Tensor]) -> DeviceError | TypeError | None:
    """Why kernels cannot use these tensors, if they cannot."""
    if torch.compiler.is_compiling():  # the operator says the rest when it is run
        return None
    try:
        devices = "meta", *device.current().tensor_devices  # of meta shapes alone, which are enough for a forward
    except DeviceError as error:
        return error
    for name, tensor in given.items():
        reason = no_memory(tensor, devices)
        if reason:
            return TypeError(f"{name} is no tensor that kernels can use: {reason}, or fallback=True for PyTorch's "
                             "backward")
    return None
