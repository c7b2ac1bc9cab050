"""Choosing how far SmoothQuant moves outliers, by what the layer's output loses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ._batches import ActivationRows, sampled_rows
from ._calibrator import Calibrator
from ._format import DynamicScaleMode, MaxAbs, Percentile
from ._linear import QuantLinear
from ._smooth import (
    SmoothQuantConfig,
    activation_rows,
    as_channels,
    channel_magnitudes,
    factors_of,
    known_magnitudes,
    largest_weights,
)
from ._validate import F32, as_flag, as_thread_count
from ._weights import weight_format
from .errors import DTypeError, EmptyInputError, InvalidAlphaError, NonFiniteError, ParameterError, shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_MAX_ABS = MaxAbs()
_ALPHAS = tuple(i / 20 for i in range(21))

# What is worked on at once: bytes of quantized weights over all candidates, and floats of inputs and outputs.
_LAYER_BYTES = 1 << 24
_ROW_FLOATS = 1 << 19
# Floats of activations that layers are built for; building costs as much as some hundred rows.
_BLOCK_FLOATS = 1 << 22
# Outputs are taken in whole panels of the kernels, which are of 32 at most.
_OUTPUTS = 32


@dataclass(frozen=True, eq=False, repr=False)
class AlphaSearch:
    """What `search_alpha` found.

    Attributes
    ----------
    alpha : float
        The one with the smallest error; the first of equals.
    factors : ndarray of float32, (in_features,)
        The smoothing factors for it.
    errors : tuple of float
        Squared error of the layers' outputs for each of `alphas`, added up over tokens and outputs; with
        `relative` in units of each token's squared output, otherwise in those of the outputs, squared.
    alphas : tuple of float
        In the order given.
    unsmoothed_error : float
        The same error without smoothing.
    """

    alpha: float
    factors: NDArray[np.float32]
    errors: tuple[float, ...]
    alphas: tuple[float, ...]
    unsmoothed_error: float

    def __repr__(self) -> str:
        error = min(self.errors)
        if error > 0 and self.unsmoothed_error > 0:
            gain = 10 * math.log10(self.unsmoothed_error / error)
            change = f"{abs(gain):.1f} dB {'less' if gain >= 0 else 'more'} squared error than unsmoothed"
        else:
            change = f"squared error {error:.3g}, unsmoothed {self.unsmoothed_error:.3g}"
        return f"AlphaSearch(alpha={self.alpha:g}: {change}; {len(self.alphas)} tried)"

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        """Refused: NumPy would make an array of one object, and save it in a file that it does not read."""
        raise DTypeError(
            "expected an array, got AlphaSearch: factors is the array that a layer takes; alpha, alphas and "
            "errors are numbers"
        )


def search_alpha(
    activations: ArrayLike | Iterable[ArrayLike] | Calibrator,
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
    num_threads: int = 1,
) -> AlphaSearch:
    """The migration strength that costs the output of a quantized layer least on calibration data.

    Parameters
    ----------
    activations : array_like of floats, (..., in_features), an iterable of such arrays, or a Calibrator
        What reached the layer on calibration data: the factors come from it, and the error is measured on it.
        Batches are read twice, one at a time, and empty ones are passed over; those of an iterator are kept,
        and so are all for a percentile. Of a Calibrator, made with `rows`, the factors come from all that it
        has seen, and the error is measured on its sample.
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
    num_threads : int
        As in `dynamic_quantize`, except for the float64 product; see the notes.

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
    more; and 8 bytes for each candidate and token. As many batches as make up 16 MiB of float32 are worked on
    together. The float64 product is NumPy's, on as many threads as NumPy is set to.

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
    threads = as_thread_count(num_threads)
    configs = _configs(alphas, epsilon)
    if isinstance(activations, Calibrator):
        as_channels(activations, "activations")
        rows, matrices = activation_rows(sampled_rows(activations, "activations"), weights, once=False)
        act_amax = known_magnitudes(activations, mode)
    else:
        rows, matrices = activation_rows(activations, weights, once=False)
        if isinstance(mode, Percentile):
            rows = rows.joined()
        act_amax = channel_magnitudes(rows, mode, threads)
    weight_amax = largest_weights(matrices, threads)
    candidates = [factors_of(act_amax, weight_amax, config) for config in configs]
    build = functools.partial(
        QuantLinear.from_float,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        hadamard=hadamard,
        num_threads=threads,
    )
    total = np.zeros(1 + len(candidates))
    for block in _blocks(rows):
        total += _output_errors(block, matrices, [None, *candidates], build, relative, threads)
    if not np.isfinite(total).all():
        raise ParameterError("activations: expected outputs within float32, got inf")
    unsmoothed, *errors = total.tolist()
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


def _blocks(rows: ActivationRows) -> Iterator[NDArray[Any]]:
    """The rows in matrices, large enough to build layers for: small batches are put together."""
    gathered: list[NDArray[Any]] = []
    for matrix in rows:
        if matrix.size >= _BLOCK_FLOATS:
            yield matrix
            continue
        # Copies: the memory of a batch may be used again for the next.
        gathered.append(matrix.astype(F32))
        if sum(part.size for part in gathered) >= _BLOCK_FLOATS:
            yield np.concatenate(gathered)
            gathered = []
    if gathered:
        yield np.concatenate(gathered)


def _output_errors(
    a: NDArray[Any],
    weights: dict[str, NDArray[Any]],
    candidates: list[NDArray[np.float32] | None],
    build: Callable[..., QuantLinear],
    relative: bool,
    threads: int,
) -> NDArray[np.float64]:
    """Squared error of the outputs over all weights and rows, for each candidate's factors."""
    total = np.zeros(len(candidates))
    for name, w in weights.items():
        try:
            errors, power = _row_errors(a, w, candidates, build, threads)
        except NonFiniteError as error:
            argument = "activations" if error.argument.startswith("x") else name
            raise ParameterError(f"{argument}: expected {error.argument} within float32, got inf") from error
        except ParameterError as error:
            raise ParameterError(
                f"{name}: expected rows of weights and activations within float32 when rotated ({error})"
            ) from error
        if relative:
            # Against no output there is no relative error: such rows do not count.
            errors = np.divide(errors, power, out=np.zeros_like(errors), where=power > 0)
        total += errors.sum(axis=1)
    return total


def _row_errors(
    a: NDArray[Any],
    w: NDArray[Any],
    candidates: list[NDArray[np.float32] | None],
    build: Callable[..., QuantLinear],
    threads: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Squared error (candidates, tokens) and squared output (tokens,) of every row."""
    errors, power = np.zeros((len(candidates), len(a))), np.zeros(len(a))
    outputs = max(1, _LAYER_BYTES // (len(candidates) * a.shape[1] * _OUTPUTS)) * _OUTPUTS
    for first in range(0, len(w), outputs):
        part = w[first : first + outputs].astype(F32, copy=False)
        layers = [build(part, smooth=factors) for factors in candidates]
        _add_row_errors(a, part, layers, errors, power, threads)
    return errors, power


def _add_row_errors(
    a: NDArray[Any],
    w: NDArray[np.float32],
    layers: list[QuantLinear],
    errors: NDArray[np.float64],
    power: NDArray[np.float64],
    threads: int,
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
                # Without astype NumPy would convert in a buffer, and crash where there is no memory for it.
                y = layer(x, num_threads=threads).astype(np.float64)
                row_errors[here] += np.square(y - exact).sum(axis=1)
