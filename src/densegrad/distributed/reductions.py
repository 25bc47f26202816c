"""Sums over ranks: of finished gradients in one flat bucket, and folds that go from rank to rank in their order."""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from math import prod
from operator import index
from typing import Any, Generic, Literal

from ..device import dtype_of
from ..errors import DistributedError, DTypeError, ShapeError
from ..facts import ITEM_BYTES
from ..folds import SUM, Fold
from ..slips import answered, meant
from ..typing import DTypeName, Kind
from .agreement import group_of, telling
from .buckets import Bucket, check_own, module_at, module_of, queued_at, spans, split
from .engines import GPU, HOST, Broken, Engine, Late, Pending, place_of
from .messages import Descriptor, Numbers

#: bytes of a sum that are passed on to the next rank at once: see docs/distributed.md
PIECE_BYTES = 1 << 20

OPERATIONS = ("sum", "mean")
ORDERS = (None, "ranks")


class Reduction(Generic[Kind]):
    """A reduction that was started, and its results."""

    def __init__(self, work: Future, results: Callable[[], Kind]):
        self._work, self._results = work, results

    @property
    def done(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        return self._work.done()

    def wait(self) -> Kind:
        """The results, when they are there: as `all_reduce` returns them.

        Raises
        ------
        DistributedError
            As `all_reduce` raises it, within its deadlines.
        """
        self._work.result()
        return self._results()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {'done' if self.done else 'under way'}>"


@answered
def all_reduce(grads: Kind, comm: Any, op: Literal["sum", "mean"] = "sum", *, samples: int | None = None,
               wire: DTypeName | None = None, order: Literal["ranks"] | None = None, out: Kind | None = None,
               check: bool | None = None, deadline: float | None = None, async_op: bool = False,
               stream: Any = None) -> Any:
    """Sum of every rank's gradients, or their mean over all samples; every rank gets it.

    Parameters
    ----------
    grads : array, or tuple, named tuple or list of arrays and None, float16 | bfloat16 | float32 | float64
        This rank's gradients: what `dense_grads` returns, for example. Of the same shapes and dtypes on every rank,
        that of an empty batch included. They travel together, in one flat bucket.
    comm : communicator or Ranks
        Of mpi4py, a process group of torch.distributed, CuPy's NcclCommunicator or NCCLBackend, or nccl4py's
        Communicator. NCCL's carry arrays on GPUs alone; to the others these go through memory of the host, unless
        `Ranks(comm, cuda_aware=True)` says that MPI takes them.
    op : "sum" or "mean"
        "mean" weights each rank's gradients by its share of the samples: for gradients of losses that are means.
    samples : int, optional
        With "mean", how many samples this rank's gradients are of; without it all ranks count alike. The gradients of a
        rank with 0 samples are not looked at, even if they are NaN.
    wire : "float16", "bfloat16", "float32" or "float64", optional
        In which dtype gradients travel and are added: by default float32, of float64 float64, so that those of half
        types are rounded once, at the end. MPI adds float32 and float64 alone.
    order : None or "ranks"
        "ranks" adds rank 0's gradients first, then rank 1's and so on: equal bits on every run, whatever the engine.
        With None the order is the engine's own, which may differ from run to run.
    out : as grads, optional
        Where to write the results, with the shapes and dtypes of grads: grads itself, to reduce in place.
    check : bool, optional
        Whether the ranks agree on what they are about to do before anything is sent, so that all of them raise if one
        raised, differs or does not come. By default they do wherever they can: over all but NCCL's own communicators,
        which need `Ranks(comm, host=...)`.
    deadline : float, optional
        Seconds that this rank waits for the others to come, and again for the sum: by default 60, or those of Ranks.
    async_op : bool
        Whether to return at once, and reduce on a thread, and on a GPU on a stream, of its own. Until `wait` returns
        grads must not be written, and nothing else of this communicator be called but reductions of densegrad.
    stream : stream, optional
        Where grads are written, as in `bias_grad`, if it is not the current stream.

    Returns
    -------
    as grads, or Reduction
        New arrays of the same kinds and dtypes, or `out`; None stays None. They are there when this returns, on a GPU
        too. With async_op a handle whose `wait()` returns them.

    Raises
    ------
    DistributedError
        Naming the ranks that raised, differ from the others or did not come in time: on every rank. Without `check`, or
        where a rank dies later, at the deadline of each rank.
    DTypeError, OutError, TypeError, ValueError
        If an argument of this rank is none that can be reduced; the other ranks raise DistributedError.

    Notes
    -----
    With R ranks, u the roundoff of the dtype that travels and w the weights of a mean, the error before the last
    rounding is at most (R + 1) u sum |w grad|, and (R - 1) u sum |grad| of a sum, in any order.

    Examples
    --------
    >>> all_reduce(numpy.ones(2, dtype="float32"), MPI.COMM_SELF)
    array([1., 1.], dtype=float32)
    """
    group = group_of(comm, deadline)
    rounds = group.checked(check)
    with telling(group.state, rounds, group.deadline):
        _check_names(op, order, wire)
        samples = _checked_samples(op, samples)
        if async_op and group.calls_mpi:
            _check_threads()
        bucket = Bucket(grads, out)
        place = _place(group.engine, bucket.place)
        wire = wire or bucket.usual_wire()  # type: ignore[assignment]
        if wire not in group.engine.carries:
            raise DTypeError(f"{group.engine.name} adds {', '.join(sorted(group.engine.carries))}; got wire={wire!r} "
                             "(leave wire out)")
        queued = queued_at(next(one for one in bucket.given if one is not None), stream)
    weighted = "" if op == "sum" else ", by samples" if samples is not None else ", ranks alike"
    words = f"{op}{weighted} in {wire}, {f'in the order of the {order}' if order else 'in any order'}, of " \
            f"{bucket.description}"
    descriptor = Descriptor(0, words, 1 if samples is None else samples, 1)

    def run() -> None:
        numbers = None if rounds is None else rounds.agree(descriptor, group.deadline)
        with _waiting(group.engine, group.deadline) as until, queued(until):
            flat = bucket.flat(str(wire))
            if op == "mean":
                share = _share(group.engine, numbers or _counted(group.engine, descriptor, module_at(place), until))
                flat[...] = flat * flat.dtype.type(share) if share else 0
            total = _reduce(group.engine, flat if place == bucket.place else flat.get(), order, until)
            bucket.write(total if place == bucket.place else module_at(bucket.place).asarray(total))

    if async_op:
        return Reduction(group.state.start(run), bucket.results)
    group.state.run(run)
    return bucket.results()


def _check_names(op: Any, order: Any, wire: Any) -> None:
    if op not in OPERATIONS:
        raise ValueError(f'op must be "sum" or "mean"; got {op!r}{meant(op, OPERATIONS)}')
    if order not in ORDERS:
        raise ValueError(f'order must be None or "ranks"; got {order!r}')
    if wire is not None and wire not in ITEM_BYTES:
        raise ValueError(f"wire must be None or one of {', '.join(ITEM_BYTES)}; got {wire!r}{meant(wire, ITEM_BYTES)}")


def _checked_samples(op: str, samples: Any) -> int | None:
    if samples is None:
        return None
    if op == "sum":
        raise ValueError(f'samples weights a mean; got samples={samples!r} with op="sum" (leave it out, or pass '
                         'op="mean")')
    if isinstance(samples, bool) or not hasattr(samples, "__index__") or index(samples) < 0:
        raise ValueError(f"samples must be a whole number, 0 or more; got {samples!r}")
    if index(samples) >= 2**62:
        raise ValueError(f"samples must be below 2^62; got {samples!r}")
    return index(samples)


def _check_threads() -> None:
    mpi = sys.modules["mpi4py.MPI"]
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        raise ValueError("async_op=True calls MPI on a thread of its own, which this MPI was not initialised for "
                         "(initialise it with MPI_THREAD_MULTIPLE, mpi4py's default, or leave async_op out)")


def _place(engine: Engine, place: str) -> str:
    """Where buffers lie while they travel.

    Raises
    ------
    TypeError
        If the engine does not take these arrays.
    """
    if place == HOST and HOST not in engine.places:
        raise TypeError(f"{engine.name} carries arrays on GPUs; got arrays on the host (pass CuPy's arrays or CUDA "
                        "tensors, or a communicator of mpi4py or gloo)")
    return place if place in engine.places else HOST


@contextmanager
def _waiting(engine: Engine, deadline: float) -> Iterator[float]:
    """The time at which what is done in the with block must be done; raises what a user should see otherwise."""
    try:
        yield time.monotonic() + deadline
    except Late as late:
        engine.abort()
        raise DistributedError(f"the sum was not done within {deadline:g} s: rank {engine.rank} waited for {late} (see "
                               "what that raised, or pass a longer deadline=)") from None
    except Broken as error:
        raise DistributedError(f"rank {engine.rank} lost the others while adding: {error}") from error


def _counted(engine: Engine, descriptor: Descriptor, xp: Any, until: float) -> Numbers:
    """What every rank says of itself, unchecked: by a sum of vectors in which each has places of its own."""
    vector = xp.zeros(2 * engine.size)  # float64, which the numbers are exact in
    vector[2 * engine.rank:2 * engine.rank + 2] = xp.asarray((descriptor.samples, descriptor.addends), float)
    samples, addends = _reduce(engine, vector, None, until).reshape(-1, 2).T.tolist()
    return Numbers(tuple(map(int, samples)), tuple(map(int, addends)))


def _share(engine: Engine, numbers: Numbers) -> float:
    """This rank's share of all samples."""
    total = sum(numbers.samples)
    if not total:
        raise DistributedError("no rank has a sample, and there is no mean of none (leave this step out on every "
                               "rank)", tuple(range(engine.size)), agreed=True)
    return numbers.samples[engine.rank] / total


def _reduce(engine: Engine, flat: Any, order: str | None, until: float) -> Any:
    """The sum of every rank's flat buffer, which may be this one."""
    if engine.size == 1 or not flat.size:
        return flat
    if order is None:
        _finish(engine.all_reduce(flat), until, "the others")
        return flat
    total = module_of(flat).empty_like(flat)
    _fold(engine, range(engine.size), [_Parts([flat], place_of(flat))], total, SUM, until)
    return total


def _finish(pending: Pending, until: float, whom: str) -> None:
    try:
        pending.wait(until)
    except Late:
        raise Late(whom) from None


# Folds along the ranks


def fold_along_ranks(comm: Any, addends: Sequence[Sequence[Any]], like: Sequence[Any], *, fold: Fold = SUM,
                     of: str = "", samples: int = 0, accept: Callable[[Numbers], None] | None = None,
                     check: bool | None = None, deadline: float | None = None, stream: Any = None) -> list[list[Any]]:
    """Add up what all ranks have, in the order of the ranks and on each in its own order: one left fold.

        state = begin(a[0]); state = add(state, a[1]); ...    a: rank 0's addends, then rank 1's, ...

    The bits are those of one process that adds the same addends in the same order, however they are spread over ranks.

    Parameters
    ----------
    comm : communicator or Ranks
        As in `all_reduce`.
    addends : sequence of sequences of arrays
        Of this rank, in their order; each is a sequence of arrays with the shapes and the dtype of `like`. A rank may
        have none: it passes nothing on and hears the result. They are read while the call runs, and not changed.
    like : sequence of arrays
        With the shapes and the dtype of one addend, all float32 or all float64, NumPy's or CuPy's; their elements are
        not read. The same on every rank.
    fold : Fold
        What is done with each addend: `SUM`, or a sum of more than one array.
    of : str
        In words, what all ranks must have alike beside shapes and dtype: the number of samples of a block, for example.
    samples : int
        This rank's, for `accept`.
    accept : function of Numbers, optional
        Called on every rank with the samples and the numbers of addends of all, before anything is added. It must raise
        on all ranks or on none.
    check, deadline
        As in `all_reduce`.
    stream : stream, optional
        Where the addends are written, if it is not the current stream.

    Returns
    -------
    list of `fold.planes` lists of arrays
        New arrays like `like`, with the same bits on every rank; zeros if no rank has an addend.

    Raises
    ------
    DistributedError
        As in `all_reduce`.
    ShapeError, DTypeError
        If an addend differs from `like`, or that has several dtypes or another one. The other ranks raise
        DistributedError.

    Notes
    -----
    Numbers travel in pieces of 1 MiB: while one rank adds to a piece, the rank before it adds to the next. The last
    rank broadcasts the sum. Every addend is added once; nothing is gathered.

    Examples
    --------
    >>> blocks = [[numpy.ones(2, dtype="float32")], [numpy.ones(2, dtype="float32")]]
    >>> fold_along_ranks(MPI.COMM_SELF, blocks, blocks[0])
    [[array([2., 2.], dtype=float32)]]
    """
    group = group_of(comm, deadline)
    rounds = group.checked(check)
    with telling(group.state, rounds, group.deadline):
        shapes, dtype = _shapes_and_dtype(like)
        for addend in addends:
            _check_addend(addend, shapes, dtype)
        place = _place(group.engine, place_of(like[0]))
        queued = queued_at(like[0], stream)
    parts = [_Parts(addend, place) for addend in addends]
    given = "; ".join(f"{dtype} {shape}" for shape in shapes)
    descriptor = Descriptor(0, f"fold in {fold.planes} planes of {given}{of and f' ({of})'}", samples, len(parts))

    def run() -> list[list[Any]]:
        numbers = None if rounds is None else rounds.agree(descriptor, group.deadline)
        with _waiting(group.engine, group.deadline) as until, queued(until):
            numbers = numbers or _counted(group.engine, descriptor, module_at(place), until)
            if accept is not None:
                accept(numbers)
            holders = [rank for rank, count in enumerate(numbers.addends) if count]
            total = module_at(place).zeros(fold.planes * sum(map(prod, shapes)), dtype)
            _fold(group.engine, holders, parts, total, fold, until)
            planes = _planes(total, fold.planes)
            if place != place_of(like[0]):
                planes = [module_of(like[0]).asarray(plane) for plane in planes]
            return [split(plane, shapes) for plane in planes]

    return group.state.run(run)


def _shapes_and_dtype(like: Sequence[Any]) -> tuple[list[tuple[int, ...]], Any]:
    for one in like:
        check_own("like", one)
    dtypes = {one.dtype.name for one in like}
    if dtypes != {"float32"} and dtypes != {"float64"}:
        raise DTypeError("like must hold arrays that are all float32 or all float64, as sums are; got "
                         f"{', '.join(sorted(dtypes)) or 'none'}")
    return [tuple(one.shape) for one in like], dtype_of(dtypes.pop())


def _check_addend(addend: Sequence[Any], shapes: list[tuple[int, ...]], dtype: Any) -> None:
    found = [tuple(one.shape) for one in addend]
    if found != shapes:
        raise ShapeError(f"every addend must have the shapes of like, {shapes}; got {found}")
    for one in addend:
        check_own("every addend", one)
        if one.dtype != dtype:
            raise DTypeError(f"every addend must have the dtype of like, {dtype}; got {one.dtype}")


class _Parts:
    """One addend, of which parts are read as if its arrays lay in a row: at a place."""

    def __init__(self, arrays: Sequence[Any], place: str):
        self.arrays, self.place = [one.reshape(-1) for one in arrays], place
        self.spans = spans([one.size for one in self.arrays])

    def part(self, begin: int, end: int) -> Any:
        """The elements from begin to end; not to be changed."""
        found = [one[max(begin - span.start, 0):end - span.start]
                 for one, span in zip(self.arrays, self.spans, strict=True) if begin < span.stop and span.start < end]
        part = found[0] if len(found) == 1 else module_of(found[0]).concatenate(found)
        return part.get() if self.place == HOST and place_of(part) == GPU else part


def _pieces(elements: int, planes: int, item_bytes: int) -> list[tuple[int, int]]:
    """(begin, end) of the pieces that a sum travels in; each has its part of all planes, one plane after another."""
    step = max(PIECE_BYTES // (planes * item_bytes), 1)
    return [(begin, min(begin + step, elements)) for begin in range(0, elements, step)]


def _fold(engine: Engine, holders: Sequence[int], addends: Sequence[_Parts], total: Any, fold: Fold,
          until: float) -> None:
    """Write the state of the fold over all holders' addends into `total`, in pieces.

    Each holder receives a piece from the one before, adds to it and sends it on, while it receives the next.
    """
    pieces = _pieces(total.size // fold.planes, fold.planes, total.dtype.itemsize)
    if not holders or not pieces:
        return
    if engine.rank in holders:
        turn = holders.index(engine.rank)
        before, behind = holders[turn - 1] if turn else None, holders[turn + 1:turn + 2]
        rooms = [total[fold.planes * begin:fold.planes * end] for begin, end in pieces]
        coming = None if before is None else engine.receive(rooms[0], before)
        sent = []
        for number, ((begin, end), room) in enumerate(zip(pieces, rooms, strict=True)):
            come = coming
            if before is not None and number + 1 < len(rooms):
                coming = engine.receive(rooms[number + 1], before)
            planes, parts = room.reshape(fold.planes, -1), (addend.part(begin, end) for addend in addends)
            if come is None:
                state = fold.begin(next(parts))
            else:
                _finish(come, until, f"rank {before}")
                state = tuple(planes)
            for part in parts:
                state = fold.add(state, part)
            for plane, one in zip(planes, state, strict=True):
                plane[...] = one
            sent += [engine.send(room, rank) for rank in behind]
        for pending in sent:
            _finish(pending, until, f"rank {behind[0]}")
    if engine.size > 1:
        _finish(engine.broadcast(total, holders[-1]), until, f"rank {holders[-1]}")


def _planes(total: Any, planes: int) -> list[Any]:
    """The planes of a state, each in a row, from the pieces in which it has travelled."""
    if planes == 1:
        return [total]
    found = module_of(total).empty((planes, total.size // planes), total.dtype)
    for begin, end in _pieces(total.size // planes, planes, total.dtype.itemsize):
        found[:, begin:end] = total[planes * begin:planes * end].reshape(planes, -1)
    return list(found)
