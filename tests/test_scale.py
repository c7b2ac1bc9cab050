"""compute_scale: the largest magnitude, percentiles and their ranks, against a full sort."""

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, distributions, mode_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import dynquant
from dynquant import NonFiniteError, Percentile, compute_scale

PERCENTILES = (None, 1e-6, 0.001, 0.07, 0.25, 0.5, 0.99, 0.999, 1.0)
# Floats that the kernels take at a time: a block, and a segment of 256 KiB.
BLOCK, SEGMENT = 4096, 1 << 16


@pytest.mark.parametrize("clip", [127, 7, 1, 0.5, 448.0, 1e-3, np.float32(3.3), np.int64(15)])
def test_compute_scale(clip, isa):
    for name, x in distributions(1000, np.random.default_rng(5)).items():
        if name == "every exponent":
            x = x * F32(2.0**-20)  # so that the quotient by a small clip stays finite
        for p in PERCENTILES:
            scale = compute_scale(x, clip, mode_of(p))
            assert type(scale) is float
            assert scale == float(reference.scale(x, clip, p)), (name, p)


@pytest.mark.parametrize("start", [0, 1, 15])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200, 1024 + 63, 2 * 65_536 + 777])
def test_largest_magnitude_at_any_index(n, start, isa):
    """A long array is read as four streams, 65,536 elements at a time."""
    x = np.ones(start + n, F32)[start:]
    near = np.arange(-66, 67)
    for i in np.unique([edge + near for edge in (0, n, *range(0, n, 16_384))]):
        if 0 <= i < n:
            x[i] = -3
            assert compute_scale(x, 1) == 3, i
            x[i] = 1


def test_negative_values_count_by_magnitude():
    assert compute_scale([-0.0, -5.0, 4.0], 1) == 5.0


def test_scale_that_overflows_float32():
    with pytest.raises(dynquant.ParameterError, match="clip_val"):
        dynquant.compute_scale([3e38], 0.5)


# Percentiles


@pytest.mark.parametrize("n", [1, 2, 31, 100, BLOCK - 1, BLOCK, BLOCK + 1, 20_000])
def test_percentile_equals_full_sort(n, isa):
    for name, x in distributions(n, np.random.default_rng(n)).items():
        magnitudes = np.sort(np.abs(x))
        for p in PERCENTILES[1:]:
            assert compute_scale(x, 1, Percentile(p)) == magnitudes[reference.rank(p, n)], (name, p)


@pytest.mark.parametrize("n", [SEGMENT - 1, SEGMENT, SEGMENT + 1])
def test_percentile_at_segment_lengths(n, isa):
    for name, x in distributions(n, np.random.default_rng(n)).items():
        magnitudes = np.sort(np.abs(x))
        for p in (1e-9, 0.5, 0.99, 1.0):
            assert compute_scale(x, 1, Percentile(p)) == magnitudes[reference.rank(p, n)], (name, p)


# From this many floats on, a sample gives bounds between which the percentile is searched.
SAMPLED = 1280
# Lengths from which on samples are larger, and their sizes.
SAMPLES = {2**17: 2048, 2**15: 1024, 2**13: 512, 0: 256}


def sample_stride(n):
    size = next(size for start, size in SAMPLES.items() if n >= start)
    return (n // size - 1) | 1


def sampled_inputs(n, rng):
    """Inputs whose percentile the sample bounds well, and inputs whose sample misleads."""
    x = rng.standard_normal(n).astype(F32)
    stride = sample_stride(n)
    large = np.where(np.arange(n) % stride, x, 1e6 + x).astype(F32)
    small = np.where(np.arange(n) % stride, x, 1e-6 * x).astype(F32)
    return {
        "normal": x,
        "ascending": np.sort(x),
        "descending": -np.sort(np.abs(x)),
        "the sample is larger": large,
        "the sample is smaller": small,
        "equal": np.full(n, -2.5, F32),
        "two values": np.where(rng.random(n) < 0.37, F32(1), F32(-3)).astype(F32),
        "two adjacent floats": np.where(rng.random(n) < 0.5, F32(1), np.nextafter(F32(1), F32(2))),
        "few values": np.round(x),
        "clipped": np.clip(x, -2, 2),
        "half of them zero": np.maximum(x, 0),
        "two in three equal": np.where(rng.random(n) < 0.66, F32(0.25), x).astype(F32),
        "zeros and one": np.eye(1, n, n // 3, dtype=F32)[0],
        "subnormal": (x * F32(1e-42)).astype(F32),
        "all sampled_inputs of magnitude": np.exp2(rng.uniform(-149, 127, n)).astype(F32),
    }


@pytest.mark.parametrize(
    "n",
    [SAMPLED - 1, SAMPLED, SAMPLED + 37, 4096, *(n + i for n in list(SAMPLES)[:3] for i in (-1, 0)), 655_361],
)
def test_percentile_with_sampling(n, isa):
    for name, x in sampled_inputs(n, np.random.default_rng(n)).items():
        magnitudes = np.sort(np.abs(x))
        for p in (1e-6, 0.001, 0.25, 0.5, 0.63, 0.99, 0.999, 1 - 1e-6, 1.0):
            assert compute_scale(x, 1, Percentile(p)) == magnitudes[reference.rank(p, n)], (name, p)


def test_percentile_with_sampling_of_float16(isa):
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float16)
    magnitudes = np.sort(np.abs(x.astype(F32)))
    for p in (0.001, 0.5, 0.999):
        assert compute_scale(x, 1, Percentile(p)) == magnitudes[reference.rank(p, x.size)]


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("p", [0.001, 0.5, 0.999, 1.0])
def test_percentile_with_sampling_rejects_non_finite(p, bad, isa):
    x = np.random.default_rng(1).standard_normal(SAMPLED + 5).astype(F32)
    for index in (0, 1, 31, 32, SAMPLED // 2, SAMPLED, SAMPLED + 4):
        poisoned = x.copy()
        poisoned[index] = bad
        with pytest.raises(NonFiniteError) as caught:
            compute_scale(poisoned, 1, Percentile(p))
        assert caught.value.index == index


@pytest.mark.parametrize("n", [40, BLOCK + 3])
def test_every_rank(n, isa):
    x = np.random.default_rng(n).permutation(np.arange(1, n + 1)).astype(F32)
    ranks = {Percentile((i + 0.5) / n).rank(n): i for i in range(n)}
    assert list(ranks) == list(range(n))
    for i in range(0, n, 1 if n < 100 else 97):
        assert compute_scale(x, 1, Percentile((i + 0.5) / n)) == i + 1


@given(p=st.floats(0, 1, exclude_min=True), n=st.integers(1, 1 << 40))
def test_rank(p, n):
    assert Percentile(p).rank(n) == reference.rank(p, n)


@pytest.mark.parametrize(
    "p, n, rank",
    [
        (0.99, 100, 98),
        (1.0, 1, 0),
        (1e-300, 10, 0),
        # The float64 product is a little above 7, and would give 7.
        (0.07, 100, 6),
        # The float32 product is a little above 30, the float64 one is 30.
        (0.3, 100, 30),
        # float32 rounds the product to the even float below.
        ((2**24 - 1.6) / 2**24, 2**24, 2**24 - 3),
        # Above 2**24 elements ranks are told apart only by float64.
        (1 - 3 / (2**24 + 8), 2**24 + 8, 2**24 + 4),
        (1.0, 2**40, 2**40 - 1),
    ],
)
def test_rank_values(p, n, rank):
    assert Percentile(p).rank(n) == rank


@pytest.mark.parametrize("n", [2**24, 2**24 + 9])
def test_percentile_around_2_to_24_elements(n):
    """Zeros but for the ten largest magnitudes, so that adjacent ranks have different values."""
    x = np.zeros(n, np.float16)
    x[np.random.default_rng(0).choice(n, 10, replace=False)] = np.arange(1, 11)
    for below_top in (0, 1, 2, 3, 6):
        p = 1 - (below_top + 0.2) / n
        rank = reference.rank(p, n)
        assert compute_scale(x, 1, Percentile(p)) == max(10 - (n - 1 - rank), 0)
        if n > 2**24:
            assert rank == n - 1 - below_top


# Properties

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(x=arrays(F32, st.integers(1, 300), elements=finite), p=st.floats(0, 1, exclude_min=True))
def test_any_percentile_equals_full_sort(x, p):
    assert compute_scale(x, 1, Percentile(p)) == np.sort(np.abs(x))[reference.rank(p, x.size)]


@given(x=arrays(F32, st.integers(0, 100), elements=finite))
def test_percentile_one_is_max_abs(x):
    assert compute_scale(x, 127, Percentile(1)) == compute_scale(x, 127)
