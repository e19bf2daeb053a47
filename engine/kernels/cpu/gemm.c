// A packed weight matrix times the many tokens of a prompt, in float32.
//
// Every thread takes panels of weight rows in turn, unpacks them once, turned on their side, into the second-level
// cache, and multiplies them with all tokens, some at a time (with AVX-512, 32 rows and 12 tokens): SUMS vectors stay
// in registers, and a vector of weights times one number is added to each. The terms of a sum are added in the order of
// the inputs, whatever the number of tokens, so a token's result does not depend on the others. (Goto, van de Geijn:
// Anatomy of High-Performance Matrix Multiplication, 2008.)
//
//              panel [depth, WIDTH]            a tile of out [HEIGHT, WIDTH]
//     inputs   w w w … of WIDTH rows           += x[t, i] * panel[i, :] over the depth
//       v      w w w …

#include "blocks.h"
#include <omp.h>

enum {
    WIDTH = 2 * LANES, // rows of a panel
    HEIGHT = SUMS / 2, // tokens of a tile
    PANELS = 3, // of a thread at a time: tokens come from memory once for all of them
    DEPTH = 768, // inputs of a panel at a time
};

// panel [depth, WIDTH] = `rows` rows of `bytes` bytes each, from the block at `packed` on; further columns are zeros
static INLINE void unpack_panel(int kind, const uint8_t *packed, long rows, long bytes, int depth, float *panel) {
    enum { MOST = 256 };
    float w[LANES * MOST] __attribute__((aligned(64)));
    int weights = BLOCKS[kind].weights;
    for (int first = 0; first < WIDTH; first += LANES) {
        int count = rows - first < LANES ? rows - first : LANES;
        if (count < LANES) memset(w, 0, sizeof w);
        for (int start = 0; start < depth; start += weights) {
            const uint8_t *block = packed + first * bytes + (long)(start / weights) * BLOCKS[kind].bytes;
            for (int r = 0; r < count; r++) unpack_block(kind, block + r * bytes, w + r * weights);
            for (int i = 0; i < weights; i += LANES) {
                vec m[LANES];
                for (int r = 0; r < LANES; r++) m[r] = load(w + r * weights + i);
                turn(m);
                for (int r = 0; r < LANES; r++) store(panel + (long)(start + i + r) * WIDTH + first, m[r]);
            }
        }
    }
}

#define KIND(K) case K: unpack_panel(K, packed, rows, bytes, depth, panel); break
static void unpack_panel_of(int kind, const uint8_t *packed, long rows, long bytes, int depth, float *panel) {
    switch (kind) {
        KIND(0); KIND(1); KIND(2); KIND(3); KIND(4); KIND(5); KIND(6); KIND(7); KIND(8); KIND(9); KIND(10);
    }
}

// out [count, WIDTH] = x [count, depth] times panel, or that added to it if `more`; rows of both are strided
static INLINE void tile(int count, const float *x, long x_stride, const float *panel, int depth, float *out,
                        long stride, int more) {
    vec left[HEIGHT], right[HEIGHT];
    for (int t = 0; t < count; t++) {
        left[t] = more ? load(out + t * stride) : (vec){0};
        right[t] = more ? load(out + t * stride + LANES) : (vec){0};
    }
    for (int i = 0; i < depth; i++, panel += WIDTH) {
        vec a = load(panel), b = load(panel + LANES);
        for (int t = 0; t < count; t++) {
            left[t] += a * x[t * x_stride + i];
            right[t] += b * x[t * x_stride + i];
        }
    }
    for (int t = 0; t < count; t++) {
        store(out + t * stride, left[t]);
        store(out + t * stride + LANES, right[t]);
    }
}

#define COUNT(N) case N: tile(N, x, x_stride, panel, depth, out, stride, more); break
static void tile_of(int count, const float *x, long x_stride, const float *panel, int depth, float *out, long stride,
                    int more) {
    switch (count) {
        COUNT(1); COUNT(2); COUNT(3); COUNT(4); COUNT(5); COUNT(6);
#if !defined(__AVX__) || defined(__AVX512F__)
        COUNT(7); COUNT(8); COUNT(9); COUNT(10); COUNT(11); COUNT(12);
#endif
    }
}

// tile_of, for a panel of which only the first `rows` columns are in `out`
static void narrow_tile(int count, const float *x, long x_stride, const float *panel, int depth, float *out,
                        long stride, int more, long rows) {
    float whole[HEIGHT * WIDTH];
    for (int t = 0; more && t < count; t++) memcpy(whole + t * WIDTH, out + t * stride, rows * sizeof(float));
    tile_of(count, x, x_stride, panel, depth, whole, WIDTH, more);
    for (int t = 0; t < count; t++) memcpy(out + t * stride, whole + t * WIDTH, rows * sizeof(float));
}

// How many floats of scratch `gemm` needs for each thread.
long gemm_scratch(void) { return (long)PANELS * WIDTH * DEPTH; }

// out [tokens, stride] (columns 0..rows-1) = x [tokens, inputs] times packed [rows, inputs] transposed
void gemm(int kind, const uint8_t *packed, long rows, int inputs, const float *x, int tokens, float *out, long stride,
          float *scratch, int threads) {
    long bytes = (long)(inputs / BLOCKS[kind].weights) * BLOCKS[kind].bytes;
    int tiles = (tokens + HEIGHT - 1) / HEIGHT;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long begin = 0; begin < rows; begin += PANELS * WIDTH) {
        float *panels = scratch + omp_get_thread_num() * gemm_scratch();
        long end = begin + PANELS * WIDTH < rows ? begin + PANELS * WIDTH : rows;
        for (int start = 0; start < inputs; start += DEPTH) {
            int depth = inputs - start < DEPTH ? inputs - start : DEPTH;
            long at = (long)(start / BLOCKS[kind].weights) * BLOCKS[kind].bytes;
            for (long r = begin; r < end; r += WIDTH)
                unpack_panel_of(kind, packed + r * bytes + at, end - r, bytes, depth, panels + (r - begin) * DEPTH);
            for (int i = 0, t; i < tiles; i++) { // tiles of as equal heights as can be: short ones use a core badly
                t = (long)tokens * i / tiles;
                int count = (long)tokens * (i + 1) / tiles - t;
                for (long r = begin; r < end; r += WIDTH) {
                    const float *token = x + (long)t * inputs + start, *panel = panels + (r - begin) * DEPTH;
                    float *target = out + t * stride + r;
                    if (end - r >= WIDTH) tile_of(count, token, inputs, panel, depth, target, stride, start > 0);
                    else narrow_tile(count, token, inputs, panel, depth, target, stride, start > 0, end - r);
                }
            }
        }
    }
}
