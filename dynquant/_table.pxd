# The table of row kernels that one instruction set hands to _core. Pointers, lengths and plain numbers only.
# What each kernel promises stands above it in kernels/*.pxi.
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef enum:
    OCTAVE_BINS = 8  # bins that a calibration has for the magnitudes of one channel in [2**e, 2**(e + 1))
    NON_FINITE = 0x7F800000  # the bits of infinity; those of NaN are above them


# Groups of at most `group` elements in a row of k.
cdef inline Py_ssize_t groups_of(Py_ssize_t k, Py_ssize_t group) noexcept nogil:
    return (k + group - 1) // group


ctypedef struct Kernels:
    # widen.pxi
    void (*widen_f16_f32)(const uint16_t* x, float* out, Py_ssize_t n) noexcept nogil
    void (*widen_bf16_f32)(const uint16_t* x, float* out, Py_ssize_t n) noexcept nogil
    # scale.pxi
    int32_t (*amax_bits_f32)(const float* x, Py_ssize_t n) noexcept nogil
    int32_t (*amax_bits_below_f32)(const float* x, int32_t bits, Py_ssize_t n) noexcept nogil
    Py_ssize_t (*count_below_f32)(const float* x, int32_t bits, Py_ssize_t n) noexcept nogil
    Py_ssize_t (*collect_between_f32)(const float* x, int32_t low, int32_t high, int32_t* candidates,
                                      Py_ssize_t capacity, int64_t* below, int* finite,
                                      Py_ssize_t n) noexcept nogil
    void (*count_top_bits_f32)(const float* x, Py_ssize_t* counts, Py_ssize_t n) noexcept nogil
    void (*count_next_bits_f32)(const float* x, int32_t prefix, int shift, Py_ssize_t* counts,
                                Py_ssize_t n) noexcept nogil
    # quantize.pxi
    void (*quantize_row_f32_s8)(const float* x, float scale, int32_t clip, bint in_range, bint nontemporal,
                                int8_t* codes, Py_ssize_t n) noexcept nogil
    void (*quantize_row_f32_u8)(const float* x, float scale, int32_t zero_point, uint8_t* codes,
                                Py_ssize_t n) noexcept nogil
    void (*quantize_row_f32_u4)(const float* x, float scale, int32_t zero_point, int8_t* codes,
                                Py_ssize_t n) noexcept nogil
    void (*pack_row_s8_s4)(const int8_t* codes, uint8_t* packed, Py_ssize_t n) noexcept nogil
    # weights.pxi
    double (*square_error_row_f32)(const float* x, float scale, int32_t lo, int32_t hi,
                                   Py_ssize_t n) noexcept nogil
    double (*weighted_square_error_row_f32)(const float* x, float scale, int32_t lo, int32_t hi,
                                            const float* weights, Py_ssize_t n) noexcept nogil
    # compensate.pxi
    void (*compensate_row_f32)(const float* w, float* carried, const float* feedback, Py_ssize_t stride,
                               const int32_t* groups, const int32_t* columns, const float* scales,
                               const uint8_t* zero_points, int32_t lo, int32_t hi, float* errors,
                               int8_t* codes, Py_ssize_t n) noexcept nogil
    # dequantize.pxi
    void (*dequantize_row_s8_f32)(const int8_t* codes, float scale, bint nontemporal, float* out,
                                  Py_ssize_t n) noexcept nogil
    void (*add_to_row_f32)(float* x, float y, Py_ssize_t n) noexcept nogil
    void (*unpack_row_s4_s8)(const uint8_t* packed, int8_t* codes, Py_ssize_t n) noexcept nogil
    void (*shift_row_u4_s8)(int8_t* codes, int32_t zero_point, Py_ssize_t n) noexcept nogil
    # smooth.pxi
    void (*column_amax_row_f32)(const float* x, int32_t* amax_bits, Py_ssize_t n) noexcept nogil
    void (*column_amax_4_rows_f32)(const float* x, Py_ssize_t stride, int32_t* amax_bits,
                                   Py_ssize_t n) noexcept nogil
    bint (*reciprocals_f32)(const float* factors, float* reciprocals, Py_ssize_t n) noexcept nogil
    void (*divide_row_f32)(const float* x, const float* factors, const float* reciprocals,
                           Py_ssize_t prefetch_distance, float* out, Py_ssize_t n) noexcept nogil
    void (*multiply_row_f32)(const float* x, const float* factors, float* out, Py_ssize_t n) noexcept nogil
    # dot.pxi
    int64_t (*dot_s8s8_s64)(const int8_t* w, const int8_t* a, Py_ssize_t k) noexcept nogil
    void (*matvec_s8s8_f32)(const int8_t* w, const float* w_scales, const int8_t* a, float a_scale,
                            float* out, Py_ssize_t rows, Py_ssize_t k) noexcept nogil
    # matmul_s8.pxi
    Py_ssize_t products_per_ns
    Py_ssize_t panel_outputs
    Py_ssize_t (*panel_bytes)(Py_ssize_t k) noexcept nogil
    Py_ssize_t (*activation_bytes)(Py_ssize_t k) noexcept nogil
    void (*pack_panel_s8)(const int8_t* w, Py_ssize_t stride, Py_ssize_t rows, uint8_t* panel,
                          Py_ssize_t k) noexcept nogil
    void (*unpack_panel_s8)(const uint8_t* panel, int8_t* w, Py_ssize_t rows, Py_ssize_t k) noexcept nogil
    void (*pack_activation_s8)(int8_t* codes, uint8_t* a, Py_ssize_t start, Py_ssize_t n,
                               Py_ssize_t k) noexcept nogil
    void (*arrange_activations_s8)(uint8_t* a, Py_ssize_t m, Py_ssize_t k) noexcept nogil
    void (*gemm_s8s8_f32)(const uint8_t* panels, const float* w_scales, const float* bias,
                          const uint8_t* a, const float* a_scales, float* out, Py_ssize_t out_stride,
                          Py_ssize_t m, Py_ssize_t n, Py_ssize_t k) noexcept nogil
    # matmul_u4.pxi
    Py_ssize_t prefetch_from
    Py_ssize_t (*group_panel_bytes)(Py_ssize_t k, Py_ssize_t group) noexcept nogil
    Py_ssize_t (*group_activation_bytes)(Py_ssize_t k, Py_ssize_t group) noexcept nogil
    void (*pack_panel_u4)(const uint8_t* w, const float* scales, const uint8_t* offsets, bint minimums,
                          Py_ssize_t rows, uint8_t* panel, float* panel_scales, uint8_t* panel_offsets,
                          Py_ssize_t k, Py_ssize_t group) noexcept nogil
    void (*unpack_panel_u4)(const uint8_t* panel, const float* panel_scales, const uint8_t* panel_offsets,
                            bint minimums, uint8_t* w, float* scales, uint8_t* offsets, Py_ssize_t rows,
                            Py_ssize_t k, Py_ssize_t group) noexcept nogil
    void (*pack_group_activation_s8)(const int8_t* codes, uint8_t* a, Py_ssize_t k,
                                     Py_ssize_t group) noexcept nogil
    void (*gemm_u4s8_f32)(const uint8_t* panels, const float* scales, const uint8_t* offsets, bint minimums,
                          const float* bias, const uint8_t* a, const float* a_scales, float* out,
                          Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, Py_ssize_t group,
                          Py_ssize_t prefetch_distance) noexcept nogil
    # matmul_s8_groups.pxi
    Py_ssize_t (*s8_group_panel_bytes)(Py_ssize_t k, Py_ssize_t group) noexcept nogil
    Py_ssize_t (*s8_group_segments)(Py_ssize_t k, Py_ssize_t group) noexcept nogil
    Py_ssize_t (*s8_group_activation_bytes)(Py_ssize_t k, Py_ssize_t group) noexcept nogil
    void (*pack_panel_s8_groups)(const int8_t* w, const float* scales, Py_ssize_t rows, uint8_t* panel,
                                 float* panel_scales, int32_t* w_sums, Py_ssize_t k,
                                 Py_ssize_t group) noexcept nogil
    void (*unpack_panel_s8_groups)(const uint8_t* panel, const float* panel_scales, int8_t* w, float* scales,
                                   Py_ssize_t rows, Py_ssize_t k, Py_ssize_t group) noexcept nogil
    void (*quantize_row_f32_u8_away)(const float* x, float scale, int32_t zero_point, uint8_t* codes,
                                     Py_ssize_t n) noexcept nogil
    void (*pack_activation_groups)(const uint8_t* codes, int32_t zero, uint8_t* a, Py_ssize_t k,
                                   Py_ssize_t group) noexcept nogil
    void (*gemm_s8_groups_f32)(const uint8_t* panels, const float* scales, const int32_t* w_sums,
                               const float* bias, const uint8_t* a, const float* a_scales, float* out,
                               Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k,
                               Py_ssize_t group) noexcept nogil
    # wide.pxi
    Py_ssize_t thin_inputs
    Py_ssize_t thin_outputs
    Py_ssize_t (*wide_panel_len)(Py_ssize_t k) noexcept nogil
    void (*widen_panel_s8)(const uint8_t* panel, int16_t* wide, Py_ssize_t k) noexcept nogil
    void (*widen_panel_u4)(const uint8_t* panel, const uint8_t* zero_points, int16_t* wide, Py_ssize_t k,
                           Py_ssize_t group) noexcept nogil
    void (*widen_rows_s8)(const uint8_t* panel, int16_t* rows, Py_ssize_t stride, Py_ssize_t n,
                          Py_ssize_t k) noexcept nogil
    bint (*quantize_rows_f32_s16)(const float* x, int16_t* codes, Py_ssize_t stride, float* scales,
                                  Py_ssize_t m, Py_ssize_t k) noexcept nogil
    void (*gemm_wide_f32)(const int16_t* wide, const float* w_scales, const float* bias,
                          const int16_t* codes, Py_ssize_t stride, const float* a_scales, float* out,
                          Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k) noexcept nogil
    void (*gemm_wide_groups_f32)(const int16_t* wide, const float* scales, const float* bias,
                                 const int16_t* codes, Py_ssize_t stride, const float* a_scales, float* out,
                                 Py_ssize_t out_stride, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k,
                                 Py_ssize_t group) noexcept nogil
    void (*dots_wide_f32)(const int16_t* w, const float* w_scales, const float* bias, const int16_t* codes,
                          Py_ssize_t stride, const float* a_scales, float* out, Py_ssize_t m, Py_ssize_t n,
                          Py_ssize_t k) noexcept nogil
    # scale.pxi, calibrate.pxi, metrics.pxi
    void (*min_max_row_f32)(const float* x, float* x_min, float* x_max, Py_ssize_t n) noexcept nogil
    double (*sum_row_f32_f64)(const float* x, Py_ssize_t n) noexcept nogil
    double (*square_deviation_row_f32_f64)(const float* x, double mean, Py_ssize_t n) noexcept nogil
    double (*abs_error_row_f32_f64)(const float* x, const float* value, Py_ssize_t n) noexcept nogil
    void (*error_sums_row_f32_f64)(const float* x, const float* value, double* sums,
                                   Py_ssize_t n) noexcept nogil
    void (*count_bins_f32)(const float* x, int64_t* counts, Py_ssize_t n) noexcept nogil
    void (*count_channel_bins_row_f32)(const float* x, uint32_t* const* bins, Py_ssize_t first,
                                       Py_ssize_t n) noexcept nogil
    void (*min_nonzero_row_f32)(const float* x, uint32_t* low, int32_t* zeros, Py_ssize_t n) noexcept nogil
    void (*mark_octaves_row_f32)(const float* x, uint8_t* seen, Py_ssize_t n) noexcept nogil
    # hadamard.pxi
    void (*hadamard_row_f32)(float* x, Py_ssize_t n, float scale) noexcept nogil
    # top_k.pxi
    Py_ssize_t (*collect_above_f32)(const float* scores, float threshold, uint32_t first,
                                    const uint8_t* allowed, uint64_t* keys, Py_ssize_t n) noexcept nogil
    bint (*nibble_rows_fit)(Py_ssize_t k, Py_ssize_t group) noexcept nogil
    Py_ssize_t (*nibble_query_bytes)(Py_ssize_t k, Py_ssize_t group) noexcept nogil
    void (*pack_nibble_query)(const int8_t* codes, uint8_t* a, Py_ssize_t k, Py_ssize_t group) noexcept nogil
    void (*matvec_u4s8_f32)(const uint8_t* w, const float* scales, const uint8_t* zero_points,
                            const uint8_t* a, float a_scale, float* out, Py_ssize_t rows, Py_ssize_t k,
                            Py_ssize_t group) noexcept nogil
    void (*negative_distance_row_f32)(float* scores, float norm, const float* norms,
                                      Py_ssize_t n) noexcept nogil
    double (*dot_row_f32_f64)(const float* x, const float* y, Py_ssize_t n) noexcept nogil
    double (*square_distance_row_f32_f64)(const float* x, const float* y, Py_ssize_t n) noexcept nogil
    # gguf.pxi
    bint (*quantize_row_q8_0)(const float* x, uint8_t* blocks, Py_ssize_t n) noexcept nogil
    bint (*quantize_row_q4_0)(const float* x, uint8_t* blocks, Py_ssize_t n) noexcept nogil
    bint (*quantize_row_q4_1)(const float* x, uint8_t* blocks, Py_ssize_t n) noexcept nogil
