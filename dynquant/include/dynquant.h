/* dynquant's row kernels for C and C++.

   A program that embeds CPython, or an extension module, gets a table of functions from dynquant_import() and
   keeps it:

       const dynquant_api *dq = dynquant_import();
       if (dq == NULL) return NULL;                  // ImportError is set
       status = dq->quantize_row_f32_s8(x, n, scale, 127, codes);

   The folder of this header is what dynquant.get_include() returns. There is nothing to link with. Cython has
   the same functions, with dynquant_ before each name, in dynquant/capi.pxd.

   What holds for every function of the table:

   * They use the instruction set that `import dynquant` picked. Results are the same bits on each of them, and
     the same as those of the Python functions.
   * They need no GIL, no thread state and no Python object. They allocate nothing (but use up to 64 KiB of
     stack, int8_inner up to 128 KiB), keep nothing, and change only what their results and scratch point to. So any number of threads may
     call them, on the same inputs too. They stay valid until Py_FinalizeEx.
   * Lengths are counted in elements unless they are named bytes. Any length from 0 up is taken, and for a
     length of 0 the pointer may be NULL. Arrays are contiguous, matrices row by row. Pointers need the
     alignment of their type and no more.
   * Results may not overlap inputs, except where a function says so.
   * A function that returns a status has written its results if that is DYNQUANT_OK. Otherwise it has changed
     nothing but scratch:
         DYNQUANT_NON_FINITE    an input array of floats holds NaN or infinity
         DYNQUANT_BAD_ARGUMENT  a length is negative or beyond the address space, or a single number is not
                                in the range that the function gives for it
   * Arithmetic is IEEE float32, in the default rounding mode, with subnormals.

   What is not here, and where Python has it: float16 and bfloat16 input, groups of activations and int4 groups
   (dynquant.dynamic_quantize), quantizing weights (dynquant.quantize_weights, whose arrays w8a8_pack and w4a8_pack
   take), rotation (dynquant.hadamard_transform), SmoothQuant factors, calibration and error metrics. A program that
   embeds Python calls these once, when it loads a model, and the functions below for every row. */
#ifndef DYNQUANT_H
#define DYNQUANT_H

#include <Python.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The table's version. It changes when a function changes its meaning or signature, or goes away. Functions
   are added at the end without a change of version: a table may be longer than this header knows. */
#define DYNQUANT_API_VERSION 1

#define DYNQUANT_OK 0
#define DYNQUANT_NON_FINITE 1
#define DYNQUANT_BAD_ARGUMENT 2

/* Metrics of top_k. */
#define DYNQUANT_DOT 0
#define DYNQUANT_COSINE 1
#define DYNQUANT_L2 2

typedef struct dynquant_api {
    int32_t version; /* DYNQUANT_API_VERSION of the dynquant that was imported */
    int32_t size;    /* bytes of its table */

    /* ---- Magnitudes and scales ---- */

    /* *amax = the largest |x[i]|; 0 for n = 0. */
    int (*amax_f32)(const float *x, int64_t n, float *amax);

    /* *magnitude = the one at index max(ceil(p * n) - 1, 0) of the |x[i]| in ascending order (nearest rank,
       exact; up to n = 2**24 the product is one of float32), 0 < p <= 1; 0 for n = 0. Linear time, whatever the
       values are. */
    int (*percentile_f32)(const float *x, int64_t n, double p, float *magnitude);

    /* *scale = the largest magnitude / clip, one division; 0 when all is zero or the quotient underflows.
       clip > 0 is the largest code, 127 for int8 and 7 for int4; the quotient must be finite. */
    int (*amax_scale_f32)(const float *x, int64_t n, float clip, float *scale);

    /* The same with the magnitude of percentile_f32: larger ones saturate. */
    int (*percentile_scale_f32)(const float *x, int64_t n, double p, float clip, float *scale);

    /* ---- Quantize ---- */

    /* codes[i] = clamp(round(x[i] / scale), -clip, clip), a true division, halves away from zero; all 0 for
       scale 0. scale >= 0 and finite, 1 <= clip <= 127. x is read twice, first to look for NaN. */
    int (*quantize_row_f32_s8)(const float *x, int64_t n, float scale, int32_t clip, int8_t *codes);

    /* The same with clip 7 and two codes to a byte: (n + 1) / 2 bytes, the even element in the low nibble,
       the high nibble of an odd last one 0. */
    int (*quantize_row_f32_s4)(const float *x, int64_t n, float scale, uint8_t *packed);

    /* amax_scale_f32 and then quantize_row: the row by its own scale. */
    int (*dynamic_quantize_row_f32_s8)(const float *x, int64_t n, int8_t *codes, float *scale);
    int (*dynamic_quantize_row_f32_s4)(const float *x, int64_t n, uint8_t *packed, float *scale);

    /* ---- Dequantize ---- */

    /* out[i] = codes[i] * scale, one rounding; scale is finite. A product beyond float32 is infinite. */
    int (*dequantize_row_s8_f32)(const int8_t *codes, int64_t n, float scale, float *out);

    /* The same for n codes two to a byte, in [-8, 7]. */
    int (*dequantize_row_s4_f32)(const uint8_t *packed, int64_t n, float scale, float *out);

    /* ---- Integer products ---- */

    /* Sum of a[i] * b[i], exact for all values, -128 included, and n up to 2**49. No status; 0 for n <= 0. */
    int64_t (*dot_s8s8_s64)(const int8_t *a, const int8_t *b, int64_t n);

    /* out[r] = float32(sum of w[r][i] * a[i]) * w_scales[r] * a_scale, in that order, the sum exact for every
       k; 0 for k = 0. w (n, k), w_scales (n,), a (k,), out (n,); all int8 values; a_scale is finite. */
    int (*w8a8_matvec)(const int8_t *w, const float *w_scales, int64_t n, int64_t k, const int8_t *a,
                       float a_scale, float *out);

    /* ---- Packed W8A8: weights packed once, float rows multiplied many times ---- */

    /* Bytes that w8a8_pack writes for weights (n, k); -1 for lengths that cannot be. */
    int64_t (*w8a8_packed_bytes)(int64_t n, int64_t k);

    /* Weights w (n, k), all int8 values, to `packed`, w8a8_packed_bytes(n, k) bytes at any address. The form
       depends on the instruction set, the process and the address: not to be stored, sent or moved. */
    int (*w8a8_pack)(const int8_t *w, int64_t n, int64_t k, void *packed);

    /* Bytes of scratch that w8a8_matmul needs for m rows of k; -1 for lengths that cannot be. */
    int64_t (*w8a8_scratch_bytes)(int64_t m, int64_t k);

    /* out (m, n) = x (m, k) times weights (n, k). Each row of x is quantized to int8 by its own largest
       magnitude, a_scale; then out[r][c] = float32(exact sum) * w_scales[c] * a_scale + bias[c], in that
       order. w_scales (n,); bias (n,) or NULL; scratch is w8a8_scratch_bytes(m, k) bytes at any address, each
       thread its own. DYNQUANT_BAD_ARGUMENT also if `packed` was not written there for (n, k) by w8a8_pack.
       Rows do not depend on each other, and a call reads the weights from memory once: for speed give it as
       many rows as leave their scratch in cache. */
    int (*w8a8_matmul)(const void *packed, const float *w_scales, const float *bias, const float *x,
                       int64_t m, int64_t n, int64_t k, void *scratch, float *out);

    /* ---- Smoothing ---- */

    /* out (m, k) = x (m, k) / factors (k,), and out = x * factors. Factors are above 0, else
       DYNQUANT_BAD_ARGUMENT; DYNQUANT_NON_FINITE in x or factors comes before that. out may be x itself. A
       result beyond float32 is infinite. */
    int (*divide_rows_f32)(const float *x, const float *factors, int64_t m, int64_t k, float *out);
    int (*multiply_rows_f32)(const float *x, const float *factors, int64_t m, int64_t k, float *out);

    /* ---- Packed W4A8: the same as packed W8A8 for 4-bit weights with a scale for each group ---- */

    /* Bytes that w4a8_pack writes for weights (n, k), group_size >= 1; -1 for lengths that cannot be. */
    int64_t (*w4a8_packed_bytes)(int64_t n, int64_t k, int64_t group_size);

    /* Weights w (n, (k + 1) / 2), two codes to a byte, the even element in the low nibble; w_scales and
       zero_points (n, groups), groups = ceil(k / group_size), the last group of a row may be shorter. Codes
       and zero points are 0..15; or zero_points is NULL, and codes are in two's complement, in [-8, 7]. To
       `packed`, w4a8_packed_bytes(n, k, group_size) bytes, of which the same holds as of w8a8_pack's.
       DYNQUANT_BAD_ARGUMENT also for a zero point above 15. */
    int (*w4a8_pack)(const uint8_t *w, const float *w_scales, const uint8_t *zero_points, int64_t n,
                     int64_t k, int64_t group_size, void *packed);

    /* Bytes of scratch that w4a8_matmul needs for m rows of k; -1 for lengths that cannot be. */
    int64_t (*w4a8_scratch_bytes)(int64_t m, int64_t k, int64_t group_size);

    /* out (m, n) = x (m, k) times weights (n, k), as w8a8_matmul, with out[r][c] = total * a_scale + bias[c],
       where total adds up float32(exact sum of (code - zero_point) * a) * w_scales over the groups in
       ascending order, from 0, in float32. DYNQUANT_BAD_ARGUMENT also if `packed` was not written there for
       (n, k, group_size) by w4a8_pack. */
    int (*w4a8_matmul)(const void *packed, const float *bias, const float *x, int64_t m, int64_t n,
                       int64_t k, int64_t group_size, void *scratch, float *out);

    /* The same for codes 0..15 that stand for code * w_scale + minimum, minimums (n, groups), such as those of
       GGUF's Q4_1. w4a8_matmul takes what w4a8_minimums_pack writes, too; then total adds up float32(exact sum of
       code * a) * w_scale + minimum * float32(exact sum of a), each product and sum rounded. */
    int64_t (*w4a8_minimums_packed_bytes)(int64_t n, int64_t k, int64_t group_size);
    int (*w4a8_minimums_pack)(const uint8_t *w, const float *w_scales, const float *minimums, int64_t n,
                              int64_t k, int64_t group_size, void *packed);

    /* ---- Packed W8A8 with a scale for each group of weights, or for activations with a zero point ---- */

    /* Bytes that w8a8_groups_pack writes for weights (n, k), group_size >= 1, of which k or more gives one
       scale for each output; -1 for lengths that cannot be. */
    int64_t (*w8a8_groups_packed_bytes)(int64_t n, int64_t k, int64_t group_size, int32_t symmetric);

    /* Weights w (n, k), all int8 values, with w_scales (n, groups) as w4a8_pack has them, to `packed`, of which
       the same holds as of w8a8_pack's. symmetric, 0 or not, says how activations will be quantized. */
    int (*w8a8_groups_pack)(const int8_t *w, const float *w_scales, int64_t n, int64_t k, int64_t group_size,
                            int32_t symmetric, void *packed);

    /* Bytes of scratch that w8a8_groups_matmul needs for m rows of k; -1 for lengths that cannot be. */
    int64_t (*w8a8_groups_scratch_bytes)(int64_t m, int64_t k, int64_t group_size);

    /* out (m, n) = x (m, k) times weights (n, k), as w4a8_matmul, with total of float32(exact sum of w * a) *
       w_scales. With symmetric 0 each row of x is quantized to codes u in 0..255, by s = (max(0, max) - min(0, min))
       / 255 and z = clamp(round(-min(0, min) / s), 0, 255) to u = clamp(round(x / s) + z, 0, 255), halves away from
       zero; a is u - z and a_scale is s. DYNQUANT_BAD_ARGUMENT also if `packed` was not written there for (n, k,
       group_size, symmetric), or if the range max - min of a row is beyond float32. */
    int (*w8a8_groups_matmul)(const void *packed, const float *bias, const float *x, int64_t m, int64_t n,
                              int64_t k, int64_t group_size, int32_t symmetric, void *scratch, float *out);

    /* ---- Products of int8 matrices ---- */

    /* Bytes of scratch for the two that follow; -1 for lengths that cannot be. */
    int64_t (*int8_inner_scratch_bytes)(int64_t m, int64_t n, int64_t k);

    /* out (m, n): out[r][c] = sum of a[r][i] * b[c][i], exact for all values, -128 included. k is at most 131,071
       for s32, whose sums could wrap above that. scratch is at any address, each thread its own. */
    int (*int8_inner_s32)(const int8_t *a, const int8_t *b, int64_t m, int64_t n, int64_t k, void *scratch,
                          int32_t *out);
    int (*int8_inner_s64)(const int8_t *a, const int8_t *b, int64_t m, int64_t n, int64_t k, void *scratch,
                          int64_t *out);

    /* ---- Search ---- */

    /* Bytes of scratch that top_k needs; -1 for lengths, bits and group_size that cannot be. For
       each query some 2 KiB + 24 k + 3 d bytes; no more for more vectors. */
    int64_t (*top_k_scratch_bytes)(int64_t m, int64_t n, int64_t d, int32_t bits, int64_t group_size, int64_t k);

    /* For each of the queries (m, d) the k of n quantized vectors with the best scores, best first: `found` and
       `indices` (m, k), of equal scores the lower index first. Where there are fewer than k, the score is
       -INFINITY, or INFINITY for DYNQUANT_L2, and the index -1. Scores are those of dynquant.top_k.
       bits 8: codes are int8 (n, d), scales (n,), zero_points NULL, and group_size is d or more. bits 4: codes,
       scales and zero_points are as w4a8_pack has them for (n, d, group_size). These are the files of a folder of
       EmbeddingIndex or quantize_array, which may be memory-mapped: they are read as they lie, never copied whole.
       1 <= d, 0 <= n < 2**32. metric is DYNQUANT_DOT, DYNQUANT_COSINE or DYNQUANT_L2, for squared distances. bias
       (n,) is added to dot products; otherwise NULL. allowed is NULL, or bytes of 0 or 1 that say which vectors may
       be found: (n,) with allowed_stride 0, or (m, n), for each query its own, with allowed_stride n. scratch is at
       any address, each thread its own. DYNQUANT_BAD_ARGUMENT also for a zero point above 15, for another byte in
       allowed, and if infinities of both signs meet in a score. */
    int (*top_k)(const float *queries, const void *codes, const float *scales, const uint8_t *zero_points,
                 const float *bias, const uint8_t *allowed, int64_t allowed_stride, int64_t m, int64_t n, int64_t d,
                 int32_t bits, int64_t group_size, int32_t metric, int64_t k, void *scratch, float *found,
                 int64_t *indices);
} dynquant_api;

/* The table of the installed dynquant, which is imported if it is not yet; with the GIL held. NULL with
   ImportError set, or what the import raised, if there is none, its version is another or it is shorter than
   this header's. The table lives until Py_FinalizeEx. */
static inline const dynquant_api *dynquant_import(void) {
    const dynquant_api *api = NULL;
    PyObject *capsule = NULL, *module = PyImport_ImportModule("dynquant.capi");
    if (module != NULL) {
        capsule = PyObject_GetAttrString(module, "_C_API");
        Py_DECREF(module);
    }
    if (capsule == NULL) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError))
            PyErr_SetString(PyExc_ImportError, "dynquant.capi: expected a table _C_API, found none");
        return NULL;
    }
    if (PyCapsule_IsValid(capsule, "dynquant.capi._C_API"))
        api = (const dynquant_api *)PyCapsule_GetPointer(capsule, "dynquant.capi._C_API");
    /* The table is static in the module, which is never unloaded: it outlives the capsule. */
    Py_DECREF(capsule);
    if (api == NULL) {
        PyErr_SetString(PyExc_ImportError, "dynquant.capi: expected _C_API to be the capsule of a table");
    } else if (api->version != DYNQUANT_API_VERSION || api->size < (int32_t)sizeof(dynquant_api)) {
        PyErr_Format(PyExc_ImportError,
                     "dynquant.capi: this program was compiled for C API version %d with a table of at least "
                     "%d bytes; the dynquant installed has version %d with %d bytes",
                     DYNQUANT_API_VERSION, (int)sizeof(dynquant_api), (int)api->version, (int)api->size);
        api = NULL;
    }
    return api;
}

#ifdef __cplusplus
}
#endif

#endif
