/* Many blocks' scales at once. */
#ifndef MINIPEFT_SCALES_H
#define MINIPEFT_SCALES_H

#include "nf4.h"

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

/* The scales of W's blocks begin..end-1. */
INLINE void each_scale(const Weight *w, int64_t begin, int64_t end, float *restrict scales) {
    const Weight own = *w; /* as above */
    for (int64_t b = begin; b < end; b++)
        scales[b - begin] = scale_of(&own, b);
}
#endif
