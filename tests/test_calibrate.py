"""CalibStats.collect against float64 and a full sort."""

import array
import dataclasses
import pickle

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, distributions
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dynquant import CalibStats, NonFiniteError


def check(batches, message=""):
    stats = CalibStats.collect(batches)
    low, high, mean, std_dev, p99, suggested = reference.calib_stats(batches)
    size = max(std_dev, abs(mean))
    assert (stats.min, stats.max, stats.p99, stats.suggested_scale) == (low, high, p99, suggested), message
    # Where terms cancel, the error is relative to the terms.
    assert stats.mean == pytest.approx(mean, rel=1e-6, abs=1e-12 * size), message
    assert stats.std_dev == pytest.approx(std_dev, rel=1e-6, abs=1e-12 * size), message
    return stats


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 100, 101, 4095, 4096, 4097, 20_000])
def test_against_float64(n, isa):
    for name, x in distributions(n, np.random.default_rng(n)).items():
        check([x], name)
        check(np.array_split(x, min(n, 7)), name)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats(dtype, isa):
    x = np.random.default_rng(0).standard_normal(9000).astype(dtype)
    check([x[:5000], x[5000:].reshape(10, 400)])


@pytest.mark.parametrize("mean", [1e3, 1e6, -3e7])
def test_a_small_deviation_about_a_large_mean(mean, isa):
    """The textbook formula, sum of squares minus square of the sum, would lose every digit."""
    x = (mean + np.random.default_rng(1).standard_normal(50_000) * abs(mean) * 1e-6).astype(F32)
    batches = np.split(x, [1, 4097, 30_000])
    stats = CalibStats.collect(batches)
    wide = x.astype(np.float64)
    assert stats.mean == pytest.approx(wide.mean(), rel=1e-9)
    assert stats.std_dev == pytest.approx(wide.std(), rel=1e-6)


def test_batches_of_different_sizes_and_means(isa):
    rng = np.random.default_rng(2)
    check([rng.normal(m, 1, n).astype(F32) for m, n in [(0, 3), (100, 5000), (-50, 1), (7, 12_345)]])


def test_extremes_at_every_index(isa):
    for n in (1, 9, 70):
        for index in range(n):
            x = np.zeros(n, F32)
            x[index] = 5
            assert CalibStats.collect([x]).max == 5
            assert CalibStats.collect([-x]).min == -5


@pytest.mark.parametrize(
    "x, stats",
    [
        ([5.0], (5, 5, 5, 0, 5, F32(5) / F32(127))),
        ([-5.0], (-5, -5, -5, 0, 5, F32(5) / F32(127))),
        ([0.0], (0, 0, 0, 0, 0, F32(1) / F32(127))),
        # p99 is zero: the scale comes from the largest magnitude.
        ([0.0] * 99 + [-2.0], (-2, 0, -0.02, 0.19899748742132398, 0, F32(2) / F32(127))),
        ([0.0] * 98 + [1.0, 3.0], (0, 3, 0.04, 0.3136877428271624, 1, F32(1) / F32(127))),
        ([3.4e38, -3.4e38], (-F32(3.4e38), F32(3.4e38), 0, F32(3.4e38), F32(3.4e38), F32(3.4e38) / F32(127))),
    ],
    ids=["positive", "negative", "zero", "p99 zero", "p99 below the largest", "huge"],
)
def test_worked_examples(x, stats, isa):
    actual = dataclasses.astuple(CalibStats.collect([np.array(x, F32)]))
    assert actual == pytest.approx([float(value) for value in stats], rel=1e-12)
    assert all(type(value) is float for value in actual)


def test_iterables():
    x = np.arange(12, dtype=F32).reshape(3, 4)
    expected = CalibStats.collect([x])
    for batches in (
        x,
        memoryview(x),
        list(x),
        iter(x),
        (row for row in x),
        x.tolist(),
        {0: x}.values(),
        [x[:2], [], x[2:]],
        np.array([*x, None], object)[:-1],
    ):
        assert CalibStats.collect(batches) == expected


class Exporter:
    """An array of another library: not iterable."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x


def test_an_array_is_one_batch():
    """It is not iterated, which would never end for the second one here."""
    x = np.random.default_rng(0).standard_normal(10_000).astype(F32)
    assert CalibStats.collect(x) == CalibStats.collect([x])
    with pytest.raises(MemoryError):
        CalibStats.collect(np.broadcast_to(F32(1), (2**46,)))
    for same in (array.array("f", x), x.tolist(), tuple(x.tolist()), Exporter(x)):
        assert CalibStats.collect(same) == CalibStats.collect([x])
    assert CalibStats.collect([1.0, [2.0, 3.0], 4]) == CalibStats.collect([[1.0, 2.0, 3.0, 4.0]])
    x[7_000] = np.nan
    with pytest.raises(NonFiniteError) as caught:
        CalibStats.collect(x)
    assert (caught.value.argument, caught.value.index) == ("batches[0]", 7_000)


def test_stats_behave_as_a_value():
    stats = CalibStats.collect([[1.0, 2.0]])
    assert stats == CalibStats.collect([[2.0, 1.0]])
    assert pickle.loads(pickle.dumps(stats)) == stats
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.min = 0.0


@given(
    x=arrays(F32, st.integers(1, 200), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    cuts=st.lists(st.integers(0, 200), max_size=4),
)
def test_any_split(x, cuts):
    before = x.tobytes()
    batches = np.split(x, sorted(cuts))
    stats = check(batches)
    whole = CalibStats.collect([x])
    assert (stats.min, stats.max, stats.p99) == (whole.min, whole.max, whole.p99)
    assert x.tobytes() == before


def test_iterator_that_reuses_one_buffer():
    def batches():
        buffer = np.empty(1, np.float32)
        for value in range(3):
            buffer[:] = value
            yield buffer

    stats = CalibStats.collect(batches())
    assert (stats.min, stats.max, stats.mean, stats.p99) == (0, 2, 1, 2)
