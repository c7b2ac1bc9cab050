/* Thin layers on AVX2: kernels/wide.pxi. Rows of activations are short, so eight of them are taken together. */

#define DQ_THIN

/* From eight vectors one: `op` over the lanes of each. */
#define DQ_ACROSS_8(name, op) \
    DQ_INLINE __m256i name(const __m256i* v) { \
        __m256i two[4], four[2]; \
        for (int i = 0; i < 4; i++) \
            two[i] = op(_mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1])); \
        for (int i = 0; i < 2; i++) \
            four[i] = op(_mm256_unpacklo_epi64(two[2 * i], two[2 * i + 1]), \
                         _mm256_unpackhi_epi64(two[2 * i], two[2 * i + 1])); \
        return op(_mm256_permute2x128_si256(four[0], four[1], 0x20), \
                  _mm256_permute2x128_si256(four[0], four[1], 0x31)); \
    }
DQ_ACROSS_8(dq_max_of_8, _mm256_max_epi32)
DQ_ACROSS_8(dq_sum_of_8, _mm256_add_epi32)

/* The first n lanes. */
DQ_INLINE __m256i dq_first_lanes(ptrdiff_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
DQ_INLINE __m256i dq_magnitudes(const float* x) {
    return _mm256_and_si256(_mm256_loadu_si256((const __m256i*)x), _mm256_set1_epi32(0x7FFFFFFF));
}
DQ_INLINE __m256i dq_magnitudes_of(const float* x, __m256i lanes) {
    return _mm256_and_si256(_mm256_maskload_epi32((const int*)x, lanes), _mm256_set1_epi32(0x7FFFFFFF));
}
/* int16 codes of 16 floats, in order. */
DQ_INLINE void dq_store_codes_16(__m256i a, __m256i b, int16_t* codes) {
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
    _mm256_storeu_si256((__m256i*)codes, both);
}

/* Scales of eight rows by their largest magnitudes, as bits, and the bounds of the reciprocals. A scale of 0 has
   reciprocals of 0, and so codes of 0. */
enum { DQ_NOT_FINITE, DQ_QUICK, DQ_BY_DIVISION };
DQ_INLINE int dq_row_scales(__m256i amax, float* scales, float* lo, float* hi) {
    const __m256i above = _mm256_cmpgt_epi32(amax, _mm256_set1_epi32(0x7F7FFFFF));
    if (!_mm256_testz_si256(above, above)) return DQ_NOT_FINITE;
    const __m256 scale = _mm256_div_ps(_mm256_castsi256_ps(amax), _mm256_set1_ps(127));
    const __m256 zero = _mm256_cmp_ps(scale, _mm256_setzero_ps(), _CMP_EQ_OQ);
    const __m256 reciprocal = _mm256_andnot_ps(zero, _mm256_div_ps(_mm256_set1_ps(1), scale));
    const __m256 normal = _mm256_and_ps(_mm256_cmp_ps(scale, _mm256_set1_ps(DQ_MIN_SCALE), _CMP_GE_OQ),
                                        _mm256_cmp_ps(scale, _mm256_set1_ps(DQ_MAX_SCALE), _CMP_LE_OQ));
    _mm256_storeu_ps(scales, scale);
    _mm256_storeu_ps(lo, _mm256_mul_ps(reciprocal, _mm256_set1_ps(DQ_BELOW_1)));
    _mm256_storeu_ps(hi, _mm256_mul_ps(reciprocal, _mm256_set1_ps(DQ_ABOVE_1)));
    return _mm256_movemask_ps(_mm256_or_ps(normal, zero)) == 0xFF ? DQ_QUICK : DQ_BY_DIVISION;
}

/* The definition of codes. */
DQ_INLINE __m256i dq_divided(__m256 x, __m256 scale) {
    const __m256 sign = _mm256_set1_ps(-0.0f), half = _mm256_set1_ps(DQ_BELOW_HALF);
    x = _mm256_div_ps(x, scale);
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-127)), _mm256_set1_ps(127));
    return _mm256_cvttps_epi32(_mm256_add_ps(x, _mm256_or_ps(_mm256_and_ps(x, sign), half)));
}
static inline void dq_divide_row(const float* x, ptrdiff_t k, float scale, int16_t* codes) {
    const __m256 divisor = _mm256_set1_ps(scale > 0 ? scale : 1); /* with scale 0 all floats are nearly 0 */
    for (ptrdiff_t i = 0; i < k; i += 8) {
        const __m256i code = dq_divided(_mm256_maskload_ps(x + i, dq_first_lanes(k - i)), divisor);
        const __m128i low = _mm256_castsi256_si128(code), high = _mm256_extracti128_si256(code, 1);
        _mm_storeu_si128((__m128i*)(codes + i), _mm_packs_epi32(low, high));
    }
}

/* Codes of eight floats; where the bounds do not round to one integer, bits of *differ are set. */
DQ_INLINE __m256i dq_codes_8(__m256 x, __m256 lo, __m256 hi, __m256i* differ) {
    const __m256 magic = _mm256_set1_ps(DQ_MAGIC);
    const __m256i low = _mm256_castps_si256(_mm256_fmadd_ps(x, lo, magic));
    const __m256i high = _mm256_castps_si256(_mm256_fmadd_ps(x, hi, magic));
    *differ = _mm256_or_si256(*differ, _mm256_xor_si256(low, high));
    return _mm256_sub_epi32(low, _mm256_set1_epi32(DQ_MAGIC_BITS));
}

/* The largest magnitudes of the lanes of a row: of at most 8 floats (`vectors` 1), of at most 16 (2), or of more (0). The
   last k % 8 floats, or 8 where there is one vector or two of them, are those of the mask `last`. */
DQ_INLINE __m256i dq_row_maxima(const float* x, ptrdiff_t k, int vectors, __m256i last) {
    if (vectors == 1) return dq_magnitudes_of(x, last);
    if (vectors == 2) return _mm256_max_epi32(dq_magnitudes(x), dq_magnitudes_of(x + 8, last));
    __m256i a = dq_magnitudes_of(x + k / 8 * 8, last), b = _mm256_setzero_si256(), c = b, d = b;
    ptrdiff_t i = 0;
    for (; i + 32 <= k; i += 32) {
        a = _mm256_max_epi32(a, dq_magnitudes(x + i));
        b = _mm256_max_epi32(b, dq_magnitudes(x + i + 8));
        c = _mm256_max_epi32(c, dq_magnitudes(x + i + 16));
        d = _mm256_max_epi32(d, dq_magnitudes(x + i + 24));
    }
    for (; i + 8 <= k; i += 8) b = _mm256_max_epi32(b, dq_magnitudes(x + i));
    return _mm256_max_epi32(_mm256_max_epi32(a, b), _mm256_max_epi32(c, d));
}

/* Codes of a row; what is `ahead` is fetched. */
DQ_INLINE void dq_codes_of_row(const float* x, ptrdiff_t k, __m256i last, __m256 lo, __m256 hi, ptrdiff_t ahead,
                               int16_t* codes, __m256i* differ) {
    __m256i a, b;
    ptrdiff_t i = 0;
    for (; i + 16 <= k; i += 16) {
        dq_prefetch(x + i + ahead, 64);
        a = dq_codes_8(_mm256_loadu_ps(x + i), lo, hi, differ);
        b = dq_codes_8(_mm256_loadu_ps(x + i + 8), lo, hi, differ);
        dq_store_codes_16(a, b, codes + i);
    }
    if (k % 16 >= 8) {
        a = dq_codes_8(_mm256_loadu_ps(x + i), lo, hi, differ);
        b = dq_codes_8(_mm256_maskload_ps(x + i + 8, last), lo, hi, differ);
        dq_store_codes_16(a, b, codes + i);
    } else if (k % 16) {
        a = dq_codes_8(_mm256_maskload_ps(x + i, last), lo, hi, differ);
        dq_store_codes_16(a, _mm256_setzero_si256(), codes + i);
    }
}

/* Two rows. */
DQ_INLINE void dq_codes_of_rows(const float* x, ptrdiff_t k, int vectors, __m256i last, const float* lo, const float* hi,
                                ptrdiff_t ahead, int16_t* codes, ptrdiff_t stride, __m256i* differ) {
    const __m256 lo0 = _mm256_broadcast_ss(lo), hi0 = _mm256_broadcast_ss(hi);
    const __m256 lo1 = _mm256_broadcast_ss(lo + 1), hi1 = _mm256_broadcast_ss(hi + 1);
    if (vectors == 1) {
        const __m256i a = dq_codes_8(_mm256_maskload_ps(x, last), lo0, hi0, differ);
        const __m256i b = dq_codes_8(_mm256_maskload_ps(x + k, last), lo1, hi1, differ);
        dq_store_codes_16(a, b, codes);
    } else if (vectors == 2) {
        __m256i a = dq_codes_8(_mm256_loadu_ps(x), lo0, hi0, differ);
        __m256i b = dq_codes_8(_mm256_maskload_ps(x + 8, last), lo0, hi0, differ);
        dq_store_codes_16(a, b, codes);
        a = dq_codes_8(_mm256_loadu_ps(x + k), lo1, hi1, differ);
        b = dq_codes_8(_mm256_maskload_ps(x + k + 8, last), lo1, hi1, differ);
        dq_store_codes_16(a, b, codes + 16);
    } else {
        dq_codes_of_row(x, k, last, lo0, hi0, ahead, codes, differ);
        dq_codes_of_row(x + k, k, last, lo1, hi1, ahead, codes + stride, differ);
    }
}

/* First the scales of all rows, and then their codes: neither then waits for a division. Eight rows are taken at once;
   where the last ones are fewer, some before them are done again. */
DQ_INLINE int dq_quantize_8_rows_each(const float* x, ptrdiff_t rows, ptrdiff_t k, int vectors, int16_t* codes,
                                      ptrdiff_t stride, float* scales) {
    const __m256i last = dq_first_lanes(vectors ? k - 8 * (vectors - 1) : k % 8);
    __m256i maxima[8], differ;
    float lo[DQ_WIDE_BATCH], hi[DQ_WIDE_BATCH];
    int quick = 1;
    for (ptrdiff_t r = 0; r < rows; r += 8) {
        const ptrdiff_t first = r + 8 <= rows ? r : rows - 8;
        for (int i = 0; i < 8; i++) maxima[i] = dq_row_maxima(x + (first + i) * k, k, vectors, last);
        const int kind = dq_row_scales(dq_max_of_8(maxima), scales + first, lo + first, hi + first);
        if (kind == DQ_NOT_FINITE) return 0;
        quick &= kind == DQ_QUICK;
    }
    for (ptrdiff_t r = 0; r < rows; r += 8) {
        const ptrdiff_t first = r + 8 <= rows ? r : rows - 8;
        differ = _mm256_setzero_si256();
        for (ptrdiff_t i = first; i < first + 8; i += 2)
            dq_codes_of_rows(x + i * k, k, vectors, last, lo + i, hi + i, rows * k, codes + i * stride, stride, &differ);
        if (quick && _mm256_testz_si256(differ, differ)) continue;
        for (ptrdiff_t i = first; i < first + 8; i++) dq_divide_row(x + i * k, k, scales[i], codes + i * stride);
    }
    return 1;
}

/* A row at a time, whose second pass then reads from L1. */
#define DQ_SPAN_FLOATS 256
static inline int dq_quantize_long_rows(const float* x, ptrdiff_t rows, ptrdiff_t k, int16_t* codes, ptrdiff_t stride,
                                        float* scales) {
    const __m256i last = dq_first_lanes(k % 8);
    __m256i maxima[8], differ;
    float scale[8], lo[8], hi[8];
    for (ptrdiff_t r = 0; r < rows; r++, x += k, codes += stride) {
        for (int i = 0; i < 8; i++) maxima[i] = i ? maxima[0] : dq_row_maxima(x, k, 0, last);
        const int kind = dq_row_scales(dq_max_of_8(maxima), scale, lo, hi);
        if (kind == DQ_NOT_FINITE) return 0;
        scales[r] = scale[0];
        for (ptrdiff_t i = 0; i < k; i += DQ_SPAN_FLOATS) { /* a span has to be divided now and then */
            const ptrdiff_t n = k - i < DQ_SPAN_FLOATS ? k - i : DQ_SPAN_FLOATS;
            differ = _mm256_setzero_si256();
            dq_codes_of_row(x + i, n, last, _mm256_set1_ps(lo[0]), _mm256_set1_ps(hi[0]), k, codes + i, &differ);
            if (kind == DQ_BY_DIVISION || !_mm256_testz_si256(differ, differ)) dq_divide_row(x + i, n, scale[0], codes + i);
        }
    }
    return 1;
}

static inline int dq_quantize_rows(const float* x, ptrdiff_t rows, ptrdiff_t k, int16_t* codes, ptrdiff_t stride,
                                   float* scales) {
    if (rows < 8 || k > 512) return dq_quantize_long_rows(x, rows, k, codes, stride, scales);
    if (k <= 8) return dq_quantize_8_rows_each(x, rows, k, 1, codes, stride, scales);
    if (k <= 16) return dq_quantize_8_rows_each(x, rows, k, 2, codes, stride, scales);
    return dq_quantize_8_rows_each(x, rows, k, 0, codes, stride, scales);
}

DQ_INLINE void dq_dots_of(int n, const int16_t* a, ptrdiff_t stride, const int16_t* w, ptrdiff_t w_stride, ptrdiff_t k,
                          int32_t* sums) {
    __m256i lanes[DQ_WIDE_ROWS * DQ_WIDE_DOTS];
    for (int r = 0; r < DQ_WIDE_ROWS; r++, a += stride) {
        __m256i* acc = lanes + r * n;
        for (int c = 0; c < n; c++) acc[c] = _mm256_setzero_si256();
        for (ptrdiff_t i = 0; i < k; i += 16) {
            const __m256i codes = _mm256_loadu_si256((const __m256i*)(a + i));
            for (int c = 0; c < n; c++)
                acc[c] = dq_multiply_add_wide(acc[c], _mm256_loadu_si256((const __m256i*)(w + c * w_stride + i)), codes);
        }
    }
    for (int i = 0; i < DQ_WIDE_ROWS * n; i += 8) _mm256_storeu_si256((__m256i*)(sums + i), dq_sum_of_8(lanes + i));
}
static inline void dq_wide_dots(const int16_t* a, ptrdiff_t stride, const int16_t* w, ptrdiff_t w_stride, ptrdiff_t n,
                                ptrdiff_t k, int32_t* sums) {
    if (n == 1) dq_dots_of(1, a, stride, w, w_stride, k, sums);
    else if (n == 2) dq_dots_of(2, a, stride, w, w_stride, k, sums);
    else if (n == 3) dq_dots_of(3, a, stride, w, w_stride, k, sums);
    else dq_dots_of(4, a, stride, w, w_stride, k, sums);
}
