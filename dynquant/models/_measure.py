"""What quantizing cost a tensor, measured block by block while it is quantized."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .. import _core
from .._layouts import nibbles, unsigned
from .._tensor import DynQuantTensor, code_matrix
from .._validate import float_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Places of the sums of kernels/metrics.pxi.
_SQUARES, _POWER, _MOST = 1, 2, 5

# Half a step, and what rounding may add.
_CLIPPED_STEPS = np.float32(0.501)


class WeightErrors:
    """Errors of a tensor, added up over blocks of its rows.

    Parameters
    ----------
    may_clip : bool
        Whether values may lie beyond those of the codes. Otherwise none are looked for.
    """

    def __init__(self, may_clip: bool) -> None:
        self._may_clip = may_clip
        self._sums = np.zeros(6)
        self._count = self._zeros = self._clipped = 0

    def add(self, x: NDArray[np.float32], q: DynQuantTensor, threads: int) -> None:
        """Rows of the original, and what they became."""
        sums = np.zeros((1, 6))
        _core.error_sums(float_matrix(x, *x.shape), code_matrix(q), x.size, sums, threads)
        most = max(self._sums[_MOST], sums[0, _MOST])
        self._sums += sums[0]
        self._sums[_MOST] = most
        self._count += x.size
        self._zeros += _count_zeros(q)
        if self._may_clip:
            self._clipped += _count_clipped(x, q)

    @property
    def sqnr_db(self) -> float:
        """Power of the original over power of the error, in decibels."""
        return ratio_db(self._sums[_POWER], self._sums[_SQUARES])

    @property
    def max_abs(self) -> float:
        """The largest error."""
        return float(self._sums[_MOST])

    @property
    def zero_share(self) -> float:
        """Share of the codes that stand for 0."""
        return self._zeros / self._count if self._count else math.nan

    @property
    def clipped_share(self) -> float:
        """Share of the values that lie beyond those of the codes by more than half a step."""
        return self._clipped / self._count if self._count else math.nan


def _count_zeros(q: DynQuantTensor) -> int:
    if q.format.bits == 8:
        return int(q.data.size - np.count_nonzero(q.data))
    codes = nibbles(unsigned(q))[:, : q.shape[1]]
    if q.minimums is not None:
        return int(np.count_nonzero(q.dequantize() == 0))
    zero = 8 if q.zero_points is None else _of_each(q.zero_points, q)
    return int(np.count_nonzero(codes == zero))


def _count_clipped(x: NDArray[np.float32], q: DynQuantTensor) -> int:
    rows, columns = np.nonzero(_at_ends(q))
    scales = q.scales.reshape(len(x), -1)
    steps = np.abs(scales[rows, columns // q.format.group_of(q.shape[1])]) * _CLIPPED_STEPS
    return int(np.count_nonzero(np.abs(x[rows, columns] - q.dequantize()[rows, columns]) > steps))


def _at_ends(q: DynQuantTensor) -> NDArray[np.bool_]:
    """Which codes are the smallest or the largest one."""
    if q.format.bits == 8:
        codes = np.abs(q.data.astype(np.int16))
        return np.greater_equal(codes, q.format.clip)
    codes = nibbles(unsigned(q))[:, : q.shape[1]]
    lowest = 1 if q.zero_points is None and q.minimums is None else 0
    ends: NDArray[np.bool_] = (codes <= lowest) | (codes == 15)
    return ends


def _of_each(of_groups: NDArray[np.generic], q: DynQuantTensor) -> NDArray[np.generic]:
    """What groups have, for each element: (rows, 1) or (rows, k)."""
    rows, k = q.shape
    groups = of_groups.reshape(rows, -1)
    return groups if groups.shape[1] == 1 else np.repeat(groups, q.format.group_of(k), axis=1)[:, :k]


def ratio_db(power: float, errors: float) -> float:
    """10 log10(power / errors); inf without errors, nan without both."""
    if errors == 0:
        return math.inf if power else math.nan
    return 10 * math.log10(power / errors) if power else -math.inf
