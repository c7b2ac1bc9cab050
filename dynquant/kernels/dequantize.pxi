# Codes to floats, and packed 4-bit codes to codes.


# out[i] = codes[i] * scale, rounded once. A long row begins with the elements before the next cache line,
# because vectors that straddle two lines are written at two thirds of the speed. With nontemporal the values
# are written past the caches and codes are prefetched: from memory that is twice as fast, since lines that
# are written need not be read first.
cdef void dequantize_row_s8_f32(const int8_t* codes, float scale, bint nontemporal, float* out,
                                Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0
    if nontemporal or n >= 16 * DQ_VALUES:
        i = before_line(out, n)
        dequantize_span(codes, scale, out, i)
    if nontemporal:
        while i + DQ_VALUES <= n:
            dq_prefetch(codes + i + 4 * PREFETCH_FLOATS, 1)
            dq_nontemporal_values(codes + i, scale, out + i)
            i += DQ_VALUES
        dq_nontemporal_end()
    dequantize_span(codes + i, scale, out + i, n - i)


cdef inline void dequantize_span(const int8_t* codes, float scale, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = <float> codes[i] * scale


# x[i] += y.
cdef void add_to_row_f32(float* x, float y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        x[i] += y


# packed (ceil(n / 2),) -> codes (n,), each nibble sign-extended, the low nibble first.
cdef void unpack_row_s4_s8(const uint8_t* packed, int8_t* codes, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n // 2):
        codes[2 * i] = <int8_t> (((packed[i] & 0x0F) ^ 8) - 8)
        codes[2 * i + 1] = <int8_t> (((packed[i] >> 4) ^ 8) - 8)
    if n % 2:
        codes[n - 1] = <int8_t> (((packed[n // 2] & 0x0F) ^ 8) - 8)


# Codes 0..15, as unpack_row_s4_s8 leaves them with a sign -> code - zero_point, in place.
cdef void shift_row_u4_s8(int8_t* codes, int32_t zero_point, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        codes[i] = <int8_t> ((codes[i] & 0x0F) - zero_point)
