# A linear layer in the form that the kernels of one instruction set take. Its inputs are prepared here in
# each call: smoothing, signs, then rotation, as _transform.py has them.


# x divided or multiplied by `factors`, unless NULL, and then rotated in spans of `block` elements, unless 0,
# in `prepared`; x itself where neither is done. Signs cost no pass of their own: they are factors, by which a
# copy is multiplied, or are part of the factors that x is divided by.
cdef Floats prepared_row(Floats x, const float* factors, bint divide, Py_ssize_t block,
                         float* prepared) noexcept nogil:
    cdef float scratch[BLOCK]
    cdef Py_ssize_t start = 0, n
    if factors == NULL and block == 0:
        return x
    if factors != NULL:
        scale_columns_of_block(&x, factors, divide, 0, prepared, 1, x.n)  # finite; one row shares nothing
    else:
        while start < x.n:
            n = block_len(start, x.n)
            memcpy(prepared + start, block_of(&x, start, n, scratch), n * sizeof(float))
            start += n
    if block:
        rotate(prepared, x.n, block)
    x.data, x.kind = <const char*> prepared, F32
    return x


# Symmetric codes (k,) in the form that the product with w takes; `scratch` (k,). Returns whether none is
# -128, which has no opposite in int8.
cdef bint load_row(const PackedWeights* w, const int8_t* codes, int8_t* scratch, uint8_t* a) noexcept nogil:
    if memchr(codes, 0x80, w.k) != NULL:
        return False
    if w.int8_groups:
        memcpy(scratch, codes, w.k)
        shift_codes(scratch, w.k)
        w.table.pack_activation_groups(<uint8_t*> scratch, 128, a, w.k, w.group)
    else:
        pack_codes(w.table, codes, w.k, w.group, a)
    return True


# Rows to quantize for a layer: those of x, or the codes `given`, unless NULL. The result is `a`, activations
# in the form of the kernels; or the codes `coded` and their scales, unless NULL. Each of `parts` nearly equal
# parts of the rows has scratch of its own.
cdef struct ActivationRows:
    Floats x
    const int8_t* given
    const PackedWeights* w
    Py_ssize_t m, k, block, parts, row_bytes
    const float* factors
    bint divide, symmetric
    float* prepared
    float* scales
    int8_t* codes
    uint8_t* a
    int8_t* coded


cdef bint quantize_part_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const ActivationRows* rows = <const ActivationRows*> context
    cdef Py_ssize_t part, r
    for part in range(first, end):
        for r in range(rows.m * part // rows.parts, rows.m * (part + 1) // rows.parts):
            if not quantize_activation_row(rows, r, rows.prepared + part * rows.k,
                                           rows.codes + part * rows.k):
                return False
    return True


# Returns whether the row is finite, and no code of it -128 if it is given in codes.
cdef bint quantize_activation_row(const ActivationRows* rows, Py_ssize_t r, float* prepared,
                                  int8_t* codes) noexcept nogil:
    cdef uint8_t* a = rows.a + r * rows.row_bytes
    cdef Floats row
    cdef QuantRow q
    if rows.given != NULL:
        return load_row(rows.w, rows.given + r * rows.k, codes, a)
    row = floats_at(&rows.x, r * rows.k, rows.k)
    row = prepared_row(row, rows.factors, rows.divide, rows.block, prepared)
    if rows.coded == NULL and rows.w.int8_groups:
        return quantize_group_row(rows.w.table, &row, rows.w.group, rows.symmetric, &rows.scales[r], codes, a)
    if not scale_of(&row, 127, -1, &rows.scales[r]):
        return False
    if rows.coded == NULL:
        quantize_activation(rows.w.table, &row, rows.scales[r], rows.w.group, codes, a)
        return True
    q.codes, q.scales, q.zero_points = rows.coded + r * rows.k, &rows.scales[r], NULL
    q.minimums, q.group, q.packed, q.in_range = NULL, rows.k, False, True
    quantize_row(&row, &q, 127)
    return True


# out (m, n) = a . weights + bias. Units are panels.
cdef struct Product:
    const PackedWeights* w
    const uint8_t* a
    const float* a_scales
    float* out
    Py_ssize_t m


cdef bint multiply_range(void* context, Py_ssize_t first, Py_ssize_t end) noexcept nogil:
    cdef const Product* p = <const Product*> context
    multiply_panels(p.w, p.a, p.a_scales, p.out, p.m, first, end)
    return True


@cython.final
@cython.no_gc
cdef class Activations:
    """Up to `capacity` quantized rows for one PackedLinear, and scratch for a row of each thread.

    They are rows first .. first + m of an input. All that quantizing needs is allocated here, so that nothing
    can fail once rows of a result are written.
    """
    cdef Aligned memory
    cdef float* prepared
    cdef float* scales
    cdef int8_t* codes
    cdef Py_ssize_t first, m, capacity, parts

    def __cinit__(self, PackedLinear layer not None, Py_ssize_t capacity, int num_threads=1):
        cdef Py_ssize_t rows = capacity * layer.activation_bytes(), k = layer.w.k
        self.capacity = capacity
        self.parts = max(1, threads_for(capacity, layer.quantize_ns(capacity), num_threads))
        self.memory = aligned_memory(rows + capacity * <Py_ssize_t> sizeof(float)
                                     + self.parts * k * (<Py_ssize_t> sizeof(float) + 1))
        self.prepared = <float*> (self.memory.data + rows)
        self.scales = self.prepared + self.parts * k
        self.codes = <int8_t*> (self.scales + capacity)

    def __dealloc__(self):
        PyMem_RawFree(self.memory.block)

    # Prepares for rows first .. min(end, m).
    cdef int begin(self, Py_ssize_t first, Py_ssize_t end, Py_ssize_t m) except -1:
        self.first, self.m = first, min(end, m) - first
        check_size(self.capacity, self.m)
        return 0


@cython.final
cdef class PackedLinear:
    """A linear layer, n outputs of k > 0 inputs, for the kernels that were in use when it was made.

    Weights: int8 with one scale for each output where group is 0; int8 with a scale for each group with
    `int8_groups`; otherwise 4-bit with a scale and a zero point for each group, or with `minimums` a minimum.
    Only int8 weights take activations that are not symmetric.

    Inputs: divided by `factors`, or multiplied where `divide` is False, unless None; then rotated in spans of
    `block` elements, unless 0.
    """
    cdef PackedWeights w
    cdef Aligned memory
    cdef Py_ssize_t block
    cdef const float[::1] bias, factors_view
    cdef const float* input_factors
    cdef readonly Py_ssize_t n, panel_count, weight_bytes
    cdef readonly object factors
    cdef readonly bint divide, symmetric, rotates

    def __cinit__(self, Py_ssize_t n, Py_ssize_t k, Py_ssize_t group, const float[::1] bias,
                  factors, bint divide, Py_ssize_t block, bint int8_groups=False, bint symmetric=True,
                  bint minimums=False):
        cdef Py_ssize_t panels, scales = n, offsets = 0, sums = 0
        self.w.int8_groups, self.symmetric, self.w.minimums = int8_groups, symmetric, minimums
        self.w.table, self.w.n, self.w.k, self.w.group = packing_kernels(), n, k, group
        self.n, self.bias, self.factors, self.divide, self.block = n, bias, factors, divide, block
        self.rotates = block != 0
        self.factors_view, self.input_factors = factors, NULL
        if factors is not None:
            check_size(self.factors_view.shape[0], k)
            self.input_factors = &self.factors_view[0]
        self.panel_count = panels_of(self.w.table, n)
        if int8_groups:
            panels = self.panel_count * self.w.table.s8_group_panel_bytes(k, group)
            scales = self.panel_count * panel_scales(self.w.table, k, group)
            if not symmetric:
                sums = self.w.table.panel_outputs * self.w.table.s8_group_segments(k, group)
                sums *= self.panel_count
        else:
            panels = self.panel_count * panel_bytes(self.w.table, k, group)
            if group:
                scales = self.panel_count * panel_scales(self.w.table, k, group)
                offsets = scales * offset_size(&self.w)
        scales *= sizeof(float)
        sums *= sizeof(int32_t)
        self.weight_bytes = panels + scales + sums + offsets
        self.memory = aligned_memory(self.weight_bytes)
        self.w.panels = self.memory.data
        self.w.scales = <float*> (self.w.panels + panels)
        self.w.w_sums = NULL if symmetric else <int32_t*> (self.w.panels + panels + scales)
        self.w.offsets = self.w.panels + panels + scales + sums
        self.w.bias = NULL
        if bias is not None:
            self.w.bias = &bias[0]

    def __dealloc__(self):
        PyMem_RawFree(self.memory.block)

    cpdef Py_ssize_t activation_bytes(self):
        """Bytes of one row of quantized activations."""
        return activation_row_bytes(&self.w)

    def pack(self, CodeMatrix q not None):
        """Fill in the weights."""
        self.check(q)
        with nogil:
            if self.w.int8_groups:
                pack_int8_groups(&self.w, <const int8_t*> q.codes.buf, <const float*> q.scales.buf)
            else:
                if self.w.group == 0:
                    memcpy(self.w.scales, q.scales.buf, self.w.n * sizeof(float))
                pack_weights(&self.w, <const uint8_t*> q.codes.buf, <const float*> q.scales.buf,
                             <const uint8_t*> q.offsets.buf)

    def unpack(self, CodeMatrix q not None):
        """The inverse of pack."""
        self.check(q)
        with nogil:
            if self.w.int8_groups:
                unpack_int8_groups(&self.w, <int8_t*> q.codes.buf, <float*> q.scales.buf)
            else:
                if self.w.group == 0:
                    memcpy(q.scales.buf, self.w.scales, self.w.n * sizeof(float))
                unpack_weights(&self.w, <uint8_t*> q.codes.buf, <float*> q.scales.buf,
                               <uint8_t*> q.offsets.buf)

    cdef int check(self, CodeMatrix q) except -1:
        cdef bint packed = self.w.group > 0 and not self.w.int8_groups
        if q.m != self.w.n or q.k != self.w.k or q.packed != packed or q.minimums != self.w.minimums:
            raise SystemError("weights of another layer")
        return 0

    # Estimates for parallel_ranges. One row costs as much as 1.25 of many: its weights come from afar.
    cdef Py_ssize_t quantize_ns(self, Py_ssize_t m) noexcept nogil:
        return m * self.w.k * (3 if self.block else 1) // 4

    cdef Py_ssize_t multiply_ns(self, Py_ssize_t m) noexcept nogil:
        return self.w.n * self.w.k * (4 * m + 1) // (4 * self.w.table.products_per_ns)

    # Rows first .. first + m of the rows in x, with their results still to be set.
    cdef ActivationRows rows_of(self, const Floats* x, Py_ssize_t first, Py_ssize_t m) noexcept:
        cdef ActivationRows rows
        cdef Py_ssize_t k = self.w.k
        rows.x = floats_at(x, first * k, m * k)
        rows.given, rows.w, rows.m, rows.k, rows.symmetric = NULL, &self.w, m, k, self.symmetric
        rows.block, rows.factors, rows.divide = self.block, self.input_factors, self.divide
        rows.row_bytes = self.activation_bytes()
        return rows

    def quantize(self, FloatMatrix x not None, Activations a not None, Py_ssize_t first, Py_ssize_t end,
                 int num_threads=1):
        """Quantize rows first .. end into `a`; returns whether they are finite."""
        cdef Floats flat = x.flat()
        check_size(x.k, self.w.k)
        a.begin(first, end, x.m)
        return self.fill_from(&flat, a, num_threads)

    # Quantizes those of the rows in x that `a` is for.
    cdef bint fill_from(self, const Floats* x, Activations a, int num_threads) except -1:
        cdef ActivationRows rows = self.rows_of(x, a.first, a.m)
        rows.parts, rows.prepared, rows.codes = min(a.parts, a.m), a.prepared, a.codes
        rows.scales, rows.a, rows.coded = a.scales, a.memory.data, NULL
        return self.fill(a, &rows, num_threads)

    def load_codes(self, CodeMatrix q not None, Activations a not None, Py_ssize_t first, Py_ssize_t end,
                   int num_threads=1):
        """Bring rows first .. end of int8 codes and scales into `a`; returns whether no code is -128."""
        cdef ActivationRows rows
        check_size(q.k, self.w.k)
        a.begin(first, end, q.m)
        memcpy(a.scales, <float*> q.scales.buf + first, a.m * sizeof(float))
        rows.given, rows.w, rows.m, rows.k = <int8_t*> q.codes.buf + first * q.k, &self.w, a.m, q.k
        rows.parts, rows.prepared, rows.codes = min(a.parts, a.m), a.prepared, a.codes
        rows.a, rows.row_bytes = a.memory.data, self.activation_bytes()
        return self.fill(a, &rows, num_threads)

    # Packs all rows, and then arranges them together. Returns whether they can be.
    cdef bint fill(self, Activations a, ActivationRows* rows, int num_threads) except -1:
        cdef Py_ssize_t ns = self.quantize_ns(a.m)
        if not parallel_ranges(quantize_part_range, rows, rows.parts, ns, num_threads):
            return False
        if self.w.group == 0:
            with nogil:
                self.w.table.arrange_activations_s8(a.memory.data, a.m, self.w.k)
        return True

    def quantize_input(self, FloatMatrix x not None, CodeMatrix q not None, int num_threads=1):
        """The scales and codes that `quantize` has for the rows of x; returns whether they are finite."""
        cdef Py_ssize_t parts = threads_for(x.m, self.quantize_ns(x.m), num_threads)
        cdef Floats flat = x.flat()
        cdef ActivationRows rows
        cdef Aligned prepared
        check_size(x.k, self.w.k)
        check_rows(x, q)
        rows = self.rows_of(&flat, 0, x.m)
        rows.parts, rows.scales = parts, <float*> q.scales.buf
        rows.coded, rows.a = <int8_t*> q.codes.buf, NULL
        rows.codes = rows.coded  # not used
        prepared = aligned_memory(parts * x.k * <Py_ssize_t> sizeof(float))
        rows.prepared = <float*> prepared.data
        try:
            return parallel_ranges(quantize_part_range, &rows, parts, self.quantize_ns(x.m), num_threads)
        finally:
            PyMem_RawFree(prepared.block)

    def multiply(self, Activations a not None, float[:, ::1] out not None, int num_threads=1):
        """Rows of out for those in `a`: a . weights + bias."""
        if a.m > 0:
            check_size(out.shape[0] * out.shape[1], (a.first + a.m) * self.w.n)
            self.multiply_into(a, &out[0, 0], num_threads)

    cdef int multiply_into(self, Activations a, float* out, int num_threads) except -1:
        cdef Product p
        p.w, p.a, p.a_scales, p.m = &self.w, a.memory.data, a.scales, a.m
        p.out = out + a.first * self.w.n
        parallel_ranges(multiply_range, &p, self.panel_count, self.multiply_ns(a.m), num_threads)
        return 0

    def apply_at(self, size_t x, int kind, Py_ssize_t m, size_t out, Py_ssize_t max_rows, int num_threads=1):
        """The outputs (m, n) at address `out` for m rows of floats at address x, `max_rows` at a time.

        For callers whose arrays are not NumPy's: a FloatMatrix, or an array to make one of, would cost them
        more than a short row does. They vouch for the memory. Returns whether the rows are finite; where they
        are not, some outputs may be written.
        """
        cdef Floats rows
        cdef Activations a
        cdef Py_ssize_t first = 0
        if m <= 0:
            return True
        rows.data, rows.kind, rows.n = <const char*> x, kind, m * self.w.k
        if is_thin(&self.w, m):
            return self.multiply_thin_rows(rows, m, <float*> out, num_threads)
        a = Activations(self, min(max_rows, m), num_threads)
        while first < m:
            a.begin(first, first + a.capacity, m)
            if not self.fill_from(&rows, a, num_threads):
                return False
            self.multiply_into(a, <float*> out, num_threads)
            first += a.m
        return True

    def is_thin(self, Py_ssize_t m):
        """Whether `multiply_thin` is for this layer and m rows."""
        return is_thin(&self.w, m)

    def multiply_thin(self, FloatMatrix x not None, out not None, int num_threads=1):
        """out (m, n) = x . weights + bias, for a layer with few inputs or outputs.

        Returns whether the rows are finite; where they are not, some of `out` may be written.
        """
        cdef RawBuffer y = RawBuffer(out)
        check_size(x.k, self.w.k)
        check_size(y.view.len, x.m * self.w.n * <Py_ssize_t> sizeof(float))
        return self.multiply_thin_rows(x.flat(), x.m, <float*> y.view.buf, num_threads)

    cdef bint multiply_thin_rows(self, Floats x, Py_ssize_t m, float* out, int num_threads) except -1:
        cdef WideProduct p
        cdef Py_ssize_t ns = m * self.w.k * (8 + self.w.n) // 16
        cdef Aligned memory
        if m == 0:
            return True
        p.x, p.m, p.k, p.w, p.out = x, m, self.w.k, &self.w, out
        p.factors, p.divide, p.block = self.input_factors, self.divide, self.block
        plan_wide(&p)
        p.parts = max(1, threads_for((m + p.chunk - 1) // p.chunk, ns, num_threads))
        memory = aligned_memory(p.shared_bytes + p.parts * p.scratch_bytes)
        p.wide, p.scratch = <int16_t*> memory.data, memory.data + p.shared_bytes
        try:
            if p.shared_bytes:
                widen_weights(&p)
            return parallel_ranges(multiply_wide_part_range, &p, p.parts, ns, num_threads)
        finally:
            PyMem_RawFree(memory.block)

    def multiply_plain(self, x not None, out not None, bint given):
        """out (..., n) = x . weights + bias for arrays as they mostly are, in less time than checking others.

        Returns whether it is done: x has to be finite and, as `out`, C-contiguous float32, and there may not
        be many rows. An `out` that is `given` by the caller is not written where it is not done.
        """
        cdef RawBuffer a, y
        cdef Py_ssize_t m
        cdef Floats flat
        cdef Activations activations
        try:
            a = RawBuffer(x, PyBUF_STRIDES | PyBUF_FORMAT)
            y = RawBuffer(out, PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE)
        except (BufferError, ValueError):
            return False
        if not (is_plain_f32(&a.view, self.w.k) and is_plain_f32(&y.view, self.w.n)):
            return False
        m = a.view.len // (self.w.k * <Py_ssize_t> sizeof(float))
        if m * self.w.k > PLAIN_FLOATS or not same_leading_axes(&a.view, &y.view):
            return False
        flat.data, flat.kind, flat.n = <const char*> a.view.buf, F32, m * self.w.k
        if given and not views_disjoint(&a.view, &y.view):
            return False
        if is_thin(&self.w, m):
            if given and (self.input_factors != NULL or self.block or amax_bits(&flat) >= NON_FINITE):
                return False
            return self.multiply_thin_rows(flat, m, <float*> y.view.buf, 1)
        if not 0 < m <= PLAIN_ROWS:
            return False
        activations = Activations(self, m)
        activations.begin(0, m, m)
        if not self.fill_from(&flat, activations, 1):
            return False
        self.multiply_into(activations, <float*> y.view.buf, 1)
        return True
