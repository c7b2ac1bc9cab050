"""Model files: read, quantized tensor by tensor, and reported on.

The extra ``models`` installs the libraries that some files need. The public names are those of `dynquant`,
which imports this package when one of them is first used.
"""

from ._file import ModelFile, open_model
from ._quantize import quantize_model
from ._recipes import LayerView, RecipeRow, RecipeTable, compare_recipes
from ._report import ModelReport, TensorReport

__all__ = [
    "LayerView",
    "ModelFile",
    "ModelReport",
    "RecipeRow",
    "RecipeTable",
    "TensorReport",
    "compare_recipes",
    "open_model",
    "quantize_model",
]
