/* Vectors of the processor that is there, and 16-bit types in them. */

#define _GNU_SOURCE /* processors of threads */
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
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
typedef uint16_t halves __attribute__((vector_size(16)));
typedef word words __attribute__((vector_size(32)));

INLINE long least(long a, long b) { return a < b ? a : b; }

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

typedef uint16_t vector_halves __attribute__((vector_size(2 * LANES)));

INLINE vector widen_vector(const enum type type, const uint16_t *from) {
    vector_halves narrow;
    memcpy(&narrow, from, sizeof narrow);
#if LANES == 16 && defined(__AVX512F__) /* compilers may do it in halves */
    if (type == BF16) return (vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)narrow), 16);
    return (vector)_mm512_cvtph_ps((__m256i)narrow);
#else
    if (type == BF16) return (vector)(__builtin_convertvector(narrow, vector_words) << 16);
#if LANES == 8 && defined(__F16C__)
    return (vector)_mm256_cvtph_ps((__m128i)narrow);
#endif
    vector wide = {0};
    EACH(i, LANES) wide[i] = widened(type, narrow[i]);
    return wide;
#endif
}

/* Values that are rounded to the type, in fp32. As in products of pairs, what is less than any normal number may become zero. */
INLINE vector round_vector(const enum type type, vector wide) {
#if HAS_PAIRS
    if (type == BF16) return (vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)wide)), 16);
#else
    if (type == BF16) {
        const vector_words bits = (vector_words)wide, none = (vector_words)(wide != wide);
        const vector_words nearest = bits + 0x7fff + (bits >> 16 & 1);
        return (vector)(((none & (bits | 0x400000)) | (~none & nearest)) & 0xffff0000);
    }
#endif
#if LANES == 16 && defined(__AVX512F__)
    return (vector)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)wide, _MM_FROUND_TO_NEAREST_INT));
#elif LANES == 8 && defined(__F16C__)
    return (vector)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)wide, _MM_FROUND_TO_NEAREST_INT));
#else
    EACH(i, LANES) wide[i] = rounded(type, wide[i]);
    return wide;
#endif
}

INLINE void narrow_vector(const enum type type, vector wide, uint16_t *to) {
    if (type == BF16) {
#if HAS_PAIRS
        const vector_halves narrow = (vector_halves)_mm512_cvtneps_pbh((__m512)wide);
#else
        const vector_halves narrow = __builtin_convertvector((vector_words)round_vector(type, wide) >> 16, vector_halves);
#endif
        memcpy(to, &narrow, sizeof narrow);
        return;
    }
#if LANES == 16 && defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)wide, _MM_FROUND_TO_NEAREST_INT));
#elif LANES == 8 && defined(__F16C__)
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)wide, _MM_FROUND_TO_NEAREST_INT));
#else
    EACH(i, LANES) to[i] = narrowed(type, wide[i]);
#endif
}

/* The same of half a vector. */
INLINE half_vector round_half(const enum type type, half_vector wide) {
#if HAS_PAIRS
    if (type == BF16) return (half_vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh((__m256)wide)), 16);
#endif
#if HALF == 8 && defined(__F16C__)
    if (type == FP16) return (half_vector)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)wide, _MM_FROUND_TO_NEAREST_INT));
#endif
    EACH(i, HALF) wide[i] = rounded(type, wide[i]);
    return wide;
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
