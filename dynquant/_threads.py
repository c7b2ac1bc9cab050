"""Work split over the rows of an array."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def map_rows(work: Callable[..., T], m: int, num_threads: int, *args: Any) -> list[T]:
    """``work(*args, first, end)`` for `num_threads` runs of nearly equal length that cover ``range(m)``.

    The caller's thread takes the first run; the others get a thread each, which has ended on return. Nothing
    outlives the call, so there is nothing to survive a fork or to compete with other pools. Starting and
    joining a thread costs about 50 us.

    Returns
    -------
    list
        What `work` returned, in the order of the rows. If it raised, the first run's exception is raised
        after every thread has ended.
    """
    if num_threads == 1 or m <= 1:
        return [work(*args, 0, m)]
    num_threads = min(num_threads, m)
    results: dict[int, T] = {}
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
    return [results[i] for i in range(num_threads)]
