/* The intrinsics that dynquant/kernels/simd/simd.h takes from AVX-512, VNNI and AMX, in vectors of gcc and clang that
   any processor computes. Found in place of the compiler's own header, it lets the blocks for VNNI and AMX be
   compiled as they are, and tested, where these instruction sets are not at hand. For VNNI in AVX registers it is
   the compiler's own header that is found, with that one instruction replaced by those of AVX2. */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H

#if defined(EMULATED_AVXVNNI)
#include_next <immintrin.h>
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd

/* As int16, every second byte at a time. */
static inline __m256i emulated_dpbusd(__m256i acc, __m256i a, __m256i b) {
    const __m256i low = _mm256_set1_epi16(0xFF);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, low),
                                           _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}

#define _mm256_dpwssd_avx_epi32(acc, a, b) _mm256_add_epi32(acc, _mm256_madd_epi16(a, b))

#else

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int32_t __m512i __attribute__((vector_size(64)));
typedef int8_t emulated_s8 __attribute__((vector_size(64)));
typedef uint8_t emulated_u8 __attribute__((vector_size(64)));
typedef int16_t emulated_s16 __attribute__((vector_size(64)));
typedef uint16_t emulated_u16 __attribute__((vector_size(64)));
typedef uint32_t emulated_u32 __attribute__((vector_size(64)));
typedef float __m512 __attribute__((vector_size(64)));
typedef uint8_t __m128i __attribute__((vector_size(16)));

static inline void _mm_sfence(void) {}
static inline __m128i _mm_loadu_si128(const __m128i* x) { __m128i v; memcpy(&v, x, 16); return v; }
static inline __m512i _mm512_loadu_si512(const void* x) { __m512i v; memcpy(&v, x, 64); return v; }
static inline void _mm_storeu_si128(__m128i* out, __m128i v) { memcpy(out, &v, 16); }
static inline void _mm512_storeu_si512(void* out, __m512i v) { memcpy(out, &v, 64); }
static inline void _mm512_stream_si512(__m512i* out, __m512i v) { memcpy(out, &v, 64); }
static inline __m512 _mm512_loadu_ps(const void* x) { __m512 v; memcpy(&v, x, 64); return v; }
static inline void _mm512_storeu_ps(void* out, __m512 v) { memcpy(out, &v, 64); }
static inline void _mm512_stream_ps(void* out, __m512 v) { memcpy(out, &v, 64); }

/* Words of four and eight bytes of the lower and the upper halves in turns. */
#define EMULATED_UNPACK(name, type, first) \
    static inline __m128i name(__m128i a, __m128i b) { \
        enum { HALF = 8 / sizeof(type) }; \
        type x[2 * HALF], y[2 * HALF], out[2 * HALF]; \
        memcpy(x, &a, 16); \
        memcpy(y, &b, 16); \
        for (int i = 0; i < HALF; i++) out[2 * i] = x[first * HALF + i], out[2 * i + 1] = y[first * HALF + i]; \
        memcpy(&a, out, 16); \
        return a; \
    }
EMULATED_UNPACK(_mm_unpacklo_epi32, uint32_t, 0)
EMULATED_UNPACK(_mm_unpackhi_epi32, uint32_t, 1)
EMULATED_UNPACK(_mm_unpacklo_epi64, uint64_t, 0)
EMULATED_UNPACK(_mm_unpackhi_epi64, uint64_t, 1)

static inline __m512i _mm512_setzero_si512(void) { return (__m512i){0}; }
static inline __m512i _mm512_set1_epi32(int32_t x) { return (__m512i){0} + x; }
static inline __m512i _mm512_set1_epi16(short x) { return (__m512i)((emulated_s16){0} + (int16_t)x); }
static inline __m512i _mm512_set1_epi8(char x) { return (__m512i)((emulated_s8){0} + (int8_t)x); }
static inline __m512 _mm512_set1_ps(float x) { return (__m512){0} + x; }
#define _mm512_setr_epi32(...) ((__m512i){__VA_ARGS__})

/* As unsigned: the instructions wrap. */
#define EMULATED_SUM(type, a, op, b) ((__m512i)((type)(a) op (type)(b)))
static inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return EMULATED_SUM(emulated_u32, a, +, b); }
static inline __m512i _mm512_sub_epi16(__m512i a, __m512i b) { return EMULATED_SUM(emulated_u16, a, -, b); }
static inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return EMULATED_SUM(emulated_u32, a, -, b); }
static inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
static inline __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
static inline __m512i _mm512_srli_epi16(__m512i a, int n) { return (__m512i)((emulated_u16)a >> n); }
static inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
static inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
static inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
static inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
static inline __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }

#define EMULATED_EACH(n) for (int i = 0; i < (n); i++)
/* Rounded twice, which simd.h allows wherever it asks for this one. */
static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return a * b + c; }
static inline __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) {
    EMULATED_EACH(16) a[i] = fmaf(a[i], b[i], -c[i]);
    return a;
}
static inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
    EMULATED_EACH(16) a[i] = fmaf(-a[i], b[i], c[i]);
    return a;
}
static inline __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
/* Each of four elements of a lane, the first two of a, by two bits of `at`. */
static inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int at) {
    __m512 r;
    EMULATED_EACH(16) r[i] = (i & 2 ? b : a)[(i & ~3) | (at >> 2 * (i & 3) & 3)];
    return r;
}
/* Words of two bytes of the lower and the upper halves of lanes in turns. */
static inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) {
    emulated_s16 r;
    EMULATED_EACH(32) r[i] = ((emulated_s16)(i & 1 ? b : a))[i / 8 * 8 + i % 8 / 2];
    return (__m512i)r;
}
static inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) {
    emulated_s16 r;
    EMULATED_EACH(32) r[i] = ((emulated_s16)(i & 1 ? b : a))[i / 8 * 8 + 4 + i % 8 / 2];
    return (__m512i)r;
}
/* Products of pairs of int16, added in int32 without saturation. */
static inline __m512i _mm512_dpwssd_epi32(__m512i acc, __m512i a, __m512i b) {
    const emulated_s16 x = (emulated_s16)a, y = (emulated_s16)b;
    emulated_u32 sums = (emulated_u32)acc;
    EMULATED_EACH(32) sums[i / 2] += (uint32_t)(x[i] * y[i]);
    return (__m512i)sums;
}
static inline __m512 _mm512_cvtepi32_ps(__m512i a) { __m512 r; EMULATED_EACH(16) r[i] = (float)a[i]; return r; }
static inline __m512i _mm512_cvtepi8_epi32(__m128i a) { __m512i r; EMULATED_EACH(16) r[i] = (int8_t)a[i]; return r; }
static inline __m512i _mm512_cvtepu8_epi32(__m128i a) { __m512i r; EMULATED_EACH(16) r[i] = a[i]; return r; }
static inline __m128i _mm512_cvtepi32_epi8(__m512i a) { __m128i r; EMULATED_EACH(16) r[i] = (uint8_t)a[i]; return r; }
static inline __m512i _mm512_permutexvar_epi32(__m512i at, __m512i a) {
    __m512i r;
    EMULATED_EACH(16) r[i] = a[at[i] & 15];
    return r;
}
static inline __m512 _mm512_mask_blend_ps(int mask, __m512 a, __m512 b) {
    EMULATED_EACH(16) a[i] = mask >> i & 1 ? b[i] : a[i];
    return a;
}
static inline __m512 _mm512_permute_ps(__m512 a, int at) {
    __m512 r;
    EMULATED_EACH(16) r[i] = a[(i & ~3) | (at >> 2 * (i & 3) & 3)];
    return r;
}
static inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int at) {
    __m512 r;
    EMULATED_EACH(16) r[i] = (i < 8 ? a : b)[4 * (at >> 2 * (i / 4) & 3) + (i & 3)];
    return r;
}
static inline int _mm512_test_epi32_mask(__m512i a, __m512i b) {
    int mask = 0;
    EMULATED_EACH(16) mask |= ((a[i] & b[i]) != 0) << i;
    return mask;
}
/* Bit i of the result is bit (a, b, c) of the truth table, a the highest. */
static inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    __m512i r = {0};
    EMULATED_EACH(8) if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
}
static inline __m512i _mm512_min_epu32(__m512i a, __m512i b) {
    EMULATED_EACH(16) a[i] = (uint32_t)a[i] < (uint32_t)b[i] ? a[i] : b[i];
    return a;
}
static inline int _mm512_cmplt_epu32_mask(__m512i a, __m512i b) {
    int mask = 0;
    EMULATED_EACH(16) mask |= ((uint32_t)a[i] < (uint32_t)b[i]) << i;
    return mask;
}
static inline int32_t _mm512_reduce_add_epi32(__m512i a) {
    uint32_t sum = 0;
    EMULATED_EACH(16) sum += (uint32_t)a[i];
    return (int32_t)sum;
}
static inline __m512i _mm512_min_epi8(__m512i a, __m512i b) {
    emulated_s8 x = (emulated_s8)a, y = (emulated_s8)b;
    EMULATED_EACH(64) x[i] = x[i] < y[i] ? x[i] : y[i];
    return (__m512i)x;
}
static inline __m512i _mm512_max_epi8(__m512i a, __m512i b) {
    emulated_s8 x = (emulated_s8)a, y = (emulated_s8)b;
    EMULATED_EACH(64) x[i] = x[i] > y[i] ? x[i] : y[i];
    return (__m512i)x;
}
static inline int emulated_clamp(int x, int most) { return x > most ? most : x < -most - 1 ? -most - 1 : x; }
/* In each 16 bytes those of a first. */
static inline __m512i _mm512_packs_epi32(__m512i a, __m512i b) {
    emulated_s16 r;
    EMULATED_EACH(32) r[i] = (int16_t)emulated_clamp((i & 4 ? b : a)[i / 8 * 4 + i % 4], 32767);
    return (__m512i)r;
}
static inline __m512i _mm512_packs_epi16(__m512i a, __m512i b) {
    const emulated_s16 x = (emulated_s16)a, y = (emulated_s16)b;
    emulated_s8 r;
    EMULATED_EACH(64) r[i] = (int8_t)emulated_clamp((i & 8 ? y : x)[i / 16 * 8 + i % 8], 127);
    return (__m512i)r;
}
/* acc + four products of an unsigned byte of a with a signed byte of b, in each int32; it wraps. */
static inline __m512i _mm512_dpbusd_epi32(__m512i acc, __m512i a, __m512i b) {
    const emulated_u8 x = (emulated_u8)a;
    const emulated_s8 y = (emulated_s8)b;
    emulated_u32 sums = (emulated_u32)acc;
    EMULATED_EACH(64) sums[i / 4] += (uint32_t)(x[i] * y[i]);
    return (__m512i)sums;
}

/* The registers of AMX, as _tile_loadconfig shaped them, one set for each thread. */
typedef struct {
    uint8_t line[16][64];
} emulated_tile;
static _Thread_local emulated_tile emulated_tiles[8];
static _Thread_local struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_of_a_row[16];
    uint8_t rows[16];
} emulated_shapes;
static inline void _tile_loadconfig(const void* shapes) {
    memcpy(&emulated_shapes, shapes, 64);
    memset(emulated_tiles, 0, sizeof emulated_tiles);
}
static inline void _tile_release(void) { memset(&emulated_shapes, 0, sizeof emulated_shapes); }
static inline void _tile_zero(int t) { memset(&emulated_tiles[t], 0, sizeof(emulated_tile)); }
static inline void _tile_loadd(int t, const void* from, long stride) {
    _tile_zero(t);
    EMULATED_EACH(emulated_shapes.rows[t]) {
        memcpy(emulated_tiles[t].line[i], (const char*)from + i * stride, emulated_shapes.bytes_of_a_row[t]);
    }
}
static inline void _tile_stored(int t, void* to, long stride) {
    EMULATED_EACH(emulated_shapes.rows[t]) {
        memcpy((char*)to + i * stride, emulated_tiles[t].line[i], emulated_shapes.bytes_of_a_row[t]);
    }
}
/* Rows of signed bytes of a times columns of unsigned bytes of b, four to an int32; it wraps. */
static inline void _tile_dpbsud(int sums, int a, int b) {
    for (int r = 0; r < emulated_shapes.rows[a]; r++) {
        uint32_t row[16];
        memcpy(row, emulated_tiles[sums].line[r], 64);
        for (int k = 0; k < emulated_shapes.bytes_of_a_row[a]; k++) {
            const int32_t x = (int8_t)emulated_tiles[a].line[r][k];
            EMULATED_EACH(16) row[i] += (uint32_t)(x * emulated_tiles[b].line[k / 4][4 * i + k % 4]);
        }
        memcpy(emulated_tiles[sums].line[r], row, 64);
    }
}

#endif
#endif
