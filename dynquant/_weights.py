"""Quantizing the weights of a linear layer, once, ahead of the products."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._batches import row_batches
from ._calibrator import Calibrator
from ._compensate import SecondMoments, compensate
from ._format import DynQuantFormat
from ._tensor import DynQuantTensor, tensor_of_checked
from ._validate import F32, U8, as_flag, as_matrix, as_thread_count, check_finite, float_matrix, is_integer
from .errors import ParameterError, shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def quantize_weights(
    w: ArrayLike,
    *,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool | None = None,
    search: bool = False,
    calibration: ArrayLike | Iterable[ArrayLike] | Calibrator | None = None,
    relative: bool = True,
    num_threads: int = 1,
) -> DynQuantTensor:
    """Quantize a weight matrix.

    Parameters
    ----------
    w : array_like of floats, (out_features, in_features)
    bits : {8, 4}
        8: int8 codes in [-127, 127]. 4: two codes to a byte, the even one in the low nibble.
    group_size : int, optional
        A scale for each group of so many in_features; the last group of a row may be shorter. By default one
        for each output.
    symmetric : bool, optional
        Codes around zero, in [-7, 7] with ``bits=4``; otherwise codes 0..15 with a zero point for each scale.
        8-bit codes are always symmetric; 4-bit ones are by default not, for a zero point costs a product
        nothing.
    search : bool
        Choose each range by the least squared error among the whole one and its 31/32 ... 10/32, instead of
        the whole one. Takes some 25 times as long.
    calibration : array_like of floats, (..., in_features), an iterable of them, or a Calibrator, optional
        Inputs that the layer has had: one array with any number of leading axes, such as (batch, tokens,
        in_features), or a list, generator, data loader or other iterable of such arrays, which are read once,
        one after the other. Arrays without elements are passed over, and rows of zeros do not count. Of a
        Calibrator, made with `rows`, they are those that it has sampled. Codes are then chosen so that their
        errors cancel in the output on such inputs.
    relative : bool
        Count each row of `calibration` alike, whatever its length. Otherwise rows count by their squared
        length, and the few longest, such as massive tokens, may decide alone.
    num_threads : int
        The most threads to use, the caller's among them; -1: ``DYNQUANT_NUM_THREADS``, or the CPUs that this
        process may use. Small work takes fewer. The result does not depend on it.
        What `calibration` costs goes by NumPy's own setting.

    Returns
    -------
    DynQuantTensor

    Raises
    ------
    ShapeMismatchError, EmptyInputError
        If `w` has not two axes, or no elements; if an array of `calibration` has no axes, or there is no row
        in any.
    FeatureDimMismatchError
        If an array of `calibration` has another number of in_features.
    DTypeError, NonFiniteError
        If an array does not hold floats, or holds NaN or infinity; those of an iterable are named
        ``calibration[i]``. If `calibration` is neither an array nor an iterable.
    ParameterError
        If an option has a value that it cannot take, or a range is beyond float32.

    Notes
    -----
    Symmetric: ``scale = max|w| / clip``, ``code = clamp(round(w / scale), -clip, clip)``. Asymmetric:
    ``scale = (max(0, max) - min(0, min)) / 15``, ``zero_point = clamp(round(-min / scale), 0, 15)``,
    ``code = clamp(round(w / scale) + zero_point, 0, 15)``, for the value ``(code - zero_point) * scale``.
    Halves are rounded away from zero, in float32. Zero is always represented exactly. Where the scale is 0,
    so are the codes and the zero point.

    A convolution's weights (out, in, height, width) have one scale for each output channel as
    ``quantize_weights(w.reshape(len(w), -1))``, which goes with inputs unfolded to rows in the same order; a
    stack (experts, out, in) is ``[quantize_weights(expert) for expert in w]``.

    With `calibration` rounding is error-compensated: Frantar et al., "GPTQ: Accurate Post-Training
    Quantization for Generative Pre-trained Transformers" (ICLR 2023), columns in the order of their second
    moments. Weights that are zero stay zero. Damping comes from the data: of every four spans of rows one is
    held out, by a hash of their index, and the damping with the least error there is taken, or plain rounding
    if nothing is better; the weakest ones only where they are clearly better. A span has 8 rows, from row 512
    on 64 and from row 1024 on 128, so that few texts are on both sides. Of 24 rows and fewer none is held
    out, and the damping is strong. Beside the weights that takes about three float32 matrices of in_features
    by in_features, and 32 MiB for outputs, which are worked on in blocks; time goes with in_features squared
    times the sum of in_features, outputs and rows. The products are NumPy's, and their last bits are those of
    the BLAS that NumPy uses: here alone codes may differ from one machine to another.

    `search` and `calibration` together choose ranges by the error that the rows weight, the diagonal of their
    second moments. Three times more each scale is then fitted to the codes, by least squares of the error in
    the output, and each column rounded to what is best beside the others. That takes several times as long.

    Examples
    --------
    >>> t = quantize_weights([[0.0, 1.0, 15.0, -0.0]], bits=4)
    >>> [hex(b) for b in t.data[0]], t.scales.tolist(), t.zero_points.tolist()
    (['0x10', '0xf'], [1.0], [0])
    """
    fmt, symmetric = weight_format(bits, group_size, symmetric)
    search = as_flag(search, "search")
    threads = as_thread_count(num_threads)
    matrix = as_matrix(w, "w", _MATRIX)
    check_finite(matrix, "w", threads)
    relative = as_flag(relative, "relative")
    moments = None
    if calibration is not None:
        k = matrix.shape[1]
        moments = SecondMoments(row_batches(calibration, "calibration", k), k, relative)
    return quantize_matrix(matrix, fmt, symmetric, search, moments, threads, "w")


# What `w` should be, and the way for what is often passed instead.
_MATRIX = (
    "(out_features, in_features); weights of a convolution as w.reshape(len(w), -1), "
    "a stack of layers one at a time"
)


def weight_format(bits: Any, group_size: Any, symmetric: Any) -> tuple[DynQuantFormat, bool]:
    """The format that `quantize_weights` gives for these options, and whether it is symmetric."""
    packed = is_integer(bits) and bits == 4
    fmt = DynQuantFormat(bits, "per_row" if group_size is None else "per_group", group_size, packed)
    if symmetric is None:
        symmetric = fmt.bits == 8
    symmetric = as_flag(symmetric, "symmetric")
    if fmt.bits == 8 and not symmetric:
        raise ParameterError(f"symmetric: expected True or None for 8-bit weights, got {shown(symmetric)}")
    return fmt, symmetric


def quantize_matrix(
    w: NDArray[Any],
    fmt: DynQuantFormat,
    symmetric: bool,
    search: bool,
    moments: SecondMoments | None,
    threads: int,
    name: str,
    round_scales: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
) -> DynQuantTensor:
    """`quantize_weights` for a finite matrix called `name`, and options that are checked.

    `round_scales` gives scales as they will be stored: codes are made for these.
    """
    rows, group = float_matrix(w, *w.shape), fmt.group_of(w.shape[1])
    scales = np.empty(fmt.scales_shape(w.shape), F32)
    zero_points = None if symmetric else np.empty(scales.shape, U8)
    data = np.empty(fmt.data_shape(w.shape), fmt.data_dtype)
    codes = _core.CodeMatrix(data, scales, zero_points, rows.m, rows.k, group, fmt.packed, True)
    column_weights = moments.column_weights() if search and moments is not None else None
    _core.fit_rows(rows, codes, fmt.clip if symmetric else 15, search, column_weights, threads)
    if not np.isfinite(scales).all():
        raise ParameterError(f"{name}: expected the range of each group within float32, got one beyond it")
    if round_scales is not None:
        scales[...] = round_scales(scales)
    _core.quantize_rows(rows, codes, fmt.clip, not search and round_scales is None, threads)
    tensor = tensor_of_checked(data, scales, w.shape, fmt, zero_points)
    if moments is not None:
        compensate(w, tensor, moments, search, threads)
    return tensor
