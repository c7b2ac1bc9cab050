"""Calls allocate their result and bounded scratch, and free everything."""

import ctypes
import gc
import sys
import tracemalloc
import types

import leaks
import numpy as np
import pytest
from helpers.common import F32

import dynquant
from dynquant import (
    Calibrator,
    CalibStats,
    DynQuantFormat,
    DynQuantTensor,
    MaxAbs,
    Percentile,
    QuantLinear,
    compute_scale,
    compute_smooth_factors,
    dynamic_quantize,
    dynamic_quantize_int8,
    dynamic_quantize_int8_per_row,
    quantization_mae,
    quantize_weights,
    smooth_activations,
    smooth_weights,
    w4a8_matmul,
    w4a8_matvec,
    w8a8_matvec,
)

MEGABYTE = 1 << 20
SHAPE = (1024, 16_384)
PACKED = DynQuantFormat(4, "per_tensor", packed=True)
PACKED_ROWS = DynQuantFormat(4, "per_row", packed=True)
PACKED_GROUPS = DynQuantFormat(4, "per_group", 32, packed=True)
FORMATS = {
    "int8": DynQuantFormat.INT8_PER_TENSOR,
    "int8 rows": DynQuantFormat.INT8_PER_ROW,
    "int4 rows": DynQuantFormat.INT4_PER_ROW,
    "packed": PACKED,
    "packed rows": PACKED_ROWS,
    "int8 groups": DynQuantFormat.int8_per_group(128),
    "packed groups": PACKED_GROUPS,
}


@pytest.fixture(scope="module")
def x():
    """64 MB of float32."""
    return np.resize(np.random.default_rng(0).standard_normal(100_003).astype(F32), SHAPE)


def peak_over_result(function, *args, **kwargs):
    """Peak of allocated bytes, less those of the arrays in the result."""
    gc.collect()
    tracemalloc.start()
    try:
        result = function(*args, **kwargs)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    arrays = [result.data, result.scales] if isinstance(result, DynQuantTensor) else [result]
    given = {id(argument) for argument in (*args, *kwargs.values())}
    return peak - sum(a.nbytes for a in arrays if isinstance(a, np.ndarray) and id(a) not in given)


def test_the_measurement_includes_numpy_arrays():
    assert peak_over_result(np.ones, MEGABYTE, np.uint8) < 10_000
    assert peak_over_result(lambda: np.ones(MEGABYTE, np.uint8).sum()) > MEGABYTE


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("mode", [MaxAbs(), Percentile(0.99)], ids=["max abs", "percentile"])
def test_quantize(fmt, mode, x):
    assert peak_over_result(dynamic_quantize, x, fmt, mode) < MEGABYTE
    out = np.empty(fmt.data_shape(SHAPE), fmt.data_dtype)
    assert peak_over_result(dynamic_quantize, x, fmt, mode, out=out, num_threads=2) < MEGABYTE


def test_sixteen_bit_floats_are_not_copied(x):
    half = x.view(np.float16)[:, : SHAPE[1]]
    half = np.where(np.isfinite(half), half, 0)
    assert half.nbytes == x.nbytes // 2
    assert peak_over_result(dynamic_quantize_int8_per_row, half) < MEGABYTE
    assert peak_over_result(compute_scale, half, 127, Percentile(0.5)) < MEGABYTE
    q = dynamic_quantize_int8(half)
    assert peak_over_result(quantization_mae, half, q) < MEGABYTE
    assert peak_over_result(CalibStats.collect, [half]) < MEGABYTE


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
def test_dequantize_and_error(fmt, x):
    q = dynamic_quantize(x, fmt)
    assert peak_over_result(q.dequantize, out=np.empty(SHAPE, F32)) < MEGABYTE
    assert peak_over_result(q.dequantize) < MEGABYTE
    assert peak_over_result(quantization_mae, x, q) < MEGABYTE


def test_other_functions(x):
    factors = np.ones(SHAPE[1], F32)
    assert peak_over_result(compute_scale, x, 127, Percentile(0.5)) < MEGABYTE
    assert peak_over_result(CalibStats.collect, [x]) < MEGABYTE
    assert peak_over_result(compute_smooth_factors, x, x) < MEGABYTE
    assert peak_over_result(compute_smooth_factors, x, [x, x], mode=Percentile(0.9)) < MEGABYTE
    for smooth in (smooth_activations, smooth_weights):
        assert peak_over_result(smooth, x, factors) < MEGABYTE
        assert peak_over_result(smooth, x, factors, out=x) < MEGABYTE


@pytest.mark.parametrize("channels, limit", [(None, 1), (4096, 4)])
def test_calibrator(channels, limit, x):
    """24 octaves of 32 bytes for each channel, in which normally distributed values are."""
    half = np.zeros(x.size, np.float16)

    def stream():
        calibrator = Calibrator(channels)
        for batch in (x, half):
            batch = batch if channels is None else batch.reshape(-1, channels)
            calibrator.update(batch)
            calibrator.update(batch[:7])
        calibrator.stats()
        if channels:
            calibrator.channel_percentile(0.99)

    assert peak_over_result(stream) < limit * MEGABYTE
    bits = np.random.default_rng(0).integers(0, 0x7F800000, 1 << 20, dtype=np.int32).view(F32)
    assert peak_over_result(lambda: Calibrator().update(bits)) < 2 * MEGABYTE


def test_matvec():
    weight = np.ones((4096, 16_384), np.int8)
    scales, activation = np.ones(4096, F32), np.ones(16_384, F32)
    assert peak_over_result(w8a8_matvec, weight, scales, activation) < MEGABYTE


def test_weights_and_layers(x):
    """A product packs its weights in each call, a layer has them packed; both process rows in chunks."""
    strided, options = x[:, :4096], {"bits": 4, "group_size": 32}
    rows = np.ascontiguousarray(strided)
    assert peak_over_result(quantize_weights, rows, **options) < MEGABYTE
    assert peak_over_result(quantize_weights, strided, **options) < rows.nbytes + MEGABYTE
    weight, layer = quantize_weights(rows, **options), QuantLinear.from_float(rows, **options, hadamard=True)
    assert peak_over_result(w4a8_matmul, weight, rows) < weight.memory_bytes + MEGABYTE
    assert peak_over_result(w4a8_matvec, weight, rows[0]) < weight.memory_bytes + MEGABYTE
    assert peak_over_result(layer, rows) < MEGABYTE
    assert peak_over_result(layer, rows, out=np.empty((1024, 1024), F32), num_threads=2) < MEGABYTE


# Leaks


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in leaks.EVERY if name not in leaks.TOO_SLOW])
def test_no_leak(name):
    """`make leaks` makes 50 times as many calls. Tried twice: caches fill up once, a leak repeats."""
    assert not all(leaks.is_leak(*leaks.growth(leaks.EVERY[name], 2000)) for _ in range(2))


def functions_of(cls):
    """Code objects of a class's public methods and properties, and of its special methods."""
    operators = {"__call__", "__reduce__", "__repr__", "__init__", "__post_init__"}
    for name, attribute in vars(cls).items():
        if name in operators or not name.startswith("_"):
            attribute = getattr(attribute, "fget", None) or getattr(attribute, "func", attribute)
            code = getattr(getattr(attribute, "__func__", attribute), "__code__", None)
            if code is not None and code.co_filename == sys.modules[cls.__module__].__file__:
                yield code


def test_everything_public_is_called():
    called, expected = set(), set()
    for value in (getattr(dynquant, name) for name in dynquant.__all__):
        if str(getattr(value, "__module__", "")).startswith("dynquant.models"):
            continue  # which needs an extra: tests/models
        if isinstance(value, types.FunctionType):
            expected.add(value.__code__)
        elif isinstance(value, type) and not issubclass(value, dynquant.DynQuantError):
            expected.update(functions_of(value))
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code))
    try:
        for call in leaks.EVERY.values():
            call()
    finally:
        sys.setprofile(None)
    assert {code.co_name for code in expected - called} == set()
    assert len(expected) > 60


def test_a_leak_is_detected():
    kept = []
    assert leaks.is_leak(*leaks.growth(lambda: kept.append(object()), 2000))
    blocks = [libc for libc in [ctypes.CDLL(None)] if hasattr(libc, "mallinfo2")]
    assert not blocks or leaks.is_leak(*leaks.growth(lambda: blocks[0].malloc(1), 2000))
