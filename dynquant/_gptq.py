"""Rounding weights so that their errors cancel in the output, by calibration rows (GPTQ)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ._tensor import DynQuantTensor
from ._validate import F32, as_matrices, as_matrix, check_finite
from .errors import EmptyInputError, FeatureDimMismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of every four runs of so many rows one is held out. Runs, because neighboring tokens resemble each other:
# one between two that were used tells little about others.
_RUN = 8
_RUNS = 4

# Damping to try, as a share of the mean second moment; and what is taken when no row could be held out.
_DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_DEFAULT_DAMPING = 1.0

# Outputs that damping is tried on; columns whose errors are pushed on together; rows added up at once.
_TRIED_OUTPUTS = 256
_BLOCK = 128
_ROWS = 1024

_ALL = slice(None)

# Just below a half: added with the sign of v and truncated, it rounds halves away from zero.
_HALF = np.float32(0.499999970197677612)


def calibration_batches(calibration: Any, k: int) -> Iterator[NDArray[np.float32]]:
    """Finite float32 matrices with k columns: one array, or each of a list, tuple or iterator of arrays."""
    shape = "(rows, in_features)"
    if isinstance(calibration, Iterator):
        items = ((f"calibration[{i}]", x) for i, x in enumerate(calibration))
        named: Any = ((name, as_matrix(x, name, shape)) for name, x in items)
    else:
        named = as_matrices(calibration, "calibration", shape).items()
    for name, batch in named:
        if batch.shape[1] != k:
            raise FeatureDimMismatchError(k, batch.shape[1], name)
        check_finite(batch, name)
        yield batch.astype(F32, copy=False)


class SecondMoments:
    """Sums of ``x.T @ x`` over calibration rows, apart for the rows held out.

    Attributes
    ----------
    used, held_out : ndarray of float64, (k, k)
    rows : list of int
        How many rows went into each.
    """

    def __init__(self, batches: Iterable[NDArray[np.float32]], k: int) -> None:
        self.used, self.held_out = np.zeros((k, k)), np.zeros((k, k))
        self.rows = [0, 0]
        # Small batches are gathered: a product costs k * k additions more, for however few rows.
        block, new_unchecked = np.empty((_ROWS, k)), 0
        for batch in batches:
            for part in np.split(batch, range(_ROWS - new_unchecked, len(batch), _ROWS)):
                block[new_unchecked : new_unchecked + len(part)] = part
                new_unchecked += len(part)
                if new_unchecked == _ROWS:
                    self._add(block)
                    new_unchecked = 0
        if new_unchecked:
            self._add(block[:new_unchecked])
        if not any(self.rows):
            raise EmptyInputError("calibration: expected at least one row, got none")

    def _add(self, x: NDArray[np.float64]) -> None:
        place = sum(self.rows) + np.arange(len(x))
        is_held_out = place // _RUN % _RUNS == _RUNS - 1
        for i, (total, rows) in enumerate(((self.used, x[~is_held_out]), (self.held_out, x[is_held_out]))):
            total += rows.T @ rows
            self.rows[i] += len(rows)


def compensate(w: NDArray[np.float32], plain: DynQuantTensor, moments: SecondMoments) -> DynQuantTensor:
    """`plain`, which is w rounded, with the codes that leave the least error in the output.

    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR
    2023). With H the second moments of the inputs, damped on the diagonal, and U the upper Cholesky factor of
    the inverse of H: columns are rounded one after the other, those with the largest moment first, and the
    error of column j, over U[j, j], times U[j, l] is taken off each later column l. The fewer the rows, the
    stronger the damping must be: the share of _DAMPINGS is taken, or `plain` itself, which leaves the least
    error on the rows held out, tried on some of the outputs. The codes then come from all rows.
    """
    with np.errstate(all="ignore"):  # what is pushed beyond float32 saturates
        damping = _best_damping(w, plain, moments) if all(moments.rows) else _DEFAULT_DAMPING
        if damping is None:
            return plain
        grid = _Grid(plain)
        try:
            codes = _Rounding(moments.used + moments.held_out, damping).codes(w, grid)
        except np.linalg.LinAlgError:
            return plain
        return dataclasses.replace(plain, data=grid.packed(codes))


def _best_damping(w: NDArray[np.float32], plain: DynQuantTensor, moments: SecondMoments) -> float | None:
    """The damping that leaves the least error on the rows held out; None for no compensation."""
    tried = slice(None, None, -(-len(w) // _TRIED_OUTPUTS))
    w, grid, plain_values = w[tried], _Grid(plain, tried), plain.dequantize()[tried]

    def error(values: NDArray[np.float32]) -> float:
        d = values.astype(np.float64) - w
        return float(np.sum((d @ moments.held_out) * d))

    errors: dict[float | None, float] = {None: error(plain_values)}
    for damping in _DAMPINGS:
        with contextlib.suppress(np.linalg.LinAlgError):
            errors[damping] = error(grid.values(_Rounding(moments.used, damping).codes(w, grid)))
    return min(errors, key=errors.__getitem__)


class _Grid:
    """The codes that `rows` of a quantized matrix (n, k) can have, and what they stand for."""

    def __init__(self, tensor: DynQuantTensor, rows: slice = _ALL) -> None:
        fmt = tensor.format
        symmetric = tensor.zero_points is None
        self.scales = tensor.scales.reshape(len(tensor.scales), -1)[rows]
        self.zero_points = np.zeros_like(self.scales)
        if tensor.zero_points is not None:
            self.zero_points[...] = tensor.zero_points.reshape(len(tensor.scales), -1)[rows]
        self.least, self.most = (-fmt.clip, fmt.clip) if symmetric else (0, 15)
        self.group, self.packs = fmt.group_of(tensor.shape[1]), fmt.packed

    def round(self, column: NDArray[np.float32], j: int) -> NDArray[np.float32]:
        """Codes of column j, as quantize_row_f32_s8 and _u4 have them."""
        scale, zero_point = self.scales[:, j // self.group], self.zero_points[:, j // self.group]
        v = np.divide(column, scale, out=np.zeros_like(column), where=scale > 0)
        codes: NDArray[np.float32] = np.trunc(v + np.copysign(_HALF, v)) + zero_point
        return codes.clip(self.least, self.most)

    def value(self, codes: NDArray[np.float32], j: int) -> NDArray[np.float32]:
        """What the codes of column j stand for."""
        return (codes - self.zero_points[:, j // self.group]) * self.scales[:, j // self.group]

    def values(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """What codes (k, n), column by column, stand for, as (n, k)."""
        return np.stack([self.value(column.astype(F32), j) for j, column in enumerate(codes)], axis=1)

    def packed(self, codes: NDArray[np.int8]) -> NDArray[Any]:
        """Codes (k, n), column by column, as the data of a tensor."""
        if not self.packs:
            return np.ascontiguousarray(codes.T)
        nibbles = (codes.T & 0x0F).astype(np.uint8)
        data = np.ascontiguousarray(nibbles[:, 0::2])
        data[:, : nibbles.shape[1] // 2] |= nibbles[:, 1::2] << 4
        return data


class _Rounding:
    """The order in which columns are rounded, and U in that order.

    Raises LinAlgError where the moments are all zero, or so far apart that they have no inverse in float64.
    """

    def __init__(self, moments: NDArray[np.float64], damping: float) -> None:
        # `take`, for an index in brackets crashes NumPy where there is no memory.
        diagonal = moments.diagonal()
        self.order = np.argsort(-diagonal, kind="stable")
        h = moments.take(self.order, 0).take(self.order, 1)
        h[np.diag_indices_from(h)] += damping * diagonal.mean()
        self.upper = np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(h)).T)

    def codes(self, w: NDArray[np.float32], grid: _Grid) -> NDArray[np.int8]:
        """Codes of w, column by column, (k, n)."""
        codes = np.empty((w.shape[1], w.shape[0]), np.int8)
        left = w.T.take(self.order, 0).astype(np.float64)
        for first in range(0, len(left), _BLOCK):
            block, upper = left[first : first + _BLOCK], self.upper[first : first + _BLOCK]
            errors = np.empty_like(block)
            for i, j in enumerate(self.order[first : first + _BLOCK]):
                codes[j] = column = grid.round(block[i].astype(F32), j)
                errors[i] = (block[i] - grid.value(column, j)) / upper[i, first + i]
                block[i + 1 :] -= np.outer(upper[i, first + i + 1 : first + len(block)], errors[i])
            left[first + len(block) :] -= upper[:, first + len(block) :].T @ errors
        return codes
