/* What is between the matrix products of stick-breaking attention on a block of scores, float32, in place.
 *
 * A block holds (keys, rows): keys from the newest on, and rows side by side, so that a stick is broken for a vector
 * of rows at once. Equations and names as in cpu.py: p = sigmoid(-l), q = sigmoid(l) = 1 - p, c the stick left, and
 * a = c_before q. With e = exp(l) all of them need one exponential and one division, and no difference of near numbers. */
#include "../exponential.h"

#include <stdint.h>
#include <string.h>

#define MOST_ROWS 512
#define GREATEST_LOGIT 60.0f /* |l| beyond changes p or q by 9e-27, and every product with either is a normal number */
#define LEAST_WEIGHT 1e-30f  /* less would make subnormal numbers of products, many times slower on some processors */

/* exp(l) of a score, which is -l. */
static inline float odds(float score) {
    const float low = score < -GREATEST_LOGIT ? -GREATEST_LOGIT : score;
    return exponential(low > GREATEST_LOGIT ? -GREATEST_LOGIT : -low);
}

/* One key of all rows: its weights a, and what is left of the sticks. A row that does not see the key loses nothing. */
#define BREAK(keep, seen)                                                                                              \
    for (int r = 0; r < rows; r++) {                                                                                   \
        const float e = (seen) ? odds(scores[r]) : 0.0f, p = 1.0f / (1.0f + e), q = e * p, left = stick[r] * p;        \
        const float a = stick[r] * q;                                                                                  \
        keep;                                                                                                          \
        weights[r] = a < LEAST_WEIGHT ? 0.0f : a;                                                                      \
        stick[r] = left < used_up ? 0.0f : left;                                                                       \
    }

typedef struct {
    const int32_t *since, *until; /* (rows): a row sees keys number since .. until - 1 */
    int32_t all_since, all_until; /* and all rows see these */
    int32_t first;                /* number of the first key given */
    float used_up;
} Sight;

/* scores -l (pairs, keys, rows) -> weights in place; sticks (pairs, rows) go on from what newer keys left. */
void mfext_break_sticks(float *block, float *sticks, const Sight *sight, int32_t pairs, int32_t keys, int32_t rows) {
    const float used_up = sight->used_up;
    for (int pair = 0; pair < pairs; pair++, sticks += rows)
        for (int key = 0; key < keys; key++, block += rows) {
            float *restrict scores = block, *restrict weights = block, *restrict stick = sticks;
            const int n = sight->first + key;
            if (n >= sight->all_since && n < sight->all_until) {
#pragma omp simd
                BREAK((void)0, 1)
            } else {
                const int32_t *restrict since = sight->since, *restrict until = sight->until;
#pragma omp simd
                BREAK((void)0, n >= since[r] && n < until[r])
            }
        }
}

/* scores -l and dA (pairs, keys, rows) -> weights a (third block) and dl (in place of dA); scores become e.
 * With g = dA a: dl_m = p_m g_m - q_m (sum of g over keys older than m), summed from the oldest key on. */
void mfext_mend_sticks(float *block, float *grads, float *made, const Sight *sight, int32_t pairs, int32_t keys, int32_t rows) {
    const float used_up = sight->used_up;
    float carried[MOST_ROWS];
    for (int pair = 0; pair < pairs; pair++) {
        float *restrict stick = carried;
        for (int r = 0; r < rows; r++) stick[r] = 1.0f;
        for (int key = 0; key < keys; key++) {
            const size_t at = ((size_t)pair * keys + key) * rows;
            float *restrict scores = block + at, *restrict weights = made + at, *restrict g = grads + at;
            const int n = sight->first + key;
            if (n >= sight->all_since && n < sight->all_until) {
#pragma omp simd
                BREAK(scores[r] = e; g[r] *= a < LEAST_WEIGHT ? 0.0f : a, 1)
            } else {
                const int32_t *restrict since = sight->since, *restrict until = sight->until;
#pragma omp simd
                BREAK(scores[r] = e; g[r] *= a < LEAST_WEIGHT ? 0.0f : a, n >= since[r] && n < until[r])
            }
        }
        float *restrict sum = carried;
        memset(sum, 0, sizeof(float) * rows);
        for (int key = keys - 1; key >= 0; key--) {
            const size_t at = ((size_t)pair * keys + key) * rows;
            const float *restrict e = block + at;
            float *restrict g = grads + at;
#pragma omp simd
            for (int r = 0; r < rows; r++) {
                const float older = sum[r];
                sum[r] += g[r];
                g[r] = (g[r] - e[r] * older) / (1.0f + e[r]);
            }
        }
    }
}
