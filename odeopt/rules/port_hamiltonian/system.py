"""Parts of a coordinate's system: friction and port held over a step, and networks of its position.

The rule takes explicit steps of unit length, so friction and mass are bounded: the fastest decay rate that they
can make together stays under 2.71, inside the stability region of rk4 (2.785). The curvature of the potential is
not bounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from odeopt.physics import MatrixPart, PositiveDefinite, Potential
from odeopt.rules.port_hamiltonian.coefficients import network_from_zero

_WIDTHS = (8,)
_LIMITS = {"friction": 0.3, "gain": 1.0}  # of the logarithm of the factor that a network of q is


class Modulation(NamedTuple):
    """Friction, shape ``(*batch, n, modes)``, and port gain ``(*batch, n, modes, 1)``, held over one step."""

    friction: Tensor
    gain: Tensor


class _Bounded(nn.Module):
    """Elementwise ``limit * tanh(.)``."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, raw: Tensor) -> Tensor:
        return self.limit * torch.tanh(raw)


def bounded_inverse_mass(dof: int) -> PositiveDefinite:
    """Inverse mass ``L L^T + eps I`` of a network of q, its eigenvalues bounded on both sides."""
    n_numbers = dof * (dof + 1) // 2
    # |L| <= sqrt(.7) + .1, so M^-1 <= .88; with friction under 2 exp(.3) the rate stays under 2.4
    network = nn.Sequential(network_from_zero(dof, n_numbers, _WIDTHS), _Bounded(0.1 / dof))
    return PositiveDefinite(dof, network=network, start=0.7)


def potential_network(dof: int) -> Potential:
    """Potential ``V(q) >= 0`` as a network, flat until it is trained."""
    return Potential(dof, network=network_from_zero(dof, 1, _WIDTHS))


class HeldPart(MatrixPart):
    """Diagonal friction, or port gains, that the modulation holds, optionally times a bounded network of q.

    Args:
        field: ``"friction"`` or ``"gain"``, which it is of a :class:`Modulation`.
        dof: Number of modes.
        depends_on_q: Whether the network is there.
    """

    def __init__(self, field: str, dof: int, *, depends_on_q: bool) -> None:
        super().__init__()
        self.field, self.depends_on_q = field, depends_on_q
        self.is_diagonal = self.is_semidefinite = field == "friction"
        self.shape = (dof,) if self.is_diagonal else (dof, 1)
        self.network = None
        if depends_on_q:
            self.network = nn.Sequential(network_from_zero(dof, dof, _WIDTHS), _Bounded(_LIMITS[field]))

    def forward(self, q, z=None):
        held = getattr(z, self.field)
        return held if self.network is None else held * self.network(q).exp().unflatten(-1, self.shape)
