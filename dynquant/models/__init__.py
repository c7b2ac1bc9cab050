"""Model files: read, quantized tensor by tensor, and reported on.

The extra ``models`` installs the libraries that some files need. The public names are those of `dynquant`,
which imports this package when one of them is first used.
"""

from ._file import ModelFile, open_model
from ._quantize import quantize_model
from ._report import ModelReport, TensorReport

__all__ = ["ModelFile", "ModelReport", "TensorReport", "open_model", "quantize_model"]
