/* Step of many tensors under a port-Hamiltonian rule, on a CPU: what odeopt.rules.PortHamiltonianUpdate does in tensor
   operations, in three passes over each tensor, and in matrix products for matrices. Plain C, called by pointers from
   odeopt/stepping/native/plan.py, which declares the same structures. */

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-thread-jumps") /* they cost some loops a tenth; as an option of its own, clang refuses it */
#endif

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__FAST_MATH__)
#error "infinities and NaN have to be told apart here: compile without -ffast-math"
#endif

#if defined(_MSC_VER)
#define EXPORT __declspec(dllexport)
#define ALWAYS_INLINE __forceinline
#define UNROLL
#define restrict __restrict
#else
#define EXPORT __attribute__((visibility("default")))
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#endif

#if defined(__unix__) || defined(__APPLE__)
#define HAS_THREADS 1
#include <pthread.h>
#include <signal.h>
#else
#define HAS_THREADS 0
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define HAS_X86 1
#else
#define HAS_X86 0
#endif

/* Compilers that know the tiles of AMX, and the system that lends them. */
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

#define VERSION 12 /* of the structures below */
#define BLOCK 512    /* coordinates of which the temporaries stay in the first cache */
#define CHUNK 16384  /* coordinates between two looks for more work; sums over a tensor are sums over its chunks, in
                        order, whatever the number of threads */
#define SPLIT 65536  /* coordinates from which on threads share a tensor */

#define N_LOOKS 2000 /* at a pass that others finish, before a thread sleeps: some 50 microseconds */

#define STRIP 16     /* columns of a product that are computed at once, in single precision; half as many in double */
#define PANEL 128    /* columns of a wide matrix that are packed at once: for its Gram matrix, for products with it */
#define N_TERMS 32   /* of a sum of products, before it is added to others */

#define N_EXPLICIT 3 /* coefficients of psi, at most: of explicit solvers, */
#define N_PSI 7      /* and of the exponential one */
#define LOG2_E 1.44269504f

#define EPS_EFFORT 1e-10f /* the constants of the rule of the same names */
#define EPS_SIGNAL 1e-4f
#define MEMORY_WARMUP 10.0f
#define REFERENCE 500.0f
#define SHORTEST 30.0f
#define ANYTIME 100.0f
#define START_GAIN 0.35f
#define HELD_GROWTH 1.5f
#define LEAST_OF_LONG_RUNS 0.7f
#define LARGEST_RATIO 1e18f /* of odeopt.rules.preprocessing */
#define SMALL_ROW 1e-4 /* of odeopt.rules.port_hamiltonian.kinetic */
#define SMALLEST 0x1p-100 /* norm of a momentum whose inverse is a float32 with room to spare; smaller ones are raised */
#define N_FIRST 3   /* factors after which a Gram matrix is computed anew, if it is: see orthogonalise */
#define LARGE 256   /* shorter side of a matrix, and how many times as long the longer one is, where other ways to take */
#define ELONGATED 8 /* the products are faster, as measured */

enum { FLOAT32, BFLOAT16 };
enum { BY_COORDINATE, BY_TENSOR, BY_HISTORY }; /* what efforts are normalised by; the last one coordinatewise */
enum { SIZE, SHRINK, KAPPA_FACTOR, THETA_FACTOR, STEP_RMS, SIGNALS, N_SIGNALS = 3 }; /* features of a tensor's shape */

typedef struct {
    const float *weights; /* of the network: for each layer the matrix (in, out), then the bias */
    const float *start;   /* of the coefficients per mode */
    const float *time_scales;
    const int32_t *widths; /* n_layers + 1 */
    const int32_t *is_relativistic, *is_spectral;
    const double *factors; /* of the Newton-Schulz iteration: coefficients of s, s^3 and s^5 of each */
    double speed_limit;
    float psi[N_PSI]; /* of the solver, as a polynomial of the friction: see odeopt.ode.linear_step */
    float decays[2];
    float initial_kappa;
    float horizon_power;
    float log_floor; /* the binary logarithm */
    float initial_matrix_kappa, initial_lookahead, initial_decay, initial_coherence;
    float decay_growth, decay_onset, decay_horizon;
    float alignment_rate, alignment_horizon, trust_ratio, row_power;
    int32_t n_layers, n_modes, n_gain, n_friction, n_time_scales;
    int32_t n_memory, n_moved; /* slow variables, and those of them that the network moves; the others, one at most,
                                  follow the alignment */
    int32_t at_kappa, at_memory, at_exponent, at_matrix; /* places in the outputs of the network; -1 for none */
    int32_t n_spectral; /* modes whose momentum is orthogonalised in matrices; 0 where the sum of the outputs is */
    int32_t matrix_interval; /* steps from one move of a matrix to the next, by as many times the step */
    int32_t n_factors, n_psi, coordinatewise, uses_progress;
    int32_t in_bfloat16; /* whether products of matrices are */
} Rule;

typedef struct {
    void *p;             /* momenta, a mode each mode_stride */
    void *second_moment; /* NULL for none */
    float *scale, *slow_scale, *step, *memory;
    const float *features;
    int64_t *n_skipped;
    int64_t n, mode_stride;
    int64_t work;   /* how much there is to do, in coordinates */
    int64_t n_rows; /* of a matrix that is stepped by its singular values; 0 for other tensors */
    int64_t n_blocks;     /* of as many rows each, of which that matrix consists: each has singular values of its own */
    float operator_scale; /* of a block */
    int32_t param_type, state_type;
    int32_t is_transposed; /* whether it is stored (in, out): its columns have gains, not its rows */
    int32_t skips_zeros; /* whether a gradient that is zero throughout counts as none, as in stacks */
    int32_t group;
} Tensor;

/* What a group of tensors is stepped by. */
typedef struct {
    float lr, keep, progress;
    int32_t knows_progress, maximize;
} Group;

typedef struct {
    int32_t n_threads, instructions;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel of the OpenMP runtime whose threads
                                                                       are to be used; NULL to begin threads here */
} Options;

/* Numbers that the coordinates of a tensor share over one step. */
typedef struct {
    double *sums;    /* 3 + 2 modes */
    float *per_mode; /* log gain, its slope, a logit and three slopes for each mode, such that all powers are of two */
    float *rates;    /* of matrices: friction, gain, and by what old momentum and effort count in the new one, by mode */
    float *memory;
    float step, weight, carried, scale, slow_scale, magnitudes[2];
    float sign, inverse[2]; /* the product of the inverses is sign / scale, and neither is out of range */
    float log_rms, kappa; /* binary logarithm */
    float matrix_kappa, lookahead, decay, coherence;
    int32_t largest; /* magnitude of the gradient, as bits, which are in the order of the numbers */
    int is_broken, is_left; /* whether the gradient is not finite; whether the tensor stays as it is */
    int moves;              /* of a matrix: whether this step of its state moves it */
} Shared;

/* Room for the step of one matrix: momenta that are to be orthogonalised, and what is not spectral; sum of the
   orthogonalised ones, and the same transposed; gains of rows or columns; then a packed part of a matrix, and symmetric
   matrices; or, for products in bfloat16, tiles; and sums over each block. */
typedef struct {
    float *momenta, *others, *sum, *transposed, *gains, *factor;
    void *panel, *gram, *power, *polynomial, *total, *tiles;
    double *sums;
} Workspace;

typedef struct {
    int32_t (*magnitude)(const Rule *, const Tensor *, const void *, int64_t, int64_t, double *);
    void (*statistics)(const Rule *, const Tensor *, const Shared *, const void *, const void *, int64_t, int64_t,
                       double *);
    void (*advance)(const Rule *, const Tensor *, const Shared *, const Group *, const void *, void *, int64_t, int64_t);
    void (*row_squares)(const Rule *, const Tensor *, float *);
    void (*scale_rows)(const Tensor *, float *, int64_t, int64_t, const float *);
    void (*advance_matrix)(const Rule *, const Tensor *, const Shared *, const void *, int64_t, int64_t, float *, float *,
                           const float *, double *);
    void (*move_matrix)(const Tensor *, const Shared *, const Group *, void *, const float *, const float *);
    void (*gram[2])(const float *, int, int64_t, double, void *, void *); /* in single precision, and in double */
    void (*polynomial[2])(const double *, int, int, double, const Workspace *);
    void (*combine)(const float *, const float *, int, int64_t, float, float *, float *, int);
    void (*functions)(float *, int64_t, int);
} Kernels;

/* Side of symmetric matrices in memory: see products.h. */
static inline int padded(int m)
{
    return (m + STRIP - 1) / STRIP * STRIP;
}

static inline int32_t bits_of(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(int32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Between this and `restore_tiny`, results of this thread that are too small to be normal numbers are zero. A processor is a
   hundred times slower on such numbers, and momenta that no gradient drives would decay to them and stay there. The
   assembly holds reads and writes of memory on their side, so that nothing else is flushed. */
static ALWAYS_INLINE unsigned flush_tiny(void)
{
    unsigned before = 0;
#if HAS_X86 && defined(__SSE__)
    __asm__ volatile("stmxcsr %0" : "=m"(before) : : "memory");
    const unsigned flushing = before | 0x8000;
    __asm__ volatile("ldmxcsr %0" : : "m"(flushing) : "memory");
#endif
    return before;
}

static ALWAYS_INLINE void restore_tiny(unsigned before)
{
#if HAS_X86 && defined(__SSE__)
    __asm__ volatile("ldmxcsr %0" : : "m"(before) : "memory");
#endif
    (void)before;
}

static ALWAYS_INLINE float horner(const float *coefficients, const int n, float x)
{
    float y = coefficients[n - 1];
    for (int k = n - 2; k >= 0; k--)
        y = y * x + coefficients[k];
    return y;
}

#define ISA(name) name##_any
#define TARGET
#define TILE 4
#include "kernels.h"

#if HAS_X86
#define ISA(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define TILE 4
#include "kernels.h"
#define ISA(name) name##_avx512
#if defined(__clang__)
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#define TILE 8
#include "kernels.h"
#endif

/* Number of the best instruction set here: 0 for what every processor of this kind has, 1 for AVX2, 2 for AVX-512. */
EXPORT int odeopt_instructions(void)
{
#if HAS_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? 2
               : 1;
#else
    return 0;
#endif
}

#if HAS_AMX
#include "tiles.h"
#endif

/* Whether products of matrices can be taken in bfloat16. */
EXPORT int odeopt_has_bfloat16(void)
{
#if HAS_AMX
    return has_tiles();
#else
    return 0;
#endif
}

static const Kernels *kernels_of(int instructions)
{
#if HAS_X86
    if (instructions == 2)
        return &kernels_avx512;
    if (instructions == 1)
        return &kernels_avx2;
#endif
    (void)instructions;
    return &kernels_any;
}

/* What a caller that declares the same structures finds equal: version and sizes. */
EXPORT int64_t odeopt_layout(void)
{
    return VERSION
           + 1000 * (int64_t)(sizeof(Rule) + 1000 * (sizeof(Tensor) + 1000 * (sizeof(Group) + 1000 * sizeof(Options))));
}

/* 2^x, or the binary logarithm, of numbers in place. */
EXPORT void odeopt_functions(float *x, int64_t n, int is_log, int instructions)
{
    kernels_of(instructions)->functions(x, n, is_log);
}

/* ---------- once per tensor */

static float averaging_weight(float step, float decay)
{
    return (float)(((double)decay - 1.0) / expm1((double)step * log((double)decay)));
}

static void running_scales(const Rule *rule, const Tensor *t, const Group *group, Shared *c)
{
    c->step = *t->step + 1.0f;
    c->weight = averaging_weight(c->step, rule->decays[0]);
    c->scale = *t->scale;
    c->slow_scale = *t->slow_scale;
    c->sign = group->maximize ? -1.0f : 1.0f;
    if (rule->coordinatewise)
        return;
    const float mean = (float)c->sums[0] / (t->features[SIZE] * t->features[SHRINK]);
    const float weights[2] = {c->weight, averaging_weight(c->step, rule->decays[1])};
    float scales[2] = {c->scale, c->slow_scale};
    for (int k = 1; k >= 0; k--) {
        const float keep = 1.0f - weights[k], next = keep * scales[k] + weights[k] * mean;
        const float divisor = next > 0.0f ? next : 1.0f, ratio = scales[k] / divisor;
        c->magnitudes[k] = logf(mean / divisor + EPS_SIGNAL) * (k ? 0.5f : 1.0f);
        scales[k] = next;
        if (k == 0) {
            const float held = ratio < LARGEST_RATIO ? ratio : LARGEST_RATIO;
            c->carried = keep * (held * held);
            /* the inverse of a number near either end of the range is beyond the other one */
            const float unit = divisor < 0x1p-100f ? 0x1p60f : divisor > 0x1p100f ? 0x1p-60f : 1.0f;
            c->inverse[0] = unit;
            c->inverse[1] = -c->sign / (divisor * unit);
        }
    }
    c->scale = scales[0];
    c->slow_scale = scales[1];
}

/* Outputs of the network of a tensor; its activations take turns in two buffers. */
static const float *network(const Rule *rule, float *x, float *y)
{
    const float *w = rule->weights;
    for (int layer = 0; layer < rule->n_layers; layer++) {
        const int n_in = rule->widths[layer], n_out = rule->widths[layer + 1];
        const float *bias = w + (size_t)n_in * n_out;
        memcpy(y, bias, n_out * sizeof(float));
        for (int i = 0; i < n_in; i++, w += n_out)
            for (int j = 0; j < n_out; j++)
                y[j] += x[i] * w[j];
        w = bias + n_out;
        if (layer < rule->n_layers - 1)
            for (int j = 0; j < n_out; j++)
                y[j] = tanhf(y[j]);
        float *swap = x;
        x = y;
        y = swap;
    }
    return x;
}

/* What a matrix needs beside the numbers of its coordinates; `out` is the part of the network's outputs for it. Constants
   of the rule that depend on the depth of the network are read here and nowhere else. */
static void matrix_coefficients(const Rule *rule, const Tensor *t, Shared *c, const float *out, float growth,
                                float scheduled, float lasting, float onset)
{
    float kappa = rule->initial_matrix_kappa * expf(out[0] + growth);
    if (rule->trust_ratio > 0.0f) {
        const float mean_square = (float)c->sums[2] / t->features[SIZE];
        const float trust = rule->trust_ratio * sqrtf(mean_square + 1e-12f) / (kappa * t->features[STEP_RMS]);
        kappa *= fminf(fmaxf(trust, 0.1f), 1.0f);
    }
    c->matrix_kappa = kappa * scheduled;
    c->kappa *= rule->matrix_interval; /* the other one has it from the constants */
    c->moves = (int64_t)c->step % rule->matrix_interval == 0;
    c->lookahead = rule->initial_lookahead * expf(out[1]);
    c->decay = rule->initial_decay * expf(out[2]);
    c->coherence = rule->initial_coherence * expf(out[3]);
    if (rule->decay_growth > 1.0f) {
        const float present = fmaxf(c->scale, c->slow_scale / (rule->decay_growth * onset));
        const float ratio = c->slow_scale / (present > 0.0f ? present : 1.0f);
        const float beyond = fmaxf(ratio / onset, 1.0f), growth = fminf(ratio, HELD_GROWTH * beyond * beyond);
        c->decay *= fminf(fmaxf(growth, 1.0f), rule->decay_growth);
    }
    if (rule->decay_horizon > 0.0f)
        c->decay *= fmaxf(powf(fmaxf(lasting / rule->decay_horizon, 1.0f), -rule->horizon_power), LEAST_OF_LONG_RUNS);
    for (int k = 0; k < rule->n_modes; k++) {
        const float *numbers = c->per_mode + 6 * k;
        const float friction = 2.0f / (1.0f + exp2f(-numbers[2])), gain = exp2f(numbers[0]);
        float *rates = c->rates + 4 * k;
        rates[0] = friction;
        rates[1] = gain;
        const float phi = 1.0f - friction * horner(rule->psi, N_PSI, friction);
        rates[2] = 1.0f - friction * phi;
        rates[3] = phi * gain;
    }
}

/* Of the log step size, as odeopt.rules.port_hamiltonian.coefficients has it. */
static float aligned_move(float alignment)
{
    return fmaxf(alignment - 0.2f, 0.0f) - fmaxf(-alignment - 0.5f, 0.0f);
}

static void coefficients(const Rule *rule, const Tensor *t, const Group *group, Shared *c, float *x, float *y)
{
    const int modes = rule->n_modes, told = group->knows_progress;
    const int knows_length = told && group->progress > 0.0f, has_schedule = rule->at_exponent >= 0;
    float alignment = 0.0f, growth = 0.0f;
    const float length = knows_length ? fmaxf(c->step - 1.0f, 1.0f) / group->progress : NAN;
    float *input = x;
    for (int k = 0; k < rule->n_time_scales; k++)
        *input++ = tanhf(c->step / rule->time_scales[k]);
    if (rule->uses_progress) {
        *input++ = (float)told;
        if (has_schedule)
            *input++ = knows_length ? tanhf(logf(length / 100.0f) / 4.0f) : 0.0f;
        else
            *input++ = told ? group->progress : 0.0f;
    }
    if (!rule->coordinatewise) {
        const float size = t->features[SIZE];
        const float v = (float)c->sums[0] / size, u2 = (float)c->sums[1] / size, theta2 = (float)c->sums[2] / size;
        *input++ = c->magnitudes[0];
        *input++ = c->magnitudes[1];
        for (int k = 0; k < modes; k++) {
            const float up = (float)c->sums[3 + k] / size, p2 = (float)c->sums[3 + modes + k] / size;
            *input++ = up / sqrtf(u2 * p2 + EPS_SIGNAL);
            alignment += input[-1] / modes;
        }
        for (int k = 0; k < modes; k++)
            *input++ = 0.5f * logf((float)c->sums[3 + modes + k] / size + EPS_SIGNAL);
        *input++ = 0.25f * logf(theta2 * t->features[THETA_FACTOR] + 1e-6f);
        for (int k = 0; k < N_SIGNALS; k++)
            *input++ = t->features[SIGNALS + k];
        c->log_rms = LOG2_E * 0.5f * logf(v + EPS_SIGNAL);
    } else {
        c->log_rms = 0.0f;
    }
    for (int k = 0; k < rule->n_moved; k++)
        *input++ = tanhf(t->memory[k]);

    const float *out = network(rule, x, y);
    for (int k = 0; k < rule->n_memory; k++) {
        const int is_moved = k < rule->n_moved;
        float move = is_moved ? tanhf(out[rule->at_memory + k]) : rule->alignment_rate * aligned_move(alignment);
        if (!is_moved && rule->alignment_horizon > 0.0f && c->step > rule->alignment_horizon && move == 0.0f)
            move = -t->memory[k];
        c->memory[k] = t->memory[k] + move / fmaxf(c->step, MEMORY_WARMUP);
        growth += k == 0 || !is_moved ? c->memory[k] : 0.0f;
    }
    float scheduled = 1.0f;
    if (has_schedule && told) {
        const float left = logf(fmaxf(1.0f - group->progress, 1e-6f));
        scheduled = expf(left * expf(out[rule->at_exponent]));
    }
    if (rule->horizon_power > 0.0f) {
        if (!told)
            scheduled *= 0.5f * powf(fmaxf(c->step, ANYTIME) / REFERENCE, -rule->horizon_power);
        else if (knows_length)
            scheduled *= powf(fmaxf(length, SHORTEST) / REFERENCE, -rule->horizon_power);
    }
    const float start = rule->initial_kappa * (rule->coordinatewise ? 1.0f : t->features[KAPPA_FACTOR]);
    c->kappa = start * expf(out[rule->at_kappa] + growth) * scheduled;
    /* by kind, then by mode, as the network gives them; a constant has no slopes. Those of log_ratio are not converted,
       because log_ratio is. */
    for (int k = 0; k < modes; k++) {
        float *to = c->per_mode + 6 * k;
        memset(to, 0, 6 * sizeof(float));
        for (int kind = 0; kind < rule->n_gain + rule->n_friction; kind++) {
            const int from = kind * modes + k, at = kind < rule->n_gain ? kind : 2 + kind - rule->n_gain;
            to[at] = (out[from] + rule->start[from]) * (at == 1 || at == 3 ? 1.0f : LOG2_E);
        }
    }
    if (t->n_rows > 0)
        matrix_coefficients(rule, t, c, out + rule->at_matrix, growth, scheduled,
                            !told ? c->step : knows_length ? length : 1.0f, told ? rule->decay_onset : 1.0f);
}

static void finish(const Rule *rule, const Tensor *t, const Shared *c)
{
    *t->step = c->step;
    *t->scale = c->scale;
    *t->slow_scale = c->slow_scale;
    for (int k = 0; k < rule->n_memory; k++)
        t->memory[k] = c->memory[k];
}

/* ---------- matrices */

/* Of a matrix, or of each of its blocks. */
static int short_side(const Tensor *t)
{
    const int64_t n_rows = t->n_rows / t->n_blocks, n_columns = t->n / t->n_rows;
    return (int)(n_rows < n_columns ? n_rows : n_columns);
}

static int64_t long_side(const Tensor *t)
{
    return t->n / t->n_blocks / short_side(t);
}

/* Sums of squares over a block: of efforts, and of the momenta to be orthogonalised before and after the step and ahead. */
static int n_squares(const Rule *rule)
{
    return 1 + 3 * (rule->n_spectral > 0 ? rule->n_spectral : 1);
}

/* Numbers of gains: of the rows of a matrix (out, in), or of the columns of one that is stored (in, out). */
static int64_t n_gains(const Rule *rule, const Tensor *t)
{
    return rule->row_power > 0.0f ? (t->is_transposed ? t->n / t->n_rows : t->n_rows) : 0;
}

static int is_mixed(const Rule *rule)
{
    return rule->n_spectral > 0 && rule->n_spectral < rule->n_modes;
}

/* Whether products of a matrix (m, n) are in double precision: see orthogonalise. */
static int in_double_precision(const Rule *rule, int m, int64_t n)
{
    return rule->n_factors > N_FIRST && m < LARGE && n >= ELONGATED * m;
}

/* A size as a multiple of 64 bytes. */
static size_t whole_lines(size_t size)
{
    return (size + 63) / 64 * 64;
}

/* Bytes that its products in bfloat16 need. */
static size_t tiles_of(const Rule *rule, const Tensor *t)
{
#if HAS_AMX
    Tiles unused;
    if (rule->in_bfloat16)
        return lay_out_tiles(short_side(t), long_side(t), NULL, &unused);
#endif
    (void)rule, (void)t;
    return 0;
}

/* Bytes that a matrix needs; they are laid out from `at`, or nowhere if that is NULL. */
static size_t lay_out(const Rule *rule, const Tensor *t, char *at, Workspace *w)
{
    const int is_double = in_double_precision(rule, short_side(t), long_side(t));
    const size_t m = rule->in_bfloat16 ? 0 : padded(short_side(t)), number = is_double ? sizeof(double) : sizeof(float);
    const size_t square = m * m * number, flat = t->n * sizeof(float);
    const size_t n_momenta = rule->n_spectral > 0 ? rule->n_spectral : 1;
    const size_t gains = n_gains(rule, t) * sizeof(float);
    const size_t sizes[] = {n_momenta * flat, is_mixed(rule) ? flat : 0, flat, flat, gains, m * m * sizeof(float),
                            m * PANEL * number, square, square, square, square, tiles_of(rule, t),
                            t->n_blocks * n_squares(rule) * sizeof(double)};
    void *parts[13];
    size_t total = 0;
    for (int k = 0; k < 13; total += whole_lines(sizes[k++]))
        parts[k] = at == NULL || sizes[k] == 0 ? NULL : at + total;
    *w = (Workspace){parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6], parts[7], parts[8], parts[9],
                     parts[10], parts[11], parts[12]};
    return total;
}

/* Port gains of the rows, from the sums of squares of their momenta: row_gains of odeopt.rules.port_hamiltonian.kinetic. */
static void row_gains(const Rule *rule, int64_t n_rows, const float *squares, float *gains)
{
    double mean = 0.0, total = 0.0, gained = 0.0;
    for (int64_t i = 0; i < n_rows; i++)
        mean += (double)squares[i] / n_rows;
    for (int64_t i = 0; i < n_rows; i++) {
        const double ratio = mean > 0.0 ? squares[i] / mean : 1.0, weight = ratio / (ratio + SMALL_ROW);
        const double square = pow(ratio + SMALL_ROW, -rule->row_power);
        gains[i] = (float)sqrt(square);
        total += weight;
        gained += weight * square;
    }
    for (int64_t i = 0; i < n_rows; i++)
        gains[i] *= (float)sqrt(total / gained);
}

static void transpose(const float *x, int64_t n_rows, int64_t n_columns, float *y)
{
    enum { SIDE = 16 };
    for (int64_t i0 = 0; i0 < n_rows; i0 += SIDE)
        for (int64_t j0 = 0; j0 < n_columns; j0 += SIDE)
            for (int64_t i = i0; i < i0 + SIDE && i < n_rows; i++)
                for (int64_t j = j0; j < j0 + SIDE && j < n_columns; j++)
                    y[j * n_rows + i] = x[i * n_columns + j];
}

/* Set w->sum to weight * f(x / norm), or add that; f is the Newton-Schulz iteration of a wide matrix (m, n), which is
   overwritten.

   The iteration X <- q(A) X, A = X X^T, is that of A <- q(A) A q(A), and the product of several q(A) is applied to X at
   once: it takes few products with X instead of two for each factor. But A holds the squares of singular values, and
   each factor multiplies the smallest, and what has been rounded of them, by the square of its first coefficient: by
   2e5 over five factors of Muon, by 4e3 over three. Double precision bears the former, and so does single precision where
   A is computed anew once: the error of ill-conditioned matrices is then that of the iteration of X itself in float32, up
   to 6e-4 of the operator norm. Double precision takes twice as long for products of squares, a second A for those with
   X, so the former is faster where X is elongated. X that is large, too, would take long either way: it is stepped in
   single precision with one A. Its error, up to 1e-3, or 6e-3 where all entries are equal and so their roundings, is far
   below that of bfloat16 in Muon, up to .5. So are three factors: their error is up to 2e-4, or 2e-3 for equal entries. */
static void orthogonalise(const Kernels *kernels, const Rule *rule, float *x, int m, int64_t n, double norm,
                          double weight, const Workspace *w, int adds)
{
    const int is_double = in_double_precision(rule, m, n);
    const int is_anew = rule->n_factors > N_FIRST && (m < LARGE ? !is_double : n < ELONGATED / 2 * m);
    const double *factors = rule->factors;
    int n_factors = rule->n_factors;
    if (!(norm > 0.0)) {
        memset(w->sum, 0, adds ? 0 : m * n * sizeof(float));
        return;
    }
    if (norm < SMALLEST) {
        for (int64_t j = 0; j < m * n; j++)
            x[j] *= (float)(1.0 / SMALLEST);
        norm /= SMALLEST;
    }
    double scale = 1.0 / norm;
    const unsigned control = flush_tiny();
#if HAS_AMX
    if (w->tiles != NULL) {
        iterate_in_tiles(factors, n_factors, x, m, n, (float)scale, (float)weight, w->tiles, w->sum, adds);
        restore_tiny(control);
        return;
    }
#endif
    kernels->gram[is_double](x, m, n, scale, w->panel, w->gram);
    if (is_anew) {
        kernels->polynomial[is_double](factors, N_FIRST, m, 1.0, w);
        kernels->combine(w->factor, x, m, n, (float)scale, w->panel, x, 0);
        kernels->gram[is_double](x, m, n, 1.0, w->panel, w->gram);
        factors += 3 * N_FIRST;
        n_factors -= N_FIRST;
        scale = 1.0;
    }
    kernels->polynomial[is_double](factors, n_factors, m, weight, w);
    kernels->combine(w->factor, x, m, n, (float)scale, w->panel, w->sum, adds);
    restore_tiny(control);
}

/* ---------- one step, in pieces of work */

/* A chunk of a tensor that threads share; or, where `chunk` is negative, all of a smaller one, with its work. */
typedef struct {
    int64_t tensor, chunk, work;
} Piece;

typedef struct {
    const Rule *rule;
    const Tensor *tensors;
    const Group *groups;
    const Options *options;
    const Kernels *kernels;
    void *const *grads, *const *params;
    int n_sums, width;      /* of the network, at most */
    Shared *shared;         /* of each tensor */
    float *activations;     /* two buffers for each tensor */
    double *partial;        /* sums of each piece */
    void *memory;           /* of the workspaces for matrices, one for each thread, from a multiple of 64 bytes on: sums
                               may depend on where vectors lie */
    char *workspaces;
    size_t workspace;
    Piece *pieces;          /* the chunks first */
    int64_t n_chunks, n_pieces;
#if HAS_THREADS
    pthread_mutex_t lock; /* of all below */
    pthread_cond_t changed;
    int pass, n_threads, n_working, is_done;
    int64_t n_taken, n_finished; /* pieces of this pass */
#endif
} Job;

enum { MAGNITUDE, STATISTICS, ADVANCE };

static const Group *group_of(const Job *job, int64_t i)
{
    return job->groups + job->tensors[i].group;
}

static int64_t n_chunks_of(const Tensor *t)
{
    return (t->n + CHUNK - 1) / CHUNK;
}

/* One pass over a chunk of a tensor; the second pass begins with what the first has left in the cache, at the end, and
   the third at the start again. Returns what Shared has as `largest`, of the chunk. */
static int32_t pass_chunk(const Job *job, int pass, int64_t i, int64_t number, double *sums)
{
    const Tensor *t = job->tensors + i;
    const int64_t start = CHUNK * (pass == STATISTICS ? n_chunks_of(t) - 1 - number : number);
    const int64_t stop = start + CHUNK < t->n ? start + CHUNK : t->n;
    const Kernels *kernels = job->kernels;
    if (pass == MAGNITUDE)
        return kernels->magnitude(job->rule, t, job->grads[i], start, stop, sums);
    if (pass == STATISTICS)
        kernels->statistics(job->rule, t, job->shared + i, job->grads[i], job->params[i], start, stop, sums);
    else
        kernels->advance(job->rule, t, job->shared + i, group_of(job, i), job->grads[i], job->params[i], start, stop);
    return 0;
}

/* What follows a pass, from the sums over all chunks. */
static void close_pass(const Job *job, int pass, int64_t i)
{
    const Tensor *t = job->tensors + i;
    Shared *c = job->shared + i;
    float *x = job->activations + 2 * (size_t)job->width * i;
    if (pass == MAGNITUDE) {
        c->is_broken = c->largest >= 0x7f800000;
        c->is_left = c->is_broken || (t->skips_zeros && c->largest == 0);
        *t->n_skipped += c->is_broken;
    }
    if (c->is_left)
        return;
    if (pass == MAGNITUDE)
        running_scales(job->rule, t, group_of(job, i), c);
    if (pass == (job->rule->coordinatewise ? MAGNITUDE : STATISTICS))
        coefficients(job->rule, t, group_of(job, i), c, x, x + job->width);
    if (pass == ADVANCE)
        finish(job->rule, t, c);
}

static int has_pass(const Job *job, int pass)
{
    return pass != STATISTICS || !job->rule->coordinatewise;
}

static int sums_of(const Job *job, int pass)
{
    return pass == MAGNITUDE ? 1 : pass == STATISTICS ? job->n_sums : 0;
}

/* The last pass over a matrix. The momenta of spectral modes are damped and driven by one number each, and move it along
   the velocities at the lookahead point; or along the orthogonalised sum of all outputs: block by block, each with the
   norm of its own momentum. Where the step is one between two moves, there are no products. */
static void advance_matrix(const Job *job, int64_t i, char *workspace)
{
    const Rule *rule = job->rule;
    const Tensor *t = job->tensors + i;
    const Shared *c = job->shared + i;
    const Kernels *kernels = job->kernels;
    const int n_momenta = rule->n_spectral > 0 ? rule->n_spectral : 1, m = short_side(t), n_sums = n_squares(rule);
    const int64_t n_columns = t->n / t->n_rows, n_rows = t->n_rows / t->n_blocks, size = n_rows * n_columns;
    const int is_tall = n_rows > n_columns;
    Workspace w;
    lay_out(rule, t, workspace, &w);
    double *sums = c->sums; /* of all blocks */
    memset(sums, 0, n_sums * sizeof(double));
    memset(w.sums, 0, t->n_blocks * n_sums * sizeof(double));
    if (w.gains != NULL) {
        const int64_t n = n_gains(rule, t) / t->n_blocks;
        kernels->row_squares(rule, t, w.gains);
        for (float *gains = w.gains; gains < w.gains + n_gains(rule, t); gains += n)
            row_gains(rule, n, gains, gains);
    }
    for (int64_t block = 0; block < t->n_blocks; block++) {
        const int64_t end = (block + 1) * size;
        double *own = w.sums + block * n_sums;
        for (int64_t start = block * size; start < end; start += CHUNK) {
            const int64_t stop = start + CHUNK < end ? start + CHUNK : end;
            kernels->advance_matrix(rule, t, c, job->grads[i], start, stop, w.momenta, w.others, w.gains, own);
        }
        for (int k = 0; k < n_sums; k++)
            sums[k] += own[k];
    }
    if (!c->moves) {
        if (group_of(job, i)->keep != 1.0f)
            kernels->move_matrix(t, c, group_of(job, i), job->params[i], NULL, NULL);
        return;
    }
    const float kappa = c->matrix_kappa * t->operator_scale;
    for (int mode = 0, k = 0; k < n_momenta; mode++) {
        if (rule->n_spectral > 0 && !rule->is_spectral[mode])
            continue;
        const double *squares = sums + 1 + 3 * k;
        const float *rates = c->rates + 4 * mode;
        double weight = kappa;
        if (rule->n_spectral > 0) {
            weight *= rates[1] / START_GAIN;
            if (c->coherence > 0.0f) {
                const double rms = sqrt(squares[1] / t->n + 1e-12), effort = sqrt(fmax(sums[0] / t->n, 1.0));
                weight *= pow(fmin(rms * rates[0] / (rates[1] * effort), 1.0), c->coherence);
            }
        }
        for (int64_t block = 0; block < t->n_blocks; block++) {
            const double *of_block = w.sums + block * n_sums + 1 + 3 * k;
            const double norm = rule->n_spectral > 0 ? fmax(of_block[2], fmax(of_block[0], of_block[1])) : of_block[2];
            float *x = w.momenta + k * t->n + block * size;
            Workspace own = w;
            own.sum += block * size;
            if (is_tall) {
                transpose(x, n_rows, n_columns, w.transposed);
                x = w.transposed;
            }
            orthogonalise(kernels, job->rule, x, m, size / m, sqrt(norm), weight, &own, k > 0);
        }
        k++;
    }
    if (is_tall) {
        for (int64_t start = 0; start < t->n; start += size)
            transpose(w.sum + start, n_columns, n_rows, w.transposed + start);
        w.sum = w.transposed;
    }
    if (w.gains != NULL)
        kernels->scale_rows(t, w.sum, 0, t->n, w.gains);
    kernels->move_matrix(t, c, group_of(job, i), job->params[i], w.sum, w.others);
}

static void step_whole(const Job *job, int64_t i, double *sums, char *workspace)
{
    Shared *c = job->shared + i;
    const int64_t n_chunks = n_chunks_of(job->tensors + i);
    for (int pass = MAGNITUDE; pass <= ADVANCE; pass++) {
        if (!has_pass(job, pass) || c->is_left)
            continue;
        memset(c->sums, 0, job->n_sums * sizeof(double));
        const int is_matrix = pass == ADVANCE && job->tensors[i].n_rows > 0;
        if (is_matrix)
            advance_matrix(job, i, workspace);
        for (int64_t chunk = 0; chunk < (is_matrix ? 0 : n_chunks); chunk++) {
            const int32_t largest = pass_chunk(job, pass, i, chunk, sums);
            c->largest = largest > c->largest ? largest : c->largest;
            for (int k = 0; k < sums_of(job, pass); k++)
                c->sums[k] += sums[k];
        }
        close_pass(job, pass, i);
    }
}

#if HAS_THREADS

static int64_t pieces_of(const Job *job, int pass)
{
    return pass == ADVANCE ? job->n_pieces : has_pass(job, pass) ? job->n_chunks : 0;
}

/* Begin a pass, or the next one that has pieces, under the lock; await_pass reads its number without. */
static void open_pass(Job *job, int pass)
{
    while (pass <= ADVANCE && pieces_of(job, pass) == 0)
        pass++;
    __atomic_store_n(&job->pass, pass, __ATOMIC_RELAXED);
    job->n_taken = job->n_finished = 0;
    job->is_done = pass > ADVANCE;
    pthread_cond_broadcast(&job->changed);
}

/* Close a pass over the tensors that threads share, under the lock. */
static void close_shared(Job *job)
{
    for (int64_t number = 0, end; number < job->n_chunks; number = end) {
        const int64_t i = job->pieces[number].tensor;
        double *sums = job->shared[i].sums;
        memset(sums, 0, job->n_sums * sizeof(double));
        for (end = number; end < job->n_chunks && job->pieces[end].tensor == i; end++)
            for (int k = 0; k < sums_of(job, job->pass); k++)
                sums[k] += job->partial[job->n_sums * end + k];
        close_pass(job, job->pass, i);
    }
    open_pass(job, job->pass + 1);
}

/* Wait, under the lock, until a pass is over: for as long as a piece takes, a thread that sleeps would wake too late. */
static void await_pass(Job *job, int pass)
{
    pthread_mutex_unlock(&job->lock);
    for (int k = 0; k < N_LOOKS && __atomic_load_n(&job->pass, __ATOMIC_RELAXED) == pass; k++) {
#if HAS_X86
        __builtin_ia32_pause();
#endif
    }
    pthread_mutex_lock(&job->lock);
    while (job->pass == pass)
        pthread_cond_wait(&job->changed, &job->lock);
}

/* Take pieces until all are finished. No pass waits for a thread that has not come yet, as it may not beside other work. */
static void work(void *argument)
{
    Job *job = argument;
    pthread_mutex_lock(&job->lock);
    const int thread = job->n_working++;
    char *workspace = job->memory == NULL ? NULL : job->workspaces + job->workspace * thread;
    while (!job->is_done) {
        const int pass = job->pass;
        if (job->n_taken == pieces_of(job, pass)) {
            await_pass(job, pass);
            continue;
        }
        const int64_t number = job->n_taken++;
        const Piece piece = job->pieces[number];
        const int is_left = pass != MAGNITUDE && job->shared[piece.tensor].is_left;
        pthread_mutex_unlock(&job->lock);
        double *sums = job->partial + job->n_sums * number;
        int32_t largest = 0;
        if (piece.chunk < 0)
            step_whole(job, piece.tensor, sums, workspace);
        else if (!is_left)
            largest = pass_chunk(job, pass, piece.tensor, piece.chunk, sums);
        pthread_mutex_lock(&job->lock);
        if (largest > job->shared[piece.tensor].largest)
            job->shared[piece.tensor].largest = largest;
        if (++job->n_finished == pieces_of(job, pass))
            close_shared(job);
    }
    pthread_mutex_unlock(&job->lock);
}

/* Leave a job that is done; the last thread frees it. */
static void leave(Job *job)
{
    pthread_mutex_lock(&job->lock);
    const int is_last = --job->n_threads == 0;
    pthread_mutex_unlock(&job->lock);
    if (is_last) {
        pthread_mutex_destroy(&job->lock);
        pthread_cond_destroy(&job->changed);
        free(job->memory);
        free(job);
    }
}

static void *help(void *job)
{
    work(job);
    leave(job);
    return NULL;
}

/* Step with the threads of an OpenMP runtime, or with threads that end by themselves. */
static void step_in_threads(Job *job, int n_threads)
{
    pthread_t thread;
    pthread_attr_t detached;
    sigset_t all, before;
    pthread_mutex_init(&job->lock, NULL);
    pthread_cond_init(&job->changed, NULL);
    if (job->options->parallel != NULL) {
        open_pass(job, MAGNITUDE);
        job->n_threads = 1; /* that leaves, when all have come back */
        job->options->parallel(work, job, n_threads, 0);
        return;
    }
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    sigfillset(&all); /* signals are for the threads of the caller */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_mutex_lock(&job->lock);
    open_pass(job, MAGNITUDE);
    for (job->n_threads = 1; job->n_threads < n_threads; job->n_threads++)
        if (pthread_create(&thread, &detached, help, job) != 0)
            break;
    pthread_mutex_unlock(&job->lock);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&detached);
    work(job);
}

#endif

/* Room for a part of a job, at a multiple of 64 bytes. */
static void *room(char **next, size_t size)
{
    char *found = *next;
    *next += whole_lines(size);
    return found;
}

/* Memory for one step, in large pages if there are any: the system clears it anew for each step, and small page by small
   page that takes a good part of a step. */
static void *memory_of(size_t size)
{
#if defined(MADV_HUGEPAGE)
    const size_t page = (size_t)1 << 21, whole = (size + page - 1) / page * page;
    if (size >= page) {
        void *found = aligned_alloc(page, whole);
        if (found != NULL)
            madvise(found, whole, MADV_HUGEPAGE);
        return found;
    }
#endif
    return malloc(size);
}

/* Whether threads share a tensor. */
static int is_split(const Tensor *t)
{
    return t->n >= SPLIT && t->n_rows == 0;
}

static int has_more_work(const void *a, const void *b)
{
    const int64_t x = ((const Piece *)a)->work, y = ((const Piece *)b)->work;
    return (x < y) - (x > y);
}

/* Lay out the pieces and the room for their sums; NULL where there is no memory. */
static Job *make_job(const Rule *rule, const Tensor *tensors, int64_t n_tensors, void *const *grads,
                     void *const *params, const Group *groups, const Options *options)
{
    const int has_threads = HAS_THREADS && options->n_threads > 1;
    int64_t n_chunks = 0, n_wholes = 0;
    size_t workspace = 0;
    int width = 1;
    for (int k = 0; k <= rule->n_layers; k++)
        width = rule->widths[k] > width ? rule->widths[k] : width;
    for (int64_t i = 0; i < n_tensors; i++) {
        if (grads[i] == NULL)
            continue;
        const int is_shared = has_threads && is_split(tensors + i);
        n_chunks += is_shared ? n_chunks_of(tensors + i) : 0;
        n_wholes += !is_shared;
        Workspace unused;
        const size_t needed = tensors[i].n_rows > 0 ? lay_out(rule, tensors + i, NULL, &unused) : 0;
        workspace = needed > workspace ? needed : workspace;
    }
    const int64_t n_pieces = n_chunks + n_wholes;
    const size_t n_sums = 3 + 3 * rule->n_modes, n_numbers = 10 * rule->n_modes + rule->n_memory;
    const size_t sizes[] = {sizeof(Job), n_tensors * sizeof(Shared), 2 * n_tensors * width * sizeof(float),
                            n_pieces * n_sums * sizeof(double), n_pieces * sizeof(Piece),
                            n_tensors * n_sums * sizeof(double), n_tensors * n_numbers * sizeof(float)};
    size_t total = 0;
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
        total += sizes[k] + 64;
    char *next = calloc(1, total);
    void *memory = workspace > 0 ? memory_of(workspace * (has_threads ? options->n_threads : 1) + 64) : NULL;
    if (next == NULL || (workspace > 0 && memory == NULL)) {
        free(next);
        free(memory);
        return NULL;
    }
    Job *job = room(&next, sizes[0]);
    *job = (Job){.rule = rule, .tensors = tensors, .groups = groups, .options = options, .grads = grads,
                 .params = params};
    job->kernels = kernels_of(options->instructions);
    job->n_sums = (int)n_sums;
    job->width = width;
    job->memory = memory;
    job->workspaces = memory == NULL ? NULL : (char *)memory + (64 - (uintptr_t)memory % 64);
    job->workspace = workspace;
    job->shared = room(&next, sizes[1]);
    job->activations = room(&next, sizes[2]);
    job->partial = room(&next, sizes[3]);
    job->pieces = room(&next, sizes[4]);
    double *sums = room(&next, sizes[5]);
    float *numbers = room(&next, sizes[6]);
    job->n_chunks = n_chunks;
    job->n_pieces = n_pieces;
    int64_t chunk = 0, whole = n_chunks;
    for (int64_t i = 0; i < n_tensors; i++, sums += n_sums, numbers += n_numbers) {
        job->shared[i].sums = sums;
        job->shared[i].per_mode = numbers;
        job->shared[i].rates = numbers + 6 * rule->n_modes;
        job->shared[i].memory = numbers + 10 * rule->n_modes;
        if (grads[i] == NULL)
            continue;
        if (has_threads && is_split(tensors + i))
            for (int64_t k = 0; k < n_chunks_of(tensors + i); k++)
                job->pieces[chunk++] = (Piece){.tensor = i, .chunk = k};
        else
            job->pieces[whole++] = (Piece){i, -1, tensors[i].work};
    }
    if (has_threads) /* so that no thread begins the largest as the others end */
        qsort(job->pieces + n_chunks, n_wholes, sizeof(Piece), has_more_work);
    return job;
}

/* Step all tensors that have a gradient; one whose gradient is not finite is left as it is, and counted.

   Returns the number of those; -1 where memory ran out, and nothing has changed. */
EXPORT int64_t odeopt_step(const Rule *rule, const Tensor *tensors, int64_t n_tensors, void *const *grads,
                           void *const *params, const Group *groups, const Options *options)
{
    Job *job = make_job(rule, tensors, n_tensors, grads, params, groups, options);
    int64_t n_broken = 0;
    if (job == NULL)
        return -1;
#if HAS_THREADS
    if (options->n_threads > 1)
        step_in_threads(job, options->n_threads);
    else
#endif
        for (int64_t k = 0; k < job->n_pieces; k++)
            step_whole(job, job->pieces[k].tensor, job->partial, job->workspaces);
    for (int64_t i = 0; i < n_tensors; i++)
        n_broken += job->shared[i].is_broken;
#if HAS_THREADS
    if (options->n_threads > 1) {
        leave(job);
        return n_broken;
    }
#endif
    free(job->memory);
    free(job);
    return n_broken;
}
