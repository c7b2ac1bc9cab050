"""Results of every kernel, digested, are the same on every processor.

The digests below hold for x86-64 and for ARM alike: each machine that runs this file compares its results
with all the others'. Inputs are made of integers, by arithmetic that has one result everywhere: midpoints
between codes and the floats beside them, every exponent, both zeros, and codes at the ends of their range.

A digest changes only with the inputs here, or where a kernel is meant to give other results.
"""

import hashlib

import numpy as np
import pytest
from helpers.common import F32

from dynquant import (
    CalibStats,
    DynQuantFormat,
    DynQuantTensor,
    MaxAbs,
    Percentile,
    QuantLinear,
    SmoothQuantConfig,
    compute_smooth_factors,
    dynamic_quantize,
    dynamic_quantize_linear,
    error_metrics,
    hadamard_transform,
    int8_inner,
    quantization_mae,
    quantize,
    quantize_weights,
    smooth_activations,
    smooth_weights,
    top_k,
    w4a8_matmul,
    w4a8_matvec,
    w8a8_matmul,
    w8a8_matvec,
)

PACKED = DynQuantFormat(4, "per_row", packed=True)
LENGTHS = (1, 7, 31, 32, 33, 64, 95, 300, 1000, 4096, 5003)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 33)


def noise(n, seed, dtype=np.uint64):
    """`n` integers that look random: splitmix64, the same on every machine and in every release of NumPy."""
    z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed * 0xD1B54A32D192ED03 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).astype(dtype)


def floats(shape, seed):
    """Midpoints between codes of the scale 0.37 and their neighbors, every exponent, zeros of both signs."""
    n = int(np.prod(shape))
    kind, codes, ulps = (noise(n, seed + i) for i in range(3))
    halves = ((codes % np.uint64(254)).astype(np.int64) - 127 + 0.5).astype(F32) * F32(0.37)
    near = (halves.view(np.int32) + (ulps % np.uint64(5)).astype(np.int32) - 2).view(F32)
    wide = (codes % np.uint64(0x42000000)).astype(np.uint32)
    wide |= (ulps & np.uint64(1)).astype(np.uint32) << np.uint32(31)
    small = (codes % np.uint64(2001)).astype(F32) / F32(1000) - F32(1)
    zero = np.where(ulps & np.uint64(1), F32(-0.0), F32(0))
    x = np.choose((kind % np.uint64(8)).astype(int), [near] * 5 + [wide.view(F32), small, zero])
    x[0] = 127 * 0.37
    return x.astype(F32).reshape(shape)


def ints(shape, seed, low=-128, high=127):
    """Integers in [low, high], a quarter of them at the ends."""
    n = int(np.prod(shape))
    value = (noise(n, seed) % np.uint64(high - low + 1)).astype(np.int64) + low
    value = np.choose((noise(n, seed + 1) % np.uint64(8)).astype(int), [value] * 6 + [low, high])
    return value.astype(np.int8 if low < 0 else np.uint8).reshape(shape)


def scales(shape, seed):
    n = int(np.prod(shape))
    return ((noise(n, seed) % np.uint64(4001)).astype(F32) / F32(997) - F32(2)).reshape(shape)


def tensor_parts(q):
    return [q.data, q.scales, *([] if q.zero_points is None else [q.zero_points]), q.dequantize()]


def quantized(dtype, mode):
    for n in LENGTHS:
        for fmt in (DynQuantFormat.INT8_PER_TENSOR, DynQuantFormat.INT4_PER_TENSOR, PACKED):
            yield from tensor_parts(dynamic_quantize(floats((3, n), n).astype(dtype), fmt, mode))


def given_scales():
    """Scales that leave codes in range, and scales that clamp nearly all of them."""
    for n in LENGTHS:
        x = floats((3, n), n)
        for scale in (0.37, 0.05, 3e-39, 1e38):
            yield from tensor_parts(quantize(x, np.full(3, scale, F32)))


def groups():
    for fmt in (DynQuantFormat.int8_per_group(33), DynQuantFormat(4, "per_group", 50, True)):
        for n in LENGTHS:
            yield from tensor_parts(dynamic_quantize(floats((2, n), n), fmt))


def onnx():
    for n in LENGTHS:
        yield from dynamic_quantize_linear(floats(n, n))


def smoothing():
    for n in LENGTHS:
        x, w = floats((5, n), n), floats((2, n), n + 1)
        factors = (noise(n, n) % np.uint64(900) + np.uint64(1)).astype(F32) / F32(97)
        extreme = np.where(np.arange(n) % 5, factors, F32(2.0**-70))
        yield from (smooth_activations(x, factors), smooth_weights(x, factors))
        yield from (smooth_activations(x, extreme), smooth_weights(x, extreme))
        for mode in (MaxAbs(), Percentile(0.7)):
            # With alpha = 1 no power is taken, which C libraries compute differently.
            yield compute_smooth_factors(x, w, SmoothQuantConfig(1.0), mode=mode)


def statistics():
    for n in LENGTHS:
        x = floats((3, n), n)
        stats = CalibStats.collect([x])
        q = dynamic_quantize(x)
        errors = error_metrics(x, q)
        yield np.array([stats.min, stats.max, stats.mean, stats.std_dev, stats.p99, stats.suggested_scale])
        yield np.array([quantization_mae(x, q), errors.mae, errors.mse, errors.max_abs])


def weights():
    for n in (5, 32, 100, 300):
        for options in ({"bits": 4}, {"bits": 4, "symmetric": True}, {"bits": 8}):
            for search in (False, True):
                q = quantize_weights(floats((2, n), n), group_size=32, search=search, **options)
                yield from tensor_parts(q)


def rotations():
    for n in (1, 2, 4, 8, 16, 32, 64, 128, 1024, 4096):
        yield hadamard_transform(floats((2, n), n))


def w8a8():
    for k in (1, 3, 16, 17, 63, 64, 100, 1001, 65541):
        w, s = ints((37, k), k), scales(37, k)
        w[0], w[1] = -128, 127
        x = floats((33 if k < 2000 else 5, k), k)
        x[-1] = np.where(np.arange(k) % 2, F32(-1), F32(1))
        yield w8a8_matvec(w, s, x[0])
        yield w8a8_matvec(w[:9], s[:9], x[-1])
        for m in ROWS:
            for n in (1, 16, 37):
                yield w8a8_matmul(w[:n], s[:n], x[-m:], s[:n])
        yield QuantLinear.from_arrays({"weight_i8": w, "weight_scales": s}).to_arrays()["weight_i8"]


def w4a8():
    for k, size in ((1, 1), (51, 7), (64, 32), (96, 96), (100, 64), (640, 64), (576, 512), (18003, 9001)):
        parts = 37, -(-k // size)
        data = noise(37 * ((k + 1) // 2), k, np.uint8).reshape(37, -1)
        if k % 2:
            data[:, -1] &= 15
        fmt = DynQuantFormat(4, "per_group", size, True)
        zeros, lowest = ints(parts, k, 0, 15), scales(parts, k + 1)
        for zero_points, minimums in ((None, None), (zeros, None), (None, lowest)):
            w = DynQuantTensor(data, scales(parts, k), zero_points, (37, k), fmt, minimums)
            x = floats((33 if k < 2000 else 3, k), k)
            x[-1] = 1
            yield w4a8_matvec(w, x[0])
            for m in ROWS:
                yield w4a8_matmul(w, x[-m:], scales(37, 1))


def layers():
    """Scales for groups of 8-bit weights, zero points of activations, smoothing and rotation."""
    for k, size in ((1, None), (64, 16), (100, 32), (320, 64), (1000, 999)):
        w, x = floats((37, k), k), floats((33, k), k + 5)
        x[1], x[2] = np.abs(x[1]), -np.abs(x[2])
        for options in (
            {"group_size": size},
            {"group_size": size, "activation_symmetric": False},
            {"activation_symmetric": False},
            {"bits": 4, "group_size": size, "hadamard": True},
            {"smooth": np.full(k, 0.3, F32)},
        ):
            layer = QuantLinear.from_float(w, scales(37, k), **options)
            for m in ROWS:
                yield layer(x[:m])


def inner():
    for m, n, k in ((1, 40, 100), (5, 67, 63), (67, 38, 1025), (3, 70, 4097)):
        a, b = ints((m, k), k), ints((n, k), k + 1)
        a[0] = b[0] = -128
        yield int8_inner(a, b)
        yield int8_inner(a, b, dtype=np.int64)


def search():
    for d in (3, 64, 387):
        corpus = dynamic_quantize(floats((700, d), d))
        queries = floats((9, d), d + 1)
        for metric in ("dot", "cosine", "l2"):
            for m in (1, 9):
                found = top_k(queries[:m], corpus, 20, metric=metric)
                yield from (found.scores, found.indices)


RESULTS = {
    "quantize float32": lambda: quantized(F32, MaxAbs()),
    "quantize float16": lambda: quantized(np.float16, MaxAbs()),
    "quantize by percentile": lambda: quantized(F32, Percentile(0.9)),
    "quantize with given scales": given_scales,
    "groups": groups,
    "ONNX": onnx,
    "smoothing": smoothing,
    "statistics": statistics,
    "weights": weights,
    "rotations": rotations,
    "W8A8": w8a8,
    "W4A8": w4a8,
    "layers": layers,
    "int8_inner": inner,
    "top_k": search,
}
DIGESTS = {
    "quantize float32": "7196c339cea73d99",
    "quantize float16": "83fecf3581c313ac",
    "quantize by percentile": "eef274a8b26ca3b3",
    "quantize with given scales": "0374a3a9aa413c2a",
    "groups": "a56680c0ca1eddac",
    "ONNX": "3b13fc14f2b3a61d",
    "smoothing": "94f32685cfeabf38",
    "statistics": "22b152e0208b1ca1",
    "weights": "cdd2f06777da2f10",
    "rotations": "4f47fd5a238e16f5",
    "W8A8": "f0723d185cf642f7",
    "W4A8": "b87af96aad6dfeea",
    "layers": "38da438c3e535db2",
    "int8_inner": "17ad8111c64a2298",
    "top_k": "ac77c39ef548d1a0",
}


def digest(arrays):
    result = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        result.update(f"{array.dtype.str[1:]}{array.shape}".encode())
        result.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return result.hexdigest()[:16]


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_same_as_on_every_other_machine(name, isa):
    assert digest(RESULTS[name]()) == DIGESTS.get(name)
