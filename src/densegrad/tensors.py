"""PyTorch's tensors as memory that kernels can use.

torch is never imported here: where nobody has imported it, no array is a tensor. Tensors are read as their values,
whether or not they require a gradient.
"""
from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np

#: the dtypes that NumPy has too, by its names; bfloat16 it has with ml_dtypes
_DTYPES = {"bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16",
           "float32", "float64", "complex64", "complex128"}


class _NoTensor:
    """What stands for torch.Tensor where torch has not been imported: a class without instances."""


def tensor_type() -> type:
    """torch.Tensor, or a class without instances where torch has not been imported."""
    return getattr(sys.modules.get("torch"), "Tensor", _NoTensor)


def is_tensor(array: Any) -> bool:
    """Whether the array is a tensor of PyTorch."""
    return isinstance(array, tensor_type())


def cure(tensor: Any, devices: tuple[str, ...], *, of_memory: bool = True) -> str:
    """What makes memory that kernels can use of a tensor that is none, or an empty string if it is.

    devices are the kinds of device, "cpu" or "cuda", whose memory can be used. Without of_memory a tensor may stand for
    another one, as within torch.func.
    """
    torch = sys.modules["torch"]
    if tensor.is_nested:
        return "it is nested: pass its parts, tensor.unbind()"
    if hasattr(tensor, "to_local"):
        return "it is distributed: pass what this process has of it, tensor.to_local()"
    if tensor.layout is not torch.strided:
        return "it is sparse or blocked: pass tensor.to_dense()"
    if tensor.is_meta and of_memory:
        return f"it is on the device meta, which has no memory: make one with torch.empty_like(tensor, " \
               f"device={devices[-1]!r})"
    if tensor.is_quantized:
        return "it is quantised: pass tensor.dequantize()"
    if tensor.is_conj():
        return "it is a conjugate view: pass tensor.resolve_conj()"
    if tensor.is_neg():
        return "it is a negative view: pass tensor.resolve_neg()"
    if dtype_name(tensor) not in _DTYPES:
        return f"its dtype is {tensor.dtype}: pass tensor.to(torch.float32)"
    if tensor.device.type not in devices:
        return f"it is on {tensor.device}: pass tensor.to({devices[-1]!r})"
    if of_memory and not _has_memory(torch, tensor):
        return ("it stands for a tensor within torch.compile, torch.func or a fake mode and has no memory of its own: "
                "call densegrad.torch.linear there")
    return ""


@cache
def plain() -> tuple[frozenset[type], type]:
    """The types of tensors that say themselves whether they are memory, and torch.Tensor."""
    torch = sys.modules["torch"]
    return frozenset((torch.Tensor, torch.nn.Parameter)), torch.Tensor


def _has_memory(torch: Any, tensor: Any) -> bool:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "fake_mode"):
        return False
    try:
        return bool(tensor.data_ptr()) or not tensor.numel()
    except RuntimeError:  # torch.func's tensors have none
        return False


def dtype_name(tensor: Any) -> str:
    """The name of a tensor's dtype, which is NumPy's too."""
    return str(tensor.dtype).removeprefix("torch.")


def strides(tensor: Any) -> tuple[int, ...]:
    """A tensor's strides in bytes."""
    size = tensor.element_size()
    return tuple(step * size for step in tensor.stride())


class _Held:
    """A tensor's memory for NumPy's eyes, which keeps the tensor.

    tensor.numpy() would do, but PyTorch could not resize the tensor's storage from then on, as FSDP does.
    """

    def __init__(self, tensor: Any, dtype: str):
        self.tensor = tensor
        self.__array_interface__ = {"shape": tuple(tensor.shape), "strides": strides(tensor), "version": 3,
                                    "typestr": np.dtype(dtype).str, "data": (tensor.data_ptr(), False)}


def host_array(array: Any) -> Any:
    """A NumPy array over the memory of a tensor on the CPU; what is none, or has no such memory, as it is."""
    if isinstance(array, np.ndarray) or not is_tensor(array) or cure(array, ("cpu",)):
        return array
    dtype = dtype_name(array)
    if dtype == "bfloat16":
        import ml_dtypes

        return np.asarray(_Held(array, "int16")).view(ml_dtypes.bfloat16)
    return np.asarray(_Held(array, dtype))


def host_tensor(array: np.ndarray) -> Any:
    """A tensor on the CPU over the memory of a NumPy array."""
    torch = sys.modules["torch"]
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
