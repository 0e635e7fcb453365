"""Steps that keep the structure of a port-Hamiltonian system: its symplectic form, its friction, its power balance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odeopt.checks import require
from odeopt.ode.checks import check_choice
from odeopt.ode.implicit import Newton, solve_implicit
from odeopt.physics import PhaseState, PortHamiltonianSystem
from odeopt.physics.given import evaluate, evaluate_full

Effort = Callable[[float], Tensor | None]  # u at a share of the step, from 0 to 1

STRUCTURE_ORDER = {"symplectic_euler": 1, "strang": 2, "implicit_midpoint": 2, "discrete_gradient": 2}
STRUCTURE_METHODS: tuple[str, ...] = tuple(STRUCTURE_ORDER)

_NOISE = 16.0  # differences of energies under so many roundings say nothing


class StructureStep(NamedTuple):
    """One step of a structure-preserving method.

    Attributes:
        x: The state at the end.
        n_iters: Newton iterations of each sample, shape ``(*batch,)``; zero where nothing was implicit.
        is_converged: Whether the implicit equations were solved, shape ``(*batch,)``.
        n_evals: Evaluations of the energy's gradient, a Jacobian counting as one for each of its columns.
    """

    x: PhaseState
    n_iters: Tensor
    is_converged: Tensor
    n_evals: int


def structure_step(
    system: PortHamiltonianSystem,
    dt: Tensor | float,
    x: PhaseState,
    method: str,
    *,
    u: Tensor | Effort | None = None,
    z: Any = None,
    newton: Newton = Newton(),  # noqa: B008
) -> StructureStep:
    r"""Take one step of :math:`\dot x = (J - R)\,\nabla H + B\,u` that respects where it comes from.

    ``"symplectic_euler"`` (order 1) takes H, D and g at :math:`(q_0, p_1)`; without friction it is a symplectic map.

    ``"strang"`` (order 2) is half a step of friction, :math:`\dot p = -D M^{-1} p` solved exactly, so that it never
    adds energy whatever the step, around a step of Störmer and Verlet for the rest.

    ``"implicit_midpoint"`` (order 2) is symplectic without friction and keeps quadratic invariants.

    ``"discrete_gradient"`` (order 2) takes the gradient as Gonzalez does, D and g at the midpoint
    :math:`\bar x = (x_0 + x_1) / 2`:

    .. math:: \bar\nabla H = \nabla H(\bar x) + \frac{H(x_1) - H(x_0) - \nabla H(\bar x)^\top \Delta x}
              {|\Delta x|^2}\, \Delta x, \qquad
              H(x_1) - H(x_0) = h\, (-\bar\nabla H^\top R\, \bar\nabla H + u^\top \bar y), \quad
              \bar y = B^\top \bar\nabla H

    So the balance of power holds in discrete time, to the tolerance of the solve, for any step: without input the
    energy never rises. At equilibria, where the quotient is 0/0, it counts as zero once its numerator is rounding.

    The methods are explicit where they can be: the first two where M does not depend on q (symplectic Euler, where
    there is no friction either). Else each step solves equations, see :func:`odeopt.ode.implicit.solve_implicit`.

    Args:
        system: The system; its energy has to be a function that ``torch.func`` can differentiate.
        dt: Length of the step, a number or a 0-d tensor; negative to go back in time.
        x: State at the start; ``q`` and ``p`` of shape ``(*batch, dof)``.
        method: A name out of :data:`STRUCTURE_METHODS`.
        u: Effort: held over the step, shape ``(*batch, n_inputs)``; or a function of the share of the step that has
            gone by, from 0 to 1; None for none.
        z: Modulating signal of D and g, held.
        newton: How implicit equations are solved.

    Returns:
        The state at the end, iterations and whether they converged.

    Raises:
        ValueError: If there is no such method, ``x.q`` is None or a shape is wrong.

    References:
        Hairer, Lubich, Wanner (2006), Geometric Numerical Integration, Secs. I.1, II.5, VI.3.
        Gonzalez (1996), Time integration and discrete Hamiltonian systems, Eq. (2.4).

    Example:
        >>> oscillator = PortHamiltonianSystem(1, potential=lambda q: 0.5 * q.square().sum(-1), dissipation=0.1)
        >>> step = structure_step(oscillator, 0.1, PhaseState(torch.ones(1), torch.zeros(1)), "discrete_gradient")
        >>> bool(step.is_converged)
        True
    """
    check_choice("method", method, STRUCTURE_METHODS)
    require(x.q is not None, "x.q", x.q, "given")
    effort = u if callable(u) else lambda share: u
    return _STEPS[method](_Problem(system, dt, effort, z, newton), PhaseState(*x))


class _Problem(NamedTuple):
    """Equation of a step, and the solve that all methods share."""

    system: PortHamiltonianSystem
    dt: Tensor | float
    effort: Effort
    z: Any
    newton: Newton

    def rates(self, q: Tensor, p: Tensor, u: Tensor | None) -> PhaseState:
        return self.system.vector_field(PhaseState(q, p), u, self.z)

    def kick(self, q: Tensor, p: Tensor, u: Tensor | None) -> Tensor:
        """Force on p apart from friction."""
        return self.system.conservative_field(PhaseState(q, p), u, self.z).p

    def velocity(self, q: Tensor, p: Tensor) -> Tensor:
        return self.system.hamiltonian.velocity(PhaseState(q, p))

    def solve(self, residual: Callable[[Tensor], Tensor], guess: Tensor, before: StructureStep) -> StructureStep:
        """Solve, and add to the account of what came before; the root stands in both places of the state."""
        root = solve_implicit(residual, guess, self.newton)
        n_iters, is_converged = root.n_iters + before.n_iters, root.is_converged & before.is_converged
        return StructureStep(PhaseState(root.x, root.x), n_iters, is_converged, root.n_evals + before.n_evals)


def _explicit(x: PhaseState, n_evals: int) -> StructureStep:
    n_iters = torch.zeros(x.p.shape[:-1], dtype=torch.int64, device=x.p.device)
    return StructureStep(x, n_iters, torch.ones_like(n_iters, dtype=torch.bool), n_evals)


def _symplectic_euler(problem: _Problem, x: PhaseState) -> StructureStep:
    q, p, h, u = *x, problem.dt, problem.effort(0.0)
    p_end = p + h * problem.rates(q, p, u).p
    step = _explicit(x, 1)
    if problem.system.mass_depends_on_q or problem.system.dissipation is not None:
        step = problem.solve(lambda p1: p1 - p - h * problem.rates(q, p1, u).p, p_end, step)
        p_end = step.x.p
    return step._replace(x=PhaseState(q + h * problem.velocity(q, p_end), p_end))


def _strang(problem: _Problem, x: PhaseState) -> StructureStep:
    half, is_separable, q = problem.dt / 2, not problem.system.mass_depends_on_q, x.q
    p, u = _damped(problem, q, x.p, half), problem.effort(0.0)
    p_half, step = p + half * problem.kick(q, p, u), _explicit(x, 2)
    if not is_separable:
        step = problem.solve(lambda p1: p1 - p - half * problem.kick(q, p1, u), p_half, step)
        p_half = step.x.p
    v = problem.velocity(q, p_half)
    q_end = q + problem.dt * v
    if not is_separable:
        step = problem.solve(lambda q1: q1 - q - half * (v + problem.velocity(q1, p_half)), q_end, step)
        q_end = step.x.q
    p_end = p_half + half * problem.kick(q_end, p_half, problem.effort(1.0))
    return step._replace(x=PhaseState(q_end, _damped(problem, q_end, p_end, half)))


def _damped(problem: _Problem, q: Tensor, p: Tensor, h: Tensor | float) -> Tensor:
    """Friction alone, exactly: q stands still, so that it is linear."""
    friction, mass = problem.system.dissipation, problem.system.hamiltonian.inverse_mass
    if friction is None:
        return p
    kinetic = problem.system.hamiltonian.kinetic
    wanted = "another one with friction under a kinetic energy of its own: half steps of friction are solved for a mass"
    require(kinetic is None, "method", "strang", wanted)
    if friction.is_diagonal and (mass is None or mass.is_diagonal):
        shape = (problem.system.dof,) * 2
        rate = evaluate(friction, q, problem.z, name="dissipation", shape=shape, like=p)
        rate = rate if mass is None else rate * evaluate(mass, q, None, name="inverse_mass", shape=shape, like=p)
        return torch.exp(-h * rate) * p
    rate = evaluate_full(friction, q, problem.z, name="dissipation", like=p)
    rate = rate if mass is None else rate @ evaluate_full(mass, q, None, name="inverse_mass", like=p)
    return (torch.linalg.matrix_exp(-h * rate) @ p.unsqueeze(-1)).squeeze(-1)


def _implicit_midpoint(problem: _Problem, x: PhaseState) -> StructureStep:
    def rates(end: PhaseState, u: Tensor | None) -> PhaseState:
        return problem.rates((x.q + end.q) / 2, (x.p + end.p) / 2, u)

    return _solved_together(problem, x, rates)


def _discrete_gradient(problem: _Problem, x: PhaseState) -> StructureStep:
    def rates(end: PhaseState, u: Tensor | None) -> PhaseState:
        gradient = discrete_gradient(problem.system, x, end)
        return problem.system.rates_under((x.q + end.q) / 2, gradient, u, problem.z)

    return _solved_together(problem, x, rates)


def _solved_together(problem: _Problem, x: PhaseState, rates: Callable) -> StructureStep:
    """Step along rates that depend on its end, under the input of its middle."""
    u, start = problem.effort(0.5), torch.cat(x, -1)

    def residual(end: Tensor) -> Tensor:
        return end - start - problem.dt * torch.cat(rates(PhaseState(*end.chunk(2, -1)), u), -1)

    guess = start + problem.dt * torch.cat(problem.rates(*x, u), -1)
    step = problem.solve(residual, guess, _explicit(x, 1))
    return step._replace(x=PhaseState(*step.x.q.chunk(2, -1)))


def discrete_gradient(system: PortHamiltonianSystem, x0: PhaseState, x1: PhaseState) -> PhaseState:
    r"""Gonzalez' discrete gradient: :math:`\bar\nabla H^\top (x_1 - x_0) = H(x_1) - H(x_0)`.

    Args:
        system: The system whose energy it is of.
        x0: State at the start of a step; ``q`` and ``p`` of shape ``(*batch, dof)``.
        x1: State at its end.

    Returns:
        The gradient, with the shapes of ``x0``; that at the midpoint where the two energies differ from what it
        predicts by no more than rounding.

    References:
        Gonzalez (1996), Time integration and discrete Hamiltonian systems, Eq. (2.4).
    """
    middle = PhaseState((x0.q + x1.q) / 2, (x0.p + x1.p) / 2)
    gradient, change = system.energy_gradient(middle), PhaseState(x1.q - x0.q, x1.p - x0.p)
    H0, H1 = system.energy(x0), system.energy(x1)
    predicted = (gradient.q * change.q + gradient.p * change.p).sum(-1)
    square = (change.q.square() + change.p.square()).sum(-1)
    missing = H1 - H0 - predicted
    # shrunk by less and less as it grows, so that Newton's method sees no jump
    noise = _NOISE * torch.finfo(H0.dtype).eps * (H0.abs() + H1.abs()).detach()
    is_seen = missing.abs() > noise
    safe = torch.where(is_seen, missing, torch.ones_like(missing))
    factor = torch.where(is_seen, safe - noise.square() / safe, torch.zeros_like(missing))
    factor = (factor / torch.where(is_seen, square, torch.ones_like(square))).unsqueeze(-1).to(square.dtype)
    return PhaseState(gradient.q + factor * change.q, gradient.p + factor * change.p)


_STEPS = {
    "symplectic_euler": _symplectic_euler,
    "strang": _strang,
    "implicit_midpoint": _implicit_midpoint,
    "discrete_gradient": _discrete_gradient,
}
