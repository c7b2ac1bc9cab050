"""Layers with few inputs or outputs: int16 kernels, against the oracle and the kernels of other layers."""

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, assert_same_bits

from dynquant import (
    DTypeError,
    LayoutError,
    NonFiniteError,
    QuantLinear,
    ShapeMismatchError,
    _core,
    quantize_weights,
    w4a8_matmul,
    w8a8_matmul,
)

# On either side of every number of inputs, outputs and rows where another loop begins.
INPUTS = [*range(1, 10), 15, 16, 17, 31, 33, 64, 65, 128, 129, 513]
OUTPUTS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65]
ROWS = [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 73]


def rows_of_every_kind(m, k, seed=0):
    """Rows of usual floats, of midpoints between codes, of zeros, and near either end of float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k), F32)
    midpoints = (rng.integers(-127, 127, (m, k)) + 0.5).astype(F32)
    midpoints[:, rng.integers(k)] = 127
    kind = rng.permutation(m) % 9
    x[kind == 1] = midpoints[kind == 1]
    x[kind == 2] = midpoints[kind == 2] * F32(0.37)
    x[kind == 3] = 0
    x[kind == 4] *= F32(1e-43)
    x[kind == 5] *= F32(2e-37)
    x[kind == 6] = np.clip(x[kind == 6], -1, 1) * F32(3e38)
    return x


def int8_weights(n, k, seed=0):
    rng = np.random.default_rng(seed)
    scales = rng.standard_normal(n).astype(F32) * F32(1e-3)
    return rng.integers(-128, 128, (n, k), dtype=np.int8), scales, rng.standard_normal(n).astype(F32)


@pytest.mark.parametrize("k", INPUTS)
def test_int8(k, isa):
    for n in OUTPUTS[k % 2 :: 2]:
        weight, scales, bias = int8_weights(n, k, seed=k)
        x = rows_of_every_kind(max(ROWS), k, seed=n)
        y = reference.w8a8_matmul(weight, scales, x, bias)
        layer = QuantLinear.from_arrays({"weight_i8": weight, "weight_scales": scales, "bias": bias})
        for m in ROWS:
            memory = np.full((m + 1, n), 7, F32)
            layer(x[:m], out=memory[:m])
            assert_same_bits(memory[:m], y[:m], f"n={n}, m={m}")
            assert (memory[m] == 7).all()
        assert_same_bits(layer(layer.quantize_input(x)), y, f"n={n}, codes")
        assert_same_bits(
            w8a8_matmul(weight, scales, x), reference.w8a8_matmul(weight, scales, x), f"n={n}, no bias"
        )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 8, 17, 33, 64, 100, 129])
def test_int4(k, symmetric, isa):
    """Groups of an even number of inputs, and one for all of them."""
    rng = np.random.default_rng(k)
    x = rows_of_every_kind(73, k, seed=k)
    for n in (1, 4, 7, 8, 9, 17, 33):
        for size in (None, 2, 8, 34, 100):
            weight = quantize_weights(
                rng.standard_normal((n, k), F32), bits=4, group_size=size, symmetric=symmetric
            )
            layer = QuantLinear(weight, rng.standard_normal(n).astype(F32))
            y = layer(layer.quantize_input(x))
            for m in (1, 4, 9, 73):
                assert_same_bits(layer(x[:m]), y[:m], f"n={n}, size={size}, m={m}")
    codes = np.stack([weight.data & 15, weight.data >> 4], axis=-1).reshape(n, -1)[:, :k].astype(np.int64)
    if symmetric:
        codes = (codes ^ 8) - 8
    expected = reference.w4a8_matmul(codes, weight.scales, weight.zero_points, 100, x)
    assert_same_bits(w4a8_matmul(weight, x), expected)


@pytest.mark.parametrize("code", [127, -128])
@pytest.mark.parametrize("k", [65_536, 65_537])
def test_the_largest_sums(k, code, isa):
    x = np.full((9, k), 127, F32)
    x[1] = -127
    for n in (1, 4, 7):
        layer = QuantLinear.from_arrays(
            {"weight_i8": np.full((n, k), code, np.int8), "weight_scales": np.ones(n, F32)}
        )
        y = layer(x)
        assert y[0].tolist() == [F32(code * 127 * k)] * n
        assert y[1].tolist() == [F32(-code * 127 * k)] * n


@pytest.mark.parametrize(
    "shape", [(1, 3, 2), (40, 3, 2), (9000, 2, 3), (9000, 3, 2), (40, 900, 3), (300, 40, 70)]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("smooth", [False, True])
def test_what_raises_changes_nothing(shape, bad, smooth, isa):
    m, k, n = shape
    factors = np.full(k, 0.5, F32) if smooth else None
    layer = QuantLinear.from_float(np.ones((n, k), F32), smooth=factors)
    x = np.ones((m, k), F32)
    out = np.full((m, n), 7, F32)
    for place in ((m - 1, k - 1), (0, 0), (m // 2, k // 2)):
        x[place] = bad
        with pytest.raises(NonFiniteError) as error:
            layer(x, out=out)
        assert error.value.position == place
        with pytest.raises(NonFiniteError):
            layer(x)
        x[place] = 1
    assert (out == 7).all()
    assert layer(x, out=out) is out
    assert (out != 7).all()


def test_inputs_of_every_layout(isa):
    """The way for plain arrays leaves all others to the checks of every layer."""
    rng = np.random.default_rng(0)
    layer = QuantLinear.from_float(rng.standard_normal((5, 6), F32), np.arange(5, dtype=F32))
    x = rng.standard_normal((2, 3, 4, 6), F32)
    y = np.stack([layer(row[None])[0] for row in x.reshape(-1, 6)]).reshape(2, 3, 4, 5)
    assert_same_bits(layer(x), y)
    assert_same_bits(layer(x[1, 1, 1]), y[1, 1, 1])
    assert_same_bits(layer(np.asfortranarray(x)), y)
    assert_same_bits(layer(x[::-1, :, ::2]), y[::-1, :, ::2])
    assert_same_bits(layer(x.tolist()), y)
    assert_same_bits(layer(x.astype(np.float64)), y)
    assert_same_bits(layer(x.astype(">f4")), y)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(F32).reshape(x.shape)
    assert_same_bits(layer(unaligned), y)
    out = np.zeros((2, 3, 4, 5), F32)
    assert layer(x, out=out) is out
    assert_same_bits(out, y)
    assert layer(x[:0]).shape == (0, 3, 4, 5)
    with pytest.raises(ShapeMismatchError):
        layer(x[..., :5])
    with pytest.raises(ShapeMismatchError):
        layer(x, out=out.reshape(3, 2, 4, 5))
    with pytest.raises(DTypeError):
        layer(x.astype(np.int32))
    with pytest.raises(DTypeError):
        layer(x, out=out.astype(np.float64))
    out.flags.writeable = False
    with pytest.raises(LayoutError):
        layer(x, out=out)
    with pytest.raises(LayoutError):
        layer(x, out=np.zeros((5, 4, 3, 2), F32).T)
    square = QuantLinear.from_float(np.eye(6, dtype=F32))
    with pytest.raises(LayoutError):
        square(x, out=x)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("names", [("hadamard",), ("smooth",), ("hadamard", "smooth")], ids="+".join)
@pytest.mark.parametrize(("n", "k"), [(3, 40), (33, 24), (2, 4100)])
def test_transformed_inputs(n, k, names, dtype, isa):
    rng = np.random.default_rng(1)
    options = {"hadamard": True, "smooth": rng.uniform(0.5, 2, k).astype(F32)}
    options = {name: options[name] for name in names}
    layer = QuantLinear.from_float(rng.standard_normal((n, k), F32), **options)
    x = rng.standard_normal((70, k), F32).astype(dtype)
    assert_same_bits(layer(x), layer(layer.quantize_input(x)))


@pytest.mark.parametrize(
    ("m", "k", "n"), [(500, 3, 2), (5000, 20, 3), (700, 40, 70), (60, 700, 9), (40, 60, 5000)]
)
def test_threads(m, k, n, isa):
    rng = np.random.default_rng(2)
    layer = QuantLinear.from_float(rng.standard_normal((n, k), F32))
    x = rng.standard_normal((m, k), F32)
    y = layer(x)
    assert_same_bits(layer(x[m // 2 :]), y[m // 2 :])
    _core.set_sharing(True, False)
    try:
        assert_same_bits(layer(x, num_threads=3), y)
        x[-1, -1] = np.nan
        with pytest.raises(NonFiniteError):
            layer(x, num_threads=3)
    finally:
        _core.set_sharing(False, False)
