// Attention: one query in vectors, many in tiles.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "tiles.h"

namespace tandem {
namespace {

// Queries up to which vectors beat tiles, whose products take as long for one row as for sixteen.
constexpr int VECTOR_QUERIES = 2;

// Blocks of a sequence whose scores are held at once.
struct Span {
    const int32_t* blocks;
    int count, head;
    int visible;  // keys from the first block on that any row sees

    // Keys of block b that exist; the rest is skipped.
    int filled(int b) const { return std::min(BLOCK, visible - b * BLOCK); }
};

// scores[rows][32] of one block: queries [rows][width] times its keys, the first 16 or all 32.
template <int HALVES>
void score_block(const AttentionScratch& s, int rows, int width, const bf16* keys, float* scores, int stride) {
    for (int r = 0; r < rows; ++r) {
        __m512 even[HALVES], odd[HALVES];
        for (int h = 0; h < HALVES; ++h) even[h] = odd[h] = _mm512_setzero_ps();
        for (int c = 0; c < width / 32; ++c) {
            const int32_t* query = reinterpret_cast<const int32_t*>(s.queries[c][r]);
            const bf16* pair = keys + c * 16 * 64;
#pragma GCC unroll 8
            for (int i = 0; i < 16; i += 2, pair += 128)
                for (int h = 0; h < HALVES; ++h) {
                    __m512bh first = (__m512bh)_mm512_set1_epi32(query[i]), second = (__m512bh)_mm512_set1_epi32(query[i + 1]);
                    even[h] = _mm512_dpbf16_ps(even[h], first, (__m512bh)_mm512_load_si512(pair + 32 * h));
                    odd[h] = _mm512_dpbf16_ps(odd[h], second, (__m512bh)_mm512_load_si512(pair + 64 + 32 * h));
                }
        }
        for (int h = 0; h < HALVES; ++h) _mm512_storeu_ps(scores + r * stride + 16 * h, _mm512_add_ps(even[h], odd[h]));
    }
}

// sums[row][width] += weights[rows] of one block times the values of its first `filled` tokens.
void add_block(AttentionScratch& s, int rows, int width, int at, int filled, const bf16* values) {
    for (int r = 0; r < rows; ++r) {
        const int32_t* weights = reinterpret_cast<const int32_t*>(s.weights[at][r]);
        for (int c = 0; c < width; c += 32) {
            float* to = s.sums[r] + c;
            __m512 even[2] = {_mm512_load_ps(to), _mm512_load_ps(to + 16)};
            __m512 odd[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            const bf16* v = values + c * 2;
            for (int i = 0; i < (filled + 1) / 2; i += 2, v += 4 * width) {
                __m512bh first = (__m512bh)_mm512_set1_epi32(weights[i]);
                __m512bh second = (__m512bh)_mm512_set1_epi32(weights[i + 1]);
                even[0] = _mm512_dpbf16_ps(even[0], first, (__m512bh)_mm512_load_si512(v));
                even[1] = _mm512_dpbf16_ps(even[1], first, (__m512bh)_mm512_load_si512(v + 32));
                odd[0] = _mm512_dpbf16_ps(odd[0], second, (__m512bh)_mm512_load_si512(v + 2 * width));
                odd[1] = _mm512_dpbf16_ps(odd[1], second, (__m512bh)_mm512_load_si512(v + 2 * width + 32));
            }
            _mm512_store_ps(to, _mm512_add_ps(even[0], odd[0]));
            _mm512_store_ps(to + 16, _mm512_add_ps(even[1], odd[1]));
        }
    }
}

void score_in_vectors(AttentionScratch& s, const Cache& cache, const Span& span, int rows) {
    for (int b = 0; b < span.count; ++b) {
        const bf16* keys = cache.key_block(span.blocks[b], span.head);
        float* scores = s.scores[0] + b * BLOCK;
        auto score = span.filled(b) > 16 ? score_block<2> : score_block<1>;
        score(s, rows, cache.width, keys, scores, SPAN_BLOCKS * BLOCK);
    }
}

void add_values_in_vectors(AttentionScratch& s, const Cache& cache, const Span& span, int rows) {
    for (int b = 0; b < span.count; ++b)
        add_block(s, rows, cache.width, b, span.filled(b), cache.value_block(span.blocks[b], span.head));
}

#ifdef TANDEM_AMX
void score_in_tiles(AttentionScratch& s, const Cache& cache, const Span& span) {
    settle_memory();
    for (int b = 0; b < span.count; ++b) {
        const bf16* keys = cache.key_block(span.blocks[b], span.head);
        const bool both = span.filled(b) > 16;
        _tile_zero(0);
        _tile_zero(1);
        for (int c = 0; c < cache.width / 32; ++c) {
            _tile_loadd(4, s.queries[c], 64);
            _tile_loadd(6, keys + c * 1024, 128);
            _tile_dpbf16ps(0, 4, 6);
            if (!both) continue;
            _tile_loadd(7, keys + c * 1024 + 32, 128);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, s.scores[0] + b * BLOCK, sizeof(s.scores[0]));
        _tile_stored(1, s.scores[0] + b * BLOCK + 16, sizeof(s.scores[0]));
    }
}

// 64 columns at a time, so that their four sums stay in tiles over all blocks of the span.
void add_values_in_tiles(AttentionScratch& s, const Cache& cache, const Span& span) {
    const int stride = sizeof(s.sums[0]), v_stride = cache.width * 4;
    settle_memory();
    for (int column = 0; column < cache.width; column += 64) {
        const bool four = cache.width - column > 32;
        float* to = s.sums[0] + column;
        _tile_loadd(0, to, stride);
        _tile_loadd(1, to + 16, stride);
        if (four) {
            _tile_loadd(2, to + 32, stride);
            _tile_loadd(3, to + 48, stride);
        }
        for (int b = 0; b < span.count; ++b) {
            const bf16* v = cache.value_block(span.blocks[b], span.head) + 2 * column;
            _tile_loadd(4, s.weights[b], 64);
            _tile_loadd(6, v, v_stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, v + 32, v_stride);
            _tile_dpbf16ps(1, 4, 7);
            if (!four) continue;
            _tile_loadd(6, v + 64, v_stride);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, v + 96, v_stride);
            _tile_dpbf16ps(3, 4, 7);
        }
        _tile_stored(0, to, stride);
        _tile_stored(1, to + 16, stride);
        if (!four) continue;
        _tile_stored(2, to + 32, stride);
        _tile_stored(3, to + 48, stride);
    }
}
#else
void score_in_tiles(AttentionScratch&, const Cache&, const Span&) {}
void add_values_in_tiles(AttentionScratch&, const Cache&, const Span&) {}
#endif

// Online softmax of one row over a span of keys [begin, begin + count): scores become bf16 weights.
struct RowState {
    float most = -INFINITY, total = 0;
    int first = 0, limit = 0;  // keys that the row sees

    void weigh(AttentionScratch& s, int row, int width, int begin, int count, const AttentionRule& rule) {
        float* scores = s.scores[row];
        __m512 highest = _mm512_set1_ps(-INFINITY);
        for (int k = 0; k < count; k += 16) {
            __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + k), _mm512_set1_ps(rule.scale));
            if (rule.softcap > 0) {
                __m512 cap = _mm512_set1_ps(rule.softcap);
                x = _mm512_mul_ps(tanh512(_mm512_div_ps(x, cap)), cap);
            }
            x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), visible(begin + k), x);
            _mm512_store_ps(scores + k, x);
            highest = _mm512_max_ps(highest, x);
        }
        float most_now = std::max(most, _mm512_reduce_max_ps(highest));
        if (most_now == -INFINITY) return hide(s, row, count);
        if (most_now != most && total > 0) rescale(s.sums[row], width, std::exp(most - most_now));
        most = most_now;
        __m512 sum = _mm512_setzero_ps();
        for (int k = 0; k < count; k += 32) {
            __m512 low = weight(scores + k, begin + k), high = weight(scores + k + 16, begin + k + 16);
            sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
            store_bf16(s.weights[k / BLOCK][row], low, high);
        }
        total += _mm512_reduce_add_ps(sum);
    }

   private:
    __mmask16 visible(int key) const {
        __m512i at = _mm512_add_epi32(_mm512_set1_epi32(key), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        return _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32(limit)) & _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(first));
    }

    __m512 weight(const float* scores, int key) const {
        return _mm512_maskz_mov_ps(visible(key), exp512(_mm512_sub_ps(_mm512_load_ps(scores), _mm512_set1_ps(most))));
    }

    // No key of this span is visible.
    void hide(AttentionScratch& s, int row, int count) const {
        for (int k = 0; k < count; k += BLOCK) _mm512_store_si512(s.weights[k / BLOCK][row], _mm512_setzero_si512());
    }

    void rescale(float* sums, int width, float factor) {
        total *= factor;
        for (int i = 0; i < width; i += 16) _mm512_store_ps(sums + i, _mm512_mul_ps(_mm512_load_ps(sums + i), _mm512_set1_ps(factor)));
    }
};

void load_queries(const AttentionItem& item, int width, AttentionScratch& s) {
    for (int t = 0, r = 0; t < item.tokens; ++t)
        for (int h = 0; h < item.heads; ++h, ++r)
            for (int c = 0; c < width / 32; ++c) {
                const bf16* from = item.query + static_cast<size_t>(t) * item.token_stride + h * width + c * 32;
                // tiles are read with one row after the other, whatever their number
                _mm512_store_si512(s.queries[c][r], _mm512_loadu_si512(from));
            }
}

}  // namespace

void write_key(const Cache& cache, int slot, int head, const bf16* key) {
    int32_t* to = reinterpret_cast<int32_t*>(cache.key_block(slot / BLOCK, head)) + slot % BLOCK;
    const int32_t* pairs = reinterpret_cast<const int32_t*>(key);
    for (int i = 0; i < cache.width / 2; ++i) to[i * BLOCK] = pairs[i];
}

void write_value(const Cache& cache, int slot, int head, const bf16* value) {
    const int offset = slot % BLOCK;
    bf16* to = cache.value_block(slot / BLOCK, head) + static_cast<size_t>(offset / 2) * cache.width * 2;
    const __mmask32 lanes = offset % 2 ? 0xAAAAAAAA : 0x55555555;
    for (int c = 0; c < cache.width; c += 16) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + c)));
        if (offset % 2) wide = _mm512_slli_epi32(wide, 16);
        _mm512_mask_storeu_epi16(to + 2 * c, lanes, wide);
    }
}

void attend(const Cache& cache, const AttentionItem& item, const AttentionRule& rule, AttentionScratch& s) {
    const int width = cache.width, rows = item.tokens * item.heads;
    const bool tiles = rows > VECTOR_QUERIES && tiles_allowed();
    RowState state[TILE_ROWS];
    for (int r = 0; r < rows; ++r) {
        state[r].limit = item.first_limit + r / item.heads;
        state[r].first = rule.window > 0 ? std::max(0, state[r].limit - rule.window) : 0;
        std::fill_n(s.sums[r], width, 0.0f);
    }
    load_queries(item, width, s);
    const int limit = state[rows - 1].limit, end = (limit + BLOCK - 1) / BLOCK;
    if (tiles) use_tiles(rows);
    for (int block = state[0].first / BLOCK; block < end; block += SPAN_BLOCKS) {
        const int count = std::min(SPAN_BLOCKS, end - block);
        const Span span{item.blocks + block, count, item.kv_head, limit - block * BLOCK};
        tiles ? score_in_tiles(s, cache, span) : score_in_vectors(s, cache, span, rows);
        for (int r = 0; r < rows; ++r) state[r].weigh(s, r, width, block * BLOCK, count * BLOCK, rule);
        tiles ? add_values_in_tiles(s, cache, span) : add_values_in_vectors(s, cache, span, rows);
    }
    for (int r = 0; r < rows; ++r) {
        const __m512 inverse = _mm512_set1_ps(1.0f / state[r].total);
        for (int c = 0; c < width; c += 16) _mm512_store_ps(s.sums[r] + c, _mm512_mul_ps(_mm512_load_ps(s.sums[r] + c), inverse));
    }
}

}  // namespace tandem
