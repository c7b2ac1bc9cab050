/* Exact integer matrix products on AVX2: several designs of one kernel, side by side.

       gcc -O3 -fno-tree-pre -march=x86-64-v3 -o avx2_designs bench/avx2_designs.c && ./avx2_designs

   y (M, N) = x (M, K) in [-127, 127] times w (N, K), int8 or codes of 4 bits, as int32. Every design reads packed
   weights, panels of 16 outputs, with tiles of at most 4 rows and 2 vectors. Every result is compared with an
   int64 product. Here N is a multiple of 16, and K of 8, at most 2**16. README.md says what came out.

   The clock is the thread's own: while another program runs it stands still. The designs take turns, and each
   round starts with another one. Without -fno-tree-pre gcc 12 moves additions of these loops to the next turn,
   which needs more registers than there are; the loops of the package, with their own ends, it leaves alone. */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PANEL = 16, TOKENS = 16, ROUNDS = 41 };
typedef __m256i V;

static V load(const void* p) { return _mm256_loadu_si256((const V*)p); }
static V spread(const void* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
static V pairs(V sum, V p) { return _mm256_add_epi32(sum, _mm256_madd_epi16(p, _mm256_set1_epi16(1))); }

/* ---- The designs: what a load of weights (half j of its codes), a load of activations, and a step are ---- */

/* a: both operands int16; no product is out of range. */
typedef V wide_w, wide_x;
static V wide_load(const uint8_t* w, int j) {
    return (void)j, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
}
#define wide_spread spread
static V wide_step(V sum, V w, V x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
static void wide_end(V* sum, V part) { *sum = part; }

/* b: |x| times w with the sign of x. A pair is at most 2 * 127 * 127 = 32,258, but -128 has no negative. */
typedef V signw_w;
typedef struct { V x, magnitude; } signw_x;
static V signw_load(const uint8_t* w, int j) { return (void)j, load(w); }
static signw_x signw_spread(const uint8_t* x) { return (signw_x){spread(x), spread(x + 4)}; }
static V signw_step(V sum, V w, signw_x x) {
    return pairs(sum, _mm256_maddubs_epi16(x.magnitude, _mm256_sign_epi8(w, x.x)));
}
#define signw_end wide_end

/* b': |w| times x with the sign of w. x is never -128: a pair is at most 2 * 128 * 127 = 32,512. */
typedef struct { V w, magnitude; } signx_w;
typedef V signx_x;
static signx_w signx_load(const uint8_t* w, int j) {
    const V v = load(w);
    return (void)j, (signx_w){v, _mm256_abs_epi8(v)};
}
#define signx_spread spread
static V signx_step(V sum, signx_w w, V x) {
    return pairs(sum, _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.w)));
}
#define signx_end wide_end

/* b' for activations of design b, x and |x| in turn: its path for -128. */
typedef signx_w least_w;
typedef V least_x;
#define least_load signx_load
#define least_spread spread
#define least_step signx_step
#define least_end wide_end

/* b' for activations of design c: its path for few rows, and for panels with too many residuals. */
typedef signx_w back_w;
typedef V back_x;
#define back_load signx_load
static V back_spread(const uint8_t* x) { return _mm256_xor_si256(spread(x), _mm256_set1_epi8((char)0x80)); }
#define back_step signx_step
#define back_end wide_end

/* c: x + 128, at most 255, times w. 255 * 128 = 32,640, so that the positive weights of a pair are trimmed to
   128 together, and the negative ones to -128. */
typedef V shift_w, shift_x;
#define shift_load signw_load
#define shift_spread spread
static V shift_step(V sum, V w, V x) { return pairs(sum, _mm256_maddubs_epi16(x, w)); }
#define shift_end wide_end

/* c4: two pairs are added before they are widened, so that four weights are trimmed together. */
typedef struct { V k0, k1; } shift4_w, shift4_x;
static shift4_w shift4_load(const uint8_t* w, int j) { return (void)j, (shift4_w){load(w), load(w + 64)}; }
static shift4_x shift4_spread(const uint8_t* x) { return (shift4_x){spread(x), spread(x + 4)}; }
static V shift4_step(V sum, shift4_w w, shift4_x x) {
    return pairs(sum, _mm256_add_epi16(_mm256_maddubs_epi16(x.k0, w.k0), _mm256_maddubs_epi16(x.k1, w.k1)));
}
#define shift4_end wide_end

/* d: x + 128 = 16 * high + low, a row of 4-bit codes each. A pair is at most 2 * 15 * 128 = 3,840, and eight of
   them fit int16. */
typedef V split_w, split_x;
#define split_load signw_load
#define split_spread spread
static V split_step(V part, V w, V x) { return _mm256_add_epi16(part, _mm256_maddubs_epi16(x, w)); }
static void split_end(V* sum, V part) {
    __asm__("" : "+x"(part));
    *sum = pairs(*sum, part);
}

/* 4 bits: a pair is at most 2 * 15 * 127 = 3,810, and eight of them fit int16. */
typedef struct { V even, odd; } codes_w, codes_x;
static codes_w codes_load(const uint8_t* w, int j) {
    const V v = load(w), low = _mm256_set1_epi8(0x0F);
    return (void)j, (codes_w){_mm256_and_si256(v, low), _mm256_and_si256(_mm256_srli_epi16(v, 4), low)};
}
static codes_x codes_spread(const uint8_t* x) { return (codes_x){spread(x), spread(x + 4)}; }
static V codes_step(V part, codes_w w, codes_x x) {
    part = _mm256_add_epi16(part, _mm256_maddubs_epi16(w.even, x.even));
    return _mm256_add_epi16(part, _mm256_maddubs_epi16(w.odd, x.odd));
}
#define codes_end split_end

/* 4 bits, made int16: four codes in each int16, taken out one after the other. */
typedef V widen4_w, widen4_x;
static V widen4_load(const uint8_t* w, int j) {
    return _mm256_and_si256(_mm256_srli_epi16(load(w), 4 * j), _mm256_set1_epi16(0x0F));
}
#define widen4_spread spread
#define widen4_step wide_step
#define widen4_end wide_end

/* ---- The tile. sums (rows, PANEL) += weights times rows of activations: STEP bytes of weights at a time, the
   second 8 outputs `W` after the first, taken in SUB parts with A bytes of activations each. After RUN steps the
   parts are added to the sums. They have names: those of an array gcc writes to memory. ---- */
#define ONE(F, D) F(D, 0)
#define TWO(F, D) F(D, 0) F(D, 1)
#define FOUR(F, D) F(D, 0) F(D, 1) F(D, 2) F(D, 3)
#define ROW(D, r) const uint8_t* x##r = x + r * stride;
#define PART(D, r) V p##r##0 = _mm256_setzero_si256(), p##r##1 = p##r##0;
#define ADD(D, r)                       \
    v = D##_spread(x##r + at);          \
    p##r##0 = D##_step(p##r##0, w0, v); \
    p##r##1 = D##_step(p##r##1, w1, v);
#define END(D, r)                             \
    D##_end((V*)(sums + PANEL * r), p##r##0); \
    D##_end((V*)(sums + PANEL * r + 8), p##r##1);
#define TILE(D, ROWS, NAME, W, STEP, A, SUB, RUN)                                                             \
    static void NAME(const uint8_t* w, const uint8_t* x, size_t stride, int32_t* sums, int steps) {           \
        size_t at = 0;                                                                                        \
        ROWS(ROW, D)                                                                                          \
        do {                                                                                                  \
            const int run = !RUN || steps < RUN ? steps : RUN;                                                \
            ROWS(PART, D)                                                                                     \
            _Pragma("GCC unroll 1")                                                                           \
            for (int i = 0; i < run; i++, w += STEP)                                                          \
                _Pragma("GCC unroll 1") for (int j = 0; j < SUB; j++, at += A) {                                                      \
                    const D##_w w0 = D##_load(w, j), w1 = D##_load(w + W, j);                                 \
                    D##_x v;                                                                                  \
                    ROWS(ADD, D)                                                                              \
                }                                                                                             \
            ROWS(END, D)                                                                                      \
            steps -= run;                                                                                     \
        } while (RUN && steps > 0);                                                                           \
    }
#define TILES(D, ...)              \
    TILE(D, ONE, D##_1, __VA_ARGS__) \
    TILE(D, TWO, D##_2, __VA_ARGS__) \
    TILE(D, FOUR, D##_4, __VA_ARGS__)
TILES(wide, 16, 32, 4, 1, 0)
TILES(signw, 32, 64, 8, 1, 0)
TILES(signx, 32, 64, 4, 1, 0)
TILES(least, 32, 64, 8, 1, 0)
TILES(back, 32, 64, 4, 1, 0)
TILES(shift, 32, 64, 4, 1, 0)
TILES(shift4, 32, 128, 8, 1, 0)
TILES(split, 32, 64, 4, 1, 8)
TILES(codes, 32, 64, 8, 1, 4)
TILES(widen4, 32, 64, 4, 4, 0)

typedef void tile_fn(const uint8_t*, const uint8_t*, size_t, int32_t*, int);
typedef enum { INT16, BYTES, MAGNITUDES, SHIFTED, HALVES, EVEN_ODD } form;
typedef struct {
    const char* name;
    tile_fn* tile[3];      /* of 1, 2 and 4 rows */
    int bits, depth, step; /* of a weight; k of one output next to each other; k of a step */
    form x;                /* of activations */
    int trim;              /* so many weights share a limit */
    tile_fn* other[3];     /* for what `tile` cannot do, 4 k a step */
} design;
#define OF(D) {D##_1, D##_2, D##_4}
static const design DESIGNS[] = {
    {"a   int16", OF(wide), 8, 2, 2, INT16, 0, {0}},
    {"b   |x|, sign(w, x)", OF(signw), 8, 4, 4, MAGNITUDES, 0, OF(least)},
    {"b'  |w|, sign(x, w)", OF(signx), 8, 4, 4, BYTES, 0, {0}},
    {"c   x + 128, pairs", OF(shift), 8, 4, 4, SHIFTED, 2, OF(back)},
    {"c4  x + 128, fours", OF(shift4), 8, 4, 8, SHIFTED, 4, OF(back)},
    {"d   nibbles of x", OF(split), 8, 4, 4, HALVES, 0, {0}},
    {"u4  int16 sums", OF(codes), 4, 8, 8, EVEN_ODD, 0, {0}},
    {"u4  made int16", OF(widen4), 4, 8, 8, INT16, 0, {0}},
};
enum { COUNT = sizeof DESIGNS / sizeof *DESIGNS };

/* ---- Packing ---- */
typedef struct { uint16_t k[2]; int16_t r[2]; } residuals; /* what was trimmed from two weights of one output */
typedef struct {
    const int8_t* w;
    int n, k;
    uint8_t *panels, *other; /* untrimmed; for each panel, whether it takes the other tile */
    int32_t *excess, *from;  /* from (N + 1,): where the residuals of each output start */
    residuals* list;
} weights;
typedef struct {
    const int8_t* x;
    int m, k, parts; /* parts: rows for each row of x */
    size_t stride, per_k;
    uint8_t* rows;
    int16_t* columns; /* (M / TOKENS, K, TOKENS), for the residuals */
} activations;

static void* room(size_t n) {
    void* p = aligned_alloc(64, (n + 127) / 64 * 64);
    if (!p) abort();
    return memset(p, 0, (n + 127) / 64 * 64);
}

/* Of n weights those with this sign give way, the largest first, until their sum is at most 128. */
static void trim(int8_t* const w[], int n, int sign) {
    for (;;) {
        int sum = 0, most = 0;
        for (int i = 0; i < n; i++) {
            if (sign * *w[i] > 0) sum += sign * *w[i];
            if (sign * *w[i] > sign * *w[most]) most = i;
        }
        if (sum <= 128) return;
        const int left = sign * *w[most] - (sum - 128);
        *w[most] = (int8_t)(left > 0 ? sign * left : 0);
    }
}
static size_t place(const design* d, int c, int k) { /* of a weight in its panel, in bits */
    const int j = k % d->depth, at = d->bits == 4 && d->x == INT16 ? j % 2 * 16 + j / 2 * 4 : j * d->bits;
    return ((size_t)(k - j) * PANEL + c * d->depth) * d->bits + at;
}
/* Row c of a panel; returns the end of its residuals. */
static residuals* pack_row(const design* d, const int8_t* w, int8_t* trimmed, int k, uint8_t* panel, int c,
                           residuals* list, int32_t* excess) {
    int sum = 0, count = 0;
    memcpy(trimmed, w, k);
    for (int i = 0; d->trim && i < k; i += d->step)
        for (int j = 0; j < 4; j += 2) {
            int8_t* const group[] = {trimmed + i + j, trimmed + i + j + 1, trimmed + i + j + 4, trimmed + i + j + 5};
            trim(group, d->trim, 1), trim(group, d->trim, -1);
        }
    for (int i = 0; i < k; i++) {
        const size_t bit = place(d, c, i);
        panel[bit / 8] |= (uint8_t)((uint8_t)w[i] << bit % 8);
        sum += trimmed[i];
        if (trimmed[i] == w[i]) continue;
        list[count / 2].k[count % 2] = (uint16_t)i;
        list[count / 2].r[count % 2] = (int16_t)(w[i] - trimmed[i]);
        if (count++ % 2 == 0) list[count / 2].k[1] = list[count / 2].r[1] = 0;
    }
    *excess = d->x == SHIFTED || d->x == HALVES ? 128 * sum : 0;
    return list + (count + 1) / 2;
}
static weights pack_weights(const design* d, const int8_t* w, int n, int k) {
    weights o = {w, n, k, room((size_t)n * k * d->bits / 8), room(n), room(4 * n), room(4 * n + 4), 0};
    residuals *end = o.list = room(d->trim ? (size_t)n * k * sizeof *o.list : 1);
    int8_t* trimmed = room(k);
    for (int r = 0; r < n; r++) {
        const int p = r / PANEL, c = r % PANEL;
        end = pack_row(d, w + (size_t)r * k, trimmed, k, o.panels + (size_t)p * PANEL * k * d->bits / 8, c, end,
                       o.excess + r);
        if (d->x == MAGNITUDES && memchr(w + (size_t)r * k, -128, k)) o.other[p] = 1;
        o.from[r + 1] = (int32_t)(end - o.list);
        /* With a residual in less than 12 weights the lists take longer than the signs. */
        if (c == PANEL - 1 && end - o.list - o.from[r - c] > PANEL * k / 24) {
            o.other[p] = 1;
            end = o.list + o.from[r - c];
            for (int i = r - c; i <= r; i++) o.from[i + 1] = o.from[i];
        }
    }
    free(trimmed);
    return o;
}
static double bytes_per_weight(const design* d, const weights* w) {
    const size_t more = 4 * w->n * ((d->x == SHIFTED || d->x == HALVES) + !!d->trim);
    return d->bits / 8.0 + (double)(more + w->from[w->n] * sizeof *w->list) / w->n / w->k;
}

static activations pack_activations(const design* d, const int8_t* x, int m, int k) {
    activations o = {x, m, k, d->x == HALVES ? 2 : 1, 0, d->x == INT16 || d->x == MAGNITUDES ? 2 : 1, 0, 0};
    o.stride = (k * o.per_k / 64 | 1) * 64; /* an odd number of cache lines */
    if (o.stride < k * o.per_k) o.stride += 128;
    o.rows = room(m * o.parts * o.stride);
    for (int r = 0; r < m; r++) {
        uint8_t *row = o.rows + r * o.parts * o.stride, *low = row + o.stride;
        for (int i = 0; i < k; i++) {
            const int8_t v = x[(size_t)r * k + i];
            const uint8_t shifted = (uint8_t)(v + 128);
            if (d->x == INT16) ((int16_t*)row)[i] = v;
            else if (d->x == BYTES) row[i] = (uint8_t)v;
            else if (d->x == SHIFTED) row[i] = shifted;
            else if (d->x == HALVES) row[i] = shifted >> 4, low[i] = shifted & 15;
            else if (d->x == EVEN_ODD) row[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = (uint8_t)v;
            else row[i / 4 * 8 + i % 4] = (uint8_t)v, row[i / 4 * 8 + 4 + i % 4] = (uint8_t)abs(v);
        }
    }
    if (!d->trim || m < TOKENS) return o;
    /* Tokens in the order in which vpunpcklwd and vpunpckhwd leave 0..7 and 8..15. */
    o.columns = room((size_t)(m + TOKENS - 1) / TOKENS * TOKENS * k * 2);
    for (int r = 0; r < m; r++)
        for (int i = 0, t = r % TOKENS; i < k; i++)
            o.columns[(size_t)(r - t) * k + i * TOKENS + (t & 3) + (t & 4) * 2 + (t & 8) / 2] = x[(size_t)r * k + i];
    return o;
}

/* ---- The product ---- */

/* out[t][c] += v[c][t] for 8 outputs c and `rows` tokens t. */
static void add_transposed(V v[8], int32_t* out, int n, int rows) {
    V u[8];
    for (int i = 0; i < 8; i += 2) {
        u[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        u[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i++) {
        const V a = u[i / 4 * 4 + i % 4 / 2], b = u[i / 4 * 4 + i % 4 / 2 + 2];
        v[i] = i % 2 ? _mm256_unpackhi_epi64(a, b) : _mm256_unpacklo_epi64(a, b);
    }
    for (int t = 0; t < 8; t++) {
        V *o = (V*)(out + (size_t)t * n), a = v[t % 4], b = v[t % 4 + 4];
        a = t < 4 ? _mm256_permute2x128_si256(a, b, 0x20) : _mm256_permute2x128_si256(a, b, 0x31);
        if (t < rows) _mm256_storeu_si256(o, _mm256_add_epi32(load(o), a));
    }
}
/* The residuals of outputs c..c + 7 times 16 tokens: two residuals and 8 tokens a multiply-add. */
static void correct(const weights* w, const int16_t* columns, int c, int32_t* out, int rows) {
    V low[8], high[8];
    for (int j = 0; j < 8; j++) {
        V s0 = _mm256_setzero_si256(), s1 = s0;
        for (const residuals *e = w->list + w->from[c + j], *end = w->list + w->from[c + j + 1]; e < end; e++) {
            const V k0 = load(columns + e->k[0] * TOKENS), k1 = load(columns + e->k[1] * TOKENS), r = spread(e->r);
            s0 = wide_step(s0, _mm256_unpacklo_epi16(k0, k1), r);
            s1 = wide_step(s1, _mm256_unpackhi_epi16(k0, k1), r);
        }
        low[j] = s0, high[j] = s1;
    }
    add_transposed(low, out + c, w->n, rows);
    add_transposed(high, out + (size_t)8 * w->n + c, w->n, rows - 8);
}
static void times_panel(tile_fn* const tile[3], const uint8_t* panel, const int32_t* excess, const activations* x,
                        int steps, int32_t* out, int n) {
    _Alignas(32) int32_t sums[4 * PANEL];
    for (int r = 0, rows; r < x->m * x->parts; r += rows) {
        const int left = x->m * x->parts - r;
        rows = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        memset(sums, 0, sizeof sums);
        tile[rows / 2](panel, x->rows + r * x->stride, x->stride, sums, steps);
        for (int i = 0; i < rows; i += x->parts) {
            int32_t *s = sums + i * PANEL, *y = out + (size_t)((r + i) / x->parts) * n;
            if (x->parts == 2)
                for (int c = 0; c < PANEL; c++) s[c] = 16 * s[c] + s[PANEL + c];
            for (int c = 0; c < PANEL; c++) y[c] = s[c] - excess[c];
        }
    }
}
static void product(const design* d, const weights* w, const activations* x, int32_t* out) {
    static _Alignas(64) uint8_t trimmed[PANEL << 16];
    static const int32_t none[PANEL];
    const size_t bytes = (size_t)PANEL * w->k * d->bits / 8;
    for (int c = 0; c < w->n; c += PANEL) {
        const uint8_t* panel = w->panels + c / PANEL * bytes;
        if (w->other[c / PANEL] || (d->trim && x->m < TOKENS)) {
            times_panel(d->other, panel, none, x, w->k / 4, out + c, w->n);
            continue;
        }
        if (d->trim) memcpy(trimmed, panel, bytes), panel = trimmed;
        for (int j = c; j < c + PANEL; j++)
            for (const residuals *e = w->list + w->from[j], *end = w->list + w->from[j + 1]; e < end; e++)
                for (int i = 0; i < 2; i++)
                    trimmed[(e->k[i] / 4 * PANEL + j - c) * 4 + e->k[i] % 4] -= (uint8_t)e->r[i];
        times_panel(d->tile, panel, w->excess + c, x, w->k / d->step, out + c, w->n);
        for (int r = 0; w->from[c + PANEL] > w->from[c] && r < x->m; r += TOKENS)
            for (int half = c; half < c + PANEL; half += 8)
                correct(w, x->columns + (size_t)r * x->k, half, out + (size_t)r * w->n, x->m - r);
    }
}

/* ---- Weights and activations, the check, the clock ---- */
enum { NORMAL, UNIFORM, MOST, LEAST, ALTERNATE, PAIRS, KINDS };
static int uniform(int n) {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (int)((state >> 32) % (uint64_t)n);
}
/* NORMAL: each row scaled by its own largest magnitude, as in practice. */
static void fill_weights(int8_t* w, int n, int k, int kind, int bits) {
    int* row = room(4 * k);
    for (int r = 0; r < n; r++) {
        int most = 1;
        for (int i = 0; i < k; i++) {
            row[i] = 0;
            for (int j = 0; j < 24; j++) row[i] += uniform(1 << 20) - (1 << 19);
            if (abs(row[i]) > most) most = abs(row[i]);
        }
        for (int i = 0; i < k; i++) {
            const int kinds[] = {(int)(row[i] * 127.0 / most), uniform(256) - 128,       127, -128,
                                 (i + r) % 2 ? 127 : -128,     i / 2 % 2 ? 127 : -128};
            w[(size_t)r * k + i] = (int8_t)(bits == 8 ? kinds[kind] : (kinds[kind] + 128) / 16);
        }
    }
    free(row);
}
static void fill_activations(int8_t* x, int m, int k, int kind) {
    for (int i = 0; i < m * k; i++) {
        const int kinds[] = {uniform(255) - 127, uniform(2) ? 127 : -127, i / k % 2 ? 127 : -127};
        x[i] = (int8_t)kinds[kind];
    }
}
static void check(const design* d, const weights* w, const activations* x) {
    int32_t* out = room((size_t)4 * x->m * w->n);
    product(d, w, x, out);
    for (int r = 0; r < x->m; r++)
        for (int c = 0; c < w->n; c++) {
            int64_t sum = 0;
            for (int i = 0; i < w->k; i++) sum += w->w[(size_t)c * w->k + i] * x->x[(size_t)r * w->k + i];
            if (sum == out[(size_t)r * w->n + c]) continue;
            printf("WRONG: %s, row %d of %d, output %d of %d\n", d->name, r, x->m, c, w->n);
            exit(1);
        }
    free(out);
}
static void free_all(weights* w, activations* x) {
    free(w->panels), free(w->other), free(w->excess), free(w->from), free(w->list);
    free(x->rows), free(x->columns);
}
static void check_all(void) {
    enum { N = 48, K = 1096, M = 35 };
    int8_t *w = room(N * K), *x = room(M * K);
    for (int kind = 0; kind < 3 * KINDS; kind++)
        for (const design* d = DESIGNS; d < DESIGNS + COUNT; d++) {
            fill_weights(w, N, K, kind / 3, d->bits);
            weights ws = pack_weights(d, w, N, K);
            for (int m = 1; m <= M; m++) {
                fill_activations(x, m, K, kind % 3);
                activations xs = pack_activations(d, x, m, K);
                check(d, &ws, &xs);
                if (m == M) free_all(&ws, &xs);
                else free(xs.rows), free(xs.columns);
            }
        }
    printf("%d products exact\n", 3 * KINDS * COUNT * M);
    free(w), free(x);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static int ascending(const void* a, const void* b) {
    return (*(const double*)a > *(const double*)b) - (*(const double*)a < *(const double*)b);
}
static double median(double* v) {
    qsort(v, ROUNDS, sizeof *v, ascending);
    return v[ROUNDS / 2];
}

/* 1,000,000 times these instructions, each independent of the nine before. ymm0: ten sums; ymm14, 15: scratch */
#define TEN(F) F("0") F("1") F("2") F("3") F("4") F("5") F("6") F("7") F("8") F("9")
#define PEAK(NAME, F)                                                                                         \
    for (double best = 1, round = 0; round < 100; round++) {                                                  \
        const double start = now();                                                                           \
        for (int i = 0; i < 100000; i++)                                                                      \
            __asm__ volatile(TEN(F)::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",        \
                             "xmm8", "xmm9", "xmm14", "xmm15");                                               \
        if (now() - start < best) best = now() - start;                                                       \
        if (round == 99) printf("  %-40s %5.2f G/s\n", NAME, 1e-3 / best);                                    \
    }
#define CHAIN(a) "vpaddd %%ymm0, %%ymm0, %%ymm0\n"
#define MADD(a) "vpmaddwd %%ymm15, %%ymm15, %%ymm" a "\n"
#define MADDUBS(a) "vpmaddubsw %%ymm15, %%ymm15, %%ymm" a "\n"
#define SUM_MADD(a) "vpmaddwd %%ymm15, %%ymm15, %%ymm14\nvpaddd %%ymm14, %%ymm" a ", %%ymm" a "\n"
#define SUM_MADDUBS(a)                                                                                        \
    "vpmaddubsw %%ymm15, %%ymm15, %%ymm14\nvpmaddwd %%ymm14, %%ymm15, %%ymm14\n"                              \
    "vpaddd %%ymm14, %%ymm" a ", %%ymm" a "\n"
static void peaks(void) {
    printf("Peaks; vpmaddwd multiplies 16 pairs, vpmaddubsw 32:\n");
    PEAK("vpaddd, each needing the last (clock)", CHAIN)
    PEAK("vpmaddwd", MADD)
    PEAK("vpmaddubsw", MADDUBS)
    PEAK("vpmaddwd + vpaddd", SUM_MADD)
    PEAK("vpmaddubsw + vpmaddwd + vpaddd", SUM_MADDUBS)
}

/* G multiply-adds/s, and how many times those of the first design in the same round. */
static void measure(int bits, int m, int n, int k) {
    static double rate[COUNT][ROUNDS], ratio[COUNT][ROUNDS], packing[COUNT][2];
    weights ws[COUNT];
    activations xs[COUNT];
    int first = 0, last, repeats = 1;
    while (DESIGNS[first].bits != bits) first++;
    for (last = first; last < COUNT && DESIGNS[last].bits == bits;) last++;
    int8_t *w = room((size_t)n * k), *x = room((size_t)m * k);
    int32_t* out = room((size_t)m * n * 4);
    fill_weights(w, n, k, NORMAL, bits), fill_activations(x, m, k, 0);
    for (int d = first; d < last; d++) {
        const double start = now();
        ws[d] = pack_weights(DESIGNS + d, w, n, k), packing[d][0] = now() - start;
        xs[d] = pack_activations(DESIGNS + d, x, m, k), packing[d][1] = now() - start - packing[d][0];
        check(DESIGNS + d, ws + d, xs + d);
    }
    while ((double)repeats * m * n * k < 1e8) repeats *= 2;
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = first; i < last; i++) {
            const int d = first + (i - first + round) % (last - first);
            const double start = now();
            for (int j = 0; j < repeats; j++) product(DESIGNS + d, ws + d, xs + d, out);
            rate[d][round] = 1e-9 * repeats * m * n * k / (now() - start);
        }
        for (int d = first; d < last; d++) ratio[d][round] = rate[d][round] / rate[first][round];
    }
    printf("\nM %3d, N %4d, K %4d     median   best  ratio  bytes/weight  packing w, x (ns each)\n", m, n, k);
    for (int d = first; d < last; d++) {
        const double middle = median(rate[d]);
        printf("  %-20s %8.1f %6.1f  %5.2f  %12.3f  %9.2f %6.2f\n", DESIGNS[d].name, middle, rate[d][ROUNDS - 1],
               median(ratio[d]), bytes_per_weight(DESIGNS + d, ws + d), 1e9 * packing[d][0] / n / k,
               1e9 * packing[d][1] / m / k);
        free_all(ws + d, xs + d);
    }
    free(w), free(x), free(out);
}

int main(void) {
    check_all();
    peaks();
    for (int bits = 8; bits >= 4; bits -= 4)
        for (int k = 1024; k <= 4096; k *= 4) {
            measure(bits, 1, 4096 * 8 / bits, k); /* 4 and 16 MiB of weights */
            measure(bits, 16, 512 * 1024 / k, k); /* at most 512 KiB */
            measure(bits, 128, 512 * 1024 / k, k);
        }
    return 0;
}
