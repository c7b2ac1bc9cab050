"""Choosing how far SmoothQuant moves outliers, by what the layer's output loses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ._format import DynamicScaleMode, MaxAbs
from ._linear import QuantLinear
from ._smooth import SmoothQuantConfig, as_weights, channel_magnitudes, factors_of, largest_weights
from ._validate import F32, as_flag, as_matrix
from ._weights import weight_format
from .errors import EmptyInputError, InvalidAlphaError, NonFiniteError, ParameterError, shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_MAX_ABS = MaxAbs()
_ALPHAS = tuple(i / 20 for i in range(21))

# What is worked on at once: bytes of quantized weights over all candidates, and floats of inputs and outputs.
_LAYER_BYTES = 1 << 24
_ROW_FLOATS = 1 << 19
# Outputs are taken in whole panels of the kernels, which are of 32 at most.
_OUTPUTS = 32


@dataclass(frozen=True, eq=False)
class AlphaSearch:
    """What `search_alpha` found.

    Attributes
    ----------
    alpha : float
        The one with the smallest error; the first of equals.
    factors : ndarray of float32, (in_features,)
        The smoothing factors for it.
    errors : tuple of float
        Error of the layers' outputs for each of `alphas`.
    alphas : tuple of float
        In the order given.
    unsmoothed_error : float
        The same error without smoothing.
    """

    alpha: float
    factors: NDArray[np.float32] = field(repr=False)
    errors: tuple[float, ...]
    alphas: tuple[float, ...]
    unsmoothed_error: float


def search_alpha(
    activations: ArrayLike,
    weights: ArrayLike | Sequence[ArrayLike],
    *,
    alphas: Iterable[float] | None = None,
    epsilon: float = 1e-5,
    mode: DynamicScaleMode = _MAX_ABS,
    relative: bool = False,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool | None = None,
    hadamard: bool = False,
) -> AlphaSearch:
    """The migration strength that costs the output of a quantized layer least on calibration data.

    Parameters
    ----------
    activations : array_like of floats, (tokens, in_features)
        What reached the layer on calibration data: the factors come from it, and the error is measured on it.
    weights : array_like of floats, (out_features, in_features), or a list or tuple of such arrays
        Several arrays share the input and the factors; their errors are added up.
    alphas : iterable of float, optional
        Those to try. By default 0 to 1 in steps of 0.05.
    epsilon : float
        As in `SmoothQuantConfig`.
    mode : MaxAbs or Percentile
        As in `compute_smooth_factors`.
    relative : bool
        Divide the squared error of each token by the token's squared output. Otherwise the few tokens with
        the largest outputs may decide alone.
    bits, group_size, symmetric, hadamard
        How the layer will be quantized, as in `QuantLinear.from_float`.

    Returns
    -------
    AlphaSearch

    Raises
    ------
    InvalidAlphaError
        If one of `alphas` is outside [0, 1] or not a number.
    ShapeMismatchError, FeatureDimMismatchError, EmptyInputError
        If the shapes do not fit each other, or an array or `alphas` has no elements.
    DTypeError, NonFiniteError
        If an array does not hold floats, or holds NaN or infinity.
    ParameterError
        If another argument has a value that it cannot take, or factors, smoothed values or outputs are beyond
        float32.

    Notes
    -----
    For each candidate `QuantLinear` is built and called, and the squares of what its output is away from the
    product in float64 are added up. Layers are built for some outputs at a time and called on some rows at a
    time: about 25 MiB of scratch, or 32 bytes for each input and candidate and 400 for each input if that is
    more; and 8 bytes for each candidate and token. The float64 product is NumPy's, on as many threads as
    NumPy is set to.

    Channels that were never active have factor 1 in either mode.

    The maxima that the factors come from are those of the very rows that are measured, so the error is an
    optimistic one, and with few tokens the best alpha a little too large; see `relative`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x, w = rng.standard_normal((64, 32)), rng.standard_normal((8, 32))
    >>> x[:, 5] *= 50  # an outlier channel
    >>> found = search_alpha(x, w, alphas=[0.0, 0.5, 1.0])
    >>> found.alpha, min(found.errors) < found.unsmoothed_error / 10
    (0.5, True)
    """
    relative, hadamard = as_flag(relative, "relative"), as_flag(hadamard, "hadamard")
    weight_format(bits, group_size, symmetric)
    configs = _configs(alphas, epsilon)
    a = as_matrix(activations, "activations", "(tokens, in_features)")
    matrices = as_weights(weights, a.shape[1])
    act_amax, weight_amax = channel_magnitudes(a, mode), largest_weights(matrices)
    candidates = [factors_of(act_amax, weight_amax, config) for config in configs]
    build = functools.partial(
        QuantLinear.from_float, bits=bits, group_size=group_size, symmetric=symmetric, hadamard=hadamard
    )
    unsmoothed, *errors = _output_errors(a, matrices.values(), [None, *candidates], build, relative)
    best = int(np.argmin(errors))
    return AlphaSearch(
        alpha=float(configs[best].alpha),
        factors=candidates[best],
        errors=tuple(errors),
        alphas=tuple(float(config.alpha) for config in configs),
        unsmoothed_error=unsmoothed,
    )


def _configs(alphas: Iterable[float] | None, epsilon: float) -> list[SmoothQuantConfig]:
    try:
        values = list(_ALPHAS if alphas is None else alphas)
    except (TypeError, NotImplementedError) as error:  # the latter from a memoryview of more than one axis
        raise ParameterError(f"alphas: expected an iterable of numbers, got {shown(alphas)}") from error
    if not values:
        raise EmptyInputError("alphas: expected at least one number, got none")
    return [_config(alpha, epsilon, f"alphas[{i}]") for i, alpha in enumerate(values)]


def _config(alpha: Any, epsilon: float, name: str) -> SmoothQuantConfig:
    try:
        return SmoothQuantConfig(alpha, epsilon)
    except InvalidAlphaError as error:
        raise InvalidAlphaError(alpha, name) from error


def _output_errors(
    a: NDArray[Any],
    weights: Iterable[NDArray[Any]],
    candidates: list[NDArray[np.float32] | None],
    build: Callable[..., QuantLinear],
    relative: bool,
) -> list[float]:
    """Squared error of the outputs over all weights and rows, for each candidate's factors."""
    total = np.zeros(len(candidates))
    try:
        for w in weights:
            errors, power = _row_errors(a, w, candidates, build)
            if relative:
                # Against no output there is no relative error: such rows do not count.
                errors = np.divide(errors, power, out=np.zeros_like(errors), where=power > 0)
            total += errors.sum(axis=1)
    except NonFiniteError as error:
        raise ParameterError(f"activations: expected {error.argument} within float32, got inf") from error
    if not np.isfinite(total).all():
        raise ParameterError("activations: expected outputs within float32, got inf")
    return [float(error) for error in total]


def _row_errors(
    a: NDArray[Any],
    w: NDArray[Any],
    candidates: list[NDArray[np.float32] | None],
    build: Callable[..., QuantLinear],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Squared error (candidates, tokens) and squared output (tokens,) of every row."""
    errors, power = np.zeros((len(candidates), len(a))), np.zeros(len(a))
    outputs = max(1, _LAYER_BYTES // (len(candidates) * a.shape[1] * _OUTPUTS)) * _OUTPUTS
    for first in range(0, len(w), outputs):
        part = w[first : first + outputs].astype(F32, copy=False)
        _add_row_errors(a, part, [build(part, smooth=factors) for factors in candidates], errors, power)
    return errors, power


def _add_row_errors(
    a: NDArray[Any],
    w: NDArray[np.float32],
    layers: list[QuantLinear],
    errors: NDArray[np.float64],
    power: NDArray[np.float64],
) -> None:
    wide = w.astype(np.float64)
    rows = max(1, _ROW_FLOATS // sum(w.shape))
    for start in range(0, len(a), rows):
        here = slice(start, start + rows)
        x = a[here].astype(F32, copy=False)
        exact = x.astype(np.float64) @ wide.T
        power[here] += np.square(exact).sum(axis=1)
        for layer, row_errors in zip(layers, errors, strict=True):
            with np.errstate(all="ignore"):
                row_errors[here] += np.square(layer(x) - exact).sum(axis=1)
