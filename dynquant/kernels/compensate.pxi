# Rounding of weights that makes up for its own errors.


# n columns of one output, rounded from the last to the first.
#     w (n,)                  the weights; zero gets the code of zero, so that pruned weights stay pruned
#     carried (n,)            what the errors of columns rounded before, these too, add to each
#                             afterwards
#     feedback (n, stride)    row k holds, for i < k, what part of the error of column k is added to column i
#     groups, columns (n,)    of each column, the index of its scale and of its code
#     errors (n,)             weight minus value
# The code is that of divide_round_row and quantize_row_f32_u4; with zero_points NULL that of zero is 0. The
# loop over later columns reads feedback and carried in order, and no sum is reassociated: every instruction
# set rounds alike.
cdef void compensate_row_f32(const float* w, float* carried, const float* feedback, Py_ssize_t stride,
                             const int32_t* groups, const int32_t* columns, const float* scales,
                             const uint8_t* zero_points, int32_t lo, int32_t hi, float* errors, int8_t* codes,
                             Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, k
    cdef float scale, zero, v, error, c_min = lo, c_max = hi
    for k in range(n - 1, -1, -1):
        scale = scales[groups[k]]
        zero = 0 if zero_points == NULL else zero_points[groups[k]]
        v = 0
        if w[k] != 0 and scale > 0:
            v = (w[k] + carried[k]) / scale
            v = v if v > c_min - zero else c_min - zero
            v = v if v < c_max - zero else c_max - zero
        v = <float> <int32_t> (v + copysignf(<float> 0.499999970197677612, v))
        codes[columns[k]] = <int8_t> <int32_t> (v + zero)
        error = w[k] - v * scale
        errors[k] = error
        for i in range(k):
            carried[i] += error * feedback[k * stride + i]
