"""Scales, codes and packing of every quantizing function, against the oracle and as properties."""

import itertools

import numpy as np
import pytest
from helpers import reference
from helpers.common import (
    F32,
    FORMATS,
    array_at,
    assert_same_bits,
    assert_tensor_holds,
    distributions,
    mode_of,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dynquant import (
    DynQuantFormat,
    LayoutError,
    NonFiniteError,
    dynamic_quantize,
    dynamic_quantize_int4,
    dynamic_quantize_int8,
    dynamic_quantize_int8_per_row,
    quantization_mae,
    quantize,
    quantize_weights,
)

# Floats that the kernels take at a time: a block, and a segment of 256 KiB.
BLOCK, SEGMENT = 4096, 1 << 16


def expected(x, fmt, p=None):
    """(data, scales, values) by the oracle."""
    per_row = fmt.granularity == "per_row"
    codes, scales = reference.quantize(x, fmt.clip, p, per_row)
    data = reference.pack(codes, per_row) if fmt.packed else codes
    return data, scales, reference.dequantize(codes, scales, per_row)


def check(x, fmt, p=None, message="", **options):
    q = dynamic_quantize(x, fmt, mode_of(p), **options)
    assert q.shape == np.shape(x), message
    assert q.format == fmt, message
    assert_tensor_holds(q, *expected(x, fmt, p), message)
    return q


each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())

# Against the oracle


@each_format
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 63), (2, 3, 65), (2, 1, 2, 129), (5, 1), (40, 7)])
def test_shapes(shape, fmt, isa):
    rng = np.random.default_rng(0)
    for name, x in distributions(int(np.prod(shape)), rng).items():
        for p in (None, 0.9):
            check(x.reshape(shape), fmt, p, f"{name} {p}")


@each_format
@pytest.mark.parametrize("n", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 33])
def test_lengths_around_one_block(n, fmt, isa):
    x = np.random.default_rng(n).standard_normal((2, n)).astype(F32)
    for p in (None, 0.97):
        check(x, fmt, p)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("n", [SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + BLOCK + 5])
def test_lengths_around_one_segment(n, dtype, isa):
    """The segments of a row are coded from the last to the first; each must land at its offset."""
    x = np.random.default_rng(n).standard_normal(n).astype(dtype)
    for name in ("int8 per tensor", "packed per tensor"):
        check(x, FORMATS[name], None, name)


@pytest.fixture(scope="module", params=[(1, 9_000_001), (2, 2**23 + 77)], ids=str)
def large(request):
    """(x, codes, scales), with rows of at least 2**23 elements."""
    x = np.random.default_rng(0).standard_normal(request.param, F32)
    scales = np.abs(x).max(axis=1) / F32(127)
    return x, reference.codes(x, scales[:, None], 127), scales


@pytest.mark.slow
def test_nontemporal_stores(large, isa):
    """Codes of a large row are written with nontemporal stores; `out` begins and ends inside a cache line."""
    x, codes, scales = large
    memory = np.full(x.size + 128, 99, np.int8)
    out = memory[37 : 37 + x.size].reshape(x.shape)
    q = dynamic_quantize(x, out=out)
    assert_same_bits(q.scales, scales)
    assert_same_bits(out, codes)
    assert (memory[:37] == 99).all()
    assert (memory[37 + x.size :] == 99).all()


@pytest.mark.parametrize("values", [[], [0.0] * 9, [-0.0], [1.0], [-1.0, 0.5]], ids=str)
@each_format
def test_scale_zero(values, fmt, isa):
    """Empty, all zero, and magnitudes whose quotient underflows: scale +0.0 and zero codes."""
    # A little under half of the smallest float times clip.
    largest = fmt.clip // 2 * 2.0**-149
    q = check((np.array(values) * largest).astype(F32).reshape(1, -1), fmt)
    assert q.scales.tobytes() == bytes(4)
    assert not q.data.any()


@each_format
def test_percentile_scale_of_zero_zeroes_large_values_too(fmt):
    q = check(np.array([[0, 0, 0, 0, 5, -7]], F32), fmt, 0.5)
    assert not q.scales.any()
    assert not q.data.any()


def test_zero_rows(isa):
    x = np.random.default_rng(6).standard_normal((9, 100)).astype(F32)
    x[[0, 4, 8]] = 0
    for name in ("int8 per row", "packed per row"):
        check(x, FORMATS[name])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3), (3, 2, 0)])
@each_format
def test_empty(shape, fmt):
    q = check(np.empty(shape, F32), fmt, num_threads=3)
    check(np.empty(shape, F32), fmt, 0.5)
    assert q.dequantize().shape == shape
    assert quantization_mae(np.empty(shape, F32), q) == 0.0


def test_an_empty_vector():
    for name in ("int8 per tensor", "int4 per tensor", "packed per tensor"):
        assert check(np.empty(0, F32), FORMATS[name]).scales.tolist() == [0.0]


@pytest.mark.parametrize("x", [2.5, 3, np.float32(-1), np.float16(0.1), np.array(4.0)], ids=repr)
def test_a_single_number(x):
    for name in ("int8 per tensor", "int4 per tensor"):
        q = check(x, FORMATS[name])
        assert q.shape == q.data.shape == q.dequantize().shape == ()
    assert dynamic_quantize_int4(x, packed=True).data.shape == (1,)


@pytest.mark.parametrize("p", [None, 0.8])
def test_named_functions_equal_dynamic_quantize(p):
    x = np.random.default_rng(7).standard_normal((4, 33)).astype(F32)
    mode = mode_of(p)
    for q, name in [
        (dynamic_quantize_int8(x, mode), "int8 per tensor"),
        (dynamic_quantize_int8_per_row(x, mode), "int8 per row"),
        (dynamic_quantize_int4(x, mode), "int4 per tensor"),
        (dynamic_quantize_int4(x, mode, packed=True), "packed per tensor"),
        (dynamic_quantize(x, mode=mode), "int8 per row"),
        (dynamic_quantize(x, DynQuantFormat.INT4_PER_ROW, mode, packed=True), "packed per row"),
        (dynamic_quantize(x, FORMATS["packed per row"], mode, packed=False), "packed per row"),
    ]:
        data, scales, _ = expected(x, FORMATS[name], p)
        assert q.format == FORMATS[name]
        assert_same_bits(q.data, data, name)
        assert_same_bits(q.scales, scales, name)


def test_every_pair_of_packed_codes(isa):
    codes = np.array(list(itertools.product(range(-7, 8), repeat=2)), np.int8)
    x = codes.astype(F32)
    x = np.concatenate([x.ravel(), [F32(7)]])
    q = dynamic_quantize_int4(x, packed=True)
    low, high = codes[:, 0].astype(int) % 16, codes[:, 1].astype(int) % 16
    assert q.data.tolist() == [*(low + 16 * high).tolist(), 7]
    assert_same_bits(q.dequantize(), x)


# Properties

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
p_or_none = st.none() | st.floats(0.001, 1)
matrices = arrays(F32, array_shapes(min_dims=2, max_dims=3, min_side=0, max_side=40), elements=finite)


@given(x=matrices, p=p_or_none, name=st.sampled_from(sorted(FORMATS)))
def test_any_matrix_equals_oracle(x, p, name):
    before = x.tobytes()
    check(x, FORMATS[name], p)
    assert x.tobytes() == before


@given(
    x=arrays(F32, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70), elements=finite),
    p=p_or_none,
    name=st.sampled_from([name for name in FORMATS if "row" in name]),
    threads=st.integers(1, 5),
    offset=st.integers(0, 15),
    data=st.data(),
)
def test_a_row_depends_on_nothing_else(x, p, name, threads, offset, data):
    """Not on the other rows, its index, the number of threads, alignment or stride."""
    order = data.draw(st.permutations(range(len(x))))
    fmt, mode = FORMATS[name], mode_of(p)
    whole = dynamic_quantize(array_at(4 * offset, x[order]), fmt, mode, num_threads=threads)
    wide = np.zeros((2 * len(x), 3 * x.shape[1]), F32)
    wide[::2, 1::3] = x
    strided = dynamic_quantize(wide[::2, 1::3], fmt, mode)
    for position, row in enumerate(order):
        alone = dynamic_quantize(x[row : row + 1], fmt, mode)
        for batch, index in ((whole, position), (strided, row)):
            assert_same_bits(batch.data[index : index + 1], alone.data)
            assert_same_bits(batch.scales[index : index + 1], alone.scales)


@given(x=matrices, name=st.sampled_from(sorted(FORMATS)))
def test_round_trip_error_at_most_half_a_scale(x, name):
    """Within half a scale, up to the roundings of scale, quotient and product, each 2**-24 of the value."""
    fmt = FORMATS[name]
    q = dynamic_quantize(x, fmt)
    values = q.dequantize().astype(np.float64)
    amax = np.abs(x).max(initial=0)
    if not np.isfinite(values).all():  # 127 * scale may round past the largest float
        assert amax > np.finfo(F32).max * (1 - 2**-22)
        return
    scales = (q.scales[..., None] if fmt.granularity == "per_row" else q.scales).astype(np.float64)
    slack = np.abs(x) * 2.0**-21 + (fmt.clip + 1) * 2.0**-149
    assert (np.abs(x - values) <= scales / 2 + slack).all()


@given(x=matrices, p=p_or_none, name=st.sampled_from(sorted(FORMATS)), threads=st.integers(1, 3))
def test_out_equals_returned(x, p, name, threads):
    fmt, mode = FORMATS[name], mode_of(p)
    allocated = dynamic_quantize(x, fmt, mode)
    out = np.full_like(allocated.data, 77)
    given = dynamic_quantize(x, fmt, mode, out=out, num_threads=threads)
    assert given.data is out
    assert_same_bits(out, allocated.data)
    assert_same_bits(given.scales, allocated.scales)


@given(x=matrices)
def test_signs_and_powers_of_two(x):
    """Negation negates every code; doubling changes none while values stay finite and normal."""
    q = dynamic_quantize_int8(x)
    assert_same_bits(dynamic_quantize_int8(-x).data, -q.data)
    if 1e-37 < q.scales[0] < 1e36:
        assert_same_bits(dynamic_quantize_int8(x * 2).data, q.data)


# With scales that are given


@each_format
@pytest.mark.parametrize("shape", [(3, 65), (2, 3, 64), (0, 4), (3, 0)])
def test_its_own_scales_give_the_dynamic_codes(fmt, shape, isa):
    x = np.random.default_rng(0).standard_normal(shape).astype(F32)
    dynamic = dynamic_quantize(x, fmt)
    given = quantize(x, dynamic.scales, fmt, num_threads=2)
    assert_same_bits(given.data, dynamic.data)
    assert_same_bits(given.scales, dynamic.scales)
    assert given.format == fmt


@pytest.mark.parametrize("scale", [0.0, 1e-38, 0.01, 3.0, 1e38])
def test_one_number_for_all_scales(scale, isa):
    x = np.concatenate([np.random.default_rng(0).standard_normal(99).astype(F32) * 100, [3.4e38, -3.4e38]])
    x = x.astype(F32)[None]
    q = quantize(x, scale)
    with np.errstate(all="ignore"):
        v = np.where(scale > 0, x / F32(scale), 0)
    codes = np.clip(np.trunc(v + np.copysign(F32(0.49999997), v)), -127, 127)
    assert_same_bits(q.data, codes.astype(np.int8))
    assert q.scales.tolist() == [F32(scale)]


def test_zero_points_as_those_of_weights(isa):
    w = np.random.default_rng(0).standard_normal((5, 37)).astype(F32)
    weights = quantize_weights(w, bits=4, group_size=8)
    given = quantize(w, weights.scales, weights.format, zero_points=weights.zero_points)
    assert_same_bits(given.data, weights.data)
    assert_same_bits(given.dequantize(), weights.dequantize())
    one = quantize(w, 0.25, DynQuantFormat.INT4_PER_ROW_PACKED, zero_points=8)
    assert one.zero_points.tolist() == [8] * 5
    assert np.abs(one.dequantize() - w.clip(-2, 1.75)).max() <= 0.125


# Into a part of a larger array


@pytest.mark.parametrize("step", [1, 2])
def test_rows_of_one_code_may_lie_anywhere(step):
    x = np.linspace(-1, 1, 5, dtype=F32)[:, None]
    wide = np.full((5, 8 * step), 99, np.int8)
    dynamic_quantize(x, DynQuantFormat.INT8_PER_ROW, out=wide[:, ::step][:, 3:4])
    expected = np.full_like(wide, 99)
    expected[:, 3 * step] = [-127, -127, 0, 127, 127]
    assert_same_bits(wide, expected)
    with pytest.raises(LayoutError, match="out: expected an array contiguous along its last axis"):
        dynamic_quantize(np.ones((5, 2), F32), DynQuantFormat.INT8_PER_ROW, out=wide[:, :4:2])


@pytest.mark.parametrize("fmt", [DynQuantFormat.INT8_PER_ROW, DynQuantFormat.INT4_PER_ROW_PACKED])
def test_codes_and_scales_of_a_step_in_a_key_cache(fmt, isa):
    rng = np.random.default_rng(0)
    heads, length, k = 4, 6, 32
    codes = np.zeros((heads, length, fmt.data_shape((k,))[-1]), fmt.data_dtype)
    scales = np.zeros((heads, length), F32)
    keys = rng.standard_normal((length, heads, 1, k)).astype(F32)
    for step in range(length):
        new_scales = np.empty((heads, 1), F32)
        q = dynamic_quantize(keys[step], fmt, out=(codes[:, step : step + 1], new_scales), num_threads=2)
        scales[:, step : step + 1] = new_scales
        assert q.data.base is codes
        assert q.scales is new_scales
    whole = dynamic_quantize(keys[:, :, 0].transpose(1, 0, 2), fmt)
    assert_same_bits(codes, whole.data)
    assert_same_bits(scales, whole.scales)


@pytest.mark.parametrize(
    "call", [lambda x, out: dynamic_quantize(x, out=out), lambda x, out: quantize(x, 1.0, out=out)]
)
def test_rows_of_codes_lie_apart_in_memory(call):
    x = np.random.default_rng(0).standard_normal((3, 4, 16)).astype(F32)
    expected = call(x, None).data
    memory = np.zeros((2, 4, 6, 20), np.int8)
    parts = (memory[0, :3, 3::-1, 2:18], memory[1].transpose(1, 0, 2)[:3, :, :16], memory[0, 2::-1, :4, :16])
    for out in parts:
        assert call(x, out).data is out
        assert np.array_equal(out, expected)


def test_without_the_check_out_may_be_written_before_the_error():
    x = np.ones((3, 8), F32)
    out = np.full((3, 8), 77, np.int8)
    assert dynamic_quantize(x, out=out, check_finite=False).data is out
    assert (out == 127).all()
    x[2, 1] = np.nan
    out[:] = 77
    with pytest.raises(NonFiniteError) as caught:
        dynamic_quantize(x, out=out, check_finite=False)
    assert caught.value.position == (2, 1)
    assert (out[2] == 77).all()


@pytest.mark.parametrize("fmt", [DynQuantFormat.INT8_PER_TENSOR, DynQuantFormat.INT4_PER_TENSOR_PACKED])
@pytest.mark.parametrize("p", [None, 0.5, 0.999])
def test_one_scale_by_several_threads(fmt, p):
    x = np.random.default_rng(0).standard_normal(2_000_001).astype(F32)
    one, two = (dynamic_quantize(x, fmt, mode_of(p), num_threads=threads) for threads in (1, 2))
    assert_tensor_holds(two, one.data, one.scales, one.dequantize())
    assert_same_bits(two.dequantize(num_threads=2), one.dequantize())
