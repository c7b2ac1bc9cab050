"""How many threads a call may use; and threads of Python, for systems without POSIX threads.

Elsewhere the threads are those of the pool in core/pool.h.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import ParameterError

if TYPE_CHECKING:
    import threading


VARIABLE = "DYNQUANT_NUM_THREADS"

# As many as the kernels take; more would be slower on the largest machines.
MAX_THREADS = 256

# More than starting and joining a thread take.
_FRAMES = 32


@functools.cache
def default_threads() -> int:
    """What ``num_threads=-1`` stands for: ``DYNQUANT_NUM_THREADS``, or the CPUs that this process may use.

    These are the ones that it is bound to, but no more than its control groups have the time of. Looked at
    when first asked for.

    Raises
    ------
    ParameterError
        If ``DYNQUANT_NUM_THREADS`` is set to anything but a positive integer.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if not given:
        return max(1, min(_cpus(), math.ceil(_cpu_quota()), MAX_THREADS))
    if not (given.isascii() and given.isdigit() and int(given)):
        raise ParameterError(f"{VARIABLE}: expected an int >= 1, got {given!r}")
    return min(int(given), MAX_THREADS)


def _cpus() -> int:
    """The CPUs that the process is bound to."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_quota(root: str = "/sys/fs/cgroup", groups: str = "/proc/self/cgroup") -> float:
    """CPUs whose time the control groups of this process have, version 1 or 2; MAX_THREADS without a limit.

    A group's limit holds for the groups inside it, so the least limit on the way counts. In a container the
    path of the group is often that outside, while `root` is the group itself.
    """
    quota = float(MAX_THREADS)
    for line in _text(groups).splitlines():
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for base in (root, *(f"{root}/{name}" for name in ("cpu", "cpu,cpuacct") if controllers)):
            parts = [part for part in path.split("/") if part]
            for depth in range(len(parts) + 1):
                quota = min(quota, _quota_of("/".join([base, *parts[:depth]])))
    return quota


def _quota_of(folder: str) -> float:
    """The limit of one control group, in CPUs."""
    numbers = _text(f"{folder}/cpu.max").split()
    if not numbers:
        numbers = [_text(f"{folder}/cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    try:
        quota, period = map(int, numbers)
    except ValueError:  # "max", or no such files
        return MAX_THREADS
    return quota / period if quota > 0 and period > 0 else MAX_THREADS


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def run_in_threads(work: Callable[[int, int], bool], n: int, num_threads: int) -> bool:
    """Call ``work(first, end)`` for `num_threads` ranges of nearly equal length that cover ``range(n)``.

    The caller's thread takes the first range; the others get a thread each, which has ended on return.
    Nothing outlives the call, so there is nothing to survive a fork or to compete with other pools. Where no
    more threads can be started the caller does their share. Starting and joining a thread costs about 100 us.

    Returns
    -------
    bool
        Whether every call returned true. If any raised, the first range's exception is raised after every
        thread has ended; so is a KeyboardInterrupt that came while waiting, unless yet another comes at the
        very moment when one is noted.
    """
    import threading  # here, because most programs never ask for threads and imports are to be short

    _call_nested(_FRAMES)
    claims = [threading.Lock() for _ in range(num_threads)]
    results: dict[int, bool] = {}
    errors: dict[int, BaseException] = {}
    interrupts: list[BaseException] = []

    def run(i: int) -> None:
        with claims[i]:
            if i in results or i in errors or interrupts:
                return
            try:
                results[i] = work(n * i // num_threads, n * (i + 1) // num_threads)
            except BaseException as error:
                errors[i] = error

    threads: list[threading.Thread] = []
    try:
        for i in range(1, num_threads):
            threads.append(threading.Thread(target=run, args=(i,), name="dynquant"))
            threads[-1].start()
    except (RuntimeError, MemoryError):  # no more threads to be had: the caller does their share
        pass
    except BaseException as interrupt:
        interrupts.append(interrupt)
    _insist(interrupts, run, 0)
    for thread in threads:
        _insist(interrupts, _join, thread)
    # What no thread has begun, and what one has whose start was interrupted.
    for i in range(1, num_threads):
        _insist(interrupts, run, i)
    if errors or interrupts:
        raise errors[min(errors)] if errors else interrupts[0]
    return all(results.values())


def _call_nested(depth: int) -> None:
    """Raise RecursionError if the stack is too full: while threads work nothing could be waited for."""
    if depth:
        _call_nested(depth - 1)


def _join(thread: threading.Thread) -> None:
    if thread.is_alive():
        thread.join()


def _insist(interrupts: list[BaseException], call: Callable[[Any], None], arg: Any) -> None:
    """``call(arg)`` until it comes to its end; what interrupts it is kept."""
    while True:
        try:
            return call(arg)
        except BaseException as interrupt:
            interrupts.append(interrupt)
