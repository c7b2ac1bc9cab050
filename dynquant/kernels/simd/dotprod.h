/* SDOT of the DotProd extension, by element: a vector of weights, four k of four outputs, times four k of a row that
   stand in one lane of another vector. So 16 k of a row cost one load, and no broadcast. Accumulators have names,
   because gcc writes those of an array to memory. */

#define DQ_4_ROWS(of) of(0) of(1) of(2) of(3)
/* What is past the last row is that row again. */
#define DQ_ROW_BEGIN(r) \
    const uint8_t* row##r = a + (r < rows ? r : rows - 1) * stride; \
    int32x4_t s##r##0 = vdupq_n_s32(0), s##r##1 = s##r##0, s##r##2 = s##r##0, s##r##3 = s##r##0;
#define DQ_ROW_LOAD(r) const int8x16_t a##r = dq_bytes_load(row##r + i);

#ifndef DQ_TILE_ROWS
#define DQ_TILE_K_STEPS 4
#define DQ_TILE_ROWS 4
#define DQ_TILES_FROM 2
#define DQ_ROW_MULTIPLY(r, k_step) \
    s##r##0 = vdotq_laneq_s32(s##r##0, w0, a##r, k_step); \
    s##r##1 = vdotq_laneq_s32(s##r##1, w1, a##r, k_step); \
    s##r##2 = vdotq_laneq_s32(s##r##2, w2, a##r, k_step); \
    s##r##3 = vdotq_laneq_s32(s##r##3, w3, a##r, k_step); \
    __asm__("" : "+w"(s##r##0), "+w"(s##r##1), "+w"(s##r##2), "+w"(s##r##3));
#define DQ_TILE_STEP(k_step) \
    w0 = dq_bytes_load(w); \
    w1 = dq_bytes_load(w + 16); \
    w2 = dq_bytes_load(w + 32); \
    w3 = dq_bytes_load(w + 48); \
    w += 64; \
    DQ_KEEP_LOADS \
    DQ_ROW_MULTIPLY(0, k_step) \
    DQ_ROW_MULTIPLY(1, k_step) \
    DQ_ROW_MULTIPLY(2, k_step) \
    DQ_ROW_MULTIPLY(3, k_step)
#define DQ_ROW_STORE(r) \
    vst1q_s32(acc + 16 * r, s##r##0); \
    vst1q_s32(acc + 16 * r + 4, s##r##1); \
    vst1q_s32(acc + 16 * r + 8, s##r##2); \
    vst1q_s32(acc + 16 * r + 12, s##r##3);
DQ_NOT_INLINE void dq_tiles(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, int rows, int32_t* acc,
                            ptrdiff_t k_steps, int tile_k_steps, int add) {
    int8x16_t w0, w1, w2, w3;
    (void)tile_k_steps, (void)add;
    DQ_4_ROWS(DQ_ROW_BEGIN)
    for (ptrdiff_t i = 0; i < 4 * k_steps; i += 16) {
        DQ_4_ROWS(DQ_ROW_LOAD)
        dq_prefetch(w + 64 * k_steps, 256); /* of the next panel, as in microkernel_4 */
        DQ_TILE_STEP(0)
        DQ_TILE_STEP(1)
        DQ_TILE_STEP(2)
        DQ_TILE_STEP(3)
    }
    DQ_4_ROWS(DQ_ROW_STORE)
}
#endif

/* ---- 4-bit weights: 16 bytes of a row are two k-blocks, four even and four odd k of each ---------------------- */

#define DQ_CODES_MULTIPLY(r, c, k_block) \
    s##r##c = vdotq_laneq_s32(s##r##c, even, a##r, 2 * k_block); \
    s##r##c = vdotq_laneq_s32(s##r##c, odd, a##r, 2 * k_block + 1);
#define DQ_CODES_STEP(c, k_block, each_row) \
    v = vld1q_u8(w + 16 * c); \
    DQ_KEEP_LOADS \
    even = dq_even_codes(v); \
    odd = dq_odd_codes(v); \
    each_row(c, k_block)
#define DQ_CODES_4_ROWS(c, k_block) \
    DQ_CODES_MULTIPLY(0, c, k_block) \
    DQ_CODES_MULTIPLY(1, c, k_block) \
    DQ_CODES_MULTIPLY(2, c, k_block) \
    DQ_CODES_MULTIPLY(3, c, k_block)
#define DQ_CODES_1_ROW(c, k_block) DQ_CODES_MULTIPLY(0, c, k_block)
#define DQ_K_BLOCK_STEP(k_block, each_row) \
    DQ_CODES_STEP(0, k_block, each_row) \
    DQ_CODES_STEP(1, k_block, each_row) \
    DQ_CODES_STEP(2, k_block, each_row) \
    DQ_CODES_STEP(3, k_block, each_row) \
    w += 64;

#define DQ_FOUR_K_BLOCKS 1
static inline void dq_four_k_blocks(const uint8_t* w, const uint8_t* a, dq_acc* s0, dq_acc* s1) {
    int32x4_t s00 = s0->low, s01 = s0->high, s02 = s1->low, s03 = s1->high;
    int8x16_t even, odd, a0 = dq_bytes_load(a);
    uint8x16_t v;
    DQ_K_BLOCK_STEP(0, DQ_CODES_1_ROW)
    DQ_K_BLOCK_STEP(1, DQ_CODES_1_ROW)
    a0 = dq_bytes_load(a + 16);
    DQ_K_BLOCK_STEP(0, DQ_CODES_1_ROW)
    DQ_K_BLOCK_STEP(1, DQ_CODES_1_ROW)
    *s0 = (dq_acc){s00, s01};
    *s1 = (dq_acc){s02, s03};
}

#define DQ_GROUP_ADD(r, add) \
    if (r < rows) { \
        float* out = acc + 16 * r; \
        dq_acc s0 = {s##r##0, s##r##1}, s1 = {s##r##2, s##r##3}; \
        float a_sum; \
        memcpy(&a_sum, a_sums + r * stride, sizeof a_sum); \
        dq_floats_store(out, add(dq_floats_load(out), s0, z0, a_sum, dq_floats_load(scales))); \
        dq_floats_store(out + 8, add(dq_floats_load(out + 8), s1, z1, a_sum, dq_floats_load(scales + 8))); \
    }
#define DQ_GROUP_ADD_ZERO_POINTS(r) DQ_GROUP_ADD(r, dq_group_add)
#define DQ_GROUP_ADD_MINIMUMS(r) DQ_GROUP_ADD(r, dq_group_add_minimums)
#define DQ_KEPT_ROWS 4
static inline void dq_group_rows(const uint8_t* w, const float* scales, const uint8_t* offsets, int minimums,
                                 const uint8_t* a, const uint8_t* a_sums, ptrdiff_t stride, ptrdiff_t rows, float* acc,
                                 ptrdiff_t k_blocks, ptrdiff_t prefetch_distance) {
    int8x16_t even, odd;
    uint8x16_t v;
    DQ_4_ROWS(DQ_ROW_BEGIN)
    for (ptrdiff_t i = 0; i < DQ_K_BLOCK * k_blocks; i += 2 * DQ_K_BLOCK) {
        DQ_4_ROWS(DQ_ROW_LOAD)
        dq_prefetch(w + prefetch_distance, 128);
        DQ_K_BLOCK_STEP(0, DQ_CODES_4_ROWS)
        DQ_K_BLOCK_STEP(1, DQ_CODES_4_ROWS)
    }
    if (minimums) {
        const float* floats = (const float*)offsets;
        const dq_floats z0 = dq_floats_load(floats), z1 = dq_floats_load(floats + 8);
        DQ_4_ROWS(DQ_GROUP_ADD_MINIMUMS)
    } else {
        const dq_floats z0 = dq_zero_points_load(offsets), z1 = dq_zero_points_load(offsets + 8);
        DQ_4_ROWS(DQ_GROUP_ADD_ZERO_POINTS)
    }
}
