/* Attention of keys and values. */

/* Queries in groups of ``heads / kv_heads`` that share keys and values; strides in elements. mask: for every sequence and query which
 * positions are seen. causal: of those, as many as there are up to its own, the last query's being the last. out [batch, queries, heads,
 * value_width]. */
typedef struct {
    const uint16_t *query, *key, *value;
    const uint8_t *mask;
    uint16_t *out;
    long query_batch, query_head, query_position, key_batch, key_head, key_position, value_batch, value_head, value_position;
    long mask_batch, mask_query;
    long batch, heads, queries, kv_heads, context, width, value_width, causal;
    double scaling;
    long next;
} attention;

/* Which positions lanes see: of those at ``mask``, a row for each of ``rows`` lanes or one for all (row 0), and none after ``last``, which is
 * one further in each lane. */
typedef struct {
    const uint8_t *mask;
    long row, rows, last;
} sight;

#define UNSEEN -1e30f /* the score of a position that is not seen: finite, so that differences of two are none */

/* Scores [positions, lanes] of half a vector of lanes <- e to them less the greatest so far, times ``scaling``; total of those so far. less:
 * what to multiply by that was computed with the greatest before. */
INLINE void share(float *scores, long lanes, long positions, sight seen, float scaling, float *greatest, float *total, float *less) {
    half_vector most, before, sum, factor, lane;
    EACH(i, HALF) lane[i] = i;
    memcpy(&before, greatest, sizeof before);
    memcpy(&sum, total, sizeof sum);
    most = before;
    for (long t = 0; t < positions; t++) {
        half_vector score;
        memcpy(&score, scores + t * lanes, sizeof score);
        score *= scaling;
        half_words shown = (half_words)(lane >= (float)(t - seen.last));
        if (seen.mask && !seen.row) shown &= seen.mask[t] ? ~(half_words){0} : (half_words){0};
        if (seen.mask && seen.row) EACH(i, HALF) shown[i] &= -(word)(seen.mask[least(i, seen.rows - 1) * seen.row + t] != 0);
        score = (half_vector)(((half_words)score & shown) | ((half_words)(UNSEEN - (half_vector){0}) & ~shown));
        memcpy(scores + t * lanes, &score, sizeof score);
        most = greater(score, most);
    }
    factor = exponentials(before - most);
    sum *= factor;
    for (long t = 0; t < positions; t++) {
        half_vector score;
        memcpy(&score, scores + t * lanes, sizeof score);
        score = exponentials(score - most);
        sum += score;
        memcpy(scores + t * lanes, &score, sizeof score);
    }
    memcpy(greatest, &most, sizeof most);
    memcpy(total, &sum, sizeof sum);
    memcpy(less, &factor, sizeof factor);
}

/* mixed [rows, row] += shares [positions, lanes] times values, of some rows and of so many vectors of columns. */
INLINE void mix_tile(const enum type type, const int rows, const int vectors, const float *shares, long lanes, const uint16_t *value,
                     long apart, long positions, float *mixed, long row) {
    vector sum[4][4];
    EACH(r, rows) EACH(v, vectors) memcpy(&sum[r][v], mixed + r * row + LANES * v, sizeof sum[r][v]);
    for (long t = 0; t < positions; t++) {
        vector wide[4];
        EACH(v, vectors) wide[v] = widen_vector(type, value + t * apart + LANES * v);
        EACH(r, rows) {
            vector share = shares[t * lanes + r] - (vector){0};
            EACH(v, vectors) sum[r][v] += share * wide[v];
        }
    }
    EACH(r, rows) EACH(v, vectors) memcpy(mixed + r * row + LANES * v, &sum[r][v], sizeof sum[r][v]);
}

INLINE void mix(const enum type type, long rows, const float *shares, long lanes, const uint16_t *value, long apart, long positions,
                long width, float *mixed) {
    for (long r = 0; r < rows; r += 4) {
        long c = 0;
#define MIX(n, vectors) mix_tile(type, n, vectors, shares + r, lanes, value + c, apart, positions, mixed + r * width + c, width)
        if (rows - r >= 4)
            for (; c + 4 * LANES <= width; c += 4 * LANES) MIX(4, 4);
        for (; c + LANES <= width; c += LANES) switch (least(4, rows - r)) {
            case 1: MIX(1, 1); break;
            case 2: MIX(2, 1); break;
            case 3: MIX(3, 1); break;
            default: MIX(4, 1);
            }
        for (; c < width; c++)
            for (long i = r; i < least(rows, r + 4); i++)
                for (long t = 0; t < positions; t++)
                    mixed[i * width + c] += shares[t * lanes + i] * widened(type, value[t * apart + c]);
    }
}

INLINE int sees_none(const uint8_t *mask, long row, long rows, long positions) {
    for (long r = 0; r < rows; r++)
        if (memchr(mask + r * row, 1, positions)) return 0;
    return 1;
}

/* Rows are the heads of a group where there is one query, else a head's queries. Positions are taken BLOCK_COLUMNS at a time: what they add
 * is scaled to the greatest score so far. */
INLINE void attend(const enum type type, attention *of, float *scratch, long widest) {
    const room own = rooms(scratch, widest);
    float *scores = own.sums, *mixed = (float *)(own.rows + PANEL_ROWS * widest), greatest[PANEL_ROWS], total[PANEL_ROWS];
    const long group = of->heads / of->kv_heads, words = WORDS(type, of->width), several = of->queries > 1, most = VECTORS * LANES;
    const long parts = several ? (of->queries + most - 1) / most : 1, rounds = several ? group : (group + most - 1) / most;
    const long row = several ? of->query_position : of->query_head, out_row = (several ? of->heads : 1) * of->value_width;
    long taken;
    while ((taken = __atomic_fetch_add(&of->next, 1, __ATOMIC_RELAXED)) < of->batch * of->kv_heads * parts) {
        const long b = taken / parts / of->kv_heads, h = taken / parts % of->kv_heads, first = taken % parts * most;
        const uint16_t *key = of->key + b * of->key_batch + h * of->key_head;
        const uint16_t *value = of->value + b * of->value_batch + h * of->value_head;
        const uint8_t *mask = of->mask ? of->mask + b * of->mask_batch + first * of->mask_query : 0;
        for (long round = 0; round < rounds; round++) {
            const long head = h * group + (several ? round : round * most);
            const long count = least(most, several ? of->queries - first : group - round * most);
            const long units = (count + HALF - 1) / HALF, lanes = HALF * units;
            const long last = of->causal ? of->context - of->queries + first : of->context; /* that the first row sees */
            const uint16_t *query = of->query + b * of->query_batch + head * of->query_head + first * of->query_position;
            pack(type, (selection){query, row, 0}, 0, count, lanes, of->width, own.rows);
            memset(mixed, 0, sizeof(float) * count * of->value_width);
            for (long lane = 0; lane < lanes; lane++) greatest[lane] = UNSEEN, total[lane] = 0;
            for (long t0 = 0; t0 < least(of->context, last + count); t0 += BLOCK_COLUMNS) {
                const long positions = least(BLOCK_COLUMNS, of->context - t0);
                if (mask && sees_none(mask + t0, of->mask_query, several ? count : 1, positions)) continue;
                const long from = t0 > last ? (t0 - last) / HALF * HALF : 0; /* rows before see none of these */
                columns keys = brought(type, (matrix){key + t0 * of->key_position, of->key_position, 1}, positions, of->width, own);
                of_panel(type, units, own.rows, keys.at, keys.apart, positions, words, scores);
                float less[PANEL_ROWS];
                for (long lane = from; lane < lanes; lane += HALF) {
                    sight seen = {.row = several ? of->mask_query : 0, .rows = count - lane, .last = last + lane - t0};
                    if (mask) seen.mask = mask + lane * seen.row + t0;
                    share(scores + lane, lanes, positions, seen, of->scaling, greatest + lane, total + lane, less + lane);
                }
                if (t0)
                    for (long i = from; i < count; i++)
                        for (long c = 0; c < of->value_width; c++) mixed[i * of->value_width + c] *= less[i];
                mix(type, count - from, scores + from, lanes, value + t0 * of->value_position, of->value_position, positions,
                    of->value_width, mixed + from * of->value_width);
            }
            uint16_t *out = of->out + ((b * of->queries + first) * of->heads + head) * of->value_width;
            for (long i = 0; i < count; i++)
                for (long c = 0; c < of->value_width; c++)
                    out[i * out_row + c] = total[i] ? narrowed(type, mixed[i * of->value_width + c] / total[i]) : 0;
        }
    }
}

/* Shared among the threads that call with the same one. widest: at least of width and value_width. */
void attend_bf16(attention *of, float *scratch, long widest) { attend(BF16, of, scratch, widest); }

void attend_fp16(attention *of, float *scratch, long widest) { attend(FP16, of, scratch, widest); }
