/* Products, where they go, and who of several threads computes which. */

/* out <- what stands in sums [columns, lanes], plus bias. */
INLINE void put(const enum type type, const float *sums, long lanes, long rows, long columns, const uint16_t *bias, uint16_t *out,
                long out_row) {
    uint16_t each[BLOCK_COLUMNS * PANEL_ROWS];
    for (long c = 0; c < columns; c++) {
        float added = bias ? widened(type, bias[c]) : 0;
        for (long lane = 0; lane < lanes; lane++) each[c * lanes + lane] = narrowed(type, sums[c * lanes + lane] + added);
    }
    long r = 0;
#if HALF >= 8
    for (; r + 8 <= rows; r += 8) {
        long c = 0;
        for (; c + 8 <= columns; c += 8) {
            halves v[8], u[8];
            EACH(i, 8) memcpy(&v[i], each + (c + i) * lanes + r, sizeof v[i]);
            TURN(v, u)
            EACH(i, 8) memcpy(out + (r + i) * out_row + c, &v[i], sizeof v[i]);
        }
        for (; c < columns; c++)
            for (long i = r; i < r + 8; i++) out[i * out_row + c] = each[c * lanes + i];
    }
#endif
    for (; r < rows; r++)
        for (long c = 0; c < columns; c++) out[r * out_row + c] = each[c * lanes + r];
}

/* Where products go: to ``at``; or, of every row, the greatest to ``greatest`` and its column to ``where``, if it is better than what
 * stands there. */
typedef struct {
    uint16_t *at;
    long row;
    float *greatest;
    int64_t *where;
} result;

/* Greater, or no number, or as great and in an earlier column. */
INLINE int32_t better(float value, int32_t column, float best, int32_t where) {
    return (value > best) | (value != value) | ((value == best) & (column < where));
}

INLINE void put_greatest(const enum type type, const float *sums, long lanes, long rows, long columns, const uint16_t *bias, long first,
                         float *greatest, int64_t *where) {
    float best[PANEL_ROWS];
    int32_t column[PANEL_ROWS];
    for (long lane = 0; lane < lanes; lane++) {
        best[lane] = lane < rows ? greatest[lane] : 0;
        column[lane] = lane < rows ? (int32_t)where[lane] : 0;
    }
    for (long c = 0; c < columns; c++) {
        const float added = bias ? widened(type, bias[c]) : 0;
        const int32_t here = (int32_t)(first + c);
        for (long lane = 0; lane < lanes; lane++) {
            float value = rounded(type, sums[c * lanes + lane] + added);
            int32_t taken = better(value, here, best[lane], column[lane]);
            best[lane] = taken ? value : best[lane];
            column[lane] = taken ? here : column[lane];
        }
    }
    for (long lane = 0; lane < rows; lane++) greatest[lane] = best[lane], where[lane] = column[lane];
}

/* Of packed rows, from number m0 on, with ``width`` columns, from number n0 on. */
INLINE void multiply_block(const enum type type, panels in, long m0, matrix weight, long n0, long width, const uint16_t *bias, result out,
                           long k, room of) {
    columns from = brought(type, (matrix){weight.at + n0 * weight.row, weight.row, weight.column}, width, k, of);
    for (long q = 0; q < in.count; q++) {
        long units = unit(in, q + 1) - unit(in, q), first = HALF * unit(in, q), row = m0 + first;
        long rows = least(HALF * units, in.rows - first);
        const uint16_t *adds = bias ? bias + n0 : 0;
        of_panel(type, units, of.rows + first * WORDS(type, k), from.at, from.apart, width, WORDS(type, k), of.sums);
        if (out.at) put(type, of.sums, HALF * units, rows, width, adds, out.at + row * out.row + n0, out.row);
        else put_greatest(type, of.sums, HALF * units, rows, width, adds, n0, out.greatest + row, out.where + row);
    }
}

INLINE void multiply(const enum type type, matrix x, matrix weight, const uint16_t *bias, result out, long m, long n, long k, long *next,
                     float *scratch) {
    const room of = rooms(scratch, k);
    const long parts = (n + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS, blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS;
    long taken, packed = -1;
    while ((taken = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < blocks * parts) {
        long block = taken / parts, m0 = block * BLOCK_ROWS, n0 = taken % parts * BLOCK_COLUMNS, width = least(BLOCK_COLUMNS, n - n0);
        const panels in = in_panels(least(BLOCK_ROWS, m - m0));
        if (packed != block) pack_all(type, (selection){x.at + m0 * x.row, x.row, 0}, in, k, of.rows);
        packed = block;
        multiply_block(type, in, m0, weight, n0, width, bias, out, k, of);
    }
}

/* out [m, n] <- x [m, k] times the transpose of weight [n, k], plus bias [n] where there is one; then another. Strides in elements. */
typedef struct product {
    const uint16_t *x, *weight, *bias;
    uint16_t *out;
    long x_row, weight_row, weight_column, out_row, m, n, k;
    struct product *then;
    long next;
} product;

INLINE void multiply_all(const enum type type, product *of, float *scratch) {
    for (; of; of = of->then)
        multiply(type, (matrix){of->x, of->x_row, 1}, (matrix){of->weight, of->weight_row, of->weight_column}, of->bias,
                 (result){.at = of->out, .row = of->out_row}, of->m, of->n, of->k, &of->next, scratch);
}

void matmul_bf16(product *of, float *scratch, long widest) { multiply_all(BF16, of, scratch); }

void matmul_fp16(product *of, float *scratch, long widest) { multiply_all(FP16, of, scratch); }
