"""Rounding weights so that their errors cancel in the output, by calibration rows (GPTQ)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._tensor import DynQuantTensor
from ._validate import F32, float_matrix
from .errors import EmptyInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of every four spans of rows one is held out. Spans, because neighboring tokens resemble each other: one
# between two that were used tells little about others. A span has 8 rows, and from row 512 on 64, from row
# 1024 on 128: the longer, the fewer texts have rows on both sides.
_SPANS = 4
_SPAN_BITS = 3
_LONG_SPANS_FROM = 512
_MAX_SPAN_BITS = 7

# Damping to try: from the one at _FIRST_TRIED on, to either side as long as that helps. And what is taken
# when no row could be held out.
_DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_FIRST_TRIED = 3
_DEFAULT_DAMPING = 1.0

# Weaker damping than the first is taken if its held-out error is below this share of the first's:
# held-out rows resemble the rows used more than later inputs will, which also carry the errors of other
# quantized layers. And of two with nearly the same error, the one farther from the first is taken.
_WEAKER_LEAVES = 0.97
_NEARLY_THE_SAME = 1.01

# How often a search fits the scales and rounds the columns again.
_SWEEPS = 3

# Outputs that damping is tried on.
_TRIED_OUTPUTS = 128

# Rows that are added up at once, and columns of a product of them.
_ROWS = 1024
_PRODUCT_COLUMNS = 512

# Columns that are rounded between two products, and floats of the outputs that are worked on at once.
_COLUMNS = 128
_OUTPUT_FLOATS = 1 << 21

# Channels that a rotation keeps apart from all others: a multiple of each span that layers rotate.
_ROTATED = 128

Rotation = Callable[["NDArray[np.float32]"], "NDArray[np.float32]"]


class SecondMoments:
    """Sums of ``x.T @ x`` over calibration rows, apart for the rows held out.

    Rows of zeros, such as padding, say nothing: it is as if they were not there.

    Parameters
    ----------
    batches : iterable of ndarray, (rows, k)
        Finite.
    k : int
    relative : bool
        Whether each row counts as a row of length 1. Otherwise lengths are taken relative to the longest row,
        so that no square leaves float32.
    rotate : callable, optional
        What the layer does to its inputs besides: an orthonormal map of the rows of a matrix, which keeps
        each _ROTATED channels apart from the others.

    Attributes
    ----------
    used, held_out : ndarray of float32, (k, k)
        Rotated.
    rows : list of int
        How many rows went into each.
    """

    def __init__(
        self, batches: Iterable[NDArray[Any]], k: int, relative: bool, rotate: Rotation | None = None
    ) -> None:
        self._rotate = rotate
        self.used, self.held_out = np.zeros((k, k), F32), np.zeros((k, k), F32)
        self.rows = [0, 0]
        self._relative, self._longest = relative, 0.0
        # Small batches are gathered: a product costs k * k additions more, for however few rows.
        self._block, self._lengths, self._filled = np.empty((_ROWS, k), F32), np.empty(_ROWS), 0
        seen = False
        for batch in batches:
            seen = True
            for first in range(0, len(batch), _ROWS):
                self._gather(*_directions(batch[first : first + _ROWS]))
        if not seen:
            raise EmptyInputError("calibration: expected at least one row, got none")
        self._add()
        del self._block
        # Damping goes by the channels as they were before the rotation, for it is there that they differ.
        self._used_diagonal, self._diagonal = self.used.diagonal().copy(), self.used.diagonal().copy()
        self._diagonal += self.held_out.diagonal()
        for total in (self.used, self.held_out):
            _mirror(total)
            self._rotate_both_sides(total)

    def pool(self) -> None:
        """Count the rows held out among those used; from then on there are none held out."""
        self.used += self.held_out
        self._used_diagonal = self._diagonal
        del self.held_out

    def damping(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """What a damping of 1 adds to `used`, in blocks on the diagonal: the columns and values of each.

        That is the geometric mean of each moment and the mean moment, rotated. It is between adding the same
        to all channels, which drowns the small ones, and a share of each its own, which trusts them too much;
        on the layers of all-MiniLM-L6-v2 better than both.
        """
        return self._damping(self._used_diagonal)

    def column_weights(self) -> NDArray[np.float32]:
        """What the squared error in each column of the weights counts."""
        weights = self.used.diagonal() + self.held_out.diagonal()
        for columns, block in self._damping(self._diagonal):
            weights[columns] += F32.type(_DAMPINGS[_FIRST_TRIED]) * block.diagonal()
        return weights

    def _damping(self, diagonal: NDArray[np.float32]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        mean = diagonal.mean(dtype=np.float64)
        added = np.sqrt(np.maximum(diagonal, 1e-3 * mean) * mean).astype(F32)
        for first in range(0, len(added), _ROTATED):
            columns = slice(first, first + _ROTATED)
            block = np.diag(added[columns])
            if self._rotate is not None:
                rows = np.zeros((len(block), len(added)), F32)
                for _ in range(2):
                    rows[:, columns] = block
                    block = self._rotate(rows)[:, columns].T
            yield columns, block

    def _rotate_both_sides(self, total: NDArray[np.float32]) -> None:
        """Make `total` the moments of rotated inputs, some rows and then some columns at a time."""
        if self._rotate is None:
            return
        for side in (total, total.T):
            for first in range(0, len(total), _PRODUCT_COLUMNS):
                rows = side[first : first + _PRODUCT_COLUMNS]
                rows[...] = self._rotate(np.ascontiguousarray(rows))

    def _gather(self, rows: NDArray[np.float32], lengths: NDArray[np.float64]) -> None:
        """Put rows, at most _ROWS, into the block, which is added up whenever it is full."""
        fitting = min(len(rows), _ROWS - self._filled)
        for part in (slice(fitting), slice(fitting, None)):
            end = self._filled + len(lengths[part])
            self._block[self._filled : end], self._lengths[self._filled : end] = rows[part], lengths[part]
            self._filled = end
            if self._filled == _ROWS:
                self._add()

    def _add(self) -> None:
        """Add up the rows of the block, and empty it."""
        x, lengths = self._block[: self._filled], self._lengths[: self._filled]
        if not self._relative:
            x *= self._weights(lengths)[:, np.newaxis]
        is_held_out = _is_held_out(sum(self.rows) + np.arange(len(x)))
        for i, (total, mask) in enumerate(((self.used, ~is_held_out), (self.held_out, is_held_out))):
            rows = x.compress(mask, axis=0)
            # The lower half, in blocks of columns: no product as large as the sum, and half of the time.
            for first in range(0, len(total), _PRODUCT_COLUMNS):
                end = first + _PRODUCT_COLUMNS
                total[first:end, :end] += rows[:, first:end].T @ rows[:, :end]
            self.rows[i] += len(rows)
        self._filled = 0

    def _weights(self, lengths: NDArray[np.float64]) -> NDArray[np.float64]:
        """Lengths relative to the longest row so far; the sums are, too."""
        longest = max(self._longest, float(lengths.max(initial=0)))
        if self._longest < longest:
            for total in (self.used, self.held_out):
                total *= F32.type((self._longest / longest) ** 2)
        self._longest = longest
        return lengths / longest


def _directions(x: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The rows of x, (rows, k), that are not zero: as rows of length 1, and their lengths."""
    x = x.astype(F32, copy=False)
    amax = np.maximum(x.max(axis=1), -x.min(axis=1))
    rows, amax = x.compress(amax > 0, axis=0), amax.compress(amax > 0)
    rows /= amax[:, np.newaxis]  # first, or squares could leave float32
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    rows /= lengths[:, np.newaxis]
    return rows, amax.astype(np.float64) * lengths


def _is_held_out(index: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the row with each index is held out.

    One span of every _SPANS: the last of the first ones, then by a hash, so that no period in the data, such
    as padding at the end of every sentence, lines up with the rows held out.
    """
    eighth = np.minimum(np.frexp(index)[1] - 4, _MAX_SPAN_BITS)
    bits = np.where(index < _LONG_SPANS_FROM, _SPAN_BITS, eighth)
    span = (index >> bits).astype(np.uint32)
    held_out = np.uint32(_SPANS - 1) - _hash(span // np.uint32(_SPANS)) % np.uint32(_SPANS)
    return span % np.uint32(_SPANS) == held_out  # type: ignore[no-any-return]


def _hash(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The finalizer of MurmurHash3: a changed bit of x changes each bit of the result in half the cases."""
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return x ^ x >> np.uint32(16)


def _mirror(a: NDArray[np.float32]) -> None:
    """Make a symmetric by its lower half."""
    for first in range(0, len(a), _PRODUCT_COLUMNS):
        end = first + _PRODUCT_COLUMNS
        a[:first, first:end] = a[first:end, :first].T


def compensate(
    w: NDArray[Any], plain: DynQuantTensor, moments: SecondMoments, search: bool, threads: int
) -> None:
    """Give `plain`, which is w rounded, the codes of the least output error; overwrites `moments`.

    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR
    2023), in a form that needs no inverse. With H the damped second moments of the inputs, sorted by their
    diagonal, and L its lower Cholesky factor, errors d in the weights of an output cost ``|d @ L|**2``.
    Element k of that is ``L[k, k] * (d[k] + sum of d[j] * L[j, k] / L[k, k] over j > k)``: columns are
    rounded from the last, which has the largest moment, to the first, each after that sum is added to its
    weight. The fewer the rows, the stronger the damping must be: that of _DAMPINGS is taken, or `plain` left
    as it is, which leaves the least error on the rows held out, tried on some of the outputs. The codes then
    come from all rows. With `search` each scale is then fitted to the codes, and each column rounded again
    to what is best beside all others as they are, a few times over.
    """
    damping = _best_damping(w, plain, moments, threads) if all(moments.rows) else _DEFAULT_DAMPING
    if damping is None:
        return
    moments.pool()
    try:
        rounding = _Rounding(w, plain, moments, damping, threads)
    except np.linalg.LinAlgError:
        return
    if search:
        rounding.prepare_search(moments)
    step = max(_TRIED_OUTPUTS, _OUTPUT_FLOATS // w.shape[1])
    for first in range(0, len(w), step):
        rows = slice(first, first + step)
        codes, errors = rounding.of_outputs(rows)
        if search:
            plain.scales[rows] = rounding.search(rows, codes, errors).reshape(plain.scales[rows].shape)
        plain.data[rows] = _packed(codes) if plain.format.packed else codes


def _best_damping(
    w: NDArray[Any], plain: DynQuantTensor, moments: SecondMoments, threads: int
) -> float | None:
    """The damping that leaves the least error on the rows held out; None for no compensation."""
    tried = slice(None, None, -(-len(w) // _TRIED_OUTPUTS))

    def cost(errors: NDArray[np.float32]) -> float:
        return float(np.vdot(errors @ moments.held_out, errors))

    def cost_of(damping: float) -> float:
        try:
            rounding = _Rounding(w, plain, moments, damping, threads)
        except np.linalg.LinAlgError:
            return np.inf
        return cost(rounding.of_outputs(tried)[1])

    first = best = _FIRST_TRIED
    least = of_first = cost_of(_DAMPINGS[first])
    for step in (1, -1):
        i = best + step
        while 0 <= i < len(_DAMPINGS) and (found := cost_of(_DAMPINGS[i])) < least * _NEARLY_THE_SAME:
            best, least, i = i, found, i + step
        if best != first:
            break
    if best < first and least > of_first * _WEAKER_LEAVES:
        best, least = first, of_first
    rounded = _rows_of(plain, tried).dequantize()
    return _DAMPINGS[best] if least < cost((w[tried].astype(F32) - rounded) * _unit(w)) else None


def _rows_of(tensor: DynQuantTensor, rows: slice) -> DynQuantTensor:
    zero_points = None if tensor.zero_points is None else tensor.zero_points[rows]
    data, scales = tensor.data[rows], tensor.scales[rows]
    return dataclasses.replace(
        tensor, data=data, scales=scales, zero_points=zero_points, shape=(len(data), tensor.shape[1])
    )


def _unit(w: NDArray[Any]) -> np.float32:
    """A power of two that keeps sums and squares of the errors of weights within float32."""
    smallest, largest = _core.min_max(float_matrix(w, *w.shape))
    return F32.type(2.0 ** -max(np.frexp(max(-smallest, largest))[1], -126))


class _Rounding:
    """The order in which columns are rounded, and what the error of each adds to the others.

    Raises LinAlgError where the moments are all zero, or so far apart that they have no factor in float32.
    """

    def __init__(
        self,
        w: NDArray[Any],
        plain: DynQuantTensor,
        moments: SecondMoments,
        damping: float,
        threads: int,
    ) -> None:
        self._w, self._plain, self._threads, self._unit = w, plain, threads, _unit(w)
        self._added = [(columns, block * F32.type(damping)) for columns, block in moments.damping()]
        self._diagonal = moments.used.diagonal().copy()
        for columns, block in self._added:
            self._diagonal[columns] += block.diagonal()
        order = np.argsort(self._diagonal, kind="stable")
        self._sorted, self._rank = order.astype(np.int32), np.argsort(order)
        self._feedback = _damped_and_sorted(moments.used, self._added, order)
        _factor(self._feedback)
        self._feedback /= self._feedback.diagonal().copy()

    def of_outputs(self, rows: slice) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Codes of some outputs; and weight minus value, in units."""
        w, grid = self._in_units(rows).take(self._sorted, 1), self._grid(rows)
        errors, codes = np.zeros_like(w), np.empty(w.shape, np.int8)
        for start, end in self._blocks():
            carried = errors[:, end:] @ self._feedback[end:, start:end]
            self._round(w, carried, self._feedback, start, self._sorted, grid, errors, codes)
        del w
        return codes, errors.take(self._rank, 1)

    def prepare_search(self, moments: SecondMoments) -> None:
        """For `search`: make the moments, damped, what the error of each column adds to the others."""
        self._again = moments.used
        for columns, block in self._added:
            self._again[columns, columns] += block
        self._again /= self._diagonal
        np.fill_diagonal(self._again, 0)

    def search(
        self, rows: slice, codes: NDArray[np.int8], errors: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Change codes and errors from `of_outputs` to better ones, and return the scales."""
        w, grid = self._in_units(rows), self._grid(rows)
        columns = np.arange(len(self._rank), dtype=np.int32)
        for _ in range(_SWEEPS):
            self._fit_scales(grid, codes, errors)
            for start, end in self._blocks():
                # The errors of columns in the block are as they were only until the column is rounded.
                carried = errors @ self._again[:, start:end]
                carried -= errors[:, start:end] @ np.tril(self._again[start:end, start:end])
                self._round(w, carried, self._again, start, columns, grid, errors, codes)
        return grid[0] / self._unit  # type: ignore[no-any-return]

    def _fit_scales(
        self, grid: tuple[Any, ...], codes: NDArray[np.int8], errors: NDArray[np.float32]
    ) -> None:
        """Make each scale, one group after the other, that of the least output error with these codes."""
        scales, zero_points = grid[:2]
        size = self._plain.format.group_of(len(self._rank))
        for group, first in enumerate(range(0, len(self._rank), size)):
            columns = slice(first, first + size)
            steps = codes[:, columns].astype(F32)
            if zero_points is not None:
                steps -= zero_points[:, group, np.newaxis]
            diagonal, moments = self._diagonal[columns], self._again[columns, columns]
            slope = (errors @ self._again[:, columns] + errors[:, columns]) * diagonal
            slope = np.einsum("ij,ij->i", slope, steps)
            curvature = np.einsum("ij,ij->i", (steps @ moments + steps) * diagonal, steps)
            found = np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0)
            found[scales[:, group] + found <= 0] = 0
            scales[:, group] += found
            errors[:, columns] -= found[:, np.newaxis] * steps

    def _in_units(self, rows: slice) -> NDArray[np.float32]:
        w = self._w[rows].astype(F32)
        w *= self._unit
        return w

    def _blocks(self) -> list[tuple[int, int]]:
        n = len(self._rank)
        return [(max(end - _COLUMNS, 0), end) for end in range(n, 0, -_COLUMNS)]

    def _grid(self, rows: slice) -> tuple[Any, ...]:
        """Scales in units, zero points, and the least and the largest code of some outputs."""
        plain, n = self._plain, len(self._w)
        scales = plain.scales.reshape(n, -1)[rows] * self._unit
        if plain.zero_points is None:
            return scales, None, -plain.format.clip, plain.format.clip
        return scales, np.ascontiguousarray(plain.zero_points.reshape(n, -1)[rows]), 0, 15

    def _round(
        self,
        w: NDArray[np.float32],
        carried: NDArray[np.float32],
        feedback: NDArray[np.float32],
        start: int,
        columns: NDArray[np.int32],
        grid: tuple[Any, ...],
        errors: NDArray[np.float32],
        codes: NDArray[np.int8],
    ) -> None:
        """Round a block of the columns, which `w` and `errors` hold in the order of `columns`."""
        scales, zero_points, lo, hi = grid
        groups = columns // np.int32(self._plain.format.group_of(len(columns)))
        given = w, carried, feedback, start, groups, columns
        _core.compensate_rows(*given, scales, zero_points, lo, hi, errors, codes, self._threads)


def _damped_and_sorted(
    moments: NDArray[np.float32], blocks: list[tuple[slice, NDArray[np.float32]]], order: NDArray[np.intp]
) -> NDArray[np.float32]:
    """`moments` with the blocks added on the diagonal, and then rows and columns in `order`: a new array."""
    h, rank = np.empty_like(moments), np.argsort(order)
    for columns, block in blocks:
        rows = moments[columns].copy()
        rows[:, columns] += block
        # `take` and a loop, for an index in brackets crashes NumPy where there is no memory.
        for i, row in zip(rank[columns], rows.take(order, 1), strict=True):
            h[i] = row
    return h


def _factor(h: NDArray[np.float32]) -> None:
    """Replace the lower half of h (k, k), positive definite, by its Cholesky factor.

    Block by block in place, where NumPy's takes two copies more. What is above the diagonal blocks stays.
    Raises LinAlgError.
    """
    for first in range(0, len(h), _COLUMNS):
        end = min(first + _COLUMNS, len(h))
        h[first:, first:end] -= h[first:, :first] @ h[first:end, :first].T
        block = np.linalg.cholesky(h[first:end, first:end])
        h[first:end, first:end] = block
        h[end:, first:end] = h[end:, first:end] @ np.linalg.inv(block.astype(np.float64)).T.astype(F32)


def _packed(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Codes (rows, k), two to a byte."""
    nibbles = (codes & 0x0F).view(np.uint8)
    data = np.ascontiguousarray(nibbles[:, 0::2])
    data[:, : nibbles.shape[1] // 2] |= nibbles[:, 1::2] << 4
    return data
