/* Feed-forwards of routed experts. */

/* Up to BLOCK_ROWS rows of one expert: numbers of rows of x and out, and the weight of each. */
typedef struct {
    const uint16_t *gate, *up, *down;
    const int64_t *rows;
    const float *weights;
    long count, gate_row, up_row, down_row;
    long inner_done, done; /* blocks of columns */
} piece;

/* x [tokens, hidden] by row, out [tokens, hidden] in fp32; inner: INNERS x BLOCK_ROWS x width words for what lies between a piece's
 * matmuls; locks: one for every block of columns of out, zero. */
typedef struct {
    const uint16_t *x;
    float *out;
    long x_row, out_row, hidden, width, count;
    piece *pieces;
    word *inner;
    char *locks;
    long next;
} job;

/* Calls for some rows of out, to be written: each is far from the one before. */
INLINE void claim(const int64_t *numbers, long rows, long columns, const float *out, long out_row) {
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < columns; c += 16) __builtin_prefetch(out + numbers[r] * out_row + c, 1);
}

/* What the first two matmuls leave, as the third's rows: silu(gate) * up, each rounded as PyTorch's ops round it. */
INLINE void activate(const enum type type, const float *gate, const float *up, long lanes, long columns, word *to) {
    for (long c = 0; c < columns; c += TERMS(type), to += lanes)
        for (long lane = 0; lane < lanes; lane += HALF) {
            half_words each[2] = {{0}};
            for (long t = 0; t < least(TERMS(type), columns - c); t++) { /* one, of the last of an odd number */
                half_vector g, u;
                memcpy(&g, gate + (c + t) * lanes + lane, sizeof g);
                memcpy(&u, up + (c + t) * lanes + lane, sizeof u);
                g = round_half(type, g);
                g /= 1 + exponentials(-greater(g, -87 - (half_vector){0}));
                each[t] = (half_words)round_half(type, round_half(type, g) * round_half(type, u));
            }
            if (IN_PAIRS(type)) each[0] = each[0] >> 16 | each[1];
            memcpy(to + lane, each, sizeof each[0]);
        }
}

/* out of every row += its weight times what stands in sums [columns, lanes], rounded. */
INLINE void scatter(const enum type type, const float *sums, long lanes, long rows, long columns, const int64_t *numbers,
                    const float *weights, float *out, long out_row) {
    long whole = 0; /* columns */
#if HALF == 8
    whole = columns / 8 * 8;
    for (long r = 0; r < rows; r += 8) {
        const long count = least(8, rows - r);
        half_vector weight = {0};
        for (long i = 0; i < count; i++) weight[i] = weights[r + i];
        claim(numbers + r + 8, least(8, rows - r - 8), columns, out, out_row);
        for (long c = 0; c < whole; c += 8) {
            half_vector v[8], u[8], to;
            EACH(i, 8) {
                memcpy(&v[i], sums + (c + i) * lanes + r, sizeof v[i]);
                v[i] = round_half(type, v[i]) * weight;
            }
            TURN(v, u)
            EACH(i, 8) {
                if (i < count) {
                    float *at = out + numbers[r + i] * out_row + c;
                    memcpy(&to, at, sizeof to);
                    to += v[i];
                    memcpy(at, &to, sizeof to);
                }
            }
        }
    }
#endif
    for (long r = 0; r < rows; r++)
        for (long c = whole; c < columns; c++) out[numbers[r] * out_row + c] += rounded(type, sums[c * lanes + r]) * weights[r];
}

/* Blocks are taken in such an order that what a block needs was taken long before: the first part of piece 0, then of each piece the first
 * part of the next one and its own second part. */
INLINE void feed_forward(const enum type type, job *of, float *scratch, long widest) {
    const room own = rooms(scratch, widest);
    const long firsts = (of->width + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS, seconds = (of->hidden + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    const long words_in = WORDS(type, of->hidden), words_inner = WORDS(type, of->width);
    long taken, packed = -1;
    while ((taken = __atomic_fetch_add(&of->next, 1, __ATOMIC_RELAXED)) < of->count * (firsts + seconds)) {
        long turn = taken - firsts, number = turn < 0 ? 0 : turn / (firsts + seconds), part = turn < 0 ? taken : turn % (firsts + seconds);
        int is_first = turn < 0 || (number < of->count - 1 && part < firsts);
        if (turn >= 0 && number < of->count - 1) {
            if (is_first) number++;
            else part -= firsts;
        }
        piece *p = of->pieces + number;
        const panels in = in_panels(p->count);
        word *inner = of->inner + number % INNERS * BLOCK_ROWS * words_inner;
        long c0 = part * BLOCK_COLUMNS, width = least(BLOCK_COLUMNS, (is_first ? of->width : of->hidden) - c0);
        if (is_first) {
            if (number >= INNERS) wait_for(&p[-INNERS].done, seconds);
            if (packed != number) pack_all(type, (selection){of->x, of->x_row, p->rows}, in, of->hidden, own.rows);
            packed = number;
            const struct { const uint16_t *at; long row; float *sums; } both[2] = {{p->gate, p->gate_row, own.sums}, {p->up, p->up_row, own.others}};
            for (int i = 0; i < 2; i++) {
                columns from = brought(type, (matrix){both[i].at + c0 * both[i].row, both[i].row, 1}, width, of->hidden, own);
                for (long q = 0; q < in.count; q++) {
                    long first = HALF * unit(in, q), units = unit(in, q + 1) - unit(in, q);
                    float *sums = both[i].sums + BLOCK_COLUMNS * first;
                    of_panel(type, units, own.rows + first * words_in, from.at, from.apart, width, words_in, sums);
                }
            }
            for (long q = 0; q < in.count; q++) {
                long first = HALF * unit(in, q), lanes = HALF * unit(in, q + 1) - first, at = BLOCK_COLUMNS * first;
                activate(type, own.sums + at, own.others + at, lanes, width, inner + first * words_inner + c0 / TERMS(type) * lanes);
            }
            __atomic_fetch_add(&p->inner_done, 1, __ATOMIC_RELEASE);
            continue;
        }
        wait_for(&p->inner_done, firsts);
        columns down = brought(type, (matrix){p->down + c0 * p->down_row, p->down_row, 1}, width, of->width, own);
        for (long q = 0; q < in.count; q++) {
            long first = HALF * unit(in, q), lanes = HALF * unit(in, q + 1) - first;
            claim(p->rows + first, least(8, p->count - first), width, of->out + c0, of->out_row);
            of_panel(type, lanes / HALF, inner + first * words_inner, down.at, down.apart, width, words_inner, own.sums);
            while (__atomic_test_and_set(of->locks + part, __ATOMIC_ACQUIRE)) sched_yield(); /* tokens have several experts */
            scatter(type, own.sums, lanes, least(lanes, p->count - first), width, p->rows + first, p->weights + first, of->out + c0,
                    of->out_row);
            __atomic_clear(of->locks + part, __ATOMIC_RELEASE);
        }
        __atomic_fetch_add(&p->done, 1, __ATOMIC_RELEASE);
    }
}

/* out += weight x expert(x) for all pieces, shared among the threads that call with the same job. widest: of hidden and width. */
void experts_bf16(job *of, float *scratch, long widest) { feed_forward(BF16, of, scratch, widest); }

void experts_fp16(job *of, float *scratch, long widest) { feed_forward(FP16, of, scratch, widest); }
