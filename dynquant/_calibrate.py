"""Statistics of activations over a calibration set."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._format import Percentile
from ._validate import as_array, as_floats, check_finite, float_matrix
from .errors import DTypeError, EmptyInputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# Bins of the magnitudes of a whole set: the top 16 of their 31 bits. Those of infinity and NaN stay empty.
BINS = 1 << 16
BIN_SHIFT = 15
_FINITE_BINS = 0x7F800000 >> BIN_SHIFT


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
        By contract ``p99 / 127``; the largest magnitude over 127 if p99 is 0; 1/127 if all are 0. In float32.
        One percent of the values saturate with it, which as the one static scale of a layer's inputs is
        often far too much: see the notes.

    Notes
    -----
    A static scale of the inputs of a real layer (`up` of the block in ``bench/data``, W8A8, unseen tokens)
    leaves an output SQNR of 15.9 dB where it is `suggested_scale`, 23.2 dB where it is the largest magnitude
    over 127, and 34.5 dB where it is p99.99 over 127. So take a high percentile of a `Calibrator`,
    ``calibrator.percentile(0.9999) / 127``, and look at other data; or quantize dynamically, which is 38.7 dB
    with a scale for each row.
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
            An array of numbers is one batch, and so is a list or tuple of plain numbers. Empty batches are
            passed over. All are held until the call returns, because an exact percentile needs every value;
            what comes from an iterator that may fill one buffer again and again is copied.

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
            suggested_scale=int8_scale(p99 or np.float32(max(-least, most)) or np.float32(1)),
        )


def bin_edges() -> NDArray[np.float64]:
    """The edges of the bins that finite magnitudes may be in."""
    edges = (np.arange(_FINITE_BINS, dtype=np.int32) << BIN_SHIFT).view(np.float32)
    return np.append(edges.astype(np.float64), 2.0**128)


def mean_and_variance(n: int, sums: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and population variance from the pairs of sums of the values and of their squares."""
    from fractions import Fraction  # here, because importing it takes time that few need

    total, rest, squares, squares_rest = map(Fraction, sums.tolist())
    mean = (total + rest) / n
    # In exact arithmetic: a large mean cancels against the squares without a trace.
    return float(mean), float((squares + squares_rest) / n - mean * mean)


def int8_scale(magnitude: np.float32) -> float:
    with np.errstate(all="ignore"):
        return float(magnitude / np.float32(127))


def _checked_parts(batches: Iterable[ArrayLike]) -> list[_core.FloatMatrix]:
    batches = _as_batches(batches)
    try:
        iterator = iter(batches)
    except TypeError as error:
        raise _not_batches(batches) from error
    kept = isinstance(batches, (list, tuple, np.ndarray))
    parts = []
    for i, batch in enumerate(iterator):
        array = as_floats(batch, f"batches[{i}]")
        if not kept and np.may_share_memory(array, as_array(batch, f"batches[{i}]")):
            array = array.copy()
        check_finite(array, f"batches[{i}]")
        if array.size:
            parts.append(float_matrix(array, 1, array.size))
    if not parts:
        raise EmptyInputError("batches: expected at least one element, got none")
    return parts


def _as_batches(batches: Any) -> Any:
    """`batches` itself, or numbers that it holds, in an array or a list, as one batch.

    Taken one by one they would be a thousand times as slow.
    """
    if _is_array(batches):
        array = as_array(batches, "batches")
        if array.ndim == 0:
            raise _not_batches(batches)
        return array if array.dtype == object else [array]
    if isinstance(batches, (list, tuple)) and all(isinstance(x, (int, float)) for x in batches):
        return [batches]
    return batches


def _not_batches(x: Any) -> DTypeError:
    return DTypeError(f"batches: expected an iterable of arrays, got {type(x).__name__}")


def _is_array(x: Any) -> bool:
    if hasattr(x, "__array__"):
        return True
    try:
        memoryview(x)
    except TypeError:
        return False
    return True


def _merged_moments(parts: list[_core.FloatMatrix]) -> tuple[int, float, float, float, float]:
    n, least, most, mean, m2 = _core.moments(parts[0])
    for part in parts[1:]:
        n_b, least_b, most_b, mean_b, m2_b = _core.moments(part)
        total = n + n_b
        delta = mean_b - mean
        m2 += m2_b + delta * delta * (n * n_b / total)
        mean += delta * n_b / total
        n, least, most = total, min(least, least_b), max(most, most_b)
    return n, least, most, mean, m2
