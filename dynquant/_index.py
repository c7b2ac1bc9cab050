"""An index of embeddings: quantized vectors with ids, searched exactly, in memory or from a folder."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._files import open_folder, save_folder
from ._format import DynQuantFormat
from ._hadamard import rotate_named
from ._quantize import dynamic_quantize
from ._tensor import DynQuantTensor, tensor_of_checked
from ._top_k import TopK, as_queries, checked_metric, float_scores, raise_overflow, search
from ._transform import fixed_signs
from ._validate import (
    F32,
    U8,
    as_array,
    as_count,
    as_finite_vector,
    as_flag,
    as_floats,
    as_path,
    as_thread_count,
    check_finite,
    float_matrix,
    is_integer,
)
from ._weights import quantize_matrix
from .errors import DTypeError, ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

_NAME = "index.json"
_KIND = "dynquant embedding index"
_VERSION = 1
_I64 = np.dtype(np.int64)


@dataclass(frozen=True)
class _Segment:
    """Vectors that lie together. `alive` (n,) is None while none of them is removed."""

    tensor: DynQuantTensor
    ids: NDArray[np.int64]
    bias: NDArray[np.float32] | None
    alive: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.ids) if self.alive is None else int(self.alive.sum())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is left, by the names of files."""
        tensor, alive = self.tensor, slice(None) if self.alive is None else self.alive
        arrays = {"codes": tensor.data[alive], "scales": tensor.scales[alive], "ids": self.ids[alive]}
        if tensor.zero_points is not None:
            arrays["zero_points"] = tensor.zero_points[alive]
        if self.bias is not None:
            arrays["bias"] = self.bias[alive]
        return arrays

    def without(self, ids: NDArray[np.int64]) -> _Segment:
        gone = np.isin(self.ids, ids)
        alive = ~gone if self.alive is None else self.alive & ~gone
        return replace(self, alive=alive) if gone.any() else self


class EmbeddingIndex:
    """Vectors quantized to 8 or 4 bits, with ids, of which each query finds the best, exactly.

    Parameters
    ----------
    dim : int
        Length of a vector.
    bits : {8, 4}
        8: a scale for each vector. 4: packed codes with scales and zero points.
    group_size : int, optional
        Elements that share a scale, with ``bits=4``; the whole vector by default. 32 is a good choice.
    hadamard : bool
        Rotate vectors and queries by a Hadamard matrix first, after changing fixed signs, which evens out
        large elements. Worth it with 4 bits.
    center : array_like of floats, (dim,), or "mean", optional
        Subtracted from vectors and queries before they are quantized; the scores are those of the vectors
        with it. "mean" is the mean of the first batch that is added. Worth it for embeddings with a large
        mean in a few elements. With the cosine it is the center of vectors of length 1.
    metric : {"dot", "cosine", "l2"}
        The dot product, the cosine, or the squared Euclidean distance. For the cosine vectors and queries are
        divided by their norms before they are quantized.

    Raises
    ------
    ParameterError, ShapeMismatchError, DTypeError, NonFiniteError
        If an argument has a value that it cannot take.

    Notes
    -----
    Searching in several threads is safe, also while another adds, removes or saves: a search sees what was
    there when it began. Only one thread may change an index at a time.

    Examples
    --------
    >>> index = EmbeddingIndex(2, metric="cosine")
    >>> index.add([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], ids=[10, 11, 12])
    >>> scores, ids = index.search([[1.0, 0.1]], 2)
    >>> ids.tolist()
    [[10, 11]]
    """

    def __init__(
        self,
        dim: int,
        *,
        bits: int = 8,
        group_size: int | None = None,
        hadamard: bool = False,
        center: ArrayLike | str | None = None,
        metric: str = "dot",
    ) -> None:
        self._dim = as_count(dim, "dim")
        if not is_integer(bits) or bits not in (4, 8):
            raise ParameterError(f"bits: expected 4 or 8, got {shown(bits)}")
        if bits == 8 and group_size is not None:
            raise ParameterError(f"group_size: expected None with 8 bits, got {shown(group_size)}")
        self._bits = int(bits)
        self._group_size = None if group_size is None else as_count(group_size, "group_size")
        self._hadamard = as_flag(hadamard, "hadamard")
        self._metric_number, self._metric = checked_metric(metric), metric
        self._next_id = 0
        self._segments: tuple[_Segment, ...] = ()
        self._center: NDArray[np.float32] | None = None
        self._center_is_due = isinstance(center, str)
        if isinstance(center, str):
            if center != "mean":
                raise ParameterError(f"center: expected an array, 'mean' or None, got {shown(center)}")
        elif center is not None:
            self._center = as_finite_vector(center, "center", self._dim).astype(F32, copy=True)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._dim

    @property
    def metric(self) -> str:
        """The metric that scores are of."""
        return self._metric

    @property
    def ids(self) -> NDArray[np.int64]:
        """A copy of the ids, in the order in which the vectors were added."""
        return np.concatenate([np.empty(0, _I64), *(s.arrays()["ids"] for s in self._segments)])

    @property
    def memory_bytes(self) -> int:
        """Bytes of codes, scales, zero points, ids and corrections, memory-mapped ones too."""
        return sum(
            s.tensor.memory_bytes + s.ids.nbytes + (0 if s.bias is None else s.bias.nbytes)
            for s in self._segments
        )

    def __len__(self) -> int:
        return sum(map(len, self._segments))

    def __repr__(self) -> str:
        return (
            f"EmbeddingIndex({len(self)} vectors of {self._dim}, {self._bits} bits, {self._metric}, "
            f"{self.memory_bytes} bytes)"
        )

    def add(self, vectors: ArrayLike, ids: ArrayLike | None = None) -> None:
        """Quantize vectors and append them.

        Parameters
        ----------
        vectors : array_like of floats, (n, dim)
        ids : array_like of ints, (n,), optional
            By default numbers that count on from the largest id so far. Several vectors may have the same id.

        Raises
        ------
        DTypeError, ShapeMismatchError, NonFiniteError
            If the arguments do not hold such arrays. After any of these the index is as it was.

        Notes
        -----
        Vectors that are there already are copied so rarely that adding many batches takes time in proportion
        to their size, times the logarithm of how many there are.
        """
        x = as_queries(vectors, self._dim, "vectors")
        check_finite(x, "vectors")
        labels = self._as_ids(ids, len(x))
        if len(x) == 0:
            return
        x = self._unit(x)
        center = self._center
        if self._center_is_due:
            center = (x.astype(F32, copy=False).sum(0, np.float64) / len(x)).astype(F32)
        prepared, bias = self._centered(x, center)
        segment = _Segment(self._quantized(prepared), labels, bias)
        self._center, self._center_is_due = center, False
        self._next_id = max(self._next_id, int(labels.max()) + 1)
        self._segments = _appended(self._segments, segment)

    def _as_ids(self, ids: ArrayLike | None, n: int) -> NDArray[np.int64]:
        if ids is None:
            if self._next_id + n > np.iinfo(_I64).max:
                raise ParameterError(
                    f"ids: expected ints, for above {self._next_id - 1} fewer than {n} are left, got None"
                )
            return np.arange(self._next_id, self._next_id + n, dtype=_I64)
        labels = as_array(ids, "ids")
        if labels.dtype.kind not in "iu" and labels.size:
            raise DTypeError(f"ids: expected ints, got dtype {labels.dtype}")
        if labels.shape != (n,):
            raise ShapeMismatchError((n,), labels.shape, "ids")
        if labels.dtype == np.uint64 and labels.size and labels.max() > np.iinfo(_I64).max:
            raise ParameterError(f"ids: expected ints of 64 bits with a sign, got {labels.max()}")
        return labels.astype(_I64)

    def _unit(self, x: NDArray[Any]) -> NDArray[Any]:
        """x, divided by its norms for the cosine."""
        if self._metric != "cosine":
            return x
        norms = np.empty(len(x), F32)
        _core.row_norms(float_matrix(x, *x.shape), norms)
        far = (norms > 0) & ~((norms >= np.finfo(F32).tiny) & (norms < np.inf))
        if far.any():  # float32 cannot hold such norms, or not with all digits
            x = x.astype(F32)
            _, exponents = np.frexp(np.abs(x[far]).max(axis=1, keepdims=True))
            x[far] = np.ldexp(x[far], -exponents)
            _core.row_norms(float_matrix(x, *x.shape), norms)
        np.copyto(norms, 1, where=norms == 0)
        return x.astype(F32, copy=False) / norms.reshape(-1, 1)

    def _centered(
        self, x: NDArray[Any], center: NDArray[np.float32] | None
    ) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """x - center, and center . (x - center), which a score lacks without it; none for distances."""
        if center is None:
            return x, None
        x = _differences(x, center, "vectors")
        if self._metric == "l2":
            return x, None
        bias = float_products(center, x)
        if not np.isfinite(bias).all():
            raise ParameterError(
                "vectors: expected products with the center within float32, got vectors that are too long: "
                "divide them by a constant"
            )
        return x, bias

    def _rotated(self, x: NDArray[Any], name: str) -> NDArray[Any]:
        if not self._hadamard:
            return x
        return rotate_named(x.astype(F32, copy=False) * fixed_signs(self._dim), None, None, name)

    def _quantized(self, x: NDArray[Any]) -> DynQuantTensor:
        x = self._rotated(x, "vectors")
        if self._bits == 8:
            return dynamic_quantize(x)
        fmt = _format(self._bits, self._group_size)
        return quantize_matrix(x, fmt, False, False, None, 1, "vectors")

    def remove(self, ids: ArrayLike) -> int:
        """Remove all vectors that have one of `ids`; returns how many.

        Parameters
        ----------
        ids : array_like of ints, or an int
            Those that no vector has are ignored.
        """
        labels = np.atleast_1d(as_array(ids, "ids"))
        labels = self._as_ids(labels, labels.size)
        before = len(self)
        segments = (segment.without(labels) for segment in self._segments)
        self._segments = tuple(_compacted(s) for s in segments if len(s))
        return before - len(self)

    def search(
        self,
        queries: ArrayLike,
        k: int,
        *,
        allowed: ArrayLike | None = None,
        rescore: ArrayLike | Callable[[NDArray[np.int64]], ArrayLike] | None = None,
        oversample: int = 4,
        num_threads: int = 1,
    ) -> TopK:
        """The `k` best vectors for each query.

        Parameters
        ----------
        queries : array_like of floats, (q, dim)
        k : int
        allowed : array_like, optional
            The ids that may be found, as ints; or a mask, (n,) or (q, n), over the vectors in the order of
            `ids`.
        rescore : array_like of floats, (m, dim), or callable, optional
            Vectors before they were quantized: row i is that of id i; may be memory-mapped. Or a function
            that takes ids, an int64 array, and returns their vectors. The best ``k * oversample`` are scored
            again by them.
        oversample, num_threads : int
            As for `top_k`.

        Returns
        -------
        scores : ndarray of float32, (q, k)
            Best first. Where there are fewer than `k`, -inf or, for "l2", inf.
        ids : ndarray of int64, (q, k)
            Of equal scores that of the vector which was added first; -1 where there is no hit.

        Raises
        ------
        DTypeError, ShapeMismatchError, NonFiniteError, ParameterError
            As from `top_k`.
        """
        k, factor, threads = (
            as_count(k, "k"),
            as_count(oversample, "oversample"),
            as_thread_count(num_threads),
        )
        x = as_queries(queries, self._dim)
        check_finite(x, "queries")
        segments = self._segments
        masks = _masks(segments, allowed, len(x))
        wanted = k if rescore is None else min(k * factor, max(k, sum(map(len, segments))))
        scores, positions = self._by_codes(x, segments, masks, wanted, threads)
        ids = np.concatenate([*(s.ids for s in segments), np.full(1, -1, _I64)])[positions]
        if rescore is not None:
            scores, ids = self._by_floats(x, positions, ids, rescore, k)
        return TopK(F32.type(0) - scores, ids) if self._metric == "l2" else TopK(scores, ids)

    def _by_codes(
        self,
        x: NDArray[Any],
        segments: tuple[_Segment, ...],
        masks: list[NDArray[np.uint8] | None],
        k: int,
        threads: int,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores, and positions in all segments; distances come negative."""
        x = self._unit(x)
        queries = x if self._center is None else _differences(x, self._center, "queries")
        queries = self._rotated(queries, "queries")
        metric = 2 if self._metric == "l2" else 0
        scores = [np.full((len(x), k), -np.inf, F32)]
        positions = [np.full((len(x), k), -1, _I64)]
        start = 0
        for segment, mask in zip(segments, masks, strict=True):
            found = search(queries, segment.tensor, k, metric, mask, segment.bias, threads)
            scores.append(found.scores)
            positions.append(np.where(found.indices < 0, -1, found.indices + start))
            start += len(segment.ids)
        best, where = _best(np.hstack(scores[1:] or scores), np.hstack(positions[1:] or positions), k)
        if self._center is not None and self._metric != "l2":
            with np.errstate(invalid="ignore"):
                best += float_products(self._center, x)[:, None]
            if np.isnan(best).any():
                raise_overflow()
        return best, where

    def _by_floats(
        self, x: NDArray[Any], positions: NDArray[np.int64], ids: NDArray[np.int64], rescore: Any, k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        rows_of = rescore if callable(rescore) else self._rows_by_id(rescore)
        scores = np.full((len(x), k), -np.inf, F32)
        best_ids = np.full((len(x), k), -1, _I64)
        for q in range(len(x)):
            order = np.argsort(positions[q], kind="stable")
            found = ids[q, order[positions[q, order] >= 0]]
            if found.size == 0:
                continue
            rows = as_array(rows_of(found), "rescore")
            if rows.shape != (found.size, self._dim):
                raise ShapeMismatchError((found.size, self._dim), rows.shape, "rescore")
            exact = float_scores(x[q], rows, self._metric_number, found)
            best = np.argsort(-exact, kind="stable")[:k]
            scores[q, : best.size], best_ids[q, : best.size] = exact[best], found[best]
        return scores, best_ids

    def _rows_by_id(self, rescore: Any) -> Callable[[NDArray[np.int64]], NDArray[Any]]:
        rows = as_array(rescore, "rescore")
        if rows.ndim != 2 or rows.shape[1] != self._dim:
            raise ShapeMismatchError(("m", self._dim), rows.shape, "rescore")
        as_floats(rows[:0], "rescore")

        def rows_of(ids: NDArray[np.int64]) -> NDArray[Any]:
            if ids.min() < 0 or ids.max() >= len(rows):
                bad = ids[(ids < 0) | (ids >= len(rows))][0]
                raise ParameterError(
                    f"rescore: expected a row for each id, got {len(rows)} rows and id {bad}"
                )
            return rows[ids]

        return rows_of

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a folder, whole or not at all.

        Parameters
        ----------
        path : str or os.PathLike
            A folder, which is made if there is none. An index in it is replaced; who opens it meanwhile gets
            the old one or the new one, and who has it open keeps the old one.

        Raises
        ------
        OSError
            If the files cannot be written. What was there is then as it was.

        Notes
        -----
        The folder has ``index.json`` and the ``.npy`` files that it names: codes, scales, ids and, where
        there are any, zero_points, bias and center. ``numpy.load`` reads them.
        """
        folder = as_path(path)
        segments = self._segments or (self._no_vectors(),)
        arrays: dict[str, list[NDArray[Any]]] = {}
        for segment in segments:
            for name, array in segment.arrays().items():
                arrays.setdefault(name, []).append(array)
        if self._center is not None:
            arrays["center"] = [self._center]
        content = {
            "kind": _KIND,
            "version": _VERSION,
            "dim": self._dim,
            "bits": self._bits,
            "group_size": self._group_size,
            "hadamard": self._hadamard,
            "center": "due" if self._center_is_due else "given" if self._center is not None else "none",
            "metric": self._metric,
            "next_id": self._next_id,
            "count": sum(map(len, segments)),
        }
        save_folder(folder, _NAME, content, arrays)

    def _no_vectors(self) -> _Segment:
        fmt, shape = _format(self._bits, self._group_size), (0, self._dim)
        data, scales = np.empty(fmt.data_shape(shape), fmt.data_dtype), np.empty(fmt.scales_shape(shape), F32)
        zero_points = np.empty(scales.shape, U8) if fmt.packed else None
        bias = np.empty(0, F32) if self._center is not None and self._metric != "l2" else None
        return _Segment(DynQuantTensor(data, scales, zero_points, shape, fmt), np.empty(0, _I64), bias)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, mmap: bool = True) -> EmbeddingIndex:
        """An index that `save` wrote.

        Parameters
        ----------
        path : str or os.PathLike
        mmap : bool
            Map the files, which reads only what a search needs, and shares it between processes. Otherwise
            they are read into memory. What is added to a mapped index is in memory until it is saved.

        Raises
        ------
        ParameterError
            If a file of it is damaged or something else; the message has its name.
        OSError
            If the folder cannot be read.
        """
        folder, mapped = as_path(path), as_flag(mmap, "mmap")
        content, arrays = open_folder(folder, _NAME, _layout, mapped)
        index = cls(
            content["dim"],
            bits=content["bits"],
            group_size=content["group_size"],
            hadamard=content["hadamard"],
            center="mean" if content["center"] == "due" else arrays.get("center"),
            metric=content["metric"],
        )
        index._next_id = content["next_id"]
        for name in ("scales", "bias"):
            if name in arrays:
                check_finite(arrays[name], os.path.join(folder, content["files"][name]))
        if content["count"]:
            shape, fmt = (content["count"], index._dim), _format(content["bits"], content["group_size"])
            zero_points = arrays.get("zero_points")
            tensor = DynQuantTensor(arrays["codes"], arrays["scales"], zero_points, shape, fmt)
            index._segments = (_Segment(tensor, arrays["ids"], arrays.get("bias")),)
        return index


def _differences(x: NDArray[Any], center: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """x - center."""
    with np.errstate(over="ignore"):
        differences = x.astype(F32, copy=False) - center
    if not _core.all_finite(float_matrix(differences, *differences.shape)):
        raise ParameterError(
            f"{name}: expected differences from the center within float32, got vectors that are too long: "
            "divide them by a constant"
        )
    return differences


def float_products(x: NDArray[np.float32], rows: NDArray[Any]) -> NDArray[np.float32]:
    """x . row of each row, from sums in float64."""
    out = np.empty(len(rows), F32)
    _core.score_rows(float_matrix(x, 1, x.size), float_matrix(rows, *rows.shape), 0, out)
    return out


def _format(bits: int, group_size: int | None) -> DynQuantFormat:
    if bits == 8:
        return DynQuantFormat.INT8_PER_ROW
    if group_size is None:
        return DynQuantFormat.INT4_PER_ROW_PACKED
    return DynQuantFormat.int4_per_group_packed(group_size)


def _layout(content: dict[str, Any]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """{name: (dtype, shape)} of the arrays of an index."""
    if content["kind"] != _KIND or content["version"] != _VERSION:
        raise ValueError("another kind")
    n, dim, next_id = content["count"], content["dim"], content["next_id"]
    if any(type(number) is not int or number < 0 for number in (n, dim, next_id)):
        raise ValueError("counts")
    if content["center"] not in ("none", "due", "given"):
        raise ValueError("center")
    checked = EmbeddingIndex(
        dim,
        bits=content["bits"],
        group_size=content["group_size"],
        hadamard=content["hadamard"],
        metric=content["metric"],
    )
    fmt = _format(content["bits"], content["group_size"])
    layout: dict[str, tuple[Any, tuple[int, ...]]] = {
        "codes": (fmt.data_dtype, fmt.data_shape((n, dim))),
        "scales": (F32, fmt.scales_shape((n, dim))),
        "ids": (_I64, (n,)),
    }
    if fmt.packed:
        layout["zero_points"] = (U8, fmt.scales_shape((n, dim)))
    if content["center"] == "given":
        layout["center"] = (F32, (dim,))
        if checked.metric != "l2":
            layout["bias"] = (F32, (n,))
    return layout


def _appended(segments: tuple[_Segment, ...], segment: _Segment) -> tuple[_Segment, ...]:
    """With one more segment; segments in memory are joined while the last is at least half its neighbor.

    So each vector is copied once for each doubling, and there are as many segments as doublings.
    """
    kept = [*segments, segment]
    while len(kept) > 1 and _in_memory(kept[-2]) and 2 * len(kept[-1].ids) >= len(kept[-2].ids):
        second, first = kept.pop(), kept.pop()
        kept.append(_joined([first.arrays(), second.arrays()], first.tensor))
    return tuple(kept)


def _compacted(segment: _Segment) -> _Segment:
    """Without what is removed, where that is more than half of it."""
    if segment.alive is None or 2 * len(segment) > len(segment.ids) or not _in_memory(segment):
        return segment
    return _joined([segment.arrays()], segment.tensor)


def _in_memory(segment: _Segment) -> bool:
    return not isinstance(segment.tensor.data, np.memmap)


def _joined(parts: list[dict[str, NDArray[Any]]], like: DynQuantTensor) -> _Segment:
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    shape = (len(arrays["ids"]), like.shape[1])
    tensor = tensor_of_checked(
        arrays["codes"], arrays["scales"], shape, like.format, arrays.get("zero_points")
    )
    return _Segment(tensor, arrays["ids"], arrays.get("bias"))


def _masks(
    segments: tuple[_Segment, ...], allowed: ArrayLike | None, q: int
) -> list[NDArray[np.uint8] | None]:
    """For each segment the vectors that may be found, (1, n) or (q, n); None where all may."""
    if allowed is None:
        return [None if s.alive is None else _as_bytes(s.alive[None]) for s in segments]
    given = as_array(allowed, "allowed")
    if given.dtype != np.bool_ and given.dtype.kind not in "iu" and given.size:
        raise DTypeError(f"allowed: expected ids or bools, got dtype {given.dtype}")
    if given.dtype != np.bool_:
        if given.ndim != 1:
            raise ShapeMismatchError("(ids,)", given.shape, "allowed")
        masks = (np.isin(s.ids, given) for s in segments)
        return [
            _as_bytes((mask if s.alive is None else mask & s.alive)[None])
            for mask, s in zip(masks, segments, strict=True)
        ]
    n = sum(map(len, segments))
    if given.shape not in ((n,), (q, n)):
        raise ShapeMismatchError(f"({n},) or ({q}, {n})", given.shape, "allowed")
    return _masks_by_position(segments, given.reshape(math.prod(given.shape[:-1]), n))


def _masks_by_position(
    segments: tuple[_Segment, ...], given: NDArray[np.bool_]
) -> list[NDArray[np.uint8] | None]:
    masks: list[NDArray[np.uint8] | None] = []
    start = 0
    for segment in segments:
        mask = given[:, start : start + len(segment)]
        start += len(segment)
        if segment.alive is not None:
            whole = np.zeros((len(given), len(segment.ids)), np.bool_)
            whole[:, segment.alive] = mask
            mask = whole
        masks.append(_as_bytes(mask))
    return masks


def _as_bytes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(mask).view(np.uint8)


def _best(
    scores: NDArray[np.float32], positions: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The best k of lists that stand side by side in ascending order of positions."""
    if scores.shape[1] <= k:
        return scores, positions
    order = np.lexsort((positions < 0, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)
