"""Work split over the rows of an array."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def over_rows(work: Callable[..., bool], args: tuple[Any, ...], m: int, num_threads: int) -> bool:
    """Call ``work(*args, first, end)`` for `num_threads` runs of nearly equal length that cover ``range(m)``.

    `work` without ``first, end`` covers all of it. The caller's thread takes the first run; the others get a
    thread each, which has ended on return. Nothing outlives the call, so there is nothing to survive a fork
    or to compete with other pools. Starting and joining a thread costs about 50 us.

    Returns
    -------
    bool
        Whether every call returned true. If any raised, the first run's exception is raised after every
        thread has ended.
    """
    if num_threads == 1 or m <= 1:
        return work(*args)
    return _over_runs(work, args, m, min(num_threads, m))


def _over_runs(work: Callable[..., bool], args: tuple[Any, ...], m: int, num_threads: int) -> bool:
    results: dict[int, bool] = {}
    errors: dict[int, BaseException] = {}

    def run(i: int) -> None:
        try:
            results[i] = work(*args, m * i // num_threads, m * (i + 1) // num_threads)
        except BaseException as error:
            errors[i] = error

    started: list[threading.Thread] = []
    try:
        for i in range(1, num_threads):
            thread = threading.Thread(target=run, args=(i,), name="dynquant")
            thread.start()
            started.append(thread)
        run(0)
    finally:
        for thread in started:
            thread.join()
    if errors:
        raise errors[min(errors)]
    return all(results.values())
