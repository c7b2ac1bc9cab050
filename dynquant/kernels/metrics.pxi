# Errors of dequantized values, summed in float64 as sums.pxi says.


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
