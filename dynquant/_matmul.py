"""Integer linear algebra: exact products of int8 or 4-bit weights with activations quantized on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._format import DynQuantFormat, MaxAbs
from ._packed import INT4, INT8_ROWS, check_weight, product
from ._quantize import quantize_named
from ._tensor import DynQuantTensor, arrays_of, as_flat, tensor_of_checked
from ._validate import (
    F32,
    as_exported,
    as_finite_vector,
    as_floats,
    as_int8_matrix,
    as_thread_count,
    checked_out,
)
from .errors import EmptyInputError, ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_MAX_ABS = MaxAbs()


def w8a8_matvec(
    weight_i8: ArrayLike | DynQuantTensor,
    weight_scales: ArrayLike | None,
    activation: ArrayLike,
    *,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Product of an int8 weight matrix with an activation that is quantized to int8 on the way.

    Parameters
    ----------
    weight_i8 : array_like of int8, (out_features, in_features), or DynQuantTensor
        All values, -128 included. A tensor has int8 codes and a scale per row, as from `quantize_weights`.
    weight_scales : array_like of floats, (out_features,), or None
        None where `weight_i8` is a DynQuantTensor, which has its own.
    activation : array_like of floats, (in_features,)
        Quantized as by `dynamic_quantize_int8`, with one scale.
    out : ndarray of float32, (out_features,), optional
        C-contiguous, sharing no memory with the inputs. Allocated if not given.

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
    ParameterError
        If `weight_i8` is a tensor of another format, or comes with `weight_scales`.
    ShapeMismatchError
        If the shapes do not agree.
    NonFiniteError
        If `weight_scales` or `activation` hold NaN or infinity.
    LayoutError
        If `out` is not C-contiguous, read-only, or overlaps an input. After any of these it is as it was.

    Notes
    -----
    Each sum is the exact integer for every in_features: partial sums of 65,536 products, at most
    65,536 * 128 * 127 < 2**31 in magnitude, are added up in int64. Nothing saturates on any instruction set.

    The order of the factors is fixed: a sum times its weight scale may be infinite where the product of both
    scales would bring it back into float32, as with weights of 3e37 and activations of 1e-30. Divide such
    weights by a power of two, and multiply the output by it.

    Examples
    --------
    >>> w8a8_matvec(np.array([[2, -128]], np.int8), [0.5], [127.0, 1.0]).tolist()
    [63.0]
    """
    weight, inputs = _int8_weight(weight_i8, weight_scales)
    n, k = weight.shape
    exported, vector = _as_vector(activation, k)
    if out is None:
        out = np.empty(n, F32)
    else:
        checked_out(out, (n,), F32, *inputs, vector, exported)
    quantized = quantize_named(vector, DynQuantFormat.INT8_PER_TENSOR, _MAX_ABS, None, 1, "activation")
    _core.w8a8_matvec(weight.data, weight.scales, quantized.data, quantized.scales[0], out)
    return out


def w8a8_matmul(
    weight_i8: ArrayLike | DynQuantTensor,
    weight_scales: ArrayLike | None,
    activations: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    out: NDArray[np.float32] | None = None,
    num_threads: int = 1,
) -> NDArray[np.float32]:
    """Product of activations, quantized to int8 row by row, with an int8 weight matrix.

    Parameters
    ----------
    weight_i8 : array_like of int8, (out_features, in_features), or DynQuantTensor
        All values, -128 included. A tensor has int8 codes and a scale per row, as from `quantize_weights`.
    weight_scales : array_like of floats, (out_features,), or None
        None where `weight_i8` is a DynQuantTensor, which has its own.
    activations : array_like of floats, (tokens, in_features)
        Each row is quantized by itself, as by `dynamic_quantize_int8_per_row`.
    bias : array_like of floats, (out_features,), optional
    out : ndarray of float32, (tokens, out_features), optional
        C-contiguous, sharing no memory with the inputs. Allocated if not given.
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
        If the shapes do not agree.
    NonFiniteError
        If an argument holds NaN or infinity.
    LayoutError
        If `out` is not C-contiguous, read-only, or overlaps an input.
    ParameterError
        If `num_threads` is not a positive integer or -1, or `weight_i8` is a tensor of another format or
        comes with `weight_scales`. After any of these `out` is as it was.

    Notes
    -----
    Each sum is the exact integer for every in_features. The weights are packed for the kernels anew in every
    call, which takes as long as multiplying 20 rows (baseline) to more than 100 (AMX): `QuantLinear` packs
    weights once.

    The order of the factors is fixed: a sum times its weight scale may be infinite where the product of both
    scales would bring it back into float32, as with weights of 3e37 and activations of 1e-30. Divide such
    weights by a power of two, and multiply the output by it.

    Examples
    --------
    >>> w8a8_matmul(np.array([[2, -128]], np.int8), [0.5], [[127.0, 1.0], [0.0, 127.0]]).tolist()
    [[63.0], [-8128.0]]
    """
    weight, inputs = _int8_weight(weight_i8, weight_scales)
    return _matmul(weight, inputs, activations, bias, out, num_threads)


def w4a8_matvec(
    weight: DynQuantTensor, activation: ArrayLike, *, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Product of a 4-bit weight matrix with an activation that is quantized to int8 on the way.

    Parameters
    ----------
    weight : DynQuantTensor, (out_features, in_features)
        Packed 4-bit codes with scales per row or per group, as from `quantize_weights`, or with minimums.
    activation : array_like of floats, (in_features,)
        Quantized as by `dynamic_quantize_int8`, with one scale.
    out : ndarray of float32, (out_features,), optional
        C-contiguous, sharing no memory with the inputs. Allocated if not given.

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
    check_weight(weight, "weight", INT4)
    n, k = weight.shape
    exported, vector = _as_vector(activation, k)
    if out is not None:
        checked_out(out, (n,), F32, vector, exported, *arrays_of(weight))
    row = None if out is None else out.reshape(1, n)
    y = product(weight, None, vector.reshape(1, k), row, 1, "activation")
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
        Packed 4-bit codes with scales per row or per group, as from `quantize_weights`, or with minimums.
    activations : array_like of floats, (tokens, in_features)
        Each row is quantized by itself, as by `dynamic_quantize_int8_per_row`.
    bias : array_like of floats, (out_features,), optional
    out : ndarray of float32, (tokens, out_features), optional
        C-contiguous, sharing no memory with the inputs. Allocated if not given.
    num_threads : int
        The most threads to use, the caller's among them; -1: ``DYNQUANT_NUM_THREADS``, or the CPUs that this
        process may use. Small work takes fewer. The result does not depend on it.

    Returns
    -------
    ndarray of float32, (tokens, out_features)
        ``total * activation_scale + bias``, where ``total`` adds up ``float32(sum) * group_scale`` over the
        groups in ascending order, from 0, in float32, and ``sum`` is the exact integer ``sum((code -
        zero_point) * a)`` of a group. With minimums it adds up ``float32(sum(code * a)) * group_scale +
        minimum * float32(sum(a))``, each product and sum rounded. `out` if it was given.

    Raises
    ------
    DTypeError
        If an argument does not hold floats.
    ParameterError
        If `weight` is no tensor of packed 4-bit codes with scales per row or per group, or `num_threads` is
        not a positive integer or -1.
    ShapeMismatchError
        If the shapes do not agree.
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

    The order of the factors is fixed: a sum times its weight scale may be infinite where the product of both
    scales would bring it back into float32, as with weights of 3e37 and activations of 1e-30. Divide such
    weights by a power of two, and multiply the output by it.

    Examples
    --------
    >>> from dynquant import quantize_weights
    >>> w4a8_matmul(quantize_weights([[15.0, 1.0]], bits=4), [[127.0, 1.0], [0.0, 127.0]]).tolist()
    [[1906.0], [127.0]]
    """
    check_weight(weight, "weight", INT4)
    return _matmul(weight, arrays_of(weight), activations, bias, out, num_threads)


def _int8_weight(weight: Any, scales: Any) -> tuple[DynQuantTensor, tuple[Any, ...]]:
    """The checked weights of a W8A8 product, with contiguous arrays, and the arrays that they came in."""
    if isinstance(weight, DynQuantTensor):
        if scales is not None:
            raise ParameterError(
                f"weight_scales: expected None, since weight_i8 is a DynQuantTensor, got {shown(scales)}"
            )
        check_weight(weight, "weight_i8", INT8_ROWS)
        data, vector = as_flat(weight.data), as_flat(weight.scales)
        return tensor_of_checked(data, vector, weight.shape, weight.format), (weight.data, weight.scales)
    exported = as_exported(weight, "weight_i8")
    codes = as_int8_matrix(exported, "weight_i8")
    exported_scales = as_exported(scales, "weight_scales")
    vector = as_finite_vector(exported_scales, "weight_scales", len(codes))
    tensor = tensor_of_checked(codes, vector, codes.shape, DynQuantFormat.INT8_PER_ROW)
    return tensor, (codes, exported, vector, exported_scales)


def _as_vector(activation: Any, k: int) -> tuple[Any, NDArray[Any]]:
    """The array that `activation` came in, and its checked floats (k,)."""
    exported = as_exported(activation, "activation")
    vector = as_floats(exported, "activation")
    if vector.size == 0:
        raise EmptyInputError(f"activation: expected at least one element, got shape {vector.shape}")
    if vector.shape != (k,):
        raise ShapeMismatchError((k,), vector.shape, "activation")
    return exported, vector


def _matmul(
    weight: DynQuantTensor,
    inputs: tuple[Any, ...],
    activations: Any,
    bias: Any,
    out: NDArray[np.float32] | None,
    num_threads: int,
) -> NDArray[np.float32]:
    """A product with checked weights, whose arrays are `inputs`, and arguments that are not checked yet."""
    n, k = weight.shape
    bias = as_exported(bias, "bias")
    offset = None if bias is None else as_finite_vector(bias, "bias", n)
    activations = as_exported(activations, "activations")
    x = as_floats(activations, "activations")
    if x.ndim != 2 or x.shape[1] != k:
        hint = "; pass one row as activations[None]" if x.shape == (k,) else ""
        raise ShapeMismatchError(f"(tokens, {k}){hint}", x.shape, "activations")
    threads = as_thread_count(num_threads)
    if out is not None:
        checked_out(out, (x.shape[0], n), F32, *inputs, x, activations, offset, bias)
    return product(weight, offset, x, out, threads, "activations")
