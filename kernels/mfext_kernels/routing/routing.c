/* The bookkeeping of routing on the CPU: the greatest scores of a token, and rows sorted by expert. */
#include <stdint.h>

#define MOST_CHOSEN 32

/* What is not a number counts as greater than any that is. */
static inline int above(float a, float b) { return b == b && !(a <= b); }

/* chosen (N, K): of each row of scores (N, E) the places of its K greatest, greatest first and the earlier of equals first;
 * tokens first .. last - 1. K is at most E and MOST_CHOSEN. */
void mfext_top_k(int64_t *chosen, const float *scores, int64_t experts, int64_t count, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
        const float *row = scores + n * experts;
        float kept[MOST_CHOSEN];
        int64_t *places = chosen + n * count;
        for (int64_t e = 0; e < experts; e++) {
            const float score = row[e];
            int64_t at = e < count ? e : count - 1;
            if (e >= count && !above(score, kept[at])) continue;
            for (; at > 0 && above(score, kept[at - 1]); at--) kept[at] = kept[at - 1], places[at] = places[at - 1];
            kept[at] = score, places[at] = e;
        }
    }
}

/* Sorted by counting, stably: see Dispatch. Returns 0, or 1 where an expert is outside 0 .. experts - 1. */
int64_t mfext_dispatch(int64_t *order, int64_t *inverse, int64_t *tokens, int32_t *bounds, const int64_t *chosen, int64_t num_tokens,
                       int64_t num_chosen, int64_t experts) {
    const int64_t rows = num_tokens * num_chosen;
    for (int64_t e = 0; e <= experts; e++) bounds[e] = 0;
    for (int64_t flat = 0; flat < rows; flat++) {
        if (chosen[flat] < 0 || chosen[flat] >= experts) return 1;
        bounds[chosen[flat]]++;
    }
    for (int64_t e = 0, start = 0; e <= experts; e++) {
        const int32_t size = bounds[e];
        bounds[e] = (int32_t)start;
        start += size;
    }
    for (int64_t n = 0, flat = 0; n < num_tokens; n++)
        for (int64_t k = 0; k < num_chosen; k++, flat++) {
            const int32_t row = bounds[chosen[flat]]++; /* the expert's next row, in the end the next expert's first */
            order[row] = flat, inverse[flat] = row, tokens[row] = n;
        }
    for (int64_t e = experts; e > 0; e--) bounds[e] = bounds[e - 1];
    bounds[0] = 0;
    return 0;
}
