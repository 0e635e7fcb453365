/* Symmetric products of matrices in one precision. Included by kernels.h for each instruction set, with

     REAL      float or double,
     COLUMNS   of REAL in a strip, see below,
     IN(name)  the name of a function in this precision.

   A symmetric matrix lies in strips of columns: column j of row i is number i COLUMNS + j % COLUMNS of strip
   j / COLUMNS. What is beyond row or column m enters no other number. */

/* Tile c = a^T b, or what it adds to c, of two strips of n rows: some columns of the one, all of the other. The compiler
   keeps `sums` in registers. */
TARGET static ALWAYS_INLINE void IN(tile)(const REAL *restrict a, const REAL *restrict b, int n, REAL *restrict c,
                                          int64_t stride, int adds)
{
    REAL sums[TILE][COLUMNS];
    UNROLL
    for (int i = 0; i < TILE; i++)
#pragma omp simd
        for (int j = 0; j < COLUMNS; j++)
            sums[i][j] = 0;
    for (int k = 0; k < n; k++) {
        UNROLL
        for (int i = 0; i < TILE; i++) {
            const REAL factor = a[(size_t)k * COLUMNS + i];
#pragma omp simd
            for (int j = 0; j < COLUMNS; j++)
                sums[i][j] += factor * b[(size_t)k * COLUMNS + j];
        }
    }
    UNROLL
    for (int i = 0; i < TILE; i++) {
#pragma omp simd
        for (int j = 0; j < COLUMNS; j++)
            c[i * stride + j] = sums[i][j] + (adds ? c[i * stride + j] : 0);
    }
}

/* Symmetric product c = a^T b, or what it adds to c, of two matrices of n rows in strips of `stride` rows. Tiles on and
   below the diagonal are computed; `is_last` mirrors them. Sums are of few terms, because the roundings of a long sum of
   like terms are alike, and add up. */
TARGET static void IN(add_products)(const REAL *a, const REAL *b, int m, int n, int stride, REAL *c, int adds,
                                    int is_last)
{
    const int side = padded(m);
    for (int start = 0; start < n; start += N_TERMS) {
        const int n_terms = n - start < N_TERMS ? n - start : N_TERMS;
        const int mirrors = is_last && start + n_terms == n;
        for (int j = 0; j < m; j += COLUMNS)
            for (int i = j; i < m; i += TILE) {
                const size_t strip = i / COLUMNS * COLUMNS;
                const REAL *rows = a + strip * stride + start * COLUMNS + i % COLUMNS;
                REAL *to = c + (size_t)j * side + i * COLUMNS, *mirrored = c + strip * side + j * COLUMNS + i % COLUMNS;
                IN(tile)(rows, b + (size_t)j * stride + start * COLUMNS, n_terms, to, COLUMNS, adds || start > 0);
                for (int s = 0; mirrors && (i >= j + COLUMNS || m >= LARGE) && s < COLUMNS; s++)
                    for (int r = j + s < i ? 0 : j + s - i; r < TILE; r++)
                        mirrored[s * COLUMNS + r] = to[r * COLUMNS + s];
            }
    }
}

/* Rows of a wide matrix (m, n), times `factor`, as columns in strips of PANEL rows: `width` of them, in blocks, in which
   the compiler transposes in registers. */
TARGET static void IN(pack)(const float *x, int m, int64_t n, int width, REAL factor, REAL *panel)
{
    enum { SIDE = 4 };
    for (int i = 0; i < m; i += SIDE)
        for (int k = 0; k < width; k += SIDE) {
            const int n_rows = m - i < SIDE ? m - i : SIDE, n_columns = width - k < SIDE ? width - k : SIDE;
            const float *from = x + i * n + k;
            REAL *to = panel + (size_t)(i / COLUMNS) * COLUMNS * PANEL + k * COLUMNS + i % COLUMNS, block[SIDE][SIDE];
            if (n_rows == SIDE && n_columns == SIDE) {
                for (int r = 0; r < SIDE; r++)
                    for (int s = 0; s < SIDE; s++)
                        block[s][r] = factor * from[r * n + s];
                for (int s = 0; s < SIDE; s++)
                    memcpy(to + s * COLUMNS, block[s], sizeof block[s]);
            } else {
                for (int r = 0; r < n_rows; r++)
                    for (int s = 0; s < n_columns; s++)
                        to[s * COLUMNS + r] = factor * from[r * n + s];
            }
        }
}

/* Gram matrix a = scale^2 x x^T of the rows of a wide matrix (m, n). */
TARGET static void IN(gram)(const float *x, int m, int64_t n, double scale, void *room, void *a)
{
    REAL *panel = room;
    memset(panel + (size_t)(m - 1) / COLUMNS * COLUMNS * PANEL, 0, sizeof(REAL) * COLUMNS * PANEL);
    for (int64_t start = 0; start < n; start += PANEL) {
        const int width = (int)(n - start < PANEL ? n - start : PANEL);
        IN(pack)(x + start, m, n, width, (REAL)scale, panel);
        IN(add_products)(panel, panel, m, width, PANEL, a, start > 0, start + PANEL >= n);
    }
}

/* Product of the q(A) of some factors of the Newton-Schulz iteration, times weight, in w->factor, from A in w->gram.
   All matrices are polynomials of the first A, so they are symmetric and commute. */
TARGET static void IN(polynomial)(const double *factors, int n_factors, int m, double weight, const Workspace *w)
{
    const int side = padded(m);
    const size_t size = (size_t)side * side;
    REAL *a = w->gram, *power = w->power, *q = w->polynomial, *total = w->total;
    for (int factor = 0; factor < n_factors; factor++, factors += 3) {
        IN(add_products)(a, a, m, m, side, power, 0, 1);
#pragma omp simd
        for (size_t k = 0; k < size; k++)
            q[k] = (REAL)factors[1] * a[k] + (REAL)factors[2] * power[k];
        for (int i = 0; i < m; i++)
            q[(size_t)(i / COLUMNS) * COLUMNS * side + i * COLUMNS + i % COLUMNS] += (REAL)factors[0];
        if (factor < n_factors - 1) {
            IN(add_products)(a, q, m, m, side, power, 0, 1);
            IN(add_products)(power, q, m, m, side, a, 0, 1);
        }
        REAL *unused = total;
        if (factor == 0) {
            total = q;
            q = unused;
        } else {
            IN(add_products)(total, q, m, m, side, power, 0, 1);
            total = power;
            power = unused;
        }
    }
    for (int j = 0; j < m; j += COLUMNS)
        for (int i = 0; i < m; i++) {
            float *to = w->factor + (size_t)(j / STRIP) * STRIP * side + i * STRIP + j % STRIP;
            const REAL *from = total + (size_t)j * side + i * COLUMNS;
#pragma omp simd
            for (int s = 0; s < COLUMNS; s++)
                to[s] = (float)((REAL)weight * from[s]);
        }
}

#undef REAL
#undef IN
#undef COLUMNS
