"""Products with weights that are packed for the kernels in use. Every array here has been checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from . import _core
from ._format import DynQuantFormat
from ._tensor import DynQuantTensor, check_arrays, code_matrix
from ._validate import F32, as_floats, check_finite, float_matrix
from .errors import ParameterError, ShapeMismatchError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bytes of activations that are quantized before the weights are read for them: they stay in a core's own
# cache, and scratch is bounded however many rows there are. Of long rows as many as a product takes at once.
CHUNK_BYTES = 15 << 16
_CHUNK_ROWS = 32

# Kinds of weights, as messages name them.
INT8_ROWS, INT8_GROUPS = "int8 per row", "int8 per group"
INT4 = "packed 4-bit codes per row or per group"

# Floats of weights that are dequantized at once for a product with float activations: 1 MiB.
_DEQUANTIZED_FLOATS = 1 << 18


def check_weight(weight: Any, name: str, *kinds: str) -> None:
    """Raise unless `weight` is a matrix as from `quantize_weights`, of one of `kinds`."""
    if not isinstance(weight, DynQuantTensor):
        raise ParameterError(
            f"{name}: expected a DynQuantTensor, as from quantize_weights, got {type(weight).__name__}"
        )
    if _kind_of(weight.format) not in kinds:
        raise ParameterError(f"{name}: expected {' or '.join(kinds)}, got {shown(weight)}")
    if len(weight.shape) != 2:
        raise ShapeMismatchError("(out_features, in_features)", weight.shape, name)
    check_arrays(weight)
    check_finite(as_floats(weight.scales, f"{name}.scales"), f"{name}.scales")
    if weight.minimums is not None:
        check_finite(as_floats(weight.minimums, f"{name}.minimums"), f"{name}.minimums")


def _kind_of(fmt: DynQuantFormat) -> str | None:
    if fmt.granularity == "per_tensor" or (fmt.bits == 4 and not fmt.packed):
        return None
    if fmt.bits == 4:
        return INT4
    return INT8_ROWS if fmt.group_size is None else INT8_GROUPS


def packed_linear(
    weight: DynQuantTensor,
    bias: NDArray[np.float32] | None,
    factors: NDArray[np.float32] | None = None,
    divide: bool = False,
    block: int = 0,
    symmetric: bool = True,
) -> _core.PackedLinear:
    """Weights, not empty, in the form of the kernels in use.

    Inputs are divided or multiplied by `factors`, and then rotated in spans of `block`, unless that is 0.
    `symmetric` activations have codes around zero; others, which 4-bit weights do not take, a zero point.
    """
    fmt, (n, k) = weight.format, weight.shape
    int8_groups = fmt.bits == 8 and (fmt.group_size is not None or not symmetric)
    group = fmt.group_of(k) if fmt.bits == 4 or int8_groups else 0
    kind = int8_groups, symmetric, weight.minimums is not None
    layer = _core.PackedLinear(n, k, group, bias, factors, divide, block, *kind)
    layer.pack(code_matrix(weight))
    return layer


def product(
    weight: DynQuantTensor,
    bias: NDArray[np.float32] | None,
    x: NDArray[Any],
    out: NDArray[np.float32] | None,
    threads: int,
    name: str,
) -> NDArray[np.float32]:
    """Rows of `x` times weights that are packed for this one product."""
    if weight.element_count == 0:
        return _product_of_nothing(weight, bias, x, out, name)
    return multiply(packed_linear(weight, bias), x, out, threads, name)


def _product_of_nothing(
    weight: DynQuantTensor,
    bias: NDArray[np.float32] | None,
    x: NDArray[Any],
    out: NDArray[np.float32] | None,
    name: str,
) -> NDArray[np.float32]:
    """Without inputs or outputs: sums of 0, times their scales where there are any, and the bias."""
    check_finite(x, name)
    zeros = np.zeros(weight.shape[0], F32)
    if weight.format.bits == 8:
        zeros *= weight.scales  # a negative scale gives -0.0
    y = np.empty((x.shape[0], zeros.size), F32) if out is None else out
    y[:] = zeros if bias is None else zeros + bias
    return y


def multiply(
    layer: _core.PackedLinear,
    x: NDArray[Any],
    out: NDArray[np.float32] | None,
    threads: int,
    name: str,
) -> NDArray[np.float32]:
    """Rows of floats `x` (m, k) times packed weights."""
    m, k = x.shape
    if layer.is_thin(m):
        return _multiply_thin(layer, x, out, threads, name)
    y = np.empty((m, layer.n), F32) if out is None else out
    if not _multiply_rows(layer, layer.quantize, float_matrix(x, m, k), y, out is not None, threads):
        raise_bad_row(x, layer, name)
    return y


def _multiply_thin(
    layer: _core.PackedLinear,
    x: NDArray[Any],
    out: NDArray[np.float32] | None,
    threads: int,
    name: str,
) -> NDArray[np.float32]:
    """`multiply` for a layer with few inputs or outputs, whose results are written as its rows are read.

    A new array may be given up half written; the caller's may not. So it is filled from a new one, or where
    the inputs are smaller they are checked first.
    """
    m, k = x.shape
    rows = float_matrix(x, m, k)
    if out is None or layer.factors is not None or layer.rotates or layer.n < k:
        y = np.empty((m, layer.n), F32)
    else:
        check_finite(x, name, threads)
        y = out
    if not layer.multiply_thin(rows, y, threads):
        raise_bad_row(x, layer, name)
    if out is not None and y is not out:
        out[:] = y
        return out
    return y


def multiply_codes(
    layer: _core.PackedLinear,
    x: DynQuantTensor,
    out: NDArray[np.float32] | None,
    threads: int,
    name: str,
) -> NDArray[np.float32]:
    """Rows of int8 codes `x` with a scale for each, any leading axes, times packed weights; (m, n)."""
    rows = code_matrix(x)
    y = np.empty((rows.m, layer.n), F32) if out is None else out
    if not _multiply_rows(layer, layer.load_codes, rows, y, out is not None, threads):
        raise ParameterError(f"{name}: expected codes in [-127, 127], got -128")
    return y


def _multiply_rows(
    layer: _core.PackedLinear,
    load: Callable[..., bool],
    rows: Any,
    y: NDArray[np.float32],
    check_first: bool,
    threads: int,
) -> bool:
    """y = rows times packed weights, as many rows at a time as cache holds; False where `load` gives that.

    ``load(rows, a, first, end, threads)`` brings rows first .. end into the form of the kernels.
    """
    m = rows.m
    max_rows = rows_of_part(layer)
    chunk = m if m <= max_rows else _chunk_rows(m, max_rows)
    a = _core.Activations(layer, chunk, threads)  # all that takes memory: what raises has changed nothing
    starts = range(0, m, chunk or 1)
    # A new array may be given up half written; the caller's may not.
    if check_first and len(starts) > 1 and not all(load(rows, a, i, i + chunk, threads) for i in starts):
        return False
    for i in starts:
        if not load(rows, a, i, i + chunk, threads):
            return False
        layer.multiply(a, y, threads)
    return True


def rows_of_part(layer: _core.PackedLinear) -> int:
    """The most rows that are quantized before the weights are read for them."""
    return max(_CHUNK_ROWS, CHUNK_BYTES // layer.activation_bytes())


def _chunk_rows(m: int, max_rows: int) -> int:
    """Rows of a chunk of m: as few chunks as `max_rows` allows, nearly equal, in multiples of _CHUNK_ROWS."""
    chunks = -(-m // (max_rows // _CHUNK_ROWS * _CHUNK_ROWS))
    return -(-m // (_CHUNK_ROWS * chunks)) * _CHUNK_ROWS


def raise_bad_row(x: NDArray[Any], layer: _core.PackedLinear, name: str) -> NoReturn:
    """Raise for what is wrong with x, which has a row that a layer could not quantize."""
    check_finite(x, name)
    if layer.factors is not None and layer.divide:
        with np.errstate(over="ignore"):
            check_finite(x.astype(F32, copy=False) / np.abs(layer.factors), f"{name} / smooth")
    if layer.symmetric:
        raise ParameterError(f"{name}: expected rows within float32 after rotation, got one that overflows")
    raise ParameterError(
        f"{name}: expected rows whose range, largest minus smallest value, is within float32, when rotated "
        "too if the layer does that; got one that is not"
    )


def multiply_floats(
    weight: DynQuantTensor, bias: NDArray[np.float32] | None, x: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Rows of floats `x` (m, k) times what the weights stand for, some outputs at a time, by NumPy's BLAS."""
    n, k = weight.shape
    y = np.empty((len(x), n), F32)
    outputs = max(1, _DEQUANTIZED_FLOATS // k)
    with np.errstate(all="ignore"):
        for first in range(0, n, outputs):
            np.matmul(x, weight[first : first + outputs].dequantize().T, out=y[:, first : first + outputs])
        return y if bias is None else np.add(y, bias, out=y)
