"""SmoothQuant: factors that move outliers from activations to weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._batches import ActivationRows, is_one_batch
from ._calibrator import Calibrator
from ._format import DynamicScaleMode, MaxAbs, Percentile
from ._quantize import rank_of
from ._validate import (
    F32,
    as_exported,
    as_finite_vector,
    as_flag,
    as_floats,
    as_matrices,
    as_number,
    as_thread_count,
    checked_out,
    float_matrix,
    raise_non_finite,
)
from .errors import (
    EmptyInputError,
    FeatureDimMismatchError,
    InvalidAlphaError,
    ParameterError,
    ShapeMismatchError,
    SilentChannelWarning,
    shown,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_NON_FINITE_BITS = 0x7F800000
_MAX_ABS = MaxAbs()

# To rank columns, some at a time are copied to rows: about _TRANSPOSED floats, or _COLUMNS columns where
# columns are long, since 16 floats are one cache line of each row.
_TRANSPOSED = 1 << 16
_COLUMNS = 16


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
            raise ParameterError(f"epsilon: expected a finite number >= 1e-10, got {shown(self.epsilon)}")


_DEFAULT = SmoothQuantConfig()


def compute_smooth_factors(
    activations: ArrayLike | Iterable[ArrayLike] | Calibrator,
    weights: ArrayLike | Sequence[ArrayLike],
    config: SmoothQuantConfig = _DEFAULT,
    *,
    mode: DynamicScaleMode = _MAX_ABS,
    num_threads: int = 1,
) -> NDArray[np.float32]:
    """SmoothQuant factors of one linear layer, or of several that share their input.

    Parameters
    ----------
    activations : array_like of floats, (..., in_features), an iterable of such arrays, or a Calibrator
        What reached the layer on calibration data. Batches of an iterable are read once, one at a time, and
        empty ones are passed over; with a percentile they are kept until all have come. Or what is known of
        the data: a Calibrator with `channels`; or one axis, (in_features,), the largest or a ranked magnitude
        of each channel, none below 0.
    weights : array_like of floats, (out_features, in_features), or a list or tuple of such arrays
        Of several arrays, such as those of query, key and value, the largest magnitude over all counts.
    config : SmoothQuantConfig
    mode : MaxAbs or Percentile
        Which magnitude stands for a channel of the activations. A percentile leaves out the few largest, so
        that one extreme token does not set every factor; where it is 0 and the largest magnitude is not, the
        largest counts. Channels of magnitudes, which are such a choice already, take MaxAbs() only.
    num_threads : int
        As in `dynamic_quantize`.

    Returns
    -------
    ndarray of float32, (in_features,)
        ``max((act_amax + eps)**alpha / (weight_amax + eps)**(1 - alpha), eps)``. Activations are divided by
        it and weights multiplied. Channels that were never active have 1; see the notes.

    Warns
    -----
    SilentChannelWarning
        If a channel was never active and its factor follows from the equation all the same; see the notes.

    Raises
    ------
    ShapeMismatchError
        If `activations` has no axis, or a weight array not two.
    FeatureDimMismatchError
        If they differ in in_features.
    EmptyInputError
        If an array has no elements.
    DTypeError, NonFiniteError
        If an array does not hold floats, or holds NaN or infinity.
    ParameterError
        If `config` is no SmoothQuantConfig, `mode` no scale mode or not MaxAbs() beside magnitudes, a
        magnitude is below 0, a Calibrator has no channels, a factor overflows float32, or `num_threads` is no
        int above 0 or -1.

    Notes
    -----
    Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
    (ICML 2023), equation 4. One pass over each array; for a percentile, exact by nearest rank, several more
    over the activations, through a transposed copy of 256 KiB or 16 columns.

    Equation 4 gives a channel without any activation a factor near `epsilon`, and should it become active
    later it would drown its row. Rows and MaxAbs() follow the equation to the letter all the same, with a
    `SilentChannelWarning` unless alpha is 0, where activations play no part. With Percentile(p)
    (Percentile(1.0) is the largest magnitude), given magnitudes or a Calibrator such a channel has factor 1.
    A channel without weights has a large factor: it drops out of the rows' scales.

    Examples
    --------
    >>> compute_smooth_factors([[4.0, 1.0]], [[1.0, 1.0]]).round(3).tolist()
    [2.0, 1.0]
    >>> magnitudes, query, key = [4.0, 0.0], np.array([[0.25, 1.0]]), np.array([[1.0, 1.0]])
    >>> compute_smooth_factors(magnitudes, [query, key]).round(3).tolist()
    [2.0, 1.0]
    """
    if not isinstance(config, SmoothQuantConfig):
        raise ParameterError(f"config: expected a SmoothQuantConfig, got {shown(config)}")
    threads = as_thread_count(num_threads)
    if isinstance(activations, Calibrator):
        w = as_weights(weights, as_channels(activations, "activations"))
        return factors_of(known_magnitudes(activations, mode), largest_weights(w, threads), config)
    if is_one_batch(activations) or not isinstance(activations, Iterable):
        a = as_floats(activations, "activations")
        if a.ndim == 1:
            act_amax = _as_magnitudes(a, mode)
            return factors_of(act_amax, largest_weights(as_weights(weights, a.size), threads), config)
    rows, w = activation_rows(activations, weights, once=True)
    act_amax = channel_magnitudes(rows, mode, threads)
    weight_amax = largest_weights(w, threads)
    if not isinstance(mode, MaxAbs):
        return factors_of(act_amax, weight_amax, config)
    if config.alpha > 0 and not act_amax.all():
        silent = tuple(np.flatnonzero(act_amax == 0).tolist())
        warnings.warn(SilentChannelWarning(silent, act_amax.size), stacklevel=2)
    return _equation_4(act_amax, weight_amax, config)


def as_weights(weights: Any, in_features: int | None) -> dict[str, NDArray[Any]]:
    """Name -> matrix, of one weight array or of several that share their input; their in_features if None."""
    matrices = as_matrices(weights, "weights", "(out_features, in_features)")
    if in_features is None:
        in_features = next(iter(matrices.values())).shape[1]
    for name, w in matrices.items():
        if w.shape[1] != in_features:
            raise FeatureDimMismatchError(in_features, w.shape[1], name)
    return matrices


def activation_rows(
    activations: Any, weights: Any, once: bool
) -> tuple[ActivationRows, dict[str, NDArray[Any]]]:
    """Rows that reached a layer, which may be gone over but `once`, and its weights, all of them checked."""
    if is_one_batch(activations) or not isinstance(activations, Iterable):
        rows = ActivationRows.of_array(as_floats(activations, "activations"), "activations")
        return rows, as_weights(weights, rows.in_features)
    matrices = as_weights(weights, None)
    k = next(iter(matrices.values())).shape[1]
    return ActivationRows.of_batches(activations, "activations", k, once), matrices


def as_channels(calibrator: Calibrator, name: str) -> int:
    """How many channels a Calibrator that was passed as `name` keeps."""
    if calibrator.channels is None:
        raise ParameterError(f"{name}: expected a Calibrator made with channels, got {calibrator}")
    return calibrator.channels


def known_magnitudes(calibrator: Calibrator, mode: DynamicScaleMode) -> NDArray[np.float32]:
    """`channel_magnitudes` of all that a calibrator has seen."""
    rank_of(mode, 1)
    amax = calibrator.channel_amax()
    if isinstance(mode, Percentile):
        ranked = calibrator.channel_percentile(mode.p)
        return np.where(ranked == 0, amax, ranked)
    return amax


def largest_weights(matrices: dict[str, NDArray[Any]], threads: int) -> NDArray[np.float32]:
    """The largest magnitude of each channel over all the matrices."""
    first, *others = (_column_amax(w, name, threads) for name, w in matrices.items())
    for amax in others:
        np.maximum(first, amax, out=first)
    return first


def channel_magnitudes(rows: ActivationRows, mode: DynamicScaleMode, threads: int) -> NDArray[np.float32]:
    """The magnitude that stands for each channel of the activations; 0 only if all of its values are 0."""
    rank_of(mode, 1)
    if isinstance(mode, Percentile) and mode.p < 1:
        rows = rows.joined()
    amax, tokens = np.zeros(rows.in_features, np.int32), 0
    for matrix in rows:
        _core.column_amax(float_matrix(matrix, *matrix.shape), amax, threads)
        tokens += len(matrix)
    if amax.max() >= _NON_FINITE_BITS:
        rows.raise_non_finite()
    if not tokens:
        raise EmptyInputError("activations: expected at least one row, got none")
    return _ranked(matrix, amax.view(F32), rank_of(mode, tokens), threads)


def _ranked(matrix: NDArray[Any], amax: NDArray[np.float32], rank: int, threads: int) -> NDArray[np.float32]:
    """The magnitude at `rank` of each column, unless it is 0 or `rank` stands for the largest."""
    tokens, k = matrix.shape
    if not 0 <= rank < tokens - 1:
        return amax
    ranked = np.empty(k, F32)
    width = max(_COLUMNS, _TRANSPOSED // tokens)
    for first in range(0, k, width):
        columns = np.ascontiguousarray(matrix[:, first : first + width].T)
        part = ranked[first : first + width]
        _core.scale_rows(float_matrix(columns, *columns.shape), part, 1.0, rank, rank, tokens, threads)
    # A ranked 0 says that the channel is rarely active, and nothing of its size when it is.
    np.copyto(ranked, amax, where=ranked == 0)
    return ranked


def _as_magnitudes(vector: NDArray[Any], mode: DynamicScaleMode) -> NDArray[np.float32]:
    if not isinstance(mode, MaxAbs):
        raise ParameterError(f"mode: expected MaxAbs() for magnitudes of one axis, got {shown(mode)}")
    if vector.size == 0:
        raise EmptyInputError("activations: expected at least one element, got shape (0,)")
    magnitudes = as_finite_vector(vector, "activations")
    if not (magnitudes >= 0).all():
        raise ParameterError(f"activations: expected magnitudes of at least 0, got {magnitudes.min()}")
    return magnitudes


def factors_of(
    act_amax: NDArray[np.float32], weight_amax: NDArray[np.float32], config: SmoothQuantConfig
) -> NDArray[np.float32]:
    """The factors by equation 4, but 1 for channels that were never active."""
    factors = _equation_4(act_amax, weight_amax, config)
    factors[act_amax == 0] = 1
    return factors


def _equation_4(
    act_amax: NDArray[np.float32], weight_amax: NDArray[np.float32], config: SmoothQuantConfig
) -> NDArray[np.float32]:
    factors = np.empty(act_amax.size, F32)
    _core.smooth_factors(act_amax, weight_amax, config.alpha, config.epsilon, factors)
    if not np.isfinite(factors).all():
        raise ParameterError(f"config: expected factors within float32, got {factors.max()} with {config}")
    return factors


def _column_amax(matrix: NDArray[Any], name: str, threads: int) -> NDArray[np.float32]:
    bits = np.zeros(matrix.shape[1], np.int32)
    _core.column_amax(float_matrix(matrix, *matrix.shape), bits, threads)
    if bits.max() >= _NON_FINITE_BITS:
        raise_non_finite(matrix, name)
    return bits.view(F32)


def smooth_activations(
    activations: ArrayLike,
    factors: ArrayLike,
    *,
    out: NDArray[np.float32] | None = None,
    check_finite: bool = True,
    num_threads: int = 1,
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
    check_finite : bool
        Check all of `activations` for NaN and infinity before the first row is written to `out`, which reads
        it twice. With False they are an error too, but `out` may then have rows of the result.
    num_threads : int
        As in `dynamic_quantize`.

    Returns
    -------
    ndarray of float32
        `out` if it was given. A quotient beyond float32 is infinite.

    Raises
    ------
    FeatureDimMismatchError
        If there are not in_features factors.
    ParameterError
        If a factor is not above zero, or an option has a value that it cannot take.
    DTypeError, NonFiniteError, ShapeMismatchError, LayoutError
        If an argument is not as described. After any of these the arrays are as they were, unless
        `check_finite` is False.

    Examples
    --------
    >>> smooth_activations([[4.0, 1.0]], [2.0, 1.0]).tolist()
    [[2.0, 1.0]]
    """
    return _scale_columns(activations, factors, out, check_finite, num_threads, "activations", divide=True)


def smooth_weights(
    weights: ArrayLike,
    factors: ArrayLike,
    *,
    out: NDArray[np.float32] | None = None,
    check_finite: bool = True,
    num_threads: int = 1,
) -> NDArray[np.float32]:
    """Multiply every row of the weights by the factors.

    Parameters
    ----------
    weights : array_like of floats, (out_features, in_features)
    factors, out, check_finite, num_threads
        As in `smooth_activations`.

    Returns
    -------
    ndarray of float32
        `out` if it was given. With activations divided by the same factors the layer's output stays what it
        was, up to rounding. A product beyond float32 is infinite.

    Raises
    ------
    FeatureDimMismatchError, ParameterError, DTypeError, NonFiniteError, ShapeMismatchError, LayoutError
        As in `smooth_activations`.

    Examples
    --------
    >>> smooth_weights([[1.0, 3.0]], [2.0, 1.0]).tolist()
    [[2.0, 3.0]]
    """
    return _scale_columns(weights, factors, out, check_finite, num_threads, "weights", divide=False)


def _scale_columns(
    x: Any,
    factors: Any,
    out: NDArray[np.float32] | None,
    check_finite: bool,
    num_threads: int,
    name: str,
    *,
    divide: bool,
) -> NDArray[np.float32]:
    check, threads = as_flag(check_finite, "check_finite"), as_thread_count(num_threads)
    x, factors = as_exported(x, name), as_exported(factors, "factors")
    array = as_floats(x, name)
    if array.ndim == 0:
        raise ShapeMismatchError("(..., in_features)", array.shape, name)
    f = as_factors(factors, "factors", array.shape[-1])
    if out is None:
        out, check = np.empty(array.shape, F32), False
    else:
        checked_out(out, array.shape, F32, f, factors, in_place=x)
    m, k = out.size // max(f.size, 1), f.size
    if not _core.scale_columns(float_matrix(array, m, k), f, divide, out, threads, check):
        raise_non_finite(array, name)
    return out


def as_factors(x: Any, name: str, k: int | None = None) -> NDArray[np.float32]:
    """`x` as a vector of smoothing factors, for `k` channels if that is given."""
    f = as_finite_vector(x, name)
    if k not in (None, f.size):
        raise FeatureDimMismatchError(k, f.size, name)
    if not _core.all_positive(f):
        raise ParameterError(f"{name}: expected numbers above 0, got {f.min()}")
    return f


def fold_smooth_factors(
    factors: ArrayLike, gamma: ArrayLike, beta: ArrayLike | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Fold smoothing factors into the normalization before the layer, so that smoothing costs nothing.

    Parameters
    ----------
    factors : array_like of floats, (in_features,)
        Finite and above zero.
    gamma : array_like of floats, (in_features,)
        What the norm multiplies with. Where it multiplies with ``1 + weight``, pass that sum.
    beta : array_like of floats, (in_features,), optional
        What it adds: LayerNorm has it, RMSNorm does not.

    Returns
    -------
    gamma : ndarray of float32, (in_features,)
        ``gamma / factors``.
    beta : ndarray of float32, (in_features,), or None
        ``beta / factors``; None if there was none. Both are new arrays.

    Raises
    ------
    FeatureDimMismatchError
        If `gamma` or `beta` is not as long as `factors`.
    ParameterError
        If a factor is not above zero.
    NonFiniteError
        If an argument holds NaN or infinity, or a quotient is beyond float32.
    DTypeError, ShapeMismatchError
        If an argument does not hold floats, or has not one axis.

    Notes
    -----
    The norm then gives smoothed activations, so every layer that reads them is built from smoothed weights,
    ``QuantLinear.from_float(smooth_weights(weight, factors))``, and has no `smooth` of its own. With several
    such layers the factors come from all their weights; see `compute_smooth_factors`. Equal to smoothing in
    every call up to rounding, and bit for bit where the factors are powers of two.

    Examples
    --------
    >>> gamma, beta = fold_smooth_factors([2.0, 0.5], [1.0, 1.0], [0.0, 3.0])
    >>> gamma.tolist(), beta.tolist()
    ([0.5, 2.0], [0.0, 6.0])
    """
    f = as_factors(factors, "factors")
    return _folded(gamma, f, "gamma"), None if beta is None else _folded(beta, f, "beta")


def _folded(x: ArrayLike, factors: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    vector = as_finite_vector(x, name)
    if vector.size != factors.size:
        raise FeatureDimMismatchError(factors.size, vector.size, name)
    quotients = np.empty(factors.size, F32)
    with np.errstate(over="ignore", under="ignore"):
        np.divide(vector, factors, out=quotients)
    if not _core.all_finite(float_matrix(quotients, 1, quotients.size)):
        raise_non_finite(quotients, f"{name} / factors")
    return quotients
