"""Integer linear algebra: exact products of int8 weights with activations quantised on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._quantize import quantize_named
from ._smooth import smooth_weights
from ._tensor import DynQuantFormat, MaxAbs
from ._threads import over_rows
from ._validate import (
    F32,
    as_finite_vector,
    as_floats,
    as_int8_matrix,
    as_matrix,
    as_thread_count,
    check_finite,
    checked_out,
    float_rows,
)
from .errors import (
    EmptyInputError,
    FeatureDimMismatchError,
    ParameterError,
    ShapeMismatchError,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_MAX_ABS = MaxAbs()

# Bytes of activations that are quantised before the weights are read for them: they stay in a core's own
# cache, and scratch is bounded however many rows there are.
_CHUNK_BYTES = 1 << 19
_CACHE_LINE = 64


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
    scales = as_finite_vector(weight_scales, "weight_scales", n)
    if out is None:
        out = np.empty(n, F32)
    else:
        checked_out(out, (n,), F32, weight_i8, weight_scales, activation)
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
    """Product of activations, quantised to int8 row by row, with an int8 weight matrix.

    Parameters
    ----------
    weight_i8 : array_like of int8, (out_features, in_features)
        All values, -128 included.
    weight_scales : array_like of floats, (out_features,)
    activations : array_like of floats, (tokens, in_features)
        Each row is quantised by itself, as by `dynamic_quantize_int8_per_row`.
    bias : array_like of floats, (out_features,), optional
    out : ndarray of float32, (tokens, out_features), optional
        C-contiguous, apart from the inputs. Allocated if not given.
    num_threads : int
        How many threads share the outputs. The result does not depend on it.

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
        If `num_threads` is not a positive integer. After any of these `out` is as it was.

    Notes
    -----
    Each sum is the exact integer for every in_features. The weights are packed for the kernels anew in every
    call, which costs about as much as multiplying a dozen rows: `QuantLinear` packs weights once.

    Examples
    --------
    >>> w8a8_matmul(np.array([[2, -128]], np.int8), [0.5], [[127.0, 1.0], [0.0, 127.0]]).tolist()
    [[63.0], [-8128.0]]
    """
    weight = as_int8_matrix(weight_i8, "weight_i8")
    n, k = weight.shape
    scales = as_finite_vector(weight_scales, "weight_scales", n)
    offset = None if bias is None else as_finite_vector(bias, "bias", n)
    x = as_floats(activations, "activations")
    if x.ndim != 2 or x.shape[1] != k:
        raise ShapeMismatchError(("tokens", k), x.shape, "activations")
    threads = as_thread_count(num_threads)
    if out is not None:
        checked_out(out, (x.shape[0], n), F32, weight_i8, weight_scales, activations, bias)
    return _multiply(_packed(weight), scales, offset, None, x, out, threads, "activations")


class QuantLinear:
    """A linear layer with int8 weights, quantised and packed once and then called many times.

    ``y = x @ weight.T + bias`` for activations that are quantised row by row as they come. Made by
    `from_float` or `from_arrays`.

    Attributes
    ----------
    in_features, out_features : int

    Notes
    -----
    The packed form is that of the instruction set in use and is all that is kept: one byte a weight, rounded
    up to whole panels of outputs, and a scale and a sum for each output. Pickling and `to_arrays` give a form
    that does not depend on the instruction set. Calls change nothing, so threads may share a layer.

    Examples
    --------
    >>> layer = QuantLinear.from_float([[1.0, -2.0], [0.5, 0.25]], bias=[0.0, 1.0])
    >>> layer
    QuantLinear(in_features=2, out_features=2, int8, bias=True, smooth=False)
    >>> layer([[2.0, 1.0]]).round(2).tolist()
    [[0.0, 2.25]]
    """

    def __init__(
        self,
        weight_i8: NDArray[np.int8],
        weight_scales: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        smooth: NDArray[np.float32] | None,
    ) -> None:
        self.out_features, self.in_features = weight_i8.shape
        self._weight_scales = weight_scales
        self._bias = bias
        self._smooth = smooth
        self._panels = _packed(weight_i8)

    @classmethod
    def from_float(
        cls, weight: ArrayLike, bias: ArrayLike | None = None, *, smooth: ArrayLike | None = None
    ) -> QuantLinear:
        """Quantise and pack the weights of a linear layer.

        Parameters
        ----------
        weight : array_like of floats, (out_features, in_features)
            Quantised to int8 with one scale for each output.
        bias : array_like of floats, (out_features,), optional
        smooth : array_like of floats, (in_features,), optional
            SmoothQuant factors above zero, as from `compute_smooth_factors`: weights are multiplied by them
            here, activations divided in every call.

        Returns
        -------
        QuantLinear

        Raises
        ------
        DTypeError, NonFiniteError
            If an argument does not hold floats, or holds NaN or infinity.
        ShapeMismatchError, FeatureDimMismatchError, EmptyInputError
            If the shapes do not fit each other, or `weight` has no elements.
        ParameterError
            If a factor is not above zero.
        """
        w = as_matrix(weight, "weight", "(out_features, in_features)")
        n, k = w.shape
        offset = None if bias is None else as_finite_vector(bias, "bias", n).copy()
        factors = None if smooth is None else _as_factors(k, smooth).copy()
        check_finite(w, "weight")
        if factors is not None:
            w = smooth_weights(w, factors)
        tensor = quantize_named(w, DynQuantFormat.INT8_PER_ROW, _MAX_ABS, None, 1, "weight * smooth")
        return cls(tensor.data, tensor.scales, offset, factors)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> QuantLinear:
        """The layer whose `to_arrays` gave `arrays`.

        Parameters
        ----------
        arrays : mapping
            ``weight_i8`` (out_features, in_features) int8, ``weight_scales`` (out_features,) and, if the
            layer has them, ``bias`` (out_features,) and ``smooth`` (in_features,). Copied.

        Raises
        ------
        ParameterError
            If it is no mapping, a name is missing or unknown, or a factor is not above zero.
        DTypeError, ShapeMismatchError, FeatureDimMismatchError, NonFiniteError, EmptyInputError
            If an array is not as described.
        """
        if not isinstance(arrays, Mapping):
            raise ParameterError(
                f"arrays: expected a mapping of names to arrays, got {type(arrays).__name__}"
            )
        missing = {"weight_i8", "weight_scales"} - set(arrays)
        unknown = set(arrays) - {"weight_i8", "weight_scales", "bias", "smooth"}
        if missing or unknown:
            raise ParameterError(f"arrays: missing {sorted(missing)}, unknown {sorted(map(str, unknown))}")
        weight = as_int8_matrix(arrays["weight_i8"], "weight_i8")
        n, k = weight.shape
        if weight.size == 0:
            raise EmptyInputError(f"weight_i8: expected at least one element, got shape {weight.shape}")
        scales = as_finite_vector(arrays["weight_scales"], "weight_scales", n).copy()
        bias, smooth = arrays.get("bias"), arrays.get("smooth")
        return cls(
            weight,
            scales,
            None if bias is None else as_finite_vector(bias, "bias", n).copy(),
            None if smooth is None else _as_factors(k, smooth).copy(),
        )

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything the layer consists of, as new arrays: what `from_arrays` takes."""
        weight = np.empty((self.out_features, self.in_features), np.int8)
        _core.unpack_weights(self._panels, weight)
        arrays: dict[str, NDArray[Any]] = {"weight_i8": weight, "weight_scales": self._weight_scales.copy()}
        if self._bias is not None:
            arrays["bias"] = self._bias.copy()
        if self._smooth is not None:
            arrays["smooth"] = self._smooth.copy()
        return arrays

    def weight_dequantized(self) -> NDArray[np.float32]:
        """The float32 weights (out_features, in_features) that the layer stands for, smoothing undone."""
        arrays = self.to_arrays()
        weight = arrays["weight_i8"].astype(F32) * self._weight_scales[:, None]
        return weight if self._smooth is None else weight / self._smooth

    @property
    def memory_bytes(self) -> int:
        """Bytes of packed weights, scales, bias and smoothing factors together."""
        extra = (array.nbytes for array in (self._bias, self._smooth) if array is not None)
        return self._panels.nbytes + self._weight_scales.nbytes + sum(extra)

    def __call__(
        self, x: ArrayLike, *, out: NDArray[np.float32] | None = None, num_threads: int = 1
    ) -> NDArray[np.float32]:
        """Apply the layer.

        Parameters
        ----------
        x : array_like of floats, (..., in_features)
            Each row is quantised by itself, so its output does not depend on the others.
        out : ndarray of float32, (..., out_features), optional
            C-contiguous, apart from `x`. Allocated if not given.
        num_threads : int
            How many threads share the outputs. The result does not depend on it.

        Returns
        -------
        ndarray of float32, (..., out_features)
            As from `w8a8_matmul`. `out` if it was given.

        Raises
        ------
        ShapeMismatchError
            If the last axis of `x` is not in_features long, or `out` has another shape.
        DTypeError, NonFiniteError, LayoutError, ParameterError
            As from `w8a8_matmul`. After any of these `out` is as it was.
        """
        array = as_floats(x, "x")
        if array.ndim == 0 or array.shape[-1] != self.in_features:
            raise ShapeMismatchError(("...", self.in_features), array.shape, "x")
        shape = (*array.shape[:-1], self.out_features)
        threads = as_thread_count(num_threads)
        if out is not None:
            checked_out(out, shape, F32, x)
        rows = array.reshape(-1, self.in_features)
        into = None if out is None else out.reshape(-1, self.out_features)
        y = _multiply(self._panels, self._weight_scales, self._bias, self._smooth, rows, into, threads, "x")
        return y.reshape(shape) if out is None else out

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_arrays, (self.to_arrays(),)

    def __repr__(self) -> str:
        return (
            f"QuantLinear(in_features={self.in_features}, out_features={self.out_features}, int8, "
            f"bias={self._bias is not None}, smooth={self._smooth is not None})"
        )


def _as_factors(k: int, smooth: ArrayLike) -> NDArray[np.float32]:
    factors = as_finite_vector(smooth, "smooth")
    if factors.size != k:
        raise FeatureDimMismatchError(k, factors.size, "smooth")
    if not (factors > 0).all():
        raise ParameterError(f"smooth: expected numbers above 0, got {factors.min()}")
    return factors


def _packed(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """Panels that start at a cache line: vectors that straddle two of them load at half the speed."""
    n_bytes = _core.packed_bytes(*weight.shape)
    memory = np.empty(n_bytes + _CACHE_LINE - 1, np.int8)
    start = -memory.ctypes.data % _CACHE_LINE
    panels = memory[start : start + n_bytes]
    _core.pack_weights(weight, panels)
    return panels


def _multiply(
    panels: NDArray[np.int8],
    scales: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    smooth: NDArray[np.float32] | None,
    x: NDArray[Any],
    out: NDArray[np.float32] | None,
    threads: int,
    name: str,
) -> NDArray[np.float32]:
    """Rows of `x` times packed weights, a chunk of rows at a time."""
    (m, k), n = x.shape, scales.size
    y = np.empty((m, n), F32) if out is None else out
    if k == 0:
        y[:] = 0 if bias is None else bias
        return y
    width = _core.activation_bytes(k)
    chunk = _chunk_rows(m, _CHUNK_BYTES // width)
    # A new array may be given up half written; the caller's may not.
    if out is not None and chunk < m:
        _check_rows(x, smooth, name)
    a = np.empty(min(m, chunk) * width, np.uint8)
    a_scales = np.empty(min(m, chunk), F32)
    for first in range(0, m, chunk):
        part, into = (x, y) if m <= chunk else (x[first : first + chunk], y[first : first + chunk])
        if not _core.quantize_activations(float_rows(part, len(part), k), smooth, a_scales, a):
            _check_rows(x, smooth, name)
        over_rows(_core.matmul, (panels, scales, bias, a, a_scales, into, k), _core.panel_count(n), threads)
    return y


def _chunk_rows(m: int, most: int) -> int:
    """Rows of a chunk: as few chunks as `most` allows, nearly equal, in whole tiles of four rows."""
    most = max(4, most // 4 * 4)
    chunks = max(1, -(-m // most))
    return min(m, -(-m // (4 * chunks)) * 4) or 1


def _check_rows(x: NDArray[Any], smooth: NDArray[np.float32] | None, name: str) -> None:
    check_finite(x, name)
    if smooth is not None:
        with np.errstate(over="ignore"):
            check_finite(x.astype(F32, copy=False) / smooth, f"{name} / smooth")
