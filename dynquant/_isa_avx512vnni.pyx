"""The row kernels, compiled for x86-64-v4 with AVX512-VNNI."""
include "kernels/all.pxi"
