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


# Rows of k channels, to be counted into bins, which are NULL or column 0 of a matrix (k, OCTAVE_BINS).
cdef struct RowsToCount:
    Floats x
    Py_ssize_t m, k
    uint32_t* const* bins


# In one thread; an estimate for parallel_ranges.
cdef inline Py_ssize_t moments_ns(Py_ssize_t n) noexcept nogil:
    return n


cdef enum:
    BINS_WORTH = 16  # bins that a thread must fill, for each that is added up afterwards, to be worth it
    CHANNELS_TOGETHER = 64  # of which the bins of several octaves, 2 KB each, stay in L1 from row to row
    MERGED = 256  # blocks whose sums are kept until they are merged
    OCTAVES = 256  # exponents of a float32; that of NaN and infinity among them


# Units are CHANNELS_TOGETHER channels.
cdef bint count_channel_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const RowsToCount* rows = <const RowsToCount*> context
    cdef float scratch[BLOCK]
    cdef const float* block
    cdef Py_ssize_t start = first * CHANNELS_TOGETHER, stop = min(rows.k, end * CHANNELS_TOGETHER), r, n
    while start < stop:
        n = min(CHANNELS_TOGETHER, stop - start)
        for r in range(rows.m):
            block = block_of(&rows.x, r * rows.k + start, n, scratch)
            kernels.count_channel_bins_row_f32(block, rows.bins, start, n)
        start += n
    return True


# The smallest magnitude other than 0, and the exponents, of each of `parts` nearly equal parts of x.
cdef struct OctaveParts:
    Floats x
    Py_ssize_t parts
    uint32_t low[MAX_PARTS]
    int32_t zeros[MAX_PARTS]
    uint8_t seen[MAX_PARTS][OCTAVES]
    bint exactly


cdef bint octave_part_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef OctaveParts* octaves = <OctaveParts*> context
    cdef float scratch[BLOCK]
    cdef const float* block
    cdef Py_ssize_t i, start, stop, n
    for i in range(first, end):
        start, stop = octaves.x.n * i // octaves.parts, octaves.x.n * (i + 1) // octaves.parts
        while start < stop:
            n = block_len(start, stop)
            block = block_of(&octaves.x, start, n, scratch)
            if octaves.exactly:
                kernels.mark_octaves_row_f32(block, octaves.seen[i], n)
            else:
                kernels.min_nonzero_row_f32(block, &octaves.low[i], &octaves.zeros[i], n)
            start += n
    return True


def mark_octaves(FloatMatrix x not None, const uint8_t[::1] present not None, uint8_t[::1] seen not None,
                 int num_threads=1):
    """seen[e] = 1 for each exponent e that an element has, unless all between the lowest and the highest of
    them are `present`.

    That is found out much faster than which of them occur.
    """
    cdef OctaveParts octaves
    cdef Py_ssize_t ns, i, e, low = OCTAVES, high
    cdef bint missing = False
    check_size(present.shape[0], OCTAVES)
    check_size(seen.shape[0], OCTAVES)
    octaves.x = x.flat()
    ns = amax_ns(octaves.x.n)
    octaves.parts = threads_for(MAX_PARTS, ns, num_threads)
    octaves.exactly = False
    memset(octaves.seen, 0, sizeof(octaves.seen))
    for i in range(octaves.parts):
        octaves.low[i], octaves.zeros[i] = 0xFFFFFFFF, 0
    parallel_ranges(octave_part_range, &octaves, octaves.parts, ns, num_threads)
    high = parallel_amax_bits(&octaves.x, num_threads) >> 23
    for i in range(octaves.parts):
        missing |= octaves.zeros[i] and not present[0]
        if octaves.low[i] != 0xFFFFFFFF:
            low = min(low, (octaves.low[i] + 1) >> 23)
    for e in range(low, high + 1):
        missing |= not present[e]
    if not missing:
        return
    octaves.exactly = True
    parallel_ranges(octave_part_range, &octaves, octaves.parts, octaves.x.n, num_threads)
    for i in range(octaves.parts):
        for e in range(OCTAVES):
            seen[e] |= octaves.seen[i][e]


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

    All memory is allocated and all input validated in advance: once `update` or `merge` begins to write, it
    cannot fail.
    """

    cdef int64_t[::1] count
    cdef float[::1] extremes
    cdef double[::1] sums
    cdef int64_t[::1] bins
    cdef int32_t[::1] amax_bits
    cdef uint32_t* channel_bins[OCTAVES * OCTAVE_BINS]
    cdef dict octaves  # the arrays that these are in, kept alive

    def __cinit__(self, int64_t[::1] count not None, float[::1] extremes not None, double[::1] sums not None,
                  int64_t[::1] bins not None, int32_t[::1] amax_bits not None):
        self.count, self.extremes, self.sums, self.bins = count, extremes, sums, bins
        self.amax_bits = amax_bits
        self.octaves = {}

    def add_octave(self, int octave, uint32_t[:, ::1] counts not None):
        """Have `counts` (channels, OCTAVE_BINS) take the magnitudes with the exponent `octave`."""
        cdef Py_ssize_t b
        check_size(counts.shape[0], self.amax_bits.shape[0])
        check_size(counts.shape[1], OCTAVE_BINS)
        if not (0 <= octave < OCTAVES and counts.shape[0]):
            raise ValueError("not an octave")
        self.octaves[octave] = counts
        for b in range(OCTAVE_BINS):
            self.channel_bins[octave * OCTAVE_BINS + b] = &counts[0, b]

    def update(self, FloatMatrix x not None, const int32_t[::1] new_bits not None, int num_threads=1):
        """Add all elements, which are finite, and whose octaves are there.

        new_bits: the columns' largest magnitudes so far, these included.
        """
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
        self.amax_bits[:] = new_bits
        if self.amax_bits.shape[0] and x.m:
            rows.x, rows.m, rows.k, rows.bins = merge.x, x.m, x.k, self.channel_bins
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
        """Add all that `other` has seen, perhaps this itself; all its octaves are there.

        new_bits: the larger of both largest magnitudes.
        """
        cdef Py_ssize_t i, e
        cdef double sums[4]
        cdef uint32_t* mine
        cdef const uint32_t* theirs
        with nogil:
            for e in range(OCTAVES):
                mine, theirs = self.channel_bins[e * OCTAVE_BINS], other.channel_bins[e * OCTAVE_BINS]
                if mine != NULL and theirs != NULL:
                    for i in range(self.amax_bits.shape[0] * OCTAVE_BINS):
                        mine[i] += theirs[i]
            for i in range(self.amax_bits.shape[0]):
                self.amax_bits[i] = new_bits[i]
            self.extremes[0] = min(self.extremes[0], other.extremes[0])
            self.extremes[1] = max(self.extremes[1], other.extremes[1])
            memcpy(sums, &other.sums[0], sizeof(sums))
            for i in range(4):
                add_to_pair(&self.sums[i & ~1], sums[i])
            for i in range(self.bins.shape[0]):
                self.bins[i] += other.bins[i]
            self.count[0] += other.count[0]

    def percentiles(self, int64_t rank, float[::1] out not None):
        """out[j] = the magnitude at place `rank` in channel j: the middle of its bin, at most the largest.

        The lowest bin of all holds zeros above all, which have to stay zero.
        """
        cdef Py_ssize_t j, bin
        cdef int64_t left
        cdef int32_t bits
        check_size(out.shape[0], self.amax_bits.shape[0])
        with nogil:
            for j in range(out.shape[0]):
                bin = self.bin_of_rank(j, rank)
                bits = <int32_t> (bin << 20 | 1 << 19) if bin else 0
                out[j] = dq_float(min(bits, self.amax_bits[j]))

    # The bin, over all octaves, that holds the element at place `rank` in channel j; 0 if there are fewer.
    cdef Py_ssize_t bin_of_rank(self, Py_ssize_t j, int64_t rank) noexcept nogil:
        cdef Py_ssize_t b
        cdef uint32_t count
        for b in range(OCTAVES * OCTAVE_BINS):
            if self.channel_bins[b] != NULL:
                count = self.channel_bins[b][j * OCTAVE_BINS]
                if rank < count:
                    return b
                rank -= count
        return 0

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


# Every bit of the result depends on all bits of h (the finalizer of SplitMix64: Steele, Lea and Flood, 2014).
cdef inline uint64_t mixed(uint64_t h) noexcept nogil:
    h = (h ^ (h >> 30)) * <uint64_t> 0xBF58476D1CE4E5B9
    h = (h ^ (h >> 27)) * <uint64_t> 0x94D049BB133111EB
    return h ^ (h >> 31)


# hashes[r] = a hash of row r of x as float32: its bits times a pseudo-random key for each column, added up.
cdef struct RowsToHash:
    Floats x
    Py_ssize_t k
    const uint64_t* keys
    uint64_t* hashes


cdef bint hash_row_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const RowsToHash* rows = <const RowsToHash*> context
    cdef float scratch[BLOCK]
    cdef const float* block
    cdef Py_ssize_t r, c, j, n
    cdef uint32_t bits
    cdef uint64_t h
    for r in range(first, end):
        h, c = 0, 0
        while c < rows.k:
            n = block_len(c, rows.k)
            block = block_of(&rows.x, r * rows.k + c, n, scratch)
            for j in range(n):
                memcpy(&bits, block + j, sizeof(bits))
                h += bits * rows.keys[c + j]
            c += n
        rows.hashes[r] = mixed(h)
    return True


def hash_rows(FloatMatrix x not None, uint64_t[::1] hashes not None, int num_threads=1):
    """hashes[r] = a 64-bit hash of row r as float32, the same wherever and in whatever batch it comes."""
    cdef RowsToHash rows
    cdef Py_ssize_t j
    cdef uint64_t* keys
    check_size(hashes.shape[0], x.m)
    if x.m == 0:
        return
    keys = <uint64_t*> PyMem_RawMalloc(x.k * sizeof(uint64_t))
    if keys == NULL:
        raise MemoryError
    for j in range(x.k):
        keys[j] = mixed((j + 1) * <uint64_t> 0x9E3779B97F4A7C15)
    rows.x, rows.k, rows.keys, rows.hashes = x.flat(), x.k, keys, &hashes[0]
    try:
        parallel_ranges(hash_row_range, &rows, x.m, x.m * x.k, num_threads)
    finally:
        PyMem_RawFree(keys)
