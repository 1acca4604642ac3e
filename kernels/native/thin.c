/* y = x W^T, or with LoRA's update x W^T + s (x A^T) B^T, for up to THIN_ROWS rows of x, as when a model generates token
 * by token.
 *
 * Each weight is used once or a few times, so what counts is reading W: in the order in which it lies, 128 weights a
 * register. A lane has 8 neighbours in its 32 bits, which are looked up where they lie, without transposing or unpacking
 * anything: x is laid out to meet them instead, once for all rows of W (`spread`). A block's sum, which lies over its
 * lanes, is multiplied by the block's scale; LoRA's update goes to the same lanes, and they are added up at the end of
 * a row.
 */
#include "scales.h"

#ifdef MINIPEFT_X86
#include <string.h>

#define GROUP 128 /* weights in a register of codes */
#define ROWS 4    /* of W at a time */
#define AHEAD 4096 /* bytes: what is far enough ahead to arrive from memory in time */
#define SCALES 1024 /* made at a time, unless ROWS rows have more */

/* ROWS rows of W. */
typedef struct {
    const uint8_t *codes[ROWS];
    const float *scales[ROWS];
    int64_t ahead;  /* bytes from codes to those that are read after these rows */
    const char *x;  /* spread */
    int64_t stride; /* bytes from a row of x to the next */
    int64_t groups;
    __mmask16 last; /* the lanes that the last group fills */
    int shift;      /* a block is 2^shift weights */
    const float *levels;
    float sums[THIN_ROWS][ROWS][16]; /* of each row of x with each of W, over lanes */
} Run;

/* The codes of group g in R rows from row r on. */
TARGET_AVX512 INLINE void load_words(const Run *run, int64_t g, __m512i *words, int r, const int R) {
    __mmask16 lanes = g + 1 < run->groups ? 0xffff : run->last;
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
        const uint8_t *codes = run->codes[r + i] + g * GROUP / 2;
        words[i] = _mm512_maskz_loadu_epi32(lanes, codes);
        /* The processor's own prefetching does not see that the next rows follow: with W in memory, twice as fast. */
        _mm_prefetch((const char *)codes + run->ahead, _MM_HINT_T0);
    }
}

/* The group's sums, times the scales of the blocks that their lanes are in, to the run's. */
TARGET_AVX512 INLINE void add_scaled(Run *run, int64_t g, __m512 sums[][ROWS], int r, const int R, const int M) {
    __mmask16 lanes = g + 1 < run->groups ? 0xffff : run->last;
    __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i block = _mm512_srl_epi32(_mm512_slli_epi32(lane, 3), _mm_cvtsi32_si128(run->shift));
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
        /* Zero in lanes without a weight: what lies there is another row's, or nothing. */
        __m512 near = _mm512_loadu_ps(run->scales[r + i] + (g * GROUP >> run->shift));
        __m512 scale = _mm512_maskz_permutexvar_ps(lanes, block, near);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            float *total = run->sums[m][r + i];
            _mm512_storeu_ps(total, _mm512_fmadd_ps(sums[m][i], scale, _mm512_loadu_ps(total)));
        }
    }
}

/* Nibble i of a lane is weight i ^ 1 of its 8: the earlier weight of a byte is in its high half. */
TARGET_AVX512 INLINE void group_float32(Run *run, int64_t g, __m512 levels, int r, const int R, const int M) {
    __m512i words[ROWS];
    __m512 weights[ROWS], sums[THIN_ROWS][ROWS] = {{{0}}};
    const char *x = run->x + g * GROUP * 4;
    load_words(run, g, words, r, R);
#pragma GCC unroll 8
    for (int nibble = 0; nibble < 8; nibble++) {
#pragma GCC unroll 4
        for (int i = 0; i < R; i++)
            weights[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(words[i], 4 * nibble), levels);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            __m512 other = _mm512_loadu_ps(x + m * run->stride + 64 * nibble);
#pragma GCC unroll 4
            for (int i = 0; i < R; i++)
                sums[m][i] = _mm512_fmadd_ps(weights[i], other, sums[m][i]);
        }
    }
    add_scaled(run, g, sums, r, R, M);
}

/* Nibble i of half a lane is weight i ^ 1 of its 4. `table` has the levels twice: of an index's 5 bits the highest is
 * the next weight's. */
TARGET_BF16 INLINE void group_bfloat16(Run *run, int64_t g, __m512i table, int r, const int R, const int M) {
    __m512i words[ROWS], weights[ROWS];
    __m512 sums[THIN_ROWS][ROWS] = {{{0}}};
    const char *x = run->x + g * GROUP * 2;
    load_words(run, g, words, r, R);
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

TARGET_AVX512 INLINE void groups_float32(Run *run, const int M) {
    __m512 levels = _mm512_loadu_ps(run->levels);
    for (int64_t g = 0; g < run->groups; g++)
        group_float32(run, g, levels, 0, ROWS, M);
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

static TARGET_AVX512 void run_float32(Run *run, int64_t rows) {
    switch (rows) {
    case 1: groups_float32(run, 1); break;
    case 2: groups_float32(run, 2); break;
    case 3: groups_float32(run, 3); break;
    case 4: groups_float32(run, 4); break;
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

/* x as a run reads it: in each group number i of every lane (of bfloat16, half a lane) together; zeros after the last. */
INLINE void spread(const Thin *t, const int bytes) {
    int64_t columns = t->w->columns, own = 2 * bytes, lanes = 64 / bytes;
    for (int64_t m = 0; m < t->rows; m++) {
        const char *from = (const char *)t->x + m * columns * bytes;
        char *to = t->spread + m * t->padded * bytes;
        for (int64_t k = 0; k < columns; k++)
            memcpy(to + (k / GROUP * GROUP + (k % own ^ 1) * lanes + k % GROUP / own) * bytes, from + k * bytes, bytes);
        for (int64_t k = columns; k < t->padded; k++)
            memset(to + (k / GROUP * GROUP + (k % own ^ 1) * lanes + k % GROUP / own) * bytes, 0, bytes);
    }
}

TARGET_AVX512 INLINE __m512 load_float32(const Thin *t, int64_t at) {
    if (t->dtype == FLOAT32)
        return _mm512_loadu_ps((const float *)t->x + at);
    __m256i bits = _mm256_loadu_si256((const __m256i *)((const uint16_t *)t->x + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

void thin_start(const Thin *t) {
    if (t->dtype == FLOAT32)
        spread(t, 4);
    else
        spread(t, 2);
}

/* Row j of A against x. W's columns are whole blocks: a multiple of 32. */
TARGET_AVX512 void thin_low(const Thin *t, int64_t j) {
    int64_t columns = t->w->columns;
    const float *row = t->lora_A + j * columns;
    for (int64_t m = 0; m < t->rows; m++) {
        __m512 a = _mm512_setzero_ps(), b = a;
        for (int64_t k = 0; k < columns; k += 32) {
            a = _mm512_fmadd_ps(_mm512_loadu_ps(row + k), load_float32(t, m * columns + k), a);
            b = _mm512_fmadd_ps(_mm512_loadu_ps(row + k + 16), load_float32(t, m * columns + k + 16), b);
        }
        t->low[m * t->rank + j] = t->scaling * _mm512_reduce_add_ps(_mm512_add_ps(a, b));
    }
}

/* Row n of B against s x A^T, over lanes, added to a row's sums. */
TARGET_AVX512 INLINE void add_update(const Thin *t, int64_t n, int64_t m, float *sums) {
    __m512 sum = _mm512_loadu_ps(sums);
    for (int64_t j = 0; j < t->rank; j += 16) {
        __mmask16 some = t->rank - j < 16 ? (1 << (t->rank - j)) - 1 : 0xffff;
        _mm_prefetch((const char *)(t->lora_B + n * t->rank + j) + AHEAD, _MM_HINT_T0);
        __m512 low = _mm512_maskz_loadu_ps(some, t->low + m * t->rank + j);
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(some, t->lora_B + n * t->rank + j), low, sum);
    }
    _mm512_storeu_ps(sums, sum);
}

/* The lanes of each of ROWS registers added up. */
TARGET_AVX512 INLINE __m128 add_lanes(float sums[][16]) {
    __m512 s[ROWS];
    for (int r = 0; r < ROWS; r++)
        s[r] = _mm512_loadu_ps(sums[r]);
    __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
    __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
    __m512d low = _mm512_unpacklo_pd((__m512d)a, (__m512d)b), high = _mm512_unpackhi_pd((__m512d)a, (__m512d)b);
    __m512 c = _mm512_add_ps((__m512)low, (__m512)high);
    __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    return _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
}

/* The sums of rows first.. of W, with LoRA's update. */
TARGET_AVX512 INLINE void write_rows(const Thin *t, Run *run, int64_t first) {
    int64_t rows = t->w->rows, there = least(rows - first, ROWS);
    __m512 back = _mm512_set1_ps(1 / STRETCH);
    for (int64_t m = 0; m < t->rows; m++) {
        if (t->dtype == BFLOAT16)
            for (int64_t r = 0; r < ROWS; r++)
                _mm512_storeu_ps(run->sums[m][r], _mm512_mul_ps(_mm512_loadu_ps(run->sums[m][r]), back));
        for (int64_t r = 0; r < there && t->rank; r++)
            add_update(t, first + r, m, run->sums[m][r]);
        __m128 y = add_lanes(run->sums[m]);
        int64_t at = m * rows + first;
        if (t->out_dtype == FLOAT32)
            _mm_mask_storeu_ps((float *)t->out + at, (1 << there) - 1, y);
        else
            for (int64_t r = 0; r < there; r++)
                ((uint16_t *)t->out)[at + r] = to_bfloat16(y[r]);
    }
}

int64_t thin_scales(const Weight *w) {
    int64_t least_count = ROWS * (w->columns / w->blocksize);
    return (least_count < SCALES ? SCALES : least_count) + 16;
}

TARGET_AVX512 void thin_strip(const Thin *t, int64_t strip, float *scales) {
    const Weight *w = t->w;
    int64_t per_row = w->columns / w->blocksize, end = least(w->rows, (strip + 1) * THIN_STRIP);
    int64_t batch = per_row * ROWS < SCALES ? SCALES / per_row / ROWS * ROWS : ROWS, first = strip * THIN_STRIP;
    Run run;
    run.ahead = ROWS * w->columns / 2 < AHEAD ? AHEAD : ROWS * w->columns / 2;
    run.x = t->spread;
    run.stride = t->padded * (t->dtype == FLOAT32 ? 4 : 2);
    run.groups = t->padded / GROUP;
    run.last = w->columns % GROUP ? (1 << w->columns % GROUP / 8) - 1 : 0xffff;
    run.shift = __builtin_ctzll(w->blocksize);
    run.levels = w->levels;
    for (int64_t start = first; first < end; first += ROWS) {
        /* Many rows' scales at a time: they follow each other. */
        if ((first - strip * THIN_STRIP) % batch == 0) {
            start = first;
            scales_of_blocks(w, start * per_row, least(start + batch, end) * per_row, scales);
        }
        for (int64_t r = 0; r < ROWS; r++) {
            /* Beyond the last row that is taken again. */
            int64_t row = least(first + r, end - 1);
            run.codes[r] = w->codes + row * w->columns / 2;
            run.scales[r] = scales + (row - start) * per_row;
        }
        memset(run.sums, 0, t->rows * sizeof run.sums[0]);
        (t->dtype == FLOAT32 ? run_float32 : run_bfloat16)(&run, t->rows);
        write_rows(t, &run, first);
    }
}
#endif
