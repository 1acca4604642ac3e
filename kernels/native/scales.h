/* Many blocks' scales at once. */
#ifndef MINIPEFT_SCALES_H
#define MINIPEFT_SCALES_H

#include "nf4.h"

#ifdef MINIPEFT_X86
/* Blocks begin..end of W's rows first.. -> scales[block][row], `width` rows; beyond the last row it is taken again. */
INLINE void scales_of_rows(
    const Weight *w, int64_t first, const int width, int64_t begin, int64_t end, float *restrict scales) {
    const Weight own = *w; /* a copy, which stores to `scales` cannot change */
    int64_t per_row = own.columns / own.blocksize;
    for (int64_t i = 0; i < width; i++) {
        int64_t start = least(first + i, own.rows - 1) * per_row;
        for (int64_t b = begin; b <= end; b++)
            scales[(b - begin) * width + i] = scale_of(&own, start + b);
    }
}

/* map[index] of 256 numbers, as 8 look-ups among 32. */
TARGET_AVX512 INLINE __m512 look_up(const float *map, __m512i index) {
    __m512 part[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        part[i] = _mm512_permutex2var_ps(_mm512_loadu_ps(map + 32 * i), index, _mm512_loadu_ps(map + 32 * i + 16));
#pragma GCC unroll 3
    for (int bit = 0; bit < 3; bit++) {
        __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32 << bit));
#pragma GCC unroll 4
        for (int i = 0; i < 4 >> bit; i++)
            part[i] = _mm512_mask_blend_ps(upper, part[2 * i], part[2 * i + 1]);
    }
    return part[0];
}

/* The scales of W's blocks begin..end-1, in whole registers. */
TARGET_AVX512 INLINE void scales_of_blocks(const Weight *w, int64_t begin, int64_t end, float *restrict scales) {
    const Weight own = *w; /* a copy, which stores to `scales` cannot change */
    int64_t size = own.nested_blocksize, b = begin;
    if (!own.nested || size < 16) {
        for (; b < end; b++)
            scales[b - begin] = scale_of(&own, b);
        return;
    }
    __m512 offset = _mm512_set1_ps(*own.offset);
    for (; b < end; b += 16) {
        __mmask16 some = end - b < 16 ? (1 << (end - b)) - 1 : 0xffff;
        int64_t part = size == 256 ? b >> 8 : b / size, left = (part + 1) * size - b;
        __m512 nested = _mm512_set1_ps(own.nested[part]);
        if (left < 16 && b + left < end)
            nested = _mm512_mask_blend_ps((1 << left) - 1, _mm512_set1_ps(own.nested[part + 1]), nested);
        __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, (const uint8_t *)own.absmax + b));
        _mm512_storeu_ps(scales + (b - begin), _mm512_add_ps(_mm512_mul_ps(look_up(own.map, codes), nested), offset));
    }
}
#endif
#endif
