"""Dynamic quantization: scales and codes from the values at hand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import empty

from . import _core
from ._format import DynamicScaleMode, DynQuantFormat, MaxAbs, Percentile, packed_format
from ._tensor import DynQuantTensor, tensor_of_checked
from ._validate import (
    F32,
    I8,
    U8,
    as_array,
    as_clip,
    as_exported,
    as_flag,
    as_floats,
    as_thread_count,
    check_finite,
    checked_out,
    float_matrix,
    raise_non_finite,
)
from .errors import DTypeError, ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_MAX_ABS = MaxAbs()

# How many axes `x` must have, and how an error says so.
_MIN_AXES = {
    "per_row": (2, "(..., k) with at least two axes"),
    "per_group": (1, "(..., k) with at least one axis"),
}


def compute_scale(
    x: ArrayLike, clip_val: float, mode: DynamicScaleMode = _MAX_ABS, *, num_threads: int = 1
) -> float:
    """The scale that maps `x` to codes in [-clip_val, clip_val].

    Parameters
    ----------
    x : array_like of floats, any shape
    clip_val : float
        The largest code: 127 for int8, 7 for int4.
    mode : MaxAbs or Percentile
        Which magnitude becomes the largest code.
    num_threads : int
        As in `dynamic_quantize`.

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
    1975). Where the order of the values defeats the sampling, as it may where they are sorted, it is found by
    radix selection.

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
    rows, threads = float_matrix(array, 1, array.size), as_thread_count(num_threads)
    if not _core.scale_rows(rows, scale, clip, rank, rank, array.size or 1, threads):
        raise_non_finite(array, "x")
    value = float(scale[0])
    if not math.isfinite(value):
        raise ParameterError(f"clip_val: expected a scale within float32, got {value} with {clip}")
    return value


def dynamic_quantize_int8(
    x: ArrayLike,
    mode: DynamicScaleMode = _MAX_ABS,
    *,
    out: NDArray[np.int8] | None = None,
    num_threads: int = 1,
) -> DynQuantTensor:
    """Quantize `x` to int8 with one scale: `dynamic_quantize` with `DynQuantFormat.INT8_PER_TENSOR`.

    Examples
    --------
    >>> t = dynamic_quantize_int8([127, 0.5, -0.5, 1.5, 2.5])
    >>> t.data.tolist(), t.scales.tolist()
    ([127, 1, -1, 2, 3], [1.0])
    """
    return quantize_named(x, DynQuantFormat.INT8_PER_TENSOR, mode, out, as_thread_count(num_threads))


def dynamic_quantize_int8_per_row(
    x: ArrayLike,
    mode: DynamicScaleMode = _MAX_ABS,
    *,
    out: NDArray[np.int8] | None = None,
    check_finite: bool = True,
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
    check, threads = as_flag(check_finite, "check_finite"), as_thread_count(num_threads)
    return quantize_named(x, DynQuantFormat.INT8_PER_ROW, mode, out, threads, check=check)


def dynamic_quantize_int4(
    x: ArrayLike, mode: DynamicScaleMode = _MAX_ABS, *, packed: bool = False, num_threads: int = 1
) -> DynQuantTensor:
    """Quantize `x` to 4-bit codes with one scale: `dynamic_quantize` with `DynQuantFormat.INT4_PER_TENSOR`.

    Examples
    --------
    >>> t = dynamic_quantize_int4([7, -3.5, 1], packed=True)
    >>> [hex(b) for b in t.data]
    ['0xc7', '0x1']
    """
    fmt = packed_format(DynQuantFormat.INT4_PER_TENSOR, packed)
    return quantize_named(x, fmt, mode, None, as_thread_count(num_threads))


def dynamic_quantize(
    x: ArrayLike,
    format: DynQuantFormat = DynQuantFormat.INT8_PER_ROW,
    mode: DynamicScaleMode = _MAX_ABS,
    *,
    packed: bool = False,
    out: NDArray[Any] | tuple[NDArray[Any], NDArray[np.float32]] | None = None,
    check_finite: bool = True,
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
        Takes the codes: int8 of the shape of `x`, or uint8 of the packed shape. Contiguous along its last
        axis, so that it may be a part of a larger array such as a key cache, and disjoint from `x`. Or a
        tuple ``(codes, scales)``; `scales` is C-contiguous float32. Allocated if not given.
    check_finite : bool
        Check all of `x` for NaN and infinity before the first row is written to `out`, which reads `x` twice.
        With False they are an error too, but `out` may then have rows of the result.
    num_threads : int
        The most threads to use, the caller's among them; -1: ``DYNQUANT_NUM_THREADS``, or the CPUs that this
        process may use. Small work takes fewer. The result does not depend on it.

    Returns
    -------
    DynQuantTensor

    Raises
    ------
    DTypeError
        If `x` does not hold floats, or `out` not the codes' dtype.
    NonFiniteError
        If `x` holds NaN or infinity, or a number beyond float32.
    ShapeMismatchError
        If `x` has too few axes, or `out` another shape than the codes.
    LayoutError
        If `out` is read-only, not contiguous along its last axis, or overlaps `x`.
    ParameterError
        If another argument has a value that it cannot take. After any of these `out` is as it was, unless
        `check_finite` is False.

    Notes
    -----
    ``code = clamp(round(x / scale), -clip, clip)`` with a true division and halves rounded away from zero, in
    float32; ``scale`` as in `compute_scale`; clip is 127 or 7. A zero scale gives zero codes. Bit for bit the
    same on every instruction set.

    Without `out`, or with ``check_finite=False``, each row is read from memory once, and from cache again.

    A scale per row is one for each row along the last axis: of convolution weights (out, in, kh, kw) that is
    (out, in, kh) scales. For one scale per output channel pass ``w.reshape(len(w), -1)``.

    Examples
    --------
    >>> t = dynamic_quantize([[1.0, -7.0, 3.4]], DynQuantFormat.INT4_PER_ROW)
    >>> t.data.tolist(), t.scales.tolist()
    ([[1, -7, 3]], [1.0])
    """
    if not isinstance(format, DynQuantFormat):
        raise ParameterError(f"format: expected a DynQuantFormat, got {shown(format)}")
    check = as_flag(check_finite, "check_finite")
    return quantize_named(
        x, packed_format(format, packed), mode, out, as_thread_count(num_threads), check=check
    )


def quantize(
    x: ArrayLike,
    scales: ArrayLike,
    format: DynQuantFormat = DynQuantFormat.INT8_PER_ROW,
    *,
    zero_points: ArrayLike | None = None,
    packed: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int = 1,
) -> DynQuantTensor:
    """Quantize `x` with scales that are given, such as those of a calibration.

    Parameters
    ----------
    x : array_like of floats, any shape; (..., k) with at least two axes for a per-row format, one per group
    scales : float, or array_like of floats
        Finite, and not below 0. One number for all, or an array of the shape of the format's scales: (1,),
        ``x.shape[:-1]``, or ``(*x.shape[:-1], ceil(k / group_size))``.
    format : DynQuantFormat
    zero_points : int, or array_like of ints, optional
        0..15, of the shape of the scales, for packed 4-bit codes: these are then 0..15 and stand for
        ``(code - zero_point) * scale``.
    packed, num_threads
        As in `dynamic_quantize`.
    out : ndarray, optional
        Takes the codes, as in `dynamic_quantize`.

    Returns
    -------
    DynQuantTensor

    Raises
    ------
    DTypeError, NonFiniteError
        If `x` or `scales` do not hold floats, or hold NaN or infinity; or if `zero_points` are not integers.
    ShapeMismatchError
        If `x` has too few axes, or `scales`, `zero_points` or `out` another shape than the format needs.
    LayoutError
        If `out` cannot take the codes.
    ParameterError
        If a scale is below 0, a zero point not in 0..15, or another argument has a value that it cannot take.
        After any of these `out` is as it was.

    Notes
    -----
    ``code = clamp(round(x / scale), -clip, clip)`` as in `dynamic_quantize`, or, with zero points,
    ``clamp(round(x / scale) + zero_point, 0, 15)``. Values out of range saturate. A zero scale gives zero
    codes.

    Examples
    --------
    >>> quantize([[1.0, -2.0, 300.0]], 1.0).data.tolist()
    [[1, -2, 127]]
    """
    if not isinstance(format, DynQuantFormat):
        raise ParameterError(f"format: expected a DynQuantFormat, got {shown(format)}")
    fmt, threads = packed_format(format, packed), as_thread_count(num_threads)
    x = as_exported(x, "x")
    array = as_floats(x, "x")
    m, k, group = _layout(fmt, array, "x")
    given = _given_scales(scales, fmt.scales_shape(array.shape))
    zeros = None if zero_points is None else _given_zero_points(zero_points, fmt, given.shape)
    target, data = _codes_for(fmt, array.shape, out, array, x, scales, zero_points)
    check_finite(array, "x")
    codes = _core.CodeMatrix(data, given, zeros, m, k, group, fmt.packed, True)
    _core.quantize_rows(float_matrix(array, m, k), codes, fmt.clip, False, threads)
    if target is not data:
        target[...] = data
    return tensor_of_checked(target, given, array.shape, fmt, zeros)


def _given_scales(scales: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """New float32 scales of `shape`."""
    array = as_floats(scales, "scales").astype(F32)
    if array.ndim and array.shape != shape:
        raise ShapeMismatchError(shape, array.shape, "scales")
    check_finite(array, "scales")
    if (array < 0).any():
        raise ParameterError(f"scales: expected numbers of at least 0, got {array.min()}")
    return np.broadcast_to(array, shape).copy()


def _given_zero_points(
    zero_points: ArrayLike, fmt: DynQuantFormat, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """New uint8 zero points of `shape`."""
    if not fmt.packed:
        raise ParameterError(f"zero_points: expected None unless codes are packed, got some with {fmt}")
    array = as_array(zero_points, "zero_points")
    if array.dtype.kind not in "iu":
        raise DTypeError(f"zero_points: expected integers, got dtype {array.dtype}")
    if array.ndim and array.shape != shape:
        raise ShapeMismatchError(shape, array.shape, "zero_points")
    wrong = array[(array < 0) | (array > 15)]
    if wrong.size:
        raise ParameterError(f"zero_points: expected numbers in 0..15, got {wrong[0]}")
    return np.broadcast_to(array, shape).astype(U8)


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
    x_min, x_max = (np.float32(bound) for bound in _core.min_max(rows))
    with np.errstate(all="ignore"):
        scale = (x_max - x_min) / np.float32(255)
        if not np.isfinite(scale):
            raise ParameterError(f"x: expected a range within float32, got {x_min} to {x_max}")
        scale = scale if scale > 0 else np.float32(1)
        zero_point = np.rint(np.clip(-x_min / scale, np.float32(0), np.float32(255))).astype(np.uint8)
    y = empty(array.shape, U8)
    _core.quantize_u8(rows, float(scale), int(zero_point), y.reshape(-1))
    return y, scale, zero_point


def rank_of(mode: DynamicScaleMode, n: int) -> int:
    """`mode` as the kernels take it: a rank among `n` magnitudes, or -1 for the largest."""
    if isinstance(mode, MaxAbs):
        return -1
    if isinstance(mode, Percentile):
        return mode.rank(n) if n else -1
    raise ParameterError(f"mode: expected MaxAbs() or Percentile(p), got {shown(mode)}")


def quantize_named(
    x: ArrayLike,
    fmt: DynQuantFormat,
    mode: DynamicScaleMode,
    out: Any,
    threads: int,
    name: str = "x",
    check: bool = True,
) -> DynQuantTensor:
    """`dynamic_quantize` for an argument called `name`, with options that are checked."""
    if out is not None:
        x = as_exported(x, name)
    array = as_floats(x, name)
    m, k, group = _layout(fmt, array, name)
    rank = last_rank = rank_of(mode, group if k else 0)
    if k % group:
        last_rank = rank_of(mode, k % group)
    scales_shape = fmt.scales_shape(array.shape)
    scales_out = None
    if isinstance(out, tuple):
        out, scales_out = _pair_of_outs(out, scales_shape, array, x)
    target, data = _codes_for(fmt, array.shape, out, array, x)
    scales = empty(scales_shape, F32)
    rows, codes = (
        float_matrix(array, m, k),
        _core.CodeMatrix(data, scales, None, m, k, group, fmt.packed, True),
    )

    # A new array may be abandoned half written; the caller's may not.
    check_first = check and data is out and scales.size > 1
    if check_first:
        finite = _core.scale_rows(rows, scales, fmt.clip, rank, last_rank, group, threads)
    else:
        finite = _core.dynamic_quantize_rows(rows, codes, fmt.clip, rank, last_rank, threads)
    if not finite:
        raise_non_finite(array, name)
    if check_first:
        _core.quantize_rows(rows, codes, fmt.clip, rank < 0, threads)
    if target is not data:
        target[...] = data
    if scales_out is not None:
        scales_out[...] = scales
        scales = scales_out
    return tensor_of_checked(target, scales, array.shape, fmt)


def _layout(fmt: DynQuantFormat, array: NDArray[Any], name: str) -> tuple[int, int, int]:
    """(m, k, group): the array as the kernels take it."""
    if fmt.granularity == "per_tensor":
        k = array.size
        return 1, k, k or 1
    axes, expected = _MIN_AXES[fmt.granularity]
    if array.ndim < axes:
        raise ShapeMismatchError(expected, array.shape, name)
    m, k = fmt.rows_of(array.shape)
    return m, k, fmt.group_of(k)


def _codes_for(
    fmt: DynQuantFormat, shape: tuple[int, ...], out: Any, *inputs: Any
) -> tuple[NDArray[Any], NDArray[Any]]:
    """`out`, or a new array for the codes; and the contiguous array that the kernels write."""
    data_shape, dtype = (fmt.data_shape(shape), U8) if fmt.packed else (shape, I8)
    if out is None:
        data = empty(data_shape, dtype)
        return data, data
    target = checked_out(out, data_shape, dtype, *inputs, rows_may_be_apart=True)
    return target, target if target.flags.c_contiguous else empty(data_shape, dtype)


def _pair_of_outs(out: Any, scales_shape: tuple[int, ...], *inputs: Any) -> tuple[Any, NDArray[np.float32]]:
    """The two of `out`, a tuple; the scales are checked."""
    if len(out) != 2:
        raise ParameterError(f"out: expected an array or a tuple (codes, scales), got {len(out)} items")
    return out[0], checked_out(out[1], scales_shape, F32, *inputs, out[0])
