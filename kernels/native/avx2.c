/* Products for AVX2: the few instructions that the loops of panels.h and thin.h are made of. */
#include "scales.h"

#ifdef MINIPEFT_X86
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define VECTORS 2
#define ROWS_AT_ONCE(M) ((M) > 1 ? 2 : 4)

typedef __m256 Floats;
typedef __m256i Words;
/* 16 numbers, which a lane's lowest 4 bits choose from. */
typedef struct {
    __m256 low, high;
} Table;

TARGET INLINE Floats load(const float *from) { return _mm256_loadu_ps(from); }
TARGET INLINE void store(float *to, Floats x) { _mm256_storeu_ps(to, x); }
TARGET INLINE Floats broadcast(float x) { return _mm256_set1_ps(x); }
TARGET INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
TARGET INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
TARGET INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

/* A word's bits as a number's, and its halves as bfloat16 numbers. */
TARGET INLINE Floats as_floats(Words words) { return _mm256_castsi256_ps(words); }
TARGET INLINE Floats low_half(Words words) { return as_floats(_mm256_slli_epi32(words, 16)); }
TARGET INLINE Floats high_half(Words words) {
    return as_floats(_mm256_and_si256(words, _mm256_set1_epi32((int)0xffff0000)));
}

/* All bits of the first `count` lanes. */
TARGET INLINE __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TARGET INLINE Floats load_some(const float *from, int64_t count) {
    return _mm256_maskload_ps(from, first_lanes(count));
}
TARGET INLINE Floats load_bfloat16(const uint16_t *from) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
TARGET INLINE Words load_words(const uint8_t *codes, int lanes) {
    if (lanes == LANES)
        return _mm256_loadu_si256((const __m256i *)codes);
    return _mm256_maskload_epi32((const int *)codes, first_lanes(lanes));
}

TARGET INLINE Table table_of(const float *levels) {
    Table table = {_mm256_loadu_ps(levels), _mm256_loadu_ps(levels + 8)};
    return table;
}
TARGET INLINE Table scaled(Table levels, float scale) {
    Table table = {multiply(levels.low, broadcast(scale)), multiply(levels.high, broadcast(scale))};
    return table;
}
/* vpermps reads the lowest 3 bits of a lane; the fourth, moved to the sign, chooses the half. */
TARGET INLINE Floats choose(Table table, __m256i index, __m256i sign) {
    __m256 low = _mm256_permutevar8x32_ps(table.low, index), high = _mm256_permutevar8x32_ps(table.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(sign));
}
TARGET INLINE Floats look_up(Table table, Words words, int bit) {
    return choose(table, _mm256_srli_epi32(words, bit), _mm256_slli_epi32(words, 28 - bit));
}
/* Four bytes in every lane, shifted so that lane i has weight i in its lowest bits. */
TARGET INLINE Floats neighbours(Table table, const uint8_t *codes) {
    int32_t word;
    memcpy(&word, codes, 4);
    __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
    return choose(table, index, _mm256_slli_epi32(index, 28));
}

/* 32 weights from each of 8 rows of W -> 4 words of 8 weights, lane i from row i. */
TARGET INLINE void transpose_words(const uint8_t *const *rows, int64_t byte, Words *words) {
    __m256i q[4];
    for (int i = 0; i < 4; i++) {
        /* Half j of q[i] is from row 4 j + i. */
        q[i] = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(rows[i] + byte)));
        q[i] = _mm256_inserti128_si256(q[i], _mm_loadu_si128((const __m128i *)(rows[4 + i] + byte)), 1);
    }
    __m256i a = _mm256_unpacklo_epi32(q[0], q[1]), b = _mm256_unpackhi_epi32(q[0], q[1]);
    __m256i c = _mm256_unpacklo_epi32(q[2], q[3]), d = _mm256_unpackhi_epi32(q[2], q[3]);
    words[0] = _mm256_unpacklo_epi64(a, c);
    words[1] = _mm256_unpackhi_epi64(a, c);
    words[2] = _mm256_unpacklo_epi64(b, d);
    words[3] = _mm256_unpackhi_epi64(b, d);
}

/* The scales of the blocks that the first `lanes` lanes of a group are in, a block of 2^shift weights; zero beyond. */
TARGET INLINE Floats spread_scales(const float *near, int shift, int lanes) {
    if (shift >= 6) /* the group is within a block */
        return broadcast(*near);
    __m256 scales = _mm256_loadu_ps(near);
    __m256i block = _mm256_srl_epi32(_mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56), _mm_cvtsi32_si128(shift));
    return _mm256_and_ps(_mm256_permutevar8x32_ps(scales, block), _mm256_castsi256_ps(first_lanes(lanes)));
}

/* The lanes of each of four registers added up. */
TARGET INLINE void add_lanes(float sums[][LANES], float *y) {
    __m256 a = _mm256_hadd_ps(load(sums[0]), load(sums[1])), b = _mm256_hadd_ps(load(sums[2]), load(sums[3]));
    __m256 c = _mm256_hadd_ps(a, b);
    _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1)));
}
TARGET INLINE float sum_of_lanes(Floats x) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    a = _mm_hadd_ps(a, a);
    return _mm_cvtss_f32(_mm_hadd_ps(a, a));
}

#define scales_of_blocks each_scale
#include "panels.h"
#include "thin.h"

static const Kernels KERNELS = {GROUP, strip_float32, spread_float32, thin_low, thin_float32, widen, thin_dense, 0, 0, 0};
const Kernels *avx2_kernels(void) { return &KERNELS; }
#endif
