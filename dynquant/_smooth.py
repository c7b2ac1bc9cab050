"""Preparing activations and weights: SmoothQuant factors, and rotation by a Hadamard matrix."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._validate import (
    F32,
    as_finite_vector,
    as_floats,
    as_matrix,
    as_number,
    check_finite,
    checked_out,
    float_rows,
    raise_non_finite,
)
from .errors import (
    FeatureDimMismatchError,
    InvalidAlphaError,
    ParameterError,
    ShapeMismatchError,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_NON_FINITE_BITS = 0x7F800000


@dataclass(frozen=True)
class SmoothQuantConfig:
    """How far outliers are moved.

    Parameters
    ----------
    alpha : float
        Migration strength in [0, 1]: 0 leaves all of the range to the activations, 1 moves all of it to the
        weights.
    epsilon : float
        Added to every magnitude, and the smallest factor. At least 1e-10.

    Raises
    ------
    InvalidAlphaError
        If `alpha` is outside [0, 1] or not a number.
    ParameterError
        If `epsilon` is below 1e-10, not finite or not a number.
    """

    alpha: float = 0.5
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        try:
            alpha = as_number(self.alpha, "alpha")
        except ParameterError as error:
            raise InvalidAlphaError(self.alpha) from error
        if not 0 <= alpha <= 1:
            raise InvalidAlphaError(self.alpha)
        if not 1e-10 <= as_number(self.epsilon, "epsilon") < float(np.finfo(np.float32).max):
            raise ParameterError(f"epsilon: expected a finite number >= 1e-10, got {self.epsilon!r}")


_DEFAULT = SmoothQuantConfig()


def compute_smooth_factors(
    activations: ArrayLike, weights: ArrayLike, config: SmoothQuantConfig = _DEFAULT
) -> NDArray[np.float32]:
    """SmoothQuant factors of one linear layer.

    Parameters
    ----------
    activations : array_like of floats, (tokens, in_features)
        What reached the layer on calibration data.
    weights : array_like of floats, (out_features, in_features)
    config : SmoothQuantConfig

    Returns
    -------
    ndarray of float32, (in_features,)
        ``max((act_amax + eps)**alpha / (weight_amax + eps)**(1 - alpha), eps)``, the largest magnitudes
        taken down each column. Activations are divided by it and weights multiplied.

    Raises
    ------
    ShapeMismatchError
        If either has not two axes.
    FeatureDimMismatchError
        If they differ in in_features.
    EmptyInputError
        If either has no elements.
    DTypeError, NonFiniteError
        If either does not hold floats, or holds NaN or infinity.
    ParameterError
        If `config` is no SmoothQuantConfig, or a factor overflows float32.

    Notes
    -----
    Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
    (ICML 2023), equation 4. One pass over each array.

    Examples
    --------
    >>> compute_smooth_factors([[4.0, 1.0]], [[1.0, 1.0]]).round(3).tolist()
    [2.0, 1.0]
    """
    if not isinstance(config, SmoothQuantConfig):
        raise ParameterError(f"config: expected a SmoothQuantConfig, got {config!r}")
    a = as_matrix(activations, "activations", "(tokens, in_features)")
    w = as_matrix(weights, "weights", "(out_features, in_features)")
    if a.shape[1] != w.shape[1]:
        raise FeatureDimMismatchError(a.shape[1], w.shape[1], "weights")
    act_amax, weight_amax = _column_amax(a, "activations"), _column_amax(w, "weights")
    factors = np.empty(a.shape[1], F32)
    _core.smooth_factors(act_amax, weight_amax, config.alpha, config.epsilon, factors)
    if not np.isfinite(factors).all():
        raise ParameterError(f"config: expected factors within float32, got {factors.max()} with {config}")
    return factors


def _column_amax(matrix: NDArray[Any], name: str) -> NDArray[np.float32]:
    bits = np.zeros(matrix.shape[1], np.int32)
    _core.column_amax(float_rows(matrix, *matrix.shape), bits)
    if bits.max() >= _NON_FINITE_BITS:
        raise_non_finite(matrix, name)
    return bits.view(F32)


def smooth_activations(
    activations: ArrayLike, factors: ArrayLike, *, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Divide every row of the activations by the factors.

    Parameters
    ----------
    activations : array_like of floats, (tokens, in_features)
        Any number of leading axes, or none.
    factors : array_like of floats, (in_features,)
        Finite and above zero.
    out : ndarray of float32, optional
        Of the shape of `activations`, C-contiguous. May be `activations` itself; otherwise apart from both
        inputs. Allocated if not given.

    Returns
    -------
    ndarray of float32
        `out` if it was given.

    Raises
    ------
    FeatureDimMismatchError
        If there are not in_features factors.
    ParameterError
        If a factor is not above zero.
    DTypeError, NonFiniteError, ShapeMismatchError, LayoutError
        If an argument is not as described. After any of these the arrays are as they were.

    Examples
    --------
    >>> smooth_activations([[4.0, 1.0]], [2.0, 1.0]).tolist()
    [[2.0, 1.0]]
    """
    return _scale_columns(activations, factors, out, "activations", divide=True)


def smooth_weights(
    weights: ArrayLike, factors: ArrayLike, *, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Multiply every row of the weights by the factors.

    Parameters
    ----------
    weights : array_like of floats, (out_features, in_features)
    factors, out
        As in `smooth_activations`.

    Returns
    -------
    ndarray of float32
        `out` if it was given. With activations divided by the same factors the layer's output stays what it
        was, up to rounding.

    Raises
    ------
    FeatureDimMismatchError, ParameterError, DTypeError, NonFiniteError, ShapeMismatchError, LayoutError
        As in `smooth_activations`.

    Examples
    --------
    >>> smooth_weights([[1.0, 3.0]], [2.0, 1.0]).tolist()
    [[2.0, 3.0]]
    """
    return _scale_columns(weights, factors, out, "weights", divide=False)


def _scale_columns(
    x: Any, factors: Any, out: NDArray[np.float32] | None, name: str, *, divide: bool
) -> NDArray[np.float32]:
    array = as_floats(x, name)
    if array.ndim == 0:
        raise ShapeMismatchError("(..., in_features)", array.shape, name)
    f = as_finite_vector(factors, "factors")
    if f.size != array.shape[-1]:
        raise FeatureDimMismatchError(array.shape[-1], f.size)
    if not (f > 0).all():
        raise ParameterError(f"factors: expected numbers above 0, got {f.min()}")
    if out is None:
        out = np.empty(array.shape, F32)
    else:
        checked_out(out, array.shape, F32, factors, in_place=x)
    check_finite(array, name)
    m, k = out.size // max(f.size, 1), f.size
    _core.scale_columns(float_rows(array, m, k), f, divide, out.reshape(m, k))
    return out


def hadamard_transform(
    x: ArrayLike, *, block_size: int | None = None, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Rotate rows by an orthonormal Hadamard matrix, which spreads outliers over all channels.

    Parameters
    ----------
    x : array_like of floats, (..., n)
    block_size : int, optional
        A power of two that divides n: the transform works on runs of that length. By default the largest one.
    out : ndarray of float32, optional
        Of the shape of `x`, C-contiguous. May be `x` itself; otherwise apart from it. Allocated if not given.

    Returns
    -------
    ndarray of float32
        ``H x / sqrt(block_size)`` for every run, H the Hadamard matrix in Sylvester's order. `out` if it was
        given.

    Raises
    ------
    ParameterError
        If `block_size` is no power of two that divides n, or a result is beyond float32.
    ShapeMismatchError, DTypeError, NonFiniteError, LayoutError
        If `x` has no axis or does not hold finite floats, or `out` cannot take the result. After any of
        these the arrays are as they were.

    Notes
    -----
    The transform is its own inverse up to rounding, and leaves dot products unchanged: with activations and
    the rows of a weight matrix rotated alike their product stays what it was. n log2(block_size) additions,
    in one order on every instruction set. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated
    LLMs" (NeurIPS 2024).

    Examples
    --------
    >>> hadamard_transform([3.0, 1.0, 0.0, 0.0]).tolist()
    [2.0, 1.0, 2.0, 1.0]
    """
    array = as_floats(x, "x")
    if array.ndim == 0:
        raise ShapeMismatchError("(..., n)", array.shape, "x")
    n = array.shape[-1]
    block = _block_size(block_size, n)
    if out is not None:
        checked_out(out, array.shape, F32, in_place=x)
    check_finite(array, "x")
    most = float(np.finfo(F32).max) / block
    if max(map(abs, _core.min_max(float_rows(array, 1, array.size)))) > most:
        raise ParameterError(f"x: expected magnitudes up to {most:.3g}, so that sums stay within float32")
    result = np.empty(array.shape, F32) if out is None else out
    result[...] = array
    _core.hadamard(result.reshape(array.size // max(n, 1), n), block)
    return result


def hadamard_block(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n or 1


def _block_size(block_size: int | None, n: int) -> int:
    """`block_size`, checked, or the one for n."""
    if block_size is None:
        return hadamard_block(n)
    try:
        block = operator.index(block_size)
    except TypeError as error:
        raise ParameterError(f"block_size: expected an int, got {block_size!r}") from error
    if block < 1 or block & (block - 1) or n % block:
        raise ParameterError(f"block_size: expected a power of two that divides {n}, got {block_size!r}")
    return block
