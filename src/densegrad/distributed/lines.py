"""How descriptors and answers go between ranks: by messages of MPI, or by the store of torch.distributed."""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Protocol

from .engines import ANSWER_TAG, DESCRIPTOR_TAG, Broken, Late, poll
from .messages import MESSAGE_BYTES, answer_bytes, unpacked

#: how much before its time a store may say that it is up
_EARLY_SECONDS = 0.1


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


class MpiLine:
    """By messages of MPI, on tags of their own."""

    def __init__(self, comm: Any, sent: list[Any]):
        self.comm, self.size = comm, comm.Get_size()
        self.sent = sent  # of this communicator, whichever line sent it, until it is done

    def submit(self, round: int, message: bytes) -> None:
        """As Line says."""
        self._send(message, 0, DESCRIPTOR_TAG)

    def publish(self, round: int, message: bytes) -> None:
        """As Line says."""
        for rank in range(1, self.size):
            self._send(message, rank, ANSWER_TAG)

    def _send(self, message: bytes, to: int, tag: int) -> None:
        self.sent[:] = [request for request in self.sent if not _is_done(request)]
        self.sent.append(self.comm.Isend(bytearray(message), to, tag))

    def collect(self, round: int, ranks: Sequence[int], until: float) -> dict[int, bytes]:
        """As Line says."""
        found: dict[int, bytes] = {}
        expected = {rank: self._expect(MESSAGE_BYTES, rank, DESCRIPTOR_TAG) for rank in ranks}

        def all_are_here() -> bool:
            for rank, (request, message) in [*expected.items()]:
                if _is_done(request):
                    if _is_of_before(message, round):
                        expected[rank] = self._expect(MESSAGE_BYTES, rank, DESCRIPTOR_TAG)
                    else:
                        found[rank] = bytes(message)
                        del expected[rank]
            return not expected

        try:
            poll(all_are_here, until)
        except Late:
            for request, _ in expected.values():
                _cancel(request)
        return found

    def hear(self, round: int, until: float) -> bytes:
        """As Line says."""
        expected = [self._expect(answer_bytes(self.size), 0, ANSWER_TAG)]

        def it_is_here() -> bool:
            request, message = expected[0]
            if not _is_done(request):
                return False
            if not _is_of_before(message, round):
                return True
            expected[0] = self._expect(answer_bytes(self.size), 0, ANSWER_TAG)
            return False

        try:
            poll(it_is_here, until)
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
