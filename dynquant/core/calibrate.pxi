# Statistics of calibration sets.


def moments(FloatMatrix x not None):
    """(n, min, max, mean, sum of squared deviations) of all elements, which are finite; n > 0.

    Within a block the deviations are taken from the block's own mean; blocks are merged by the formula of
    Chan, Golub and LeVeque (1979), which keeps the variance accurate however large the mean is.
    """
    cdef float scratch[BLOCK]
    cdef const float* block
    cdef Py_ssize_t start = 0, n
    cdef Floats flat
    cdef float x_min, x_max
    cdef double mean = 0, m2 = 0, delta, block_mean
    with nogil:
        flat = x.flat()
        block = block_of(&flat, 0, 1, scratch)
        x_min = x_max = block[0]
        while start < flat.n:
            n = block_len(start, flat.n)
            block = block_of(&flat, start, n, scratch)
            kernels.min_max_row_f32(block, &x_min, &x_max, n)
            block_mean = kernels.sum_row_f32_f64(block, n) / n
            m2 += kernels.square_deviation_row_f32_f64(block, block_mean, n)
            delta = block_mean - mean
            m2 += delta * delta * (<double> start * n / (start + n))
            mean += delta * n / (start + n)
            start += n
    return flat.n, x_min, x_max, mean, m2


def ranked_magnitude(list batches not None, Py_ssize_t rank):
    """The magnitude at place `rank` among all elements of a list of FloatRows, which are finite."""
    cdef Py_ssize_t i, n = len(batches)
    cdef int32_t bits
    cdef Floats* parts = <Floats*> PyMem_Malloc(n * sizeof(Floats))
    if parts == NULL:
        raise MemoryError
    for i in range(n):
        parts[i] = (<FloatMatrix> batches[i]).flat()
    with nogil:
        bits = ranked_bits(parts, n, rank)
    PyMem_Free(parts)
    return dq_float(bits)


# Adds `a` to a sum kept as two doubles: the rounding error of every addition goes to the second (two-sum,
# Knuth). One error is at most 2**-53 of the largest partial sum, so what the second itself rounds off in N
# additions is at most N**2 * 2**-106 of it: 2**-66 after a million.
cdef inline void add_to_pair(double* pair, double a) noexcept nogil:
    cdef double total = pair[0] + a
    cdef double part = total - pair[0]
    pair[1] += (pair[0] - (total - part)) + (a - part)
    pair[0] = total


# Adds m * v, m a float32: v is split into halves of 26 bits (Veltkamp), whose products with m are exact.
cdef inline void add_product_to_pair(double* pair, double m, double v) noexcept nogil:
    cdef double high = v * 134217729.0
    high -= high - v
    add_to_pair(pair, m * high)
    add_to_pair(pair, m * (v - high))


# Adds the sum of a block's values to the pair sums[0:2], and of their squares to sums[2:4]. `total` is that
# sum, of n > 0 values, and `deviation` the sum of their squared deviations from block_center. With m close to
# their mean, sum x**2 = sum (x - m)**2 + m * (2 * sum x - n * m). Only the first term rounds, in double and
# relative to the spread alone; m is rounded to float32, which makes n * m exact.
cdef void add_block_sums(double total, double deviation, Py_ssize_t n, double* sums) noexcept nogil:
    cdef double m = block_center(total, n)
    cdef double residual[2]
    residual[0], residual[1] = 2 * total, 0
    add_to_pair(residual, -n * m)
    add_to_pair(sums, total)
    add_to_pair(sums + 2, deviation)
    add_product_to_pair(sums + 2, m, residual[0])
    add_product_to_pair(sums + 2, m, residual[1])


cdef inline double block_center(double total, Py_ssize_t n) noexcept nogil:
    return <float> (total / n)


def bin_of_rank(const int64_t[::1] counts not None, int64_t rank):
    """The bin that holds the element at place `rank`, 0 the smallest; fewer than are counted."""
    cdef Py_ssize_t b = 0
    with nogil:
        while b + 1 < counts.shape[0] and rank >= counts[b]:
            rank -= counts[b]
            b += 1
    return b


# window[c - shift] += source[c]; what would fall below the window goes to its first cell. shift is not
# negative; were it, because two threads change one calibrator, nothing would be written past the window.
cdef void add_histogram(const uint32_t* source, Py_ssize_t shift, uint32_t* histogram) noexcept nogil:
    cdef Py_ssize_t c, index
    for c in range(CHANNEL_BINS):
        index = c - shift if c > shift else 0
        histogram[index if index < CHANNEL_BINS else CHANNEL_BINS - 1] += source[c]


# Moves the window of one channel up to a new largest magnitude, which is not below the old one.
cdef void shift_histogram(uint32_t* histogram, int32_t* amax_bits, int32_t new_bits) noexcept nogil:
    cdef uint32_t before[CHANNEL_BINS]
    cdef Py_ssize_t shift = (new_bits >> 20) - (amax_bits[0] >> 20)
    amax_bits[0] = new_bits
    if shift:
        memcpy(before, histogram, sizeof(before))
        memset(histogram, 0, sizeof(before))
        add_histogram(before, shift, histogram)


# Rows of k channels, to be counted into a histogram for each.
cdef struct RowsToCount:
    Floats x
    Py_ssize_t m, k
    const int32_t* amax_bits
    uint32_t* histograms


# In one thread; an estimate for parallel_ranges.
cdef inline Py_ssize_t moments_ns(Py_ssize_t n) noexcept nogil:
    return n


cdef enum:
    BINS_WORTH = 16  # the share of a thread, over that of others, which makes up for adding its bins
    CHANNELS_TOGETHER = 64  # whose histograms, 23 KB, stay in L1 from row to row
    MERGED = 256  # blocks whose sums are kept until they are merged


# Units are CHANNELS_TOGETHER channels.
cdef bint count_channel_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const RowsToCount* rows = <const RowsToCount*> context
    cdef float scratch[BLOCK]
    cdef const float* block
    cdef Py_ssize_t start = first * CHANNELS_TOGETHER, stop = min(rows.k, end * CHANNELS_TOGETHER), r, c, n
    for r in range(rows.m):
        c = start
        while c < stop:
            n = block_len(c, stop)
            block = block_of(&rows.x, r * rows.k + c, n, scratch)
            kernels.count_channel_bins_row_f32(block, rows.amax_bits + c,
                                               rows.histograms + c * CHANNEL_BINS, n)
            c += n
    return True


# What add_block_sums takes, and the extremes, of blocks from `first_block` on. Each of `parts` parts of them
# counts into bins of its own.
cdef struct BlocksToMerge:
    Floats x
    Py_ssize_t first_block, blocks, parts
    int64_t* bins[MAX_PARTS]
    double totals[MERGED]
    double deviations[MERGED]
    float minima[MERGED]
    float maxima[MERGED]


cdef bint sum_part_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef BlocksToMerge* merge = <BlocksToMerge*> context
    cdef float scratch[BLOCK]
    cdef const float* block
    cdef Py_ssize_t part, i, start, n
    cdef double center
    for part in range(first, end):
        for i in range(merge.blocks * part // merge.parts, merge.blocks * (part + 1) // merge.parts):
            start = (merge.first_block + i) * BLOCK
            n = block_len(start, merge.x.n)
            block = block_of(&merge.x, start, n, scratch)
            merge.minima[i], merge.maxima[i] = INFINITY, -INFINITY
            kernels.min_max_row_f32(block, &merge.minima[i], &merge.maxima[i], n)
            merge.totals[i] = kernels.sum_row_f32_f64(block, n)
            center = block_center(merge.totals[i], n)
            merge.deviations[i] = kernels.square_deviation_row_f32_f64(block, center, n)
            kernels.count_bins_f32(block, merge.bins[part], n)
    return True


@cython.final
cdef class CalibratorState:
    """Writable views of the arrays that a Calibrator keeps.

    All is allocated and looked at before: once `update` or `merge` has begun to change them, nothing keeps it
    from coming to an end.
    """

    cdef int64_t[::1] count
    cdef float[::1] extremes
    cdef double[::1] sums
    cdef int64_t[::1] bins
    cdef int32_t[::1] amax_bits
    cdef uint32_t[:, ::1] histograms

    def __cinit__(self, int64_t[::1] count not None, float[::1] extremes not None, double[::1] sums not None,
                  int64_t[::1] bins not None, int32_t[::1] amax_bits not None,
                  uint32_t[:, ::1] histograms not None):
        self.count, self.extremes, self.sums, self.bins = count, extremes, sums, bins
        self.amax_bits, self.histograms = amax_bits, histograms

    def update(self, FloatMatrix x not None, const int32_t[::1] new_bits not None, int num_threads=1):
        """Add all elements, which are finite; no column's magnitude is above new_bits, nor new_bits below."""
        cdef RowsToCount rows
        cdef BlocksToMerge merge
        cdef Py_ssize_t bins = self.bins.shape[0], i
        cdef int64_t* more_bins = NULL
        # Threads of Python could be interrupted half way.
        cdef int threads = 1 if in_python else num_threads
        merge.x, merge.first_block = x.flat(), 0
        merge.parts = threads_for(MAX_PARTS, moments_ns(merge.x.n) // BINS_WORTH, threads)
        if merge.parts > 1:
            more_bins = <int64_t*> PyMem_RawCalloc((merge.parts - 1) * bins, sizeof(int64_t))
            if more_bins == NULL:
                raise MemoryError
        for i in range(merge.parts):
            merge.bins[i] = more_bins + (i - 1) * bins if i else &self.bins[0]
        with nogil:
            self.shift_histograms(new_bits)
        if self.histograms.shape[0] and x.m:
            rows.x, rows.m, rows.k = merge.x, x.m, x.k
            rows.amax_bits, rows.histograms = &new_bits[0], &self.histograms[0, 0]
            i = (x.k + CHANNELS_TOGETHER - 1) // CHANNELS_TOGETHER
            parallel_ranges(count_channel_range, &rows, i, moments_ns(merge.x.n), threads)
        while merge.first_block * BLOCK < merge.x.n:
            self.add_blocks(&merge, threads)
        for i in range((merge.parts - 1) * bins):
            self.bins[i % bins] += more_bins[i]
        PyMem_RawFree(more_bins)
        # -0.0 becomes 0.0: which of them came first must not show.
        self.extremes[0] += 0
        self.extremes[1] += 0
        self.count[0] += merge.x.n

    def merge(self, CalibratorState other not None, const int32_t[::1] new_bits not None):
        """Add all that `other` has seen, perhaps this itself; new_bits are the larger ones of both."""
        cdef Py_ssize_t i, j
        cdef double sums[4]
        with nogil:
            self.shift_histograms(new_bits)
            for j in range(self.histograms.shape[0]):
                i = (self.amax_bits[j] >> 20) - (other.amax_bits[j] >> 20)
                add_histogram(&other.histograms[j, 0], i, &self.histograms[j, 0])
            self.extremes[0] = min(self.extremes[0], other.extremes[0])
            self.extremes[1] = max(self.extremes[1], other.extremes[1])
            memcpy(sums, &other.sums[0], sizeof(sums))
            for i in range(4):
                add_to_pair(&self.sums[i & ~1], sums[i])
            for i in range(self.bins.shape[0]):
                self.bins[i] += other.bins[i]
            self.count[0] += other.count[0]

    cdef void shift_histograms(self, const int32_t[::1] new_bits) noexcept nogil:
        cdef Py_ssize_t j
        for j in range(self.histograms.shape[0]):
            shift_histogram(&self.histograms[j, 0], &self.amax_bits[j], new_bits[j])

    # The next MERGED blocks.
    cdef int add_blocks(self, BlocksToMerge* merge, int num_threads) except -1:
        cdef Py_ssize_t left = merge.x.n - merge.first_block * BLOCK, i
        merge.blocks = min(MERGED, (left + BLOCK - 1) // BLOCK)
        parallel_ranges(sum_part_range, merge, merge.parts, moments_ns(min(left, MERGED * BLOCK)),
                        num_threads)
        kernels.min_max_row_f32(merge.minima, &self.extremes[0], &self.extremes[1], merge.blocks)
        kernels.min_max_row_f32(merge.maxima, &self.extremes[0], &self.extremes[1], merge.blocks)
        for i in range(merge.blocks):
            add_block_sums(merge.totals[i], merge.deviations[i], block_len(i * BLOCK, left), &self.sums[0])
        merge.first_block += merge.blocks
        return 0


# Float bits that stand for one cell of a window: the middle of its bin; 0 in the lowest bin of all; in the
# first cell, which also holds what lies lower, the upper edge.
cdef int32_t bin_bits(Py_ssize_t bin, int32_t amax_bits) noexcept nogil:
    cdef Py_ssize_t b = (amax_bits >> 20) - (CHANNEL_BINS - 1) + bin
    if b <= 0:
        return 0
    return <int32_t> ((b + 1) << 20 if bin == 0 else (b << 20) | (1 << 19))


def channel_percentiles(const uint32_t[:, ::1] counts not None, const int32_t[::1] amax_bits not None,
                        int64_t rank, float[::1] out not None):
    """out[j] = the magnitude at place `rank` in channel j, as its cell gives it, at most the largest."""
    cdef Py_ssize_t j, bin
    cdef int64_t left
    cdef int32_t bits
    with nogil:
        for j in range(counts.shape[0]):
            left, bin = rank, 0
            while bin + 1 < CHANNEL_BINS and left >= counts[j, bin]:
                left -= counts[j, bin]
                bin += 1
            bits = bin_bits(bin, amax_bits[j])
            out[j] = dq_float(bits if bits < amax_bits[j] else amax_bits[j])
