# How a product of signed bytes is made one of unsigned bytes with signed ones, which is what instructions
# multiply, and how it stays exact where they add it up in int16 (DQ_TRIMMED is 1).
#
# Of two neighbors, k even, w[k] becomes w[k] + 128 and w[k + 1] becomes 127 - w[k + 1], both an exclusive
# or; and a[k + 1] becomes -a[k + 1]. That adds 128 * a[k] - 127 * a[k + 1] to every sum, to be taken off
# again. Weights of up to 255 fit int16 beside a pair of activations in which what has one sign is at most
# DQ_PAIR altogether: 255 * 128 = 32,640 < 2**15. Of a larger pair the rest, at most 126, is multiplied in a
# step of its own. That is seldom, for codes are scaled by their largest magnitude, and two large ones have to
# meet, of opposite signs: in 2 to 5 of 100 steps of four where they are normally distributed, in fewer where
# some are far larger than the others, in none where all have the same sign, as after a ReLU. At the worst,
# where 127 and -127 alternate, every step is made twice. Trimming the weights instead would not depend on
# what comes later, but their rests would have to be kept in memory, and cost every row.


# Makes n bytes of weights what they are multiplied as, or these weights again.
cdef inline void bias_weights(uint8_t* bytes, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        bytes[i] ^= <uint8_t> (DQ_BIAS >> 8 if i & 1 else DQ_BIAS)


# A pair that is beyond DQ_PAIR leaves its rest in `rest`, which is 0 before. The larger of the two gives way:
# it is large enough.
cdef inline void split_pair(int8_t* pair, int8_t* residual) noexcept nogil:
    cdef int total = pair[0] + pair[1], over = 0, larger
    if total > DQ_PAIR:
        over = total - DQ_PAIR
    elif total < -DQ_PAIR:
        over = total + DQ_PAIR
    larger = 1 if abs(<int> pair[1]) > abs(<int> pair[0]) else 0
    pair[larger] = <int8_t> (pair[larger] - over)
    residual[larger] = <int8_t> over
