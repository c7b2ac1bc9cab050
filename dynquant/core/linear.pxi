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


@cython.final
@cython.no_gc
cdef class Activations:
    """Up to `capacity` quantized rows for one PackedLinear, and scratch for one row.

    All that quantizing needs is allocated here, so that nothing can fail once rows of a result are written.
    """
    cdef Aligned memory
    cdef float* prepared
    cdef float* scales
    cdef int8_t* codes
    cdef Py_ssize_t m, capacity

    def __cinit__(self, PackedLinear layer not None, Py_ssize_t capacity):
        cdef Py_ssize_t rows = capacity * layer.activation_bytes()
        self.capacity = capacity
        self.memory = aligned_memory(rows + (layer.w.k + capacity) * <Py_ssize_t> sizeof(float) + layer.w.k)
        self.prepared = <float*> (self.memory.data + rows)
        self.scales = self.prepared + layer.w.k
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
        self.w.table, self.w.n, self.w.k, self.w.group = kernels, n, k, group
        self.n, self.bias, self.smooth, self.factors, self.block = n, bias, smooth, smooth, block
        self.panel_count = panels_of(kernels, n)
        panels = self.panel_count * panel_bytes(kernels, k, group)
        if group:
            scales = zero_points = self.panel_count * panel_scales(kernels, k, group)
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

    def quantize(self, FloatMatrix x not None, Activations a not None):
        """Quantize the rows of x into `a`; returns whether they are finite, and stops at one that is not."""
        cdef Py_ssize_t r, row_bytes = self.activation_bytes()
        cdef Floats row
        cdef bint finite = True
        cdef const float* factors = NULL
        check_size(a.capacity, x.m)
        check_size(x.k, self.w.k)
        if self.factors is not None:
            factors = &self.factors[0]
        a.m = x.m
        with nogil:
            for r in range(x.m):
                row = prepared_row(x.row(r), factors, self.block, a.prepared)
                finite = scale_of(&row, 127, -1, &a.scales[r])
                if not finite:
                    break
                quantize_activation(self.w.table, &row, a.scales[r], self.w.group, a.codes,
                                    a.memory.data + r * row_bytes)
            if finite and self.w.group == 0:
                self.w.table.arrange_activations_s8(a.memory.data, x.m, x.k)
        return finite

    def multiply(self, Activations a not None, float[:, ::1] out not None, Py_ssize_t first=0,
                 Py_ssize_t end=PY_SSIZE_T_MAX):
        """out = a . weights + bias for the outputs of panels first .. end; returns True."""
        if a.m == 0:
            return True
        check_size(out.shape[0] * out.shape[1], a.m * self.w.n)
        with nogil:
            multiply_panels(&self.w, a.memory.data, a.scales, &out[0, 0], a.m, first, end)
        return True
