# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""The keys of an attention head, kept in int8: a Cython package that cimports dynquant's kernels.

It shows typed memoryviews handed over as pointers, loops over rows without the GIL, and a status turned into
an exception. It needs no header: neither dynquant's nor NumPy's.
"""
from dynquant.capi cimport (
    DYNQUANT_API_VERSION,
    DYNQUANT_OK,
    dynquant_api_version,
    dynquant_dequantize_row_s8_f32,
    dynquant_dot_s8s8_s64,
    dynquant_dynamic_quantize_row_f32_s8,
)
from libc.stdint cimport int8_t, int64_t

import numpy as np

if dynquant_api_version() != DYNQUANT_API_VERSION:
    raise ImportError(f"built for version {DYNQUANT_API_VERSION} of dynquant.capi")


cdef class KeyCache:
    """Up to `capacity` keys of `dim` floats, a byte a float and one scale a key; for one thread at a time."""

    cdef int8_t[:, ::1] codes
    cdef float[::1] scales
    cdef readonly Py_ssize_t used

    def __init__(self, Py_ssize_t capacity, Py_ssize_t dim):
        self.codes = np.empty((capacity, dim), np.int8)
        self.scales = np.empty(capacity, np.float32)

    def append(self, const float[:, ::1] keys not None):
        """Add keys (n, dim); none if one of them is not finite."""
        cdef Py_ssize_t i, n = keys.shape[0], dim = self.codes.shape[1]
        cdef int status = DYNQUANT_OK
        if keys.shape[1] != dim or n > self.codes.shape[0] - self.used:
            raise ValueError(f"expected at most {self.codes.shape[0] - self.used} keys of {dim} floats")
        with nogil:
            for i in range(n):
                status = dynquant_dynamic_quantize_row_f32_s8(
                    &keys[i, 0], dim, &self.codes[self.used + i, 0], &self.scales[self.used + i])
                if status != DYNQUANT_OK:
                    break
        if status != DYNQUANT_OK:
            raise ValueError(f"key {i} holds NaN or infinity")
        self.used += n

    def scores(self, const float[::1] query not None):
        """The product of `query` (dim,), quantized too, with every key: exact integer sums, then scaled."""
        cdef Py_ssize_t i, dim = self.codes.shape[1]
        cdef int8_t[::1] codes = np.empty(dim, np.int8)
        cdef float[::1] out = np.empty(self.used, np.float32)
        cdef float scale
        cdef int64_t product
        if query.shape[0] != dim:
            raise ValueError(f"expected {dim} floats")
        if dynquant_dynamic_quantize_row_f32_s8(&query[0], dim, &codes[0], &scale) != DYNQUANT_OK:
            raise ValueError("query holds NaN or infinity")
        with nogil:
            for i in range(self.used):
                product = dynquant_dot_s8s8_s64(&self.codes[i, 0], &codes[0], dim)
                out[i] = <float> product * self.scales[i] * scale
        return np.asarray(out)

    def key(self, Py_ssize_t i):
        """Key i as float32."""
        cdef float[::1] out = np.empty(self.codes.shape[1], np.float32)
        if not 0 <= i < self.used:
            raise IndexError(i)
        dynquant_dequantize_row_s8_f32(&self.codes[i, 0], out.shape[0], self.scales[i], &out[0])
        return np.asarray(out)
