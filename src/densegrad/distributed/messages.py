"""What ranks tell one another before anything is sent, as bytes, and what rank 0 makes of it.

A descriptor has a fixed size, so that ranks which are about to do different things still understand one another.
"""
from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

#: what all ranks must have alike, in front: the form of messages, and the package
_FRONT = struct.Struct("<4s24s")
_MAGIC = b"dgr1"
#: of a round: its number, whether the rank goes on, two numbers of the rank's, a digest of its words, their length
_REST = struct.Struct("<QBqq16sH")
_WORDS = 960
MESSAGE_BYTES = _FRONT.size + _REST.size + _WORDS
_GOES_ON, _FAILED = 0, 1


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
