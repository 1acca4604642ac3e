/* y = x W^T, or with LoRA's update x W^T + s (x A^T) B^T, for up to THIN_ROWS rows of x, as when a model generates token
 * by token: the loops, which each level's file includes after its few instructions.
 *
 * Each weight is used once or a few times, so what counts is reading W: in the order in which it lies, a register of
 * codes at a time. A lane has 8 neighbours in its 32 bits, which are looked up where they lie, without transposing or
 * unpacking anything: x is laid out to meet them instead, once for all rows of W (`spread`). A block's sum, which lies
 * over its lanes, is multiplied by the block's scale; LoRA's update goes to the same lanes, and they are added up at the
 * end of a row.
 */
#include "scales.h"

#include <string.h>

#define GROUP (8 * LANES) /* weights in a register of codes */
#define ROWS 4            /* of W at a time */
#define AHEAD 4096        /* bytes: what is far enough ahead to arrive from memory in time */
#define X_NEAR 16384      /* bytes of x that stay in the first-level cache beside a dense W's rows */

/* ROWS rows of W. */
typedef struct {
    const uint8_t *codes[ROWS];
    const float *scales[ROWS];
    int64_t ahead;  /* bytes from codes to those that are read after these rows */
    const char *x;  /* spread */
    int64_t stride; /* bytes from a row of x to the next */
    int64_t groups;
    int last;       /* the lanes that the last group fills */
    int shift;      /* a block is 2^shift weights */
    const float *levels;
    float sums[THIN_ROWS][ROWS][LANES]; /* of each row of x with each of W, over lanes */
} Run;

INLINE int lanes_of(const Run *run, int64_t g) { return g + 1 < run->groups ? LANES : run->last; }

/* The codes of group g in R rows from row r on. */
TARGET INLINE void load_group(const Run *run, int64_t g, Words *words, int r, const int R) {
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
        const uint8_t *codes = run->codes[r + i] + g * GROUP / 2;
        words[i] = load_words(codes, lanes_of(run, g));
        /* The processor's own prefetching does not see that the next rows follow: with W in memory, twice as fast. */
        __builtin_prefetch(codes + run->ahead);
    }
}

/* The group's sums, times the scales of the blocks that their lanes are in, to the run's. */
TARGET INLINE void add_scaled(Run *run, int64_t g, Floats sums[][ROWS], int r, const int R, const int M) {
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
        /* Zero in lanes without a weight: what lies there is another row's, or nothing. */
        Floats scale = spread_scales(run->scales[r + i] + (g * GROUP >> run->shift), run->shift, lanes_of(run, g));
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            float *total = run->sums[m][r + i];
            store(total, multiply_add(sums[m][i], scale, load(total)));
        }
    }
}

/* Nibble i of a lane is weight i ^ 1 of its 8: the earlier weight of a byte is in its high half. */
TARGET INLINE void group_float32(Run *run, int64_t g, Table levels, int r, const int R, const int M) {
    Words words[ROWS];
    Floats weights[ROWS], sums[THIN_ROWS][ROWS];
    const float *x = (const float *)run->x + g * GROUP;
    load_group(run, g, words, r, R);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int i = 0; i < R; i++)
            sums[m][i] = broadcast(0);
#pragma GCC unroll 8
    for (int nibble = 0; nibble < 8; nibble++) {
#pragma GCC unroll 4
        for (int i = 0; i < R; i++)
            weights[i] = look_up(levels, words[i], 4 * nibble);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            Floats other = load(x + m * run->stride / 4 + LANES * nibble);
#pragma GCC unroll 4
            for (int i = 0; i < R; i++)
                sums[m][i] = multiply_add(weights[i], other, sums[m][i]);
        }
    }
    add_scaled(run, g, sums, r, R, M);
}

TARGET INLINE void groups_float32(Run *run, const int M) {
    Table levels = table_of(run->levels);
    const int R = ROWS_AT_ONCE(M); /* of W's, whose sums leave registers for the rest */
    for (int64_t g = 0; g < run->groups; g++) {
#pragma GCC unroll 1
        for (int r = 0; r < ROWS; r += R)
            group_float32(run, g, levels, r, R, M);
    }
}

TARGET static void run_float32(Run *run, int64_t rows) {
    switch (rows) {
    case 1: groups_float32(run, 1); break;
    case 2: groups_float32(run, 2); break;
    case 3: groups_float32(run, 3); break;
    case 4: groups_float32(run, 4); break;
    }
}

INLINE float number_of(const Thin *t, int64_t at) {
    return t->dtype == FLOAT32 ? ((const float *)t->x)[at] : from_bfloat16(((const uint16_t *)t->x)[at]);
}

/* Where number k of a row is for a run: in each group, number i of every one of its `lanes` lanes together. */
INLINE int64_t spread_place(int64_t k, int64_t lanes) {
    int64_t own = GROUP / lanes;
    return k / GROUP * GROUP + (k % own ^ 1) * lanes + k % GROUP / own;
}

/* x as a run reads it in float32; zeros after the last number of a row. */
static void spread_float32(const Thin *t) {
    int64_t columns = t->w->columns;
    for (int64_t m = 0; m < t->rows; m++) {
        float *to = (float *)t->spread + m * t->padded;
        for (int64_t k = 0; k < t->padded; k++)
            to[spread_place(k, LANES)] = k < columns ? number_of(t, m * columns + k) : 0;
    }
}

TARGET INLINE Floats load_x(const Thin *t, int64_t at) {
    return t->dtype == FLOAT32 ? load((const float *)t->x + at) : load_bfloat16((const uint16_t *)t->x + at);
}

/* Row j of A against x. W's columns are whole blocks: a multiple of 32. */
TARGET static void thin_low(const Thin *t, int64_t j) {
    int64_t columns = t->w->columns;
    const float *row = t->lora_A + j * columns;
    for (int64_t m = 0; m < t->rows; m++) {
        Floats a = broadcast(0), b = a;
        for (int64_t k = 0; k < columns; k += 2 * LANES) {
            a = multiply_add(load(row + k), load_x(t, m * columns + k), a);
            b = multiply_add(load(row + k + LANES), load_x(t, m * columns + k + LANES), b);
        }
        t->low[m * t->rank + j] = t->scaling * sum_of_lanes(add(a, b));
    }
}

/* Row n of B against s x A^T, over lanes, added to a row's sums. */
TARGET INLINE void add_update(const Thin *t, int64_t n, int64_t m, float *sums) {
    Floats sum = load(sums);
    for (int64_t j = 0; j < t->rank; j += LANES) {
        int64_t some = least(t->rank - j, LANES);
        __builtin_prefetch((const char *)(t->lora_B + n * t->rank + j) + AHEAD);
        Floats low = load_some(t->low + m * t->rank + j, some);
        sum = multiply_add(load_some(t->lora_B + n * t->rank + j, some), low, sum);
    }
    store(sums, sum);
}

/* The sums of rows first.. of W, with LoRA's update; `back` is what they are to be multiplied by. */
TARGET INLINE void write_rows(const Thin *t, Run *run, int64_t first, float back) {
    int64_t rows = t->w->rows, there = least(rows - first, ROWS);
    for (int64_t m = 0; m < t->rows; m++) {
        for (int64_t r = 0; r < ROWS && back != 1; r++)
            store(run->sums[m][r], multiply(load(run->sums[m][r]), broadcast(back)));
        for (int64_t r = 0; r < there && t->rank; r++)
            add_update(t, first + r, m, run->sums[m][r]);
        float y[ROWS];
        add_lanes(run->sums[m], y);
        int64_t at = m * rows + first;
        if (t->out_dtype == FLOAT32)
            for (int64_t r = 0; r < there; r++)
                ((float *)t->out)[at + r] = y[r];
        else
            for (int64_t r = 0; r < there; r++)
                ((uint16_t *)t->out)[at + r] = to_bfloat16(y[r]);
    }
}

/* THIN_STRIP rows of W; x is spread in numbers of `bytes` bytes, and `multiply_run` takes it so. */
TARGET INLINE void thin_rows(const Thin *t, int64_t strip, float *scales, int64_t bytes,
                             void (*multiply_run)(Run *, int64_t), float back) {
    const Weight *w = t->w;
    int64_t per_row = w->columns / w->blocksize, end = least(w->rows, (strip + 1) * THIN_STRIP);
    int64_t batch = per_row * ROWS < THIN_SCALES ? THIN_SCALES / per_row / ROWS * ROWS : ROWS, first = strip * THIN_STRIP;
    Run run;
    run.ahead = ROWS * w->columns / 2 < AHEAD ? AHEAD : ROWS * w->columns / 2;
    run.x = t->spread;
    run.stride = t->padded * bytes;
    run.groups = t->padded / GROUP;
    run.last = w->columns % GROUP ? w->columns % GROUP / 8 : LANES;
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
        multiply_run(&run, t->rows);
        write_rows(t, &run, first, back);
    }
}

TARGET static void thin_float32(const Thin *t, int64_t strip, float *scales) {
    thin_rows(t, strip, scales, 4, run_float32, 1);
}

/* x of a dense W in float32, 2 LANES numbers at a time: in their order, or for a bfloat16 W, whose words have two
 * numbers each, the even ones first. */
static void widen(const Thin *t) {
    const int64_t pair = 2 * LANES;
    for (int64_t i = 0; i < t->rows * t->w->columns; i++) {
        int64_t within = t->w->dtype == FLOAT32 ? i % pair : i % 2 * LANES + i % pair / 2;
        ((float *)t->spread)[i / pair * pair + within] = number_of(t, i);
    }
}

/* 2 LANES numbers of a row of a dense W from number k on, ordered as `widen` does. */
TARGET INLINE void dense_weights(const uint8_t *row, int64_t k, const int dtype, Floats *pair) {
    if (dtype == FLOAT32) {
        pair[0] = load((const float *)row + k);
        pair[1] = load((const float *)row + k + LANES);
    } else {
        Words words = load_words(row + 2 * k, LANES);
        pair[0] = low_half(words);
        pair[1] = high_half(words);
    }
}

/* 2 LANES numbers of R rows of a dense W, `stride` bytes from each other, against M rows of x: added to every row's
 * sums `at` and at + 1 of so many. */
TARGET INLINE void dense_step(const uint8_t *rows, int64_t stride, const float *x, int64_t columns, int64_t k,
                              const int dtype, const int R, const int M, const int at, const int many,
                              Floats sums[][2][4]) {
    Floats pair[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < R; i++)
        dense_weights(rows + i * stride, k, dtype, pair[i]);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            Floats other = load(x + m * columns + k + half * LANES);
#pragma GCC unroll 2
            for (int i = 0; i < R; i++) {
                Floats *sum = &sums[m][i][(at + half) % many];
                *sum = multiply_add(pair[i][half], other, *sum);
            }
        }
    }
}

/* R rows of a dense W against M rows of x. W's columns are a multiple of 2 LANES. */
TARGET INLINE void dense_run(const Thin *t, const uint8_t *rows, int64_t stride, float sums[][ROWS][LANES], int r,
                             const int dtype, const int R, const int M) {
    /* A multiply-add waits for the one before it: so many sums of a pair of rows as make eight in all, or four. */
    const int many = M * R == 1 ? 4 : M * R > 4 ? 1 : 8 / (M * R) > 2 ? 2 : 8 / (M * R);
    Floats own[THIN_ROWS][2][4];
    const float *x = (const float *)t->spread;
    int64_t columns = t->w->columns, k = 0;
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int i = 0; i < R; i++)
#pragma GCC unroll 4
            for (int j = 0; j < many; j++)
                own[m][i][j] = broadcast(0);
    for (; k + 4 * LANES <= columns; k += 4 * LANES) {
        dense_step(rows, stride, x, columns, k, dtype, R, M, 0, many, own);
        dense_step(rows, stride, x, columns, k + 2 * LANES, dtype, R, M, 2, many, own);
    }
    if (k < columns)
        dense_step(rows, stride, x, columns, k, dtype, R, M, 0, many, own);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 2
        for (int i = 0; i < R; i++) {
#pragma GCC unroll 3
            for (int j = 1; j < many; j++)
                own[m][i][0] = add(own[m][i][0], own[m][i][j]);
            store(sums[m][r + i], own[m][i][0]);
        }
    }
}

TARGET INLINE void dense_rows(const Thin *t, int64_t strip, const int R, const int M, const int dtype) {
    const Weight *w = t->w;
    int64_t end = least(w->rows, (strip + 1) * THIN_STRIP), stride = row_bytes(w);
    Run run;
    for (int64_t first = strip * THIN_STRIP; first < end; first += ROWS) {
#pragma GCC unroll 1
        for (int r = 0; r < ROWS; r += R) {
            /* Beyond the last row that is taken again. */
            const uint8_t *rows = w->codes + least(first + r, end - 1) * stride;
            dense_run(t, rows, first + r + 1 < end ? stride : 0, run.sums, r, dtype, R, M);
        }
        write_rows(t, &run, first, 1);
    }
}

/* W's rows meet x one after the other: of several that are read at once, memory gives half as much where they are short.
 * But two at a time where x is longer than the first-level cache, since it is then read half as often. */
TARGET INLINE void dense_strip(const Thin *t, int64_t strip, const int M, const int dtype) {
    if (M > 1 && t->rows * t->w->columns * 4 > X_NEAR)
        dense_rows(t, strip, 2, M, dtype);
    else
        dense_rows(t, strip, 1, M, dtype);
}

TARGET static void thin_dense(const Thin *t, int64_t strip, float *scales) {
    int single = t->w->dtype == FLOAT32;
    switch (t->rows) {
    case 1: single ? dense_strip(t, strip, 1, FLOAT32) : dense_strip(t, strip, 1, BFLOAT16); break;
    case 2: single ? dense_strip(t, strip, 2, FLOAT32) : dense_strip(t, strip, 2, BFLOAT16); break;
    case 3: single ? dense_strip(t, strip, 3, FLOAT32) : dense_strip(t, strip, 3, BFLOAT16); break;
    case 4: single ? dense_strip(t, strip, 4, FLOAT32) : dense_strip(t, strip, 4, BFLOAT16); break;
    }
    (void)scales;
}
