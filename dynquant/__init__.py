"""Dynamic int8 and int4 quantization on the CPU: exact, NumPy in, NumPy out.

arrays             dynamic_quantize, dynamic_quantize_int8, dynamic_quantize_int8_per_row,
                   dynamic_quantize_int4, dynamic_quantize_linear (ONNX), quantize (scales given),
                   compute_scale, MaxAbs, Percentile
the result         DynQuantTensor: dequantize, rows, files; DynQuantFormat
linear layers      QuantLinear.from_float(weight)(x); w8a8_matmul, w8a8_matvec, w4a8_matmul, w4a8_matvec
integers           int8_inner: exact products of int8 matrices
weights            quantize_weights: int8 or 4 bits, groups, searched ranges, error compensation
outliers           hadamard_transform; compute_smooth_factors, search_alpha, smooth_activations,
                   smooth_weights, fold_smooth_factors, SmoothQuantConfig
calibration        Calibrator: streams, merges, saves; CalibStats.collect
search             top_k, EmbeddingIndex: the best of a corpus of embeddings, exactly; recall_report;
                   quantize_array: files larger than memory
model files        open_model, quantize_model, compare_recipes; `python -m dynquant` (extra: models)
measuring          error_metrics, quantization_mae
errors             all derive from DynQuantError and from the built-in exception that fits
C, Cython, CPU     get_include, from dynquant.capi cimport ..., simd_info
"""

import importlib
from typing import TYPE_CHECKING, Any

try:
    from . import _core  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"dynquant finds no compiled modules that it can load in {__path__[0]}; if that is a checkout, start "
        "Python in another folder to import what is installed, or run `python setup.py build_ext --inplace`"
    ) from error

from ._alpha_search import AlphaSearch, search_alpha
from ._calibrate import CalibStats
from ._calibrator import Calibrator
from ._format import DynamicScaleMode, DynQuantFormat, MaxAbs, Percentile
from ._hadamard import hadamard_transform
from ._include import get_include
from ._inner import int8_inner
from ._isa import simd_info
from ._linear import QuantLinear
from ._matmul import w4a8_matmul, w4a8_matvec, w8a8_matmul, w8a8_matvec
from ._metrics import ErrorMetrics, error_metrics, quantization_mae
from ._quantize import (
    compute_scale,
    dynamic_quantize,
    dynamic_quantize_int4,
    dynamic_quantize_int8,
    dynamic_quantize_int8_per_row,
    dynamic_quantize_linear,
    quantize,
)
from ._smooth import (
    SmoothQuantConfig,
    compute_smooth_factors,
    fold_smooth_factors,
    smooth_activations,
    smooth_weights,
)
from ._tensor import DynQuantTensor
from ._top_k import top_k
from ._weights import quantize_weights
from .errors import (
    DTypeError,
    DynQuantError,
    EmptyInputError,
    FeatureDimMismatchError,
    InvalidAlphaError,
    InvalidPercentileError,
    IsaError,
    LayoutError,
    NonFiniteError,
    ParameterError,
    ShapeMismatchError,
    SilentChannelWarning,
)

if TYPE_CHECKING:
    from ._array_file import quantize_array
    from ._index import EmbeddingIndex
    from ._recall import RecallReport, RecallRow, recall_report
    from .models import (
        LayerView,
        ModelFile,
        ModelReport,
        RecipeRow,
        RecipeTable,
        TensorReport,
        compare_recipes,
        open_model,
        quantize_model,
    )

__version__ = "0.2.0.dev0"

__all__ = [
    "AlphaSearch",
    "CalibStats",
    "Calibrator",
    "DTypeError",
    "DynQuantError",
    "DynQuantFormat",
    "DynQuantTensor",
    "DynamicScaleMode",
    "EmbeddingIndex",
    "EmptyInputError",
    "ErrorMetrics",
    "FeatureDimMismatchError",
    "InvalidAlphaError",
    "InvalidPercentileError",
    "IsaError",
    "LayerView",
    "LayoutError",
    "MaxAbs",
    "ModelFile",
    "ModelReport",
    "NonFiniteError",
    "ParameterError",
    "Percentile",
    "QuantLinear",
    "RecallReport",
    "RecallRow",
    "RecipeRow",
    "RecipeTable",
    "ShapeMismatchError",
    "SilentChannelWarning",
    "SmoothQuantConfig",
    "TensorReport",
    "compare_recipes",
    "compute_scale",
    "compute_smooth_factors",
    "dynamic_quantize",
    "dynamic_quantize_int4",
    "dynamic_quantize_int8",
    "dynamic_quantize_int8_per_row",
    "dynamic_quantize_linear",
    "error_metrics",
    "fold_smooth_factors",
    "get_include",
    "hadamard_transform",
    "int8_inner",
    "open_model",
    "quantization_mae",
    "quantize",
    "quantize_array",
    "quantize_model",
    "quantize_weights",
    "recall_report",
    "search_alpha",
    "simd_info",
    "smooth_activations",
    "smooth_weights",
    "top_k",
    "w4a8_matmul",
    "w4a8_matvec",
    "w8a8_matmul",
    "w8a8_matvec",
]

# Modules that are imported when one of their names is first used: most programs search no index on disk and
# read no model files, and to import these takes as long as all the others.
_LAZY = {
    "EmbeddingIndex": "_index",
    "LayerView": "models",
    "ModelFile": "models",
    "ModelReport": "models",
    "RecallReport": "_recall",
    "RecallRow": "_recall",
    "RecipeRow": "models",
    "RecipeTable": "models",
    "TensorReport": "models",
    "compare_recipes": "models",
    "open_model": "models",
    "quantize_array": "_array_file",
    "quantize_model": "models",
    "recall_report": "_recall",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
