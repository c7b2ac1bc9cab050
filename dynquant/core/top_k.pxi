# Search: for each query the vectors of a corpus with the highest scores.
#
# A block of vectors is scored for a tile of queries at a time: for a few queries by the products of vectors,
# on codes as they lie; for more, panels of it are packed into scratch first. The scores, which a
# core's own cache holds, are compared with what each query's k-th best is so far. Those above it go to the
# query's reservoir, which is cut back to the best k when it is full. So memory grows with queries times k,
# never with the corpus.
#
# Ties: of equal scores the lower index wins, by hit_key in kernels/top_k.pxi. Vectors come in ascending
# order of index, so one whose score only equals the k-th best can be dropped. Threads take ranges of the
# corpus, each with reservoirs of its own. The best of all of them are the best of the corpus, since no two
# hits rank equal.
cdef enum:
    BLOCK_VECTORS = 256  # vectors of a block at most: 1 KiB of scores for each query
    BLOCK_BYTES = 1 << 17  # of a block's codes, which stay in a core's own cache while all queries use them
    TILE_QUERIES = 64  # queries of a tile: with the scores and one panel they fill little more than L1
    PACK_FROM = 6  # queries from which packing a block of int8 codes pays
    PACK_NIBBLES_FROM = 2  # the same of 4-bit codes


# Scratch and results of one part.
cdef struct TopKPart:
    uint64_t* keys  # (m, capacity)
    Py_ssize_t* counts
    float* thresholds  # scores of the k-th best; NaN, which everything is above, before there are so many
    float* scores  # (TILE_QUERIES, block)
    float* vector_norms  # (block,)
    int8_t* unpacked  # (k + 1,)
    PackedWeights w


# Carves the memory of a part; returns its size, to be counted with base NULL.
cdef Py_ssize_t lay_out_part(const TopKSearch* s, uint8_t* base, TopKPart* part) noexcept nogil:
    cdef Py_ssize_t at = 0, panels = s.block // s.table.panel_outputs if s.packs else 0, scales = 0
    if s.group:
        scales = panels * panel_scales(s.table, s.k, s.group)
    part.w.table, part.w.n, part.w.k, part.w.group, part.w.bias = s.table, s.block, s.k, s.group, NULL
    part.w.int8_groups, part.w.w_sums, part.w.minimums = False, NULL, False
    part.w.panels = carve(base, &at, panels * panel_bytes(s.table, s.k, s.group))
    part.w.scales = <float*> carve(base, &at, scales * <Py_ssize_t> sizeof(float))
    part.w.offsets = carve(base, &at, scales)
    part.scores = <float*> carve(base, &at, min(s.m, TILE_QUERIES) * s.block * <Py_ssize_t> sizeof(float))
    part.vector_norms = <float*> carve(base, &at, s.block * <Py_ssize_t> sizeof(float))
    part.unpacked = <int8_t*> carve(base, &at, s.k + 1)
    part.thresholds = <float*> carve(base, &at, s.m * <Py_ssize_t> sizeof(float))
    part.counts = <Py_ssize_t*> carve(base, &at, s.m * <Py_ssize_t> sizeof(Py_ssize_t))
    part.keys = <uint64_t*> carve(base, &at, s.m * s.capacity * <Py_ssize_t> sizeof(uint64_t))
    return at


# n bytes from a line of the cache on.
cdef inline uint8_t* carve(uint8_t* base, Py_ssize_t* at, Py_ssize_t n) noexcept nogil:
    cdef uint8_t* memory = NULL if base == NULL else base + at[0]
    at[0] += (n + 63) // 64 * 64
    return memory


# Squared norm of one vector of the corpus by its codes. The sums over a group are exact integers.
cdef double square_norm(const TopKSearch* s, Py_ssize_t i, int8_t* unpacked) noexcept nogil:
    cdef QuantRow row = code_row(&s.corpus, i)
    cdef Py_ssize_t start = 0, g = 0, n
    cdef double norm = 0
    s.table.unpack_row_s4_s8(<const uint8_t*> row.codes, unpacked, s.k)
    while start < s.k:
        n = group_end(start, row.group, s.k) - start
        if row.zero_points != NULL:
            s.table.shift_row_u4_s8(unpacked + start, row.zero_points[g], n)
        norm += (<double> row.scales[g] * row.scales[g]
                 * <double> s.table.dot_s8s8_s64(unpacked + start, unpacked + start, n))
        start += n
        g += 1
    return norm


# 0 for a vector of zeros, or of a norm so small that float32 has no reciprocal of it.
cdef inline float reciprocal_norm(double square) noexcept nogil:
    cdef float reciprocal = 0
    if square > 0:
        reciprocal = <float> (1 / sqrt(square))
    return reciprocal if reciprocal < INFINITY else <float> 0


# vector_norms of the n vectors from `first` on: squared norms for distances; 1 over the norm for the cosine,
# of the codes where they are int8, because their scale cancels.
cdef void find_vector_norms(const TopKSearch* s, const TopKPart* part, Py_ssize_t first,
                            Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef double square
    cdef const int8_t* codes
    for i in range(n):
        if s.group:
            square = square_norm(s, first + i, part.unpacked)
            part.vector_norms[i] = reciprocal_norm(square) if s.metric == METRIC_COSINE else <float> square
            continue
        codes = s.corpus.codes + (first + i) * s.k
        part.vector_norms[i] = norm_of_codes(s, codes, s.corpus.scales[first + i])


# In the order of a score, so that a vector's distance from itself is 0.
cdef inline float norm_of_codes(const TopKSearch* s, const int8_t* codes, float scale) noexcept nogil:
    cdef int64_t square = s.table.dot_s8s8_s64(codes, codes, s.k)
    if s.metric == METRIC_COSINE:
        return reciprocal_norm(<double> square)
    return <float> square * scale * scale


# Whether a query may have one of n vectors from `first` on.
cdef bint any_allowed(const TopKSearch* s, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t q
    if s.allowed == NULL:
        return True
    for q in range(s.m if s.allowed_stride else 1):
        if memchr(s.allowed + q * s.allowed_stride + first, 1, n) != NULL:
            return True
    return False


# The next block of at most s.block vectors before `end`, from a panel that is allowed to one that is not.
# Returns its length, 0 at the end.
cdef Py_ssize_t next_block(const TopKSearch* s, Py_ssize_t* first, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t step = s.table.panel_outputs, n = 0
    while first[0] < end and not any_allowed(s, first[0], min(step, end - first[0])):
        first[0] += step
    while first[0] + n < end and n < s.block:
        if n and not any_allowed(s, first[0] + n, min(step, end - first[0] - n)):
            break
        n += min(step, end - first[0] - n)
    return n


# Packs n vectors from `first` on into the part's scratch.
cdef void pack_block(const TopKSearch* s, TopKPart* part, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef QuantRow row = code_row(&s.corpus, first)
    part.w.n = n
    pack_weights(&part.w, <const uint8_t*> row.codes, row.scales, row.zero_points)


# scores = those of `count` queries from q on, for n vectors from `first` on; dot products where the metric is
# the distance.
cdef void score_tile(const TopKSearch* s, const TopKPart* part, Py_ssize_t q, Py_ssize_t count,
                     Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef const float* scales = part.vector_norms if s.metric == METRIC_COSINE else s.corpus.scales + first
    cdef const float* bias = NULL
    cdef Py_ssize_t r
    if s.bias != NULL:
        bias = s.bias + first
    if s.packs and s.group:
        s.table.gemm_u4s8_f32(part.w.panels, part.w.scales, part.w.offsets, False, bias,
                              s.a + q * s.query_bytes, s.factors + q, part.scores, s.block, count, n, s.k,
                              s.group, 0)
    elif s.packs:
        s.table.gemm_s8s8_f32(part.w.panels, scales, bias, s.a + q * s.query_bytes, s.factors + q,
                              part.scores, s.block, count, n, s.k)
    else:
        for r in range(count):
            multiply_rows(s, scales, q + r, first, part.scores + r * s.block, n)
            if bias != NULL:
                add_row(part.scores + r * s.block, bias, n)
    if s.group and s.metric == METRIC_COSINE:
        for r in range(count):
            s.table.multiply_row_f32(part.scores + r * s.block, scales, part.scores + r * s.block, n)


# out (n,) = one query times the codes of n vectors as they lie.
cdef void multiply_rows(const TopKSearch* s, const float* scales, Py_ssize_t q, Py_ssize_t first, float* out,
                        Py_ssize_t n) noexcept nogil:
    cdef QuantRow row = code_row(&s.corpus, first)
    if s.group:
        s.table.matvec_u4s8_f32(<const uint8_t*> row.codes, row.scales, row.zero_points,
                                s.a + q * s.query_bytes, s.factors[q], out, n, s.k, s.group)
    else:
        s.table.matvec_s8s8_f32(row.codes, scales, s.codes + q * s.k, s.factors[q], out, n, s.k)


cdef inline void add_row(float* x, const float* y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        x[i] += y[i]


# Puts the hits of one query among n scores of vectors from `first` on into its reservoir; returns whether
# none of them is NaN.
cdef bint collect_hits(const TopKSearch* s, const TopKPart* part, Py_ssize_t q, const float* scores,
                       Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef uint64_t* keys = part.keys + q * s.capacity
    cdef const uint8_t* allowed = NULL
    cdef Py_ssize_t found
    if s.allowed != NULL:
        allowed = s.allowed + q * s.allowed_stride + first
    if part.counts[q] + n > s.capacity:
        select_keys(keys, part.counts[q], s.keep)
        part.counts[q] = s.keep
        part.thresholds[q] = score_of_key(keys[s.keep - 1])
    found = s.table.collect_above_f32(scores, part.thresholds[q], <uint32_t> first, allowed,
                                      keys + part.counts[q], n)
    part.counts[q] += max(found, 0)
    return found >= 0


# The inverse of hit_key.
cdef float score_of_key(uint64_t key) noexcept nogil:
    cdef uint32_t bits = ~<uint32_t> (key >> 32)
    return dq_float(<int32_t> (bits ^ (<uint32_t> 0x80000000 if bits >> 31 else <uint32_t> 0xFFFFFFFF)))


# Moves the k smallest of n distinct keys, 0 < k <= n, to the front; the largest of them becomes keys[k - 1].
# Hoare's quickselect. Pivots are drawn from a sequence of pseudo-random numbers (Knuth's MMIX), so that no
# order of scores that occurs in practice is a bad one.
cdef void select_keys(uint64_t* keys, Py_ssize_t n, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t low = 0, high = n - 1, i, j
    cdef uint64_t pivot, draw = 1
    while low < high:
        draw = draw * <uint64_t> 6364136223846793005 + <uint64_t> 1442695040888963407
        pivot = keys[low + <Py_ssize_t> ((draw >> 33) % <uint64_t> (high - low + 1))]
        i, j = low, high
        while i <= j:
            while keys[i] < pivot:
                i += 1
            while keys[j] > pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            return


cdef bint search_block(const TopKSearch* s, TopKPart* part, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t q = 0, r, count
    cdef float* scores
    if s.metric != METRIC_DOT:
        find_vector_norms(s, part, first, n)
    if s.packs:
        pack_block(s, part, first, n)
    while q < s.m:
        count = min(s.m - q, TILE_QUERIES)
        score_tile(s, part, q, count, first, n)
        for r in range(count):
            scores = part.scores + r * s.block
            if s.metric == METRIC_L2:
                s.table.negative_distance_row_f32(scores, s.norms[q + r], part.vector_norms, n)
            if not collect_hits(s, part, q + r, scores, first, n):
                return False
        q += count
    return True


# The best of one part, in any order; returns whether no score was NaN.
cdef bint search_part(const TopKSearch* s, Py_ssize_t index) noexcept nogil:
    cdef Py_ssize_t panels = panels_of(s.table, s.n), outputs = s.table.panel_outputs, q, n
    cdef Py_ssize_t first = panels * index // s.parts * outputs
    cdef Py_ssize_t end = min(s.n, panels * (index + 1) // s.parts * outputs)
    cdef TopKPart part
    lay_out_part(s, s.parts_memory + index * s.part_bytes, &part)
    for q in range(s.m):
        part.counts[q], part.thresholds[q] = 0, NAN
    n = next_block(s, &first, end)
    while n:
        if not search_block(s, &part, first, n):
            return False
        first += n
        n = next_block(s, &first, end)
    for q in range(s.m):
        n = part.counts[q]
        if n > s.keep:
            select_keys(part.keys + q * s.capacity, n, s.keep)
            n = s.keep
        memcpy(s.hits + (index * s.m + q) * s.keep, part.keys + q * s.capacity, n * sizeof(uint64_t))
    return True


# Units are parts.
cdef bint search_part_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(first, end):
        if not search_part(<const TopKSearch*> context, i):
            return False
    return True


# Factors and norms of the queries, and their codes as the matrix product takes them.
cdef void prepare_queries(const TopKSearch* s, const float* scales) noexcept nogil:
    cdef Py_ssize_t q
    cdef const int8_t* codes
    for q in range(s.m):
        codes = s.codes + q * s.k
        s.factors[q] = scales[q]
        if s.metric == METRIC_COSINE:
            s.factors[q] = norm_of_codes(s, codes, scales[q])
        elif s.metric == METRIC_L2:
            s.norms[q] = norm_of_codes(s, codes, scales[q])
        if s.packs:
            pack_codes(s.table, codes, s.k, s.group, s.a + q * s.query_bytes)
        elif s.group:
            s.table.pack_nibble_query(codes, s.a + q * s.query_bytes, s.k, s.group)
    if s.packs and s.group == 0:
        s.table.arrange_activations_s8(s.a, s.m, s.k)


def top_k(CodeMatrix corpus not None, const int8_t[:, ::1] queries not None, const float[::1] scales not None,
          int metric, const float[::1] bias, const uint8_t[:, ::1] allowed, uint64_t[:, :, ::1] hits not None,
          int num_threads=1):
    """Keys of the best hits.shape[2] vectors for each query, of each part of the corpus, in any order.

    The corpus has one scale for each vector where it is int8. `bias` is added to the scores. `allowed` has a
    row, or one for each query. Returns how many parts, of at most hits.shape[0], were used; 0 where a score
    was NaN.
    """
    cdef TopKSearch s
    cdef Aligned memory
    cdef Py_ssize_t ns
    cdef bint finite
    s.table, s.corpus, s.metric = packing_kernels(), corpus.rows(), metric
    s.n, s.m, s.k, s.keep = corpus.m, queries.shape[0], corpus.k, hits.shape[2]
    check_size(queries.shape[1], s.k)
    check_size(scales.shape[0], s.m)
    check_size(hits.shape[1], s.m)
    s.bias, s.allowed, s.allowed_stride = NULL, NULL, 0
    if bias is not None:
        check_size(bias.shape[0], s.n)
        s.bias = &bias[0]
    if allowed is not None:
        check_size(allowed.shape[1], s.n)
        s.allowed, s.allowed_stride = &allowed[0, 0], s.n if allowed.shape[0] > 1 else 0
        check_size(allowed.shape[0], s.m if s.allowed_stride else 1)
    plan_search(&s)
    ns = s.n * s.k * s.m // s.table.products_per_ns
    s.parts = max(1, threads_for(min(panels_of(s.table, s.n), hits.shape[0]), ns, num_threads))
    s.hits, s.codes = &hits[0, 0, 0], &queries[0, 0]
    memory = aligned_memory(lay_out_search(&s, NULL))
    lay_out_search(&s, memory.data)
    try:
        with nogil:
            prepare_queries(&s, &scales[0])
        finite = parallel_ranges(search_part_range, &s, s.parts, ns, num_threads)
    finally:
        PyMem_RawFree(memory.block)
    return s.parts if finite else 0


# Fills in what follows from the table, the corpus, n, m, k and keep.
cdef void plan_search(TopKSearch* s) noexcept nogil:
    cdef TopKPart part
    s.group = s.corpus.group if s.corpus.packed else 0
    if s.group:
        s.packs = s.m >= PACK_NIBBLES_FROM or not s.table.nibble_rows_fit(s.k, s.group)
    else:
        s.packs = s.m >= PACK_FROM
    s.block = block_vectors(s.table, s.k, s.group)
    s.capacity = 2 * min(s.keep, s.n) + s.block
    s.query_bytes = query_bytes(s)
    s.part_bytes = lay_out_part(s, NULL, &part)


# Carves the memory of a planned search with so many parts; returns its size, to be counted with base NULL.
cdef Py_ssize_t lay_out_search(TopKSearch* s, uint8_t* base) noexcept nogil:
    cdef Py_ssize_t at = s.parts * s.part_bytes
    s.parts_memory = base
    s.a = carve(base, &at, s.m * s.query_bytes)
    s.factors = <float*> carve(base, &at, s.m * <Py_ssize_t> sizeof(float))
    s.norms = <float*> carve(base, &at, s.m * <Py_ssize_t> sizeof(float))
    return at


# A search by the calling thread alone, as one part: the keys of each query ascend, and NO_HIT fills up.
# Returns whether no score was NaN.
cdef bint search_in_order(const TopKSearch* s, const float* scales) noexcept nogil:
    cdef Py_ssize_t q
    memset(s.hits, 0xFF, s.m * s.keep * sizeof(uint64_t))
    prepare_queries(s, scales)
    if not search_part(s, 0):
        return False
    for q in range(s.m):
        sort_keys(s.hits + q * s.keep, s.keep)
    return True


# Heapsort, ascending: in place, and never slow.
cdef void sort_keys(uint64_t* keys, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t root = n // 2, end = n
    while root > 0:
        root -= 1
        sift_down(keys, root, n)
    while end > 1:
        end -= 1
        keys[0], keys[end] = keys[end], keys[0]
        sift_down(keys, 0, end)


# Moves keys[root] down in a heap of n, to where neither child is larger.
cdef void sift_down(uint64_t* keys, Py_ssize_t root, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t child = 2 * root + 1
    while child < n:
        if child + 1 < n and keys[child + 1] > keys[child]:
            child += 1
        if keys[root] >= keys[child]:
            return
        keys[root], keys[child] = keys[child], keys[root]
        root, child = child, 2 * child + 1


# Bytes of a query as the product takes it, in lines of the cache; none where it takes its codes as they are.
cdef Py_ssize_t query_bytes(const TopKSearch* s) noexcept nogil:
    if s.packs:
        return activation_bytes(s.table, s.k, s.group)
    return (s.table.nibble_query_bytes(s.k, s.group) + 63) // 64 * 64 if s.group else 0


# Vectors of a block, a multiple of a panel's.
cdef Py_ssize_t block_vectors(const Kernels* table, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t panels = min(BLOCK_BYTES // panel_bytes(table, k, group),
                                 BLOCK_VECTORS // table.panel_outputs)
    return max(1, panels) * table.panel_outputs


# Sums over the blocks of a query and of one float vector, in float64.
cdef double score_of_floats(const Floats* query, const Floats* x, int metric) noexcept nogil:
    cdef float q_scratch[BLOCK]
    cdef float x_scratch[BLOCK]
    cdef const float* q
    cdef const float* y
    cdef Py_ssize_t start = 0, n
    cdef double total = 0, q_square = 0, x_square = 0
    while start < x.n:
        n = block_len(start, x.n)
        q, y = block_of(query, start, n, q_scratch), block_of(x, start, n, x_scratch)
        if metric == METRIC_L2:
            total += kernels.square_distance_row_f32_f64(q, y, n)
        else:
            total += kernels.dot_row_f32_f64(q, y, n)
        if metric == METRIC_COSINE:
            q_square += kernels.dot_row_f32_f64(q, q, n)
            x_square += kernels.dot_row_f32_f64(y, y, n)
        start += n
    if metric == METRIC_COSINE:
        return total / (sqrt(q_square) * sqrt(x_square)) if q_square > 0 and x_square > 0 else 0
    return total


def score_rows(FloatMatrix query not None, FloatMatrix x not None, int metric, float[::1] scores not None):
    """Scores of the rows of x for one query: sums in float64, in one order, rounded once."""
    cdef Floats q = query.flat(), rows = x.flat(), row
    cdef Py_ssize_t r
    check_size(q.n, x.k)
    check_size(scores.shape[0], x.m)
    with nogil:
        for r in range(x.m):
            row = floats_at(&rows, r * x.k, x.k)
            scores[r] = <float> score_of_floats(&q, &row, metric)


def row_norms(FloatMatrix x not None, float[::1] norms not None):
    """Euclidean norms of the rows, from sums in float64 in one order."""
    cdef float scratch[BLOCK]
    cdef Floats rows = x.flat()
    cdef Py_ssize_t r, start, n
    cdef double square
    cdef const float* y
    check_size(norms.shape[0], x.m)
    with nogil:
        for r in range(x.m):
            start, square = 0, 0
            while start < x.k:
                n = block_len(start, x.k)
                y = block_of(&rows, r * x.k + start, n, scratch)
                square += kernels.dot_row_f32_f64(y, y, n)
                start += n
            norms[r] = <float> sqrt(square)
