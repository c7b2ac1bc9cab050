"""Entries from Python to the row kernels."""

# Design
# ------
# Three layers, one list of topics:
#
#   entries       `def` functions and classes, in core/*.pxi. The facade (dynquant/_*.py) has validated every
#                 argument: shapes agree, results are C-contiguous and writable, and overlap no input except
#                 where an entry allows it. An entry checks only sizes against memory (check_size), releases
#                 the GIL once, and calls row drivers.
#   row drivers   `cdef ... noexcept nogil` functions, in the same files. They go over rows and, within a row,
#                 over blocks of BLOCK floats. A block of float32 is read where it lies; one of float16 or
#                 bfloat16 is widened into scratch on the stack. So every row kernel sees float32, and no
#                 loop allocates.
#   row kernels   in kernels/*.pxi, compiled once for each instruction set. `kernels` points to the table of
#                 the set in use. _isa.py sets it when the package is imported; later only tests and
#                 benchmarks do, to compare sets. A PackedLinear keeps the table that it was packed for.
#
# An entry takes FloatMatrix, CodeMatrix and RawBuffer where small inputs reach it, because they are quick to
# make. Elsewhere it takes typed memoryviews, which also check dtype and number of axes. Arguments stand in
# one order: input, codes, options, result, first and end.
#
# Entries that look for NaN and infinity return whether the input is finite; the facade finds the element and
# raises.

cimport cython
from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS,
    PyBUF_FORMAT,
    PyBUF_SIMPLE,
    PyBUF_STRIDES,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_RawCalloc, PyMem_RawFree, PyMem_RawMalloc
from cpython.object cimport PyObject, PyObject_GenericSetAttr
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport INFINITY, NAN, ceil, pow, sqrt
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset

from dynquant._table cimport OCTAVE_BINS, NON_FINITE, Kernels, groups_of


cdef extern from "cpu.h" nogil:
    void dq_prefer_large_pages(void* memory, size_t n)
    bint dq_cpu_has_avx2()
    bint dq_cpu_has_avxvnni()
    bint dq_cpu_has_avx512()
    bint dq_cpu_has_avx512vnni()
    bint dq_cpu_has_amx()
    bint dq_cpu_has_dotprod()
    bint dq_cpu_has_i8mm()
    bint dq_permit_tiles()
    enum: DQ_BUILT_AVX2
    enum: DQ_BUILT_AVXVNNI
    enum: DQ_BUILT_AVX512
    enum: DQ_BUILT_AVX512VNNI
    enum: DQ_BUILT_AMX
    enum: DQ_BUILT_DOTPROD
    enum: DQ_BUILT_I8MM


cdef extern from "Python.h":
    object PyType_GenericNew(type cls, PyObject* args, PyObject* kwargs)


cdef extern from "kernels/simd/simd.h" nogil:
    void dq_prefetch(const void* bytes, size_t n)
    void dq_transpose_16(const int8_t* w, Py_ssize_t stride, uint8_t* out, Py_ssize_t out_stride)
    float dq_float(int32_t b)
    float DQ_BELOW_HALF
    enum: DQ_WIDE_ROWS
    enum: DQ_WIDE_DOTS


kernels = NULL
# What takes the place of the kernels for AMX if the system refuses their registers; NULL unless it is still
# to be asked.
cdef Kernels* without_amx = NULL
cdef bint amx_is_refused = False

BINS_PER_OCTAVE = OCTAVE_BINS
MAX_PLAIN_FLOATS = PLAIN_FLOATS


def set_table(table not None, instead=None):
    """Use the row kernels in the capsule `table` from now on.

    With `instead` they are for AMX, which the system has to permit. It is asked when the first weights are
    packed, and if it refuses, the kernels in `instead` are used.
    """
    global kernels, without_amx, amx_is_refused
    kernels = table_in(table)
    without_amx = NULL if instead is None else table_in(instead)
    amx_is_refused = False


cdef Kernels* table_in(capsule) except NULL:
    return <Kernels*> PyCapsule_GetPointer(capsule, "dynquant._table.Kernels")


# The kernels that weights are packed for. Only products with packed weights use the registers of AMX: a
# process that packs none never asks for them.
cdef Kernels* packing_kernels() noexcept nogil:
    global kernels, without_amx, amx_is_refused
    if without_amx != NULL:
        if not dq_permit_tiles():
            kernels, amx_is_refused = without_amx, True
        without_amx = NULL
    return kernels


def amx_refused():
    """Whether the system has refused the registers of AMX."""
    return amx_is_refused


def isas_built():
    """Names of the instruction sets that this build has, weakest first."""
    return named(DQ_BUILT_AVX2, DQ_BUILT_AVXVNNI, DQ_BUILT_AVX512, DQ_BUILT_AVX512VNNI, DQ_BUILT_AMX,
                 DQ_BUILT_DOTPROD, DQ_BUILT_I8MM)


def isas_supported():
    """Names of the instruction sets that this CPU and operating system run, weakest first."""
    return named(dq_cpu_has_avx2(), dq_cpu_has_avxvnni(), dq_cpu_has_avx512(), dq_cpu_has_avx512vnni(),
                 dq_cpu_has_amx(), dq_cpu_has_dotprod(), dq_cpu_has_i8mm())


cdef tuple named(bint avx2, bint avxvnni, bint avx512, bint avx512vnni, bint amx, bint dotprod, bint i8mm):
    return (("baseline",) + ("avx2",) * avx2 + ("avxvnni",) * avxvnni + ("avx512",) * avx512
            + ("avx512vnni",) * avx512vnni + ("amx",) * amx + ("dotprod",) * dotprod + ("i8mm",) * i8mm)


def permit_amx():
    """Ask the operating system for the registers of AMX; returns whether it agrees."""
    return dq_permit_tiles()


include "core/threads.pxi"
include "core/buffers.pxi"
include "core/scale.pxi"
include "core/quantize.pxi"
include "core/weights.pxi"
include "core/compensate.pxi"
include "core/dequantize.pxi"
include "core/metrics.pxi"
include "core/smooth.pxi"
include "core/hadamard.pxi"
include "core/matmul_groups.pxi"
include "core/matmul.pxi"
include "core/inner.pxi"
include "core/wide.pxi"
include "core/linear.pxi"
include "core/calibrate.pxi"
include "core/top_k.pxi"
include "core/gguf.pxi"
