"""search_alpha against every candidate layer, built and measured one by one."""

import collections
import dataclasses
import io
import tracemalloc

import numpy as np
import pytest
from helpers.common import F32, ISAS, assert_same_bits, calibrator_of, real_layer, using

from dynquant import (
    AlphaSearch,
    DTypeError,
    MaxAbs,
    ParameterError,
    Percentile,
    QuantLinear,
    SmoothQuantConfig,
    compute_smooth_factors,
    error_metrics,
    search_alpha,
)

GRID = [i / 20 for i in range(21)]


def layer(tokens, in_features, *outputs, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((tokens, in_features), F32) * np.geomspace(0.1, 30, in_features, dtype=F32)
    return a, [rng.standard_normal((n, in_features), F32) for n in outputs]


def measured(a, weights, factors, relative=False):
    """Squared error of the outputs of all layers, summed over tokens, in float64."""
    total = 0.0
    for w in weights:
        exact = a.astype(np.float64) @ w.astype(np.float64).T
        error = ((QuantLinear.from_float(w, smooth=factors)(a) - exact) ** 2).sum(axis=1)
        total += (error / (exact**2).sum(axis=1) if relative else error).sum()
    return total


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("mode", [MaxAbs(), Percentile(0.9)], ids=["max abs", "percentile"])
@pytest.mark.parametrize("tokens, in_features, outputs", [
    (1, 1, [1]),
    (30, 70, [33]),
    (50, 64, [16, 1, 40]),
    # More rows and outputs than one chunk.
    (200, 2048, [2100]),
])  # fmt: skip
def test_errors_of_every_alpha(tokens, in_features, outputs, mode, relative):
    a, weights = layer(tokens, in_features, *outputs)
    alphas = [0.25, 1, 0.5]
    found = search_alpha(a, weights, alphas=alphas, mode=mode, relative=relative)
    factors = [compute_smooth_factors(a, weights, SmoothQuantConfig(alpha), mode=mode) for alpha in alphas]
    expected = [measured(a, weights, f, relative) for f in factors]
    assert found.alphas == (0.25, 1.0, 0.5)
    np.testing.assert_allclose(found.errors, expected, rtol=1e-9)
    assert found.unsmoothed_error == pytest.approx(measured(a, weights, None, relative), rel=1e-9)
    best = int(np.argmin(expected))
    assert found.alpha == alphas[best]
    assert_same_bits(found.factors, factors[best])


@pytest.mark.parametrize(
    "options",
    [{"bits": 4}, {"bits": 4, "group_size": 8, "symmetric": True}, {"hadamard": True}],
    ids=str,
)
def test_layer_options(options):
    rng = np.random.default_rng(11)
    a, w = rng.standard_normal((30, 24)).astype(F32), rng.standard_normal((9, 24)).astype(F32)
    a[:, 3] *= 30
    found = search_alpha(a, w, alphas=[0.2, 0.7], **options)
    exact = a.astype(np.float64) @ w.T.astype(np.float64)
    for alpha, error in zip(found.alphas, found.errors, strict=True):
        factors = compute_smooth_factors(a, w, SmoothQuantConfig(alpha), mode=Percentile(1.0))
        y = QuantLinear.from_float(w, smooth=factors, **options)(a)
        assert error == pytest.approx(np.square(y - exact).sum(), rel=1e-9)
    y = QuantLinear.from_float(w, **options)(a)
    assert found.unsmoothed_error == pytest.approx(np.square(y - exact).sum(), rel=1e-9)


def test_default_grid():
    a, (w,) = layer(20, 30, 10)
    assert search_alpha(a, w).alphas == tuple(GRID)


def test_one_weight_and_a_list_of_one(isa):
    a, (w,) = layer(20, 30, 10)
    alone, listed = search_alpha(a, w), search_alpha(a, (w,))
    assert alone.errors == listed.errors
    assert_same_bits(alone.factors, listed.factors)


def test_epsilon():
    a, (w,) = layer(20, 30, 10)
    found = search_alpha(a, w, alphas=[0.5], epsilon=0.5)
    assert_same_bits(found.factors, compute_smooth_factors(a, w, SmoothQuantConfig(0.5, 0.5)))


def test_other_floats_and_strides():
    a, (w,) = layer(40, 30, 20)
    half, weight = a.astype(np.float16), w.astype(np.float16)
    expected = search_alpha(half.astype(F32), weight.astype(F32))
    for x, y in (
        (half, weight),
        (half.astype(np.float64), weight),
        (np.asfortranarray(half), weight.tolist()),
    ):
        found = search_alpha(x, y)
        np.testing.assert_allclose(found.errors, expected.errors, rtol=1e-9)
        assert_same_bits(found.factors, expected.factors)


def test_alphas_come_from_any_iterable():
    a, (w,) = layer(5, 6, 4)
    for alphas in (np.array([0.5, 0.25], F32), (0.5, 0.25), (alpha for alpha in (0.5, 0.25))):
        found = search_alpha(a, w, alphas=alphas)
        assert found.alphas == (0.5, 0.25)
        assert {type(value) for value in (found.alpha, *found.alphas, *found.errors)} == {float}


def test_first_of_equal_errors_wins():
    a, w = np.ones((3, 4), F32), np.ones((2, 4), F32)
    found = search_alpha(a, w, alphas=[0.75, 0.25, 0.75])
    assert found.errors == (0.0, 0.0, 0.0)
    assert found.alpha == 0.75


def test_same_result_on_every_instruction_set():
    a, weights = layer(60, 130, 50, 7)
    results = []
    for isa in ISAS:
        with using(isa):
            results.append(search_alpha(a, weights))
    for result in results[1:]:
        assert (result.alpha, result.errors) == (results[0].alpha, results[0].errors)
        assert_same_bits(result.factors, results[0].factors)


@pytest.mark.parametrize("mode", [MaxAbs(), Percentile(0.9)], ids=["max abs", "percentile"])
def test_dead_channels(mode):
    a, (w,) = layer(30, 20, 10)
    a[:, 3] = 0
    found = search_alpha(a, w, mode=mode)
    assert found.factors[3] == 1
    assert np.delete(found.factors == 1, 3).sum() == 0


def test_tokens_with_zero_output():
    a, (w,) = layer(30, 20, 10)
    expected = search_alpha(a, w, relative=True)
    found = search_alpha(np.concatenate([a, np.zeros((5, 20), F32)]), w, relative=True)
    np.testing.assert_allclose(found.errors, expected.errors, rtol=1e-9)
    nothing = search_alpha(np.zeros((5, 20), F32), w, alphas=[0.5], relative=True)
    assert (nothing.errors, nothing.unsmoothed_error) == ((0.0,), 0.0)


def test_relative_errors_weigh_tokens_equally():
    """Scaling a token scales its errors, as long as the factors do not depend on it."""
    a, (w,) = layer(100, 40, 20)
    loud = a.copy()
    loud[7] *= F32(2.0**20)
    mode = Percentile(0.9)
    for relative in (False, True):
        quiet_errors = search_alpha(a, w, mode=mode, relative=relative).errors
        errors = search_alpha(loud, w, mode=mode, relative=relative).errors
        assert np.allclose(errors, quiet_errors, rtol=0.2) == relative


@pytest.mark.parametrize("mode", [MaxAbs(), Percentile(0.9)], ids=str)
@pytest.mark.parametrize("relative", [False, True])
def test_batches_and_axes(mode, relative):
    a, weights = layer(40, 30, 20, 3)
    options = {"mode": mode, "relative": relative, "alphas": [0.3, 0.6]}
    expected = search_alpha(a, weights, **options)
    cuts = [a[:7], a[7:7], a[7:10].tolist(), a[10], a[11:].reshape(-1, 1, 30)]
    loader = pytest.importorskip("torch.utils.data").DataLoader(a, batch_size=7)
    for x in (
        cuts,
        iter(cuts),
        dict(enumerate(cuts)).values(),
        collections.deque(cuts),
        loader,
        a.reshape(2, 20, 30),
    ):
        found = search_alpha(x, weights, **options)
        np.testing.assert_allclose(found.errors, expected.errors, rtol=1e-9)
        assert found.unsmoothed_error == pytest.approx(expected.unsmoothed_error, rel=1e-9)
        assert_same_bits(found.factors, expected.factors)
    assert search_alpha(a.reshape(2, 20, 30), weights, **options).errors == expected.errors


class Batches:
    """An iterable whose batches are made anew each time that it is read."""

    def __init__(self, n, tokens, k):
        self.n, self.tokens, self.k, self.read = n, tokens, k, 0

    def __iter__(self):
        self.read += 1
        rng = np.random.default_rng(0)
        for _ in range(self.n):
            yield rng.standard_normal((self.tokens, self.k), F32)


def test_batches_are_streamed():
    batches, w = Batches(100, 1000, 256), np.ones((2, 256), F32)
    tracemalloc.start()
    try:
        search_alpha(batches, w, alphas=[0.5])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert batches.read == 2
    assert peak < 64 << 20 < 4 * 100 * 1000 * 256


def test_a_calibrator_gives_an_alpha():
    """Factors from all that it has seen, errors on its sample."""
    a, weights = layer(500, 30, 20, 3)
    everything, some = calibrator_of(np.split(a, 5), 30, 1000), calibrator_of(np.split(a, 5), 30, 100)
    expected = search_alpha(a, weights)
    found = search_alpha(everything, weights)
    np.testing.assert_allclose(found.errors, expected.errors, rtol=1e-9)
    assert_same_bits(found.factors, expected.factors)
    for mode in (MaxAbs(), Percentile(0.9)):
        found = search_alpha(some, weights, alphas=[0.5], mode=mode)
        assert_same_bits(found.factors, compute_smooth_factors(some, weights, mode=mode))
        assert found.errors[0] == pytest.approx(measured(some.sample(), weights, found.factors), rel=1e-9)


@pytest.mark.parametrize("threads", [2, -1])
def test_threads(threads):
    a, weights = layer(100, 128, 60, 7)
    expected = search_alpha(a, weights)
    found = search_alpha(a, weights, num_threads=threads)
    assert found.errors == expected.errors
    assert_same_bits(found.factors, expected.factors)


def test_repr():
    a, (w,) = layer(20, 30, 10)
    found = search_alpha(a, w)
    gain = 10 * np.log10(found.unsmoothed_error / min(found.errors))
    expected = f"{gain:.1f} dB less squared error than unsmoothed; 21 tried"
    assert repr(found) == f"AlphaSearch(alpha={found.alpha:g}: {expected})"
    nothing = search_alpha(np.zeros((5, 30), F32), w, alphas=[0.5])
    assert repr(nothing) == "AlphaSearch(alpha=0.5: squared error 0, unsmoothed 0; 1 tried)"


def test_no_array():
    """NumPy would save an object that it cannot read."""
    a, (w,) = layer(5, 6, 4)
    for make in (np.array, lambda x: np.savez(io.BytesIO(), search=x)):
        with pytest.raises(DTypeError, match="got AlphaSearch: factors"):
            make(search_alpha(a, w))


def test_errors_name_the_arguments():
    x = np.ones((3, 4), F32)
    for weights, name in ((x * F32(3e38), "weights"), ([x, x * F32(3e38)], r"weights\[1\]")):
        with pytest.raises(ParameterError, match=f"^{name}: expected"):
            search_alpha(x, weights, alphas=[1.0], hadamard=True)
        with pytest.raises(ParameterError, match=f"^{name}: expected weight"):
            search_alpha(x * F32(8), weights, alphas=[1.0])


def test_the_result_is_frozen():
    a, (w,) = layer(5, 6, 4)
    found = search_alpha(a, w)
    assert isinstance(found, AlphaSearch)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.alpha = 0.1


@pytest.mark.parametrize(
    "tokens, in_features, outputs, n_alphas", [(20_000, 64, 1024, 2), (4, 256, 16_384, 21)]
)
def test_scratch_is_bounded(tokens, in_features, outputs, n_alphas):
    """The outputs of all tokens are not kept, nor the layers of all alphas."""
    a, (w,) = layer(tokens, in_features, outputs)
    assert max(8 * tokens * outputs, n_alphas * w.size) > 80 << 20
    tracemalloc.start()
    try:
        search_alpha(a, w, alphas=np.linspace(0, 1, n_alphas))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20


# On a real layer


def output_sqnr(weight, x, factors):
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    return error_metrics(exact, QuantLinear.from_float(weight, smooth=factors)(x)).sqnr_db


@pytest.mark.parametrize("name", ["up", "down"])
def test_at_least_as_good_as_the_grid_on_a_real_layer(name):
    weight, calibration, _ = real_layer(name)
    found = search_alpha(calibration, weight)
    factors = [compute_smooth_factors(calibration, weight, SmoothQuantConfig(alpha)) for alpha in GRID]
    best = max(output_sqnr(weight, calibration, f) for f in factors)
    assert output_sqnr(weight, calibration, found.factors) >= best
    assert min(found.errors) < 0.7 * found.unsmoothed_error


@pytest.mark.parametrize("name, expected", [("up", 42.0), ("down", 29.4)])
def test_on_unseen_tokens(name, expected):
    """Four calibration tokens of "down" have four fifths of its output power, hence relative errors."""
    weight, calibration, x = real_layer(name)
    found = search_alpha(calibration, weight, relative=True)
    half = compute_smooth_factors(calibration, weight)
    assert output_sqnr(weight, x, found.factors) > max(expected, output_sqnr(weight, x, half))
