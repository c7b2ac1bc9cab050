# The exact integer product of 4-bit weights, a scale and a zero point for each group of k, and int8
# activations.
#
# A panel holds the codes 0..15 of PANEL = 2 * DQ_LANES outputs, in units of DQ_CODES = 8 k: four bytes for
# each output, the even k in the low nibbles. A group starts a unit. What lies past the last output or the end
# of a group is zero. Scales and zero points of a panel stand apart, PANEL next to each other for each group.
# So a product with a single row reads three streams, each from the start of its array to the end, at the
# speed of memory; with the scales at the end of each panel it took half as long again, for the prefetcher
# then has to find each of them anew.
#
# Activations lie row by row, each in group_activation_bytes: the codes in the same units, the four even k
# first; then their float32 sums, one for each block of at most EXACT k of a group. A zero point then costs a
# product with that sum, once for each group.
cdef enum:
    EXACT = 1 << 13
    BATCH = 2
    UNITS = 32
    BATCH_ROWS = 4 * DQ_TILE_ROWS


# Units that n k take.
cdef inline Py_ssize_t units_of(Py_ssize_t n) noexcept nogil:
    return (n + DQ_CODES - 1) // DQ_CODES


# Elements of the group that starts at k = start.
cdef inline Py_ssize_t group_len(Py_ssize_t start, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return group if group < k - start else k - start


# Units of a whole row, each group filled up.
cdef inline Py_ssize_t units_of_row(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return k // group * units_of(group) + units_of(k % group)


cdef inline Py_ssize_t groups_of(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return (k + group - 1) // group


# Blocks of at most EXACT k in a group of n.
cdef inline Py_ssize_t blocks_of(Py_ssize_t n) noexcept nogil:
    return (n + EXACT - 1) // EXACT


# Elements of block b of a group of n.
cdef inline Py_ssize_t exact_len(Py_ssize_t b, Py_ssize_t n) noexcept nogil:
    return EXACT if n - b * EXACT > EXACT else n - b * EXACT


cdef Py_ssize_t group_panel_bytes(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return 4 * PANEL * units_of_row(k, group)


# An odd number of cache lines, as activation_bytes.
cdef Py_ssize_t group_activation_bytes(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t n = DQ_CODES * units_of_row(k, group)
    n += groups_of(k, group) * blocks_of(group) * <Py_ssize_t> sizeof(float)
    return ((n + 63) // 64 | 1) * 64


# Nibble i of a run of them.
cdef inline uint8_t nibble(const uint8_t* packed, Py_ssize_t i) noexcept nogil:
    return packed[i // 2] >> (4 * (i & 1)) & 0x0F


# n k of one output, from a row of nibbles at k = start, to units of their own; flip is XORed to every byte.
cdef inline void pack_group(const uint8_t* w, Py_ssize_t start, Py_ssize_t n, uint8_t flip,
                            uint8_t* unit) noexcept nogil:
    cdef Py_ssize_t u, j
    cdef uint32_t four
    cdef uint8_t code
    if start % 2 == 0:
        for u in range(n // DQ_CODES):
            memcpy(&four, w + start // 2 + 4 * u, 4)
            four ^= flip * <uint32_t> 0x01010101
            memcpy(unit + 4 * PANEL * u, &four, 4)
        j = n // DQ_CODES * DQ_CODES
    else:
        j = 0
    while j < n:
        code = nibble(w, start + j) ^ (flip & 0x0F)
        unit[4 * PANEL * (j // DQ_CODES) + j % DQ_CODES // 2] |= <uint8_t> (code << (4 * (j & 1)))
        j += 1


# w (rows, ceil(k / 2)) packed codes, rows <= PANEL, scales and zero_points (rows, groups) -> panel,
# group_panel_bytes, panel_scales and panel_zero_points (groups, PANEL). Where zero_points is NULL the codes
# are symmetric, in two's complement: 8 is added, which makes 8 their zero point.
cdef void pack_panel_u4(const uint8_t* w, const float* scales, const uint8_t* zero_points, Py_ssize_t rows,
                        uint8_t* panel, float* panel_scales, uint8_t* panel_zero_points, Py_ssize_t k,
                        Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t groups = groups_of(k, group), r, g, start = 0, n
    # Where no group ends within a unit the row is one run of units, and is moved in parts that keep the lines
    # of the panel which they touch in L1.
    cdef Py_ssize_t part = group if group % DQ_CODES else 64 * DQ_CODES
    memset(panel, 0, group_panel_bytes(k, group))
    memset(panel_scales, 0, groups * PANEL * sizeof(float))
    memset(panel_zero_points, 0, groups * PANEL)
    while start < k:
        n = group_len(start, k, part)
        for r in range(rows):
            pack_group(w + r * ((k + 1) // 2), start, n, 0 if zero_points != NULL else 0x88,
                       panel + 4 * (start // part * units_of(part) * PANEL + r))
        start += n
    for g in range(groups):
        for r in range(rows):
            panel_scales[g * PANEL + r] = scales[r * groups + g]
            panel_zero_points[g * PANEL + r] = 8 if zero_points == NULL else zero_points[r * groups + g]


# The inverse of pack_panel_u4.
cdef void unpack_panel_u4(const uint8_t* panel, const float* panel_scales, const uint8_t* panel_zero_points,
                          uint8_t* w, float* scales, uint8_t* zero_points, Py_ssize_t rows, Py_ssize_t k,
                          Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t groups = groups_of(k, group), bytes = (k + 1) // 2, r, g, i, n
    cdef const uint8_t* unit
    cdef uint8_t code
    memset(w, 0, rows * bytes)
    for r in range(rows):
        for g in range(groups):
            unit = panel + 4 * (g * units_of(group) * PANEL + r)
            n = group_len(g * group, k, group)
            for i in range(n):
                code = nibble(unit + 4 * PANEL * (i // DQ_CODES), i % DQ_CODES)
                code ^= 8 if zero_points == NULL else 0
                w[r * bytes + (g * group + i) // 2] |= <uint8_t> (code << (4 * ((g * group + i) & 1)))
            scales[r * groups + g] = panel_scales[g * PANEL + r]
            if zero_points != NULL:
                zero_points[r * groups + g] = panel_zero_points[g * PANEL + r]


# codes (k,) in [-127, 127] -> a, group_activation_bytes.
cdef void pack_group_activation_s8(const int8_t* codes, uint8_t* a, Py_ssize_t k,
                                   Py_ssize_t group) noexcept nogil:
    cdef float* sums = <float*> (a + DQ_CODES * units_of_row(k, group))
    cdef Py_ssize_t start = 0, n, b
    while start < k:
        n = group_len(start, k, group)
        pack_units(codes + start, a, n)
        for b in range(blocks_of(n)):
            sums[b] = <float> sum_codes(codes + start + b * EXACT, exact_len(b, n))
        a += DQ_CODES * units_of(n)
        sums += blocks_of(group)
        start += n


cdef inline void pack_units(const int8_t* codes, uint8_t* a, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t u, j
    cdef const uint8_t* c = <const uint8_t*> codes
    for u in range(n // DQ_CODES):
        for j in range(4):
            a[DQ_CODES * u + j] = c[DQ_CODES * u + 2 * j]
            a[DQ_CODES * u + 4 + j] = c[DQ_CODES * u + 2 * j + 1]
    if n % DQ_CODES:
        u = n // DQ_CODES * DQ_CODES
        memset(a + u, 0, DQ_CODES)
        for j in range(n - u):
            a[u + 4 * (j & 1) + j // 2] = c[u + j]


cdef inline int32_t sum_codes(const int8_t* codes, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t sum = 0
    for i in range(n):
        sum += codes[i]
    return sum


# s0 and s1 = the sums of one group of one row: `units` units of codes times activations. Four units at a
# time, a whole group of 32 k: no branch between them, and two chains of multiply-adds for each sum, for one
# would be slower than memory. Unless it is 0, codes are fetched from `ahead` bytes on.
cdef inline void group_tile_1(const uint8_t* w, const uint8_t* a, dq_sums* s0, dq_sums* s1, Py_ssize_t units,
                              Py_ssize_t ahead) noexcept nogil:
    cdef dq_part p0, p1, q0, q1
    cdef dq_spread_act even, odd
    cdef Py_ssize_t i
    s0[0] = s1[0] = dq_sums_zero()
    while units >= 4:
        if ahead:
            dq_prefetch(w + ahead, 16 * PANEL)
        p0 = p1 = q0 = q1 = dq_part_zero()
        for i in range(2):
            even, odd = dq_spread(a), dq_spread(a + 4)
            p0 = dq_codes_step(p0, dq_codes_load(w), even, odd)
            p1 = dq_codes_step(p1, dq_codes_load(w + 4 * DQ_LANES), even, odd)
            even, odd = dq_spread(a + DQ_CODES), dq_spread(a + DQ_CODES + 4)
            q0 = dq_codes_step(q0, dq_codes_load(w + 4 * PANEL), even, odd)
            q1 = dq_codes_step(q1, dq_codes_load(w + 4 * PANEL + 4 * DQ_LANES), even, odd)
            w += 8 * PANEL
            a += 2 * DQ_CODES
        s0[0] = dq_part_add(dq_part_add(s0[0], p0), q0)
        s1[0] = dq_part_add(dq_part_add(s1[0], p1), q1)
        units -= 4
    if units:
        p0 = p1 = dq_part_zero()
        for i in range(units):
            even, odd = dq_spread(a), dq_spread(a + 4)
            p0 = dq_codes_step(p0, dq_codes_load(w), even, odd)
            p1 = dq_codes_step(p1, dq_codes_load(w + 4 * DQ_LANES), even, odd)
            w += 4 * PANEL
            a += DQ_CODES
        s0[0], s1[0] = dq_part_add(s0[0], p0), dq_part_add(s1[0], p1)


cdef inline void add_group(float* acc, dq_sums s0, dq_sums s1, dq_floats z0, dq_floats z1, float a_sum,
                           const float* scales) noexcept nogil:
    dq_floats_store(acc, dq_group_add(dq_floats_load(acc), s0, z0, a_sum, dq_floats_load(scales)))
    dq_floats_store(acc + DQ_LANES, dq_group_add(dq_floats_load(acc + DQ_LANES), s1, z1, a_sum,
                                                 dq_floats_load(scales + DQ_LANES)))


# acc (4, PANEL) += one group of four rows, each with the sum at a_sums, as dq_group_add has it; the codes of
# the next panel, `ahead` bytes on, are fetched meanwhile. As tile_4, and with names for its reason.
cdef inline void group_tile_4(const uint8_t* w, const float* scales, const uint8_t* zero_points,
                              const uint8_t* a0, const uint8_t* a1, const uint8_t* a2, const uint8_t* a3,
                              const float* a_sums, float* acc, Py_ssize_t units,
                              Py_ssize_t ahead) noexcept nogil:
    cdef dq_sums s00 = dq_sums_zero(), s01 = s00, s10 = s00, s11 = s00, s20 = s00, s21 = s00, s30 = s00
    cdef dq_sums s31 = s00
    cdef dq_part p00, p01, p10, p11, p20, p21, p30, p31
    cdef dq_codes w0, w1
    cdef dq_spread_act even, odd
    cdef dq_floats z0, z1
    cdef Py_ssize_t i, n, start = 0
    while start < units:
        n = units - start if units - start < DQ_CODES_RUN else DQ_CODES_RUN
        p00 = p01 = p10 = p11 = p20 = p21 = p30 = p31 = dq_part_zero()
        for i in range(start, start + n):
            dq_prefetch(w + ahead, 4 * PANEL)
            w0, w1 = dq_codes_load(w), dq_codes_load(w + 4 * DQ_LANES)
            even, odd = dq_spread(a0 + DQ_CODES * i), dq_spread(a0 + DQ_CODES * i + 4)
            p00 = dq_codes_step(p00, w0, even, odd)
            p01 = dq_codes_step(p01, w1, even, odd)
            even, odd = dq_spread(a1 + DQ_CODES * i), dq_spread(a1 + DQ_CODES * i + 4)
            p10 = dq_codes_step(p10, w0, even, odd)
            p11 = dq_codes_step(p11, w1, even, odd)
            even, odd = dq_spread(a2 + DQ_CODES * i), dq_spread(a2 + DQ_CODES * i + 4)
            p20 = dq_codes_step(p20, w0, even, odd)
            p21 = dq_codes_step(p21, w1, even, odd)
            even, odd = dq_spread(a3 + DQ_CODES * i), dq_spread(a3 + DQ_CODES * i + 4)
            p30 = dq_codes_step(p30, w0, even, odd)
            p31 = dq_codes_step(p31, w1, even, odd)
            w += 4 * PANEL
        s00, s01 = dq_part_add(s00, p00), dq_part_add(s01, p01)
        s10, s11 = dq_part_add(s10, p10), dq_part_add(s11, p11)
        s20, s21 = dq_part_add(s20, p20), dq_part_add(s21, p21)
        s30, s31 = dq_part_add(s30, p30), dq_part_add(s31, p31)
        start += n
    z0, z1 = dq_zero_points_load(zero_points), dq_zero_points_load(zero_points + DQ_LANES)
    add_group(acc, s00, s01, z0, z1, a_sums[0], scales)
    add_group(acc + PANEL, s10, s11, z0, z1, a_sums[1], scales)
    add_group(acc + 2 * PANEL, s20, s21, z0, z1, a_sums[2], scales)
    add_group(acc + 3 * PANEL, s30, s31, z0, z1, a_sums[3], scales)


# acc (PANEL,) = all groups of at most EXACT k of one row, added up in ascending order.
cdef inline void short_groups_1(const uint8_t* panel, const float* scales, const uint8_t* zero_points,
                                const uint8_t* a, float* acc, Py_ssize_t k, Py_ssize_t group,
                                Py_ssize_t ahead) noexcept nogil:
    cdef const float* a_sums = <const float*> (a + DQ_CODES * units_of_row(k, group))
    cdef dq_sums s0, s1
    cdef dq_floats acc0, acc1
    cdef Py_ssize_t start = 0, units
    memset(acc, 0, PANEL * sizeof(float))
    acc0 = acc1 = dq_floats_load(acc)
    while start < k:
        units = units_of(group_len(start, k, group))
        group_tile_1(panel, a, &s0, &s1, units, ahead)
        acc0 = dq_group_add(acc0, s0, dq_zero_points_load(zero_points), a_sums[0], dq_floats_load(scales))
        acc1 = dq_group_add(acc1, s1, dq_zero_points_load(zero_points + DQ_LANES), a_sums[0],
                            dq_floats_load(scales + DQ_LANES))
        panel += 4 * PANEL * units
        a += DQ_CODES * units
        a_sums += 1
        scales += PANEL
        zero_points += PANEL
        start += group
    dq_floats_store(acc, acc0)
    dq_floats_store(acc + DQ_LANES, acc1)


# acc (rows, PANEL) = the same for 2 <= rows <= 4 rows of a. Two and three rows take the tile of four, with
# the last row repeated.
cdef inline void short_groups_4(const uint8_t* panel, const float* scales, const uint8_t* zero_points,
                                const uint8_t* a, Py_ssize_t stride, Py_ssize_t rows, float* acc,
                                Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef Py_ssize_t sums_at = DQ_CODES * units_of_row(k, group), g, units = units_of(group), at = 0
    cdef Py_ssize_t groups = groups_of(k, group)
    cdef const uint8_t* a1 = a + stride
    cdef const uint8_t* a2 = a + (rows - 1 if rows < 3 else 2) * stride
    cdef const uint8_t* a3 = a + (rows - 1) * stride
    cdef float a_sums[4]
    memset(acc, 0, ROWS * PANEL * sizeof(float))
    for g in range(groups):
        if g == groups - 1:
            units = units_of(k - g * group)
        a_sums[0] = (<const float*> (a + sums_at))[g]
        a_sums[1] = (<const float*> (a1 + sums_at))[g]
        a_sums[2] = (<const float*> (a2 + sums_at))[g]
        a_sums[3] = (<const float*> (a3 + sums_at))[g]
        group_tile_4(panel, scales, zero_points, a + at, a1 + at, a2 + at, a3 + at, a_sums, acc, units,
                     4 * PANEL * units_of_row(k, group))
        panel += 4 * PANEL * units
        at += DQ_CODES * units
        scales += PANEL
        zero_points += PANEL


# How many steps the tiles of a product have, all of which its groups fill; 0 for a product without tiles.
cdef inline int deep_tiles(Py_ssize_t m, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    if DQ_GROUP_TILES_FROM == 0 or m < DQ_GROUP_TILES_FROM or group > EXACT:
        return 0
    if (k | group) % (16 * 4) == 0:
        return 16
    return 8 if (k | group) % (8 * 4) == 0 else 0


# Rows are shared out to tiles evenly, so that none gets fewer than it has: the first row of part i.
cdef inline Py_ssize_t part_start(Py_ssize_t rows, Py_ssize_t i) noexcept nogil:
    return rows * i // parts_of(rows)


cdef inline Py_ssize_t parts_of(Py_ssize_t rows) noexcept nogil:
    return (rows + DQ_TILE_ROWS - 1) // DQ_TILE_ROWS


# acc (PANEL,) += `count` groups of one row, in ascending order; sums are those of add_group_tiles.
cdef inline void add_groups(float* acc, const int32_t* sums, const float* scales, const float* zero_points,
                            const float* a_sums, Py_ssize_t count) noexcept nogil:
    cdef dq_floats acc0 = dq_floats_load(acc), acc1 = dq_floats_load(acc + DQ_LANES)
    cdef Py_ssize_t g
    for g in range(count):
        acc0 = dq_group_add(acc0, dq_sums_load(sums), dq_floats_load(zero_points), a_sums[g],
                            dq_floats_load(scales))
        acc1 = dq_group_add(acc1, dq_sums_load(sums + DQ_LANES), dq_floats_load(zero_points + DQ_LANES),
                            a_sums[g], dq_floats_load(scales + DQ_LANES))
        sums += DQ_TILE_ROWS * PANEL
        scales += PANEL
        zero_points += PANEL
    dq_floats_store(acc, acc0)
    dq_floats_store(acc + DQ_LANES, acc1)


# acc (rows, PANEL) += `count` groups of `units` units each, at most UNITS together.
cdef inline void add_group_tiles(const uint8_t* panel, const float* scales, const float* zero_points,
                                 const uint8_t* a, const uint8_t* a_sums, Py_ssize_t stride, Py_ssize_t rows,
                                 float* acc, Py_ssize_t units, Py_ssize_t count, int deep) noexcept nogil:
    cdef uint8_t steps[UNITS * 8 * PANEL]
    cdef int32_t sums[BATCH * DQ_TILE_ROWS * PANEL]
    cdef Py_ssize_t i, g, r, start, end
    dq_unpack_units(panel, steps, count * units)
    for i in range(parts_of(rows)):
        start, end = part_start(rows, i), part_start(rows, i + 1)
        for g in range(count):
            dq_tiles(steps + g * units * 8 * PANEL, a + start * stride + g * units * DQ_CODES, stride,
                     end - start, sums + g * DQ_TILE_ROWS * PANEL, 2 * units, deep, False)
        for r in range(start, end):
            add_groups(acc + r * PANEL, sums + (r - start) * PANEL, scales, zero_points,
                       <const float*> (a_sums + r * stride), count)


# The same for one group of more than UNITS units.
cdef inline void add_long_group_tiles(const uint8_t* panel, const float* scales, const float* zero_points,
                                      const uint8_t* a, const uint8_t* a_sums, Py_ssize_t stride,
                                      Py_ssize_t rows, float* acc, Py_ssize_t units, int deep) noexcept nogil:
    cdef uint8_t steps[UNITS * 8 * PANEL]
    cdef int32_t sums[BATCH_ROWS * PANEL]
    cdef Py_ssize_t done = 0, n, i, r, start
    while done < units:
        n = units - done if units - done < UNITS else UNITS
        dq_unpack_units(panel + 4 * PANEL * done, steps, n)
        for i in range(parts_of(rows)):
            start = part_start(rows, i)
            dq_tiles(steps, a + start * stride + done * DQ_CODES, stride, part_start(rows, i + 1) - start,
                     sums + start * PANEL, 2 * n, deep, done > 0)
        done += n
    for r in range(rows):
        add_groups(acc + r * PANEL, sums + r * PANEL, scales, zero_points,
                   <const float*> (a_sums + r * stride), 1)


# acc (rows, PANEL) = the same by tiles, for DQ_GROUP_TILES_FROM <= rows <= BATCH_ROWS rows of a. Codes are
# unpacked once for all of them, and BATCH short groups together: what was just written is slow to load as a
# tile. More of them would not leave room in L1 for the rest.
cdef inline void short_groups_tiles(const uint8_t* panel, const float* scales, const uint8_t* zero_points,
                                    const uint8_t* a, Py_ssize_t stride, Py_ssize_t rows, float* acc,
                                    Py_ssize_t k, Py_ssize_t group, int deep) noexcept nogil:
    cdef float zeros[BATCH * PANEL]
    cdef const uint8_t* a_sums = a + DQ_CODES * units_of_row(k, group)
    cdef Py_ssize_t start = 0, units, count, i
    memset(acc, 0, rows * PANEL * sizeof(float))
    while start < k:
        units = units_of(group_len(start, k, group))
        count = BATCH if BATCH * units <= UNITS and BATCH * group <= k - start else 1
        for i in range(count * PANEL):
            zeros[i] = zero_points[i]
        if units <= UNITS:
            add_group_tiles(panel, scales, zeros, a, a_sums, stride, rows, acc, units, count, deep)
        else:
            add_long_group_tiles(panel, scales, zeros, a, a_sums, stride, rows, acc, units, deep)
        panel += 4 * PANEL * units * count
        a += DQ_CODES * units * count
        a_sums += count * <Py_ssize_t> sizeof(float)
        scales += PANEL * count
        zero_points += PANEL * count
        start += group * count


# The same for groups of more than EXACT k, one row at a time. A sum over EXACT k is exact as a float: it is
# taken as an integer from there, and its group's sum is rounded to a float once.
cdef inline void long_groups(const uint8_t* panel, const float* scales, const uint8_t* zero_points,
                             const uint8_t* a, float* acc, Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    cdef const float* a_sums = <const float*> (a + DQ_CODES * units_of_row(k, group))
    cdef float ones[PANEL]
    cdef float block[PANEL]
    cdef int64_t sums[PANEL]
    cdef dq_sums s0, s1
    cdef Py_ssize_t start = 0, n, b, c, units
    for c in range(PANEL):
        ones[c] = 1
    memset(acc, 0, PANEL * sizeof(float))
    while start < k:
        n = group_len(start, k, group)
        memset(sums, 0, sizeof(sums))
        for b in range(blocks_of(n)):
            units = units_of(exact_len(b, n))
            memset(block, 0, sizeof(block))
            group_tile_1(panel, a, &s0, &s1, units, 0)
            add_group(block, s0, s1, dq_zero_points_load(zero_points),
                      dq_zero_points_load(zero_points + DQ_LANES), a_sums[b], ones)
            for c in range(PANEL):
                sums[c] += <int64_t> block[c]
            panel += 4 * PANEL * units
            a += DQ_CODES * units
        for c in range(PANEL):
            acc[c] += <float> sums[c] * scales[c]
        a_sums += blocks_of(group)
        scales += PANEL
        zero_points += PANEL
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


# One panel times m rows of activations, cols <= PANEL; by tiles of `deep` steps, unless that is 0.
cdef inline void gemm_group_panel(const uint8_t* panel, const float* scales, const uint8_t* zero_points,
                                  const float* bias, const uint8_t* a, const float* a_scales, float* out,
                                  Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t cols, Py_ssize_t k,
                                  Py_ssize_t group, Py_ssize_t ahead, int deep) noexcept nogil:
    cdef float acc[BATCH_ROWS * PANEL]
    cdef Py_ssize_t stride = group_activation_bytes(k, group), rows
    while m > 0:
        rows = 1
        if deep:
            rows = m // ((m + BATCH_ROWS - 1) // BATCH_ROWS)
            short_groups_tiles(panel, scales, zero_points, a, stride, rows, acc, k, group, deep)
        elif group > EXACT:
            long_groups(panel, scales, zero_points, a, acc, k, group)
        elif m == 1:
            short_groups_1(panel, scales, zero_points, a, acc, k, group, ahead)
        else:
            rows = m if m < ROWS else ROWS
            short_groups_4(panel, scales, zero_points, a, stride, rows, acc, k, group)
        finish_rows(acc, a_scales, bias, out, out_stride, rows, cols)
        a += rows * stride
        a_scales += rows
        out += rows * out_stride
        m -= rows


# The panels of n outputs times m rows of activations: out[r][c] = acc * a_scales[r] + bias[c], rows of out
# `out_stride` apart, where acc is the float32 sum over the groups, in ascending order and from 0, of
# float32(exact sum of (code - zero_point) * a) * scale. No bias where it is NULL. A single row has codes
# fetched from `ahead` bytes on, unless that is 0.
cdef void gemm_u4s8_f32(const uint8_t* panels, const float* scales, const uint8_t* zero_points,
                        const float* bias, const uint8_t* a, const float* a_scales, float* out,
                        Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, Py_ssize_t group,
                        Py_ssize_t ahead) noexcept nogil:
    cdef Py_ssize_t each = groups_of(k, group) * PANEL, cols
    cdef int deep = deep_tiles(m, k, group)
    if deep:
        dq_tiles_begin(m if m < TILE else TILE, deep)
    while n > 0:
        cols = n if n < PANEL else PANEL
        gemm_group_panel(panels, scales, zero_points, bias, a, a_scales, out, out_stride, m, cols, k, group,
                         ahead, deep)
        panels += group_panel_bytes(k, group)
        scales += each
        zero_points += each
        if bias != NULL:
            bias += cols
        out += cols
        n -= cols
    if deep:
        dq_tiles_end()
