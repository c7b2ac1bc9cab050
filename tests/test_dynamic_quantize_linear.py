"""dynamic_quantize_linear against results of ONNX Runtime 1.32, and against the operator's definition."""

from pathlib import Path

import numpy as np
import pytest
from helpers.common import F32, assert_same_bits, distributions
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dynquant import DTypeError, NonFiniteError, ParameterError, dynamic_quantize_linear

STORED = np.load(Path(__file__).parent / "data" / "onnx_dynamic_quantize_linear.npz")
CASES = sorted({key.partition(".")[0] for key in STORED.files})


def defined(x):
    """(codes, scale, zero_point) by the definition of the operator DynamicQuantizeLinear."""
    x = np.asarray(x, F32)
    low, high = min(F32(0), x.min(initial=0)), max(F32(0), x.max(initial=0))
    scale = (high - low) / F32(255)
    scale = scale if scale > 0 else F32(1)
    zero_point = np.rint(np.clip(-low / scale, 0, 255)).astype(np.uint8)
    y = np.clip(np.rint(x / scale) + F32(zero_point), 0, 255).astype(np.uint8)
    return y, scale, zero_point


def check(x, expected):
    y, scale, zero_point = dynamic_quantize_linear(x)
    assert_same_bits(y, expected[0])
    assert (type(scale), type(zero_point)) == (np.float32, np.uint8)
    assert (scale, zero_point) == expected[1:]


@pytest.mark.parametrize("case", CASES)
def test_onnx_runtime(case, isa):
    check(STORED[f"{case}.x"], tuple(STORED[f"{case}.{name}"][()] for name in ("y", "scale", "zero_point")))


@pytest.mark.parametrize("n", [0, 1, 2, 31, 64, 4095, 4096, 4097, 10_000])
def test_definition(n, isa):
    for name, x in distributions(n, np.random.default_rng(n)).items():
        if name != "every exponent":  # its range overflows float32
            check(x, defined(x))


@given(arrays(F32, st.integers(0, 90), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_random(x):
    check(x, defined(x))


def test_shapes_and_types():
    x = np.random.default_rng(0).standard_normal((3, 4, 5))
    assert dynamic_quantize_linear(x)[0].shape == (3, 4, 5)
    assert dynamic_quantize_linear(1.5)[0].shape == ()
    half = x.astype(np.float16)
    check(half, defined(half.astype(F32)))


def test_errors():
    with pytest.raises(DTypeError, match="x:"):
        dynamic_quantize_linear(np.arange(3))
    with pytest.raises(NonFiniteError) as caught:
        dynamic_quantize_linear([1.0, 2, float("nan")])
    assert caught.value.index == 2
    with pytest.raises(ParameterError, match="range within float32"):
        dynamic_quantize_linear([3e38, -3e38])
