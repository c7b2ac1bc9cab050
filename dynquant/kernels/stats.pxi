# Sums in double. Element i always goes to lane i % LANES and the lanes are added up in halves, so that every
# instruction set rounds alike; sixteen lanes are enough chains of additions to hide their latency. n is a
# block's length, a few thousand: a sum of positive terms loses under n / LANES + 4 roundings of a double.
cdef enum:
    LANES = 16
    PLACES = 64


cdef inline double add_lanes(double* lane) noexcept nogil:
    cdef int j, half = LANES // 2
    while half:
        for j in range(half):
            lane[j] += lane[j + half]
        half //= 2
    return lane[0]


# least, most = the smallest and the largest of themselves and x; x is free of NaN.
cdef void min_max_row_f32(const float* x, float* least, float* most, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t b, low = ordered(dq_bits(least[0])), high = ordered(dq_bits(most[0]))
    for i in range(n):
        b = ordered(dq_bits(x[i]))
        low = b if b < low else low
        high = b if b > high else high
    least[0], most[0] = dq_float(ordered(low)), dq_float(ordered(high))


# Float bits to an integer of the same order, and back: negative floats have their magnitude flipped. A
# minimum of floats does not vectorise without fast-math, one of integers does.
cdef inline int32_t ordered(int32_t b) noexcept nogil:
    return b ^ ((b >> 31) & 0x7FFFFFFF)


cdef double sum_row_f32_f64(const float* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, j
    cdef double lane[LANES]
    memset(lane, 0, sizeof(lane))
    while i + LANES <= n:
        for j in range(LANES):
            lane[j] += x[i + j]
        i += LANES
    for j in range(n - i):
        lane[j] += x[i + j]
    return add_lanes(lane)


cdef double square_deviation_row_f32_f64(const float* x, double mean, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, j
    cdef double lane[LANES]
    cdef double d
    memset(lane, 0, sizeof(lane))
    while i + LANES <= n:
        for j in range(LANES):
            d = x[i + j] - mean
            lane[j] += d * d
        i += LANES
    for j in range(n - i):
        d = x[i + j] - mean
        lane[j] += d * d
    return add_lanes(lane)


# Sum of |x[i] - value[i]|, the difference taken in double.
cdef double abs_error_row_f32_f64(const float* x, const float* value, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, j
    cdef double lane[LANES]
    memset(lane, 0, sizeof(lane))
    while i + LANES <= n:
        for j in range(LANES):
            lane[j] += fabs(<double> x[i + j] - value[i + j])
        i += LANES
    for j in range(n - i):
        lane[j] += fabs(<double> x[i + j] - value[i + j])
    return add_lanes(lane)


# Adds to sums: |d|, d**2, x**2, value**2 and x * value, with d = x[i] - value[i] taken in double; sums[5]
# becomes the largest |d| so far.
cdef void error_sums_row_f32_f64(const float* x, const float* value, double* sums,
                                 Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, j
    cdef double lane[6][LANES]
    cdef double d, a, b
    memset(lane, 0, sizeof(lane))
    while i < n:
        for j in range(LANES if i + LANES <= n else n - i):
            a, b = x[i + j], value[i + j]
            d = fabs(a - b)
            lane[0][j] += d
            lane[1][j] += d * d
            lane[2][j] += a * a
            lane[3][j] += b * b
            lane[4][j] += a * b
            lane[5][j] = d if d > lane[5][j] else lane[5][j]
        i += LANES
    for j in range(LANES):
        sums[5] = lane[5][j] if lane[5][j] > sums[5] else sums[5]
    for j in range(5):
        sums[j] += add_lanes(lane[j])


# counts[b] += how often the top 16 of the 31 magnitude bits are b: the exponent and 8 bits of fraction.
# counts has 2**16 places, so that NaN, which is not expected, still counts inside it. Two elements come with
# one load. Neighbours in one bin wait for each other's store, but a second table for every other element
# would not fit L1 beside the first, and costs normal data more than it saves where values repeat.
cdef void count_bins_f32(const float* x, int64_t* counts, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0
    cdef uint64_t pair
    while i + 2 <= n:
        memcpy(&pair, x + i, sizeof(pair))
        counts[(pair >> 15) & 0xFFFF] += 1
        counts[(pair >> 47) & 0xFFFF] += 1
        i += 2
    if i < n:
        counts[(dq_bits(x[i]) >> 15) & 0xFFFF] += 1


# One row counted into a window for each column: counts[j][c] += 1 for x[j], whose bin is the top 11 of its
# 31 magnitude bits: the exponent and 3 bits of fraction. The last of the WINDOW cells is the bin of
# amax_bits[j], those before it are the bins below, and the first takes what lies lower too. |x[j]| should not
# be above the maximum; if it is, it counts in the last cell and not outside the window.
# The places are worked out by a loop of their own, since that vectorises and the increments do not.
cdef void count_windows_row_f32(const float* x, const int32_t* amax_bits, uint32_t* counts,
                                Py_ssize_t n) noexcept nogil:
    cdef int32_t places[PLACES]
    cdef Py_ssize_t start = 0, m
    cdef int32_t j, below
    while start < n:
        m = PLACES if start + PLACES < n else n - start
        for j in range(m):
            below = (amax_bits[start + j] >> 20) - ((dq_bits(x[start + j]) & 0x7FFFFFFF) >> 20)
            below = below if below < WINDOW - 1 else WINDOW - 1
            below = below if below > 0 else 0
            places[j] = j * WINDOW + WINDOW - 1 - below
        for j in range(m):
            counts[start * WINDOW + places[j]] += 1
        start += m
