"""Draws saved results: `python bench/chart.py RESULTS.json CHART.svg`.

One bar for each library and case, on the best instruction set that was measured. Of a library's several
columns the one that is hardest to beat is drawn.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

# Library -> beginning of its columns' names, colour.
LIBRARIES = {
    "NumPy": ("numpy", "#4477aa"),
    "PyTorch": ("torch", "#ee6677"),
    "ONNX Runtime": ("ort", "#ccaa33"),
}
BAR = 0.26
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
# Text stays text, and the same results give the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "dynquant", "font.size": 9}


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__.partition("\n")[0])
        return 2
    save(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    return 0


def save(report: dict[str, Any], out: Path) -> None:
    with plt.rc_context(STYLE):
        draw(report).savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def draw(report: dict[str, Any]) -> Any:
    # Instruction sets are saved weakest first.
    isa = report["rows"][-1]["isa"]
    rows = [row for row in report["rows"] if row["isa"] == isa]
    figure, axes = plt.subplots(figsize=(9.5, 0.48 * len(rows) + 1.4), layout="constrained")
    for library, (prefix, colour) in LIBRARIES.items():
        places, ratios = _bars(rows, prefix)
        axes.barh(places, [r - 1 for r in ratios], BAR, left=1, color=colour, label=library)
        for place, ratio in zip(places, ratios, strict=True):
            _label(axes, place, ratio)
    _decorate(axes, report, rows, isa)
    return figure


def _bars(rows: list[dict[str, Any]], prefix: str) -> tuple[list[float], list[float]]:
    """Places and lengths of one library's bars; the bars of a case stand close together, centred on it."""
    places, ratios = [], []
    for y, row in enumerate(rows):
        present = [p for p, _ in LIBRARIES.values() if _hardest(row, p)]
        if prefix in present:
            places.append(y + BAR * (present.index(prefix) - (len(present) - 1) / 2))
            ratios.append(_hardest(row, prefix))
    return places, ratios


def _hardest(row: dict[str, Any], prefix: str) -> float | None:
    return min((r for name, r in row["ratios"].items() if name.startswith(prefix)), default=None)


def _label(axes: Any, place: float, ratio: float) -> None:
    side = 1 if ratio >= 1 else -1
    axes.annotate(
        f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}",
        (ratio, place),
        xytext=(3 * side, 0),
        textcoords="offset points",
        ha="left" if side == 1 else "right",
        va="center",
        fontsize=7,
    )


def _decorate(axes: Any, report: dict[str, Any], rows: list[dict[str, Any]], isa: str) -> None:
    ratios = [r for row in rows for r in row["ratios"].values()]
    low, high = min(0.45, 0.7 * min(ratios)), max(2.2, 1.5 * max(ratios))
    ticks = [t for t in TICKS if low < t < high]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, ["1x: as fast" if t == 1 else f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.tick_params(axis="x", top=True, labeltop=True)
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines["right"].set_visible(False)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    axes.figure.suptitle(
        "Time of the other library / time of dynquant: right of 1x dynquant is faster\n"
        f"{report['machine']['cpu']}, {isa}, one thread; {versions}"
    )
    axes.figure.legend(loc="outside lower right", ncols=len(LIBRARIES), frameon=False)


if __name__ == "__main__":
    sys.exit(main())
