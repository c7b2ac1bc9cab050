"""Codes at and next to every boundary between two codes, against a true division.

The kernel divides only where two bounds on the quotient round to different codes, and then divides a whole
vector. So each boundary is tried twice: among all the others, and alone among zeros, where only its own
bounds can trigger the division.
"""

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, assert_same_bits

from dynquant import DynQuantFormat, Percentile, dynamic_quantize, dynamic_quantize_int8

ROWS = 1500
# Elements: at least one vector of any instruction set.
VECTOR = 64
FORMATS = {127: DynQuantFormat.INT8_PER_ROW, 7: DynQuantFormat.INT4_PER_ROW}


def from_bits(bits):
    return np.asarray(bits, np.int32).view(F32)


def around(value, ulps):
    """`value` and the `ulps` next floats on either side."""
    return from_bits(F32(value).view(np.int32) + np.arange(-ulps, ulps + 1))


def amax_normal(clip, rng):
    return (rng.uniform(1, 2, ROWS) * 2.0 ** rng.integers(-20, 20, ROWS)).astype(F32)


def amax_every_exponent(clip, rng):
    return from_bits(rng.integers(1, 0x7F800000, ROWS))


def amax_subnormal_scale(clip, rng):
    return from_bits(rng.integers(1, F32(clip * 2.0**-126).view(np.int32), ROWS))


def amax_smallest(clip, rng):
    return from_bits(np.arange(1, ROWS + 1))


def amax_low_limit(clip, rng):
    """Scales about 2**-125, below which the reciprocal is not taken, and the exponents next to it."""
    near = rng.uniform(0.25, 4, ROWS - 401) * clip * 2.0**-125
    return np.concatenate([near.astype(F32), around(clip * 2.0**-125, 200)])


def amax_high_limit(clip, rng):
    """The largest scales: with clip 7 they reach past 2**125, above which the reciprocal is not taken."""
    limit = min(clip * 2.0**125, 2.0**127 * 1.9999)
    near = np.minimum(rng.uniform(0.25, 2, ROWS - 401) * limit, np.finfo(F32).max)
    return np.concatenate([near.astype(F32), around(limit, 200)])


def amax_power_of_two_scale(clip, rng):
    powers = clip * 2.0 ** np.arange(-140, 120)
    return np.concatenate([around(power, 2) for power in powers])


def amax_inexact_reciprocal(clip, rng):
    """Of many scales those whose float32 reciprocal is furthest from the true one."""
    amax = rng.uniform(1, 2, 1 << 19).astype(F32)
    scale = amax / F32(clip)
    error = np.abs((F32(1) / scale).astype(np.float64) * scale - 1)
    return amax[np.argpartition(error, -ROWS)[-ROWS:]]


AMAX = [
    amax_normal,
    amax_every_exponent,
    amax_subnormal_scale,
    amax_smallest,
    amax_low_limit,
    amax_high_limit,
    amax_power_of_two_scale,
    amax_inexact_reciprocal,
]


def boundaries(amax, clip, ulps):
    """(rows, clip, 2 * ulps + 1) floats about (code + 0.5) * scale for code 0 .. clip - 1."""
    halves = np.arange(clip) + 0.5
    scale = (amax / F32(clip)).astype(np.float64)
    nearest = (scale[:, None] * halves).astype(F32).view(np.int32)
    bits = nearest[..., None] + np.arange(-ulps, ulps + 1, dtype=np.int32)
    # Nothing larger than amax, which would change the scale.
    return np.minimum(np.maximum(bits, 0).view(F32), amax[:, None, None])


def check(x, codes, scales, clip):
    q = dynamic_quantize(x, FORMATS[clip])
    assert_same_bits(q.scales, scales)
    assert_same_bits(q.data, codes)


@pytest.fixture(scope="module", params=AMAX, ids=lambda amax: amax.__name__.removeprefix("amax_"))
def amaxes(request):
    return {clip: request.param(clip, np.random.default_rng(1)) for clip in FORMATS}


@pytest.fixture(scope="module", params=FORMATS)
def side_by_side(request, amaxes):
    """Every boundary with two floats on either side, in both signs."""
    clip = request.param
    amax = amaxes[clip]
    near = boundaries(amax, clip, 2).reshape(amax.size, -1)
    x = np.concatenate([amax[:, None], near, -near], axis=1)
    scales = amax / F32(clip)
    return x, reference.codes(x, scales[:, None], clip), scales, clip


@pytest.fixture(scope="module", params=FORMATS)
def alone(request, amaxes):
    """The boundaries that a quotient comes closest to, one float on either side, each alone in its vector."""
    clip, rng = request.param, np.random.default_rng(2)
    amax = amaxes[clip]
    scales = amax / F32(clip)
    near = boundaries(amax, clip, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = near[..., 1].astype(np.float64) / scales[:, None]
        distance = np.abs(ratio / (np.arange(clip) + 0.5) - 1)
    closest = np.argsort(distance, axis=1)[:, :12]
    probes = np.take_along_axis(near, closest[..., None], axis=1).reshape(amax.size, -1)
    probes *= rng.choice([F32(-1), F32(1)], probes.shape)
    x = np.zeros((amax.size, VECTOR * (1 + probes.shape[1])), F32)
    codes = np.zeros(x.shape, np.int8)
    indices = VECTOR * np.arange(1, 1 + probes.shape[1]) + rng.integers(0, VECTOR, probes.shape)
    values = np.concatenate([amax[:, None], probes], axis=1)
    indices = np.concatenate([np.zeros((amax.size, 1), int), indices], axis=1)
    np.put_along_axis(x, indices, values, axis=1)
    np.put_along_axis(codes, indices, reference.codes(values, scales[:, None], clip), axis=1)
    return x, codes, scales, clip


def test_boundaries_side_by_side(side_by_side, isa):
    check(*side_by_side)


def test_boundaries_alone(alone, isa):
    check(*alone)


@pytest.mark.parametrize("clip", FORMATS)
def test_every_subnormal_ratio(clip, isa):
    """With subnormal scales a quotient is a ratio of small integers, and many are ties."""
    amax = np.arange(1, 5000, 9, dtype=np.int32)
    x = np.minimum(np.arange(5000, dtype=np.int32), amax[:, None]).view(F32)
    x[:, ::2] *= -1
    codes, scales = reference.quantize(x, clip, per_row=True)
    check(x, codes, scales, clip)


@pytest.mark.parametrize("tie, code", [(0.5, 1), (-0.5, -1), (126.5, 127), (-126.5, -127)])
def test_tie_in_every_lane(tie, code, isa):
    """Row i has its only tie at index i."""
    n = 3 * VECTOR
    x, codes = np.zeros((n, n + 1), F32), np.zeros((n, n + 1), np.int8)
    x[:, n] = codes[:, n] = 127
    np.fill_diagonal(x, tie)
    np.fill_diagonal(codes, code)
    check(x, codes, np.ones(n, F32), 127)


# Rounding adds a constant: from 2**22 on that sum loses its last bit, and from 1.5 * 2**23 on its sign.
OUT_OF_RANGE = np.array(
    [126.5, 127.4, 127.5, 128, 255.5, 32_767.5, 2.0**22, 1.49 * 2**23, 1.5 * 2**23, 2.0**24]
)
OUT_OF_RANGE = np.concatenate(
    [OUT_OF_RANGE, [2.9 * 2**23, 3.1 * 2**23, 2.0**31, 1.6 * 2**32, 2.0**60, np.inf]]
)


@pytest.mark.parametrize("exponent", [-149, -140, -126, -125, -120, -1, 0, 60, 110])
@pytest.mark.parametrize("sign", [1, -1])
def test_values_above_the_clip(sign, exponent, isa):
    """Quotients above the clip, as only a percentile gives them, up to infinity; each alone in its vector."""
    scale = F32(2.0**exponent)
    with np.errstate(over="ignore"):
        values = np.minimum((OUT_OF_RANGE * float(scale)).astype(F32), np.finfo(F32).max)
    x = np.zeros(VECTOR * 20 * OUT_OF_RANGE.size, F32)
    x[: 10 * x.size // 20 : VECTOR] = F32(127) * scale
    x[x.size // 2 + 5 :: VECTOR][: OUT_OF_RANGE.size] = sign * values
    # The rank just below the values out of range.
    p = 1 - (OUT_OF_RANGE.size + 0.5) / x.size
    q = dynamic_quantize_int8(x, Percentile(p))
    assert q.scales[0] == scale
    assert_same_bits(q.data, reference.codes(x, scale, 127))


def test_every_finite_float16(isa):
    bits = np.arange(1 << 16, dtype=np.uint16)
    x = bits.view(np.float16)
    x = np.random.default_rng(3).permutation(x[np.isfinite(x)])
    for p in (0.001, 0.01, 0.3, 0.5, 0.77, 1.0):
        codes, scales = reference.quantize(x, p=p)
        q = dynamic_quantize_int8(x, Percentile(p))
        assert_same_bits(q.scales, scales)
        assert_same_bits(q.data, codes)
