"""Checkpoints of quantized models, in the formats of compressed-tensors where those can hold them."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._files import write_json
from .._tensor import DynQuantTensor
from .._validate import as_path
from ..errors import DynQuantError, ParameterError, shown
from ._module import QuantLinear, is_conv1d
from ._ops import TENSORS
from ._select import listed

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_SECTION = "quantization_config"

# Methods of quantization, as config.json names them; the second one is that of the plug-in for transformers.
_STANDARD, _OWN = "compressed-tensors", "dynquant"

_LAYOUT = "compressed-tensors"

# The zero point that symmetric codes of 4 bits have there.
_MIDDLE = 8
_COMPRESSED = {
    8: ("weight", "weight_scale", "weight_zero_point", "weight_g_idx"),
    4: ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
}


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a quantized model as a checkpoint: ``model.safetensors`` and ``config.json``.

    Parameters
    ----------
    model : nn.Module
        As from `quantize`.
    folder : str or os.PathLike
        Made if it is not there. The two files are replaced, each when the new one is complete.

    Raises
    ------
    ParameterError
        If the model has no quantized layer or no data, its state is not of tensors alone, or `folder` is no
        path.
    ImportError
        Without safetensors.
    OSError
        If the files cannot be written.

    Notes
    -----
    Models that are neither smoothed nor rotated are written in the format of compressed-tensors,
    ``int-quantized`` for 8 bits and ``pack-quantized`` for 4, which the libraries compressed-tensors and
    transformers, and other engines, read with the same dequantized values. 8-bit activations are part of the
    first format; 4-bit weights are declared as weights alone. Releases of compressed-tensors up to 0.20 read
    4-bit weights within transformers only if they are symmetric; by themselves they read all.

    Others, and models with a Conv1D or with groups that do not divide in_features, are the state of the
    modules as it is, for `load_into` alone. Readers of compressed-tensors refuse them: ``config.json`` has a
    key that they do not know and that says why.

    ``config.json`` begins with the model's own configuration, where it has one as those of transformers do.
    Tensors that several names share are written once.
    """
    path = as_path(folder)
    layers = _quantized(model)
    if not layers:
        raise ParameterError("model: expected one with quantized layers, as from quantize, got none")
    tensors, config = _content(model, layers)
    os.makedirs(path, exist_ok=True)
    _write_tensors(os.path.join(path, _WEIGHTS), tensors)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(path, _INDEX))  # of a checkpoint in parts that was here
    write_json(os.path.join(path, _CONFIG), config)


def load_into(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint of quantized weights into a float model of the same architecture.

    Parameters
    ----------
    model : nn.Module
        Its linear layers are replaced by the quantized ones of the checkpoint, in place, and its other
        tensors filled. Parameters may be on the device ``meta``.
    folder : str or os.PathLike
        As `save` or a tool of compressed-tensors wrote it: one file, or several with an index.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ParameterError
        If the checkpoint lacks a tensor of the model, has one that the model lacks, or one of another shape;
        if it is damaged, or quantized in a way that is not known here. The model is as it was.
    ImportError
        Without safetensors.
    OSError
        If a file cannot be read.

    Notes
    -----
    Quantized weights are mapped from the file, not copied, and never made floats. Do not change the files
    while the model lives; `save` replaces them by new ones, which is safe.
    """
    path = as_path(folder)
    if not isinstance(model, nn.Module):
        raise ParameterError(f"model: expected an nn.Module, got {type(model).__name__}")
    section = _read_section(path)
    tensors = _read_tensors(path)
    build = _builder_of(section)
    layers, used = build(model, section, tensors)
    for name, layer in layers.items():
        _check_fits(model, name, layer)
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    assignments = _assignments(model, layers, rest)
    for name, layer in layers.items():
        parent, attribute = place_of(model, name)
        layer.train(parent._modules[attribute].training)
        parent._modules[attribute] = layer
    for assign in assignments:
        assign()
    return model


def _quantized(model: Any) -> dict[str, QuantLinear]:
    if not isinstance(model, nn.Module):
        raise ParameterError(f"model: expected an nn.Module, got {type(model).__name__}")
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, QuantLinear)}


# ---- Writing ----


def _content(model: nn.Module, layers: dict[str, QuantLinear]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What goes into the two files."""
    standard = all(map(_is_standard, layers.values())) and not any(map(is_conv1d, model.modules()))
    tensors, seen = {}, set()
    own = {f"{name}.{key}" for name in layers for key in TENSORS}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ParameterError(f"model: expected a state of tensors, got {shown(tensor)} in {name}")
        if tensor.is_meta:
            raise ParameterError(f"model: expected data in {name}, got a tensor on meta")
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        if name in own and standard:
            continue
        if identity not in seen or name in own:
            tensors[name] = tensor.detach().contiguous()
        seen.add(identity)
    if standard:
        for name, layer in layers.items():
            arrays = layer.codes().to_layout(_LAYOUT)
            tensors.update({f"{name}.{key}": torch.from_numpy(array) for key, array in arrays.items()})
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias
    config = _config_of(model)
    config[_SECTION] = _standard_section(model, layers) if standard else _refused_section(layers)
    return tensors, config


def _is_standard(layer: QuantLinear) -> bool:
    """Whether the formats of compressed-tensors can hold a layer."""
    return layer.smooth is None and layer.signs is None and layer.in_features % (layer.group_size or 1) == 0


def options_of(layers: dict[str, QuantLinear]) -> dict[str, Any]:
    """What config.json has about layers whose state is written as it is."""
    return {name: layer.options() for name, layer in layers.items()}


def _refused_section(layers: dict[str, QuantLinear]) -> dict[str, Any]:
    """The same for readers of compressed-tensors, which take no keys that they do not know.

    A method of another name would not do: transformers warns of it and goes on, with codes for weights.
    """
    group = {"targets": ["Linear"], "dynquant": "smoothed or rotated"}
    return {"quant_method": _STANDARD, "config_groups": {"group_0": group}, "layers": options_of(layers)}


def _standard_section(model: nn.Module, layers: dict[str, QuantLinear]) -> dict[str, Any]:
    """What config.json has about layers in the formats of compressed-tensors."""
    recipes: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in layers.items():
        zero_point = layer.weight_zero_point
        symmetric = zero_point is None or bool((zero_point == _MIDDLE).all())
        recipe = layer.bits, layer.group_size, symmetric, layer.activation_symmetric
        recipes.setdefault(recipe, []).append(name)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups = {
        f"group_{i}": _group(recipe, ["Linear"] if len(recipes) == 1 else names)
        for i, (recipe, names) in enumerate(recipes.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": _STANDARD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": left,
        "config_groups": groups,
    }


def _group(recipe: tuple[Any, ...], targets: list[str]) -> dict[str, Any]:
    bits, group_size, symmetric, activation_symmetric = recipe
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }
    activations = {
        "num_bits": 8,
        "type": "int",
        "symmetric": activation_symmetric,
        "strategy": "token",
        "dynamic": True,
    }
    return {
        "targets": targets,
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "weights": weights,
        "input_activations": activations if bits == 8 else None,
        "output_activations": None,
    }


def _config_of(model: nn.Module) -> dict[str, Any]:
    """The model's own configuration, as a class of transformers has it."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return {}
    text = config.to_json_string(use_diff=False)
    return {key: value for key, value in json.loads(text).items() if key != _SECTION}


def _write_tensors(path: str, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    partial = f"{path}.{os.urandom(8).hex()}.partial"
    try:
        # Copies of what would be written twice from one memory, which the library refuses.
        save_file(_apart(tensors), partial, metadata={"format": "pt"})
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result


# ---- Reading ----

_Layers = dict[str, QuantLinear]
_Builder = Callable[[nn.Module, dict[str, Any], dict[str, Tensor]], tuple[_Layers, set[str]]]


def _read_section(path: str) -> dict[str, Any]:
    """What config.json says about quantization."""
    file = os.path.join(path, _CONFIG)
    config = _read_json(file)
    section = config.get(_SECTION) or config.get("compression_config")
    if not isinstance(section, dict):
        raise ParameterError(f"folder: expected a {_SECTION} in {file}, got none")
    return section


def _read_json(file: str) -> dict[str, Any]:
    with open(file, encoding="utf-8") as stream:
        try:
            content = json.load(stream)
        except (ValueError, RecursionError) as error:
            raise ParameterError(f"folder: expected JSON in {file}, got other text ({error})") from error
    if not isinstance(content, dict):
        raise ParameterError(f"folder: expected an object in {file}, got {type(content).__name__}")
    return content


def _read_tensors(path: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, mapped from its files."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ParameterError(f"folder: expected a safetensors file in {file} ({error})") from error
    return tensors


def _weight_files(path: str) -> list[str]:
    index = os.path.join(path, _INDEX)
    if not os.path.exists(index):
        return [os.path.join(path, _WEIGHTS)]
    parts = _read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise ParameterError(f"folder: expected a weight_map in {index}, got none")
    names = sorted(set(parts.values()))
    for name in names:
        if os.path.basename(name) != name:
            raise ParameterError(f"folder: expected names of files in {index}, got {shown(name)}")
    return [os.path.join(path, name) for name in names]


def _builder_of(section: dict[str, Any]) -> _Builder:
    method = section.get("quant_method")
    if method in (_STANDARD, _OWN):
        return _standard_layers if method == _STANDARD and "layers" not in section else _own_layers
    raise ParameterError(
        f"folder: expected the quantization method {_STANDARD} or {_OWN}, got {shown(method)}"
    )


def _standard_layers(
    model: nn.Module, section: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[_Layers, set[str]]:
    """Layers in the formats of compressed-tensors, and the names of their tensors."""
    layers: _Layers = {}
    used: set[str] = set()
    for scale in [name for name in tensors if name.endswith(".weight_scale")]:
        name = scale.removesuffix(".weight_scale")
        place_of(model, name)
        bits = 4 if f"{name}.weight_packed" in tensors else 8
        keys = [key for key in _COMPRESSED[bits] if f"{name}.{key}" in tensors]
        try:
            arrays = {key: _array(tensors[f"{name}.{key}"]) for key in keys}
            codes = DynQuantTensor.from_layout(_LAYOUT, arrays)
            bias = tensors.get(f"{name}.bias")
            symmetric = codes.format.bits == 4 or _has_symmetric_activations(section, name)
            layers[name] = QuantLinear.of_codes(codes, None if bias is None else bias.float(), symmetric)
        except DynQuantError as error:
            raise ParameterError(
                f"folder: expected the tensors of a quantized layer in {name}: {error}"
            ) from error
        used.update(f"{name}.{key}" for key in (*keys, "bias"))
    if not layers:
        raise ParameterError("folder: expected quantized layers in the checkpoint, got none")
    return layers, used


def _array(tensor: Tensor) -> Any:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _has_symmetric_activations(section: dict[str, Any], name: str) -> bool:
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        try:
            if any(_is_target(target, name) for target in group.get("targets", ())):
                return bool((group.get("input_activations") or {}).get("symmetric", True))
        except (AttributeError, TypeError, re.error) as error:
            raise ParameterError(
                f"folder: expected groups with targets and activations in config_groups, got {shown(group)}"
            ) from error
    return True


def _is_target(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == "Linear" or fnmatch.fnmatchcase(name, target)


def _own_layers(
    model: nn.Module, section: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[_Layers, set[str]]:
    """Layers whose state is in the file as it is, and the names of their tensors."""
    described = section.get("layers")
    if not isinstance(described, dict) or not described:
        raise ParameterError("folder: expected layers in the quantization_config, got none")
    layers: _Layers = {}
    used: set[str] = set()
    for name, options in described.items():
        layer = made_of_options(model, name, options)
        state = {key: tensors[f"{name}.{key}"] for key in TENSORS if f"{name}.{key}" in tensors}
        _check_state(layer, name, state)
        layer.load_state_dict(state, assign=True)
        try:
            layer.check_values()
        except DynQuantError as error:
            raise ParameterError(
                f"folder: expected values of a quantized layer in {name}: {error}"
            ) from error
        layers[name] = layer
        used.update(f"{name}.{key}" for key in state)
    return layers, used


def made_of_options(model: nn.Module, name: str, options: Any) -> QuantLinear:
    """A layer for the place `name` of a model, by what config.json says; its weights are all zero."""
    place_of(model, name)
    expected = _shape_of(model.get_submodule(name))
    # Before memory is taken for a layer of any size.
    got = tuple(map(options.get, ("out_features", "in_features"))) if isinstance(options, dict) else None
    if got != expected:
        raise ParameterError(
            f"folder: expected (out_features, in_features) {expected} in {name}, got {shown(got)}"
        )
    try:
        return QuantLinear(**options)
    except (TypeError, DynQuantError) as error:
        raise ParameterError(f"folder: expected options of a layer in {name}: {error}") from error


def _check_state(layer: QuantLinear, name: str, state: dict[str, Tensor]) -> None:
    for key, tensor in layer.state_dict().items():
        found = state.get(key)
        if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            expected = f"{tensor.dtype} {tuple(tensor.shape)}"
            got = "none" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise ParameterError(f"folder: expected {expected} as {name}.{key}, got {got}")
    unknown = set(state) - set(layer.state_dict())
    if unknown:
        raise ParameterError(f"folder: expected no {name}.{unknown.pop()}, got one")


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Where the linear layer `name` of a model is."""
    parent_name, _, attribute = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        module = parent.get_submodule(attribute)
    except AttributeError as error:
        raise ParameterError(f"folder: expected layers of the model, got {shown(name)}") from error
    if not (isinstance(module, (nn.Linear, QuantLinear)) or is_conv1d(module)):
        raise ParameterError(
            f"folder: expected a linear layer as {name}, the model has {type(module).__name__}"
        )
    return parent, attribute


def _check_fits(model: nn.Module, name: str, layer: QuantLinear) -> None:
    """Raise unless a layer has the shape of the one that it replaces, and a bias where that has one."""
    old = model.get_submodule(name)
    expected, got = (*_shape_of(old), old.bias is not None), (*_shape_of(layer), layer.bias is not None)
    if expected != got:
        raise ParameterError(
            f"folder: expected (out_features, in_features, has a bias) {expected} in {name}, got {got}"
        )


def _shape_of(layer: nn.Module) -> tuple[int, ...]:
    """(out_features, in_features) of a linear layer."""
    if isinstance(layer, QuantLinear):
        return layer.out_features, layer.in_features
    weight = layer.get_parameter("weight")
    return tuple(weight.shape[::-1] if is_conv1d(layer) else weight.shape)


def _assignments(model: nn.Module, layers: _Layers, rest: dict[str, Tensor]) -> list[Callable[[], Any]]:
    """What fills in the tensors of a model besides the quantized layers; all of it can be done."""
    prefixes = tuple(f"{name}." for name in layers)
    own = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not name.startswith(prefixes)
    }
    # One of several names of a tensor is enough.
    given = {id(own[name]) for name in rest if name in own}
    missing = [name for name, tensor in own.items() if name not in rest and id(tensor) not in given]
    unknown = [name for name in rest if name not in own]
    if missing or unknown:
        raise ParameterError(
            f"folder: expected the tensors of {type(model).__name__}, missing {listed(missing) or 'none'}, "
            f"unknown {listed(unknown) or 'none'}"
        )
    for name, tensor in rest.items():
        if tensor.shape != own[name].shape:
            expected, got = tuple(own[name].shape), tuple(tensor.shape)
            raise ParameterError(f"folder: expected shape {expected} as {name}, got {got}")
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise ParameterError(f"folder: expected {own[name].dtype} as {name}, got {tensor.dtype}")
    persistent = {id(tensor) for tensor in own.values()}
    for name, buffer in model.named_buffers():
        if buffer.is_meta and id(buffer) not in persistent and not name.startswith(prefixes):
            raise ParameterError(f"model: expected data in {name}, which is in no checkpoint, got it on meta")
    return [_filling(model, name, own[name], tensor) for name, tensor in rest.items()]


def _filling(model: nn.Module, name: str, old: Tensor, new: Tensor) -> Callable[[], Any]:
    if not old.is_meta:

        def fill() -> None:
            with torch.no_grad():
                old.copy_(new)

        return fill
    places = [
        (key, tensors)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for key, tensor in tensors.items()
        if tensor is old
    ]
    value = nn.Parameter(new.to(old.dtype), old.requires_grad) if isinstance(old, nn.Parameter) else new

    def replace() -> None:
        for key, tensors in places:
            tensors[key] = value

    return replace
