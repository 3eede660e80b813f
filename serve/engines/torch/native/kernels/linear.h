// Linear layers with packed weights: y[rows, n] = x[rows, k] * W^T, 32 output columns (a "pair" of 16) at a time.
//
// One layout serves AMX tiles and AVX-512 vectors alike, because both want the same thing: 16 output columns side by
// side, each with a few consecutive inputs in its 32-bit lane. Every pair's weights are one contiguous stream.
//   bf16: [n/32][k/32][2 columns of 16][16 input pairs][16][2]            2 KiB for 32 inputs
//   int8: [n/32][k/64][2][16 input quads][16][4], unsigned: w + 128       2 KiB for 64 inputs
//   int4: [n/32][k/32]{32 bf16 scales, [2][4][16][4] bytes}, unsigned: w + 8, low nibble quads 0-3, high 4-7
// n is a multiple of 32 and k of 64, padded with zero weights.
#pragma once
#include "vec.h"

namespace tandem {

enum WeightKind { BF16 = 0, INT8 = 1, INT4 = 2 };

constexpr int PAIR = 32;         // output columns computed together
constexpr int GROUP = 32;        // inputs that share one int4 scale
constexpr int INT4_BLOCK = 576;  // bytes of 32 inputs x 32 outputs: scales and quants
constexpr int ROW_CHUNK = 256;   // rows of activations that stay in L2 while weights stream by

struct Linear {
    int kind;
    int n, k;            // padded
    const uint8_t* data;  // packed weights
    const float* scale;  // int8: [n]
    const float* bias;   // [n] or null
};

inline size_t pair_bytes(const Linear& w) {
    size_t k = static_cast<size_t>(w.k);
    return w.kind == BF16 ? k * 64 : w.kind == INT8 ? k * 32 : k / GROUP * INT4_BLOCK;
}

// Rows of activations in tiles of up to 16 rows x 32 inputs, each tile contiguous.
//
// For quantised weights every row is also held as 15-bit fixed point, x = scale * (128 * high + low), so that the
// products are exact in integers: the weights are quantised, the activations are not (bf16 keeps 8 bits).
struct Activations {
    int rows = 0, k = 0;
    int tile_rows = 1;
    bf16* x = nullptr;
    int8_t* fixed = nullptr;   // [rows/tile][k/64]{high [tile_rows][64], low [tile_rows][64]}, low is 0..127
    float* scale = nullptr;    // [rows]
    int32_t* sums = nullptr;   // [rows][2]: sum of high, sum of low
    int32_t* group_sums = nullptr;  // [rows][k/32]: sum of 128 * high + low

    void shape(int new_rows, int new_k) {
        rows = new_rows;
        k = new_k;
        tile_rows = new_rows < 16 ? new_rows : 16;
    }
    // The 32 values of `row` from input 32 * chunk on.
    bf16* chunk(int row, int index) const {
        size_t tile = static_cast<size_t>(row / tile_rows) * (k / 32) + index;
        return x + (tile * tile_rows + row % tile_rows) * 32;
    }
    // The high parts of the 64 values of `row` from input 64 * chunk on, and the low parts.
    int8_t* high(int row, int index) const {
        size_t tile = static_cast<size_t>(row / tile_rows) * (k / 64) + index;
        return fixed + (2 * tile * tile_rows + row % tile_rows) * 64;
    }
    int8_t* low(int row, int index) const { return high(row, index) + tile_rows * 64; }
    static int padded_rows(int rows) { return rows < 16 ? rows : (rows + 15) / 16 * 16; }
};

// Fill the fixed-point form of one row from x; the sums of groups only if asked for (int4 in vectors reads them).
void quantise_row(const Activations& a, int row, bool groups);

// Whether the kernel for this many rows reads the fixed-point activations.
bool wants_fixed_point(const Linear& w, int rows);

// Compute rows [row, row + rows) x columns [32 * pair, 32 * pair + 32) into out[rows][stride], scaled, without bias.
// `row` is a multiple of 16; out has room for rows rounded up to 16; `scratch` holds k * 64 bytes.
void multiply(const Linear& w, const Activations& a, int row, int rows, int pair, float* out, int stride, bf16* scratch);

// The same in vectors: reads each weight once for four rows. For few rows, and for CPUs without AMX.
void multiply_in_vectors(const Linear& w, const Activations& a, int row, int rows, int pair, float* out, int stride);

}  // namespace tandem
