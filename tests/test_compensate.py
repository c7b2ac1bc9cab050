"""Error-compensated rounding: what calibration is worth, and that it never costs."""

import itertools

import numpy as np
import pytest
from helpers.common import assert_same_bits, real_layer

from dynquant import (
    DTypeError,
    EmptyInputError,
    FeatureDimMismatchError,
    NonFiniteError,
    QuantLinear,
    ShapeMismatchError,
    error_metrics,
    hadamard_transform,
    quantize_weights,
    smooth_activations,
    smooth_weights,
)
from dynquant._gptq import SecondMoments

F32 = np.float32


def correlated(rows, k, seed=0):
    """Inputs in a few directions, which is where compensation pays."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, 6)) @ rng.standard_normal((6, k)) + 0.1).astype(F32)


def weights(n, k, seed=1):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(F32)


def output_error(w, tensor, x):
    difference = tensor.dequantize().astype(np.float64) - w
    return float(np.square(x.astype(np.float64) @ difference.T).sum())


# What it is worth


@pytest.mark.parametrize("name", ["up", "down"])
def test_gain_on_the_real_block(name):
    weight, calibration, tokens = real_layer(name)
    exact = tokens.astype(np.float64) @ weight.T.astype(np.float64)

    def sqnr(**options):
        layer = QuantLinear.from_float(weight, bits=4, group_size=32, **options)
        return error_metrics(exact, layer(tokens)).sqnr_db

    plain = sqnr()
    assert plain > sqnr(symmetric=True) + 1
    assert sqnr(calibration=calibration) > plain + 1.5
    assert sqnr(calibration=calibration, hadamard=True) > plain + 2.5


OPTIONS = [
    {"bits": 8},
    {"bits": 4},
    {"bits": 4, "symmetric": True},
    {"bits": 4, "group_size": 16},
    {"bits": 4, "group_size": 16, "symmetric": True},
    {"bits": 4, "group_size": 7},  # a short last group, and groups that begin in the middle of a byte
    {"bits": 4, "group_size": 16, "search": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("k", [40, 33, 1])
def test_less_error_on_inputs_like_those_of_the_calibration(options, k):
    w, x = weights(24, k), correlated(400, k)
    plain = quantize_weights(w, **options)
    compensated = quantize_weights(w, **options, calibration=x[:300])
    assert_same_bits(compensated.scales, plain.scales)
    assert compensated.format == plain.format
    if plain.zero_points is not None:
        assert_same_bits(compensated.zero_points, plain.zero_points)
    assert output_error(w, compensated, x[300:]) <= output_error(w, plain, x[300:]) * (1 if k == 1 else 0.3)


def test_more_columns_than_a_block_are_compensated_across_it():
    w, x = weights(8, 300), correlated(600, 300)
    plain = quantize_weights(w, bits=4, group_size=32)
    compensated = quantize_weights(w, bits=4, group_size=32, calibration=x)
    assert output_error(w, compensated, x) < 0.02 * output_error(w, plain, x)


def test_against_the_textbook():
    """Column by column, with the whole inverse updated after each, at the damping that few rows get."""
    k = 12
    w, x = weights(5, k), correlated(16, k)  # two runs: none is held out, and the damping is 1
    plain = quantize_weights(w, bits=8)
    moments = x.astype(np.float64).T @ x
    order = np.argsort(-moments.diagonal(), kind="stable")
    inverse = np.linalg.inv(moments + moments.diagonal().mean() * np.eye(k))
    left, codes = w.astype(np.float64), np.zeros((5, k), np.int8)
    for place, j in enumerate(order):
        scaled = left[:, j].astype(F32) / plain.scales
        codes[:, j] = np.clip(np.trunc(scaled + np.copysign(F32(0.49999997), scaled)), -127, 127)
        error = (left[:, j] - codes[:, j] * plain.scales) / inverse[j, j]
        later = order[place + 1 :]
        left[:, later] -= np.outer(error, inverse[j, later])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    assert_same_bits(quantize_weights(w, bits=8, calibration=x).data, codes)
    assert (codes != plain.data).any()


def test_noise_that_says_nothing_does_not_harm():
    """Uncorrelated inputs, fewer than columns: whatever is chosen must do no worse on others by much."""
    rng = np.random.default_rng(3)
    w = weights(32, 96)
    x, other = rng.standard_normal((2, 64, 96)).astype(F32)
    plain = output_error(w, quantize_weights(w, bits=4, group_size=32), other)
    assert output_error(w, quantize_weights(w, bits=4, group_size=32, calibration=x), other) < 1.1 * plain


# How the rows may come


def batches_of(x, lengths):
    ends = list(itertools.accumulate(lengths))
    return [x[end - n : end] for end, n in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("lengths", [[64], [1] * 64, [3, 40, 21], [8, 56]])
@pytest.mark.parametrize("kind", [list, tuple, iter, lambda batches: (b for b in batches)])
def test_batches_are_one_array(lengths, kind):
    x, w = correlated(64, 20), weights(6, 20)
    whole = quantize_weights(w, bits=4, group_size=8, calibration=x)
    parts = quantize_weights(w, bits=4, group_size=8, calibration=kind(batches_of(x, lengths)))
    assert_same_bits(parts.data, whole.data)


@pytest.mark.parametrize("lengths", [[1] * 2500, [1023, 2, 1024, 451], [1500, 1000], [5] * 500])
def test_batches_are_added_up_together(lengths):
    x = correlated(2500, 20)
    whole, parts = SecondMoments([x], 20), SecondMoments(iter(batches_of(x, lengths)), 20)
    assert whole.rows == parts.rows
    assert_same_bits(parts.used, whole.used)
    assert_same_bits(parts.held_out, whole.held_out)


@pytest.mark.parametrize(
    "convert", [np.float64, np.float16, np.asfortranarray, np.ndarray.tolist, memoryview]
)
def test_kinds_of_arrays(convert):
    x = np.random.default_rng(0).integers(-3, 4, (64, 20)).astype(F32)
    w = weights(6, 20)
    expected = quantize_weights(w, bits=4, calibration=x)
    assert_same_bits(quantize_weights(w, bits=4, calibration=convert(x)).data, expected.data)


def test_an_iterator_may_refill_one_buffer():
    x = np.random.default_rng(0).integers(-3, 4, (4, 16, 20)).astype(F32)
    w = weights(6, 20)

    def refilled():
        buffer = np.empty((16, 20), F32)
        for batch in x:
            buffer[...] = batch
            yield buffer

    expected = quantize_weights(w, bits=4, calibration=x.reshape(64, 20))
    assert_same_bits(quantize_weights(w, bits=4, calibration=refilled()).data, expected.data)


def test_inputs_are_left_alone():
    w, x = weights(6, 20), correlated(64, 20)
    before = w.copy(), x.copy()
    quantize_weights(w, bits=4, calibration=x)
    assert_same_bits(w, before[0])
    assert_same_bits(x, before[1])


# Where there is little to go by


def test_rows_of_zeros_round_plainly():
    w = weights(6, 20)
    tensor = quantize_weights(w, bits=4, calibration=np.zeros((64, 20), F32))
    assert_same_bits(tensor.data, quantize_weights(w, bits=4).data)


def test_channels_that_are_never_active_and_weights_of_zero():
    w, x = weights(6, 20), correlated(64, 20)
    x[:, 4] = 0
    w[2] = 0
    tensor = quantize_weights(w, bits=4, group_size=5, calibration=x)
    assert np.isfinite(tensor.dequantize()).all()
    assert (tensor.dequantize()[2] == 0).all()


@pytest.mark.parametrize("rows", [1, 8, 24, 25])
def test_few_rows(rows):
    w, x = weights(6, 20), correlated(rows, 20)
    plain, compensated = quantize_weights(w, bits=4), quantize_weights(w, bits=4, calibration=x)
    assert output_error(w, compensated, x) <= output_error(w, plain, x)


def test_magnitudes_from_end_to_end_of_float32():
    w = weights(6, 20)
    for size in (1e-38, 1e36):
        tensor = quantize_weights(w, bits=4, calibration=correlated(64, 20) * F32(size))
        assert np.isfinite(tensor.dequantize()).all()


# In a layer


def test_a_layer_compensates_for_what_its_weights_meet():
    w, x = weights(24, 64), correlated(200, 64)
    factors = np.linspace(0.5, 2, 64, dtype=F32)
    layer = QuantLinear.from_float(w, bits=4, group_size=16, smooth=factors, hadamard=True, calibration=x)
    rotated = hadamard_transform(smooth_weights(w, factors) * layer.signs)
    inputs = hadamard_transform(smooth_activations(x, factors) * layer.signs)
    expected = quantize_weights(rotated, bits=4, group_size=16, calibration=inputs)
    assert_same_bits(layer.to_arrays()["weight_i4"], expected.data)


# Bad calls


@pytest.mark.parametrize(
    "calibration, error, message",
    [
        (np.zeros((0, 20), F32), EmptyInputError, "calibration"),
        ([], EmptyInputError, "calibration: expected at least one array"),
        (iter([]), EmptyInputError, "calibration"),
        (np.zeros((4, 19), F32), FeatureDimMismatchError, "calibration: expected 20"),
        ([np.ones((4, 20)), np.ones((4, 21))], FeatureDimMismatchError, "calibration[1]"),
        (iter([np.ones((4, 20)), np.ones((4, 21))]), FeatureDimMismatchError, "calibration[1]"),
        (np.zeros(20, F32), ShapeMismatchError, "calibration"),
        (np.full((4, 20), np.nan, F32), NonFiniteError, "calibration"),
        (iter([np.ones((4, 20)), np.full((4, 20), np.inf)]), NonFiniteError, "calibration[1]"),
        (np.ones((4, 20), int), DTypeError, "calibration"),
        ("rows", DTypeError, "calibration"),
        (7.0, ShapeMismatchError, "calibration"),
    ],
)
def test_bad_calibration(calibration, error, message):
    with pytest.raises(error) as caught:
        quantize_weights(weights(6, 20), bits=4, calibration=calibration)
    assert message in str(caught.value)


@pytest.mark.parametrize("bits", [8, 4])
def test_errors_pushed_beyond_float32_saturate(bits):
    w = np.sign(weights(5, 12)) * np.linspace(0.3, 3.4, 12, dtype=F32) * F32(1e38)
    tensor = quantize_weights(w, bits=bits, symmetric=True, calibration=correlated(8, 12))
    assert np.isfinite(tensor.dequantize()).all()
