/* What is computed of each row alone: norms by the root mean square, and rotary position embeddings; rounded as PyTorch's ops round it. */

#define SOME_ELEMENTS 16384 /* at least, that a thread takes at a time */

/* out [rows, width] <- weight times x over the root of its mean square and ``epsilon``. */
typedef struct {
    const uint16_t *x, *weight;
    uint16_t *out;
    long x_row, out_row, rows, width;
    double epsilon;
    long next;
} norms;

INLINE float total(vector of) {
    float each[LANES];
    memcpy(each, &of, sizeof each);
    for (int apart = LANES / 2; apart; apart /= 2) EACH(i, apart) each[i] += each[i + apart];
    return each[0];
}

INLINE float sum_of_squares(const enum type type, const uint16_t *x, long width) {
    vector sums[4] = {{0}};
    float sum = 0;
    long d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES)
        EACH(i, 4) {
            vector each = widen_vector(type, x + d + LANES * i);
            sums[i] += each * each;
        }
    for (; d < width; d++) sum += widened(type, x[d]) * widened(type, x[d]);
    return sum + total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

INLINE void normalize(const enum type type, norms *of) {
    const long some = SOME_ELEMENTS / of->width + 1;
    long first;
    while ((first = some * __atomic_fetch_add(&of->next, 1, __ATOMIC_RELAXED)) < of->rows)
        for (long r = first; r < least(first + some, of->rows); r++) {
            const uint16_t *x = of->x + r * of->x_row;
            uint16_t *out = of->out + r * of->out_row;
            const float scale = 1 / __builtin_sqrtf(sum_of_squares(type, x, of->width) / of->width + (float)of->epsilon);
            long d = 0;
            for (; d + LANES <= of->width; d += LANES) {
                vector scaled = round_vector(type, widen_vector(type, x + d) * scale);
                narrow_vector(type, scaled * widen_vector(type, of->weight + d), out + d);
            }
            for (; d < of->width; d++)
                out[d] = narrowed(type, rounded(type, widened(type, x[d]) * scale) * widened(type, of->weight[d]));
        }
}

void norm_bf16(norms *of, float *scratch, long widest) { normalize(BF16, of); }

void norm_fp16(norms *of, float *scratch, long widest) { normalize(FP16, of); }

/* out <- x [batch, heads, positions, width] times the cosine of its angle, plus x turned by a right angle, (-second half, first half), times
 * the sine; cosine and sine [batch, positions, width]; strides in elements. */
typedef struct {
    const uint16_t *x, *cosine, *sine;
    uint16_t *out;
    long x_batch, x_head, x_position, out_batch, out_head, out_position;
    long cosine_batch, cosine_position, sine_batch, sine_position;
    long batch, heads, positions, width, next;
} rotation;

INLINE void rotate_row(const enum type type, const uint16_t *x, const uint16_t *cosine, const uint16_t *sine, long width, uint16_t *out) {
    const long half = width / 2;
    long d = 0;
    for (; d + LANES <= half; d += LANES) {
        vector a = widen_vector(type, x + d), b = widen_vector(type, x + half + d);
        vector first = round_vector(type, a * widen_vector(type, cosine + d));
        vector second = round_vector(type, b * widen_vector(type, cosine + half + d));
        narrow_vector(type, first - round_vector(type, b * widen_vector(type, sine + d)), out + d);
        narrow_vector(type, second + round_vector(type, a * widen_vector(type, sine + half + d)), out + half + d);
    }
    for (; d < half; d++) {
        float a = widened(type, x[d]), b = widened(type, x[half + d]);
        float first = rounded(type, a * widened(type, cosine[d])), second = rounded(type, b * widened(type, cosine[half + d]));
        out[d] = narrowed(type, first - rounded(type, b * widened(type, sine[d])));
        out[half + d] = narrowed(type, second + rounded(type, a * widened(type, sine[half + d])));
    }
}

INLINE void rotate(const enum type type, rotation *of) {
    const long some = SOME_ELEMENTS / (of->heads * of->width) + 1, all = of->batch * of->positions;
    long first;
    while ((first = some * __atomic_fetch_add(&of->next, 1, __ATOMIC_RELAXED)) < all)
        for (long t = first; t < least(first + some, all); t++) {
            const long b = t / of->positions, p = t % of->positions;
            const uint16_t *x = of->x + b * of->x_batch + p * of->x_position;
            const uint16_t *cosine = of->cosine + b * of->cosine_batch + p * of->cosine_position;
            const uint16_t *sine = of->sine + b * of->sine_batch + p * of->sine_position;
            uint16_t *out = of->out + b * of->out_batch + p * of->out_position;
            for (long h = 0; h < of->heads; h++)
                rotate_row(type, x + h * of->x_head, cosine, sine, of->width, out + h * of->out_head);
        }
}

void rotate_bf16(rotation *of, float *scratch, long widest) { rotate(BF16, of); }

void rotate_fp16(rotation *of, float *scratch, long widest) { rotate(FP16, of); }
