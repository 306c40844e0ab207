/* Products of a few rows with a matrix (out, in): dot products with its rows, of which each is read once. */
#include <stddef.h>

#define CALLED __attribute__((noinline)) static /* inlined into one another, innermost loops reload spilled pointers */

/* Numbers, a page of memory: the processor's own fetching ahead stops where a page ends. */
#define AHEAD 1024

/* Fetch `count` numbers that are read AHEAD after w: of its matrix, which ends at `end`, or of `next`, the one read after it
 * (NULL: not known). */
static inline void fetch_ahead(const float *w, const float *end, const float *next, int count) {
    const ptrdiff_t left = end - w;
    const float *from = left > AHEAD ? w + AHEAD : next ? next + (AHEAD - left) : NULL;
    for (int i = 0; from && i < count; i += 16) __builtin_prefetch(from + i);
}

static float dot(const float *a, const float *b, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* y (rows, out; a row every `stride` numbers) = x (rows, in) W^T + bias, W (out, in), four outputs at a time; `bias` may be
 * NULL, and `next`, the matrix read after W. */
CALLED void linear(float *y, size_t stride, const float *x, const float *w, const float *bias, int rows, int in, int out,
                   const float *next) {
    const float *end = w + (size_t)in * out;
    int o = 0;
    for (; o + 4 <= out; o += 4, w += 4 * (size_t)in) {
        const float *w1 = w + in, *w2 = w1 + in, *w3 = w2 + in;
        fetch_ahead(w, end, next, 4 * in);
        for (int row = 0; row < rows; row++) {
            const float *from = x + (size_t)row * in;
            float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
            for (int i = 0; i < in; i++) {
                a += w[i] * from[i];
                b += w1[i] * from[i];
                c += w2[i] * from[i];
                d += w3[i] * from[i];
            }
            float *to = y + row * stride + o;
            to[0] = a, to[1] = b, to[2] = c, to[3] = d;
        }
    }
    for (; o < out; o++, w += in)
        for (int row = 0; row < rows; row++) y[row * stride + o] = dot(w, x + (size_t)row * in, in);
    if (bias)
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < out; i++) y[row * stride + i] += bias[i];
}
