# The exact integer product of int8 weights and int8 activations, on weights packed into panels.
#
# A panel holds the weights of PANEL = 2 * DQ_LANES outputs, as bytes without a sign, in blocks of at most
# GEMM_BLOCK k: for each DQ_DEPTH k the weights of all the outputs, in the order of simd.h. A matrix
# product reads the panels one after the other, each from start to end: so does one with a single row, at the
# speed of memory.
#
# Activations lie row by row, each in activation_bytes(k), in blocks as the weights: a CodedBlock, four bytes
# for each DQ_DEPTH k, and where DQ_TRIMMED is 1 the rests, each in a step of its own: trim.pxi says why.
cdef enum:
    GEMM_BLOCK = 1 << 16
    PANEL = 2 * DQ_LANES
    ROWS = 4
    TILE = DQ_TILE_ROWS // 2


# As long as a cache line, so that codes begin at one.
cdef struct CodedBlock:
    int32_t excess  # to be taken off each sum
    int32_t rests
    int32_t unused[14]


# Four bytes of activations that are to be multiplied with the weights of one step once more.
cdef struct Rest:
    int32_t step
    int8_t codes[4]


# A multiple of DQ_STEPS, an even number: tile_1 takes two at a time.
cdef inline Py_ssize_t steps_of(Py_ssize_t k) noexcept nogil:
    return (k + DQ_STEPS * DQ_DEPTH - 1) // (DQ_STEPS * DQ_DEPTH) * DQ_STEPS


cdef Py_ssize_t panel_bytes(Py_ssize_t k) noexcept nogil:
    return PANEL * DQ_DEPTH * steps_of(k)


# Bytes of one block of a row of activations.
cdef inline Py_ssize_t coded_bytes(Py_ssize_t k) noexcept nogil:
    return (<Py_ssize_t> sizeof(CodedBlock)
            + steps_of(k) * (4 + (<Py_ssize_t> sizeof(Rest) if DQ_TRIMMED else 0)))


# An odd number of cache lines: rows a multiple of 4 KiB apart would fall into the same few places of the
# cache, and a tile reads ROWS of them side by side.
cdef Py_ssize_t activation_bytes(Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t n = k // GEMM_BLOCK * coded_bytes(GEMM_BLOCK)
    if k % GEMM_BLOCK:
        n += coded_bytes(k % GEMM_BLOCK)
    return ((n + 63) // 64 | 1) * 64


cdef inline Py_ssize_t block_k(Py_ssize_t start, Py_ssize_t k) noexcept nogil:
    return k - start if k - start < GEMM_BLOCK else GEMM_BLOCK


# A panel from w (rows, k), or with `back` the other way round: its whole steps, and then the last.
# A run of steps is taken row by row, so that a line of w is read once while the run's part of the panel
# stays in L1.
cdef inline void move_panel(int8_t* w, Py_ssize_t k, Py_ssize_t rows, uint8_t* panel,
                            bint back) noexcept nogil:
    cdef Py_ssize_t r, i, run = 0, end, whole = k // DQ_DEPTH, last = k % DQ_DEPTH
    while run < whole:
        end = run + 16 if run + 16 < whole else whole
        for r in range(rows):
            for i in range(run, end):
                move_bytes(w + r * k + i * DQ_DEPTH, panel + (i * PANEL + r) * DQ_DEPTH, DQ_DEPTH, back)
        run = end
    for r in range(rows):
        move_bytes(w + r * k + whole * DQ_DEPTH, panel + (whole * PANEL + r) * DQ_DEPTH, last, back)


cdef inline void move_bytes(int8_t* w, uint8_t* packed, Py_ssize_t n, bint back) noexcept nogil:
    if back:
        memcpy(w, packed, n)
    else:
        memcpy(packed, w, n)


# w (rows, k) in [-128, 127], rows <= PANEL -> panel, panel_bytes(k). What is past the last output or k is 0.
cdef void pack_panel_s8(const int8_t* w, Py_ssize_t rows, uint8_t* panel, Py_ssize_t k) noexcept nogil:
    memset(panel, 0, panel_bytes(k))
    move_panel(<int8_t*> w, k, rows, panel, False)
    raise_weights(panel, panel_bytes(k))


# panel -> w (rows, k): the inverse of pack_panel_s8.
cdef void unpack_panel_s8(const uint8_t* panel, int8_t* w, Py_ssize_t rows, Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t r
    move_panel(w, k, rows, <uint8_t*> panel, True)
    for r in range(rows):
        raise_weights(<uint8_t*> w + r * k, k)


cdef inline uint8_t* codes_of(CodedBlock* block) noexcept nogil:
    return <uint8_t*> (block + 1)


# Trims the pairs in `beyond` of DQ_ACTIVATIONS_STEP codes, the first of which is at `start` of a block of k.
# The block takes the rests.
cdef inline void trim_block(int8_t* codes, uint32_t beyond, CodedBlock* block, Py_ssize_t start,
                            Py_ssize_t k) noexcept nogil:
    cdef Rest* rests = <Rest*> (codes_of(block) + 4 * steps_of(k))
    cdef Py_ssize_t j = 0
    while beyond:
        if beyond & 3:
            rests[block.rests].step = <int32_t> ((start + j) // 4)
            memset(rests[block.rests].codes, 0, 4)
            trim_pair(codes + j, rests[block.rests].codes)
            trim_pair(codes + j + 2, rests[block.rests].codes + 2)
            block.rests += 1
        j += 4
        beyond >>= 2


# codes (n,) in [-127, 127], at `start` of a row of k -> their part of the row a. Parts come one after the
# other; each but the last is a multiple of DQ_ACTIVATIONS_STEP long, and none goes beyond a block. The codes
# are used up: changed, trimmed, and filled up with zeros to a multiple of DQ_ACTIVATIONS_STEP.
cdef void pack_activation_s8(int8_t* codes, uint8_t* a, Py_ssize_t start, Py_ssize_t n,
                             Py_ssize_t k) noexcept nogil:
    cdef CodedBlock* block = <CodedBlock*> (a + start // GEMM_BLOCK * coded_bytes(GEMM_BLOCK))
    cdef Py_ssize_t at = start % GEMM_BLOCK, i = 0
    cdef int16_t* wide = <int16_t*> codes_of(block) + at
    cdef int32_t excess = 0
    cdef uint32_t beyond
    if at == 0:
        block.excess = block.rests = 0
    memset(codes + n, 0, -n & (DQ_ACTIVATIONS_STEP - 1))
    while i < n:
        beyond = dq_activations_step(codes + i, &excess)
        if DQ_TRIMMED and beyond:
            trim_block(codes + i, beyond, block, at + i, block_k(start - at, k))
        i += DQ_ACTIVATIONS_STEP
    block.excess += excess
    if DQ_DEPTH == 4:
        memcpy(codes_of(block) + at, codes, n)
        memset(codes_of(block) + at + n, 0, 4 * steps_of(at + n) - at - n)
    else:
        for i in range(DQ_DEPTH * steps_of(n)):
            wide[i] = codes[i]


# sums (PANEL,) = one block of a panel times one row of activations. No int32 wraps: a sum is at most
# 2**16 * 127 * 255 = 2,122,383,360 < 2**31 in magnitude before the excess comes off.
cdef inline void tile_1(const uint8_t* block, const uint8_t* a, int32_t* sums,
                        Py_ssize_t steps) noexcept nogil:
    cdef dq_sums s0 = dq_sums_zero(), s1 = s0
    cdef dq_spread_act k, next
    cdef Py_ssize_t i
    for i in range(0, steps, 2):
        k, next = dq_spread(a + 4 * i), dq_spread(a + 4 * i + 4)
        s0 = dq_sums_step(s0, dq_weights_load(block), k)
        s1 = dq_sums_step(s1, dq_weights_load(block + DQ_LANES * DQ_DEPTH), k)
        block += PANEL * DQ_DEPTH
        s0 = dq_sums_step(s0, dq_weights_load(block), next)
        s1 = dq_sums_step(s1, dq_weights_load(block + DQ_LANES * DQ_DEPTH), next)
        block += PANEL * DQ_DEPTH
    dq_sums_store(sums, s0)
    dq_sums_store(sums + DQ_LANES, s1)


# sums (4, PANEL) = the same for one row and four panels, `apart` bytes from each other: DQ_STREAMS.
cdef inline void tile_of_panels(const uint8_t* block, Py_ssize_t apart, const uint8_t* a, int32_t* sums,
                                Py_ssize_t steps) noexcept nogil:
    cdef dq_sums s00 = dq_sums_zero(), s01 = s00, s10 = s00, s11 = s00, s20 = s00, s21 = s00, s30 = s00
    cdef dq_sums s31 = s00
    cdef const uint8_t* b1 = block + apart
    cdef const uint8_t* b2 = b1 + apart
    cdef const uint8_t* b3 = b2 + apart
    cdef dq_spread_act k
    cdef Py_ssize_t i, at
    for i in range(steps):
        k = dq_spread(a + 4 * i)
        at = i * (PANEL * DQ_DEPTH)
        s00 = dq_sums_step(s00, dq_weights_load(block + at), k)
        s01 = dq_sums_step(s01, dq_weights_load(block + at + DQ_LANES * DQ_DEPTH), k)
        s10 = dq_sums_step(s10, dq_weights_load(b1 + at), k)
        s11 = dq_sums_step(s11, dq_weights_load(b1 + at + DQ_LANES * DQ_DEPTH), k)
        s20 = dq_sums_step(s20, dq_weights_load(b2 + at), k)
        s21 = dq_sums_step(s21, dq_weights_load(b2 + at + DQ_LANES * DQ_DEPTH), k)
        s30 = dq_sums_step(s30, dq_weights_load(b3 + at), k)
        s31 = dq_sums_step(s31, dq_weights_load(b3 + at + DQ_LANES * DQ_DEPTH), k)
    store_tile(sums, s00, s01, s10, s11, s20, s21, s30, s31)


cdef inline void store_tile(int32_t* sums, dq_sums s00, dq_sums s01, dq_sums s10, dq_sums s11, dq_sums s20,
                            dq_sums s21, dq_sums s30, dq_sums s31) noexcept nogil:
    dq_sums_store(sums, s00)
    dq_sums_store(sums + DQ_LANES, s01)
    dq_sums_store(sums + 2 * DQ_LANES, s10)
    dq_sums_store(sums + 3 * DQ_LANES, s11)
    dq_sums_store(sums + 4 * DQ_LANES, s20)
    dq_sums_store(sums + 5 * DQ_LANES, s21)
    dq_sums_store(sums + 6 * DQ_LANES, s30)
    dq_sums_store(sums + 7 * DQ_LANES, s31)


# sums (4, PANEL) = the same for four rows and one panel. They share the loads of the weights, and have the
# next panel fetched meanwhile: with weights in the last cache or in memory that is worth a fifth. All lines
# of it, or the hardware's prefetcher loses its way. Products with one row gain nothing by it.
# Eight accumulators hide the latency of the multiply-adds, and fit the registers of every instruction set.
# They have names because in an array, indexed by an unrolled loop, gcc writes them back to memory at every
# step.
cdef inline void tile_4(const uint8_t* block, const uint8_t* a0, const uint8_t* a1, const uint8_t* a2,
                        const uint8_t* a3, int32_t* sums, Py_ssize_t steps) noexcept nogil:
    cdef dq_sums s00 = dq_sums_zero(), s01 = s00, s10 = s00, s11 = s00, s20 = s00, s21 = s00, s30 = s00
    cdef dq_sums s31 = s00
    cdef dq_weights w0, w1
    cdef dq_spread_act k
    cdef Py_ssize_t i
    for i in range(steps):
        dq_prefetch(block + steps * (PANEL * DQ_DEPTH), PANEL * DQ_DEPTH)
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
    store_tile(sums, s00, s01, s10, s11, s20, s21, s30, s31)


# Adds the rests of one row to its sums (PANEL,).
cdef inline void add_rests(const uint8_t* block, const CodedBlock* a, int32_t* sums,
                           Py_ssize_t steps) noexcept nogil:
    cdef const Rest* rests = <const Rest*> (codes_of(<CodedBlock*> a) + 4 * steps)
    cdef dq_sums s0 = dq_sums_load(sums), s1 = dq_sums_load(sums + DQ_LANES)
    cdef const uint8_t* w
    cdef dq_spread_act k
    cdef Py_ssize_t i
    for i in range(a.rests):
        w = block + rests[i].step * (PANEL * DQ_DEPTH)
        k = dq_spread(<const uint8_t*> rests[i].codes)
        s0 = dq_sums_step(s0, dq_weights_load(w), k)
        s1 = dq_sums_step(s1, dq_weights_load(w + DQ_LANES * DQ_DEPTH), k)
    dq_sums_store(sums, s0)
    dq_sums_store(sums + DQ_LANES, s1)


# sums (rows, PANEL) for one panel and rows <= DQ_TILE_ROWS rows of a, `stride` bytes apart; or for one row
# (panels, PANEL), panels being 1 or DQ_STREAMS, `apart` bytes apart. Two and three rows take the tile of
# four, with the last row repeated.
cdef inline void tile(const uint8_t* block, Py_ssize_t apart, Py_ssize_t panels, const uint8_t* a,
                      Py_ssize_t stride, Py_ssize_t rows, int32_t* sums, Py_ssize_t steps) noexcept nogil:
    cdef const uint8_t* codes = codes_of(<CodedBlock*> a)
    cdef Py_ssize_t r, p
    if panels > 1:
        tile_of_panels(block, apart, codes, sums, steps)
    elif rows == 1:
        tile_1(block, codes, sums, steps)
    elif rows >= DQ_TILES_FROM:
        dq_tiles(block, codes, stride, rows, sums, steps, DQ_STEPS, False)
    else:
        tile_4(block, codes, codes + stride, codes + (rows - 1 if rows < 3 else 2) * stride,
               codes + (rows - 1) * stride, sums, steps)
    if DQ_TRIMMED:
        for r in range(rows):
            for p in range(panels):
                add_rests(block + p * apart, <const CodedBlock*> (a + r * stride), sums + (r + p) * PANEL,
                          steps)


# out[c] = float32(sum[c]) * w_scales[c] * a_scale + bias[c], in that order; no bias where it is NULL.
cdef inline void finish_row(const int64_t* sums, const float* w_scales, float a_scale, const float* bias,
                            float* out, Py_ssize_t cols) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(cols):
        out[c] = <float> sums[c] * w_scales[c] * a_scale
    if bias != NULL:
        for c in range(cols):
            out[c] += bias[c]


# finish_row for sums that fit int32 with the excess taken off, which is nearly always; cols <= ROWS * PANEL.
# It vectorises: values, which overlap nothing, need no look at where out lies.
cdef inline void finish_row_s32(const int32_t* sums, int32_t excess, const float* w_scales, float a_scale,
                                const float* bias, float* out, Py_ssize_t cols) noexcept nogil:
    cdef float values[ROWS * PANEL]
    cdef Py_ssize_t c
    for c in range(cols):
        values[c] = <float> (sums[c] - excess) * w_scales[c] * a_scale
    if bias != NULL:
        for c in range(cols):
            values[c] += bias[c]
    memcpy(out, values, cols * sizeof(float))


# totals (panels or rows, PANEL) = tile over all blocks of k, each summed in int32 and added up in int64.
cdef inline void tile_of_blocks(const uint8_t* panel, Py_ssize_t panels, const uint8_t* a, Py_ssize_t stride,
                                Py_ssize_t rows, int64_t* totals, Py_ssize_t k) noexcept nogil:
    cdef int32_t sums[DQ_TILE_ROWS * PANEL]
    cdef Py_ssize_t start = 0, n, i, r
    cdef int32_t excess
    memset(totals, 0, DQ_TILE_ROWS * PANEL * sizeof(int64_t))
    while start < k:
        n = block_k(start, k)
        tile(panel + start * PANEL, panel_bytes(k), panels, a, stride, rows, sums, steps_of(n))
        for r in range(rows):
            excess = (<const CodedBlock*> (a + r * stride)).excess
            for i in range(r * PANEL, (r + panels) * PANEL):
                totals[i] += sums[i] - excess
        a += coded_bytes(n)
        start += n


# How many of m rows are taken together when so many are done: more than are left where those are too few for
# the tiles of the product, which are TILE rows high; some rows are then computed again.
cdef inline Py_ssize_t rows_of_tile(Py_ssize_t done, Py_ssize_t m) noexcept nogil:
    cdef Py_ssize_t left = m - done
    if DQ_TILES_FROM <= left < TILE <= m:
        return TILE
    return left if left < DQ_TILE_ROWS else DQ_TILE_ROWS


# Panels times m rows of activations: out[r][c] = float32(exact sum) * w_scales[c] * a_scales[r] + bias[c]
# for c < cols, rows of out `out_stride` apart. There is one panel, and cols <= PANEL; or one row and
# DQ_STREAMS panels.
cdef inline void gemm_panels(const uint8_t* panel, Py_ssize_t panels, const float* w_scales,
                             const float* bias, const uint8_t* a, const float* a_scales, float* out,
                             Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t cols,
                             Py_ssize_t k) noexcept nogil:
    cdef int32_t sums[DQ_TILE_ROWS * PANEL]
    cdef int64_t totals[DQ_TILE_ROWS * PANEL]
    cdef Py_ssize_t stride = activation_bytes(k), done = 0, r, rows
    cdef const uint8_t* row
    cdef const float* row_scales
    cdef float* row_out
    cdef int32_t excess
    while done < m:
        rows = rows_of_tile(done, m)
        if done + rows > m:
            done = m - rows
        row, row_scales, row_out = a + done * stride, a_scales + done, out + done * out_stride
        if k <= GEMM_BLOCK:
            tile(panel, panel_bytes(k), panels, row, stride, rows, sums, steps_of(k))
            for r in range(rows):
                excess = (<const CodedBlock*> (row + r * stride)).excess
                if cols == PANEL:  # as a constant it takes half the time
                    finish_row_s32(sums + r * PANEL, excess, w_scales, row_scales[r], bias,
                                   row_out + r * out_stride, PANEL)
                else:
                    finish_row_s32(sums + r * PANEL, excess, w_scales, row_scales[r], bias,
                                   row_out + r * out_stride, cols)
        else:
            tile_of_blocks(panel, panels, row, stride, rows, totals, k)
            for r in range(rows):
                finish_row(totals + r * PANEL, w_scales, row_scales[r], bias, row_out + r * out_stride, cols)
        done += rows


# The panels of n outputs times m rows of activations: out (m, n), rows `out_stride` apart, + bias (n,) unless
# that is NULL.
cdef void gemm_s8s8_f32(const uint8_t* panels, const float* w_scales, const float* bias, const uint8_t* a,
                        const float* a_scales, float* out, Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t n,
                        Py_ssize_t k) noexcept nogil:
    cdef Py_ssize_t count, cols
    if m >= DQ_TILES_FROM:
        dq_tiles_begin(m if m < TILE else TILE, DQ_STEPS)
    while n > 0:
        count = DQ_STREAMS if m == 1 and n > (DQ_STREAMS - 1) * PANEL else 1
        cols = n if n < count * PANEL else count * PANEL
        gemm_panels(panels, count, w_scales, bias, a, a_scales, out, out_stride, m, cols, k)
        panels += count * panel_bytes(k)
        w_scales += cols
        if bias != NULL:
            bias += cols
        out += cols
        n -= cols
    if m >= DQ_TILES_FROM:
        dq_tiles_end()
