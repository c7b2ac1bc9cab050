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


# Rows to be quantized, and where to. in_range: each scale is that of its group's largest magnitude, so that
# no code needs clamping.
cdef struct RowsToCodes:
    Floats x
    CodeRows q
    Py_ssize_t rank, last_rank
    int32_t clip
    bint in_range


cdef inline QuantRow row_to_code(const RowsToCodes* rows, Py_ssize_t r) noexcept nogil:
    cdef QuantRow row = code_row(&rows.q, r)
    row.in_range = rows.in_range
    return row


# Units are rows.
cdef bint quantize_row_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const RowsToCodes* rows = <const RowsToCodes*> context
    cdef Py_ssize_t r
    cdef Floats row
    cdef QuantRow coded
    for r in range(first, end):
        row, coded = floats_at(&rows.x, r * rows.q.k, rows.q.k), row_to_code(rows, r)
        quantize_row(&row, &coded, rows.clip)
    return True


# The same with the scales of the rows; the second pass over a row reads from cache.
cdef bint dynamic_quantize_row_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const RowsToCodes* rows = <const RowsToCodes*> context
    cdef Py_ssize_t r
    cdef Floats row
    cdef QuantRow coded
    for r in range(first, end):
        row, coded = floats_at(&rows.x, r * rows.q.k, rows.q.k), row_to_code(rows, r)
        if not group_scales(&row, rows.clip, rows.rank, rows.last_rank, coded.group, <float*> coded.scales):
            return False
        quantize_row(&row, &coded, rows.clip)
    return True


# Units are the spans of the first row.
cdef bint quantize_span_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const RowsToCodes* rows = <const RowsToCodes*> context
    cdef Floats row = floats_at(&rows.x, 0, rows.q.k)
    cdef QuantRow coded = row_to_code(rows, 0)
    cdef Py_ssize_t i
    for i in range(first, end):
        quantize_span(&row, &coded, i * SPAN, min(rows.q.k, (i + 1) * SPAN), rows.clip)
    return True


# In one thread; an estimate for parallel_ranges.
cdef inline Py_ssize_t quantize_ns(Py_ssize_t n) noexcept nogil:
    return n // 8


def quantize_rows(FloatMatrix x not None, CodeMatrix q not None, int clip, bint in_range, int num_threads=1):
    """Codes of the rows by the scales of q.

    `in_range`: each scale is that of its group's largest magnitude, so that no code needs clamping.
    """
    cdef RowsToCodes rows
    if x.k == 0:
        return
    check_rows(x, q)
    rows.x, rows.q, rows.clip, rows.in_range = x.flat(), q.rows(), clip, in_range
    parallel_ranges(quantize_row_range, &rows, x.m, quantize_ns(rows.x.n), num_threads)


def dynamic_quantize_rows(FloatMatrix x not None, CodeMatrix q not None, int clip, Py_ssize_t rank,
                          Py_ssize_t last_rank, int num_threads=1):
    """Scales and codes of the rows. Returns whether they are finite; where not, some may be written."""
    cdef RowsToCodes rows
    if x.m == 0 or x.k == 0:
        memset(q.scales.buf, 0, q.scales.len)
        return True
    check_rows(x, q)
    rows.x, rows.q, rows.clip, rows.in_range = x.flat(), q.rows(), clip, rank < 0
    rows.rank, rows.last_rank = rank, last_rank
    if x.m == 1 and num_threads > 1 and q.group >= x.k > SPAN:
        return quantize_long_row(&rows, num_threads)
    return parallel_ranges(dynamic_quantize_row_range, &rows, x.m,
                           quantize_ns(rows.x.n) if rank < 0 else ranked_ns(rows.x.n), num_threads)


# One row with one scale: spans of it are shared, first for the scale and then for the codes.
cdef bint quantize_long_row(RowsToCodes* rows, int num_threads) except -1:
    cdef Py_ssize_t spans = (rows.q.k + SPAN - 1) // SPAN
    if not parallel_scale(&rows.x, rows.clip, rows.last_rank, rows.q.scales, num_threads):
        return False
    return parallel_ranges(quantize_span_range, rows, spans, quantize_ns(rows.x.n), num_threads)


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
