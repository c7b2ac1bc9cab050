"""The row kernels, compiled for x86-64-v4 with AVX512-VNNI and AMX-INT8."""
include "kernels/all.pxi"
