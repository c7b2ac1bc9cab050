"""Exact search: the vectors of a quantized corpus with the highest scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from . import _core
from ._format import DynQuantFormat, MaxAbs
from ._quantize import quantize_named
from ._tensor import DynQuantTensor, check_arrays, code_matrix
from ._validate import (
    F32,
    as_array,
    as_count,
    as_floats,
    as_thread_count,
    check_finite,
    float_matrix,
)
from .errors import DTypeError, EmptyInputError, NonFiniteError, ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# As core/top_k.pxi numbers them.
_METRICS = {"dot": 0, "cosine": 1, "l2": 2}

# What a key is where there is no hit; no score has its bits.
_NO_HIT = np.uint64(2**64 - 1)

# Queries that share a pass over the corpus: as many as make up for packing it, and fewer where k is large,
# for reservoirs of all of them are kept meanwhile.
_MOST_QUERIES = 1024
_FEWEST_QUERIES = 64
_KEYS = 1 << 22

# An index has 32 bits in a key.
_MOST_VECTORS = 1 << 32


class TopK(NamedTuple):
    """What a search found: the best hits of each query, best first."""

    scores: NDArray[np.float32]
    indices: NDArray[np.int64]


def top_k(
    queries: ArrayLike,
    corpus: DynQuantTensor,
    k: int,
    *,
    metric: str = "dot",
    allowed: ArrayLike | None = None,
    rescore: Any = None,
    oversample: int = 4,
    num_threads: int = 1,
) -> TopK:
    """The `k` vectors of a quantized corpus with the highest scores, for each query.

    Every vector is scored, in integer arithmetic: the result is exact for the codes, and the same on every
    instruction set, for every number of threads, and for a query whatever others are searched with it.

    Parameters
    ----------
    queries : array_like of floats, (q, d)
        Each is quantized to int8 by itself, as by `dynamic_quantize_int8_per_row`.
    corpus : DynQuantTensor, (n, d)
        int8 with a scale per row, as from `dynamic_quantize`; or packed 4-bit codes with scales per row or
        per group, as from `quantize_weights`. Its arrays may be memory-mapped. n is below 2**32.
    k : int
        Hits for each query, at least 1.
    metric : {"dot", "cosine", "l2"}
        The dot product, the cosine of the angle, or the squared Euclidean distance.
    allowed : array_like of bool, (n,) or (q, n), optional
        Only vectors where it is true can be found. Parts of the corpus where it is false throughout are not
        read.
    rescore : array_like of floats, (n, d), optional
        The vectors before they were quantized; may be memory-mapped. The best ``k * oversample`` by the codes
        are scored again from these and the queries as they are. Only their rows are read.
    oversample : int
        At least 1. Used with `rescore` only.
    num_threads : int
        The most threads to use, the caller's among them; -1: ``DYNQUANT_NUM_THREADS``, or the CPUs that this
        process may use. Small work takes fewer. The result does not depend on it.

    Returns
    -------
    scores : ndarray of float32, (q, k)
        Descending; for "l2" squared distances, ascending. Where fewer than `k` vectors are to be had the rest
        is -inf, for "l2" inf.
    indices : ndarray of int64, (q, k)
        Rows of the corpus; of equal scores the smaller index comes first. -1 where there is no hit.

    Raises
    ------
    DTypeError
        If `queries` or `rescore` do not hold floats, or `allowed` no bools.
    ShapeMismatchError
        If the shapes do not fit each other.
    EmptyInputError
        If vectors have no elements.
    NonFiniteError
        If `queries`, the scales of `corpus` or rows of `rescore` that are read hold NaN or infinity.
    ParameterError
        If `corpus` is of another format, or an option has a value that it cannot take; if the vectors are
        so long that infinities of both signs meet in a score.

    Notes
    -----
    With an int8 corpus a dot product is ``float32(sum) * corpus_scale * query_scale``, in that order, the
    sum being the exact integer; with 4 bits it is that of `w4a8_matmul`. The cosine divides by the norms
    of the codes: ``float32(sum) * c * q``, where ``c`` and ``q`` are ``1 / sqrt(sum of squares)``,
    computed in float64 and rounded once, 0 for a vector of zeros or one shorter than 2**-128. The squared
    distance is ``(q2 + c2) - 2 * dot`` in float32, at least 0, with ``q2`` and ``c2`` the squared norms.

    With `rescore` sums are taken in float64, in one order, and rounded once.

    Scores beyond float32, of vectors longer than some 1e19, are infinite, and ordered as such: vectors with
    such scores are told apart by their indices only.

    Memory grows with ``q * k``, not with n: scores are compared with the k-th best so far while they are in
    the cache. A few queries read codes as they lie. Otherwise a block of vectors at a time is packed for the
    matrix product.

    Examples
    --------
    >>> from dynquant import dynamic_quantize
    >>> corpus = dynamic_quantize([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> scores, indices = top_k([[1.0, 0.1]], corpus, 2)
    >>> indices.tolist()
    [[0, 1]]
    """
    number, k = checked_metric(metric), as_count(k, "k")
    if k > _MOST_VECTORS:
        raise ParameterError(f"k: expected at most {_MOST_VECTORS:,}, got {shown(k)}")
    factor, threads = as_count(oversample, "oversample"), as_thread_count(num_threads)
    check_corpus(corpus)
    x = as_queries(queries, corpus.shape[1])
    mask = None if allowed is None else as_mask(allowed, x.shape[0], corpus.shape[0])
    floats = None if rescore is None else as_rows(rescore, corpus.shape)
    if floats is None:
        found = search(x, corpus, k, number, mask, None, threads)
    else:
        candidates = search(x, corpus, min(k * factor, max(k, len(corpus))), number, mask, None, threads)
        found = rescored(x, floats, candidates.indices, k, number)
    return TopK(F32.type(0) - found.scores, found.indices) if metric == "l2" else found


def checked_metric(metric: Any) -> int:
    """The number of a metric."""
    if not isinstance(metric, str) or metric not in _METRICS:
        raise ParameterError(f"metric: expected 'dot', 'cosine' or 'l2', got {shown(metric)}")
    return _METRICS[metric]


def check_corpus(corpus: Any) -> None:
    """Raise unless `corpus` is a matrix of codes that can be searched."""
    if not isinstance(corpus, DynQuantTensor):
        raise ParameterError(
            f"corpus: expected a DynQuantTensor, as from dynamic_quantize, got {type(corpus).__name__}"
        )
    fmt = corpus.format
    if fmt != DynQuantFormat.INT8_PER_ROW and not (fmt.packed and fmt.granularity != "per_tensor"):
        raise ParameterError(
            f"corpus: expected int8 per row or packed 4-bit codes per row or per group, got {shown(corpus)}"
        )
    if corpus.minimums is not None:
        raise ParameterError(f"corpus: expected codes without minimums, got {shown(corpus)}")
    if len(corpus.shape) != 2:
        raise ShapeMismatchError("(n, d)", corpus.shape, "corpus")
    if corpus.shape[1] == 0:
        raise EmptyInputError(f"corpus: expected vectors of at least one element, got shape {corpus.shape}")
    if corpus.shape[0] >= _MOST_VECTORS:
        raise ParameterError(f"corpus: expected fewer than 2**32 vectors, got {corpus.shape[0]}")
    check_arrays(corpus)
    check_finite(as_floats(corpus.scales, "corpus.scales"), "corpus.scales")


def as_queries(queries: Any, d: int, name: str = "queries") -> NDArray[Any]:
    """`queries` as floats (q, d); whether they are finite is not looked at."""
    x = as_floats(queries, name)
    if x.ndim != 2 or x.shape[1] != d:
        raise ShapeMismatchError(("q" if name == "queries" else "n", d), x.shape, name)
    return x


def as_mask(allowed: Any, q: int, n: int) -> NDArray[np.uint8]:
    """`allowed` as bytes 0 and 1, (1, n) or (q, n)."""
    mask = as_array(allowed, "allowed")
    if mask.dtype != np.bool_:
        raise DTypeError(f"allowed: expected bools, got dtype {mask.dtype}")
    if mask.shape not in ((n,), (q, n)):
        raise ShapeMismatchError(f"({n},) or ({q}, {n})", mask.shape, "allowed")
    return np.ascontiguousarray(mask).reshape(q if mask.ndim == 2 else 1, n).view(np.uint8)


def as_rows(rescore: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """`rescore` as an array of `shape` whose dtype is one of floats."""
    rows = as_array(rescore, "rescore")
    if rows.shape != shape:
        raise ShapeMismatchError(shape, rows.shape, "rescore")
    as_floats(rows[:0], "rescore")
    return rows


def search(
    queries: NDArray[Any],
    corpus: DynQuantTensor,
    k: int,
    metric: int,
    allowed: NDArray[np.uint8] | None,
    bias: NDArray[np.float32] | None,
    threads: int,
) -> TopK:
    """The best k by the codes, for checked arguments. Squared distances come negative.

    `bias` (n,) is added to dot products.
    """
    q, n = len(queries), len(corpus)
    scores, indices = np.full((q, k), -np.inf, F32), np.full((q, k), -1, np.int64)
    codes = quantize_named(queries, DynQuantFormat.INT8_PER_ROW, MaxAbs(), None, threads, "queries")
    if q == 0 or n == 0:
        return TopK(scores, indices)
    matrix, keep = code_matrix(corpus), min(k, n)
    chunk = max(_FEWEST_QUERIES, min(_MOST_QUERIES, _KEYS // keep))
    for first in range(0, q, chunk):
        rows = slice(first, first + chunk)
        mask = allowed if allowed is None or len(allowed) == 1 else allowed[rows]
        hits = np.full((threads, len(scores[rows]), keep), _NO_HIT)
        used = _core.top_k(matrix, codes.data[rows], codes.scales[rows], metric, bias, mask, hits, threads)
        if used == 0:
            raise_overflow()
        _decode(_merged(hits[:used]), scores[rows, :keep], indices[rows, :keep])
    return TopK(scores, indices)


def raise_overflow() -> NoReturn:
    """Raise because infinities of both signs met in a score."""
    raise ParameterError(
        "queries, corpus: expected scores within float32, got sums of infinities: divide the vectors by a "
        "constant"
    )


def _merged(hits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The least keys (q, k) of all parts (parts, q, k), ascending."""
    parts, q, k = hits.shape
    keys: NDArray[np.uint64] = hits[0]
    if parts > 1:
        keys = hits.transpose(1, 0, 2).reshape(q, parts * k)
        keys.partition(k - 1, axis=1)
        keys = keys[:, :k]
    keys.sort(axis=1)
    return keys


def _decode(keys: NDArray[np.uint64], scores: NDArray[np.float32], indices: NDArray[np.int64]) -> None:
    """Scores and indices of keys; kernels/top_k.pxi says what a key is."""
    found = keys != _NO_HIT
    bits = ~(keys >> np.uint64(32)).astype(np.uint32)
    bits ^= np.where(bits >> 31, np.uint32(1 << 31), np.uint32(2**32 - 1))
    np.copyto(scores, bits.view(F32), where=found)
    np.copyto(indices, (keys & np.uint64(2**32 - 1)).astype(np.int64), where=found)


def rescored(
    queries: NDArray[Any], rows: NDArray[Any], candidates: NDArray[np.int64], k: int, metric: int
) -> TopK:
    """The best k of the candidates (q, kk) by their rows. Squared distances come negative."""
    scores = np.full((len(queries), k), -np.inf, F32)
    indices = np.full((len(queries), k), -1, np.int64)
    for q, found in enumerate(candidates):
        index = np.sort(found[found >= 0])  # in the order of the file
        if index.size == 0:
            continue
        exact = float_scores(queries[q], rows[index], metric, index)
        best = np.argsort(-exact, kind="stable")[:k]
        scores[q, : best.size], indices[q, : best.size] = exact[best], index[best]
    return TopK(scores, indices)


def float_scores(
    query: NDArray[Any], rows: NDArray[Any], metric: int, index: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Scores of the rows, which are `index` of the argument ``rescore``."""
    x = as_floats(np.asarray(rows), "rescore")
    matrix = float_matrix(x, *x.shape)
    if not _core.all_finite(matrix):
        _raise_bad_row(x, index)
    scores = np.empty(len(x), F32)
    _core.score_rows(float_matrix(query, 1, query.size), matrix, metric, scores)
    return -scores if metric == _METRICS["l2"] else scores


def _raise_bad_row(x: NDArray[Any], index: NDArray[np.int64]) -> NoReturn:
    """Raise for the first element of x that is not finite."""
    row, column = (int(i) for i in np.argwhere(~np.isfinite(x.astype(F32)))[0])
    position = (int(index[row]), column)
    flat = position[0] * x.shape[1] + column
    raise NonFiniteError(flat, float(x[row, column]), "rescore", position)
