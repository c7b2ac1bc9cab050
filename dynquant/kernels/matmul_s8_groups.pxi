# The exact integer product of int8 weights that have a scale for each group of k, and 8-bit activations.
#
# A panel holds the weights of PANEL outputs, biased to u8, as matmul_s8.pxi has them: for each k-step of
# DQ_DEPTH k those of all the outputs. A group starts a pair of k-steps, and padding is zero. The scales of a
# panel stand apart, PANEL next to each other for each group. A group of more than SEGMENT_K k is summed in
# segments of so many; other groups are one segment.
#
# Activations are uint8 codes u that stand for u - zero. They are packed as v = u - center, where `center`
# brings them into [-128, 128]: a sum of w * (u - zero) is one of w * v less (zero - center) times the sum of
# the weights. Symmetric activations have center = zero = 128. A v of 128 or -128 is out of range of the bytes
# that dq_acc_step takes: the 1 that is left over goes into the residuals, beside what the split leaves. Which
# center gives fewer of them depends on the row.
#
# A row of activations is: four bytes for each k-step, up to the end of a cache line; for each segment what
# its sums begin with, DQ_LANES times, because a vector that has just been stored in parts is slow to load;
# for each segment the end of its residuals; zero - center; the residuals.
#
# A sum starts at minus the correction for bias and zero point. So it ends at the exact sum, and nothing has to
# be subtracted afterwards. With at most SEGMENT_K k nothing
# wraps on the way: the start is at most 2 * 2**15 * 128 * 128 in magnitude, and what is added 2**15 * 128 *
# 255, together less than 2**31.
cdef enum:
    SEGMENT_K = 1 << 15


cdef struct GroupResidual:
    int32_t step  # within the segment
    uint8_t codes[4]


# k-steps of n k, an even number.
cdef inline Py_ssize_t group_steps(Py_ssize_t n) noexcept nogil:
    return (n + 2 * DQ_DEPTH - 1) // (2 * DQ_DEPTH) * 2


cdef inline Py_ssize_t row_steps(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return k // group * group_steps(group) + group_steps(k % group)


# Segments of a group of n.
cdef inline Py_ssize_t segments_of(Py_ssize_t n) noexcept nogil:
    return (n + SEGMENT_K - 1) // SEGMENT_K


# Elements of segment i of a group of n.
cdef inline Py_ssize_t part_len(Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    return SEGMENT_K if n - i * SEGMENT_K > SEGMENT_K else n - i * SEGMENT_K


# Segments of a row; the last group is shorter, but has space for as many as the others.
cdef Py_ssize_t s8_group_segments(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return groups_of(k, group) * segments_of(group)


cdef Py_ssize_t s8_group_panel_bytes(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return PANEL * DQ_DEPTH * row_steps(k, group)


# An odd number of cache lines, as activation_bytes.
cdef Py_ssize_t s8_group_activation_bytes(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t n = codes_bytes(k, group) + row_steps(k, group) * <Py_ssize_t> sizeof(GroupResidual)
    n += ((DQ_LANES + 1) * s8_group_segments(k, group) + 1) * <Py_ssize_t> sizeof(int32_t)
    return ((n + 63) // 64 | 1) * 64


# The parts of a row of activations.
cdef inline Py_ssize_t codes_bytes(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return (4 * row_steps(k, group) + 63) // 64 * 64


cdef inline int32_t* starts_of(const uint8_t* a, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return <int32_t*> (a + codes_bytes(k, group))


cdef inline int32_t* residual_ends_of(const uint8_t* a, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return starts_of(a, k, group) + DQ_LANES * s8_group_segments(k, group)


cdef inline int32_t* shift_of(const uint8_t* a, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return residual_ends_of(a, k, group) + s8_group_segments(k, group)


cdef inline GroupResidual* group_residuals_of(const uint8_t* a, Py_ssize_t k,
                                              Py_ssize_t group) noexcept nogil:
    return <GroupResidual*> (shift_of(a, k, group) + 1)


# w (rows, k) in [-128, 127] with scales (rows, groups), rows <= PANEL -> panel, s8_group_panel_bytes;
# panel_scales (groups, PANEL); and, unless NULL, w_sums (segments, PANEL): sums of weights, |w_sum| < 2**24.
cdef void pack_panel_s8_groups(const int8_t* w, const float* scales, Py_ssize_t rows, uint8_t* panel,
                               float* panel_scales, int32_t* w_sums, Py_ssize_t k,
                               Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t groups = groups_of(k, group), r, g, i, start, n
    cdef uint8_t* part
    memset(panel, 0, s8_group_panel_bytes(k, group))
    memset(panel_scales, 0, groups * PANEL * sizeof(float))
    if w_sums != NULL:
        memset(w_sums, 0, s8_group_segments(k, group) * PANEL * sizeof(int32_t))
    for g in range(groups):
        start = g * group
        n = group_len(start, k, group)
        part = panel + g * group_steps(group) * (PANEL * DQ_DEPTH)
        for r in range(rows):
            for i in range(n // DQ_DEPTH):
                memcpy(part + (i * PANEL + r) * DQ_DEPTH, w + r * k + start + i * DQ_DEPTH, DQ_DEPTH)
            i = n // DQ_DEPTH
            memcpy(part + (i * PANEL + r) * DQ_DEPTH, w + r * k + start + i * DQ_DEPTH, n % DQ_DEPTH)
            panel_scales[g * PANEL + r] = scales[r * groups + g]
            if w_sums != NULL:
                for i in range(n):
                    w_sums[(g * segments_of(group) + i // SEGMENT_K) * PANEL + r] += w[r * k + start + i]
    bias_weights(panel, s8_group_panel_bytes(k, group))


# The inverse of pack_panel_s8_groups.
cdef void unpack_panel_s8_groups(const uint8_t* panel, const float* panel_scales, int8_t* w, float* scales,
                                 Py_ssize_t rows, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t groups = groups_of(k, group), r, g, i, start, n
    cdef const uint8_t* part
    cdef uint8_t code
    for g in range(groups):
        start = g * group
        n = group_len(start, k, group)
        part = panel + g * group_steps(group) * (PANEL * DQ_DEPTH)
        for r in range(rows):
            for i in range(n):
                code = part[(i // DQ_DEPTH * PANEL + r) * DQ_DEPTH + i % DQ_DEPTH]
                w[r * k + start + i] = <int8_t> (code ^ <uint8_t> (DQ_BIAS >> 8 if i & 1 else DQ_BIAS))
            scales[r * groups + g] = panel_scales[g * PANEL + r]


# x (n,), scale > 0 -> codes (n,) = clamp(round half away (x / scale) + zero_point, 0, 255), as
# quantize_row_f32_u4.
cdef void quantize_row_f32_u8_away(const float* x, float scale, int32_t zero_point, uint8_t* codes,
                                   Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef float v, min_code = -zero_point, max_code = 255 - zero_point
    for i in range(n):
        v = x[i] / scale
        v = min_code if v < min_code else v
        v = max_code if v > max_code else v
        codes[i] = <uint8_t> (<int32_t> (v + copysignf(<float> DQ_BELOW_HALF, v)) + zero_point)


# The center, 127 or 128, that leaves fewer of n codes out of range.
cdef inline int32_t center_of(const uint8_t* codes, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, low = 0, high = 0
    for i in range(n):
        low += codes[i] == 0
        high += codes[i] == 255
    return 127 if high < low else 128


# codes (k,) with their zero -> a, s8_group_activation_bytes. Symmetric codes have zero = 128 and are never 0.
cdef void pack_activation_groups(const uint8_t* codes, int32_t zero, uint8_t* a, Py_ssize_t k,
                                 Py_ssize_t group) noexcept nogil:
    cdef int32_t center = 128 if zero == 128 else center_of(codes, k)
    cdef int32_t* starts = starts_of(a, k, group)
    cdef int32_t* ends = residual_ends_of(a, k, group)
    cdef GroupResidual* residuals = group_residuals_of(a, k, group)
    cdef int32_t count = 0, compensation
    cdef Py_ssize_t start = 0, n, in_group, i, lane
    (shift_of(a, k, group))[0] = zero - center
    while start < k:
        in_group = group_len(start, k, group)
        for i in range(segments_of(in_group)):
            n = part_len(i, in_group)
            count = pack_group_segment(codes + start + i * SEGMENT_K, center, a, &compensation, residuals,
                                       count, n)
            for lane in range(DQ_LANES):
                starts[lane] = -compensation
            ends[0] = count
            a += 4 * group_steps(n)
            starts += DQ_LANES
            ends += 1
        start += group


# One segment of n codes -> its bytes at `a`, its compensation, and its residuals, which begin at `count`.
# Returns where they end.
cdef inline int32_t pack_group_segment(const uint8_t* codes, int32_t center, uint8_t* a,
                                       int32_t* compensation, GroupResidual* residuals, int32_t count,
                                       Py_ssize_t n) noexcept nogil:
    cdef uint8_t tail[DQ_BIAS_STEP]
    cdef Py_ssize_t start = 0
    compensation[0] = 0
    memset(a + n // DQ_BIAS_STEP * (4 * DQ_BIAS_STEP // DQ_DEPTH), 0,
           4 * (group_steps(n) - n // DQ_BIAS_STEP * (DQ_BIAS_STEP // DQ_DEPTH)))
    while start + DQ_BIAS_STEP <= n:
        count = pack_codes_step(codes + start, center, a, compensation, residuals, count, start, DQ_BIAS_STEP)
        start += DQ_BIAS_STEP
    if start < n:
        memset(tail, center, sizeof(tail))
        memcpy(tail, codes + start, n - start)
        count = pack_codes_step(tail, center, a, compensation, residuals, count, start, n - start)
    return count


# DQ_BIAS_STEP codes, of which those from n on are `center`, at `start` of a segment whose bytes are at `a`.
cdef inline int32_t pack_codes_step(const uint8_t* codes, int32_t center, uint8_t* a, int32_t* compensation,
                                    GroupResidual* residuals, int32_t count, Py_ssize_t start,
                                    Py_ssize_t n) noexcept nogil:
    cdef int8_t v[DQ_BIAS_STEP]
    cdef int8_t over[DQ_BIAS_STEP]
    cdef uint8_t out_of_range = 255 if center == 127 else 0, any_over = 0
    cdef uint32_t pairs
    cdef Py_ssize_t i
    for i in range(DQ_BIAS_STEP):
        v[i] = <int8_t> (codes[i] - center)
        over[i] = codes[i] == out_of_range
        any_over |= <uint8_t> over[i]
    if any_over:
        for i in range(DQ_BIAS_STEP):
            if over[i]:
                over[i] = 1 if center == 127 else -1
                v[i] = 127 * over[i]
    pairs = dq_bias_step(v, compensation)
    if any_over:
        dq_bias_step(over, compensation)
    if DQ_DEPTH == 2:  # int16, which holds it all
        for i in range(n):
            (<int16_t*> a)[start + i] = v[i] + over[i]
    else:
        if any_over or DQ_SPLIT and pairs:
            count = split_steps(v, over, pairs, residuals, count, start // 4)
        memcpy(a + start, v, n + (-n & 3))
    return count


# Residuals of DQ_BIAS_STEP codes v, of which those in `over` and those of the split are left over; the first
# k-step is `step`.
cdef inline int32_t split_steps(int8_t* v, int8_t* over, uint32_t pairs, GroupResidual* residuals,
                                int32_t count, Py_ssize_t step) noexcept nogil:
    cdef int8_t left[4]
    cdef Py_ssize_t j, i
    for j in range(0, DQ_BIAS_STEP, 4):
        memset(left, 0, sizeof(left))
        if DQ_SPLIT and pairs & 3:
            split_pair(v + j, left)
            split_pair(v + j + 2, left + 2)
        pairs >>= 2
        for i in range(4):
            left[i] = <int8_t> (left[i] + over[j + i])
        if left[0] or left[1] or left[2] or left[3]:
            residuals[count].step = <int32_t> (step + j // 4)
            memcpy(residuals[count].codes, left, 4)
            count += 1
    return count


# A row of activations, taken apart. The end of a segment's residuals is the start of the next one's.
cdef struct GroupRow:
    const uint8_t* codes
    const int32_t* starts
    const int32_t* ends
    const GroupResidual* residuals
    int32_t shift, next


cdef inline GroupRow group_row(const uint8_t* a, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef GroupRow row
    row.codes, row.starts = a, starts_of(a, k, group)
    row.ends, row.residuals = residual_ends_of(a, k, group), group_residuals_of(a, k, group)
    row.shift, row.next = (shift_of(a, k, group))[0], 0
    return row


# What the sums of a segment begin with: `half` further on for the second half of a panel. With w_sums, those
# of the panel, it is computed in scratch (PANEL,).
cdef inline const int32_t* start_of(const GroupRow* row, Py_ssize_t segment, const int32_t* w_sums,
                                    int32_t* scratch) noexcept nogil:
    cdef const int32_t* start = row.starts + segment * DQ_LANES
    cdef Py_ssize_t c
    if w_sums == NULL:
        return start
    for c in range(PANEL):
        scratch[c] = <int32_t> (<uint32_t> start[0] - <uint32_t> row.shift * <uint32_t> w_sums[c])
    return scratch


# Adds the residuals of one segment to the sums of a panel.
cdef inline void add_group_residuals(const uint8_t* w, const GroupRow* row, Py_ssize_t segment, dq_acc* s0,
                                     dq_acc* s1) noexcept nogil:
    cdef const uint8_t* step
    cdef dq_broadcast_act k
    cdef int32_t i
    for i in range(row.next, row.ends[segment]):
        step = w + row.residuals[i].step * (PANEL * DQ_DEPTH)
        k = dq_broadcast(row.residuals[i].codes)
        s0[0] = dq_acc_step(s0[0], dq_weights_load(step), k)
        s1[0] = dq_acc_step(s1[0], dq_weights_load(step + DQ_LANES * DQ_DEPTH), k)


# total (PANEL,) += float32(sums) * scales. dq_group_add takes any int32; there are no zero points here.
cdef inline void add_scaled(float* total, dq_acc s0, dq_acc s1, const float* scales) noexcept nogil:
    cdef float zeros[DQ_LANES]
    cdef dq_floats zero
    memset(zeros, 0, sizeof(zeros))
    zero = dq_floats_load(zeros)
    dq_floats_store(total, dq_group_add(dq_floats_load(total), s0, zero, 0, dq_floats_load(scales)))
    dq_floats_store(total + DQ_LANES, dq_group_add(dq_floats_load(total + DQ_LANES), s1, zero, 0,
                                                   dq_floats_load(scales + DQ_LANES)))


# s0 and s1 = what `start` points to and one segment of a panel times one row; an even number of k-steps.
cdef inline void segment_gemv(const uint8_t* w, const GroupRow* row, Py_ssize_t segment, const int32_t* start,
                              Py_ssize_t half, Py_ssize_t k_steps, dq_acc* s0, dq_acc* s1) noexcept nogil:
    cdef dq_broadcast_act k, next
    cdef const uint8_t* panel = w
    cdef Py_ssize_t i
    s0[0], s1[0] = dq_acc_load(start), dq_acc_load(start + half)
    for i in range(0, k_steps, 2):
        k, next = dq_broadcast(row.codes + 4 * i), dq_broadcast(row.codes + 4 * i + 4)
        s0[0] = dq_acc_step(s0[0], dq_weights_load(w), k)
        s1[0] = dq_acc_step(s1[0], dq_weights_load(w + DQ_LANES * DQ_DEPTH), k)
        w += PANEL * DQ_DEPTH
        s0[0] = dq_acc_step(s0[0], dq_weights_load(w), next)
        s1[0] = dq_acc_step(s1[0], dq_weights_load(w + DQ_LANES * DQ_DEPTH), next)
        w += PANEL * DQ_DEPTH
    add_group_residuals(panel, row, segment, s0, s1)


# total (4, PANEL) += one group of one row and four panels, `panel_stride` bytes and `scale_stride` scales
# apart: DQ_CONCURRENT_PANELS streams.
cdef inline void group_4_panels(const uint8_t* w, Py_ssize_t panel_stride, const GroupRow* row,
                                Py_ssize_t segment, const int32_t** starts, Py_ssize_t half,
                                const float* scales, Py_ssize_t scale_stride, float* total,
                                Py_ssize_t k_steps) noexcept nogil:
    cdef dq_acc s00 = dq_acc_load(starts[0]), s01 = dq_acc_load(starts[0] + half)
    cdef dq_acc s10 = dq_acc_load(starts[1]), s11 = dq_acc_load(starts[1] + half)
    cdef dq_acc s20 = dq_acc_load(starts[2]), s21 = dq_acc_load(starts[2] + half)
    cdef dq_acc s30 = dq_acc_load(starts[3]), s31 = dq_acc_load(starts[3] + half)
    cdef const uint8_t* w1 = w + panel_stride
    cdef const uint8_t* w2 = w1 + panel_stride
    cdef const uint8_t* w3 = w2 + panel_stride
    cdef dq_broadcast_act k
    cdef Py_ssize_t i, at
    for i in range(k_steps):
        k = dq_broadcast(row.codes + 4 * i)
        at = i * (PANEL * DQ_DEPTH)
        s00 = dq_acc_step(s00, dq_weights_load(w + at), k)
        s01 = dq_acc_step(s01, dq_weights_load(w + at + DQ_LANES * DQ_DEPTH), k)
        s10 = dq_acc_step(s10, dq_weights_load(w1 + at), k)
        s11 = dq_acc_step(s11, dq_weights_load(w1 + at + DQ_LANES * DQ_DEPTH), k)
        s20 = dq_acc_step(s20, dq_weights_load(w2 + at), k)
        s21 = dq_acc_step(s21, dq_weights_load(w2 + at + DQ_LANES * DQ_DEPTH), k)
        s30 = dq_acc_step(s30, dq_weights_load(w3 + at), k)
        s31 = dq_acc_step(s31, dq_weights_load(w3 + at + DQ_LANES * DQ_DEPTH), k)
    add_group_residuals(w, row, segment, &s00, &s01)
    add_group_residuals(w1, row, segment, &s10, &s11)
    add_group_residuals(w2, row, segment, &s20, &s21)
    add_group_residuals(w3, row, segment, &s30, &s31)
    add_scaled(total, s00, s01, scales)
    add_scaled(total + PANEL, s10, s11, scales + scale_stride)
    add_scaled(total + 2 * PANEL, s20, s21, scales + 2 * scale_stride)
    add_scaled(total + 3 * PANEL, s30, s31, scales + 3 * scale_stride)


# total (ROWS, PANEL) += one group of four rows; as microkernel_4, with the next panel prefetched.
cdef inline void group_4_rows(const uint8_t* w, const GroupRow* rows, Py_ssize_t segment,
                              const int32_t** starts, Py_ssize_t half, const float* scales, float* total,
                              Py_ssize_t k_steps, Py_ssize_t prefetch_distance) noexcept nogil:
    cdef dq_acc s00 = dq_acc_load(starts[0]), s01 = dq_acc_load(starts[0] + half)
    cdef dq_acc s10 = dq_acc_load(starts[1]), s11 = dq_acc_load(starts[1] + half)
    cdef dq_acc s20 = dq_acc_load(starts[2]), s21 = dq_acc_load(starts[2] + half)
    cdef dq_acc s30 = dq_acc_load(starts[3]), s31 = dq_acc_load(starts[3] + half)
    cdef const uint8_t* panel = w
    cdef const uint8_t* a0 = rows[0].codes
    cdef const uint8_t* a1 = rows[1].codes
    cdef const uint8_t* a2 = rows[2].codes
    cdef const uint8_t* a3 = rows[3].codes
    cdef dq_weights w0, w1
    cdef dq_broadcast_act k
    cdef Py_ssize_t i
    for i in range(k_steps):
        dq_prefetch(w + prefetch_distance, PANEL * DQ_DEPTH)
        w0 = dq_weights_load(w)
        w1 = dq_weights_load(w + DQ_LANES * DQ_DEPTH)
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
        w += PANEL * DQ_DEPTH
    add_group_residuals(panel, &rows[0], segment, &s00, &s01)
    add_group_residuals(panel, &rows[1], segment, &s10, &s11)
    add_group_residuals(panel, &rows[2], segment, &s20, &s21)
    add_group_residuals(panel, &rows[3], segment, &s30, &s31)
    add_scaled(total, s00, s01, scales)
    add_scaled(total + PANEL, s10, s11, scales)
    add_scaled(total + 2 * PANEL, s20, s21, scales)
    add_scaled(total + 3 * PANEL, s30, s31, scales)


# Goes on to the next segment.
cdef inline void next_segment(GroupRow* row, Py_ssize_t segment, Py_ssize_t k_steps) noexcept nogil:
    row.codes += 4 * k_steps
    row.next = row.ends[segment]


# total (panels, PANEL) = the sum over the groups, in ascending order and from 0, of float32(exact sum) *
# scale, for one row; of one panel or four, which lie one after the other.
cdef inline void s8_groups_gemv(const uint8_t* panel, Py_ssize_t panels, const float* scales,
                                const int32_t* w_sums, const uint8_t* a, float* total, Py_ssize_t k,
                                Py_ssize_t group) noexcept nogil:
    cdef int32_t scratch[ROWS * PANEL]
    cdef const int32_t* starts[ROWS]
    cdef Py_ssize_t half = 0 if w_sums == NULL else DQ_LANES
    cdef GroupRow row = group_row(a, k, group)
    cdef Py_ssize_t width = s8_group_panel_bytes(k, group), groups = groups_of(k, group), g, k_steps, p
    cdef dq_acc s0, s1
    memset(total, 0, panels * PANEL * sizeof(float))
    for g in range(groups):
        k_steps = group_steps(group_len(g * group, k, group))
        for p in range(panels):
            starts[p] = start_of(&row, g,
                                 NULL if w_sums == NULL else <int32_t*> w_sums + (p * groups + g) * PANEL,
                                 scratch + p * PANEL)
        if panels == 1:
            segment_gemv(panel, &row, g, starts[0], half, k_steps, &s0, &s1)
            add_scaled(total, s0, s1, scales)
        else:
            group_4_panels(panel, width, &row, g, starts, half, scales, groups * PANEL, total, k_steps)
        panel += PANEL * DQ_DEPTH * k_steps
        scales += PANEL
        next_segment(&row, g, k_steps)


# total (ROWS, PANEL) = the same for 2 <= m <= ROWS rows. Two and three take the microkernel of four, with the
# last row repeated.
cdef inline void s8_groups_4_rows(const uint8_t* panel, const float* scales, const int32_t* w_sums,
                                  const uint8_t* a, Py_ssize_t stride, Py_ssize_t m, float* total,
                                  Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef int32_t scratch[ROWS * PANEL]
    cdef const int32_t* starts[ROWS]
    cdef Py_ssize_t half = 0 if w_sums == NULL else DQ_LANES
    cdef GroupRow rows[ROWS]
    cdef Py_ssize_t width = s8_group_panel_bytes(k, group), g, k_steps, r
    for r in range(ROWS):
        rows[r] = group_row(a + (r if r < m else m - 1) * stride, k, group)
    memset(total, 0, ROWS * PANEL * sizeof(float))
    for g in range(groups_of(k, group)):
        k_steps = group_steps(group_len(g * group, k, group))
        for r in range(ROWS):
            starts[r] = start_of(&rows[r], g, w_sums, scratch + r * PANEL)
        group_4_rows(panel, rows, g, starts, half, scales, total, k_steps, width)
        panel += PANEL * DQ_DEPTH * k_steps
        scales += PANEL
        if w_sums != NULL:
            w_sums += PANEL
        for r in range(ROWS):
            next_segment(&rows[r], g, k_steps)


# total (PANEL,) = the same for one row and groups of more than SEGMENT_K k: sums of segments are added up in
# int64, and rounded to a float once.
cdef inline void s8_long_groups(const uint8_t* panel, const float* scales, const int32_t* w_sums,
                                const uint8_t* a, float* total, Py_ssize_t k,
                                Py_ssize_t group) noexcept nogil:
    cdef int32_t acc[PANEL]
    cdef int64_t sums[PANEL]
    cdef const int32_t* start
    cdef Py_ssize_t half = 0 if w_sums == NULL else DQ_LANES
    cdef GroupRow row = group_row(a, k, group)
    cdef Py_ssize_t at = 0, segment = 0, i, n, k_steps, c
    cdef dq_acc s0, s1
    memset(total, 0, PANEL * sizeof(float))
    while at < k:
        n = group_len(at, k, group)
        memset(sums, 0, sizeof(sums))
        for i in range(segments_of(n)):
            k_steps = group_steps(part_len(i, n))
            start = start_of(&row, segment, w_sums, acc)
            segment_gemv(panel, &row, segment, start, half, k_steps, &s0, &s1)
            dq_acc_store(acc, s0)
            dq_acc_store(acc + DQ_LANES, s1)
            for c in range(PANEL):
                sums[c] += acc[c]
            panel += PANEL * DQ_DEPTH * k_steps
            if w_sums != NULL:
                w_sums += PANEL
            next_segment(&row, segment, k_steps)
            segment += 1
        for c in range(PANEL):
            total[c] += <float> sums[c] * scales[c]
        scales += PANEL
        at += group


# The panels of n outputs times m rows of activations: out[r][c] = total * a_scales[r] + bias[c], rows of out
# `out_stride` apart, total as s8_groups_gemv has it. No bias where it is NULL; w_sums are NULL for
# symmetric activations.
cdef void gemm_s8_groups_f32(const uint8_t* panel, const float* scales, const int32_t* w_sums,
                             const float* bias, const uint8_t* a, const float* a_scales, float* out,
                             Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k,
                             Py_ssize_t group) noexcept nogil:
    cdef float total[ROWS * PANEL]
    cdef float* panel_bias
    cdef Py_ssize_t stride = s8_group_activation_bytes(k, group), panels, cols, r, rows, p
    while n > 0:
        panels = 1
        if DQ_CONCURRENT_PANELS == ROWS and m == 1 and n > (ROWS - 1) * PANEL and group <= SEGMENT_K:
            panels = ROWS
        cols = n if n < panels * PANEL else panels * PANEL
        r = 0
        while r < m:
            rows = 1
            if group > SEGMENT_K:
                s8_long_groups(panel, scales, w_sums, a + r * stride, total, k, group)
            elif m - r == 1:
                s8_groups_gemv(panel, panels, scales, w_sums, a + r * stride, total, k, group)
            else:
                rows = m - r if m - r < ROWS else ROWS
                s8_groups_4_rows(panel, scales, w_sums, a + r * stride, stride, rows, total, k, group)
            # Panels of one row lie side by side, as its outputs do.
            for p in range(panels):
                panel_bias = NULL if bias == NULL else <float*> bias + p * PANEL
                finish_rows(total + p * PANEL, a_scales + r, panel_bias, out + r * out_stride + p * PANEL,
                            out_stride, rows, PANEL if p < panels - 1 else cols - p * PANEL)
            r += rows
        panel += panels * s8_group_panel_bytes(k, group)
        scales += panels * groups_of(k, group) * PANEL
        if w_sums != NULL:
            w_sums += panels * s8_group_segments(k, group) * PANEL
        if bias != NULL:
            bias += cols
        out += cols
        n -= cols
