/* What the files of this folder share: a packed weight, and how a block's scale is read from it. */
#ifndef MINIPEFT_NF4_H
#define MINIPEFT_NF4_H

#include <stdint.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MINIPEFT_X86 1
#include <immintrin.h>
/* Functions are compiled for instructions that this machine may lack, and called only where `minipeft_level` found them. */
#define TARGET_AVX2 __attribute__((target("avx2")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#endif

#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define MINIPEFT_ARM 1 /* NEON is part of the architecture */
#endif

#define INLINE static inline __attribute__((always_inline))

enum { SCALAR = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, NEON = 4 };
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, NF4 = 3 };

/* W, rows x columns in row-major order, as the Python side holds it. A dense one has its numbers at `codes`. */
typedef struct {
    const uint8_t *codes;   /* two weights a byte, the earlier one in the high half */
    const void *absmax;     /* a scale a block: float, or uint8_t when doubly quantized */
    const float *levels;    /* 16 */
    const float *nested;    /* a scale for nested_blocksize blocks; NULL unless doubly quantized */
    const float *map;       /* 256 */
    const float *offset;    /* 1 */
    int64_t rows, columns, blocksize, nested_blocksize;
    int dtype;              /* NF4; FLOAT32 or BFLOAT16 of a dense one */
} Weight;

/* Bytes of a row. */
INLINE int64_t row_bytes(const Weight *w) {
    return w->dtype == NF4 ? w->columns / 2 : w->columns * (w->dtype == FLOAT32 ? 4 : 2);
}

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

INLINE float from_bfloat16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* panels.h: columns 64 strip .. of out = a W^T + low B^T (backward 0) or a W + low A (backward 1), for rows m0..m1-1 of
 * a. */
typedef struct {
    const Weight *w;
    const void *a;      /* (M, K) or, backward, (M, N) */
    void *out;          /* (M, N) or, backward, (M, K) */
    int backward, out_dtype;
    const float *low;   /* (M, rank); rank 0 without an update */
    const float *up;    /* B (N, rank) or, backward, A (rank, K) */
    int64_t rank;
} Product;

#define STRIP 64
#define MAX_ROWS 264

/* thin.h: out = x W^T + s (x A^T) B^T for up to THIN_ROWS rows of x. */
typedef struct {
    const Weight *w;
    const void *x;       /* (rows, K), of `dtype` */
    void *out;           /* (rows, N) */
    int64_t rows, padded; /* padded: K, up to whole registers of codes */
    int dtype, out_dtype;
    const float *lora_A, *lora_B; /* (rank, K) and (N, rank); rank 0 without an update */
    int64_t rank;
    float scaling;
    char *spread;        /* scratch for (rows, padded) float32 numbers */
    float *low;          /* and for (rows, rank): s x A^T */
} Thin;

#define THIN_ROWS 4
#define THIN_STRIP 64
#define THIN_SCALES 1024 /* scales made at a time, unless four rows have more */

/* What a level's file has. A thin product is `spread` first, `low` for each row of A, then `rows` for each THIN_STRIP rows
 * of W, whose last argument is a thread's scratch for scales; of a dense W `widen` and `dense_rows`. bfloat16's are NULL
 * where there are no instructions for them. */
typedef struct {
    int64_t group; /* weights in a register of codes */
    void (*strip)(const Product *p, int64_t strip, int64_t m0, int64_t m1);
    void (*spread)(const Thin *t);
    void (*low)(const Thin *t, int64_t j);
    void (*rows)(const Thin *t, int64_t strip, float *scales);
    void (*widen)(const Thin *t);
    void (*dense_rows)(const Thin *t, int64_t strip, float *scales);
    void (*strip_bfloat16)(const Product *p, int64_t strip, int64_t m0, int64_t m1);
    void (*spread_bfloat16)(const Thin *t);
    void (*rows_bfloat16)(const Thin *t, int64_t strip, float *scales);
} Kernels;

const Kernels *avx2_kernels(void);
const Kernels *avx512_kernels(int bfloat16);
const Kernels *neon_kernels(void);
#endif
