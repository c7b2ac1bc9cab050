# Integer products: packing weights into panels, activations into the kernels' form, and the order of panels and rows.
cdef enum:
    PREFETCH_DISTANCE = 1 << 13  # bytes
    OUT_ROWS = 64  # rows of the result that a core's prefetchers follow
    OUTPUTS = 256  # outputs taken together: 1 KiB of each row of the result
    OUTPUTS_BYTES = 1 << 20  # their weights, which a core's own cache should hold


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
    cdef Py_ssize_t groups = (k + group - 1) // group, scale_stride = panel_scales(k, group), p, c
    cdef const uint8_t* z = NULL
    for p in range(panels_of(n)):
        c = p * kernels.panel_outputs
        if zero_points != NULL:
            z = zero_points + c * groups
        kernels.pack_panel_u4(w + c * ((k + 1) // 2), scales + c * groups, z, outputs_of(n, c),
                              panels + p * kernels.group_panel_bytes(k, group), panels_scales + p * scale_stride,
                              panels_zero_points + p * scale_stride, k, group)


# Codes of one row in the form that gemm_s8s8_f32 takes.
cdef void quantize_activation(const Floats* x, float scale, uint8_t* a) noexcept nogil:
    cdef int8_t codes[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef QuantRow q
    q.scales, q.zero_points, q.group, q.in_range = &scale, NULL, x.n, True
    while start < x.n:
        n = block_len(start, x.n)
        quantize_block(x, &q, start, n, 127, False, codes)
        kernels.pack_activation_s8(codes, a, start, n, x.n)
        start += n


# The same in the form that gemm_u4s8_f32 takes; codes (x.n,) is scratch.
cdef void quantize_group_activation(const Floats* x, float scale, Py_ssize_t group, int8_t* codes,
                                uint8_t* a) noexcept nogil:
    cdef QuantRow q
    q.codes, q.scales, q.zero_points, q.group, q.packed, q.in_range = codes, &scale, NULL, x.n, False, True
    quantize_span(x, &q, 0, x.n, 127)
    kernels.pack_group_activation_s8(codes, a, x.n, group)


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
    cdef Py_ssize_t max_outputs = 2 * OUTPUTS if 2 * OUTPUTS * k <= OUTPUTS_BYTES else OUTPUTS
    return left if m <= OUT_ROWS or left < max_outputs else max_outputs


# out (m, n) = a . weights + bias for the outputs of panels first .. end; no bias where it is NULL.
cdef void multiply_panels(const uint8_t* panels, const float* w_scales, const float* bias, const uint8_t* a,
                          const float* a_scales, float* out, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k,
                          Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t panel_stride = kernels.panel_bytes(k), stride = kernels.activation_bytes(k)
    cdef Py_ssize_t rows = rows_together(m), c = first * kernels.panel_outputs, cols, r
    cdef Py_ssize_t last = end * kernels.panel_outputs if end < panels_of(n) else n
    while c < last:
        cols, r = outputs_together(m, k, last - c), 0
        while r < m:
            kernels.gemm_s8s8_f32(panels + c // kernels.panel_outputs * panel_stride, w_scales + c,
                                  NULL if bias == NULL else bias + c, a + r * stride, a_scales + r,
                                  out + r * n + c, n, rows if m - r > rows else m - r, cols, k)
            r += rows
        c += cols


# The same for 4-bit weights.
cdef void multiply_group_panels(const uint8_t* panels, const float* scales, const uint8_t* zero_points,
                                const float* bias, const uint8_t* a, const float* a_scales, float* out,
                                Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, Py_ssize_t group,
                                Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t scale_stride = panel_scales(k, group), panel_stride = kernels.group_panel_bytes(k, group), p
    cdef Py_ssize_t stride = kernels.group_activation_bytes(k, group)
    cdef Py_ssize_t rows = rows_together(m), c = first * kernels.panel_outputs, cols, r
    cdef Py_ssize_t last = end * kernels.panel_outputs if end < panels_of(n) else n
    # With three streams to follow, the hardware's prefetcher is too slow for main memory.
    cdef Py_ssize_t prefetch_distance = PREFETCH_DISTANCE if panels_of(n) * panel_stride >= kernels.prefetch_from else 0
    while c < last:
        cols, r, p = outputs_together(m, k, last - c), 0, c // kernels.panel_outputs
        while r < m:
            kernels.gemm_u4s8_f32(panels + p * panel_stride, scales + p * scale_stride, zero_points + p * scale_stride,
                                  NULL if bias == NULL else bias + c, a + r * stride, a_scales + r,
                                  out + r * n + c, n, rows if m - r > rows else m - r, cols, k, group, prefetch_distance)
            r += rows
        c += cols
