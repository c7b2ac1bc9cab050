# What a scale is computed from: the largest magnitude, or a ranked one.
cdef enum:
    AMAX_RUN = 1 << 14


# x (n,) -> the largest |x[i]| as float bits; 0 when n == 0.
# Without the sign bit IEEE-754 order is integer order, and an integer maximum may be reassociated, so this
# vectorises without fast-math. Infinity and NaN lie at and above 0x7F800000, beyond every finite value: the
# caller's check for them is one compare.
# The loop does little but load, and loads that straddle cache lines halve its speed: it starts at a line. It
# reads in four places by turns: the prefetchers of a core follow several streams at once, and memory answers
# four a quarter faster than one. Short groups and rows do not make up for that.
cdef int32_t amax_bits_f32(const float* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t head, run
    cdef int32_t most
    if n < 256:
        return amax_of_run(x, n)
    head = before_line(x, n)
    most = amax_of_run(x, head)
    while n - head >= 64:
        run = (n - head) // 64 * 16
        run = run if run < AMAX_RUN else AMAX_RUN
        most = max_s32(most, amax_of_4_runs(x + head, run))
        head += 4 * run
    return max_s32(most, amax_of_run(x + head, n - head))


cdef inline int32_t max_s32(int32_t a, int32_t b) noexcept nogil:
    return a if a > b else b


cdef inline int32_t amax_of_run(const float* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t most = 0
    for i in range(n):
        most = max_s32(most, dq_bits(x[i]) & 0x7FFFFFFF)
    return most


cdef inline int32_t amax_of_4_runs(const float* x, Py_ssize_t run) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t a = 0, b = 0, c = 0, d = 0
    for i in range(run):
        a = max_s32(a, dq_bits(x[i]) & 0x7FFFFFFF)
        b = max_s32(b, dq_bits(x[i + run]) & 0x7FFFFFFF)
        c = max_s32(c, dq_bits(x[i + 2 * run]) & 0x7FFFFFFF)
        d = max_s32(d, dq_bits(x[i + 3 * run]) & 0x7FFFFFFF)
    return max_s32(max_s32(a, b), max_s32(c, d))


# x (n,) -> the largest |x[i]| whose float bits are below `bits`, as float bits; 0 if there is none.
cdef int32_t amax_bits_below_f32(const float* x, int32_t bits, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t b, most = 0
    for i in range(n):
        b = dq_bits(x[i]) & 0x7FFFFFFF
        b = b if b < bits else 0
        most = b if b > most else most
    return most


# How many |x[i]| have float bits below `bits`, n < 2**31.
cdef Py_ssize_t count_below_f32(const float* x, int32_t bits, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t below = 0
    for i in range(n):
        below += (dq_bits(x[i]) & 0x7FFFFFFF) < bits
    return below


# How many |x[i]| have float bits in [low, high]; the bits of the first `room` of them go to `kept`. *below
# gains how many have bits below low, *finite becomes 0 where one is NaN or infinite.
cdef Py_ssize_t keep_between_f32(const float* x, int32_t low, int32_t high, int32_t* kept, Py_ssize_t room,
                                 int64_t* below, int* finite, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, found = 0
    cdef uint32_t inside
    cdef int32_t b
    while i + DQ_BETWEEN_STEP <= n:
        inside = dq_between_step(x + i, low, high, below, finite)
        if found >= room:
            found += dq_count_bits(inside)
            inside = 0
        while inside:
            if found < room:
                kept[found] = dq_bits(x[i + dq_lowest_bit(inside)]) & 0x7FFFFFFF
            found += 1
            inside &= inside - 1
        i += DQ_BETWEEN_STEP
    while i < n:
        b = dq_bits(x[i]) & 0x7FFFFFFF
        below[0] += b < low
        finite[0] &= b <= 0x7F7FFFFF
        if low <= b <= high:
            if found < room:
                kept[found] = b
            found += 1
        i += 1
    return found


# counts[t][b] += how often the top 11 of the 31 magnitude bits are b; counts is two tables of 2**11.
# Neighbours often fall into one bin, where each increment would wait for the last one's store: consecutive
# elements go to different tables, which the caller adds up.
cdef void count_top_bits_f32(const float* x, Py_ssize_t* counts, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0
    while i + 2 <= n:
        counts[(dq_bits(x[i]) & 0x7FFFFFFF) >> 20] += 1
        counts[((dq_bits(x[i + 1]) & 0x7FFFFFFF) >> 20) + 2048] += 1
        i += 2
    while i < n:
        counts[(dq_bits(x[i]) & 0x7FFFFFFF) >> 20] += 1
        i += 1


# counts[b] += how often the 10 magnitude bits from `shift` up are b, among the elements whose bits above
# those equal prefix. Few elements match as a rule, so a block is first searched for a match in a loop that
# vectorises, and most blocks end there.
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
