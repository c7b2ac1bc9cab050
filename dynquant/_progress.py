"""Progress of calls that take long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import ParameterError, shown


def reporter(progress: Any, unit: str) -> Callable[[int, int], object]:
    """What is called with how much is done, and of how much: a callable, or with True a bar of tqdm."""
    if progress is None or progress is False:
        return lambda done, n: None
    if progress is not True:
        if not callable(progress):
            raise ParameterError(f"progress: expected a bool or a callable, got {shown(progress)}")
        result: Callable[[int, int], object] = progress
        return result
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return lambda done, n: None
    bars: list[Any] = []

    def show(done: int, n: int) -> None:
        if not bars:
            bars.append(tqdm(total=n, initial=done, unit=unit, unit_scale=True))
        bars[0].update(done - bars[0].n)
        if done == n:
            bars[0].close()

    return show
