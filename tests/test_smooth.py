"""Smooth factors, folding them into a norm, and smoothing by them."""

import collections
import dataclasses
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
from helpers import reference
from helpers.common import (
    F32,
    ISAS,
    Arrayish,
    Interface,
    Struct,
    assert_same_bits,
    calibrator_of,
    distributions,
    real_layer,
    using,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dynquant import (
    LayoutError,
    MaxAbs,
    NonFiniteError,
    ParameterError,
    Percentile,
    QuantLinear,
    SilentChannelWarning,
    SmoothQuantConfig,
    compute_smooth_factors,
    error_metrics,
    fold_smooth_factors,
    search_alpha,
    smooth_activations,
    smooth_weights,
)

SMOOTH = {smooth_activations: reference.smooth_activations, smooth_weights: reference.smooth_weights}
each_product = pytest.mark.parametrize("smooth", SMOOTH, ids=lambda function: function.__name__)


def layer(tokens, out_features, in_features, seed=0):
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(1e-3, 1e3, in_features)
    a = rng.standard_normal((tokens, in_features)) * sizes
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
def test_column_maximum_in_any_row(row, dtype, isa):
    """Rows are reduced four at a time, then one at a time."""
    a = np.random.default_rng(0).uniform(-1, 1, (9, 70)).astype(dtype)
    a[row] = np.linspace(-9, -8, 70)
    factors = compute_smooth_factors(a, np.ones((1, 70)), SmoothQuantConfig(1.0))
    assert_same_bits(factors, np.abs(a[row].astype(F32)) + F32(1e-5))


@pytest.mark.parametrize("epsilon", [1e-10, 1e-5, 0.1, 2.0])
def test_epsilon_is_added_and_is_the_minimum(epsilon, isa):
    a, w = np.zeros((2, 4), F32), np.array([[0, 1, 1e6, 1e12]], F32)
    for alpha in (0.0, 0.5, 1.0):
        factors = compute_smooth_factors(a, w, SmoothQuantConfig(alpha, epsilon))
        np.testing.assert_array_max_ulp(factors, reference.smooth_factors(a, w, alpha, epsilon), maxulp=1)
        assert factors.min() >= F32(epsilon)
    assert factors.tolist() == [F32(epsilon)] * 4


def test_alpha_moves_the_range():
    """Alpha 0 brings the weights to 1, alpha 1 the activations, and 0.5 makes the two ranges equal."""
    a, w = layer(20, 10, 30)
    amax = {}
    for alpha in (0.0, 0.5, 1.0):
        factors = compute_smooth_factors(a, w, SmoothQuantConfig(alpha))
        smooth_a, smooth_w = smooth_activations(a, factors), smooth_weights(w, factors)
        amax[alpha] = np.abs(smooth_a).max(axis=0), np.abs(smooth_w).max(axis=0)
    np.testing.assert_allclose(amax[0.0][1], 1, rtol=1e-4)
    np.testing.assert_allclose(amax[0.5][0], amax[0.5][1], rtol=0.02)
    np.testing.assert_allclose(amax[1.0][0], 1, rtol=0.02)


# Several weights


@pytest.mark.parametrize("kind", [list, tuple])
def test_weights_that_share_an_input(kind, isa):
    a, w = layer(6, 12, 65)
    parts = kind([w[:1], w[1:7].astype(np.float16), w[7:].astype(np.float64)[:, ::-1][:, ::-1]])
    together = np.concatenate([part.astype(F32) for part in parts])
    assert_same_bits(compute_smooth_factors(a, parts), compute_smooth_factors(a, together))
    assert_same_bits(compute_smooth_factors(a, kind([w])), compute_smooth_factors(a, w))


def test_maximum_in_any_of_several_weights():
    weights = [np.full((2, 3), 0.1), np.full((1, 3), 0.1), np.full((3, 3), 0.1)]
    for j, w in enumerate(weights):
        w[-1, j] = -5
    factors = compute_smooth_factors(np.ones((1, 3)), weights, SmoothQuantConfig(0.0))
    np.testing.assert_allclose(factors, 0.2, rtol=1e-5)


def test_nested_numbers_are_one_matrix():
    a, w = layer(2, 3, 4)
    expected = compute_smooth_factors(a, w)
    for rows in (w.tolist(), tuple(map(tuple, w.tolist())), list(w)):
        assert_same_bits(compute_smooth_factors(a, rows), expected)
    assert_same_bits(compute_smooth_factors(a, [w[:1], w[1:].tolist()]), expected)


# Percentiles and given magnitudes


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 5), (3, 70), (100, 33), (192, 700), (4096, 17), (5000, 20), (70_000, 35)]
)
def test_percentiles(shape, p, isa):
    a, w = layer(shape[0], 2, shape[1])
    expected = reference.smooth_factors(a, w, p=p)
    np.testing.assert_array_max_ulp(compute_smooth_factors(a, w, mode=Percentile(p)), expected, maxulp=1)


@pytest.mark.parametrize("p", [0.3, 0.98])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_percentiles_of_other_floats(dtype, p, isa):
    a, w = layer(300, 2, 77)
    a = a.astype(dtype)
    for view in (a, a[::-1], np.asfortranarray(a), a[:, ::-2]):
        expected = reference.smooth_factors(view, w[:, : view.shape[1]], p=p)
        factors = compute_smooth_factors(view, w[:, : view.shape[1]], mode=Percentile(p))
        np.testing.assert_array_max_ulp(factors, expected, maxulp=1)


@pytest.mark.parametrize("p", [0.5, 0.95])
def test_percentiles_of_many_distributions(p, isa):
    columns = distributions(200, np.random.default_rng(2))
    del columns["every exponent"]
    a = np.stack(list(columns.values()), axis=1)
    w = np.ones((1, a.shape[1]), F32)
    expected = reference.smooth_factors(a, w, 1.0, 1e-10, p)
    factors = compute_smooth_factors(a, w, SmoothQuantConfig(1.0, 1e-10), mode=Percentile(p))
    np.testing.assert_array_max_ulp(factors, expected, maxulp=1)


def test_percentile_1_is_max_abs():
    a, w = layer(50, 4, 33)
    assert_same_bits(compute_smooth_factors(a, w, mode=Percentile(1.0)), compute_smooth_factors(a, w))
    assert_same_bits(compute_smooth_factors(a, w, mode=MaxAbs()), compute_smooth_factors(a, w))


@pytest.mark.parametrize("dtype", [F32, np.float64])
def test_given_magnitudes(dtype, isa):
    a, w = layer(50, 4, 33)
    for p in (0.5, 1.0):
        magnitudes = np.sort(np.abs(a), axis=0)[reference.rank(p, 50)].astype(dtype)
        expected = compute_smooth_factors(a, w, mode=Percentile(p))
        assert_same_bits(compute_smooth_factors(magnitudes, w), expected)
        assert_same_bits(compute_smooth_factors(magnitudes.tolist(), [w[:2], w[2:]]), expected)


# Dead and rarely active channels


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_channels(alpha):
    """Their factor is 1, except with MaxAbs, which follows equation 4 of the paper exactly."""
    a, w = layer(20, 3, 9)
    a[:, [0, 4]] = 0
    a[:, 4] = -0.0
    config = SmoothQuantConfig(alpha)
    exact = compute_smooth_factors(a, w, config)
    np.testing.assert_array_max_ulp(exact, reference.smooth_factors(a, w, alpha), maxulp=1)
    expected = exact.copy()
    expected[[0, 4]] = 1
    assert_same_bits(compute_smooth_factors(a, w, config, mode=Percentile(1.0)), expected)
    assert_same_bits(compute_smooth_factors(np.abs(a).max(axis=0), w, config), expected)
    assert (compute_smooth_factors(a, w, config, mode=Percentile(0.5))[[0, 4]] == 1).all()


@pytest.mark.parametrize("given_as", ["rows", "three axes", "batches", "generator"])
def test_silent_channels_are_warned_of(given_as):
    """By name and with the way out, where the equation makes their factors tiny."""
    a, w = layer(20, 3, 9)
    a[:, [0, 4, 5, 6, 7, 8]] = 0
    forms = {"rows": a, "three axes": a.reshape(4, 5, 9), "batches": [a[:5], a[5:]], "generator": iter([a])}
    x, message = forms[given_as], r"6 of 9 channels were never active: 0, 4, 5, 6, 7, \.\.\.\. .*Percentile"
    with pytest.warns(SilentChannelWarning, match=message) as caught:
        factors = compute_smooth_factors(x, w)
    assert (caught[0].message.channels, caught[0].message.in_features) == ((0, 4, 5, 6, 7, 8), 9)
    assert caught[0].filename == __file__
    np.testing.assert_array_max_ulp(factors, reference.smooth_factors(a, w, 0.5), maxulp=1)


def test_no_warning_where_silent_channels_do_no_harm():
    a, w = layer(20, 3, 9)
    a[:, 4] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_smooth_factors(a, w, SmoothQuantConfig(0.0))
        compute_smooth_factors(a, w, mode=Percentile(1.0))
        compute_smooth_factors(np.abs(a).max(axis=0), w)
        compute_smooth_factors(calibrator_of([a], 9), w)
        compute_smooth_factors(a + 1, w)
        search_alpha(a, w, alphas=[0.5])


def test_the_warning_can_be_copied():
    warning = SilentChannelWarning((1, 2), 9)
    twin = pickle.loads(pickle.dumps(warning))
    assert (twin.channels, twin.in_features, str(twin)) == ((1, 2), 9, str(warning))


# Batches, axes and calibrators


def batches_of(a):
    """The same rows in every form that they may come in."""
    loader = pytest.importorskip("torch.utils.data").DataLoader
    cuts = [a[:7], a[7:7], a[7:10].tolist(), a[10], a[11:]]
    objects = np.empty(2, object)
    objects[:] = [a[:7], a[7:]]
    yield from (cuts, tuple(cuts), iter(cuts), (batch for batch in cuts), dict(enumerate(cuts)).values())
    yield from (collections.deque(cuts), a.reshape(4, 5, -1), [a.reshape(2, 10, -1)], objects)
    yield from (loader(a, batch_size=3), [[a[:7].tolist(), a[7:14].tolist()], a[14:].tolist()])


@pytest.mark.parametrize("mode", [MaxAbs(), Percentile(0.9), Percentile(1.0)], ids=str)
def test_batches_and_axes(mode):
    a, w = layer(20, 3, 9)
    expected = compute_smooth_factors(a, w, mode=mode)
    for x in batches_of(a):
        assert_same_bits(compute_smooth_factors(x, w, mode=mode), expected)
    halves = [a[:8].astype(np.float16), a[8:].astype(np.float16)]
    expected = compute_smooth_factors(np.concatenate(halves), w, mode=mode)
    assert_same_bits(compute_smooth_factors(iter(halves), w, mode=mode), expected)
    assert_same_bits(compute_smooth_factors([halves[0], halves[1].astype(F32)], w, mode=mode), expected)


def test_batches_that_reuse_their_memory():
    a, w = layer(20, 3, 9)
    buffer = np.empty((5, 9), F32)

    def batches():
        for part in np.split(a, 4):
            buffer[...] = part
            yield buffer

    for mode in (MaxAbs(), Percentile(0.8)):
        expected = compute_smooth_factors(a, w, mode=mode)
        assert_same_bits(compute_smooth_factors(batches(), w, mode=mode), expected)


def test_batches_are_streamed():
    w = np.ones((2, 1024), F32)
    tracemalloc.start()
    try:
        compute_smooth_factors((np.ones((1000, 1024), F32) for _ in range(20)), w)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()


def test_factors_from_a_calibrator():
    a, w = layer(200, 3, 9)
    a[:, 3] = 0
    calibrator = calibrator_of(np.split(a, 4), 9)
    expected = compute_smooth_factors(np.abs(a).max(axis=0), w)
    assert_same_bits(compute_smooth_factors(calibrator, w), expected)
    assert_same_bits(compute_smooth_factors(calibrator, w, mode=Percentile(1.0)), expected)
    ranked = calibrator.channel_percentile(0.9)
    actual = compute_smooth_factors(calibrator, [w, w[:1]], mode=Percentile(0.9))
    assert_same_bits(actual, compute_smooth_factors(ranked, w))


@pytest.mark.parametrize("threads", [2, 3, -1])
def test_threads_of_factors(threads):
    a, w = layer(200, 40, 300)
    for mode in (MaxAbs(), Percentile(0.9)):
        expected = compute_smooth_factors(a, w, mode=mode)
        assert_same_bits(compute_smooth_factors(a, w, mode=mode, num_threads=threads), expected)


def test_channel_active_more_rarely_than_the_percentile():
    """Its percentile is 0, so its maximum is taken; else it would dominate the rows where it is active."""
    a, w = layer(100, 3, 5)
    a[:, 2] = 0
    a[17, 2] = 40
    factors = compute_smooth_factors(a, w, mode=Percentile(0.9))
    assert factors[2] == compute_smooth_factors(a, w)[2]
    assert np.abs(a / factors)[17, 2] == np.abs(a[:, 2]).max() / factors[2] < 50


def test_channel_without_weights_does_not_set_the_scales():
    rng = np.random.default_rng(9)
    a, w = rng.standard_normal((20, 9), F32), rng.standard_normal((3, 9), F32)
    w[:, 5] = 0
    for factors in (compute_smooth_factors(a, w), compute_smooth_factors(a, w, mode=Percentile(0.9))):
        smoothed = np.abs(a / factors).max(axis=0)
        assert smoothed[5] < 0.1 * np.delete(smoothed, 5).min()


# On a real layer


def output_sqnr(weight, x, factors):
    """Of the layer's output, in decibels."""
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    return error_metrics(exact, QuantLinear.from_float(weight, smooth=factors)(x)).sqnr_db


@pytest.mark.parametrize("name, plain, smoothed", [("up", 38.7, 42.0), ("down", 27.8, 29.4)])
def test_smoothing_of_a_real_layer(name, plain, smoothed):
    weight, calibration, x = real_layer(name)
    assert output_sqnr(weight, x, None) > plain
    assert output_sqnr(weight, x, compute_smooth_factors(calibration, weight)) > smoothed


@pytest.mark.parametrize("name", ["up", "down"])
def test_massive_token_in_the_calibration_data(name):
    """It ruins factors from maxima, and not those from a percentile, whichever token it is."""
    weight, calibration, x = real_layer(name)
    mode = Percentile(0.99)
    clean = output_sqnr(weight, x, compute_smooth_factors(calibration, weight))
    clean_ranked = output_sqnr(weight, x, compute_smooth_factors(calibration, weight, mode=mode))
    for token in range(0, len(calibration), 16):
        massive = calibration.copy()
        massive[token] *= 200
        assert output_sqnr(weight, x, compute_smooth_factors(massive, weight)) < clean - 6
        ranked = output_sqnr(weight, x, compute_smooth_factors(massive, weight, mode=mode))
        assert ranked > max(clean, clean_ranked) - 0.5


def test_channels_that_become_active_after_calibration():
    """After ReLU some channels are zero in calibration but not later; others are rarely active."""
    weight, calibration, x = real_layer("down")
    calibration, x = np.maximum(calibration, 0), np.maximum(x, 0)
    plain = output_sqnr(weight, x, None)
    active_later = (calibration.max(axis=0) == 0) & (x.max(axis=0) > 0)
    assert active_later.sum() >= 5
    exact = compute_smooth_factors(calibration, weight)
    assert output_sqnr(weight, x, exact) < plain - 10
    for factors in (
        compute_smooth_factors(calibration.max(axis=0), weight),
        compute_smooth_factors(calibration, weight, mode=Percentile(1.0)),
    ):
        assert output_sqnr(weight, x, factors) > plain + 1
    rare = (np.percentile(calibration, 99, axis=0) == 0) & (calibration.max(axis=0) > 0)
    assert rare.sum() >= 20
    ranked = compute_smooth_factors(calibration, weight, mode=Percentile(0.99))
    assert output_sqnr(weight, x, ranked) > plain


# Folding into the norm


def layer_norm(x, gamma, beta):
    centered = x - x.mean(axis=-1, keepdims=True)
    y = centered / np.sqrt(np.square(centered).mean(axis=-1, keepdims=True) + F32(1e-5)) * gamma
    return y if beta is None else y + beta


@pytest.mark.parametrize("with_beta", [True, False])
@pytest.mark.parametrize("exact", [True, False], ids=["powers of two", "any factors"])
def test_folding_equals_smoothing_in_every_call(exact, with_beta, isa):
    rng = np.random.default_rng(8)
    x, w = rng.standard_normal((40, 96), F32), rng.standard_normal((30, 96), F32)
    gamma = rng.uniform(0.1, 30, 96).astype(F32)
    beta = rng.standard_normal(96, F32) if with_beta else None
    before = layer_norm(x, gamma, beta)
    factors = compute_smooth_factors(before, w)
    if exact:
        factors = np.exp2(np.round(np.log2(factors)))
    expected = QuantLinear.from_float(w, smooth=factors)(before)
    gamma_s, beta_s = fold_smooth_factors(factors, gamma, beta)
    assert (beta_s is None) == (beta is None)
    actual = QuantLinear.from_float(smooth_weights(w, factors))(layer_norm(x, gamma_s, beta_s))
    if exact:
        assert_same_bits(actual, expected)
    else:
        # A code may round to the other side of a tie: one scale of one input.
        step = np.abs(before / factors).max() / 127 * np.abs(w * factors).max()
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2 * step)
        assert (np.abs(actual - expected) > step / 100).mean() < 0.02


@pytest.mark.parametrize("dtype", [F32, np.float16, np.float64])
def test_folded_arrays_are_new_and_float32(dtype):
    factors = np.array([2.0, 0.5, 1.0], dtype)
    gamma, beta = np.array([1.0, -3.0, 0.0], dtype), np.array([0.25, 0.0, -0.0], dtype)
    before = [v.tobytes() for v in (factors, gamma, beta)]
    folded = fold_smooth_factors(factors, gamma, beta)
    for actual, given_array in zip(folded, (gamma, beta), strict=True):
        assert_same_bits(actual, given_array.astype(F32) / factors.astype(F32))
        assert not np.may_share_memory(actual, given_array)
    assert [v.tobytes() for v in (factors, gamma, beta)] == before
    assert_same_bits(fold_smooth_factors(np.ones(3), gamma)[0], gamma.astype(F32))


# Smoothing


@each_product
@pytest.mark.parametrize("shape", [(1,), (300,), (1, 1), (3, 65), (2, 3, 31), (2, 4096), (5, 9001)])
def test_smoothing(smooth, shape, isa):
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
@pytest.mark.parametrize("k", [1, 2, 3, 7, 16, 33, 100, 341, 512, 513, 1023, 1024, 1025])
@pytest.mark.parametrize("dtype", [F32, np.float16])
def test_smoothing_of_rows_of_every_length(smooth, k, dtype, isa):
    """Short rows are processed together, as many as fill 1024 columns; here several times and some more."""
    rng = np.random.default_rng(9)
    many = max(1024 // k, 1)
    for m in {1, 2, many - 1, many, many + 1, 3 * many + 1, 5 * many - 1, 37 * many + 2} - {0}:
        x = rng.standard_normal((m, k)).astype(dtype)
        factors = rng.uniform(0.01, 100, k).astype(F32)
        expected = SMOOTH[smooth](x, factors)
        assert_same_bits(smooth(x, factors), expected, m)
        if dtype is F32:
            assert_same_bits(smooth(x, factors, out=x), expected, m)


@each_product
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("shape", [(3, 65), (2, 4099)])
def test_smoothing_of_other_floats(smooth, dtype, shape, isa):
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
    """Subnormal, zero and infinite results, rounded once as IEEE 754 has it."""
    x = np.array([1e-45, -1e-45, 1e-38, 3e38, -3e38, 0.0, -0.0, 1.5, 7e-39], F32)
    for factor in (1e-45, 1e-38, 2.0**-126, 0.3, 3.0, 1e38, 3e38):
        factors = np.full(x.size, factor, F32)
        assert_same_bits(smooth(x, factors), SMOOTH[smooth](x, factors), f"{factor}")


def near_ties(odd, shift):
    """Dividends, in rows, for the divisors ``b = odd << shift``; all are integers of 24 bits.

    They are all those whose quotients are at most 8 / (2**25 * b) from a tie between two floats: with a tie
    at t / 2**24 or t / 2**25, for an odd t, a * 2**24 - b * t or a * 2**25 - b * t is between -8 and 8. For
    each such difference one t modulo a power of two gives an integer a. Where there is none, b fills the gap.
    """
    b, inverse = odd << shift, odd.copy()
    for _ in range(5):  # each doubles the low bits in which odd * inverse is 1
        inverse = inverse * (2 - odd * inverse) & 0xFFFFFFFF
    for bits in (24, 25):
        modulus = 1 << (bits - shift)
        for difference in range(-8 >> shift, (8 >> shift) + 1):
            residue = inverse * -difference % modulus
            for start in range(0, 1 << 25, modulus):
                t = start + residue
                a = (b * t + (difference << shift)) >> bits
                inside = (t >= 1 << 24) & (t % 2 == 1) & (a >= 1 << 23) & (a < 1 << 24)
                if inside.any():
                    yield np.where(inside, a, b)


@pytest.mark.slow
@pytest.mark.parametrize("shift", range(4))
def test_every_quotient_next_to_a_tie(shift):
    """Where a quotient computed by a reciprocal would round to the wrong side, if anywhere."""
    chunk, tried = 1 << 15, 0
    for first in range((1 << 23) >> shift, (1 << 24) >> shift, chunk):
        odd = np.arange(first + 1, first + chunk, 2)
        b = (odd << shift).astype(F32)
        a = np.array(list(near_ties(odd, shift))).astype(F32)
        tried += np.count_nonzero(a != b)
        # The baseline divides. It is tried where it is the only one.
        for isa in ISAS[1:] or ISAS:
            with using(isa):
                assert_same_bits(smooth_activations(a, b), a / b, isa)
    assert tried > 1000


@pytest.mark.parametrize("exponents", [(0, 1), (-60, 60), (-62, -58), (58, 62)])
def test_quotients_of_every_magnitude(exponents, isa):
    """With zeros of both signs, and numbers too small for the fast path, among them."""
    rng = np.random.default_rng(8)
    k = 50_000
    powers = rng.integers(*exponents, k)
    fractions = rng.integers(0, 1 << 23, k)
    fractions[::10] = (1 << 23) - rng.integers(1, 9, k // 10)
    factors = ((1 + fractions * 2.0**-23) * 2.0**powers).astype(F32)
    for rows in (4, 9):
        ties = 1 + (rng.integers(0, 1 << 23, (rows, k)) + 0.5) * 2.0**-23
        x = (ties * factors * 2.0 ** (rng.integers(-62, 62, (rows, k)) - powers)).astype(F32)
        x = (x.view(np.int32) + rng.integers(-1, 2, x.shape, dtype=np.int32)).view(F32)
        x[rng.random(x.shape) < 0.5] *= -1
        x[rng.random(x.shape) < 0.02] = 0
        x[rng.random(x.shape) < 0.02] = -0.0
        x[rng.random(x.shape) < 0.001] *= F32(2.0**-70)
        assert_same_bits(smooth_activations(x, factors), reference.smooth_activations(x, factors))
        x[2, k // 2] = F32(2.0**65)
        assert_same_bits(smooth_activations(x, factors), reference.smooth_activations(x, factors))


@pytest.mark.parametrize("power", [-149, -130, -102, -65, -64, 64, 65, 127])
def test_quotients_of_one_magnitude(power, isa):
    rng, size = np.random.default_rng(7), 2.0**power
    factors = (rng.uniform(1, 2, 256) * 2.0 ** rng.integers(-59, 59, 256)).astype(F32)
    factors[:2] = 2.0**-60, 2.0**60
    x = np.minimum(rng.uniform(1, 2, (4, 256)) * size, np.finfo(F32).max).astype(F32)
    x[:, ::7] = -x[:, ::7]
    assert_same_bits(smooth_activations(x, factors), reference.smooth_activations(x, factors))


@pytest.mark.slow
@each_product
@pytest.mark.parametrize("shape", [(1, 4_300_007), (1030, 4098)])
def test_nontemporal_stores(smooth, shape, isa):
    """Large results are written with nontemporal stores; `out` begins and ends inside a cache line."""
    x = np.random.default_rng(0).standard_normal(shape, F32)
    factors = np.linspace(0.1, 3, shape[1], dtype=F32)
    memory = np.full(x.size + 32, 99, F32)
    out = memory[5 : 5 + x.size].reshape(shape)
    expected = SMOOTH[smooth](x, factors)
    smooth(x, factors, out=out)
    assert_same_bits(out, expected)
    assert (memory[:5] == 99).all()
    assert (memory[5 + x.size :] == 99).all()
    smooth(x, factors, out=x)
    assert_same_bits(x, expected)


@each_product
@pytest.mark.parametrize("shape", [(3, 5), (9, 3000), (300, 200), (2, 100_000), (70_000, 3)], ids=str)
@pytest.mark.parametrize("dtype", [F32, np.float16])
def test_in_one_pass_and_in_threads(smooth, shape, dtype, isa):
    rng = np.random.default_rng(3)
    x = rng.standard_normal(shape).astype(dtype)
    x[-1, -1] = 6e4 if dtype == np.float16 else 1e30  # beyond what is divided by a reciprocal
    factors = rng.uniform(0.1, 3, shape[1]).astype(F32)
    expected = SMOOTH[smooth](x.astype(F32), factors)
    for threads in (1, 3):
        assert_same_bits(smooth(x, factors, num_threads=threads), expected)
        for check in (True, False):
            out = np.full(shape, 99, F32)
            smooth(x, factors, out=out, check_finite=check, num_threads=threads)
            assert_same_bits(out, expected)
            if dtype is F32:
                np.copyto(out, x)
                smooth(out, factors, out=out, check_finite=check, num_threads=threads)
                assert_same_bits(out, expected)


@each_product
def test_without_the_check_nan_is_an_error_all_the_same(smooth, isa):
    x = np.ones((200, 500), F32)
    for index in (0, 77_777, 99_999):
        bad = x.copy()
        bad.flat[index] = np.nan
        out = np.full(x.shape, 99, F32)
        with pytest.raises(NonFiniteError) as caught:
            smooth(bad, np.full(500, 2, F32), out=out)
        assert caught.value.index == index
        assert (out == 99).all()
        with pytest.raises(NonFiniteError) as caught:
            smooth(bad, np.full(500, 2, F32), out=out, check_finite=False)
        assert caught.value.index == index
        with pytest.raises(NonFiniteError):
            smooth(bad, np.full(500, 2, F32))


@each_product
@pytest.mark.parametrize("shape, in_features", [((0, 3), 3), ((1 << 40, 0), 0), ((0,), 0), ((2, 0, 5), 5)])
def test_empty(smooth, shape, in_features):
    factors = np.ones(in_features, F32)
    assert smooth(np.empty(shape, F32), factors).shape == shape
    out = np.empty(shape, F32)
    assert smooth(out, factors, out=out) is out


@each_product
def test_in_place_through_another_view(smooth):
    """Another object over the same elements, such as a memoryview, counts as the same array."""
    x = np.random.default_rng(6).standard_normal((4, 9)).astype(F32)
    factors = np.linspace(1, 2, 9, dtype=F32)
    expected = SMOOTH[smooth](x, factors)
    twin = x.copy()
    smooth(x[:], factors, out=x)
    assert_same_bits(x, expected)
    smooth(memoryview(twin), factors, out=twin)
    assert_same_bits(twin, expected)


@each_product
@pytest.mark.parametrize("kind", [memoryview, Arrayish, Interface, Struct])
def test_memory_of_a_converted_input_is_not_overwritten(smooth, kind):
    memory = np.ones(16, F32)
    x = kind(memory.reshape(2, 8)[:, ::2])
    with pytest.raises(LayoutError, match="out:"):
        smooth(x, np.full(4, 2, F32), out=memory[:8].reshape(2, 4))
    assert (memory == 1).all()


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
def test_factors_are_positive_and_independent_of_token_order(a, w, alpha, order):
    config = SmoothQuantConfig(alpha)
    factors = compute_smooth_factors(a, w, config)
    assert (factors >= F32(1e-5)).all()
    assert_same_bits(compute_smooth_factors(-a[list(order)], w[::-1], config), factors)


def test_factors_that_overflow_float32():
    config = SmoothQuantConfig(1.0, 3e38)
    with pytest.raises(ParameterError, match="within float32"):
        compute_smooth_factors(np.array([[3e38]], np.float32), [[1.0]], config)
