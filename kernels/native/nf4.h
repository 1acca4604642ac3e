/* What the files of this folder share: a packed weight, and how a block's scale is read from it. */
#ifndef MINIPEFT_NF4_H
#define MINIPEFT_NF4_H

#include <stdint.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MINIPEFT_X86 1
#include <immintrin.h>
/* Functions are compiled for instructions that this machine may lack, and called only where `best_level` found them. */
#define TARGET_AVX2 __attribute__((target("avx2")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")))
#endif

#define INLINE static inline __attribute__((always_inline))

enum { SCALAR = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3 };
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* W, rows x columns in row-major order, as the Python side holds it. */
typedef struct {
    const uint8_t *codes;   /* two weights a byte, the earlier one in the high half */
    const void *absmax;     /* a scale a block: float, or uint8_t when doubly quantized */
    const float *levels;    /* 16 */
    const float *nested;    /* a scale for nested_blocksize blocks; NULL unless doubly quantized */
    const float *map;       /* 256 */
    const float *offset;    /* 1 */
    int64_t rows, columns, blocksize, nested_blocksize;
} Weight;

/* The scale of a block: map[code] * nested + offset. -ffp-contract=off keeps the two roundings apart. */
INLINE float scale_of(const Weight *w, int64_t block) {
    if (!w->nested)
        return ((const float *)w->absmax)[block];
    int64_t size = w->nested_blocksize;
    /* 256 is what everybody writes, and a division takes longer than all the rest. */
    float nested = w->nested[size == 256 ? block >> 8 : block / size];
    float product = w->map[((const uint8_t *)w->absmax)[block]] * nested;
    return product + *w->offset;
}

/* A float rounded to nearest even, as bits; a NaN stays one. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/* decode.c: elements first..last-1 of w's row-major order into `out`, which begins with element first. */
void decode(const Weight *w, int64_t first, int64_t last, void *out, int dtype, int level);

#ifdef MINIPEFT_X86
/* product.c: columns 64 strip .. of out = a W^T (backward 0) or a W (backward 1), for rows m0..m1-1 of a. */
typedef struct {
    const Weight *w;
    const void *a;      /* (M, K) or, backward, (M, N) */
    void *out;          /* (M, N) or, backward, (M, K) */
    int backward, out_dtype;
} Product;

#define STRIP 64
#define MAX_ROWS 264
void strip_float32(const Product *p, int64_t strip, int64_t m0, int64_t m1);
void strip_bfloat16(const Product *p, int64_t strip, int64_t m0, int64_t m1);
/* thin.c: out = x W^T + s (x A^T) B^T for up to THIN_ROWS rows of x. First `thin_start`, then `thin_low` for each row of
 * A, then `thin_strip` for each THIN_STRIP rows of W. */
typedef struct {
    const Weight *w;
    const void *x;       /* (rows, K), of `dtype` */
    void *out;           /* (rows, N) */
    int64_t rows, padded; /* padded: K, up to whole registers of codes */
    int dtype, out_dtype;
    const float *lora_A, *lora_B; /* (rank, K) and (N, rank); rank 0 without an update */
    int64_t rank;
    float scaling;
    char *spread;        /* scratch for (rows, padded) of `dtype` */
    float *low;          /* and for (rows, rank): s x A^T */
} Thin;

#define THIN_ROWS 4
#define THIN_STRIP 64
void thin_start(const Thin *t);
void thin_low(const Thin *t, int64_t j);
int64_t thin_scales(const Weight *w); /* numbers in the scratch that each thread needs for `thin_strip` */
void thin_strip(const Thin *t, int64_t strip, float *scales);

/* A bfloat16 product forward multiplies by the levels times this, rounded, and its sums by the inverse. The roundings of
 * NF4's levels as they are add up where x has one sign, to 1.8e-4 a weight (of weights from a normal distribution;
 * 1.4e-4 to 1.7e-4 of a model's): seven times the error of W rounded weight by weight, in 4096 columns. Of these they
 * cancel to 5e-6 (3e-5), and are smaller: 3.7e-4 against 5.4e-4, the roots of their mean squares. */
#define STRETCH 1.24184f
TARGET_BF16 INLINE __m512i stretched_levels(const float *levels) {
    __m512 stretched = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(STRETCH));
    return (__m512i)_mm512_cvtne2ps_pbh(stretched, stretched);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* 32 weights from each of 16 rows of W -> 4 words of 8 weights, lane i from row i. */
TARGET_AVX512 INLINE void transpose_words(const uint8_t *const *rows, int64_t byte, __m512i *words) {
    __m512i q[4];
    for (int i = 0; i < 4; i++) {
        /* Quarter j of q[i] is from row 4 j + i. */
        q[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[i] + byte)));
        q[i] = _mm512_inserti32x4(q[i], _mm_loadu_si128((const __m128i *)(rows[4 + i] + byte)), 1);
        q[i] = _mm512_inserti32x4(q[i], _mm_loadu_si128((const __m128i *)(rows[8 + i] + byte)), 2);
        q[i] = _mm512_inserti32x4(q[i], _mm_loadu_si128((const __m128i *)(rows[12 + i] + byte)), 3);
    }
    __m512i a = _mm512_unpacklo_epi32(q[0], q[1]), b = _mm512_unpackhi_epi32(q[0], q[1]);
    __m512i c = _mm512_unpacklo_epi32(q[2], q[3]), d = _mm512_unpackhi_epi32(q[2], q[3]);
    words[0] = _mm512_unpacklo_epi64(a, c);
    words[1] = _mm512_unpackhi_epi64(a, c);
    words[2] = _mm512_unpacklo_epi64(b, d);
    words[3] = _mm512_unpackhi_epi64(b, d);
}

INLINE void rows_of(const Weight *w, int64_t first, const uint8_t **rows) {
    for (int i = 0; i < 16; i++)
        rows[i] = w->codes + least(first + i, w->rows - 1) * w->columns / 2;
}

/* Byte i of each of a register's 32-bit words -> its high nibble in the lower half of the word, its low one in the
 * upper half: the indices of two look-ups in a table of 16-bit numbers. */
TARGET_BF16 INLINE __m512i pair_bits(int byte) {
    return _mm512_add_epi8(_mm512_set1_epi64(0x0020002400000004), _mm512_set1_epi8((char)(8 * byte)));
}
#endif
#endif
