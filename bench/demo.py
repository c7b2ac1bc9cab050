"""What each way of quantising costs on a real feed-forward block, and what it saves.

For both linear layers of the block: bytes and mean absolute error of the quantised activations, the error of
the layer's output, and the time to quantise them beside the time of the NumPy expression; and what the choice
of the smoothing factors is worth. Run by `make demo`.
"""

import os

# One thread for NumPy's side too; OpenBLAS reads this while it is loaded.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import statistics
import time
from pathlib import Path

import numpy as np

import dynquant as dq

DATA = Path(__file__).parent / "data" / "minilm_ffn.npz"
ROUNDS = 15


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


def recipes(factors):
    """Name -> (quantise x, the NumPy expression, whether x is smoothed first)."""
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


def sqnr_db(exact, approximate):
    """Power of the output over the power of its error, in decibels."""
    return 10 * np.log10((exact**2).sum() / ((exact - approximate) ** 2).sum())


def median_times(*functions):
    """Median time of each function in microseconds, called in turn."""
    times = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) * 1e6 for taken in times]


def show_layer(name, weight, calibration, x):
    n, k = weight.shape
    factors = dq.compute_smooth_factors(calibration, weight)
    plain = dq.dynamic_quantize_int8_per_row(weight)
    smoothed = dq.dynamic_quantize_int8_per_row(dq.smooth_weights(weight, factors))
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    print(f"\n{name}: {k} -> {n} features, {len(x)} tokens, activations {x.nbytes:,} bytes in float32")
    print(
        f"{'activations':24}{'bytes':>8}{'MAE':>10}{'output SQNR':>13}{'time':>10}{'NumPy':>10}{'ratio':>8}"
    )
    for label, (quantize, expression, is_smoothed) in recipes(factors).items():
        source = dq.smooth_activations(x, factors) if is_smoothed else x
        tensor = quantize(x)
        w = (smoothed if is_smoothed else plain).dequantize().astype(np.float64)
        sqnr = sqnr_db(exact, tensor.dequantize().astype(np.float64) @ w.T)
        ours, numpys = median_times(lambda q=quantize: q(x), lambda e=expression: e(x))
        mae = dq.quantization_mae(source, tensor)
        print(
            f"{label:24}{tensor.memory_bytes:8,}{mae:10.5f}{sqnr:10.1f} dB"
            f"{ours:7.0f} us{numpys:7.0f} us{numpys / ours:7.1f}x"
        )
    show_products(weight, calibration, factors, x, exact)
    show_smoothing(weight, calibration, x)


def layers(weight, calibration, factors):
    """Name -> the layer with int8 or 4-bit weights, as it is or prepared so that quantising costs less."""
    group = {"bits": 4, "group_size": 32}
    options = {
        "W8A8": {},
        "W8A8, smoothed": {"smooth": factors},
        "W8A8, rotated": {"hadamard": True},
        "W8A8, smoothed and rotated": {"smooth": factors, "hadamard": True},
        "W4A8 g32, symmetric": {**group, "symmetric": True},
        "W4A8 g32": group,
        "W4A8 g32, compensated": {**group, "calibration": calibration},
        "W4A8 g32, comp., rotated": {**group, "calibration": calibration, "hadamard": True},
        "W4A8 g128": {"bits": 4, "group_size": 128},
    }
    return {name: dq.QuantLinear.from_float(weight, **chosen) for name, chosen in options.items()}


def show_products(weight, calibration, factors, x, exact):
    """The layer itself, with integer weights and activations, against float32."""
    print(
        f"{'layer (float32 ' + format(weight.nbytes, ',') + ' bytes)':32}{'bytes':>9}{'output SQNR':>13}",
        end="",
    )
    print("".join(f"{tokens:>12}{'NumPy':>10}{'ratio':>8}" for tokens in (f"{len(x)} tokens", "1 token")))
    for label, layer in layers(weight, calibration, factors).items():
        print(f"{label:32}{layer.memory_bytes:9,}{sqnr_db(exact, layer(x)):10.1f} dB", end="")
        for rows in (x, x[:1]):
            ours, numpys = median_times(lambda f=layer, r=rows: f(r), lambda r=rows: r @ weight.T)
            print(f"{ours:9.0f} us{numpys:7.0f} us{numpys / ours:7.1f}x", end="")
        print()


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


def show_smoothing(weight, calibration, x):
    """W8A8 with factors chosen in several ways, on the tokens they were chosen by and on others."""
    (taken,) = median_times(lambda: dq.search_alpha(calibration, weight))
    print(f"{'smoothing':34}{'calibration':>12}{'evaluation':>14}    (search: {taken / 1e3:.0f} ms)")
    for label, factors in smoothings(weight, calibration).items():
        layer = dq.QuantLinear.from_float(weight, smooth=factors)
        seen, unseen = (
            sqnr_db(tokens.astype(np.float64) @ weight.T.astype(np.float64), layer(tokens))
            for tokens in (calibration, x)
        )
        print(f"  {label:32}{seen:9.1f} dB{unseen:11.1f} dB")


def main():
    block = np.load(DATA)
    print(f"dynquant {dq.__version__}, {dq.simd_info()['selected']} kernels, one thread")
    for name in ("up", "down"):
        weight, calibration, x = (
            block[f"{name}_{part}"].astype(np.float32) for part in ("weight", "calib", "eval")
        )
        show_layer(name, weight, calibration, x)


if __name__ == "__main__":
    main()
