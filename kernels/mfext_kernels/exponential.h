/* exp for loops over vectors: no call, no branch. */
#include <stdint.h>

/* exp, to 2 units in the last place where |x| <= 87: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
static inline float exponential(float x) {
    union { float f; uint32_t bits; } shifted = {x * 1.44269504f + 12582912.0f}, scale; /* 1.5 * 2^23: n in the low bits */
    const float n = shifted.f - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float tail = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
                        1.6666665459e-1f) * r + 5.0000001201e-1f;
    const float mantissa = (tail * r * r + r) + 1.0f;
    scale.bits = (shifted.bits + 127) << 23;
    return mantissa * scale.f;
}
