"""The plug-in for transformers: models that are quantized while they are loaded."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._weights import weight_format
from ..errors import ParameterError
from ._files import made_of_options, options_of, place_of
from ._module import QuantLinear
from ._replace import quantize

_METHOD = "dynquant"


@register_quantization_config(_METHOD)
class DynQuantConfig(QuantizationConfigMixin):
    """What ``from_pretrained(..., quantization_config=...)`` of transformers quantizes a model by.

    Parameters
    ----------
    bits, group_size, symmetric, hadamard, activation_symmetric, include, exclude, num_threads
        As in `quantize`.
    layers : dict, optional
        The options of each quantized layer, as a checkpoint has them. Not for callers.

    Raises
    ------
    ParameterError
        If an option has a value that it cannot take.

    Notes
    -----
    Importing it registers the quantization method ``dynquant`` with transformers, which is also what loads
    models that were saved with it: ``save_pretrained`` writes the quantized weights, and ``from_pretrained``
    reads them without making floats of them.
    """

    def __init__(
        self,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool | None = None,
        hadamard: bool = False,
        activation_symmetric: bool = True,
        include: Any = None,
        exclude: Any = ("*lm_head",),
        num_threads: int | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        **others: Any,
    ) -> None:
        unknown = set(others) - {"quant_method"}
        if unknown:
            raise ParameterError(f"quantization_config: expected options of quantize, got {unknown.pop()!r}")
        self.quant_method = _METHOD
        weight_format(bits, group_size, symmetric)
        self.bits, self.group_size, self.symmetric, self.hadamard = bits, group_size, symmetric, hadamard
        self.activation_symmetric = activation_symmetric
        self.include, self.exclude, self.num_threads = include, exclude, num_threads
        self.layers = layers

    def options(self) -> dict[str, Any]:
        """Those of `quantize`."""
        names = ("bits", "group_size", "symmetric", "hadamard", "activation_symmetric", "include")
        # The default patterns may match nothing; a file gives them back as a list.
        given = {} if tuple(self.exclude or ()) == ("*lm_head",) else {"exclude": self.exclude}
        return {**{name: getattr(self, name) for name in names}, "num_threads": self.num_threads, **given}


@register_quantizer(_METHOD)
class DynQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """What transformers calls before and after it loads weights."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """For a checkpoint that is quantized: modules for its tensors."""
        layers = self.quantization_config.layers
        if self.pre_quantized:
            if not layers:
                raise ParameterError("quantization_config: expected the layers of the checkpoint, got none")
            for name, options in layers.items():
                parent, attribute = place_of(model, name)
                parent._modules[attribute] = made_of_options(model, name, options)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """For a float checkpoint: one layer after the other is quantized."""
        if not self.pre_quantized:
            quantize(model, **self.quantization_config.options())
            layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
            self.quantization_config.layers = options_of(layers)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the quantized model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained beside it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile takes it."""
        return True
