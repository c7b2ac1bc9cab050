/* NEON (Advanced SIMD), which every 64-bit ARM processor has. Where the processor has SDOT, that takes the place of
   several multiplications here, and dotprod.h adds to this file.

   Bytes with a sign are multiplied by bytes with a sign: nothing is biased, and nothing is split. */

#define DQ_QUANTIZE_STEP 32
static inline void dq_nontemporal_end(void) {}
static inline int dq_quantize_step(const float* x, float lo, float hi, int32_t clip, int in_range, int nontemporal,
                                   int8_t* codes) {
    const float32x4_t vlo = vdupq_n_f32(lo), vhi = vdupq_n_f32(hi), magic = vdupq_n_f32(DQ_MAGIC);
    int32x4_t low[8], high[8];
    uint32x4_t differ;
    (void)nontemporal;
    for (int j = 0; j < 8; j++) {
        const float32x4_t v = vld1q_f32(x + 4 * j);
        low[j] = vreinterpretq_s32_f32(vfmaq_f32(magic, v, vlo));
        high[j] = vreinterpretq_s32_f32(vfmaq_f32(magic, v, vhi));
    }
    if (in_range) {
        /* The lower half of a sum is the code as int16, the lowest byte the code. */
        int16x8_t a[4];
        int16x8_t differ16 = vdupq_n_s16(0);
        for (int j = 0; j < 4; j++) {
            a[j] = vuzp1q_s16(vreinterpretq_s16_s32(low[2 * j]), vreinterpretq_s16_s32(low[2 * j + 1]));
            differ16 = vorrq_s16(differ16, veorq_s16(a[j], vuzp1q_s16(vreinterpretq_s16_s32(high[2 * j]),
                                                                      vreinterpretq_s16_s32(high[2 * j + 1]))));
        }
        for (int j = 0; j < 2; j++)
            vst1q_s8(codes + 16 * j,
                     vuzp1q_s8(vreinterpretq_s8_s16(a[2 * j]), vreinterpretq_s8_s16(a[2 * j + 1])));
        differ = vreinterpretq_u32_s16(differ16);
    } else {
        int32x4_t differ32 = vdupq_n_s32(0);
        for (int j = 0; j < 8; j++) {
            differ32 = vorrq_s32(differ32, veorq_s32(low[j], high[j]));
            low[j] = vsubq_s32(low[j], vdupq_n_s32(DQ_MAGIC_BITS));
        }
        for (int j = 0; j < 2; j++) {
            const int16x8_t a = vqmovn_high_s32(vqmovn_s32(low[4 * j]), low[4 * j + 1]);
            const int16x8_t b = vqmovn_high_s32(vqmovn_s32(low[4 * j + 2]), low[4 * j + 3]);
            const int8x16_t bytes = vmaxq_s8(vqmovn_high_s16(vqmovn_s16(a), b), vdupq_n_s8((int8_t)-clip));
            vst1q_s8(codes + 16 * j, vminq_s8(bytes, vdupq_n_s8((int8_t)clip)));
        }
        differ = vreinterpretq_u32_s32(differ32);
    }
    return vmaxvq_u32(differ) != 0;
}

#define DQ_NONTEMPORAL_VALUES
static inline void dq_nontemporal_values(const int8_t* codes, float scale, float* out) {
    const int8x16_t v = vld1q_s8(codes);
    const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_high_s8(v);
    vst1q_f32(out, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), scale));
    vst1q_f32(out + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(low)), scale));
    vst1q_f32(out + 8, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), scale));
    vst1q_f32(out + 12, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(high)), scale));
}

#define DQ_QUOTIENTS 32
static inline int dq_quotients(const float* x, const float* factors, const float* reciprocals, float* out) {
    const uint32x4_t limit = vdupq_n_u32(2u * DQ_MIN_DIVIDED - 1);
    uint32x4_t lowest = limit;
    float32x4_t q[8];
    for (int j = 0; j < 8; j++) {
        const float32x4_t a = vld1q_f32(x + 4 * j), b = vld1q_f32(factors + 4 * j);
        const float32x4_t y = vld1q_f32(reciprocals + 4 * j);
        const uint32x4_t twice = vaddq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(a));
        lowest = vminq_u32(lowest, vsubq_u32(twice, vdupq_n_u32(1)));
        q[j] = vmulq_f32(a, y);
        q[j] = vfmsq_f32(q[j], vfmaq_f32(vnegq_f32(a), b, q[j]), y);
    }
    if (vminvq_u32(lowest) != 2u * DQ_MIN_DIVIDED - 1) return 1;
    for (int j = 0; j < 8; j++) vst1q_f32(out + 4 * j, q[j]);
    return 0;
}

#define DQ_WIDENS
static inline void dq_widen_step(const uint16_t* x, float* out) {
    const float16x8_t v = vreinterpretq_f16_u16(vld1q_u16(x));
    vst1q_f32(out, vcvt_f32_f16(vget_low_f16(v)));
    vst1q_f32(out + 4, vcvt_high_f32_f16(v));
}

#define DQ_BETWEEN
static inline uint32_t dq_between_step(const float* x, int32_t low, int32_t high, int64_t* below, int* finite) {
    static const uint8_t places[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const int32x4_t vlow = vdupq_n_s32(low), vhigh = vdupq_n_s32(high);
    int32x4_t v[8], top = vdupq_n_s32(0), less = top;
    uint16x8_t inside[4];
    for (int j = 0; j < 8; j++) {
        v[j] = vandq_s32(vreinterpretq_s32_f32(vld1q_f32(x + 4 * j)), vdupq_n_s32(0x7FFFFFFF));
        top = vmaxq_s32(top, v[j]);
    }
    const int32_t largest = vmaxvq_s32(top);
    if (largest < low) { /* as in most steps for percentiles close to 1 */
        *below += DQ_BETWEEN_STEP;
        return 0;
    }
    for (int j = 0; j < 8; j += 2) {
        const uint32x4_t lt0 = vcltq_s32(v[j], vlow), lt1 = vcltq_s32(v[j + 1], vlow);
        const uint32x4_t in0 = vbicq_u32(vcleq_s32(v[j], vhigh), lt0);
        const uint32x4_t in1 = vbicq_u32(vcleq_s32(v[j + 1], vhigh), lt1);
        less = vaddq_s32(less, vreinterpretq_s32_u32(vaddq_u32(lt0, lt1))); /* -1 for each */
        inside[j / 2] = vuzp1q_u16(vreinterpretq_u16_u32(in0), vreinterpretq_u16_u32(in1));
    }
    const uint8x16_t bit = vld1q_u8(places);
    const uint8x16_t first = vuzp1q_u8(vreinterpretq_u8_u16(inside[0]), vreinterpretq_u8_u16(inside[1]));
    const uint8x16_t second = vuzp1q_u8(vreinterpretq_u8_u16(inside[2]), vreinterpretq_u8_u16(inside[3]));
    uint8x16_t bits = vpaddq_u8(vandq_u8(first, bit), vandq_u8(second, bit));
    bits = vpaddq_u8(bits, bits);
    bits = vpaddq_u8(bits, bits);
    *below -= vaddvq_s32(less);
    *finite &= largest <= 0x7F7FFFFF;
    return vgetq_lane_u32(vreinterpretq_u32_u8(bits), 0);
}

#define DQ_COUNTS_BITS
static inline int dq_count_bits(uint32_t bits) { return __builtin_popcount(bits); }

/* acc + the products of four bytes of w and of a, in each int32. A pair of products, in [-128, 127] and
   [-127, 127], is at most 2 * 128 * 127 = 32,512 < 2**15. */
static inline int32x4_t dq_multiply_add(int32x4_t acc, int8x16_t w, int8x16_t a) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, w, a);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(a)), high = vmull_high_s8(w, a);
    return vpadalq_s16(acc, vpaddq_s16(low, high));
#endif
}

#define DQ_DOT_STEP 32
typedef struct {
    int32x4_t first, second;
} dq_dot_acc;
static inline dq_dot_acc dq_dot_zero(void) { return (dq_dot_acc){vdupq_n_s32(0), vdupq_n_s32(0)}; }
static inline dq_dot_acc dq_dot_add(dq_dot_acc x, dq_dot_acc y) {
    return (dq_dot_acc){vaddq_s32(x.first, y.first), vaddq_s32(x.second, y.second)};
}
/* Which products share an int32 is free here. */
static inline int32x4_t dq_dot_16(int32x4_t acc, const int8_t* w, const int8_t* a) {
    const int8x16_t vw = vld1q_s8(w), va = vld1q_s8(a);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, vw, va);
#else
    return vpadalq_s16(acc, vmlal_high_s8(vmull_s8(vget_low_s8(vw), vget_low_s8(va)), vw, va));
#endif
}
static inline dq_dot_acc dq_dot_step(dq_dot_acc acc, const int8_t* w, const int8_t* a) {
    return (dq_dot_acc){dq_dot_16(acc.first, w, a), dq_dot_16(acc.second, w + 16, a + 16)};
}
static inline dq_dot_acc dq_dot_biased_step(dq_dot_acc acc, const int8_t* w, const int8_t* a) {
    return dq_dot_step(acc, w, a);
}
static inline int32_t dq_dot_sum(dq_dot_acc acc) { return vaddvq_s32(vaddq_s32(acc.first, acc.second)); }

/* Eight outputs, in two registers. */
typedef struct {
    int32x4_t low, high;
} dq_acc;
typedef struct {
    int8x16_t low, high;
} dq_weights;
typedef int8x16_t dq_broadcast_act;
#define DQ_LANES 8
#define DQ_DEPTH 4
#define DQ_SPLIT 0
static inline dq_acc dq_acc_zero(void) { return (dq_acc){vdupq_n_s32(0), vdupq_n_s32(0)}; }
static inline dq_acc dq_acc_load(const int32_t* s) { return (dq_acc){vld1q_s32(s), vld1q_s32(s + 4)}; }
static inline dq_acc dq_acc_add(dq_acc x, dq_acc y) {
    return (dq_acc){vaddq_s32(x.low, y.low), vaddq_s32(x.high, y.high)};
}
static inline void dq_acc_store(int32_t* out, dq_acc s) {
    vst1q_s32(out, s.low);
    vst1q_s32(out + 4, s.high);
}
static inline dq_broadcast_act dq_broadcast(const uint8_t* a) {
    int32_t four;
    memcpy(&four, a, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
static inline int8x16_t dq_bytes_load(const uint8_t* w) { return vreinterpretq_s8_u8(vld1q_u8(w)); }
static inline dq_weights dq_weights_load(const uint8_t* w) {
    return (dq_weights){dq_bytes_load(w), dq_bytes_load(w + 16)};
}
static inline dq_acc dq_acc_step(dq_acc acc, dq_weights w, dq_broadcast_act a) {
    return (dq_acc){dq_multiply_add(acc.low, w.low, a), dq_multiply_add(acc.high, w.high, a)};
}

#define DQ_TRANSPOSES
static inline void dq_transpose_16(const int8_t* w, ptrdiff_t stride, uint8_t* out, ptrdiff_t out_stride) {
    const int32x4_t a = vreinterpretq_s32_s8(vld1q_s8(w)), b = vreinterpretq_s32_s8(vld1q_s8(w + stride));
    const int32x4_t c = vreinterpretq_s32_s8(vld1q_s8(w + 2 * stride));
    const int32x4_t d = vreinterpretq_s32_s8(vld1q_s8(w + 3 * stride));
    const int32x4_t ac = vzip1q_s32(a, c), bd = vzip1q_s32(b, d);
    const int32x4_t ac_high = vzip2q_s32(a, c), bd_high = vzip2q_s32(b, d);
    vst1q_u8(out, vreinterpretq_u8_s32(vzip1q_s32(ac, bd)));
    vst1q_u8(out + out_stride, vreinterpretq_u8_s32(vzip2q_s32(ac, bd)));
    vst1q_u8(out + 2 * out_stride, vreinterpretq_u8_s32(vzip1q_s32(ac_high, bd_high)));
    vst1q_u8(out + 3 * out_stride, vreinterpretq_u8_s32(vzip2q_s32(ac_high, bd_high)));
}

#define DQ_BIASES
static inline uint32_t dq_pairs_out_of_range(const int8_t* a) { return (void)a, 0u; }
static inline uint32_t dq_bias_step(int8_t* a, int32_t* compensation) { return (void)a, (void)compensation, 0u; }

/* The 4-bit codes of eight outputs, unpacked: those of even k, then those of odd k. */
typedef dq_acc dq_acc16;
typedef struct {
    int8x16_t even_low, even_high, odd_low, odd_high;
} dq_codes;
typedef struct {
    float32x4_t low, high;
} dq_floats;
#define DQ_ACC16_STEPS (1 << 20)
static inline int8x16_t dq_even_codes(uint8x16_t v) {
    return vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(0x0F)));
}
static inline int8x16_t dq_odd_codes(uint8x16_t v) { return vreinterpretq_s8_u8(vshrq_n_u8(v, 4)); }
static inline dq_codes dq_codes_load(const uint8_t* w) {
    const uint8x16_t low = vld1q_u8(w), high = vld1q_u8(w + 16);
    return (dq_codes){dq_even_codes(low), dq_even_codes(high), dq_odd_codes(low), dq_odd_codes(high)};
}
static inline dq_acc16 dq_acc16_zero(void) { return dq_acc_zero(); }
/* Four products in int16 are at most 4 * 15 * 127 = 7,620. */
static inline int32x4_t dq_codes_add(int32x4_t acc, int8x16_t w_even, int8x16_t w_odd, int8x16_t even,
                                     int8x16_t odd) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(vdotq_s32(acc, w_even, even), w_odd, odd);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(w_even), vget_low_s8(even)), high = vmull_high_s8(w_even, even);
    return vpadalq_s16(acc, vpaddq_s16(vmlal_s8(low, vget_low_s8(w_odd), vget_low_s8(odd)),
                                       vmlal_high_s8(high, w_odd, odd)));
#endif
}
static inline dq_acc16 dq_acc16_step(dq_acc16 part, dq_codes w, dq_broadcast_act even, dq_broadcast_act odd) {
    return (dq_acc16){dq_codes_add(part.low, w.even_low, w.odd_low, even, odd),
                      dq_codes_add(part.high, w.even_high, w.odd_high, even, odd)};
}
static inline dq_acc dq_acc_add16(dq_acc s, dq_acc16 part) {
    return (dq_acc){vaddq_s32(s.low, part.low), vaddq_s32(s.high, part.high)};
}
static inline dq_floats dq_floats_load(const float* x) { return (dq_floats){vld1q_f32(x), vld1q_f32(x + 4)}; }
static inline void dq_floats_store(float* out, dq_floats x) {
    vst1q_f32(out, x.low);
    vst1q_f32(out + 4, x.high);
}
static inline dq_floats dq_zero_points_load(const uint8_t* z) {
    const uint16x8_t v = vmovl_u8(vld1_u8(z));
    return (dq_floats){vcvtq_f32_u32(vmovl_u16(vget_low_u16(v))), vcvtq_f32_u32(vmovl_high_u16(v))};
}
static inline dq_floats dq_floats_add(dq_floats x, dq_floats y) {
    return (dq_floats){vaddq_f32(x.low, y.low), vaddq_f32(x.high, y.high)};
}
static inline dq_floats dq_floats_sub(dq_floats x, dq_floats y) {
    return (dq_floats){vsubq_f32(x.low, y.low), vsubq_f32(x.high, y.high)};
}
static inline dq_floats dq_floats_scale(dq_floats x, float scale) {
    return (dq_floats){vmulq_n_f32(x.low, scale), vmulq_n_f32(x.high, scale)};
}
static inline float32x4_t dq_hadamard_4(float32x4_t x) {
    static const float signs1[4] = {1, -1, 1, -1}, signs2[4] = {1, 1, -1, -1};
    x = vfmaq_f32(vrev64q_f32(x), x, vld1q_f32(signs1));
    return vfmaq_f32(vextq_f32(x, x, 2), x, vld1q_f32(signs2));
}
static inline dq_floats dq_hadamard_lanes(dq_floats x) {
    const float32x4_t low = dq_hadamard_4(x.low), high = dq_hadamard_4(x.high);
    return (dq_floats){vaddq_f32(low, high), vsubq_f32(low, high)};
}
static inline float32x4_t dq_group_add_4(float32x4_t acc, int32x4_t s, float32x4_t zero_points, float a_sum,
                                         float32x4_t scales) {
    const float32x4_t sum = vfmsq_n_f32(vcvtq_f32_s32(s), zero_points, a_sum);
    return vaddq_f32(acc, vmulq_f32(sum, scales));
}
static inline dq_floats dq_group_add(dq_floats acc, dq_acc s, dq_floats zero_points, float a_sum,
                                     dq_floats scales) {
    return (dq_floats){dq_group_add_4(acc.low, s.low, zero_points.low, a_sum, scales.low),
                       dq_group_add_4(acc.high, s.high, zero_points.high, a_sum, scales.high)};
}
static inline float32x4_t dq_group_add_minimums_4(float32x4_t acc, int32x4_t s, float32x4_t minimums, float a_sum,
                                                  float32x4_t scales) {
    const float32x4_t sum = vmulq_f32(vcvtq_f32_s32(s), scales);
    return vaddq_f32(acc, vaddq_f32(sum, vmulq_n_f32(minimums, a_sum)));
}
static inline dq_floats dq_group_add_minimums(dq_floats acc, dq_acc s, dq_floats minimums, float a_sum,
                                              dq_floats scales) {
    return (dq_floats){dq_group_add_minimums_4(acc.low, s.low, minimums.low, a_sum, scales.low),
                       dq_group_add_minimums_4(acc.high, s.high, minimums.high, a_sum, scales.high)};
}
