"""How much of an exact search in float32 remains when vectors are quantized, at which size and speed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._files import write_text
from ._index import EmbeddingIndex
from ._top_k import as_queries, checked_metric
from ._validate import F32, as_count, as_matrix, as_thread_count, check_finite
from .errors import ParameterError, shown

if TYPE_CHECKING:
    import os

    from numpy.typing import ArrayLike, NDArray

# Options of `EmbeddingIndex`, and what `search` shall rescore from.
_RECIPES: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8, rescored": {"oversample": 4},
    "4 bits, groups of 32": {"bits": 4, "group_size": 32},
    "4 bits, groups of 32, rescored": {"bits": 4, "group_size": 32, "oversample": 4},
    "4 bits, rotated": {"bits": 4, "group_size": 32, "hadamard": True},
    "4 bits, rotated, rescored": {"bits": 4, "group_size": 32, "hadamard": True, "oversample": 4},
}

# Vectors whose float32 scores are in memory together, for up to _QUERIES queries.
_VECTORS = 1 << 14
_QUERIES = 256

# A search is repeated until it took so long, so that its time can be told.
_SECONDS = 0.2


@dataclass(frozen=True)
class RecallRow:
    """One recipe of a `RecallReport`.

    Attributes
    ----------
    name : str
    recall : float
        Share of the k best by float32 scores that are among the k found.
    memory_bytes : int
        Of the index. Rescoring reads some rows of the float vectors besides, which may stay on disk.
    queries_per_second : float
        All queries in one call.
    rescored : bool
    """

    name: str
    recall: float
    memory_bytes: int
    queries_per_second: float
    rescored: bool


@dataclass(frozen=True)
class RecallReport:
    """What `recall_report` found. ``str()`` is a table.

    Attributes
    ----------
    rows : tuple of RecallRow
        The first is float32, which the others are measured by.
    n, dim, queries, k : int
    """

    rows: tuple[RecallRow, ...]
    n: int
    dim: int
    queries: int
    k: int

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{self.n} vectors of {self.dim}, {self.queries} queries"]
        lines.append(f"{'':{width}}  {f'recall@{self.k}':>10}  {'bytes/vector':>12}  {'queries/s':>10}")
        for row in self.rows:
            size, speed = row.memory_bytes / self.n, row.queries_per_second
            lines.append(f"{row.name:{width}}  {row.recall:10.4f}  {size:12.1f}  {speed:10.0f}")
        return "\n".join(lines)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page with the table and a plot, which needs no other file.

        Parameters
        ----------
        path : str or os.PathLike

        Raises
        ------
        OSError
            If it cannot be written.
        """
        write_text(path, _page(self))


def recall_report(
    vectors: ArrayLike,
    queries: ArrayLike,
    k: int = 10,
    *,
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
    metric: str = "dot",
    num_threads: int = 1,
) -> RecallReport:
    """Recall, size and speed of quantized search, on your own vectors.

    Parameters
    ----------
    vectors : array_like of floats, (n, d)
    queries : array_like of floats, (q, d)
    k : int
        Hits that are compared, at most n.
    recipes : mapping of str to mapping, optional
        Name to options of `EmbeddingIndex`; with ``oversample`` the best ``k * oversample`` are scored again
        from `vectors`. By default int8 and 4 bits in groups of 32, plain and rotated, each with and without.
    metric : {"dot", "cosine", "l2"}
    num_threads : int
        As for `top_k`.

    Returns
    -------
    RecallReport

    Raises
    ------
    DTypeError, ShapeMismatchError, EmptyInputError, NonFiniteError
        If the arrays do not hold floats of such shapes.
    ParameterError
        If another argument has a value that it cannot take.

    Notes
    -----
    The reference are scores in float32, by NumPy's product of matrices. Times are those of the fastest of
    some searches of all queries together.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> report = recall_report(rng.standard_normal((500, 32)), rng.standard_normal((20, 32)), 5)
    >>> report.rows[0].name, report.rows[0].recall
    ('float32', 1.0)
    """
    x = as_matrix(vectors, "vectors", "(n, d)")
    check_finite(x, "vectors")
    q = as_queries(queries, x.shape[1])
    check_finite(q, "queries")
    k, threads = as_count(k, "k"), as_thread_count(num_threads)
    checked_metric(metric)
    if len(q) == 0:
        raise ParameterError("queries: expected at least one, got none")
    if k > len(x):
        raise ParameterError(f"k: expected at most the number of vectors, {len(x)}, got {k}")
    chosen = _checked_recipes(recipes)
    exact, seconds = _timed(lambda: _by_float32(x, q, k, metric))
    rows = [RecallRow("float32", 1.0, 4 * x.size, len(q) / seconds, False)]
    for name, recipe in chosen.items():
        rows.append(_measured(name, dict(recipe), x, q, k, metric, exact, threads))
    return RecallReport(tuple(rows), len(x), x.shape[1], len(q), k)


def _checked_recipes(recipes: Any) -> Mapping[str, Mapping[str, Any]]:
    if recipes is None:
        return _RECIPES
    if not isinstance(recipes, Mapping) or not recipes:
        raise ParameterError(f"recipes: expected a mapping of names to options, got {shown(recipes)}")
    allowed = {"bits", "group_size", "hadamard", "center", "oversample"}
    for name, recipe in recipes.items():
        if not isinstance(name, str) or not isinstance(recipe, Mapping) or set(recipe) - allowed:
            raise ParameterError(
                f"recipes: expected names with options {sorted(allowed)}, got {shown(name)}: {shown(recipe)}"
            )
    return recipes


def _measured(
    name: str,
    recipe: dict[str, Any],
    x: NDArray[Any],
    q: NDArray[Any],
    k: int,
    metric: str,
    exact: NDArray[np.int64],
    threads: int,
) -> RecallRow:
    rescored = "oversample" in recipe
    options = {"rescore": x, "oversample": recipe.pop("oversample")} if rescored else {}
    index = EmbeddingIndex(x.shape[1], metric=metric, **recipe)
    index.add(x)
    found, seconds = _timed(lambda: index.search(q, k, num_threads=threads, **options).indices)
    hits = sum(np.isin(a, b).sum() for a, b in zip(exact, found, strict=True))
    return RecallRow(name, float(hits / exact.size), index.memory_bytes, len(q) / seconds, rescored)


def _timed(search: Callable[[], NDArray[np.int64]]) -> tuple[NDArray[np.int64], float]:
    """What a search gives, and the seconds that the fastest of some took."""
    best, total = float("inf"), 0.0
    while True:
        start = time.perf_counter()
        result = search()
        seconds = max(time.perf_counter() - start, 1e-9)
        best, total = min(best, seconds), total + seconds
        if total >= _SECONDS:
            return result, best


def _by_float32(x: NDArray[Any], q: NDArray[Any], k: int, metric: str) -> NDArray[np.int64]:
    """Indices (q, k) of the best by float32 scores, in any order."""
    found = [_by_float32_part(x, q[i : i + _QUERIES], k, metric) for i in range(0, len(q), _QUERIES)]
    return np.concatenate(found)


def _by_float32_part(x: NDArray[Any], q: NDArray[Any], k: int, metric: str) -> NDArray[np.int64]:
    q = _unit(q, metric)
    best = np.empty((len(q), 0), F32)
    indices = np.empty((len(q), 0), np.int64)
    for start in range(0, len(x), _VECTORS):
        block = _unit(x[start : start + _VECTORS], metric)
        scores = q @ block.T
        if metric == "l2":
            scores = 2 * scores - (block * block).sum(1)
        keep = min(k, scores.shape[1])
        part = np.argpartition(-scores, keep - 1, axis=1)[:, :keep]
        best = np.hstack([best, np.take_along_axis(scores, part, 1)])
        indices = np.hstack([indices, part + start])
        keep = min(k, best.shape[1])
        part = np.argpartition(-best, keep - 1, axis=1)[:, :keep]
        best, indices = np.take_along_axis(best, part, 1), np.take_along_axis(indices, part, 1)
    return indices


def _unit(x: NDArray[Any], metric: str) -> NDArray[np.float32]:
    """x in float32, of length 1 for the cosine."""
    x = x.astype(F32, copy=False)
    if metric != "cosine":
        return x
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    norms[norms == 0] = 1
    unit: NDArray[np.float32] = (x / norms).astype(F32, copy=False)
    return unit


# The plot, in pixels: the area of the axes, and what stands around it.
_LEFT, _TOP, _WIDTH, _HEIGHT, _NAMES = 70, 20, 480, 300, 220

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 52rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
text { font: 12px system-ui, sans-serif; fill: #222; }
"""


def _page(report: RecallReport) -> str:
    import html  # here, because most programs never need it

    cells = "".join(
        f"<tr><td>{html.escape(row.name)}</td><td>{row.recall:.4f}</td>"
        f"<td>{row.memory_bytes / report.n:.1f}</td>"
        f"<td>{4 * report.n * report.dim / row.memory_bytes:.1f}</td>"
        f"<td>{row.queries_per_second:.0f}</td></tr>"
        for row in report.rows
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<title>Recall of quantized search</title>"
        f"<style>{_STYLE}</style></head><body>\n<h1>Recall of quantized search</h1>\n"
        f"<p>{report.n} vectors of {report.dim}, {report.queries} queries. Recall@{report.k} is the share of "
        f"the {report.k} best by float32 scores that are among the {report.k} found.</p>\n"
        f"<table><thead><tr><th>Recipe</th><th>Recall@{report.k}</th><th>Bytes per vector</th>"
        f"<th>Times smaller</th><th>Queries per second</th></tr></thead><tbody>{cells}</tbody></table>\n"
        f"{_plot(report)}\n"
        "<p>A circle is hollow where the best hits are scored again from the float vectors.</p>\n"
        "</body></html>\n"
    )


def _plot(report: RecallReport) -> str:
    """Recall over bytes per vector as SVG: a dot for each recipe, its name at the side."""
    import html

    sizes = [row.memory_bytes / report.n for row in report.rows]
    x_ticks = _ticks(0.0, max(sizes))
    y_ticks = _ticks(min(0.98, *(row.recall for row in report.rows)), 1.0)
    low, right = y_ticks[0], _LEFT + _WIDTH

    def at(size: float, recall: float) -> tuple[float, float]:
        return _LEFT + _WIDTH * size / x_ticks[-1], _TOP + _HEIGHT * (1 - recall) / (1 - low)

    points = [at(size, row.recall) for size, row in zip(sizes, report.rows, strict=True)]
    heights = _label_heights(points)
    bottom = max(_TOP + _HEIGHT + 50, math.ceil(max(heights)) + 20)
    parts = [
        f'<svg viewBox="0 0 {right + _NAMES} {bottom}" width="{right + _NAMES}" role="img" '
        'aria-label="Recall over bytes per vector">'
    ]
    for recall in y_ticks:
        _, y = at(0, recall)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{recall:.3g}</text>')
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#e5e5e5"/>')
    for size in x_ticks:
        x, _ = at(size, 1)
        parts.append(f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{size:.0f}</text>')
    parts.append(
        f'<path d="M{_LEFT} {_TOP}V{_TOP + _HEIGHT}H{right}" fill="none" stroke="#888"/>'
        f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 40}" text-anchor="middle">'
        "bytes per vector</text>"
        f'<text transform="translate(16 {_TOP + _HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"recall@{report.k}</text>"
    )
    for (x, y), height in zip(points, heights, strict=True):
        parts.append(f'<path d="M{x:.1f} {y:.1f}L{right + 12} {height:.1f}" stroke="#ccc"/>')
    for row, (x, y), height in zip(report.rows, points, heights, strict=True):
        fill = "white" if row.rescored else "#1f6feb"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="#1f6feb" stroke-width="2"/>'
            f'<text x="{right + 16}" y="{height + 4:.1f}">{html.escape(row.name)}</text>'
        )
    return "\n".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers, the first at most `low`, the last at least `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _label_heights(points: list[tuple[float, float]]) -> list[float]:
    """Where names stand, in the order of the points: each at least a line below the one above it."""
    heights = [0.0] * len(points)
    taken = -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0])):
        taken = heights[i] = max(points[i][1], taken + 16)
    return heights
