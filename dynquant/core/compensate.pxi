# Error-compensated rounding, block by block.


# Outputs of which a block of columns is rounded.
cdef struct OutputsToRound:
    const float* w
    float* carried
    const float* feedback
    const int32_t* groups
    const int32_t* columns
    const float* scales
    const uint8_t* zero_points
    float* errors
    int8_t* codes
    Py_ssize_t k, n, n_groups
    int32_t lo, hi


cdef bint compensate_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const OutputsToRound* o = <const OutputsToRound*> context
    cdef const uint8_t* zero_points = NULL
    cdef Py_ssize_t r
    for r in range(first, end):
        if o.zero_points != NULL:
            zero_points = o.zero_points + r * o.n_groups
        kernels.compensate_row_f32(o.w + r * o.k, o.carried + r * o.n, o.feedback, o.k, o.groups, o.columns,
                                   o.scales + r * o.n_groups, zero_points, o.lo, o.hi, o.errors + r * o.k,
                                   o.codes + r * o.k, o.n)
    return True


def compensate_rows(const float[:, ::1] w not None, float[:, ::1] carried not None,
                    const float[:, ::1] feedback not None, Py_ssize_t start,
                    const int32_t[::1] groups not None, const int32_t[::1] columns not None,
                    const float[:, ::1] scales not None, const uint8_t[:, ::1] zero_points, int lo, int hi,
                    float[:, ::1] errors not None, int8_t[:, ::1] codes not None, int num_threads=1):
    """Codes and errors of columns start, start + 1, ... of all outputs.

    `carried` (outputs, columns of this block) tells how many. All other arrays are whole: w, errors and codes
    (outputs, k), feedback (k, k), groups and columns (k,), scales and zero_points (outputs, groups).
    """
    cdef OutputsToRound o
    cdef Py_ssize_t outputs = w.shape[0]
    o.k, o.n, o.n_groups = w.shape[1], carried.shape[1], scales.shape[1]
    o.lo, o.hi = lo, hi
    check_size(min(carried.shape[0], errors.shape[0], codes.shape[0], scales.shape[0]), outputs)
    check_size(min(errors.shape[1], codes.shape[1], groups.shape[0], columns.shape[0], feedback.shape[0],
                   feedback.shape[1]), o.k)
    check_size(o.k, start + o.n)
    o.w, o.carried, o.feedback = &w[0, start], &carried[0, 0], &feedback[start, start]
    o.groups, o.columns, o.scales = &groups[start], &columns[start], &scales[0, 0]
    o.errors, o.codes, o.zero_points = &errors[0, start], &codes[0, 0], NULL
    if zero_points is not None:
        check_size(zero_points.size, outputs * o.n_groups)
        o.zero_points = &zero_points[0, 0]
    # About half of the block's square, and a division for each column that waits for the one before.
    parallel_ranges(compensate_range, &o, outputs, outputs * o.n * (20 + o.n // 16), num_threads)
