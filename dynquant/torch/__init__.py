"""PyTorch models with their linear layers in int8 or 4 bits, on the CPU. Needs PyTorch (extra `torch`).

quantize           replaces the linear layers of a model
QuantLinear        the module that it puts in their place
observe            collects what reaches them, for calibration
summary            what was replaced, what was not and why, and the bytes
"""

from __future__ import annotations

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("dynquant.torch needs PyTorch: pip install torch") from error

from ._module import QuantLinear
from ._observe import observe
from ._replace import quantize
from ._summary import LayerSummary, Summary, summary

__all__ = ["LayerSummary", "QuantLinear", "Summary", "observe", "quantize", "summary"]
