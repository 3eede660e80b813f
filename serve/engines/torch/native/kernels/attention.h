// Attention over a paged cache: queries of one KV group against the blocks of one sequence.
#pragma once
#include "vec.h"

namespace tandem {

constexpr int BLOCK = 32;        // tokens of a cache block
constexpr int TILE_ROWS = 16;    // queries attended together at most
constexpr int SPAN_BLOCKS = 8;   // blocks whose scores are held at once

// Inside a block and KV head, both in what a product's right side wants, [pairs][columns][2]:
//   keys   [width/2][32 tokens][2]
//   values [16 token pairs][width][2]
// `width` is the head dimension rounded up to 32; the padding is zero.
struct Cache {
    bf16* keys;    // [blocks][kv_heads][width * 32]
    bf16* values;
    int kv_heads, width;

    bf16* key_block(int block, int head) const { return keys + offset(block, head); }
    bf16* value_block(int block, int head) const { return values + offset(block, head); }

   private:
    size_t offset(int block, int head) const {
        return (static_cast<size_t>(block) * kv_heads + head) * width * BLOCK;
    }
};

// Rows are (token, head) with the token outermost; the rows' token t sees keys [max(0, limit - window), limit) with
// limit = first_limit + t.
struct AttentionItem {
    const bf16* query;   // of the first token and head; heads are `width` apart
    int token_stride;    // between the queries, and the outputs, of two tokens
    int tokens, heads;
    int first_limit;
    const int32_t* blocks;
    int kv_head;
};

struct AttentionRule {
    float scale;
    float softcap;  // 0: none
    int window;     // 0: none
};

// Each thread's own memory for `attend`.
struct AttentionScratch {
    alignas(64) float scores[TILE_ROWS][SPAN_BLOCKS * BLOCK];
    alignas(64) bf16 weights[SPAN_BLOCKS][TILE_ROWS][BLOCK];
    alignas(64) bf16 queries[256 / 32][TILE_ROWS][32];
    alignas(64) float sums[TILE_ROWS][256];
};

constexpr int MOST_WIDTH = 256;

void write_key(const Cache& cache, int slot, int head, const bf16* key);
void write_value(const Cache& cache, int slot, int head, const bf16* value);

// Leaves the result in scratch.sums[row][0, width), normalised.
void attend(const Cache& cache, const AttentionItem& item, const AttentionRule& rule, AttentionScratch& scratch);

}  // namespace tandem
