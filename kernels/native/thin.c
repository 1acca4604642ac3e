/* out = x W^T for up to THIN_ROWS rows of x, as when a model generates token by token.
 *
 * Each weight is used once or a few times, so it is multiplied in the register that it was looked up in, and nothing is
 * written but the result. 16 rows of W at a time, which lie side by side in memory: their codes are transposed as in
 * product.c, lane i of every register belongs to row i, and a block's sum is multiplied by the rows' scales.
 */
#include "nf4.h"

#ifdef MINIPEFT_X86
#include <string.h>

#define BLOCKS 32 /* whose scales are made at a time */

/* The first of the sums, with the others added to it. */
TARGET_AVX512 INLINE __m512 total(__m512 *sums, const int count) {
    for (int step = count / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++)
            sums[i] = _mm512_add_ps(sums[i], sums[i + step]);
    return sums[0];
}

TARGET_AVX512 INLINE void write_rows(const Product *p, int64_t first, int64_t m0, const int rows, const __m512 *y) {
    int64_t columns = p->w->rows, width = least(16, columns - first);
    for (int m = 0; m < rows; m++) {
        float values[16];
        _mm512_storeu_ps(values, y[m]);
        int64_t at = (m0 + m) * columns + first;
        if (p->out_dtype == FLOAT32) {
            memcpy((float *)p->out + at, values, width * sizeof(float));
        } else {
            for (int64_t i = 0; i < width; i++)
                ((uint16_t *)p->out)[at + i] = to_bfloat16(values[i]);
        }
    }
}

/* `rows` rows of x by 16 of W; so many sums for each, that one need not wait for the last. */
TARGET_AVX512 INLINE void thin_float32(const Product *p, int64_t first, int64_t m0, const int rows, const int chains) {
    const Weight *w = p->w;
    const float *x = (const float *)p->a + m0 * w->columns;
    const uint8_t *codes[16];
    float scales[BLOCKS * 16];
    __m512 levels = _mm512_loadu_ps(w->levels), y[THIN_ROWS], sums[THIN_ROWS][4];
    rows_of(w, first, codes);
    for (int m = 0; m < rows; m++)
        y[m] = _mm512_setzero_ps();
    int64_t blocks = w->columns / w->blocksize, words_per_block = w->blocksize / 32;
    for (int64_t block = 0, k = 0; block < blocks; block++) {
        if (block % BLOCKS == 0)
            scales_of_rows(w, first, 16, block, least(block + BLOCKS, blocks) - 1, scales);
        for (int m = 0; m < rows; m++)
            for (int c = 0; c < chains; c++)
                sums[m][c] = _mm512_setzero_ps();
        for (int64_t i = 0; i < words_per_block; i++, k += 32) {
            __m512i words[4];
            transpose_words(codes, k / 2, words);
#pragma GCC unroll 32
            for (int j = 0; j < 32; j++) {
                /* The earlier weight of a byte is in its high half. */
                __m512i index = _mm512_srli_epi32(words[j / 8], 4 * (j % 8 ^ 1));
                __m512 weights = _mm512_permutexvar_ps(index, levels);
#pragma GCC unroll 4
                for (int m = 0; m < rows; m++) {
                    __m512 *sum = &sums[m][j % chains];
                    *sum = _mm512_fmadd_ps(_mm512_set1_ps(x[m * w->columns + k + j]), weights, *sum);
                }
            }
        }
        __m512 scale = _mm512_loadu_ps(scales + block % BLOCKS * 16);
        for (int m = 0; m < rows; m++)
            y[m] = _mm512_fmadd_ps(total(sums[m], chains), scale, y[m]);
    }
    write_rows(p, first, m0, rows, y);
}

TARGET_BF16 INLINE void thin_bfloat16(const Product *p, int64_t first, int64_t m0, const int rows, const int chains) {
    const Weight *w = p->w;
    const uint16_t *x = (const uint16_t *)p->a + m0 * w->columns;
    const uint8_t *codes[16];
    float scales[BLOCKS * 16];
    __m512 levels = _mm512_loadu_ps(w->levels), y[THIN_ROWS], sums[THIN_ROWS][4];
    __m512i table = (__m512i)_mm512_cvtne2ps_pbh(levels, levels), pick[4];
    for (int byte = 0; byte < 4; byte++)
        pick[byte] = pair_bits(byte);
    rows_of(w, first, codes);
    for (int m = 0; m < rows; m++)
        y[m] = _mm512_setzero_ps();
    int64_t blocks = w->columns / w->blocksize, words_per_block = w->blocksize / 32;
    for (int64_t block = 0, k = 0; block < blocks; block++) {
        if (block % BLOCKS == 0)
            scales_of_rows(w, first, 16, block, least(block + BLOCKS, blocks) - 1, scales);
        for (int m = 0; m < rows; m++)
            for (int c = 0; c < chains; c++)
                sums[m][c] = _mm512_setzero_ps();
        for (int64_t i = 0; i < words_per_block; i++, k += 32) {
            __m512i words[4];
            transpose_words(codes, k / 2, words);
#pragma GCC unroll 16
            for (int j = 0; j < 16; j++) {
                __m512i index = _mm512_multishift_epi64_epi8(pick[j % 4], words[j / 4]);
                __m512bh weights = (__m512bh)_mm512_permutexvar_epi16(index, table);
#pragma GCC unroll 4
                for (int m = 0; m < rows; m++) {
                    int32_t pair;
                    memcpy(&pair, x + m * w->columns + k + 2 * j, 4);
                    __m512 *sum = &sums[m][j % chains];
                    *sum = _mm512_dpbf16_ps(*sum, weights, (__m512bh)_mm512_set1_epi32(pair));
                }
            }
        }
        __m512 scale = _mm512_loadu_ps(scales + block % BLOCKS * 16);
        for (int m = 0; m < rows; m++)
            y[m] = _mm512_fmadd_ps(total(sums[m], chains), scale, y[m]);
    }
    write_rows(p, first, m0, rows, y);
}

TARGET_AVX512 void thin_strip_float32(const Product *p, int64_t strip, int64_t m0, int64_t m1) {
    for (int64_t first = strip * STRIP; first < least(p->w->rows, (strip + 1) * STRIP); first += 16) {
        switch (m1 - m0) {
        case 1: thin_float32(p, first, m0, 1, 4); break;
        case 2: thin_float32(p, first, m0, 2, 4); break;
        case 3: thin_float32(p, first, m0, 3, 2); break;
        case 4: thin_float32(p, first, m0, 4, 2); break;
        }
    }
}

TARGET_BF16 void thin_strip_bfloat16(const Product *p, int64_t strip, int64_t m0, int64_t m1) {
    for (int64_t first = strip * STRIP; first < least(p->w->rows, (strip + 1) * STRIP); first += 16) {
        switch (m1 - m0) {
        case 1: thin_bfloat16(p, first, m0, 1, 4); break;
        case 2: thin_bfloat16(p, first, m0, 2, 4); break;
        case 3: thin_bfloat16(p, first, m0, 3, 2); break;
        case 4: thin_bfloat16(p, first, m0, 4, 2); break;
        }
    }
}
#endif
