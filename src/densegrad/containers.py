"""The libraries whose arrays calls take: how each is told, how it is read, what its results are. None is imported here.

    kind      read by                              its results
    NumPy     itself                               NumPy's arrays; copied back from a GPU
    CuPy      itself                               CuPy's arrays
    PyTorch   its own methods (tensors.py)         tensors, in PyTorch's memory
    Numba     the CUDA Array Interface             device arrays over CuPy's memory
    JAX       DLPack                               JAX's arrays over CuPy's memory, by DLPack
    others    DLPack; without it the interface     by DLPack into their own namespace; without one CuPy's arrays

In the simulator NumPy's memory takes the place of CuPy's.
"""
from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from . import tensors


class Kind(NamedTuple):
    """The arrays of one library."""

    name: str
    result: Callable[[Any, Any], Any]  # from a new array of the device's, and an array of this kind: what a user gets
    stays: bool = True  # whether a result goes on to show the memory that kernels write
    guest: bool = False  # whether its library frees memory when no array needs it, whatever is queued on a stream
    handed_over: bool = False  # whether DLPack hands it over
    written: bool = True  # whether there are arrays of it that can be written

    @property
    def company(self) -> str:
        """What the arrays of a call have in common: the kind, or that results are the device's own arrays."""
        return "" if self.result is as_made else self.name


def as_made(array: Any, like: Any) -> Any:
    """The device's own array."""
    return array


def _as_tensor(array: Any, like: Any) -> Any:
    return array if tensors.is_tensor(array) else tensors.host_tensor(array)


def _as_numba(array: Any, like: Any) -> Any:
    if isinstance(array, np.ndarray):
        return type(like)(array)  # the simulator's stand-in
    stream = sys.modules["cupy"].cuda.get_current_stream().ptr or 1  # the interface's name for the default stream
    return sys.modules["numba.cuda"].as_cuda_array(on_stream(array, stream), sync=False)


def _by_dlpack(array: Any, like: Any) -> Any:
    """An array of the other's library over the memory of this one."""
    of_bfloat16 = isinstance(array, np.ndarray) and array.dtype.name == "bfloat16"
    return like.__array_namespace__().from_dlpack(_Bfloat16(array) if of_bfloat16 else array)


def _is(library: str, name: str) -> Callable[[Any], bool]:
    """Whether an array is of this type, which no array is before its library has been imported."""
    def told(array: Any) -> bool:
        known = getattr(sys.modules.get(library), name, None)
        return isinstance(known, type) and isinstance(array, known)

    return told


#: how each kind is told
_KINDS: tuple[tuple[Callable[[Any], bool], Kind], ...] = (
    (lambda array: isinstance(array, np.ndarray), Kind("NumPy", as_made)),
    (_is("cupy", "ndarray"), Kind("CuPy", as_made)),
    (tensors.is_tensor, Kind("PyTorch", _as_tensor)),
    (_is("jax", "Array"), Kind("JAX", _by_dlpack, stays=False, guest=True, handed_over=True, written=False)),
    (lambda array: _library(array) == "numba" and hasattr(array, "copy_to_host"),
     Kind("Numba", _as_numba, guest=True)),
)


def _library(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


#: what is no array, or one that nobody has told how to read
UNREAD = Kind("no library", as_made)


def kind_of(array: Any) -> Kind:
    """The kind of an array, or UNREAD."""
    if isinstance(array, Guest):
        return array.kind
    for told, kind in _KINDS:
        if told(array):
            return kind
    by_dlpack = hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")
    if not by_dlpack and not hasattr(array, "__cuda_array_interface__"):
        return UNREAD
    namespace = array.__array_namespace__() if hasattr(array, "__array_namespace__") else None
    goes_back = hasattr(namespace, "from_dlpack")
    return Kind(_library(array), _by_dlpack if goes_back else as_made, stays=not goes_back, guest=True,
                handed_over=by_dlpack)


def type_of(array: Any) -> type:
    """The type that an array is known by: of parameters that of all tensors, of a guest that which its library has."""
    if isinstance(array, Guest):
        return type(array.producer)
    return tensors.tensor_type() if tensors.is_tensor(array) else type(array)


def opened(array: Any) -> Any:
    """The device's own array over a guest's memory; all others as they are."""
    return array.array if isinstance(array, Guest) else array


def given_back(array: Any) -> Any:
    """What the user passed for a guest; all others as they are."""
    return array.producer if isinstance(array, Guest) else array


def host_array(array: Any) -> Any:
    """A NumPy array over the memory of an array on the host; what has no such memory, as it is."""
    array = tensors.host_array(opened(array))
    if not isinstance(array, np.ndarray) and _library(array) == "numba":
        return getattr(array, "_ary", array)  # the simulator's stand-in for a device array
    return array


def problem(array: Any, tensor_devices: tuple[str, ...]) -> str:
    """Why kernels cannot use an array, and the cure; empty if nothing more is known."""
    if isinstance(array, np.ma.MaskedArray):
        return "numpy.ma's mask would be lost; use numpy.ma.filled"
    if isinstance(array, Guest):
        return array.problem
    if tensors.is_tensor(array):
        return tensors.cure(array, tensor_devices)
    if "cuda" in tensor_devices and hasattr(array, "__cuda_array_interface__"):
        try:
            interface_of(array)
        except ValueError as error:
            return str(error)
    return ""


# The CUDA Array Interface


class Interface(NamedTuple):
    """What the interface says of an array: strides in bytes, from the byte address of element (0, ..., 0)."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype
    byte: int
    readonly: bool
    stream: int | None


def interface_of(array: Any) -> Interface:
    """What an array's ``__cuda_array_interface__`` says.

    Raises
    ------
    ValueError
        With the reason and the cure, if that cannot be understood.
    """
    given = array.__cuda_array_interface__
    try:
        version, (byte, readonly) = given.get("version", 0), given["data"]
        shape, dtype, strides = tuple(given["shape"]), np.dtype(given["typestr"]), given.get("strides")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its __cuda_array_interface__ cannot be read: {type(error).__name__}: {error}") from error
    if version > 3:
        raise ValueError(f"its __cuda_array_interface__ has version {version}, of which 0 to 3 are understood: export "
                         "one of these")
    if given.get("mask") is not None:
        raise ValueError("its mask would be lost: pass an array without one")
    if strides is None:
        strides = np.empty(shape, np.void(dtype.itemsize).dtype).strides
    if len(strides) != len(shape):
        raise ValueError(f"its __cuda_array_interface__ has {len(strides)} strides for the shape {shape}")
    return Interface(shape, tuple(strides), dtype, byte or 0, readonly, given.get("stream"))


def on_stream(array: Any, stream: int | None) -> Any:
    """The array, whose interface names this stream; with None no library waits for one on the host."""
    return SimpleNamespace(array=array, __cuda_array_interface__={**array.__cuda_array_interface__, "stream": stream})


# DLPack: NumPy and CuPy take capsules over. What stands at their front is looked at before: neither says all of it.

HOST_TYPES = 1, 3
GPU_TYPES = 2, 13
_PLACES = {1: "the host", 2: "a GPU", 3: "the host", 10: "a GPU of AMD", 13: "a GPU", 14: "a device of oneAPI"}
_VERSION = 1
_READ_ONLY, _COPIED = 1, 2
_UNSIGNED, _BFLOAT = 1, 4


class _Tensor(ctypes.Structure):
    """DLTensor, as far as the number of lanes."""

    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("dimensions", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
                ("byte_offset", ctypes.c_uint64))


class _Unversioned(ctypes.Structure):
    """DLManagedTensor, of before 1.0."""

    major, flags = 0, 0
    _fields_ = (("tensor", _Tensor),)


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned; what stands before flags is the same in every version."""

    _fields_ = (("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
                ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", _Tensor))


_MANAGED = {b"dltensor": _Unversioned, b"dltensor_versioned": _Versioned}


_is_valid, _pointer = (
    ctypes.PYFUNCTYPE(gives, ctypes.py_object, ctypes.c_char_p)((f"PyCapsule_{name}", ctypes.pythonapi))
    for name, gives in (("IsValid", ctypes.c_int), ("GetPointer", ctypes.c_void_p)))


def _front(capsule: Any) -> Any:
    """What a capsule holds, unless it has been taken over."""
    for name, kind in _MANAGED.items():
        if _is_valid(capsule, name):
            return kind.from_address(_pointer(capsule, name))
    raise BufferError(f"its __dlpack__ gives no capsule that could be taken over, but {capsule!r}")


class _Handed:
    """A producer of DLPack for NumPy or CuPy, and what its capsule says of itself."""

    def __init__(self, producer: Any, readonly: bool):
        self.producer, self.readonly, self.of_bfloat16 = producer, readonly, False

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.producer.__dlpack_device__()

    def __dlpack__(self, **asked: Any) -> Any:
        capsule = self.producer.__dlpack__(**asked)
        front = _front(capsule)
        if front.major > _VERSION:
            raise BufferError(f"it is handed over by DLPack {front.major}, of which versions up to {_VERSION} are "
                              "understood: pass it by a library that knows both")
        if front.tensor.lanes != 1:
            raise BufferError(f"its elements are vectors of {front.tensor.lanes}: pass one with an axis more")
        if front.flags & _COPIED:
            raise BufferError("its library hands over a copy: pass the array that it would copy to")
        self.readonly |= bool(front.flags & _READ_ONLY)
        self.of_bfloat16 = front.tensor.code == _BFLOAT and front.tensor.bits == 16
        if self.of_bfloat16 and front.tensor.device_type in HOST_TYPES:
            front.tensor.code = _UNSIGNED  # NumPy takes no bfloat16
        return capsule


class _Bfloat16:
    """A NumPy array of bfloat16 as a producer of DLPack, which NumPy is not."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **asked: Any) -> Any:
        capsule = self.array.view(np.uint16).__dlpack__(**asked)
        _front(capsule).tensor.code = _BFLOAT
        return capsule


def take_on_host(handed: Any) -> np.ndarray:
    """A NumPy array over memory of the host, which can be written unless its library says otherwise."""
    array = np.from_dlpack(handed)
    if handed.readonly:
        array.flags.writeable = False
    elif not array.flags.writeable:  # as NumPy has all that does not say
        array = np.asarray(SimpleNamespace(held=array, __array_interface__={
            **array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}))
    if handed.of_bfloat16:
        import ml_dtypes

        return array.view(ml_dtypes.bfloat16)
    return array


class Guest:
    """An array handed over by DLPack: the device's own array over its memory, or the reason why there is none."""

    __slots__ = ("array", "kind", "problem", "producer", "readonly")

    def __init__(self, producer: Any, kind: Kind, takers: Mapping[int, Callable[[Any], Any]]):
        self.producer, self.kind, self.array = producer, kind, None
        self.problem = _problem_of_jax(producer) if kind.name == "JAX" else ""
        if self.problem:
            return
        handed = _Handed(producer, not kind.written)
        try:
            lies_on, _ = handed.__dlpack_device__()
            if lies_on not in takers:
                self.problem = (f"it lies on {_PLACES.get(lies_on, f'a device of the type {int(lies_on)}')}, where "
                                "kernels cannot use it: move it with its library")
                return
            self.array = takers[lies_on](handed)
        except Exception as error:  # whatever its library raises where it cannot hand it over
            self.problem = f"its library does not hand it over: {error}"
        self.readonly = handed.readonly

    @property
    def shape(self) -> Any:
        """The shape of the array."""
        return self.producer.shape if self.array is None else self.array.shape


def _problem_of_jax(array: Any) -> str:
    """Why an array of JAX has no memory that could be handed over, or an empty string if it has."""
    if isinstance(array, sys.modules["jax"].core.Tracer):
        return "it stands for an array within jit, grad or vmap and has no memory: call densegrad.jax.dense there"
    if array.is_deleted():
        return "its memory was donated or deleted: pass the array that was made of it"
    if len(array.devices()) != 1:
        return "it is spread over several devices: pass what one of them has, array.addressable_data(0)"
    return ""
