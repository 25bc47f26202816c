"""How long the simulator takes for launches: pure, from their threads and from what each of them goes through.

Calibrated on 2026-11-29 on two cores of an x86-64 server with Python 3.11, by the CPU time of launches of 60 to 22,000
threads; another machine takes half or twice as long.
"""
from __future__ import annotations

import math
from collections.abc import Iterable

from .launches import Clear, Launch

#: microseconds of a thread: without barriers 140 (add_parts), with the few of a sum about 400
THREAD = {"add_parts": 140, "matmul_simt": 850}
THREAD_WITH_BARRIERS = 400
#: microseconds that each step along the depth adds to a thread of a product, barriers included
DEPTH_STEP = {"matmul_simt": 18, "matmul_tensor_core": 8}


def simulated_seconds(launches: Iterable[Launch | Clear]) -> float:
    """About how long the simulator takes for these launches, in seconds."""
    return sum(_seconds(launch) for launch in launches if isinstance(launch, Launch))


def _seconds(launch: Launch) -> float:
    depth = getattr(launch.arguments, "depth_per_part", 0)
    of_thread = THREAD.get(launch.kernel, THREAD_WITH_BARRIERS) + DEPTH_STEP.get(launch.kernel, 0) * depth
    return math.prod(launch.grid) * launch.block * of_thread / 1e6


def duration(seconds: float) -> str:
    """A time in words, as precise as an estimate is."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
