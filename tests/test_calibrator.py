"""Calibrator against a full sort and float64: bounds, order, merging."""

import copy
import io
import math
import threading
from functools import partial

import numpy as np
import pytest
from helpers import reference
from helpers.common import (
    F32,
    assert_same_bits,
    calibrator_of,
    channel_data,
    distributions,
    exact_state,
    whole_state,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dynquant import (
    Calibrator,
    CalibStats,
    DTypeError,
    EmptyInputError,
    NonFiniteError,
    ParameterError,
    ShapeMismatchError,
)

PERCENTILES = [1e-9, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0]
SMALLEST_NORMAL = 2.0**-126


def merged(calibrators):
    total = copy.deepcopy(calibrators[0])
    for other in calibrators[1:]:
        total.merge(other)
    return total


def assert_close_moments(actual, expected):
    a, b = actual.stats(), expected.stats()
    assert a.std_dev == pytest.approx(b.std_dev, rel=1e-12, abs=1e-15 * abs(b.mean))
    assert a.mean == pytest.approx(b.mean, rel=1e-12, abs=1e-12 * b.std_dev)


# All elements


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 100, 101, 4095, 4096, 4097, 20_000])
def test_against_full_sort(n, isa):
    for name, x in distributions(n, np.random.default_rng(n)).items():
        calibrator = calibrator_of(np.array_split(x, min(n, 7)))
        stats = calibrator.stats()
        low, high, mean, std_dev, p99, _ = reference.calib_stats([x])
        assert (stats.min, stats.max, calibrator.count) == (low, high, n), name
        size = max(std_dev, abs(mean))
        assert stats.mean == pytest.approx(mean, rel=1e-12, abs=1e-13 * size), name
        assert stats.std_dev == pytest.approx(std_dev, rel=1e-12, abs=1e-13 * size), name
        check_percentiles(calibrator, x, name)
        assert stats.p99 == calibrator.percentile(0.99), name
        amax = max(-stats.min, stats.max)
        assert stats.suggested_scale == float(F32(stats.p99 or amax or 1) / F32(127)), name
        assert stats.p99 == pytest.approx(p99, rel=2**-9, abs=2**-134)


def check_percentiles(calibrator, x, name=""):
    magnitudes = np.sort(np.abs(reference.floats(x)), axis=None).astype(np.float64)
    for p in PERCENTILES:
        exact = magnitudes[reference.rank(p, x.size)]
        actual = calibrator.percentile(p)
        assert type(actual) is float
        bound = 2**-9 * exact if exact >= SMALLEST_NORMAL else 2**-134
        assert abs(actual - exact) <= bound, (name, p, actual, exact)
        assert 0 <= actual <= magnitudes[-1], (name, p)
    assert calibrator.percentile(1.0) == magnitudes[-1], name


def test_the_error_bound_is_tight():
    """At the lower edge of a bin the error equals the bound."""
    calibrator = calibrator_of([[1.0, 1.0, 1.0, 2.0]])
    assert calibrator.percentile(0.5) == 1 + 2**-9


@pytest.mark.parametrize(
    "x, stats",
    [
        ([5.0], (5, 5, 5, 0, 5, F32(5) / F32(127))),
        ([-5.0], (-5, -5, -5, 0, 5, F32(5) / F32(127))),
        ([0.0], (0, 0, 0, 0, 0, F32(1) / F32(127))),
        ([-0.0], (0, 0, 0, 0, 0, F32(1) / F32(127))),
        ([0.0] * 99 + [-2.0], (-2, 0, -0.02, 0.19899748742132398, 0, F32(2) / F32(127))),
        ([1e-45], (1e-45, 1e-45, 1e-45, 0, 1e-45, 0)),
        ([3.4e38, -3.4e38], (-F32(3.4e38), F32(3.4e38), 0, F32(3.4e38), F32(3.4e38), F32(3.4e38) / F32(127))),
    ],
)
def test_worked_examples(x, stats, isa):
    x = np.array(x, F32)
    actual = calibrator_of([x]).stats()
    names = ("min", "max", "mean", "std_dev", "p99", "suggested_scale")
    assert [getattr(actual, name) for name in names] == pytest.approx([float(v) for v in stats], rel=1e-12)
    assert all(type(getattr(actual, name)) is float for name in names)


@pytest.mark.parametrize("value", [0.1, 1e4, -3.3e7, 3e38, 1e-40])
def test_a_constant_has_no_deviation(value, isa):
    calibrator = calibrator_of([np.full(n, value, F32) for n in (1, 4097, 10_000, 3)])
    assert calibrator.stats().std_dev == 0
    assert calibrator.stats().mean == float(F32(value))


def test_agrees_with_collect(isa):
    x = np.random.default_rng(0).normal(3, 2, 50_000).astype(F32)
    ours, exact = calibrator_of(np.split(x, 5)).stats(), CalibStats.collect([x])
    assert (ours.min, ours.max) == (exact.min, exact.max)
    assert (ours.mean, ours.std_dev) == pytest.approx((exact.mean, exact.std_dev), rel=1e-12)
    assert ours.p99 == pytest.approx(exact.p99, rel=2**-9)


def test_histogram():
    for x in distributions(10_000, np.random.default_rng(3)).values():
        calibrator = calibrator_of([x])
        counts, edges = calibrator.histogram()
        assert (counts.dtype, counts.shape, edges.dtype, edges.shape) == (
            np.int64,
            (65_280,),
            np.float64,
            (65_281,),
        )
        assert (np.diff(edges) > 0).all()
        assert (edges[0], edges[-1]) == (0, 2.0**128)
        expected, _ = np.histogram(np.abs(x).astype(np.float64), edges)
        assert counts.tolist() == expected.tolist()
        counts[:] = 0
        assert calibrator.histogram()[0].sum() == 10_000


def test_bin_edges():
    """Every edge of a bin, and the float below it."""
    edges = Calibrator().histogram()[1][:-1].astype(F32)
    below = (edges[1:].view(np.int32) - 1).view(F32)
    assert (calibrator_of([edges]).histogram()[0] == 1).all()
    assert (calibrator_of([below]).histogram()[0][:-1] == 1).all()


@pytest.mark.parametrize("dtype", ["f2", "f8", ">f4", "bfloat16"])
def test_other_floats(dtype, isa):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    x = np.random.default_rng(0).standard_normal((90, 100)).astype(dtype)
    for channels in (None, 50):
        expected = whole_state(calibrator_of([np.ascontiguousarray(x[:, ::2]).astype(F32)], channels))
        assert whole_state(calibrator_of([x[:, ::2]], channels)) == expected
        assert whole_state(calibrator_of([np.ascontiguousarray(x[:, ::2])], channels)) == expected


def test_shapes():
    x = np.arange(24, dtype=F32)
    expected = exact_state(calibrator_of([x]))
    assert exact_state(calibrator_of([x.reshape(2, 3, 4)])) == expected
    assert exact_state(calibrator_of([*x, [], np.empty((0, 4))])) == expected
    assert exact_state(calibrator_of(x.reshape(4, 6).tolist())) == expected
    expected = exact_state(calibrator_of([x.reshape(6, 4)], 4))
    assert exact_state(calibrator_of([x.reshape(2, 3, 4)], 4)) == expected
    assert (
        exact_state(calibrator_of([*x.reshape(6, 4), np.empty((0, 4)), np.empty((4, 0, 4))], 4)) == expected
    )


# Channels


def check_channels(calibrator, x):
    magnitudes = np.sort(np.abs(x.reshape(-1, x.shape[-1])).astype(np.float64), axis=0)
    assert calibrator.channel_amax().dtype == F32
    assert calibrator.channel_amax().tolist() == magnitudes[-1].tolist()
    for p in PERCENTILES:
        exact = magnitudes[reference.rank(p, len(magnitudes))]
        actual = calibrator.channel_percentile(p)
        assert (actual.dtype, actual.shape) == (F32, (x.shape[-1],))
        bound = np.maximum(2**-4 * exact, 2**-129)
        assert (np.abs(actual - exact) <= bound).all(), p
        assert (actual <= magnitudes[-1]).all(), p


@pytest.mark.parametrize("rows, channels", [(1, 1), (1000, 1), (3, 7), (129, 64), (517, 33), (40, 5000)])
def test_channels_against_full_sort(rows, channels, isa):
    rng = np.random.default_rng(rows)
    x = channel_data(rng, rows, channels)
    calibrator = calibrator_of(np.array_split(x, min(rows, 5)), channels)
    check_channels(calibrator, x)
    check_percentiles(calibrator, x)
    assert calibrator.channels == channels
    assert exact_state(calibrator_of([x], channels)) == exact_state(calibrator)


def test_massive_token_moves_the_maximum_but_not_the_percentile(isa):
    x = np.random.default_rng(0).standard_normal((2000, 16)).astype(F32)
    before = calibrator_of([x], 16).channel_percentile(0.99)
    x[77, 3] = 1500
    calibrator = calibrator_of([x], 16)
    assert calibrator.channel_amax()[3] == 1500
    np.testing.assert_allclose(calibrator.channel_percentile(0.99), before, rtol=2**-3)


@pytest.mark.parametrize("massive", [[1e4], [1e5], [3e38] * 5, np.geomspace(1e2, 1e38, 15), [1e5, 0, 1e-40]])
@pytest.mark.parametrize("where", ["first", "last", "alone", "merged"])
def test_massive_values_do_not_move_the_percentile(massive, where, isa):
    x = np.random.default_rng(0).standard_normal((20_000, 1)).astype(F32)
    massive = np.array(massive, F32)[:, None]
    exact = np.sort(np.abs(np.concatenate([x, massive])), axis=None)
    calibrator = Calibrator(1)
    if where == "first":
        calibrator.update(np.concatenate([massive, x]))
    elif where == "last":
        calibrator.update(np.concatenate([x, massive]))
    elif where == "alone":
        for batch in (x[:50], massive, x[50:]):
            calibrator.update(batch)
    else:
        calibrator.update(massive)
        calibrator.merge(calibrator_of([x], 1))
    for p in (0.5, 0.99, 0.999):
        expected = exact[reference.rank(p, len(exact))]
        assert calibrator.channel_percentile(p)[0] == pytest.approx(expected, rel=2**-4)
        assert calibrator.percentile(p) == pytest.approx(expected, rel=2**-9)
    if len(massive) == 1:
        assert calibrator.channel_percentile(0.999)[0] == pytest.approx(3.21, rel=0.05)


def test_channels_of_every_size():
    """All exponents in every channel; and room for those that occur only."""
    exponents = np.arange(-149, 128)
    x = np.exp2(exponents)[:, None].repeat(3, axis=1).astype(F32)
    calibrator = calibrator_of(x, 3)
    check_channels(calibrator, x)
    assert len(calibrator.__reduce__()[1][7]) == 255
    calibrator = calibrator_of([np.full((5, 3), 1e9), np.full((5, 3), 1e-9), np.zeros((5, 3))], 3)
    assert calibrator.channel_percentile(0.5) == pytest.approx([1e-9] * 3, rel=2**-4)
    assert len(calibrator.__reduce__()[1][7]) == 3


def test_channel_results_are_copies():
    calibrator = calibrator_of([np.ones((3, 2), F32)], 2)
    for p in (0.5, 1.0):
        calibrator.channel_percentile(p)[:] = 7
    calibrator.channel_amax()[:] = 7
    assert calibrator.channel_percentile(0.5).tolist() == calibrator.channel_amax().tolist() == [1, 1]


# Order


@given(data=st.data(), channels=st.sampled_from([None, 1, 3]), rows=st.sampled_from([1, 4, 100]))
@settings(max_examples=80)
def test_merging_is_associative_and_commutative(data, channels, rows):
    rows = channels and rows
    elements = st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False), st.just(-0.0), st.just(0.0)
    )
    shape = st.integers(0, 12).map(lambda n: (n, channels or 1))
    a, b, c = (
        calibrator_of([data.draw(arrays(F32, shape, elements=elements))], channels, rows) for _ in "abc"
    )
    before = [whole_state(one) for one in (a, b, c)]
    assert exact_state(merged([a, b])) == exact_state(merged([b, a]))
    expected = exact_state(merged([merged([a, b]), c]))
    assert exact_state(merged([a, merged([b, c])])) == expected
    assert exact_state(merged([c, a, b])) == expected
    assert exact_state(merged([Calibrator(channels, rows=rows), a, b, c])) == expected
    assert [whole_state(one) for one in (a, b, c)] == before


@given(x=arrays(F32, (60, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32)), data=st.data())
def test_any_order_and_any_batches(x, data):
    before = x.tobytes()
    expected = calibrator_of([x], 3, 10)
    order = data.draw(st.permutations(range(60)))
    cuts = data.draw(st.lists(st.integers(0, 60), max_size=5))
    actual = calibrator_of(np.split(x[list(order)], sorted(cuts)), 3, 10)
    assert exact_state(actual) == exact_state(expected)
    assert_close_moments(actual, expected)
    assert x.tobytes() == before


@pytest.mark.parametrize("mean, std_dev", [(1e4, 1.0), (0.0, 1.0), (-1e6, 0.5), (1e30, 1e25), (1e-3, 1e-30)])
def test_random_trees_of_merges(mean, std_dev, isa):
    rng = np.random.default_rng(0)
    x = rng.normal(mean, std_dev, 60_000).astype(F32)
    expected = calibrator_of([x])
    wide = x.astype(np.longdouble)
    exact_mean = float(wide.mean())
    for _ in range(4):
        parts = np.split(rng.permutation(x), np.sort(rng.integers(0, x.size, 40)))
        calibrators = [calibrator_of([part]) for part in parts]
        while len(calibrators) > 1:
            one = calibrators.pop(rng.integers(len(calibrators)))
            calibrators[rng.integers(len(calibrators))].merge(one)
        assert exact_state(calibrators[0]) == exact_state(expected)
        assert_close_moments(calibrators[0], expected)
    assert expected.stats().mean == pytest.approx(exact_mean, rel=1e-14, abs=1e-14 * std_dev)
    exact_std = float(np.sqrt(((wide - wide.mean()) ** 2).mean()))
    assert expected.stats().std_dev == pytest.approx(exact_std, rel=1e-12)


def test_many_single_elements():
    """Nothing to average within a block: every element is a merge."""
    x = np.random.default_rng(1).normal(1e4, 1, 3000).astype(F32)
    expected = calibrator_of([x])
    assert_close_moments(calibrator_of(x), expected)
    assert_close_moments(merged([calibrator_of([value]) for value in x]), expected)


def test_merging_with_itself_doubles():
    x = channel_data(np.random.default_rng(0), 50, 4)
    calibrator = calibrator_of([x], 4)
    calibrator.merge(calibrator)
    assert exact_state(calibrator) == exact_state(calibrator_of([x, x], 4))
    assert_close_moments(calibrator, calibrator_of([x, x], 4))


def test_threads_with_a_calibrator_each():
    x = np.random.default_rng(0).standard_normal((8, 500, 64)).astype(F32)
    calibrators = [Calibrator(64) for _ in x]
    threads = [threading.Thread(target=c.update, args=(b,)) for c, b in zip(calibrators, x, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exact_state(merged(calibrators)) == exact_state(calibrator_of(x, 64))


# Limits and errors


@pytest.mark.parametrize("channels, doublings, limit", [(None, 62, 2**63 - 1), (2, 31, 2 * (2**32 - 1))])
def test_counts_never_overflow(channels, doublings, limit):
    calibrator = calibrator_of([np.array([1.0, -3.0][: channels or 1], F32)], channels)
    for _ in range(doublings):
        calibrator.merge(calibrator)
    assert calibrator.count == 2**doublings * (channels or 1)
    before = whole_state(calibrator)
    with pytest.raises(ParameterError, match=f"other: expected at most {limit - calibrator.count} more"):
        calibrator.merge(calibrator)
    assert whole_state(calibrator) == before
    assert calibrator.stats().std_dev == (0 if channels is None else 2)
    assert calibrator.percentile(0.5) == pytest.approx(1, rel=2**-9)
    assert calibrator.histogram()[0].sum() == calibrator.count


def test_update_at_the_largest_count():
    calibrator, power = calibrator_of([[1.0]], 1), calibrator_of([[1.0]], 1)
    for _ in range(31):
        power.merge(power)
        calibrator.merge(power)
    assert calibrator.count == 2**32 - 1
    before = whole_state(calibrator)
    with pytest.raises(ParameterError, match="batch: expected at most 0 more elements"):
        calibrator.update([2.0])
    calibrator.update(np.empty((0, 1)))
    assert whole_state(calibrator) == before
    assert calibrator.channel_percentile(0.5).tolist() == [1.0]


@pytest.mark.parametrize("channels", [None, 100])
@pytest.mark.parametrize("index", [0, 5000, 99_999])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_failed_update_changes_nothing(value, index, channels, isa):
    x = np.random.default_rng(0).standard_normal((1000, 100)).astype(F32)
    calibrator = calibrator_of([x], channels)
    before = whole_state(calibrator)
    x *= 1000
    x.flat[index] = value
    with pytest.raises(NonFiniteError, match=f"batch: .* at flat index {index}(,|$)") as caught:
        calibrator.update(x)
    assert (caught.value.index, caught.value.argument) == (index, "batch")
    assert whole_state(calibrator) == before


def test_wrong_shapes_change_nothing():
    calibrator = calibrator_of([np.ones((3, 4), F32)], 4)
    before = whole_state(calibrator)
    for shape in [(), (3,), (4, 3), (0,), (4, 0), (4, 1)]:
        with pytest.raises(ShapeMismatchError) as caught:
            calibrator.update(np.ones(shape, F32))
        assert (caught.value.expected, caught.value.actual) == ("(..., 4)", shape)
        assert whole_state(calibrator) == before


def test_empty_calibrator():
    empty = Calibrator(3), calibrator_of([np.empty((2, 0, 3))], 3), merged([Calibrator(3), Calibrator(3)])
    for calibrator in empty:
        assert calibrator.count == 0
        assert not calibrator.histogram()[0].any()
        percentiles = partial(calibrator.percentile, 0.5), partial(calibrator.channel_percentile, 0.5)
        for call in (calibrator.stats, calibrator.channel_amax, *percentiles):
            with pytest.raises(EmptyInputError, match="calibrator: expected at least one element"):
                call()


def test_repr():
    assert repr(calibrator_of([np.ones((3, 4))], 4)) == "Calibrator(channels=4, count=12)"
    assert repr(calibrator_of([np.ones((3, 4))], 4, 9)) == "Calibrator(channels=4, rows=9, count=12)"


def test_no_array():
    """NumPy would save an object that it cannot read."""
    for make in (np.array, np.asarray, lambda x: np.savez(io.BytesIO(), layer=x)):
        with pytest.raises(DTypeError, match="got Calibrator: save"):
            make(Calibrator(2))


# Sampled rows


def rows_of(x):
    return sorted(map(bytes, np.asarray(x, F32)))


def test_all_rows_are_kept_while_they_are_few():
    x = np.random.default_rng(0).standard_normal((50, 6)).astype(F32)
    calibrator = calibrator_of([x[:20], x[20:], x[:30], np.zeros((9, 6))], 6, 60)
    assert (calibrator.rows, calibrator.sample().dtype) == (60, F32)
    assert rows_of(calibrator.sample()) == rows_of([*x, np.zeros(6)])
    assert calibrator.sample() is not calibrator.sample()


def test_a_sample_does_not_depend_on_order_batches_or_dtype(isa):
    x = np.random.default_rng(0).standard_normal((5000, 70)).astype(np.float16)
    expected = calibrator_of([x], 70, 64).sample()
    assert len(expected) == 64
    assert set(rows_of(expected)) <= set(rows_of(x))
    for batches in (x[::-1], np.split(x.astype(F32), 50), [x.reshape(10, 500, 70)], [x, x[:70]]):
        assert_same_bits(calibrator_of(batches, 70, 64).sample(), expected)
    halves = calibrator_of([x[::2]], 70, 64), calibrator_of([x[1::2]], 70, 64)
    assert_same_bits(merged(halves).sample(), expected)
    assert_same_bits(merged([*halves, halves[0]]).sample(), expected)


def test_a_sample_is_fair():
    """Rows from everywhere, and values of every size, are as likely as others."""
    rng = np.random.default_rng(1)
    x = np.repeat(np.arange(1.0, 20_001.0), 2).reshape(-1, 2) * [[1, -1]]
    x[:, 1] = rng.permutation(x[:, 1])
    chosen = calibrator_of([x], 2, 2000).sample()
    for column in np.abs(chosen.T):
        parts, _ = np.histogram(column, 10, (0, 20_000))
        assert parts.sum() == 2000
        assert ((parts > 140) & (parts < 260)).all()  # 4.5 standard deviations


def test_samples_need_channels_and_one_size():
    with pytest.raises(ParameterError, match="rows: expected None without channels, got 5"):
        Calibrator(rows=5)
    for rows in (0, -1, 1.5, True, "5"):
        with pytest.raises(ParameterError, match="rows: expected an int >= 1"):
            Calibrator(3, rows=rows)
    with pytest.raises(ParameterError, match="rows: expected an int <= 9223372036854775807, got"):
        Calibrator(3, rows=2**63)  # more than its file could say
    with pytest.raises(ParameterError, match="rows: expected a Calibrator made with rows"):
        Calibrator(3).sample()
    with pytest.raises(ParameterError, match="other: expected rows=5, got None"):
        Calibrator(3, rows=5).merge(Calibrator(3))
    assert Calibrator(3, rows=5).sample().shape == (0, 3)


@pytest.mark.parametrize("threads", [2, 3, -1])
def test_threads_of_an_update(threads):
    x = channel_data(np.random.default_rng(0), 300, 200)
    expected, actual = calibrator_of([x, x * F32(0.5)], 200, 10), Calibrator(200, rows=10)
    for batch in (x, x * F32(0.5)):
        actual.update(batch, num_threads=threads)
    assert exact_state(actual) == exact_state(expected)
    assert_close_moments(actual, expected)
