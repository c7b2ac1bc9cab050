"""Exact products of int8 matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._validate import as_exported, as_int8_matrix, as_thread_count, checked_out
from .errors import ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

_DTYPES = np.dtype(np.int32), np.dtype(np.int64)

# The most products of 2**14, those of -128 by itself, that an int32 holds.
_INT32_K = (2**31 - 1) // 2**14


def int8_inner(
    a: ArrayLike,
    b: ArrayLike,
    *,
    dtype: DTypeLike = np.int32,
    out: NDArray[Any] | None = None,
    num_threads: int = 1,
) -> NDArray[Any]:
    """Exact inner products of the rows of two int8 matrices, as `numpy.inner` without overflow.

    Parameters
    ----------
    a : array_like of int8, (m, k)
    b : array_like of int8, (n, k)
        Both may hold all values, -128 included, and may be one array.
    dtype : dtype
        ``numpy.int32``, or ``numpy.int64`` for k above 131,071.
    out : ndarray of `dtype`, (m, n), optional
        C-contiguous, apart from the inputs. Allocated if not given.
    num_threads : int
        The most threads to use, the caller's among them; -1: ``DYNQUANT_NUM_THREADS``, or the CPUs that this
        process may use. Small work takes fewer. The result does not depend on it.

    Returns
    -------
    ndarray of `dtype`, (m, n)
        ``a @ b.T`` with the sums that infinitely wide integers give. `out` if it was given.

    Raises
    ------
    DTypeError
        If `a` or `b` is not int8, or `out` not of `dtype`.
    ShapeMismatchError
        If the shapes do not fit each other.
    ParameterError
        If `dtype` is neither of the two, or is int32 and k above 131,071; or `num_threads` is not a positive
        integer or -1.
    LayoutError
        If `out` is not C-contiguous, read-only, or overlaps an input. After any of these it is as it was.

    Notes
    -----
    Up to k = 131,071 a sum is at most 131,071 * 128 * 128 < 2**31 in magnitude. The matrix with fewer rows is
    packed for the kernels of W8A8, which takes about its bytes of memory; the other is read as it lies. An
    input that is not C-contiguous is copied.

    Examples
    --------
    >>> a = np.array([[127, -128], [1, 2]], np.int8)
    >>> int8_inner(a, a).tolist()
    [[32513, -129], [-129, 5]]
    """
    a, b = as_exported(a, "a"), as_exported(b, "b")
    x, y = as_int8_matrix(a, "a", "(m, k)"), as_int8_matrix(b, "b", "(n, k)")
    (m, k), n = x.shape, y.shape[0]
    if y.shape[1] != k:
        raise ShapeMismatchError(("n", k), y.shape, "b")
    sums = _as_sums(dtype, k)
    threads = as_thread_count(num_threads)
    if out is None:
        out = np.empty((m, n), sums)
    else:
        checked_out(out, (m, n), sums, x, a, y, b)
    _core.int8_inner(x, y, out, m, n, k, sums == np.int64, threads)
    return out


def _as_sums(dtype: Any, k: int) -> np.dtype[Any]:
    """`dtype` if it holds every sum over k."""
    try:
        sums: np.dtype[Any] = np.dtype(dtype)
    except TypeError as error:
        raise ParameterError(f"dtype: expected np.int32 or np.int64, got {shown(dtype)}") from error
    if dtype is None or not sums.isnative or sums not in _DTYPES:
        raise ParameterError(f"dtype: expected np.int32 or np.int64, got {shown(dtype)}")
    if sums == np.int32 and k > _INT32_K:
        raise ParameterError(
            f"dtype: expected np.int64, since an int32 holds sums over up to k = {_INT32_K:,}, got np.int32 "
            f"and k = {k:,}"
        )
    return sums
