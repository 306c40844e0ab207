/* Products of matrices small enough to lie in cache, in registers: out (M, N) = or += a (M, P) b (P, N).
 *
 * Rows of b and out are contiguous, so N is walked in vectors and must be a multiple of LANES; a is read number by number,
 * with any strides. Built with contracted multiplications and additions, where the processor has them. */
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8
#elif defined(__AVX__)
#define LANES 8
#define ROWS 4
#else
#define LANES 4
#define ROWS 4
#endif
#define COLUMNS 2 /* vectors of one row held at once */

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

/* `rows` of out by `columns` vectors, all of them in registers; both are constants where it is inlined. */
static inline __attribute__((always_inline)) void
registers(const int rows, const int columns, float *out, int out_row, const float *a, int a_row, int a_column, const float *b,
          int b_row, int inner, int add) {
    Vector sums[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int n = 0; n < columns; n++)
            sums[m][n] = add ? *(const Vector *)(out + (int64_t)m * out_row + n * LANES) : (Vector){0};
    for (int p = 0; p < inner; p++, a += a_column, b += b_row) {
        Vector right[COLUMNS];
#pragma GCC unroll 2
        for (int n = 0; n < columns; n++) right[n] = *(const Vector *)(b + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            const float left = a[(int64_t)m * a_row];
#pragma GCC unroll 2
            for (int n = 0; n < columns; n++) sums[m][n] += left * right[n];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int n = 0; n < columns; n++) *(Vector *)(out + (int64_t)m * out_row + n * LANES) = sums[m][n];
}

/* One strip of COLUMNS vectors (or one) of all rows of out. */
#define STRIP(columns)                                                                                                 \
    {                                                                                                                  \
        int m = 0;                                                                                                     \
        for (; m + ROWS <= rows; m += ROWS)                                                                            \
            registers(ROWS, columns, out + (int64_t)m * out_row + n, out_row, a + (int64_t)m * a_row, a_row, a_column, \
                      b + n, b_row, inner, add);                                                                       \
        for (; m < rows; m++)                                                                                          \
            registers(1, columns, out + (int64_t)m * out_row + n, out_row, a + (int64_t)m * a_row, a_row, a_column,    \
                      b + n, b_row, inner, add);                                                                       \
    }

static void multiply(float *out, int out_row, const float *a, int a_row, int a_column, const float *b, int b_row, int rows,
                     int columns, int inner, int add) {
    int n = 0;
    for (; n + COLUMNS * LANES <= columns; n += COLUMNS * LANES) STRIP(COLUMNS)
    for (; n < columns; n += LANES) STRIP(1)
}
