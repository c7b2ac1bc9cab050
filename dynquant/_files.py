"""Folders of ``.npy`` files and a JSON that names them, replaced whole, read with distrust."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ._validate import as_path
from .errors import ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A reader that has read the JSON and then finds files gone starts again: a writer came between.
_ATTEMPTS = 10

# Longer than any JSON that is written; a stranger's file is not read into memory.
_MOST_BYTES = 1 << 16


def sync_folder(path: str) -> None:
    """Make renames in the folder durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def replaced(path: str, durable: bool = True) -> Iterator[IO[bytes]]:
    """A new file that replaces the one at `path` when the block ends, whole or not at all.

    A link stays one, and a file keeps its mode. With `durable` it is on the disk when the block has ended.
    """
    target = os.path.realpath(path) if os.path.islink(path) else path
    # In the same folder, under a name that no other process and no other file has.
    partial = os.path.join(os.path.dirname(target), f".{os.urandom(8).hex()}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(partial, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(partial, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError) and error.filename is not None:
            raise OSError(error.errno, error.strerror, path) from error
        raise
    if durable:
        sync_folder(os.path.dirname(target) or ".")


def write_text(path: Any, text: str) -> None:
    """Replace the file at `path`, a str or os.PathLike, by a text."""
    with replaced(as_path(path)) as file:
        file.write(text.encode())


def write_json(path: str, content: dict[str, Any], indent: int = 1) -> None:
    """Replace a file by `content`, whole or not at all."""
    import json  # here, because most programs never need it

    with replaced(path) as file:
        file.write(json.dumps(content, indent=indent).encode("ascii"))


def save_folder(path: str, name: str, content: dict[str, Any], arrays: dict[str, list[NDArray[Any]]]) -> None:
    """Write arrays, each the concatenation of a list, and then the JSON `name`, which names their files.

    Until the JSON is replaced readers see what was there before; the files of that are removed afterwards.
    """
    os.makedirs(path, exist_ok=True)
    target = os.path.join(path, name)
    before = _files_named_by(target)
    token = os.urandom(8).hex()
    files = {key: f"{key}-{token}.npy" for key in arrays}
    try:
        for key, parts in arrays.items():
            _write_array(os.path.join(path, files[key]), parts)
        write_json(target, {**content, "files": files})
    except BaseException:
        for file in files.values():
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(path, file))
        raise
    for file in before - set(files.values()):
        with contextlib.suppress(OSError):  # Windows keeps what is mapped
            os.unlink(os.path.join(path, file))


def _files_named_by(target: str) -> set[str]:
    try:
        files = read_json(target)["files"]
        return {file for file in files.values() if file == os.path.basename(file) and file.endswith(".npy")}
    except (OSError, ParameterError, KeyError, TypeError, AttributeError):
        return set()


def _write_array(path: str, parts: list[NDArray[Any]]) -> None:
    """One array, the concatenation of the parts along the first axis, part by part."""
    dtype = parts[0].dtype.newbyteorder("<")
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    with open(path, "xb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).data)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file."""
    import json

    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(_MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"path: expected JSON, got {path!r} with damage ({error})") from error
    if not isinstance(content, dict):
        raise ParameterError(f"path: expected a JSON object, got {path!r} with {type(content).__name__}")
    return content


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype of a ``.npy`` file; a ValueError for whatever is wrong."""
    import tokenize

    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read(file)
        if any(type(length) is not int or length < 0 for length in shape):
            raise ValueError(f"shape {shape}")
    except (EOFError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(f"another header: {error}") from error
    return shape, fortran_order, dtype


def read_array(path: str, dtype: Any, shape: tuple[int, ...], mmap: bool) -> NDArray[Any]:
    """The array in a ``.npy`` file, which must have just this dtype and shape, and nothing after it."""
    stored = np.dtype(dtype).newbyteorder("<")
    # Compared as text, since a header from a stranger is better not evaluated.
    expected = f"{{'descr': {stored.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    with open(path, "rb") as file:
        head = file.read(10)
        header = file.read(int.from_bytes(head[8:], "little"))
        start, n_bytes = file.tell(), stored.itemsize * math.prod(shape)
        if head[:8] != b"\x93NUMPY\x01\x00" or header.rstrip() != expected:
            raise ParameterError(
                f"path: expected {stored} of shape {shape}, got {path!r} with another header"
            )
        if os.fstat(file.fileno()).st_size != start + n_bytes:
            raise ParameterError(f"path: expected {start + n_bytes} bytes, got {path!r} of another size")
        if mmap and n_bytes:
            array: NDArray[Any] = np.memmap(file, stored, "r", start, shape)
        else:
            array = np.fromfile(file, stored, math.prod(shape)).reshape(shape)
    return array if array.dtype == np.dtype(dtype) else array.astype(dtype)


def open_folder(
    path: str, name: str, check: Any, mmap: bool
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The JSON `name` and the arrays that it names.

    ``check(content)`` raises ParameterError, KeyError or TypeError for a JSON of another kind, and returns
    {key: (dtype, shape)} of the arrays.
    """
    target = os.path.join(path, name)
    for attempt in range(_ATTEMPTS):
        content = read_json(target)
        try:
            layout, files = check(content), content["files"]
            names = {key: files[key] for key in layout}
            if not all(isinstance(file, str) and file == os.path.basename(file) for file in names.values()):
                raise TypeError("a file elsewhere")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ParameterError):
                raise
            raise ParameterError(
                f"path: expected {name} of an index, got {target!r} with other content"
            ) from error
        try:
            return content, {
                key: read_array(os.path.join(path, names[key]), dtype, shape, mmap)
                for key, (dtype, shape) in layout.items()
            }
        except FileNotFoundError as error:
            if attempt + 1 == _ATTEMPTS or read_json(target) == content:
                raise ParameterError(
                    f"path: expected the files that {target!r} names, got none at {error.filename!r}"
                ) from error
    raise AssertionError("unreachable")
