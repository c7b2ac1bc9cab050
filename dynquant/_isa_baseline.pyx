"""The row kernels, compiled for any processor of the target architecture."""
include "kernels/all.pxi"
