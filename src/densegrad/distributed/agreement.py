"""What ranks agree on before anything is sent: in a round each says what it is about to do, and all hear one answer.

    every rank --descriptor--> rank 0 --answer--> every rank

Rank 0 waits for the others until the deadline, and answers in any case: that all go on, or which rank raised, differs
or is missing. So either all ranks go on or all raise, with the same words. Rounds are numbered: what came too late for
one is not taken for another. A rank that hears no answer in twice the deadline raises by itself, and takes part in
nothing more.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from .. import __version__
from ..errors import DistributedError
from . import engines
from .engines import Broken, Late
from .lines import Line, MpiLine, StoreLine
from .messages import Answer, Descriptor, Numbers, problem, unpacked, unpacked_answer

#: seconds that the ranks wait for one another, where nothing else is said
DEADLINE = 60.0
#: a week: longer ones stores of torch.distributed do not take
MOST_SECONDS = 604800
#: attribute of an error: the communicator's state and the round in which the other ranks have heard of it
_TOLD = "densegrad_told"


class State:
    """What is remembered of a communicator: how many rounds it has had, what runs on it, whether it was given up."""

    def __init__(self) -> None:
        self.rounds = 0
        self.given_up = ""  # why this rank takes part in nothing more
        self.sent: list[Any] = []
        self._worker: ThreadPoolExecutor | None = None

    def start(self, work: Callable[[], Any]) -> Future:
        """Run it on a thread of its own, after what was started before."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "densegrad.distributed")
        return self._worker.submit(self._noting, work)

    def run(self, work: Callable[[], Any]) -> Any:
        """Run it after what was started before, and wait for it."""
        return self._noting(work) if self._worker is None else self.start(work).result()

    def _noting(self, work: Callable[[], Any]) -> Any:
        """Do it, and remember an error after which ranks may be out of step: what is still on its way is of before."""
        try:
            return work()
        except DistributedError as error:
            if not error.agreed:
                self.given_up = str(error)
            raise


class Rounds:
    """The rounds of one communicator, as one rank takes part in them."""

    def __init__(self, line: Line, rank: int, size: int, state: State):
        self.line, self.rank, self.size, self.state = line, rank, size, state

    def agree(self, descriptor: Descriptor, deadline: float) -> Numbers:
        """Say what this rank is about to do, and go on if all ranks do the same.

        Raises
        ------
        DistributedError
            If they do not, or one did not come within the deadline.
        """
        self.state.rounds += 1
        descriptor = descriptor._replace(round=self.state.rounds, version=__version__)
        try:
            answer = self._answer(descriptor, deadline)
        except Late:
            raise DistributedError(f"rank 0 did not answer within {2 * deadline:g} s, twice the deadline, whether all "
                                   "ranks go on (see what it raised, or pass a longer deadline=)", (0,)) from None
        except (Broken, RuntimeError) as error:  # RuntimeErrors are those of torch.distributed's stores
            raise DistributedError(f"rank {self.rank} lost the others: {error}") from error
        if answer.words:
            self.hold([rank for rank, came in enumerate(answer.came) if came], deadline)
            raise DistributedError(answer.words, answer.ranks, agreed=True)
        return answer.numbers

    def hold(self, ranks: Sequence[int], deadline: float) -> None:
        """Let rank 0 go on when these ranks have heard its answer: it may be what ends next, and the store with it."""
        self.state.rounds += 1
        with suppress(Broken, RuntimeError):
            if self.rank:
                self.line.submit(self.state.rounds, Descriptor(self.state.rounds, "").packed())
            else:
                self.line.collect(self.state.rounds, [rank for rank in ranks if rank], time.monotonic() + deadline)

    def _answer(self, descriptor: Descriptor, deadline: float) -> Answer:
        number, begun = descriptor.round, time.monotonic()
        if self.rank:
            self.line.submit(number, descriptor.packed())
            return unpacked_answer(self.line.hear(number, begun + 2 * deadline))
        messages = self.line.collect(number, range(1, self.size), begun + deadline) | {0: descriptor.packed()}
        descriptors = [unpacked(messages[rank]) if rank in messages else None for rank in range(self.size)]
        said = [one or Descriptor(number, "") for one in descriptors]
        answer = Answer(number, *problem(descriptors, deadline), tuple(one is not None for one in descriptors),
                        Numbers(tuple(one.samples for one in said), tuple(one.addends for one in said)))
        self.line.publish(number, answer.packed())
        return answer

    def tell(self, error: BaseException, deadline: float) -> None:
        """Let the others raise in their next round, with the words of this rank's error, unless they know."""
        if isinstance(error, DistributedError) or vars(error).get(_TOLD) == (self.state, self.state.rounds):
            return
        try:
            words = f"{type(error).__name__}: {error}"
        except Exception:  # of an error that cannot say what it is
            words = type(error).__name__
        with suppress(DistributedError):  # what this rank raises is the error itself
            self.agree(Descriptor(0, words, failed=True), deadline)
        vars(error)[_TOLD] = self.state, self.state.rounds


@dataclass(frozen=True)
class Ranks:
    """A communicator, and what is to be known of it that it does not say.

    Parameters
    ----------
    comm : communicator
        Of mpi4py, a process group of torch.distributed, CuPy's NcclCommunicator or NCCLBackend, or nccl4py's
        Communicator.
    host : communicator of mpi4py or process group of torch.distributed, optional
        Over what ranks agree before anything is sent, where comm is NCCL's and has no way to: of the same ranks in the
        same order.
    cuda_aware : bool
        Whether MPI reads and writes the memory of GPUs, which it cannot be asked. Otherwise arrays on a GPU go through
        memory of the host.
    deadline : float
        Seconds that ranks wait for one another where a call says nothing else.
    """

    comm: Any
    host: Any = None
    cuda_aware: bool = False
    deadline: float = DEADLINE


class Group(NamedTuple):
    """The ranks of a communicator: its engine, its rounds if there is a way to have them, how long they wait."""

    engine: engines.Engine
    rounds: Rounds | None
    state: State
    deadline: float

    @property
    def calls_mpi(self) -> bool:
        """Whether anything of it goes through MPI."""
        return isinstance(self.engine, engines.Mpi) or (
            self.rounds is not None and isinstance(self.rounds.line, MpiLine))

    def checked(self, check: bool | None) -> Rounds | None:
        """The rounds in which the ranks agree, or None if they are not to: as `check` says, which None leaves open.

        Raises
        ------
        ValueError
            If there is no way to.
        """
        if check and self.rounds is None:
            raise ValueError(f"check=True needs a way between the hosts of the ranks, which {self.engine.name} has not "
                             "(pass densegrad.distributed.Ranks(comm, host=mpi4py.MPI.COMM_WORLD), or leave check out)")
        return self.rounds if check or check is None else None


@contextmanager
def telling(state: State, rounds: Rounds | None, deadline: float,
            errors: type[BaseException] = Exception) -> Iterator[None]:
    """Tell the other ranks of what is raised in the with block, if there is a way to, so that they raise too."""
    try:
        yield
    except errors as error:
        if rounds is not None and not state.given_up:
            state.run(partial(rounds.tell, error, deadline))
        raise


@contextmanager
def telling_ranks(comm: Any, deadline: float | None = None) -> Iterator[None]:
    """Tell the other ranks of a communicator what is raised in the with block, where there is a way to."""
    group = group_of(comm, deadline)
    with telling(group.state, group.rounds, group.deadline):
        yield


@contextmanager
def together(comm: Any, *, deadline: float | None = None) -> Iterator[None]:
    """A with block that every rank leaves in the same way: if one raises in it, all do.

    Parameters
    ----------
    comm : communicator or Ranks
        As in `all_reduce`. NCCL's needs a host's beside it.
    deadline : float, optional
        Seconds that the ranks wait for one another, at the end of the block and where one has raised: by default 60, or
        those of Ranks.

    Raises
    ------
    DistributedError
        On the other ranks, with the words of the error of the rank that raised: from the reduction that they wait in,
        or at the end of the block. Also if a rank does not come to the end of the block within the deadline.
    ValueError, TypeError
        If comm is none, or has no way between the hosts of its ranks.

    Examples
    --------
    >>> with together(comm):
    ...     grads = dense_grads(x, w, dz)
    ...     grads = all_reduce(grads, comm)
    """
    group = group_of(comm, deadline)
    rounds = group.checked(True)

    def leave() -> None:
        if rounds is not None:
            rounds.agree(Descriptor(0, "the end of a block that is left together"), group.deadline)
            rounds.hold(range(rounds.size), group.deadline)

    with telling(group.state, rounds, group.deadline, BaseException):
        yield
    group.state.run(leave)


_of_torch: WeakKeyDictionary[Any, State] = WeakKeyDictionary()
_of_mpi: dict[str, int] = {}


def group_of(comm: Any, deadline: float | None = None) -> Group:
    """The ranks of a communicator, or of Ranks.

    Raises
    ------
    TypeError
        If it is none, or the host's communicator cannot be that.
    ValueError
        If the host's communicator has other ranks, or the deadline is no number of seconds.
    DistributedError
        If the communicator was given up: an error before has left its ranks out of step.
    """
    ranks = comm if isinstance(comm, Ranks) else Ranks(comm)
    seconds = _seconds(ranks.deadline if deadline is None else deadline)
    engine = engines.engine_of(ranks.comm, ranks.cuda_aware)
    host = ranks.comm if ranks.host is None else ranks.host
    state = State()
    line: Line | None = None
    if engines.is_mpi(host):
        state = _state_of_mpi(host)
        line = MpiLine(host, state.sent)
        there = host.Get_rank(), host.Get_size()
    elif engines.is_torch(host):
        state = _of_torch.setdefault(host, State())
        line = StoreLine(host)
        there = host.rank(), host.size()
    elif ranks.host is not None:
        raise TypeError("host must be a communicator of mpi4py or a process group of torch.distributed; got "
                        f"{type(host).__name__}")
    if line is None:
        return Group(engine, None, state, seconds)
    if there != (engine.rank, engine.size):
        raise ValueError(f"host must have the ranks of comm in their order; this is rank {engine.rank} of "
                         f"{engine.size} in comm and rank {there[0]} of {there[1]} in host")
    if state.given_up:
        raise DistributedError(f"rank {engine.rank} has given this communicator up, since what is still on its way may "
                               f"be taken for something else (end the job): {state.given_up}", (engine.rank,))
    return Group(engine, Rounds(line, engine.rank, engine.size, state), state, seconds)


def _seconds(deadline: Any) -> float:
    if isinstance(deadline, bool) or not isinstance(deadline, (int, float)):
        raise TypeError(f"deadline must be a number of seconds; got {deadline!r}")
    if not 0 < deadline <= MOST_SECONDS:
        raise ValueError(f"deadline must be more than 0 seconds and at most {MOST_SECONDS}; got {deadline!r}")
    return float(deadline)


def _state_of_mpi(comm: Any) -> State:
    """Kept as an attribute of the communicator, which MPI drops with it."""
    if "key" not in _of_mpi:
        _of_mpi["key"] = type(comm).Create_keyval()
    state = comm.Get_attr(_of_mpi["key"])
    if state is None:
        state = State()
        comm.Set_attr(_of_mpi["key"], state)
    return state
