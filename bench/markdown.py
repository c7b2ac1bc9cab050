"""Saved runs as one Markdown table: `python -m bench table RESULTS.json [RESULTS.json ...]`.

A line for each case, on the strongest instruction set of each run; a column for each run and library. Of a
library's several ways, the one that is hardest to beat stands there, for operations and layers alike.
"""

from __future__ import annotations

import re

from .chart import label
from .summary import Entry, Summary, hardest, strongest_isa

# PyTorch's float32 product and NumKong's integers do less than a quantized layer.
SHOWN = ("NumPy", "PyTorch", "ONNX Runtime")


def table(summaries: list[Summary], pattern: str) -> str:
    """`pattern` is searched for in the names of cases."""
    cases: dict[str, Entry] = {}
    for summary in summaries:
        cases |= {c["name"]: c for c in summary["cases"] if re.search(pattern, c["name"])}
    head = ["", *(f"{_title(summary)}: {name}" for summary in summaries for name in SHOWN)]
    rows = [[_what(case), *_cells(summaries, name)] for name, case in cases.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _title(summary: Summary) -> str:
    return f"{strongest_isa(summary)}" + " (all without AVX-512)" * (not summary["avx512"])


def _what(case: Entry) -> str:
    return str(case["what"]) if case["layer"] is None else f"{case['group']}, {label(case)}"


def _cells(summaries: list[Summary], name: str) -> list[str]:
    cells = []
    for summary in summaries:
        isa = strongest_isa(summary)
        case = next((c for c in summary["cases"] if c["name"] == name and isa in c["isas"]), None)
        ratios = case["isas"][isa]["ratios"] if case else {}
        cells += [_ratio(hardest(ratios, library)) for library in SHOWN]
    return cells


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
