# The row kernels of one instruction set: which one is decided by the flags that the including module is
# compiled with. Nothing here allocates, touches a Python object or fails.
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport copysignf, fabs
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset

from dynquant._table cimport OCTAVE_BINS, Kernels, groups_of


cdef extern from "kernels/simd/simd.h" nogil:
    enum: DQ_QUANTIZE_STEP
    float DQ_MAGIC
    float DQ_BELOW_HALF
    float DQ_BELOW_1
    float DQ_ABOVE_1
    float DQ_MIN_SCALE
    float DQ_MAX_SCALE
    enum: DQ_DOT_STEP
    enum: DQ_CONCURRENT_PANELS
    enum: DQ_PREFETCH_FROM
    enum: DQ_PRODUCTS_PER_NS
    enum: DQ_WIDEN_STEP
    ctypedef struct dq_dot_acc:
        pass
    int32_t dq_bits(float x)
    float dq_float(int32_t b)
    int dq_quantize_step(const float* x, float lo, float hi, int32_t clip, bint in_range, bint nontemporal,
                         int8_t* codes)
    void dq_nontemporal_end()
    enum: DQ_VALUES
    void dq_nontemporal_values(const int8_t* codes, float scale, float* out)
    enum: DQ_QUOTIENTS
    int dq_quotients(const float* x, const float* factors, const float* reciprocals, float* out)
    float dq_widen(uint16_t h)
    void dq_widen_step(const uint16_t* x, float* out)
    enum: DQ_LANES
    enum: DQ_DEPTH
    enum: DQ_PANEL_DEPTH
    enum: DQ_STEP_BYTES
    enum: DQ_BIAS
    enum: DQ_SPLIT
    enum: DQ_PAIR
    enum: DQ_BIAS_STEP
    ctypedef struct dq_acc:
        pass
    ctypedef struct dq_weights:
        pass
    ctypedef struct dq_broadcast_act:
        pass
    enum: DQ_BETWEEN_STEP
    uint32_t dq_between_step(const float* x, int32_t low, int32_t high, int64_t* below, int* finite)
    int dq_lowest_bit(uint32_t bits)
    int dq_count_bits(uint32_t bits)
    void dq_prefetch(const void* bytes, size_t n)
    dq_acc dq_acc_zero()
    dq_acc dq_acc_load(const int32_t* s)
    void dq_acc_store(int32_t* out, dq_acc s)
    dq_acc dq_acc_add(dq_acc x, dq_acc y)
    dq_broadcast_act dq_broadcast(const uint8_t* a)
    void dq_transpose_16(const int8_t* w, Py_ssize_t stride, uint8_t* out, Py_ssize_t out_stride)
    dq_weights dq_weights_load(const uint8_t* w)
    dq_acc dq_acc_step(dq_acc acc, dq_weights w, dq_broadcast_act a)
    uint32_t dq_bias_step(int8_t* a, int32_t* compensation)
    enum: DQ_FORMS
    enum: DQ_PAIRS
    enum: DQ_EIGHTS
    enum: DQ_CENTERED
    enum: DQ_WIDE
    uint32_t dq_pairs_out_of_range(const int8_t* a)
    void dq_count_lanes(const int8_t* a, int32_t* eights, int32_t* centered)
    int dq_eights_out_of_range(const uint8_t* a)
    int dq_center_16(const uint8_t* a, uint8_t* out)
    uint32_t dq_split_16(uint8_t* a, int8_t* residuals, int form)
    void dq_widen_16(const uint8_t* a, uint8_t* out)
    void dq_form_rows(int form, const uint8_t* w, const uint8_t* a, Py_ssize_t stride, Py_ssize_t rows,
                      int32_t* acc, Py_ssize_t k_steps)
    enum: DQ_TILE_K_STEPS
    enum: DQ_TILE_ROWS
    enum: DQ_TILES_FROM
    void dq_tiles_begin(int rows, int tile_k_steps)
    void dq_tiles_end()
    void dq_tiles(const uint8_t* w, const uint8_t* a, Py_ssize_t stride, int rows, int32_t* sums,
                  Py_ssize_t k_steps, int tile_k_steps, bint add)
    enum: DQ_GROUP_TILES_FROM
    void dq_unpack_k_blocks(const uint8_t* w, uint8_t* k_steps, Py_ssize_t k_blocks)
    enum: DQ_K_BLOCK
    enum: DQ_ACC16_STEPS
    ctypedef struct dq_acc16:
        pass
    ctypedef struct dq_floats:
        pass
    ctypedef struct dq_codes:
        pass
    dq_codes dq_codes_load(const uint8_t* w)
    dq_acc16 dq_acc16_zero()
    dq_acc16 dq_acc16_step(dq_acc16 part, dq_codes w, dq_broadcast_act even, dq_broadcast_act odd)
    dq_acc dq_acc_add16(dq_acc s, dq_acc16 part)
    dq_floats dq_floats_load(const float* x)
    void dq_floats_store(float* out, dq_floats x)
    dq_floats dq_floats_add(dq_floats x, dq_floats y)
    dq_floats dq_floats_sub(dq_floats x, dq_floats y)
    dq_floats dq_floats_scale(dq_floats x, float scale)
    dq_floats dq_hadamard_lanes(dq_floats x)
    dq_floats dq_zero_points_load(const uint8_t* z)
    dq_floats dq_group_add(dq_floats acc, dq_acc s, dq_floats zero_points, float a_sum, dq_floats scales)
    enum: DQ_FOUR_K_BLOCKS
    void dq_four_k_blocks(const uint8_t* w, const uint8_t* a, dq_acc* s0, dq_acc* s1)
    dq_floats dq_scaled(dq_acc s, dq_floats scales)
    ctypedef struct dq_wide_weights:
        pass
    enum: DQ_WIDE_ROWS
    enum: DQ_WIDE_BATCH
    enum: DQ_WIDE_DOTS
    enum: DQ_THIN_INPUTS
    enum: DQ_THIN_OUTPUTS
    int dq_quantize_rows(const float* x, Py_ssize_t rows, Py_ssize_t k, int16_t* codes, Py_ssize_t stride,
                         float* scales)
    void dq_wide_dots(const int16_t* a, Py_ssize_t stride, const int16_t* w, Py_ssize_t w_stride,
                      Py_ssize_t n, Py_ssize_t k, int32_t* sums)
    dq_wide_weights dq_wide_load(const int16_t* w)
    dq_acc dq_wide_step(dq_acc acc, dq_wide_weights w, dq_broadcast_act a)
    void dq_widen_k_step(const uint8_t* w, int16_t* wide)
    void dq_widen_k_block(const uint8_t* w, const uint8_t* zero_points, int16_t* wide)
    enum: DQ_KEPT_ROWS
    dq_floats dq_group_add_minimums(dq_floats acc, dq_acc s, dq_floats minimums, float a_sum,
                                    dq_floats scales)
    void dq_group_rows(const uint8_t* w, const float* scales, const uint8_t* offsets, bint minimums,
                       const uint8_t* a, const uint8_t* a_sums, Py_ssize_t stride, Py_ssize_t rows,
                       float* acc, Py_ssize_t k_blocks, Py_ssize_t prefetch_distance)
    dq_dot_acc dq_dot_zero()
    dq_dot_acc dq_dot_step(dq_dot_acc acc, const int8_t* w, const int8_t* a)
    dq_dot_acc dq_dot_biased_step(dq_dot_acc acc, const int8_t* w, const int8_t* a)
    dq_dot_acc dq_dot_add(dq_dot_acc x, dq_dot_acc y)
    int32_t dq_dot_sum(dq_dot_acc acc)
    enum: DQ_NIBBLES
    void dq_nibble_sums(const uint8_t* w, const int8_t* a, uint8_t flip, int32_t* sums, Py_ssize_t blocks)


cdef enum:
    PREFETCH_FLOATS = 384  # floats that long rows are fetched ahead


# How many of the n floats at x come before the next line of the cache.
cdef inline Py_ssize_t before_line(const float* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = -(<Py_ssize_t> x >> 2) & 15
    return i if i < n else n


include "widen.pxi"
include "scale.pxi"
include "quantize.pxi"
include "dequantize.pxi"
include "smooth.pxi"
include "split.pxi"
include "dot.pxi"
include "matmul_s8.pxi"
include "forms.pxi"
include "matmul_u4.pxi"
include "matmul_s8_groups.pxi"
include "wide.pxi"
include "sums.pxi"
include "metrics.pxi"
include "weights.pxi"
include "compensate.pxi"
include "calibrate.pxi"
include "hadamard.pxi"
include "top_k.pxi"
include "gguf.pxi"


cdef Kernels kernels
kernels.widen_f16_f32 = widen_f16_f32
kernels.widen_bf16_f32 = widen_bf16_f32
kernels.amax_bits_f32 = amax_bits_f32
kernels.amax_bits_below_f32 = amax_bits_below_f32
kernels.count_below_f32 = count_below_f32
kernels.collect_between_f32 = collect_between_f32
kernels.count_top_bits_f32 = count_top_bits_f32
kernels.count_next_bits_f32 = count_next_bits_f32
kernels.quantize_row_f32_s8 = quantize_row_f32_s8
kernels.quantize_row_f32_u8 = quantize_row_f32_u8
kernels.quantize_row_f32_u4 = quantize_row_f32_u4
kernels.pack_row_s8_s4 = pack_row_s8_s4
kernels.square_error_row_f32 = square_error_row_f32
kernels.weighted_square_error_row_f32 = weighted_square_error_row_f32
kernels.compensate_row_f32 = compensate_row_f32
kernels.dequantize_row_s8_f32 = dequantize_row_s8_f32
kernels.add_to_row_f32 = add_to_row_f32
kernels.unpack_row_s4_s8 = unpack_row_s4_s8
kernels.shift_row_u4_s8 = shift_row_u4_s8
kernels.column_amax_row_f32 = column_amax_row_f32
kernels.column_amax_4_rows_f32 = column_amax_4_rows_f32
kernels.reciprocals_f32 = reciprocals_f32
kernels.divide_row_f32 = divide_row_f32
kernels.multiply_row_f32 = multiply_row_f32
kernels.dot_s8s8_s64 = dot_s8s8_s64
kernels.matvec_s8s8_f32 = matvec_s8s8_f32
kernels.products_per_ns = DQ_PRODUCTS_PER_NS
kernels.panel_outputs = PANEL
kernels.panel_bytes = panel_bytes
kernels.activation_bytes = activation_bytes
kernels.pack_panel_s8 = pack_panel_s8
kernels.unpack_panel_s8 = unpack_panel_s8
kernels.pack_activation_s8 = pack_activation_s8
kernels.arrange_activations_s8 = arrange_activations_s8
kernels.gemm_s8s8_f32 = gemm_s8s8_f32
kernels.prefetch_from = DQ_PREFETCH_FROM
kernels.group_panel_bytes = group_panel_bytes
kernels.group_activation_bytes = group_activation_bytes
kernels.pack_panel_u4 = pack_panel_u4
kernels.unpack_panel_u4 = unpack_panel_u4
kernels.pack_group_activation_s8 = pack_group_activation_s8
kernels.gemm_u4s8_f32 = gemm_u4s8_f32
kernels.s8_group_panel_bytes = s8_group_panel_bytes
kernels.s8_group_segments = s8_group_segments
kernels.s8_group_activation_bytes = s8_group_activation_bytes
kernels.pack_panel_s8_groups = pack_panel_s8_groups
kernels.unpack_panel_s8_groups = unpack_panel_s8_groups
kernels.quantize_row_f32_u8_away = quantize_row_f32_u8_away
kernels.pack_activation_groups = pack_activation_groups
kernels.gemm_s8_groups_f32 = gemm_s8_groups_f32
kernels.thin_inputs = DQ_THIN_INPUTS
kernels.thin_outputs = DQ_THIN_OUTPUTS
kernels.wide_panel_len = wide_panel_len
kernels.widen_panel_s8 = widen_panel_s8
kernels.widen_panel_u4 = widen_panel_u4
kernels.widen_rows_s8 = widen_rows_s8
kernels.quantize_rows_f32_s16 = quantize_rows_f32_s16
kernels.gemm_wide_f32 = gemm_wide_f32
kernels.gemm_wide_groups_f32 = gemm_wide_groups_f32
kernels.dots_wide_f32 = dots_wide_f32
kernels.min_max_row_f32 = min_max_row_f32
kernels.sum_row_f32_f64 = sum_row_f32_f64
kernels.square_deviation_row_f32_f64 = square_deviation_row_f32_f64
kernels.abs_error_row_f32_f64 = abs_error_row_f32_f64
kernels.error_sums_row_f32_f64 = error_sums_row_f32_f64
kernels.count_bins_f32 = count_bins_f32
kernels.count_channel_bins_row_f32 = count_channel_bins_row_f32
kernels.min_nonzero_row_f32 = min_nonzero_row_f32
kernels.mark_octaves_row_f32 = mark_octaves_row_f32
kernels.hadamard_row_f32 = hadamard_row_f32
kernels.collect_above_f32 = collect_above_f32
kernels.nibble_rows_fit = nibble_rows_fit
kernels.nibble_query_bytes = nibble_query_bytes
kernels.pack_nibble_query = pack_nibble_query
kernels.matvec_u4s8_f32 = matvec_u4s8_f32
kernels.negative_distance_row_f32 = negative_distance_row_f32
kernels.dot_row_f32_f64 = dot_row_f32_f64
kernels.square_distance_row_f32_f64 = square_distance_row_f32_f64
kernels.quantize_row_q8_0 = quantize_row_q8_0
kernels.quantize_row_q4_0 = quantize_row_q4_0
kernels.quantize_row_q4_1 = quantize_row_q4_1

table = PyCapsule_New(&kernels, "dynquant._table.Kernels", NULL)
