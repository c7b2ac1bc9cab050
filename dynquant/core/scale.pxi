# Scales: the largest magnitude, or a ranked one, over the largest code.
cdef enum:
    MAX_STEPS = 8  # ranks so close to the top are reached from the largest magnitude downward
    CANDIDATES = 8192  # candidates that one pass keeps
    SAMPLE = 2048  # magnitudes that a sample has; divides KEPT
    SAMPLED = 1 << 16  # from so many floats on, a sample and one pass beat the radix selection's three


cdef int32_t amax_bits(const Floats* x) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef int32_t b, amax = 0
    while start < x.n:
        n = span_len(x, start, x.n)
        b = kernels.amax_bits_f32(block_of(x, start, n, scratch), n)
        amax = b if b > amax else amax
        start += n
    return amax


def all_finite(FloatMatrix x not None):
    """Whether no element is NaN or infinite."""
    cdef Floats flat = x.flat()
    cdef int32_t bits
    with nogil:
        bits = amax_bits(&flat)
    return bits < NON_FINITE


def min_max(FloatMatrix x not None):
    """(min, max) of all elements, which are finite, and 0."""
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef Floats flat = x.flat()
    cdef float x_min = 0, amax = 0
    with nogil:
        while start < flat.n:
            n = block_len(start, flat.n)
            kernels.min_max_row_f32(block_of(&flat, start, n, scratch), &x_min, &amax, n)
            start += n
    return x_min, amax


# Bits of the magnitude at place `rank`, 0 the smallest, of all the parts' magnitudes together; at least
# NON_FINITE if any of them is not finite.
# A radix selection: the 31 magnitude bits are fixed from the top in steps of 11, 10 and 10, each by counting
# over the parts as they lie. Three passes whatever the values are, and 32 KiB of scratch.
cdef int32_t ranked_bits(const Floats* parts, Py_ssize_t n_parts, Py_ssize_t rank) noexcept nogil:
    cdef Py_ssize_t counts[2 * 2048]
    cdef Py_ssize_t b
    cdef int32_t prefix = 0
    cdef int shift = 20
    while shift >= 0:
        memset(counts, 0, sizeof(counts))
        count_parts(parts, n_parts, prefix, shift, counts)
        if shift == 20:
            for b in range(2048):
                counts[b] += counts[2048 + b]
            for b in range(NON_FINITE >> 20, 2048):
                if counts[b]:
                    return NON_FINITE
        b = 0
        # The bound is for parts that another thread writes meanwhile: their counts may not add up to rank.
        while b < 2047 and rank >= counts[b]:
            rank -= counts[b]
            b += 1
        prefix = <int32_t> ((prefix << 10) | b)
        shift -= 10
    return prefix


cdef void count_parts(const Floats* parts, Py_ssize_t n_parts, int32_t prefix, int shift,
                      Py_ssize_t* counts) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef const float* x
    cdef Py_ssize_t p, start, n
    for p in range(n_parts):
        start = 0
        while start < parts[p].n:
            n = block_len(start, parts[p].n)
            x = block_of(&parts[p], start, n, scratch)
            if shift == 20:
                kernels.count_top_bits_f32(x, counts, n)
            else:
                kernels.count_next_bits_f32(x, prefix, shift, counts, n)
            start += n


# The same for at most BLOCK floats, or 2 * BLOCK of float32, in passes over L1 that vectorize, and so cost
# less than one pass that increments counters. A rank close to the top is reached from the largest magnitude
# in steps to the next lower one; otherwise the bits are fixed one at a time, from the top, by counting the
# magnitudes below.
cdef int32_t ranked_bits_of_block(const Floats* x, Py_ssize_t rank) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef const float* block = block_of(x, 0, x.n, scratch)
    cdef int32_t bits = kernels.amax_bits_f32(block, x.n), bit = 1 << 30
    if bits >= NON_FINITE or rank == x.n - 1:
        return bits
    if x.n - rank <= MAX_STEPS:
        while kernels.count_below_f32(block, bits, x.n) > rank:
            bits = kernels.amax_bits_below_f32(block, bits, x.n)
        return bits
    bits = 0
    while bit:
        if kernels.count_below_f32(block, bits | bit, x.n) <= rank:
            bits |= bit
        bit >>= 1
    return bits


# The same for one part of many floats. A sample says between which magnitudes the one at `rank` should be,
# and a pass over x keeps those that are; where they are more than there is room for, they give the next
# sample. One pass or two are enough as a rule, near the speed of memory. Where a sample cannot raise the
# lower bound, many values may be equal to it: the next pass leaves these out, and so tells whether the one at
# `rank` is among them. -1 where it is not found so, because of how values are ordered: ranked_bits is not
# called from here, since the scratch of both is more than a small stack has.
cdef int32_t ranked_bits_by_sample(const Floats* x, Py_ssize_t rank) noexcept nogil:
    cdef int32_t candidates[CANDIDATES]
    cdef int32_t sample[SAMPLE]
    cdef int32_t low = -1, high = NON_FINITE - 1, equal
    cdef int64_t below = 0
    cdef int finite = 1
    cdef Py_ssize_t found = x.n, i
    for i in range(SAMPLE):
        sample[i] = bits_at(x, i * (x.n // SAMPLE))
    for _ in range(4):
        equal = low
        bracket(sample, <double> (rank - below) / found, &low, &high)
        low += low == equal
        found = collect_between(x, low, high, candidates, &below, &finite)
        if not finite:
            return NON_FINITE
        if rank < below and low == equal + 1:
            return equal
        if not below <= rank < below + found:
            break
        if low == high:
            return low
        if found <= CANDIDATES:
            return ranked_of(candidates, found, rank - below)
        for i in range(SAMPLE):
            sample[i] = candidates[i * (CANDIDATES // SAMPLE)]
    return -1


# Magnitude bits of element i.
cdef inline int32_t bits_at(const Floats* x, Py_ssize_t i) noexcept nogil:
    cdef Floats one
    cdef int32_t bits
    if x.kind == F32:
        memcpy(&bits, x.data + i * <Py_ssize_t> sizeof(float), sizeof(bits))
        return bits & 0x7FFFFFFF
    one = floats_at(x, i, 1)
    return amax_bits(&one)


# Bits of the magnitude at `rank` among n <= KEPT.
cdef inline int32_t ranked_of(const int32_t* bits, Py_ssize_t n, Py_ssize_t rank) noexcept nogil:
    cdef Floats x
    x.data, x.kind, x.n = <const char*> bits, F32, n
    return ranked_bits_of_block(&x, rank)


# Narrows the bounds to where the magnitude at `place`, from 0 to 1, of what was sampled should be: four
# standard deviations and a bit to either side.
cdef void bracket(const int32_t* sample, double index, int32_t* low, int32_t* high) noexcept nogil:
    cdef double middle = index * SAMPLE
    cdef Py_ssize_t margin = <Py_ssize_t> (4 * sqrt(middle * (1 - index if index < 1 else 0))) + 4
    cdef Py_ssize_t first = <Py_ssize_t> middle - margin, last = <Py_ssize_t> middle + margin
    if first > 0:
        low[0] = max(low[0], ranked_of(sample, SAMPLE, first))
    if last < SAMPLE:
        high[0] = min(high[0], ranked_of(sample, SAMPLE, last))


cdef Py_ssize_t collect_between(const Floats* x, int32_t low, int32_t high, int32_t* candidates,
                                int64_t* below, int* finite) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n, found = 0, capacity
    below[0] = 0
    while start < x.n:
        n = span_len(x, start, x.n)
        capacity = CANDIDATES - found if found < CANDIDATES else 0
        found += kernels.collect_between_f32(block_of(x, start, n, scratch), low, high,
                                             candidates + (CANDIDATES - capacity), capacity, below, finite, n)
        start += n
    return found


cpdef Py_ssize_t percentile_rank(double p, Py_ssize_t n) noexcept nogil:
    """Index of percentile p, 0 < p <= 1, by nearest rank among n > 0 ascending magnitudes.

    ``p * n`` is a float32 product up to n = 2**24, beyond which float32 cannot tell neighboring ranks apart,
    and a float64 product above.
    """
    cdef double product = <double> (<float> p * <float> n) if n <= 1 << 24 else p * <double> n
    cdef Py_ssize_t rank = <Py_ssize_t> ceil(product) - 1
    rank = rank if rank < n else n - 1
    return rank if rank > 0 else 0


# scale[0] = that of one row: its largest magnitude, or the one at `rank` when that is >= 0, over clip.
# Returns False, with scale untouched, if the row is not finite.
cdef bint scale_of(const Floats* x, float clip, Py_ssize_t rank, float* scale) noexcept nogil:
    cdef int32_t bits
    if rank < 0 or rank == x.n - 1:
        bits = amax_bits(x)
    elif x.n <= BLOCK:
        bits = ranked_bits_of_block(x, rank)
    elif x.n < SAMPLED:
        bits = ranked_bits(x, 1, rank)
    else:
        bits = ranked_bits_by_sample(x, rank)
        if bits < 0:
            bits = ranked_bits(x, 1, rank)
    if bits >= NON_FINITE:
        return False
    scale[0] = dq_float(bits) / clip
    return True


# scale_of for each group of one row; `last_rank` is that among the elements of the last group.
cdef bint group_scales(const Floats* x, float clip, Py_ssize_t rank, Py_ssize_t last_rank, Py_ssize_t group,
                       float* scales) noexcept nogil:
    cdef Py_ssize_t start = 0, end
    cdef Floats part
    if x.n <= group:
        return scale_of(x, clip, last_rank, scales)
    while start < x.n:
        end = group_end(start, group, x.n)
        part = floats_at(x, start, end - start)
        if not scale_of(&part, clip, last_rank if end == x.n else rank, &scales[start // group]):
            return False
        start = end
    return True


def scale_rows(FloatMatrix x not None, scales not None, float clip, Py_ssize_t rank,
               Py_ssize_t last_rank, Py_ssize_t group, Py_ssize_t first=0, Py_ssize_t end=PY_SSIZE_T_MAX):
    """The scales of rows first .. end; returns whether they are finite, and stops at a row that is not."""
    cdef RawBuffer s = RawBuffer(scales)
    cdef Py_ssize_t r, groups = s.view.len // <Py_ssize_t> sizeof(float) // (x.m or 1)
    cdef Floats row
    cdef bint finite = True
    if groups == 0:
        return True
    with nogil:
        for r in range(first, end if end < x.m else x.m):
            row = x.row(r)
            finite = group_scales(&row, clip, rank, last_rank, group, <float*> s.view.buf + r * groups)
            if not finite:
                break
    return finite
