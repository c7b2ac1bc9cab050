"""Products whose activations decide how they are multiplied: the sums stay the exact integers.

Without VNNI, AVX2 adds products in int16, as many as the codes of a band of rows allow. Each kind of row
below asks for another form, or for the border between two. Scales are 1, so that an output is its sum.
"""

import numpy as np
import pytest
from helpers.common import ISAS, using

from dynquant import QuantLinear

MANY_K = (1, 7, 16, 33, 100, 384)
ROWS = (*range(1, 14), 16, 17, 31, 32, 33, 34, 47, 63, 64, 65, 70)


def codes_of(kind, rng, m, k):
    """(m, k) int8 in [-127, 127]; a row's largest magnitude is 127, which makes its scale 1."""
    i = np.arange(k)
    codes = {
        "small": rng.integers(-6, 7, (m, k)),
        "heavy tails": np.clip(rng.standard_t(2, (m, k)) * 8, -127, 127).round(),
        "normal": np.clip(rng.standard_normal((m, k)) * 40, -127, 127).round(),
        "uniform": rng.integers(-127, 128, (m, k)),
        "positive": rng.integers(0, 40, (m, k)),
        "alternating": np.tile(np.where(i % 2, -127, 127), (m, 1)),
        "alternating pairs": np.tile(np.where(i // 2 % 2, -127, 127), (m, 1)),
        "one sign": np.full((m, k), 127),
        "lanes of 128": np.tile(np.where(i % 2, -16, 16), (m, 1)),
        "lanes of 129": np.tile(np.where(i % 16 < 2, 17, 16) * np.where(i % 2, -1, 1), (m, 1)),
        "lanes of 256": np.tile(np.where(i // 4 % 2, 32, -32) * np.where(i % 2, -1, 1), (m, 1)),
        "lanes of 257": np.tile(np.where(i % 16 < 2, 33, 32) * np.where(i // 4 % 2, 1, -1), (m, 1)),
        "a bad row in a band": rng.integers(-6, 7, (m, k)),
    }[kind].astype(np.int8)
    if kind == "a bad row in a band":
        codes[m // 2] = np.where(i % 2, -127, 127)
    codes[:, k // 2] = 127
    return codes


KINDS = (
    *("small", "heavy tails", "normal", "uniform", "positive", "one sign"),
    *("alternating", "alternating pairs"),
    *("lanes of 128", "lanes of 129", "lanes of 256", "lanes of 257", "a bad row in a band"),
)


def layer_of(weight):
    return QuantLinear.from_arrays({"weight_i8": weight, "weight_scales": np.ones(len(weight), np.float32)})


def weights(rng, n, k):
    """Every weight, and rows of the largest magnitudes of one sign and of both."""
    w = rng.integers(-128, 128, (n, k)).astype(np.int8)
    w[:4] = np.array([-128, 127, 0, 0], np.int8)[:, None]
    w[2] = np.where(np.arange(k) % 2, -128, 127)
    w[3] = np.where(np.arange(k) % 2, 127, -128)
    return w


def check(layer, w, codes):
    expected = (codes.astype(np.float64) @ w.astype(np.float64).T).astype(np.float32)  # exact: below 2**53
    np.testing.assert_array_equal(layer(codes.astype(np.float32)), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_rows(kind, isa):
    rng = np.random.default_rng(0)
    with using(isa):
        for k in MANY_K:
            w = weights(rng, 21, k)
            layer = layer_of(w)
            for m in ROWS:
                check(layer, w, codes_of(kind, rng, m, k))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [65536 + 40, 133_145 + 16])
def test_longer_than_int32_sums(k, kind, isa):
    """Sums of several segments, and above 2**31."""
    rng = np.random.default_rng(1)
    w = weights(rng, 5, k)
    with using(isa):
        layer = layer_of(w)
        for m in (1, 9):
            check(layer, w, codes_of(kind, rng, m, k))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_the_batch(kind):
    """The form of a band, which its rows decide together, changes no bit."""
    rng = np.random.default_rng(2)
    w = weights(rng, 40, 200)
    x = np.concatenate([codes_of(kind, rng, 20, 200), codes_of("uniform", rng, 25, 200)]).astype(np.float32)
    layer = layer_of(w)
    alone = np.concatenate([layer(row[None]) for row in x])
    np.testing.assert_array_equal(layer(x), alone)
    np.testing.assert_array_equal(layer(x[::-1].copy()), alone[::-1])
