# dynquant's row kernels for other Cython packages:
#
#     from dynquant.capi cimport DYNQUANT_OK, dynquant_amax_f32
#
# What each function does, takes and returns stands beside the same name, less dynquant_, in dynquant.h, in
# the folder that dynquant.get_include() returns. Plain C types only. Signatures stay as they are and names
# are only added; Cython refuses at import what the installed dynquant does not have.
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t


cdef enum:
    DYNQUANT_API_VERSION = 1
    DYNQUANT_OK = 0
    DYNQUANT_NON_FINITE = 1
    DYNQUANT_BAD_ARGUMENT = 2
    DYNQUANT_DOT = 0
    DYNQUANT_COSINE = 1
    DYNQUANT_L2 = 2


# DYNQUANT_API_VERSION of the dynquant that was imported, where that of the pxd is the one compiled against.
cdef int32_t dynquant_api_version() noexcept nogil

cdef int dynquant_amax_f32(const float* x, int64_t n, float* amax) noexcept nogil
cdef int dynquant_percentile_f32(const float* x, int64_t n, double p, float* magnitude) noexcept nogil
cdef int dynquant_amax_scale_f32(const float* x, int64_t n, float clip, float* scale) noexcept nogil
cdef int dynquant_percentile_scale_f32(const float* x, int64_t n, double p, float clip,
                                       float* scale) noexcept nogil
cdef int dynquant_quantize_row_f32_s8(const float* x, int64_t n, float scale, int32_t clip,
                                      int8_t* codes) noexcept nogil
cdef int dynquant_quantize_row_f32_s4(const float* x, int64_t n, float scale, uint8_t* packed) noexcept nogil
cdef int dynquant_dynamic_quantize_row_f32_s8(const float* x, int64_t n, int8_t* codes,
                                              float* scale) noexcept nogil
cdef int dynquant_dynamic_quantize_row_f32_s4(const float* x, int64_t n, uint8_t* packed,
                                              float* scale) noexcept nogil
cdef int dynquant_dequantize_row_s8_f32(const int8_t* codes, int64_t n, float scale,
                                        float* out) noexcept nogil
cdef int dynquant_dequantize_row_s4_f32(const uint8_t* packed, int64_t n, float scale,
                                        float* out) noexcept nogil
cdef int64_t dynquant_dot_s8s8_s64(const int8_t* a, const int8_t* b, int64_t n) noexcept nogil
cdef int dynquant_w8a8_matvec(const int8_t* w, const float* w_scales, int64_t n, int64_t k, const int8_t* a,
                              float a_scale, float* out) noexcept nogil
cdef int64_t dynquant_w8a8_packed_bytes(int64_t n, int64_t k) noexcept nogil
cdef int dynquant_w8a8_pack(const int8_t* w, int64_t n, int64_t k, void* packed) noexcept nogil
cdef int64_t dynquant_w8a8_scratch_bytes(int64_t m, int64_t k) noexcept nogil
cdef int dynquant_w8a8_matmul(const void* packed, const float* w_scales, const float* bias, const float* x,
                              int64_t m, int64_t n, int64_t k, void* scratch, float* out) noexcept nogil
cdef int dynquant_divide_rows_f32(const float* x, const float* factors, int64_t m, int64_t k,
                                  float* out) noexcept nogil
cdef int dynquant_multiply_rows_f32(const float* x, const float* factors, int64_t m, int64_t k,
                                    float* out) noexcept nogil
cdef int64_t dynquant_w4a8_packed_bytes(int64_t n, int64_t k, int64_t group_size) noexcept nogil
cdef int dynquant_w4a8_pack(const uint8_t* w, const float* w_scales, const uint8_t* zero_points, int64_t n,
                            int64_t k, int64_t group_size, void* packed) noexcept nogil
cdef int64_t dynquant_w4a8_scratch_bytes(int64_t m, int64_t k, int64_t group_size) noexcept nogil
cdef int dynquant_w4a8_matmul(const void* packed, const float* bias, const float* x, int64_t m, int64_t n,
                              int64_t k, int64_t group_size, void* scratch, float* out) noexcept nogil
cdef int64_t dynquant_w4a8_minimums_packed_bytes(int64_t n, int64_t k, int64_t group_size) noexcept nogil
cdef int dynquant_w4a8_minimums_pack(const uint8_t* w, const float* w_scales, const float* minimums,
                                     int64_t n, int64_t k, int64_t group_size, void* packed) noexcept nogil
cdef int64_t dynquant_w8a8_groups_packed_bytes(int64_t n, int64_t k, int64_t group_size,
                                               int32_t symmetric) noexcept nogil
cdef int dynquant_w8a8_groups_pack(const int8_t* w, const float* w_scales, int64_t n, int64_t k,
                                   int64_t group_size, int32_t symmetric, void* packed) noexcept nogil
cdef int64_t dynquant_w8a8_groups_scratch_bytes(int64_t m, int64_t k, int64_t group_size) noexcept nogil
cdef int dynquant_w8a8_groups_matmul(const void* packed, const float* bias, const float* x, int64_t m,
                                     int64_t n, int64_t k, int64_t group_size, int32_t symmetric,
                                     void* scratch, float* out) noexcept nogil
cdef int64_t dynquant_int8_inner_scratch_bytes(int64_t m, int64_t n, int64_t k) noexcept nogil
cdef int dynquant_int8_inner_s32(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k,
                                 void* scratch, int32_t* out) noexcept nogil
cdef int dynquant_int8_inner_s64(const int8_t* a, const int8_t* b, int64_t m, int64_t n, int64_t k,
                                 void* scratch, int64_t* out) noexcept nogil
cdef int64_t dynquant_top_k_scratch_bytes(int64_t m, int64_t n, int64_t d, int32_t bits, int64_t group_size,
                                          int64_t k) noexcept nogil
cdef int dynquant_top_k(const float* queries, const void* codes, const float* scales,
                        const uint8_t* zero_points, const float* bias, const uint8_t* allowed,
                        int64_t allowed_stride, int64_t m, int64_t n, int64_t d, int32_t bits,
                        int64_t group_size, int32_t metric, int64_t k, void* scratch, float* found,
                        int64_t* indices) noexcept nogil
