# Forms of activations for VPMADDUBSW, which adds pairs of products in int16 (DQ_FORMS is 1).
#
# A product of pairs (split.pxi) takes three instructions for 32 products. The int16 results of four of them
# may be added before they are widened to int32, which makes 9 for 128, where the sum of eight products fits
# int16. So the 16 codes of four k-steps make two lanes of eight, the first and the second pair of each, and a
# form says what a lane may hold. P is the sum of its positive codes, N that of the magnitudes of its negative
# ones; biased weights are in [0, 255]:
#
# DQ_PAIRS      what split.pxi says.
# DQ_EIGHTS     P and N are at most DQ_EIGHTS_LIMIT = 128 each: 255 * 128 = 32,640 < 2**15. Pairs are then in
#               range.
# DQ_CENTERED   pairs are in range, and P + N is at most DQ_CENTERED_LIMIT = 257. The sum lies in [-255 * N,
#               255 * P]; with floor(-127.5 * (P - N)) added to the lane, in [-32,768, 32,767]. The lane
#               starts with that number, modulo 2**16 like all sums in it, and so does the compensation.
# DQ_WIDE       int16 codes and weights, VPMADDWD: 15 instructions for 64 products, whatever the codes are.
#
# Where a lane or a pair is out of range, the excess moves to residuals, as in split.pxi. Codes are scaled by the largest
# magnitude of the row. Activations of real networks have a few large values and many small ones, so that few
# lanes are out of range; where they are uniformly distributed nearly all are.
#
# Codes take four bytes a k-step; in DQ_CENTERED 16 of them are followed by what starts their lanes, two
# int16; in DQ_WIDE they are int16, the two even ones of a k-step first. Residuals have the rest of the 12
# bytes a k-step that segment_bytes counts.
cdef enum:
    # Rows that share a form, and from how many on they may have another than DQ_PAIRS.
    BAND_ROWS = 32
    DEEP_FROM = 5


# Times of the forms on Zen 3, in tenths of cycles for one row and 16 k of a panel, and for each residual.
# Another form than DQ_PAIRS has to be faster by 3 %.
cdef inline int fastest_form(Py_ssize_t blocks, Py_ssize_t steps, Py_ssize_t eights, Py_ssize_t centered,
                             Py_ssize_t rows) noexcept nogil:
    cdef Py_ssize_t best = 86 * blocks + 53 * steps, cost
    cdef int form = DQ_PAIRS
    if 120 * blocks < best:
        best, form = 120 * blocks, DQ_WIDE
    if rows < DEEP_FROM:
        return form
    cost = 72 * blocks + 56 * eights
    if cost < best:
        best, form = cost, DQ_EIGHTS
    return DQ_CENTERED if 77 * blocks + 60 * (steps + centered) < best else form


# The form of `rows` rows of k.
cdef inline int form_of_band(const uint8_t* a, Py_ssize_t rows, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t stride = activation_bytes(k), steps = 0, eights = 0, centered = 0, r, start
    cdef const ActSegment* segment
    if rows == 1:
        return DQ_PAIRS
    for r in range(rows):
        start = 0
        while start < k:
            segment = <const ActSegment*> (a + r * stride + start // ACC32_K * segment_bytes(ACC32_K))
            steps += segment.steps_out_of_range
            eights += segment.eights_out_of_range
            centered += segment.centered_out_of_range
            start += ACC32_K
    return fastest_form(rows * ((k + 15) // 16), steps, eights, centered, rows)


# Whether a segment has space for its residuals in a form. A lane that is out of range leaves residuals in at
# most four k-steps, and a pair that is out of range by itself in two.
cdef inline bint residuals_fit(const ActSegment* segment, int form, Py_ssize_t k_steps) noexcept nogil:
    cdef Py_ssize_t lanes = segment.eights_out_of_range
    if form == DQ_CENTERED:
        lanes = segment.centered_out_of_range
    return (2 * segment.steps_out_of_range + 8 * lanes) * <Py_ssize_t> sizeof(Residual) <= 7 * k_steps


# Splits the 16 codes of four k-steps from `step` on, which are out of the range of a form.
cdef inline void split_lanes(uint8_t* codes, int form, ActSegment* segment, Residual* residuals,
                             Py_ssize_t step) noexcept nogil:
    cdef int8_t over[32]
    cdef uint32_t steps = dq_split_16(codes, over, form)
    cdef int j
    while steps:
        j = dq_lowest_bit(steps)
        residuals[segment.residuals].step = <int32_t> (step + j % 4)
        memcpy(residuals[segment.residuals].codes, over + 4 * j, 4)
        segment.residuals += 1
        steps &= steps - 1


# Splits the pairs of a segment of k that are out of range.
cdef inline void split_segment(ActSegment* segment, Py_ssize_t k) noexcept nogil:
    cdef int8_t* codes = <int8_t*> codes_of(segment)
    cdef int8_t last[DQ_BIAS_STEP]
    cdef Py_ssize_t n = 4 * k_steps_of(k), i = 0
    while i + DQ_BIAS_STEP <= n:
        split_pairs(codes + i, dq_pairs_out_of_range(codes + i), segment, i, k)
        i += DQ_BIAS_STEP
    if i < n:
        memset(last, 0, DQ_BIAS_STEP)
        memcpy(last, codes + i, n - i)
        split_pairs(codes + i, dq_pairs_out_of_range(last), segment, i, k)


cdef inline void arrange_eights(ActSegment* segment, Py_ssize_t k_steps) noexcept nogil:
    cdef uint8_t* codes = codes_of(segment)
    cdef Py_ssize_t i
    for i in range(k_steps // 4):
        if dq_eights_out_of_range(codes + 16 * i):
            split_lanes(codes + 16 * i, DQ_EIGHTS, segment, residuals_of(segment, k_steps), 4 * i)


# In place, as arrange_wide, and so from the end.
cdef inline void arrange_centered(ActSegment* segment, Py_ssize_t k_steps) noexcept nogil:
    cdef uint8_t* codes = codes_of(segment)
    cdef uint8_t* out
    cdef int16_t first[2]
    cdef int32_t compensation = 0
    cdef Py_ssize_t i
    for i in range(k_steps // 4 - 1, -1, -1):
        out = codes + 20 * i
        if dq_center_16(codes + 16 * i, out):
            split_lanes(out, DQ_CENTERED, segment, residuals_of(segment, k_steps), 4 * i)
            dq_center_16(out, out)
        memcpy(first, out + 16, 4)
        compensation += first[0] + first[1]
    segment.compensation += compensation


cdef inline void arrange_wide(ActSegment* segment, Py_ssize_t k_steps) noexcept nogil:
    cdef uint8_t* codes = codes_of(segment)
    cdef Py_ssize_t i
    for i in range(k_steps // 4 - 1, -1, -1):
        dq_widen_16(codes + 16 * i, codes + 32 * i)


# Brings a segment of k, which is DQ_PAIRS and not split, into a form.
cdef inline void arrange_segment(ActSegment* segment, int form, Py_ssize_t k) noexcept nogil:
    segment.form = form
    if form == DQ_EIGHTS:
        arrange_eights(segment, k_steps_of(k))
    elif form == DQ_CENTERED:
        arrange_centered(segment, k_steps_of(k))
    elif form == DQ_WIDE:
        arrange_wide(segment, k_steps_of(k))
    elif segment.steps_out_of_range:
        split_segment(segment, k)


cdef inline void arrange_row(uint8_t* a, int form, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t start = 0
    while start < k:
        if not residuals_fit(<ActSegment*> (a + start // ACC32_K * segment_bytes(ACC32_K)), form,
                             k_steps_of(segment_k(start, k))) and form != DQ_WIDE:
            form = DQ_PAIRS
        start += ACC32_K
    start = 0
    while start < k:
        arrange_segment(<ActSegment*> (a + start // ACC32_K * segment_bytes(ACC32_K)), form,
                        segment_k(start, k))
        start += ACC32_K


# Counts for each row how many from it on have its form.
cdef inline void count_rows(uint8_t* a, Py_ssize_t m, Py_ssize_t stride) noexcept nogil:
    cdef Py_ssize_t r
    cdef ActSegment* row
    for r in range(m - 1, -1, -1):
        row = <ActSegment*> (a + r * stride)
        row.rows = 1
        if r + 1 < m and (<const ActSegment*> (a + (r + 1) * stride)).form == row.form:
            row.rows += (<const ActSegment*> (a + (r + 1) * stride)).rows


# m rows of k > 0 codes, each complete as pack_activation_s8 leaves it -> what gemm_s8s8_f32 takes, once.
cdef void arrange_activations_s8(uint8_t* a, Py_ssize_t m, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t stride = activation_bytes(k), bands = (m + BAND_ROWS - 1) // BAND_ROWS, b, first, end, r
    cdef int form
    if not DQ_FORMS:
        return
    for b in range(bands):
        first, end = m * b // bands, m * (b + 1) // bands
        form = form_of_band(a + first * stride, end - first, k)
        for r in range(first, end):
            arrange_row(a + r * stride, form, k)
    count_rows(a, m, stride)
