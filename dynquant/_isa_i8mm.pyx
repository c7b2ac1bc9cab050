"""The row kernels, compiled for Armv8.2-A with SDOT and SMMLA (DotProd, I8MM)."""
include "kernels/all.pxi"
