# A linear layer in the form that the kernels of one instruction set take.


# x / factors, rotated in spans of `block` elements, in `prepared`; x itself where factors is NULL and block
# 0.
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


# What the rows of x become in an Activations. Each of `parts` parts of them, nearly equal, has scratch of its
# own.
cdef struct ActivationRows:
    Floats x
    const Kernels* table
    Py_ssize_t m, k, group, block, parts, row_bytes
    const float* factors
    float* prepared
    float* scales
    int8_t* codes
    uint8_t* a


cdef bint quantize_part_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const ActivationRows* rows = <const ActivationRows*> context
    cdef Py_ssize_t part, r
    for part in range(first, end):
        for r in range(rows.m * part // rows.parts, rows.m * (part + 1) // rows.parts):
            if not quantize_activation_row(rows, r, rows.prepared + part * rows.k,
                                           rows.codes + part * rows.k):
                return False
    return True


# Returns whether the row is finite.
cdef bint quantize_activation_row(const ActivationRows* rows, Py_ssize_t r, float* prepared,
                                  int8_t* codes) noexcept nogil:
    cdef Floats row = floats_at(&rows.x, r * rows.k, rows.k)
    row = prepared_row(row, rows.factors, rows.block, prepared)
    if not scale_of(&row, 127, -1, &rows.scales[r]):
        return False
    quantize_activation(rows.table, &row, rows.scales[r], rows.group, codes, rows.a + r * rows.row_bytes)
    return True


# out (a_rows, n) = a . weights + bias. Units are panels.
cdef struct Product:
    const PackedWeights* w
    const uint8_t* a
    const float* a_scales
    float* out
    Py_ssize_t m


cdef bint multiply_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const Product* p = <const Product*> context
    multiply_panels(p.w, p.a, p.a_scales, p.out, p.m, first, end)
    return True


@cython.final
@cython.no_gc
cdef class Activations:
    """Up to `capacity` quantized rows for one PackedLinear, and scratch for a row of each thread.

    All that quantizing needs is allocated here, so that nothing can fail once rows of a result are written.
    """
    cdef Aligned memory
    cdef float* prepared
    cdef float* scales
    cdef int8_t* codes
    cdef Py_ssize_t m, capacity, parts

    def __cinit__(self, PackedLinear layer not None, Py_ssize_t capacity, int num_threads=1):
        cdef Py_ssize_t rows = capacity * layer.activation_bytes(), k = layer.w.k
        self.capacity = capacity
        self.parts = max(1, threads_for(capacity, layer.quantize_ns(capacity), num_threads))
        self.memory = aligned_memory(rows + capacity * <Py_ssize_t> sizeof(float)
                                     + self.parts * k * (<Py_ssize_t> sizeof(float) + 1))
        self.prepared = <float*> (self.memory.data + rows)
        self.scales = self.prepared + self.parts * k
        self.codes = <int8_t*> (self.scales + capacity)

    def __dealloc__(self):
        PyMem_RawFree(self.memory.block)


@cython.final
cdef class PackedLinear:
    """A linear layer, n outputs of k > 0 inputs, for the kernels that were in use when it was made.

    With group 0 the weights are int8 with one scale for each output, otherwise 4-bit with a scale and a zero
    point for each group. Inputs are divided by `smooth`, unless None, and then rotated in spans of `block`,
    unless 0.
    """
    cdef PackedWeights w
    cdef Aligned memory
    cdef Py_ssize_t block
    cdef const float[::1] bias, factors
    cdef readonly Py_ssize_t n, panel_count, weight_bytes
    cdef readonly object smooth

    def __cinit__(self, Py_ssize_t n, Py_ssize_t k, Py_ssize_t group, const float[::1] bias,
                  smooth, Py_ssize_t block):
        cdef Py_ssize_t panels, scales = n, zero_points = 0
        self.w.table, self.w.n, self.w.k, self.w.group = packing_kernels(), n, k, group
        self.n, self.bias, self.smooth, self.factors, self.block = n, bias, smooth, smooth, block
        self.panel_count = panels_of(self.w.table, n)
        panels = self.panel_count * panel_bytes(self.w.table, k, group)
        if group:
            scales = zero_points = self.panel_count * panel_scales(self.w.table, k, group)
        scales *= sizeof(float)
        self.weight_bytes = panels + scales + zero_points
        self.memory = aligned_memory(self.weight_bytes)
        self.w.panels = self.memory.data
        self.w.scales = <float*> (self.w.panels + panels)
        self.w.zero_points = self.w.panels + panels + scales
        self.w.bias = NULL
        if bias is not None:
            self.w.bias = &bias[0]

    def __dealloc__(self):
        PyMem_RawFree(self.memory.block)

    cpdef Py_ssize_t activation_bytes(self):
        """Bytes of one row of quantized activations."""
        return activation_bytes(self.w.table, self.w.k, self.w.group)

    def pack(self, CodeMatrix q not None):
        """Fill in the weights."""
        self.check(q)
        with nogil:
            if self.w.group == 0:
                memcpy(self.w.scales, q.scales.buf, self.w.n * sizeof(float))
            pack_weights(&self.w, <const uint8_t*> q.codes.buf, <const float*> q.scales.buf,
                         <const uint8_t*> q.zero_points.buf)

    def unpack(self, CodeMatrix q not None):
        """The inverse of pack."""
        self.check(q)
        with nogil:
            if self.w.group == 0:
                memcpy(q.scales.buf, self.w.scales, self.w.n * sizeof(float))
            unpack_weights(&self.w, <uint8_t*> q.codes.buf, <float*> q.scales.buf,
                           <uint8_t*> q.zero_points.buf)

    cdef int check(self, CodeMatrix q) except -1:
        if q.m != self.w.n or q.k != self.w.k or q.packed != (self.w.group > 0):
            raise SystemError("weights of another layer")
        return 0

    # Estimates for parallel_ranges. One row costs as much as 1.25 of many: its weights come from afar.
    cdef Py_ssize_t quantize_ns(self, Py_ssize_t m) noexcept nogil:
        return m * self.w.k * (3 if self.block else 1) // 4

    cdef Py_ssize_t multiply_ns(self, Py_ssize_t m) noexcept nogil:
        return self.w.n * self.w.k * (4 * m + 1) // (4 * self.w.table.products_per_ns)

    def quantize(self, FloatMatrix x not None, Activations a not None, int num_threads=1):
        """Quantize the rows of x into `a`; returns whether they are finite."""
        cdef ActivationRows rows
        check_size(a.capacity, x.m)
        check_size(x.k, self.w.k)
        a.m = x.m
        rows.x, rows.table, rows.m, rows.k, rows.group = x.flat(), self.w.table, x.m, x.k, self.w.group
        rows.block, rows.parts, rows.row_bytes = self.block, min(a.parts, x.m), self.activation_bytes()
        rows.factors, rows.prepared, rows.scales, rows.codes = NULL, a.prepared, a.scales, a.codes
        rows.a = a.memory.data
        if self.factors is not None:
            rows.factors = &self.factors[0]
        return parallel_ranges(quantize_part_range, &rows, rows.parts, self.quantize_ns(x.m), num_threads)

    def multiply(self, Activations a not None, float[:, ::1] out not None, int num_threads=1):
        """out = a . weights + bias."""
        cdef Product p
        if a.m == 0:
            return
        check_size(out.shape[0] * out.shape[1], a.m * self.w.n)
        p.w, p.a, p.a_scales, p.out, p.m = &self.w, a.memory.data, a.scales, &out[0, 0], a.m
        parallel_ranges(multiply_range, &p, self.panel_count, self.multiply_ns(a.m), num_threads)
