/* Stick-breaking attention forward and backward, float32: 64 queries at a time walk their keys from the newest on, a tile
 * of keys that stays in first-level cache, products included.
 *
 * A tile holds (keys, rows), rows (query, chosen expert) side by side, so that a stick is broken for a vector of rows at
 * once. Equations and names as in cpu.py: p = sigmoid(-l), q = sigmoid(l) = 1 - p, c the stick left, and a = c_before q.
 * With e = exp(l) all of them need one exponential and one division, and no difference of near numbers.
 * Rows are padded to whole vectors with the last row again, whose results are left where they are. */
#include "../exponential.h"
#include "../small_products.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#ifndef QUERIES
#define QUERIES 64
#define KEYS 32 /* a tile */
#endif
#define MOST_ROWS 512
#define GREATEST_LOGIT 60.0f  /* |l| beyond changes p or q by 9e-27, and every product with either is a normal number */
#define LEAST_WEIGHT 1e-30f   /* less would make subnormal numbers of products, many times slower on some processors */
#define USED_UP 8.271806e-25f /* what is left of a stick by then: tiny / eps^2, as in torch_sticks.py */

/* q, o (B, T, K, H, C), k and v (B, S, H, C), starts (B, T) or none, all contiguous. */
typedef struct {
    int32_t batch, queries, keys, chosen, heads, width;
} Shape;

/* Some queries of one (batch, head) pair. Keys are numbered from the newest that one of them sees, `newest`, on. */
typedef struct {
    int row, head, first; /* the batch row, and the first query */
    int rows, padded;
    int newest, num_keys, all_since, all_until; /* all rows see keys number all_since .. all_until - 1 */
    int32_t since[MOST_ROWS], until[MOST_ROWS]; /* and each these */
} Block;

static int least(int a, int b) { return a < b ? a : b; }

/* out (rows, columns) = or += a (rows, inner), of any strides, times b (inner, columns), whole vectors of columns. */
static void multiply(float *out, int out_row, const float *a, int a_row, int a_column, const float *b, int b_row, int rows,
                     int columns, int inner, int add) {
    for (int n = 0, step; n < columns; n += step * LANES) {
        step = columns - n >= COLUMNS * LANES ? COLUMNS : 1;
        for (int m = 0; m < rows; m += ROWS) {
            const float *row[ROWS];
            const int count = least(ROWS, rows - m);
            float *to = out + (int64_t)m * out_row + n;
            for (int i = 0; i < ROWS; i++) row[i] = a + (int64_t)(m + i) * a_row;
            if (step == COLUMNS) meet_up_to(count, COLUMNS, to, out_row, row, a_column, b + n, b_row, inner, add, NULL, 0);
            else meet_up_to(count, 1, to, out_row, row, a_column, b + n, b_row, inner, add, NULL, 0);
        }
    }
}

static int padded(int count) { return (count + LANES - 1) / LANES * LANES; }

static int most_rows(const Shape *shape) { return padded(least(QUERIES, shape->queries) * shape->chosen); }

static void look(Block *block, const Shape *shape, const int64_t *starts, int pair, int first) {
    const int queries = least(QUERIES, shape->queries - first);
    block->row = pair / shape->heads, block->head = pair % shape->heads, block->first = first;
    block->rows = queries * shape->chosen, block->padded = padded(block->rows);
    block->newest = shape->keys - shape->queries + first + queries - 1;
    block->num_keys = 0, block->all_since = queries - 1, block->all_until = block->newest + 1;
    for (int r = 0; r < block->padded; r++) {
        const int query = least(r / shape->chosen, queries - 1);
        const int64_t start = starts ? starts[(int64_t)block->row * shape->queries + first + query] : 0;
        const int64_t seen = block->newest + 1 - (start > 0 ? start : 0);
        block->since[r] = queries - 1 - query;
        block->until[r] = seen > 0 ? (int)seen : 0;
        if (block->until[r] > block->since[r] && block->until[r] > block->num_keys) block->num_keys = block->until[r];
        block->all_until = least(block->all_until, block->until[r]);
    }
}

/* The first row, at a whole vector, that sees one of the keys before number `end`. */
static int first_row(const Block *block, const Shape *shape, int end) {
    const int query = block->all_since + 1 - end;
    return query > 0 ? query * shape->chosen / LANES * LANES : 0;
}

static int64_t at_query(const Block *block, const Shape *shape, int r) {
    const int64_t token = (int64_t)block->row * shape->queries + block->first + r / shape->chosen;
    return ((token * shape->chosen + r % shape->chosen) * shape->heads + block->head) * shape->width;
}

static int64_t at_key(const Block *block, const Shape *shape, int number) {
    const int64_t key = (int64_t)block->row * shape->keys + block->newest - number;
    return (key * shape->heads + block->head) * shape->width;
}

/* The block's rows of a (B, T, K, H, C) tensor times `scale`, as columns (C, padded): a vector of rows at a time. */
static void take_columns(float *restrict columns, const float *restrict from, const Block *block, const Shape *shape, float scale) {
    for (int first = 0; first < block->padded; first += LANES) {
        const float *row[LANES];
        for (int r = 0; r < LANES; r++) row[r] = from + at_query(block, shape, least(first + r, block->rows - 1));
        for (int c = 0; c < shape->width; c++) {
            float *restrict column = columns + (int64_t)c * block->padded + first;
            for (int r = 0; r < LANES; r++) column[r] = scale * row[r][c];
        }
    }
}

static void give_columns(float *restrict to, const float *restrict columns, const Block *block, const Shape *shape, float scale) {
    for (int r = 0; r < block->rows; r++) {
        float *restrict row = to + at_query(block, shape, r);
        for (int c = 0; c < shape->width; c++) row[c] = scale * columns[(int64_t)c * block->padded + r];
    }
}

/* The same as rows (rows, padded width). */
static void take_rows(float *rows, const float *from, const Block *block, const Shape *shape, float scale) {
    const int wide = padded(shape->width);
    for (int r = 0; r < block->rows; r++, rows += wide) {
        const float *row = from + at_query(block, shape, r);
        for (int c = 0; c < shape->width; c++) rows[c] = scale * row[c];
        for (int c = shape->width; c < wide; c++) rows[c] = 0;
    }
}

/* exp(l) of a score, which is -l. */
static inline float odds(float score) {
    const float low = score < -GREATEST_LOGIT ? -GREATEST_LOGIT : score;
    return exponential(low > GREATEST_LOGIT ? -GREATEST_LOGIT : -low);
}

/* One key of the rows from `row` on: the weight `a` of each, and what is left of its stick. A row that does not see the
 * key loses nothing. */
#define BREAK(keep)                                                                                                    \
    if (n >= block->all_since && n < block->all_until) {                                                               \
        _Pragma("omp simd") for (int r = row; r < block->padded; r++) BREAK_ONE(odds(scores[r]), keep)                 \
    } else {                                                                                                           \
        _Pragma("omp simd") for (int r = row; r < block->padded; r++)                                                  \
            BREAK_ONE(n >= block->since[r] && n < block->until[r] ? odds(scores[r]) : 0.0f, keep)                      \
    }
#define BREAK_ONE(its_odds, keep)                                                                                      \
    {                                                                                                                  \
        const float e = its_odds, p = 1.0f / (1.0f + e), left = stick[r] * p, all = stick[r] * (e * p);                \
        const float a = all < LEAST_WEIGHT ? 0.0f : all;                                                               \
        keep;                                                                                                          \
        stick[r] = left < USED_UP ? 0.0f : left;                                                                       \
    }

static int any_left(const float *stick, int rows) {
    int left = 0;
    for (int r = 0; r < rows; r++) left |= stick[r] != 0;
    return left;
}

static void whole_sticks(float *stick, int rows) {
    for (int r = 0; r < rows; r++) stick[r] = 1;
}

static int64_t attend(float *o, const float *q, const float *k, const float *v, const Block *block, const Shape *shape, float *room) {
    const int width = shape->width, rows = block->padded, key_row = shape->heads * width;
    float *queries = room, *sums = queries + (int64_t)width * rows, *tile = sums + (int64_t)width * rows;
    float stick[MOST_ROWS];
    int64_t done = 0;
    take_columns(queries, q, block, shape, -1 / sqrtf((float)width));
    memset(sums, 0, sizeof(float) * width * rows);
    whole_sticks(stick, rows);
    for (int first = 0; first < block->num_keys && any_left(stick, block->rows); first += KEYS) {
        const int count = least(KEYS, block->num_keys - first), row = first_row(block, shape, first + count);
        const int64_t at = at_key(block, shape, first);
        multiply(tile + row, rows, k + at, -key_row, 1, queries + row, rows, count, rows - row, width, 0);
        for (int key = 0; key < count; key++) {
            float *restrict scores = tile + key * rows;
            const int n = first + key;
            BREAK(scores[r] = a)
        }
        done += 4 * (int64_t)count * (block->rows - row) * width;
        multiply(sums + row, rows, v + at, 1, -key_row, tile + row, rows, width, rows - row, count, 1);
    }
    give_columns(o, sums, block, shape, 1);
    return done;
}

/* A tile's gradients (keys, padded width) times `sign` to where its keys lie in a (B, S, H, C) tensor. */
static void add_to_keys(float *to, const float *tile, int first, int count, const Block *block, const Shape *shape, float sign) {
    for (int key = 0; key < count; key++, tile += padded(shape->width)) {
        float *row = to + at_key(block, shape, first + key);
        for (int c = 0; c < shape->width; c++) row[c] += sign * tile[c];
    }
}

/* With g = dA a: dl_m = p_m g_m - q_m (sum of g over keys older than m). From the newest key on e and g are made and dV
 * is added; from the oldest back dl, which is added to dQ and dK. Keys after the last stick's end have no gradient. */
static int64_t differentiate(const float *q, const float *k, const float *v, const float *d_o, float *dq, float *dk, float *dv,
                          const Block *block, const Shape *shape, float *room) {
    const int width = shape->width, wide = padded(width), rows = block->padded, key_row = shape->heads * width;
    const int64_t square = (int64_t)width * rows;
    const float scale = 1 / sqrtf((float)width);
    float *queries = room, *grads = queries + square, *sums = grads + square, *tile = sums + square;
    float *query_rows = tile + KEYS * rows, *grad_rows = query_rows + (int64_t)rows * wide, *made = grad_rows + (int64_t)rows * wide;
    float *odds_of_keys = made + KEYS * wide, *g_of_keys = odds_of_keys + (int64_t)block->num_keys * rows;
    float stick[MOST_ROWS];
    int64_t done = 0;
    take_columns(queries, q, block, shape, -scale);
    take_columns(grads, d_o, block, shape, 1);
    take_rows(query_rows, q, block, shape, -scale);
    take_rows(grad_rows, d_o, block, shape, 1);
    whole_sticks(stick, rows);
    int met = 0;
    for (; met < block->num_keys && any_left(stick, block->rows); met += KEYS) {
        const int count = least(KEYS, block->num_keys - met), row = first_row(block, shape, met + count);
        const int64_t at = at_key(block, shape, met), room_at = (int64_t)met * rows + row;
        multiply(odds_of_keys + room_at, rows, k + at, -key_row, 1, queries + row, rows, count, rows - row, width, 0);
        multiply(g_of_keys + room_at, rows, v + at, -key_row, 1, grads + row, rows, count, rows - row, width, 0);
        for (int key = 0; key < count; key++) {
            const int n = met + key;
            float *restrict scores = odds_of_keys + (int64_t)n * rows, *restrict g = g_of_keys + (int64_t)n * rows;
            float *restrict weights = tile + key * rows;
            BREAK(scores[r] = e; weights[r] = a; g[r] *= a)
        }
        multiply(made, wide, tile + row, rows, 1, grad_rows + (int64_t)row * wide, wide, count, wide, block->rows - row, 0);
        done += 10 * (int64_t)count * (block->rows - row) * width;
        add_to_keys(dv, made, met, count, block, shape, 1);
    }
    float *restrict older = stick;
    memset(older, 0, sizeof(float) * rows);
    memset(sums, 0, sizeof(float) * square);
    for (int first = met - KEYS; first >= 0; first -= KEYS) {
        const int count = least(KEYS, block->num_keys - first), row = first_row(block, shape, first + count);
        float *grad = g_of_keys + (int64_t)first * rows + row;
        for (int key = count - 1; key >= 0; key--) {
            const float *restrict e = odds_of_keys + (int64_t)(first + key) * rows;
            float *restrict g = g_of_keys + (int64_t)(first + key) * rows;
#pragma omp simd
            for (int r = row; r < rows; r++) {
                const float sum = older[r];
                older[r] += g[r];
                g[r] = (g[r] - e[r] * sum) / (1.0f + e[r]);
            }
        }
        multiply(sums + row, rows, k + at_key(block, shape, first), 1, -key_row, grad, rows, width, rows - row, count, 1);
        multiply(made, wide, grad, rows, 1, query_rows + (int64_t)row * wide, wide, count, wide, block->rows - row, 0);
        add_to_keys(dk, made, first, count, block, shape, -1);
    }
    give_columns(dq, sums, block, shape, scale);
    return done;
}

/* Numbers of room that each caller needs. */
int64_t mfext_attention_room(const Shape *shape, int32_t backward) {
    const int64_t rows = most_rows(shape), width = shape->width, wide = padded(shape->width);
    if (!backward) return 2 * width * rows + KEYS * rows;
    return 3 * width * rows + KEYS * rows + 2 * rows * wide + KEYS * wide + 2 * shape->keys * rows;
}

/* Pairs (batch, head) number first .. last - 1; every row of o is written. Both return the operations of their products. */
int64_t mfext_attend(float *o, const float *q, const float *k, const float *v, const int64_t *starts, const Shape *shape, float *room,
                  int32_t first, int32_t last) {
    Block block;
    int64_t done = 0;
    for (int pair = first; pair < last; pair++)
        for (int query = 0; query < shape->queries; query += QUERIES) {
            look(&block, shape, starts, pair, query);
            done += attend(o, q, k, v, &block, shape, room);
        }
    return done;
}

/* The gradients of such pairs: dq is written, dk and dv are added to. */
int64_t mfext_differentiate(float *dq, float *dk, float *dv, const float *d_o, const float *q, const float *k, const float *v,
                         const int64_t *starts, const Shape *shape, float *room, int32_t first, int32_t last) {
    Block block;
    int64_t done = 0;
    for (int pair = first; pair < last; pair++)
        for (int query = 0; query < shape->queries; query += QUERIES) {
            look(&block, shape, starts, pair, query);
            done += differentiate(q, k, v, d_o, dq, dk, dv, &block, shape, room);
        }
    return done;
}
