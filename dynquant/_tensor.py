"""Scale modes, formats, and the quantised tensor."""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np

from . import _core
from ._validate import F32, I8, U8, as_number, checked_out
from .errors import DTypeError, InvalidPercentileError, ParameterError, ShapeMismatchError

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
        taken (nearest rank).

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

Granularity: TypeAlias = Literal["per_tensor", "per_row"]


@dataclass(frozen=True)
class DynQuantFormat:
    """How codes and scales are laid out.

    Parameters
    ----------
    bits : {8, 4}
        Codes lie in [-127, 127] or [-7, 7].
    granularity : {"per_tensor", "per_row"}
        What shares one scale: everything, or what lies along the last axis.
    group_size : None
        No format of this version divides rows into groups.
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
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise ParameterError(f"bits: expected 4 or 8, got {self.bits!r}")
        if type(self.packed) is not bool:
            raise ParameterError(f"packed: expected a bool, got {self.packed!r}")
        if self.granularity not in ("per_tensor", "per_row"):
            raise ParameterError(f"granularity: expected 'per_tensor' or 'per_row', got {self.granularity!r}")
        if self.group_size is not None:
            raise ParameterError(f"group_size: expected None, got {self.group_size!r}")
        if self.packed and self.bits != 4:
            raise ParameterError(f"packed: expected False for {self.bits}-bit codes, got {self.packed!r}")

    @cached_property
    def clip(self) -> int:
        """The largest code: 127 or 7."""
        return 127 if self.bits == 8 else 7

    def rows_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(m, k): how many scales a tensor of `shape` has, and how many elements share each."""
        if self.granularity == "per_tensor":
            return 1, math.prod(shape)
        return math.prod(shape[:-1]), shape[-1]

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of `shape`."""
        return (1,) if self.granularity == "per_tensor" else shape[:-1]

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


@dataclass(frozen=True, eq=False, repr=False)
class DynQuantTensor:
    """Codes with what it takes to turn them back into floats.

    Parameters
    ----------
    data : ndarray
        int8, of `shape`; or, when ``format.packed``, uint8 with two codes a byte: one run of
        ``ceil(n / 2)`` bytes per tensor, or per row a last axis of ``ceil(shape[-1] / 2)``.
    scales : ndarray of float32
        Shape (1,) per tensor, ``shape[:-1]`` per row.
    zero_points : None
        Every format of this version is symmetric.
    shape : tuple of int
        Shape of the tensor that was quantised.
    format : DynQuantFormat

    Raises
    ------
    DTypeError, ShapeMismatchError
        If an array does not fit `shape` and `format`.
    ParameterError
        If `zero_points` is not None, or `shape` or `format` are not what they should be.
    """

    __slots__ = ("__weakref__", "data", "format", "scales", "shape", "zero_points")

    data: NDArray[Any]
    scales: NDArray[np.float32]
    zero_points: None
    shape: tuple[int, ...]
    format: DynQuantFormat

    def __post_init__(self) -> None:
        if not isinstance(self.format, DynQuantFormat):
            raise ParameterError(f"format: expected a DynQuantFormat, got {self.format!r}")
        object.__setattr__(self, "shape", _as_shape(self.shape))
        if self.zero_points is not None:
            raise ParameterError(f"zero_points: expected None, got {type(self.zero_points).__name__}")
        if self.format.granularity == "per_row" and not self.shape:
            raise ShapeMismatchError("(..., k)", self.shape, "shape")
        _check_field(self.data, "data", self.format.data_shape(self.shape), self.format.data_dtype)
        _check_field(self.scales, "scales", self.format.scales_shape(self.shape), F32)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.data, self.scales, self.zero_points, self.shape, self.format)

    @property
    def element_count(self) -> int:
        """How many elements were quantised."""
        return math.prod(self.shape)

    @property
    def memory_bytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.data.nbytes + self.scales.nbytes

    @property
    def compression_ratio(self) -> float:
        """Bytes of the float32 tensor over `memory_bytes`; 0.0 when there is nothing to compress."""
        return 4 * self.element_count / self.memory_bytes if self.element_count else 0.0

    def dequantize(self, *, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The values that the codes stand for: ``code * scale`` in float32.

        Parameters
        ----------
        out : ndarray of float32, optional
            Of shape `shape`, C-contiguous, apart from this tensor's arrays. Allocated if not given.

        Returns
        -------
        ndarray of float32, shape `shape`
            `out` if it was given.

        Raises
        ------
        DTypeError, ShapeMismatchError, LayoutError
            If `out` cannot take the result; it is then as it was.
        """
        if out is None:
            out = np.empty(self.shape, F32)
        else:
            checked_out(out, self.shape, F32, self.data, self.scales)
        m, k = self.format.rows_of(self.shape)
        _core.dequantize_rows(as_run(self.data), as_run(self.scales), self.format.packed, out.reshape(m, k))
        return out

    def __repr__(self) -> str:
        fmt = self.format
        packed = ", packed" if fmt.packed else ""
        return (
            f"DynQuantTensor(shape={self.shape}, int{fmt.bits} {fmt.granularity}{packed}, "
            f"{self.memory_bytes} bytes)"
        )


# The slots' own setters: a frozen dataclass is set through object.__setattr__ otherwise, twice as slowly.
_new_object = object.__new__
_set_data, _set_scales, _set_zero_points, _set_shape, _set_format = (
    getattr(DynQuantTensor, f.name).__set__ for f in dataclasses.fields(DynQuantTensor)
)


def tensor_of_checked(
    data: NDArray[Any], scales: NDArray[np.float32], shape: tuple[int, ...], format: DynQuantFormat
) -> DynQuantTensor:
    """A tensor of arrays that are known to fit; skips the checks, which cost more than a small call."""
    tensor = _new_object(DynQuantTensor)
    _set_data(tensor, data)
    _set_scales(tensor, scales)
    _set_zero_points(tensor, None)
    _set_shape(tensor, shape)
    _set_format(tensor, format)
    return tensor


def _as_shape(shape: Any) -> tuple[int, ...]:
    try:
        lengths = tuple(operator.index(length) for length in shape)
    except TypeError as error:
        raise ParameterError(f"shape: expected a tuple of ints, got {shape!r}") from error
    if any(length < 0 for length in lengths):
        raise ParameterError(f"shape: expected lengths >= 0, got {shape!r}")
    return lengths


def _check_field(array: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        got = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise DTypeError(f"{name}: expected an ndarray of {dtype}, got {got}")
    if array.shape != shape:
        raise ShapeMismatchError(shape, array.shape, name)


def as_run(array: NDArray[Any]) -> NDArray[Any]:
    """Codes or scales in one run, as the kernels take them: int8 for packed codes, a view where it can be."""
    run = np.ascontiguousarray(array).reshape(-1)
    if not run.flags.aligned:
        run = run.copy()
    return run.view(I8) if run.dtype == U8 else run


def packed_format(format: DynQuantFormat, packed: bool) -> DynQuantFormat:
    """`format`, packed if either it or `packed` says so."""
    if packed is False or format.packed:
        return format
    return dataclasses.replace(format, packed=packed)
