"""The index of embeddings: against `top_k` and float scores, in batches, through files, with damage."""

import json
import os
import threading

import numpy as np
import pytest
from helpers.common import F32, ISAS, assert_same_bits, using

from dynquant import (
    DTypeError,
    EmbeddingIndex,
    NonFiniteError,
    ParameterError,
    ShapeMismatchError,
    dynamic_quantize,
    quantize_weights,
    top_k,
)

RECIPES = {
    "int8": {},
    "int8 centered": {"center": "mean"},
    "int8 l2": {"metric": "l2", "center": "mean"},
    "cosine": {"metric": "cosine"},
    "cosine centered": {"metric": "cosine", "center": "mean"},
    "4 bits": {"bits": 4, "group_size": 16},
    "4 bits rows": {"bits": 4},
    "4 bits rotated": {"bits": 4, "group_size": 32, "hadamard": True, "center": "mean"},
}


def embeddings(rng, n, d=48, mean=0.0):
    topics = np.repeat(rng.standard_normal((-(-n // 10), d)), 10, 0)[:n]
    x = topics + rng.standard_normal((n, d)) / 2
    x[:, 3] += mean
    return x.astype(F32)


def exact(queries, x, metric):
    q, x = queries.astype(float), x.astype(float)
    if metric == "l2":
        return -((q[:, None] - x[None]) ** 2).sum(-1)
    if metric == "cosine":
        q, x = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (q, x))
    return q @ x.T


def recall(found, scores):
    best = np.argsort(-scores, 1)[:, : found.shape[1]]
    return np.mean([np.isin(a, b).mean() for a, b in zip(best, found, strict=True)])


def assert_same(a, b):
    np.testing.assert_array_equal(a[1], b[1])
    assert_same_bits(a[0], b[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_scores_are_close_to_the_floats(isa, recipe):
    rng = np.random.default_rng(0)
    x = embeddings(rng, 400, mean=4)
    queries = x[::23] + rng.standard_normal((18, 48)).astype(F32) / 4
    index = EmbeddingIndex(48, **RECIPES[recipe])
    index.add(x)
    scores, ids = index.search(queries, 10)
    expected = exact(queries, x, index.metric)
    four = RECIPES[recipe].get("bits") == 4
    assert recall(ids, expected) > (0.75 if four else 0.95)
    sign = -1 if index.metric == "l2" else 1
    true = sign * np.take_along_axis(expected, ids, 1)
    span = np.abs(expected).max()
    np.testing.assert_allclose(scores, true, atol=span * (0.05 if four else 0.01))
    assert (np.diff(sign * scores, axis=1) <= 0).all()
    again = index.search(queries, 10, rescore=x)
    assert recall(again.indices, expected) > (0.95 if four else 0.999)
    np.testing.assert_allclose(
        again.scores, sign * np.take_along_axis(expected, again.indices, 1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_is_top_k_where_nothing_is_done_to_vectors(metric, bits):
    rng = np.random.default_rng(1)
    x, queries = embeddings(rng, 300), embeddings(rng, 7)
    corpus = dynamic_quantize(x) if bits == 8 else quantize_weights(x, bits=4, group_size=8)
    index = EmbeddingIndex(48, bits=bits, group_size=8 if bits == 4 else None, metric=metric)
    index.add(x)
    assert_same(index.search(queries, 12), top_k(queries, corpus, 12, metric=metric))
    rescored = top_k(queries, corpus, 12, metric=metric, rescore=x, oversample=2)
    assert_same(index.search(queries, 12, rescore=x, oversample=2), rescored)


@pytest.mark.parametrize("recipe", RECIPES)
def test_batches_threads_and_instruction_sets_change_nothing(recipe):
    rng = np.random.default_rng(2)
    x, queries = embeddings(rng, 260), embeddings(rng, 5)
    options = dict(RECIPES[recipe])
    if "center" in options:
        options["center"] = x.mean(0)
    results = []
    for sizes in ([260], [1] * 20 + [100, 3, 137], [130, 130]):
        for isa in ISAS:
            with using(isa):
                index = EmbeddingIndex(48, **options)
                for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
                    index.add(x[start : start + size])
                assert len(index) == 260 and index.ids.tolist() == list(range(260))
                results.append(index.search(queries, 30, num_threads=2))
    for result in results[1:]:
        assert_same(result, results[0])


def test_appending_copies_little():
    rng = np.random.default_rng(3)
    index = EmbeddingIndex(4)
    for _ in range(1000):
        index.add(rng.standard_normal((1, 4)).astype(F32))
    assert len(index) == 1000 and len(index._segments) < 12


def test_removing():
    rng = np.random.default_rng(4)
    x, queries = embeddings(rng, 200), embeddings(rng, 3)
    ids = rng.permutation(200) * 7 - 300
    index = EmbeddingIndex(48)
    for part in range(0, 200, 50):
        index.add(x[part : part + 50], ids[part : part + 50])
    gone = np.zeros(200, bool)
    for share in (0.1, 0.3, 0.9):
        now = (rng.random(200) < share) & ~gone
        assert index.remove(ids[now]) == now.sum()
        assert index.remove(ids[now]) == 0
        gone |= now
        assert index.ids.tolist() == ids[~gone].tolist()
        expected = top_k(queries, dynamic_quantize(x), 200, allowed=~gone)
        found = index.search(queries, 200)
        assert_same_bits(found.scores, expected.scores)
        here = expected.indices >= 0
        np.testing.assert_array_equal(found.indices[here], ids[expected.indices[here]])
        assert (found.indices[~here] == -1).all()
    index.remove(ids)
    assert len(index) == 0 and index.memory_bytes == 0
    assert (index.search(queries, 2).indices == -1).all()


def test_ids_count_on_and_may_repeat():
    index = EmbeddingIndex(2)
    index.add(np.eye(2, dtype=F32), ids=[7, 7])
    index.add(np.eye(2, dtype=F32))
    assert index.ids.tolist() == [7, 7, 8, 9]
    assert index.remove(7) == 2
    index.add(np.eye(2, dtype=F32), ids=np.array([-5, 2**63 - 2], np.int64))
    assert index.ids.tolist() == [8, 9, -5, 2**63 - 2]
    with pytest.raises(ParameterError, match=r"ids: expected ints, for above .* fewer than 2 are left"):
        index.add(np.eye(2, dtype=F32))
    assert index.ids.tolist() == [8, 9, -5, 2**63 - 2]


@pytest.mark.parametrize("removed", [False, True])
def test_allowed(removed):
    rng = np.random.default_rng(5)
    x, queries = embeddings(rng, 150), embeddings(rng, 4)
    index = EmbeddingIndex(48)
    index.add(x[:100], np.arange(100) * 2)
    index.add(x[100:], np.arange(100, 150) * 2)
    here = np.ones(150, bool)
    if removed:
        here[::3] = False
        index.remove(np.arange(150)[~here] * 2)
    for shape in ((150,), (4, 150)):
        mask = rng.random(shape) < 0.3
        expected = top_k(queries, dynamic_quantize(x), 20, allowed=mask & here)
        found = index.search(queries, 20, allowed=mask[..., here])
        assert_same_bits(found.scores, expected.scores)
        np.testing.assert_array_equal(found.indices, np.where(expected.indices < 0, -1, expected.indices * 2))
    few = rng.permutation(150)[:9]
    expected = top_k(queries, dynamic_quantize(x), 20, allowed=np.isin(np.arange(150), few) & here)
    assert_same_bits(index.search(queries, 20, allowed=few * 2).scores, expected.scores)
    assert (index.search(queries, 20, allowed=np.empty(0, int)).indices == -1).all()


def test_rescoring_by_a_function():
    rng = np.random.default_rng(6)
    x, queries = embeddings(rng, 150), embeddings(rng, 4)
    index = EmbeddingIndex(48, bits=4)
    index.add(x, np.arange(150) + 1000)
    result = index.search(queries, 5, rescore=lambda ids: x[ids - 1000])
    plain = EmbeddingIndex(48, bits=4)
    plain.add(x)
    expected = plain.search(queries, 5, rescore=x)
    assert_same_bits(result.scores, expected.scores)
    np.testing.assert_array_equal(result.indices, expected.indices + 1000)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mmap", [True, False])
def test_files(tmp_path, recipe, mmap):
    rng = np.random.default_rng(7)
    x, queries = embeddings(rng, 120), embeddings(rng, 4)
    index = EmbeddingIndex(48, **RECIPES[recipe])
    index.add(x[:90])
    index.remove(np.arange(0, 90, 4))
    index.save(tmp_path / "index")
    opened = EmbeddingIndex.open(tmp_path / "index", mmap=mmap)
    assert opened.ids.tolist() == index.ids.tolist() and len(opened) == len(index)
    assert_same(opened.search(queries, 20), index.search(queries, 20))
    for each in (index, opened):  # a mapped index grows in memory, and replaces its own files
        each.add(x[90:])
        each.remove([91, 1, 2])
    assert_same(opened.search(queries, 20), index.search(queries, 20))
    opened.save(str(tmp_path / "index"))
    again = EmbeddingIndex.open(tmp_path / "index")
    assert_same(again.search(queries, 20), index.search(queries, 20))
    assert again.ids.tolist() == index.ids.tolist()
    names = json.loads((tmp_path / "index" / "index.json").read_text())["files"]
    assert sorted(os.listdir(tmp_path / "index")) == sorted(["index.json", *names.values()])
    codes = np.load(tmp_path / "index" / names["codes"])
    assert len(codes) == len(index) and codes.dtype in (np.int8, np.uint8)


def test_an_empty_index_is_kept(tmp_path):
    for options in RECIPES.values():
        index = EmbeddingIndex(48, **options)
        index.save(tmp_path)
        opened = EmbeddingIndex.open(tmp_path)
        x = embeddings(np.random.default_rng(8), 30)
        for each in (index, opened):
            each.add(x)
        assert_same(opened.search(x, 3), index.search(x, 3))


def test_what_fails_to_be_saved_changes_nothing(tmp_path, monkeypatch):
    x = embeddings(np.random.default_rng(9), 50)
    index = EmbeddingIndex(48)
    index.add(x[:20])
    index.save(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    index.add(x[20:])
    replace, fsync = os.replace, os.fsync

    def full(*_):
        raise OSError(28, "No space left on device")

    for name, original in (("replace", replace), ("fsync", fsync)):
        monkeypatch.setattr(os, name, full)
        with pytest.raises(OSError, match="No space"):
            index.save(tmp_path)
        monkeypatch.setattr(os, name, original)
        assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    index.save(tmp_path)
    assert len(EmbeddingIndex.open(tmp_path)) == 50


def test_readers_see_the_old_or_the_new_state(tmp_path):
    x = np.ones((8, 4), F32)
    index = EmbeddingIndex(4)
    index.add(x)
    index.save(tmp_path)
    stop, sizes = threading.Event(), set()

    def read():
        while not stop.is_set():
            opened = EmbeddingIndex.open(tmp_path)
            assert opened.search(x[:1], 1).indices[0, 0] == 0
            sizes.add(len(opened))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(40):
        index.add(x)
        index.save(tmp_path)
    stop.set()
    for reader in readers:
        reader.join()
    assert sizes and all(size % 8 == 0 for size in sizes)


def saved(folder, **options):
    index = EmbeddingIndex(6, **options)
    index.add(np.random.default_rng(10).standard_normal((20, 6)).astype(F32))
    index.save(folder)
    return json.loads((folder / "index.json").read_text())


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 2, "center": "mean"}], ids=["8", "4"])
def test_damaged_files_are_refused_by_name(tmp_path, mmap, options):
    content = saved(tmp_path, **options)
    rng = np.random.default_rng(11)
    for file in content["files"].values():
        path = tmp_path / file
        whole = path.read_bytes()
        for size in (0, 5, 60, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ParameterError, match=file):
                EmbeddingIndex.open(tmp_path, mmap=mmap)
        for _ in range(20):
            i = rng.integers(0, 128)
            path.write_bytes(whole[:i] + bytes([whole[i] ^ rng.integers(1, 256)]) + whole[i + 1 :])
            try:  # blanks of the header may differ
                EmbeddingIndex.open(tmp_path, mmap=mmap)
            except ParameterError as error:
                assert file in str(error)
        np.save(path, np.zeros((3, 3)))
        with pytest.raises(ParameterError, match=file):
            EmbeddingIndex.open(tmp_path, mmap=mmap)
        path.unlink()
        with pytest.raises(ParameterError, match=file):
            EmbeddingIndex.open(tmp_path, mmap=mmap)
        path.write_bytes(whole)
    path = tmp_path / content["files"]["scales"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(NonFiniteError, match=content["files"]["scales"]):
        EmbeddingIndex.open(tmp_path, mmap=mmap)


def test_foreign_json_is_refused_by_name(tmp_path):
    content = saved(tmp_path)
    path = tmp_path / "index.json"
    changes = [{"kind": "other"}, {"version": 2}, {"dim": 0}, {"dim": "6"}, {"bits": 3}, {"bits": True}]
    changes += [{"count": 19}, {"count": -1}, {"count": 20.0}, {"metric": "ip"}, {"hadamard": 1}]
    changes += [{"center": "x"}, {"center": []}, {"center": "given"}, {"files": {}}, {"files": []}]
    changes += [{"files": {**content["files"], "ids": "../ids.npy"}}, {"group_size": 3}, {"next_id": None}]
    for change in changes:
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(ParameterError):
            EmbeddingIndex.open(tmp_path)
    for name in content:
        path.write_text(json.dumps({key: value for key, value in content.items() if key != name}))
        with pytest.raises(ParameterError, match=r"index\.json"):
            EmbeddingIndex.open(tmp_path)
    for text in ("", "[]", "{", "[" * 100_000, "null", "\x00"):
        path.write_text(text)
        with pytest.raises(ParameterError, match=r"index\.json"):
            EmbeddingIndex.open(tmp_path)
    with pytest.raises(FileNotFoundError):
        EmbeddingIndex.open(tmp_path / "none")


X = np.eye(3, dtype=F32)


def filled():
    index = EmbeddingIndex(3)
    index.add(X)
    return index


BAD_CALLS = {
    "dim": (lambda: EmbeddingIndex(0), ParameterError, "dim: expected"),
    "bits": (lambda: EmbeddingIndex(3, bits=2), ParameterError, "bits: expected 4 or 8"),
    "several bits": (
        lambda: EmbeddingIndex(3, bits=np.array([4, 8])),
        ParameterError,
        "bits: expected 4 or 8",
    ),
    "group": (lambda: EmbeddingIndex(3, group_size=8), ParameterError, "group_size: expected None"),
    "hadamard": (lambda: EmbeddingIndex(3, hadamard=1), ParameterError, "hadamard: expected a bool"),
    "center": (lambda: EmbeddingIndex(3, center="median"), ParameterError, "center: expected"),
    "long center": (lambda: EmbeddingIndex(3, center=[1.0]), ShapeMismatchError, "center: expected"),
    "metric": (lambda: EmbeddingIndex(3, metric="ip"), ParameterError, "metric: expected"),
    "narrow": (lambda: filled().add(X[:, :2]), ShapeMismatchError, "vectors: expected shape"),
    "NaN": (lambda: filled().add(X * np.nan), NonFiniteError, "vectors: expected finite"),
    "float ids": (lambda: filled().add(X, [1.0, 2.0, 3.0]), DTypeError, "ids: expected ints"),
    "few ids": (lambda: filled().add(X, [1]), ShapeMismatchError, "ids: expected shape"),
    "large ids": (
        lambda: filled().add(X[:1], np.array([2**63], np.uint64)),
        ParameterError,
        "ids: expected ints of 64 bits",
    ),
    "removed": (lambda: filled().remove([0.5]), DTypeError, "ids: expected ints"),
    "k": (lambda: filled().search(X, 0), ParameterError, "k: expected"),
    "queries": (lambda: filled().search(X[0], 1), ShapeMismatchError, "queries: expected"),
    "query of NaN": (lambda: filled().search(X * np.nan, 1), NonFiniteError, "queries: expected"),
    "mask": (lambda: filled().search(X, 1, allowed=[True]), ShapeMismatchError, "allowed: expected"),
    "float mask": (lambda: filled().search(X, 1, allowed=[0.5]), DTypeError, "allowed: expected"),
    "ids per query": (lambda: filled().search(X, 1, allowed=[[1]]), ShapeMismatchError, "allowed: expected"),
    "rescore": (lambda: filled().search(X, 1, rescore=X[:, :2]), ShapeMismatchError, "rescore: expected"),
    "rows": (
        lambda: filled().search(X, 3, rescore=X[:2]),
        ParameterError,
        "rescore: expected a row for each",
    ),
    "function": (lambda: filled().search(X, 1, rescore=lambda ids: X[:0]), ShapeMismatchError, "rescore"),
    "path": (lambda: filled().save(3), ParameterError, "path: expected"),
    "mmap": (lambda: EmbeddingIndex.open(".", mmap=1), ParameterError, "mmap: expected a bool"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_a_batch_that_is_refused_changes_nothing():
    index = EmbeddingIndex(3, center="mean")
    for bad in (X * np.nan, X[:, :1]):
        with pytest.raises(ValueError, match="vectors"):
            index.add(bad)
    with pytest.raises(ShapeMismatchError):
        index.add(X, [5])
    assert len(index) == 0
    index.add(X)
    assert index.ids.tolist() == [0, 1, 2]


def test_infinite_scores_in_several_segments():
    """They are hits, of whichever segment, and come before what is no hit."""
    index = EmbeddingIndex(2)
    for i in range(4):
        index.add(np.array([[-1e30, 0]] * (8 >> i), np.float32), ids=np.full(8 >> i, i))
    scores, ids = index.search([[1e30, 0]], 20)
    assert ids.tolist() == [[0] * 8 + [1] * 4 + [2] * 2 + [3] + [-1] * 5]
    assert np.isneginf(scores).all()


def test_products_with_the_center_beyond_float32_are_refused():
    index = EmbeddingIndex(2, center=[1e30, 0])
    with pytest.raises(ParameterError, match="vectors: expected products with the center within float32"):
        index.add([[1e30, 0], [-1e30, 0]])
    assert len(index) == 0


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_differences_from_the_center_beyond_float32_are_refused(metric):
    index = EmbeddingIndex(2, center=[-3e38, 0.0], metric=metric)
    if metric != "cosine":
        with pytest.raises(ParameterError, match="vectors: expected differences from the center within"):
            index.add([[3e38, 0.0]])
        with pytest.raises(ParameterError, match="queries: expected differences from the center within"):
            index.search([[3e38, 0.0]], 1)
    assert len(index) == 0


@pytest.mark.parametrize("options", [{"hadamard": True}, {"bits": 4}])
def test_vectors_too_long_for_an_index_are_refused_by_name(options):
    index = EmbeddingIndex(2, **options)
    with pytest.raises(ParameterError, match="vectors: expected"):
        index.add([[3e38, -3e38]])
    assert len(index) == 0
    if "hadamard" in options:
        index.add([[1, 1]])
        with pytest.raises(ParameterError, match="queries: expected"):
            index.search([[3e38, -3e38]], 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_cosines_of_vectors_whose_norms_float32_cannot_hold(bits):
    """They are those of the directions, of vectors and of queries."""
    index = EmbeddingIndex(3, metric="cosine", bits=bits)
    x = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [-1, 1, 1]], F32)
    lengths = np.array([[3e38], [2**-149], [1], [2**-140]], F32)
    index.add(x * lengths)
    usual = EmbeddingIndex(3, metric="cosine", bits=bits)
    usual.add(x)
    queries = np.array([[1, 1, 1], [0, 1, 1]], F32)
    for length in (3e38, 2**-149, 1):
        found, expected = index.search(queries * F32(length), 4), usual.search(queries, 4)
        assert found.indices.tolist() == expected.indices.tolist()
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
