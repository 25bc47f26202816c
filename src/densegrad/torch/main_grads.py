"""Main gradients of data-parallel ranks, in place of what DistributedDataParallel does with .grad."""
from __future__ import annotations

from typing import Any, Literal

import torch

from ..distributed import all_reduce, telling_ranks
from ..typing import DTypeName


def reduce_main_grads(model: torch.nn.Module, comm: Any = None, op: Literal["sum", "mean"] = "mean", *,
                      samples: int | None = None, wire: DTypeName | None = None, order: Literal["ranks"] | None = None,
                      deadline: float | None = None) -> None:
    """Reduce a model's gradients over ranks, in place: after backward, and before the optimizer's step.

    Parameters
    ----------
    model : torch.nn.Module
        Not wrapped in DistributedDataParallel, with the same parameters on every rank: those of rank 0, broadcast
        once, or of one seed. Of each parameter `main_grad` is reduced, or `.grad` if it has no main gradient; a
        parameter with neither is left out, on every rank alike.
    comm : communicator or Ranks, optional
        Of the ranks, as in `densegrad.distributed.all_reduce`: a process group, for example. By default
        `torch.distributed.group.WORLD`.
    op, samples, wire, order, deadline
        As in `densegrad.distributed.all_reduce`, with the mean as default, which DistributedDataParallel takes too.

    Raises
    ------
    DistributedError
        As `densegrad.distributed.all_reduce` raises it, on every rank.
    ValueError
        If the model has no gradient, is wrapped, or torch.distributed has no process group.
    TypeError
        If it is no module.

    Notes
    -----
    One bucket, sent when backward has ended: unlike DistributedDataParallel's it does not travel while backward runs.

    Examples
    --------
    >>> layer = torch.nn.Linear(3, 1)
    >>> layer.weight.main_grad = torch.ones(1, 3)
    >>> reduce_main_grads(layer)
    >>> layer.weight.main_grad
    tensor([[1., 1., 1.]])
    """
    if comm is None:
        if not torch.distributed.is_initialized():
            raise ValueError("torch.distributed has no process group yet (call torch.distributed.init_process_group, "
                             "or pass comm=)")
        comm = torch.distributed.group.WORLD
    with telling_ranks(comm, deadline):
        grads = _grads_of(model)
    all_reduce(grads, comm, op, samples=samples, wire=wire, order=order, deadline=deadline, out=grads)


def _grads_of(model: Any) -> list[Any]:
    """The gradient that is reduced of each parameter, or None."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ValueError("model must not be wrapped in DistributedDataParallel, which has reduced .grad already (pass "
                         "the module that was wrapped, and do not call the wrapper)")
    grads = []
    for parameter in model.parameters():
        main = getattr(parameter, "main_grad", None)
        grads.append(parameter.grad if main is None else main)
    if all(grad is None for grad in grads):
        raise ValueError("model has neither main gradients nor .grad to reduce (call it after backward)")
    return grads
