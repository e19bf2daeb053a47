// A table from blocks to marks: what table.py does, with the same names. Rows lie in one piece of memory, a key and then
// the words of its marks; where a row is taken, the next one is. Nothing wraps around, so a row that goes makes others
// move down and never up, and a walk from the top comes by each of them.
//
// A block 0 is taken for 1: a key of 0 is a free row. Keys are multiplied by a number that nobody else knows, so that
// nobody can send prompts whose blocks all want one place.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t u64;

enum { MARKS = 3, SLOTS = 21, BEYOND = 1024, FEWEST = 1024, AHEAD = 8 };
static const u64 FIRST = 0x1249249249249249;  // the first mark of each slot of a word

typedef struct {
  u64 *rows;
  u64 *sets;  // three sets of `words` words: marks that count, that are retired, that the walk takes off
  u64 seed;
  long size;  // rows that keys want; BEYOND follow, of which the last is always free
  long used, unmarked, at;
  int words, shift;
} Table;

static u64 *valid(const Table *t) { return t->sets; }
static u64 *retired(const Table *t) { return t->sets + t->words; }
static u64 *walking(const Table *t) { return t->sets + 2 * t->words; }
static u64 *row(const Table *t, long index) { return t->rows + index * (t->words + 1); }
static u64 key_of(u64 block) { return block ? block : 1; }
static long home(const Table *t, u64 key) { return (long)((key * t->seed) >> t->shift); }
static long rows(const Table *t) { return t->size + BEYOND; }

static int none(const u64 *marks, int words) {
  u64 any = 0;
  for (int w = 0; w < words; w++) any |= marks[w];
  return !any;
}

static u64 *find(const Table *t, u64 block) {
  u64 key = key_of(block);
  for (u64 *at = row(t, home(t, key)); *at; at += t->words + 1)
    if (*at == key) return at + 1;
  return NULL;
}

// ── memory ──────────────────────────────────────────────────────────────────────────────────

// Make a table of `size` rows and `words` words out of `t`. False where there is no memory, or where so many keys want
// one place that twice the rows will do.
static int rebuild(Table *t, long size, int words) {
  Table next = *t;
  next.size = size;
  next.words = words;
  next.shift = 64 - __builtin_ctzl(size);
  next.rows = calloc((size_t)rows(&next) * (words + 1), sizeof(u64));
  next.sets = calloc(3 * (size_t)words, sizeof(u64));
  int fits = next.rows && next.sets;
  for (long i = 0; fits && t->rows && i < rows(t); i++) {
    const u64 *old = row(t, i);
    if (!*old) continue;
    long at = home(&next, *old);
    while (*row(&next, at)) at++;
    if (at >= rows(&next) - 1) fits = 0;
    else memcpy(row(&next, at), old, (t->words + 1) * sizeof(u64));
  }
  if (!fits) {
    free(next.rows);
    free(next.sets);
    return 0;
  }
  for (int set = 0; t->sets && set < 3; set++)
    memcpy(next.sets + set * words, t->sets + set * t->words, t->words * sizeof(u64));
  if (t->at) next.at = rows(&next);  // a walk begins anew
  free(t->rows);
  free(t->sets);
  *t = next;
  return 1;
}

static int grow(Table *t) {
  for (long size = 2 * t->size; size <= 64 * t->size; size *= 2)
    if (rebuild(t, size, t->words)) return 1;
  return 0;
}

void table_free(Table *t) {
  if (!t) return;
  free(t->rows);
  free(t->sets);
  free(t);
}

Table *table_new(u64 seed) {
  Table *t = calloc(1, sizeof(Table));
  if (!t) return NULL;
  t->seed = seed | 1;
  if (rebuild(t, FEWEST, 1)) return t;
  table_free(t);
  return NULL;
}

// The marks of `block`, which is put into the table if it is not there; NULL where there is no memory.
static u64 *put(Table *t, u64 block) {
  u64 key = key_of(block);
  for (;;) {
    long at = home(t, key);
    for (; *row(t, at); at++)
      if (*row(t, at) == key) return row(t, at) + 1;
    if (at < rows(t) - 1 && 10 * t->used < 7 * t->size) {
      *row(t, at) = key;
      t->used++;
      t->unmarked++;
      return row(t, at) + 1;
    }
    if (!grow(t)) return NULL;
  }
}

static void take_out(Table *t, long hole) {
  size_t bytes = (t->words + 1) * sizeof(u64);
  for (long next = hole + 1; *row(t, next); next++)
    if (home(t, *row(t, next)) <= hole) {
      memcpy(row(t, hole), row(t, next), bytes);
      hole = next;
    }
  memset(row(t, hole), 0, bytes);
  t->used--;
}

// ── marks ───────────────────────────────────────────────────────────────────────────────────

// 0 where there is no memory.
int table_use(Table *t, int bit) {
  if (bit / 64 >= t->words && !rebuild(t, t->size, bit / 64 + 1)) return 0;
  valid(t)[bit / 64] |= 1ull << bit % 64;
  return 1;
}

void table_retire(Table *t, int bit, int somewhere) {
  if (bit / 64 >= t->words) return;
  valid(t)[bit / 64] &= ~(1ull << bit % 64);
  retired(t)[bit / 64] |= (u64)(somewhere != 0) << bit % 64;
}

int table_retired(const Table *t, int bit) { return bit / 64 < t->words && retired(t)[bit / 64] >> bit % 64 & 1; }

// ── finding ─────────────────────────────────────────────────────────────────────────────────

static int marked_by(const Table *t, u64 block, const u64 *among, u64 *out) {
  const u64 *marks = find(t, block);
  u64 any = 0;
  for (int w = 0; w < t->words; w++) {
    u64 m = marks ? marks[w] & valid(t)[w] : 0;
    any |= out[w] = (m | m >> 1 | m >> 2) & FIRST & (among ? among[w] : FIRST);
  }
  return any != 0;
}

// Of the first `low` blocks `holding` have marks, of the first `high` those of `beyond`.
static void ends(const Table *t, const u64 *blocks, long low, const u64 *holding, long high, const u64 *beyond,
                 int *counts) {
  if (!memcmp(holding, beyond, t->words * sizeof(u64))) return;
  if (high - low == 1) {
    for (int w = 0; w < t->words; w++)
      for (u64 ending = holding[w] & ~beyond[w]; ending; ending &= ending - 1)
        counts[SLOTS * w + __builtin_ctzll(ending) / MARKS] = (int)low;
    return;
  }
  long middle = (low + high) / 2;
  u64 seen[t->words];
  marked_by(t, blocks[middle - 1], holding, seen);
  ends(t, blocks, middle, seen, high, beyond, counts);
  ends(t, blocks, low, holding, middle, seen, counts);
}

// How many of `blocks` each slot has marks on: pairs of a slot and a count in `out`, which has room for two counts of
// each slot. How many pairs.
int table_lengths(const Table *t, const u64 *blocks, long count, int *out) {
  u64 first[t->words], beyond[t->words];
  if (!count || !marked_by(t, blocks[0], NULL, first)) return 0;
  int slots = SLOTS * t->words, counts[slots], pairs = 0;
  memset(counts, 0, sizeof counts);
  memset(beyond, 0, sizeof beyond);
  ends(t, blocks, 1, first, count + 1, beyond, counts);
  for (int slot = 0; slot < slots; slot++)
    if (counts[slot]) {
      out[2 * pairs] = slot;
      out[2 * pairs++ + 1] = counts[slot];
    }
  return pairs;
}

long table_leading(const Table *t, const u64 *blocks, long count, int bit) {
  long low = 0;
  while (low < count) {
    long middle = (low + count) / 2;
    const u64 *marks = find(t, blocks[middle]);
    if (marks && marks[bit / 64] >> bit % 64 & 1) low = middle + 1;
    else count = middle;
  }
  return low;
}

// ── changing ────────────────────────────────────────────────────────────────────────────────

// -1 where there is no memory; `done` counts in any case.
int table_mark(Table *t, const u64 *blocks, long count, long start, int bit, long most, long *done) {
  u64 mark = 1ull << bit % 64;
  for (long i = start; i < count && *done < most; i++) {
    if (i + AHEAD < count) __builtin_prefetch(row(t, home(t, key_of(blocks[i + AHEAD]))), 1);
    u64 *marks = put(t, blocks[i]);
    if (!marks) return -1;
    if (marks[bit / 64] & mark) continue;
    t->unmarked -= none(marks, t->words);
    marks[bit / 64] |= mark;
    ++*done;
  }
  return 0;
}

long table_unmark(Table *t, const u64 *blocks, long count, int bit, int trailing) {
  u64 mark = 1ull << bit % 64;
  long done = 0;
  for (long i = count - 1; i >= 0; i--) {
    u64 *marks = find(t, blocks[i]);
    if (marks && marks[bit / 64] & mark) {
      marks[bit / 64] &= ~mark;
      t->unmarked += none(marks, t->words);
      done++;
    } else if (trailing) break;
  }
  return done;
}

int table_tidy(Table *t, long most) {
  size_t bytes = t->words * sizeof(u64);
  if (!t->at) {
    if (none(retired(t), t->words) && 4 * t->unmarked <= t->used) return 0;
    memcpy(walking(t), retired(t), bytes);
    t->at = rows(t);
  }
  long end = t->at > most ? t->at - most : 0;
  for (long at = t->at - 1; at >= end; at--) {
    u64 *marks = row(t, at) + 1;
    if (!*row(t, at)) continue;
    t->unmarked -= none(marks, t->words);
    for (int w = 0; w < t->words; w++) marks[w] &= ~walking(t)[w];
    if (none(marks, t->words)) take_out(t, at);
  }
  t->at = end;
  if (!end) {
    for (int w = 0; w < t->words; w++) retired(t)[w] &= ~walking(t)[w];
    memset(walking(t), 0, bytes);
    long size = t->size;
    while (size > FEWEST && 8 * t->used < size) size /= 2;
    if (size < t->size) rebuild(t, size, t->words);  // or all stays as it is
  }
  return end || !none(retired(t), t->words);
}

// ── looking ─────────────────────────────────────────────────────────────────────────────────

long table_used(const Table *t) { return t->used; }

// On how many blocks a mark is; -1 where it does not count.
long table_count(const Table *t, int bit) {
  if (bit / 64 >= t->words || !(valid(t)[bit / 64] >> bit % 64 & 1)) return -1;
  long count = 0;
  for (long i = 0; i < rows(t); i++) count += row(t, i)[1 + bit / 64] >> bit % 64 & 1;
  return count;
}

// Whether each row is found, marks are of those that count or are retired, and what is counted is so.
int table_whole(const Table *t) {
  long used = 0, unmarked = 0;
  for (long i = 0; i < rows(t); i++) {
    const u64 *marks = row(t, i) + 1;
    if (!*row(t, i)) continue;
    if (find(t, *row(t, i)) != marks) return 0;
    for (int w = 0; w < t->words; w++)
      if (marks[w] & ~(valid(t)[w] | retired(t)[w])) return 0;
    used++;
    unmarked += none(marks, t->words);
  }
  for (int w = 0; w < t->words; w++)
    if (valid(t)[w] & retired(t)[w]) return 0;
  return !*row(t, rows(t) - 1) && used == t->used && unmarked == t->unmarked;
}
