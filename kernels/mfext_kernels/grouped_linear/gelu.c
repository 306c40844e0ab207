/* tanh-gelu of rows and what backward needs of it, float32, one pass over memory each. tanh-gelu is x s(z) with s the
 * sigmoid and z = 2 sqrt(2/pi) (x + 0.044715 x^3). */
#include "../exponential.h"

#include <stddef.h>

#define SLOPE 1.5957691216f /* 2 sqrt(2/pi) */
#define CUBE 0.044715f
#define GREATEST 87.0f /* of z: the sigmoid of more is 1, of less 0, to float32 */

static inline float sigmoid(float z) {
    const float low = z < -GREATEST ? -GREATEST : z;
    return 1.0f / (1.0f + exponential(low > GREATEST ? -GREATEST : -low));
}

void mfext_gelu(float *restrict active, const float *restrict hidden, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float x = hidden[i];
        active[i] = x * sigmoid(SLOPE * (x + CUBE * x * x * x));
    }
}

/* Rows (rows, width) before gelu and the gradients dA of what comes after, each row times a gate g afterwards:
 * d gate = <gelu(x), dA>; where asked (not NULL) `gated` = g gelu(x), and where `through`, dA becomes g dA gelu'(x). */
void mfext_gelu_backward(float *grads, float *gated, float *gate_grads, const float *hidden, const float *gates, int32_t rows,
                         int32_t width, int32_t through) {
    for (int r = 0; r < rows; r++, hidden += width, grads += width) {
        const float *restrict x = hidden;
        float *restrict grad = grads, *restrict active = gated ? gated + (ptrdiff_t)r * width : NULL;
        const float gate = gates[r];
        float sum = 0;
#define EACH(keep)                                                                                                     \
    _Pragma("omp simd reduction(+ : sum)") for (int i = 0; i < width; i++) {                                           \
        const float square = x[i] * x[i], s = sigmoid(SLOPE * (x[i] + CUBE * square * x[i])), a = x[i] * s;            \
        const float slope = s + SLOPE * (1.0f + 3.0f * CUBE * square) * a * (1.0f - s), given = grad[i];               \
        sum += a * given;                                                                                              \
        grad[i] = through ? gate * given * slope : given;                                                              \
        keep;                                                                                                          \
    }
        if (gated) EACH(active[i] = gate * a) else EACH((void)0)
        gate_grads[r] = sum;
    }
}
