/* Plain C for every compiler and processor: what no instruction set above has a form for. */

#ifndef DQ_QUANTIZE_STEP
#define DQ_QUANTIZE_STEP 64 /* a loop of 16 or fewer gcc unrolls whole, and then does not vectorize */
static inline void dq_nontemporal_end(void) {}
static inline int dq_quantize_step(const float* x, float lo, float hi, int32_t clip, int in_range, int nontemporal,
                                   int8_t* codes) {
    int32_t differ = 0;
    (void)nontemporal;
    for (int j = 0; j < DQ_QUANTIZE_STEP; j++) {
        int32_t a = dq_bits(x[j] * lo + DQ_MAGIC);
        differ |= a ^ dq_bits(x[j] * hi + DQ_MAGIC);
        if (!in_range) {
            a = a < DQ_MAGIC_BITS - clip ? DQ_MAGIC_BITS - clip : a;
            a = a > DQ_MAGIC_BITS + clip ? DQ_MAGIC_BITS + clip : a;
        }
        codes[j] = (int8_t)(a & 0xFF);
    }
    return differ != 0;
}
#endif

#ifndef DQ_NONTEMPORAL_VALUES
#define DQ_NONTEMPORAL_VALUES
static inline void dq_nontemporal_values(const int8_t* codes, float scale, float* out) {
    for (int j = 0; j < DQ_VALUES; j++) out[j] = codes[j] * scale;
}
#endif

#ifndef DQ_QUOTIENTS
#define DQ_QUOTIENTS 0
static inline int dq_quotients(const float* x, const float* factors, const float* reciprocals, float* out) {
    (void)x, (void)factors, (void)reciprocals, (void)out;
    return 1;
}
#endif

#ifndef DQ_WIDENS
#define DQ_WIDENS
static inline void dq_widen_step(const uint16_t* x, float* out) {
    for (int j = 0; j < DQ_WIDEN_STEP; j++) out[j] = dq_widen(x[j]);
}
#endif

#ifndef DQ_BETWEEN
#define DQ_BETWEEN
static inline uint32_t dq_between_step(const float* x, int32_t low, int32_t high, int64_t* below, int* finite) {
    uint32_t inside = 0;
    for (int j = 0; j < DQ_BETWEEN_STEP; j++) {
        const int32_t b = dq_bits(x[j]) & 0x7FFFFFFF;
        *below += b < low;
        *finite &= b <= 0x7F7FFFFF;
        inside |= (uint32_t)(b >= low && b <= high) << j;
    }
    return inside;
}
#endif

#ifndef DQ_COUNTS_BITS
#define DQ_COUNTS_BITS
static inline int dq_count_bits(uint32_t bits) {
    int count = 0;
    for (; bits; bits &= bits - 1) count++;
    return count;
}
#endif

#ifndef DQ_DOT_STEP
#define DQ_DOT_STEP 4
typedef int32_t dq_dot_acc;
static inline dq_dot_acc dq_dot_zero(void) { return 0; }
static inline dq_dot_acc dq_dot_add(dq_dot_acc x, dq_dot_acc y) { return x + y; }
static inline dq_dot_acc dq_dot_step(dq_dot_acc acc, const int8_t* w, const int8_t* a) {
    return acc + w[0] * a[0] + w[1] * a[1] + w[2] * a[2] + w[3] * a[3];
}
static inline dq_dot_acc dq_dot_biased_step(dq_dot_acc acc, const int8_t* w, const int8_t* a) {
    for (int j = 0; j < DQ_DOT_STEP; j++) acc += (uint8_t)(w[j] ^ DQ_BIAS >> j % 2 * 8) * a[j];
    return acc;
}
static inline int32_t dq_dot_sum(dq_dot_acc acc) { return acc; }
#endif

#ifndef DQ_NIBBLE_SUMS
static inline void dq_nibble_sums(const uint8_t* w, const int8_t* a, uint8_t flip, int32_t* sums, ptrdiff_t blocks) {
    for (ptrdiff_t i = 0; i < blocks; i++, w += DQ_NIBBLES / 2, a += DQ_NIBBLES) {
        int32_t sum = 0;
        for (int j = 0; j < DQ_NIBBLES / 2; j++) {
            const uint8_t two = w[j] ^ flip;
            sum += (two & 15) * a[j] + (two >> 4) * a[DQ_NIBBLES / 2 + j];
        }
        sums[i] = sum;
    }
}
#endif

#ifndef DQ_LANES
typedef int32_t dq_acc;
typedef struct {
    int16_t k0, k1;
} dq_weights;
typedef dq_weights dq_broadcast_act;
#define DQ_LANES 1
#define DQ_DEPTH 2
#define DQ_SPLIT 0
static inline dq_acc dq_acc_zero(void) { return 0; }
static inline dq_acc dq_acc_load(const int32_t* s) { return *s; }
static inline void dq_acc_store(int32_t* out, dq_acc s) { *out = s; }
static inline dq_acc dq_acc_add(dq_acc x, dq_acc y) { return x + y; }
static inline dq_broadcast_act dq_broadcast(const uint8_t* a) {
    dq_weights pair;
    memcpy(&pair, a, 4);
    return pair;
}
static inline dq_weights dq_weights_load(const uint8_t* w) { return (dq_weights){w[0], w[1]}; }
static inline dq_acc dq_acc_step(dq_acc acc, dq_weights w, dq_broadcast_act a) {
    return acc + w.k0 * a.k0 + w.k1 * a.k1;
}
typedef dq_weights dq_wide_weights;
static inline dq_wide_weights dq_wide_load(const int16_t* w) { return (dq_weights){w[0], w[1]}; }
static inline dq_acc dq_wide_step(dq_acc acc, dq_wide_weights w, dq_broadcast_act a) {
    return dq_acc_step(acc, w, a);
}
#endif

#if !defined(DQ_SSE2) && DQ_LANES > 1 /* layers are never thin there */
typedef int dq_wide_weights;
static inline dq_wide_weights dq_wide_load(const int16_t* w) { return *w; }
static inline dq_acc dq_wide_step(dq_acc acc, dq_wide_weights w, dq_broadcast_act a) { return (void)w, (void)a, acc; }
static inline void dq_widen_k_step(const uint8_t* w, int16_t* wide) { (void)w, (void)wide; }
static inline dq_floats dq_scaled(dq_acc s, dq_floats scales) { return (void)s, scales; }
#elif DQ_DEPTH == 2
static inline void dq_widen_k_step(const uint8_t* w, int16_t* wide) {
    for (int i = 0; i < 2 * DQ_LANES; i += 2) {
        wide[i] = (int16_t)(w[i] - 128);
        wide[i + 1] = (int16_t)(127 - w[i + 1]);
    }
}
#endif

static inline void dq_widen_k_block(const uint8_t* w, const uint8_t* zero_points, int16_t* wide) {
#if defined(DQ_SSE2)
    /* The codes of an output are a number of 32 bits, two of which make a pair. As a loop over numbers it vectorizes. */
    uint32_t codes[2 * DQ_LANES], pairs[2 * DQ_LANES];
    memcpy(codes, w, sizeof codes);
    for (int j = 0; j < 4; j++) {
        for (int c = 0; c < 2 * DQ_LANES; c++) {
            const uint32_t low = (codes[c] >> 8 * j & 0x0F) - zero_points[c];
            const uint32_t high = (codes[c] >> (8 * j + 4) & 0x0F) - zero_points[c];
            pairs[c] = (low & 0xFFFF) | high << 16;
        }
        memcpy(wide + 4 * DQ_LANES * j, pairs, sizeof pairs);
    }
#else
    for (int j = 0; j < 4; j++)
        for (int c = 0; c < 2 * DQ_LANES; c++) {
            wide[4 * DQ_LANES * j + 2 * c] = (int16_t)((w[4 * c + j] & 0x0F) - zero_points[c]);
            wide[4 * DQ_LANES * j + 2 * c + 1] = (int16_t)((w[4 * c + j] >> 4) - zero_points[c]);
        }
#endif
}

#ifndef DQ_THIN
static inline int dq_quantize_rows(const float* x, ptrdiff_t rows, ptrdiff_t k, int16_t* codes, ptrdiff_t stride,
                                   float* scales) {
    for (ptrdiff_t r = 0; r < rows; r++, x += k, codes += stride) {
        int32_t amax = 0;
        for (ptrdiff_t i = 0; i < k; i++) {
            const int32_t b = dq_bits(x[i]) & 0x7FFFFFFF;
            amax = b > amax ? b : amax;
        }
        if (amax > 0x7F7FFFFF) return 0;
        scales[r] = dq_float(amax) / 127;
        const float scale = scales[r] > 0 ? scales[r] : 1; /* of scale 0 are zeros, and floats near them */
        for (ptrdiff_t i = 0; i < k; i++) {
            float v = x[i] / scale;
            v = v < -127 ? -127 : v;
            v = v > 127 ? 127 : v;
            codes[i] = (int16_t)(int32_t)(v + copysignf(DQ_BELOW_HALF, v));
        }
    }
    return 1;
}
static inline void dq_wide_dots(const int16_t* a, ptrdiff_t stride, const int16_t* w, ptrdiff_t w_stride, ptrdiff_t n,
                                ptrdiff_t k, int32_t* sums) {
    for (ptrdiff_t r = 0; r < DQ_WIDE_ROWS; r++)
        for (ptrdiff_t c = 0; c < n; c++) {
            int32_t sum = 0;
            for (ptrdiff_t i = 0; i < k; i++) sum += a[r * stride + i] * w[c * w_stride + i];
            sums[r * n + c] = sum;
        }
}
#endif

#ifndef DQ_TRANSPOSES
static inline void dq_transpose_16(const int8_t* w, ptrdiff_t stride, uint8_t* out, ptrdiff_t out_stride) {
    for (int i = 0; i < 4; i++)
        for (int r = 0; r < 4; r++) memcpy(out + i * out_stride + 4 * r, w + r * stride + 4 * i, 4);
}
#endif

#ifndef DQ_BIASES
#define DQ_BIASES
static inline uint32_t dq_pairs_out_of_range(const int8_t* a) {
    uint32_t bits = 0;
    for (int j = 0; j < DQ_BIAS_STEP / 2; j++) {
        const int sum = a[2 * j] + a[2 * j + 1];
        bits |= (uint32_t)(sum > DQ_PAIR || sum < -DQ_PAIR) << j;
    }
    return bits;
}
static inline uint32_t dq_bias_step(int8_t* a, int32_t* compensation) {
    for (int j = 0; j < DQ_BIAS_STEP; j += 2) {
        *compensation += 128 * a[j] - 127 * a[j + 1];
        a[j + 1] = (int8_t)-a[j + 1];
    }
    return dq_pairs_out_of_range(a);
}
#endif

#ifndef DQ_TILE_K_STEPS
#define DQ_TILE_K_STEPS 2
#endif

#ifndef DQ_PANEL_DEPTH
#define DQ_PANEL_DEPTH DQ_DEPTH
#endif

#ifndef DQ_TILES_FROM
#define DQ_TILES_FROM 5
#endif

#ifndef DQ_GROUP_TILES_FROM
#define DQ_GROUP_TILES_FROM 0
static inline void dq_unpack_k_blocks(const uint8_t* w, uint8_t* k_steps, ptrdiff_t k_blocks) {
    (void)w, (void)k_steps, (void)k_blocks;
}
#endif

#ifndef DQ_AMX
static inline void dq_tiles_begin(int rows, int tile_k_steps) { (void)rows, (void)tile_k_steps; }
static inline void dq_tiles_end(void) {}
#endif

#ifndef DQ_TILE_ROWS
#define DQ_TILE_ROWS 4 /* microkernel_4 does it all */
static inline void dq_tiles(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, int rows, int32_t* acc,
                            ptrdiff_t k_steps, int tile_k_steps, int add) {
    (void)w, (void)a, (void)stride, (void)rows, (void)acc, (void)k_steps, (void)tile_k_steps, (void)add;
}
#endif

#ifndef DQ_ACC16_STEPS
typedef int32_t dq_acc16;
typedef float dq_floats;
typedef struct {
    uint8_t byte[4];
} dq_codes;
#define DQ_ACC16_STEPS (1 << 20)
static inline dq_codes dq_codes_load(const uint8_t* w) { return (dq_codes){{w[0], w[1], w[2], w[3]}}; }
static inline dq_acc16 dq_acc16_zero(void) { return 0; }
static inline dq_acc16 dq_acc16_step(dq_acc16 part, dq_codes w, dq_broadcast_act even, dq_broadcast_act odd) {
    int8_t e[4], o[4];
    memcpy(e, &even, 4);
    memcpy(o, &odd, 4);
    for (int j = 0; j < 4; j++) part += (w.byte[j] & 0x0F) * e[j] + (w.byte[j] >> 4) * o[j];
    return part;
}
static inline dq_acc dq_acc_add16(dq_acc s, dq_acc16 part) { return s + part; }
static inline dq_floats dq_floats_load(const float* x) { return *x; }
static inline void dq_floats_store(float* out, dq_floats x) { *out = x; }
static inline dq_floats dq_zero_points_load(const uint8_t* z) { return *z; }
static inline dq_floats dq_floats_add(dq_floats x, dq_floats y) { return x + y; }
static inline dq_floats dq_floats_sub(dq_floats x, dq_floats y) { return x - y; }
static inline dq_floats dq_floats_scale(dq_floats x, float scale) { return x * scale; }
static inline dq_floats dq_hadamard_lanes(dq_floats x) { return x; }
static inline dq_floats dq_scaled(dq_acc s, dq_floats scales) { return (float)s * scales; }
static inline dq_floats dq_group_add(dq_floats acc, dq_acc s, dq_floats zero_points, float a_sum,
                                     dq_floats scales) {
    return acc + ((float)s - zero_points * a_sum) * scales;
}
static inline dq_floats dq_group_add_minimums(dq_floats acc, dq_acc s, dq_floats minimums, float a_sum,
                                              dq_floats scales) {
    return acc + ((float)s * scales + minimums * a_sum);
}
#endif

#ifndef DQ_FOUR_K_BLOCKS
#define DQ_FOUR_K_BLOCKS 0
static inline void dq_four_k_blocks(const uint8_t* w, const uint8_t* a, dq_acc* s0, dq_acc* s1) {
    (void)w, (void)a, (void)s0, (void)s1;
}
#endif

#ifndef DQ_KEPT_ROWS
#define DQ_KEPT_ROWS 1
static inline void dq_group_rows(const uint8_t* w, const float* scales, const uint8_t* offsets, int minimums,
                                 const uint8_t* a, const uint8_t* a_sums, ptrdiff_t stride, ptrdiff_t rows, float* acc,
                                 ptrdiff_t k_blocks, ptrdiff_t prefetch_distance) {
    (void)w, (void)scales, (void)offsets, (void)minimums, (void)a, (void)a_sums, (void)stride, (void)rows, (void)acc;
    (void)k_blocks, (void)prefetch_distance;
}
#endif

#ifndef DQ_FORMS
#define DQ_FORMS 0
static inline void dq_count_lanes(const int8_t* a, int32_t* eights, int32_t* centered) {
    (void)a, (void)eights, (void)centered;
}
static inline int dq_eights_out_of_range(const uint8_t* a) { return (void)a, 0; }
static inline int dq_center_16(const uint8_t* a, uint8_t* out) { return (void)a, (void)out, 0; }
static inline uint32_t dq_split_16(uint8_t* a, int8_t* residuals, int form) {
    return (void)a, (void)residuals, (void)form, 0u;
}
static inline void dq_widen_16(const uint8_t* a, uint8_t* out) { (void)a, (void)out; }
static inline void dq_form_rows(int form, const uint8_t* w, const uint8_t* a, ptrdiff_t stride, ptrdiff_t rows,
                                int32_t* acc, ptrdiff_t k_steps) {
    (void)form, (void)w, (void)a, (void)stride, (void)rows, (void)acc, (void)k_steps;
}
#endif
