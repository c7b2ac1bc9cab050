"""Quantized layers in a file: which tensors belong together, and in which layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .._layouts import BLOCK_BYTES
from ..errors import ParameterError
from ._stored import GGML_NUMBERS, Stored

# The last parts of the names of a layer's tensors, by layout: those that tell it, those that may be there.
_PACKED = {"weight_packed", "weight_scale", "weight_shape"}, {"weight_zero_point", "weight_g_idx"}
_INT = {"weight", "weight_scale"}, {"weight_zero_point", "weight_g_idx"}
_WORDS = {"qweight", "qzeros", "scales"}, {"g_idx"}

# What `quantization_config` says of weights that are transformed before they are quantized.
_TRANSFORMS = "transform_config"


class QuantizedLayer(NamedTuple):
    """A layer whose weight is quantized: `tensors` are those of `DynQuantTensor.from_layout`."""

    layout: str
    tensors: dict[str, Stored]


def quantized_layers(tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, QuantizedLayer]:
    """Name of each quantized layer -> what it consists of."""
    parts: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        layer, _, last = name.rpartition(".")
        parts.setdefault(layer, {})[last] = stored
    layers = {}
    for layer, own in parts.items():
        if found := _quantized(own, config):
            layers[layer] = found
    return layers


def _quantized(own: dict[str, Stored], config: Mapping[str, Any]) -> QuantizedLayer | None:
    for needed, optional in (_PACKED, _INT, _WORDS):
        if not needed <= set(own):
            continue
        if needed == _INT[0] and own["weight"].dtype != "I8":
            continue
        layout = "compressed-tensors" if needed != _WORDS[0] else _layout_of_words(own, config)
        return QuantizedLayer(layout, {key: own[key] for key in own if key in needed | optional})
    weight = own.get("weight")
    if weight is not None and GGML_NUMBERS.get(weight.dtype) in BLOCK_BYTES and len(weight.shape) == 2:
        return QuantizedLayer("gguf", {"data": weight})
    return None


def _layout_of_words(own: dict[str, Stored], config: Mapping[str, Any]) -> str:
    """GPTQ, of which version, or AWQ: what the configuration says, else what the shapes do."""
    method = config.get("quant_method")
    words, scales = own["qweight"].shape, own["scales"].shape
    along_outputs = len(words) == 2 and len(scales) == 2 and 8 * words[1] == scales[1]
    if method == "awq" or (method is None and along_outputs):
        return "awq"
    versions = (config.get("checkpoint_format"), config.get("format"))
    return "gptq_v2" if "gptq_v2" in versions else "gptq"


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise for quantized weights that stand for others than their codes and scales say."""
    if config.get(_TRANSFORMS):
        raise ParameterError("path: expected weights as they are, got a checkpoint with a transform_config")
    if config.get("quant_method") == "awq" and str(config.get("version", "gemm")).lower() != "gemm":
        raise ParameterError(f"path: expected AWQ of version gemm, got {config['version']!r}")
