/* Batch normalisation in training, the addition of a residual and ReLU, in two passes over the images instead of five.
 *
 * Images are [M, C] bfloat16, channels last: M = B * H * W pixels of C channels, C a multiple of LANES. Statistics are
 * float32 [C]. Sums over pixels are float32 within a block of rows and float64 over the blocks, of values shifted by the
 * first row's, so that no digits cancel. Each thread has neighbouring rows and a sum of its own: the result depends on
 * their number alone, never on timing. Plain C that compilers vectorise; called from byot/system/fused.py.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16  /* channels done together */
#define ROWS 64   /* of a block, over which sums are float32 */

typedef uint16_t bf16;

static inline float widen(bf16 v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline bf16 narrow(float f) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (bf16)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* All ones where ReLU let its input pass, else 0: a bfloat16 is above 0 where its bits, read as int16, are. */
static inline bf16 active(bf16 out) { return (bf16)-((int16_t)out > 0); }

/* Whether the threads work at once: without OpenMP one does the parts of all. */
int norm_relu_is_parallel(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* First and one past the last row of a thread. */
static inline void rows_of(int64_t M, int thread, int threads, int64_t *first, int64_t *end) {
    *first = M * thread / threads;
    *end = M * (thread + 1) / threads;
}

/* y = relu(weight * (x - mean) / sqrt(variance + eps) + bias + residual), residual possibly null. Also mean, variance
 * (divided by M) and rstd = 1 / sqrt(variance + eps). `sums` is scratch, threads * 2 * C float64. */
void norm_relu_forward(const bf16 *x, const bf16 *residual, const float *weight, const float *bias, bf16 *y,
                       float *mean, float *rstd, float *variance, double *sums, int64_t M, int64_t C, double eps,
                       int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        double *sum = sums + (int64_t)t * 2 * C, *square = sum + C;
        memset(sum, 0, 2 * C * sizeof(double));
        int64_t first, end;
        rows_of(M, t, threads, &first, &end);
        for (int64_t r0 = first; r0 < end; r0 += ROWS) {
            int64_t r1 = r0 + ROWS < end ? r0 + ROWS : end;
            for (int64_t c = 0; c < C; c += LANES) {
                float s[LANES] = {0}, q[LANES] = {0}, k[LANES];
                for (int i = 0; i < LANES; i++) k[i] = widen(x[c + i]);
                for (int64_t r = r0; r < r1; r++) {
                    const bf16 *row = x + r * C + c;
#pragma omp simd
                    for (int i = 0; i < LANES; i++) {
                        float v = widen(row[i]) - k[i];
                        s[i] += v;
                        q[i] += v * v;
                    }
                }
                for (int i = 0; i < LANES; i++) sum[c + i] += s[i], square[c + i] += q[i];
            }
        }
    }
    float *scale = malloc(2 * C * sizeof(float)), *shift = scale + C;
    for (int64_t c = 0; c < C; c++) {
        double s = 0, q = 0;
        for (int t = 0; t < threads; t++) s += sums[(int64_t)t * 2 * C + c], q += sums[(int64_t)t * 2 * C + C + c];
        double m = s / M, v = q / M - m * m;
        v = v < 0 ? 0 : v;
        double mu = m + widen(x[c]);
        mean[c] = (float)mu;
        variance[c] = (float)v;
        rstd[c] = (float)(1 / sqrt(v + eps));
        scale[c] = weight[c] * rstd[c];
        shift[c] = (float)(bias[c] - mu * scale[c]);
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        int64_t first, end;
        rows_of(M, t, threads, &first, &end);
        for (int64_t r = first; r < end; r++) {
            const bf16 *in = x + r * C, *add = residual ? residual + r * C : 0;
            bf16 *out = y + r * C;
            for (int64_t c = 0; c < C; c += LANES) {
                float v[LANES];
#pragma omp simd
                for (int i = 0; i < LANES; i++) v[i] = widen(in[c + i]) * scale[c + i] + shift[c + i];
                if (add) {
#pragma omp simd
                    for (int i = 0; i < LANES; i++) v[i] += widen(add[c + i]);
                }
#pragma omp simd
                for (int i = 0; i < LANES; i++) out[c + i] = narrow(v[i] < 0 ? 0 : v[i]); /* NaN stays NaN */
            }
        }
    }
    free(scale);
}

/* The gradients dx, dresidual (unless null), dweight and dbias, from dy and what the forward pass had and made. */
void norm_relu_backward(const bf16 *dy, const bf16 *y, const bf16 *x, const float *weight, const float *mean,
                        const float *rstd, bf16 *dx, bf16 *dresidual, float *dweight, float *dbias, double *sums,
                        int64_t M, int64_t C, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        double *sum = sums + (int64_t)t * 2 * C, *product = sum + C;
        memset(sum, 0, 2 * C * sizeof(double));
        int64_t first, end;
        rows_of(M, t, threads, &first, &end);
        for (int64_t r0 = first; r0 < end; r0 += ROWS) {
            int64_t r1 = r0 + ROWS < end ? r0 + ROWS : end;
            for (int64_t c = 0; c < C; c += LANES) {
                float s[LANES] = {0}, p[LANES] = {0}, m[LANES];
                memcpy(m, mean + c, sizeof m);
                for (int64_t r = r0; r < r1; r++) {
                    const bf16 *g = dy + r * C + c, *in = x + r * C + c, *out = y + r * C + c;
#pragma omp simd
                    for (int i = 0; i < LANES; i++) {
                        float v = widen(g[i] & active(out[i]));
                        s[i] += v;
                        p[i] += v * (widen(in[i]) - m[i]);
                    }
                }
                for (int i = 0; i < LANES; i++) sum[c + i] += s[i], product[c + i] += p[i];
            }
        }
    }
    float *a = malloc(3 * C * sizeof(float)), *b = a + C, *d = b + C; /* dx = a * g + b * x + d */
    for (int64_t c = 0; c < C; c++) {
        double s = 0, p = 0;
        for (int t = 0; t < threads; t++) s += sums[(int64_t)t * 2 * C + c], p += sums[(int64_t)t * 2 * C + C + c];
        dbias[c] = (float)s;
        dweight[c] = (float)(p * rstd[c]);
        double scale = (double)weight[c] * rstd[c], slope = -scale * rstd[c] * rstd[c] * p / M;
        a[c] = (float)scale;
        b[c] = (float)slope;
        d[c] = (float)(-scale * s / M - slope * mean[c]);
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        int64_t first, end;
        rows_of(M, t, threads, &first, &end);
        for (int64_t r = first; r < end; r++) {
            const bf16 *g = dy + r * C, *in = x + r * C, *out = y + r * C;
            bf16 *to = dx + r * C, *also = dresidual ? dresidual + r * C : 0;
            for (int64_t c = 0; c < C; c += LANES) {
                bf16 masked[LANES];
#pragma omp simd
                for (int i = 0; i < LANES; i++) masked[i] = g[c + i] & active(out[c + i]);
#pragma omp simd
                for (int i = 0; i < LANES; i++)
                    to[c + i] = narrow(widen(masked[i]) * a[c + i] + widen(in[c + i]) * b[c + i] + d[c + i]);
                if (also) memcpy(also + c, masked, sizeof masked);
            }
        }
    }
    free(a);
}
