"""Opening and reading model files: safetensors, sharded folders, GGUF; layers in every layout."""

import json
import struct

import numpy as np
import pytest
from helpers import models
from helpers.common import F32, assert_same_bits

import dynquant
from dynquant import (
    DTypeError,
    DynQuantTensor,
    EmptyInputError,
    NonFiniteError,
    ParameterError,
    QuantLinear,
    ShapeMismatchError,
    open_model,
    quantize_weights,
)

pytest.importorskip("safetensors")

LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_names_shapes_dtypes_and_rows(tmp_path, shards, dtype):
    arrays = models.write_model(tmp_path / "m", shards, dtype=dtype)
    model = open_model(tmp_path / "m")
    assert sorted(model.names) == sorted(arrays)
    assert model.format == "safetensors"
    assert len(model.files) == shards
    assert len(model) == len(arrays)
    assert LAYER + ".weight" in model
    assert not model.layers
    for name, array in arrays.items():
        expected = array[1] if isinstance(array, tuple) else array
        assert model.shape(name) == expected.shape
        if name == "model.position_ids":
            assert model.dtype(name) == "I64"
            assert_same_bits(model.array(name), array)
            continue
        assert model.dtype(name) == dtype
        wanted = models.values(array)
        assert_same_bits(model.rows(name), wanted)
        assert_same_bits(model.rows(name, 3, 17), wanted[3:17])
        assert_same_bits(model.rows(name, 5, 5), wanted[5:5])


def test_float32_rows_are_a_view_of_the_file(tmp_path):
    models.write_model(tmp_path / "m")
    model = open_model(str(tmp_path / "m" / "model.safetensors"))
    rows = model.rows(LAYER + ".weight", 0, 4)
    assert not rows.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        rows[0, 0] = 1
    assert model.config["model_type"] == "llama"
    assert model.metadata == {"format": "pt"}


def test_layers_of_floats(tmp_path):
    arrays = models.write_model(tmp_path / "m")
    model = open_model(tmp_path / "m")
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(F32)
    for recipe in ({}, {"bits": 4, "group_size": 32}):
        expected = QuantLinear.from_float(arrays[LAYER + ".weight"], arrays[LAYER + ".bias"], **recipe)
        for name in (LAYER, LAYER + ".weight"):
            assert_same_bits(model.linear(name, **recipe)(x), expected(x))
    assert model.linear("lm_head").bias is None


def quantized(bits=4, group=32):
    rng = np.random.default_rng(1)
    tensor = quantize_weights(rng.standard_normal((64, 96)).astype(F32), bits=bits, group_size=group)
    if tensor.zero_points is not None:
        np.maximum(tensor.zero_points, 1, out=tensor.zero_points)
    return tensor


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "gptq_v2", "awq"])
def test_layers_in_the_layouts_of_others(tmp_path, layout, told):
    tensor, bias = quantized(), np.ones(64, F32)
    arrays = {f"a.b.{key}": array for key, array in tensor.to_layout(layout).items()}
    models.write_safetensors(tmp_path / "model.safetensors", {**arrays, "a.b.bias": bias})
    method = "gptq" if layout.startswith("gptq") else layout
    config = {"quant_method": method, "checkpoint_format": layout}
    if told:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    elif layout == "gptq_v2":
        (tmp_path / "quantize_config.json").write_text(json.dumps({"checkpoint_format": layout}))
    model = open_model(tmp_path)
    assert dict(model.layers) == {"a.b": layout}
    x = np.random.default_rng(0).standard_normal((3, 96)).astype(F32)
    for name in ("a.b", "a.b.weight"):
        assert_same_bits(model.linear(name)(x), QuantLinear(tensor, bias)(x))
        assert_same_bits(model.tensor(name).dequantize(), tensor.dequantize())
    floats = model.linear("a.b", activation_bits=None)
    np.testing.assert_allclose(floats(x), x @ tensor.dequantize().T + bias, rtol=1e-4, atol=1e-4)
    with pytest.raises(ParameterError, match="bits: expected nothing for weights that are quantized"):
        model.linear("a.b", bits=8)


def test_int8_layers(tmp_path):
    for group in (None, 32):
        tensor = quantized(8, group)
        arrays = {f"a.{key}": array for key, array in tensor.to_layout("compressed-tensors").items()}
        models.write_safetensors(tmp_path / "m.safetensors", arrays)
        model = open_model(tmp_path / "m.safetensors")
        assert model.tensor("a").format == tensor.format
        assert_same_bits(model.tensor("a").data, tensor.data)


def test_scales_of_bfloat16(tmp_path):
    tensor = quantized()
    arrays = {f"a.{key}": array for key, array in tensor.to_layout("compressed-tensors").items()}
    bits = models.bf16_bits(arrays["a.weight_scale"])
    arrays["a.weight_scale"] = ("BF16", bits)
    models.write_safetensors(tmp_path / "m.safetensors", arrays)
    assert_same_bits(open_model(tmp_path / "m.safetensors").tensor("a").scales, models.bf16_values(bits))


def test_what_quantized_layers_cannot_be(tmp_path):
    arrays = {f"a.{key}": array for key, array in quantized().to_layout("gptq").items()}
    arrays["a.g_idx"] = arrays["a.g_idx"][::-1].copy()
    models.write_safetensors(tmp_path / "m.safetensors", arrays)
    with pytest.raises(ParameterError, match=r"a: g_idx: expected groups of 32 inputs in order"):
        open_model(tmp_path).linear("a")
    arrays = {f"a.{key}": array for key, array in quantized().to_layout("awq").items()}
    models.write_safetensors(tmp_path / "m.safetensors", arrays)
    config = {"quantization_config": {"quant_method": "awq", "version": "gemv"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ParameterError, match="expected AWQ of version gemm, got 'gemv'"):
        open_model(tmp_path).linear("a")
    config = {"quantization_config": {"transform_config": {"config_groups": {}}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ParameterError, match="transform_config"):
        open_model(tmp_path).linear("a")


def test_wrong_names_and_rows(tmp_path):
    models.write_model(tmp_path / "m")
    model = open_model(tmp_path / "m")
    for call in (model.rows, model.shape, model.dtype, model.array, model.linear, model.tensor):
        for name in ("model.layers.0.mlp.up_pro", "", None, 3):
            with pytest.raises(ParameterError, match="n: expected"):
                call(name)
    with pytest.raises(ParameterError, match=r"near that: .*up_proj"):
        model.linear("model.layers.0.mlp.up_pro")
    for start, stop in [(-1, 3), (3, 2), (0, 97), (0.5, 1), (None, 2)]:
        with pytest.raises(ParameterError, match=r"start, stop: expected rows in 0..96"):
            model.rows(LAYER + ".weight", start, stop)
    with pytest.raises(DTypeError, match=r"model.position_ids: expected floats, got I64"):
        model.rows("model.position_ids")
    with pytest.raises(DTypeError, match=r"model.position_ids: expected floats or a layout"):
        model.linear("model.position_ids")
    with pytest.raises(ShapeMismatchError):
        model.linear("model.norm")
    models.write_safetensors(
        tmp_path / "s.safetensors",
        {
            "a": np.array(1.0, F32),
            "e.weight": np.zeros((0, 4), F32),
            "n.weight": np.full((2, 3), np.nan, F32),
        },
    )
    model = open_model(tmp_path / "s.safetensors")
    with pytest.raises(ShapeMismatchError, match="a: expected"):
        model.rows("a")
    assert model.rows("e.weight").shape == (0, 4)
    with pytest.raises(EmptyInputError):
        model.linear("e")
    with pytest.raises(NonFiniteError, match=r"n.weight: expected finite values, got nan at flat index 0"):
        model.linear("n")


def test_unaligned_tensors(tmp_path):
    """Headers need not be of a length that a dtype likes."""
    x = np.arange(12, dtype=F32).reshape(3, 4)
    content = models.header_of({"a.weight": ("F32", (3, 4), x.tobytes())})
    for padding in range(4):
        header = json.dumps(content).encode() + b" " * padding
        models.write_raw(tmp_path / "m.safetensors", header, x.tobytes())
        model = open_model(tmp_path / "m.safetensors")
        assert_same_bits(np.array(model.rows("a.weight")), x)
        assert_same_bits(model.linear("a")(x), QuantLinear.from_float(x)(x))


# GGUF


def blocks(number, shape=(8, 64), seed=0):
    rng = np.random.default_rng(seed)
    size = {2: 18, 3: 20, 8: 34}[number]
    data = rng.integers(0, 256, (shape[0], shape[1] // 32, size)).astype(np.uint8)
    halves = 2 * (1 + (number == 3))
    scales = rng.standard_normal((*data.shape[:2], halves // 2)).astype("<f2")
    data[..., :halves] = np.ascontiguousarray(scales).view(np.uint8)
    return data.reshape(shape[0], -1)


def test_gguf(tmp_path):
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(F32)
    tensors, offset = [], 0
    for name, number, data in [
        ("a.weight", 0, x),
        ("b.weight", 1, x.astype(np.float16)),
        ("c.weight", 30, models.bf16_bits(x)),
        ("d.weight", 8, blocks(8)),
        ("e.weight", 2, blocks(2)),
        ("f.weight", 3, blocks(3)),
        ("f.bias", 0, x[:, 0].copy()),
        ("g", 26, np.arange(8, dtype=np.int32)),
    ]:
        shape = data.shape if data.dtype != np.uint8 else (8, 64)
        tensors.append((name, number, shape, offset, data.tobytes()))
        offset += data.nbytes + -data.nbytes % 32
    pairs = [
        models.gguf_string("general.architecture") + struct.pack("<I", 8) + models.gguf_string("bert"),
        models.gguf_string("n") + struct.pack("<IQ", 10, 7),
        models.gguf_string("words") + struct.pack("<IIQ", 9, 8, 2) + models.gguf_string("x") * 2,
        models.gguf_string("nested") + struct.pack("<IIQIQ", 9, 9, 1, 4, 3) + struct.pack("<3I", 1, 2, 3),
    ]
    (tmp_path / "m.gguf").write_bytes(models.gguf_bytes(tensors, pairs))
    for path in (tmp_path, tmp_path / "m.gguf"):
        model = open_model(path)
        assert model.format == "gguf"
        assert dict(model.metadata) == {"general.architecture": "bert", "n": 7}
        assert_same_bits(np.array(model.rows("a.weight", 1, 3)), x[1:3])
        assert_same_bits(model.rows("b.weight"), x.astype(np.float16).astype(F32))
        assert_same_bits(model.rows("c.weight"), models.bf16_values(models.bf16_bits(x)))
        assert_same_bits(model.array("g"), np.arange(8, dtype=np.int32))
        assert dict(model.layers) == {"d": "gguf", "e": "gguf", "f": "gguf"}
        for name, number in (("d", 8), ("e", 2), ("f", 3)):
            tensor = DynQuantTensor.from_layout("gguf", {"data": blocks(number), "type": number})
            assert_same_bits(model.rows(f"{name}.weight"), tensor.dequantize())
            assert_same_bits(model.rows(f"{name}.weight", 2, 5), tensor.dequantize()[2:5])
            bias = x[:, 0] if name == "f" else None
            assert_same_bits(model.linear(name)(x), QuantLinear(tensor, bias)(x))
        with pytest.raises(DTypeError, match="plain numbers"):
            model.array("d.weight")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q6_K", "F16", "BF16"])
def test_files_of_gguf(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    if kind == "Q6_K":  # the library cannot make these
        data = rng.integers(0, 100, (4, 210)).astype(np.uint8)
    else:
        data = gguf.quantize(rng.standard_normal((4, 256)).astype(F32), number)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_uint32("n", 3)
    writer.add_tensor("a.weight", data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_model(tmp_path / "m.gguf")
    assert model.metadata["n"] == 3
    assert model.dtype("a.weight") == kind
    assert model.shape("a.weight") == (4, 256)
    expected = gguf.dequantize(data, number)
    assert_same_bits(np.array(model.rows("a.weight")), expected)
    assert_same_bits(np.array(model.rows("a.weight", 1, 3)), expected[1:3])
    layer = model.linear("a")
    assert layer.bits == (4 if kind in ("Q4_0", "Q4_1") else 8)


def test_names_are_lazy():
    assert {"open_model", "quantize_model", "ModelFile"} <= set(dir(dynquant))
    with pytest.raises(AttributeError, match="no attribute 'open_models'"):
        dynquant.open_models  # noqa: B018
