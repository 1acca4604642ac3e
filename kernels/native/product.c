/* Products with a packed weight for AVX-512: out = x W^T, and backward out = dy W.
 *
 * A strip of 64 columns of `out` is made at once. The part of W that it needs is decoded, 128 steps of the sum at a
 * time, into a panel of 32 KB that stays in the first-level cache:
 *
 *     panel[step][column]      float32; or for bfloat16 two steps of a column in one 32-bit lane
 *
 * and the rows of x go over it six at a time: 6 x 64 sums are 24 registers, 4 hold the panel's row, one x. Each
 * weight is decoded once for up to MAX_ROWS rows, and nothing but the panel is ever written.
 *
 * Forward, a column of `out` is a row of W: 16 rows' codes are transposed as 32-bit words (4 x 4 in each quarter of a
 * register), so that lane i has 8 weights of row i. Backward a column is a column of W, and lies as it should.
 *
 * bfloat16 products add pairs of steps (vdpbf16ps). Forward the scale differs from lane to lane, so the levels alone
 * are looked up, and each block's sum is multiplied by the scales in float32; backward the tables are scaled.
 */
#include "scales.h"

#ifdef MINIPEFT_X86
#include <string.h>

#define STEPS 128
#define TILE 6
#define SPAN_BLOCKS (2 * STEPS / 32)
#define VECTORS (STRIP / 16)

/* The scales of columns first..first+length-1 of W's rows 64 strip .. */
TARGET_AVX512 INLINE void block_scales(const Weight *w, int64_t strip, int64_t first, int64_t length, float (*scales)[STRIP]) {
    int64_t begin = first / w->blocksize, end = (first + length - 1) / w->blocksize;
    scales_of_rows(w, strip * STRIP, STRIP, begin, end, scales[0]);
}

/* panel[k][row of W], scaled. */
TARGET_AVX512 static void pack_forward_float32(
    const Weight *w, int64_t strip, int64_t first, int64_t length, float (*scales)[STRIP], float *panel) {
    __m512 levels = _mm512_loadu_ps(w->levels);
    int64_t begin = first / w->blocksize;
    for (int vector = 0; vector < VECTORS; vector++) {
        const uint8_t *rows[16];
        rows_of(w, strip * STRIP + 16 * vector, rows);
        for (int64_t k = 0; k < length; k += 32) {
            __m512 scale = _mm512_loadu_ps(scales[(first + k) / w->blocksize - begin] + 16 * vector);
            __m512i words[4];
            transpose_words(rows, (first + k) / 2, words);
            float *to = panel + k * STRIP + 16 * vector;
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
#pragma GCC unroll 4
                for (int byte = 0; byte < 4; byte++) {
                    __m512i high = _mm512_srli_epi32(words[j], 8 * byte + 4), low = _mm512_srli_epi32(words[j], 8 * byte);
                    _mm512_store_ps(to, _mm512_mul_ps(_mm512_permutexvar_ps(high, levels), scale));
                    _mm512_store_ps(to + STRIP, _mm512_mul_ps(_mm512_permutexvar_ps(low, levels), scale));
                    to += 2 * STRIP;
                }
            }
        }
    }
}

/* panel[k/2][row of W] of pairs, levels alone. */
TARGET_BF16 static void pack_forward_bfloat16(
    const Weight *w, int64_t strip, int64_t first, int64_t length, uint32_t *panel) {
    __m512i table = stretched_levels(w->levels);
    __m512i pick[4];
    for (int byte = 0; byte < 4; byte++)
        pick[byte] = pair_bits(byte);
    for (int vector = 0; vector < VECTORS; vector++) {
        const uint8_t *rows[16];
        rows_of(w, strip * STRIP + 16 * vector, rows);
        for (int64_t k = 0; k < length; k += 32) {
            __m512i words[4];
            transpose_words(rows, (first + k) / 2, words);
            uint32_t *to = panel + k / 2 * STRIP + 16 * vector;
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
#pragma GCC unroll 4
                for (int byte = 0; byte < 4; byte++) {
                    __m512i index = _mm512_multishift_epi64_epi8(pick[byte], words[j]);
                    _mm512_store_si512(to, _mm512_permutexvar_epi16(index, table));
                    to += STRIP;
                }
            }
        }
    }
}

/* panel[row of W][k], scaled: columns 64 strip .. of W. */
TARGET_AVX512 static void pack_backward_float32(
    const Weight *w, int64_t strip, int64_t first, int64_t length, float *panel) {
    __m512 levels = _mm512_loadu_ps(w->levels);
    __m512i words = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    int64_t width = least(STRIP, w->columns - strip * STRIP);
    for (int64_t n = 0; n < length; n++, panel += STRIP) {
        int64_t start = (first + n) * w->columns + strip * STRIP;
        for (int64_t k = 0; k < width; k += 32) {
            __m512 table = _mm512_mul_ps(levels, _mm512_set1_ps(scale_of(w, (start + k) / w->blocksize)));
            for (int half = 0; half < 32; half += 16) {
                int64_t eight;
                memcpy(&eight, w->codes + (start + k + half) / 2, 8);
                __m512i spread = _mm512_permutexvar_epi32(words, _mm512_set1_epi64(eight));
                _mm512_store_ps(panel + k + half, _mm512_permutexvar_ps(_mm512_srlv_epi32(spread, shifts), table));
            }
        }
    }
}

/* panel[row of W / 2][k] of pairs, scaled; an even number of rows. */
TARGET_BF16 static void pack_backward_bfloat16(
    const Weight *w, int64_t strip, int64_t first, int64_t length, uint32_t *panel) {
    __m512 levels = _mm512_loadu_ps(w->levels);
    /* Byte j of 8 to lanes 2 j (its high nibble) and 2 j + 1 (its low one), in both halves of the lane. */
    __m512i pick = _mm512_add_epi8(
        _mm512_set1_epi64(0x0000000000040004), _mm512_mullo_epi64(_mm512_setr_epi64(0, 8, 16, 24, 32, 40, 48, 56),
                                                                   _mm512_set1_epi64(0x0101010101010101)));
    int64_t width = least(STRIP, w->columns - strip * STRIP);
    for (int64_t n = 0; n < length; n += 2, panel += STRIP) {
        int64_t start = (first + n) * w->columns + strip * STRIP;
        for (int64_t k = 0; k < width; k += 32) {
            __m512i tables[2];
            for (int i = 0; i < 2; i++) {
                float scale = scale_of(w, (start + i * w->columns + k) / w->blocksize);
                __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(scale));
                tables[i] = (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled);
            }
            for (int half = 0; half < 32; half += 16) {
                int64_t eight[2];
                memcpy(eight, w->codes + (start + k + half) / 2, 8);
                memcpy(eight + 1, w->codes + (start + w->columns + k + half) / 2, 8);
                __m512i index = _mm512_multishift_epi64_epi8(pick, _mm512_set1_epi64(eight[0]));
                __m512i pairs = _mm512_permutexvar_epi16(index, tables[0]);
                index = _mm512_multishift_epi64_epi8(pick, _mm512_set1_epi64(eight[1]));
                pairs = _mm512_mask_permutexvar_epi16(pairs, 0xaaaaaaaa, index, tables[1]);
                _mm512_store_si512(panel + k + half, pairs);
            }
        }
    }
}

/* sums (rows, 64) += a (rows, steps) panel (steps, 64). */
TARGET_AVX512 INLINE void tile_float32(
    const int rows, const float *a, int64_t stride, const float *panel, int64_t steps, float *sums) {
    __m512 sum[TILE][VECTORS];
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sum[m][v] = _mm512_load_ps(sums + m * STRIP + 16 * v);
    for (int64_t s = 0; s < steps; s++, panel += STRIP) {
        __m512 b[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            b[v] = _mm512_load_ps(panel + 16 * v);
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++) {
            __m512 x = _mm512_set1_ps(a[m * stride + s]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sum[m][v] = _mm512_fmadd_ps(x, b[v], sum[m][v]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            _mm512_store_ps(sums + m * STRIP + 16 * v, sum[m][v]);
}

/* The same with pairs of steps; the sum is multiplied by scales (64,) if there are any. */
TARGET_BF16 INLINE void tile_bfloat16(const int rows, const uint16_t *a, int64_t stride, const uint32_t *panel,
                                      int64_t pairs, const float *scales, float *sums) {
    __m512 sum[TILE][VECTORS];
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            sum[m][v] = _mm512_setzero_ps();
    for (int64_t s = 0; s < pairs; s++, panel += STRIP) {
        __m512bh b[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            b[v] = (__m512bh)_mm512_load_si512(panel + 16 * v);
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++) {
            int32_t pair;
            memcpy(&pair, a + m * stride + 2 * s, 4);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sum[m][v] = _mm512_dpbf16_ps(sum[m][v], x, b[v]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
        __m512 scale = scales ? _mm512_loadu_ps(scales + 16 * v) : _mm512_set1_ps(1);
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++) {
            float *to = sums + m * STRIP + 16 * v;
            _mm512_store_ps(to, _mm512_fmadd_ps(sum[m][v], scale, _mm512_load_ps(to)));
        }
    }
}

TARGET_AVX512 static void rows_float32(
    int64_t rows, const float *a, int64_t stride, const float *panel, int64_t steps, float *sums) {
    for (; rows >= TILE; rows -= TILE, a += TILE * stride, sums += TILE * STRIP)
        tile_float32(TILE, a, stride, panel, steps, sums);
    switch (rows) {
    case 1: tile_float32(1, a, stride, panel, steps, sums); break;
    case 2: tile_float32(2, a, stride, panel, steps, sums); break;
    case 3: tile_float32(3, a, stride, panel, steps, sums); break;
    case 4: tile_float32(4, a, stride, panel, steps, sums); break;
    case 5: tile_float32(5, a, stride, panel, steps, sums); break;
    }
}

TARGET_BF16 static void rows_bfloat16(int64_t rows, const uint16_t *a, int64_t stride, const uint32_t *panel,
                                      int64_t pairs, const float *scales, float *sums) {
    for (; rows >= TILE; rows -= TILE, a += TILE * stride, sums += TILE * STRIP)
        tile_bfloat16(TILE, a, stride, panel, pairs, scales, sums);
    switch (rows) {
    case 1: tile_bfloat16(1, a, stride, panel, pairs, scales, sums); break;
    case 2: tile_bfloat16(2, a, stride, panel, pairs, scales, sums); break;
    case 3: tile_bfloat16(3, a, stride, panel, pairs, scales, sums); break;
    case 4: tile_bfloat16(4, a, stride, panel, pairs, scales, sums); break;
    case 5: tile_bfloat16(5, a, stride, panel, pairs, scales, sums); break;
    }
}

/* The strip's sums to rows m0..m1-1 of out. */
static void write_strip(const Product *p, int64_t strip, int64_t m0, int64_t m1, const float *sums) {
    int64_t columns = p->backward ? p->w->columns : p->w->rows, first = strip * STRIP;
    int64_t width = least(STRIP, columns - first);
    for (int64_t m = m0; m < m1; m++, sums += STRIP) {
        if (p->out_dtype == FLOAT32) {
            memcpy((float *)p->out + m * columns + first, sums, width * sizeof(float));
        } else {
            uint16_t *to = (uint16_t *)p->out + m * columns + first;
            for (int64_t i = 0; i < width; i++)
                to[i] = to_bfloat16(sums[i]);
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
            _mm_prefetch((const char *)w->codes + (n * w->columns + strip * STRIP) / 2, _MM_HINT_T0);
    } else if (first < w->columns) {
        int64_t end = least(w->rows, (strip + 1) * STRIP), last = least(w->columns, first + steps);
        for (int64_t n = strip * STRIP; n < end; n++)
            for (int64_t k = first; k < last; k += 128)
                _mm_prefetch((const char *)w->codes + (n * w->columns + k) / 2, _MM_HINT_T0);
    }
}

TARGET_AVX512 void strip_float32(const Product *p, int64_t strip, int64_t m0, int64_t m1) {
    _Alignas(64) float panel[STEPS * STRIP];
    _Alignas(64) float sums[MAX_ROWS * STRIP];
    float scales[SPAN_BLOCKS][STRIP];
    int64_t length = p->backward ? p->w->rows : p->w->columns;
    memset(sums, 0, (m1 - m0) * STRIP * sizeof(float));
    if (p->backward)
        memset(panel, 0, sizeof panel); /* a narrow last strip leaves some of it unwritten */
    for (int64_t first = 0; first < length; first += STEPS) {
        int64_t steps = least(STEPS, length - first);
        if (p->backward) {
            pack_backward_float32(p->w, strip, first, steps, panel);
        } else {
            block_scales(p->w, strip, first, steps, scales);
            pack_forward_float32(p->w, strip, first, steps, scales, panel);
        }
        fetch_panel(p, strip, first + STEPS, STEPS);
        rows_float32(m1 - m0, (const float *)p->a + m0 * length + first, length, panel, steps, sums);
    }
    write_strip(p, strip, m0, m1, sums);
}

TARGET_BF16 void strip_bfloat16(const Product *p, int64_t strip, int64_t m0, int64_t m1) {
    _Alignas(64) uint32_t panel[STEPS * STRIP];
    _Alignas(64) float sums[MAX_ROWS * STRIP];
    float scales[SPAN_BLOCKS][STRIP];
    int64_t length = p->backward ? p->w->rows : p->w->columns;
    int64_t part = p->backward ? 2 * STEPS : least(2 * STEPS, p->w->blocksize);
    memset(sums, 0, (m1 - m0) * STRIP * sizeof(float));
    if (p->backward)
        memset(panel, 0, sizeof panel);
    for (int64_t first = 0; first < length; first += 2 * STEPS) {
        int64_t steps = least(2 * STEPS, length - first);
        if (p->backward) {
            pack_backward_bfloat16(p->w, strip, first, steps, panel);
        } else {
            block_scales(p->w, strip, first, steps, scales);
            pack_forward_bfloat16(p->w, strip, first, steps, panel);
        }
        fetch_panel(p, strip, first + 2 * STEPS, 2 * STEPS);
        for (int64_t m = m0; m < m1; m += TILE) {
            const uint16_t *a = (const uint16_t *)p->a + m * length + first;
            int64_t rows = least(TILE, m1 - m);
            for (int64_t s = 0; s < steps; s += part)
                rows_bfloat16(rows, a + s, length, panel + s / 2 * STRIP, least(part, steps - s) / 2,
                              p->backward ? 0 : scales[s / part], sums + (m - m0) * STRIP);
        }
    }
    for (int64_t i = 0; i < (m1 - m0) * STRIP && !p->backward; i++)
        sums[i] *= 1 / STRETCH;
    write_strip(p, strip, m0, m1, sums);
}
#endif
