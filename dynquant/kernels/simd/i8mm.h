/* SMMLA, the matrix product of the I8MM extension: two rows of 8 k times two outputs of 8 k, added to the four sums.
   A k-step is 8 k. Everything else is that of dotprod.h. */

#define DQ_PANEL_DEPTH 8
#define DQ_TILE_K_STEPS 2
#define DQ_TILE_ROWS 4
#define DQ_TILES_FROM 1

/* Rows in pairs: what is past the last row is that row again. Sums of a pair, 0 or 1, and of outputs 2 * c and
   2 * c + 1 stand together, and have names, because gcc writes those of an array to memory. */
#define DQ_PAIR_BEGIN(p) \
    const uint8_t* even##p = a + 2 * p * stride; \
    const uint8_t* odd##p = a + (2 * p + 1 < rows ? 2 * p + 1 : rows - 1) * stride; \
    int32x4_t s##p##0 = vdupq_n_s32(0), s##p##1 = s##p##0, s##p##2 = s##p##0, s##p##3 = s##p##0; \
    int32x4_t s##p##4 = s##p##0, s##p##5 = s##p##0, s##p##6 = s##p##0, s##p##7 = s##p##0;
/* 16 k of a pair: the first 8 of both rows, and the last 8 of both. */
#define DQ_PAIR_LOAD(p) \
    e = vreinterpretq_s64_u8(vld1q_u8(even##p + 8 * i)); \
    o = vreinterpretq_s64_u8(vld1q_u8(odd##p + 8 * i)); \
    const int8x16_t first##p = vreinterpretq_s8_s64(vzip1q_s64(e, o)); \
    const int8x16_t last##p = vreinterpretq_s8_s64(vzip2q_s64(e, o));
#define DQ_PAIR_STEP(p, c, half) s##p##c = vmmlaq_s32(s##p##c, half##p, v);
#define DQ_OUTPUTS(c, half, each_pair) \
    v = vreinterpretq_s8_u8(vld1q_u8(w + 16 * c)); \
    DQ_KEEP_LOADS \
    each_pair(DQ_PAIR_STEP, c, half)
#define DQ_MATRIX_STEP(half, each_pair) \
    DQ_OUTPUTS(0, half, each_pair) \
    DQ_OUTPUTS(1, half, each_pair) \
    DQ_OUTPUTS(2, half, each_pair) \
    DQ_OUTPUTS(3, half, each_pair) \
    DQ_OUTPUTS(4, half, each_pair) \
    DQ_OUTPUTS(5, half, each_pair) \
    DQ_OUTPUTS(6, half, each_pair) \
    DQ_OUTPUTS(7, half, each_pair)
#define DQ_PAIR_STORE_4(p, c, x, y) \
    e = vreinterpretq_s64_s32(x); \
    o = vreinterpretq_s64_s32(y); \
    dq_tile_store(acc + 32 * p + c, vzip1q_s64(e, o), add); \
    if (2 * p + 1 < rows) dq_tile_store(acc + 32 * p + 16 + c, vzip2q_s64(e, o), add);
#define DQ_PAIR_STORE(p) \
    DQ_PAIR_STORE_4(p, 0, s##p##0, s##p##1) \
    DQ_PAIR_STORE_4(p, 4, s##p##2, s##p##3) \
    DQ_PAIR_STORE_4(p, 8, s##p##4, s##p##5) \
    DQ_PAIR_STORE_4(p, 12, s##p##6, s##p##7)
#define DQ_1_PAIR(of) of(0)
#define DQ_2_PAIRS(of) of(0) of(1)
#define DQ_1_PAIR_STEP(of, c, half) of(0, c, half)
#define DQ_2_PAIR_STEPS(of, c, half) of(0, c, half) of(1, c, half)
#define DQ_PAIR_IN_ORDER(p) \
    __asm__("" : "+w"(s##p##0), "+w"(s##p##1), "+w"(s##p##2), "+w"(s##p##3)); \
    __asm__("" : "+w"(s##p##4), "+w"(s##p##5), "+w"(s##p##6), "+w"(s##p##7));
#define DQ_MATRIX_TILE(pairs, pair_steps) \
    pairs(DQ_PAIR_BEGIN) \
    for (ptrdiff_t i = 0; i < k_steps; i += 2) { \
        pairs(DQ_PAIR_LOAD) \
        dq_prefetch(w + 128 * k_steps, 256); /* of the next panel, as in microkernel_4 */ \
        DQ_MATRIX_STEP(first, pair_steps) \
        pairs(DQ_PAIR_IN_ORDER) \
        w += 128; \
        DQ_MATRIX_STEP(last, pair_steps) \
        pairs(DQ_PAIR_IN_ORDER) \
        w += 128; \
    } \
    pairs(DQ_PAIR_STORE)

static inline void dq_tile_store(int32_t* acc, int64x2_t sums, int add) {
    const int32x4_t s = vreinterpretq_s32_s64(sums);
    vst1q_s32(acc, add ? vaddq_s32(vld1q_s32(acc), s) : s);
}
DQ_NOT_INLINE void dq_tiles(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, int rows, int32_t* acc,
                            ptrdiff_t k_steps, int tile_k_steps, int add) {
    int8x16_t v;
    int64x2_t e, o;
    (void)tile_k_steps;
    if (rows <= 2) {
        DQ_MATRIX_TILE(DQ_1_PAIR, DQ_1_PAIR_STEP)
    } else {
        DQ_MATRIX_TILE(DQ_2_PAIRS, DQ_2_PAIR_STEPS)
    }
}

#define DQ_GROUP_TILES_FROM 8
/* A k-block becomes one k-step: for each output the four even k, then the four odd ones, as activations have them. */
static inline void dq_unpack_k_blocks(const uint8_t* w, uint8_t* k_steps, ptrdiff_t k_blocks) {
    for (ptrdiff_t i = 0; i < 4 * k_blocks; i++) {
        const uint8x16_t v = vld1q_u8(w + 16 * i);
        const uint32x4_t even = vreinterpretq_u32_u8(vandq_u8(v, vdupq_n_u8(0x0F)));
        const uint32x4_t odd = vreinterpretq_u32_u8(vshrq_n_u8(v, 4));
        vst1q_u8(k_steps + 32 * i, vreinterpretq_u8_u32(vzip1q_u32(even, odd)));
        vst1q_u8(k_steps + 32 * i + 16, vreinterpretq_u8_u32(vzip2q_u32(even, odd)));
    }
}
