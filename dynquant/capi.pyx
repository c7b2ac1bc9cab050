"""The row kernels for other packages: cimported from capi.pxd, or by the table that dynquant.h describes."""

# There is one implementation: the functions that capi.pxd exports are those that the table points to. The C
# compiler checks them against dynquant.h, and Cython against capi.pxd. A test compares both with a stored
# list of signatures, so that none changes by accident.
#
# The kernels behind them have preconditions (the length of a block, a scale above 0, aligned panels, finite
# input). These functions have none but valid pointers: each checks lengths and numbers first, then the
# arrays, and writes only when nothing can go wrong any more.
from cpython.pycapsule cimport PyCapsule_New
from cpython.pyport cimport PY_SSIZE_T_MAX
from libc.float cimport FLT_MAX
from libc.math cimport INFINITY
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libc.string cimport memchr, memset

from dynquant._core cimport (
    F32,
    METRIC_DOT,
    METRIC_L2,
    Floats,
    PackedWeights,
    QuantRow,
    TopKSearch,
    activation_bytes,
    dequantize_row,
    int8_inner_bytes,
    int8_inner_rows,
    kernels,
    lay_out_search,
    multiply_panels,
    pack_int8_groups,
    pack_weights,
    packing_kernels,
    panel_bytes,
    panel_scales,
    panels_of,
    percentile_rank,
    plan_search,
    quantize_activation,
    quantize_group_row,
    quantize_row,
    scale_columns_of_rows,
    scale_of,
    score_of_key,
    search_in_order,
)
from dynquant._table cimport NON_FINITE, Kernels, groups_of


cdef extern from "include/dynquant.h" nogil:
    ctypedef struct dynquant_api:
        int32_t version
        int32_t size
        int (*amax_f32)(const float* x, int64_t n, float* amax) noexcept
        int (*percentile_f32)(const float* x, int64_t n, double p, float* magnitude) noexcept
        int (*amax_scale_f32)(const float* x, int64_t n, float clip, float* scale) noexcept
        int (*percentile_scale_f32)(const float* x, int64_t n, double p, float clip, float* scale) noexcept
        int (*quantize_row_f32_s8)(const float* x, int64_t n, float scale, int32_t clip,
                                   int8_t* codes) noexcept
        int (*quantize_row_f32_s4)(const float* x, int64_t n, float scale, uint8_t* packed) noexcept
        int (*dynamic_quantize_row_f32_s8)(const float* x, int64_t n, int8_t* codes, float* scale) noexcept
        int (*dynamic_quantize_row_f32_s4)(const float* x, int64_t n, uint8_t* packed, float* scale) noexcept
        int (*dequantize_row_s8_f32)(const int8_t* codes, int64_t n, float scale, float* out) noexcept
        int (*dequantize_row_s4_f32)(const uint8_t* packed, int64_t n, float scale, float* out) noexcept
        int64_t (*dot_s8s8_s64)(const int8_t* a, const int8_t* b, int64_t n) noexcept
        int (*w8a8_matvec)(const int8_t* w, const float* w_scales, int64_t n, int64_t k, const int8_t* a,
                           float a_scale, float* out) noexcept
        int64_t (*w8a8_packed_bytes)(int64_t n, int64_t k) noexcept
        int (*w8a8_pack)(const int8_t* w, int64_t n, int64_t k, void* packed) noexcept
        int64_t (*w8a8_scratch_bytes)(int64_t m, int64_t k) noexcept
        int (*w8a8_matmul)(const void* packed, const float* w_scales, const float* bias, const float* x,
                           int64_t m, int64_t n, int64_t k, void* scratch, float* out) noexcept
        int (*divide_rows_f32)(const float* x, const float* factors, int64_t m, int64_t k,
                               float* out) noexcept
        int (*multiply_rows_f32)(const float* x, const float* factors, int64_t m, int64_t k,
                                 float* out) noexcept
        int64_t (*w4a8_packed_bytes)(int64_t n, int64_t k, int64_t group_size) noexcept
        int (*w4a8_pack)(const uint8_t* w, const float* w_scales, const uint8_t* zero_points, int64_t n,
                         int64_t k, int64_t group_size, void* packed) noexcept
        int64_t (*w4a8_scratch_bytes)(int64_t m, int64_t k, int64_t group_size) noexcept
        int (*w4a8_matmul)(const void* packed, const float* bias, const float* x, int64_t m, int64_t n,
                           int64_t k, int64_t group_size, void* scratch, float* out) noexcept
        int64_t (*w4a8_minimums_packed_bytes)(int64_t n, int64_t k, int64_t group_size) noexcept
        int (*w4a8_minimums_pack)(const uint8_t* w, const float* w_scales, const float* minimums, int64_t n,
                                  int64_t k, int64_t group_size, void* packed) noexcept
        int64_t (*w8a8_groups_packed_bytes)(int64_t n, int64_t k, int64_t group_size,
                                            int32_t symmetric) noexcept
        int (*w8a8_groups_pack)(const int8_t* w, const float* w_scales, int64_t n, int64_t k,
                                int64_t group_size, int32_t symmetric, void* packed) noexcept
        int64_t (*w8a8_groups_scratch_bytes)(int64_t m, int64_t k, int64_t group_size) noexcept
        int (*w8a8_groups_matmul)(const void* packed, const float* bias, const float* x, int64_t m, int64_t n,
                                  int64_t k, int64_t group_size, int32_t symmetric, void* scratch,
                                  float* out) noexcept
        int64_t (*int8_inner_scratch_bytes)(int64_t m, int64_t n, int64_t k) noexcept
        int (*int8_inner_s32)(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k,
                              void* scratch, int32_t* out) noexcept
        int (*int8_inner_s64)(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k,
                              void* scratch, int64_t* out) noexcept
        int64_t (*top_k_scratch_bytes)(int64_t m, int64_t n, int64_t d, int32_t bits, int64_t group_size,
                                       int64_t k) noexcept
        int (*top_k)(const float* queries, const void* codes, const float* scales, const uint8_t* zero_points,
                     const float* bias, const uint8_t* allowed, int64_t allowed_stride, int64_t m, int64_t n,
                     int64_t d, int32_t bits, int64_t group_size, int32_t metric, int64_t k, void* scratch,
                     float* found, int64_t* indices) noexcept


cdef extern from "kernels/simd/simd.h" nogil:
    float dq_float(int32_t b)


cdef enum:
    LINE = 64


cdef int32_t dynquant_api_version() noexcept nogil:
    return DYNQUANT_API_VERSION


# ---------------------------------------------------------------------------------------------------------
# Checks of arguments


# Whether n floats can lie in memory.
cdef inline bint is_length(int64_t n) noexcept nogil:
    return 0 <= n <= PY_SSIZE_T_MAX >> 2


# The same for m rows of n.
cdef inline bint is_shape(int64_t m, int64_t n) noexcept nogil:
    return is_length(m) and is_length(n) and (n == 0 or m <= (PY_SSIZE_T_MAX >> 2) // n)


# False for NaN, which fails every comparison.
cdef inline bint is_finite(float value) noexcept nogil:
    return -FLT_MAX <= value <= FLT_MAX


cdef inline bint all_finite(const float* x, Py_ssize_t n) noexcept nogil:
    return kernels.amax_bits_f32(x, n) < NON_FINITE


cdef inline Floats floats(const float* x, Py_ssize_t n) noexcept nogil:
    cdef Floats row
    row.data, row.kind, row.n = <const char*> x, F32, n
    return row


# ---------------------------------------------------------------------------------------------------------
# Magnitudes and scales


# *scale = the magnitude at `rank`, or the largest one if that is negative, over clip.
cdef inline int scale_row(const float* x, int64_t n, Py_ssize_t rank, float clip,
                          float* scale) noexcept nogil:
    cdef Floats row = floats(x, n)
    cdef float found
    if not scale_of(&row, clip, rank, &found):
        return DYNQUANT_NON_FINITE
    if not is_finite(found):
        return DYNQUANT_BAD_ARGUMENT
    scale[0] = found
    return DYNQUANT_OK


cdef int dynquant_amax_f32(const float* x, int64_t n, float* amax) noexcept nogil:
    cdef int32_t bits
    if not is_length(n):
        return DYNQUANT_BAD_ARGUMENT
    bits = kernels.amax_bits_f32(x, n)
    if bits >= NON_FINITE:
        return DYNQUANT_NON_FINITE
    amax[0] = dq_float(bits)
    return DYNQUANT_OK


cdef int dynquant_percentile_f32(const float* x, int64_t n, double p, float* magnitude) noexcept nogil:
    return dynquant_percentile_scale_f32(x, n, p, 1, magnitude)


cdef int dynquant_amax_scale_f32(const float* x, int64_t n, float clip, float* scale) noexcept nogil:
    if not (is_length(n) and 0 < clip <= FLT_MAX):
        return DYNQUANT_BAD_ARGUMENT
    return scale_row(x, n, -1, clip, scale)


cdef int dynquant_percentile_scale_f32(const float* x, int64_t n, double p, float clip,
                                       float* scale) noexcept nogil:
    if not (is_length(n) and 0 < p <= 1 and 0 < clip <= FLT_MAX):
        return DYNQUANT_BAD_ARGUMENT
    return scale_row(x, n, percentile_rank(p, n) if n else -1, clip, scale)


# ---------------------------------------------------------------------------------------------------------
# Codes


# n codes that share a scale.
cdef inline QuantRow row_of_codes(const int8_t* codes, const float* scale, bint packed,
                                  int64_t n) noexcept nogil:
    cdef QuantRow row
    row.codes, row.scales, row.zero_points, row.minimums = <int8_t*> codes, scale, NULL, NULL
    row.packed = packed
    row.group, row.in_range = n if n > 0 else 1, False
    return row


cdef inline int quantize_given(const float* x, int64_t n, float scale, int32_t clip, bint packed,
                               int8_t* codes) noexcept nogil:
    cdef Floats row = floats(x, n)
    cdef QuantRow coded = row_of_codes(codes, &scale, packed, n)
    if not (is_length(n) and 0 <= scale <= FLT_MAX and 1 <= clip <= 127):
        return DYNQUANT_BAD_ARGUMENT
    if not all_finite(x, n):
        return DYNQUANT_NON_FINITE
    quantize_row(&row, &coded, clip)
    return DYNQUANT_OK


cdef inline int quantize_dynamic(const float* x, int64_t n, int32_t clip, bint packed, int8_t* codes,
                                 float* scale) noexcept nogil:
    cdef Floats row = floats(x, n)
    cdef QuantRow coded = row_of_codes(codes, scale, packed, n)
    cdef int status = dynquant_amax_scale_f32(x, n, clip, scale)
    coded.in_range = True
    if status == DYNQUANT_OK:
        quantize_row(&row, &coded, clip)
    return status


cdef int dynquant_quantize_row_f32_s8(const float* x, int64_t n, float scale, int32_t clip,
                                      int8_t* codes) noexcept nogil:
    return quantize_given(x, n, scale, clip, False, codes)


cdef int dynquant_quantize_row_f32_s4(const float* x, int64_t n, float scale, uint8_t* packed) noexcept nogil:
    return quantize_given(x, n, scale, 7, True, <int8_t*> packed)


cdef int dynquant_dynamic_quantize_row_f32_s8(const float* x, int64_t n, int8_t* codes,
                                              float* scale) noexcept nogil:
    return quantize_dynamic(x, n, 127, False, codes, scale)


cdef int dynquant_dynamic_quantize_row_f32_s4(const float* x, int64_t n, uint8_t* packed,
                                              float* scale) noexcept nogil:
    return quantize_dynamic(x, n, 7, True, <int8_t*> packed, scale)


cdef int dynquant_dequantize_row_s8_f32(const int8_t* codes, int64_t n, float scale,
                                        float* out) noexcept nogil:
    cdef QuantRow row = row_of_codes(codes, &scale, False, n)
    if not (is_length(n) and is_finite(scale)):
        return DYNQUANT_BAD_ARGUMENT
    dequantize_row(&row, False, out, n)
    return DYNQUANT_OK


cdef int dynquant_dequantize_row_s4_f32(const uint8_t* packed, int64_t n, float scale,
                                        float* out) noexcept nogil:
    cdef QuantRow row = row_of_codes(<const int8_t*> packed, &scale, True, n)
    if not (is_length(n) and is_finite(scale)):
        return DYNQUANT_BAD_ARGUMENT
    dequantize_row(&row, False, out, n)
    return DYNQUANT_OK


# ---------------------------------------------------------------------------------------------------------
# Integer products


cdef int64_t dynquant_dot_s8s8_s64(const int8_t* a, const int8_t* b, int64_t n) noexcept nogil:
    return kernels.dot_s8s8_s64(a, b, n) if 0 < n <= PY_SSIZE_T_MAX else 0


# The kernel takes activations in [-127, 127], as codes are. With -128 among them each row is a dot product.
cdef int dynquant_w8a8_matvec(const int8_t* w, const float* w_scales, int64_t n, int64_t k, const int8_t* a,
                              float a_scale, float* out) noexcept nogil:
    cdef Py_ssize_t r
    if not (is_shape(n, k) and is_finite(a_scale)):
        return DYNQUANT_BAD_ARGUMENT
    if not all_finite(w_scales, n):
        return DYNQUANT_NON_FINITE
    if k == 0:
        memset(out, 0, n * sizeof(float))
    elif memchr(a, 0x80, k) == NULL:
        kernels.matvec_s8s8_f32(w, w_scales, a, a_scale, out, n, k)
    else:
        for r in range(n):
            out[r] = <float> kernels.dot_s8s8_s64(w + r * k, a, k) * w_scales[r] * a_scale
    return DYNQUANT_OK


# Packed weights: a label in the first cache line that begins in the caller's memory, then the panels. The
# address of the kernels in the label stands for the form of the panels, so no other process and no other
# instruction set takes them. In bytes that were moved to an address with another offset in its line, the
# label is not found.
cdef struct Label:
    const Kernels* form
    int64_t n
    int64_t k
    int64_t group
    int64_t kind


# Kinds of packed weights.
cdef enum:
    PLAIN = 0  # int8, or 4-bit with zero points
    MINIMUMS = 1  # 4-bit
    INT8_GROUPS = 2
    INT8_GROUPS_ASYMMETRIC = 3  # for activations with a zero point


cdef inline void write_label(const void* packed, int64_t n, int64_t k, int64_t group,
                             int64_t kind) noexcept nogil:
    cdef Label* label = <Label*> line_of(packed)
    label.form, label.n, label.k, label.group, label.kind = kernels, n, k, group, kind


cdef inline char* line_of(const void* memory) noexcept nogil:
    return <char*> memory + (-<uintptr_t> memory & (LINE - 1))


# Bytes for `count` items, the line before them and the padding before that; -1 if beyond the address space.
cdef inline int64_t bytes_of(int64_t count, int64_t item_bytes) noexcept nogil:
    return LINE - 1 + LINE + count * item_bytes if is_shape(count, item_bytes) else -1


cdef int64_t dynquant_w8a8_packed_bytes(int64_t n, int64_t k) noexcept nogil:
    # Within these lengths the bytes of one panel cannot overflow.
    if not (is_length(n) and is_shape(k, 2 * LINE)):
        return -1
    return bytes_of(panels_of(packing_kernels(), n), packing_kernels().panel_bytes(k))


# The weights in memory that is packed, or is about to be; group 0 for plain ones with 8 bits.
cdef inline PackedWeights weights_in(const void* packed, int64_t n, int64_t k, int64_t group,
                                     int64_t kind) noexcept nogil:
    cdef PackedWeights w
    cdef Py_ssize_t panels = panels_of(kernels, n)
    w.table, w.n, w.k, w.group, w.int8_groups, w.w_sums = kernels, n, k, group, kind >= INT8_GROUPS, NULL
    w.panels = <uint8_t*> line_of(packed) + LINE
    w.scales, w.offsets, w.bias, w.minimums = NULL, NULL, NULL, kind == MINIMUMS
    if w.int8_groups:
        w.scales = <float*> (w.panels + panels * kernels.s8_group_panel_bytes(k, group))
        if kind == INT8_GROUPS_ASYMMETRIC:
            w.w_sums = <int32_t*> (w.scales + panels * panel_scales(kernels, k, group))
    elif group:
        w.scales = <float*> (w.panels + panels_of(kernels, n) * panel_bytes(kernels, k, group))
        w.offsets = <uint8_t*> (w.scales + panels_of(kernels, n) * panel_scales(kernels, k, group))
    return w


cdef int dynquant_w8a8_pack(const int8_t* w, int64_t n, int64_t k, void* packed) noexcept nogil:
    cdef PackedWeights weights
    if dynquant_w8a8_packed_bytes(n, k) < 0:
        return DYNQUANT_BAD_ARGUMENT
    write_label(packed, n, k, 0, PLAIN)
    if k:
        weights = weights_in(packed, n, k, 0, PLAIN)
        pack_weights(&weights, <const uint8_t*> w, NULL, NULL)
    return DYNQUANT_OK


cdef inline bint is_packed(const void* packed, int64_t n, int64_t k, int64_t group,
                           int64_t kind) noexcept nogil:
    cdef const Label* label = <const Label*> line_of(packed)
    return (label.form == kernels and label.n == n and label.k == k and label.group == group
            and label.kind == kind)


# A scale and a row of activations for each row of x: scales first, then the rows, from the next line on.
cdef int64_t dynquant_w8a8_scratch_bytes(int64_t m, int64_t k) noexcept nogil:
    if not is_shape(k, 2 * LINE):
        return -1
    return bytes_of(m, packing_kernels().activation_bytes(k) + <int64_t> sizeof(float))


# scales (m,) and a (m, activation_bytes) of the rows of x; scratch as quantize_activation takes it.
cdef int quantize_activations(const float* x, int64_t m, int64_t k, int64_t group, float* scales, uint8_t* a,
                              int8_t* scratch) noexcept nogil:
    cdef Py_ssize_t r, width = activation_bytes(kernels, k, group)
    cdef Floats row
    cdef int status
    for r in range(m):
        status = scale_row(x + r * k, k, -1, 127, &scales[r])
        if status != DYNQUANT_OK:
            return status
        row = floats(x + r * k, k)
        quantize_activation(kernels, &row, scales[r], group, scratch, a + r * width)
    if group == 0:
        kernels.arrange_activations_s8(a, m, k)
    return DYNQUANT_OK


# out (m, n) of products over k = 0: zeros with the signs of w_scales, or plain ones if that is NULL, plus
# bias.
cdef void fill_rows(const float* w_scales, const float* bias, int64_t m, int64_t n,
                    float* out) noexcept nogil:
    cdef Py_ssize_t r, c
    cdef float zero = 0
    for r in range(m):
        for c in range(n):
            if w_scales != NULL:
                zero = <float> 0.0 * w_scales[c]
            out[r * n + c] = zero if bias == NULL else zero + bias[c]


cdef int dynquant_w8a8_matmul(const void* packed, const float* w_scales, const float* bias, const float* x,
                              int64_t m, int64_t n, int64_t k, void* scratch, float* out) noexcept nogil:
    cdef float* a_scales = <float*> line_of(scratch)
    cdef uint8_t* a
    cdef int status
    cdef PackedWeights w
    if not (is_shape(m, n) and is_shape(m, k) and dynquant_w8a8_scratch_bytes(m, k) >= 0
            and is_packed(packed, n, k, 0, PLAIN)):
        return DYNQUANT_BAD_ARGUMENT
    if not (all_finite(w_scales, n) and (bias == NULL or all_finite(bias, n))):
        return DYNQUANT_NON_FINITE
    if k == 0:
        fill_rows(w_scales, bias, m, n, out)
        return DYNQUANT_OK
    a = <uint8_t*> line_of(a_scales + m)
    status = quantize_activations(x, m, k, 0, a_scales, a, NULL)
    if status == DYNQUANT_OK:
        w = weights_in(packed, n, k, 0, PLAIN)
        w.scales, w.bias = <float*> w_scales, bias
        multiply_panels(&w, a, a_scales, out, m, 0, panels_of(kernels, n))
    return status


# ---------------------------------------------------------------------------------------------------------
# Smoothing


cdef inline int scale_columns(const float* x, const float* factors, int64_t m, int64_t k, bint divide,
                              float* out) noexcept nogil:
    cdef Py_ssize_t j
    cdef bint above = True
    cdef Floats rows
    if not is_shape(m, k):
        return DYNQUANT_BAD_ARGUMENT
    if not all_finite(factors, k):
        return DYNQUANT_NON_FINITE
    for j in range(k):
        above &= factors[j] > 0
    if not above:
        return DYNQUANT_BAD_ARGUMENT if all_finite(x, m * k) else DYNQUANT_NON_FINITE
    rows = floats(x, m * k)
    return DYNQUANT_OK if scale_columns_of_rows(&rows, factors, divide, out, m, k) else DYNQUANT_NON_FINITE


cdef int dynquant_divide_rows_f32(const float* x, const float* factors, int64_t m, int64_t k,
                                  float* out) noexcept nogil:
    return scale_columns(x, factors, m, k, True, out)


cdef int dynquant_multiply_rows_f32(const float* x, const float* factors, int64_t m, int64_t k,
                                    float* out) noexcept nogil:
    return scale_columns(x, factors, m, k, False, out)


# ---------------------------------------------------------------------------------------------------------
# Products with 4-bit weights


# At most the length of a row, so that a huge group_size does not make huge results.
cdef inline int64_t group_of(int64_t k, int64_t group_size) noexcept nogil:
    return group_size if group_size < k else k


# With offsets of `offset_size` bytes. A weight that is a group of its own takes up to twelve bytes, and
# outputs are filled up to a panel.
cdef inline int64_t packed_4_bit_bytes(int64_t n, int64_t k, int64_t group_size,
                                       int64_t offset_size) noexcept nogil:
    cdef int64_t group = group_of(k, group_size)
    if not (group_size > 0 and is_length(n) and is_shape(k, 16 * LINE)
            and is_shape(n + LINE, 16 * k if k else 1)):
        return -1
    if k == 0:
        return bytes_of(0, 0)
    return bytes_of(panels_of(packing_kernels(), n), panel_bytes(packing_kernels(), k, group)
                    + panel_scales(packing_kernels(), k, group) * (<int64_t> sizeof(float) + offset_size))


cdef int64_t dynquant_w4a8_packed_bytes(int64_t n, int64_t k, int64_t group_size) noexcept nogil:
    return packed_4_bit_bytes(n, k, group_size, 1)


cdef int64_t dynquant_w4a8_minimums_packed_bytes(int64_t n, int64_t k, int64_t group_size) noexcept nogil:
    return packed_4_bit_bytes(n, k, group_size, sizeof(float))


# Whether all bytes are in [0, largest], which is a power of two less 1.
cdef inline bint are_within(const uint8_t* codes, int64_t n, uint8_t largest) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint8_t bits = 0
    for i in range(n):
        bits |= codes[i]
    return bits <= largest


cdef int dynquant_w4a8_pack(const uint8_t* w, const float* w_scales, const uint8_t* zero_points, int64_t n,
                            int64_t k, int64_t group_size, void* packed) noexcept nogil:
    cdef int64_t n_scales
    if dynquant_w4a8_packed_bytes(n, k, group_size) < 0:
        return DYNQUANT_BAD_ARGUMENT
    n_scales = scales_of(n, k, group_size)
    if not all_finite(w_scales, n_scales):
        return DYNQUANT_NON_FINITE
    if zero_points != NULL and not are_within(zero_points, n_scales, 15):
        return DYNQUANT_BAD_ARGUMENT
    pack_4_bit(w, w_scales, zero_points, n, k, group_size, PLAIN, packed)
    return DYNQUANT_OK


cdef int dynquant_w4a8_minimums_pack(const uint8_t* w, const float* w_scales, const float* minimums,
                                     int64_t n, int64_t k, int64_t group_size, void* packed) noexcept nogil:
    cdef int64_t n_scales
    if dynquant_w4a8_minimums_packed_bytes(n, k, group_size) < 0:
        return DYNQUANT_BAD_ARGUMENT
    n_scales = scales_of(n, k, group_size)
    if not (all_finite(w_scales, n_scales) and all_finite(minimums, n_scales)):
        return DYNQUANT_NON_FINITE
    pack_4_bit(w, w_scales, <const uint8_t*> minimums, n, k, group_size, MINIMUMS, packed)
    return DYNQUANT_OK


# Scales of weights (n, k).
cdef inline int64_t scales_of(int64_t n, int64_t k, int64_t group_size) noexcept nogil:
    return n * groups_of(k, group_of(k, group_size)) if k else 0


cdef inline void pack_4_bit(const uint8_t* w, const float* w_scales, const uint8_t* offsets, int64_t n,
                            int64_t k, int64_t group_size, int64_t kind, void* packed) noexcept nogil:
    cdef PackedWeights weights
    write_label(packed, n, k, group_size, kind)
    if k:
        weights = weights_in(packed, n, k, group_of(k, group_size), kind)
        pack_weights(&weights, w, w_scales, offsets)


# For each row its scale and its activations as the kernel takes them; and the codes of one row.
cdef int64_t dynquant_w4a8_scratch_bytes(int64_t m, int64_t k, int64_t group_size) noexcept nogil:
    if not (group_size > 0 and is_shape(k, 16 * LINE)):
        return -1
    if k == 0:
        return bytes_of(m, <int64_t> sizeof(float))
    return bytes_of(m + 1, packing_kernels().group_activation_bytes(k, group_of(k, group_size))
                    + <int64_t> sizeof(float)) if is_length(m) else -1


cdef int dynquant_w4a8_matmul(const void* packed, const float* bias, const float* x, int64_t m, int64_t n,
                              int64_t k, int64_t group_size, void* scratch, float* out) noexcept nogil:
    cdef int64_t group = group_of(k, group_size)
    cdef float* a_scales = <float*> line_of(scratch)
    cdef uint8_t* a
    cdef PackedWeights w
    cdef int64_t kind = PLAIN
    cdef int status
    if not (is_shape(m, n) and is_shape(m, k) and dynquant_w4a8_scratch_bytes(m, k, group_size) >= 0):
        return DYNQUANT_BAD_ARGUMENT
    if not is_packed(packed, n, k, group_size, PLAIN):
        kind = MINIMUMS
        if not is_packed(packed, n, k, group_size, MINIMUMS):
            return DYNQUANT_BAD_ARGUMENT
    if bias != NULL and not all_finite(bias, n):
        return DYNQUANT_NON_FINITE
    if k == 0:
        fill_rows(NULL, bias, m, n, out)
        return DYNQUANT_OK
    a = <uint8_t*> line_of(a_scales + m)
    status = quantize_activations(x, m, k, group, a_scales, a,
                                  <int8_t*> a + m * activation_bytes(kernels, k, group))
    if status == DYNQUANT_OK:
        w = weights_in(packed, n, k, group, kind)
        w.bias = bias
        multiply_panels(&w, a, a_scales, out, m, 0, panels_of(kernels, n))
    return status


# ---------------------------------------------------------------------------------------------------------
# Products with 8-bit weights in groups, and with activations that have a zero point


# A flag as the kind of weights.
cdef inline int64_t kind_of(int32_t symmetric) noexcept nogil:
    return INT8_GROUPS if symmetric else INT8_GROUPS_ASYMMETRIC


cdef int64_t dynquant_w8a8_groups_packed_bytes(int64_t n, int64_t k, int64_t group_size,
                                               int32_t symmetric) noexcept nogil:
    cdef int64_t group = group_of(k, group_size), width
    # A weight that is a group of its own takes eight bytes, a scale and a sum; see w4a8_packed_bytes.
    if not (group_size > 0 and is_length(n) and is_shape(k, 16 * LINE)
            and is_shape(n + LINE, 16 * k if k else 1)):
        return -1
    if k == 0:
        return bytes_of(0, 0)
    width = packing_kernels().s8_group_panel_bytes(k, group)
    width += panel_scales(packing_kernels(), k, group) * <int64_t> sizeof(float)
    if not symmetric:
        width += (packing_kernels().s8_group_segments(k, group) * packing_kernels().panel_outputs
                  * <int64_t> sizeof(int32_t))
    return bytes_of(panels_of(packing_kernels(), n), width)


cdef int dynquant_w8a8_groups_pack(const int8_t* w, const float* w_scales, int64_t n, int64_t k,
                                   int64_t group_size, int32_t symmetric, void* packed) noexcept nogil:
    cdef PackedWeights weights
    if dynquant_w8a8_groups_packed_bytes(n, k, group_size, symmetric) < 0:
        return DYNQUANT_BAD_ARGUMENT
    if not all_finite(w_scales, scales_of(n, k, group_size)):
        return DYNQUANT_NON_FINITE
    write_label(packed, n, k, group_size, kind_of(symmetric))
    if k:
        weights = weights_in(packed, n, k, group_of(k, group_size), kind_of(symmetric))
        pack_int8_groups(&weights, w, w_scales)
    return DYNQUANT_OK


# As w4a8_scratch_bytes.
cdef int64_t dynquant_w8a8_groups_scratch_bytes(int64_t m, int64_t k, int64_t group_size) noexcept nogil:
    if not (group_size > 0 and is_shape(k, 64 * LINE)):
        return -1
    if k == 0:
        return bytes_of(m, <int64_t> sizeof(float))
    return bytes_of(m + 1, packing_kernels().s8_group_activation_bytes(k, group_of(k, group_size))
                    + <int64_t> sizeof(float)) if is_length(m) else -1


cdef int dynquant_w8a8_groups_matmul(const void* packed, const float* bias, const float* x, int64_t m,
                                     int64_t n, int64_t k, int64_t group_size, int32_t symmetric,
                                     void* scratch, float* out) noexcept nogil:
    cdef int64_t group = group_of(k, group_size), kind = kind_of(symmetric)
    cdef float* a_scales = <float*> line_of(scratch)
    cdef uint8_t* a
    cdef Py_ssize_t r, width
    cdef Floats row
    cdef PackedWeights w
    if not (is_shape(m, n) and is_shape(m, k) and dynquant_w8a8_groups_scratch_bytes(m, k, group_size) >= 0
            and is_packed(packed, n, k, group_size, kind)):
        return DYNQUANT_BAD_ARGUMENT
    if not (all_finite(x, m * k) and (bias == NULL or all_finite(bias, n))):
        return DYNQUANT_NON_FINITE
    if k == 0:
        fill_rows(NULL, bias, m, n, out)
        return DYNQUANT_OK
    a, width = <uint8_t*> line_of(a_scales + m), kernels.s8_group_activation_bytes(k, group)
    for r in range(m):
        row = floats(x + r * k, k)
        if not quantize_group_row(kernels, &row, group, symmetric != 0, &a_scales[r], <int8_t*> a + m * width,
                                  a + r * width):
            return DYNQUANT_BAD_ARGUMENT  # the range of a row is beyond float32
    w = weights_in(packed, n, k, group, kind)
    w.bias = bias
    multiply_panels(&w, a, a_scales, out, m, 0, panels_of(kernels, n))
    return DYNQUANT_OK


# ---------------------------------------------------------------------------------------------------------
# Products of int8 matrices


cdef int64_t dynquant_int8_inner_scratch_bytes(int64_t m, int64_t n, int64_t k) noexcept nogil:
    if not (is_shape(m, n) and is_shape(m, k) and is_shape(n, k) and is_shape(k, 64 * LINE)):
        return -1
    return LINE - 1 + int8_inner_bytes(m, n, k)


cdef int dynquant_int8_inner_s32(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k,
                                 void* scratch, int32_t* out) noexcept nogil:
    # The most products of 2**14 that an int32 holds.
    if k > 0x7FFFFFFF >> 14 or dynquant_int8_inner_scratch_bytes(m, n, k) < 0:
        return DYNQUANT_BAD_ARGUMENT
    int8_inner_rows(a, b, out, m, n, k, False, <uint8_t*> line_of(scratch))
    return DYNQUANT_OK


cdef int dynquant_int8_inner_s64(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k,
                                 void* scratch, int64_t* out) noexcept nogil:
    if dynquant_int8_inner_scratch_bytes(m, n, k) < 0:
        return DYNQUANT_BAD_ARGUMENT
    int8_inner_rows(a, b, out, m, n, k, True, <uint8_t*> line_of(scratch))
    return DYNQUANT_OK


# ---------------------------------------------------------------------------------------------------------
# Search


# The last bound is more than a query's codes, reservoir and hits take, so that no size overflows.
cdef inline bint is_search(int64_t m, int64_t n, int64_t d, int32_t bits, int64_t group_size,
                           int64_t k) noexcept nogil:
    return (d > 0 and (bits == 4 and group_size > 0 or bits == 8 and group_size >= d)
            and n < <int64_t> 1 << 32 and is_shape(n, d) and is_shape(d, 64 * LINE) and is_shape(m, k)
            and is_shape(m, 32 * LINE * d + 32 * (n + LINE)))


cdef inline TopKSearch search_of(int64_t m, int64_t n, int64_t d, int32_t bits, int64_t group_size,
                                 int64_t k) noexcept nogil:
    cdef TopKSearch s
    s.table, s.corpus.packed = packing_kernels(), bits == 4
    s.corpus.k, s.corpus.group = d, group_of(d, group_size)
    s.m, s.n, s.k, s.keep, s.parts = m, n, d, k if k < n else n, 1
    plan_search(&s)
    return s


# What a search takes, then the hits, and the scales and codes of the queries.
cdef int64_t dynquant_top_k_scratch_bytes(int64_t m, int64_t n, int64_t d, int32_t bits, int64_t group_size,
                                          int64_t k) noexcept nogil:
    cdef TopKSearch s
    if not is_search(m, n, d, bits, group_size, k):
        return -1
    s = search_of(m, n, d, bits, group_size, k)
    return (LINE - 1 + lay_out_search(&s, NULL)
            + m * (s.keep * <int64_t> sizeof(uint64_t) + <int64_t> sizeof(float) + d))


cdef int dynquant_top_k(const float* queries, const void* codes, const float* scales,
                        const uint8_t* zero_points, const float* bias, const uint8_t* allowed,
                        int64_t allowed_stride, int64_t m, int64_t n, int64_t d, int32_t bits,
                        int64_t group_size, int32_t metric, int64_t k, void* scratch, float* found,
                        int64_t* indices) noexcept nogil:
    cdef TopKSearch s
    cdef Py_ssize_t q
    cdef int64_t n_scales
    cdef float* q_scales
    cdef int8_t* q_codes
    if not (is_search(m, n, d, bits, group_size, k) and METRIC_DOT <= metric <= METRIC_L2
            and (bias == NULL or metric == METRIC_DOT) and (zero_points == NULL or bits == 4)
            and (allowed == NULL or allowed_stride == 0 or allowed_stride == n and is_shape(m, n))):
        return DYNQUANT_BAD_ARGUMENT
    n_scales = scales_of(n, d, group_size)
    if not (all_finite(queries, m * d) and all_finite(scales, n_scales)
            and (bias == NULL or all_finite(bias, n))):
        return DYNQUANT_NON_FINITE
    if not ((zero_points == NULL or are_within(zero_points, n_scales, 15))
            and (allowed == NULL or are_within(allowed, m * n if allowed_stride else n, 1))):
        return DYNQUANT_BAD_ARGUMENT
    s = search_of(m, n, d, bits, group_size, k)
    s.corpus.codes, s.corpus.scales = <int8_t*> codes, <float*> scales
    s.corpus.zero_points, s.corpus.minimums = <uint8_t*> zero_points, NULL
    s.metric, s.bias, s.allowed, s.allowed_stride = metric, bias, allowed, allowed_stride
    s.hits = <uint64_t*> (line_of(scratch) + lay_out_search(&s, <uint8_t*> line_of(scratch)))
    q_scales = <float*> (s.hits + m * s.keep)
    q_codes = <int8_t*> (q_scales + m)
    for q in range(m):
        quantize_dynamic(queries + q * d, d, 127, False, q_codes + q * d, &q_scales[q])
    s.codes = q_codes
    if m and s.keep and not search_in_order(&s, q_scales):
        return DYNQUANT_BAD_ARGUMENT
    for q in range(m):
        read_hits(s.hits + q * s.keep, s.keep, k, metric == METRIC_L2, found + q * k, indices + q * k)
    return DYNQUANT_OK


# Scores and indices (k,) of n keys, in their order; distances are negative in keys.
cdef inline void read_hits(const uint64_t* keys, int64_t n, int64_t k, bint distances, float* found,
                           int64_t* indices) noexcept nogil:
    cdef Py_ssize_t i
    cdef float score
    for i in range(k):
        score, indices[i] = -INFINITY, -1
        if i < n and keys[i] != <uint64_t> -1:
            score, indices[i] = score_of_key(keys[i]), <int64_t> (keys[i] & <uint64_t> 0xFFFFFFFF)
        found[i] = <float> 0 - score if distances else score


# ---------------------------------------------------------------------------------------------------------
# The table


cdef dynquant_api table
table.version = DYNQUANT_API_VERSION
table.size = sizeof(table)
table.amax_f32 = dynquant_amax_f32
table.percentile_f32 = dynquant_percentile_f32
table.amax_scale_f32 = dynquant_amax_scale_f32
table.percentile_scale_f32 = dynquant_percentile_scale_f32
table.quantize_row_f32_s8 = dynquant_quantize_row_f32_s8
table.quantize_row_f32_s4 = dynquant_quantize_row_f32_s4
table.dynamic_quantize_row_f32_s8 = dynquant_dynamic_quantize_row_f32_s8
table.dynamic_quantize_row_f32_s4 = dynquant_dynamic_quantize_row_f32_s4
table.dequantize_row_s8_f32 = dynquant_dequantize_row_s8_f32
table.dequantize_row_s4_f32 = dynquant_dequantize_row_s4_f32
table.dot_s8s8_s64 = dynquant_dot_s8s8_s64
table.w8a8_matvec = dynquant_w8a8_matvec
table.w8a8_packed_bytes = dynquant_w8a8_packed_bytes
table.w8a8_pack = dynquant_w8a8_pack
table.w8a8_scratch_bytes = dynquant_w8a8_scratch_bytes
table.w8a8_matmul = dynquant_w8a8_matmul
table.divide_rows_f32 = dynquant_divide_rows_f32
table.multiply_rows_f32 = dynquant_multiply_rows_f32
table.w4a8_packed_bytes = dynquant_w4a8_packed_bytes
table.w4a8_pack = dynquant_w4a8_pack
table.w4a8_scratch_bytes = dynquant_w4a8_scratch_bytes
table.w4a8_matmul = dynquant_w4a8_matmul
table.w4a8_minimums_packed_bytes = dynquant_w4a8_minimums_packed_bytes
table.w4a8_minimums_pack = dynquant_w4a8_minimums_pack
table.w8a8_groups_packed_bytes = dynquant_w8a8_groups_packed_bytes
table.w8a8_groups_pack = dynquant_w8a8_groups_pack
table.w8a8_groups_scratch_bytes = dynquant_w8a8_groups_scratch_bytes
table.w8a8_groups_matmul = dynquant_w8a8_groups_matmul
table.int8_inner_scratch_bytes = dynquant_int8_inner_scratch_bytes
table.int8_inner_s32 = dynquant_int8_inner_s32
table.int8_inner_s64 = dynquant_int8_inner_s64
table.top_k_scratch_bytes = dynquant_top_k_scratch_bytes
table.top_k = dynquant_top_k

_C_API = PyCapsule_New(&table, "dynquant.capi._C_API", NULL)
