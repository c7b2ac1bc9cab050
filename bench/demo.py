"""What quantizing costs on a real feed-forward block, and what it saves: `python -m bench demo`.

For both linear layers of the block: bytes of the quantized layer, the error of its output, and its speed
beside NumPy's float32 product. Where the processor has more than AVX2, the speed is given twice: with all
that it has, and with everybody kept from AVX-512, as on most processors. `--full` adds the formats of
activations and the choices of smoothing factors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import dynquant as dq

from . import machine, no_avx512
from .sampling import Contender, median_ratio, sample_in_turns
from .text import columns

DATA = Path(__file__).parent / "data" / "minilm_ffn.npz"
ROUNDS = 15
LAYERS = ("up", "down")
WITHOUT_AVX512 = ("baseline", "avx2")

Layers = dict[str, dq.QuantLinear]
Speeds = dict[str, tuple[float, float]]


def main(full: bool) -> int:
    isa = dq.simd_info()["selected"]
    others = {} if isa in WITHOUT_AVX512 else {"avx2": _speeds_without_avx512()}
    print(f"dynquant {dq.__version__} on {machine.describe()['cpu']}: {isa} kernels, one thread")
    print(
        "speed: time of NumPy's float32 product / time of the layer"
        + " (avx2: both without AVX-512)" * bool(others)
    )
    for name in LAYERS:
        weight, calibration, x = load(name)
        quantized = layers(weight, calibration)
        readings = {isa: speeds(quantized, weight, x)}
        readings |= {other: found[name] for other, found in others.items()}
        print("\n" + layer_table(name, quantized, weight, x, readings))
        if full:
            print("\n" + activation_table(weight, calibration, x))
            print("\n" + smoothing_table(weight, calibration, x))
    return 0


def load(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight, calibration tokens and evaluation tokens of a layer."""
    with np.load(DATA) as block:
        weight, calibration, x = (
            block[f"{name}_{part}"].astype(np.float32) for part in ("weight", "calib", "eval")
        )
    return weight, calibration, x


def print_speeds() -> int:
    """What another process asks for: the speeds of both layers, as JSON."""
    found = {}
    for name in LAYERS:
        weight, calibration, x = load(name)
        found[name] = speeds(layers(weight, calibration), weight, x)
    print(json.dumps(found))
    return 0


def _speeds_without_avx512() -> dict[str, Speeds]:
    # Nobody can be kept from AVX-512 once it is imported.
    environment = {**os.environ, **no_avx512.VARIABLES, "DYNQUANT_ISA": "avx2"}
    command = [sys.executable, "-m", "bench", "demo", "--speeds"]
    root = Path(__file__).parent.parent
    return json.loads(
        subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True).stdout
    )


# ----------------------------------------------------------------------------------------------------------
# Layers


def layers(weight: np.ndarray, calibration: np.ndarray) -> Layers:
    """Name -> the layer with int8 or 4-bit weights, as it is or prepared so that quantizing costs less."""
    factors = dq.compute_smooth_factors(calibration, weight)
    group = {"bits": 4, "group_size": 32}
    options = {
        "W8A8": {},
        "W8A8, smoothed": {"smooth": factors},
        "W8A8, rotated": {"hadamard": True},
        "W8A8, smoothed, rotated": {"smooth": factors, "hadamard": True},
        "W4A8 g32": group,
        "W4A8 g32, compensated": {**group, "calibration": calibration},
        "W4A8 g32, comp., rotated": {**group, "calibration": calibration, "hadamard": True},
        "W4A8 g128": {"bits": 4, "group_size": 128},
    }
    return {name: dq.QuantLinear.from_float(weight, **chosen) for name, chosen in options.items()}


def speeds(quantized: Layers, weight: np.ndarray, x: np.ndarray) -> Speeds:
    """Name of a layer -> NumPy's time over its time, on all rows of `x` and on one."""
    several, one = (_speeds(quantized, weight, rows) for rows in (x, x[:1]))
    return {name: (several[name], one[name]) for name in quantized}


def _speeds(quantized: Layers, weight: np.ndarray, x: np.ndarray) -> dict[str, float]:
    contenders = [Contender("numpy", lambda: x @ weight.T)]
    contenders += [Contender(name, lambda f=layer: f(x)) for name, layer in quantized.items()]
    samples = sample_in_turns(contenders, ROUNDS)
    return {name: median_ratio(samples["numpy"], samples[name]) for name in quantized}


def layer_table(
    name: str, quantized: Layers, weight: np.ndarray, x: np.ndarray, readings: dict[str, Speeds]
) -> str:
    n, k = weight.shape
    heads = [f"{isa}: {tokens}" for isa in readings for tokens in (f"{len(x)} tokens", "1 token")]
    rows = [[f"{name} {k} -> {n}, {weight.nbytes:,} bytes", "bytes", "output SQNR", *heads]]
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    for label, layer in quantized.items():
        ratios = [f"{ratio:.1f}x" for speed in readings.values() for ratio in speed[label]]
        rows.append([label, f"{layer.memory_bytes:,}", f"{sqnr_db(exact, layer(x)):.1f} dB", *ratios])
    return columns(rows)


def sqnr_db(exact: np.ndarray, approximate: np.ndarray) -> float:
    """Power of the output over the power of its error, in decibels."""
    return 10 * np.log10((exact**2).sum() / ((exact - approximate) ** 2).sum())


# ----------------------------------------------------------------------------------------------------------
# Formats of activations


def numpy_scale(x, clip, axis, p):
    magnitude = np.abs(x)
    if p is None:
        return np.max(magnitude, axis=axis, keepdims=True) / np.float32(clip)
    n = magnitude.size if axis is None else magnitude.shape[axis]
    rank = int(np.ceil(np.float32(p) * np.float32(n))) - 1
    if axis is None:
        return np.partition(magnitude.reshape(-1), rank)[rank] / np.float32(clip)
    return np.partition(magnitude, rank, axis=axis)[:, rank : rank + 1] / np.float32(clip)


def numpy_quantize(x, clip, axis=None, p=None):
    """The expression that `dynamic_quantize` stands for; halves away from zero."""
    v = np.clip(x / numpy_scale(x, clip, axis, p), -clip, clip)
    return np.trunc(v + np.copysign(np.float32(0.5), v)).astype(np.int8)


def formats(factors):
    """Name -> (quantize x, the NumPy expression, whether x is smoothed first)."""
    int4, percentile = dq.DynQuantFormat.INT4_PER_ROW, dq.Percentile(0.999)
    return {
        "int8 per tensor": (dq.dynamic_quantize_int8, lambda x: numpy_quantize(x, 127), False),
        "int8 per tensor, p99.9": (
            lambda x: dq.dynamic_quantize_int8(x, percentile),
            lambda x: numpy_quantize(x, 127, p=0.999),
            False,
        ),
        "int8 per row": (dq.dynamic_quantize_int8_per_row, lambda x: numpy_quantize(x, 127, 1), False),
        "int8 per row, p99.9": (
            lambda x: dq.dynamic_quantize_int8_per_row(x, percentile),
            lambda x: numpy_quantize(x, 127, 1, 0.999),
            False,
        ),
        "int8 per row, smoothed": (
            lambda x: dq.dynamic_quantize_int8_per_row(dq.smooth_activations(x, factors)),
            lambda x: numpy_quantize(x / factors, 127, 1),
            True,
        ),
        "int4 per row, packed": (
            lambda x: dq.dynamic_quantize(x, int4, packed=True),
            lambda x: numpy_quantize(x, 7, 1),
            False,
        ),
        "int4 per row, smoothed": (
            lambda x: dq.dynamic_quantize(dq.smooth_activations(x, factors), int4, packed=True),
            lambda x: numpy_quantize(x / factors, 7, 1),
            True,
        ),
    }


def activation_table(weight, calibration, x):
    """Each format with int8 weights, beside the NumPy expression that quantizes the same."""
    factors = dq.compute_smooth_factors(calibration, weight)
    plain = dq.dynamic_quantize_int8_per_row(weight)
    smoothed = dq.dynamic_quantize_int8_per_row(dq.smooth_weights(weight, factors))
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    rows = [[f"activations, {x.nbytes:,} bytes", "bytes", "MAE", "output SQNR", "speed"]]
    for label, (quantize, expression, is_smoothed) in formats(factors).items():
        source = dq.smooth_activations(x, factors) if is_smoothed else x
        tensor = quantize(x)
        w = (smoothed if is_smoothed else plain).dequantize().astype(np.float64)
        sqnr = sqnr_db(exact, tensor.dequantize().astype(np.float64) @ w.T)
        calls = {"numpy": lambda e=expression: e(x), "dynquant": lambda q=quantize: q(x)}
        samples = sample_in_turns([Contender(name, call) for name, call in calls.items()], ROUNDS)
        ratio = median_ratio(samples["numpy"], samples["dynquant"])
        mae = dq.quantization_mae(source, tensor)
        rows.append([label, f"{tensor.memory_bytes:,}", f"{mae:.5f}", f"{sqnr:.1f} dB", f"{ratio:.1f}x"])
    return columns(rows)


# ----------------------------------------------------------------------------------------------------------
# Choices of smoothing factors


def smoothings(weight, calibration):
    """Name -> smoothing factors; None is none."""
    searched = dq.search_alpha(calibration, weight)
    relative = dq.search_alpha(calibration, weight, relative=True)
    percentile = dq.Percentile(0.99)
    massive = calibration.copy()
    massive[0] *= 200
    return {
        "none": None,
        "alpha 0.5": dq.compute_smooth_factors(calibration, weight),
        "alpha 0.5, p99": dq.compute_smooth_factors(calibration, weight, mode=percentile),
        f"searched: alpha {searched.alpha}": searched.factors,
        f"searched, relative: alpha {relative.alpha}": relative.factors,
        "alpha 0.5, one token x 200": dq.compute_smooth_factors(massive, weight),
        "alpha 0.5, one token x 200, p99": dq.compute_smooth_factors(massive, weight, mode=percentile),
    }


def smoothing_table(weight, calibration, x):
    """W8A8 with factors chosen in several ways, on the tokens they were chosen by and on others."""
    rows = [["smoothing of W8A8", "calibration", "evaluation"]]
    for label, factors in smoothings(weight, calibration).items():
        layer = dq.QuantLinear.from_float(weight, smooth=factors)
        rows.append(
            [label, *(f"{_output_sqnr(layer, weight, tokens):.1f} dB" for tokens in (calibration, x))]
        )
    return columns(rows)


def _output_sqnr(layer, weight, tokens):
    return sqnr_db(tokens.astype(np.float64) @ weight.T.astype(np.float64), layer(tokens))
