/* Matrix products on AVX2 without VNNI, where VPMADDUBSW adds pairs of products in int16. Weights of 16 k and 16
   outputs stay in eight registers while the loop goes over the rows of activations, so that per row they cost
   neither loads nor unpacking; accumulators lie in memory, in L1. Why no int16 sum can overflow is said in
   kernels/forms.pxi and split.pxi, why no int32 sum can in kernels/matmul_s8.pxi and matmul_u4.pxi. */

#if defined(__GNUC__)
#define DQ_IN_ORDER(x) __asm__("" : "+x"(x)) /* or gcc reorders the additions, and spills the weights for it */
#define DQ_UNROLL_2 _Pragma("GCC unroll 2")
#else
#define DQ_UNROLL_2
#define DQ_IN_ORDER(x) (void)(x)
#endif

/* 16 k of 16 outputs: what four broadcasts of four activations are multiplied by, the second 8 outputs in the
   members that end in 1. */
typedef struct {
    __m256i w00, w01, w10, w11, w20, w21, w30, w31;
} dq_weights_16;

#define DQ_ADD16_STEP(even, odd, four) \
    x = dq_broadcast(four); \
    *s = _mm256_add_epi16(*s, _mm256_maddubs_epi16(even, x)); \
    *t = _mm256_add_epi16(*t, _mm256_maddubs_epi16(odd, x)); \
    DQ_IN_ORDER(*s); \
    DQ_IN_ORDER(*t);

/* The int16 lanes of s, for the first 8 outputs, and t, for the others, += w times 16 activations at a. */
DQ_INLINE void dq_add16(__m256i* s, __m256i* t, const dq_weights_16* w, const uint8_t* a) {
    __m256i x;
    DQ_ADD16_STEP(w->w00, w->w01, a)
    DQ_ADD16_STEP(w->w10, w->w11, a + 4)
    DQ_ADD16_STEP(w->w20, w->w21, a + 8)
    DQ_ADD16_STEP(w->w30, w->w31, a + 12)
}

/* ---- 4-bit weights -------------------------------------------------------------------------------------- */

/* Two k-blocks. */
DQ_INLINE dq_weights_16 dq_codes_16(const uint8_t* w) {
    const dq_codes a = dq_codes_load(w), b = dq_codes_load(w + 32);
    const dq_codes c = dq_codes_load(w + 64), d = dq_codes_load(w + 96);
    return (dq_weights_16){a.even, b.even, a.odd, b.odd, c.even, d.even, c.odd, d.odd};
}

/* Multiplies four k-blocks. Stores the sums in acc32 (rows, 16), or adds them to it if `add`. With `end` the group
   is complete: its sums are scaled and added to the float array acc instead. A lane of part is the
   sum of 8 pairs of at most 2 * 15 * 127 = 3,810 when it ends: 30,480 < 2**15. */
DQ_INLINE void dq_group_span(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, ptrdiff_t rows, int16_t* part,
                             int32_t* acc32, int add, int end, const float* scales, const uint8_t* offsets,
                             int minimums, const uint8_t* a_sums, float* acc) {
    const dq_weights_16 first = dq_codes_16(w);
    DQ_UNROLL_2
    for (ptrdiff_t r = 0; r < rows; r++) {
        __m256i s = _mm256_setzero_si256(), t = s;
        dq_add16(&s, &t, &first, a + r * stride);
        _mm256_storeu_si256((__m256i*)(part + 32 * r), s);
        _mm256_storeu_si256((__m256i*)(part + 32 * r + 16), t);
    }
    const dq_weights_16 second = dq_codes_16(w + 128);
    const dq_floats z0 = minimums ? dq_floats_load((const float*)offsets) : dq_zero_points_load(offsets);
    const dq_floats z1 = minimums ? dq_floats_load((const float*)offsets + 8) : dq_zero_points_load(offsets + 8);
    const dq_floats scales0 = dq_floats_load(scales), scales1 = dq_floats_load(scales + 8);
    DQ_UNROLL_2
    for (ptrdiff_t r = 0; r < rows; r++) {
        int32_t* sums = acc32 + 16 * r;
        float* out = acc + 16 * r;
        __m256i s = _mm256_loadu_si256((const __m256i*)(part + 32 * r));
        __m256i t = _mm256_loadu_si256((const __m256i*)(part + 32 * r + 16));
        dq_add16(&s, &t, &second, a + r * stride + 16);
        s = dq_acc_add16(add ? dq_acc_load(sums) : dq_acc_zero(), s);
        t = dq_acc_add16(add ? dq_acc_load(sums + 8) : dq_acc_zero(), t);
        if (end) {
            float a_sum;
            memcpy(&a_sum, a_sums + r * stride, sizeof a_sum);
            const dq_floats x = dq_floats_load(out), y = dq_floats_load(out + 8);
            dq_floats_store(out, minimums ? dq_group_add_minimums(x, s, z0, a_sum, scales0)
                                          : dq_group_add(x, s, z0, a_sum, scales0));
            dq_floats_store(out + 8, minimums ? dq_group_add_minimums(y, t, z1, a_sum, scales1)
                                              : dq_group_add(y, t, z1, a_sum, scales1));
        } else {
            dq_acc_store(sums, s);
            dq_acc_store(sums + 8, t);
        }
    }
}

#define DQ_KEPT_ROWS 32 /* more rows, each in a page of its own, would be more than the first TLB holds */
DQ_INLINE void dq_group_rows(const uint8_t* w, const float* scales, const uint8_t* offsets, int minimums,
                             const uint8_t* a, const uint8_t* a_sums, ptrdiff_t stride, ptrdiff_t rows, float* acc,
                             ptrdiff_t k_blocks, ptrdiff_t prefetch_distance) {
    int16_t part[32 * DQ_KEPT_ROWS];
    int32_t acc32[16 * DQ_KEPT_ROWS];
    for (ptrdiff_t i = 0; i < k_blocks; i += 4, w += 256, a += 32) {
        dq_prefetch(w + prefetch_distance, 256);
#define DQ_SPAN(add, end) \
    dq_group_span(w, a, stride, rows, part, acc32, add, end, scales, offsets, minimums, a_sums, acc)
        if (k_blocks == 4) DQ_SPAN(0, 1);
        else if (i == 0) DQ_SPAN(0, 0);
        else if (i + 4 < k_blocks) DQ_SPAN(1, 0);
        else DQ_SPAN(1, 1);
#undef DQ_SPAN
    }
}

/* ---- 8-bit weights -------------------------------------------------------------------------------------- */

/* How rows of activations are multiplied: kernels/forms.pxi says what each takes, and why it is exact. */
#define DQ_FORMS 1
#define DQ_TILE_K_STEPS 4

/* For each of the two lanes of eight codes: the sum of its positive codes, and the sum of the magnitudes of its
   negative codes. The two lanes alternate through the int16 elements. */
DQ_INLINE void dq_lane_sums(__m256i v, __m256i* positive, __m256i* negative) {
    const __m256i ones = _mm256_set1_epi8(1);
    __m256i p = _mm256_maddubs_epi16(ones, _mm256_max_epi8(v, _mm256_setzero_si256()));
    __m256i n = _mm256_sub_epi16(p, _mm256_maddubs_epi16(ones, v));
    p = _mm256_add_epi16(p, _mm256_shuffle_epi32(p, 0x4E));
    n = _mm256_add_epi16(n, _mm256_shuffle_epi32(n, 0x4E));
    *positive = _mm256_add_epi16(p, _mm256_shuffle_epi32(p, 0xB1));
    *negative = _mm256_add_epi16(n, _mm256_shuffle_epi32(n, 0xB1));
}
static inline void dq_count_lanes(const int8_t* a, int32_t* eights, int32_t* centered) {
    __m256i p, n;
    dq_lane_sums(_mm256_loadu_si256((const __m256i*)a), &p, &n);
    const __m256i over = _mm256_cmpgt_epi16(_mm256_max_epi16(p, n), _mm256_set1_epi16(DQ_EIGHTS_LIMIT));
    const __m256i all = _mm256_cmpgt_epi16(_mm256_add_epi16(p, n), _mm256_set1_epi16(DQ_CENTERED_LIMIT));
    /* A lane is found four times, in two bytes each. */
    *eights += dq_count_bits((uint32_t)_mm256_movemask_epi8(over)) / 8;
    *centered += dq_count_bits((uint32_t)_mm256_movemask_epi8(all)) / 8;
}
static inline int dq_eights_out_of_range(const uint8_t* a) {
    __m256i p, n;
    dq_lane_sums(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)a)), &p, &n);
    const __m128i larger = _mm256_castsi256_si128(_mm256_max_epi16(p, n));
    return _mm_movemask_epi8(_mm_cmpgt_epi16(larger, _mm_set1_epi16(DQ_EIGHTS_LIMIT)));
}
static inline int dq_center_16(const uint8_t* a, uint8_t* out) {
    const __m128i v = _mm_loadu_si128((const __m128i*)a);
    __m256i p, n;
    dq_lane_sums(_mm256_castsi128_si256(v), &p, &n);
    const __m128i sum = _mm256_castsi256_si128(_mm256_add_epi16(p, n));
    const __m128i difference = _mm256_castsi256_si128(_mm256_sub_epi16(p, n));
    /* -128 * d + floor(d / 2) = floor(-127.5 * d) */
    const __m128i center = _mm_sub_epi16(_mm_srai_epi16(difference, 1), _mm_slli_epi16(difference, 7));
    const __m128i pairs = _mm_abs_epi16(_mm_maddubs_epi16(_mm_set1_epi8(1), v));
    const int32_t first = _mm_cvtsi128_si32(center);
    _mm_storeu_si128((__m128i*)out, v);
    memcpy(out + 16, &first, sizeof first);
    return _mm_movemask_epi8(_mm_or_si128(_mm_cmpgt_epi16(sum, _mm_set1_epi16(DQ_CENTERED_LIMIT)),
                                          _mm_cmpgt_epi16(pairs, _mm_set1_epi16(DQ_PAIR))));
}
/* Clips int16 pairs to the range of DQ_PAIR: where both are of one sign and too large together, the second. */
DQ_INLINE __m256i dq_pairs_in_range(__m256i v) {
    const __m256i limit = _mm256_set1_epi16(DQ_PAIR), p = _mm256_max_epi16(v, _mm256_setzero_si256());
    const __m256i n = _mm256_sub_epi16(p, v);
    return _mm256_sub_epi16(_mm256_min_epi16(p, _mm256_sub_epi16(limit, _mm256_slli_epi32(p, 16))),
                            _mm256_min_epi16(n, _mm256_sub_epi16(limit, _mm256_slli_epi32(n, 16))));
}
/* Of eight int16 in each half, none negative, the first ones that add up to at most `limit`. */
DQ_INLINE __m256i dq_first_in_range(__m256i v, int limit) {
    __m256i before = _mm256_slli_si256(v, 2);
    before = _mm256_add_epi16(before, _mm256_slli_si256(before, 2));
    before = _mm256_add_epi16(before, _mm256_slli_si256(before, 4));
    before = _mm256_add_epi16(before, _mm256_slli_si256(before, 8));
    return _mm256_min_epi16(v, _mm256_subs_epu16(_mm256_set1_epi16((short)limit), before));
}
static inline uint32_t dq_split_16(uint8_t* a, int8_t* residuals, int form) {
    /* The pairs of the first lane, then of the second; the way back is the same. */
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m128i back = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m256i v = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)a), order));
    __m256i part[3];
    if (form == DQ_EIGHTS) {
        const __m256i p = _mm256_max_epi16(v, _mm256_setzero_si256());
        part[0] = _mm256_sub_epi16(dq_first_in_range(p, DQ_EIGHTS_LIMIT),
                                   dq_first_in_range(_mm256_sub_epi16(p, v), DQ_EIGHTS_LIMIT));
    } else {
        part[0] = dq_pairs_in_range(v);
        part[0] = _mm256_sign_epi16(dq_first_in_range(_mm256_abs_epi16(part[0]), DQ_CENTERED_LIMIT), part[0]);
    }
    part[1] = dq_pairs_in_range(_mm256_sub_epi16(v, part[0]));
    part[2] = _mm256_sub_epi16(_mm256_sub_epi16(v, part[0]), part[1]);
    uint32_t steps = 0;
    for (int i = 0; i < 3; i++) {
        const __m128i low = _mm256_castsi256_si128(part[i]), high = _mm256_extracti128_si256(part[i], 1);
        const __m128i bytes = _mm_shuffle_epi8(_mm_packs_epi16(low, high), back);
        const __m128i zero = _mm_cmpeq_epi32(bytes, _mm_setzero_si128());
        if (i == 0) _mm_storeu_si128((__m128i*)a, bytes);
        else _mm_storeu_si128((__m128i*)(residuals + 16 * (i - 1)), bytes);
        if (i > 0) steps |= (uint32_t)(~_mm_movemask_ps(_mm_castsi128_ps(zero)) & 15) << 4 * (i - 1);
    }
    return steps;
}
static inline void dq_widen_16(const uint8_t* a, uint8_t* out) {
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    const __m128i v = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)a), order);
    _mm256_storeu_si256((__m256i*)out, _mm256_cvtepi8_epi16(v));
}

DQ_INLINE dq_weights_16 dq_weights_load_16(const uint8_t* w) {
    return (dq_weights_16){dq_weights_load(w),       dq_weights_load(w + 32),  dq_weights_load(w + 64),
                           dq_weights_load(w + 96),  dq_weights_load(w + 128), dq_weights_load(w + 160),
                           dq_weights_load(w + 192), dq_weights_load(w + 224)};
}
DQ_INLINE void dq_deep_rows(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, ptrdiff_t rows, int32_t* acc,
                            ptrdiff_t k_steps, int centered) {
    memset(acc, 0, 16 * rows * sizeof *acc);
    for (ptrdiff_t i = 0; i < k_steps; i += 4, w += 256, a += centered ? 20 : 16) {
        const dq_weights_16 weights = dq_weights_load_16(w);
        dq_prefetch(w + 64 * k_steps, 256);
        DQ_UNROLL_2
        for (ptrdiff_t r = 0; r < rows; r++) {
            int32_t* sums = acc + 16 * r;
            __m256i s = centered ? dq_broadcast(a + r * stride + 16) : _mm256_setzero_si256(), t = s;
            dq_add16(&s, &t, &weights, a + r * stride);
            dq_acc_store(sums, dq_acc_add16(dq_acc_load(sums), s));
            dq_acc_store(sums + 8, dq_acc_add16(dq_acc_load(sums + 8), t));
        }
    }
}

/* Microkernels of one to four rows. Accumulators have names: gcc writes those of an array to memory. */
#define DQ_1_ROW(of) of(0)
#define DQ_2_ROWS(of) of(0) of(1)
#define DQ_3_ROWS(of) of(0) of(1) of(2)
#define DQ_4_ROWS(of) of(0) of(1) of(2) of(3)
#define DQ_ROW_BEGIN(r) __m256i s##r = _mm256_setzero_si256(), t##r = s##r;
#define DQ_ROW_STORE(r) \
    dq_acc_store(acc + 16 * r, s##r); \
    dq_acc_store(acc + 16 * r + 8, t##r);
#define DQ_ROW_PAIRS(r) \
    x = dq_broadcast(a + r * stride + 4 * i); \
    s##r = dq_acc_step(s##r, w0, x); \
    t##r = dq_acc_step(t##r, w1, x);
#define DQ_ROW_WIDE(r) \
    x = dq_broadcast(a + r * stride + 8 * i); \
    y = dq_broadcast(a + r * stride + 8 * i + 4); \
    s##r = _mm256_add_epi32(s##r, _mm256_madd_epi16(even0, x)); \
    t##r = _mm256_add_epi32(t##r, _mm256_madd_epi16(even1, x)); \
    DQ_IN_ORDER(s##r); \
    DQ_IN_ORDER(t##r); \
    s##r = _mm256_add_epi32(s##r, _mm256_madd_epi16(odd0, y)); \
    t##r = _mm256_add_epi32(t##r, _mm256_madd_epi16(odd1, y));
#define DQ_MICROKERNEL_PAIRS(each_row) \
    each_row(DQ_ROW_BEGIN) \
    for (ptrdiff_t i = 0; i < k_steps; i++, w += 64) { \
        const __m256i w0 = dq_weights_load(w), w1 = dq_weights_load(w + 32); \
        __m256i x; \
        dq_prefetch(w + 64 * k_steps, 64); \
        each_row(DQ_ROW_PAIRS) \
    } \
    each_row(DQ_ROW_STORE)
#define DQ_MICROKERNEL_WIDE(each_row) \
    each_row(DQ_ROW_BEGIN) \
    for (ptrdiff_t i = 0; i < k_steps; i++, w += 64) { \
        const __m256i w0 = dq_weights_load(w), w1 = dq_weights_load(w + 32); \
        const __m256i even0 = _mm256_and_si256(w0, low_byte), even1 = _mm256_and_si256(w1, low_byte); \
        const __m256i odd0 = _mm256_srli_epi16(w0, 8), odd1 = _mm256_srli_epi16(w1, 8); \
        __m256i x, y; \
        dq_prefetch(w + 64 * k_steps, 64); \
        each_row(DQ_ROW_WIDE) \
    } \
    each_row(DQ_ROW_STORE)

static inline void dq_pairs_rows(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, ptrdiff_t rows, int32_t* acc,
                                 ptrdiff_t k_steps) {
    if (rows == 2) {
        DQ_MICROKERNEL_PAIRS(DQ_2_ROWS)
    } else if (rows == 3) {
        DQ_MICROKERNEL_PAIRS(DQ_3_ROWS)
    } else {
        DQ_MICROKERNEL_PAIRS(DQ_4_ROWS)
    }
}
static inline void dq_wide_rows(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, ptrdiff_t rows, int32_t* acc,
                                ptrdiff_t k_steps) {
    const __m256i low_byte = _mm256_set1_epi16(0xFF);
    if (rows == 1) {
        DQ_MICROKERNEL_WIDE(DQ_1_ROW)
    } else if (rows == 2) {
        DQ_MICROKERNEL_WIDE(DQ_2_ROWS)
    } else if (rows == 3) {
        DQ_MICROKERNEL_WIDE(DQ_3_ROWS)
    } else {
        DQ_MICROKERNEL_WIDE(DQ_4_ROWS)
    }
}
static inline void dq_form_rows(int form, const uint8_t* w, const uint8_t* a, ptrdiff_t stride, ptrdiff_t rows,
                                int32_t* acc, ptrdiff_t k_steps) {
    if (form == DQ_EIGHTS) dq_deep_rows(w, a, stride, rows, acc, k_steps, 0);
    else if (form == DQ_CENTERED) dq_deep_rows(w, a, stride, rows, acc, k_steps, 1);
    else if (form == DQ_WIDE) dq_wide_rows(w, a, stride, rows, acc, k_steps);
    else dq_pairs_rows(w, a, stride, rows, acc, k_steps);
}
