/* One more token of B sequences through a domain gate: convolution over the last W embedded tokens, gelu, running sums
 * over the document so far (plain and decaying), their means, a layer with gelu, one logit. */
#include "../row_products.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

/* embedding (V, E); convolution (C, E W), its input as (E, W); hidden (H, M C); output (H); decays (M), the first 1. */
typedef struct {
    const float *embedding, *convolution, *convolution_bias, *hidden, *hidden_bias, *output, *output_bias, *decays;
    int32_t vocabulary, d_embedding, window, d_convolution, d_hidden, num_means;
} Gate;

static void gelu(float *x, int count) {
    for (int i = 0; i < count; i++) x[i] *= 0.5f * (1 + erff(x[i] * 0.70710678118654752f));
}

/* logits (B); tail (B, W - 1, E), the embedded tokens before, and sums (M, B, C) as they were, and as they are after;
 * ids (B), reach (B): how many tokens of the document came before, negative for padding. `room`: E W + (1 + M) C + H
 * numbers. Returns 0, or 1 where an id is outside the vocabulary. */
int64_t mfext_gate_step(float *logits, float *new_tail, float *new_sums, const float *tail, const float *sums, const int64_t *ids,
                        const int64_t *reach, const Gate *gate, float *room, int64_t rows) {
    const int wide = gate->d_embedding, window = gate->window, channels = gate->d_convolution, means = gate->num_means;
    const size_t tail_size = (size_t)(window - 1) * wide;
    float *seen = room, *features = seen + (size_t)wide * window, *averaged = features + channels;
    float *hidden = averaged + (size_t)means * channels;
    for (int64_t row = 0; row < rows; row++) {
        if (ids[row] < 0 || ids[row] >= gate->vocabulary) return 1;
        const float *before = tail + row * tail_size, *now = gate->embedding + ids[row] * wide;
        float *after = new_tail + row * tail_size;
        for (int w = 0; w < window; w++) {
            const float *token = w < window - 1 ? before + (size_t)w * wide : now;
            const int counts = window - 1 - w <= reach[row];
            for (int e = 0; e < wide; e++) seen[e * window + w] = counts ? token[e] : 0;
            if (w) memcpy(after + (size_t)(w - 1) * wide, token, sizeof(float) * wide);
        }
        linear(features, channels, seen, gate->convolution, gate->convolution_bias, 1, wide * window, channels, gate->hidden);
        gelu(features, channels);
        const float count = reach[row] > 0 ? (float)(reach[row] + 1) : 1;
        for (int m = 0; m < means; m++) {
            const size_t at = ((size_t)m * rows + row) * channels;
            const float decay = gate->decays[m], kept = reach[row] > 0 ? decay : 0;
            const float total = m ? (1 - powf(decay, count)) / (1 - decay) : count;
            for (int c = 0; c < channels; c++) {
                const float sum = (reach[row] >= 0 ? features[c] : 0) + kept * sums[at + c];
                new_sums[at + c] = sum;
                averaged[(size_t)m * channels + c] = sum / total;
            }
        }
        linear(hidden, gate->d_hidden, averaged, gate->hidden, gate->hidden_bias, 1, means * channels, gate->d_hidden, NULL);
        gelu(hidden, gate->d_hidden);
        logits[row] = dot(hidden, gate->output, gate->d_hidden) + gate->output_bias[0];
    }
    return 0;
}
