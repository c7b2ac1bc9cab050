"""`dynquant.torch.observe`, and what `quantize` makes of it."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

import dynquant  # noqa: E402
from dynquant import (  # noqa: E402
    Calibrator,
    FeatureDimMismatchError,
    InvalidAlphaError,
    NonFiniteError,
    ParameterError,
)
from dynquant.torch import QuantLinear, observe, quantize, summary  # noqa: E402


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        q, k, v = self.query(x), self.key(input=x), self.value(x)
        return self.out(torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v)


def attention():
    torch.manual_seed(0)
    return Attention()


def batches(n=4, scale=1.0):
    rng = torch.Generator().manual_seed(5)
    gains = torch.logspace(-1.5, 1.5, 64)
    return [scale * gains * torch.randn(2, 16, 64, generator=rng) for _ in range(n)]


def seen_by(model, inputs, **options):
    with observe(model, **options) as seen, torch.no_grad():
        for x in inputs:
            model(x)
    return seen


def test_layers_of_one_input_share_what_is_kept():
    model, inputs = attention(), batches(2)
    seen = seen_by(model, inputs)
    assert sorted(seen) == ["key", "out", "query", "value"]
    assert seen["query"] is seen["key"] is seen["value"] is not seen["out"]
    assert np.array_equal(seen["query"], torch.cat(inputs).reshape(-1, 64).numpy())
    assert not model.query._forward_pre_hooks


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_statistics_are_those_of_every_row(mode):
    model, inputs = attention(), batches()
    with observe(model, rows=0) as seen, mode():
        for x in inputs:
            model(x)
    expected = Calibrator(channels=64)
    expected.update(torch.cat(inputs).numpy())
    found = seen["key"].stats()
    assert seen["key"] is seen["query"] and (found.min, found.p99) == (
        expected.stats().min,
        expected.stats().p99,
    )
    assert np.array_equal(seen["key"].channel_amax(), expected.channel_amax())


def test_rows_are_a_fair_sample_in_bounded_memory():
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer)
    n, kept = 4000, 500
    x = torch.arange(n, dtype=torch.float32).reshape(n, 1).expand(n, 32)
    seen = seen_by(model, x.split(130), rows=kept)["0"]
    again = seen_by(model, x.split(130), rows=kept)["0"]
    assert seen.shape == (kept, 32) and np.array_equal(seen, again)
    values = seen[:, 0]
    assert len(set(values)) == kept  # none twice
    # The mean of a sample of 500 from 0 .. 3999 has a deviation of 48.
    assert abs(values.mean() - (n - 1) / 2) < 5 * 48


def test_layers_that_part_keep_what_they_saw_together():
    a, b = nn.Linear(32, 32), nn.Linear(32, 32)
    model = nn.ModuleDict({"a": a, "b": b})
    x, y = torch.ones(2, 32), torch.zeros(3, 32)
    with observe(model) as seen:
        a(x), b(x)
        b(y)
    assert seen["a"].shape == (2, 32) and seen["b"].shape == (5, 32)


def test_inputs_changed_in_between_are_not_shared():
    a, b = nn.Linear(32, 32), nn.Linear(32, 32)
    x = torch.ones(2, 32)
    with observe(nn.ModuleDict({"a": a, "b": b})) as seen, torch.no_grad():
        a(x)
        b(x.mul_(2))
    assert (seen["a"] == 1).all() and (seen["b"] == 2).all()


def test_hooks_go_when_the_model_raises():
    model = attention()
    with pytest.raises(NonFiniteError, match=r"^input of query"), observe(model) as seen:
        model(torch.full((1, 2, 64), torch.nan))
    assert seen == {} and not model.query._forward_pre_hooks


@pytest.mark.parametrize("options", [{"rows": -1}, {"rows": 1.5}, {"rows": True}, {"include": "nothing"}])
def test_options_of_observe(options):
    with pytest.raises(ParameterError), observe(attention(), **options):
        pass
    with pytest.raises(ParameterError, match="a linear layer to observe"), observe(nn.ReLU()):
        pass


# quantize


def error(model, expected, x):
    with torch.no_grad():
        return dynquant.error_metrics(expected.numpy(), model.value(x).numpy()).sqnr_db


@pytest.mark.parametrize("smooth", [0.5, "search"])
@pytest.mark.parametrize("recipe", [{}, {"bits": 4, "group_size": 32, "hadamard": True}])
def test_calibrated_layers_lose_less(smooth, recipe):
    x = torch.cat(batches(2, 1.1))
    plain, calibrated, seen = attention(), attention(), seen_by(attention(), batches())
    with torch.no_grad():
        expected = plain.value(x)
    quantize(plain, **recipe)
    quantize(calibrated, calibration=seen, smooth=smooth, **recipe)
    assert error(calibrated, expected, x) > error(plain, expected, x) + 1
    assert calibrated.query.smooth is not None
    assert torch.equal(calibrated.query.smooth, calibrated.value.smooth)
    assert not torch.equal(calibrated.query.smooth, calibrated.out.smooth)


def test_smoothing_by_statistics_and_by_rows_is_the_same():
    by_rows, by_statistics = attention(), attention()
    quantize(by_rows, calibration=seen_by(by_rows, batches(), rows=1000), smooth=0.5)
    quantize(by_statistics, calibration=seen_by(by_statistics, batches(), rows=0), smooth=0.5)
    assert torch.equal(by_rows.key.smooth, by_statistics.key.smooth)
    weights = [getattr(attention(), name).weight.detach().numpy() for name in ("query", "key", "value")]
    rows = torch.cat(batches()).reshape(-1, 64).numpy()
    assert torch.equal(by_rows.key.smooth, torch.from_numpy(dynquant.compute_smooth_factors(rows, weights)))


def test_4_bits_are_compensated():
    model, seen = attention(), seen_by(attention(), batches())
    weight = model.out.weight.detach().numpy().copy()
    quantize(model, bits=4, group_size=32, calibration=seen)
    expected = dynquant.quantize_weights(weight, bits=4, group_size=32, calibration=seen["out"])
    assert np.array_equal(model.out.weight.numpy().view(np.uint8), expected.data)


def test_summary_has_the_worst_layer_first():
    model, seen = attention(), seen_by(attention(), batches())
    quantize(model, calibration={name: seen[name] for name in ("query", "out")})
    layers = summary(model).layers
    sqnr = [layer.sqnr_db for layer in layers]
    assert [layer.name for layer in layers[2:]] == ["key", "value"] and sqnr[2:] == [None, None]
    assert 20 < sqnr[0] < sqnr[1] < 60
    assert f"{sqnr[0]:.1f}" in str(summary(model)).splitlines()[2]


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"other": np.ones((2, 64), np.float32)}, {}, ParameterError, "got 'other'"),
        (
            {"out": np.ones((2, 63), np.float32)},
            {},
            FeatureDimMismatchError,
            "expected 64 in_features, got 63",
        ),
        ({"out": np.full((2, 64), np.nan, np.float32)}, {}, NonFiniteError, r"^calibration\['out'\]"),
        ({"out": np.ones((0, 64), np.float32)}, {}, ParameterError, r"^calibration\['out'\]: .*one row"),
        ({"out": Calibrator(channels=64)}, {"smooth": 0.5}, ParameterError, "got an empty one"),
        ({"out": Calibrator(channels=3)}, {"smooth": 0.5}, FeatureDimMismatchError, r"\.channels"),
        ({}, {"smooth": 1.5}, InvalidAlphaError, "1.5"),
        ({}, {"smooth": "best"}, ParameterError, "^smooth: expected"),
    ],
)
def test_calibration_that_cannot_be(change, options, error, message):
    model = attention()
    seen = {**seen_by(model, batches(1)), **change}
    with pytest.raises(error, match=message):
        quantize(model, calibration=seen, **options)
    assert type(model.query) is nn.Linear


def test_calibration_of_another_type():
    model = attention()
    for value in (3, "query", {}):
        with pytest.raises(ParameterError, match=r"^calibration: expected"):
            quantize(model, calibration=value)
    with pytest.raises(ParameterError, match=r"^smooth: expected None without calibration"):
        quantize(model, smooth=0.5)
    with pytest.raises(ParameterError, match="expected rows, as from observe"):
        quantize(model, calibration=seen_by(model, batches(1), rows=0), smooth="search")
    assert type(model.query) is nn.Linear


def test_rows_may_be_tensors():
    model, rows = attention(), torch.cat(batches(1)).reshape(-1, 64)
    quantize(model, calibration={"out": rows.bfloat16(), "query": rows.reshape(2, 16, 64)})
    assert isinstance(model.out, QuantLinear) and summary(model).layers[0].sqnr_db > 20


@pytest.mark.parametrize("options", [{"rows": 512}, {"rows": 0}])
def test_layers_without_rows_are_quantized_without_calibration(options):
    """Such as an expert that no row was sent to."""
    model = attention()
    with observe(model, **options) as seen, torch.no_grad():
        model.query(batches(1)[0])
        model.out(torch.empty(0, 64))
    assert list(seen) == ["query"]
    quantize(model, calibration=seen, smooth=0.5)
    assert type(model.out) is QuantLinear and model.out.smooth is None
    assert model.query.smooth is not None
