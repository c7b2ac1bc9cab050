"""Draws a saved run as SVG: `python -m bench chart RESULTS.json CHART.svg`.

A line for each case on the strongest instruction set measured, with a dot for each library at its ratio. Of a
library's several ways, the one that is hardest to beat is drawn. The SVG is written as text, a line for each
case, so that it is small and the same results give the same file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from .summary import Entry, Summary, hardest, strongest_isa

COLORS = {
    "NumPy": "#4477aa",
    "PyTorch": "#ee6677",
    "PyTorch float32": "#aa3377",
    "ONNX Runtime": "#ccaa33",
    "NumKong (integers only)": "#228833",
    "dynquant on one thread": "#999999",
}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
# Pixels.
WIDTH, LABELS, MARGIN, LINE, TOP, DOT = 820, 330, 30, 15, 80, 4
STYLE = (
    "text{font:11px sans-serif;fill:#222}.h{font-weight:bold}.n{fill:#777;font-size:10px}"
    ".g{stroke:#ddd}.o{stroke:#000}circle{fill-opacity:.9}"
)


def svg(summary: Summary) -> str:
    isa = strongest_isa(summary)
    cases = [case for case in summary["cases"] if isa in case["isas"]]
    scale = _Scale([ratio for case in cases for ratio in _dots(case, isa).values()])
    body = "\n".join(_lines(cases, isa, scale))
    height = TOP + LINE * (len(cases) + len({case["group"] for case in cases}) + 1)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}"><style>{STYLE}</style>\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n'
    )
    return (
        head
        + "\n".join([*_title(summary, isa), *_legend(cases, isa), scale.grid(height)])
        + f"\n{body}\n</svg>\n"
    )


class _Scale:
    """A logarithmic axis for `ratios`, on which 1 is as fast as dynquant."""

    def __init__(self, ratios: list[float]) -> None:
        self.low, self.high = min(0.45, 0.9 * min(ratios)), max(2.2, 1.1 * max(ratios))

    def x(self, ratio: float) -> int:
        share = math.log(ratio / self.low) / math.log(self.high / self.low)
        return round(LABELS + share * (WIDTH - LABELS - MARGIN))

    def grid(self, height: int) -> str:
        """A line and a number for each tick."""
        return "\n".join(
            f'<path class="{"o" if tick == 1 else "g"}" d="M{self.x(tick)} {TOP}V{height - LINE}"/>'
            f'<text class="n" text-anchor="middle" x="{self.x(tick)}" y="{TOP - 4}">{tick:g}x</text>'
            for tick in TICKS
            if self.low < tick < self.high
        )


def _dots(case: Entry, isa: str) -> dict[str, float]:
    """Color -> the hardest ratio of that library."""
    ratios = case["isas"][isa]["ratios"]
    found = ((color, hardest(ratios, library)) for library, color in COLORS.items())
    return {color: ratio for color, ratio in found if ratio is not None}


def _title(summary: Summary, isa: str) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    others = "" if summary["avx512"] else ", everybody without AVX-512"
    lines = (
        "Time of the other library / time of dynquant: right of 1x dynquant is faster",
        f"{summary['machine']['cpu']}, {isa}{others}, one thread unless a line says otherwise",
        versions,
    )
    return [
        f'<text class="{style}" x="{MARGIN}" y="{y}">{escape(line)}</text>'
        for line, style, y in zip(lines, ("h", "n", "n"), (16, 31, 44), strict=True)
    ]


def _legend(cases: list[Entry], isa: str) -> list[str]:
    drawn = {color for case in cases for color in _dots(case, isa)}
    parts, x = [], MARGIN
    for name, color in COLORS.items():
        if color in drawn:
            parts.append(_dot(x, 56, color) + f'<text x="{x + 8}" y="60">{name}</text>')
            x += 26 + 6 * len(name)
    return parts


def _dot(x: int, y: int, color: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{DOT}" fill="{color}"/>'


def _lines(cases: list[Entry], isa: str, scale: _Scale) -> Iterator[str]:
    """A heading for each group, a line for each case."""
    y, group = TOP, None
    for case in sorted(cases, key=lambda case: [c["group"] for c in cases].index(case["group"])):
        if case["group"] != group:
            group = case["group"]
            y += LINE
            yield f'<text class="h" x="{MARGIN}" y="{y}">{escape(group)}</text>'
        y += LINE
        dots = "".join(_dot(scale.x(ratio), y - 4, color) for color, ratio in _dots(case, isa).items())
        yield f'<text text-anchor="end" x="{LABELS - 12}" y="{y}">{escape(label(case))}</text>{dots}'


def label(case: Entry) -> str:
    """What a case is, below a heading that says its group."""
    if case["layer"] is None:
        return str(case["what"])
    n, k, rows = case["layer"]
    activations = "" if case["activations"] == "normal" else f", {case['activations']}"
    threads = f", {case['threads']} threads" if case["threads"] > 1 else ""
    return f"{n} x {k}, {rows} row{'s' * (rows > 1)}{activations}{threads}"
