"""Rotation by a Hadamard matrix, which spreads outliers over all channels."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from . import _core
from ._validate import F32, as_count, as_exported, as_floats, check_finite, checked_out, float_matrix
from .errors import ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def hadamard_transform(
    x: ArrayLike, *, block_size: int | None = None, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Rotate rows by an orthonormal Hadamard matrix, which spreads outliers over all channels.

    Parameters
    ----------
    x : array_like of floats, (..., n)
    block_size : int, optional
        A power of two that divides n. Every `block_size` elements are transformed by themselves. By default
        the largest one.
    out : ndarray of float32, optional
        Of the shape of `x`, C-contiguous. May be `x` itself, but must not overlap it otherwise. Allocated if
        not given.

    Returns
    -------
    ndarray of float32
        ``H x / sqrt(block_size)`` for every block, H the Hadamard matrix in Sylvester's order. `out` if it
        was given.

    Raises
    ------
    ParameterError
        If `block_size` is no power of two that divides n, or a magnitude is above float32's largest over
        block_size: its sums might leave float32.
    ShapeMismatchError, DTypeError, NonFiniteError, LayoutError
        If `x` has no axis or does not hold finite floats, or `out` cannot take the result. After any of
        these the arrays are as they were.

    Notes
    -----
    The transform is its own inverse up to rounding, and leaves dot products unchanged: with activations and
    the rows of a weight matrix rotated alike their product stays what it was. n log2(block_size) additions,
    in one order on every instruction set. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated
    LLMs" (NeurIPS 2024).

    Examples
    --------
    >>> hadamard_transform([3.0, 1.0, 0.0, 0.0]).tolist()
    [2.0, 1.0, 2.0, 1.0]
    """
    return rotate_named(x, block_size, out, "x")


def rotate_named(
    x: ArrayLike, block_size: int | None, out: NDArray[np.float32] | None, name: str
) -> NDArray[np.float32]:
    """`hadamard_transform` for an argument called `name`."""
    x = as_exported(x, name)
    array = as_floats(x, name)
    if array.ndim == 0:
        raise ShapeMismatchError("(..., n)", array.shape, name)
    block = _block_size(block_size, array.shape[-1])
    if out is not None:
        checked_out(out, array.shape, F32, in_place=x)
    check_finite(array, name)
    limit = float(np.finfo(F32).max) / block
    if max(map(abs, _core.min_max(float_matrix(array, 1, array.size)))) > limit:
        raise ParameterError(
            f"{name}: expected magnitudes up to {limit:.3g}, so that sums stay within float32"
        )
    result = np.empty(array.shape, F32) if out is None else out
    result[...] = array
    _core.hadamard(result.reshape(-1), block)
    return result


def hadamard_block(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n or 1


def _block_size(block_size: int | None, n: int) -> int:
    """`block_size`, checked, or the one for n."""
    if block_size is None:
        return hadamard_block(n)
    block = as_count(block_size, "block_size")
    if block & (block - 1) or n % block or block > sys.maxsize:
        raise ParameterError(f"block_size: expected a power of two that divides {n}, got {shown(block_size)}")
    return block
