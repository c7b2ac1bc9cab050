# Error-compensated rounding, block by block.


def compensate_rows(const float[:, ::1] w not None, float[:, ::1] carried not None, const float[:, ::1] feedback not None,
                    Py_ssize_t start, const int32_t[::1] groups not None, const int32_t[::1] columns not None,
                    const float[:, ::1] scales not None, const uint8_t[:, ::1] zero_points, int lo, int hi,
                    float[:, ::1] errors not None, int8_t[:, ::1] codes not None, Py_ssize_t first=0,
                    Py_ssize_t end=PY_SSIZE_T_MAX):
    """Codes and errors of columns start, start + 1, ... of outputs first .. end; returns True.

    `carried` (outputs, columns of this block) tells how many. All other arrays are whole: w and errors (outputs, k),
    feedback (k, k), groups and columns (k,), scales and zero_points (outputs, groups), codes (outputs, k).
    """
    cdef Py_ssize_t r, n = carried.shape[1], k = w.shape[1], outputs = w.shape[0]
    cdef const uint8_t* z = NULL
    check_size(min(carried.shape[0], errors.shape[0], codes.shape[0], scales.shape[0]), outputs)
    check_size(min(errors.shape[1], codes.shape[1], groups.shape[0], columns.shape[0], feedback.shape[0],
                   feedback.shape[1]), k)
    check_size(k, start + n)
    with nogil:
        for r in range(first, end if end < outputs else outputs):
            if zero_points is not None:
                z = &zero_points[r, 0]
            kernels.compensate_row_f32(&w[r, start], &carried[r, 0], &feedback[start, start], k, &groups[start],
                                       &columns[start], &scales[r, 0], z, lo, hi, &errors[r, start], &codes[r, 0], n)
    return True
