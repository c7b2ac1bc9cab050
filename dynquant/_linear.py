"""A linear layer with quantized weights."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._batches import row_batches
from ._compensate import SecondMoments
from ._format import DynQuantFormat
from ._hadamard import hadamard_block, rotate_named
from ._matmul import check_weight, multiply, packed_linear
from ._smooth import as_factors, smooth_activations, smooth_weights
from ._tensor import DynQuantTensor, check_field
from ._validate import (
    F32,
    U8,
    as_array,
    as_count,
    as_exported,
    as_finite_vector,
    as_flag,
    as_floats,
    as_int8_matrix,
    as_matrix,
    as_scalar,
    as_thread_count,
    check_finite,
    check_names,
    checked_out,
    float_matrix,
)
from ._weights import quantize_matrix, weight_format
from .errors import (
    DTypeError,
    EmptyInputError,
    ParameterError,
    ShapeMismatchError,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


# Longest run of channels that a layer rotates.
_MOST_ROTATED = 128


class QuantLinear:
    """A linear layer with int8 or 4-bit weights, quantized and packed once and then called many times.

    ``y = x @ weight.T + bias`` for activations that are quantized row by row as they come. Made by
    `from_float` or `from_arrays`, or from weights that are quantized already.

    Parameters
    ----------
    weight : DynQuantTensor, (out_features, in_features)
        As from `quantize_weights`. With `smooth` or `hadamard` of weights that were multiplied by the factors
        and rotated before.
    bias : array_like of floats, (out_features,), optional
    smooth : array_like of floats, (in_features,), optional
        What activations are divided by in every call.
    hadamard : bool
        Whether activations are rotated in every call.

    Attributes
    ----------
    in_features, out_features : int

    Raises
    ------
    ParameterError, ShapeMismatchError, EmptyInputError
        If `weight` is not as `quantize_weights` gives it.
    DTypeError, ShapeMismatchError, FeatureDimMismatchError, NonFiniteError, ParameterError
        If another argument is not as described.

    Notes
    -----
    The packed form is that of the instruction set in use and is all that is kept, with outputs rounded up to
    whole panels: a byte a weight and for each output a scale; or half a byte a weight, and for each group of
    an output a scale and a byte for its zero point. Pickling and `to_arrays` give a form that does
    not depend on the instruction set. Calls change nothing, so threads may share a layer.

    Examples
    --------
    >>> layer = QuantLinear.from_float([[1.0, -2.0], [0.5, 0.25]], bias=[0.0, 1.0])
    >>> layer
    QuantLinear(in_features=2, out_features=2, int8, bias=True, smooth=False, hadamard=False)
    >>> layer([[2.0, 1.0]]).round(2).tolist()
    [[0.0, 2.25]]
    """

    def __init__(
        self,
        weight: DynQuantTensor,
        bias: ArrayLike | None = None,
        smooth: ArrayLike | None = None,
        hadamard: bool = False,
    ) -> None:
        check_weight(weight, int8=True)
        if weight.element_count == 0:
            raise EmptyInputError(f"weight: expected at least one element, got shape {weight.shape}")
        self._n, self._k = weight.shape
        self._format = weight.format
        self._symmetric = weight.zero_points is None
        self._bias = None if bias is None else as_finite_vector(bias, "bias", self._n).copy()
        self._smooth = None if smooth is None else as_factors(smooth, "smooth", self._k).copy()
        self._hadamard = as_flag(hadamard, "hadamard")
        block = _rotation(self._k) if self._hadamard else 0
        self._layer = packed_linear(weight, self._bias, self._smooth, block)

    @property
    def in_features(self) -> int:
        """Length of a row of inputs."""
        return self._k

    @property
    def out_features(self) -> int:
        """Length of a row of outputs."""
        return self._n

    @classmethod
    def from_float(
        cls,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool | None = None,
        search: bool = False,
        smooth: ArrayLike | None = None,
        hadamard: bool = False,
        calibration: ArrayLike | Iterable[ArrayLike] | None = None,
        relative: bool = True,
        num_threads: int = 1,
    ) -> QuantLinear:
        """Quantize and pack the weights of a linear layer.

        Parameters
        ----------
        weight : array_like of floats, (out_features, in_features)
        bias : array_like of floats, (out_features,), optional
        bits, group_size, symmetric, search, relative, num_threads
            How the weights are quantized, as in `quantize_weights`.
        smooth : array_like of floats, (in_features,), optional
            SmoothQuant factors above zero, as from `compute_smooth_factors`: weights are multiplied by them
            here, activations divided in every call.
        hadamard : bool
            Rotate the weights here, and activations in every call, as `hadamard_transform` does, after
            smoothing: in runs of the largest power of two that divides in_features, at most 128. Longer runs
            spread a massive value over more channels, which lost accuracy where it was tried; with an odd
            in_features there is nothing to rotate. It needs no calibration, and gains where some channels
            are much larger than others.
        calibration : array_like of floats, (..., in_features), or an iterable of such arrays, optional
            Inputs that the layer has had, neither smoothed nor rotated: codes are chosen so that their errors
            cancel in the output, as in `quantize_weights`.

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
            If an option has a value that it cannot take, a factor is not above zero, or a weight leaves
            float32 when rotated.
        """
        fmt, symmetric = weight_format(bits, group_size, symmetric)
        search, hadamard = as_flag(search, "search"), as_flag(hadamard, "hadamard")
        threads = as_thread_count(num_threads)
        w = as_matrix(weight, "weight", "(out_features, in_features)")
        n, k = w.shape
        offset = None if bias is None else as_finite_vector(bias, "bias", n)
        factors = None if smooth is None else as_factors(smooth, "smooth", k)
        check_finite(w, "weight")
        if factors is not None:
            w = smooth_weights(w, factors)
            check_finite(w, "weight * smooth")
        if hadamard:
            w = rotate_named(w, _rotation(k), None, "weight")
        relative = as_flag(relative, "relative")
        moments = None
        if calibration is not None:
            rotate = functools.partial(_rotated, k) if hadamard else None
            moments = SecondMoments(_smoothed(calibration, k, factors), k, relative, rotate)
        tensor = quantize_matrix(w, fmt, symmetric, search, moments, threads, "weight")
        return cls(tensor, offset, factors, hadamard)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> QuantLinear:
        """The layer whose `to_arrays` gave `arrays`.

        Parameters
        ----------
        arrays : mapping
            ``weight_scales`` and, for 8 bits, ``weight_i8`` (out_features, in_features) int8 and one scale
            for each output; or, for 4 bits, ``weight_i4`` (out_features, ceil(in_features / 2)) uint8, two
            codes a byte, ``in_features``, ``group_size`` unless there is one scale for each output, and
            ``weight_zero_points`` unless the codes are symmetric. If the layer has them, ``bias``
            (out_features,) and ``smooth`` (in_features,); ``hadamard`` if it rotates. Copied.

        Raises
        ------
        ParameterError
            If it is no mapping, a name is missing or unknown, or a value is not one that it can have.
        DTypeError, ShapeMismatchError, FeatureDimMismatchError, NonFiniteError, EmptyInputError
            If an array is not as described.
        """
        int4 = isinstance(arrays, Mapping) and "weight_i4" in arrays
        check_names(arrays, *(_INT4_NAMES if int4 else _INT8_NAMES))
        hadamard = as_scalar(arrays.get("hadamard", False))
        return cls(_weight_of(arrays), arrays.get("bias"), arrays.get("smooth"), hadamard)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything the layer consists of, as new arrays: what `from_arrays` takes, and `numpy.savez`."""
        weight = self._weight()
        arrays: dict[str, NDArray[Any]] = {"weight_scales": weight.scales}
        if self._format.bits == 8:
            arrays["weight_i8"] = weight.data
        else:
            arrays["weight_i4"] = weight.data
            arrays["in_features"] = np.array(self._k)
            if weight.zero_points is not None:
                arrays["weight_zero_points"] = weight.zero_points
            if self._format.group_size is not None:
                arrays["group_size"] = np.array(self._format.group_of(self._k))
        if self._bias is not None:
            arrays["bias"] = self._bias.copy()
        if self._smooth is not None:
            arrays["smooth"] = self._smooth.copy()
        if self._hadamard:
            arrays["hadamard"] = np.array(True)
        return arrays

    def _weight(self) -> DynQuantTensor:
        """The quantized weights, unpacked."""
        fmt, shape = self._format, (self._n, self._k)
        data, scales = np.empty(fmt.data_shape(shape), fmt.data_dtype), np.empty(fmt.scales_shape(shape), F32)
        zero_points = None if self._symmetric else np.empty(scales.shape, U8)
        self._layer.unpack(
            _core.CodeMatrix(data, scales, zero_points, *shape, fmt.group_of(self._k), fmt.packed, True)
        )
        return DynQuantTensor(data, scales, zero_points, shape, fmt)

    def weight_dequantized(self) -> NDArray[np.float32]:
        """The float32 weights (out_features, in_features) that the layer stands for, as they were given."""
        weight = self._weight().dequantize()
        if self._hadamard:
            rotate_named(weight, _rotation(self._k), weight, "weight")
        if self._smooth is not None:
            _core.scale_columns(float_matrix(weight, *weight.shape), self._smooth, True, weight)
        return weight

    @property
    def memory_bytes(self) -> int:
        """Bytes of packed weights, scales, zero points, bias and smoothing factors together."""
        extra = (array.nbytes for array in (self._bias, self._smooth) if array is not None)
        return self._layer.weight_bytes + sum(extra)

    def __call__(
        self, x: ArrayLike, *, out: NDArray[np.float32] | None = None, num_threads: int = 1
    ) -> NDArray[np.float32]:
        """Apply the layer.

        Parameters
        ----------
        x : array_like of floats, (..., in_features)
            Each row is quantized by itself, so its output does not depend on the others.
        out : ndarray of float32, (..., out_features), optional
            C-contiguous, apart from `x`. Allocated if not given.
        num_threads : int
            The most threads to use, the caller's among them; -1: ``DYNQUANT_NUM_THREADS``, or the CPUs that
            this process may use. Small work takes fewer. The result does not depend on it.

        Returns
        -------
        ndarray of float32, (..., out_features)
            As from `w8a8_matmul` or `w4a8_matmul`. `out` if it was given.

        Raises
        ------
        ShapeMismatchError
            If the last axis of `x` is not in_features long, or `out` has another shape.
        ParameterError
            If `num_threads` is not a positive integer or -1, or a row leaves float32 when rotated.
        DTypeError, NonFiniteError, LayoutError
            As from `w8a8_matmul`. After any of these `out` is as it was.
        """
        x = as_exported(x, "x")
        array = as_floats(x, "x")
        lengths = array.shape
        if not lengths or lengths[-1] != self._k:
            raise ShapeMismatchError(("...", self._k), lengths, "x")
        shape = (*lengths[:-1], self._n)
        threads = as_thread_count(num_threads)
        if out is not None:
            checked_out(out, shape, F32, array, x)
        if len(lengths) == 2:
            return multiply(self._layer, array, out, threads, "x")
        rows, into = array.reshape(-1, self._k), None if out is None else out.reshape(-1, self._n)
        y = multiply(self._layer, rows, into, threads, "x")
        return y.reshape(shape) if out is None else out

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_arrays, (self.to_arrays(),)

    def __repr__(self) -> str:
        fmt = self._format
        group = "" if fmt.group_size is None else f" per_group of {fmt.group_size}"
        zero_points = "" if self._symmetric else " with zero points"
        return (
            f"QuantLinear(in_features={self._k}, out_features={self._n}, "
            f"int{fmt.bits}{group}{zero_points}, bias={self._bias is not None}, "
            f"smooth={self._smooth is not None}, hadamard={self._hadamard})"
        )


def _smoothed(
    calibration: Any, k: int, factors: NDArray[np.float32] | None
) -> Iterator[NDArray[np.floating[Any]]]:
    """Calibration rows as the layer meets them, before they are rotated."""
    for batch in row_batches(calibration, "calibration", k):
        x = batch if factors is None else smooth_activations(batch, factors)
        check_finite(x, "calibration / smooth")
        yield x


def _rotated(k: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows of x (n, k), rotated as a layer rotates its inputs."""
    return rotate_named(x, _rotation(k), None, "calibration")


def _rotation(k: int) -> int:
    """Channels that are rotated together."""
    return min(hadamard_block(k), _MOST_ROTATED)


# What `QuantLinear.from_arrays` needs, and what it takes besides.
_OPTIONAL = {"bias", "smooth", "hadamard"}
_INT8_NAMES = {"weight_i8", "weight_scales"}, _OPTIONAL
_INT4_NAMES = {"weight_i4", "weight_scales", "in_features"}, {"weight_zero_points", "group_size", *_OPTIONAL}


def _weight_of(arrays: Mapping[str, Any]) -> DynQuantTensor:
    """The checked weights among the arrays that `QuantLinear.from_arrays` takes."""
    scales = as_floats(arrays["weight_scales"], "weight_scales").astype(F32, copy=False)
    check_finite(scales, "weight_scales")
    if "weight_i4" in arrays:
        return _int4_weight_of(arrays, scales)
    weight = as_int8_matrix(arrays["weight_i8"], "weight_i8")
    if weight.size == 0:
        raise EmptyInputError(f"weight_i8: expected at least one element, got shape {weight.shape}")
    if scales.shape != weight.shape[:1]:
        raise ShapeMismatchError(weight.shape[:1], scales.shape, "weight_scales")
    return DynQuantTensor(weight, scales, None, weight.shape, DynQuantFormat.INT8_PER_ROW)


def _int4_weight_of(arrays: Mapping[str, Any], scales: NDArray[np.float32]) -> DynQuantTensor:
    weight = as_array(arrays["weight_i4"], "weight_i4")
    if weight.dtype != U8:
        raise DTypeError(f"weight_i4: expected dtype uint8, got {weight.dtype}")
    if weight.ndim != 2:
        raise ShapeMismatchError("(out_features, ceil(in_features / 2))", weight.shape, "weight_i4")
    if weight.size == 0:
        raise EmptyInputError(f"weight_i4: expected at least one element, got shape {weight.shape}")
    k = as_count(as_scalar(arrays["in_features"]), "in_features")
    group = arrays.get("group_size")
    fmt, _ = weight_format(4, None if group is None else as_scalar(group), None)
    shape = (weight.shape[0], k)
    check_field(weight, "weight_i4", fmt.data_shape(shape), U8)
    check_field(scales, "weight_scales", fmt.scales_shape(shape), F32)
    zero_points = arrays.get("weight_zero_points")
    if zero_points is not None:
        zero_points = as_array(zero_points, "weight_zero_points")
        check_field(zero_points, "weight_zero_points", scales.shape, U8)
        if (most := zero_points.max()) > 15:
            raise ParameterError(f"weight_zero_points: expected numbers up to 15, got {most}")
    return DynQuantTensor(weight, scales, zero_points, shape, fmt)
