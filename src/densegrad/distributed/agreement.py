"""What ranks agree on before anything is sent: in a round each says what it is about to do, and all hear one answer.

    every rank --descriptor--> rank 0 --answer--> every rank

Descriptors have a fixed size, so that ranks which are about to do different things still understand one another. Rank 0
waits for them until the deadline, and answers in any case: that all go on, or which rank raised, differs or is missing.
So either all ranks go on or all raise, with the same words. Rounds are numbered: what came too late for one is not
taken for another. A rank that hears no answer in twice the deadline raises by itself.
"""
from __future__ import annotations

import hashlib
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from .. import __version__
from ..errors import DistributedError
from . import engines
from .engines import Broken, Late

#: seconds that the ranks wait for one another, where nothing else is said
DEADLINE = 60.0
#: a week: longer ones stores of torch.distributed do not take
MOST_SECONDS = 604800
#: what all ranks must have alike, in front: the form of messages, and the package
_FRONT = struct.Struct("<4s24s")
_MAGIC = b"dgr1"
#: of a round: its number, whether the rank goes on, two numbers of the rank's, a digest of its words, their length
_REST = struct.Struct("<QBqq16sH")
_WORDS = 960
MESSAGE_BYTES = _FRONT.size + _REST.size + _WORDS
#: how much before its time a store may say that it is up
_EARLY_SECONDS = 0.1
_GOES_ON, _FAILED = 0, 1
#: attribute of an error: the communicator's state and the round in which the other ranks have heard of it
_TOLD = "densegrad_told"


class Descriptor(NamedTuple):
    """What a rank says in a round, or what rank 0 answers."""

    round: int
    words: str
    samples: int = 0
    addends: int = 0
    failed: bool = False
    version: str = ""
    digest: bytes = b""

    def packed(self) -> bytes:
        """As MESSAGE_BYTES bytes; words beyond their room count in the digest alone."""
        words = self.words.encode()
        digest, shown = hashlib.blake2b(words, digest_size=16).digest(), words[:_WORDS]
        return (_FRONT.pack(_MAGIC, self.version.encode()[:24])
                + _REST.pack(self.round, _FAILED if self.failed else _GOES_ON, self.samples, self.addends, digest,
                             len(shown)) + shown.ljust(_WORDS, b"\0"))


def unpacked(message: bytes) -> Descriptor:
    """What `packed` has packed; of another form of message the version alone, in round -1."""
    magic, version = _FRONT.unpack_from(message)
    name = version.rstrip(b"\0").decode(errors="replace")
    if magic != _MAGIC:
        return Descriptor(-1, "", version=name)
    number, status, samples, addends, digest, length = _REST.unpack_from(message, _FRONT.size)
    words = message[_FRONT.size + _REST.size:][:length].decode(errors="replace")
    return Descriptor(number, words, samples, addends, status == _FAILED, name, digest)


def problem(descriptors: Sequence[Descriptor | None], deadline: float) -> tuple[str, tuple[int, ...]]:
    """Why the ranks cannot go on, and which ranks are the reason; nothing if they can. None is who did not come."""
    failed = [rank for rank, one in enumerate(descriptors) if one is not None and one.failed]
    if failed:
        one = descriptors[failed[0]]
        return f"{_named(failed)} failed: {one.words if one else ''}", tuple(failed)
    missing = [rank for rank, one in enumerate(descriptors) if one is None]
    if missing:
        return (f"{_named(missing)} did not come within {deadline:g} s (call the same functions on every rank, or pass "
                "a longer deadline=)", tuple(missing))
    come = [one for one in descriptors if one is not None]
    for what, key, cure in (
            ("densegrad's version", lambda one: one.version, "install the same everywhere"),
            ("what is reduced", lambda one: one.digest, "pass the same shapes, dtypes and options on every rank")):
        keys = [key(one) for one in come]
        usual = Counter(keys).most_common(1)[0][0]  # of equally many that of the lowest rank
        others = [rank for rank, one in enumerate(keys) if one != usual]
        if others:
            most, other = keys.index(usual), others[0]
            said = [come[rank].words or "nothing readable" for rank in (most, other)]
            if what != "what is reduced":
                said = [come[rank].version for rank in (most, other)]
            return (f"the ranks differ in {what}: {_named(others)} has {said[1]}; rank {most} has {said[0]} ({cure})",
                    tuple(others))
    return "", ()


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


class Numbers(NamedTuple):
    """What every rank said in a round, by rank."""

    samples: tuple[int, ...]
    addends: tuple[int, ...]


class Answer(NamedTuple):
    """What rank 0 answers: that all go on, with every rank's numbers, or the words of what all raise."""

    round: int
    words: str
    ranks: tuple[int, ...]
    came: tuple[bool, ...]
    numbers: Numbers

    def packed(self) -> bytes:
        """As a message of `answer_bytes(size)` bytes."""
        size = len(self.came)
        blamed = [rank in self.ranks for rank in range(size)]
        return Descriptor(self.round, self.words, failed=bool(self.words)).packed() + struct.pack(
            f"<{2 * size}q{2 * size}?", *self.numbers.samples, *self.numbers.addends, *blamed, *self.came)


def answer_bytes(size: int) -> int:
    """How long an answer is to so many ranks."""
    return MESSAGE_BYTES + 18 * size


def unpacked_answer(message: bytes) -> Answer:
    """What `Answer.packed` has packed."""
    front = unpacked(message)
    size = (len(message) - MESSAGE_BYTES) // 18
    values = struct.unpack(f"<{2 * size}q{2 * size}?", message[MESSAGE_BYTES:])
    samples, addends, blamed, came = (values[begin:begin + size] for begin in range(0, 4 * size, size))
    return Answer(front.round, front.words, tuple(rank for rank in range(size) if blamed[rank]), came,
                  Numbers(samples, addends))


class Line(Protocol):
    """How descriptors and answers go between ranks. Rank 0 collects and publishes, the others submit and hear."""

    def submit(self, round: int, message: bytes) -> None:
        """Send this rank's descriptor to rank 0, without waiting."""

    def collect(self, round: int, ranks: Sequence[int], until: float) -> dict[int, bytes]:
        """The descriptors of this round of these ranks, as far as they come in time."""

    def publish(self, round: int, message: bytes) -> None:
        """Send an answer to every other rank, without waiting."""

    def hear(self, round: int, until: float) -> bytes:
        """The answer of this round.

        Raises
        ------
        Late
            If there is none at the time `until`.
        """


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


class MpiLine:
    """By messages of MPI, on tags of their own."""

    def __init__(self, comm: Any, state: State):
        self.comm, self.state, self.size = comm, state, comm.Get_size()

    def submit(self, round: int, message: bytes) -> None:
        """As Line says."""
        self._send(message, 0, engines.DESCRIPTOR_TAG)

    def publish(self, round: int, message: bytes) -> None:
        """As Line says."""
        for rank in range(1, self.size):
            self._send(message, rank, engines.ANSWER_TAG)

    def _send(self, message: bytes, to: int, tag: int) -> None:
        self.state.sent = [request for request in self.state.sent if not _is_done(request)]
        self.state.sent.append(self.comm.Isend(bytearray(message), to, tag))

    def collect(self, round: int, ranks: Sequence[int], until: float) -> dict[int, bytes]:
        """As Line says."""
        found: dict[int, bytes] = {}
        expected = {rank: self._expect(MESSAGE_BYTES, rank, engines.DESCRIPTOR_TAG) for rank in ranks}

        def all_are_here() -> bool:
            for rank, (request, message) in [*expected.items()]:
                if _is_done(request):
                    if _is_of_before(message, round):
                        expected[rank] = self._expect(MESSAGE_BYTES, rank, engines.DESCRIPTOR_TAG)
                    else:
                        found[rank] = bytes(message)
                        del expected[rank]
            return not expected

        try:
            engines.poll(all_are_here, until)
        except Late:
            for request, _ in expected.values():
                _cancel(request)
        return found

    def hear(self, round: int, until: float) -> bytes:
        """As Line says."""
        expected = [self._expect(answer_bytes(self.size), 0, engines.ANSWER_TAG)]

        def it_is_here() -> bool:
            request, message = expected[0]
            if not _is_done(request):
                return False
            if not _is_of_before(message, round):
                return True
            expected[0] = self._expect(answer_bytes(self.size), 0, engines.ANSWER_TAG)
            return False

        try:
            engines.poll(it_is_here, until)
        except Late:
            _cancel(expected[0][0])
            raise
        return bytes(expected[0][1])

    def _expect(self, size: int, source: int, tag: int) -> tuple[Any, bytearray]:
        message = bytearray(size)
        return self.comm.Irecv(message, source, tag), message


def _is_done(request: Any) -> bool:
    """Whether a request of MPI is done; Broken if MPI says that it never will be."""
    try:
        return request.Test()
    except sys.modules["mpi4py.MPI"].Exception as error:
        raise Broken(f"MPI says: {error}") from error


def _is_of_before(message: bytes | bytearray, round: int) -> bool:
    return 0 <= unpacked(bytes(message)).round < round


def _cancel(request: Any) -> None:
    request.Cancel()
    request.Wait()  # of a receive that is cancelled, or done after all: at once


class StoreLine:
    """By the store through which a process group of torch.distributed has found its ranks."""

    def __init__(self, group: Any):
        self.store = sys.modules["torch.distributed"].distributed_c10d._get_default_store()
        self.rank = group.rank()
        self.prefix = f"densegrad/{group.group_name}"

    def submit(self, round: int, message: bytes) -> None:
        """As Line says."""
        self.store.set(self._descriptor(round, self.rank), message)

    def publish(self, round: int, message: bytes) -> None:
        """As Line says; what two rounds before was published every rank has heard, or never will."""
        self.store.set(self._answer(round), message)
        self.store.delete_key(self._answer(round - 2))

    def collect(self, round: int, ranks: Sequence[int], until: float) -> dict[int, bytes]:
        """As Line says."""
        keys = {rank: self._descriptor(round, rank) for rank in ranks}
        if not self._wait([*keys.values()], until):
            keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
        found = {rank: self.store.get(key) for rank, key in keys.items()}
        for key in keys.values():
            self.store.delete_key(key)
        return found

    def hear(self, round: int, until: float) -> bytes:
        """As Line says."""
        if not self._wait([self._answer(round)], until):
            raise Late
        return self.store.get(self._answer(round))

    def _wait(self, keys: list[str], until: float) -> bool:
        """Whether all of them are there in time."""
        if not keys:
            return True
        try:
            _within(partial(self.store.wait, keys, timedelta(seconds=max(until - time.monotonic(), 1e-3))), until)
        except Late:
            return False
        except RuntimeError:
            if time.monotonic() < until - _EARLY_SECONDS:
                raise
            return False
        return True

    def _descriptor(self, round: int, rank: int) -> str:
        return f"{self.prefix}/{round}/{rank}"

    def _answer(self, round: int) -> str:
        return f"{self.prefix}/{round}/answer"


def _within(work: Callable[[], Any], until: float) -> None:
    """Do it on a thread that is left behind if it is not done in time: a store whose host hangs never answers.

    Raises
    ------
    Late
        If it is not.
    """
    done: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)

    Thread(target=run, daemon=True).start()
    try:
        error = done.get(timeout=max(until - time.monotonic(), 0) + _EARLY_SECONDS)
    except Empty:
        raise Late from None
    if error is not None:
        raise error


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
        line = MpiLine(host, state)
        place = host.Get_rank(), host.Get_size()
    elif engines.is_torch(host):
        state = _of_torch.setdefault(host, State())
        line = StoreLine(host)
        place = host.rank(), host.size()
    elif ranks.host is not None:
        raise TypeError("host must be a communicator of mpi4py or a process group of torch.distributed; got "
                        f"{type(host).__name__}")
    if line is None:
        return Group(engine, None, state, seconds)
    if place != (engine.rank, engine.size):
        raise ValueError(f"host must have the ranks of comm in their order; this is rank {engine.rank} of "
                         f"{engine.size} in comm and rank {place[0]} of {place[1]} in host")
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
