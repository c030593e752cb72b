/* Products of 16-bit matrices, the greatest of each row's, whole feed-forwards of routed experts, and attention, for any number of rows
 * without code of its own: sums are kept in fp32, and what comes out is rounded once. Where a processor multiplies pairs of bf16, elements
 * stay as they are; else they are widened to fp32.
 *
 * out [m, n] = x [m, k] times the transpose of weight [n, k], plus bias [n].
 *     Rows are packed in panels: a lane of a vector for each of them, one term (or pair of terms) of all of them after the other. They stay
 *     in the second-level cache, BLOCK_ROWS at a time, for which a weight is read from memory once.
 *     Weights need no packing: every term of a column is multiplied by a panel's rows at once, a few columns at a time, whose sums stay in
 *     registers over the whole depth.
 * A sum's terms are added one after the other, so a row's product is the same, to the bit, whatever rows are multiplied beside it.
 *
 * Threads that work together share a counter and take the next BLOCK_COLUMNS columns from it: who is held up takes fewer.
 *
 * Compiled where it runs, for the processor that is there. BLOCK_ROWS, BLOCK_COLUMNS, PANEL_ROWS and INNERS come with the command, from
 * where the memory that they take is counted. */

#include <sched.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef LANES /* floats in a vector register */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#define HALF (LANES / 2)

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

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && LANES == 16 && !defined(NO_PAIRS) /* tests ask for none */
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && LANES == 16 && !defined(NO_BYTES) /* likewise */
#define HAS_BYTES 1
#else
#define HAS_BYTES 0
#endif

/* What follows knows the type when it is compiled: ``type`` is a constant wherever it is inlined. BYTES: two of them in an element. */
enum type { BF16, FP16, BYTES };

#define IN_PAIRS(type) ((HAS_PAIRS && (type) == BF16) || (type) == BYTES)
#define TERMS(type) (IN_PAIRS(type) ? 2 : 1) /* of a sum in a word of four bytes */
#define WORDS(type, k) (((k) + TERMS(type) - 1) / TERMS(type))

#ifndef IN_REGISTER /* or compilers read it from memory again for each of its uses */
#if defined(__aarch64__)
#define IN_REGISTER(v) __asm__("" : "+w"(v))
#elif defined(__AVX512F__)
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#elif defined(__x86_64__)
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define IN_REGISTER(v)
#endif
#endif

#define EACH(i, count) _Pragma("GCC unroll 32") for (int i = 0; i < (count); i++)
#define INLINE static inline __attribute__((always_inline))

typedef uint32_t word; /* fp32, or a pair of bf16 */
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float half_vector __attribute__((vector_size(4 * HALF)));
typedef word vector_words __attribute__((vector_size(4 * LANES)));
typedef word half_words __attribute__((vector_size(4 * HALF)));
typedef float four __attribute__((vector_size(16)));
typedef uint16_t halves __attribute__((vector_size(16)));
typedef word words __attribute__((vector_size(32)));

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

INLINE long least(long a, long b) { return a < b ? a : b; }

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

INLINE float widened(const enum type type, uint16_t half) {
    float wide;
    if (type == BF16) {
        word bits = (word)half << 16;
        memcpy(&wide, &bits, sizeof wide);
    } else {
#ifdef __F16C__
        wide = _cvtsh_ss(half);
#else
        _Float16 value;
        memcpy(&value, &half, sizeof value);
        wide = value;
#endif
    }
    return wide;
}

INLINE uint16_t narrowed(const enum type type, float wide) { /* to the nearest, ties to even */
    if (type == BF16) {
        word bits;
        memcpy(&bits, &wide, sizeof bits);
        return wide != wide ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
#ifdef __F16C__
    return _cvtss_sh(wide, _MM_FROUND_TO_NEAREST_INT);
#else
    _Float16 value = wide;
    uint16_t half;
    memcpy(&half, &value, sizeof half);
    return half;
#endif
}

/* A value that is rounded to the type, in fp32. */
INLINE float rounded(const enum type type, float wide) { return widened(type, narrowed(type, wide)); }

INLINE words widen_eight(const enum type type, const uint16_t *from) {
    words wide;
    if (type == BF16) {
        halves eight;
        memcpy(&eight, from, sizeof eight);
        wide = __builtin_convertvector(eight, words) << 16;
    } else {
#ifdef __F16C__
        wide = (words)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
        float each[8];
        EACH(i, 8) each[i] = widened(type, from[i]);
        memcpy(&wide, each, sizeof wide);
#endif
    }
    return wide;
}

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

#if HAS_BYTES
/* Most products need not be known to find the greatest. Rows and columns are rounded to bytes, whose products take half as long or less.
 * With x' and w' for what the bytes of x and w stand for,
 *     x w  =  x' w' + x (w - w') + (x - x') w'  <=  x' w' + |x| |w - w'| + |x - x'| |w'|
 * by Cauchy and Schwarz, and only where that is as much as the greatest product so far, the product is computed. */

#define SCREENED_LEAST 64              /* rows, for fewer of which columns take longer to round than it saves */
#define SCREENED_ROWS (4 * BLOCK_ROWS) /* at a time: bytes of them take no more room than a block of rows */
#define NEEDED 10                      /* one in so many products that are computed after all costs what it saves */
#define AT_FIRST 32                    /* of a row, before any of its products is great */
_Static_assert(5 * SCREENED_ROWS <= BLOCK_COLUMNS * BLOCK_ROWS, "there is room for what is known of rows");

/* What is known of terms, each of which is ``scale`` times a byte: the sum of bytes, and the norms of terms, and of what bytes lose. */
typedef struct {
    float scale, size, lost;
    int32_t sum;
} coded;

/* The same of rows, the sum times what is added to bytes of columns; and ``enough``, which a sum must reach to be the greatest. */
typedef struct {
    float *scale, *size, *lost, *enough;
    int32_t *sum;
} screened;

INLINE __m512 sixteen(const enum type type, const uint16_t *from) {
    const __m256i each = _mm256_loadu_si256((const __m256i *)from);
    return type == BF16 ? (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(each), 16) : _mm512_cvtph_ps(each);
}

INLINE float norm(__m512 squares, long k) {
    const float hidden = k * 1e-36f; /* of terms whose squares are too small for fp32 */
    return 1.0001f * _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(_mm512_reduce_add_ps(squares) + hidden)));
}

/* to [k] <- terms as bytes, plus ``zero``. */
INLINE coded code(const enum type type, const uint16_t *from, long k, uint8_t zero, uint8_t *to) {
    __m512 most = _mm512_setzero_ps(), squares = most, lost = most;
    __m512i sum = _mm512_setzero_si512();
    for (long d = 0; d < k; d += 16) most = _mm512_max_ps(most, _mm512_abs_ps(sixteen(type, from + d)));
    coded of = {.scale = _mm512_reduce_max_ps(most) / 127};
    const __m512 scale = _mm512_set1_ps(of.scale), per = _mm512_set1_ps(of.scale > 1e-30f ? 1 / of.scale : 0);
    for (long d = 0; d < k; d += 16) {
        const __m512 terms = sixteen(type, from + d);
        const __m512i bytes = _mm512_cvtps_epi32(_mm512_mul_ps(terms, per));
        const __m512 left = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(bytes), scale, terms);
        squares = _mm512_fmadd_ps(terms, terms, squares);
        lost = _mm512_fmadd_ps(left, left, lost);
        sum = _mm512_add_epi32(sum, bytes);
        _mm_storeu_si128((__m128i *)(to + d), _mm_add_epi8(_mm512_cvtepi32_epi8(bytes), _mm_set1_epi8((char)zero)));
    }
    of.size = norm(squares, k), of.lost = norm(lost, k), of.sum = _mm512_reduce_add_epi32(sum);
    return of;
}

/* What sums must reach to be rounded to ``best`` at least. */
INLINE float reaching(const enum type type, float best) {
    return best - (best < 0 ? -best : best) / (type == BF16 ? 256 : 2048) - 1e-37f;
}

/* What adding in fp32 may add to a product of vectors of length 1. */
INLINE float rounding(long k) { return (k + 8) * 1.2e-7f; }

/* The sum of one row's products with one column, in order, as in a tile. */
INLINE float in_order(const enum type type, const uint16_t *x, const uint16_t *w, long k) {
    const long terms = TERMS(type);
    half_vector sum = {0};
    for (long d = 0; d < k; d += terms)
        sum = added_half(type, sum, one_word(type, x + d, k - d) - (half_words){0}, one_word(type, w + d, k - d) - (half_words){0});
    return sum[0];
}

/* The same, but for rounding, sixteen at a time. */
INLINE float at_once(const enum type type, const uint16_t *x, const uint16_t *w, long k) {
    __m512 sum = _mm512_setzero_ps(), other = sum;
    for (long d = 0; d < k; d += 32) {
#if HAS_PAIRS
        if (type == BF16 && d + 32 <= k) {
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(x + d), (__m512bh)_mm512_loadu_si512(w + d));
            continue;
        }
#endif
        sum = _mm512_fmadd_ps(sixteen(type, x + d), sixteen(type, w + d), sum);
        if (d + 32 <= k) other = _mm512_fmadd_ps(sixteen(type, x + d + 16), sixteen(type, w + d + 16), other);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
}

/* packed <- bytes of so many rows from number m0 on; of <- what is known of them. */
INLINE void screen_rows(const enum type type, matrix x, long m0, panels in, const float *greatest, long k, uint8_t *turned, word *packed,
                        screened of) {
    for (long q = 0; q < in.count; q++) {
        const long begin = HALF * unit(in, q), end = HALF * unit(in, q + 1);
        for (long r = begin; r < end; r++) {
            coded row = {0}; /* so are lanes that have none */
            if (r < in.rows) row = code(type, x.at + (m0 + r) * x.row, k, 0, turned + (r - begin) * k);
            of.scale[r] = row.scale, of.size[r] = row.size, of.lost[r] = row.lost, of.sum[r] = 128 * row.sum;
            of.enough[r] = r < in.rows ? reaching(type, greatest[m0 + r]) : 3e38f;
        }
        selection bytes = {(uint16_t *)turned, k / 2, 0};
        pack(BYTES, bytes, 0, least(end, in.rows) - begin, end - begin, k / 2, packed + begin * k / 4);
    }
}

/* sums [lanes] of one column, which are replaced by what its products are at most -> whether one of them may be the greatest of its row. */
INLINE int bound(float *sums, long lanes, screened of, long first, coded column, long k, float bias) {
    const float lost = column.lost + column.size * rounding(k), size = column.size + column.lost;
    const float added = bias + (bias < 0 ? -bias : bias) * 1e-6f; /* that may be rounded, too */
    int32_t reached = 0;
    for (long lane = 0; lane < lanes; lane++) {
        const long r = first + lane;
        int32_t sum;
        memcpy(&sum, sums + lane, sizeof sum);
        sums[lane] = (float)(sum - of.sum[r]) * (of.scale[r] * column.scale) + of.size[r] * lost + of.lost[r] * size + added;
        reached |= !(sums[lane] < of.enough[r]);
    }
    return reached;
}

/* Computes one column's products that may be the greatest of their rows -> how many. */
INLINE long settle(const enum type type, const float *most, long lanes, screened of, long first, matrix x, const uint16_t *column,
                   coded known, long k, float added, int32_t number, float *greatest, int64_t *where) {
    long needed = 0;
    for (long lane = 0; lane < lanes; lane++) {
        const long r = first + lane;
        if (most[lane] < of.enough[r]) continue;
        needed++;
        const float about = at_once(type, x.at + r * x.row, column, k) + added;
        if (about + 2 * rounding(k) * of.size[r] * known.size < of.enough[r]) continue;
        const float value = rounded(type, in_order(type, x.at + r * x.row, column, k) + added);
        if (!better(value, number, greatest[r], (int32_t)where[r])) continue;
        greatest[r] = value, where[r] = number, of.enough[r] = reaching(type, value);
    }
    return needed;
}

INLINE void screen(const enum type type, matrix x, matrix weight, const uint16_t *bias, result out, long m, long n, long k, long *next,
                   float *scratch) {
    const room of = rooms(scratch, k);
    const long parts = (n + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS, blocks = (m + SCREENED_ROWS - 1) / SCREENED_ROWS;
    float *each = of.others;
    const screened rows = {each, each + SCREENED_ROWS, each + 2 * SCREENED_ROWS, each + 3 * SCREENED_ROWS,
                           (int32_t *)(each + 4 * SCREENED_ROWS)};
    uint8_t *bytes = (uint8_t *)of.columns;
    long taken, packed = -1, tried = 0, needed = 0;
    while ((taken = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < blocks * parts) {
        const long block = taken / parts, m0 = block * SCREENED_ROWS, n0 = taken % parts * BLOCK_COLUMNS;
        const long count = least(SCREENED_ROWS, m - m0), width = least(BLOCK_COLUMNS, n - n0);
        if (NEEDED * needed > tried + NEEDED * AT_FIRST * m) {
            for (long r = 0; r < count; r += BLOCK_ROWS) {
                const panels in = in_panels(least(BLOCK_ROWS, count - r));
                pack_all(type, (selection){x.at + (m0 + r) * x.row, x.row, 0}, in, k, of.rows);
                multiply_block(type, in, m0 + r, weight, n0, width, bias, out, k, of);
            }
            continue;
        }
        const panels in = in_panels(count);
        if (packed != block) screen_rows(type, x, m0, in, out.greatest, k, (uint8_t *)of.turned, of.rows, rows);
        packed = block;
        coded known[BLOCK_COLUMNS];
        for (long c = 0; c < width; c++) {
            const uint16_t *column = weight.at + (n0 + c) * weight.row;
            for (long d = 0; d < k; d += 32) __builtin_prefetch(column + BLOCK_COLUMNS * weight.row + d, 0, 2);
            known[c] = code(type, column, k, 128, bytes + c * k);
        }
        for (long q = 0; q < in.count; q++) {
            const long units = unit(in, q + 1) - unit(in, q), first = HALF * unit(in, q), lanes = HALF * units;
            of_panel(BYTES, units, of.rows + first * k / 4, (char *)bytes, k, width, k / 4, of.sums);
            for (long c = 0; c < width; c++) {
                const uint16_t *column = weight.at + (n0 + c) * weight.row;
                const float added = bias ? widened(type, bias[n0 + c]) : 0;
                float *sums = of.sums + c * lanes;
                if (bound(sums, lanes, rows, first, known[c], k, added))
                    needed += settle(type, sums, least(lanes, count - first), rows, first, (matrix){x.at + m0 * x.row, x.row, 1}, column,
                                     known[c], k, added, (int32_t)(n0 + c), out.greatest + m0, out.where + m0);
            }
            tried += lanes * width;
        }
    }
}
#endif

INLINE void find_greatest(const enum type type, matrix x, matrix weight, const uint16_t *bias, result out, long m, long n, long k,
                          long *next, float *scratch) {
#if HAS_BYTES
    if (m >= SCREENED_LEAST && weight.column == 1 && k % 16 == 0 && 32 <= k && k <= 1 << 15) {
        screen(type, x, weight, bias, out, m, n, k, next, scratch);
        return;
    }
#endif
    multiply(type, x, weight, bias, out, m, n, k, next, scratch);
}

/* next: zero, where threads that call with the same one share the work. scratch: room for ``rooms``. */
#define MATMULS(name, type)                                                                                                           \
    void matmul_##name(const uint16_t *x, long x_row, const uint16_t *weight, long weight_row, long weight_column,                    \
                       const uint16_t *bias, uint16_t *out, long out_row, long m, long n, long k, long *next, float *scratch) {       \
        multiply(type, (matrix){x, x_row, 1}, (matrix){weight, weight_row, weight_column}, bias, (result){.at = out, .row = out_row}, \
                 m, n, k, next, scratch);                                                                                             \
    }                                                                                                                                 \
    void greatest_##name(const uint16_t *x, long x_row, const uint16_t *weight, long weight_row, long weight_column,                  \
                         const uint16_t *bias, float *greatest, int64_t *where, long m, long n, long k, long *next, float *scratch) { \
        find_greatest(type, (matrix){x, x_row, 1}, (matrix){weight, weight_row, weight_column}, bias,                                 \
                      (result){.greatest = greatest, .where = where}, m, n, k, next, scratch);                                        \
    }
MATMULS(bf16, BF16)
MATMULS(fp16, FP16)

/* ------------------------------------------------------------------------------------------------- experts */

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

INLINE void wait_for(const long *counter, long value) {
    for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value;)
        if (++spins > 1000) sched_yield();
}

INLINE half_vector greater(half_vector a, half_vector b) {
    half_words first = (half_words)(a > b);
    return (half_vector)(((half_words)a & first) | ((half_words)b & ~first));
}

/* e to the x: 2^n times a polynomial, within two units in the last place; x is at most 88. */
INLINE half_vector exponentials(half_vector x) {
    const half_vector shift = 12582912 - (half_vector){0}; /* rounds to a whole number */
    x = greater(x, -87 - (half_vector){0});
    half_vector shifted = x * 1.44269504f + shift, n = shifted - shift, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    half_vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    return (half_vector)((half_words)p + ((half_words)shifted << 23));
}

/* What the first two matmuls leave, as the third's rows: silu(gate) * up, each rounded as PyTorch's ops round it. */
INLINE void activate(const enum type type, const float *gate, const float *up, long lanes, long columns, word *to) {
    uint16_t each[2][PANEL_ROWS];
    for (long c = 0; c < columns; c += TERMS(type), to += lanes) {
        for (long t = 0; t < TERMS(type); t++) {
            if (c + t >= columns) { /* the last of an odd number */
                memset(each[t], 0, sizeof each[t]);
                break;
            }
            const float *g = gate + (c + t) * lanes, *u = up + (c + t) * lanes;
            float silu[PANEL_ROWS];
            for (long lane = 0; lane < lanes; lane++) silu[lane] = rounded(type, g[lane]);
            for (long lane = 0; lane < lanes; lane += HALF) {
                half_vector x;
                memcpy(&x, silu + lane, sizeof x);
                x /= 1 + exponentials(-greater(x, -87 - (half_vector){0}));
                memcpy(silu + lane, &x, sizeof x);
            }
            for (long lane = 0; lane < lanes; lane++) each[t][lane] = narrowed(type, rounded(type, silu[lane]) * rounded(type, u[lane]));
        }
        for (long lane = 0; lane < lanes; lane++) {
            float wide = widened(type, each[0][lane]);
            if (IN_PAIRS(type)) to[lane] = each[0][lane] | (word)each[1][lane] << 16;
            else memcpy(to + lane, &wide, sizeof wide);
        }
    }
}

/* out of every row += its weight times what stands in sums [columns, lanes], rounded. */
INLINE void scatter(const enum type type, float *sums, long lanes, long rows, long columns, const int64_t *numbers, const float *weights,
                    float *out, long out_row) {
    for (long c = 0; c < columns; c++)
        for (long r = 0; r < rows; r++) sums[c * lanes + r] = rounded(type, sums[c * lanes + r]) * weights[r];
    long r = 0;
    for (; r + 4 <= rows; r += 4) {
        long c = 0;
        for (; c + 4 <= columns; c += 4) {
            four v[4], to;
            EACH(i, 4) memcpy(&v[i], sums + (c + i) * lanes + r, sizeof v[i]);
            EACH(i, 4) {
                float *at = out + numbers[r + i] * out_row + c;
                memcpy(&to, at, sizeof to);
                to += (four){v[0][i], v[1][i], v[2][i], v[3][i]};
                memcpy(at, &to, sizeof to);
            }
        }
        for (; c < columns; c++)
            EACH(i, 4) out[numbers[r + i] * out_row + c] += sums[c * lanes + r + i];
    }
    for (; r < rows; r++)
        for (long c = 0; c < columns; c++) out[numbers[r] * out_row + c] += sums[c * lanes + r];
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

/* --------------------------------------------------------------------------------------------- attention */

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

typedef uint16_t vector_halves __attribute__((vector_size(2 * LANES)));

INLINE vector widen_vector(const enum type type, const uint16_t *from) {
    vector wide;
    if (type == BF16) {
        vector_halves narrow;
        memcpy(&narrow, from, sizeof narrow);
        wide = (vector)(__builtin_convertvector(narrow, vector_words) << 16);
    } else
        EACH(i, LANES) wide[i] = widened(type, from[i]);
    return wide;
}

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
