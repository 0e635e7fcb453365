/* Loops over the coordinates of one tensor. Included once per instruction set, with

     ISA(name)  the name of a function for this instruction set,
     TARGET     the attribute that lets the compiler use it,
     TILE       rows of a product of matrices whose sums are in registers at once: as many as keep its units busy.

   Every loop runs over a block that stays in the first cache, in float32; state, gradients and parameters in bfloat16
   are widened on the way in and rounded on the way out. `omp simd` allows sums to be taken in vectors, in any order
   within a block, without the other liberties of -ffast-math. */

/* 2^x within 3 units of rounding; what is beyond [-126, 127] counts as these, NaN stays NaN. */
TARGET static inline float ISA(exp2)(float x)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which its last bits then hold */
    x = x > 127.0f ? 127.0f : x;
    x = x < -126.0f ? -126.0f : x;
    const float shifted = x + magic;
    const float r = x - (shifted - magic);
    float y = 0.001326469937339425f; /* minimax, relative error under 2^-23 */
    y = y * r + 0.009671533480286598f;
    y = y * r + 0.05550733953714371f;
    y = y * r + 0.24022242426872253f;
    y = y * r + 0.6931470036506653f;
    y = y * r + 1.0f;
    return float_of((int32_t)((uint32_t)bits_of(y) + ((uint32_t)bits_of(shifted) << 23)));
}

/* log2(x) of a positive normal number within 6 units of rounding; infinity and NaN stay what they are. */
TARGET static inline float ISA(log2)(float x)
{
    const int32_t root = 0x3f3504f3; /* sqrt(1/2) */
    const int32_t bits = bits_of(x) - root;
    const float e = (float)(bits >> 23);
    const float m = float_of((bits & 0x007fffff) + root) - 1.0f; /* x = 2^e (1 + m), m in [sqrt(1/2) - 1, sqrt(2) - 1) */
    float y = -0.1458115130662918f; /* minimax, relative error under 2^-22 */
    y = y * m + 0.23404230177402496f;
    y = y * m - 0.2488768845796585f;
    y = y * m + 0.2870987057685852f;
    y = y * m - 0.3602396249771118f;
    y = y * m + 0.48092323541641235f;
    y = y * m - 0.7213528156280518f;
    y = y * m + 1.442694902420044f;
    y = y * m + e;
    return x < INFINITY ? y : x;
}

/* A block as float32: in place where it is kept so, else widened into `buffer`. */
TARGET static inline float *ISA(load)(void *x, int type, int64_t start, int n, float *buffer)
{
    if (type == FLOAT32)
        return (float *)x + start;
    const uint16_t *narrow = (const uint16_t *)x + start;
#pragma omp simd
    for (int j = 0; j < n; j++)
        buffer[j] = float_of((int32_t)((uint32_t)narrow[j] << 16));
    return buffer;
}

/* Round a block to where it is kept, to nearest even; nothing where it has been changed in place. */
TARGET static inline void ISA(store)(void *x, int type, int64_t start, int n, const float *buffer)
{
    if (type == FLOAT32)
        return;
    uint16_t *narrow = (uint16_t *)x + start;
#pragma omp simd
    for (int j = 0; j < n; j++) {
        const uint32_t bits = (uint32_t)bits_of(buffer[j]);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        narrow[j] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

/* Port effort u and second moment of one coordinate, normalised as `kind` says. */
TARGET static ALWAYS_INLINE float ISA(effort)(const Shared *c, const int kind, float g, float v, float *second_moment)
{
    if (kind == BY_HISTORY) {
        const float magnitude = fabsf(g), largest = magnitude > v ? magnitude : v;
        const float divisor = largest == 0.0f ? 1.0f : largest, a = v / divisor, b = g / divisor;
        const float rms = largest * sqrtf((1.0f - c->weight) * (a * a) + c->weight * (b * b));
        *second_moment = rms;
        return -c->sign * g / (rms > 0.0f ? rms : 1.0f);
    }
    const float relative = g * c->inverse[0] * c->inverse[1], square = relative * relative;
    *second_moment = kind == BY_TENSOR ? square : c->carried * v + c->weight * square;
    return kind == BY_TENSOR ? relative : relative / sqrtf(*second_moment + EPS_EFFORT);
}

/* Efforts of a block and their sums: of the second moments, u^2 and theta^2. */
TARGET static ALWAYS_INLINE void ISA(sum_efforts)(const Shared *shared, const int kind, const float *restrict g,
                                                  const float *restrict v, const float *restrict theta, int n,
                                                  float *restrict u, double *sums)
{
    const Shared c = *shared;
    float v_sum = 0.0f, u_sum = 0.0f, theta_sum = 0.0f;
#pragma omp simd reduction(+ : v_sum, u_sum, theta_sum)
    for (int j = 0; j < n; j++) {
        float square;
        const float effort = ISA(effort)(&c, kind, g[j], v[j], &square);
        u[j] = effort;
        v_sum += square;
        u_sum += effort * effort;
        theta_sum += theta[j] * theta[j];
    }
    sums[0] += v_sum;
    sums[1] += u_sum;
    sums[2] += theta_sum;
}

/* Efforts of a block, its second moments in place, and the logarithms of magnitudes over that of the tensor. */
TARGET static ALWAYS_INLINE void ISA(observe)(const Shared *shared, const int kind, float floor,
                                              const float *restrict g, float *restrict v, int n, float *restrict u,
                                              float *restrict log_ratio)
{
    const Shared c = *shared;
#pragma omp simd
    for (int j = 0; j < n; j++) {
        float square;
        const float effort = ISA(effort)(&c, kind, g[j], kind == BY_TENSOR ? 0.0f : v[j], &square);
        const float seen = kind == BY_HISTORY ? effort * effort : square;
        const float x = 0.5f * ISA(log2)(seen + EPS_SIGNAL) - c.log_rms;
        log_ratio[j] = x < floor ? floor : x;
        u[j] = effort;
        if (kind != BY_TENSOR)
            v[j] = square;
    }
}

/* Momentum of one mode after a unit step, in place; what it adds to the output is added to `delta`. */
TARGET static ALWAYS_INLINE void ISA(mode)(const Rule *rule, const float *c, float *restrict p, const float *restrict u,
                                           const float *restrict log_ratio, int n, float *restrict delta,
                                           const int n_terms, const int is_relativistic)
{
    const float log_gain = c[0], gain_slope = c[1], logit = c[2], by_log_rms = c[3], by_power = c[4], by_effort = c[5];
    const double limit = rule->speed_limit;
    float terms[N_PSI], frictions[BLOCK], gains[BLOCK];
    memcpy(terms, rule->psi, sizeof terms);
    /* two loops: in one, each coordinate is a longer chain of operations than a processor looks ahead */
#pragma omp simd
    for (int j = 0; j < n; j++) {
        const float x = logit + by_log_rms * log_ratio[j] + by_power * (u[j] * p[j]) + by_effort * fabsf(u[j]);
        frictions[j] = 2.0f / (1.0f + ISA(exp2)(-x));
        gains[j] = ISA(exp2)(log_gain + gain_slope * log_ratio[j]);
    }
#pragma omp simd
    for (int j = 0; j < n; j++) {
        const float old = p[j], friction = frictions[j], gain = gains[j];
        const float force = gain * u[j];
        float output = old + (force - friction * old) * horner(terms, n_terms, friction);
        const float end = old + (force - friction * output);
        if (is_relativistic) /* in double precision, in which no square of a float32 overflows or vanishes */
            output = (float)(limit * end / sqrt((double)end * end + limit * limit));
        p[j] = end;
        delta[j] += gain * output;
    }
}

/* The same of mode k, in a loop for its solver and its kinetic energy. */
TARGET static ALWAYS_INLINE void ISA(any_mode)(const Rule *rule, const Shared *c, int k, float *p, const float *u,
                                               const float *log_ratio, int n, float *delta)
{
    const float *coefficients = c->per_mode + 6 * k;
    switch (2 * (rule->n_psi > N_EXPLICIT) + rule->is_relativistic[k]) {
    case 0: ISA(mode)(rule, coefficients, p, u, log_ratio, n, delta, N_EXPLICIT, 0); break;
    case 1: ISA(mode)(rule, coefficients, p, u, log_ratio, n, delta, N_EXPLICIT, 1); break;
    case 2: ISA(mode)(rule, coefficients, p, u, log_ratio, n, delta, N_PSI, 0); break;
    default: ISA(mode)(rule, coefficients, p, u, log_ratio, n, delta, N_PSI, 1);
    }
}

/* Magnitude, shrunk, of a part of a gradient; returns the bits of the largest one, which exceed those of finite numbers
   if it holds an infinity or a NaN. */
TARGET static int32_t ISA(magnitude)(const Rule *rule, const Tensor *t, const void *grad, int64_t start,
                                      int64_t stop, double *total)
{
    float buffer[BLOCK];
    const float shrink = rule->coordinatewise ? 0.0f : t->features[SHRINK];
    int32_t largest = 0;
    *total = 0.0;
    for (int64_t i = start; i < stop; i += BLOCK) {
        const int n = (int)(stop - i < BLOCK ? stop - i : BLOCK);
        const float *g = ISA(load)((void *)grad, t->param_type, i, n, buffer);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum) reduction(max : largest)
        for (int j = 0; j < n; j++) {
            const int32_t bits = bits_of(g[j]) & 0x7fffffff;
            largest = bits > largest ? bits : largest;
            sum += shrink * fabsf(g[j]);
        }
        *total += sum;
    }
    return largest;
}

/* Sums over a part of a tensor: of v, u^2, theta^2, then of u p_k and of p_k^2 for each mode. */
TARGET static void ISA(statistics)(const Rule *rule, const Tensor *t, const Shared *c, const void *grad,
                                   const void *param, int64_t start, int64_t stop, double *sums)
{
    float g_buffer[BLOCK], theta_buffer[BLOCK], x_buffer[BLOCK], u[BLOCK];
    const int modes = rule->n_modes;
    const unsigned control = flush_tiny();
    for (int k = 0; k < 3 + 2 * modes; k++)
        sums[k] = 0.0;
    for (int64_t i = start; i < stop; i += BLOCK) {
        const int n = (int)(stop - i < BLOCK ? stop - i : BLOCK);
        const float *g = ISA(load)((void *)grad, t->param_type, i, n, g_buffer);
        const float *theta = ISA(load)((void *)param, t->param_type, i, n, theta_buffer);
        if (t->second_moment) {
            const float *v = ISA(load)(t->second_moment, t->state_type, i, n, x_buffer);
            ISA(sum_efforts)(c, BY_COORDINATE, g, v, theta, n, u, sums);
        } else {
            ISA(sum_efforts)(c, BY_TENSOR, g, g, theta, n, u, sums);
        }
        for (int k = 0; k < modes; k++) {
            const float *p = ISA(load)(t->p, t->state_type, k * t->mode_stride + i, n, x_buffer);
            float up_sum = 0.0f, p_sum = 0.0f;
#pragma omp simd reduction(+ : up_sum, p_sum)
            for (int j = 0; j < n; j++) {
                up_sum += u[j] * p[j];
                p_sum += p[j] * p[j];
            }
            sums[3 + k] += up_sum;
            sums[3 + modes + k] += p_sum;
        }
    }
    restore_tiny(control);
}

/* Step a part of a tensor: parameter, momenta and second moment, in place. */
TARGET static void ISA(advance)(const Rule *rule, const Tensor *t, const Shared *c, const Group *group,
                                const void *grad, void *param, int64_t start, int64_t stop)
{
    float g_buffer[BLOCK], x_buffer[BLOCK], u[BLOCK], log_ratio[BLOCK], delta[BLOCK];
    const float floor = rule->log_floor, lr = group->lr, keep = group->keep, kappa = c->kappa;
    for (int64_t i = start; i < stop; i += BLOCK) {
        const int n = (int)(stop - i < BLOCK ? stop - i : BLOCK);
        const float *g = ISA(load)((void *)grad, t->param_type, i, n, g_buffer);
        const unsigned control = flush_tiny();
        if (t->second_moment) {
            float *v = ISA(load)(t->second_moment, t->state_type, i, n, x_buffer);
            if (rule->coordinatewise) {
                restore_tiny(control); /* the magnitude of a gradient may be so small */
                ISA(observe)(c, BY_HISTORY, floor, g, v, n, u, log_ratio);
                flush_tiny();
            } else {
                ISA(observe)(c, BY_COORDINATE, floor, g, v, n, u, log_ratio);
            }
            ISA(store)(t->second_moment, t->state_type, i, n, v);
        } else {
            ISA(observe)(c, BY_TENSOR, floor, g, NULL, n, u, log_ratio);
        }
        memset(delta, 0, n * sizeof(float));
        for (int k = 0; k < rule->n_modes; k++) {
            const int64_t at = k * t->mode_stride + i;
            float *p = ISA(load)(t->p, t->state_type, at, n, x_buffer);
            ISA(any_mode)(rule, c, k, p, u, log_ratio, n, delta);
            ISA(store)(t->p, t->state_type, at, n, p);
        }
        restore_tiny(control); /* a parameter may, too */
        float *theta = ISA(load)(param, t->param_type, i, n, x_buffer);
#pragma omp simd
        for (int j = 0; j < n; j++)
            theta[j] = keep * theta[j] + lr * (kappa * delta[j]);
        ISA(store)(param, t->param_type, i, n, theta);
    }
}

/* Sums of squares of the rows of a matrix, or of the columns of one that is transposed, over the momenta of all spectral
   modes. */
TARGET static void ISA(row_squares)(const Rule *rule, const Tensor *t, float *squares)
{
    float buffer[BLOCK];
    const int64_t n_columns = t->n / t->n_rows;
    const unsigned control = flush_tiny();
    if (t->is_transposed)
        memset(squares, 0, n_columns * sizeof(float));
    for (int64_t row = 0; row < t->n_rows; row++) {
        float sum = 0.0f;
        for (int k = 0; k < rule->n_modes; k++)
            for (int64_t i = 0; rule->is_spectral[k] && i < n_columns; i += BLOCK) {
                const int n = (int)(n_columns - i < BLOCK ? n_columns - i : BLOCK);
                const int64_t at = k * t->mode_stride + row * n_columns + i;
                const float *p = ISA(load)(t->p, t->state_type, at, n, buffer);
                if (t->is_transposed) {
#pragma omp simd
                    for (int j = 0; j < n; j++)
                        squares[i + j] += p[j] * p[j];
                } else {
#pragma omp simd reduction(+ : sum)
                    for (int j = 0; j < n; j++)
                        sum += p[j] * p[j];
                }
            }
        if (!t->is_transposed)
            squares[row] = sum;
    }
    restore_tiny(control);
}

/* Multiply n numbers of a matrix, from number `start` of it on, by the gains of their rows, or of their columns. */
TARGET static void ISA(scale_rows)(const Tensor *t, float *x, int64_t start, int64_t n, const float *gains)
{
    const int64_t n_columns = t->n / t->n_rows;
    for (int64_t i = 0, row = start / n_columns; i < n; row++) {
        const int64_t end = (row + 1) * n_columns - start, stop = end < n ? end : n;
        const float gain = gains[t->is_transposed ? 0 : row], *own = gains + n_columns - end; /* of number j: own[j] */
        if (t->is_transposed) {
#pragma omp simd
            for (int64_t j = i; j < stop; j++)
                x[j] *= own[j];
        } else {
#pragma omp simd
            for (int64_t j = i; j < stop; j++)
                x[j] *= gain;
        }
        i = stop;
    }
}

/* Momenta of a part of a matrix, in place. `x` takes, each over the whole matrix, the momenta of spectral modes at the
   lookahead point, `others` the outputs of all other modes; where there is none spectral, `x` takes the latter. `gains`,
   if there are any, are those of the rows, or columns. `sums`: see advance_matrix in step.c. */
TARGET static void ISA(advance_matrix)(const Rule *rule, const Tensor *t, const Shared *c, const void *grad,
                                       int64_t start, int64_t stop, float *x, float *others, const float *gains,
                                       double *sums)
{
    float g_buffer[BLOCK], p_buffer[BLOCK], u[BLOCK], scaled[BLOCK], log_ratio[BLOCK];
    const float *efforts = gains ? scaled : u; /* of spectral modes */
    const float floor = rule->log_floor, lookahead = c->lookahead;
    float *outputs = rule->n_spectral > 0 ? others : x;
    const unsigned control = flush_tiny();
    for (int64_t i = start; i < stop; i += BLOCK) {
        const int n = (int)(stop - i < BLOCK ? stop - i : BLOCK);
        const float *g = ISA(load)((void *)grad, t->param_type, i, n, g_buffer);
        float *v = p_buffer;
        if (t->second_moment) {
            v = ISA(load)(t->second_moment, t->state_type, i, n, p_buffer);
            ISA(observe)(c, BY_COORDINATE, floor, g, v, n, u, log_ratio);
            ISA(store)(t->second_moment, t->state_type, i, n, v);
        } else if (outputs) {
            ISA(observe)(c, BY_TENSOR, floor, g, NULL, n, u, log_ratio);
        } else {
            const float first = c->inverse[0], second = c->inverse[1];
#pragma omp simd
            for (int j = 0; j < n; j++)
                u[j] = g[j] * first * second;
        }
        if (gains) {
            memcpy(scaled, u, n * sizeof(float));
            ISA(scale_rows)(t, scaled, i, n, gains);
        }
        float u_sum = 0.0f;
#pragma omp simd reduction(+ : u_sum)
        for (int j = 0; j < n; j++)
            u_sum += efforts[j] * efforts[j];
        sums[0] += u_sum;
        if (outputs)
            memset(outputs + i, 0, n * sizeof(float));
        for (int k = 0, spectral = 0; k < rule->n_modes; k++) {
            const int64_t at = k * t->mode_stride + i;
            float *p = ISA(load)(t->p, t->state_type, at, n, p_buffer);
            if (rule->n_spectral > 0 && rule->is_spectral[k]) {
                const float kept = c->rates[4 * k + 2], driven = c->rates[4 * k + 3];
                float *ahead = x + spectral * t->n + i;
                double *squares = sums + 1 + 3 * spectral++;
                double before = 0.0, after = 0.0, beyond = 0.0; /* momenta that no gradient drives fall towards zero */
#pragma omp simd reduction(+ : before, after, beyond)
                for (int j = 0; j < n; j++) {
                    const float old = p[j], new = kept * old + driven * efforts[j], point = old + lookahead * (new - old);
                    p[j] = new;
                    ahead[j] = point;
                    before += (double)old * old;
                    after += (double)new * new;
                    beyond += (double)point * point;
                }
                squares[0] += before;
                squares[1] += after;
                squares[2] += beyond;
            } else {
                ISA(any_mode)(rule, c, k, p, u, log_ratio, n, outputs + i);
            }
            ISA(store)(t->p, t->state_type, at, n, p);
        }
        if (rule->n_spectral == 0) {
            double square = 0.0;
#pragma omp simd reduction(+ : square)
            for (int j = 0; j < n; j++)
                square += (double)outputs[i + j] * outputs[i + j];
            sums[3] += square;
        }
    }
    restore_tiny(control);
}

/* Move a matrix by the sum of its orthogonalised momenta and by the outputs of its other modes, if there are any. Where
   `sum` is NULL, only the weight decay of the optimizer is left. */
TARGET static void ISA(move_matrix)(const Tensor *t, const Shared *c, const Group *group, void *param,
                                    const float *sum, const float *others)
{
    float buffer[BLOCK];
    const float kappa = c->kappa, decay = c->matrix_kappa * c->decay, keep = group->keep;
    const float lr = group->lr / fmaxf(decay, 1.0f); /* no step goes beyond where velocity and decay balance */
    for (int64_t i = 0; i < t->n; i += BLOCK) {
        const int n = (int)(t->n - i < BLOCK ? t->n - i : BLOCK);
        float *theta = ISA(load)(param, t->param_type, i, n, buffer);
        if (!sum) {
#pragma omp simd
            for (int j = 0; j < n; j++)
                theta[j] *= keep;
        } else if (others) {
#pragma omp simd
            for (int j = 0; j < n; j++)
                theta[j] = keep * theta[j] + lr * (sum[i + j] + kappa * others[i + j] - decay * theta[j]);
        } else {
#pragma omp simd
            for (int j = 0; j < n; j++)
                theta[j] = keep * theta[j] + lr * (sum[i + j] - decay * theta[j]);
        }
        ISA(store)(param, t->param_type, i, n, theta);
    }
}

#define REAL double
#define COLUMNS (STRIP / 2)
#define IN(name) ISA(name##_double)
#include "products.h"
#define REAL float
#define COLUMNS STRIP
#define IN(name) ISA(name##_single)
#include "products.h"

/* Product y = scale q x of a symmetric matrix with a wide one (m, n), or what it adds to y; y may be x. */
TARGET static void ISA(combine)(const float *q, const float *x, int m, int64_t n, float scale, float *panel, float *y,
                                int adds)
{
    const int side = padded(m);
    float tile[TILE * STRIP];
    for (int64_t start = 0; start < n; start += PANEL) {
        const int width = (int)(n - start < PANEL ? n - start : PANEL);
        for (int k = 0; k < m; k++)
            for (int j = 0; j < width; j += STRIP) {
                const float *from = x + k * n + start + j;
                float *to = panel + (size_t)j * side + k * STRIP;
                if (width - j >= STRIP) {
#pragma omp simd
                    for (int s = 0; s < STRIP; s++)
                        to[s] = scale * from[s];
                } else {
                    for (int s = 0; s < STRIP; s++)
                        to[s] = s < width - j ? scale * from[s] : 0.0f;
                }
            }
        for (int from = 0; from < m; from += N_TERMS)
            for (int i = 0; i < m; i += TILE)
                for (int j = 0; j < width; j += STRIP) {
                    const int n_terms = m - from < N_TERMS ? m - from : N_TERMS, is_sum = adds || from > 0;
                    const int n_rows = m - i < TILE ? m - i : TILE, n_columns = width - j < STRIP ? width - j : STRIP;
                    const float *rows = q + (size_t)(i / STRIP) * STRIP * side + from * STRIP + i % STRIP;
                    const float *columns = panel + (size_t)j * side + from * STRIP;
                    float *to = y + i * n + start + j;
                    if (n_rows == TILE && n_columns == STRIP) {
                        ISA(tile_single)(rows, columns, n_terms, to, n, is_sum);
                    } else {
                        ISA(tile_single)(rows, columns, n_terms, tile, STRIP, 0);
                        for (int r = 0; r < n_rows; r++)
                            for (int s = 0; s < n_columns; s++)
                                to[r * n + s] = tile[r * STRIP + s] + (is_sum ? to[r * n + s] : 0.0f);
                    }
                }
    }
}

TARGET static void ISA(functions)(float *x, int64_t n, int is_log)
{
    if (is_log) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            x[i] = ISA(log2)(x[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            x[i] = ISA(exp2)(x[i]);
    }
}

static const Kernels ISA(kernels) = {ISA(magnitude), ISA(statistics), ISA(advance), ISA(row_squares),
                                     ISA(scale_rows), ISA(advance_matrix), ISA(move_matrix),
                                     {ISA(gram_single), ISA(gram_double)},
                                     {ISA(polynomial_single), ISA(polynomial_double)}, ISA(combine), ISA(functions)};

#undef ISA
#undef TARGET
#undef TILE
