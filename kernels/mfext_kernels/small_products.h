/* Products of matrices small enough to lie in cache, in registers: out (M, N) = or += a (M, P) b (P, N).
 *
 * Rows of b and out are contiguous and walked in vectors; a is read number by number, wherever its rows lie. A number of
 * out is summed in the order of P, whatever M and N are. Built with contracted multiplications and additions, where the
 * processor has them. */
#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6
#else
#define LANES 4
#define ROWS 4
#endif
#define COLUMNS 2 /* vectors of one row held at once */

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

/* `rows` of out by `columns` (at most COLUMNS) vectors, all of them in registers; both are constants where it is inlined.
 * Number p of row m of a lies at row[m][p * along]. Where `keep` is given, what is read of b is left there in one piece;
 * from `ahead`, where given, a line is fetched at every p, `step` numbers apart. */
static inline __attribute__((always_inline)) void meet(const int rows, const int columns, float *out, int64_t out_row,
                                                       const float *const *row, int64_t along, const float *b, int64_t b_row,
                                                       int64_t inner, int add, float *keep, const float *ahead, int64_t step) {
    Vector sums[ROWS][COLUMNS];
    const float *a[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
        a[m] = row[m];
#pragma GCC unroll 2
        for (int n = 0; n < columns; n++) sums[m][n] = add ? *(const Vector *)(out + m * out_row + n * LANES) : (Vector){0};
    }
    for (int64_t p = 0; p < inner; p++, b += b_row) {
        Vector right[COLUMNS];
#pragma GCC unroll 2
        for (int n = 0; n < columns; n++) right[n] = *(const Vector *)(b + n * LANES);
        if (keep) {
#pragma GCC unroll 2
            for (int n = 0; n < columns; n++, keep += LANES) *(Vector *)keep = right[n];
        }
        if (ahead) __builtin_prefetch(ahead, 0, 2), ahead += step;
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            const float left = a[m][p * along];
#pragma GCC unroll 2
            for (int n = 0; n < columns; n++) sums[m][n] += left * right[n];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int n = 0; n < columns; n++) *(Vector *)(out + m * out_row + n * LANES) = sums[m][n];
}

/* The same of at most ROWS rows. */
static inline __attribute__((always_inline)) void meet_up_to(int64_t rows, const int columns, float *out, int64_t out_row,
                                                             const float *const *row, int64_t along, const float *b,
                                                             int64_t b_row, int64_t inner, int add, const float *ahead,
                                                             int64_t step) {
#define OF(count) case count: meet(count, columns, out, out_row, row, along, b, b_row, inner, add, NULL, ahead, step); break;
    switch (rows) {
        OF(1) OF(2) OF(3) OF(4)
#if ROWS > 4
        OF(5) OF(6)
#endif
#if ROWS > 6
        OF(7) OF(8)
#endif
    }
#undef OF
}
