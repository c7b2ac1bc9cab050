# SmoothQuant: per-column maxima, factors, and products and quotients with factors.
cdef enum:
    MAX_DIVIDED = 0x5F800000  # the bits of 2**64, the largest |x| that is divided by a reciprocal
    DIVIDED_ROWS = 32  # rows that share the reciprocals of one part of the factors
    COLUMNS = 1024  # factors taken together: a page of each row, where the hardware's prefetching ends


def column_amax(FloatMatrix x not None, int32_t[::1] amax_bits not None):
    """Fold the rows of x into the columns' largest magnitudes, given and kept as float bits."""
    cdef float scratch[BLOCK]
    cdef Py_ssize_t r = 0, start, n
    cdef Floats row
    cdef bint four
    if x.k == 0:
        return
    with nogil:
        while r < x.m:
            row = x.row(r)
            four = x.kind == F32 and r + 4 <= x.m
            start = 0
            while start < x.k:
                n = block_len(start, x.k)
                if four:
                    kernels.column_amax_4_rows_f32(<const float*> row.data + start, x.k, &amax_bits[start], n)
                else:
                    kernels.column_amax_row_f32(block_of(&row, start, n, scratch), &amax_bits[start], n)
                start += n
            r += 4 if four else 1


def smooth_factors(const float[::1] act_amax not None, const float[::1] weight_amax not None, double alpha,
                   float epsilon, float[::1] factors not None):
    """max((act_amax + eps)**alpha / (weight_amax + eps)**(1 - alpha), eps) for each column.

    The powers are taken in double and rounded to float32 once: float powers differ between C libraries.
    """
    cdef Py_ssize_t j
    cdef float numerator, denominator
    with nogil:
        for j in range(factors.shape[0]):
            numerator = <float> pow(act_amax[j] + epsilon, alpha)
            denominator = <float> pow(weight_amax[j] + epsilon, 1.0 - alpha)
            numerator /= denominator
            factors[j] = epsilon if numerator < epsilon else numerator


# out = x / factors or x * factors for m rows of k, some columns at a time; out may be x itself. Several rows
# share the reciprocals of what they are divided by; no |x| of theirs is then above 2**64.
cdef void scale_columns_of_block(const Floats* x, const float* factors, bint divide, float* out, Py_ssize_t m,
                                 Py_ssize_t k) noexcept nogil:
    cdef float scratch[COLUMNS]
    cdef float reciprocals[COLUMNS]
    cdef const float* shared = NULL
    cdef const float* part
    cdef Py_ssize_t start = 0, n, r, i
    while start < k:
        n = k - start if k - start < COLUMNS else COLUMNS
        if divide and m > 1:
            shared = reciprocals if kernels.reciprocals_f32(factors + start, reciprocals, n) else NULL
        for r in range(m):
            i = r * k + start
            part = block_of(x, i, n, scratch)
            if divide:
                kernels.divide_row_f32(part, factors + start, shared, k, out + i, n)
            else:
                kernels.multiply_row_f32(part, factors + start, out + i, n)
        start += n


# The same for any number of rows, several at a time if `together`. The last rows are first: the search for
# NaN has just read them.
cdef void scale_columns_of_finite(const Floats* x, const float* factors, bint divide, bint together,
                                  float* out, Py_ssize_t m, Py_ssize_t k) noexcept nogil:
    # Fewer than four do not make up for the reciprocals.
    cdef Py_ssize_t max_rows = DIVIDED_ROWS if together and m >= 4 else 1, rows
    cdef Floats part
    while m > 0:
        rows = m if m < max_rows else max_rows
        m -= rows
        part = floats_at(x, m * k, rows * k)
        scale_columns_of_block(&part, factors, divide, out + m * k, rows, k)


# out = x / factors or x * factors for m rows of k, factors above 0; out may be x itself. Returns whether x is
# finite; where it is not, nothing is done. Of short rows many are taken as one, their factors side by side.
cdef bint scale_columns_of_rows(const Floats* x, const float* factors, bint divide, float* out, Py_ssize_t m,
                                Py_ssize_t k) noexcept nogil:
    cdef float side_by_side[COLUMNS]
    cdef int32_t bits = amax_bits(x)
    cdef bint together = not divide or bits <= MAX_DIVIDED
    cdef Py_ssize_t many = COLUMNS // k if k else 1, left_over, i
    cdef Floats part
    if bits >= NON_FINITE:
        return False
    if k == 0:
        return True
    many = many if many < m else m
    if many <= 1:
        scale_columns_of_finite(x, factors, divide, together, out, m, k)
        return True
    for i in range(many):
        memcpy(side_by_side + i * k, factors, k * sizeof(float))
    left_over = m % many * k
    scale_columns_of_finite(x, side_by_side, divide, together, out, m // many, many * k)
    part = floats_at(x, m * k - left_over, left_over)
    scale_columns_of_finite(&part, side_by_side, divide, together, out + m * k - left_over, 1, left_over)
    return True


def scale_columns(FloatMatrix x not None, factors not None, bint divide, out not None):
    """out = x / factors or x * factors, row by row; out may be x itself. Returns whether x is finite."""
    cdef Floats flat = x.flat()
    cdef RawBuffer f = RawBuffer(factors, PyBUF_SIMPLE)
    cdef RawBuffer o = RawBuffer(out)
    cdef bint finite
    check_size(f.view.len, x.k * <Py_ssize_t> sizeof(float))
    check_size(o.view.len, flat.n * <Py_ssize_t> sizeof(float))
    with nogil:
        finite = scale_columns_of_rows(&flat, <const float*> f.view.buf, divide, <float*> o.view.buf,
                                       x.m, x.k)
    return finite


def all_positive(x not None):
    """Whether every element of a float32 vector, all of which are finite, is above 0."""
    cdef RawBuffer v = RawBuffer(x, PyBUF_SIMPLE)
    cdef float x_min = INFINITY, max_rows = 0
    cdef Py_ssize_t n = v.view.len // <Py_ssize_t> sizeof(float)
    kernels.min_max_row_f32(<const float*> v.view.buf, &x_min, &max_rows, n)
    return x_min > 0
