/* byte_rows.quantize(x, codes) -> scale: a C extension that calls dynquant's kernels through its table.
   It shows the import of the table with the module, arrays of any library taken by the buffer protocol, the
   GIL released for the work, and a status turned into an exception. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dynquant.h>

static const dynquant_api *dq;

/* Fills `view` with the one-dimensional contiguous array `object` of `format`, or raises. */
static int get_array(PyObject *object, Py_buffer *view, int flags, const char *format) {
    if (PyObject_GetBuffer(object, view, flags | PyBUF_FORMAT | PyBUF_ND) != 0) return -1;
    if (view->ndim == 1 && strcmp(view->format, format) == 0) return 0;
    PyErr_Format(PyExc_TypeError, "expected one axis of '%s', got %d of '%s'", format, view->ndim,
                 view->format);
    PyBuffer_Release(view);
    return -1;
}

static PyObject *quantize(PyObject *self, PyObject *args) {
    PyObject *x_object, *codes_object;
    Py_buffer x, codes;
    float scale = 0;
    int status = DYNQUANT_BAD_ARGUMENT;
    (void)self;
    if (!PyArg_ParseTuple(args, "OO", &x_object, &codes_object)) return NULL;
    if (get_array(x_object, &x, 0, "f") != 0) return NULL;
    if (get_array(codes_object, &codes, PyBUF_WRITABLE, "b") != 0) {
        PyBuffer_Release(&x);
        return NULL;
    }
    if (x.shape[0] == codes.shape[0]) {
        Py_BEGIN_ALLOW_THREADS
        status = dq->dynamic_quantize_row_f32_s8((const float *)x.buf, x.shape[0], (int8_t *)codes.buf,
                                                 &scale);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&codes);
    PyBuffer_Release(&x);
    if (status == DYNQUANT_NON_FINITE)
        return PyErr_Format(PyExc_ValueError, "x: expected finite values");
    if (status != DYNQUANT_OK)
        return PyErr_Format(PyExc_ValueError, "codes: expected the length of x");
    return PyFloat_FromDouble(scale);
}

static PyMethodDef methods[] = {
    {"quantize", quantize, METH_VARARGS, "Int8 codes of the floats x into codes; returns their scale."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "byte_rows", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_byte_rows(void) {
    PyObject *self;
    dq = dynquant_import();
    if (dq == NULL) return NULL;
    self = PyModule_Create(&module);
#ifdef Py_GIL_DISABLED
    if (self != NULL) PyUnstable_Module_SetGIL(self, Py_MOD_GIL_NOT_USED);
#endif
    return self;
}
