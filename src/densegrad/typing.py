"""Types of what the public functions take and give, for editors and type checkers.

Names of options are literals: an editor completes them, and a checker finds one that is misspelt. The lists that calls
are held to stand where they mean something; a test holds the two to each other.

    def step(x: Array[Kind], dz: Array[Kind], activation: ActivationName) -> DenseGrads[Kind]: ...
"""
from __future__ import annotations

from typing import Any, Literal, Protocol

from typing_extensions import TypeVar

#: a library's arrays of one dtype: what goes in comes out
Kind = TypeVar("Kind")
#: of tuples, too, whose fields are None where nothing was given or asked for
Kind_co = TypeVar("Kind_co", covariant=True)
#: what `out` is, or the kind of what went in where no `out` is given
Out = TypeVar("Out", default=Kind)
#: what a prepared call returns, which no checker finds by itself: `step: Prepared[NDArray[np.float32]] = prepare(...)`
Returned = TypeVar("Returned", default=Any)


class Array(Protocol[Kind_co]):
    """An array of this kind: NumPy's, CuPy's, PyTorch's, JAX's, or of another library with DLPack.

    The kind is what its slices are. So a checker knows of a result the library and the dtype, and not the shape or the
    subclass of the argument, which results do not have.
    """

    def __dlpack__(self, *args: Any, **options: Any) -> Any:
        """Its memory, for other libraries."""

    def __getitem__(self, key: slice, /) -> Kind_co:
        """Part of it."""


ActivationName = Literal["identity", "relu", "relu6", "leaky_relu", "elu", "selu", "sigmoid", "tanh", "softplus",
                         "silu", "hardswish", "mish", "gelu", "gelu_tanh"]
DTypeName = Literal["float16", "bfloat16", "float32", "float64"]
GradName = Literal["dx", "dw", "db"]
Precision = Literal["ieee", "tf32", "tf32x3"]
Reduction = Literal["mean", "sum", "none"]
WeightLayout = Literal["in_out", "out_in"]
