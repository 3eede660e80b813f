// Many rows: weights and activations multiplied in AMX tiles, 16 or 32 rows x 32 columns at a time.
#include "linear.h"
#include "tiles.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace tandem {

bool tiles_allowed() {
#ifdef TANDEM_AMX
    // ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA; refused by kernels before 5.16 and by some hypervisors
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return allowed;
#else
    return false;
#endif
}

#ifdef TANDEM_AMX
namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

thread_local int configured_rows = 0;

// Brings the next pair's weights to L2 while this one's are multiplied, spread evenly over all steps of the loop.
struct Prefetch {
    const uint8_t* next;
    int bytes;
    void step() {
        for (int i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(next + i), _MM_HINT_T1);
        next += bytes;
    }
};

void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Expands one group of int4 weights a step before it is multiplied, while the tile unit is busy with the last one.
struct Expansion {
    const uint8_t *from, *end;
    bf16* to;
    void step();
};

struct Nothing {
    void step() {}
};

void Expansion::step() {
    if (from == end) return;
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    for (int i = 0; i < INT4_BLOCK; i += 64) _mm_prefetch(reinterpret_cast<const char*>(from + 4096 + i), _MM_HINT_T0);
    for (int half = 0; half < 2; ++half) {
        const __m512 scale = load_bf16(reinterpret_cast<const bf16*>(from) + 16 * half);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            __m512i q = _mm512_loadu_si512(from + 64 + half * 256 + 64 * i);
            // nibble j of a lane is in byte j / 2; even ones are quad i, odd ones quad i + 4. permutexvar reads 4 bits.
            auto weight = [&](int shift) {
                return _mm512_castps_si512(_mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(q, shift), values), scale));
            };
            auto both = [&](int first, int second) {
                return _mm512_or_si512(_mm512_srli_epi32(weight(first), 16), weight(second));
            };
            bf16* at = to + half * 512 + 64 * i;
            _mm512_store_si512(at, both(0, 8));
            _mm512_store_si512(at + 32, both(16, 24));
            _mm512_store_si512(at + 256, both(4, 12));
            _mm512_store_si512(at + 288, both(20, 28));
        }
    }
    from += INT4_BLOCK;
    to += 1024;
    settle_memory();
}

// The kernels below call ahead.step() once for every 32 inputs.

// Up to 16 rows: two sets of sums, for even and odd steps, keep the tile unit's pipeline full.
template <class Ahead>
void bf16_rows16(const bf16* a, int rows, const uint8_t* b, int steps, float* out, int stride, Ahead& ahead) {
    const int a_step = rows * 32;
    use_tiles(rows);
    zero_sums();
    for (int s = 0; s < steps; s += 2, a += 2 * a_step, b += 4096) {
        ahead.step();
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 1024, 64);
        _tile_dpbf16ps(1, 4, 7);
        ahead.step();
        _tile_loadd(5, a + a_step, 64);
        _tile_loadd(6, b + 2048, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, b + 3072, 64);
        _tile_dpbf16ps(3, 5, 7);
    }
    alignas(64) float odd[2][16][16];
    _tile_stored(0, out, stride * 4);
    _tile_stored(1, out + 16, stride * 4);
    _tile_stored(2, odd[0], 64);
    _tile_stored(3, odd[1], 64);
    for (int r = 0; r < rows; ++r)
        for (int h = 0; h < 2; ++h) {
            float* y = out + static_cast<size_t>(r) * stride + 16 * h;
            _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), _mm512_load_ps(odd[h][r])));
        }
}

template <class Ahead>
void bf16_rows32(const bf16* a, int a_tile, const uint8_t* b, int steps, float* out, int stride, Ahead& ahead) {
    use_tiles(16);
    zero_sums();
    for (int s = 0; s < steps; ++s, a += 512, b += 2048) {
        ahead.step();
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 1024, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + a_tile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, stride * 4);
    _tile_stored(1, out + 16, stride * 4);
    _tile_stored(2, out + 16 * static_cast<size_t>(stride), stride * 4);
    _tile_stored(3, out + 16 * static_cast<size_t>(stride) + 16, stride * 4);
}

// Rows [row, row + 32) or fewer.
template <class Ahead>
void bf16_block(const Activations& a, int row, int rows, const uint8_t* b, float* out, int stride, Ahead& ahead) {
    if (rows > 16)
        bf16_rows32(a.chunk(row, 0), a.k * 16, b, a.k / 32, out, stride, ahead);
    else
        bf16_rows16(a.chunk(row, 0), a.tile_rows, b, a.k / 32, out, stride, ahead);
}

void multiply_bf16(const Linear& w, const Activations& a, int row, int rows, int pair, float* out, int stride) {
    const uint8_t* b = w.data + pair * pair_bytes(w);
    Prefetch prefetch{b + pair_bytes(w), 2048 / ((rows + 31) / 32) / 64 * 64};
    for (int r = 0; r < rows; r += 32)
        bf16_block(a, row + r, rows - r, b, out + static_cast<size_t>(r) * stride, stride, prefetch);
}

// The first rows' pass expands the weights to bf16 as it goes, a step ahead.
void multiply_int4(const Linear& w, const Activations& a, int row, int rows, int pair, float* out, int stride,
                   bf16* expanded) {
    const uint8_t* b = reinterpret_cast<const uint8_t*>(expanded);
    const uint8_t* packed = w.data + pair * pair_bytes(w);
    Expansion expansion{packed, packed + pair_bytes(w), expanded};
    expansion.step();
    bf16_block(a, row, rows, b, out, stride, expansion);
    Nothing nothing;
    for (int r = 32; r < rows; r += 32)
        bf16_block(a, row + r, rows - r, b, out + static_cast<size_t>(r) * stride, stride, nothing);
}

// y = activation scale * weight scale * (128 * high + low), less what storing weights + 128 added.
void finish_int8(const Linear& w, const Activations& a, int row, int rows, int pair, const int32_t (*high)[2][16],
                 const int32_t (*low)[2][16], float* out, int stride) {
    const float* scales = w.scale + pair * PAIR;
    for (int r = 0; r < rows; ++r) {
        const __m512i above = _mm512_set1_epi32(128 * a.sums[2 * (row + r)]);
        const __m512i below = _mm512_set1_epi32(128 * a.sums[2 * (row + r) + 1]);
        const __m512 row_scale = _mm512_set1_ps(a.scale[row + r]);
        for (int h = 0; h < 2; ++h) {
            __m512 top = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(high[r][h]), above));
            __m512 bottom = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(low[r][h]), below));
            __m512 y = _mm512_mul_ps(_mm512_fmadd_ps(top, _mm512_set1_ps(128.0f), bottom), row_scale);
            _mm512_storeu_ps(out + static_cast<size_t>(r) * stride + 16 * h, _mm512_mul_ps(y, _mm512_loadu_ps(scales + 16 * h)));
        }
    }
}

// Up to 8 rows: high and low parts are the rows of one tile.
void int8_rows8(const int8_t* a, int rows, const uint8_t* b, int steps, int32_t (*sums)[2][16], Prefetch& prefetch) {
    use_tiles(2 * rows);
    zero_sums();
    for (int s = 0; s < steps; ++s, a += rows * 128, b += 2048) {
        prefetch.step();
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b + 1024, 64);
        _tile_dpbsud(1, 4, 7);
    }
    _tile_stored(0, sums[0][0], 128);
    _tile_stored(1, sums[0][1], 128);
}

void int8_rows16(const int8_t* a, int rows, const uint8_t* b, int steps, int32_t (*high)[2][16], int32_t (*low)[2][16],
                 Prefetch& prefetch) {
    use_tiles(rows);
    zero_sums();
    for (int s = 0; s < steps; ++s, a += rows * 128, b += 2048) {
        prefetch.step();
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b + 1024, 64);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, a + rows * 64, 64);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, high[0][0], 128);
    _tile_stored(1, high[0][1], 128);
    _tile_stored(2, low[0][0], 128);
    _tile_stored(3, low[0][1], 128);
}

void multiply_int8(const Linear& w, const Activations& a, int row, int rows, int pair, float* out, int stride) {
    alignas(64) int32_t sums[2][16][2][16];
    const uint8_t* b = w.data + pair * pair_bytes(w);
    const int steps = a.k / 64, tiles = (rows + 15) / 16;
    Prefetch prefetch{b + pair_bytes(w), 2048 / tiles / 64 * 64};
    for (int r = 0; r < rows; r += 16) {
        const int count = rows - r < 16 ? rows - r : 16;
        const int8_t* from = a.high(row + r, 0);
        float* to = out + static_cast<size_t>(r) * stride;
        if (a.tile_rows <= 8) {
            int8_rows8(from, a.tile_rows, b, steps, sums[0], prefetch);
            finish_int8(w, a, row + r, count, pair, sums[0], sums[0] + a.tile_rows, to, stride);
        } else {
            int8_rows16(from, a.tile_rows, b, steps, sums[0], sums[1], prefetch);
            finish_int8(w, a, row + r, count, pair, sums[0], sums[1], to, stride);
        }
    }
}

}  // namespace

void use_tiles(int rows) {
    settle_memory();
    if (configured_rows == rows) return;
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = 64;
        config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : 16);
    }
    settle_memory();
    _tile_loadconfig(&config);
    settle_memory();
    configured_rows = rows;
}

void release_tiles() {
    if (configured_rows) _tile_release();
    configured_rows = 0;
}
#else
void use_tiles(int) {}
void release_tiles() {}
#endif

namespace {

// Rows up to which vectors beat tiles; measured, see benchmarks/engine.py --kernels.
constexpr int VECTOR_ROWS[3] = {1, 1, 4};

bool in_vectors(const Linear& w, int rows) { return rows <= VECTOR_ROWS[w.kind] || !tiles_allowed(); }

}  // namespace

bool wants_fixed_point(const Linear& w, int rows) {
    return w.kind == INT8 || (w.kind == INT4 && in_vectors(w, rows));
}

void multiply(const Linear& w, const Activations& a, int row, int rows, int pair, float* out, int stride,
              [[maybe_unused]] bf16* scratch) {
    if (in_vectors(w, a.rows)) return multiply_in_vectors(w, a, row, rows, pair, out, stride);
#ifdef TANDEM_AMX
    if (w.kind == BF16) return multiply_bf16(w, a, row, rows, pair, out, stride);
    if (w.kind == INT8) return multiply_int8(w, a, row, rows, pair, out, stride);
    multiply_int4(w, a, row, rows, pair, out, stride, scratch);
#endif
}

}  // namespace tandem
