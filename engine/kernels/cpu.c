// Fused operations of a decoder in float32 for CPUs, with weights kept in the bits they are stored in.
//
// A weight matrix is rows of GGUF blocks (or plain bf16, f16, f32). `linear` unpacks at most 256 weights of a row at a
// time into the first-level cache and multiplies them with up to 8 tokens, so that memory carries packed bits only and
// the numbers are exactly those of unpacking everything first. Vectors are written in GCC's vector extension: the
// compiler picks AVX-512, AVX2, NEON or what else there is. Blocks are those of ggml-common.h (ggml-org/llama.cpp).

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline)) // `kind` must be a constant in the inner loops
#define LANES 16
#define CHUNK 256
#define TOKENS 8
#define AHEAD 2048 // bytes of a matrix asked for before they are needed

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

static INLINE float half_at(const uint8_t *p) {
    _Float16 value;
    memcpy(&value, p, 2);
    return (float)value;
}

static INLINE vec load(const float *p) { return *(const vec *)p; }
static INLINE void store(float *p, vec v) { *(vec *)p = v; }

static INLINE float sum(vec v) {
    vec8 halves[2];
    memcpy(halves, &v, sizeof v);
    vec8 half_sum = halves[0] + halves[1];
    vec4 quarters[2];
    memcpy(quarters, &half_sum, sizeof half_sum);
    vec4 q = quarters[0] + quarters[1];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

// ── blocks to floats ────────────────────────────────────────────────────────────────────────────────────────────────

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

// Four-bit weights by look-up: sixteen values are one register, and a permutation reads but four bits of an index.
static INLINE void look_up(const uint8_t *q, __m512 values, float *w) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)q));
    _mm512_storeu_ps(w, _mm512_permutexvar_ps(bytes, values));
    _mm512_storeu_ps(w + 16, _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values));
}

static INLINE __m512 all_half_at(const uint8_t *p) {
#ifdef __AVX512FP16__
    _Float16 value;
    memcpy(&value, p, 2);
    return _mm512_cvtxph_ps(_mm256_set1_ph(value)); // the conversion broadcasts by itself
#else
    return _mm512_set1_ps(half_at(p));
#endif
}

static INLINE void q4_0(const uint8_t *restrict p, float *restrict w) {
    const __m512 numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    look_up(p + 2, _mm512_mul_ps(numbers, all_half_at(p)), w);
}

static INLINE void q4_1(const uint8_t *restrict p, float *restrict w) {
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    look_up(p + 4, _mm512_fmadd_ps(numbers, all_half_at(p), all_half_at(p + 2)), w);
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
    for (int i = 0; i < 16; i++) w[i] = (float)((p[i + 2] & 15) - 8) * d;
    for (int i = 0; i < 16; i++) w[i + 16] = (float)((p[i + 2] >> 4) - 8) * d;
}

static INLINE void q4_1(const uint8_t *restrict p, float *restrict w) {
    float d = half_at(p), m = half_at(p + 2);
    for (int i = 0; i < 16; i++) w[i] = (float)(p[i + 4] & 15) * d + m;
    for (int i = 0; i < 16; i++) w[i + 16] = (float)(p[i + 4] >> 4) * d + m;
}
#endif

static INLINE void fifth(uint32_t bits, const uint8_t *p, uint8_t *q) {
    for (int i = 0; i < 16; i++) {
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

static INLINE void q8_0(const uint8_t *restrict p, float *restrict w) {
    float d = half_at(p);
    const int8_t *q = (const int8_t *)(p + 2);
    for (int i = 0; i < 32; i++) w[i] = (float)q[i] * d;
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
        for (int j = 0; j < 32; j++) w[32 * i + j] = (float)(q[j] & 15) * d0 - n0;
        for (int j = 0; j < 32; j++) w[32 * i + 32 + j] = (float)(q[j] >> 4) * d1 - n1;
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

static INLINE void q6_k(const uint8_t *restrict p, float *restrict w) {
    float d = half_at(p + 208);
    for (int i = 0; i < 4; i++) { // sixteen scales, 16 weights each; four groups of 32 share the bytes of `high`
        for (int half_block = 0; half_block < 2; half_block++) {
            const uint8_t *low = p + 64 * half_block + 32 * (i & 1), *high = p + 128 + 32 * half_block;
            const int8_t *scales = (const int8_t *)(p + 192) + 8 * half_block + 2 * i;
            float *out = w + 128 * half_block + 32 * i;
            for (int j = 0; j < 32; j++) {
                int q = (low[j] >> (i & 2 ? 4 : 0) & 15) | (high[j] >> (2 * i) & 3) << 4;
                out[j] = (float)(q - 32) * (d * scales[j / 16]);
            }
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

// ── matrices ────────────────────────────────────────────────────────────────────────────────────────────────────────

// One row times `count` tokens; both are constants wherever this is inlined.
static INLINE void row_times(int kind, int count, const uint8_t *row, int inputs,
                                                            const float *x, float *out, long stride) {
    enum { UNROLL = 4 };
    float w[CHUNK] __attribute__((aligned(64)));
    int unroll = count > 2 ? 1 : UNROLL;
    vec acc[TOKENS * UNROLL];
    for (int i = 0; i < count * unroll; i++) acc[i] = (vec){0};
    for (int start = 0; start < inputs; start += CHUNK) {
        int length = inputs - start < CHUNK ? inputs - start : CHUNK;
        for (int i = 0; i < CHUNK * BLOCKS[kind].bytes / BLOCKS[kind].weights; i += 64) __builtin_prefetch(row + AHEAD + i);
        for (int i = 0; i < length; i += BLOCKS[kind].weights, row += BLOCKS[kind].bytes) unpack_block(kind, row, w + i);
        int i = 0;
        for (; i + LANES * unroll <= length; i += LANES * unroll)
            for (int u = 0; u < unroll; u++) {
                vec weight = load(w + i + LANES * u);
                for (int t = 0; t < count; t++)
                    acc[t * unroll + u] += weight * load(x + (long)t * inputs + start + i + LANES * u);
            }
        for (; i < length; i += LANES)
            for (int t = 0; t < count; t++) acc[t * unroll] += load(w + i) * load(x + (long)t * inputs + start + i);
    }
    for (int t = 0; t < count; t++) {
        vec total = acc[t * unroll];
        for (int u = 1; u < unroll; u++) total += acc[t * unroll + u];
        out[t * stride] = sum(total);
    }
}

#define ROWS(KIND, COUNT) \
    for (long r = begin; r < end; r++) row_times(KIND, COUNT, packed + r * bytes, inputs, x, out + r, stride)
#define COUNTS(KIND)                        \
    case KIND:                              \
        switch (count) {                    \
            case 1: ROWS(KIND, 1); break;   \
            case 2: ROWS(KIND, 2); break;   \
            case 4: ROWS(KIND, 4); break;   \
            case 8: ROWS(KIND, 8); break;   \
        }                                   \
        break

static void some_rows(int kind, int count, const uint8_t *packed, long begin, long end, long bytes, int inputs,
                      const float *x, float *out, long stride) {
    switch (kind) {
        COUNTS(0); COUNTS(1); COUNTS(2); COUNTS(3); COUNTS(4); COUNTS(5);
        COUNTS(6); COUNTS(7); COUNTS(8); COUNTS(9); COUNTS(10);
    }
}

// out [tokens, stride] (columns 0..rows-1) = x [tokens, inputs] times packed [rows, inputs] transposed
void linear(int kind, const uint8_t *packed, long rows, int inputs, const float *x, int tokens, float *out, long stride) {
    long bytes = (long)(inputs / BLOCKS[kind].weights) * BLOCKS[kind].bytes;
#pragma omp parallel for schedule(static)
    for (long block = 0; block < (rows + 15) / 16; block++) {
        long begin = block * 16, end = begin + 16 < rows ? begin + 16 : rows;
        for (int t = 0, count; t < tokens; t += count) {
            for (count = TOKENS; count > tokens - t; count /= 2) {}
            some_rows(kind, count, packed, begin, end, bytes, inputs, x + (long)t * inputs, out + t * stride, stride);
        }
    }
}

// out [count, inputs]: the rows of packed named by ids, or its first rows where ids is null
void unpack(int kind, const uint8_t *packed, const int64_t *ids, long count, int inputs, float *out) {
    int weights = BLOCKS[kind].weights;
    long bytes = (long)(inputs / weights) * BLOCKS[kind].bytes;
#pragma omp parallel for schedule(static) if (count > 64)
    for (long r = 0; r < count; r++) {
        const uint8_t *row = packed + (ids ? ids[r] : r) * bytes;
        for (int i = 0; i < inputs; i += weights, row += BLOCKS[kind].bytes) unpack_block(kind, row, out + r * inputs + i);
    }
}

// ── what stands between the matrices ────────────────────────────────────────────────────────────────────────────────

// out = x / sqrt(mean(x²) + epsilon) * weight, a row of `size` at a time
void rms_norm(const float *restrict x, const float *restrict weight, int tokens, int size, float epsilon,
              float *restrict out) {
    for (int t = 0; t < tokens; t++, x += size, out += size) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int i = 0; i < size; i++) squares += x[i] * x[i];
        float scale = 1.0f / sqrtf(squares / size + epsilon);
        for (int i = 0; i < size; i++) out[i] = x[i] * scale * weight[i];
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

// out [tokens, size] = silu(gate) * up, where gate_up [tokens, 2 * size] holds both
void silu_and_mul(const float *gate_up, int tokens, int size, float *out) {
#pragma omp parallel for schedule(static) if (tokens > 16)
    for (int t = 0; t < tokens; t++) {
        const float *gate = gate_up + 2L * t * size, *up = gate + size;
        for (int i = 0; i < size; i++) out[(long)t * size + i] = gate[i] / (1.0f + power_of_e(-gate[i])) * up[i];
    }
}

// Rotate the first 2 * half dimensions of heads [tokens, heads, dim] in place; a token is `stride` floats after the one
// before it. cosines, sines [tokens, half]
void rotate(float *heads, const float *cosines, const float *sines, int tokens, int count, int dim, int half,
            long stride) {
    for (int t = 0; t < tokens; t++) {
        const float *c = cosines + (long)t * half, *s = sines + (long)t * half;
        for (int h = 0; h < count; h++) {
            float *restrict a = heads + t * stride + (long)h * dim, *restrict b = a + half;
            for (int i = 0; i < half; i++) {
                float first = a[i], second = b[i];
                a[i] = first * c[i] - second * s[i];
                b[i] = second * c[i] + first * s[i];
            }
        }
    }
}

// ── attention ───────────────────────────────────────────────────────────────────────────────────────────────────────

// Causal attention of query tokens over a paged cache [pages, 2, page_size, kv_heads, dim], one task for a run of tokens
// of a row and one kv head: LANES keys at a time are turned on their side once, for all queries of the task, so that a
// vector holds a query's scores of as many keys. Softmax is the online one (Milakov and Gimelshein, arXiv:1805.02867).
// tasks [n, 4]: first token, number of tokens, row in `table`, position of the first token.
enum { MOST_DIM = 256, MOST_QUERIES = 64 };

static INLINE vec pick(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

static INLINE float most(vec v) {
    float a[LANES];
    store(a, v);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) a[i] = a[i] > a[i + n] ? a[i] : a[i + n];
    return a[0];
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

void attend(const float *query, long query_stride, const float *cache, const int64_t *table, long table_stride,
            const int32_t *tasks, int count, int page_size, int query_heads, int kv_heads, int dim, float scale,
            int window, float *out) {
    const ivec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vec never = (vec){0} - 1e30f;
    int group = query_heads / kv_heads;
    long token_size = (long)kv_heads * dim, half_page = page_size * token_size;
#pragma omp parallel for schedule(dynamic, 1) if (count * kv_heads > 1)
    for (int item = 0; item < count * kv_heads; item++) {
        const int32_t *task = tasks + 4 * (item / kv_heads);
        int first = task[0], tokens = task[1], position = task[3], kv = item % kv_heads, queries = tokens * group;
        const int64_t *pages = table + task[2] * table_stride;
        float best[MOST_QUERIES], total[MOST_QUERIES];
        float sums[MOST_QUERIES * MOST_DIM], turned[MOST_DIM * LANES];
        for (int q = 0; q < queries; q++) best[q] = -1e30f, total[q] = 0;
        memset(sums, 0, sizeof(float) * queries * dim);
        memset(turned, 0, sizeof turned);
        int end = position + tokens, begin = window && position - window + 1 > 0 ? position - window + 1 : 0;
        for (int start = begin; start < end; start += LANES) {
            int keys = end - start < LANES ? end - start : LANES;
            const float *key[LANES];
            for (int j = 0; j < keys; j++) {
                int at = start + j;
                key[j] = cache + pages[at / page_size] * 2 * half_page + at % page_size * token_size + (long)kv * dim;
                for (int i = 0; i < dim; i++) turned[i * LANES + j] = key[j][i];
            }
            for (int q = 0; q < queries; q++) {
                int at = position + q / group - start; // the query's own lane; it sees none after it
                if (at < 0 || (window && at - window + 1 >= keys)) continue;
                ivec seen = lanes <= (at < keys ? at : keys - 1);
                if (window) seen &= lanes > at - window;
                const float *x = query + (first + q / group) * query_stride + (long)(kv * group + q % group) * dim;
                vec score = {0}, more = {0};
                for (int i = 0; i < dim; i += 2) {
                    score += load(turned + i * LANES) * x[i];
                    more += load(turned + (i + 1) * LANES) * x[i + 1];
                }
                score = pick(seen, (score + more) * scale, never);
                float highest = most(score);
                highest = highest > best[q] ? highest : best[q];
                float keep = power_of_e(best[q] - highest), weight[LANES];
                score = pick(seen, powers_of_e(score - highest), (vec){0});
                best[q] = highest;
                total[q] = total[q] * keep + sum(score);
                store(weight, score);
                float *s = sums + q * dim;
                for (int i = 0; i < dim; i += LANES) {
                    vec v = load(s + i) * keep;
                    for (int j = 0; j < keys; j++) v += load(key[j] + half_page + i) * weight[j];
                    store(s + i, v);
                }
            }
        }
        for (int q = 0; q < queries; q++) {
            float *target = out + ((long)(first + q / group) * query_heads + kv * group + q % group) * dim;
            for (int i = 0; i < dim; i += LANES) store(target + i, load(sums + q * dim + i) / total[q]);
        }
    }
}

// Write keys and values [tokens, kv_heads, dim] (tokens `stride` floats apart) to their places in the cache
void write_cache(const float *key, const float *value, long key_stride, long value_stride, const int64_t *places,
                 int tokens, int page_size, int size, float *cache) {
    for (int t = 0; t < tokens; t++) {
        long page = places[t] / page_size, offset = places[t] % page_size;
        float *target = cache + (page * 2 * page_size + offset) * size;
        memcpy(target, key + t * key_stride, size * sizeof(float));
        memcpy(target + (long)page_size * size, value + t * value_stride, size * sizeof(float));
    }
}
