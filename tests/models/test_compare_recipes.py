"""compare_recipes: what it measures and picks; its table, JSON and page."""

import itertools
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import models
from helpers.common import F32, real_layer

from dynquant import (
    EmptyInputError,
    FeatureDimMismatchError,
    NonFiniteError,
    ParameterError,
    QuantLinear,
    ShapeMismatchError,
    compare_recipes,
    compute_smooth_factors,
    error_metrics,
)


def weights():
    rng = np.random.default_rng(0)
    return {f"layer{i}": (rng.standard_normal((24, 64)) * 2**i).astype(F32) for i in range(4)}


def rows(n=80):
    rng = np.random.default_rng(1)
    return {f"layer{i}": (rng.standard_normal((n, 64)) * (1 + i)).astype(F32) for i in range(4)}


def test_every_figure_is_measured():
    w, x = weights()["layer0"], rows()["layer0"]
    quantized = x + F32(0.01)
    recipes = {
        "8": {},
        "4": {"bits": 4, "group_size": 32, "calibration": True, "hadamard": True},
        "s": {"smooth": 0.5},
    }
    table = compare_recipes(w, x, recipes=recipes, quantized_rows=quantized)
    used, held = x[:60], x[60:]
    made = {
        "8": QuantLinear.from_float(w),
        "4": QuantLinear.from_float(w, bits=4, group_size=32, calibration=used, hadamard=True),
        "s": QuantLinear.from_float(w, smooth=compute_smooth_factors(used, w)),
    }
    assert table.recipes == tuple(recipes)
    assert table.layers == ("weight",)
    for row in table.rows:
        layer = made[row.recipe]
        metrics = error_metrics(w, layer.weight_dequantized())
        assert row.memory_bytes == layer.memory_bytes
        assert row.sqnr_db == pytest.approx(metrics.sqnr_db, abs=1e-6)
        assert row.max_abs == metrics.max_abs
        exact = held @ w.T
        assert row.output_sqnr_db == pytest.approx(error_metrics(exact, layer(held)).sqnr_db, abs=1e-4)
        accumulated = error_metrics(exact, layer(quantized[60:])).sqnr_db
        assert row.accumulated_sqnr_db == pytest.approx(accumulated, abs=1e-4)
    text = str(table)
    assert "accumulated dB" in text
    assert len(text.splitlines()) == 4


def test_budget_of_decibels():
    table = compare_recipes(weights(), budget={"sqnr_db": 30})
    assert set(table.picks.values()) == {"int8"}
    for row in table.picked:
        others = [r for r in table.rows if r.layer == row.layer and r.quality >= 30]
        assert row.memory_bytes == min(r.memory_bytes for r in others)
    with pytest.raises(ParameterError, match=r"budget: expected at most the \d+\.\d dB that"):
        compare_recipes(weights(), budget={"sqnr_db": 200})


def test_budget_of_bytes_is_nearly_the_best():
    w, x = weights(), rows()
    recipes = {"8": {}, "4": {"bits": 4, "group_size": 32}, "4r": {"bits": 4}}
    free = compare_recipes(w, x, recipes=recipes)
    assert free.picks == {}
    by = {(row.layer, row.recipe): row for row in free.rows}
    least = sum(min(by[layer, r].memory_bytes for r in recipes) for layer in w)
    most = sum(max(by[layer, r].memory_bytes for r in recipes) for layer in w)
    for budget in np.linspace(least, most, 7).astype(int).tolist():
        table = compare_recipes(w, x, recipes=recipes, budget=budget)
        used = sum(row.memory_bytes for row in table.picked)
        assert used <= budget
        noise = sum(10 ** (-row.quality / 10) for row in table.picked)
        every = [
            [by[layer, r] for layer, r in zip(w, combination, strict=True)]
            for combination in itertools.product(recipes, repeat=len(w))
        ]
        fitting = [c for c in every if sum(row.memory_bytes for row in c) <= budget]
        best = min(sum(10 ** (-row.quality / 10) for row in c) for c in fitting)
        assert noise <= 1.6 * best
    assert noise == pytest.approx(best)
    with pytest.raises(ParameterError, match=rf"budget: expected at least the {least} bytes"):
        compare_recipes(w, x, recipes=recipes, budget=least - 1)


def test_worst_first_and_what_to_exclude():
    w = weights()
    w["layer2"][3, 5] = 1000
    table = compare_recipes(w)
    worst = table.worst("int8")
    assert worst[0].layer == "layer2"
    assert [row.quality for row in worst] == sorted(row.quality for row in worst)
    assert table.exclude("int8", worst[1].quality) == ("layer2",)
    assert table.best.quality == max(row.quality for row in table.rows)
    assert "layer2" in str(table)


def test_of_a_model(tmp_path):
    pytest.importorskip("safetensors")
    arrays = models.write_model(tmp_path / "m")
    np.savez(tmp_path / "rows.npz", **{name: np.ones((9, s[1]), F32) for name, s in models.LAYERS.items()})
    recipes = {"a": {}, "b": {"bits": 4}}
    table = compare_recipes(tmp_path / "m", tmp_path / "rows.npz", recipes=recipes)
    assert sorted(table.layers) == sorted(models.LAYERS)
    by_hand = compare_recipes({n: arrays[f"{n}.weight"] for n in models.LAYERS}, recipes=recipes)
    of_weights = {(row.layer, row.recipe): row.sqnr_db for row in table.rows}
    assert of_weights == {(row.layer, row.recipe): row.sqnr_db for row in by_hand.rows}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": np.ones(3)}, ShapeMismatchError, "weight: expected"),
        ({"weight": np.ones((0, 3))}, EmptyInputError, "weight: expected"),
        ({"weight": np.full((2, 3), np.inf)}, NonFiniteError, "weight: expected"),
        ({"weight": {}}, ParameterError, "weight: expected names"),
        ({"rows": np.ones((3, 63))}, FeatureDimMismatchError, "rows"),
        ({"rows": []}, EmptyInputError, "rows: expected at least one"),
        ({"rows": {"x": np.ones((3, 64))}}, ParameterError, "rows: expected names of layers"),
        ({"quantized_rows": np.ones((3, 64))}, ParameterError, "quantized_rows: expected as many rows"),
        ({"recipes": {}}, ParameterError, "recipes: expected a mapping"),
        ({"recipes": {"a": {"bit": 4}}}, ParameterError, "recipes: expected names with options"),
        ({"recipes": {"a": {"smooth": 0.5}}}, ParameterError, "recipes: expected none that needs rows"),
        ({"recipes": {"a": {"bits": 3}}}, ParameterError, "bits: expected 4 or 8"),
        ({"budget": "x"}, ParameterError, "expected a real number"),
        ({"budget": 0}, ParameterError, "budget: expected a positive"),
        ({"budget": {"db": 3}}, ParameterError, "budget: expected bytes, or"),
        ({"budget": {"sqnr_db": float("nan")}}, ParameterError, "budget: expected"),
    ],
)
def test_bad_arguments(options, error, message):
    options = {"weight": weights()["layer0"], **options}
    with pytest.raises(error, match=message):
        compare_recipes(**options)


class Page(HTMLParser):
    """Checks that tags are balanced, and collects them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for key, value in attrs if key in ("href", "src", "action", "xlink:href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("with_rows", [True, False])
def test_page_and_json(tmp_path, with_rows):
    w = weights()
    w["<b>&\"'"] = w.pop("layer3")
    x = {"layer0": rows()["layer0"]} if with_rows else None
    table = compare_recipes(w, x, budget={"sqnr_db": 30})
    table.to_html(tmp_path / "t.html")
    text = (tmp_path / "t.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.links
    assert "<script" not in text
    assert "http" not in text
    assert "<b>" not in text
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert ("html", {"lang": "en"}) in page.tags
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if attributes.get("class") == "scroll":  # what scrolls is reached by keyboard, and has a name
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]
    assert tags.count("caption") == tags.count("table")
    assert tags.count("polyline") == (2 if with_rows else 0)
    table.to_json(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["picks"] == table.picks
    assert len(content["rows"]) == len(table.rows)
    assert content["layers"][0]["channel_amax"] is None or with_rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.html", "t.json"]


def test_on_a_real_layer():
    w, calibration, evaluation = real_layer("up")
    table = compare_recipes(w, np.concatenate([calibration, evaluation]))
    quality = {row.recipe: row.quality for row in table.rows}
    assert quality["int8 rotated"] > quality["int8"] + 3
    assert quality["int4 g32 compensated, rotated"] > quality["int4 g32"]
    view = table.views[0]
    assert sum(view.histogram) == w.size
    assert view.clips["int8"] == pytest.approx(view.amax)
    assert max(view.smoothed_amax) < max(view.channel_amax)
