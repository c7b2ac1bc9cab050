# The block types of GGUF: 32 floats to a float16 scale and their codes, rounded as ggml's reference does it
# (ggml-quants.c), byte for byte. Codes come from a product with the reciprocal of the scale before that is
# rounded to float16, so they are not those of a division by the stored scale.
cdef enum:
    GGUF_BLOCK = 32
    HALF_INFINITY = 0x7C00


# x as float16, half to even; NaN is not among the inputs.
cdef inline uint16_t half_of(float x) noexcept nogil:
    cdef uint32_t b = <uint32_t> dq_bits(x), sign = b >> 16 & 0x8000
    b &= 0x7FFFFFFF
    if b >= 0x47800000:  # 65536
        return <uint16_t> (sign | HALF_INFINITY)
    if b < 0x38800000:  # 2**-14: the sum with 0.5 rounds to multiples of 2**-24, float16's smallest
        b = <uint32_t> dq_bits(dq_float(<int32_t> b) + <float> 0.5) - 0x3F000000
    else:  # another bias of the exponent, and 13 bits less
        b = (b - 0x38000000 + 0xFFF + (b >> 13 & 1)) >> 13
    return <uint16_t> (sign | b)


# Store a float16; returns whether it is finite.
cdef inline bint put_half(float x, uint8_t* out) noexcept nogil:
    cdef uint16_t h = half_of(x)
    out[0], out[1] = <uint8_t> (h & 0xFF), <uint8_t> (h >> 8)
    return h & HALF_INFINITY != HALF_INFINITY


# 1 / d, or 0 where that is none in float32: of a d that small float16 keeps nothing.
cdef inline float reciprocal_or_0(float d) noexcept nogil:
    cdef float r = 0
    if d != 0:
        r = 1 / d
    return r if dq_bits(r) & 0x7FFFFFFF < 0x7F800000 else 0


# x (n,), finite, n a multiple of 32 -> blocks of 34 bytes: d, then codes round(x / d), halves away from zero,
# for the d that maps the largest magnitude to 127. Returns whether every d is finite in float16.
cdef bint quantize_row_q8_0(const float* x, uint8_t* blocks, Py_ssize_t n) noexcept nogil:
    cdef int32_t codes[GGUF_BLOCK]
    cdef float d, r, v
    cdef Py_ssize_t start = 0
    cdef int i
    cdef bint finite = True
    while start < n:
        d = dq_float(amax_of_span(x + start, GGUF_BLOCK)) / 127
        r = reciprocal_or_0(d)
        finite &= put_half(d, blocks)
        for i in range(GGUF_BLOCK):
            v = x[start + i] * r
            codes[i] = <int32_t> (v + copysignf(<float> DQ_BELOW_HALF, v))
        for i in range(GGUF_BLOCK):
            blocks[2 + i] = <uint8_t> codes[i]
        start += GGUF_BLOCK
        blocks += 2 + GGUF_BLOCK
    return finite


# Float bits in the order of the numbers, as integers, and back; -0.0 comes before 0.0.
cdef inline int32_t ordered_bits(int32_t b) noexcept nogil:
    return b ^ (b >> 31 & 0x7FFFFFFF)


# The least and the largest of 32 floats.
cdef inline void range_of_block(const float* x, float* x_min, float* x_max) noexcept nogil:
    cdef int32_t low = 0x7FFFFFFF, high = <int32_t> 0x80000000, b
    cdef int i
    for i in range(GGUF_BLOCK):
        b = ordered_bits(dq_bits(x[i]))
        low = b if b < low else low
        high = b if b > high else high
    x_min[0], x_max[0] = dq_float(ordered_bits(low)), dq_float(ordered_bits(high))


# The first of 32 floats that equals v.
cdef inline float first_equal(const float* x, float v) noexcept nogil:
    cdef int i
    for i in range(GGUF_BLOCK):
        if x[i] == v:
            return x[i]
    return v


# The first of 32 floats whose magnitude is the largest; 0.0 where all are zeros. Which sign that has is as
# good as random, so it is chosen without a branch.
cdef inline float first_largest(const float* x) noexcept nogil:
    cdef float x_min, x_max
    cdef int i
    range_of_block(x, &x_min, &x_max)
    if x_max != -x_min:
        return dq_float(dq_bits(x_max) if x_max > -x_min else dq_bits(x_min))
    for i in range(GGUF_BLOCK):
        if x[i] == x_min or x[i] == x_max:
            return x[i] if x_max else 0
    return 0


# codes, 0 .. 15 or 16, which becomes 15 -> 16 bytes: the first 16 in the low nibbles, the others in the high
# ones, eight at a time.
cdef inline void pack_halves(const int32_t* codes, uint8_t* packed) noexcept nogil:
    cdef uint8_t narrow[GGUF_BLOCK]
    cdef uint64_t words[4]
    cdef int32_t code
    cdef int i
    for i in range(GGUF_BLOCK):
        code = codes[i]
        narrow[i] = <uint8_t> (code if code < 15 else 15)
    memcpy(words, narrow, GGUF_BLOCK)
    words[0] |= words[2] << 4
    words[1] |= words[3] << 4
    memcpy(packed, words, GGUF_BLOCK // 2)


# x (n,), finite, n a multiple of 32 -> blocks of 18 bytes: d, then codes x / d + 8 for the d that maps the
# first value of the largest magnitude to 0. Returns whether every d is finite in float16.
cdef bint quantize_row_q4_0(const float* x, uint8_t* blocks, Py_ssize_t n) noexcept nogil:
    cdef int32_t codes[GGUF_BLOCK]
    cdef float d, r
    cdef Py_ssize_t start = 0
    cdef int i
    cdef bint finite = True
    while start < n:
        d = first_largest(x + start) / -8
        r = reciprocal_or_0(d)
        finite &= put_half(d, blocks)
        for i in range(GGUF_BLOCK):
            codes[i] = <int32_t> (x[start + i] * r + <float> 8.5)
        pack_halves(codes, blocks + 2)
        start += GGUF_BLOCK
        blocks += 2 + GGUF_BLOCK // 2
    return finite


# x (n,), finite, n a multiple of 32 -> blocks of 20 bytes: d, the minimum m, then codes (x - m) / d for the d
# that maps the maximum to 15. Returns whether every d and m is finite in float16; where one is not, blocks
# are arbitrary.
cdef bint quantize_row_q4_1(const float* x, uint8_t* blocks, Py_ssize_t n) noexcept nogil:
    cdef int32_t codes[GGUF_BLOCK]
    cdef float d, r, x_min, x_max
    cdef Py_ssize_t start = 0
    cdef int i
    cdef bint finite = True
    while start < n:
        range_of_block(x + start, &x_min, &x_max)
        if x_min == 0:
            x_min = first_equal(x + start, 0)  # of 0.0 and -0.0 the one that a comparison of floats keeps
        d = (x_max - x_min) / 15
        if dq_bits(d) >= 0x7F800000:
            return False  # codes would be those of infinity times 0
        r = reciprocal_or_0(d)
        finite &= put_half(d, blocks)
        finite &= put_half(x_min, blocks + 2)
        for i in range(GGUF_BLOCK):
            codes[i] = <int32_t> ((x[start + i] - x_min) * r + <float> 0.5)
        pack_halves(codes, blocks + 4)
        start += GGUF_BLOCK
        blocks += 4 + GGUF_BLOCK // 2
    return finite
