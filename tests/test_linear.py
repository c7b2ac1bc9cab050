"""QuantLinear: its results, construction, copies, arrays and errors."""

import concurrent.futures
import copy
import dataclasses
import functools
import io
import pathlib
import pickle
import re

import numpy as np
import pytest
from helpers import reference
from helpers.common import F32, ISAS, assert_same_bits, real_layer, using

from dynquant import (
    DTypeError,
    DynQuantError,
    DynQuantFormat,
    DynQuantTensor,
    EmptyInputError,
    FeatureDimMismatchError,
    LayoutError,
    NonFiniteError,
    ParameterError,
    QuantLinear,
    ShapeMismatchError,
    _core,
    _packed,
    _validate,
    dynamic_quantize,
    error_metrics,
    hadamard_transform,
    quantize_weights,
    smooth_activations,
    smooth_weights,
    w4a8_matmul,
)

DATA = pathlib.Path(__file__).parent / "data"

M, N, K = 6, 37, 96
OPTIONS = {
    "rows": {},
    "groups": {"group_size": 32},
    "odd groups": {"group_size": 7},
    "symmetric": {"group_size": 32, "symmetric": True},
    "symmetric rows": {"symmetric": True},
    "search": {"group_size": 24, "search": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
FACTORS = np.exp2(np.random.default_rng(7).uniform(-3, 3, K)).astype(F32)
ROTATIONS = [{}, {"hadamard": True}, {"smooth": FACTORS}, {"smooth": FACTORS, "hadamard": True}]
each_rotation = pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: " ".join(r) or "plain")
each_symmetry = pytest.mark.parametrize("symmetric", [False, True])


def floats(m=M, n=N, k=K):
    rng = np.random.default_rng(3)
    return (rng.standard_normal(shape).astype(F32) for shape in ((n, k), (m, k), n))


def linear(k, bits, **options):
    """Weight, activations, bias, and the layer that is made of them."""
    weight, x, bias = floats(k=k)
    return weight, x, bias, QuantLinear.from_float(weight, bias, bits=bits, **options)


linear8 = functools.partial(linear, 70, 8)
linear4 = functools.partial(linear, K, 4)


# Results


def test_int8_layer_equals_its_product(isa):
    weight, x, bias, layer = linear8()
    codes, scales = reference.quantize(weight, per_row=True)
    assert_same_bits(layer(x), reference.w8a8_matmul(codes, scales, x, bias))
    assert (layer.in_features, layer.out_features) == (70, 37)


def test_int8_smoothing(isa):
    """Weights times the factors, activations divided by them, both in float32 as the functions do it."""
    factors = np.exp2(np.random.default_rng(0).uniform(-3, 3, 70)).astype(F32)
    weight, x, bias, layer = linear8(smooth=factors)
    codes, scales = reference.quantize(weight * factors, per_row=True)
    assert_same_bits(layer(x), reference.w8a8_matmul(codes, scales, x / factors, bias))
    bound = 0.5 * scales[:, None] / factors
    assert (np.abs(layer.weight_dequantized() - weight) <= 1.001 * bound).all()


@each_option
@each_rotation
def test_int4_layer_equals_its_product(options, rotation, isa):
    """Smoothing comes before the rotation; for weights once, for activations in every call."""
    weight, x, bias, layer = linear4(**options, **rotation)
    if "smooth" in rotation:
        weight, x = smooth_weights(weight, FACTORS), smooth_activations(x, FACTORS)
    if "hadamard" in rotation:
        weight, x = (hadamard_transform(a * reference.signs(K)) for a in (weight, x))
    y = w4a8_matmul(quantize_weights(weight, bits=4, **options), x, bias)
    assert_same_bits(layer(linear4()[1]), y)
    assert (layer.in_features, layer.out_features) == (K, N)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [1, 3, 6, 64, 70, 96, 1000, 4096 + 32])
def test_rotation_of_any_length(k, bits, isa):
    weight, x, bias = floats(5, 9, k)
    layer = QuantLinear.from_float(weight, bias, bits=bits, hadamard=True)
    signs = 1 if k % 2 else reference.signs(k)  # an odd k leaves nothing to rotate
    rotated = QuantLinear.from_float(hadamard_transform(weight * signs), bias, bits=bits)
    assert_same_bits(layer(x), rotated(hadamard_transform(x * signs)))
    assert_same_bits(layer(x.astype(np.float16)), layer(x.astype(np.float16).astype(F32)))


@pytest.mark.parametrize(("k", "span"), [(1536, 128), (256, 128), (96, 32), (33, 1)])
def test_a_layer_rotates_spans_of_at_most_128_channels(k, span):
    rng = np.random.default_rng(k)
    weight, x = rng.standard_normal((6, k)).astype(F32), rng.standard_normal((5, k)).astype(F32)
    signs = reference.signs(k)
    rotated = QuantLinear.from_float(hadamard_transform(weight * signs, block_size=span))
    expected = rotated(hadamard_transform(x * signs, block_size=span))
    assert_same_bits(QuantLinear.from_float(weight, hadamard=True)(x), expected)


@pytest.mark.parametrize("span", [2, 4, 8, 16, 32, 64, 128])
def test_signs_spread_a_common_mean_evenly(span):
    """No sum of a span of signs, rotated, is larger than that of a bent or nearly bent sequence."""
    signs = QuantLinear.from_float(np.ones((1, 1024), F32), hadamard=True).signs
    assert_same_bits(signs, reference.signs(1024))
    flat = 1 if span in (4, 16, 64) else np.sqrt(2)
    assert np.abs(reference.rotate(signs, span)).max() == pytest.approx(flat)


@pytest.mark.parametrize(
    ("activate", "sqnr_db"),
    [
        (lambda z: 1 / (1 + np.exp(-z)), 39.1),
        (lambda z: np.maximum(z, 0), 38.5),
        (lambda z: z * 0.5 * (1 + np.tanh(0.8 * (z + 0.045 * z**3))), 38.5),
        (lambda z: z + 3, 39.1),
    ],
    ids=["sigmoid", "relu", "gelu", "a mean"],
)
def test_rotation_of_inputs_of_one_sign(activate, sqnr_db):
    rng = np.random.default_rng(0)
    weight, z = (rng.standard_normal(shape).astype(F32) for shape in ((64, 1024), (64, 1024)))
    x = activate(z).astype(F32)
    layer = QuantLinear.from_float(weight, hadamard=True)
    assert error_metrics(x @ weight.T, layer(x)).sqnr_db > sqnr_db
    unsigned = QuantLinear(quantize_weights(hadamard_transform(weight, block_size=128)), hadamard=True)
    assert error_metrics(x @ weight.T, unsigned(x)).sqnr_db < sqnr_db - 2


@pytest.mark.parametrize(("name", "sqnr_db"), [("up", 43.3), ("down", 35.8)])
def test_rotation_of_real_layers(name, sqnr_db):
    weight, _, x = real_layer(name)
    y = QuantLinear.from_float(weight, hadamard=True)(x)
    assert error_metrics((x.astype(np.float64) @ weight.T).astype(F32), y).sqnr_db > sqnr_db


@pytest.mark.parametrize("name", ["int8", "int8_smooth", "int4"])
def test_files_of_version_0_1(name, isa):
    """Layers that rotate without signs compute as they did, and stay so when they are saved again."""
    with np.load(DATA / "layers_0_1.npz") as file:
        arrays = {key.removeprefix(f"{name}."): file[key] for key in file if key.startswith(f"{name}.")}
        x, y = file["x"], file[f"{name}_y"]
    layer = QuantLinear.from_arrays(arrays)
    assert layer.hadamard
    assert layer.signs is None
    assert_same_bits(layer(x), y)
    assert set(layer.to_arrays()) == set(arrays)


# Inputs that are quantized once


@each_rotation
@pytest.mark.parametrize("shape", [(K,), (0, K), (7, K), (2, 3, K)])
def test_quantize_input(shape, rotation, isa):
    """Codes of what is multiplied, which several layers take in place of the floats."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal(shape).astype(F32)
    layers = [linear4(group_size=32, **rotation)[3], linear(K, 8, **rotation)[3]]
    codes = layers[0].quantize_input(x)
    prepared = x / FACTORS if "smooth" in rotation else x
    if "hadamard" in rotation:
        prepared = hadamard_transform(prepared * reference.signs(K))
    data, scales = reference.quantize(prepared, per_row=True)
    assert codes.format == DynQuantFormat.INT8_PER_ROW
    assert_same_bits(codes.data, data)
    assert_same_bits(codes.scales, scales)
    assert_same_bits(layers[0].quantize_input(x, num_threads=3).data, data)
    for layer in layers:
        y = layer(x)
        assert_same_bits(layer(codes), y)
        out = np.empty(y.shape, F32)
        assert layer(codes, out=out, num_threads=2) is out
        assert_same_bits(out, y)


@pytest.mark.whitebox
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_more_rows_than_a_chunk(bits):
    layer = QuantLinear.from_float(np.ones((3, K), F32), bits=bits, hadamard=True)
    x = np.random.default_rng(1).standard_normal((9000, K)).astype(F32)
    assert len(x) * layer._layer.activation_bytes() > _packed.CHUNK_BYTES
    codes = layer.quantize_input(x)
    assert_same_bits(layer(codes), layer(x))
    strided = dataclasses.replace(codes, data=codes.data[::2], scales=codes.scales[::2], shape=(4500, K))
    assert_same_bits(layer(strided), np.ascontiguousarray(layer(x)[::2]))
    codes.data[-1, 5] = -128
    out = np.full((9000, 3), 7, F32)
    with pytest.raises(ParameterError, match=r"x: expected codes in \[-127, 127\]"):
        layer(codes, out=out)
    assert (out == 7).all()


# 8-bit weights in groups, and activations with a zero point


def int8_weights(n, k, size, seed=0):
    """Codes of the whole range, -128 included, and scales of both signs for each group."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-128, 128, (n, k), dtype=np.int8)
    codes[0] = -128
    scales = rng.standard_normal((n, -(-k // size))).astype(F32)
    fmt = DynQuantFormat.int8_per_group(size)
    return codes, scales, DynQuantTensor(codes, scales, None, (n, k), fmt), rng.standard_normal(n).astype(F32)


def hard_rows(m, k, seed=1):
    """Rows that are normal, of one sign, alternating at full scale, constant, and of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)).astype(F32)
    kinds = [
        lambda row: row,
        lambda row: np.maximum(row, 0),
        lambda row: np.where(np.arange(k) % 2, F32(1), F32(-1)),
        lambda row: np.full(k, 3, F32),
        lambda row: -np.abs(row) - F32(0.5),
        lambda row: np.zeros(k, F32),
        lambda row: np.where(row > 0, F32(1), F32(0)),
    ]
    return np.stack([kinds[r % len(kinds)](row) for r, row in enumerate(x)]).astype(F32)


@pytest.mark.parametrize("k", [1, 3, 31, 64, 70, 257, 1000])
@pytest.mark.parametrize("size", [1, 7, 32, 64, 1000])
@pytest.mark.parametrize("n", [1, 16, 37, 133])
def test_int8_groups(n, k, size, isa):
    codes, scales, weight, bias = int8_weights(n, k, size)
    x = hard_rows(9, k)
    expected = reference.w4a8_matmul(codes, scales, None, size, x, bias)
    layer = QuantLinear(weight, bias)
    for m in (1, 2, 3, 4, 5, 9):
        assert_same_bits(layer(x[:m]), expected[:m], f"m={m}")
    assert_same_bits(QuantLinear(weight)(x), reference.w4a8_matmul(codes, scales, None, size, x))
    assert_same_bits(layer(layer.quantize_input(x)), expected)
    assert_same_bits(layer(x, num_threads=2), expected)
    arrays = layer.to_arrays()
    assert_same_bits(arrays["weight_i8"], codes)
    assert_same_bits(arrays["weight_scales"], scales)
    assert_same_bits(QuantLinear.from_arrays(arrays)(x), expected)


def test_a_group_larger_than_the_row_is_kept():
    w = np.ones((3, 40), F32)
    for bits in (8, 4):
        layer = QuantLinear.from_float(w, bits=bits, group_size=np.int16(128), activation_bits=np.int16(8))
        again = QuantLinear.from_arrays(layer.to_arrays())
        assert again.group_size == layer.group_size == 128 and again.activation_bits == 8


@pytest.mark.parametrize("k", [1, 3, 31, 64, 70, 257, 1000])
@pytest.mark.parametrize("n", [1, 16, 37, 133])
@pytest.mark.parametrize("size", [None, 32])
def test_asymmetric_activations(n, k, size, isa):
    codes, scales, weight, bias = int8_weights(n, k, size or k)
    x = hard_rows(9, k)
    expected = reference.w8a8_asymmetric(codes, scales, size or k, x, bias)
    if size is None:
        weight = DynQuantTensor(codes, scales[:, 0].copy(), None, (n, k), DynQuantFormat.INT8_PER_ROW)
    layer = QuantLinear(weight, bias, activation_symmetric=False)
    for m in (1, 2, 3, 4, 5, 9):
        assert_same_bits(layer(x[:m]), expected[:m], f"m={m}")
    assert_same_bits(layer(x.astype(np.float16)), layer(x.astype(np.float16).astype(F32)))
    again = QuantLinear.from_arrays(layer.to_arrays())
    assert not again.activation_symmetric
    assert_same_bits(again(x), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32_768, 32_800, 65_600, 140_000])
def test_int8_groups_that_are_summed_in_int64(size, symmetric, isa):
    """The largest sums there are: they pass 2**31 at k = 133,145."""
    k = 140_000
    codes = np.full((2, k), -128, np.int8)
    codes[1] = 127
    scales = np.array([[1.0], [0.5]], F32).repeat(-(-k // size), axis=1)
    weight = DynQuantTensor(codes, scales, None, (2, k), DynQuantFormat.int8_per_group(size))
    x = np.full((3, k), 1, F32)
    x[1] *= -1
    x[2, ::2] = -1
    product = reference.w8a8_asymmetric
    expected = product(codes, scales, size, x)
    if symmetric:
        expected = reference.w4a8_matmul(codes, scales, None, size, x)
    assert_same_bits(QuantLinear(weight, activation_symmetric=symmetric)(x), expected)


@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"group_size": 32, "search": True}], ids=str)
@each_rotation
def test_8_bit_recipes(options, rotation):
    weight, x, bias = floats()
    for more in ({}, {"activation_symmetric": False}, {"activation_bits": None}):
        layer = QuantLinear.from_float(weight, bias, **options, **rotation, **more)
        # The factors are no good ones.
        assert error_metrics(x @ weight.T + bias, layer(x)).sqnr_db > (15 if "smooth" in rotation else 35)
        for through in COPIES.values():
            twin = through(layer)
            assert repr(twin) == repr(layer)
            assert_same_bits(twin(x), layer(x))
            assert twin.memory_bytes == layer.memory_bytes
    q = quantize_weights(weight, **options)
    codes, scales, _ = reference.quantize_weights(
        weight, 8, options.get("group_size"), True, "search" in options
    )
    assert_same_bits(q.data, codes)
    assert_same_bits(q.scales, scales if options else scales[:, 0])


def test_zero_points_gain_where_inputs_are_off_center():
    """Real inputs of the second layer of a feed-forward block come out of a GELU."""
    weight, _, x = real_layer("down")
    y = (x.astype(np.float64) @ weight.T).astype(F32)
    symmetric, asymmetric = (
        error_metrics(y, QuantLinear.from_float(weight, activation_symmetric=s)(x)).sqnr_db
        for s in (True, False)
    )
    assert asymmetric > symmetric + 3


def test_a_range_beyond_float32():
    layer = QuantLinear.from_float(W, activation_symmetric=False)
    x = np.zeros((3, 64), F32)
    x[1, :2] = 3e38, -3e38
    out = np.full((3, 8), 7, F32)
    with pytest.raises(ParameterError, match="range"):
        layer(x, out=out)
    assert (out == 7).all()
    assert np.isfinite(QuantLinear.from_float(W)(x / 2)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_bits": 4}, "activation_bits: expected 8 or None, got 4"),
        ({"activation_bits": 8.0}, "activation_bits"),
        ({"activation_bits": True}, "activation_bits"),
        ({"activation_symmetric": 0}, "activation_symmetric: expected a bool"),
        ({"activation_symmetric": False, "bits": 4}, "activation_symmetric: expected True unless"),
        (
            {"activation_symmetric": False, "activation_bits": None},
            "activation_symmetric: expected True unless",
        ),
    ],
)
def test_options_of_activations(options, message):
    with pytest.raises(ParameterError, match=message):
        QuantLinear.from_float(W, **options)


@pytest.mark.parametrize("bits", [4, 8])
def test_float_activations(bits):
    weight, x, bias = floats()
    layer = QuantLinear.from_float(weight, bias, bits=bits, group_size=32, activation_bits=None)
    y = layer(x)
    np.testing.assert_allclose(y, x @ layer.weight_dequantized().T + bias, rtol=1e-4, atol=1e-4)
    out = np.empty_like(y)
    assert layer(x, out=out) is out
    assert layer(x[None]).shape == (1, *y.shape)
    assert layer.memory_bytes < 0.7 * bits / 8 * weight.nbytes
    for call in (lambda: layer(dynamic_quantize(x)), lambda: layer.quantize_input(x)):
        with pytest.raises(ParameterError, match="activation_bits"):
            call()
    with pytest.raises(NonFiniteError, match="x:"):
        layer(np.where(x == x[0, 0], np.nan, x))
    with pytest.raises(ParameterError, match="symmetric 8-bit"):
        QuantLinear.from_float(weight, activation_symmetric=False).quantize_input(x)


def test_inputs_that_were_quantized_otherwise():
    layer = QuantLinear.from_float(W)
    for codes, error, message in [
        (dynamic_quantize(X, DynQuantFormat.INT8_PER_TENSOR), ParameterError, "as from quantize_input"),
        (dynamic_quantize(X, DynQuantFormat.int8_per_group(8)), ParameterError, "as from quantize_input"),
        (dynamic_quantize(X, DynQuantFormat.INT4_PER_ROW), ParameterError, "as from quantize_input"),
        (dynamic_quantize(X[:, 1:]), ShapeMismatchError, "x: expected shape (..., 64)"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            layer(codes)
    codes = layer.quantize_input(X)
    with pytest.raises(LayoutError, match="out"):
        layer(codes, out=codes.data.view(F32)[:, :8])
    codes.scales[1] = np.inf
    with pytest.raises(NonFiniteError, match=r"x\.scales"):
        layer(codes)
    with pytest.raises(NonFiniteError, match="flat index 3"):
        layer.quantize_input([[1.0, 2, 3, np.nan] * 16])
    with pytest.raises(ShapeMismatchError):
        layer.quantize_input(X[:, 1:])
    with pytest.raises(ParameterError, match="num_threads"):
        layer.quantize_input(X, num_threads=0)
    huge = np.full((1, 64), 1e38, F32) * reference.signs(64)
    with pytest.raises(ParameterError, match="after rotation"):
        QuantLinear.from_float(W, hadamard=True).quantize_input(huge)


@each_option
@each_rotation
def test_weight_dequantized(options, rotation):
    """Up to the error of 4 bits, and in the original space of the weights."""
    weight, _, _, layer = linear4(**options, **rotation)
    values = layer.weight_dequantized()
    factors = rotation.get("smooth", np.ones(K, F32))
    assert error_metrics(weight * factors, values * factors).sqnr_db > 15
    if not rotation:
        assert_same_bits(values, quantize_weights(weight, bits=4, **options).dequantize())


def test_rotation_helps_against_outliers():
    """A channel 100 times as large leaves few codes to the others, unless a rotation distributes it."""
    weight, x, _ = floats()
    assert error_metrics(x @ weight.T, QuantLinear.from_float(weight, bits=4, hadamard=True)(x)).sqnr_db > 15
    x[:, 5] *= 100
    plain, rotated = (
        error_metrics(x @ weight.T, QuantLinear.from_float(weight, hadamard=h)(x)).mse for h in (False, True)
    )
    assert rotated < plain / 3


@pytest.mark.parametrize("shape", [(70,), (0, 70), (2, 3, 70), (1, 1, 1, 70), (2, 0, 70)])
def test_int8_leading_axes(shape):
    _, _, _, layer = linear8()
    x = np.random.default_rng(0).standard_normal(shape).astype(F32)
    rows = layer(x.reshape(-1, 70))
    y = layer(x)
    assert y.shape == (*shape[:-1], 37)
    assert_same_bits(y.reshape(-1, 37), rows)
    out = np.empty(y.shape, F32)
    assert layer(x, out=out) is out
    assert_same_bits(out, y)


@pytest.mark.parametrize("shape", [(K,), (0, K), (2, 3, K), (1, 1, 1, K), (2, 0, K)])
def test_int4_leading_axes(shape):
    layer = linear4(group_size=32, hadamard=True)[3]
    x = np.random.default_rng(0).standard_normal(shape).astype(F32)
    y = layer(x)
    assert y.shape == (*shape[:-1], N)
    assert_same_bits(y.reshape(-1, N), layer(x.reshape(-1, K)))
    out = np.empty(y.shape, F32)
    assert layer(x, out=out) is out
    assert_same_bits(out, y)


@pytest.mark.parametrize("bits", [4, 8])
def test_many_threads_on_one_layer(bits):
    """Callers in 8 threads share the layer, and each call uses 2 threads."""
    rng = np.random.default_rng(4)
    layer = QuantLinear.from_float(rng.standard_normal((150, K)), bits=bits, hadamard=True, smooth=FACTORS)
    batches = [rng.standard_normal((m, K)).astype(F32) for m in (1, 3, 8, 50)] * 10
    wanted = [layer(x) for x in batches]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(functools.partial(layer, num_threads=2), batches))
    for y, right in zip(results, wanted, strict=True):
        assert_same_bits(y, right)


# Construction

RNG = np.random.default_rng(0)
W, X, BIAS = (RNG.standard_normal(shape).astype(F32) for shape in ((8, 64), (5, 64), (8,)))


@pytest.mark.parametrize(
    "options", [{}, {"bits": 4}, {"bits": 4, "group_size": 16, "symmetric": True}], ids=str
)
def test_construction_from_quantized_weights(options):
    layer = QuantLinear(quantize_weights(W, **options), BIAS)
    assert_same_bits(layer(X), QuantLinear.from_float(W, BIAS, **options)(X))


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 16, "search": True}], ids=str)
def test_same_layer_with_any_number_of_threads(options):
    layer = QuantLinear.from_float(W, BIAS, **options, num_threads=3)
    assert_same_bits(layer(X), QuantLinear.from_float(W, BIAS, **options)(X))


@pytest.mark.parametrize(
    ("weight", "more"),
    [
        (W, {}),
        (dynamic_quantize(W, DynQuantFormat.INT8_PER_TENSOR), {}),
        (dynamic_quantize(W, DynQuantFormat.int4_per_group(8)), {}),
        (dynamic_quantize(W, DynQuantFormat.INT4_PER_ROW), {}),
        (dynamic_quantize(W.reshape(2, 4, 64)), {}),
        (dynamic_quantize(W[:0]), {}),
        (quantize_weights(W), {"bias": np.zeros(1, F32)}),
        (quantize_weights(W), {"smooth": np.ones(1, F32)}),
        (quantize_weights(W), {"smooth": np.zeros(64, F32)}),
        (quantize_weights(W), {"hadamard": 1}),
    ],
    ids=str,
)
def test_constructor_arguments_are_checked(weight, more):
    with pytest.raises(DynQuantError):
        QuantLinear(weight, **more)


@pytest.mark.parametrize(
    "name",
    ["in_features", "out_features", "bits", "group_size", "bias", "smooth", "hadamard", "signs"],
)
def test_properties_cannot_be_set(name):
    layer = QuantLinear.from_float(W)
    with pytest.raises(AttributeError):
        setattr(layer, name, 1)
    assert layer(X).shape == (5, 8)


def test_properties():
    smooth = np.linspace(1, 2, 64, dtype=F32)
    layer = QuantLinear.from_float(W, BIAS, bits=4, group_size=16, smooth=smooth, hadamard=True)
    assert (layer.bits, layer.group_size, layer.hadamard) == (4, 16, True)
    for vector, right in ((layer.bias, BIAS), (layer.smooth, smooth), (layer.signs, reference.signs(64))):
        assert_same_bits(vector, right)
        with pytest.raises(ValueError, match="read-only"):
            vector[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            vector.flags.writeable = True
    plain = QuantLinear.from_float(W)
    assert (plain.bits, plain.group_size, plain.hadamard) == (8, None, False)
    assert plain.bias is plain.smooth is plain.signs is None


def test_numpy_makes_no_array_of_a_layer(tmp_path):
    """`numpy.savez` would write an object array, which `numpy.load` refuses."""
    layer = QuantLinear.from_float(W)
    for call in (np.asarray, lambda v: np.savez(tmp_path / "f.npz", layer=v), lambda v: np.array([v])):
        with pytest.raises(DTypeError, match=r"to_arrays\(\)"):
            call(layer)


@pytest.mark.parametrize(
    ("signs", "error"),
    [
        (np.ones(63), FeatureDimMismatchError),
        (np.ones((1, 64)), ShapeMismatchError),
        (np.zeros(64), ParameterError),
        (np.full(64, np.nan), ParameterError),
        (np.ones(64, bool), DTypeError),
    ],
)
def test_signs_are_checked(signs, error):
    q = quantize_weights(W)
    with pytest.raises(error, match="signs"):
        QuantLinear(q, hadamard=True, signs=signs)
    with pytest.raises(ParameterError, match="signs: expected None unless hadamard"):
        QuantLinear(q, signs=np.ones(64))
    own = QuantLinear(q, hadamard=True, signs=np.full(64, -1, np.int8))
    plain = QuantLinear(q, hadamard=True)
    assert_same_bits(own(X), plain(-X))


def test_weights_are_read_for_finite_values_once(monkeypatch):
    """Checked where they come in; again only where a product with factors may overflow."""
    reads = []
    for module in (_validate, _core):
        real = module.all_finite

        def counted(x, *options, real=real):
            reads.append(x.m * x.k)
            return real(x, *options)

        monkeypatch.setattr(module, "all_finite", counted)
    for options, expected in [
        ({}, 1),
        ({"bits": 4, "group_size": 16}, 1),
        ({"smooth": np.ones(64)}, 1),  # the product; the weights are looked at while they are multiplied
        ({"hadamard": True}, 1),  # what is rotated
    ]:
        reads.clear()
        QuantLinear.from_float(W, **options)
        assert reads.count(W.size) == expected, options


def test_calibration_that_leaves_float32_when_smoothed():
    smooth = np.ones(64, F32)
    smooth[3] = 1e-38
    with pytest.raises(NonFiniteError, match="calibration / smooth"):
        QuantLinear.from_float(W, bits=4, smooth=smooth, calibration=X * 1000)


def test_int8_layer_shares_no_memory_with_its_inputs():
    weight, x, bias, layer = linear8(smooth=np.ones(70, F32))
    y = layer(x)
    weight[:], bias[:] = 0, 0
    for array in layer.to_arrays().values():
        array[:] = 1
    assert_same_bits(layer(x), y)


@pytest.mark.parametrize("hadamard", [False, True])
def test_int4_layer_shares_no_memory_with_its_inputs(hadamard):
    weight, x, bias, layer = linear4(group_size=32, smooth=FACTORS.copy(), hadamard=hadamard)
    y, arrays = layer(x), layer.to_arrays()
    read = QuantLinear.from_arrays(arrays)
    weight[:], bias[:] = 0, 0
    for array in (*arrays.values(), *layer.to_arrays().values()):
        array[...] = 1
    assert_same_bits(layer(x), y)
    assert_same_bits(read(x), y)


@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (384, 1536), (4096, 512)])
def test_int8_memory(n, k, isa):
    layer = QuantLinear.from_arrays({"weight_i8": np.ones((n, k), np.int8), "weight_scales": np.ones(n)})
    assert layer.memory_bytes <= 1.02 * n * k


@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (1024, 4096), (4128, 1056)])
@each_symmetry
def test_int4_memory(symmetric, n, k, isa):
    """Half a byte per weight, and 5 bytes per group of 32."""
    fmt = {"in_features": k, "group_size": 32, "weight_i4": np.ones((n, k // 2), np.uint8)}
    if not symmetric:
        fmt["weight_zero_points"] = np.ones((n, k // 32), np.uint8)
    layer = QuantLinear.from_arrays({**fmt, "weight_scales": np.ones((n, k // 32))})
    assert n * k * 0.65 < layer.memory_bytes <= 0.67 * n * k
    biased = QuantLinear.from_arrays({**layer.to_arrays(), "bias": np.ones(n), "smooth": np.ones(k)})
    assert biased.memory_bytes == layer.memory_bytes + 4 * (n + k)


def test_repr():
    for options, text in [
        ({}, "int4 with zero points, bias=True, smooth=False, hadamard=False"),
        ({"symmetric": True, "smooth": FACTORS}, "int4, bias=True, smooth=True, hadamard=False"),
        ({"group_size": 32}, "int4 per_group of 32 with zero points, bias=True"),
        ({"group_size": 8, "symmetric": True, "hadamard": True}, "int4 per_group of 8, bias=True"),
        ({"hadamard": True}, "smooth=False, hadamard=True)"),
    ]:
        layer = repr(linear4(**options)[3])
        assert layer.startswith(f"QuantLinear(in_features={K}, out_features={N}, int4")
        assert text in layer


# Arrays and copies


def test_int8_arrays_do_not_depend_on_the_instruction_set():
    weight, x, bias, _ = linear8()
    layers, arrays = {}, {}
    for isa in ISAS:
        with using(isa):
            layers[isa] = QuantLinear.from_float(weight, bias)
            arrays[isa] = layers[isa].to_arrays()
            y = layers[isa](x)
        for name, array in arrays[isa].items():
            assert_same_bits(array, arrays["baseline"][name], f"{isa} {name}")
            with using("baseline"):
                assert_same_bits(QuantLinear.from_arrays(arrays[isa])(x), y)


@each_option
@each_rotation
def test_int4_arrays_do_not_depend_on_the_instruction_set(options, rotation):
    """Made on one instruction set, loaded on every other."""
    with using("baseline"):
        _, x, _, layer = linear4(**options, **rotation)
        arrays, y = layer.to_arrays(), layer(x)
    for isa in ISAS:
        with using(isa):
            made = linear4(**options, **rotation)[3].to_arrays()
            read = QuantLinear.from_arrays(arrays)
            again = read.to_arrays()
            assert_same_bits(read(x), y)
        assert list(made) == list(again) == list(arrays)
        for name, array in arrays.items():
            assert_same_bits(made[name], array, f"{isa} {name}")
            assert_same_bits(again[name], array, f"{isa} {name}")


def minimums_layer(**options):
    rng = np.random.default_rng(4)
    data, fmt = rng.integers(0, 256, (N, K // 2), dtype=np.uint8), DynQuantFormat.int4_per_group_packed(32)
    scales, minimums = (rng.standard_normal((N, K // 32)).astype(F32) for _ in range(2))
    weight = DynQuantTensor(data, scales, None, (N, K), fmt, minimums)
    return weight, QuantLinear(weight, **options)


def test_minimums(isa):
    weight, layer = minimums_layer()
    _, x, _ = floats()
    assert_same_bits(layer(x), w4a8_matmul(weight, x))
    assert_same_bits(layer.weight_dequantized(), weight.dequantize())
    assert_same_bits(layer(layer.quantize_input(x)), layer(x))
    assert "int4 per_group of 32 with minimums" in repr(layer)
    arrays = layer.to_arrays()
    assert set(arrays) == {"weight_i4", "weight_scales", "weight_minimums", "in_features", "group_size"}
    assert_same_bits(arrays["weight_minimums"], weight.minimums)
    for through in COPIES.values():
        twin = through(layer)
        assert_same_bits(twin(x), layer(x))
        assert repr(twin) == repr(layer)
    floating = minimums_layer(activation_bits=None)[1]
    np.testing.assert_allclose(floating(x), x @ weight.dequantize().T, rtol=1e-4, atol=1e-4)


def test_memory_of_minimums(isa):
    """Half a byte a weight, and 8 bytes a group of 32."""
    n, k = 1024, 1024
    arrays = {"in_features": k, "group_size": 32, "weight_i4": np.ones((n, k // 2), np.uint8)}
    groups = {name: np.ones((n, k // 32)) for name in ("weight_scales", "weight_minimums")}
    assert QuantLinear.from_arrays({**arrays, **groups}).memory_bytes == n * k * 0.75


def test_int4_arrays():
    weight, _, bias, layer = linear4(**OPTIONS["odd groups"], smooth=FACTORS, hadamard=True)
    signs = reference.signs(K)
    q = quantize_weights(hadamard_transform(weight * FACTORS * signs), bits=4, group_size=7)
    arrays = layer.to_arrays()
    for name, wanted in [
        ("weight_i4", q.data),
        ("weight_scales", q.scales),
        ("weight_zero_points", q.zero_points),
        ("bias", bias),
        ("smooth", FACTORS),
        ("signs", signs.astype(np.int8)),
    ]:
        assert_same_bits(arrays.pop(name), wanted, name)
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "in_features": K,
        "group_size": 7,
        "hadamard": True,
    }
    plain = linear4(**OPTIONS["symmetric rows"])[3].to_arrays()
    assert set(plain) == {"weight_i4", "weight_scales", "in_features", "bias"}


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
@pytest.mark.parametrize("smooth", [None, np.full(70, 2, F32)])
def test_int8_copies(through, smooth):
    weight, x, _, layer = linear8(smooth=smooth)
    twin = through(layer)
    assert_same_bits(twin(x), layer(x))
    assert repr(twin) == repr(layer)
    assert twin.memory_bytes == layer.memory_bytes
    assert_same_bits(twin.weight_dequantized(), layer.weight_dequantized())
    assert layer.weight_dequantized().shape == weight.shape


def through_a_file(layer):
    file = io.BytesIO()
    np.savez(file, **layer.to_arrays())
    file.seek(0)
    return QuantLinear.from_arrays(np.load(file))


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "npz": through_a_file,
}


@pytest.mark.parametrize("through", COPIES.values(), ids=COPIES.keys())
@each_option
@each_rotation
def test_int4_copies(options, rotation, through):
    _, x, _, layer = linear4(**options, **rotation)
    twin = through(layer)
    assert_same_bits(twin(x), layer(x))
    assert repr(twin) == repr(layer)
    assert twin.memory_bytes == layer.memory_bytes
    assert_same_bits(twin.weight_dequantized(), layer.weight_dequantized())


def test_pickle_from_another_instruction_set():
    with using(ISAS[0]):
        _, x, _, layer = linear4(group_size=32, hadamard=True)
        text, y = pickle.dumps(layer), layer(x)
    for isa in ISAS:
        with using(isa):
            assert_same_bits(pickle.loads(text)(x), y)


# Errors

W8, SCALES = np.ones((3, 4), np.int8), np.ones(3, F32)
ONES = np.ones((2, 4), F32)
LAYER = QuantLinear.from_float(np.ones((3, 4), F32))
BAD_X = np.array([[1, 2, 3, 4], [5, np.nan, 7, 8]], F32)

BAD_CALLS = [
    (LAYER, (ONES[:, :3],), {}, ShapeMismatchError, "x:"),
    (LAYER, (F32(1),), {}, ShapeMismatchError, "x:"),
    (LAYER, (ONES.astype(int),), {}, DTypeError, "x:"),
    (LAYER, (BAD_X,), {}, NonFiniteError, "flat index 5"),
    (LAYER, (ONES,), {"num_threads": 1.5}, ParameterError, "num_threads"),
    (LAYER, (ONES,), {"out": np.empty((2, 4), F32)}, ShapeMismatchError, "out"),
    (QuantLinear.from_float, (np.ones(3, F32),), {}, ShapeMismatchError, "weight"),
    (QuantLinear.from_float, (np.ones((0, 3), F32),), {}, EmptyInputError, "weight"),
    (QuantLinear.from_float, (BAD_X,), {}, NonFiniteError, "weight"),
    (QuantLinear.from_float, (ONES, [1.0]), {}, ShapeMismatchError, "bias"),
    (QuantLinear.from_float, (ONES,), {"smooth": [1.0, 2]}, FeatureDimMismatchError, "smooth"),
    (QuantLinear.from_float, (ONES,), {"smooth": [1.0, 2, 3, 0]}, ParameterError, "smooth"),
    (QuantLinear.from_float, (ONES * F32(1e38),), {"smooth": [9.0] * 4}, NonFiniteError, "weight * smooth"),
    (QuantLinear.from_arrays, ({"weight_i8": W8},), {}, ParameterError, "weight_scales"),
    (QuantLinear.from_arrays, (None,), {}, ParameterError, "mapping"),
    (QuantLinear.from_arrays, ([W8, SCALES],), {}, ParameterError, "mapping"),
    (
        QuantLinear.from_arrays,
        ({"weight_i8": W8, "weight_scales": SCALES, "b": 1},),
        {},
        ParameterError,
        "'b'",
    ),
    (
        QuantLinear.from_arrays,
        ({"weight_i8": W8[:0], "weight_scales": SCALES[:0]},),
        {},
        EmptyInputError,
        "weight_i8",
    ),
    (
        QuantLinear.from_arrays,
        ({"weight_i8": W8, "weight_scales": SCALES[:2]},),
        {},
        ShapeMismatchError,
        "scales",
    ),
]


@pytest.mark.parametrize(("call", "args", "options", "error", "message"), BAD_CALLS)
def test_bad_calls(call, args, options, error, message):
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert type(caught.value) is error
    assert message in str(caught.value)


def test_overflowing_quotient_is_reported():
    layer = QuantLinear.from_float(np.ones((2, 3), F32), smooth=[1.0, 1e-5, 1.0])
    with pytest.raises(NonFiniteError, match="x / smooth") as caught:
        layer([[1.0, 2, 3], [1, 3e38, 3]])
    assert caught.value.index == 4


@pytest.mark.whitebox
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 3000])
@pytest.mark.parametrize("smooth", [False, True])
def test_rotation_that_overflows_float32(smooth, rows, bits):
    """Sums of 512 that overflow; with 3000 rows after the first chunk."""
    k = 512
    factors = {"smooth": np.full(k, 0.25, F32)} if smooth else {}
    layer = QuantLinear.from_float(np.ones((3, k), F32), bits=bits, hadamard=True, **factors)
    if rows == 3000:
        assert rows * layer._layer.activation_bytes() > _packed.CHUNK_BYTES
    x, out = np.ones((rows, k), F32), np.full((rows, 3), 7, F32)
    x[-1] = F32(2e37) * reference.signs(k)
    for options in ({}, {"out": out}, {"out": out, "num_threads": 2}):
        with pytest.raises(ParameterError, match="x: expected rows within float32 after rotation"):
            layer(x, **options)
    assert (out == 7).all()
    # A non-finite input is reported as such, and so is a non-finite quotient.
    x[-1, 5] = np.inf
    with pytest.raises(NonFiniteError, match="x:") as caught:
        layer(x, out=out)
    assert caught.value.index == (rows - 1) * k + 5
    if smooth:
        x[-1, 5] = 3e38
        with pytest.raises(NonFiniteError, match="x / smooth") as caught:
            layer(x, out=out)
        assert caught.value.index == (rows - 1) * k + 5
    assert (out == 7).all()


GOOD = linear4(group_size=32, smooth=FACTORS, hadamard=True)[3].to_arrays()
INT8 = QuantLinear.from_float(np.ones((3, 4), F32)).to_arrays()
BAD_ARRAYS = [
    ({"weight_i4": GOOD["weight_i4"].view(np.int8)}, DTypeError, "weight_i4"),
    ({"weight_i4": GOOD["weight_i4"].astype(int)}, DTypeError, "weight_i4"),
    ({"weight_i4": GOOD["weight_i4"][0]}, ShapeMismatchError, "weight_i4"),
    ({"weight_i4": GOOD["weight_i4"][:, 1:]}, ShapeMismatchError, "weight_i4"),
    ({"weight_i4": GOOD["weight_i4"][1:]}, ShapeMismatchError, "weight_scales"),
    ({"weight_i4": GOOD["weight_i4"][:0]}, EmptyInputError, "weight_i4"),
    ({"weight_i4": GOOD["weight_i4"][:, :0]}, EmptyInputError, "weight_i4"),
    ({"weight_i8": INT8["weight_i8"]}, ParameterError, "unknown ['weight_i8']"),
    ({"in_features": K + 1}, ShapeMismatchError, "weight_i4"),
    ({"in_features": 0}, ParameterError, "in_features"),
    ({"in_features": np.array([K])}, ParameterError, "in_features"),
    ({"in_features": float(K)}, ParameterError, "in_features"),
    ({"group_size": 0}, ParameterError, "group_size"),
    ({"group_size": np.array(32.0)}, ParameterError, "group_size"),
    ({"group_size": 31}, ShapeMismatchError, "weight_scales"),
    ({"group_size": None}, ShapeMismatchError, "weight_scales"),
    ({"weight_scales": GOOD["weight_scales"][:, :2]}, ShapeMismatchError, "weight_scales"),
    ({"weight_scales": GOOD["weight_scales"][0]}, ShapeMismatchError, "weight_scales"),
    ({"weight_scales": GOOD["weight_scales"] * np.nan}, NonFiniteError, "weight_scales"),
    ({"weight_scales": GOOD["weight_scales"].astype(int)}, DTypeError, "weight_scales"),
    ({"weight_zero_points": GOOD["weight_zero_points"][:, :2]}, ShapeMismatchError, "weight_zero_points"),
    ({"weight_zero_points": GOOD["weight_zero_points"].view(np.int8)}, DTypeError, "weight_zero_points"),
    ({"weight_zero_points": np.full_like(GOOD["weight_zero_points"], 16)}, ParameterError, "zero_points"),
    ({"weight_minimums": GOOD["weight_scales"]}, ParameterError, "weight_minimums: expected none beside"),
    ({"bias": GOOD["bias"][1:]}, ShapeMismatchError, "bias"),
    ({"bias": GOOD["bias"] * np.inf}, NonFiniteError, "bias"),
    ({"smooth": GOOD["smooth"][1:]}, FeatureDimMismatchError, "smooth"),
    ({"smooth": GOOD["smooth"] - GOOD["smooth"]}, ParameterError, "smooth"),
    ({"hadamard": 1}, ParameterError, "hadamard"),
    ({"hadamard": False}, ParameterError, "signs"),
    ({"signs": GOOD["signs"][1:]}, FeatureDimMismatchError, "signs"),
    ({"hadamard": np.array([True])}, ParameterError, "hadamard"),
    ({"more": 1}, ParameterError, "unknown ['more']"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARRAYS, ids=lambda v: str(v)[:40])
def test_invalid_arrays(changes, error, message):
    with pytest.raises(error) as caught:
        QuantLinear.from_arrays({**GOOD, **changes})
    assert type(caught.value) is error
    assert message in str(caught.value)


def test_missing_arrays():
    for name in ("weight_i4", "weight_scales", "in_features"):
        with pytest.raises(ParameterError, match="missing"):
            QuantLinear.from_arrays({key: array for key, array in GOOD.items() if key != name})
    for name in ("weight_zero_points", "in_features"):
        with pytest.raises(ParameterError, match=f"unknown .*{name}"):
            QuantLinear.from_arrays({**INT8, name: GOOD[name]})
    # Without zero points the codes are symmetric.
    symmetric = QuantLinear.from_arrays({k: v for k, v in GOOD.items() if k != "weight_zero_points"})
    assert "zero points" not in repr(symmetric)


def test_no_memory_is_taken_for_what_is_refused():
    layer = QuantLinear.from_float(np.ones((64, 32), F32))
    x = np.broadcast_to(np.zeros(32, np.int8), (1 << 50, 32))
    with pytest.raises(DTypeError, match="x: expected a float array, got dtype int8"):
        layer(x)
