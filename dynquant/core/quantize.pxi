# Floats to codes, by scales that are given or taken from the same rows.
cdef enum:
    SPAN = 16 * BLOCK  # floats: 256 KiB, which a core's own cache holds
    NONTEMPORAL_FROM = 1 << 23  # elements: from 32 MiB of floats on no cache holds a row until its codes are used


# Codes come as one run of bytes, row after row.
cdef inline Py_ssize_t bytes_of_row(Py_ssize_t k, bint packed) noexcept nogil:
    return (k + 1) // 2 if packed else k


# Of m rows of k elements.
cdef int check_codes(Py_ssize_t m, Py_ssize_t k, bint packed, Py_ssize_t group, Py_ssize_t codes,
                     Py_ssize_t scales, const uint8_t[::1] zero_points) except -1:
    cdef Py_ssize_t groups = m * ((k + group - 1) // group)
    check_size(codes, m * bytes_of_row(k, packed))
    check_size(scales, groups)
    if zero_points is not None:
        check_size(zero_points.shape[0], groups)
    return 0


# Row r of a tensor with rows of k elements.
cdef inline QuantRow quant_row(const int8_t* codes, const float* scales, const uint8_t* zero_points,
                               bint packed, Py_ssize_t group, Py_ssize_t k, Py_ssize_t r) noexcept nogil:
    cdef QuantRow row
    cdef Py_ssize_t groups = (k + group - 1) // group
    row.codes = <int8_t*> codes + r * bytes_of_row(k, packed)
    row.scales = scales + r * groups
    row.zero_points = NULL
    if zero_points != NULL:
        row.zero_points = zero_points + r * groups
    row.group, row.packed, row.in_range = group, packed, False
    return row


# Codes, a byte each, of floats start .. start + n, n <= BLOCK unless they are float32; zeros where the scale
# is 0.
cdef void quantize_block(const Floats* x, const QuantRow* row, Py_ssize_t start, Py_ssize_t n, int32_t clip,
                     bint nontemporal, int8_t* codes) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef const float* block = block_of(x, start, n, scratch)
    cdef Py_ssize_t i = start, g, end
    cdef float scale
    while i < start + n:
        g = i // row.group
        end = group_end(i, row.group, start + n)
        scale = row.scales[g]
        if scale == 0:
            memset(codes, 0, end - i)
        elif row.zero_points == NULL:
            kernels.quantize_row_f32_s8(block, scale, clip, row.in_range, nontemporal, codes, end - i)
        else:
            kernels.quantize_row_f32_u4(block, scale, row.zero_points[g], codes, end - i)
        block += end - i
        codes += end - i
        i = end


# Codes of floats start .. end of one row. A row that the caches cannot hold anyway has its codes written past
# them.
cdef void quantize_span(const Floats* x, const QuantRow* row, Py_ssize_t start, Py_ssize_t end,
                   int32_t clip) noexcept nogil:
    cdef int8_t block[BLOCK]
    cdef Py_ssize_t n
    while start < end:
        n = block_len(start, end) if row.packed else span_len(x, start, end)
        if row.packed:
            quantize_block(x, row, start, n, clip, False, block)
            kernels.pack_row_s8_s4(block, <uint8_t*> row.codes + start // 2, n)
        else:
            quantize_block(x, row, start, n, clip, row.group >= NONTEMPORAL_FROM, row.codes + start)
        start += n


# Codes of one row, its last run of 256 KiB first: what the pass for the scale read last is still in a core's
# own cache, and what this one reads last is there for the next. Shorter runs would undo the hardware's
# prefetching.
cdef void quantize_row(const Floats* x, const QuantRow* row, int32_t clip) noexcept nogil:
    cdef Py_ssize_t start = x.n - x.n % SPAN
    while start >= 0:
        quantize_span(x, row, start, x.n if x.n - start < SPAN else start + SPAN, clip)
        start -= SPAN


def quantize_rows(FloatMatrix x not None, scales not None, const uint8_t[::1] zero_points, int clip, bint in_range,
              bint packed, Py_ssize_t group, codes not None, Py_ssize_t first=0,
              Py_ssize_t end=PY_SSIZE_T_MAX):
    """Codes of rows first .. end, each group by its own scale; returns True.

    `within`: the scales are those of the largest magnitudes.
    """
    cdef Py_ssize_t r
    cdef Floats row
    cdef QuantRow q
    cdef RawBuffer s = RawBuffer(scales)
    cdef RawBuffer c = RawBuffer(codes)
    cdef const uint8_t* z = NULL
    if x.m == 0 or x.k == 0:
        return True
    check_codes(x.m, x.k, packed, group, c.view.len, s.view.len // <Py_ssize_t> sizeof(float), zero_points)
    if zero_points is not None:
        z = &zero_points[0]
    with nogil:
        for r in range(first, end if end < x.m else x.m):
            row = x.row(r)
            q = quant_row(<int8_t*> c.view.buf, <float*> s.view.buf, z, packed, group, x.k, r)
            q.in_range = in_range
            quantize_row(&row, &q, clip)
    return True


def dynamic_quantize_rows(FloatMatrix x not None, scales not None, int clip, Py_ssize_t rank, Py_ssize_t last_rank,
                  bint packed, Py_ssize_t group, codes not None, Py_ssize_t first=0,
                  Py_ssize_t end=PY_SSIZE_T_MAX):
    """Scales and codes of rows first .. end; a row's second pass reads from cache.

    Returns whether they are finite; stops at a row that is not, with the rows before it written.
    """
    cdef Py_ssize_t r
    cdef Floats row
    cdef QuantRow q
    cdef RawBuffer s = RawBuffer(scales)
    cdef RawBuffer c = RawBuffer(codes)
    cdef bint finite = True
    if x.m == 0 or x.k == 0:
        memset(s.view.buf, 0, s.view.len)
        return True
    check_codes(x.m, x.k, packed, group, c.view.len, s.view.len // <Py_ssize_t> sizeof(float), None)
    with nogil:
        for r in range(first, end if end < x.m else x.m):
            row = x.row(r)
            q = quant_row(<int8_t*> c.view.buf, <float*> s.view.buf, NULL, packed, group, x.k, r)
            q.in_range = rank < 0
            finite = group_scales(&row, clip, rank, last_rank, group, <float*> q.scales)
            if not finite:
                break
            quantize_row(&row, &q, clip)
    return finite


def quantize_u8(FloatMatrix x not None, float scale, int zero_point, uint8_t[::1] codes not None):
    """codes = clip(round half even (x / scale) + zero_point, 0, 255)."""
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    cdef Floats flat = x.flat()
    with nogil:
        while start < flat.n:
            n = block_len(start, flat.n)
            kernels.quantize_row_f32_u8(block_of(&flat, start, n, scratch), scale, zero_point,
                                        &codes[start], n)
            start += n
