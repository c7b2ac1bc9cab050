/* AMX: tiles of up to 16 rows of 64 bytes, multiplied by one instruction. Everything else is that of avx512.h. */

#define DQ_TILE_K_STEPS 16
#define DQ_TILE_ROWS 32
#define DQ_TILES_FROM 2
static inline void dq_tiles_begin(int rows, int tile_k_steps) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_of_a_row[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    /* 0..3 are sums, 4 and 5 activations, 6 and 7 weights. */
    for (int t = 0; t < 8; t++) {
        shapes.bytes_of_a_row[t] = (uint16_t)(t == 4 || t == 5 ? 4 * tile_k_steps : 64);
        shapes.rows[t] = (uint8_t)(t < 6 ? rows : tile_k_steps);
    }
    __asm__ volatile("" : : "r"(&shapes) : "memory"); /* gcc takes the instruction to read 8 bytes of them */
    _tile_loadconfig(&shapes);
}
static inline void dq_tiles_end(void) { _tile_release(); }
#define dq_tile_begin(t, add, acc) \
    do { \
        if (add) _tile_loadd(t, acc, 128); \
        else _tile_zero(t); \
    } while (0)
static inline void dq_tiles(const uint8_t* w, const uint8_t* a, ptrdiff_t stride, int rows, int32_t* acc,
                            ptrdiff_t k_steps, int tile_k_steps, int add) {
    const int second = rows - 16, lines = 128; /* bytes from one step of weights to the next, and of sums */
    dq_tile_begin(0, add, acc);
    dq_tile_begin(1, add, acc + 16);
    if (second <= 0) {
        for (ptrdiff_t i = 0; i < k_steps; i += tile_k_steps) {
            _tile_loadd(4, a + 4 * i, stride);
            _tile_loadd(6, w + lines * i, lines);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(7, w + lines * i + 64, lines);
            _tile_dpbsud(1, 4, 7);
        }
    } else {
        dq_tile_begin(2, add, acc + 32 * second);
        dq_tile_begin(3, add, acc + 32 * second + 16);
        for (ptrdiff_t i = 0; i < k_steps; i += tile_k_steps) {
            _tile_loadd(6, w + lines * i, lines);
            _tile_loadd(4, a + 4 * i, stride);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(7, w + lines * i + 64, lines);
            _tile_dpbsud(1, 4, 7);
            _tile_loadd(5, a + second * stride + 4 * i, stride);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(2, acc + 32 * second, lines);
        _tile_stored(3, acc + 32 * second + 16, lines);
    }
    _tile_stored(0, acc, lines);
    _tile_stored(1, acc + 16, lines);
}
#define DQ_GROUP_TILES_FROM 5
static inline void dq_unpack_k_blocks(const uint8_t* w, uint8_t* k_steps, ptrdiff_t k_blocks) {
    const __m512i low = _mm512_set1_epi8(0x0F);
    for (ptrdiff_t i = 0; i < k_blocks; i++)
        for (int half = 0; half < 128; half += 64) {
            const __m512i v = _mm512_loadu_si512(w + 128 * i + half);
            _mm512_storeu_si512(k_steps + 256 * i + half, _mm512_and_si512(v, low));
            _mm512_storeu_si512(k_steps + 256 * i + 128 + half, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
        }
}
