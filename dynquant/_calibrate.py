"""Statistics of activations over a calibration set."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from . import _core
from ._format import Percentile
from ._npz import NpzReader, write_npz
from ._validate import (
    F32,
    as_array,
    as_count,
    as_floats,
    as_path,
    check_finite,
    float_matrix,
    raise_non_finite,
)
from .errors import DTypeError, EmptyInputError, ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    import os

    from numpy.typing import ArrayLike, NDArray

# Bins of the whole set: the top 16 of 31 magnitude bits. Those of infinity and NaN stay empty.
_BINS = 1 << 16
_BIN_SHIFT = 15
_FINITE_BINS = 0x7F800000 >> _BIN_SHIFT
_WINDOW = _core.BINS_PER_CHANNEL

_MOST_ELEMENTS = 2**63 - 1
_MOST_ROWS = 2**32 - 1
# So that their counts, of 4 bytes each, can be addressed.
_MOST_CHANNELS = _MOST_ELEMENTS // (4 * _WINDOW)

_FORMAT_VERSION = 1
_MEMBERS = ("calibrator", "extremes", "sums", "counts", "channel_amax", "channel_counts")


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
            suggested_scale=_int8_scale(p99 or np.float32(max(-least, most)) or np.float32(1)),
        )


def _int8_scale(magnitude: np.float32) -> float:
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


class Calibrator:
    """Statistics of a calibration set that is never held: batches stream through bounded memory.

    Parameters
    ----------
    channels : int, optional
        Length of the last axis of every batch. With it the statistics of each channel are kept too, of which
        SmoothQuant factors are made.

    Raises
    ------
    ParameterError
        If `channels` is no int above 0, or more than can be addressed.

    Notes
    -----
    Memory is fixed, whatever streams through: 512 KiB, and 364 bytes for each channel.

    *Percentiles* come from counts in bins of the float32 magnitude: its exponent and the first 8 bits of its
    fraction for the whole set, 3 bits for a channel. The bin that holds the nearest rank is found exactly,
    and its middle is the answer, at most the largest magnitude:

    =========  =================================================================================
    whole set  off by at most 2**-9 of the exact value
    channel    off by at most 2**-4 of the exact value; one below 2**-11 of the channel's largest
               magnitude is off by at most that, because what lies so low is not told apart
    =========  =================================================================================

    Below 2**-126, where float32 itself loses digits, the whole set's are off by at most 2**-134 and a
    channel's by at most 2**-129; magnitudes under those bounds count as 0.

    *Counts, extremes and all percentiles* are the same to the bit in whatever order and batches the elements
    come, and through whatever tree of merges. *Mean and deviation* are kept as the sums of the values and of
    their squares, each in two doubles; blocks of 4,096 values add to them without the cancellation that sums
    of squares are known for, since only the squared deviations from the block's mean are ever rounded. Order
    moves the deviation by less than 1e-12 of itself, and the mean by less than 1e-12 of the deviation and
    the mean together, however large the mean is.

    float32, float16 and bfloat16 are read where they lie. A set may hold 2**63 - 1 elements, and with
    `channels` 2**32 - 1 rows.

    Several threads may not use one calibrator at the same time. Give each its own and merge them: `update`
    releases the GIL.

    Examples
    --------
    >>> calibrator = Calibrator(channels=2)
    >>> calibrator.update([[1.0, -30.0], [2.0, 0.5]])
    >>> calibrator.update([[3.0, 0.5]])
    >>> calibrator.stats().min, calibrator.count, calibrator.channel_amax()
    (-30.0, 6, array([ 3., 30.], dtype=float32))
    """

    __slots__ = (
        "_channel_amax",
        "_channel_counts",
        "_channels",
        "_counts",
        "_extremes",
        "_size",
        "_state",
        "_sums",
    )

    def __init__(self, channels: int | None = None) -> None:
        self._channels = None if channels is None else as_count(channels, "channels")
        if self._channels is not None and self._channels > _MOST_CHANNELS:
            raise ParameterError(f"channels: expected an int <= {_MOST_CHANNELS}, got {shown(channels)}")
        self._hold(
            np.zeros(1, np.int64),
            np.array([np.inf, -np.inf], F32),
            np.zeros(4),
            np.zeros(_BINS, np.int64),
            np.zeros(self._channels or 0, F32),
            np.zeros((self._channels or 0, _WINDOW), np.uint32),
        )

    def _hold(
        self,
        size: NDArray[np.int64],
        extremes: NDArray[np.float32],
        sums: NDArray[np.float64],
        counts: NDArray[np.int64],
        channel_amax: NDArray[np.float32],
        channel_counts: NDArray[np.uint32],
    ) -> None:
        self._size, self._extremes, self._sums, self._counts = size, extremes, sums, counts
        self._channel_amax, self._channel_counts = channel_amax, channel_counts
        amax_bits = channel_amax.view(np.int32)
        self._state = _core.CalibratorState(size, extremes, sums, counts, amax_bits, channel_counts)

    @property
    def channels(self) -> int | None:
        """Length of the last axis of every batch, if the channels are kept apart."""
        return self._channels

    @property
    def count(self) -> int:
        """How many elements have been seen."""
        return int(self._size[0])

    def __repr__(self) -> str:
        return f"Calibrator(channels={self._channels}, count={self.count})"

    def update(self, batch: ArrayLike) -> None:
        """Add a batch.

        Parameters
        ----------
        batch : array_like of floats, any shape; (..., channels) if channels are kept
            May be empty.

        Raises
        ------
        ShapeMismatchError
            If the last axis is not as long as there are channels.
        DTypeError, NonFiniteError
            If `batch` does not hold floats, or holds NaN or infinity.
        ParameterError
            If there would be more elements than can be counted.

        Notes
        -----
        A call that raises leaves the calibrator as it was.
        """
        array = as_floats(batch, "batch")
        k = self._channels or array.size
        if self._channels and array.shape[-1:] != (k,):
            raise ShapeMismatchError(f"(..., {k})", array.shape, "batch")
        self._check_room(array.size, "batch")
        x = float_matrix(array, array.size // k if k else 0, k)
        amax = self._channel_amax.copy()
        if self._channels:
            _core.column_amax(x, amax.view(np.int32))
        # Where channels are kept, they show what is not finite.
        if not (np.isfinite(amax).all() if self._channels else _core.all_finite(x)):
            raise_non_finite(array, "batch")
        self._state.update(x, amax.view(np.int32))

    def _check_room(self, n: int, name: str) -> None:
        most = _MOST_ROWS * self._channels if self._channels else _MOST_ELEMENTS
        if self.count + n > most:
            raise ParameterError(
                f"{name}: expected at most {most - self.count} more elements, which is what can be counted, "
                f"got {n}"
            )

    def merge(self, other: Calibrator) -> None:
        """Add all that another calibrator has seen, in this process or elsewhere.

        Parameters
        ----------
        other : Calibrator
            With the same `channels`. It stays as it is.

        Raises
        ------
        ParameterError
            If `other` is no Calibrator or has other channels, or both have seen more than can be counted.

        Examples
        --------
        >>> calibrator, other = Calibrator(), Calibrator()
        >>> calibrator.update([1.0, 2.0])
        >>> other.update([-4.0])
        >>> calibrator.merge(other)
        >>> calibrator.stats().min, calibrator.count
        (-4.0, 3)
        """
        if not isinstance(other, Calibrator):
            raise ParameterError(f"other: expected a Calibrator, got {type(other).__name__}")
        if other._channels != self._channels:
            raise ParameterError(f"other: expected channels={self._channels}, got {other._channels}")
        self._check_room(other.count, "other")
        amax = np.maximum(self._channel_amax, other._channel_amax)
        self._state.merge(other._state, amax.view(np.int32))

    def stats(self) -> CalibStats:
        """The same summary as `CalibStats.collect` gives.

        Returns
        -------
        CalibStats
            min and max exact; p99, and with it the suggested scale, off by at most 2**-9 of the exact value.

        Raises
        ------
        EmptyInputError
            If nothing has been seen.
        """
        p99 = np.float32(self.percentile(0.99))
        mean, variance = _mean_and_variance(self.count, self._sums)
        return CalibStats(
            min=float(self._extremes[0]),
            max=float(self._extremes[1]),
            mean=mean,
            std_dev=math.sqrt(max(variance, 0.0)),
            p99=float(p99),
            suggested_scale=_int8_scale(p99 or self._amax() or np.float32(1)),
        )

    def percentile(self, p: float) -> float:
        """A percentile of the magnitudes of all elements.

        Parameters
        ----------
        p : float
            0 < p <= 1, as in `Percentile`.

        Returns
        -------
        float
            Off from the element that the nearest rank picks by at most 2**-9 of it; exact for ``p=1``.

        Raises
        ------
        InvalidPercentileError
            If `p` is not in (0, 1].
        EmptyInputError
            If nothing has been seen.

        Examples
        --------
        >>> calibrator = Calibrator()
        >>> calibrator.update(np.arange(1, 1001, dtype=np.float32))
        >>> calibrator.percentile(1.0), abs(calibrator.percentile(0.5) / 500 - 1) < 2**-9
        (1000.0, True)
        """
        rank = self._rank(p, self.count)
        if rank == self.count - 1:
            return float(self._amax())
        b = _core.bin_of_rank(self._counts, rank)
        # The lowest bin holds zeros above all, and they have to stay zero.
        middle = (b << _BIN_SHIFT) | (1 << (_BIN_SHIFT - 1)) if b else 0
        return float(min(np.int32(middle).view(F32), self._amax()))

    def _amax(self) -> np.float32:
        return np.abs(self._extremes).max()  # type: ignore[no-any-return]

    def _rank(self, p: float, n: int) -> int:
        mode = Percentile(p)
        if n == 0:
            raise EmptyInputError("calibrator: expected at least one element before this call, got none")
        return mode.rank(n)

    def histogram(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """How the magnitudes of all elements are distributed.

        Returns
        -------
        counts : ndarray of int64, shape (65280,)
            They add up to `count`.
        edges : ndarray of float64, shape (65281,)
            Bin i holds ``edges[i] <= |x| < edges[i + 1]``. The edges never change: 256 bins to each power of
            2 from 2**-126, where the bins below, of equal width, begin at 0, up to 2**128.

        Examples
        --------
        >>> calibrator = Calibrator()
        >>> calibrator.update([1.0, -1.0, 2.0])
        >>> counts, edges = calibrator.histogram()
        >>> counts[counts > 0], edges[:-1][counts > 0]
        (array([2, 1]), array([1., 2.]))
        """
        edges = (np.arange(_FINITE_BINS, dtype=np.int32) << _BIN_SHIFT).view(F32)
        return self._counts[:_FINITE_BINS].copy(), np.append(edges.astype(np.float64), 2.0**128)

    def channel_amax(self) -> NDArray[np.float32]:
        """The largest magnitude of each channel.

        Returns
        -------
        ndarray of float32, shape (channels,)
            Exact.

        Raises
        ------
        ParameterError
            If the calibrator keeps no channels.
        EmptyInputError
            If nothing has been seen.
        """
        return self.channel_percentile(1.0)

    def channel_percentile(self, p: float) -> NDArray[np.float32]:
        """A percentile of the magnitudes of each channel, which one outlying token does not move.

        Parameters
        ----------
        p : float
            0 < p <= 1, as in `Percentile`.

        Returns
        -------
        ndarray of float32, shape (channels,)
            Off from the element that the nearest rank picks by at most 2**-4 of it, or if it is below
            2**-11 of the channel's largest magnitude, by at most that. Exact for ``p=1``.

        Raises
        ------
        InvalidPercentileError
            If `p` is not in (0, 1].
        ParameterError
            If the calibrator keeps no channels.
        EmptyInputError
            If nothing has been seen.

        Examples
        --------
        >>> calibrator = Calibrator(channels=1)
        >>> calibrator.update(np.ones((999, 1), np.float32))
        >>> calibrator.update([[500.0]])
        >>> calibrator.channel_amax(), calibrator.channel_percentile(0.99)
        (array([500.], dtype=float32), array([1.0625], dtype=float32))
        """
        if self._channels is None:
            raise ParameterError("channels: expected a Calibrator made with channels, got channels=None")
        rows = self.count // self._channels
        rank = self._rank(p, rows)
        if rank == rows - 1:
            return self._channel_amax.copy()
        out = np.empty(self._channels, F32)
        _core.channel_percentiles(self._channel_counts, self._channel_amax.view(np.int32), rank, out)
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a file, for `load` to read on any machine.

        Parameters
        ----------
        path : str or os.PathLike
            Taken as it is, whatever its ending. A file that is there is replaced when the new one is
            complete.

        Raises
        ------
        ParameterError
            If `path` is neither.
        OSError
            If the file cannot be written.

        Notes
        -----
        An uncompressed NumPy archive (npz) of numbers, without pickle: 512 KiB, and 364 bytes a channel.
        """
        write_npz(as_path(path), dict(zip(_MEMBERS, self._arrays(), strict=True)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibrator:
        """Read what `save` wrote.

        Parameters
        ----------
        path : str or os.PathLike

        Returns
        -------
        Calibrator
            Equal to the saved one in every bit.

        Raises
        ------
        ParameterError
            If the file is damaged, is something else, or what it holds contradicts itself.
        OSError
            If there is no such file, or it cannot be read.

        Notes
        -----
        Safe for files of unknown origin: nothing is unpickled, and memory in proportion to the file at most
        is taken.
        """
        path = as_path(path)
        with open(path, "rb") as file:
            reader = NpzReader(file, path, _MEMBERS)
            version, count, channels = reader.read("calibrator", np.int64, (3,)).tolist()
            if version != _FORMAT_VERSION or count < 0 or channels < 0:
                _raise_state(path, f"version, count and channels {version, count, channels}")
            arrays = (
                reader.read("extremes", np.float32, (2,)),
                reader.read("sums", np.float64, (4,)),
                reader.read("counts", np.int64, (_BINS,)),
                reader.read("channel_amax", np.float32, (channels,)),
                reader.read("channel_counts", np.uint32, (channels, _WINDOW)),
            )
        calibrator = cls._of_arrays(count, channels, *arrays)
        calibrator._check_state(path)
        return calibrator

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        header = np.array([_FORMAT_VERSION, self.count, self._channels or 0], np.int64)
        return header, self._extremes, self._sums, self._counts, self._channel_amax, self._channel_counts

    @classmethod
    def _of_arrays(cls, count: int, channels: int, *arrays: NDArray[Any]) -> Calibrator:
        calibrator = cls.__new__(cls)
        calibrator._channels = channels or None
        calibrator._hold(np.array([count], np.int64), *(a.copy() for a in arrays))
        return calibrator

    def __reduce__(self) -> tuple[Any, ...]:
        return self._of_arrays, (self.count, self._channels or 0, *self._arrays()[1:])

    def _check_state(self, path: str) -> None:
        """Refuse what no updates and merges lead to, as far as a look at the whole can tell."""
        count, rows = self.count, self.count // (self._channels or 1)
        if self._counts.min() < 0 or _exact_sum(self._counts) != count:
            _raise_state(path, f"counts that do not add up to {count}")
        if self._channels and (rows > _MOST_ROWS or rows * self._channels != count):
            _raise_state(path, f"{count} elements of {self._channels} channels")
        if (self._channel_counts.sum(axis=1, dtype=np.uint64) != rows).any():
            _raise_state(path, f"counts of a channel that do not add up to {rows}")
        self._check_extremes(path)
        self._check_channels(path)
        self._check_sums(path)

    def _check_extremes(self, path: str) -> None:
        least, most = self._extremes.tolist()
        if self.count == 0:
            if (least, most) != (math.inf, -math.inf) or self._sums.any():
                _raise_state(path, "extremes or sums of no elements")
            return
        if not (math.isfinite(least) and math.isfinite(most) and least <= most):
            _raise_state(path, f"extremes {least} and {most}")
        if self._counts.nonzero()[0][-1] != int(self._amax().view(np.int32)) >> _BIN_SHIFT:
            _raise_state(path, "counts above or below the largest magnitude")

    def _check_channels(self, path: str) -> None:
        amax = self._channel_amax
        if not np.isfinite(amax).all() or (amax.view(np.int32) < 0).any():
            _raise_state(path, "largest magnitudes of channels that are none")
        if not self._channels or self.count == 0:
            if amax.any():
                _raise_state(path, "largest magnitudes of no elements")
            return
        if amax.max() != self._amax() or (self._channel_counts[:, -1] == 0).any():
            _raise_state(path, "largest magnitudes of channels that disagree with the counts")

    def _check_sums(self, path: str) -> None:
        # 2**63 squares of float32 numbers; NaN fails the comparison.
        if not np.abs(self._sums).max() < 2.0 ** (63 + 2 * 128):
            _raise_state(path, "sums beyond every possible one")
        if self.count:
            mean, variance = _mean_and_variance(self.count, self._sums)
            least, most = self._extremes.tolist()
            slack = 1e-9 * (most - least + abs(mean))
            above = variance - (most - least) ** 2 / 4  # Popoviciu's bound
            if not (least - slack <= mean <= most + slack and max(above, -variance) <= slack**2):
                _raise_state(path, f"mean {mean} and variance {variance} of elements in [{least}, {most}]")
            self._check_squares(path)

    def _check_squares(self, path: str) -> None:
        """Their sum lies between those of the bins' lower and of their upper edges."""
        counts, edges = self.histogram()
        least, most = counts @ np.square(edges[:-1]), counts @ np.square(edges[1:])
        squares = float(self._sums[2] + self._sums[3])
        if not least * (1 - 1e-9) <= squares <= most * (1 + 1e-9):
            _raise_state(path, f"a sum of squares {squares} that disagrees with the counts")


def _raise_state(path: str, found: str) -> NoReturn:
    raise ParameterError(f"path: expected the state of a Calibrator, got {shown(path)} with {found}")


def _exact_sum(counts: NDArray[np.int64]) -> int:
    """Of counts that are not negative; their sum may pass int64."""
    return (int((counts >> 32).sum()) << 32) + int((counts & 0xFFFFFFFF).sum())


def _mean_and_variance(n: int, sums: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and population variance from the pairs of sums of the values and of their squares."""
    from fractions import Fraction  # here, because importing it takes time that few need

    total, rest, squares, squares_rest = map(Fraction, sums.tolist())
    mean = (total + rest) / n
    # In exact arithmetic: a large mean cancels against the squares without a trace.
    return float(mean), float((squares + squares_rest) / n - mean * mean)
