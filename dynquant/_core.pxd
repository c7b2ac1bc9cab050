# What capi.pyx shares with the entries. Nothing here may name a memoryview: each module that sees one gets
# the whole of Cython's implementation of them.
from libc.stdint cimport int8_t, int32_t, uint8_t, uint64_t

from dynquant._table cimport Kernels


cdef enum:
    # Input formats, as _validate.py numbers them.
    F32 = 0
    F16 = 1
    BF16 = 2


cdef enum:
    # Metrics of a search, as _top_k.py and dynquant.h number them.
    METRIC_DOT = 0
    METRIC_COSINE = 1
    METRIC_L2 = 2


# Float input of one call: float32, or one of the 16-bit formats, which are widened block by block.
cdef struct Floats:
    const char* data
    int kind
    Py_ssize_t n


# One row of a quantized tensor. Every `group` elements have a scale, and a zero point or a minimum, unless
# the codes are symmetric and zero_points and minimums NULL. in_range: each scale is that of its group's
# largest magnitude, so that no code needs clamping.
cdef struct QuantRow:
    int8_t* codes
    const float* scales
    const uint8_t* zero_points
    const float* minimums
    Py_ssize_t group
    bint packed
    bint in_range


# The memory of a CodeMatrix; zero_points and minimums are NULL where there are none.
cdef struct CodeRows:
    int8_t* codes
    float* scales
    uint8_t* zero_points
    float* minimums
    Py_ssize_t k, group
    bint packed


# Weights of n outputs and k inputs in the form that the kernels of `table` take. With group 0 they are int8,
# and scales (n,) are not packed; otherwise 4-bit, with the scales and offsets of all panels, which are zero
# points, a byte each, or `minimums`, floats; with int8_groups they are int8, with the scales of all panels,
# and w_sums unless activations are symmetric and it is NULL. No bias where NULL.
cdef struct PackedWeights:
    const Kernels* table
    Py_ssize_t n
    Py_ssize_t k
    Py_ssize_t group
    uint8_t* panels
    float* scales
    uint8_t* offsets
    bint minimums
    const float* bias
    bint int8_groups
    int32_t* w_sums


# All that the threads of one search share. `factors` are the scales of the queries or, for the cosine, 1 over
# the norms of their codes; `norms` their squared norms, for distances.
cdef struct TopKSearch:
    const Kernels* table
    CodeRows corpus
    const float* bias  # of each vector, or NULL
    const uint8_t* allowed  # a byte for each vector, or NULL
    Py_ssize_t allowed_stride  # from one query to the next; 0 where they share one mask
    const int8_t* codes
    float* factors
    float* norms
    uint8_t* a
    uint64_t* hits  # (parts, m, keep), filled with NO_HIT
    uint8_t* parts_memory
    Py_ssize_t n, m, k, group, keep, capacity, block, parts, part_bytes, query_bytes
    int metric
    bint packs


cdef Kernels* kernels
cdef Kernels* packing_kernels() noexcept nogil
cpdef Py_ssize_t percentile_rank(double p, Py_ssize_t n) noexcept nogil
cdef bint scale_of(const Floats* x, float clip, Py_ssize_t rank, float* scale) noexcept nogil
cdef void quantize_row(const Floats* x, const QuantRow* row, int32_t clip) noexcept nogil
cdef void dequantize_row(const QuantRow* row, bint nontemporal, float* out, Py_ssize_t n) noexcept nogil
cdef bint scale_columns_of_rows(const Floats* x, const float* factors, bint divide, float* out, Py_ssize_t m,
                                Py_ssize_t k) noexcept nogil
cdef Py_ssize_t panels_of(const Kernels* table, Py_ssize_t n) noexcept nogil
cdef Py_ssize_t panel_bytes(const Kernels* table, Py_ssize_t k, Py_ssize_t group) noexcept nogil
cdef Py_ssize_t panel_scales(const Kernels* table, Py_ssize_t k, Py_ssize_t group) noexcept nogil
cdef Py_ssize_t activation_bytes(const Kernels* table, Py_ssize_t k, Py_ssize_t group) noexcept nogil
cdef void pack_weights(const PackedWeights* w, const uint8_t* codes, const float* scales,
                       const uint8_t* offsets) noexcept nogil
cdef void pack_int8_groups(const PackedWeights* w, const int8_t* codes, const float* scales) noexcept nogil
cdef bint quantize_group_row(const Kernels* table, const Floats* x, Py_ssize_t group, bint symmetric,
                             float* scale, int8_t* codes, uint8_t* a) noexcept nogil
cdef Py_ssize_t int8_inner_bytes(Py_ssize_t m, Py_ssize_t n, Py_ssize_t k) noexcept nogil
cdef void int8_inner_rows(const int8_t* a, const int8_t* b, void* out, Py_ssize_t m, Py_ssize_t n,
                          Py_ssize_t k, bint wide, uint8_t* scratch) noexcept nogil
cdef void quantize_activation(const Kernels* table, const Floats* x, float scale, Py_ssize_t group,
                              int8_t* scratch, uint8_t* a) noexcept nogil
cdef void multiply_panels(const PackedWeights* w, const uint8_t* a, const float* a_scales, float* out,
                          Py_ssize_t m, Py_ssize_t first, Py_ssize_t end) noexcept nogil
cdef void plan_search(TopKSearch* s) noexcept nogil
cdef Py_ssize_t lay_out_search(TopKSearch* s, uint8_t* base) noexcept nogil
cdef bint search_in_order(const TopKSearch* s, const float* scales) noexcept nogil
cdef float score_of_key(uint64_t key) noexcept nogil
