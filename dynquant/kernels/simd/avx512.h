/* AVX-512 (x86-64-v4), and VNNI in its registers. */

#define DQ_QUANTIZE_STEP 64
static inline void dq_nontemporal_end(void) { _mm_sfence(); }
static inline int dq_quantize_step(const float* x, float lo, float hi, int32_t clip, int in_range, int nontemporal,
                                   int8_t* codes) {
    const __m512 vlo = _mm512_set1_ps(lo), vhi = _mm512_set1_ps(hi), magic = _mm512_set1_ps(DQ_MAGIC);
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i differ = _mm512_setzero_si512(), a[4];
    for (int j = 0; j < 4; j++) {
        const __m512 v = _mm512_loadu_ps(x + 16 * j);
        const __m512i low = _mm512_castps_si512(_mm512_fmadd_ps(v, vlo, magic));
        const __m512i high = _mm512_castps_si512(_mm512_fmadd_ps(v, vhi, magic));
        differ = _mm512_ternarylogic_epi32(differ, low, high, 0xF6); /* differ | (low ^ high) */
        /* The low byte of the sum is the code as it is. */
        if (in_range && !nontemporal) _mm_storeu_si128((__m128i*)(codes + 16 * j), _mm512_cvtepi32_epi8(low));
        else a[j] = _mm512_sub_epi32(low, _mm512_set1_epi32(DQ_MAGIC_BITS));
    }
    if (in_range && !nontemporal) return _mm512_test_epi32_mask(differ, differ) != 0;
    __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(a[0], a[1]), _mm512_packs_epi32(a[2], a[3]));
    bytes = _mm512_max_epi8(bytes, _mm512_set1_epi8((char)-clip));
    bytes = _mm512_min_epi8(bytes, _mm512_set1_epi8((char)clip));
    bytes = _mm512_permutexvar_epi32(lanes, bytes);
    if (nontemporal) _mm512_stream_si512((__m512i*)codes, bytes);
    else _mm512_storeu_si512(codes, bytes);
    return _mm512_test_epi32_mask(differ, differ) != 0;
}

#define DQ_NONTEMPORAL_VALUES
static inline void dq_nontemporal_values(const int8_t* codes, float scale, float* out) {
    const __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes)));
    _mm512_stream_ps(out, _mm512_mul_ps(v, _mm512_set1_ps(scale)));
}

#define DQ_QUOTIENTS 64
static inline int dq_quotients(const float* x, const float* factors, const float* reciprocals, float* out) {
    __m512i lowest = _mm512_set1_epi32(-1);
    __m512 q[4];
    for (int j = 0; j < 4; j++) {
        const __m512 a = _mm512_loadu_ps(x + 16 * j), b = _mm512_loadu_ps(factors + 16 * j);
        const __m512 y = _mm512_loadu_ps(reciprocals + 16 * j);
        const __m512i twice = _mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(a));
        lowest = _mm512_min_epu32(lowest, _mm512_sub_epi32(twice, _mm512_set1_epi32(1)));
        q[j] = _mm512_mul_ps(a, y);
        q[j] = _mm512_fnmadd_ps(_mm512_fmsub_ps(b, q[j], a), y, q[j]);
    }
    if (_mm512_cmplt_epu32_mask(lowest, _mm512_set1_epi32(2 * DQ_MIN_DIVIDED - 1))) return 1;
    for (int j = 0; j < 4; j++) _mm512_storeu_ps(out + 16 * j, q[j]);
    return 0;
}

#if defined(__AVX512VNNI__)
/* vpdpbusd multiplies unsigned by signed bytes: a is taken as a + 128, and 128 * w is summed beside it.
   A lane gains at most 4 * 255 * 128 = 130,560 a step. */
#define DQ_DOT_STEP 64
typedef struct {
    __m512i shifted, compensation;
} dq_dot_acc;
static inline dq_dot_acc dq_dot_zero(void) {
    return (dq_dot_acc){_mm512_setzero_si512(), _mm512_setzero_si512()};
}
static inline dq_dot_acc dq_dot_add(dq_dot_acc x, dq_dot_acc y) {
    return (dq_dot_acc){_mm512_add_epi32(x.shifted, y.shifted), _mm512_add_epi32(x.compensation, y.compensation)};
}
static inline dq_dot_acc dq_dot_step(dq_dot_acc acc, const int8_t* w, const int8_t* a) {
    const __m512i half = _mm512_set1_epi8((char)0x80), vw = _mm512_loadu_si512(w);
    acc.shifted = _mm512_dpbusd_epi32(acc.shifted, _mm512_xor_si512(_mm512_loadu_si512(a), half), vw);
    acc.compensation = _mm512_dpbusd_epi32(acc.compensation, half, vw);
    return acc;
}
static inline dq_dot_acc dq_dot_biased_step(dq_dot_acc acc, const int8_t* w, const int8_t* a) {
    const __m512i biased = _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi16(DQ_BIAS));
    acc.shifted = _mm512_dpbusd_epi32(acc.shifted, biased, _mm512_loadu_si512(a));
    return acc;
}
static inline int32_t dq_dot_sum(dq_dot_acc acc) {
    return _mm512_reduce_add_epi32(_mm512_sub_epi32(acc.shifted, acc.compensation));
}
#endif

typedef __m512i dq_acc;
typedef __m512i dq_weights;
typedef __m512i dq_broadcast_act;
#define DQ_LANES 16
#define DQ_DEPTH 4
static inline dq_acc dq_acc_zero(void) { return _mm512_setzero_si512(); }
static inline dq_acc dq_acc_load(const int32_t* s) { return _mm512_loadu_si512(s); }
static inline void dq_acc_store(int32_t* out, dq_acc s) { _mm512_storeu_si512(out, s); }
static inline dq_acc dq_acc_add(dq_acc x, dq_acc y) { return _mm512_add_epi32(x, y); }
static inline dq_broadcast_act dq_broadcast(const uint8_t* a) {
    int32_t four;
    memcpy(&four, a, 4);
    return _mm512_set1_epi32(four);
}
static inline dq_weights dq_weights_load(const uint8_t* w) { return _mm512_loadu_si512(w); }
#if defined(__AVX512VNNI__)
#define DQ_SPLIT 0
static inline dq_acc dq_acc_step(dq_acc acc, dq_weights w, dq_broadcast_act a) {
    return _mm512_dpbusd_epi32(acc, w, a);
}
#else
#define DQ_SPLIT 1
static inline dq_acc dq_acc_step(dq_acc acc, dq_weights w, dq_broadcast_act a) {
    const __m512i pairs = _mm512_maddubs_epi16(w, a);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif

typedef __m512i dq_wide_weights;
static inline dq_wide_weights dq_wide_load(const int16_t* w) { return _mm512_loadu_si512(w); }
static inline dq_acc dq_wide_step(dq_acc acc, dq_wide_weights w, dq_broadcast_act a) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(acc, w, a);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(w, a));
#endif
}
static inline void dq_widen_k_step(const uint8_t* w, int16_t* wide) {
    /* Of each output the even k, and the odd ones; then pairs of both. */
    const __m512i v = _mm512_loadu_si512(w);
    const __m512i even = _mm512_sub_epi16(_mm512_and_si512(v, _mm512_set1_epi16(0xFF)), _mm512_set1_epi16(128));
    const __m512i odd = _mm512_sub_epi16(_mm512_set1_epi16(127), _mm512_srli_epi16(v, 8));
    const __m512 a = _mm512_castsi512_ps(_mm512_unpacklo_epi16(even, odd));
    const __m512 b = _mm512_castsi512_ps(_mm512_unpackhi_epi16(even, odd));
    _mm512_storeu_ps(wide, _mm512_shuffle_ps(a, b, 0x88));
    _mm512_storeu_ps(wide + 4 * DQ_LANES, _mm512_shuffle_ps(a, b, 0xDD));
}

#if defined(__AVX512VNNI__) && !defined(DQ_AMX)
#define DQ_TILE_ROWS 8
#define DQ_5_ROWS(of) of(0) of(1) of(2) of(3) of(4)
#define DQ_6_ROWS(of) DQ_5_ROWS(of) of(5)
#define DQ_7_ROWS(of) DQ_6_ROWS(of) of(6)
#define DQ_8_ROWS(of) DQ_7_ROWS(of) of(7)
#define DQ_BEGIN(r) \
    const uint8_t* a##r = a + r * stride; \
    __m512i s##r = _mm512_setzero_si512(), t##r = s##r;
#define DQ_MULTIPLY(r) \
    x = dq_broadcast(a##r + 4 * i); \
    s##r = _mm512_dpbusd_epi32(s##r, w0, x); \
    t##r = _mm512_dpbusd_epi32(t##r, w1, x);
#define DQ_STORE(r) \
    _mm512_storeu_si512(acc + 32 * r, s##r); \
    _mm512_storeu_si512(acc + 32 * r + 16, t##r);
/* The next panel is prefetched, as in microkernel_4. */
#define DQ_TILE(each_row) \
    each_row(DQ_BEGIN) \
    for (ptrdiff_t i = 0; i < k_steps; i++, w += 128) { \
        dq_prefetch(w + 128 * k_steps, 128); \
        w0 = _mm512_loadu_si512(w); \
        w1 = _mm512_loadu_si512(w + 64); \
        each_row(DQ_MULTIPLY) \
    } \
    each_row(DQ_STORE)
static inline void dq_tiles(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, int rows, int32_t* acc,
                            ptrdiff_t k_steps, int tile_k_steps, int add) {
    __m512i w0, w1, x;
    (void)tile_k_steps, (void)add;
    if (rows == 5) {
        DQ_TILE(DQ_5_ROWS)
    } else if (rows == 6) {
        DQ_TILE(DQ_6_ROWS)
    } else if (rows == 7) {
        DQ_TILE(DQ_7_ROWS)
    } else {
        DQ_TILE(DQ_8_ROWS)
    }
}
#endif

typedef __m512i dq_acc16;
typedef __m512 dq_floats;
typedef struct {
    __m512i even, odd;
} dq_codes;
static inline dq_codes dq_codes_load(const uint8_t* w) {
    const __m512i v = _mm512_loadu_si512(w), low = _mm512_set1_epi8(0x0F);
    return (dq_codes){_mm512_and_si512(v, low), _mm512_and_si512(_mm512_srli_epi16(v, 4), low)};
}
static inline dq_acc16 dq_acc16_zero(void) { return _mm512_setzero_si512(); }
#if defined(__AVX512VNNI__)
#define DQ_ACC16_STEPS (1 << 20)
static inline dq_acc16 dq_acc16_step(dq_acc16 part, dq_codes w, dq_broadcast_act even, dq_broadcast_act odd) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(part, w.even, even), w.odd, odd);
}
static inline dq_acc dq_acc_add16(dq_acc s, dq_acc16 part) { return _mm512_add_epi32(s, part); }
#else
#define DQ_ACC16_STEPS 4
static inline dq_acc16 dq_acc16_step(dq_acc16 part, dq_codes w, dq_broadcast_act even, dq_broadcast_act odd) {
    /* int16 lanes: a step adds two pairs of at most 2 * 15 * 127 = 3,810, and 8 * 3,810 < 2**15. */
    part = _mm512_add_epi16(part, _mm512_maddubs_epi16(w.even, even));
    return _mm512_add_epi16(part, _mm512_maddubs_epi16(w.odd, odd));
}
static inline dq_acc dq_acc_add16(dq_acc s, dq_acc16 part) {
    return _mm512_add_epi32(s, _mm512_madd_epi16(part, _mm512_set1_epi16(1)));
}
#endif
static inline dq_floats dq_floats_load(const float* x) { return _mm512_loadu_ps(x); }
static inline void dq_floats_store(float* out, dq_floats x) { _mm512_storeu_ps(out, x); }
static inline dq_floats dq_zero_points_load(const uint8_t* z) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)z)));
}
static inline dq_floats dq_floats_add(dq_floats x, dq_floats y) { return _mm512_add_ps(x, y); }
static inline dq_floats dq_floats_sub(dq_floats x, dq_floats y) { return _mm512_sub_ps(x, y); }
static inline dq_floats dq_floats_scale(dq_floats x, float scale) {
    return _mm512_mul_ps(x, _mm512_set1_ps(scale));
}
static inline dq_floats dq_hadamard_lanes(dq_floats x) {
    const __m512 ones = _mm512_set1_ps(1), minus = _mm512_set1_ps(-1);
    x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xAAAA, ones, minus), _mm512_permute_ps(x, 0xB1));
    x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xCCCC, ones, minus), _mm512_permute_ps(x, 0x4E));
    x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xF0F0, ones, minus), _mm512_shuffle_f32x4(x, x, 0xB1));
    return _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xFF00, ones, minus), _mm512_shuffle_f32x4(x, x, 0x4E));
}
static inline dq_floats dq_scaled(dq_acc s, dq_floats scales) { return _mm512_mul_ps(_mm512_cvtepi32_ps(s), scales); }
static inline dq_floats dq_group_add(dq_floats acc, dq_acc s, dq_floats zero_points, float a_sum,
                                     dq_floats scales) {
    const __m512 sum = _mm512_fnmadd_ps(zero_points, _mm512_set1_ps(a_sum), _mm512_cvtepi32_ps(s));
    return _mm512_add_ps(acc, _mm512_mul_ps(sum, scales));
}
static inline dq_floats dq_group_add_minimums(dq_floats acc, dq_acc s, dq_floats minimums, float a_sum,
                                              dq_floats scales) {
    const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(s), scales);
    return _mm512_add_ps(acc, _mm512_add_ps(sum, _mm512_mul_ps(minimums, _mm512_set1_ps(a_sum))));
}
