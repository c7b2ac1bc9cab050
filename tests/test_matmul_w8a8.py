"""w8a8_matmul and QuantLinear against sums of int64."""

import copy
import pickle

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, assert_same_bits, using
from hypothesis import given
from hypothesis import strategies as st

import dynquant
from dynquant import (
    DTypeError,
    EmptyInputError,
    FeatureDimMismatchError,
    LayoutError,
    NonFiniteError,
    ParameterError,
    QuantLinear,
    ShapeMismatchError,
    _core,
    simd_info,
    w8a8_matmul,
    w8a8_matvec,
)

# k that are summed in int32 before they go to int64.
BLOCK = 65_536


def layer_arrays(m, n, k, seed=0):
    """Random weights with some -128, scales of both signs, activations with a row of zeros, and a bias."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-128, 128, (n, k), dtype=np.int8)
    weight[0] = -128
    x = rng.standard_normal((m, k)).astype(F32)
    x[m // 2] = 0
    return weight, rng.standard_normal(n).astype(F32), x, rng.standard_normal(n).astype(F32)


def expected(weight, scales, x, bias=None):
    codes, a_scales = reference.quantize(x, per_row=True)
    # Products of int8 added up in float64 are exact below 2**53, and BLAS adds them fast.
    sums = codes.astype(np.float64) @ weight.T.astype(np.float64)
    y = sums.astype(F32) * scales * a_scales[:, None]
    return y if bias is None else y + bias


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 63, 64, 65, 127, 383, 1001])
@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 31, 32, 33, 67, 133])
def test_sizes(n, k, isa):
    for m in (1, 2, 3, 4, 5, 7, 8, 11):
        weight, scales, x, bias = layer_arrays(m, n, k, seed=m)
        message = f"m={m}"
        assert_same_bits(w8a8_matmul(weight, scales, x), expected(weight, scales, x), message)
        assert_same_bits(w8a8_matmul(weight, scales, x, bias), expected(weight, scales, x, bias), message)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (32, 64), (45, 300), (70, BLOCK + 70)])
def test_any_number_of_rows(n, k, isa):
    """Rows are taken in tiles, of sizes that differ; what stands behind the last one is not touched."""
    weight, scales, x, bias = layer_arrays(69, n, k)
    y = expected(weight, scales, x, bias)
    for m in range(1, 70) if k < BLOCK else (5, 16, 33, 40, 69):
        memory = np.full((m + 1, n), 7, F32)
        w8a8_matmul(weight, scales, x[:m], bias, out=memory[:m])
        assert_same_bits(memory[:m], y[:m], f"m={m}")
        assert (memory[m] == 7).all()


@pytest.mark.parametrize("k", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 3, 200_000])
@pytest.mark.parametrize("code", [127, -128, -127])
def test_the_largest_sums(code, k, isa):
    """All activations 127: the sums pass 2**31, and every int32 in between comes close to its bounds."""
    x = np.full((5, k), 127, F32)
    x[1] = -127
    layer = QuantLinear.from_arrays(
        {"weight_i8": np.full((99, k), code, np.int8), "weight_scales": np.ones(99, F32)}
    )
    y = layer(x)
    assert y[0].tolist() == layer(x[:1])[0].tolist() == [F32(code * 127 * k)] * 99
    assert y[1].tolist() == layer(x[1:2])[0].tolist() == [F32(-code * 127 * k)] * 99


# Codes whose pairs are at, just above and far above what int16 holds beside weights of 8 bits.
PAIR_CODES = np.array([1, 2, 63, 64, 65, 66, 126, 127], np.int8)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 8, 31, 33, 250, 4095, 4097, BLOCK + 9])
@pytest.mark.parametrize("signs", ["equal", "alternating", "in pairs", "random"])
def test_pairs_of_activations_that_int16_does_not_hold(signs, k, isa):
    """Every such pair among extreme weights; the first row has none, and the last nothing else."""
    rng = np.random.default_rng(k)
    x = rng.choice(PAIR_CODES, (6, k)).astype(F32)
    x[0], x[-1] = 64, 127
    i = np.arange(k)
    x *= {"equal": 1, "alternating": (-1) ** i, "in pairs": (-1) ** (i // 2)}.get(signs, 1)
    if signs == "random":
        x *= rng.choice([-1, 1], x.shape)
    x[:, rng.integers(k)] = 127  # codes are these numbers
    weight = rng.choice(np.array([-128, -127, 126, 127], np.int8), (99, k))
    weight[0], weight[1] = -128, 127
    y = w8a8_matmul(weight, np.ones(99), x)
    exact = x.astype(np.int64) @ weight.T.astype(np.int64)
    assert_same_bits(y, exact.astype(F32))
    assert_same_bits(w8a8_matmul(weight, np.ones(99), x[3:4]), y[3:4])
    for row, token in zip(y, x, strict=True):
        assert_same_bits(w8a8_matvec(weight, np.ones(99), token), row)


def test_random_codes_over_several_blocks(isa):
    weight, scales, x, bias = layer_arrays(6, 99, 2 * BLOCK + 29)
    y = expected(weight, scales, x, bias)
    assert_same_bits(w8a8_matmul(weight, scales, x, bias), y)
    assert_same_bits(w8a8_matmul(weight, scales, x[5:], bias), y[5:])


@pytest.mark.parametrize("m", [64, 65, 80, 129, 200])
@pytest.mark.parametrize(("n", "k"), [(512, 8), (1101, 5), (300, 2100)])
def test_parts_of_rows_and_outputs(m, n, k, isa):
    """More than 64 rows are taken in parts, and outputs 256 or 512 at a time."""
    weight, scales, x, bias = layer_arrays(m, n, k)
    y = expected(weight, scales, x, bias)
    memory = np.full((m + 1, n), 7, F32)
    for num_threads in (1, 3):
        w8a8_matmul(weight, scales, x, bias, out=memory[:m], num_threads=num_threads)
        assert_same_bits(memory[:m], y)
        assert (memory[m] == 7).all()
    assert_same_bits(w8a8_matmul(weight, scales, x), expected(weight, scales, x))


def test_more_rows_than_a_chunk(isa):
    """Rows are taken in chunks of 32 where these have a megabyte of activations and more."""
    k = 60_000
    weight, scales, x, bias = layer_arrays(70, 9, k)
    row_bytes = _core.PackedLinear(9, k, 0, None, None, 0).activation_bytes()
    assert 32 * row_bytes > dynquant._matmul._CHUNK_BYTES
    assert_same_bits(w8a8_matmul(weight, scales, x, bias), expected(weight, scales, x, bias))


def test_a_row_is_a_matvec(isa):
    weight, scales, x, _ = layer_arrays(9, 40, 300)
    y = w8a8_matmul(weight, scales, x)
    for row, token in zip(y, x, strict=True):
        assert_same_bits(row, w8a8_matvec(weight, scales, token))


@given(data=st.data())
def test_rows_and_outputs_are_independent(data):
    m, n, k = (data.draw(st.integers(1, most)) for most in (14, 40, 90))
    weight, scales, x, bias = layer_arrays(m, n, k, seed=data.draw(st.integers(0, 2**20)))
    y = w8a8_matmul(weight, scales, x, bias)
    rows = data.draw(st.permutations(range(m)))
    outputs = data.draw(st.permutations(range(n)))
    assert_same_bits(w8a8_matmul(weight, scales, x[rows], bias), y[rows])
    part = w8a8_matmul(weight[outputs], scales[outputs], x, bias[outputs])
    assert_same_bits(part, np.ascontiguousarray(y[:, outputs]))


@pytest.mark.parametrize("num_threads", [2, 3, 8, 100])
def test_threads_change_nothing(num_threads, isa):
    weight, scales, x, bias = layer_arrays(10, 133, 200)
    y = w8a8_matmul(weight, scales, x, bias)
    assert_same_bits(w8a8_matmul(weight, scales, x, bias, num_threads=num_threads), y)
    layer = QuantLinear.from_arrays({"weight_i8": weight, "weight_scales": scales, "bias": bias})
    assert_same_bits(layer(x, num_threads=num_threads), y)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types(dtype, isa):
    weight, scales, x, bias = layer_arrays(5, 20, 5000)
    x = x.astype(dtype)
    assert_same_bits(w8a8_matmul(weight, scales, x, bias), expected(weight, scales, x.astype(F32), bias))


def test_out_and_layouts():
    weight, scales, x, bias = layer_arrays(5, 20, 50)
    y = expected(weight, scales, x, bias)
    out = np.full((5, 20), np.nan, F32)
    assert w8a8_matmul(weight, scales, x, bias, out=out) is out
    assert_same_bits(out, y)
    assert_same_bits(w8a8_matmul(np.asfortranarray(weight), scales, np.asfortranarray(x), bias), y)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (3, 0, 4), (0, 0, 4), (2, 3, 0), (0, 3, 0)])
def test_empty(m, n, k):
    bias = np.arange(n, dtype=F32)
    y = w8a8_matmul(np.ones((n, k), np.int8), np.ones(n), np.ones((m, k), F32), bias)
    assert_same_bits(y, np.broadcast_to(bias + k, (m, n)).astype(F32) if k else np.tile(bias, (m, 1)))


def test_zeros_of_empty_sums_have_the_signs_of_scales():
    """And none is left once a bias, -0.0 too, is added to a zero above it."""
    weight, x, scales = np.ones((3, 0), np.int8), np.ones((2, 0), F32), np.array([-1, 2, -3], F32)
    assert_same_bits(w8a8_matmul(weight, scales, x), np.array([[-0.0, 0.0, -0.0]] * 2, F32))
    bias = np.array([-0.0, -0.0, 1], F32)
    assert_same_bits(w8a8_matmul(weight, scales, x, bias), np.array([[-0.0, 0.0, 1]] * 2, F32))


# QuantLinear


def linear(m=6, n=37, k=70, **options):
    rng = np.random.default_rng(3)
    weight, x = rng.standard_normal((n, k)).astype(F32), rng.standard_normal((m, k)).astype(F32)
    bias = rng.standard_normal(n).astype(F32)
    return weight, x, bias, QuantLinear.from_float(weight, bias, **options)


def test_a_layer_is_its_product(isa):
    weight, x, bias, layer = linear()
    codes, scales = reference.quantize(weight, per_row=True)
    assert_same_bits(layer(x), expected(codes, scales, x, bias))
    assert (layer.in_features, layer.out_features) == (70, 37)


def test_smoothing(isa):
    """Weights times the factors, activations divided by them, both in float32 as the functions do."""
    factors = np.exp2(np.random.default_rng(0).uniform(-3, 3, 70)).astype(F32)
    weight, x, bias, layer = linear(smooth=factors)
    codes, scales = reference.quantize(weight * factors, per_row=True)
    assert_same_bits(layer(x), expected(codes, scales, x / factors, bias))
    half_a_step = 0.5 * scales[:, None] / factors
    assert (np.abs(layer.weight_dequantized() - weight) <= 1.001 * half_a_step).all()


@pytest.mark.parametrize("shape", [(70,), (0, 70), (2, 3, 70), (1, 1, 1, 70), (2, 0, 70)])
def test_leading_axes(shape):
    _, _, _, layer = linear()
    x = np.random.default_rng(0).standard_normal(shape).astype(F32)
    rows = layer(x.reshape(-1, 70))
    y = layer(x)
    assert y.shape == (*shape[:-1], 37)
    assert_same_bits(y.reshape(-1, 37), rows)
    out = np.empty(y.shape, F32)
    assert layer(x, out=out) is out
    assert_same_bits(out, y)


def test_arrays_do_not_depend_on_the_instruction_set():
    weight, x, bias, _ = linear()
    layers, arrays = {}, {}
    for isa in simd_info()["supported"]:
        with using(isa):
            layers[isa] = QuantLinear.from_float(weight, bias)
            arrays[isa] = layers[isa].to_arrays()
            y = layers[isa](x)
        for name, array in arrays[isa].items():
            assert_same_bits(array, arrays["baseline"][name], f"{isa} {name}")
            with using("baseline"):
                assert_same_bits(QuantLinear.from_arrays(arrays[isa])(x), y)


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
@pytest.mark.parametrize("smooth", [None, np.full(70, 2, F32)])
def test_copies(through, smooth):
    weight, x, _, layer = linear(smooth=smooth)
    twin = through(layer)
    assert_same_bits(twin(x), layer(x))
    assert repr(twin) == repr(layer)
    assert twin.memory_bytes == layer.memory_bytes
    assert_same_bits(twin.weight_dequantized(), layer.weight_dequantized())
    assert layer.weight_dequantized().shape == weight.shape


def test_a_layer_keeps_no_view_of_what_it_was_made_from():
    weight, x, bias, layer = linear(smooth=np.ones(70, F32))
    y = layer(x)
    weight[:], bias[:] = 0, 0
    for array in layer.to_arrays().values():
        array[:] = 1
    assert_same_bits(layer(x), y)


@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (384, 1536), (4096, 512)])
def test_memory(n, k, isa):
    layer = QuantLinear.from_arrays({"weight_i8": np.ones((n, k), np.int8), "weight_scales": np.ones(n)})
    assert layer.memory_bytes <= 1.02 * n * k


# Errors

W8, SCALES = np.ones((3, 4), np.int8), np.ones(3, F32)
X = np.ones((2, 4), F32)
LAYER = QuantLinear.from_float(np.ones((3, 4), F32))
BAD_X = np.array([[1, 2, 3, 4], [5, np.nan, 7, 8]], F32)
READ_ONLY = np.empty((2, 3), F32)
READ_ONLY.flags.writeable = False

BAD_CALLS = [
    (w8a8_matmul, (W8.astype(np.uint8), SCALES, X), {}, DTypeError, "weight_i8"),
    (w8a8_matmul, (W8[0], SCALES, X), {}, ShapeMismatchError, "weight_i8"),
    (w8a8_matmul, (W8, SCALES[:2], X), {}, ShapeMismatchError, "weight_scales"),
    (w8a8_matmul, (W8, [1, 2, np.inf], X), {}, NonFiniteError, "weight_scales"),
    (w8a8_matmul, (W8, SCALES, X[:, :3]), {}, ShapeMismatchError, "activations"),
    (w8a8_matmul, (W8, SCALES, X[0]), {}, ShapeMismatchError, "activations"),
    (w8a8_matmul, (W8, SCALES, X.astype(int)), {}, DTypeError, "activations"),
    (w8a8_matmul, (W8, SCALES, BAD_X), {}, NonFiniteError, "flat index 5"),
    (w8a8_matmul, (W8, SCALES, X, [1.0, 2]), {}, ShapeMismatchError, "bias"),
    (w8a8_matmul, (W8, SCALES, X, [1, 2, np.nan]), {}, NonFiniteError, "bias"),
    (w8a8_matmul, (W8, SCALES, X), {"num_threads": 0}, ParameterError, "num_threads"),
    (w8a8_matmul, (W8, SCALES, X), {"out": np.empty((2, 4), F32)}, ShapeMismatchError, "out"),
    (w8a8_matmul, (W8, SCALES, X), {"out": np.empty((2, 3))}, DTypeError, "out"),
    (w8a8_matmul, (W8, SCALES, X), {"out": READ_ONLY}, LayoutError, "read-only"),
    (w8a8_matmul, (W8, SCALES, X), {"out": np.empty((3, 2), F32).T}, LayoutError, "contiguous"),
    (LAYER, (X[:, :3],), {}, ShapeMismatchError, "x:"),
    (LAYER, (F32(1),), {}, ShapeMismatchError, "x:"),
    (LAYER, (X.astype(int),), {}, DTypeError, "x:"),
    (LAYER, (BAD_X,), {}, NonFiniteError, "flat index 5"),
    (LAYER, (X,), {"num_threads": 1.5}, ParameterError, "num_threads"),
    (LAYER, (X,), {"out": np.empty((2, 4), F32)}, ShapeMismatchError, "out"),
    (QuantLinear.from_float, (np.ones(3, F32),), {}, ShapeMismatchError, "weight"),
    (QuantLinear.from_float, (np.ones((0, 3), F32),), {}, EmptyInputError, "weight"),
    (QuantLinear.from_float, (BAD_X,), {}, NonFiniteError, "weight"),
    (QuantLinear.from_float, (X, [1.0]), {}, ShapeMismatchError, "bias"),
    (QuantLinear.from_float, (X,), {"smooth": [1.0, 2]}, FeatureDimMismatchError, "smooth"),
    (QuantLinear.from_float, (X,), {"smooth": [1.0, 2, 3, 0]}, ParameterError, "smooth"),
    (QuantLinear.from_float, (X * F32(1e38),), {"smooth": [9.0] * 4}, NonFiniteError, "weight * smooth"),
    (QuantLinear.from_arrays, ({"weight_i8": W8},), {}, ParameterError, "weight_scales"),
    (QuantLinear.from_arrays, (None,), {}, ParameterError, "mapping"),
    (QuantLinear.from_arrays, ([W8, SCALES],), {}, ParameterError, "mapping"),
    (
        QuantLinear.from_arrays,
        ({"weight_i8": W8, "weight_scales": SCALES, "b": 1},),
        {},
        ParameterError,
        "'b'",
    ),
    (
        QuantLinear.from_arrays,
        ({"weight_i8": W8[:0], "weight_scales": SCALES[:0]},),
        {},
        EmptyInputError,
        "weight_i8",
    ),
    (
        QuantLinear.from_arrays,
        ({"weight_i8": W8, "weight_scales": SCALES[:2]},),
        {},
        ShapeMismatchError,
        "scales",
    ),
]


@pytest.mark.parametrize(("call", "args", "options", "error", "message"), BAD_CALLS)
def test_bad_calls(call, args, options, error, message):
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert type(caught.value) is error
    assert message in str(caught.value)


def test_out_may_not_overlap():
    memory = np.zeros(20, F32)
    square = QuantLinear.from_float(np.eye(4, dtype=F32))
    with pytest.raises(LayoutError, match="overlaps"):
        square(memory[:8].reshape(2, 4), out=memory[4:12].reshape(2, 4))
    with pytest.raises(LayoutError, match="overlaps"):
        w8a8_matmul(W8, SCALES, memory[:8].reshape(2, 4), out=memory[6:12].reshape(2, 3))


@pytest.mark.parametrize("rows", [1, 3, 60])
def test_out_is_untouched_after_an_error_in_the_last_row(rows):
    """With 60 rows the error lies beyond the first chunk."""
    k = 60_000
    x = np.ones((rows, k), F32)
    x[-1, -1] = np.inf
    out = np.full((rows, 2), 7, F32)
    with pytest.raises(NonFiniteError) as caught:
        w8a8_matmul(np.ones((2, k), np.int8), [1.0, 1], x, out=out)
    assert caught.value.index == rows * k - 1
    assert (out == 7).all()


def test_a_quotient_that_overflows_is_named():
    layer = QuantLinear.from_float(np.ones((2, 3), F32), smooth=[1.0, 1e-5, 1.0])
    with pytest.raises(NonFiniteError, match="x / smooth") as caught:
        layer([[1.0, 2, 3], [1, 3e38, 3]])
    assert caught.value.index == 4
