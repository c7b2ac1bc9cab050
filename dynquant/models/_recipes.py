"""Several ways to quantize the same weights, measured side by side."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .._batches import row_batches
from .._linear import QuantLinear
from .._metrics import error_metrics
from .._smooth import compute_smooth_factors
from .._validate import F32, as_matrix, as_number, check_finite
from ..errors import EmptyInputError, ParameterError, shown
from ._file import ModelFile, open_model
from ._measure import ratio_db
from ._quantize import chosen_layers
from ._report import Written, decibels, layer_of, plain, printable, size, table

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Options of `QuantLinear.from_float`; calibrated ones need rows.
_RECIPES: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8 rotated": {"hadamard": True},
    "int4 g32": {"bits": 4, "group_size": 32},
    "int4 g32 searched": {"bits": 4, "group_size": 32, "search": True},
    "int4 g32 rotated": {"bits": 4, "group_size": 32, "hadamard": True},
    "int4 g128": {"bits": 4, "group_size": 128},
}
_CALIBRATED: dict[str, dict[str, Any]] = {
    "int8 smoothed": {"smooth": 0.5},
    "int4 g32 compensated": {"bits": 4, "group_size": 32, "calibration": True},
    "int4 g32 compensated, rotated": {
        "bits": 4,
        "group_size": 32,
        "calibration": True,
        "hadamard": True,
    },
}

_OPTIONS = {
    "bits",
    "group_size",
    "symmetric",
    "search",
    "smooth",
    "hadamard",
    "calibration",
    "relative",
    "activation_symmetric",
    "activation_bits",
}

# Rows whose outputs are compared at most, and that are kept in memory.
_OUTPUT_ROWS = 512
_ROWS = 1 << 14

_BINS = 48


@dataclass(frozen=True)
class RecipeRow:
    """One recipe for one layer of a `RecipeTable`.

    Attributes
    ----------
    layer, recipe : str
    memory_bytes : int
        Of weights, scales, and all else but the bias.
    sqnr_db, max_abs : float
        Of the weights: power over power of the error in decibels, and the largest error.
    output_sqnr_db : float or None
        The same of the layer's output on the rows, activations quantized too.
    accumulated_sqnr_db : float or None
        The same where the inputs are those of the quantized model, against the outputs of the float model.
    """

    layer: str
    recipe: str
    memory_bytes: int
    sqnr_db: float
    max_abs: float
    output_sqnr_db: float | None = None
    accumulated_sqnr_db: float | None = None

    @property
    def quality(self) -> float:
        """What recipes are ranked by: SQNR of the output, or without rows of the weights, in decibels."""
        value = self.sqnr_db if self.output_sqnr_db is None else self.output_sqnr_db
        return -math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class LayerView:
    """What a page draws of a layer.

    Attributes
    ----------
    layer : str
    shape : tuple of int
    histogram : tuple of int
        How many weights have which magnitude, in equal bins from 0 to `amax`.
    amax : float
        The largest magnitude.
    clips : dict
        Recipe -> the largest magnitude that its codes stand for.
    channel_amax : tuple of float or None
        The largest magnitude of each channel of the rows, largest first; up to 200 of them, evenly.
    smoothed_amax : tuple of float or None
        The same channels after smoothing with alpha 0.5.
    """

    layer: str
    shape: tuple[int, ...]
    histogram: tuple[int, ...]
    amax: float
    clips: dict[str, float]
    channel_amax: tuple[float, ...] | None = None
    smoothed_amax: tuple[float, ...] | None = None


@dataclass(frozen=True)
class RecipeTable(Written):
    """What `compare_recipes` measured. ``str()`` is a table.

    Attributes
    ----------
    rows : tuple of RecipeRow
        Layer by layer, recipe by recipe.
    picks : dict of str to str
        Layer -> the recipe that the budget chooses; without a budget empty.
    budget : dict
    views : tuple of LayerView
    """

    rows: tuple[RecipeRow, ...]
    picks: dict[str, str]
    budget: dict[str, float]
    views: tuple[LayerView, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    @property
    def recipes(self) -> tuple[str, ...]:
        """Names of the recipes."""
        return tuple(dict.fromkeys(row.recipe for row in self.rows))

    @property
    def picked(self) -> tuple[RecipeRow, ...]:
        """The rows that the budget chooses."""
        return tuple(row for row in self.rows if self.picks.get(row.layer) == row.recipe)

    @property
    def best(self) -> RecipeRow:
        """The row that the budget chooses; of several layers, or without a budget, the best one."""
        picked = self.picked
        return picked[0] if len(picked) == 1 else max(picked or self.rows, key=lambda row: row.quality)

    def worst(self, recipe: str) -> tuple[RecipeRow, ...]:
        """The rows of a recipe, the worst first."""
        return tuple(sorted((row for row in self.rows if row.recipe == recipe), key=lambda row: row.quality))

    def exclude(self, recipe: str, below: float) -> tuple[str, ...]:
        """Names to exclude, ready to paste: layers that a recipe leaves with less than `below` decibels."""
        return tuple(row.layer for row in self.worst(recipe) if row.quality < below)

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def to_dict(self) -> dict[str, Any]:
        """The table as dicts, lists and numbers, as in the JSON. NaN and infinity are None."""
        content = {
            "budget": self.budget,
            "picks": self.picks,
            "rows": [asdict(row) for row in self.rows],
            "layers": [asdict(view) for view in self.views],
        }
        result: dict[str, Any] = plain(content)
        return result

    def _page(self) -> str:
        from ._html import recipes_page

        return recipes_page(self)


def compare_recipes(
    weight: Any,
    rows: Any = None,
    *,
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
    budget: int | Mapping[str, float] | None = None,
    quantized_rows: Any = None,
    num_threads: int = 1,
) -> RecipeTable:
    """Bytes and measured errors of several ways to quantize the same weights.

    Parameters
    ----------
    weight : array_like of floats (out_features, in_features); or mapping, ModelFile, str or os.PathLike
        One weight; several by name; or a model, whose linear layers are taken as by `quantize_model`.
    rows : array_like, iterable of arrays, or mapping, optional
        Inputs that the layer has had, (..., in_features); of several layers by name. Layers without any are
        measured by their weights alone.
    recipes : mapping of str to mapping, optional
        Name -> options of `QuantLinear.from_float`. ``"smooth": alpha`` computes factors from the rows, and
        ``"calibration": True`` takes these. By default int8 and 4 bits, plain, rotated and, with rows,
        smoothed and compensated.
    budget : int or mapping, optional
        ``{"bytes": n}``, or just n: the recipes that together have at most n bytes and the least error.
        ``{"sqnr_db": x}``: for each layer the smallest recipe of at least x decibels.
    quantized_rows : as `rows`, optional
        The inputs that the same tokens give the layer in the quantized model: row i belongs to row i of
        `rows`. They tell the accumulated error.
    num_threads : int
        As for `dynamic_quantize`.

    Returns
    -------
    RecipeTable

    Raises
    ------
    ParameterError
        If a recipe or the budget is not as described, or nothing fits the budget; if rows are named that
        belong to no layer; if a recipe needs rows and there are none.
    DTypeError, ShapeMismatchError, FeatureDimMismatchError, EmptyInputError, NonFiniteError
        If a weight or rows are no floats of fitting shapes.

    Notes
    -----
    Everything is measured, nothing is estimated. Of up to 16,384 rows the last quarter, at most 512, are held
    out: outputs are compared on these, codes and factors come from the others. With ``{"bytes": n}`` layers
    begin with their smallest recipe, and as long as bytes remain the step is taken that removes the most
    error power for each byte, relative to the power of the layer's output; layers then count alike.

    Examples
    --------
    >>> w = np.random.default_rng(0).standard_normal((64, 128))
    >>> table = compare_recipes(w, budget={"sqnr_db": 30})
    >>> table.best.recipe, table.best.memory_bytes
    ('int8', 8448)
    """
    weights = _weights_of(weight)
    inputs = _rows_by_layer(rows, weights, "rows")
    quantized = _rows_by_layer(quantized_rows, weights, "quantized_rows")
    chosen = _checked_recipes(recipes, bool(inputs))
    limits = _checked_budget(budget)
    found: list[RecipeRow] = []
    views = []
    for layer, get in weights.items():
        w = as_matrix(get(), layer, "(out_features, in_features)")
        check_finite(w, layer)
        w = w.astype(F32, copy=False)
        x = _gathered(inputs.get(layer), layer, w.shape[1])
        xq = _gathered(quantized.get(layer), layer, w.shape[1])
        if xq is not None and (x is None or len(xq) != len(x)):
            raise ParameterError(f"quantized_rows: expected as many rows as rows has for {shown(layer)}")
        clips = {}
        for name, recipe in chosen.items():
            row, clips[name] = _measured(layer, name, dict(recipe), w, x, xq, num_threads)
            found.append(row)
        views.append(_view(layer, w, x, clips))
    return RecipeTable(tuple(found), _picks(found, limits), limits, tuple(views))


# ---- Arguments ----


def _weights_of(weight: Any) -> dict[str, Any]:
    """{layer: a function that gives its weight}."""
    if isinstance(weight, (str, os.PathLike)):
        weight = open_model(weight)
    if isinstance(weight, ModelFile):
        model = weight
        names = chosen_layers(model)
        return {layer_of(name): (lambda name=name: model.rows(name)) for name in names}
    if isinstance(weight, Mapping):
        if not weight or not all(isinstance(name, str) for name in weight):
            raise ParameterError(f"weight: expected names of weights, got {shown(weight)}")
        return {layer_of(name): (lambda w=w: w) for name, w in weight.items()}
    return {"weight": lambda: weight}


def _rows_by_layer(rows: Any, weights: Mapping[str, Any], name: str) -> dict[str, Any]:
    if rows is None:
        return {}
    if isinstance(rows, (str, os.PathLike)):
        from ._calibration import read_rows

        rows = read_rows(os.fspath(rows))
    if not isinstance(rows, Mapping):
        if list(weights) != ["weight"]:
            raise ParameterError(f"{name}: expected a mapping of layers to rows, got {shown(rows)}")
        return {"weight": rows}
    found = {}
    for key, value in rows.items():
        layer = layer_of(key) if isinstance(key, str) else key
        if layer not in weights:
            raise ParameterError(f"{name}: expected names of layers, got {shown(key)}")
        found[layer] = value
    return found


def _gathered(rows: Any, layer: str, k: int) -> NDArray[np.float32] | None:
    """Up to _ROWS rows of a layer in memory."""
    if rows is None:
        return None
    kept: list[NDArray[Any]] = []
    for batch in row_batches(rows, f"rows[{layer!r}]", k):
        kept.append(batch[: _ROWS - sum(map(len, kept))].astype(F32))
        if sum(map(len, kept)) >= _ROWS:
            break
    if not kept:
        raise EmptyInputError(f"rows: expected at least one row of {shown(layer)}, got none")
    return np.concatenate(kept)


def _checked_recipes(recipes: Any, with_rows: bool) -> Mapping[str, Mapping[str, Any]]:
    if recipes is None:
        return {**_RECIPES, **_CALIBRATED} if with_rows else _RECIPES
    if not isinstance(recipes, Mapping) or not recipes:
        raise ParameterError(f"recipes: expected a mapping of names to options, got {shown(recipes)}")
    for name, recipe in recipes.items():
        if not isinstance(name, str) or not isinstance(recipe, Mapping) or set(recipe) - _OPTIONS:
            raise ParameterError(
                f"recipes: expected names with options {sorted(_OPTIONS)}, got {shown(name)}: {shown(recipe)}"
            )
        if not with_rows and ("smooth" in recipe or "calibration" in recipe):
            raise ParameterError(f"recipes: expected none that needs rows, got {shown(name)}")
    return recipes


def _checked_budget(budget: Any) -> dict[str, float]:
    if budget is None:
        return {}
    if not isinstance(budget, Mapping):
        budget = {"bytes": budget}
    if len(budget) != 1 or not set(budget) <= {"bytes", "sqnr_db"}:
        raise ParameterError(f"budget: expected bytes, or 'bytes' or 'sqnr_db', got {shown(budget)}")
    ((kind, value),) = budget.items()
    number = as_number(value, f"budget[{kind!r}]")
    if not math.isfinite(number) or (kind == "bytes" and number < 1):
        raise ParameterError(f"budget: expected a positive number of bytes, or decibels, got {shown(value)}")
    return {kind: number}


# ---- Measuring ----


def _measured(
    layer: str,
    name: str,
    recipe: dict[str, Any],
    w: NDArray[np.float32],
    x: NDArray[np.float32] | None,
    xq: NDArray[np.float32] | None,
    threads: int,
) -> tuple[RecipeRow, float]:
    """A row, and the largest magnitude that the codes stand for."""
    if "calibration" in recipe:
        recipe["calibration"] = _split(x)[0] if recipe["calibration"] and x is not None else None
    if recipe.get("smooth") is not None and not isinstance(recipe["smooth"], np.ndarray):
        recipe["smooth"] = None if x is None else _factors(_split(x)[0], w, recipe["smooth"])
    made = QuantLinear.from_float(w, num_threads=threads, **recipe)
    values = made.weight_dequantized()
    weights = error_metrics(w, values)
    local = accumulated = None
    if x is not None:
        held = _split(x)[1]
        with np.errstate(all="ignore"):
            exact = held @ w.T
            local = _sqnr(exact, made(held, num_threads=threads))
            if xq is not None:
                accumulated = _sqnr(exact, made(_split(xq)[1], num_threads=threads))
    row = RecipeRow(layer, name, made.memory_bytes, weights.sqnr_db, weights.max_abs, local, accumulated)
    return row, float(np.abs(values).max())


def _split(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows that codes are chosen from, and those that outputs are compared on; of few rows all for both."""
    held = min(_OUTPUT_ROWS, len(rows) // 4)
    return (rows[:-held], rows[-held:]) if held else (rows, rows)


def _factors(x: NDArray[np.float32], w: NDArray[np.float32], alpha: Any) -> NDArray[np.float32]:
    from .._smooth import SmoothQuantConfig

    return compute_smooth_factors(x, w, SmoothQuantConfig(alpha))


def _sqnr(exact: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    difference = y.astype(np.float64) - exact
    return ratio_db(float((exact.astype(np.float64) ** 2).sum()), float((difference**2).sum()))


def _view(
    layer: str, w: NDArray[np.float32], x: NDArray[np.float32] | None, clips: dict[str, float]
) -> LayerView:
    magnitudes = np.abs(w)
    amax = float(magnitudes.max())
    histogram, _ = np.histogram(magnitudes, _BINS, (0, amax or 1))
    before = after = None
    if x is not None:
        channels = np.abs(x).max(axis=0)
        order = np.argsort(-channels, kind="stable")
        order = order[np.linspace(0, len(order) - 1, min(len(order), 200)).astype(int)]
        before = tuple(channels[order].tolist())
        after = tuple((channels / _factors(x, w, 0.5))[order].tolist())
    return LayerView(layer, w.shape, tuple(histogram.tolist()), amax, clips, before, after)


# ---- The choice ----


def _picks(rows: list[RecipeRow], budget: dict[str, float]) -> dict[str, str]:
    by_layer: dict[str, list[RecipeRow]] = {}
    for row in rows:
        by_layer.setdefault(row.layer, []).append(row)
    if "sqnr_db" in budget:
        return {layer: _smallest(own, budget["sqnr_db"]).recipe for layer, own in by_layer.items()}
    if "bytes" in budget:
        return _within(by_layer, budget["bytes"])
    return {}


def _smallest(rows: list[RecipeRow], least: float) -> RecipeRow:
    good = [row for row in rows if row.quality >= least]
    if not good:
        best = max(rows, key=lambda row: row.quality)
        raise ParameterError(
            f"budget: expected at most the {best.quality:.1f} dB that {best.recipe!r} has for "
            f"{shown(best.layer)}, got {least}"
        )
    return min(good, key=lambda row: (row.memory_bytes, -row.quality))


def _within(by_layer: dict[str, list[RecipeRow]], most: float) -> dict[str, str]:
    """Steps along each layer's convex hull of error over bytes, the best step of all layers first.

    Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers" (IEEE Transactions on
    Acoustics, Speech, and Signal Processing, 1988).
    """
    hulls = {layer: _hull(rows) for layer, rows in by_layer.items()}
    at = dict.fromkeys(hulls, 0)
    used = sum(hull[0].memory_bytes for hull in hulls.values())
    if used > most:
        raise ParameterError(
            f"budget: expected at least the {used} bytes of the smallest recipes, got {most}"
        )
    steps = sorted(
        (
            (
                -(_noise(a) - _noise(b)) / (b.memory_bytes - a.memory_bytes),
                layer,
                i,
                b.memory_bytes - a.memory_bytes,
            )
            for layer, hull in hulls.items()
            for i, (a, b) in enumerate(itertools.pairwise(hull))
        ),
        key=lambda step: (step[0], step[2]),
    )
    for _, layer, i, more in steps:
        if i == at[layer] and used + more <= most:
            at[layer], used = i + 1, used + more
    return {layer: hull[at[layer]].recipe for layer, hull in hulls.items()}


def _noise(row: RecipeRow) -> float:
    """Error power over power."""
    return float(10 ** (-row.quality / 10))


def _hull(rows: list[RecipeRow]) -> list[RecipeRow]:
    """The rows on the lower convex hull of error over bytes, from the smallest on."""
    hull: list[RecipeRow] = []
    for row in sorted(rows, key=lambda row: (row.memory_bytes, _noise(row))):
        if hull and _noise(row) >= _noise(hull[-1]):
            continue
        while len(hull) > 1 and _slope(hull[-2], row) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(row)
    return hull


def _slope(a: RecipeRow, b: RecipeRow) -> float:
    return (_noise(b) - _noise(a)) / (b.memory_bytes - a.memory_bytes)


# ---- Text ----

# Layers of a table in a terminal.
_SHOWN = 10


def _lines(found: RecipeTable) -> list[str]:
    if len(found.layers) == 1:
        return _lines_of_layer(found, found.rows)
    lines = _totals(found)
    for recipe in found.recipes[:1]:
        worst = found.worst(recipe)
        rows = [[f"worst layers of {recipe}", "bytes", "SQNR dB", "output dB", "accumulated dB", "picked"]]
        rows += [
            [
                printable(row.layer),
                str(row.memory_bytes),
                decibels(row.sqnr_db),
                decibels(row.output_sqnr_db),
                decibels(row.accumulated_sqnr_db),
                found.picks.get(row.layer, ""),
            ]
            for row in worst[:_SHOWN]
        ]
        lines += ["", *table(rows)]
        if len(worst) > _SHOWN:
            lines.append(f"... and {len(worst) - _SHOWN} more")
    return lines


def _lines_of_layer(found: RecipeTable, own: tuple[RecipeRow, ...]) -> list[str]:
    accumulated = any(row.accumulated_sqnr_db is not None for row in own)
    output = any(row.output_sqnr_db is not None for row in own)
    rows = [
        ["recipe", "bytes", "SQNR dB", "max error"]
        + ["output dB"] * output
        + ["accumulated dB"] * accumulated
    ]
    for row in own:
        mark = " *" if found.picks.get(row.layer) == row.recipe else ""
        rows.append(
            [row.recipe + mark, str(row.memory_bytes), decibels(row.sqnr_db), f"{row.max_abs:.3g}"]
            + [decibels(row.output_sqnr_db)] * output
            + [decibels(row.accumulated_sqnr_db)] * accumulated
        )
    return table(rows)


def _totals(found: RecipeTable) -> list[str]:
    rows = [["recipe", "size", "mean dB", "worst dB", "worst layer"]]
    sets = [(recipe, [row for row in found.rows if row.recipe == recipe]) for recipe in found.recipes]
    if found.picks:
        sets.append(("picked for the budget", list(found.picked)))
    for name, own in sets:
        worst = min(own, key=lambda row: row.quality)
        mean = sum(row.quality for row in own) / len(own)
        total = sum(row.memory_bytes for row in own)
        rows.append([name, size(total), f"{mean:.1f}", f"{worst.quality:.1f}", printable(worst.layer)])
    return table(rows)
