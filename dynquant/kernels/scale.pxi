# What scales are computed from: largest and ranked magnitudes, and ranges.
cdef enum:
    AMAX_SPAN = 1 << 14  # floats that each of four concurrent streams reads


# x (n,) -> the largest |x[i]| as float bits; 0 when n == 0. With the sign bit cleared IEEE-754 order is
# integer order, and an integer maximum may be reassociated, so this vectorizes without fast-math. Infinity
# and NaN sort above every finite value, at and above NON_FINITE: the caller finds them with one compare. The
# loop does little but load, and loads that straddle cache lines halve its speed, so it starts at a line. It
# reads four streams in turns: the prefetchers of a core follow several, and memory delivers four of them a
# quarter faster than one. Short rows and groups would not make up for the set-up.
cdef int32_t amax_bits_f32(const float* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t head, span
    cdef int32_t amax
    if n < 256:
        return amax_of_span(x, n)
    head = before_line(x, n)
    amax = amax_of_span(x, head)
    while n - head >= 64:
        span = (n - head) // 64 * 16
        span = span if span < AMAX_SPAN else AMAX_SPAN
        amax = max_s32(amax, amax_of_4_spans(x + head, span))
        head += 4 * span
    return max_s32(amax, amax_of_span(x + head, n - head))


cdef inline int32_t max_s32(int32_t a, int32_t b) noexcept nogil:
    return a if a > b else b


cdef inline int32_t amax_of_span(const float* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t amax = 0
    for i in range(n):
        amax = max_s32(amax, dq_bits(x[i]) & 0x7FFFFFFF)
    return amax


cdef inline int32_t amax_of_4_spans(const float* x, Py_ssize_t span) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t a = 0, b = 0, c = 0, d = 0
    for i in range(span):
        a = max_s32(a, dq_bits(x[i]) & 0x7FFFFFFF)
        b = max_s32(b, dq_bits(x[i + span]) & 0x7FFFFFFF)
        c = max_s32(c, dq_bits(x[i + 2 * span]) & 0x7FFFFFFF)
        d = max_s32(d, dq_bits(x[i + 3 * span]) & 0x7FFFFFFF)
    return max_s32(max_s32(a, b), max_s32(c, d))


# x (n,) -> the largest |x[i]| whose float bits are below `bits`, as float bits; 0 if there is none.
cdef int32_t amax_bits_below_f32(const float* x, int32_t bits, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t b, amax = 0
    for i in range(n):
        b = dq_bits(x[i]) & 0x7FFFFFFF
        b = b if b < bits else 0
        amax = b if b > amax else amax
    return amax


# How many |x[i]| have float bits below `bits`, n < 2**31.
cdef Py_ssize_t count_below_f32(const float* x, int32_t bits, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t below = 0
    for i in range(n):
        below += (dq_bits(x[i]) & 0x7FFFFFFF) < bits
    return below


# How many |x[i]| have float bits in [low, high]; the bits of the first `capacity` of them go to `candidates`.
# *below grows by how many have bits below low; *finite becomes 0 where one is NaN or infinite.
cdef Py_ssize_t collect_between_f32(const float* x, int32_t low, int32_t high, int32_t* candidates,
                                    Py_ssize_t capacity, int64_t* below, int* finite,
                                    Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, found = 0
    cdef uint32_t found_bits
    cdef int32_t b
    while i + DQ_BETWEEN_STEP <= n:
        found_bits = dq_between_step(x + i, low, high, below, finite)
        if found >= capacity:
            found += dq_count_bits(found_bits)
            found_bits = 0
        while found_bits:
            if found < capacity:
                candidates[found] = dq_bits(x[i + dq_lowest_bit(found_bits)]) & 0x7FFFFFFF
            found += 1
            found_bits &= found_bits - 1
        i += DQ_BETWEEN_STEP
    while i < n:
        b = dq_bits(x[i]) & 0x7FFFFFFF
        below[0] += b < low
        finite[0] &= b <= 0x7F7FFFFF
        if low <= b <= high:
            if found < capacity:
                candidates[found] = b
            found += 1
        i += 1
    return found


# counts[t][b] += how often the top 11 of the 31 magnitude bits are b; counts is two tables of 2**11.
# Neighbors often fall into one bin, where each increment would wait for the store of the last one. So
# consecutive elements go to different tables, which the caller adds up.
cdef void count_top_bits_f32(const float* x, Py_ssize_t* counts, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0
    while i + 2 <= n:
        counts[(dq_bits(x[i]) & 0x7FFFFFFF) >> 20] += 1
        counts[((dq_bits(x[i + 1]) & 0x7FFFFFFF) >> 20) + 2048] += 1
        i += 2
    while i < n:
        counts[(dq_bits(x[i]) & 0x7FFFFFFF) >> 20] += 1
        i += 1


# counts[b] += how often the 10 magnitude bits from `shift` up are b, among the elements whose higher bits
# equal prefix. Few elements match as a rule, so 32 at a time are first searched for a match in a loop that
# vectorizes, and most searches find none.
cdef void count_next_bits_f32(const float* x, int32_t prefix, int shift, Py_ssize_t* counts,
                              Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, start = 0, stop
    cdef int32_t b, found
    while start < n:
        stop = start + 32 if start + 32 < n else n
        found = 0
        for i in range(start, stop):
            found |= ((dq_bits(x[i]) & 0x7FFFFFFF) >> (shift + 10)) == prefix
        if found:
            for i in range(start, stop):
                b = (dq_bits(x[i]) & 0x7FFFFFFF) >> shift
                if b >> 10 == prefix:
                    counts[b & 1023] += 1
        start = stop


# x_min, x_max = the smallest and the largest of themselves and x; x is free of NaN.
cdef void min_max_row_f32(const float* x, float* x_min, float* x_max, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t b, low = ordered(dq_bits(x_min[0])), high = ordered(dq_bits(x_max[0]))
    for i in range(n):
        b = ordered(dq_bits(x[i]))
        low = b if b < low else low
        high = b if b > high else high
    x_min[0], x_max[0] = dq_float(ordered(low)), dq_float(ordered(high))


# Float bits to an integer of the same order, and back: the magnitude of negative floats is flipped. A minimum
# of floats does not vectorize without fast-math; one of integers does.
cdef inline int32_t ordered(int32_t b) noexcept nogil:
    return b ^ ((b >> 31) & 0x7FFFFFFF)
