# Moments, summed in float64 as sums.pxi says, and counts of magnitudes.
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


# One row counted into a histogram for each column: bins[b][OCTAVE_BINS * (first + j)] += 1 for x[j], whose
# exponent and first 3 bits of fraction, the top 11 of its 31 magnitude bits, are b. A bin that is NULL is
# passed over: the caller knows which there are, unless x is modified meanwhile.
cdef void count_channel_bins_row_f32(const float* x, uint32_t* const* bins, Py_ssize_t first,
                                     Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    cdef uint32_t* counts
    for j in range(n):
        counts = bins[(dq_bits(x[j]) & 0x7FFFFFFF) >> 20]
        if counts != NULL:
            counts[OCTAVE_BINS * (first + j)] += 1


# low[0] = the smallest of itself and the magnitude bits of x less 1, as unsigned numbers, so that zeros are
# the largest; zeros[0] |= whether there are any.
cdef void min_nonzero_row_f32(const float* x, uint32_t* low, int32_t* zeros, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint32_t b, lowest = low[0]
    cdef int32_t some = 0
    for i in range(n):
        b = <uint32_t> (dq_bits(x[i]) & 0x7FFFFFFF)
        some |= b == 0
        b -= 1
        lowest = b if b < lowest else lowest
    low[0] = lowest
    zeros[0] |= some


# seen[e] = 1 for each exponent e of an element.
cdef void mark_octaves_row_f32(const float* x, uint8_t* seen, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        seen[(dq_bits(x[i]) & 0x7FFFFFFF) >> 23] = 1
