// Few rows: every weight is read once from memory and multiplied in vectors; the memory's bandwidth is the limit.
#include "linear.h"

namespace tandem {
namespace {

constexpr int AHEAD = 4096;  // bytes between a load and the prefetch of what comes after it

inline void prefetch_lines(const uint8_t* p, int bytes) {
    for (int i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + AHEAD + i), _MM_HINT_T0);
}

inline __m512i broadcast(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
}

template <int R>
void bf16_rows(const Linear& w, const Activations& a, int row, int pair, float* out, int stride) {
    const uint8_t* p = w.data + pair * pair_bytes(w);
    // Two sets of sums (even and odd inputs), because one chain would wait for its own latency.
    __m512 sum[2][R][2];
    for (auto& set : sum)
        for (auto& r : set) r[0] = r[1] = _mm512_setzero_ps();
    for (int c = 0; c < w.k / 32; ++c, p += 2048) {
        prefetch_lines(p, 2048);
        const bf16* x[R];
        for (int r = 0; r < R; ++r) x[r] = a.chunk(row + r, c);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            __m512bh left = (__m512bh)_mm512_load_si512(p + 64 * i);
            __m512bh right = (__m512bh)_mm512_load_si512(p + 1024 + 64 * i);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                __m512bh v = (__m512bh)broadcast(x[r] + 2 * i);
                sum[i & 1][r][0] = _mm512_dpbf16_ps(sum[i & 1][r][0], left, v);
                sum[i & 1][r][1] = _mm512_dpbf16_ps(sum[i & 1][r][1], right, v);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) _mm512_storeu_ps(out + r * stride + 16 * h, _mm512_add_ps(sum[0][r][h], sum[1][r][h]));
}

template <int R>
void int8_rows(const Linear& w, const Activations& a, int row, int pair, float* out, int stride) {
    const uint8_t* p = w.data + pair * pair_bytes(w);
    __m512i high[R][2], low[R][2];
    for (int r = 0; r < R; ++r) {
        // weights are stored + 128: start from what that adds
        high[r][0] = high[r][1] = _mm512_set1_epi32(-128 * a.sums[2 * (row + r)]);
        low[r][0] = low[r][1] = _mm512_set1_epi32(-128 * a.sums[2 * (row + r) + 1]);
    }
    for (int c = 0; c < w.k / 64; ++c, p += 2048) {
        prefetch_lines(p, 2048);
        const int8_t *h[R], *l[R];
        for (int r = 0; r < R; ++r) {
            h[r] = a.high(row + r, c);
            l[r] = a.low(row + r, c);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            __m512i left = _mm512_load_si512(p + 64 * i);
            __m512i right = _mm512_load_si512(p + 1024 + 64 * i);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                __m512i vh = broadcast(h[r] + 4 * i), vl = broadcast(l[r] + 4 * i);
                high[r][0] = _mm512_dpbusd_epi32(high[r][0], left, vh);
                low[r][0] = _mm512_dpbusd_epi32(low[r][0], left, vl);
                high[r][1] = _mm512_dpbusd_epi32(high[r][1], right, vh);
                low[r][1] = _mm512_dpbusd_epi32(low[r][1], right, vl);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) {
            __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[r][h]), _mm512_set1_ps(128.0f), _mm512_cvtepi32_ps(low[r][h]));
            __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(w.scale + pair * PAIR + 16 * h), _mm512_set1_ps(a.scale[row + r]));
            _mm512_storeu_ps(out + r * stride + 16 * h, _mm512_mul_ps(y, scale));
        }
}

template <int R>
void int4_rows(const Linear& w, const Activations& a, int row, int pair, float* out, int stride) {
    const uint8_t* p = w.data + pair * pair_bytes(w);
    const __m512i mask = _mm512_set1_epi8(15);
    __m512 sum[R][2];
    for (auto& r : sum) r[0] = r[1] = _mm512_setzero_ps();
    const int groups = w.k / GROUP;
    for (int g = 0; g < groups; ++g, p += INT4_BLOCK) {
        prefetch_lines(p, INT4_BLOCK);
        const int8_t *h[R], *l[R];
        for (int r = 0; r < R; ++r) {
            h[r] = a.high(row + r, g / 2) + (g & 1) * 32;
            l[r] = a.low(row + r, g / 2) + (g & 1) * 32;
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            __m512i high[R], low[R];
            for (int r = 0; r < R; ++r) {
                high[r] = _mm512_setzero_si512();
                low[r] = _mm512_set1_epi32(-8 * a.group_sums[static_cast<size_t>(row + r) * groups + g]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                __m512i q = _mm512_loadu_si512(p + 64 + half * 256 + 64 * i);
                __m512i first = _mm512_and_si512(q, mask);
                __m512i second = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    high[r] = _mm512_dpbusd_epi32(high[r], first, broadcast(h[r] + 4 * i));
                    low[r] = _mm512_dpbusd_epi32(low[r], first, broadcast(l[r] + 4 * i));
                    high[r] = _mm512_dpbusd_epi32(high[r], second, broadcast(h[r] + 16 + 4 * i));
                    low[r] = _mm512_dpbusd_epi32(low[r], second, broadcast(l[r] + 16 + 4 * i));
                }
            }
            __m512 scale = load_bf16(reinterpret_cast<const bf16*>(p) + 16 * half);
            for (int r = 0; r < R; ++r) {
                __m512i total = _mm512_add_epi32(_mm512_slli_epi32(high[r], 7), low[r]);
                sum[r][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, sum[r][half]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int half = 0; half < 2; ++half)
            _mm512_storeu_ps(out + r * stride + 16 * half, _mm512_mul_ps(sum[r][half], _mm512_set1_ps(a.scale[row + r])));
}

using Kernel = void (*)(const Linear&, const Activations&, int, int, float*, int);

constexpr Kernel KERNELS[3][4] = {
    {bf16_rows<1>, bf16_rows<2>, bf16_rows<3>, bf16_rows<4>},
    {int8_rows<1>, int8_rows<2>, int8_rows<3>, int8_rows<4>},
    {int4_rows<1>, int4_rows<2>, int4_rows<3>, int4_rows<4>},
};

}  // namespace

void multiply_in_vectors(const Linear& w, const Activations& a, int row, int rows, int pair, float* out, int stride) {
    for (int r = 0; r < rows; r += 4) {
        int count = rows - r < 4 ? rows - r : 4;
        KERNELS[w.kind][count - 1](w, a, row + r, pair, out + static_cast<size_t>(r) * stride, stride);
    }
}

void quantise_row(const Activations& a, int row, bool groups) {
    __m512 most = _mm512_setzero_ps();
    for (int c = 0; c < a.k / 32; ++c) {
        const bf16* x = a.chunk(row, c);
        most = _mm512_max_ps(most, _mm512_max_ps(_mm512_abs_ps(load_bf16(x)), _mm512_abs_ps(load_bf16(x + 16))));
    }
    const float largest = _mm512_reduce_max_ps(most);
    const float step = largest > 0 ? largest / 16256.0f : 1.0f;  // 127 * 128: high stays within a signed byte
    const __m512 inverse = _mm512_set1_ps(1.0f / step);
    __m512i all_high = _mm512_setzero_si512(), all_low = _mm512_setzero_si512();
    for (int c = 0; c < a.k / 32; ++c) {
        const bf16* x = a.chunk(row, c);
        int8_t* to = a.high(row, c / 2) + (c & 1) * 32;
        __m512i group = _mm512_setzero_si512();
        for (int half = 0; half < 2; ++half) {
            __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(load_bf16(x + 16 * half), inverse));
            __m512i high = _mm512_srai_epi32(v, 7), low = _mm512_and_si512(v, _mm512_set1_epi32(127));
            all_high = _mm512_add_epi32(all_high, high);
            all_low = _mm512_add_epi32(all_low, low);
            group = _mm512_add_epi32(group, v);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * half), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + a.tile_rows * 64 + 16 * half), _mm512_cvtepi32_epi8(low));
        }
        if (groups) a.group_sums[static_cast<size_t>(row) * (a.k / GROUP) + c] = _mm512_reduce_add_epi32(group);
    }
    a.scale[row] = step;
    a.sums[2 * row] = _mm512_reduce_add_epi32(all_high);
    a.sums[2 * row + 1] = _mm512_reduce_add_epi32(all_low);
}

}  // namespace tandem
