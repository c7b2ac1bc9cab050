"""Draws the figures of the documentation from saved results: `PYTHONPATH=. python docs/figures/plot.py`.

Text stays text, and the same results give the same files. Needs matplotlib.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from bench import summary

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dynquant",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
BLUE, RED, GRAY, YELLOW = "#4477aa", "#cc3311", "#888888", "#ccaa33"
FLOAT32_BYTES = 384 * 1536 * 4


def main() -> None:
    with plt.rc_context(STYLE):
        accuracy = json.loads((HERE / "accuracy.json").read_text())
        save(draw_bytes(accuracy["recipes"]), "bytes.svg")
        save(draw_alpha(accuracy["alpha"]), "alpha.svg")
        save(draw_speed(), "speed.svg")


def save(figure: Any, name: str) -> None:
    path = HERE / name
    figure.savefig(path, metadata={"Date": None})
    # matplotlib ends lines of paths with spaces.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    print(f"saved {path}")


# Recipe -> its label, and how far that stands above or below its point.
LABELS = {
    "W8A8": ("plain", -9),
    "W8A8, smoothed": ("smoothed", -5),
    "W8A8, rotated": ("rotated", -4),
    "W8A8, smoothed and rotated": ("smoothed and rotated", 4),
    "W4A8, groups of 128": ("plain", -3),
    "W4A8, groups of 32": ("plain", -4),
    "W4A8, groups of 32, compensated": ("compensated", -8),
    "W4A8, groups of 32, compensated and rotated": ("compensated and rotated", -2),
    "W4A8, groups of 32, compensated, searched and rotated": ("and searched", 2),
}


def draw_bytes(recipes: dict[str, Any]) -> Any:
    """SQNR of the output over the bytes of a layer, a point for each recipe."""
    figure, panels = plt.subplots(2, 1, figsize=(6.5, 8), sharex=True, layout="constrained")
    for axes, (name, found) in zip(panels, recipes.items(), strict=True):
        for label, (text, side) in LABELS.items():
            point = found[label]
            compensated, rotated = "compensated" in label, "rotated" in label
            color = RED if rotated else YELLOW if compensated else BLUE
            x = FLOAT32_BYTES / point["bytes"]
            axes.plot(
                x,
                point["sqnr_db"],
                "o",
                color=color,
                markersize=7,
                markeredgecolor="white",
            )
            axes.annotate(
                text,
                (x, point["sqnr_db"]),
                xytext=(8, side),
                textcoords="offset points",
                fontsize=8.5,
            )
        axes.set_title(f"layer {name}")
        axes.set_xlim(3.6, 8.2)
        axes.set_ylim(12, 48)
        axes.set_ylabel("SQNR of the output, dB")
    panels[1].set_xlabel("times smaller than float32")
    for x, text in (
        (3.95, "W8A8"),
        (6.1, "W4A8, groups of 32"),
        (7.42, "groups of 128"),
    ):
        panels[0].annotate(text, (x, 13), ha="center", color=GRAY, fontsize=9)
    return figure


def draw_alpha(alphas: dict[str, Any]) -> Any:
    """SQNR of the output over alpha."""
    figure, panels = plt.subplots(2, 1, figsize=(6.5, 6.4), sharex=True, layout="constrained")
    for axes, (name, found) in zip(panels, alphas.items(), strict=True):
        x = found["alpha"]
        axes.plot(
            x,
            found["evaluation"],
            "o-",
            color=BLUE,
            markersize=4,
            label="other tokens",
        )
        axes.plot(
            x,
            found["calibration"],
            "s--",
            color=YELLOW,
            markersize=4,
            label="calibration tokens",
        )
        axes.axhline(
            found["unsmoothed"],
            color=GRAY,
            linewidth=1,
            label="other tokens, not smoothed",
        )
        axes.set_title(f"layer {name}, W8A8")
        axes.set_ylabel("SQNR of the output, dB")
    panels[1].set_xlabel("alpha")
    panels[0].legend(loc="lower left")
    return figure


MACHINES = {
    HERE / "zen3_avx2.json": "AMD EPYC (Zen 3), AVX2",
    ROOT / "bench" / "results" / "peers.json": "Intel Xeon, AVX-512 and AMX",
}
CASES = {
    "int8_tensor_1048576": "int8 per tensor, 2**20 floats",
    "int8_row_512x4096": "int8 per row, 512 x 4096",
    "percentile_1048576": "percentile scale, 2**20 floats",
    "linear_w8a8_4096x4096_m1": "W8A8 4096 x 4096, 1 row",
    "linear_w8a8_4096x4096_m128": "W8A8 4096 x 4096, 128 rows",
    "linear_w8a8_384x1536_m128": "W8A8 384 x 1536, 128 rows",
    "linear_w4a8_g32_4096x4096_m1": "W4A8 4096 x 4096, 1 row",
    "linear_w4a8_g32_4096x4096_m128": "W4A8 4096 x 4096, 128 rows",
}
COLORS = {"NumPy": BLUE, "PyTorch": RED, "ONNX Runtime": YELLOW}


def draw_speed() -> Any:
    """Time of each library over that of dynquant, a dot for each, on two machines."""
    figure, panels = plt.subplots(2, 1, figsize=(6.5, 7.4), sharex=True, layout="constrained")
    for axes, (file, title) in zip(panels, MACHINES.items(), strict=True):
        run = summary.read(file)
        isa = summary.strongest_isa(run)
        ratios = {case["name"]: case["isas"][isa]["ratios"] for case in run["cases"] if isa in case["isas"]}
        for y, case in enumerate(CASES):
            found = [(summary.hardest(ratios[case], library), color) for library, color in COLORS.items()]
            values = [(ratio, color) for ratio, color in found if ratio]
            axes.plot([1, max(values)[0]], [y, y], color="#cccccc", linewidth=1, zorder=1)
            for ratio, color in values:
                axes.plot(ratio, y, "o", color=color, markersize=7, markeredgecolor="white")
        axes.set_title(title)
        axes.set_xscale("log")
        axes.set_xlim(0.6, 120)
        axes.set_xticks(
            (1, 2, 5, 10, 20, 50, 100),
            ("1x", "2x", "5x", "10x", "20x", "50x", "100x"),
        )
        axes.minorticks_off()
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(CASES)), CASES.values())
        axes.invert_yaxis()
    panels[1].set_xlabel("their time / dynquant's time")
    for library, color in COLORS.items():
        panels[1].plot([], [], "o", color=color, label=library)
    panels[1].legend(loc="lower right")
    return figure


if __name__ == "__main__":
    main()
