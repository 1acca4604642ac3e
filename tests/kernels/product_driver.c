/* `decode_driver.c` with an argument: runs the compiled products with random numbers at the processor's own level, so that they can be tried on one that is
 * emulated, and compares them with plain C in double. Out: the level, and the largest error of each kind of product in
 * units of the largest sum of its terms' magnitudes. */
#include "../../kernels/native/nf4.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int minipeft_level(void);
int minipeft_product(const int64_t *call);
int minipeft_thin(const int64_t *call);
int minipeft_dense(const int64_t *call);

static uint32_t state = 1;
static float number(void) {
    state = state * 1664525u + 1013904223u;
    return (float)(int32_t)state / 2147483648.0f;
}
static float *numbers(int64_t count) {
    float *out = malloc((count + 1) * sizeof(float));
    for (int64_t i = 0; i < count; i++)
        out[i] = number();
    return out;
}

/* The largest |y - a w^T - s (a A^T) B^T| for a (m, k) and w (n, k), over the largest sum of magnitudes. */
static double error(const float *y, const float *a, const float *w, int64_t m, int64_t n, int64_t k, const float *A,
                    const float *B, int64_t rank, double s) {
    double worst = 0, size = 0;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double sum = 0, magnitude = 0;
            for (int64_t l = 0; l < k; l++) {
                sum += (double)a[i * k + l] * w[j * k + l];
                magnitude += fabs((double)a[i * k + l] * w[j * k + l]);
            }
            for (int64_t r = 0; r < rank; r++)
                for (int64_t l = 0; l < k; l++) {
                    sum += s * a[i * k + l] * A[r * k + l] * B[j * rank + r];
                    magnitude += fabs(s * a[i * k + l] * A[r * k + l] * B[j * rank + r]);
                }
            double distance = fabs(y[i * n + j] - sum);
            if (!(distance <= worst)) /* a NaN, too */
                worst = distance;
            if (magnitude > size)
                size = magnitude;
        }
    return worst / size;
}

static float *transposed(const float *w, int64_t n, int64_t k) {
    float *out = malloc(n * k * sizeof(float));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < k; j++)
            out[j * n + i] = w[i * k + j];
    return out;
}

/* s a A^T for a (m, k) and A (rank, k). */
static float *low_of(const float *a, const float *A, int64_t m, int64_t k, int64_t rank, double s) {
    float *out = malloc((m * rank + 1) * sizeof(float));
    for (int64_t i = 0; i < m; i++)
        for (int64_t r = 0; r < rank; r++) {
            double sum = 0;
            for (int64_t l = 0; l < k; l++)
                sum += s * a[i * k + l] * A[r * k + l];
            out[i * rank + r] = (float)sum;
        }
    return out;
}

int check_products(void) {
    static const int64_t SHAPES[][3] = {{1, 32, 32}, {66, 160, 32}, {35, 192, 64}};
    static const int64_t ROWS[] = {1, 2, 3, 4, 5, 13};
    double scaling = -0.7, worst[4] = {0};
    int64_t level = minipeft_level(), bits;
    memcpy(&bits, &scaling, 8);
    printf("%d", (int)level);
    for (int shape = 0; shape < 3; shape++) {
        int64_t n = SHAPES[shape][0], k = SHAPES[shape][1], size = SHAPES[shape][2], rank = 5 + 3 * shape;
        float *levels = numbers(16), *scales = numbers(n * k / size), *A = numbers(rank * k), *B = numbers(n * rank);
        uint8_t *codes = malloc(n * k / 2);
        uint16_t *halves = malloc(n * k * 2);
        float *w = malloc(n * k * sizeof(float)), *dense = malloc(n * k * sizeof(float));
        for (int64_t i = 0; i < n * k; i += 2) {
            int code = (int)(number() * 128 + 128) & 255;
            codes[i / 2] = (uint8_t)code;
            w[i] = levels[code >> 4] * scales[i / size];
            w[i + 1] = levels[code & 15] * scales[i / size];
        }
        for (int64_t i = 0; i < n * k; i++) {
            halves[i] = to_bfloat16(number());
            dense[i] = from_bfloat16(halves[i]);
        }
        float *back = transposed(w, n, k), *dense_back = transposed(dense, n, k);
        float *B_rows = transposed(B, n, rank), *A_columns = transposed(A, rank, k);
        for (int i = 0; i < 6; i++) {
            int64_t m = ROWS[i], most = n > k ? n : k;
            float *x = numbers(m * most), *y = malloc(m * most * sizeof(float));
            for (int backward = 0; backward < 2; backward++) {
                int64_t to = backward ? k : n, of = backward ? n : k;
                const float *first = backward ? B_rows : A, *second = backward ? A_columns : B;
                float *low = low_of(x, first, m, of, rank, scaling);
                int64_t call[21] = {(int64_t)codes, (int64_t)scales, (int64_t)levels, 0, 0, 0, n, k, size, 256,
                                    (int64_t)x, (int64_t)y, m, backward, FLOAT32, FLOAT32, 2, level, (int64_t)low,
                                    (int64_t)(backward ? A : B), rank};
                if (!minipeft_product(call))
                    return 1;
                const float *own = backward ? back : w;
                worst[0] = fmax(worst[0], error(y, x, own, m, to, of, first, second, rank, scaling));
                free(low);
                for (int dtype = FLOAT32; dtype <= BFLOAT16; dtype++) {
                    int64_t call[16] = {dtype == FLOAT32 ? (int64_t)dense : (int64_t)halves, n, k, dtype, 2, level,
                                        backward, (int64_t)x, (int64_t)y, m, FLOAT32, FLOAT32};
                    if (!minipeft_dense(call))
                        return 1;
                    worst[1] = fmax(worst[1], error(y, x, backward ? dense_back : dense, m, to, of, A, B, 0, 0));
                }
            }
            if (m <= THIN_ROWS) {
                int64_t call[21] = {(int64_t)codes, (int64_t)scales, (int64_t)levels, 0, 0, 0, n, k, size, 256, 2, level,
                                    (int64_t)x, (int64_t)y, m, FLOAT32, FLOAT32, (int64_t)A, (int64_t)B, rank, bits};
                if (!minipeft_thin(call))
                    return 1;
                worst[2] = fmax(worst[2], error(y, x, w, m, n, k, A, B, rank, scaling));
                int64_t dense_call[16] = {(int64_t)halves, n, k, BFLOAT16, 2, level, 0, (int64_t)x, (int64_t)y, m,
                                          FLOAT32, FLOAT32, (int64_t)A, (int64_t)B, rank, bits};
                if (!minipeft_dense(dense_call))
                    return 1;
                worst[3] = fmax(worst[3], error(y, x, dense, m, n, k, A, B, rank, scaling));
            }
            free(x), free(y);
        }
        free(levels), free(scales), free(A), free(B), free(codes), free(halves), free(w), free(dense), free(back),
            free(dense_back), free(B_rows), free(A_columns);
    }
    printf(" %g %g %g %g\n", worst[0], worst[1], worst[2], worst[3]);
    return 0;
}
