"""Every kind of input array, and every kind of `out`, for each public function that takes floats."""

import array
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, Arrayish, Interface, Struct, array_at, assert_same_bits, memory

import dynquant
from dynquant import (
    Calibrator,
    CalibStats,
    DTypeError,
    DynQuantError,
    DynQuantFormat,
    DynQuantTensor,
    LayoutError,
    Percentile,
    QuantLinear,
    ShapeMismatchError,
    compute_scale,
    compute_smooth_factors,
    dynamic_quantize,
    dynamic_quantize_int4,
    dynamic_quantize_int8,
    dynamic_quantize_int8_per_row,
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

ml_dtypes = pytest.importorskip("ml_dtypes")

SHAPE = (4, 70)
N, K = SHAPE
PACKED_ROWS = DynQuantFormat(4, "per_row", packed=True)
RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-128, 128, SHAPE, dtype=np.int8)
FACTORS = RNG.uniform(0.5, 2, K).astype(F32)
SCALES = RNG.uniform(0.5, 2, N).astype(F32)
OTHER = RNG.standard_normal(SHAPE).astype(F32)


class Function(NamedTuple):
    """`call(x, out=...)` and `expected(x as float32)` return lists of equal arrays."""

    shape: tuple[int, ...]
    call: Callable[..., list[Any]]
    expected: Callable[[np.ndarray], list[Any]]
    out: tuple[tuple[int, ...], Any] | None = None


def of_tensor(quantize):
    def call(x, **out):
        q = quantize(x, **out)
        return [q.data, q.scales]

    return call


def packed_rows(x):
    codes, scales = reference.quantize(x, 7, per_row=True)
    return [reference.pack(codes, per_row=True), scales]


def listed(function, *args, **kwargs):
    return lambda x, **out: [function(*args, x, **kwargs, **out)]


def calibrated(x):
    calibrator = Calibrator(K)
    calibrator.update(x)
    return [calibrator.channel_amax(), calibrator.histogram()[0], calibrator.stats().mean]


def calibrated_by_numpy(x):
    counts, _ = np.histogram(np.abs(x).astype(float), Calibrator().histogram()[1])
    return [np.abs(x).max(axis=0), counts, pytest.approx(x.astype(float).mean(), rel=1e-13)]


CODES, VALUES, Y = (SHAPE, np.int8), (SHAPE, F32), ((N,), F32)
Q = dynamic_quantize_int8(OTHER)
MATVEC = reference.w8a8_matvec

FUNCTIONS = {
    "compute_scale": Function(
        SHAPE, lambda x: [F32(compute_scale(x, 127))], lambda x: [reference.scale(x, 127)]
    ),
    "compute_scale percentile": Function(
        SHAPE, lambda x: [F32(compute_scale(x, 7, Percentile(0.6)))], lambda x: [reference.scale(x, 7, 0.6)]
    ),
    "int8": Function(SHAPE, of_tensor(dynamic_quantize_int8), reference.quantize, CODES),
    "int8_per_row": Function(
        SHAPE, of_tensor(dynamic_quantize_int8_per_row), partial(reference.quantize, per_row=True), CODES
    ),
    "int8_per_row threads": Function(
        SHAPE,
        of_tensor(partial(dynamic_quantize_int8_per_row, num_threads=2)),
        partial(reference.quantize, per_row=True),
        CODES,
    ),
    "int4": Function(SHAPE, of_tensor(dynamic_quantize_int4), partial(reference.quantize, clip=7)),
    "int4 packed rows": Function(
        SHAPE,
        of_tensor(partial(dynamic_quantize, format=PACKED_ROWS)),
        packed_rows,
        ((N, K // 2), np.uint8),
    ),
    "mae": Function(
        SHAPE,
        lambda x: [quantization_mae(x, Q)],
        lambda x: [pytest.approx(reference.mae(x, Q.dequantize()), rel=1e-12)],
    ),
    "factors, activations": Function(
        SHAPE,
        listed(compute_smooth_factors, weights=OTHER),
        lambda x: [compute_smooth_factors(x.copy(), OTHER)],
    ),
    "factors, weights": Function(
        SHAPE, listed(compute_smooth_factors, OTHER), lambda x: [compute_smooth_factors(OTHER, x.copy())]
    ),
    "factors, percentile": Function(
        SHAPE,
        listed(compute_smooth_factors, weights=OTHER, mode=Percentile(0.6)),
        lambda x: [compute_smooth_factors(x.copy(), OTHER, mode=Percentile(0.6))],
    ),
    "factors, several weights": Function(
        SHAPE,
        lambda x: [compute_smooth_factors(OTHER, [OTHER, x])],
        lambda x: [compute_smooth_factors(OTHER, np.concatenate([OTHER, x]))],
    ),
    "smooth_activations": Function(
        SHAPE, listed(smooth_activations, factors=FACTORS), lambda x: [x / FACTORS], VALUES
    ),
    "smooth_activations, factors": Function(
        (K,), listed(smooth_activations, OTHER), lambda f: [OTHER / f], VALUES
    ),
    "smooth_weights": Function(
        SHAPE, listed(smooth_weights, factors=FACTORS), lambda x: [x * FACTORS], VALUES
    ),
    "smooth_weights, factors": Function((K,), listed(smooth_weights, OTHER), lambda f: [OTHER * f], VALUES),
    "matvec, activation": Function(
        (K,), listed(w8a8_matvec, WEIGHT, SCALES), lambda x: [MATVEC(WEIGHT, SCALES, x)], Y
    ),
    "matvec, weight_scales": Function(
        (N,),
        lambda x, **out: [w8a8_matvec(WEIGHT, x, FACTORS, **out)],
        lambda x: [MATVEC(WEIGHT, x, FACTORS)],
        Y,
    ),
    "collect": Function(
        SHAPE, lambda x: [CalibStats.collect([x, OTHER])], lambda x: [CalibStats.collect([x.copy(), OTHER])]
    ),
    "calibrator": Function(SHAPE, calibrated, calibrated_by_numpy),
}

each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())

# Inputs


class Subclass(np.ndarray):
    pass


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def strided(x):
    """A copy with every second element of the last axis in memory."""
    return np.repeat(x, 2, axis=-1)[..., ::2]


def array_array(x):
    flat = array.array("f", x.ravel().tolist())
    return flat if x.ndim == 1 else memoryview(flat).cast("B").cast("f", x.shape)


INPUTS = {
    "ndarray": lambda x: x,
    "subclass": lambda x: x.view(Subclass),
    "memoryview": memoryview,
    "read-only memoryview": lambda x: memoryview(x).toreadonly(),
    "strided memoryview": lambda x: memoryview(strided(x)),
    "array.array": array_array,
    "bytes": lambda x: np.frombuffer(x.tobytes(), F32).reshape(x.shape),
    "read-only": read_only,
    "strided": strided,
    "strided rows": lambda x: np.repeat(x, 3, axis=0)[::3],
    "negative strides": lambda x: x[..., ::-1].copy()[..., ::-1],
    "negative rows": lambda x: x[::-1].copy()[::-1],
    "stride 0": lambda x: np.broadcast_to(x[..., :1], x.shape),
    "Fortran order": np.asfortranarray,
    "transposed": lambda x: x.T.copy().T,
    "inside a larger array": lambda x: np.pad(x, 3)[(slice(3, -3),) * x.ndim],
    "misaligned": lambda x: array_at(1, x),
    "float16": lambda x: x.astype(np.float16),
    "float16 strided": lambda x: strided(x.astype(np.float16)),
    "float16 read-only": lambda x: read_only(x.astype(np.float16)),
    "float16 misaligned": lambda x: array_at(3, x.astype(np.float16)),
    "float16 memoryview": lambda x: memoryview(x.astype(np.float16)),
    "bfloat16": lambda x: x.astype(ml_dtypes.bfloat16),
    "bfloat16 strided": lambda x: strided(x.astype(ml_dtypes.bfloat16)),
    "bfloat16 read-only": lambda x: read_only(x.astype(ml_dtypes.bfloat16)),
    "bfloat16 misaligned": lambda x: array_at(1, x.astype(ml_dtypes.bfloat16)),
    "float64": lambda x: x.astype(np.float64) * (1 + 1e-9),
    "float64 Fortran order": lambda x: np.asfortranarray(x.astype(np.float64)),
    "longdouble": lambda x: x.astype(np.longdouble),
    "big-endian float32": lambda x: x.astype(">f4"),
    "big-endian float16": lambda x: x.astype(">f2"),
    "big-endian float64": lambda x: x.astype(">f8"),
    "nested list": lambda x: x.tolist(),
    "list of arrays": list,
    "tuple": lambda x: tuple(x.tolist()),
    "list of ints": lambda x: np.maximum(np.abs(x * 10), 1).astype(int).tolist(),
    "array protocol": Arrayish,
    "array interface": Interface,
    "array struct": Struct,
}


@each_function
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_inputs(make, function):
    # Positive, as factors must be.
    x = make(np.random.default_rng(1).uniform(0.1, 3, function.shape).astype(F32))
    before = np.array(x).tobytes()
    expected = function.expected(reference.floats(x))
    check(function.call(x), expected)
    if function.out is not None:
        out = np.full(function.out[0], 77, function.out[1])
        actual = function.call(x, out=out)
        assert actual[0] is out
        check(actual, expected)
    assert np.array(x).tobytes() == before


def check(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        if isinstance(other, np.ndarray):
            assert_same_bits(one, other)
        else:
            assert one == other


EMPTY = {
    "list": ([], (0,)),
    "list of lists": ([[], []], (2, 0)),
    "rows": (np.empty((0, 4), F32), (0, 4)),
    "columns": (np.empty((4, 0), np.float16), (4, 0)),
    "no columns of more": (np.ones((4, 6), F32)[:, 3:3], (4, 0)),
    "Fortran order": (np.empty((0, 3, 2), F32, "F"), (0, 3, 2)),
    "bfloat16": (np.empty((2, 0), ml_dtypes.bfloat16), (2, 0)),
    "float64": (np.empty((0, 0)), (0, 0)),
    "array.array": (array.array("f"), (0,)),
    "memoryview": (memoryview(np.empty((3, 0), F32)), (3, 0)),
}


@pytest.mark.parametrize("x, shape", EMPTY.values(), ids=EMPTY.keys())
def test_empty_inputs(x, shape):
    assert compute_scale(x, 127) == 0.0
    for quantize in (dynamic_quantize_int8, dynamic_quantize_int4, dynamic_quantize_int8_per_row):
        if quantize is not dynamic_quantize_int8_per_row:
            q = quantize(x)
            assert q.scales.tolist() == [0.0]
        elif len(shape) > 1:
            q = quantize(x)
            assert_same_bits(q.scales, np.zeros(shape[:-1], F32))
        assert (q.shape, q.data.shape) == (shape, shape)
        assert quantization_mae(x, q) == 0.0
    assert smooth_activations(x, np.ones(shape[-1])).shape == shape
    assert CalibStats.collect([x, [1.0]]) == CalibStats.collect([[1.0]])


ONE_AND_A_HALF = np.array(1.5, F32)


@pytest.mark.parametrize(
    "x",
    [ONE_AND_A_HALF, np.array(1.5, np.float16), np.array(1.5), F32(1.5), 1.5, memoryview(ONE_AND_A_HALF)],
    ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')}",
)
def test_zero_dimensional_inputs(x):
    assert compute_scale(x, 3) == 0.5
    out = np.array(77, np.int8)
    q = dynamic_quantize_int8(x, out=out)
    assert q.data is out
    assert (q.shape, int(out)) == ((), 127)
    assert q.dequantize(out=np.zeros((), F32)).shape == ()
    assert quantization_mae(x, q) == abs(1.5 - float(q.dequantize()))
    assert CalibStats.collect([x]).mean == 1.5


@pytest.mark.parametrize("layout", ["F", "strided", "misaligned", "read-only", "memoryview", "array.array"])
def test_weights_of_int8(layout):
    weight = {
        "F": np.asfortranarray(WEIGHT),
        "strided": strided(WEIGHT),
        "misaligned": array_at(5, WEIGHT),
        "read-only": read_only(WEIGHT),
        "memoryview": memoryview(WEIGHT),
        "array.array": memoryview(array.array("b", WEIGHT.tobytes())).cast("B").cast("b", SHAPE),
    }[layout]
    assert_same_bits(w8a8_matvec(weight, SCALES, FACTORS), MATVEC(WEIGHT, SCALES, FACTORS))


# Out


class WithOut(NamedTuple):
    """`call(out=...)` writes an array of `shape` and `dtype`, computed from `inputs`."""

    call: Callable[..., Any]
    shape: tuple[int, ...]
    dtype: Any
    inputs: tuple[np.ndarray, ...]


def with_outs():
    packed = dynamic_quantize(OTHER, PACKED_ROWS)
    return {
        "int8": WithOut(partial(dynamic_quantize_int8, OTHER), SHAPE, np.int8, (OTHER,)),
        "int8_per_row": WithOut(partial(dynamic_quantize_int8_per_row, OTHER), SHAPE, np.int8, (OTHER,)),
        "int4 packed rows": WithOut(
            partial(dynamic_quantize, OTHER, PACKED_ROWS), (N, K // 2), np.uint8, (OTHER,)
        ),
        "dequantize": WithOut(Q.dequantize, SHAPE, F32, (Q.data, Q.scales)),
        "dequantize packed": WithOut(packed.dequantize, SHAPE, F32, (packed.data, packed.scales)),
        "smooth_activations": WithOut(partial(smooth_activations, OTHER, FACTORS), SHAPE, F32, (FACTORS,)),
        "smooth_weights": WithOut(partial(smooth_weights, OTHER, FACTORS), SHAPE, F32, (FACTORS,)),
        "matvec": WithOut(
            partial(w8a8_matvec, WEIGHT, SCALES, FACTORS), (N,), F32, (WEIGHT, SCALES, FACTORS)
        ),
    }


WITH_OUT = with_outs()
each_with_out = pytest.mark.parametrize("target", WITH_OUT.values(), ids=WITH_OUT.keys())


def wrong_type(target, out):
    yield from (out.tolist(), memoryview(out), out.tobytes(), 1.0)


def wrong_dtype(target, out):
    yield from (out.astype(dtype) for dtype in (np.float64, np.float16, np.int16, np.bool_, object))
    yield out.astype({np.int8: np.uint8, np.uint8: np.int8, F32: np.dtype(F32).newbyteorder()}[target.dtype])


def wrong_shape(target, out):
    yield from (out[:-1], out[..., :-1], out[None], out[..., None], np.zeros((), out.dtype), out[:0])
    if out.ndim > 1:
        yield from (out.T.copy(), out.ravel())


def wrong_layout(target, out):
    # Rows of codes may lie apart; elements of a row may not.
    yield strided(out)
    yield out[..., ::-1]
    if out.ndim > 1:
        yield np.lib.stride_tricks.as_strided(out, out.shape, (*(0,) * (out.ndim - 1), out.itemsize))
    if out.itemsize > 1 or out.ndim == 1:
        yield np.repeat(out, 2, axis=0)[::2]
        yield out[::-1]
    yield read_only(out)
    yield np.frombuffer(out.tobytes(), out.dtype).reshape(out.shape)
    if out.ndim > 1:
        yield np.asfortranarray(out)
    if out.itemsize > 1:
        yield array_at(1, out)


WRONG_OUTS = {
    wrong_type: (DTypeError, "out: expected a numpy.ndarray"),
    wrong_dtype: (DTypeError, "out: expected dtype"),
    wrong_shape: (ShapeMismatchError, "out: expected shape"),
    wrong_layout: (LayoutError, "out: expected a"),
}


@each_with_out
@pytest.mark.parametrize("make", WRONG_OUTS, ids=lambda make: make.__name__)
def test_invalid_outs(make, target):
    error, message = WRONG_OUTS[make]
    before = [x.tobytes() for x in target.inputs]
    for out in make(target, np.full(target.shape, 77, target.dtype)):
        contents = np.array(out).tobytes()
        with pytest.raises(error, match=message) as caught:
            target.call(out=out)
        assert isinstance(caught.value, DynQuantError)
        assert np.array(out).tobytes() == contents
        if error is ShapeMismatchError:
            assert (caught.value.expected, caught.value.actual) == (target.shape, out.shape)
    assert [x.tobytes() for x in target.inputs] == before


@each_with_out
def test_valid_outs(target):
    plain = target.call(out=np.zeros(target.shape, target.dtype))
    plain = plain.data if isinstance(plain, DynQuantTensor) else plain
    padded = np.full((target.shape[0] + 2, *target.shape[1:]), 99, target.dtype)
    for out in (
        padded[1:-1],
        array_at(np.dtype(target.dtype).itemsize, np.zeros(target.shape, target.dtype)),
        np.zeros(target.shape, target.dtype).view(Subclass),
        np.zeros((1, *target.shape), target.dtype)[0],
    ):
        result = target.call(out=out)
        assert (result.data if isinstance(result, DynQuantTensor) else result) is out
        assert_same_bits(np.asarray(out), plain)
    assert (padded[[0, -1]] == 99).all()


def overlapping(n_bytes, dtype, shape, shift):
    """Two views of one buffer, `shift` bytes apart: raw bytes and an array."""
    buffer = memory(n_bytes + 4096, 0)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return buffer[64 : 64 + n_bytes], buffer[64 + shift : 64 + shift + size].view(dtype).reshape(shape)


@pytest.mark.parametrize("position", ["same start", "last byte", "inside"])
@pytest.mark.parametrize("quantize", [dynamic_quantize_int8, dynamic_quantize_int8_per_row])
def test_quantize_over_its_input(quantize, position):
    shift = {"same start": 0, "last byte": 4 * OTHER.size - 1, "inside": 8}[position]
    raw, out = overlapping(OTHER.nbytes, np.int8, SHAPE, shift)
    x = raw.view(F32).reshape(SHAPE)
    x[:] = OTHER
    for given in (x, memoryview(x)):
        with pytest.raises(LayoutError, match="overlaps"):
            quantize(given, out=out)
    assert_same_bits(x, OTHER)


@pytest.mark.parametrize("which", ["data", "scales"])
def test_dequantize_over_its_codes(which):
    raw, out = overlapping(4096, F32, SHAPE, 0)
    fields = {"data": Q.data, "scales": Q.scales}
    field = raw[: fields[which].nbytes].view(fields[which].dtype).reshape(fields[which].shape)
    field[...] = fields[which]
    fields[which] = field
    q = DynQuantTensor(fields["data"], fields["scales"], None, SHAPE, Q.format)
    with pytest.raises(LayoutError, match="overlaps"):
        q.dequantize(out=out)
    assert_same_bits(field, getattr(Q, which))


@pytest.mark.parametrize("smooth", [smooth_activations, smooth_weights])
@pytest.mark.parametrize("shift", [4, 4 * K, OTHER.nbytes - 4])
def test_smoothing_partly_over_the_input(smooth, shift):
    raw, out = overlapping(OTHER.nbytes, F32, SHAPE, shift)
    x = raw.view(F32).reshape(SHAPE)
    x[:] = OTHER
    with pytest.raises(LayoutError, match="partial overlap"):
        smooth(x, FACTORS, out=out)
    assert_same_bits(x, OTHER)


@pytest.mark.parametrize("smooth", [smooth_activations, smooth_weights])
def test_smoothing_over_the_input_in_another_layout(smooth):
    square = np.random.default_rng(0).uniform(1, 2, (8, 8)).astype(F32)
    before = square.copy()
    with pytest.raises(LayoutError, match="partial overlap"):
        smooth(square.T, np.ones(8), out=square)
    halves = square.view(np.float16)
    for narrow in (halves[:, ::2], halves[:4].reshape(8, 8)):
        with pytest.raises(LayoutError, match="partial overlap"):
            smooth(narrow, np.ones(8), out=square)
    assert_same_bits(square, before)


@pytest.mark.parametrize("smooth", [smooth_activations, smooth_weights])
def test_smoothing_over_the_factors(smooth):
    out = np.ones(SHAPE, F32)
    with pytest.raises(LayoutError, match="overlaps"):
        smooth(OTHER, out[1], out=out)
    assert (out == 1).all()


@pytest.mark.parametrize("which", ["weight_i8", "weight_scales", "activation"])
def test_matvec_over_its_input(which):
    inputs = {"weight_i8": WEIGHT.copy(), "weight_scales": SCALES.copy(), "activation": FACTORS.copy()}
    before = {name: x.copy() for name, x in inputs.items()}
    out = inputs[which].reshape(-1).view(F32)[:N]
    with pytest.raises(LayoutError, match="overlaps"):
        w8a8_matvec(**inputs, out=out)
    for name, x in inputs.items():
        assert_same_bits(x, before[name])


def test_inputs_that_overlap_each_other():
    """Only results must not overlap inputs."""
    x = np.random.default_rng(0).uniform(1, 2, (4, 4)).astype(F32)
    assert_same_bits(smooth_activations(x, x[0]), x / x[0])
    assert_same_bits(compute_smooth_factors(x, x), compute_smooth_factors(x, x.copy()))


@pytest.mark.parametrize("values", [[1e-310, 1.0], [1e-50, 1.0], [1e-40, 1.0]])
def test_numpy_error_state_has_no_effect(values):
    """float64 values that underflow in float32, and scales that underflow, raise no NumPy error."""
    with np.errstate(all="raise"):
        assert dynquant.dynamic_quantize_int8(np.array(values)).data.tolist() == [0, 127]
        assert dynquant.CalibStats.collect([np.array([1e-45], np.float32)]).max > 0
        dynquant.dynamic_quantize_linear(np.array(values))
        dynquant.dynamic_quantize_linear(np.array([-1e-45, 3e38], np.float32))
        dynquant.error_metrics(np.array(values), np.array(values))


def test_float64_that_overflows_float32_is_not_finite():
    with pytest.raises(dynquant.NonFiniteError) as caught:
        dynquant.compute_scale([1.0, 1e300], 127)
    assert caught.value.index == 1


def test_the_first_bad_element_of_a_large_array():
    x = np.zeros(300_000, np.float32)
    x[[200_000, 250_000]] = np.nan
    with pytest.raises(dynquant.NonFiniteError) as caught:
        dynquant.dynamic_quantize_int8(x)
    assert caught.value.index == 200_000


def test_masked_arrays_are_refused():
    with pytest.raises(dynquant.DTypeError, match="mask"):
        dynquant.compute_scale(np.ma.array([1.0, 1e9], mask=[False, True]), 127)


class ClaimsAnotherShape(np.ndarray):
    """An array that claims another shape than it has."""

    shape = property(lambda self: (64, 4096))


class Once:
    """Converts to `values` once, and to another array after that; `then` runs at each conversion."""

    def __init__(self, values, then=lambda: None):
        self.values, self.then, self.calls = values, then, 0

    def __array__(self, dtype=None, copy=None):
        self.calls += 1
        self.then()
        return self.values if self.calls == 1 else self.values.copy()


def shrink(array):
    array.resize((1,) * array.ndim, refcheck=False)


def test_arrays_that_claim_a_larger_shape(isa):
    x, small = np.ones((64, 4096), F32), np.zeros((1, 1), np.int8)
    layer = QuantLinear.from_float(np.ones((4096, 32), F32))
    calls = [
        lambda: dynamic_quantize(x, out=small.view(ClaimsAnotherShape)),
        lambda: layer(np.ones((64, 32), F32), out=small.astype(F32).view(ClaimsAnotherShape)),
    ]
    for call in calls:
        with pytest.raises(DynQuantError):
            call()
    assert not small.any()
    # An input counts by what it converts to.
    assert dynamic_quantize(small.astype(F32).view(ClaimsAnotherShape)).shape == (1, 1)


def test_arrays_that_shrink_in_a_call(isa):
    weight = np.ones((300, 2000), np.int8)
    with pytest.raises(LayoutError):
        w8a8_matvec(weight, np.ones(300), Once(np.ones(2000, F32), lambda: shrink(weight)))
    x, quantized = np.ones((64, 512), F32), dynamic_quantize(np.ones((64, 512), F32))
    packed = quantize_weights(x, bits=4, group_size=32)
    shrink(quantized.data)
    shrink(packed.data)
    calls = [quantized.dequantize, lambda: quantization_mae(x, quantized), lambda: w4a8_matmul(packed, x)]
    for call in [*calls, lambda: QuantLinear(packed)]:
        with pytest.raises(DynQuantError):
            call()


@pytest.mark.parametrize("dtype", [np.float64, np.dtype(F32).newbyteorder()])
@pytest.mark.parametrize("kind", [np.asarray, memoryview, Arrayish, Interface, Struct])
def test_memory_of_a_converted_argument_is_not_overwritten(kind, dtype):
    """For every argument of every function with `out`: the argument is copied, and `out` is its memory."""
    weight, layer = np.ones((32, 32), np.int8), QuantLinear.from_float(np.ones((32, 32), F32))
    int4, ones = quantize_weights(np.ones((32, 32)), bits=4), np.ones(32)
    rows, row = (32, 32), (32,)
    calls = {
        "quantize": (lambda x, out: dynamic_quantize(x, out=out), rows, rows, np.int8),
        "activations": (lambda x, out: smooth_activations(x, ones, out=out), rows, rows, F32),
        "factors": (lambda x, out: smooth_activations(ones, x, out=out), row, row, F32),
        "rotate": (lambda x, out: hadamard_transform(x, out=out), rows, rows, F32),
        "layer": (lambda x, out: layer(x, out=out), rows, rows, F32),
        "matvec": (lambda x, out: w8a8_matvec(weight, ones, x, out=out), row, row, F32),
        "scales of matvec": (lambda x, out: w8a8_matvec(weight, x, ones, out=out), row, row, F32),
        "matmul": (lambda x, out: w8a8_matmul(weight, ones, x, out=out), rows, rows, F32),
        "scales of matmul": (lambda x, out: w8a8_matmul(weight, x, [ones], out=out), row, (1, 32), F32),
        "bias": (lambda x, out: w8a8_matmul(weight, ones, [ones], x, out=out), row, (1, 32), F32),
        "int4 matvec": (lambda x, out: w4a8_matvec(int4, x, out=out), row, row, F32),
        "int4 matmul": (lambda x, out: w4a8_matmul(int4, x, out=out), rows, rows, F32),
        "int4 bias": (lambda x, out: w4a8_matmul(int4, [ones], x, out=out), row, (1, 32), F32),
    }
    for name, (call, shape, out_shape, out_dtype) in calls.items():
        x = np.ones(shape, dtype)
        out = np.frombuffer(x, out_dtype, np.prod(out_shape)).reshape(out_shape)
        with pytest.raises(LayoutError, match="out:"):
            call(kind(x), out)
        assert (x == 1).all(), name


def test_input_is_converted_once(isa):
    memory = np.ones((8, 32), F32)
    layer = QuantLinear.from_float(np.ones((32, 32), F32))
    for call, dtype in ((dynamic_quantize, np.int8), (layer, F32), (hadamard_transform, F32)):
        x = Once(memory)
        call(x, out=np.empty((8, 32), dtype))
        assert x.calls == 1
    # The memory that it converted to must not be overwritten.
    for call, out in ((layer, memory), (dynamic_quantize, memory.view(np.int8).reshape(4, 8, 32)[1])):
        with pytest.raises(LayoutError):
            call(Once(memory), out=out)
    assert (memory == 1).all()


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [np.matrix, lambda out: np.ma.array(out, mask=True, hard_mask=True)])
def test_masked_arrays_and_matrices_as_out(kind):
    with pytest.raises(DTypeError, match=r"out: expected a numpy\.ndarray"):
        hadamard_transform(OTHER, out=kind(np.zeros(OTHER.shape, F32)))
