"""PyTorch models with their linear layers in int8 or 4 bits, on the CPU. Needs PyTorch (extra `torch`).

quantize           replaces the linear layers of a model
QuantLinear        the module that it puts in their place
observe            collects what reaches them, for calibration
save, load_into    checkpoints that other libraries read
DynQuantConfig     from_pretrained(..., quantization_config=DynQuantConfig()) of transformers
summary            what was replaced, what was not and why, and the bytes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("dynquant.torch needs PyTorch: pip install torch") from error

from ._files import load_into, save
from ._module import QuantLinear
from ._observe import observe
from ._replace import quantize
from ._summary import LayerSummary, Summary, summary

if TYPE_CHECKING:
    from ._transformers import DynQuantConfig

__all__ = [
    "DynQuantConfig",
    "LayerSummary",
    "QuantLinear",
    "Summary",
    "load_into",
    "observe",
    "quantize",
    "save",
    "summary",
]


def __getattr__(name: str) -> Any:
    """What needs transformers, imported when it is first asked for."""
    if name == "DynQuantConfig":
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise ImportError("DynQuantConfig needs transformers: pip install transformers") from error
        from ._transformers import DynQuantConfig

        return DynQuantConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
