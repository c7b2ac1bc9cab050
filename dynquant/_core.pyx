"""Entries from Python to the row kernels, on typed memoryviews and buffers."""

# Design
# ------
# The facade has validated every argument: shapes agree, results are C-contiguous, writable and overlap no
# input except where an entry allows it. Here only sizes are held against the memory itself (check_size).
# Entries that small inputs reach take arrays as FloatRows and Memory, which are quicker to make than typed
# memoryviews.
#
# An entry goes over rows and, within a row, over blocks of BLOCK floats. A block of float32 is read where it
# lies; a block of float16 or bfloat16 is widened into a scratch array on the stack. So every row kernel sees
# float32, and no loop over rows allocates.
#
# `kernels` points to the table of the instruction set that _isa.py picked. It is set while the package is
# imported, and then only by tests and benchmarks that compare instruction sets.
#
# Entries that look for NaN and infinity return whether the input is finite; the facade finds the element and
# raises.

cimport cython
from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS,
    PyBUF_SIMPLE,
    PyBUF_STRIDES,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_RawFree, PyMem_RawMalloc
from cpython.object cimport PyObject, PyObject_GenericSetAttr
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.pyport cimport PY_SSIZE_T_MAX
from libc.math cimport INFINITY, ceil, pow, sqrt
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from dynquant._table cimport CHANNEL_BINS, Kernels


cdef extern from "cpu.h" nogil:
    void dq_prefer_large_pages(void* memory, size_t n)
    bint dq_cpu_has_avx2()
    bint dq_cpu_has_avxvnni()
    bint dq_cpu_has_avx512()
    bint dq_cpu_has_avx512vnni()
    bint dq_cpu_has_amx()
    bint dq_permit_tiles()
    enum: DQ_BUILT_AVX2
    enum: DQ_BUILT_AVXVNNI
    enum: DQ_BUILT_AVX512
    enum: DQ_BUILT_AVX512VNNI
    enum: DQ_BUILT_AMX


cdef extern from "Python.h":
    object PyType_GenericNew(type cls, PyObject* args, PyObject* kwargs)


cdef extern from "kernels/simd/simd.h" nogil:
    float dq_float(int32_t b)


cdef enum:
    NON_FINITE = 0x7F800000  # the bits of infinity; those of NaN are above


kernels = NULL

BINS_PER_CHANNEL = CHANNEL_BINS


def set_table(table not None):
    """Use the row kernels in the capsule `table` from now on."""
    global kernels
    kernels = <Kernels*> PyCapsule_GetPointer(table, "dynquant._table.Kernels")


def isas_built():
    """Names of the instruction sets that this build has, weakest first."""
    return named(DQ_BUILT_AVX2, DQ_BUILT_AVXVNNI, DQ_BUILT_AVX512, DQ_BUILT_AVX512VNNI, DQ_BUILT_AMX)


def isas_supported():
    """Names of the instruction sets that this CPU and operating system run, weakest first."""
    return named(dq_cpu_has_avx2(), dq_cpu_has_avxvnni(), dq_cpu_has_avx512(), dq_cpu_has_avx512vnni(),
                 dq_cpu_has_amx())


cdef tuple named(bint avx2, bint avxvnni, bint avx512, bint avx512vnni, bint amx):
    return (("baseline",) + ("avx2",) * avx2 + ("avxvnni",) * avxvnni + ("avx512",) * avx512
            + ("avx512vnni",) * avx512vnni + ("amx",) * amx)


def permit_amx():
    """Ask the operating system for the registers of AMX; returns whether it agrees."""
    return dq_permit_tiles()


include "core/buffers.pxi"
include "core/scale.pxi"
include "core/quantize.pxi"
include "core/weights.pxi"
include "core/dequantize.pxi"
include "core/metrics.pxi"
include "core/smooth.pxi"
include "core/hadamard.pxi"
include "core/matmul.pxi"
include "core/linear.pxi"
include "core/calibrate.pxi"
