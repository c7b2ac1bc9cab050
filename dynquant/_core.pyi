from typing import Any, final

import numpy as np
from numpy.typing import NDArray

_F32 = NDArray[np.float32]
_I8 = NDArray[np.int8]
_U8 = NDArray[np.uint8]
_I32 = NDArray[np.int32]

@final
class FloatRows:
    m: int
    k: int
    def __new__(cls, x: NDArray[Any], kind: int, m: int, k: int) -> FloatRows: ...

def set_table(table: object) -> None: ...
def isas_built() -> tuple[str, ...]: ...
def isas_supported() -> tuple[str, ...]: ...
def percentile_rank(p: float, n: int) -> int: ...
def scale_rows(
    x: FloatRows,
    scales: _F32,
    clip: float,
    rank: int,
    last_rank: int,
    group: int,
    first: int = ...,
    end: int = ...,
) -> bool: ...
def code_rows(
    x: FloatRows,
    scales: _F32,
    zero_points: _U8 | None,
    clip: int,
    packed: bool,
    group: int,
    codes: _I8,
    first: int = ...,
    end: int = ...,
) -> bool: ...
def quantize_rows(
    x: FloatRows,
    scales: _F32,
    clip: int,
    rank: int,
    last_rank: int,
    packed: bool,
    group: int,
    codes: _I8,
    first: int = ...,
    end: int = ...,
) -> bool: ...
def dequantize_rows(
    codes: _I8, scales: _F32, zero_points: _U8 | None, packed: bool, group: int, out: _F32
) -> None: ...
def sum_abs_error(
    x: FloatRows, codes: _I8, scales: _F32, zero_points: _U8 | None, packed: bool, group: int
) -> float: ...
def error_sums(
    x: FloatRows,
    codes: _I8,
    scales: _F32,
    zero_points: _U8 | None,
    packed: bool,
    group: int,
    per_row: bool,
    sums: NDArray[np.float64],
) -> None: ...
def error_sums_of(x: FloatRows, values: FloatRows, per_row: bool, sums: NDArray[np.float64]) -> None: ...
def fit_rows(
    x: FloatRows,
    scales: _F32,
    zero_points: _U8 | None,
    levels: int,
    search: bool,
    group: int,
    first: int = ...,
    end: int = ...,
) -> bool: ...
def min_max(x: FloatRows) -> tuple[float, float]: ...
def quantize_u8(x: FloatRows, scale: float, zero_point: int, codes: NDArray[np.uint8]) -> None: ...
def hadamard(x: _F32, block: int) -> None: ...
def column_amax(x: FloatRows, amax_bits: _I32) -> None: ...
def smooth_factors(
    act_amax: _F32, weight_amax: _F32, alpha: float, epsilon: float, factors: _F32
) -> None: ...
def scale_columns(x: FloatRows, factors: _F32, divide: bool, out: _F32) -> None: ...
def all_finite(x: FloatRows) -> bool: ...
def w8a8_matvec(
    weight: _I8, weight_scales: _F32, activation: _I8, activation_scale: float, out: _F32
) -> None: ...

@final
class Activations:
    def __new__(cls, layer: PackedLinear, m: int) -> Activations: ...

@final
class PackedLinear:
    panel_count: int
    weight_bytes: int
    def __new__(
        cls, n: int, k: int, group: int, bias: _F32 | None, factors: _F32 | None, block: int
    ) -> PackedLinear: ...
    def activation_bytes(self) -> int: ...
    def pack_int8(self, weight: _I8, scales: _F32) -> None: ...
    def unpack_int8(self, weight: _I8, scales: _F32) -> None: ...
    def pack_int4(self, codes: _U8, scales: _F32, zero_points: _U8 | None) -> None: ...
    def unpack_int4(self, codes: _U8, scales: _F32, zero_points: _U8 | None) -> None: ...
    def quantize(self, x: FloatRows, a: Activations) -> bool: ...
    def multiply(self, a: Activations, out: _F32, first: int = ..., end: int = ...) -> bool: ...

def moments(x: FloatRows) -> tuple[int, float, float, float, float]: ...
def ranked_magnitude(batches: list[FloatRows], rank: int) -> float: ...
