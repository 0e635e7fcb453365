/* Loops over the coordinates of one tensor. Included once per instruction set, with

     ISA(name)  the name of a function for this instruction set,
     TARGET     the attribute that lets the compiler use it.

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
                                           const int is_exponential, const int is_relativistic)
{
    const float log_gain = c[LOG_GAIN], gain_slope = c[GAIN_SLOPE], logit = c[LOGIT];
    const float by_log_rms = c[BY_LOG_RMS], by_power = c[BY_POWER], by_effort = c[BY_EFFORT];
    const float psi0 = rule->psi[0], psi1 = rule->psi[1], psi2 = rule->psi[2];
    const double limit = rule->speed_limit;
#pragma omp simd
    for (int j = 0; j < n; j++) {
        const float old = p[j];
        const float x = logit + by_log_rms * log_ratio[j] + by_power * (u[j] * old) + by_effort * fabsf(u[j]);
        const float friction = 2.0f / (1.0f + ISA(exp2)(-x));
        const float gain = ISA(exp2)(log_gain + gain_slope * log_ratio[j]);
        const float force = gain * u[j];
        float end, output;
        if (is_exponential) {
            /* phi_1 and phi_2 of -friction, by Bernoulli's series where the closed forms cancel */
            const float z = -friction, s = z * z, decay = ISA(exp2)(LOG2_E * z);
            const int is_small = friction < 1.0f;
            float series = (float)(1.0 / 47900160);
            series = series * s + (float)(-1.0 / 1209600);
            series = series * s + (float)(1.0 / 30240);
            series = series * s + (float)(-1.0 / 720);
            series = series * s + (float)(1.0 / 12);
            const float ratio = 0.5f - z * series, phi_small = 1.0f / (1.0f - z * ratio);
            const float inverse = 1.0f / (is_small ? -1.0f : z), phi_large = (decay - 1.0f) * inverse;
            const float phi = is_small ? phi_small : phi_large;
            const float psi = is_small ? ratio * phi_small : (phi_large - 1.0f) * inverse;
            end = decay * old + phi * force;
            output = phi * old + psi * force;
        } else {
            output = old + (force - friction * old) * (psi0 + friction * (psi1 + friction * psi2));
            end = old + (force - friction * output);
        }
        if (is_relativistic) /* in double precision, in which no square of a float32 overflows or vanishes */
            output = (float)(limit * end / sqrt((double)end * end + limit * limit));
        p[j] = end;
        delta[j] += gain * output;
    }
}

/* Magnitude, shrunk, of a part of a gradient; returns nonzero if it holds an infinity or a NaN. */
TARGET static int ISA(magnitude)(const Rule *rule, const Tensor *t, const void *grad, int64_t start, int64_t stop,
                                 double *total)
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
    return largest >= 0x7f800000;
}

/* Sums over a part of a tensor: of v, u^2, theta^2, then of u p_k and of p_k^2 for each mode. */
TARGET static void ISA(statistics)(const Rule *rule, const Tensor *t, const Shared *c, const void *grad,
                                   const void *param, int64_t start, int64_t stop, double *sums)
{
    float g_buffer[BLOCK], theta_buffer[BLOCK], x_buffer[BLOCK], u[BLOCK];
    const int modes = rule->n_modes;
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
}

/* Step a part of a tensor: parameter, momenta and second moment, in place. */
TARGET static void ISA(advance)(const Rule *rule, const Tensor *t, const Shared *c, const Options *options,
                                const void *grad, void *param, int64_t start, int64_t stop)
{
    float g_buffer[BLOCK], x_buffer[BLOCK], u[BLOCK], log_ratio[BLOCK], delta[BLOCK];
    const float floor = rule->log_floor, lr = options->lr, keep = options->keep, kappa = c->kappa;
    for (int64_t i = start; i < stop; i += BLOCK) {
        const int n = (int)(stop - i < BLOCK ? stop - i : BLOCK);
        const float *g = ISA(load)((void *)grad, t->param_type, i, n, g_buffer);
        if (t->second_moment) {
            float *v = ISA(load)(t->second_moment, t->state_type, i, n, x_buffer);
            if (rule->coordinatewise)
                ISA(observe)(c, BY_HISTORY, floor, g, v, n, u, log_ratio);
            else
                ISA(observe)(c, BY_COORDINATE, floor, g, v, n, u, log_ratio);
            ISA(store)(t->second_moment, t->state_type, i, n, v);
        } else {
            ISA(observe)(c, BY_TENSOR, floor, g, NULL, n, u, log_ratio);
        }
        memset(delta, 0, n * sizeof(float));
        for (int k = 0; k < rule->n_modes; k++) {
            const float *coefficients = c->per_mode + N_NUMBERS * k;
            const int64_t at = k * t->mode_stride + i;
            float *p = ISA(load)(t->p, t->state_type, at, n, x_buffer);
            switch (2 * rule->is_exponential + rule->is_relativistic[k]) {
            case 0: ISA(mode)(rule, coefficients, p, u, log_ratio, n, delta, 0, 0); break;
            case 1: ISA(mode)(rule, coefficients, p, u, log_ratio, n, delta, 0, 1); break;
            case 2: ISA(mode)(rule, coefficients, p, u, log_ratio, n, delta, 1, 0); break;
            default: ISA(mode)(rule, coefficients, p, u, log_ratio, n, delta, 1, 1);
            }
            ISA(store)(t->p, t->state_type, at, n, p);
        }
        float *theta = ISA(load)(param, t->param_type, i, n, x_buffer);
#pragma omp simd
        for (int j = 0; j < n; j++)
            theta[j] = keep * theta[j] + lr * (kappa * delta[j]);
        ISA(store)(param, t->param_type, i, n, theta);
    }
}

/* Step the momenta of a part of a matrix, and write those at the lookahead point. */
TARGET static void ISA(advance_matrix)(const Rule *rule, const Tensor *t, const Shared *shared, const void *grad,
                                       int64_t start, int64_t stop)
{
    float g_buffer[BLOCK], x_buffer[BLOCK];
    const Shared c = *shared;
    for (int64_t i = start; i < stop; i += BLOCK) {
        const int n = (int)(stop - i < BLOCK ? stop - i : BLOCK);
        const float *restrict g = ISA(load)((void *)grad, t->param_type, i, n, g_buffer);
        for (int k = 0; k < rule->n_modes; k++) {
            const float *number = c.per_mode + N_NUMBERS * k;
            const float end_by_p = number[END_BY_P], end_by_u = number[END_BY_U];
            const float ahead_by_p = number[AHEAD_BY_P], ahead_by_u = number[AHEAD_BY_U];
            const int64_t at = k * t->mode_stride + i;
            float *restrict p = ISA(load)(t->p, t->state_type, at, n, x_buffer), *restrict ahead = t->ahead + k * t->n + i;
#pragma omp simd
            for (int j = 0; j < n; j++) {
                float square;
                const float u = ISA(effort)(&c, BY_TENSOR, g[j], 0.0f, &square), old = p[j];
                p[j] = end_by_p * old + end_by_u * u;
                ahead[j] = ahead_by_p * old + ahead_by_u * u;
            }
            ISA(store)(t->p, t->state_type, at, n, p);
        }
    }
}

/* c = a b, square matrices of n rows, each of which is padded with zeros to `stride` numbers, a multiple of 8. */
TARGET static void ISA(multiply)(const double *restrict a, const double *restrict b, double *restrict c, int n,
                                 int stride)
{
    for (int i = 0; i < n; i += 4) {
        const int rows = n - i < 4 ? n - i : 4;
        for (int j = 0; j < stride; j += 8) {
            double sums[4][8] = {{0.0}};
            for (int k = 0; k < n; k++)
                for (int r = 0; r < 4; r++) {
                    const double x = r < rows ? a[(i + r) * stride + k] : 0.0;
                    const double *restrict from = b + k * stride + j;
#pragma omp simd
                    for (int l = 0; l < 8; l++)
                        sums[r][l] += x * from[l];
                }
            for (int r = 0; r < rows; r++)
                memcpy(c + (i + r) * stride + j, sums[r], sizeof sums[r]);
        }
    }
}

/* Orthogonalise small matrices by the polynomials of odeopt.physics.newton_schulz, of the Gram matrix of the short side:
   all factors multiply to one polynomial P, and the matrix is multiplied once. In double precision, so that weak
   directions, whose squares are far below the largest, keep their digits. */
TARGET static void ISA(orthogonalise)(const Rule *rule, const Tensor *t)
{
    double gram[SHORT * SHORT], square[SHORT * SHORT], q[SHORT * SHORT], p[SHORT * SHORT], product[SHORT * SHORT];
    float row[SHORT], block[SHORT * 16], weights[(SHORT + 3) * SHORT] = {0.0f};
    const int m = t->rows, n = (int)(t->n / m), is_tall = m > n, s = is_tall ? n : m, stride = (s + 7) / 8 * 8;
    for (int mode = 0; mode < rule->n_modes; mode++) {
        float *x = t->ahead + mode * t->n;
        memset(gram, 0, sizeof(double) * s * stride);
        if (is_tall) {
            for (int r = 0; r < m; r++)
                for (int i = 0; i < s; i++) {
                    const float *restrict from = x + (size_t)r * s;
                    double *restrict to = gram + i * stride;
#pragma omp simd
                    for (int j = 0; j < s; j++)
                        to[j] += (double)from[i] * from[j];
                }
        } else {
            for (int i = 0; i < s; i++)
                for (int j = 0; j <= i; j += 4) { /* four at a time: a sum waits for its last term */
                    const float *restrict a = x + (size_t)i * n, *restrict b = x + (size_t)j * n;
                    const float *restrict b1 = j + 1 > i ? b : b + n, *restrict b2 = j + 2 > i ? b : b + 2 * (size_t)n;
                    const float *restrict b3 = j + 3 > i ? b : b + 3 * (size_t)n;
                    double sum0 = 0.0, sum1 = 0.0, sum2 = 0.0, sum3 = 0.0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
                    for (int k = 0; k < n; k++) {
                        const double factor = a[k];
                        sum0 += factor * b[k];
                        sum1 += factor * b1[k];
                        sum2 += factor * b2[k];
                        sum3 += factor * b3[k];
                    }
                    const double sums[4] = {sum0, sum1, sum2, sum3};
                    for (int l = 0; l < 4 && j + l <= i; l++)
                        gram[i * stride + j + l] = gram[(j + l) * stride + i] = sums[l];
                }
        }
        memset(p, 0, sizeof(double) * s * stride);
        for (int i = 0; i < s; i++)
            p[i * stride + i] = 1.0;
        for (int factor = 0; factor < 5; factor++) {
            const float *c = rule->factors + 3 * factor;
            ISA(multiply)(gram, gram, square, s, stride);
            for (int i = 0; i < s * stride; i++)
                q[i] = c[1] * gram[i] + c[2] * square[i];
            for (int i = 0; i < s; i++)
                q[i * stride + i] += c[0];
            ISA(multiply)(q, p, product, s, stride);
            memcpy(p, product, sizeof(double) * s * stride);
            if (factor < 4) {
                ISA(multiply)(q, gram, product, s, stride);
                ISA(multiply)(q, product, gram, s, stride);
            }
        }
        for (int i = 0; i < s; i++)
            for (int j = 0; j < s; j++)
                weights[i * s + j] = (float)p[i * stride + j];
        if (is_tall) {
            for (int r = 0; r < m; r++) {
                float *restrict to = x + (size_t)r * s;
                memcpy(row, to, s * sizeof(float));
                memset(to, 0, s * sizeof(float));
                for (int k = 0; k < s; k++) {
                    const float *restrict from = weights + k * s;
#pragma omp simd
                    for (int j = 0; j < s; j++)
                        to[j] += row[k] * from[j];
                }
            }
        } else {
            for (int j = 0; j < n; j += 16) {
                const int width = n - j < 16 ? n - j : 16;
                memset(block, 0, sizeof block);
                for (int k = 0; k < s; k++)
                    memcpy(block + 16 * k, x + (size_t)k * n + j, width * sizeof(float));
                for (int i = 0; i < s; i += 4) {
                    float sums[4][16] = {{0.0f}};
                    for (int k = 0; k < s; k++) {
                        const float *restrict from = block + 16 * k;
                        for (int r = 0; r < 4; r++) {
                            const float weight = weights[(i + r) * s + k];
#pragma omp simd
                            for (int l = 0; l < 16; l++)
                                sums[r][l] += weight * from[l];
                        }
                    }
                    for (int r = 0; r < 4 && i + r < s; r++)
                        memcpy(x + (size_t)(i + r) * n + j, sums[r], width * sizeof(float));
                }
            }
        }
    }
}

/* Move a matrix by the velocities of its modes. */
TARGET static void ISA(move)(const Tensor *t, int n_modes, void *param)
{
    float buffer[BLOCK];
    for (int64_t i = 0; i < t->n; i += BLOCK) {
        const int n = (int)(t->n - i < BLOCK ? t->n - i : BLOCK);
        float *restrict theta = ISA(load)(param, t->param_type, i, n, buffer);
        const float keep = t->result[1];
#pragma omp simd
        for (int j = 0; j < n; j++)
            theta[j] *= keep;
        for (int k = 0; k < n_modes; k++) {
            const float factor = t->result[2 + k], *restrict velocity = t->ahead + k * t->n + i;
#pragma omp simd
            for (int j = 0; j < n; j++)
                theta[j] += factor * velocity[j];
        }
        ISA(store)(param, t->param_type, i, n, theta);
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

static const Kernels ISA(kernels) = {ISA(magnitude), ISA(statistics),     ISA(advance),
                                      ISA(advance_matrix), ISA(orthogonalise), ISA(move), ISA(functions)};

#undef ISA
#undef TARGET
