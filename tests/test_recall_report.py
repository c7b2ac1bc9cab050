"""The report of recall: against counting by hand; its table and its page."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dynquant import (
    DTypeError,
    EmbeddingIndex,
    EmptyInputError,
    NonFiniteError,
    ParameterError,
    ShapeMismatchError,
    recall_report,
)

F32 = np.float32


def data(n=600, d=32, q=25):
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((n // 10, d)), 10, 0) + rng.standard_normal((n, d)) / 2
    return x.astype(F32), (x[: q * 7 : 7] + rng.standard_normal((q, d)) / 4).astype(F32)


def exact(x, q, metric):
    x, q = x.astype(float), q.astype(float)
    if metric == "l2":
        return -((q[:, None] - x[None]) ** 2).sum(-1)
    if metric == "cosine":
        x, q = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, q))
    return q @ x.T


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_recall_is_what_one_counts(monkeypatch, metric):
    monkeypatch.setattr("dynquant._recall._VECTORS", 100)
    monkeypatch.setattr("dynquant._recall._QUERIES", 7)
    monkeypatch.setattr("dynquant._recall._SECONDS", 0)
    x, q = data()
    recipes = {"rows": {"bits": 4}, "rows again": {"bits": 4, "oversample": 3, "center": "mean"}}
    report = recall_report(x, q, 8, recipes=recipes, metric=metric)
    best = np.argsort(-exact(x, q, metric), 1)[:, :8]
    assert [row.name for row in report.rows] == ["float32", "rows", "rows again"]
    for row, recipe in zip(report.rows[1:], recipes.values(), strict=True):
        options = {k: v for k, v in recipe.items() if k != "oversample"}
        index = EmbeddingIndex(32, metric=metric, **options)
        index.add(x)
        found = index.search(q, 8, rescore=x if row.rescored else None, oversample=3).indices
        expected = np.mean([np.isin(a, b).mean() for a, b in zip(best, found, strict=True)])
        assert row.recall == pytest.approx(expected) and row.memory_bytes == index.memory_bytes
        assert row.rescored == ("oversample" in recipe) and row.queries_per_second > 0
    assert report.rows[0].memory_bytes == x.nbytes and report.rows[0].recall == 1


def test_default_recipes(monkeypatch):
    monkeypatch.setattr("dynquant._recall._SECONDS", 0)
    report = recall_report(*data())
    recall = {row.name: row.recall for row in report.rows}
    assert len(recall) == 7
    assert recall["int8"] > 0.95 and recall["int8, rescored"] > 0.999
    assert recall["4 bits, rotated, rescored"] > recall["4 bits, rotated"]


def test_table(monkeypatch):
    monkeypatch.setattr("dynquant._recall._SECONDS", 0)
    report = recall_report(*data(), recipes={"a recipe": {}})
    title, header, first, second = str(report).split("\n")
    assert title == "600 vectors of 32, 25 queries"
    assert header.split() == ["recall@10", "bytes/vector", "queries/s"]
    assert first.split()[:3] == ["float32", "1.0000", "128.0"]
    assert second.startswith("a recipe") and f"{report.rows[1].memory_bytes / 600:.1f}" in second


def test_page(tmp_path, monkeypatch):
    monkeypatch.setattr("dynquant._recall._SECONDS", 0)
    report = recall_report(*data(), recipes={"<b> & co": {}, "again": {"oversample": 2}})
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "&lt;b&gt; &amp; co" in page and "<b>" not in page
    assert "http" not in page and "<script" not in page  # it needs nothing else
    root = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    circles = root.findall("circle")
    assert [circle.get("fill") == "white" for circle in circles] == [False, False, True]
    _, _, width, height = map(float, root.get("viewBox").split())
    assert all(0 < float(c.get("cx")) < width and 0 < float(c.get("cy")) < height for c in circles)
    labels = [float(t.get("y")) for t in root.findall("text")[-3:]]
    assert len(set(labels)) == 3


X = np.eye(4, dtype=F32)
BAD_CALLS = {
    "ints": (lambda: recall_report(X.astype(int), X), DTypeError, "vectors: expected"),
    "no vectors": (lambda: recall_report(X[:0], X), EmptyInputError, "vectors: expected"),
    "NaN": (lambda: recall_report(X * np.nan, X), NonFiniteError, "vectors: expected"),
    "queries": (lambda: recall_report(X, X[:, :2]), ShapeMismatchError, "queries: expected"),
    "no queries": (lambda: recall_report(X, X[:0]), ParameterError, "queries: expected at least one"),
    "NaN queries": (lambda: recall_report(X, X * np.nan), NonFiniteError, "queries: expected"),
    "k": (lambda: recall_report(X, X, 5), ParameterError, "k: expected at most"),
    "k of 0": (lambda: recall_report(X, X, 0), ParameterError, "k: expected"),
    "metric": (lambda: recall_report(X, X, 1, metric="ip"), ParameterError, "metric: expected"),
    "recipes": (lambda: recall_report(X, X, 1, recipes=[]), ParameterError, "recipes: expected"),
    "no recipes": (lambda: recall_report(X, X, 1, recipes={}), ParameterError, "recipes: expected"),
    "option": (lambda: recall_report(X, X, 1, recipes={"a": {"b": 1}}), ParameterError, "recipes: expected"),
    "bits": (lambda: recall_report(X, X, 1, recipes={"a": {"bits": 1}}), ParameterError, "bits: expected"),
    "threads": (lambda: recall_report(X, X, 1, num_threads=0), ParameterError, "num_threads: expected"),
    "path": (lambda: recall_report(X, X, 1).to_html(3), ParameterError, "path: expected"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
