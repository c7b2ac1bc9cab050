/* SSE2, which every x86-64 processor has. */

#ifndef DQ_DOT_STEP
#define DQ_DOT_STEP 16
typedef __m128i dq_dot_acc;
static inline dq_dot_acc dq_dot_zero(void) { return _mm_setzero_si128(); }
static inline dq_dot_acc dq_dot_add(dq_dot_acc x, dq_dot_acc y) { return _mm_add_epi32(x, y); }
static inline dq_dot_acc dq_dot_step(dq_dot_acc acc, const int8_t* w, const int8_t* a) {
    /* Each byte is doubled into an int16 and shifted down, which extends its sign. */
    const __m128i vw = _mm_loadu_si128((const __m128i*)w), va = _mm_loadu_si128((const __m128i*)a);
    const __m128i low = _mm_madd_epi16(_mm_srai_epi16(_mm_unpacklo_epi8(vw, vw), 8),
                                       _mm_srai_epi16(_mm_unpacklo_epi8(va, va), 8));
    const __m128i high = _mm_madd_epi16(_mm_srai_epi16(_mm_unpackhi_epi8(vw, vw), 8),
                                        _mm_srai_epi16(_mm_unpackhi_epi8(va, va), 8));
    return _mm_add_epi32(acc, _mm_add_epi32(low, high));
}
static inline dq_dot_acc dq_dot_biased_step(dq_dot_acc acc, const int8_t* w, const int8_t* a) {
    const __m128i zero = _mm_setzero_si128(), va = _mm_loadu_si128((const __m128i*)a);
    const __m128i vw = _mm_xor_si128(_mm_loadu_si128((const __m128i*)w), _mm_set1_epi16(DQ_BIAS));
    const __m128i low = _mm_srai_epi16(_mm_unpacklo_epi8(va, va), 8);
    const __m128i high = _mm_srai_epi16(_mm_unpackhi_epi8(va, va), 8);
    acc = _mm_add_epi32(acc, _mm_madd_epi16(_mm_unpacklo_epi8(vw, zero), low));
    return _mm_add_epi32(acc, _mm_madd_epi16(_mm_unpackhi_epi8(vw, zero), high));
}
static inline int32_t dq_dot_sum(dq_dot_acc acc) {
    acc = _mm_add_epi32(acc, _mm_shuffle_epi32(acc, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(acc, _mm_shuffle_epi32(acc, 0xB1)));
}
#endif

#ifndef DQ_LANES
typedef __m128i dq_acc;
typedef __m128i dq_weights;
typedef __m128i dq_broadcast_act;
#define DQ_LANES 4
#define DQ_DEPTH 2
#define DQ_SPLIT 0
static inline dq_acc dq_acc_zero(void) { return _mm_setzero_si128(); }
static inline dq_acc dq_acc_load(const int32_t* s) { return _mm_loadu_si128((const __m128i*)s); }
static inline void dq_acc_store(int32_t* out, dq_acc s) { _mm_storeu_si128((__m128i*)out, s); }
static inline dq_acc dq_acc_add(dq_acc x, dq_acc y) { return _mm_add_epi32(x, y); }
static inline dq_broadcast_act dq_broadcast(const uint8_t* a) {
    int32_t four;
    memcpy(&four, a, 4);
    return _mm_set1_epi32(four);
}
static inline dq_weights dq_weights_load(const uint8_t* w) {
    return _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)w), _mm_setzero_si128());
}
static inline dq_acc dq_acc_step(dq_acc acc, dq_weights w, dq_broadcast_act a) {
    return _mm_add_epi32(acc, _mm_madd_epi16(w, a));
}
typedef __m128i dq_wide_weights;
static inline dq_wide_weights dq_wide_load(const int16_t* w) { return _mm_loadu_si128((const __m128i*)w); }
static inline dq_acc dq_wide_step(dq_acc acc, dq_wide_weights w, dq_broadcast_act a) {
    return dq_acc_step(acc, w, a);
}
#endif

#ifndef DQ_ACC16_STEPS
/* int32 lanes: `low` has two of each of the first two outputs, `high` of the other two. */
typedef struct {
    __m128i low, high;
} dq_acc16;
typedef __m128 dq_floats;
typedef struct {
    __m128i even, odd;
} dq_codes;
#define DQ_ACC16_STEPS (1 << 20)
static inline dq_codes dq_codes_load(const uint8_t* w) {
    const __m128i v = _mm_loadu_si128((const __m128i*)w), low = _mm_set1_epi8(0x0F);
    return (dq_codes){_mm_and_si128(v, low), _mm_and_si128(_mm_srli_epi16(v, 4), low)};
}
static inline dq_acc16 dq_acc16_zero(void) { return (dq_acc16){_mm_setzero_si128(), _mm_setzero_si128()}; }
static inline dq_acc16 dq_acc16_add(dq_acc16 part, __m128i w, dq_broadcast_act a) {
    const __m128i zero = _mm_setzero_si128(), wide = _mm_srai_epi16(_mm_unpacklo_epi8(a, a), 8);
    part.low = _mm_add_epi32(part.low, _mm_madd_epi16(_mm_unpacklo_epi8(w, zero), wide));
    part.high = _mm_add_epi32(part.high, _mm_madd_epi16(_mm_unpackhi_epi8(w, zero), wide));
    return part;
}
static inline dq_acc16 dq_acc16_step(dq_acc16 part, dq_codes w, dq_broadcast_act even, dq_broadcast_act odd) {
    return dq_acc16_add(dq_acc16_add(part, w.even, even), w.odd, odd);
}
static inline dq_acc dq_acc_add16(dq_acc s, dq_acc16 part) {
    const __m128 low = _mm_castsi128_ps(part.low), high = _mm_castsi128_ps(part.high);
    const __m128i first = _mm_castps_si128(_mm_shuffle_ps(low, high, 0x88));
    return _mm_add_epi32(s, _mm_add_epi32(first, _mm_castps_si128(_mm_shuffle_ps(low, high, 0xDD))));
}
static inline dq_floats dq_floats_load(const float* x) { return _mm_loadu_ps(x); }
static inline void dq_floats_store(float* out, dq_floats x) { _mm_storeu_ps(out, x); }
static inline dq_floats dq_zero_points_load(const uint8_t* z) { return _mm_setr_ps(z[0], z[1], z[2], z[3]); }
static inline dq_floats dq_floats_add(dq_floats x, dq_floats y) { return _mm_add_ps(x, y); }
static inline dq_floats dq_floats_sub(dq_floats x, dq_floats y) { return _mm_sub_ps(x, y); }
static inline dq_floats dq_floats_scale(dq_floats x, float scale) {
    return _mm_mul_ps(x, _mm_set1_ps(scale));
}
static inline dq_floats dq_hadamard_lanes(dq_floats x) {
    const __m128 sign1 = _mm_setr_ps(1, -1, 1, -1), sign2 = _mm_setr_ps(1, 1, -1, -1);
    x = _mm_add_ps(_mm_mul_ps(x, sign1), _mm_shuffle_ps(x, x, 0xB1));
    return _mm_add_ps(_mm_mul_ps(x, sign2), _mm_shuffle_ps(x, x, 0x4E));
}
static inline dq_floats dq_scaled(dq_acc s, dq_floats scales) { return _mm_mul_ps(_mm_cvtepi32_ps(s), scales); }
static inline dq_floats dq_group_add(dq_floats acc, dq_acc s, dq_floats zero_points, float a_sum,
                                     dq_floats scales) {
    const __m128 sum = _mm_sub_ps(_mm_cvtepi32_ps(s), _mm_mul_ps(zero_points, _mm_set1_ps(a_sum)));
    return _mm_add_ps(acc, _mm_mul_ps(sum, scales));
}
static inline dq_floats dq_group_add_minimums(dq_floats acc, dq_acc s, dq_floats minimums, float a_sum,
                                              dq_floats scales) {
    const __m128 sum = _mm_mul_ps(_mm_cvtepi32_ps(s), scales);
    return _mm_add_ps(acc, _mm_add_ps(sum, _mm_mul_ps(minimums, _mm_set1_ps(a_sum))));
}
#endif

#define DQ_TRANSPOSES
static inline void dq_transpose_16(const int8_t* w, ptrdiff_t stride, uint8_t* out, ptrdiff_t out_stride) {
    const __m128i a = _mm_loadu_si128((const __m128i*)w), b = _mm_loadu_si128((const __m128i*)(w + stride));
    const __m128i c = _mm_loadu_si128((const __m128i*)(w + 2 * stride));
    const __m128i d = _mm_loadu_si128((const __m128i*)(w + 3 * stride));
    const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
    const __m128i ab_high = _mm_unpackhi_epi32(a, b), cd_high = _mm_unpackhi_epi32(c, d);
    _mm_storeu_si128((__m128i*)out, _mm_unpacklo_epi64(ab, cd));
    _mm_storeu_si128((__m128i*)(out + out_stride), _mm_unpackhi_epi64(ab, cd));
    _mm_storeu_si128((__m128i*)(out + 2 * out_stride), _mm_unpacklo_epi64(ab_high, cd_high));
    _mm_storeu_si128((__m128i*)(out + 3 * out_stride), _mm_unpackhi_epi64(ab_high, cd_high));
}
