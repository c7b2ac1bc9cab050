"""Every instruction set gives the bits of the baseline, at every short length and every alignment.

Each test covers one group of kernels, named in its docstring: for each alignment it calls a public function
on views of length 0 to 300, on every instruction set. Results are written into guarded memory, which is
compared as a whole, so that a byte written outside a result is found too.
"""

import numpy as np
import pytest
from helpers.common import F32, ISAS, array_at, assert_same_bits, calibrator_of, memory, using, whole_state

from dynquant import (
    CalibStats,
    DynQuantFormat,
    DynQuantTensor,
    MaxAbs,
    Percentile,
    SmoothQuantConfig,
    compute_smooth_factors,
    dynamic_quantize,
    dynamic_quantize_int8,
    quantization_mae,
    quantize_weights,
    smooth_activations,
    smooth_weights,
    w4a8_matmul,
    w8a8_matvec,
)

pytestmark = pytest.mark.skipif(len(ISAS) == 1, reason="only the baseline is built and supported")

LENGTHS = range(301)
LONGEST = LENGTHS[-1]
MANY_FLOATS = 5000  # several times the short rows that are processed together
INT8 = DynQuantFormat.INT8_PER_TENSOR
INT4 = DynQuantFormat.INT4_PER_TENSOR
PACKED = DynQuantFormat(4, "per_tensor", packed=True)

each_float = pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])


class Arena:
    """Memory filled with a pattern, given out in slots with a guard on either side."""

    GUARD = 64

    def __init__(self, longest):
        self.memory = memory(4 * len(LENGTHS) * (longest + 4 * self.GUARD), 0)
        self.memory[:] = 0xA5
        self.used = 0

    def slot(self, n, offset, dtype=np.int8):
        """Memory for `n` numbers, `offset` bytes past a 64-byte boundary."""
        start, n_bytes = self.used + self.GUARD + offset, n * np.dtype(dtype).itemsize
        self.used += 2 * self.GUARD + -(-(offset + n_bytes) // 64) * 64
        assert self.used <= self.memory.size
        return self.memory[start : start + n_bytes].view(dtype)


def compare(calls, offsets, longest=5 * LONGEST):
    """`calls(arena, offset)` writes into slots of the arena, and yields other results to compare.

    `longest`: floats that the results of one length have at most.
    """
    for offset in offsets:
        arenas, others = [], []
        for isa in ISAS:
            arenas.append(Arena(longest))
            with using(isa):
                others.append(list(calls(arenas[-1], offset)))
        for isa, arena, other in zip(ISAS[1:], arenas[1:], others[1:], strict=True):
            assert other == others[0], f"{isa}, offset {offset}"
            assert_same_bits(arena.memory, arenas[0].memory, f"{isa}, offset {offset}")


def floats(rng, n):
    """Midpoints between codes and floats next to them, mixed with every exponent, normals and zeros."""
    halves = ((rng.integers(-127, 127, n) + 0.5) * 0.37).astype(F32)
    near = (halves.view(np.int32) + rng.integers(-2, 3, n, dtype=np.int32)).view(F32)
    wide = (rng.standard_normal(n) * 2.0 ** rng.integers(-149, 127, n)).astype(F32)
    x = np.choose(rng.integers(0, 8, n), [near] * 5 + [wide, rng.standard_normal(n, F32), np.zeros(n, F32)])
    # With a largest magnitude of 127 * 0.37 they are midpoints of the scale 0.37.
    return np.clip(x, F32(-46.99), F32(46.99))


@pytest.mark.parametrize("mode", [MaxAbs(), Percentile(0.9)], ids=["max abs", "percentile"])
@pytest.mark.parametrize("fmt", [INT8, INT4, PACKED], ids=["int8", "int4", "packed"])
@each_float
def test_quantize(dtype, fmt, mode):
    """amax_bits, count_below, widen_f16, quantize_row, pack_row."""
    x = floats(np.random.default_rng(0), LONGEST).astype(dtype)
    code = np.uint8 if fmt.packed else np.int8

    def calls(arena, offset):
        view = array_at(offset, x)
        for n in LENGTHS:
            out = arena.slot((n + 1) // 2 if fmt.packed else n, 63 - offset, code)
            yield dynamic_quantize(view[:n], fmt, mode, out=out).scales.tobytes()

    compare(calls, range(0, 64, x.itemsize))


def test_quantize_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = floats(np.random.default_rng(1), LONGEST).astype(ml_dtypes.bfloat16)

    def calls(arena, offset):
        view = array_at(offset, x)
        for n in LENGTHS:
            yield dynamic_quantize_int8(view[:n], out=arena.slot(n, offset)).scales.tobytes()

    compare(calls, range(0, 64, 2))


def test_codes_at_every_byte():
    x = floats(np.random.default_rng(2), LONGEST)

    def calls(arena, offset):
        for n in LENGTHS:
            yield dynamic_quantize_int8(x[:n], out=arena.slot(n, offset)).scales.tobytes()

    compare(calls, range(64))


@pytest.mark.parametrize("fmt", [INT8, PACKED], ids=["int8", "packed"])
def test_dequantize(fmt):
    """dequantize_row and unpack_row."""
    codes = np.random.default_rng(3).integers(-128, 128, LONGEST, dtype=np.int8)
    codes = codes.view(np.uint8) if fmt.packed else codes
    scale = np.array([0.3], F32)

    def calls(arena, offset):
        view = array_at(offset, codes)
        for n in LENGTHS:
            data = view[: (n + 1) // 2 if fmt.packed else n]
            out = arena.slot(n, 60 - offset // 4 * 4, F32)
            yield DynQuantTensor(data, scale, None, (n,), fmt).dequantize(out=out).size

    compare(calls, range(64))


def test_mean_absolute_error():
    """abs_error_row, which must add its doubles in one order."""
    x = floats(np.random.default_rng(4), LONGEST)

    def calls(arena, offset):
        view = array_at(offset, x)
        for n in LENGTHS:
            yield quantization_mae(view[:n], dynamic_quantize_int8(view[:n], out=arena.slot(n, offset // 4)))

    compare(calls, range(0, 64, 4))


@each_float
def test_statistics(dtype):
    """min_max_row, sum_row, square_deviation_row, count_top_bits, count_next_bits."""
    x = floats(np.random.default_rng(5), LONGEST).astype(dtype)

    def calls(arena, offset):
        view = array_at(offset, x)
        for n in LENGTHS[1:]:
            yield CalibStats.collect([view[:n]])

    compare(calls, range(0, 64, x.itemsize))


@each_float
def test_calibrator(dtype):
    """count_bins, count_channel_bins_row and the sums, bit for bit."""
    x = floats(np.random.default_rng(10), 3 * LONGEST).astype(dtype)

    def calls(arena, offset):
        view = array_at(offset, x)
        for n in LENGTHS[1:]:
            yield hash(whole_state(calibrator_of([view[: 3 * n].reshape(3, n), view[:n]], n)))

    compare(calls, range(0, 64, x.itemsize * 4))


@pytest.mark.parametrize("smooth", [smooth_activations, smooth_weights], ids=lambda smooth: smooth.__name__)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rows", [1, 5, None], ids=["1", "5", "many"])
def test_smoothing(smooth, rows, in_place):
    """divide_row, with and without reciprocals, and multiply_row."""
    rng = np.random.default_rng(6)
    x, factors = floats(rng, MANY_FLOATS), rng.uniform(0.01, 9, LONGEST).astype(F32)

    def calls(arena, offset):
        view, columns = array_at(offset, x), array_at(60 - offset, factors)
        for n in LENGTHS:
            m = rows or MANY_FLOATS // max(n, 1)
            matrix = view[: m * n].reshape(m, n)
            out = arena.slot(m * n, offset if in_place else 60 - offset, F32).reshape(m, n)
            out[:] = matrix
            yield smooth(out if in_place else matrix, columns[:n], out=out).size

    compare(calls, range(0, 64, 4), MANY_FLOATS)


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_smooth_factors(rows):
    """column_amax_row, and its variant for four rows."""
    rng = np.random.default_rng(7)
    a, w = floats(rng, rows * LONGEST), floats(rng, 2 * LONGEST)
    config = SmoothQuantConfig(1.0)

    def calls(arena, offset):
        left, right = array_at(offset, a), array_at(60 - offset, w)
        for n in LENGTHS[1:]:
            activations, weights = left[: rows * n].reshape(rows, n), right[: 2 * n].reshape(2, n)
            yield compute_smooth_factors(activations, weights, config).tobytes()
            yield compute_smooth_factors(activations, weights, config, mode=Percentile(0.7)).tobytes()

    compare(calls, range(0, 64, 4))


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
def test_matvec(extreme):
    """dot. The second row of the weights starts at any byte."""
    rng = np.random.default_rng(8)
    codes = np.array([-128, 127], np.int8) if extreme else np.arange(-128, 128, dtype=np.int8)
    weight = rng.choice(codes, 9 * LONGEST)
    activation = rng.choice([F32(-1), F32(1)], LONGEST) if extreme else floats(rng, LONGEST)
    scales = np.arange(-4, 5).astype(F32)

    def calls(arena, offset):
        view = array_at(offset, weight)
        for n in LENGTHS[1:]:
            out = arena.slot(9, offset // 4 * 4, F32)
            yield w8a8_matvec(view[: 9 * n].reshape(9, n), scales, activation[:n], out=out).size

    compare(calls, range(64))


@pytest.mark.parametrize("kind", ["zero points", "symmetric", "minimums"])
def test_w4a8(kind):
    """pack_panel_u4, gemm_u4s8: every number of outputs up to two panels and more, rows of 1 to 5."""
    rng = np.random.default_rng(10)
    data = rng.integers(0, 256, (70, 26), dtype=np.uint8)
    scales, minimums = (rng.standard_normal((70, 8)).astype(F32) for _ in range(2))
    zero_points = rng.integers(0, 16, (70, 8), dtype=np.uint8)
    x, fmt = floats(rng, 5 * 51).reshape(5, 51), DynQuantFormat(4, "per_group", 7, True)

    def calls(arena, offset):
        for n in range(71):
            zeros = zero_points[:n] if kind == "zero points" else None
            offsets = minimums[:n] if kind == "minimums" else None
            weight = DynQuantTensor(data[:n], scales[:n], zeros, (n, 51), fmt, offsets)
            for m in (1, 2, 5):
                out = arena.slot(m * n, offset, F32).reshape(m, n)
                yield w4a8_matmul(weight, x[:m], out=out).size

    compare(calls, range(0, 64, 20))


@pytest.mark.parametrize("fmt", [DynQuantFormat.int8_per_group(5), DynQuantFormat(4, "per_group", 37, True)])
def test_groups(fmt):
    """Groups that start at every byte, and at either nibble of one."""
    x = floats(np.random.default_rng(11), LONGEST)

    def calls(arena, offset):
        for n in LENGTHS[::3]:
            out = arena.slot((n + 1) // 2 if fmt.packed else n, offset, fmt.data_dtype)
            q = dynamic_quantize(x[:n], fmt, out=out)
            yield q.scales.tobytes(), q.dequantize().tobytes()

    compare(calls, range(0, 64, 7))


@pytest.mark.parametrize("search", [False, True])
def test_weights(search):
    """min_max_row, quantize_row_f32_u4, shift_row, error_sums_row."""
    w = floats(np.random.default_rng(12), LONGEST)

    def calls(arena, offset):
        view = array_at(offset, w)
        for n in LENGTHS[1 :: 7 if search else 1]:
            q = quantize_weights(view[None, :n], bits=4, group_size=29, search=search)
            yield q.data.tobytes(), q.scales.tobytes(), q.zero_points.tobytes(), q.dequantize().tobytes()

    compare(calls, range(0, 64, 16))


# Long rows


@pytest.mark.slow
@pytest.mark.parametrize("k", [4095, 4096, 4097, 3 * 4096 + 17, 2**18 + 70])
@each_float
def test_long_rows(dtype, k):
    rng = np.random.default_rng(k)
    x = floats(rng, 2 * k).reshape(2, k).astype(dtype)
    factors = rng.uniform(0.1, 9, k).astype(F32)
    weight = rng.integers(-128, 128, (2, k), dtype=np.int8)

    def calls(arena, offset):
        q = dynamic_quantize(x, DynQuantFormat.INT8_PER_ROW, Percentile(0.99))
        packed = dynamic_quantize(x, DynQuantFormat.INT4_PER_ROW, packed=True)
        yield from (q.data.tobytes(), q.scales.tobytes(), q.dequantize().tobytes())
        yield from (packed.data.tobytes(), packed.dequantize().tobytes())
        yield from (smooth_activations(x, factors).tobytes(), smooth_weights(x, factors).tobytes())
        yield from (compute_smooth_factors(x, x).tobytes(), w8a8_matvec(weight, [1.0, 2.0], x[0]).tobytes())
        yield from (quantization_mae(x, packed), CalibStats.collect(x))
        yield from (whole_state(calibrator_of([x])), whole_state(calibrator_of([x], k)))

    compare(calls, [0])


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1, 13, 31, 63])
@each_float
def test_nontemporal_stores(dtype, offset):
    """Codes of rows of 2**23 elements or more are written with nontemporal stores."""
    x = np.tile(floats(np.random.default_rng(9), 1000), 8400).astype(dtype)
    results = []
    for isa in ISAS:
        codes = memory(x.size + 128, offset).view(np.int8)
        with using(isa):
            dynamic_quantize_int8(x, out=codes[64 : 64 + x.size])
        results.append(codes)
    assert x.size > 2**23
    for isa, codes in zip(ISAS[1:], results[1:], strict=True):
        assert (codes == results[0]).all(), isa
