# Integer products: packing weights into panels, activations into the kernels' form, and the order of panels
# and rows.
cdef enum:
    PREFETCH_DISTANCE = 1 << 13  # bytes that 4-bit weights are fetched ahead of their use
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


# Panels of n outputs.
cdef Py_ssize_t panels_of(const Kernels* table, Py_ssize_t n) noexcept nogil:
    return (n + table.panel_outputs - 1) // table.panel_outputs


# Outputs, of n, of the panel whose first one is c.
cdef inline Py_ssize_t outputs_of(const Kernels* table, Py_ssize_t n, Py_ssize_t c) noexcept nogil:
    return n - c if n - c < table.panel_outputs else table.panel_outputs


# Bytes of one panel of weights, without scales and zero points.
cdef Py_ssize_t panel_bytes(const Kernels* table, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return table.group_panel_bytes(k, group) if group else table.panel_bytes(k)


# Bytes of one row of quantized activations.
cdef Py_ssize_t activation_bytes(const Kernels* table, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return table.group_activation_bytes(k, group) if group else table.activation_bytes(k)


# Bytes of an offset of 4-bit weights.
cdef inline Py_ssize_t offset_size(const PackedWeights* w) noexcept nogil:
    return <Py_ssize_t> sizeof(float) if w.minimums else 1


# Scales of one panel, and as many offsets, of weights in groups.
cdef Py_ssize_t panel_scales(const Kernels* table, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return table.panel_outputs * groups_of(k, group)


# Fills the panels of w, k > 0, from codes: int8 (n, k), whose scales are not packed; or, in groups, 4-bit
# codes (n, ceil(k / 2)) with scales and, unless NULL, offsets (n, groups) of the kind of w.
cdef void pack_weights(const PackedWeights* w, const uint8_t* codes, const float* scales,
                       const uint8_t* offsets) noexcept nogil:
    cdef Py_ssize_t p, c, groups, rows, width = panel_bytes(w.table, w.k, w.group), size = offset_size(w)
    cdef Py_ssize_t scale_stride = panel_scales(w.table, w.k, w.group) if w.group else 0
    for p in range(panels_of(w.table, w.n)):
        c = p * w.table.panel_outputs
        rows = outputs_of(w.table, w.n, c)
        if w.group:
            groups = groups_of(w.k, w.group)
            w.table.pack_panel_u4(codes + c * ((w.k + 1) // 2), scales + c * groups,
                                  NULL if offsets == NULL else <uint8_t*> offsets + c * groups * size,
                                  w.minimums, rows, w.panels + p * width, w.scales + p * scale_stride,
                                  w.offsets + p * scale_stride * size, w.k, w.group)
        else:
            w.table.pack_panel_s8(<const int8_t*> codes + c * w.k, w.k, rows, w.panels + p * width, w.k)


# The inverse of pack_weights.
cdef void unpack_weights(const PackedWeights* w, uint8_t* codes, float* scales,
                         uint8_t* offsets) noexcept nogil:
    cdef Py_ssize_t p, c, groups, rows, width = panel_bytes(w.table, w.k, w.group), size = offset_size(w)
    cdef Py_ssize_t scale_stride = panel_scales(w.table, w.k, w.group) if w.group else 0
    for p in range(panels_of(w.table, w.n)):
        c = p * w.table.panel_outputs
        rows = outputs_of(w.table, w.n, c)
        if w.group:
            groups = groups_of(w.k, w.group)
            w.table.unpack_panel_u4(w.panels + p * width, w.scales + p * scale_stride,
                                    w.offsets + p * scale_stride * size, w.minimums,
                                    codes + c * ((w.k + 1) // 2), scales + c * groups,
                                    NULL if offsets == NULL else offsets + c * groups * size, rows, w.k,
                                    w.group)
        else:
            w.table.unpack_panel_s8(w.panels + p * width, <int8_t*> codes + c * w.k, rows, w.k)


# Codes of one row of activations, in the form that the matrix product of `table` takes. `scratch` (x.n,) is
# used with a group only.
cdef void quantize_activation(const Kernels* table, const Floats* x, float scale, Py_ssize_t group,
                              int8_t* scratch, uint8_t* a) noexcept nogil:
    cdef int8_t codes[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef QuantRow q
    q.codes, q.scales, q.zero_points, q.minimums = scratch, &scale, NULL, NULL
    q.group, q.packed, q.in_range = x.n, False, True
    if group:
        quantize_span(x, &q, 0, x.n, 127)
        table.pack_group_activation_s8(scratch, a, x.n, group)
        return
    while start < x.n:
        n = block_len(start, x.n)
        quantize_block(x, &q, start, n, 127, False, codes)
        table.pack_activation_s8(codes, a, start, n, x.n)
        start += n


# Symmetric codes (k,) in the form that the matrix product of `table` takes.
cdef void pack_codes(const Kernels* table, const int8_t* codes, Py_ssize_t k, Py_ssize_t group,
                     uint8_t* a) noexcept nogil:
    cdef int8_t block[BLOCK]  # a copy, which packing uses up
    cdef Py_ssize_t start = 0, n
    if group:
        table.pack_group_activation_s8(codes, a, k, group)
        return
    while start < k:
        n = block_len(start, k)
        memcpy(block, codes + start, n)
        table.pack_activation_s8(block, a, start, n, k)
        start += n


# How many of m rows a product takes together: all of them, or nearly equal parts of whole tiles of 16.
#
# The outputs that a panel gives for one row fill a line or two of the result, one whole row of it away from
# those of the next row. The prefetchers of a core follow some 64 rows that way; with more of them every line
# is waited for, which made wide layers with few inputs two to five times slower. So when there are more, a
# part of the rows is taken at a time, and so many outputs that each row gets at least 1 KiB: the next part of
# the rows needs their weights again, which should stay in the core's own cache. More than 2 KiB gain nothing.
cdef inline Py_ssize_t rows_together(Py_ssize_t m) noexcept nogil:
    cdef Py_ssize_t parts = (m + OUT_ROWS - 1) // OUT_ROWS
    return m if parts < 2 else (m + 16 * parts - 1) // (16 * parts) * 16


cdef inline Py_ssize_t outputs_together(Py_ssize_t m, Py_ssize_t k, Py_ssize_t left) noexcept nogil:
    cdef Py_ssize_t max_outputs = 2 * OUTPUTS if 2 * OUTPUTS * k <= OUTPUTS_BYTES else OUTPUTS
    return left if m <= OUT_ROWS or left < max_outputs else max_outputs


# activation_bytes for weights of any kind.
cdef Py_ssize_t activation_row_bytes(const PackedWeights* w) noexcept nogil:
    if w.int8_groups:
        return w.table.s8_group_activation_bytes(w.k, w.group)
    return activation_bytes(w.table, w.k, w.group)


# out (m, n) = a . weights + bias for the outputs of panels first .. end.
cdef void multiply_panels(const PackedWeights* w, const uint8_t* a, const float* a_scales, float* out,
                          Py_ssize_t m, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t outputs = w.table.panel_outputs, stride = activation_row_bytes(w)
    cdef Py_ssize_t rows = rows_together(m), c = first * outputs, cols, r
    cdef Py_ssize_t last = end * outputs if end < panels_of(w.table, w.n) else w.n
    while c < last:
        cols, r = outputs_together(m, w.k, last - c), 0
        while r < m:
            multiply_part(w, c, cols, a + r * stride, a_scales + r, out + r * w.n, min(rows, m - r))
            r += rows
        c += cols


# The same for m rows and the `cols` outputs from c on, which starts a panel.
cdef inline void multiply_part(const PackedWeights* w, Py_ssize_t c, Py_ssize_t cols, const uint8_t* a,
                               const float* a_scales, float* out, Py_ssize_t m) noexcept nogil:
    cdef Py_ssize_t p = c // w.table.panel_outputs, width = panel_bytes(w.table, w.k, w.group), scale_stride
    cdef Py_ssize_t prefetch_distance = 0
    cdef float* bias = NULL if w.bias == NULL else <float*> w.bias + c
    if w.int8_groups:
        width, scale_stride = w.table.s8_group_panel_bytes(w.k, w.group), panel_scales(w.table, w.k, w.group)
        w.table.gemm_s8_groups_f32(w.panels + p * width, w.scales + p * scale_stride, sums_of_panel(w, p),
                                   bias, a, a_scales, out + c, w.n, m, cols, w.k, w.group)
        return
    if w.group == 0:
        w.table.gemm_s8s8_f32(w.panels + p * width, w.scales + c, bias, a, a_scales, out + c, w.n, m, cols,
                              w.k)
        return
    # A single row reads three streams, for which the hardware's prefetcher is too slow from main memory.
    if panels_of(w.table, w.n) * width >= w.table.prefetch_from:
        prefetch_distance = PREFETCH_DISTANCE
    scale_stride = panel_scales(w.table, w.k, w.group)
    w.table.gemm_u4s8_f32(w.panels + p * width, w.scales + p * scale_stride,
                          w.offsets + p * scale_stride * offset_size(w), w.minimums, bias, a, a_scales,
                          out + c, w.n, m, cols, w.k, w.group, prefetch_distance)
