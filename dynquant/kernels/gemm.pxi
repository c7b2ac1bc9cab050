# The exact integer product of int8 weights and int8 activations, on weights packed into panels.
#
# A panel holds the weights of PANEL = 2 * DQ_LANES outputs, in blocks of at most GEMM_BLOCK k. A block is the
# PANEL int32 that are to be taken off its sums, then for each DQ_DEPTH k the weights of all the outputs, in
# the order of simd.h. Outputs past the last and k past the last are zeros. A matrix product reads the panels
# one after the other, each from start to end: so does one with a single row, at the speed of memory.
# Activations lie row by row, each in activation_bytes(k).


cdef inline Py_ssize_t block_bytes(Py_ssize_t k) noexcept nogil:
    return PANEL * (<Py_ssize_t> sizeof(int32_t) + (k + DQ_DEPTH - 1) // DQ_DEPTH * DQ_DEPTH)


cdef Py_ssize_t panel_bytes(Py_ssize_t k) noexcept nogil:
    return k // GEMM_BLOCK * block_bytes(GEMM_BLOCK) + (block_bytes(k % GEMM_BLOCK) if k % GEMM_BLOCK else 0)


# An odd number of cache lines: rows a multiple of 4 KiB apart would fall into the same few places of the
# cache, and a tile reads DQ_ROWS of them side by side.
cdef Py_ssize_t activation_bytes(Py_ssize_t k) noexcept nogil:
    return (((k + DQ_DEPTH - 1) // DQ_DEPTH * 4 + 63) // 64 | 1) * 64


# Where in a row of activations k lies, k a multiple of DQ_DEPTH.
cdef Py_ssize_t activation_offset(Py_ssize_t k) noexcept nogil:
    return k * (4 // DQ_DEPTH)


cdef inline Py_ssize_t block_k(Py_ssize_t start, Py_ssize_t k) noexcept nogil:
    return k - start if k - start < GEMM_BLOCK else GEMM_BLOCK


# One block of pack_panel_s8, or with `back` of unpack_panel_s8: n of the k of `rows` rows of w.
# A run of steps is taken row by row, so that a line of w is read once while the run's part of the block
# stays in L1.
cdef inline void move_block(int8_t* w, Py_ssize_t k, Py_ssize_t rows, int8_t* block, Py_ssize_t n,
                            bint back) noexcept nogil:
    cdef int8_t* packed = block + PANEL * <Py_ssize_t> sizeof(int32_t)
    cdef Py_ssize_t r, i, run = 0, end, whole = n // DQ_DEPTH, last = n % DQ_DEPTH
    while run < whole:
        end = run + 16 if run + 16 < whole else whole
        for r in range(rows):
            for i in range(run, end):
                move_bytes(w + r * k + i * DQ_DEPTH, packed + (i * PANEL + r) * DQ_DEPTH, DQ_DEPTH, back)
        run = end
    for r in range(rows):
        move_bytes(w + r * k + whole * DQ_DEPTH, packed + (whole * PANEL + r) * DQ_DEPTH, last, back)


cdef inline void move_bytes(int8_t* w, int8_t* packed, Py_ssize_t n, bint back) noexcept nogil:
    if back:
        memcpy(w, packed, n)
    else:
        memcpy(packed, w, n)


# w (rows, k) in [-128, 127], rows <= PANEL -> panel, panel_bytes(k).
cdef void pack_panel_s8(const int8_t* w, Py_ssize_t rows, int8_t* panel, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t r, i, n, start = 0
    cdef int32_t sum
    memset(panel, 0, panel_bytes(k))
    while start < k:
        n = block_k(start, k)
        move_block(<int8_t*> w + start, k, rows, panel, n, False)
        for r in range(rows):
            sum = 0
            for i in range(n):
                sum += w[r * k + start + i]
            (<int32_t*> panel)[r] = DQ_ACT_OFFSET * sum
        panel += block_bytes(n)
        start += n


# panel -> w (rows, k): the inverse of pack_panel_s8.
cdef void unpack_panel_s8(const int8_t* panel, int8_t* w, Py_ssize_t rows, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t n, start = 0
    while start < k:
        n = block_k(start, k)
        move_block(w + start, k, rows, <int8_t*> panel, n, True)
        panel += block_bytes(n)
        start += n


# codes (n,) in [-127, 127] -> a, the form that simd.h takes; an end that is no whole step is filled up.
cdef void pack_activation_s8(const int8_t* codes, uint8_t* a, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int16_t* wide = <int16_t*> a
    if DQ_DEPTH == 4:
        for i in range(n):
            a[i] = <uint8_t> (codes[i] + DQ_ACT_OFFSET)
        memset(a + n, 0, -n & 3)
    else:
        for i in range(n):
            wide[i] = codes[i]
        memset(wide + n, 0, 2 * (n & 1))


# sums (PANEL,) = one block of a panel times one row of activations. No int32 wraps: a sum is at most
# 2**16 * 128 * 255 = 2,139,095,040 < 2**31 before the excess comes off.
cdef inline void tile_1(const int8_t* block, const uint8_t* a, int32_t* sums,
                        Py_ssize_t steps) noexcept nogil:
    cdef dq_sums s0 = dq_sums_zero(), s1 = s0
    cdef dq_spread_act k
    cdef Py_ssize_t i
    block += PANEL * <Py_ssize_t> sizeof(int32_t)
    for i in range(steps):
        k = dq_spread(a + 4 * i)
        s0 = dq_sums_step(s0, dq_weights_load(block), k)
        s1 = dq_sums_step(s1, dq_weights_load(block + DQ_LANES * DQ_DEPTH), k)
        block += PANEL * DQ_DEPTH
    dq_sums_store(sums, s0)
    dq_sums_store(sums + DQ_LANES, s1)


# sums (4, PANEL) = the same for four rows, which share the loads of the weights. Eight accumulators hide the
# latency of the multiply-adds, and fit the registers of every instruction set. They have names because in
# an array, indexed by an unrolled loop, gcc writes them back to memory at every step.
cdef inline void tile_4(const int8_t* block, const uint8_t* a0, const uint8_t* a1, const uint8_t* a2,
                        const uint8_t* a3, int32_t* sums, Py_ssize_t steps) noexcept nogil:
    cdef dq_sums s00 = dq_sums_zero(), s01 = s00, s10 = s00, s11 = s00, s20 = s00, s21 = s00, s30 = s00
    cdef dq_sums s31 = s00
    cdef dq_weights w0, w1
    cdef dq_spread_act k
    cdef Py_ssize_t i
    block += PANEL * <Py_ssize_t> sizeof(int32_t)
    for i in range(steps):
        w0 = dq_weights_load(block)
        w1 = dq_weights_load(block + DQ_LANES * DQ_DEPTH)
        k = dq_spread(a0 + 4 * i)
        s00 = dq_sums_step(s00, w0, k)
        s01 = dq_sums_step(s01, w1, k)
        k = dq_spread(a1 + 4 * i)
        s10 = dq_sums_step(s10, w0, k)
        s11 = dq_sums_step(s11, w1, k)
        k = dq_spread(a2 + 4 * i)
        s20 = dq_sums_step(s20, w0, k)
        s21 = dq_sums_step(s21, w1, k)
        k = dq_spread(a3 + 4 * i)
        s30 = dq_sums_step(s30, w0, k)
        s31 = dq_sums_step(s31, w1, k)
        block += PANEL * DQ_DEPTH
    dq_sums_store(sums, s00)
    dq_sums_store(sums + DQ_LANES, s01)
    dq_sums_store(sums + 2 * DQ_LANES, s10)
    dq_sums_store(sums + 3 * DQ_LANES, s11)
    dq_sums_store(sums + 4 * DQ_LANES, s20)
    dq_sums_store(sums + 5 * DQ_LANES, s21)
    dq_sums_store(sums + 6 * DQ_LANES, s30)
    dq_sums_store(sums + 7 * DQ_LANES, s31)


# sums (rows, PANEL) for rows <= 4 rows of a, `stride` bytes apart; two and three rows take the tile of four,
# with the last row repeated.
cdef inline void tile(const int8_t* block, const uint8_t* a, Py_ssize_t stride, Py_ssize_t rows,
                      int32_t* sums, Py_ssize_t steps) noexcept nogil:
    if rows == 1:
        tile_1(block, a, sums, steps)
    else:
        tile_4(block, a, a + stride, a + (rows - 1 if rows < 3 else 2) * stride, a + (rows - 1) * stride,
               sums, steps)


# out[c] = float32(sum[c]) * w_scales[c] * a_scale + bias[c], in that order; no bias where it is NULL.
cdef inline void finish_row(const int64_t* sums, const float* w_scales, float a_scale, const float* bias,
                            float* out, Py_ssize_t cols) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(cols):
        out[c] = <float> sums[c] * w_scales[c] * a_scale
    if bias != NULL:
        for c in range(cols):
            out[c] += bias[c]


# finish_row for sums that fit int32 with `excess` taken off, which is nearly always; it vectorises.
cdef inline void finish_row_s32(const int32_t* sums, const int32_t* excess, const float* w_scales,
                                float a_scale, const float* bias, float* out, Py_ssize_t cols) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(cols):
        out[c] = <float> (sums[c] - excess[c]) * w_scales[c] * a_scale
    if bias != NULL:
        for c in range(cols):
            out[c] += bias[c]


# One panel times m rows of activations: out[r][c] = float32(exact sum) * w_scales[c] * a_scales[r] + bias[c]
# for c < cols <= PANEL, rows of out `out_stride` apart. Blocks of k are summed in int32, added up in int64.
cdef void gemm_panel_s8s8_f32(const int8_t* panel, const float* w_scales, const float* bias,
                              const uint8_t* a, const float* a_scales, float* out, Py_ssize_t out_stride,
                              Py_ssize_t m, Py_ssize_t cols, Py_ssize_t k) noexcept nogil:
    cdef int32_t sums[ROWS * PANEL]
    cdef int64_t totals[ROWS * PANEL]
    cdef const int8_t* block
    cdef Py_ssize_t stride = activation_bytes(k), start, n, i, r, rows
    while m > 0:
        rows = m if m < ROWS else ROWS
        if k <= GEMM_BLOCK:
            tile(panel, a, stride, rows, sums, (k + DQ_DEPTH - 1) // DQ_DEPTH)
            for r in range(rows):
                finish_row_s32(sums + r * PANEL, <const int32_t*> panel, w_scales, a_scales[r], bias,
                               out + r * out_stride, cols)
        else:
            memset(totals, 0, sizeof(totals))
            block, start = panel, 0
            while start < k:
                n = block_k(start, k)
                tile(block, a + activation_offset(start), stride, rows, sums, (n + DQ_DEPTH - 1) // DQ_DEPTH)
                for i in range(rows * PANEL):
                    totals[i] += sums[i] - (<const int32_t*> block)[i % PANEL]
                block += block_bytes(n)
                start += n
            for r in range(rows):
                finish_row(totals + r * PANEL, w_scales, a_scales[r], bias, out + r * out_stride, cols)
        a += rows * stride
        a_scales += rows
        out += rows * out_stride
        m -= rows
