# Moments, summed in float64 as sums.pxi says, and counts of magnitudes.
cdef enum:
    CHUNK = 64  # channels whose bins are computed together


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


# counts[b] += how often the top 16 of the 31 magnitude bits are b: the exponent and 8 bits of fraction.
# counts has 2**16 places, so that NaN, which is not expected, still counts inside it. Two elements come with
# one load. Neighbors in one bin wait for each other's store, but a second table for every other element
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
# The places are worked out by a loop of their own, since that vectorizes and the increments do not.
cdef void count_channel_bins_row_f32(const float* x, const int32_t* amax_bits, uint32_t* counts,
                                     Py_ssize_t n) noexcept nogil:
    cdef int32_t indices[CHUNK]
    cdef Py_ssize_t start = 0, m
    cdef int32_t j, below
    while start < n:
        m = CHUNK if start + CHUNK < n else n - start
        for j in range(m):
            below = (amax_bits[start + j] >> 20) - ((dq_bits(x[start + j]) & 0x7FFFFFFF) >> 20)
            below = below if below < CHANNEL_BINS - 1 else CHANNEL_BINS - 1
            below = below if below > 0 else 0
            indices[j] = j * CHANNEL_BINS + CHANNEL_BINS - 1 - below
        for j in range(m):
            counts[start * CHANNEL_BINS + indices[j]] += 1
        start += m
