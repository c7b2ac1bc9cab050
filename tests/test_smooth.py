"""Smooth factors, and the two products with them."""

import dataclasses

import numpy as np
import pytest
import reference
from common import F32, assert_same_bits, distributions
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dynquant import SmoothQuantConfig, compute_smooth_factors, smooth_activations, smooth_weights

SMOOTH = {smooth_activations: reference.smooth_activations, smooth_weights: reference.smooth_weights}
each_product = pytest.mark.parametrize("smooth", SMOOTH, ids=lambda function: function.__name__)


def layer(tokens, out_features, in_features, seed=0):
    rng = np.random.default_rng(seed)
    spread = np.geomspace(1e-3, 1e3, in_features)
    a = rng.standard_normal((tokens, in_features)) * spread
    return a.astype(F32), rng.standard_normal((out_features, in_features)).astype(F32)


# Configuration


def test_config_defaults():
    config = SmoothQuantConfig()
    assert (config.alpha, config.epsilon) == (0.5, 1e-5)
    assert config == SmoothQuantConfig(0.5, 1e-5)
    assert hash(config) == hash(SmoothQuantConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 0.1


@pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0, np.float32(0.25), np.float64(0.9)])
@pytest.mark.parametrize("epsilon", [1e-10, 1, 1e30])
def test_config_limits(alpha, epsilon):
    config = SmoothQuantConfig(alpha, epsilon)
    assert (config.alpha, config.epsilon) == (alpha, epsilon)


# Factors


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 33), (4, 8, 64), (7, 2, 300), (2, 9, 4097), (130, 6, 5)])
def test_factors(shape, alpha, isa):
    a, w = layer(*shape)
    factors = compute_smooth_factors(a, w, SmoothQuantConfig(alpha))
    expected = reference.smooth_factors(a, w, alpha)
    assert (factors.dtype, factors.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_max_ulp(factors, expected, maxulp=1)


@pytest.mark.parametrize("row", range(9))
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_largest_of_a_column_may_be_in_any_row(row, dtype, isa):
    """Rows are folded in by fours and ones."""
    a = np.random.default_rng(0).uniform(-1, 1, (9, 70)).astype(dtype)
    a[row] = np.linspace(-9, -8, 70)
    factors = compute_smooth_factors(a, np.ones((1, 70)), SmoothQuantConfig(1.0))
    assert_same_bits(factors, np.abs(a[row].astype(F32)) + F32(1e-5))


@pytest.mark.parametrize("epsilon", [1e-10, 1e-5, 0.1, 2.0])
def test_epsilon_is_added_and_is_the_least(epsilon, isa):
    a, w = np.zeros((2, 4), F32), np.array([[0, 1, 1e6, 1e12]], F32)
    for alpha in (0.0, 0.5, 1.0):
        factors = compute_smooth_factors(a, w, SmoothQuantConfig(alpha, epsilon))
        np.testing.assert_array_max_ulp(factors, reference.smooth_factors(a, w, alpha, epsilon), maxulp=1)
        assert factors.min() >= F32(epsilon)
    assert factors.tolist() == [F32(epsilon)] * 4


def test_alpha_moves_the_range():
    """0 leaves the weights at 1, 1 the activations, 0.5 makes the two ranges equal."""
    a, w = layer(20, 10, 30)
    amax = {}
    for alpha in (0.0, 0.5, 1.0):
        factors = compute_smooth_factors(a, w, SmoothQuantConfig(alpha))
        smooth_a, smooth_w = smooth_activations(a, factors), smooth_weights(w, factors)
        amax[alpha] = np.abs(smooth_a).max(axis=0), np.abs(smooth_w).max(axis=0)
    np.testing.assert_allclose(amax[0.0][1], 1, rtol=1e-4)
    np.testing.assert_allclose(amax[0.5][0], amax[0.5][1], rtol=0.02)
    np.testing.assert_allclose(amax[1.0][0], 1, rtol=0.02)


# Products


@each_product
@pytest.mark.parametrize("shape", [(1,), (300,), (1, 1), (3, 65), (2, 3, 31), (2, 4096), (5, 9001)])
def test_products(smooth, shape, isa):
    rng = np.random.default_rng(3)
    factors = rng.uniform(0.01, 100, shape[-1]).astype(F32)
    for name, x in distributions(int(np.prod(shape)), rng).items():
        x = x.reshape(shape)
        expected = SMOOTH[smooth](x, factors)
        assert_same_bits(smooth(x, factors), expected, name)
        out = np.full(shape, np.nan, F32)
        assert smooth(x, factors, out=out) is out
        assert_same_bits(out, expected, name)
        assert smooth(x, factors, out=x) is x
        assert_same_bits(x, expected, name)


@each_product
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("shape", [(3, 65), (2, 4099)])
def test_products_of_other_floats(smooth, dtype, shape, isa):
    x = np.random.default_rng(4).standard_normal(shape).astype(dtype)
    factors = np.random.default_rng(5).uniform(0.5, 2, shape[1]).astype(dtype)
    assert_same_bits(smooth(x, factors), SMOOTH[smooth](x, factors))


@each_product
def test_every_float16_and_its_subnormals(smooth, isa):
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = x[np.isfinite(x)]
    assert_same_bits(smooth(x[:, None], [1.0]).ravel(), x.astype(F32))
    assert_same_bits(smooth(x, np.ones(x.size, F32)), x.astype(F32))


@each_product
def test_extreme_quotients(smooth, isa):
    """Subnormal, zero and infinite results, with the rounding of one IEEE operation."""
    x = np.array([1e-45, -1e-45, 1e-38, 3e38, -3e38, 0.0, -0.0, 1.5, 7e-39], F32)
    for factor in (1e-45, 1e-38, 2.0**-126, 0.3, 3.0, 1e38, 3e38):
        factors = np.full(x.size, factor, F32)
        assert_same_bits(smooth(x, factors), SMOOTH[smooth](x, factors), f"{factor}")


@each_product
@pytest.mark.parametrize("shape", [(1, 4_300_007), (1030, 4098)])
def test_products_written_past_the_caches(smooth, shape, isa):
    """Large results take another way to memory; `out` begins and ends within a cache line."""
    x = np.random.default_rng(0).standard_normal(shape, F32)
    factors = np.linspace(0.1, 3, shape[1], dtype=F32)
    room = np.full(x.size + 32, 99, F32)
    out = room[5 : 5 + x.size].reshape(shape)
    expected = SMOOTH[smooth](x, factors)
    smooth(x, factors, out=out)
    assert_same_bits(out, expected)
    assert (room[:5] == 99).all()
    assert (room[5 + x.size :] == 99).all()
    smooth(x, factors, out=x)
    assert_same_bits(x, expected)


@each_product
@pytest.mark.parametrize("shape, in_features", [((0, 3), 3), ((4, 0), 0), ((0,), 0), ((2, 0, 5), 5)])
def test_empty(smooth, shape, in_features):
    factors = np.ones(in_features, F32)
    assert smooth(np.empty(shape, F32), factors).shape == shape
    out = np.empty(shape, F32)
    assert smooth(out, factors, out=out) is out


@each_product
def test_in_place_through_another_view(smooth):
    """The same elements by another object, a buffer among them, are the input itself."""
    x = np.random.default_rng(6).standard_normal((4, 9)).astype(F32)
    factors = np.linspace(1, 2, 9, dtype=F32)
    expected = SMOOTH[smooth](x, factors)
    twin = x.copy()
    smooth(x[:], factors, out=x)
    assert_same_bits(x, expected)
    smooth(memoryview(twin), factors, out=twin)
    assert_same_bits(twin, expected)


# Properties

numbers = st.floats(-1e6, 1e6, width=32)


@given(
    x=arrays(F32, (5, 7), elements=numbers),
    factors=arrays(F32, 7, elements=st.floats(0.125, 512, width=32)),
)
def test_inputs_unchanged_and_rows_independent(x, factors):
    before = x.tobytes(), factors.tobytes()
    for smooth in SMOOTH:
        whole = smooth(x, factors)
        for i in range(5):
            assert_same_bits(smooth(x[i], factors), whole[i])
    assert (x.tobytes(), factors.tobytes()) == before


@given(
    a=arrays(F32, (6, 5), elements=numbers),
    w=arrays(F32, (3, 5), elements=numbers),
    alpha=st.floats(0, 1),
    order=st.permutations(range(6)),
)
def test_factors_are_positive_and_blind_to_the_order_of_tokens(a, w, alpha, order):
    config = SmoothQuantConfig(alpha)
    factors = compute_smooth_factors(a, w, config)
    assert (factors >= F32(1e-5)).all()
    assert_same_bits(compute_smooth_factors(-a[list(order)], w[::-1], config), factors)
