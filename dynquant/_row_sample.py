"""A bounded random sample of the rows of a stream, which does not depend on their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._validate import F32, float_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class RowSample:
    """The rows with the smallest hashes among all that were seen, at most `capacity` of them.

    A row's hash depends on its content alone. So whichever rows come first, in whatever batches and through
    whatever merges, the same ones are kept: bottom-k sampling (Cohen and Kaplan, "Summarizing Data using
    Bottom-k Sketches", PODC 2007) of the distinct rows. Rows that repeat, such as padding, count once.

    Attributes
    ----------
    capacity : int
    hashes : ndarray of uint64, (n,)
        Ascending, none twice.
    rows : ndarray of float32, (n, k)
        In their order.
    """

    capacity: int
    hashes: NDArray[np.uint64]
    rows: NDArray[np.float32]

    @classmethod
    def empty(cls, capacity: int, k: int) -> RowSample:
        return cls(capacity, np.empty(0, np.uint64), np.empty((0, k), F32))

    @classmethod
    def restored(cls, capacity: int, rows: NDArray[np.float32]) -> RowSample:
        """The sample that holds just these rows; its hashes do not ascend if they are no sample."""
        return cls(capacity, _hashes(rows, 1), rows)

    def updated(self, x: NDArray[Any], threads: int) -> RowSample:
        """The sample with the rows (m, k) of float32, float16 or bfloat16 added."""
        hashes = _hashes(x, threads)
        if len(self.hashes) == self.capacity:
            (candidates,) = np.nonzero(hashes < self.hashes[-1])
            if not candidates.size:
                return self
            hashes = hashes[candidates]
        else:
            candidates = np.arange(len(x))
        hashes, first = np.unique(hashes, return_index=True)
        chosen = candidates[first[: self.capacity]]
        return self.merged(RowSample(self.capacity, hashes[: self.capacity], x[chosen].astype(F32)))

    def merged(self, other: RowSample) -> RowSample:
        """The sample with what `other` has seen added."""
        hashes, first = np.unique(np.concatenate([self.hashes, other.hashes]), return_index=True)
        first = first[: self.capacity]
        rows = np.concatenate([self.rows, other.rows])[first]
        return RowSample(self.capacity, hashes[: self.capacity], rows)


def _hashes(x: NDArray[Any], threads: int) -> NDArray[np.uint64]:
    hashes = np.empty(len(x), np.uint64)
    _core.hash_rows(float_matrix(x, *x.shape), hashes, threads)
    return hashes
