"""The row kernels, compiled for Armv8.2-A with SDOT (DotProd)."""
include "kernels/all.pxi"
