"""The function that users call, and how a call of it is described."""
from __future__ import annotations

from typing import Any

from densegrad.calls import Recipe, call, recipe_of
from densegrad.families.common import check_plan
from densegrad.operands import accept, accept_out

from .family import SquareNormsPlan, launches, plan_square_norms


def square_norms(x: Any, *, alpha: float = 1.0, out: Any = None, accumulate: bool = False,
                 plan: SquareNormsPlan | None = None, stream: Any = None) -> Any:
    """The squared norm of each row: alpha (x * x).sum(axis=-1).

    Parameters
    ----------
    x : array, (..., D), float16 | bfloat16 | float32 | float64
        The rows. Any strides; copied once if neither axis is contiguous.
    alpha, out, accumulate, stream
        As in `densegrad.bias_grad`.
    plan : SquareNormsPlan, optional
        How to compute it, instead of what `plan_square_norms` says.

    Returns
    -------
    array, (...)
        `out` if given, else a new array of the same kind and dtype as x.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, OutError, PlanError, TypeError, ValueError
        As `densegrad.bias_grad`, before anything is written.
    """
    return call(_describe, (x,), (out,), (accumulate, plan), (alpha,), stream)[0]


def _describe(arrays: tuple, outs: tuple, options: tuple) -> Recipe:
    accumulate, plan = options
    inputs = accept(dz=arrays[0], name="x")
    source = inputs.dz.matrix
    target = accept_out("out", outs[0], inputs, inputs.batch_shape, accumulate, column=True)
    sizes: dict[str, Any] = {"rows": source.rows, "cols": source.cols, "dtype": source.dtype}
    plan = check_plan(plan, SquareNormsPlan, sizes) or plan_square_norms(**sizes)
    return recipe_of(inputs, (inputs.dz,), (target,), launches(plan, source, target.result))
