# Results on their way to memory.


# out (n bytes) = x, past the caches where the instruction set can.
cdef void stream_copy(const void* x, void* out, Py_ssize_t n) noexcept nogil:
    dq_stream_copy(out, x, n)
