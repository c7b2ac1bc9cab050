"""Coercion of inputs, and the checks of arguments that several modules share.

A check that only one function makes stands in that function.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy import ndarray

from ._core import FloatMatrix, all_finite, copy_transposed, disjoint, is_plain_out
from ._threads import MAX_THREADS, default_threads
from .errors import (
    DTypeError,
    EmptyInputError,
    LayoutError,
    NonFiniteError,
    ParameterError,
    ShapeMismatchError,
    shown,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

F32 = np.dtype(np.float32)
F16 = np.dtype(np.float16)
I8 = np.dtype(np.int8)
U8 = np.dtype(np.uint8)

# Numbers of the input formats in _core.pxd.
_KIND_F32, _KIND_F16, _KIND_BF16 = 0, 1, 2

# Elements that are searched together for the first bad one, so that an error needs little memory.
_SEARCH_BLOCK = 1 << 16


def _is_bfloat16(dtype: np.dtype[Any]) -> bool:
    # The type of ml_dtypes, recognized without importing it.
    return dtype.kind == "V" and dtype.name == "bfloat16"


def _is_float(dtype: np.dtype[Any]) -> bool:
    # The 8-bit and smaller floats of ml_dtypes are of kind "f" or "V".
    return dtype.kind == "f" or (dtype.kind == "V" and dtype.name.startswith("float"))


def as_array(x: Any, name: str) -> NDArray[Any]:
    """`x` as an ndarray that shares its memory where it has any."""
    if type(x) is ndarray:
        return x
    if isinstance(x, ndarray) and hasattr(x, "mask"):
        raise DTypeError(f"{name}: expected an array without a mask, got {type(x).__name__}; fill it first")
    if isinstance(x, (list, tuple)) and _holds_mask(x):
        raise DTypeError(
            f"{name}: expected a float array, got a {type(x).__name__} of masked ones; fill them first"
        )
    try:
        return np.asarray(x)
    except (MemoryError, SystemError):  # the latter from NumPy, where memory is short
        raise
    except Exception as error:  # whatever an object raises when it is asked for an array
        hint = "; convert it with .float()" if "BFloat16" in str(error) else ""
        raise DTypeError(f"{name}: expected a float array, got {type(x).__name__} ({error}){hint}") from error


def _holds_mask(items: Any) -> bool:
    """Whether a masked array is among nested lists and tuples; NumPy would take its masked values."""
    return any(
        _holds_mask(item) if isinstance(item, (list, tuple)) else hasattr(item, "mask")
        for item in items
        if not isinstance(item, (int, float))
    )


def as_exported(x: Any, name: str) -> Any:
    """`x`, or the array that another object exports: the memory that `out` must not overlap.

    Lists, tuples, numbers and None export none.
    """
    return x if x is None or isinstance(x, (list, tuple, int, float)) else as_array(x, name)


def as_floats(x: Any, name: str) -> NDArray[Any]:
    """`x` as a C-contiguous array of float32, float16 or bfloat16, a copy only where it is none of these.

    Python numbers, alone or in lists and tuples, stand for float32 even where all are ints; an array keeps
    its dtype, and integer, complex, bool and object arrays are refused, as are lists of nothing but integers
    some of which are not Python's.
    """
    array = x if type(x) is ndarray else as_array(x, name)
    dtype, flags = array.dtype, array.flags
    ready = flags.c_contiguous and flags.aligned
    if ready and dtype is F32:
        return array
    if dtype in (F32, F16) or _is_bfloat16(dtype):
        # "=" also swaps bytes; "C" and not "K": rows must be contiguous.
        if ready and dtype.isnative:
            return array
        if dtype is F32 and array.ndim == 2 and flags.f_contiguous and flags.aligned:
            return _transposed(array)
        return array.astype(dtype.newbyteorder("="), "C")
    if not (_is_float(dtype) or (dtype.kind in "iu" and _is_literal(x))):
        source = "" if isinstance(x, ndarray) else f" from {type(x).__name__}"
        hint = _OBJECT_HINT if dtype.kind == "O" and array.ndim == 0 else _HINTS.get(dtype.kind, "")
        raise DTypeError(f"{name}: expected a float array, got dtype {dtype}{source}{hint}")
    try:
        with np.errstate(all="ignore", over="raise"):
            if array.ndim == 2 and flags.f_contiguous and not flags.c_contiguous:
                return _transposed(array.astype(F32, "F"))
            return array.astype(F32, "C")
    except FloatingPointError:
        with np.errstate(all="ignore"):
            raise_non_finite(array.astype(F32, "C"), name, array)


def _transposed(array: NDArray[Any]) -> NDArray[Any]:
    """A C-contiguous copy of a float32 matrix that lies column by column. NumPy's takes ten times as long."""
    n, m = array.shape
    out = np.empty((n, m), F32)
    copy_transposed(array.T, out, m, n)
    return out


# What to do about an array of a kind that is refused.
_HINTS = {
    "i": "; convert it with .astype(np.float32)",
    "u": "; convert it with .astype(np.float32)",
    "b": "; convert it with .astype(np.float32)",
    "O": "; convert a frame or column with .to_numpy(np.float32), a column of arrays with np.stack",
}

_OBJECT_HINT = "; make an array or a list of numbers of it"


def _is_literal(x: Any) -> bool:
    """Whether `x` is a Python number, or a list or tuple of nothing else."""
    return isinstance(x, (int, float)) or (isinstance(x, (list, tuple)) and all(map(_is_literal, x)))


def float_matrix(array: NDArray[Any], m: int, k: int) -> FloatMatrix:
    """The array that `as_floats` gave, seen by the kernels as m rows of k."""
    dtype = array.dtype
    if dtype is F32 or dtype == F32:
        return FloatMatrix(array, _KIND_F32, m, k)
    return FloatMatrix(array, _KIND_F16 if dtype == F16 else _KIND_BF16, m, k)


def raise_non_finite(array: NDArray[Any], name: str, source: NDArray[Any] | None = None) -> NoReturn:
    """Raise for the first element of `array`, which has one, that is NaN or infinite.

    With `source`, of which `array` is a copy in float32, the error has the value there.
    """
    flat = array.reshape(-1)
    for start in range(0, flat.size, _SEARCH_BLOCK):
        with np.errstate(invalid="ignore"):  # NumPy warns of a signaling NaN in bfloat16
            finite = np.isfinite(flat[start : start + _SEARCH_BLOCK])
        if not finite.all():
            index = start + int(np.argmin(finite))
            position = tuple(int(i) for i in np.unravel_index(index, array.shape))
            value = float((array if source is None else source)[position])
            raise NonFiniteError(index, value, name, position)
    raise ParameterError(
        f"{name}: the array was modified during the call: a non-finite value was seen, then gone"
    )


def check_finite(array: NDArray[Any], name: str, threads: int = 1) -> None:
    if not all_finite(float_matrix(array, 1, array.size), threads):
        raise_non_finite(array, name)


def as_finite_vector(x: Any, name: str, n: int | None = None) -> NDArray[Any]:
    """`x` as a contiguous, finite float32 vector, of length `n` if that is given."""
    vector = as_floats(x, name)
    if vector.dtype is not F32:
        vector = vector.astype(F32)
    if vector.ndim != 1 or n not in (None, vector.size):
        raise ShapeMismatchError("(n,)" if n is None else (n,), vector.shape, name)
    check_finite(vector, name)
    return vector


def as_matrix(x: Any, name: str, shape: str) -> NDArray[Any]:
    """`x` as floats with two axes, neither empty."""
    matrix = as_floats(x, name)
    if matrix.ndim != 2:
        raise ShapeMismatchError(shape, matrix.shape, name)
    if matrix.size == 0:
        raise EmptyInputError(f"{name}: expected at least one element, got shape {matrix.shape}")
    return matrix


def as_matrices(x: Any, name: str, shape: str) -> dict[str, NDArray[Any]]:
    """Name -> matrix, as by `as_matrix`: `x` itself, or each item of a list or tuple of matrices.

    Numbers in nested lists are one matrix.
    """
    if isinstance(x, (list, tuple)) and not x:
        raise EmptyInputError(f"{name}: expected at least one array, got none")
    if isinstance(x, (list, tuple)) and any(_is_matrix(item, f"{name}[{i}]") for i, item in enumerate(x)):
        return {f"{name}[{i}]": as_matrix(item, f"{name}[{i}]", shape) for i, item in enumerate(x)}
    return {name: as_matrix(x, name, shape)}


def _is_matrix(item: Any, name: str) -> bool:
    return not isinstance(item, (list, tuple, int, float)) and as_array(item, name).ndim > 1


def as_int8_matrix(x: Any, name: str, shape: str = "(out_features, in_features)") -> NDArray[np.int8]:
    """`x` as a C-contiguous int8 array with two axes, `shape` in an error."""
    matrix = as_array(x, name)
    if matrix.dtype != I8:
        raise DTypeError(f"{name}: expected dtype int8, got {matrix.dtype}")
    if matrix.ndim != 2:
        raise ShapeMismatchError(shape, matrix.shape, name)
    return np.ascontiguousarray(matrix)


def checked_out(
    out: Any,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *inputs: Any,
    in_place: Any = None,
    rows_may_be_apart: bool = False,
) -> NDArray[Any]:
    """`out`, if it can take the result.

    It must not share memory with `inputs`, arguments as `as_exported` gives them and what they were converted
    to; with `in_place`, one more input, only by being the very same elements. With `rows_may_be_apart` only
    the last axis has to be contiguous.
    """
    disjoint_from = inputs if in_place is None or in_place is out else (*inputs, in_place)
    if type(out) is ndarray and out.dtype is dtype and is_plain_out(out, shape, disjoint_from):
        return out  # as nearly always; what follows takes as long as quantizing a thousand floats
    if type(out) is not ndarray and (
        not isinstance(out, ndarray) or hasattr(out, "mask") or isinstance(out, np.matrix)
    ):
        # A mask would keep results out, and a matrix never has one axis.
        raise DTypeError(f"out: expected a numpy.ndarray, got {type(out).__name__}")
    if out.dtype is not dtype and out.dtype != dtype:
        raise DTypeError(f"out: expected dtype {dtype}, got {out.dtype}")
    if out.shape != shape:
        raise ShapeMismatchError(shape, out.shape, "out")
    if not (out.flags.carray or (rows_may_be_apart and _has_plain_rows(out))):
        expected = "an array contiguous along its last axis" if rows_may_be_apart else "a C-contiguous array"
        _raise_layout(out, expected)
    if not all(disjoint(out, x) for x in inputs if isinstance(x, ndarray)):
        raise LayoutError("out: expected memory disjoint from every input, got memory that overlaps one")
    if isinstance(in_place, ndarray) and not _disjoint_or_same(out, in_place):
        raise LayoutError("out: expected the input itself or memory disjoint from it, got a partial overlap")
    return out


def _has_plain_rows(out: NDArray[Any]) -> bool:
    """Whether `out` is writable, contiguous along its last axis, and has no element twice."""
    if not (out.flags.writeable and out.flags.aligned and out.ndim):
        return False
    if out.shape[-1] > 1 and out.strides[-1] != out.itemsize:
        return False
    extent = 0
    for stride, n in sorted((abs(s), n) for s, n in zip(out.strides, out.shape, strict=True) if n > 1):
        if stride == 0 or stride < extent:
            return False
        extent = stride * n
    return True


def _raise_layout(out: NDArray[Any], expected: str) -> NoReturn:
    if not out.flags.writeable:
        raise LayoutError("out: expected a writable array, got a read-only one")
    if not out.flags.aligned:
        raise LayoutError(
            f"out: expected alignment to {out.itemsize} bytes, got address {out.ctypes.data:#x}"
        )
    raise LayoutError(f"out: expected {expected}, got shape {out.shape}, strides {out.strides}")


def _disjoint_or_same(out: NDArray[Any], x: NDArray[Any]) -> bool:
    if out is x or disjoint(out, x):
        return True
    return out.ctypes.data == x.ctypes.data and out.dtype == x.dtype and x.flags.c_contiguous


def as_number(value: Any, name: str) -> float:
    """`value` as a float; NaN passes, since it fails every range check that follows."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ParameterError(f"{name}: expected a real number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ParameterError(f"{name}: expected a number within float64, got {shown(value)}") from error


def as_thread_count(value: Any) -> int:
    """`value` as the most threads that a call uses, at least 1; -1 stands for `default_threads`."""
    if type(value) is int and 1 <= value <= MAX_THREADS:
        return value
    if is_integer(value) and value == -1:
        return default_threads()
    return min(as_count(value, "num_threads", " or -1"), MAX_THREADS)


def as_flag(value: Any, name: str) -> bool:
    """`value` as a bool; NumPy's is one too."""
    if not isinstance(value, (bool, np.bool_)):
        raise ParameterError(f"{name}: expected a bool, got {shown(value)}")
    return bool(value)


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of any type, which a bool is not here."""
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def as_count(value: Any, name: str, besides: str = "") -> int:
    """`value` as an int, at least 1; `besides` is what an error says could be given too."""
    if not is_integer(value) or value < 1:
        raise ParameterError(f"{name}: expected an int >= 1{besides}, got {shown(value)}")
    return int(value)


def as_scalar(value: Any) -> Any:
    """What an array without axes holds, as a file gives it back; anything else as it is."""
    return value[()] if isinstance(value, ndarray) and value.shape == () else value


def check_names(arrays: Any, required: set[str], optional: set[str]) -> None:
    """Raise unless `arrays` is a mapping with the required names, and with none but optional ones beside."""
    if not isinstance(arrays, Mapping):
        raise ParameterError(f"arrays: expected a mapping of names to arrays, got {type(arrays).__name__}")
    missing, unknown = required - set(arrays), set(arrays) - required - optional
    if missing or unknown:
        raise ParameterError(
            f"arrays: expected {sorted(required)} and perhaps {sorted(optional)}, "
            f"got {sorted(map(str, arrays))}: missing {sorted(missing)}, unknown {sorted(map(str, unknown))}"
        )


def as_path(value: Any) -> str:
    """`value`, a str or os.PathLike, as a str."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(path, str):
        raise ParameterError(f"path: expected a str or os.PathLike, got {shown(value)}")
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("a null character")
    except ValueError as error:
        message = f"path: expected a name that a file can have, got {shown(value)} ({error})"
        raise ParameterError(message) from error
    return path


def as_clip(value: Any) -> float:
    """`value` as the code that the largest magnitude maps to: finite, above zero, in float32."""
    if type(value) is int and 0 < value <= 1 << 24:
        return float(value)  # as nearly always; what follows takes as long as the rest of compute_scale
    with np.errstate(all="ignore"):
        clip = float(np.float32(as_number(value, "clip_val")))
    if not (clip > 0 and math.isfinite(clip)):
        raise ParameterError(f"clip_val: expected a finite number above 0, got {shown(value)}")
    return clip
