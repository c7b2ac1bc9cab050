# Per-column magnitudes, and the two products with per-column factors.


# amax_bits[j] = max(amax_bits[j], bits of |x[j]|): one row folded into the columns' maxima.
cdef void column_amax_row_f32(const float* x, int32_t* amax_bits, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t b
    for i in range(n):
        b = dq_bits(x[i]) & 0x7FFFFFFF
        amax_bits[i] = b if b > amax_bits[i] else amax_bits[i]


# The same for four rows, `stride` apart. The maxima are loaded and stored once for all four, which takes
# the pass from half the speed of memory to three quarters.
cdef void column_amax_4_rows_f32(const float* x, Py_ssize_t stride, int32_t* amax_bits,
                                 Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t b, c, d, e
    for i in range(n):
        b = dq_bits(x[i]) & 0x7FFFFFFF
        c = dq_bits(x[i + stride]) & 0x7FFFFFFF
        d = dq_bits(x[i + 2 * stride]) & 0x7FFFFFFF
        e = dq_bits(x[i + 3 * stride]) & 0x7FFFFFFF
        b = b if b > c else c
        d = d if d > e else e
        b = b if b > d else d
        amax_bits[i] = b if b > amax_bits[i] else amax_bits[i]


# out[j] = x[j] / factors[j]. out may be x itself, which has a loop of its own: between two pointers that
# may be equal the compiler's overlap check falls back to scalar code.
cdef void divide_row_f32(const float* x, const float* factors, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    if x == out:
        for i in range(n):
            out[i] = out[i] / factors[i]
    else:
        for i in range(n):
            out[i] = x[i] / factors[i]


# The same for four rows, `stride` apart in both, which share what takes the place of a division. Factors and
# |x| are as dq_quotients asks.
cdef void divide_4_rows_f32(const float* x, const float* factors, float* out, Py_ssize_t stride,
                            Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0
    while DQ_QUOTIENTS and i + DQ_QUOTIENTS <= n:
        if dq_quotients(x + i, factors + i, out + i, stride):
            divide_rows(x + i, factors + i, out + i, stride, DQ_QUOTIENTS)
        i += DQ_QUOTIENTS
    divide_rows(x + i, factors + i, out + i, stride, n - i)


cdef inline void divide_rows(const float* x, const float* factors, float* out, Py_ssize_t stride,
                             Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(4):
        divide_row_f32(x + stride * r, factors, out + stride * r, n)


# out[j] = x[j] * factors[j], as divide_row_f32.
cdef void multiply_row_f32(const float* x, const float* factors, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    if x == out:
        for i in range(n):
            out[i] = out[i] * factors[i]
    else:
        for i in range(n):
            out[i] = x[i] * factors[i]
