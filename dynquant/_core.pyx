"""Entries from Python to the row kernels, on typed memoryviews."""

# Design
# ------
# The facade has validated every argument: shapes agree, results are C-contiguous, writable and overlap no
# input except where an entry allows it. Nothing here checks again.
#
# An entry goes over rows and, within a row, over blocks of BLOCK floats. A block of float32 is read where it
# lies; a block of float16 or bfloat16 is widened into a scratch array on the stack. So every row kernel sees
# float32, and no entry allocates in proportion to its input.
#
# `kernels` points to the table of the instruction set that _isa.py picked. It is set while the package is
# imported, and then only by tests and benchmarks that compare instruction sets.
#
# Entries that look for NaN and infinity return whether the input is finite; the facade finds the element and
# raises.

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.pyport cimport PY_SSIZE_T_MAX
from libc.math cimport pow
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from dynquant._table cimport WINDOW, Kernels


cdef extern from "cpu.h" nogil:
    bint dq_cpu_has_avx2()
    bint dq_cpu_has_avx512()
    bint dq_cpu_has_avx512vnni()
    enum: DQ_HAS_AVX2_BUILD
    enum: DQ_HAS_AVX512_BUILD
    enum: DQ_HAS_AVX512VNNI_BUILD


cdef extern from "kernels/simd.h" nogil:
    float dq_float(int32_t b)


cdef enum:
    F32 = 0
    F16 = 1
    BF16 = 2
    NON_FINITE = 0x7F800000
    BLOCK = 4096
    RUN = 64 * BLOCK
    STREAM = 1 << 23
    MAX_STEPS = 8


cdef Kernels* kernels = NULL

WINDOW_CELLS = WINDOW


def set_table(table not None):
    """Use the row kernels in the capsule `table` from now on."""
    global kernels
    kernels = <Kernels*> PyCapsule_GetPointer(table, "dynquant._table.Kernels")


def isas_built():
    """Names of the instruction sets that this build has, weakest first."""
    return (("baseline",) + ("avx2",) * DQ_HAS_AVX2_BUILD + ("avx512",) * DQ_HAS_AVX512_BUILD
            + ("avx512vnni",) * DQ_HAS_AVX512VNNI_BUILD)


def isas_supported():
    """Names of the instruction sets that this CPU and operating system run, weakest first."""
    return (("baseline",) + ("avx2",) * dq_cpu_has_avx2() + ("avx512",) * dq_cpu_has_avx512()
            + ("avx512vnni",) * dq_cpu_has_avx512vnni())


# ---------------------------------------------------------------------------------------------------------
# Input


# One is made in every call, and can be part of no reference cycle.
@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class FloatRows:
    """m rows of k floats that follow each other in `x`: float32, or a 16-bit format seen as uint16."""

    def __cinit__(self, x not None, int kind, Py_ssize_t m, Py_ssize_t k):
        self.kind, self.m, self.k = kind, m, k
        if kind == F32:
            self.f32 = x
        else:
            self.half = x

    cdef Floats row(self, Py_ssize_t r) noexcept nogil:
        cdef Floats x = self.flat()
        x.n = self.k
        x.data += r * self.k * (4 if self.kind == F32 else 2)
        return x

    cdef Floats flat(self) noexcept nogil:
        cdef Floats x
        x.kind = self.kind
        x.n = self.m * self.k
        x.data = NULL
        if x.n:
            x.data = <const char*> &self.f32[0] if self.kind == F32 else <const char*> &self.half[0]
        return x


# Floats start .. start + n of x, n <= BLOCK: where they lie, or widened into scratch.
cdef inline const float* block_of(const Floats* x, Py_ssize_t start, Py_ssize_t n,
                                  float* scratch) noexcept nogil:
    if x.kind == F32:
        return <const float*> x.data + start
    if x.kind == F16:
        kernels.widen_f16_f32(<const uint16_t*> x.data + start, scratch, n)
    else:
        kernels.widen_bf16_f32(<const uint16_t*> x.data + start, scratch, n)
    return scratch


cdef inline Py_ssize_t block_len(Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    return n - start if n - start < BLOCK else BLOCK


# ---------------------------------------------------------------------------------------------------------
# Scales


cdef int32_t amax_bits(const Floats* x) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef int32_t b, most = 0
    while start < x.n:
        n = block_len(start, x.n)
        b = kernels.amax_bits_f32(block_of(x, start, n, scratch), n)
        most = b if b > most else most
        start += n
    return most


# Bits of the magnitude at place `rank`, 0 the smallest, of all the parts' magnitudes together; at least
# NON_FINITE if any of them is not finite.
# A radix selection: the 31 magnitude bits are fixed from the top in steps of 11, 10 and 10, each by counting
# over the parts as they lie. Three passes whatever the values are, and 32 KiB of scratch.
cdef int32_t ranked_bits(const Floats* parts, Py_ssize_t n_parts, Py_ssize_t rank) noexcept nogil:
    cdef Py_ssize_t counts[2 * 2048]
    cdef Py_ssize_t b
    cdef int32_t prefix = 0
    cdef int shift = 20
    while shift >= 0:
        memset(counts, 0, sizeof(counts))
        count_parts(parts, n_parts, prefix, shift, counts)
        if shift == 20:
            for b in range(2048):
                counts[b] += counts[2048 + b]
            for b in range(NON_FINITE >> 20, 2048):
                if counts[b]:
                    return NON_FINITE
        b = 0
        while rank >= counts[b]:
            rank -= counts[b]
            b += 1
        prefix = <int32_t> ((prefix << 10) | b)
        shift -= 10
    return prefix


# The same for at most BLOCK floats, in passes over L1 that vectorise, and so cost less than one pass that
# increments counters. A rank close to the top is reached from the largest magnitude in steps to the next
# lower one; otherwise the bits are fixed one at a time, from the top, by counting the magnitudes below.
cdef int32_t ranked_bits_of_block(const Floats* x, Py_ssize_t rank) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef const float* block = block_of(x, 0, x.n, scratch)
    cdef int32_t bits = kernels.amax_bits_f32(block, x.n), bit = 1 << 30
    if bits >= NON_FINITE or rank == x.n - 1:
        return bits
    if x.n - rank <= MAX_STEPS:
        while kernels.count_below_f32(block, bits, x.n) > rank:
            bits = kernels.amax_bits_below_f32(block, bits, x.n)
        return bits
    bits = 0
    while bit:
        if kernels.count_below_f32(block, bits | bit, x.n) <= rank:
            bits |= bit
        bit >>= 1
    return bits


cdef void count_parts(const Floats* parts, Py_ssize_t n_parts, int32_t prefix, int shift,
                      Py_ssize_t* counts) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef const float* x
    cdef Py_ssize_t p, start, n
    for p in range(n_parts):
        start = 0
        while start < parts[p].n:
            n = block_len(start, parts[p].n)
            x = block_of(&parts[p], start, n, scratch)
            if shift == 20:
                kernels.count_top_bits_f32(x, counts, n)
            else:
                kernels.count_next_bits_f32(x, prefix, shift, counts, n)
            start += n


# scale[0] = that of one row: its largest magnitude, or the one at `rank` when that is >= 0, over clip.
# Returns False, with scale untouched, if the row is not finite.
cdef bint scale_of(const Floats* x, float clip, Py_ssize_t rank, float* scale) noexcept nogil:
    cdef int32_t bits
    if rank < 0:
        bits = amax_bits(x)
    elif x.n <= BLOCK:
        bits = ranked_bits_of_block(x, rank)
    else:
        bits = ranked_bits(x, 1, rank)
    if bits >= NON_FINITE:
        return False
    scale[0] = dq_float(bits) / clip
    return True


def scale_rows(FloatRows x not None, float[::1] scales not None, float clip, Py_ssize_t rank,
               Py_ssize_t first=0, Py_ssize_t end=PY_SSIZE_T_MAX):
    """The scales of rows first .. end; returns whether they are finite, and stops at a row that is not."""
    cdef Py_ssize_t r
    cdef Floats row
    cdef bint finite = True
    with nogil:
        for r in range(first, end if end < x.m else x.m):
            row = x.row(r)
            finite = scale_of(&row, clip, rank, &scales[r])
            if not finite:
                break
    return finite


# ---------------------------------------------------------------------------------------------------------
# Codes


# Codes come as one run of bytes, row after row.
cdef inline Py_ssize_t bytes_of_row(Py_ssize_t k, bint packed) noexcept nogil:
    return (k + 1) // 2 if packed else k


# Codes of floats start .. start + n, n <= BLOCK; zeros where the scale is 0.
cdef inline void code_block(const Floats* x, Py_ssize_t start, Py_ssize_t n, float scale, int32_t clip,
                            bint stream, int8_t* codes) noexcept nogil:
    cdef float scratch[BLOCK]
    if scale == 0:
        memset(codes, 0, n)
    else:
        kernels.quantize_row_f32_s8(block_of(x, start, n, scratch), scale, clip, stream, codes, n)


# Codes of floats start .. end of one row. `codes` takes a byte an element, or when packed a nibble. A row
# that the caches cannot hold anyway has its codes written past them.
cdef void code_run(const Floats* x, Py_ssize_t start, Py_ssize_t end, float scale, int32_t clip, bint packed,
                   int8_t* codes) noexcept nogil:
    cdef int8_t block[BLOCK]
    cdef Py_ssize_t n
    while start < end:
        n = block_len(start, end)
        if packed:
            code_block(x, start, n, scale, clip, False, block)
            kernels.pack_row_s8_s4(block, <uint8_t*> codes + start // 2, n)
        else:
            code_block(x, start, n, scale, clip, x.n >= STREAM, codes + start)
        start += n


# Codes of one row, its last run of a megabyte first: what the pass for the scale read last is still in
# cache. Shorter runs would undo the hardware's prefetching.
cdef void code_row(const Floats* x, float scale, int32_t clip, bint packed, int8_t* codes) noexcept nogil:
    cdef Py_ssize_t start = x.n - x.n % RUN
    while start >= 0:
        code_run(x, start, x.n if x.n - start < RUN else start + RUN, scale, clip, packed, codes)
        start -= RUN


def code_rows(FloatRows x not None, const float[::1] scales not None, int clip, bint packed,
              int8_t[::1] codes not None, Py_ssize_t first=0, Py_ssize_t end=PY_SSIZE_T_MAX):
    """Codes of rows first .. end, each by its own scale; returns True."""
    cdef Py_ssize_t r, row_bytes = bytes_of_row(x.k, packed)
    cdef Floats row
    if x.k == 0:
        return True
    with nogil:
        for r in range(first, end if end < x.m else x.m):
            row = x.row(r)
            code_row(&row, scales[r], clip, packed, &codes[r * row_bytes])
    return True


def quantize_rows(FloatRows x not None, float[::1] scales not None, int clip, Py_ssize_t rank, bint packed,
                  int8_t[::1] codes not None, Py_ssize_t first=0, Py_ssize_t end=PY_SSIZE_T_MAX):
    """Scales and codes of rows first .. end; a row's second pass reads from cache.

    Returns whether they are finite; stops at a row that is not, with the rows before it written.
    """
    cdef Py_ssize_t r, row_bytes = bytes_of_row(x.k, packed)
    cdef Floats row
    cdef bint finite = True
    with nogil:
        for r in range(first, end if end < x.m else x.m):
            row = x.row(r)
            finite = scale_of(&row, clip, rank, &scales[r])
            if not finite:
                break
            if x.k:
                code_row(&row, scales[r], clip, packed, &codes[r * row_bytes])
    return finite


def min_max(FloatRows x not None):
    """(min, max) of all elements, which are finite, and 0."""
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef Floats flat = x.flat()
    cdef float least = 0, most = 0
    with nogil:
        while start < flat.n:
            n = block_len(start, flat.n)
            kernels.min_max_row_f32(block_of(&flat, start, n, scratch), &least, &most, n)
            start += n
    return least, most


def quantize_u8(FloatRows x not None, float scale, int zero_point, uint8_t[::1] codes not None):
    """codes = clip(round half even (x / scale) + zero_point, 0, 255)."""
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef Floats flat = x.flat()
    with nogil:
        while start < flat.n:
            n = block_len(start, flat.n)
            kernels.quantize_row_f32_u8(block_of(&flat, start, n, scratch), scale, zero_point,
                                        &codes[start], n)
            start += n


# Values start .. start + n of one row of codes, n <= BLOCK.
cdef inline void value_block(const int8_t* codes, float scale, bint packed, Py_ssize_t start, float* out,
                             Py_ssize_t n) noexcept nogil:
    cdef int8_t unpacked[BLOCK]
    cdef const int8_t* source = codes + start
    if packed:
        kernels.unpack_row_s4_s8(<const uint8_t*> codes + start // 2, unpacked, n)
        source = unpacked
    kernels.dequantize_row_s8_f32(source, scale, out, n)


def dequantize_rows(const int8_t[::1] codes not None, const float[::1] scales not None, bint packed,
                    float[:, ::1] out not None):
    """out[r] = codes[r] * scales[r]."""
    cdef Py_ssize_t r, start, n, k = out.shape[1], row_bytes = bytes_of_row(k, packed)
    if k == 0:
        return
    with nogil:
        for r in range(out.shape[0]):
            start = 0
            while start < k:
                n = block_len(start, k)
                value_block(&codes[r * row_bytes], scales[r], packed, start, &out[r, start], n)
                start += n


def sum_abs_error(FloatRows x not None, const int8_t[::1] codes not None, const float[::1] scales not None,
                  bint packed):
    """Sum of |x - codes * scales| over all elements, in double."""
    cdef float value[BLOCK]
    cdef float scratch[BLOCK]
    cdef Py_ssize_t r, start, n, row_bytes = bytes_of_row(x.k, packed)
    cdef Floats row
    cdef double total = 0
    with nogil:
        for r in range(x.m):
            row = x.row(r)
            start = 0
            while start < x.k:
                n = block_len(start, x.k)
                value_block(&codes[r * row_bytes], scales[r], packed, start, value, n)
                total += kernels.abs_error_row_f32_f64(block_of(&row, start, n, scratch), value, n)
                start += n
    return total


def error_sums(FloatRows x not None, const int8_t[::1] codes not None, const float[::1] scales not None,
               bint packed, bint per_row, double[:, ::1] sums not None):
    """The sums of stats.pxi for x against codes * scales, added to sums[r] for row r or all to sums[0]."""
    cdef float value[BLOCK]
    cdef float scratch[BLOCK]
    cdef Py_ssize_t r, start, n, row_bytes = bytes_of_row(x.k, packed)
    cdef Floats row
    with nogil:
        for r in range(x.m):
            row = x.row(r)
            start = 0
            while start < x.k:
                n = block_len(start, x.k)
                value_block(&codes[r * row_bytes], scales[r], packed, start, value, n)
                kernels.error_sums_row_f32_f64(block_of(&row, start, n, scratch), value,
                                               &sums[r if per_row else 0, 0], n)
                start += n


def error_sums_of(FloatRows x not None, FloatRows values not None, bint per_row,
                  double[:, ::1] sums not None):
    """The same for x against floats."""
    cdef float value[BLOCK]
    cdef float scratch[BLOCK]
    cdef Py_ssize_t r, start, n
    cdef Floats row, value_row
    with nogil:
        for r in range(x.m):
            row, value_row = x.row(r), values.row(r)
            start = 0
            while start < x.k:
                n = block_len(start, x.k)
                kernels.error_sums_row_f32_f64(block_of(&row, start, n, scratch),
                                               block_of(&value_row, start, n, value),
                                               &sums[r if per_row else 0, 0], n)
                start += n


# ---------------------------------------------------------------------------------------------------------
# Smoothing


def column_amax(FloatRows x not None, int32_t[::1] amax_bits not None):
    """Fold the rows of x into the columns' largest magnitudes, given and kept as float bits."""
    cdef float scratch[BLOCK]
    cdef Py_ssize_t r = 0, start, n
    cdef Floats row
    cdef bint four
    if x.k == 0:
        return
    with nogil:
        while r < x.m:
            row = x.row(r)
            four = x.kind == F32 and r + 4 <= x.m
            start = 0
            while start < x.k:
                n = block_len(start, x.k)
                if four:
                    kernels.column_amax_4_rows_f32(<const float*> row.data + start, x.k, &amax_bits[start], n)
                else:
                    kernels.column_amax_row_f32(block_of(&row, start, n, scratch), &amax_bits[start], n)
                start += n
            r += 4 if four else 1


def smooth_factors(const float[::1] act_amax not None, const float[::1] weight_amax not None, double alpha,
                   float epsilon, float[::1] factors not None):
    """max((act_amax + eps)**alpha / (weight_amax + eps)**(1 - alpha), eps) for each column.

    The powers are taken in double and rounded to float32 once: float powers differ between C libraries.
    """
    cdef Py_ssize_t j
    cdef float numerator, denominator
    with nogil:
        for j in range(factors.shape[0]):
            numerator = <float> pow(act_amax[j] + epsilon, alpha)
            denominator = <float> pow(weight_amax[j] + epsilon, 1.0 - alpha)
            numerator /= denominator
            factors[j] = epsilon if numerator < epsilon else numerator


def scale_columns(FloatRows x not None, const float[::1] factors not None, bint divide,
                  float[:, ::1] out not None):
    """out = x / factors or x * factors, row by row; out may be x itself.

    The last row is first, because the facade's search for NaN has just read it.
    """
    cdef float scratch[BLOCK]
    cdef const float* block
    cdef Py_ssize_t r, start, n
    cdef Floats row
    if x.k == 0:
        return
    with nogil:
        for r in range(x.m - 1, -1, -1):
            row = x.row(r)
            start = 0
            while start < x.k:
                n = block_len(start, x.k)
                block = block_of(&row, start, n, scratch)
                if divide:
                    kernels.divide_row_f32(block, &factors[start], &out[r, start], n)
                else:
                    kernels.multiply_row_f32(block, &factors[start], &out[r, start], n)
                start += n


def hadamard(float[:, ::1] x not None, Py_ssize_t block):
    """Transform every run of `block` elements of every row, in place."""
    cdef Py_ssize_t r, start
    if x.shape[1] == 0:
        return
    with nogil:
        for r in range(x.shape[0]):
            start = 0
            while start < x.shape[1]:
                kernels.hadamard_row_f32(&x[r, start], block)
                start += block


def all_finite(FloatRows x not None):
    """Whether no element is NaN or infinite."""
    cdef Floats flat = x.flat()
    cdef int32_t bits
    with nogil:
        bits = amax_bits(&flat)
    return bits < NON_FINITE


# ---------------------------------------------------------------------------------------------------------
# Integer products


def w8a8_matvec(const int8_t[:, ::1] weight not None, const float[::1] weight_scales not None,
                const int8_t[::1] activation not None, float activation_scale, float[::1] out not None):
    """out[r] = float32(weight[r] . activation) * weight_scales[r] * activation_scale."""
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        return
    with nogil:
        kernels.matvec_s8s8_f32(&weight[0, 0], &weight_scales[0], &activation[0], activation_scale, &out[0],
                                weight.shape[0], weight.shape[1])


def panel_count(Py_ssize_t n):
    """How many panels hold n outputs."""
    return (n + kernels.panel_outputs - 1) // kernels.panel_outputs


def packed_bytes(Py_ssize_t n, Py_ssize_t k):
    """Bytes of the panels of n outputs and k inputs."""
    return panel_count(n) * kernels.panel_bytes(k)


def activation_bytes(Py_ssize_t k):
    """Bytes of a row of k activations in the form that `matmul` takes."""
    return kernels.activation_bytes(k)


def pack_weights(const int8_t[:, ::1] weight not None, int8_t[::1] panels not None):
    """Pack weights into panels, packed_bytes of them."""
    cdef Py_ssize_t n = weight.shape[0], k = weight.shape[1], first = 0, wide = kernels.panel_outputs
    if k == 0:
        return
    with nogil:
        while first < n:
            kernels.pack_panel_s8(&weight[first, 0], n - first if n - first < wide else wide,
                                  &panels[first // wide * kernels.panel_bytes(k)], k)
            first += wide


def unpack_weights(const int8_t[::1] panels not None, int8_t[:, ::1] weight not None):
    """The inverse of pack_weights."""
    cdef Py_ssize_t n = weight.shape[0], k = weight.shape[1], first = 0, wide = kernels.panel_outputs
    if k == 0:
        return
    with nogil:
        while first < n:
            kernels.unpack_panel_s8(&panels[first // wide * kernels.panel_bytes(k)], &weight[first, 0],
                                    n - first if n - first < wide else wide, k)
            first += wide


# x / factors in `smoothed`, or x itself where factors is NULL.
cdef Floats smoothed_row(Floats x, const float* factors, float* smoothed) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    if factors == NULL:
        return x
    while start < x.n:
        n = block_len(start, x.n)
        kernels.divide_row_f32(block_of(&x, start, n, scratch), factors + start, smoothed + start, n)
        start += n
    x.data, x.kind = <const char*> smoothed, F32
    return x


# Codes of one row in the form that `matmul` takes.
cdef void code_activation(const Floats* x, float scale, uint8_t* a) noexcept nogil:
    cdef int8_t codes[BLOCK]
    cdef Py_ssize_t start = 0, n
    while start < x.n:
        n = block_len(start, x.n)
        code_block(x, start, n, scale, 127, False, codes)
        kernels.pack_activation_s8(codes, a + kernels.activation_offset(start), n)
        start += n


def quantize_activations(FloatRows x not None, const float[::1] factors, float[::1] scales not None,
                         uint8_t[::1] a not None):
    """Scales and int8 codes of the rows of x / factors, the codes in the form that `matmul` takes.

    `factors` may be None, and x is then taken as it is. Returns whether the rows are finite, and stops at one
    that is not.
    """
    cdef Py_ssize_t r, width = kernels.activation_bytes(x.k)
    cdef Floats row
    cdef bint finite = True
    cdef const float* f = NULL
    cdef float* smoothed = NULL
    if factors is not None and x.k:
        f = &factors[0]
        smoothed = <float*> PyMem_Malloc(x.k * sizeof(float))
        if smoothed == NULL:
            raise MemoryError
    with nogil:
        for r in range(x.m):
            row = smoothed_row(x.row(r), f, smoothed)
            finite = scale_of(&row, 127, -1, &scales[r])
            if not finite:
                break
            if x.k:
                code_activation(&row, scales[r], &a[r * width])
    PyMem_Free(smoothed)
    return finite


def matmul(const int8_t[::1] panels not None, const float[::1] weight_scales not None,
           const float[::1] bias, const uint8_t[::1] a not None, const float[::1] a_scales not None,
           float[:, ::1] out not None, Py_ssize_t k, Py_ssize_t first=0, Py_ssize_t end=PY_SSIZE_T_MAX):
    """out = a . weights + bias for the outputs of panels first .. end; returns True."""
    cdef Py_ssize_t m = out.shape[0], n = out.shape[1], wide = kernels.panel_outputs, p, c
    cdef const float* shift = NULL
    if m == 0 or n == 0 or k == 0:
        return True
    with nogil:
        for p in range(first, end if end < (n + wide - 1) // wide else (n + wide - 1) // wide):
            c = p * wide
            if bias is not None:
                shift = &bias[c]
            kernels.gemm_panel_s8s8_f32(&panels[p * kernels.panel_bytes(k)], &weight_scales[c], shift, &a[0],
                                        &a_scales[0], &out[0, c], n, m, n - c if n - c < wide else wide, k)
    return True


# ---------------------------------------------------------------------------------------------------------
# Calibration


def moments(FloatRows x not None):
    """(n, min, max, mean, sum of squared deviations) of all elements, which are finite; n > 0.

    Within a block the deviations are taken from the block's own mean; blocks are merged by the formula of
    Chan, Golub and LeVeque (1979), which keeps the variance accurate however large the mean is.
    """
    cdef float scratch[BLOCK]
    cdef const float* block
    cdef Py_ssize_t start = 0, n
    cdef Floats flat
    cdef float least, most
    cdef double mean = 0, m2 = 0, delta, block_mean
    with nogil:
        flat = x.flat()
        block = block_of(&flat, 0, 1, scratch)
        least = most = block[0]
        while start < flat.n:
            n = block_len(start, flat.n)
            block = block_of(&flat, start, n, scratch)
            kernels.min_max_row_f32(block, &least, &most, n)
            block_mean = kernels.sum_row_f32_f64(block, n) / n
            m2 += kernels.square_deviation_row_f32_f64(block, block_mean, n)
            delta = block_mean - mean
            m2 += delta * delta * (<double> start * n / (start + n))
            mean += delta * n / (start + n)
            start += n
    return flat.n, least, most, mean, m2


def ranked_magnitude(list batches not None, Py_ssize_t rank):
    """The magnitude at place `rank` among all elements of a list of FloatRows, which are finite."""
    cdef Py_ssize_t i, n = len(batches)
    cdef int32_t bits
    cdef Floats* parts = <Floats*> PyMem_Malloc(n * sizeof(Floats))
    if parts == NULL:
        raise MemoryError
    for i in range(n):
        parts[i] = (<FloatRows> batches[i]).flat()
    with nogil:
        bits = ranked_bits(parts, n, rank)
    PyMem_Free(parts)
    return dq_float(bits)


# Adds `a` to a sum kept as two doubles: the rounding error of every addition goes to the second (two-sum,
# Knuth), so that after a million additions the pair is still good to 2**-90 of the largest partial sum.
cdef inline void add_to_pair(double* pair, double a) noexcept nogil:
    cdef double total = pair[0] + a
    cdef double part = total - pair[0]
    pair[1] += (pair[0] - (total - part)) + (a - part)
    pair[0] = total


# Adds m * v, m a float32: v is split into halves of 26 bits (Veltkamp), whose products with m are exact.
cdef inline void add_product_to_pair(double* pair, double m, double v) noexcept nogil:
    cdef double high = v * 134217729.0
    high -= high - v
    add_to_pair(pair, m * high)
    add_to_pair(pair, m * (v - high))


# Adds the sum of a block's values to the pair sums[0:2], and of their squares to sums[2:4]. n > 0.
# With m close to their mean, sum x**2 = sum (x - m)**2 + m * (2 * sum x - n * m). Only the first term rounds,
# in double and relative to the spread alone; m is rounded to float32, which makes n * m exact.
cdef void add_block_sums(const float* x, Py_ssize_t n, double* sums) noexcept nogil:
    cdef double total = kernels.sum_row_f32_f64(x, n)
    cdef double m = <float> (total / n)
    cdef double rest[2]
    rest[0], rest[1] = 2 * total, 0
    add_to_pair(rest, -n * m)
    add_to_pair(sums, total)
    add_to_pair(sums + 2, kernels.square_deviation_row_f32_f64(x, m, n))
    add_product_to_pair(sums + 2, m, rest[0])
    add_product_to_pair(sums + 2, m, rest[1])


def add_statistics(FloatRows x not None, float[::1] extremes not None, double[::1] sums not None,
                   int64_t[::1] counts not None):
    """Add all elements, which are finite, to statistics: (min, max), two pairs of sums, counts of bins."""
    cdef float scratch[BLOCK]
    cdef const float* block
    cdef Py_ssize_t start = 0, n
    cdef Floats flat
    with nogil:
        flat = x.flat()
        while start < flat.n:
            n = block_len(start, flat.n)
            block = block_of(&flat, start, n, scratch)
            kernels.min_max_row_f32(block, &extremes[0], &extremes[1], n)
            add_block_sums(block, n, &sums[0])
            kernels.count_bins_f32(block, &counts[0], n)
            start += n


def add_sums(double[::1] sums not None, const double[::1] other not None):
    """Add pairs of sums, as `add_statistics` makes them, to others."""
    cdef Py_ssize_t i
    with nogil:
        for i in range(sums.shape[0]):
            add_to_pair(&sums[i & ~1], other[i])


def bin_of_rank(const int64_t[::1] counts not None, int64_t rank):
    """The bin that holds the element at place `rank`, 0 the smallest; fewer than are counted."""
    cdef Py_ssize_t b = 0
    with nogil:
        while b + 1 < counts.shape[0] and rank >= counts[b]:
            rank -= counts[b]
            b += 1
    return b


# window[c - shift] += source[c]; what would fall below the window goes to its first cell. shift is not
# negative; were it, because two threads change one calibrator, nothing would be written past the window.
cdef void add_window(const uint32_t* source, Py_ssize_t shift, uint32_t* window) noexcept nogil:
    cdef Py_ssize_t c, place
    for c in range(WINDOW):
        place = c - shift if c > shift else 0
        window[place if place < WINDOW else WINDOW - 1] += source[c]


def raise_windows(uint32_t[:, ::1] counts not None, int32_t[::1] amax_bits not None,
                  const int32_t[::1] new_bits not None):
    """Move the channels' windows up to new largest magnitudes, which are not below the old ones."""
    cdef uint32_t window[WINDOW]
    cdef Py_ssize_t j, shift
    with nogil:
        for j in range(counts.shape[0]):
            shift = (new_bits[j] >> 20) - (amax_bits[j] >> 20)
            amax_bits[j] = new_bits[j]
            if shift:
                memcpy(window, &counts[j, 0], sizeof(window))
                memset(&counts[j, 0], 0, sizeof(window))
                add_window(window, shift, &counts[j, 0])


def add_windows(uint32_t[:, ::1] counts not None, const int32_t[::1] amax_bits not None,
                const uint32_t[:, ::1] other not None, const int32_t[::1] other_bits not None):
    """Add the counts of other windows, whose largest magnitudes are nowhere above amax_bits."""
    cdef Py_ssize_t j
    with nogil:
        for j in range(counts.shape[0]):
            add_window(&other[j, 0], (amax_bits[j] >> 20) - (other_bits[j] >> 20), &counts[j, 0])


def count_channels(FloatRows x not None, const int32_t[::1] amax_bits not None,
                   uint32_t[:, ::1] counts not None):
    """Count the magnitudes of each column of x, nowhere above amax_bits, in that channel's window."""
    cdef float scratch[BLOCK]
    cdef Py_ssize_t r, start, n
    cdef Floats row
    with nogil:
        for r in range(x.m):
            row = x.row(r)
            start = 0
            while start < x.k:
                n = block_len(start, x.k)
                kernels.count_windows_row_f32(block_of(&row, start, n, scratch), &amax_bits[start],
                                              &counts[start, 0], n)
                start += n


# Float bits that stand for one cell of a window: the middle of its bin; 0 in the lowest bin of all; in the
# first cell, which also holds what lies lower, the upper edge.
cdef int32_t cell_bits(Py_ssize_t cell, int32_t amax_bits) noexcept nogil:
    cdef Py_ssize_t b = (amax_bits >> 20) - (WINDOW - 1) + cell
    if b <= 0:
        return 0
    return <int32_t> ((b + 1) << 20 if cell == 0 else (b << 20) | (1 << 19))


def channel_percentiles(const uint32_t[:, ::1] counts not None, const int32_t[::1] amax_bits not None,
                        int64_t rank, float[::1] out not None):
    """out[j] = the magnitude at place `rank` in channel j, as its cell gives it, at most the largest."""
    cdef Py_ssize_t j, cell
    cdef int64_t left
    cdef int32_t bits
    with nogil:
        for j in range(counts.shape[0]):
            left, cell = rank, 0
            while cell + 1 < WINDOW and left >= counts[j, cell]:
                left -= counts[j, cell]
                cell += 1
            bits = cell_bits(cell, amax_bits[j])
            out[j] = dq_float(bits if bits < amax_bits[j] else amax_bits[j])
