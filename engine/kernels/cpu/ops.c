// What stands between the matrices of a decoder, in float32: engine/kernels/ops.py in C.

#include "vector.h"

enum { MANY = 16 }; // tokens from which on threads are worth waking

// out [2, tokens, half]: cosines and sines of positions [tokens] times frequencies [half], all times `magnitude`
void rotation(const int64_t *positions, const float *frequencies, float magnitude, int tokens, int half, float *out) {
    float *sines = out + (long)tokens * half;
#pragma omp parallel for schedule(static) if (tokens >= MANY)
    for (long i = 0; i < (long)tokens * half; i++) {
        float angle = (float)positions[i / half] * frequencies[i % half];
        out[i] = cosf(angle) * magnitude;
        sines[i] = sinf(angle) * magnitude;
    }
}

static INLINE void norm(const float *x, const float *restrict weight, int size, float epsilon, float *out) {
    vec squares = {0};
    float rest = 0;
    int i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
    for (; i < size; i++) rest += x[i] * x[i];
    float scale = 1.0f / sqrtf((sum(squares) + rest) / size + epsilon);
    for (i = 0; i < size; i++) out[i] = x[i] * scale * weight[i];
}

// out = x / sqrt(mean(x²) + epsilon) * weight, a row of `size` at a time
void rms_norm(const float *x, const float *weight, int tokens, int size, float epsilon, float *out) {
#pragma omp parallel for schedule(static) if (tokens >= MANY)
    for (int t = 0; t < tokens; t++) norm(x + (long)t * size, weight, size, epsilon, out + (long)t * size);
}

// stream += x, then x = rms_norm(stream)
void add_rms_norm(float *x, float *stream, const float *weight, int tokens, int size, float epsilon) {
#pragma omp parallel for schedule(static) if (tokens >= MANY)
    for (int t = 0; t < tokens; t++) {
        float *restrict added = x + (long)t * size, *restrict whole = stream + (long)t * size;
        for (int i = 0; i < size; i++) whole[i] += added[i];
        norm(whole, weight, size, epsilon, added);
    }
}

// out [tokens, size] = silu(gate) * up, where gate_up [tokens, 2 * size] holds both
void silu_and_mul(const float *gate_up, int tokens, int size, float *out) {
#pragma omp parallel for schedule(static) if (tokens >= MANY)
    for (int t = 0; t < tokens; t++) {
        const float *gate = gate_up + 2L * t * size, *up = gate + size;
        for (int i = 0; i < size; i++) out[(long)t * size + i] = gate[i] / (1.0f + power_of_e(-gate[i])) * up[i];
    }
}

// The same with gelu's approximation by tanh: (1 + tanh(u)) / 2 is 1 / (1 + e to the -2u).
void gelu_and_mul(const float *gate_up, int tokens, int size, float *out) {
#pragma omp parallel for schedule(static) if (tokens >= MANY)
    for (int t = 0; t < tokens; t++) {
        const float *gate = gate_up + 2L * t * size, *up = gate + size;
        for (int i = 0; i < size; i++) {
            float twice = 1.59576912f * (gate[i] + 0.044715f * gate[i] * gate[i] * gate[i]);
            out[(long)t * size + i] = gate[i] / (1.0f + power_of_e(-twice)) * up[i];
        }
    }
}

// Query and key heads pass their norms, if there are any, and turn: dimension i with i + half. If
// there is a cache, keys and values then go to their places in it. qkv [tokens, heads, dim], a token `stride` floats
// after the one before it: `queries` heads of queries, then `kv` of keys and as many of values.
// cosines, sines [tokens, half]; cache [pages, 2, page_size, kv, dim], a page
// `page_stride` floats after the one before it
void rotate_heads(float *qkv, long stride, int tokens, int queries, int kv, int dim, const float *query_norm,
                  const float *key_norm, float epsilon, const float *cosines, const float *sines, int half,
                  const int64_t *places, int page_size, long page_stride, float *cache) {
    long size = (long)kv * dim;
#pragma omp parallel for schedule(static) if (tokens >= MANY)
    for (int t = 0; t < tokens; t++) {
        const float *c = cosines + (long)t * half, *s = sines + (long)t * half;
        for (int h = 0; h < queries + kv; h++) {
            float *head = qkv + t * stride + (long)h * dim;
            if (query_norm) norm(head, h < queries ? query_norm : key_norm, dim, epsilon, head);
            float *restrict a = head, *restrict b = head + half;
            for (int i = 0; i < half; i++) {
                float first = a[i], second = b[i];
                a[i] = first * c[i] - second * s[i];
                b[i] = second * c[i] + first * s[i];
            }
        }
        if (!cache) continue;
        const float *key = qkv + t * stride + (long)queries * dim;
        float *target = cache + places[t] / page_size * page_stride + places[t] % page_size * size;
        memcpy(target, key, size * sizeof(float));
        memcpy(target + page_size * size, key + size, size * sizeof(float));
    }
}

// Writes keys and values [tokens, kv_heads, dim] (tokens a stride apart) to their places in the cache
void write_pages(const float *key, const float *value, long key_stride, long value_stride, const int64_t *places,
                 int tokens, int page_size, long page_stride, int size, float *cache) {
    for (int t = 0; t < tokens; t++) {
        long page = places[t] / page_size, offset = places[t] % page_size;
        float *target = cache + page * page_stride + offset * size;
        memcpy(target, key + t * key_stride, size * sizeof(float));
        memcpy(target + (long)page_size * size, value + t * value_stride, size * sizeof(float));
    }
}
