"""Integer linear algebra: exact products of int8 or 4-bit weights with activations quantized on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from . import _core
from ._format import DynQuantFormat, MaxAbs
from ._quantize import quantize_named
from ._tensor import DynQuantTensor, check_arrays, code_matrix
from ._validate import (
    F32,
    as_exported,
    as_finite_vector,
    as_floats,
    as_int8_matrix,
    as_thread_count,
    check_finite,
    checked_out,
    float_matrix,
)
from .errors import EmptyInputError, ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_MAX_ABS = MaxAbs()

# Bytes of activations that are quantized before the weights are read for them: they stay in a core's own
# cache, and scratch is bounded however many rows there are. Of long rows as many as a product takes at once.
_CHUNK_BYTES = 15 << 16
_CHUNK_ROWS = 32


def w8a8_matvec(
    weight_i8: ArrayLike,
    weight_scales: ArrayLike,
    activation: ArrayLike,
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Product of an int8 weight matrix with an activation that is quantized to int8 on the way.

    Parameters
    ----------
    weight_i8 : array_like of int8, (out_features, in_features)
        All values, -128 included.
    weight_scales : array_like of floats, (out_features,)
    activation : array_like of floats, (in_features,)
        Quantized as by `dynamic_quantize_int8`, with one scale.
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
    weight_i8 = as_exported(weight_i8, "weight_i8")
    weight = as_int8_matrix(weight_i8, "weight_i8")
    n, k = weight.shape
    activation = as_exported(activation, "activation")
    vector = as_floats(activation, "activation")
    if vector.size == 0:
        raise EmptyInputError(f"activation: expected at least one element, got shape {vector.shape}")
    if vector.shape != (k,):
        raise ShapeMismatchError((k,), vector.shape, "activation")
    weight_scales = as_exported(weight_scales, "weight_scales")
    scales = as_finite_vector(weight_scales, "weight_scales", n)
    if out is None:
        out = np.empty(n, F32)
    else:
        checked_out(out, (n,), F32, weight, weight_i8, scales, weight_scales, vector, activation)
    quantized = quantize_named(vector, DynQuantFormat.INT8_PER_TENSOR, _MAX_ABS, None, 1, "activation")
    _core.w8a8_matvec(weight, scales, quantized.data, quantized.scales[0], out)
    return out


def w8a8_matmul(
    weight_i8: ArrayLike,
    weight_scales: ArrayLike,
    activations: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    out: NDArray[np.float32] | None = None,
    num_threads: int = 1,
) -> NDArray[np.float32]:
    """Product of activations, quantized to int8 row by row, with an int8 weight matrix.

    Parameters
    ----------
    weight_i8 : array_like of int8, (out_features, in_features)
        All values, -128 included.
    weight_scales : array_like of floats, (out_features,)
    activations : array_like of floats, (tokens, in_features)
        Each row is quantized by itself, as by `dynamic_quantize_int8_per_row`.
    bias : array_like of floats, (out_features,), optional
    out : ndarray of float32, (tokens, out_features), optional
        C-contiguous, apart from the inputs. Allocated if not given.
    num_threads : int
        The most threads to use, the caller's among them; -1: ``DYNQUANT_NUM_THREADS``, or the CPUs that this
        process may use. Small work takes fewer. The result does not depend on it.

    Returns
    -------
    ndarray of float32, (tokens, out_features)
        ``float32(sum) * weight_scale * activation_scale + bias``, in that order. `out` if it was given.

    Raises
    ------
    DTypeError
        If `weight_i8` is not int8, or another argument does not hold floats.
    ShapeMismatchError
        If the shapes do not fit each other.
    NonFiniteError
        If an argument holds NaN or infinity.
    LayoutError
        If `out` is not C-contiguous, read-only, or overlaps an input.
    ParameterError
        If `num_threads` is not a positive integer or -1. After any of these `out` is as it was.

    Notes
    -----
    Each sum is the exact integer for every in_features. The weights are packed for the kernels anew in every
    call, which takes as long as multiplying 20 rows (baseline) to more than 100 (AMX): `QuantLinear` packs
    weights once.

    Examples
    --------
    >>> w8a8_matmul(np.array([[2, -128]], np.int8), [0.5], [[127.0, 1.0], [0.0, 127.0]]).tolist()
    [[63.0], [-8128.0]]
    """
    weight_i8 = as_exported(weight_i8, "weight_i8")
    weight = as_int8_matrix(weight_i8, "weight_i8")
    n, k = weight.shape
    weight_scales, bias = as_exported(weight_scales, "weight_scales"), as_exported(bias, "bias")
    scales = as_finite_vector(weight_scales, "weight_scales", n)
    offset = None if bias is None else as_finite_vector(bias, "bias", n)
    activations = as_exported(activations, "activations")
    x = as_floats(activations, "activations")
    if x.ndim != 2 or x.shape[1] != k:
        raise ShapeMismatchError(("tokens", k), x.shape, "activations")
    threads = as_thread_count(num_threads)
    if out is not None:
        arrays = (weight, weight_i8, scales, weight_scales, x, activations, offset, bias)
        checked_out(out, (x.shape[0], n), F32, *arrays)
    if weight.size == 0:
        return _of_nothing(F32.type(0) * scales, offset, x, out, "activations")
    tensor = DynQuantTensor(weight, scales, None, (n, k), DynQuantFormat.INT8_PER_ROW)
    return multiply(packed_linear(tensor, offset, None, 0), x, out, threads, "activations")


def w4a8_matvec(
    weight: DynQuantTensor, activation: ArrayLike, *, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Product of a 4-bit weight matrix with an activation that is quantized to int8 on the way.

    Parameters
    ----------
    weight : DynQuantTensor, (out_features, in_features)
        Packed 4-bit codes with scales per row or per group, as from `quantize_weights`.
    activation : array_like of floats, (in_features,)
        Quantized as by `dynamic_quantize_int8`, with one scale.
    out : ndarray of float32, (out_features,), optional
        C-contiguous, apart from the inputs. Allocated if not given.

    Returns
    -------
    ndarray of float32, (out_features,)
        As a row from `w4a8_matmul`. `out` if it was given.

    Raises
    ------
    EmptyInputError
        If `activation` has no elements.
    DTypeError, ParameterError, ShapeMismatchError, NonFiniteError, LayoutError
        As from `w4a8_matmul`. After any of these `out` is as it was.

    Examples
    --------
    >>> from dynquant import quantize_weights
    >>> w4a8_matvec(quantize_weights([[15.0, 1.0]], bits=4), [127.0, 1.0]).tolist()
    [1906.0]
    """
    check_weight(weight, int8=False)
    activation = as_exported(activation, "activation")
    vector = as_floats(activation, "activation")
    if vector.size == 0:
        raise EmptyInputError(f"activation: expected at least one element, got shape {vector.shape}")
    n, k = weight.shape
    if vector.shape != (k,):
        raise ShapeMismatchError((k,), vector.shape, "activation")
    if out is not None:
        checked_out(out, (n,), F32, vector, activation, weight.data, weight.scales, weight.zero_points)
    row = None if out is None else out.reshape(1, n)
    y = _multiply_int4(weight, None, vector.reshape(1, k), row, 1, "activation")
    return y.reshape(n) if out is None else out


def w4a8_matmul(
    weight: DynQuantTensor,
    activations: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    out: NDArray[np.float32] | None = None,
    num_threads: int = 1,
) -> NDArray[np.float32]:
    """Product of activations, quantized to int8 row by row, with a 4-bit weight matrix.

    Parameters
    ----------
    weight : DynQuantTensor, (out_features, in_features)
        Packed 4-bit codes with scales per row or per group, as from `quantize_weights`.
    activations : array_like of floats, (tokens, in_features)
        Each row is quantized by itself, as by `dynamic_quantize_int8_per_row`.
    bias : array_like of floats, (out_features,), optional
    out : ndarray of float32, (tokens, out_features), optional
        C-contiguous, apart from the inputs. Allocated if not given.
    num_threads : int
        The most threads to use, the caller's among them; -1: ``DYNQUANT_NUM_THREADS``, or the CPUs that this
        process may use. Small work takes fewer. The result does not depend on it.

    Returns
    -------
    ndarray of float32, (tokens, out_features)
        ``total * activation_scale + bias``, where ``total`` adds up ``float32(sum) * group_scale`` over the
        groups in ascending order, from 0, in float32, and ``sum`` is the exact integer ``sum((code -
        zero_point) * a)`` of a group. `out` if it was given.

    Raises
    ------
    DTypeError
        If an argument does not hold floats.
    ParameterError
        If `weight` is no tensor of packed 4-bit codes with scales per row or per group, or `num_threads` is
        not a positive integer or -1.
    ShapeMismatchError
        If the shapes do not fit each other.
    NonFiniteError
        If an argument holds NaN or infinity.
    LayoutError
        If `out` is not C-contiguous, read-only, or overlaps an input. After any of these `out` is as it was.

    Notes
    -----
    A sum is exact for every length of a group: up to 8,192 codes it is below 15 * 127 * 8,192 < 2**24 in
    magnitude, which float32 holds; longer groups are added up from such runs in int64. The weights are packed
    for the kernels anew in every call, which costs as much as multiplying several rows: `QuantLinear` packs
    once.

    Examples
    --------
    >>> from dynquant import quantize_weights
    >>> w4a8_matmul(quantize_weights([[15.0, 1.0]], bits=4), [[127.0, 1.0], [0.0, 127.0]]).tolist()
    [[1906.0], [127.0]]
    """
    check_weight(weight, int8=False)
    n, k = weight.shape
    bias = as_exported(bias, "bias")
    offset = None if bias is None else as_finite_vector(bias, "bias", n)
    activations = as_exported(activations, "activations")
    x = as_floats(activations, "activations")
    if x.ndim != 2 or x.shape[1] != k:
        raise ShapeMismatchError(("tokens", k), x.shape, "activations")
    threads = as_thread_count(num_threads)
    if out is not None:
        arrays = (weight.data, weight.scales, weight.zero_points)
        checked_out(out, (x.shape[0], n), F32, x, activations, offset, bias, *arrays)
    return _multiply_int4(weight, offset, x, out, threads, "activations")


def check_weight(weight: Any, *, int8: bool) -> None:
    """Raise unless `weight` is a matrix as from `quantize_weights`; int8 only where `int8` allows it."""
    if not isinstance(weight, DynQuantTensor):
        raise ParameterError(
            f"weight: expected a DynQuantTensor, as from quantize_weights, got {type(weight).__name__}"
        )
    fmt = weight.format
    int4 = fmt.packed and fmt.granularity != "per_tensor"
    if not (int4 or (int8 and fmt == DynQuantFormat.INT8_PER_ROW)):
        kinds = ("int8 per row or " if int8 else "") + "packed 4-bit codes per row or per group"
        raise ParameterError(f"weight: expected {kinds}, got {shown(weight)}")
    if len(weight.shape) != 2:
        raise ShapeMismatchError("(out_features, in_features)", weight.shape, "weight")
    check_arrays(weight)
    check_finite(as_floats(weight.scales, "weight.scales"), "weight.scales")


def _multiply_int4(
    weight: DynQuantTensor,
    bias: NDArray[np.float32] | None,
    x: NDArray[Any],
    out: NDArray[np.float32] | None,
    threads: int,
    name: str,
) -> NDArray[np.float32]:
    n, k = weight.shape
    if n == 0 or k == 0:
        return _of_nothing(np.zeros(n, F32), bias, x, out, name)
    return multiply(packed_linear(weight, bias, None, 0), x, out, threads, name)


def packed_linear(
    weight: DynQuantTensor,
    bias: NDArray[np.float32] | None,
    smooth: NDArray[np.float32] | None,
    block: int,
) -> _core.PackedLinear:
    """Weights, not empty, in the form of the kernels in use."""
    n, k = weight.shape
    group = 0 if weight.format.bits == 8 else weight.format.group_of(k)
    layer = _core.PackedLinear(n, k, group, bias, smooth, block)
    layer.pack(code_matrix(weight))
    return layer


def _of_nothing(
    zeros: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    x: NDArray[Any],
    out: NDArray[np.float32] | None,
    name: str,
) -> NDArray[np.float32]:
    """What a layer without inputs or outputs gives: the zeros of its sums, with their signs, and the bias."""
    check_finite(x, name)
    y = np.empty((x.shape[0], zeros.size), F32) if out is None else out
    y[:] = zeros if bias is None else zeros + bias
    return y


def multiply(
    layer: _core.PackedLinear,
    x: NDArray[Any],
    out: NDArray[np.float32] | None,
    threads: int,
    name: str,
) -> NDArray[np.float32]:
    """Rows of `x` times packed weights, a chunk of rows at a time."""
    m, k = x.shape
    y = np.empty((m, layer.n), F32) if out is None else out
    most = max(_CHUNK_ROWS, _CHUNK_BYTES // layer.activation_bytes())
    if m > most:
        _multiply_chunks(layer, x, y, _chunk_rows(m, most), out is not None, threads, name)
        return y
    a = _core.Activations(layer, m, threads)
    if not layer.quantize(float_matrix(x, m, k), a, threads):
        _raise_bad_row(x, layer.smooth, name)
    layer.multiply(a, y, threads)
    return y


def _multiply_chunks(
    layer: _core.PackedLinear,
    x: NDArray[Any],
    y: NDArray[np.float32],
    chunk: int,
    check_first: bool,
    threads: int,
    name: str,
) -> None:
    """y = x times packed weights, `chunk` rows at a time."""
    a = _core.Activations(layer, chunk, threads)
    # All that takes memory comes first: what raises has changed nothing.
    parts = [x[first : first + chunk] for first in range(0, len(x), chunk)]
    rows = [float_matrix(part, *part.shape) for part in parts]
    outputs = [y[first : first + chunk] for first in range(0, len(x), chunk)]
    # A new array may be given up half written; the caller's may not.
    if check_first and not all(layer.quantize(part, a, threads) for part in rows):
        _raise_bad_row(x, layer.smooth, name)
    for part, into in zip(rows, outputs, strict=True):
        if not layer.quantize(part, a, threads):
            _raise_bad_row(x, layer.smooth, name)
        layer.multiply(a, into, threads)


def _raise_bad_row(x: NDArray[Any], smooth: NDArray[np.float32] | None, name: str) -> NoReturn:
    """Raise for what is wrong with x, which has a row that a layer could not quantize."""
    check_finite(x, name)
    if smooth is not None:
        with np.errstate(over="ignore"):
            check_finite(x.astype(F32, copy=False) / smooth, f"{name} / smooth")
    raise ParameterError(f"{name}: expected rows within float32 when rotated, got one that is not")


def _chunk_rows(m: int, most: int) -> int:
    """Rows of a chunk of m: as few chunks as `most` allows, nearly equal, in whole tiles of _CHUNK_ROWS."""
    chunks = -(-m // (most // _CHUNK_ROWS * _CHUNK_ROWS))
    return -(-m // (_CHUNK_ROWS * chunks)) * _CHUNK_ROWS
