# The exact integer product of int8 weights and int8 activations, on weights packed into panels.
#
# A panel holds the weights of PANEL = 2 * DQ_LANES outputs, biased to u8 (split.pxi), k-step after k-step. A
# k-step is DEPTH consecutive k of all the outputs, in the order of simd.h. Long rows are cut into segments of
# at most ACC32_K k, whose sums fit int32. A matrix product reads the panels one after the other, each from
# start to end, and so does a product with a single row, at the speed of memory.
#
# Activations lie row by row, each in activation_bytes(k), in the same segments: an ActSegment, then
# DQ_STEP_BYTES for each k-step, then, where DQ_SPLIT is 1, the residuals, each with a k-step of its own
# (split.pxi, forms.pxi).
cdef enum:
    ACC32_K = 1 << 16
    PANEL = 2 * DQ_LANES
    DEPTH = DQ_PANEL_DEPTH
    ROWS = 4
    TILE = DQ_TILE_ROWS // 2
    MICROKERNEL_ROWS = DQ_TILE_ROWS + DQ_KEPT_ROWS
    MOVE_STEPS = 256  # 16 KiB of a panel, or 32 KiB
    MOVE_ROWS = 8  # rows that are fetched ahead


# As long as a cache line, so that codes begin at one.
cdef struct ActSegment:
    int32_t compensation  # subtracted from every sum
    int32_t residuals
    int32_t form  # DQ_PAIRS, DQ_EIGHTS, DQ_CENTERED or DQ_WIDE; the same for all segments of a row
    int32_t steps_out_of_range  # k-steps with a pair out of range
    int32_t eights_out_of_range  # lanes of eight codes out of the range of DQ_EIGHTS
    int32_t centered_out_of_range  # the same of DQ_CENTERED
    int32_t rows  # how many rows from this on have its form
    int32_t unused[9]


# Four bytes of activations that are multiplied by the weights of one k-step once more.
cdef struct Residual:
    int32_t step
    int8_t codes[4]


# k-steps of k: a multiple of DQ_TILE_K_STEPS, which is even, because gemv takes two at a time.
cdef inline Py_ssize_t k_steps_of(Py_ssize_t k) noexcept nogil:
    return (k + DQ_TILE_K_STEPS * DEPTH - 1) // (DQ_TILE_K_STEPS * DEPTH) * DQ_TILE_K_STEPS


cdef Py_ssize_t panel_bytes(Py_ssize_t k) noexcept nogil:
    return PANEL * DEPTH * k_steps_of(k)


# Bytes of one segment of a row of activations.
cdef inline Py_ssize_t segment_bytes(Py_ssize_t k) noexcept nogil:
    return (<Py_ssize_t> sizeof(ActSegment)
            + k_steps_of(k) * (DQ_STEP_BYTES + (<Py_ssize_t> sizeof(Residual) if DQ_SPLIT else 0)))


# An odd number of cache lines: rows at multiples of 4 KiB would fall into the same few sets of the cache, and
# a microkernel reads ROWS of them side by side.
cdef Py_ssize_t activation_bytes(Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t n = k // ACC32_K * segment_bytes(ACC32_K)
    if k % ACC32_K:
        n += segment_bytes(k % ACC32_K)
    return ((n + 63) // 64 | 1) * 64


cdef inline Py_ssize_t segment_k(Py_ssize_t start, Py_ssize_t k) noexcept nogil:
    return k - start if k - start < ACC32_K else ACC32_K


# A panel from w (rows, k), rows `stride` apart, or with `back` the other way round: its whole steps, and then
# the last. A span of steps is taken row by row, or four rows at once: long enough for the prefetchers to
# follow a row, while the span's part of the panel stays in L1. Rows lie too far apart for them to find the
# next.
cdef inline void move_panel(int8_t* w, Py_ssize_t stride, Py_ssize_t k, Py_ssize_t rows, uint8_t* panel,
                            bint back) noexcept nogil:
    cdef Py_ssize_t r, span = 0, end, whole = k // DEPTH, last = k % DEPTH
    while span < whole:
        end = span + MOVE_STEPS if span + MOVE_STEPS < whole else whole
        r = 0
        while r < rows:
            dq_prefetch(w + (r + MOVE_ROWS) * stride + span * DEPTH, (end - span) * DEPTH)
            if not back and DEPTH == 4 and r % 4 == 0 and r + 4 <= rows:
                transpose_rows(w + r * stride, stride, panel + r * DEPTH, span, end)
            elif back or DEPTH != 4 or r >= rows // 4 * 4:
                move_row(w + r * stride, panel + r * DEPTH, span, end, back)
            r += 1
        span = end
    for r in range(rows):
        move_bytes(w + r * stride + whole * DEPTH, panel + (whole * PANEL + r) * DEPTH, last, back)


cdef inline void move_row(int8_t* w, uint8_t* panel, Py_ssize_t first, Py_ssize_t end,
                          bint back) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(first, end):
        move_bytes(w + i * DEPTH, panel + i * (PANEL * DEPTH), DEPTH, back)


# move_row for four rows, not back.
cdef inline void transpose_rows(int8_t* w, Py_ssize_t stride, uint8_t* panel, Py_ssize_t first,
                                Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t i = first, r
    while i + 4 <= end:
        dq_transpose_16(w + i * DEPTH, stride, panel + i * (PANEL * DEPTH), PANEL * DEPTH)
        i += 4
    for r in range(4):
        move_row(w + r * stride, panel + r * DEPTH, i, end, False)


cdef inline void move_bytes(int8_t* w, uint8_t* packed, Py_ssize_t n, bint back) noexcept nogil:
    if back:
        memcpy(w, packed, n)
    else:
        memcpy(packed, w, n)


# w (rows, k) in [-128, 127], rows <= PANEL, `stride` apart -> panel, panel_bytes(k). Padding outputs and
# padding k are zero before they are biased.
cdef void pack_panel_s8(const int8_t* w, Py_ssize_t stride, Py_ssize_t rows, uint8_t* panel,
                        Py_ssize_t k) noexcept nogil:
    memset(panel, 0, panel_bytes(k))
    move_panel(<int8_t*> w, stride, k, rows, panel, False)
    bias_weights(panel, panel_bytes(k))


# panel -> w (rows, k): the inverse of pack_panel_s8.
cdef void unpack_panel_s8(const uint8_t* panel, int8_t* w, Py_ssize_t rows, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t r
    move_panel(w, k, k, rows, <uint8_t*> panel, True)
    for r in range(rows):
        bias_weights(<uint8_t*> w + r * k, k)


cdef inline uint8_t* codes_of(ActSegment* segment) noexcept nogil:
    return <uint8_t*> (segment + 1)


# Residuals of a segment follow its codes, which take four bytes a k-step, or five with what DQ_EIGHTS and
# DQ_CENTERED add to 16 of them.
cdef inline Residual* residuals_of(ActSegment* segment, Py_ssize_t k_steps) noexcept nogil:
    return <Residual*> (codes_of(segment) + (5 if DQ_FORMS and segment.form else 4) * k_steps)


# Splits those of DQ_BIAS_STEP codes whose pairs are marked in `out_of_range`. The first code is at `start` of
# a segment of k, which takes the residuals.
cdef inline void split_pairs(int8_t* codes, uint32_t out_of_range, ActSegment* segment, Py_ssize_t start,
                             Py_ssize_t k) noexcept nogil:
    cdef Residual* residuals = residuals_of(segment, k_steps_of(k))
    cdef Py_ssize_t j = 0
    while out_of_range:
        if out_of_range & 3:
            residuals[segment.residuals].step = <int32_t> ((start + j) // 4)
            memset(residuals[segment.residuals].codes, 0, 4)
            split_pair(codes + j, residuals[segment.residuals].codes)
            split_pair(codes + j + 2, residuals[segment.residuals].codes + 2)
            segment.residuals += 1
        j += 4
        out_of_range >>= 2


# codes (n,) in [-127, 127], at `start` of a row of k -> their part of the row a. Parts come one after the
# other; each but the last has a multiple of DQ_BIAS_STEP codes, and none crosses the end of a segment. The
# codes are overwritten, and padded with zeros to a multiple of DQ_BIAS_STEP.
cdef void pack_activation_s8(int8_t* codes, uint8_t* a, Py_ssize_t start, Py_ssize_t n,
                             Py_ssize_t k) noexcept nogil:
    cdef ActSegment* segment = <ActSegment*> (a + start // ACC32_K * segment_bytes(ACC32_K))
    cdef Py_ssize_t at = start % ACC32_K, i = 0
    cdef int16_t* wide = <int16_t*> codes_of(segment) + at
    cdef int32_t compensation = 0, steps = 0, eights = 0, centered = 0
    cdef uint32_t out_of_range
    if at == 0:
        segment.compensation = segment.residuals = segment.form = segment.steps_out_of_range = 0
        segment.eights_out_of_range = segment.centered_out_of_range = 0
    memset(codes + n, 0, -n & (DQ_BIAS_STEP - 1))
    while i < n:
        out_of_range = dq_bias_step(codes + i, &compensation)
        if DQ_FORMS:
            steps += dq_count_bits((out_of_range | out_of_range >> 1) & 0x5555)
            dq_count_lanes(codes + i, &eights, &centered)
        elif DQ_SPLIT and out_of_range:
            split_pairs(codes + i, out_of_range, segment, at + i, segment_k(start - at, k))
        i += DQ_BIAS_STEP
    segment.compensation += compensation
    segment.steps_out_of_range += steps
    segment.eights_out_of_range += eights
    segment.centered_out_of_range += centered
    if DEPTH >= 4:
        memcpy(codes_of(segment) + at, codes, n)
        memset(codes_of(segment) + at + n, 0, DEPTH * k_steps_of(at + n) - at - n)
    else:
        for i in range(DEPTH * k_steps_of(n)):
            wide[i] = codes[i]


# acc (PANEL,) = one segment of a panel times one row of activations. No int32 can overflow: a sum is
# at most 2**16 * 127 * 255 = 2,122,383,360 < 2**31 in magnitude before the compensation is subtracted.
cdef inline void gemv(const uint8_t* segment, const uint8_t* a, int32_t* acc,
                      Py_ssize_t k_steps) noexcept nogil:
    cdef dq_acc s0 = dq_acc_zero(), s1 = s0
    cdef dq_broadcast_act k, next
    cdef Py_ssize_t i
    for i in range(0, k_steps, 2):
        k, next = dq_broadcast(a + 4 * i), dq_broadcast(a + 4 * i + 4)
        s0 = dq_acc_step(s0, dq_weights_load(segment), k)
        s1 = dq_acc_step(s1, dq_weights_load(segment + DQ_LANES * DQ_DEPTH), k)
        segment += PANEL * DQ_DEPTH
        s0 = dq_acc_step(s0, dq_weights_load(segment), next)
        s1 = dq_acc_step(s1, dq_weights_load(segment + DQ_LANES * DQ_DEPTH), next)
        segment += PANEL * DQ_DEPTH
    dq_acc_store(acc, s0)
    dq_acc_store(acc + DQ_LANES, s1)


# acc (4, PANEL) = the same for one row and four panels, `panel_stride` bytes from each other.
cdef inline void gemv_4_panels(const uint8_t* segment, Py_ssize_t panel_stride, const uint8_t* a,
                               int32_t* acc, Py_ssize_t k_steps) noexcept nogil:
    cdef dq_acc s00 = dq_acc_zero(), s01 = s00, s10 = s00, s11 = s00, s20 = s00, s21 = s00, s30 = s00
    cdef dq_acc s31 = s00
    cdef const uint8_t* b1 = segment + panel_stride
    cdef const uint8_t* b2 = b1 + panel_stride
    cdef const uint8_t* b3 = b2 + panel_stride
    cdef dq_broadcast_act k
    cdef Py_ssize_t i, at
    for i in range(k_steps):
        k = dq_broadcast(a + 4 * i)
        at = i * (PANEL * DQ_DEPTH)
        s00 = dq_acc_step(s00, dq_weights_load(segment + at), k)
        s01 = dq_acc_step(s01, dq_weights_load(segment + at + DQ_LANES * DQ_DEPTH), k)
        s10 = dq_acc_step(s10, dq_weights_load(b1 + at), k)
        s11 = dq_acc_step(s11, dq_weights_load(b1 + at + DQ_LANES * DQ_DEPTH), k)
        s20 = dq_acc_step(s20, dq_weights_load(b2 + at), k)
        s21 = dq_acc_step(s21, dq_weights_load(b2 + at + DQ_LANES * DQ_DEPTH), k)
        s30 = dq_acc_step(s30, dq_weights_load(b3 + at), k)
        s31 = dq_acc_step(s31, dq_weights_load(b3 + at + DQ_LANES * DQ_DEPTH), k)
    store_tile(acc, s00, s01, s10, s11, s20, s21, s30, s31)


cdef inline void store_tile(int32_t* acc, dq_acc s00, dq_acc s01, dq_acc s10, dq_acc s11, dq_acc s20,
                            dq_acc s21, dq_acc s30, dq_acc s31) noexcept nogil:
    dq_acc_store(acc, s00)
    dq_acc_store(acc + DQ_LANES, s01)
    dq_acc_store(acc + 2 * DQ_LANES, s10)
    dq_acc_store(acc + 3 * DQ_LANES, s11)
    dq_acc_store(acc + 4 * DQ_LANES, s20)
    dq_acc_store(acc + 5 * DQ_LANES, s21)
    dq_acc_store(acc + 6 * DQ_LANES, s30)
    dq_acc_store(acc + 7 * DQ_LANES, s31)


# acc (4, PANEL) = the same for four rows and one panel. The rows share the loads of the weights. The next
# panel is prefetched meanwhile, which gains a fifth where weights come from the last cache or from memory;
# all its lines are, or the hardware's prefetcher loses track. Products with one row gain nothing by it. Eight
# accumulators hide the latency of the multiply-adds, and fit the registers of every instruction set. They
# have names because gcc writes an array, indexed by an unrolled loop, back to memory at every step.
cdef inline void microkernel_4(const uint8_t* segment, const uint8_t* a0, const uint8_t* a1,
                               const uint8_t* a2, const uint8_t* a3, int32_t* acc,
                               Py_ssize_t k_steps) noexcept nogil:
    cdef dq_acc s00 = dq_acc_zero(), s01 = s00, s10 = s00, s11 = s00, s20 = s00, s21 = s00, s30 = s00
    cdef dq_acc s31 = s00
    cdef dq_weights w0, w1
    cdef dq_broadcast_act k
    cdef Py_ssize_t i
    for i in range(k_steps):
        dq_prefetch(segment + k_steps * (PANEL * DQ_DEPTH), PANEL * DQ_DEPTH)
        w0 = dq_weights_load(segment)
        w1 = dq_weights_load(segment + DQ_LANES * DQ_DEPTH)
        k = dq_broadcast(a0 + 4 * i)
        s00 = dq_acc_step(s00, w0, k)
        s01 = dq_acc_step(s01, w1, k)
        k = dq_broadcast(a1 + 4 * i)
        s10 = dq_acc_step(s10, w0, k)
        s11 = dq_acc_step(s11, w1, k)
        k = dq_broadcast(a2 + 4 * i)
        s20 = dq_acc_step(s20, w0, k)
        s21 = dq_acc_step(s21, w1, k)
        k = dq_broadcast(a3 + 4 * i)
        s30 = dq_acc_step(s30, w0, k)
        s31 = dq_acc_step(s31, w1, k)
        segment += PANEL * DQ_DEPTH
    store_tile(acc, s00, s01, s10, s11, s20, s21, s30, s31)


# acc (2, PANEL) = the same for two rows, whose sums of one k-step would wait for each other: two are made in
# turns.
cdef inline void microkernel_2(const uint8_t* segment, const uint8_t* a0, const uint8_t* a1, int32_t* acc,
                               Py_ssize_t k_steps) noexcept nogil:
    cdef dq_acc s00 = dq_acc_zero(), s01 = s00, s10 = s00, s11 = s00, t00 = s00, t01 = s00, t10 = s00
    cdef dq_acc t11 = s00
    cdef dq_weights w0, w1
    cdef dq_broadcast_act k
    cdef Py_ssize_t i
    for i in range(0, k_steps, 2):
        dq_prefetch(segment + k_steps * (PANEL * DQ_DEPTH), 2 * (PANEL * DQ_DEPTH))
        w0 = dq_weights_load(segment)
        w1 = dq_weights_load(segment + DQ_LANES * DQ_DEPTH)
        k = dq_broadcast(a0 + 4 * i)
        s00 = dq_acc_step(s00, w0, k)
        s01 = dq_acc_step(s01, w1, k)
        k = dq_broadcast(a1 + 4 * i)
        s10 = dq_acc_step(s10, w0, k)
        s11 = dq_acc_step(s11, w1, k)
        segment += PANEL * DQ_DEPTH
        w0 = dq_weights_load(segment)
        w1 = dq_weights_load(segment + DQ_LANES * DQ_DEPTH)
        k = dq_broadcast(a0 + 4 * i + 4)
        t00 = dq_acc_step(t00, w0, k)
        t01 = dq_acc_step(t01, w1, k)
        k = dq_broadcast(a1 + 4 * i + 4)
        t10 = dq_acc_step(t10, w0, k)
        t11 = dq_acc_step(t11, w1, k)
        segment += PANEL * DQ_DEPTH
    dq_acc_store(acc, dq_acc_add(s00, t00))
    dq_acc_store(acc + DQ_LANES, dq_acc_add(s01, t01))
    dq_acc_store(acc + 2 * DQ_LANES, dq_acc_add(s10, t10))
    dq_acc_store(acc + 3 * DQ_LANES, dq_acc_add(s11, t11))


# Adds the residuals of one row to acc (PANEL,).
cdef inline void add_residuals(const uint8_t* segment, const ActSegment* a, int32_t* acc,
                               Py_ssize_t k_steps) noexcept nogil:
    cdef const Residual* residuals = residuals_of(<ActSegment*> a, k_steps)
    cdef dq_acc s0 = dq_acc_load(acc), s1 = dq_acc_load(acc + DQ_LANES)
    cdef const uint8_t* w
    cdef dq_broadcast_act k
    cdef Py_ssize_t i
    for i in range(a.residuals):
        w = segment + residuals[i].step * (PANEL * DQ_DEPTH)
        k = dq_broadcast(<const uint8_t*> residuals[i].codes)
        s0 = dq_acc_step(s0, dq_weights_load(w), k)
        s1 = dq_acc_step(s1, dq_weights_load(w + DQ_LANES * DQ_DEPTH), k)
    dq_acc_store(acc, s0)
    dq_acc_store(acc + DQ_LANES, s1)


# acc (rows, PANEL) for one panel and at most MICROKERNEL_ROWS rows of a, `stride` bytes from each other; or
# (panels, PANEL) for one row and 1 or DQ_CONCURRENT_PANELS panels, `panel_stride` bytes from each other.
# Where the microkernel of four rows is all there is, three take it with the last row repeated.
cdef inline void microkernel(const uint8_t* segment, Py_ssize_t panel_stride, Py_ssize_t panels,
                             const uint8_t* a, Py_ssize_t stride, Py_ssize_t rows, int32_t* acc,
                             Py_ssize_t k_steps) noexcept nogil:
    cdef const uint8_t* codes = codes_of(<ActSegment*> a)
    cdef Py_ssize_t r, p
    if panels > 1:
        gemv_4_panels(segment, panel_stride, codes, acc, k_steps)
    elif DQ_FORMS and (rows > 1 or (<const ActSegment*> a).form != DQ_PAIRS):
        dq_form_rows((<const ActSegment*> a).form, segment, codes, stride, rows, acc, k_steps)
    elif DQ_TILES_FROM > 1 and rows == 1:
        gemv(segment, codes, acc, k_steps)
    elif rows >= DQ_TILES_FROM:
        dq_tiles(segment, codes, stride, rows, acc, k_steps, DQ_TILE_K_STEPS, False)
    elif rows == 2:
        microkernel_2(segment, codes, codes + stride, acc, k_steps)
    else:
        microkernel_4(segment, codes, codes + stride, codes + 2 * stride, codes + (rows - 1) * stride, acc,
                      k_steps)
    if DQ_SPLIT:
        for r in range(rows):
            for p in range(panels):
                add_residuals(segment + p * panel_stride, <const ActSegment*> (a + r * stride),
                              acc + (r + p) * PANEL, k_steps)


# out[c] = float32(sum[c]) * w_scales[c] * a_scale + bias[c], in that order; no bias where it is NULL.
cdef inline void finish_row(const int64_t* acc, const float* w_scales, float a_scale, const float* bias,
                            float* out, Py_ssize_t cols) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(cols):
        out[c] = <float> acc[c] * w_scales[c] * a_scale
    if bias != NULL:
        for c in range(cols):
            out[c] += bias[c]


# finish_row for sums of a single segment, which fit int32 with the compensation subtracted; cols <= ROWS *
# PANEL. It vectorizes, because `values` cannot overlap anything.
cdef inline void finish_row_s32(const int32_t* acc, int32_t compensation, const float* w_scales,
                                float a_scale, const float* bias, float* out, Py_ssize_t cols) noexcept nogil:
    cdef float values[ROWS * PANEL]
    cdef Py_ssize_t c
    for c in range(cols):
        values[c] = <float> (acc[c] - compensation) * w_scales[c] * a_scale
    if bias != NULL:
        for c in range(cols):
            values[c] += bias[c]
    memcpy(out, values, cols * sizeof(float))


# totals (panels or rows, PANEL) = all segments, each summed in int32 and added up in int64.
cdef inline void microkernel_segments(const uint8_t* panel, Py_ssize_t panels, const uint8_t* a,
                                      Py_ssize_t stride, Py_ssize_t rows, int64_t* totals,
                                      Py_ssize_t k) noexcept nogil:
    cdef int32_t acc[MICROKERNEL_ROWS * PANEL]
    cdef Py_ssize_t start = 0, n, i, r
    cdef int32_t compensation
    memset(totals, 0, rows * panels * PANEL * sizeof(int64_t))
    while start < k:
        n = segment_k(start, k)
        microkernel(panel + start * PANEL, panel_bytes(k), panels, a, stride, rows, acc, k_steps_of(n))
        for r in range(rows):
            compensation = (<const ActSegment*> (a + r * stride)).compensation
            for i in range(r * PANEL, (r + panels) * PANEL):
                totals[i] += acc[i] - compensation
        a += segment_bytes(n)
        start += n


# How many of m rows are taken together where DQ_FORMS is 1: rows of one form, and nearly equal numbers of
# them.
cdef inline Py_ssize_t rows_of_form(const uint8_t* a, Py_ssize_t m) noexcept nogil:
    cdef const ActSegment* first = <const ActSegment*> a
    cdef Py_ssize_t n = min(m, <Py_ssize_t> first.rows), parts
    cdef Py_ssize_t max_rows = DQ_KEPT_ROWS if first.form == DQ_EIGHTS or first.form == DQ_CENTERED else ROWS
    parts = (n + max_rows - 1) // max_rows
    return (n + parts - 1) // parts


# How many of m rows are taken together when `done` are done. With AMX, where fewer than TILE are left, too
# few for a tile, some rows before them are computed again. With VNNI the last two parts are nearly equal.
cdef inline Py_ssize_t rows_at_once(Py_ssize_t done, Py_ssize_t m) noexcept nogil:
    cdef Py_ssize_t left = m - done
    if DQ_TILES_FROM <= left < TILE <= m:
        return TILE
    if DQ_TILE_ROWS == 2 * ROWS and DQ_TILE_ROWS < left < 2 * DQ_TILE_ROWS:
        return (left + 1) // 2
    return left if left < DQ_TILE_ROWS else DQ_TILE_ROWS


# Panels times m rows of activations: out[r][c] = float32(exact sum) * w_scales[c] * a_scales[r] + bias[c]
# for c < cols, rows of out `out_stride` apart. There is one panel, and cols <= PANEL; or one row and
# DQ_CONCURRENT_PANELS panels.
cdef inline void gemm_panels(const uint8_t* panel, Py_ssize_t panels, const float* w_scales,
                             const float* bias, const uint8_t* a, const float* a_scales, float* out,
                             Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t cols,
                             Py_ssize_t k) noexcept nogil:
    cdef int32_t acc[MICROKERNEL_ROWS * PANEL]
    cdef int64_t totals[MICROKERNEL_ROWS * PANEL]
    cdef Py_ssize_t stride = activation_bytes(k), done = 0, r, rows
    cdef const uint8_t* row
    cdef const float* row_scales
    cdef float* row_out
    cdef int32_t compensation
    while done < m:
        rows = rows_of_form(a + done * stride, m - done) if DQ_FORMS else rows_at_once(done, m)
        if done + rows > m:
            done = m - rows
        row, row_scales, row_out = a + done * stride, a_scales + done, out + done * out_stride
        if k <= ACC32_K:
            microkernel(panel, panel_bytes(k), panels, row, stride, rows, acc, k_steps_of(k))
            for r in range(rows):
                compensation = (<const ActSegment*> (row + r * stride)).compensation
                if cols == PANEL:  # as a constant it takes half the time
                    finish_row_s32(acc + r * PANEL, compensation, w_scales, row_scales[r], bias,
                                   row_out + r * out_stride, PANEL)
                else:
                    finish_row_s32(acc + r * PANEL, compensation, w_scales, row_scales[r], bias,
                                   row_out + r * out_stride, cols)
        else:
            microkernel_segments(panel, panels, row, stride, rows, totals, k)
            for r in range(rows):
                finish_row(totals + r * PANEL, w_scales, row_scales[r], bias, row_out + r * out_stride, cols)
        done += rows


# The panels of n outputs times m rows of activations: out (m, n), rows `out_stride` apart, + bias (n,) unless
# that is NULL.
cdef void gemm_s8s8_f32(const uint8_t* panels, const float* w_scales, const float* bias, const uint8_t* a,
                        const float* a_scales, float* out, Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t n,
                        Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t count, cols
    cdef bint by_vector = (DQ_TILES_FROM > 1 and m == 1
                           and (not DQ_FORMS or (<const ActSegment*> a).form == DQ_PAIRS))
    if m >= DQ_TILES_FROM:
        dq_tiles_begin(m if m < TILE else TILE, DQ_TILE_K_STEPS)
    while n > 0:
        count = DQ_CONCURRENT_PANELS if by_vector and n > (DQ_CONCURRENT_PANELS - 1) * PANEL else 1
        cols = n if n < count * PANEL else count * PANEL
        gemm_panels(panels, count, w_scales, bias, a, a_scales, out, out_stride, m, cols, k)
        panels += count * panel_bytes(k)
        w_scales += cols
        if bias != NULL:
            bias += cols
        out += cols
        n -= cols
    if m >= DQ_TILES_FROM:
        dq_tiles_end()
