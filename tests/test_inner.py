"""int8_inner against sums of int64."""

import numpy as np
import pytest
from helpers.common import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from dynquant import DTypeError, LayoutError, ParameterError, ShapeMismatchError, int8_inner

I32, I64 = np.dtype(np.int32), np.dtype(np.int64)
K_BLOCK = 1024
LONGEST = 131_071


def exact(a, b):
    return a.astype(np.int64) @ b.astype(np.int64).T


def random_codes(shape, seed, low=-128):
    return np.random.default_rng(seed).integers(low, 128, shape, dtype=np.int8)


def check(a, b, num_threads=1):
    expected = exact(a, b)
    assert_same_bits(int8_inner(a, b, num_threads=num_threads), expected.astype(I32))
    assert_same_bits(int8_inner(a, b, dtype=I64, num_threads=num_threads), expected)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 31, 64, K_BLOCK - 1, K_BLOCK, K_BLOCK + 1, 2 * K_BLOCK + 3])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 64, 130])
def test_sizes(n, k, isa):
    for m in (1, 2, 3, 5, 65):
        check(random_codes((m, k), m), random_codes((n, k), n))


def test_more_rows_than_a_chunk(isa):
    check(random_codes((330, 70), 0), random_codes((401, 70), 1), num_threads=2)


@pytest.mark.parametrize("k", [7, 300, K_BLOCK + 9])
def test_every_number_of_least_codes(k, isa):
    """-128 is handled apart, few in a row in another way than many, and on either side."""
    a, b = random_codes((70, k), 0, low=-127), random_codes((90, k), 1)
    for r in range(len(a)):
        a[r, np.random.default_rng(r).permutation(k)[: r * r // 8]] = -128
    check(a, b)
    check(b, a)
    check(a, a)


@pytest.mark.parametrize(("x", "y"), [(-128, -128), (-128, 127), (127, -128), (127, 127)])
@pytest.mark.parametrize("shape", [(2, 5), (4, 20)])
def test_the_largest_sums(shape, x, y, isa):
    """Up to the last int32, and int64 beyond."""
    for k in (LONGEST, LONGEST + 2):
        a, b = (np.full((rows, k), code, np.int8) for rows, code in zip(shape, (x, y), strict=True))
        dtypes = [I32, I64] if k == LONGEST else [I64]
        for dtype in dtypes:
            assert_same_bits(int8_inner(a, b, dtype=dtype), np.full(shape, x * y * k, dtype))


def test_codes_that_alternate(isa):
    a = np.resize(np.array([127, -127, -128, 127, -128], np.int8), (66, 2051))
    check(a, np.resize(np.array([-128, 127], np.int8), (67, 2051)))


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 70), st.integers(0, 2**31), st.booleans())
def test_is_numpy_inner(m, n, k, seed, wide):
    a, b = random_codes((m, k), seed), random_codes((n, k), seed + 1)
    dtype = np.int64 if wide else np.int32
    expected = np.inner(a.astype(dtype), b.astype(dtype))
    assert_same_bits(int8_inner(a, b, dtype=dtype), expected)
    out = np.full((m, n), 77, dtype)
    assert int8_inner(a, b, dtype=dtype, out=out) is out
    assert_same_bits(out, expected)


def test_inputs_of_any_layout():
    a, b = random_codes((40, 60), 0), random_codes((80, 30), 1)
    y = exact(a[::2, ::2], b[::-1])
    assert int8_inner(a[::2, ::2], b[::-1]).tolist() == y.tolist()
    assert int8_inner(np.asfortranarray(a[::2, ::2]), memoryview(b)[::-1]).tolist() == y.tolist()


def test_memory_around_out():
    memory = np.full((22, 33), 77, I32)
    a, b = random_codes((20, 50), 0), random_codes((33, 50), 1)
    int8_inner(a, b, out=memory[1:21])
    assert memory[1:21].tolist() == exact(a, b).tolist()
    assert (memory[[0, 21]] == 77).all()


@pytest.mark.parametrize("dtype", ["int32", "i4", I32, int, "int64", I64])
def test_names_of_dtypes(dtype):
    a = random_codes((3, 4), 0)
    assert int8_inner(a, a, dtype=dtype).dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", [None, np.int8, np.int16, np.uint32, np.float32, "f8", "x", 3, ">i4"])
def test_other_dtypes(dtype):
    a = random_codes((3, 4), 0)
    with pytest.raises(ParameterError, match=r"^dtype: expected np.int32 or np.int64, got "):
        int8_inner(a, a, dtype=dtype)


def test_sums_that_int32_does_not_hold():
    a, out = np.zeros((2, LONGEST + 1), np.int8), np.full((2, 2), 77, I32)
    with pytest.raises(ParameterError, match=r"^dtype: expected np\.int64, .*131,071, got .*k = 131,072"):
        int8_inner(a, a, out=out)
    assert (out == 77).all()
    assert int8_inner(a, a, dtype=np.int64).tolist() == [[0, 0], [0, 0]]
    assert int8_inner(a[:, 1:], a[:, 1:]).dtype == I32


@pytest.mark.parametrize(
    ("error", "message", "a", "b", "out"),
    [
        (DTypeError, "a: expected dtype int8", np.zeros((2, 3), np.uint8), None, None),
        (DTypeError, "b: expected dtype int8", None, [[1, 2, 3]], None),
        (ShapeMismatchError, r"a: expected shape \(m, k\)", np.zeros(3, np.int8), None, None),
        (ShapeMismatchError, r"b: expected shape \(n, k\)", None, np.zeros((1, 2, 3), np.int8), None),
        (ShapeMismatchError, r"b: expected shape \('n', 3\)", None, np.zeros((2, 4), np.int8), None),
        (ShapeMismatchError, "out: expected shape", None, None, np.full((2, 3), 77, I32)),
        (DTypeError, "out: expected dtype int32", None, None, np.full((2, 2), 77, I64)),
        (LayoutError, "out: expected a C-contiguous", None, None, np.full((2, 2), 77, I32).T),
        (LayoutError, "out: expected a C-contiguous", None, None, np.full((4, 4), 77, I32)[::2, ::2]),
    ],
)
def test_errors(error, message, a, b, out):
    plain = np.zeros((2, 3), np.int8)
    with pytest.raises(error, match=message):
        int8_inner(plain if a is None else a, plain if b is None else b, out=out)
    assert out is None or (out == 77).all()


def test_out_that_overlaps():
    memory = np.zeros(64, np.int8)
    a = memory[8:24].reshape(4, 4)
    with pytest.raises(LayoutError, match="overlap"):
        int8_inner(a, a[:2], out=memory[:32].view(I32).reshape(4, 2))
    with pytest.raises(LayoutError, match="read-only"):
        out = np.zeros((4, 4), I32)
        out.flags.writeable = False
        int8_inner(a, a, out=out)


@pytest.mark.parametrize("num_threads", [0, -2, 1.5, "2", True])
def test_bad_number_of_threads(num_threads):
    with pytest.raises(ParameterError, match="num_threads:"):
        int8_inner(np.zeros((2, 2), np.int8), np.zeros((2, 2), np.int8), num_threads=num_threads)
