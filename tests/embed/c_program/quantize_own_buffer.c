/* A C program that embeds CPython and has dynquant quantize memory that the program owns, without a copy.
   It shows a memoryview over the program's floats, an `out=` over its bytes, the same work through the C
   table, and a clean end: views released before the memory goes away, Py_FinalizeEx() == 0.
   Build: cc quantize_own_buffer.c -I<dynquant.get_include()> $(python3-config --embed --cflags --ldflags) */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dynquant.h>

enum { ROWS = 3, COLUMNS = 5 };

static float x[ROWS * COLUMNS];
static int8_t codes[ROWS * COLUMNS], codes_by_table[ROWS * COLUMNS];

/* The Python side: arrays over the two views, and a call that writes through `out`. */
static const char program[] =
    "import numpy, dynquant\n"
    "rows = numpy.frombuffer(x, numpy.float32).reshape(shape)\n"
    "into = numpy.frombuffer(codes, numpy.int8).reshape(shape)\n"
    "scales = dynquant.dynamic_quantize_int8_per_row(rows, out=into).scales.tolist()\n"
    "del rows, into\n";

static int by_python(void) {
    PyObject *names = Py_BuildValue(
        "{s:s,s:N,s:N,s:(ii)}", "__name__", "embedded",
        "x", PyMemoryView_FromMemory((char *)x, sizeof x, PyBUF_READ),
        "codes", PyMemoryView_FromMemory((char *)codes, sizeof codes, PyBUF_WRITE), "shape", ROWS, COLUMNS);
    PyObject *done = names == NULL ? NULL : PyRun_String(program, Py_file_input, names, names);
    int failed = done == NULL;
    if (!failed) {
        PyObject_Print(PyDict_GetItemString(names, "scales"), stdout, 0);
        puts("");
    }
    Py_XDECREF(done);
    Py_XDECREF(names);
    return failed;
}

static int by_table(void) {
    const dynquant_api *dq = dynquant_import();
    float scale;
    int at, status = DYNQUANT_OK;
    if (dq == NULL) return 1;
    for (at = 0; at < ROWS * COLUMNS && status == DYNQUANT_OK; at += COLUMNS)
        status = dq->dynamic_quantize_row_f32_s8(x + at, COLUMNS, codes_by_table + at, &scale);
    return status != DYNQUANT_OK;
}

int main(void) {
    int i, failed;
    for (i = 0; i < ROWS * COLUMNS; i++) x[i] = (float)(i - 7) / 4;
    Py_Initialize();
    failed = by_python() || by_table();
    if (PyErr_Occurred()) PyErr_Print();
    if (Py_FinalizeEx() != 0) return 120;
    if (failed || memcmp(codes, codes_by_table, sizeof codes) != 0) return 1;
    for (i = 0; i < ROWS * COLUMNS; i++) printf("%d%c", codes[i], i % COLUMNS == COLUMNS - 1 ? '\n' : ' ');
    return 0;
}
