// AVX-512 helpers: bf16 conversion and the few transcendental functions a decoder needs.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace tandem {

using bf16 = uint16_t;

inline float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}

inline __m512 load_bf16(const bf16* p) {
    __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// Rounds to nearest even.
inline void store_bf16(bf16* p, __m512 low, __m512 high) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

inline void store_bf16(bf16* p, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}

// e^x to about 2e-7 relative: 2^n times a polynomial on [-ln2/2, ln2/2].
inline __m512 exp512(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
    x = _mm512_min_ps(x, _mm512_set1_ps(88.7f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0x08);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

inline __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp512(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

inline __m512 tanh512(__m512 x) {
    __m512 two = _mm512_set1_ps(2.0f);
    return _mm512_fmsub_ps(two, sigmoid(_mm512_mul_ps(two, x)), _mm512_set1_ps(1.0f));
}

// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
inline __m512 erf512(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 a = _mm512_abs_ps(x);
    __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(_mm512_set1_ps(0.3275911f), a, one));
    __m512 p = _mm512_set1_ps(1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
    __m512 e = exp512(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(a, a)));
    __m512 y = _mm512_fnmadd_ps(_mm512_mul_ps(p, t), e, one);
    __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_sub_ps(y, negative, _mm512_setzero_ps(), y);
}

enum Activation { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };

inline __m512 activate(int kind, __m512 x) {
    switch (kind) {
        case SILU:
            return _mm512_mul_ps(x, sigmoid(x));
        case GELU_TANH: {
            __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
            __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
            return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(u, _mm512_set1_ps(1.5957691216f))));
        }
        case GELU: {
            __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
            return _mm512_fmadd_ps(half, erf512(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f))), half);
        }
        default:
            return _mm512_max_ps(x, _mm512_setzero_ps());
    }
}

}  // namespace tandem
