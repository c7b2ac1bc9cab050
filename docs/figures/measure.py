"""Measures what the documentation shows, and saves it beside this file. In a checkout that is built in place:

    PYTHONPATH=. python docs/figures/measure.py accuracy   # accuracy.json
    PYTHONPATH=. python docs/figures/measure.py block      # block_<instruction set>.json

Accuracy is the same on every machine, but for the last digit where NumPy's BLAS takes part. `block` is a real
block beside PyTorch and ONNX Runtime, which must be installed.
"""

from __future__ import annotations

import os
import sys

# One thread for everybody; the libraries read these while they are imported.
os.environ.update(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_NUM_THREADS="1")

import json
from pathlib import Path
from typing import Any

import numpy as np

import dynquant as dq
from bench import demo, machine
from bench.sampling import Contender, keep_freed_memory, median_ratio, sample_in_turns

HERE = Path(__file__).parent
ROUNDS = 41

GROUP = {"bits": 4, "group_size": 32}
# Name -> options of QuantLinear.from_float; "smooth" and "calibration" are filled in.
RECIPES: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W8A8, smoothed": {"smooth": True},
    "W8A8, rotated": {"hadamard": True},
    "W8A8, smoothed and rotated": {"smooth": True, "hadamard": True},
    "W4A8, groups of 128": {"bits": 4, "group_size": 128},
    "W4A8, groups of 32": GROUP,
    "W4A8, groups of 32, searched": {**GROUP, "search": True},
    "W4A8, groups of 32, compensated": {**GROUP, "calibration": True},
    "W4A8, groups of 32, compensated and rotated": {
        **GROUP,
        "calibration": True,
        "hadamard": True,
    },
    "W4A8, groups of 32, compensated, searched and rotated": {
        **GROUP,
        "calibration": True,
        "search": True,
        "hadamard": True,
    },
}


def main(arguments: list[str]) -> int:
    if arguments == ["accuracy"]:
        save("accuracy.json", accuracy())
    elif arguments == ["block"]:
        save(f"block_{dq.simd_info()['selected']}.json", block())
    else:
        print(__doc__)
        return 2
    return 0


def save(name: str, result: Any) -> None:
    (HERE / name).write_text(json.dumps(result, indent=1) + "\n")
    print(f"saved {HERE / name}")


def sqnr_db(exact: np.ndarray, approximate: Any) -> float:
    return round(float(demo.sqnr_db(exact, np.asarray(approximate))), 2)


def exact_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ weight.T.astype(np.float64)


# ----------------------------------------------------------------------------------------------------------
# Accuracy


def accuracy() -> dict[str, Any]:
    layers = {name: demo.load(name) for name in demo.LAYERS}
    return {
        "recipes": {name: recipes(*data) for name, data in layers.items()},
        "alpha": {name: alphas(*data) for name, data in layers.items()},
        "static_scale": {name: static_scales(*data) for name, data in layers.items()},
        "embeddings": embeddings(),
    }


def recipes(weight: np.ndarray, calibration: np.ndarray, x: np.ndarray) -> dict[str, Any]:
    exact, found = exact_product(x, weight), {}
    for name, options in RECIPES.items():
        layer = dq.QuantLinear.from_float(weight, **filled_in(options, weight, calibration))
        found[name] = {
            "bytes": layer.memory_bytes,
            "sqnr_db": sqnr_db(exact, layer(x)),
        }
    return found


def filled_in(options: dict[str, Any], weight: np.ndarray, calibration: np.ndarray) -> dict[str, Any]:
    options = dict(options)
    if "smooth" in options:
        options["smooth"] = dq.compute_smooth_factors(calibration, weight)
    if "calibration" in options:
        options["calibration"] = calibration
    return options


def alphas(weight: np.ndarray, calibration: np.ndarray, x: np.ndarray) -> dict[str, Any]:
    """Output SQNR in W8A8 for each migration strength, on the tokens that gave the factors and on others."""
    steps = [round(i / 20, 2) for i in range(21)]
    found: dict[str, Any] = {"alpha": steps, "calibration": [], "evaluation": []}
    for alpha in steps:
        factors = dq.compute_smooth_factors(calibration, weight, dq.SmoothQuantConfig(alpha))
        layer = dq.QuantLinear.from_float(weight, smooth=factors)
        for name, tokens in (("calibration", calibration), ("evaluation", x)):
            found[name].append(sqnr_db(exact_product(tokens, weight), layer(tokens)))
    plain = dq.QuantLinear.from_float(weight)
    found["unsmoothed"] = sqnr_db(exact_product(x, weight), plain(x))
    return found


def static_scales(weight: np.ndarray, calibration: np.ndarray, x: np.ndarray) -> dict[str, float]:
    """Output SQNR where one scale for all activations is fixed on calibration data."""
    exact, w = exact_product(x, weight), dq.quantize_weights(weight).dequantize()
    scales = {
        "suggested_scale, p99 / 127": dq.CalibStats.collect([calibration]).suggested_scale,
        "p99.9 / 127": dq.compute_scale(calibration, 127, dq.Percentile(0.999)),
        "p99.99 / 127": dq.compute_scale(calibration, 127, dq.Percentile(0.9999)),
        "largest magnitude / 127": dq.compute_scale(calibration, 127),
    }
    found = {}
    for name, scale in scales.items():
        values = np.clip(np.round(x / np.float32(scale)), -127, 127) * np.float32(scale)
        found[name] = sqnr_db(exact, exact_product(values, w))
    found["dynamic, per tensor"] = sqnr_db(exact, exact_product(dq.dynamic_quantize_int8(x).dequantize(), w))
    found["dynamic, per row"] = sqnr_db(
        exact, exact_product(dq.dynamic_quantize_int8_per_row(x).dequantize(), w)
    )
    return found


def embeddings() -> list[dict[str, Any]]:
    """Recall@10 of 20,000 vectors with a large mean in three of 384 dimensions, as they are and centered."""
    found = []
    for mean in (0, 5, 10, 20, 40):
        documents, queries = vectors(mean)
        exact = top_10(exact_product(queries, documents))
        center = documents.mean(axis=0)
        centered = documents - center
        for bits, group_size in ((8, None), (4, 32)):
            options: dict[str, Any] = {"bits": bits, "group_size": group_size}
            plain = dq.QuantLinear(dq.quantize_weights(documents, **options))
            index = dq.QuantLinear(dq.quantize_weights(centered, **options), bias=centered @ center)
            found.append(
                {
                    "mean": mean,
                    "bits": bits,
                    "recall": recall(exact, top_10(plain(queries))),
                    "recall_centered": recall(exact, top_10(index(queries - center))),
                }
            )
    return found


def vectors(mean: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((200, 384), dtype=np.float32)
    documents = np.repeat(topics, 100, axis=0) + rng.standard_normal((20_000, 384), dtype=np.float32)
    documents[:, [3, 100, 257]] += np.float32(mean)
    queries = documents[::400] + rng.standard_normal((50, 384), dtype=np.float32) / 4
    return documents, queries


def top_10(scores: np.ndarray) -> np.ndarray:
    return np.argpartition(-scores, 10, axis=1)[:, :10]


def recall(exact: np.ndarray, found: np.ndarray) -> float:
    return round(
        float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)])),
        3,
    )


# ----------------------------------------------------------------------------------------------------------
# The block beside its peers


def block() -> dict[str, Any]:
    """Both layers of the block, one after the other, on their inputs for 64 tokens and for one."""
    from bench import peers

    # The peers' own check refuses an error of 5 %; what the error is, is the question here.
    peers.checked_linear = lambda _, call: call
    keep_freed_memory()
    layers = {name: demo.load(name) for name in demo.LAYERS}
    ways = {name: contenders(peers, weight, calibration) for name, (weight, calibration, _) in layers.items()}
    rows: dict[str, Any] = {
        label: {
            "bytes": sum(found[label][1] for found in ways.values()),
            "sqnr_db": {},
            "speed": {},
        }
        for label in ways["up"]
    }
    for tokens in (64, 1):
        calls: dict[str, Any] = {}
        for label, row in rows.items():
            parts = [ways[name][label][0](layers[name][2][:tokens]) for name in layers]
            calls[label] = lambda parts=parts: [part() for part in parts]
            if tokens == 64:
                for (name, (weight, _, x)), y in zip(layers.items(), calls[label](), strict=True):
                    row["sqnr_db"][name] = sqnr_db(exact_product(x, weight), y)
        samples = sample_in_turns([Contender(label, call) for label, call in calls.items()], ROUNDS)
        for label, row in rows.items():
            row["speed"][tokens] = round(median_ratio(samples["float32, NumPy"], samples[label]), 2)
    versions = {
        "dynquant": dq.__version__,
        "numpy": np.__version__,
        **peers.versions(),
    }
    return {
        "isa": dq.simd_info()["selected"],
        "cpu": machine.describe()["cpu"],
        "versions": versions,
        "rows": rows,
    }


def contenders(peers: Any, weight: np.ndarray, calibration: np.ndarray) -> dict[str, Any]:
    """Name -> (x -> call without arguments, bytes of what stands for the weights)."""
    n = len(weight)
    q8 = dq.quantize_weights(weight)
    q4 = dq.quantize_weights(weight, **GROUP)
    int8 = {"w": q8.data, "w_scales": q8.scales, "w_f32": weight}
    int4 = {
        "w_packed": q4.data,
        "w_scales": q4.scales,
        "zero_points": q4.zero_points,
        "w_f32": weight,
    }

    def peer(way: Any, arrays: dict[str, Any]) -> Any:
        return lambda x: way({**arrays, "x": x, "out": np.empty((len(x), n), np.float32)})

    def ours(name: str) -> Any:
        layer = dq.QuantLinear.from_float(weight, **filled_in(RECIPES[name], weight, calibration))
        return (lambda x: lambda: layer(x)), layer.memory_bytes

    return {
        "float32, NumPy": (lambda x: lambda: x @ weight.T, weight.nbytes),
        "float32, PyTorch": (peer(peers.torch_float_linear, int8), weight.nbytes),
        "int8, PyTorch": (
            peer(peers.torch_dynamic_linear("x86"), int8),
            q8.memory_bytes,
        ),
        "int8, ONNX Runtime": (
            peer(peers.ort_linear(peers.ort_dynamic_matmul, bound=True), int8),
            q8.memory_bytes,
        ),
        "4 bits, ONNX Runtime": (
            peer(peers.ort_linear(peers.ort_matmul_nbits, bound=True), int4),
            # Its zero points are packed two to a byte.
            q4.memory_bytes - q4.zero_points.nbytes // 2,
        ),
        **{f"dynquant {name}": ours(name) for name in RECIPES},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
