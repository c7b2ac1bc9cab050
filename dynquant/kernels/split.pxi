# The saturation-safe split: exact products where the instructions add pairs of them in int16 (DQ_SPLIT is 1).
#
# Instructions multiply unsigned by signed bytes, so the weights are biased to u8. For even k, w[k] becomes
# w[k] + 128 and w[k + 1] becomes 127 - w[k + 1], both by an exclusive or; a[k + 1] becomes -a[k + 1]. Every
# sum then has 128 * a[k] - 127 * a[k + 1] too much. The compensation, computed when the activations are
# quantized, is subtracted again.
#
# VPMADDUBSW adds two products in int16 and saturates. A biased weight is at most 255. So the sum of a pair
# cannot saturate while the activations of one sign in it add up to at most DQ_PAIR = 128: 255 * 128 = 32,640
# < 2**15. A larger pair is split: its residual, at most 126, is multiplied in a k-step of its own. That is
# rare, because codes are scaled by the largest magnitude of the row, and two large ones of opposite signs
# have to be neighbors: in 2 to 5 of 100 k-steps of four where activations are normally distributed, in fewer
# where some are far larger than the others, and in none where all have one sign, as after a ReLU. In the
# worst case, where 127 and -127 alternate, every k-step is multiplied twice.
#
# Splitting the weights instead would not depend on the activations, but their residuals would have to be kept
# in memory, and would cost every row.


# Biases n weights to u8, or turns them back. In pairs, which vectorizes: by the parity of i it would not.
cdef inline void bias_weights(uint8_t* bytes, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n // 2):
        bytes[2 * i] ^= <uint8_t> DQ_BIAS
        bytes[2 * i + 1] ^= <uint8_t> (DQ_BIAS >> 8)
    if n % 2:
        bytes[n - 1] ^= <uint8_t> DQ_BIAS


# Splits a pair that is out of the range of DQ_PAIR: what is over goes to `residual`, which is 0 before. It is
# taken from the larger of the two, which is always enough.
cdef inline void split_pair(int8_t* pair, int8_t* residual) noexcept nogil:
    cdef int total = pair[0] + pair[1], over = 0, larger
    if total > DQ_PAIR:
        over = total - DQ_PAIR
    elif total < -DQ_PAIR:
        over = total + DQ_PAIR
    larger = 1 if abs(<int> pair[1]) > abs(<int> pair[0]) else 0
    pair[larger] = <int8_t> (pair[larger] - over)
    residual[larger] = <int8_t> over
