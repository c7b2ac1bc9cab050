/* AVX2 (x86-64-v3), and AVX-VNNI. What AVX-512 has no better form for is taken from here too. */

#ifndef DQ_QUANTIZE_STEP
#define DQ_QUANTIZE_STEP 32
static inline void dq_nontemporal_end(void) { _mm_sfence(); }
static inline int dq_quantize_step(const float* x, float lo, float hi, int32_t clip, int in_range, int nontemporal,
                                   int8_t* codes) {
    const __m256 vlo = _mm256_set1_ps(lo), vhi = _mm256_set1_ps(hi), magic = _mm256_set1_ps(DQ_MAGIC);
    const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), low_byte = _mm256_set1_epi16(0xFF);
    __m256i low[4], high[4], a, b, differ, bytes;
    for (int j = 0; j < 4; j++) {
        const __m256 v = _mm256_loadu_ps(x + 8 * j);
        low[j] = _mm256_castps_si256(_mm256_fmadd_ps(v, vlo, magic));
        high[j] = _mm256_castps_si256(_mm256_fmadd_ps(v, vhi, magic));
    }
    if (in_range) {
        /* The lower half of a sum is the code as int16. The upper half packs to 0x7F, and is dropped. */
        a = _mm256_packs_epi16(low[0], low[1]);
        b = _mm256_packs_epi16(low[2], low[3]);
        differ = _mm256_or_si256(_mm256_xor_si256(a, _mm256_packs_epi16(high[0], high[1])),
                                 _mm256_xor_si256(b, _mm256_packs_epi16(high[2], high[3])));
        bytes = _mm256_packus_epi16(_mm256_and_si256(a, low_byte), _mm256_and_si256(b, low_byte));
    } else {
        differ = _mm256_setzero_si256();
        for (int j = 0; j < 4; j++) {
            differ = _mm256_or_si256(differ, _mm256_xor_si256(low[j], high[j]));
            low[j] = _mm256_sub_epi32(low[j], _mm256_set1_epi32(DQ_MAGIC_BITS));
        }
        bytes = _mm256_packs_epi16(_mm256_packs_epi32(low[0], low[1]), _mm256_packs_epi32(low[2], low[3]));
        bytes = _mm256_max_epi8(bytes, _mm256_set1_epi8((char)-clip));
        bytes = _mm256_min_epi8(bytes, _mm256_set1_epi8((char)clip));
    }
    bytes = _mm256_permutevar8x32_epi32(bytes, lanes);
    if (nontemporal) _mm256_stream_si256((__m256i*)codes, bytes);
    else _mm256_storeu_si256((__m256i*)codes, bytes);
    return !_mm256_testz_si256(differ, differ);
}
#endif

#ifndef DQ_NONTEMPORAL_VALUES
#define DQ_NONTEMPORAL_VALUES
static inline void dq_nontemporal_values(const int8_t* codes, float scale, float* out) {
    for (int j = 0; j < DQ_VALUES; j += 8) {
        const __m128i eight = _mm_loadl_epi64((const __m128i*)(codes + j));
        const __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
        _mm256_stream_ps(out + j, _mm256_mul_ps(v, _mm256_set1_ps(scale)));
    }
}
#endif

#ifndef DQ_QUOTIENTS
#define DQ_QUOTIENTS 32
static inline int dq_quotients(const float* x, const float* factors, const float* reciprocals, float* out) {
    __m256i lowest = _mm256_set1_epi32(2 * DQ_MIN_DIVIDED - 1);
    __m256 q[4];
    for (int j = 0; j < 4; j++) {
        const __m256 a = _mm256_loadu_ps(x + 8 * j), b = _mm256_loadu_ps(factors + 8 * j);
        const __m256 y = _mm256_loadu_ps(reciprocals + 8 * j);
        const __m256i twice = _mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(a));
        lowest = _mm256_min_epu32(lowest, _mm256_sub_epi32(twice, _mm256_set1_epi32(1)));
        q[j] = _mm256_mul_ps(a, y);
        q[j] = _mm256_fnmadd_ps(_mm256_fmsub_ps(b, q[j], a), y, q[j]);
    }
    lowest = _mm256_xor_si256(lowest, _mm256_set1_epi32(2 * DQ_MIN_DIVIDED - 1));
    if (!_mm256_testz_si256(lowest, lowest)) return 1;
    for (int j = 0; j < 4; j++) _mm256_storeu_ps(out + 8 * j, q[j]);
    return 0;
}
#endif

#if defined(__F16C__) /* cl.exe never says so */
#define DQ_WIDENS
static inline void dq_widen_step(const uint16_t* x, float* out) {
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)));
}
#endif

#define DQ_BETWEEN
static inline uint32_t dq_between_step(const float* x, int32_t low, int32_t high, int64_t* below, int* finite) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF), max_finite = _mm256_set1_epi32(0x7F7FFFFF);
    __m256i v[4], reached = _mm256_setzero_si256(), out_of_range = reached;
    uint32_t less = 0, outside = 0;
    for (int j = 0; j < 4; j++) {
        v[j] = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(x + 8 * j)), magnitude);
        reached = _mm256_or_si256(reached, _mm256_cmpgt_epi32(v[j], _mm256_set1_epi32(low - 1)));
    }
    if (_mm256_testz_si256(reached, reached)) { /* as most steps do for percentiles close to 1 */
        *below += DQ_BETWEEN_STEP;
        return 0;
    }
    for (int j = 0; j < 4; j++) {
        const __m256i lt = _mm256_cmpgt_epi32(_mm256_set1_epi32(low), v[j]);
        const __m256i gt = _mm256_cmpgt_epi32(v[j], _mm256_set1_epi32(high));
        out_of_range = _mm256_or_si256(out_of_range, _mm256_cmpgt_epi32(v[j], max_finite));
        less |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(lt)) << 8 * j;
        outside |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_or_si256(lt, gt))) << 8 * j;
    }
    *below += _mm_popcnt_u32(less);
    *finite &= _mm256_testz_si256(out_of_range, out_of_range);
    return ~outside;
}

#define DQ_COUNTS_BITS
static inline int dq_count_bits(uint32_t bits) {
    return _mm_popcnt_u32(bits);
}

/* acc + the products of four bytes of w, without a sign, and of a, in each int32. Without VNNI, of which this is
   the form for AVX registers, pairs of products must fit int16. */
static inline __m256i dq_multiply_add(__m256i acc, __m256i w, __m256i a) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, w, a);
#else
    const __m256i pairs = _mm256_maddubs_epi16(w, a);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

/* acc + the products of pairs of int16, added up in each int32. */
static inline __m256i dq_multiply_add_wide(__m256i acc, __m256i w, __m256i a) {
#if defined(__AVX512VNNI__)
    return _mm256_dpwssd_epi32(acc, w, a);
#elif defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(acc, w, a);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w, a));
#endif
}

#ifndef DQ_DOT_STEP
#define DQ_DOT_STEP 32
typedef __m256i dq_dot_acc;
static inline dq_dot_acc dq_dot_zero(void) { return _mm256_setzero_si256(); }
static inline dq_dot_acc dq_dot_add(dq_dot_acc x, dq_dot_acc y) { return _mm256_add_epi32(x, y); }
static inline dq_dot_acc dq_dot_step(dq_dot_acc acc, const int8_t* w, const int8_t* a) {
    /* The sign goes to a, which is never -128 and so can be negated; |-128| is 128 as an unsigned byte.
       A pair is then at most 2 * 128 * 127 = 32,512 and vpmaddubsw cannot saturate. */
    __m256i vw = _mm256_loadu_si256((const __m256i*)w);
#if defined(__GNUC__)
    __asm__("" : "+x"(vw)); /* or gcc loads it twice, and the loads are what this step waits for */
#endif
    const __m256i va = _mm256_sign_epi8(_mm256_loadu_si256((const __m256i*)a), vw);
    return dq_multiply_add(acc, _mm256_abs_epi8(vw), va);
}
static inline dq_dot_acc dq_dot_biased_step(dq_dot_acc acc, const int8_t* w, const int8_t* a) {
    const __m256i vw = _mm256_loadu_si256((const __m256i*)w), va = _mm256_loadu_si256((const __m256i*)a);
    return dq_multiply_add(acc, _mm256_xor_si256(vw, _mm256_set1_epi16(DQ_BIAS)), va);
}
static inline int32_t dq_dot_sum(dq_dot_acc acc) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(acc), _mm256_extracti128_si256(acc, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
#endif

#define DQ_NIBBLE_SUMS
/* Pairs of products, the even codes in the lower half. */
static inline __m256i dq_nibble_pairs(const uint8_t* w, const int8_t* a, __m256i flip) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)w));
    const __m256i codes = _mm256_srlv_epi64(_mm256_xor_si256(twice, flip), _mm256_set_epi64x(4, 4, 0, 0));
    return _mm256_maddubs_epi16(_mm256_and_si256(codes, _mm256_set1_epi8(15)), _mm256_loadu_si256((const __m256i*)a));
}
/* A pair is at most 2 * 15 * 127 = 3,810; four of them, 15,240, fit int16. */
static inline void dq_nibble_sums(const uint8_t* w, const int8_t* a, uint8_t flip, int32_t* sums, ptrdiff_t blocks) {
    const __m256i ones = _mm256_set1_epi16(1), zero = _mm256_setzero_si256(), flips = _mm256_set1_epi8((char)flip);
    for (ptrdiff_t i = 0; i < blocks; i += 4, w += 64, a += 128) {
        const ptrdiff_t left = blocks - i;
        const __m256i p0 = dq_nibble_pairs(w, a, flips), p1 = left > 1 ? dq_nibble_pairs(w + 16, a + 32, flips) : zero;
        const __m256i p2 = left > 2 ? dq_nibble_pairs(w + 32, a + 64, flips) : zero;
        const __m256i p3 = left > 3 ? dq_nibble_pairs(w + 48, a + 96, flips) : zero;
        const __m256i p = _mm256_hadd_epi16(_mm256_hadd_epi16(p0, p1), _mm256_hadd_epi16(p2, p3));
        const __m256i s = _mm256_madd_epi16(p, ones);
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
        if (left > 3)
            _mm_storeu_si128((__m128i*)(sums + i), four);
        else {
            int32_t last[4];
            _mm_storeu_si128((__m128i*)last, four);
            memcpy(sums + i, last, (size_t)left * sizeof(int32_t));
        }
    }
}

#ifndef DQ_LANES
typedef __m256i dq_acc;
typedef __m256i dq_weights;
typedef __m256i dq_broadcast_act;
#define DQ_LANES 8
#define DQ_DEPTH 4
#if defined(__AVXVNNI__)
#define DQ_SPLIT 0
#else
#define DQ_SPLIT 1
#endif
static inline dq_acc dq_acc_zero(void) { return _mm256_setzero_si256(); }
static inline dq_acc dq_acc_load(const int32_t* s) { return _mm256_loadu_si256((const __m256i*)s); }
static inline void dq_acc_store(int32_t* out, dq_acc s) { _mm256_storeu_si256((__m256i*)out, s); }
static inline dq_acc dq_acc_add(dq_acc x, dq_acc y) { return _mm256_add_epi32(x, y); }
static inline dq_broadcast_act dq_broadcast(const uint8_t* a) {
    int32_t four;
    memcpy(&four, a, 4);
    return _mm256_set1_epi32(four);
}
static inline dq_weights dq_weights_load(const uint8_t* w) { return _mm256_loadu_si256((const __m256i*)w); }
static inline dq_acc dq_acc_step(dq_acc acc, dq_weights w, dq_broadcast_act a) {
    return dq_multiply_add(acc, w, a);
}
typedef __m256i dq_wide_weights;
static inline dq_wide_weights dq_wide_load(const int16_t* w) { return _mm256_loadu_si256((const __m256i*)w); }
static inline dq_acc dq_wide_step(dq_acc acc, dq_wide_weights w, dq_broadcast_act a) {
    return dq_multiply_add_wide(acc, w, a);
}
static inline void dq_widen_k_step(const uint8_t* w, int16_t* wide) {
    /* Of each output the even k, and the odd ones; then pairs of both. */
    const __m256i v = _mm256_loadu_si256((const __m256i*)w);
    const __m256i even = _mm256_sub_epi16(_mm256_and_si256(v, _mm256_set1_epi16(0xFF)), _mm256_set1_epi16(128));
    const __m256i odd = _mm256_sub_epi16(_mm256_set1_epi16(127), _mm256_srli_epi16(v, 8));
    const __m256 a = _mm256_castsi256_ps(_mm256_unpacklo_epi16(even, odd));
    const __m256 b = _mm256_castsi256_ps(_mm256_unpackhi_epi16(even, odd));
    _mm256_storeu_ps((float*)wide, _mm256_shuffle_ps(a, b, 0x88));
    _mm256_storeu_ps((float*)(wide + 4 * DQ_LANES), _mm256_shuffle_ps(a, b, 0xDD));
}
#endif

#define DQ_BIASES
/* Which pairs of 32 codes are out of the range of DQ_PAIR, bit j for pair j. */
static inline uint32_t dq_pairs_out_of_range(const int8_t* a) {
    const __m256i sums = _mm256_maddubs_epi16(_mm256_set1_epi8(1), _mm256_loadu_si256((const __m256i*)a));
    const __m256i out_of_range = _mm256_cmpgt_epi16(_mm256_abs_epi16(sums), _mm256_set1_epi16(DQ_PAIR));
    const uint32_t bits = (uint32_t)_mm256_movemask_epi8(_mm256_packs_epi16(out_of_range, out_of_range));
    return (bits & 0xFF) | (bits >> 8 & 0xFF00);
}
static inline uint32_t dq_bias_step(int8_t* a, int32_t* compensation) {
    const __m256i odd = _mm256_set1_epi16((short)0xFF00);
    const __m256i v = _mm256_sub_epi8(_mm256_xor_si256(_mm256_loadu_si256((const __m256i*)a), odd), odd);
    /* A pair adds at most 128 * 127 + 127 * 127 = 32,385. */
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi16(0x7F80), v);
    const __m256i four = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    *compensation += _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
    _mm256_storeu_si256((__m256i*)a, v);
    return dq_pairs_out_of_range(a);
}

#ifndef DQ_ACC16_STEPS
typedef __m256i dq_acc16;
typedef __m256 dq_floats;
typedef struct {
    __m256i even, odd;
} dq_codes;
static inline dq_codes dq_codes_load(const uint8_t* w) {
    const __m256i v = _mm256_loadu_si256((const __m256i*)w), low = _mm256_set1_epi8(0x0F);
    return (dq_codes){_mm256_and_si256(v, low), _mm256_and_si256(_mm256_srli_epi16(v, 4), low)};
}
static inline dq_acc16 dq_acc16_zero(void) { return _mm256_setzero_si256(); }
#if defined(__AVXVNNI__)
#define DQ_ACC16_STEPS (1 << 20)
static inline dq_acc16 dq_acc16_step(dq_acc16 part, dq_codes w, dq_broadcast_act even, dq_broadcast_act odd) {
    return dq_multiply_add(dq_multiply_add(part, w.even, even), w.odd, odd);
}
static inline dq_acc dq_acc_add16(dq_acc s, dq_acc16 part) { return _mm256_add_epi32(s, part); }
#else
#define DQ_ACC16_STEPS 4
static inline dq_acc16 dq_acc16_step(dq_acc16 part, dq_codes w, dq_broadcast_act even, dq_broadcast_act odd) {
    /* int16 lanes: a step adds two pairs of at most 2 * 15 * 127 = 3,810, and 8 * 3,810 < 2**15. */
    part = _mm256_add_epi16(part, _mm256_maddubs_epi16(w.even, even));
    return _mm256_add_epi16(part, _mm256_maddubs_epi16(w.odd, odd));
}
static inline dq_acc dq_acc_add16(dq_acc s, dq_acc16 part) {
    return _mm256_add_epi32(s, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
}
#endif
static inline dq_floats dq_floats_load(const float* x) { return _mm256_loadu_ps(x); }
static inline void dq_floats_store(float* out, dq_floats x) { _mm256_storeu_ps(out, x); }
static inline dq_floats dq_zero_points_load(const uint8_t* z) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)z)));
}
static inline dq_floats dq_floats_add(dq_floats x, dq_floats y) { return _mm256_add_ps(x, y); }
static inline dq_floats dq_floats_sub(dq_floats x, dq_floats y) { return _mm256_sub_ps(x, y); }
static inline dq_floats dq_floats_scale(dq_floats x, float scale) {
    return _mm256_mul_ps(x, _mm256_set1_ps(scale));
}
static inline dq_floats dq_hadamard_lanes(dq_floats x) {
    const __m256 sign1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
    const __m256 sign2 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const __m256 sign4 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    x = _mm256_fmadd_ps(x, sign1, _mm256_permute_ps(x, 0xB1));
    x = _mm256_fmadd_ps(x, sign2, _mm256_permute_ps(x, 0x4E));
    return _mm256_fmadd_ps(x, sign4, _mm256_permute2f128_ps(x, x, 1));
}
static inline dq_floats dq_scaled(dq_acc s, dq_floats scales) { return _mm256_mul_ps(_mm256_cvtepi32_ps(s), scales); }
static inline dq_floats dq_group_add(dq_floats acc, dq_acc s, dq_floats zero_points, float a_sum,
                                     dq_floats scales) {
    const __m256 sum = _mm256_fnmadd_ps(zero_points, _mm256_set1_ps(a_sum), _mm256_cvtepi32_ps(s));
    return _mm256_add_ps(acc, _mm256_mul_ps(sum, scales));
}
static inline dq_floats dq_group_add_minimums(dq_floats acc, dq_acc s, dq_floats minimums, float a_sum,
                                              dq_floats scales) {
    const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(s), scales);
    return _mm256_add_ps(acc, _mm256_add_ps(sum, _mm256_mul_ps(minimums, _mm256_set1_ps(a_sum))));
}
#endif

/* ---- Thin layers: kernels/wide.pxi ------------------------------------------------------------------------ */

#include "avx2_thin.h"

#if !defined(__AVX512BW__) && !defined(__AVXVNNI__)
#include "avx2_matmul.h"
#endif
