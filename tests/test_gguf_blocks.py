"""Block types of GGUF: ggml's reference rounding in slow NumPy, on every instruction set."""

import ml_dtypes
import numpy as np
import pytest
from helpers.common import F32, ISAS, assert_same_bits, using

from dynquant import _core
from dynquant._layouts import BLOCK_BYTES
from dynquant._validate import float_matrix

pytestmark = pytest.mark.whitebox

Q4_0, Q4_1, Q8_0 = 2, 3, 8


def reference(x, number):
    """One block after the other, as ggml-quants.c has it."""
    out = []
    for block in x.astype(F32).reshape(-1, 32):
        with np.errstate(all="ignore"):
            out.append({Q8_0: q8_0, Q4_0: q4_0, Q4_1: q4_1}[number](block))
    return np.concatenate(out).reshape(len(x), -1)


def half(x):
    return np.array([x], F32).astype("<f2").view(np.uint8)


def reciprocal(d):
    r = F32(1) / d if d else F32(0)
    return r if np.isfinite(r) else F32(0)


def halves(codes):
    codes = np.minimum(codes.astype(np.uint8), 15)
    return codes[:16] | codes[16:] << 4


def q8_0(x):
    d = np.abs(x).max() / F32(127)
    v = x * reciprocal(d)
    codes = np.trunc(v.astype(np.float64) + np.copysign(0.5, v)).astype(np.int8)
    return np.concatenate([half(d), codes.view(np.uint8)])


def q4_0(x):
    largest = F32(0)
    for v in x:
        if abs(v) > abs(largest):
            largest = v
    d = largest / F32(-8)
    return np.concatenate([half(d), halves(np.trunc(x * reciprocal(d) + F32(8.5)))])


def q4_1(x):
    low = high = x[0]
    for v in x:
        low = v if v < low else low
        high = v if v > high else high
    d = (high - low) / F32(15)
    codes = np.trunc((x - low) * reciprocal(d) + F32(0.5))
    return np.concatenate([half(d), half(low), halves(codes)])


def quantized(x, number, threads=1):
    """The blocks, and whether all scales are finite."""
    m, k = x.shape
    blocks = np.full((m, k // 32 * BLOCK_BYTES[number]), 0xA5, np.uint8)
    return blocks, _core.quantize_blocks(float_matrix(x, m, k), blocks, number, threads)


def inputs():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((6, 96)).astype(F32)
    signed_zeros = np.where(rng.random((6, 96)) < 0.5, F32(0), F32(-0.0))
    return {
        "normal": normal,
        "every scale": (normal * np.exp2(rng.integers(-40, 12, (6, 96)))).astype(F32),
        "halves": (rng.integers(-16, 17, (6, 96)) * 0.5).astype(F32),
        "both largest": np.where(rng.random((6, 96)) < 0.3, rng.choice([-3, 3], (6, 96)), 1).astype(F32),
        "zeros": np.zeros((6, 96), F32),
        "signed zeros": signed_zeros,
        "signed zeros and more": np.where(rng.random((6, 96)) < 0.3, np.abs(normal), signed_zeros),
        "subnormal": (normal * F32(1e-40)).astype(F32),
        "subnormal scales": (normal * F32(1e-6)).astype(F32),
        "near the end of float16": (normal / np.abs(normal).max() * F32(65000)).astype(F32),
        "float16": normal.astype(np.float16),
        "bfloat16": normal.astype(ml_dtypes.bfloat16),
    }


@pytest.mark.parametrize("number", [Q4_0, Q4_1, Q8_0])
@pytest.mark.parametrize("name", inputs())
def test_reference(name, number):
    x = inputs()[name]
    expected = reference(x, number)
    for isa in ISAS:
        with using(isa):
            for threads in (1, 3):
                blocks, finite = quantized(x, number, threads)
                assert finite
                assert_same_bits(blocks, expected, isa)


@pytest.mark.parametrize("number", [Q4_0, Q4_1, Q8_0])
def test_long_rows(number):
    x = np.random.default_rng(1).standard_normal((3, 3 * 4096 + 32)).astype(F32)
    assert_same_bits(quantized(x, number)[0], reference(x, number))


@pytest.mark.parametrize("number", [Q4_0, Q4_1, Q8_0])
def test_scales_beyond_float16(number):
    x = np.ones((2, 64), F32)
    x[1, 40] = 1e9
    for isa in ISAS:
        with using(isa):
            assert not quantized(x, number)[1]
            assert not quantized(np.full((1, 32), -3e38, F32) * np.resize([1, -1], 32).astype(F32), number)[1]


def test_nothing():
    for shape in ((0, 32), (3, 0)):
        assert quantized(np.zeros(shape, F32), Q8_0)[1]
