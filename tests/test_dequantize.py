"""dequantize: one float32 product of each code and its scale, in every format."""

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, FORMATS, array_at, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from dynquant import DynQuantFormat, DynQuantTensor, dynamic_quantize, dynamic_quantize_int4


def tensor(fmt=DynQuantFormat.INT8_PER_ROW, shape=(3, 5)):
    return dynamic_quantize(np.random.default_rng(0).standard_normal(shape).astype(F32), fmt)


each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())


@each_format
@pytest.mark.parametrize("k", [1, 2, 31, 64, 257, 4095, 4097, 8192])
def test_dequantize_every_length(fmt, k, isa):
    rng = np.random.default_rng(k)
    codes = rng.integers(-fmt.clip, fmt.clip + 1, (3, k), dtype=np.int8)
    per_row = fmt.granularity == "per_row"
    scales = rng.standard_normal(3 if per_row else 1).astype(F32)
    data = reference.pack(codes, per_row) if fmt.packed else codes
    q = DynQuantTensor(data, scales, None, (3, k), fmt)
    values = reference.dequantize(codes, scales, per_row)
    assert_same_bits(q.dequantize(), values)
    out = np.full((3, k), np.nan, F32)
    assert q.dequantize(out=out) is out
    assert_same_bits(out, values)


def test_codes_that_quantize_never_produces():
    """-128 and the nibble -8 are valid codes."""
    codes = np.array([-128, 127, 0, 5], np.int8)
    q = DynQuantTensor(codes, np.array([0.5], F32), None, (4,), DynQuantFormat.INT8_PER_TENSOR)
    assert q.dequantize().tolist() == [-64.0, 63.5, 0.0, 2.5]
    packed = DynQuantFormat(4, "per_tensor", packed=True)
    q = DynQuantTensor(np.arange(256, dtype=np.uint8), np.ones(1, F32), None, (512,), packed)
    nibbles = np.stack([np.arange(256) % 16, np.arange(256) // 16], axis=1).ravel()
    assert q.dequantize().tolist() == np.where(nibbles < 8, nibbles, nibbles - 16).tolist()


def test_padding_nibble_of_an_odd_row_is_ignored():
    packed = DynQuantFormat(4, "per_row", packed=True)
    data = np.array([[0x21, 0xF3], [0x21, 0x03]], np.uint8)
    q = DynQuantTensor(data, np.ones(2, F32), None, (2, 3), packed)
    assert q.dequantize().tolist() == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize("scale", [1e-45, 2.0**-140, 1.5e-38, 3e36, -0.5, 0.0, np.inf])
def test_dequantize_is_one_product(scale, isa):
    codes = np.arange(-127, 128, dtype=np.int8)
    q = DynQuantTensor(codes, np.array([scale], F32), None, codes.shape, DynQuantFormat.INT8_PER_TENSOR)
    with np.errstate(all="ignore"):
        expected = codes.astype(F32) * F32(scale)
    actual = q.dequantize()
    nan = np.isnan(expected)
    assert_same_bits(actual[~nan], expected[~nan])
    assert np.isnan(actual[nan]).all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 6_800_003), (1660, 4099)])
@pytest.mark.parametrize("fmt", [FORMATS["int8 per row"], FORMATS["packed per row"]], ids=["int8", "packed"])
def test_nontemporal_stores(fmt, shape, isa):
    """Large results are written with nontemporal stores; `out` begins and ends inside a cache line."""
    codes = np.random.default_rng(0).integers(-7, 8, shape, dtype=np.int8)
    scales = np.linspace(0.1, 3, shape[0], dtype=F32)
    q = DynQuantTensor(reference.pack(codes, True) if fmt.packed else codes, scales, None, shape, fmt)
    memory = np.full(codes.size + 32, 99, F32)
    out = memory[7 : 7 + codes.size].reshape(shape)
    q.dequantize(out=out)
    assert_same_bits(out, reference.dequantize(codes, scales, per_row=True))
    assert (memory[:7] == 99).all()
    assert (memory[7 + codes.size :] == 99).all()


@each_format
def test_strided_and_misaligned_fields(fmt):
    q = tensor(fmt, (4, 7))
    data = np.repeat(q.data, 2, axis=-1)[..., ::2]
    scales = np.repeat(q.scales, 3)[::3]
    assert_same_bits(DynQuantTensor(data, scales, None, q.shape, fmt).dequantize(), q.dequantize())
    scales = array_at(2, q.scales)
    data = np.asfortranarray(q.data)
    assert_same_bits(DynQuantTensor(data, scales, None, q.shape, fmt).dequantize(), q.dequantize())


@given(st.lists(st.integers(-7, 7), min_size=1, max_size=90))
def test_packing_round_trips(codes):
    """A 7 among the values makes the scale exactly 1."""
    x = np.array([7, *codes], F32)
    assert_same_bits(dynamic_quantize_int4(x, packed=True).dequantize(), x)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 9_000_001), (2, 2**23 + 77)], ids=str)
@pytest.mark.parametrize("fmt", [DynQuantFormat.INT8_PER_ROW, DynQuantFormat(4, "per_group", 5000, True)])
def test_nontemporal_stores_of_long_rows_and_groups(shape, fmt, isa):
    """The same for long rows and groups."""
    x = np.random.default_rng(0).standard_normal(shape, F32)
    q = dynamic_quantize(x, fmt)
    codes = dynamic_quantize(x, DynQuantFormat(fmt.bits, fmt.granularity, fmt.group_size)).data
    m, k = x.shape
    scales = np.repeat(q.scales.reshape(m, -1), fmt.group_of(k), axis=1)[:, :k]
    memory = np.full(x.size + 32, 99, F32)
    out = memory[5 : 5 + x.size].reshape(m, k)
    q.dequantize(out=out)
    assert_same_bits(out, codes * scales)
    assert (memory[:5] == 99).all()
    assert (memory[5 + x.size :] == 99).all()
