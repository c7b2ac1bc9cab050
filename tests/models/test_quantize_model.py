"""quantize_model: what it writes, byte for byte, its report, and what it leaves when it fails."""

import json
import os
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from helpers import models
from helpers.common import F32, assert_same_bits
from helpers.programs import environment

from dynquant import (
    Calibrator,
    DynQuantTensor,
    FeatureDimMismatchError,
    NonFiniteError,
    ParameterError,
    QuantLinear,
    error_metrics,
    open_model,
    quantize,
    quantize_model,
    quantize_weights,
)

pytest.importorskip("safetensors")

LAYER = "model.layers.0.mlp.up_proj"
RECIPES = {
    "int8": {},
    "int8 groups": {"group_size": 32},
    "int4": {"bits": 4, "group_size": 32},
    "int4 per row": {"bits": 4},
    "int4 zero points": {"bits": 4, "group_size": 16, "symmetric": False},
    "int4 searched": {"bits": 4, "group_size": 32, "search": True},
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def rounded(scales, dtype):
    """Scales in the dtype that they are stored in, by other means than the package's."""
    stored = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(dtype, F32)
    return scales.astype(stored).astype(F32)


@each_recipe
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("shards", [1, 3])
def test_codes_scales_and_the_rest(tmp_path, recipe, dtype, shards):
    arrays = models.write_model(tmp_path / "m", shards, dtype=dtype)
    before = models.everything(tmp_path / "m")
    report = quantize_model(tmp_path / "m", tmp_path / "q", **recipe)
    assert models.everything(tmp_path / "m") == before
    source, model = open_model(tmp_path / "m"), open_model(tmp_path / "q")
    assert sorted(model.layers) == sorted(models.LAYERS)
    assert [os.path.basename(f) for f in model.files] == [os.path.basename(f) for f in source.files]
    for name, array in arrays.items():
        if name.removesuffix(".weight") not in models.LAYERS:
            assert model.dtype(name) == source.dtype(name)
            assert_same_bits(model._bytes(model._stored(name)), source._bytes(source._stored(name)))
            continue
        options = {"symmetric": True, **recipe}
        plain = quantize_weights(models.values(array), **options)
        scales = rounded(plain.scales, dtype)
        tensor = model.tensor(name)
        assert_same_bits(tensor.scales, scales)
        if dtype in ("F32", "F64"):
            assert_same_bits(tensor.dequantize(), plain.dequantize())
        # Codes are those of the scales that are stored.
        codes = quantize(
            models.values(array),
            scales.reshape(plain.scales.shape),
            plain.format,
            zero_points=plain.zero_points,
        )
        assert_same_bits(tensor.dequantize(), codes.dequantize())
        entry = next(t for t in report.tensors if t.name == name)
        metrics = error_metrics(models.values(array), tensor)
        assert entry.sqnr_db == pytest.approx(metrics.sqnr_db, rel=1e-9)
        assert entry.max_abs == metrics.max_abs
        assert 0 <= entry.zero_share < 0.5
        assert (entry.clipped_share > 0) == ("search" in recipe)
    after = models.everything(tmp_path / "q")
    assert after["tokenizer.json"] == before["tokenizer.json"]
    assert after["1_Pooling/config.json"] == before["1_Pooling/config.json"]
    assert "pytorch_model.bin" not in after
    assert [name for name in os.listdir(tmp_path) if name.endswith(".partial")] == []


def test_configuration(tmp_path):
    models.write_model(tmp_path / "m", 2)
    quantize_model(tmp_path / "m", tmp_path / "q", bits=4, group_size=32, symmetric=False)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert {key: config[key] for key in ("model_type", "vocab_size")} == {
        "model_type": "llama",
        "vocab_size": 100,
    }
    assert config["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": 32,
                },
            }
        },
        "ignore": ["model.embed_tokens", "lm_head"],
    }
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())
    model = open_model(tmp_path / "q")
    assert sorted(index["weight_map"]) == sorted(model.names)
    assert index["metadata"]["total_size"] == sum(model._stored(name).n_bytes for name in model.names)
    quantize_model(tmp_path / "m", tmp_path / "q8")
    config = json.loads((tmp_path / "q8" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


def test_one_file(tmp_path):
    models.write_model(tmp_path / "m")
    quantize_model(tmp_path / "m", tmp_path / "q.safetensors")
    model = open_model(tmp_path / "q.safetensors")
    assert sorted(model.layers) == sorted(models.LAYERS)
    assert model.quantization["format"] == "int-quantized"
    assert model.metadata["format"] == "pt"
    quantize_model(tmp_path / "m" / "model.safetensors", tmp_path / "q")
    assert sorted(p.name for p in (tmp_path / "q").iterdir()) == ["config.json", "model.safetensors"]


def test_the_library_reads_what_is_written(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    models.write_model(tmp_path / "m")
    quantize_model(tmp_path / "m", tmp_path / "q", bits=4, group_size=32, symmetric=False)
    read = numpy.load_file(tmp_path / "q" / "model.safetensors")
    model = open_model(tmp_path / "q")
    assert sorted(read) == sorted(model.names)
    for name, array in read.items():
        assert_same_bits(np.array(model.array(name)), array)
    # And the library would have laid it out so.
    numpy.save_file(read, tmp_path / "s.safetensors", {"format": "pt"})
    assert (tmp_path / "s.safetensors").read_bytes() == (tmp_path / "q" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("bits", "symmetric", "kind"),
    [(8, None, "Q8_0"), (4, True, "Q4_0"), (4, None, "Q4_0"), (4, False, "Q4_1")],
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_gguf_is_rounded_as_ggml_does(tmp_path, bits, symmetric, kind, dtype):
    gguf = pytest.importorskip("gguf")
    arrays = models.write_model(tmp_path / "m", 2, dtype=dtype)
    report = quantize_model(
        tmp_path / "m", tmp_path / "q.gguf", bits=bits, symmetric=symmetric, format="gguf"
    )
    reader = gguf.GGUFReader(tmp_path / "q.gguf")
    assert sorted(t.name for t in reader.tensors) == sorted(arrays)
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("general.quantization_version").contents() == 2
    for tensor in reader.tensors:
        array = arrays[tensor.name]
        raw = array[1] if isinstance(array, tuple) else array
        assert tuple(tensor.shape[::-1]) == raw.shape
        if tensor.name.removesuffix(".weight") in models.LAYERS:
            assert tensor.tensor_type.name == kind
            expected = gguf.quantize(models.values(array), tensor.tensor_type)
            assert_same_bits(np.array(tensor.data), expected)
            entry = next(t for t in report.tensors if t.name == tensor.name)
            metrics = error_metrics(models.values(array), gguf.dequantize(expected, tensor.tensor_type))
            assert entry.sqnr_db == pytest.approx(metrics.sqnr_db, rel=1e-9)
            assert entry.recipe == kind
        else:
            assert tensor.data.tobytes() == raw.tobytes()


def test_gguf_to_gguf_keeps_the_keys(tmp_path):
    gguf = pytest.importorskip("gguf")
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(F32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_uint32("llama.block_count", 3)
    writer.add_tensor("blk.0.attn_q.weight", x)
    writer.add_tensor("token_embd.weight", x)
    writer.add_tensor("kept.weight", gguf.quantize(x, gguf.GGMLQuantizationType.Q5_0), raw_dtype=6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantize_model(
        tmp_path / "m.gguf", tmp_path / "q.gguf", format="gguf", exclude=["token_embd*"], overwrite=True
    )
    reader = gguf.GGUFReader(tmp_path / "q.gguf")
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "b"]
    assert reader.get_field("llama.block_count").contents() == 3
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds == {"blk.0.attn_q.weight": "Q8_0", "token_embd.weight": "F32", "kept.weight": "Q5_0"}
    with pytest.raises(ParameterError, match=r"dtypes that safetensors has, got 'kept.weight' of Q5_0"):
        quantize_model(tmp_path / "m.gguf", tmp_path / "q")


def test_blocks_do_not_show(tmp_path, monkeypatch):
    from dynquant.models import _quantize

    models.write_model(tmp_path / "m")
    results = []
    for block in (1, 4096, 1 << 20):
        monkeypatch.setattr(_quantize, "_BLOCK_BYTES", block)
        for i, options in enumerate(RECIPES.values()):
            for threads in (1, 2):
                path = tmp_path / f"{block}-{i}-{threads}"
                quantize_model(tmp_path / "m", path, num_threads=threads, **options)
                results.append((i, models.everything(path)))
    for i, result in results:
        assert result == results[2 * i][1]


def test_include_and_exclude(tmp_path):
    models.write_model(tmp_path / "m")

    def layers(**options):
        quantize_model(tmp_path / "m", tmp_path / "q", overwrite=True, **options)
        return sorted(name.rpartition(".")[2] for name in open_model(tmp_path / "q").layers)

    assert layers() == ["down_proj", "q_proj", "up_proj"]
    assert layers(include="*.mlp.*") == ["down_proj", "up_proj"]
    assert layers(include=["*.q_proj", "*up_proj.weight"]) == ["q_proj", "up_proj"]
    assert layers(exclude=["*.mlp.*"]) == ["q_proj"]  # words have a row each
    assert layers(include="*", exclude="*.mlp.*") == ["embed_tokens", "lm_head", "q_proj"]
    for name in ("include", "exclude"):
        with pytest.raises(ParameterError, match=f"{name}: expected patterns that match a linear layer"):
            layers(**{name: ["nothing*"]})
        with pytest.raises(ParameterError, match=f"{name}: expected patterns of names, got"):
            layers(**{name: 3})
    with pytest.raises(ParameterError, match="source: expected linear layers to quantize, got none"):
        layers(exclude="*")


def test_groups_that_do_not_fit_are_copied(tmp_path):
    models.write_model(tmp_path / "m")
    report = quantize_model(tmp_path / "m", tmp_path / "q", bits=4, group_size=64)
    by_name = {t.name: t for t in report.tensors}
    assert by_name["model.layers.0.mlp.down_proj.weight"].reason == "rows not in groups of 64"
    assert by_name[LAYER + ".weight"].recipe == "int4 g64"
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.down_proj" in config["ignore"]


# Calibration


def calibration_rows(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((200, shape[1])).astype(F32) for name, shape in models.LAYERS.items()}


def test_calibration(tmp_path):
    arrays = models.write_model(tmp_path / "m")
    rows = calibration_rows()
    np.savez(tmp_path / "rows.npz", **{f"{name}.weight": x for name, x in rows.items()})
    for i, calibration in enumerate(
        [rows, tmp_path / "rows.npz", {name: [x[:50], x[50:]] for name, x in rows.items()}]
    ):
        report = quantize_model(
            tmp_path / "m", tmp_path / f"q{i}", bits=4, group_size=32, calibration=calibration
        )
        model = open_model(tmp_path / f"q{i}")
        for name, x in rows.items():
            w = arrays[f"{name}.weight"]
            expected = quantize_weights(w, bits=4, group_size=32, symmetric=True, calibration=x)
            assert_same_bits(model.tensor(name).dequantize(), expected.dequantize())
            entry = next(t for t in report.tensors if t.name == f"{name}.weight")
            measured = error_metrics(x @ w.T, QuantLinear(expected)(x)).sqnr_db
            assert entry.output_sqnr_db == pytest.approx(measured, abs=0.01)
        assert "output dB" in str(report)


def test_bad_calibration(tmp_path):
    models.write_model(tmp_path / "m")
    name = LAYER

    def check(error, message, calibration, **options):
        with pytest.raises(error, match=message):
            quantize_model(tmp_path / "m", tmp_path / "q", calibration=calibration, **options)
        assert sorted(os.listdir(tmp_path)) == ["m"]

    check(
        ParameterError, "calibration: expected names of layers to quantize, got 'x'", {"x": np.ones((2, 64))}
    )
    check(ParameterError, "calibration: expected the path of an .npz or a mapping", 3)
    check(ParameterError, "expected a Calibrator made with rows", {name: Calibrator()})
    check(FeatureDimMismatchError, "calibration", {name: np.ones((2, 63), F32)})
    check(NonFiniteError, "calibration", {name: np.full((2, 64), np.nan, F32)})
    check(ParameterError, "calibration: expected None for gguf", {}, format="gguf")


# What cannot be done, and what is left then


def test_bad_options(tmp_path):
    models.write_model(tmp_path / "m")
    before = models.everything(tmp_path)
    for options, message in [
        ({"bits": 5}, "bits: expected 4 or 8"),
        ({"format": "onnx"}, "format: expected one of"),
        ({"format": "gguf", "group_size": 16}, "group_size: expected 32"),
        ({"format": "gguf", "search": True}, "search: expected False"),
        ({"format": "gguf"}, "target: expected a file .gguf"),
        ({"symmetric": False}, "symmetric: expected True"),
        ({"group_size": 0}, "group_size: expected"),
        ({"search": 3}, "search: expected a bool"),
        ({"overwrite": None}, "overwrite: expected a bool"),
        ({"num_threads": 0}, "num_threads: expected"),
        ({"progress": 3}, "progress: expected"),
    ]:
        with pytest.raises(ParameterError, match=message):
            quantize_model(tmp_path / "m", tmp_path / "q", **options)
        assert models.everything(tmp_path) == before, options


def test_targets_that_are_refused(tmp_path):
    models.write_model(tmp_path / "m", 2)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "m")
    for target, message in [
        ("there", "target: expected nothing there unless overwrite is True"),
        ("m", "target: expected a place apart from the source"),
        ("m/inside", "target: expected a place apart from the source"),
        ("link/inside", "target: expected a place apart from the source"),
        (".", "target: expected a place apart from the source"),
        ("no/folder", "target: expected a place in a folder that exists"),
        ("q.safetensors", "target: expected a folder for 2 shards"),
    ]:
        for overwrite in (False, True):
            if target == "there" and overwrite:
                continue
            with pytest.raises(ParameterError, match=message):
                quantize_model(tmp_path / "m", tmp_path / target, overwrite=overwrite)
    with pytest.raises(ParameterError, match="apart from the source"):
        quantize_model(tmp_path / "m" / "model-00001-of-00002.safetensors", tmp_path / "m", overwrite=True)


def test_sources_that_are_refused(tmp_path):
    models.write_model(tmp_path / "m")
    quantize_model(tmp_path / "m", tmp_path / "q")
    with pytest.raises(ParameterError, match=r"source: expected float weights, got .* 3 quantized layers"):
        quantize_model(tmp_path / "q", tmp_path / "q2")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ParameterError, match=r"source: expected weights \(out_features, in_features\)"):
        quantize_model(tmp_path / "m", tmp_path / "q2")


def test_overwrite(tmp_path):
    models.write_model(tmp_path / "m")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "old").write_text("old")
    quantize_model(tmp_path / "m", tmp_path / "q", overwrite=True)
    assert "old" not in models.everything(tmp_path / "q")
    (tmp_path / "q.gguf").write_text("old")
    quantize_model(tmp_path / "m", tmp_path / "q.gguf", format="gguf", overwrite=True)
    assert open_model(tmp_path / "q.gguf").format == "gguf"
    assert sorted(os.listdir(tmp_path)) == ["m", "q", "q.gguf"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_weight_that_is_not_finite(tmp_path, overwrite):
    models.write_model(tmp_path / "m")
    model = open_model(tmp_path / "m")
    stored = model._stored("model.layers.0.mlp.down_proj.weight")
    with open(stored.path, "r+b") as file:
        file.seek(stored.start + 4 * (50 * 96 + 7))
        file.write(np.array(np.inf, "<f4").tobytes())
    (tmp_path / "q").mkdir()
    before = models.everything(tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        quantize_model(tmp_path / "m", tmp_path / ("q" if overwrite else "new"), overwrite=overwrite)
    assert caught.value.argument == "model.layers.0.mlp.down_proj.weight"
    assert caught.value.position == (50, 7)
    assert caught.value.index == 50 * 96 + 7
    assert models.everything(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["m", "q"]


def test_what_is_read_back_wrong(tmp_path, monkeypatch):
    from dynquant.models import _writer

    models.write_model(tmp_path / "m")
    write = _writer.TensorWriter.write

    def damaging(self, name, part):
        write(self, name, part)
        if name == "lm_head.weight":
            self._file.seek(self._at[name] - 1)
            self._file.write(b"\xee")

    monkeypatch.setattr(_writer.TensorWriter, "write", damaging)
    with pytest.raises(OSError, match=r"read back other bytes than were written, of 'lm_head.weight'"):
        quantize_model(tmp_path / "m", tmp_path / "q")
    assert os.listdir(tmp_path) == ["m"]


def test_a_progress_that_raises(tmp_path):
    models.write_model(tmp_path / "m")
    seen = []

    def progress(done, n):
        seen.append((done, n))
        if done > n // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(tmp_path / "m", tmp_path / "q", progress=progress)
    assert os.listdir(tmp_path) == ["m"]
    seen.clear()
    quantize_model(tmp_path / "m", tmp_path / "q", progress=lambda done, n: seen.append((done, n)))
    total = sum(open_model(tmp_path / "m")._stored(name).n_bytes for name in open_model(tmp_path / "m").names)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no signals")
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment(tmp_path, overwrite):
    """The target is absent, or whole; with overwrite perhaps what was there before."""
    models.write_model(tmp_path / "m", 2)
    source = models.everything(tmp_path / "m")
    quantize_model(tmp_path / "m", tmp_path / "whole")
    whole = models.everything(tmp_path / "whole")
    quantize_model(tmp_path / "m", tmp_path / "old", bits=4)
    old = models.everything(tmp_path / "old")
    program = (
        "import sys, dynquant; sys.stdin.read(1)\n"
        f"dynquant.quantize_model('m', 'q', overwrite={overwrite})\n"
        "print('done', flush=True); sys.stdin.read()"
    )
    ends = set()
    start = time.perf_counter()
    quantize_model(tmp_path / "m", tmp_path / "timed")
    seconds = time.perf_counter() - start
    for i in range(24):
        target = tmp_path / "q"
        if overwrite:
            quantize_model(tmp_path / "m", target, bits=4, overwrite=True)
        child = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        child.stdin.write(b"x")
        child.stdin.flush()
        if i == 0:
            assert child.stdout.readline() == b"done\n"
        else:
            # Begins where the import ends, as told by the partial folder.
            deadline = time.perf_counter() + 60
            while time.perf_counter() < deadline and not any(
                n.startswith(".q.") or (n == "q" and not overwrite) for n in os.listdir(tmp_path)
            ):
                time.sleep(0.0005)
            time.sleep(seconds * (i / 23) * 1.5)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert models.everything(tmp_path / "m") == source
        found = models.everything(target) if target.exists() else None
        assert found in ([whole, old, None] if overwrite else [whole, None])
        ends.add("whole" if found == whole else "before")
        for name in os.listdir(tmp_path):
            if name.startswith(".q."):
                subprocess.run(["rm", "-rf", str(tmp_path / name)], check=True)
        if not overwrite:
            subprocess.run(["rm", "-rf", str(target)], check=True)
    assert ends == {"whole", "before"}


# Against compressed-tensors and transformers, where they are installed


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_dequantizes_the_same(tmp_path, symmetric):
    torch = pytest.importorskip("torch")
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    models.write_model(tmp_path / "m")
    quantize_model(tmp_path / "m", tmp_path / "q", bits=4, group_size=32, symmetric=symmetric)
    model = open_model(tmp_path / "q")
    group = model.quantization["config_groups"]["group_0"]
    scheme = schemes.QuantizationScheme.model_validate(group)
    for layer in model.layers:
        state = {
            name.removeprefix(layer + "."): torch.from_numpy(np.array(model.array(name)))
            for name in model.names
            if name.startswith(layer + ".") and not name.endswith(".bias")
        }
        weight = base.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        assert_same_bits(weight.numpy(), model.tensor(layer).dequantize())


@pytest.mark.parametrize("bits", [8, 4])
def test_compressed_tensors_files_are_read(tmp_path, bits):
    """Weights that the library has compressed, with its own rounding: codes down to -128 and -8."""
    torch = pytest.importorskip("torch")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    packed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    args = schemes.QuantizationArgs(num_bits=bits, symmetric=True, strategy="channel")
    w = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 64)).astype(F32))
    half = (2**bits - 1) / 2
    scale = w.abs().amax(1, keepdim=True) / half
    codes = forward.quantize(w, scale, None, args, dtype=torch.int8)
    assert codes.min() == -(2 ** (bits - 1))
    arrays = {"a.weight_scale": scale.numpy()}
    if bits == 8:
        arrays["a.weight"] = codes.numpy()
    else:
        arrays["a.weight_packed"] = packed.pack_to_int32(codes, 4).numpy()
        arrays["a.weight_shape"] = np.array([16, 64])
    models.write_safetensors(tmp_path / "m.safetensors", arrays)
    tensor = open_model(tmp_path / "m.safetensors").tensor("a")
    assert_same_bits(tensor.dequantize(), forward.dequantize(codes, scale, None, args).numpy())
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(F32)
    assert error_metrics(x @ tensor.dequantize().T, QuantLinear(tensor)(x)).sqnr_db > 35


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{}, {"bits": 4, "group_size": 32}, {"bits": 4}], ids=str)
def test_transformers_loads_the_same_values(tmp_path, recipe):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96, vocab_size=100
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "m")
    quantize_model(tmp_path / "m", tmp_path / "q", **recipe)
    model = open_model(tmp_path / "q")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "q")
    assert len(model.layers) == 7
    with torch.no_grad():
        loaded(torch.arange(8)[None])
    for layer in model.layers:
        weight = loaded.get_submodule(layer).weight.detach()
        assert_same_bits(weight.numpy(), DynQuantTensor.dequantize(model.tensor(layer)))
