# Products of thin layers, with few inputs or few outputs: int16 codes of activations times int16 weights.
#
# A thin layer has so few multiply-adds for each activation that packing activations for the kernels of
# matmul_s8.pxi and matmul_u4.pxi takes longer than multiplying them. Products of pairs of int16 need none of
# what that prepares: no compensation, no split, no sums of groups. Several rows are quantized together, their
# codes stay in the order of k, and weights are widened from the panels of a layer for many rows.
#
# A wide panel holds the weights of PANEL outputs, pair after pair of k, the int16 of an even and an odd k for
# each output. For few outputs rows of int16 weights are multiplied by dot products instead. 4-bit weights
# come with their zero points subtracted: code - zero_point is in [-15, 15].
#
# No int32 wraps: a sum over at most ACC32_K = 2**16 k is at most 2**16 * 128 * 127 = 1,065,353,216 < 2**31 in
# magnitude.
#
# Codes lie row by row, `stride` apart, in space for a multiple of DQ_WIDE_ROWS rows. What follows the k codes
# of a row there is arbitrary, and is multiplied by weights of 0.


cdef enum:
    WIDEN_STEPS = 256  # k-steps of a row of weights that are widened together


# int16 of a wide panel, which may be written as far as the end of a k-block of 4-bit codes.
cdef Py_ssize_t wide_panel_len(Py_ssize_t k) noexcept nogil:
    return PANEL * (DQ_DEPTH * k_steps_of(k) + DQ_K_BLOCK)


# x (m, k) -> codes (m, k) in [-127, 127] and scales (m,), as scale_of and quantize_row_f32_s8 have them.
# Returns whether x is finite; where it is not, results are arbitrary. As many rows as L1 holds are taken
# together.
cdef bint quantize_rows_f32_s16(const float* x, int16_t* codes, Py_ssize_t stride, float* scales,
                                Py_ssize_t m, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t start = 0, rows, max_rows = DQ_WIDE_BATCH if k <= 64 else DQ_WIDE_ROWS
    while start < m:
        rows = m - start if m - start < max_rows else max_rows
        if not dq_quantize_rows(x + start * k, rows, k, codes + start * stride, stride, scales + start):
            return False
        start += rows
    return True


# A panel of pack_panel_s8 -> a wide panel.
cdef void widen_panel_s8(const uint8_t* panel, int16_t* wide, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(k_steps_of(k)):
        dq_widen_k_step(panel, wide)
        dq_widen_k_step(panel + DQ_DEPTH * DQ_LANES, wide + 2 * DQ_LANES)
        panel += DQ_DEPTH * PANEL
        wide += DQ_DEPTH * PANEL


# A panel of pack_panel_u4 -> a wide panel. Each group has an even number of k, but for the last.
cdef void widen_panel_u4(const uint8_t* panel, const uint8_t* zero_points, int16_t* wide, Py_ssize_t k,
                         Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t start = 0, n, u, c
    cdef int16_t* last = wide + (k - 1) // 2 * (2 * PANEL)
    while start < k:
        n = group_len(start, k, group)
        for u in range(k_blocks_of(n)):
            dq_widen_k_block(panel, zero_points, wide + (start // 2 + 4 * u) * (2 * PANEL))
            panel += 4 * PANEL
        zero_points += PANEL
        start += n
    if k % 2:
        for c in range(PANEL):
            last[2 * c + 1] = 0


# A panel of pack_panel_s8 -> the rows of weights of its first n outputs, `stride` apart and 0 from k on.
cdef void widen_rows_s8(const uint8_t* panel, int16_t* rows, Py_ssize_t stride, Py_ssize_t n,
                        Py_ssize_t k) noexcept nogil:
    cdef uint8_t biased[WIDEN_STEPS * DQ_DEPTH]
    cdef Py_ssize_t start = 0, steps, c, i, count
    while start < stride:
        count = min(WIDEN_STEPS * DQ_DEPTH, stride - start)
        steps = min(count // DQ_DEPTH, k_steps_of(k) - start // DQ_DEPTH)
        for c in range(n):
            zero_weights(biased, count)
            for i in range(steps):
                memcpy(biased + DQ_DEPTH * i, panel + (i * PANEL + c) * DQ_DEPTH, DQ_DEPTH)
            for i in range(count // 2):
                rows[c * stride + start + 2 * i] = <int16_t> (<int> biased[2 * i] - 128)
                rows[c * stride + start + 2 * i + 1] = <int16_t> (127 - <int> biased[2 * i + 1])
        panel += steps * PANEL * DQ_DEPTH
        start += count


# Biased weights of 0.
cdef inline void zero_weights(uint8_t* biased, Py_ssize_t n) noexcept nogil:
    memset(biased, 0, n)
    bias_weights(biased, n)


# acc (8, PANEL) = `pairs` pairs of the first DQ_LANES outputs of a wide panel times `rows` rows of codes.
# What is past the last row is that row again.
cdef inline void wide_microkernel_8(const int16_t* w, const int16_t* a, Py_ssize_t stride, Py_ssize_t rows,
                                    int32_t* acc, Py_ssize_t pairs) noexcept nogil:
    cdef dq_acc s0 = dq_acc_zero(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0
    cdef const int16_t* a1 = a + (1 if rows > 1 else rows - 1) * stride
    cdef const int16_t* a2 = a + (2 if rows > 2 else rows - 1) * stride
    cdef const int16_t* a3 = a + (3 if rows > 3 else rows - 1) * stride
    cdef const int16_t* a4 = a + (4 if rows > 4 else rows - 1) * stride
    cdef const int16_t* a5 = a + (5 if rows > 5 else rows - 1) * stride
    cdef const int16_t* a6 = a + (6 if rows > 6 else rows - 1) * stride
    cdef const int16_t* a7 = a + (7 if rows > 7 else rows - 1) * stride
    cdef dq_wide_weights v
    cdef Py_ssize_t i
    for i in range(0, 2 * pairs, 2):
        v = dq_wide_load(w)
        s0 = dq_wide_step(s0, v, dq_broadcast(<const uint8_t*> (a + i)))
        s1 = dq_wide_step(s1, v, dq_broadcast(<const uint8_t*> (a1 + i)))
        s2 = dq_wide_step(s2, v, dq_broadcast(<const uint8_t*> (a2 + i)))
        s3 = dq_wide_step(s3, v, dq_broadcast(<const uint8_t*> (a3 + i)))
        s4 = dq_wide_step(s4, v, dq_broadcast(<const uint8_t*> (a4 + i)))
        s5 = dq_wide_step(s5, v, dq_broadcast(<const uint8_t*> (a5 + i)))
        s6 = dq_wide_step(s6, v, dq_broadcast(<const uint8_t*> (a6 + i)))
        s7 = dq_wide_step(s7, v, dq_broadcast(<const uint8_t*> (a7 + i)))
        w += 2 * PANEL
    dq_acc_store(acc, s0)
    dq_acc_store(acc + PANEL, s1)
    dq_acc_store(acc + 2 * PANEL, s2)
    dq_acc_store(acc + 3 * PANEL, s3)
    dq_acc_store(acc + 4 * PANEL, s4)
    dq_acc_store(acc + 5 * PANEL, s5)
    dq_acc_store(acc + 6 * PANEL, s6)
    dq_acc_store(acc + 7 * PANEL, s7)


# acc (4, PANEL) = the same for all outputs of the panel and at most four rows.
cdef inline void wide_microkernel_4(const int16_t* w, const int16_t* a, Py_ssize_t stride, Py_ssize_t rows,
                                    int32_t* acc, Py_ssize_t pairs) noexcept nogil:
    cdef dq_acc s00 = dq_acc_zero(), s01 = s00, s10 = s00, s11 = s00, s20 = s00, s21 = s00, s30 = s00
    cdef dq_acc s31 = s00
    cdef const int16_t* a1 = a + (1 if rows > 1 else rows - 1) * stride
    cdef const int16_t* a2 = a + (2 if rows > 2 else rows - 1) * stride
    cdef const int16_t* a3 = a + (3 if rows > 3 else rows - 1) * stride
    cdef dq_wide_weights w0, w1
    cdef dq_broadcast_act k
    cdef Py_ssize_t i
    for i in range(0, 2 * pairs, 2):
        w0, w1 = dq_wide_load(w), dq_wide_load(w + 2 * DQ_LANES)
        k = dq_broadcast(<const uint8_t*> (a + i))
        s00, s01 = dq_wide_step(s00, w0, k), dq_wide_step(s01, w1, k)
        k = dq_broadcast(<const uint8_t*> (a1 + i))
        s10, s11 = dq_wide_step(s10, w0, k), dq_wide_step(s11, w1, k)
        k = dq_broadcast(<const uint8_t*> (a2 + i))
        s20, s21 = dq_wide_step(s20, w0, k), dq_wide_step(s21, w1, k)
        k = dq_broadcast(<const uint8_t*> (a3 + i))
        s30, s31 = dq_wide_step(s30, w0, k), dq_wide_step(s31, w1, k)
        w += 2 * PANEL
    store_tile(acc, s00, s01, s10, s11, s20, s21, s30, s31)


cdef inline void wide_microkernel(const int16_t* w, const int16_t* a, Py_ssize_t stride, Py_ssize_t rows,
                                  Py_ssize_t cols, int32_t* acc, Py_ssize_t pairs) noexcept nogil:
    if cols <= DQ_LANES:
        wide_microkernel_8(w, a, stride, rows, acc, pairs)
    else:
        wide_microkernel_4(w, a, stride, rows, acc, pairs)


# Vectors of a panel, `bias` of zeros that change nothing where there is none: x + -0.0 is x for every x.
cdef struct PanelVectors:
    float scales[PANEL]
    float bias[PANEL]


cdef inline void panel_vectors(PanelVectors* v, const float* scales, const float* bias,
                               Py_ssize_t cols) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(PANEL):
        v.scales[c] = scales[c] if c < cols and scales != NULL else 0
        v.bias[c] = bias[c] if c < cols and bias != NULL else <float> -0.0


# DQ_LANES results, of which `cols` count. With `spill` the ones after them may be written too.
cdef inline void store_results(dq_floats results, float* out, Py_ssize_t cols, bint spill) noexcept nogil:
    cdef float values[DQ_LANES]
    cdef Py_ssize_t c
    if spill or cols >= DQ_LANES:
        dq_floats_store(out, results)
        return
    dq_floats_store(values, results)
    for c in range(cols):
        out[c] = values[c]


# A wide panel, cols <= PANEL, times m rows of codes: out[r][c] = float32(sum) * w_scales[c] * a_scales[r] +
# bias[c], rows of out `out_stride` apart. Where rows are as short as that a whole vector is written for each,
# and what is too much of it is overwritten by the next row.
cdef inline void gemm_wide_panel(const int16_t* wide, const PanelVectors* v, const int16_t* codes,
                                 Py_ssize_t stride, const float* a_scales, float* out, Py_ssize_t out_stride,
                                 Py_ssize_t m, Py_ssize_t cols, Py_ssize_t k) noexcept nogil:
    cdef int32_t acc[8 * PANEL]
    cdef Py_ssize_t max_rows = 8 if cols <= DQ_LANES else 4, rows, r, done = 0, left
    cdef dq_floats results
    while done < m:
        rows = m - done if m - done < max_rows else max_rows
        wide_microkernel(wide, codes + done * stride, stride, rows, cols, acc, (k + 1) // 2)
        for r in range(rows):
            left = (m - done - r) * out_stride
            results = dq_scaled(dq_acc_load(acc + r * PANEL), dq_floats_load(v.scales))
            results = dq_floats_add(dq_floats_scale(results, a_scales[done + r]), dq_floats_load(v.bias))
            store_results(results, out, cols, out_stride == cols and left >= DQ_LANES)
            if cols > DQ_LANES:
                results = dq_scaled(dq_acc_load(acc + r * PANEL + DQ_LANES),
                                    dq_floats_load(v.scales + DQ_LANES))
                results = dq_floats_add(dq_floats_scale(results, a_scales[done + r]),
                                        dq_floats_load(v.bias + DQ_LANES))
                store_results(results, out + DQ_LANES, cols - DQ_LANES, False)
            out += out_stride
        done += rows


# Wide panels of n outputs, wide_panel_len(k) apart, times m rows of codes -> out (m, n), rows `out_stride`
# apart. No bias where it is NULL.
cdef void gemm_wide_f32(const int16_t* wide, const float* w_scales, const float* bias, const int16_t* codes,
                        Py_ssize_t stride, const float* a_scales, float* out, Py_ssize_t out_stride,
                        Py_ssize_t m, Py_ssize_t n, Py_ssize_t k) noexcept nogil:
    cdef PanelVectors v
    cdef Py_ssize_t c = 0, cols
    while c < n:
        cols = n - c if n - c < PANEL else PANEL
        panel_vectors(&v, w_scales + c, NULL if bias == NULL else bias + c, cols)
        gemm_wide_panel(wide, &v, codes, stride, a_scales, out + c, out_stride, m, cols, k)
        wide += wide_panel_len(k)
        c += cols


# The same with scales (groups, PANEL) for each panel, one panel after the other: float32(sum) * scale is
# added up over the groups, in ascending order and from 0, and then * a_scales[r] + bias[c].
cdef void gemm_wide_groups_f32(const int16_t* wide, const float* scales, const float* bias,
                               const int16_t* codes, Py_ssize_t stride, const float* a_scales, float* out,
                               Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k,
                               Py_ssize_t group) noexcept nogil:
    cdef PanelVectors v
    cdef Py_ssize_t c = 0, cols
    while c < n:
        cols = n - c if n - c < PANEL else PANEL
        panel_vectors(&v, NULL, NULL if bias == NULL else bias + c, cols)
        gemm_wide_group_panel(wide, scales, &v, codes, stride, a_scales, out + c, out_stride, m, cols, k,
                              group)
        wide += wide_panel_len(k)
        scales += groups_of(k, group) * PANEL
        c += cols


cdef inline void gemm_wide_group_panel(const int16_t* wide, const float* scales, const PanelVectors* v,
                                       const int16_t* codes, Py_ssize_t stride, const float* a_scales,
                                       float* out, Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t cols,
                                       Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef float acc[8 * PANEL]
    cdef Py_ssize_t max_rows = 8 if cols <= DQ_LANES else 4, rows, r, done = 0, left
    while done < m:
        rows = m - done if m - done < max_rows else max_rows
        add_wide_groups(wide, scales, codes + done * stride, stride, rows, cols, acc, k, group)
        for r in range(rows):
            left = (m - done - r) * out_stride
            store_results(dq_floats_add(dq_floats_scale(dq_floats_load(acc + r * PANEL), a_scales[done + r]),
                                        dq_floats_load(v.bias)),
                          out, cols, out_stride == cols and left >= DQ_LANES)
            if cols > DQ_LANES:
                store_results(dq_floats_add(dq_floats_scale(dq_floats_load(acc + r * PANEL + DQ_LANES),
                                                            a_scales[done + r]),
                                            dq_floats_load(v.bias + DQ_LANES)),
                              out + DQ_LANES, cols - DQ_LANES, False)
            out += out_stride
        done += rows


# acc (rows, PANEL) = all groups, added up in ascending order.
cdef inline void add_wide_groups(const int16_t* wide, const float* scales, const int16_t* codes,
                                 Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t cols, float* acc,
                                 Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef int32_t sums[8 * PANEL]
    cdef Py_ssize_t start = 0, n, r
    memset(acc, 0, 8 * PANEL * sizeof(float))
    while start < k:
        n = group_len(start, k, group)
        wide_microkernel(wide + start * PANEL, codes + start, stride, rows, cols, sums, (n + 1) // 2)
        for r in range(rows):
            add_wide_group(acc + r * PANEL, sums + r * PANEL, scales)
            if cols > DQ_LANES:
                add_wide_group(acc + r * PANEL + DQ_LANES, sums + r * PANEL + DQ_LANES, scales + DQ_LANES)
        scales += PANEL
        start += n


cdef inline void add_wide_group(float* acc, const int32_t* sums, const float* scales) noexcept nogil:
    dq_floats_store(acc, dq_floats_add(dq_floats_load(acc), dq_scaled(dq_acc_load(sums),
                                                                      dq_floats_load(scales))))


# Rows of weights w (n, k), n <= DQ_WIDE_DOTS, `stride` apart and 0 from k on, times m rows of codes, as
# gemm_wide_f32 has it -> out (m, n).
cdef void dots_wide_f32(const int16_t* w, const float* w_scales, const float* bias, const int16_t* codes,
                        Py_ssize_t stride, const float* a_scales, float* out, Py_ssize_t m, Py_ssize_t n,
                        Py_ssize_t k) noexcept nogil:
    cdef int32_t sums[DQ_WIDE_ROWS * DQ_WIDE_DOTS]
    cdef float scales[DQ_WIDE_ROWS * DQ_WIDE_DOTS]
    cdef float offsets[DQ_WIDE_ROWS * DQ_WIDE_DOTS]
    cdef float values[DQ_WIDE_ROWS * DQ_WIDE_DOTS]
    cdef Py_ssize_t done = 0, r, c
    for r in range(DQ_WIDE_ROWS):
        for c in range(n):
            scales[r * n + c] = w_scales[c]
            offsets[r * n + c] = <float> -0.0 if bias == NULL else bias[c]
    while done < m:
        dq_wide_dots(codes + done * stride, stride, w, stride, n, k, sums)
        if n == 1:
            scale_sums(sums, scales, a_scales + done, offsets, values, 1)
        elif n == 2:
            scale_sums(sums, scales, a_scales + done, offsets, values, 2)
        else:
            scale_sums(sums, scales, a_scales + done, offsets, values, n)
        if m - done < DQ_WIDE_ROWS:
            memcpy(out, values, (m - done) * n * sizeof(float))
        elif n == 1:
            memcpy(out, values, DQ_WIDE_ROWS * sizeof(float))
        else:
            memcpy(out, values, DQ_WIDE_ROWS * n * sizeof(float))
        out += DQ_WIDE_ROWS * n
        done += DQ_WIDE_ROWS


# values (DQ_WIDE_ROWS, n) = float32(sums) * scales * a_scales + offsets; as a constant n takes half the time.
cdef inline void scale_sums(const int32_t* sums, const float* scales, const float* a_scales,
                            const float* offsets, float* values, Py_ssize_t n) noexcept nogil:
    cdef float row_scales[DQ_WIDE_ROWS * DQ_WIDE_DOTS]
    cdef Py_ssize_t r, c, i
    for r in range(DQ_WIDE_ROWS):
        for c in range(n):
            row_scales[r * n + c] = a_scales[r]
    for i in range(DQ_WIDE_ROWS * n):
        values[i] = <float> sums[i] * scales[i] * row_scales[i] + offsets[i]
