"""Files of tensors that are written part by part: no tensor is ever held whole."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
        data = part.reshape(-1).view("u1").data
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
