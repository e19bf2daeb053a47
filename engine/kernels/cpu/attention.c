// Causal attention of query tokens over a paged cache [pages, 2, page_size, kv_heads, dim], a page `page_stride` floats after
// the one before it, in float32.
//
// A task is a run of tokens of one row with one kv head. It passes over the row's keys, KEYS at a time: they are turned
// on their side once for all queries of the task, so that a vector holds a query's scores of as many keys, and 4
// queries share what is loaded. Softmax is the online one (Milakov and Gimelshein, arXiv:1805.02867). The steps begin at
// multiples of KEYS, so a query's result does not depend on how its row was cut into tasks.

#include "vector.h"

enum { MOST_DIM = 256, MOST_QUERIES = 64, KEYS = 2 * LANES, TOGETHER = 4, WIDE = SUMS / 6 };

// The running softmax of a task's queries: the highest score, the sum of weights, the weighted sum of values.
typedef struct {
    float best[MOST_QUERIES], total[MOST_QUERIES], sums[MOST_QUERIES * MOST_DIM];
} State;

// Keys, turned: [dim, KEYS]; and where their values lie
typedef struct {
    float turned[MOST_DIM * KEYS];
    const float *values[KEYS];
    int count;
} Keys;

static INLINE void gather(Keys *keys, const float *cache, const int32_t *pages, int start, int count, int page_size,
                          long page_stride, int kv_heads, int kv, int dim) {
    const float *rows[KEYS];
    long token_size = (long)kv_heads * dim, half_page = page_size * token_size;
    for (int j = 0, page = start / page_size, offset = start % page_size; j < count; j++) {
        rows[j] = cache + pages[page] * page_stride + offset * token_size + (long)kv * dim;
        keys->values[j] = rows[j] + half_page;
        if (++offset == page_size) offset = 0, page++;
    }
    for (int first = 0; first < KEYS; first += LANES)
        for (int i = 0; i < dim; i += LANES) {
            vec m[LANES];
            for (int j = 0; j < LANES; j++) m[j] = first + j < count ? load(rows[first + j] + i) : (vec){0};
            turn(m);
            for (int j = 0; j < LANES; j++) store(keys->turned + (i + j) * KEYS + first, m[j]);
        }
    keys->count = count;
}

// sums[q] = sums[q] * keep[q] + weights[q] times values, in `width` vectors from dimension `at` on
static INLINE void weigh(int width, const Keys *keys, float weights[][KEYS], const float *keep, float *sums, int dim,
                         int at) {
    vec v[TOGETHER][WIDE];
    for (int q = 0; q < TOGETHER; q++)
        for (int i = 0; i < width; i++) v[q][i] = load(sums + q * dim + at + i * LANES) * keep[q];
    for (int j = 0; j < keys->count; j++)
        for (int i = 0; i < width; i++) {
            vec value = held(load(keys->values[j] + at + i * LANES));
            for (int q = 0; q < TOGETHER; q++) v[q][i] += value * weights[q][j];
        }
    for (int q = 0; q < TOGETHER; q++)
        for (int i = 0; i < width; i++) store(sums + q * dim + at + i * LANES, v[q][i]);
}

// Four queries from the task's `first` on, at x[...], see the keys. The lane of query q's own position is at[q]. It is
// always four, so that there is one copy of this code: another one could be rounded otherwise by the compiler.
static void look(int first, State *state, const Keys *keys, const float *const *x, const int *at, int dim, float scale,
                 int window) {
    const ivec lanes = counted();
    const vec never = (vec){0} - 1e30f;
    float weights[TOGETHER][KEYS] __attribute__((aligned(64))), keep[TOGETHER];
    vec low[TOGETHER], high[TOGETHER];
    for (int q = 0; q < TOGETHER; q++) low[q] = high[q] = (vec){0};
    for (int i = 0; i < dim; i++) {
        vec a = held(load(keys->turned + i * KEYS)), b = held(load(keys->turned + i * KEYS + LANES));
        for (int q = 0; q < TOGETHER; q++) {
            low[q] += a * x[q][i];
            high[q] += b * x[q][i];
        }
    }
    int all = !window && keys->count == KEYS && at[0] >= KEYS - 1; // later queries see more
    for (int q = 0; q < TOGETHER; q++) {
        int last = at[q] < keys->count ? at[q] : keys->count - 1;
        ivec seen_low = lanes <= last, seen_high = lanes + LANES <= last;
        if (window) seen_low &= lanes > at[q] - window, seen_high &= lanes + LANES > at[q] - window;
        vec a = low[q] * scale, b = high[q] * scale;
        if (!all) a = pick(seen_low, a, never), b = pick(seen_high, b, never);
        float best = state->best[first + q], highest = most(pick(a > b, a, b));
        highest = highest > best ? highest : best;
        keep[q] = power_of_e(best - highest);
        a = powers_of_e(a - highest), b = powers_of_e(b - highest);
        if (!all) a = pick(seen_low, a, (vec){0}), b = pick(seen_high, b, (vec){0});
        state->best[first + q] = highest;
        state->total[first + q] = state->total[first + q] * keep[q] + sum(a + b);
        store(weights[q], a);
        store(weights[q] + LANES, b);
    }
    float *sums = state->sums + first * dim;
    int i = 0;
    for (; i + WIDE * LANES <= dim; i += WIDE * LANES) weigh(WIDE, keys, weights, keep, sums, dim, i);
    for (; i < dim; i += LANES) weigh(1, keys, weights, keep, sums, dim, i);
}

// tasks [n, 4]: first token, number of tokens, row in `table`, position of the first token; query [tokens, heads, dim],
// a token `query_stride` floats after the one before it; out [tokens, query_heads * dim]
void attend(const float *query, long query_stride, const float *cache, const int32_t *table, long table_stride,
            const int32_t *tasks, int count, int page_size, long page_stride, int query_heads, int kv_heads, int dim, float scale,
            int window, float *out) {
    int group = query_heads / kv_heads;
#pragma omp parallel for schedule(dynamic, 1) if (count * kv_heads > 1)
    for (int item = 0; item < count * kv_heads; item++) {
        const int32_t *task = tasks + 4 * (item / kv_heads);
        int first = task[0], position = task[3], kv = item % kv_heads, queries = task[1] * group;
        const float *x[MOST_QUERIES];
        int place[MOST_QUERIES];
        State state;
        Keys keys;
        int padded = (queries + TOGETHER - 1) / TOGETHER * TOGETHER; // with copies of the last query
        for (int q = 0; q < padded; q++) {
            int token = (q < queries ? q : queries - 1) / group, head = (q < queries ? q : queries - 1) % group;
            x[q] = query + (first + token) * query_stride + (long)(kv * group + head) * dim;
            place[q] = position + token;
            state.best[q] = -1e30f, state.total[q] = 0;
        }
        memset(state.sums, 0, sizeof(float) * padded * dim);
        int end = position + task[1], begin = window && position > window ? position - window + 1 : 0;
        for (int start = begin / KEYS * KEYS; start < end; start += KEYS) {
            int size = end - start < KEYS ? end - start : KEYS;
            gather(&keys, cache, table + task[2] * table_stride, start, size, page_size, page_stride, kv_heads, kv, dim);
            for (int q = 0; q < padded; q += TOGETHER) {
                int at[TOGETHER];
                for (int i = 0; i < TOGETHER; i++) at[i] = place[q + i] - start;
                if (at[TOGETHER - 1] < 0 || (window && at[0] - window + 1 >= size)) continue; // none sees any
                look(q, &state, &keys, x + q, at, dim, scale, window);
            }
        }
        for (int q = 0; q < queries; q++) {
            float *target = out + ((long)(first + q / group) * query_heads + kv * group + q % group) * dim;
            for (int i = 0; i < dim; i += LANES) store(target + i, load(state.sums + q * dim + i) / state.total[q]);
        }
    }
}
