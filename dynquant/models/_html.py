"""Reports as one page each: tables and plots in SVG, without scripts, other files or a network."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ._report import TensorReport, layer_of, size

if TYPE_CHECKING:
    from ._recipes import LayerView, RecipeRow, RecipeTable
    from ._report import ModelReport

# Layers whose histograms are drawn, the worst ones; and decibels below which layers are listed to exclude.
_DRAWN = 12
_EXCLUDE_BELOW = (40.0, 30.0, 20.0)

# Colors that people who see few colors tell apart (Okabe and Ito), and as many shapes.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7f3c8d", "#666666", "#a52a2a")
_SHAPES = (
    "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0 -5 0Z",
    "M-5 -5H5V5H-5Z",
    "M0 -6L6 5H-6Z",
    "M0 -6L6 0L0 6L-6 0Z",
    "M0 6L6 -5H-6Z",
    "M-6 -2H-2V-6H2V-2H6V2H2V6H-2V2H-6Z",
)

_STYLE = """
:root { color-scheme: light dark; --fg: #1a1a1a; --bg: #fff; --line: #767676; --grid: #e3e3e3;
 --mark: #fff3c4; }
@media (prefers-color-scheme: dark) {
 :root { --fg: #eee; --bg: #16181c; --line: #999; --grid: #33363c; --mark: #4d4213; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); margin: 0; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 3px solid #0072b2; outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; padding-bottom: .4rem; font-weight: 600; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--grid); text-align: right;
 white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.picked > * { background: var(--mark); }
svg { display: block; max-width: 100%; height: auto; }
svg.wide { min-width: 34rem; }
svg text { font: 12px system-ui, sans-serif; fill: var(--fg); }
.axis { stroke: var(--line); fill: none; } .grid { stroke: var(--grid); }
pre { overflow-x: auto; padding: .7rem; border: 1px solid var(--grid); font-size: .85rem;
 white-space: pre-wrap;
 overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .3rem 0; }
.pair { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.pair > * { flex: 1 1 20rem; min-width: 0; }
"""


def recipes_page(table: RecipeTable) -> str:
    """The page of a `RecipeTable`."""
    n = len(table.layers)
    what = f"{n} layers" if n > 1 else table.layers[0]
    has_rows = any(row.output_sqnr_db is not None for row in table.rows)
    of = "outputs on your rows, activations quantized too" if has_rows else "weights"
    parts = [
        f"<h1>Ways to quantize {_text(what)}</h1>",
        f"<p>Every figure is measured. SQNR is the power of the {of} over the power of their error, in "
        "decibels: 40 dB is an error of 1 %, 20 dB of 10 %.</p>",
        _budget_sentence(table),
        "<h2>Recipes</h2>",
        _table("Recipes, all layers together", *_recipe_rows(table)),
        _error_over_bytes(table),
        "<h2>Layers</h2>",
        _dots(
            "SQNR of each layer by recipe, the worst layers first",
            table.recipes,
            [(layer, _of_layer(table, layer)) for layer in _worst_layers(table)],
        ),
        _details("The same as a table", _table("SQNR in dB by layer", *_layer_rows(table))),
    ]
    picked = {row.layer: row.quality for row in table.picked}
    lists = picked or {row.layer: row.quality for row in table.worst(table.recipes[0])}
    parts.append(_exclude_lists(lists, "with the recipe picked" if picked else f"with {table.recipes[0]}"))
    views = {view.layer: view for view in table.views}
    drawn = [views[layer] for layer in _worst_layers(table) if layer in views][:_DRAWN]
    if drawn:
        parts.append("<h2>Weights and channels</h2>")
        if len(views) > len(drawn):
            parts.append(f"<p>Of the {len(drawn)} worst layers.</p>")
        parts += [_view(view, open_first=i == 0) for i, view in enumerate(drawn)]
    return _page(f"Ways to quantize {what}", parts)


def model_page(report: ModelReport) -> str:
    """The page of a `ModelReport`."""
    quantized = report.quantized
    ratio = report.bytes_before / report.bytes_after if report.bytes_after else math.nan
    settings = ", ".join(
        f"{key} {value}" for key, value in report.settings.items() if value not in (None, [])
    )
    parts = [
        f"<h1>{_text(report.target)}</h1>",
        f"<p>{len(quantized)} tensors of <code>{_text(report.source)}</code> quantized, "
        f"{len(report.copied)} copied: {size(report.bytes_before)} became {size(report.bytes_after)}, "
        f"{ratio:.2f} times smaller.</p><p>{_text(settings)}</p>",
        "<p>SQNR is the power of the values over the power of their error, in decibels: 40 dB is an error of "
        "1 %, 20 dB of 10 %. Every figure is measured on what was written.</p>",
    ]
    if quantized:
        kinds = (
            ["weights", "outputs"] if any(t.output_sqnr_db is not None for t in quantized) else ["weights"]
        )
        points = [(layer_of(t.name), _points(t, kinds)) for t in quantized]
        parts += [
            "<h2>Layers</h2>",
            _dots("SQNR of each layer, the worst first", kinds, points),
            _table("Quantized layers, the worst first", *_tensor_rows(quantized)),
            _exclude_lists({layer_of(t.name): _quality(t) for t in quantized}, "with this recipe"),
        ]
    copied = [[t.name, _shape(t.shape), t.dtype, str(t.bytes_after), t.reason or ""] for t in report.copied]
    head = ["Tensor", "Shape", "Dtype", "Bytes", "Reason"]
    parts.append(
        _details(f"{len(copied)} tensors copied as they were", _table("Copied tensors", head, copied))
    )
    return _page(f"Quantized {report.target}", parts)


# ---- Pieces of text ----


def _page(title: str, parts: Iterable[str]) -> str:
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _text(text: str) -> str:
    """Text of a file's names: what is not printable is escaped too."""
    return html.escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _db(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else "exact" if value == math.inf else f"{value:.1f}"


def _table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[int] = ()
) -> str:
    cells = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    lines = []
    for i, row in enumerate(rows):
        first, *others = (_text(cell) for cell in row)
        mark = ' class="picked"' if i in marked else ""
        others_text = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f'<tr{mark}><th scope="row">{first}</th>{others_text}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table>'
        f"<caption>{_text(caption)}</caption><thead><tr>{cells}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _details(summary: str, content: str, open_first: bool = False) -> str:
    return f"<details{' open' if open_first else ''}><summary>{_text(summary)}</summary>{content}</details>"


def _exclude_lists(quality: dict[str, float], when: str) -> str:
    """Options to paste: the layers below some decibels."""
    lists: dict[str, tuple[float, int]] = {}  # where several limits leave out the same, the lowest tells
    for least in _EXCLUDE_BELOW:
        names = sorted((q, name) for name, q in quality.items() if q < least)
        if names and len(names) < len(quality):
            # Names come from a file, and the line goes to a shell.
            lists[" ".join(f"--exclude {shlex.quote(name)}" for _, name in names)] = least, len(names)
    parts = [
        f"<p>Below {least:.0f} dB {_text(when)}, {count}:</p><pre>{_text(options)}</pre>"
        for options, (least, count) in lists.items()
    ]
    return "<h2>Layers to leave out</h2>" + "".join(parts) if parts else ""


def _budget_sentence(table: RecipeTable) -> str:
    if not table.picks:
        return ""
    total = sum(row.memory_bytes for row in table.picked)
    worst = min(table.picked, key=lambda row: row.quality)
    if "bytes" in table.budget:
        asked = f"at most {size(table.budget['bytes'])}"
    else:
        asked = f"at least {table.budget['sqnr_db']:g} dB for each layer"
    counts: dict[str, int] = {}
    for row in table.picked:
        counts[row.recipe] = counts.get(row.recipe, 0) + 1
    used = ", ".join(f"{recipe} for {count}" for recipe, count in sorted(counts.items(), key=lambda c: -c[1]))
    return (
        f"<p><strong>Picked for {asked}:</strong> {_text(used)}; {size(total)} together, the worst layer "
        f"{_text(worst.layer)} with {_db(worst.quality)} dB.</p>"
    )


# ---- Rows of tables ----


def _of_layer(table: RecipeTable, layer: str) -> list[tuple[str, float, bool]]:
    """(recipe, quality, whether it is picked) of a layer."""
    own = [row for row in table.rows if row.layer == layer]
    return [(row.recipe, row.quality, table.picks.get(layer) == row.recipe) for row in own]


def _worst_layers(table: RecipeTable) -> list[str]:
    return [row.layer for row in table.worst(table.recipes[0])]


def _recipe_rows(table: RecipeTable) -> tuple[list[str], list[list[str]], list[int]]:
    rows, marked = [], []
    for name, own in _sets(table):
        worst = min(own, key=lambda row: row.quality)
        total = sum(row.memory_bytes for row in own)
        rows.append([name, size(total), _db(_mean(own)), _db(worst.quality), worst.layer])
        if name == _PICKED:
            marked.append(len(rows) - 1)
    return ["Recipe", "Size", "Mean dB", "Worst dB", "Worst layer"], rows, marked


_PICKED = "picked for the budget"


def _sets(table: RecipeTable) -> list[tuple[str, list[RecipeRow]]]:
    """Each recipe, and what is picked, with its rows."""
    sets = [(name, [row for row in table.rows if row.recipe == name]) for name in table.recipes]
    return [*sets, (_PICKED, list(table.picked))] if table.picks else sets


def _mean(rows: Sequence[RecipeRow]) -> float:
    return sum(row.quality for row in rows) / len(rows)


def _layer_rows(table: RecipeTable) -> tuple[list[str], list[list[str]]]:
    by = {(row.layer, row.recipe): row for row in table.rows}
    accumulated = any(row.accumulated_sqnr_db is not None for row in table.rows)
    rows = []
    for layer in _worst_layers(table):
        cells = [layer]
        for recipe in table.recipes:
            row = by[layer, recipe]
            text = _db(row.quality) + (" ●" if table.picks.get(layer) == recipe else "")
            if accumulated:
                text += f" / {_db(row.accumulated_sqnr_db)}"
            cells.append(text)
        rows.append(cells)
    head = "Layer (● picked)" if table.picks else "Layer"
    return [head + (" local / accumulated" if accumulated else ""), *table.recipes], rows


def _tensor_rows(tensors: Sequence[TensorReport]) -> tuple[list[str], list[list[str]]]:
    head = ["Layer", "Shape", "Recipe", "Bytes", "SQNR dB", "Output dB", "Max error", "Zeros", "Clipped"]
    rows = [
        [
            layer_of(t.name),
            _shape(t.shape),
            t.recipe or "",
            str(t.bytes_after),
            _db(t.sqnr_db),
            _db(t.output_sqnr_db),
            "" if t.max_abs is None else f"{t.max_abs:.3g}",
            "" if t.zero_share is None else f"{t.zero_share:.2%}",
            "" if t.clipped_share is None else f"{t.clipped_share:.2%}",
        ]
        for t in tensors
    ]
    return head, rows


def _points(tensor: TensorReport, kinds: Sequence[str]) -> list[tuple[str, float, bool]]:
    values = {"weights": tensor.sqnr_db, "outputs": tensor.output_sqnr_db}
    return [(kind, value, False) for kind in kinds if (value := values[kind]) is not None]


def _quality(tensor: TensorReport) -> float:
    value = tensor.sqnr_db if tensor.output_sqnr_db is None else tensor.output_sqnr_db
    return math.inf if value is None or math.isnan(value) else value


# ---- Plots ----


def _svg(width: float, height: float, title: str, content: str, wide: bool = True) -> str:
    style = ' class="wide"' if wide else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(title)}">'
        f'<svg{style} viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="{_text(title)}">{content}</svg></div>'
    )


def _label(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{_text(text)}</text>'


def _mark(i: int, x: float, y: float, title: str, picked: bool) -> str:
    """A shape of its own for recipe i; what is picked has a ring."""
    color, shape = _COLORS[i % len(_COLORS)], _SHAPES[i % len(_SHAPES)]
    ring = f'<circle r="10" fill="none" stroke="{color}" stroke-width="2"/>' if picked else ""
    return (
        f'<g transform="translate({x:.1f} {y:.1f})"><title>{_text(title)}</title>{ring}'
        f'<path d="{shape}" fill="{color}" stroke="var(--bg)"/></g>'
    )


def _legend(names: Sequence[str], width: float) -> tuple[str, float]:
    """The shapes with their names, in lines; and how high that is."""
    parts, x, y = [], 10.0, 14.0
    for i, name in enumerate(names):
        needed = 30 + 6.6 * len(name)
        if x + needed > width and x > 10:
            x, y = 10.0, y + 22
        parts.append(_mark(i, x + 8, y, name, False) + _label(x + 20, y + 4, name))
        x += needed
    return "".join(parts), y + 18


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, the first at most `low`, the last at least `high`."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(f * power for f in (1, 2, 5, 10) if span / (f * power) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _scale(ticks: Sequence[float], start: float, length: float) -> Callable[[float], float]:
    low, high = ticks[0], ticks[-1]

    def at(value: float) -> float:
        inside = min(max(value, low), high)
        return start + length * (inside - low) / (high - low)

    return at


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)] or [0.0]


def _error_over_bytes(table: RecipeTable) -> str:
    sets = _sets(table)
    points = [(name, sum(row.memory_bytes for row in own), _mean(own)) for name, own in sets]
    unit, name_of_unit = next(
        (n, u)
        for n, u in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1024, "KiB"), (1, "B"))
        if n == 1 or points[0][1] >= n
    )
    x_ticks = _ticks(0, max(x for _, x, _ in points) / unit)
    y_ticks = _ticks(min(_finite(y for _, _, y in points)), max(_finite(y for _, _, y in points)))
    width, left, plot_width, plot_height = 760.0, 60.0, 660.0, 300.0
    legend, top = _legend([name for name, _, _ in points], width)
    x_at, y_at = _scale(x_ticks, left, plot_width), _scale(y_ticks, top + plot_height, -plot_height)
    parts = [legend]
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{left} {y_at(tick):.1f}h{plot_width}"/>')
        parts.append(_label(left - 8, y_at(tick) + 4, f"{tick:g}", "end"))
    for tick in x_ticks:
        parts.append(_label(x_at(tick), top + plot_height + 18, f"{tick:g}", "middle"))
    parts.append(f'<path class="axis" d="M{left} {top}v{plot_height}h{plot_width}"/>')
    parts.append(_label(left + plot_width / 2, top + plot_height + 38, f"size, {name_of_unit}", "middle"))
    middle = top + plot_height / 2
    parts.append(
        _label(0, 0, "mean SQNR, dB", "middle", f' transform="translate(16 {middle:.0f}) rotate(-90)"')
    )
    for i, (name, n_bytes, quality) in enumerate(points):
        title = f"{name}: {size(n_bytes)}, {_db(quality)} dB"
        parts.append(_mark(i, x_at(n_bytes / unit), y_at(quality), title, name == _PICKED))
    return _svg(
        width, top + plot_height + 48, "Error over bytes: mean SQNR over size, by recipe", "".join(parts)
    )


def _dots(
    title: str, names: Sequence[str], layers: Sequence[tuple[str, list[tuple[str, float, bool]]]]
) -> str:
    """A line for each layer, a shape on it for each recipe."""
    row, left = 22.0, min(330.0, 24 + 6.6 * max(len(layer) for layer, _ in layers))
    width, plot_width = 980.0, 940.0 - left
    legend, top = _legend(names, width)
    top += 18
    values = _finite(value for _, points in layers for _, value, _ in points)
    ticks = _ticks(min(values), max(values), 8)
    at = _scale(ticks, left + 12, plot_width)
    height = row * len(layers)
    parts = [legend]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{at(tick):.1f} {top}v{height}"/>')
        parts.append(_label(at(tick), top - 6, f"{tick:g} dB", "middle"))
    for j, (layer, points) in enumerate(layers):
        y = top + row * (j + 0.5)
        shown = layer if len(layer) <= 48 else "…" + layer[-47:]
        parts.append(_label(left, y + 4, shown, "end"))
        parts.append(f'<path class="grid" d="M{left + 12} {y:.1f}h{plot_width}"/>')
        for name, value, picked in points:
            told = f"{layer}, {name}: {_db(value)} dB" + (", picked" if picked else "")
            if value != math.inf:
                parts.append(_mark(list(names).index(name), at(value), y, told, picked))
        exact = [name for name, value, _ in points if value == math.inf]  # beyond every scale
        if exact:
            parts.append(_label(width - 24, y + 4, f"exact: {', '.join(exact)}", "end"))
    return _svg(width, top + height + 10, title, "".join(parts))


def _view(view: LayerView, open_first: bool) -> str:
    pieces = [f"<div>{_histogram(view)}</div>"]
    if view.channel_amax is not None and view.smoothed_amax is not None:
        pieces.append(f"<div>{_channels(view.channel_amax, view.smoothed_amax)}</div>")
    content = f'<div class="pair">{"".join(pieces)}</div>'
    return _details(f"{view.layer}, {_shape(view.shape)}", content, open_first)


def _histogram(view: LayerView) -> str:
    """How many weights have which magnitude, on a logarithmic scale, with the end of each recipe's codes."""
    width, height, left, top = 460.0, 200.0, 66.0, 12.0
    high = max([view.amax, *_finite(view.clips.values())]) or 1.0
    x_at = _scale([0, high], left, width - left - 24)
    most = math.log10(max(view.histogram) + 1) or 1.0
    step = (x_at(view.amax or high) - left) / len(view.histogram)
    parts = []
    for power in range(math.floor(most) + 1):
        y = top + height * (1 - power / most)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - 24}"/>')
        parts.append(_label(left - 6, y + 4, f"{10**power:,}", "end"))
    for i, count in enumerate(view.histogram):
        bar = height * math.log10(count + 1) / most
        parts.append(
            f'<rect x="{left + i * step:.1f}" y="{top + height - bar:.1f}" width="{max(step - 1, 0.5):.1f}" '
            f'height="{bar:.1f}" fill="#0072b2" opacity=".55"/>'
        )
    for i, (name, clip) in enumerate(view.clips.items()):
        color = _COLORS[i % len(_COLORS)]
        parts.append(
            f'<path d="M{x_at(clip):.1f} {top}v{height}" stroke="{color}" stroke-width="2" '
            f'stroke-dasharray="{2 + 2 * i} 3"><title>{_text(name)}: codes end at {clip:.3g}</title></path>'
        )
    for tick in (0.0, high / 2, high):
        parts.append(_label(x_at(tick), top + height + 18, f"{tick:.3g}", "middle"))
    parts.append(f'<path class="axis" d="M{left} {top}v{height}H{width - 24}"/>')
    parts.append(_label(left, top + height + 38, "|w|; dashed: where the codes of a recipe end"))
    title = f"Histogram of the magnitudes of the weights of {view.layer}"
    return _svg(width, top + height + 48, title, "".join(parts), wide=False)


def _channels(before: Sequence[float], after: Sequence[float]) -> str:
    """The largest magnitude of channels of the inputs, before and after smoothing, on a logarithmic scale."""
    width, height, left, top = 460.0, 200.0, 66.0, 12.0
    positive = [v for v in (*before, *after) if v > 0 and math.isfinite(v)] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)) + 1e-9)
    high = max(high, low + 1)
    y_at = _scale([low, high], top + height, -height)
    x_at = _scale([0, max(len(before) - 1, 1)], left, width - left - 24)
    parts = []
    for power in range(low, high + 1):
        parts.append(f'<path class="grid" d="M{left} {y_at(power):.1f}H{width - 24}"/>')
        parts.append(_label(left - 6, y_at(power) + 4, f"{10.0**power:g}", "end"))
    for values, color, dash, name in (
        (before, _COLORS[1], "", "before"),
        (after, _COLORS[0], "5 3", "after"),
    ):
        points = " ".join(
            f"{x_at(i):.1f},{y_at(math.log10(v) if v > 0 else low):.1f}" for i, v in enumerate(values)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" '
            f'stroke-dasharray="{dash}"><title>{name} smoothing</title></polyline>'
        )
    parts.append(f'<path class="axis" d="M{left} {top}v{height}H{width - 24}"/>')
    parts.append(_label(left, top + height + 18, "channels, largest first"))
    parts.append(_label(left, top + height + 38, "solid: max|x| before smoothing; dashed: after"))
    return _svg(
        width, top + height + 48, "Largest magnitude of each input channel", "".join(parts), wide=False
    )
