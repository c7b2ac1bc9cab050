"""Integer linear algebra."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import _core
from ._quantize import quantize_named
from ._tensor import DynQuantFormat, MaxAbs
from ._validate import F32, as_finite_vector, as_floats, as_int8_matrix, checked_out
from .errors import EmptyInputError, ShapeMismatchError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def w8a8_matvec(
    weight_i8: ArrayLike,
    weight_scales: ArrayLike,
    activation: ArrayLike,
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Product of an int8 weight matrix with an activation that is quantised to int8 on the way.

    Parameters
    ----------
    weight_i8 : array_like of int8, (out_features, in_features)
        All values, -128 included.
    weight_scales : array_like of floats, (out_features,)
    activation : array_like of floats, (in_features,)
        Quantised as by `dynamic_quantize_int8`, with one scale.
    out : ndarray of float32, (out_features,), optional
        C-contiguous, apart from the inputs. Allocated if not given.

    Returns
    -------
    ndarray of float32, (out_features,)
        ``float32(sum) * weight_scale * activation_scale``, in that order. `out` if it was given.

    Raises
    ------
    EmptyInputError
        If `activation` has no elements.
    DTypeError
        If `weight_i8` is not int8, or another argument does not hold floats.
    ShapeMismatchError
        If the shapes do not fit each other.
    NonFiniteError
        If `weight_scales` or `activation` hold NaN or infinity.
    LayoutError
        If `out` is not C-contiguous, read-only, or overlaps an input. After any of these it is as it was.

    Notes
    -----
    Each sum is the exact integer for every in_features: partial sums of 65,536 products, at most
    65,536 * 128 * 127 < 2**31 in magnitude, are added up in int64. Nothing saturates on any instruction set.

    Examples
    --------
    >>> w8a8_matvec(np.array([[2, -128]], np.int8), [0.5], [127.0, 1.0]).tolist()
    [63.0]
    """
    weight = as_int8_matrix(weight_i8, "weight_i8")
    n, k = weight.shape
    vector = as_floats(activation, "activation")
    if vector.size == 0:
        raise EmptyInputError(f"activation: expected at least one element, got shape {vector.shape}")
    if vector.shape != (k,):
        raise ShapeMismatchError((k,), vector.shape, "activation")
    scales = as_finite_vector(weight_scales, "weight_scales")
    if scales.shape != (n,):
        raise ShapeMismatchError((n,), scales.shape, "weight_scales")
    if out is None:
        out = np.empty(n, F32)
    else:
        checked_out(out, (n,), F32, weight_i8, weight_scales, activation)
    quantized = quantize_named(vector, DynQuantFormat.INT8_PER_TENSOR, MaxAbs(), None, 1, "activation")
    _core.w8a8_matvec(weight, scales, quantized.data, quantized.scales[0], out)
    return out
