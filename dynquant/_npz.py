"""Archives of arrays whose names, dtypes and shapes the reader knows: written whole, read with distrust."""

from __future__ import annotations

import contextlib
import os
import struct
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ._files import replaced
from .errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from zipfile import ZipFile

    from numpy.typing import NDArray

# What a zip file ends with: signature, four 16-bit numbers of disks and entries, size and place of the
# directory, length of a comment.
_END = struct.Struct("<4s4H2LH")
# Before it stands, where there is one, the pointer to a second end record with 64-bit sizes.
_ZIP64_POINTER = 20
_DIRECTORY_BYTES = 4096


def write_npz(path: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to an uncompressed archive, little-endian, which replaces the file when complete."""
    members: dict[str, Any] = {n: a.astype(a.dtype.newbyteorder("<"), copy=False) for n, a in arrays.items()}
    with replaced(path, durable=False) as file:
        np.savez(file, **members)


class NpzReader:
    """Reads arrays from an archive as `write_npz` makes it.

    No size in the file is believed before it is held against the file itself: members must be stored without
    compression, so that none is larger than the file, and each must have the size and the header of the array
    that is asked for. What does not is a ParameterError.

    Parameters
    ----------
    file, path
    *layouts : iterable of str
        Names of the arrays in the archive: those of one of the layouts.

    Attributes
    ----------
    names : list of str
        Those of the layout that was found, sorted.
    """

    def __init__(self, file: IO[bytes], path: str, *layouts: Iterable[str]) -> None:
        self._path, self._layouts = path, [sorted(names) for names in layouts]
        self.names = self._layouts[0]
        with self._refusing():
            self._archive = self._open(file)

    def _open(self, file: IO[bytes]) -> ZipFile:
        from zipfile import ZIP_STORED, ZipFile  # here, because importing it takes time that few need

        size = os.fstat(file.fileno()).st_size
        self._check_end(file, size)
        archive = ZipFile(file)
        members = archive.infolist()
        found = sorted(m.filename for m in members)
        matching = [names for names in self._layouts if found == [f"{name}.npy" for name in names]]
        if not matching:
            raise ValueError("other names")
        self.names = matching[0]
        if any(m.compress_type != ZIP_STORED or m.compress_size != m.file_size for m in members):
            raise ValueError("compressed members")
        if any(m.file_size > size for m in members):
            raise ValueError("a member that is larger than the file")
        return archive

    def _check_end(self, file: IO[bytes], size: int) -> None:
        # A directory of millions of entries would be read into memory before it could be looked at.
        if size < _END.size + _ZIP64_POINTER:
            raise ValueError("too short")
        file.seek(-_END.size - _ZIP64_POINTER, os.SEEK_END)
        pointer = file.read(_ZIP64_POINTER)
        signature, *entries, directory_bytes, _, comment_bytes = _END.unpack(file.read(_END.size))
        if signature != b"PK\x05\x06" or pointer.startswith(b"PK\x06\x07"):
            raise ValueError("no end of an archive")
        if comment_bytes or entries not in ([0, 0, len(names), len(names)] for names in self._layouts):
            raise ValueError("another number of members, or a comment")
        if directory_bytes > _DIRECTORY_BYTES:
            raise ValueError("a directory that is too long")

    def read(self, name: str, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """The array `name`, which must have just this dtype and shape. It may be read-only."""
        dtype = np.dtype(dtype).newbyteorder("<")
        n_bytes = dtype.itemsize
        for length in shape:
            n_bytes *= length
        with self._refusing():
            member = self._archive.getinfo(f"{name}.npy")
            data = self._archive.read(member)
            start = len(data) - n_bytes
            # Compared as text, since a header from a stranger is better not evaluated. A size that leaves no
            # room for it fails in pack.
            header = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
            expected = b"\x93NUMPY\x01\x00" + struct.pack("<H", start - 10) + header.encode()
            if data[:start].rstrip() != expected:
                raise ValueError(f"{name!r} with another header")
        values = np.frombuffer(data, dtype, offset=start).reshape(shape)
        return values.astype(dtype.newbyteorder("="), copy=False)

    @contextlib.contextmanager
    def _refusing(self) -> Any:
        from zipfile import BadZipFile

        # What the zip reader raises for damage depends on where it hits.
        damage = (BadZipFile, EOFError, OSError, OverflowError, RuntimeError, ValueError, struct.error)
        try:
            yield
        except damage as error:
            names = ", ".join(self.names)
            raise ParameterError(
                f"path: expected an archive of {names}, got {self._path!r} with damage or other content "
                f"({error})"
            ) from error
