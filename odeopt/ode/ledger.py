"""Ledger of the energy of an integration, whatever solved it; and a test whether a learned damping is real."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odeopt.checks import is_integer, require, require_positive
from odeopt.ode.checks import clock_dtype, time_dtype
from odeopt.ode.grid import subintervals, times_of
from odeopt.ode.inputs import Input, checked_input, knots_of, piece_of
from odeopt.ode.integrate import integrate
from odeopt.ode.solution import Solution
from odeopt.ode.structured import STRUCTURE_METHODS, discrete_gradient
from odeopt.ode.torchdiffeq import is_fixed_step
from odeopt.physics import PhaseState, PortHamiltonianSystem
from odeopt.report import plot_ledger

# Nodes and weights of Gauss and Legendre on [0, 1]: exact for polynomials of degree 5, finer than the cubic in between.
_NODES = (0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5)
_WEIGHTS = (5 / 18, 4 / 9, 5 / 18)


class EnergyLedger(NamedTuple):
    """Energies between neighbouring outputs of an integration.

    Attributes:
        t: Output times, shape ``(n_times,)``.
        energy: H at them, shape ``(n_times, *batch)``.
        change: What H gains from one to the next, shape ``(n_times - 1, *batch)``.
        dissipated: What friction takes, of the same shape; at least zero where times rise.
        supplied: What the ports bring in, of the same shape.
        residual: ``change + dissipated - supplied``: what the solver made out of nothing, of the same shape.
    """

    t: Tensor
    energy: Tensor
    change: Tensor
    dissipated: Tensor
    supplied: Tensor
    residual: Tensor

    def plot(self, path: str | os.PathLike, *, title: str = "") -> Path:
        """Draw the account; see :func:`odeopt.report.plot_ledger`.

        Args:
            path: The image file.
            title: Stands above.

        Returns:
            The path.
        """
        parts = {"gained by H": self.change, "dissipated": self.dissipated, "supplied": self.supplied}
        return plot_ledger(self.t, parts, self.residual, path, title=title)


@torch.no_grad()
def energy_ledger(
    system: PortHamiltonianSystem, solution: Solution, *, u: Tensor | Input | None = None, z: Any = None
) -> EnergyLedger:
    r"""Account for the energy of an integration, step by step.

    .. math:: H(x_{k+1}) - H(x_k) = - \int v^\top D\, v\, dt + \int u^\top y\, dt + \text{residual}_k

    The integrals are taken along the cubic through both ends with the slopes that the field has there, by a rule of
    order six: their own error is of order five in the distance of the outputs, and is part of the residual. Outputs
    should thus be the steps. For ``"discrete_gradient"``, one step per output, they are instead those of its own
    balance of power, whose residual is the tolerance of its solve.

    Args:
        system: The system that was integrated.
        solution: What :func:`odeopt.ode.integrate` returned, states ``q`` and ``p`` of shape
            ``(n_times, *batch, dof)``.
        u: The input that it was integrated with.
        z: The modulating signal.

    Returns:
        The account, NaN after the last output that was reached.

    Raises:
        ValueError: If the states are not those of a system, a knot of the input lies between two outputs, or
            ``"discrete_gradient"`` took more than one step per output.
    """
    require(isinstance(system, PortHamiltonianSystem), "system", system, "a `PortHamiltonianSystem`")
    states = solution.states
    is_pair = isinstance(states, tuple) and len(states) == 2
    require(is_pair, "solution.states", type(states).__name__, "a `PhaseState` of q and p")
    checked_input(u)
    outputs, states = times_of(solution.t), PhaseState(*states)
    times = outputs.numbers
    between = [part.end for part in subintervals(outputs, None, knots_of(u)) if not part.ends_at_output]
    require(not between, "solution.t", between, "such that each knot of `u` is one of them")
    is_discrete = solution.method == "discrete_gradient"
    is_right = not is_discrete or solution.n_steps == len(times) - 1
    wanted = f"{len(times) - 1}, one for each output after the first, with method 'discrete_gradient'"
    require(is_right, "solution.n_steps", solution.n_steps, wanted)
    energy = system.energy(states)
    powers = _of_discrete_gradients if is_discrete else _along_cubics
    step = min(abs(end - start) for start, end in itertools.pairwise(times))
    low, high = min(times), max(times)
    clock = clock_dtype(states.p, max(abs(low), abs(high)), step, high - low)
    rows = []
    for k, (start, end) in enumerate(itertools.pairwise(times)):
        piece = piece_of(u, start, end, states.p.dtype)

        def effort(share: float, piece: Callable = piece, start: float = start, end: float = end) -> Tensor | None:
            return piece(states.p.new_tensor(start + share * (end - start), dtype=clock))

        ends = [PhaseState(*(part[i] for part in states)) for i in (k, k + 1)]
        rows.append(powers(system, *ends, end - start, effort, z))
    dissipated, supplied = (torch.stack(column) for column in zip(*rows, strict=True))
    change = energy.diff(dim=0)
    return EnergyLedger(solution.t, energy, change, dissipated, supplied, change + dissipated - supplied)


def _along_cubics(
    system: PortHamiltonianSystem, x0: PhaseState, x1: PhaseState, h: float, effort: Callable, z: Any
) -> tuple[Tensor, Tensor]:
    slopes = [system.vector_field(x, effort(share), z) for x, share in ((x0, 0.0), (x1, 1.0))]
    dissipated = supplied = torch.zeros_like(x0.p[..., 0])
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        # Hermite's cubic
        a, b = (1 + 2 * node) * (1 - node) ** 2, node**2 * (3 - 2 * node)
        c, d = h * node * (1 - node) ** 2, h * node**2 * (node - 1)
        parts = zip(x0, x1, *slopes, strict=True)
        x = PhaseState(*(a * left + b * right + c * first + d * last for left, right, first, last in parts))
        balance = system.power_balance(x, effort(node), z)
        dissipated = dissipated + weight * h * balance.dissipated
        supplied = supplied + weight * h * balance.supplied
    return dissipated, supplied


def _of_discrete_gradients(
    system: PortHamiltonianSystem, x0: PhaseState, x1: PhaseState, h: float, effort: Callable, z: Any
) -> tuple[Tensor, Tensor]:
    u = effort(0.5)
    e, q = discrete_gradient(system, x0, x1), (x0.q + x1.q) / 2
    # the power of a force is e_p times the force, which tells friction and ports apart
    free = system.rates_under(q, e, None, z).p
    dissipated = -h * (e.p * (free + e.q)).sum(-1)
    supplied = torch.zeros_like(dissipated)
    if u is not None:
        supplied = h * (e.p * (system.rates_under(q, e, u, z).p - free)).sum(-1)
    return dissipated, supplied


@dataclass(frozen=True)
class DampingReport:
    """Comparison of the energy that a learned system loses by itself and by its solver.

    Attributes:
        lost: Mean energy lost over the time span, as it was trained (``"trained"``), by the same method with finer
            steps (``"finer"``) and by another method with finer steps (``"other"``).
        artefact: Share of the energy lost as trained that is not lost by the system itself, by the mean of the two
            others; negative where the solver hides losses.
        spread: By how much the two others differ, in units of the energy lost as trained.
        tolerance: Share up to which damping counts as real.
        statuses: How each integration ended.
    """

    lost: dict[str, float]
    artefact: float
    spread: float
    tolerance: float
    statuses: dict[str, str]

    @property
    def is_real(self) -> bool:
        """True if the system itself loses the energy that it loses as trained, up to the tolerance."""
        return abs(self.artefact) <= self.tolerance and self.spread <= self.tolerance

    def __str__(self) -> str:
        if any(status != "success" for status in self.statuses.values()):
            said = ", ".join(f"{name}: {status}" for name, status in self.statuses.items())
            return f"Nothing can be said of the damping ({said})."
        verdict = "real" if self.is_real else "an artefact of the solver"
        lost = ", ".join(f"{name} {value:.4g}" for name, value in self.lost.items())
        return f"The damping is {verdict}: energy lost {lost}; {self.artefact:.1%} of it by the solver alone."


@torch.no_grad()
def diagnose_damping(
    system: PortHamiltonianSystem,
    x0: PhaseState,
    t: Tensor,
    *,
    method: str,
    step_size: float | None = None,
    refinement: int = 10,
    other: str = "implicit_midpoint",
    tolerance: float = 0.1,
    z: Any = None,
) -> DampingReport:
    """Solve a learned system again, with finer steps and by another method, and see whether it still loses energy.

    A model that was trained through a solver that damps by itself, such as the implicit Euler method, can fit motions
    with a field that does not lose what they lose, and the other way round for solvers that add energy.

    Args:
        system: The learned system; no input acts.
        x0: First states, ``q`` and ``p`` of shape ``(*batch, dof)``.
        t: Output times, as in :func:`odeopt.ode.integrate`.
        method: The method of its training, one of steps of a given size.
        step_size: The steps of its training; None for one per output.
        refinement: How many times finer the steps of the others are.
        other: The other method, likewise.
        tolerance: Share of the lost energy up to which a difference does not count.
        z: Modulating signal.

    Returns:
        The losses, and what they say.

    Raises:
        ValueError: If an argument is wrong.

    References:
        Lu, Tsai (2025): structure learned through a solver may be the solver's.
    """
    require(is_integer(refinement) and refinement >= 2, "refinement", refinement, "an integer of at least 2")
    require_positive(tolerance=tolerance)
    require(other != method, "other", other, f"another method than {method!r}")
    for name, value in (("method", method), ("other", other)):
        is_steady = value in STRUCTURE_METHODS or is_fixed_step(value)
        require(is_steady, name, value, "a method of steps of a given size")
    require_positive(step_size=step_size, or_none=True)
    # a tensor keeps its dtype, which says by how much times are rounded
    t = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=time_dtype(x0[1].device))
    coarse = fine = {}
    t_fine = t
    if step_size is None:
        exact = t.to(time_dtype(t.device))
        shares = torch.arange(1, refinement + 1, dtype=exact.dtype, device=t.device) / refinement
        t_fine = torch.cat([exact[:1], torch.lerp(exact[:-1, None], exact[1:, None], shares).flatten()])
    else:
        coarse, fine = {"step_size": step_size}, {"step_size": step_size / refinement}
    settings = {"trained": (method, t, coarse), "finer": (method, t_fine, fine), "other": (other, t_fine, fine)}
    lost, statuses = {}, {}
    for name, (chosen, times, options) in settings.items():
        solution = integrate(system, x0, times, method=chosen, options=options, z=z)
        energy = system.energy(PhaseState(*solution.states))
        lost[name], statuses[name] = (energy[0] - energy[-1]).mean().item(), str(solution.status)
    scale = abs(lost["trained"]) or 1.0
    artefact = (lost["trained"] - (lost["finer"] + lost["other"]) / 2) / scale
    return DampingReport(lost, artefact, abs(lost["finer"] - lost["other"]) / scale, tolerance, statuses)
