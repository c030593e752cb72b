/* Products of 16-bit matrices, for any number of rows without code of its own: sums are kept in fp32, and what comes out is rounded
 * once. Where a processor multiplies pairs of bf16, elements go into the cache as they are; else they are widened to fp32 on the way.
 *
 * out [m, n] = x [m, k] times the transpose of weight [n, k], plus bias [n]. Weights are read from memory once for BLOCK_ROWS rows:
 *     rows are brought in once, in blocks of BLOCK_DEPTH columns which stay in the second-level cache;
 *     COLUMNS rows of the weight at a time are brought into the first-level cache;
 *     a tile of TILE_ROWS x COLUMNS sums, one vector each over the depth, stays in registers.
 * A sum's terms are added in an order that depends on nothing but k, so a row's product is the same, to the bit, whatever rows are
 * multiplied beside it and however columns are shared among threads.
 *
 * Compiled where it runs, for the processor that is there. BLOCK_ROWS, BLOCK_DEPTH, BLOCK_COLUMNS, PADDING and
 * COLUMNS come with the command, from where the memory that they take is counted. */

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

#if defined(__AVX512F__) || defined(__aarch64__) /* which have 32 vector registers; others have 16 */
#define TILE_ROWS 6
#else
#define TILE_ROWS 3
#endif
_Static_assert(COLUMNS == 4 && BLOCK_COLUMNS % COLUMNS == 0, "four sums at a time are added up and kept");

#if defined(__AVX512BF16__) && LANES == 16
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

/* What follows knows the type when it is compiled: ``type`` is a constant wherever it is inlined. */
enum type { BF16, FP16 };

#define IN_PAIRS(type) (HAS_PAIRS && (type) == BF16)
#define ELEMENT(type) (IN_PAIRS(type) ? 2 : 4) /* bytes in the cache */
#define DEPTH(type) (4 * BLOCK_DEPTH / ELEMENT(type)) /* columns of a block, which takes as many bytes of either */
#define STRIDE (4 * (BLOCK_DEPTH + PADDING)) /* bytes: rows that lie a power of two apart would displace each other in the cache */

#ifndef IN_REGISTER /* or compilers read it from memory again for each of its uses */
#if defined(__aarch64__)
#define IN_REGISTER(v) __asm__("" : "+w"(v))
#elif defined(__x86_64__)
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define IN_REGISTER(v)
#endif
#endif

#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); i++)
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float four __attribute__((vector_size(16)));
typedef uint16_t halves __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(32)));

typedef struct {
    const uint16_t *at;
    long row, column; /* elements from one to the next */
} matrix;

INLINE long least(long a, long b) { return a < b ? a : b; }

/* The sum of each of four vectors. */
INLINE four sums_of(const vector *v) {
#if defined(__AVX512F__) && LANES == 16
#define FOLDED(a, b) (_mm512_unpacklo_ps((__m512)(a), (__m512)(b)) + _mm512_unpackhi_ps((__m512)(a), (__m512)(b)))
    __m512 ab = FOLDED(v[0], v[1]), cd = FOLDED(v[2], v[3]);
    __m512 all = (__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd) + (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    __m256 half = _mm512_castps512_ps256(all) + (__m256)_mm512_extractf64x4_pd((__m512d)all, 1);
    return (four)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
    four folded[4], part;
    EACH(i, 4) {
        memcpy(&folded[i], &v[i], sizeof part);
        EACH(j, LANES / 4 - 1) {
            memcpy(&part, (const float *)&v[i] + 4 * (j + 1), sizeof part);
            folded[i] += part;
        }
    }
#define PAIRS(a, b) (four){a[0], b[0], a[1], b[1]} + (four){a[2], b[2], a[3], b[3]}
    four p = PAIRS(folded[0], folded[1]), q = PAIRS(folded[2], folded[3]);
    return (four){p[0], p[1], q[0], q[1]} + (four){p[2], p[3], q[2], q[3]};
#endif
}

/* sum + x * w, of pairs of elements each lane's two products. */
INLINE vector added(const enum type type, vector sum, vector x, vector w) {
#if HAS_PAIRS
    if (type == BF16) return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#endif
    return sum + x * w;
}

/* sums [rows, COLUMNS] of products over so many bytes, added to what stands there unless they are the first. */
INLINE void tile(const enum type type, const int rows, const char *x, const char *weight, long nbytes, float *sums, int first) {
    vector sum[TILE_ROWS][COLUMNS];
    EACH(r, rows) EACH(c, COLUMNS) sum[r][c] = (vector){0};
    for (long i = 0; i < nbytes; i += sizeof(vector)) {
        vector xs[TILE_ROWS], w;
        EACH(r, rows) {
            memcpy(&xs[r], x + r * STRIDE + i, sizeof w);
            IN_REGISTER(xs[r]);
        }
        EACH(c, COLUMNS) {
            memcpy(&w, weight + c * STRIDE + i, sizeof w);
            IN_REGISTER(w);
            EACH(r, rows) sum[r][c] = added(type, sum[r][c], xs[r], w);
        }
    }
    EACH(r, rows) {
        four of_row = sums_of(sum[r]), before;
        if (!first) {
            memcpy(&before, sums + r * BLOCK_COLUMNS, sizeof before);
            of_row += before;
        }
        memcpy(sums + r * BLOCK_COLUMNS, &of_row, sizeof of_row);
    }
}

INLINE void tiles(const enum type type, const char *x, long rows, const char *weight, long nbytes, float *sums, int first) {
    for (; rows >= TILE_ROWS; rows -= TILE_ROWS, x += TILE_ROWS * STRIDE, sums += TILE_ROWS * BLOCK_COLUMNS)
        tile(type, TILE_ROWS, x, weight, nbytes, sums, first);
    switch (rows) {
    case 1: tile(type, 1, x, weight, nbytes, sums, first); break;
    case 2: tile(type, 2, x, weight, nbytes, sums, first); break;
#if TILE_ROWS > 3
    case 3: tile(type, 3, x, weight, nbytes, sums, first); break;
    case 4: tile(type, 4, x, weight, nbytes, sums, first); break;
    case 5: tile(type, 5, x, weight, nbytes, sums, first); break;
#endif
    }
}

INLINE float widened(const enum type type, uint16_t half) {
    float wide;
    if (type == BF16) {
        uint32_t bits = (uint32_t)half << 16;
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
        uint32_t bits;
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

INLINE void widen_eight(const enum type type, const uint16_t *from, float *to) {
    if (type == BF16) {
        halves eight;
        memcpy(&eight, from, sizeof eight);
        words wide = __builtin_convertvector(eight, words) << 16;
        memcpy(to, &wide, sizeof wide);
    } else {
#ifdef __F16C__
        _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)));
#else
        EACH(i, 8) to[i] = widened(type, from[i]);
#endif
    }
}

/* to [8, a block's depth] <- the transpose of eight rows of eight elements. */
INLINE void turn_eight(const enum type type, const uint16_t *from, long row, uint16_t *to) {
    halves v[8], u[8];
    EACH(i, 8) memcpy(&v[i], from + i * row, sizeof v[i]);
    for (int round = 0; round < 3; round++) { /* each deals the rows out like two halves of a pack of cards */
        EACH(i, 4) {
            halves a = v[i], b = v[i + 4];
            u[2 * i] = (halves){a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]};
            u[2 * i + 1] = (halves){a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
        }
        EACH(i, 8) v[i] = u[i];
    }
    EACH(i, 8) memcpy(to + i * DEPTH(type), &v[i], sizeof v[i]);
}

/* to [columns, a block's depth] <- a block of a weight whose columns, not rows, lie in one piece, as some families store theirs. */
INLINE void turn(const enum type type, matrix from, long columns, long depth, uint16_t *to) {
    long whole = from.row == 1 ? depth / 8 * 8 : 0;
    for (long i = 0; i < whole; i += 8) {
        long j = 0;
        for (; j + 8 <= columns; j += 8) turn_eight(type, from.at + i * from.column + j, from.column, to + j * DEPTH(type) + i);
        for (; j < columns; j++)
            for (long d = i; d < i + 8; d++) to[j * DEPTH(type) + d] = from.at[d * from.column + j];
    }
    for (long j = 0; j < columns; j++)
        for (long i = whole; i < depth; i++) to[j * DEPTH(type) + i] = from.at[j * from.row + i * from.column];
}

/* ``count`` elements into the cache, and zeros up to a whole vector. */
INLINE void bring(const enum type type, const uint16_t *from, long count, char *to) {
    long i = 0, nbytes = count * ELEMENT(type);
    if (IN_PAIRS(type)) {
        memcpy(to, from, nbytes);
    } else {
        float *wide = (float *)to;
        for (; i + 8 <= count; i += 8) widen_eight(type, from + i, wide + i);
        for (; i < count; i++) wide[i] = widened(type, from[i]);
    }
    if (nbytes % sizeof(vector)) memset(to + nbytes, 0, sizeof(vector) - nbytes % sizeof(vector));
}

/* COLUMNS rows of a weight that has so many left: zeros for those that are not there. */
INLINE void bring_columns(const enum type type, matrix from, long left, long depth, char *to) {
    for (long c = 0; c < COLUMNS; c++, to += STRIDE) {
        const uint16_t *row = from.at + c * from.row;
        if (c >= left) {
            memset(to, 0, STRIDE);
            continue;
        }
        for (long i = 0; i < depth; i += 32) __builtin_prefetch(row + COLUMNS * from.row + i, 0, 2); /* what comes next */
        bring(type, row, depth, to);
    }
}

INLINE void multiply(const enum type type, matrix x, matrix weight, const uint16_t *bias, uint16_t *out, long out_row,
                     long m, long n, long k, float *scratch) {
    float *sums = scratch + COLUMNS * STRIDE / sizeof *sums;
    uint16_t *turned = (uint16_t *)(sums + BLOCK_ROWS * BLOCK_COLUMNS);
    char *columns = (char *)scratch, *rows = (char *)(turned + BLOCK_COLUMNS * DEPTH(type)), *block;
    for (long m0 = 0; m0 < m; m0 += BLOCK_ROWS) {
        long height = least(BLOCK_ROWS, m - m0);
        block = rows;
        for (long k0 = 0; k0 < k; k0 += DEPTH(type), block += BLOCK_ROWS * STRIDE)
            for (long i = 0; i < height; i++)
                bring(type, x.at + (m0 + i) * x.row + k0, least(DEPTH(type), k - k0), block + i * STRIDE);
        for (long n0 = 0; n0 < n; n0 += BLOCK_COLUMNS) {
            long width = least(BLOCK_COLUMNS, n - n0);
            block = rows;
            for (long k0 = 0; k0 < k; k0 += DEPTH(type), block += BLOCK_ROWS * STRIDE) {
                long depth = least(DEPTH(type), k - k0);
                matrix part = {weight.at + n0 * weight.row + k0 * weight.column, weight.row, weight.column};
                if (weight.column != 1) {
                    turn(type, part, width, depth, turned);
                    part = (matrix){turned, DEPTH(type), 1};
                }
                for (long j = 0; j < width; j += COLUMNS, part.at += COLUMNS * part.row) {
                    bring_columns(type, part, width - j, depth, columns);
                    tiles(type, block, height, columns, depth * ELEMENT(type), sums + j, k0 == 0);
                }
            }
            for (long i = 0; i < height; i++)
                for (long j = 0; j < width; j++) {
                    float sum = sums[i * BLOCK_COLUMNS + j] + (bias ? widened(type, bias[n0 + j]) : 0);
                    out[(m0 + i) * out_row + n0 + j] = narrowed(type, sum);
                }
        }
    }
}

/* scratch: room for COLUMNS rows of a block of the weight, BLOCK_ROWS x BLOCK_COLUMNS sums, a block of BLOCK_COLUMNS rows of the weight
 * as it is, BLOCK_ROWS rows in whole blocks. */
void matmul_bf16(const uint16_t *x, long x_row, const uint16_t *weight, long weight_row, long weight_column,
                 const uint16_t *bias, uint16_t *out, long out_row, long m, long n, long k, float *scratch) {
    multiply(BF16, (matrix){x, x_row, 1}, (matrix){weight, weight_row, weight_column}, bias, out, out_row, m, n, k, scratch);
}

void matmul_fp16(const uint16_t *x, long x_row, const uint16_t *weight, long weight_row, long weight_column,
                 const uint16_t *bias, uint16_t *out, long out_row, long m, long n, long k, float *scratch) {
    multiply(FP16, (matrix){x, x_row, 1}, (matrix){weight, weight_row, weight_column}, bias, out, out_row, m, n, k, scratch);
}
