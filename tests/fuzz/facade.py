"""The public functions on inputs that Hypothesis chooses, against tests/reference.py.

Shapes, dtypes, layouts, modes, formats and options are drawn; the numbers come from a seed that is drawn too.
Every property below holds for whatever is drawn. The suite tries each a few times; as a program this file
takes how many executions to make, and shares them among the properties.
"""

import contextlib
import math
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import ml_dtypes
import numpy as np
import reference
from common import F32, ISAS, calibrator_of, using
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dynquant import (
    Calibrator,
    CalibStats,
    DynQuantError,
    DynQuantFormat,
    DynQuantTensor,
    LayoutError,
    MaxAbs,
    NonFiniteError,
    ParameterError,
    Percentile,
    QuantLinear,
    compute_scale,
    dynamic_quantize,
    error_metrics,
    hadamard_transform,
    quantization_mae,
    quantize_weights,
    smooth_activations,
    smooth_weights,
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
NUMBERS = ["normal", "halves", "every exponent", "subnormal", "huge", "zeros", "neighbours"]
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
    elif kind == "neighbours":
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


def matrices(m, k, numbers=("normal", "halves", "zeros", "neighbours")):
    """Of numbers whose products stay within float32."""
    return arrays((m, k), numbers)


def assert_equal(actual, expected, what):
    """In dtype, shape and every value; 0.0 is -0.0."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    assert np.array_equal(actual, expected, equal_nan=actual.dtype.kind == "f"), what


# ---- What is right ----


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
        least, most = np.minimum(part.min(1), F32(0)), np.maximum(part.max(1), F32(0))
        with np.errstate(all="ignore"):
            scale = np.abs(part).max(1) / F32(fmt.clip) if symmetric else (most - least) / F32(15)
            zero = np.where(scale > 0, np.floor((-least / scale).astype(np.float64) + 0.5), 0)
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
    """A property of whatever the strategies give: a function that `run` calls."""

    def register(function):
        PROPERTIES.append((function, strategies))
        return function

    return register


@contextlib.contextmanager
def unchanged(*held):
    """The arrays are after the block as they were before."""
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
    """NaN anywhere, or an `out` that cannot be: the error says so, and no array has changed."""
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
        taken = out.flags.c_contiguous
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
def products(data, isa, num_threads):
    """The functions and a layer, the layer also from its own arrays."""
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
    """One scale an output: the weight's scale first, then the row's."""
    a, a_scales = reference.quantize(x, per_row=True)
    sums = a.astype(np.float64) @ codes.T.astype(np.float64)
    with np.errstate(all="ignore"):
        y = sums.astype(F32) * scales * a_scales[:, None]
        return y if bias is None else y + bias


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
    """The Walsh-Hadamard transform in runs of the largest power of two that divides the length."""
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
    """Arrays that are not as they should be are refused by the package's own errors, or taken and work."""
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
    """Another array, number or object in the place of one; None for nothing."""
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
def files(data):
    """A calibrator's file with bytes changed, cut or added is refused, or is a calibrator that works."""
    x = np.random.default_rng(data.draw(seeds)).standard_normal((4, 3)).astype(F32)
    channels = data.draw(st.sampled_from([None, 3]))
    calibrator = calibrator_of([x][: data.draw(st.integers(0, 1))], channels)
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


def damage(content, data):
    """Change a file's bytes, more often where it has structure than among its many zeros."""
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
    """Try a property that often, beginning with the seed `start`."""
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
        # Hypothesis remembers every example of a run: many short runs take less memory than a long one.
        for chunk in range(0, each, 1000):
            run(function, strategies, min(1000, each - chunk), start + chunk)
        print(f"{function.__name__}: {each} executions", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
