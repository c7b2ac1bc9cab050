# Rotation by a Hadamard matrix.


# Rotates every `block` elements of x (n,), in place; block divides n.
cdef void rotate(float* x, Py_ssize_t n, Py_ssize_t block) noexcept nogil:
    cdef float scale = <float> (1.0 / sqrt(<double> block))
    cdef Py_ssize_t i
    for i in range(n // block):
        kernels.hadamard_row_f32(x + i * block, block, scale)


def hadamard(float[::1] x not None, Py_ssize_t block):
    """Transform every `block` elements, in place."""
    if x.shape[0]:
        with nogil:
            rotate(&x[0], x.shape[0], block)
