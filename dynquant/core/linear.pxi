# A linear layer in the form that the kernels of one instruction set take.


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


@cython.final
@cython.no_gc
cdef class Activations:
    """Quantized rows of activations, at most m at a time, for one PackedLinear; and scratch for one row."""
    cdef Aligned memory
    cdef float* prepared
    cdef float* scales
    cdef int8_t* codes
    cdef Py_ssize_t m, capacity

    # All that quantize needs, so that it cannot fail when some rows of a result are written.
    def __cinit__(self, PackedLinear layer not None, Py_ssize_t m):
        cdef Py_ssize_t rows = m * layer.activation_bytes()
        self.capacity = m
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
        """Bytes that a row of activations takes when quantized."""
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
        cdef Py_ssize_t scale_stride = panel_scales(self.k, self.group), p, c
        cdef uint8_t* z = NULL
        with nogil:
            for p in range(self.panel_count):
                c = p * kernels.panel_outputs
                if zero_points is not None:
                    z = &zero_points[c, 0]
                kernels.unpack_panel_u4(self.panels + p * self.panel_bytes(), self.scales + p * scale_stride,
                                        self.zero_points + p * scale_stride, &codes[c, 0], &scales[c, 0], z,
                                        outputs_of(self.n, c), self.k, self.group)

    def quantize(self, FloatMatrix x not None, Activations a not None):
        """Quantize the rows of x into `a`; returns whether they are finite, and stops at one that is not."""
        cdef Py_ssize_t r, row_bytes = self.activation_bytes()
        cdef Floats row
        cdef bint finite = True
        cdef const float* factors = NULL
        check_size(a.capacity, x.m)
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
                    quantize_group_activation(&row, a.scales[r], self.group, a.codes, a.memory.data + r * row_bytes)
                else:
                    quantize_activation(&row, a.scales[r], a.memory.data + r * row_bytes)
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
