/* Products of rows sorted by expert with their experts' matrices, float32: rows gathered on the way, gelu between the two
 * products of a feed-forward network, one expert's rows at a time so that they stay in cache.
 *
 * A matrix is taken in strips of COLUMNS vectors, copied so that they lie in one piece (turned over where its transpose is
 * meant), and ROWS rows at a time meet a strip in registers. A number of a result is a sum in the order of what is summed,
 * whatever the rows beside it and the number of threads: a row's bits are those of the row alone.
 *
 * R rows, sorted by expert; expert e has rows bounds[e] .. bounds[e + 1] - 1; `index` tells where a row lies, NULL: in
 * order. matrices[e] (inner, wide), or (wide, inner) where `turned`. Functions return the operations of their products. */
#include "../exponential.h"
#include "../small_products.h"

#include <stddef.h>
#include <string.h>

#define STRIP_WIDTH (COLUMNS * LANES)
#define LINE 16     /* numbers fetched together */
#define AHEAD 8     /* rows fetched before they are wanted */
#define AT_ONCE 512 /* rows: their hidden numbers stay in second-level cache between two products */

/* tanh-gelu is x s(z) with s the sigmoid and z = 2 sqrt(2/pi) (x + 0.044715 x^3). */
#define GELU_SLOPE 1.5957691216f
#define GELU_CUBE 0.044715f
#define GREATEST 87.0f /* of z: the sigmoid of more is 1, of less 0, to float32 */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* As `meet` of `count` rows (at most ROWS) with b a strip, of which the first `columns` are meant. */
static void meet_strip(int64_t count, float *out, int64_t out_row, int64_t columns, const float *const *row, int64_t along,
                       const float *strip, int64_t inner, int add, const float *ahead, int64_t step) {
    float part[ROWS * STRIP_WIDTH];
    const int whole = columns >= STRIP_WIDTH;
    float *to = whole ? out : part;
    const int64_t to_row = whole ? out_row : STRIP_WIDTH;
    if (!whole && add)
        for (int64_t m = 0; m < count; m++) memcpy(part + m * STRIP_WIDTH, out + m * out_row, sizeof(float) * columns);
    meet_up_to(count, COLUMNS, to, to_row, row, along, strip, STRIP_WIDTH, inner, add, ahead, step);
    if (!whole)
        for (int64_t m = 0; m < count; m++) memcpy(out + m * out_row, part + m * STRIP_WIDTH, sizeof(float) * columns);
}

#if defined(__AVX2__) && !defined(__clang__)
typedef int32_t Lanes __attribute__((vector_size(4 * LANES)));

/* LANES by LANES numbers turned over, in registers. */
static void turn(float *to, int64_t to_row, const float *from, int64_t from_row) {
    Vector rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = *(const Vector *)(from + i * from_row);
#pragma GCC unroll 4
    for (int step = LANES / 2; step; step /= 2) {
        Lanes low, high;
        for (int l = 0; l < LANES; l++) {
            low[l] = l & step ? LANES + l - step : l;
            high[l] = l & step ? LANES + l : l + step;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & step)) {
                const Vector a = rows[i], b = rows[i + step];
                rows[i] = __builtin_shuffle(a, b, low);
                rows[i + step] = __builtin_shuffle(a, b, high);
            }
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) *(Vector *)(to + i * to_row) = rows[i];
}
#else
static void turn(float *restrict to, int64_t to_row, const float *restrict from, int64_t from_row) {
    for (int i = 0; i < LANES; i++)
        for (int l = 0; l < LANES; l++) to[i * to_row + l] = from[l * from_row + i];
}
#endif

/* Columns n .. of a matrix (inner, wide) as a strip (inner, STRIP_WIDTH), with zeros beyond its width. */
static void take_strip(float *strip, const float *matrix, int64_t inner, int64_t wide, int64_t n, int turned) {
    const int64_t columns = least(STRIP_WIDTH, wide - n);
    if (!turned) {
        for (int64_t p = 0; p < inner; p++, strip += STRIP_WIDTH) {
            const float *from = matrix + p * wide + n;
            if (columns == STRIP_WIDTH) {
                for (int c = 0; c < STRIP_WIDTH; c++) strip[c] = from[c];
            } else {
                for (int64_t c = 0; c < STRIP_WIDTH; c++) strip[c] = c < columns ? from[c] : 0;
            }
        }
        return;
    }
    for (int64_t c = 0; c < STRIP_WIDTH; c += LANES) {
        int64_t p = 0;
        if (c + LANES <= columns)
            for (; p + LANES <= inner; p += LANES)
                turn(strip + p * STRIP_WIDTH + c, STRIP_WIDTH, matrix + (n + c) * inner + p, inner);
        for (; p < inner; p++)
            for (int64_t l = c; l < c + LANES; l++) strip[p * STRIP_WIDTH + l] = l < columns ? matrix[(n + l) * inner + p] : 0;
    }
}

/* `count` rows, from row `first` on, of one expert: out (count, wide). The first rows meet a strip where it lies and leave
 * a copy; the matrix to come, `next` or NULL, is fetched little by little. */
static void rows_by_matrix(float *out, const float *rows, const int64_t *index, int64_t first, int64_t count, const float *matrix,
                           int64_t inner, int64_t wide, int turned, const float *next, float *strip) {
    const int64_t calls = (count + ROWS - 1) / ROWS * ((wide + STRIP_WIDTH - 1) / STRIP_WIDTH);
    const int64_t step = next ? least((wide + calls - 1) / calls, LINE) : 0;
    for (int64_t n = 0, fetched = 0; n < wide; n += STRIP_WIDTH) {
        const int whole = wide - n >= STRIP_WIDTH, lies = whole && !turned && count >= ROWS;
        if (!lies) take_strip(strip, matrix, inner, wide, n, turned);
        for (int64_t m = 0; m < count; m += ROWS, fetched += step * inner) {
            const int more = fetched + step * inner <= inner * wide;
            const float *ahead = next && more ? next + fetched : strip;
            const float *row[ROWS];
            float *to = out + m * wide + n;
            for (int i = 0; i < ROWS; i++) {
                const int64_t number = first + least(m + i, count - 1);
                row[i] = rows + (index ? index[number] : number) * inner;
            }
            if (lies && !m) meet(ROWS, COLUMNS, to, wide, row, 1, matrix + n, wide, inner, 0, strip, ahead, more ? step : 0);
            else meet_strip(least(ROWS, count - m), to, wide, wide - n, row, 1, strip, inner, 0, ahead, more ? step : 0);
        }
    }
}

/* Rows first .. last - 1 of out (R, wide): each row's, of `rows`, product with its expert's matrix. `room`: inner strips. */
int64_t mfext_rows_by_matrices(float *out, const float *rows, const int64_t *index, const float *const *matrices,
                               const int32_t *bounds, float *room, int64_t inner, int64_t wide, int64_t turned, int64_t first,
                               int64_t last) {
    for (int64_t e = 0, low = first; low < last; e++) {
        const int64_t high = least(bounds[e + 1], last);
        if (high <= low) continue;
        rows_by_matrix(out + low * wide, rows, index, low, high - low, matrices[e], inner, wide, (int)turned,
                       high < last ? matrices[e + 1] : NULL, room);
        low = high;
    }
    return 2 * (last - first) * inner * wide;
}

/* Columns first .. last - 1 of rows low .. low + count - 1, as panels (count, ROWS) of ROWS columns each. */
static void take_panels(float *panel, const float *rows, const int64_t *index, int64_t width, int64_t low, int64_t count,
                        int64_t first, int64_t last) {
    for (int64_t r = 0; r < count; r++) {
        const float *row = rows + (index ? index[low + r] : low + r) * width;
        float *to = panel + r * ROWS;
        for (int64_t m = first; m < last; m += ROWS, to += count * ROWS) {
            if (m + ROWS <= last) memcpy(to, row + m, sizeof(float) * ROWS);
            else memcpy(to, row + m, sizeof(float) * (last - m));
        }
    }
}

/* Of the gradients (tall, wide) of matrices, rows first .. last - 1 of each: the sum over an expert's rows r of
 * left[r]^T right[r], times scales[r] where given. Where sums[e] is NULL nobody asks. `room`: for at most
 * AT_ONCE of the R rows a row of a strip, and a number of each of those rows of a gradient, in whole ROWS. */
int64_t mfext_matrices_of_rows(float *const *sums, const float *left, const int64_t *left_index, const float *right,
                               const int64_t *right_index, const float *scales, const int32_t *bounds, float *room, int64_t experts,
                               int64_t tall, int64_t wide, int64_t first, int64_t last) {
    float *panels = room + least(AT_ONCE, bounds[experts]) * STRIP_WIDTH;
    int64_t done = 0;
    for (int64_t e = 0; e < experts; e++) {
        if (!sums[e]) continue;
        done += 2 * (bounds[e + 1] - bounds[e]) * (last - first) * wide;
        for (int64_t low = bounds[e], begun = 0; low < bounds[e + 1] || !begun; low += AT_ONCE, begun = 1) {
            const int64_t count = least(AT_ONCE, bounds[e + 1] - low);
            take_panels(panels, left, left_index, tall, low, count, first, last);
            for (int64_t n = 0; n < wide; n += STRIP_WIDTH) {
                const int64_t columns = least(STRIP_WIDTH, wide - n);
                for (int64_t r = 0; r < count; r++) {
                    const float *from = right + (right_index ? right_index[low + r] : low + r) * wide + n;
                    const float scale = scales ? scales[low + r] : 1;
                    float *strip = room + r * STRIP_WIDTH;
                    if (columns == STRIP_WIDTH) {
                        for (int c = 0; c < STRIP_WIDTH; c++) strip[c] = scale * from[c];
                    } else {
                        for (int64_t c = 0; c < STRIP_WIDTH; c++) strip[c] = c < columns ? scale * from[c] : 0;
                    }
                }
                for (int64_t m = first; m < last; m += ROWS) {
                    const float *column[ROWS];
                    for (int i = 0; i < ROWS; i++) column[i] = panels + (m - first) * count + i;
                    meet_strip(least(ROWS, last - m), sums[e] + m * wide + n, wide, wide - n, column, ROWS, room, count, begun != 0,
                               NULL, 0);
                }
            }
        }
    }
    return done;
}

static void fetch_row(const float *row, int64_t width) {
    for (int64_t i = 0; i < width; i += LINE) __builtin_prefetch(row + i, 0, 3);
}

/* out[r] = rows[index[r]] for rows first .. last - 1. */
void mfext_take_rows(float *out, const float *rows, const int64_t *index, int64_t width, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
        if (r + AHEAD < last) fetch_row(rows + index[r + AHEAD] * width, width);
        memcpy(out + r * width, rows + index[r] * width, sizeof(float) * width);
    }
}

/* out[n] = the sum over k of rows[index[n, k]], times gates[n, k] where given, for tokens first .. last - 1. */
void mfext_sum_chosen(float *out, const float *rows, const int64_t *index, const float *gates, int64_t chosen, int64_t width,
                      int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
        float *restrict sum = out + n * width;
        for (int64_t k = 0; k < chosen; k++) {
            const int64_t at = n * chosen + k;
            const float *restrict row = rows + index[at] * width;
            const float gate = gates ? gates[at] : 1;
            if (at + AHEAD < last * chosen) fetch_row(rows + index[at + AHEAD] * width, width);
            if (k == 0)
                for (int64_t i = 0; i < width; i++) sum[i] = gate * row[i];
            else
                for (int64_t i = 0; i < width; i++) sum[i] += gate * row[i];
        }
    }
}

static inline float sigmoid(float z) {
    const float low = z < -GREATEST ? -GREATEST : z;
    return 1.0f / (1.0f + exponential(low > GREATEST ? -GREATEST : -low));
}

static void gelu(float *restrict active, const float *restrict hidden, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float x = hidden[i];
        active[i] = x * sigmoid(GELU_SLOPE * (x + GELU_CUBE * x * x * x));
    }
}

/* Rows before gelu and the gradients dA of what comes after, each row times a gate g afterwards: d gate = <gelu(x), dA>,
 * `gated` (or NULL) = g gelu(x), and dA becomes g dA gelu'(x). */
static void gelu_backward(float *grads, float *gated, float *gate_grads, const float *hidden, const float *gates, int64_t rows,
                          int64_t width) {
    for (int64_t r = 0; r < rows; r++, hidden += width, grads += width) {
        const float *restrict x = hidden;
        float *restrict grad = grads, *restrict active = gated ? gated + r * width : NULL;
        const float gate = gates[r];
        float sum = 0;
#define EACH(keep)                                                                                                         \
    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < width; i++) {                                           \
        const float square = x[i] * x[i], s = sigmoid(GELU_SLOPE * (x[i] + GELU_CUBE * square * x[i])), a = x[i] * s;      \
        sum += a * grad[i];                                                                                                \
        grad[i] *= gate * (s + GELU_SLOPE * (1.0f + 3.0f * GELU_CUBE * square) * a * (1.0f - s));                          \
        keep;                                                                                                              \
    }
        if (gated) EACH(active[i] = gate * a) else EACH((void)0)
        gate_grads[r] = sum;
    }
}

/* y[r] = gelu(x[tokens[r]] U_e) V_e for rows first .. last - 1: U (tall, inner), V (inner, wide). The hidden rows are
 * written to `hidden` (R, inner) where that is given. `room`: rows of inner twice, at most AT_ONCE, and a strip of the
 * longest of the three. */
int64_t mfext_feed_forward(float *y, float *hidden, const float *x, const int64_t *tokens, const float *const *up,
                           const float *const *down, const int32_t *bounds, float *room, int64_t tall, int64_t inner, int64_t wide,
                           int64_t first, int64_t last) {
    const int64_t at_once = least(AT_ONCE, last - first);
    float *active = room, *own = active + at_once * inner, *strip = own + at_once * inner;
    for (int64_t e = 0, low = first; low < last; e++) {
        const int64_t end = least(bounds[e + 1], last);
        for (int64_t at = low; at < end; at += AT_ONCE) {
            const int64_t count = least(AT_ONCE, end - at);
            float *made = hidden ? hidden + at * inner : own;
            rows_by_matrix(made, x, tokens, at, count, up[e], tall, inner, 0, down[e], strip);
            gelu(active, made, count * inner);
            rows_by_matrix(y + at * wide, active, NULL, 0, count, down[e], inner, wide, 0, end < last ? up[e + 1] : NULL, strip);
        }
        if (end > low) low = end;
    }
    return 2 * (last - first) * inner * (tall + wide);
}

/* Backward of y[n] = sum of gate y[r] for rows first .. last - 1, from dy (N, wide) and what forward kept: d gate,
 * d hidden (R, inner), and where given gate * gelu(hidden) (R, inner) and dx of each row (R, tall). */
int64_t mfext_feed_forward_backward(float *gate_grads, float *hidden_grads, float *gated, float *x_grads, const float *y_grads,
                                    const float *hidden, const float *gates, const int64_t *tokens, const float *const *up,
                                    const float *const *down, const int32_t *bounds, float *room, int64_t tall, int64_t inner,
                                    int64_t wide, int64_t first, int64_t last) {
    for (int64_t e = 0, low = first; low < last; e++) {
        const int64_t end = least(bounds[e + 1], last);
        for (int64_t at = low; at < end; at += AT_ONCE) {
            const int64_t count = least(AT_ONCE, end - at);
            float *grads = hidden_grads + at * inner;
            rows_by_matrix(grads, y_grads, tokens, at, count, down[e], wide, inner, 1, up[e], room);
            gelu_backward(grads, gated ? gated + at * inner : NULL, gate_grads + at, hidden + at * inner, gates + at, count, inner);
            if (x_grads) rows_by_matrix(x_grads + at * tall, grads, NULL, 0, count, up[e], inner, tall, 1, end < last ? down[e + 1] : NULL, room);
        }
        if (end > low) low = end;
    }
    return 2 * (last - first) * inner * (wide + (x_grads ? tall : 0));
}
