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


# Squared error of one group x, quantized as `row` says.
cdef double square_error(const Floats* x, const QuantRow* row, int clip) noexcept nogil:
    cdef int8_t codes[BLOCK]
    cdef float value[BLOCK]
    cdef float scratch[BLOCK]
    cdef double sums[6]
    cdef Py_ssize_t start = 0, n
    cdef QuantRow coded = row[0]
    coded.codes, coded.packed = codes, False
    memset(sums, 0, sizeof(sums))
    while start < x.n:
        n = block_len(start, x.n)
        quantize_block(x, &coded, start, n, clip, False, codes)
        dequantize_block(&coded, 0, False, value, n)
        kernels.error_sums_row_f32_f64(block_of(x, start, n, scratch), value, sums, n)
        start += n
    return sums[1]


# Scale and zero point of one group. They cover its range or, with `search`, that range times whichever of 1,
# 31/32, ..., 10/32 leaves the least squared error; of equals the largest.
cdef void fit_group(const Floats* x, int levels, bint search, float* scale,
                    uint8_t* zero_point) noexcept nogil:
    cdef float x_min = 0, x_max = 0, t, best_scale
    cdef float scratch[BLOCK]
    cdef uint8_t best_zero_point = 0
    cdef double error, best = -1
    cdef Py_ssize_t start = 0, n
    cdef int i
    cdef QuantRow row
    while start < x.n:
        n = block_len(start, x.n)
        kernels.min_max_row_f32(block_of(x, start, n, scratch), &x_min, &x_max, n)
        start += n
    range_codes(x_min, x_max, levels, scale, zero_point)
    if not search:
        return
    best_scale = scale[0]
    row.scales, row.zero_points, row.group, row.in_range = scale, zero_point, x.n, False
    for i in range(SEARCH_STEPS):
        t = <float> (1 - i / 32.0)
        range_codes(x_min * t, x_max * t, levels, scale, zero_point)
        error = square_error(x, &row, levels)
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
            fit_group(&part, rows.levels, rows.search, <float*> coded.scales + g,
                      NULL if coded.zero_points == NULL else <uint8_t*> coded.zero_points + g)
    return True


def fit_rows(FloatMatrix x not None, CodeMatrix q not None, int levels, bint search, int num_threads=1):
    """Scales, and zero points if q has them, of the groups of the rows, which are finite."""
    cdef RowsToFit rows
    check_rows(x, q)
    rows.x, rows.q, rows.levels, rows.search = x.flat(), q.rows(), levels, search
    parallel_ranges(fit_row_range, &rows, x.m, quantize_ns(rows.x.n) * (SEARCH_STEPS if search else 1),
                    num_threads)
