"""The quantized tensor."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from . import _core
from ._format import GRANULARITIES, DynQuantFormat
from ._validate import F32, U8, as_array, as_scalar, as_thread_count, check_names, checked_out, is_integer
from .errors import DTypeError, ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray


# What `DynQuantTensor.from_arrays` cannot do without.
_NAMES = {"data", "scales", "shape", "bits", "granularity", "packed"}


@dataclass(frozen=True, eq=False, repr=False, init=False)
class DynQuantTensor:
    """Codes, and all that turns them back into floats.

    Parameters
    ----------
    data : ndarray
        int8, of `shape`; or, when ``format.packed``, uint8 with two codes a byte: one run of
        ``ceil(n / 2)`` bytes per tensor, or per row a last axis of ``ceil(shape[-1] / 2)``.
    scales : ndarray of float32
        Shape (1,) per tensor, ``shape[:-1]`` per row, ``(*shape[:-1], ceil(shape[-1] / group_size))`` per
        group.
    zero_points : ndarray of uint8, or None
        None where codes are symmetric. Otherwise of the shape of `scales`: the codes are then 0..15, which
        only a packed format can have, and stand for ``(code - zero_point) * scale``.
    shape : tuple of int
        Shape of the tensor that was quantized.
    format : DynQuantFormat
    minimums : ndarray of float32, optional
        Instead of zero points, and of their shape: the codes 0..15 of a packed format then stand for ``code *
        scale + minimum``, the product rounded first. Files of other programs have such weights: GGUF's Q4_1,
        and those whose zero points are floats, for which ``minimum = -zero_point * scale``. Nothing here
        quantizes to them.

    Raises
    ------
    DTypeError, ShapeMismatchError
        If an array does not fit `shape` and `format`.
    ParameterError
        If there are `zero_points` or `minimums` for a format that is not packed, or both, or a zero point
        above 15, or `shape` or `format` are not what they should be.

    Notes
    -----
    The arrays are kept as they are, memory-mapped ones too, and may be written to. A tensor equals only
    itself, and NumPy cannot make an array of tensors.
    """

    __slots__ = ("__weakref__", "data", "format", "minimums", "scales", "shape", "zero_points")

    data: NDArray[Any]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None
    shape: tuple[int, ...]
    format: DynQuantFormat
    minimums: NDArray[np.float32] | None

    def __init__(
        self,
        data: NDArray[Any],
        scales: NDArray[np.float32],
        zero_points: NDArray[np.uint8] | None,
        shape: tuple[int, ...],
        format: DynQuantFormat,
        minimums: NDArray[np.float32] | None = None,
    ) -> None:
        if not isinstance(format, DynQuantFormat):
            raise ParameterError(f"format: expected a DynQuantFormat, got {shown(format)}")
        fields = {"data": data, "scales": scales, "zero_points": zero_points, "minimums": minimums}
        for name, value in {**fields, "shape": _as_shape(shape), "format": format}.items():
            object.__setattr__(self, name, value)
        if format.granularity != "per_tensor" and not self.shape:
            raise ShapeMismatchError("(..., k)", self.shape, "shape")
        check_arrays(self)

    # Comparisons with NumPy's scalars and arrays, and searches in lists that hold some, are Python's.
    __array_ufunc__ = None

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        """Refused: NumPy would make an array of one object, and save it in a file that it does not read."""
        raise DTypeError(
            "expected an array, got DynQuantTensor: dequantize() gives its values, data its codes, "
            "to_arrays() all of it for numpy.savez"
        )

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything the tensor consists of, as `from_arrays` takes it.

        All are arrays of numbers, so that ``numpy.savez``, safetensors, HDF5 and ``torch.save`` take them.

        Returns
        -------
        dict
            Its own ``data``, ``scales`` and, unless they are None, ``zero_points`` and ``minimums``; its
            ``shape``; and as arrays without axes ``bits``, ``granularity`` (0 per tensor, 1 per row, 2 per
            group), ``packed`` and, per group, ``group_size``.
        """
        fmt = self.format
        arrays: dict[str, NDArray[Any]] = {"data": self.data, "scales": self.scales}
        if self.zero_points is not None:
            arrays["zero_points"] = self.zero_points
        if self.minimums is not None:
            arrays["minimums"] = self.minimums
        arrays["shape"] = np.array(self.shape, np.int64)
        arrays["bits"], arrays["packed"] = np.array(fmt.bits), np.array(fmt.packed)
        arrays["granularity"] = np.array(GRANULARITIES.index(fmt.granularity))
        if fmt.group_size is not None:
            arrays["group_size"] = np.array(fmt.group_size)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> DynQuantTensor:
        """The tensor whose `to_arrays` gave `arrays`.

        Parameters
        ----------
        arrays : mapping
            As `to_arrays` gives it, perhaps through a file; version 0.1 wrote the granularity as a string.
            Arrays are kept as they are; floats in another byte order than this machine's are converted.

        Raises
        ------
        ParameterError
            If it is no mapping, a name is missing or unknown, or a value is not one that it can have.
        DTypeError, ShapeMismatchError
            If an array does not fit the others.

        Examples
        --------
        >>> from dynquant import dynamic_quantize
        >>> t = dynamic_quantize([[127.0, 1.0]])
        >>> DynQuantTensor.from_arrays(t.to_arrays())
        DynQuantTensor(shape=(1, 2), int8 per_row, 6 bytes)
        """
        check_names(arrays, _NAMES, {"zero_points", "minimums", "group_size"})
        bits, granularity, group, packed = (
            as_scalar(arrays.get(name)) for name in ("bits", "granularity", "group_size", "packed")
        )
        if isinstance(granularity, (int, np.integer)) and 0 <= granularity < len(GRANULARITIES):
            granularity = GRANULARITIES[granularity]
        fmt = DynQuantFormat(bits, str(granularity), group, packed)  # type: ignore[arg-type]
        scales, minimums = _native(arrays["scales"]), _native(arrays.get("minimums"))
        return cls(arrays["data"], scales, arrays.get("zero_points"), arrays["shape"], fmt, minimums)

    def to_layout(self, name: str, *, scale_dtype: DTypeLike | None = None) -> dict[str, NDArray[Any]]:
        """Quantized weights in the arrays of another library: the same codes and scales, for its files.

        Parameters
        ----------
        name : str
            "compressed-tensors", "gptq", "gptq_v2", "awq", "gguf" or "matmulnbits"; see the notes.
        scale_dtype : dtype, optional
            float32, float16 or, of ml_dtypes, bfloat16: scales are rounded to it. By default nothing is
            rounded: scales are float32, and for "gguf", which has float16 alone, an error unless they are
            float16 values.

        Returns
        -------
        dict of str to ndarray
            New arrays, or the tensor's own where the layout is the same.

        Raises
        ------
        ParameterError
            If `name` is unknown, the layout cannot hold the tensor, or a scale leaves `scale_dtype`.
        ShapeMismatchError, EmptyInputError, DTypeError, NonFiniteError
            If the tensor is not as `quantize_weights` gives it.

        Notes
        -----
        With n out_features, k in_features, and g groups a row:

        ==================== ===============================================================================
        compressed-tensors   8 bits, int-quantized: ``weight`` int8 (n, k), ``weight_scale`` (n, g). 4 bits,
                             pack-quantized: ``weight_packed`` int32 (n, ceil(k / 8)), ``weight_scale``,
                             ``weight_shape`` int64 (2,), and ``weight_zero_point`` int32 (ceil(n / 8), g)
                             unless all zero points are 8. Groups of equal size.
        gptq, gptq_v2        4 bits: ``qweight`` int32 (k / 8, n), ``qzeros`` int32 (g, n / 8), ``scales``
                             (g, n), ``g_idx`` int32 (k,). "gptq", which most files have, stores zero points
                             less 1.
        awq                  4 bits: ``qweight`` int32 (k, n / 8), ``qzeros`` int32 (g, n / 8), ``scales``
                             (g, n), for the GEMM kernels of AutoAWQ.
        gguf                 groups of 32: ``data`` uint8, rows of blocks, and ``type``, ggml's number of the
                             type: Q8_0; for 4 bits with zero points of 8 Q4_0, with minimums Q4_1.
        matmulnbits          groups of 16, 32, 64, 128 or 256: ``B`` uint8 (n, g, group_size * bits / 8),
                             ``scales`` (n, g), ``zero_points`` uint8 (n, ceil(g / 2)) unless all are 8, and
                             the attributes ``K`` and ``bits``. Zero points that are floats are read too, and
                             become minimums.
        ==================== ===============================================================================

        Sources: the packing functions of compressed-tensors, GPTQModel and AutoAWQ, ggml's block types, and
        the operator MatMulNBits of ONNX Runtime.

        Examples
        --------
        >>> from dynquant import quantize_weights
        >>> arrays = quantize_weights([[1.0, -0.5], [0.25, 1.0]], bits=4).to_layout("compressed-tensors")
        >>> {key: array.shape for key, array in arrays.items()}
        {'weight_packed': (2, 1), 'weight_scale': (2, 1), 'weight_shape': (2,), 'weight_zero_point': (1, 1)}
        """
        from ._layouts import to_layout  # here, because most programs never need it

        return to_layout(self, name, scale_dtype)

    @classmethod
    def from_layout(cls, name: str, arrays: Mapping[str, Any]) -> DynQuantTensor:
        """Quantized weights from the arrays of another library.

        Parameters
        ----------
        name : str
            As for `to_layout`.
        arrays : mapping of str to ndarray
            As `to_layout` gives them, with scales of float32, float16 or bfloat16. Arrays are kept as they
            are where their layout is the same, memory-mapped ones too.

        Returns
        -------
        DynQuantTensor
            With the very codes, scales and zero points. 4-bit codes are 0..15 with a zero point for each
            scale, 8 where the file has none, for files have codes of -8 too.

        Raises
        ------
        ParameterError
            If `name` is unknown, `arrays` is no mapping, or an array is missing or unknown; if values are not
            those of the layout, or cannot be held, as groups in another order than that of the inputs.
        DTypeError, ShapeMismatchError, EmptyInputError, NonFiniteError
            If an array is not as described.

        Examples
        --------
        >>> from dynquant import quantize_weights
        >>> w = quantize_weights([[1.0, -0.5], [0.25, 1.0]])
        >>> DynQuantTensor.from_layout("compressed-tensors", w.to_layout("compressed-tensors"))
        DynQuantTensor(shape=(2, 2), int8 per_row, 12 bytes)
        """
        from ._layouts import from_layout

        return from_layout(name, arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = self.data, self.scales, self.zero_points, self.shape, self.format, self.minimums
        return type(self), fields

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor without axes")
        return self.shape[0]

    def __getitem__(self, rows: Any) -> DynQuantTensor:
        """Rows of a tensor with a scale per row or per group, such as the entries of an embedding table.

        Parameters
        ----------
        rows : int, slice, array_like of ints, or mask
            What NumPy takes as an index of the first axis.

        Returns
        -------
        DynQuantTensor
            The codes and scales of these rows as they are: views for an int or a slice, copies for arrays.

        Raises
        ------
        ParameterError
            If the tensor has one scale for all of it, or no axis besides the last; or if `rows` is not an
            index of one axis.
        IndexError
            If a row does not exist.

        Examples
        --------
        >>> from dynquant import dynamic_quantize
        >>> table = dynamic_quantize([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> table[[2, 0]].dequantize().round().tolist()
        [[5.0, 6.0], [1.0, 2.0]]
        """
        if self.format.granularity == "per_tensor" or len(self.shape) < 2:
            raise ParameterError(f"rows: expected a tensor of rows with scales of their own, got {self!r}")
        index = _as_index(rows)
        data, scales = np.asarray(self.data[index]), np.asarray(self.scales[index])
        zero_points = None if self.zero_points is None else np.asarray(self.zero_points[index])
        minimums = None if self.minimums is None else np.asarray(self.minimums[index])
        leading = data.shape[: data.ndim - self.data.ndim + 1]
        return tensor_of_checked(
            data, scales, (*leading, *self.shape[1:]), self.format, zero_points, minimums
        )

    @property
    def element_count(self) -> int:
        """How many elements were quantized."""
        return math.prod(self.shape)

    @property
    def memory_bytes(self) -> int:
        """Bytes of codes, scales, zero points and minimums together."""
        arrays = self.data, self.scales, self.zero_points, self.minimums
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def compression_ratio(self) -> float:
        """Bytes of the float32 tensor over `memory_bytes`; 0.0 when there is nothing to compress."""
        return 4 * self.element_count / self.memory_bytes if self.element_count else 0.0

    def dequantize(
        self, *, out: NDArray[np.float32] | None = None, num_threads: int = 1
    ) -> NDArray[np.float32]:
        """The float32 values that the codes stand for.

        They are ``code * scale``, ``(code - zero_point) * scale``, or ``code * scale + minimum``.

        Parameters
        ----------
        out : ndarray of float32, optional
            Of shape `shape`, C-contiguous, disjoint from this tensor's arrays. Allocated if not given.
        num_threads : int
            How many threads may share the work, as in `dynamic_quantize`.

        Returns
        -------
        ndarray of float32, shape `shape`
            `out` if it was given. The product is rounded once: the largest floats of all, coded as 127, may
            come out as infinity. So is the sum with a minimum.

        Raises
        ------
        DTypeError, ShapeMismatchError, LayoutError
            If `out` cannot take the result; it is then as it was.
        ParameterError
            If `num_threads` is no number of threads.
        """
        threads = as_thread_count(num_threads)
        if out is None:
            out = np.empty(self.shape, F32)
        else:
            checked_out(out, self.shape, F32, *arrays_of(self))
        _core.dequantize_rows(code_matrix(self), out, threads)
        return out

    def __repr__(self) -> str:
        fmt = self.format
        group = "" if fmt.group_size is None else f" of {fmt.group_size}"
        zero_points = "" if self.zero_points is None else ", zero points"
        if self.minimums is not None:
            zero_points = ", minimums"
        packed = ", packed" if fmt.packed else ""
        return (
            f"DynQuantTensor(shape={self.shape}, int{fmt.bits} {fmt.granularity}{group}{zero_points}"
            f"{packed}, {self.memory_bytes} bytes)"
        )


def _as_index(rows: Any) -> Any:
    """`rows` as an int, a slice, or an array of ints or bools."""
    if isinstance(rows, slice):
        try:
            rows.indices(0)
        except (TypeError, ValueError) as error:
            raise ParameterError(f"rows: expected a slice of ints, got {rows} ({error})") from error
        return rows
    if is_integer(rows):
        if abs(int(rows)) > np.iinfo(np.intp).max:
            raise IndexError(f"rows: expected an index of a row, got {rows}")
        return int(rows)
    index = None if isinstance(rows, (tuple, str, bytes)) or rows is None else as_array(rows, "rows")
    if index is not None and index.size == 0 and index.ndim == 1 and isinstance(rows, list):
        return index.astype(np.intp)
    ints = index is not None and index.ndim > 0 and index.dtype.kind in "iu"
    mask = index is not None and index.ndim == 1 and index.dtype.kind == "b"
    if not (ints or mask):
        raise ParameterError(f"rows: expected an int, a slice, an array of ints or a mask, got {shown(rows)}")
    return index


def tensor_of_checked(
    data: NDArray[Any],
    scales: NDArray[np.float32],
    shape: tuple[int, ...],
    format: DynQuantFormat,
    zero_points: NDArray[np.uint8] | None = None,
    minimums: NDArray[np.float32] | None = None,
) -> DynQuantTensor:
    """A tensor of arrays that are known to fit; skips the checks, which cost more than a small call."""
    fields = data, scales, zero_points, shape, format, minimums
    tensor: DynQuantTensor = _core.new_unchecked(DynQuantTensor, *fields)
    return tensor


def arrays_of(tensor: DynQuantTensor) -> tuple[NDArray[Any] | None, ...]:
    """All memory of a tensor, against which an `out` is held."""
    return tensor.data, tensor.scales, tensor.zero_points, tensor.minimums


def _native(array: Any) -> Any:
    """`array` in the byte order of this machine; what is no array as it is."""
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def _as_shape(shape: Any) -> tuple[int, ...]:
    """`shape`, a tuple, list or vector, as a tuple of ints; a set or bytes would be taken by accident."""
    try:
        if not isinstance(shape, (tuple, list, np.ndarray)):
            raise TypeError(type(shape).__name__)
        lengths = tuple(operator.index(length) for length in shape)
    except TypeError as error:
        raise ParameterError(f"shape: expected a tuple of ints, got {shown(shape)}") from error
    if any(length < 0 for length in lengths):
        raise ParameterError(f"shape: expected lengths >= 0, got {shown(shape)}")
    try:
        np.broadcast_to(F32.type(0), lengths)
    except ValueError as error:
        raise ParameterError(f"shape: expected that of an array, got {shown(shape)} ({error})") from error
    return lengths


def check_arrays(tensor: DynQuantTensor) -> None:
    """Raise unless the arrays fit shape and format; someone may have changed them in place."""
    check_field(tensor.data, "data", tensor.format.data_shape(tensor.shape), tensor.format.data_dtype)
    check_field(tensor.scales, "scales", tensor.format.scales_shape(tensor.shape), F32)
    if tensor.zero_points is not None:
        if not tensor.format.packed:
            raise ParameterError(f"zero_points: expected None unless codes are packed, got {tensor.format}")
        check_field(tensor.zero_points, "zero_points", tensor.scales.shape, U8)
        if tensor.zero_points.max(initial=0) > 15:
            raise ParameterError(f"zero_points: expected numbers up to 15, got {tensor.zero_points.max()}")
    if tensor.minimums is not None:
        if not tensor.format.packed:
            raise ParameterError(f"minimums: expected None unless codes are packed, got {tensor.format}")
        if tensor.zero_points is not None:
            raise ParameterError("minimums: expected None beside zero_points, got an array")
        check_field(tensor.minimums, "minimums", tensor.scales.shape, F32)


def check_field(array: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        got = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise DTypeError(f"{name}: expected an ndarray of {dtype}, got {got}")
    as_array(array, name)  # refuses a mask
    if array.shape != shape:
        raise ShapeMismatchError(shape, array.shape, name)


def code_matrix(tensor: DynQuantTensor) -> _core.CodeMatrix:
    """The tensor as the kernels see it; arrays are copied only where they are strided or unaligned."""
    fmt, with_minimums = tensor.format, tensor.minimums is not None
    m, k = fmt.rows_of(tensor.shape)
    offsets: NDArray[Any] | None = tensor.minimums if with_minimums else tensor.zero_points
    offsets = None if offsets is None else as_flat(offsets)
    arrays = as_flat(tensor.data), as_flat(tensor.scales), offsets
    return _core.CodeMatrix(*arrays, m, k, fmt.group_of(k), fmt.packed, False, with_minimums)


def as_flat(array: NDArray[Any]) -> NDArray[Any]:
    """`array`, or a copy where it is strided or unaligned."""
    flat = np.ascontiguousarray(array)
    return flat if flat.flags.aligned else flat.copy()
