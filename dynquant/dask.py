"""Quantizing, calibrating and searching Dask arrays: larger than memory, on many machines.

Import it by name, ``import dynquant.dask``; it needs the extra ``dask``. What it returns is lazy:
`dask.compute`, or ``.compute()``, runs it wherever the caller's scheduler does. Results are those of one
machine to the bit, and do not depend on the chunks.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

try:
    import dask.array as da
except ImportError as error:
    raise ImportError("dynquant.dask needs Dask: install dynquant with the extra dask") from error

from ._calibrator import Calibrator
from ._format import DynamicScaleMode, DynQuantFormat, MaxAbs, packed_format
from ._quantize import dynamic_quantize, rank_of
from ._tensor import DynQuantTensor
from ._top_k import check_corpus, checked_metric
from ._top_k import top_k as _top_k
from ._validate import F32, U8, as_count, as_flag, as_floats
from .errors import (
    DTypeError,
    EmptyInputError,
    NonFiniteError,
    ParameterError,
    ShapeMismatchError,
    shown,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["calibrate", "quantize", "top_k"]

# A list of hits as one array, so that lists can be concatenated and reduced.
_HIT = np.dtype([("score", F32), ("index", np.int64)])


class QuantizedArrays(NamedTuple):
    """Codes and scales of an array, both lazy."""

    codes: da.Array
    scales: da.Array


class Hits(NamedTuple):
    """Scores and indices of the best of each query, both lazy."""

    scores: da.Array
    indices: da.Array


def quantize(
    a: Any,
    format: DynQuantFormat = DynQuantFormat.INT8_PER_ROW,
    mode: DynamicScaleMode = MaxAbs(),  # noqa: B008
    *,
    packed: bool = False,
) -> QuantizedArrays:
    """Quantize a Dask array to codes and scales, chunk by chunk.

    Parameters
    ----------
    a : dask.array.Array of floats, (..., k)
        Or what `dask.array.asarray` makes one of. A row along the last axis is never split: chunks that split
        rows are joined first.
    format : DynQuantFormat
        Per row, which takes two axes, or per group.
    mode : MaxAbs or Percentile
    packed : bool
        As for `dynquant.dynamic_quantize`.

    Returns
    -------
    codes : dask.array.Array of int8, or of uint8 where packed
    scales : dask.array.Array of float32
        Equal to ``data`` and ``scales`` of `dynquant.dynamic_quantize` of the whole array. Compute both in
        one call of `dask.compute`, which reads `a` once.

    Raises
    ------
    DTypeError, ShapeMismatchError
        If `a` does not hold floats, or has too few axes.
    ParameterError
        If `format` is per tensor, the length of a row is unknown, or an option has a value that it cannot
        take.
    NonFiniteError
        When computed, if `a` holds NaN or infinity.

    Examples
    --------
    >>> import dask, dask.array as da
    >>> a = da.ones((6, 4), chunks=(2, 2), dtype="float32")
    >>> codes, scales = quantize(a)
    >>> codes.chunks, scales.chunks
    (((2, 2, 2), (4,)), ((2, 2, 2),))
    >>> dask.compute(codes, scales)[1].shape
    (6,)
    """
    if not isinstance(format, DynQuantFormat) or format.granularity == "per_tensor":
        raise ParameterError(f"format: expected a DynQuantFormat per row or per group, got {shown(format)}")
    fmt = packed_format(format, packed)
    rank_of(mode, 1)
    least = 2 if fmt.granularity == "per_row" else 1
    x = _whole_rows(_as_floats(a, "a"), least, "a")
    tensors = x.map_blocks(_quantized, fmt, mode, dtype=object, meta=np.empty((0,) * x.ndim, object))
    k = x.shape[-1]
    rows, rest = x.chunks[:-1], fmt.data_shape((k,))
    codes = tensors.map_blocks(
        _data_of,
        dtype=fmt.data_dtype,
        chunks=(*rows, rest),
        meta=np.empty((0,) * x.ndim, fmt.data_dtype),
    )
    if fmt.granularity == "per_row":
        axes = tuple(range(x.ndim))
        meta = np.empty((0,) * (x.ndim - 1), F32)
        scales = da.blockwise(
            _scales_of_row, axes[:-1], tensors, axes, dtype=F32, concatenate=False, meta=meta
        )
    else:
        chunks = (*rows, fmt.scales_shape((k,)))
        scales = tensors.map_blocks(_scales_of, dtype=F32, chunks=chunks, meta=np.empty((0,) * x.ndim, F32))
    return QuantizedArrays(codes, scales)


def calibrate(a: Any, channels: bool = False) -> Any:
    """Statistics of a Dask array: a calibrator for each chunk, merged in a tree.

    Parameters
    ----------
    a : dask.array.Array of floats, any shape
        Or what `dask.array.asarray` makes one of.
    channels : bool
        Whether to keep statistics of each channel of the last axis too. Chunks that split it are joined
        first.

    Returns
    -------
    dask.delayed.Delayed
        ``compute()`` gives a `dynquant.Calibrator`. Counts, extremes and percentiles are those of one
        calibrator that saw the whole array, to the bit; mean and deviation agree as closely as `Calibrator`
        promises.

    Raises
    ------
    DTypeError, ShapeMismatchError
        If `a` does not hold floats, or has no last axis for its channels.
    ParameterError
        If `channels` is no bool, or how many there are is unknown.
    NonFiniteError
        When computed, if `a` holds NaN or infinity.

    Examples
    --------
    >>> import dask.array as da
    >>> a = da.arange(1000, chunks=100).astype("float32")
    >>> calibrator = calibrate(a).compute()
    >>> calibrator.count, calibrator.stats().max
    (1000, 999.0)
    """
    x = _as_floats(a, "a")
    count = None
    if as_flag(channels, "channels"):
        x = _whole_rows(x, 1, "a")
        count = as_count(x.shape[-1], "channels")
    if x.ndim == 0:
        x = x.reshape(1)
    seen = x.map_blocks(
        _observed,
        channels=count,
        dtype=object,
        chunks=tuple((1,) * len(c) for c in x.chunks),
        meta=np.empty((0,) * x.ndim, object),
    )
    merged = da.reduction(
        seen,
        chunk=_as_it_is,
        combine=_merged,
        aggregate=_merged,
        concatenate=False,
        dtype=object,
        meta=np.empty((), object),
    )
    return merged.to_delayed().item()


def top_k(
    queries: Any,
    corpus: Any,
    k: int,
    *,
    metric: str = "dot",
    format: DynQuantFormat = DynQuantFormat.INT8_PER_ROW,
) -> Hits:
    """The `k` vectors of a quantized corpus in chunks with the highest scores, for each query.

    Parameters
    ----------
    queries : array_like or dask.array.Array of floats, (q, d)
    corpus : tuple of dask.array.Array, or dask.array.Array of floats, (n, d)
        The codes and scales that `quantize` gives; or codes, scales and zero points, as in the files that
        `dynquant.quantize_array` writes with 4 bits. An array of floats is quantized first.
    k : int
    metric : {"dot", "cosine", "l2"}
        As for `dynquant.top_k`.
    format : DynQuantFormat
        That `corpus` has, or is quantized to: int8 per row, or packed 4-bit codes per row or per group.

    Returns
    -------
    scores : dask.array.Array of float32, (q, k)
    indices : dask.array.Array of int64, (q, k)
        As from `dynquant.top_k` of the whole corpus, bit for bit: lists of the best of each chunk are merged
        in a tree. The queries are in the chunks that they had.

    Raises
    ------
    DTypeError, ShapeMismatchError, EmptyInputError
        If the arrays do not fit `format` or each other.
    ParameterError
        If the corpus has chunks of unknown size, or an option has a value that it cannot take.
    NonFiniteError
        When computed, if queries or scales hold NaN or infinity.

    Examples
    --------
    >>> import dask, dask.array as da
    >>> vectors = da.from_array(np.eye(4, dtype=np.float32), chunks=(2, 4))
    >>> scores, indices = top_k([[0.0, 0.1, 0.0, 1.0]], quantize(vectors), 2)
    >>> dask.compute(indices)[0].tolist()
    [[3, 1]]
    """
    k = as_count(k, "k")
    checked_metric(metric)
    x = _whole_rows(_as_floats(queries, "queries"), 2, "queries")
    if x.ndim != 2:
        raise ShapeMismatchError("(q, d)", x.shape, "queries")
    codes, *steps = _corpus(corpus, format, x.shape[1])
    indices = da.arange(codes.shape[0], chunks=(codes.chunks[0],), dtype=np.int64)
    pairs = [(indices, "n"), (codes, "nc"), *((s, "ng"[: s.ndim]) for s in steps)]
    hits = da.blockwise(
        _searched,
        "nq",
        x,
        "qd",
        *(item for pair in pairs for item in pair),
        k=k,
        metric=metric,
        format=format,
        concatenate=True,
        adjust_chunks={"n": k},
        dtype=_HIT,
        meta=np.empty((0, 0), _HIT),
    )
    best = da.reduction(
        hits,
        chunk=_as_it_is,
        combine=functools.partial(_best, k=k, metric=metric),
        aggregate=functools.partial(_best, k=k, metric=metric),
        axis=0,
        keepdims=True,
        output_size=k,
        dtype=_HIT,
        meta=np.empty((0, 0), _HIT),
    ).T
    return Hits(best["score"], best["index"])


# ---- What is checked before anything is computed ----


def _as_floats(a: Any, name: str) -> da.Array:
    """`a` as a Dask array of floats."""
    x = a if isinstance(a, da.Array) else da.asarray(as_floats(a, name))
    as_floats(np.empty(0, x.dtype), name)
    return x


def _whole_rows(x: da.Array, least: int, name: str) -> da.Array:
    """`x`, no chunk of which splits a row; it must have `least` axes."""
    if x.ndim < least:
        raise ShapeMismatchError(f"(..., k) with at least {least} axes", x.shape, name)
    if np.isnan(x.shape[-1]):
        raise ParameterError(
            f"{name}: expected rows of known length, got shape {x.shape}; see compute_chunk_sizes()"
        )
    return x if len(x.chunks[-1]) == 1 else x.rechunk({x.ndim - 1: -1})


def _corpus(corpus: Any, fmt: Any, d: int) -> list[da.Array]:
    """Codes, scales and perhaps zero points of a corpus (n, d), each with whole rows."""
    if not isinstance(fmt, DynQuantFormat):
        raise ParameterError(f"format: expected a DynQuantFormat, got {shown(fmt)}")
    if isinstance(corpus, da.Array):
        corpus = quantize(corpus, fmt)
    if not isinstance(corpus, (tuple, list)) or len(corpus) not in (2, 3):
        raise ParameterError(
            "corpus: expected codes and scales as from quantize, or an array of floats, got "
            f"{type(corpus).__name__}"
        )
    arrays = [x if isinstance(x, da.Array) else da.asarray(x) for x in corpus]
    names = ("codes", "scales", "zero_points")
    n = arrays[0].shape[0] if arrays[0].ndim else 0
    if np.isnan(n):
        raise ParameterError("corpus: expected chunks of known sizes; see compute_chunk_sizes()")
    _check_format(fmt, d, len(arrays) == 3)
    shapes = (fmt.data_shape((n, d)), fmt.scales_shape((n, d)), fmt.scales_shape((n, d)))
    dtypes: tuple[np.dtype[Any], ...] = (fmt.data_dtype, F32, U8)
    for array, shape, dtype, name in zip(arrays, shapes, dtypes, names, strict=False):
        if array.dtype != dtype:
            raise DTypeError(f"corpus, {name}: expected {dtype}, got dtype {array.dtype}")
        if array.shape != shape:
            raise ShapeMismatchError(shape, array.shape, f"corpus, {name}")
    return [array.rechunk({1: -1}) if array.ndim == 2 else array for array in arrays]


def _check_format(fmt: DynQuantFormat, d: int, has_zero_points: bool) -> None:
    """Raise unless `top_k` takes a corpus of this format, by asking it with one that has no vectors."""
    if d == 0:
        raise EmptyInputError("corpus: expected vectors of at least one element, got none")
    scales = np.empty(fmt.scales_shape((0, d)), F32)
    zero_points = np.empty(scales.shape, U8) if has_zero_points else None
    codes = np.empty(fmt.data_shape((0, d)), fmt.data_dtype)
    check_corpus(DynQuantTensor(codes, scales, zero_points, (0, d), fmt))


# ---- What runs on the workers, for one chunk or for the results of some ----


def _quantized(
    block: NDArray[Any], fmt: DynQuantFormat, mode: DynamicScaleMode, block_info: Any = None
) -> DynQuantTensor:
    try:
        return dynamic_quantize(block, fmt, mode)
    except NonFiniteError as error:
        raise _at_place(error, block_info) from error


def _at_place(error: NonFiniteError, block_info: Any) -> NonFiniteError:
    """An error about a block as one about the array, where its shape is known."""
    whole: dict[str, Any] = block_info[0]
    if np.isnan(whole["shape"]).any():
        return error
    starts = [start for start, _ in whole["array-location"]]
    position = tuple(int(a + b) for a, b in zip(starts, error.position, strict=True))
    flat = int(np.ravel_multi_index(position, tuple(map(int, whole["shape"]))))
    return NonFiniteError(flat, error.value, "a", position)


def _data_of(tensor: DynQuantTensor) -> NDArray[Any]:
    return tensor.data


def _scales_of(tensor: DynQuantTensor) -> NDArray[np.float32]:
    return tensor.scales


def _scales_of_row(tensors: list[DynQuantTensor]) -> NDArray[np.float32]:
    """Of a row of chunks, of which there is one."""
    return tensors[0].scales


def _observed(block: NDArray[Any], channels: int | None, block_info: Any = None) -> Calibrator:
    calibrator = Calibrator(channels)
    try:
        calibrator.update(block)
    except NonFiniteError as error:
        raise _at_place(error, block_info) from error
    return calibrator


def _merged(parts: Any, axis: Any = None, keepdims: Any = None) -> Calibrator:
    """A new calibrator of all in nested lists: they may be merged once more, if a worker is lost."""
    first, *others = _flat(parts)
    merged = Calibrator(first.channels)
    for part in (first, *others):
        merged.merge(part)
    return merged


def _flat(parts: Any) -> list[Calibrator]:
    if isinstance(parts, Calibrator):
        return [parts]
    return [calibrator for part in parts for calibrator in _flat(part)]


def _searched(
    queries: NDArray[Any],
    indices: NDArray[np.int64],
    codes: NDArray[Any],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.uint8] | None = None,
    *,
    k: int,
    metric: str,
    format: DynQuantFormat,
) -> NDArray[Any]:
    """The best k of one chunk, (k, q); `indices` are those of its vectors."""
    corpus = DynQuantTensor(codes, scales, zero_points, (len(codes), queries.shape[1]), format)
    found = _top_k(queries, corpus, k, metric=metric)
    hits = np.empty(found.scores.shape, _HIT)
    hits["score"] = found.scores
    hits["index"] = found.indices
    if len(indices):
        np.add(hits["index"], indices[0], out=hits["index"], where=found.indices >= 0)
    return hits.T


def _as_it_is(block: Any, axis: Any = None, keepdims: Any = None) -> Any:
    return block


def _best(hits: NDArray[Any], k: int, metric: str, axis: Any = None, keepdims: Any = None) -> NDArray[Any]:
    """The best k of lists that stand one below the other, in ascending order of indices."""
    scores = hits["score"] if metric == "l2" else -hits["score"]
    order = np.lexsort((hits["index"] < 0, scores), axis=0)[:k]
    best: NDArray[Any] = np.take_along_axis(hits, order, 0)
    return best
