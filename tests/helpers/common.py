"""Shared by the test files: instruction sets, bitwise comparison, and inputs worth trying."""

import contextlib
import pathlib

import numpy as np

from dynquant import Calibrator, DynQuantFormat, MaxAbs, Percentile, _isa, simd_info

F32 = np.float32

_INFO = simd_info()
# Built and supported by this CPU, weakest first.
ISAS = [isa for isa in _INFO["built"] if isa in _INFO["supported"]]

BLOCK = pathlib.Path(__file__).parents[2] / "bench" / "data" / "minilm_ffn.npz"


FORMATS = {
    "int8 per tensor": DynQuantFormat.INT8_PER_TENSOR,
    "int8 per row": DynQuantFormat.INT8_PER_ROW,
    "int4 per tensor": DynQuantFormat.INT4_PER_TENSOR,
    "int4 per row": DynQuantFormat.INT4_PER_ROW,
    "packed per tensor": DynQuantFormat(4, "per_tensor", packed=True),
    "packed per row": DynQuantFormat(4, "per_row", packed=True),
}


class Arrayish:
    """An object that offers its data through ``__array__`` alone."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x


class Interface:
    """An object that offers its memory through ``__array_interface__`` alone."""

    def __init__(self, x):
        self.x = x
        self.__array_interface__ = x.__array_interface__


class Struct:
    """An object that offers its memory through ``__array_struct__`` alone."""

    def __init__(self, x):
        self.x = x
        self.__array_struct__ = x.__array_struct__


def mode_of(p):
    """The scale mode of percentile `p`; the largest magnitude where `p` is None."""
    return MaxAbs() if p is None else Percentile(p)


def real_layer(name):
    """Weight, calibration tokens and evaluation tokens of a layer of the bundled block, "up" or "down"."""
    with np.load(BLOCK) as file:
        return [file[f"{name}_{part}"].astype(F32) for part in ("weight", "calib", "eval")]


@contextlib.contextmanager
def using(isa):
    """Within the block, kernels of the instruction set `isa` run."""
    before = simd_info()["selected"]
    _isa.select(isa)
    try:
        yield
    finally:
        _isa.select(before)


def assert_same_bits(actual, expected, message=""):
    """Equal in dtype, shape and every bit: 0.0 is not -0.0."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), message
    if actual.tobytes() != expected.tobytes():
        indices = np.argwhere(actual.view(f"u{actual.itemsize}") != expected.view(f"u{actual.itemsize}"))
        first = tuple(indices[0])
        found = f"{actual[first]!r}, expected {expected[first]!r}"
        raise AssertionError(f"{message} {len(indices)} differ, first at {first}: {found}")


def assert_tensor_holds(tensor, data, scales, values, message=""):
    """The tensor has these codes, scales and dequantized values, bit for bit."""
    assert_same_bits(tensor.scales, scales, message)
    assert_same_bits(tensor.data, data, message)
    assert_same_bits(tensor.dequantize(), values, message)


def memory(n_bytes, offset):
    """`n_bytes` of zeros that start `offset` bytes past a 64-byte boundary."""
    raw = np.zeros(n_bytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    return raw[start : start + n_bytes]


def array_at(offset, values):
    """A copy of `values` that starts `offset` bytes past a 64-byte boundary."""
    values = np.ascontiguousarray(values)
    copy = memory(values.nbytes, offset).view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def distributions(n, rng):
    """Named float32 arrays of length `n`: distributions of activations, and corner cases."""
    normal = rng.standard_normal(n).astype(F32)
    bits = rng.integers(0, 0x7F800000, n, dtype=np.int32) | (rng.integers(0, 2, n, dtype=np.int32) << 31)
    return {
        "normal": normal,
        "equal": np.full(n, -0.7, F32),
        "two values": np.where(rng.random(n) < 0.98, F32(0.25), F32(-9)),
        "sorted": np.sort(normal),
        "reversed": np.sort(normal)[::-1].copy(),
        "mostly zero": np.where(rng.random(n) < 0.01, normal, F32(0)),
        # Adjacent floats: they differ only in the lowest bits of the mantissa.
        "neighbors": (0x3F800000 + rng.integers(0, 1000, n)).astype(np.int32).view(F32),
        "subnormal": rng.integers(0, 5000, n).astype(np.int32).view(F32),
        "outliers": np.where(rng.random(n) < 0.001, normal * F32(1e4), normal),
        "every exponent": bits.view(F32),
    }


def channel_data(rng, rows, channels):
    """float32 (rows, channels): all magnitudes, dead channels, outliers up to 2**20 times the rest."""
    x = rng.standard_normal((rows, channels)) * 2.0 ** rng.integers(-120, 100, channels)
    x[rng.integers(0, rows, channels), np.arange(channels)] *= 2.0 ** rng.integers(0, 21, channels)
    x[:, rng.integers(0, channels, 1 + channels // 16)] = 0
    x[:, channels // 2] = rng.integers(0, 2**23, rows) * 2.0**-149
    return x.astype(F32)


def calibrator_of(batches, channels=None, rows=None):
    calibrator = Calibrator(channels, rows=rows)
    for batch in batches:
        calibrator.update(batch)
    return calibrator


def exact_state(calibrator):
    """The state of a calibrator without its sums, which alone depend on the order of updates."""
    count, channels, rows, extremes, _sums, *counts = calibrator.__reduce__()[1]
    return count, channels, rows, extremes.tobytes(), *(a.tobytes() for a in counts)


def whole_state(calibrator):
    """The state of a calibrator, sums included."""
    return exact_state(calibrator), calibrator.__reduce__()[1][4].tobytes()
