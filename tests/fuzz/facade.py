"""The public functions on inputs that Hypothesis draws, against tests/helpers/reference.py.

Shapes, dtypes, layouts, modes, formats and options are drawn; the numbers come from a drawn seed. Every
property below holds for all inputs. The suite tries each a few times. Run as a program, this file takes the
number of executions, and divides them among the properties.
"""

import contextlib
import math
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import ml_dtypes
import numpy as np
from helpers import reference
from helpers.common import F32, ISAS, calibrator_of, using
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dynquant import (
    Calibrator,
    CalibStats,
    DynQuantError,
    DynQuantFormat,
    DynQuantTensor,
    EmbeddingIndex,
    LayoutError,
    MaxAbs,
    NonFiniteError,
    ParameterError,
    Percentile,
    QuantLinear,
    SmoothQuantConfig,
    compute_scale,
    compute_smooth_factors,
    dynamic_quantize,
    dynamic_quantize_int4,
    dynamic_quantize_int8,
    dynamic_quantize_int8_per_row,
    dynamic_quantize_linear,
    error_metrics,
    fold_smooth_factors,
    hadamard_transform,
    int8_inner,
    quantization_mae,
    quantize_weights,
    search_alpha,
    smooth_activations,
    smooth_weights,
    top_k,
    w4a8_matmul,
    w4a8_matvec,
    w8a8_matmul,
    w8a8_matvec,
)

# ---- What is drawn ----

lengths = st.one_of(st.integers(0, 9), st.integers(0, 70), st.sampled_from([127, 128, 129, 300, 4096, 4097]))
shapes = st.one_of(
    st.tuples(),
    st.tuples(lengths),
    st.tuples(st.integers(0, 9), lengths),
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 40)),
)
seeds = st.integers(0, 2**32 - 1)
modes = st.one_of(
    st.just(MaxAbs()),
    st.floats(0, 1, exclude_min=True).map(Percentile),
    st.sampled_from([1e-300, 0.5, 0.99, 0.999, 1.0]).map(Percentile),
)
group_sizes = st.one_of(st.integers(1, 70), st.sampled_from([4096, 8192, 10**30]))
formats = st.one_of(
    st.sampled_from(["per_tensor", "per_row"]).map(lambda g: DynQuantFormat(8, g)),
    st.builds(
        lambda g, p: DynQuantFormat(4, g, None, p), st.sampled_from(["per_tensor", "per_row"]), st.booleans()
    ),
    st.builds(lambda n: DynQuantFormat(8, "per_group", n), group_sizes),
    st.builds(lambda n, p: DynQuantFormat(4, "per_group", n, p), group_sizes, st.booleans()),
)
isas = st.sampled_from(ISAS)
threads = st.sampled_from([1, 1, 1, 1, 1, 1, 1, 2, 3])
NUMBERS = ["normal", "halves", "every exponent", "subnormal", "huge", "zeros", "neighbors"]
DTYPES = [F32, F32, np.float16, np.float64, ml_dtypes.bfloat16, np.dtype(">f4")]
LAYOUTS = ["C", "F", "strided", "reversed", "unaligned", "read-only", "broadcast"]


def numbers_of(kind, shape, rng):
    """float32 numbers, all finite in the float32 range."""
    n = math.prod(shape)
    if kind == "halves":
        flat = rng.integers(-256, 257, n) * F32(0.5)
    elif kind == "every exponent":
        flat = (rng.integers(0, 0x7F800000, n) | rng.integers(0, 2, n) << 31).astype(np.uint32).view(F32)
    elif kind == "subnormal":
        flat = rng.integers(0, 5000, n).astype(np.uint32).view(F32)
    elif kind == "huge":
        flat = rng.choice(np.array([3.4e38, -3.4e38, 1e38, 1.0], F32), n)
    elif kind == "zeros":
        flat = np.where(rng.random(n) < 0.05, F32(-1), F32(-0.0))
    elif kind == "neighbors":
        flat = (0x3F800000 + rng.integers(0, 9, n)).astype(np.uint32).view(F32)
    else:
        flat = rng.standard_normal(n) * np.exp2(rng.integers(-9, 9, n))
    return flat.astype(F32).reshape(shape)


def laid_out(x, layout):
    """An array equal to x with other strides, alignment or flags."""
    if layout == "F":
        return np.asfortranarray(x)
    if layout == "strided" and x.ndim:
        return np.repeat(x, 2, -1)[..., ::2]
    if layout == "reversed" and x.ndim:
        return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    if layout == "unaligned":
        raw = np.zeros(x.nbytes + 1, np.uint8)[1:]
        raw[:] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        return raw.view(x.dtype).reshape(x.shape)
    if layout == "broadcast" and x.ndim and x.shape[0]:
        return np.broadcast_to(x[:1], x.shape)
    x = x.copy()
    x.flags.writeable = layout != "read-only"
    return x


@st.composite
def arrays(draw, shape=shapes, numbers=NUMBERS):
    """A finite float array, and the same as plain float32."""
    shape = draw(shape) if isinstance(shape, st.SearchStrategy) else shape
    x = numbers_of(draw(st.sampled_from(numbers)), shape, np.random.default_rng(draw(seeds)))
    dtype, layout = np.dtype(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(LAYOUTS))
    with np.errstate(over="ignore"):
        narrow = x.astype(dtype)
    x = laid_out(np.where(np.isfinite(narrow), narrow, np.ones_like(narrow)).astype(dtype), layout)
    return x, np.ascontiguousarray(x, F32).reshape(x.shape)


def matrices(m, k, numbers=("normal", "halves", "zeros", "neighbors")):
    """Of numbers whose products do not overflow float32."""
    return arrays((m, k), numbers)


def assert_equal(actual, expected, what):
    """In dtype, shape and every value; 0.0 is -0.0."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    assert np.array_equal(actual, expected, equal_nan=actual.dtype.kind == "f"), what


# ---- Expected results ----


def parts_of(x, fmt):
    """(start, end) of the groups along the last axis."""
    size = min(fmt.group_size, x.shape[-1] or 1)
    return [(start, min(start + size, x.shape[-1])) for start in range(0, x.shape[-1], size)]


def quantized(x, fmt, mode):
    """Codes, packed if the format is, and scales."""
    p = mode.p if isinstance(mode, Percentile) else None
    rows = fmt.granularity != "per_tensor"
    if fmt.granularity != "per_group":
        codes, scales = reference.quantize(x, fmt.clip, p, rows)
    else:
        parts = [reference.quantize(x[..., a:b], fmt.clip, p, True) for a, b in parts_of(x, fmt)]
        codes = np.concatenate([c for c, _ in parts], -1) if parts else np.zeros(x.shape, np.int8)
        scales = np.stack([s for _, s in parts], -1) if parts else np.zeros((*x.shape[:-1], 0), F32)
    return (reference.pack(codes, rows) if fmt.packed else codes), scales


def unpacked(data, k):
    nibbles = np.stack([data & 15, data >> 4], -1).astype(np.int64)
    return nibbles.reshape(*data.shape[:-1], 2 * data.shape[-1])[..., :k]


def weight_codes(w, fmt, symmetric):
    """Codes, a byte each and signed as they stand; scales and zero points by group, or None where inf."""
    groups = parts_of(w, fmt) if fmt.group_size else [(0, w.shape[1])]
    codes, scales, zeros = np.zeros(w.shape, np.int64), [], []
    for a, b in groups:
        part = w[:, a:b]
        low, high = np.minimum(part.min(1), F32(0)), np.maximum(part.max(1), F32(0))
        with np.errstate(all="ignore"):
            scale = np.abs(part).max(1) / F32(fmt.clip) if symmetric else (high - low) / F32(15)
            zero = np.where(scale > 0, np.floor((-low / scale).astype(np.float64) + 0.5), 0)
        if not np.isfinite(scale).all():
            return None
        zero = np.zeros(len(w)) if symmetric else np.clip(zero, 0, 15)
        code = reference.codes(part, scale[:, None], 127).astype(np.int64) + zero[:, None].astype(np.int64)
        codes[:, a:b] = np.clip(code, -fmt.clip, fmt.clip) if symmetric else np.clip(code, 0, 15)
        scales.append(scale)
        zeros.append(zero)
    return codes, np.stack(scales, 1).astype(F32), np.stack(zeros, 1).astype(np.int64)


def product(x, codes, scales, zeros, groups, bias):
    """float32 total over groups in ascending order, times the row's scale, plus bias."""
    a, a_scales = reference.quantize(x, per_row=True)
    total = np.zeros((len(x), len(codes)), F32)
    with np.errstate(all="ignore"):
        for g, (start, end) in enumerate(groups):
            w = codes[:, start:end] - zeros[:, g, None]
            sums = a[:, start:end].astype(np.float64) @ w.T.astype(np.float64)
            total = total + sums.astype(F32) * scales[:, g]
        y = total * a_scales[:, None]
        return y if bias is None else y + bias


# ---- Properties ----

PROPERTIES = []


def drawn(*strategies):
    """Register a property of all that the strategies draw: a function that `run` calls."""

    def register(function):
        PROPERTIES.append((function, strategies))
        return function

    return register


@contextlib.contextmanager
def unchanged(*held):
    """The arrays are unchanged after the block."""
    before = [np.array(a, copy=True) for a in held]
    yield
    for a, b in zip(held, before, strict=True):
        assert a.tobytes() == b.tobytes(), "an array was changed"


@drawn(arrays(), formats, modes, threads, isas, st.booleans())
def quantize(pair, fmt, mode, num_threads, isa, into):
    x, plain = pair
    with using(isa), unchanged(x):
        try:
            shape = fmt.data_shape(x.shape) if x.ndim else None
            out = np.full(shape, 77, fmt.data_dtype) if into and shape is not None else None
            q = dynamic_quantize(x, fmt, mode, out=out, num_threads=num_threads)
        except DynQuantError:
            assert x.ndim < {"per_tensor": 0, "per_row": 2, "per_group": 1}[fmt.granularity]
            return
        codes, scales = quantized(plain, fmt, mode)
        assert_equal(q.data, codes, "codes")
        assert_equal(q.scales, scales, "scales")
        assert out is None or q.data is out
        values = q.dequantize()
        assert_equal(values, dequantized(q, plain.shape), "values")
        if np.isfinite(values).all():
            assert math.isclose(quantization_mae(x, q), reference.mae(plain, values), rel_tol=1e-9)
            metrics = error_metrics(x, q)
            if plain.size:
                assert math.isclose(metrics.mae, reference.mae(plain, values), rel_tol=1e-9)


def dequantized(q, shape):
    """Values of a symmetric tensor, by NumPy."""
    fmt, codes = q.format, q.data
    if fmt.packed:
        k = math.prod(shape) if fmt.granularity == "per_tensor" else shape[-1]
        codes = ((unpacked(codes, k) ^ 8) - 8).reshape(shape)
    scales = q.scales[0] if fmt.granularity == "per_tensor" else q.scales[..., None]
    if fmt.granularity == "per_group":
        k = shape[-1]
        scales = np.repeat(q.scales, min(fmt.group_size, k or 1), -1)[..., :k]
    with np.errstate(all="ignore"):
        return np.asarray(codes.astype(F32) * scales, F32).reshape(shape)


@drawn(arrays(), modes, st.sampled_from([127, 7, 1, 0.1, 3e38]), isas)
def scale(pair, mode, clip, isa):
    x, plain = pair
    with using(isa), unchanged(x):
        p = mode.p if isinstance(mode, Percentile) else None
        with np.errstate(over="ignore"):
            expected = reference.scale(plain, clip, p)
        try:
            assert compute_scale(x, clip, mode) == expected
        except ParameterError:
            assert np.isinf(expected)


@drawn(st.data(), formats, modes, isas)
def refused(data, fmt, mode, isa):
    """NaN anywhere, or an invalid `out`: the error says so, and no array has changed."""
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 300)))
    x, _ = data.draw(arrays(shape))
    x = np.array(x, order="C")
    bad = data.draw(st.sampled_from(["NaN", "read-only", "strided", "overlap", "shape", "dtype"]))
    data_shape = fmt.data_shape(shape)
    out = np.full(data_shape, 77, fmt.data_dtype)
    error, taken = LayoutError, False
    if bad == "NaN":
        payload = data.draw(st.sampled_from([np.nan, -np.nan, np.inf, -np.inf]))
        index = data.draw(st.integers(0, x.size - 1))
        x[np.unravel_index(index, x.shape)] = payload
        error = NonFiniteError
    elif bad == "read-only":
        out.flags.writeable = False
    elif bad == "strided":
        out = np.full((*data_shape[:-1], 2 * data_shape[-1]), 77, out.dtype)[..., ::2]
        taken = out.flags.c_contiguous or data_shape[-1] == 1  # rows of one code may lie anywhere
    elif bad == "overlap":
        raw = np.zeros(x.nbytes + 2 * out.nbytes, np.uint8)
        at = data.draw(st.integers(0, x.nbytes - 1))
        x, old = raw[: x.nbytes].view(x.dtype).reshape(shape), x
        x[...] = old
        out = raw[at : at + out.nbytes].view(out.dtype).reshape(data_shape)
    elif bad == "shape":
        out, error = np.full((*data_shape[:-1], data_shape[-1] + 1), 77, out.dtype), DynQuantError
    else:
        out, error = np.full(data_shape, 77, np.int16), DynQuantError
    with using(isa), unchanged(x, *[out] * (not taken)):
        try:
            dynamic_quantize(x, fmt, mode, out=out)
        except error as raised:
            assert bad != "NaN" or raised.index == index
        else:
            assert taken, f"{bad} was taken"


def draw_weights(data):
    """Weights as drawn and as float32, their format as keywords, codes, scales and zero points."""
    n, k = data.draw(st.integers(1, 40)), data.draw(lengths.filter(bool))
    w, plain = data.draw(arrays((n, min(k, 700))))
    bits = data.draw(st.sampled_from([8, 4, 4]))
    group = data.draw(st.none() | group_sizes) if bits == 4 else None
    symmetric = data.draw(st.booleans()) if bits == 4 else True
    options = {"bits": bits, "group_size": group, "symmetric": symmetric}
    fmt = DynQuantFormat(bits, "per_group" if group else "per_row", group, bits == 4)
    return w, plain, options, fmt, weight_codes(plain, fmt, symmetric)


def as_codes(q):
    if not q.format.packed:
        return q.data.astype(np.int64)
    codes = unpacked(q.data, q.shape[-1])
    return codes if q.zero_points is not None else (codes ^ 8) - 8


@drawn(st.data(), isas, threads)
def weights(data, isa, num_threads):
    w, _, options, fmt, expected = draw_weights(data)
    with using(isa), unchanged(w):
        try:
            q = quantize_weights(w, **options, num_threads=num_threads)
        except ParameterError:
            assert expected is None
            return
        codes, scales, zeros = expected
        assert q.format == fmt
        assert_equal(as_codes(q), codes, "codes")
        assert_equal(q.scales.reshape(scales.shape), scales, "scales")
        if q.zero_points is not None:
            assert_equal(q.zero_points.reshape(zeros.shape).astype(np.int64), zeros, "zero points")


@drawn(st.data(), isas, threads)
def inner_products(data, isa, num_threads):
    m, n, k = data.draw(lengths), data.draw(lengths), data.draw(lengths)
    seed, low = data.draw(st.integers(0, 2**32)), data.draw(st.sampled_from([-128, -127, 126]))
    rng = np.random.default_rng(seed)
    a, b = rng.integers(low, 128, (m, k), dtype=np.int8), rng.integers(-128, 128, (n, k), dtype=np.int8)
    if m and n:
        a[m // 2], b[n // 2] = -128, rng.choice(np.array([-128, 127], np.int8), k)
    with using(isa), unchanged(a, b):
        y = int8_inner(a, b, dtype=np.int64, num_threads=num_threads)
        assert_equal(y, a.astype(np.int64) @ b.astype(np.int64).T, "int8_inner")
        assert_equal(int8_inner(b, a, num_threads=num_threads), y.T.astype(np.int32), "int8_inner, int32")


@drawn(st.data(), isas, threads)
def products(data, isa, num_threads):
    """The functions and a layer, which is also rebuilt from its arrays."""
    w, plain, options, fmt, expected = draw_weights(data)
    (n, k), m = w.shape, data.draw(st.integers(0, 9))
    x, plain_x = data.draw(matrices(m, k))
    bias = data.draw(st.none() | st.just(np.linspace(-1, 1, n, dtype=F32)))
    if expected is None or not np.abs(plain).max() < 1e30:
        return
    codes, scales, zeros = expected
    groups = parts_of(w, fmt) if fmt.group_size else [(0, k)]
    y = product(plain_x, codes, scales, zeros, groups, bias)
    if fmt.bits == 8:
        y = product8(plain_x, codes, scales[:, 0], bias)
    with using(isa), unchanged(w, x):
        q = quantize_weights(w, **options)
        layer = QuantLinear.from_float(w, bias, **options)
        again = QuantLinear.from_arrays(layer.to_arrays())
        out = np.full((m, n), 77, F32)
        assert layer(x, out=out, num_threads=num_threads) is out
        assert_equal(out, y, "layer")
        assert_equal(again(x), y, "layer from arrays")
        if fmt.bits == 8:
            function, more = w8a8_matmul, (q.data, q.scales)
        else:
            function, more = w4a8_matmul, (q,)
        assert_equal(function(*more, x, bias, num_threads=num_threads), y, "product")
        if m:
            vector = w8a8_matvec(*more, x[0]) if fmt.bits == 8 else w4a8_matvec(*more, x[0])
            no_bias = product8(plain_x[:1], codes, scales[:, 0], None)
            if fmt.bits == 4:
                no_bias = product(plain_x[:1], codes, scales, zeros, groups, None)
            assert_equal(vector, no_bias[0], "matvec")


def product8(x, codes, scales, bias):
    """One scale per output: first the weight's scale is applied, then the row's."""
    a, a_scales = reference.quantize(x, per_row=True)
    sums = a.astype(np.float64) @ codes.T.astype(np.float64)
    with np.errstate(all="ignore"):
        y = sums.astype(F32) * scales * a_scales[:, None]
        return y if bias is None else y + bias


@drawn(st.data(), isas, threads)
def searches(data, isa, num_threads):
    """k of 0, 1, n and more, ties, masks, int8 and packed corpora, one query and many."""
    w, plain, options, fmt, expected = draw_weights(data)
    (n, d), m = w.shape, data.draw(st.sampled_from([0, 1, 2, 9]))
    x, plain_x = data.draw(matrices(m, d))
    k = data.draw(st.sampled_from([0, 1, 3, n, n + 2]))
    metric = data.draw(st.sampled_from(["dot", "dot", "cosine", "l2"]))
    allowed = None
    if data.draw(st.booleans()):
        rng = np.random.default_rng(data.draw(seeds))
        allowed = rng.random((n,) if data.draw(st.booleans()) else (m, n)) < data.draw(st.floats(0, 1))
    if expected is None or not np.abs(plain).max(initial=0) < 1e30:
        return
    codes, scales, zeros = expected
    with using(isa), unchanged(w, x, *([] if allowed is None else [allowed])):
        corpus = quantize_weights(w, **options)
        try:
            found = top_k(x, corpus, k, metric=metric, allowed=allowed, num_threads=num_threads)
        except ParameterError:
            assert k == 0
            return
    assert k and found.scores.shape == found.indices.shape == (m, k)
    hits = found.indices >= 0
    may = np.ones((m, n), bool) if allowed is None else np.broadcast_to(allowed, (m, n))
    assert np.array_equal(hits.sum(1), np.minimum(may.sum(1), k))
    assert np.isinf(found.scores[~hits]).all()
    if metric != "dot":
        return
    if fmt.bits == 8:
        y = product8(plain_x, codes, scales[:, 0], None)
    else:
        y = product(plain_x, codes, scales, zeros, parts_of(w, fmt) if fmt.group_size else [(0, d)], None)
    order = np.argsort(np.where(may, -y, F32(np.inf)), axis=1, kind="stable")[:, :k]
    for row in range(m):
        count = int(hits[row].sum())
        assert_equal(found.indices[row, :count], order[row, :count], "indices")
        assert_equal(found.scores[row, :count], y[row, order[row, :count]], "scores")


@drawn(st.data(), isas)
def transforms(data, isa):
    m, k = data.draw(st.integers(0, 6)), data.draw(lengths)
    x, plain = data.draw(matrices(m, k))
    factors = np.exp2(np.random.default_rng(data.draw(seeds)).uniform(-6, 6, k)).astype(F32)
    into = np.full((m, k), 77, F32) if data.draw(st.booleans()) else None
    with using(isa), unchanged(x, factors):
        assert_equal(smooth_activations(x, factors, out=into), plain / factors, "divided")
        assert_equal(smooth_weights(x, factors, out=into), plain * factors, "multiplied")
        rotated = hadamard_transform(x, out=into)
        assert_equal(rotated, butterflies(plain), "rotated")
        if plain.size:
            stats = CalibStats.collect([x])
            found = stats.min, stats.max, stats.mean, stats.std_dev, stats.p99, stats.suggested_scale
            expected = reference.calib_stats([plain])
            assert np.allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(plain).max())


def butterflies(x):
    """The Walsh-Hadamard transform in blocks of the largest power of two that divides the length."""
    k = x.shape[-1]
    block = k & -k or 1
    y = x.reshape(-1, block).copy()
    half = 1
    while half < block:
        pairs = y.reshape(-1, block // (2 * half), 2, half)
        y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).reshape(-1, block)
        half *= 2
    return (y * F32(1 / np.sqrt(block))).reshape(x.shape)


@drawn(st.data())
def loaders(data):
    """Changed arrays are refused with one of the package's errors, or make a layer that works."""
    w, plain, options, _, expected = draw_weights(data)
    if expected is None or not np.abs(plain).max() < 1e30:
        return
    options["hadamard"] = data.draw(st.booleans())
    layer = QuantLinear.from_float(w, np.ones(len(w), F32), smooth=np.ones(w.shape[1], F32), **options)
    given_arrays = layer.to_arrays()
    for _ in range(data.draw(st.integers(1, 3))):
        names = {*given_arrays, "unknown", "in_features", "group_size", "bias"}
        name = data.draw(st.sampled_from(sorted(names)))
        given_arrays[name] = damaged(given_arrays.get(name), data)
        if given_arrays[name] is None:
            del given_arrays[name]
    try:
        loaded = QuantLinear.from_arrays(given_arrays)
    except DynQuantError:
        return
    x = np.ones((2, loaded.in_features), F32)
    with contextlib.suppress(DynQuantError), np.errstate(all="ignore"):
        assert loaded(x).shape == (2, loaded.out_features)
        tensor = loaded._weight()
        assert isinstance(tensor, DynQuantTensor)


def damaged(array, data):
    """Another array, number or object in place of one; None to remove it."""
    kind = data.draw(st.sampled_from(["none", "number", "object", "cut", "shape", "dtype", "values", "axes"]))
    if kind == "none" or (array is None and kind != "number"):
        return None
    if kind == "number":
        numbers = [0, 1, -1, 2, 7, 10**30, 2**63 - 1, 2**31, 1.5, float("nan"), True, "8", b"", (), [[]]]
        return data.draw(st.sampled_from(numbers))
    if kind == "object":
        return np.array([{}, None], object)
    array = np.asarray(array)
    if kind == "cut":
        return array[..., : max(array.shape[-1] - 1, 0)] if array.ndim else array[None]
    if kind == "shape":
        return array.reshape(-1) if array.ndim != 1 else array[:, None]
    if kind == "dtype":
        dtypes = [np.int8, np.uint8, np.int64, np.float64, np.complex64, "S3", "M8[s]"]
        return np.zeros(array.shape, data.draw(st.sampled_from(dtypes)))
    if kind == "axes" or array.ndim == 0:
        return array[None]
    rng = np.random.default_rng(data.draw(seeds))
    return rng.permutation(array.reshape(-1)).reshape(array.shape)[..., ::-1]


@drawn(st.data())
def indexes(data):
    """An index with a damaged file is refused, or opens and can be searched."""
    rng = np.random.default_rng(data.draw(seeds))
    options = data.draw(st.sampled_from([{}, {"bits": 4, "group_size": 3, "center": "mean"}]))
    index = EmbeddingIndex(5, **options)
    for n in data.draw(st.lists(st.integers(0, 20), max_size=3)):
        index.add(rng.standard_normal((n, 5)).astype(F32))
    index.remove(data.draw(st.lists(st.integers(0, 40), max_size=4)) or [0])
    with tempfile.TemporaryDirectory() as folder:
        index.save(folder)
        path = data.draw(st.sampled_from(sorted(pathlib.Path(folder).iterdir())))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            damage(content, data)
        path.write_bytes(content)
        try:
            opened = EmbeddingIndex.open(folder, mmap=data.draw(st.booleans()))
            opened.add(np.ones((1, opened.dim), F32))
            found = opened.search(np.ones((2, opened.dim), F32), 3)
        except DynQuantError:
            return
        assert found.scores.shape == (2, 3) and len(opened) <= len(index) + 1


@drawn(st.data())
def files(data):
    """A calibrator's file with bytes changed, cut or added is refused, or loads a working calibrator."""
    x = np.random.default_rng(data.draw(seeds)).standard_normal((4, 3)).astype(F32)
    channels = data.draw(st.sampled_from([None, 3]))
    calibrator = calibrator_of([x][: data.draw(st.integers(0, 1))], channels, channels)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "calibrator.npz")
        calibrator.save(path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            damage(content, data)
        path.write_bytes(content)
        try:
            loaded = Calibrator.load(path)
        except ParameterError:
            return
    with contextlib.suppress(DynQuantError):
        loaded.merge(calibrator)
        loaded.update(x)
    with contextlib.suppress(DynQuantError):
        assert loaded.stats().min <= loaded.stats().max
    if loaded.channels:
        with contextlib.suppress(DynQuantError):
            loaded.channel_percentile(0.5)


@drawn(st.data(), isas, threads)
def layers(data, isa, num_threads):
    """Smoothing and rotation in a layer equal the public functions, one after the other."""
    w, plain, options, _, expected = draw_weights(data)
    if expected is None or not np.abs(plain).max() < 1e30:
        return
    k, m = w.shape[1], data.draw(st.integers(0, 9))
    x, _ = data.draw(matrices(m, k))
    rng = np.random.default_rng(data.draw(seeds))
    factors = np.exp2(rng.uniform(-3, 3, k)).astype(F32) if data.draw(st.booleans()) else None
    rotated = data.draw(st.booleans())
    options["search"] = data.draw(st.booleans())
    calibration = rng.standard_normal((data.draw(st.integers(1, 40)), k)) if k < 20 else None
    with using(isa), unchanged(w, x):
        layer = QuantLinear.from_float(
            w, smooth=factors, hadamard=rotated, calibration=calibration, **options
        )
        a, turned = x, w
        if factors is not None:
            a, turned = smooth_activations(a, factors), smooth_weights(w, factors)
        if rotated:
            block, signs = min(k & -k, 128), F32(1) if layer.signs is None else layer.signs
            a, turned = (
                hadamard_transform(np.asarray(each, F32) * signs, block_size=block) for each in (a, turned)
            )
        if calibration is None:
            q = quantize_weights(turned, **options)
            assert_equal(layer(x), QuantLinear(q)(a), "layer of quantized weights")
        given_arrays = layer.to_arrays()
        for name in ("smooth", "signs", "hadamard"):
            given_arrays.pop(name, None)
        y = layer(x, num_threads=num_threads)
        assert_equal(y, QuantLinear.from_arrays(given_arrays)(a), "layer after the functions")
        for i in range(m):
            assert_equal(layer(x[i]), y[i], "a row alone")


@drawn(arrays(), st.data(), isas)
def others(pair, data, isa):
    """The ONNX operator, smooth factors and metrics per row, against a few lines of NumPy."""
    x, plain = pair
    with using(isa), unchanged(x), np.errstate(all="ignore"):
        low, high = min(plain.min(initial=0), F32(0)), max(plain.max(initial=0), F32(0))
        step = (high - low) / F32(255)
        if np.isfinite(step):
            y, scale, zero = dynamic_quantize_linear(x)
            step = step or F32(1)
            assert (scale, zero) == (step, np.rint(np.clip(-low / step, F32(0), F32(255))))
            codes = np.clip(np.rint(plain / step) + F32(zero), 0, 255).astype(np.uint8)
            assert_equal(y, codes.reshape(x.shape), "ONNX")
        if x.ndim == 2 and x.size and np.abs(plain).max() < 1e18:
            assert_factors(x, plain, data)
            metrics = error_metrics(x, plain[::-1], per_row=True)
            difference = plain.astype(np.float64) - plain[::-1]
            assert np.allclose(metrics.mse, np.square(difference).mean(1), rtol=1e-9)
            assert_equal(metrics.max_abs, np.abs(difference).max(1), "largest difference")


def assert_factors(x, plain, data):
    mode, alpha = data.draw(modes), data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    w, plain_w = data.draw(matrices(data.draw(st.integers(1, 9)), x.shape[1]))
    p = mode.p if isinstance(mode, Percentile) else None
    expected = reference.smooth_factors(plain, plain_w, alpha, p=p)
    if not np.isfinite(expected).all():
        return
    factors = compute_smooth_factors(x, w, SmoothQuantConfig(alpha), mode=mode)
    np.testing.assert_array_max_ulp(factors, expected, 2)
    if (np.abs(plain).max(0) / factors < 1e38).all():
        assert_equal(fold_smooth_factors(factors, plain[0])[0], plain[0] / factors, "folded")


@drawn(st.data(), isas)
def calibrators(data, isa):
    """Batches in any order, split and merged in any way: exact counts and extremes, bounded percentiles."""
    channels = data.draw(st.none() | st.integers(1, 40))
    rows = channels and data.draw(st.sampled_from([1, 3, 100]))
    k = channels or data.draw(st.integers(0, 300))
    parts = [
        data.draw(matrices(data.draw(st.integers(0, 5)), k)) for _ in range(data.draw(st.integers(1, 4)))
    ]
    whole = np.concatenate([plain for _, plain in parts])
    with using(isa):
        one, other = Calibrator(channels, rows=rows), Calibrator(channels, rows=rows)
        for x, _ in parts:
            data.draw(st.sampled_from([one, other])).update(x, num_threads=data.draw(threads))
        one.merge(other)
        assert one.count == whole.size
        if not whole.size:
            return
        exact, stats = CalibStats.collect([x for x, _ in parts]), one.stats()
        assert (stats.min, stats.max) == (exact.min, exact.max)
        size = np.abs(whole).max()
        assert math.isclose(stats.mean, exact.mean, rel_tol=1e-6, abs_tol=1e-6 * size)
        assert math.isclose(stats.std_dev, exact.std_dev, rel_tol=1e-6, abs_tol=1e-6 * size)
        p = data.draw(st.floats(0, 1, exclude_min=True))
        ranked = np.sort(np.abs(whole), None)[Percentile(p).rank(whole.size)]
        assert abs(one.percentile(p) - ranked) <= 2**-9 * ranked + 2**-134
        if channels:
            ranked = np.sort(np.abs(whole), 0)[Percentile(p).rank(len(whole))]
            assert_equal(one.channel_amax(), np.abs(whole).max(0), "largest magnitudes")
            near = 2**-4 * ranked + 2**-129
            assert (np.abs(one.channel_percentile(p).astype(np.float64) - ranked) <= near).all()
            at_once = calibrator_of([whole], channels, rows)
            assert_equal(one.sample(), at_once.sample(), "sampled rows")
            assert {row.tobytes() for row in one.sample()} <= {row.tobytes() for row in whole}


# ---- Any argument at all ----

N, K = 5, 12
# Objects that may be passed for any argument.
ODD = [
    *(None, True, False, 0, -1, 2, 2.5, 0.5, math.nan, math.inf, 1j, 10**30, -(10**30), 10**400, 2**63),
    *("8", b"8", (), [], [[]], {}, {"a": 1}, [1, [2]], range(3), object(), int, np.float64(1), np.int8(4)),
    *(MaxAbs, MaxAbs(), Percentile(0.5), SmoothQuantConfig(), DynQuantFormat.INT8_PER_ROW, np.bool_(True)),
    *(np.ones((), F32), np.zeros(3, object), np.ones((2, 2), "S3"), np.ma.ones((N, K)), np.zeros(3, "f4,f4")),
    *(np.ones((N, K), np.int8), np.ones((N, K), complex), np.empty((0, K), F32), np.empty((N, 0), F32)),
    # One element, broadcast to the length of the address space.
    *(np.broadcast_to(F32(1), shape) for shape in [(2**46,), (2**23, 2**23), (2**60, 0), (N, 2**44)]),
]


@st.composite
def suspects(draw, shape):
    """Mostly floats of that shape; sometimes with NaN, or another object."""
    kind = draw(st.sampled_from([*["good"] * 8, "bad", "bad", "shape", "odd"]))
    if kind == "odd":
        return draw(st.sampled_from(ODD))
    if kind == "shape":
        shape = draw(
            st.sampled_from([(), (0,), (K,), (N,), (N, K), (K, N), (0, K), (N, 0), (2, N, K), (1, 1, 1, K)])
        )
    x, _ = draw(arrays(shape))
    if kind == "bad" and x.size:
        x = np.array(x)
        bits = x.view(f"u{x.itemsize}")
        index = draw(st.integers(0, x.size - 1))
        # All exponent bits set, and any payload.
        payload = draw(st.integers(0, 2 ** (8 * x.itemsize) - 1))
        bits.reshape(-1)[index] = payload | int(np.array(np.inf, x.dtype).view(bits.dtype))
    return x


@st.composite
def targets(draw, argument, shape, dtype):
    """None or an `out`: of that shape and dtype or others, of any layout, read-only, or over the argument."""
    kind = draw(
        st.sampled_from(["none", "plain", "plain", "layout", "itself", "overlap", "overlap", "other"])
    )
    if kind == "none":
        return draw(st.sampled_from([*[None] * 9, *ODD]))
    if kind == "other":
        shape = draw(st.sampled_from([(N, K), (N, N), (N,), (K,), (N, K // 2), (2, N, K)]))
        dtype = draw(st.sampled_from([F32, np.int8, np.uint8, np.float64, ">f4"]))
    out = np.full(shape, 77, dtype)
    if kind == "layout":
        return laid_out(out, draw(st.sampled_from(LAYOUTS)))
    if kind not in ("itself", "overlap") or type(argument) is not np.ndarray or argument.size > 1000:
        return out
    if kind == "itself" or argument.dtype.hasobject:
        return argument
    # One buffer for both, which have at least a byte in common.
    if argument.nbytes == 0 or not argument.flags.writeable:
        return out
    raw = argument.base if type(argument.base) is np.ndarray else argument
    if not raw.flags.c_contiguous or raw.nbytes < out.nbytes:
        return out
    raw = raw.reshape(-1).view(np.uint8)
    at = draw(st.integers(0, (raw.size - out.nbytes) // out.itemsize)) * out.itemsize
    return raw[at : at + out.nbytes].view(dtype).reshape(shape)


odd = st.sampled_from(ODD)


def mostly(strategy):
    return st.integers(0, 15).flatmap(lambda n: strategy if n else odd)


ROWS = np.random.default_rng(0).standard_normal((N, K)).astype(F32)
SEEN, SAMPLED = calibrator_of([ROWS], K), calibrator_of([ROWS], K, 3)
flags = mostly(st.booleans())
widths = mostly(st.sampled_from([8, 4]))
sizes = mostly(st.none() | group_sizes)
granularities = mostly(st.sampled_from(["per_group", "per_row", "per_tensor", "per_channel"]))
WEIGHT_OPTIONS = {"bits": widths, "group_size": sizes, "symmetric": mostly(st.none() | st.booleans())}
matrix, row, outputs = suspects((N, K)), suspects((K,)), suspects((N,))
factors = mostly(st.just(np.linspace(0.5, 2, K, dtype=F32))) | row
int8_weights = mostly(st.just(np.resize(np.arange(-128, 128), (N, K)).astype(np.int8)))
whole_tensors = st.one_of(
    st.sampled_from([None, 1, 5, 100]).map(lambda size: quantize_weights(ROWS, bits=4, group_size=size)),
    st.just(quantize_weights(ROWS)),
    formats.map(lambda fmt: dynamic_quantize(ROWS, fmt)),
    st.just(quantize_weights(ROWS, bits=4, symmetric=True)),
)
tensors = mostly(whole_tensors)
batches = (
    st.lists(matrix, max_size=2) | st.lists(matrix, max_size=2).map(iter) | st.sampled_from([SEEN, SAMPLED])
)
calibrations = st.none() | matrix | batches
several = matrix | st.lists(matrix, max_size=3)
configs = mostly(st.just(SmoothQuantConfig()))
alphas = mostly(st.none() | st.lists(mostly(st.floats(0, 1)), max_size=2))
counts = mostly(threads)
layer_options = {
    **WEIGHT_OPTIONS,
    "search": flags,
    "smooth": st.none() | factors,
    "hadamard": flags,
    "calibration": calibrations,
}

# Function, positional arguments, options; shape and dtype of `out` where it takes one.
CODES, VALUES, PRODUCT = ((N, K), np.int8), ((N, K), F32), ((N, N), F32)
ANY = {
    "compute_scale": (compute_scale, [matrix, mostly(st.just(127)), mostly(modes)], {}, None),
    "int8": (dynamic_quantize_int8, [matrix, mostly(modes)], {}, CODES),
    "int8 rows": (dynamic_quantize_int8_per_row, [matrix, mostly(modes)], {"num_threads": counts}, CODES),
    "int4": (dynamic_quantize_int4, [matrix, mostly(modes)], {"packed": flags}, None),
    "quantize": (
        dynamic_quantize,
        [matrix, mostly(formats), mostly(modes)],
        {"packed": flags, "num_threads": counts},
        CODES,
    ),
    "ONNX": (dynamic_quantize_linear, [matrix], {}, None),
    "dequantize": (DynQuantTensor.dequantize, [whole_tensors], {}, VALUES),
    "mae": (quantization_mae, [matrix, tensors], {}, None),
    "metrics": (error_metrics, [matrix, tensors | matrix], {"per_row": flags}, None),
    "factors": (
        compute_smooth_factors,
        [matrix | row | batches, several, configs],
        {"mode": mostly(modes), "num_threads": counts},
        None,
    ),
    "divide": (smooth_activations, [matrix, factors], {"num_threads": counts}, VALUES),
    "multiply": (smooth_weights, [matrix, factors], {"num_threads": counts}, VALUES),
    "fold": (fold_smooth_factors, [factors, row, st.none() | row], {}, None),
    "search_alpha": (
        search_alpha,
        [matrix | batches, several],
        {
            **WEIGHT_OPTIONS,
            "alphas": alphas,
            "epsilon": mostly(st.just(1e-5)),
            "mode": mostly(modes),
            "relative": flags,
            "hadamard": flags,
            "num_threads": counts,
        },
        None,
    ),
    "hadamard": (hadamard_transform, [matrix], {"block_size": mostly(st.sampled_from([None, 1, 4]))}, VALUES),
    "weights": (
        quantize_weights,
        [matrix],
        {**WEIGHT_OPTIONS, "search": flags, "calibration": calibrations, "num_threads": counts},
        None,
    ),
    "int8_inner": (
        int8_inner,
        [int8_weights, int8_weights],
        {"dtype": mostly(st.just(np.int32)), "num_threads": counts},
        ((N, N), np.int32),
    ),
    "w8a8_matvec": (w8a8_matvec, [int8_weights, outputs, row], {}, ((N,), F32)),
    "w8a8_matmul": (
        w8a8_matmul,
        [int8_weights, outputs, matrix, st.none() | outputs],
        {"num_threads": counts},
        PRODUCT,
    ),
    "w4a8_matvec": (w4a8_matvec, [tensors, row], {}, ((N,), F32)),
    "w4a8_matmul": (w4a8_matmul, [tensors, matrix, st.none() | outputs], {"num_threads": counts}, PRODUCT),
    "a layer": (QuantLinear, [tensors, st.none() | outputs, st.none() | factors, flags], {}, None),
    "from_float": (QuantLinear.from_float, [matrix, st.none() | outputs], layer_options, None),
    "calling a layer": (
        QuantLinear.from_float(ROWS, bits=4, group_size=5, smooth=np.ones(K, F32), hadamard=True),
        [matrix],
        {"num_threads": counts},
        PRODUCT,
    ),
    "from_arrays": (
        QuantLinear.from_arrays,
        [
            st.fixed_dictionaries(
                {"weight_i8": int8_weights, "weight_scales": outputs},
                optional={"bias": outputs, "smooth": factors, "hadamard": flags, "in_features": odd},
            )
        ],
        {},
        None,
    ),
    "a tensor": (
        DynQuantTensor,
        [
            mostly(st.just(np.ones((N, K), np.int8))),
            mostly(st.just(np.ones(N, F32))),
            st.none() | odd,
            mostly(st.sampled_from([(N, K), (N, 2**62), (2**62, 2**62), (-N, -K), (0, 0)])),
            mostly(st.just(DynQuantFormat.INT8_PER_ROW)),
        ],
        {},
        None,
    ),
    "a format": (DynQuantFormat, [widths, granularities, sizes, flags], {}, None),
    "a percentile": (Percentile, [mostly(st.just(0.5))], {}, None),
    "a configuration": (SmoothQuantConfig, [mostly(st.just(0.5)), mostly(st.just(1e-5))], {}, None),
    "collect": (CalibStats.collect, [several | matrix.map(lambda x: iter([x]))], {}, None),
    "a calibrator": (Calibrator, [mostly(st.just(K))], {"rows": mostly(st.sampled_from([None, 3]))}, None),
    "update": (
        lambda x, n, threads: Calibrator(n, rows=n).update(x, num_threads=threads),
        [matrix, st.sampled_from([None, K]), counts],
        {},
        None,
    ),
    "merge": (lambda x: calibrator_of([ROWS], K).merge(x), [mostly(st.just(SEEN))], {}, None),
    "percentile": (SEEN.percentile, [odd], {}, None),
    "channel_percentile": (SEEN.channel_percentile, [odd], {}, None),
    "load": (
        Calibrator.load,
        [odd.filter(lambda path: not isinstance(path, str))],
        {},
        None,
    ),
}

IN_PLACE = {"divide", "multiply", "hadamard"}


def bytes_of(held):
    """The bytes of all array arguments, and of the buffers that they are views of."""
    found = []
    for each in held:
        if isinstance(each, (list, tuple)):
            found += bytes_of(each)
        elif isinstance(each, DynQuantTensor):
            found += bytes_of([each.data, each.scales, each.zero_points])
        elif type(each) is np.ndarray and each.size < 10_000 and not each.dtype.hasobject:
            found.append((each.base if type(each.base) is np.ndarray else each).tobytes())
    return found


@drawn(st.data(), st.sampled_from(sorted(ANY)), isas)
def anything(data, name, isa):
    """For any arguments: a result, an error of the package, or MemoryError; and inputs are unchanged."""
    function, strategies, optional, target = ANY[name]
    arguments = [data.draw(strategy) for strategy in strategies]
    names = data.draw(st.sets(st.sampled_from(sorted(optional)))) if optional else ()
    options = {each: data.draw(optional[each]) for each in sorted(names)}
    out = data.draw(targets(arguments[0], *target)) if target else None
    into = {} if out is None else {"out": out}
    shares = type(out) is np.ndarray and any(
        np.may_share_memory(out, a) for a in arguments if type(a) is np.ndarray
    )
    inputs, before = bytes_of([*arguments, *options.values()]), bytes_of([out])
    with using(isa):
        try:
            function(*arguments, **options, **into)
        except (DynQuantError, MemoryError, ValueError) as error:
            # NumPy's message for sizes larger than the address space.
            assert isinstance(error, (DynQuantError, MemoryError)) or "array is too big" in str(error)
            assert bytes_of([out]) == before, "out was changed"
        else:
            assert out is None or type(out) is np.ndarray, f"{out!r} was taken"
            if shares:
                assert name in IN_PLACE, "memory of an input was taken"
                assert (out.ctypes.data, out.dtype) == (arguments[0].ctypes.data, arguments[0].dtype)
                return
    assert bytes_of([*arguments, *options.values()]) == inputs, "an argument was changed"


def damage(content, data):
    """Change bytes of a file, more often in its structure than in its many zeros."""
    size = len(content)
    places = [st.integers(0, 800), st.integers(max(0, size - 1500), size - 1), st.integers(0, size - 1)]
    at = data.draw(st.one_of(places))
    kind = data.draw(st.sampled_from(["byte", "byte", "word", "cut", "insert", "swap"]))
    if kind == "byte":
        content[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
    elif kind == "word":
        content[at : at + 4] = data.draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"]))
    elif kind == "cut":
        del content[at : at + data.draw(st.integers(1, 100))]
    elif kind == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=30))
    else:
        content[at : at + 8] = content[at : at + 8][::-1]


def run(function, strategies, executions, start):
    """Try a property that many times, starting with the seed `start`."""
    options = settings(
        max_examples=executions,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    seed(start)(options(given(*strategies)(function)))()


def main(executions, start=0):
    each = -(-executions // len(PROPERTIES))
    for function, strategies in PROPERTIES:
        # Hypothesis keeps every example of a run: many short runs take less memory than a long one.
        for chunk in range(0, each, 1000):
            run(function, strategies, min(1000, each - chunk), start + chunk)
        print(f"{function.__name__}: {each} executions", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
