"""Formats per group: scales, codes, values and errors, against the oracle and as properties."""

import copy
import pickle

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, array_at, assert_same_bits, assert_tensor_holds, distributions, mode_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dynquant import (
    DTypeError,
    DynQuantFormat,
    DynQuantTensor,
    NonFiniteError,
    ParameterError,
    Percentile,
    ShapeMismatchError,
    dynamic_quantize,
    error_metrics,
    quantization_mae,
)

# Floats that the kernels take at a time: a block, and a segment of 256 KiB. The length from which codes are
# written with nontemporal stores.
BLOCK, SEGMENT, NONTEMPORAL = 4096, 1 << 16, 1 << 23
KINDS = {"int8": (8, False), "int4": (4, False), "packed": (4, True)}

each_kind = pytest.mark.parametrize("kind", KINDS)


def per_group(kind, size):
    bits, packed = KINDS[kind]
    return DynQuantFormat(bits, "per_group", size, packed)


def expected(x, fmt, p=None):
    """(data, scales, values) by the oracle."""
    codes, scales = reference.quantize_groups(x, fmt.clip, fmt.group_size, p)
    data = reference.pack(codes, per_row=True) if fmt.packed else codes
    return data, scales, reference.dequantize_groups(codes, scales, fmt.group_size)


def check(x, fmt, p=None, message="", **options):
    q = dynamic_quantize(x, fmt, mode_of(p), **options)
    assert q.shape == np.shape(x), message
    assert q.format == fmt, message
    assert_tensor_holds(q, *expected(x, fmt, p), message)
    return q


# Scales and codes


@each_kind
@pytest.mark.parametrize("size", [1, 3, 8, 31, 32, 33, 1000])
@pytest.mark.parametrize("shape", [(1,), (131,), (1, 1), (3, 64), (2, 3, 65), (5, 1)])
def test_shapes(shape, size, kind, isa):
    made = distributions(int(np.prod(shape)), np.random.default_rng(size))
    for name in ("normal", "mostly zero", "subnormal", "outliers"):
        check(made[name].reshape(shape), per_group(kind, size), None, name)
    check(made["every exponent"].reshape(shape), per_group(kind, size), 0.8)


@each_kind
@pytest.mark.parametrize("size", [100, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7, 100_000])
def test_groups_across_blocks(size, kind, isa):
    """With odd groups a packed byte, and a block, holds codes of two groups."""
    x = np.random.default_rng(size).standard_normal((2, 3 * BLOCK + 33)).astype(F32)
    x *= np.exp2(np.arange(x.shape[1], dtype=F32) // 1000)
    for p in (None, 0.97):
        check(x, per_group(kind, size), p)


@each_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_groups_across_segments(dtype, kind, isa):
    """The segments of a row are coded from the last to the first; each must find its own scales."""
    x = np.random.default_rng(0).standard_normal(2 * SEGMENT + BLOCK + 5).astype(dtype)
    check(x, per_group(kind, 100_003))


@pytest.fixture(scope="module")
def long_groups():
    """x with a group of 2**23 and one of 77, and the codes and scales of both."""
    x = np.random.default_rng(0).standard_normal(NONTEMPORAL + 77, F32)
    x[NONTEMPORAL:] *= 100
    scales = np.array([np.abs(x[:NONTEMPORAL]).max(), np.abs(x[NONTEMPORAL:]).max()]) / F32(127)
    codes = [
        reference.codes(x[:NONTEMPORAL], scales[0], 127),
        reference.codes(x[NONTEMPORAL:], scales[1], 127),
    ]
    return x, np.concatenate(codes), scales


@pytest.mark.slow
def test_nontemporal_stores(long_groups, isa):
    x, codes, scales = long_groups
    memory = np.full(x.size + 128, 99, np.int8)
    q = dynamic_quantize(x, DynQuantFormat.int8_per_group(NONTEMPORAL), out=memory[37 : 37 + x.size])
    assert_same_bits(q.scales, scales)
    assert_same_bits(q.data, codes)
    assert (memory[:37] == 99).all()
    assert (memory[37 + x.size :] == 99).all()


def test_groups_equal_rows_of_a_reshaped_array():
    """Without an oracle: groups that fill the rows are the rows of a reshaped array."""
    x = np.random.default_rng(1).standard_normal((4, 96)).astype(F32)
    for size in (1, 3, 16, 96):
        q = dynamic_quantize(x, DynQuantFormat.int8_per_group(size))
        rows = dynamic_quantize(x.reshape(-1, size))
        assert_same_bits(q.data, rows.data.reshape(x.shape))
        assert_same_bits(q.scales, rows.scales.reshape(4, -1))
    assert_same_bits(q.scales[:, 0], dynamic_quantize(x).scales)


@each_kind
@pytest.mark.parametrize("size", [37, 38, 2**31, 2**63 - 1, 2**63, 10**30, np.int64(1 << 40)])
def test_group_longer_than_the_row_is_the_row(size, kind):
    x = np.random.default_rng(2).standard_normal((5, 37)).astype(F32)
    q = dynamic_quantize(x, per_group(kind, size))
    rows = dynamic_quantize(x, DynQuantFormat(*KINDS[kind][:1], "per_row", packed=KINDS[kind][1]))
    assert q.format.group_size == size
    assert_same_bits(q.data, rows.data)
    assert_same_bits(q.scales, rows.scales[:, None])
    assert_same_bits(q.dequantize(), rows.dequantize())
    assert quantization_mae(x, q) == quantization_mae(x, rows)


def test_percentile_ranks_of_full_and_last_group(isa):
    """Nearest rank among 10 and among 3 elements."""
    x = np.concatenate([np.random.default_rng(i).permutation(np.arange(1, 11)) for i in range(2)])
    x = np.concatenate([x, [300, 100, 200]]).astype(F32)
    for p, whole, last in [(0.05, 1, 100), (0.3, 3, 100), (0.5, 5, 200), (0.67, 7, 300), (1.0, 10, 300)]:
        q = dynamic_quantize(x, DynQuantFormat.int4_per_group(10), Percentile(p))
        assert q.scales.tolist() == [F32(whole) / F32(7), F32(whole) / F32(7), F32(last) / F32(7)]
    # The same group, first in its row.
    alone = dynamic_quantize(x[20:], DynQuantFormat.int4_per_group(10), Percentile(0.5))
    assert alone.scales.tolist() == [F32(200) / F32(7)]


@each_kind
def test_zero_groups(kind, isa):
    x = np.random.default_rng(3).standard_normal((3, 50)).astype(F32)
    x[0, :7] = x[1, 7:14] = x[2, 49] = 0
    q = check(x, per_group(kind, 7))
    assert q.scales[0, 0] == q.scales[1, 1] == q.scales[2, 7] == 0


@each_kind
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 0), (2, 0, 3), (3, 2, 0)])
def test_empty(shape, kind):
    x = np.empty(shape, F32)
    q = check(x, per_group(kind, 2), num_threads=3)
    check(x, per_group(kind, 2), 0.5)
    assert q.scales.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    assert quantization_mae(x, q) == 0.0
    assert np.isnan(error_metrics(x, q).mae)
    assert q.compression_ratio == 0.0


@each_kind
@pytest.mark.parametrize("dtype", ["f2", "f8", ">f4", "bfloat16"])
@pytest.mark.parametrize("size", [3, 32, 5000])
def test_other_floats(size, dtype, kind, isa):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    x = np.random.default_rng(4).standard_normal((3, 4999)).astype(dtype)
    x[1] *= dtype.type(100)
    q, wide = (dynamic_quantize(y, per_group(kind, size)) for y in (x, x.astype(F32)))
    assert_same_bits(q.data, wide.data)
    assert_same_bits(q.scales, wide.scales)
    assert quantization_mae(x, q) == quantization_mae(x.astype(F32), q)


matrices = arrays(
    F32,
    array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=30),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
properties = given(
    x=matrices,
    p=st.none() | st.floats(0.001, 1),
    kind=st.sampled_from(sorted(KINDS)),
    size=st.integers(1, 33),
    threads=st.integers(1, 4),
    offset=st.integers(0, 15),
)


@properties
def test_any_array_equals_oracle(x, p, kind, size, threads, offset):
    """For any number of threads, alignment and stride; `out` equals what is returned."""
    fmt, mode = per_group(kind, size), mode_of(p)
    q = check(array_at(4 * offset, x), fmt, p, num_threads=threads)
    wide = np.zeros((*x.shape[:-1], 3 * x.shape[-1]), F32)
    wide[..., 1::3] = x
    before = wide.tobytes()
    out = np.full_like(q.data, 77)
    strided = dynamic_quantize(wide[..., 1::3], fmt, mode, out=out, num_threads=threads)
    assert strided.data is out
    assert_same_bits(out, q.data)
    assert_same_bits(strided.scales, q.scales)
    assert wide.tobytes() == before


@given(
    x=arrays(F32, (4, 40), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    size=st.integers(1, 41),
    data=st.data(),
)
def test_a_row_depends_on_nothing_else(x, size, data):
    order = data.draw(st.permutations(range(4)))
    whole = dynamic_quantize(x[order], per_group("packed", size))
    for position, row in enumerate(order):
        alone = dynamic_quantize(x[row], per_group("packed", size))
        assert_same_bits(whole.data[position], alone.data)
        assert_same_bits(whole.scales[position], alone.scales)


# Errors


@each_kind
@pytest.mark.parametrize("shape", [(100,), (1, 100), (60, 33), (2, 3, 40)])
@pytest.mark.parametrize("p", [None, 0.5])
def test_nan_in_the_last_group_leaves_out_unchanged(p, shape, kind):
    """Also where a single row has several groups, all of them finite but the last."""
    fmt, mode = per_group(kind, 9), mode_of(p)
    x = np.ones(shape, F32)
    x.flat[-1] = np.nan
    out = np.full(fmt.data_shape(shape), 77, fmt.data_dtype)
    for options in ({}, {"out": out}, {"out": out, "num_threads": 3}):
        with pytest.raises(NonFiniteError) as caught:
            dynamic_quantize(x, fmt, mode, **options)
        assert caught.value.index == x.size - 1
    assert (out == 77).all()


def test_a_single_number_has_no_groups():
    with pytest.raises(ShapeMismatchError, match="at least one axis"):
        dynamic_quantize(1.0, DynQuantFormat.int8_per_group(4))


@pytest.mark.parametrize("size", [0, -1, 2.0, "8", None, True, [8]])
def test_bad_group_sizes(size):
    for make in (DynQuantFormat.int8_per_group, DynQuantFormat.int4_per_group):
        with pytest.raises(ParameterError, match="group_size: expected an int >= 1"):
            make(size)


# The tensor

ZERO_POINT_FORMATS = [
    DynQuantFormat(4, "per_tensor", packed=True),
    DynQuantFormat(4, "per_row", packed=True),
    *(DynQuantFormat(4, "per_group", size, True) for size in (1, 5, 32, 4097)),
]
each_zero_point_format = pytest.mark.parametrize("fmt", ZERO_POINT_FORMATS, ids=repr)


def with_zero_points(fmt, shape, seed=0):
    """A tensor of random codes 0..15, its values by the oracle, and floats near them."""
    rng = np.random.default_rng(seed)
    flat = shape if fmt.granularity != "per_tensor" else (1, int(np.prod(shape)))
    codes = rng.integers(0, 16, flat, dtype=np.int8)
    size = fmt.group_size or flat[-1]
    groups = (*flat[:-1], -(-flat[-1] // size))
    scales, zero_points = rng.standard_normal(groups).astype(F32), rng.integers(0, 16, groups, dtype=np.uint8)
    values = reference.dequantize_groups(codes, scales, size, zero_points).reshape(shape)
    field = fmt.scales_shape(shape)
    data = reference.pack(codes, per_row=True).reshape(fmt.data_shape(shape))
    q = DynQuantTensor(data, scales.reshape(field), zero_points.reshape(field), shape, fmt)
    return q, values, values + rng.standard_normal(shape).astype(F32)


@each_zero_point_format
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (2, 3, 37), (2, 4096), (2, 8195)])
def test_zero_points(shape, fmt, isa):
    q, values, x = with_zero_points(fmt, shape)
    assert_same_bits(q.dequantize(), values)
    out = np.full(shape, np.nan, F32)
    assert q.dequantize(out=out) is out
    assert_same_bits(out, values)
    assert quantization_mae(x, q) == pytest.approx(reference.mae(x, values), rel=1e-12)
    for per_row in (False, True):
        of_codes, of_values = (error_metrics(x, v, per_row=per_row) for v in (q, values))
        for name in ("mae", "mse", "max_abs", "sqnr_db", "cosine"):
            a, b = getattr(of_codes, name), getattr(of_values, name)
            np.testing.assert_allclose(a, b, rtol=1e-12, err_msg=name)
            assert np.shape(a) == (shape[:-1] if per_row else ())


@each_kind
@pytest.mark.parametrize("size", [1, 5, 32, 4097])
@pytest.mark.parametrize("shape", [(40,), (3, 63), (2, 2, 4100)])
def test_error_metrics(shape, size, kind, isa):
    x = np.random.default_rng(5).standard_normal(shape).astype(F32)
    q = dynamic_quantize(x, per_group(kind, size))
    values = q.dequantize()
    assert quantization_mae(x, q) == pytest.approx(reference.mae(x, values), rel=1e-12)
    for per_row in (False, True):
        metrics, wanted = error_metrics(x, q, per_row=per_row), error_metrics(x, values, per_row=per_row)
        np.testing.assert_allclose(metrics.mse, wanted.mse, rtol=1e-12)
        np.testing.assert_allclose(metrics.cosine, wanted.cosine, rtol=1e-12)
        np.testing.assert_array_equal(metrics.max_abs, wanted.max_abs)


@each_kind
@pytest.mark.parametrize("shape", [(10,), (3, 5), (2, 3, 33)])
@pytest.mark.parametrize("size", [1, 4, 5, 40])
def test_fields(size, shape, kind):
    q = dynamic_quantize(np.ones(shape, F32), per_group(kind, size))
    rows, k = int(np.prod(shape[:-1])), shape[-1]
    groups, packed = -(-k // size), KINDS[kind][1]
    assert q.scales.shape == (*shape[:-1], groups)
    assert q.data.shape == (*shape[:-1], (k + 1) // 2 if packed else k)
    assert q.memory_bytes == rows * ((k + 1) // 2 if packed else k) + 4 * rows * groups
    assert q.compression_ratio == 4 * rows * k / q.memory_bytes
    assert q.element_count == rows * k
    assert q.zero_points is None


def test_zero_points_count_as_memory():
    q, _, _ = with_zero_points(DynQuantFormat(4, "per_group", 32, True), (8, 64))
    assert q.memory_bytes == 8 * 32 + 4 * 16 + 16
    assert q.compression_ratio == 4 * 8 * 64 / q.memory_bytes


def test_repr_has_groups_and_zero_points():
    q, _, _ = with_zero_points(DynQuantFormat(4, "per_group", 32, True), (8, 64))
    for part in ("(8, 64)", "int4 per_group of 32", "zero points", "packed", f"{q.memory_bytes} bytes"):
        assert part in repr(q)
    plain = repr(dynamic_quantize(np.ones((2, 9), F32), DynQuantFormat.int8_per_group(4)))
    assert "int8 per_group of 4" in plain
    assert "zero points" not in plain


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies(through):
    for q in (
        with_zero_points(DynQuantFormat(4, "per_group", 5, True), (3, 17))[0],
        dynamic_quantize(np.ones((2, 9), F32), DynQuantFormat.int8_per_group(4)),
    ):
        twin = through(q)
        assert (twin.shape, twin.format) == (q.shape, q.format)
        assert hash(twin.format) == hash(q.format)
        assert (twin.zero_points is None) == (q.zero_points is None)
        assert_same_bits(twin.dequantize(), q.dequantize())


@each_zero_point_format
def test_strided_and_misaligned_fields(fmt):
    q, values, x = with_zero_points(fmt, (4, 75))
    strided = DynQuantTensor(
        np.repeat(q.data, 2, axis=-1)[..., ::2],
        np.repeat(q.scales, 3, axis=0)[::3],
        np.repeat(q.zero_points, 2, axis=-1)[..., ::2],
        q.shape,
        fmt,
    )
    scales, zero_points = array_at(2, q.scales), np.asfortranarray(q.zero_points)
    misaligned = DynQuantTensor(np.asfortranarray(q.data), scales, zero_points, q.shape, fmt)
    for other in (strided, misaligned):
        assert_same_bits(other.dequantize(), values)
        assert quantization_mae(x, other) == quantization_mae(x, q)


def test_invalid_fields():
    fmt, data, scales = (
        DynQuantFormat(4, "per_group", 4, True),
        np.zeros((2, 5), np.uint8),
        np.ones((2, 3), F32),
    )
    zero_points = np.full((2, 3), 15, np.uint8)
    assert DynQuantTensor(data, scales, zero_points, (2, 9), fmt).dequantize()[0, 0] == -15
    for args, error, name in [
        ((data, scales[:, :2], zero_points, (2, 9), fmt), ShapeMismatchError, "scales"),
        ((data, scales, zero_points[:, :2], (2, 9), fmt), ShapeMismatchError, "zero_points"),
        ((data, scales, zero_points.astype(int), (2, 9), fmt), DTypeError, "zero_points"),
        ((data, scales, zero_points + np.uint8(1), (2, 9), fmt), ParameterError, "zero_points"),
        ((data, scales, None, (2, 11), fmt), ShapeMismatchError, "data"),
        ((data, scales, None, (), fmt), ShapeMismatchError, "shape"),
        (
            (np.zeros((2, 9), np.int8), scales, zero_points, (2, 9), DynQuantFormat.int4_per_group(4)),
            ParameterError,
            "zero_points",
        ),
    ]:
        with pytest.raises(error, match=f"^{name}: expected"):
            DynQuantTensor(*args)
