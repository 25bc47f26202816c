"""Timing by CUDA events, so that neither Python nor a warm cache is measured by mistake.

A sample is several calls in a row on buffers of their own, between two events. The GPU is given other work first, a
copy of more memory than its cache holds, so that all calls are queued before the first one starts and none finds its
operands in L2. Samples of the implementations take turns. A `Clock` stands between this and the GPU.
"""
from __future__ import annotations

import itertools
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol


class Clock(Protocol):
    """Time on the GPU and beside it, in seconds."""

    l2_bytes: int
    device: str  # as nvidia-smi's --id takes it

    def now(self) -> float:
        """On the host."""

    def occupy(self, seconds: float) -> None:
        """Queue other work for at least so long, which leaves nothing of the operands in L2."""

    def mark(self) -> Any:
        """Queue an event."""

    def passed(self, mark: Any) -> bool:
        """Whether the GPU has got to an event."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two events; waits for the second."""


class GpuClock:
    """CUDA events on the current stream of CuPy, whose module it is given."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        runtime = cupy.cuda.runtime
        self.device = runtime.deviceGetPCIBusId(runtime.getDevice())
        self.l2_bytes = runtime.getDeviceProperties(runtime.getDevice()).get("l2CacheSize", 0) or 2 ** 26
        self._from, self._to = (cupy.empty(2 * self.l2_bytes, "uint8") for _ in range(2))
        self._copy_seconds = 0.0
        for _ in range(8):
            start = self.mark()
            cupy.copyto(self._to, self._from)
            self._copy_seconds = self.seconds(start, self.mark())

    def now(self) -> float:
        """On the host."""
        return time.perf_counter()

    def occupy(self, seconds: float) -> None:
        """Queue copies."""
        for _ in range(1 + int(seconds / self._copy_seconds)):
            self._cupy.copyto(self._to, self._from)

    def mark(self) -> Any:
        """Queue an event."""
        event = self._cupy.cuda.Event()
        event.record()
        return event

    def passed(self, mark: Any) -> bool:
        """Whether the GPU has got to an event."""
        return mark.done

    def seconds(self, start: Any, end: Any) -> float:
        """Between two events; waits for the second."""
        end.synchronize()
        return self._cupy.cuda.get_elapsed_time(start, end) / 1000


@dataclass(frozen=True)
class Effort:
    """How much time is spent on an implementation of a case."""

    warm_up: float = 0.2  # seconds
    sample: float = 0.005  # seconds of a sample, about
    samples: int = 20
    calls: int = 50  # of a sample, at most


QUICK = Effort(warm_up=0.02, sample=0.001, samples=5, calls=10)


@dataclass
class Timed:
    """Samples of one implementation: seconds a call on the GPU, and of Python."""

    calls: int  # of a sample
    gpu: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    waited: bool = False  # whether the GPU may have waited for Python, so that its time may include some of Python's

    def quantile(self, share: float) -> float:
        """Of the GPU's seconds: between the two samples nearest to this share of them."""
        ordered = sorted(self.gpu)
        position = share * (len(ordered) - 1)
        lower = int(position)
        upper = min(lower + 1, len(ordered) - 1)
        return ordered[lower] + (position - lower) * (ordered[upper] - ordered[lower])

    @property
    def host_median(self) -> float:
        """Python's seconds a call."""
        return statistics.median(self.host)


def warm_up(clock: Clock, call: Callable[[], Any], effort: Effort) -> float:
    """Call for a while; the GPU's seconds a call, roughly."""
    begun, more, seconds = clock.now(), 1, 0.0
    while True:
        start = clock.mark()
        for _ in range(more):
            call()
        seconds = clock.seconds(start, clock.mark()) / more
        if clock.now() - begun >= effort.warm_up:
            return seconds
        more = max(1, min(10, int(effort.warm_up / max(seconds, 1e-9))))


def calls_of_a_sample(seconds: float, effort: Effort) -> int:
    """How many calls of so many seconds."""
    return max(1, min(effort.calls, round(effort.sample / max(seconds, 1e-9))))


def sets_of_buffers(clock: Clock, calls: int, nbytes: int) -> int:
    """How many sets of buffers, of so many bytes each, calls rotate over: enough to fill the cache thrice."""
    return max(1, min(calls, -(-3 * clock.l2_bytes // nbytes)))


def sample(clock: Clock, timed: Timed, calls: Sequence[Callable[[], Any]]) -> None:
    """Add one sample, over the buffers of these calls in turn."""
    wait = 2 * timed.calls * (timed.host[-1] if timed.host else 0.0)
    for attempt in range(4):
        clock.occupy(wait)
        start, begun = clock.mark(), clock.now()
        for call in itertools.islice(itertools.cycle(calls), timed.calls):
            call()
        host = clock.now() - begun
        early = clock.passed(start)
        seconds = clock.seconds(start, clock.mark())
        if not early or attempt == 3:
            break
        wait = 2 * max(wait, host)
    timed.gpu.append(seconds / timed.calls)
    timed.host.append(host / timed.calls)
    timed.waited |= early


def interleaved(names: Sequence[str], samples: int) -> Iterator[str]:
    """Each name so many times, in turns that begin with another one every time."""
    for turn in range(samples):
        first = turn % len(names)
        yield from (*names[first:], *names[:first])


@dataclass
class Clocks:
    """What nvidia-smi says of the clocks meanwhile, in MHz; 0 where it is not there or says nothing."""

    multiprocessor: float = 0.0
    memory: float = 0.0


@contextmanager
def watched(device: str) -> Iterator[Clocks]:
    """Medians of the clocks, known after the with block."""
    clocks, tool = Clocks(), shutil.which("nvidia-smi")
    if tool is None:
        yield clocks
        return
    watch = subprocess.Popen(
        [tool, f"--id={device}", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits", "--loop-ms=50"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield clocks
    finally:
        watch.terminate()
        output, _ = watch.communicate()
        read = [line.split(",") for line in output.splitlines()]
        numbers = [(float(pair[0]), float(pair[1])) for pair in read
                   if len(pair) == 2 and all(part.strip().isdigit() for part in pair)]
        if numbers:
            clocks.multiprocessor, clocks.memory = (statistics.median(column) for column in zip(*numbers, strict=True))
