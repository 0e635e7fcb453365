/* The Newton-Schulz iteration with products in bfloat16, in the tiles of AMX. Sums of products are float32, and matrices
   are rounded to bfloat16 between two products, as in Muon. Included by step.c where compiler and system have tiles.

   A tile has 16 rows of 64 bytes. What is multiplied lies in strips of tiles, along the axis that is summed over:

     Rows     a tile of 16 rows and 32 columns, of a factor on the left,
     Pairs    a tile of 32 rows and 16 columns, entries of rows 2k and 2k + 1 side by side, of a factor on the right.

   Products are computed in blocks of two by two tiles of float32; sides are padded to blocks with zeros. */

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16")))
#define SEEN_BY_TILES() __asm__ volatile("" : : : "memory") /* the compiler does not know what they read and write */
#define SIDE 32      /* of a block */
#define N_TOGETHER 8 /* blocks of columns that enter a Gram matrix at once, while they are in the cache */

typedef uint16_t Rows[512];
typedef uint32_t Pairs[256];
typedef float Block[4][256]; /* tiles in rows */

/* Room for a wide matrix of m by n blocks. Strips of two neighbours are m tiles apart, or those of some columns of it as
   many as there are of these. */
typedef struct {
    int64_t m, n;
    Pairs *x, *next, *turned, *gram_pairs; /* the matrix; two strips of the next one; some columns of it, transposed */
    Rows *rows, *gram_rows, *factor;       /* some columns of it; q(A) */
    Block *gram;                           /* A on and below the diagonal, row by row */
} Tiles;

/* Whether tiles can be used. Linux has to be asked for them, once in a process. */
static int has_tiles(void)
{
    enum { GET_PERMISSION = 0x1023, TILE_DATA = 18, AMX_TILE = 1 << 24, AMX_BF16 = 1 << 22, VECTOR_BF16 = 1 << 5 };
    unsigned a, b, c, d;
    if (odeopt_instructions() < 2 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_TILE) || !(d & AMX_BF16))
        return 0;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & VECTOR_BF16))
        return 0;
    return syscall(SYS_arch_prctl, GET_PERMISSION, TILE_DATA) == 0;
}

/* Block c = a b, or what it adds to c, of two strips each. */
AMX static inline void block_product(Rows *a, int64_t a_step, Pairs *b, int64_t b_step, int64_t n_tiles, Block c, int adds)
{
    SEEN_BY_TILES();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (adds) {
        _tile_loadd(0, c[0], 64);
        _tile_loadd(1, c[1], 64);
        _tile_loadd(2, c[2], 64);
        _tile_loadd(3, c[3], 64);
    }
    for (int64_t k = 0; k < n_tiles; k++) {
        _tile_loadd(4, a[k], 64);
        _tile_loadd(5, a[a_step + k], 64);
        _tile_loadd(6, b[k], 64);
        _tile_loadd(7, b[b_step + k], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[1], 64);
    _tile_stored(2, c[2], 64);
    _tile_stored(3, c[3], 64);
    SEEN_BY_TILES();
}

/* Transpose 16 x 16 numbers of 32 bits. */
AMX static inline void turn(const void *from, void *to)
{
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++)
        x[i] = _mm512_loadu_si512((const char *)from + 64 * i);
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i++) { /* then number 4q + s of x[4p + r] is that of row 4p + s and column 4q + r */
        const __m512i first = y[i / 4 * 4 + i % 4 / 2], second = y[i / 4 * 4 + i % 4 / 2 + 2];
        x[i] = i % 2 ? _mm512_unpackhi_epi64(first, second) : _mm512_unpacklo_epi64(first, second);
    }
    for (int r = 0; r < 4; r++)
        for (int half = 0; half < 2; half++) {
            const __m512i *z = y + 2 * half;
            y[0] = _mm512_shuffle_i32x4(x[r], x[4 + r], 0x44);
            y[1] = _mm512_shuffle_i32x4(x[8 + r], x[12 + r], 0x44);
            y[2] = _mm512_shuffle_i32x4(x[r], x[4 + r], 0xee);
            y[3] = _mm512_shuffle_i32x4(x[8 + r], x[12 + r], 0xee);
            _mm512_storeu_si512((char *)to + 64 * (8 * half + r), _mm512_shuffle_i32x4(z[0], z[1], 0x88));
            _mm512_storeu_si512((char *)to + 64 * (8 * half + 4 + r), _mm512_shuffle_i32x4(z[0], z[1], 0xdd));
        }
}

AMX static void turn_block(Block from, Block to)
{
    for (int k = 0; k < 4; k++)
        turn(from[k], to[k % 2 * 2 + k / 2]);
}

/* Two rows of 16 numbers, rounded. */
AMX static inline __m512i rounded(const float *first, const float *second)
{
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(second), _mm512_loadu_ps(first));
}

AMX static inline void round_block(Block block)
{
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 256; i += 16) {
            const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(block[k] + i));
            _mm512_storeu_si512(block[k] + i, _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
        }
}

AMX static inline void round_to_rows(Block block, Rows *rows, int64_t step)
{
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 256; i += 16)
            _mm512_storeu_si512(rows[half * step] + 2 * i, rounded(block[2 * half] + i, block[2 * half + 1] + i));
}

AMX static inline void round_to_pairs(Block block, Pairs *pairs, int64_t step)
{
    uint16_t order[32]; /* of the entries of two rows, from side to side */
    for (int i = 0; i < 32; i++)
        order[i] = (uint16_t)(i / 2 + i % 2 * 16);
    const __m512i sides = _mm512_loadu_si512(order);
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 512; i += 32) {
            const float *row = block[half + i / 256 * 2] + i % 256;
            _mm512_storeu_si512(pairs[half * step] + i / 2, _mm512_permutexvar_epi16(sides, rounded(row, row + 16)));
        }
}

/* Bytes that a matrix needs; they are laid out from `at`, or nowhere if that is NULL. */
static size_t lay_out_tiles(int m, int64_t n, char *at, Tiles *t)
{
    const int64_t rows = (m + SIDE - 1) / SIDE, columns = (n + SIDE - 1) / SIDE;
    const int64_t some = columns < N_TOGETHER ? columns : N_TOGETHER;
    const int64_t n_tiles[] = {2 * rows * columns, 2 * rows, 2 * rows * some, 2 * rows * rows,
                               2 * rows * some, 2 * rows * rows, 2 * rows * rows, 2 * rows * (rows + 1)};
    void *parts[8];
    size_t total = 0;
    for (int k = 0; k < 8; total += sizeof(Rows) * n_tiles[k++])
        parts[k] = at == NULL ? NULL : at + total;
    *t = (Tiles){rows, columns, parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6], parts[7]};
    return total;
}

/* Rows of q(A) = a + b A + c A A, from a, b and c of a factor. */
AMX static void polynomial_in_tiles(const Tiles *t, const double *factor)
{
    const int64_t m = t->m;
    const float of_one = (float)factor[0], of_a = (float)factor[1], of_square = (float)factor[2];
    Block block, mirrored;
    Block *a = t->gram;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j <= i; j++, a++) {
            round_block(*a); /* of b A, too, so that the errors of the two terms are alike, and cancel in part */
            round_to_rows(*a, t->gram_rows + 2 * i * m + j, m);
            round_to_pairs(*a, t->gram_pairs + 2 * j * m + i, m);
            if (j < i) {
                turn_block(*a, mirrored);
                round_to_rows(mirrored, t->gram_rows + 2 * j * m + i, m);
                round_to_pairs(mirrored, t->gram_pairs + 2 * i * m + j, m);
            }
        }
    a = t->gram;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j <= i; j++, a++) {
            block_product(t->gram_rows + 2 * i * m, m, t->gram_pairs + 2 * j * m, m, m, block, 0);
            for (int k = 0; k < 4; k++)
                for (int l = 0; l < 256; l++)
                    block[k][l] = of_a * (*a)[k][l] + of_square * block[k][l];
            for (int k = 0; i == j && k < 4; k += 3)
                for (int l = 0; l < 256; l += 17)
                    block[k][l] += of_one;
            round_to_rows(block, t->factor + 2 * i * m + j, m);
            if (j < i) {
                turn_block(block, mirrored);
                round_to_rows(mirrored, t->factor + 2 * j * m + i, m);
            }
        }
}

/* Rows of a block, and the first of its numbers, of a matrix (m, n), that are not padding. */
typedef struct {
    int n_rows;
    int64_t at;
    __mmask16 columns[2]; /* of the two tiles side by side */
} Part;

static inline Part part_of(int64_t i, int64_t j, int m, int64_t n)
{
    const int64_t n_rows = m - SIDE * i, n_columns = n - SIDE * j;
    const uint32_t columns = n_columns < SIDE ? ((uint32_t)1 << n_columns) - 1 : 0xffffffff;
    return (Part){n_rows < SIDE ? (int)n_rows : SIDE, SIDE * (i * n + j), {(__mmask16)columns, (__mmask16)(columns >> 16)}};
}

AMX static inline void read_block(const float *x, int64_t n, Part part, float scale, Block block)
{
    memset(block, 0, sizeof(Block));
    for (int r = 0; r < part.n_rows; r++)
        for (int side = 0; side < 2; side++) {
            const __m512 row = _mm512_maskz_loadu_ps(part.columns[side], x + part.at + r * n + 16 * side);
            _mm512_storeu_ps(block[r / 16 * 2 + side] + r % 16 * 16, _mm512_mul_ps(_mm512_set1_ps(scale), row));
        }
}

AMX static inline void write_block(Block block, int64_t n, Part part, float weight, float *sum, int adds)
{
    for (int r = 0; r < part.n_rows; r++)
        for (int side = 0; side < 2; side++) {
            float *to = sum + part.at + r * n + 16 * side;
            const __m512 before = _mm512_maskz_loadu_ps(adds ? part.columns[side] : 0, to);
            const __m512 row = _mm512_loadu_ps(block[r / 16 * 2 + side] + r % 16 * 16);
            _mm512_mask_storeu_ps(to, part.columns[side], _mm512_fmadd_ps(_mm512_set1_ps(weight), row, before));
        }
}

/* Set `sum` to weight * f(scale * x), or add that; f is the Newton-Schulz iteration of a wide matrix (m, n). */
AMX static void iterate_in_tiles(const double *factors, int n_factors, const float *x, int m, int64_t n, float scale,
                                 float weight, char *room, float *sum, int adds)
{
    struct {
        uint8_t palette, unused[15];
        uint16_t n_bytes[16];
        uint8_t n_rows[16];
    } config = {.palette = 1};
    Block block;
    Tiles t;
    lay_out_tiles(m, n, room, &t);
    for (int k = 0; k < 8; k++) {
        config.n_bytes[k] = 64;
        config.n_rows[k] = 16;
    }
    SEEN_BY_TILES();
    _tile_loadconfig(&config);
    for (int factor = 0; factor <= n_factors; factor++) {
        if (factor > 0)
            polynomial_in_tiles(&t, factors + 3 * (factor - 1));
        for (int64_t j = 0; j < t.n; j++) {
            Pairs *columns = t.x + 2 * j * t.m;
            const int64_t first = j / N_TOGETHER * N_TOGETHER;
            const int64_t some = t.n - first < N_TOGETHER ? t.n - first : N_TOGETHER;
            for (int64_t i = 0; i < t.m; i++) {
                if (factor == 0)
                    read_block(x, n, part_of(i, j, m, n), scale, block);
                else
                    block_product(t.factor + 2 * i * t.m, t.m, columns, t.m, t.m, block, 0);
                if (factor == n_factors) {
                    write_block(block, n, part_of(i, j, m, n), weight, sum, adds);
                    continue;
                }
                Rows *rows = t.rows + 2 * i * some + j - first;
                Pairs *turned = t.turned + 2 * i * some + j - first;
                round_to_pairs(block, t.next + i, t.m);
                round_to_rows(block, rows, some);
                turn(rows[0], turned[0]);
                turn(rows[some], turned[some]);
            }
            if (factor == n_factors)
                continue;
            memcpy(columns, t.next, 2 * t.m * sizeof(Pairs));
            Block *a = t.gram;
            for (int64_t i = 0; j == first + some - 1 && i < t.m; i++)
                for (int64_t k = 0; k <= i; k++)
                    block_product(t.rows + 2 * i * some, some, t.turned + 2 * k * some, some, some, *a++, first > 0);
        }
    }
    _tile_release();
}

#undef SIDE
