"""Files that are damaged, or made to do harm: one clear error each, and nothing left behind."""

import contextlib
import html
import io
import json
import os
import re
import shlex
import struct
import zipfile

import numpy as np
import pytest
from helpers import models
from helpers.common import F32
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynquant import DynQuantError, ParameterError, open_model, quantize_model
from dynquant.models._calibration import read_rows

pytest.importorskip("safetensors")

X = np.arange(8, dtype=F32).reshape(2, 4)
DATA = X.tobytes()


def entry(dtype="F32", shape=(2, 4), start=0, end=32, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end], **more}


def header(content, data=DATA, length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


SAFETENSORS = {
    "empty": b"",
    "short": b"\1\0\0",
    "no header": struct.pack("<Q", 0),
    "header beyond the end": header({"a": entry()}, length=1 << 20),
    "header of 2**63": header({"a": entry()}, length=1 << 63),
    "header of 2**64 - 1": header({"a": entry()}, length=(1 << 64) - 1),
    "header of 200 MB": header({"a": entry()}, length=200 << 20),
    "no JSON": header(b"{{{{"),
    "an array": header(b"[]", b""),
    "deep JSON": header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "not UTF-8": header(b'{"\xff\xfe": 1}'),
    "offsets beyond the end": header({"a": entry(end=64, shape=(4, 4))}),
    "offsets reversed": header({"a": entry(start=32, end=0)}),
    "negative offsets": header({"a": entry(start=-32, end=0)}),
    "offsets of 2**64": header({"a": entry(start=1 << 64, end=(1 << 64) + 32)}),
    "other size than the shape": header({"a": entry(shape=(2, 3))}),
    "shape that overflows": header({"a": entry(shape=(1 << 62, 1 << 62))}),
    "negative shape": header({"a": entry(shape=(-2, -4))}),
    "shape of floats": header({"a": entry(shape=(2.0, 4.0))}),
    "overlap": header({"a": entry(), "b": entry()}),
    "partial overlap": header({"a": entry(), "b": entry("U8", (8,), 28, 36)}, DATA + b"\0\0\0\0"),
    "gap": header({"a": entry(), "b": entry("U8", (4,), 36, 40)}, DATA + b"\0" * 8),
    "bytes after the data": header({"a": entry()}, DATA + b"\0"),
    "unknown dtype": header({"a": entry("F99")}),
    "dtype of a number": header({"a": entry(7)}),
    "no shape": header({"a": {"dtype": "F32", "data_offsets": [0, 32]}}),
    "metadata of numbers": header({"__metadata__": {"a": 1}, "a": entry()}),
    "a pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0cos\nsystem\n.",
    "a zip": b"PK\x03\x04" + b"\0" * 60,
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS.keys())
def test_safetensors(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    for call in (lambda: open_model(path), lambda: quantize_model(path, tmp_path / "q")):
        with pytest.raises(ParameterError, match=r"path: expected .* got .*m\.safetensors"):
            call()
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_dtypes_without_numbers(tmp_path):
    """Such files are good; only their values cannot be had."""
    models.write_raw(tmp_path / "m.safetensors", {"a": entry("F8_E4M3", (4, 8))}, DATA)
    model = open_model(tmp_path / "m.safetensors")
    assert model.dtype("a") == "F8_E4M3"
    for call in (model.rows, model.array, model.linear):
        with pytest.raises(DynQuantError, match=r"a: expected .* got F8_E4M3"):
            call("a")


STRING = models.gguf_string
TENSOR = ("a", 0, (2, 4), 0, DATA)
GGUF = {
    "empty": b"GGUF",
    "no counts": b"GGUF" + struct.pack("<I", 3),
    "another magic": models.gguf_bytes([TENSOR], magic=b"GGUf"),
    "version 1": models.gguf_bytes([TENSOR], version=1),
    "version 99": models.gguf_bytes([TENSOR], version=99),
    "big endian": models.gguf_bytes([TENSOR], version=3 << 24),
    "2**63 tensors": models.gguf_bytes([TENSOR], n_tensors=1 << 63),
    "2**63 pairs": models.gguf_bytes([TENSOR], n_pairs=1 << 63),
    "a string beyond the end": models.gguf_bytes(pairs=[struct.pack("<Q", 1 << 60)]),
    "an array beyond the end": models.gguf_bytes(pairs=[STRING("k") + struct.pack("<IIQ", 9, 4, 1 << 60)]),
    "strings beyond the end": models.gguf_bytes(pairs=[STRING("k") + struct.pack("<IIQ", 9, 8, 1 << 60)]),
    "nested too deep": models.gguf_bytes(
        pairs=[STRING("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9]
    ),
    "an unknown kind of value": models.gguf_bytes(pairs=[STRING("k") + struct.pack("<I", 77)]),
    "a key twice": models.gguf_bytes(pairs=[STRING("k") + struct.pack("<II", 4, 1)] * 2),
    "a name that is not UTF-8": models.gguf_bytes([(b"\xff\xfe", 0, (2, 4), 0, DATA)]),
    "a tensor twice": models.gguf_bytes([TENSOR, ("a", 0, (2, 4), 32, DATA)]),
    "five axes": models.gguf_bytes([("a", 0, (2, 1, 1, 1, 4), 0, DATA)]),
    "no axes": models.gguf_bytes([("a", 0, (), 0, DATA)]),
    "an unknown type": models.gguf_bytes([("a", 4711, (2, 4), 0, DATA)]),
    "no whole blocks": models.gguf_bytes([("a", 8, (2, 33), 0, DATA)]),
    "an offset beyond the end": models.gguf_bytes([TENSOR]).replace(
        struct.pack("<IQ", 0, 0), struct.pack("<IQ", 0, 1 << 40)
    ),
    "an offset of 2**64 - 32": models.gguf_bytes([("a", 0, (2, 4), 0, DATA)]).replace(
        struct.pack("<IQ", 0, 0), struct.pack("<IQ", 0, (1 << 64) - 32)
    ),
    "an offset that is not aligned": models.gguf_bytes([("a", 0, (2, 4), 8, DATA)]),
    "a shape that overflows": models.gguf_bytes([("a", 0, (1 << 62, 1 << 62), 0, DATA)]),
    "data that is cut off": models.gguf_bytes([TENSOR])[:-1],
    "overlap": models.gguf_bytes([("a", 0, (4, 4), 0, 2 * DATA), ("b", 0, (2, 4), 32, DATA)]),
    "alignment 0": models.gguf_bytes([TENSOR], [STRING("general.alignment") + struct.pack("<II", 4, 0)]),
    "alignment of text": models.gguf_bytes(
        [TENSOR], [STRING("general.alignment") + struct.pack("<I", 8) + STRING("x")]
    ),
    "one part of two": models.gguf_bytes([TENSOR], [STRING("split.count") + struct.pack("<IH", 2, 2)]),
    "split.count of text": models.gguf_bytes(
        [TENSOR], [STRING("split.count") + struct.pack("<I", 8) + STRING("x")]
    ),
}


@pytest.mark.parametrize("content", GGUF.values(), ids=GGUF.keys())
def test_gguf(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ParameterError, match=r"path: expected a (GGUF|safetensors) file, got .*m\.gguf"):
        open_model(path)


def test_every_cut_of_a_gguf_file(tmp_path):
    pairs = [STRING("k") + struct.pack("<IIQ", 9, 8, 2) + STRING("x") * 2]
    content = models.gguf_bytes([TENSOR, ("b", 8, (1, 32), 32, bytes(34))], pairs)
    (tmp_path / "m.gguf").write_bytes(content)
    assert open_model(tmp_path / "m.gguf").names == ("a", "b")
    for length in range(len(content)):
        (tmp_path / "m.gguf").write_bytes(content[:length])
        with pytest.raises(ParameterError, match="path: expected"):
            open_model(tmp_path / "m.gguf")


def test_every_changed_byte_of_a_header(tmp_path):
    """A model, or a ParameterError."""
    gguf = models.gguf_bytes([TENSOR], [STRING("k") + struct.pack("<II", 4, 1)])
    safetensors = header({"a": entry()})
    for content, end in ((gguf, len(gguf) - 32), (safetensors, len(safetensors) - 32)):
        for i in range(end):
            for value in (0xFF, content[i] ^ 1):
                (tmp_path / "m").write_bytes(content[:i] + bytes([value]) + content[i + 1 :])
                try:
                    model = open_model(tmp_path / "m")
                    for name in model.names:
                        model.shape(name)
                        model.dtype(name)
                except ParameterError:
                    pass


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_damage(tmp_path_factory, data):
    """A model whose tensors can be read, or a typed error; never more memory than the file and its header."""
    pairs = [STRING("k") + struct.pack("<IIQ", 9, 8, 2) + STRING("x") * 2]
    seeds = [
        models.gguf_bytes([TENSOR, ("b.weight", 8, (1, 32), 32, bytes(34))], pairs),
        header({"a.weight": entry(), "b": entry("BF16", (2, 1), 32, 36)}, DATA + bytes(4)),
        archive({NAME: npy(X), "b.npy": npy(X)}),
    ]
    content = bytearray(data.draw(st.sampled_from(seeds)))
    end = min(len(content), 300)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end - 1))
        size = data.draw(st.sampled_from([1, 2, 4, 8]))
        value = data.draw(st.integers(0, (1 << 8 * size) - 1) | st.sampled_from([0, (1 << 8 * size) - 1]))
        content[at : at + size] = value.to_bytes(size, "little")
    content = content[: data.draw(st.sampled_from([len(content), len(content) - 1, len(content) // 2]))]
    path = tmp_path_factory.mktemp("damage") / "m"
    path.write_bytes(content)
    with contextlib.suppress(DynQuantError):
        model = open_model(path)
        for name in model.names:
            with contextlib.suppress(DynQuantError):
                model.rows(name)
            with contextlib.suppress(DynQuantError):
                model.linear(name)
    with contextlib.suppress(DynQuantError):
        for rows in read_rows(str(path)).values():
            np.sum(rows.view(np.uint8)[:1])


# Folders


def folder_of(tmp_path, weight_map=None, index=None, config=None):
    folder = tmp_path / "m"
    models.write_model(folder, 2)
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    if weight_map is not None:
        content["weight_map"].update(weight_map)
        path.write_text(json.dumps(content))
    if index is not None:
        path.write_bytes(index)
    if config is not None:
        (folder / "config.json").write_bytes(config)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_map": {"a": "missing.safetensors"}}, r"expected the files that the index names, got none"),
        ({"weight_map": {"a": "../secret"}}, "names of files beside the index"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names of files beside the index"),
        ({"weight_map": {"a": "..\\secret"}}, "names of files beside the index"),
        ({"weight_map": {"a": ".."}}, "names of files beside the index"),
        ({"weight_map": {"a": "x\0y"}}, "names of files beside the index"),
        ({"weight_map": {"a": ""}}, "names of files beside the index"),
        ({"weight_map": {"a": 3}}, "names of files beside the index"),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "none called 'a'"),
        ({"index": b"{"}, "a JSON object"),
        ({"index": b"[]"}, "a JSON object"),
        ({"index": b"{}"}, "no weight_map"),
        ({"index": b'{"weight_map": []}'}, "no weight_map"),
        ({"index": b"[" * 100000}, "a JSON object"),
        ({"config": b"{"}, "a JSON object"),
        ({"config": b"3"}, "a JSON object"),
        ({"config": b"\xff"}, "a JSON object"),
    ],
)
def test_folders(tmp_path, changes, message):
    folder = folder_of(tmp_path, **changes)
    with pytest.raises(ParameterError, match=message):
        open_model(folder)


def test_tensors_in_several_shards(tmp_path):
    folder = folder_of(tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    for shard in shards:
        models.write_safetensors(folder / shard, {"a": X, shard: X})
    index["weight_map"] = {shard: shard for shard in shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ParameterError, match="expected each tensor once, got 'a' in several files"):
        open_model(folder)
    index["weight_map"]["a"] = shards[1]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_model(folder)._stored("a").path.endswith(shards[1])


def test_what_is_no_model(tmp_path):
    with pytest.raises(ParameterError, match=r"expected a folder with one .safetensors or .gguf file"):
        open_model(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        models.write_safetensors(tmp_path / name, {"a": X})
    with pytest.raises(ParameterError, match=r"a\.safetensors.*b\.safetensors"):
        open_model(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_model(tmp_path / "missing")
    for path in (3, None, b"x", "a\0b"):
        with pytest.raises(ParameterError, match="path: expected"):
            open_model(path)


def test_names_that_a_terminal_would_obey(tmp_path):
    from dynquant.models._report import printable

    names = {"\x1b[31mred.weight": np.ones((8, 8), F32), "a/../b.weight": np.ones((8, 8), F32)}
    models.write_safetensors(tmp_path / "m.safetensors", names)
    report = quantize_model(tmp_path / "m.safetensors", tmp_path / "q.safetensors")
    assert "\x1b" not in str(report)
    assert printable("\x1b[31m\u202e") == r"\x1b[31m\u202e"
    report.to_html(tmp_path / "r.html")
    assert "\x1b" not in (tmp_path / "r.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "q.safetensors", "r.html"]


def test_names_that_a_shell_would_obey(tmp_path):
    """The options to paste are quoted; layers that several limits leave out are listed once."""
    rng = np.random.default_rng(0)
    names = {
        "it's; rm x.weight": rng.standard_normal((64, 64)).astype(F32),
        "exact.weight": np.ones((8, 8), F32),
    }
    models.write_safetensors(tmp_path / "m.safetensors", names)
    report = quantize_model(tmp_path / "m.safetensors", tmp_path / "q.safetensors", bits=4)
    report.to_html(tmp_path / "r.html")
    page = html.unescape((tmp_path / "r.html").read_text())
    options = re.findall(r"<pre>(.*?)</pre>", page)
    assert [shlex.split(line) for line in options] == [["--exclude", "it's; rm x"]]
    assert "exact: weights" in page


# Archives of calibration rows


def archive(members, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


NAME = "model.layers.0.mlp.up_proj.npy"
ROWS = npy(np.ones((40, 64), F32))
NPZ = {
    "empty": b"",
    "no archive": b"\0" * 100,
    "a zip bomb": archive({NAME: ROWS + b"\0" * (50 << 20)}, zipfile.ZIP_DEFLATED),
    "compressed": archive({NAME: ROWS}, zipfile.ZIP_DEFLATED),
    "cut off": archive({NAME: ROWS})[:-30],
    "more bytes than its shape": archive({NAME: ROWS + b"\0"}),
    "fewer bytes than its shape": archive({NAME: ROWS[:-1]}),
    "no array": archive({NAME: b"text"}),
    "objects": archive({NAME: npy(np.array([{"a": 1}], object))}),
    "a header of code": archive({NAME: ROWS.replace(b"(40, 64)", b"(4+36,1)")}),
    "a huge shape": archive({NAME: ROWS.replace(b"(40, 64)", b"(9**999)")}),
    "a long directory": archive({NAME: ROWS})[:-10] + struct.pack("<L", 1 << 31) + b"\0" * 6,
}


@pytest.mark.parametrize("content", NPZ.values(), ids=NPZ.keys())
def test_archives(tmp_path, content):
    models.write_model(tmp_path / "m")
    (tmp_path / "rows.npz").write_bytes(content)
    with pytest.raises(ParameterError, match=r"expected an archive of numpy\.savez, got .*rows\.npz"):
        quantize_model(tmp_path / "m", tmp_path / "q", calibration=tmp_path / "rows.npz")
    assert sorted(os.listdir(tmp_path)) == ["m", "rows.npz"]


def test_an_archive_is_not_read_whole(tmp_path):
    arrays = {"a.b": np.arange(12.0).reshape(3, 4), "f": np.asfortranarray(X), "e": X[:0]}
    np.savez(tmp_path / "rows.npz", **arrays)
    rows = read_rows(str(tmp_path / "rows.npz"))
    assert isinstance(rows["a.b"], np.memmap)
    assert (rows["a.b"] == np.arange(12).reshape(3, 4)).all()
    assert (rows["f"] == X).all()
    assert rows["e"].shape == (0, 4)
