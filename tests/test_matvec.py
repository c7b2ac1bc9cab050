"""w8a8_matvec against sums of int64."""

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dynquant import dynamic_quantize_int8, w8a8_matvec

# Columns whose products are added up in int32 before they go to int64.
BLOCK = 65_536


def check(weight, weight_scales, activation):
    expected = reference.w8a8_matvec(weight, weight_scales, activation)
    assert_same_bits(w8a8_matvec(weight, weight_scales, activation), expected)
    out = np.full(len(weight), np.nan, F32)
    assert w8a8_matvec(weight, weight_scales, activation, out=out) is out
    assert_same_bits(out, expected)
    return expected


@pytest.mark.parametrize("in_features", [1, 3, 15, 16, 31, 32, 33, 63, 64, 127, 128, 129, 257, 1000, 4097])
@pytest.mark.parametrize("out_features", [1, 2, 3, 4, 5, 7, 64, 65])
def test_sizes(out_features, in_features, isa):
    rng = np.random.default_rng(in_features)
    weight = rng.integers(-128, 128, (out_features, in_features), dtype=np.int8)
    check(weight, rng.standard_normal(out_features).astype(F32), rng.standard_normal(in_features).astype(F32))


@pytest.mark.parametrize("in_features", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 200_000])
@pytest.mark.parametrize("weight", [127, -128, -127])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums(weight, sign, in_features, isa):
    """All codes 127: the sum of 127 * 127 passes 2**31 at 133,145 products."""
    activation = np.full(in_features, sign * 127, F32)
    assert (dynamic_quantize_int8(activation).data == sign * 127).all()
    y = w8a8_matvec(np.full((3, in_features), weight, np.int8), np.ones(3), activation)
    assert y.tolist() == [F32(weight * sign * 127 * in_features)] * 3


def test_a_sum_that_no_int32_holds_is_exact(isa):
    """Above 2**31, and even so apart from its neighbours: one product taken away shows."""
    k = 200_000
    weight = np.full((2, k), 127, np.int8)
    weight[1, 133_333 : 133_333 + 100] = 0
    y = w8a8_matvec(weight, [1, 1], np.full(k, 127, F32))
    assert 127 * 127 * k > 2**31
    assert y.tolist() == [F32(127 * 127 * k), F32(127 * 127 * (k - 100))]


def test_large_sums_cancel_exactly(isa):
    """2**31 and more on either side of zero, and 1 left over."""
    k = 300_001
    weight = np.full((1, k), 127, np.int8)
    weight[0, k // 2 : -1] = -127
    weight[0, -1] = 1
    activation = np.full(k, 127, F32)
    assert w8a8_matvec(weight, [1.0], activation).tolist() == [127.0]


@pytest.mark.parametrize("in_features", [BLOCK - 3, BLOCK + 7, 3 * BLOCK + 29])
def test_random_codes_over_several_blocks(in_features, isa):
    rng = np.random.default_rng(0)
    weight = rng.integers(-128, 128, (5, in_features), dtype=np.int8)
    check(weight, np.array([1, -2, 0.3, 1e-30, 1e30], F32), rng.standard_normal(in_features).astype(F32))


@pytest.mark.parametrize("weight", [-128, -127, -1, 1, 127])
@pytest.mark.parametrize("code", [-127, -1, 1, 127])
def test_every_place_counts(weight, code, isa):
    """One product at each place in turn: none is dropped, doubled, or of the wrong sign."""
    k = 300
    w = np.zeros((k, k), np.int8)
    np.fill_diagonal(w, weight)
    activation = np.full(k, code, F32)
    activation[0] = 127  # keeps the scale at 1
    y = w8a8_matvec(w, np.ones(k), activation)
    assert y.tolist() == [weight * 127, *[weight * code] * (k - 1)]


def test_the_order_of_the_products(isa):
    """float32(sum) * w_scale first: the other order would underflow."""
    y = w8a8_matvec(np.array([[100]], np.int8), [1e-30], np.array([1e-15], F32))
    assert y[0] == F32(100 * 127) * F32(1e-30) * (F32(1e-15) / F32(127))
    assert y[0] > 0


def test_sums_beyond_2_to_24_are_rounded_once(isa):
    k = 4000
    weight = np.full((1, k), 127, np.int8)
    weight[0, -1] = 100
    total = 127 * (127 * (k - 1) + 100)
    assert total > 2**24
    assert int(F32(total)) != total
    assert w8a8_matvec(weight, [1.0], np.full(k, 127, F32)).tolist() == [F32(total)]


@pytest.mark.parametrize("activation", [np.zeros(5, F32), np.full(5, 1e-45, F32)], ids=["zero", "underflow"])
def test_scale_zero(activation, isa):
    y = check(np.full((2, 5), -128, np.int8), np.array([1, 1e30], F32), activation)
    assert y.tolist() == [0, 0]


def test_no_rows():
    assert w8a8_matvec(np.empty((0, 3), np.int8), [], [1.0, 2, 3]).shape == (0,)


@pytest.mark.parametrize("layout", ["F", "strided", "reversed", "read-only"])
def test_layouts_of_the_weight(layout):
    rng = np.random.default_rng(0)
    weight = rng.integers(-128, 128, (6, 50), dtype=np.int8)
    variant = {
        "F": np.asfortranarray(weight),
        "strided": np.repeat(weight, 2, axis=1)[:, ::2],
        "reversed": weight[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": np.frombuffer(weight.tobytes(), np.int8).reshape(6, 50),
    }[layout]
    scales, activation = rng.uniform(0.1, 1, 6), rng.standard_normal(50)
    assert_same_bits(w8a8_matvec(variant, scales, activation), w8a8_matvec(weight, scales, activation))


@given(
    weight=arrays(np.int8, st.tuples(st.integers(1, 9), st.just(70))),
    activation=arrays(F32, 70, elements=st.floats(-100, 100, width=32)),
    data=st.data(),
)
def test_rows_are_independent(weight, activation, data):
    scales = data.draw(arrays(F32, len(weight), elements=st.floats(-10, 10, width=32)))
    before = weight.tobytes(), scales.tobytes(), activation.tobytes()
    y = check(weight, scales, activation)
    for i in range(len(weight)):
        assert_same_bits(w8a8_matvec(weight[i : i + 1], scales[i : i + 1], activation), y[i : i + 1])
    assert (weight.tobytes(), scales.tobytes(), activation.tobytes()) == before
