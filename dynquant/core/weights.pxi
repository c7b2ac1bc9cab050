# Ranges of weights: scales and zero points, by the whole range or by the least squared error.
cdef enum:
    SEARCH_STEPS = 23  # ranges tried: 32/32, 31/32, ..., 10/32


# Scale, and zero point unless that is NULL, of codes for a range around 0: symmetric codes in [-levels,
# levels], or codes in [0, levels]. x_max is not -0.0, so neither is the scale.
cdef void range_codes(float x_min, float x_max, int levels, float* scale, uint8_t* zero_point) noexcept nogil:
    cdef float z
    if zero_point == NULL:
        scale[0] = (x_max if x_max >= -x_min else -x_min) / levels
        return
    scale[0] = (x_max - x_min) / levels
    zero_point[0] = 0
    if scale[0] > 0:
        z = -x_min / scale[0] + <float> DQ_BELOW_HALF
        zero_point[0] = <uint8_t> (levels if z > levels else z)


# Squared error, weighted unless `weights` is NULL, of x coded by one scale and, unless that is NULL, zero
# point; with scale 0 every value is 0.
cdef double group_error(const Floats* x, const float* weights, float scale, const uint8_t* zero_point,
                        int levels) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef const float* block
    cdef Py_ssize_t start = 0, n
    cdef double error = 0
    cdef int32_t lo = -levels, hi = levels
    if zero_point != NULL:
        lo, hi = -<int32_t> zero_point[0], levels - <int32_t> zero_point[0]
    if scale == 0:
        scale, lo, hi = 1, 0, 0
    while start < x.n:
        n = block_len(start, x.n)
        block = block_of(x, start, n, scratch)
        if weights == NULL:
            error += kernels.square_error_row_f32(block, scale, lo, hi, n)
        else:
            error += kernels.weighted_square_error_row_f32(block, scale, lo, hi, weights + start, n)
        start += n
    return error


# Scale and zero point of one group, of its range or, with `search`, of that range times the one of 1, 31/32,
# ..., 10/32 which leaves the least squared error, weighted unless `weights` is NULL; the largest of equals.
cdef void fit_group(const Floats* x, const float* weights, int levels, bint search, float* scale,
                    uint8_t* zero_point) noexcept nogil:
    cdef float x_min = 0, x_max = 0, t, best_scale
    cdef float scratch[BLOCK]
    cdef uint8_t best_zero_point = 0
    cdef double error, best = -1
    cdef Py_ssize_t start = 0, n
    cdef int i
    while start < x.n:
        n = block_len(start, x.n)
        kernels.min_max_row_f32(block_of(x, start, n, scratch), &x_min, &x_max, n)
        start += n
    range_codes(x_min, x_max, levels, scale, zero_point)
    if not search:
        return
    best_scale = scale[0]
    for i in range(SEARCH_STEPS):
        t = <float> (1 - i / 32.0)
        range_codes(x_min * t, x_max * t, levels, scale, zero_point)
        error = group_error(x, weights, scale[0], zero_point, levels)
        if best < 0 or error < best:
            best, best_scale = error, scale[0]
            if zero_point != NULL:
                best_zero_point = zero_point[0]
    scale[0] = best_scale
    if zero_point != NULL:
        zero_point[0] = best_zero_point


# Rows whose groups are fitted.
cdef struct RowsToFit:
    Floats x
    CodeRows q
    const float* weights
    int levels
    bint search


cdef bint fit_row_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const RowsToFit* rows = <const RowsToFit*> context
    cdef Py_ssize_t k = rows.q.k, group = rows.q.group, r, g, start
    cdef Floats part
    cdef QuantRow coded
    for r in range(first, end):
        coded = code_row(&rows.q, r)
        for g in range(groups_of(k, group)):
            start = g * group
            part = floats_at(&rows.x, r * k + start, group_end(start, group, k) - start)
            fit_group(&part, NULL if rows.weights == NULL else rows.weights + start, rows.levels,
                      rows.search, <float*> coded.scales + g,
                      NULL if coded.zero_points == NULL else <uint8_t*> coded.zero_points + g)
    return True


def fit_rows(FloatMatrix x not None, CodeMatrix q not None, int levels, bint search, const float[::1] weights,
             int num_threads=1):
    """Scales, and zero points if q has them, of the groups of the rows, which are finite.

    A search counts the squared error in column j weights[j] times, if there are weights (k,).
    """
    cdef RowsToFit rows
    check_rows(x, q)
    rows.weights = NULL
    if weights is not None:
        check_size(weights.shape[0], x.k)
        rows.weights = &weights[0]
    rows.x, rows.q, rows.levels, rows.search = x.flat(), q.rows(), levels, search
    parallel_ranges(fit_row_range, &rows, x.m, quantize_ns(rows.x.n) * (SEARCH_STEPS if search else 1),
                    num_threads)
