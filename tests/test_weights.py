"""quantize_weights against the oracle: codes, zero points, scales, and the search for a range."""

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, assert_same_bits, real_layer
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dynquant import (
    DynQuantFormat,
    ParameterError,
    ShapeMismatchError,
    dynamic_quantize,
    error_metrics,
    quantize_weights,
    w4a8_matmul,
)

LARGEST = float(np.finfo(F32).max)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


def check(w, message="", num_threads=1, **options):
    """`options` as of `quantize_weights`, bits=4 unless given."""
    options = {"bits": 4, **options}
    q = quantize_weights(w, num_threads=num_threads, **options)
    size, symmetric = options.get("group_size"), options.get("symmetric")
    symmetric = options["bits"] == 8 if symmetric is None else symmetric
    codes, scales, zero_points = reference.quantize_weights(
        w, options["bits"], size, symmetric, options.get("search", False)
    )
    assert q.shape == np.shape(w), message
    packed = options["bits"] == 4
    assert q.format == DynQuantFormat(
        options["bits"], "per_row" if size is None else "per_group", size, packed
    )
    field = q.format.scales_shape(q.shape)
    assert_same_bits(q.scales, scales.reshape(field), message)
    if symmetric:
        assert q.zero_points is None
    else:
        assert_same_bits(q.zero_points, zero_points.reshape(field), message)
    assert_same_bits(q.data, reference.pack(codes, per_row=True) if packed else codes, message)
    values = reference.dequantize_groups(codes, scales, size or w.shape[1], zero_points)
    assert_same_bits(q.dequantize(), values, message)
    return q


# Ranges


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 1, 3, 16, 32, 33, 200])
@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (3, 67), (2, 129)])
def test_shapes(shape, group_size, symmetric, isa):
    check(normal(*shape, seed=group_size or 0), group_size=group_size, symmetric=symmetric)


@pytest.mark.parametrize("group_size", [None, 4095, 5000])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_several_blocks(symmetric, group_size, isa):
    w = normal(2, 12_345) + F32(0.5)
    w[0, 4096] = 9
    w[1, -1] = -9
    check(w, group_size=group_size, symmetric=symmetric)


@pytest.mark.parametrize("group_size", [None, 5, 32])
def test_symmetric_equals_dynamic_quantize(group_size):
    w = normal(7, 65)
    fmt = DynQuantFormat(4, "per_row" if group_size is None else "per_group", group_size, True)
    for q, plain in [
        (quantize_weights(w, bits=4, group_size=group_size, symmetric=True), dynamic_quantize(w, fmt)),
        (quantize_weights(w), dynamic_quantize(w)),
        (quantize_weights(w, symmetric=True), dynamic_quantize(w)),
    ]:
        assert q.format == plain.format
        assert_same_bits(q.data, plain.data)
        assert_same_bits(q.scales, plain.scales)
        assert q.zero_points is None


TINY = 2.0**-149
RANGES = {
    "zeros": [0.0, 0.0, 0.0],
    "zeros of both signs": [0.0, -0.0, 0.0],
    "above zero": [1.0, 2.0, 30.0],
    "below zero": [-1.0, -2.0, -30.0],
    "one above": [5.0],
    "one below": [-5.0],
    # 7.5 scales below zero: the half rounds away from zero.
    "half a step": [-7.5, 7.5, 0.5, -0.5, 1.5],
    "nearly all below": [-29.9, 0.1],
    "scale underflows": [7 * TINY, -0.4 * TINY],
    "scale underflows, both signs": [3 * TINY, -4 * TINY],
    # 8/15 of the smallest float rounds to that float, and the range is 8 of it.
    "scale rounded up": [-8 * TINY],
    # 22/15 rounds down: the range of 22 exceeds 15 codes.
    "scale rounded down": [22 * TINY, 3 * TINY],
    "scale rounded down, below": [-22 * TINY, -3 * TINY],
    "scale rounded down, both": [-11 * TINY, 11 * TINY, 4 * TINY],
    "subnormal": [1e-40, -3e-41, 2e-42],
    "largest": [LARGEST, 0.0, LARGEST / 3],
    "largest below": [-LARGEST, -1.0],
    "widest": [LARGEST / 2, -LARGEST / 2],
}


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("values", RANGES.values(), ids=RANGES.keys())
def test_ranges(values, symmetric, search, isa):
    """Each alone, and as a group between others."""
    w = np.array([values], F32)
    q = check(w, symmetric=symmetric, search=search)
    assert np.isfinite(q.scales).all()
    ones = np.ones_like(w)
    check(
        np.concatenate([ones, w, -ones], axis=1),
        group_size=w.shape[1],
        symmetric=symmetric,
        search=search,
    )


def test_zero_points_of_one_sided_ranges():
    q = quantize_weights([[1.0, 15.0], [-15.0, -1.0], [0.0, 0.0]], bits=4)
    assert q.zero_points.tolist() == [0, 15, 0]
    assert q.scales.tolist() == [1.0, 1.0, 0.0]
    assert q.data.tolist() == [[0xF1], [0xE0], [0]]


@given(
    w=arrays(F32, (2, 21), elements=st.floats(-(2.0**126), 2.0**126, width=32)),
    group_size=st.none() | st.integers(1, 22),
    symmetric=st.booleans(),
    threads=st.integers(1, 3),
)
def test_any_matrix(w, group_size, symmetric, threads):
    before = w.tobytes()
    q = check(w, group_size=group_size, symmetric=symmetric, num_threads=threads)
    assert w.tobytes() == before
    # Zero is always a code; others err by half a scale at most, up to the roundings of scale and quotient.
    values = q.dequantize().astype(np.float64)
    assert (values[w == 0] == 0).all()
    scales = np.repeat(q.scales.reshape(2, -1), group_size or 21, axis=1)[:, :21].astype(np.float64)
    # A zero point is rounded too, so an end of an asymmetric range may err by another half scale.
    steps = 0.5 if symmetric else 1.0
    assert (np.abs(w - values) <= scales * steps * (1 + 2**-20) + np.abs(w) * 2.0**-20 + 16 * TINY).all()


@pytest.mark.parametrize("bad", [[LARGEST, -LARGEST], [LARGEST, -LARGEST / 64]])
@pytest.mark.parametrize("search", [False, True])
def test_range_that_overflows_float32(search, bad):
    w = np.zeros((3, 8), F32)
    w[2, 6:] = bad
    with pytest.raises(ParameterError, match="w: expected the range of each group within float32"):
        quantize_weights(w, bits=4, group_size=4, search=search)
    # No overflow with the two ends in different groups, or symmetric.
    assert np.isfinite(quantize_weights(w, bits=4, group_size=1, search=search).scales).all()
    assert np.isfinite(quantize_weights(w, bits=4, symmetric=True, search=search).scales).all()


# Inputs


@pytest.mark.parametrize("dtype", ["f2", "f8", "bfloat16"])
@pytest.mark.parametrize("search", [False, True])
def test_other_floats(search, dtype):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    w = normal(3, 4500).astype(dtype)
    for options in ({}, {"group_size": 1000}, {"symmetric": True}):
        q = quantize_weights(w, bits=4, search=search, **options)
        wide = quantize_weights(w.astype(F32), bits=4, search=search, **options)
        assert_same_bits(q.data, wide.data)
        assert_same_bits(q.scales, wide.scales)


def test_layouts_and_lists():
    w = normal(6, 20)
    q = quantize_weights(w, bits=4, group_size=8)
    for other in (np.asfortranarray(w), np.repeat(w, 2, axis=1)[:, ::2], w.tolist(), w[::-1][::-1]):
        twin = quantize_weights(other, bits=4, group_size=8)
        assert_same_bits(twin.data, q.data)
        assert_same_bits(twin.zero_points, q.zero_points)


@pytest.mark.parametrize("num_threads", [2, 5, 100])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_threads_change_nothing(symmetric, search, num_threads):
    w, options = normal(9, 70), {"group_size": 33, "symmetric": symmetric, "search": search}
    check(w, num_threads=num_threads, **options)


@pytest.mark.parametrize("group_size", [2**63 - 1, 10**30])
def test_group_longer_than_the_row_is_the_row(group_size):
    w = normal(5, 37)
    q, rows = quantize_weights(w, bits=4, group_size=group_size), quantize_weights(w, bits=4)
    assert_same_bits(q.data, rows.data)
    assert_same_bits(q.scales[:, 0], rows.scales)
    assert_same_bits(w4a8_matmul(q, w), w4a8_matmul(rows, w))


# The search


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"bits": 8}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e15])
def test_search_finds_the_smallest_error(scale, options, isa):
    """Heavy tails, so that the best share differs between groups."""
    rng = np.random.default_rng(8)
    w = (rng.standard_t(3, (4, 129)) * scale).astype(F32)
    check(w, search=True, **options)
    if "bits" not in options:
        check(w, search=True, group_size=32, **options)


def test_search_over_several_blocks(isa):
    check(np.random.default_rng(9).standard_t(4, (1, 9001)).astype(F32), search=True)


def test_shares_that_the_search_takes():
    """The more values beside an outlier, the more of the range is cut."""
    shares = set()
    for n in (2, 16, 64, 300, 5000):
        w = normal(1, n, seed=n) * F32(0.1)
        w[0, 0] = 1
        whole = quantize_weights(w, bits=4, symmetric=True)
        best = check(w, search=True, symmetric=True)
        shares.add(round(float(best.scales[0] / whole.scales[0] * 32)))
    assert len(shares) > 2
    assert min(shares) >= 10
    # An exact range cannot be improved, and the largest of equal shares is taken.
    assert_same_bits(
        quantize_weights([[7.0, -7, 3, 0]], bits=4, symmetric=True, search=True).scales, np.ones(1, F32)
    )
    # A smaller share would be taken if there were one.
    w = normal(1, 20_000) * F32(0.07)
    w[0, 0] = 1
    last = quantize_weights(w, bits=4, symmetric=True, search=True)
    assert last.scales[0] == F32(10 / 32) / F32(7)


def squared_errors(w, q, group_size):
    d = (w.astype(np.float64) - q.dequantize()) ** 2
    return np.stack([group.sum(axis=1) for group in reference.groups(d, group_size)])


@given(
    w=arrays(F32, (2, 24), elements=st.floats(-(2.0**60), 2.0**60, width=32)),
    group_size=st.integers(1, 24),
    symmetric=st.booleans(),
)
def test_search_never_increases_the_error(w, group_size, symmetric):
    options = {"bits": 4, "group_size": group_size, "symmetric": symmetric}
    plain, best = (
        squared_errors(w, quantize_weights(w, search=search, **options), group_size)
        for search in (False, True)
    )
    # These sums add in another order.
    assert (best <= plain * (1 + 1e-12)).all()


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_real_weights(symmetric, group_size):
    w, _, _ = real_layer("up")
    options = {"bits": 4, "symmetric": symmetric, "group_size": group_size}
    plain, best = (
        error_metrics(w, quantize_weights(w, search=search, **options)).sqnr_db for search in (False, True)
    )
    assert best > plain + 0.2
    assert 12 < plain < 30


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (16, 64), (17, 65), (100, 300)])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_in_the_order_of_columns(shape, bits):
    w = np.random.default_rng(0).standard_normal(shape).astype(F32)
    expected = quantize_weights(w, bits=bits)
    for same in (np.asfortranarray(w), np.ascontiguousarray(w.T).T, np.asfortranarray(w.astype(np.float64))):
        q = quantize_weights(same, bits=bits)
        assert_same_bits(q.data, expected.data)
        assert_same_bits(q.scales, expected.scales)


def test_weights_of_a_convolution_have_a_scale_for_each_output_channel():
    w = np.random.default_rng(0).standard_normal((6, 3, 2, 2)).astype(F32)
    with pytest.raises(ShapeMismatchError, match=r"w\.reshape\(len\(w\), -1\)"):
        quantize_weights(w)
    q = quantize_weights(w.reshape(len(w), -1))
    assert_same_bits(q.scales, np.abs(w).max(axis=(1, 2, 3)) / F32(127))


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (64, 1), (64, 3), (63, 5), (65, 15), (64, 16), (130, 18), (200, 33), (31, 300), (300, 64)],
)
def test_tiles_of_weights_in_the_order_of_columns(shape):
    """Whole tiles of 16 by 64 are transposed four by four, others one by one."""
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = quantize_weights(w, bits=4)
    for dtype in (np.float32, np.float64):
        actual = quantize_weights(np.asfortranarray(w.astype(dtype)), bits=4)
        for field in ("data", "scales", "zero_points"):
            assert getattr(actual, field).tobytes() == getattr(expected, field).tobytes()
