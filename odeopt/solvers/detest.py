"""The 25 problems of DETEST, from t = 0 to 20, with their closed forms where they have one.

References:
    Hull, Enright, Fellen, Sedgwick (1972), Comparing numerical methods for ordinary differential equations, SIAM J.
    Numer. Anal. 9 (4), 603-637.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from odeopt.solvers.initial_value import Problem

Exact = Callable[[Tensor], Tensor]


class LinearField(nn.Module):
    r"""The field :math:`\dot x = A x`.

    Args:
        A: Matrix, shape ``(n, n)``.
    """

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.A @ x


def columns(*parts: Tensor) -> Tensor:
    """Stack the parts of a state as the last axis."""
    return torch.stack(parts, -1)


# Class A: one equation


def _a5(t: Tensor, y: Tensor) -> Tensor:
    return (y - t) / (y + t)


# Class B: small systems


def _predator_and_prey(t: Tensor, y: Tensor) -> Tensor:
    y1, y2 = y.unbind(-1)
    return columns(2 * (y1 - y1 * y2), y1 * y2 - y2)


def _volterra(y: Tensor) -> Tensor:
    """Conserved by the populations."""
    y1, y2 = y.unbind(-1)
    return y1 - y1.log() + 2 * (y2 - y2.log())


def _exact_b2(t: Tensor) -> Tensor:
    slow, fast = 0.5 * torch.exp(-t), 0.5 * torch.exp(-3 * t)  # eigenvalues 0, -1 and -3
    return columns(1 + slow + fast, 1 - 2 * fast, 1 - slow + fast)


def _reaction(t: Tensor, y: Tensor) -> Tensor:
    y1, y2, _ = y.unbind(-1)
    square = y2 * y2
    return columns(-y1, y1 - square, square)


def _torus(t: Tensor, y: Tensor) -> Tensor:
    y1, y2, y3 = y.unbind(-1)
    r = torch.hypot(y1, y2)
    return columns(-y2 - y1 * y3 / r, y1 - y2 * y3 / r, y1 / r)


def _exact_torus(t: Tensor) -> Tensor:
    r = 2 + torch.cos(t)  # the angle is the time
    return columns(r * torch.cos(t), r * torch.sin(t), torch.sin(t))


def _rigid_body(t: Tensor, y: Tensor) -> Tensor:
    y1, y2, y3 = y.unbind(-1)
    return columns(y2 * y3, -y1 * y3, -0.51 * y1 * y2)


def _exact_rigid_body(t: Tensor) -> Tensor:
    from scipy.special import ellipj

    sn, cn, dn, _ = ellipj(t.numpy(), 0.51)
    return columns(*(torch.from_numpy(part) for part in (sn, cn, dn)))


# Class C: moderate systems


def _decay(rates: Tensor) -> LinearField:
    """Each substance decays into the next one; the last one stays."""
    return LinearField(torch.diag(rates, -1) - torch.diag(nn.functional.pad(rates, (0, 1))))


def _exact_c1(t: Tensor) -> Tensor:
    i = torch.arange(9, dtype=t.dtype)
    first = torch.exp(-t)[:, None] * t[:, None] ** i / torch.lgamma(i + 1).exp()
    return torch.cat([first, 1 - first.sum(1, keepdim=True)], 1)


def _exact_c2(t: Tensor) -> Tensor:
    i = torch.arange(10, dtype=t.dtype)
    powers = (-torch.expm1(-t))[:, None] ** i
    return torch.cat([torch.exp(-t)[:, None] * powers[:, :9], powers[:, 9:]], 1)


def _heat(n: int) -> tuple[LinearField, Exact]:
    """The heat equation on n points, which sines diagonalise."""
    k = torch.arange(1, n + 1, dtype=torch.float64)
    beside = torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    A = beside + beside.T - 2 * torch.eye(n, dtype=torch.float64)
    sines = math.sqrt(2 / (n + 1)) * torch.sin(k[:, None] * k * (math.pi / (n + 1)))
    rates = 4 * torch.sin(k * (math.pi / (2 * (n + 1)))) ** 2

    def exact(t: Tensor) -> Tensor:
        return (torch.exp(-t[:, None] * rates) * sines[0]) @ sines

    return LinearField(A), exact


def _unit(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)[0]


class OuterPlanets(nn.Module):
    """Motion of the five outer planets about the sun: positions, then velocities, in astronomical units per 100 days.

    The state holds the three coordinates of one planet after those of the other.
    """

    K2, SUN = 2.95912208286, 1.00000597682

    def __init__(self) -> None:
        super().__init__()
        masses = (0.954786104043e-3, 0.285583733151e-3, 0.437273164546e-4, 0.517759138449e-4, 0.277777777778e-5)
        self.register_buffer("m", torch.tensor(masses, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        q = x[:15].view(5, 3)
        r3 = q.norm(dim=1) ** 3
        d = q - q[:, None]  # from the planet of the row to that of the column
        d3 = (d.square().sum(-1) + torch.eye(5, dtype=x.dtype, device=x.device)) ** 1.5  # no 0/0 for a planet itself
        pull = self.m / d3 @ torch.zeros_like(q) + (self.m[:, None] * (d / d3[..., None])).sum(1)
        indirect = (self.m / r3) @ q - (self.m / r3)[:, None] * q  # the sun is pulled too; not by a planet itself
        a = self.K2 * (-((self.SUN + self.m) / r3)[:, None] * q + pull - indirect)
        return torch.cat([x[15:], a.flatten()])


# of Jupiter, Saturn, Uranus, Neptune and Pluto
_PLANETS = (
    (3.42947415189, 3.35386959711, 1.35494901715),
    (6.64145542550, 5.97156957878, 2.18231499728),
    (11.2630437207, 14.6952576794, 6.27960525067),
    (-30.1552268759, 1.65699966404, 1.43785752721),
    (-21.1238353380, 28.4465098142, 15.3882659679),
    (-0.557160570446, 0.505696783289, 0.230578543901),
    (-0.415570776342, 0.365682722812, 0.169143213293),
    (-0.325325669158, 0.189706021964, 0.087726532278),
    (-0.024047625417, -0.287659532608, -0.117219543175),
    (-0.176860753121, -0.216393453025, -0.014864789309),
)


# Class D: orbits


def _orbit(t: Tensor, y: Tensor) -> Tensor:
    q, p = y[..., :2], y[..., 2:]
    return torch.cat([p, -q / q.norm() ** 3])


def _orbit_energy(y: Tensor) -> Tensor:
    return 0.5 * y[..., 2:].square().sum(-1) - 1 / y[..., :2].norm(dim=-1)


def exact_orbit(t: Tensor, eccentricity: float) -> Tensor:
    """Orbit of unit half axis that starts at its nearest point: positions and momenta, shape ``(n_times, 4)``."""
    e, root = eccentricity, math.sqrt(1 - eccentricity**2)
    E = t + e * torch.sin(t)
    for _ in range(60):  # Newton's method on Kepler's equation; it starts near enough for all e of DETEST
        E = E - (E - e * torch.sin(E) - t) / (1 - e * torch.cos(E))
    rate = 1 / (1 - e * torch.cos(E))
    return columns(torch.cos(E) - e, root * torch.sin(E), -rate * torch.sin(E), rate * root * torch.cos(E))


# Class E: equations of higher order


def _bessel(t: Tensor, y: Tensor) -> Tensor:
    s = t + 1
    return columns(y[1], -(y[1] / s + (1 - 0.25 / (s * s)) * y[0]))


def _exact_bessel(t: Tensor) -> Tensor:
    s = t + 1
    y = torch.sqrt(2 / (math.pi * s)) * torch.sin(s)  # of order one half
    return columns(y, torch.sqrt(2 / (math.pi * s)) * torch.cos(s) - 0.5 * y / s)


def _van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    return columns(y[1], (1 - y[0] * y[0]) * y[1] - y[0])


def _duffing(t: Tensor, y: Tensor) -> Tensor:
    return columns(y[1], y[0] ** 3 / 6 - y[0] + 2 * torch.sin(2.78535 * t))


def _falling_body(t: Tensor, y: Tensor) -> Tensor:
    return columns(y[1], 0.032 - 0.4 * y[1] * y[1])


def _exact_falling_body(t: Tensor) -> Tensor:
    rate = math.sqrt(0.032 * 0.4)
    return columns(30 + torch.log(torch.cosh(rate * t)) / 0.4, math.sqrt(0.032 / 0.4) * torch.tanh(rate * t))


def _pursuit(t: Tensor, y: Tensor) -> Tensor:
    return columns(y[1], torch.sqrt(1 + y[1] * y[1]) / (25 - t))


def _exact_pursuit(t: Tensor) -> Tensor:
    share = (25 - t) / 25
    return columns(0.5 * (-25 * torch.log(share) - t + t * t / 50), 0.5 * (1 / share - share))


def detest() -> dict[str, Problem]:
    """Build the problems, by name: A1 to E5."""
    heat10, exact10 = _heat(10)
    heat51, exact51 = _heat(51)
    rates = torch.arange(1, 10, dtype=torch.float64)
    b2 = torch.tensor([[-1.0, 1.0, 0.0], [1.0, -2.0, 1.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    rows: dict[str, tuple] = {  # field, first state, closed form and energy, where there are such
        "A1": (lambda t, y: -y, [1.0], lambda t: torch.exp(-t)[:, None]),
        "A2": (lambda t, y: -0.5 * y**3, [1.0], lambda t: (1 + t).rsqrt()[:, None]),
        "A3": (lambda t, y: y * torch.cos(t), [1.0], lambda t: torch.exp(torch.sin(t))[:, None]),
        "A4": (lambda t, y: 0.25 * y * (1 - 0.05 * y), [1.0], lambda t: 20 / (1 + 19 * torch.exp(-t / 4))[:, None]),
        "A5": (_a5, [4.0]),
        "B1": (_predator_and_prey, [1.0, 3.0], None, _volterra),
        "B2": (LinearField(b2), [2.0, 0.0, 1.0], _exact_b2),
        "B3": (_reaction, [1.0, 0.0, 0.0]),
        "B4": (_torus, [3.0, 0.0, 0.0], _exact_torus),
        "B5": (_rigid_body, [0.0, 1.0, 1.0], _exact_rigid_body),
        "C1": (_decay(torch.ones_like(rates)), _unit(10), _exact_c1),
        "C2": (_decay(rates), _unit(10), _exact_c2),
        "C3": (heat10, _unit(10), exact10),
        "C4": (heat51, _unit(51), exact51),
        "C5": (OuterPlanets(), sum(_PLANETS, ())),
        "E1": (_bessel, _exact_bessel(torch.zeros((), dtype=torch.float64)), _exact_bessel),
        "E2": (_van_der_pol, [2.0, 0.0]),
        "E3": (_duffing, [0.0, 0.0]),
        "E4": (_falling_body, [30.0, 0.0], _exact_falling_body),
        "E5": (_pursuit, [0.0, 0.0], _exact_pursuit),
    }
    for i, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9), 1):
        start = [1 - e, 0.0, 0.0, math.sqrt((1 + e) / (1 - e))]
        rows[f"D{i}"] = (_orbit, start, partial(exact_orbit, eccentricity=e), _orbit_energy)
    t = torch.linspace(0.0, 20.0, 11, dtype=torch.float64)
    return {
        name: Problem(
            name,
            group=f"DETEST {name[0]}",
            field=field,
            x0=torch.as_tensor(x0, dtype=torch.float64),
            t=t,
            is_autonomous=name not in ("A3", "A5", "E1", "E3", "E5"),
            **dict(zip(("exact", "energy"), known, strict=False)),
        )
        for name, (field, x0, *known) in sorted(rows.items())
    }
