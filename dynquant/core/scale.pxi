# Scales: the largest magnitude, or a ranked one, over the largest code.
cdef enum:
    MAX_STEPS = 8  # ranks so close to the top are reached from the largest magnitude downward
    CANDIDATES = 8192  # candidates that one pass keeps
    SAMPLE = 2048  # magnitudes in the largest sample; divides CANDIDATES
    SAMPLED = 1280  # from so many floats on, a sample and one pass beat passes for each bit


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


cdef enum:
    MAX_PARTS = 64


# amax_bits of each of `parts` nearly equal parts of x.
cdef struct AmaxParts:
    Floats x
    Py_ssize_t parts
    int32_t bits[MAX_PARTS]


cdef bint amax_part_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef AmaxParts* amax = <AmaxParts*> context
    cdef Py_ssize_t i, start, stop
    cdef Floats part
    for i in range(first, end):
        start, stop = amax.x.n // amax.parts * i, amax.x.n // amax.parts * (i + 1)
        part = floats_at(&amax.x, start, (amax.x.n if i + 1 == amax.parts else stop) - start)
        amax.bits[i] = amax_bits(&part)
    return True


# In one thread; an estimate for parallel_ranges.
cdef inline Py_ssize_t amax_ns(Py_ssize_t n) noexcept nogil:
    return n // 16


cdef int32_t parallel_amax_bits(const Floats* x, int num_threads) except -1:
    cdef AmaxParts amax
    cdef Py_ssize_t i
    cdef int32_t largest = 0
    amax.x = x[0]
    amax.parts = 1 if num_threads <= 1 else max(1, min(x.n // BLOCK, MAX_PARTS))
    parallel_ranges(amax_part_range, &amax, amax.parts, amax_ns(x.n), num_threads)
    for i in range(amax.parts):
        largest = max(largest, amax.bits[i])
    return largest


def all_finite(FloatMatrix x not None, int num_threads=1):
    """Whether no element is NaN or infinite."""
    cdef Floats flat = x.flat()
    return parallel_amax_bits(&flat, num_threads) < NON_FINITE


def min_max(FloatMatrix x not None):
    """(min, max) of all elements, which are finite, and 0."""
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef Floats flat = x.flat()
    cdef float x_min = 0, x_max = 0
    with nogil:
        while start < flat.n:
            n = block_len(start, flat.n)
            kernels.min_max_row_f32(block_of(&flat, start, n, scratch), &x_min, &x_max, n)
            start += n
    return x_min, x_max


# Bits of the magnitude of rank `rank` among those of all parts together, rank 0 being the smallest; at least
# NON_FINITE if one is not finite.
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
        # If another thread writes the parts during the call, the counts may not add up to rank.
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


# ranked_bits for at most BLOCK floats, or 2 * BLOCK of float32. Its passes over L1 vectorize, and so cost
# less than one pass that increments counters. A rank close to the top is reached from the largest magnitude
# in steps to the next lower one; otherwise the bits are fixed one at a time, from the top, by counting the
# magnitudes below.
cdef int32_t ranked_bits_of_block(const Floats* x, Py_ssize_t rank) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef const float* block = block_of(x, 0, x.n, scratch)
    cdef int32_t bits = kernels.amax_bits_f32(block, x.n)
    if bits >= NON_FINITE or rank == x.n - 1:
        return bits
    if x.n - rank <= MAX_STEPS:
        while kernels.count_below_f32(block, bits, x.n) > rank:
            bits = kernels.amax_bits_below_f32(block, bits, x.n)
        return bits
    return ranked_between(block, x.n, rank, 0, bits)


# The bits at `rank` among n magnitudes, where they are known to be in [low, high]: those that the bounds have
# in common need not be searched for.
cdef inline int32_t ranked_between(const float* x, Py_ssize_t n, Py_ssize_t rank, int32_t low,
                                   int32_t high) noexcept nogil:
    cdef int32_t bits, bit = 1 << 30
    while bit and not (low ^ high) & bit:
        bit >>= 1
    bits = high & ~(2 * bit - 1) if bit else high
    while bit:
        if kernels.count_below_f32(x, bits | bit, n) <= rank:
            bits |= bit
        bit >>= 1
    return bits


# ranked_bits for one part of many floats (Floyd and Rivest's selection by sampling, 1975). A sample tells
# between which bounds the magnitude at `rank` should lie, and a pass over x collects the candidates between
# them; where they are more than CANDIDATES, the next sample is taken of them. As a rule one pass or two are
# enough, near the speed of memory. Where a sample cannot raise the lower bound, many values may equal it: the
# next pass leaves these out, and so tells whether the one at `rank` is among them. Returns -1 if the order of
# the values defeats the sampling. ranked_bits is not called from here, because the scratch of both would not
# fit a small stack.
cdef int32_t ranked_bits_by_sample(const Floats* x, Py_ssize_t rank) noexcept nogil:
    cdef int32_t candidates[CANDIDATES]
    cdef int32_t sample[SAMPLE]
    cdef int32_t low = -1, high = NON_FINITE - 1, equal
    cdef int64_t below = 0
    cdef int finite = 1
    cdef Py_ssize_t size = sample_size(x.n), stride = (x.n // size - 1) | 1, found = x.n, i
    for i in range(size):
        sample[i] = bits_at(x, i * stride)
    for _ in range(4):
        equal = low
        bracket(sample, size, <double> (rank - below) / found, &low, &high)
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
            return ranked_between(<const float*> candidates, found, rank - below, low, high)
        size = SAMPLE
        for i in range(SAMPLE):
            sample[i] = candidates[i * (CANDIDATES // SAMPLE)]
    return -1


# A larger sample costs more, but leaves fewer candidates. Its elements lie an odd stride apart, so that it
# does not see the same few channels of rows again and again.
cdef inline Py_ssize_t sample_size(Py_ssize_t n) noexcept nogil:
    return 256 if n < 1 << 13 else 512 if n < 1 << 15 else 1024 if n < 1 << 17 else SAMPLE


# Magnitude bits of element i.
cdef inline int32_t bits_at(const Floats* x, Py_ssize_t i) noexcept nogil:
    cdef Floats one
    cdef int32_t bits
    if x.kind == F32:
        memcpy(&bits, x.data + i * <Py_ssize_t> sizeof(float), sizeof(bits))
        return bits & 0x7FFFFFFF
    one = floats_at(x, i, 1)
    return amax_bits(&one)


# Narrows the bounds to where the magnitude at `quantile`, from 0 to 1, of what was sampled should be:
# four standard deviations and a bit to either side.
cdef void bracket(const int32_t* sample, Py_ssize_t size, double quantile, int32_t* low,
                  int32_t* high) noexcept nogil:
    cdef double middle = quantile * size
    cdef Py_ssize_t margin = <Py_ssize_t> (4 * sqrt(middle * (1 - quantile if quantile < 1 else 0))) + 4
    cdef Py_ssize_t first = <Py_ssize_t> middle - margin, last = <Py_ssize_t> middle + margin
    cdef const float* x = <const float*> sample
    cdef int32_t amax = kernels.amax_bits_f32(x, size)
    if first > 0:
        low[0] = max(low[0], ranked_between(x, size, first, 0, amax))
    if last < size:
        high[0] = min(high[0], ranked_between(x, size, last, 0, amax))


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

    Nothing is interpolated, and repeated values count each time: the percentile is always one of the values.

    ``p * n`` is a float32 product up to n = 2**24, beyond which float32 cannot tell neighboring ranks apart,
    and a float64 product above.
    """
    cdef double product = <double> (<float> p * <float> n) if n <= 1 << 24 else p * <double> n
    cdef Py_ssize_t rank = <Py_ssize_t> ceil(product) - 1
    rank = rank if rank < n else n - 1
    return rank if rank > 0 else 0


# scale[0] = the scale of one row: its largest magnitude, or the one at `rank` if that is >= 0, over clip.
# Returns False, with scale unchanged, if the row is not finite.
cdef bint scale_of(const Floats* x, float clip, Py_ssize_t rank, float* scale) noexcept nogil:
    cdef int32_t bits
    if rank < 0 or rank == x.n - 1:
        bits = amax_bits(x)
    elif x.n < SAMPLED:
        bits = ranked_bits_of_block(x, rank)
    else:
        bits = ranked_bits_by_sample(x, rank)
        if bits < 0:
            bits = ranked_bits(x, 1, rank)
    if bits >= NON_FINITE:
        return False
    scale[0] = dq_float(bits) / clip
    return True


# scale_of for each group of one row; `last_rank` is the rank among the elements of the last group, which may
# be shorter.
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


# The scales of rows, each in groups; `stride` scales a row.
cdef struct RowScales:
    Floats x
    float* scales
    float clip
    Py_ssize_t k, rank, last_rank, group, stride


cdef bint scale_row_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const RowScales* rows = <const RowScales*> context
    cdef Py_ssize_t r
    cdef Floats row
    for r in range(first, end):
        row = floats_at(&rows.x, r * rows.k, rows.k)
        if not group_scales(&row, rows.clip, rows.rank, rows.last_rank, rows.group,
                            rows.scales + r * rows.stride):
            return False
    return True


# In one thread, the rank of n magnitudes; an estimate for parallel_ranges.
cdef inline Py_ssize_t ranked_ns(Py_ssize_t n) noexcept nogil:
    return n // 2


def scale_rows(FloatMatrix x not None, scales not None, float clip, Py_ssize_t rank,
               Py_ssize_t last_rank, Py_ssize_t group, int num_threads=1):
    """The scales of the rows; returns whether they are finite."""
    cdef RawBuffer s = RawBuffer(scales)
    cdef RowScales rows
    rows.x, rows.scales, rows.k, rows.group = x.flat(), <float*> s.view.buf, x.k, group
    rows.clip, rows.rank, rows.last_rank = clip, rank, last_rank
    rows.stride = s.view.len // <Py_ssize_t> sizeof(float) // (x.m or 1)
    if rows.stride == 0:
        return True
    if x.m == 1 and num_threads > 1 and group >= x.k:
        return parallel_scale(&rows.x, clip, last_rank, rows.scales, num_threads)
    return parallel_ranges(scale_row_range, &rows, x.m,
                           amax_ns(x.m * x.k) if rank < 0 else ranked_ns(x.m * x.k), num_threads)


# scale_of, with the largest magnitude searched for by several threads.
cdef bint parallel_scale(const Floats* x, float clip, Py_ssize_t rank, float* scale,
                         int num_threads) except -1:
    cdef int32_t bits
    if 0 <= rank < x.n - 1:
        with nogil:
            return scale_of(x, clip, rank, scale)
    bits = parallel_amax_bits(x, num_threads)
    if bits >= NON_FINITE:
        return False
    scale[0] = dq_float(bits) / clip
    return True
