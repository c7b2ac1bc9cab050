# What quantizing cost: sums of errors in float64.


# Values of elements start .. start + n of all rows together, n <= BLOCK.
cdef void dequantize_elements(CodeMatrix q, Py_ssize_t start, float* value, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t end = start + n, stop
    cdef QuantRow row
    while start < end:
        row = q.row(start // q.k)
        stop = min(end, (start // q.k + 1) * q.k)
        dequantize_block(&row, start % q.k, False, value, stop - start)
        value += stop - start
        start = stop


def sum_abs_error(FloatMatrix x not None, CodeMatrix q not None):
    """Sum of |x - value| over all elements, at least one, in float64; `value` as dequantize_rows gives it."""
    cdef float value[BLOCK]
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef Floats flat = x.flat()
    cdef double total = 0
    check_rows(x, q)
    with nogil:
        while start < flat.n:
            n = block_len(start, flat.n)
            dequantize_elements(q, start, value, n)
            total += kernels.abs_error_row_f32_f64(block_of(&flat, start, n, scratch), value, n)
            start += n
    return total


# Adds the sums of kernels/metrics.pxi for x against `values`, or against the values of `q` where that is not
# None: sums[r] takes those of elements r * length to (r + 1) * length.
cdef void add_error_sums(const Floats* x, const Floats* values, CodeMatrix q, Py_ssize_t length,
                         double[:, ::1] sums) noexcept nogil:
    cdef float value[BLOCK]
    cdef float scratch[BLOCK]
    cdef const float* other = value
    cdef Py_ssize_t start = 0, end = length, n, r = 0
    while start < x.n:
        n = block_len(start, end)
        if values != NULL:
            other = block_of(values, start, n, value)
        else:
            dequantize_elements(q, start, value, n)
        kernels.error_sums_row_f32_f64(block_of(x, start, n, scratch), other, &sums[r, 0], n)
        start += n
        if start == end:
            end += length
            r += 1


def error_sums(FloatMatrix x not None, CodeMatrix q not None, Py_ssize_t length,
               double[:, ::1] sums not None):
    """The sums of kernels/metrics.pxi, a row for each `length` elements of x, against the values of q."""
    cdef Floats flat = x.flat()
    check_rows(x, q)
    with nogil:
        add_error_sums(&flat, NULL, q, length, sums)


def error_sums_of(FloatMatrix x not None, FloatMatrix values not None, Py_ssize_t length,
                  double[:, ::1] sums not None):
    """The same for x against floats."""
    cdef Floats flat = x.flat(), value = values.flat()
    with nogil:
        add_error_sums(&flat, &value, None, length, sums)
