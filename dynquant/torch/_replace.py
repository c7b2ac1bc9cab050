"""Replacing the linear layers of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .._linear import as_activations
from .._validate import as_flag, as_thread_count
from .._weights import weight_format
from ..errors import ParameterError, shown
from ._module import QuantLinear, is_conv1d, prepared
from ._summary import forget_skipped, note_skipped

Model = TypeVar("Model", bound=nn.Module)

# Fewer inputs or outputs gain no time.
_LEAST_WIDTH = 32

_MAX_RANGE = float(np.finfo(np.float32).max)

# As many names as an error lists.
_NAMES_SHOWN = 8

_LM_HEAD = ("*lm_head",)


@dataclass
class Layer:
    """A linear layer of a model: where it is, and why it is left as it is, if it is.

    `places` are the modules that hold it, each with the name that it has there; `names` the qualified ones.
    """

    module: nn.Module
    places: list[tuple[nn.Module, str]]
    names: list[str]
    reason: str | None = None

    @property
    def name(self) -> str:
        return self.names[0]


def quantize(
    model: Model,
    *,
    bits: int = 8,
    group_size: int | None = None,
    hadamard: bool = False,
    activation_symmetric: bool = True,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = _LM_HEAD,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    num_threads: int | None = None,
) -> Model:
    """Quantize the linear layers of a model, in place.

    Parameters
    ----------
    model : nn.Module
        On the CPU. Its `nn.Linear` and transformers' `Conv1D` modules are replaced by `QuantLinear`.
    bits, group_size, hadamard, activation_symmetric
        How, as in `dynquant.QuantLinear.from_float`.
    include, exclude : str or iterable of str, optional
        Patterns of qualified names, as in `fnmatch`, where ``*`` matches dots too: ``"encoder.layer.0.*"``.
        Layers are taken that match one of `include`, by default all, and none of `exclude`.
    filter_fn : callable, optional
        ``filter_fn(module, name)`` has the last word on each layer that would be taken.
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
        quantize, or one is on another device than the CPU.
    NonFiniteError
        If a weight is NaN or infinite; ``argument`` has its qualified name.

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
    fmt, _ = weight_format(bits, group_size, None)
    as_activations(8, activation_symmetric, fmt.bits)
    options: dict[str, Any] = {
        "bits": fmt.bits,
        "group_size": fmt.group_size,
        "hadamard": as_flag(hadamard, "hadamard"),
        "activation_symmetric": activation_symmetric,
        "num_threads": None if num_threads is None else as_thread_count(num_threads),
    }
    layers = select_layers(model, include, exclude, filter_fn)
    chosen = [layer for layer in layers if layer.reason is None]
    if not chosen:
        raise ParameterError(f"model: expected a linear layer to quantize, got {_found(model, layers)}")
    for layer in chosen:
        _check(layer, options["hadamard"])
    quantized: dict[Any, QuantLinear] = {}
    for layer in chosen:
        _replace(layer, options, quantized)
    forget_skipped(model, [name for layer in chosen for name in layer.names])
    note_skipped(model, {layer.name: layer.reason for layer in layers if layer.reason is not None})
    return model


def _check(layer: Layer, hadamard: bool) -> None:
    """Raise for what would stop the layer from being quantized."""
    w, _, _ = prepared(layer.module, layer.name, None, hadamard)
    if not float(w.max()) - float(w.min()) <= _MAX_RANGE:
        raise ParameterError(f"{layer.name}.weight: expected a range within float32, got one beyond it")


def _replace(layer: Layer, options: dict[str, Any], quantized: dict[Any, QuantLinear]) -> None:
    """Put a QuantLinear in each place of the layer; `quantized` has those made so far, by their weight."""
    old = layer.module
    key = (*_identity(old.weight), old.weight.shape, is_conv1d(old))
    if key in quantized:
        new = quantized[key].tied(old, layer.name)
    else:
        new = quantized[key] = QuantLinear.from_float(old, name=layer.name, **options)
    for hooks in _HOOKS:
        if hasattr(old, hooks):
            setattr(new, hooks, getattr(old, hooks))
    for parent, attribute in layer.places:
        parent._modules[attribute] = new


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def select_layers(
    model: Any,
    include: Any = None,
    exclude: Any = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> list[Layer]:
    """The linear layers of a model, in its order, with the reason where one is to stay as it is."""
    if not isinstance(model, nn.Module):
        raise ParameterError(f"model: expected an nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise ParameterError(f"filter_fn: expected a callable, got {shown(filter_fn)}")
    layers = _linear_layers(model)
    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    names = [name for layer in layers for name in layer.names] + quantized
    included = _as_patterns(include, "include", names)
    excluded = _as_patterns(exclude, "exclude", names if exclude is not _LM_HEAD else None)
    for layer in layers:
        if layer.reason is None:
            layer.reason = _reason(layer)
        if included is not None and not _matches(layer, included):
            layer.reason = "not included"
        elif excluded is not None and _matches(layer, excluded):
            layer.reason = "excluded"
        elif layer.reason is None and filter_fn is not None and not filter_fn(layer.module, layer.name):
            layer.reason = "excluded by filter_fn"
    _skip_tied(model, layers)
    return layers


def _linear_layers(model: nn.Module) -> list[Layer]:
    """Every module of a model that is an nn.Linear, or one of its subclasses, or a Conv1D."""
    layers: dict[int, Layer] = {}
    if _is_linear(model):
        raise ParameterError(
            f"model: expected a module that contains linear layers, got a {type(model).__name__} itself; "
            "dynquant.torch.QuantLinear.from_float quantizes one layer"
        )
    for name, parent in model.named_modules():
        for attribute, module in parent._modules.items():
            if module is None or not _is_linear(module):
                continue
            layer = layers.setdefault(id(module), Layer(module, [], []))
            layer.places.append((parent, attribute))
            layer.names.append(f"{name}.{attribute}" if name else attribute)
            if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
                layer.reason = f"{type(parent).__name__} reads its weight"
    return [layers[id(module)] for module in model.modules() if id(module) in layers]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _reason(layer: Layer) -> str | None:
    """Why a layer by itself cannot be replaced, or should not be."""
    module = layer.module
    if hasattr(module, "parametrizations"):
        return "parametrized"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"a subclass of nn.Linear: {type(module).__name__}"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    if not weight.is_floating_point() or weight.element_size() == 1:
        return f"its weight is of {weight.dtype}"
    if "forward" in vars(module):
        return "its forward was replaced"
    if min(weight.shape) < _LEAST_WIDTH:
        return f"too small to gain: {weight.shape[0]} x {weight.shape[1]}"
    return None


def _skip_tied(model: nn.Module, layers: list[Layer]) -> None:
    """Leave layers whose weight is also that of a module that stays."""
    owners: dict[Any, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for tensor in module._parameters.values():
            if tensor is not None:
                owners.setdefault(_identity(tensor), []).append((name, module))
    taken = {id(layer.module) for layer in layers if layer.reason is None}
    changed = True
    while changed:
        changed = False
        for layer in layers:
            if layer.reason is not None:
                continue
            for name, module in owners[_identity(layer.module.weight)]:
                if id(module) not in taken:
                    layer.reason = f"tied to {name or 'the model'}"
                    taken.discard(id(layer.module))
                    changed = True
                    break


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors of the same memory."""
    if tensor.device.type == "meta" or tensor.numel() == 0 or tensor.layout is not torch.strided:
        return (id(tensor),)
    try:
        return tensor.data_ptr(), tensor.device
    except RuntimeError:  # no memory of its own, as in some subclasses
        return (id(tensor),)


def _as_patterns(value: Any, name: str, names: list[str] | None) -> list[str] | None:
    """`value` as a list of patterns, each of which matches one of `names`, unless that is None."""
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    try:
        patterns = list(patterns)
    except TypeError as error:
        raise ParameterError(f"{name}: expected patterns of names, got {shown(value)}") from error
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ParameterError(f"{name}: expected patterns of names, got {shown(pattern)}")
        if names is not None and not fnmatch.filter(names, pattern):
            raise ParameterError(
                f"{name}: expected patterns that match a linear layer, got {pattern!r}; the layers are "
                f"{_listed(names)}"
            )
    return patterns


def _matches(layer: Layer, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in layer.names for pattern in patterns)


def _listed(items: list[str]) -> str:
    more = len(items) - _NAMES_SHOWN
    return ", ".join(items[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _found(model: nn.Module, layers: list[Layer]) -> str:
    if layers:
        return _listed([f"{layer.name} ({layer.reason})" for layer in layers])
    quantized = sum(isinstance(module, QuantLinear) for module in model.modules())
    return f"{quantized} that are quantized already" if quantized else f"none in {type(model).__name__}"
