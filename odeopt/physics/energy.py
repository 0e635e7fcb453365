"""The energy H of a port-Hamiltonian system: mass and potential."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeopt.checks import require, require_counts
from odeopt.modes import is_in_forward_mode, is_traced
from odeopt.physics.given import Part, as_matrix, evaluate
from odeopt.physics.kinetic import KineticEnergy, MatrixEnergy, SpectralEnergy
from odeopt.physics.structure import apply, check_activation, mlp


class PhaseState(NamedTuple):
    """Point of the phase space, or a rate of change of one.

    Attributes:
        q: Positions, shape ``(*batch, dof)``; None where the system stores none.
        p: Momenta, shape ``(*batch, dof)``.
    """

    q: Tensor | None
    p: Tensor


class Potential(nn.Module):
    r"""Potential :math:`V(q) = \varphi(\text{network}(q)) \ge 0`, bounded below for any weights.

    Args:
        dof: Number of degrees of freedom.
        network: Hidden widths of a tanh network, or a module mapping ``(*batch, dof)`` to ``(*batch, 1)``.
        activation: Non-negative output map, such as softplus or ``torch.square``.

    Raises:
        ValueError: If ``activation`` has negative values or a size is not positive.
    """

    def __init__(
        self,
        dof: int,
        *,
        network: nn.Module | Sequence[int] = (32, 32),
        activation: Callable[[Tensor], Tensor] = F.softplus,
    ) -> None:
        super().__init__()
        require_counts(dof=dof)
        check_activation(activation)
        self.dof = dof
        self.network = network if isinstance(network, nn.Module) else mlp(dof, 1, widths=network)
        self.activation = activation

    def forward(self, q: Tensor) -> Tensor:
        """Evaluate V at ``q`` of shape ``(*batch, dof)``; returns shape ``(*batch,)``."""
        value = self.network(q)
        if value.shape[-1:] != (1,):
            raise ValueError(
                f"Parameter `network` should give one number per state. Found an output of shape {tuple(value.shape)}."
            )
        return self.activation(value.squeeze(-1))


class GivenPotential(nn.Module):
    """A known potential; that it is bounded below is the user's responsibility.

    Args:
        function: Maps ``q`` of shape ``(*batch, dof)`` to V of shape ``(*batch,)``.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor) -> Tensor:
        return self.function(q)


class Hamiltonian(nn.Module):
    r"""Energy :math:`H(q, p) = \tfrac12\, p^\top M^{-1}(q)\, p + V(q)`, or :math:`K(p) + V(q)`, and its gradient.

    Args:
        dof: Number of degrees of freedom.
        inverse_mass: :math:`M^{-1}`: a part of :mod:`odeopt.physics.structure`, a constant (number, diagonal
            or matrix, positive definite), or a function of ``q``; None for unit mass.
        potential: V: a :class:`Potential` or a function of ``q``; None for none.
        kinetic: K: an energy of coordinates, such as :class:`RelativisticEnergy`, which counts for each of them, or a
            :class:`MatrixEnergy`; None for that of the mass.

    Raises:
        ValueError: If a part has the wrong shape, a constant mass is not positive definite, or both ``kinetic`` and
            ``inverse_mass`` are given.
        TypeError: If a part is neither a module, a tensor, a number nor callable, or ``kinetic`` is no kinetic energy
            of momenta ``(*batch, dof)``.
    """

    def __init__(
        self,
        dof: int,
        inverse_mass: Part | None = None,
        potential: Part | None = None,
        kinetic: KineticEnergy | None = None,
    ) -> None:
        super().__init__()
        require_counts(dof=dof)
        self.dof = dof
        self.inverse_mass = as_matrix(inverse_mass, name="inverse_mass", shape=(dof, dof), should="positive definite")
        n_signals = 0 if self.inverse_mass is None else self.inverse_mass.n_signals
        require(n_signals == 0, "inverse_mass.n_signals", n_signals, "0, as z never enters the energy")
        self.potential = _as_potential(potential, dof)
        require(kinetic is None or inverse_mass is None, "inverse_mass", inverse_mass, "None where `kinetic` is given")
        self.kinetic = _checked_kinetic(kinetic, dof)
        self.mass_depends_on_q = self.inverse_mass is not None and self.inverse_mass.depends_on_q

    @property
    def depends_on_q(self) -> bool:
        """True if the energy changes with ``q``; if not, no positions need to be stored."""
        return self.mass_depends_on_q or self.potential is not None

    def energy(self, x: PhaseState) -> Tensor:
        """Evaluate H.

        Args:
            x: Phase state, each part of shape ``(*batch, dof)``.

        Returns:
            Energy of each state, shape ``(*batch,)``.
        """
        q, p = x
        H = 0.5 * (p * self.velocity(x)).sum(-1) if self.kinetic is None else self.kinetic.total(p)
        return H if self.potential is None else H + self._potential(q)

    def velocity(self, x: PhaseState) -> Tensor:
        r""":math:`\partial H/\partial p`: :math:`M^{-1}(q)\,p` or K', shape ``(*batch, dof)``; p at unit mass."""
        q, p = x
        if self.kinetic is not None:
            return self.kinetic.velocity(p)
        if self.inverse_mass is None:
            return p
        mass = evaluate(self.inverse_mass, q, None, name="inverse_mass", shape=(self.dof, self.dof), like=p)
        return apply(mass, p, diagonal=self.inverse_mass.is_diagonal)

    def gradient(self, x: PhaseState) -> PhaseState:
        r"""Evaluate :math:`(\partial H/\partial q, \partial H/\partial p)`, the term in dM^-1/dq included.

        Automatic differentiation runs only where a part depends on ``q``, also under ``torch.no_grad``, and
        leaves a graph behind exactly where gradients are enabled outside.

        Args:
            x: Phase state, each part of shape ``(*batch, dof)``.

        Returns:
            The gradient, with the shapes of ``x``; its first part is None where H does not depend on ``q``.
        """
        if not self.depends_on_q:
            return PhaseState(None, self.velocity(x))
        q, p = x
        # torch.autograd can be neither mapped nor compiled; torch.func can, and costs half as much again
        if is_traced() or is_in_forward_mode():  # which reaches nothing that is detached

            def energy(q: Tensor) -> tuple[Tensor, Tensor]:
                v = self.velocity(PhaseState(q, p))
                return self._part_in_q(q, p, v), v

            return PhaseState(*torch.func.grad(energy, has_aux=True)(q))
        keep_graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if keep_graph and q.requires_grad:
                # p may itself be a function of q (a solver's stages): the derivative at fixed p is the one
                # with respect to an alias of q that p has never seen.
                q = q.view_as(q)
            else:
                q = (q.clone() if q.is_inference() else q.detach()).requires_grad_()
            if not keep_graph:
                p = p.clone() if p.is_inference() else p.detach()
            v = self.velocity(PhaseState(q, p))
            total = self._part_in_q(q, p, v)
            if total.requires_grad:
                (dH_dq,) = torch.autograd.grad(total, q, create_graph=keep_graph, materialize_grads=True)
            else:  # a given function that ignores q
                dH_dq = torch.zeros_like(q)
        return PhaseState(dH_dq, v if keep_graph else v.detach())

    def _part_in_q(self, q: Tensor, p: Tensor, v: Tensor) -> Tensor:
        """Part of the energy that depends on q, summed over the batch."""
        total = 0.5 * (p * v).sum() if self.mass_depends_on_q else 0.0
        return total if self.potential is None else total + self._potential(q).sum()

    def _potential(self, q: Tensor) -> Tensor:
        V = self.potential(q)
        if V.shape != q.shape[:-1]:
            # (n, 1) instead of (n,) would silently broadcast to an (n, n) energy.
            raise ValueError(
                f"Parameter `potential` should give one value per state, shape {tuple(q.shape[:-1])}. "
                f"Found an output of shape {tuple(V.shape)}."
            )
        return V


def _checked_kinetic(value: KineticEnergy | None, dof: int) -> KineticEnergy | None:
    if value is None:
        return None
    if not isinstance(value, KineticEnergy) or isinstance(value, SpectralEnergy):
        raise TypeError(
            "Parameter `kinetic` should be an energy of momenta (*batch, dof), such as a `RelativisticEnergy` or a "
            f"`MatrixEnergy`. Found `{type(value).__name__}`."
        )
    if isinstance(value, MatrixEnergy):
        m, n = value.shape
        require(m * n == dof, "kinetic.shape", value.shape, f"of {dof} entries, the degrees of freedom")
    return value


def _as_potential(value: Part | None, dof: int) -> nn.Module | None:
    if value is None:
        return None
    if isinstance(value, Potential):
        require(value.dof == dof, "potential.dof", value.dof, f"{dof}")
    if isinstance(value, Potential | GivenPotential):
        return value
    if not callable(value):
        raise TypeError(
            "Parameter `potential` should be a module or a function of q (a constant would change nothing). "
            f"Found `{type(value).__name__}`."
        )
    return GivenPotential(value)
