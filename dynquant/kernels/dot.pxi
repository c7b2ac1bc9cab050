# Exact integer products.


# Exact sum of w[i] * a[i], the scalar end of a row: k < DQ_DOT_STEP.
cdef inline int64_t dot_tail(const int8_t* w, const int8_t* a, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t acc = 0
    for i in range(k):
        acc += <int32_t> w[i] * a[i]
    return acc


# sums[r] += w[r] . a for the rows of w (rows, k), consecutive rows `stride` apart, k <= DOT_BLOCK.
# Four rows at a time share each load of a, and give the memory four streams to fetch ahead on.
# No int32 can wrap: even if one lane took all DOT_BLOCK products it would hold at most
# 2**16 * 128 * 127 = 1,065,353,216 < 2**31.
cdef inline void dot_block(const int8_t* w, const int8_t* a, int64_t* sums, Py_ssize_t rows, Py_ssize_t stride,
                           Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t r = 0, i, whole = k - k % DQ_DOT_STEP
    cdef const int8_t* w0
    cdef const int8_t* w1
    cdef const int8_t* w2
    cdef const int8_t* w3
    cdef dq_acc s0, s1, s2, s3
    while r + 4 <= rows:
        w0, w1, w2, w3 = w + r * stride, w + (r + 1) * stride, w + (r + 2) * stride, w + (r + 3) * stride
        s0 = s1 = s2 = s3 = dq_acc_zero()
        i = 0
        while i < whole:
            s0 = dq_dot_step(s0, w0 + i, a + i)
            s1 = dq_dot_step(s1, w1 + i, a + i)
            s2 = dq_dot_step(s2, w2 + i, a + i)
            s3 = dq_dot_step(s3, w3 + i, a + i)
            i += DQ_DOT_STEP
        sums[r] += dq_acc_sum(s0) + dot_tail(w0 + whole, a + whole, k - whole)
        sums[r + 1] += dq_acc_sum(s1) + dot_tail(w1 + whole, a + whole, k - whole)
        sums[r + 2] += dq_acc_sum(s2) + dot_tail(w2 + whole, a + whole, k - whole)
        sums[r + 3] += dq_acc_sum(s3) + dot_tail(w3 + whole, a + whole, k - whole)
        r += 4
    while r < rows:
        s0 = dq_acc_zero()
        i = 0
        while i < whole:
            s0 = dq_dot_step(s0, w + r * stride + i, a + i)
            i += DQ_DOT_STEP
        sums[r] += dq_acc_sum(s0) + dot_tail(w + r * stride + whole, a + whole, k - whole)
        r += 1


# w (rows, k) in [-128, 127], a (k,) in [-127, 127] -> sums[r] = the exact w[r] . a, for every k.
# |sum| <= 128 * 127 * k, which passes 2**31 at k = 132,104: blocks of columns are summed in int32 and added
# up in int64.
cdef void dot_rows_s8s8_s64(const int8_t* w, const int8_t* a, int64_t* sums, Py_ssize_t rows,
                            Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t start = 0
    memset(sums, 0, rows * sizeof(int64_t))
    while start < k:
        dot_block(w + start, a + start, sums, rows, k, k - start if k - start < DOT_BLOCK else DOT_BLOCK)
        start += DOT_BLOCK
