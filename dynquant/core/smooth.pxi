# SmoothQuant: per-column maxima, factors, and products and quotients with factors.
cdef enum:
    MAX_DIVIDED = 0x5F800000  # the bits of 2**64, the largest |x| that is divided by a reciprocal
    DIVIDED_ROWS = 32  # rows that share the reciprocals of one part of the factors
    COLUMNS = 1024  # factors taken together: a page of each row, where the hardware's prefetching ends


# The columns' largest magnitudes, as float bits, in each of `parts` nearly equal parts of m rows of k.
cdef struct ColumnAmax:
    Floats x
    Py_ssize_t m, k, parts
    int32_t* bits


cdef bint column_amax_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const ColumnAmax* columns = <const ColumnAmax*> context
    cdef Py_ssize_t part, start, stop
    for part in range(first, end):
        start, stop = columns.m * part // columns.parts, columns.m * (part + 1) // columns.parts
        column_amax_of_rows(&columns.x, start, stop, columns.bits + part * columns.k, columns.k)
    return True


# Fold rows first .. end of x into bits (k,).
cdef void column_amax_of_rows(const Floats* x, Py_ssize_t first, Py_ssize_t end, int32_t* bits,
                              Py_ssize_t k) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef Py_ssize_t r = first, start, n
    cdef Floats row
    cdef bint four
    while r < end:
        row = floats_at(x, r * k, k)
        four = x.kind == F32 and r + 4 <= end
        start = 0
        while start < k:
            n = block_len(start, k)
            if four:
                kernels.column_amax_4_rows_f32(<const float*> row.data + start, k, bits + start, n)
            else:
                kernels.column_amax_row_f32(block_of(&row, start, n, scratch), bits + start, n)
            start += n
        r += 4 if four else 1


def column_amax(FloatMatrix x not None, int32_t[::1] amax_bits not None, int num_threads=1):
    """Fold the rows of x into the columns' largest magnitudes, given and kept as float bits."""
    cdef Py_ssize_t ns = amax_ns(x.m * x.k), part, j
    cdef ColumnAmax columns
    check_size(amax_bits.shape[0], x.k)
    if x.m == 0 or x.k == 0:
        return
    columns.x, columns.m, columns.k, columns.parts = x.flat(), x.m, x.k, threads_for(x.m, ns, num_threads)
    columns.bits = <int32_t*> PyMem_RawCalloc(columns.parts * x.k, sizeof(int32_t))
    if columns.bits == NULL:
        raise MemoryError
    try:
        parallel_ranges(column_amax_range, &columns, columns.parts, ns, num_threads)
        for part in range(columns.parts):
            for j in range(x.k):
                amax_bits[j] = max(amax_bits[j], columns.bits[part * x.k + j])
    finally:
        PyMem_RawFree(columns.bits)


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


# out = x / factors or x * factors for m rows of k, some columns at a time; out may be x itself. max_bits: the
# largest |x|, as float bits; -1 where it is looked for in the part of a row that is next, which is then in
# L1. Several rows share the reciprocals of what they are divided by. Returns whether x is finite.
cdef bint scale_columns_of_block(const Floats* x, const float* factors, bint divide, int32_t max_bits,
                                 float* out, Py_ssize_t m, Py_ssize_t k) noexcept nogil:
    cdef float scratch[COLUMNS]
    cdef float reciprocals[COLUMNS]
    cdef const float* shared
    cdef const float* part
    cdef Py_ssize_t start = 0, n, r, i
    cdef int32_t bits = max_bits
    while start < k:
        n = k - start if k - start < COLUMNS else COLUMNS
        # Fewer than four rows do not make up for the reciprocals.
        shared = NULL
        if divide and m >= 4 and max_bits <= MAX_DIVIDED:
            shared = reciprocals if kernels.reciprocals_f32(factors + start, reciprocals, n) else NULL
        for r in range(m):
            i = r * k + start
            part = block_of(x, i, n, scratch)
            if max_bits < 0:
                bits = kernels.amax_bits_f32(part, n)
                if bits >= NON_FINITE:
                    return False
            if divide:
                kernels.divide_row_f32(part, factors + start, shared if bits <= MAX_DIVIDED else NULL, k,
                                       out + i, n)
            else:
                kernels.multiply_row_f32(part, factors + start, out + i, n)
        start += n
    return True


# The same for any number of rows. The last rows are first: the search for NaN has just read them.
cdef bint scale_columns_of_long(const Floats* x, const float* factors, bint divide, int32_t max_bits,
                                float* out, Py_ssize_t m, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t rows
    cdef Floats part
    while m > 0:
        rows = min(m, DIVIDED_ROWS)
        m -= rows
        part = floats_at(x, m * k, rows * k)
        if not scale_columns_of_block(&part, factors, divide, max_bits, out + m * k, rows, k):
            return False
    return True


# The same with the factors of short rows side by side: many of these are taken as one. k > 0.
cdef bint scale_columns_of_short(const Floats* x, const float* factors, bint divide, int32_t max_bits,
                                 float* out, Py_ssize_t m, Py_ssize_t k) noexcept nogil:
    cdef float side_by_side[COLUMNS]
    cdef Py_ssize_t many = min(COLUMNS // k, m), left_over, i
    cdef Floats part
    if many <= 1:
        return scale_columns_of_long(x, factors, divide, max_bits, out, m, k)
    for i in range(many):
        memcpy(side_by_side + i * k, factors, k * sizeof(float))
    left_over = m % many * k
    if not scale_columns_of_long(x, side_by_side, divide, max_bits, out, m // many, many * k):
        return False
    part = floats_at(x, m * k - left_over, left_over)
    return scale_columns_of_long(&part, side_by_side, divide, max_bits, out + m * k - left_over, 1, left_over)


# out = x / factors or x * factors for rows of k, factors above 0; max_bits as above.
cdef struct RowsToScale:
    Floats x
    const float* factors
    float* out
    Py_ssize_t k
    int32_t max_bits
    bint divide


cdef bint scale_columns_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const RowsToScale* rows = <const RowsToScale*> context
    cdef Py_ssize_t k = rows.k
    cdef Floats part = floats_at(&rows.x, first * k, (end - first) * k)
    return scale_columns_of_short(&part, rows.factors, rows.divide, rows.max_bits, rows.out + first * k,
                                  end - first, k)


# The same for m rows, in one thread; out may be x itself. Returns whether x is finite; where it is not,
# nothing is done.
cdef bint scale_columns_of_rows(const Floats* x, const float* factors, bint divide, float* out, Py_ssize_t m,
                                Py_ssize_t k) noexcept nogil:
    cdef RowsToScale rows
    rows.x, rows.factors, rows.out, rows.k, rows.divide = x[0], factors, out, k, divide
    rows.max_bits = amax_bits(x)
    return rows.max_bits < NON_FINITE and (k == 0 or scale_columns_range(&rows, 0, m))


def scale_columns(FloatMatrix x not None, factors not None, bint divide, out not None, int num_threads=1,
                  bint check_first=True):
    """out = x / factors or x * factors, row by row; out may be x itself. Returns whether x is finite.

    With check_first nothing is written where it is not; without it x is read from memory once.
    """
    cdef RawBuffer f = RawBuffer(factors, PyBUF_SIMPLE)
    cdef RawBuffer o = RawBuffer(out)
    cdef RowsToScale rows
    rows.x, rows.k, rows.divide = x.flat(), x.k, divide
    rows.factors, rows.out = <const float*> f.view.buf, <float*> o.view.buf
    check_size(f.view.len, x.k * <Py_ssize_t> sizeof(float))
    check_size(o.view.len, rows.x.n * <Py_ssize_t> sizeof(float))
    rows.max_bits = parallel_amax_bits(&rows.x, num_threads) if check_first else -1
    if rows.max_bits >= NON_FINITE:
        return False
    if rows.x.n == 0:
        return True
    return parallel_ranges(scale_columns_range, &rows, x.m, quantize_ns(rows.x.n), num_threads)


def all_positive(x not None):
    """Whether every element of a float32 vector, all of which are finite, is above 0."""
    cdef RawBuffer v = RawBuffer(x, PyBUF_SIMPLE)
    cdef float x_min = INFINITY, max_rows = 0
    cdef Py_ssize_t n = v.view.len // <Py_ssize_t> sizeof(float)
    kernels.min_max_row_f32(<const float*> v.view.buf, &x_min, &max_rows, n)
    return x_min > 0
