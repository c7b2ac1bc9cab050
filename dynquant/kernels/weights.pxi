# What a choice of scale and zero point costs a group of weights.


# x (n,), scale > 0 -> sum of (x - value)**2, in float64 as sums.pxi says, with the code of x / scale in [lo,
# hi] as divide_round_row has it; `weighted`, each square counts weights[i] times. Nothing is stored, so that
# a search over many scales reads x from the first-level cache and does nothing else.
cdef inline double square_error(const float* x, float scale, int32_t lo, int32_t hi, bint weighted,
                                const float* weights, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, j
    cdef double lane[LANES]
    cdef double d
    cdef float value[LANES]
    memset(lane, 0, sizeof(lane))
    while i + LANES <= n:
        # In two loops: compilers take one that changes from float to double half way for too costly.
        nearest_values(x + i, scale, lo, hi, value, LANES)
        for j in range(LANES):
            d = <double> x[i + j] - value[j]
            lane[j] += d * d * weights[i + j] if weighted else d * d
        i += LANES
    nearest_values(x + i, scale, lo, hi, value, n - i)
    for j in range(n - i):
        d = <double> x[i + j] - value[j]
        lane[j] += d * d * weights[i + j] if weighted else d * d
    return add_lanes(lane)


# What the codes of x (n,) stand for.
cdef inline void nearest_values(const float* x, float scale, float lo, float hi, float* value,
                                Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    cdef float v
    for j in range(n):
        v = x[j] / scale
        v = lo if v < lo else v
        v = hi if v > hi else v
        value[j] = <float> <int32_t> (v + copysignf(<float> 0.499999970197677612, v)) * scale


cdef double square_error_row_f32(const float* x, float scale, int32_t lo, int32_t hi,
                                 Py_ssize_t n) noexcept nogil:
    return square_error(x, scale, lo, hi, False, x, n)


cdef double weighted_square_error_row_f32(const float* x, float scale, int32_t lo, int32_t hi,
                                          const float* weights, Py_ssize_t n) noexcept nogil:
    return square_error(x, scale, lo, hi, True, weights, n)
