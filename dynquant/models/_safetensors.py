"""Safetensors files: the header, checked by the library; and a writer that need not hold a tensor."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ._stored import PLAIN, Stored, bad_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

# As the library has it.
_ALIGNMENT = 8


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


class Planned(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


class TensorWriter:
    """Writes a file whose tensors are known by name, dtype and shape, each in parts, in any order.

    Parameters
    ----------
    path : str
        Must not exist.
    header : bytes
        What stands before the data.
    starts : mapping
        Name -> first byte in the file.
    """

    def __init__(self, path: str, header: bytes, starts: Mapping[str, int], n_bytes: int) -> None:
        self._file: IO[bytes] = open(path, "xb", buffering=0)  # noqa: SIM115
        self._at = dict(starts)
        self.checksums = dict.fromkeys(starts, 0)
        try:
            self._write(header)
            self._file.truncate(n_bytes)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, part: NDArray[Any]) -> None:
        """Append C-contiguous bytes to a tensor."""
        data = memoryview(part.reshape(-1).view("u1"))
        self._file.seek(self._at[name])
        self._write(data)
        self._at[name] += data.nbytes
        self.checksums[name] = zlib.crc32(data, self.checksums[name])

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def close(self, durable: bool) -> None:
        """Close the file; `durable`: wait until it is on the disk."""
        try:
            if durable:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def safetensors_writer(path: str, tensors: Sequence[Planned], metadata: Mapping[str, str]) -> TensorWriter:
    """A writer of a safetensors file. Tensors lie in the order that the library writes them in."""
    ordered = sorted(tensors, key=lambda t: (-PLAIN[t.dtype].itemsize, t.name))
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
