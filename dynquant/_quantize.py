"""Dynamic quantization: scales and codes from the values at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import empty

from . import _core
from ._tensor import (
    DynamicScaleMode,
    DynQuantFormat,
    DynQuantTensor,
    MaxAbs,
    Percentile,
    packed_format,
    tensor_of_checked,
)
from ._threads import parallel_ranges
from ._validate import (
    F32,
    I8,
    U8,
    as_clip,
    as_exported,
    as_floats,
    as_thread_count,
    check_finite,
    checked_out,
    float_matrix,
    raise_non_finite,
)
from .errors import ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_MAX_ABS = MaxAbs()

# Axes that `x` must have at the least, and how an error says so.
_LEAST_AXES = {
    "per_row": (2, "(..., k) with at least two axes"),
    "per_group": (1, "(..., k) with at least one axis"),
}


def compute_scale(x: ArrayLike, clip_val: float, mode: DynamicScaleMode = _MAX_ABS) -> float:
    """The scale that maps `x` to codes in [-clip_val, clip_val].

    Parameters
    ----------
    x : array_like of floats, any shape
    clip_val : float
        The largest code: 127 for int8, 7 for int4.
    mode : MaxAbs or Percentile
        Which magnitude becomes the largest code.

    Returns
    -------
    float
        A float32 value: that magnitude over `clip_val`, one float32 division. 0.0 for an empty or all-zero
        `x`, or when the quotient underflows.

    Raises
    ------
    DTypeError
        If `x` does not hold floats.
    NonFiniteError
        If it holds NaN or infinity.
    ParameterError
        If `clip_val` is not a finite number above 0, or so small that the scale overflows; or if `mode` is no
        scale mode.

    Notes
    -----
    Exact for both modes, in O(n) time and with less than 100 KiB of scratch whatever the values are. A
    percentile of many values is found by sampling for bounds and selecting between them (Floyd and Rivest,
    1975), and where that fails, as among values that are often repeated, by radix selection.

    Examples
    --------
    >>> round(compute_scale([1, -2, 0.5], 127), 6)  # 2 / 127
    0.015748
    >>> compute_scale(np.zeros(8, np.float32), 127)
    0.0
    """
    array = as_floats(x, "x")
    clip = as_clip(clip_val)
    scale = np.empty(1, F32)
    rank = rank_of(mode, array.size)
    if not _core.scale_rows(float_matrix(array, 1, array.size), scale, clip, rank, rank, array.size or 1):
        raise_non_finite(array, "x")
    if not np.isfinite(scale[0]):
        raise ParameterError(f"clip_val: expected a scale within float32, got {scale[0]} with {clip}")
    return float(scale[0])


def dynamic_quantize_int8(
    x: ArrayLike, mode: DynamicScaleMode = _MAX_ABS, *, out: NDArray[np.int8] | None = None
) -> DynQuantTensor:
    """Quantize `x` to int8 with one scale: `dynamic_quantize` with `DynQuantFormat.INT8_PER_TENSOR`.

    Examples
    --------
    >>> t = dynamic_quantize_int8([127, 0.5, -0.5, 1.5, 2.5])
    >>> t.data.tolist(), t.scales.tolist()
    ([127, 1, -1, 2, 3], [1.0])
    """
    return quantize_named(x, DynQuantFormat.INT8_PER_TENSOR, mode, out, 1)


def dynamic_quantize_int8_per_row(
    x: ArrayLike,
    mode: DynamicScaleMode = _MAX_ABS,
    *,
    out: NDArray[np.int8] | None = None,
    num_threads: int = 1,
) -> DynQuantTensor:
    """Quantize every row of `x` to int8 with a scale of its own.

    `dynamic_quantize` with `DynQuantFormat.INT8_PER_ROW`. A row's codes and scale depend on that row alone.

    Examples
    --------
    >>> t = dynamic_quantize_int8_per_row([[1.0, -2.0], [0.0, 0.0]])
    >>> t.data.tolist(), t.scales.shape
    ([[64, -127], [0, 0]], (2,))
    """
    return quantize_named(x, DynQuantFormat.INT8_PER_ROW, mode, out, as_thread_count(num_threads))


def dynamic_quantize_int4(
    x: ArrayLike, mode: DynamicScaleMode = _MAX_ABS, *, packed: bool = False
) -> DynQuantTensor:
    """Quantize `x` to 4-bit codes with one scale: `dynamic_quantize` with `DynQuantFormat.INT4_PER_TENSOR`.

    Examples
    --------
    >>> t = dynamic_quantize_int4([7, -3.5, 1], packed=True)
    >>> [hex(b) for b in t.data]
    ['0xc7', '0x1']
    """
    return quantize_named(x, packed_format(DynQuantFormat.INT4_PER_TENSOR, packed), mode, None, 1)


def dynamic_quantize(
    x: ArrayLike,
    format: DynQuantFormat = DynQuantFormat.INT8_PER_ROW,
    mode: DynamicScaleMode = _MAX_ABS,
    *,
    packed: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int = 1,
) -> DynQuantTensor:
    """Quantize `x`, with scales computed from its own values.

    Parameters
    ----------
    x : array_like of floats, any shape; (..., k) with at least two axes for a per-row format, one per group
        float32 is read where it lies if it is C-contiguous; float16 and bfloat16 are widened as they are
        read; float64 and strided arrays are copied to float32 first.
    format : DynQuantFormat
        Width of the codes, and what shares a scale.
    mode : MaxAbs or Percentile
        Which magnitude becomes the largest code.
    packed : bool
        Put two 4-bit codes into a byte, the even element in the low nibble. A format that is packed stays so.
    out : ndarray, optional
        Takes the codes: int8 of the shape of `x`, or uint8 of the packed shape; C-contiguous, apart from `x`.
        Allocated if not given.
    num_threads : int
        How many threads share the rows, the caller's among them; a single row is not shared. The result does
        not depend on it. A thread costs about 100 us to start and end.

    Returns
    -------
    DynQuantTensor

    Raises
    ------
    DTypeError
        If `x` does not hold floats, or `out` not the codes' dtype.
    NonFiniteError
        If `x` holds NaN or infinity; `index` is the first one's place in C order.
    ShapeMismatchError
        If `x` has too few axes, or `out` another shape than the codes.
    LayoutError
        If `out` is not C-contiguous, read-only, or overlaps `x`.
    ParameterError
        If another argument has a value that it cannot take. After any of these `out` is as it was.

    Notes
    -----
    ``code = clamp(round(x / scale), -clip, clip)`` with a true division and halves rounded away from zero, in
    float32; ``scale`` as in `compute_scale`; clip is 127 or 7. A zero scale gives zero codes. Bit for bit the
    same on every instruction set.

    With `out` given and several rows, all rows are checked before the first is written, which reads `x`
    twice; without it each row is read once and its second pass comes from cache.

    Examples
    --------
    >>> t = dynamic_quantize([[1.0, -7.0, 3.4]], DynQuantFormat.INT4_PER_ROW)
    >>> t.data.tolist(), t.scales.tolist()
    ([[1, -7, 3]], [1.0])
    """
    if not isinstance(format, DynQuantFormat):
        raise ParameterError(f"format: expected a DynQuantFormat, got {shown(format)}")
    return quantize_named(x, packed_format(format, packed), mode, out, as_thread_count(num_threads))


def dynamic_quantize_linear(x: ArrayLike) -> tuple[NDArray[np.uint8], np.float32, np.uint8]:
    """The ONNX operator DynamicQuantizeLinear: uint8 codes, asymmetric, one scale for all of `x`.

    Parameters
    ----------
    x : array_like of floats, any shape

    Returns
    -------
    y : ndarray of uint8, shape of `x`
        ``clip(rint(x / scale) + zero_point, 0, 255)``, halves to even.
    scale : float32
        ``(max(0, max x) - min(0, min x)) / 255``; 1 where that is 0.
    zero_point : uint8
        ``rint(clip(-min(0, min x) / scale, 0, 255))``. A code stands for ``(y - zero_point) * scale``.

    Raises
    ------
    DTypeError, NonFiniteError
        If `x` does not hold floats, or holds NaN or infinity.
    ParameterError
        If the range of `x` is beyond float32.

    Notes
    -----
    Operator DynamicQuantizeLinear-11 of the ONNX standard, bit for bit as ONNX Runtime computes it.

    Examples
    --------
    >>> y, scale, zero_point = dynamic_quantize_linear([0.0, 2.0, -3.0, -2.5, 1.34, 0.5])
    >>> y.tolist(), int(zero_point)
    ([153, 255, 0, 26, 221, 179], 153)
    """
    array = as_floats(x, "x")
    check_finite(array, "x")
    rows = float_matrix(array, 1, array.size)
    least, most = (np.float32(bound) for bound in _core.min_max(rows))
    with np.errstate(all="ignore"):
        scale = (most - least) / np.float32(255)
        if not np.isfinite(scale):
            raise ParameterError(f"x: expected a range within float32, got {least} to {most}")
        scale = scale if scale > 0 else np.float32(1)
        zero_point = np.rint(np.clip(-least / scale, np.float32(0), np.float32(255))).astype(np.uint8)
    y = empty(array.shape, U8)
    _core.quantize_u8(rows, float(scale), int(zero_point), y.reshape(-1))
    return y, scale, zero_point


def rank_of(mode: DynamicScaleMode, n: int) -> int:
    """What the kernels take for `mode`: a rank among `n` magnitudes, or -1 for the largest."""
    if isinstance(mode, MaxAbs):
        return -1
    if isinstance(mode, Percentile):
        return mode.rank(n) if n else -1
    raise ParameterError(f"mode: expected MaxAbs() or Percentile(p), got {shown(mode)}")


def quantize_named(
    x: ArrayLike,
    fmt: DynQuantFormat,
    mode: DynamicScaleMode,
    out: NDArray[Any] | None,
    threads: int,
    name: str = "x",
) -> DynQuantTensor:
    """`dynamic_quantize` for an argument called `name`."""
    if out is not None:
        x = as_exported(x, name)
    array = as_floats(x, name)
    shape = array.shape
    scales_shape: int | tuple[int, ...]
    if fmt.granularity == "per_tensor":
        m, k, scales_shape = 1, array.size, 1
        group = k or 1
    else:
        axes, expected = _LEAST_AXES[fmt.granularity]
        if len(shape) < axes:
            raise ShapeMismatchError(expected, shape, name)
        (m, k), scales_shape = fmt.rows_of(shape), fmt.scales_shape(shape)
        group = fmt.group_of(k)
    clip, packed = fmt.clip, fmt.packed
    rank = last_rank = rank_of(mode, group if k else 0)
    if k % group:
        last_rank = rank_of(mode, k % group)
    data_shape, dtype = (fmt.data_shape(shape), U8) if packed else (shape, I8)
    data = empty(data_shape, dtype) if out is None else checked_out(out, data_shape, dtype, array, x)
    scales = empty(scales_shape, F32)
    rows = float_matrix(array, m, k)
    codes = _core.CodeMatrix(data, scales, None, m, k, group, packed, True)

    # A new array may be given up half written; the caller's may not.
    check_first = out is not None and scales.size > 1
    if check_first:
        finite = parallel_ranges(_core.scale_rows, (rows, scales, clip, rank, last_rank, group), m, threads)
    else:
        work = (rows, codes, clip, rank, last_rank)
        finite = parallel_ranges(_core.dynamic_quantize_rows, work, m, threads)
    if not finite:
        raise_non_finite(array, name)
    if check_first:
        parallel_ranges(_core.quantize_rows, (rows, codes, clip, rank < 0), m, threads)
    return tensor_of_checked(data, scales, shape, fmt)
