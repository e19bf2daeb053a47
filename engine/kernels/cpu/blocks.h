// Weights in the blocks they are stored in, to floats. Blocks are those of ggml-common.h (ggml-org/llama.cpp); what is
// unpacked is what dequantizing there gives, to the bit.

#pragma once

#include "vector.h"

static INLINE float half_at(const uint8_t *p) {
    _Float16 value;
    memcpy(&value, p, 2);
    return (float)value;
}

#define ROLLED _Pragma("GCC unroll 1") // a loop taken apart before it is made of vectors is never made of vectors

static INLINE void f32(const uint8_t *restrict p, float *restrict w) { memcpy(w, p, 32 * 4); }

#ifdef __AVX512F__
static INLINE void f16(const uint8_t *p, float *w) {
    for (int i = 0; i < 32; i += 16) _mm512_storeu_ps(w + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p + 2 * i))));
}

static INLINE void bf16(const uint8_t *p, float *w) {
    for (int i = 0; i < 32; i += 16) {
        __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p + 2 * i)));
        _mm512_storeu_si512(w + i, _mm512_slli_epi32(bits, 16));
    }
}

static INLINE __m512 all_half_at(const uint8_t *p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    return _mm512_cvtph_ps(_mm256_set1_epi16(bits));
}

// Four-bit weights by look-up: sixteen values are one register, and a permutation reads but four bits of an index. The
// low halves of 16 bytes go to `low`, the high ones to `high`.
static INLINE void look_up(const uint8_t *q, __m512 low_values, __m512 high_values, float *low, float *high) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)q));
    _mm512_storeu_ps(low, _mm512_permutexvar_ps(bytes, low_values));
    _mm512_storeu_ps(high, _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), high_values));
}

static INLINE void q4_0(const uint8_t *restrict p, float *restrict w) {
    const __m512 numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m512 values = _mm512_mul_ps(numbers, all_half_at(p));
    look_up(p + 2, values, values, w, w + 16);
}

static INLINE void q4_1(const uint8_t *restrict p, float *restrict w) {
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 values = _mm512_fmadd_ps(numbers, all_half_at(p), all_half_at(p + 2));
    look_up(p + 4, values, values, w, w + 16);
}

static INLINE void q8_0(const uint8_t *restrict p, float *restrict w) {
    __m512 d = all_half_at(p);
    for (int i = 0; i < 32; i += 16) {
        __m512i q = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 2 + i)));
        _mm512_storeu_ps(w + i, _mm512_mul_ps(_mm512_cvtepi32_ps(q), d));
    }
}
#else
static INLINE void f16(const uint8_t *restrict p, float *restrict w) {
    for (int i = 0; i < 32; i++) w[i] = half_at(p + 2 * i);
}

static INLINE void bf16(const uint8_t *restrict p, float *restrict w) {
    for (int i = 0; i < 32; i++) {
        uint32_t bits = (uint32_t)p[2 * i] << 16 | (uint32_t)p[2 * i + 1] << 24;
        memcpy(w + i, &bits, 4);
    }
}

static INLINE void q4_0(const uint8_t *restrict p, float *restrict w) {
    float d = half_at(p);
    ROLLED for (int i = 0; i < 16; i++) w[i] = (float)((p[i + 2] & 15) - 8) * d;
    ROLLED for (int i = 0; i < 16; i++) w[i + 16] = (float)((p[i + 2] >> 4) - 8) * d;
}

static INLINE void q4_1(const uint8_t *restrict p, float *restrict w) {
    float d = half_at(p), m = half_at(p + 2);
    ROLLED for (int i = 0; i < 16; i++) w[i] = (float)(p[i + 4] & 15) * d + m;
    ROLLED for (int i = 0; i < 16; i++) w[i + 16] = (float)(p[i + 4] >> 4) * d + m;
}

static INLINE void q8_0(const uint8_t *restrict p, float *restrict w) {
    float d = half_at(p);
    const int8_t *q = (const int8_t *)(p + 2);
    for (int i = 0; i < 32; i++) w[i] = (float)q[i] * d;
}
#endif

static INLINE void fifth(uint32_t bits, const uint8_t *p, uint8_t *q) {
    ROLLED for (int i = 0; i < 16; i++) {
        q[i] = (p[i] & 15) | (bits >> i & 1) << 4;
        q[i + 16] = p[i] >> 4 | (bits >> (i + 16) & 1) << 4;
    }
}

static INLINE void q5_0(const uint8_t *restrict p, float *restrict w) {
    uint32_t bits;
    uint8_t q[32];
    memcpy(&bits, p + 2, 4);
    fifth(bits, p + 6, q);
    float d = half_at(p);
    for (int i = 0; i < 32; i++) w[i] = (float)(q[i] - 16) * d;
}

static INLINE void q5_1(const uint8_t *restrict p, float *restrict w) {
    uint32_t bits;
    uint8_t q[32];
    memcpy(&bits, p + 4, 4);
    fifth(bits, p + 8, q);
    float d = half_at(p), m = half_at(p + 2);
    for (int i = 0; i < 32; i++) w[i] = (float)q[i] * d + m;
}

// The eight 6-bit scales and minima of a K block, packed into 12 bytes.
static INLINE void scale_min(int i, const uint8_t *s, uint8_t *scale, uint8_t *minimum) {
    if (i < 4) {
        *scale = s[i] & 63;
        *minimum = s[i + 4] & 63;
    } else {
        *scale = (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
        *minimum = s[i + 4] >> 4 | (s[i] >> 6) << 4;
    }
}

static INLINE void q4_k(const uint8_t *restrict p, float *restrict w) {
    float d = half_at(p), m = half_at(p + 2);
    for (int i = 0; i < 8; i += 2) {
        const uint8_t *q = p + 16 + 16 * i;
        uint8_t s0, m0, s1, m1;
        scale_min(i, p + 4, &s0, &m0);
        scale_min(i + 1, p + 4, &s1, &m1);
        float d0 = d * s0, d1 = d * s1, n0 = m * m0, n1 = m * m1;
        float *low = w + 32 * i, *high = low + 32;
#ifdef __AVX512F__
        const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512 low_values = _mm512_fmsub_ps(numbers, _mm512_set1_ps(d0), _mm512_set1_ps(n0));
        __m512 high_values = _mm512_fmsub_ps(numbers, _mm512_set1_ps(d1), _mm512_set1_ps(n1));
        for (int j = 0; j < 32; j += 16) look_up(q + j, low_values, high_values, low + j, high + j);
#else
        for (int j = 0; j < 32; j++) low[j] = (float)(q[j] & 15) * d0 - n0;
        for (int j = 0; j < 32; j++) high[j] = (float)(q[j] >> 4) * d1 - n1;
#endif
    }
}

static INLINE void q5_k(const uint8_t *restrict p, float *restrict w) {
    float d = half_at(p), m = half_at(p + 2);
    for (int i = 0; i < 8; i += 2) {
        const uint8_t *q = p + 48 + 16 * i;
        uint8_t s0, m0, s1, m1;
        scale_min(i, p + 4, &s0, &m0);
        scale_min(i + 1, p + 4, &s1, &m1);
        const uint8_t *high = p + 16;
        float d0 = d * s0, d1 = d * s1, n0 = m * m0, n1 = m * m1;
        for (int j = 0; j < 32; j++) w[32 * i + j] = (float)((q[j] & 15) | (high[j] >> i & 1) << 4) * d0 - n0;
        for (int j = 0; j < 32; j++) w[32 * i + 32 + j] = (float)(q[j] >> 4 | (high[j] >> (i + 1) & 1) << 4) * d1 - n1;
    }
}

// Sixteen of a Q6_K block's weights: four low bits and two high ones of each byte, and one scale.
static INLINE void q6_k_part(const uint8_t *low, const uint8_t *high, int low_shift, int high_shift, float d, float *w) {
    ROLLED for (int j = 0; j < 16; j++) w[j] = (float)(((low[j] >> low_shift & 15) | (high[j] >> high_shift & 3) << 4) - 32) * d;
}

static INLINE void q6_k(const uint8_t *restrict p, float *restrict w) {
    float d = half_at(p + 208);
    for (int h = 0; h < 2; h++) { // halves of 128 weights; four groups of 32 share the bytes of `high`
        const uint8_t *low = p + 64 * h, *high = p + 128 + 32 * h;
        const int8_t *scales = (const int8_t *)(p + 192) + 8 * h;
        for (int j = 0; j < 2; j++, low += 16, high += 16) {
            float *out = w + 128 * h + 16 * j;
            q6_k_part(low, high, 0, 0, d * scales[j], out);
            q6_k_part(low + 32, high, 0, 2, d * scales[2 + j], out + 32);
            q6_k_part(low, high, 4, 4, d * scales[4 + j], out + 64);
            q6_k_part(low + 32, high, 4, 6, d * scales[6 + j], out + 96);
        }
    }
}

// By their number in KINDS of cpu.py: what a block is, and how many weights and bytes it has.
static INLINE void unpack_block(int kind, const uint8_t *p, float *w) {
    switch (kind) {
        case 0: return f32(p, w);
        case 1: return f16(p, w);
        case 2: return bf16(p, w);
        case 3: return q4_0(p, w);
        case 4: return q4_1(p, w);
        case 5: return q5_0(p, w);
        case 6: return q5_1(p, w);
        case 7: return q8_0(p, w);
        case 8: return q4_k(p, w);
        case 9: return q5_k(p, w);
        case 10: return q6_k(p, w);
    }
}

static const struct {
    int weights, bytes;
} BLOCKS[] = {{32, 128}, {32, 64}, {32, 64}, {32, 18}, {32, 20}, {32, 22}, {32, 24}, {32, 34}, {256, 144}, {256, 176}, {256, 210}};
