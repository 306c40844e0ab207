/* One new token of one sequence, or of several one after another, through every layer of a ModuleFormer, float32.
 *
 * Matrices are row-major. Expert matrices (E, in, out) are applied as a weighted sum of their rows, so
 * each weight is read once, in order; linear layers (out, in) as dot products. The residual stream x (D)
 * is read and written in place; keys and values of the new position are appended to the cache. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    const float *norm_weight, *norm_bias;                    /* (D) */
    const float *hidden_weight, *hidden_bias, *output_weight; /* router: (G, D), (G), (E, G) */
    const float *enter, *leave;                              /* experts: (E, D, W), (E, W, D) */
    int32_t num_experts;                                     /* E, which pruning leaves different from site to site */
} Site;

typedef struct {
    Site attention, feedforward;
    const float *key_weight, *key_bias, *value_weight, *value_bias; /* (A, D), (A); NULL: keys and values are x */
    float *keys, *values;                                           /* (rows, H, capacity, C) */
} Layer;

typedef struct {
    int32_t num_layers, d_model, num_heads, d_head, d_router, d_feedforward, capacity;
    int32_t attention_chosen, feedforward_chosen;
    float eps;
} Shape;

static float dot(const float *a, const float *b, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* y (out) += scale * x (in) W (in, out), four rows at a time. */
static void add_product(float *restrict y, const float *restrict x, const float *restrict w, int in, int out, float scale) {
    int row = 0;
    for (; row + 4 <= in; row += 4, w += 4 * (size_t)out) {
        const float a = scale * x[row], b = scale * x[row + 1], c = scale * x[row + 2], d = scale * x[row + 3];
        const float *w1 = w + out, *w2 = w1 + out, *w3 = w2 + out;
#pragma omp simd
        for (int i = 0; i < out; i++) y[i] += (a * w[i] + b * w1[i]) + (c * w2[i] + d * w3[i]);
    }
    for (; row < in; row++, w += out) {
        const float a = scale * x[row];
#pragma omp simd
        for (int i = 0; i < out; i++) y[i] += a * w[i];
    }
}

static void layer_norm(float *y, const float *x, const Site *site, int n, float eps) {
    float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
    for (int i = 0; i < n; i++) mean += x[i];
    mean /= n;
#pragma omp simd reduction(+ : variance)
    for (int i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    const float scale = 1 / sqrtf(variance / n + eps);
#pragma omp simd
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * site->norm_weight[i] + site->norm_bias[i];
}

/* The `chosen` most probable experts, in falling order, the lower number first among equals, and their
 * probabilities. `hidden` (G) and `probability` (E) are scratch. */
static void choose(int *experts, float *gates, const float *x, const Site *site, const Shape *shape, int chosen,
                   float *hidden, float *probability) {
    const int num_experts = site->num_experts;
    for (int i = 0; i < shape->d_router; i++) {
        const float h = dot(site->hidden_weight + (size_t)i * shape->d_model, x, shape->d_model) + site->hidden_bias[i];
        hidden[i] = 0.5f * h * (1 + erff(h * 0.70710678118654752f));
    }
    float most = -INFINITY, sum = 0;
    for (int e = 0; e < num_experts; e++) {
        probability[e] = dot(site->output_weight + (size_t)e * shape->d_router, hidden, shape->d_router);
        if (probability[e] > most) most = probability[e];
    }
    for (int e = 0; e < num_experts; e++) sum += probability[e] = expf(probability[e] - most);
    for (int k = 0; k < chosen; k++) {
        int best = -1;
        for (int e = 0; e < num_experts; e++)
            if (probability[e] >= 0 && (best < 0 || probability[e] > probability[best])) best = e;
        if (best < 0) best = k; /* all are NaN: stay inside the weights and let the NaN show */
        experts[k] = best;
        gates[k] = probability[best] / sum;
        probability[best] = -1;
    }
}

/* o (C) of one query over keys start..position, from the newest: o = sum a_j v_j, a_j = s_j * (stick left). */
static void attend(float *o, const float *q, const float *keys, const float *values, int position, int start, int width) {
    const float scale = 1 / sqrtf((float)width);
    float stick = 1;
    for (int j = position; j >= start; j--) {
        const float l = scale * dot(q, keys + (size_t)j * width, width);
        const float e = expf(-fabsf(l)), larger = 1 / (1 + e), smaller = e * larger;
        const float a = stick * (l > 0 ? larger : smaller);
        const float *v = values + (size_t)j * width;
#pragma omp simd
        for (int i = 0; i < width; i++) o[i] += a * v[i];
        stick *= l > 0 ? smaller : larger;
        if (stick < 1.17549435e-38f) break; /* what is left weighs less than the smallest normal number */
    }
}

static void append(float *cache, const float *weight, const float *bias, const float *x, const Shape *shape, int position) {
    for (int h = 0; h < shape->num_heads; h++) {
        float *row = cache + ((size_t)h * shape->capacity + position) * shape->d_head;
        for (int i = 0; i < shape->d_head; i++) {
            const int out = h * shape->d_head + i;
            row[i] = weight ? dot(weight + (size_t)out * shape->d_model, x, shape->d_model) + bias[out] : x[out];
        }
    }
}

/* `scratch` holds D + G + E + 2 * max(A, F) floats, E the largest of all sites, the widths of both kinds; at most 64
 * experts are chosen. Keys before `start` are not seen. */
static void step(const Layer *layers, const Shape *shape, int row, int position, int start, float *x, float *scratch) {
    const size_t own = (size_t)row * shape->num_heads * shape->capacity * shape->d_head;
    const int d = shape->d_model, wide = shape->num_heads * shape->d_head, width = shape->d_head;
    float *normed = scratch, *hidden = normed + d, *first = hidden + shape->d_router;
    float *second = first + (wide > shape->d_feedforward ? wide : shape->d_feedforward);
    float *probability = second + (wide > shape->d_feedforward ? wide : shape->d_feedforward);
    int experts[64];
    float gates[64];
    for (int number = 0; number < shape->num_layers; number++) {
        const Layer *layer = layers + number;
        layer_norm(normed, x, &layer->attention, d, shape->eps);
        float *keys = layer->keys + own, *values = layer->values + own;
        append(keys, layer->key_weight, layer->key_bias, normed, shape, position);
        append(values, layer->value_weight, layer->value_bias, normed, shape, position);
        choose(experts, gates, normed, &layer->attention, shape, shape->attention_chosen, hidden, probability);
        for (int k = 0; k < shape->attention_chosen; k++) {
            const size_t at = (size_t)experts[k] * d * wide;
            memset(first, 0, sizeof(float) * wide);
            memset(second, 0, sizeof(float) * wide);
            add_product(first, normed, layer->attention.enter + at, d, wide, 1);
            for (int h = 0; h < shape->num_heads; h++) {
                const size_t head = (size_t)h * shape->capacity * width;
                attend(second + h * width, first + h * width, keys + head, values + head, position, start, width);
            }
            add_product(x, second, layer->attention.leave + at, wide, d, gates[k]);
        }
        layer_norm(normed, x, &layer->feedforward, d, shape->eps);
        choose(experts, gates, normed, &layer->feedforward, shape, shape->feedforward_chosen, hidden, probability);
        for (int k = 0; k < shape->feedforward_chosen; k++) {
            const int f = shape->d_feedforward;
            const size_t at = (size_t)experts[k] * d * f;
            memset(first, 0, sizeof(float) * f);
            add_product(first, normed, layer->feedforward.enter + at, d, f, 1);
            for (int i = 0; i < f; i++) {
                const float h = first[i];
                first[i] = h / (1 + expf(-1.5957691216057308f * (h + 0.044715f * h * h * h)));
            }
            add_product(x, first, layer->feedforward.leave + at, f, d, gates[k]);
        }
    }
}

/* x (rows, D) in place; `starts` (rows), or NULL where every row sees the cache from its first key on. */
void mfext_decode_step(const Layer *layers, const Shape *shape, int32_t rows, int32_t position, const int32_t *starts,
                       float *x, float *scratch) {
    for (int row = 0; row < rows; row++)
        step(layers, shape, row, position, starts ? starts[row] : 0, x + (size_t)row * shape->d_model, scratch);
}
