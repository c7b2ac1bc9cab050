"""Calibration rows by layer: from a mapping, or from an archive of ``numpy.savez`` that is not trusted."""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

from .._files import read_npy_header
from .._validate import as_path
from ..errors import ParameterError, shown
from ._stored import bad_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What stands in front of a member: signature and fixed fields, whose last two are the lengths of its name and
# of what is between that and the data.
_LOCAL = struct.Struct("<4s5H3L2H")

# Bytes of the directory at the end, which is read into memory whole.
_MOST_DIRECTORY = 16 << 20


def checked_calibration(calibration: Any, layers: Mapping[str, str]) -> dict[str, Any]:
    """{layer: rows} for a mapping of names, or the path of an archive; `layers` are those that there are.

    A name is that of a layer, or of its weight.
    """
    if calibration is None:
        return {}
    if isinstance(calibration, (str, os.PathLike)):
        calibration = read_rows(as_path(calibration))
    if not isinstance(calibration, Mapping):
        raise ParameterError(
            "calibration: expected the path of an .npz or a mapping of layers to rows, got "
            f"{shown(calibration)}"
        )
    found = {}
    for name, rows in calibration.items():
        layer = name.removesuffix(".weight") if isinstance(name, str) else name
        if layer not in layers:
            raise ParameterError(f"calibration: expected names of layers to quantize, got {shown(name)}")
        found[layer] = rows
    return found


def read_rows(path: str) -> dict[str, NDArray[Any]]:
    """The arrays of an archive as `numpy.savez` writes it, memory-mapped.

    Members must be stored as they are: what a compressed one becomes in memory cannot be told beforehand.
    """
    with open(path, "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            with _refusing_long_directories(file), ZipFile(file) as archive:
                members = archive.infolist()
            return {
                member.filename.removesuffix(".npy"): _mapped(file, path, member, size) for member in members
            }
        except (BadZipFile, ValueError, EOFError, struct.error, OverflowError, NotImplementedError) as error:
            raise bad_file(path, "an archive of numpy.savez", error) from error


@contextlib.contextmanager
def _refusing_long_directories(file: IO[bytes]) -> Iterator[None]:
    """Raise ValueError where the archive's own end says that its directory is long."""
    file.seek(0, os.SEEK_END)
    tail = min(file.tell(), (1 << 16) + 22)
    file.seek(-tail, os.SEEK_END)
    at = (data := file.read(tail)).rfind(b"PK\x05\x06")
    if at < 0 or len(data) - at < 22 or struct.unpack_from("<L", data, at + 12)[0] > _MOST_DIRECTORY:
        raise ValueError("no directory, or a long one")
    yield


def _mapped(file: IO[bytes], path: str, member: ZipInfo, size: int) -> NDArray[Any]:
    name = member.filename
    if member.compress_type != ZIP_STORED or member.compress_size != member.file_size:
        raise ValueError(f"{name!r} is compressed; numpy.savez stores arrays as they are")
    file.seek(member.header_offset)
    fields = _LOCAL.unpack(file.read(_LOCAL.size))
    start = member.header_offset + _LOCAL.size + fields[-2] + fields[-1]
    if fields[0] != b"PK\x03\x04" or start + member.file_size > size:
        raise ValueError(f"{name!r} beyond the end of the file")
    file.seek(start)
    try:
        shape, fortran_order, dtype = read_npy_header(file)
    except ValueError as error:
        raise ValueError(f"{name!r} with {error}") from error
    at = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name!r} of dtype {dtype} and shape {shape}")
    if at - start + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{name!r} of another size than its shape {shape}")
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", at, shape, "F" if fortran_order else "C")
