# Codes to floats.


# Values start .. start + n of one row, n <= BLOCK where it is packed; past the caches with `stream`.
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


def dequantize_rows(const int8_t[::1] codes not None, const float[::1] scales not None,
                    const uint8_t[::1] zero_points, bint packed, Py_ssize_t group,
                    float[:, ::1] out not None):
    """out = codes * scales; with zero points, for packed codes only, (codes - zero_points) * scales."""
    cdef Py_ssize_t r, k = out.shape[1]
    # Not in short groups: each of them would wait until its values have arrived.
    cdef bint nontemporal = out.shape[0] * k >= NONTEMPORAL_FROM and group >= BLOCK
    cdef QuantRow q
    cdef const uint8_t* z = NULL
    if out.shape[0] == 0 or k == 0:
        return
    check_codes(out.shape[0], k, packed, group, codes.shape[0], scales.shape[0], zero_points)
    if zero_points is not None:
        z = &zero_points[0]
    with nogil:
        for r in range(out.shape[0]):
            q = quant_row(&codes[0], &scales[0], z, packed, group, k, r)
            dequantize_row(&q, nontemporal, &out[r, 0], k)
