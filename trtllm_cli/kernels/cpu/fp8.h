// E4M3 of OCP's 8-bit floating point: a sign, 4 bits of exponent (bias 7), 3 of mantissa; largest 448, NaN 0x7f, no
// infinity.
#pragma once

#include "simd.h"

// By way of float16, where the CPU has it: the same bits with 8 less in the exponent, subnormals too.
INLINE vf load_fp8(const uint8_t* p) {
#if defined(__AVX512F__)
    __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
    half = _mm256_and_si256(half, _mm256_set1_epi16((short)0xbf80));  // the sign was shifted into two bits
    const __m256i largest = _mm256_set1_epi16(0x3f80);                // NaN: all ones
    half = _mm256_or_si256(half, _mm256_cmpeq_epi16(_mm256_and_si256(half, largest), largest));
    return 256.0f * (vf)_mm512_cvtph_ps(half);
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
    half = _mm_and_si128(half, _mm_set1_epi16((short)0xbf80));
    const __m128i largest = _mm_set1_epi16(0x3f80);
    half = _mm_or_si128(half, _mm_cmpeq_epi16(_mm_and_si128(half, largest), largest));
    return 256.0f * (vf)_mm256_cvtph_ps(half);
#else
    typedef uint8_t bytes __attribute__((vector_size(kWidth)));
    bytes b;
    memcpy(&b, p, sizeof b);
    const vi bits = __builtin_convertvector(b, vi), size = (bits & 0x7f) << 20;
    const vf normal = as_float(size + (120 << 23));
    // A subnormal is m / 8 * 2^-6, and `normal` then (1 + m / 8) * 2^-7.
    const vf x = size < (1 << 23) ? normal + normal - 0x1p-6f : normal;
    const vf number = size == (0x7f << 20) ? splat(__builtin_nanf("")) : x;
    return as_float(as_int(number) | (bits & 0x80) << 24);
#endif
}

// load_fp8 of weights, which are no NaN, without its last multiplication: 2^-8 of the numbers.
INLINE vf load_fp8_256ths(const uint8_t* p) {
#if defined(__AVX512F__)
    __m256i w = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
    return (vf)_mm512_cvtph_ps(_mm256_and_si256(w, _mm256_set1_epi16((int16_t)0xbf80)));
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    __m128i w = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
    return (vf)_mm256_cvtph_ps(_mm_and_si128(w, _mm_set1_epi16((int16_t)0xbf80)));
#else
    typedef int8_t bytes __attribute__((vector_size(kWidth)));
    bytes b;
    memcpy(&b, p, sizeof b);
    return as_float((__builtin_convertvector(b, vi) << 20) & (int32_t)0x87f00000) * 0x1p112f;
#endif
}

// To nearest, ties to even; what is larger than 448 becomes 448.
inline uint8_t float_to_fp8(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint8_t sign = bits >> 31 << 7;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return 0x7f;
    if (bits >= 0x43e00000) return sign | 0x7e;
    if (bits < 0x3c800000) {  // below 2^-6: multiples of 2^-9, the last of which is the first normal number
        float size;
        memcpy(&size, &bits, 4);
        return sign | (uint8_t)(int)(size * 512.0f + 8388608.0f - 8388608.0f);
    }
    return (uint8_t)(sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)));
}
