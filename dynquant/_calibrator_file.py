"""The file of a Calibrator, and that of version 0.1.

It may come from anywhere. _npz.py refuses pickles and zip bombs, and every number is checked here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from . import _core
from ._calibrate import BIN_SHIFT, BINS, bin_edges, mean_and_variance
from ._npz import NpzReader, write_npz
from ._row_sample import RowSample
from .errors import ParameterError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_ROWS = 2**32 - 1
OCTAVE_BINS = _core.BINS_PER_OCTAVE

_FORMAT_VERSION = 2
_MEMBERS = (
    *("calibrator", "extremes", "sums", "counts"),
    *("channel_amax", "octaves", "channel_counts", "sample"),
)
# Version 1 kept 90 bins of each channel, up to that of its largest magnitude; the first of them also held
# what lies lower.
_MEMBERS_1 = ("calibrator", "extremes", "sums", "counts", "channel_amax", "channel_counts")
_WINDOW = 90


class CalibratorArrays(NamedTuple):
    """All that a Calibrator keeps.

    Attributes
    ----------
    elements, channels, rows : int
        How many elements were seen, and the arguments of the Calibrator, 0 for None.
    extremes : ndarray of float32, (2,)
    sums : ndarray of float64, (4,)
        Of the values and of their squares, each in two parts.
    counts : ndarray of int64, (BINS,)
    channel_amax : ndarray of float32, (channels,)
    octaves : ndarray of uint8, (n,)
        The exponents that occur, ascending.
    channel_counts : ndarray of uint32, (n, channels, OCTAVE_BINS)
    sample : ndarray of float32, (m, channels)
        Rows, by ascending hash.
    """

    elements: int
    channels: int
    rows: int
    extremes: NDArray[np.float32]
    sums: NDArray[np.float64]
    counts: NDArray[np.int64]
    channel_amax: NDArray[np.float32]
    octaves: NDArray[np.uint8]
    channel_counts: NDArray[np.uint32]
    sample: NDArray[np.float32]

    @property
    def amax(self) -> np.float32:
        return np.abs(self.extremes).max()  # type: ignore[no-any-return]


def write_calibrator(path: str, state: CalibratorArrays) -> None:
    sizes = (state.elements, state.channels, state.rows, len(state.octaves), len(state.sample))
    arrays = (np.array([_FORMAT_VERSION, *sizes], np.int64), *state[3:])
    write_npz(path, dict(zip(_MEMBERS, arrays, strict=True)))


def read_calibrator(path: str) -> CalibratorArrays:
    """What the file holds, if it does not contradict itself."""
    with open(path, "rb") as file:
        reader = NpzReader(file, path, _MEMBERS, _MEMBERS_1)
        state = _read(reader, path) if reader.names == sorted(_MEMBERS) else _read_1(reader, path)
    _check_counts(state, path)
    _check_extremes(state, path)
    _check_channels(state, path)
    _check_sums(state, path)
    _check_sample(state, path)
    return state


def _read(reader: NpzReader, path: str) -> CalibratorArrays:
    header = reader.read("calibrator", np.int64, (6,)).tolist()
    version, count, channels, rows, octaves, sampled = header
    if version != _FORMAT_VERSION or min(header) < 0:
        _raise_state(path, f"version and sizes {header}")
    return CalibratorArrays(
        count,
        channels,
        rows,
        *_whole_set(reader),
        reader.read("channel_amax", np.float32, (channels,)),
        reader.read("octaves", np.uint8, (octaves,)),
        reader.read("channel_counts", np.uint32, (octaves, channels, OCTAVE_BINS)),
        reader.read("sample", np.float32, (sampled, channels)),
    )


def _read_1(reader: NpzReader, path: str) -> CalibratorArrays:
    version, count, channels = reader.read("calibrator", np.int64, (3,)).tolist()
    if version != 1 or count < 0 or channels < 0:
        _raise_state(path, f"version, count and channels {version, count, channels}")
    amax = reader.read("channel_amax", np.float32, (channels,))
    windows = reader.read("channel_counts", np.uint32, (channels, _WINDOW))
    sample = np.empty((0, channels), np.float32)
    return CalibratorArrays(
        count, channels, 0, *_whole_set(reader), amax, *_octaves_of(windows, amax), sample
    )


def _whole_set(
    reader: NpzReader,
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.int64]]:
    return (
        reader.read("extremes", np.float32, (2,)),
        reader.read("sums", np.float64, (4,)),
        reader.read("counts", np.int64, (BINS,)),
    )


def _octaves_of(
    windows: NDArray[np.uint32], amax: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """Octaves and counts of the bins (channels, _WINDOW) that version 1 kept."""
    channel, cell = windows.nonzero()
    bins = np.maximum((amax.view(np.int32) >> 20)[channel] - (_WINDOW - 1) + cell, 0)
    octaves, place = np.unique(bins // OCTAVE_BINS, return_inverse=True)
    counts = np.zeros((len(octaves), len(amax), OCTAVE_BINS), np.uint32)
    np.add.at(counts, (place, channel, bins % OCTAVE_BINS), windows[channel, cell])
    return octaves.astype(np.uint8), counts


def _check_counts(state: CalibratorArrays, path: str) -> None:
    """Refuse what no updates and merges lead to, as far as a look at the whole can tell."""
    count, rows = state.elements, state.elements // (state.channels or 1)
    if state.counts.min() < 0 or _exact_sum(state.counts) != count:
        _raise_state(path, f"counts that do not add up to {count}")
    if state.channels and (rows > MOST_ROWS or rows * state.channels != count):
        _raise_state(path, f"{count} elements of {state.channels} channels")
    if (state.channel_counts.sum(axis=(0, 2), dtype=np.uint64) != rows).any():
        _raise_state(path, f"counts of a channel that do not add up to {rows}")
    if (np.diff(state.octaves.astype(int)) <= 0).any() or not state.channel_counts.any(axis=(1, 2)).all():
        _raise_state(path, "octaves that are not in ascending order, or have no counts")


def _check_extremes(state: CalibratorArrays, path: str) -> None:
    least, most = state.extremes.tolist()
    if state.elements == 0:
        if (least, most) != (math.inf, -math.inf) or state.sums.any():
            _raise_state(path, "extremes or sums of no elements")
        return
    if not (math.isfinite(least) and math.isfinite(most) and least <= most):
        _raise_state(path, f"extremes {least} and {most}")
    if state.counts.nonzero()[0][-1] != int(state.amax.view(np.int32)) >> BIN_SHIFT:
        _raise_state(path, "counts above or below the largest magnitude")


def _check_channels(state: CalibratorArrays, path: str) -> None:
    amax = state.channel_amax
    if not np.isfinite(amax).all() or (amax.view(np.int32) < 0).any():
        _raise_state(path, "largest magnitudes of channels that are negative or not finite")
    if not state.channels or state.elements == 0:
        if amax.any():
            _raise_state(path, "largest magnitudes of no elements")
        return
    if amax.max() != state.amax or (_top_bins(state) != amax.view(np.int32) >> 20).any():
        _raise_state(path, "largest magnitudes of channels that disagree with the counts")


def _top_bins(state: CalibratorArrays) -> NDArray[np.int64]:
    """The highest bin of each channel that anything is in."""
    top = np.zeros(state.channels, np.int64)
    for octave, counts in zip(state.octaves.tolist(), state.channel_counts, strict=True):
        used = counts > 0
        seen = used.any(axis=1)
        highest = OCTAVE_BINS - 1 - np.argmax(used[:, ::-1], axis=1)
        top[seen] = octave * OCTAVE_BINS + highest[seen]
    return top


def _check_sums(state: CalibratorArrays, path: str) -> None:
    # 2**63 squares of float32 numbers; NaN fails the comparison.
    if not np.abs(state.sums).max() < 2.0 ** (63 + 2 * 128):
        _raise_state(path, "sums larger than any input could give")
    if state.elements:
        mean, variance = mean_and_variance(state.elements, state.sums)
        least, most = state.extremes.tolist()
        slack = 1e-9 * (most - least + abs(mean))
        above = variance - (most - least) ** 2 / 4  # Popoviciu's bound
        if not (least - slack <= mean <= most + slack and max(above, -variance) <= slack**2):
            _raise_state(path, f"mean {mean} and variance {variance} of elements in [{least}, {most}]")
        _check_squares(state, path)


def _check_squares(state: CalibratorArrays, path: str) -> None:
    """Their sum lies between those of the bins' lower and of their upper edges."""
    edges = bin_edges()
    counts = state.counts[: len(edges) - 1]
    least, most = counts @ np.square(edges[:-1]), counts @ np.square(edges[1:])
    squares = float(state.sums[2] + state.sums[3])
    if not least * (1 - 1e-9) <= squares <= most * (1 + 1e-9):
        _raise_state(path, f"a sum of squares {squares} that disagrees with the counts")


def _check_sample(state: CalibratorArrays, path: str) -> None:
    sample, seen = state.sample, state.elements // (state.channels or 1)
    if state.rows and not state.channels:
        _raise_state(path, "rows of no channels")
    if not min(state.rows, seen, 1) <= len(sample) <= min(state.rows, seen):
        _raise_state(path, f"{len(sample)} sampled rows of {seen}, where {state.rows} are kept")
    if not (np.abs(sample) <= state.channel_amax).all():
        _raise_state(path, "sampled values above the largest magnitudes")
    hashes = RowSample.restored(state.rows, sample).hashes
    if not (hashes[1:] > hashes[:-1]).all():
        _raise_state(path, "sampled rows that are not in order")


def _raise_state(path: str, found: str) -> NoReturn:
    raise ParameterError(f"path: expected the state of a Calibrator, got {shown(path)} with {found}")


def _exact_sum(counts: NDArray[np.int64]) -> int:
    """Of counts that are not negative; their sum may pass int64."""
    return (int((counts >> 32).sum()) << 32) + int((counts & 0xFFFFFFFF).sum())
