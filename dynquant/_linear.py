"""A linear layer with quantized weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy import ndarray

from . import _core
from ._batches import row_batches
from ._calibrator import Calibrator
from ._compensate import SecondMoments
from ._format import DynQuantFormat
from ._packed import (
    INT4,
    INT8_GROUPS,
    INT8_ROWS,
    check_weight,
    multiply,
    multiply_codes,
    multiply_floats,
    packed_linear,
    raise_bad_row,
)
from ._smooth import as_factors
from ._tensor import DynQuantTensor, as_flat, check_arrays, check_field, tensor_of_checked
from ._transform import InputTransform, fixed_signs, rotated_span
from ._validate import (
    F32,
    I8,
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
    is_integer,
)
from ._weights import quantize_matrix, weight_format
from .errors import (
    DTypeError,
    EmptyInputError,
    FeatureDimMismatchError,
    ParameterError,
    ShapeMismatchError,
    shown,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class QuantLinear:
    """A linear layer with int8 or 4-bit weights, quantized and packed once and then called many times.

    ``y = x @ weight.T + bias`` for activations that are quantized row by row as they come. Made by
    `from_float` or `from_arrays`, or from weights that are quantized already.

    Parameters
    ----------
    weight : DynQuantTensor, (out_features, in_features)
        As from `quantize_weights`, or with minimums. With `smooth`, `signs` or `hadamard` these are quantized
        weights that were multiplied by the factors, multiplied by the signs, and rotated, in this order.
    bias : array_like of floats, (out_features,), optional
    smooth : array_like of floats, (in_features,), optional
        What activations are divided by in every call.
    hadamard : bool
        Whether activations are rotated in every call, in spans as `from_float` has them.
    signs : array_like of 1 and -1, (in_features,), optional
        What activations are multiplied by before they are rotated. Only with `hadamard`.
    activation_symmetric, activation_bits
        How activations are quantized, as in `from_float`.

    Attributes
    ----------
    in_features, out_features, bits : int
    group_size, activation_bits : int or None
    bias, smooth, signs : ndarray or None
    hadamard, activation_symmetric : bool

    Raises
    ------
    ParameterError, ShapeMismatchError, EmptyInputError
        If `weight` is not as `quantize_weights` gives it.
    DTypeError, ShapeMismatchError, FeatureDimMismatchError, NonFiniteError, ParameterError
        If another argument is not as described.

    Notes
    -----
    Only the packed form is kept, which is that of the instruction set in use, with outputs rounded up to
    whole panels: a byte a weight and for each output a scale; or half a byte a weight, and for each group of
    an output a scale and a byte for its zero point, or four for its minimum. Pickling and `to_arrays` give a
    form that does not depend on the instruction set. Calls change nothing, so threads may share a layer.

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
        *,
        signs: ArrayLike | None = None,
        activation_symmetric: bool = True,
        activation_bits: int | None = 8,
    ) -> None:
        check_weight(weight, "weight", INT8_ROWS, INT8_GROUPS, INT4)
        if weight.element_count == 0:
            raise EmptyInputError(f"weight: expected at least one element, got shape {weight.shape}")
        n, k = weight.shape
        offset = None if bias is None else as_finite_vector(bias, "bias", n)
        factors = None if smooth is None else as_factors(smooth, "smooth", k)
        hadamard = as_flag(hadamard, "hadamard")
        if signs is not None and not hadamard:
            raise ParameterError("signs: expected None unless hadamard is True, got an array")
        span = rotated_span(k) if hadamard else 0
        transform = InputTransform(factors, None if signs is None else _as_signs(signs, k), span)
        activations = as_activations(activation_bits, activation_symmetric, weight.format.bits)
        self._set(weight, offset, transform, hadamard, *activations)

    def _set(
        self,
        weight: DynQuantTensor,
        bias: NDArray[np.float32] | None,
        transform: InputTransform,
        hadamard: bool,
        activation_bits: int | None,
        activation_symmetric: bool,
    ) -> None:
        """Everything a layer consists of, from checked arguments, of which nothing is kept but copies."""
        self._n, self._k = weight.shape
        self._format = weight.format
        self._symmetric, self._minimums = weight.zero_points is None, weight.minimums is not None
        self._bias = _frozen_copy(bias)
        self._hadamard = hadamard
        self._transform = transform = InputTransform(
            _frozen_copy(transform.smooth), _frozen_copy(transform.signs), transform.span
        )
        self._activation_bits, self._activation_symmetric = activation_bits, activation_symmetric
        # Packed weights; for float activations the weights as they are.
        self._layer: _core.PackedLinear | DynQuantTensor
        if activation_bits is None:
            self._layer = copy.deepcopy(weight)
        else:
            vectors = transform.factors, transform.divides, transform.span
            self._layer = packed_linear(weight, self._bias, *vectors, activation_symmetric)

    @property
    def in_features(self) -> int:
        """Length of a row of inputs."""
        return self._k

    @property
    def out_features(self) -> int:
        """Length of a row of outputs."""
        return self._n

    @property
    def bits(self) -> int:
        """Bits of a weight: 8 or 4."""
        return self._format.bits

    @property
    def group_size(self) -> int | None:
        """How many in_features share a scale of the weights; None where there is one for each output."""
        return self._format.group_size

    @property
    def bias(self) -> NDArray[np.float32] | None:
        """What is added to the outputs, (out_features,), read-only; None where nothing is."""
        return _read_only(self._bias)

    @property
    def smooth(self) -> NDArray[np.float32] | None:
        """What activations are divided by, (in_features,), read-only; None where they are not."""
        return _read_only(self._transform.smooth)

    @property
    def hadamard(self) -> bool:
        """Whether activations are rotated."""
        return self._hadamard

    @property
    def signs(self) -> NDArray[np.float32] | None:
        """What activations are multiplied by before they are rotated, (in_features,), read-only, or None."""
        return _read_only(self._transform.signs)

    @property
    def activation_bits(self) -> int | None:
        """Bits of a quantized activation, 8; None where activations are not quantized."""
        return self._activation_bits

    @property
    def activation_symmetric(self) -> bool:
        """Whether the codes of activations are around zero; otherwise each row has a zero point."""
        return self._activation_symmetric

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
        calibration: ArrayLike | Iterable[ArrayLike] | Calibrator | None = None,
        relative: bool = True,
        activation_symmetric: bool = True,
        activation_bits: int | None = 8,
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
            smoothing: in spans of the largest power of two that divides in_features, at most 128. Longer
            spans distribute a massive value over more channels, which lost accuracy where it was tried; with
            an odd in_features there is nothing to rotate. Each channel is multiplied by a fixed sign before,
            the same for every layer of this width, so that inputs of one sign do not gather in one channel.
            Rotation needs no calibration, and gains where some channels are much larger than others.
        calibration : array_like of floats, (..., in_features), an iterable of them, or a Calibrator, optional
            Inputs that the layer has had, neither smoothed nor rotated; those that a Calibrator has sampled,
            which was made with `rows`. Codes are chosen so that their errors cancel in the output, as in
            `quantize_weights`.
        activation_symmetric : bool
            False: activations are quantized to uint8 with a zero point for each row, which uses all 256 codes
            where inputs are of one sign or off center. Only with ``bits=8``. It costs 4 bytes for each scale
            of the weights; see the notes.
        activation_bits : {8, None}
            None: activations stay float32, and are multiplied by the float32 values of the weights. This
            saves the memory of weights but no time: some of them are dequantized at a time, for NumPy's BLAS.

        Returns
        -------
        QuantLinear

        Raises
        ------
        DTypeError, NonFiniteError
            If an argument does not hold floats, or holds NaN or infinity.
        ShapeMismatchError, FeatureDimMismatchError, EmptyInputError
            If the shapes do not agree, or `weight` has no elements.
        ParameterError
            If an option has a value that it cannot take, a factor is not above zero, or a weight leaves
            float32 when rotated.

        Notes
        -----
        Activations that are not symmetric have ``scale = (max(0, max) - min(0, min)) / 255``, ``zero_point =
        clamp(round(-min(0, min) / scale), 0, 255)`` and ``code = clamp(round(x / scale) + zero_point, 0,
        255)``, halves away from zero. The output is ``float32(sum) * weight_scale * scale + bias``, where
        ``sum`` is the exact integer ``sum(w * (code - zero_point))``. Of a row of zeros it is the bias.

        8-bit weights with groups are multiplied as 4-bit weights are in `w4a8_matmul`: ``total * scale +
        bias``, where ``total`` adds up ``float32(sum) * group_scale`` over the groups in ascending order,
        from 0, in float32.

        All of these are exact and the same bits everywhere, as those of `w8a8_matmul` are. With
        ``activation_bits=None`` outputs are those of NumPy's BLAS, close to ``x @
        layer.weight_dequantized().T + bias`` and to each other, but not the same bits on every machine or in
        every batch. Where partial sums leave float32, BLAS may give NaN for infinity minus infinity.
        """
        fmt, symmetric = weight_format(bits, group_size, symmetric)
        activations = as_activations(activation_bits, activation_symmetric, fmt.bits)
        search, hadamard = as_flag(search, "search"), as_flag(hadamard, "hadamard")
        threads = as_thread_count(num_threads)
        w = as_matrix(weight, "weight", "(out_features, in_features)")
        n, k = w.shape
        offset = None if bias is None else as_finite_vector(bias, "bias", n)
        factors = None if smooth is None else as_factors(smooth, "smooth", k)
        relative = as_flag(relative, "relative")
        transform = transform_of(k, factors, hadamard)
        w = transform.of_weights(w, "weight")
        moments = None if calibration is None else moments_of(calibration, k, relative, transform)
        tensor = quantize_matrix(w, fmt, symmetric, search, moments, threads, "weight")
        layer = cls.__new__(cls)
        layer._set(tensor, offset, transform, hadamard, *activations)
        return layer

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> QuantLinear:
        """The layer whose `to_arrays` gave `arrays`.

        Parameters
        ----------
        arrays : mapping
            ``weight_scales`` and, for 8 bits, ``weight_i8`` (out_features, in_features) int8; or, for 4 bits,
            ``weight_i4`` (out_features, ceil(in_features / 2)) uint8, two codes a byte, ``in_features``, and
            ``weight_zero_points`` or ``weight_minimums`` unless the codes are symmetric. ``group_size``
            unless there is one scale for each output. If the layer has them, ``bias`` (out_features,) and
            ``smooth`` (in_features,); ``hadamard`` if it rotates, and ``signs`` (in_features,), 1 or -1,
            unless it rotates without, as layers of version 0.1 do; ``activation_symmetric`` if that is False;
            ``activation_bits``, 0, if that is None. Copied.

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
        vectors = arrays.get("bias"), arrays.get("smooth")
        bits = as_scalar(arrays.get("activation_bits", 8))
        return cls(
            _weight_of(arrays),
            *vectors,
            hadamard,
            signs=arrays.get("signs"),
            activation_symmetric=as_scalar(arrays.get("activation_symmetric", True)),
            activation_bits=None if is_integer(bits) and bits == 0 else bits,
        )

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything the layer consists of, as new arrays of numbers, for `from_arrays` and `numpy.savez`.

        Several layers go into one file with a prefix to each name.

        Examples
        --------
        >>> up, down = QuantLinear.from_float([[1.0, 2.0]]), QuantLinear.from_float([[3.0]])
        >>> arrays = {f"up.{key}": array for key, array in up.to_arrays().items()}
        >>> arrays.update({f"down.{key}": array for key, array in down.to_arrays().items()})
        >>> sorted(arrays)
        ['down.weight_i8', 'down.weight_scales', 'up.weight_i8', 'up.weight_scales']
        >>> part = {key.removeprefix("up."): a for key, a in arrays.items() if key.startswith("up.")}
        >>> QuantLinear.from_arrays(part)
        QuantLinear(in_features=2, out_features=1, int8, bias=False, smooth=False, hadamard=False)
        """
        weight = self._weight()
        arrays: dict[str, NDArray[Any]] = {"weight_scales": weight.scales}
        if self._format.bits == 8:
            arrays["weight_i8"] = weight.data
        else:
            arrays["weight_i4"] = weight.data
            arrays["in_features"] = np.array(self._k)
            if weight.zero_points is not None:
                arrays["weight_zero_points"] = weight.zero_points
            if weight.minimums is not None:
                arrays["weight_minimums"] = weight.minimums
        if self._format.group_size is not None:
            arrays["group_size"] = np.array(self._format.group_size)
        if self._bias is not None:
            arrays["bias"] = self._bias.copy()
        if self._transform.smooth is not None:
            arrays["smooth"] = self._transform.smooth.copy()
        if self._hadamard:
            arrays["hadamard"] = np.array(True)
        if self._transform.signs is not None:
            arrays["signs"] = self._transform.signs.astype(I8)
        if not self._activation_symmetric:
            arrays["activation_symmetric"] = np.array(False)
        if self._activation_bits is None:
            arrays["activation_bits"] = np.array(0)
        return arrays

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        """Refused: NumPy would make an array of one object, and save it in a file that it does not read."""
        raise DTypeError(
            "expected an array, got QuantLinear: weight_dequantized() gives its weights, "
            "to_arrays() all of it for numpy.savez"
        )

    def _weight(self) -> DynQuantTensor:
        """The quantized weights, unpacked: new arrays."""
        if isinstance(self._layer, DynQuantTensor):
            return copy.deepcopy(self._layer)
        fmt, shape = self._format, (self._n, self._k)
        data, scales = np.empty(fmt.data_shape(shape), fmt.data_dtype), np.empty(fmt.scales_shape(shape), F32)
        zero_points = None if self._symmetric else np.empty(scales.shape, U8)
        minimums = np.empty(scales.shape, F32) if self._minimums else None
        offsets = zero_points if minimums is None else minimums
        layout = *shape, fmt.group_of(self._k), fmt.packed, True, self._minimums
        self._layer.unpack(_core.CodeMatrix(data, scales, offsets, *layout))
        return DynQuantTensor(data, scales, zero_points, shape, fmt, minimums)

    def weight_dequantized(self) -> NDArray[np.float32]:
        """The float32 weights (out_features, in_features) that the layer stands for, as they were given."""
        return self._transform.undo_weights(self._weight().dequantize(), "weight")

    @property
    def memory_bytes(self) -> int:
        """Bytes of packed weights, scales, zero points, bias, smoothing factors and signs together."""
        vectors = (self._bias, self._transform.smooth, self._transform.signs)
        layer = self._layer
        weight_bytes = layer.memory_bytes if isinstance(layer, DynQuantTensor) else layer.weight_bytes
        return weight_bytes + sum(vector.nbytes for vector in vectors if vector is not None)

    def __call__(
        self,
        x: ArrayLike | DynQuantTensor,
        *,
        out: NDArray[np.float32] | None = None,
        num_threads: int = 1,
    ) -> NDArray[np.float32]:
        """Apply the layer.

        Parameters
        ----------
        x : array_like of floats, (..., in_features), or DynQuantTensor
            Each row is quantized by itself, so its output does not depend on the others. A tensor, as from
            `quantize_input`, has been quantized before: its codes and scales are used as they are.
        out : ndarray of float32, (..., out_features), optional
            C-contiguous, sharing no memory with `x`. Allocated if not given.
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
            If `num_threads` is not a positive integer or -1, a row leaves float32 when rotated, or `x` is a
            tensor of another format than ``DynQuantFormat.INT8_PER_ROW`` or has a code of -128.
        DTypeError, NonFiniteError, LayoutError
            As from `w8a8_matmul`. After any of these `out` is as it was.
        """
        if type(x) is ndarray and type(num_threads) is int and num_threads == 1:
            y = self._multiply_plain(x, out)
            if y is not None:
                return y
        if isinstance(x, DynQuantTensor):
            return self._multiply_codes(x, out, num_threads)
        x = as_exported(x, "x")
        array = as_floats(x, "x")
        shape = self._output_shape(array.shape)
        threads = as_thread_count(num_threads)
        if out is not None:
            checked_out(out, shape, F32, array, x)
        rows, into = self._as_rows(array, out)
        if isinstance(self._layer, DynQuantTensor):
            y = self._multiply_floats(self._layer, rows, into)
        else:
            y = multiply(self._layer, rows, into, threads, "x")
        return y.reshape(shape) if out is None else out

    def _multiply_plain(self, x: NDArray[Any], out: Any) -> NDArray[np.float32] | None:
        """The output for a few rows that are as they mostly are; None for others, after no change."""
        layer = self._layer
        if isinstance(layer, DynQuantTensor) or not (out is None or type(out) is ndarray):
            return None
        if x.size > _core.MAX_PLAIN_FLOATS:  # before memory is taken for the results
            return None
        y = np.empty((*x.shape[:-1], self._n), F32) if out is None else out
        return y if layer.multiply_plain(x, y, out is not None) else None

    def _multiply_floats(
        self, weight: DynQuantTensor, x: NDArray[Any], out: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        check_finite(x, "x")
        inputs = self._transform.of_inputs(x, "x").astype(F32, copy=False)
        y = multiply_floats(weight, self._bias, inputs)
        if out is None:
            return y
        out[:] = y
        return out

    def _multiply_codes(
        self, x: DynQuantTensor, out: NDArray[np.float32] | None, num_threads: int
    ) -> NDArray[np.float32]:
        if x.format != DynQuantFormat.INT8_PER_ROW:
            raise ParameterError(f"x: expected int8 codes per row, as from quantize_input, got {shown(x)}")
        if isinstance(self._layer, DynQuantTensor):
            raise ParameterError("x: expected floats, since activation_bits is None, got a DynQuantTensor")
        check_arrays(x)
        check_finite(as_flat(x.scales), "x.scales")
        shape = self._output_shape(x.shape)
        threads = as_thread_count(num_threads)
        if out is not None:
            checked_out(out, shape, F32, x.data, x.scales)
        into = None if out is None else out.reshape(-1, self._n)
        y = multiply_codes(self._layer, x, into, threads, "x")
        return y.reshape(shape) if out is None else out

    def _output_shape(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        if not lengths or lengths[-1] != self._k:
            raise ShapeMismatchError(f"(..., {self._k})", lengths, "x")
        return (*lengths[:-1], self._n)

    def _as_rows(
        self, x: NDArray[Any], out: NDArray[np.float32] | None
    ) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Inputs and outputs as matrices."""
        if x.ndim == 2:
            return x, out
        return x.reshape(-1, self._k), None if out is None else out.reshape(-1, self._n)

    def quantize_input(self, x: ArrayLike, *, num_threads: int = 1) -> DynQuantTensor:
        """Quantize activations as the layer does, once for several calls.

        Parameters
        ----------
        x : array_like of floats, (..., in_features)
        num_threads : int
            As in a call of the layer.

        Returns
        -------
        DynQuantTensor
            Of `x`, smoothed and rotated if the layer does that, in ``DynQuantFormat.INT8_PER_ROW``. The
            layer's output for it is the same, bit for bit, as for `x`; so is that of other layers with the
            same `smooth`, `hadamard` and `signs`, such as those for query, key and value.

        Raises
        ------
        ShapeMismatchError
            If the last axis of `x` is not in_features long.
        ParameterError
            If `num_threads` is not a positive integer or -1, a row leaves float32 when rotated, or the
            layer's activations are not symmetric 8-bit codes.
        DTypeError, NonFiniteError
            If `x` does not hold floats, or holds NaN or infinity.

        Examples
        --------
        >>> layer = QuantLinear.from_float([[1.0, -2.0], [0.5, 0.25]])
        >>> x = layer.quantize_input([[127.0, 1.0]])
        >>> x.data.tolist(), x.scales.tolist(), layer(x).tolist() == layer([[127.0, 1.0]]).tolist()
        ([[127, 1]], [1.0], True)
        """
        if isinstance(self._layer, DynQuantTensor) or not self._activation_symmetric:
            raise ParameterError(
                "quantize_input: expected a layer with symmetric 8-bit activations, got "
                f"activation_symmetric={self._activation_symmetric}, activation_bits={self._activation_bits}"
            )
        array = as_floats(x, "x")
        self._output_shape(array.shape)
        threads = as_thread_count(num_threads)
        data, scales = np.empty(array.shape, I8), np.empty(array.shape[:-1], F32)
        codes = _core.CodeMatrix(data, scales, None, scales.size, self._k, self._k, False, True)
        if not self._layer.quantize_input(float_matrix(array, scales.size, self._k), codes, threads):
            raise_bad_row(array, self._layer, "x")
        return tensor_of_checked(data, scales, array.shape, DynQuantFormat.INT8_PER_ROW)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_arrays, (self.to_arrays(),)

    def __repr__(self) -> str:
        fmt = self._format
        group = "" if fmt.group_size is None else f" per_group of {fmt.group_size}"
        zero_points = " with minimums" if self._minimums else "" if self._symmetric else " with zero points"
        activations = "" if self._activation_symmetric else ", activation_symmetric=False"
        if self._activation_bits is None:
            activations += ", activation_bits=None"
        return (
            f"QuantLinear(in_features={self._k}, out_features={self._n}, "
            f"int{fmt.bits}{group}{zero_points}, bias={self._bias is not None}, "
            f"smooth={self._transform.smooth is not None}, hadamard={self._hadamard}{activations})"
        )


def packed_form(layer: QuantLinear) -> _core.PackedLinear:
    """The weights of a layer with quantized activations as the kernels take them."""
    assert isinstance(layer._layer, _core.PackedLinear)
    return layer._layer


def transform_of(k: int, smooth: NDArray[np.float32] | None, hadamard: bool) -> InputTransform:
    """What a new layer of k inputs does to them."""
    span = rotated_span(k) if hadamard else 0
    return InputTransform(smooth, fixed_signs(k) if span else None, span)


def moments_of(calibration: Any, k: int, relative: bool, transform: InputTransform) -> SecondMoments:
    """Second moments of smoothed calibration rows; signs and rotation are applied to the moments later."""
    smoothing = InputTransform(transform.smooth, None, 0)
    rotation = InputTransform(None, transform.signs, transform.span)

    def rotate(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return rotation.of_inputs(rows, "calibration")

    batches = row_batches(calibration, "calibration", k)
    smoothed = (smoothing.of_inputs(batch, "calibration") for batch in batches)
    return SecondMoments(smoothed, k, relative, rotate if transform.span else None)


def as_activations(bits: Any, symmetric: Any, weight_bits: int) -> tuple[int | None, bool]:
    """The options `activation_bits` and `activation_symmetric`, checked."""
    symmetric = as_flag(symmetric, "activation_symmetric")
    if bits is not None and (not is_integer(bits) or bits != 8):
        raise ParameterError(f"activation_bits: expected 8 or None, got {shown(bits)}")
    if not symmetric and (weight_bits != 8 or bits is None):
        raise ParameterError(
            "activation_symmetric: expected True unless weights and activations have 8 bits, got False"
        )
    return None if bits is None else 8, symmetric


def _frozen_copy(vector: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    if vector is None:
        return None
    copy = vector.copy()
    copy.flags.writeable = False
    return copy


def _read_only(vector: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """A view of a frozen copy: unlike the copy itself it cannot be made writable."""
    return None if vector is None else vector[:]


def _as_signs(x: Any, k: int) -> NDArray[np.float32]:
    """`x` as a float32 vector of k signs."""
    signs = as_array(x, "signs")
    if signs.dtype.kind not in "if":
        raise DTypeError(f"signs: expected an array of numbers, got dtype {signs.dtype}")
    if signs.ndim != 1:
        raise ShapeMismatchError((k,), signs.shape, "signs")
    if signs.size != k:
        raise FeatureDimMismatchError(k, signs.size, "signs")
    if not (np.abs(signs) == 1).all():
        raise ParameterError(f"signs: expected 1 and -1, got {signs[np.abs(signs) != 1][0]}")
    return signs.astype(F32)


# What `QuantLinear.from_arrays` needs, and what it takes besides.
_OPTIONAL = {"group_size", "bias", "smooth", "hadamard", "signs", "activation_symmetric", "activation_bits"}
_INT8_NAMES = {"weight_i8", "weight_scales"}, _OPTIONAL
_INT4_NAMES = (
    {"weight_i4", "weight_scales", "in_features"},
    {"weight_zero_points", "weight_minimums", *_OPTIONAL},
)


def _weight_of(arrays: Mapping[str, Any]) -> DynQuantTensor:
    """The checked weights among the arrays that `QuantLinear.from_arrays` takes."""
    scales = as_floats(arrays["weight_scales"], "weight_scales").astype(F32, copy=False)
    check_finite(scales, "weight_scales")
    if "weight_i4" in arrays:
        return _int4_weight_of(arrays, scales)
    weight = as_int8_matrix(arrays["weight_i8"], "weight_i8")
    if weight.size == 0:
        raise EmptyInputError(f"weight_i8: expected at least one element, got shape {weight.shape}")
    group = arrays.get("group_size")
    fmt, _ = weight_format(8, None if group is None else as_scalar(group), None)
    check_field(scales, "weight_scales", fmt.scales_shape(weight.shape), F32)
    return DynQuantTensor(weight, scales, None, weight.shape, fmt)


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
        if (z_max := zero_points.max()) > 15:
            raise ParameterError(f"weight_zero_points: expected numbers up to 15, got {z_max}")
    return DynQuantTensor(weight, scales, zero_points, shape, fmt, _minimums_of(arrays, scales))


def _minimums_of(arrays: Mapping[str, Any], scales: NDArray[np.float32]) -> NDArray[np.float32] | None:
    if "weight_minimums" not in arrays:
        return None
    if "weight_zero_points" in arrays:
        raise ParameterError("weight_minimums: expected none beside weight_zero_points, got an array")
    minimums = as_floats(arrays["weight_minimums"], "weight_minimums").astype(F32, copy=False)
    check_field(minimums, "weight_minimums", scales.shape, F32)
    check_finite(minimums, "weight_minimums")
    return minimums
