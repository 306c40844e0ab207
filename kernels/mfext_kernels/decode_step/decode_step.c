/* One new token of one or several sequences (rows) through a ModuleFormer, from ids to logits, float32.
 *
 * Matrices are row-major. Expert matrices (E, in, out) are applied as a weighted sum of their rows, linear layers
 * (out, in) as dot products. Rows that chose the same expert pass it together, four of its rows at a time, so each
 * weight comes from memory once however many rows want it; a row's sums have the same order whoever is beside it, so
 * its bits are those of the row alone. Generations grown on the model change norms, keys and values and add experts of
 * their own, times a gate, for the rows they are open on; the other rows keep their bits. Keys and values of the new
 * position are appended to the cache. */
#include "../exponential.h"
#include "../row_products.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#define KEYS 16                   /* passed at a time, from the newest on */
#define GREATEST_LOGIT 60.0f       /* exp(-60) of a stick is none of it */
#define LEAST_STICK 1.17549435e-38f /* what is left weighs less than the smallest normal number */

typedef struct {
    const float *norm_weight, *norm_bias;                    /* (D); of a generation: what is added to them, or NULL */
    const float *hidden_weight, *hidden_bias, *output_weight; /* router: (G, D), (G), (E, G) */
    const float *enter, *leave;                              /* experts: (E, D, W), (E, W, D) */
    int32_t num_experts, chosen, width;                      /* E, 0 of a generation without any here; K; W */
} Site;

typedef struct {
    const float *left, *right; /* W (A, D) = left (A, R) right (R, D); right NULL: left itself; left NULL: none */
    int32_t rank;
} Change;

enum { ATTENTION, FEEDFORWARD }; /* of a layer's sites */
enum { OF_KEYS, OF_VALUES };     /* of its projections */
/* What lies before the first layer and behind the last is described as a layer of one norm and no experts. */
enum { FINAL };                  /* its norm, before the head */
enum { EMBEDDING, HEAD };        /* its weights (V, D), and those a generation changes */

typedef struct {
    Site sites[2];
    Change changes[2];
} Grown;

typedef struct {
    Site sites[2];
    const float *weights[2], *biases[2]; /* of keys and values: (A, D), (A); NULL: they are x */
    float *cache[2];                     /* keys and values: (rows, H, capacity, C) */
    const Grown *grown;                  /* one a generation */
} Layer;

typedef struct {
    int32_t vocabulary, num_layers, num_generations, d_model, num_heads, d_head, d_router, capacity;
    int32_t widest, most_chosen; /* the greatest of all W, A and R; of all K */
    float eps;
} Shape;

/* One step: ids (rows); keys before a row's start are not seen (NULL: none are hidden); gates (generations, rows), in
 * [0, 1], or NULL where every generation is closed on every row. */
typedef struct {
    int32_t rows, position;
    const int64_t *ids;
    const int32_t *starts;
    const float *gates;
} Step;

/* Some rows of a matrix: number i is base + width * (numbers ? numbers[i] : i). */
typedef struct {
    float *base;
    int32_t width;
    const int32_t *numbers;
} Rows;

static float *pick(const Rows *rows, int i) { return rows->base + (size_t)rows->width * (rows->numbers ? rows->numbers[i] : i); }

/* y[i] (out) += scales[i] * x[i] (in) W (in, out) for each of `count` rows, four rows of W at a time; scales NULL: 1.
 * `next`: the matrix read after W, or NULL. */
CALLED void add_products(Rows y, Rows x, const float *w, const float *scales, int count, const float *next) {
    const int in = x.width, out = y.width;
    const float *end = w + (size_t)in * out;
    int row = 0;
    for (; row + 4 <= in; row += 4, w += 4 * (size_t)out) {
        const float *w1 = w + out, *w2 = w1 + out, *w3 = w2 + out;
        fetch_ahead(w, end, next, 4 * out);
        for (int n = 0; n < count; n++) {
            const float *from = pick(&x, n) + row, scale = scales ? scales[n] : 1;
            const float a = scale * from[0], b = scale * from[1], c = scale * from[2], d = scale * from[3];
            float *restrict to = pick(&y, n);
#pragma omp simd
            for (int i = 0; i < out; i++) to[i] += (a * w[i] + b * w1[i]) + (c * w2[i] + d * w3[i]);
        }
    }
    for (; row < in; row++, w += out)
        for (int n = 0; n < count; n++) {
            const float a = (scales ? scales[n] : 1) * pick(&x, n)[row];
            float *restrict to = pick(&y, n);
#pragma omp simd
            for (int i = 0; i < out; i++) to[i] += a * w[i];
        }
}

/* The gates of a generation, NULL where it is closed on every row. */
static const float *open_gates(const Step *step, int generation) {
    if (!step->gates) return NULL;
    const float *gates = step->gates + (size_t)generation * step->rows;
    for (int row = 0; row < step->rows; row++)
        if (gates[row] > 0) return gates;
    return NULL;
}

/* Layer norm of row `row` of x before site `which`, with the changes of every generation open on it. */
static void layer_norm(float *y, const float *x, const Layer *layer, int which, const Shape *shape, const Step *step,
                       int row) {
    const int n = shape->d_model;
    const Site *site = layer->sites + which;
    float mean = 0, variance = 0;
    x += (size_t)row * n, y += (size_t)row * n;
#pragma omp simd reduction(+ : mean)
    for (int i = 0; i < n; i++) mean += x[i];
    mean /= n;
#pragma omp simd reduction(+ : variance)
    for (int i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    const float scale = 1 / sqrtf(variance / n + shape->eps);
#pragma omp simd
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * site->norm_weight[i] + site->norm_bias[i];
    for (int number = 0; step->gates && number < shape->num_generations; number++) {
        const Site *change = layer->grown[number].sites + which;
        const float gate = step->gates[(size_t)number * step->rows + row];
        if (!(gate > 0) || !change->norm_weight) continue;
#pragma omp simd
        for (int i = 0; i < n; i++) y[i] += gate * ((x[i] - mean) * scale * change->norm_weight[i] + change->norm_bias[i]);
    }
}

/* The `chosen` largest of `probability` (E, overwritten), in falling order, the lower number first among equals. */
static void choose(int32_t *experts, float *gates, float *probability, int num_experts, int chosen) {
    float most = -INFINITY, sum = 0;
    for (int e = 0; e < num_experts; e++)
        if (probability[e] > most) most = probability[e];
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

/* Room for a step of `rows` rows, from the caller's scratch. */
typedef struct {
    float *x, *normed;                   /* the residual stream (rows, D), and as a norm left it */
    float *first, *second;               /* (rows, widest) */
    float *hidden, *probability;         /* (rows, G), (rows, E) */
    float *gates, *sorted_gates;         /* (rows, K): as chosen, and by expert */
    int32_t *experts, *sorted_rows;      /* (rows, K) */
    int32_t *begins;                     /* (E + 1): where each expert's rows begin in sorted_rows */
} Room;

/* Router of every row, then the picks of those with an open gate (NULL: all, at 1) sorted by expert, a row's place kept
 * among equals. */
static void route(const Room *room, const Site *site, const Shape *shape, int rows, const float *gates) {
    const int num_experts = site->num_experts, d_router = shape->d_router, chosen = site->chosen, picks = rows * chosen;
    linear(room->hidden, d_router, room->normed, site->hidden_weight, site->hidden_bias, rows, shape->d_model, d_router,
           site->output_weight);
    for (int i = 0; i < rows * d_router; i++) {
        const float h = room->hidden[i];
        room->hidden[i] = 0.5f * h * (1 + erff(h * 0.70710678118654752f));
    }
    linear(room->probability, num_experts, room->hidden, site->output_weight, NULL, rows, d_router, num_experts, NULL);
    memset(room->begins, 0, sizeof(int32_t) * (num_experts + 1));
    for (int row = 0; row < rows; row++) {
        const size_t at = (size_t)row * chosen;
        if (gates && !(gates[row] > 0)) {
            for (int k = 0; k < chosen; k++) room->experts[at + k] = -1;
            continue;
        }
        choose(room->experts + at, room->gates + at, room->probability + (size_t)row * num_experts, num_experts, chosen);
        for (int k = 0; k < chosen; k++) room->begins[room->experts[at + k]]++;
    }
    for (int e = 0, end = 0; e <= num_experts; e++) room->begins[e] = end += e < num_experts ? room->begins[e] : 0;
    for (int pick = picks - 1; pick >= 0; pick--) { /* from the last on: begins count down to where each begins */
        if (room->experts[pick] < 0) continue;
        const int to = --room->begins[room->experts[pick]], row = pick / chosen;
        room->sorted_rows[to] = row;
        room->sorted_gates[to] = gates ? gates[row] * room->gates[pick] : room->gates[pick];
    }
}

/* o (C) of one query over keys start..position, from the newest: o = sum a_j v_j, a_j = s_j * (stick left). */
CALLED void attend(float *o, const float *q, const float *keys, const float *values, int position, int start, int width) {
    const float scale = 1 / sqrtf((float)width);
    float taken[KEYS], kept[KEYS], stick = 1;
    for (int end = position + 1; end > start && !(stick < LEAST_STICK); end -= KEYS) {
        const int first = end - KEYS > start ? end - KEYS : start, count = end - first;
        linear(taken, count, q, keys + (size_t)first * width, NULL, 1, width, count, NULL);
#pragma omp simd
        for (int i = 0; i < count; i++) {
            const float l = scale * taken[i], low = -fabsf(l);
            const float e = exponential(low < -GREATEST_LOGIT ? -GREATEST_LOGIT : low), larger = 1 / (1 + e), smaller = e * larger;
            taken[i] = l > 0 ? larger : smaller;
            kept[i] = l > 0 ? smaller : larger;
        }
        for (int i = count - 1; i >= 0; i--) {
            taken[i] *= stick;
            stick *= kept[i];
            stick = stick < LEAST_STICK ? 0 : stick;
        }
        add_products((Rows){o, width, NULL}, (Rows){taken, count, NULL}, values + (size_t)first * width, NULL, 1, NULL);
    }
}

/* y, from number `first` to before `last`, += gate * W x (D), by way of `between` (R). */
static void add_change(float *y, const float *x, const Change *change, float gate, float *between, int first, int last, int d) {
    const int in = change->right ? change->rank : d;
    if (change->right) {
        linear(between, in, x, change->right, NULL, 1, d, in, change->left);
        x = between;
    }
    for (int i = first; i < last; i++) y[i] += gate * dot(change->left + (size_t)i * in, x, in);
}

/* y (rows, out), from number `first` of each row to before `last`, = W x + b of the normed rows, with the changes of every
 * generation open on a row; W NULL: x itself. */
static void project(float *y, int out, int first, int last, const Layer *layer, int which, const float *normed, float *between,
                    const Shape *shape, const Step *step, const float *next) {
    const int d = shape->d_model, rows = step->rows;
    const float *weights = layer->weights[which], *biases = layer->biases[which];
    if (weights)
        linear(y + first, out, normed, weights + (size_t)first * d, biases ? biases + first : NULL, rows, d, last - first, next);
    for (int row = 0; !weights && row < rows; row++)
        memcpy(y + (size_t)row * out + first, normed + (size_t)row * d + first, sizeof(float) * (last - first));
    for (int number = 0; step->gates && number < shape->num_generations; number++) {
        const Change *change = layer->grown[number].changes + which;
        const float *gates = step->gates + (size_t)number * rows;
        for (int row = 0; change->left && row < rows; row++)
            if (gates[row] > 0)
                add_change(y + (size_t)row * out, normed + (size_t)row * d, change, gates[row], between, first, last, d);
    }
}

/* The new position's keys or values of every row, into the cache. */
static void append(const Layer *layer, int which, const Room *room, const Shape *shape, const Step *step) {
    const int wide = shape->num_heads * shape->d_head, rows = step->rows;
    const float *next = which == OF_KEYS ? layer->weights[OF_VALUES] : layer->sites[ATTENTION].hidden_weight;
    project(room->first, wide, 0, wide, layer, which, room->normed, room->second, shape, step, next);
    for (int row = 0; row < rows; row++)
        for (int h = 0; h < shape->num_heads; h++) {
            const size_t head = ((size_t)row * shape->num_heads + h) * shape->capacity + step->position;
            memcpy(layer->cache[which] + head * shape->d_head, room->first + (size_t)row * wide + h * shape->d_head,
                   sizeof(float) * shape->d_head);
        }
}

/* What every expert of a site adds to the rows that chose it. `layer` NULL: feed-forward; else attention over its cache.
 * `next`: the matrix read after them, or NULL. */
static void add_experts(const Room *room, const Site *site, const Shape *shape, const Layer *layer, const Step *step,
                        const float *next) {
    const int d = shape->d_model, heads = shape->num_heads, width = shape->d_head, wide = site->width;
    for (int e = 0; e < site->num_experts; e++) {
        const int begin = room->begins[e], count = room->begins[e + 1] - begin;
        if (!count) continue;
        const int32_t *numbers = room->sorted_rows + begin;
        const size_t matrix = (size_t)d * wide;
        const float *enter = site->enter + e * matrix, *leave = site->leave + e * matrix;
        int after = e + 1;
        while (after < site->num_experts && room->begins[after] == room->begins[after + 1]) after++;
        const Rows first = {room->first, wide, NULL}, second = {room->second, wide, NULL};
        memset(room->first, 0, sizeof(float) * count * wide);
        add_products(first, (Rows){room->normed, d, numbers}, enter, NULL, count, leave);
        if (layer) {
            memset(room->second, 0, sizeof(float) * count * wide);
            for (int n = 0; n < count; n++)
                for (int h = 0; h < heads; h++) {
                    const size_t head = ((size_t)numbers[n] * heads + h) * shape->capacity * width;
                    attend(pick(&second, n) + h * width, pick(&first, n) + h * width, layer->cache[OF_KEYS] + head,
                           layer->cache[OF_VALUES] + head, step->position, step->starts ? step->starts[numbers[n]] : 0, width);
                }
        } else {
#pragma omp simd
            for (int i = 0; i < count * wide; i++) {
                const float h = room->first[i], z = -1.5957691216057308f * (h + 0.044715f * h * h * h);
                const float low = z < -GREATEST_LOGIT ? -GREATEST_LOGIT : z;
                room->first[i] = h / (1 + exponential(low > GREATEST_LOGIT ? GREATEST_LOGIT : low));
            }
        }
        add_products((Rows){room->x, d, numbers}, layer ? second : first, leave, room->sorted_gates + begin, count,
                     after < site->num_experts ? site->enter + after * matrix : next);
    }
}

/* The first generation from `number` on that has experts at a site and is open on a row, or how many there are. */
static int next_open(const Layer *layer, int which, const Shape *shape, const Step *step, int number) {
    while (number < shape->num_generations && !(layer->grown[number].sites[which].num_experts && open_gates(step, number)))
        number++;
    return number;
}

/* The matrix read after a layer's last: the next layer's first. */
static const float *first_matrix(const Layer *layer) {
    return layer->weights[OF_KEYS] ? layer->weights[OF_KEYS] : layer->sites[ATTENTION].hidden_weight;
}

/* `next`: the matrix read after this site, or NULL. */
static void add_site(const Room *room, const Layer *layer, int which, const Shape *shape, const Step *step,
                     const float *next) {
    const Layer *cached = which == ATTENTION ? layer : NULL;
    for (int row = 0; row < step->rows; row++) layer_norm(room->normed, room->x, layer, which, shape, step, row);
    if (which == ATTENTION) {
        append(layer, OF_KEYS, room, shape, step);
        append(layer, OF_VALUES, room, shape, step);
    }
    for (int number = -1, after; number < shape->num_generations; number = after) { /* -1: the base, open on every row */
        const Site *site = number < 0 ? layer->sites + which : layer->grown[number].sites + which;
        after = next_open(layer, which, shape, step, number + 1);
        route(room, site, shape, step->rows, number < 0 ? NULL : open_gates(step, number));
        add_experts(room, site, shape, cached, step,
                    after < shape->num_generations ? layer->grown[after].sites[which].hidden_weight : next);
    }
}

/* x = the rows of the embedding; 1 where an id is outside the vocabulary, else 0. */
static int64_t embed(const Room *room, const Layer *ends, const Shape *shape, const Step *step) {
    const int d = shape->d_model;
    for (int row = 0; row < step->rows; row++) {
        const int64_t id = step->ids[row];
        if (id < 0 || id >= shape->vocabulary) return 1;
        float *x = room->x + (size_t)row * d;
        memcpy(x, ends->weights[EMBEDDING] + id * d, sizeof(float) * d);
        for (int number = 0; step->gates && number < shape->num_generations; number++) {
            const Change *change = ends->grown[number].changes + EMBEDDING;
            const float gate = step->gates[(size_t)number * step->rows + row];
            if (!(gate > 0) || !change->left) continue;
            if (change->right) {
                memcpy(room->first, change->left + id * change->rank, sizeof(float) * change->rank);
                add_products((Rows){x, d, NULL}, (Rows){room->first, change->rank, NULL}, change->right, &gate, 1, NULL);
            } else {
                const float *added = change->left + id * d;
                for (int i = 0; i < d; i++) x[i] += gate * added[i];
            }
        }
    }
    return 0;
}

/* What the head reads, to `normed` (rows, D). With E the most experts of a site, W `widest` and K the most chosen, `scratch`
 * holds rows * (D + 2 W + G + E + 2 K) floats, `numbers` 2 rows K + E + 1 integers. Returns 0, or 1, nothing done, where an
 * id is outside the vocabulary. */
int64_t mfext_decode_step(const Layer *layers, const Layer *ends, const Shape *shape, const Step *step, float *normed,
                          float *scratch, int32_t *numbers) {
    const size_t rows = step->rows, picks = rows * shape->most_chosen;
    Room room;
    room.normed = normed;
    room.x = scratch;
    room.first = room.x + rows * shape->d_model;
    room.second = room.first + rows * shape->widest;
    room.hidden = room.second + rows * shape->widest;
    room.gates = room.hidden + rows * shape->d_router;
    room.sorted_gates = room.gates + picks;
    room.probability = room.sorted_gates + picks;
    room.experts = numbers;
    room.sorted_rows = room.experts + picks;
    room.begins = room.sorted_rows + picks;
    if (embed(&room, ends, shape, step)) return 1;
    for (int number = 0; number < shape->num_layers; number++) {
        const Layer *layer = layers + number;
        const float *after = number + 1 < shape->num_layers ? first_matrix(layer + 1) : ends->weights[HEAD];
        add_site(&room, layer, ATTENTION, shape, step, layer->sites[FEEDFORWARD].hidden_weight);
        add_site(&room, layer, FEEDFORWARD, shape, step, after);
    }
    for (size_t row = 0; row < rows; row++) layer_norm(room.normed, room.x, ends, FINAL, shape, step, row);
    return 0;
}

/* Logits (rows, V), from number `first` of each row to before `last`, of what a step left in `normed`; `between`: W floats. */
void mfext_decode_head(const Layer *ends, const Shape *shape, const Step *step, float *logits, const float *normed,
                       float *between, int64_t first, int64_t last) {
    project(logits, shape->vocabulary, first, last, ends, HEAD, normed, between, shape, step, NULL);
}
