"""How contenders are timed.

All contenders of a case take turns within one process: in each round each is sampled once, and the round
starts with another one each time. A ratio is taken within a round and its median over the rounds reported, so
that a machine that is slow for a while is slow for both sides of it.

On one thread the time is the thread's own, which leaves out what other programs take of the core; on several
it is that of the clock on the wall.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]
Clock = Callable[[], float]

SAMPLE_SECONDS = 1e-3
WARM_UP_SECONDS = 0.1
# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Contender:
    """`prepare` runs before each sample and is not timed: it selects an instruction set, or a build."""

    name: str
    call: Call
    prepare: Call = lambda: None


def sample_in_turns(contenders: list[Contender], rounds: int, threads: int = 1) -> dict[str, list[float]]:
    """Seconds of a call of each contender in each round."""
    clock = _clock(threads)
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.disable()
    repeats = {contender.name: _enough(contender, clock) for contender in contenders}
    for i in range(rounds):
        shift = i % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            contender.prepare()
            if threads > 1:
                _wait_until_idle()
            samples[contender.name].append(_sample(contender.call, repeats[contender.name], clock))
    gc.enable()
    return samples


def _clock(threads: int) -> Clock:
    """A thread's own time is too coarse on Windows."""
    return time.thread_time if threads == 1 and sys.platform != "win32" else time.perf_counter


def median_ratio(others: list[float], ours: list[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return statistics.median(other / own for other, own in zip(others, ours, strict=True))


def _wait_until_idle() -> None:
    """Until no thread of this process computes, or for half a second.

    The threads of a library spin for a while after their last task, and would take a core from the next one.
    """
    used = time.process_time()
    for _ in range(250):
        time.sleep(2e-3)
        before, used = used, time.process_time()
        if used - before < 2e-4:
            return


def _enough(contender: Contender, clock: Clock) -> int:
    """How many calls make a sample. Some first calls, which find and keep memory, are not looked at."""
    contender.prepare()
    end = time.perf_counter() + WARM_UP_SECONDS
    for _ in range(10):
        contender.call()
        if time.perf_counter() > end:
            break
    repeats = 1
    while repeats * _sample(contender.call, repeats, clock) < SAMPLE_SECONDS:
        repeats *= 2
    return repeats


def _sample(call: Call, repeats: int, clock: Clock) -> float:
    """Seconds of one call. The first is not counted: it finds the caches as another contender left them."""
    call()
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, where it is glibc's.

    Otherwise large results come from new pages in some calls and from used ones in others, depending on what
    ran before; and a page fault costs more than quantizing the page. Whoever allocates a result, as most
    peers do, is spared that here.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
