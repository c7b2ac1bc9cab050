"""hadamard_transform against the dense matrix."""

import numpy as np
import pytest
from helpers.common import F32, ISAS, assert_same_bits, using
from hypothesis import given
from hypothesis import strategies as st

from dynquant import (
    DTypeError,
    LayoutError,
    NonFiniteError,
    ParameterError,
    ShapeMismatchError,
    hadamard_transform,
)


def matrix(n):
    """The orthonormal Hadamard matrix (n, n) in Sylvester's order; n is a power of two."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def rotated(x, block):
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    return (blocks @ matrix(block)).reshape(x.shape)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8, 12, 16, 24, 64, 96, 384, 1024, 4096, 11008])
def test_dense_matrix(n, isa):
    x = normal(3, n)
    np.testing.assert_allclose(hadamard_transform(x), rotated(x, n & -n), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64])
def test_blocks(block, isa):
    x = normal(2, 3, 64)
    np.testing.assert_allclose(hadamard_transform(x, block_size=block), rotated(x, block), atol=2e-6)


def test_block_of_one_is_the_identity():
    x = normal(4, 5)
    assert_same_bits(hadamard_transform(x), x)


@given(rows=st.integers(0, 5), log=st.integers(0, 9), odd=st.sampled_from([1, 3, 5]))
def test_instruction_sets_agree_and_twice_is_the_identity(rows, log, odd):
    x = normal(rows, odd << log, seed=log)
    with using("baseline"):
        y = hadamard_transform(x)
    for isa in ISAS:
        with using(isa):
            assert_same_bits(hadamard_transform(x), y, isa)
    np.testing.assert_allclose(hadamard_transform(y), x, atol=1e-5)


def test_products_are_preserved():
    x, w = normal(5, 256), normal(7, 256, seed=1)
    np.testing.assert_allclose(hadamard_transform(x) @ hadamard_transform(w).T, x @ w.T, atol=1e-4)


def test_an_outlier_is_distributed_evenly():
    x = np.zeros(128, F32)
    x[5] = 8
    np.testing.assert_allclose(np.abs(hadamard_transform(x)), 8 / np.sqrt(128), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (8,), (2, 3, 8)])
def test_shapes(shape):
    assert hadamard_transform(np.zeros(shape, F32)).shape == shape


def test_out_and_in_place():
    x = normal(3, 48)
    y = hadamard_transform(x)
    out = np.full(x.shape, np.nan, F32)
    assert hadamard_transform(x, out=out) is out
    assert_same_bits(out, y)
    strided = np.repeat(x, 2, axis=1)[:, ::2]
    assert_same_bits(hadamard_transform(strided), y)
    assert hadamard_transform(x, out=x) is x
    assert_same_bits(x, y)


@pytest.mark.parametrize("block_size", [0, -2, 3, 6, 16, 2.0, "8", True, 2**70])
def test_bad_block_sizes(block_size):
    with pytest.raises(ParameterError, match="block_size"):
        hadamard_transform(np.ones(24, F32), block_size=block_size)


def test_block_sizes_of_empty_rows():
    assert hadamard_transform(np.empty((3, 0), F32), block_size=4).shape == (3, 0)
    with pytest.raises(ParameterError, match="block_size"):
        hadamard_transform(np.empty((3, 0), F32), block_size=2**70)


def test_errors_change_nothing():
    memory = np.ones(16, F32)
    out = np.full((2, 4), 7, F32)
    bad = np.array([[1, 2, 3, 4], [1, np.inf, 3, 4]], F32)
    with pytest.raises(NonFiniteError) as caught:
        hadamard_transform(bad, out=out)
    assert caught.value.index == 5
    with pytest.raises(ParameterError, match="within float32"):
        hadamard_transform(np.full((2, 4), 1e38, F32), out=out)
    with pytest.raises(DTypeError):
        hadamard_transform(np.ones((2, 4), np.int8), out=out)
    with pytest.raises(ShapeMismatchError):
        hadamard_transform(F32(1))
    with pytest.raises(ShapeMismatchError):
        hadamard_transform(np.ones((2, 8), F32), out=out)
    with pytest.raises(LayoutError):
        hadamard_transform(memory[:8], out=memory[4:12])
    assert (out == 7).all() and (memory == 1).all()
