"""Port-Hamiltonian systems: vector field, port output and energy balance."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from odeopt.checks import require, require_counts
from odeopt.physics.balance import PowerBalance
from odeopt.physics.energy import Hamiltonian, PhaseState
from odeopt.physics.given import Part, as_matrix, evaluate, evaluate_full
from odeopt.physics.kinetic import KineticEnergy
from odeopt.physics.structure import apply, symplectic_matrix


class StructureMatrices(NamedTuple):
    """The matrices of a system, written out.

    Attributes:
        J: Skew interconnection, shape ``(2 * dof, 2 * dof)``.
        R: Semi-definite dissipation, shape ``(*batch, 2 * dof, 2 * dof)``.
        B: Input matrix, shape ``(*batch, 2 * dof, n_inputs)``.
    """

    J: Tensor
    R: Tensor
    B: Tensor


class PortHamiltonianSystem(nn.Module):
    r"""Mechanical port-Hamiltonian system in canonical coordinates.

    .. math::
        \dot x = (J - R)\,\nabla H(x) + B\,u, \qquad y = B^\top \nabla H(x), \qquad
        H = \tfrac12\, p^\top M^{-1}(q)\, p + V(q)

    with ``J = [[0, I], [-I, 0]]``, ``R = [[0, 0], [0, D]]``, ``B = [[0], [g]]``; with another kinetic energy K
    :math:`H = K(p) + V(q)`. Because D is semi-definite, ``dH/dt <= u^T y`` holds for any weights; a signal ``z`` may
    modulate D and g without harm, because g enters the effort and the output alike.

    Each part is a module of this package (a network of q or a learnable constant), a constant, or a function.
    As a constant, a number stands for a multiple of the identity and a 1-d tensor for a diagonal. Functions
    that give a diagonal are declared as ``GivenMatrix(function, diagonal=True)``. M and V are called as
    ``part(q)``; D and g as ``part(q)`` where no signal is given and ``part(q, z)`` where there is one. That a
    function gives a (semi-)definite matrix is the user's responsibility; constants are checked.

    Only elementwise operations are used where M and D are diagonal (or None) and there is one input;
    automatic differentiation runs only where M or V depends on q. Inputs keep their memory layout.

    Args:
        dof: Number of degrees of freedom.
        n_inputs: Number of ports.
        inverse_mass: :math:`M^{-1}`, positive definite, shape ``(*batch, dof, dof)``; None for unit mass.
        potential: V, a :class:`Potential` or a function of q with values of shape ``(*batch,)``; None for
            none.
        kinetic: K in place of :math:`\tfrac12 p^\top M^{-1} p`; None for that. See :class:`Hamiltonian`.
        dissipation: D, positive semi-definite, shape ``(*batch, dof, dof)``; None for none.
        port: g, shape ``(*batch, dof, n_inputs)``; None for ones where there is one input (it drives every
            degree of freedom) and for the identity where there is one input for each degree of freedom.

    Raises:
        ValueError: If a size is not positive, a part has the wrong shape or not the structure it should have,
            ``port`` is None and neither default applies, or ``kinetic`` comes beside ``inverse_mass``.
        TypeError: If a part is neither a module, a tensor, a number nor callable.

    Example:
        >>> oscillator = PortHamiltonianSystem(1, potential=lambda q: q.square().sum(-1), dissipation=0.1)
        >>> with torch.no_grad():
        ...     oscillator.vector_field(PhaseState(torch.ones(1), torch.ones(1)))
        PhaseState(q=tensor([1.]), p=tensor([-2.1000]))

    References:
        van der Schaft, Jeltsema (2014), Port-Hamiltonian Systems Theory: An Introductory Overview.
        Zhong, Dey, Chakraborty (2020), Dissipative SymODEN, Eq. (8).
    """

    def __init__(
        self,
        dof: int,
        *,
        n_inputs: int = 1,
        inverse_mass: Part | None = None,
        potential: Part | None = None,
        kinetic: KineticEnergy | None = None,
        dissipation: Part | None = None,
        port: Part | None = None,
    ) -> None:
        super().__init__()
        require_counts(n_inputs=n_inputs)
        self.hamiltonian = Hamiltonian(dof, inverse_mass, potential, kinetic)
        self.dof, self.n_inputs = dof, n_inputs
        self.dissipation = as_matrix(dissipation, name="dissipation", shape=(dof, dof), should="positive semi-definite")
        self.port = as_matrix(port, name="port", shape=(dof, n_inputs))
        has_default = n_inputs in (1, dof)
        require(
            port is not None or has_default, "port", port, f"given for {n_inputs} inputs, neither 1 nor dof = {dof}"
        )

    @property
    def depends_on_q(self) -> bool:
        """True if the energy changes with ``q``; if not, ``x.q`` may be None."""
        return self.hamiltonian.depends_on_q

    @property
    def mass_depends_on_q(self) -> bool:
        """True if the mass changes with ``q``; if not, the energy separates into parts of q and of p."""
        return self.hamiltonian.mass_depends_on_q

    def energy(self, x: PhaseState) -> Tensor:
        """Evaluate H.

        Args:
            x: Phase state; ``q`` and ``p`` of shape ``(*batch, dof)``, ``q`` None where H ignores it.

        Returns:
            Energy of each state, shape ``(*batch,)``.

        Raises:
            ValueError: If ``x`` does not match ``dof``.
        """
        self._check_state(x)
        return self.hamiltonian.energy(x)

    def energy_gradient(self, x: PhaseState) -> PhaseState:
        r"""Evaluate :math:`(\partial H/\partial q, \partial H/\partial p)`.

        Args:
            x: Phase state, as in :meth:`energy`.

        Returns:
            The gradient, with the shapes of ``x``; its ``q`` is None where ``x.q`` is.

        Raises:
            ValueError: If ``x`` does not match ``dof``.
        """
        self._check_state(x)
        dH_dq, v = self.hamiltonian.gradient(x)
        if dH_dq is None and x[0] is not None:
            dH_dq = torch.zeros_like(x[0])
        return PhaseState(dH_dq, v)

    def vector_field(self, x: PhaseState, u: Tensor | None = None, z: Any = None) -> PhaseState:
        r"""Right-hand side of the port-Hamiltonian system.

        .. math:: \dot q = \partial H/\partial p, \qquad
            \dot p = -\partial H/\partial q - D(q, z)\,\partial H/\partial p + g(q, z)\,u

        Args:
            x: Phase state; ``q`` and ``p`` of shape ``(*batch, dof)``, ``q`` None where H ignores it.
            u: Port effort, shape ``(*batch, n_inputs)`` or one that broadcasts to it; None for zero.
            z: Modulating signal, handed to D and g as it is.

        Returns:
            Time derivatives ``(dq, dp)`` with the shapes of ``x``, per unit time. They may share memory with
            ``x`` (dq is p for unit mass), so do not write into them.

        Raises:
            ValueError: If ``x`` does not match ``dof``, or ``u`` does not match ``n_inputs`` or the batch of
                ``x``.

        References:
            Zhong, Dey, Chakraborty (2020), Dissipative SymODEN, Eq. (8).
        """
        self._check(x, u)
        gradient = self.hamiltonian.gradient(x)
        return self._rates(x, gradient, self._force(x[0], u, z), self._drag(x[0], gradient.p, z))

    def rates_under(self, q: Tensor, gradient: PhaseState, u: Tensor | None = None, z: Any = None) -> PhaseState:
        r"""Evaluate :math:`(J - R(q, z))\,e + B(q, z)\,u` for a vector e in the place of the energy's gradient.

        Args:
            q: Positions, shape ``(*batch, dof)``.
            gradient: The vector e, such as a discrete gradient; parts of the shape of ``q``.
            u: Port effort, as in :meth:`vector_field`.
            z: Modulating signal.

        Returns:
            Time derivatives, with the shape of ``q``.

        Raises:
            ValueError: As in :meth:`vector_field`.
        """
        x = PhaseState(q, gradient.p)
        self._check(x, u)
        return self._rates(x, gradient, self._force(q, u, z), self._drag(q, gradient.p, z))

    def conservative_field(self, x: PhaseState, u: Tensor | None = None, z: Any = None) -> PhaseState:
        r"""Evaluate :math:`J\,\nabla H + B\,u`: :meth:`vector_field` without friction.

        Args:
            x: Phase state, as in :meth:`vector_field`.
            u: Port effort, as in :meth:`vector_field`.
            z: Modulating signal.

        Returns:
            Time derivatives, with the shapes of ``x``.

        Raises:
            ValueError: As in :meth:`vector_field`.
        """
        self._check(x, u)
        return self._rates(x, self.hamiltonian.gradient(x), self._force(x[0], u, z), None)

    def vector_field_and_output(
        self, x: PhaseState, u: Tensor | None = None, z: Any = None
    ) -> tuple[PhaseState, Tensor]:
        """Evaluate :meth:`vector_field` and :meth:`output` together, with M and g evaluated once.

        Args:
            x: Phase state, as in :meth:`vector_field`.
            u: Port effort, as in :meth:`vector_field`.
            z: Modulating signal.

        Returns:
            The time derivatives, and the output of shape ``(*batch, n_inputs)``.

        Raises:
            ValueError: As in :meth:`vector_field`.
        """
        self._check(x, u)
        g, gradient = self._evaluate_port(x[0], z, x.p), self.hamiltonian.gradient(x)
        dx = self._rates(x, gradient, self._force(x[0], u, z, g), self._drag(x[0], gradient.p, z))
        return dx, self._port_output(g, gradient.p)

    def output(self, x: PhaseState, z: Any = None) -> Tensor:
        r"""Power-conjugate output :math:`y = g^\top(q, z)\, \partial H/\partial p`.

        Args:
            x: Phase state, as in :meth:`vector_field`.
            z: Modulating signal.

        Returns:
            Output, shape ``(*batch, n_inputs)``.

        Raises:
            ValueError: If ``x`` does not match ``dof``.
        """
        self._check_state(x)
        return self._port_output(self._evaluate_port(x[0], z, x.p), self.hamiltonian.velocity(x))

    def power_balance(self, x: PhaseState, u: Tensor | None = None, z: Any = None) -> PowerBalance:
        """Account for the power: what the energy gains, what friction takes, what the ports supply.

        The rate of the energy is the chain rule on the vector field itself, so the residual checks the system
        that a solver sees.

        Args:
            x: Phase state, as in :meth:`vector_field`.
            u: Port effort; None for zero.
            z: Modulating signal.

        Returns:
            Powers per state, each of shape ``(*batch,)``.

        Raises:
            ValueError: As in :meth:`vector_field`.
        """
        dx, y = self.vector_field_and_output(x, u, z)
        dH_dq, v = self.energy_gradient(x)
        energy_rate = (v * dx.p).sum(-1)
        if dH_dq is not None:
            energy_rate = energy_rate + (dH_dq * dx.q).sum(-1)
        drag = self._drag(x[0], v, z)
        dissipated = torch.zeros_like(energy_rate) if drag is None else (v * drag).sum(-1)
        supplied = torch.zeros_like(energy_rate) if u is None else (u * y).sum(-1)
        return PowerBalance(energy_rate, dissipated, supplied, energy_rate + dissipated - supplied)

    def structure_matrices(self, x: PhaseState, z: Any = None) -> StructureMatrices:
        """Write out J, R and B, for inspection.

        Args:
            x: Phase state, as in :meth:`vector_field`.
            z: Modulating signal.

        Returns:
            The matrices, in the type of ``x.p``.

        Raises:
            ValueError: If ``x`` does not match ``dof``.
        """
        self._check_state(x)
        q, p = x
        batch, dof = p.shape[:-1], self.dof
        J = symplectic_matrix(dof, dtype=p.dtype, device=p.device)
        R = p.new_zeros(*batch, 2 * dof, 2 * dof)
        B = p.new_zeros(*batch, 2 * dof, self.n_inputs)
        if self.dissipation is not None:
            R[..., dof:, dof:] = evaluate_full(self.dissipation, q, z, name="dissipation", like=p)
        g = self._evaluate_port(q, z, p)
        B[..., dof:, :] = (p.new_ones(dof, 1) if self.n_inputs == 1 else J[:dof, dof:]) if g is None else g
        return StructureMatrices(J, R, B)

    def _rates(self, x: PhaseState, gradient: PhaseState, force: Tensor | None, drag: Tensor | None) -> PhaseState:
        """Evaluate (J - R) e + B u for a vector e, from g u and D e_p; None is zero."""
        (q, p), (dH_dq, v), dp = x, gradient, force
        for opposed in (drag, dH_dq):
            if opposed is not None:
                dp = -opposed if dp is None else dp - opposed
        dp = torch.zeros_like(p) if dp is None else dp.expand(p.shape)
        return PhaseState(None if q is None else v, dp)

    def _force(self, q: Tensor | None, u: Tensor | None, z: Any, g: Tensor | None = None) -> Tensor | None:
        """Evaluate g u; with g where it is known already."""
        if u is None or self.port is None:
            return u
        g = self._evaluate_port(q, z, u) if g is None else g
        return g[..., 0] * u if self.n_inputs == 1 else apply(g, u, diagonal=False)

    def _drag(self, q: Tensor | None, v: Tensor, z: Any) -> Tensor | None:
        if self.dissipation is None:
            return None
        D = evaluate(self.dissipation, q, z, name="dissipation", shape=(self.dof, self.dof), like=v)
        return apply(D, v, diagonal=self.dissipation.is_diagonal)

    def _evaluate_port(self, q: Tensor | None, z: Any, like: Tensor) -> Tensor | None:
        if self.port is None:
            return None
        return evaluate(self.port, q, z, name="port", shape=(self.dof, self.n_inputs), like=like)

    def _port_output(self, g: Tensor | None, v: Tensor) -> Tensor:
        if self.n_inputs == 1:
            return (v if g is None else g[..., 0] * v).sum(-1, keepdim=True)
        return v if g is None else apply(g.mT, v, diagonal=False)

    def _check_state(self, x: PhaseState) -> None:
        q, p = x
        if p.shape[-1:] != (self.dof,):
            raise ValueError(
                f"Parameter `x.p` should have shape (*batch, {self.dof}). Found `x.p.shape = {tuple(p.shape)}`."
            )
        if q is None:
            if self.depends_on_q:
                raise ValueError("Parameter `x.q` should be given: the energy depends on it. Found `x.q = None`.")
        elif q.shape != p.shape:
            raise ValueError(
                f"Parameter `x.q` should have the shape of `x.p`, {tuple(p.shape)}. "
                f"Found `x.q.shape = {tuple(q.shape)}`."
            )

    def _check(self, x: PhaseState, u: Tensor | None) -> None:
        self._check_state(x)
        if u is None:
            return
        require(
            isinstance(u, Tensor), "u", u, f"a tensor, or a function that gives one, of shape (*batch, {self.n_inputs})"
        )
        batch = x[1].shape[:-1]
        is_right = u.shape == (*batch, self.n_inputs)
        if not is_right and u.shape[-1:] == (self.n_inputs,) and u.dim() <= len(batch) + 1:
            pairs = zip(reversed(u.shape[:-1]), reversed(batch), strict=False)
            is_right = all(size in (1, wanted) for size, wanted in pairs)
        if not is_right:
            raise ValueError(
                f"Parameter `u` should have shape {(*batch, self.n_inputs)}, or one of that last size "
                f"that broadcasts to it. Found `u.shape = {tuple(u.shape)}`."
            )

    def extra_repr(self) -> str:
        return f"dof={self.dof}, n_inputs={self.n_inputs}"
