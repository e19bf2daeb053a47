// What all the CPU kernels are written with: vectors in GCC's extension, as wide as the processor's (wider ones would
// be taken apart in memory, at a tenth of the speed), and the few functions on them that C does not have.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline)) // arguments that are constants stay so in the inner loops
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float vec4 __attribute__((vector_size(16)));

// Vectors that fit into registers beside a few others.
#if defined(__AVX__) && !defined(__AVX512F__)
enum { SUMS = 12 };
#else
enum { SUMS = 24 };
#endif

static INLINE vec load(const float *p) { return *(const vec *)p; }
static INLINE void store(float *p, vec v) { *(vec *)p = v; }

// `v`, out of which the compiler must not see where it came from: else it loads what it has in a register again for
// each use, which takes longer than the arithmetic.
static INLINE vec held(vec v) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(v));
#elif defined(__AVX__)
    __asm__("" : "+x"(v));
#endif
    return v;
}

static INLINE float sum(vec v) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    vec4 quarters[LANES / 4];
    memcpy(quarters, &v, sizeof v);
    vec4 q = quarters[0];
    for (int i = 1; i < LANES / 4; i++) q += quarters[i];
    return (q[0] + q[2]) + (q[1] + q[3]);
#endif
}

static INLINE ivec counted(void) { // 0, 1, 2, …
    ivec lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return lanes;
}

static INLINE vec pick(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

static INLINE float most(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float a[LANES];
    store(a, v);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) a[i] = a[i] > a[i + n] ? a[i] : a[i + n];
    return a[0];
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

#if LANES == 16
#define FIRST_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LAST_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define FIRST_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define LAST_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FIRST_HALVES 0, 4, 1, 5
#define LAST_HALVES 2, 6, 3, 7
#endif

// Transposes LANES vectors. Interleaving halves rotates the bits of an element's place by one, so as many times as
// LANES has bits exchange row and column.
static INLINE void turn(vec m[LANES]) {
    vec n[LANES];
    for (int round = 1; round < LANES; round *= 2) {
        for (int i = 0; i < LANES / 2; i++) {
            n[2 * i] = SHUFFLE(m[i], m[i + LANES / 2], FIRST_HALVES);
            n[2 * i + 1] = SHUFFLE(m[i], m[i + LANES / 2], LAST_HALVES);
        }
        memcpy(m, n, sizeof n);
    }
}

// e to the x, to a relative error under 2e-7 for -87 < x < 88: 2^n times a polynomial on |r| < ln(2)/2 (Cody and Waite).
static INLINE float power_of_e(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.6666667e-1f + r * (4.1666668e-2f + r * (8.3333310e-3f + r * 1.3888889e-3f)))));
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

// As power_of_e, for x of at most 0.
static INLINE vec powers_of_e(vec x) {
    const vec lowest = (vec){0} - 87.0f;
    x = pick(x < lowest, lowest, x);
    ivec n = __builtin_convertvector(x * 1.44269504f - 0.5f, ivec); // towards zero: the nearest, as x is not positive
    vec whole = __builtin_convertvector(n, vec);
    vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = 1.0f + r * (1.0f + r * (0.5f + r * (1.6666667e-1f + r * (4.1666668e-2f + r * (8.3333310e-3f + r * 1.3888889e-3f)))));
    return p * (vec)((n + 127) << 23);
}
