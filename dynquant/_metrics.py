"""What quantizing cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _core
from ._tensor import DynQuantTensor, code_matrix
from ._validate import as_flag, as_floats, check_finite, float_matrix
from .errors import ParameterError, ShapeMismatchError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class ErrorMetrics(NamedTuple):
    """How far an approximation is from what it stands for; floats, or arrays with one element a row.

    Attributes
    ----------
    mae : float
        Mean of ``|x - value|``.
    mse : float
        Mean of ``(x - value)**2``.
    max_abs : float
        Largest ``|x - value|``.
    sqnr_db : float
        ``10 log10(sum x**2 / sum (x - value)**2)``: power of the original over power of the error, in
        decibels. inf without error, nan if the original is zero too.
    cosine : float
        Cosine of the angle between the two. nan if either is zero.
    """

    mae: Any
    mse: Any
    max_abs: Any
    sqnr_db: Any
    cosine: Any


def error_metrics(
    original: ArrayLike, quantized: DynQuantTensor | ArrayLike, *, per_row: bool = False
) -> ErrorMetrics:
    """Five measures of what quantizing cost, in one pass.

    Parameters
    ----------
    original : array_like of floats, any shape
        What was quantized, or the exact output of a layer.
    quantized : DynQuantTensor or array_like of floats
        Of the same shape.
    per_row : bool
        One value for each row along the last axis, of shape ``original.shape[:-1]``.

    Returns
    -------
    ErrorMetrics
        All nan, max_abs 0, for empty input.

    Raises
    ------
    ShapeMismatchError
        If the shapes differ, or `per_row` and there is no axis.
    DTypeError, NonFiniteError
        If an array, or the scales of a tensor, do not hold floats, or hold NaN or infinity.

    Notes
    -----
    Both sides are taken as float32; differences, squares and sums are float64. A tensor is never dequantized
    whole. Values of a tensor that are beyond float32 are infinite, and so is the error.

    Examples
    --------
    >>> metrics = error_metrics([3.0, 4.0], [3.0, 5.0])
    >>> metrics.mae, metrics.mse, metrics.max_abs, round(metrics.sqnr_db, 2)
    (0.5, 0.5, 1.0, 13.98)
    """
    array, sums, k = _error_sums(original, quantized, as_flag(per_row, "per_row"))
    with np.errstate(all="ignore"):
        abs_sum, square_sum, power, value_power, product, most = sums.T
        metrics = (
            abs_sum / np.float64(k),
            square_sum / np.float64(k),
            most,
            10 * np.log10(power / square_sum),
            # Roundings may carry it past 1.
            np.clip(product / np.sqrt(power * value_power), -1.0, 1.0),
        )
    if per_row:
        return ErrorMetrics(*(m.reshape(array.shape[:-1]) for m in metrics))
    return ErrorMetrics(*(float(m[0]) for m in metrics))


def quantization_mae(original: ArrayLike, quantized: DynQuantTensor) -> float:
    """Mean absolute error of a quantized tensor.

    Parameters
    ----------
    original : array_like of floats
        What was quantized; float64 is rounded to float32 first, as in quantizing.
    quantized : DynQuantTensor
        Of the same shape.

    Returns
    -------
    float
        Mean of ``|original - code * scale|``, each value rounded to float32 as `DynQuantTensor.dequantize`
        gives it, the differences taken and added up in float64. 0.0 for empty tensors.

    Raises
    ------
    ShapeMismatchError
        If the shapes differ.
    DTypeError, NonFiniteError
        If `original` or the scales of `quantized` do not hold floats, or hold NaN or infinity.
    ParameterError
        If `quantized` is no DynQuantTensor.

    Notes
    -----
    One pass; the dequantized tensor is never held whole. `error_metrics` gives more.

    Examples
    --------
    >>> from dynquant import dynamic_quantize_int8
    >>> x = [127.0, 0.5, 0.0]
    >>> quantization_mae(x, dynamic_quantize_int8(x)) == 0.5 / 3
    True
    """
    if not isinstance(quantized, DynQuantTensor):
        raise ParameterError(f"quantized: expected a DynQuantTensor, got {type(quantized).__name__}")
    _check_scales(quantized)
    array = _checked_original(original, quantized.shape)
    if array.size == 0:
        return 0.0
    rows = float_matrix(array, *quantized.format.rows_of(quantized.shape))
    return _core.sum_abs_error(rows, code_matrix(quantized)) / array.size


def _check_scales(quantized: DynQuantTensor) -> None:
    check_finite(as_floats(quantized.scales, "quantized.scales"), "quantized.scales")


def _checked_original(original: ArrayLike, shape: tuple[int, ...]) -> NDArray[Any]:
    array = as_floats(original, "original")
    if array.shape != shape:
        raise ShapeMismatchError(shape, array.shape, "original")
    check_finite(array, "original")
    return array


def _error_sums(
    original: ArrayLike, quantized: DynQuantTensor | ArrayLike, per_row: bool
) -> tuple[NDArray[Any], NDArray[np.float64], int]:
    """The original, the sums of kernels/metrics.pxi, (rows or 1, 6), and how many elements each is over."""
    if not isinstance(quantized, DynQuantTensor):
        quantized = as_floats(quantized, "quantized")
    array = _checked_original(original, quantized.shape)
    if per_row and not array.shape:
        raise ShapeMismatchError("(..., k)", array.shape, "original")
    length = array.shape[-1] if per_row else array.size
    sums = np.zeros((math.prod(array.shape[:-1]) if per_row else 1, 6))
    if isinstance(quantized, DynQuantTensor):
        _check_scales(quantized)
        if array.size:
            rows = float_matrix(array, *quantized.format.rows_of(array.shape))
            _core.error_sums(rows, code_matrix(quantized), length, sums)
    else:
        check_finite(quantized, "quantized")
        if array.size:
            rows, values = (float_matrix(a, 1, array.size) for a in (array, quantized))
            _core.error_sums_of(rows, values, length, sums)
    return array, sums, length
