# Exact integer products of vectors, and of a matrix as it lies and one vector.
cdef enum:
    DOT_BLOCK = 1 << 16  # elements whose products an int32 holds
    MATVEC_BLOCK = 1 << 14  # elements of the vector that are prepared together, in scratch on the stack
    MATVEC_ROWS = 256  # rows that share one preparation
    MATVEC_STEPS = MATVEC_BLOCK // DQ_DOT_STEP + 2


# The exact w . a over k <= DOT_BLOCK elements. No int32 can wrap: even if all products fell into one lane, or
# when all lanes are added up, the sum is at most 2**16 * 128 * 127 = 1,065,353,216 < 2**31 in magnitude, and
# 2**16 * 128 * 255 = 2,139,095,040 < 2**31 in the form for VNNI, which adds 128 to a. Four accumulators hide
# the latency of the additions.
cdef inline int32_t dot_block(const int8_t* w, const int8_t* a, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t i = 0
    cdef int32_t sum
    cdef dq_dot_acc s0 = dq_dot_zero(), s1 = s0, s2 = s0, s3 = s0
    while i + 4 * DQ_DOT_STEP <= k:
        s0 = dq_dot_step(s0, w + i, a + i)
        s1 = dq_dot_step(s1, w + i + DQ_DOT_STEP, a + i + DQ_DOT_STEP)
        s2 = dq_dot_step(s2, w + i + 2 * DQ_DOT_STEP, a + i + 2 * DQ_DOT_STEP)
        s3 = dq_dot_step(s3, w + i + 3 * DQ_DOT_STEP, a + i + 3 * DQ_DOT_STEP)
        i += 4 * DQ_DOT_STEP
    while i + DQ_DOT_STEP <= k:
        s0 = dq_dot_step(s0, w + i, a + i)
        i += DQ_DOT_STEP
    sum = dq_dot_sum(dq_dot_add(dq_dot_add(s0, s1), dq_dot_add(s2, s3)))
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


# w . a over k elements of any value, exact: a product is at most 2**14, and int64 holds 2**49 of those.
# dot_block takes everything but -128 in a. Codes are never -128, and searching for it costs less than
# supporting it would. Vectors shorter than 32 are not worth the search.
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


# A step with residuals: where its weights lie in a row, and where in a span its codes and residuals lie.
cdef struct ResidualStep:
    int32_t row
    int32_t span


# A span of a vector, prepared for products with many rows of weights. Its steps begin where rows that are
# aligned like the first one have an aligned address, because a load that straddles two cache lines takes
# twice as long. The `head` elements before that are a step of their own, followed by zeros, and so are the
# `tail` elements after the last whole step, which follow zeros. `body` elements lie between.
cdef struct ActSpan:
    int8_t codes_memory[MATVEC_BLOCK + 3 * DQ_DOT_STEP + DQ_BIAS_STEP]
    int8_t residuals[MATVEC_BLOCK + 2 * DQ_DOT_STEP]
    ResidualStep residual_steps[MATVEC_STEPS]
    Py_ssize_t residual_count
    int8_t* codes
    Py_ssize_t head
    Py_ssize_t body
    Py_ssize_t tail
    int32_t compensation  # subtracted from every sum


# a (n,), DQ_DOT_STEP <= n <= MATVEC_BLOCK, for rows of weights that are aligned like w.
cdef inline void prepare_span(const int8_t* a, const int8_t* w, ActSpan* span, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t step = DQ_DOT_STEP, i, end
    cdef uint32_t out_of_range
    span.codes = &span.codes_memory[0] + (-<Py_ssize_t> span.codes_memory & (step - 1))
    span.head = -<Py_ssize_t> w & (step - 1)
    span.tail = (n - span.head) % step
    span.body = n - span.head - span.tail
    end = step + span.body
    memset(span.codes, 0, step)
    memcpy(span.codes, a, span.head)
    memcpy(span.codes + step, a + span.head, span.body)
    memset(span.codes + end, 0, step + DQ_BIAS_STEP)
    memcpy(span.codes + end + step - span.tail, a + n - span.tail, span.tail)
    span.residual_count = span.compensation = i = 0
    while i < end + step:
        out_of_range = dq_bias_step(span.codes + i, &span.compensation)
        # Where DQ_SPLIT is 1, DQ_BIAS_STEP is DQ_DOT_STEP.
        if DQ_SPLIT and out_of_range:
            split_step(span, 0 if i == 0 else n - step if i == end else span.head + i - step, i)
        i += DQ_BIAS_STEP


cdef inline void split_step(ActSpan* span, Py_ssize_t row, Py_ssize_t at) noexcept nogil:
    cdef Py_ssize_t j
    span.residual_steps[span.residual_count].row = <int32_t> row
    span.residual_steps[span.residual_count].span = <int32_t> at
    span.residual_count += 1
    memset(span.residuals + at, 0, DQ_BIAS_STEP)
    for j in range(at, at + DQ_BIAS_STEP, 2):
        split_pair(span.codes + j, span.residuals + j)


# The exact w . a over the n elements of a span of a. No int32 wraps: all products together are at most
# 2**14 * 255 * 127 = 530,595,840 < 2**31 in magnitude.
# Two accumulators hide the latency of the additions; with four, gcc keeps one in memory.
cdef inline int32_t dot_span(const int8_t* w, const ActSpan* span, Py_ssize_t n) noexcept nogil:
    cdef const int8_t* codes = span.codes + DQ_DOT_STEP
    cdef const int8_t* body = w + span.head
    cdef Py_ssize_t i = 0, step = DQ_DOT_STEP
    cdef dq_dot_acc s0 = dq_dot_biased_step(dq_dot_zero(), w, span.codes), s1 = dq_dot_zero()
    while i + 2 * step <= span.body:
        s0 = dq_dot_biased_step(s0, body + i, codes + i)
        s1 = dq_dot_biased_step(s1, body + i + step, codes + i + step)
        i += 2 * step
    if i < span.body:
        s0 = dq_dot_biased_step(s0, body + i, codes + i)
    if span.tail:
        s1 = dq_dot_biased_step(s1, w + n - step, codes + span.body)
    for i in range(span.residual_count):
        s1 = dq_dot_biased_step(s1, w + span.residual_steps[i].row,
                                span.residuals + span.residual_steps[i].span)
    return dq_dot_sum(dq_dot_add(s0, s1)) - span.compensation


# sums[0], sums[row_stride], ... += the same for four rows, `row_stride` rows of k from each other.
cdef inline void dot_span_4(const int8_t* w0, Py_ssize_t k, Py_ssize_t row_stride, const ActSpan* span,
                            int64_t* sums, Py_ssize_t n) noexcept nogil:
    cdef const int8_t* w1 = w0 + row_stride * k
    cdef const int8_t* w2 = w1 + row_stride * k
    cdef const int8_t* w3 = w2 + row_stride * k
    cdef const int8_t* codes = span.codes + DQ_DOT_STEP
    cdef Py_ssize_t i = 0, row, at
    cdef dq_dot_acc s0 = dq_dot_biased_step(dq_dot_zero(), w0, span.codes)
    cdef dq_dot_acc s1 = dq_dot_biased_step(dq_dot_zero(), w1, span.codes)
    cdef dq_dot_acc s2 = dq_dot_biased_step(dq_dot_zero(), w2, span.codes)
    cdef dq_dot_acc s3 = dq_dot_biased_step(dq_dot_zero(), w3, span.codes)
    while i < span.body:
        s0 = dq_dot_biased_step(s0, w0 + span.head + i, codes + i)
        s1 = dq_dot_biased_step(s1, w1 + span.head + i, codes + i)
        s2 = dq_dot_biased_step(s2, w2 + span.head + i, codes + i)
        s3 = dq_dot_biased_step(s3, w3 + span.head + i, codes + i)
        i += DQ_DOT_STEP
    if span.tail:
        row = n - DQ_DOT_STEP
        s0 = dq_dot_biased_step(s0, w0 + row, codes + span.body)
        s1 = dq_dot_biased_step(s1, w1 + row, codes + span.body)
        s2 = dq_dot_biased_step(s2, w2 + row, codes + span.body)
        s3 = dq_dot_biased_step(s3, w3 + row, codes + span.body)
    for i in range(span.residual_count):
        row, at = span.residual_steps[i].row, span.residual_steps[i].span
        s0 = dq_dot_biased_step(s0, w0 + row, span.residuals + at)
        s1 = dq_dot_biased_step(s1, w1 + row, span.residuals + at)
        s2 = dq_dot_biased_step(s2, w2 + row, span.residuals + at)
        s3 = dq_dot_biased_step(s3, w3 + row, span.residuals + at)
    sums[0] += dq_dot_sum(s0) - span.compensation
    sums[row_stride] += dq_dot_sum(s1) - span.compensation
    sums[2 * row_stride] += dq_dot_sum(s2) - span.compensation
    sums[3 * row_stride] += dq_dot_sum(s3) - span.compensation


# sums (count,) += w (count, k) . a over the n elements of a span of a. Four rows, a quarter of all rows from
# each other, are taken together where DQ_CONCURRENT_PANELS is 4.
cdef inline void dot_span_of_rows(const int8_t* w, const ActSpan* span, int64_t* sums, Py_ssize_t count,
                                  Py_ssize_t k, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t quarter = count // 4 if DQ_CONCURRENT_PANELS == 4 else 0, r
    for r in range(quarter):
        dot_span_4(w + r * k, k, quarter, span, sums + r, n)
    for r in range(4 * quarter, count):
        sums[r] += dot_span(w + r * k, span, n)


# w (rows, k) in [-128, 127], a (k,) in [-127, 127] -> out[r] = float32(w[r] . a) * w_scales[r] * a_scale,
# each sum the exact integer for every k. The loop over rows is inside, because a short row takes no longer
# than a call does. Rows longer than a span are taken MATVEC_ROWS together, a span at a time, and added up in
# int64. Where more than half of the steps have residuals, dot_block, which takes codes as they are, is
# faster.
cdef void matvec_s8s8_f32(const int8_t* w, const float* w_scales, const int8_t* a, float a_scale, float* out,
                          Py_ssize_t rows, Py_ssize_t k) noexcept nogil:
    cdef ActSpan span
    cdef int64_t sums[MATVEC_ROWS]
    cdef Py_ssize_t first = 0, r, start, n, count
    while first < rows:
        count = rows - first if rows - first < MATVEC_ROWS else MATVEC_ROWS
        memset(sums, 0, count * sizeof(int64_t))
        start = 0
        while start < k:
            n = k - start if k - start < MATVEC_BLOCK else MATVEC_BLOCK
            if n < DQ_DOT_STEP:
                for r in range(count):
                    sums[r] += dot_plain(w + r * k + start, a + start, n)
            else:
                prepare_span(a + start, w + start, &span, n)
                if 2 * DQ_BIAS_STEP * span.residual_count > n:
                    for r in range(count):
                        sums[r] += dot_block(w + r * k + start, a + start, n)
                else:
                    dot_span_of_rows(w + start, &span, sums, count, k, n)
            start += n
        for r in range(count):
            out[r] = <float> sums[r] * w_scales[r] * a_scale
        w += count * k
        w_scales += count
        out += count
        first += count
