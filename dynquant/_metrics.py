"""What quantising cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _core
from ._tensor import DynQuantTensor, as_run
from ._validate import as_floats, check_finite, float_rows
from .errors import ParameterError, ShapeMismatchError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def quantization_mae(original: ArrayLike, quantized: DynQuantTensor) -> float:
    """Mean absolute error of a quantised tensor.

    Parameters
    ----------
    original : array_like of floats
        What was quantised.
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
        If `original` does not hold floats, or holds NaN or infinity.
    ParameterError
        If `quantized` is no DynQuantTensor.

    Notes
    -----
    One pass; the dequantised tensor is never held whole.

    Examples
    --------
    >>> from dynquant import dynamic_quantize_int8
    >>> x = [127.0, 0.5, 0.0]
    >>> quantization_mae(x, dynamic_quantize_int8(x)) == 0.5 / 3
    True
    """
    if not isinstance(quantized, DynQuantTensor):
        raise ParameterError(f"quantized: expected a DynQuantTensor, got {type(quantized).__name__}")
    array = as_floats(original, "original")
    if array.shape != quantized.shape:
        raise ShapeMismatchError(quantized.shape, array.shape, "original")
    if array.size == 0:
        return 0.0
    check_finite(array, "original")
    m, k = quantized.format.rows_of(quantized.shape)
    codes, scales = as_run(quantized.data), as_run(quantized.scales)
    return _core.sum_abs_error(float_rows(array, m, k), codes, scales, quantized.format.packed) / array.size
