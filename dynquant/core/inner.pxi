# Exact integer products of the rows of two int8 matrices, by the kernels of matmul_s8.pxi.
#
# The matrix with fewer rows is taken as activations are, the other as weights, 64 rows at a time, a k-block
# of which is packed into panels just before it is multiplied by the rows of a chunk. Each k-block is a
# product of its own with scales of 1. Its sums are at most 2**10 * 2**14 = 2**24 in magnitude, and float32
# holds every integer up to there: so what the kernels give is exact, and is added up as integers.
#
# Activations have no -128, but these rows may. Where it stands -127 is multiplied instead, and the residual
# -1 comes after: a few of them by additions of single weights, more of them as a row of their own.
cdef enum:
    INNER_K = 1 << 10
    INNER_COLS = 64  # rows of w that are packed together: 64 KiB
    INNER_ROWS = 64  # rows of a in a block: their tile is 16 KiB, with residuals 32 KiB
    CHUNK_BLOCKS = 4  # of a chunk, which has fewer where its codes would take more than CHUNK_BYTES
    CHUNK_BYTES = 1 << 22
    FEW_RESIDUALS = 16  # of uniformly random codes a row has 4 in a k-block
    DOT_ROWS = 2  # so few rows are multiplied faster by the dot product than w is packed

ctypedef fused Sum:
    int32_t
    int64_t


# A k-block of some rows of a as activations: first the rows, then the residuals of those that have more than
# a few.
cdef struct InnerBlock:
    Py_ssize_t rows, packed_rows
    Py_ssize_t residual_row[INNER_ROWS]  # 0 for a row without one of its own
    Py_ssize_t residuals[INNER_ROWS]  # how many -128 the others have, and where
    int16_t index[INNER_ROWS][FEW_RESIDUALS]
    uint8_t* packed


# a (m, k), w (n, k): sum r, c is out[r * row_stride + c * col_stride], an int64 if `wide`. The chunk in work
# begins at row `first` of a, and has `chunk_blocks` blocks of rows, each with k_blocks of `blocks`.
cdef struct InnerProduct:
    const Kernels* table
    const int8_t* a
    const int8_t* w
    void* out
    Py_ssize_t m, n, k, k_blocks, row_stride, col_stride, first, chunk_blocks
    bint wide
    InnerBlock* blocks
    float ones[2 * INNER_ROWS]


cdef inline Py_ssize_t k_block_len(const InnerProduct* p, Py_ssize_t i) noexcept nogil:
    return min(INNER_K, p.k - i * INNER_K)


# Units are the k-blocks of the chunk.
cdef bint pack_inner_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef InnerProduct* p = <InnerProduct*> context
    cdef Py_ssize_t unit, r, i
    for unit in range(first, end):
        r, i = p.first + unit // p.k_blocks * INNER_ROWS, unit % p.k_blocks
        p.blocks[unit].rows = min(INNER_ROWS, p.m - r)
        pack_inner_block(p, p.a + r * p.k + i * INNER_K, k_block_len(p, i), &p.blocks[unit])
    return True


cdef void pack_inner_block(const InnerProduct* p, const int8_t* a, Py_ssize_t n,
                           InnerBlock* block) noexcept nogil:
    cdef int8_t codes[INNER_K + 64]  # packing fills up the last steps
    cdef Py_ssize_t r, width = p.table.activation_bytes(n)
    block.packed_rows = block.rows
    for r in range(block.rows):
        block.residual_row[r] = 0
        memcpy(codes, a + r * p.k, n)
        block.residuals[r] = raise_least(codes, block.index[r], n)
        if block.residuals[r] > FEW_RESIDUALS:
            block.residuals[r], block.residual_row[r] = 0, block.packed_rows
            block.packed_rows += 1
        p.table.pack_activation_s8(codes, block.packed + r * width, 0, n, n)
        if block.residual_row[r]:
            take_residuals(a + r * p.k, codes, n)
            p.table.pack_activation_s8(codes, block.packed + block.residual_row[r] * width, 0, n, n)
    p.table.arrange_activations_s8(block.packed, block.packed_rows, n)


# -127 for each -128 in codes (n,); returns how many, and where the first few are.
cdef inline Py_ssize_t raise_least(int8_t* codes, int16_t* index, Py_ssize_t n) noexcept nogil:
    cdef int8_t* found = <int8_t*> memchr(codes, 0x80, n)
    cdef Py_ssize_t count = 0, i
    while found != NULL and count < FEW_RESIDUALS:
        i = found - codes
        found[0] = -127
        index[count] = <int16_t> i
        count += 1
        found = <int8_t*> memchr(codes + i, 0x80, n - i)
    if found == NULL:
        return count
    for i in range(n):
        codes[i] = max(<int8_t> -127, codes[i])
    return count + 1


cdef inline void take_residuals(const int8_t* a, int8_t* codes, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        codes[i] = -(a[i] == -128)


# Units are INNER_COLS rows of w.
cdef bint multiply_inner_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const InnerProduct* p = <const InnerProduct*> context
    cdef uint8_t panels[INNER_COLS * INNER_K + 64]
    cdef uint8_t* aligned = &panels[0] + (-<Py_ssize_t> panels & 63)
    cdef Py_ssize_t unit, i, b
    for unit in range(first, end):
        for i in range(p.k_blocks):
            pack_inner_panels(p, unit * INNER_COLS, i, aligned)
            for b in range(p.chunk_blocks):
                fetch_weights(p, unit * INNER_COLS, i, b)
                multiply_inner_block(p, aligned, b, i, unit * INNER_COLS)
    return True


# k-block i of the rows of w from c on.
cdef void pack_inner_panels(const InnerProduct* p, Py_ssize_t c, Py_ssize_t i,
                            uint8_t* panels) noexcept nogil:
    cdef Py_ssize_t n = k_block_len(p, i), end = min(p.n, c + INNER_COLS), rows
    while c < end:
        rows = min(p.table.panel_outputs, end - c)
        p.table.pack_panel_s8(p.w + c * p.k + i * INNER_K, p.k, rows, panels, n)
        panels += p.table.panel_bytes(n)
        c += p.table.panel_outputs


# Prefetches weights for the next call of pack_inner_panels: while block b is multiplied, its share of them.
cdef inline void fetch_weights(const InnerProduct* p, Py_ssize_t c, Py_ssize_t i,
                               Py_ssize_t b) noexcept nogil:
    cdef Py_ssize_t r, share = INNER_COLS // p.chunk_blocks
    i += 1
    if i == p.k_blocks:
        c, i = c + INNER_COLS, 0
    for r in range(c + b * share, min(p.n, c + (b + 1) * share)):
        dq_prefetch(p.w + r * p.k + i * INNER_K, k_block_len(p, i))


# k-block i of block b of the chunk times that of the packed rows of w from c on.
cdef void multiply_inner_block(const InnerProduct* p, const uint8_t* panels, Py_ssize_t b, Py_ssize_t i,
                               Py_ssize_t c) noexcept nogil:
    cdef float tile[2 * INNER_ROWS * INNER_COLS]
    cdef const InnerBlock* block = &p.blocks[b * p.k_blocks + i]
    cdef Py_ssize_t cols = min(INNER_COLS, p.n - c)
    cdef Py_ssize_t at = (p.first + b * INNER_ROWS) * p.row_stride + c * p.col_stride
    p.table.gemm_s8s8_f32(panels, p.ones, NULL, block.packed, p.ones, tile, INNER_COLS, block.packed_rows,
                          cols, k_block_len(p, i))
    add_residuals(block, p.w + c * p.k + i * INNER_K, p.k, tile, cols)
    if p.wide:
        add_tile(p, tile, <int64_t*> p.out + at, block.rows, cols, i == 0)
    else:
        add_tile(p, tile, <int32_t*> p.out + at, block.rows, cols, i == 0)


# tile += what the residuals give; w (cols, k) are the weights as they lie.
cdef void add_residuals(const InnerBlock* block, const int8_t* w, Py_ssize_t k, float* tile,
                        Py_ssize_t cols) noexcept nogil:
    cdef Py_ssize_t r, c, i
    cdef int32_t sum
    cdef float* residuals
    for r in range(block.rows):
        if block.residual_row[r]:
            residuals = tile + block.residual_row[r] * INNER_COLS
            for c in range(cols):
                tile[r * INNER_COLS + c] += residuals[c]
        elif block.residuals[r]:
            for c in range(cols):
                sum = 0
                for i in range(block.residuals[r]):
                    sum += w[c * k + block.index[r][i]]
                tile[r * INNER_COLS + c] -= <float> sum


# out = or, but for the first k-block, += the tile.
cdef void add_tile(const InnerProduct* p, const float* tile, Sum* out, Py_ssize_t rows, Py_ssize_t cols,
                   bint first) noexcept nogil:
    cdef Py_ssize_t i
    if p.col_stride == 1:
        for i in range(rows):
            add_line(tile + i * INNER_COLS, 1, out + i * p.row_stride, cols, first)
    else:
        for i in range(cols):
            add_line(tile + i, INNER_COLS, out + i * p.col_stride, rows, first)


cdef inline void add_line(const float* sums, Py_ssize_t stride, Sum* out, Py_ssize_t n,
                          bint first) noexcept nogil:
    cdef Py_ssize_t i
    if first:
        for i in range(n):
            out[i] = <int32_t> sums[i * stride]
    else:
        for i in range(n):
            out[i] += <int32_t> sums[i * stride]


# Units are rows of w, for at most DOT_ROWS rows of a.
cdef bint inner_dot_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const InnerProduct* p = <const InnerProduct*> context
    cdef Py_ssize_t r, c, i
    cdef int64_t sum
    for c in range(first, end):
        for r in range(p.m):
            sum = p.table.dot_s8s8_s64(p.w + c * p.k, p.a + r * p.k, p.k)
            i = r * p.row_stride + c * p.col_stride
            if p.wide:
                (<int64_t*> p.out)[i] = sum
            else:
                (<int32_t*> p.out)[i] = <int32_t> sum
    return True


# Everything of a product but its memory. The matrix with fewer rows is taken as activations are.
cdef InnerProduct inner_product(const int8_t* a, const int8_t* b, void* out, Py_ssize_t m, Py_ssize_t n,
                                Py_ssize_t k, bint wide) noexcept nogil:
    cdef InnerProduct p
    cdef Py_ssize_t i
    p.table, p.k, p.out, p.wide = packing_kernels(), k, out, wide
    p.a, p.w, p.m, p.n, p.row_stride, p.col_stride = a, b, m, n, n, 1
    if m > n:
        p.a, p.w, p.m, p.n, p.row_stride, p.col_stride = b, a, n, m, 1, n
    p.k_blocks, p.first, p.chunk_blocks, p.blocks = (k + INNER_K - 1) // INNER_K, 0, 0, NULL
    for i in range(2 * INNER_ROWS):
        p.ones[i] = 1
    return p


# Bytes of a block's activations.
cdef inline Py_ssize_t inner_block_bytes(const InnerProduct* p) noexcept nogil:
    return 2 * INNER_ROWS * p.table.activation_bytes(min(INNER_K, p.k))


# Blocks of rows of a chunk.
cdef inline Py_ssize_t inner_chunk(const InnerProduct* p) noexcept nogil:
    cdef Py_ssize_t chunk = min(max(1, CHUNK_BYTES // (inner_block_bytes(p) * p.k_blocks)), CHUNK_BLOCKS)
    return min(chunk, (p.m + INNER_ROWS - 1) // INNER_ROWS)


# Memory of a product, which begins at a line of the cache; 0 where it needs none.
cdef Py_ssize_t inner_bytes(const InnerProduct* p) noexcept nogil:
    if p.k == 0 or p.m <= DOT_ROWS:
        return 0
    return inner_chunk(p) * p.k_blocks * (inner_block_bytes(p) + <Py_ssize_t> sizeof(InnerBlock))


cdef void lay_out_inner(InnerProduct* p, uint8_t* memory) noexcept nogil:
    cdef Py_ssize_t units = inner_chunk(p) * p.k_blocks, width = inner_block_bytes(p), i
    p.blocks = <InnerBlock*> (memory + units * width)
    for i in range(units):
        p.blocks[i].packed = memory + i * width


# The rows of the chunk that begins at p.first.
cdef inline Py_ssize_t begin_chunk(InnerProduct* p) noexcept nogil:
    p.chunk_blocks = min(inner_chunk(p), (p.m - p.first + INNER_ROWS - 1) // INNER_ROWS)
    return min(p.m - p.first, p.chunk_blocks * INNER_ROWS)


cdef inline Py_ssize_t inner_units(const InnerProduct* p) noexcept nogil:
    return (p.n + INNER_COLS - 1) // INNER_COLS


# out (m, n) = the sums over k of a (m, k) times b (n, k), int8, as int64 if `wide`, else int32.
cdef void int8_inner_rows(const int8_t* a, const int8_t* b, void* out, Py_ssize_t m, Py_ssize_t n,
                          Py_ssize_t k, bint wide, uint8_t* scratch) noexcept nogil:
    cdef InnerProduct p = inner_product(a, b, out, m, n, k, wide)
    cdef Py_ssize_t rows
    if k == 0:
        memset(out, 0, m * n * (8 if wide else 4))
    elif p.m <= DOT_ROWS:
        inner_dot_range(&p, 0, p.n)
    else:
        lay_out_inner(&p, scratch)
        while p.first < p.m:
            rows = begin_chunk(&p)
            pack_inner_range(&p, 0, p.chunk_blocks * p.k_blocks)
            multiply_inner_range(&p, 0, inner_units(&p))
            p.first += rows


# Bytes of its scratch, which begins at a line of the cache.
cdef Py_ssize_t int8_inner_bytes(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k) noexcept nogil:
    cdef InnerProduct p = inner_product(NULL, NULL, NULL, m, n, k, False)
    return inner_bytes(&p)


def int8_inner(a not None, b not None, out not None, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, bint wide,
               int num_threads=1):
    """out (m, n) = the sums over k of a (m, k) times b (n, k), int8, as int64 if `wide`, else int32."""
    cdef RawBuffer x = RawBuffer(a, PyBUF_SIMPLE), y = RawBuffer(b, PyBUF_SIMPLE), sums = RawBuffer(out)
    cdef InnerProduct p
    check_size(x.view.len, m * k)
    check_size(y.view.len, n * k)
    check_size(sums.view.len, m * n * (8 if wide else 4))
    p = inner_product(<const int8_t*> x.view.buf, <const int8_t*> y.view.buf, sums.view.buf, m, n, k, wide)
    if k == 0:
        memset(p.out, 0, m * n * (8 if wide else 4))
    elif p.m <= DOT_ROWS:
        parallel_ranges(inner_dot_range, &p, p.n, p.m * p.n * k // 32, num_threads)
    else:
        multiply_inner(&p, num_threads)


# All memory is allocated before anything is written.
cdef int multiply_inner(InnerProduct* p, int num_threads) except -1:
    cdef Aligned memory = aligned_memory(inner_bytes(p))
    cdef Py_ssize_t rows
    try:
        lay_out_inner(p, memory.data)
        while p.first < p.m:
            rows = begin_chunk(p)
            parallel_ranges(pack_inner_range, p, p.chunk_blocks * p.k_blocks, rows * p.k // 4, num_threads)
            parallel_ranges(multiply_inner_range, p, inner_units(p),
                            rows * p.n * p.k // p.table.products_per_ns, num_threads)
            p.first += rows
    finally:
        PyMem_RawFree(memory.block)
    return 0
