# Exact integer products.


# The exact w . a over k <= DOT_BLOCK elements.
# No int32 can wrap: even all the products in one lane, or all lanes added up, are at most
# 2**16 * 128 * 127 = 1,065,353,216 < 2**31 in magnitude, and 2**16 * 128 * 255 = 2,139,095,040 < 2**31 in
# the form for VNNI, which adds 128 to a.
# One row at a time, from its start to its end: the rows of a matrix follow each other in memory, and one
# stream through it is what the prefetcher follows across pages (four rows at once ran at two thirds the
# speed). Four accumulators hide the latency of the additions.
cdef inline int32_t dot_block(const int8_t* w, const int8_t* a, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t i = 0
    cdef int32_t sum
    cdef dq_acc s0 = dq_acc_zero(), s1 = s0, s2 = s0, s3 = s0
    while i + 4 * DQ_DOT_STEP <= k:
        s0 = dq_dot_step(s0, w + i, a + i)
        s1 = dq_dot_step(s1, w + i + DQ_DOT_STEP, a + i + DQ_DOT_STEP)
        s2 = dq_dot_step(s2, w + i + 2 * DQ_DOT_STEP, a + i + 2 * DQ_DOT_STEP)
        s3 = dq_dot_step(s3, w + i + 3 * DQ_DOT_STEP, a + i + 3 * DQ_DOT_STEP)
        i += 4 * DQ_DOT_STEP
    while i + DQ_DOT_STEP <= k:
        s0 = dq_dot_step(s0, w + i, a + i)
        i += DQ_DOT_STEP
    sum = dq_acc_sum(dq_acc_add(dq_acc_add(s0, s1), dq_acc_add(s2, s3)))
    while i < k:
        sum += <int32_t> w[i] * a[i]
        i += 1
    return sum


# The same for any operands, w and a in [-128, 127]: at most 2**16 * 2**14 = 2**30 in magnitude.
cdef inline int32_t dot_plain(const int8_t* w, const int8_t* a, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t sum = 0
    for i in range(k):
        sum += <int32_t> w[i] * a[i]
    return sum


# w . a over k elements of any value, exact: a product is 2**14 at most, and int64 holds 2**49 of those.
# Codes are never -128, which is all that dot_block does not take in a; looking for it costs less than taking
# it would. Vectors of less than 32 are not worth the search.
cdef int64_t dot_s8s8_s64(const int8_t* w, const int8_t* a, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t start = 0, n
    cdef int64_t sum = 0
    if k < 32:
        return dot_plain(w, a, k)
    while start < k:
        n = k - start if k - start < DOT_BLOCK else DOT_BLOCK
        if memchr(a + start, 0x80, n) == NULL:
            sum += dot_block(w + start, a + start, n)
        else:
            sum += dot_plain(w + start, a + start, n)
        start += n
    return sum


# w (rows, k) in [-128, 127], a (k,) in [-127, 127] ->
# out[r] = float32(w[r] . a) * w_scales[r] * a_scale, each sum the exact integer for every k.
# |w[r] . a| passes 2**31 at k = 132,105 at the earliest: blocks are summed in int32 and added up in int64.
# The loop over rows is in here because a short row takes no longer than a call does.
cdef void matvec_s8s8_f32(const int8_t* w, const float* w_scales, const int8_t* a, float a_scale, float* out,
                          Py_ssize_t rows, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t r, start
    cdef int64_t sum
    for r in range(rows):
        sum = start = 0
        while k - start > DOT_BLOCK:
            sum += dot_block(w + start, a + start, DOT_BLOCK)
            start += DOT_BLOCK
        sum += dot_block(w + start, a + start, k - start)
        out[r] = <float> sum * w_scales[r] * a_scale
        w += k
