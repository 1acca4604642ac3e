/* out = a W^T + low B^T, and backward out = a W + low A, for many rows of `a`, in float32: the loops, which each level's file includes
 * after its few instructions (the top of avx2.c names them).
 *
 * A strip of 64 columns of `out` is made at once. The part of W that it needs is decoded, 128 steps of the sum at a
 * time, into a panel of 32 KB that stays in the nearest caches, a PART of its columns together:
 *
 *     panel[part][step][column]
 *
 * and the rows of `a` go over each part six at a time: TILE x PART sums are registers, VECTORS hold the panel's row, one
 * a number of `a`. Each weight is decoded once for up to MAX_ROWS rows, and nothing but the panel is ever written.
 *
 * LoRA's update is a few more steps of the same sum. Forward, a column of `out` is a row of W: LANES rows' codes are transposed as 32-bit words, so that lane i has 8
 * weights of row i. Backward a column is a column of W, and lies as it should.
 */
#include "scales.h"

#include <string.h>

#define STEPS 128
#define TILE 6
#define PART (LANES * VECTORS)
#define SPAN_BLOCKS (2 * STEPS / 32)

/* Where column `column` of the strip begins in a panel, or with the rows of `a` for its steps in the strip's sums. */
INLINE int64_t place_of(int64_t column, int64_t steps) { return column / PART * PART * steps + column % PART; }

/* The scales of columns first..first+length-1 of W's rows 64 strip .. */
INLINE void block_scales(const Weight *w, int64_t strip, int64_t first, int64_t length, float (*scales)[STRIP]) {
    int64_t begin = first / w->blocksize, end = (first + length - 1) / w->blocksize;
    scales_of_rows(w, strip * STRIP, STRIP, begin, end, scales[0]);
}

INLINE void rows_of(const Weight *w, int64_t first, const uint8_t **rows) {
    for (int i = 0; i < LANES; i++)
        rows[i] = w->codes + least(first + i, w->rows - 1) * row_bytes(w);
}

/* W's rows 64 strip .., steps first..first+length-1 of them, scaled. */
TARGET static void pack_forward(
    const Weight *w, int64_t strip, int64_t first, int64_t length, float (*scales)[STRIP], float *panel) {
    Table levels = table_of(w->levels);
    int64_t begin = first / w->blocksize;
    for (int column = 0; column < STRIP; column += LANES) {
        const uint8_t *rows[LANES];
        rows_of(w, strip * STRIP + column, rows);
        float *to = panel + place_of(column, STEPS);
        for (int64_t k = 0; k < length; k += 32) {
            Floats scale = load(scales[(first + k) / w->blocksize - begin] + column);
            Words words[4];
            transpose_words(rows, (first + k) / 2, words);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
#pragma GCC unroll 4
                for (int byte = 0; byte < 4; byte++) {
                    store(to, multiply(look_up(levels, words[j], 8 * byte + 4), scale));
                    store(to + PART, multiply(look_up(levels, words[j], 8 * byte), scale));
                    to += 2 * PART;
                }
            }
        }
    }
}

/* W's columns 64 strip .., rows first..first+length-1 of them, scaled. */
TARGET static void pack_backward(const Weight *w, int64_t strip, int64_t first, int64_t length, float *panel) {
    Table levels = table_of(w->levels);
    int64_t width = least(STRIP, w->columns - strip * STRIP);
    for (int64_t n = 0; n < length; n++) {
        int64_t start = (first + n) * w->columns + strip * STRIP;
        for (int64_t k = 0; k < width; k += 32) {
            Table table = scaled(levels, scale_of(w, (start + k) / w->blocksize));
#pragma GCC unroll 8
            for (int i = 0; i < 32; i += LANES)
                store(panel + place_of(k + i, STEPS) + n * PART, neighbours(table, w->codes + (start + k + i) / 2));
        }
    }
}

/* The same two of a dense W, whose bytes are transposed as 32-bit words: of a number, or of two bfloat16 ones. */
TARGET static void pack_dense_forward(const Weight *w, int64_t strip, int64_t first, int64_t length, float *panel) {
    const int count = w->dtype == FLOAT32 ? 4 : 8; /* numbers in 16 bytes */
    for (int column = 0; column < STRIP; column += LANES) {
        const uint8_t *rows[LANES];
        rows_of(w, strip * STRIP + column, rows);
        float *to = panel + place_of(column, STEPS);
        for (int64_t k = 0; k < length; k += count) {
            Words words[4];
            transpose_words(rows, (first + k) * 16 / count, words);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                if (w->dtype == FLOAT32) {
                    store(to, as_floats(words[j]));
                } else {
                    store(to, low_half(words[j]));
                    store(to += PART, high_half(words[j]));
                }
                to += PART;
            }
        }
    }
}

TARGET static void pack_dense_backward(const Weight *w, int64_t strip, int64_t first, int64_t length, float *panel) {
    int64_t width = least(STRIP, w->columns - strip * STRIP);
    for (int64_t n = 0; n < length; n++) {
        int64_t start = (first + n) * w->columns + strip * STRIP;
        for (int64_t k = 0; k < width; k += LANES) {
            float *to = panel + place_of(k, STEPS) + n * PART;
            if (w->dtype == FLOAT32)
                store(to, load((const float *)w->codes + start + k));
            else
                store(to, load_bfloat16((const uint16_t *)w->codes + start + k));
        }
    }
}

/* sums (rows, PART) += a (rows, steps) panel (steps, PART). */
TARGET INLINE void tile(
    const int rows, const float *a, int64_t stride, const float *panel, int64_t steps, float *sums) {
    Floats sum[TILE][VECTORS];
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sum[m][v] = load(sums + m * PART + LANES * v);
    for (int64_t s = 0; s < steps; s++, panel += PART) {
        Floats b[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            b[v] = load(panel + LANES * v);
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++) {
            Floats x = broadcast(a[m * stride + s]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sum[m][v] = multiply_add(x, b[v], sum[m][v]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            store(sums + m * PART + LANES * v, sum[m][v]);
}

TARGET static void tiles(
    int64_t rows, const float *a, int64_t stride, const float *panel, int64_t steps, float *sums) {
    for (; rows >= TILE; rows -= TILE, a += TILE * stride, sums += TILE * PART)
        tile(TILE, a, stride, panel, steps, sums);
    switch (rows) {
    case 1: tile(1, a, stride, panel, steps, sums); break;
    case 2: tile(2, a, stride, panel, steps, sums); break;
    case 3: tile(3, a, stride, panel, steps, sums); break;
    case 4: tile(4, a, stride, panel, steps, sums); break;
    case 5: tile(5, a, stride, panel, steps, sums); break;
    }
}

/* The sums of rows m0..m1-1 += low B^T or low A. */
TARGET static void add_low_rank(
    const Product *p, int64_t strip, int64_t m0, int64_t m1, float *panel, float *sums) {
    int64_t columns = p->backward ? p->w->columns : p->w->rows, rows = m1 - m0, rank = p->rank;
    int64_t width = least(STRIP, columns - strip * STRIP);
    for (int64_t first = 0; first < rank; first += STEPS) {
        int64_t steps = least(STEPS, rank - first);
        for (int64_t j = 0; j < steps; j++)
            for (int64_t i = 0; i < STRIP; i++) {
                int64_t column = strip * STRIP + i, step = first + j;
                int64_t at = p->backward ? step * columns + column : column * rank + step;
                panel[place_of(i, STEPS) + j * PART] = i < width ? p->up[at] : 0;
            }
        for (int64_t part = 0; part < STRIP; part += PART)
            tiles(rows, p->low + m0 * rank + first, rank, panel + part * STEPS, steps, sums + part * rows);
    }
}

/* The strip's sums [part][row][column] to rows m0..m1-1 of out. */
static void write_strip(const Product *p, int64_t strip, int64_t m0, int64_t m1, const float *sums) {
    int64_t columns = p->backward ? p->w->columns : p->w->rows, first = strip * STRIP;
    int64_t width = least(STRIP, columns - first);
    for (int64_t part = 0; part < width; part += PART) {
        int64_t some = least(PART, width - part);
        for (int64_t m = m0; m < m1; m++, sums += PART) {
            int64_t at = m * columns + first + part;
            if (p->out_dtype == FLOAT32) {
                memcpy((float *)p->out + at, sums, some * sizeof(float));
            } else {
                uint16_t *to = (uint16_t *)p->out + at;
                for (int64_t i = 0; i < some; i++)
                    to[i] = to_bfloat16(sums[i]);
            }
        }
    }
}

/* Asks for the codes of the panel from step `first` on while the one before it is multiplied: where rows of W are few
 * kilobytes apart the processor does not see what comes next, and with few rows of x there is little else to do. */
INLINE void fetch_panel(const Product *p, int64_t strip, int64_t first, int64_t steps) {
    const Weight *w = p->w;
    if (p->backward) {
        int64_t end = least(w->rows, first + steps);
        for (int64_t n = first; n < end; n++)
            __builtin_prefetch(w->codes + (n * w->columns + strip * STRIP) / 2);
    } else if (first < w->columns) {
        int64_t end = least(w->rows, (strip + 1) * STRIP), last = least(w->columns, first + steps);
        for (int64_t n = strip * STRIP; n < end; n++)
            for (int64_t k = first; k < last; k += 128)
                __builtin_prefetch(w->codes + (n * w->columns + k) / 2);
    }
}

TARGET static void strip_float32(const Product *p, int64_t strip, int64_t m0, int64_t m1) {
    _Alignas(64) float panel[STEPS * STRIP];
    _Alignas(64) float sums[MAX_ROWS * STRIP];
    float scales[SPAN_BLOCKS][STRIP];
    int64_t length = p->backward ? p->w->rows : p->w->columns, rows = m1 - m0;
    memset(sums, 0, rows * STRIP * sizeof(float));
    if (p->backward)
        memset(panel, 0, sizeof panel); /* a narrow last strip leaves some of it unwritten */
    for (int64_t first = 0; first < length; first += STEPS) {
        int64_t steps = least(STEPS, length - first);
        if (p->w->dtype != NF4) {
            (p->backward ? pack_dense_backward : pack_dense_forward)(p->w, strip, first, steps, panel);
        } else if (p->backward) {
            pack_backward(p->w, strip, first, steps, panel);
        } else {
            block_scales(p->w, strip, first, steps, scales);
            pack_forward(p->w, strip, first, steps, scales, panel);
        }
        if (p->w->dtype == NF4)
            fetch_panel(p, strip, first + STEPS, STEPS);
        for (int64_t part = 0; part < STRIP; part += PART)
            tiles(rows, (const float *)p->a + m0 * length + first, length, panel + part * STEPS, steps, sums + part * rows);
    }
    add_low_rank(p, strip, m0, m1, panel, sums);
    write_strip(p, strip, m0, m1, sums);
}
