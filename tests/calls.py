"""One call of everything public that computes, for tests that make it again and again.

`CALLS` are functions without arguments. `INTO` are pairs: a function of ``out``, and the array to give it.
"""

import os
import tempfile

import numpy as np
from common import F32, calibrator_of

from dynquant import (
    Calibrator,
    CalibStats,
    DynQuantFormat,
    DynQuantTensor,
    Percentile,
    QuantLinear,
    compute_scale,
    compute_smooth_factors,
    dynamic_quantize,
    dynamic_quantize_int4,
    dynamic_quantize_int8,
    dynamic_quantize_int8_per_row,
    dynamic_quantize_linear,
    error_metrics,
    fold_smooth_factors,
    get_include,
    hadamard_transform,
    quantization_mae,
    quantize_weights,
    search_alpha,
    simd_info,
    smooth_activations,
    smooth_weights,
    w4a8_matmul,
    w4a8_matvec,
    w8a8_matmul,
    w8a8_matvec,
)

PACKED = DynQuantFormat(4, "per_tensor", packed=True)
PACKED_ROWS = DynQuantFormat(4, "per_row", packed=True)
PACKED_GROUPS = DynQuantFormat(4, "per_group", 3, True)

M, N, K = 9, 33, 140
A = np.random.default_rng(0).standard_normal((M, K)).astype(F32)
HALF = A.astype(np.float16)
STRIDED = np.repeat(A, 2, axis=1)[:, ::2]
FACTORS = np.arange(1, K + 1, dtype=F32)
BIAS = np.ones(N, F32)
SCALES = np.linspace(1, 2, N, dtype=F32)
WEIGHT = np.resize(np.arange(-128, 128), (N, K)).astype(np.int8)
FLOAT_WEIGHT = np.random.default_rng(1).standard_normal((N, K)).astype(F32)
Q = dynamic_quantize_int8(A)
Q_ROWS = dynamic_quantize(A, PACKED_ROWS)
INT4 = quantize_weights(FLOAT_WEIGHT, bits=4, group_size=3)
LAYER = QuantLinear.from_float(FLOAT_WEIGHT, BIAS)
LAYER4 = QuantLinear.from_float(FLOAT_WEIGHT, BIAS, bits=4, group_size=3, smooth=FACTORS, hadamard=True)
CALIBRATOR = calibrator_of([A], K)
SAVED = os.path.join(tempfile.mkdtemp(prefix="dynquant"), "calibrator.npz")
# More rows than are quantised at once.
MANY = np.random.default_rng(2).standard_normal((20, 30_000)).astype(F32)
WIDE = QuantLinear.from_float(MANY[:2])


def quantize_nan():
    try:
        dynamic_quantize_int8([float("nan")])
    except ValueError:
        return
    raise AssertionError("NaN was taken")


CALLS = {
    "compute_scale": lambda: compute_scale(A, 127),
    "compute_scale, percentile": lambda: compute_scale(A, 127, Percentile(0.5)),
    "int8": lambda: dynamic_quantize_int8(A),
    "int8, float16": lambda: dynamic_quantize_int8(HALF),
    "int8, strided": lambda: dynamic_quantize_int8(STRIDED),
    "int8, a list": lambda: dynamic_quantize_int8([1.0, 2.0]),
    "int8 rows": lambda: dynamic_quantize_int8_per_row(A),
    "int8 rows, threads": lambda: dynamic_quantize_int8_per_row(A, num_threads=2),
    "int4": lambda: dynamic_quantize_int4(A, packed=True),
    "packed": lambda: dynamic_quantize(A, PACKED_ROWS, Percentile(0.5)),
    "groups": lambda: dynamic_quantize(A, PACKED_GROUPS),
    "ONNX": lambda: dynamic_quantize_linear(A),
    "dequantize": Q.dequantize,
    "tensor": lambda: DynQuantTensor(Q.data, Q.scales, None, Q.shape, Q.format),
    "mae": lambda: quantization_mae(A, Q),
    "metrics": lambda: error_metrics(A, Q_ROWS, per_row=True),
    "metrics of arrays": lambda: error_metrics(A, STRIDED),
    "smooth factors": lambda: compute_smooth_factors(A, A),
    "smooth factors, percentile": lambda: compute_smooth_factors(A, [A, A], mode=Percentile(0.5)),
    "fold_smooth_factors": lambda: fold_smooth_factors(FACTORS, FACTORS, FACTORS),
    "smooth_weights": lambda: smooth_weights(A, FACTORS),
    "search_alpha": lambda: search_alpha(A, FLOAT_WEIGHT, alphas=[0.5]),
    "hadamard": lambda: hadamard_transform(A),
    "weights": lambda: quantize_weights(FLOAT_WEIGHT),
    "weights, 4 bits": lambda: quantize_weights(FLOAT_WEIGHT[:4], bits=4, group_size=9, search=True),
    "weights, calibrated": lambda: quantize_weights(FLOAT_WEIGHT[:, :9], bits=4, calibration=A[:, :9]),
    "w8a8 matvec": lambda: w8a8_matvec(WEIGHT, SCALES, FACTORS),
    "w8a8 matmul": lambda: w8a8_matmul(WEIGHT, SCALES, A, BIAS),
    "w4a8 matvec": lambda: w4a8_matvec(INT4, FACTORS),
    "w4a8 matmul": lambda: w4a8_matmul(INT4, A, BIAS, num_threads=2),
    "layer": lambda: LAYER(A),
    "layer, threads": lambda: WIDE(MANY[:1], num_threads=2),
    "layer, 4 bits": lambda: LAYER4(HALF),
    "a new layer": lambda: QuantLinear.from_float(FLOAT_WEIGHT, BIAS, smooth=FACTORS, hadamard=True),
    "a new layer, 4 bits": lambda: QuantLinear.from_float(FLOAT_WEIGHT, bits=4, group_size=3),
    "a layer's arrays": lambda: QuantLinear.from_arrays(LAYER4.to_arrays()),
    "a layer's weights": LAYER4.weight_dequantized,
    # Many batches, so that what is kept for each of them adds up.
    "collect": lambda: CalibStats.collect([A] * 20),
    "calibrator": lambda: calibrator_of([A, HALF], K),
    "calibrator, merged": lambda: Calibrator(K).merge(CALIBRATOR),
    "calibrator's statistics": lambda: (
        CALIBRATOR.stats(),
        CALIBRATOR.percentile(0.5),
        CALIBRATOR.histogram(),
    ),
    "calibrator's channels": lambda: (CALIBRATOR.channel_amax(), CALIBRATOR.channel_percentile(0.5)),
    "calibrator's file": lambda: (CALIBRATOR.save(SAVED), Calibrator.load(SAVED)),
    "simd_info": simd_info,
    "get_include": get_include,
    "an error": quantize_nan,
}

INTO = {
    "int8": (lambda out: dynamic_quantize_int8(A, out=out), np.empty(A.shape, np.int8)),
    "int8 rows": (lambda out: dynamic_quantize_int8_per_row(A, out=out), np.empty(A.shape, np.int8)),
    "packed": (lambda out: dynamic_quantize(A, PACKED_ROWS, out=out), np.empty((M, K // 2), np.uint8)),
    "groups": (lambda out: dynamic_quantize(A, PACKED_GROUPS, out=out), np.empty((M, K // 2), np.uint8)),
    "dequantize": (lambda out: Q.dequantize(out=out), np.empty(A.shape, F32)),
    "dequantize rows": (lambda out: Q_ROWS.dequantize(out=out), np.empty(A.shape, F32)),
    "smooth_activations": (lambda out: smooth_activations(A, FACTORS, out=out), np.empty(A.shape, F32)),
    "smooth_weights": (lambda out: smooth_weights(HALF, FACTORS, out=out), np.empty(A.shape, F32)),
    "hadamard": (lambda out: hadamard_transform(A, out=out), np.empty(A.shape, F32)),
    "w8a8 matvec": (lambda out: w8a8_matvec(WEIGHT, SCALES, FACTORS, out=out), np.empty(N, F32)),
    "w8a8 matmul": (lambda out: w8a8_matmul(WEIGHT, SCALES, A, BIAS, out=out), np.empty((M, N), F32)),
    "w4a8 matvec": (lambda out: w4a8_matvec(INT4, FACTORS, out=out), np.empty(N, F32)),
    "w4a8 matmul": (lambda out: w4a8_matmul(INT4, A, out=out), np.empty((M, N), F32)),
    "layer": (lambda out: LAYER(A, out=out), np.empty((M, N), F32)),
    "layer, leading axes": (lambda out: LAYER4(A[None], out=out), np.empty((1, M, N), F32)),
    "layer, many rows": (lambda out: WIDE(MANY, out=out), np.empty((20, 2), F32)),
}
