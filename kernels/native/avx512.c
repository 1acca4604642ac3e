/* Products for AVX-512, and with its bfloat16 instructions: the few instructions that the loops of panels.h and thin.h are
 * made of, and the same loops for pairs of bfloat16 numbers.
 *
 * bfloat16 products add pairs of steps (vdpbf16ps): a panel's 32-bit lanes hold two steps of a column. Forward the scale
 * differs from lane to lane, so the levels alone are looked up, and each block's sum is multiplied by the scales in
 * float32; backward the tables are scaled.
 */
#include "scales.h"

#ifdef MINIPEFT_X86
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")))
#define LANES 16
#define VECTORS 4
#define ROWS_AT_ONCE(M) ROWS

typedef __m512 Floats;
typedef __m512i Words;
typedef __m512 Table;

TARGET INLINE Floats load(const float *from) { return _mm512_loadu_ps(from); }
TARGET INLINE void store(float *to, Floats x) { _mm512_storeu_ps(to, x); }
TARGET INLINE Floats broadcast(float x) { return _mm512_set1_ps(x); }
TARGET INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
TARGET INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
TARGET INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
TARGET INLINE float sum_of_lanes(Floats x) { return _mm512_reduce_add_ps(x); }

/* A word's bits as a number's, and its halves as bfloat16 numbers. */
TARGET INLINE Floats as_floats(Words words) { return _mm512_castsi512_ps(words); }
TARGET INLINE Floats low_half(Words words) { return as_floats(_mm512_slli_epi32(words, 16)); }
TARGET INLINE Floats high_half(Words words) {
    return as_floats(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
}

INLINE __mmask16 first_lanes(int64_t count) { return (__mmask16)((1u << count) - 1); }
TARGET INLINE Floats load_some(const float *from, int64_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
TARGET INLINE Floats load_bfloat16(const uint16_t *from) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
TARGET INLINE Words load_words(const uint8_t *codes, int lanes) {
    return _mm512_maskz_loadu_epi32(first_lanes(lanes), codes);
}

TARGET INLINE Table table_of(const float *levels) { return _mm512_loadu_ps(levels); }
TARGET INLINE Table scaled(Table levels, float scale) { return _mm512_mul_ps(levels, _mm512_set1_ps(scale)); }
/* vpermps reads the lowest 4 bits of a lane. */
TARGET INLINE Floats look_up(Table table, Words words, int bit) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, bit), table);
}
/* 8 bytes in every lane pair: the first 8 lanes take the first 4 of them, shifted to their own nibble. */
TARGET INLINE Floats neighbours(Table table, const uint8_t *codes) {
    __m512i words = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    int64_t eight;
    memcpy(&eight, codes, 8);
    __m512i spread = _mm512_permutexvar_epi32(words, _mm512_set1_epi64(eight));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(spread, shifts), table);
}

/* 32 weights from each of 16 rows of W -> 4 words of 8 weights, lane i from row i. */
TARGET INLINE void transpose_words(const uint8_t *const *rows, int64_t byte, __m512i *words) {
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

/* The scales of the blocks that the first `lanes` lanes of a group are in, a block of 2^shift weights; zero beyond. */
TARGET INLINE Floats spread_scales(const float *near, int shift, int lanes) {
    __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i block = _mm512_srl_epi32(_mm512_slli_epi32(lane, 3), _mm_cvtsi32_si128(shift));
    return _mm512_maskz_permutexvar_ps(first_lanes(lanes), block, _mm512_loadu_ps(near));
}

/* The lanes of each of four registers added up. */
TARGET INLINE void add_lanes(float sums[][LANES], float *y) {
    __m512 s[4];
    for (int r = 0; r < 4; r++)
        s[r] = _mm512_loadu_ps(sums[r]);
    __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
    __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
    __m512d low = _mm512_unpacklo_pd((__m512d)a, (__m512d)b), high = _mm512_unpackhi_pd((__m512d)a, (__m512d)b);
    __m512 c = _mm512_add_ps((__m512)low, (__m512)high);
    __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
}

/* map[index] of 256 numbers, as 8 look-ups among 32. */
TARGET INLINE __m512 look_up_scale(const float *map, __m512i index) {
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
TARGET INLINE void scales_of_blocks(const Weight *w, int64_t begin, int64_t end, float *restrict scales) {
    const Weight own = *w; /* a copy, which stores to `scales` cannot change */
    int64_t size = own.nested_blocksize, b = begin;
    if (!own.nested || size < 16) {
        each_scale(w, begin, end, scales);
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
        _mm512_storeu_ps(scales + (b - begin), _mm512_add_ps(_mm512_mul_ps(look_up_scale(own.map, codes), nested), offset));
    }
}
#include "panels.h"
#include "thin.h"

/* A bfloat16 product forward multiplies by the levels times this, rounded, and its sums by the inverse. The roundings of
 * NF4's levels as they are add up where x has one sign, to 1.8e-4 a weight (of weights from a normal distribution;
 * 1.4e-4 to 1.7e-4 of a model's): seven times the error of W rounded weight by weight, in 4096 columns. Of these they
 * cancel to 5e-6 (3e-5), and are smaller: 3.7e-4 against 5.4e-4, the roots of their mean squares. */
#define STRETCH 1.24184f
TARGET_BF16 INLINE __m512i stretched_levels(const float *levels) {
    __m512 stretched = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(STRETCH));
    return (__m512i)_mm512_cvtne2ps_pbh(stretched, stretched);
}

/* Byte i of each of a register's 32-bit words -> its high nibble in the lower half of the word, its low one in the
 * upper half: the indices of two look-ups in a table of 16-bit numbers. */
TARGET_BF16 INLINE __m512i pair_bits(int byte) {
    return _mm512_add_epi8(_mm512_set1_epi64(0x0020002400000004), _mm512_set1_epi8((char)(8 * byte)));
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

TARGET_BF16 static void strip_bfloat16(const Product *p, int64_t strip, int64_t m0, int64_t m1) {
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
    add_low_rank(p, strip, m0, m1, (float *)panel, sums);
    write_strip(p, strip, m0, m1, sums);
}
/* Nibble i of half a lane is weight i ^ 1 of its 4. `table` has the levels twice: of an index's 5 bits the highest is
 * the next weight's. */
TARGET_BF16 INLINE void group_bfloat16(Run *run, int64_t g, __m512i table, int r, const int R, const int M) {
    __m512i words[ROWS], weights[ROWS];
    __m512 sums[THIN_ROWS][ROWS] = {{{0}}};
    const char *x = run->x + g * GROUP * 2;
    load_group(run, g, words, r, R);
#pragma GCC unroll 4
    for (int nibble = 0; nibble < 4; nibble++) {
#pragma GCC unroll 4
        for (int i = 0; i < R; i++)
            weights[i] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 4 * nibble), table);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            __m512bh other = (__m512bh)_mm512_loadu_si512(x + m * run->stride + 64 * nibble);
#pragma GCC unroll 4
            for (int i = 0; i < R; i++)
                sums[m][i] = _mm512_dpbf16_ps(sums[m][i], (__m512bh)weights[i], other);
        }
    }
    add_scaled(run, g, sums, r, R, M);
}

TARGET_BF16 INLINE void groups_bfloat16(Run *run, const int M) {
    __m512i table = stretched_levels(run->levels);
    /* With four rows of x half of W's at a time, whose sums leave registers for the rest: a fifth faster. */
    const int R = M > 3 ? ROWS / 2 : ROWS;
    for (int64_t g = 0; g < run->groups; g++) {
#pragma GCC unroll 1
        for (int r = 0; r < ROWS; r += R)
            group_bfloat16(run, g, table, r, R, M);
    }
}

static TARGET_BF16 void run_bfloat16(Run *run, int64_t rows) {
    switch (rows) {
    case 1: groups_bfloat16(run, 1); break;
    case 2: groups_bfloat16(run, 2); break;
    case 3: groups_bfloat16(run, 3); break;
    case 4: groups_bfloat16(run, 4); break;
    }
}

/* x as a run reads it in bfloat16; zeros after the last number of a row. */
static void spread_bfloat16(const Thin *t) {
    int64_t columns = t->w->columns;
    for (int64_t m = 0; m < t->rows; m++) {
        const uint16_t *from = (const uint16_t *)t->x + m * columns;
        uint16_t *to = (uint16_t *)t->spread + m * t->padded;
        for (int64_t k = 0; k < t->padded; k++)
            to[spread_place(k, 2 * LANES)] = k < columns ? from[k] : 0;
    }
}

TARGET_BF16 static void thin_bfloat16(const Thin *t, int64_t strip, float *scales) {
    thin_rows(t, strip, scales, 2, run_bfloat16, 1 / STRETCH);
}

static const Kernels KERNELS = {GROUP, strip_float32, spread_float32, thin_low, thin_float32, widen, thin_dense, 0, 0, 0};
static const Kernels KERNELS_BF16 = {GROUP, strip_float32, spread_float32, thin_low,        thin_float32,  widen,
                                     thin_dense,     strip_bfloat16, spread_bfloat16, thin_bfloat16};
const Kernels *avx512_kernels(int bfloat16) { return bfloat16 ? &KERNELS_BF16 : &KERNELS; }
#endif
