# Products of thin layers, rows of floats in and rows of floats out, by the kernels of kernels/wide.pxi.
cdef enum:
    WIDE_BYTES = 1 << 18  # weights that are widened once for all rows
    WIDE_CODES = 1 << 13  # codes that are kept between quantizing and multiplying: 16 KiB
    MAX_WIDE_K = 1 << 16  # sums of more would not fit int32
    THIN_ROWS = 8  # so many rows pay for widening rows of weights that are not short
    PLAIN_FLOATS = 1 << 16  # inputs that multiply_plain takes
    PLAIN_ROWS = 32  # and rows, of layers that are not thin: as many as a product takes at once
    DOTS_ABOVE = 8  # inputs: so many are multiplied for a few outputs by dot products


# Rows of x, prepared as for a layer, and where their products go. `wide` are the weights, widened before,
# unless shared_bytes is 0: then each part of the rows widens a panel at a time in scratch of its own.
cdef struct WideProduct:
    Floats x
    const PackedWeights* w
    const float* factors
    bint divide, dots
    Py_ssize_t m, k, block, parts, chunk, stride
    int16_t* wide
    float* out
    uint8_t* scratch
    Py_ssize_t scratch_bytes, shared_bytes


# Scratch of one part of the rows.
cdef struct WideScratch:
    int16_t* codes
    int16_t* panel
    float* scales
    float* prepared


# Whether wide kernels are for m rows. A group must not begin between the two k of a pair. To widen long rows
# of weights takes a few rows to pay.
cdef inline bint is_thin(const PackedWeights* w, Py_ssize_t m) noexcept nogil:
    if w.int8_groups or w.minimums or w.k > MAX_WIDE_K or (w.group and w.group < w.k and w.group % 2):
        return False
    return w.k <= w.table.thin_inputs or (w.n <= w.table.thin_outputs and m >= THIN_ROWS)


cdef inline Py_ssize_t line_up(Py_ssize_t n) noexcept nogil:
    return (n + 63) // 64 * 64


cdef WideScratch wide_scratch(const WideProduct* p, Py_ssize_t part) noexcept nogil:
    cdef WideScratch s
    cdef uint8_t* at = p.scratch + part * p.scratch_bytes
    s.codes = <int16_t*> at
    at += line_up(p.chunk * p.stride * <Py_ssize_t> sizeof(int16_t))
    s.scales = <float*> at
    at += line_up(p.chunk * <Py_ssize_t> sizeof(float))
    s.prepared = <float*> at
    at += line_up((p.chunk * p.k if wide_copies(p) else 0) * <Py_ssize_t> sizeof(float))
    s.panel = <int16_t*> at
    return s


cdef inline bint wide_copies(const WideProduct* p) noexcept nogil:
    return p.factors != NULL or p.block != 0 or p.x.kind != F32


# How a product is made of what it is of: how many rows are taken at a time, and the bytes of scratch.
cdef void plan_wide(WideProduct* p) noexcept nogil:
    cdef const PackedWeights* w = p.w
    cdef Py_ssize_t chunks = (p.m + DQ_WIDE_ROWS - 1) // DQ_WIDE_ROWS, shared, n
    p.stride = 8 if p.k <= 8 else (p.k + 15) // 16 * 16
    p.dots = w.group == 0 and w.n <= DQ_WIDE_DOTS and p.k > DOTS_ABOVE
    p.chunk = DQ_WIDE_ROWS * min(chunks, max(1, WIDE_CODES // DQ_WIDE_ROWS // p.stride))
    if p.dots:
        shared = w.n * p.stride
    else:
        shared = panels_of(w.table, w.n) * w.table.wide_panel_len(p.k)
    p.shared_bytes = line_up(shared * <Py_ssize_t> sizeof(int16_t))
    if not p.dots and p.shared_bytes > WIDE_BYTES:
        p.shared_bytes = 0
    n = line_up(p.chunk * p.stride * <Py_ssize_t> sizeof(int16_t))
    n += line_up(p.chunk * <Py_ssize_t> sizeof(float))
    if wide_copies(p):
        n += line_up(p.chunk * p.k * <Py_ssize_t> sizeof(float))
    if p.shared_bytes == 0:
        n += line_up(w.table.wide_panel_len(p.k) * <Py_ssize_t> sizeof(int16_t))
    p.scratch_bytes = n


cdef void widen_panel(const PackedWeights* w, Py_ssize_t panel, int16_t* wide) noexcept nogil:
    cdef const uint8_t* codes = w.panels + panel * panel_bytes(w.table, w.k, w.group)
    if w.group:
        w.table.widen_panel_u4(codes, w.offsets + panel * panel_scales(w.table, w.k, w.group), wide, w.k,
                               w.group)
    else:
        w.table.widen_panel_s8(codes, wide, w.k)


# All weights, before the rows.
cdef void widen_weights(const WideProduct* p) noexcept nogil:
    cdef const Kernels* table = p.w.table
    cdef Py_ssize_t i
    if p.dots:
        table.widen_rows_s8(p.w.panels, p.wide, p.stride, p.w.n, p.k)
        return
    for i in range(panels_of(table, p.w.n)):
        widen_panel(p.w, i, p.wide + i * table.wide_panel_len(p.k))


# Units are parts of the rows. Returns whether these are finite.
cdef bint multiply_wide_part_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const WideProduct* p = <const WideProduct*> context
    cdef Py_ssize_t part, start, stop, rows
    cdef WideScratch scratch
    for part in range(first, end):
        scratch = wide_scratch(p, part)
        start, stop = p.m * part // p.parts, p.m * (part + 1) // p.parts
        while start < stop:
            rows = min(p.chunk, stop - start)
            if not quantize_wide_rows(p, start, rows, &scratch):
                return False
            multiply_wide_rows(p, start, rows, &scratch)
            start += rows
    return True


cdef bint quantize_wide_rows(const WideProduct* p, Py_ssize_t start, Py_ssize_t rows,
                             const WideScratch* s) noexcept nogil:
    cdef const float* x = <const float*> (p.x.data + start * p.k * <Py_ssize_t> sizeof(float))
    cdef Py_ssize_t r
    if wide_copies(p):
        for r in range(rows):
            prepare_wide_row(p, start + r, s.prepared + r * p.k)
        x = s.prepared
    return p.w.table.quantize_rows_f32_s16(x, s.codes, p.stride, s.scales, rows, p.k)


cdef void prepare_wide_row(const WideProduct* p, Py_ssize_t r, float* prepared) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef Floats row = prepared_row(floats_at(&p.x, r * p.k, p.k), p.factors, p.divide, p.block, prepared)
    cdef Py_ssize_t start = 0, n
    if <float*> row.data == prepared:
        return
    while start < p.k:
        n = block_len(start, p.k)
        memcpy(prepared + start, block_of(&row, start, n, scratch), n * sizeof(float))
        start += n


cdef void multiply_wide_rows(const WideProduct* p, Py_ssize_t start, Py_ssize_t rows,
                             const WideScratch* s) noexcept nogil:
    cdef const PackedWeights* w = p.w
    cdef float* out = p.out + start * w.n
    cdef Py_ssize_t i, c
    if p.dots:
        w.table.dots_wide_f32(p.wide, w.scales, w.bias, s.codes, p.stride, s.scales, out, rows, w.n, p.k)
    elif p.shared_bytes:
        multiply_wide(w, p.wide, s.codes, p.stride, s.scales, out, rows, 0, w.n)
    else:
        for i in range(panels_of(w.table, w.n)):
            widen_panel(w, i, s.panel)
            c = i * w.table.panel_outputs
            multiply_wide(w, s.panel, s.codes, p.stride, s.scales, out, rows, c, outputs_of(w.table, w.n, c))


# Outputs c .. c + n, which begin a panel.
cdef inline void multiply_wide(const PackedWeights* w, const int16_t* wide, const int16_t* codes,
                               Py_ssize_t stride, const float* a_scales, float* out, Py_ssize_t rows,
                               Py_ssize_t c, Py_ssize_t n) noexcept nogil:
    cdef const float* bias = NULL if w.bias == NULL else w.bias + c
    if w.group:
        w.table.gemm_wide_groups_f32(wide, w.scales + c * groups_of(w.k, w.group), bias, codes, stride,
                                     a_scales, out + c, w.n, rows, n, w.k, w.group)
    else:
        w.table.gemm_wide_f32(wide, w.scales + c, bias, codes, stride, a_scales, out + c, w.n, rows, n, w.k)
