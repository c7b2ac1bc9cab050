# What capi.pyx shares with the entries. Nothing here may name a memoryview: each module that sees one gets
# the whole of Cython's implementation of them.
from libc.stdint cimport int8_t, int32_t, uint8_t

from dynquant._table cimport Kernels


# Float input of one call: float32, or one of the 16-bit formats, which are widened block by block.
cdef struct Floats:
    const char* data
    int kind
    Py_ssize_t n


# One row of a quantized tensor. Every `group` elements have a scale, and a zero point unless the codes are
# symmetric and zero_points NULL. `within`: each scale is that of the group's largest magnitude.
cdef struct QuantRow:
    int8_t* codes
    const float* scales
    const uint8_t* zero_points
    Py_ssize_t group
    bint packed
    bint in_range


cdef Kernels* kernels
cpdef Py_ssize_t percentile_rank(double p, Py_ssize_t n) noexcept nogil
cdef bint scale_of(const Floats* x, float clip, Py_ssize_t rank, float* scale) noexcept nogil
cdef void quantize_row(const Floats* x, const QuantRow* row, int32_t clip) noexcept nogil
cdef void dequantize_row(const QuantRow* row, bint nontemporal, float* out, Py_ssize_t n) noexcept nogil
cdef bint scale_columns_of_rows(const Floats* x, const float* factors, bint divide, float* out, Py_ssize_t m,
                                Py_ssize_t k) noexcept nogil
cdef Py_ssize_t panels_of(Py_ssize_t n) noexcept nogil
cdef void pack_panels(const int8_t* w, Py_ssize_t n, uint8_t* panels, Py_ssize_t k) noexcept nogil
cdef void quantize_activation(const Floats* x, float scale, uint8_t* a) noexcept nogil
cdef void multiply_panels(const uint8_t* panels, const float* w_scales, const float* bias, const uint8_t* a,
                          const float* a_scales, float* out, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k,
                          Py_ssize_t first, Py_ssize_t end) noexcept nogil
cdef void pack_group_panels(const uint8_t* w, const float* scales, const uint8_t* zero_points, Py_ssize_t n,
                            uint8_t* panels, float* panels_scales, uint8_t* panels_zero_points, Py_ssize_t k,
                            Py_ssize_t group) noexcept nogil
cdef void quantize_group_activation(const Floats* x, float scale, Py_ssize_t group, int8_t* codes,
                                uint8_t* a) noexcept nogil
cdef void multiply_group_panels(const uint8_t* panels, const float* scales, const uint8_t* zero_points,
                                const float* bias, const uint8_t* a, const float* a_scales, float* out,
                                Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, Py_ssize_t group,
                                Py_ssize_t first, Py_ssize_t end) noexcept nogil
