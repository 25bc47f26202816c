"""Prepared calls: everything is checked, planned and filled in once; what is left is to launch."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic

from .calls import Bound, as_prepared
from .errors import PrepareError
from .launches import ALIGNMENT, Clear, Launch
from .operands import accept_tuple
from .typing import Returned


class Prepared(Generic[Returned]):
    """A call that only launches: no check, no allocation, no synchronisation. Made by `prepare`.

    Its arrays, results and workspace are kept alive by it. Calls that overlap, on several streams or from several
    threads, share one workspace: that they do not is the caller's to see to.

    Attributes
    ----------
    result : as the function returns it
        What every call writes.
    """

    def __init__(self, bound: Bound, result: Returned):
        self._bound: Bound = bound
        self.result: Returned = result

    def __call__(self, stream: Any = None) -> Returned:
        """Queue the launches, on another stream than the one that the call was prepared for if one is given.

        Parameters
        ----------
        stream : CuPy stream, Numba stream, int or object with `__cuda_stream__`, optional
            Where to queue them, for example a stream that is being captured.

        Returns
        -------
        as the function that was prepared
            `result`, the same arrays each time.

        Notes
        -----
        Of several GPUs the one on which it was prepared must be the current one: that is not looked at.
        """
        bound = self._bound
        bound.launch(bound.stream if stream is None else bound.where.pointer(stream))
        return self.result

    def rebind(self, *, out: Any = None, **arrays: Any) -> Prepared[Returned]:
        """Take other arrays of the same layout, or other numbers, by the names that the function has for them.

        Parameters
        ----------
        out : array or tuple of arrays and None, optional
            Where to write from now on, as the function takes it; what is None stays. The call must have been prepared
            with `out`.
        **arrays
            Arrays of the call, for example x and dz, of the same kind, shape, strides, dtype and place as those
            before, and aligned to as much; and numbers, for example alpha.

        Returns
        -------
        Prepared
            This call. Graphs that were captured before keep the arrays and numbers that they were captured with.

        Raises
        ------
        PrepareError
            If the call has no such array, or the layout is another one. Nothing is bound then.
        OutError, ValueError, TypeError
            As the function: if arrays overlap, an out is read-only, labels are no classes or numbers out of range.
        """
        result: Any = self.result
        several = isinstance(result, tuple)
        for name in arrays:
            if "." in name:
                raise PrepareError(f"{name} cannot be bound by that name (pass out={type(result).__name__}(...))")
        if out is None:
            outs = {}
        elif several:
            named = accept_tuple("out", out, type(result))._asdict()
            outs = {f"out.{field}": array for field, array in named.items() if array is not None}
        else:
            outs = {"out": out}
        self._bound.rebind(arrays | outs)
        if several:
            self.result = result._replace(**{name.removeprefix("out."): array for name, array in outs.items()})
        elif outs:
            self.result = out
        return self

    @property
    def launches(self) -> tuple[Launch | Clear, ...]:
        """What a call launches, in order."""
        return self._bound.recipe.launches

    @property
    def workspace_bytes(self) -> int:
        """Memory in bytes that the launches share, beside arguments and results."""
        return self._bound.recipe.workspace_bytes

    def __str__(self) -> str:
        return "\n".join(map(str, self.launches)) or "nothing to launch"


def prepare(function: Callable[..., Any], *arguments: Any, workspace: Any = None, **options: Any) -> Prepared[Returned]:
    """Prepare a call of one of this package's functions, to be repeated or captured in a CUDA graph.

        step = prepare(dense_grads, x, w, dz, out=DenseGrads(dx, dw, db))
        step()          # launches; the results are in out

    Parameters
    ----------
    function : function
        `bias_grad`, `weight_grad`, `dense_grads` or another that computes gradients.
    *arguments, **options
        As the function takes them. Without `out`, results are allocated once and every call writes to them.
    workspace : array of bytes, optional
        Memory for what launches leave for one another, at least `workspace_bytes` that begin at a multiple of 256,
        whatever it holds; it belongs to one stream at a time. Allocated if none is given.

    Returns
    -------
    Prepared
        The call. It prints what it will launch.

    Raises
    ------
    PrepareError
        If a call would copy an array each time (one on the host beside a GPU, or without a contiguous axis), or the
        workspace does not do.
    TypeError
        If the function is none of this package's.

    Notes
    -----
    A launch takes the addresses that were there when the call was prepared: to change what is computed, write into the
    arrays, or `rebind` others. A captured call replays as often as its graph is launched; the prepared call must be
    kept until then, since it holds the memory.

    Examples
    --------
    >>> dz = numpy.ones((4, 2), dtype="float32")
    >>> step = prepare(bias_grad, dz)
    >>> step()
    array([4., 4.], dtype=float32)
    >>> dz[0] = 10
    >>> step()
    array([13., 13.], dtype=float32)
    """
    if not callable(function):
        raise TypeError("function must be one of this package's that computes gradients, then what it takes; got "
                        f"{type(function).__name__} (prepare(bias_grad, dz), say, and not prepare(bias_grad(dz)))")
    with as_prepared() as found:
        result = function(*arguments, **options)
    if len(found) != 1:
        raise TypeError(f"function must be one of this package's that computes gradients; got {function!r}")
    bound = found[0]
    if workspace is not None:
        _check_workspace(bound, workspace)
    with bound.where.using(bound.stream, bound.recipe.place):
        bound.put_workspace(workspace)
    return Prepared(bound, result)


def _check_workspace(bound: Bound, workspace: Any) -> None:
    memory, needed = bound.where.memory(workspace), bound.recipe.workspace_bytes
    if memory is None:
        raise PrepareError(f"workspace must be {bound.where.array_kinds}; got {type(workspace).__name__}")
    if not needed:
        return
    size = memory.dtype.itemsize
    for length in memory.shape:
        size *= length
    contiguous = len(memory.shape) == 1 and (memory.strides == (memory.dtype.itemsize,) or memory.shape == (1,))
    if not contiguous or memory.dtype.itemsize != 1 or size < needed:
        raise PrepareError(f"workspace must be {needed} contiguous bytes or more, for example empty({needed}, "
                           f"'uint8'); got shape {memory.shape} of {memory.dtype}")
    if memory.byte % ALIGNMENT or memory.place != bound.recipe.place or memory.readonly:
        raise PrepareError(f"workspace must begin at a multiple of {ALIGNMENT} bytes, be writable, and lie on "
                           f"{bound.recipe.place}; got {'a read-only one' if memory.readonly else 'one'} at byte "
                           f"{memory.byte} on {memory.place}")
    bound.check_workspace(workspace, (*bound.arrays, *bound.outs))
