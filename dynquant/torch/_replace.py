"""Replacing the linear layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from .._calibrator import Calibrator
from .._linear import as_activations
from .._metrics import error_metrics
from .._validate import as_flag, as_thread_count
from .._weights import weight_format
from ..errors import ParameterError
from ._calibration import as_calibration, smooth_factors
from ._module import QuantLinear, float_arrays, is_conv1d, prepared
from ._select import LM_HEAD, Layer, found_in, identity_of, select_layers
from ._summary import forget_skipped, note_skipped

if TYPE_CHECKING:
    from numpy.typing import NDArray

Model = TypeVar("Model", bound=nn.Module)

_MAX_RANGE = float(np.finfo(np.float32).max)

# Calibration rows that the output error is measured on.
_SQNR_ROWS = 256


def quantize(
    model: Model,
    *,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool | None = None,
    hadamard: bool = False,
    activation_symmetric: bool = True,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = LM_HEAD,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    calibration: Mapping[str, Any] | None = None,
    smooth: float | str | None = None,
    num_threads: int | None = None,
) -> Model:
    """Quantize the linear layers of a model, in place.

    Parameters
    ----------
    model : nn.Module
        On the CPU. Its `nn.Linear` and transformers' `Conv1D` modules are replaced by `QuantLinear`.
    bits, group_size, symmetric, hadamard, activation_symmetric
        How, as in `dynquant.QuantLinear.from_float`.
    include, exclude : str or iterable of str, optional
        Patterns of qualified names, as in `fnmatch`, where ``*`` matches dots too: ``"encoder.layer.0.*"``.
        Layers are taken that match one of `include`, by default all, and none of `exclude`.
    filter_fn : callable, optional
        ``filter_fn(module, name)`` has the last word on each layer that would be taken.
    calibration : mapping of str to ndarray or Calibrator, optional
        What reached the layers, by their names, as `observe` gives it. From rows, codes of 4 bits are chosen
        so that their errors cancel in the output, and `summary` shows the output SQNR on them. Layers that
        it does not name are quantized without.
    smooth : float or "search", optional
        SmoothQuant: a migration strength in [0, 1], or the one that costs the outputs least on the rows of
        each input. Layers with one calibration object together get the same factors. Needs `calibration`.
    num_threads : int, optional
        The most threads that a call of a layer uses; by default ``torch.get_num_threads()``, asked for in
        each call. Results do not depend on it.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ParameterError
        If an option has a value that it cannot take, a pattern matches no linear layer, there is no layer to
        quantize, one is on another device than the CPU, or `calibration` is not for this model.
    NonFiniteError
        If a weight is NaN or infinite; ``argument`` has its qualified name.
    DynQuantError
        If rows of `calibration` are not as `observe` gives them.

    Notes
    -----
    Arguments and all weights are checked before the first layer is replaced, so that a call that raises
    leaves the model as it was. Then one layer after the other is quantized and its float weights let go.

    These are left as they are; `summary` lists them with the reason: layers excluded; layers whose weight is
    also that of an embedding or of another module that stays; parametrized ones and subclasses of
    `nn.Linear`, which may compute something else; layers with fewer than 32 inputs or outputs, which gain
    nothing; and those that their parent reads by ``.weight`` instead of calling them, such as the ones of
    `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`. Two layers with one weight get one quantized
    weight. Hooks move to the new module.
    """
    fmt, symmetric = weight_format(bits, group_size, symmetric)
    as_activations(8, activation_symmetric, fmt.bits)
    options: dict[str, Any] = {
        "bits": fmt.bits,
        "group_size": fmt.group_size,
        "symmetric": symmetric,
        "hadamard": as_flag(hadamard, "hadamard"),
        "activation_symmetric": activation_symmetric,
        "num_threads": None if num_threads is None else as_thread_count(num_threads),
    }
    layers = select_layers(model, include, exclude, filter_fn)
    chosen = [layer for layer in layers if layer.reason is None]
    if not chosen:
        raise ParameterError(f"model: expected a linear layer to quantize, got {found_in(model, layers)}")
    seen = as_calibration(calibration, layers, smooth)
    for layer in chosen:
        _check(layer, options["hadamard"], None)
    factors = smooth_factors(chosen, seen, smooth, options)
    for layer in chosen:
        if layer.name in factors:
            _check(layer, options["hadamard"], factors[layer.name])
    quantized: dict[Any, QuantLinear] = {}
    for layer in chosen:
        rows = seen.get(layer.name)
        rows = None if isinstance(rows, Calibrator) else rows
        _replace(layer, {**options, "smooth": factors.get(layer.name)}, rows, quantized)
    forget_skipped(model, [name for layer in chosen for name in layer.names])
    note_skipped(model, {layer.name: layer.reason for layer in layers if layer.reason is not None})
    return model


def _check(layer: Layer, hadamard: bool, factors: NDArray[np.float32] | None) -> None:
    """Raise for what would stop the layer from being quantized."""
    w, _, _ = prepared(layer.module, layer.name, factors, hadamard)
    if not float(w.max()) - float(w.min()) <= _MAX_RANGE:
        raise ParameterError(f"{layer.name}.weight: expected a range within float32, got one beyond it")


def _replace(
    layer: Layer, options: dict[str, Any], rows: NDArray[np.float32] | None, quantized: dict[Any, QuantLinear]
) -> None:
    """Put a QuantLinear in each place of the layer; `quantized` has those made so far, by their weight."""
    old = layer.module
    key = (*identity_of(old.weight), old.weight.shape, is_conv1d(old))
    if key in quantized:
        new = quantized[key].tied(old, layer.name)
    else:
        compensated = rows if options["bits"] == 4 else None
        new = QuantLinear.from_float(old, name=layer.name, calibration=compensated, **options)
        quantized[key] = new
    new.sqnr_db = None if rows is None else _output_sqnr(old, new, rows[:_SQNR_ROWS])
    for hooks in _HOOKS:
        if hasattr(old, hooks):
            setattr(new, hooks, getattr(old, hooks))
    for parent, attribute in layer.places:
        parent._modules[attribute] = new


def _output_sqnr(old: nn.Module, new: QuantLinear, rows: NDArray[np.float32]) -> float:
    w, bias = float_arrays(old, "linear")
    y = rows @ w.astype(np.float32, copy=False).T
    if bias is not None:
        y += bias
    with torch.no_grad():
        quantized = new(torch.from_numpy(rows)).numpy()
    return float(error_metrics(y, quantized).sqnr_db)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",  # which kind those are
)
