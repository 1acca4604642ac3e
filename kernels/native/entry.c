/* The functions that Python calls through ctypes. There is nothing of Python in here: one library serves every
 * version of it. A call is an array of 64-bit integers, which Python packs at once: ctypes takes longer to convert a
 * dozen arguments than a small layer takes to multiply. */
#include "nf4.h"

#ifdef _OPENMP
#include <omp.h>
#else
/* A compiler without OpenMP leaves the pragmas out: one thread does all. */
#define omp_get_thread_num() 0
#endif
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
/* Raised with every change to the calls below; `native.py` has the same number, and refuses another. */
#define ABI 6

/* Weights that are worth a second thread: below, waking one takes longer. */
#define WEIGHTS_PER_THREAD (1 << 15)
/* The same for a few rows of x, where a weight takes a thirtieth of a nanosecond; and weights of A. */
#define THIN_WEIGHTS_PER_THREAD (1 << 17)
#define LOW_FOR_ONE_THREAD (1 << 17)

EXPORT int minipeft_abi(void) { return ABI; }

/* 1 if several threads can work at one call. */
EXPORT int minipeft_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* The highest level that this processor has. */
EXPORT int minipeft_level(void) {
#ifdef MINIPEFT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") ? AVX512_BF16 : AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return AVX2;
#endif
#ifdef MINIPEFT_ARM
    return NEON;
#else
    return SCALAR;
#endif
}

static Weight weight_of(const int64_t *call) {
    Weight w = {(const uint8_t *)call[0], (const void *)call[1], (const float *)call[2], (const float *)call[3],
                (const float *)call[4],   (const float *)call[5], call[6],                call[7],
                call[8],                  call[9],                NF4};
    return w;
}

/* As many of `threads` as have `least_each` of the work to do. */
static int threads_for(int64_t work, int64_t least_each, int64_t threads) {
    int64_t worth = work / least_each;
    return (int)(worth < 1 ? 1 : worth < threads ? worth : threads);
}

/* call: the weight (10), first, last, out, dtype, level, threads. */
EXPORT void minipeft_decode(const int64_t *call) {
    Weight w = weight_of(call);
    int64_t first = call[10], last = call[11];
    char *out = (char *)call[12];
    int dtype = (int)call[13], level = (int)call[14];
    int64_t bytes = dtype == FLOAT32 ? 4 : 2;
    int threads = threads_for(last - first, WEIGHTS_PER_THREAD, call[15]);
    /* Whole blocks a thread, so that none is decoded twice. */
    int64_t blocks = (last - first + w.blocksize - 1) / w.blocksize;
    int64_t each = (blocks + threads - 1) / threads * w.blocksize;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
    for (int i = 0; i < threads; i++) {
        int64_t from = first + i * each, to = from + each < last ? from + each : last;
        if (from < to)
            decode(&w, from, to, out + (from - first) * bytes, dtype, level);
    }
}

/* The products of a level, or NULL. */
static const Kernels *kernels_of(int level) {
#ifdef MINIPEFT_X86
    if (level >= AVX512)
        return avx512_kernels(level == AVX512_BF16);
    if (level == AVX2)
        return avx2_kernels();
#endif
#ifdef MINIPEFT_ARM
    if (level == NEON)
        return neon_kernels();
#endif
    (void)level;
    return 0;
}

/* `m` rows of p's a, in bfloat16 pairs (half) or in float32. */
static void run_product(const Kernels *kernels, const Product *p, int64_t m, int half, int64_t most_threads) {
    const Weight *w = p->w;
    int64_t strips = ((p->backward ? w->columns : w->rows) + STRIP - 1) / STRIP;
    int64_t parts = (m + MAX_ROWS - 1) / MAX_ROWS, each = (m + parts - 1) / parts;
    each = (each + 5) / 6 * 6;
    void (*strip)(const Product *, int64_t, int64_t, int64_t) = half ? kernels->strip_bfloat16 : kernels->strip;
    int threads = threads_for(w->rows * w->columns * (1 + m / 8), WEIGHTS_PER_THREAD, most_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
    for (int64_t i = 0; i < strips * parts; i++) {
        int64_t m0 = i / strips * each, m1 = m0 + each < m ? m0 + each : m;
        if (m0 < m1)
            strip(p, i % strips, m0, m1);
    }
}

/* Numbers in the scratch that each thread needs for the scales of rows of W: THIN_ROWS of them, and whole registers. */
static int64_t thin_scales(const Weight *w) {
    if (w->dtype != NF4)
        return 0;
    int64_t least_count = THIN_ROWS * (w->columns / w->blocksize);
    return (least_count < THIN_SCALES ? THIN_SCALES : least_count) + 16;
}

/* 0 if there is no memory. */
static int run_thin(const Kernels *kernels, Thin *t, int64_t most_threads) {
    const Weight *w = t->w;
    /* Without instructions for bfloat16, such an x is spread as float32; so it is for a dense W. */
    int half = t->dtype == BFLOAT16 && kernels->rows_bfloat16 != 0;
    void (*spread)(const Thin *) = w->dtype != NF4 ? kernels->widen : half ? kernels->spread_bfloat16 : kernels->spread;
    void (*multiply)(const Thin *, int64_t, float *) =
        w->dtype != NF4 ? kernels->dense_rows : half ? kernels->rows_bfloat16 : kernels->rows;
    t->padded = (w->columns + kernels->group - 1) / kernels->group * kernels->group;
    int64_t bytes = t->rows * t->padded * 4;
    int threads = threads_for(w->rows * w->columns * (1 + t->rows / 2), THIN_WEIGHTS_PER_THREAD, most_threads);
    int64_t strips = (w->rows + THIN_STRIP - 1) / THIN_STRIP, scales = thin_scales(w);
    int64_t floats = (threads * scales + t->rows * t->rank + 15) / 16 * 16;
    char *scratch = aligned_alloc(64, bytes + floats * 4);
    if (!scratch)
        return 0;
    t->spread = scratch;
    float *made = (float *)(scratch + bytes);
    t->low = made + threads * scales;
    /* What all of W's rows need: by one thread, unless that takes longer than waiting for each other. */
    int64_t own = t->rank * w->columns < LOW_FOR_ONE_THREAD ? t->rank : 0;
    spread(t);
    for (int64_t j = 0; j < own; j++)
        kernels->low(t, j);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (own < t->rank) {
#pragma omp for schedule(dynamic, 4)
            for (int64_t j = 0; j < t->rank; j++)
                kernels->low(t, j);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t strip = 0; strip < strips; strip++)
            multiply(t, strip, made + omp_get_thread_num() * scales);
    }
    free(scratch);
    return 1;
}

/* call: x, out, rows of x, dtype of x, dtype of out, A, B, rank, scaling (a double's bits). */
static Thin thin_of(const int64_t *call, const Weight *w) {
    double scaling;
    memcpy(&scaling, call + 8, sizeof scaling);
    Thin t = {.w = w, .x = (const void *)call[0], .out = (void *)call[1], .rows = call[2], .dtype = (int)call[3],
              .out_dtype = (int)call[4], .lora_A = (const float *)call[5], .lora_B = (const float *)call[6],
              .rank = call[7], .scaling = (float)scaling};
    return t;
}

/* call: the weight (10), a, out, rows of a, backward, dtype of a, dtype of out, threads, level, low, up, rank. 1 if it was done, 0 if
 * not: the level has no such product. */
EXPORT int minipeft_product(const int64_t *call) {
    const Kernels *kernels = kernels_of((int)call[17]);
    int half = call[14] == BFLOAT16;
    if (!kernels || (half && !kernels->strip_bfloat16))
        return 0;
    Weight w = weight_of(call);
    Product p = {&w, (const void *)call[10], (void *)call[11], (int)call[13], (int)call[15],
                 (const float *)call[18], (const float *)call[19], call[20]};
    run_product(kernels, &p, call[12], half, call[16]);
    return 1;
}

/* call: the weight (10), threads, level, and as `thin_of`, of up to THIN_ROWS rows of x. 1 if it was done, 0 if not: the
 * level has no such product, or there is no memory. */
EXPORT int minipeft_thin(const int64_t *call) {
    const Kernels *kernels = kernels_of((int)call[11]);
    Weight w = weight_of(call);
    Thin t = thin_of(call + 12, &w);
    return kernels && run_thin(kernels, &t, call[10]);
}

/* The same of a dense weight. call: W, its rows, columns (a multiple of 32) and dtype; threads, level, backward, and as
 * `thin_of`. Backward, or of more than THIN_ROWS rows of x, without an update and of float32 x. */
EXPORT int minipeft_dense(const int64_t *call) {
    const Kernels *kernels = kernels_of((int)call[5]);
    if (!kernels)
        return 0;
    Weight w = {.codes = (const uint8_t *)call[0], .rows = call[1], .columns = call[2], .dtype = (int)call[3]};
    Thin t = thin_of(call + 7, &w);
    if (t.rows <= THIN_ROWS && !call[6])
        return run_thin(kernels, &t, call[4]);
    Product p = {.w = &w, .a = t.x, .out = t.out, .backward = (int)call[6], .out_dtype = t.out_dtype};
    run_product(kernels, &p, t.rows, 0, call[4]);
    return 1;
}
