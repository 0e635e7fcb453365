"""True mechanical systems, with the equations and ranges of Dissipative SymODEN's four tasks.

Friction is that of the paper's equation for its pendulum, ``D = .1``, and of the last version of its authors' code
for the others, who add it to the accelerations: a rate of .3, which is written here as the matrix D it stands for.
In that code friction pushes the acrobot's first joint instead of braking it; here it brakes both.

References:
    Zhong, Dey, Chakraborty (2020), Dissipative SymODEN, Section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from odeopt.checks import is_number, require, require_counts
from odeopt.physics import GivenMatrix, PortHamiltonianSystem
from odeopt.systems.observed import PortHamiltonianModel, check_seed


class Mechanism(NamedTuple):
    """A true system, and how it is sampled.

    Attributes:
        name: What it is called.
        model: Its equations.
        dt: Time between two observations, in seconds.
        low: Lower bounds of the first positions, then of the first momenta or velocities (whichever is observed).
        high: Upper bounds.
    """

    name: str
    model: PortHamiltonianModel
    dt: float
    low: tuple[float, ...]
    high: tuple[float, ...]

    def first_observations(self, n: int, *, seed: int) -> Tensor:
        """Draw first observations uniformly, in double precision.

        Args:
            n: How many.
            seed: The same seed gives the same ones, and the first of them whatever ``n`` is.

        Returns:
            Shape ``(n, n_observed)``.
        """
        require_counts(n=n)
        check_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        low, high = (torch.tensor(bound, dtype=torch.float64) for bound in (self.low, self.high))
        drawn = low + (high - low) * torch.rand(n, len(low), generator=generator, dtype=torch.float64)
        q, rate = drawn.chunk(2, dim=-1)
        seen = q if self.model.observes == "momentum" else self.model.coordinates(q)
        return torch.cat((seen, rate), dim=-1)


def pendulum(*, friction: float = 0.1) -> Mechanism:
    r"""Pendulum of which position and momentum are observed, from hanging on.

    .. math:: H = \tfrac32\, p^2 + 5\,(1 - \cos q), \qquad D = \text{friction}, \qquad g = 1

    Its position is drawn and observed on the line, as in the paper: turns are counted.

    Args:
        friction: Torque per speed.

    Raises:
        ValueError: If ``friction`` is negative or not finite.
    """
    system = _system(1, [3.0], lambda q: 5 * (1 - q[..., 0].cos()), [friction], [[1.0]])
    model = PortHamiltonianModel(system, "R", observes="momentum")
    return Mechanism("pendulum", model, 0.05, (-math.pi,) * 2, (2 * math.pi,) * 2)


def embedded_pendulum(*, friction: float = 0.1) -> Mechanism:
    r"""Pendulum of which cosine, sine and velocity are observed, from standing on.

    .. math:: H = \tfrac32\, p^2 + 5\,(1 + \cos q), \qquad D = \text{friction}, \qquad g = 1

    Args:
        friction: Torque per speed.

    Raises:
        ValueError: If ``friction`` is negative or not finite.
    """
    system = _system(1, [3.0], lambda q: 5 * (1 + q[..., 0].cos()), [friction], [[1.0]])
    model = PortHamiltonianModel(system, "S", observes="velocity")
    return Mechanism("embedded pendulum", model, 0.05, (-math.pi, -1.0), (math.pi, 1.0))


def cart_pole(*, friction: float = 0.075) -> Mechanism:
    r"""Pole on a cart that is pushed; position on the line, angle on the circle, from standing on.

    .. math:: M = \begin{pmatrix} m_c + m_p & m_p l \cos q_2 \\ m_p l \cos q_2 & \tfrac43 m_p l^2 \end{pmatrix},
        \quad V = m_p\, \mathrm{g}\, l \cos q_2, \quad D = \mathrm{diag}(0, \text{friction}), \quad g = (1, 0)

    with masses of .5 kg, half a length of .5 m and gravity of 9.8.

    Args:
        friction: Torque per speed in the joint; .3 m l by default.

    Raises:
        ValueError: If ``friction`` is negative or not finite.
    """
    total, arm, inertia, gravity = 1.0, 0.25, 1 / 6, 9.8  # m_c + m_p, m_p l, 4/3 m_p l^2

    def inverse_mass(q: Tensor) -> Tensor:
        return _inverse(total, arm * q[..., 1].cos(), inertia)

    system = _system(2, inverse_mass, lambda q: arm * gravity * (1 + q[..., 1].cos()), [0.0, friction], [[1.0], [0.0]])
    model = PortHamiltonianModel(system, "RS", observes="velocity")
    return Mechanism("cart-pole", model, 0.02, (-0.5, -3.14, -0.05, -3.0), (0.5, 3.14, 0.05, 3.0))


def acrobot(*, friction: float = 0.3) -> Mechanism:
    r"""Two links of which the second joint is driven; both angles on circles, from hanging on, the second relative.

    .. math:: M = \begin{pmatrix} 3.5 + \cos q_2 & 1.25 + .5 \cos q_2 \\ \cdot & 1.25 \end{pmatrix}, \quad
        V = -14.7 \cos q_1 - 4.9 \cos(q_1 + q_2), \quad D = \text{friction}\, I, \quad g = (0, 1)

    Links of 1 kg, 1 m and, as in the environment that the paper uses, inertia of 1, with gravity of 9.8.

    Args:
        friction: Torque per speed in each joint.

    Raises:
        ValueError: If ``friction`` is negative or not finite.
    """

    def inverse_mass(q: Tensor) -> Tensor:
        cos = q[..., 1].cos()
        return _inverse(3.5 + cos, 1.25 + 0.5 * cos, 1.25)

    def potential(q: Tensor) -> Tensor:
        return 14.7 * (1 - q[..., 0].cos()) + 4.9 * (1 - q.sum(-1).cos())

    system = _system(2, inverse_mass, potential, [friction] * 2, [[0.0], [1.0]])
    model = PortHamiltonianModel(system, "SS", observes="velocity")
    return Mechanism("acrobot", model, 0.05, (-3.14,) * 4, (3.14,) * 4)


MECHANISMS: Mapping[str, Callable[..., Mechanism]] = MappingProxyType(
    {"pendulum": pendulum, "embedded pendulum": embedded_pendulum, "cart-pole": cart_pole, "acrobot": acrobot}
)


def _system(
    dof: int,
    inverse_mass: list[float] | Callable[[Tensor], Tensor],
    potential: Callable[[Tensor], Tensor],
    friction: list[float],
    port: list[list[float]],
) -> PortHamiltonianSystem:
    """System of given parts in double precision; a friction of zero has no part."""
    for value in friction:
        require(is_number(value) and value >= 0, "friction", value, "a finite number of at least 0")

    def constant(value: list) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)

    return PortHamiltonianSystem(
        dof,
        inverse_mass=constant(inverse_mass) if isinstance(inverse_mass, list) else GivenMatrix(inverse_mass),
        potential=potential,
        dissipation=constant(friction) if any(friction) else None,
        port=constant(port),
    )


def _inverse(a: Tensor | float, b: Tensor, c: float) -> Tensor:
    """Inverse of the symmetric matrix ((a, b), (b, c)), shape ``(*batch, 2, 2)``."""
    a, c = (torch.as_tensor(value, dtype=b.dtype, device=b.device).expand_as(b) for value in (a, c))
    rows = torch.stack((c, -b, -b, a), dim=-1) / (a * c - b * b).unsqueeze(-1)
    return rows.unflatten(-1, (2, 2))
