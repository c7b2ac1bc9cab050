# Exact integer products.
cdef enum:
    DOT_BLOCK = 1 << 16
    MATVEC_BLOCK = 1 << 14
    MATVEC_ROWS = 256
    MATVEC_STEPS = MATVEC_BLOCK // DQ_DOT_STEP + 2


# The exact w . a over k <= DOT_BLOCK elements.
# No int32 can wrap: even all the products in one lane, or all lanes added up, are at most
# 2**16 * 128 * 127 = 1,065,353,216 < 2**31 in magnitude, and 2**16 * 128 * 255 = 2,139,095,040 < 2**31 in
# the form for VNNI, which adds 128 to a.
# Four accumulators hide the latency of the additions.
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


# A step that has rests: where its weights lie in a row, and where in a run the codes and the rests.
cdef struct RestStep:
    int32_t row
    int32_t run


# A run of a vector that is to be multiplied with many rows of weights. Its steps begin where rows that lie
# like the first one have an aligned address, for a load that straddles two lines of the cache takes twice as
# long. The elements before are a step of their own, `head` of them followed by zeros, and so are those after
# the last whole step, `tail` of them after zeros. In between lie `body` elements.
cdef struct Run:
    int8_t codes_memory[MATVEC_BLOCK + 3 * DQ_DOT_STEP + DQ_ACTIVATIONS_STEP]
    int8_t rests[MATVEC_BLOCK + 2 * DQ_DOT_STEP]
    RestStep rest_steps[MATVEC_STEPS]
    Py_ssize_t rest_count
    int8_t* codes
    Py_ssize_t head
    Py_ssize_t body
    Py_ssize_t tail
    int32_t excess  # to be taken off each sum


# a (n,), DQ_DOT_STEP <= n <= MATVEC_BLOCK, for rows of weights that lie like w.
cdef inline void prepare_run(const int8_t* a, const int8_t* w, Run* run, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t step = DQ_DOT_STEP, i, end
    cdef uint32_t beyond
    run.codes = &run.codes_memory[0] + (-<Py_ssize_t> run.codes_memory & (step - 1))
    run.head = -<Py_ssize_t> w & (step - 1)
    run.tail = (n - run.head) % step
    run.body = n - run.head - run.tail
    end = step + run.body
    memset(run.codes, 0, step)
    memcpy(run.codes, a, run.head)
    memcpy(run.codes + step, a + run.head, run.body)
    memset(run.codes + end, 0, step + DQ_ACTIVATIONS_STEP)
    memcpy(run.codes + end + step - run.tail, a + n - run.tail, run.tail)
    run.rest_count = run.excess = i = 0
    while i < end + step:
        beyond = dq_activations_step(run.codes + i, &run.excess)
        # Where DQ_TRIMMED is 1 this step is that of the product.
        if DQ_TRIMMED and beyond:
            trim_step(run, 0 if i == 0 else n - step if i == end else run.head + i - step, i)
        i += DQ_ACTIVATIONS_STEP


cdef inline void trim_step(Run* run, Py_ssize_t row, Py_ssize_t at) noexcept nogil:
    cdef Py_ssize_t j
    run.rest_steps[run.rest_count].row = <int32_t> row
    run.rest_steps[run.rest_count].run = <int32_t> at
    run.rest_count += 1
    memset(run.rests + at, 0, DQ_ACTIVATIONS_STEP)
    for j in range(at, at + DQ_ACTIVATIONS_STEP, 2):
        trim_pair(run.codes + j, run.rests + j)


# The exact w . a over the n elements of a run of a. No int32 wraps: all the products together are at most
# 2**14 * 255 * 127 = 530,595,840 < 2**31 in magnitude.
# Two accumulators hide the latency of the additions; with four, gcc keeps one in memory.
cdef inline int32_t dot_run(const int8_t* w, const Run* run, Py_ssize_t n) noexcept nogil:
    cdef const int8_t* codes = run.codes + DQ_DOT_STEP
    cdef const int8_t* body = w + run.head
    cdef Py_ssize_t i = 0, step = DQ_DOT_STEP
    cdef dq_acc s0 = dq_raised_step(dq_acc_zero(), w, run.codes), s1 = dq_acc_zero()
    while i + 2 * step <= run.body:
        s0 = dq_raised_step(s0, body + i, codes + i)
        s1 = dq_raised_step(s1, body + i + step, codes + i + step)
        i += 2 * step
    if i < run.body:
        s0 = dq_raised_step(s0, body + i, codes + i)
    if run.tail:
        s1 = dq_raised_step(s1, w + n - step, codes + run.body)
    for i in range(run.rest_count):
        s1 = dq_raised_step(s1, w + run.rest_steps[i].row, run.rests + run.rest_steps[i].run)
    return dq_acc_sum(dq_acc_add(s0, s1)) - run.excess


# sums[0], sums[apart], ... += the same for four rows, `apart` rows of k from each other.
cdef inline void dot_run_4(const int8_t* w0, Py_ssize_t k, Py_ssize_t apart, const Run* run, int64_t* sums,
                           Py_ssize_t n) noexcept nogil:
    cdef const int8_t* w1 = w0 + apart * k
    cdef const int8_t* w2 = w1 + apart * k
    cdef const int8_t* w3 = w2 + apart * k
    cdef const int8_t* codes = run.codes + DQ_DOT_STEP
    cdef Py_ssize_t i = 0, row, at
    cdef dq_acc s0 = dq_raised_step(dq_acc_zero(), w0, run.codes)
    cdef dq_acc s1 = dq_raised_step(dq_acc_zero(), w1, run.codes)
    cdef dq_acc s2 = dq_raised_step(dq_acc_zero(), w2, run.codes)
    cdef dq_acc s3 = dq_raised_step(dq_acc_zero(), w3, run.codes)
    while i < run.body:
        s0 = dq_raised_step(s0, w0 + run.head + i, codes + i)
        s1 = dq_raised_step(s1, w1 + run.head + i, codes + i)
        s2 = dq_raised_step(s2, w2 + run.head + i, codes + i)
        s3 = dq_raised_step(s3, w3 + run.head + i, codes + i)
        i += DQ_DOT_STEP
    if run.tail:
        row = n - DQ_DOT_STEP
        s0 = dq_raised_step(s0, w0 + row, codes + run.body)
        s1 = dq_raised_step(s1, w1 + row, codes + run.body)
        s2 = dq_raised_step(s2, w2 + row, codes + run.body)
        s3 = dq_raised_step(s3, w3 + row, codes + run.body)
    for i in range(run.rest_count):
        row, at = run.rest_steps[i].row, run.rest_steps[i].run
        s0 = dq_raised_step(s0, w0 + row, run.rests + at)
        s1 = dq_raised_step(s1, w1 + row, run.rests + at)
        s2 = dq_raised_step(s2, w2 + row, run.rests + at)
        s3 = dq_raised_step(s3, w3 + row, run.rests + at)
    sums[0] += dq_acc_sum(s0) - run.excess
    sums[apart] += dq_acc_sum(s1) - run.excess
    sums[2 * apart] += dq_acc_sum(s2) - run.excess
    sums[3 * apart] += dq_acc_sum(s3) - run.excess


# sums (count,) += w (count, k) . a over the n elements of a run of a. Rows a quarter of them apart are taken
# together: DQ_STREAMS.
cdef inline void dot_run_of_rows(const int8_t* w, const Run* run, int64_t* sums, Py_ssize_t count,
                                 Py_ssize_t k, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t quarter = count // 4 if DQ_STREAMS == 4 else 0, r
    for r in range(quarter):
        dot_run_4(w + r * k, k, quarter, run, sums + r, n)
    for r in range(4 * quarter, count):
        sums[r] += dot_run(w + r * k, run, n)


# w (rows, k) in [-128, 127], a (k,) in [-127, 127] ->
# out[r] = float32(w[r] . a) * w_scales[r] * a_scale, each sum the exact integer for every k.
# The loop over rows is in here because a short row takes no longer than a call does. Rows longer than a run
# are taken MATVEC_ROWS together, a run at a time, and added up in int64. Where more than half of the steps
# have rests, the step that takes codes as they are is the faster one.
cdef void matvec_s8s8_f32(const int8_t* w, const float* w_scales, const int8_t* a, float a_scale, float* out,
                          Py_ssize_t rows, Py_ssize_t k) noexcept nogil:
    cdef Run run
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
                prepare_run(a + start, w + start, &run, n)
                if 2 * DQ_ACTIVATIONS_STEP * run.rest_count > n:
                    for r in range(count):
                        sums[r] += dot_block(w + r * k + start, a + start, n)
                else:
                    dot_run_of_rows(w + start, &run, sums, count, k, n)
            start += n
        for r in range(count):
            out[r] = <float> sums[r] * w_scales[r] * a_scale
        w += count * k
        w_scales += count
        out += count
        first += count
