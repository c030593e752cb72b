/* Rows in panels, and sums of their products with a few columns. */

#if defined(__AVX512F__) || defined(__aarch64__) /* which have 32 vector registers; others have 16 */
#define VECTORS 4 /* of rows in a panel */
#define MANY 8    /* columns at a time, beside up to three of them */
#else
#define VECTORS 2
#define MANY 6
#endif
#define FEW 6
_Static_assert(VECTORS * LANES <= PANEL_ROWS && BLOCK_ROWS % (VECTORS * LANES) == 0, "blocks are of whole panels");
_Static_assert(BLOCK_ROWS >= 2 * PANEL_ROWS, "there is room for queries and what they mix");
_Static_assert(BLOCK_COLUMNS % MANY == 0 && BLOCK_COLUMNS % FEW == 0 && BLOCK_COLUMNS % 8 == 0, "blocks are of whole tiles");

typedef struct {
    const uint16_t *at;
    long row, column; /* elements from one to the next */
} matrix;

/* Rows of x, in the order of their numbers where they have some. */
typedef struct {
    const uint16_t *at;
    long row;
    const int64_t *numbers;
} selection;

/* Rows in panels: as many as make ``units`` halves of a vector, evenly shared among panels. */
typedef struct {
    long rows, units, count;
} panels;

/* What one thread needs for itself. */
typedef struct {
    float *sums, *others; /* of every panel of BLOCK_ROWS rows, [BLOCK_COLUMNS, its lanes] */
    word *rows, *columns; /* panels [BLOCK_ROWS, terms], and BLOCK_COLUMNS columns of a weight, in words */
    uint16_t *turned;     /* such columns as they are */
} room;

INLINE room rooms(float *scratch, long widest) {
    room of = {.sums = scratch};
    of.others = of.sums + BLOCK_COLUMNS * BLOCK_ROWS;
    of.rows = (word *)(of.others + BLOCK_COLUMNS * BLOCK_ROWS);
    of.columns = of.rows + BLOCK_ROWS * widest;
    of.turned = (uint16_t *)(of.columns + BLOCK_COLUMNS * widest);
    return of;
}

INLINE panels in_panels(long rows) {
    panels found = {.rows = rows, .units = (rows + HALF - 1) / HALF};
    found.count = (found.units + 2 * VECTORS - 1) / (2 * VECTORS);
    return found;
}

INLINE long unit(panels of, long number) { return of.units * number / of.count; } /* the first one of a panel */

/* Eight words of a row; one word of it, of which so many terms are there. */
INLINE words eight_words(const enum type type, const uint16_t *from) {
    if (!IN_PAIRS(type)) return widen_eight(type, from);
    words pairs;
    memcpy(&pairs, from, sizeof pairs);
    return pairs;
}

INLINE word one_word(const enum type type, const uint16_t *from, long terms) {
    if (IN_PAIRS(type)) return terms > 1 ? from[0] | (word)from[1] << 16 : from[0];
    float wide = widened(type, from[0]);
    word bits;
    memcpy(&bits, &wide, sizeof bits);
    return bits;
}

/* The transpose of eight vectors of eight: three rounds, each of which deals them out like two halves of a pack of cards. */
#define TURN(v, u)                                                                                     \
    for (int round = 0; round < 3; round++) {                                                          \
        EACH(i, 4) {                                                                                   \
            __typeof__(v[0]) a = v[i], b = v[i + 4];                                                   \
            u[2 * i] = (__typeof__(a)){a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]};                \
            u[2 * i + 1] = (__typeof__(a)){a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};            \
        }                                                                                              \
        EACH(i, 8) v[i] = u[i];                                                                        \
    }

/* to [columns, k] <- the columns of a weight whose columns, not rows, lie in one piece, as some families store theirs. */
INLINE void turn(matrix from, long columns, long k, uint16_t *to) {
    long whole = from.row == 1 ? k / 8 * 8 : 0;
    for (long i = 0; i < whole; i += 8) {
        long j = 0;
        for (; j + 8 <= columns; j += 8) {
            halves v[8], u[8];
            EACH(d, 8) memcpy(&v[d], from.at + (i + d) * from.column + j, sizeof v[d]);
            TURN(v, u)
            EACH(c, 8) memcpy(to + (j + c) * k + i, &v[c], sizeof v[c]);
        }
        for (; j < columns; j++)
            for (long d = i; d < i + 8; d++) to[j * k + d] = from.at[d * from.column + j];
    }
    for (long j = 0; j < columns; j++)
        for (long i = whole; i < k; i++) to[j * k + i] = from.at[j * from.row + i * from.column];
}

/* to [words of k, lanes] <- ``count`` rows, from number ``first`` on; zeros in lanes that have none. */
INLINE void pack(const enum type type, selection x, long first, long count, long lanes, long k, word *to) {
    const long terms = TERMS(type), whole = k / (8 * terms) * 8, all = WORDS(type, k);
    for (long lane = 0; lane < lanes; lane += HALF) {
        const uint16_t *from[HALF];
        EACH(i, HALF) {
            long number = first + lane + i;
            from[i] = lane + i < count ? x.at + (x.numbers ? x.numbers[number] : number) * x.row : 0;
        }
        long p = 0;
#if HALF == 8
        for (; p < whole; p += 8) {
            words v[8], u[8];
            EACH(i, 8) v[i] = from[i] ? eight_words(type, from[i] + terms * p) : (words){0};
            TURN(v, u)
            EACH(i, 8) memcpy(to + (p + i) * lanes + lane, &v[i], sizeof v[i]);
        }
#else
        for (; p < whole; p += 8)
            EACH(i, HALF) {
                words v = from[i] ? eight_words(type, from[i] + terms * p) : (words){0};
                EACH(j, 8) to[(p + j) * lanes + lane + i] = v[j];
            }
#endif
        for (; p < all; p++)
            EACH(i, HALF) to[p * lanes + lane + i] = from[i] ? one_word(type, from[i] + terms * p, k - terms * p) : 0;
    }
}

/* sum + x * w, of pairs of elements each lane's two products. */
INLINE vector added(const enum type type, vector sum, vector_words x, vector_words w) {
#if HAS_PAIRS
    if (type == BF16) return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#endif
#if HAS_BYTES
    if (type == BYTES) return (vector)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#endif
    return sum + (vector)x * (vector)w;
}

INLINE half_vector added_half(const enum type type, half_vector sum, half_words x, half_words w) {
#if HAS_PAIRS
    if (type == BF16) return (half_vector)_mm256_dpbf16_ps((__m256)sum, (__m256bh)x, (__m256bh)w);
#endif
#if HAS_BYTES
    if (type == BYTES) return (half_vector)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#endif
    return sum + (half_vector)x * (half_vector)w;
}

/* sums [columns, lanes] of a panel of ``vectors`` vectors and perhaps half of one; columns lie ``apart`` bytes from each other, and those
 * that come next are called for. */
INLINE void tile(const enum type type, const int vectors, const int has_half, const int columns, const word *x, const char *weight,
                 long apart, long count, float *sums) {
    const int lanes = LANES * vectors + HALF * has_half;
    vector sum[VECTORS][MANY];
    half_vector last[MANY];
    EACH(c, columns) {
        EACH(v, vectors) sum[v][c] = (vector){0};
        last[c] = (half_vector){0};
    }
    for (long begin = 0; begin < count; begin += 16) {
        EACH(c, columns) __builtin_prefetch(weight + (columns + c) * apart + 4 * begin, 0, 2);
        for (long p = begin, end = least(begin + 16, count); p < end; p++) {
            vector_words xs[VECTORS];
            half_words of_half = {0};
            EACH(v, vectors) {
                memcpy(&xs[v], x + p * lanes + LANES * v, sizeof xs[v]);
                IN_REGISTER(xs[v]);
            }
            if (has_half) {
                memcpy(&of_half, x + p * lanes + LANES * vectors, sizeof of_half);
                IN_REGISTER(of_half);
            }
            EACH(c, columns) {
                word w;
                memcpy(&w, weight + c * apart + 4 * p, sizeof w);
                vector_words ws = w - (vector_words){0};
                half_words half = w - (half_words){0};
                if (vectors) IN_REGISTER(ws);
                EACH(v, vectors) sum[v][c] = added(type, sum[v][c], xs[v], ws);
                if (has_half && vectors) memcpy(&half, &ws, sizeof half);
                if (has_half) last[c] = added_half(type, last[c], of_half, half);
            }
        }
    }
    EACH(c, columns) {
        EACH(v, vectors) memcpy(sums + c * lanes + LANES * v, &sum[v][c], sizeof sum[v][c]);
        if (has_half) memcpy(sums + c * lanes + LANES * vectors, &last[c], sizeof last[c]);
    }
}

INLINE void tiles(const enum type type, const int vectors, const int has_half, const word *x, const char *weight, long apart,
                  long columns, long count, float *sums) {
    const int lanes = LANES * vectors + HALF * has_half, many = 2 * vectors + has_half < 2 * VECTORS - 1 ? MANY : FEW;
    long c = 0;
    for (; c + many <= columns; c += many) tile(type, vectors, has_half, many, x, weight + c * apart, apart, count, sums + c * lanes);
    for (; c < columns; c++) tile(type, vectors, has_half, 1, x, weight + c * apart, apart, count, sums + c * lanes);
}

INLINE void any_tiles(const enum type type, long units, const word *x, const char *weight, long apart, long columns, long count,
                      float *sums) {
#define PANEL(vectors, half) \
    case 2 * (vectors) + (half): tiles(type, vectors, half, x, weight, apart, columns, count, sums); break;
    switch (units) {
        PANEL(0, 1) PANEL(1, 0) PANEL(1, 1) PANEL(2, 0)
#if VECTORS > 2
        PANEL(2, 1) PANEL(3, 0) PANEL(3, 1) PANEL(4, 0)
#endif
    }
}

/* Inlined in one place for each type: there is much of it. */
#define OF_PANEL(name, type)                                                                                                        \
    static __attribute__((noinline)) void name(long units, const word *x, const char *weight, long apart, long columns, long count, \
                                               float *sums) {                                                                       \
        any_tiles(type, units, x, weight, apart, columns, count, sums);                                                             \
    }
OF_PANEL(of_panel_bf16, BF16)
OF_PANEL(of_panel_fp16, FP16)
#if HAS_BYTES
OF_PANEL(of_panel_bytes, BYTES)
#else
#define of_panel_bytes of_panel_bf16 /* which is never asked for */
#endif

/* sums [columns, lanes] of a panel of so many halves of vectors. */
INLINE void of_panel(const enum type type, long units, const word *x, const char *weight, long apart, long columns, long count,
                     float *sums) {
    (type == BYTES ? of_panel_bytes : type == BF16 ? of_panel_bf16 : of_panel_fp16)(units, x, weight, apart, columns, count, sums);
}

typedef struct {
    const char *at;
    long apart; /* bytes from one column to the next */
} columns;

/* So many columns of a weight, in words: where they are if they lie so, or in ``of``. */
INLINE columns brought(const enum type type, matrix weight, long count, long k, room of) {
    if (weight.column != 1) {
        turn(weight, count, k, of.turned);
        weight = (matrix){of.turned, k, 1};
    }
    if (IN_PAIRS(type) && k % 2 == 0) return (columns){(const char *)weight.at, 2 * weight.row};
    const long terms = TERMS(type), all = WORDS(type, k), whole = k / (8 * terms) * 8;
    for (long c = 0; c < count; c++) {
        const uint16_t *from = weight.at + c * weight.row;
        word *to = of.columns + c * all;
        for (long d = 0; d < k; d += 32) __builtin_prefetch(from + BLOCK_COLUMNS * weight.row + d, 0, 2);
        long p = 0;
        for (; p < whole; p += 8) {
            words eight = eight_words(type, from + terms * p);
            memcpy(to + p, &eight, sizeof eight);
        }
        for (; p < all; p++) to[p] = one_word(type, from + terms * p, k - terms * p);
    }
    return (columns){(const char *)of.columns, 4 * all};
}

INLINE void pack_all(const enum type type, selection x, panels of, long k, word *to) {
    for (long q = 0; q < of.count; q++) {
        long first = HALF * unit(of, q), lanes = HALF * unit(of, q + 1) - first;
        pack(type, x, first, least(lanes, of.rows - first), lanes, k, to + first * WORDS(type, k));
    }
}
