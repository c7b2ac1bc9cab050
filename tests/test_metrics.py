"""quantization_mae and error_metrics against float64."""

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, distributions
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import dynquant
from dynquant import DynQuantFormat, DynQuantTensor, Percentile, dynamic_quantize, quantization_mae

FORMATS = [
    DynQuantFormat.INT8_PER_TENSOR,
    DynQuantFormat.INT8_PER_ROW,
    DynQuantFormat.INT4_PER_ROW,
    DynQuantFormat(4, "per_tensor", packed=True),
    DynQuantFormat(4, "per_row", packed=True),
]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=repr)
# Both sides add the same doubles, in different order.
SAME = {"rel": 1e-12, "abs": 0.0}


@each_format
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 65), (1, 4095), (3, 4097), (2, 9000)])
def test_against_float64(fmt, shape, isa):
    for name, x in distributions(int(np.prod(shape)), np.random.default_rng(1)).items():
        if name == "every exponent":  # 127 * scale may round past the largest float
            x = x * F32(0.5)
        x = x.reshape(shape)
        q = dynamic_quantize(x, fmt)
        assert quantization_mae(x, q) == pytest.approx(reference.mae(x, q.dequantize()), **SAME), name


def test_saturation_is_part_of_the_error(isa):
    x = np.arange(1, 101, dtype=F32)
    q = dynamic_quantize(x, DynQuantFormat.INT8_PER_TENSOR, Percentile(0.5))
    error = quantization_mae(x, q)
    assert error == pytest.approx(reference.mae(x, q.dequantize()), **SAME)
    assert error > 12


def test_small_errors_are_not_lost(isa):
    """A million errors of 2**-25 beside one of 1: a float32 sum would lose each of them."""
    n = 1 << 20
    x = np.full(n, 2.0**-25, F32)
    x[0] = 1
    q = DynQuantTensor(np.zeros(n, np.int8), np.ones(1, F32), None, (n,), DynQuantFormat.INT8_PER_TENSOR)
    assert quantization_mae(x, q) == (1 + (n - 1) * 2.0**-25) / n


def test_differences_that_overflow_float32(isa):
    """3e38 against -3e38 overflows in float32."""
    q = DynQuantTensor(np.array([-100], np.int8), np.array([3e36], F32), None, (1,), FORMATS[0])
    x = np.array([3e38], F32)
    assert quantization_mae(x, q) == float(x[0]) - float(q.dequantize()[0])


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats(dtype, isa):
    x = np.random.default_rng(2).standard_normal((3, 5000)).astype(dtype)
    q = dynamic_quantize(x)
    assert quantization_mae(x, q) == pytest.approx(reference.mae(x, q.dequantize()), **SAME)


def test_zero_error():
    x = np.arange(-127, 128, dtype=F32)
    error = quantization_mae(x, dynamic_quantize(x, DynQuantFormat.INT8_PER_TENSOR))
    assert type(error) is float
    assert error == 0.0


@given(
    x=arrays(
        F32,
        array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=30),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    fmt=st.sampled_from(FORMATS),
)
def test_any_matrix(x, fmt):
    before = x.tobytes()
    q = dynamic_quantize(x, fmt)
    assert quantization_mae(x, q) == pytest.approx(reference.mae(x, q.dequantize()), **SAME)
    assert x.tobytes() == before


# error_metrics


def expected_metrics(x, values):
    x, values = np.asarray(x, np.float64), np.asarray(values, np.float64)
    d = x - values
    power, error = (x**2).sum(-1), (d**2).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "mae": np.abs(d).mean(-1),
            "mse": (d**2).mean(-1),
            "max_abs": np.abs(d).max(-1),
            "sqnr_db": 10 * np.log10(power / error),
            "cosine": (x * values).sum(-1) / np.sqrt(power * (values**2).sum(-1)),
        }


def assert_metrics(metrics, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(metrics, name), value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("shape", [(1,), (37,), (3, 50), (2, 3, 4097)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_row"])
def test_error_metrics(shape, packed, per_row, granularity, isa):
    if granularity == "per_row" and len(shape) < 2:
        shape = (1, *shape)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    t = dynquant.dynamic_quantize(x, dynquant.DynQuantFormat(4, granularity), packed=packed)
    values = t.dequantize()
    expected = expected_metrics(*((x, values) if per_row else (x.ravel(), values.ravel())))
    assert_metrics(dynquant.error_metrics(x, t, per_row=per_row), expected)
    metrics = dynquant.error_metrics(x, values.astype(np.float64), per_row=per_row)
    assert_metrics(metrics, expected)
    assert np.shape(metrics.mae) == (shape[:-1] if per_row else ())


def test_cosine_is_at_most_one():
    """Without a bound, rounding would take a few of these above 1."""
    for x in np.random.default_rng(111).standard_normal((100, 8)).astype(F32):
        cosines = [dynquant.error_metrics(x, y).cosine for y in (x, x * F32(2), x * F32(3), -x)]
        assert max(map(abs, cosines)) <= 1
        assert cosines == pytest.approx([1, 1, 1, -1])


@pytest.mark.parametrize("fmt", [DynQuantFormat.INT8_PER_TENSOR, DynQuantFormat.INT8_PER_ROW])
@pytest.mark.parametrize("per_row", [False, True])
def test_dequantized_infinity_is_an_infinite_error(fmt, per_row):
    """127 * (largest / 127) may round to infinity: that is an infinite error, not a bad argument."""
    x = np.full((2, 4), np.finfo(F32).max)
    assert np.isinf(dynquant.error_metrics(x, dynamic_quantize(x, fmt), per_row=per_row).mae).all()


def test_error_metrics_without_error_and_without_signal():
    exact = dynquant.error_metrics([1.0, -2.0], [1.0, -2.0])
    assert (exact.mae, exact.mse, exact.max_abs, exact.sqnr_db) == (0, 0, 0, np.inf)
    assert exact.cosine == pytest.approx(1)
    nothing = dynquant.error_metrics(np.zeros(4), np.zeros(4))
    assert np.isnan([nothing.sqnr_db, nothing.cosine]).all()
    empty = dynquant.error_metrics(np.zeros(0), np.zeros(0))
    assert empty.max_abs == 0
    assert np.isnan([empty.mae, empty.mse, empty.sqnr_db, empty.cosine]).all()
    assert dynquant.error_metrics(np.zeros((0, 3)), np.zeros((0, 3)), per_row=True).mae.shape == (0,)


def test_error_metrics_does_not_overflow_float32():
    metrics = dynquant.error_metrics(np.full(3, 3e38, np.float32), np.full(3, -3e38, np.float32))
    assert metrics.max_abs == pytest.approx(6e38)
    assert metrics.cosine == pytest.approx(-1)


def test_error_metrics_errors():
    with pytest.raises(dynquant.ShapeMismatchError, match="original"):
        dynquant.error_metrics(np.ones(3), np.ones(4))
    with pytest.raises(dynquant.ShapeMismatchError, match="original"):
        dynquant.error_metrics(1.0, 2.0, per_row=True)
    with pytest.raises(dynquant.DTypeError, match="quantized"):
        dynquant.error_metrics(np.ones(3), np.ones(3, int))
    with pytest.raises(dynquant.NonFiniteError, match="quantized"):
        dynquant.error_metrics(np.ones(3), [1, np.nan, 2])


def test_nan_scales_are_refused():
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(F32)
    tensor = dynamic_quantize(x)
    tensor.scales[1] = np.nan
    for measure in (dynquant.error_metrics, quantization_mae):
        with pytest.raises(dynquant.NonFiniteError, match=r"quantized\.scales"):
            measure(x, tensor)
