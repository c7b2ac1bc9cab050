# What quantizing cost: sums of errors in float64.


# Rows of k codes, as QuantRow has one.
cdef struct Quantized:
    const int8_t* codes
    const float* scales
    const uint8_t* zero_points
    bint packed
    Py_ssize_t group
    Py_ssize_t k


# The values of elements start .. start + n of all rows, n <= BLOCK, of k each.
cdef void dequantize_elements(const Quantized* q, Py_ssize_t start, float* value, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t end = start + n, stop
    cdef QuantRow row
    while start < end:
        row = quant_row(q.codes, q.scales, q.zero_points, q.packed, q.group, q.k, start // q.k)
        stop = min(end, (start // q.k + 1) * q.k)
        dequantize_block(&row, start % q.k, False, value, stop - start)
        value += stop - start
        start = stop


cdef Quantized quantized(FloatMatrix x, const int8_t[::1] codes, const float[::1] scales,
                         const uint8_t[::1] zero_points, bint packed, Py_ssize_t group) except *:
    cdef Quantized q
    check_codes(x.m, x.k, packed, group, codes.shape[0], scales.shape[0], zero_points)
    q.codes, q.scales, q.zero_points = &codes[0], &scales[0], NULL
    if zero_points is not None:
        q.zero_points = &zero_points[0]
    q.packed, q.group, q.k = packed, group, x.k
    return q


def sum_abs_error(FloatMatrix x not None, const int8_t[::1] codes not None, const float[::1] scales not None,
                  const uint8_t[::1] zero_points, bint packed, Py_ssize_t group):
    """Sum of |x - value| over all elements, at least one, in double; `value` as dequantize_rows has it."""
    cdef float value[BLOCK]
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef Floats flat = x.flat()
    cdef Quantized q = quantized(x, codes, scales, zero_points, packed, group)
    cdef double total = 0
    with nogil:
        while start < flat.n:
            n = block_len(start, flat.n)
            dequantize_elements(&q, start, value, n)
            total += kernels.abs_error_row_f32_f64(block_of(&flat, start, n, scratch), value, n)
            start += n
    return total


# Adds the sums of stats.pxi for x against `values` or, where these are NULL, against those of the codes:
# to sums[r] for the elements from r * length on.
cdef void add_error_sums(const Floats* x, const Floats* values, const Quantized* q, Py_ssize_t length,
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


def error_sums(FloatMatrix x not None, const int8_t[::1] codes not None, const float[::1] scales not None,
               const uint8_t[::1] zero_points, bint packed, Py_ssize_t group, Py_ssize_t length,
               double[:, ::1] sums not None):
    """The sums of stats.pxi for x, not empty, against values of codes: a row for each `length` elements."""
    cdef Floats flat = x.flat()
    cdef Quantized q = quantized(x, codes, scales, zero_points, packed, group)
    with nogil:
        add_error_sums(&flat, NULL, &q, length, sums)


def error_sums_of(FloatMatrix x not None, FloatMatrix values not None, Py_ssize_t length,
                  double[:, ::1] sums not None):
    """The same for x against floats."""
    cdef Floats flat = x.flat(), value = values.flat()
    with nogil:
        add_error_sums(&flat, &value, NULL, length, sums)
