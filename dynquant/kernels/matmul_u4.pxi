# The exact integer product of 4-bit weights, with a scale and an offset for each group of k, and int8
# activations. An offset is a zero point, a byte, for the value (code - zero_point) * scale; or, with
# `minimums`, a float, for the value code * scale + minimum. Kernels take either as bytes.
#
# A panel holds the codes 0..15 of PANEL = 2 * DQ_LANES outputs, k-block after k-block. A k-block is
# DQ_K_BLOCK = 8 k: four bytes for each output, the even k in the low nibbles. Each group starts a k-block.
# Padding outputs and the padding at the end of a group are zero. Scales and offsets lie outside the panel,
# those of PANEL outputs next to each other for each group. So a product with a single row reads three
# streams, each from start to end, at the speed of memory; with scales at the end of each panel it took half
# as long again, because the prefetcher had to find each of them anew.
#
# Activations lie row by row, each in group_activation_bytes: the codes in the same k-blocks, the four even k
# first; then their float32 sums, one for each chunk of at most EXACT_K k of a group. An offset then costs
# one product with such a sum for each group.
cdef enum:
    EXACT_K = 1 << 13
    BATCH = 2
    TILE_K_BLOCKS = 32
    BATCH_ROWS = 4 * DQ_TILE_ROWS
    GROUP_ROWS = BATCH_ROWS + DQ_KEPT_ROWS
    GROUP_STEPS = DQ_K_BLOCK // DQ_PANEL_DEPTH  # k-steps of dq_tiles in a k-block


# k-blocks of n k.
cdef inline Py_ssize_t k_blocks_of(Py_ssize_t n) noexcept nogil:
    return (n + DQ_K_BLOCK - 1) // DQ_K_BLOCK


# Elements of the group that starts at k = start.
cdef inline Py_ssize_t group_len(Py_ssize_t start, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return group if group < k - start else k - start


# k-blocks of a whole row, with each group padded.
cdef inline Py_ssize_t k_blocks_of_row(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return k // group * k_blocks_of(group) + k_blocks_of(k % group)


# Chunks of at most EXACT_K k in a group of n.
cdef inline Py_ssize_t blocks_of(Py_ssize_t n) noexcept nogil:
    return (n + EXACT_K - 1) // EXACT_K


# Elements of chunk b of a group of n.
cdef inline Py_ssize_t exact_len(Py_ssize_t b, Py_ssize_t n) noexcept nogil:
    return EXACT_K if n - b * EXACT_K > EXACT_K else n - b * EXACT_K


cdef Py_ssize_t group_panel_bytes(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return 4 * PANEL * k_blocks_of_row(k, group)


# An odd number of cache lines, as activation_bytes.
cdef Py_ssize_t group_activation_bytes(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t n = DQ_K_BLOCK * k_blocks_of_row(k, group)
    n += groups_of(k, group) * blocks_of(group) * <Py_ssize_t> sizeof(float)
    return ((n + 63) // 64 | 1) * 64


# Nibble i.
cdef inline uint8_t nibble(const uint8_t* packed, Py_ssize_t i) noexcept nogil:
    return packed[i // 2] >> (4 * (i & 1)) & 0x0F


# n k of one output, from a row of nibbles at k = start, to k-blocks of their own; flip is XORed to every
# byte.
cdef inline void pack_group(const uint8_t* w, Py_ssize_t start, Py_ssize_t n, uint8_t flip,
                            uint8_t* k_block) noexcept nogil:
    cdef Py_ssize_t u, j
    cdef uint32_t four
    cdef uint8_t code
    if start % 2 == 0:
        for u in range(n // DQ_K_BLOCK):
            memcpy(&four, w + start // 2 + 4 * u, 4)
            four ^= flip * <uint32_t> 0x01010101
            memcpy(k_block + 4 * PANEL * u, &four, 4)
        j = n // DQ_K_BLOCK * DQ_K_BLOCK
    else:
        j = 0
    while j < n:
        code = nibble(w, start + j) ^ (flip & 0x0F)
        k_block[4 * PANEL * (j // DQ_K_BLOCK) + j % DQ_K_BLOCK // 2] |= <uint8_t> (code << (4 * (j & 1)))
        j += 1


# Bytes of the offsets of a group of a panel.
cdef inline Py_ssize_t offsets_bytes(bint minimums) noexcept nogil:
    return PANEL * (<Py_ssize_t> sizeof(float) if minimums else 1)


# w (rows, ceil(k / 2)) packed codes, rows <= PANEL, scales and offsets (rows, groups) -> panel,
# group_panel_bytes, panel_scales and panel_offsets (groups, PANEL). Where offsets is NULL the codes are
# symmetric, in two's complement: 8 is added, which makes 8 their zero point.
cdef void pack_panel_u4(const uint8_t* w, const float* scales, const uint8_t* offsets, bint minimums,
                        Py_ssize_t rows, uint8_t* panel, float* panel_scales, uint8_t* panel_offsets,
                        Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t groups = groups_of(k, group), width = offsets_bytes(minimums), r, g, start = 0, n
    # Where no group ends inside a k-block, the row is one sequence of k-blocks. It is moved in parts, so that
    # the lines of the panel which they touch stay in L1.
    cdef Py_ssize_t span = group if group % DQ_K_BLOCK else 64 * DQ_K_BLOCK
    memset(panel, 0, group_panel_bytes(k, group))
    memset(panel_scales, 0, groups * PANEL * sizeof(float))
    memset(panel_offsets, 0, groups * width)
    while start < k:
        n = group_len(start, k, span)
        for r in range(rows):
            pack_group(w + r * ((k + 1) // 2), start, n, 0 if offsets != NULL else 0x88,
                       panel + 4 * (start // span * k_blocks_of(span) * PANEL + r))
        start += n
    for g in range(groups):
        for r in range(rows):
            panel_scales[g * PANEL + r] = scales[r * groups + g]
            if offsets == NULL:
                panel_offsets[g * PANEL + r] = 8
            else:
                move_offset(panel_offsets, g * PANEL + r, offsets, r * groups + g, minimums)


# Offset `to` of x becomes offset `source` of y.
cdef inline void move_offset(uint8_t* x, Py_ssize_t to, const uint8_t* y, Py_ssize_t source,
                             bint minimums) noexcept nogil:
    if minimums:
        memcpy(x + 4 * to, y + 4 * source, 4)
    else:
        x[to] = y[source]


# The inverse of pack_panel_u4.
cdef void unpack_panel_u4(const uint8_t* panel, const float* panel_scales, const uint8_t* panel_offsets,
                          bint minimums, uint8_t* w, float* scales, uint8_t* offsets, Py_ssize_t rows,
                          Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t groups = groups_of(k, group), bytes = (k + 1) // 2, r, g, i, n
    cdef const uint8_t* k_block
    cdef uint8_t code
    memset(w, 0, rows * bytes)
    for r in range(rows):
        for g in range(groups):
            k_block = panel + 4 * (g * k_blocks_of(group) * PANEL + r)
            n = group_len(g * group, k, group)
            for i in range(n):
                code = nibble(k_block + 4 * PANEL * (i // DQ_K_BLOCK), i % DQ_K_BLOCK)
                code ^= 8 if offsets == NULL else 0
                w[r * bytes + (g * group + i) // 2] |= <uint8_t> (code << (4 * ((g * group + i) & 1)))
            scales[r * groups + g] = panel_scales[g * PANEL + r]
            if offsets != NULL:
                move_offset(offsets, r * groups + g, panel_offsets, g * PANEL + r, minimums)


# codes (k,) in [-127, 127] -> a, group_activation_bytes.
cdef void pack_group_activation_s8(const int8_t* codes, uint8_t* a, Py_ssize_t k,
                                   Py_ssize_t group) noexcept nogil:
    cdef float* sums = <float*> (a + DQ_K_BLOCK * k_blocks_of_row(k, group))
    cdef Py_ssize_t start = 0, n, b
    while start < k:
        n = group_len(start, k, group)
        pack_k_blocks(codes + start, a, n)
        for b in range(blocks_of(n)):
            sums[b] = <float> sum_codes(codes + start + b * EXACT_K, exact_len(b, n))
        a += DQ_K_BLOCK * k_blocks_of(n)
        sums += blocks_of(group)
        start += n


cdef inline void pack_k_blocks(const int8_t* codes, uint8_t* a, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t u, j
    cdef const uint8_t* c = <const uint8_t*> codes
    for u in range(n // DQ_K_BLOCK):
        for j in range(4):
            a[DQ_K_BLOCK * u + j] = c[DQ_K_BLOCK * u + 2 * j]
            a[DQ_K_BLOCK * u + 4 + j] = c[DQ_K_BLOCK * u + 2 * j + 1]
    if n % DQ_K_BLOCK:
        u = n // DQ_K_BLOCK * DQ_K_BLOCK
        memset(a + u, 0, DQ_K_BLOCK)
        for j in range(n - u):
            a[u + 4 * (j & 1) + j // 2] = c[u + j]


cdef inline int32_t sum_codes(const int8_t* codes, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t sum = 0
    for i in range(n):
        sum += codes[i]
    return sum


# s0 and s1 = the sums of one group of one row, codes times activations. Four k-blocks at a time, a whole
# group of 32 k: there is no branch between them, and two chains of multiply-adds for each sum, since one
# would be slower than memory. Codes are prefetched `prefetch_distance` bytes ahead, unless that is 0.
cdef inline void group_gemv(const uint8_t* w, const uint8_t* a, dq_acc* s0, dq_acc* s1, Py_ssize_t k_blocks,
                            Py_ssize_t prefetch_distance) noexcept nogil:
    cdef dq_acc16 p0, p1, q0, q1
    cdef dq_broadcast_act even, odd
    cdef Py_ssize_t i
    s0[0] = s1[0] = dq_acc_zero()
    while k_blocks >= 4:
        if prefetch_distance:
            dq_prefetch(w + prefetch_distance, 16 * PANEL)
        if DQ_FOUR_K_BLOCKS:
            dq_four_k_blocks(w, a, s0, s1)
            w += 16 * PANEL
            a += 4 * DQ_K_BLOCK
        else:
            p0 = p1 = q0 = q1 = dq_acc16_zero()
            for i in range(2):
                even, odd = dq_broadcast(a), dq_broadcast(a + 4)
                p0 = dq_acc16_step(p0, dq_codes_load(w), even, odd)
                p1 = dq_acc16_step(p1, dq_codes_load(w + 4 * DQ_LANES), even, odd)
                even, odd = dq_broadcast(a + DQ_K_BLOCK), dq_broadcast(a + DQ_K_BLOCK + 4)
                q0 = dq_acc16_step(q0, dq_codes_load(w + 4 * PANEL), even, odd)
                q1 = dq_acc16_step(q1, dq_codes_load(w + 4 * PANEL + 4 * DQ_LANES), even, odd)
                w += 8 * PANEL
                a += 2 * DQ_K_BLOCK
            s0[0] = dq_acc_add16(dq_acc_add16(s0[0], p0), q0)
            s1[0] = dq_acc_add16(dq_acc_add16(s1[0], p1), q1)
        k_blocks -= 4
    if k_blocks:
        p0 = p1 = dq_acc16_zero()
        for i in range(k_blocks):
            even, odd = dq_broadcast(a), dq_broadcast(a + 4)
            p0 = dq_acc16_step(p0, dq_codes_load(w), even, odd)
            p1 = dq_acc16_step(p1, dq_codes_load(w + 4 * DQ_LANES), even, odd)
            w += 4 * PANEL
            a += DQ_K_BLOCK
        s0[0], s1[0] = dq_acc_add16(s0[0], p0), dq_acc_add16(s1[0], p1)


# The offsets of DQ_LANES outputs, of the first or the second half of a panel.
cdef inline dq_floats offsets_load(const uint8_t* offsets, Py_ssize_t half, bint minimums) noexcept nogil:
    if minimums:
        return dq_floats_load(<const float*> offsets + half * DQ_LANES)
    return dq_zero_points_load(offsets + half * DQ_LANES)


# The end of a group, as dq_group_add and dq_group_add_minimums have it.
cdef inline dq_floats group_add(dq_floats acc, dq_acc s, dq_floats offsets, float a_sum, dq_floats scales,
                                bint minimums) noexcept nogil:
    if minimums:
        return dq_group_add_minimums(acc, s, offsets, a_sum, scales)
    return dq_group_add(acc, s, offsets, a_sum, scales)


cdef inline void add_group(float* acc, dq_acc s0, dq_acc s1, dq_floats z0, dq_floats z1, float a_sum,
                           const float* scales, bint minimums) noexcept nogil:
    dq_floats_store(acc, group_add(dq_floats_load(acc), s0, z0, a_sum, dq_floats_load(scales), minimums))
    dq_floats_store(acc + DQ_LANES, group_add(dq_floats_load(acc + DQ_LANES), s1, z1, a_sum,
                                              dq_floats_load(scales + DQ_LANES), minimums))


# acc (4, PANEL) += one group of four rows, whose sums of activations are a_sums, as dq_group_add does it. The
# codes of the next panel, `prefetch_distance` bytes ahead, are prefetched. Accumulators have names as in
# microkernel_4.
cdef inline void group_microkernel_4(const uint8_t* w, const float* scales, const uint8_t* offsets,
                                     const uint8_t* a0, const uint8_t* a1, const uint8_t* a2,
                                     const uint8_t* a3, const float* a_sums, float* acc, Py_ssize_t k_blocks,
                                     Py_ssize_t prefetch_distance, bint minimums) noexcept nogil:
    cdef dq_acc s00 = dq_acc_zero(), s01 = s00, s10 = s00, s11 = s00, s20 = s00, s21 = s00, s30 = s00
    cdef dq_acc s31 = s00
    cdef dq_acc16 p00, p01, p10, p11, p20, p21, p30, p31
    cdef dq_codes w0, w1
    cdef dq_broadcast_act even, odd
    cdef dq_floats z0, z1
    cdef Py_ssize_t i, n, start = 0
    while start < k_blocks:
        n = k_blocks - start if k_blocks - start < DQ_ACC16_STEPS else DQ_ACC16_STEPS
        p00 = p01 = p10 = p11 = p20 = p21 = p30 = p31 = dq_acc16_zero()
        for i in range(start, start + n):
            dq_prefetch(w + prefetch_distance, 4 * PANEL)
            w0, w1 = dq_codes_load(w), dq_codes_load(w + 4 * DQ_LANES)
            even, odd = dq_broadcast(a0 + DQ_K_BLOCK * i), dq_broadcast(a0 + DQ_K_BLOCK * i + 4)
            p00 = dq_acc16_step(p00, w0, even, odd)
            p01 = dq_acc16_step(p01, w1, even, odd)
            even, odd = dq_broadcast(a1 + DQ_K_BLOCK * i), dq_broadcast(a1 + DQ_K_BLOCK * i + 4)
            p10 = dq_acc16_step(p10, w0, even, odd)
            p11 = dq_acc16_step(p11, w1, even, odd)
            even, odd = dq_broadcast(a2 + DQ_K_BLOCK * i), dq_broadcast(a2 + DQ_K_BLOCK * i + 4)
            p20 = dq_acc16_step(p20, w0, even, odd)
            p21 = dq_acc16_step(p21, w1, even, odd)
            even, odd = dq_broadcast(a3 + DQ_K_BLOCK * i), dq_broadcast(a3 + DQ_K_BLOCK * i + 4)
            p30 = dq_acc16_step(p30, w0, even, odd)
            p31 = dq_acc16_step(p31, w1, even, odd)
            w += 4 * PANEL
        s00, s01 = dq_acc_add16(s00, p00), dq_acc_add16(s01, p01)
        s10, s11 = dq_acc_add16(s10, p10), dq_acc_add16(s11, p11)
        s20, s21 = dq_acc_add16(s20, p20), dq_acc_add16(s21, p21)
        s30, s31 = dq_acc_add16(s30, p30), dq_acc_add16(s31, p31)
        start += n
    z0, z1 = offsets_load(offsets, 0, minimums), offsets_load(offsets, 1, minimums)
    add_group(acc, s00, s01, z0, z1, a_sums[0], scales, minimums)
    add_group(acc + PANEL, s10, s11, z0, z1, a_sums[1], scales, minimums)
    add_group(acc + 2 * PANEL, s20, s21, z0, z1, a_sums[2], scales, minimums)
    add_group(acc + 3 * PANEL, s30, s31, z0, z1, a_sums[3], scales, minimums)


# acc (PANEL,) = all groups, of at most EXACT_K k, of one row, added up in ascending order.
cdef inline void short_groups_gemv(const uint8_t* panel, const float* scales, const uint8_t* offsets,
                                   const uint8_t* a, float* acc, Py_ssize_t k, Py_ssize_t group,
                                   Py_ssize_t prefetch_distance, bint minimums) noexcept nogil:
    cdef const float* a_sums = <const float*> (a + DQ_K_BLOCK * k_blocks_of_row(k, group))
    cdef dq_acc s0, s1
    cdef dq_floats acc0, acc1
    cdef Py_ssize_t start = 0, k_blocks
    memset(acc, 0, PANEL * sizeof(float))
    acc0 = acc1 = dq_floats_load(acc)
    while start < k:
        k_blocks = k_blocks_of(group_len(start, k, group))
        group_gemv(panel, a, &s0, &s1, k_blocks, prefetch_distance)
        acc0 = group_add(acc0, s0, offsets_load(offsets, 0, minimums), a_sums[0], dq_floats_load(scales),
                         minimums)
        acc1 = group_add(acc1, s1, offsets_load(offsets, 1, minimums), a_sums[0],
                         dq_floats_load(scales + DQ_LANES), minimums)
        panel += 4 * PANEL * k_blocks
        a += DQ_K_BLOCK * k_blocks
        a_sums += 1
        scales += PANEL
        offsets += offsets_bytes(minimums)
        start += group
    dq_floats_store(acc, acc0)
    dq_floats_store(acc + DQ_LANES, acc1)


# acc (rows, PANEL) = the same for 2 to 4 rows of a. Two and three rows take the microkernel of four, with the
# last row repeated.
cdef inline void short_groups_4_rows(const uint8_t* panel, const float* scales, const uint8_t* offsets,
                                     const uint8_t* a, Py_ssize_t stride, Py_ssize_t rows, float* acc,
                                     Py_ssize_t k, Py_ssize_t group, bint minimums) noexcept nogil:
    cdef Py_ssize_t sums_at = DQ_K_BLOCK * k_blocks_of_row(k, group), g, k_blocks = k_blocks_of(group), at = 0
    cdef Py_ssize_t groups = groups_of(k, group)
    cdef const uint8_t* a1 = a + stride
    cdef const uint8_t* a2 = a + (rows - 1 if rows < 3 else 2) * stride
    cdef const uint8_t* a3 = a + (rows - 1) * stride
    cdef float a_sums[4]
    memset(acc, 0, ROWS * PANEL * sizeof(float))
    for g in range(groups):
        if g == groups - 1:
            k_blocks = k_blocks_of(k - g * group)
        a_sums[0] = (<const float*> (a + sums_at))[g]
        a_sums[1] = (<const float*> (a1 + sums_at))[g]
        a_sums[2] = (<const float*> (a2 + sums_at))[g]
        a_sums[3] = (<const float*> (a3 + sums_at))[g]
        group_microkernel_4(panel, scales, offsets, a + at, a1 + at, a2 + at, a3 + at, a_sums, acc, k_blocks,
                            4 * PANEL * k_blocks_of_row(k, group), minimums)
        panel += 4 * PANEL * k_blocks
        at += DQ_K_BLOCK * k_blocks
        scales += PANEL
        offsets += offsets_bytes(minimums)


# Whether products of two rows and more keep the codes of a k-block of a group in registers.
cdef inline bint keeps_weights(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return DQ_KEPT_ROWS > 1 and group <= EXACT_K and (k | group) % (4 * DQ_K_BLOCK) == 0


# acc (rows, PANEL) = the same for rows <= DQ_KEPT_ROWS rows of a, where keeps_weights.
cdef inline void short_groups_kept(const uint8_t* panel, const float* scales, const uint8_t* offsets,
                                   const uint8_t* a, Py_ssize_t stride, Py_ssize_t rows, float* acc,
                                   Py_ssize_t k, Py_ssize_t group, bint minimums) noexcept nogil:
    cdef const uint8_t* a_sums = a + k
    cdef Py_ssize_t start = 0, n
    memset(acc, 0, rows * PANEL * sizeof(float))
    while start < k:
        n = group_len(start, k, group)
        dq_group_rows(panel, scales, offsets, minimums, a, a_sums, stride, rows, acc, n // DQ_K_BLOCK,
                      group_panel_bytes(k, group))
        panel += n // 2 * PANEL
        a += n
        a_sums += sizeof(float)
        scales += PANEL
        offsets += offsets_bytes(minimums)
        start += n


# How many of m rows to take, so that the rest comes in equal parts of at most `max_rows`.
cdef inline Py_ssize_t equal_part(Py_ssize_t m, Py_ssize_t max_rows) noexcept nogil:
    return m // ((m + max_rows - 1) // max_rows)


# k-steps of the tiles of a product, which its groups fill completely; 0 for a product without tiles.
cdef inline int tile_k_steps_of(Py_ssize_t m, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    if DQ_GROUP_TILES_FROM == 0 or m < DQ_GROUP_TILES_FROM or group > EXACT_K:
        return 0
    if (k | group) % (16 * 4) == 0:
        return 16
    return 8 if (k | group) % (8 * 4) == 0 else 0


# Tiles get nearly equal parts of the rows, so that none has too few. The first row of part i.
cdef inline Py_ssize_t part_start(Py_ssize_t rows, Py_ssize_t i) noexcept nogil:
    return rows * i // parts_of(rows)


cdef inline Py_ssize_t parts_of(Py_ssize_t rows) noexcept nogil:
    return (rows + DQ_TILE_ROWS - 1) // DQ_TILE_ROWS


# acc (PANEL,) += `count` groups of one row, in ascending order; sums as add_group_tiles has them.
cdef inline void add_groups(float* acc, const int32_t* sums, const float* scales, const float* offsets,
                            const float* a_sums, Py_ssize_t count, bint minimums) noexcept nogil:
    cdef dq_floats acc0 = dq_floats_load(acc), acc1 = dq_floats_load(acc + DQ_LANES)
    cdef Py_ssize_t g
    for g in range(count):
        acc0 = group_add(acc0, dq_acc_load(sums), dq_floats_load(offsets), a_sums[g], dq_floats_load(scales),
                         minimums)
        acc1 = group_add(acc1, dq_acc_load(sums + DQ_LANES), dq_floats_load(offsets + DQ_LANES), a_sums[g],
                         dq_floats_load(scales + DQ_LANES), minimums)
        sums += DQ_TILE_ROWS * PANEL
        scales += PANEL
        offsets += PANEL
    dq_floats_store(acc, acc0)
    dq_floats_store(acc + DQ_LANES, acc1)


# acc (rows, PANEL) += `count` groups of `k_blocks` k-blocks each, together at most TILE_K_BLOCKS.
cdef inline void add_group_tiles(const uint8_t* panel, const float* scales, const float* offsets,
                                 const uint8_t* a, const uint8_t* a_sums, Py_ssize_t stride, Py_ssize_t rows,
                                 float* acc, Py_ssize_t k_blocks, Py_ssize_t count, int tile_k_steps,
                                 bint minimums) noexcept nogil:
    cdef uint8_t k_steps[TILE_K_BLOCKS * 8 * PANEL]
    cdef int32_t sums[BATCH * DQ_TILE_ROWS * PANEL]
    cdef Py_ssize_t i, g, r, start, end
    dq_unpack_k_blocks(panel, k_steps, count * k_blocks)
    for i in range(parts_of(rows)):
        start, end = part_start(rows, i), part_start(rows, i + 1)
        for g in range(count):
            dq_tiles(k_steps + g * k_blocks * 8 * PANEL, a + start * stride + g * k_blocks * DQ_K_BLOCK,
                     stride, end - start, sums + g * DQ_TILE_ROWS * PANEL, GROUP_STEPS * k_blocks,
                     tile_k_steps, False)
        for r in range(start, end):
            add_groups(acc + r * PANEL, sums + (r - start) * PANEL, scales, offsets,
                       <const float*> (a_sums + r * stride), count, minimums)


# The same for one group of more than TILE_K_BLOCKS k-blocks.
cdef inline void add_long_group_tiles(const uint8_t* panel, const float* scales, const float* offsets,
                                      const uint8_t* a, const uint8_t* a_sums, Py_ssize_t stride,
                                      Py_ssize_t rows, float* acc, Py_ssize_t k_blocks, int tile_k_steps,
                                      bint minimums) noexcept nogil:
    cdef uint8_t k_steps[TILE_K_BLOCKS * 8 * PANEL]
    cdef int32_t sums[BATCH_ROWS * PANEL]
    cdef Py_ssize_t done = 0, n, i, r, start
    while done < k_blocks:
        n = k_blocks - done if k_blocks - done < TILE_K_BLOCKS else TILE_K_BLOCKS
        dq_unpack_k_blocks(panel + 4 * PANEL * done, k_steps, n)
        for i in range(parts_of(rows)):
            start = part_start(rows, i)
            dq_tiles(k_steps, a + start * stride + done * DQ_K_BLOCK, stride, part_start(rows, i + 1) - start,
                     sums + start * PANEL, GROUP_STEPS * n, tile_k_steps, done > 0)
        done += n
    for r in range(rows):
        add_groups(acc + r * PANEL, sums + r * PANEL, scales, offsets,
                   <const float*> (a_sums + r * stride), 1, minimums)


# acc (rows, PANEL) = the same by tiles, for DQ_GROUP_TILES_FROM <= rows <= BATCH_ROWS rows of a. Codes are
# unpacked once for all rows, and of BATCH short groups together: what was just written is slow to load as a
# tile. More groups would not fit L1 beside everything else.
cdef inline void short_groups_tiles(const uint8_t* panel, const float* scales, const uint8_t* offsets,
                                    const uint8_t* a, Py_ssize_t stride, Py_ssize_t rows, float* acc,
                                    Py_ssize_t k, Py_ssize_t group, int tile_k_steps,
                                    bint minimums) noexcept nogil:
    cdef float floats[BATCH * PANEL]  # the offsets
    cdef const uint8_t* a_sums = a + DQ_K_BLOCK * k_blocks_of_row(k, group)
    cdef Py_ssize_t start = 0, k_blocks, count, i
    memset(acc, 0, rows * PANEL * sizeof(float))
    while start < k:
        k_blocks = k_blocks_of(group_len(start, k, group))
        count = BATCH if BATCH * k_blocks <= TILE_K_BLOCKS and BATCH * group <= k - start else 1
        for i in range(count * PANEL):
            floats[i] = (<const float*> offsets)[i] if minimums else offsets[i]
        if k_blocks <= TILE_K_BLOCKS:
            add_group_tiles(panel, scales, floats, a, a_sums, stride, rows, acc, k_blocks, count,
                            tile_k_steps, minimums)
        else:
            add_long_group_tiles(panel, scales, floats, a, a_sums, stride, rows, acc, k_blocks, tile_k_steps,
                                 minimums)
        panel += 4 * PANEL * k_blocks * count
        a += DQ_K_BLOCK * k_blocks * count
        a_sums += count * <Py_ssize_t> sizeof(float)
        scales += PANEL * count
        offsets += offsets_bytes(minimums) * count
        start += group * count


# The same for groups of more than EXACT_K k, one row at a time. A sum over EXACT_K k is exact as a float. It
# is converted to an integer, and the sum of its group is rounded to a float once; with minimums so is the sum
# of its activations.
cdef inline void long_groups(const uint8_t* panel, const float* scales, const uint8_t* offsets,
                             const uint8_t* a, float* acc, Py_ssize_t k, Py_ssize_t group,
                             bint minimums) noexcept nogil:
    cdef const float* a_sums = <const float*> (a + DQ_K_BLOCK * k_blocks_of_row(k, group))
    cdef float ones[PANEL]
    cdef float block[PANEL]
    cdef float total
    cdef int64_t sums[PANEL]
    cdef int64_t a_sum
    cdef dq_floats z0, z1
    cdef dq_acc s0, s1
    cdef Py_ssize_t start = 0, n, b, c, k_blocks
    for c in range(PANEL):
        ones[c] = 1
    memset(acc, 0, PANEL * sizeof(float))
    while start < k:
        n = group_len(start, k, group)
        memset(sums, 0, sizeof(sums))
        memset(block, 0, sizeof(block))
        a_sum = 0
        # A zero point comes off in each part, a minimum is added at the end.
        z0 = z1 = dq_floats_load(block)
        if not minimums:
            z0, z1 = offsets_load(offsets, 0, False), offsets_load(offsets, 1, False)
        for b in range(blocks_of(n)):
            k_blocks = k_blocks_of(exact_len(b, n))
            memset(block, 0, sizeof(block))
            group_gemv(panel, a, &s0, &s1, k_blocks, 0)
            add_group(block, s0, s1, z0, z1, a_sums[b], ones, False)
            for c in range(PANEL):
                sums[c] += <int64_t> block[c]
            a_sum += <int64_t> a_sums[b]
            panel += 4 * PANEL * k_blocks
            a += DQ_K_BLOCK * k_blocks
        for c in range(PANEL):
            total = <float> sums[c] * scales[c]
            if minimums:
                total += (<const float*> offsets)[c] * <float> a_sum
            acc[c] += total
        a_sums += blocks_of(group)
        scales += PANEL
        offsets += offsets_bytes(minimums)
        start += n


# out[r][c] = acc[r][c] * a_scales[r] + bias[c] for c < cols.
cdef inline void finish_rows(const float* acc, const float* a_scales, const float* bias, float* out,
                             Py_ssize_t out_stride, Py_ssize_t rows, Py_ssize_t cols) noexcept nogil:
    cdef Py_ssize_t r, c
    for r in range(rows):
        for c in range(cols):
            out[r * out_stride + c] = acc[r * PANEL + c] * a_scales[r]
        if bias != NULL:
            for c in range(cols):
                out[r * out_stride + c] += bias[c]


# One panel times m rows of activations, cols <= PANEL; by tiles of `tile_k_steps` k-steps, unless that is 0.
cdef inline void gemm_group_panel(const uint8_t* panel, const float* scales, const uint8_t* offsets,
                                  const float* bias, const uint8_t* a, const float* a_scales, float* out,
                                  Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t cols, Py_ssize_t k,
                                  Py_ssize_t group, Py_ssize_t prefetch_distance, int tile_k_steps,
                                  bint minimums) noexcept nogil:
    cdef float acc[GROUP_ROWS * PANEL]
    cdef Py_ssize_t stride = group_activation_bytes(k, group), rows
    while m > 0:
        rows = 1
        if tile_k_steps:
            rows = equal_part(m, BATCH_ROWS)
            short_groups_tiles(panel, scales, offsets, a, stride, rows, acc, k, group, tile_k_steps, minimums)
        elif group > EXACT_K:
            long_groups(panel, scales, offsets, a, acc, k, group, minimums)
        elif m == 1:
            short_groups_gemv(panel, scales, offsets, a, acc, k, group, prefetch_distance, minimums)
        elif keeps_weights(k, group):
            rows = equal_part(m, DQ_KEPT_ROWS)
            short_groups_kept(panel, scales, offsets, a, stride, rows, acc, k, group, minimums)
        else:
            rows = m if m < ROWS else ROWS
            short_groups_4_rows(panel, scales, offsets, a, stride, rows, acc, k, group, minimums)
        finish_rows(acc, a_scales, bias, out, out_stride, rows, cols)
        a += rows * stride
        a_scales += rows
        out += rows * out_stride
        m -= rows


# gemm_u4s8_f32 for one kind of offsets, for which it is compiled by itself.
cdef inline void gemm_offsets(const uint8_t* panels, const float* scales, const uint8_t* offsets,
                              bint minimums, const float* bias, const uint8_t* a, const float* a_scales,
                              float* out, Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k,
                              Py_ssize_t group, Py_ssize_t prefetch_distance) noexcept nogil:
    cdef Py_ssize_t groups = groups_of(k, group), cols
    cdef int tile_k_steps = tile_k_steps_of(m, k, group)
    if tile_k_steps:
        dq_tiles_begin(m if m < TILE else TILE, tile_k_steps)
    while n > 0:
        cols = n if n < PANEL else PANEL
        gemm_group_panel(panels, scales, offsets, bias, a, a_scales, out, out_stride, m, cols, k, group,
                         prefetch_distance, tile_k_steps, minimums)
        panels += group_panel_bytes(k, group)
        scales += groups * PANEL
        offsets += groups * offsets_bytes(minimums)
        if bias != NULL:
            bias += cols
        out += cols
        n -= cols
    if tile_k_steps:
        dq_tiles_end()


# The panels of n outputs times m rows of activations: out[r][c] = acc * a_scales[r] + bias[c], rows of out at
# a distance of `out_stride`, where acc is the float32 sum over the groups, in ascending order and from 0, of
# float32(exact sum of (code - zero_point) * a) * scale, or with `minimums` of float32(exact sum of code * a)
# * scale + minimum * float32(exact sum of a). No bias where it is NULL. Codes for a single row are prefetched
# `prefetch_distance` bytes ahead, unless that is 0.
cdef void gemm_u4s8_f32(const uint8_t* panels, const float* scales, const uint8_t* offsets, bint minimums,
                        const float* bias, const uint8_t* a, const float* a_scales, float* out,
                        Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, Py_ssize_t group,
                        Py_ssize_t prefetch_distance) noexcept nogil:
    if minimums:
        gemm_offsets(panels, scales, offsets, True, bias, a, a_scales, out, out_stride, m, n, k, group,
                     prefetch_distance)
    else:
        gemm_offsets(panels, scales, offsets, False, bias, a, a_scales, out, out_stride, m, n, k, group,
                     prefetch_distance)
