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
