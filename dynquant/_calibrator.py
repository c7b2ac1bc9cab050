"""Statistics of a calibration set that is never held."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from . import _core
from ._calibrate import BIN_SHIFT, BINS, CalibStats, bin_edges, int8_scale, mean_and_variance
from ._calibrator_file import MOST_ROWS, OCTAVE_BINS, CalibratorArrays, read_calibrator, write_calibrator
from ._format import Percentile
from ._row_sample import RowSample
from ._validate import (
    F32,
    as_count,
    as_floats,
    as_path,
    as_thread_count,
    float_matrix,
    raise_non_finite,
)
from .errors import DTypeError, EmptyInputError, ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    import os

    from numpy.typing import ArrayLike, NDArray

# Exponents that a float32 may have, those of NaN and infinity included.
_OCTAVES = 256
# Exponents that are next to each other but for so many count as a range.
_GAP = 4

_MOST_ELEMENTS = 2**63 - 1
# So that their counts, of 4 bytes each, can be addressed.
_MOST_CHANNELS = _MOST_ELEMENTS // (4 * _OCTAVES * OCTAVE_BINS)


class Calibrator:
    """Statistics of a calibration set that is never held: batches stream through bounded memory.

    Parameters
    ----------
    channels : int, optional
        Length of the last axis of every batch. With it the statistics of each channel are kept too, of which
        SmoothQuant factors are made.
    rows : int, optional
        How many rows to keep as a sample, for `search_alpha` and for the `calibration` of a layer. Only with
        `channels`.

    Raises
    ------
    ParameterError
        If `channels` or `rows` is no int above 0, or more than can be addressed; or if there are `rows`
        without `channels`.

    Notes
    -----
    Memory is bounded, whatever streams through: 512 KiB; for each channel 32 bytes for each power of 2 that
    any channel has magnitudes in, which is 0.7 KB a channel for a million normally distributed values, and
    never more than 8 KB; and the sampled rows.

    *Percentiles* come from counts in bins of the float32 magnitude: its exponent and the first 8 bits of its
    fraction for the whole set, 3 bits for a channel. The bin that holds the nearest rank is found exactly,
    and its middle is the answer, at most the largest magnitude. So a percentile of the whole set is off by at
    most 2**-9 of the exact value, and that of a channel by at most 2**-4, whatever the largest magnitudes
    are. Below 2**-126, where float32 itself loses digits, the whole set's are off by at most 2**-134 and a
    channel's by at most 2**-129; magnitudes under those bounds count as 0.

    *The sample* is random, yet the same whenever the same rows are seen: it holds the rows with the smallest
    hashes. A row's hash depends on its values alone, so that rows that repeat, such as padding, count once.

    *Counts, extremes, all percentiles and the sample* are the same to the bit in whatever order and batches
    the elements come, and through whatever tree of merges. *Mean and deviation* are kept as the sums of the
    values and of their squares, each in two doubles; blocks of 4,096 values add to them without the
    cancellation that sums of squares are known for, since only the squared deviations from the block's mean
    are ever rounded. Order moves the deviation by less than 1e-12 of itself, and the mean by less than 1e-12
    of the deviation and the mean together, however large the mean is.

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
        "_channels",
        "_counts",
        "_extremes",
        "_octaves",
        "_sample",
        "_size",
        "_state",
        "_sums",
    )

    _sample: RowSample | None

    def __init__(self, channels: int | None = None, *, rows: int | None = None) -> None:
        k = 0 if channels is None else as_count(channels, "channels")
        if k > _MOST_CHANNELS:
            raise ParameterError(f"channels: expected an int <= {_MOST_CHANNELS}, got {shown(channels)}")
        capacity = 0 if rows is None else as_count(rows, "rows")
        if capacity > _MOST_ELEMENTS:
            raise ParameterError(f"rows: expected an int <= {_MOST_ELEMENTS}, got {shown(rows)}")
        if capacity and not k:
            raise ParameterError(f"rows: expected None without channels, got {shown(rows)}")
        self._hold(
            CalibratorArrays(
                0,
                k,
                capacity,
                np.array([np.inf, -np.inf], F32),
                np.zeros(4),
                np.zeros(BINS, np.int64),
                np.zeros(k, F32),
                np.empty(0, np.uint8),
                np.empty((0, k, OCTAVE_BINS), np.uint32),
                np.empty((0, k), F32),
            )
        )

    def _hold(self, arrays: CalibratorArrays) -> None:
        """Take over the arrays, but for counts of channels, which are copied."""
        self._channels = arrays.channels or None
        self._size = np.array([arrays.elements], np.int64)
        self._extremes, self._sums, self._counts = arrays.extremes, arrays.sums, arrays.counts
        self._channel_amax = arrays.channel_amax
        amax_bits = self._channel_amax.view(np.int32)
        self._state = _core.CalibratorState(self._size, self._extremes, self._sums, self._counts, amax_bits)
        self._octaves: dict[int, NDArray[np.uint32]] = {}
        self._add_octaves(arrays.octaves.tolist())
        for octave, counts in zip(arrays.octaves.tolist(), arrays.channel_counts, strict=True):
            self._octaves[octave][...] = counts
        self._sample = RowSample.restored(arrays.rows, arrays.sample) if arrays.rows else None

    def _add_octaves(self, octaves: Iterable[int]) -> None:
        """Have room for counts of magnitudes with these exponents."""
        for octave in octaves:
            if octave not in self._octaves:
                counts = np.zeros((self._channels or 0, OCTAVE_BINS), np.uint32)
                self._state.add_octave(octave, counts)
                self._octaves[octave] = counts

    @property
    def channels(self) -> int | None:
        """Length of the last axis of every batch, if the channels are kept apart."""
        return self._channels

    @property
    def rows(self) -> int | None:
        """How many rows are kept at most."""
        return self._sample.capacity if self._sample else None

    @property
    def count(self) -> int:
        """How many elements have been seen."""
        return int(self._size[0])

    def __repr__(self) -> str:
        rows = f", rows={self.rows}" if self.rows else ""
        return f"Calibrator(channels={self._channels}{rows}, count={self.count})"

    def update(self, batch: ArrayLike, *, num_threads: int = 1) -> None:
        """Add a batch.

        Parameters
        ----------
        batch : array_like of floats, any shape; (..., channels) if channels are kept
            May be empty.
        num_threads : int
            As in `dynamic_quantize`.

        Raises
        ------
        ShapeMismatchError
            If the last axis is not as long as there are channels.
        DTypeError, NonFiniteError
            If `batch` does not hold floats, or holds NaN or infinity.
        ParameterError
            If there would be more elements than can be counted, or `num_threads` is no int above 0 or -1.

        Notes
        -----
        A call that raises leaves the calibrator as it was.
        """
        threads = as_thread_count(num_threads)
        array = as_floats(batch, "batch")
        k = self._channels or array.size
        if self._channels and array.shape[-1:] != (k,):
            raise ShapeMismatchError(f"(..., {k})", array.shape, "batch")
        self._check_room(array.size, "batch")
        x = float_matrix(array, array.size // k if k else 0, k)
        amax, sample = self._channel_amax.copy(), self._sample
        if self._channels:
            _core.column_amax(x, amax.view(np.int32), threads)
        # Where channels are kept, they show what is not finite.
        if not (np.isfinite(amax).all() if self._channels else _core.all_finite(x, threads)):
            raise_non_finite(array, "batch")
        if self._channels:
            self._add_octaves(self._octaves_of(x, threads))
        if sample:
            sample = sample.updated(array.reshape(-1, k), threads)
        self._state.update(x, amax.view(np.int32), threads)
        self._sample = sample

    def _octaves_of(self, x: _core.FloatMatrix, threads: int) -> list[int]:
        """Exponents that there has to be room for before `x` is counted."""
        present, seen = np.zeros((2, _OCTAVES), np.uint8)
        present[list(self._octaves)] = 1
        _core.mark_octaves(x, present, seen, threads)
        octaves = np.flatnonzero(seen)
        # Room in narrow gaps too, between the smallest magnitudes above all: next time nothing is missing.
        for first, last in itertools.pairwise(octaves.tolist()):
            if last - first <= _GAP:
                seen[first:last] = 1
        return np.flatnonzero(seen).tolist()

    def _check_room(self, n: int, name: str) -> None:
        most = MOST_ROWS * self._channels if self._channels else _MOST_ELEMENTS
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
            With the same `channels` and `rows`. It stays as it is.

        Raises
        ------
        ParameterError
            If `other` is no Calibrator or has other channels or rows, or both have seen more than can be
            counted.

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
        if other.rows != self.rows:
            raise ParameterError(f"other: expected rows={self.rows}, got {other.rows}")
        self._check_room(other.count, "other")
        amax, sample = np.maximum(self._channel_amax, other._channel_amax), self._sample
        self._add_octaves(other._octaves)
        if sample and other._sample:
            sample = sample.merged(other._sample)
        self._state.merge(other._state, amax.view(np.int32))
        self._sample = sample

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
        mean, variance = mean_and_variance(self.count, self._sums)
        return CalibStats(
            min=float(self._extremes[0]),
            max=float(self._extremes[1]),
            mean=mean,
            std_dev=math.sqrt(max(variance, 0.0)),
            p99=float(p99),
            suggested_scale=int8_scale(p99 or self._amax() or np.float32(1)),
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
        middle = (b << BIN_SHIFT) | (1 << (BIN_SHIFT - 1)) if b else 0
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
        edges = bin_edges()
        return self._counts[: len(edges) - 1].copy(), edges

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
        """A percentile of the magnitudes of each channel, which a few massive values do not move.

        Parameters
        ----------
        p : float
            0 < p <= 1, as in `Percentile`.

        Returns
        -------
        ndarray of float32, shape (channels,)
            Off from the element that the nearest rank picks by at most 2**-4 of it, or 2**-129; exact for
            ``p=1``. Of what was seen by version 0.1, whose file was loaded, a magnitude below 2**-11 of the
            channel's largest is off by at most that.

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
        >>> calibrator.update([[1e9]])
        >>> calibrator.channel_amax(), calibrator.channel_percentile(0.99)
        (array([1.e+09], dtype=float32), array([1.0625], dtype=float32))
        """
        if self._channels is None:
            raise ParameterError("channels: expected a Calibrator made with channels, got channels=None")
        rows = self.count // self._channels
        rank = self._rank(p, rows)
        if rank == rows - 1:
            return self._channel_amax.copy()
        out = np.empty(self._channels, F32)
        self._state.percentiles(rank, out)
        return out

    def sample(self) -> NDArray[np.float32]:
        """The rows that are kept: a random sample of the distinct rows that have been seen.

        Returns
        -------
        ndarray of float32, shape (n, channels)
            All distinct rows, or as many as `rows`, in an order that says nothing about that of the stream.

        Raises
        ------
        ParameterError
            If the calibrator keeps no rows.

        Notes
        -----
        Rows with the smallest hashes are kept: bottom-k sampling, Cohen and Kaplan, "Summarizing Data using
        Bottom-k Sketches" (PODC 2007). The hash is 64 bits of the row's float32 values. Rows that differ and
        share a hash count as one: with a billion distinct rows the chance that there are two such is 1 in 37.

        Examples
        --------
        >>> calibrator = Calibrator(channels=2, rows=100)
        >>> calibrator.update([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
        >>> sorted(calibrator.sample().tolist())
        [[1.0, 2.0], [3.0, 4.0]]
        """
        if self._sample is None:
            raise ParameterError("rows: expected a Calibrator made with rows, got rows=None")
        return self._sample.rows.copy()

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
        An uncompressed NumPy archive (npz) of numbers, without pickle, of the size that the calibrator takes
        in memory.
        """
        write_calibrator(as_path(path), self._arrays())

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
        is taken. Files of version 0.1 are read too.
        """
        return cls._of_arrays(*read_calibrator(as_path(path)))

    def _arrays(self) -> CalibratorArrays:
        """What is kept, in an order that depends on nothing else."""
        octaves = [octave for octave in sorted(self._octaves) if self._octaves[octave].any()]
        k = self._channels or 0
        channel_counts = np.empty((len(octaves), k, OCTAVE_BINS), np.uint32)
        for i, octave in enumerate(octaves):
            channel_counts[i] = self._octaves[octave]
        return CalibratorArrays(
            self.count,
            k,
            self.rows or 0,
            self._extremes,
            self._sums,
            self._counts,
            self._channel_amax,
            np.array(octaves, np.uint8),
            channel_counts,
            self._sample.rows if self._sample else np.empty((0, k), F32),
        )

    @classmethod
    def _of_arrays(cls, count: int, channels: int, rows: int, *arrays: NDArray[Any]) -> Calibrator:
        calibrator = cls.__new__(cls)
        calibrator._hold(CalibratorArrays(count, channels, rows, *(a.copy() for a in arrays)))
        return calibrator

    def __reduce__(self) -> tuple[Any, ...]:
        return self._of_arrays, tuple(self._arrays())

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        """Refused: NumPy would make an array of one object, and save it in a file that it does not read."""
        raise DTypeError(
            "expected an array, got Calibrator: save() and load() keep it in a file; channel_amax(), "
            "channel_percentile(p) and sample() give arrays"
        )
