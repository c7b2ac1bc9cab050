# Sums in float64. Element i always goes to lane i % LANES, and the lanes are added up in halves, so that
# every instruction set rounds alike; sixteen lanes are enough chains of additions to hide their latency. n is
# at most the length of a block, a few thousand: a sum of positive terms loses less than n / LANES + 4
# roundings of a float64.
cdef enum:
    LANES = 16


cdef inline double add_lanes(double* lane) noexcept nogil:
    cdef int j, half = LANES // 2
    while half:
        for j in range(half):
            lane[j] += lane[j + half]
        half //= 2
    return lane[0]
