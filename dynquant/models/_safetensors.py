"""Safetensors files: the header, checked by the library; and what a writer puts in front."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from ._stored import Stored, bad_file
from ._writer import Planned, TensorWriter

# As the library has it: headers in multiples of 8 bytes, wide dtypes first.
_ALIGNMENT = 8
_ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL")


def read_safetensors(path: str) -> tuple[dict[str, str], list[Stored]]:
    """Metadata and tensors of a file, in the order of their data.

    The library checks that the header is valid, that tensors have the bytes of their dtype and shape, and
    that they cover the data of the file without gaps or overlaps. Where each begins it does not tell.
    """
    safetensors = _library()
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            (n_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(n_bytes))
        metadata = header.pop("__metadata__", None) or {}
        tensors = [
            Stored(
                name,
                entry["dtype"],
                tuple(entry["shape"]),
                path,
                8 + n_bytes + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        ]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        raise bad_file(path, "a safetensors file", error) from error
    return metadata, sorted(tensors, key=lambda tensor: (tensor.start, tensor.n_bytes))


def _library() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "safetensors files need the safetensors library: pip install safetensors"
        ) from error
    return safetensors


def safetensors_writer(path: str, tensors: Sequence[Planned], metadata: Mapping[str, str]) -> TensorWriter:
    """A writer of a safetensors file. Tensors lie in the order that the library writes them in."""
    ordered = sorted(tensors, key=lambda t: (_ORDER.index(t.dtype), t.name))
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, offsets = 0, {}
    for tensor in ordered:
        offsets[tensor.name] = offset
        end = offset + tensor.n_bytes
        content[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    start = 8 + len(header)
    starts = {name: start + at for name, at in offsets.items()}
    return TensorWriter(path, struct.pack("<Q", len(header)) + header, starts, start + offset)
