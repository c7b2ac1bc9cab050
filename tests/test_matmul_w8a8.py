"""w8a8_matmul and w8a8_matvec against sums of int64."""

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import dynquant
from dynquant import (
    DTypeError,
    DynQuantTensor,
    LayoutError,
    NonFiniteError,
    ParameterError,
    QuantLinear,
    ShapeMismatchError,
    _core,
    dynamic_quantize_int8,
    dynamic_quantize_int8_per_row,
    quantize_weights,
    w8a8_matmul,
    w8a8_matvec,
)

# k-block: inputs whose products are summed in int32 before the sum is added to an int64.
BLOCK = 65_536


def layer_arrays(m, n, k, seed=0):
    """Random weights with some -128, scales of both signs, activations with a row of zeros, and a bias."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-128, 128, (n, k), dtype=np.int8)
    weight[0] = -128
    x = rng.standard_normal((m, k)).astype(F32)
    x[m // 2] = 0
    return weight, rng.standard_normal(n).astype(F32), x, rng.standard_normal(n).astype(F32)


# w8a8_matmul


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 63, 64, 65, 127, 383, 1001])
@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 31, 32, 33, 67, 133])
def test_sizes(n, k, isa):
    for m in (1, 2, 3, 4, 5, 7, 8, 11):
        weight, scales, x, bias = layer_arrays(m, n, k, seed=m)
        message = f"m={m}"
        assert_same_bits(w8a8_matmul(weight, scales, x), reference.w8a8_matmul(weight, scales, x), message)
        assert_same_bits(
            w8a8_matmul(weight, scales, x, bias), reference.w8a8_matmul(weight, scales, x, bias), message
        )


@pytest.mark.parametrize(("n", "k"), [(1, 1), (32, 64), (45, 300), (70, BLOCK + 70)])
def test_any_number_of_rows(n, k, isa):
    """Rows are processed in tiles of different heights; memory after the last row is not touched."""
    weight, scales, x, bias = layer_arrays(69, n, k)
    y = reference.w8a8_matmul(weight, scales, x, bias)
    for m in range(1, 70) if k < BLOCK else (5, 16, 33, 40, 69):
        memory = np.full((m + 1, n), 7, F32)
        w8a8_matmul(weight, scales, x[:m], bias, out=memory[:m])
        assert_same_bits(memory[:m], y[:m], f"m={m}")
        assert (memory[m] == 7).all()


@pytest.mark.parametrize("k", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 3, 200_000])
@pytest.mark.parametrize("code", [127, -128, -127])
def test_the_largest_sums(code, k, isa):
    """All activations 127: the sums exceed 2**31, and every int32 accumulator comes close to its bounds."""
    x = np.full((5, k), 127, F32)
    x[1] = -127
    layer = QuantLinear.from_arrays(
        {"weight_i8": np.full((99, k), code, np.int8), "weight_scales": np.ones(99, F32)}
    )
    y = layer(x)
    assert y[0].tolist() == layer(x[:1])[0].tolist() == [F32(code * 127 * k)] * 99
    assert y[1].tolist() == layer(x[1:2])[0].tolist() == [F32(-code * 127 * k)] * 99


# Codes whose pairs, times weights of 8 bits, sum to just below, just above and far above an int16.
PAIR_CODES = np.array([1, 2, 63, 64, 65, 66, 126, 127], np.int8)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 8, 31, 33, 250, 4095, 4097, BLOCK + 9])
@pytest.mark.parametrize("signs", ["equal", "alternating", "in pairs", "random"])
def test_pairs_whose_sums_overflow_int16(signs, k, isa):
    """All such pairs, with extreme weights; the first row has none of them, and the last nothing else."""
    rng = np.random.default_rng(k)
    x = rng.choice(PAIR_CODES, (6, k)).astype(F32)
    x[0], x[-1] = 64, 127
    i = np.arange(k)
    x *= {"equal": 1, "alternating": (-1) ** i, "in pairs": (-1) ** (i // 2)}.get(signs, 1)
    if signs == "random":
        x *= rng.choice([-1, 1], x.shape)
    x[:, rng.integers(k)] = 127  # makes the scale 1
    weight = rng.choice(np.array([-128, -127, 126, 127], np.int8), (99, k))
    weight[0], weight[1] = -128, 127
    y = w8a8_matmul(weight, np.ones(99), x)
    exact = x.astype(np.int64) @ weight.T.astype(np.int64)
    assert_same_bits(y, exact.astype(F32))
    assert_same_bits(w8a8_matmul(weight, np.ones(99), x[3:4]), y[3:4])
    for row, token in zip(y, x, strict=True):
        assert_same_bits(w8a8_matvec(weight, np.ones(99), token), row)


def test_random_codes_over_several_k_blocks(isa):
    weight, scales, x, bias = layer_arrays(6, 99, 2 * BLOCK + 29)
    y = reference.w8a8_matmul(weight, scales, x, bias)
    assert_same_bits(w8a8_matmul(weight, scales, x, bias), y)
    assert_same_bits(w8a8_matmul(weight, scales, x[5:], bias), y[5:])


@pytest.mark.parametrize("m", [64, 65, 80, 129, 200])
@pytest.mark.parametrize(("n", "k"), [(512, 8), (1101, 5), (300, 2100)])
def test_blocks_of_rows_and_outputs(m, n, k, isa):
    """More than 64 rows are processed in blocks, and outputs 256 or 512 at a time."""
    weight, scales, x, bias = layer_arrays(m, n, k)
    y = reference.w8a8_matmul(weight, scales, x, bias)
    memory = np.full((m + 1, n), 7, F32)
    for num_threads in (1, 3):
        w8a8_matmul(weight, scales, x, bias, out=memory[:m], num_threads=num_threads)
        assert_same_bits(memory[:m], y)
        assert (memory[m] == 7).all()
    assert_same_bits(w8a8_matmul(weight, scales, x), reference.w8a8_matmul(weight, scales, x))


@pytest.mark.whitebox
def test_more_rows_than_a_chunk(isa):
    """Chunks are of 32 rows where these take 1 MiB of activations or more."""
    k = 60_000
    weight, scales, x, bias = layer_arrays(70, 9, k)
    row_bytes = _core.PackedLinear(9, k, 0, None, None, False, 0).activation_bytes()
    assert 32 * row_bytes > dynquant._packed.CHUNK_BYTES
    assert_same_bits(w8a8_matmul(weight, scales, x, bias), reference.w8a8_matmul(weight, scales, x, bias))


def test_row_equals_matvec(isa):
    weight, scales, x, _ = layer_arrays(9, 40, 300)
    y = w8a8_matmul(weight, scales, x)
    for row, token in zip(y, x, strict=True):
        assert_same_bits(row, w8a8_matvec(weight, scales, token))


@given(data=st.data())
def test_rows_and_outputs_are_independent(data):
    m, n, k = (data.draw(st.integers(1, limit)) for limit in (14, 40, 90))
    weight, scales, x, bias = layer_arrays(m, n, k, seed=data.draw(st.integers(0, 2**20)))
    y = w8a8_matmul(weight, scales, x, bias)
    rows = data.draw(st.permutations(range(m)))
    outputs = data.draw(st.permutations(range(n)))
    assert_same_bits(w8a8_matmul(weight, scales, x[rows], bias), y[rows])
    permuted = w8a8_matmul(weight[outputs], scales[outputs], x, bias[outputs])
    assert_same_bits(permuted, np.ascontiguousarray(y[:, outputs]))


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
    assert_same_bits(
        w8a8_matmul(weight, scales, x, bias), reference.w8a8_matmul(weight, scales, x.astype(F32), bias)
    )


def test_out_and_layouts():
    weight, scales, x, bias = layer_arrays(5, 20, 50)
    y = reference.w8a8_matmul(weight, scales, x, bias)
    out = np.full((5, 20), np.nan, F32)
    assert w8a8_matmul(weight, scales, x, bias, out=out) is out
    assert_same_bits(out, y)
    assert_same_bits(w8a8_matmul(np.asfortranarray(weight), scales, np.asfortranarray(x), bias), y)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (3, 0, 4), (0, 0, 4), (2, 3, 0), (0, 3, 0)])
def test_empty(m, n, k):
    bias = np.arange(n, dtype=F32)
    y = w8a8_matmul(np.ones((n, k), np.int8), np.ones(n), np.ones((m, k), F32), bias)
    assert_same_bits(y, np.broadcast_to(bias + k, (m, n)).astype(F32) if k else np.tile(bias, (m, 1)))


def test_zeros_of_empty_sums_have_the_sign_of_the_scale():
    """Without a bias; adding one, even -0.0, gives +0.0 or the bias."""
    weight, x, scales = np.ones((3, 0), np.int8), np.ones((2, 0), F32), np.array([-1, 2, -3], F32)
    assert_same_bits(w8a8_matmul(weight, scales, x), np.array([[-0.0, 0.0, -0.0]] * 2, F32))
    bias = np.array([-0.0, -0.0, 1], F32)
    assert_same_bits(w8a8_matmul(weight, scales, x, bias), np.array([[-0.0, 0.0, 1]] * 2, F32))


# Errors

W8, SCALES = np.ones((3, 4), np.int8), np.ones(3, F32)
X = np.ones((2, 4), F32)
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
    with pytest.raises(LayoutError, match="overlap"):
        square(memory[:8].reshape(2, 4), out=memory[4:12].reshape(2, 4))
    with pytest.raises(LayoutError, match="overlap"):
        w8a8_matmul(W8, SCALES, memory[:8].reshape(2, 4), out=memory[6:12].reshape(2, 3))


@pytest.mark.parametrize("rows", [1, 3, 60])
def test_out_is_unchanged_after_an_error_in_the_last_row(rows):
    """With 60 rows the error is after the first chunk."""
    k = 60_000
    x = np.ones((rows, k), F32)
    x[-1, -1] = np.inf
    out = np.full((rows, 2), 7, F32)
    with pytest.raises(NonFiniteError) as caught:
        w8a8_matmul(np.ones((2, k), np.int8), [1.0, 1], x, out=out)
    assert caught.value.index == rows * k - 1
    assert (out == 7).all()


# w8a8_matvec


def check_matvec(weight, weight_scales, activation):
    expected = reference.w8a8_matvec(weight, weight_scales, activation)
    assert_same_bits(w8a8_matvec(weight, weight_scales, activation), expected)
    out = np.full(len(weight), np.nan, F32)
    assert w8a8_matvec(weight, weight_scales, activation, out=out) is out
    assert_same_bits(out, expected)
    return expected


@pytest.mark.parametrize("in_features", [1, 3, 15, 16, 31, 32, 33, 63, 64, 127, 128, 129, 257, 1000, 4097])
@pytest.mark.parametrize("out_features", [1, 2, 3, 4, 5, 7, 64, 65])
def test_matvec_sizes(out_features, in_features, isa):
    rng = np.random.default_rng(in_features)
    weight = rng.integers(-128, 128, (out_features, in_features), dtype=np.int8)
    check_matvec(
        weight, rng.standard_normal(out_features).astype(F32), rng.standard_normal(in_features).astype(F32)
    )


@pytest.mark.parametrize("in_features", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 200_000])
@pytest.mark.parametrize("weight", [127, -128, -127])
@pytest.mark.parametrize("sign", [1, -1])
def test_matvec_the_largest_sums(weight, sign, in_features, isa):
    """All codes 127: the sum of 127 * 127 exceeds 2**31 at 133,145 products."""
    activation = np.full(in_features, sign * 127, F32)
    assert (dynamic_quantize_int8(activation).data == sign * 127).all()
    y = w8a8_matvec(np.full((3, in_features), weight, np.int8), np.ones(3), activation)
    assert y.tolist() == [F32(weight * sign * 127 * in_features)] * 3


def test_matvec_sums_above_int32_are_exact(isa):
    """Above 2**31 and still exact: removing 100 of the products shows."""
    k = 200_000
    weight = np.full((2, k), 127, np.int8)
    weight[1, 133_333 : 133_333 + 100] = 0
    y = w8a8_matvec(weight, [1, 1], np.full(k, 127, F32))
    assert 127 * 127 * k > 2**31
    assert y.tolist() == [F32(127 * 127 * k), F32(127 * 127 * (k - 100))]


def test_matvec_large_sums_cancel_exactly(isa):
    """More than 2**31 on either side of zero, with a difference of 1."""
    k = 300_001
    weight = np.full((1, k), 127, np.int8)
    weight[0, k // 2 : -1] = -127
    weight[0, -1] = 1
    activation = np.full(k, 127, F32)
    assert w8a8_matvec(weight, [1.0], activation).tolist() == [127.0]


@pytest.mark.parametrize("in_features", [BLOCK - 3, BLOCK + 7, 3 * BLOCK + 29])
def test_matvec_random_codes_over_several_k_blocks(in_features, isa):
    rng = np.random.default_rng(0)
    weight = rng.integers(-128, 128, (5, in_features), dtype=np.int8)
    check_matvec(
        weight, np.array([1, -2, 0.3, 1e-30, 1e30], F32), rng.standard_normal(in_features).astype(F32)
    )


@pytest.mark.parametrize("weight", [-128, -127, -1, 1, 127])
@pytest.mark.parametrize("code", [-127, -1, 1, 127])
def test_matvec_every_index_counts(weight, code, isa):
    """One product at each index in turn: none is dropped, counted twice, or of the wrong sign."""
    k = 300
    w = np.zeros((k, k), np.int8)
    np.fill_diagonal(w, weight)
    activation = np.full(k, code, F32)
    activation[0] = 127  # keeps the scale at 1
    y = w8a8_matvec(w, np.ones(k), activation)
    assert y.tolist() == [weight * 127, *[weight * code] * (k - 1)]


def test_matvec_the_order_of_the_products(isa):
    """float32(sum) * w_scale first: the other order would underflow."""
    y = w8a8_matvec(np.array([[100]], np.int8), [1e-30], np.array([1e-15], F32))
    assert y[0] == F32(100 * 127) * F32(1e-30) * (F32(1e-15) / F32(127))
    assert y[0] > 0


def test_matvec_sums_above_2_to_24_are_rounded_once(isa):
    k = 4000
    weight = np.full((1, k), 127, np.int8)
    weight[0, -1] = 100
    total = 127 * (127 * (k - 1) + 100)
    assert total > 2**24
    assert int(F32(total)) != total
    assert w8a8_matvec(weight, [1.0], np.full(k, 127, F32)).tolist() == [F32(total)]


@pytest.mark.parametrize("activation", [np.zeros(5, F32), np.full(5, 1e-45, F32)], ids=["zero", "underflow"])
def test_matvec_scale_zero(activation, isa):
    y = check_matvec(np.full((2, 5), -128, np.int8), np.array([1, 1e30], F32), activation)
    assert y.tolist() == [0, 0]


def test_matvec_no_rows():
    assert w8a8_matvec(np.empty((0, 3), np.int8), [], [1.0, 2, 3]).shape == (0,)


@pytest.mark.parametrize("layout", ["F", "strided", "reversed", "read-only"])
def test_matvec_layouts_of_the_weight(layout):
    rng = np.random.default_rng(0)
    weight = rng.integers(-128, 128, (6, 50), dtype=np.int8)
    variant = {
        "F": np.asfortranarray(weight),
        "strided": np.repeat(weight, 2, axis=1)[:, ::2],
        "reversed": weight[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": np.frombuffer(weight.tobytes(), np.int8).reshape(6, 50),
    }[layout]
    scales, activation = rng.uniform(0.1, 1, 6), rng.standard_normal(50)
    assert_same_bits(w8a8_matvec(variant, scales, activation), w8a8_matvec(weight, scales, activation))


@given(
    weight=arrays(np.int8, st.tuples(st.integers(1, 9), st.just(70))),
    activation=arrays(F32, 70, elements=st.floats(-100, 100, width=32)),
    data=st.data(),
)
def test_matvec_rows_are_independent(weight, activation, data):
    scales = data.draw(arrays(F32, len(weight), elements=st.floats(-10, 10, width=32)))
    before = weight.tobytes(), scales.tobytes(), activation.tobytes()
    y = check_matvec(weight, scales, activation)
    for i in range(len(weight)):
        assert_same_bits(w8a8_matvec(weight[i : i + 1], scales[i : i + 1], activation), y[i : i + 1])
    assert (weight.tobytes(), scales.tobytes(), activation.tobytes()) == before


# Weights as quantize_weights gives them


def test_a_tensor_of_weights(isa):
    rng = np.random.default_rng(3)
    w, x, bias = (rng.standard_normal(shape).astype(F32) for shape in ((33, 70), (5, 70), (33,)))
    q = quantize_weights(w)
    y = w8a8_matmul(q.data, q.scales, x, bias)
    assert_same_bits(w8a8_matmul(q, None, x, bias), y)
    assert_same_bits(w8a8_matvec(q, None, x[0]), w8a8_matvec(q.data, q.scales, x[0]))
    twice = DynQuantTensor(
        np.repeat(q.data, 2, axis=0)[::2], np.repeat(q.scales, 2)[::2], None, q.shape, q.format
    )
    assert_same_bits(w8a8_matmul(twice, None, x, bias), y)
    assert_same_bits(w8a8_matvec(twice, None, x[0]), w8a8_matvec(q, None, x[0]))


def test_a_tensor_that_is_not_int8_weights():
    w, x = np.ones((4, 8), F32), np.ones((2, 8), F32)
    q = quantize_weights(w)
    infinite = quantize_weights(w)
    infinite.scales[2] = np.inf
    for call, activations in ((w8a8_matmul, x), (w8a8_matvec, x[0])):
        for weight, scales, error, message in [
            (q, q.scales, ParameterError, "weight_scales: expected None"),
            (quantize_weights(w, bits=4), None, ParameterError, "weight_i8: expected int8 per row"),
            (dynamic_quantize_int8(w), None, ParameterError, "weight_i8: expected int8 per row"),
            (dynamic_quantize_int8_per_row(w[None]), None, ShapeMismatchError, "weight_i8"),
            (infinite, None, NonFiniteError, "weight_i8.scales"),
            (q.data, None, DTypeError, "weight_scales"),
        ]:
            with pytest.raises(error, match=message):
                call(weight, scales, activations)
        out = q.scales[:4] if call is w8a8_matvec else None
        if out is not None:
            with pytest.raises(LayoutError, match="out"):
                call(q, None, activations, out=out)


def test_one_row_to_a_matmul_says_what_to_do():
    q = quantize_weights(np.ones((4, 8), F32))
    with pytest.raises(ShapeMismatchError, match=r"pass one row as activations\[None\]"):
        w8a8_matmul(q, None, np.ones(8, F32))
    assert w8a8_matmul(q, None, np.ones(8, F32)[None]).shape == (1, 4)
