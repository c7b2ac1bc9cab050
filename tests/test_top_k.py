"""Search: every hit and score against all scores and a stable sort."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from helpers.common import F32, ISAS, assert_same_bits, using
from hypothesis import given
from hypothesis import strategies as st

from dynquant import (
    DTypeError,
    DynQuantFormat,
    DynQuantTensor,
    EmptyInputError,
    NonFiniteError,
    ParameterError,
    ShapeMismatchError,
    _core,
    dynamic_quantize,
    quantize_weights,
    top_k,
    w4a8_matmul,
    w8a8_matmul,
)

METRICS = ("dot", "cosine", "l2")
KINDS = ("int8", "row", "symmetric", "g32", "g5")


@pytest.fixture
def shared():
    """Work is shared however small it is."""
    _core.set_sharing(True, False)
    yield
    _core.set_sharing(False, False)


def corpus_of(kind, x):
    """`x` quantized as `kind` says."""
    if kind == "int8":
        return dynamic_quantize(x)
    group = {"row": None, "symmetric": 16, "g32": 32, "g5": 5}[kind]
    return quantize_weights(x, bits=4, group_size=group, symmetric=kind == "symmetric")


def signed_codes(corpus):
    """int64 codes (n, d) with their zero points taken off, and scales of every element."""
    n, d = corpus.shape
    if corpus.format.bits == 8:
        return corpus.data.astype(np.int64), np.broadcast_to(corpus.scales[:, None], (n, d))
    nibbles = np.stack([corpus.data & 15, corpus.data >> 4], -1).reshape(n, -1)[:, :d].astype(np.int64)
    group = corpus.format.group_of(d)
    scales = np.repeat(corpus.scales.reshape(n, -1), group, 1)[:, :d]
    if corpus.zero_points is None:
        return (nibbles ^ 8) - 8, scales
    return nibbles - np.repeat(corpus.zero_points.reshape(n, -1), group, 1)[:, :d], scales


def square_norms(corpus):
    """float64 squared norms, summed over groups in ascending order."""
    codes, scales = signed_codes(corpus)
    group = corpus.format.group_of(corpus.shape[1])
    total = np.zeros(len(corpus))
    for start in range(0, corpus.shape[1], group):
        part = slice(start, start + group)
        total += scales[:, start].astype(float) ** 2 * (codes[:, part] ** 2).sum(1)
    return total


def reciprocal(squares):
    with np.errstate(divide="ignore", over="ignore"):
        result = (1 / np.sqrt(squares)).astype(F32)
    return np.where(np.isfinite(result), result, F32(0))


def all_scores(queries, corpus, metric):
    """(q, n) scores as `top_k` documents them; distances are negative."""
    x = dynamic_quantize(queries)
    codes = x.data.astype(np.int64)
    if corpus.format.bits == 8:
        sums = (codes.astype(float) @ corpus.data.astype(float).T).astype(F32)
        dots = w8a8_matmul(corpus.data, corpus.scales, queries)
    else:
        dots = w4a8_matmul(corpus, queries)
    q_square, q_scale = (codes**2).sum(1), x.scales
    if metric == "dot":
        return dots
    if metric == "cosine" and corpus.format.bits == 8:
        squares = (corpus.data.astype(np.int64) ** 2).sum(1)
        return sums * reciprocal(squares) * reciprocal(q_square)[:, None]
    if metric == "cosine":
        return totals_of(corpus, codes) * reciprocal(q_square)[:, None] * reciprocal(square_norms(corpus))
    if corpus.format.bits == 8:
        squares = (corpus.data.astype(np.int64) ** 2).sum(1).astype(F32) * corpus.scales * corpus.scales
    else:
        squares = square_norms(corpus).astype(F32)
    q_squares = q_square.astype(F32) * q_scale * q_scale
    distance = (q_squares[:, None] + squares) - 2 * dots
    return -np.where(distance < 0, F32(0), distance)


def totals_of(corpus, query_codes):
    """float32 (q, n): float32(sum) * group_scale, added up over the groups in ascending order."""
    codes, scales = (a.astype(float) for a in signed_codes(corpus))  # sums below 2**53 are exact
    group = corpus.format.group_of(corpus.shape[1])
    total = np.zeros((len(query_codes), len(corpus)), F32)
    for start in range(0, corpus.shape[1], group):
        part = slice(start, start + group)
        sums = query_codes[:, part].astype(float) @ codes[:, part].T
        total += sums.astype(F32) * scales[:, start].astype(F32)
    return total


def best_of(scores, k, allowed=None):
    """(scores, indices) of the highest k, by a stable sort."""
    scores = scores + F32(0)
    if allowed is not None:
        scores = np.where(allowed, scores, F32(-np.inf))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(scores, order, 1)
    indices = np.where(np.isneginf(found), -1, order)
    missing = k - order.shape[1]
    return (
        np.pad(found, ((0, 0), (0, max(0, missing))), constant_values=-np.inf),
        np.pad(indices, ((0, 0), (0, max(0, missing))), constant_values=-1).astype(np.int64),
    )


def assert_found(result, expected, metric="dot"):
    scores, indices = expected
    np.testing.assert_array_equal(result.indices, indices)
    assert_same_bits(result.scores, F32(0) - scores if metric == "l2" else scores)


def vectors(rng, n, d):
    """Vectors of which some are equal, zero, or much longer than the others."""
    x = rng.standard_normal((n, d)).astype(F32)
    if n > 4:
        x[rng.integers(0, n, n // 4)] = x[rng.integers(0, n, n // 4)]
        x[rng.integers(0, n)] = 0
        x[rng.integers(0, n)] *= 100
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("q", [1, 5, 6, 70])
def test_finds_what_a_sort_of_all_scores_does(isa, kind, metric, q):
    rng = np.random.default_rng(q)
    for n, d, k in ((1, 1, 1), (700, 40, 10), (33, 7, 33), (300, 130, 1), (1000, 64, 500)):
        x, queries = vectors(rng, n, d), vectors(rng, q, d)
        corpus = corpus_of(kind, x)
        expected = best_of(all_scores(queries, corpus, metric), k)
        assert_found(top_k(queries, corpus, k, metric=metric), expected, metric)


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize(
    ("d", "group"),
    [(1, None), (31, None), (65, None), (97, 32), (320, 64), (64, 32), (9000, 32), (9001, 8192)],
)
def test_one_query_reads_packed_codes_as_they_lie(isa, d, group, zero_points):
    """With the scores of the matrix product, of which one query and many make different use."""
    rng = np.random.default_rng(d)
    x, queries = vectors(rng, 37, d), vectors(rng, 7, d)
    corpus = quantize_weights(x, bits=4, group_size=group, symmetric=not zero_points)
    expected = best_of(w4a8_matmul(corpus, queries), 37)
    for row in range(7):
        one = top_k(queries[row : row + 1], corpus, 37)
        assert_found(one, (expected[0][row : row + 1], expected[1][row : row + 1]))


@pytest.mark.parametrize("q", [1, 7])
def test_scores_beyond_float32_are_infinite_hits(isa, shared, q):
    """In the order of scores, and before what is no hit."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((300, 16)).astype(F32) * F32(1e30)
    x[::3] *= F32(1e-30)
    queries = rng.standard_normal((q, 16)).astype(F32) * F32(1e10)
    corpus = dynamic_quantize(x)
    with np.errstate(over="ignore"):
        dots = w8a8_matmul(corpus.data, corpus.scales, queries)
    assert np.isposinf(dots).any(1).all() and np.isneginf(dots).any(1).all()
    order = np.argsort(-dots, axis=1, kind="stable")
    expected = np.take_along_axis(dots, order, 1), order.astype(np.int64)
    for threads in (1, 3):
        scores, indices = top_k(queries, corpus, 305, num_threads=threads)
        np.testing.assert_array_equal(indices[:, :300], expected[1])
        assert_same_bits(scores[:, :300], expected[0] + F32(0))
        assert (indices[:, 300:] == -1).all() and np.isneginf(scores[:, 300:]).all()
    scores, indices = top_k(queries[:1], corpus, 5, allowed=np.isneginf(dots[0]))
    np.testing.assert_array_equal(indices[0], np.flatnonzero(np.isneginf(dots[0]))[:5])
    assert np.isneginf(scores).all()


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("q", [1, 7])
def test_cosines_of_vectors_next_to_zero(isa, q, group):
    """A vector whose norm has no reciprocal in float32 counts as one of zeros."""
    x = np.random.default_rng(10).standard_normal((5, 16)).astype(F32)
    x[1:4] *= np.array([[1e-38], [1e-40], [1e-43]], F32)
    corpus, queries = quantize_weights(x, bits=4, group_size=group), x[np.arange(q) % 2]
    scores, indices = top_k(queries, corpus, 5, metric="cosine")
    assert (np.abs(scores) < 1.01).all()
    assert (scores[(indices == 2) | (indices == 3)] == 0).all()
    assert (np.abs(scores[indices == 1]) > 0.1).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("q", [1, 7])
def test_infinities_of_both_signs_in_a_score_are_refused(isa, shared, q, threads):
    x = np.full((300, 64), 1, F32)
    x[250, :32], x[250, 32:] = 3e38, -3e38
    corpus = quantize_weights(x, bits=4, group_size=32)
    queries = np.full((q, 64), 1e5, F32)
    with pytest.raises(ParameterError, match="expected scores within float32"):
        top_k(queries, corpus, 3, num_threads=threads)
    allowed = np.arange(300) != 250
    assert 250 not in top_k(queries, corpus, 300, allowed=allowed, num_threads=threads).indices
    x[250, :] = 3e38
    with pytest.raises(ParameterError, match="expected scores within float32"):
        top_k(np.full((q, 64), 1e30, F32), dynamic_quantize(x), 3, metric="l2", num_threads=threads)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["int8", "g32"])
def test_threads_and_batches_change_nothing(isa, shared, kind, metric):
    rng = np.random.default_rng(5)
    corpus, queries = corpus_of(kind, vectors(rng, 2000, 48)), vectors(rng, 90, 48)
    whole = top_k(queries, corpus, 25, metric=metric)
    for threads in (2, 3, 8, 64, 256):
        result = top_k(queries, corpus, 25, metric=metric, num_threads=threads)
        assert_found(result, (whole.scores, whole.indices))
    for rows in (1, 5, 17):
        parts = [top_k(queries[i : i + rows], corpus, 25, metric=metric) for i in range(0, 90, rows)]
        scores, indices = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        assert_found(whole, (scores, indices))


def test_more_queries_than_share_a_pass():
    rng = np.random.default_rng(6)
    corpus, queries = dynamic_quantize(vectors(rng, 300, 8)), vectors(rng, 2100, 8)
    allowed = rng.random((2100, 300)) < 0.3
    expected = best_of(all_scores(queries, corpus, "dot"), 7, allowed)
    assert_found(top_k(queries, corpus, 7, allowed=allowed), expected)


@given(st.data())
def test_reservoirs(data):
    """Scores in any order, most of them equal, with masks and threads."""
    n = data.draw(st.integers(0, 900))
    order = data.draw(st.sampled_from(["random", "ascending", "descending", "equal"]))
    k = data.draw(st.one_of(st.integers(1, 12), st.integers(1, 1000)))
    q = data.draw(st.sampled_from([1, 2, 5, 6, 9]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    levels = data.draw(st.sampled_from([2, 10, 127]))
    values = rng.integers(-levels, levels + 1, n)
    values = {"ascending": np.sort(values), "descending": -np.sort(values), "equal": values * 0}.get(
        order, values
    )
    codes = np.zeros((n, 3), np.int8)
    codes[:, 0] = values
    corpus = DynQuantTensor(codes, np.ones(n, F32), None, (n, 3), DynQuantFormat.INT8_PER_ROW)
    queries = np.repeat(np.array([[127, 0, 1]], F32), q, 0) * rng.choice([-1, 1], (q, 1)).astype(F32)
    allowed = None
    if data.draw(st.booleans()):
        shape = (n,) if data.draw(st.booleans()) else (q, n)
        allowed = rng.random(shape) < data.draw(st.sampled_from([0, 0.01, 0.2, 1]))
    threads = data.draw(st.sampled_from([1, 2, 5]))
    _core.set_sharing(threads > 1, False)
    try:
        result = top_k(queries, corpus, k, allowed=allowed, num_threads=threads)
    finally:
        _core.set_sharing(False, False)
    assert_found(result, best_of(all_scores(queries, corpus, "dot"), k, allowed))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["int8", "g32"])
@pytest.mark.parametrize("share", [0, 0.002, 0.1, 0.9])
def test_masks(isa, kind, metric, share):
    rng = np.random.default_rng(7)
    corpus = corpus_of(kind, vectors(rng, 1500, 32))
    for q in (1, 7):
        queries = vectors(rng, q, 32)
        scores = all_scores(queries, corpus, metric)
        for shape in ((1500,), (q, 1500)):
            allowed = rng.random(shape) < share
            result = top_k(queries, corpus, 9, metric=metric, allowed=allowed)
            assert_found(result, best_of(scores, 9, allowed), metric)
            assert_found(
                top_k(queries, corpus, 9, metric=metric, allowed=np.asfortranarray(allowed)),
                best_of(scores, 9, allowed),
                metric,
            )


def test_codes_of_minus_128_and_long_vectors():
    rng = np.random.default_rng(8)
    for n, d in ((40, 70_000), (100, 65)):
        codes = rng.integers(-128, 128, (n, d)).astype(np.int8)
        codes[0] = -128
        corpus = DynQuantTensor(codes, rng.random(n, dtype=F32), None, (n, d), DynQuantFormat.INT8_PER_ROW)
        for q in (1, 7):
            queries = vectors(rng, q, d)
            for metric in METRICS:
                expected = best_of(all_scores(queries, corpus, metric), 11)
                assert_found(top_k(queries, corpus, 11, metric=metric), expected, metric)


def test_a_vector_is_at_distance_zero_from_itself():
    x = np.random.default_rng(9).standard_normal((200, 384)).astype(F32)
    scores, indices = top_k(x, dynamic_quantize(x), 1, metric="l2")
    np.testing.assert_array_equal(indices[:, 0], np.arange(200))
    assert not scores.any() and not np.signbit(scores).any()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_mapped_and_strided_corpora(tmp_path, kind):
    rng = np.random.default_rng(10)
    corpus, queries = corpus_of(kind, vectors(rng, 500, 24)), vectors(rng, 5, 24)
    arrays = corpus.to_arrays()
    for name in ("data", "scales"):
        np.save(tmp_path / f"{name}.npy", arrays[name])
        arrays[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    mapped = DynQuantTensor.from_arrays(arrays)
    expected = top_k(queries, corpus, 20)
    assert_found(top_k(queries, mapped, 20), (expected.scores, expected.indices))
    every_other = mapped[::2]
    assert not every_other.data.flags.c_contiguous
    assert_found(top_k(queries, every_other, 20), best_of(all_scores(queries, corpus, "dot")[:, ::2], 20))


def exact_scores(queries, x, metric):
    q, x = queries.astype(float)[:, None], x.astype(float)[None]
    if metric == "l2":
        return -((q - x) ** 2).sum(-1).astype(F32)
    dots = (q * x).sum(-1)
    if metric == "cosine":
        norms = np.sqrt((q * q).sum(-1)) * np.sqrt((x * x).sum(-1))
        dots = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
    return dots.astype(F32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_rescoring(tmp_path, metric, dtype):
    rng = np.random.default_rng(11)
    x = vectors(rng, 600, 32).astype(dtype)
    queries, corpus = vectors(rng, 6, 32), corpus_of("g32", x.astype(F32))
    if dtype in (np.float32, np.float64):
        np.save(tmp_path / "x.npy", x)
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
    exact = exact_scores(queries, x, metric)
    candidates = top_k(queries, corpus, 40, metric=metric).indices
    allowed = np.zeros(exact.shape, bool)
    np.put_along_axis(allowed, candidates, True, 1)
    expected, indices = best_of(exact, 10, allowed)
    result = top_k(queries, corpus, 10, metric=metric, rescore=x, oversample=4)
    np.testing.assert_array_equal(result.indices, indices)
    np.testing.assert_allclose(result.scores, F32(0) - expected if metric == "l2" else expected, 3e-7)


def test_rescoring_is_the_same_on_every_instruction_set():
    rng = np.random.default_rng(12)
    x, queries = vectors(rng, 300, 9001), vectors(rng, 3, 9001)
    corpus = dynamic_quantize(x)
    for metric in METRICS:
        results = []
        for isa in ISAS:
            with using(isa):
                results.append(top_k(queries, corpus, 10, metric=metric, rescore=x))
        for result in results[1:]:
            assert_found(result, (results[0].scores, results[0].indices))


def test_rescoring_everything_is_exact():
    rng = np.random.default_rng(13)
    x, queries = vectors(rng, 200, 16), vectors(rng, 4, 16)
    corpus = corpus_of("g5", x)
    result = top_k(queries, corpus, 50, rescore=x, oversample=4)
    _, indices = best_of(exact_scores(queries, x, "dot"), 50)
    np.testing.assert_array_equal(result.indices, indices)
    allowed = np.arange(200) < 20
    few = top_k(queries, corpus, 50, rescore=x, allowed=allowed)
    assert (few.indices[:, 20:] == -1).all() and np.isneginf(few.scores[:, 20:]).all()
    assert_found(few, best_of(exact_scores(queries, x, "dot"), 50, allowed))


def test_fewer_vectors_than_k():
    x = np.eye(3, dtype=F32)
    scores, indices = top_k(x[:1], dynamic_quantize(x), 5)
    assert indices.tolist() == [[0, 1, 2, -1, -1]]
    assert scores.tolist() == [[1.0, 0.0, 0.0, -np.inf, -np.inf]]
    assert top_k(x[:1], dynamic_quantize(x), 5, metric="l2").scores[0, 3:].tolist() == [np.inf, np.inf]
    none = top_k(x, dynamic_quantize(x)[:0], 2)
    assert (none.indices == -1).all() and none.scores.shape == (3, 2)
    assert top_k(x[:0], dynamic_quantize(x), 2).indices.shape == (0, 2)


def test_inputs_stay_as_they_are():
    rng = np.random.default_rng(14)
    x, queries = vectors(rng, 100, 16), vectors(rng, 4, 16)
    corpus, allowed = dynamic_quantize(x), rng.random(100) < 0.5
    before = [a.tobytes() for a in (x, queries, corpus.data, corpus.scales, allowed)]
    for a in (x, queries, corpus.data, corpus.scales, allowed):
        a.flags.writeable = False
    top_k(queries, corpus, 5, allowed=allowed, rescore=x, metric="cosine")
    assert before == [a.tobytes() for a in (x, queries, corpus.data, corpus.scales, allowed)]


def test_memory_does_not_grow_with_the_corpus():
    corpus = DynQuantTensor(
        np.ones((200_000, 8), np.int8),
        np.ones(200_000, F32),
        None,
        (200_000, 8),
        DynQuantFormat.INT8_PER_ROW,
    )
    queries = np.ones((64, 8), F32)
    tracemalloc.start()
    try:
        top_k(queries, corpus, 10)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20  # all scores would take 51 MB
    finally:
        tracemalloc.stop()


X = np.eye(4, dtype=F32)
CORPUS = dynamic_quantize(X)
NAN = np.full((1, 4), np.nan, F32)
BAD_CALLS = {
    "queries of ints": (lambda: top_k(np.ones((1, 4), int), CORPUS, 1), DTypeError, "queries: expected"),
    "one axis": (lambda: top_k(X[0], CORPUS, 1), ShapeMismatchError, "queries: expected shape"),
    "another width": (lambda: top_k(X[:, :3], CORPUS, 1), ShapeMismatchError, "queries: expected shape"),
    "NaN": (lambda: top_k(NAN, CORPUS, 1), NonFiniteError, "queries: expected finite"),
    "minimums": (
        lambda: top_k(
            np.zeros((1, 2), F32),
            DynQuantTensor(
                np.zeros((3, 1), np.uint8),
                np.ones(3, F32),
                None,
                (3, 2),
                DynQuantFormat.INT4_PER_ROW_PACKED,
                np.ones(3, F32),
            ),
            1,
        ),
        ParameterError,
        "corpus: expected codes without minimums",
    ),
    "no tensor": (lambda: top_k(X, X, 1), ParameterError, "corpus: expected a DynQuantTensor"),
    "per tensor": (
        lambda: top_k(X, dynamic_quantize(X, DynQuantFormat.INT8_PER_TENSOR), 1),
        ParameterError,
        "corpus: expected int8 per row",
    ),
    "int8 groups": (
        lambda: top_k(X, dynamic_quantize(X, DynQuantFormat.int8_per_group(2)), 1),
        ParameterError,
        "corpus: expected int8 per row",
    ),
    "three axes": (
        lambda: top_k(X, dynamic_quantize(X[None]), 1),
        ShapeMismatchError,
        "corpus: expected shape",
    ),
    "no elements": (
        lambda: top_k(X[:, :0], dynamic_quantize(X[:, :0]), 1),
        EmptyInputError,
        "corpus: expected vectors",
    ),
    "bad scales": (
        lambda: top_k(X, DynQuantTensor(CORPUS.data, NAN[0], None, (4, 4), CORPUS.format), 1),
        NonFiniteError,
        "corpus.scales: expected finite",
    ),
    "k of 0": (lambda: top_k(X, CORPUS, 0), ParameterError, "k: expected an int >= 1"),
    "k of 1.0": (lambda: top_k(X, CORPUS, 1.0), ParameterError, "k: expected an int >= 1"),
    "metric": (lambda: top_k(X, CORPUS, 1, metric="ip"), ParameterError, "metric: expected 'dot'"),
    "metric of a list": (lambda: top_k(X, CORPUS, 1, metric=[]), ParameterError, "metric: expected 'dot'"),
    "oversample": (lambda: top_k(X, CORPUS, 1, oversample=0), ParameterError, "oversample: expected an int"),
    "threads": (lambda: top_k(X, CORPUS, 1, num_threads=0), ParameterError, "num_threads: expected"),
    "mask of ints": (lambda: top_k(X, CORPUS, 1, allowed=[1, 0, 1, 1]), DTypeError, "allowed: expected"),
    "short mask": (lambda: top_k(X, CORPUS, 1, allowed=[True]), ShapeMismatchError, "allowed: expected"),
    "rows to rescore": (
        lambda: top_k(X, CORPUS, 1, rescore=X[:3]),
        ShapeMismatchError,
        "rescore: expected shape",
    ),
    "ints to rescore": (
        lambda: top_k(X, CORPUS, 1, rescore=X.astype(int)),
        DTypeError,
        "rescore: expected a float",
    ),
    "NaN to rescore": (
        lambda: top_k(X[:1], CORPUS, 1, rescore=np.where(X == 1, np.nan, X)),
        NonFiniteError,
        r"rescore: expected finite values, got nan at flat index 0, position \(0, 0\)",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
