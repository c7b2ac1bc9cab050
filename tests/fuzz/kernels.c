/* One input of the fuzzer: a kernel and the plain loops below, which share no code with it, compute the same
   thing, and must agree in every bit.

   The bytes of the input choose an instruction set, a case, lengths, addresses and numbers; missing bytes are
   zero. Every array is a heap block of its own and ends where the block ends, so that AddressSanitizer reports
   the first byte out of bounds. The public functions are called through dynquant.h, the row kernels behind the
   other Python functions through the table of dynquant/_table.pxd, which table.h is made from. */
#include <dynquant.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "table.h"

static const dynquant_api *dq;
static const Kernels *kernels;
static PyObject *set_table, *tables;

/* ---- The input ---- */

static const uint8_t *input;
static size_t input_size;
static uint32_t noise;

static uint32_t take(int bytes) {
    uint32_t value = 0;
    while (bytes--) {
        value = value << 8 | (input_size ? *input : 0);
        if (input_size) input++, input_size--;
    }
    return value;
}

static uint32_t more_noise(void) {
    noise ^= noise << 13;
    noise ^= noise >> 17;
    return noise ^= noise << 5;
}

/* A length up to `limit`: mostly short, and often next to a multiple of 64. */
static int64_t length(int64_t limit) {
    const uint32_t kind = take(1), n = take(2);
    const int64_t range = kind < 160 ? 150 : kind < 250 ? 700 : limit + 1, any = n % (range > limit ? limit + 1 : range);
    const int64_t beside = any / 64 * 64 + kind % 3 - 1;
    return kind % 4 || beside < 0 || beside > limit ? any : beside;
}

/* ---- Memory ---- */

static void *blocks[64];
static int block_count;

static void *keep(void *block) {
    if (block == NULL || block_count == 64) abort();
    return blocks[block_count++] = block;
}

/* `bytes` that end with their block, `offset` bytes past a multiple of 16. */
static void *array_at(size_t bytes, size_t offset) { return (char *)keep(malloc(bytes + offset)) + offset; }

/* The same, at an address that the input chooses, a multiple of `item`. */
static void *array(size_t bytes, size_t item) { return array_at(bytes, take(1) % 16 / item * item); }

/* The same, at a cache line, where panels and rows of activations start. */
static void *lines(size_t bytes) {
    void *block;
    if (posix_memalign(&block, 64, bytes ? bytes : 1)) abort();
    return keep(block);
}

static void *sentinel(size_t bytes, size_t item) { return memset(array(bytes, item), 77, bytes); }

static void free_all(void) {
    while (block_count) free(blocks[--block_count]);
}

/* ---- Numbers ---- */

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static int all_finite(const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(x[i])) return 0;
    return 1;
}

enum { NEAR_ONE, HALVES, EVERY, GIVEN, SMALL, STEPS, SPECIAL, KINDS };

static const float SPECIALS[] = {0.0f, -0.0f, 1e-45f, -1e-45f, 0x1p-126f, 0x1.fffffep127f, -0x1.fffffep127f,
                                 1.0f, -1.0f,  0.5f, -0.5f, 0x1p-149f, 0x1.fffffcp-127f, 127.0f, 3.5f, 0x1p100f};

static float number(uint32_t kind) {
    const uint32_t r = more_noise();
    switch (kind) {
    case NEAR_ONE: return (float)(int32_t)r * 0x1p-30f;
    case HALVES: return ((int32_t)(r % 513) - 256) * 0.5f;
    case EVERY: return float_of((r & 0x7F800000) == 0x7F800000 ? r ^ 0x40000000 : r);
    case GIVEN: return float_of(take(4));
    case SMALL: return float_of(r & 0x80001FFF);
    case STEPS: return float_of(0x3F800000 + r % 5);
    default: return SPECIALS[r % (sizeof SPECIALS / sizeof *SPECIALS)];
    }
}

/* n floats; NaN and infinity occur only where they are GIVEN, or where one of them was spoiled. */
static float *floats(int64_t n) {
    const uint32_t kind = take(1), spoil = take(1);
    float *x = array(4 * n, 4);
    for (int64_t i = 0; i < n; i++) x[i] = number(kind % (KINDS + 1) == KINDS ? (uint32_t)i % KINDS : kind % KINDS);
    if (n && spoil == 1) x[take(2) % n] = float_of(0x7F800000 | take(4));
    return x;
}

static float *finite_floats(int64_t n) {
    float *x = floats(n);
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(x[i])) x[i] = 1;
    return x;
}

/* Moderate magnitudes, with which no sum or product overflows float32. */
static float *moderate_floats(int64_t n, uint32_t kind) {
    float *x = array(4 * n, 4);
    for (int64_t i = 0; i < n; i++) x[i] = number(kind % 2);
    return x;
}

/* n codes of at least `low`; or most of them small, as those of real activations are. */
static int8_t *codes_from(int64_t n, int low) {
    const uint32_t kind = take(1);
    int8_t *codes = array(n, 1);
    for (int64_t i = 0; i < n; i++) {
        const int any = (int)(more_noise() % 256) - 128, small = any / (1 << more_noise() % 8);
        const int code = kind < 120 ? any : kind < 200 ? small : kind < 220 ? 127 : kind < 240 ? -128 : 0;
        codes[i] = (int8_t)(code < low ? low : code);
    }
    return codes;
}

/* ---- Comparison ---- */

static const char *case_name;

static void fail(const char *what, int64_t at) {
    fprintf(stderr, "%s: %s differs at %lld\n", case_name, what, (long long)at);
    abort();
}

static void same(const char *what, const void *actual, const void *expected, size_t bytes) {
    const uint8_t *a = actual, *e = expected;
    for (size_t i = 0; i < bytes; i++)
        if (a[i] != e[i]) fail(what, (int64_t)i);
}

/* Any NaN, from infinite products, equals any other. */
static void same_floats(const char *what, const float *actual, const float *expected, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (bits_of(actual[i]) != bits_of(expected[i]) && !(isnan(actual[i]) && isnan(expected[i]))) fail(what, i);
}

static void same_number(const char *what, double actual, double expected) {
    if (memcmp(&actual, &expected, 8) && !(isnan(actual) && isnan(expected))) fail(what, 0);
}

static void same_status(int actual, int expected) {
    if (actual != expected) fail("status", actual);
}

static void untouched(const void *memory, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        if (((const uint8_t *)memory)[i] != 77) fail("memory that was to stay as it was", (int64_t)i);
}

/* ---- Expected results ---- */

static float amax_of(const float *x, int64_t n) {
    float largest = 0;
    for (int64_t i = 0; i < n; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    return largest;
}

static int by_size(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static float ranked(const float *x, int64_t n, double p) {
    float *sorted = array_at(4 * n, 0);
    int64_t rank = (int64_t)ceilf((float)p * (float)n) - 1;
    if (n == 0) return 0;
    for (int64_t i = 0; i < n; i++) sorted[i] = fabsf(x[i]);
    qsort(sorted, n, 4, by_size);
    rank = rank > n - 1 ? n - 1 : rank;
    return sorted[rank > 0 ? rank : 0];
}

static int code_of(float x, float scale, int clip) {
    double v;
    if (scale == 0) return 0;
    v = x / scale;
    v = v > clip ? clip : v < -clip ? -clip : v;
    return (int)copysign(floor(fabs(v) + 0.5), v);
}

static void code_all(const float *x, int64_t n, float scale, int clip, int8_t *codes) {
    for (int64_t i = 0; i < n; i++) codes[i] = (int8_t)code_of(x[i], scale, clip);
}

static void pack_all(const int8_t *codes, int64_t n, uint8_t *packed) {
    memset(packed, 0, (n + 1) / 2);
    for (int64_t i = 0; i < n; i++) packed[i / 2] |= (codes[i] & 15) << (i % 2 ? 4 : 0);
}

static int nibble_at(const uint8_t *packed, int64_t i) { return packed[i / 2] >> (i % 2 ? 4 : 0) & 15; }

static int64_t dot_of(const int8_t *a, const int8_t *b, int64_t n) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* What 4-bit codes are offset by: zero points, or minimums, or nothing where they have a sign. */
typedef struct {
    const uint8_t *zeros;
    const float *minimums;
} offsets;

/* Those of output c, of `count` groups each. */
static offsets offsets_of(offsets all, int64_t c, int64_t count) {
    if (all.zeros) all.zeros += c * count;
    if (all.minimums) all.minimums += c * count;
    return all;
}

/* One output: the exact sum of each group times its scale, added in ascending order. */
static float total_of(const uint8_t *w, const float *scales, offsets of, const int8_t *a, int64_t k, int64_t group) {
    float total = 0;
    for (int64_t g = 0; g * group < k; g++) {
        int64_t sum = 0, a_sum = 0;
        float part;
        for (int64_t i = g * group; i < k && i < (g + 1) * group; i++) {
            const int code = nibble_at(w, i);
            sum += (of.minimums ? code : of.zeros ? code - of.zeros[g] : (code ^ 8) - 8) * a[i];
            a_sum += a[i];
        }
        part = (float)sum * scales[g];
        if (of.minimums) part += of.minimums[g] * (float)a_sum;
        total += part;
    }
    return total;
}

/* ---- Cases: the public functions ---- */

static void scales(void) {
    const int64_t n = take(1) == 255 ? 65536 + length(9000) : length(9000);
    const float *x = floats(n);
    const float clip = take(1) % 4 ? 127 : number(GIVEN);
    const double p = take(1) % 4 ? (take(2) + 1) / 65536.0 : number(GIVEN);
    const int bad = !(clip > 0 && isfinite(clip)), bad_p = !(p > 0 && p <= 1);
    const int usual = all_finite(x, n) ? DYNQUANT_OK : DYNQUANT_NON_FINITE;
    float *found = sentinel(4, 4), expected;

    same_status(dq->amax_f32(x, n, found), usual);
    if (usual != DYNQUANT_OK) {
        untouched(found, 4);
        same_status(dq->amax_scale_f32(x, n, 127, found), usual);
        same_status(dq->percentile_f32(x, n, 0.5, found), usual);
        untouched(found, 4);
        return;
    }
    expected = amax_of(x, n);
    same_floats("amax", found, &expected, 1);
    memset(found, 77, 4);
    if (bad || isinf(expected / clip)) {
        same_status(dq->amax_scale_f32(x, n, clip, found), DYNQUANT_BAD_ARGUMENT);
        untouched(found, 4);
    } else {
        same_status(dq->amax_scale_f32(x, n, clip, found), DYNQUANT_OK);
        expected /= clip;
        same_floats("scale", found, &expected, 1);
    }
    memset(found, 77, 4);
    if (bad_p) {
        same_status(dq->percentile_f32(x, n, p, found), DYNQUANT_BAD_ARGUMENT);
        untouched(found, 4);
        return;
    }
    expected = ranked(x, n, p);
    same_status(dq->percentile_f32(x, n, p, found), DYNQUANT_OK);
    same_floats("percentile", found, &expected, 1);
    memset(found, 77, 4);
    if (bad || isinf(expected / clip)) {
        same_status(dq->percentile_scale_f32(x, n, p, clip, found), DYNQUANT_BAD_ARGUMENT);
        untouched(found, 4);
    } else {
        same_status(dq->percentile_scale_f32(x, n, p, clip, found), DYNQUANT_OK);
        expected /= clip;
        same_floats("percentile scale", found, &expected, 1);
    }
}

/* Every eighth number becomes a boundary between two codes, or a float next to it. */
static void to_boundaries(float *x, int64_t n, float scale) {
    for (int64_t i = 0; i < n; i += 8) {
        const uint32_t r = more_noise();
        const float half = (float)(((int)(r % 257) - 128 + 0.5) * scale);
        const float near = r >> 16 & 1 ? half : nextafterf(half, r >> 17 & 1 ? INFINITY : 0);
        if (isfinite(near)) x[i] = near;
    }
}

static void quantize(void) {
    const int64_t n = length(9000);
    float *x = floats(n);
    const int packed = take(1) % 2;
    const int32_t clip = packed ? 7 : take(1) % 4 ? 127 : (int32_t)take(1) - 8;
    const uint32_t kind = take(1) % 3;
    const float scale = kind == 0 ? amax_of(x, n) / 127 : kind == 1 ? fabsf(number(take(1) % KINDS)) : number(GIVEN);
    const size_t bytes = packed ? (n + 1) / 2 : n;
    int8_t *codes = sentinel(bytes, 1), *expected = array_at(n, 0);
    int status;
    if (take(1) % 2) to_boundaries(x, n, scale);
    status = packed ? dq->quantize_row_f32_s4(x, n, scale, (uint8_t *)codes)
                    : dq->quantize_row_f32_s8(x, n, scale, clip, codes);
    if (!(scale >= 0 && isfinite(scale) && clip >= 1 && clip <= 127)) {
        same_status(status, DYNQUANT_BAD_ARGUMENT);
        untouched(codes, bytes);
        return;
    }
    same_status(status, all_finite(x, n) ? DYNQUANT_OK : DYNQUANT_NON_FINITE);
    if (status != DYNQUANT_OK) {
        untouched(codes, bytes);
        return;
    }
    code_all(x, n, scale, clip, expected);
    if (packed) {
        uint8_t *nibbles = array_at(bytes, 0);
        pack_all(expected, n, nibbles);
        same("packed codes", codes, nibbles, bytes);
    } else {
        same("codes", codes, expected, bytes);
        if (scale > 0) {
            memset(codes, 77, bytes);
            kernels->quantize_row_f32_s8(x, scale, clip, 0, 1, codes, n);
            same("codes past the caches", codes, expected, bytes);
        }
    }
}

static void dynamic_quantize(void) {
    const int64_t n = length(9000);
    const float *x = floats(n);
    int8_t *codes = sentinel(n, 1), *expected = array_at(n, 0);
    uint8_t *packed = sentinel((n + 1) / 2, 1), *nibbles = array_at((n + 1) / 2, 0);
    float *scale = sentinel(4, 4), right;
    const int status = all_finite(x, n) ? DYNQUANT_OK : DYNQUANT_NON_FINITE;
    same_status(dq->dynamic_quantize_row_f32_s8(x, n, codes, scale), status);
    if (status != DYNQUANT_OK) {
        same_status(dq->dynamic_quantize_row_f32_s4(x, n, packed, scale), status);
        untouched(codes, n);
        untouched(packed, (n + 1) / 2);
        untouched(scale, 4);
        return;
    }
    right = amax_of(x, n) / 127;
    code_all(x, n, right, 127, expected);
    same_floats("scale", scale, &right, 1);
    same("codes", codes, expected, n);
    same_status(dq->dynamic_quantize_row_f32_s4(x, n, packed, scale), DYNQUANT_OK);
    right = amax_of(x, n) / 7;
    code_all(x, n, right, 7, expected);
    pack_all(expected, n, nibbles);
    same_floats("scale", scale, &right, 1);
    same("packed codes", packed, nibbles, (n + 1) / 2);
}

static void dequantize(void) {
    const int64_t n = length(9000);
    const int8_t *codes = codes_from(n, -128);
    const uint8_t *packed = array((n + 1) / 2, 1);
    const float scale = number(take(1) % KINDS);
    float *out = sentinel(4 * n, 4), *expected = array_at(4 * n, 0);
    memcpy((void *)packed, codes, (n + 1) / 2);
    if (!isfinite(scale)) {
        same_status(dq->dequantize_row_s8_f32(codes, n, scale, out), DYNQUANT_BAD_ARGUMENT);
        same_status(dq->dequantize_row_s4_f32(packed, n, scale, out), DYNQUANT_BAD_ARGUMENT);
        untouched(out, 4 * n);
        return;
    }
    same_status(dq->dequantize_row_s8_f32(codes, n, scale, out), DYNQUANT_OK);
    for (int64_t i = 0; i < n; i++) expected[i] = codes[i] * scale;
    same_floats("values", out, expected, n);
    memset(out, 77, 4 * n);
    kernels->dequantize_row_s8_f32(codes, scale, 1, out, n);
    same_floats("values past the caches", out, expected, n);
    same_status(dq->dequantize_row_s4_f32(packed, n, scale, out), DYNQUANT_OK);
    for (int64_t i = 0; i < n; i++) expected[i] = ((nibble_at(packed, i) ^ 8) - 8) * scale;
    same_floats("values of nibbles", out, expected, n);
}

static void dot(void) {
    const int64_t n = take(1) == 255 ? 65536 + length(70000) : length(9000);
    const int8_t *a = codes_from(n, -128), *b = codes_from(n, take(1) % 2 ? -128 : -127);
    if (dq->dot_s8s8_s64(a, b, n) != dot_of(a, b, n)) fail("dot", n);
}

static void matvec(void) {
    const int64_t n = length(40), k = length(2000);
    const int8_t *w = codes_from(n * k, -128), *a = codes_from(k, take(1) % 4 ? -127 : -128);
    const float *w_scales = floats(n), a_scale = number(take(1) % KINDS);
    float *out = sentinel(4 * n, 4), *expected = array_at(4 * n, 0);
    const int status = dq->w8a8_matvec(w, w_scales, n, k, a, a_scale, out);
    if (!isfinite(a_scale) || !all_finite(w_scales, n)) {
        same_status(status, isfinite(a_scale) ? DYNQUANT_NON_FINITE : DYNQUANT_BAD_ARGUMENT);
        untouched(out, 4 * n);
        return;
    }
    for (int64_t r = 0; r < n; r++)
        expected[r] = k ? (float)dot_of(w + r * k, a, k) * w_scales[r] * a_scale : 0;
    same_status(status, DYNQUANT_OK);
    same_floats("products", out, expected, n);
}

static void matmul(void) {
    const int64_t m = length(12), n = length(70), k = length(600);
    const int8_t *w = codes_from(n * k, -128);
    const float *w_scales = floats(n), *bias = take(1) % 2 ? floats(n) : NULL, *x = floats(m * k);
    float *out = sentinel(4 * m * n, 4), *expected = array_at(4 * m * n, 0);
    void *packed = array(dq->w8a8_packed_bytes(n, k), 1), *scratch = array(dq->w8a8_scratch_bytes(m, k), 1);
    int8_t *codes = array_at(k, 0);
    int status;
    same_status(dq->w8a8_pack(w, n, k, packed), DYNQUANT_OK);
    same_status(dq->w8a8_matmul(packed, w_scales, bias, x, m, n + 1, k, scratch, out), DYNQUANT_BAD_ARGUMENT);
    same_status(dq->w8a8_matmul(packed, w_scales, bias, x, -1, n, k, scratch, out), DYNQUANT_BAD_ARGUMENT);
    status = dq->w8a8_matmul(packed, w_scales, bias, x, m, n, k, scratch, out);
    if (!(all_finite(w_scales, n) && all_finite(x, m * k) && (bias == NULL || all_finite(bias, n)))) {
        same_status(status, DYNQUANT_NON_FINITE);
        untouched(out, 4 * m * n);
        return;
    }
    same_status(status, DYNQUANT_OK);
    for (int64_t r = 0; r < m; r++) {
        const float a_scale = amax_of(x + r * k, k) / 127;
        code_all(x + r * k, k, a_scale, 127, codes);
        for (int64_t c = 0; c < n; c++) {
            const float y = (float)dot_of(w + c * k, codes, k) * w_scales[c] * a_scale;
            expected[r * n + c] = bias == NULL ? y : y + bias[c];
        }
    }
    same_floats("outputs", out, expected, m * n);
}

static void smooth(void) {
    const int64_t k = length(300), m = length(take(1) % 4 ? 9 : 5000 / (k + 1));
    float *x = floats(m * k), *factors = floats(k), *expected = array_at(4 * m * k, 0);
    const int in_place = take(1) % 2, divide = take(1) % 2, whole = all_finite(x, m * k) && all_finite(factors, k);
    float *out = in_place ? x : sentinel(4 * m * k, 4);
    int above = 1, status;
    if (take(1) % 8)
        for (int64_t i = 0; i < k; i++) factors[i] = factors[i] == 0 ? 1 : fabsf(factors[i]);
    for (int64_t i = 0; i < k; i++) above &= factors[i] > 0;
    memcpy(expected, out, 4 * m * k);
    if (whole && above)
        for (int64_t i = 0; i < m * k; i++) expected[i] = divide ? x[i] / factors[i % k] : x[i] * factors[i % k];
    status = (divide ? dq->divide_rows_f32 : dq->multiply_rows_f32)(x, factors, m, k, out);
    same_status(status, !whole ? DYNQUANT_NON_FINITE : above ? DYNQUANT_OK : DYNQUANT_BAD_ARGUMENT);
    if (status == DYNQUANT_OK) same_floats("smoothed", out, expected, m * k);
    else same("memory that was to stay as it was", out, expected, 4 * m * k);
}

/* Invalid lengths: nothing is read or written. */
static void impossible(void) {
    static const int64_t LENGTHS[] = {-1, INT64_MIN, INT64_MAX, INT64_MAX / 4 + 1, INT64_MAX / 2};
    const int64_t n = LENGTHS[take(1) % 5];
    float *number_out = sentinel(4, 4);
    int8_t *codes = sentinel(1, 1);
    same_status(dq->amax_f32(number_out, n, number_out), DYNQUANT_BAD_ARGUMENT);
    same_status(dq->percentile_f32(number_out, n, 0.5, number_out), DYNQUANT_BAD_ARGUMENT);
    same_status(dq->dynamic_quantize_row_f32_s8(number_out, n, codes, number_out), DYNQUANT_BAD_ARGUMENT);
    same_status(dq->quantize_row_f32_s4(number_out, n, 1, (uint8_t *)codes), DYNQUANT_BAD_ARGUMENT);
    same_status(dq->dequantize_row_s8_f32(codes, n, 1, number_out), DYNQUANT_BAD_ARGUMENT);
    same_status(dq->w8a8_matvec(codes, number_out, n, 3, codes, 1, number_out), DYNQUANT_BAD_ARGUMENT);
    same_status(dq->w8a8_matvec(codes, number_out, 3, n, codes, 1, number_out), DYNQUANT_BAD_ARGUMENT);
    same_status(dq->divide_rows_f32(number_out, number_out, n, n, number_out), DYNQUANT_BAD_ARGUMENT);
    same_status(dq->w8a8_pack(codes, n, n, codes), DYNQUANT_BAD_ARGUMENT);
    if (dq->w8a8_packed_bytes(n, n) != -1 || dq->w8a8_scratch_bytes(n, n) != -1) fail("bytes", n);
    untouched(number_out, 4);
    untouched(codes, 1);
}

/* ---- Cases: the row kernels behind other functions ---- */

static float widened(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const float sign = h >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24));
}

static void widen(void) {
    const int64_t n = length(4096);
    uint16_t *x = array(2 * n, 2);
    float *out = array(4 * n, 4), *expected = array_at(4 * n, 0);
    for (int64_t i = 0; i < n; i++) x[i] = (uint16_t)more_noise();
    kernels->widen_f16_f32(x, out, n);
    for (int64_t i = 0; i < n; i++) expected[i] = widened(x[i]);
    same_floats("binary16", out, expected, n);
    kernels->widen_bf16_f32(x, out, n);
    for (int64_t i = 0; i < n; i++) expected[i] = float_of((uint32_t)x[i] << 16);
    same_floats("bfloat16", out, expected, n);
}

static void counts(void) {
    const int64_t n = length(4096);
    const float *x = finite_floats(n);
    const int32_t bound = (int32_t)(take(1) % 2 && n ? bits_of(x[take(2) % n]) & 0x7FFFFFFF : take(4) >> 1);
    const int shift = take(1) % 2 ? 10 : 0;
    const int32_t prefix = bound >> (shift + 10);
    Py_ssize_t *found = array_at(4096 * sizeof *found, 0), *expected = array_at(4096 * sizeof *expected, 0), below = 0;
    int32_t largest = 0;
    memset(found, 0, 4096 * sizeof *found);
    memset(expected, 0, 4096 * sizeof *expected);
    for (int64_t i = 0; i < n; i++) {
        const int32_t bits = (int32_t)(bits_of(x[i]) & 0x7FFFFFFF);
        below += bits < bound;
        if (bits < bound && bits > largest) largest = bits;
        expected[bits >> 20]++;
        if (bits >> (shift + 10) == prefix) expected[2048 + (bits >> shift & 1023)]++;
    }
    if (kernels->count_below_f32(x, bound, n) != below) fail("count", bound);
    if (kernels->amax_bits_below_f32(x, bound, n) != largest) fail("next lower", bound);
    kernels->count_top_bits_f32(x, found, n);
    for (int64_t b = 0; b < 2048; b++)
        if (found[b] + found[2048 + b] != expected[b]) fail("top bits", b);
    memset(found, 0, 4096 * sizeof *found);
    kernels->count_next_bits_f32(x, prefix, shift, found, n);
    same("next bits", found, expected + 2048, 1024 * sizeof *found);
}

/* Also with some that are not finite. */
static void between(void) {
    const int64_t n = length(4096), capacity = take(1) % 2 ? n : take(1);
    const float *x = floats(n);
    const int32_t one = (int32_t)(n ? bits_of(x[take(2) % n]) & 0x7FFFFFFF : 0), other = (int32_t)(take(4) >> 1);
    const int32_t low = one < other ? one : other, high = take(1) % 3 ? one < other ? other : one : low;
    int32_t *candidates = sentinel(4 * capacity, 4), *expected = array_at(4 * n, 0);
    int64_t below = 3, less = 3, count = 0;
    int finite = 1;
    for (int64_t i = 0; i < n; i++) {
        const int32_t bits = (int32_t)(bits_of(x[i]) & 0x7FFFFFFF);
        less += bits < low;
        if (bits >= low && bits <= high) expected[count++] = bits;
    }
    if (kernels->collect_between_f32(x, low, high, candidates, capacity, &below, &finite, n) != count) fail("count", count);
    if (below != less) fail("below", below);
    if (finite != all_finite(x, n)) fail("finite", finite);
    same("candidates", candidates, expected, 4 * (count < capacity ? count : capacity));
    if (count < capacity) untouched(candidates + count, 4 * (capacity - count));
}

static void asymmetric(void) {
    const int64_t n = length(4096);
    const float *x = finite_floats(n);
    const int zero_point = (int)take(1);
    const float scale = fabsf(number(take(1) % KINDS));
    int8_t *four = array(n, 1), *shifted = array(n, 1);
    uint8_t *eight = array(n, 1), *packed = array((n + 1) / 2, 1), *nibbles = array_at((n + 1) / 2, 0);
    if (!(scale > 0 && isfinite(scale))) return;
    kernels->quantize_row_f32_u8(x, scale, zero_point, eight, n);
    kernels->quantize_row_f32_u4(x, scale, zero_point % 16, four, n);
    for (int64_t i = 0; i < n; i++) {
        const double v = x[i] / scale;
        double near = nearbyint(v) + zero_point;
        if (eight[i] != (near < 0 ? 0 : near > 255 ? 255 : near)) fail("uint8", i);
        near = copysign(floor(fabs(v) + 0.5), v) + zero_point % 16;
        if (four[i] != (near < 0 ? 0 : near > 15 ? 15 : near)) fail("4 bits", i);
    }
    kernels->pack_row_s8_s4(four, packed, n);
    pack_all(four, n, nibbles);
    same("nibbles", packed, nibbles, (n + 1) / 2);
    kernels->unpack_row_s4_s8(packed, shifted, n);
    for (int64_t i = 0; i < n; i++)
        if (shifted[i] != (four[i] ^ 8) - 8) fail("signed nibble", i);
    kernels->shift_row_u4_s8(shifted, zero_point % 16, n);
    for (int64_t i = 0; i < n; i++)
        if (shifted[i] != four[i] - zero_point % 16) fail("shifted", i);
}

static void columns(void) {
    const int64_t n = length(4096) + 1, stride = n + length(50);
    const float *x = finite_floats(3 * stride + n);
    int32_t *four = array(4 * n, 4), *one = array(4 * n, 4);
    for (int64_t i = 0; i < n; i++) four[i] = one[i] = (int32_t)(more_noise() & 0x7F7FFFFF);
    kernels->column_amax_4_rows_f32(x, stride, four, n);
    for (int64_t i = 0; i < n; i++)
        for (int r = 0; r < 4; r++) {
            const int32_t bits = (int32_t)(bits_of(x[r * stride + i]) & 0x7FFFFFFF);
            one[i] = bits > one[i] ? bits : one[i];
        }
    same("of four rows", four, one, 4 * n);
    kernels->column_amax_row_f32(x, four, n);
    same("of a row that is in it", four, one, 4 * n);
}

/* 8-bit weights of up to five panels, and rows of codes in several blocks. */
static void panels(void) {
    const int64_t k = take(1) == 255 ? 65536 + length(3000) : 1 + length(1000), each = kernels->panel_outputs;
    const int64_t n = 1 + take(1) % (5 * each), m = 1 + take(1) % (k < 300 ? 70 : 6), stride = n + take(1) % 5;
    const int64_t width = kernels->activation_bytes(k), panel_bytes = kernels->panel_bytes(k);
    const float *scales = moderate_floats(n, take(1)), *a_scales = moderate_floats(m, 0);
    const float *bias = take(1) % 2 ? moderate_floats(n, 0) : NULL;
    const int8_t *w = codes_from(n * k, -128), *codes = codes_from(m * k, -127);
    int8_t *back = array(n * k, 1), part[4096];
    uint8_t *packed = lines((n + each - 1) / each * panel_bytes), *a = lines(m * width);
    float *out = sentinel(4 * ((m - 1) * stride + n), 4);
    for (int64_t c = 0; c < n; c += each) {
        const int64_t rows = n - c < each ? n - c : each;
        kernels->pack_panel_s8(w + c * k, k, rows, packed + c / each * panel_bytes, k);
        kernels->unpack_panel_s8(packed + c / each * panel_bytes, back + c * k, rows, k);
    }
    same("weights", back, w, n * k);
    for (int64_t r = 0; r < m; r++)
        for (int64_t i = 0; i < k; i += sizeof part) {
            const int64_t count = k - i < (int64_t)sizeof part ? k - i : (int64_t)sizeof part;
            memcpy(part, codes + r * k + i, count);
            kernels->pack_activation_s8(part, a + r * width, i, count, k);
        }
    kernels->arrange_activations_s8(a, m, k);
    kernels->gemm_s8s8_f32(packed, scales, bias, a, a_scales, out, stride, m, n, k);
    for (int64_t r = 0; r < m; r++)
        for (int64_t c = 0; c < n; c++) {
            int64_t sum = 0;
            for (int64_t i = 0; i < k; i++) sum += w[c * k + i] * codes[r * k + i];
            float y = (float)sum * scales[c] * a_scales[r];
            if (bias) y += bias[c];
            same_floats("outputs", out + r * stride + c, &y, 1);
        }
    for (int64_t r = 0; r + 1 < m; r++) untouched(out + r * stride + n, 4 * (stride - n));
}

/* As matmul, for 4-bit weights with a scale and perhaps a zero point per group. */
static void matmul4(void) {
    const int64_t m = length(9), n = length(40), k = length(300), group = 1 + length(350), bytes = (k + 1) / 2;
    const int64_t count = (k + group - 1) / group, all = n * count;
    const uint8_t *w = (const uint8_t *)codes_from(n * bytes, -128);
    const float *w_scales = floats(n * count), *bias = take(1) % 2 ? floats(n) : NULL, *x = floats(m * k);
    const int kind = take(1) % 3, symmetric = kind == 1, above = take(1) == 1 && kind == 0;
    uint8_t *zeros = array(n * count, 1);
    const float *minimums = kind == 2 ? floats(n * count) : NULL;
    const offsets of = {kind == 0 ? zeros : NULL, minimums};
    float *out = sentinel(4 * m * n, 4), *expected = array_at(4 * m * n, 0);
    const size_t packed_bytes = (minimums ? dq->w4a8_minimums_packed_bytes : dq->w4a8_packed_bytes)(n, k, group);
    void *packed = sentinel(packed_bytes, 1), *scratch = array(dq->w4a8_scratch_bytes(m, k, group), 1);
    int8_t *codes = array_at(k, 0);
    int status;
    for (int64_t i = 0; i < n * count; i++) zeros[i] = more_noise() % 16;
    if (above && all > 0) zeros[take(2) % all] = 16 + take(1) % 200;
    status = minimums ? dq->w4a8_minimums_pack(w, w_scales, minimums, n, k, group, packed)
                      : dq->w4a8_pack(w, w_scales, symmetric ? NULL : zeros, n, k, group, packed);
    if (!all_finite(w_scales, n * count) || (above && all > 0) || (minimums && !all_finite(minimums, n * count))) {
        if (status == DYNQUANT_OK) fail("status of packing", status);
        untouched(packed, packed_bytes);
        return;
    }
    same_status(status, DYNQUANT_OK);
    same_status(dq->w4a8_matmul(packed, bias, x, m, n + 1, k, group, scratch, out), DYNQUANT_BAD_ARGUMENT);
    same_status(dq->w4a8_matmul(packed, bias, x, m, n, k, group + 1, scratch, out), DYNQUANT_BAD_ARGUMENT);
    status = dq->w4a8_matmul(packed, bias, x, m, n, k, group, scratch, out);
    if (!(all_finite(x, m * k) && (bias == NULL || all_finite(bias, n)))) {
        same_status(status, DYNQUANT_NON_FINITE);
        untouched(out, 4 * m * n);
        return;
    }
    same_status(status, DYNQUANT_OK);
    for (int64_t r = 0; r < m; r++) {
        const float a_scale = amax_of(x + r * k, k) / 127;
        code_all(x + r * k, k, a_scale, 127, codes);
        for (int64_t c = 0; c < n; c++) {
            const float total = total_of(w + c * bytes, w_scales + c * count, offsets_of(of, c, count), codes, k, group);
            const float y = k ? total * a_scale : 0;
            expected[r * n + c] = bias == NULL ? y : y + bias[c];
        }
    }
    same_floats("outputs", out, expected, m * n);
}

/* 4-bit weights: (rows, ceil(k / 2)) bytes of nibbles, a scale and perhaps a zero point per group. */
static void groups(void) {
    const int long_groups = take(1) == 255;
    /* Groups of whole AMX tiles, with enough rows to fill tiles; or any groups. */
    const int64_t multiple = long_groups || take(1) % 2 ? 1 : 32, any_k = 1 + length(700), at_most = any_k < 300 ? 70 : 6;
    const int64_t k = long_groups ? 8193 + length(20000) : (any_k + multiple - 1) / multiple * multiple;
    const int64_t group = long_groups ? 8193 + take(2) % (k - 8192) : (1 + take(2) % (k / multiple)) * multiple;
    const int64_t m = 1 + take(1) % (multiple > 1 ? at_most : 6), rows = 1 + take(1) % kernels->panel_outputs;
    const int64_t count = (k + group - 1) / group, bytes = (k + 1) / 2, all = kernels->panel_outputs;
    const int kind = take(1) % 3, minimums = kind == 2;
    const size_t offset_bytes = minimums ? 4 : 1;
    const float *scales = moderate_floats(rows * count, take(1)), *a_scales = moderate_floats(m, 0);
    const float *bias = take(1) % 2 ? moderate_floats(rows, 0) : NULL;
    uint8_t *w = (uint8_t *)codes_from(rows * bytes, -128), *zeros = array(rows * count, 1);
    uint8_t *given = minimums ? (uint8_t *)moderate_floats(rows * count, 0) : kind == 0 ? zeros : NULL;
    const offsets of = {kind == 0 ? zeros : NULL, minimums ? (const float *)given : NULL};
    uint8_t *panel = lines(kernels->group_panel_bytes(k, group)), *panel_offsets = lines(offset_bytes * all * count);
    float *panel_scales = lines(4 * all * count);
    const size_t width = kernels->group_activation_bytes(k, group);
    uint8_t *a = lines(m * width), *w_back = array(rows * bytes, 1), *back = array(offset_bytes * rows * count, offset_bytes);
    float *scales_back = array(4 * rows * count, 4);
    const int64_t stride = rows + take(1) % 5;
    float *out = sentinel(4 * ((m - 1) * stride + rows), 4);
    int8_t *codes = codes_from(m * k, -127);
    if (k % 2)
        for (int64_t r = 0; r < rows; r++) w[r * bytes + bytes - 1] &= 15;
    for (int64_t i = 0; i < rows * count; i++) zeros[i] = more_noise() % 16;
    kernels->pack_panel_u4(w, scales, given, minimums, rows, panel, panel_scales, panel_offsets, k, group);
    kernels->unpack_panel_u4(panel, panel_scales, panel_offsets, minimums, w_back, scales_back, given ? back : NULL, rows,
                             k, group);
    same("weights", w_back, w, rows * bytes);
    same_floats("scales", scales_back, scales, rows * count);
    if (given) same("offsets", back, given, offset_bytes * rows * count);
    for (int64_t r = 0; r < m; r++) kernels->pack_group_activation_s8(codes + r * k, a + r * width, k, group);
    kernels->gemm_u4s8_f32(panel, panel_scales, panel_offsets, minimums, bias, a, a_scales, out, stride, m, rows, k, group,
                           take(1) % 2 * 8192);
    for (int64_t r = 0; r < m; r++)
        for (int64_t c = 0; c < rows; c++) {
            float total = total_of(w + c * bytes, scales + c * count, offsets_of(of, c, count), codes + r * k, k, group);
            total *= a_scales[r];
            if (bias) total += bias[c];
            same_floats("outputs", out + r * stride + c, &total, 1);
        }
    for (int64_t r = 0; r + 1 < m; r++) untouched(out + r * stride + rows, 4 * (stride - rows));
}

/* 8-bit weights in groups, on activations around zero or with a zero point. */
static void groups8(void) {
    const int64_t m = length(9), n = length(40), k = take(1) == 255 ? 32768 + length(9000) : length(300);
    const int64_t group = k > 9000 ? 32768 + length(5000) : 1 + length(350), count = (k + group - 1) / group;
    const int64_t outputs = k > 9000 && n > 3 ? 3 : n;
    const int symmetric = take(1) % 2;
    const int8_t *w = codes_from(outputs * k, -128);
    const float *w_scales = floats(outputs * count), *bias = take(1) % 2 ? floats(outputs) : NULL, *x = floats(m * k);
    float *out = sentinel(4 * m * outputs, 4), *expected = array_at(4 * m * outputs, 0);
    const size_t packed_bytes = dq->w8a8_groups_packed_bytes(outputs, k, group, symmetric);
    void *packed = sentinel(packed_bytes, 1), *scratch = array(dq->w8a8_groups_scratch_bytes(m, k, group), 1);
    int16_t *a = array_at(2 * k, 0);
    int8_t *codes = array_at(k, 0);
    int status = dq->w8a8_groups_pack(w, w_scales, outputs, k, group, symmetric, packed), wide = 0;
    if (!all_finite(w_scales, outputs * count)) {
        same_status(status, DYNQUANT_NON_FINITE);
        untouched(packed, packed_bytes);
        return;
    }
    same_status(status, DYNQUANT_OK);
    same_status(dq->w8a8_groups_matmul(packed, bias, x, m, outputs, k, group, !symmetric, scratch, out),
                DYNQUANT_BAD_ARGUMENT);
    status = dq->w8a8_groups_matmul(packed, bias, x, m, outputs, k, group, symmetric, scratch, out);
    if (!(all_finite(x, m * k) && (bias == NULL || all_finite(bias, outputs)))) {
        same_status(status, DYNQUANT_NON_FINITE);
        untouched(out, 4 * m * outputs);
        return;
    }
    for (int64_t r = 0; r < m; r++) {
        const float *row = x + r * k;
        float low = 0, high = 0, scale = amax_of(row, k) / 127;
        code_all(row, k, scale, 127, codes);
        for (int64_t i = 0; i < k; i++) {
            low = row[i] < low ? row[i] : low;
            high = row[i] > high ? row[i] : high;
            a[i] = codes[i];
        }
        if (!symmetric) {
            double zero;
            wide |= isinf(high - low);
            scale = (high - low) / 255;
            zero = scale > 0 ? floor((double)(-low / scale) + 0.5) : 0;
            zero = zero > 255 ? 255 : zero;
            for (int64_t i = 0; i < k; i++) {
                const double v = scale > 0 ? row[i] / scale : 0;
                double code = copysign(floor(fabs(v) + 0.5), v) + zero;
                code = code < 0 ? 0 : code > 255 ? 255 : code;
                a[i] = (int16_t)(scale > 0 ? code - zero : 0);
            }
        }
        for (int64_t c = 0; c < outputs; c++) {
            float total = 0;
            for (int64_t g = 0; g < count; g++) {
                int64_t sum = 0;
                for (int64_t i = g * group; i < k && i < (g + 1) * group; i++) sum += w[c * k + i] * a[i];
                total += (float)sum * w_scales[c * count + g];
            }
            total = k ? total * scale : 0;
            expected[r * outputs + c] = bias == NULL ? total : total + bias[c];
        }
    }
    same_status(status, wide ? DYNQUANT_BAD_ARGUMENT : DYNQUANT_OK);
    if (wide) untouched(out, 4 * m * outputs);
    else same_floats("outputs", out, expected, m * outputs);
}

static void inner(void) {
    const int64_t m = length(90), n = length(90), k = take(1) % 8 ? length(130) : length(2200);
    const int8_t *a = codes_from(m * k, -128), *b = codes_from(n * k, -128);
    void *scratch = array(dq->int8_inner_scratch_bytes(m, n, k), 1);
    int32_t *out = sentinel(4 * m * n, 4);
    int64_t *wide = sentinel(8 * m * n, 8);
    same_status(dq->int8_inner_s32(a, b, m, n, k, scratch, out), DYNQUANT_OK);
    same_status(dq->int8_inner_s64(a, b, m, n, k, scratch, wide), DYNQUANT_OK);
    for (int64_t r = 0; r < m; r++)
        for (int64_t c = 0; c < n; c++) {
            const int64_t sum = dot_of(a + r * k, b + c * k, k);
            if (out[r * n + c] != sum || wide[r * n + c] != sum) fail("sum", r * n + c);
        }
}

/* One row of weights, rounded from the last column to the first, the errors carried to those before. */
static void compensate(void) {
    const int64_t n = length(60), stride = n + take(1) % 3, count = 1 + take(1) % 4;
    const uint32_t kind = take(1);
    const int signless = take(1) % 2, lo = signless ? 0 : -7, hi = signless ? 15 : 7;
    const float *w = moderate_floats(n, kind), *feedback = moderate_floats(n * stride, 0);
    float *scales = moderate_floats(count, 0), *carried = moderate_floats(n, kind), *left = array_at(4 * n, 0);
    float *errors = sentinel(4 * n, 4);
    int32_t *group = array(4 * n, 4), *columns = array(4 * n, 4);
    uint8_t *zeros = array(count, 1);
    int8_t *codes = sentinel(n, 1);
    for (int64_t i = 0; i < count; i++) scales[i] = fabsf(scales[i]) / 4, zeros[i] = more_noise() % 16;
    if (take(1) % 4 == 0) scales[0] = 0;
    for (int64_t i = 0; i < n; i++) group[i] = (int32_t)(more_noise() % count), columns[i] = (int32_t)(n - 1 - i);
    memcpy(left, carried, 4 * n);
    kernels->compensate_row_f32(w, carried, feedback, stride, group, columns, scales, signless ? zeros : NULL, lo, hi,
                                errors, codes, n);
    for (int64_t i = n - 1; i >= 0; i--) {
        const float scale = scales[group[i]], zero = signless ? zeros[group[i]] : 0;
        float v = w[i] != 0 && scale > 0 ? (w[i] + left[i]) / scale : 0, error;
        double rounded = copysign(floor(fabs((double)v) + 0.5), v);
        rounded = rounded < lo - zero ? lo - zero : rounded > hi - zero ? hi - zero : rounded;
        if (!(w[i] != 0 && scale > 0)) rounded = 0;
        if (codes[columns[i]] != (int)(rounded + zero)) fail("code", i);
        error = w[i] - (float)rounded * scale;
        same_floats("error", errors + i, &error, 1);
        for (int64_t j = 0; j < i; j++) left[j] += error * feedback[i * stride + j];
    }
}

static double lanes_of(const double *lane) {
    double sums[16];
    memcpy(sums, lane, sizeof sums);
    for (int half = 8; half; half /= 2)
        for (int j = 0; j < half; j++) sums[j] += sums[j + half];
    return sums[0];
}

static void statistics(void) {
    const int64_t n = length(4096);
    const float *x = finite_floats(n), *value = finite_floats(n);
    const double mean = number(NEAR_ONE);
    double sum[16] = {0}, deviation[16] = {0}, error[6][16] = {{0}}, sums[6] = {0};
    float min = 0, max = 0, low = 0, high = 0;
    for (int64_t i = 0; i < n; i++) {
        const double v = x[i], q = value[i], d = fabs(v - q), terms[5] = {d, d * d, v * v, q * q, v * q};
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        sum[i % 16] += v;
        deviation[i % 16] += (v - mean) * (v - mean);
        for (int t = 0; t < 5; t++) error[t][i % 16] += terms[t];
        error[5][0] = d > error[5][0] ? d : error[5][0];
    }
    kernels->min_max_row_f32(x, &min, &max, n);
    if (min != low || max != high) fail("range", 0);
    same_number("sum", kernels->sum_row_f32_f64(x, n), lanes_of(sum));
    same_number("deviation", kernels->square_deviation_row_f32_f64(x, mean, n), lanes_of(deviation));
    same_number("error", kernels->abs_error_row_f32_f64(x, value, n), lanes_of(error[0]));
    kernels->error_sums_row_f32_f64(x, value, sums, n);
    for (int t = 0; t < 5; t++) same_number("sums", sums[t], 0.0 + lanes_of(error[t]));
    same_number("largest error", sums[5], error[5][0]);
}

/* The histograms of a calibration: 2**16 bins in all, and for each column OCTAVE_BINS bins an octave. */
static void bins(void) {
    const int64_t n = length(600), columns = n < 70 ? n : 70;
    const float *x = finite_floats(n);
    int64_t *found = array_at(65536 * sizeof *found, 0);
    uint32_t *octaves[256], *pointers[2048], low = ~0u, expected_low = ~0u;
    uint32_t *counts = array_at(128 * 4 * columns * OCTAVE_BINS, 0);
    int32_t zeros = 0, some = 0;
    uint8_t *seen = array_at(256, 0);
    memset(found, 0, 65536 * sizeof *found);
    memset(seen, 0, 256);
    kernels->count_bins_f32(x, found, n);
    for (int64_t i = 0; i < n; i++)
        if (found[(bits_of(x[i]) & 0x7FFFFFFF) >> 15]-- == 0) fail("bin", i);
    for (int64_t b = 0; b < 65536; b++)
        if (found[b]) fail("bin", b);
    kernels->mark_octaves_row_f32(x, seen, n);
    for (int64_t i = 0; i < n; i++)
        if (!seen[(bits_of(x[i]) & 0x7FFFFFFF) >> 23]) fail("octave", i);
    kernels->min_nonzero_row_f32(x, &low, &zeros, n);
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(x[i]) & 0x7FFFFFFF;
        if (bits == 0) some = 1;
        else if (bits - 1 < expected_low) expected_low = bits - 1;
    }
    if (low != expected_low || !zeros != !some) fail("smallest", 0);
    /* Every other octave is left out. */
    memset(counts, 0, 128 * 4 * columns * OCTAVE_BINS);
    for (int e = 0; e < 256; e++)
        octaves[e] = e % 2 == 0 && seen[e] && columns ? counts + e / 2 * columns * OCTAVE_BINS : NULL;
    for (int b = 0; b < 2048; b++) pointers[b] = octaves[b >> 3] ? octaves[b >> 3] + (b & 7) : NULL;
    kernels->count_channel_bins_row_f32(x, pointers, 0, columns);
    for (int64_t i = 0; i < columns; i++) {
        const int32_t bin = (int32_t)((bits_of(x[i]) & 0x7FFFFFFF) >> 20);
        if (pointers[bin] && pointers[bin][i * OCTAVE_BINS]-- == 0) fail("channel bin", i);
    }
    for (int e = 0; e < 256; e++)
        for (int64_t i = 0; octaves[e] && i < columns * OCTAVE_BINS; i++)
            if (octaves[e][i]) fail("channel bin", i);
}

static void hadamard(void) {
    const int64_t n = (int64_t)1 << take(1) % 13;
    const float scale = (float)(1.0 / sqrt((double)n));
    float *x = moderate_floats(n, take(1)), *expected = array_at(4 * n, 0);
    memcpy(expected, x, 4 * n);
    for (int64_t half = 1; half < n; half *= 2)
        for (int64_t i = 0; i < n; i++)
            if (!(i & half)) {
                const float a = expected[i], b = expected[i + half];
                expected[i] = a + b;
                expected[i + half] = a - b;
            }
    for (int64_t i = 0; i < n; i++) expected[i] *= scale;
    kernels->hadamard_row_f32(x, n, scale);
    same_floats("transform", x, expected, n);
}

/* What a search does with scores and float vectors. */
static void search(void) {
    const int64_t n = length(200), first = take(2);
    const float *x = finite_floats(n), *y = finite_floats(n), threshold = take(1) % 4 ? number(0) : -INFINITY;
    float *scores = array(4 * n, 4), norm = fabsf(number(0));
    uint8_t *allowed = take(1) % 2 ? array(n, 1) : NULL;
    uint64_t *keys = array(8 * n, 8);
    int64_t found, expected = 0;
    double dot[16] = {0}, square[16] = {0};
    memcpy(scores, x, 4 * n);
    if (allowed)
        for (int64_t i = 0; i < n; i++) allowed[i] = more_noise() % 2;
    found = kernels->collect_above_f32(scores, threshold, (uint32_t)first, allowed, keys, n);
    for (int64_t i = 0; i < n; i++) {
        if (!(x[i] > threshold) || (allowed && !allowed[i])) continue;
        if (expected >= found || (uint32_t)keys[expected] != (uint32_t)(first + i)) fail("index", i);
        /* Keys ascend as scores descend. */
        for (int64_t j = 0; j < expected; j++)
            if ((keys[j] < keys[expected]) != (x[(uint32_t)keys[j] - first] >= x[i])) fail("order of keys", i);
        expected++;
    }
    if (found != expected) fail("number of hits", found);
    kernels->negative_distance_row_f32(scores, norm, y, n);
    for (int64_t i = 0; i < n; i++) {
        const float distance = (norm + y[i]) - 2 * x[i], negative = -(distance < 0 ? 0 : distance);
        same_floats("distance", scores + i, &negative, 1);
        dot[i % 16] += (double)x[i] * y[i];
        square[i % 16] += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
    }
    same_number("dot", kernels->dot_row_f32_f64(x, y, n), lanes_of(dot));
    same_number("square distance", kernels->square_distance_row_f32_f64(x, y, n), lanes_of(square));
}

static const struct {
    const char *name;
    void (*run)(void);
} CASES[] = {
    {"scales", scales},         {"quantize", quantize},     {"dynamic_quantize", dynamic_quantize},
    {"dequantize", dequantize}, {"dot", dot},               {"matvec", matvec},
    {"matmul", matmul},         {"matmul4", matmul4},       {"smooth", smooth},
    {"impossible", impossible}, {"widen", widen},           {"counts", counts},
    {"asymmetric", asymmetric}, {"columns", columns},       {"panels", panels},
    {"groups", groups},         {"statistics", statistics}, {"hadamard", hadamard},
    {"bins", bins},             {"between", between},       {"groups8", groups8},
    {"inner", inner},           {"compensate", compensate}, {"search", search},
};

/* ---- The two functions that the driver calls ---- */

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    PyObject *core, *isa;
    (void)argc, (void)argv;
    Py_Initialize();
    dq = dynquant_import();
    core = PyImport_ImportModule("dynquant._core");
    isa = PyImport_ImportModule("dynquant._isa");
    if (dq != NULL && core != NULL && isa != NULL) {
        /* Tables are set without asking the system for the registers of AMX. */
        PyObject *names = PyRun_String("[_table(i) for i in _core.isas_built() if i in _core.isas_supported() and "
                                       "(i != 'amx' or _core.permit_amx())]",
                                       Py_eval_input, PyModule_GetDict(isa), NULL);
        set_table = PyObject_GetAttrString(core, "set_table");
        tables = names;
    }
    if (set_table == NULL || tables == NULL) {
        PyErr_Print();
        exit(2);
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    PyObject *table, *done;
    input = data, input_size = size;
    table = PyList_GET_ITEM(tables, take(1) % PyList_GET_SIZE(tables));
    kernels = (const Kernels *)PyCapsule_GetPointer(table, "dynquant._table.Kernels");
    done = PyObject_CallFunctionObjArgs(set_table, table, NULL);
    if (done == NULL) abort();
    Py_DECREF(done);
    {
        const uint32_t chosen = take(1) % (sizeof CASES / sizeof *CASES);
        noise = take(4) | 1;
        case_name = CASES[chosen].name;
        CASES[chosen].run();
    }
    free_all();
    return 0;
}
