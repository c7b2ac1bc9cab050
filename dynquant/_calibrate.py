"""Statistics of activations over a calibration set."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import _core
from ._tensor import Percentile
from ._validate import as_array, as_floats, check_finite, float_rows
from .errors import DTypeError, EmptyInputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class CalibStats:
    """What a calibration set says about a layer's activations.

    Attributes
    ----------
    min, max : float
        Exact.
    mean, std_dev : float
        Mean and population standard deviation, accumulated in float64.
    p99 : float
        The 99th percentile of the magnitudes, by nearest rank as `Percentile` takes it; exact.
    suggested_scale : float
        An int8 scale: ``p99 / 127``; the largest magnitude over 127 if p99 is 0; 1/127 if all are 0. In
        float32.
    """

    min: float
    max: float
    mean: float
    std_dev: float
    p99: float
    suggested_scale: float

    @classmethod
    def collect(cls, batches: Iterable[ArrayLike]) -> CalibStats:
        """Statistics of all the elements of all the batches.

        Parameters
        ----------
        batches : iterable of array_like of floats, each of any shape
            Empty batches are passed over. All are held until the call returns, because an exact percentile
            needs every value; what comes from an iterator that may fill one buffer again and again is copied.

        Returns
        -------
        CalibStats

        Raises
        ------
        EmptyInputError
            If there is no element in any batch.
        DTypeError, NonFiniteError
            If a batch does not hold floats, or holds NaN or infinity; the argument is named ``batches[i]``,
            and the index counts within that batch.

        Notes
        -----
        Blocks of 4,096 values are merged by the formula of Chan, Golub and LeVeque, so that the deviation is
        as accurate as a float64 computation in two passes, whatever the mean is.

        Examples
        --------
        >>> stats = CalibStats.collect([[1, 2, 3], [-1, 0, 4]])
        >>> stats.min, stats.max, stats.mean, round(stats.std_dev, 4), stats.p99
        (-1.0, 4.0, 1.5, 1.7078, 4.0)
        """
        parts = _checked_parts(batches)
        n, least, most, mean, m2 = _merged_moments(parts)
        p99 = np.float32(_core.ranked_magnitude(parts, Percentile(0.99).rank(n)))
        return cls(
            min=least,
            max=most,
            mean=mean,
            std_dev=math.sqrt(m2 / n),
            p99=float(p99),
            suggested_scale=_int8_scale(p99 or np.float32(max(-least, most)) or np.float32(1)),
        )


def _int8_scale(magnitude: np.float32) -> float:
    with np.errstate(all="ignore"):
        return float(magnitude / np.float32(127))


def _checked_parts(batches: Iterable[ArrayLike]) -> list[_core.FloatRows]:
    try:
        iterator = iter(batches)
    except TypeError as error:
        raise DTypeError(f"batches: expected an iterable of arrays, got {type(batches).__name__}") from error
    kept = isinstance(batches, (list, tuple, np.ndarray))
    parts = []
    for i, batch in enumerate(iterator):
        array = as_floats(batch, f"batches[{i}]")
        if not kept and np.may_share_memory(array, as_array(batch, f"batches[{i}]")):
            array = array.copy()
        check_finite(array, f"batches[{i}]")
        if array.size:
            parts.append(float_rows(array, 1, array.size))
    if not parts:
        raise EmptyInputError("batches: expected at least one element, got none")
    return parts


def _merged_moments(parts: list[_core.FloatRows]) -> tuple[int, float, float, float, float]:
    n, least, most, mean, m2 = _core.moments(parts[0])
    for part in parts[1:]:
        n_b, least_b, most_b, mean_b, m2_b = _core.moments(part)
        total = n + n_b
        delta = mean_b - mean
        m2 += m2_b + delta * delta * (n * n_b / total)
        mean += delta * n_b / total
        n, least, most = total, min(least, least_b), max(most, most_b)
    return n, least, most, mean, m2
