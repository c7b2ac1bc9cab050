"""Tensors as they lie in files: their dtypes, and their rows as float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .._layouts import BLOCK, BLOCK_BYTES, Q4_0, Q4_1, Q8_0, from_layout
from .._validate import F16, F32
from ..errors import DTypeError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Plain numbers: the dtype that NumPy reads; bfloat16 as its bits.
PLAIN: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = ("F32", "F16", "BF16", "F64")

# ggml's numbers of types.
GGML_NAMES = {
    0: "F32",
    1: "F16",
    Q4_0: "Q4_0",
    Q4_1: "Q4_1",
    Q8_0: "Q8_0",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    30: "BF16",
}
GGML_NUMBERS = {name: number for number, name in GGML_NAMES.items()}


class Stored(NamedTuple):
    """A tensor in a file.

    `dtype` is named as in safetensors or by ggml. `start` is its first byte in the file at `path`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    start: int
    n_bytes: int


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor; None where that is not known, or rows do not consist of whole blocks."""
    count = math.prod(shape)
    if dtype in PLAIN:
        return count * PLAIN[dtype].itemsize
    block = _block_of(dtype)
    if block is None or not shape or shape[-1] % block[0]:
        return None
    return count // block[0] * block[1]


def _block_of(dtype: str) -> tuple[int, int] | None:
    """Weights and bytes of a block of a type of ggml."""
    number = GGML_NUMBERS.get(dtype)
    if number in BLOCK_BYTES:
        return BLOCK, BLOCK_BYTES[number]
    return _other_types().get(dtype)


def _other_types() -> dict[str, tuple[int, int]]:
    """The types of ggml that the gguf library knows, where it is installed."""
    try:
        import gguf
    except ImportError:
        return {}
    return {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}


def ggml_name(number: int) -> str | None:
    """The name of a type of ggml; None where it is not known."""
    if number in GGML_NAMES:
        return GGML_NAMES[number]
    try:
        import gguf
    except ImportError:
        return None
    names = {int(kind): kind.name for kind in gguf.GGML_QUANT_SIZES}
    return names.get(number)


def ggml_number(dtype: str) -> int:
    """The number of a type of ggml that is known."""
    if dtype in GGML_NUMBERS:
        return GGML_NUMBERS[dtype]
    import gguf

    return int(gguf.GGMLQuantizationType[dtype])


def is_float(dtype: str) -> bool:
    """Whether `rows_of` gives the values: floats, or blocks of a type of ggml."""
    return dtype in FLOATS or dtype not in PLAIN


def plain_array(stored: Stored, memory: NDArray[np.uint8]) -> NDArray[Any]:
    """A tensor of plain numbers as a view of the file's memory; of bfloat16 the bits."""
    data = memory[stored.start : stored.start + stored.n_bytes]
    return data.view(PLAIN[stored.dtype]).reshape(stored.shape)


def rows_of(stored: Stored, memory: NDArray[np.uint8], first: int, end: int) -> NDArray[np.float32]:
    """Rows along the first axis as float32: of float32 a view, else new."""
    if stored.dtype in FLOATS:
        return _as_float32(plain_array(stored, memory)[first:end], stored.dtype)
    if stored.dtype in PLAIN or _block_of(stored.dtype) is None:
        raise DTypeError(f"{stored.name}: expected floats, got {stored.dtype}")
    if len(stored.shape) == 1:
        return _rows_of_blocks(stored, memory, 0, 1)[0, first:end]
    inner = math.prod(stored.shape[1:-1])
    values = _rows_of_blocks(stored, memory, first * inner, end * inner)
    return values.reshape(end - first, *stored.shape[1:])


def _as_float32(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        wide = array.astype(np.uint32)
        return np.left_shift(wide, 16, out=wide).view(F32)
    with np.errstate(over="ignore"):
        return array.astype(F32, copy=False)


def _rows_of_blocks(stored: Stored, memory: NDArray[np.uint8], first: int, end: int) -> NDArray[np.float32]:
    """Values of rows first .. end along the last axis."""
    data = block_rows(stored, memory)[first:end]
    number = GGML_NUMBERS.get(stored.dtype)
    if number in BLOCK_BYTES:
        if len(data) == 0:
            return np.empty((0, stored.shape[-1]), F32)
        return from_layout("gguf", {"data": data, "type": number}).dequantize()
    import gguf

    try:
        values: NDArray[np.float32] = gguf.dequantize(data, gguf.GGMLQuantizationType[stored.dtype])
    except NotImplementedError as error:
        raise DTypeError(
            f"{stored.name}: expected a type that gguf dequantizes, got {stored.dtype}"
        ) from error
    return values


def block_rows(stored: Stored, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A tensor of blocks as (rows, bytes)."""
    width = bytes_of(stored.dtype, stored.shape[-1:]) or 0
    data = memory[stored.start : stored.start + stored.n_bytes]
    return data.reshape(math.prod(stored.shape[:-1]), width)


def round_scales(scales: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Scales rounded to the dtype that they are stored in."""
    if dtype == "F16":
        with np.errstate(over="ignore", under="ignore"):
            return scales.astype(F16).astype(F32)
    if dtype == "BF16":
        bits = scales.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(F32)
    return scales


def stored_scales(scales: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Scales that `round_scales` gave, as they are stored."""
    if dtype == "BF16":
        return (scales.view(np.uint32) >> 16).astype(PLAIN[dtype])
    return scales.astype(PLAIN[dtype])


def bad_file(path: str, what: str, error: BaseException | str) -> ParameterError:
    return ParameterError(f"path: expected {what}, got {path!r} with damage or other content ({error})")
