"""GGUF files: the header, with every length held against the file; and what a writer puts in front.

The gguf library makes NumPy views of each element of each value, which takes seconds and gigabytes where a
file has a vocabulary, and believes the lengths that it finds. So the header is read here; the library tells
sizes of block types and dequantizes those that dynquant has no form for.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from ._stored import Stored, bad_file, bytes_of, ggml_name, ggml_number
from ._writer import Planned, TensorWriter

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32

# Formats of struct for ggml's types of values; a string and an array have lengths.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEPTH = 4
_U32 = 4

# What llama.cpp takes: bytes of a name with the zero behind it, and axes.
_LONGEST_NAME, _MOST_AXES = 63, 4


class GgufHeader(NamedTuple):
    """`values` are the plain ones and strings; `pairs` the bytes of each key with its value, in order."""

    values: dict[str, Any]
    pairs: dict[str, bytes]
    tensors: list[Stored]


class _Cursor:
    """Reads a file's memory from its beginning on; a length beyond the end is a ValueError."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> memoryview:
        if n > len(self.data) - self.at:
            raise ValueError(f"{n} bytes at {self.at}, beyond the end")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, format: str) -> Any:
        size = struct.calcsize("<" + format)
        return struct.unpack("<" + format, self.take(size))[0]

    def string(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of a kind; None for an array, which is passed over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth == _DEPTH:
            raise ValueError(f"a value of kind {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take(count * struct.calcsize("<" + _SCALARS[inner]))
            return None
        if count > len(self.data) - self.at:
            raise ValueError(f"an array of {count}, beyond the end")
        for _ in range(count):
            if inner == _STRING:
                self.take(self.number("Q"))
            else:
                self.value(inner, depth + 1)
        return None


def read_gguf(path: str, memory: Any) -> GgufHeader:
    """The header of a file that is mapped in `memory`, and its tensors in the order of their data."""
    try:
        return _read(path, _Cursor(memoryview(memory)))
    except (ValueError, struct.error, OverflowError) as error:
        raise bad_file(path, "a GGUF file", error) from error


def _read(path: str, cursor: _Cursor) -> GgufHeader:
    if bytes(cursor.take(4)) != _MAGIC:
        raise ValueError("no magic number")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}")
    n_tensors, n_pairs = cursor.number("Q"), cursor.number("Q")
    values, pairs = {}, {}
    for _ in range(n_pairs):
        first = cursor.at
        key = cursor.string()
        if key in pairs:
            raise ValueError(f"{key!r} twice")
        value = cursor.value(cursor.number("I"))
        if value is not None:
            values[key] = value
        pairs[key] = bytes(cursor.data[first : cursor.at])
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name, entry = _read_entry(cursor)
        if name in entries:
            raise ValueError(f"tensor {name!r} twice")
        entries[name] = entry
    alignment = values.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise ValueError(f"an alignment of {alignment}")
    if values.get("split.count", 1) not in (0, 1):
        raise ValueError("one part of several; llama.cpp's gguf-split merges them")
    start = cursor.at + -cursor.at % alignment
    tensors = [
        _located(path, name, *entry, start, alignment, len(cursor.data)) for name, entry in entries.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.n_bytes))
    for before, after in itertools.pairwise(tensors):
        if before.start + before.n_bytes > after.start:
            raise ValueError(f"tensors {before.name!r} and {after.name!r} that overlap")
    return GgufHeader(values, pairs, tensors)


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[str, tuple[int, ...], int]]:
    name, n_axes = cursor.string(), cursor.number("I")
    if not 1 <= n_axes <= _MOST_AXES:
        raise ValueError(f"tensor {name!r} with {n_axes} axes")
    shape = tuple(cursor.number("Q") for _ in range(n_axes))[::-1]
    number, offset = cursor.number("I"), cursor.number("Q")
    dtype = ggml_name(number)
    if dtype is None:
        raise ValueError(f"tensor {name!r} of type {number}, which is unknown; the gguf library knows more")
    return name, (dtype, shape, offset)


def _located(
    path: str,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    offset: int,
    start: int,
    alignment: int,
    end: int,
) -> Stored:
    n_bytes = bytes_of(dtype, shape)
    if n_bytes is None:
        raise ValueError(f"tensor {name!r} of shape {shape}, which is not made of blocks of {dtype}")
    if offset % alignment or start + offset + n_bytes > end:
        raise ValueError(f"tensor {name!r} at {offset}, unaligned or beyond the end")
    return Stored(name, dtype, shape, path, start + offset, n_bytes)


def pair_of(key: str, value: str | int) -> bytes:
    """The bytes of a key with a string or a 32-bit number."""
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", _STRING) + _string(value)
    return _string(key) + struct.pack("<II", _U32, value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def name_fits(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp takes a tensor of such a name and shape."""
    return len(name.encode()) <= _LONGEST_NAME and 1 <= len(shape) <= _MOST_AXES


def gguf_writer(
    path: str, tensors: Sequence[Planned], pairs: Sequence[bytes], alignment: int
) -> TensorWriter:
    """A writer of a GGUF file whose tensors lie in the order given."""
    header = bytearray(_MAGIC + struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(pairs)))
    header += b"".join(pairs)
    offset, offsets = 0, {}
    for tensor in tensors:
        offsets[tensor.name] = offset
        header += _string(tensor.name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
        header += struct.pack("<IQ", ggml_number(tensor.dtype), offset)
        offset += tensor.n_bytes + -tensor.n_bytes % alignment
    header += b"\0" * (-len(header) % alignment)
    starts = {name: len(header) + at for name, at in offsets.items()}
    return TensorWriter(path, bytes(header), starts, len(header) + offset)
