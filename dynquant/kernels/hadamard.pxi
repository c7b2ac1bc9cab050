# The fast Walsh-Hadamard transform.
cdef enum:
    EIGHT_VECTORS = 8 * DQ_LANES


# x (n,), n a power of two -> H x * scale in place, H the Hadamard matrix in its natural (Sylvester) order.
# log2(n) passes of sums and differences, in one order for every instruction set, then one product. Before
# that, magnitudes grow by at most a factor of n. The last pass multiplies by scale and the others by 1, which
# is exact.
cdef void hadamard_row_f32(float* x, Py_ssize_t n, float scale) noexcept nogil:
    cdef Py_ssize_t i = 0, half = 1
    cdef float last
    if n >= EIGHT_VECTORS:
        last = scale if n == EIGHT_VECTORS else 1
        while i < n:
            hadamard_vectors(x + i, last)
            i += EIGHT_VECTORS
        half = EIGHT_VECTORS
    elif n >= DQ_LANES:
        last = scale if n == DQ_LANES else 1
        while i < n:
            dq_floats_store(x + i, dq_floats_scale(dq_hadamard_lanes(dq_floats_load(x + i)), last))
            i += DQ_LANES
        half = DQ_LANES
    while half < n:
        last = scale if 2 * half == n else 1
        i = 0
        while i < n:
            butterfly(x + i, x + i + half, last, half)
            i += 2 * half
        half *= 2


# All the passes over eight vectors, in registers.
cdef inline void hadamard_vectors(float* x, float scale) noexcept nogil:
    cdef dq_floats a0 = dq_hadamard_lanes(dq_floats_load(x))
    cdef dq_floats a1 = dq_hadamard_lanes(dq_floats_load(x + DQ_LANES))
    cdef dq_floats a2 = dq_hadamard_lanes(dq_floats_load(x + 2 * DQ_LANES))
    cdef dq_floats a3 = dq_hadamard_lanes(dq_floats_load(x + 3 * DQ_LANES))
    cdef dq_floats a4 = dq_hadamard_lanes(dq_floats_load(x + 4 * DQ_LANES))
    cdef dq_floats a5 = dq_hadamard_lanes(dq_floats_load(x + 5 * DQ_LANES))
    cdef dq_floats a6 = dq_hadamard_lanes(dq_floats_load(x + 6 * DQ_LANES))
    cdef dq_floats a7 = dq_hadamard_lanes(dq_floats_load(x + 7 * DQ_LANES))
    cdef dq_floats b0 = dq_floats_add(a0, a1), b1 = dq_floats_sub(a0, a1)
    cdef dq_floats b2 = dq_floats_add(a2, a3), b3 = dq_floats_sub(a2, a3)
    cdef dq_floats b4 = dq_floats_add(a4, a5), b5 = dq_floats_sub(a4, a5)
    cdef dq_floats b6 = dq_floats_add(a6, a7), b7 = dq_floats_sub(a6, a7)
    a0, a2 = dq_floats_add(b0, b2), dq_floats_sub(b0, b2)
    a1, a3 = dq_floats_add(b1, b3), dq_floats_sub(b1, b3)
    a4, a6 = dq_floats_add(b4, b6), dq_floats_sub(b4, b6)
    a5, a7 = dq_floats_add(b5, b7), dq_floats_sub(b5, b7)
    store_butterfly(x, x + 4 * DQ_LANES, a0, a4, scale)
    store_butterfly(x + DQ_LANES, x + 5 * DQ_LANES, a1, a5, scale)
    store_butterfly(x + 2 * DQ_LANES, x + 6 * DQ_LANES, a2, a6, scale)
    store_butterfly(x + 3 * DQ_LANES, x + 7 * DQ_LANES, a3, a7, scale)


cdef inline void store_butterfly(float* x, float* y, dq_floats a, dq_floats b, float scale) noexcept nogil:
    dq_floats_store(x, dq_floats_scale(dq_floats_add(a, b), scale))
    dq_floats_store(y, dq_floats_scale(dq_floats_sub(a, b), scale))


# In vectors where it is long enough: a loop left to the compiler spends more time on finding out whether x
# and y overlap than on a short span.
cdef inline void butterfly(float* x, float* y, float scale, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0
    cdef float a, b
    while i + DQ_LANES <= n:
        store_butterfly(x + i, y + i, dq_floats_load(x + i), dq_floats_load(y + i), scale)
        i += DQ_LANES
    while i < n:
        a, b = x[i], y[i]
        x[i], y[i] = (a + b) * scale, (a - b) * scale
        i += 1
