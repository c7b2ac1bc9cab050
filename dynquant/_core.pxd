from libc.stdint cimport uint16_t


# Float input of one call: float32, or one of the 16-bit formats, which are widened block by block.
cdef struct Floats:
    const char* data
    int kind
    Py_ssize_t n


cdef class FloatRows:
    cdef const float[::1] f32
    cdef const uint16_t[::1] half
    cdef int kind
    cdef readonly Py_ssize_t m, k
    cdef Floats row(self, Py_ssize_t r) noexcept nogil
    cdef Floats flat(self) noexcept nogil
