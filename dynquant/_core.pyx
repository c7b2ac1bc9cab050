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

from dynquant._table cimport WINDOW, Kernels


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


cdef extern from "kernels/simd.h" nogil:
    float dq_float(int32_t b)


cdef enum:
    F32 = 0
    F16 = 1
    BF16 = 2
    NON_FINITE = 0x7F800000
    MOST_DIVIDED = 0x5F800000  # the bits of 2**64
    DIVIDED_ROWS = 32
    COLUMNS = 1024
    BLOCK = 4096
    KEPT = 8192
    SAMPLE = 2048
    SAMPLED = 1 << 16
    RUN = 16 * BLOCK
    STREAM = 1 << 23
    FETCHED_AHEAD = 1 << 13
    MAX_STEPS = 8
    OUT_ROWS = 64
    OUTPUTS = 256
    OUTPUTS_BYTES = 1 << 20
    SEARCH_STEPS = 23


kernels = NULL

WINDOW_CELLS = WINDOW


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


# ---------------------------------------------------------------------------------------------------------
# Input


# Objects that are converted by code of their own may change arrays whose shape was looked at before, and a
# subclass may say any shape: what is about to be read or written is held against the memory itself.
cdef int check_size(Py_ssize_t size, Py_ssize_t needed) except -1:
    if size < needed:
        from dynquant.errors import LayoutError

        raise LayoutError(f"expected an array that keeps its size in a call, got {size} instead of {needed}")
    return 0


# One is made in every call, and can be part of no reference cycle.
@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class FloatRows:
    """m rows of k floats that follow each other in `x`, a C-contiguous array of the format `kind`."""

    cdef Py_buffer view
    cdef int kind
    cdef readonly Py_ssize_t m, k

    def __cinit__(self, x not None, int kind, Py_ssize_t m, Py_ssize_t k):
        self.kind, self.m, self.k = kind, m, k
        PyObject_GetBuffer(x, &self.view, PyBUF_SIMPLE)
        check_size(self.view.len, m * k * (4 if kind == F32 else 2))

    def __dealloc__(self):
        PyBuffer_Release(&self.view)

    cdef Floats row(self, Py_ssize_t r) noexcept nogil:
        cdef Floats x = self.flat()
        x.n = self.k
        x.data += r * self.k * (4 if self.kind == F32 else 2)
        return x

    cdef Floats flat(self) noexcept nogil:
        cdef Floats x
        x.kind = self.kind
        x.n = self.m * self.k
        x.data = <const char*> self.view.buf
        return x


# A typed memoryview, which also knows shape and dtype, takes three times as long to make, and that is as long
# as quantising a thousand floats.
@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class Memory:
    """The memory of an array, kept while this lives; unless told otherwise, writable and C-contiguous."""

    cdef Py_buffer view

    def __cinit__(self, array not None, int flags=PyBUF_WRITABLE):
        PyObject_GetBuffer(array, &self.view, flags)

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


def fits(out not None, tuple shape not None, tuple inputs not None):
    """Whether `out` is a writable, aligned, C-contiguous array of `shape` that is apart from `inputs`.

    False where any of these is more than a plain array: then it is to be looked at closely.
    """
    cdef Memory x, y
    cdef Py_ssize_t i, n = len(shape)
    try:
        x = Memory(out, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS)
    except (ValueError, BufferError):
        return False
    if x.view.ndim != n or <size_t> x.view.buf % <size_t> x.view.itemsize:
        return False
    for i in range(n):
        if x.view.shape[i] != shape[i]:
            return False
    for i in range(len(inputs)):
        if inputs[i] is None or i and inputs[i] is inputs[i - 1]:
            continue
        if type(inputs[i]) is not type(out):
            return False
        y = Memory(inputs[i], PyBUF_STRIDES)
        if not views_apart(&x.view, &y.view):
            return False
    return True


def apart(a not None, b not None):
    """Whether no element of `a`, an array of any layout, lies between the first and the last byte of `b`."""
    cdef Memory x = Memory(a, PyBUF_STRIDES)
    cdef Memory y = Memory(b, PyBUF_STRIDES)
    return views_apart(&x.view, &y.view)


cdef bint views_apart(const Py_buffer* x, const Py_buffer* y) noexcept:
    return x.len == 0 or y.len == 0 or last_byte(x) < first_byte(y) or last_byte(y) < first_byte(x)


cdef const char* first_byte(const Py_buffer* view) noexcept:
    cdef const char* first = <const char*> view.buf
    cdef int i
    for i in range(view.ndim):
        if view.strides[i] < 0:
            first += (view.shape[i] - 1) * view.strides[i]
    return first


cdef const char* last_byte(const Py_buffer* view) noexcept:
    cdef const char* last = <const char*> view.buf + view.itemsize - 1
    cdef int i
    for i in range(view.ndim):
        if view.strides[i] > 0:
            last += (view.shape[i] - 1) * view.strides[i]
    return last


# Floats start .. start + n of x: where they lie, or, n <= BLOCK, widened into scratch.
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


# The same where only scratch is short: float32 is taken at once.
cdef inline Py_ssize_t run_len(const Floats* x, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    return end - start if x.kind == F32 else block_len(start, end)


def filled(type cls not None, data, scales, zero_points, shape, format):
    """A new object of a frozen dataclass with these five slots.

    The dataclass's own way, object.__setattr__ for each, takes as long as quantising a thousand floats.
    """
    tensor = PyType_GenericNew(cls, NULL, NULL)
    PyObject_GenericSetAttr(tensor, "data", data)
    PyObject_GenericSetAttr(tensor, "scales", scales)
    PyObject_GenericSetAttr(tensor, "zero_points", zero_points)
    PyObject_GenericSetAttr(tensor, "shape", shape)
    PyObject_GenericSetAttr(tensor, "format", format)
    return tensor


# ---------------------------------------------------------------------------------------------------------
# Scales


cdef int32_t amax_bits(const Floats* x) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef int32_t b, most = 0
    while start < x.n:
        n = run_len(x, start, x.n)
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
        # The bound is for parts that another thread writes meanwhile: their counts may not add up to rank.
        while b < 2047 and rank >= counts[b]:
            rank -= counts[b]
            b += 1
        prefix = <int32_t> ((prefix << 10) | b)
        shift -= 10
    return prefix


# The same for at most BLOCK floats, or 2 * BLOCK of float32, in passes over L1 that vectorise, and so cost
# less than one pass that increments counters. A rank close to the top is reached from the largest magnitude
# in steps to the next lower one; otherwise the bits are fixed one at a time, from the top, by counting the
# magnitudes below.
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


# The same for one part of many floats. A sample says between which magnitudes the one at `rank` should be,
# and a pass over x keeps those that are; where they are more than there is room for, they give the next
# sample. One pass or two are enough as a rule, near the speed of memory. Where a sample cannot raise the
# lower bound, many values may be equal to it: the next pass leaves these out, and so tells whether the one at
# `rank` is among them. -1 where it is not found so, because of how values are ordered: ranked_bits is not
# called from here, since the scratch of both is more than a small stack has.
cdef int32_t ranked_bits_by_sample(const Floats* x, Py_ssize_t rank) noexcept nogil:
    cdef int32_t kept[KEPT]
    cdef int32_t sample[SAMPLE]
    cdef int32_t low = -1, high = NON_FINITE - 1, equal
    cdef int64_t below = 0
    cdef int finite = 1
    cdef Py_ssize_t found = x.n, i
    for i in range(SAMPLE):
        sample[i] = bits_at(x, i * (x.n // SAMPLE))
    for _ in range(4):
        equal = low
        bracket(sample, <double> (rank - below) / found, &low, &high)
        low += low == equal
        found = keep_between(x, low, high, kept, &below, &finite)
        if not finite:
            return NON_FINITE
        if rank < below and low == equal + 1:
            return equal
        if not below <= rank < below + found:
            break
        if low == high:
            return low
        if found <= KEPT:
            return ranked_of(kept, found, rank - below)
        for i in range(SAMPLE):
            sample[i] = kept[i * (KEPT // SAMPLE)]
    return -1


# Magnitude bits of element i.
cdef inline int32_t bits_at(const Floats* x, Py_ssize_t i) noexcept nogil:
    cdef Floats one
    cdef int32_t bits
    if x.kind == F32:
        memcpy(&bits, x.data + i * <Py_ssize_t> sizeof(float), sizeof(bits))
        return bits & 0x7FFFFFFF
    one = part_of(x, i, 1)
    return amax_bits(&one)


# Bits of the magnitude at `rank` among n <= KEPT.
cdef inline int32_t ranked_of(const int32_t* bits, Py_ssize_t n, Py_ssize_t rank) noexcept nogil:
    cdef Floats x
    x.data, x.kind, x.n = <const char*> bits, F32, n
    return ranked_bits_of_block(&x, rank)


# Narrows the bounds to where the magnitude at `place`, from 0 to 1, of what was sampled should be: four
# standard deviations and a bit to either side.
cdef void bracket(const int32_t* sample, double place, int32_t* low, int32_t* high) noexcept nogil:
    cdef double middle = place * SAMPLE
    cdef Py_ssize_t margin = <Py_ssize_t> (4 * sqrt(middle * (1 - place if place < 1 else 0))) + 4
    cdef Py_ssize_t first = <Py_ssize_t> middle - margin, last = <Py_ssize_t> middle + margin
    if first > 0:
        low[0] = max(low[0], ranked_of(sample, SAMPLE, first))
    if last < SAMPLE:
        high[0] = min(high[0], ranked_of(sample, SAMPLE, last))


cdef Py_ssize_t keep_between(const Floats* x, int32_t low, int32_t high, int32_t* kept, int64_t* below,
                             int* finite) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n, found = 0, room
    below[0] = 0
    while start < x.n:
        n = run_len(x, start, x.n)
        room = KEPT - found if found < KEPT else 0
        found += kernels.keep_between_f32(block_of(x, start, n, scratch), low, high, kept + (KEPT - room),
                                          room, below, finite, n)
        start += n
    return found


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


cpdef Py_ssize_t percentile_rank(double p, Py_ssize_t n) noexcept nogil:
    """Index of percentile p, 0 < p <= 1, by nearest rank among n > 0 ascending magnitudes.

    ``p * n`` is a float32 product up to n = 2**24, beyond which float32 cannot tell neighbouring ranks apart,
    and a float64 product above.
    """
    cdef double product = <double> (<float> p * <float> n) if n <= 1 << 24 else p * <double> n
    cdef Py_ssize_t rank = <Py_ssize_t> ceil(product) - 1
    rank = rank if rank < n else n - 1
    return rank if rank > 0 else 0


# scale[0] = that of one row: its largest magnitude, or the one at `rank` when that is >= 0, over clip.
# Returns False, with scale untouched, if the row is not finite.
cdef bint scale_of(const Floats* x, float clip, Py_ssize_t rank, float* scale) noexcept nogil:
    cdef int32_t bits
    if rank < 0 or rank == x.n - 1:
        bits = amax_bits(x)
    elif x.n <= BLOCK:
        bits = ranked_bits_of_block(x, rank)
    elif x.n < SAMPLED:
        bits = ranked_bits(x, 1, rank)
    else:
        bits = ranked_bits_by_sample(x, rank)
        if bits < 0:
            bits = ranked_bits(x, 1, rank)
    if bits >= NON_FINITE:
        return False
    scale[0] = dq_float(bits) / clip
    return True


# Floats start .. start + n of x, as floats of their own.
cdef inline Floats part_of(const Floats* x, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    cdef Floats part
    part.kind = x.kind
    part.data = x.data + start * (4 if x.kind == F32 else 2)
    part.n = n
    return part


# The end of the group that holds element i, or `end` where that comes first.
cdef inline Py_ssize_t group_end(Py_ssize_t i, Py_ssize_t group, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t next = (i // group + 1) * group
    return next if next < end else end


# scale_of for each group of one row; `last_rank` is that among the elements of the last group.
cdef bint group_scales(const Floats* x, float clip, Py_ssize_t rank, Py_ssize_t last_rank, Py_ssize_t group,
                       float* scales) noexcept nogil:
    cdef Py_ssize_t start = 0, end
    cdef Floats part
    if x.n <= group:
        return scale_of(x, clip, last_rank, scales)
    while start < x.n:
        end = group_end(start, group, x.n)
        part = part_of(x, start, end - start)
        if not scale_of(&part, clip, last_rank if end == x.n else rank, &scales[start // group]):
            return False
        start = end
    return True


def scale_rows(FloatRows x not None, scales not None, float clip, Py_ssize_t rank,
               Py_ssize_t last_rank, Py_ssize_t group, Py_ssize_t first=0, Py_ssize_t end=PY_SSIZE_T_MAX):
    """The scales of rows first .. end; returns whether they are finite, and stops at a row that is not."""
    cdef Memory s = Memory(scales)
    cdef Py_ssize_t r, groups = s.view.len // <Py_ssize_t> sizeof(float) // (x.m or 1)
    cdef Floats row
    cdef bint finite = True
    if groups == 0:
        return True
    with nogil:
        for r in range(first, end if end < x.m else x.m):
            row = x.row(r)
            finite = group_scales(&row, clip, rank, last_rank, group, <float*> s.view.buf + r * groups)
            if not finite:
                break
    return finite


# ---------------------------------------------------------------------------------------------------------
# Codes


# Codes come as one run of bytes, row after row.
cdef inline Py_ssize_t bytes_of_row(Py_ssize_t k, bint packed) noexcept nogil:
    return (k + 1) // 2 if packed else k


# Of m rows of k elements.
cdef int check_codes(Py_ssize_t m, Py_ssize_t k, bint packed, Py_ssize_t group, Py_ssize_t codes,
                     Py_ssize_t scales, const uint8_t[::1] zero_points) except -1:
    cdef Py_ssize_t groups = m * ((k + group - 1) // group)
    check_size(codes, m * bytes_of_row(k, packed))
    check_size(scales, groups)
    if zero_points is not None:
        check_size(zero_points.shape[0], groups)
    return 0


# Row r of a tensor with rows of k elements.
cdef inline QuantRow quant_row(const int8_t* codes, const float* scales, const uint8_t* zero_points,
                               bint packed, Py_ssize_t group, Py_ssize_t k, Py_ssize_t r) noexcept nogil:
    cdef QuantRow row
    cdef Py_ssize_t groups = (k + group - 1) // group
    row.codes = <int8_t*> codes + r * bytes_of_row(k, packed)
    row.scales = scales + r * groups
    row.zero_points = NULL
    if zero_points != NULL:
        row.zero_points = zero_points + r * groups
    row.group, row.packed, row.within = group, packed, False
    return row


# Codes, a byte each, of floats start .. start + n, n <= BLOCK unless they are float32; zeros where the scale
# is 0.
cdef void code_block(const Floats* x, const QuantRow* row, Py_ssize_t start, Py_ssize_t n, int32_t clip,
                     bint stream, int8_t* codes) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef const float* block = block_of(x, start, n, scratch)
    cdef Py_ssize_t i = start, g, end
    cdef float scale
    while i < start + n:
        g = i // row.group
        end = group_end(i, row.group, start + n)
        scale = row.scales[g]
        if scale == 0:
            memset(codes, 0, end - i)
        elif row.zero_points == NULL:
            kernels.quantize_row_f32_s8(block, scale, clip, row.within, stream, codes, end - i)
        else:
            kernels.quantize_row_f32_u4(block, scale, row.zero_points[g], codes, end - i)
        block += end - i
        codes += end - i
        i = end


# Codes of floats start .. end of one row. A row that the caches cannot hold anyway has its codes written past
# them.
cdef void code_run(const Floats* x, const QuantRow* row, Py_ssize_t start, Py_ssize_t end,
                   int32_t clip) noexcept nogil:
    cdef int8_t block[BLOCK]
    cdef Py_ssize_t n
    while start < end:
        n = block_len(start, end) if row.packed else run_len(x, start, end)
        if row.packed:
            code_block(x, row, start, n, clip, False, block)
            kernels.pack_row_s8_s4(block, <uint8_t*> row.codes + start // 2, n)
        else:
            code_block(x, row, start, n, clip, row.group >= STREAM, row.codes + start)
        start += n


# Codes of one row, its last run of 256 KiB first: what the pass for the scale read last is still in a core's
# own cache, and what this one reads last is there for the next. Shorter runs would undo the hardware's
# prefetching.
cdef void code_row(const Floats* x, const QuantRow* row, int32_t clip) noexcept nogil:
    cdef Py_ssize_t start = x.n - x.n % RUN
    while start >= 0:
        code_run(x, row, start, x.n if x.n - start < RUN else start + RUN, clip)
        start -= RUN


def code_rows(FloatRows x not None, scales not None, const uint8_t[::1] zero_points, int clip, bint within,
              bint packed, Py_ssize_t group, codes not None, Py_ssize_t first=0,
              Py_ssize_t end=PY_SSIZE_T_MAX):
    """Codes of rows first .. end, each group by its own scale; returns True.

    `within`: the scales are those of the largest magnitudes.
    """
    cdef Py_ssize_t r
    cdef Floats row
    cdef QuantRow q
    cdef Memory s = Memory(scales)
    cdef Memory c = Memory(codes)
    cdef const uint8_t* z = NULL
    if x.m == 0 or x.k == 0:
        return True
    check_codes(x.m, x.k, packed, group, c.view.len, s.view.len // <Py_ssize_t> sizeof(float), zero_points)
    if zero_points is not None:
        z = &zero_points[0]
    with nogil:
        for r in range(first, end if end < x.m else x.m):
            row = x.row(r)
            q = quant_row(<int8_t*> c.view.buf, <float*> s.view.buf, z, packed, group, x.k, r)
            q.within = within
            code_row(&row, &q, clip)
    return True


def quantize_rows(FloatRows x not None, scales not None, int clip, Py_ssize_t rank, Py_ssize_t last_rank,
                  bint packed, Py_ssize_t group, codes not None, Py_ssize_t first=0,
                  Py_ssize_t end=PY_SSIZE_T_MAX):
    """Scales and codes of rows first .. end; a row's second pass reads from cache.

    Returns whether they are finite; stops at a row that is not, with the rows before it written.
    """
    cdef Py_ssize_t r
    cdef Floats row
    cdef QuantRow q
    cdef Memory s = Memory(scales)
    cdef Memory c = Memory(codes)
    cdef bint finite = True
    if x.m == 0 or x.k == 0:
        memset(s.view.buf, 0, s.view.len)
        return True
    check_codes(x.m, x.k, packed, group, c.view.len, s.view.len // <Py_ssize_t> sizeof(float), None)
    with nogil:
        for r in range(first, end if end < x.m else x.m):
            row = x.row(r)
            q = quant_row(<int8_t*> c.view.buf, <float*> s.view.buf, NULL, packed, group, x.k, r)
            q.within = rank < 0
            finite = group_scales(&row, clip, rank, last_rank, group, <float*> q.scales)
            if not finite:
                break
            code_row(&row, &q, clip)
    return finite


# ---------------------------------------------------------------------------------------------------------
# Ranges of weights


# Scale, and zero point unless that is NULL, of codes for the range [least, most] around 0: symmetric codes in
# [-levels, levels], or codes in [0, levels]. `most` is not -0.0, so neither is the scale.
cdef void range_codes(float least, float most, int levels, float* scale, uint8_t* zero_point) noexcept nogil:
    cdef float z
    if zero_point == NULL:
        scale[0] = (most if most >= -least else -least) / levels
        return
    scale[0] = (most - least) / levels
    zero_point[0] = 0
    if scale[0] > 0:
        z = -least / scale[0] + <float> 0.499999970197677612
        zero_point[0] = <uint8_t> (levels if z > levels else z)


# Squared error of x coded as `row` says, one group.
cdef double square_error(const Floats* x, const QuantRow* row, int clip) noexcept nogil:
    cdef int8_t codes[BLOCK]
    cdef float value[BLOCK]
    cdef float scratch[BLOCK]
    cdef double sums[6]
    cdef Py_ssize_t start = 0, n
    cdef QuantRow coded = row[0]
    coded.codes, coded.packed = codes, False
    memset(sums, 0, sizeof(sums))
    while start < x.n:
        n = block_len(start, x.n)
        code_block(x, &coded, start, n, clip, False, codes)
        value_block(&coded, 0, False, value, n)
        kernels.error_sums_row_f32_f64(block_of(x, start, n, scratch), value, sums, n)
        start += n
    return sums[1]


# Scale and zero point of one group, of its range or, with `search`, of that range times the one of 1, 31/32,
# ..., 10/32 which leaves the least squared error; the largest of equals.
cdef void fit_group(const Floats* x, int levels, bint search, float* scale,
                    uint8_t* zero_point) noexcept nogil:
    cdef float least = 0, most = 0, t, best_scale
    cdef float scratch[BLOCK]
    cdef uint8_t best_zero_point = 0
    cdef double error, best = -1
    cdef Py_ssize_t start = 0, n
    cdef int i
    cdef QuantRow row
    while start < x.n:
        n = block_len(start, x.n)
        kernels.min_max_row_f32(block_of(x, start, n, scratch), &least, &most, n)
        start += n
    range_codes(least, most, levels, scale, zero_point)
    if not search:
        return
    best_scale = scale[0]
    row.scales, row.zero_points, row.group, row.within = scale, zero_point, x.n, False
    for i in range(SEARCH_STEPS):
        t = <float> (1 - i / 32.0)
        range_codes(least * t, most * t, levels, scale, zero_point)
        error = square_error(x, &row, levels)
        if best < 0 or error < best:
            best, best_scale = error, scale[0]
            if zero_point != NULL:
                best_zero_point = zero_point[0]
    scale[0] = best_scale
    if zero_point != NULL:
        zero_point[0] = best_zero_point


def fit_rows(FloatRows x not None, float[::1] scales not None, uint8_t[::1] zero_points, int levels,
             bint search, Py_ssize_t group, Py_ssize_t first=0, Py_ssize_t end=PY_SSIZE_T_MAX):
    """Scales, and zero points if given, of the groups of finite rows first .. end; returns True."""
    cdef Py_ssize_t r, g, start, stop, groups = (x.k + group - 1) // group
    cdef Floats row, part
    cdef uint8_t* z = NULL
    with nogil:
        for r in range(first, end if end < x.m else x.m):
            row = x.row(r)
            for g in range(groups):
                start = g * group
                stop = group_end(start, group, x.k)
                part = part_of(&row, start, stop - start)
                if zero_points is not None:
                    z = &zero_points[r * groups + g]
                fit_group(&part, levels, search, &scales[r * groups + g], z)
    return True


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


# Values start .. start + n of one row, n <= BLOCK where it is packed; past the caches with `stream`.
cdef void value_block(const QuantRow* row, Py_ssize_t start, bint stream, float* out,
                      Py_ssize_t n) noexcept nogil:
    cdef int8_t unpacked[BLOCK + 1]
    cdef int8_t* codes = row.codes + start
    cdef Py_ssize_t i = start, g, end, odd = start % 2
    if row.packed:
        kernels.unpack_row_s4_s8(<const uint8_t*> row.codes + start // 2, unpacked, n + odd)
        codes = unpacked + odd
    while i < start + n:
        g = i // row.group
        end = group_end(i, row.group, start + n)
        if row.zero_points != NULL:
            kernels.shift_row_u4_s8(codes, row.zero_points[g], end - i)
        kernels.dequantize_row_s8_f32(codes, row.scales[g], stream, out, end - i)
        codes += end - i
        out += end - i
        i = end


cdef void value_row(const QuantRow* row, bint stream, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t start = 0, count
    while start < n:
        count = block_len(start, n) if row.packed else n
        value_block(row, start, stream, out + start, count)
        start += count


def dequantize_rows(const int8_t[::1] codes not None, const float[::1] scales not None,
                    const uint8_t[::1] zero_points, bint packed, Py_ssize_t group,
                    float[:, ::1] out not None):
    """out = codes * scales; with zero points, for packed codes only, (codes - zero_points) * scales."""
    cdef Py_ssize_t r, k = out.shape[1]
    # Not in short groups: each of them would wait until its values have arrived.
    cdef bint stream = out.shape[0] * k >= STREAM and group >= BLOCK
    cdef QuantRow q
    cdef const uint8_t* z = NULL
    if out.shape[0] == 0 or k == 0:
        return
    check_codes(out.shape[0], k, packed, group, codes.shape[0], scales.shape[0], zero_points)
    if zero_points is not None:
        z = &zero_points[0]
    with nogil:
        for r in range(out.shape[0]):
            q = quant_row(&codes[0], &scales[0], z, packed, group, k, r)
            value_row(&q, stream, &out[r, 0], k)


# Rows of k codes, as QuantRow has one.
cdef struct Quantized:
    const int8_t* codes
    const float* scales
    const uint8_t* zero_points
    bint packed
    Py_ssize_t group
    Py_ssize_t k


# The values of elements start .. start + n of all rows, n <= BLOCK, of k each.
cdef void values_of_rows(const Quantized* q, Py_ssize_t start, float* value, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t end = start + n, stop
    cdef QuantRow row
    while start < end:
        row = quant_row(q.codes, q.scales, q.zero_points, q.packed, q.group, q.k, start // q.k)
        stop = min(end, (start // q.k + 1) * q.k)
        value_block(&row, start % q.k, False, value, stop - start)
        value += stop - start
        start = stop


cdef Quantized quantized(FloatRows x, const int8_t[::1] codes, const float[::1] scales,
                         const uint8_t[::1] zero_points, bint packed, Py_ssize_t group) except *:
    cdef Quantized q
    check_codes(x.m, x.k, packed, group, codes.shape[0], scales.shape[0], zero_points)
    q.codes, q.scales, q.zero_points = &codes[0], &scales[0], NULL
    if zero_points is not None:
        q.zero_points = &zero_points[0]
    q.packed, q.group, q.k = packed, group, x.k
    return q


def sum_abs_error(FloatRows x not None, const int8_t[::1] codes not None, const float[::1] scales not None,
                  const uint8_t[::1] zero_points, bint packed, Py_ssize_t group):
    """Sum of |x - value| over all elements, at least one, in double; `value` as dequantize_rows has it."""
    cdef float value[BLOCK]
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef Floats flat = x.flat()
    cdef Quantized q = quantized(x, codes, scales, zero_points, packed, group)
    cdef double total = 0
    with nogil:
        while start < flat.n:
            n = block_len(start, flat.n)
            values_of_rows(&q, start, value, n)
            total += kernels.abs_error_row_f32_f64(block_of(&flat, start, n, scratch), value, n)
            start += n
    return total


# Adds the sums of stats.pxi for x against `values` or, where these are NULL, against those of the codes:
# to sums[r] for the elements from r * length on.
cdef void add_error_sums(const Floats* x, const Floats* values, const Quantized* q, Py_ssize_t length,
                         double[:, ::1] sums) noexcept nogil:
    cdef float value[BLOCK]
    cdef float scratch[BLOCK]
    cdef const float* other = value
    cdef Py_ssize_t start = 0, end = length, n, r = 0
    while start < x.n:
        n = block_len(start, end)
        if values != NULL:
            other = block_of(values, start, n, value)
        else:
            values_of_rows(q, start, value, n)
        kernels.error_sums_row_f32_f64(block_of(x, start, n, scratch), other, &sums[r, 0], n)
        start += n
        if start == end:
            end += length
            r += 1


def error_sums(FloatRows x not None, const int8_t[::1] codes not None, const float[::1] scales not None,
               const uint8_t[::1] zero_points, bint packed, Py_ssize_t group, Py_ssize_t length,
               double[:, ::1] sums not None):
    """The sums of stats.pxi for x, not empty, against values of codes: a row for each `length` elements."""
    cdef Floats flat = x.flat()
    cdef Quantized q = quantized(x, codes, scales, zero_points, packed, group)
    with nogil:
        add_error_sums(&flat, NULL, &q, length, sums)


def error_sums_of(FloatRows x not None, FloatRows values not None, Py_ssize_t length,
                  double[:, ::1] sums not None):
    """The same for x against floats."""
    cdef Floats flat = x.flat(), value = values.flat()
    with nogil:
        add_error_sums(&flat, &value, NULL, length, sums)


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


# out = x / factors or x * factors for m rows of k, some columns at a time; out may be x itself. Several rows
# share the reciprocals of what they are divided by; no |x| of theirs is then above 2**64.
cdef void scale_columns_of_block(const Floats* x, const float* factors, bint divide, float* out, Py_ssize_t m,
                                 Py_ssize_t k) noexcept nogil:
    cdef float scratch[COLUMNS]
    cdef float reciprocals[COLUMNS]
    cdef const float* shared = NULL
    cdef const float* part
    cdef Py_ssize_t start = 0, n, r, i
    while start < k:
        n = k - start if k - start < COLUMNS else COLUMNS
        if divide and m > 1:
            shared = reciprocals if kernels.reciprocals_f32(factors + start, reciprocals, n) else NULL
        for r in range(m):
            i = r * k + start
            part = block_of(x, i, n, scratch)
            if divide:
                kernels.divide_row_f32(part, factors + start, shared, k, out + i, n)
            else:
                kernels.multiply_row_f32(part, factors + start, out + i, n)
        start += n


# The same for any number of rows, several at a time if `together`. The last rows are first: the search for
# NaN has just read them.
cdef void scale_columns_of_finite(const Floats* x, const float* factors, bint divide, bint together,
                                  float* out, Py_ssize_t m, Py_ssize_t k) noexcept nogil:
    # Fewer than four do not make up for the reciprocals.
    cdef Py_ssize_t most = DIVIDED_ROWS if together and m >= 4 else 1, rows
    cdef Floats part
    while m > 0:
        rows = m if m < most else most
        m -= rows
        part = part_of(x, m * k, rows * k)
        scale_columns_of_block(&part, factors, divide, out + m * k, rows, k)


# out = x / factors or x * factors for m rows of k, factors above 0; out may be x itself. Returns whether x is
# finite; where it is not, nothing is done. Of short rows many are taken as one, their factors side by side.
cdef bint scale_columns_of_rows(const Floats* x, const float* factors, bint divide, float* out, Py_ssize_t m,
                                Py_ssize_t k) noexcept nogil:
    cdef float side_by_side[COLUMNS]
    cdef int32_t bits = amax_bits(x)
    cdef bint together = not divide or bits <= MOST_DIVIDED
    cdef Py_ssize_t many = COLUMNS // k if k else 1, rest, i
    cdef Floats part
    if bits >= NON_FINITE:
        return False
    if k == 0:
        return True
    many = many if many < m else m
    if many <= 1:
        scale_columns_of_finite(x, factors, divide, together, out, m, k)
        return True
    for i in range(many):
        memcpy(side_by_side + i * k, factors, k * sizeof(float))
    rest = m % many * k
    scale_columns_of_finite(x, side_by_side, divide, together, out, m // many, many * k)
    part = part_of(x, m * k - rest, rest)
    scale_columns_of_finite(&part, side_by_side, divide, together, out + m * k - rest, 1, rest)
    return True


def scale_columns(FloatRows x not None, factors not None, bint divide, out not None):
    """out = x / factors or x * factors, row by row; out may be x itself. Returns whether x is finite."""
    cdef Floats flat = x.flat()
    cdef Memory f = Memory(factors, PyBUF_SIMPLE)
    cdef Memory o = Memory(out)
    cdef bint finite
    check_size(f.view.len, x.k * <Py_ssize_t> sizeof(float))
    check_size(o.view.len, flat.n * <Py_ssize_t> sizeof(float))
    with nogil:
        finite = scale_columns_of_rows(&flat, <const float*> f.view.buf, divide, <float*> o.view.buf,
                                       x.m, x.k)
    return finite


# Rotate every run of `block` elements of x (n,), in place; block divides n.
cdef void rotate(float* x, Py_ssize_t n, Py_ssize_t block) noexcept nogil:
    cdef float scale = <float> (1.0 / sqrt(<double> block))
    cdef Py_ssize_t i
    for i in range(n // block):
        kernels.hadamard_row_f32(x + i * block, block, scale)


def hadamard(float[::1] x not None, Py_ssize_t block):
    """Transform every run of `block` elements, in place."""
    if x.shape[0]:
        with nogil:
            rotate(&x[0], x.shape[0], block)


def all_finite(FloatRows x not None):
    """Whether no element is NaN or infinite."""
    cdef Floats flat = x.flat()
    cdef int32_t bits
    with nogil:
        bits = amax_bits(&flat)
    return bits < NON_FINITE


def all_positive(x not None):
    """Whether every element of a float32 vector, all of which are finite, is above 0."""
    cdef Memory v = Memory(x, PyBUF_SIMPLE)
    cdef float least = INFINITY, most = 0
    cdef Py_ssize_t n = v.view.len // <Py_ssize_t> sizeof(float)
    kernels.min_max_row_f32(<const float*> v.view.buf, &least, &most, n)
    return least > 0


# ---------------------------------------------------------------------------------------------------------
# Integer products


def w8a8_matvec(const int8_t[:, ::1] weight not None, const float[::1] weight_scales not None,
                const int8_t[::1] activation not None, float activation_scale, float[::1] out not None):
    """out[r] = float32(weight[r] . activation) * weight_scales[r] * activation_scale."""
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        return
    check_size(activation.shape[0], weight.shape[1])
    check_size(weight_scales.shape[0], weight.shape[0])
    check_size(out.shape[0], weight.shape[0])
    check_size(weight.shape[0], out.shape[0])
    with nogil:
        kernels.matvec_s8s8_f32(&weight[0, 0], &weight_scales[0], &activation[0], activation_scale, &out[0],
                                weight.shape[0], weight.shape[1])


cdef Py_ssize_t panels_of(Py_ssize_t n) noexcept nogil:
    return (n + kernels.panel_outputs - 1) // kernels.panel_outputs


# Outputs, of n, of the panel that starts at c.
cdef inline Py_ssize_t outputs_of(Py_ssize_t n, Py_ssize_t c) noexcept nogil:
    return n - c if n - c < kernels.panel_outputs else kernels.panel_outputs


# w (n, k), k > 0 -> panels, panels_of(n) of them.
cdef void pack_panels(const int8_t* w, Py_ssize_t n, uint8_t* panels, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t p, c
    for p in range(panels_of(n)):
        c = p * kernels.panel_outputs
        kernels.pack_panel_s8(w + c * k, outputs_of(n, c), panels + p * kernels.panel_bytes(k), k)


# Scales, or zero points, of one panel of 4-bit weights.
cdef inline Py_ssize_t panel_scales(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return kernels.panel_outputs * ((k + group - 1) // group)


# w (n, ceil(k / 2)), k > 0, scales and zero_points (n, groups) -> the same of all panels, as pack_panel_u4.
cdef void pack_group_panels(const uint8_t* w, const float* scales, const uint8_t* zero_points, Py_ssize_t n,
                            uint8_t* panels, float* panels_scales, uint8_t* panels_zero_points, Py_ssize_t k,
                            Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t groups = (k + group - 1) // group, each = panel_scales(k, group), p, c
    cdef const uint8_t* z = NULL
    for p in range(panels_of(n)):
        c = p * kernels.panel_outputs
        if zero_points != NULL:
            z = zero_points + c * groups
        kernels.pack_panel_u4(w + c * ((k + 1) // 2), scales + c * groups, z, outputs_of(n, c),
                              panels + p * kernels.group_panel_bytes(k, group), panels_scales + p * each,
                              panels_zero_points + p * each, k, group)


# x / factors, rotated in runs of `block` elements, in `prepared`; x itself where factors is NULL and block 0.
cdef Floats prepared_row(Floats x, const float* factors, Py_ssize_t block, float* prepared) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    if factors == NULL and block == 0:
        return x
    if factors != NULL:
        scale_columns_of_block(&x, factors, True, prepared, 1, x.n)
    else:
        while start < x.n:
            n = block_len(start, x.n)
            memcpy(prepared + start, block_of(&x, start, n, scratch), n * sizeof(float))
            start += n
    if block:
        rotate(prepared, x.n, block)
    x.data, x.kind = <const char*> prepared, F32
    return x


# Codes of one row in the form that gemm_s8s8_f32 takes.
cdef void code_activation(const Floats* x, float scale, uint8_t* a) noexcept nogil:
    cdef int8_t codes[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef QuantRow q
    q.scales, q.zero_points, q.group, q.within = &scale, NULL, x.n, True
    while start < x.n:
        n = block_len(start, x.n)
        code_block(x, &q, start, n, 127, False, codes)
        kernels.pack_activation_s8(codes, a, start, n, x.n)
        start += n


# The same in the form that gemm_u4s8_f32 takes; codes (x.n,) is scratch.
cdef void code_group_activation(const Floats* x, float scale, Py_ssize_t group, int8_t* codes,
                                uint8_t* a) noexcept nogil:
    cdef QuantRow q
    q.codes, q.scales, q.zero_points, q.group, q.packed, q.within = codes, &scale, NULL, x.n, False, True
    code_run(x, &q, 0, x.n, 127)
    kernels.pack_group_activation_s8(codes, a, x.n, group)


# Memory that starts at a cache line: vectors that straddle two of them load at half the speed.
cdef struct Aligned:
    void* block
    uint8_t* data


cdef Aligned aligned_memory(Py_ssize_t n) except *:
    cdef Aligned memory
    memory.block = PyMem_RawMalloc(n + 63)
    if memory.block == NULL:
        raise MemoryError
    dq_prefer_large_pages(memory.block, n + 63)
    memory.data = <uint8_t*> memory.block + (-<Py_ssize_t> memory.block & 63)
    return memory


@cython.final
@cython.no_gc
cdef class Activations:
    """Quantised rows of activations, at most m at a time, for one PackedLinear; and scratch for one row."""
    cdef Aligned memory
    cdef float* prepared
    cdef float* scales
    cdef int8_t* codes
    cdef Py_ssize_t m, room

    # All that quantize needs, so that it cannot fail when some rows of a result are written.
    def __cinit__(self, PackedLinear layer not None, Py_ssize_t m):
        cdef Py_ssize_t rows = m * layer.activation_bytes()
        self.room = m
        self.memory = aligned_memory(rows + (layer.k + m) * <Py_ssize_t> sizeof(float) + layer.k)
        self.prepared = <float*> (self.memory.data + rows)
        self.scales = self.prepared + layer.k
        self.codes = <int8_t*> (self.scales + m)

    def __dealloc__(self):
        PyMem_RawFree(self.memory.block)


# What a linear layer consists of, in the form that the kernels of one instruction set take.
@cython.final
cdef class PackedLinear:
    """n outputs of k > 0 inputs: int8 weights, a scale for each output; or with a `group` > 0 4-bit weights.

    Inputs are divided by `factors`, if there are any, and then rotated in runs of `block`, if that is not 0.
    """
    cdef Py_ssize_t n, k, group, block
    cdef Aligned memory
    cdef uint8_t* panels
    cdef float* scales
    cdef uint8_t* zero_points
    cdef const float[::1] bias, factors
    cdef readonly Py_ssize_t panel_count, weight_bytes

    def __cinit__(self, Py_ssize_t n, Py_ssize_t k, Py_ssize_t group, const float[::1] bias,
                  const float[::1] factors, Py_ssize_t block):
        cdef Py_ssize_t panels, scales = 0, zero_points = 0
        self.n, self.k, self.group, self.block = n, k, group, block
        self.bias, self.factors = bias, factors
        self.panel_count = panels_of(n)
        panels = self.panel_count * self.panel_bytes()
        if group:
            zero_points = self.panel_count * panel_scales(k, group)
        scales = (zero_points if group else n) * <Py_ssize_t> sizeof(float)
        self.weight_bytes = panels + scales + zero_points
        self.memory = aligned_memory(self.weight_bytes)
        self.panels = self.memory.data
        self.scales = <float*> (self.panels + panels)
        self.zero_points = self.panels + panels + scales

    def __dealloc__(self):
        PyMem_RawFree(self.memory.block)

    cdef Py_ssize_t panel_bytes(self) noexcept nogil:
        if self.group:
            return kernels.group_panel_bytes(self.k, self.group)
        return kernels.panel_bytes(self.k)

    cpdef Py_ssize_t activation_bytes(self):
        """Bytes that a row of activations takes when quantised."""
        if self.group:
            return kernels.group_activation_bytes(self.k, self.group)
        return kernels.activation_bytes(self.k)

    def pack_int8(self, const int8_t[:, ::1] weight not None, const float[::1] scales not None):
        """Fill in the weights of a layer with group 0."""
        check_size(weight.shape[0] * weight.shape[1], self.n * self.k)
        check_size(scales.shape[0], self.n)
        with nogil:
            memcpy(self.scales, &scales[0], self.n * sizeof(float))
            pack_panels(&weight[0, 0], self.n, self.panels, self.k)

    def unpack_int8(self, int8_t[:, ::1] weight not None, float[::1] scales not None):
        """The inverse of pack_int8."""
        cdef Py_ssize_t p, c
        with nogil:
            memcpy(&scales[0], self.scales, self.n * sizeof(float))
            for p in range(self.panel_count):
                c = p * kernels.panel_outputs
                kernels.unpack_panel_s8(self.panels + p * self.panel_bytes(), &weight[c, 0],
                                        outputs_of(self.n, c), self.k)

    def pack_int4(self, const uint8_t[:, ::1] codes not None, const float[:, ::1] scales not None,
                  const uint8_t[:, ::1] zero_points):
        """Fill in the weights of a layer with groups; symmetric where zero_points is None."""
        cdef const uint8_t* z = NULL
        cdef Py_ssize_t groups = self.n * ((self.k + self.group - 1) // self.group)
        check_size(codes.shape[0] * codes.shape[1], self.n * bytes_of_row(self.k, True))
        check_size(scales.shape[0] * scales.shape[1], groups)
        if zero_points is not None:
            check_size(zero_points.shape[0] * zero_points.shape[1], groups)
            z = &zero_points[0, 0]
        with nogil:
            pack_group_panels(&codes[0, 0], &scales[0, 0], z, self.n, self.panels, self.scales,
                              self.zero_points, self.k, self.group)

    def unpack_int4(self, uint8_t[:, ::1] codes not None, float[:, ::1] scales not None,
                    uint8_t[:, ::1] zero_points):
        """The inverse of pack_int4."""
        cdef Py_ssize_t each = panel_scales(self.k, self.group), p, c
        cdef uint8_t* z = NULL
        with nogil:
            for p in range(self.panel_count):
                c = p * kernels.panel_outputs
                if zero_points is not None:
                    z = &zero_points[c, 0]
                kernels.unpack_panel_u4(self.panels + p * self.panel_bytes(), self.scales + p * each,
                                        self.zero_points + p * each, &codes[c, 0], &scales[c, 0], z,
                                        outputs_of(self.n, c), self.k, self.group)

    def quantize(self, FloatRows x not None, Activations a not None):
        """Quantise the rows of x into `a`; returns whether they are finite, and stops at one that is not."""
        cdef Py_ssize_t r, width = self.activation_bytes()
        cdef Floats row
        cdef bint finite = True
        cdef const float* factors = NULL
        check_size(a.room, x.m)
        check_size(x.k, self.k)
        if self.factors is not None:
            factors = &self.factors[0]
        a.m = x.m
        with nogil:
            for r in range(x.m):
                row = prepared_row(x.row(r), factors, self.block, a.prepared)
                finite = scale_of(&row, 127, -1, &a.scales[r])
                if not finite:
                    break
                if self.group:
                    code_group_activation(&row, a.scales[r], self.group, a.codes, a.memory.data + r * width)
                else:
                    code_activation(&row, a.scales[r], a.memory.data + r * width)
        return finite

    def multiply(self, Activations a not None, float[:, ::1] out not None, Py_ssize_t first=0,
                 Py_ssize_t end=PY_SSIZE_T_MAX):
        """out = a . weights + bias for the outputs of panels first .. end; returns True."""
        cdef const float* bias = NULL
        if a.m == 0:
            return True
        check_size(out.shape[0] * out.shape[1], a.m * self.n)
        if self.bias is not None:
            bias = &self.bias[0]
        with nogil:
            if self.group:
                multiply_group_panels(self.panels, self.scales, self.zero_points, bias, a.memory.data,
                                      a.scales, &out[0, 0], a.m, self.n, self.k, self.group, first, end)
            else:
                multiply_panels(self.panels, self.scales, bias, a.memory.data, a.scales,
                                &out[0, 0], a.m, self.n, self.k, first, end)
        return True


# As how many rows of the result a product takes its m rows together: all of them, or nearly equal parts, of
# whole tiles of 16.
#
# A panel's outputs of one row are a line or two of the result, a whole row of it away from those of the next
# row. A core's prefetchers follow some 64 rows that way; with more of them each line is waited for, which
# made wide layers with few inputs two to five times slower. So when there are more, a part of the rows is
# taken at a time, and as many outputs as make the run written to each row at least 1 KiB: their weights,
# which the next part of the rows meets again, should not leave a core's own cache, and 2 KiB are enough.
cdef inline Py_ssize_t rows_together(Py_ssize_t m) noexcept nogil:
    cdef Py_ssize_t parts = (m + OUT_ROWS - 1) // OUT_ROWS
    return m if parts < 2 else (m + 16 * parts - 1) // (16 * parts) * 16


cdef inline Py_ssize_t outputs_together(Py_ssize_t m, Py_ssize_t k, Py_ssize_t left) noexcept nogil:
    cdef Py_ssize_t most = 2 * OUTPUTS if 2 * OUTPUTS * k <= OUTPUTS_BYTES else OUTPUTS
    return left if m <= OUT_ROWS or left < most else most


# out (m, n) = a . weights + bias for the outputs of panels first .. end; no bias where it is NULL.
cdef void multiply_panels(const uint8_t* panels, const float* w_scales, const float* bias, const uint8_t* a,
                          const float* a_scales, float* out, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k,
                          Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t width = kernels.panel_bytes(k), stride = kernels.activation_bytes(k)
    cdef Py_ssize_t rows = rows_together(m), c = first * kernels.panel_outputs, cols, r
    cdef Py_ssize_t last = end * kernels.panel_outputs if end < panels_of(n) else n
    while c < last:
        cols, r = outputs_together(m, k, last - c), 0
        while r < m:
            kernels.gemm_s8s8_f32(panels + c // kernels.panel_outputs * width, w_scales + c,
                                  NULL if bias == NULL else bias + c, a + r * stride, a_scales + r,
                                  out + r * n + c, n, rows if m - r > rows else m - r, cols, k)
            r += rows
        c += cols


# The same for 4-bit weights.
cdef void multiply_group_panels(const uint8_t* panels, const float* scales, const uint8_t* zero_points,
                                const float* bias, const uint8_t* a, const float* a_scales, float* out,
                                Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, Py_ssize_t group,
                                Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t each = panel_scales(k, group), width = kernels.group_panel_bytes(k, group), p
    cdef Py_ssize_t stride = kernels.group_activation_bytes(k, group)
    cdef Py_ssize_t rows = rows_together(m), c = first * kernels.panel_outputs, cols, r
    cdef Py_ssize_t last = end * kernels.panel_outputs if end < panels_of(n) else n
    # With three streams to follow, the hardware's prefetcher is too slow for main memory.
    cdef Py_ssize_t ahead = FETCHED_AHEAD if panels_of(n) * width >= kernels.fetched_from else 0
    while c < last:
        cols, r, p = outputs_together(m, k, last - c), 0, c // kernels.panel_outputs
        while r < m:
            kernels.gemm_u4s8_f32(panels + p * width, scales + p * each, zero_points + p * each,
                                  NULL if bias == NULL else bias + c, a + r * stride, a_scales + r,
                                  out + r * n + c, n, rows if m - r > rows else m - r, cols, k, group, ahead)
            r += rows
        c += cols


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
# Knuth). One error is at most 2**-53 of the largest partial sum, so what the second itself rounds off in N
# additions is at most N**2 * 2**-106 of it: 2**-66 after a million.
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


# Moves the window of one channel up to a new largest magnitude, which is not below the old one.
cdef void raise_window(uint32_t* window, int32_t* amax_bits, int32_t new_bits) noexcept nogil:
    cdef uint32_t before[WINDOW]
    cdef Py_ssize_t shift = (new_bits >> 20) - (amax_bits[0] >> 20)
    amax_bits[0] = new_bits
    if shift:
        memcpy(before, window, sizeof(before))
        memset(window, 0, sizeof(before))
        add_window(before, shift, window)


@cython.final
cdef class CalibratorState:
    """Writable views of the arrays that a Calibrator keeps.

    All is allocated and looked at before: once `update` or `merge` has begun to change them, nothing keeps it
    from coming to an end.
    """

    cdef int64_t[::1] count
    cdef float[::1] extremes
    cdef double[::1] sums
    cdef int64_t[::1] bins
    cdef int32_t[::1] amax_bits
    cdef uint32_t[:, ::1] windows

    def __cinit__(self, int64_t[::1] count not None, float[::1] extremes not None, double[::1] sums not None,
                  int64_t[::1] bins not None, int32_t[::1] amax_bits not None,
                  uint32_t[:, ::1] windows not None):
        self.count, self.extremes, self.sums, self.bins = count, extremes, sums, bins
        self.amax_bits, self.windows = amax_bits, windows

    def update(self, FloatRows x not None, const int32_t[::1] new_bits not None):
        """Add all elements, which are finite; no column's magnitude is above new_bits, nor new_bits below."""
        cdef float scratch[BLOCK]
        cdef Py_ssize_t r, start, n
        cdef Floats row, flat = x.flat()
        with nogil:
            self.raise_windows(new_bits)
            for r in range(x.m if self.windows.shape[0] else 0):
                row = x.row(r)
                start = 0
                while start < x.k:
                    n = block_len(start, x.k)
                    kernels.count_windows_row_f32(block_of(&row, start, n, scratch), &new_bits[start],
                                                  &self.windows[start, 0], n)
                    start += n
            start = 0
            while start < flat.n:
                n = block_len(start, flat.n)
                self.add_block(block_of(&flat, start, n, scratch), n)
                start += n
            # -0.0 becomes 0.0: which of them came first must not show.
            self.extremes[0] += 0
            self.extremes[1] += 0
            self.count[0] += flat.n

    def merge(self, CalibratorState other not None, const int32_t[::1] new_bits not None):
        """Add all that `other` has seen, perhaps this itself; new_bits are the larger ones of both."""
        cdef Py_ssize_t i, j
        cdef double sums[4]
        with nogil:
            self.raise_windows(new_bits)
            for j in range(self.windows.shape[0]):
                i = (self.amax_bits[j] >> 20) - (other.amax_bits[j] >> 20)
                add_window(&other.windows[j, 0], i, &self.windows[j, 0])
            self.extremes[0] = min(self.extremes[0], other.extremes[0])
            self.extremes[1] = max(self.extremes[1], other.extremes[1])
            memcpy(sums, &other.sums[0], sizeof(sums))
            for i in range(4):
                add_to_pair(&self.sums[i & ~1], sums[i])
            for i in range(self.bins.shape[0]):
                self.bins[i] += other.bins[i]
            self.count[0] += other.count[0]

    cdef void raise_windows(self, const int32_t[::1] new_bits) noexcept nogil:
        cdef Py_ssize_t j
        for j in range(self.windows.shape[0]):
            raise_window(&self.windows[j, 0], &self.amax_bits[j], new_bits[j])

    cdef void add_block(self, const float* block, Py_ssize_t n) noexcept nogil:
        kernels.min_max_row_f32(block, &self.extremes[0], &self.extremes[1], n)
        add_block_sums(block, n, &self.sums[0])
        kernels.count_bins_f32(block, &self.bins[0], n)


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
