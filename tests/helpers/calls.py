"""One call of everything public that computes, for tests that repeat it.

`CALLS` are functions without arguments. `INTO` are pairs: a function of ``out``, and the array to pass.
`UPDATES` are functions that update a Calibrator(K).
"""

import os
import pickle
import shutil
import tempfile

import numpy as np

from dynquant import (
    Calibrator,
    CalibStats,
    DynQuantFormat,
    DynQuantTensor,
    EmbeddingIndex,
    MaxAbs,
    Percentile,
    QuantLinear,
    SilentChannelWarning,
    SmoothQuantConfig,
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
    int8_inner,
    quantization_mae,
    quantize,
    quantize_array,
    quantize_weights,
    recall_report,
    search_alpha,
    simd_info,
    smooth_activations,
    smooth_weights,
    top_k,
    w4a8_matmul,
    w4a8_matvec,
    w8a8_matmul,
    w8a8_matvec,
)
from helpers.common import F32, calibrator_of

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
INT8 = quantize_weights(FLOAT_WEIGHT)
INT4 = quantize_weights(FLOAT_WEIGHT, bits=4, group_size=3)
INT4_ROWS = quantize_weights(FLOAT_WEIGHT, bits=4, symmetric=True)
LAYER = QuantLinear.from_float(FLOAT_WEIGHT, BIAS)
LAYER4 = QuantLinear.from_float(FLOAT_WEIGHT, BIAS, bits=4, group_size=3, smooth=FACTORS, hadamard=True)
CALIBRATOR = calibrator_of([A], K)
SAMPLED = calibrator_of([A], K, 5)
FOLDER = tempfile.mkdtemp(prefix="dynquant")
SAVED = os.path.join(FOLDER, "calibrator.npz")
# More rows than one chunk.
MANY = np.random.default_rng(2).standard_normal((20, 30_000)).astype(F32)
WIDE = QuantLinear.from_float(MANY[:2])


def new_layer(**options):
    """A small layer with a bias, so that the slow options are quick too."""
    return QuantLinear.from_float(FLOAT_WEIGHT[:4, :12], BIAS[:4], smooth=FACTORS[:12], **options)


def new_index():
    index = EmbeddingIndex(K, bits=4, group_size=3)
    index.add(A)
    index.remove([0])
    return index.search(A, 2, rescore=A, allowed=[1, 2]), index.search(A, 2)


def saved_index():
    index = EmbeddingIndex(K, metric="cosine", bits=4, group_size=3, hadamard=True, center="mean")
    index.add(A)
    index.save(os.path.join(FOLDER, "index"))
    opened = EmbeddingIndex.open(os.path.join(FOLDER, "index"))
    return opened.memory_bytes, opened.dim, opened.ids, repr(opened)


def new_folder():
    shutil.rmtree(os.path.join(FOLDER, "array"), ignore_errors=True)
    return quantize_array(A, os.path.join(FOLDER, "array"), bits=4, rows_per_block=4)


CALLS = {
    "compute_scale": lambda: compute_scale(A, 127),
    "modes": lambda: (MaxAbs(), Percentile(0.5), SmoothQuantConfig(0.4), Percentile(0.5).rank(9)),
    "formats": lambda: (
        DynQuantFormat.int8_per_group(3),
        DynQuantFormat.int4_per_group(3),
        DynQuantFormat.int4_per_group_packed(3),
        PACKED.clip,
    ),
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
    "a layer's fields": lambda: (LAYER.bits, LAYER.group_size, LAYER.bias, LAYER.smooth, LAYER.signs),
    "a layer's options": lambda: (LAYER.hadamard, LAYER.activation_bits, LAYER.activation_symmetric),
    "a layer with zero points": lambda: QuantLinear.from_float(FLOAT_WEIGHT, activation_symmetric=False)(A),
    "a layer in float32": lambda: QuantLinear.from_float(FLOAT_WEIGHT, activation_bits=None)(A),
    "a layer, int8 groups": lambda: QuantLinear.from_float(FLOAT_WEIGHT, group_size=3)(A),
    "a layer's inputs": lambda: LAYER(LAYER.quantize_input(A)),
    "top_k": lambda: top_k(A, Q_ROWS, 2, rescore=A),
    "an index": new_index,
    "an index in a folder": saved_index,
    "a report of recall": lambda: recall_report(A, A[:2], 1, recipes={"int8": {}}).to_html(os.devnull),
    "an array to a folder": new_folder,
    "scales given": lambda: quantize(A, Q_ROWS.scales),
    "scales given, zero points": lambda: quantize(A, 0.5, PACKED_GROUPS, zero_points=3),
    "codes and scales out": lambda: dynamic_quantize(
        A, out=(np.empty(A.shape, np.int8), np.empty(A.shape[:-1], "f"))
    ),
    "rows of a tensor": lambda: (Q_ROWS[0], Q_ROWS[[1, 0]], len(Q_ROWS)),
    "groups, percentile": lambda: dynamic_quantize(HALF, DynQuantFormat.int8_per_group(9), Percentile(0.5)),
    "ONNX": lambda: dynamic_quantize_linear(A),
    "dequantize": Q.dequantize,
    "dequantize, zero points": INT4.dequantize,
    "tensor": lambda: DynQuantTensor(Q.data, Q.scales, None, Q.shape, Q.format),
    "a tensor's sizes": lambda: (INT4.memory_bytes, INT4.compression_ratio, INT4.element_count, repr(INT4)),
    "a tensor's arrays": lambda: DynQuantTensor.from_arrays(INT4.to_arrays()),
    "a tensor's pickle": lambda: pickle.loads(pickle.dumps(INT4)),
    "mae": lambda: quantization_mae(A, Q),
    "metrics": lambda: error_metrics(A, Q_ROWS, per_row=True),
    "metrics of arrays": lambda: error_metrics(A, STRIDED),
    "smooth factors": lambda: compute_smooth_factors(A, A),
    "smooth factors, percentile": lambda: compute_smooth_factors(A, [A, A], mode=Percentile(0.5)),
    "fold_smooth_factors": lambda: fold_smooth_factors(FACTORS, FACTORS, FACTORS),
    "smooth factors, magnitudes": lambda: compute_smooth_factors(FACTORS, A, SmoothQuantConfig(0.4)),
    "smooth_activations": lambda: smooth_activations(HALF, FACTORS),
    "smooth_weights": lambda: smooth_weights(A, FACTORS),
    "search_alpha": lambda: repr(search_alpha(A, FLOAT_WEIGHT, alphas=[0.5])),
    "a warning": lambda: str(SilentChannelWarning((1, 2), K)),
    "search_alpha, 4 bits": lambda: search_alpha(
        A,
        [FLOAT_WEIGHT[:4], FLOAT_WEIGHT[:2]],
        alphas=[0.5],
        mode=Percentile(0.9),
        relative=True,
        bits=4,
        group_size=32,
        symmetric=True,
        hadamard=True,
    ),
    "hadamard": lambda: hadamard_transform(A),
    "hadamard, blocks": lambda: hadamard_transform(HALF, block_size=2),
    "weights": lambda: quantize_weights(FLOAT_WEIGHT),
    "weights, threads": lambda: quantize_weights(FLOAT_WEIGHT, bits=4, symmetric=True, num_threads=2),
    "weights, 4 bits": lambda: quantize_weights(FLOAT_WEIGHT[:4], bits=4, group_size=9, search=True),
    "weights, calibrated": lambda: quantize_weights(FLOAT_WEIGHT[:, :9], bits=4, calibration=A[:, :9]),
    "w8a8 matvec": lambda: w8a8_matvec(WEIGHT, SCALES, FACTORS),
    "w8a8 matmul": lambda: w8a8_matmul(WEIGHT, SCALES, A, BIAS),
    "w8a8 matmul, threads": lambda: w8a8_matmul(WEIGHT, SCALES, HALF, num_threads=2),
    "int8_inner": lambda: int8_inner(WEIGHT, Q.data),
    "int8_inner, threads": lambda: int8_inner(WEIGHT[:2], Q.data, dtype=np.int64, num_threads=2),
    "w4a8 matvec": lambda: w4a8_matvec(INT4, FACTORS),
    "w4a8 matvec, rows": lambda: w4a8_matvec(INT4_ROWS, FACTORS),
    "w4a8 matmul": lambda: w4a8_matmul(INT4, A, BIAS, num_threads=2),
    "layer": lambda: LAYER(A),
    "layer, threads": lambda: WIDE(MANY[:1], num_threads=2),
    "layer, 4 bits": lambda: LAYER4(HALF),
    "a new layer": lambda: QuantLinear.from_float(FLOAT_WEIGHT, BIAS, smooth=FACTORS, hadamard=True),
    "a new layer, 4 bits": lambda: QuantLinear.from_float(FLOAT_WEIGHT, bits=4, group_size=3),
    "a new layer, searched": lambda: new_layer(bits=4, group_size=9, symmetric=True, search=True),
    "a new layer, calibrated": lambda: new_layer(bits=4, hadamard=True, calibration=iter([A[:, :12]])),
    "a new layer, 8 bits calibrated": lambda: new_layer(calibration=[HALF[:, :12], A[:, :12]]),
    "a new layer of weights": lambda: (QuantLinear(INT8, BIAS), QuantLinear(INT4_ROWS, smooth=FACTORS)),
    "a layer's sizes": lambda: (LAYER.in_features, LAYER.out_features, LAYER.memory_bytes, repr(LAYER)),
    "a layer's arrays": lambda: QuantLinear.from_arrays(LAYER4.to_arrays()),
    "a layer's pickle": lambda: pickle.loads(pickle.dumps(LAYER)),
    "a layer's weights": LAYER4.weight_dequantized,
    "a layer's weights, 8 bits": LAYER.weight_dequantized,
    # Many batches, so that a leak per batch adds up.
    "collect": lambda: CalibStats.collect([A] * 20),
    "calibrator": lambda: calibrator_of([A, HALF], K),
    "calibrator, merged": lambda: Calibrator(K).merge(CALIBRATOR),
    "calibrator, rows": lambda: (
        SAMPLED.sample(),
        compute_smooth_factors(SAMPLED, A, mode=Percentile(0.5)),
        search_alpha(SAMPLED, FLOAT_WEIGHT, alphas=[0.5]),
        quantize_weights(FLOAT_WEIGHT[:, :9], bits=4, calibration=calibrator_of([A[:, :9]], 9, 3)),
    ),
    "smooth factors, batches": lambda: compute_smooth_factors(iter([A, HALF]), A, mode=Percentile(0.5)),
    "search_alpha, batches": lambda: search_alpha(iter([A, HALF]), FLOAT_WEIGHT, alphas=[0.5]),
    "calibrator's statistics": lambda: (
        CALIBRATOR.stats(),
        CALIBRATOR.percentile(0.5),
        CALIBRATOR.histogram(),
    ),
    "calibrator's channels": lambda: (CALIBRATOR.channel_amax(), CALIBRATOR.channel_percentile(0.5)),
    "a calibrator's sizes": lambda: (CALIBRATOR.channels, CALIBRATOR.count, repr(CALIBRATOR), SAMPLED.rows),
    "a calibrator's pickle": lambda: pickle.loads(pickle.dumps(CALIBRATOR)),
    "calibrator's file": lambda: (CALIBRATOR.save(SAVED), Calibrator.load(SAVED)),
    "layouts": lambda: [
        DynQuantTensor.from_layout("compressed-tensors", weight.to_layout("compressed-tensors"))
        for weight in (INT8, INT4_ROWS)
    ],
    "simd_info": simd_info,
    "get_include": get_include,
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
    "smooth_activations, one pass": (
        lambda out: smooth_activations(A, FACTORS, out=out, check_finite=False),
        np.empty(A.shape, F32),
    ),
    "hadamard": (lambda out: hadamard_transform(A, out=out), np.empty(A.shape, F32)),
    "w8a8 matvec": (lambda out: w8a8_matvec(WEIGHT, SCALES, FACTORS, out=out), np.empty(N, F32)),
    "int8_inner": (lambda out: int8_inner(Q.data, WEIGHT, out=out), np.empty((M, N), np.int32)),
    "w8a8 matmul": (lambda out: w8a8_matmul(WEIGHT, SCALES, A, BIAS, out=out), np.empty((M, N), F32)),
    "w4a8 matvec": (lambda out: w4a8_matvec(INT4, FACTORS, out=out), np.empty(N, F32)),
    "w4a8 matmul": (lambda out: w4a8_matmul(INT4, A, out=out), np.empty((M, N), F32)),
    "w4a8 matmul, rows": (lambda out: w4a8_matmul(INT4_ROWS, HALF, out=out), np.empty((M, N), F32)),
    "layer": (lambda out: LAYER(A, out=out), np.empty((M, N), F32)),
    "layer, leading axes": (lambda out: LAYER4(A[None], out=out), np.empty((1, M, N), F32)),
    "layer, many rows": (lambda out: WIDE(MANY, out=out), np.empty((20, 2), F32)),
}

UPDATES = {
    "update": lambda calibrator: calibrator.update(A * 4),
    "update, float16": lambda calibrator: calibrator.update(HALF),
    "merge": lambda calibrator: calibrator.merge(CALIBRATOR),
}
