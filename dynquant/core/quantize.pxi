# Floats to codes, by scales that are given or taken from the same rows.
cdef enum:
    SPAN = 16 * BLOCK  # floats: 256 KiB, which a core's own cache holds
    NONTEMPORAL_FROM = 1 << 23  # elements: no cache holds 32 MiB of floats until their codes are used


# Codes, a byte each, of floats start .. start + n, with n <= BLOCK unless they are float32. A scale of 0
# gives zeros.
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


# Codes of floats start .. end of one row. Codes of a row that no cache can hold are written past the caches.
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


# Codes of one row, its last span of 256 KiB first: what the pass for the scale has read last is still in the
# core's own cache, and what this one reads last is there for the next. Shorter spans would undo the
# hardware's prefetching.
cdef void quantize_row(const Floats* x, const QuantRow* row, int32_t clip) noexcept nogil:
    cdef Py_ssize_t start = x.n - x.n % SPAN
    while start >= 0:
        quantize_span(x, row, start, x.n if x.n - start < SPAN else start + SPAN, clip)
        start -= SPAN


def quantize_rows(FloatMatrix x not None, CodeMatrix q not None, int clip, bint in_range, Py_ssize_t first=0,
                  Py_ssize_t end=PY_SSIZE_T_MAX):
    """Codes of rows first .. end by the scales of q; returns True.

    `in_range`: each scale is that of its group's largest magnitude, so that no code needs clamping.
    """
    cdef Py_ssize_t r
    cdef Floats row
    cdef QuantRow coded
    if x.k == 0:
        return True
    check_rows(x, q)
    with nogil:
        for r in range(first, end if end < x.m else x.m):
            row, coded = x.row(r), q.row(r)
            coded.in_range = in_range
            quantize_row(&row, &coded, clip)
    return True


def dynamic_quantize_rows(FloatMatrix x not None, CodeMatrix q not None, int clip, Py_ssize_t rank,
                          Py_ssize_t last_rank, Py_ssize_t first=0, Py_ssize_t end=PY_SSIZE_T_MAX):
    """Scales and codes of rows first .. end; the second pass over a row reads from cache.

    Returns whether they are finite. Stops at a row that is not, with the rows before it written.
    """
    cdef Py_ssize_t r
    cdef Floats row
    cdef QuantRow coded
    cdef bint finite = True
    if x.m == 0 or x.k == 0:
        memset(q.scales.buf, 0, q.scales.len)
        return True
    check_rows(x, q)
    with nogil:
        for r in range(first, end if end < x.m else x.m):
            row, coded = x.row(r), q.row(r)
            coded.in_range = rank < 0
            finite = group_scales(&row, clip, rank, last_rank, q.group, <float*> coded.scales)
            if not finite:
                break
            quantize_row(&row, &coded, clip)
    return finite


cdef int check_rows(FloatMatrix x, CodeMatrix q) except -1:
    check_size(q.m * q.k, x.m * x.k)
    return 0


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
