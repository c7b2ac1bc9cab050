# The fast Walsh-Hadamard transform.


# x (n,), n a power of two -> H x / sqrt(n) in place, H the Hadamard matrix in its natural (Sylvester) order.
# log2(n) passes of sums and differences, in one order for every instruction set, then one product with the
# rounded 1 / sqrt(n). Magnitudes grow by n at most before that product.
cdef void hadamard_row_f32(float* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, half = 1
    cdef float scale = <float> (1.0 / sqrt(<double> n))
    if n >= 8:
        for i in range(0, n, 8):
            hadamard_8(x + i)
        half = 8
    while half < n:
        i = 0
        while i < n:
            butterfly(x + i, x + i + half, half)
            i += 2 * half
        half *= 2
    for i in range(n):
        x[i] *= scale


cdef inline void butterfly(float* x, float* y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef float a, b
    for i in range(n):
        a, b = x[i], y[i]
        x[i] = a + b
        y[i] = a - b


# The first three passes over eight elements, in registers: too short for loops that vectorise.
cdef inline void hadamard_8(float* x) noexcept nogil:
    cdef float a0 = x[0] + x[1], a1 = x[0] - x[1], a2 = x[2] + x[3], a3 = x[2] - x[3]
    cdef float a4 = x[4] + x[5], a5 = x[4] - x[5], a6 = x[6] + x[7], a7 = x[6] - x[7]
    cdef float b0 = a0 + a2, b1 = a1 + a3, b2 = a0 - a2, b3 = a1 - a3
    cdef float b4 = a4 + a6, b5 = a5 + a7, b6 = a4 - a6, b7 = a5 - a7
    x[0], x[1], x[2], x[3] = b0 + b4, b1 + b5, b2 + b6, b3 + b7
    x[4], x[5], x[6], x[7] = b0 - b4, b1 - b5, b2 - b6, b3 - b7
