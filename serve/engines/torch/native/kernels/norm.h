// Normalisation of rows of the residual stream (float32) into activations (bf16).
#pragma once
#include <cmath>

#include "model.h"

namespace tandem {

inline __mmask16 lanes(int count) { return count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1; }

struct RowScale {
    float mean, inverse;
};

// x is padded with zeros to a multiple of 16; only `count` values are real.
inline RowScale row_scale(const float* x, int count, int kind, float epsilon) {
    float mean = 0;
    if (kind == LAYER_NORM) {
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; i < count; i += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(count - i), x + i));
        mean = _mm512_reduce_add_ps(sum) / count;
    }
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16) {
        __m512 v = _mm512_maskz_sub_ps(lanes(count - i), _mm512_maskz_loadu_ps(lanes(count - i), x + i), _mm512_set1_ps(mean));
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    return {mean, 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / count + epsilon)};
}

inline __m512 normed(const float* x, const Norm& norm, RowScale scale, int at) {
    __m512 v = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + at), _mm512_set1_ps(scale.mean)), _mm512_set1_ps(scale.inverse));
    v = _mm512_mul_ps(v, _mm512_loadu_ps(norm.weight + at));
    return norm.bias ? _mm512_add_ps(v, _mm512_loadu_ps(norm.bias + at)) : v;
}

// Write the norm of x to row `row` of `a`, whose k is the padded width.
inline void normalise(const float* x, int count, const Norm& norm, int kind, float epsilon, const Activations& a, int row) {
    RowScale scale = row_scale(x, count, kind, epsilon);
    for (int c = 0; c < a.k / 32; ++c)
        store_bf16(a.chunk(row, c), normed(x, norm, scale, 32 * c), normed(x, norm, scale, 32 * c + 16));
}

// x += norm(y): a branch's output on its way to the residual stream.
inline void add_normalised(float* x, const float* y, int count, int padded, const Norm& norm, int kind, float epsilon) {
    RowScale scale = row_scale(y, count, kind, epsilon);
    for (int i = 0; i < padded; i += 16) _mm512_storeu_ps(x + i, _mm512_add_ps(_mm512_loadu_ps(x + i), normed(y, norm, scale, i)));
}

// RMS norm of one head in place, in the padded width.
inline void normalise_head(float* x, int count, const float* weight, float epsilon) {
    RowScale scale = row_scale(x, count, RMS_NORM, epsilon);
    for (int i = 0; i < count; i += 16) {
        __mmask16 m = lanes(count - i);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), _mm512_set1_ps(scale.inverse));
        _mm512_mask_storeu_ps(x + i, m, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(m, weight + i)));
    }
}

// Rotary embedding of one head in place: value i turns with value i + half.
inline void rotate(float* x, const float* cosine, const float* sine, int half) {
    for (int i = 0; i < half; i += 16) {
        __mmask16 m = lanes(half - i);
        __m512 a = _mm512_maskz_loadu_ps(m, x + i), b = _mm512_maskz_loadu_ps(m, x + half + i);
        __m512 c = _mm512_maskz_loadu_ps(m, cosine + i), s = _mm512_maskz_loadu_ps(m, sine + i);
        _mm512_mask_storeu_ps(x + i, m, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        _mm512_mask_storeu_ps(x + half + i, m, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}

}  // namespace tandem
