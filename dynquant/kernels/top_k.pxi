# Search for the vectors with the highest scores, and scores of float vectors.
cdef enum:
    SCORES = 32  # scores that are compared together
    NIBBLES = DQ_NIBBLES
    NIBBLE_BYTES = DQ_NIBBLES // 2
    NIBBLE_BLOCKS = 256  # blocks of NIBBLES that are multiplied together


# A hit as an integer: keys ascend as scores descend, and among equal scores as indices ascend. Bits of floats
# without a sign have their order as integers, those with one the reverse. -0.0 + 0.0 is 0.0, so that the two
# zeros are equal.
cdef inline uint64_t hit_key(float score, uint32_t index) noexcept nogil:
    cdef uint32_t bits = <uint32_t> dq_bits(score + <float> 0)
    bits ^= <uint32_t> 0xFFFFFFFF if bits >> 31 else <uint32_t> 0x80000000
    return <uint64_t> ~bits << 32 | index


# Whether one of SCORES scores is above the threshold, or NaN; all are above NaN. An "and" of integers, which
# vectorizes.
cdef inline bint any_above(const float* scores, float threshold) noexcept nogil:
    cdef int32_t below = 1
    cdef Py_ssize_t i
    for i in range(SCORES):
        below &= scores[i] <= threshold
    return not below


# Keys of those scores (n,) that are above the threshold, or of all where it is NaN, and allowed; score i is
# that of index first + i. allowed (n,) is NULL where all are. Returns how many there are, -1 if one of them
# is NaN: keys has room for n. After the first blocks of a corpus hardly any score is above, so the loop does
# little but compare.
cdef Py_ssize_t collect_above_f32(const float* scores, float threshold, uint32_t first,
                                  const uint8_t* allowed, uint64_t* keys, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, end, found = 0
    while i < n:
        end = i + SCORES
        if end <= n and not any_above(scores + i, threshold):
            i = end
            continue
        end = end if end < n else n
        while i < end:
            if not scores[i] <= threshold and (allowed == NULL or allowed[i]):
                if scores[i] != scores[i]:
                    return -1
                keys[found] = hit_key(scores[i], first + <uint32_t> i)
                found += 1
            i += 1
    return found


# scores (n,) = dot products -> minus the squared distance, which is that much higher the nearer a vector is:
# norm + norms[i] - 2 * scores[i], at least 0, where the norms are squared. In place. NaN stays.
cdef void negative_distance_row_f32(float* scores, float norm, const float* norms,
                                    Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef float distance
    for i in range(n):
        distance = (norm + norms[i]) - (scores[i] + scores[i])  # with 2 * Cython would go on in float64
        scores[i] = -(<float> 0 if distance < 0 else distance)


# x . y in float64, as sums.pxi says. Each product of two floats is exact.
cdef double dot_row_f32_f64(const float* x, const float* y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, j
    cdef double lane[LANES]
    memset(lane, 0, sizeof(lane))
    while i + LANES <= n:
        for j in range(LANES):
            lane[j] += <double> x[i + j] * y[i + j]
        i += LANES
    for j in range(n - i):
        lane[j] += <double> x[i + j] * y[i + j]
    return add_lanes(lane)


# The same of (x - y)**2.
cdef double square_distance_row_f32_f64(const float* x, const float* y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, j
    cdef double lane[LANES]
    cdef double d
    memset(lane, 0, sizeof(lane))
    while i + LANES <= n:
        for j in range(LANES):
            d = <double> x[i + j] - y[i + j]
            lane[j] += d * d
        i += LANES
    for j in range(n - i):
        d = <double> x[i + j] - y[i + j]
        lane[j] += d * d
    return add_lanes(lane)


# Bytes of a query as matvec_u4s8_f32 takes it: its codes, then an int32 for each group.
cdef Py_ssize_t nibble_query_bytes(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return (k + NIBBLES - 1) // NIBBLES * NIBBLES + groups_of(k, group) * <Py_ssize_t> sizeof(int32_t)


# Whether matvec_u4s8_f32 takes such rows.
cdef bint nibble_rows_fit(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return group <= NIBBLES * NIBBLE_BLOCKS and (group % NIBBLES == 0 or group >= k)


# codes (k,) in [-127, 127] -> a, nibble_query_bytes. In each NIBBLES of them those with an even k come first.
cdef void pack_nibble_query(const int8_t* codes, uint8_t* a, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t blocks = (k + NIBBLES - 1) // NIBBLES, i, g
    cdef int32_t* sums = <int32_t*> (a + blocks * NIBBLES)
    memset(a, 0, blocks * NIBBLES)
    for i in range(k):
        a[i // NIBBLES * NIBBLES + i % 2 * NIBBLE_BYTES + i % NIBBLES // 2] = <uint8_t> codes[i]
    for g in range(groups_of(k, group)):
        sums[g] = sum_codes(codes + g * group, group_len(g * group, k, group))


# Packed codes w (rows, ceil(k / 2)) as they lie, times one query, where nibble_rows_fit: out (rows,) is what
# gemm_u4s8_f32 gives, to the bit. zero_points (rows, groups) are NULL where codes are symmetric: 8 is added
# then. No int32 wraps, and each sum of a group is exact in float32: a group has at most 2**13 codes, and
# 2**13 * 15 * 127 < 2**24.
#
# Groups are taken as many at a time as have NIBBLE_BLOCKS blocks; and rows too, where they have fewer, since
# the scales of a row follow those of the one before it.
cdef void matvec_u4s8_f32(const uint8_t* w, const float* scales, const uint8_t* zero_points, const uint8_t* a,
                          float a_scale, float* out, Py_ssize_t rows, Py_ssize_t k,
                          Py_ssize_t group) noexcept nogil:
    cdef int32_t sums[NIBBLE_BLOCKS]
    cdef int32_t a_sums[NIBBLE_BLOCKS]
    cdef float terms[NIBBLE_BLOCKS]
    cdef Py_ssize_t blocks = (k + NIBBLES - 1) // NIBBLES, groups = groups_of(k, group), width = (k + 1) // 2
    cdef Py_ssize_t each = blocks if groups == 1 else group // NIBBLES
    cdef Py_ssize_t span = min(groups, NIBBLE_BLOCKS // each)
    cdef Py_ssize_t batch = NIBBLE_BLOCKS // blocks if span == groups else 1
    cdef Py_ssize_t r, g, first, start, n, done = 0
    cdef uint8_t flip = 0x88 if zero_points == NULL else 0
    cdef float total
    while done < rows:
        batch = min(batch, rows - done)
        memset(out + done, 0, batch * sizeof(float))
        first = 0
        while first < groups:
            n, start = min(span, groups - first), first * group
            for r in range(batch):
                sum_nibbles(w + (done + r) * width + start // 2, a + start, flip, sums + r * n,
                            min(k, start + n * group) - start)
                add_blocks(sums + r * n, n, each, blocks - start // NIBBLES)
            if done == 0 or span < groups:
                for g in range(batch * n):
                    a_sums[g] = (<const int32_t*> (a + blocks * NIBBLES))[first + g % n]
            group_terms(sums, a_sums, scales + done * groups + first, zero_points, done * groups + first,
                        terms, batch * n)
            for r in range(batch):
                total = out[done + r]
                for g in range(n):
                    total += terms[r * n + g]
                out[done + r] = total
            first += n
        for r in range(batch):
            out[done + r] *= a_scale
        done += batch


# terms (n,) = (sums - zero points * a_sums) * scales; the zero points begin at zero_points[start].
cdef inline void group_terms(const int32_t* sums, const int32_t* a_sums, const float* scales,
                             const uint8_t* zero_points, Py_ssize_t start, float* terms,
                             Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    if zero_points == NULL:
        for i in range(n):
            terms[i] = <float> (sums[i] - 8 * a_sums[i]) * scales[i]
    else:
        zero_points += start
        for i in range(n):
            terms[i] = <float> (sums[i] - zero_points[i] * a_sums[i]) * scales[i]


# sums = those of each NIBBLES of n codes times a; flip is XORed to every byte.
cdef inline void sum_nibbles(const uint8_t* w, const uint8_t* a, uint8_t flip, int32_t* sums,
                             Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t blocks = n // NIBBLES, i
    cdef uint8_t last[NIBBLE_BYTES]
    dq_nibble_sums(w, <const int8_t*> a, flip, sums, blocks)
    if n % NIBBLES:  # what is padding in a is zero
        memset(last, 0, NIBBLE_BYTES)
        memcpy(last, w + blocks * NIBBLE_BYTES, (n % NIBBLES + 1) // 2)
        dq_nibble_sums(last, <const int8_t*> a + blocks * NIBBLES, flip, sums + blocks, 1)


# sums[g] = the sum of `each` of them, for n groups, of which the last may have fewer: there are at most
# `blocks`.
cdef inline void add_blocks(int32_t* sums, Py_ssize_t n, Py_ssize_t each, Py_ssize_t blocks) noexcept nogil:
    cdef Py_ssize_t g, i
    cdef int32_t sum
    if each == 1:
        return
    for g in range(n):
        sum = 0
        for i in range(g * each, min(blocks, (g + 1) * each)):
            sum += sums[i]
        sums[g] = sum
