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
        kernels.dequantize_row_s8_f32(codes, row.scales[g], nontemporal, out, end - i)
        codes += end - i
        out += end - i
        i = end


cdef void dequantize_row(const QuantRow* row, bint nontemporal, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t start = 0, count
    while start < n:
        count = block_len(start, n) if row.packed else n
        dequantize_block(row, start, nontemporal, out + start, count)
        start += count


def dequantize_rows(CodeMatrix q not None, out not None):
    """out = codes * scales, or (codes - zero_points) * scales; only packed codes have zero points."""
    cdef RawBuffer o = RawBuffer(out)
    cdef Py_ssize_t r
    # Not in short groups: each would wait until its values have been written.
    cdef bint nontemporal = q.m * q.k >= NONTEMPORAL_FROM and q.group >= BLOCK
    cdef QuantRow row
    check_size(o.view.len, q.m * q.k * <Py_ssize_t> sizeof(float))
    if q.k == 0:
        return
    with nogil:
        for r in range(q.m):
            row = q.row(r)
            dequantize_row(&row, nontemporal, <float*> o.view.buf + r * q.k, q.k)
