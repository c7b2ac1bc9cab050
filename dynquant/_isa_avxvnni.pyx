"""The row kernels, compiled for x86-64-v3 with AVX-VNNI."""
include "kernels/all.pxi"
