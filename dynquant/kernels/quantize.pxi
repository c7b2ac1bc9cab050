# Floats to codes, and codes to packed 4-bit codes.


# code = round half away (clamp(x / scale, -clip, clip)), the definition itself: one true division for each
# code.
cdef void divide_round_row(const float* x, float scale, int32_t clip, int8_t* codes,
                           Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef float v, min_code = -clip, max_code = clip
    for i in range(n):
        v = x[i] / scale
        v = min_code if v < min_code else v
        v = max_code if v > max_code else v
        codes[i] = <int8_t> <int32_t> (v + copysignf(<float> DQ_BELOW_HALF, v))


# Codes of DQ_QUANTIZE_STEP floats.
cdef inline void quantize_step(const float* x, float scale, float lo, float hi, int32_t clip, bint in_range,
                               bint nontemporal, int8_t* codes) noexcept nogil:
    if dq_quantize_step(x, lo, hi, clip, in_range, nontemporal, codes):
        divide_round_row(x, scale, clip, codes, DQ_QUANTIZE_STEP)


# Codes of n >= DQ_QUANTIZE_STEP floats, in steps from `start` < DQ_QUANTIZE_STEP on. One more step begins at
# 0, and one ends with the row; these two may write the same codes again. in_range and nontemporal are
# constants in every call, so that each loop has one kind of store. A long row is prefetched, which makes
# memory a sixth faster; in the caches it would cost that much.
cdef inline void quantize_steps(const float* x, float scale, float lo, float hi, int32_t clip, bint in_range,
                                bint nontemporal, Py_ssize_t start, int8_t* codes,
                                Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = start, last = n - DQ_QUANTIZE_STEP
    if start:
        quantize_step(x, scale, lo, hi, clip, in_range, False, codes)
    while i < last:
        if nontemporal:
            dq_prefetch(x + i + PREFETCH_FLOATS, DQ_QUANTIZE_STEP * sizeof(float))
        quantize_step(x + i, scale, lo, hi, clip, in_range, nontemporal, codes + i)
        i += DQ_QUANTIZE_STEP
    quantize_step(x + last, scale, lo, hi, clip, in_range, False, codes + last)


# x (n,), scale > 0 -> codes (n,) in [-clip, clip], exactly those of divide_round_row. A division costs as
# much as everything else, so it is done only where it decides. With r = fl(1 / scale), lo = fl(r * (1 -
# 2**-21)) and hi = fl(r * (1 + 2**-21)), each rounding being at most 2**-24,
#     |x * lo| < |x / scale| * (1 - 5 * 2**-24) < |fl(x / scale)| < |x / scale| * (1 + 5 * 2**-24) < |x * hi|.
# Rounding is monotonic. So where x * lo and x * hi round to one integer, fl(x / scale) rounds to it too. It
# is then not halfway between two integers, so how halves are rounded does not matter. Of random floats two
# to five in 10**5 fail this test, and their whole step is then divided. The bounds need normal r, lo and
# hi, hence the range of scale. With in_range no |x| is above the magnitude whose quotient by clip, rounded,
# is `scale`. x * hi is then at most clip * (1 + 2**-20), which rounds to clip, and codes need no clamping.
# With nontemporal the codes of a long row are written past the caches. Loads that straddle cache lines cost
# up to a fifth of the speed. So the steps of a long row start at a cache line, or, where codes are written
# past the caches, at an aligned code. A short row would not make up for the additional step.
cdef void quantize_row_f32_s8(const float* x, float scale, int32_t clip, bint in_range, bint nontemporal,
                              int8_t* codes, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t start = 0
    cdef float r, lo, hi
    if n < DQ_QUANTIZE_STEP or not DQ_MIN_SCALE <= scale <= DQ_MAX_SCALE:
        divide_round_row(x, scale, clip, codes, n)
        return
    r = <float> 1.0 / scale
    lo = r * DQ_BELOW_1
    hi = r * DQ_ABOVE_1
    if n < 8 * DQ_QUANTIZE_STEP:
        nontemporal = False
    else:
        start = -(<Py_ssize_t> codes if nontemporal else <Py_ssize_t> x >> 2) & (DQ_QUANTIZE_STEP - 1)
    if nontemporal:
        quantize_steps(x, scale, lo, hi, clip, False, True, start, codes, n)
        dq_nontemporal_end()
    elif in_range:
        quantize_steps(x, scale, lo, hi, clip, True, False, start, codes, n)
    else:
        quantize_steps(x, scale, lo, hi, clip, False, False, start, codes, n)


# codes = clip(round half even (x / scale) + zero_point, 0, 255), as ONNX DynamicQuantizeLinear has it.
# The bounds are integers, so the quotient may be clamped before it is rounded. Adding DQ_MAGIC rounds it.
cdef void quantize_row_f32_u8(const float* x, float scale, int32_t zero_point, uint8_t* codes,
                              Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef float v, min_code = -zero_point, max_code = 255 - zero_point
    for i in range(n):
        v = x[i] / scale
        v = min_code if v < min_code else v
        v = max_code if v > max_code else v
        codes[i] = <uint8_t> ((dq_bits(v + <float> DQ_MAGIC) + zero_point) & 0xFF)


# x (n,), scale > 0 -> codes (n,) = clamp(round half away (x / scale) + zero_point, 0, 15): the int4 of
# weights. The bounds are integers, so the quotient may be clamped before it is rounded, as in
# divide_round_row.
cdef void quantize_row_f32_u4(const float* x, float scale, int32_t zero_point, int8_t* codes,
                              Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef float v, min_code = -zero_point, max_code = 15 - zero_point
    for i in range(n):
        v = x[i] / scale
        v = min_code if v < min_code else v
        v = max_code if v > max_code else v
        codes[i] = <int8_t> (<int32_t> (v + copysignf(<float> DQ_BELOW_HALF, v)) + zero_point)


# codes (n,) in [-8, 15] -> packed (ceil(n / 2),): the even element in the low nibble, an odd last one alone.
cdef void pack_row_s8_s4(const int8_t* codes, uint8_t* packed, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n // 2):
        packed[i] = (codes[2 * i] & 0x0F) | <uint8_t> (<uint8_t> codes[2 * i + 1] << 4)
    if n % 2:
        packed[n // 2] = codes[n - 1] & 0x0F
