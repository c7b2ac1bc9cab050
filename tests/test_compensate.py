"""Error-compensated rounding: what calibration is worth, and that it never costs."""

import collections
import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
from helpers.common import ISAS, assert_same_bits, real_layer, using

from dynquant import (
    Calibrator,
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
from dynquant._compensate import SecondMoments, _factor, _is_held_out

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
    compensated = sqnr(calibration=calibration)
    assert compensated > plain + 2
    assert sqnr(calibration=calibration, hadamard=True) > plain + 3
    # One massive token among the calibration rows changes next to nothing.
    calibration[100] *= 300
    assert sqnr(calibration=calibration) > compensated - 0.05
    assert sqnr(calibration=calibration, relative=False) < compensated - 0.5


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
    assert compensated.format == plain.format
    if not options.get("search"):
        assert_same_bits(compensated.scales, plain.scales)
    if not options.get("search") and plain.zero_points is not None:
        assert_same_bits(compensated.zero_points, plain.zero_points)
    assert output_error(w, compensated, x[300:]) <= output_error(w, plain, x[300:]) * (1 if k == 1 else 0.3)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("name", ["up", "down"])
def test_a_search_finds_better_codes_and_ranges(name, hadamard):
    weight, calibration, tokens = real_layer(name)
    exact = tokens.astype(np.float64) @ weight.T.astype(np.float64)
    options = {"bits": 4, "group_size": 32, "hadamard": hadamard, "calibration": calibration}
    sqnr = [
        error_metrics(exact, QuantLinear.from_float(weight, **options, search=search)(tokens)).sqnr_db
        for search in (False, True)
    ]
    assert sqnr[1] > sqnr[0] + 0.3


@pytest.mark.parametrize("k", [1, 5, 128, 300])
def test_the_factor_in_place_is_that_of_numpy(k):
    x = np.random.default_rng(0).standard_normal((2 * k, k))
    h = (x.T @ x + np.eye(k)).astype(F32)
    expected = np.linalg.cholesky(h.astype(np.float64))
    _factor(h)
    np.testing.assert_allclose(np.tril(h), expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(np.linalg.LinAlgError):
        _factor(-h)


@pytest.mark.parametrize("rotated", [False, True])
def test_memory_is_three_matrices_and_a_block_of_outputs(rotated):
    k, n = 1536, 3000
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((n, k), dtype=F32), rng.standard_normal((512, k), dtype=F32)
    tracemalloc.start()
    QuantLinear.from_float(w, bits=4, group_size=32, calibration=x, search=True, hadamard=rotated)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 4 * k * k + (48 << 20) + (4 * n * k if rotated else 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_codes_on_every_instruction_set_and_number_of_threads(options, num_threads, isa):
    w, x = weights(300, 65), correlated(300, 65)
    with using("baseline"):
        expected = quantize_weights(w, **options, calibration=x)
    with using(isa):
        tensor = quantize_weights(w, **options, calibration=x, num_threads=num_threads)
    assert_same_bits(tensor.data, expected.data)
    assert_same_bits(tensor.scales, expected.scales)


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
    diagonal = moments.diagonal()
    moments = moments + np.diag(np.sqrt(diagonal * diagonal.mean()))
    order = np.argsort(-moments.diagonal(), kind="stable")
    inverse = np.linalg.inv(moments)
    left, codes = w.astype(np.float64), np.zeros((5, k), np.int8)
    for place, j in enumerate(order):
        scaled = left[:, j].astype(F32) / plain.scales
        codes[:, j] = np.clip(np.trunc(scaled + np.copysign(F32(0.49999997), scaled)), -127, 127)
        error = (left[:, j] - codes[:, j] * plain.scales) / inverse[j, j]
        later = order[place + 1 :]
        left[:, later] -= np.outer(error, inverse[j, later])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    assert_same_bits(quantize_weights(w, bits=8, calibration=x, relative=False).data, codes)
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


class Loader:
    """What has nothing but ``__iter__``, as data loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


ITERABLES = {
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda batches: (batch for batch in batches),
    "map": lambda batches: map(np.asarray, batches),
    "deque": collections.deque,
    "values of a dict": lambda batches: dict(enumerate(batches)).values(),
    "data loader": Loader,
    "lists in a list": lambda batches: [batch.tolist() for batch in batches],
    "empty batches among others": lambda batches: [
        np.empty((0, 20), F32),
        [],
        *batches,
        np.empty((2, 0, 20)),
    ],
    "each in a list": lambda batches: [[batch] for batch in batches],
    "sentences": lambda batches: [batch.reshape(-1, 1, 20) for batch in batches],
    "rows one by one": lambda batches: [row for batch in batches for row in batch],
}


@pytest.mark.parametrize("lengths", [[64], [1] * 64, [3, 40, 21], [8, 56]])
@pytest.mark.parametrize("kind", ITERABLES.values(), ids=ITERABLES)
def test_batches_are_one_array(lengths, kind):
    x, w = correlated(64, 20), weights(6, 20)
    whole = quantize_weights(w, bits=4, group_size=8, calibration=x)
    parts = quantize_weights(w, bits=4, group_size=8, calibration=kind(batches_of(x, lengths)))
    assert_same_bits(parts.data, whole.data)


@pytest.mark.parametrize("lengths", [[1] * 2500, [1023, 2, 1024, 451], [1500, 1000], [5] * 500])
@pytest.mark.parametrize("relative", [True, False])
def test_batches_are_added_up_together(lengths, relative):
    x = correlated(2500, 20)
    whole, parts = SecondMoments([x], 20, relative), SecondMoments(iter(batches_of(x, lengths)), 20, relative)
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


def test_any_number_of_leading_axes():
    x, w = correlated(64, 20), weights(6, 20)
    expected = quantize_weights(w, bits=4, calibration=x)
    for shape in ((4, 16, 20), (2, 4, 8, 20), (1, 64, 20)):
        assert_same_bits(quantize_weights(w, bits=4, calibration=x.reshape(shape)).data, expected.data)
    layer = QuantLinear.from_float(w, bits=4, calibration=x.reshape(4, 16, 20), smooth=np.ones(20, F32))
    assert_same_bits(layer.to_arrays()["weight_i4"], expected.data)


def test_one_row():
    x, w = correlated(1, 20), weights(6, 20)
    expected = quantize_weights(w, bits=4, calibration=x)
    for row in (x[0], x[0].tolist(), tuple(x[0])):
        assert_same_bits(quantize_weights(w, bits=4, calibration=row).data, expected.data)


def test_tensors_and_data_loaders_of_torch():
    torch = pytest.importorskip("torch")
    x, w = correlated(64, 20), weights(6, 20)
    expected = quantize_weights(w, bits=4, calibration=x)
    tensor = torch.from_numpy(x)
    data = torch.utils.data
    for calibration in (
        tensor,
        tensor.reshape(4, 16, 20),
        data.DataLoader(tensor, batch_size=24),
        data.DataLoader(data.TensorDataset(tensor), batch_size=24),
        data.DataLoader(tensor.reshape(4, 16, 20), batch_size=3),
    ):
        assert_same_bits(quantize_weights(w, bits=4, calibration=calibration).data, expected.data)


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


# Rows that say nothing, and rows that say too much


@pytest.mark.parametrize("relative", [True, False])
def test_rows_of_zeros_are_as_if_they_were_not_there(relative):
    x, w = correlated(500, 20), weights(6, 20)
    rng = np.random.default_rng(0)
    padded = np.zeros((1500, 20), F32)
    padded[np.sort(rng.permutation(1500)[:500])] = x
    expected = quantize_weights(w, bits=4, calibration=x, relative=relative)
    for batches in (padded, np.split(padded, [7, 8, 400])):
        assert_same_bits(
            quantize_weights(w, bits=4, calibration=batches, relative=relative).data, expected.data
        )


def test_no_period_lines_up_with_the_rows_held_out():
    held_out = _is_held_out(np.arange(1 << 16))
    assert held_out.mean() == 0.25
    assert not _is_held_out(np.arange(24)).any()
    for period in range(2, 300):
        whole = held_out[: len(held_out) // period * period].reshape(-1, period)
        assert whole.mean(axis=0).min() > 0.13, period
        assert whole.mean(axis=0).max() < 0.37, period


@pytest.mark.parametrize("sentence", [8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("padding", ["zeros", "one vector", "a long vector"])
def test_padding_does_not_decide(sentence, share, padding):
    x = correlated(4096, 64, seed=2)
    size = {"zeros": 0, "one vector": 1, "a long vector": 50}[padding]
    is_padding = np.arange(3072) % sentence >= sentence * (1 - share)
    calibration = x[:3072].copy()
    calibration[is_padding] = size * np.random.default_rng(4).standard_normal(64)
    w, other = weights(32, 64), x[3072:]
    plain = output_error(w, quantize_weights(w, bits=4, group_size=32), other)
    found = quantize_weights(w, bits=4, group_size=32, calibration=calibration)
    assert output_error(w, found, other) < 0.3 * plain


@pytest.mark.parametrize("size", [300, 1e6, 1e30])
@pytest.mark.parametrize("index", [0, 25, 511])
@pytest.mark.parametrize("direction", ["its own", "another", "one channel"])
def test_a_massive_token_does_not_decide(size, index, direction):
    rng = np.random.default_rng(2)
    mix = 0.93 ** np.arange(64)[:, np.newaxis] * rng.standard_normal((64, 64))
    x, w = (rng.standard_normal((1024, 64)) @ mix).astype(F32), weights(32, 64)
    calibration, other = x[:512].copy(), x[512:]
    without = output_error(w, quantize_weights(w, bits=4, group_size=32, calibration=calibration), other)
    if direction == "another":
        calibration[index] = rng.standard_normal(64)
    if direction == "one channel":
        calibration[index] = np.arange(64) == 7
    calibration[index] *= F32(size)
    found = quantize_weights(w, bits=4, group_size=32, calibration=calibration)
    # A direction that no other row has is a share of what is to be got right; the size is not.
    assert output_error(w, found, other) < (1.5 if direction == "another" else 1.1) * without


def test_the_massive_token_decides_unless_relative():
    rng = np.random.default_rng(2)
    mix = 0.93 ** np.arange(64)[:, np.newaxis] * rng.standard_normal((64, 64))
    x, w = (rng.standard_normal((1024, 64)) @ mix).astype(F32), weights(32, 64)
    x[25] = (np.arange(64) == 7) * F32(1000)
    errors = [
        output_error(w, quantize_weights(w, bits=4, group_size=32, calibration=x[:512], relative=r), x[512:])
        for r in (True, False)
    ]
    assert errors[1] > 2 * errors[0]


def test_rows_count_by_their_squared_length_unless_relative():
    x = correlated(64, 12) * np.linspace(1, 20, 64, dtype=F32)[:, np.newaxis]
    absolute, relative = SecondMoments([x], 12, relative=False), SecondMoments([x], 12, relative=True)
    exact = x.astype(np.float64)
    unit = np.square(exact).sum(axis=1).max()
    np.testing.assert_allclose(
        absolute.used + absolute.held_out, exact.T @ exact / unit, rtol=1e-4, atol=1e-6
    )
    exact /= np.sqrt(np.square(exact).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(relative.used + relative.held_out, exact.T @ exact, rtol=1e-4, atol=1e-5)


# Weights of zero


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pruned_weights_stay_pruned(options):
    w, x = weights(24, 40), correlated(300, 40)
    pruned = np.random.default_rng(5).random(w.shape) < 0.5
    w[pruned] = 0
    w[3] = -0.0
    plain = quantize_weights(w, **options)
    tensor = quantize_weights(w, **options, calibration=x)
    assert (tensor.dequantize()[w == 0] == 0).all()
    assert output_error(w, tensor, x) < 0.5 * output_error(w, plain, x)


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


@pytest.mark.parametrize("rows", [1, 8, 24, 25, 32])
def test_few_rows(rows):
    w, x = weights(6, 20), correlated(rows, 20)
    plain, compensated = quantize_weights(w, bits=4), quantize_weights(w, bits=4, calibration=x)
    assert output_error(w, compensated, x) <= output_error(w, plain, x)


def test_magnitudes_from_end_to_end_of_float32():
    w = weights(6, 20)
    x = correlated(64, 20)
    for size in (2.0**-100, 2.0**-60, 2.0**60, 2.0**120):
        for relative in (True, False):
            expected = quantize_weights(w, bits=4, calibration=x, relative=relative)
            tensor = quantize_weights(w, bits=4, calibration=x * F32(size), relative=relative)
            assert_same_bits(tensor.data, expected.data)
    tensor = quantize_weights(w, bits=4, calibration=np.concatenate([x * F32(1e-40), x * F32(1e37)]))
    assert np.isfinite(tensor.dequantize()).all()


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100, 2.0**120])
def test_weights_from_end_to_end_of_float32(size):
    w, x = weights(6, 20), correlated(64, 20)
    expected = quantize_weights(w, bits=4, calibration=x)
    assert_same_bits(quantize_weights(w * F32(size), bits=4, calibration=x).data, expected.data)


# In a layer


def test_a_layer_compensates_for_what_its_weights_meet():
    """As from rows that are smoothed and rotated before, but for the basis in which damping is added."""
    w, x = weights(24, 64), correlated(600, 64)
    factors = np.linspace(0.5, 2, 64, dtype=F32)
    options = {"bits": 4, "group_size": 16}
    layer = QuantLinear.from_float(w, **options, smooth=factors, hadamard=True, calibration=x[:300])
    rotated = hadamard_transform(smooth_weights(w, factors) * layer.signs)
    inputs = hadamard_transform(smooth_activations(x, factors) * layer.signs)
    expected = quantize_weights(rotated, **options, calibration=inputs[:300])
    found = dataclasses.replace(expected, data=layer.to_arrays()["weight_i4"])
    plain = output_error(rotated, quantize_weights(rotated, **options), inputs[300:])
    assert output_error(rotated, expected, inputs[300:]) < 0.1 * plain
    assert output_error(rotated, found, inputs[300:]) < 0.1 * plain


def test_rows_of_a_calibrator():
    a, w = correlated(300, 20), weights(6, 20)
    calibrator = Calibrator(20, rows=100)
    for batch in np.split(a, 3):
        calibrator.update(batch)
    expected = quantize_weights(w, bits=4, calibration=calibrator.sample())
    assert_same_bits(quantize_weights(w, bits=4, calibration=calibrator).data, expected.data)
    layer = QuantLinear.from_float(w, bits=4, calibration=calibrator)
    assert_same_bits(layer.weight_dequantized(), expected.dequantize())


def test_arrays_of_unequal_lengths():
    """Batches in an object array, and in nested lists, as NumPy and JSON give them."""
    a, w = correlated(300, 20), weights(6, 20)
    expected = quantize_weights(w, bits=4, calibration=[a[:100], a[100:]]).data
    objects = np.empty(2, object)
    objects[:] = [a[:100], a[100:]]
    for calibration in (objects, [a[:100].tolist(), a[100:].tolist()]):
        assert_same_bits(quantize_weights(w, bits=4, calibration=calibration).data, expected)


# Bad calls


@pytest.mark.parametrize(
    "calibration, error, message",
    [
        (np.zeros((0, 20), F32), EmptyInputError, "calibration"),
        ([], EmptyInputError, "calibration: expected at least one row"),
        ([np.zeros((0, 20), F32), []], EmptyInputError, "calibration: expected at least one row"),
        (iter([]), EmptyInputError, "calibration"),
        (np.zeros((4, 19), F32), FeatureDimMismatchError, "calibration: expected 20"),
        ([np.ones((4, 20)), np.ones((4, 21))], FeatureDimMismatchError, "calibration[1]"),
        (iter([np.ones((4, 20)), np.ones((4, 21))]), FeatureDimMismatchError, "calibration[1]"),
        (np.zeros(19, F32), FeatureDimMismatchError, "calibration: expected 20"),
        (np.zeros((4, 20, 1), F32), FeatureDimMismatchError, "calibration: expected 20"),
        (np.full((4, 20), np.nan, F32), NonFiniteError, "calibration"),
        (iter([np.ones((4, 20)), np.full((4, 20), np.inf)]), NonFiniteError, "calibration[1]"),
        (np.ones((4, 20), int), DTypeError, "calibration"),
        ("rows", DTypeError, "calibration"),
        (7.0, ShapeMismatchError, "calibration"),
        (object(), DTypeError, "calibration: expected an array or an iterable of arrays, got object"),
        (np.full((4, 20), None), DTypeError, "calibration"),
        ([np.ones((4, 20)), np.ones((4, 20), np.int8)], DTypeError, "calibration[1]"),
        ([np.ones((4, 20)), np.full((4, 20), None)], DTypeError, "calibration[1]"),
        ([np.ones((4, 20)), "rows"], DTypeError, "calibration[1]"),
        ([np.ones((4, 20)), F32(7)], ShapeMismatchError, "calibration[1]"),
        ({"x": np.ones((4, 20))}, DTypeError, "calibration[0]"),
        (b"rows", DTypeError, "calibration"),
    ],
)
def test_bad_calibration(calibration, error, message):
    with pytest.raises(error) as caught:
        quantize_weights(weights(6, 20), bits=4, calibration=calibration)
    assert message in str(caught.value)


def test_an_iterable_that_raises():
    def batches():
        yield np.ones((4, 20))
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        quantize_weights(weights(6, 20), bits=4, calibration=batches())


@pytest.mark.parametrize("bits", [8, 4])
def test_errors_pushed_beyond_float32_saturate(bits):
    w = np.sign(weights(5, 12)) * np.linspace(0.3, 3.4, 12, dtype=F32) * F32(1e38)
    tensor = quantize_weights(w, bits=bits, symmetric=True, calibration=correlated(8, 12))
    assert np.isfinite(tensor.dequantize()).all()
