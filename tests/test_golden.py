"""The 402 cases of the reference program in data/seed_vectors.npz, and worked examples."""

import pathlib

import numpy as np
import pytest
from helpers import reference
from helpers.common import assert_same_bits

from dynquant import (
    CalibStats,
    DynQuantFormat,
    MaxAbs,
    Percentile,
    SmoothQuantConfig,
    compute_scale,
    compute_smooth_factors,
    dynamic_quantize,
    dynamic_quantize_int4,
    dynamic_quantize_int8,
    dynamic_quantize_int8_per_row,
    quantization_mae,
    smooth_activations,
    smooth_weights,
    w8a8_matvec,
)

F32_MAX = float(np.finfo(np.float32).max)


class Case:
    """One line of the index, with its arrays as attributes."""

    def __init__(self, archive, number, line):
        self.archive, self.number = archive, number
        self.kind, *self.about = line.split("\t")
        self.name = f"case {number} {self.kind} {' '.join(self.about)}:"

    def __getattr__(self, name):
        key = f"{self.number}.{name}"
        return self.archive[str(self.archive[key + ".ref"]) if key + ".ref" in self.archive else key]

    @property
    def mode(self):
        p = float(self.about[-1])
        return MaxAbs() if p < 0 else Percentile(p)


@pytest.fixture(scope="module")
def cases():
    with np.load(pathlib.Path(__file__).parent / "data" / "seed_vectors.npz") as file:
        archive = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in file.items()}
    return [Case(archive, i, str(line)) for i, line in enumerate(archive["index"])]


def of_kind(cases, kind, count):
    chosen = [case for case in cases if case.kind == kind]
    assert len(chosen) == count
    return chosen


def check_mae(case, tensor, expected):
    """The reference adds in float32, which overflows where float64 does not."""
    actual = quantization_mae(case.x, tensor)
    if np.isfinite(expected):
        assert actual == pytest.approx(float(expected), rel=1e-4), case.name
    else:
        assert np.isfinite(actual), case.name
        assert actual * case.x.size > F32_MAX, case.name


def test_tensor(cases, isa):
    for case in of_kind(cases, "tensor", 180):
        q8 = dynamic_quantize_int8(case.x, case.mode)
        q4 = dynamic_quantize_int4(case.x, case.mode)
        packed = dynamic_quantize_int4(case.x, case.mode, packed=True)
        assert_same_bits(q8.data, case.q8, case.name)
        assert_same_bits(q8.scales, case.s8, case.name)
        assert_same_bits(q8.dequantize(), case.deq8, case.name)
        assert_same_bits(q4.data, case.q4, case.name)
        assert_same_bits(q4.scales, case.s4, case.name)
        assert_same_bits(packed.data, reference.pack(case.q4), case.name)
        assert_same_bits(packed.dequantize(), q4.dequantize(), case.name)
        check_mae(case, q8, case.mae8)
        check_mae(case, q4, case.mae4)
        check_mae(case, packed, case.mae4)


def test_row(cases, isa):
    for case in of_kind(cases, "row", 180):
        q = dynamic_quantize_int8_per_row(case.x, case.mode)
        assert_same_bits(q.data, case.q, case.name)
        assert_same_bits(q.scales, case.s, case.name)
        assert_same_bits(q.dequantize(), case.deq, case.name)
        check_mae(case, q, case.mae)


def test_smooth(cases, isa):
    for case in of_kind(cases, "smooth", 20):
        factors = compute_smooth_factors(case.a, case.w, SmoothQuantConfig(alpha=float(case.alpha)))
        np.testing.assert_array_max_ulp(factors, case.s, maxulp=2)
        assert_same_bits(smooth_activations(case.a, case.s), case.sa, case.name)
        assert_same_bits(smooth_weights(case.w, case.s), case.sw, case.name)


def test_w8a8(cases, isa):
    for case in of_kind(cases, "w8a8", 18):
        assert_same_bits(w8a8_matvec(case.w, case.ws, case.a), case.y, case.name)


def test_calib(cases, isa):
    for case in of_kind(cases, "calib", 4):
        stats = CalibStats.collect(np.split(case.x, range(int(case.batch), case.x.size, int(case.batch))))
        exact = np.array([stats.min, stats.max, stats.p99, stats.suggested_scale], np.float32)
        assert_same_bits(exact, case.stats[[0, 1, 4, 5]], case.name)
        assert [stats.mean, stats.std_dev] == pytest.approx(case.stats[2:4].tolist(), rel=1e-4), case.name


# Worked examples


def test_scale_of_three_numbers_and_of_zeros():
    assert compute_scale([1, -2, 0.5], 127) == np.float32(2) / np.float32(127)
    assert compute_scale(np.zeros(8, np.float32), 127) == 0.0


def test_ramp_int8():
    x = ((np.arange(256) - 128) * 0.1).astype(np.float32)
    q = dynamic_quantize_int8(x)
    assert q.data.size == 256
    assert 0 < quantization_mae(x, q) < 0.005 * np.abs(x).max()


def test_ramp_int4():
    x = (np.arange(-50, 51) * 0.3).astype(np.float32)
    q = dynamic_quantize_int4(x)
    assert (q.data.min(), q.data.max()) == (-7, 7)
    assert dynamic_quantize_int4(x, packed=True).data.shape == (51,)


def test_halves_round_away_from_zero():
    q = dynamic_quantize_int8([127, 0.5, -0.5, 1.5, 2.5])
    assert (q.data.tolist(), q.scales.tolist()) == ([127, 1, -1, 2, 3], [1.0])


def test_percentile_of_a_hundred(isa):
    x = np.arange(1, 101, dtype=np.float32)[::-1].copy()
    q = dynamic_quantize_int8(x, Percentile(0.99))
    assert q.scales[0] == np.float32(99) / np.float32(127)
    assert q.data[0] == q.data[1] == 127


def test_collect_two_batches():
    stats = CalibStats.collect([[1, 2, 3], [-1, 0, 4]])
    assert (stats.min, stats.max, stats.mean, stats.p99) == (-1, 4, 1.5, 4)
    assert stats.std_dev == pytest.approx(1.7078, abs=5e-5)
    assert stats.suggested_scale == np.float32(4) / np.float32(127)


def test_smoothing_preserves_the_product():
    assert SmoothQuantConfig().alpha == 0.5
    rng = np.random.default_rng(0)
    a, w = rng.standard_normal((6, 40)) * np.geomspace(1e-2, 1e2, 40), rng.standard_normal((5, 40))
    factors = compute_smooth_factors(a, w)
    smoothed = smooth_activations(a, factors).astype(np.float64) @ smooth_weights(w, factors).T
    np.testing.assert_allclose(smoothed, a @ w.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n", [1, 5, 1000])
def test_memory_of_int8_codes_with_one_scale(n):
    q = dynamic_quantize(np.ones(n, np.float32), DynQuantFormat.INT8_PER_TENSOR)
    assert (q.memory_bytes, q.compression_ratio) == (n + 4, 4 * n / (n + 4))
