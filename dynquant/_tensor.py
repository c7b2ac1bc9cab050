"""Scale modes, formats, and the quantized tensor."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeAlias

import numpy as np

from . import _core
from ._validate import (
    F32,
    I8,
    U8,
    as_array,
    as_count,
    as_flag,
    as_number,
    as_scalar,
    check_names,
    checked_out,
)
from .errors import DTypeError, InvalidPercentileError, ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class MaxAbs:
    """Scale by the largest magnitude: ``max|x| / clip``, so that nothing saturates."""


@dataclass(frozen=True)
class Percentile:
    """Scale by a ranked magnitude: a share ``1 - p`` of the largest magnitudes saturates.

    Parameters
    ----------
    p : float
        0 < p <= 1. Of ``n`` magnitudes in ascending order the one at index ``max(ceil(p * n) - 1, 0)`` is
        taken (nearest rank); up to 2**24 magnitudes the product is one of float32.

    Raises
    ------
    InvalidPercentileError
        If `p` is outside that range or not a number.
    """

    p: float

    def __post_init__(self) -> None:
        try:
            p = as_number(self.p, "p")
        except ParameterError as error:
            raise InvalidPercentileError(self.p) from error
        if not 0 < p <= 1:
            raise InvalidPercentileError(self.p)

    def rank(self, n: int) -> int:
        """Index of the percentile among `n` > 0 ascending magnitudes."""
        return _core.percentile_rank(self.p, n)


DynamicScaleMode: TypeAlias = MaxAbs | Percentile

Granularity: TypeAlias = Literal["per_tensor", "per_row", "per_group"]


@dataclass(frozen=True)
class DynQuantFormat:
    """How codes and scales are laid out.

    Parameters
    ----------
    bits : {8, 4}
        Codes lie in [-127, 127] or [-7, 7].
    granularity : {"per_tensor", "per_row", "per_group"}
        What shares one scale: everything, what lies along the last axis, or every `group_size` elements of
        that.
    group_size : int or None
        At least 1 per group, None otherwise. The last group of a row may be shorter.
    packed : bool
        Two 4-bit codes to a byte, the even element in the low nibble. Only with ``bits=4``.

    Raises
    ------
    ParameterError
        If a field has another value.
    """

    bits: int
    granularity: Granularity
    group_size: int | None = None
    packed: bool = False

    INT8_PER_TENSOR: ClassVar[DynQuantFormat]
    INT8_PER_ROW: ClassVar[DynQuantFormat]
    INT4_PER_TENSOR: ClassVar[DynQuantFormat]
    INT4_PER_ROW: ClassVar[DynQuantFormat]

    def __post_init__(self) -> None:
        integral = isinstance(self.bits, numbers.Integral) and not isinstance(self.bits, bool)
        if not integral or self.bits not in (4, 8):
            raise ParameterError(f"bits: expected 4 or 8, got {shown(self.bits)}")
        object.__setattr__(self, "bits", int(self.bits))
        object.__setattr__(self, "packed", as_flag(self.packed, "packed"))
        named = type(self.granularity) is str
        if not named or self.granularity not in ("per_tensor", "per_row", "per_group"):
            raise ParameterError(
                f"granularity: expected 'per_tensor', 'per_row' or 'per_group', got {shown(self.granularity)}"
            )
        if self.granularity == "per_group":
            object.__setattr__(self, "group_size", as_count(self.group_size, "group_size"))
        elif self.group_size is not None:
            got = shown(self.group_size)
            raise ParameterError(f"group_size: expected None {self.granularity}, got {got}")
        if self.packed and self.bits != 4:
            raise ParameterError(f"packed: expected False for {self.bits}-bit codes, got {self.packed}")

    @classmethod
    def int8_per_group(cls, group_size: int) -> DynQuantFormat:
        """8-bit codes with a scale for every `group_size` elements of a row."""
        return cls(8, "per_group", group_size)

    @classmethod
    def int4_per_group(cls, group_size: int) -> DynQuantFormat:
        """4-bit codes, a byte each, with a scale for every `group_size` elements of a row."""
        return cls(4, "per_group", group_size)

    @cached_property
    def clip(self) -> int:
        """The largest code: 127 or 7."""
        return 127 if self.bits == 8 else 7

    def rows_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(m, k): as how many rows of how many elements a tensor of `shape` is taken."""
        if self.granularity == "per_tensor":
            return 1, math.prod(shape)
        return math.prod(shape[:-1]), shape[-1]

    def group_of(self, k: int) -> int:
        """How many of the `k` elements of a row share a scale, at least 1."""
        size = self.group_size
        return (k or 1) if size is None or size > k else size

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of `shape`."""
        if self.granularity == "per_tensor":
            return (1,)
        if self.group_size is None:
            return shape[:-1]
        return (*shape[:-1], -(-shape[-1] // self.group_size))

    def data_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the codes of a tensor of `shape`: that shape, or rows of bytes when packed."""
        if not self.packed:
            return shape
        _, k = self.rows_of(shape)
        return (*(() if self.granularity == "per_tensor" else shape[:-1]), (k + 1) // 2)

    @property
    def data_dtype(self) -> np.dtype[Any]:
        """int8, or uint8 when packed."""
        return U8 if self.packed else I8


DynQuantFormat.INT8_PER_TENSOR = DynQuantFormat(8, "per_tensor")
DynQuantFormat.INT8_PER_ROW = DynQuantFormat(8, "per_row")
DynQuantFormat.INT4_PER_TENSOR = DynQuantFormat(4, "per_tensor")
DynQuantFormat.INT4_PER_ROW = DynQuantFormat(4, "per_row")


# What `DynQuantTensor.from_arrays` cannot do without.
_NAMES = {"data", "scales", "shape", "bits", "granularity", "packed"}


@dataclass(frozen=True, eq=False, repr=False)
class DynQuantTensor:
    """Codes with what it takes to turn them back into floats.

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

    Raises
    ------
    DTypeError, ShapeMismatchError
        If an array does not fit `shape` and `format`.
    ParameterError
        If there are `zero_points` for a format that is not packed, or one above 15, or `shape` or `format`
        are not what they should be.

    Notes
    -----
    The arrays are kept as they are given, memory-mapped ones too, and may be written to. Tensors are equal to
    themselves alone, and NumPy makes no array of them, nor of lists of them.
    """

    __slots__ = ("__weakref__", "data", "format", "scales", "shape", "zero_points")

    data: NDArray[Any]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None
    shape: tuple[int, ...]
    format: DynQuantFormat

    def __post_init__(self) -> None:
        if not isinstance(self.format, DynQuantFormat):
            raise ParameterError(f"format: expected a DynQuantFormat, got {shown(self.format)}")
        object.__setattr__(self, "shape", _as_shape(self.shape))
        if self.format.granularity != "per_tensor" and not self.shape:
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
        """Everything the tensor consists of, as `from_arrays` takes it, and `numpy.savez`.

        Returns
        -------
        dict
            Its own ``data``, ``scales`` and, unless it is None, ``zero_points``; and arrays without axes that
            tell ``bits``, ``granularity``, ``packed`` and, per group, ``group_size``; and ``shape``.
        """
        fmt = self.format
        arrays: dict[str, NDArray[Any]] = {"data": self.data, "scales": self.scales}
        if self.zero_points is not None:
            arrays["zero_points"] = self.zero_points
        arrays["shape"] = np.array(self.shape, np.int64)
        for name in ("bits", "granularity", "packed", *(("group_size",) if fmt.group_size else ())):
            arrays[name] = np.array(getattr(fmt, name))
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> DynQuantTensor:
        """The tensor whose `to_arrays` gave `arrays`.

        Parameters
        ----------
        arrays : mapping
            As `to_arrays` has it, perhaps through a file. Arrays are kept as they are; scales in another byte
            order than this machine's are converted.

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
        check_names(arrays, _NAMES, {"zero_points", "group_size"})
        bits, granularity, group, packed = (
            as_scalar(arrays.get(name)) for name in ("bits", "granularity", "group_size", "packed")
        )
        fmt = DynQuantFormat(bits, str(granularity), group, packed)  # type: ignore[arg-type]
        scales = arrays["scales"]
        if isinstance(scales, np.ndarray) and not scales.dtype.isnative:
            scales = scales.astype(scales.dtype.newbyteorder("="))
        return cls(arrays["data"], scales, arrays.get("zero_points"), arrays["shape"], fmt)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.data, self.scales, self.zero_points, self.shape, self.format)

    @property
    def element_count(self) -> int:
        """How many elements were quantized."""
        return math.prod(self.shape)

    @property
    def memory_bytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        zero_bytes = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.data.nbytes + self.scales.nbytes + zero_bytes

    @property
    def compression_ratio(self) -> float:
        """Bytes of the float32 tensor over `memory_bytes`; 0.0 when there is nothing to compress."""
        return 4 * self.element_count / self.memory_bytes if self.element_count else 0.0

    def dequantize(self, *, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The float32 values that the codes stand for: ``code * scale`` or ``(code - zero_point) * scale``.

        Parameters
        ----------
        out : ndarray of float32, optional
            Of shape `shape`, C-contiguous, apart from this tensor's arrays. Allocated if not given.

        Returns
        -------
        ndarray of float32, shape `shape`
            `out` if it was given. The product is rounded once: the largest floats of all, coded as 127, may
            come out as infinity.

        Raises
        ------
        DTypeError, ShapeMismatchError, LayoutError
            If `out` cannot take the result; it is then as it was.
        """
        if out is None:
            out = np.empty(self.shape, F32)
        else:
            checked_out(out, self.shape, F32, self.data, self.scales, self.zero_points)
        _core.dequantize_rows(code_matrix(self), out)
        return out

    def __repr__(self) -> str:
        fmt = self.format
        group = "" if fmt.group_size is None else f" of {fmt.group_size}"
        zero_points = "" if self.zero_points is None else ", zero points"
        packed = ", packed" if fmt.packed else ""
        return (
            f"DynQuantTensor(shape={self.shape}, int{fmt.bits} {fmt.granularity}{group}{zero_points}"
            f"{packed}, {self.memory_bytes} bytes)"
        )


def tensor_of_checked(
    data: NDArray[Any],
    scales: NDArray[np.float32],
    shape: tuple[int, ...],
    format: DynQuantFormat,
    zero_points: NDArray[np.uint8] | None = None,
) -> DynQuantTensor:
    """A tensor of arrays that are known to fit; skips the checks, which cost more than a small call."""
    tensor: DynQuantTensor = _core.new_unchecked(DynQuantTensor, data, scales, zero_points, shape, format)
    return tensor


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
    """Raise unless the arrays fit shape and format, as they do until someone changes them in place."""
    check_field(tensor.data, "data", tensor.format.data_shape(tensor.shape), tensor.format.data_dtype)
    check_field(tensor.scales, "scales", tensor.format.scales_shape(tensor.shape), F32)
    if tensor.zero_points is not None:
        if not tensor.format.packed:
            raise ParameterError(f"zero_points: expected None unless codes are packed, got {tensor.format}")
        check_field(tensor.zero_points, "zero_points", tensor.scales.shape, U8)
        if tensor.zero_points.max(initial=0) > 15:
            raise ParameterError(f"zero_points: expected numbers up to 15, got {tensor.zero_points.max()}")


def check_field(array: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        got = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise DTypeError(f"{name}: expected an ndarray of {dtype}, got {got}")
    as_array(array, name)  # refuses a mask
    if array.shape != shape:
        raise ShapeMismatchError(shape, array.shape, name)


def code_matrix(tensor: DynQuantTensor) -> _core.CodeMatrix:
    """The tensor as the kernels see it; arrays are copied only where they are strided or unaligned."""
    fmt, zero_points = tensor.format, tensor.zero_points
    m, k = fmt.rows_of(tensor.shape)
    zero_points = None if zero_points is None else as_flat(zero_points)
    return _core.CodeMatrix(
        as_flat(tensor.data), as_flat(tensor.scales), zero_points, m, k, fmt.group_of(k), fmt.packed
    )


def as_flat(array: NDArray[Any]) -> NDArray[Any]:
    """`array`, or a copy where it is strided or unaligned."""
    flat = np.ascontiguousarray(array)
    return flat if flat.flags.aligned else flat.copy()


def packed_format(format: DynQuantFormat, packed: bool) -> DynQuantFormat:
    """`format`, packed if either it or `packed` says so."""
    if packed is False or not as_flag(packed, "packed") or format.packed:
        return format
    return dataclasses.replace(format, packed=True)
