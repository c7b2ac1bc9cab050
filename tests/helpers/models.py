"""Small model files for tests."""

import json
import struct

import numpy as np

F32 = np.float32

LAYERS = {
    "model.layers.0.self_attn.q_proj": (48, 64),
    "model.layers.0.mlp.up_proj": (96, 64),
    "model.layers.0.mlp.down_proj": (64, 96),
}


def bf16_bits(x):
    """float32 to the bits of bfloat16, half to even."""
    bits = np.ascontiguousarray(x, F32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16_values(bits):
    return (bits.astype(np.uint32) << 16).view(F32)


def header_of(entries, metadata=None):
    """The JSON of a safetensors header for {name: (dtype, shape, bytes)}."""
    content, offset = {}, 0
    if metadata:
        content["__metadata__"] = metadata
    for name, (dtype, shape, data) in entries.items():
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    return content


def write_raw(path, content, data):
    """A safetensors file of any header."""
    header = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def write_safetensors(path, arrays, metadata=None):
    """A file of {name: array, or (dtype, array of bits)}, by hand, without the library."""
    names = {
        "f4": "F32",
        "f2": "F16",
        "f8": "F64",
        "i8": "I64",
        "i4": "I32",
        "i1": "I8",
        "u1": "U8",
        "b1": "BOOL",
    }
    entries = {}
    for name, array in arrays.items():
        dtype, array = array if isinstance(array, tuple) else (names[array.dtype.str[1:]], array)
        entries[name] = (dtype, array.shape, array.tobytes())
    write_raw(path, header_of(entries, metadata), b"".join(data for _, _, data in entries.values()))


def arrays_of_model(seed=0, dtype="F32"):
    """Tensors of a small model: linear layers with biases, norms, embeddings, a head, integers."""
    rng = np.random.default_rng(seed)

    def floats(*shape):
        x = (
            rng.standard_normal(shape) * np.exp2(rng.integers(-3, 3, (shape[0],) + (1,) * (len(shape) - 1)))
        ).astype(F32)
        if dtype == "BF16":
            return dtype, bf16_bits(x)
        return x.astype({"F32": F32, "F16": np.float16, "F64": np.float64}[dtype])

    arrays = {"model.embed_tokens.weight": floats(100, 64), "model.norm.weight": floats(64)}
    for name, shape in LAYERS.items():
        arrays[f"{name}.weight"] = floats(*shape)
        arrays[f"{name}.bias"] = floats(shape[0])
    arrays["lm_head.weight"] = floats(100, 64)
    arrays["model.position_ids"] = np.arange(10)[np.newaxis]
    return arrays


def values(array):
    """float32 values of what `arrays_of_model` gives."""
    return bf16_values(array[1]) if isinstance(array, tuple) else array.astype(F32)


def write_model(folder, shards=1, seed=0, dtype="F32"):
    """A folder as transformers saves it; returns the tensors."""
    folder.mkdir(parents=True)
    arrays = arrays_of_model(seed, dtype)
    names = list(arrays)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", arrays, {"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {name: arrays[name] for name in names[i::shards]}
            write_safetensors(folder / file, part, {"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 100}, indent=2))
    (folder / "tokenizer.json").write_bytes(b'{"a": "\xc3\xa4"}\r\n')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights")
    return arrays


def gguf_string(text):
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def gguf_bytes(tensors=(), pairs=(), version=3, magic=b"GGUF", n_tensors=None, n_pairs=None, alignment=32):
    """A GGUF file of [(name, number of the type, shape, offset, bytes)] and [bytes of a pair]."""
    out = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(pairs) if n_pairs is None else n_pairs,
    )
    out += b"".join(pairs)
    end = 0
    for name, number, shape, offset, data in tensors:
        out += (
            gguf_string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        )
        out += struct.pack("<IQ", number, offset)
        end = max(end, offset + len(data))
    out += b"\0" * (-len(out) % alignment)
    body = bytearray(end)
    for _, _, _, offset, data in tensors:
        body[offset : offset + len(data)] = data
    return out + bytes(body)


def everything(folder):
    """{path: bytes} of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
