# Codes to floats.


# Values start .. start + n of one row, with n <= BLOCK where it is packed.
cdef void dequantize_block(const QuantRow* row, Py_ssize_t start, bint nontemporal, float* out,
                           Py_ssize_t n) noexcept nogil:
    cdef int8_t unpacked[BLOCK + 1]
    cdef int8_t* codes = row.codes + start
    cdef Py_ssize_t i = start, g, end, odd = start % 2
    if row.packed:
        kernels.unpack_row_s4_s8(<const uint8_t*> row.codes + start // 2, unpacked, n + odd)
        codes = unpacked + odd
    while i < start + n:
        g = i // row.group
        end = group_end(i, row.group, start + n)
        if row.zero_points != NULL:
            kernels.shift_row_u4_s8(codes, row.zero_points[g], end - i)
        elif row.minimums != NULL:
            kernels.shift_row_u4_s8(codes, 0, end - i)
        kernels.dequantize_row_s8_f32(codes, row.scales[g], nontemporal, out, end - i)
        if row.minimums != NULL:
            kernels.add_to_row_f32(out, row.minimums[g], end - i)
        codes += end - i
        out += end - i
        i = end


# Values start .. end of one row, whose values begin at `out`.
cdef void dequantize_span(const QuantRow* row, bint nontemporal, float* out, Py_ssize_t start,
                          Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t n
    while start < end:
        n = block_len(start, end) if row.packed else end - start
        dequantize_block(row, start, nontemporal, out + start, n)
        start += n


cdef void dequantize_row(const QuantRow* row, bint nontemporal, float* out, Py_ssize_t n) noexcept nogil:
    dequantize_span(row, nontemporal, out, 0, n)


# Rows of codes whose values go to `out`.
cdef struct RowsToValues:
    CodeRows q
    float* out
    bint nontemporal


cdef inline Py_ssize_t spans_of_row(Py_ssize_t k) noexcept nogil:
    return (k + SPAN - 1) // SPAN


# Units are spans of the rows.
cdef bint dequantize_span_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const RowsToValues* rows = <const RowsToValues*> context
    cdef Py_ssize_t k = rows.q.k, spans = spans_of_row(k), i, r, start
    cdef QuantRow row
    for i in range(first, end):
        r, start = i // spans, i % spans * SPAN
        row = code_row(&rows.q, r)
        dequantize_span(&row, rows.nontemporal, rows.out + r * k, start, min(k, start + SPAN))
    return True


def dequantize_rows(CodeMatrix q not None, out not None, int num_threads=1):
    """out = codes * scales, (codes - zero_points) * scales, or codes * scales + minimums."""
    cdef RawBuffer o = RawBuffer(out)
    cdef RowsToValues rows
    cdef Py_ssize_t n = q.m * q.k
    check_size(o.view.len, n * <Py_ssize_t> sizeof(float))
    rows.q, rows.out = q.rows(), <float*> o.view.buf
    # Not in short groups: each would wait until its values have been written. Minimums are added to them.
    rows.nontemporal = n >= NONTEMPORAL_FROM and q.group >= BLOCK and not q.minimums
    parallel_ranges(dequantize_span_range, &rows, q.m * spans_of_row(q.k), quantize_ns(n), num_threads)
