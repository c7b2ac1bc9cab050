/* A C program that searches the vectors of an EmbeddingIndex on disk. It maps the .npy files of the index into
   memory and reads no more of them than the search does. This needs an index of 8 bits, without center and
   hadamard, whose metric is "dot"; for the others see the contract of top_k in dynquant.h.
   Usage: search_index codes.npy scales.npy ids.npy queries.npy k
   It prints a line for each query: the ids of its k best vectors, each with its score.
   Build: cc search_index.c -I<dynquant.get_include()> $(python3-config --embed --cflags --ldflags) */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dynquant.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* An array in a file: its header is a Python dict as text, and its data begins on a multiple of 64 bytes. */
typedef struct {
    const void *data;
    int64_t rows, columns; /* columns is 1 for a vector */
} Array;

static const char *mapped(const char *path, size_t *size) {
    struct stat status;
    void *memory = MAP_FAILED;
    int file = open(path, O_RDONLY);
    if (file >= 0 && fstat(file, &status) == 0 && status.st_size >= 10) {
        *size = (size_t)status.st_size;
        memory = mmap(NULL, *size, PROT_READ, MAP_SHARED, file, 0);
    }
    if (file >= 0) close(file);
    return memory == MAP_FAILED ? NULL : (const char *)memory;
}

/* The array in a file of version 1.0 whose items have `bytes` bytes and the type `descr`, or a message. */
static int open_array(const char *path, const char *descr, size_t bytes, Array *array) {
    char header[1024], *shape;
    long long rows, columns = 1;
    size_t size, length;
    const char *file = mapped(path, &size);
    if (file == NULL || memcmp(file, "\x93NUMPY\1\0", 8) != 0) goto damaged;
    length = (unsigned char)file[8] | (size_t)(unsigned char)file[9] << 8;
    if (length >= sizeof header || size < 10 + length) goto damaged;
    memcpy(header, file + 10, length);
    header[length] = 0;
    shape = strstr(header, "'shape': (");
    if (shape == NULL || strstr(header, descr) == NULL || strstr(header, "'fortran_order': False") == NULL)
        goto damaged;
    if (sscanf(shape, "'shape': (%lld, %lld", &rows, &columns) < 1 || rows < 0 || columns < 1) goto damaged;
    if ((uint64_t)rows > (size - 10 - length) / bytes / (uint64_t)columns) goto damaged;
    array->data = file + 10 + length;
    array->rows = rows;
    array->columns = columns;
    return 0;
damaged:
    fprintf(stderr, "%s: expected a .npy file of %s\n", path, descr);
    return 1;
}

static int search(const dynquant_api *dq, char **arguments) {
    Array codes, scales, ids, queries;
    int64_t m, n, d, i, j, size, k = atoll(arguments[5]), *indices;
    float *scores;
    void *scratch;
    int status;
    if (open_array(arguments[1], "'|i1'", 1, &codes) || open_array(arguments[2], "'<f4'", 4, &scales) ||
        open_array(arguments[3], "'<i8'", 8, &ids) || open_array(arguments[4], "'<f4'", 4, &queries))
        return 1;
    m = queries.rows;
    n = codes.rows;
    d = codes.columns;
    size = dq->top_k_scratch_bytes(m, n, d, 8, d, k);
    if (scales.rows != n || ids.rows != n || queries.columns != d || size < 0) {
        fprintf(stderr, "the arrays do not fit each other, or k is negative\n");
        return 1;
    }
    scratch = malloc((size_t)size);
    scores = malloc((size_t)(m * k) * sizeof *scores + 1);
    indices = malloc((size_t)(m * k) * sizeof *indices + 1);
    status = DYNQUANT_BAD_ARGUMENT;
    if (scratch != NULL && scores != NULL && indices != NULL)
        status = dq->top_k((const float *)queries.data, codes.data, (const float *)scales.data, NULL, NULL, NULL, 0,
                           m, n, d, 8, d, DYNQUANT_DOT, k, scratch, scores, indices);
    for (i = 0; i < m && status == DYNQUANT_OK; i++) {
        for (j = i * k; j < (i + 1) * k && indices[j] >= 0; j++)
            printf("%s%lld %.9g", j > i * k ? "  " : "", (long long)((const int64_t *)ids.data)[indices[j]],
                   scores[j]);
        puts("");
    }
    if (status != DYNQUANT_OK) fprintf(stderr, "not enough memory, or numbers that top_k does not take\n");
    free(scratch);
    free(scores);
    free(indices);
    return status != DYNQUANT_OK;
}

int main(int count, char **arguments) {
    const dynquant_api *dq;
    int failed = 1;
    if (count != 6) {
        fprintf(stderr, "usage: %s codes.npy scales.npy ids.npy queries.npy k\n", arguments[0]);
        return 2;
    }
    Py_Initialize();
    dq = dynquant_import();
    if (dq == NULL) {
        PyErr_Print();
    } else {
        Py_BEGIN_ALLOW_THREADS /* from here on nothing needs Python */
        failed = search(dq, arguments);
        Py_END_ALLOW_THREADS
    }
    return Py_FinalizeEx() != 0 ? 120 : failed;
}
