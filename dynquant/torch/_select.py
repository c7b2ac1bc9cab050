"""Which linear layers of a model are quantized, and why the others are not."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParameterError, shown
from ._module import QuantLinear, is_conv1d

# Fewer inputs or outputs gain no time.
_LEAST_WIDTH = 32

# As many names as an error lists.
_NAMES_SHOWN = 8

# The patterns excluded by default, which may match nothing.
LM_HEAD = ("*lm_head",)


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
    excluded = _as_patterns(exclude, "exclude", names if exclude is not LM_HEAD else None)
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
                owners.setdefault(identity_of(tensor), []).append((name, module))
    taken = {id(layer.module) for layer in layers if layer.reason is None}
    changed = True
    while changed:
        changed = False
        for layer in layers:
            if layer.reason is not None:
                continue
            for name, module in owners[identity_of(layer.module.weight)]:
                if id(module) not in taken:
                    layer.reason = f"tied to {name or 'the model'}"
                    taken.discard(id(layer.module))
                    changed = True
                    break


def identity_of(tensor: Tensor) -> tuple[Any, ...]:
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
                f"{listed(names)}"
            )
    return patterns


def _matches(layer: Layer, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in layer.names for pattern in patterns)


def listed(items: list[str]) -> str:
    more = len(items) - _NAMES_SHOWN
    return ", ".join(items[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def found_in(model: nn.Module, layers: list[Layer]) -> str:
    if layers:
        return listed([f"{layer.name} ({layer.reason})" for layer in layers])
    quantized = sum(isinstance(module, QuantLinear) for module in model.modules())
    return f"{quantized} that are quantized already" if quantized else f"none in {type(model).__name__}"
