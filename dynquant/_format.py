"""Scale modes, and the formats of codes and scales."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from . import _core
from ._validate import I8, U8, as_count, as_flag, as_number, is_integer
from .errors import InvalidPercentileError, ParameterError, shown

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class MaxAbs:
    """Scale by the largest magnitude: ``max|x| / clip``, so that nothing saturates."""


@dataclass(frozen=True)
class Percentile:
    """Scale by a ranked magnitude. `p` is a fraction, not a percentage: ``Percentile(0.999)`` is the 99.9th.

    A share ``1 - p`` of the magnitudes is larger, and saturates.

    Parameters
    ----------
    p : float
        0 < p <= 1. Of ``n`` magnitudes in ascending order the one at index ``max(ceil(p * n) - 1, 0)`` is
        taken: the nearest rank, as ``numpy.quantile(abs(x), p, method="inverted_cdf")`` takes it. Up to 2**24
        magnitudes ``p * n`` is a product of float32.

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

GRANULARITIES: tuple[Granularity, ...] = ("per_tensor", "per_row", "per_group")


@dataclass(frozen=True)
class DynQuantFormat:
    """How codes and scales are laid out.

    The usual formats have names: ``INT8_PER_TENSOR``, ``INT8_PER_ROW``, ``int8_per_group(size)``,
    ``INT4_PER_TENSOR``, ``INT4_PER_ROW``, ``int4_per_group(size)``, and the last three with ``_PACKED`` or
    ``_packed`` added.

    Parameters
    ----------
    bits : {8, 4}
        Codes lie in [-127, 127] or [-7, 7].
    granularity : {"per_tensor", "per_row", "per_group"}
        What shares one scale: the whole tensor, a row along the last axis, or every `group_size` elements
        of a row.
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
    INT4_PER_TENSOR_PACKED: ClassVar[DynQuantFormat]
    INT4_PER_ROW_PACKED: ClassVar[DynQuantFormat]

    def __post_init__(self) -> None:
        if not is_integer(self.bits) or self.bits not in (4, 8):
            raise ParameterError(f"bits: expected 4 or 8, got {shown(self.bits)}")
        object.__setattr__(self, "bits", int(self.bits))
        object.__setattr__(self, "packed", as_flag(self.packed, "packed"))
        named = type(self.granularity) is str
        if not named or self.granularity not in GRANULARITIES:
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

    @classmethod
    def int4_per_group_packed(cls, group_size: int) -> DynQuantFormat:
        """The same with two codes to a byte: the format of `quantize_weights` with ``bits=4``."""
        return cls(4, "per_group", group_size, packed=True)

    @cached_property
    def clip(self) -> int:
        """The largest code: 127 or 7."""
        return 127 if self.bits == 8 else 7

    def rows_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(m, k): a tensor of `shape` is taken as m rows of k elements."""
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
DynQuantFormat.INT4_PER_TENSOR_PACKED = DynQuantFormat(4, "per_tensor", packed=True)
DynQuantFormat.INT4_PER_ROW_PACKED = DynQuantFormat(4, "per_row", packed=True)


def packed_format(format: DynQuantFormat, packed: bool) -> DynQuantFormat:
    """`format`, packed if either it or `packed` says so."""
    if packed is False or not as_flag(packed, "packed") or format.packed:
        return format
    return dataclasses.replace(format, packed=True)
