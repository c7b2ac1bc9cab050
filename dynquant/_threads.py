"""Work split over the rows of an array."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import threading


# As many as the largest machines can use. Rows may be a few bytes each, and to start a thread for each of a
# million would take minutes.
_MOST_THREADS = 1024

# More than starting and joining a thread take.
_FRAMES = 32


def parallel_ranges(work: Callable[..., bool], args: tuple[Any, ...], m: int, num_threads: int) -> bool:
    """Call ``work(*args, first, end)`` for `num_threads` runs of nearly equal length that cover ``range(m)``.

    There are at most `m` runs, and 1024. `work` without ``first, end`` covers all of it. The caller's thread
    takes the first run; the others get a thread each, which has ended on return. Nothing outlives the call,
    so there is nothing to survive a fork or to compete with other pools. Where no more threads can be started
    the caller does their share. Starting and joining a thread costs about 100 us.

    Returns
    -------
    bool
        Whether every call returned true. If any raised, the first run's exception is raised after every
        thread has ended; so is a KeyboardInterrupt that came while waiting, unless yet another comes at the
        very moment when one is noted.
    """
    if num_threads == 1 or m <= 1:
        return work(*args)
    return _over_runs(work, args, m, min(num_threads, m, _MOST_THREADS))


def _over_runs(work: Callable[..., bool], args: tuple[Any, ...], m: int, num_threads: int) -> bool:
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
                results[i] = work(*args, m * i // num_threads, m * (i + 1) // num_threads)
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
