# What quantizing cost: sums of errors in float64.


# Values of elements start .. start + n of all rows together, n <= BLOCK.
cdef void dequantize_elements(const CodeRows* q, Py_ssize_t start, float* value, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t end = start + n, stop
    cdef QuantRow row
    while start < end:
        row = code_row(q, start // q.k)
        stop = min(end, (start // q.k + 1) * q.k)
        dequantize_block(&row, start % q.k, False, value, stop - start)
        value += stop - start
        start = stop


cdef enum:
    SUMS = 6  # of kernels/metrics.pxi for a block
    BLOCKS_TOGETHER = 256


# Sums of x against `values` or, where `coded`, against those of q: all of kernels/metrics.pxi, or the first
# `only_abs`. They are taken block by block and added in order, whichever threads take them: of one row the
# sums of each block are kept, BLOCKS_TOGETHER at a time, and added afterwards; of several, of `length`
# elements each, a row is summed by one thread.
cdef struct ErrorSums:
    Floats x, values
    CodeRows q
    bint coded, only_abs
    Py_ssize_t length, first_block
    double* sums
    double block_sums[BLOCKS_TOGETHER][SUMS]


# Units are blocks of the only row.
cdef bint sum_block_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef ErrorSums* e = <ErrorSums*> context
    cdef Py_ssize_t i, start
    for i in range(first, end):
        start = (e.first_block + i) * BLOCK
        sum_block_errors(e, start, block_len(start, e.x.n), e.block_sums[i])
    return True


# Units are rows.
cdef bint sum_row_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const ErrorSums* e = <const ErrorSums*> context
    cdef double sums[SUMS]
    cdef Py_ssize_t r, start, n
    for r in range(first, end):
        start = r * e.length
        while start < (r + 1) * e.length:
            n = block_len(start, (r + 1) * e.length)
            sum_block_errors(e, start, n, sums)
            add_sums(sums, e.only_abs, e.sums + r * SUMS)
            start += n
    return True


# sums = those of n elements from `start` on.
cdef void sum_block_errors(const ErrorSums* e, Py_ssize_t start, Py_ssize_t n, double* sums) noexcept nogil:
    cdef float value[BLOCK]
    cdef float scratch[BLOCK]
    cdef const float* other = value
    cdef const float* x = block_of(&e.x, start, n, scratch)
    if e.coded:
        dequantize_elements(&e.q, start, value, n)
    else:
        other = block_of(&e.values, start, n, value)
    if e.only_abs:
        sums[0] = kernels.abs_error_row_f32_f64(x, other, n)
    else:
        memset(sums, 0, SUMS * sizeof(double))
        kernels.error_sums_row_f32_f64(x, other, sums, n)


# sums[r] += those of the elements from r * length on.
cdef int add_error_sums(ErrorSums* e, Py_ssize_t length, double* sums, int num_threads) except -1:
    cdef Py_ssize_t blocks = (length + BLOCK - 1) // BLOCK, n, i
    e.length, e.sums, e.first_block = length, sums, 0
    if e.x.n > length:
        parallel_ranges(sum_row_range, e, e.x.n // length, e.x.n, num_threads)
        return 0
    while e.first_block < blocks:
        n = min(blocks - e.first_block, BLOCKS_TOGETHER)
        parallel_ranges(sum_block_range, e, n, n * min(length, BLOCK), num_threads)
        for i in range(n):
            add_sums(e.block_sums[i], e.only_abs, sums)
        e.first_block += n
    return 0


cdef inline void add_sums(const double* block, bint only_abs, double* sums) noexcept nogil:
    cdef Py_ssize_t i
    sums[0] += block[0]
    if only_abs:
        return
    for i in range(1, SUMS - 1):
        sums[i] += block[i]
    sums[SUMS - 1] = max(sums[SUMS - 1], block[SUMS - 1])


def sum_abs_error(FloatMatrix x not None, CodeMatrix q not None, int num_threads=1):
    """Sum of |x - value| over all elements, at least one, in float64; `value` as dequantize_rows gives it."""
    cdef ErrorSums e
    cdef double total = 0
    check_rows(x, q)
    e.x, e.q, e.coded, e.only_abs = x.flat(), q.rows(), True, True
    add_error_sums(&e, e.x.n, &total, num_threads)
    return total


def error_sums(FloatMatrix x not None, CodeMatrix q not None, Py_ssize_t length,
               double[:, ::1] sums not None, int num_threads=1):
    """The sums of kernels/metrics.pxi, a row for each `length` elements of x, against the values of q."""
    cdef ErrorSums e
    check_rows(x, q)
    e.x, e.q, e.coded, e.only_abs = x.flat(), q.rows(), True, False
    add_error_sums(&e, length, &sums[0, 0], num_threads)


def error_sums_of(FloatMatrix x not None, FloatMatrix values not None, Py_ssize_t length,
                  double[:, ::1] sums not None, int num_threads=1):
    """The same for x against floats."""
    cdef ErrorSums e
    e.x, e.values, e.coded, e.only_abs = x.flat(), values.flat(), False, False
    add_error_sums(&e, length, &sums[0, 0], num_threads)
