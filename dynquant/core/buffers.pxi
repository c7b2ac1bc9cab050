# Arrays as the kernels see them: matrices of floats and of codes, checked against the memory that they lie
# in.
cdef enum:
    BLOCK = 4096  # floats that are widened, and codes that are packed, together: 16 KiB, half of a small L1


# The facade has checked shapes, but objects that are converted by code of their own may have resized an array
# since, and a subclass may report any shape. So lengths are checked again, against the memory itself.
cdef int check_size(Py_ssize_t size, Py_ssize_t needed) except -1:
    if size < needed:
        from dynquant.errors import LayoutError

        raise LayoutError(f"expected an array that keeps its size in a call, got {size} instead of {needed}")
    return 0


# The three classes below are made in nearly every call. A typed memoryview, which also knows shape and dtype,
# takes three times as long to make, and that is as long as quantizing a thousand floats. They cannot be part
# of a reference cycle.


@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class FloatMatrix:
    """m rows of k floats in `x`, a C-contiguous array of the format `kind`."""

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


@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class CodeMatrix:
    """m rows of k codes, each `group` elements of a row with a scale and, unless symmetric, a zero point.

    `codes`, `scales` and `offsets` are C-contiguous; packed codes take half a byte each. Offsets are zero
    points, a byte each, or `minimums`, floats. With `writable` codes and scales are results.
    """

    cdef Py_buffer codes, scales, offsets
    cdef readonly Py_ssize_t m, k, group
    cdef bint packed, minimums

    def __cinit__(self, codes not None, scales not None, offsets, Py_ssize_t m, Py_ssize_t k,
                  Py_ssize_t group, bint packed, bint writable=False, bint minimums=False):
        cdef int flags = PyBUF_WRITABLE if writable else PyBUF_SIMPLE
        cdef Py_ssize_t n_scales = m * groups_of(k, group)
        self.m, self.k, self.group, self.packed, self.minimums = m, k, group, packed, minimums
        PyObject_GetBuffer(codes, &self.codes, flags)
        PyObject_GetBuffer(scales, &self.scales, flags)
        check_size(self.codes.len, m * bytes_of_row(k, packed))
        check_size(self.scales.len, n_scales * <Py_ssize_t> sizeof(float))
        if offsets is not None:
            PyObject_GetBuffer(offsets, &self.offsets, flags)
            check_size(self.offsets.len, n_scales * (<Py_ssize_t> sizeof(float) if minimums else 1))

    def __dealloc__(self):
        PyBuffer_Release(&self.codes)
        PyBuffer_Release(&self.scales)
        PyBuffer_Release(&self.offsets)

    cdef CodeRows rows(self) noexcept nogil:
        cdef CodeRows rows
        rows.codes, rows.scales = <int8_t*> self.codes.buf, <float*> self.scales.buf
        rows.zero_points = NULL if self.minimums else <uint8_t*> self.offsets.buf
        rows.minimums = <float*> self.offsets.buf if self.minimums else NULL
        rows.k, rows.group, rows.packed = self.k, self.group, self.packed
        return rows


cdef inline QuantRow code_row(const CodeRows* rows, Py_ssize_t r) noexcept nogil:
    cdef QuantRow row
    cdef Py_ssize_t groups = groups_of(rows.k, rows.group)
    row.codes = rows.codes + r * bytes_of_row(rows.k, rows.packed)
    row.scales = rows.scales + r * groups
    row.zero_points, row.minimums = NULL, NULL
    if rows.zero_points != NULL:
        row.zero_points = rows.zero_points + r * groups
    if rows.minimums != NULL:
        row.minimums = rows.minimums + r * groups
    row.group, row.packed, row.in_range = rows.group, rows.packed, False
    return row


cdef inline Py_ssize_t bytes_of_row(Py_ssize_t k, bint packed) noexcept nogil:
    return (k + 1) // 2 if packed else k


@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class RawBuffer:
    """The memory of one array, kept alive; by default writable and C-contiguous."""

    cdef Py_buffer view

    def __cinit__(self, array not None, int flags=PyBUF_WRITABLE):
        PyObject_GetBuffer(array, &self.view, flags)

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


def is_plain_out(out not None, tuple shape not None, tuple inputs not None):
    """Whether `out` is a writable, aligned, C-contiguous array of `shape`, disjoint from `inputs`.

    False too where one of them is more than a plain array; _validate.py then looks closely.
    """
    cdef RawBuffer x, y
    cdef Py_ssize_t i, n = len(shape)
    try:
        x = RawBuffer(out, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS)
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
        y = RawBuffer(inputs[i], PyBUF_STRIDES)
        if not views_disjoint(&x.view, &y.view):
            return False
    return True


def disjoint(a not None, b not None):
    """Whether no element of `a`, an array of any layout, lies between the first and the last byte of `b`."""
    cdef RawBuffer x = RawBuffer(a, PyBUF_STRIDES)
    cdef RawBuffer y = RawBuffer(b, PyBUF_STRIDES)
    return views_disjoint(&x.view, &y.view)


cdef bint views_disjoint(const Py_buffer* x, const Py_buffer* y) noexcept:
    return x.len == 0 or y.len == 0 or last_byte(x) < first_byte(y) or last_byte(y) < first_byte(x)


# Whether an array is aligned, C-contiguous float32 whose last axis, of at least one, is n long. Its view has
# strides and a format.
cdef bint is_plain_f32(const Py_buffer* view, Py_ssize_t n) noexcept:
    cdef Py_ssize_t stride = sizeof(float)
    cdef int i
    if view.ndim == 0 or view.itemsize != stride or view.format[0] != b"f" or view.format[1] != 0:
        return False
    if view.shape[view.ndim - 1] != n or <size_t> view.buf % <size_t> stride:
        return False
    for i in range(view.ndim - 1, -1, -1):
        if view.strides[i] != stride and view.shape[i] != 1:
            return False
        stride *= view.shape[i]
    return True


# Whether all axes but the last are equal.
cdef bint same_leading_axes(const Py_buffer* x, const Py_buffer* y) noexcept:
    cdef int i
    if x.ndim != y.ndim:
        return False
    for i in range(x.ndim - 1):
        if x.shape[i] != y.shape[i]:
            return False
    return True


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


def new_unchecked(type cls not None, data, scales, zero_points, shape, format, minimums=None):
    """A new object of a frozen dataclass with these six slots.

    The dataclass's own way, object.__setattr__ for each, takes as long as quantizing a thousand floats.
    """
    tensor = PyType_GenericNew(cls, NULL, NULL)
    PyObject_GenericSetAttr(tensor, "data", data)
    PyObject_GenericSetAttr(tensor, "scales", scales)
    PyObject_GenericSetAttr(tensor, "zero_points", zero_points)
    PyObject_GenericSetAttr(tensor, "shape", shape)
    PyObject_GenericSetAttr(tensor, "format", format)
    PyObject_GenericSetAttr(tensor, "minimums", minimums)
    return tensor


# Floats start .. start + n of x: where they lie, or, with n <= BLOCK, widened into scratch.
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


# The same where only the scratch limits the length: float32 is not copied, so it is taken whole.
cdef inline Py_ssize_t span_len(const Floats* x, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    return end - start if x.kind == F32 else block_len(start, end)


# Floats start .. start + n of x.
cdef inline Floats floats_at(const Floats* x, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    cdef Floats part
    part.kind = x.kind
    part.data = x.data + start * (4 if x.kind == F32 else 2)
    part.n = n
    return part


# The end of the group of element i, or `end` where that comes first.
cdef inline Py_ssize_t group_end(Py_ssize_t i, Py_ssize_t group, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t next = (i // group + 1) * group
    return next if next < end else end


# Memory that starts at a cache line: loads that straddle two lines run at half the speed.
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


# Transposes in tiles of TILE_ROWS x TILE_COLUMNS, so that whole cache lines are read and written. Otherwise
# lines that are a power of two apart would share a cache set, and evict each other before they are complete.
# The next tile is prefetched: the hardware does not follow such strides.
cdef enum:
    TILE_ROWS = 16
    TILE_COLUMNS = 64


# out (n, m) = x (m, n) transposed.
cdef void transpose_u32(const uint32_t* x, uint32_t* out, Py_ssize_t m, Py_ssize_t n) noexcept nogil:
    cdef uint32_t tile[TILE_COLUMNS * TILE_ROWS]
    cdef Py_ssize_t c0 = 0, r0, r, c, rows, columns
    while c0 < n:
        columns = TILE_COLUMNS if n - c0 > TILE_COLUMNS else n - c0
        r0 = 0
        while r0 < m:
            rows = TILE_ROWS if m - r0 > TILE_ROWS else m - r0
            for r in range(TILE_ROWS):
                dq_prefetch(x + (r0 + TILE_ROWS + r) * n + c0, TILE_COLUMNS * sizeof(uint32_t))
            for r in range(rows // 4 * 4 if columns == TILE_COLUMNS else 0, rows):
                for c in range(columns):
                    tile[c * TILE_ROWS + r] = x[(r0 + r) * n + c0 + c]
            if columns == TILE_COLUMNS:
                for r in range(0, rows // 4 * 4, 4):
                    transpose_4_rows(x + (r0 + r) * n + c0, n, tile + r)
            for c in range(columns):
                dq_prefetch(out + (c0 + c) * m + r0 + TILE_ROWS, TILE_ROWS * sizeof(uint32_t))
                memcpy(out + (c0 + c) * m + r0, tile + c * TILE_ROWS, rows * sizeof(uint32_t))
            r0 += TILE_ROWS
        c0 += TILE_COLUMNS


# Four rows of TILE_COLUMNS, n apart, to four columns of a tile.
cdef inline void transpose_4_rows(const uint32_t* x, Py_ssize_t n, uint32_t* tile) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(0, TILE_COLUMNS, 4):
        dq_transpose_16(<const int8_t*> (x + c), n * <Py_ssize_t> sizeof(uint32_t),
                        <uint8_t*> (tile + c * TILE_ROWS), TILE_ROWS * sizeof(uint32_t))


def copy_transposed(x not None, out not None, Py_ssize_t m, Py_ssize_t n):
    """out (n, m) = x (m, n) transposed; both C-contiguous, of elements of four bytes."""
    cdef RawBuffer source = RawBuffer(x, PyBUF_SIMPLE)
    cdef RawBuffer target = RawBuffer(out)
    check_size(source.view.len, m * n * <Py_ssize_t> sizeof(uint32_t))
    check_size(target.view.len, m * n * <Py_ssize_t> sizeof(uint32_t))
    with nogil:
        transpose_u32(<const uint32_t*> source.view.buf, <uint32_t*> target.view.buf, m, n)
