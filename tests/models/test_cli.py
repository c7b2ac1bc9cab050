"""The command line: what it prints, its exit codes, and what it refuses."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from helpers import models
from helpers.common import F32, assert_same_bits
from helpers.programs import environment

import dynquant
from dynquant import EmbeddingIndex, open_model, quantize_model
from dynquant.cli import main

pytest.importorskip("safetensors")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model, in which commands run."""
    models.write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, capsys, code=0):
    """Standard output of a command that ends with a code."""
    try:
        found = main(shlex.split(command))
    except SystemExit as end:
        found = end.code
    out, err = capsys.readouterr()
    assert found == code, err
    if code:
        assert "Traceback" not in err
        assert err
        return err
    return out


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "dynquant", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert (done.returncode, done.stdout.strip()) == (0, f"dynquant {dynquant.__version__}")
    command[-1] = "frobnicate"
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


def test_info(folder, capsys):
    out = run("info model", capsys)
    assert (
        "model.layers.0.mlp.up_proj.weight    F32" in out.replace("  F32", " F32").replace("   ", "    ")
        or "up_proj" in out
    )
    assert out.splitlines()[-1].startswith("safetensors, 1 file, 10 tensors, ")
    content = json.loads(run("info model --json", capsys))
    assert len(content["tensors"]) == 10
    assert json.loads(run("info --cpu --json", capsys))["selected"] == dynquant.simd_info()["selected"]
    assert "selected: " in run("info --cpu", capsys)


def test_quantize(folder, capsys):
    out = run("quantize model q --bits 4 --group-size 32 --report r.html --json", capsys)
    content = json.loads(out)
    assert content["settings"]["bits"] == 4
    expected = quantize_model("model", "expected", bits=4, group_size=32)
    assert models.everything(folder / "q") == models.everything(folder / "expected")
    assert content["bytes_after"] == expected.bytes_after
    assert (folder / "r.html").read_text().startswith("<!doctype html>")
    text = run("quantize model q2 --include '*.mlp.*' --exclude '*down*' --threads 2 --quiet", capsys)
    assert "1 tensors quantized, 9 copied" in text
    assert list(open_model("q2").layers) == ["model.layers.0.mlp.up_proj"]
    run("quantize model q.gguf --bits 4 --zero-points", capsys)
    assert open_model("q.gguf").dtype("model.layers.0.mlp.up_proj.weight") == "Q4_1"


def test_settings_are_shown_before_work(folder, capsys):
    assert main(["quantize", "model", "q"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("dynquant quantize: source model, target q, threads 1, bits 8")
    assert "\r" not in err  # progress is for terminals
    main(["quantize", "model", "q2", "--quiet"])
    assert capsys.readouterr().err == ""


def test_dry_run(folder, capsys):
    before = models.everything(folder)
    out = run("quantize model q --dry-run", capsys)
    assert "nothing is written" in out
    assert "copied: excluded" in out
    content = json.loads(run("quantize model q --dry-run --json", capsys))
    assert models.everything(folder) == before
    assert content["bytes_after"] == quantize_model("model", "q").bytes_after
    assert "would write" in run("convert q x.safetensors --dry-run", capsys)
    assert not os.path.exists("x.safetensors")


def test_report(folder, capsys):
    rows = {
        name: np.random.default_rng(0).standard_normal((20, s[1])).astype(F32)
        for name, s in models.LAYERS.items()
    }
    np.savez("rows.npz", **rows)
    out = run("report model --calibration rows.npz --min-db 25 --html r.html", capsys)
    assert "picked for the budget" in out
    assert "worst layers of int8" in out
    assert (folder / "r.html").exists()
    content = json.loads(run("report model --max-bytes 1M --json --include '*.mlp.*'", capsys))
    assert len(content["picks"]) == 2
    assert content["budget"] == {"bytes": 1 << 20}


def test_convert(folder, capsys):
    quantize_model("model", "q.gguf", bits=4, format="gguf")
    run("convert q.gguf a.safetensors", capsys)
    run("convert a.safetensors b.gguf", capsys)
    run("convert a.safetensors folder", capsys)
    source = open_model("q.gguf")
    for path in ("a.safetensors", "b.gguf", "folder"):
        model = open_model(path)
        assert sorted(model.layers) == sorted(source.layers)
        for layer in model.layers:
            assert_same_bits(model.tensor(layer).dequantize(), source.tensor(layer).dequantize())
        assert_same_bits(np.array(model.rows("lm_head.weight")), np.array(source.rows("lm_head.weight")))
    group = open_model("folder").quantization["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"]["group_size"] == 32


def test_convert_from_gptq(folder, capsys):
    rng = np.random.default_rng(0)
    tensors = {
        "a": dynquant.quantize_weights(rng.standard_normal((16, 64)).astype(F32), bits=4, group_size=32),
        "b": dynquant.quantize_weights(rng.standard_normal((16, 64)).astype(F32), bits=4),
    }
    arrays = {}
    for name, tensor in tensors.items():
        np.maximum(tensor.zero_points, 1, out=tensor.zero_points)
        arrays.update({f"{name}.{key}": a for key, a in tensor.to_layout("gptq").items()})
    models.write_safetensors(folder / "gptq.safetensors", {**arrays, "a.bias": np.ones(16, F32)})
    assert json.loads(run("convert gptq.safetensors q --json", capsys))["layers"] == 2
    model = open_model("q")
    for name, tensor in tensors.items():
        assert_same_bits(model.tensor(name).dequantize(), tensor.dequantize())
    groups = model.quantization["config_groups"]
    assert sorted(group["targets"] for group in groups.values()) == [["a"], ["b"]]
    assert "tensor: expected" in run("convert gptq.safetensors q.gguf", capsys, 1)
    assert "got none in" in run("convert model q3", capsys, 1)


def test_search(folder, capsys):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 16)).astype(F32)
    index = EmbeddingIndex(16)
    index.add(vectors)
    index.save("index")
    np.save("queries.npy", vectors[:3])
    np.save("vectors.npy", vectors)
    out = run("search index queries.npy -k 2", capsys)
    assert [line.split("\t")[:2] for line in out.splitlines()][::2] == [["0", "0"], ["1", "1"], ["2", "2"]]
    content = json.loads(run("search index queries.npy -k 2 --rescore vectors.npy --json", capsys))
    assert [ids[0] for ids in content["ids"]] == [0, 1, 2]
    assert run("search index model/config.json", capsys, 1)
    assert run("search missing queries.npy", capsys, 1)


@pytest.mark.parametrize(
    "command",
    [
        "",
        "quantize model",
        "quantize model q --bits 5",
        "quantize model q --bits x",
        "quantize model q --group-size 0",
        "quantize model q --threads 0",
        "quantize model q --format onnx",
        "quantize model q --unknown",
        "report model --max-bytes -3",
        "report model --max-bytes 3X",
        "report model --min-db nan",
        "report model --min-db 3 --max-bytes 3",
        "search index queries.npy -k 0",
        "info",
        "info model --cpu",
    ],
)
def test_wrong_usage(folder, capsys, command):
    before = models.everything(folder)
    assert "usage: dynquant" in run(command, capsys, 2)
    assert models.everything(folder) == before


@pytest.mark.parametrize(
    "command",
    [
        "info missing",
        "info model/tokenizer.json",
        "quantize model model/q",
        "quantize model q --include 'nothing*'",
        "quantize model q --calibration missing.npz",
        "quantize model q --format gguf",
        "quantize model q.gguf --group-size 16",
        "report model --max-bytes 10",
        "report missing",
    ],
)
def test_failures(folder, capsys, command):
    before = models.everything(folder)
    err = run(command, capsys, 1)
    assert err.splitlines()[-1].startswith(f"dynquant {command.split()[0]}: ")
    assert models.everything(folder) == before
