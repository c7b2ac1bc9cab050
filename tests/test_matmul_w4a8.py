"""w4a8_matmul and w4a8_matvec against sums of integers."""

import functools

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, array_at, assert_same_bits, real_layer
from hypothesis import given
from hypothesis import strategies as st

from dynquant import (
    DynQuantFormat,
    DynQuantTensor,
    LayoutError,
    NonFiniteError,
    _core,
    _packed,
    error_metrics,
    quantize_weights,
    w4a8_matmul,
    w4a8_matvec,
)

# Inputs whose sum is exact in float32: longer groups are summed in segments of this length.
EXACT = 8192


def packed(codes, scales, offsets, size):
    """The tensor of these codes (N, K), with one scale per row where `size` is None.

    `offsets` are integer zero points, or float32 minimums, or None.
    """
    fmt = DynQuantFormat(4, "per_row" if size is None else "per_group", size, True)
    if size is None:
        scales, offsets = scales[:, 0], None if offsets is None else offsets[:, 0]
    minimums = None if offsets is None or offsets.dtype != F32 else offsets
    zero_points = offsets if minimums is None else None
    return DynQuantTensor(
        reference.pack(codes, per_row=True), scales, zero_points, codes.shape, fmt, minimums
    )


def weights(n, k, size, kind, seed=0):
    """Random codes of the whole range, with scales of both signs, as `reference.w4a8_matmul` takes them."""
    rng = np.random.default_rng(seed)
    groups, symmetric = -(-k // (size or k)), kind == "symmetric"
    codes = rng.integers(-8 if symmetric else 0, 8 if symmetric else 16, (n, k), dtype=np.int8)
    scales, offsets = rng.standard_normal((n, groups)).astype(F32), None
    if kind == "zero points":
        offsets = rng.integers(0, 16, (n, groups), dtype=np.uint8)
    elif kind == "minimums":
        offsets = rng.standard_normal((n, groups)).astype(F32) * 8
    return codes, scales, offsets, size


def expected(codes, scales, offsets, size, x, bias=None):
    return reference.w4a8_matmul(codes, scales, offsets, size or codes.shape[1], x, bias)


def activations(m, k, seed=0):
    """Normal activations, with outliers and a row of zeros."""
    x = np.random.default_rng(seed).standard_normal((m, k)).astype(F32)
    x[:, :: k // 3 + 1] *= 3
    x[m // 2] = 0
    return x


@functools.cache
def case(m, n, k, size, kind):
    """Weight, activations, bias, and the expected products without and with bias."""
    arrays = weights(n, k, size, kind)
    x, bias = activations(m, k), np.random.default_rng(1).standard_normal(n).astype(F32)
    return packed(*arrays), x, bias, expected(*arrays, x), expected(*arrays, x, bias)


# Products

KINDS = ["zero points", "symmetric", "minimums"]
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("size", [1, 3, 8, 31, 32, 64, None])
@pytest.mark.parametrize("k", [1, 2, 7, 9, 16, 63, 128, 383])
def test_sizes(k, size, kind, isa):
    """Every remainder of rows by 4, of outputs by panels of 8, 16 and 32, and of k by k-blocks of 8."""
    for n in (1, 7, 8, 17, 33, 67):
        weight, x, bias, plain, with_bias = case(11, n, k, size, kind)
        for m in (1, 2, 3, 4, 5, 11):
            assert_same_bits(w4a8_matmul(weight, x[:m]), plain[:m], f"m={m} n={n}")
        assert_same_bits(w4a8_matmul(weight, x, bias), with_bias, f"bias n={n}")


@each_kind
@pytest.mark.parametrize(
    ("k", "size"),
    [(160, 32), (288, 96), (320, 64), (640, 128), (800, 288), (576, 512), (1024, None), (64, 8)],
)
def test_any_number_of_rows(k, size, kind, isa):
    """With AMX, groups of whole tiles are processed in tiles: two groups at a time, one, or part of one."""
    weight, x, bias, _, with_bias = case(140, 40, k, size, kind)
    for m in [*range(1, 71), *range(126, 131), 140]:
        assert_same_bits(w4a8_matmul(weight, x[-m:], bias), with_bias[-m:], f"m={m}")


@each_kind
@pytest.mark.parametrize(
    ("n", "k", "size"),
    [(40, 1001, 100), (3, 4096, 4096), (35, 9000, None), (33, 20_011, 32), (5, 3 * EXACT + 29, EXACT)],
)
def test_longer_rows(n, k, size, kind, isa):
    weight, x, bias, _, with_bias = case(6, n, k, size, kind)
    assert_same_bits(w4a8_matmul(weight, x, bias), with_bias)


@each_kind
@pytest.mark.parametrize("size", [EXACT + 1, 2 * EXACT, 2 * EXACT + 13, 40_001, None])
def test_groups_whose_sums_are_inexact_in_float32(size, kind, isa):
    """Sums of more than 8,192 products may be inexact in float32; they are rounded once per group."""
    weight, x, bias, _, with_bias = case(6, 19, 70_003, size, kind)
    assert_same_bits(w4a8_matmul(weight, x, bias), with_bias)


def test_block_sums_do_not_overlap_the_next_row(isa):
    """A row's codes end 8 bytes before an odd cache line, where two of its eight block sums would fit."""
    weight, x, _, plain, _ = case(6, 3, 64 * 1001 - 8, None, "zero points")
    assert_same_bits(w4a8_matmul(weight, x), plain)


@pytest.mark.parametrize("size", [EXACT - 1, EXACT, EXACT + 1, 9001, 12_345, 2 * EXACT, 2 * EXACT + 13, None])
def test_small_differences_of_large_sums(size, isa):
    """Codes near the zero point 15: the result is a small difference of sums of 15 * 127."""
    rng = np.random.default_rng(11)
    k = 40_001
    codes = np.where(rng.random((17, k)) < 0.001, 14, 15).astype(np.int8)
    groups = -(-k // (size or k))
    arrays = codes, np.ones((17, groups), F32), np.full((17, groups), 15, np.uint8), size
    x = rng.integers(121, 128, (5, k)).astype(F32)
    x[:, 0] = 127
    x[1] *= -1
    assert_same_bits(w4a8_matmul(packed(*arrays), x), expected(*arrays, x))


LARGEST = {"15 - 0": (15, 0), "0 - 15": (0, 15), "7": (7, None), "-8": (-8, None)}


@pytest.mark.parametrize(("code", "zero_point"), LARGEST.values(), ids=LARGEST.keys())
@pytest.mark.parametrize(
    ("k", "size"),
    [
        *((2 * EXACT + 9, size) for size in (24, 32, 64, EXACT - 1, EXACT, EXACT + 1, 2 * EXACT + 8)),
        *((200_000, size) for size in (128, EXACT + 1, 66_000, None)),
    ],
)
def test_the_largest_sums(k, size, code, zero_point, isa):
    """All activations 127 in magnitude: 15 * 127 * 200,000 needs 29 bits, a segment of acc16 15 bits."""
    x = np.full((5, k), 127, F32)
    x[1] = -127
    x[2, ::2] = -127
    lengths = [size] * (k // size) + [k % size] * (k % size > 0) if size else [k]
    n, groups = 9, len(lengths)
    codes, scales = np.full((n, k), code, np.int8), np.full((n, groups), 0.5, F32)
    zero_points = None if zero_point is None else np.full((n, groups), zero_point, np.uint8)
    y = w4a8_matmul(packed(codes, scales, zero_points, size), x)
    value, total, alternating = code - (zero_point or 0), F32(0), F32(0)
    for i, length in enumerate(lengths):
        total += F32(value * 127 * length) * F32(0.5)
        # In a group of odd length one activation is left over.
        first = 1 if sum(lengths[:i]) % 2 else -1
        alternating += F32(value * 127 * (length % 2) * first) * F32(0.5)
    for r, wanted in enumerate((total, -total, alternating, total, total)):
        assert y[r].tolist() == [wanted] * n


def test_groups_are_added_up_in_order():
    """Floats near 127 * 2**24 are 128 apart: adding 63.5 twice changes nothing, adding 127 does."""
    codes, scales = np.ones((1, 3), np.int8), np.array([[2.0**24, 0.5, 0.5]], F32)
    assert w4a8_matmul(packed(codes, scales, None, 1), [[127.0, 127, 127]]).tolist() == [[2.0**24 * 127]]
    backward = packed(codes, np.ascontiguousarray(scales[:, ::-1]), None, 1)
    assert w4a8_matmul(backward, [[127.0, 127, 127]]).tolist() == [[2.0**24 * 127 + 128]]


@pytest.mark.parametrize("m", [64, 65, 80, 129, 200])
@pytest.mark.parametrize(("n", "k", "size"), [(512, 64, 32), (1101, 40, 8), (300, 2112, 64), (520, 9, None)])
def test_blocks_of_rows_and_outputs(m, n, k, size, isa):
    """More than 64 rows are processed in blocks, and outputs 256 or 512 at a time."""
    weight, x, bias, plain, with_bias = case(m, n, k, size, "zero points")
    memory = np.full((m + 1, n), 7, F32)
    for num_threads in (1, 3):
        w4a8_matmul(weight, x, bias, out=memory[:m], num_threads=num_threads)
        assert_same_bits(memory[:m], with_bias)
        assert (memory[m] == 7).all()
    assert_same_bits(w4a8_matmul(weight, x), plain)


@pytest.mark.whitebox
def test_more_rows_than_a_chunk(isa):
    """Chunks are of 32 rows where these take 1 MiB of activations or more."""
    k = 60_000
    for size in (128, None):
        row_bytes = _core.PackedLinear(9, k, size or k, None, None, False, 0).activation_bytes()
        assert 32 * row_bytes > _packed.CHUNK_BYTES
        weight, x, bias, _, with_bias = case(70, 9, k, size, "zero points")
        assert_same_bits(w4a8_matmul(weight, x, bias), with_bias)
        out = np.full(with_bias.shape, np.nan, F32)
        assert w4a8_matmul(weight, x, bias, out=out) is out
        assert_same_bits(out, with_bias)


@each_kind
def test_matvec_equals_row(kind, isa):
    for k, size in [(1, None), (63, 8), (300, 32), (300, None), (20_001, 3)]:
        weight, x, _, plain, _ = case(5, 40, k, size, kind)
        for token, row in zip(x, plain, strict=True):
            assert_same_bits(w4a8_matvec(weight, token), row)
            out = np.full(40, np.nan, F32)
            assert w4a8_matvec(weight, token, out=out) is out
            assert_same_bits(out, row)


@given(data=st.data())
def test_rows_and_outputs_are_independent(data):
    m, n, k = (data.draw(st.integers(1, limit)) for limit in (14, 40, 90))
    size, kind = data.draw(st.none() | st.integers(1, k + 1)), data.draw(st.sampled_from(KINDS))
    codes, scales, offsets, _ = weights(n, k, size, kind, seed=data.draw(st.integers(0, 2**20)))
    x, bias = activations(m, k), np.arange(n, dtype=F32)
    y = w4a8_matmul(packed(codes, scales, offsets, size), x, bias)
    assert_same_bits(y, expected(codes, scales, offsets, size, x, bias))
    rows = data.draw(st.permutations(range(m)))
    assert_same_bits(w4a8_matmul(packed(codes, scales, offsets, size), x[rows], bias), y[rows])
    of = data.draw(st.permutations(range(n)))
    permuted = packed(codes[of], scales[of], None if offsets is None else offsets[of], size)
    assert_same_bits(w4a8_matmul(permuted, x, bias[of]), np.ascontiguousarray(y[:, of]))


@pytest.mark.parametrize("num_threads", [2, 3, 100])
def test_threads_change_nothing(num_threads, isa):
    weight, x, bias, _, with_bias = case(10, 133, 200, 48, "zero points")
    assert_same_bits(w4a8_matmul(weight, x, bias, num_threads=num_threads), with_bias)
    out = np.full((10, 133), np.nan, F32)
    w4a8_matmul(weight, x, bias, out=out, num_threads=num_threads)
    assert_same_bits(out, with_bias)


@pytest.mark.parametrize("dtype", ["f2", "f8", ">f4", "bfloat16"])
def test_other_float_types(dtype, isa):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    arrays = weights(20, 5000, 96, "zero points")
    x = activations(5, 5000).astype(dtype)
    assert_same_bits(w4a8_matmul(packed(*arrays), x), expected(*arrays, x.astype(F32)))
    assert_same_bits(w4a8_matvec(packed(*arrays), x[0]), expected(*arrays, x[:1].astype(F32))[0])


@pytest.mark.parametrize("size", [None, 7])
def test_layouts(size):
    """Fields of a tensor, and activations, that are strided, misaligned, read-only or in Fortran order."""
    weight, x, bias, _, y = case(5, 20, 50, size, "zero points")
    data, scales, zero_points, shape, fmt = (
        getattr(weight, name) for name in ("data", "scales", "zero_points", "shape", "format")
    )
    frozen = scales.copy()
    frozen.flags.writeable = False
    for fields in (
        [np.repeat(v, 2, axis=0)[::2] for v in (data, scales, zero_points)],
        [np.repeat(v, 2, axis=-1)[..., ::2] for v in (data, scales, zero_points)],
        [np.asfortranarray(v) for v in (data, scales, zero_points)],
        [array_at(1, data), array_at(2, scales), array_at(3, zero_points)],
        [data, frozen, zero_points],
    ):
        other = DynQuantTensor(*fields, shape, fmt)
        assert_same_bits(w4a8_matmul(other, np.asfortranarray(x), np.repeat(bias, 2)[::2]), y)
        assert_same_bits(w4a8_matvec(other, np.repeat(x[0], 3)[::3]), w4a8_matvec(weight, x[0]))


def test_padding_nibble_of_an_odd_row_is_ignored():
    codes, scales, zero_points, _ = weights(4, 9, 3, "zero points")
    weight = packed(codes, scales, zero_points, 3)
    x = activations(3, 9)
    y = w4a8_matmul(weight, x)
    weight.data[:, -1] |= 0xF0
    assert_same_bits(w4a8_matmul(weight, x), y)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (3, 0, 4), (0, 0, 4), (2, 3, 0), (0, 3, 0)])
@pytest.mark.parametrize("size", [None, 3])
def test_empty(size, m, n, k):
    groups = () if size is None else (-(-k // size),)
    fmt = DynQuantFormat(4, "per_row" if size is None else "per_group", size, True)
    data, scales = np.zeros((n, (k + 1) // 2), np.uint8), np.ones((n, *groups), F32)
    weight = DynQuantTensor(data, scales, np.ones(scales.shape, np.uint8), (n, k), fmt)
    x, bias = np.ones((m, k), F32), -np.arange(n, dtype=F32)
    wanted = np.broadcast_to(0 + bias - k, (m, n)).astype(F32)
    assert_same_bits(w4a8_matmul(weight, x, bias), wanted)
    out = np.full((m, n), np.nan, F32)
    assert w4a8_matmul(weight, x, bias, out=out) is out
    assert_same_bits(out, wanted)
    if k:
        assert w4a8_matvec(weight, np.ones(k, F32)).tolist() == [-k] * n


@pytest.mark.parametrize("size", [8, EXACT + 5])
def test_minimums_of_constant_groups(size, isa):
    """Where the scale is 0 all weights of a group are its minimum, as GGUF has it for constant blocks."""
    k = 2 * size
    codes, _, _, _ = weights(5, k, size, "minimums")
    minimums = np.array([[0.5, -3]] * 5, F32)
    x = np.full((6, k), 127, F32)
    x[:, 1] = 3
    y = w4a8_matmul(packed(codes, np.zeros((5, 2), F32), minimums, size), x)
    assert (y == F32(0.5) * F32(127 * (size - 1) + 3) + F32(-3) * F32(127 * size)).all()


def test_minimums_are_held_against_out():
    weight = packed(*weights(4, 4, 2, "minimums"))
    with pytest.raises(LayoutError, match="overlap"):
        w4a8_matmul(weight, np.ones((2, 4), F32), out=weight.minimums.reshape(2, 4))
    with pytest.raises(LayoutError, match="overlap"):
        w4a8_matvec(weight, np.ones(4, F32), out=weight.minimums.reshape(-1)[:4])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_minimums_are_finite(value):
    weight = packed(*weights(4, 4, 2, "minimums"))
    weight.minimums[1, 1] = value
    with pytest.raises(NonFiniteError, match=r"weight\.minimums"):
        w4a8_matmul(weight, np.ones((2, 4), F32))


def test_scale_zero_and_zeros():
    """A row of zeros gives the bias, and groups with scale 0 add nothing."""
    codes, scales, zero_points, _ = weights(9, 40, 8, "zero points")
    scales[:, 2] = 0
    x = activations(5, 40)
    bias = np.linspace(-1, 1, 9, dtype=F32)
    y = w4a8_matmul(packed(codes, scales, zero_points, 8), x, bias)
    assert_same_bits(y[2], bias)
    without = x.copy()
    without[:, 16:24] = np.abs(x).max(axis=1, keepdims=True) / 2
    assert_same_bits(w4a8_matmul(packed(codes, scales, zero_points, 8), without, bias), y)


def test_close_to_the_float_product():
    """On real weights and activations, up to the error of 4-bit weights."""
    w, _, x = real_layer("up")
    for options, expected_db in (
        ({"group_size": 32}, 18),
        ({"group_size": 128}, 16),
        ({"symmetric": True}, 12),
    ):
        y = w4a8_matmul(quantize_weights(w, bits=4, **options), x)
        assert error_metrics(x @ w.T, y).sqnr_db > expected_db


# Errors


@pytest.mark.parametrize("rows", [1, 3, 60])
def test_out_is_unchanged_after_an_error_in_the_last_row(rows):
    """With 60 rows the error is after the first chunk."""
    k = 60_000
    x = np.ones((rows, k), F32)
    x[-1, -1] = np.nan
    out = np.full((rows, 2), 7, F32)
    weight = quantize_weights(np.ones((2, k), F32), bits=4, group_size=32)
    for num_threads in (1, 2):
        with pytest.raises(NonFiniteError) as caught:
            w4a8_matmul(weight, x, out=out, num_threads=num_threads)
        assert caught.value.index == rows * k - 1
    assert (out == 7).all()


def test_out_may_not_overlap():
    memory = np.zeros(20, F32)
    weight = quantize_weights(np.eye(4, dtype=F32), bits=4, group_size=2)
    with pytest.raises(LayoutError, match="overlap"):
        w4a8_matmul(weight, memory[:8].reshape(2, 4), out=memory[4:12].reshape(2, 4))
    with pytest.raises(LayoutError, match="overlap"):
        w4a8_matvec(weight, memory[:4], out=memory[2:6])
    with pytest.raises(LayoutError, match="overlap"):
        w4a8_matmul(weight, np.ones((2, 4), F32), memory[:4], out=memory[2:10].reshape(2, 4))
    assert not memory.any()
    scales = weight.scales.copy()
    with pytest.raises(LayoutError, match="overlap"):
        w4a8_matmul(weight, np.ones((2, 4), F32), out=weight.scales.reshape(2, 4))
    with pytest.raises(LayoutError, match="overlap"):
        w4a8_matvec(weight, np.ones(4, F32), out=weight.scales.reshape(-1)[:4])
    assert_same_bits(weight.scales, scales)
