// A packed weight matrix times the few tokens of a decode step, in float32.
//
// A few rows of weights are unpacked at a time, 32 or 256 inputs of each, into registers or the first-level cache, and
// multiplied with up to 8 tokens, so that memory carries packed bits only and the numbers are those of unpacking
// everything first. A sum is kept in one vector whatever the number of tokens, so a token's result does not depend on
// the others. gemm.c is for many tokens.

#include "blocks.h"

enum {
    TOKENS = 8,
    AHEAD = 2048, // bytes of a row asked for before they are needed
};

// `rows` rows times `count` tokens, which are constants wherever this is inlined; of them there are `some` and `live`,
// and the last is repeated for those that there are not.
static INLINE void rows_times(int kind, int rows, int count, int some, int live, const uint8_t *packed, long bytes,
                              int inputs, const float *x, float *out, long stride) {
    enum { MOST_ROWS = 4, MOST_BLOCK = 256 };
    const int weights = BLOCKS[kind].weights;
    float w[MOST_ROWS][MOST_BLOCK] __attribute__((aligned(64)));
    vec acc[MOST_ROWS * TOKENS];
    const float *token[TOKENS];
    const uint8_t *row[MOST_ROWS];
    for (int i = 0; i < rows * count; i++) acc[i] = (vec){0};
    for (int t = 0; t < count; t++) token[t] = x + (t < live ? t : live - 1) * (long)inputs;
    for (int r = 0; r < rows; r++) row[r] = packed + (r < some ? r : some - 1) * bytes;
    for (int start = 0; start < inputs; start += weights) {
        for (int r = 0; r < rows; r++) {
            __builtin_prefetch(row[r] + AHEAD);
            unpack_block(kind, row[r], w[r]);
            row[r] += BLOCKS[kind].bytes;
        }
        for (int i = 0; i < weights; i += LANES) {
            vec weight[MOST_ROWS];
            for (int r = 0; r < rows; r++) weight[r] = held(load(w[r] + i));
            for (int t = 0; t < count; t++) {
                vec numbers = held(load(token[t] + start + i));
                for (int r = 0; r < rows; r++) acc[r * count + t] += weight[r] * numbers;
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < count; t++)
            if (t < live && r < some) out[t * stride + r] = sum(acc[r * count + t]);
}

#define ROWS(KIND, COUNT, AT_ONCE)                                                                         \
    for (long r = begin; r < end; r += AT_ONCE)                                                            \
        rows_times(KIND, AT_ONCE, COUNT, end - r < AT_ONCE ? end - r : AT_ONCE, live, packed + r * bytes,  \
                   bytes, inputs, x, out + r, stride)
#define COUNTS(KIND)                                \
    case KIND:                                      \
        if (live > 4) ROWS(KIND, 8, SUMS / 12);     \
        else if (live > 2) ROWS(KIND, 4, SUMS / 6); \
        else if (live > 1) ROWS(KIND, 2, 4);        \
        else ROWS(KIND, 1, 4);                      \
        break

static void some_rows(int kind, int live, const uint8_t *packed, long begin, long end, long bytes, int inputs,
                      const float *x, float *out, long stride) {
    switch (kind) {
        COUNTS(0); COUNTS(1); COUNTS(2); COUNTS(3); COUNTS(4); COUNTS(5);
        COUNTS(6); COUNTS(7); COUNTS(8); COUNTS(9); COUNTS(10);
    }
}

// out [tokens, stride] (columns 0..rows-1) = x [tokens, inputs] times packed [rows, inputs] transposed
void linear(int kind, const uint8_t *packed, long rows, int inputs, const float *x, int tokens, float *out,
            long stride) {
    long bytes = (long)(inputs / BLOCKS[kind].weights) * BLOCKS[kind].bytes;
#pragma omp parallel for schedule(static)
    for (long block = 0; block < (rows + 15) / 16; block++) {
        long begin = block * 16, end = begin + 16 < rows ? begin + 16 : rows;
        for (int t = 0; t < tokens; t += TOKENS) {
            int live = tokens - t < TOKENS ? tokens - t : TOKENS;
            some_rows(kind, live, packed, begin, end, bytes, inputs, x + (long)t * inputs, out + t * stride, stride);
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
