"""Quantizing an array that is larger than memory, from a file to a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ._files import read_array, read_json, read_npy_header, write_json
from ._progress import reporter
from ._tensor import DynQuantTensor
from ._validate import F32, U8, as_array, as_count, as_floats, as_path, as_thread_count
from ._weights import quantize_weights
from .errors import DTypeError, EmptyInputError, NonFiniteError, ParameterError, ShapeMismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAME = "array.json"
_KIND = "dynquant quantized array"
_VERSION = 1

# Bytes of float32 that are quantized together, and of floats after which the progress is made durable.
_BLOCK_BYTES = 8 << 20
_CHECKPOINT_BYTES = 256 << 20


def quantize_array(
    source: Any,
    target: str | os.PathLike[str],
    *,
    bits: int = 8,
    group_size: int | None = None,
    rows_per_block: int | None = None,
    num_threads: int = 1,
    progress: bool | Callable[[int, int], object] | None = None,
) -> DynQuantTensor:
    """Quantize an array of vectors that may be larger than memory, to a folder of ``.npy`` files.

    Parameters
    ----------
    source : str, os.PathLike, or array_like of floats, (n, d)
        A ``.npy`` file, which is read block by block; or an array, memory-mapped ones too, of float32,
        float16, bfloat16 or float64.
    target : str or os.PathLike
        A folder, which is made if there is none. Where it has the beginning of the same work, from a call
        that was interrupted or killed, the work goes on from there; where it has all of it nothing is done.
    bits, group_size
        As for `quantize_weights`: int8 with a scale for each vector, or for each group of its elements; or
        packed 4-bit codes with scales and zero points.
    rows_per_block : int, optional
        Vectors that are in memory together; by default 8 MiB of float32. The result does not depend on it.
    num_threads : int
        As for `dynamic_quantize`.
    progress : bool or callable, optional
        ``progress(done, n)`` is called with the number of vectors after each block. True shows a bar, where
        tqdm is installed.

    Returns
    -------
    DynQuantTensor, (n, d)
        Its arrays are memory-mapped from `target`: ``codes.npy``, ``scales.npy`` and, with 4 bits,
        ``zero_points.npy``, equal to those from `quantize_weights` of the whole.

    Raises
    ------
    DTypeError, ShapeMismatchError, EmptyInputError
        If `source` does not hold floats, has other than two axes, or vectors without elements.
    NonFiniteError
        If it holds NaN or infinity. What was quantized before that stays in `target`.
    ParameterError
        If `target` has something else, such as work with other options or from another source; if the source
        is no ``.npy`` file, or an option has a value that it cannot take.
    OSError
        If files cannot be read or written. Another call goes on from there.

    Notes
    -----
    The progress is kept in ``array.json``, written whole and only after the data that it counts, every
    256 MiB. A file's size and time of change tell whether it is the same source; of an array only shape and
    dtype do.
    """
    folder, threads = as_path(target), as_thread_count(num_threads)
    report = reporter(progress, "vector")
    with _opened(source) as rows:
        n, d = rows.shape
        block = _rows_of_block(rows_per_block, d)
        layout = _layout(n, d, bits, group_size)
        content = {
            "kind": _KIND,
            "version": _VERSION,
            "shape": [n, d],
            "bits": bits,
            "group_size": group_size,
            "source": rows.identity,
        }
        work = _Work(folder, content, layout)
        if work.done < n or not work.complete:
            with work:
                work.run(rows, block, bits, group_size, threads, report)
    return work.tensor()


def _rows_of_block(rows_per_block: int | None, d: int) -> int:
    if rows_per_block is None:
        return max(1, _BLOCK_BYTES // (4 * d))
    return as_count(rows_per_block, "rows_per_block")


def _layout(n: int, d: int, bits: int, group_size: int | None) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """{name: (dtype, shape)} of the arrays, whose rows belong to vectors."""
    fmt = quantize_weights(np.zeros((1, d), F32), bits=bits, group_size=group_size).format
    layout: dict[str, tuple[Any, tuple[int, ...]]] = {
        "codes": (fmt.data_dtype, fmt.data_shape((n, d))),
        "scales": (F32, fmt.scales_shape((n, d))),
    }
    if fmt.packed:
        layout["zero_points"] = (U8, fmt.scales_shape((n, d)))
    return layout


class _Rows:
    """The vectors of an array, read a block at a time."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array, self.shape, self.dtype = array, array.shape, array.dtype
        self.identity: Any = {"dtype": str(array.dtype)}

    def read(self, start: int, end: int) -> NDArray[Any]:
        return np.asarray(self._array[start:end])


class _FileRows(_Rows):
    """The same of a ``.npy`` file in C order: read, not mapped, which bounds memory by any measure."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        state = os.fstat(file.fileno())
        self._file, self.dtype, self.shape, self._start = file, dtype, shape, file.tell()
        self.identity = {"dtype": str(dtype), "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}
        if state.st_size < self._start + dtype.itemsize * shape[0] * shape[1]:
            raise ParameterError(
                f"source: expected an array of shape {shape}, got {file.name!r} that is shorter"
            )

    def read(self, start: int, end: int) -> NDArray[Any]:
        d = self.shape[1]
        self._file.seek(self._start + start * d * self.dtype.itemsize)
        values = np.fromfile(self._file, self.dtype, (end - start) * d)
        if values.size != (end - start) * d:
            raise ParameterError(f"source: expected a file that keeps its size, got {self._file.name!r}")
        return values.reshape(end - start, d)


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[_Rows]:
    """The vectors of `source`, checked but for their values."""
    if not isinstance(source, (str, os.PathLike)):
        yield _checked(_Rows(as_array(source, "source")))
        return
    path = os.fspath(source)
    with open(path, "rb") as file:
        try:
            shape, fortran_order, dtype = read_npy_header(file)
        except ValueError as error:
            raise ParameterError(f"source: expected a .npy file, got {path!r} ({error})") from error
        if len(shape) != 2:
            raise ShapeMismatchError("(n, d)", shape, "source")
        if not fortran_order and not dtype.hasobject:
            yield _checked(_FileRows(file, dtype, shape))
            return
    if dtype.hasobject:
        raise DTypeError(f"source: expected a float array, got dtype {dtype}")
    yield _checked(_Rows(np.load(path, mmap_mode="r")))


def _checked(rows: _Rows) -> _Rows:
    if len(rows.shape) != 2:
        raise ShapeMismatchError("(n, d)", rows.shape, "source")
    if rows.shape[1] == 0:
        raise EmptyInputError(f"source: expected vectors of at least one element, got shape {rows.shape}")
    as_floats(np.empty((0, 1), rows.dtype), "source")
    return rows


class _Work:
    """A folder that a quantized array is written to, from wherever an earlier call came to."""

    def __init__(
        self, folder: str, content: dict[str, Any], layout: dict[str, tuple[Any, tuple[int, ...]]]
    ) -> None:
        self._folder, self._content, self._layout = folder, content, layout
        self._files: dict[str, IO[bytes]] = {}
        self._target = os.path.join(folder, _NAME)
        self.done, self.complete = self._done_before()

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, f"{name}.npy")

    def _done_before(self) -> tuple[int, bool]:
        """How many vectors are done, and whether the files are complete."""
        if not os.path.exists(self._target):
            there = [name for name in self._layout if os.path.exists(self._path(name))]
            if there:
                raise ParameterError(
                    f"target: expected no {there[0]}.npy or its {_NAME}, got {self._folder!r}"
                )
            return 0, False
        found = read_json(self._target)
        done, complete = found.pop("done", None), found.pop("complete", None)
        n = self._content["shape"][0]
        if (
            found != self._content
            or type(done) is not int
            or not 0 <= done <= n
            or type(complete) is not bool
        ):
            raise ParameterError(
                "target: expected a new folder or the beginning of the same work, got "
                f"{self._target!r} of other work"
            )
        return done, complete

    def _header(self, name: str) -> bytes:
        """The first bytes of a file, of the whole array."""
        import io

        dtype, shape = self._layout[name]
        header = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
        return header.getvalue()

    def __enter__(self) -> _Work:
        os.makedirs(self._folder, exist_ok=True)
        if self.done == 0:
            self._write_progress(False)
        try:
            for name, (dtype, shape) in self._layout.items():
                self._files[name] = self._open_at(name, np.dtype(dtype), shape)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open_at(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> IO[bytes]:
        """The file of an array, cut off after the vectors that are done."""
        header, path = self._header(name), self._path(name)
        file = open(path, "r+b" if os.path.exists(path) else "w+b")  # noqa: SIM115
        end = len(header) + self.done * int(np.prod(shape[1:])) * dtype.itemsize
        try:
            if self.done and (file.read(len(header)) != header or os.fstat(file.fileno()).st_size < end):
                raise ParameterError(
                    f"target: expected the first {self.done} vectors, got {path!r} with damage"
                )
            file.seek(0)
            if self.done == 0:
                file.write(header)
            file.truncate(end)
            file.seek(end)
        except BaseException:
            file.close()
            raise
        return file

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def run(
        self,
        rows: _Rows,
        block: int,
        bits: int,
        group_size: int | None,
        threads: int,
        report: Callable[[int, int], object],
    ) -> None:
        n, d = rows.shape
        due = self.done
        report(self.done, n)
        for start in range(self.done, n, block):
            end = min(n, start + block)
            try:
                q = quantize_weights(
                    rows.read(start, end), bits=bits, group_size=group_size, num_threads=threads
                )
            except NonFiniteError as error:
                index, row = error.index + start * d, error.position[0] + start
                raise NonFiniteError(index, error.value, "source", (row, error.position[1])) from error
            arrays = {"codes": q.data, "scales": q.scales, "zero_points": q.zero_points}
            for name, file in self._files.items():
                array, (dtype, _) = arrays[name], self._layout[name]
                file.write(np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<")).data)
            self.done = end
            if (end - due) * d * 4 >= _CHECKPOINT_BYTES:
                self._checkpoint(False)
                due = end
            report(end, n)
        self._checkpoint(True)

    def _checkpoint(self, complete: bool) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._write_progress(complete)

    def _write_progress(self, complete: bool) -> None:
        write_json(self._target, {**self._content, "done": self.done, "complete": complete})

    def tensor(self) -> DynQuantTensor:
        arrays = {
            name: read_array(self._path(name), dtype, shape, True)
            for name, (dtype, shape) in self._layout.items()
        }
        n, d = self._content["shape"]
        fmt = quantize_weights(
            np.zeros((1, d), F32), bits=self._content["bits"], group_size=self._content["group_size"]
        ).format
        return DynQuantTensor(arrays["codes"], arrays["scales"], arrays.get("zero_points"), (n, d), fmt)
