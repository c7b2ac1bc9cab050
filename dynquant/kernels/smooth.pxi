# Per-column magnitudes, and the two products with per-column factors.
cdef enum:
    MIN_FACTOR = 0x21800000  # the bits of 2**-60
    MAX_FACTOR = 0x5D800000  # of 2**60


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


# reciprocals[j] = 1 / factors[j]. Returns whether divide_row_f32 takes them, and gains by them: not where a
# factor is very large or small.
cdef bint reciprocals_f32(const float* factors, float* reciprocals, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t out_of_range = DQ_QUOTIENTS == 0
    for i in range(n):
        reciprocals[i] = <float> 1.0 / factors[i]
        out_of_range |= not MIN_FACTOR <= dq_bits(factors[i]) <= MAX_FACTOR
    return not out_of_range


# out[j] = x[j] / factors[j]; the quicker way if reciprocals, as reciprocals_f32 gave them, are not NULL, and
# then no |x| is above 2**64. out may be x itself. What comes `ahead` floats later, a part of the next row, is
# fetched meanwhile: the hardware goes no further than to the end of a page. The vectors start at a line of
# the cache: those that straddle two cost a tenth of the speed.
cdef void divide_row_f32(const float* x, const float* factors, const float* reciprocals,
                         Py_ssize_t prefetch_distance, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = before_line(out, n)
    divide_span(x, factors, out, i)
    while DQ_QUOTIENTS and reciprocals != NULL and i + DQ_QUOTIENTS <= n:
        dq_prefetch(x + i + prefetch_distance, DQ_QUOTIENTS * sizeof(float))
        if dq_quotients(x + i, factors + i, reciprocals + i, out + i):
            divide_span(x + i, factors + i, out + i, DQ_QUOTIENTS)
        i += DQ_QUOTIENTS
    divide_span(x + i, factors + i, out + i, n - i)


# Where out is x itself it has a loop of its own: between two pointers that may be equal the compiler's check
# for overlap falls back to scalar code.
cdef inline void divide_span(const float* x, const float* factors, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    if x == out:
        for i in range(n):
            out[i] = out[i] / factors[i]
    else:
        for i in range(n):
            out[i] = x[i] / factors[i]


# out[j] = x[j] * factors[j]; out may be x itself. From a line on, as divide_row_f32.
cdef void multiply_row_f32(const float* x, const float* factors, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = before_line(out, n)
    multiply_span(x, factors, out, i)
    multiply_span(x + i, factors + i, out + i, n - i)


cdef inline void multiply_span(const float* x, const float* factors, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    if x == out:
        for i in range(n):
            out[i] = out[i] * factors[i]
    else:
        for i in range(n):
            out[i] = x[i] * factors[i]
