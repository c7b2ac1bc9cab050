# Widening of the two 16-bit float formats, exact for every number, infinity included; NaN stays NaN.


# x (n,) IEEE binary16 -> out (n,) float32.
cdef void widen_f16_f32(const uint16_t* x, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0
    while i + DQ_WIDEN_STEP <= n:
        dq_widen_step(x + i, out + i)
        i += DQ_WIDEN_STEP
    while i < n:
        out[i] = dq_widen(x[i])
        i += 1


# x (n,) bfloat16 -> out (n,) float32: the upper half of its bits.
cdef void widen_bf16_f32(const uint16_t* x, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = dq_float(<int32_t> (<uint32_t> x[i] << 16))
