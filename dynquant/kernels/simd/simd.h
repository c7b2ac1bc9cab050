/* Vector primitives for what a compiler does not reach from a plain loop. The loops that use them are in
   the .pxi files of kernels/; every contract stands here, once.

   One file holds one instruction set. They are included from the strongest that this module is compiled for to
   scalar.h, and each defines the primitives that no stronger one has defined: a primitive's own macro
   (DQ_QUANTIZE_STEP, DQ_LANES, ...) tells. So the kernels of a new instruction set, such
   as SVE, are one new file and one #include below, which may begin with a single primitive. Beside that it needs
   _isa_<name>.pyx, its detection in cpu.h and _core.pyx, an import in _isa.py and flags in setup.py: docs/design.md
   has the list. Forms may differ in speed only, never in a bit of any result. */
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

/* __AMXINT8__ is the older name in clang. Only on Linux can processes use the tiles. */
#if (defined(__AMX_INT8__) || defined(__AMXINT8__)) && defined(__linux__)
#define DQ_AMX
#endif

/* Not the NEON of 32-bit ARM, which takes subnormal floats for zeros, nor that of big-endian processors, where lanes
   are numbered the other way round. cl.exe for ARM does not define these, and gets plain C. */
#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__ARM_BIG_ENDIAN)
#define DQ_NEON
#include <arm_neon.h>
/* No load moves across: gcc would load the weights of several steps first, and write accumulators to memory for it. */
#define DQ_KEEP_LOADS __asm__ volatile("" ::: "memory");
/* For loops that take all registers. */
#define DQ_NOT_INLINE static __attribute__((noinline))
#endif

/* Wider registers, such as those of the x87, would round sums and quotients twice. The value 16 says that
   _Float16 is computed as it is, and float too. */
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "float arithmetic has to be that of float: compile with -msse2 -mfpmath=sse (x86) or -std=gnu11 (s390)"
#endif

/* A product and a sum are never rounded together anywhere in this source. gcc has -ffp-contract=off for it. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(_MSC_VER)
#pragma fp_contract(off)
#endif

/* Inlined, because arguments are then constants, or stay in registers. */
#if defined(__GNUC__)
#define DQ_INLINE static inline __attribute__((always_inline))
#else
#define DQ_INLINE static inline
#endif

/* ---- Memory and bits ---------------------------------------------------------------------------------- */

/* Fetches n bytes into the caches. Any address will do, also one outside of all arrays. */
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

/* Index of the lowest bit that is set; bits is not 0. */
static inline int dq_lowest_bit(uint32_t bits) {
#if defined(__GNUC__)
    return __builtin_ctz(bits);
#else
    int index = 0;
    while (!(bits >> index & 1)) index++;
    return index;
#endif
}

/* int dq_count_bits(uint32_t bits): how many bits are set. */

/* ---- Quantizing and dequantizing ---------------------------------------------------------------------- */

/* 1.5 * 2**23. Added to y, |y| < 2**22, it leaves the integer nearest y (halves to even) in the low bits of the
   sum, in two's complement. As integers the bits of the sum rise with y while the sum is positive, and are
   negative where it is negative, so that clamping them clamps y. */
#define DQ_MAGIC 12582912.0f
#define DQ_MAGIC_BITS 0x4B400000

/* The float below 0.5. Adding it, with the sign of v, and truncating rounds halves away from zero, exactly for
   |v| < 2**22: the sum reaches the next integer for every v from the half up, and for none below it. */
#define DQ_BELOW_HALF 0.499999970197677612f

/* A quotient by a scale in this range lies between the products with fl(r * DQ_BELOW_1) and fl(r * DQ_ABOVE_1),
   r = fl(1 / scale): kernels/quantize.pxi. */
#define DQ_BELOW_1 (float)(1.0 - 4.76837158203125e-07)
#define DQ_ABOVE_1 (float)(1.0 + 4.76837158203125e-07)
#define DQ_MIN_SCALE 2.3509887016445750e-38f
#define DQ_MAX_SCALE 4.2535295865117308e+37f

/* int dq_quantize_step(const float* x, float lo, float hi, int32_t clip, int in_range, int nontemporal,
                        int8_t* codes)

   codes[i] = clamp(integer nearest x[i] * lo, -clip, clip) for DQ_QUANTIZE_STEP floats. With `in_range` the
   caller guarantees that every x[i] * lo and x[i] * hi rounds into [-clip, clip], and nothing is clamped.
   Returns nonzero where x[i] * lo and x[i] * hi do not round to the same integer for some i; codes are valid
   only where it returns zero.

   With `nontemporal` the codes, which are then aligned to DQ_QUANTIZE_STEP, are written past the caches: a line
   that will not be read soon need not be read before it is written. dq_nontemporal_end() must follow the last
   such step.

   Forms may round the product before the sum or not: codes count only where both bounds agree. The vector
   forms clamp late, by saturating packs and in bytes. Subtracting DQ_MAGIC_BITS wraps only where the sum is
   negative, x * lo below -1.5 * 2**23, and there x * hi is integers away.

   Left to itself gcc narrows int32 to int8 with twice the shuffles, and half the speed. */

/* void dq_nontemporal_values(const int8_t* codes, float scale, float* out)

   out[i] = codes[i] * scale for DQ_VALUES floats, written past the caches as above. They are one cache line, to
   which out is aligned. */
#define DQ_VALUES 16

/* ---- Quotients without a division ---------------------------------------------------------------------- */

/* int dq_quotients(const float* x, const float* factors, const float* reciprocals, float* out)

   out = x / factors, rounded as the division rounds it, for DQ_QUOTIENTS floats; reciprocals holds 1 / factors,
   rounded. Returns nonzero, with nothing done, where an |x| is so small that this could fail. Factors lie in
   [2**-60, 2**60], and no |x| is above 2**64. DQ_QUOTIENTS is 0 where there is no such form.

   A quotient is corrected by its remainder (Markstein, IBM Journal of Research and Development 34, 1990). Of
   fractions a, b in [1, 2): y = fl(1 / b) is off by 2**-25 at most, and so q = fl(a * y) by less than 1.5 ulp.
   a - b * q is then a float or, rounded, within 2**-47 of it, and q + (a - b * q) * y, before it is rounded,
   within 2**-46 of a / b. So it could be rounded to another float only where a / b is as close as that to a tie
   of two floats; no such pair exists (tests/test_smooth.py tries every candidate). With |x| at least 2**-64, or
   0, every intermediate result is normal or 0. The remainder is computed with its sign changed, which leaves
   zeros their sign. Twice the integer of a float drops its sign; 1 less puts 0 above all others. */
#define DQ_MIN_DIVIDED 0x1F800000 /* the bits of 2**-64 */

/* ---- Widening and comparing ---------------------------------------------------------------------------- */

/* One binary16 number. Exponent and fraction move to their positions in float32, which leaves a value 2**112 too
   small (the biases are 15 and 127); the product with 2**112 is exact and also normalizes subnormals. Infinity
   and NaN would become 2**16 and above, so they get the top exponent of float32 by hand. */
static inline float dq_widen(uint16_t h) {
    int32_t b = dq_bits(dq_float((int32_t)(h & 0x7FFF) << 13) * 5.1922968585348276e33f);
    b |= (h & 0x7C00) == 0x7C00 ? 0x7F800000 : 0;
    return dq_float(b | (int32_t)((uint32_t)(h & 0x8000) << 16));
}

/* void dq_widen_step(const uint16_t* x, float* out): DQ_WIDEN_STEP of them. gcc 12 does not use the conversion
   instruction by itself. */
#define DQ_WIDEN_STEP 8

/* uint32_t dq_between_step(const float* x, int32_t low, int32_t high, int64_t* below, int* finite)

   Bit j of the result is set where the bits of |x[j]| lie in [low, high], for DQ_BETWEEN_STEP floats. *below
   grows by how many lie below low; *finite becomes 0 where one is NaN or infinite. */
#define DQ_BETWEEN_STEP 32

/* ---- Dot products --------------------------------------------------------------------------------------- */

/* Products of int8 weights and activations are made of unsigned and signed bytes, which is what instructions
   multiply: kernels/split.pxi says how, and why it stays exact. XOR with DQ_BIAS makes the bytes of an even and
   an odd k unsigned. It is 0 where both factors have a sign. */
#if defined(DQ_NEON)
#define DQ_BIAS 0
#else
#define DQ_BIAS 0x7F80
#endif

/* dq_dot_acc dq_dot_step(dq_dot_acc acc, const int8_t* w, const int8_t* a)

   acc += w[i] * a[i] over DQ_DOT_STEP elements, w in [-128, 127], a in [-127, 127]; exact while the sum of every
   lane fits int32. dq_dot_sum adds up the lanes, whose total must fit too. Left to itself gcc widens to int16 and
   multiplies without adding pairs.

   dq_dot_biased_step takes plain w, biases it to unsigned bytes, and takes a as dq_bias_step leaves it: fewer
   instructions, and a compensation that is subtracted from the sum. */

/* void dq_nibble_sums(const uint8_t* w, const int8_t* a, uint8_t flip, int32_t* sums, ptrdiff_t blocks)

   sums[i] = the sum over the DQ_NIBBLES codes of a block: two of w, 0 to 15, in each byte, the even one in the low
   half, after `flip` is XORed to it; and those of a, in [-127, 127], the ones with an even index first. Exact. */
#define DQ_NIBBLES 32

/* ---- Matrix products, 8 bits ---------------------------------------------------------------------------- */

/* dq_acc dq_acc_step(dq_acc acc, dq_weights w, dq_broadcast_act a)

   acc[lane] += sum over DQ_DEPTH k of w[k][lane] * a[k]: one k-step. w in [0, 255], a in [-127, 127], exact while
   acc fits int32. Weights lie DQ_LANES outputs side by side, DQ_DEPTH consecutive k of an output next to each
   other, which is what one multiply-add instruction takes. dq_weights_load reads DQ_LANES * DQ_DEPTH bytes of
   them. Activations come as DQ_DEPTH consecutive k in four bytes, which dq_broadcast gives to every lane: bytes,
   or int16 where DQ_DEPTH is 2. With a DQ_BIAS of 0 w is in [-128, 127].

   Where DQ_SPLIT is 1, products are added to each other in int16, which saturates: no pair of activations, k and
   k + 1 for even k, may then be out of [-DQ_PAIR, DQ_PAIR] in sum. */
#define DQ_PAIR 128

/* uint32_t dq_pairs_out_of_range(const int8_t* a)

   Which pairs of DQ_BIAS_STEP biased codes are out of the range of DQ_PAIR, bit j for pair j. */

/* void dq_transpose_16(const int8_t* w, ptrdiff_t stride, uint8_t* out, ptrdiff_t out_stride)

   16 bytes of each of four rows, `stride` apart: their words of four bytes, as a matrix, transposed. */

/* uint32_t dq_bias_step(int8_t* a, int32_t* compensation)

   Prepares DQ_BIAS_STEP codes for dq_acc_step or dq_dot_biased_step, all but the split: negates the codes
   at odd k, and adds to *compensation the amount by which biasing the weights increases the sum, which the caller
   subtracts later. Pairs that are out of the range of DQ_PAIR stay as they are; bit j of the result tells of pair
   j. */
#define DQ_BIAS_STEP 32

/* Forms in which a row of biased codes can be multiplied, where DQ_FORMS is 1: kernels/forms.pxi. */
enum { DQ_PAIRS, DQ_EIGHTS, DQ_CENTERED, DQ_WIDE };
#define DQ_EIGHTS_LIMIT 128
#define DQ_CENTERED_LIMIT 257

/* void dq_count_lanes(const int8_t* a, int32_t* eights, int32_t* centered)

   Adds how many of the four lanes of DQ_BIAS_STEP biased codes are out of the range of DQ_EIGHTS, and of
   DQ_CENTERED apart from its pairs.

   int dq_eights_out_of_range(const uint8_t* a): whether 16 biased codes are out of the range of DQ_EIGHTS.

   int dq_center_16(const uint8_t* a, uint8_t* out)

   16 biased codes -> 20 bytes of the form DQ_CENTERED; out may be a. Returns nonzero where they are out of range.

   uint32_t dq_split_16(uint8_t* a, int8_t* residuals, int form)

   Clips 16 biased codes in place, so that every lane is in range of the form; the first codes of a lane keep their
   values. residuals (2, 4, 4): what was clipped off the four k-steps, itself clipped to the range of DQ_PAIR; and
   what was clipped off that. Bit j of the result is set where k-step j of these eight is not all zero.

   void dq_widen_16(const uint8_t* a, uint8_t* out): 16 biased codes -> 32 bytes of the form DQ_WIDE.

   void dq_form_rows(int form, const uint8_t* w, const uint8_t* a, ptrdiff_t stride, ptrdiff_t rows, int32_t* acc,
                     ptrdiff_t k_steps)

   acc (rows, 2 * DQ_LANES) = `k_steps` k-steps of rows of one form, `stride` bytes apart: at most DQ_KEPT_ROWS of
   DQ_EIGHTS and DQ_CENTERED, at most 4 of the others, and at least 2 of DQ_PAIRS. */

/* void dq_tiles(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, int rows, int32_t* acc, ptrdiff_t k_steps,
                 int tile_k_steps, int add)

   acc (rows, 2 * DQ_LANES) = `k_steps` k-steps, a multiple of tile_k_steps, for DQ_TILES_FROM to DQ_TILE_ROWS
   rows of a, `stride` bytes apart; with `add` they are added to acc. acc has space for DQ_TILE_ROWS rows. Called
   between dq_tiles_begin and dq_tiles_end. tile_k_steps is DQ_TILE_K_STEPS, or with AMX any number up to that.
   A k-step of these products is DQ_PANEL_DEPTH k, which is DQ_DEPTH where dq_acc_step has a part in them: where
   DQ_TILES_FROM is 1 it has none. Activations take DQ_STEP_BYTES a k-step.

   With AMX this is a product of tiles: registers of up to 16 rows of 64 bytes. An instruction multiplies a tile of
   activations, 16 rows of 64 k, by a tile of weights, 64 k of 16 outputs, and accumulates in int32.
   dq_tiles_begin says how many rows a tile has, at most 16, and how many k-steps; dq_tiles then takes that many
   rows, or from 16 to 32: the second tile ends at the last row and shares some with the first. dq_tiles_end
   releases the tiles, because a thread that holds them is expensive to switch.

   With VNNI, 10 accumulators hide the latency of VPDPBUSD, which Intel cores issue twice per cycle. `add` is
   supported where DQ_GROUP_TILES_FROM is not 0, which alone needs it.

   void dq_unpack_k_blocks(const uint8_t* w, uint8_t* k_steps, ptrdiff_t k_blocks)

   The k-steps, DQ_K_BLOCK / DQ_PANEL_DEPTH for each, of k-blocks of 2 * DQ_LANES outputs of 4-bit codes, for
   dq_tiles. Products of DQ_GROUP_TILES_FROM rows and more go that way; none do where it is 0. */

/* ---- Matrix products, 4 bits ---------------------------------------------------------------------------- */

/* dq_acc16 dq_acc16_step(dq_acc16 acc16, dq_codes w, dq_broadcast_act even, dq_broadcast_act odd)

   acc16[lane] += sum over one k-block of DQ_K_BLOCK k of code[k][lane] * a[k]; codes in [0, 15], a in
   [-127, 127]. Codes lie DQ_LANES outputs side by side, four bytes each, two codes a byte, the even k in the low
   nibble. Activations come as the four even k, then the four odd k, which dq_broadcast gives to every lane. At
   most DQ_ACC16_STEPS steps may go into one acc16, which is int16 where that is small; dq_acc_add16 then adds it
   to int32.

   dq_floats dq_group_add(dq_floats acc, dq_acc s, dq_floats zero_points, float a_sum, dq_floats scales)

   The end of a group: acc + float(s - zero_point * a_sum) * scale, where |s| and |zero_point * a_sum| are below
   2**24, so that floats hold them and their difference exactly.

   void dq_four_k_blocks(const uint8_t* w, const uint8_t* a, dq_acc* s0, dq_acc* s1)

   s0 and s1, the sums of 2 * DQ_LANES outputs for one row, += four k-blocks. DQ_FOUR_K_BLOCKS is 0 where there is
   no such form.

   dq_floats dq_group_add_minimums(dq_floats acc, dq_acc s, dq_floats minimums, float a_sum, dq_floats scales)

   The same for codes that stand for code * scale + minimum: acc + (float(s) * scale + minimum * a_sum), each product
   and sum rounded. No form may use a fused multiply-add.

   void dq_group_rows(const uint8_t* w, const float* scales, const uint8_t* offsets, int minimums, const uint8_t* a,
                      const uint8_t* a_sums, ptrdiff_t stride, ptrdiff_t rows, float* acc, ptrdiff_t k_blocks,
                      ptrdiff_t prefetch_distance)

   acc (rows, 2 * DQ_LANES): dq_group_add, or with `minimums` dq_group_add_minimums, of a group of `k_blocks`
   k-blocks, a multiple of 4, for at most DQ_KEPT_ROWS rows of a and of their sums, both `stride` bytes apart. The
   codes `prefetch_distance` bytes on are prefetched. DQ_KEPT_ROWS is 1 where there is no such form. */
#define DQ_K_BLOCK 8

/* ---- Thin layers ---------------------------------------------------------------------------------------- */

/* int dq_quantize_rows(const float* x, ptrdiff_t rows, ptrdiff_t k, int16_t* codes, ptrdiff_t stride, float* scales)

   Scales and int16 codes of at most DQ_WIDE_BATCH rows of k floats, which lie one after the other: scale = max|x| / 127,
   code = clamp(round half away(x / scale), -127, 127). Rows of codes are `stride` apart: 8 for k <= 8, otherwise k
   rounded up to a multiple of 16; what is written there after k codes is arbitrary. Returns 0, with results arbitrary, unless all floats are finite.

   void dq_wide_dots(const int16_t* a, ptrdiff_t stride, const int16_t* w, ptrdiff_t w_stride, ptrdiff_t n, ptrdiff_t k,
                     int32_t* sums)

   sums (DQ_WIDE_ROWS, n) = rows of codes times n <= DQ_WIDE_DOTS rows of weights, which are 0 from k to the next
   multiple of 16; strides are multiples of that.

   dq_acc dq_wide_step(dq_acc acc, dq_wide_weights w, dq_broadcast_act a)

   acc[lane] += the sum over a pair of k of w[lane][k] * a[k], both int16. dq_wide_load reads DQ_LANES pairs.

   void dq_widen_k_step(const uint8_t* w, int16_t* wide)

   Biased weights of a k-step of DQ_LANES outputs -> pairs of int16, those of the next two k 4 * DQ_LANES further.

   void dq_widen_k_block(const uint8_t* w, const uint8_t* zero_points, int16_t* wide)

   Codes of a k-block of 2 * DQ_LANES outputs, less their zero points -> four times as many pairs of int16.

   dq_floats dq_scaled(dq_acc s, dq_floats scales): float(s) * scales. */
#define DQ_WIDE_ROWS 8
#define DQ_WIDE_BATCH 64
#define DQ_WIDE_DOTS 4

/* ---- Rotation ------------------------------------------------------------------------------------------- */

/* dq_floats dq_hadamard_lanes(dq_floats x)

   log2(DQ_LANES) passes over DQ_LANES floats, which loops cannot shuffle. In the pass of stride s element i becomes
   x[i] + x[i ^ s] where bit s of i is 0, and x[i ^ s] - x[i] where it is 1. Multiplying by -1 is exact, so forms
   with a fused multiply-add round like those without. */

#if defined(DQ_AMX)
#include "amx.h"
#endif
#if defined(__AVX512BW__)
#include "avx512.h"
#endif
#if defined(__AVX2__)
#include "avx2.h"
#endif
#if defined(DQ_SSE2)
#include "sse2.h"
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8) && defined(DQ_NEON)
#include "i8mm.h"
#endif
#if defined(DQ_NEON)
#include "neon.h"
#endif
#if defined(__ARM_FEATURE_DOTPROD) && defined(DQ_NEON)
#include "dotprod.h" /* in the types of neon.h */
#endif
#include "scalar.h"

#define DQ_STEP_BYTES (DQ_PANEL_DEPTH < 4 ? 4 : DQ_PANEL_DEPTH)

/* How the weights of a product with one row of activations come from the caches and from memory, in which
   processors differ. DQ_CONCURRENT_PANELS, 1 or 4, is how many panels of 8-bit weights are read in turns;
   DQ_PREFETCH_FROM is the size in bytes from which 4-bit weights are prefetched. On an AMD EPYC of family 25, model 1
   (Zen 3), four panels are 1.4 to 1.7 times as fast as one where weights come from the last cache or from memory,
   and prefetching is half as fast again; neither costs anything where weights are closer. On model 17 (Zen 4), which
   stands for every processor with VNNI and without AMX, one panel is fastest, and prefetching pays from memory
   alone. */
#if defined(__AVX512VNNI__) && !defined(DQ_AMX)
#define DQ_CONCURRENT_PANELS 1
#define DQ_PREFETCH_FROM (20 << 20)
#else
#define DQ_CONCURRENT_PANELS 4
#define DQ_PREFETCH_FROM 0
#endif

/* Layers with at most so many inputs or outputs are multiplied by the kernels of kernels/wide.pxi. */
#if defined(__AVX512BW__) || defined(__AVXVNNI__)
#define DQ_THIN_INPUTS 64
#define DQ_THIN_OUTPUTS 16
#elif defined(__AVX2__)
#define DQ_THIN_INPUTS 128
#define DQ_THIN_OUTPUTS 32
#elif defined(DQ_SSE2)
#define DQ_THIN_INPUTS 64
#define DQ_THIN_OUTPUTS 8
#else
#define DQ_THIN_INPUTS 0
#define DQ_THIN_OUTPUTS 0
#endif

/* Products of integers that a core adds up in a nanosecond, roughly: what says whether a layer is worth a second
   thread. */
#if defined(DQ_AMX)
#define DQ_PRODUCTS_PER_NS 640
#elif defined(__AVX512VNNI__)
#define DQ_PRODUCTS_PER_NS 240
#elif defined(__AVX512BW__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_MATMUL_INT8)
#define DQ_PRODUCTS_PER_NS 120
#elif defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
#define DQ_PRODUCTS_PER_NS 80
#else
#define DQ_PRODUCTS_PER_NS 20
#endif

#endif
