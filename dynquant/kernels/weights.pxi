# What a choice of scale and zero point costs a group of weights.


# x (n,), scale > 0 -> sum of (x - value)**2, in float64 as sums.pxi says, with the code of x / scale in [lo, hi] as
# divide_round_row has it; `weighted`, each square counts weights[i] times. Nothing is stored, so that a search over many
# scales reads x from the first-level cache and does nothing else.
cdef inline double square_error(const float* x, float scale, int32_t lo, int32_t hi, bint weighted,
                                const float* weights, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, j
    cdef double lane[LANES]
    memset(lane, 0, sizeof(lane))
    while i + LANES <= n:
        for j in range(LANES):
            lane[j] += square_error_of(x[i + j], scale, lo, hi, weights[i + j] if weighted else 1)
        i += LANES
    for j in range(n - i):
        lane[j] += square_error_of(x[i + j], scale, lo, hi, weights[i + j] if weighted else 1)
    return add_lanes(lane)


cdef inline double square_error_of(float x, float scale, float lo, float hi, double weight) noexcept nogil:
    cdef float v = x / scale
    cdef double d
    v = lo if v < lo else v
    v = hi if v > hi else v
    d = <double> x - <float> <int32_t> (v + copysignf(<float> 0.499999970197677612, v)) * scale
    return weight * (d * d)


cdef double square_error_row_f32(const float* x, float scale, int32_t lo, int32_t hi, Py_ssize_t n) noexcept nogil:
    return square_error(x, scale, lo, hi, False, x, n)


cdef double weighted_square_error_row_f32(const float* x, float scale, int32_t lo, int32_t hi, const float* weights,
                                          Py_ssize_t n) noexcept nogil:
    return square_error(x, scale, lo, hi, True, weights, n)
