/* Threads that call the C table on shared inputs and packed weights, on each instruction set. Each writes to
   memory of its own, and must get the results of a single thread. With the argument "race" all write to the same
   memory instead, which ThreadSanitizer must report. */
#include <dynquant.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 6, ROUNDS = 20, M = 9, N = 67, K = 1000, GROUP = 48, GROUPS = (K + GROUP - 1) / GROUP };

static const dynquant_api *dq;
static float x[M * K], factors[K], bias[N], w_scales[N], group_scales[N * GROUPS];
static int8_t w[N * K];
static uint8_t zero_points[N * GROUPS];
static void *packed8, *packed4;

/* Everything that a thread writes. */
typedef struct {
    int8_t codes[M * K];
    uint8_t nibbles[K / 2];
    float scale[3], values[K], smoothed[M * K], vector[N], y8[M * N], y4[M * N];
    void *scratch8, *scratch4;
} results;

static results expected, found[THREADS];
static int failed;

static void *allocated(int64_t bytes) {
    void *memory = bytes < 0 ? NULL : malloc((size_t)bytes);
    if (memory == NULL) exit(2);
    return memory;
}

static void compute(results *r) {
    int status = dq->amax_f32(x, M * K, &r->scale[0]);
    status |= dq->percentile_scale_f32(x, M * K, 0.99, 127, &r->scale[1]);
    status |= dq->quantize_row_f32_s8(x, M * K, r->scale[1], 127, r->codes);
    status |= dq->dynamic_quantize_row_f32_s4(x, K, r->nibbles, &r->scale[2]);
    status |= dq->dequantize_row_s4_f32(r->nibbles, K, r->scale[2], r->values);
    status |= dq->divide_rows_f32(x, factors, M, K, r->smoothed);
    status |= dq->w8a8_matvec(w, w_scales, N, K, r->codes, r->scale[1], r->vector);
    status |= dq->w8a8_matmul(packed8, w_scales, bias, x, M, N, K, r->scratch8, r->y8);
    status |= dq->w4a8_matmul(packed4, bias, x, M, N, K, GROUP, r->scratch4, r->y4);
    if (status != DYNQUANT_OK) failed = 1;
}

static void *work(void *argument) {
    for (int i = 0; i < ROUNDS; i++) compute(argument);
    return NULL;
}

static void in_threads(int race) {
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, work, race ? &found[0] : &found[i])) exit(2);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
}

static void on_these_kernels(int race) {
    packed8 = allocated(dq->w8a8_packed_bytes(N, K));
    packed4 = allocated(dq->w4a8_packed_bytes(N, K, GROUP));
    failed |= dq->w8a8_pack(w, N, K, packed8);
    failed |= dq->w4a8_pack((const uint8_t *)w, group_scales, zero_points, N, K, GROUP, packed4);
    expected.scratch8 = allocated(dq->w8a8_scratch_bytes(M, K));
    expected.scratch4 = allocated(dq->w4a8_scratch_bytes(M, K, GROUP));
    compute(&expected);
    for (int i = 0; i < THREADS; i++) {
        found[i].scratch8 = allocated(dq->w8a8_scratch_bytes(M, K));
        found[i].scratch4 = allocated(dq->w4a8_scratch_bytes(M, K, GROUP));
    }
    in_threads(race);
    for (int i = 0; i < (race ? 0 : THREADS); i++)
        failed |= memcmp(&found[i], &expected, offsetof(results, scratch8)) != 0;
}

int main(int argc, char **argv) {
    const int race = argc > 1 && strcmp(argv[1], "race") == 0;
    PyObject *isa, *select, *names;
    for (int i = 0; i < M * K; i++) x[i] = (float)(i * 7919 % 2003 - 1001) / 64;
    for (int i = 0; i < N * K; i++) w[i] = (int8_t)(i * 31 % 255 - 127);
    for (int i = 0; i < K; i++) factors[i] = (float)(i % 7 + 1) / 2;
    for (int i = 0; i < N; i++) bias[i] = w_scales[i] = (float)(i + 1) / 128;
    for (int i = 0; i < N * GROUPS; i++) group_scales[i] = (float)(i % 9 + 1) / 16, zero_points[i] = i % 16;
    Py_Initialize();
    dq = dynquant_import();
    isa = PyImport_ImportModule("dynquant._isa");
    if (dq == NULL || isa == NULL) return 2;
    select = PyObject_GetAttrString(isa, "select");
    names = PyRun_String("[i for i in _core.isas_built() if i in _core.isas_supported()]", Py_eval_input,
                         PyModule_GetDict(isa), NULL);
    if (select == NULL || names == NULL) return 2;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(names); i++) {
        if (PyObject_CallFunctionObjArgs(select, PyList_GET_ITEM(names, i), NULL) == NULL) return 2;
        Py_BEGIN_ALLOW_THREADS
        on_these_kernels(race);
        Py_END_ALLOW_THREADS
        printf("%s: %s\n", PyUnicode_AsUTF8(PyList_GET_ITEM(names, i)), failed ? "differs" : "same");
    }
    return failed;
}
