# Int8 weights with a scale for each group, or for asymmetric activations: packing, and activations to match.


# Fills the panels of w, and its scales and w_sums, from int8 codes (n, k) and scales (n, groups).
cdef void pack_int8_groups(const PackedWeights* w, const int8_t* codes, const float* scales) noexcept nogil:
    cdef Py_ssize_t p, c, width = w.table.s8_group_panel_bytes(w.k, w.group), groups = groups_of(w.k, w.group)
    cdef Py_ssize_t scale_stride = panel_scales(w.table, w.k, w.group)
    for p in range(panels_of(w.table, w.n)):
        c = p * w.table.panel_outputs
        w.table.pack_panel_s8_groups(codes + c * w.k, scales + c * groups, outputs_of(w.table, w.n, c),
                                     w.panels + p * width, w.scales + p * scale_stride, sums_of_panel(w, p),
                                     w.k, w.group)


# The inverse of pack_int8_groups.
cdef void unpack_int8_groups(const PackedWeights* w, int8_t* codes, float* scales) noexcept nogil:
    cdef Py_ssize_t p, c, width = w.table.s8_group_panel_bytes(w.k, w.group), groups = groups_of(w.k, w.group)
    cdef Py_ssize_t scale_stride = panel_scales(w.table, w.k, w.group)
    for p in range(panels_of(w.table, w.n)):
        c = p * w.table.panel_outputs
        w.table.unpack_panel_s8_groups(w.panels + p * width, w.scales + p * scale_stride, codes + c * w.k,
                                       scales + c * groups, outputs_of(w.table, w.n, c), w.k, w.group)


# Sums of weights of panel p, NULL if w has none.
cdef inline int32_t* sums_of_panel(const PackedWeights* w, Py_ssize_t p) noexcept nogil:
    if w.w_sums == NULL:
        return NULL
    return w.w_sums + p * w.table.s8_group_segments(w.k, w.group) * w.table.panel_outputs


# Symmetric int8 codes of one row as the uint8 codes that the kernels take, in place: 128 is added.
cdef inline void shift_codes(int8_t* codes, Py_ssize_t n) noexcept nogil:
    cdef uint8_t* shifted = <uint8_t*> codes
    cdef Py_ssize_t i
    for i in range(n):
        shifted[i] ^= 0x80


# One row of activations for the groups of weights: its scale, and its codes packed into a. `codes` (x.n,) is
# scratch. Returns whether the row and its range are finite; where they are not nothing is done.
#
# Asymmetric codes are clamp(round(x / scale) + zero_point, 0, 255), halves away from zero, with scale =
# (max(0, max) - min(0, min)) / 255 and zero_point = clamp(round(-min(0, min) / scale), 0, 255).
cdef bint quantize_group_row(const Kernels* table, const Floats* x, Py_ssize_t group, bint symmetric,
                             float* scale, int8_t* codes, uint8_t* a) noexcept nogil:
    cdef float x_min = 0, x_max = 0
    cdef uint8_t zero_point = 128
    cdef QuantRow q
    if symmetric:
        if not scale_of(x, 127, -1, scale):
            return False
        q.codes, q.scales, q.zero_points, q.minimums = codes, scale, NULL, NULL
        q.group, q.packed, q.in_range = x.n, False, True
        quantize_span(x, &q, 0, x.n, 127)
        shift_codes(codes, x.n)
    else:
        if amax_bits(x) >= NON_FINITE:
            return False
        row_range(x, &x_min, &x_max)
        if not x_max - x_min < INFINITY:
            return False
        range_codes(x_min, x_max, 255, scale, &zero_point)
        quantize_span_u8(x, scale[0], zero_point, <uint8_t*> codes)
    table.pack_activation_groups(<uint8_t*> codes, zero_point, a, x.n, group)
    return True


# Widens x_min .. x_max to the range of a finite row.
cdef void row_range(const Floats* x, float* x_min, float* x_max) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    while start < x.n:
        n = block_len(start, x.n)
        kernels.min_max_row_f32(block_of(x, start, n, scratch), x_min, x_max, n)
        start += n


cdef void quantize_span_u8(const Floats* x, float scale, int32_t zero_point, uint8_t* codes) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    if scale == 0:
        memset(codes, 0, x.n)
        return
    while start < x.n:
        n = block_len(start, x.n)
        kernels.quantize_row_f32_u8_away(block_of(x, start, n, scratch), scale, zero_point, codes + start, n)
        start += n
