# Search for the vectors with the highest scores, and scores of float vectors.
cdef enum:
    SCORES = 32  # scores that are compared together


# A hit as an integer: keys ascend as scores descend, and among equal scores as indices ascend. Bits of floats
# without a sign have their order as integers, those with one the reverse. -0.0 + 0.0 is 0.0, so that the two
# zeros are equal.
cdef inline uint64_t hit_key(float score, uint32_t index) noexcept nogil:
    cdef uint32_t bits = <uint32_t> dq_bits(score + <float> 0)
    bits ^= <uint32_t> 0xFFFFFFFF if bits >> 31 else <uint32_t> 0x80000000
    return <uint64_t> ~bits << 32 | index


# Whether one of SCORES scores is above the threshold; NaN is not. An "or" of integers, which vectorizes.
cdef inline bint any_above(const float* scores, float threshold) noexcept nogil:
    cdef int32_t found = 0
    cdef Py_ssize_t i
    for i in range(SCORES):
        found |= scores[i] > threshold
    return found


# Keys of those scores (n,) that are above the threshold and allowed, score i being that of index first + i.
# allowed (n,) is NULL where all are. Returns how many there are: keys has room for n. After the first blocks
# of a corpus hardly any score is above, so the loop does little but compare.
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
            if scores[i] > threshold and (allowed == NULL or allowed[i]):
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
        distance = (norm + norms[i]) - 2 * scores[i]
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
