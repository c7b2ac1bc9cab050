/* Matrix products on AVX2 without VNNI, where VPMADDUBSW adds pairs of products in int16. Weights of 16 k and 16
   outputs stay in eight registers while the loop goes over the rows of activations, so that per row they cost
   neither loads nor unpacking; accumulators lie in memory, in L1. */

#if defined(__GNUC__)
#define DQ_INLINE static inline __attribute__((always_inline)) /* or the weights are passed in memory */
#define DQ_IN_ORDER(x) __asm__("" : "+x"(x)) /* or gcc reorders the additions, and spills the weights for it */
#else
#define DQ_INLINE static inline
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

/* acc32 (rows, 16) = or with `add` += four k-blocks, or with `end` both go to the float acc. A lane of part is the
   sum of 8 pairs of at most 2 * 15 * 127 = 3,810 when it ends: 30,480 < 2**15. */
DQ_INLINE void dq_group_span(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, ptrdiff_t rows, int16_t* part,
                             int32_t* acc32, int add, int end, const float* scales, const uint8_t* zero_points,
                             const uint8_t* a_sums, float* acc) {
    const dq_weights_16 first = dq_codes_16(w);
    for (ptrdiff_t r = 0; r < rows; r++) {
        __m256i s = _mm256_setzero_si256(), t = s;
        dq_add16(&s, &t, &first, a + r * stride);
        _mm256_storeu_si256((__m256i*)(part + 32 * r), s);
        _mm256_storeu_si256((__m256i*)(part + 32 * r + 16), t);
    }
    const dq_weights_16 second = dq_codes_16(w + 128);
    const dq_floats z0 = dq_zero_points_load(zero_points), z1 = dq_zero_points_load(zero_points + 8);
    const dq_floats scales0 = dq_floats_load(scales), scales1 = dq_floats_load(scales + 8);
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
            dq_floats_store(out, dq_group_add(dq_floats_load(out), s, z0, a_sum, scales0));
            dq_floats_store(out + 8, dq_group_add(dq_floats_load(out + 8), t, z1, a_sum, scales1));
        } else {
            dq_acc_store(sums, s);
            dq_acc_store(sums + 8, t);
        }
    }
}

#define DQ_KEPT_ROWS 32 /* more rows, each in a page of its own, would be more than the first TLB holds */
static inline void dq_group_rows(const uint8_t* w, const float* scales, const uint8_t* zero_points, const uint8_t* a,
                                 const uint8_t* a_sums, ptrdiff_t stride, ptrdiff_t rows, float* acc, ptrdiff_t k_blocks,
                                 ptrdiff_t prefetch_distance) {
    int16_t part[32 * DQ_KEPT_ROWS];
    int32_t acc32[16 * DQ_KEPT_ROWS];
    for (ptrdiff_t i = 0; i < k_blocks; i += 4, w += 256, a += 32) {
        dq_prefetch(w + prefetch_distance, 256);
#define DQ_SPAN(add, end) \
    dq_group_span(w, a, stride, rows, part, acc32, add, end, scales, zero_points, a_sums, acc)
        if (k_blocks == 4) DQ_SPAN(0, 1);
        else if (i == 0) DQ_SPAN(0, 0);
        else if (i + 4 < k_blocks) DQ_SPAN(1, 0);
        else DQ_SPAN(1, 1);
#undef DQ_SPAN
    }
}
