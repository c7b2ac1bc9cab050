"""What `quantize` makes of what `observe` has seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .._alpha_search import search_alpha
from .._batches import row_batches
from .._calibrator import Calibrator
from .._smooth import SmoothQuantConfig, compute_smooth_factors
from .._validate import F32
from ..errors import FeatureDimMismatchError, ParameterError, shown
from ._module import float_arrays
from ._select import Layer

if TYPE_CHECKING:
    from numpy.typing import NDArray


def as_calibration(value: Any, layers: list[Layer], smooth: Any) -> dict[str, Any]:
    """`value` with its rows as float32 matrices; empty for None. One object stays one."""
    if smooth is not None:
        _check_smooth(smooth, value)
    if value is None:
        return {}
    try:
        given = dict(value)
    except (TypeError, ValueError) as error:
        message = f"calibration: expected what dynquant.torch.observe gives, got {shown(value)}"
        raise ParameterError(message) from error
    inputs = {name: _in_features(layer) for layer in layers for name in layer.names}
    unknown = [name for name in given if name not in inputs]
    if unknown or not given:
        got = f"{shown(unknown[0])}" if unknown else "none; was the model called?"
        raise ParameterError(f"calibration: expected names of linear layers of the model, got {got}")
    checked: dict[int, Any] = {}
    for name, kept in given.items():
        if id(kept) not in checked:
            checked[id(kept)] = _checked(kept, name, inputs[name], smooth)
    return {name: checked[id(kept)] for name, kept in given.items()}


def _check_smooth(smooth: Any, calibration: Any) -> None:
    if isinstance(smooth, str):
        if smooth != "search":
            raise ParameterError(f'smooth: expected a number in [0, 1] or "search", got {shown(smooth)}')
    else:
        SmoothQuantConfig(smooth)
    if calibration is None:
        raise ParameterError("smooth: expected None without calibration, which its factors come from")


def _checked(kept: Any, name: str, k: int, smooth: Any) -> Any:
    """One value of a calibration: a Calibrator of k channels that has seen something, or a matrix of rows."""
    label = f"calibration[{name!r}]"
    if not isinstance(kept, Calibrator):
        rows = kept.detach().float().numpy() if isinstance(kept, Tensor) else kept
        parts = [batch.astype(F32, copy=False) for batch in row_batches(rows, label, k)]
        if not parts:
            raise ParameterError(f"{label}: expected at least one row, got none")
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
    if kept.channels != k:
        raise FeatureDimMismatchError(k, kept.channels or 0, f"{label}.channels")
    if kept.count == 0:
        raise ParameterError(f"{label}: expected a Calibrator that has seen something, got an empty one")
    if smooth is None or smooth == "search":
        raise ParameterError(f"{label}: expected rows, as from observe(model), got statistics alone")
    return kept


def _in_features(layer: Layer) -> int:
    return int(getattr(layer.module, "in_features", 0) or layer.module.weight.shape[0])


def smooth_factors(
    layers: list[Layer], seen: dict[str, Any], smooth: Any, options: dict[str, Any]
) -> dict[str, NDArray[np.float32]]:
    """The factors of each layer, by its name: the same for layers that share what they have seen."""
    if smooth is None:
        return {}
    groups: dict[int, list[Layer]] = {}
    for layer in layers:
        if layer.name in seen:
            groups.setdefault(id(seen[layer.name]), []).append(layer)
    factors = {}
    for group in groups.values():
        kept = seen[group[0].name]
        weights = [float_arrays(layer.module, layer.name)[0] for layer in group]
        found = _factors_of(kept, weights, smooth, options)
        factors.update({layer.name: found for layer in group})
    return factors


def _factors_of(
    kept: Any, weights: list[NDArray[Any]], smooth: Any, options: dict[str, Any]
) -> NDArray[np.float32]:
    if smooth == "search":
        recipe = {name: options[name] for name in ("bits", "group_size", "symmetric", "hadamard")}
        return search_alpha(kept, weights, relative=True, **recipe).factors
    magnitudes = kept.channel_amax() if isinstance(kept, Calibrator) else kept
    return compute_smooth_factors(magnitudes, weights, SmoothQuantConfig(smooth))
