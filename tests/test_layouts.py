"""Weights in the layouts of other libraries: against definitions written out here, and the libraries."""

import ml_dtypes
import numpy as np
import pytest
from helpers.common import F32, ISAS, assert_same_bits, using

from dynquant import (
    DTypeError,
    DynQuantError,
    DynQuantFormat,
    DynQuantTensor,
    EmptyInputError,
    NonFiniteError,
    ParameterError,
    QuantLinear,
    ShapeMismatchError,
    dynamic_quantize,
    quantize_weights,
)

LAYOUTS = ["awq", "compressed-tensors", "gguf", "gptq", "gptq_v2", "matmulnbits"]
INT4_LAYOUTS = ["awq", "compressed-tensors", "gptq", "gptq_v2", "matmulnbits"]


def weights(n, k, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, k)) * np.exp2(rng.integers(-3, 3, (n, 1)))).astype(F32)


def int4(n, k, group, seed=0):
    """Random codes 0..15 and zero points 1..15, and what they stand for."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
    fmt = DynQuantFormat.INT4_PER_ROW_PACKED if group >= k else DynQuantFormat.int4_per_group_packed(group)
    groups = -(-k // group)
    scales = rng.standard_normal((n, groups)).astype(np.float16).astype(F32)
    zero_points = rng.integers(1, 16, (n, groups)).astype(np.uint8)
    padded = np.pad(codes, ((0, 0), (0, k % 2)))
    shape = fmt.scales_shape((n, k))
    tensor = DynQuantTensor(
        padded[:, ::2] | padded[:, 1::2] << 4, scales.reshape(shape), zero_points.reshape(shape), (n, k), fmt
    )
    return tensor, codes, scales, zero_points


def values_of(codes, scales, zero_points, group):
    of = np.arange(codes.shape[1]) // group
    return (codes.astype(F32) - zero_points.astype(F32)[:, of]) * scales[:, of]


def nibble(words, i):
    """Nibble i of int32 words."""
    return words.view(np.uint32) >> np.uint32(4 * i) & np.uint32(15)


def at(words, index, axis=-1):
    """Element `index` of what is packed eight to a word along an axis, the lowest first."""
    return nibble(np.take(words, index // 8, axis), index % 8)


# Layouts as their libraries define them, element by element


@pytest.mark.parametrize(("n", "k", "group"), [(8, 64, 32), (16, 40, 8), (5, 7, 7), (9, 48, 16), (1, 1, 1)])
def test_pack_quantized(n, k, group):
    tensor, codes, scales, zero_points = int4(n, k, group)
    arrays = tensor.to_layout("compressed-tensors")
    assert arrays["weight_packed"].shape == (n, -(-k // 8))
    assert arrays["weight_packed"].dtype == np.int32
    for j in range(k):
        assert (at(arrays["weight_packed"], j) == codes[:, j]).all()
    assert all((at(arrays["weight_packed"], j) == 0).all() for j in range(k, -(-k // 8) * 8))
    for i in range(n):
        assert (at(arrays["weight_zero_point"], i, 0) == zero_points[i]).all()
    assert_same_bits(arrays["weight_scale"], scales)
    assert_same_bits(arrays["weight_shape"], np.array([n, k], np.int64))


def test_int_quantized():
    w = weights(6, 24)
    for group in (None, 8):
        tensor = quantize_weights(w, group_size=group)
        arrays = tensor.to_layout("compressed-tensors")
        assert arrays["weight"] is tensor.data
        assert_same_bits(arrays["weight_scale"], tensor.scales.reshape(6, -1))


@pytest.mark.parametrize("version", [1, 2])
def test_gptq(version):
    tensor, codes, scales, zero_points = int4(16, 64, 32)
    arrays = tensor.to_layout("gptq" if version == 1 else "gptq_v2")
    assert arrays["qweight"].shape == (8, 16)
    assert arrays["qzeros"].shape == (2, 2)
    for j in range(64):
        assert (at(arrays["qweight"], j, 0) == codes[:, j]).all()
    for i in range(16):
        assert (at(arrays["qzeros"], i) == zero_points[i] - (2 - version)).all()
    assert_same_bits(arrays["scales"], np.ascontiguousarray(scales.T))
    assert arrays["g_idx"].tolist() == [0] * 32 + [1] * 32


def test_gptq_with_zero_points_of_zero():
    tensor, *_ = int4(8, 32, 32)
    tensor.zero_points[3] = 0
    with pytest.raises(ParameterError, match="gptq_v2 takes it"):
        tensor.to_layout("gptq")
    # As GPTQModel stores it: it subtracts from whole words, so that a borrow goes to the next zero point.
    arrays = tensor.to_layout("gptq_v2")
    arrays["qzeros"] = (arrays["qzeros"].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    back = DynQuantTensor.from_layout("gptq", arrays)
    assert_same_bits(back.zero_points, tensor.zero_points)


def test_awq():
    tensor, codes, scales, zero_points = int4(16, 64, 32)
    arrays = tensor.to_layout("awq")
    assert arrays["qweight"].shape == (64, 2)
    for i in range(16):
        place = [0, 2, 4, 6, 1, 3, 5, 7].index(i % 8)
        assert (nibble(arrays["qweight"][:, i // 8], place) == codes[i]).all()
        assert (nibble(arrays["qzeros"][:, i // 8], place) == zero_points[i]).all()
    assert_same_bits(arrays["scales"], np.ascontiguousarray(scales.T))


def test_q8_0():
    tensor = quantize_weights(weights(3, 64), group_size=32)
    arrays = tensor.to_layout("gguf", scale_dtype=np.float16)
    blocks = arrays["data"].reshape(3, 2, 34)
    assert arrays["type"] == 8
    assert (blocks[..., 2:].view(np.int8).reshape(3, 64) == tensor.data).all()
    assert (blocks[..., :2].copy().view("<f2")[..., 0] == tensor.scales.astype(np.float16)).all()


def test_q4_0():
    tensor, codes, scales, _ = int4(3, 64, 32)
    tensor.zero_points[:] = 8
    arrays = tensor.to_layout("gguf")
    blocks = arrays["data"].reshape(3, 2, 18)
    assert arrays["type"] == 2
    for j in range(16):
        assert (blocks[..., 2 + j] & 15 == codes.reshape(3, 2, 32)[..., j]).all()
        assert (blocks[..., 2 + j] >> 4 == codes.reshape(3, 2, 32)[..., 16 + j]).all()
    assert (blocks[..., :2].copy().view("<f2")[..., 0] == scales).all()


@pytest.mark.parametrize(("k", "group"), [(64, 16), (40, 32), (33, 32), (7, 7)])
def test_matmulnbits(k, group):
    tensor, codes, scales, zero_points = int4(5, k, group)
    arrays = tensor.to_layout("matmulnbits")
    block = 16 if group == 7 else group
    blocks = -(-k // block)
    assert arrays["B"].shape == (5, blocks, block // 2)
    rows = arrays["B"].reshape(5, -1)
    for j in range(k):
        assert (rows[:, j // 2] >> 4 * (j % 2) & 15 == codes[:, j]).all()
    for g in range(blocks):
        assert (arrays["zero_points"][:, g // 2] >> 4 * (g % 2) & 15 == zero_points[:, g]).all()
    assert_same_bits(arrays["scales"], scales)
    assert (arrays["K"], arrays["bits"]) == (k, 4)


def test_matmulnbits_of_8_bits():
    tensor = quantize_weights(weights(5, 40), group_size=32)
    arrays = tensor.to_layout("matmulnbits")
    assert arrays["B"].shape == (5, 2, 32)
    assert (arrays["B"].reshape(5, 64)[:, :40].astype(int) - 128 == tensor.data).all()
    assert (arrays["B"].reshape(5, 64)[:, 40:] == 128).all()
    assert arrays["bits"] == 8


# There and back


@pytest.mark.parametrize("name", INT4_LAYOUTS)
@pytest.mark.parametrize("group", [16, 64, 128])
def test_codes_scales_and_zero_points_come_back(name, group):
    tensor, codes, scales, zero_points = int4(24, 128, group)
    for scale_dtype in (None, np.float16, np.float32):
        back = DynQuantTensor.from_layout(name, tensor.to_layout(name, scale_dtype=scale_dtype))
        assert back.shape == tensor.shape
        assert back.format.group_of(128) == group
        assert_same_bits(np.ascontiguousarray(back.data), tensor.data)
        assert_same_bits(back.scales, tensor.scales)
        assert_same_bits(back.zero_points, tensor.zero_points)
        assert_same_bits(back.dequantize(), values_of(codes, scales, zero_points, group))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_of_eight_need_no_place(name, symmetric):
    tensor = quantize_weights(weights(8, 96), bits=4, group_size=32, symmetric=True)
    if not symmetric:
        tensor = DynQuantTensor(
            tensor.data ^ 0x88, tensor.scales, np.full((8, 3), 8, np.uint8), (8, 96), tensor.format
        )
    arrays = tensor.to_layout(name, scale_dtype=np.float16)
    assert not {"weight_zero_point", "zero_points"} & set(arrays)
    back = DynQuantTensor.from_layout(name, arrays)
    assert (back.zero_points == 8).all()
    rounded = DynQuantTensor(
        tensor.data,
        tensor.scales.astype(np.float16).astype(F32),
        tensor.zero_points,
        tensor.shape,
        tensor.format,
    )
    assert_same_bits(back.dequantize(), rounded.dequantize())
    x = weights(4, 96, 1)
    for isa in ISAS:
        with using(isa):
            assert_same_bits(QuantLinear(back)(x), QuantLinear(rounded)(x))


@pytest.mark.parametrize("name", ["compressed-tensors", "gguf", "matmulnbits"])
def test_int8_comes_back(name):
    tensor = quantize_weights(weights(8, 96), group_size=32)
    tensor.data[0, 0] = -128
    tensor.scales[:] = tensor.scales.astype(np.float16)
    back = DynQuantTensor.from_layout(name, tensor.to_layout(name))
    assert back.format == tensor.format
    assert_same_bits(back.data, tensor.data)
    assert_same_bits(back.scales, tensor.scales)


def test_odd_lengths_come_back():
    for n, k in [(1, 1), (3, 5), (9, 15)]:
        for tensor in (quantize_weights(weights(n, k), bits=4), quantize_weights(weights(n, k))):
            for name in ["compressed-tensors"] + ["matmulnbits"] * (tensor.format.bits == 4):
                back = DynQuantTensor.from_layout(name, tensor.to_layout(name))
                assert_same_bits(back.dequantize(), tensor.dequantize())


def test_short_last_group():
    tensor = quantize_weights(weights(8, 80), bits=4, group_size=32)
    back = DynQuantTensor.from_layout("matmulnbits", tensor.to_layout("matmulnbits"))
    assert_same_bits(back.dequantize(), tensor.dequantize())
    for name in ["awq", "compressed-tensors", "gptq", "gguf"]:
        with pytest.raises(ParameterError, match="tensor: expected"):
            tensor.to_layout(name)


def test_arrays_are_kept_where_the_layout_is_the_same():
    arrays = quantize_weights(weights(8, 64)).to_layout("compressed-tensors")
    assert DynQuantTensor.from_layout("compressed-tensors", arrays).data is arrays["weight"]
    arrays = quantize_weights(weights(8, 64), bits=4).to_layout("compressed-tensors")
    back = DynQuantTensor.from_layout("compressed-tensors", arrays)
    assert np.shares_memory(back.data, arrays["weight_packed"])


def test_scales_are_widened_exactly():
    tensor = quantize_weights(weights(8, 64), bits=4, group_size=16)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        arrays = tensor.to_layout("compressed-tensors", scale_dtype=dtype)
        assert arrays["weight_scale"].dtype == dtype
        back = DynQuantTensor.from_layout("compressed-tensors", arrays)
        assert_same_bits(back.scales, tensor.scales.astype(dtype).astype(F32))


def test_one_scale_for_all():
    arrays = {"weight": np.array([[1, -2], [3, 4]], np.int8), "weight_scale": np.array([0.5], F32)}
    back = DynQuantTensor.from_layout("compressed-tensors", arrays)
    assert back.dequantize().tolist() == [[0.5, -1.0], [1.5, 2.0]]
    arrays["weight_scale"] = np.array([0.5, 2.0], F32)
    assert DynQuantTensor.from_layout("compressed-tensors", arrays).dequantize()[1].tolist() == [6.0, 8.0]


def test_q4_1_has_minimums():
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (3, 40)).astype(np.uint8)
    halves = rng.standard_normal((3, 2, 2)).astype("<f2")
    data.reshape(3, 2, 20)[..., :4] = halves.view(np.uint8)
    tensor = DynQuantTensor.from_layout("gguf", {"data": data, "type": 3})
    codes = data.reshape(3, 2, 20)[..., 4:]
    codes = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(F32)
    d, m = halves[..., :1].astype(F32), halves[..., 1:].astype(F32)
    assert_same_bits(tensor.dequantize(), (codes * d + m).reshape(3, 64))
    again = tensor.to_layout("gguf")
    assert again["type"] == 3
    assert_same_bits(again["data"], data)
    for name in set(LAYOUTS) - {"gguf"}:
        with pytest.raises(ParameterError, match="tensor: expected codes without minimums"):
            tensor.to_layout(name)
    tensor.minimums[0, 0] = 70_000
    with pytest.raises(ParameterError, match="scale_dtype: expected one with a range for the scales and min"):
        tensor.to_layout("gguf", scale_dtype=np.float16)
    tensor.minimums[0, 0] = 0.1
    with pytest.raises(ParameterError, match="tensor: expected scales and minimums that are float16"):
        tensor.to_layout("gguf")


@pytest.mark.parametrize("dtype", [np.float16, F32])
def test_zero_points_that_are_floats(dtype):
    tensor, codes, scales, _ = int4(5, 96, 32)
    arrays = tensor.to_layout("matmulnbits")
    arrays["zero_points"] = np.random.default_rng(1).uniform(0, 15, (5, 3)).astype(dtype)
    back = DynQuantTensor.from_layout("matmulnbits", arrays)
    zeros, of = arrays["zero_points"].astype(F32), np.arange(96) // 32
    assert_same_bits(back.dequantize(), codes.astype(F32) * scales[:, of] + (-zeros * scales)[:, of])


def test_byte_order_of_files():
    tensor, *_ = int4(8, 64, 32)
    for name in INT4_LAYOUTS:
        arrays = tensor.to_layout(name)
        swapped = {
            key: array.astype(array.dtype.newbyteorder("S")) if array.ndim else array
            for key, array in arrays.items()
        }
        assert_same_bits(DynQuantTensor.from_layout(name, swapped).dequantize(), tensor.dequantize())


def test_flat_arrays_of_older_matmulnbits():
    tensor, *_ = int4(4, 96, 32)
    arrays = tensor.to_layout("matmulnbits")
    arrays["scales"], arrays["zero_points"] = arrays["scales"].reshape(-1), arrays["zero_points"].reshape(-1)
    del arrays["K"], arrays["bits"]
    assert_same_bits(DynQuantTensor.from_layout("matmulnbits", arrays).dequantize(), tensor.dequantize())


def test_pack_quantized_of_8_bits():
    codes = np.arange(-128, 128).astype(np.int8).reshape(4, 64)[:, :63]
    padded = np.zeros((4, 64), np.uint8)
    padded[:, :63] = codes.view(np.uint8) ^ 0x80
    arrays = {
        "weight_packed": padded.view(np.int32),
        "weight_scale": np.ones((4, 1), F32),
        "weight_shape": np.array([4, 63]),
    }
    assert_same_bits(DynQuantTensor.from_layout("compressed-tensors", arrays).data, codes)


# What cannot be


def with_minimums(n, k):
    scales = np.ones((n, k // 32), F32)
    fmt = DynQuantFormat.int4_per_group_packed(32)
    return DynQuantTensor(np.zeros((n, k // 2), np.uint8), scales, None, (n, k), fmt, scales)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("awq", lambda: quantize_weights(weights(8, 32))),
        ("gptq", lambda: quantize_weights(weights(8, 32))),
        ("awq", lambda: int4(6, 32, 16)[0]),
        ("gptq", lambda: int4(6, 32, 16)[0]),
        ("gptq", lambda: int4(8, 36, 18)[0]),
        ("gguf", lambda: quantize_weights(weights(8, 32))),
        ("gguf", lambda: int4(8, 64, 32)[0]),
        ("gguf", lambda: quantize_weights(weights(8, 64), group_size=16)),
        ("gguf", lambda: quantize_weights(weights(8, 64), group_size=32)),
        ("matmulnbits", lambda: int4(8, 64, 8)[0]),
        ("matmulnbits", lambda: quantize_weights(weights(8, 300))),
        ("compressed-tensors", lambda: dynamic_quantize(weights(8, 64), DynQuantFormat.INT4_PER_ROW)),
        ("compressed-tensors", lambda: dynamic_quantize(weights(8, 64), DynQuantFormat.INT8_PER_TENSOR)),
        ("gptq", lambda: with_minimums(8, 64)),
        ("ct", lambda: int4(8, 64, 32)[0]),
        (None, lambda: int4(8, 64, 32)[0]),
    ],
)
def test_what_a_layout_cannot_hold(name, tensor):
    with pytest.raises(ParameterError, match=r"^(tensor|name): expected .* got "):
        tensor().to_layout(name)


def test_scales_that_leave_their_dtype():
    tensor = quantize_weights(weights(8, 32) * F32(1e9), group_size=32)
    with pytest.raises(ParameterError, match="scale_dtype: expected"):
        tensor.to_layout("gguf", scale_dtype=np.float16)
    for dtype in (np.int8, np.float64, "abc", 3):
        with pytest.raises(ParameterError, match="scale_dtype: expected float32, float16 or bfloat16, got"):
            tensor.to_layout("compressed-tensors", scale_dtype=dtype)


def changed(name, **changes):
    bits8 = name == "int8"
    tensor = quantize_weights(weights(8, 64), group_size=32) if bits8 else int4(8, 64, 32)[0]
    if name == "gguf":
        tensor.zero_points[:] = 8
    layout = "compressed-tensors" if bits8 else name
    arrays = tensor.to_layout(layout)
    arrays.update(changes)
    return layout, {key: array for key, array in arrays.items() if array is not None}


I32 = np.int32


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("int8", {"weight": np.zeros((8, 64), F32)}, DTypeError, "weight: expected dtype int8, got float32"),
        ("int8", {"weight": np.zeros(8, np.int8)}, ShapeMismatchError, "weight: expected"),
        ("int8", {"weight": np.zeros((8, 0), np.int8)}, EmptyInputError, "weight: expected"),
        ("int8", {"weight_scale": None}, ParameterError, "missing"),
        ("int8", {"other": np.zeros(3)}, ParameterError, "unknown"),
        ("int8", {"weight_scale": np.full((8, 2), np.nan, F32)}, NonFiniteError, "weight_scale"),
        ("int8", {"weight_scale": np.ones((8, 3), F32)}, ParameterError, "weight_scale: expected as many"),
        ("int8", {"weight_scale": np.ones((7, 2), F32)}, ShapeMismatchError, "weight_scale: expected"),
        ("int8", {"weight_zero_point": np.ones((8, 2), np.int8)}, ParameterError, "weight_zero_point"),
        ("int8", {"weight_g_idx": np.zeros(64, I32)}, ParameterError, "weight_g_idx: expected groups"),
        (
            "compressed-tensors",
            {"weight_shape": np.array([8, 90])},
            ParameterError,
            "weight_packed: expected",
        ),
        ("compressed-tensors", {"weight_shape": np.array([7, 64])}, ParameterError, "weight_shape: expected"),
        ("compressed-tensors", {"weight_shape": np.array([8, -4])}, ParameterError, "weight_shape: expected"),
        ("compressed-tensors", {"weight_shape": np.array([8])}, ShapeMismatchError, "weight_shape: expected"),
        ("compressed-tensors", {"weight_shape": np.ones(2, F32)}, DTypeError, "weight_shape: expected"),
        (
            "compressed-tensors",
            {"weight_zero_point": np.ones((8, 2), I32)},
            ShapeMismatchError,
            "weight_zero_point: expected",
        ),
        ("gptq", {"qzeros": np.zeros((2, 2), I32)}, ParameterError, "qzeros: expected 4-bit"),
        ("gptq", {"qzeros": np.zeros((1, 1), I32)}, ParameterError, "qzeros: expected 4-bit"),
        ("gptq", {"qweight": np.zeros((16, 8), I32)}, ParameterError, "qweight: expected 4-bit"),
        ("gptq", {"g_idx": np.arange(64, dtype=I32) % 2}, ParameterError, "g_idx: expected groups of 32"),
        ("gptq", {"scales": np.ones((2, 9), F32)}, ShapeMismatchError, "scales: expected"),
        ("gptq", {"scales": np.ones(8, F32)}, ShapeMismatchError, "scales: expected"),
        ("gptq", {"scales": np.ones((0, 8), F32)}, ShapeMismatchError, "scales: expected"),
        ("awq", {"qweight": np.zeros((63, 1), I32)}, ParameterError, "scales: expected as many groups"),
        ("awq", {"qweight": np.zeros((64, 1), np.int64)}, DTypeError, "qweight: expected dtype int32"),
        ("gguf", {"type": np.array(7)}, ParameterError, "type: expected 2"),
        ("gguf", {"type": np.arange(3)}, ParameterError, "type: expected 2"),
        ("gguf", {"data": np.zeros((8, 37), np.uint8)}, ShapeMismatchError, "data: expected"),
        ("gguf", {"data": np.full((8, 36), 0xFF, np.uint8)}, NonFiniteError, "data: expected"),
        ("matmulnbits", {"bits": np.array(2)}, ParameterError, "bits: expected 4 or 8"),
        ("matmulnbits", {"K": np.array(100)}, ParameterError, "K: expected 2 blocks of 32"),
        ("matmulnbits", {"K": np.array(0)}, ParameterError, "K: expected an int >= 1"),
        ("matmulnbits", {"scales": np.ones((8, 3), F32)}, ShapeMismatchError, "scales: expected"),
        (
            "matmulnbits",
            {"zero_points": np.ones((8, 2), np.uint8)},
            ShapeMismatchError,
            "zero_points: expected",
        ),
        (
            "matmulnbits",
            {"zero_points": np.ones((8, 1), np.int8)},
            DTypeError,
            "zero_points: expected dtype",
        ),
        ("matmulnbits", {"B": np.zeros((8, 32), np.uint8)}, ShapeMismatchError, "B: expected"),
    ],
)
def test_bad_arrays(name, changes, error, message):
    layout, arrays = changed(name, **changes)
    with pytest.raises(DynQuantError, match=message) as caught:
        DynQuantTensor.from_layout(layout, arrays)
    assert type(caught.value) is error


@pytest.mark.parametrize("arrays", [None, 3, [np.zeros(3)], {}])
def test_no_mapping_of_arrays(arrays):
    for name in LAYOUTS:
        with pytest.raises(ParameterError, match="arrays: expected"):
            DynQuantTensor.from_layout(name, arrays)


# Against the libraries, where they are installed


@pytest.mark.parametrize(("n", "k"), [(8, 64), (5, 40), (16, 33)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_packs_the_same(n, k, symmetric):
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    tensor, codes, _, zero_points = int4(n, k, k)
    if symmetric:
        tensor.zero_points[:] = 8
    arrays = tensor.to_layout("compressed-tensors")
    signed = torch.from_numpy(codes.astype(np.int8) - np.int8(8))
    assert (helpers.pack_to_int32(signed, 4).numpy() == arrays["weight_packed"]).all()
    if not symmetric:
        zeros = torch.from_numpy(zero_points.astype(np.int8) - np.int8(8))
        packed = helpers.pack_to_int32(zeros, 4, packed_dim=0).numpy()
        assert (packed == arrays["weight_zero_point"]).all()


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32)])
def test_gguf_dequantizes_the_same(bits, group):
    gguf = pytest.importorskip("gguf")
    tensor = quantize_weights(weights(8, 96), bits=bits, group_size=group, symmetric=True)
    arrays = tensor.to_layout("gguf", scale_dtype=np.float16)
    kind = gguf.GGMLQuantizationType(int(arrays["type"]))
    values = DynQuantTensor.from_layout("gguf", arrays).dequantize()
    assert_same_bits(gguf.dequantize(arrays["data"], kind), values)
    # And what the library wrote.
    data = gguf.quantize(weights(8, 96), kind)
    read = DynQuantTensor.from_layout("gguf", {"data": data, "type": kind})
    assert_same_bits(gguf.dequantize(data, kind), read.dequantize())
    again = read.to_layout("gguf")
    assert_same_bits(again["data"], data)


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_onnxruntime_quantizes_and_multiplies(block, symmetric):
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer", exc_type=ImportError)
    w, x = weights(24, 300), weights(5, 300, 1)
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", float32, [None, 300])],
        [helper.make_tensor_value_info("y", float32, [None, 24])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(w.T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    job = quantizer.MatMulNBitsQuantizer(model, block_size=block, is_symmetric=symmetric)
    job.process()
    made = job.model.model
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in made.graph.initializer}
    node = next(node for node in made.graph.node if node.op_type == "MatMulNBits")
    arrays = {
        key: stored[name]
        for key, name in zip(["B", "scales", "zero_points"], node.input[1:], strict=False)
        if name
    }
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    tensor = DynQuantTensor.from_layout("matmulnbits", {**arrays, "K": attributes["K"]})
    assert tensor.format.group_size == block
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    layer = QuantLinear(tensor, activation_bits=None)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    again = tensor.to_layout("matmulnbits")
    assert_same_bits(again["scales"], arrays["scales"].reshape(24, -1))
    for which in (again, arrays):  # codes beyond k and zero points beyond the last block may differ
        which["B"] = which["B"].reshape(24, -1)[:, :150]
    assert_same_bits(again["B"], arrays["B"])
    assert ("zero_points" in again) == (not symmetric)
