"""Draws saved results: `python bench/chart.py RESULTS.json CHART.svg`.

A bar for each library and operation; for the linear layers a panel for each kind and shape, with a line for
each library over the number of rows. On the best instruction set that was measured. Of a library's several
columns the one that is hardest to beat is drawn.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

# Library -> beginning of its columns' names, colour.
LIBRARIES = {
    "NumPy": ("numpy", "#4477aa"),
    "PyTorch": ("torch", "#ee6677"),
    "ONNX Runtime": ("ort", "#ccaa33"),
    "NumKong (integers only)": ("numkong", "#228833"),
    "dynquant on one thread": ("one_thread", "#999999"),
}
BAR = 0.26
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
# Inches.
WIDTH, BAR_ROW, PANEL_ROW, MARGIN = 9.5, 0.48, 2.1, 0.7
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
    operations = [row for row in rows if row["layer"] is None]
    layers = [row for row in rows if row["layer"] is not None]
    n_groups = len({row["group"] for row in layers})
    parts = [
        (draw_operations, operations, BAR_ROW * len(operations) + MARGIN),
        (draw_layers, layers, PANEL_ROW * n_groups + MARGIN),
    ]
    parts = [part for part in parts if part[1]]
    heights = [height for _, _, height in parts]
    figure = plt.figure(figsize=(WIDTH, sum(heights) + MARGIN), layout="constrained")
    subfigures = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for subfigure, (draw_part, data, _) in zip(subfigures, parts, strict=True):
        draw_part(subfigure, data)
    _entitle(figure, report, rows, isa)
    return figure


def draw_operations(figure: Any, rows: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    for prefix, colour in LIBRARIES.values():
        places, ratios = _bars(rows, prefix)
        axes.barh(places, [r - 1 for r in ratios], BAR, left=1, color=colour)
        for place, ratio in zip(places, ratios, strict=True):
            _label(axes, place, ratio)
    _ratio_axis(axes, "x", rows)
    axes.tick_params(axis="x", top=True, labeltop=True)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines["right"].set_visible(False)


def draw_layers(figure: Any, rows: list[dict[str, Any]]) -> None:
    """A line of panels for each kind of layer, a column for each shape and number of threads."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        threads = f"{row['threads']} threads" if row["threads"] > 1 else "one thread"
        title = "{} x {}\n{}".format(*row["layer"][:2], threads)
        panels.setdefault((row["group"], title), []).append(row)
    groups, titles = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    titles.sort(key=lambda title: "one thread" not in title)
    counts = sorted({row["layer"][2] for row in rows})
    grid = figure.subplots(len(groups), len(titles), squeeze=False, sharex=True, sharey=True)
    for (i, group), (j, title) in itertools.product(enumerate(groups), enumerate(titles)):
        _draw_panel(grid[i, j], panels.get((group, title), []), counts)
        grid[0, j].set_title(title, fontsize=8)
        grid[i, 0].set_ylabel(group, fontsize=9)
    _ratio_axis(grid[0, 0], "y", rows)
    grid[0, 0].set_xticks(range(len(counts)), counts)
    figure.supxlabel("rows of activations; the least ratio is given", fontsize=9)


def _draw_panel(axes: Any, rows: list[dict[str, Any]], counts: list[int]) -> None:
    places = [counts.index(row["layer"][2]) for row in rows]
    for prefix, colour in LIBRARIES.values():
        ratios = [_hardest(row, prefix) for row in rows]
        if None not in ratios:
            axes.plot(places, ratios, color=colour, marker="o", markersize=3, linewidth=1.2)
    for place, row in zip(places, rows, strict=True):
        least = min(row["ratios"].values())
        axes.annotate(
            f"{least:.2g}",
            (place, least),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.grid(axis="y", color="#dddddd")
    axes.axhline(1, color="black", linewidth=1)
    axes.margins(x=0.12)


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


def _ratio_axis(axes: Any, which: str, rows: list[dict[str, Any]]) -> None:
    """A logarithmic axis for all ratios of `rows`, on which 1 is as fast as dynquant."""
    ratios = [r for row in rows for r in row["ratios"].values()]
    low, high = min(0.45, 0.7 * min(ratios)), max(2.2, 1.5 * max(ratios))
    ticks = [t for t in TICKS if low < t < high]
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    labels = ["1x: as fast" if t == 1 and which == "x" else f"{t:g}x" for t in ticks]
    axes.set(**{f"{which}ticks": ticks, f"{which}ticklabels": labels})
    axes.minorticks_off()
    axes.grid(axis=which, color="#dddddd")
    axes.set_axisbelow(True)


def _entitle(figure: Any, report: dict[str, Any], rows: list[dict[str, Any]], isa: str) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    others = "" if report.get("avx512", True) else ", nobody with AVX-512"
    figure.suptitle(
        "Time of the other library / time of dynquant: above 1x dynquant is faster\n"
        f"{report['machine']['cpu']}, {isa}{others}, one thread unless it says otherwise\n{versions}"
    )
    drawn = {
        library: colour
        for library, (prefix, colour) in LIBRARIES.items()
        if any(_hardest(row, prefix) is not None for row in rows)
    }
    patches = [Patch(color=colour, label=library) for library, colour in drawn.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)


if __name__ == "__main__":
    sys.exit(main())
