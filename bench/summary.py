"""The summary of a run, as it is saved: what ran where, and a line of medians for each case.

A JSON object:

schema    3
date      of the run
machine   CPU, cores, caches, system and Python
versions  of dynquant and of the libraries beside it
limits    what one core of the machine can do, see machine.py
avx512    False where every library was kept from AVX-512
rounds    samples of each contender
cases     a list of cases: name, what, group, layer ([out_features, in_features, rows] or null), activations
          ("normal" or where they are from; null without a layer), threads, level (of the memory that holds
          its arrays), seconds, isas

`seconds` has the median time of each contender: of dynquant under the names of its instruction sets, of the
others under the names of their columns. `isas` has, for each instruction set measured, weakest first,
`ratios` (time of the other / time of dynquant, median over the rounds) and `limit` (share of what the machine
allows, or null).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Summary = dict[str, Any]
Entry = dict[str, Any]

SCHEMA = 3
# Digits kept of a measurement: more than it means, fewer than it takes to print all of them.
DIGITS = 4
TOP = ("schema", "date", "machine", "versions", "limits", "avx512", "rounds", "cases")
CASE = ("name", "what", "group", "layer", "activations", "threads", "level", "seconds", "isas")

# Library -> its columns, each another way to do the same.
WAYS = {
    "NumPy": ("numpy", "numpy_one_thread"),
    "PyTorch": ("torch", "torch_fbgemm"),
    "PyTorch float32": ("torch_f32",),
    "ONNX Runtime": ("ort", "ort_bound"),
    "NumKong (integers only)": ("numkong", "numkong_int4", "numkong_packed"),
    "dynquant on one thread": ("one_thread",),
}


class SummaryError(ValueError):
    """A file that is no summary, or two that have nothing in common."""


def write(summary: Summary, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(summary), encoding="utf-8")


def dumps(summary: Summary) -> str:
    """JSON with a line for each key and for each case."""
    lines = [f"{json.dumps(key)}: {json.dumps(_rounded(summary[key]))}" for key in TOP[:-1]]
    cases = ",\n".join(json.dumps(_rounded(case)) for case in summary["cases"])
    return "{\n" + ",\n".join(lines) + ',\n"cases": [\n' + cases + "\n]\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def read(path: Path) -> Summary:
    """Raises SummaryError where `path` cannot be read or holds something else."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SummaryError(f"{path}: {error}") from error
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
        raise SummaryError(f"{path}: not a summary of schema {SCHEMA}")
    missing = [key for key in TOP if key not in summary]
    missing += [f"cases.{key}" for key in CASE if any(key not in case for case in summary.get("cases", []))]
    if missing:
        raise SummaryError(f"{path}: no {', '.join(missing)}")
    return summary


def strongest_isa(summary: Summary) -> str:
    """The strongest instruction set measured: each case has them weakest first."""
    return max((list(case["isas"]) for case in summary["cases"]), key=len)[-1]


def hardest(ratios: dict[str, float], library: str) -> float | None:
    """The smallest ratio of a library's ways, which is the hardest to beat; None where it has none."""
    return min((ratios[way] for way in WAYS[library] if way in ratios), default=None)
