"""QuantLinear made of weights that are quantised already, and what nobody may change about it."""

import numpy as np
import pytest
from helpers.common import F32, assert_same_bits

from dynquant import (
    Calibrator,
    DTypeError,
    DynQuantError,
    DynQuantFormat,
    NonFiniteError,
    QuantLinear,
    dynamic_quantize,
    error_metrics,
    hadamard_transform,
    quantization_mae,
    quantize_weights,
)

RNG = np.random.default_rng(0)
W, X, BIAS = (RNG.standard_normal(shape).astype(F32) for shape in ((8, 64), (5, 64), (8,)))


@pytest.mark.parametrize(
    "options", [{}, {"bits": 4}, {"bits": 4, "group_size": 16, "symmetric": True}], ids=str
)
def test_from_quantized_weights(options):
    layer = QuantLinear(quantize_weights(W, **options), BIAS)
    assert_same_bits(layer(X), QuantLinear.from_float(W, BIAS, **options)(X))


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 16, "search": True}], ids=str)
def test_threads_make_the_same_layer(options):
    layer = QuantLinear.from_float(W, BIAS, **options, num_threads=3)
    assert_same_bits(layer(X), QuantLinear.from_float(W, BIAS, **options)(X))


@pytest.mark.parametrize(
    ("weight", "more"),
    [
        (W, {}),
        (dynamic_quantize(W, DynQuantFormat.INT8_PER_TENSOR), {}),
        (dynamic_quantize(W, DynQuantFormat.int8_per_group(8)), {}),
        (dynamic_quantize(W, DynQuantFormat.INT4_PER_ROW), {}),
        (dynamic_quantize(W.reshape(2, 4, 64)), {}),
        (dynamic_quantize(W[:0]), {}),
        (quantize_weights(W), {"bias": np.zeros(1, F32)}),
        (quantize_weights(W), {"smooth": np.ones(1, F32)}),
        (quantize_weights(W), {"smooth": np.zeros(64, F32)}),
        (quantize_weights(W), {"hadamard": 1}),
    ],
    ids=str,
)
def test_arguments_are_checked(weight, more):
    with pytest.raises(DynQuantError):
        QuantLinear(weight, **more)


@pytest.mark.parametrize("name", ["in_features", "out_features"])
def test_lengths_cannot_be_set(name):
    layer = QuantLinear.from_float(W)
    with pytest.raises(AttributeError):
        setattr(layer, name, 1)
    assert layer(X).shape == (5, 8)


def test_calibration_that_leaves_float32_when_smoothed():
    smooth = np.ones(64, F32)
    smooth[3] = 1e-38
    with pytest.raises(NonFiniteError, match="calibration / smooth"):
        QuantLinear.from_float(W, bits=4, smooth=smooth, calibration=X * 1000)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [np.matrix, lambda out: np.ma.array(out, mask=True, hard_mask=True)])
def test_results_do_not_go_into_masks_and_matrices(kind):
    with pytest.raises(DTypeError, match=r"out: expected a numpy\.ndarray"):
        hadamard_transform(X, out=kind(np.zeros(X.shape, F32)))


def test_nan_among_the_scales_is_an_error_of_the_metrics():
    tensor = dynamic_quantize(X)
    tensor.scales[1] = np.nan
    for measure in (error_metrics, quantization_mae):
        with pytest.raises(NonFiniteError, match=r"quantized\.scales"):
            measure(X, tensor)


def test_saving_leaves_other_files_alone(tmp_path):
    other = tmp_path / "c.npz.partial"
    other.write_text("precious")
    Calibrator().save(tmp_path / "c.npz")
    assert other.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "c.npz.partial"]
