# Floats to the block types of GGUF.
ctypedef bint (*block_kernel)(const float* x, uint8_t* blocks, Py_ssize_t n) noexcept nogil

# ggml's numbers of the types.
cdef enum:
    GGML_Q4_0 = 2
    GGML_Q4_1 = 3
    GGML_Q8_0 = 8
    GGML_BLOCK = 32


cdef struct RowsToBlocks:
    Floats x
    Py_ssize_t k, row_bytes
    uint8_t* blocks
    block_kernel kernel


# Units are rows.
cdef bint quantize_row_blocks(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const RowsToBlocks* rows = <const RowsToBlocks*> context
    cdef float scratch[BLOCK]
    cdef Py_ssize_t r, start, n
    cdef bint finite = True
    cdef uint8_t* blocks
    cdef Floats row
    for r in range(first, end):
        row, blocks, start = floats_at(&rows.x, r * rows.k, rows.k), rows.blocks + r * rows.row_bytes, 0
        while start < rows.k:
            n = block_len(start, rows.k)
            finite &= rows.kernel(block_of(&row, start, n, scratch), blocks, n)
            blocks += n // GGML_BLOCK * (rows.row_bytes // (rows.k // GGML_BLOCK))
            start += n
    return finite


def quantize_blocks(FloatMatrix x not None, uint8_t[:, ::1] blocks not None, int number, int num_threads=1):
    """Rows of x, finite, k a multiple of 32, as blocks of the type `number`.

    Returns whether every scale is finite in float16.
    """
    cdef RowsToBlocks rows
    if x.m == 0 or x.k == 0:
        return True
    rows.x, rows.k, rows.row_bytes = x.flat(), x.k, blocks.shape[1]
    rows.kernel = kernels.quantize_row_q8_0
    if number != GGML_Q8_0:
        rows.kernel = kernels.quantize_row_q4_0 if number == GGML_Q4_0 else kernels.quantize_row_q4_1
    check_size(blocks.shape[0], x.m)
    check_size(rows.row_bytes, x.k // GGML_BLOCK * (34 if number == GGML_Q8_0 else
                                                    18 if number == GGML_Q4_0 else 20))
    rows.blocks = &blocks[0, 0]
    return parallel_ranges(quantize_row_blocks, &rows, x.m, quantize_ns(rows.x.n), num_threads)
