# How products of bytes stay exact where the instruction adds them up in int16 (DQ_TRIMMED is 1).
#
# Weights are taken as bytes w + 128, up to 255. Times two activations of one sign that are at most DQ_PAIR
# together they fit int16. Of a larger pair the rest, at most 126, is multiplied in a step of its own. Codes
# that were scaled by their largest magnitude seldom have such pairs: of normally distributed ones 2 to 5 of
# 100 steps of four, and fewer where some are far larger than the others. At the worst, where all codes are
# 127 or -127, every step is made twice. Trimming the weights instead would not depend on what comes later,
# but their rests would have to be kept in memory, and cost every row.


# A pair that is beyond DQ_PAIR leaves its rest in `rest`, which is 0 before. The larger of the two gives way:
# it is large enough.
cdef inline void trim_pair(int8_t* pair, int8_t* rest) noexcept nogil:
    cdef int total = pair[0] + pair[1], over = 0, larger
    if total > DQ_PAIR:
        over = total - DQ_PAIR
    elif total < -DQ_PAIR:
        over = total + DQ_PAIR
    larger = 1 if abs(<int> pair[1]) > abs(<int> pair[0]) else 0
    pair[larger] = <int8_t> (pair[larger] - over)
    rest[larger] = <int8_t> over
