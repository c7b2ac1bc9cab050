"""What is measured: one table of cases.

A case says what dynquant does, what a NumPy user would write in its place, and what any program would at
least have to read, write and compute. Where dynquant is given `out`, the NumPy expression is given its result
and a work array too, so that neither pays for memory that the other does not.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dynquant as dq
from dynquant import _isa

from . import oracle

Arrays = dict[str, Any]
Call = Callable[[Arrays], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    `read` and `written` are bytes of distinct memory; `passes` is how often what is read has to be read,
    2 where a scale over all of it must be known before the first code. `operation` names the peers'
    equivalents in peers.py. `ours` must agree with `oracle` to `rtol`, 0 being bit for bit. Cases of one
    `group` and of as many `threads` share a table; `layer` is (out_features, in_features, rows), and
    `activations` says what these rows are.
    """

    name: str
    what: str
    operation: str
    setup: Callable[[], Arrays]
    ours: Call
    numpy: Call
    oracle: Call
    read: int
    written: int
    passes: int = 1
    divides: int = 0
    multiply_adds: int = 0
    rtol: float = 0.0
    group: str = "operations"
    layer: tuple[int, int, int] | None = None
    activations: str | None = None
    threads: int = 1


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# ----------------------------------------------------------------------------------------------------------
# NumPy's side


HALF = np.float32(0.5)


def numpy_int8(a: Arrays, axis: int | None = None) -> Any:
    """As little as gives these codes: halves away from zero by a truncating copy, and no clip, since nothing
    exceeds the largest magnitude."""
    x, work, out = a["x"], a["work"], a["out"]
    scale = np.abs(x, out=work).max(axis=axis, keepdims=True) / np.float32(127)
    np.divide(x, scale, out=work)
    work += np.copysign(HALF, work)
    np.copyto(out, work, casting="unsafe")
    return out, scale


def numpy_int8_new(x: np.ndarray, axis: int | None = None, clip: int = 127) -> Any:
    """The definition, as one would write it down."""
    scale = np.abs(x).max(axis=axis, keepdims=True) / np.float32(clip)
    v = x / scale
    return np.clip(np.trunc(v + np.copysign(HALF, v)), -clip, clip).astype(np.int8), scale


def numpy_int4_packed(a: Arrays) -> Any:
    codes, scale = numpy_int8_new(a["x"], clip=7)
    return (codes[0::2] & 0x0F) | (codes[1::2] << 4), scale


def numpy_percentile_scale(a: Arrays) -> Any:
    rank = oracle.rank(a["p"], a["x"].size)
    return np.partition(np.abs(a["x"]), rank)[rank] / np.float32(127)


def numpy_percentile_rows(a: Arrays) -> Any:
    x, work, out = a["x"], a["work"], a["out"]
    rank = oracle.rank(a["p"], x.shape[1])
    np.abs(x, out=work).partition(rank, axis=1)
    scale = work[:, rank, None] / np.float32(127)
    np.divide(x, scale, out=work)
    work += np.copysign(HALF, work)
    np.clip(work, -127, 127, out=work)
    np.copyto(out, work, casting="unsafe")
    return out, scale


def numpy_column_maxima(a: Arrays) -> Any:
    return np.abs(a["x"]).max(0), np.abs(a["w"]).max(0)


def numpy_calibration(a: Arrays) -> Any:
    x = np.concatenate(a["batches"])
    rank = oracle.rank(0.99, x.size)
    moments = x.min(), x.max(), x.mean(dtype=np.float64), x.std(dtype=np.float64)
    return *moments, np.partition(np.abs(x), rank)[rank]


# ----------------------------------------------------------------------------------------------------------
# Families of cases


def int8_per_tensor(n: int) -> Case:
    return Case(
        name=f"int8_tensor_{n}",
        what=f"int8 per tensor, {n:,} floats, into out",
        operation="int8_per_tensor",
        setup=lambda: {"x": normal(n), "work": np.empty(n, np.float32), "out": np.empty(n, np.int8)},
        ours=lambda a: dq.dynamic_quantize_int8(a["x"], out=a["out"]),
        numpy=numpy_int8,
        oracle=lambda a: oracle.quantized(a["x"], 127),
        read=4 * n,
        written=n,
        passes=2,
        multiply_adds=n,
    )


def int8_per_tensor_new(n: int, dtype: type) -> Case:
    bits = 8 * np.dtype(dtype).itemsize
    return Case(
        name=f"int8_tensor_f{bits}_{n}_new",
        what=f"int8 per tensor, {n:,} float{bits}, new arrays",
        operation="int8_per_tensor" if bits == 32 else "int8_per_tensor_f16",
        setup=lambda: {"x": normal(n).astype(dtype)},
        ours=lambda a: dq.dynamic_quantize_int8(a["x"]),
        numpy=lambda a: numpy_int8_new(a["x"].astype(np.float32, copy=False)),
        oracle=lambda a: oracle.quantized(a["x"], 127),
        read=n * bits // 8,
        written=n,
        passes=2,
        multiply_adds=n,
    )


def int8_per_row(m: int, k: int, *, new: bool) -> Case:
    work = {} if new else {"work": np.empty((m, k), np.float32), "out": np.empty((m, k), np.int8)}
    return Case(
        name=f"int8_row_{m}x{k}" + "_new" * new,
        what=f"int8 per row, {m} x {k}, " + ("new arrays" if new else "into out"),
        operation="int8_per_row",
        setup=lambda: {"x": normal(m, k), **work},
        ours=lambda a: dq.dynamic_quantize_int8_per_row(a["x"], out=a.get("out")),
        numpy=(lambda a: numpy_int8_new(a["x"], axis=1)) if new else (lambda a: numpy_int8(a, axis=1)),
        oracle=lambda a: oracle.quantized(a["x"], 127, axis=1),
        read=4 * m * k,
        written=m * k,
        multiply_adds=m * k,
    )


def int4_packed(n: int) -> Case:
    def expected(a: Arrays) -> Any:
        codes, scale = oracle.quantized(a["x"], 7)
        return oracle.packed(codes), scale

    return Case(
        name=f"int4_packed_{n}",
        what=f"int4 packed, {n:,} floats, new arrays",
        operation="int4_packed",
        setup=lambda: {"x": normal(n)},
        ours=lambda a: dq.dynamic_quantize_int4(a["x"], packed=True),
        numpy=numpy_int4_packed,
        oracle=expected,
        read=4 * n,
        written=n // 2,
        passes=2,
        multiply_adds=n,
    )


def percentile_scale(n: int, p: float) -> Case:
    return Case(
        name=f"percentile_{n}",
        what=f"scale by percentile {p}, {n:,} floats",
        operation="percentile_scale",
        setup=lambda: {"x": normal(n), "p": p},
        ours=lambda a: dq.compute_scale(a["x"], 127, dq.Percentile(p)),
        numpy=numpy_percentile_scale,
        oracle=lambda a: oracle.percentile(a["x"], p) / np.float32(127),
        read=4 * n,
        written=0,
    )


def percentile_rows(m: int, k: int, p: float) -> Case:
    def expected(a: Arrays) -> Any:
        scale = oracle.percentile(a["x"], p) / np.float32(127)
        return oracle.codes(a["x"], scale[:, None], 127), scale

    return Case(
        name=f"percentile_row_{m}x{k}",
        what=f"int8 per row, percentile {p}, {m} x {k}, into out",
        operation="percentile_rows",
        setup=lambda: {
            "x": normal(m, k),
            "p": p,
            "work": np.empty((m, k), np.float32),
            "out": np.empty((m, k), np.int8),
        },
        ours=lambda a: dq.dynamic_quantize_int8_per_row(a["x"], dq.Percentile(p), out=a["out"]),
        numpy=numpy_percentile_rows,
        oracle=expected,
        read=4 * m * k,
        written=m * k,
        multiply_adds=m * k,
    )


def dequantize(n: int) -> Case:
    def setup() -> Arrays:
        q = dq.dynamic_quantize_int8(normal(n))
        return {"q": q, "codes": q.data, "scale": q.scales[0], "out": np.empty(n, np.float32)}

    return Case(
        name=f"dequantize_{n}",
        what=f"dequantize int8, {n:,} codes, into out",
        operation="dequantize",
        setup=setup,
        ours=lambda a: a["q"].dequantize(out=a["out"]),
        numpy=lambda a: np.multiply(a["codes"], a["scale"], out=a["out"]),
        oracle=lambda a: a["codes"].astype(np.float32) * a["scale"],
        read=n,
        written=4 * n,
        multiply_adds=n,
    )


def smooth(m: int, k: int, *, weights: bool, in_place: bool) -> Case:
    """In place, every other call takes the inverse factors: x neither overflows nor vanishes."""
    ours = dq.smooth_weights if weights else dq.smooth_activations
    ufunc = np.multiply if weights else np.divide

    def setup() -> Arrays:
        x = normal(m, k)
        factors = np.exp2(np.random.default_rng(1).uniform(-1, 1, k)).astype(np.float32)
        turns = itertools.cycle((factors, 1 / factors) if in_place else (factors,))
        return {"x": x, "factors": factors, "turns": turns, "out": x if in_place else np.empty_like(x)}

    array = "weights" if weights else "activations"
    return Case(
        name=f"smooth_{array}_{m}x{k}" + "_in_place" * in_place,
        what=f"smooth {array}, {m} x {k}, " + ("in place" if in_place else "into out"),
        operation="smooth_weights" if weights else "smooth_activations",
        setup=setup,
        ours=lambda a: ours(a["x"], next(a["turns"]), out=a["out"]),
        numpy=lambda a: ufunc(a["x"], next(a["turns"]), out=a["out"]),
        oracle=lambda a: ufunc(a["x"], a["factors"]),
        read=4 * m * k,
        written=4 * m * k,
        divides=0 if weights else m * k,
        multiply_adds=m * k if weights else 0,
    )


def column_maxima(m: int, k: int) -> Case:
    return Case(
        name=f"smooth_factors_{m}x{k}",
        what=f"smooth factors, 2 of {m} x {k}; others: maxima only",
        operation="column_maxima",
        setup=lambda: {"x": normal(m, k), "w": normal(m, k, seed=1)},
        ours=lambda a: dq.compute_smooth_factors(a["x"], a["w"]),
        numpy=numpy_column_maxima,
        oracle=lambda a: oracle.smooth_factors(a["x"], a["w"]),
        read=8 * m * k,
        written=4 * k,
        rtol=2.0**-22,
    )


def quantization_mae(n: int) -> Case:
    def setup() -> Arrays:
        x = normal(n)
        q = dq.dynamic_quantize_int8(x)
        return {"x": x, "q": q, "codes": q.data, "scale": q.scales[0]}

    return Case(
        name=f"mae_{n}",
        what=f"mean absolute error of int8 codes, {n:,}",
        operation="quantization_mae",
        setup=setup,
        ours=lambda a: dq.quantization_mae(a["x"], a["q"]),
        numpy=lambda a: np.abs(a["x"] - a["codes"] * a["scale"]).mean(),
        oracle=lambda a: oracle.mean_abs_error(a["x"], a["codes"], a["scale"]),
        read=5 * n,
        written=0,
        rtol=1e-12,
    )


def w8a8_matvec(n: int, k: int) -> Case:
    """NumPy's side is what W8A8 replaces: the float32 weights, four times the bytes."""

    def setup() -> Arrays:
        q = dq.dynamic_quantize_int8_per_row(normal(n, k))
        return {
            "w": q.data,
            "w_scales": q.scales,
            "w_f32": q.dequantize(),
            "x": normal(k, seed=1),
            "out": np.empty(n, np.float32),
        }

    return Case(
        name=f"matvec_{n}x{k}",
        what=f"W8A8 matvec, {n} x {k}; NumPy: float32",
        operation="w8a8_matvec",
        setup=setup,
        ours=lambda a: dq.w8a8_matvec(a["w"], a["w_scales"], a["x"], out=a["out"]),
        numpy=lambda a: np.matmul(a["w_f32"], a["x"], out=a["out"]),
        oracle=lambda a: oracle.w8a8_matvec(a["w"], a["w_scales"], a["x"]),
        read=n * k,
        written=4 * n,
    )


def int8_inner(m: int, n: int, k: int) -> Case:
    """Codes as they come from quantizing; NumPy has no BLAS for integers."""

    def setup() -> Arrays:
        codes = [dq.dynamic_quantize_int8_per_row(normal(rows, k, seed=rows)).data for rows in (m, n)]
        return {"q": codes[0], "w": codes[1], "out": np.empty((m, n), np.int32)}

    return Case(
        name=f"int8_inner_{m}x{n}x{k}",
        what=f"int8 inner products, {m} x {k} with {n} x {k}, into out",
        operation="int8_inner",
        setup=setup,
        ours=lambda a: dq.int8_inner(a["q"], a["w"], out=a["out"]),
        numpy=lambda a: np.matmul(a["q"], a["w"].T, out=a["out"], dtype=np.int32),
        oracle=lambda a: oracle.integer_product(a["q"], a["w"]),
        read=(m + n) * k,
        written=4 * m * n,
    )


# Shapes (out_features, in_features) of layers, and how many rows they are given.
LAYERS = ((384, 1536), (1024, 1024), (4096, 4096), (11008, 4096), (30522, 384))
ROWS = (1, 4, 16, 128)
# The layers and rows that two threads are measured on: enough work to share.
SHARED_LAYERS = ((4096, 4096), (11008, 4096))
SHARED_ROWS = (1, 16, 128)
# The family "rows": every number of rows that a microkernel or its remainder sees.
ROW_LAYERS = ((1024, 1024), (3072, 768))
EVERY_ROWS = range(1, 65)
# The family "activations".
ACTIVATION_LAYERS = ((384, 1536), (1536, 384), (1024, 1024), (4096, 4096), (11008, 4096), (30522, 384))
ACTIVATION_ROWS = (16, 128)
GROUP_SIZES = (None, 32, 128)

# The layers of the block in data/: what most users have instead of a normal distribution.
BLOCK = Path(__file__).parent / "data" / "minilm_ffn.npz"
REAL = {"up": (1536, 384), "down": (384, 1536)}
ACTIVATIONS = ("normal", *REAL, "uniform", "alternating")


def activations(kind: str, m: int, k: int) -> np.ndarray:
    """Rows for a layer. Real ones are repeated, in both directions, to the number that is asked for."""
    if kind in REAL:
        x = real(f"{kind}_eval")
        return np.resize(np.tile(x, -(-k // x.shape[1]))[:, :k], (m, k))
    if kind == "uniform":
        return np.random.default_rng(1).uniform(-1, 1, (m, k)).astype(np.float32)
    if kind == "alternating":
        # Codes 127 and -127 in turn: what exact products on AVX2 find hardest.
        return np.resize(np.array([1, -1], np.float32), (m, k))
    return normal(m, k, seed=1)


def weights(kind: str, n: int, k: int) -> np.ndarray:
    """The real weights where the activations and the shape are those of a real layer."""
    return real(f"{kind}_weight") if REAL.get(kind) == (n, k) else normal(n, k)


@functools.cache
def real(name: str) -> np.ndarray:
    with np.load(BLOCK) as block:
        return block[name].astype(np.float32)


def linear(
    n: int, k: int, m: int, *, group_size: int | None = None, threads: int = 1, kind: str = "normal"
) -> Case:
    """W8A8, or W4A8 in groups of `group_size`. NumPy's side is the float32 layer.

    A layer is packed for the selected instruction set, so each has its own, made when first asked for.
    """
    int8 = group_size is None
    group = "W8A8" if int8 else f"W4A8, groups of {group_size}"
    shape = f"{n}x{k}_m{m}" + f"_{kind}" * (kind != "normal") + f"_t{threads}" * (threads > 1)
    # Half a byte a weight; a float32 scale and a byte of zero point a group.
    weight_bytes = n * k if int8 else n * k // 2 + 5 * n * k // group_size
    return Case(
        name=f"linear_w8a8_{shape}" if int8 else f"linear_w4a8_g{group_size}_{shape}",
        what=f"{group}: linear layer, {n} x {k}, {m} rows; NumPy: float32",
        operation="w8a8_linear" if int8 else "w4a8_linear",
        setup=lambda: {
            **(int8_layer(kind, n, k) if int8 else int4_layer(kind, n, k, group_size)),
            "x": activations(kind, m, k),
            "out": np.empty((m, n), np.float32),
            "threads": threads,
        },
        ours=lambda a: a["layer"](_isa._selected)(a["x"], out=a["out"], num_threads=a["threads"]),
        numpy=lambda a: np.matmul(a["x"], a["w_f32"].T, out=a["out"]),
        oracle=oracle_w8a8 if int8 else oracle_w4a8,
        read=weight_bytes + 4 * m * k,
        written=4 * m * n,
        group=group,
        layer=(n, k, m),
        activations=kind,
        threads=threads,
    )


def linear_layers(group_size: int | None) -> list[Case]:
    alone = [linear(n, k, m, group_size=group_size) for n, k in LAYERS for m in ROWS]
    real_ones = [
        linear(*shape, m, group_size=group_size, kind=kind) for kind, shape in REAL.items() for m in ROWS
    ]
    shared = [
        linear(n, k, m, group_size=group_size, threads=2) for n, k in SHARED_LAYERS for m in SHARED_ROWS
    ]
    # The cases of one layer stand together, for which its weights are made once.
    return sorted(alone + real_ones + shared, key=lambda case: (case.layer[:2], case.activations))


def every_number_of_rows(group_size: int | None) -> list[Case]:
    """Real activations: those of `down`, which has the larger outliers."""
    return [
        linear(n, k, m, group_size=group_size, kind=kind)
        for (n, k), kind in itertools.product(ROW_LAYERS, ("normal", "down"))
        for m in EVERY_ROWS
    ]


def every_kind_of_activations(group_size: int | None) -> list[Case]:
    return [
        linear(n, k, m, group_size=group_size, kind=kind)
        for (n, k), kind in itertools.product(ACTIVATION_LAYERS, ACTIVATIONS)
        for m in ACTIVATION_ROWS
    ]


def oracle_w8a8(a: Arrays) -> Any:
    return oracle.w8a8_matmul(a["w"], a["w_scales"], a["x"])


def oracle_w4a8(a: Arrays) -> Any:
    return oracle.w4a8_matmul(oracle.unpacked(a["w_packed"]), a["zero_points"], a["w_scales"], a["x"])


@functools.lru_cache(maxsize=1)
def int8_layer(kind: str, n: int, k: int) -> Arrays:
    q = dq.dynamic_quantize_int8_per_row(weights(kind, n, k))
    arrays = {"weight_i8": q.data, "weight_scales": q.scales}
    return {
        "w": q.data,
        "w_scales": q.scales,
        "w_f32": q.dequantize(),
        "layer": functools.cache(lambda isa: dq.QuantLinear.from_arrays(arrays)),
    }


@functools.lru_cache(maxsize=1)
def int4_layer(kind: str, n: int, k: int, group_size: int) -> Arrays:
    """With a zero point for each group, which is the default."""
    w = weights(kind, n, k)
    q = dq.quantize_weights(w, bits=4, group_size=group_size)
    return {
        "w_packed": q.data,
        "w_scales": q.scales,
        "zero_points": q.zero_points,
        "w_f32": q.dequantize(),
        "layer": functools.cache(lambda isa: dq.QuantLinear.from_float(w, bits=4, group_size=group_size)),
    }


def calibration(batches: int, n: int) -> Case:
    return Case(
        name=f"calibration_{batches}x{n}",
        what=f"CalibStats of {batches} batches of {n:,} floats",
        operation="calibration",
        setup=lambda: {"batches": list(normal(batches, n))},
        ours=lambda a: dq.CalibStats.collect(a["batches"]),
        numpy=numpy_calibration,
        oracle=lambda a: oracle.calibration(a["batches"]),
        read=4 * batches * n,
        written=0,
        rtol=1e-6,
    )


def forget_layers() -> None:
    """The next case makes its layer anew, in other memory."""
    int8_layer.cache_clear()
    int4_layer.cache_clear()


def operations() -> list[Case]:
    return [
        *(int8_per_tensor(n) for n in (64, 2**16, 2**20, 2**24)),
        int8_per_tensor_new(64, np.float32),
        int8_per_tensor_new(2**20, np.float32),
        int8_per_tensor_new(2**20, np.float16),
        int8_per_row(512, 4096, new=False),
        int8_per_row(512, 4096, new=True),
        int4_packed(2**20),
        percentile_scale(2**20, 0.999),
        percentile_rows(512, 384, 0.999),
        dequantize(2**20),
        dequantize(2**24),
        smooth(512, 4096, weights=False, in_place=True),
        smooth(512, 4096, weights=False, in_place=False),
        smooth(512, 4096, weights=True, in_place=True),
        column_maxima(4096, 4096),
        quantization_mae(2**20),
        w8a8_matvec(1024, 1024),
        w8a8_matvec(4096, 4096),
        int8_inner(128, 1024, 1024),
        int8_inner(128, 4096, 4096),
        calibration(64, 2**16),
    ]


FAMILIES: dict[str, Callable[[], list[Case]]] = {
    "operations": operations,
    "layers": lambda: _for_each_group_size(linear_layers),
    "rows": lambda: _for_each_group_size(every_number_of_rows),
    "activations": lambda: _for_each_group_size(every_kind_of_activations),
}


def _for_each_group_size(layers: Callable[[int | None], list[Case]]) -> list[Case]:
    return [case for group_size in GROUP_SIZES for case in layers(group_size)]


def cases(families: Iterable[str]) -> list[Case]:
    """The cases of some families; one that is in two of them once."""
    found = {case.name: case for family in families for case in FAMILIES[family]()}
    return list(found.values())


def check(case: Case, arrays: Arrays, expected: Any) -> None:
    """Raises AssertionError where dynquant's answer is not the oracle's."""
    result = case.ours(arrays)
    for ours, theirs in zip(_parts(result), _parts(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=case.rtol, atol=0, err_msg=case.name)


def _parts(result: Any) -> tuple[Any, ...]:
    if isinstance(result, dq.DynQuantTensor):
        return result.data, result.scales
    if isinstance(result, dq.CalibStats):
        return dataclasses.astuple(result)
    return result if isinstance(result, tuple) else (result,)
