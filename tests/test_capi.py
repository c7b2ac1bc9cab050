"""The functions of the C table: signatures, which never change, results and refusals."""

import concurrent.futures
import ctypes
import os
import threading

import numpy as np
import pytest
from helpers import reference
from helpers.capi import (
    ADDRESSES,
    BAD_ARGUMENT,
    FUNCTIONS,
    NON_FINITE,
    OK,
    SIZE,
    VERSION,
    arguments_of,
    call,
    header_signatures,
    number,
    packed_groups,
    packed_int4,
    packed_minimums,
    packed_weights,
    pointer_of,
    pxd_signatures,
    read,
)
from helpers.common import F32, ISAS, array_at, assert_same_bits, distributions, memory, using

import dynquant
from dynquant import Percentile, capi

SNAPSHOT = os.path.join(os.path.dirname(__file__), "data", "capi_signatures.txt")
# Around the vector lengths of every instruction set and the blocks of the kernels, and one long odd length.
LENGTHS = [*range(70), 95, 127, 128, 129, 255, 257, 4095, 4096, 4097, 9001]
NAN, INF = np.nan, np.inf
LARGEST = np.finfo(F32).max


# Signatures


def frozen():
    return [line for line in read(SNAPSHOT).splitlines() if not line.startswith("#")]


def test_signatures_equal_the_snapshot():
    """Compiled programs rely on names, order and types, so lines are only appended to the snapshot."""
    assert header_signatures()[: len(frozen())] == frozen()
    assert header_signatures()[len(frozen()) :] == [], "append these to the snapshot"


def test_pxd_and_header_agree():
    assert pxd_signatures() == header_signatures()
    constants = {"API_VERSION": VERSION, "OK": OK, "NON_FINITE": NON_FINITE, "BAD_ARGUMENT": BAD_ARGUMENT}
    pxd, header = (
        read(capi.__file__.partition(".cpython")[0] + ".pxd"),
        read(dynquant.get_include() + "/dynquant.h"),
    )
    for name, value in {**constants, "DOT": 0, "COSINE": 1, "L2": 2}.items():
        assert f"    DYNQUANT_{name} = {value}\n" in pxd
        assert f"#define DYNQUANT_{name} {value}\n" in header


def test_version_and_size():
    assert VERSION == 1
    assert len(ADDRESSES) * ctypes.sizeof(ctypes.c_void_p) == SIZE - 8


def test_both_interfaces_are_the_same_functions():
    """The functions that Cython binds by name have the addresses in the table."""
    name_of = ctypes.pythonapi.PyCapsule_GetName
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    exported = dict(capi.__pyx_capi__)
    del exported["dynquant_api_version"]
    addresses = {name: pointer_of(capsule, name_of(capsule)) for name, capsule in exported.items()}
    assert addresses == dict(zip((f"dynquant_{name}" for name in FUNCTIONS), ADDRESSES, strict=True))


# Results


def floats(n, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * 2.0 ** rng.integers(-9, 9, n)).astype(F32)


class Guarded:
    """Memory of `n_bytes` for a result, with 64 guard bytes on each side."""

    def __init__(self, n_bytes, offset):
        self.whole = memory(n_bytes + 128, offset)
        self.whole[:] = 77
        self.result = self.whole[64 : 64 + n_bytes]

    def check(self, expected):
        assert self.result.tobytes() == expected.tobytes()
        assert (self.whole[:64] == 77).all()
        assert (self.whole[64 + self.result.size :] == 77).all()


@pytest.mark.parametrize("name", distributions(1, np.random.default_rng(0)))
def test_magnitudes_and_scales(isa, name):
    for n in [1, 2, 17, 4096, 4097, 70_001]:
        x = array_at(4, distributions(n, np.random.default_rng(n))[name])
        amax, scale = number(), number()
        call("amax_f32", x, n, amax)
        assert amax[0] == np.abs(x).max()
        call("amax_scale_f32", x, n, 7, scale)
        assert_same_bits(scale, reference.scale(x, 7).reshape(1))
        for p in (1e-9, 0.5, 0.99, 1.0):
            magnitude = number()
            call("percentile_f32", x, n, p, magnitude)
            assert magnitude[0] == np.sort(np.abs(x))[reference.rank(p, n)]
            call("percentile_scale_f32", x, n, p, 127, scale)
            assert_same_bits(scale, reference.scale(x, 127, p).reshape(1))


def test_rank_of_a_percentile_in_a_long_row():
    """p * n is a float32 up to 2**24 elements, a float64 above; all zeros but for the ranks in question."""
    for n in (2**24, 2**24 + 1):
        for p in (0.7, 0.123456789):
            assert Percentile(p).rank(n) == reference.rank(p, n)
    x, magnitude = np.zeros(2**24 + 1, F32), number()
    x[-2:] = 1, 2
    call("percentile_f32", x, x.size, 1 - 1 / x.size, magnitude)
    assert magnitude[0] == np.sort(x)[reference.rank(1 - 1 / x.size, x.size)]


@pytest.mark.parametrize("offset", [0, 4, 60])
@pytest.mark.parametrize("byte", [0, 1, 33])
def test_quantize_and_dequantize(isa, offset, byte):
    """Nothing is written outside a result, at any address."""
    for n in LENGTHS:
        x = array_at(offset, floats(n, n))
        scale = reference.scale(x, 127)
        for clip in (127, 7, 1):
            codes = Guarded(n, byte)
            call("quantize_row_f32_s8", x, n, scale, clip, codes.result)
            codes.check(reference.codes(x, scale, clip))
        values, own = Guarded(4 * n, 4), number()
        codes = array_at(byte, np.arange(n).astype(np.int8))
        call("dequantize_row_s8_f32", codes, n, scale, values.result)
        values.check(reference.dequantize(codes, np.array([scale])))
        codes = Guarded(n, byte)
        call("dynamic_quantize_row_f32_s8", x, n, codes.result, own)
        codes.check(reference.codes(x, scale, 127))
        assert own[0] == scale


@pytest.mark.parametrize("byte", [0, 1, 33])
def test_nibbles(isa, byte):
    for n in LENGTHS:
        x = floats(n, n)
        scale, own = reference.scale(x, 7), number()
        expected = reference.pack(reference.codes(x, scale, 7))
        packed = Guarded(expected.size, byte)
        call("quantize_row_f32_s4", x, n, scale, packed.result)
        packed.check(expected)
        packed = Guarded(expected.size, byte)
        call("dynamic_quantize_row_f32_s4", x, n, packed.result, own)
        packed.check(expected)
        assert own[0] == scale
        packed = array_at(byte, np.random.default_rng(n).integers(0, 256, (n + 1) // 2, np.uint8))
        codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:n].astype(np.int8)
        values = Guarded(4 * n, 4)
        call("dequantize_row_s4_f32", packed, n, 0.3, values.result)
        values.check(reference.dequantize(np.where(codes > 7, codes - 16, codes), np.array([F32(0.3)])))


def test_scale_zero_and_scales_at_the_ends_of_float32(isa):
    x = np.array([0, 1e-45, -1e-45, 1, -LARGEST, LARGEST, 1e-30], F32)
    for scale in (0, 1e-45, 1e-38, 1, 1e38, LARGEST):
        codes = np.full(x.size, 77, np.int8)
        call("quantize_row_f32_s8", x, x.size, F32(scale), 127, codes)
        assert_same_bits(codes, reference.codes(x, F32(scale), 127))


@pytest.mark.parametrize("lowest", [-127, -128])
def test_dot(isa, lowest):
    rng = np.random.default_rng(3)
    for n in [*LENGTHS, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16 + 77]:
        for offset in (0, 1, 31):
            a, b = (array_at(offset, rng.integers(lowest, 128, n, dtype=np.int8)) for _ in "ab")
            expected = int(np.dot(a.astype(np.int64), b.astype(np.int64)))
            assert FUNCTIONS["dot_s8s8_s64"](a, b, n) == expected


@pytest.mark.parametrize(("a", "b"), [(-128, -128), (-128, 127), (127, -128), (127, 127), (-127, -128)])
def test_dot_of_extremes(isa, a, b):
    """Pairs that would saturate int16, and sums that would overflow int32."""
    n = 300_001
    assert FUNCTIONS["dot_s8s8_s64"](np.full(n, a, np.int8), np.full(n, b, np.int8), n) == n * a * b


@pytest.mark.parametrize("lowest", [-127, -128])
@pytest.mark.parametrize("k", [0, 1, 31, 64, 300, 70_001])
def test_matvec(isa, k, lowest):
    rng = np.random.default_rng(k)
    w, a = rng.integers(-128, 128, (5, k), dtype=np.int8), rng.integers(lowest, 128, k, dtype=np.int8)
    a[:1] = lowest
    w_scales, out = floats(5), np.full(5, 77, F32)
    call("w8a8_matvec", w, w_scales, 5, k, a, 0.3, out)
    sums = w.astype(np.int64) @ a.astype(np.int64)
    expected = sums.astype(F32) * w_scales * F32(0.3) if k else np.zeros(5, F32)
    assert_same_bits(out, expected)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (4, 33, 64), (9, 16, 130), (2, 3, 70_001), (5, 4, 0), (0, 3, 4)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_matmul_of_packed_weights(isa, shape, with_bias):
    m, n, k = shape
    rng = np.random.default_rng(n)
    w, x = rng.integers(-128, 128, (n, k), dtype=np.int8), floats(m * k).reshape(m, k)
    w_scales, bias = floats(n), floats(n, 1) if with_bias else None
    expected = reference.w8a8_matmul(w, w_scales, x, bias)
    for offset in (0, 1, 37):
        packed, scratch = (
            packed_weights(w, offset),
            memory(FUNCTIONS["w8a8_scratch_bytes"](m, k), 63 - offset),
        )
        out = np.full((m, n), 77, F32)
        call("w8a8_matmul", packed, w_scales, bias, x, m, n, k, scratch, out)
        assert_same_bits(out, expected)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (3, 5, 7, 3), (4, 33, 64, 32), (9, 16, 130, 128), (2, 3, 20_001, 9000), (0, 3, 4, 4)],
)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matmul_of_packed_4_bit_weights(isa, shape, symmetric, with_bias):
    m, n, k, group = shape
    w, x, bias = floats(n * k, 2).reshape(n, k), floats(m * k).reshape(m, k), floats(n, 1)
    weight = dynquant.quantize_weights(w, bits=4, group_size=group, symmetric=symmetric)
    bias = bias if with_bias else None
    codes, scales, zero_points = reference.quantize_weights(w, 4, group, symmetric)
    expected = reference.w4a8_matmul(codes, scales, zero_points, group, x, bias)
    for offset in (0, 1, 37):
        packed = packed_int4(weight, offset)
        scratch = memory(FUNCTIONS["w4a8_scratch_bytes"](m, k, group), 63 - offset)
        out = np.full((m, n), 77, F32)
        call("w4a8_matmul", packed, bias, x, m, n, k, group, scratch, out)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 33, 64, 32), (9, 16, 130, 128), (2, 3, 20_001, 9000)])
def test_matmul_of_4_bit_weights_with_minimums(isa, shape):
    m, n, k, group = shape
    rng = np.random.default_rng(0)
    scales, minimums = (rng.standard_normal((n, -(-k // group))).astype(F32) for _ in range(2))
    codes, x = rng.integers(0, 16, (n, k), dtype=np.int8), floats(m * k).reshape(m, k)
    fmt = dynquant.DynQuantFormat.int4_per_group_packed(group)
    data = reference.pack(codes, per_row=True)
    weight = dynquant.DynQuantTensor(data, scales, None, (n, k), fmt, minimums)
    expected = reference.w4a8_matmul(codes, scales, minimums, group, x, floats(n, 1))
    for offset in (0, 37):
        packed, out = packed_minimums(weight, offset), np.full((m, n), 77, F32)
        scratch = memory(FUNCTIONS["w4a8_scratch_bytes"](m, k, group), 63 - offset)
        call("w4a8_matmul", packed, floats(n, 1), x, m, n, k, group, scratch, out)
        assert_same_bits(out, expected)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (4, 33, 64, 32), (9, 16, 130, 2**62), (2, 3, 40_001, 36_000), (3, 2, 0, 5)]
)
@pytest.mark.parametrize("symmetric", [0, 1])
def test_matmul_of_8_bit_weights_in_groups(isa, shape, symmetric):
    m, n, k, group = shape
    rng, size = np.random.default_rng(0), min(group, max(k, 1))
    codes, x = rng.integers(-128, 128, (n, k), dtype=np.int8), floats(m * k).reshape(m, k)
    scales, bias = rng.standard_normal((n, -(-k // size))).astype(F32), floats(n, 1)
    expected = np.tile(bias, (m, 1))
    if k and symmetric:
        expected = reference.w4a8_matmul(codes, scales, None, size, x, bias)
    elif k:
        expected = reference.w8a8_asymmetric(codes, scales, size, x, bias)
    for offset in (0, 37):
        packed, out = packed_groups(codes, scales, group, symmetric, offset), np.full((m, n), 77, F32)
        scratch = memory(FUNCTIONS["w8a8_groups_scratch_bytes"](m, k, group), 63 - offset)
        shape = m, n, k, group
        call("w8a8_groups_matmul", packed, bias, x, *shape, symmetric, scratch, out)
        assert_same_bits(out, expected)
        # What was packed for other activations is not found.
        other = FUNCTIONS["w8a8_groups_matmul"](packed, bias, x, *shape, not symmetric, scratch, out)
        assert other == BAD_ARGUMENT


def test_no_byte_outside_packed_groups_and_scratch_is_written(isa):
    m, n, k, group = 5, 35, 129, 20
    rng = np.random.default_rng(0)
    w, scales = rng.integers(-128, 128, (n, k), dtype=np.int8), np.ones((n, 7), F32)
    x, out = np.ones((m, k), F32), np.empty((m, n), F32)
    for symmetric in (0, 1):
        for offset in range(0, 64, 7):
            size = FUNCTIONS["w8a8_groups_packed_bytes"](n, k, group, symmetric)
            packed = Guarded(size, offset)
            scratch = Guarded(FUNCTIONS["w8a8_groups_scratch_bytes"](m, k, group), offset)
            call("w8a8_groups_pack", w, scales, n, k, group, symmetric, packed.result)
            shape = m, n, k, group, symmetric
            call("w8a8_groups_matmul", packed.result, None, x, *shape, scratch.result, out)
            packed.check(packed.result)
            scratch.check(scratch.result)


def test_range_of_a_row_beyond_float32():
    arguments = arguments_of("w8a8_groups_matmul")
    arguments[2][:2] = -LARGEST, LARGEST
    check_refused("w8a8_groups_matmul", arguments, BAD_ARGUMENT)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (1, 40, 65), (38, 67, 1001), (67, 38, 2050)])
def test_int8_inner(isa, shape):
    m, n, k = shape
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 128, (rows, k), dtype=np.int8) for rows in (m, n))
    expected = a.astype(np.int64) @ b.astype(np.int64).T
    for offset in (0, 37):
        scratch = Guarded(FUNCTIONS["int8_inner_scratch_bytes"](m, n, k), offset)
        for name, dtype in (("int8_inner_s32", np.int32), ("int8_inner_s64", np.int64)):
            out = np.full((m, n), 77, dtype)
            call(name, a, b, m, n, k, scratch.result, out)
            assert_same_bits(out, expected.astype(dtype))
            scratch.check(scratch.result)


def test_int8_inner_refuses_sums_beyond_int32():
    k = 131_072
    a, out = np.full((3, k), -128, np.int8), np.full((3, 3), 77, np.int32)
    scratch = memory(FUNCTIONS["int8_inner_scratch_bytes"](3, 3, k), 0)
    assert FUNCTIONS["int8_inner_s32"](a, a, 3, 3, k, scratch, out) == BAD_ARGUMENT
    assert (out == 77).all()
    wide = np.empty((3, 3), np.int64)
    call("int8_inner_s64", a, a, 3, 3, k, scratch, wide)
    assert (wide == 2**14 * k).all()


SEARCHES = [  # bits, group_size, symmetric
    (8, None, True),
    (4, None, False),
    (4, 32, False),
    (4, 32, True),
    (4, 1, False),
    (4, 7, True),
]


def corpus_of(vectors, bits, group_size, symmetric):
    if bits == 8:
        return dynquant.dynamic_quantize(vectors)
    return dynquant.quantize_weights(vectors, bits=4, group_size=group_size, symmetric=symmetric)


def searched(queries, corpus, k, metric=0, allowed=None, bias=None, offset=0):
    """What top_k of the table finds, with scratch in which no byte outside is written."""
    (m, d), n = queries.shape, len(corpus)
    bits, group = (4, corpus.format.group_of(d)) if corpus.format.packed else (8, d)
    scratch = Guarded(FUNCTIONS["top_k_scratch_bytes"](m, n, d, bits, group, k), offset)
    scores, indices = np.full((m, k), 77, F32), np.full((m, k), 77, np.int64)
    stride = n if allowed is not None and allowed.ndim == 2 else 0
    arrays = queries, corpus.data, corpus.scales, corpus.zero_points, bias, allowed, stride
    call("top_k", *arrays, m, n, d, bits, group, metric, k, scratch.result, scores, indices)
    scratch.check(scratch.result)
    return scores, indices


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SEARCHES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 700, 67), (5, 700, 67), (70, 700, 40), (3, 0, 9), (0, 9, 9)]
)
def test_top_k(isa, bits, group_size, symmetric, shape):
    """The same bits as the Python function, in every mode of the driver, and with fewer vectors than k."""
    m, n, d = shape
    rng = np.random.default_rng(n)
    half, queries = (rng.standard_normal((rows, d)).astype(F32) for rows in ((n + 2) // 2, m))
    vectors = np.concatenate([half, half])  # equal scores
    corpus = corpus_of(vectors, bits, group_size, symmetric)[:n]
    masks = [None, rng.random(n) < 0.3, rng.random((m, n)) < 0.02, np.zeros(n, bool)]
    for number_, metric in enumerate(["dot", "cosine", "l2"]):
        for i, allowed in enumerate(masks):
            for k in (0, 1, 10, n + 3):
                found = searched(queries, corpus, k, number_, allowed, offset=37 * (i % 2))
                expected = dynquant.top_k(queries, corpus, max(k, 1), metric=metric, allowed=allowed)
                for mine, theirs in zip(found, expected, strict=True):
                    assert_same_bits(mine, theirs[:, :k])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("m", [1, 9])
def test_top_k_of_a_centered_index(isa, bits, m, tmp_path):
    """From the files of the index: its bias is added to the products with the centered queries."""
    rng = np.random.default_rng(0)
    vectors, queries = (rng.standard_normal((n, 20)).astype(F32) for n in (300, m))
    index = dynquant.EmbeddingIndex(20, bits=bits, center="mean")
    index.add(vectors + 1)
    index.save(tmp_path / "index")
    arrays = {path.name.split("-")[0]: np.load(path, mmap_mode="r") for path in tmp_path.glob("index/*.npy")}
    corpus = corpus_of(vectors, bits, None, False)
    corpus.data[:], corpus.scales[:] = arrays["codes"], arrays["scales"]
    if bits == 4:
        corpus.zero_points[:] = arrays["zero_points"]
    center = arrays["center"]
    scores, indices = searched(queries - center, corpus, 7, bias=arrays["bias"])
    expected = index.search(queries, 7)
    assert_same_bits(indices, expected[1])
    np.testing.assert_allclose(scores + (queries @ center)[:, None], expected[0], rtol=1e-4, atol=1e-4)


def test_top_k_refuses_what_it_cannot_search():
    def refused(changes, status=BAD_ARGUMENT):
        arguments = arguments_of("top_k")
        for position, value in changes.items():
            arguments[position] = value
        check_refused("top_k", arguments, status)

    zeros = np.zeros(2, np.uint8)
    refused({3: zeros})  # zero points with 8 bits
    refused({4: None, 3: zeros + 16, 10: 4})  # above 15
    for metric in (1, 2):  # only dot products take a bias
        refused({12: metric})
    for flags in ([0, 0, 0, 2], [255, 1, 1, 1]):
        refused({5: np.array(flags, np.uint8)})


def test_top_k_refuses_infinities_of_both_signs(isa):
    """In the distance of a query from a vector, both too long for float32: inf + inf - inf."""
    x = np.full((1, 4), 1e30, F32)
    corpus = dynquant.dynamic_quantize(x)
    with pytest.raises(dynquant.ParameterError, match="infinities"):
        dynquant.top_k(x, corpus, 1, metric="l2")
    scratch = memory(FUNCTIONS["top_k_scratch_bytes"](1, 1, 4, 8, 4, 1), 0)
    found, indices = np.full(1, 77, F32), np.full(1, 77, np.int64)
    arrays = x, corpus.data, corpus.scales, None, None, None, 0
    assert FUNCTIONS["top_k"](*arrays, 1, 1, 4, 8, 4, 2, 1, scratch, found, indices) == BAD_ARGUMENT
    assert (found[0], indices[0]) == (77, 77)


def test_sizes_of_top_k():
    size = FUNCTIONS["top_k_scratch_bytes"]
    huge = [2**63 - 1, 2**62, 2**50]
    bad = [(-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, 0, 1), (1, 1, 1, -1), (1, 2**32, 1, 1)]
    for m, n, d, k in [*bad, *((a, 2**31, b, 2**31) for a in huge for b in huge), (2**40, 2**31, 8, 2**31)]:
        assert size(m, n, d, 8, 2**63 - 1, k) == -1, (m, n, d, k)
    assert size(1, 1, 4, 8, 3, 1) == -1
    # Grows with the queries and not with the vectors.
    one, more, long = (size(m, n, 384, 8, 384, 10) for m, n in [(1000, 10**6), (2000, 10**6), (1000, 10**9)])
    assert one == long
    assert 0.9 < (more - one) / 1000 / (2048 + 24 * 10 + 3 * 384) < 1.1


def test_4_bit_products_over_no_inputs_and_groups_longer_than_the_row(isa):
    packed, scratch = (memory(FUNCTIONS[f"w4a8_{name}_bytes"](2, 0, 8), 0) for name in ("packed", "scratch"))
    out, bias = np.full((2, 2), 77, F32), floats(2)
    call("w4a8_pack", None, None, None, 2, 0, 8, packed)
    call("w4a8_matmul", packed, bias, None, 2, 2, 0, 8, scratch, out)
    assert_same_bits(out, np.stack([bias, bias]))
    weight, x = dynquant.quantize_weights(floats(6).reshape(2, 3), bits=4), floats(6, 1).reshape(2, 3)
    packed = memory(FUNCTIONS["w4a8_packed_bytes"](2, 3, 2**62), 0)
    scratch = memory(FUNCTIONS["w4a8_scratch_bytes"](2, 3, 2**62), 0)
    call("w4a8_pack", weight.data, weight.scales, weight.zero_points, 2, 3, 2**62, packed)
    call("w4a8_matmul", packed, None, x, 2, 2, 3, 2**62, scratch, out)
    assert_same_bits(out, dynquant.w4a8_matmul(weight, x))


def test_no_byte_outside_packed_4_bit_weights_and_scratch_is_written(isa):
    m, n, k, group = 5, 35, 129, 20
    weight = dynquant.quantize_weights(floats(n * k).reshape(n, k), bits=4, group_size=group)
    x, out = np.ones((m, k), F32), np.empty((m, n), F32)
    for offset in range(0, 64, 7):
        sizes = FUNCTIONS["w4a8_packed_bytes"](n, k, group), FUNCTIONS["w4a8_scratch_bytes"](m, k, group)
        packed, scratch = (Guarded(size, offset) for size in sizes)
        arrays = weight.data, weight.scales, weight.zero_points
        call("w4a8_pack", *arrays, n, k, group, packed.result)
        call("w4a8_matmul", packed.result, None, x, m, n, k, group, scratch.result, out)
        packed.check(packed.result)
        scratch.check(scratch.result)


def test_zero_points_above_15_are_refused():
    arguments = arguments_of("w4a8_pack")
    arguments[2][1] = 16
    check_refused("w4a8_pack", arguments, BAD_ARGUMENT)


def test_packed_4_bit_weights_are_checked():
    w = floats(15).reshape(3, 5)
    packed = packed_int4(dynquant.quantize_weights(w, bits=4, group_size=2))
    x, scratch = np.ones((2, 5), F32), memory(FUNCTIONS["w4a8_scratch_bytes"](2, 5, 1), 0)
    out = np.full((2, 3), 77, F32)

    def multiply(packed, n=3, k=5, group=2):
        return FUNCTIONS["w4a8_matmul"](packed, None, x, 2, n, k, group, scratch, out)

    for bad in ({"n": 2}, {"k": 4}, {"group": 1}, {"packed": packed_weights(np.ones((3, 5), np.int8))}):
        assert multiply(**{"packed": packed, **bad}) == BAD_ARGUMENT
    assert (out == 77).all()
    assert multiply(packed) == OK


def test_no_byte_outside_packed_weights_and_scratch_is_written(isa):
    m, n, k = 5, 35, 129
    w, x, w_scales, out = (
        np.ones((n, k), np.int8),
        np.ones((m, k), F32),
        np.ones(n, F32),
        np.empty((m, n), F32),
    )
    for offset in range(0, 64, 7):
        sizes = FUNCTIONS["w8a8_packed_bytes"](n, k), FUNCTIONS["w8a8_scratch_bytes"](m, k)
        packed, scratch = (Guarded(size, offset) for size in sizes)
        call("w8a8_pack", w, n, k, packed.result)
        call("w8a8_matmul", packed.result, w_scales, None, x, m, n, k, scratch.result, out)
        packed.check(packed.result)
        scratch.check(scratch.result)


def test_packed_weights_are_checked():
    """Those of another shape or instruction set, or moved in memory, are refused, and `out` is unchanged."""
    w, x, scales = np.ones((3, 5), np.int8), np.ones((2, 5), F32), np.ones(3, F32)
    scratch, out = memory(FUNCTIONS["w8a8_scratch_bytes"](2, 64), 0), np.full((2, 3), 77, F32)
    packed = packed_weights(w)

    def multiply(packed, n=3, k=5):
        return FUNCTIONS["w8a8_matmul"](packed, scales, None, x, 2, n, k, scratch, out)

    assert multiply(np.zeros_like(packed)) == BAD_ARGUMENT
    assert multiply(packed, n=2) == BAD_ARGUMENT
    assert multiply(packed, k=4) == BAD_ARGUMENT
    assert multiply(array_at(1, packed)) == BAD_ARGUMENT
    for isa in set(ISAS) - {dynquant.simd_info()["selected"]}:
        with using(isa):
            assert multiply(packed) == BAD_ARGUMENT
    assert (out == 77).all()
    assert multiply(packed) == OK
    assert (out != 77).all()


def test_threads_share_inputs_and_packed_weights():
    """ctypes releases the GIL during a call, so these run at the same time."""
    m, n, k = 6, 50, 700
    w, x, w_scales = np.random.default_rng(0).integers(-128, 128, (n, k), np.int8), floats(m * k), floats(n)
    packed, expected = packed_weights(w), dynquant.w8a8_matmul(w, w_scales, x.reshape(m, k))
    barrier = threading.Barrier(6)

    def work(_):
        scratch, out = memory(FUNCTIONS["w8a8_scratch_bytes"](m, k), 0), np.empty((m, n), F32)
        barrier.wait()
        for _ in range(50):
            out[:] = 77
            call("w8a8_matmul", packed, w_scales, None, x, m, n, k, scratch, out)
            assert_same_bits(out, expected)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == [None] * 6


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("name", "expected"), [("divide_rows_f32", np.divide), ("multiply_rows_f32", np.multiply)]
)
def test_smoothing(isa, name, expected, in_place):
    for m, k in [(1, 1), (3, 17), (2, 4097), (0, 3), (3, 0)]:
        x, factors = floats(m * k).reshape(m, k), np.abs(floats(k, 1)) + F32(0.01)
        result = expected(x, factors)
        out = x if in_place else np.full((m, k), 77, F32)
        call(name, x, factors, m, k, out)
        assert_same_bits(out, result)


def test_length_0_takes_null_pointers(isa):
    value = number()
    for name in ("amax_f32", "percentile_f32", "amax_scale_f32", "percentile_scale_f32"):
        numbers = {"percentile_f32": [0.5], "amax_scale_f32": [127], "percentile_scale_f32": [0.5, 127]}
        value[0] = 77
        call(name, None, 0, *numbers.get(name, []), value)
        assert value[0] == 0
    for name in ("dynamic_quantize_row_f32_s8", "dynamic_quantize_row_f32_s4"):
        value[0] = 77
        call(name, None, 0, None, value)
        assert value[0] == 0
    call("quantize_row_f32_s8", None, 0, 1, 127, None)
    call("quantize_row_f32_s4", None, 0, 1, None)
    call("dequantize_row_s8_f32", None, 0, 1, None)
    call("dequantize_row_s4_f32", None, 0, 1, None)
    call("w8a8_matvec", None, None, 0, 5, np.ones(5, np.int8), 1, None)
    call("divide_rows_f32", None, None, 0, 0, None)
    call("divide_rows_f32", None, None, 1 << 40, 0, None)
    call("multiply_rows_f32", None, np.ones(3, F32), 0, 3, None)
    assert FUNCTIONS["dot_s8s8_s64"](None, None, 0) == 0


# Refusals: the status says so, and nothing is changed


BAD_SCALES = [NAN, INF, -INF, -1.0]
BAD_NUMBERS = {
    ("percentile_f32", 2): [0.0, -0.1, 1.0000001, NAN],
    ("amax_scale_f32", 2): [0.0, -1.0, NAN, INF, 1e-45],
    ("percentile_scale_f32", 2): [0.0, NAN, 2.0],
    ("percentile_scale_f32", 3): [0.0, -1.0, NAN, INF, 1e-45],
    ("quantize_row_f32_s8", 2): BAD_SCALES,
    ("quantize_row_f32_s8", 3): [0, -1, 128, 2**31 - 1],
    ("quantize_row_f32_s4", 2): BAD_SCALES,
    ("dequantize_row_s8_f32", 2): BAD_SCALES[:3],
    ("dequantize_row_s4_f32", 2): BAD_SCALES[:3],
    ("w8a8_matvec", 5): BAD_SCALES[:3],
    ("top_k", 6): [-1, 1, 3],  # a stride that is neither 0 nor n
    ("top_k", 9): [0],
    ("top_k", 10): [0, 2, 5, 16],
    ("top_k", 11): [0, 2, -1],
    ("top_k", 12): [-1, 3],
}
# Inputs that are arrays of floats: (function, argument) to number of elements.
FLOATS = {
    **{(name, 0): 6 for name in FUNCTIONS if name.startswith(("amax", "percentile", "quantize", "dynamic"))},
    ("w8a8_matvec", 1): 2,
    ("w8a8_matmul", 1): 2,
    ("w8a8_matmul", 2): 2,
    ("w8a8_matmul", 3): 6,
    ("w4a8_pack", 1): 2,
    ("w4a8_minimums_pack", 1): 2,
    ("w4a8_minimums_pack", 2): 2,
    ("w8a8_groups_pack", 1): 2,
    ("w8a8_groups_matmul", 1): 2,
    ("w8a8_groups_matmul", 2): 6,
    ("w4a8_matmul", 1): 2,
    ("w4a8_matmul", 2): 6,
    ("top_k", 0): 6,
    ("top_k", 2): 2,
    ("top_k", 4): 2,
    **{
        (name, position): n
        for name in ("divide_rows_f32", "multiply_rows_f32")
        for position, n in [(0, 6), (1, 3)]
    },
}
LENGTH_ARGUMENTS = [
    *((name, 1) for name in list(FUNCTIONS)[:10]),
    *(("w8a8_matvec", position) for position in (2, 3)),
    *(("w8a8_pack", position) for position in (1, 2)),
    *(("w8a8_matmul", position) for position in (4, 5, 6)),
    *(("w4a8_pack", position) for position in (3, 4)),
    *(("w4a8_matmul", position) for position in (3, 4, 5)),
    *((name, position) for name in ("divide_rows_f32", "multiply_rows_f32") for position in (2, 3)),
    *(("w4a8_minimums_pack", position) for position in (3, 4)),
    *(("w8a8_groups_pack", position) for position in (2, 3)),
    *(("w8a8_groups_matmul", position) for position in (3, 4, 5)),
    *((name, position) for name in ("int8_inner_s32", "int8_inner_s64") for position in (2, 3, 4)),
    *(("top_k", position) for position in (7, 8, 9, 13)),
]
# Where the scratch of a function stands, which a refusal may change.
SCRATCH = {
    "w8a8_matmul": 7,
    "w4a8_matmul": 7,
    "w8a8_groups_matmul": 8,
    "int8_inner_s32": 5,
    "int8_inner_s64": 5,
    "top_k": 14,
}


def check_refused(name, arguments, status):
    scratch = arguments[SCRATCH[name]] if name in SCRATCH else None
    arrays = [a for a in arguments if isinstance(a, np.ndarray) and a is not scratch]
    before = [a.tobytes() for a in arrays]
    assert FUNCTIONS[name](*arguments) == status
    assert [a.tobytes() for a in arrays] == before


@pytest.mark.parametrize("bad", [-1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize(("name", "position"), LENGTH_ARGUMENTS)
def test_invalid_lengths(name, position, bad):
    arguments = arguments_of(name)
    arguments[position] = bad
    check_refused(name, arguments, BAD_ARGUMENT)


@pytest.mark.parametrize(("name", "position"), BAD_NUMBERS)
def test_numbers_out_of_range(name, position):
    for bad in BAD_NUMBERS[name, position]:
        arguments = arguments_of(name)
        arguments[position] = bad
        arguments[0][:] = 3e38 if arguments[0].dtype == F32 else 1
        check_refused(name, arguments, BAD_ARGUMENT)


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize(("name", "position"), FLOATS)
def test_nan_and_infinity(isa, name, position, bad):
    for i in range(FLOATS[name, position]):
        arguments = arguments_of(name)
        arguments[position][i] = bad
        check_refused(name, arguments, NON_FINITE)


@pytest.mark.parametrize("name", ["divide_rows_f32", "multiply_rows_f32"])
def test_factors_not_above_zero(name):
    for bad in (0.0, -0.0, -1.0):
        arguments = arguments_of(name)
        arguments[1][2] = bad
        check_refused(name, arguments, BAD_ARGUMENT)


def test_every_function_has_its_refusals():
    statusless = {"dot_s8s8_s64", *(name for name in FUNCTIONS if name.endswith("_bytes"))}
    assert {name for name, _ in LENGTH_ARGUMENTS} == set(FUNCTIONS) - statusless
    assert FUNCTIONS["dot_s8s8_s64"](None, None, -1) == 0


@pytest.mark.parametrize("name", ["w8a8_packed_bytes", "w8a8_scratch_bytes"])
def test_sizes(name):
    huge = [2**63 - 1, 2**62, 2**40]
    for shape in [(-1, 1), (1, -1), *((a, b) for a in huge for b in huge)]:
        assert FUNCTIONS[name](*shape) == -1, shape
    assert FUNCTIONS[name](0, 0) >= 0
    # A byte per weight, at most three per activation, and headers, padding and scales.
    assert 4096**2 <= FUNCTIONS[name](4096, 4096) <= 1.03 * 4096**2 * (3 if "scratch" in name else 1)


# Bytes of an element, or at most so many: half a byte per 4-bit weight, and five or eight per group; one byte
# per activation and four per group, or with residuals and what sums begin with, three bytes and 70.
GROUP_BYTES = {
    "w4a8_packed_bytes": 0.5 + 5 / 32,
    "w4a8_minimums_packed_bytes": 0.5 + 8 / 32,
    "w4a8_scratch_bytes": 1 + 4 / 32,
    "w8a8_groups_packed_bytes": 1 + 8 / 32,
    "w8a8_groups_scratch_bytes": 3 + 70 / 32,
}


@pytest.mark.parametrize("name", GROUP_BYTES)
def test_sizes_with_groups(name):
    huge, more = [2**63 - 1, 2**62, 2**40], [0] if name == "w8a8_groups_packed_bytes" else []
    for shape in [(-1, 1), (1, -1), *((a, b) for a in huge for b in huge)]:
        for group in (1, 32, 2**63 - 1):
            assert FUNCTIONS[name](*shape, group, *more) == -1, shape
    for group in (0, -1, -(2**63)):
        assert FUNCTIONS[name](4, 4, group, *more) == -1
    assert FUNCTIONS[name](0, 0, 1, *more) >= 0
    size = FUNCTIONS[name](4096, 4096, 32, *more)
    assert 0.5 * 4096**2 <= size <= 1.03 * 4096**2 * GROUP_BYTES[name]


def test_sizes_of_int8_inner():
    huge = [2**63 - 1, 2**62, 2**40]
    for shape in [
        (-1, 1, 1),
        (1, -1, 1),
        (1, 1, -1),
        *((a, b, 3) for a in huge for b in huge),
        (3, 3, 2**62),
    ]:
        assert FUNCTIONS["int8_inner_scratch_bytes"](*shape) == -1, shape
    assert FUNCTIONS["int8_inner_scratch_bytes"](0, 0, 0) >= 0


@pytest.mark.parametrize("bad", [0, -1])
@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("w4a8_pack", 5),
        ("w4a8_matmul", 6),
        ("w4a8_minimums_pack", 5),
        ("w8a8_groups_pack", 4),
        ("w8a8_groups_matmul", 6),
    ],
)
def test_invalid_groups(name, position, bad):
    arguments = arguments_of(name)
    arguments[position] = bad
    check_refused(name, arguments, BAD_ARGUMENT)
