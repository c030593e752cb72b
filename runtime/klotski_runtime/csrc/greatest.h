/* The greatest of each row's products. */

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

/* As a product: of every row the greatest and its column, if it is better than what stands in ``greatest`` and ``where`` [threads, m], of
 * which each thread has a row. */
typedef struct {
    const uint16_t *x, *weight, *bias;
    float *greatest;
    int64_t *where;
    long x_row, weight_row, weight_column, m, n, k;
    long threads, next;
} search;

INLINE void find_greatest(const enum type type, search *of, float *scratch) {
    const long own = of->m * __atomic_fetch_add(&of->threads, 1, __ATOMIC_RELAXED);
    const matrix x = {of->x, of->x_row, 1}, weight = {of->weight, of->weight_row, of->weight_column};
    const result out = {.greatest = of->greatest + own, .where = of->where + own};
#if HAS_BYTES
    if (of->m >= SCREENED_LEAST && of->weight_column == 1 && of->k % 16 == 0 && 32 <= of->k && of->k <= 1 << 15) {
        screen(type, x, weight, of->bias, out, of->m, of->n, of->k, &of->next, scratch);
        return;
    }
#endif
    multiply(type, x, weight, of->bias, out, of->m, of->n, of->k, &of->next, scratch);
}

void greatest_bf16(search *of, float *scratch, long widest) { find_greatest(BF16, of, scratch); }

void greatest_fp16(search *of, float *scratch, long widest) { find_greatest(FP16, of, scratch); }
