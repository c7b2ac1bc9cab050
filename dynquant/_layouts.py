"""Quantized weights in the layouts of other libraries: the same codes and scales in other arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._format import DynQuantFormat
from ._packed import INT4, INT8_GROUPS, INT8_ROWS, check_weight
from ._tensor import DynQuantTensor
from ._validate import F16, F32, I8, U8, as_array, as_count, as_floats, as_scalar, check_finite, check_names
from .errors import DTypeError, EmptyInputError, ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    Arrays = dict[str, NDArray[Any]]

_WORD = np.dtype("<i4")

# Where each of eight neighboring outputs stands in a word of AWQ.
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

# What GPTQ's first version subtracts from a word of zero points: 1 from each.
_ONES = np.uint32(0x11111111)

# ggml's numbers of block types, and how many bytes 32 weights take.
Q4_0, Q4_1, Q8_0 = 2, 3, 8
BLOCK = 32
BLOCK_BYTES = {Q4_0: 18, Q4_1: 20, Q8_0: 34}

_MATMULNBITS_BLOCKS = (16, 32, 64, 128, 256)


def to_layout(tensor: DynQuantTensor, name: str, scale_dtype: DTypeLike | None) -> Arrays:
    """`DynQuantTensor.to_layout`."""
    layout = _layout(name)
    check_weight(tensor, "tensor", INT8_ROWS, INT8_GROUPS, INT4)
    if tensor.minimums is not None and name != "gguf":
        raise ParameterError(f"tensor: expected codes without minimums for {name}, got {shown(tensor)}")
    if tensor.element_count == 0:
        raise EmptyInputError(f"tensor: expected at least one element, got shape {tensor.shape}")
    if scale_dtype is None:
        return layout.write(tensor, tensor.scales)
    return layout.write(tensor, _rounded(tensor.scales, _float_dtype(scale_dtype)))


def from_layout(name: str, arrays: Mapping[str, Any]) -> DynQuantTensor:
    """`DynQuantTensor.from_layout`."""
    return _layout(name).read(arrays)


class _Layout(NamedTuple):
    # write(tensor, scales): `scales` are those of the tensor in the dtype to store.
    write: Callable[[DynQuantTensor, NDArray[Any]], Arrays]
    read: Callable[[Mapping[str, Any]], DynQuantTensor]


def _layout(name: Any) -> _Layout:
    layout = _LAYOUTS.get(name) if isinstance(name, str) else None
    if layout is None:
        raise ParameterError(f"name: expected one of {sorted(_LAYOUTS)}, got {shown(name)}")
    return layout


def _float_dtype(value: Any) -> np.dtype[Any]:
    """`value` as the dtype float32, float16 or bfloat16."""
    with contextlib.suppress(TypeError):
        dtype: np.dtype[Any] = np.dtype(value)
        if dtype in (F32, F16) or dtype.name == "bfloat16":
            return dtype
    raise ParameterError(f"scale_dtype: expected float32, float16 or bfloat16, got {shown(value)}")


def _rounded(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Scales or minimums in the dtype to store."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(dtype)
    if not np.isfinite(rounded).all():
        raise ParameterError(
            f"scale_dtype: expected one with a range for the scales and minimums, got {dtype}"
        )
    return rounded


# ---- Nibbles and words ----


def nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(m, b) bytes -> (m, 2 * b) nibbles, the low one first."""
    m, b = packed.shape
    codes = np.empty((m, 2 * b), U8)
    np.bitwise_and(packed, 15, out=codes[:, ::2])
    np.right_shift(packed, 4, out=codes[:, 1::2])
    return codes


def _packed(codes: NDArray[np.uint8], multiple: int = 2) -> NDArray[np.uint8]:
    """(m, k) nibbles -> bytes, the low one first, of rows filled up with zeros to a multiple."""
    k = codes.shape[1]
    if k % multiple:
        codes = np.pad(codes, ((0, 0), (0, -k % multiple)))
    return codes[:, ::2] | codes[:, 1::2] << U8.type(4)


def words(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(m, k) nibbles -> (m, ceil(k / 8)) words, the lowest first."""
    return np.ascontiguousarray(_packed(codes, 8)).view(_WORD).astype(np.int32, copy=False)


def _bytes_of_words(words: NDArray[Any]) -> NDArray[np.uint8]:
    """(m, w) words -> (m, 4 * w) bytes, a view where the machine stores words so."""
    return np.ascontiguousarray(words, _WORD).view(U8)


def unsigned(tensor: DynQuantTensor) -> NDArray[np.uint8]:
    """The packed codes of a 4-bit tensor as 0..15: symmetric ones with 8 added."""
    symmetric = tensor.zero_points is None and tensor.minimums is None
    return tensor.data ^ U8.type(0x88) if symmetric else tensor.data


def _zero_points(tensor: DynQuantTensor) -> NDArray[np.uint8] | None:
    """(out_features, groups) zero points of the codes that `unsigned` gives; None if all are 8."""
    if tensor.zero_points is None or (tensor.zero_points == 8).all():
        return None
    return tensor.zero_points.reshape(tensor.shape[0], -1)


def _int4(
    data: NDArray[np.uint8],
    k: int,
    scales: NDArray[np.float32],
    zero_points: NDArray[np.uint8] | None,
    group: int,
    minimums: NDArray[np.float32] | None = None,
) -> DynQuantTensor:
    """Weights of packed codes 0..15; scales, and zero points or minimums, are (out_features, groups)."""
    n, groups = scales.shape
    fmt = DynQuantFormat.INT4_PER_ROW_PACKED
    if groups > 1 or minimums is not None:
        fmt = DynQuantFormat.int4_per_group_packed(group)
    shape = fmt.scales_shape((n, k))
    if minimums is not None:
        minimums = minimums.reshape(shape)
    elif zero_points is None:
        zero_points = np.full(shape, 8, U8)
    zeros = None if zero_points is None else zero_points.reshape(shape)
    return DynQuantTensor(data[:, : (k + 1) // 2], scales.reshape(shape), zeros, (n, k), fmt, minimums)


def _int8(data: NDArray[np.int8], scales: NDArray[np.float32], group: int) -> DynQuantTensor:
    """Weights of int8 codes; scales are (out_features, groups)."""
    fmt = DynQuantFormat.INT8_PER_ROW if scales.shape[1] == 1 else DynQuantFormat.int8_per_group(group)
    return DynQuantTensor(data, scales.reshape(fmt.scales_shape(data.shape)), None, data.shape, fmt)


# ---- Checks ----


def _integers(arrays: Mapping[str, Any], name: str, ndim: int, *dtypes: type[Any]) -> NDArray[Any]:
    """An array of integers with `ndim` axes, none of them empty, in the byte order of this machine."""
    array = as_array(arrays[name], name)
    if array.dtype.newbyteorder("=") not in map(np.dtype, dtypes):
        expected = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise DTypeError(f"{name}: expected dtype {expected}, got {array.dtype}")
    if array.ndim != ndim:
        raise ShapeMismatchError(f"of {ndim} axes", array.shape, name)
    if array.size == 0:
        raise EmptyInputError(f"{name}: expected at least one element, got shape {array.shape}")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _number(value: Any, name: str, choices: dict[int, str]) -> int:
    """`value`, an int or an array that holds one, which must be among the choices."""
    value = as_scalar(value)
    if not isinstance(value, (int, np.integer)) or value not in choices:
        expected = " or ".join(f"{choice}{label}" for choice, label in choices.items())
        raise ParameterError(f"{name}: expected {expected}, got {shown(value)}")
    return int(value)


def _scales(arrays: Mapping[str, Any], name: str) -> NDArray[np.float32]:
    """Finite scales as float32 of any shape."""
    scales = as_floats(arrays[name], name)
    check_finite(scales, name)
    return scales.astype(F32, copy=False)


def _expect_shape(array: NDArray[Any], shape: tuple[int, ...], name: str) -> None:
    if array.shape != shape:
        raise ShapeMismatchError(shape, array.shape, name)


def _group_of(k: int, groups: int, name: str) -> int:
    """How many of k inputs share one of `groups` scales, where a layout does not say so by itself."""
    if groups < 1 or k % groups:
        raise ParameterError(f"{name}: expected as many groups as divide {k} in_features, got {groups}")
    return k // groups


def _equal_groups(tensor: DynQuantTensor, name: str) -> int:
    """The group size of a tensor for a layout that has no shorter last group."""
    k = tensor.shape[1]
    group = tensor.format.group_of(k)
    if k % group:
        raise ParameterError(f"tensor: expected in_features in groups of equal size for {name}, got {tensor}")
    return group


def _multiple_of_8(length: int, what: str, name: str) -> None:
    if length % 8:
        raise ParameterError(f"tensor: expected {what} in multiples of 8 for {name}, got {length}")


def _check_order(arrays: Mapping[str, Any], name: str, k: int, group: int) -> None:
    """Raise unless groups are of neighboring inputs in order, where an array says which group is whose."""
    if arrays.get(name) is None:
        return
    index = _integers(arrays, name, 1, np.int32, np.int64)
    _expect_shape(index, (k,), name)
    if not np.array_equal(index, np.arange(k) // group):
        raise ParameterError(f"{name}: expected groups of {group} inputs in order, got another order")


# ---- compressed-tensors: int-quantized with 8 bits, pack-quantized with 4 ----


def _write_compressed_tensors(tensor: DynQuantTensor, scales: NDArray[Any]) -> Arrays:
    _equal_groups(tensor, "compressed-tensors")
    n, k = tensor.shape
    scales = scales.reshape(n, -1)
    if tensor.format.bits == 8:
        return {"weight": tensor.data, "weight_scale": scales}
    arrays = {
        "weight_packed": words_of_rows(unsigned(tensor), k),
        "weight_scale": scales,
        "weight_shape": np.array([n, k], np.int64),
    }
    if (zero_points := _zero_points(tensor)) is not None:
        arrays["weight_zero_point"] = np.ascontiguousarray(words(zero_points.T).T)
    return arrays


def words_of_rows(packed: NDArray[np.uint8], k: int) -> NDArray[np.int32]:
    """(n, ceil(k / 8)) words of packed rows of k codes, filled up with zeros."""
    n, b = packed.shape
    result = np.zeros((n, -(-k // 8)), _WORD)
    as_bytes = result.view(U8)
    as_bytes[:, :b] = packed
    if k % 2:
        as_bytes[:, b - 1] &= 15
    return result.astype(np.int32, copy=False)


def _read_compressed_tensors(arrays: Mapping[str, Any]) -> DynQuantTensor:
    if isinstance(arrays, Mapping) and "weight_packed" in arrays:
        return _read_pack_quantized(arrays)
    check_names(arrays, {"weight", "weight_scale"}, {"weight_zero_point", "weight_g_idx"})
    data = _integers(arrays, "weight", 2, np.int8)
    n, k = data.shape
    scales = _compressed_scales(arrays, n)
    group = _group_of(k, scales.shape[1], "weight_scale")
    _check_order(arrays, "weight_g_idx", k, group)
    zero_points = arrays.get("weight_zero_point")
    if zero_points is not None and np.any(as_array(zero_points, "weight_zero_point")):
        raise ParameterError("weight_zero_point: expected zeros for 8-bit weights, got others")
    return _int8(data, scales, group)


def _compressed_scales(arrays: Mapping[str, Any], n: int) -> NDArray[np.float32]:
    """(n, groups) scales, of one for all where there is just one."""
    scales = _scales(arrays, "weight_scale")
    if scales.size == 1:
        return np.full((n, 1), scales.reshape(-1)[0], F32)
    if scales.ndim == 1 and scales.size == n:
        return scales.reshape(n, 1)
    if scales.ndim != 2 or scales.shape[0] != n:
        raise ShapeMismatchError(f"({n}, groups)", scales.shape, "weight_scale")
    return scales


def _read_pack_quantized(arrays: Mapping[str, Any]) -> DynQuantTensor:
    check_names(
        arrays, {"weight_packed", "weight_scale", "weight_shape"}, {"weight_zero_point", "weight_g_idx"}
    )
    words = _integers(arrays, "weight_packed", 2, np.int32)
    shape = _integers(arrays, "weight_shape", 1, np.int64, np.int32)
    _expect_shape(shape, (2,), "weight_shape")
    n, k = (int(length) for length in shape)
    if n != words.shape[0] or k < 1:
        raise ParameterError(f"weight_shape: expected {words.shape[0]} rows, got {shown((n, k))}")
    bits = next((bits for bits in (4, 8) if -(-k * bits // 32) == words.shape[1]), None)
    if bits is None:
        raise ParameterError(
            f"weight_packed: expected codes of 4 or 8 bits, ({n}, {-(-k // 8)}) or ({n}, {-(-k // 4)}), "
            f"got shape {words.shape}"
        )
    scales = _compressed_scales(arrays, n)
    groups = scales.shape[1]
    group = _group_of(k, groups, "weight_scale")
    _check_order(arrays, "weight_g_idx", k, group)
    zero_points = None
    if arrays.get("weight_zero_point") is not None:
        packed = _integers(arrays, "weight_zero_point", 2, np.int32)
        _expect_shape(packed, (-(-n * bits // 32), groups), "weight_zero_point")
        zero_points = _bytes_of_words(packed.T)
        zero_points = np.ascontiguousarray((nibbles(zero_points) if bits == 4 else zero_points)[:, :n].T)
    if bits == 4:
        return _int4(_bytes_of_words(words), k, scales, zero_points, group)
    if zero_points is not None and (zero_points != 128).any():
        raise ParameterError("weight_zero_point: expected zeros for 8-bit weights, got others")
    return _int8((_bytes_of_words(words)[:, :k] ^ U8.type(0x80)).view(I8), scales, group)


# ---- GPTQ and AWQ: 4 bits, packed along the inputs or along the outputs ----


def _write_gptq(tensor: DynQuantTensor, scales: NDArray[Any], v1: bool) -> Arrays:
    name = "gptq" if v1 else "gptq_v2"
    n, k = _outputs_and_inputs(tensor, name)
    _multiple_of_8(k, "in_features", name)
    group = tensor.format.group_of(k)
    qzeros = words(_all_zero_points(tensor).T).view(np.uint32)
    if v1:
        if (_all_zero_points(tensor) == 0).any():
            raise ParameterError(
                "tensor: expected zero points of at least 1 for gptq, which stores them less 1, got 0; "
                "gptq_v2 takes it"
            )
        qzeros = qzeros - _ONES
    return {
        "qweight": np.ascontiguousarray(words_of_rows(unsigned(tensor), k).T),
        "qzeros": qzeros.view(np.int32),
        "scales": np.ascontiguousarray(scales.reshape(n, -1).T),
        "g_idx": (np.arange(k) // group).astype(np.int32),
    }


def _outputs_and_inputs(tensor: DynQuantTensor, name: str) -> tuple[int, ...]:
    """The shape of a tensor that GPTQ and AWQ can hold."""
    if tensor.format.bits != 4:
        raise ParameterError(f"tensor: expected 4 bits for {name}, got {tensor}")
    _equal_groups(tensor, name)
    _multiple_of_8(tensor.shape[0], "out_features", name)
    return tensor.shape


def _all_zero_points(tensor: DynQuantTensor) -> NDArray[np.uint8]:
    """(out_features, groups) zero points of the codes that `unsigned` gives."""
    n = tensor.shape[0]
    if tensor.zero_points is None:
        return np.full((n, tensor.scales.size // n), 8, U8)
    return tensor.zero_points.reshape(n, -1)


def _read_gptq(arrays: Mapping[str, Any], v1: bool) -> DynQuantTensor:
    check_names(arrays, {"qweight", "qzeros", "scales"}, {"g_idx"})
    qweight = _integers(arrays, "qweight", 2, np.int32)
    scales = _scales(arrays, "scales")
    n = qweight.shape[1]
    qzeros = _qzeros(arrays, scales, n)
    k = 8 * qweight.shape[0]
    if arrays.get("g_idx") is not None:
        inputs = as_array(arrays["g_idx"], "g_idx").size
        if inputs != k:
            raise ParameterError(f"qweight: expected 4-bit codes of {inputs} inputs, got {qweight.shape}")
    group = _group_of(k, scales.shape[0], "scales")
    _check_order(arrays, "g_idx", k, group)
    if v1:
        # Whole words, as libraries add it: where a zero point of 0 was stored, a borrow comes back.
        qzeros = (qzeros.view(np.uint32) + _ONES).view(np.int32)
    zero_points = np.ascontiguousarray(nibbles(_bytes_of_words(qzeros)).T)
    return _int4(_bytes_of_words(qweight.T), k, np.ascontiguousarray(scales.T), zero_points, group)


def _qzeros(arrays: Mapping[str, Any], scales: NDArray[Any], n: int) -> NDArray[Any]:
    """Packed zero points (groups, n / 8), beside scales (groups, n)."""
    if scales.ndim != 2 or scales.shape[1] != n or not scales.size:
        raise ShapeMismatchError(f"(groups, {n})", scales.shape, "scales")
    qzeros = _integers(arrays, "qzeros", 2, np.int32)
    if 8 * qzeros.shape[1] != n or qzeros.shape[0] != scales.shape[0]:
        expected = f"4-bit zero points ({scales.shape[0]}, {n} / 8)"
        raise ParameterError(f"qzeros: expected {expected}, got shape {qzeros.shape}")
    return qzeros


def _write_awq(tensor: DynQuantTensor, scales: NDArray[Any]) -> Arrays:
    n, k = _outputs_and_inputs(tensor, "awq")
    codes = nibbles(unsigned(tensor))[:, :k]
    return {
        "qweight": words(_in_awq_order(codes.T, _AWQ_ORDER)),
        "qzeros": words(_in_awq_order(_all_zero_points(tensor).T, _AWQ_ORDER)),
        "scales": np.ascontiguousarray(scales.reshape(n, -1).T),
    }


def _in_awq_order(codes: NDArray[np.uint8], order: Any) -> NDArray[np.uint8]:
    """Columns of (m, n) taken in `order` within each eight."""
    m, n = codes.shape
    return codes.reshape(m, n // 8, 8)[:, :, order].reshape(m, n)


def _read_awq(arrays: Mapping[str, Any]) -> DynQuantTensor:
    check_names(arrays, {"qweight", "qzeros", "scales"}, set())
    qweight = _integers(arrays, "qweight", 2, np.int32)
    k, n = qweight.shape[0], 8 * qweight.shape[1]
    scales = _scales(arrays, "scales")
    qzeros = _qzeros(arrays, scales, n)
    order = np.argsort(_AWQ_ORDER)
    codes, zero_points = (
        np.ascontiguousarray(_in_awq_order(nibbles(_bytes_of_words(words)), order).T)
        for words in (qweight, qzeros)
    )
    group = _group_of(k, scales.shape[0], "scales")
    return _int4(_packed(codes), k, np.ascontiguousarray(scales.T), zero_points, group)


# ---- GGUF: blocks of 32 with their scale in front ----


def _write_gguf(tensor: DynQuantTensor, scales: NDArray[Any]) -> Arrays:
    n, k = tensor.shape
    if (
        tensor.format.group_size != BLOCK
        or k % BLOCK
        or (tensor.minimums is None and _zero_points(tensor) is not None)
    ):
        raise ParameterError(
            f"tensor: expected groups of {BLOCK} without zero points besides 8, and in_features in multiples "
            f"of {BLOCK} for gguf, got {tensor}"
        )
    number = Q8_0 if tensor.format.bits == 8 else Q4_0 if tensor.minimums is None else Q4_1
    blocks = np.empty((n, k // BLOCK, BLOCK_BYTES[number]), U8)
    blocks[..., :2] = _halves(scales)
    if number == Q8_0:
        blocks[..., 2:] = tensor.data.reshape(n, -1, BLOCK).view(U8)
        return {"data": blocks.reshape(n, -1), "type": np.array(number)}
    if tensor.minimums is not None:
        blocks[..., 2:4] = _halves(_rounded(tensor.minimums, scales.dtype))
    codes = nibbles(unsigned(tensor)).reshape(n, -1, BLOCK)
    blocks[..., -BLOCK // 2 :] = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << U8.type(4)
    return {"data": blocks.reshape(n, -1), "type": np.array(number)}


def _halves(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes (..., 2) of float16 values; nothing is rounded."""
    with np.errstate(over="ignore", under="ignore"):
        halves = values.astype(F16)
    if (halves != values).any():
        raise ParameterError(
            "tensor: expected scales and minimums that are float16 values for gguf, got others; "
            "scale_dtype=np.float16 rounds them"
        )
    return halves.astype("<f2")[..., np.newaxis].view(U8)


def _read_gguf(arrays: Mapping[str, Any]) -> DynQuantTensor:
    check_names(arrays, {"data", "type"}, set())
    number = _number(arrays["type"], "type", {Q4_0: " (Q4_0)", Q4_1: " (Q4_1)", Q8_0: " (Q8_0)"})
    data = _integers(arrays, "data", 2, np.uint8)
    size = BLOCK_BYTES[number]
    if data.shape[1] % size:
        raise ShapeMismatchError(f"(out_features, blocks of {size} bytes)", data.shape, "data")
    n, blocks = data.shape[0], data.shape[1] // size
    parts = np.ascontiguousarray(data).reshape(n, blocks, size)
    halves = np.ascontiguousarray(parts[..., : 4 if number == Q4_1 else 2]).view("<f2").astype(F32)
    check_finite(halves, "data")
    scales = np.ascontiguousarray(halves[..., 0])
    if number == Q8_0:
        return _int8(np.ascontiguousarray(parts[..., 2:]).view(I8).reshape(n, -1), scales, BLOCK)
    codes = parts[..., -BLOCK // 2 :]
    codes = np.concatenate([codes & U8.type(15), codes >> U8.type(4)], axis=-1)
    minimums = np.ascontiguousarray(halves[..., 1]) if number == Q4_1 else None
    return _int4(_packed(codes.reshape(n, -1)), blocks * BLOCK, scales, None, BLOCK, minimums)


# ---- MatMulNBits of ONNX Runtime ----


def _write_matmulnbits(tensor: DynQuantTensor, scales: NDArray[Any]) -> Arrays:
    n, k = tensor.shape
    group, bits = tensor.format.group_size, tensor.format.bits
    if group is None or group > k:
        group = next((block for block in _MATMULNBITS_BLOCKS if block >= k), None)
    if group not in _MATMULNBITS_BLOCKS:
        sizes = ", ".join(map(str, _MATMULNBITS_BLOCKS))
        raise ParameterError(f"tensor: expected groups of {sizes} for matmulnbits, got {tensor}")
    blocks = -(-k // group)
    data = np.zeros((n, blocks * group * bits // 8), U8)
    if bits == 8:
        data[:, :k] = tensor.data.view(U8) ^ U8.type(0x80)
        data[:, k:] = 0x80
    else:
        codes = unsigned(tensor)
        data[:, : codes.shape[1]] = codes
    arrays = {
        "B": data.reshape(n, blocks, -1),
        "scales": scales.reshape(n, blocks),
        "K": np.array(k),
        "bits": np.array(bits),
    }
    if bits == 4 and (zero_points := _zero_points(tensor)) is not None:
        arrays["zero_points"] = _packed(zero_points)
    return arrays


def _read_matmulnbits(arrays: Mapping[str, Any]) -> DynQuantTensor:
    check_names(arrays, {"B", "scales"}, {"zero_points", "K", "bits"})
    data = _integers(arrays, "B", 3, np.uint8)
    bits = _number(arrays.get("bits", 4), "bits", {4: "", 8: ""})
    n, blocks, n_bytes = data.shape
    group = n_bytes * 8 // bits
    k = as_count(as_scalar(arrays.get("K", blocks * group)), "K")
    if -(-k // group) != blocks:
        raise ParameterError(f"K: expected {blocks} blocks of {group}, got {k}")
    scales = _of_blocks(_scales(arrays, "scales"), n, blocks, "scales")
    zero_points = arrays.get("zero_points")
    if zero_points is not None:
        given = as_array(zero_points, "zero_points")
        if bits == 4 and given.dtype in (F32, F16):
            return _with_float_zeros(arrays, data, k, scales, group)
        if given.dtype != U8:
            raise DTypeError(f"zero_points: expected dtype uint8 or, of 4 bits, floats, got {given.dtype}")
        given = _of_blocks(given, n, -(-blocks * bits // 8), "zero_points")
        zero_points = nibbles(given)[:, :blocks] if bits == 4 else given
    rows = np.ascontiguousarray(data).reshape(n, -1)
    if bits == 4:
        return _int4(rows, k, scales, zero_points, group)
    if zero_points is not None and (zero_points != 128).any():
        raise ParameterError("zero_points: expected 128 for 8-bit weights, got others")
    return _int8((rows[:, :k] ^ U8.type(0x80)).view(I8), scales, group)


def _with_float_zeros(
    arrays: Mapping[str, Any], data: NDArray[np.uint8], k: int, scales: NDArray[np.float32], group: int
) -> DynQuantTensor:
    """4-bit weights whose zero points are floats: these become minimums, rounded to float32."""
    zeros = _of_blocks(_scales(arrays, "zero_points"), len(scales), scales.shape[1], "zero_points")
    with np.errstate(over="ignore"):
        minimums = -zeros * scales
    check_finite(minimums, "zero_points")
    rows = np.ascontiguousarray(data).reshape(len(data), -1)
    return _int4(rows, k, scales, None, group, minimums)


def _of_blocks(array: NDArray[Any], n: int, length: int, name: str) -> NDArray[Any]:
    """`array`, which may be flat, as (n, length)."""
    if array.shape not in ((n, length), (n * length,)):
        raise ShapeMismatchError((n, length), array.shape, name)
    return array.reshape(n, length)


_LAYOUTS = {
    "awq": _Layout(_write_awq, _read_awq),
    "compressed-tensors": _Layout(_write_compressed_tensors, _read_compressed_tensors),
    "gguf": _Layout(_write_gguf, _read_gguf),
    "gptq": _Layout(lambda t, s: _write_gptq(t, s, True), lambda a: _read_gptq(a, True)),
    "gptq_v2": _Layout(lambda t, s: _write_gptq(t, s, False), lambda a: _read_gptq(a, False)),
    "matmulnbits": _Layout(_write_matmulnbits, _read_matmulnbits),
}
