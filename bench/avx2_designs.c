/* Exact integer matrix products on AVX2: several designs of one kernel, side by side.

       gcc -O3 -march=x86-64-v3 -o avx2_designs bench/avx2_designs.c && ./avx2_designs

   y (M, N) = x (M, K) in [-127, 127] times w (N, K), int8 or codes of 4 bits, as int32. Every design reads
   packed weights, panels of 16 outputs, with tiles of at most 4 rows and 2 vectors. Every result is compared
   with an int64 product. Here N is a multiple of 16, and K of 8, at most 2**16. README.md says what came out.

   The clock is the thread's own: while another program runs it stands still. The designs take turns, and each
   round starts with another one. */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PANEL = 16, TOKENS = 16, ROUNDS = 41, ARENA = 1 << 29 };
typedef __m256i V;

static V load(const void* p) { return _mm256_loadu_si256((const V*)p); }
static V spread(const void* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
static V pairs(V sum, V p) { return _mm256_add_epi32(sum, _mm256_madd_epi16(p, _mm256_set1_epi16(1))); }

/* ---- The designs: what a load of weights, a load of activations, a step and the end of its sums are. Only
   widen4 takes what it loads in several parts, j. ---- */

/* a: both operands int16; no product is out of range. */
typedef V wide_w, wide_x;
static V wide_load(const uint8_t* w, int j) {
    return (void)j, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
}
#define wide_spread spread
static V wide_step(V sum, V w, V x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
static void wide_end(V* sum, V part) { *sum = part; }

/* b: |w| times x with the sign of w, x never being -128. A pair is at most 2 * 128 * 127 = 32,512. The other
   way round, |x| times w with the sign of x, a weight of -128 needs a path of its own: it has no negative. */
typedef struct { V w, magnitude; } sign_w;
typedef V sign_x;
static sign_w sign_load(const uint8_t* w, int j) {
    const V v = load(w);
    return (void)j, (sign_w){v, _mm256_abs_epi8(v)};
}
#define sign_spread spread
static V sign_step(V sum, sign_w w, V x) {
    return pairs(sum, _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.w)));
}
#define sign_end wide_end

/* b for activations of design c: its path for few rows, and for panels with too many residuals. */
typedef sign_w back_w;
typedef V back_x;
#define back_load sign_load
static V back_spread(const uint8_t* x) { return _mm256_xor_si256(spread(x), _mm256_set1_epi8((char)0x80)); }
#define back_step sign_step
#define back_end wide_end

/* c: x + 128, at most 255, times w. 255 * 128 = 32,640, so that the positive weights of a pair are trimmed to
   128 together, and the negative ones to -128. */
typedef V shift_w, shift_x;
static V shift_load(const uint8_t* w, int j) { return (void)j, load(w); }
#define shift_spread spread
static V shift_step(V sum, V w, V x) { return pairs(sum, _mm256_maddubs_epi16(x, w)); }
#define shift_end wide_end

/* d: x + 128 = 16 * high + low, a row of 4-bit codes each. A pair is at most 2 * 15 * 128 = 3,840, and eight
   of them fit int16. */
typedef V split_w, split_x;
#define split_load shift_load
#define split_spread spread
static V split_step(V part, V w, V x) { return _mm256_add_epi16(part, _mm256_maddubs_epi16(x, w)); }
static void split_end(V* sum, V part) {
    __asm__("" : "+x"(part)); /* or gcc 12 moves the last addition of a run to here, and the tile spills */
    *sum = pairs(*sum, part);
}

/* e: of two neighbours w + 128 and 127 - w, times x and -x, in which what has one sign is trimmed to 128: a
   pair is at most 255 * 128. What was trimmed is a step more of that row. */
typedef V raise_w, raise_x;
#define raise_load shift_load
#define raise_spread spread
static V raise_step(V sum, V w, V x) { return pairs(sum, _mm256_maddubs_epi16(w, x)); }
#define raise_end wide_end

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

/* ---- The tile. sums (rows, PANEL), zero at first, = weights times rows of activations. A step takes STEP
   bytes of weights, the second 8 outputs W bytes after the first, in SUB parts with A bytes of activations
   each. A part goes to its sum after RUN steps, or at the end where RUN is 0. Parts have names: those of an
   array gcc writes to memory. ---- */
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
#define TILE(D, ROWS, NAME, W, STEP, A, SUB, RUN)                                                            \
    static void NAME(const uint8_t* w, const uint8_t* x, size_t stride, int32_t* sums, int steps) {          \
        size_t at = 0;                                                                                       \
        ROWS(ROW, D)                                                                                         \
        do {                                                                                                 \
            const int run = !RUN || steps < RUN ? steps : RUN;                                               \
            ROWS(PART, D)                                                                                    \
            _Pragma("GCC unroll 1")                                                                          \
            for (int i = 0; i < run; i++, w += STEP)                                                         \
                _Pragma("GCC unroll 1") for (int j = 0; j < SUB; j++, at += A) {                             \
                    const D##_w w0 = D##_load(w, j), w1 = D##_load(w + W, j);                                \
                    D##_x v;                                                                                 \
                    ROWS(ADD, D)                                                                             \
                }                                                                                            \
            ROWS(END, D)                                                                                     \
            steps -= run;                                                                                    \
        } while (RUN && steps > 0);                                                                          \
    }
#define TILES(D, ...)              \
    TILE(D, ONE, D##_1, __VA_ARGS__) \
    TILE(D, TWO, D##_2, __VA_ARGS__) \
    TILE(D, FOUR, D##_4, __VA_ARGS__)
TILES(wide, 16, 32, 4, 1, 0)
TILES(sign, 32, 64, 4, 1, 0)
TILES(back, 32, 64, 4, 1, 0)
TILES(shift, 32, 64, 4, 1, 0)
TILES(split, 32, 64, 4, 1, 8)
TILES(raise, 32, 64, 4, 1, 0)
TILES(codes, 32, 64, 8, 1, 4)
TILES(widen4, 32, 64, 4, 4, 0)

typedef void tile_fn(const uint8_t*, const uint8_t*, size_t, int32_t*, int);
typedef enum { INT16, BYTES, SHIFTED, HALVES, TRIMMED, EVEN_ODD } form;
typedef struct {
    const char* name;
    tile_fn* tile[3];  /* of 1, 2 and 4 rows */
    int bits, depth;   /* of a weight; k of one output next to each other, which are a step */
    form x;            /* of activations */
    tile_fn* other[3]; /* SHIFTED: for what `tile` cannot do */
} design;
#define OF(D) {D##_1, D##_2, D##_4}
static const design DESIGNS[] = {
    {"a   int16", OF(wide), 8, 2, INT16, {0}},
    {"b   |w|, sign(x, w)", OF(sign), 8, 4, BYTES, {0}},
    {"c   x + 128, residuals", OF(shift), 8, 4, SHIFTED, OF(back)},
    {"d   nibbles of x", OF(split), 8, 4, HALVES, {0}},
    {"e   trimmed x", OF(raise), 8, 4, TRIMMED, {0}},
    {"u4  int16 sums", OF(codes), 4, 8, EVEN_ODD, {0}},
    {"u4  made int16", OF(widen4), 4, 8, INT16, {0}},
};
enum { COUNT = sizeof DESIGNS / sizeof *DESIGNS };

/* ---- Packing. Memory is taken from an arena, and given back all at once. ---- */
typedef struct { uint16_t k[2]; int16_t r[2]; } residuals; /* trimmed from two weights of one output */
typedef struct { int32_t step; int8_t x[4]; } rest;       /* trimmed from four activations of one row */
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
    size_t stride;
    uint8_t* rows;
    int16_t* columns; /* (M / TOKENS, K, TOKENS), for the residuals */
    int32_t* excess;  /* (M,), and rests of each row: TRIMMED alone */
    rest** rests;
    int* count;
} activations;

static size_t used;
static void* room(size_t n) {
    static uint8_t* arena;
    if (!arena && !(arena = aligned_alloc(64, ARENA))) abort();
    void* p = arena + used;
    used += (n + 127) / 64 * 64;
    if (used > ARENA) abort();
    return memset(p, 0, n);
}

/* The larger of two weights with the same sign gives way until their sum is 128 or -128. */
static void trim(int8_t* w) {
    const int sum = w[0] + w[1], larger = abs(w[1]) > abs(w[0]);
    if ((w[0] < 0) != (w[1] < 0) || abs(sum) <= 128) return;
    w[larger] = (int8_t)(w[larger] - (sum > 0 ? sum - 128 : sum + 128));
}
static size_t place(const design* d, int c, int k) { /* of a weight in its panel, in bits */
    const int j = k % d->depth, at = d->bits == 4 && d->x == INT16 ? j % 2 * 16 + j / 2 * 4 : j * d->bits;
    return ((size_t)(k - j) * PANEL + c * d->depth) * d->bits + at;
}
/* Row c of a panel; returns the end of its residuals. */
static residuals* pack_row(const design* d, const int8_t* w, int k, uint8_t* panel, int c, residuals* list,
                           int32_t* excess) {
    int sum = 0, count = 0;
    for (int i = 0; i < k; i++) {
        int8_t pair[] = {w[i & ~1], w[i | 1]};
        if (d->x == SHIFTED) trim(pair);
        const size_t bit = place(d, c, i);
        const int raised = d->x != TRIMMED ? w[i] : i % 2 ? w[i] ^ 0x7F : w[i] ^ 0x80;
        panel[bit / 8] |= (uint8_t)((uint8_t)raised << bit % 8);
        sum += pair[i & 1];
        if (pair[i & 1] == w[i]) continue;
        list[count / 2].k[count % 2] = (uint16_t)i;
        list[count / 2].r[count % 2] = (int16_t)(w[i] - pair[i & 1]);
        count++;
    }
    *excess = d->x == SHIFTED || d->x == HALVES ? 128 * sum : 0;
    return list + (count + 1) / 2;
}
static weights pack_weights(const design* d, const int8_t* w, int n, int k) {
    weights o = {w, n, k, room((size_t)n * k * d->bits / 8), room(n), room(4 * n), room(4 * n + 4), 0};
    residuals *end = o.list = room(d->x == SHIFTED ? (size_t)n * k / 2 * sizeof *o.list : 1);
    for (int r = 0; r < n; r++) {
        const int first = r / PANEL * PANEL;
        uint8_t* panel = o.panels + (size_t)first * k * d->bits / 8;
        end = pack_row(d, w + (size_t)r * k, k, panel, r - first, end, o.excess + r);
        o.from[r + 1] = (int32_t)(end - o.list);
        /* With a residual in less than 12 weights the lists take longer than the signs. */
        if (r % PANEL < PANEL - 1 || o.from[r + 1] - o.from[first] <= PANEL * k / 24) continue;
        o.other[r / PANEL] = 1;
        end = memset(o.list + o.from[first], 0, (o.from[r + 1] - o.from[first]) * sizeof *end);
        for (int i = first; i <= r; i++) o.from[i + 1] = o.from[first];
    }
    return o;
}
static double bytes_per_weight(const design* d, const weights* w) {
    const size_t sums = d->x == HALVES ? 4 * w->n : d->x == SHIFTED ? 8 * w->n : 0;
    return d->bits / 8.0 + (double)(sums + w->from[w->n] * sizeof *w->list) / w->n / w->k;
}

/* Row r of activations, and its rests. */
static void trim_row(activations* o, int r, int8_t* row) {
    o->rests[r] = room(o->k / 4 * sizeof(rest));
    for (int i = 0; i < o->k; i++) {
        o->excess[r] += (i % 2 ? -127 : 128) * row[i];
        if (i % 2) row[i] = (int8_t)-row[i];
    }
    for (int i = 0; i < o->k; i += 4) {
        int8_t four[4];
        memcpy(four, row + i, 4);
        trim(row + i), trim(row + i + 2);
        if (!memcmp(four, row + i, 4)) continue;
        rest* e = o->rests[r] + o->count[r]++;
        e->step = i / 4;
        for (int j = 0; j < 4; j++) e->x[j] = (int8_t)(four[j] - row[i + j]);
    }
}
static activations pack_activations(const design* d, const int8_t* x, int m, int k) {
    const int bytes = d->x == INT16 ? 2 : 1;
    activations o = {x, m, k, d->x == HALVES ? 2 : 1, ((k * bytes + 63) / 64 | 1) * 64, 0, 0, 0, 0, 0};
    o.rows = room(m * o.parts * o.stride);
    for (int r = 0; r < m; r++) {
        uint8_t *row = o.rows + r * o.parts * o.stride, *low = row + o.stride;
        const int8_t* v = x + (size_t)r * k;
        for (int i = 0; i < k; i++)
            if (d->x == INT16) ((int16_t*)row)[i] = v[i];
            else if (d->x == BYTES || d->x == TRIMMED) row[i] = (uint8_t)v[i];
            else if (d->x == SHIFTED) row[i] = (uint8_t)(v[i] + 128);
            else if (d->x == HALVES) row[i] = (uint8_t)((v[i] + 128) >> 4), low[i] = v[i] & 15;
            else row[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = (uint8_t)v[i];
    }
    if (d->x == TRIMMED) {
        o.excess = room(4 * m), o.count = room(m * sizeof *o.count), o.rests = room(m * sizeof *o.rests);
        for (int r = 0; r < m; r++) trim_row(&o, r, (int8_t*)o.rows + r * o.stride);
    }
    if (d->x != SHIFTED || m < TOKENS) return o;
    /* Tokens in the order in which vpunpcklwd and vpunpckhwd leave 0..7 and 8..15. */
    o.columns = room((size_t)(m + TOKENS - 1) / TOKENS * TOKENS * k * 2);
    for (int r = 0; r < m; r++) {
        const int t = r % TOKENS;
        int16_t* column = o.columns + (size_t)(r - t) * k + (t & 3) + (t & 4) * 2 + (t & 8) / 2;
        for (int i = 0; i < k; i++) column[i * TOKENS] = x[(size_t)r * k + i];
    }
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
        for (const residuals* e = w->list + w->from[c + j]; e < w->list + w->from[c + j + 1]; e++) {
            const V k0 = load(columns + e->k[0] * TOKENS), k1 = load(columns + e->k[1] * TOKENS);
            const V r = spread(e->r);
            s0 = wide_step(s0, _mm256_unpacklo_epi16(k0, k1), r);
            s1 = wide_step(s1, _mm256_unpackhi_epi16(k0, k1), r);
        }
        low[j] = s0, high[j] = s1;
    }
    add_transposed(low, out + c, w->n, rows);
    add_transposed(high, out + (size_t)8 * w->n + c, w->n, rows - 8);
}
/* The rests of one row, added to its sums. */
static void add_rests(const uint8_t* panel, const rest* e, int count, int32_t* sums) {
    V s0 = load(sums), s1 = load(sums + 8);
    for (const rest* end = e + count; e < end; e++) {
        const uint8_t* w = panel + (size_t)e->step * 64;
        const V x = spread(e->x);
        s0 = raise_step(s0, load(w), x), s1 = raise_step(s1, load(w + 32), x);
    }
    _mm256_storeu_si256((V*)sums, s0), _mm256_storeu_si256((V*)(sums + 8), s1);
}
static void times_panel(tile_fn* const tile[3], const uint8_t* panel, const int32_t* excess,
                        const activations* x, int steps, int32_t* out, int n) {
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
            if (x->rests) add_rests(panel, x->rests[r + i], x->count[r + i], s);
            const int32_t of_row = x->excess ? x->excess[r + i] : 0;
            for (int c = 0; c < PANEL; c++) y[c] = s[c] - excess[c] - of_row;
        }
    }
}
static void product(const design* d, const weights* w, const activations* x, int32_t* out) {
    static _Alignas(64) uint8_t trimmed[PANEL << 16];
    static const int32_t none[PANEL];
    const size_t bytes = (size_t)PANEL * w->k * d->bits / 8;
    for (int c = 0; c < w->n; c += PANEL) {
        const uint8_t* panel = w->panels + c / PANEL * bytes;
        if (w->other[c / PANEL] || (d->x == SHIFTED && x->m < TOKENS)) {
            times_panel(d->other, panel, none, x, w->k / d->depth, out + c, w->n);
            continue;
        }
        if (d->x == SHIFTED) panel = memcpy(trimmed, panel, bytes);
        for (int j = c; j < c + PANEL; j++)
            for (const residuals* e = w->list + w->from[j]; e < w->list + w->from[j + 1]; e++)
                for (int i = 0; i < 2; i++)
                    trimmed[(e->k[i] / 4 * PANEL + j - c) * 4 + e->k[i] % 4] -= (uint8_t)e->r[i];
        times_panel(d->tile, panel, w->excess + c, x, w->k / d->depth, out + c, w->n);
        for (int r = 0; w->from[c + PANEL] > w->from[c] && r < x->m; r += TOKENS)
            for (int half = c; half < c + PANEL; half += 8)
                correct(w, x->columns + (size_t)r * x->k, half, out + (size_t)r * w->n, x->m - r);
    }
}

/* ---- Weights and activations, the check, the clock ---- */
static int uniform(int n) {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (int)((state >> 32) % (uint64_t)n);
}
/* Kind 0: normally distributed, each row scaled by its own largest magnitude, as in practice; of activations
   that is NORMAL. */
enum { KINDS = 6, X_KINDS = 4, NORMAL = X_KINDS };
static void fill_weights(int8_t* w, int n, int k, int kind, int bits) {
    static int row[1 << 16];
    for (int r = 0; r < n; r++) {
        int most = 1;
        for (int i = 0; i < k; i++) {
            row[i] = 0;
            for (int j = 0; j < 24; j++) row[i] += uniform(1 << 20) - (1 << 19);
            if (abs(row[i]) > most) most = abs(row[i]);
        }
        for (int i = 0; i < k; i++) {
            const int normal = (int)(row[i] * 127.0 / most), any = uniform(256) - 128;
            const int alternate = (i + r) % 2 ? 127 : -128, in_pairs = i / 2 % 2 ? 127 : -128;
            const int kinds[KINDS] = {normal, any, 127, -128, alternate, in_pairs};
            w[(size_t)r * k + i] = (int8_t)(bits == 8 ? kinds[kind] : (kinds[kind] + 128) / 16);
        }
    }
}
static void fill_activations(int8_t* x, int m, int k, int kind) {
    for (int i = 0; i < m * k; i++) {
        const int any = uniform(255) - 127, sign = uniform(2) ? 127 : -127, of_row = i / k % 2 ? 127 : -127;
        const int kinds[X_KINDS] = {any, sign, of_row, i % 2 ? of_row : -of_row};
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
}
static void check_all(void) {
    enum { N = 48, K = 1096, M = 35 };
    for (int kind = 0; kind < X_KINDS * KINDS; kind++)
        for (const design* d = DESIGNS; d < DESIGNS + COUNT; d++, used = 0) {
            int8_t *w = room(N * K), *x = room(M * K);
            fill_weights(w, N, K, kind / X_KINDS, d->bits);
            const weights packed = pack_weights(d, w, N, K);
            const size_t mark = used;
            for (int m = 1; m <= M; m++, used = mark) {
                fill_activations(x, m, K, kind % X_KINDS);
                const activations rows = pack_activations(d, x, m, K);
                check(d, &packed, &rows);
            }
        }
    printf("%d products exact\n", X_KINDS * KINDS * COUNT * M);
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

/* A million times these instructions, in ten chains that do not wait for each other. */
#define TEN(F) F("0") F("1") F("2") F("3") F("4") F("5") F("6") F("7") F("8") F("9")
#define PEAK(NAME, F)                                                                                        \
    for (double best = 1, round = 0; round < 100; round++) {                                                 \
        const double start = now();                                                                          \
        for (int i = 0; i < 100000; i++)                                                                     \
            __asm__ volatile(TEN(F)::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",       \
                             "xmm8", "xmm9", "xmm14", "xmm15");                                              \
        const double took = now() - start;                                                                   \
        if (took < best) best = took;                                                                        \
        if (round == 99) printf("  %-40s %5.2f G/s\n", NAME, 1e-3 / best);                                   \
    }
#define CHAIN(a) "vpaddd %%ymm0, %%ymm0, %%ymm0\n"
#define MADD(a) "vpmaddwd %%ymm15, %%ymm15, %%ymm" a "\n"
#define MADDUBS(a) "vpmaddubsw %%ymm15, %%ymm15, %%ymm" a "\n"
#define MADD_ADD(a) "vpmaddwd %%ymm15, %%ymm15, %%ymm14\nvpaddd %%ymm14, %%ymm" a ", %%ymm" a "\n"
#define MADDUBS_MADD_ADD(a)                                                                                  \
    "vpmaddubsw %%ymm15, %%ymm15, %%ymm14\nvpmaddwd %%ymm14, %%ymm15, %%ymm14\n"                             \
    "vpaddd %%ymm14, %%ymm" a ", %%ymm" a "\n"
static void peaks(void) {
    printf("Peaks; a vpmaddwd is 16 multiply-adds, a vpmaddubsw 32:\n");
    PEAK("vpaddd, each needing the last (clock)", CHAIN)
    PEAK("vpmaddwd", MADD)
    PEAK("vpmaddubsw", MADDUBS)
    PEAK("vpmaddwd + vpaddd", MADD_ADD)
    PEAK("vpmaddubsw + vpmaddwd + vpaddd", MADDUBS_MADD_ADD)
}

/* G multiply-adds/s, and how many times those of the first design in the same round. */
static void measure(int bits, int m, int n, int k, int x_kind) {
    static double rate[COUNT][ROUNDS], ratio[COUNT][ROUNDS], packing[COUNT][2];
    weights ws[COUNT];
    activations xs[COUNT];
    int first = 0, last, repeats = 1;
    while (DESIGNS[first].bits != bits) first++;
    for (last = first; last < COUNT && DESIGNS[last].bits == bits;) last++;
    used = 0;
    int8_t *w = room((size_t)n * k), *x = room((size_t)m * k);
    int32_t* out = room((size_t)m * n * 4);
    fill_weights(w, n, k, 0, bits);
    if (x_kind == NORMAL) fill_weights(x, m, k, 0, 8);
    else fill_activations(x, m, k, x_kind);
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
    static const char* const names[] = {"uniform", "+-127", "127 of one sign", "127, -127 in turn", "normal"};
    printf("\nM %d, N %d, K %d, x %s\n%24s median   best  ratio  bytes/weight  packing w, x (ns each)\n", m, n, k,
           names[x_kind], "");
    for (int d = first; d < last; d++) {
        const double middle = median(rate[d]);
        printf("  %-22s %6.1f %6.1f  %5.2f  %12.3f  %9.2f %6.2f\n", DESIGNS[d].name, middle,
               rate[d][ROUNDS - 1], median(ratio[d]), bytes_per_weight(DESIGNS + d, ws + d),
               1e9 * packing[d][0] / n / k, 1e9 * packing[d][1] / m / k);
    }
}

int main(void) {
    check_all();
    peaks();
    for (int bits = 8; bits >= 4; bits -= 4)
        for (int k = 1024; k <= 4096; k *= 4) {
            measure(bits, 1, 4096 * 8 / bits, k, NORMAL); /* 4 and 16 MiB of weights */
            measure(bits, 16, 512 * 1024 / k, k, NORMAL); /* at most 512 KiB */
            measure(bits, 128, 512 * 1024 / k, k, NORMAL);
        }
    for (int x_kind = 0; x_kind < NORMAL; x_kind++) measure(8, 16, 512, 1024, x_kind);
    return 0;
}
