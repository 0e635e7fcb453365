"""Kernels over blocks of coordinates, each a part of one row; imported only where they run, because Triton is heavy.

All is computed in float32, whatever is read and written. Sums are those of each block first, and then of the blocks of
a tensor in order, so that a run can be repeated bit for bit.
"""

import triton
import triton.language as tl

from odeopt.rules.port_hamiltonian import rule as _rule
from odeopt.rules.port_hamiltonian.signals import ShapeFeatures

BY_COORDINATE, BY_TENSOR, BY_HISTORY = (tl.constexpr(kind) for kind in range(3))  # what efforts are normalised by

# Numbers of a tensor, in their order: those that the sums of the second stage need, and the step too; those of the step
# alone; its state; then the coefficients of its modes.
WEIGHT, DIVISOR, CARRIED, LOG_RMS, RATE, KEEP, MOVES, STATE = (tl.constexpr(number) for number in range(8))

_SHRINK = tl.constexpr(ShapeFeatures._fields.index("shrink"))
_EPS_EFFORT, _EPS_SIGNAL = tl.constexpr(_rule._EPS_EFFORT), tl.constexpr(_rule._EPS_SIGNAL)


@triton.jit
def magnitudes(
    grad, tensor, features, n_columns, out, N_FEATURES: tl.constexpr, N_SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of a block: whether there is an infinity or a NaN; of the magnitudes, shrunk so as not to overflow."""
    row, at, mask = _place(n_columns, BLOCK)
    g = tl.abs(tl.load(grad + at, mask, 0.0).to(tl.float32))
    to = out + tl.program_id(0).to(tl.int64) * N_SUMS
    tl.store(to, tl.max(tl.where(g < float("inf"), 0.0, 1.0), 0))
    if N_SUMS > 1:
        shrink = tl.load(features + tl.load(tensor + row) * N_FEATURES + _SHRINK)
        tl.store(to + 1, tl.sum(shrink * g, 0))


@triton.jit
def statistics(
    grad, theta, p, second_moment, tensor, numbers, n_columns, mode_stride, out,
    N_NUMBERS: tl.constexpr, MODES: tl.constexpr, KIND: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a block: of the second moments, u^2, theta^2, then of u p_k and of p_k^2 for each mode."""
    row, at, mask = _place(n_columns, BLOCK)
    u, square = _effort(grad, second_moment, numbers + tl.load(tensor + row) * N_NUMBERS, at, mask, KIND, MAXIMIZE)
    x = tl.load(theta + at, mask, 0.0).to(tl.float32)
    to = out + tl.program_id(0).to(tl.int64) * (3 + 2 * MODES)
    tl.store(to, tl.sum(square, 0))
    tl.store(to + 1, tl.sum(u * u, 0))
    tl.store(to + 2, tl.sum(x * x, 0))
    p_at = p + at
    for k in tl.static_range(MODES):
        p_k = tl.load(p_at, mask, 0.0).to(tl.float32)
        tl.store(to + 3 + k, tl.sum(u * p_k, 0))
        tl.store(to + 3 + MODES + k, tl.sum(p_k * p_k, 0))
        p_at += mode_stride  # and not a multiple of it, which may be more than 2^31


@triton.jit
def totals(partial, offsets, out, N_SUMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of a tensor, from those of its rows."""
    tensor = tl.program_id(0)
    start, last = tl.load(offsets + tensor), tl.load(offsets + tensor + 1)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    while start < last:
        row = start + tl.arange(0, BLOCK)
        mask = (row < last)[:, None] & (column < N_SUMS)[None, :]
        total += tl.sum(tl.load(partial + row[:, None] * N_SUMS + column[None, :], mask, 0.0), 0)
        start += BLOCK
    tl.store(out + tensor * N_SUMS + column, total, column < N_SUMS)


@triton.jit
def advance(
    grad, theta, p, second_moment, scale, slow_scale, step, memory, tensor, numbers, n_columns,
    mode_stride, speed_limit,
    N_NUMBERS: tl.constexpr, MODES: tl.constexpr, MEMORY: tl.constexpr, N_GAIN: tl.constexpr, N_FRICTION: tl.constexpr,
    LOG_FLOOR: tl.constexpr, STAGES: tl.constexpr, IS_RELATIVISTIC: tl.constexpr, KIND: tl.constexpr,
    MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Step a block in place: parameter, momenta, second moment, and with the first block of a row what the row holds.

    ``STAGES`` is the number of stages of an explicit solver, zero for the exponential; ``IS_RELATIVISTIC`` has a bit
    for each mode.
    """
    row, at, mask = _place(n_columns, BLOCK)
    shared = numbers + tl.load(tensor + row) * N_NUMBERS
    moves = tl.load(shared + MOVES)
    # compared in blocks, because Triton's interpreter mistakes single truth values
    mask = mask & (moves > tl.zeros((BLOCK,), tl.float32))
    u, square = _effort(grad, second_moment, shared, at, mask, KIND, MAXIMIZE)
    seen = u * u if KIND == BY_HISTORY else square
    log_ratio = 0.5 * tl.log(seen + _EPS_SIGNAL) - tl.load(shared + LOG_RMS)
    if LOG_FLOOR is not None:
        log_ratio = tl.maximum(log_ratio, LOG_FLOOR)
    delta, p_at = tl.zeros_like(u), p + at
    per_mode = shared + STATE + 3 + MEMORY
    for k in tl.static_range(MODES):
        old = tl.load(p_at, mask, 0.0).to(tl.float32)
        log_gain, logit = tl.load(per_mode + k), tl.load(per_mode + N_GAIN * MODES + k)
        if N_GAIN > 1:
            log_gain += tl.load(per_mode + MODES + k) * log_ratio
        if N_FRICTION > 1:
            slopes = per_mode + (N_GAIN + 1) * MODES + k
            logit += tl.load(slopes) * log_ratio
            logit += tl.load(slopes + MODES) * (u * old) + tl.load(slopes + 2 * MODES) * tl.abs(u)
        gain, friction = tl.exp(log_gain), 2 / (1 + tl.exp(-logit))
        force = gain * u
        if STAGES == 0:
            decay, phi, psi = _exponentials(-friction)
            end = decay * old + phi * force
            output = phi * old + psi * force
        else:
            psi = 0.5 if STAGES > 1 else 0.0
            if STAGES == 3:
                psi = 0.5 - friction * (1 / 6)
            elif STAGES == 4:
                psi = 0.5 - friction * (1 / 6 - friction * (1 / 24))
            output = old + (force - friction * old) * psi
            end = old + (force - friction * output)
        if (IS_RELATIVISTIC >> k) & 1:
            # by the larger of the two, so that no square overflows, and none that counts vanishes
            largest = tl.maximum(tl.abs(end), speed_limit)
            a, b = tl.div_rn(end, largest), tl.div_rn(speed_limit, largest)
            output = speed_limit * (a / tl.sqrt_rn(a * a + b * b))
        delta += gain * output
        tl.store(p_at, end, mask)
        p_at += mode_stride
    x = tl.load(theta + at, mask, 0.0).to(tl.float32)
    tl.store(theta + at, tl.load(shared + KEEP) * x + tl.load(shared + RATE) * delta, mask)
    if KIND != BY_TENSOR:
        tl.store(second_moment + at, square, mask)
    is_first = mask & (at == row * n_columns)
    at = row + tl.zeros((BLOCK,), tl.int64)
    tl.store(scale + at, tl.load(shared + STATE), is_first)
    tl.store(slow_scale + at, tl.load(shared + STATE + 1), is_first)
    tl.store(step + at, tl.load(shared + STATE + 2), is_first)
    for k in tl.static_range(MEMORY):
        tl.store(memory + at * MEMORY + k, tl.load(shared + STATE + 3 + k), is_first)


@triton.jit
def _place(n_columns, BLOCK: tl.constexpr):
    """Row of this program's block, its places in memory, and which of them are in the row."""
    n_blocks = tl.cdiv(n_columns, BLOCK)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    column = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, row * n_columns + column, column < n_columns


@triton.jit
def _effort(grad, second_moment, shared, at, mask, KIND: tl.constexpr, MAXIMIZE: tl.constexpr):
    """Port efforts of a block, and its second moments."""
    g, weight = tl.load(grad + at, mask, 0.0).to(tl.float32), tl.load(shared + WEIGHT)
    if MAXIMIZE:
        g = -g
    if KIND == BY_HISTORY:
        v = tl.load(second_moment + at, mask, 0.0).to(tl.float32)
        largest = tl.maximum(tl.abs(g), v)
        unit = tl.where(largest == 0.0, 1.0, largest)
        a, b = tl.div_rn(v, unit), tl.div_rn(g, unit)
        square = largest * tl.sqrt_rn((1 - weight) * a * a + weight * b * b)
        u = -tl.div_rn(g, tl.where(square > 0.0, square, 1.0))
    else:
        u = tl.div_rn(g, -tl.load(shared + DIVISOR))
        square = u * u
        if KIND == BY_COORDINATE:
            v = tl.load(second_moment + at, mask, 0.0).to(tl.float32)
            square = tl.load(shared + CARRIED) * v + weight * square
            u = u * tl.rsqrt(square + _EPS_EFFORT)
    return u, square


@triton.jit
def _exponentials(z):
    """``exp(z)``, ``phi_1(z)`` and ``phi_2(z)`` of :func:`odeopt.ode.linear_step`."""
    decay, s = tl.exp(z), z * z
    series = ((((1 / 47900160) * s - 1 / 1209600) * s + 1 / 30240) * s - 1 / 720) * s + 1 / 12
    ratio = 0.5 - z * series
    is_small = tl.abs(z) < 1.0
    phi_small = 1 / (1 - z * ratio)
    inverse = 1 / tl.where(is_small, 1.0, z)
    phi_large = (decay - 1) * inverse
    phi = tl.where(is_small, phi_small, phi_large)
    return decay, phi, tl.where(is_small, ratio * phi_small, (phi_large - 1) * inverse)
