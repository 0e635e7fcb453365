"""Single steps written here: explicit methods under torchdiffeq's names, and linear friction in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from odeopt.ode.checks import check_choice, clock_dtype, real_dtype
from odeopt.ode.recorder import Field, Timed


class Tableau(NamedTuple):
    """Butcher tableau of an explicit method.

    Attributes:
        a: Strictly lower triangle, one row per stage: the weights of the stages before it.
        b: Weights of the stages in the step.
        c: Times of the stages, in steps from its start.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]


TABLEAUX = {
    "euler": Tableau(a=((),), b=(1.0,), c=(0.0,)),
    "midpoint": Tableau(a=((), (1 / 2,)), b=(0.0, 1.0), c=(0.0, 1 / 2)),
    "heun2": Tableau(a=((), (1.0,)), b=(1 / 2, 1 / 2), c=(0.0, 1.0)),
    "heun3": Tableau(a=((), (1 / 3,), (0.0, 2 / 3)), b=(1 / 4, 0.0, 3 / 4), c=(0.0, 1 / 3, 2 / 3)),
    # the 3/8 rule, as in torchdiffeq: its error constant is smaller than that of the classical method
    "rk4": Tableau(
        a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
        c=(0.0, 1 / 3, 2 / 3, 1.0),
    ),
}

EXPLICIT_METHODS: tuple[str, ...] = tuple(TABLEAUX)


class _Sum(NamedTuple):
    """A weighted sum of stages as it is taken: ``scale * (k[first] + ratio * k[i] + ...)``."""

    scale: float
    first: int
    ratios: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, weights: tuple[float, ...]) -> _Sum | None:
        taken = [(i, weight) for i, weight in enumerate(weights) if weight]
        return cls(taken[0][1], taken[0][0], tuple((i, w / taken[0][1]) for i, w in taken[1:])) if taken else None


# laid out once: a step on a small state costs little more than what it does in Python
_PLANS = {name: (tuple(zip(c, map(_Sum.of, a), strict=True)), _Sum.of(b)) for name, (a, b, c) in TABLEAUX.items()}
LINEAR_METHODS: tuple[str, ...] = (*EXPLICIT_METHODS, "exponential")

# psi(z) of an explicit method is the series sum z^k / (k + 2)! with these factors; that of Euler's is zero.
_PSI = {"midpoint": (1 / 2,), "heun2": (1 / 2,), "heun3": (1 / 2, 1 / 6), "rk4": (1 / 2, 1 / 6, 1 / 24)}

# Under this |z| the closed forms of the exponential cancel (at it, second derivatives lose a factor of 60), and
# Bernoulli's series is used: z / (exp(z) - 1) = 1 - z a(z), a(z) = 1/2 - sum B_2k / (2k)! z^(2k - 1). Its terms fall
# by (2 pi)^2 at least: these many leave its second derivative at a few units of rounding.
_SERIES_RADIUS = 1.0
_BERNOULLI = (
    1 / 12,
    -1 / 720,
    1 / 30240,
    -1 / 1209600,
    1 / 47900160,
    -691 / 1307674368000,
    1 / 74724249600,
    -3617 / 10670622842880000,
    43867 / 5109094217170944000,
    -174611 / 802857662698291200000,
    77683 / 14101100039391805440000,
)
_N_TERMS, _N_TERMS_DOUBLE = 5, 11


def explicit_step(field: Field, t0: Tensor | float, dt: Tensor | float, x: Tensor, method: str) -> Tensor:
    r"""Take one step of an explicit Runge-Kutta method.

    .. math:: x_1 = x + h \sum_i b_i k_i, \quad k_i = f\bigl(t_0 + c_i h,\; x + h \sum_{j<i} a_{ij} k_j\bigr)

    Equal to torchdiffeq's step of the same name to rounding. Pure tensor operations: nothing waits for the
    device, and the step can be differentiated any number of times, mapped (``torch.func``) and compiled.

    Args:
        field: Function ``(t, x) -> dx/dt`` with the shape of ``x``; ``t`` is a 0-d tensor in the (real) dtype of
            ``x``, or in double precision where that is too coarse for a step from the number ``t0``; to be read only.
        t0: Time at the start of the step, a number or a 0-d tensor.
        dt: Length of the step, a number (cheaper) or a 0-d tensor; negative to go back in time.
        x: State at ``t0``, any shape.
        method: A name out of :data:`EXPLICIT_METHODS`.

    Returns:
        State at ``t0 + dt``, with the shape and dtype of ``x``.

    Raises:
        ValueError: If there is no such method here.

    Example:
        >>> explicit_step(lambda t, x: -x, 0.0, 0.5, torch.ones(2), "midpoint")
        tensor([0.6250, 0.6250])
    """
    check_explicit(method)
    dtype = real_dtype(x)
    if not isinstance(t0, Tensor):
        clock = dtype if isinstance(dt, Tensor) else clock_dtype(x, max(abs(t0), abs(t0 + dt)), abs(dt))
        t0, field = torch.full((), t0, dtype=clock, device=x.device), Timed(field, dtype)
    elif isinstance(dt, Tensor) or t0.dtype != dtype:
        given, field = field, lambda t, x: given(t.to(dtype), x)
    return checked_explicit_step(field, t0, dt, x, method)


def checked_explicit_step(field: Field, t0: Tensor, dt: Tensor | float, x: Tensor, method: str) -> Tensor:
    """:func:`explicit_step` where the arguments are known to be right, and ``t0`` has the dtype of times."""
    nodes, last = _PLANS[method]
    stages: list[Tensor] = []
    for c, weights in nodes:
        k = field(t0 + c * dt if c else t0, x if weights is None else _moved(x, dt, weights, stages))
        stages.append(k if k.dtype is x.dtype else k.to(x.dtype))
    return _moved(x, dt, last, stages)


def _moved(x: Tensor, dt: Tensor | float, weights: _Sum, stages: Sequence[Tensor]) -> Tensor:
    """Return ``x + dt * sum(w * k)``: one operation per weight, and one rounding onto ``x``."""
    scale, first, ratios = weights
    total = stages[first]
    for i, ratio in ratios:
        total = torch.add(total, stages[i], alpha=ratio)
    if isinstance(dt, Tensor):
        return x + (scale * dt) * total
    return torch.add(x, total, alpha=scale * dt)


def check_explicit(method: str) -> None:
    """Check that a method is written here and takes any field; say what the exponential one is for."""
    if method == "exponential":
        raise ValueError(
            f"Parameter `method` should be one of {', '.join(EXPLICIT_METHODS)} for a general field. "
            "Found `method = 'exponential'`, which solves a held linear friction exactly: see `linear_step`."
        )
    check_choice("method", method, EXPLICIT_METHODS)


def linear_step(p: Tensor, force: Tensor | float, friction: Tensor | float, method: str) -> tuple[Tensor, Tensor]:
    r"""Take one step of unit length of a damped momentum and of its integral, in closed form.

    .. math:: \dot p = -D p + F, \quad \dot s = p, \quad s(0) = 0

    With D and F held this is linear, and an explicit method of as many stages as its order truncates the
    exponential series of :math:`z = -D`:

    .. math:: s_1 = p + (F - D p)\, \psi(z), \quad p_1 = p + F - D s_1

    where :math:`\psi = 0` (euler), 1/2 (midpoint, heun2), :math:`1/2 + z/6` (heun3) and
    :math:`1/2 + z/6 + z^2/24` (rk4). So the step costs a handful of multiplications and no stages, and equals
    integrating the pair with that method to rounding. ``"exponential"`` takes the whole series,
    :math:`\psi = (e^z - 1 - z)/z^2`: exact for any friction, and contracting for any positive one, where the
    explicit methods need D under 2 (euler, midpoint, heun2), 2.51 (heun3) or 2.78 (rk4). Everything is elementwise.
    The exponential and its first and second derivatives are accurate for any friction, zero included, within 3, 8 and
    60 units of rounding (the last at D = 1, where it leaves its series). A negative one overflows where exp(-D) does.

    Args:
        p: Momentum at the start, any shape, floating point.
        force: Force F, broadcastable against ``p``, per unit time.
        friction: Friction D, broadcastable against ``p``, per unit time.
        method: A name out of :data:`LINEAR_METHODS`.

    Returns:
        Momentum at the end, and its integral over the step; both of the broadcast shape.

    Raises:
        ValueError: If there is no such method.

    References:
        Hochbruck, Ostermann (2010), Exponential integrators, Eq. (2.10): the functions phi_1 and phi_2 = psi.

    Example:
        >>> linear_step(torch.ones(2), 0.0, 0.5, "midpoint")
        (tensor([0.6250, 0.6250]), tensor([0.7500, 0.7500]))
    """
    check_choice("method", method, LINEAR_METHODS)
    if method == "exponential":
        if not isinstance(friction, Tensor):
            friction = torch.full((), friction, dtype=p.dtype, device=p.device)
        decay, phi, psi = _exponentials(-friction)
        # not through F - D p: at a large friction it would take small numbers as differences of large ones
        return decay * p + phi * force, phi * p + psi * force
    if method == "euler":
        end = p + (force - friction * p)
        return end, p.expand_as(end).to(end.dtype, copy=True)
    *factors, psi = _PSI[method]
    for factor in reversed(factors):  # at z = -D
        psi = factor - friction * psi
    integral = p + (force - friction * p) * psi
    return p + (force - friction * integral), integral


def _exponentials(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``exp(z)``, ``phi_1(z) = (exp(z) - 1) / z`` and ``phi_2(z) = (phi_1(z) - 1) / z``."""
    exp = z.exp()
    # Masks of ones and zeros: on a CPU `torch.where` costs ten multiplications. Each branch sees arguments of its own
    # only, since an overflow or 0/0 in the one not taken would give NaN.
    is_small = (z.abs() < _SERIES_RADIUS).to(z.dtype)
    small, large = z * is_small, torch.add(z, is_small, alpha=2)
    square = small * small
    *coefficients, series = _BERNOULLI[: _N_TERMS_DOUBLE if z.dtype == torch.float64 else _N_TERMS]
    for coefficient in reversed(coefficients):
        series = series * square + coefficient
    ratio = 0.5 - small * series  # phi_2 / phi_1
    phi = (1 - small * ratio).reciprocal()
    inverse = large.reciprocal()
    phi_large = (exp - 1) * inverse
    psi = torch.lerp((phi_large - 1) * inverse, ratio * phi, is_small)
    return exp, torch.lerp(phi_large, phi, is_small), psi
