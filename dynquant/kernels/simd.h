/* The vector steps that the compiler does not reach from a plain loop. The loops are in the .pxi files.

   quantize step   DQ_STEP floats to int8 codes. Left to itself gcc narrows int32 to int8 with twice the
                   shuffles, and half the speed.
   widen step      DQ_WIDEN_STEP binary16 to float32. gcc 12 does not use the conversion instruction.
   between step    which of DQ_BETWEEN_STEP magnitudes lie between two bounds.
   dot step        DQ_DOT_STEP products of int8 added to a vector of int32 sums. Left to itself gcc widens
                   to int16 and multiplies without adding pairs.

   sums step       DQ_DEPTH products for each of DQ_LANES outputs, the step of a matrix product.
   activations step   what a sums step needs of activations.
   tiles           many sums steps for many rows of activations.
   codes step      the same for weights of 4 bits, 8 products for each of DQ_LANES outputs; and the end of a
                   group, where sums become floats.
   quotients       DQ_QUOTIENTS floats divided by numbers whose reciprocals are known, without a division.
   rotation step   the passes of a Hadamard transform within one vector, which loops cannot shuffle.

   Each has a form in plain C that every compiler takes, and forms for what instructions offer. A form may
   differ from another in speed only, never in a bit of any result. */
#ifndef DQ_SIMD_H
#define DQ_SIMD_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__) || defined(_M_X64)
#define DQ_SSE2
#include <immintrin.h>
#endif

/* clang's older name, too. On Linux alone processes can use the tiles. */
#if (defined(__AMX_INT8__) || defined(__AMXINT8__)) && defined(__linux__)
#define DQ_AMX
#endif

/* In wider registers, as those of the x87, sums and quotients are rounded twice. 16 says that even _Float16 is
   computed as it is. */
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "float arithmetic has to be that of float: compile with -msse2 -mfpmath=sse (x86) or -std=gnu11 (s390)"
#endif

/* No product and sum in one rounding, in this whole source: what -ffp-contract=off says to gcc. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(_MSC_VER)
#pragma fp_contract(off)
#endif

/* Has n bytes fetched into the caches; any address will do. */
static inline void dq_prefetch(const void* bytes, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
#if defined(__GNUC__)
        __builtin_prefetch((const char*)bytes + i);
#elif defined(DQ_SSE2)
        _mm_prefetch((const char*)bytes + i, _MM_HINT_T0);
#else
        (void)bytes;
#endif
    }
}

static inline int32_t dq_bits(float x) {
    int32_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}

static inline float dq_float(int32_t b) {
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}

/* 1.5 * 2**23: added to y, |y| < 2**22, it leaves the integer nearest y (half to even) in the low bits of
   the sum, in two's complement. As integers the bits of the sum rise with y as long as the sum is positive, and
   are negative where it is not, so that clamping them clamps y. */
#define DQ_MAGIC 12582912.0f
#define DQ_MAGIC_BITS 0x4B400000

/* codes[i] = clamp(integer nearest x[i] * lo, -clip, clip) for DQ_STEP floats; with `within` the caller vouches
   that every x[i] * lo and x[i] * hi rounds into [-clip, clip], and nothing is clamped.
   Returns nonzero when x[i] * lo and x[i] * hi do not round to the same integer for some i; only where it
   returns zero are the codes meant.
   With `stream` the codes, then aligned to DQ_STEP, are written past the caches: a line that will not be
   read soon need not be read before it is written. dq_stream_end() must follow the last such step.
   Whether the product is rounded before the sum is free to differ between forms: the codes count only where
   both bounds agree. The vector forms clamp late, by saturating packs and in bytes. Taking off DQ_MAGIC_BITS
   wraps only where the sum is negative, x * lo below -1.5 * 2**23, and there x * hi is integers away. */
#if defined(__AVX512BW__)

#define DQ_STEP 64
static inline void dq_stream_end(void) { _mm_sfence(); }
static inline int dq_quantize_step(const float* x, float lo, float hi, int32_t clip, int within, int stream,
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
        if (within && !stream) _mm_storeu_si128((__m128i*)(codes + 16 * j), _mm512_cvtepi32_epi8(low));
        else a[j] = _mm512_sub_epi32(low, _mm512_set1_epi32(DQ_MAGIC_BITS));
    }
    if (within && !stream) return _mm512_test_epi32_mask(differ, differ) != 0;
    __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(a[0], a[1]), _mm512_packs_epi32(a[2], a[3]));
    bytes = _mm512_max_epi8(bytes, _mm512_set1_epi8((char)-clip));
    bytes = _mm512_min_epi8(bytes, _mm512_set1_epi8((char)clip));
    bytes = _mm512_permutexvar_epi32(lanes, bytes);
    if (stream) _mm512_stream_si512((__m512i*)codes, bytes);
    else _mm512_storeu_si512(codes, bytes);
    return _mm512_test_epi32_mask(differ, differ) != 0;
}

#elif defined(__AVX2__)

#define DQ_STEP 32
static inline void dq_stream_end(void) { _mm_sfence(); }
static inline int dq_quantize_step(const float* x, float lo, float hi, int32_t clip, int within, int stream,
                                   int8_t* codes) {
    const __m256 vlo = _mm256_set1_ps(lo), vhi = _mm256_set1_ps(hi), magic = _mm256_set1_ps(DQ_MAGIC);
    const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), low_byte = _mm256_set1_epi16(0xFF);
    __m256i low[4], high[4], a, b, differ, bytes;
    for (int j = 0; j < 4; j++) {
        const __m256 v = _mm256_loadu_ps(x + 8 * j);
        low[j] = _mm256_castps_si256(_mm256_fmadd_ps(v, vlo, magic));
        high[j] = _mm256_castps_si256(_mm256_fmadd_ps(v, vhi, magic));
    }
    if (within) {
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
    if (stream) _mm256_stream_si256((__m256i*)codes, bytes);
    else _mm256_storeu_si256((__m256i*)codes, bytes);
    return !_mm256_testz_si256(differ, differ);
}

#else

#define DQ_STEP 64 /* a loop of 16 or fewer gcc unrolls whole, and then does not vectorise */
static inline void dq_stream_end(void) {}
static inline int dq_quantize_step(const float* x, float lo, float hi, int32_t clip, int within, int stream,
                                   int8_t* codes) {
    int32_t differ = 0;
    (void)stream;
    for (int j = 0; j < DQ_STEP; j++) {
        int32_t a = dq_bits(x[j] * lo + DQ_MAGIC);
        differ |= a ^ dq_bits(x[j] * hi + DQ_MAGIC);
        if (!within) {
            a = a < DQ_MAGIC_BITS - clip ? DQ_MAGIC_BITS - clip : a;
            a = a > DQ_MAGIC_BITS + clip ? DQ_MAGIC_BITS + clip : a;
        }
        codes[j] = (int8_t)(a & 0xFF);
    }
    return differ != 0;
}

#endif

/* out[i] = codes[i] * scale for DQ_VALUES floats, a cache line, to which out is aligned; past the caches, as
   above. */
#define DQ_VALUES 16
static inline void dq_stream_values(const int8_t* codes, float scale, float* out) {
#if defined(__AVX512BW__)
    const __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes)));
    _mm512_stream_ps(out, _mm512_mul_ps(v, _mm512_set1_ps(scale)));
#elif defined(__AVX2__)
    for (int j = 0; j < DQ_VALUES; j += 8) {
        const __m128i eight = _mm_loadl_epi64((const __m128i*)(codes + j));
        const __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
        _mm256_stream_ps(out + j, _mm256_mul_ps(v, _mm256_set1_ps(scale)));
    }
#else
    for (int j = 0; j < DQ_VALUES; j++) out[j] = codes[j] * scale;
#endif
}

/* out = x / factors, rounded as the division rounds it, for DQ_QUOTIENTS floats, with what 1 / factors is rounded to;
   or nonzero, and nothing done, where an |x| is so small that this could fail. Factors lie in [2**-60, 2**60], no |x|
   is above 2**64. DQ_QUOTIENTS is 0 where there is no such form.

   A quotient is corrected by its remainder, as Markstein does (IBM Journal of Research and Development 34, 1990).
   Of fractions a, b in [1, 2): y = fl(1 / b) is off by 2**-25 at most, and so q = fl(a * y) by less than 1.5 ulp.
   a - b * q is then a float or, rounded, within 2**-47 of it, and q + (a - b * q) * y, before it is rounded, within
   2**-46 of a / b. So it could be rounded to another float only where a / b is as close as that to a tie of two
   floats; of all such pairs none is (tests/test_smooth.py tries them all). With |x| at least 2**-64, or 0,
   whatever comes up is normal or 0. It is the negative of the remainder that is computed: this leaves zeros their
   sign. Twice an integer is a float's without its sign; 1 less puts 0 above all others. */
#define DQ_LEAST_DIVIDED 0x1F800000 /* the bits of 2**-64 */
#if defined(__AVX512BW__)
#define DQ_QUOTIENTS 64
static inline int dq_quotients(const float* x, const float* factors, const float* reciprocals, float* out) {
    __m512i least = _mm512_set1_epi32(-1);
    __m512 q[4];
    for (int j = 0; j < 4; j++) {
        const __m512 a = _mm512_loadu_ps(x + 16 * j), b = _mm512_loadu_ps(factors + 16 * j);
        const __m512 y = _mm512_loadu_ps(reciprocals + 16 * j);
        const __m512i twice = _mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(a));
        least = _mm512_min_epu32(least, _mm512_sub_epi32(twice, _mm512_set1_epi32(1)));
        q[j] = _mm512_mul_ps(a, y);
        q[j] = _mm512_fnmadd_ps(_mm512_fmsub_ps(b, q[j], a), y, q[j]);
    }
    if (_mm512_cmplt_epu32_mask(least, _mm512_set1_epi32(2 * DQ_LEAST_DIVIDED - 1))) return 1;
    for (int j = 0; j < 4; j++) _mm512_storeu_ps(out + 16 * j, q[j]);
    return 0;
}
#elif defined(__AVX2__)
#define DQ_QUOTIENTS 32
static inline int dq_quotients(const float* x, const float* factors, const float* reciprocals, float* out) {
    __m256i least = _mm256_set1_epi32(2 * DQ_LEAST_DIVIDED - 1);
    __m256 q[4];
    for (int j = 0; j < 4; j++) {
        const __m256 a = _mm256_loadu_ps(x + 8 * j), b = _mm256_loadu_ps(factors + 8 * j);
        const __m256 y = _mm256_loadu_ps(reciprocals + 8 * j);
        const __m256i twice = _mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(a));
        least = _mm256_min_epu32(least, _mm256_sub_epi32(twice, _mm256_set1_epi32(1)));
        q[j] = _mm256_mul_ps(a, y);
        q[j] = _mm256_fnmadd_ps(_mm256_fmsub_ps(b, q[j], a), y, q[j]);
    }
    least = _mm256_xor_si256(least, _mm256_set1_epi32(2 * DQ_LEAST_DIVIDED - 1));
    if (!_mm256_testz_si256(least, least)) return 1;
    for (int j = 0; j < 4; j++) _mm256_storeu_ps(out + 8 * j, q[j]);
    return 0;
}
#else
#define DQ_QUOTIENTS 0
static inline int dq_quotients(const float* x, const float* factors, const float* reciprocals, float* out) {
    (void)x, (void)factors, (void)reciprocals, (void)out;
    return 1;
}
#endif

/* One binary16 number. Exponent and fraction move to float32's places, which leaves a value 2**112 too small
   (the biases are 15 and 127); the product with 2**112 is exact and also normalises subnormals. Infinity and
   NaN would come out as 2**16 and above, so they get float32's top exponent by hand. */
static inline float dq_widen(uint16_t h) {
    int32_t b = dq_bits(dq_float((int32_t)(h & 0x7FFF) << 13) * 5.1922968585348276e33f);
    b |= (h & 0x7C00) == 0x7C00 ? 0x7F800000 : 0;
    return dq_float(b | (int32_t)((uint32_t)(h & 0x8000) << 16));
}

#define DQ_WIDEN_STEP 8
static inline void dq_widen_step(const uint16_t* x, float* out) {
#if defined(__F16C__)
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)));
#else
    for (int j = 0; j < DQ_WIDEN_STEP; j++) out[j] = dq_widen(x[j]);
#endif
}

/* Bit j of the result is set where the bits of |x[j]| lie in [low, high], for DQ_BETWEEN_STEP floats. *below gains
   how many lie below low, *finite becomes 0 where one is NaN or infinite. */
#define DQ_BETWEEN_STEP 32
static inline uint32_t dq_between_step(const float* x, int32_t low, int32_t high, int64_t* below, int* finite) {
#if defined(__AVX2__)
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF), most = _mm256_set1_epi32(0x7F7FFFFF);
    __m256i v[4], reached = _mm256_setzero_si256(), beyond = reached;
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
        beyond = _mm256_or_si256(beyond, _mm256_cmpgt_epi32(v[j], most));
        less |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(lt)) << 8 * j;
        outside |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_or_si256(lt, gt))) << 8 * j;
    }
    *below += _mm_popcnt_u32(less);
    *finite &= _mm256_testz_si256(beyond, beyond);
    return ~outside;
#else
    uint32_t inside = 0;
    for (int j = 0; j < DQ_BETWEEN_STEP; j++) {
        const int32_t b = dq_bits(x[j]) & 0x7FFFFFFF;
        *below += b < low;
        *finite &= b <= 0x7F7FFFFF;
        inside |= (uint32_t)(b >= low && b <= high) << j;
    }
    return inside;
#endif
}

/* The place of the lowest bit that is set in bits, which is not 0. */
static inline int dq_lowest_bit(uint32_t bits) {
#if defined(__GNUC__)
    return __builtin_ctz(bits);
#else
    int place = 0;
    while (!(bits >> place & 1)) place++;
    return place;
#endif
}

/* How many bits are set. */
static inline int dq_count_bits(uint32_t bits) {
#if defined(__AVX2__)
    return _mm_popcnt_u32(bits);
#else
    int count = 0;
    for (; bits; bits &= bits - 1) count++;
    return count;
#endif
}

/* acc += w[i] * a[i] over DQ_DOT_STEP elements, w in [-128, 127], a in [-127, 127]; exact as long as every
   lane's sum fits int32. dq_acc_sum adds up the lanes, whose total must fit too.

   dq_raised_step takes w as bytes without a sign, made of it by an exclusive or with DQ_RAISED, and a as it is
   to be for a sums step, below: fewer instructions, and a number that is to be taken off the sum. */
#define DQ_RAISED 0x7F80

#if defined(__AVX2__)
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
#endif

/* How the weights of a product with one vector come from the caches and from memory, which processors differ in:
   DQ_STREAMS, 1 or 4, is in how many places 8-bit ones are read by turns, DQ_FETCHED_FROM from how many bytes on
   4-bit ones are fetched ahead. On an AMD EPYC of family 25, model 1 (Zen 3), four places are 1.4 to 1.7 times as
   fast as one where weights come from the last cache or from memory, and fetching half as fast again; neither
   costs anything where they are closer. On model 17 (Zen 4), which stands for all that have VNNI and no AMX, one
   place is the fastest, and fetching is worth it from memory alone. */
#if defined(__AVX512VNNI__) && !defined(DQ_AMX)
#define DQ_STREAMS 1
#define DQ_FETCHED_FROM (20 << 20)
#else
#define DQ_STREAMS 4
#define DQ_FETCHED_FROM 0
#endif

#if defined(__AVX512VNNI__)

/* vpdpbusd multiplies unsigned by signed bytes: a is taken as a + 128, and 128 * w is summed beside it.
   A lane gains at most 4 * 255 * 128 = 130,560 a step. */
#define DQ_DOT_STEP 64
typedef struct {
    __m512i shifted, excess;
} dq_acc;
static inline dq_acc dq_acc_zero(void) {
    return (dq_acc){_mm512_setzero_si512(), _mm512_setzero_si512()};
}
static inline dq_acc dq_acc_add(dq_acc x, dq_acc y) {
    return (dq_acc){_mm512_add_epi32(x.shifted, y.shifted), _mm512_add_epi32(x.excess, y.excess)};
}
static inline dq_acc dq_dot_step(dq_acc acc, const int8_t* w, const int8_t* a) {
    const __m512i half = _mm512_set1_epi8((char)0x80), vw = _mm512_loadu_si512(w);
    acc.shifted = _mm512_dpbusd_epi32(acc.shifted, _mm512_xor_si512(_mm512_loadu_si512(a), half), vw);
    acc.excess = _mm512_dpbusd_epi32(acc.excess, half, vw);
    return acc;
}
static inline dq_acc dq_raised_step(dq_acc acc, const int8_t* w, const int8_t* a) {
    const __m512i raised = _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi16(DQ_RAISED));
    acc.shifted = _mm512_dpbusd_epi32(acc.shifted, raised, _mm512_loadu_si512(a));
    return acc;
}
static inline int32_t dq_acc_sum(dq_acc acc) {
    return _mm512_reduce_add_epi32(_mm512_sub_epi32(acc.shifted, acc.excess));
}

#elif defined(__AVX2__)

#define DQ_DOT_STEP 32
typedef __m256i dq_acc;
static inline dq_acc dq_acc_zero(void) { return _mm256_setzero_si256(); }
static inline dq_acc dq_acc_add(dq_acc x, dq_acc y) { return _mm256_add_epi32(x, y); }
static inline dq_acc dq_dot_step(dq_acc acc, const int8_t* w, const int8_t* a) {
    /* The sign goes to a, which is never -128 and so can be negated; |-128| is 128 as an unsigned byte.
       A pair is then at most 2 * 128 * 127 = 32,512 and vpmaddubsw cannot saturate. */
    __m256i vw = _mm256_loadu_si256((const __m256i*)w);
#if defined(__GNUC__)
    __asm__("" : "+x"(vw)); /* or gcc loads it twice, and the loads are what this step waits for */
#endif
    const __m256i va = _mm256_sign_epi8(_mm256_loadu_si256((const __m256i*)a), vw);
    return dq_multiply_add(acc, _mm256_abs_epi8(vw), va);
}
static inline dq_acc dq_raised_step(dq_acc acc, const int8_t* w, const int8_t* a) {
    const __m256i vw = _mm256_loadu_si256((const __m256i*)w), va = _mm256_loadu_si256((const __m256i*)a);
    return dq_multiply_add(acc, _mm256_xor_si256(vw, _mm256_set1_epi16(DQ_RAISED)), va);
}
static inline int32_t dq_acc_sum(dq_acc acc) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(acc), _mm256_extracti128_si256(acc, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

#elif defined(DQ_SSE2)

#define DQ_DOT_STEP 16
typedef __m128i dq_acc;
static inline dq_acc dq_acc_zero(void) { return _mm_setzero_si128(); }
static inline dq_acc dq_acc_add(dq_acc x, dq_acc y) { return _mm_add_epi32(x, y); }
static inline dq_acc dq_dot_step(dq_acc acc, const int8_t* w, const int8_t* a) {
    /* Each byte is doubled into an int16 and shifted down, which extends its sign. */
    const __m128i vw = _mm_loadu_si128((const __m128i*)w), va = _mm_loadu_si128((const __m128i*)a);
    const __m128i low = _mm_madd_epi16(_mm_srai_epi16(_mm_unpacklo_epi8(vw, vw), 8),
                                       _mm_srai_epi16(_mm_unpacklo_epi8(va, va), 8));
    const __m128i high = _mm_madd_epi16(_mm_srai_epi16(_mm_unpackhi_epi8(vw, vw), 8),
                                        _mm_srai_epi16(_mm_unpackhi_epi8(va, va), 8));
    return _mm_add_epi32(acc, _mm_add_epi32(low, high));
}
static inline dq_acc dq_raised_step(dq_acc acc, const int8_t* w, const int8_t* a) {
    const __m128i zero = _mm_setzero_si128(), va = _mm_loadu_si128((const __m128i*)a);
    const __m128i vw = _mm_xor_si128(_mm_loadu_si128((const __m128i*)w), _mm_set1_epi16(DQ_RAISED));
    const __m128i low = _mm_srai_epi16(_mm_unpacklo_epi8(va, va), 8);
    const __m128i high = _mm_srai_epi16(_mm_unpackhi_epi8(va, va), 8);
    acc = _mm_add_epi32(acc, _mm_madd_epi16(_mm_unpacklo_epi8(vw, zero), low));
    return _mm_add_epi32(acc, _mm_madd_epi16(_mm_unpackhi_epi8(vw, zero), high));
}
static inline int32_t dq_acc_sum(dq_acc acc) {
    acc = _mm_add_epi32(acc, _mm_shuffle_epi32(acc, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(acc, _mm_shuffle_epi32(acc, 0xB1)));
}

#else

#define DQ_DOT_STEP 4
typedef int32_t dq_acc;
static inline dq_acc dq_acc_zero(void) { return 0; }
static inline dq_acc dq_acc_add(dq_acc x, dq_acc y) { return x + y; }
static inline dq_acc dq_dot_step(dq_acc acc, const int8_t* w, const int8_t* a) {
    return acc + w[0] * a[0] + w[1] * a[1] + w[2] * a[2] + w[3] * a[3];
}
static inline dq_acc dq_raised_step(dq_acc acc, const int8_t* w, const int8_t* a) {
    for (int j = 0; j < DQ_DOT_STEP; j++) acc += (uint8_t)(w[j] ^ DQ_RAISED >> j % 2 * 8) * a[j];
    return acc;
}
static inline int32_t dq_acc_sum(dq_acc acc) { return acc; }

#endif

/* acc[lane] += sum over DQ_DEPTH k of w[k][lane] * a[k], w in [0, 255], a in [-127, 127], exact as long as
   acc fits: the step of a matrix product. trim.pxi says what w and a stand for. Weights come DQ_LANES outputs
   side by side, DQ_DEPTH consecutive k of an output next to each other, which is what one multiply-add instruction
   takes; a dq_weights is DQ_LANES * DQ_DEPTH bytes of them, made ready. Activations come as DQ_DEPTH consecutive k in four bytes, which dq_spread
   gives to every lane: bytes, or int16 where DQ_DEPTH is 2.

   Where DQ_TRIMMED is 1, products are added to each other in int16, and no pair of activations, k and k + 1 for
   even k, may be beyond DQ_PAIR in sum.

   dq_activations_step makes DQ_ACTIVATIONS_STEP codes what a sums step takes, all but the trimming: it negates
   the odd ones, adds to *excess what is to be taken off for them, and returns the pairs beyond DQ_PAIR, bit j
   for pair j. */
#define DQ_PAIR 128
#define DQ_ACTIVATIONS_STEP 32

#if defined(__AVX512BW__)

typedef __m512i dq_sums;
typedef __m512i dq_weights;
typedef __m512i dq_spread_act;
#define DQ_LANES 16
#define DQ_DEPTH 4
static inline dq_sums dq_sums_zero(void) { return _mm512_setzero_si512(); }
static inline dq_sums dq_sums_load(const int32_t* s) { return _mm512_loadu_si512(s); }
static inline void dq_sums_store(int32_t* out, dq_sums s) { _mm512_storeu_si512(out, s); }
static inline dq_spread_act dq_spread(const uint8_t* a) {
    int32_t four;
    memcpy(&four, a, 4);
    return _mm512_set1_epi32(four);
}
static inline dq_weights dq_weights_load(const uint8_t* w) { return _mm512_loadu_si512(w); }
#if defined(__AVX512VNNI__)
#define DQ_TRIMMED 0
static inline dq_sums dq_sums_step(dq_sums acc, dq_weights w, dq_spread_act a) {
    return _mm512_dpbusd_epi32(acc, w, a);
}
#else
#define DQ_TRIMMED 1
static inline dq_sums dq_sums_step(dq_sums acc, dq_weights w, dq_spread_act a) {
    const __m512i pairs = _mm512_maddubs_epi16(w, a);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif

#elif defined(__AVX2__)

typedef __m256i dq_sums;
typedef __m256i dq_weights;
typedef __m256i dq_spread_act;
#define DQ_LANES 8
#define DQ_DEPTH 4
#if defined(__AVXVNNI__)
#define DQ_TRIMMED 0
#else
#define DQ_TRIMMED 1
#endif
static inline dq_sums dq_sums_zero(void) { return _mm256_setzero_si256(); }
static inline dq_sums dq_sums_load(const int32_t* s) { return _mm256_loadu_si256((const __m256i*)s); }
static inline void dq_sums_store(int32_t* out, dq_sums s) { _mm256_storeu_si256((__m256i*)out, s); }
static inline dq_spread_act dq_spread(const uint8_t* a) {
    int32_t four;
    memcpy(&four, a, 4);
    return _mm256_set1_epi32(four);
}
static inline dq_weights dq_weights_load(const uint8_t* w) { return _mm256_loadu_si256((const __m256i*)w); }
static inline dq_sums dq_sums_step(dq_sums acc, dq_weights w, dq_spread_act a) {
    return dq_multiply_add(acc, w, a);
}

#elif defined(DQ_SSE2)

typedef __m128i dq_sums;
typedef __m128i dq_weights;
typedef __m128i dq_spread_act;
#define DQ_LANES 4
#define DQ_DEPTH 2
#define DQ_TRIMMED 0
static inline dq_sums dq_sums_zero(void) { return _mm_setzero_si128(); }
static inline dq_sums dq_sums_load(const int32_t* s) { return _mm_loadu_si128((const __m128i*)s); }
static inline void dq_sums_store(int32_t* out, dq_sums s) { _mm_storeu_si128((__m128i*)out, s); }
static inline dq_spread_act dq_spread(const uint8_t* a) {
    int32_t four;
    memcpy(&four, a, 4);
    return _mm_set1_epi32(four);
}
static inline dq_weights dq_weights_load(const uint8_t* w) {
    return _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)w), _mm_setzero_si128());
}
static inline dq_sums dq_sums_step(dq_sums acc, dq_weights w, dq_spread_act a) {
    return _mm_add_epi32(acc, _mm_madd_epi16(w, a));
}

#else

typedef int32_t dq_sums;
typedef struct {
    int16_t k0, k1;
} dq_weights;
typedef dq_weights dq_spread_act;
#define DQ_LANES 1
#define DQ_DEPTH 2
#define DQ_TRIMMED 0
static inline dq_sums dq_sums_zero(void) { return 0; }
static inline dq_sums dq_sums_load(const int32_t* s) { return *s; }
static inline void dq_sums_store(int32_t* out, dq_sums s) { *out = s; }
static inline dq_spread_act dq_spread(const uint8_t* a) {
    dq_weights pair;
    memcpy(&pair, a, 4);
    return pair;
}
static inline dq_weights dq_weights_load(const uint8_t* w) { return (dq_weights){w[0], w[1]}; }
static inline dq_sums dq_sums_step(dq_sums acc, dq_weights w, dq_spread_act a) {
    return acc + w.k0 * a.k0 + w.k1 * a.k1;
}

#endif

static inline uint32_t dq_activations_step(int8_t* a, int32_t* excess) {
#if defined(__AVX2__)
    const __m256i odd = _mm256_set1_epi16((short)0xFF00);
    const __m256i v = _mm256_sub_epi8(_mm256_xor_si256(_mm256_loadu_si256((const __m256i*)a), odd), odd);
    /* A pair adds at most 128 * 127 + 127 * 127 = 32,385. */
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi16(0x7F80), v);
    const __m256i four = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    const __m256i beyond = _mm256_cmpgt_epi16(
        _mm256_abs_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), v)), _mm256_set1_epi16(DQ_PAIR));
    const uint32_t bits = (uint32_t)_mm256_movemask_epi8(_mm256_packs_epi16(beyond, beyond));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    *excess += _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
    _mm256_storeu_si256((__m256i*)a, v);
    return (bits & 0xFF) | (bits >> 8 & 0xFF00);
#else
    uint32_t bits = 0;
    for (int j = 0; j < DQ_ACTIVATIONS_STEP / 2; j++) {
        const int even = a[2 * j], odd = a[2 * j + 1];
        *excess += 128 * even - 127 * odd;
        a[2 * j + 1] = (int8_t)-odd;
        bits |= (uint32_t)(even - odd > DQ_PAIR || odd - even > DQ_PAIR) << j;
    }
    return bits;
#endif
}

/* dq_tiles: sums (rows, 2 * DQ_LANES), as those of `steps` sums steps, a multiple of `deep`, for DQ_TILES_FROM to
   DQ_TILE_ROWS rows of a, `stride` bytes apart; with `add` they are added to sums. There is room for DQ_TILE_ROWS.
   Between dq_tiles_begin and dq_tiles_end. `deep` is DQ_STEPS, or with AMX a number of steps up to that.

   With AMX that is a product of tiles: registers of up to 16 lines of 64 bytes. An instruction multiplies a tile of
   activations, 16 rows of 64 k, with a tile of weights, 64 k of 16 outputs, and adds up in int32. dq_tiles_begin
   says how many rows a tile has, 16 or fewer, and how many steps of 4 k, `deep`; dq_tiles then takes as many rows, or
   from 16 to 32, and the second tile ends at the last row and shares some with the first. dq_tiles_end is for the
   thread that goes on, which is expensive to switch while tiles are in use.

   With VNNI, 16 sums hide the latency of two instructions in each cycle, which Intel's processors begin; `add` is
   not for these.

   dq_unpack_units: the steps, two for each, of units of 2 * DQ_LANES outputs of 4-bit codes, for dq_tiles with AMX;
   products of DQ_GROUP_TILES_FROM rows and more go that way, none if it is 0. */
#if defined(DQ_AMX)
#define DQ_STEPS 16
#define DQ_TILE_ROWS 32
#define DQ_TILES_FROM 2
static inline void dq_tiles_begin(int rows, int deep) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_of_a_row[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    /* 0..3 are sums, 4 and 5 activations, 6 and 7 weights. */
    for (int t = 0; t < 8; t++) {
        shapes.bytes_of_a_row[t] = (uint16_t)(t == 4 || t == 5 ? 4 * deep : 64);
        shapes.rows[t] = (uint8_t)(t < 6 ? rows : deep);
    }
    __asm__ volatile("" : : "r"(&shapes) : "memory"); /* gcc takes the instruction to read 8 bytes of them */
    _tile_loadconfig(&shapes);
}
static inline void dq_tiles_end(void) { _tile_release(); }
#define dq_tile_begin(t, add, sums) \
    do { \
        if (add) _tile_loadd(t, sums, 128); \
        else _tile_zero(t); \
    } while (0)
static inline void dq_tiles(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, int rows, int32_t* sums,
                            ptrdiff_t steps, int deep, int add) {
    const int second = rows - 16, lines = 128; /* bytes from one step of weights to the next, and of sums */
    dq_tile_begin(0, add, sums);
    dq_tile_begin(1, add, sums + 16);
    if (second <= 0) {
        for (ptrdiff_t i = 0; i < steps; i += deep) {
            _tile_loadd(4, a + 4 * i, stride);
            _tile_loadd(6, w + lines * i, lines);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(7, w + lines * i + 64, lines);
            _tile_dpbsud(1, 4, 7);
        }
    } else {
        dq_tile_begin(2, add, sums + 32 * second);
        dq_tile_begin(3, add, sums + 32 * second + 16);
        for (ptrdiff_t i = 0; i < steps; i += deep) {
            _tile_loadd(6, w + lines * i, lines);
            _tile_loadd(4, a + 4 * i, stride);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(7, w + lines * i + 64, lines);
            _tile_dpbsud(1, 4, 7);
            _tile_loadd(5, a + second * stride + 4 * i, stride);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(2, sums + 32 * second, lines);
        _tile_stored(3, sums + 32 * second + 16, lines);
    }
    _tile_stored(0, sums, lines);
    _tile_stored(1, sums + 16, lines);
}
#define DQ_GROUP_TILES_FROM 5
static inline void dq_unpack_units(const uint8_t* w, uint8_t* steps, ptrdiff_t units) {
    const __m512i low = _mm512_set1_epi8(0x0F);
    for (ptrdiff_t i = 0; i < units; i++)
        for (int half = 0; half < 128; half += 64) {
            const __m512i v = _mm512_loadu_si512(w + 128 * i + half);
            _mm512_storeu_si512(steps + 256 * i + half, _mm512_and_si512(v, low));
            _mm512_storeu_si512(steps + 256 * i + 128 + half, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
        }
}
#else
#define DQ_STEPS 2
#define DQ_TILES_FROM 5
#define DQ_GROUP_TILES_FROM 0
static inline void dq_unpack_units(const uint8_t* w, uint8_t* steps, ptrdiff_t units) {
    (void)w, (void)steps, (void)units;
}
static inline void dq_tiles_begin(int rows, int deep) { (void)rows, (void)deep; }
static inline void dq_tiles_end(void) {}
#if defined(__AVX512VNNI__)
#define DQ_TILE_ROWS 8
#define DQ_EACH_ROW(of) of(0) of(1) of(2) of(3) of(4) of(5) of(6) of(7)
/* What is past the last row is that row again. */
#define DQ_BEGIN(r) \
    const uint8_t* a##r = a + (r < rows ? r : rows - 1) * stride; \
    __m512i s##r = _mm512_setzero_si512(), t##r = s##r;
#define DQ_MULTIPLY(r) \
    x = dq_spread(a##r + 4 * i); \
    s##r = _mm512_dpbusd_epi32(s##r, w0, x); \
    t##r = _mm512_dpbusd_epi32(t##r, w1, x);
#define DQ_STORE(r) \
    _mm512_storeu_si512(sums + 32 * r, s##r); \
    _mm512_storeu_si512(sums + 32 * r + 16, t##r);
static inline void dq_tiles(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, int rows, int32_t* sums,
                            ptrdiff_t steps, int deep, int add) {
    (void)deep, (void)add;
    __m512i w0, w1, x;
    DQ_EACH_ROW(DQ_BEGIN)
    for (ptrdiff_t i = 0; i < steps; i++) {
        dq_prefetch(w + 128 * steps, 128); /* of the next panel, as in tile_4 */
        w0 = _mm512_loadu_si512(w);
        w1 = _mm512_loadu_si512(w + 64);
        DQ_EACH_ROW(DQ_MULTIPLY)
        w += 128;
    }
    DQ_EACH_ROW(DQ_STORE)
}
#else
#define DQ_TILE_ROWS 4 /* tile_4 does it all */
static inline void dq_tiles(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, int rows, int32_t* sums,
                            ptrdiff_t steps, int deep, int add) {
    (void)w, (void)a, (void)stride, (void)rows, (void)sums, (void)steps, (void)deep, (void)add;
}
#endif
#endif

/* part[lane] += sum over 8 k of code[k][lane] * a[k], codes in [0, 15], a in [-127, 127]: the step of a matrix
   product with 4-bit weights. Codes come DQ_LANES outputs side by side, four bytes each, two codes a byte, the
   even k in the low nibble. Activations come as the four even k, then the four odd k, which dq_spread gives to
   every lane. At most DQ_CODES_RUN steps may go into one dq_part; dq_part_add then adds it to sums.

   dq_group_add is the end of a group: acc + float((sums - zero_point * a_sum)) * scale, where |sums| and
   |zero_point * a_sum| are below 2**24, so that floats hold them and their difference exactly. */
#define DQ_CODES 8

/* dq_hadamard_lanes: log2(DQ_LANES) passes over DQ_LANES floats; in the pass of stride s element i becomes
   x[i] + x[i ^ s] where bit s of i is 0, and x[i ^ s] - x[i] where it is 1. Multiplying by -1 is exact, so
   that the forms with a fused multiply-add round like those without. */
#if defined(__AVX512BW__)

typedef __m512i dq_part;
typedef __m512 dq_floats;
typedef struct {
    __m512i even, odd;
} dq_codes;
static inline dq_codes dq_codes_load(const uint8_t* w) {
    const __m512i v = _mm512_loadu_si512(w), low = _mm512_set1_epi8(0x0F);
    return (dq_codes){_mm512_and_si512(v, low), _mm512_and_si512(_mm512_srli_epi16(v, 4), low)};
}
static inline dq_part dq_part_zero(void) { return _mm512_setzero_si512(); }
#if defined(__AVX512VNNI__)
#define DQ_CODES_RUN (1 << 20)
static inline dq_part dq_codes_step(dq_part part, dq_codes w, dq_spread_act even, dq_spread_act odd) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(part, w.even, even), w.odd, odd);
}
static inline dq_sums dq_part_add(dq_sums s, dq_part part) { return _mm512_add_epi32(s, part); }
#else
#define DQ_CODES_RUN 4
static inline dq_part dq_codes_step(dq_part part, dq_codes w, dq_spread_act even, dq_spread_act odd) {
    /* int16 lanes: a step adds two pairs of at most 2 * 15 * 127 = 3,810, and 8 * 3,810 < 2**15. */
    part = _mm512_add_epi16(part, _mm512_maddubs_epi16(w.even, even));
    return _mm512_add_epi16(part, _mm512_maddubs_epi16(w.odd, odd));
}
static inline dq_sums dq_part_add(dq_sums s, dq_part part) {
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
static inline dq_floats dq_group_add(dq_floats acc, dq_sums s, dq_floats zero_points, float a_sum,
                                     dq_floats scales) {
    const __m512 sum = _mm512_fnmadd_ps(zero_points, _mm512_set1_ps(a_sum), _mm512_cvtepi32_ps(s));
    return _mm512_add_ps(acc, _mm512_mul_ps(sum, scales));
}

#elif defined(__AVX2__)

typedef __m256i dq_part;
typedef __m256 dq_floats;
typedef struct {
    __m256i even, odd;
} dq_codes;
static inline dq_codes dq_codes_load(const uint8_t* w) {
    const __m256i v = _mm256_loadu_si256((const __m256i*)w), low = _mm256_set1_epi8(0x0F);
    return (dq_codes){_mm256_and_si256(v, low), _mm256_and_si256(_mm256_srli_epi16(v, 4), low)};
}
static inline dq_part dq_part_zero(void) { return _mm256_setzero_si256(); }
#if defined(__AVXVNNI__)
#define DQ_CODES_RUN (1 << 20)
static inline dq_part dq_codes_step(dq_part part, dq_codes w, dq_spread_act even, dq_spread_act odd) {
    return dq_multiply_add(dq_multiply_add(part, w.even, even), w.odd, odd);
}
static inline dq_sums dq_part_add(dq_sums s, dq_part part) { return _mm256_add_epi32(s, part); }
#else
#define DQ_CODES_RUN 4
static inline dq_part dq_codes_step(dq_part part, dq_codes w, dq_spread_act even, dq_spread_act odd) {
    /* int16 lanes, as above. */
    part = _mm256_add_epi16(part, _mm256_maddubs_epi16(w.even, even));
    return _mm256_add_epi16(part, _mm256_maddubs_epi16(w.odd, odd));
}
static inline dq_sums dq_part_add(dq_sums s, dq_part part) {
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
static inline dq_floats dq_group_add(dq_floats acc, dq_sums s, dq_floats zero_points, float a_sum,
                                     dq_floats scales) {
    const __m256 sum = _mm256_fnmadd_ps(zero_points, _mm256_set1_ps(a_sum), _mm256_cvtepi32_ps(s));
    return _mm256_add_ps(acc, _mm256_mul_ps(sum, scales));
}

#elif defined(DQ_SSE2)

/* int32 lanes: `low` has two of each of the first two outputs, `high` of the other two. */
typedef struct {
    __m128i low, high;
} dq_part;
typedef __m128 dq_floats;
typedef struct {
    __m128i even, odd;
} dq_codes;
#define DQ_CODES_RUN (1 << 20)
static inline dq_codes dq_codes_load(const uint8_t* w) {
    const __m128i v = _mm_loadu_si128((const __m128i*)w), low = _mm_set1_epi8(0x0F);
    return (dq_codes){_mm_and_si128(v, low), _mm_and_si128(_mm_srli_epi16(v, 4), low)};
}
static inline dq_part dq_part_zero(void) { return (dq_part){_mm_setzero_si128(), _mm_setzero_si128()}; }
static inline dq_part dq_codes_add(dq_part part, __m128i w, dq_spread_act a) {
    const __m128i zero = _mm_setzero_si128(), wide = _mm_srai_epi16(_mm_unpacklo_epi8(a, a), 8);
    part.low = _mm_add_epi32(part.low, _mm_madd_epi16(_mm_unpacklo_epi8(w, zero), wide));
    part.high = _mm_add_epi32(part.high, _mm_madd_epi16(_mm_unpackhi_epi8(w, zero), wide));
    return part;
}
static inline dq_part dq_codes_step(dq_part part, dq_codes w, dq_spread_act even, dq_spread_act odd) {
    return dq_codes_add(dq_codes_add(part, w.even, even), w.odd, odd);
}
static inline dq_sums dq_part_add(dq_sums s, dq_part part) {
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
static inline dq_floats dq_group_add(dq_floats acc, dq_sums s, dq_floats zero_points, float a_sum,
                                     dq_floats scales) {
    const __m128 sum = _mm_sub_ps(_mm_cvtepi32_ps(s), _mm_mul_ps(zero_points, _mm_set1_ps(a_sum)));
    return _mm_add_ps(acc, _mm_mul_ps(sum, scales));
}

#else

typedef int32_t dq_part;
typedef float dq_floats;
typedef struct {
    uint8_t byte[4];
} dq_codes;
#define DQ_CODES_RUN (1 << 20)
static inline dq_codes dq_codes_load(const uint8_t* w) { return (dq_codes){{w[0], w[1], w[2], w[3]}}; }
static inline dq_part dq_part_zero(void) { return 0; }
static inline dq_part dq_codes_step(dq_part part, dq_codes w, dq_spread_act even, dq_spread_act odd) {
    int8_t e[4], o[4];
    memcpy(e, &even, 4);
    memcpy(o, &odd, 4);
    for (int j = 0; j < 4; j++) part += (w.byte[j] & 0x0F) * e[j] + (w.byte[j] >> 4) * o[j];
    return part;
}
static inline dq_sums dq_part_add(dq_sums s, dq_part part) { return s + part; }
static inline dq_floats dq_floats_load(const float* x) { return *x; }
static inline void dq_floats_store(float* out, dq_floats x) { *out = x; }
static inline dq_floats dq_zero_points_load(const uint8_t* z) { return *z; }
static inline dq_floats dq_floats_add(dq_floats x, dq_floats y) { return x + y; }
static inline dq_floats dq_floats_sub(dq_floats x, dq_floats y) { return x - y; }
static inline dq_floats dq_floats_scale(dq_floats x, float scale) { return x * scale; }
static inline dq_floats dq_hadamard_lanes(dq_floats x) { return x; }
static inline dq_floats dq_group_add(dq_floats acc, dq_sums s, dq_floats zero_points, float a_sum,
                                     dq_floats scales) {
    return acc + ((float)s - zero_points * a_sum) * scales;
}

#endif

#endif
