"""Dynamical systems as they are observed: the base of the true ones and of those that are learned."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from odeopt.checks import check_class, is_integer, require, require_counts, require_one_of
from odeopt.ode import Solution, Status, explicit_step
from odeopt.ode.checks import check_finite, check_times
from odeopt.physics import PhaseState, PortHamiltonianSystem
from odeopt.physics.given import evaluate_full
from odeopt.systems.coordinates import Coordinates

OBSERVATIONS = ("momentum", "velocity")
_METHOD, _N_STAGES = "rk4", 4
_EVERYWHERE = " at every state"  # where parts should be finite


class ObservedSystem(nn.Module, ABC):
    r"""A system with inputs, of which one sees observations x and integrates states.

    Observations are ``(q, p)`` where the momentum is observed (angles as they are), and
    ``(q on lines, cos q, sin q, dq/dt)`` where the velocity is.

    Args:
        coordinates: A letter for each degree of freedom; see :class:`Coordinates`.
        observes: ``"momentum"`` or ``"velocity"``.
        n_inputs: Number of inputs u.

    Attributes:
        parts: Names of the functions of positions that the system is made of, which should be finite; None is no part.

    Raises:
        ValueError: If an argument is out of range.
    """

    parts: tuple[str, ...] = ()

    def __init__(self, coordinates: str, *, observes: str, n_inputs: int = 1) -> None:
        super().__init__()
        require_one_of(OBSERVATIONS, observes=observes)
        check_n_inputs(n_inputs)
        self.coordinates = Coordinates(coordinates)
        self.observes, self.n_inputs = observes, n_inputs

    @property
    def dof(self) -> int:
        """Number of degrees of freedom."""
        return self.coordinates.dof

    @property
    def n_observed(self) -> int:
        """Length of an observation."""
        return self.dof + (self.dof if self.observes == "momentum" else self.coordinates.n_features)

    @property
    def observation(self) -> str:
        """Numbers of an observation in their order, by name: of a pendulum ``(cos q, sin q, dq/dt)`` or ``(q, p)``."""
        kinds = self.coordinates.kinds
        of = [f"{i}" if self.dof > 1 else "" for i in range(1, self.dof + 1)]
        lines, circles = ([n for n, kind in zip(of, kinds, strict=True) if kind == wanted] for wanted in "RS")
        if self.observes == "momentum":
            names = [f"q{n}" for n in of] + [f"p{n}" for n in of]
        else:
            names = [f"q{n}" for n in lines] + [f"{f} q{n}" for f in ("cos", "sin") for n in circles]
            names += [f"dq{n}/dt" for n in of]
        return f"({', '.join(names)})"

    def n_parameters(self) -> int:
        """Count the learned parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def encode(self, x: Tensor) -> Tensor:
        """Return the state behind an observation, both with their numbers in the last axis."""
        if self.observes == "momentum":
            return x
        features, v = x.split((self.coordinates.n_features, self.dof), dim=-1)
        q = self.coordinates.positions(features)
        return torch.cat((q, self._momentum(q, v)), dim=-1)

    def decode(self, state: Tensor) -> Tensor:
        """Return the observation of a state; see :meth:`encode`."""
        if self.observes == "momentum":
            return state
        q, p = state.chunk(2, dim=-1)
        return torch.cat((self.coordinates(q), self._velocity(q, p)), dim=-1)

    def _momentum(self, q: Tensor, v: Tensor) -> Tensor:
        """Return the second half of a state; the velocity itself unless the system has a mass."""
        return v

    def _velocity(self, q: Tensor, p: Tensor) -> Tensor:
        """Return the velocity; see :meth:`_momentum`."""
        return p

    @abstractmethod
    def field(self, state: Tensor, u: Tensor) -> Tensor:
        """Time derivative of a state under inputs of shape ``(*batch, n_inputs)``."""

    def residual(self, predicted: Tensor, x: Tensor) -> Tensor:
        """Differences between predicted and given observations; angles observed as they are count modulo 2 pi."""
        difference = predicted - x
        if self.observes == "velocity" or not self.coordinates.n_circles:
            return difference
        q, p = difference.chunk(2, dim=-1)
        return torch.cat((self.coordinates.shortest(q), p), dim=-1)

    def drift(self, x: Tensor) -> float:
        """Distance of observations from the circles; 0 where angles are observed as they are."""
        return 0.0 if self.observes == "momentum" else self.coordinates.drift(x)

    def rollout(
        self, x0: Tensor, t: Tensor | Sequence[float], u: Tensor | None = None, *, n_substeps: int = 1
    ) -> Solution:
        """Observe the system from a first observation on, in steps of the fourth order.

        Args:
            x0: First observations, shape ``(*batch, n_observed)``, in the dtype of the weights.
            t: Times of the observations, increasing, the first that of ``x0``; shape ``(n_times,)``. Their dtype need
                not be that of ``x0``; steps are their differences in double precision.
            u: Inputs: held ones of shape ``(*batch, n_inputs)``, or sampled ones of shape
                ``(n_times - 1, *batch, n_inputs)``, each held until the next time; None for zero.
            n_substeps: Steps between two times.

        Returns:
            Observations, shape ``(n_times, *batch, n_observed)``; the status tells if a number is not finite, and
            where first.

        Raises:
            ValueError: If a shape or a dtype does not fit, times do not increase or require a gradient, a number is
                not finite, or a learned or given part is not finite or not invertible at the first state.
            TypeError: If ``x0`` or ``u`` is no tensor.
        """
        t = check_increasing(t)
        check_observations("x0", x0, self)
        weights = weights_like(self, x0)
        require(x0.dtype == weights.dtype, "x0.dtype", x0.dtype, f"that of the model's weights, {weights.dtype}")
        inputs = check_inputs(u, len(t) - 1, x0.shape[:-1], self.n_inputs, like=x0)
        require_counts(n_substeps=n_substeps)
        began = time.perf_counter()
        state = self.encode(x0)
        self.check_finite(state, inputs[0])
        states = self.roll(state, t.double().diff().tolist(), inputs, n_substeps=n_substeps)
        seconds = time.perf_counter() - began
        is_finite = states.isfinite().flatten(1).all(1)
        status, message = Status.SUCCESS, ""
        if not is_finite.all():
            first = int((~is_finite).nonzero()[0])
            status = Status.NON_FINITE_STATE
            times = f"{t[first].item():.12g} of {t[-1].item():.12g}"
            message = f"Non-finite state at t = {times}: the motion left all bounds."
        n_steps = (len(t) - 1) * n_substeps
        return Solution(t.to(x0.device), states, n_steps * _N_STAGES, n_steps, seconds, status, message)

    def roll(self, state: Tensor, steps: Sequence[float], inputs: Tensor, *, n_substeps: int = 1) -> Tensor:
        """Observations of a state and after each step, unchecked; see :meth:`rollout`."""
        states = [state]
        for dt, u in zip(steps, inputs, strict=True):
            for _ in range(n_substeps):
                state = explicit_step(lambda _, s, u=u: self.field(s, u), 0.0, dt / n_substeps, state, _METHOD)
            states.append(state)
        return self.decode(torch.stack(states))

    def check_finite(self, state: Tensor, u: Tensor) -> None:
        """Raise a ValueError that names the part unless all parts and the field are finite at a state."""
        with torch.no_grad():
            for name in self.parts:
                if getattr(self, name) is not None:
                    check_finite(name, getattr(self, name)(state.chunk(2, dim=-1)[0]), _EVERYWHERE)
            check_finite("field", self.field(state, u), _EVERYWHERE)


class PortHamiltonianModel(ObservedSystem):
    """A port-Hamiltonian system as it is observed, learned or true; passive for any weights.

    Where the velocity is observed, ``p = M(q) dq/dt``.

    Args:
        system: The system.
        coordinates: A letter for each degree of freedom; see :class:`Coordinates`.
        observes: ``"momentum"`` or ``"velocity"``.

    Raises:
        ValueError: If the numbers of degrees of freedom differ, or an argument is out of range.
    """

    parts = ("inverse_mass", "potential", "dissipation", "port")

    def __init__(self, system: PortHamiltonianSystem, coordinates: str, *, observes: str) -> None:
        super().__init__(coordinates, observes=observes, n_inputs=system.n_inputs)
        wanted = f"a letter for each of {system.dof} degrees of freedom"
        require(self.dof == system.dof, "coordinates", coordinates, wanted)
        kinetic = system.hamiltonian.kinetic
        wanted = "None: momenta of observed velocities, and the comparison of parts, are those of a mass"
        require(kinetic is None, "system.hamiltonian.kinetic", kinetic, wanted)
        self.system = system

    def _momentum(self, q: Tensor, v: Tensor) -> Tensor:
        return momentum(self.inverse_mass(q), v)

    def _velocity(self, q: Tensor, p: Tensor) -> Tensor:
        return self.system.hamiltonian.velocity(PhaseState(q, p))

    def field(self, state: Tensor, u: Tensor) -> Tensor:
        return torch.cat(self.system.vector_field(PhaseState(*state.chunk(2, dim=-1)), u), dim=-1)

    def energy(self, x: Tensor) -> Tensor:
        """Energy of observations of shape ``(*batch, n_observed)``; shape ``(*batch,)``."""
        return self.system.energy(PhaseState(*self.encode(x).chunk(2, dim=-1)))

    def inverse_mass(self, q: Tensor) -> Tensor:
        """Evaluate the inverse mass as a matrix, shape ``(*batch, dof, dof)``; the identity where there is none."""
        mass = self.system.hamiltonian.inverse_mass
        units = torch.eye(self.dof, dtype=q.dtype, device=q.device)
        value = units if mass is None else evaluate_full(mass, q, None, name="inverse_mass", like=q)
        return value.expand(*q.shape, self.dof)

    def potential(self, q: Tensor) -> Tensor:
        """Evaluate the potential, shape ``(*batch,)``; zero where there is none."""
        potential = self.system.hamiltonian.potential
        return torch.zeros_like(q[..., 0]) if potential is None else potential(q)

    def dissipation(self, q: Tensor) -> Tensor:
        """Evaluate the dissipation as a matrix, shape ``(*batch, dof, dof)``; zero where there is none."""
        return self.system.structure_matrices(PhaseState(q, torch.zeros_like(q))).R[..., self.dof :, self.dof :]

    def port(self, q: Tensor) -> Tensor:
        """Evaluate the input matrix, shape ``(*batch, dof, n_inputs)``."""
        return self.system.structure_matrices(PhaseState(q, torch.zeros_like(q))).B[..., self.dof :, :]


def momentum(inverse_mass: Tensor, v: Tensor) -> Tensor:
    r"""Solve :math:`M^{-1} p = v`.

    Args:
        inverse_mass: Shape ``(*batch, dof, dof)``.
        v: Velocities, shape ``(*batch, dof)``.

    Returns:
        Momenta, shape ``(*batch, dof)``.

    Raises:
        ValueError: If the inverse mass is not finite, or singular somewhere.
    """
    check_finite("inverse_mass", inverse_mass.detach(), _EVERYWHERE)
    if v.shape[-1] == 1:
        p, is_singular = v / inverse_mass[..., 0], inverse_mass.detach()[..., 0, 0] == 0
    else:
        p, info = torch.linalg.solve_ex(inverse_mass, v.unsqueeze(-1))
        p, is_singular = p.squeeze(-1), info != 0
    if is_singular.any():
        require(False, "inverse_mass", inverse_mass.detach()[is_singular][0].tolist(), "invertible")
    return p


def weights_like(model: nn.Module, default: Tensor) -> Tensor:
    """Return a weight, whose dtype and device are those of all weights; a default where there are none.

    Raises:
        ValueError: If weights and constants differ in dtype or device.
    """
    weight = next(model.parameters(), None)
    if weight is None:
        return default
    # a buffer without axes promotes nothing
    tensors = [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point() and x.dim() > 0]
    found = sorted({f"{x.dtype} on {x.device}" for x in tensors})
    require(len(found) <= 1, "model", found, "of one dtype on one device, as by `model.float()`")
    return weight


def check_seed(seed: object) -> None:
    """Raise a ValueError unless a seed is an integer that generators take."""
    is_right = is_integer(seed) and -(2**63) <= seed < 2**63
    require(is_right, "seed", seed, "an integer of at least -2^63 and below 2^63")


def check_n_inputs(n_inputs: object) -> None:
    """Raise a ValueError unless a number of inputs is one that systems can have."""
    wanted = "a positive integer; a system that nothing drives has one input, which is zero (`u=None`)"
    require(is_integer(n_inputs) and n_inputs >= 1, "n_inputs", n_inputs, wanted)


def check_observations(name: str, x: Tensor, model: ObservedSystem) -> None:
    """Raise an error unless observations are floating point, have their length and are finite."""
    check_class(name, x, Tensor)
    require(x.is_floating_point(), f"{name}.dtype", x.dtype, "floating point")
    wanted = f"(*batch, {model.n_observed}), as an observation of this model is {model.observation}"
    require(x.shape[-1:] == (model.n_observed,), f"{name}.shape", tuple(x.shape), wanted)
    check_finite(name, x)


def check_increasing(t: Tensor | Sequence[float]) -> Tensor:
    """Check that times increase and return them as a tensor, as precise as they were given."""
    if isinstance(t, Tensor) and not (t.is_floating_point() or t.is_complex()):
        t = t.double()
    t = check_times(t, t if isinstance(t, Tensor) else torch.zeros(()))
    require(bool(t[0] < t[1]), "t", t.tolist(), "increasing")
    require(not t.requires_grad, "t.requires_grad", True, "False, since steps are numbers here")
    return t


def check_inputs(u: Tensor | None, n_steps: int, batch: Sequence[int], n_inputs: int, *, like: Tensor) -> Tensor:
    """Check inputs, held or sampled, and return the one of each step, shape ``(n_steps, *batch, n_inputs)``."""
    held, sampled = (*batch, n_inputs), (n_steps, *batch, n_inputs)
    if u is None:
        return like.new_zeros(sampled)
    check_class("u", u, Tensor)
    require(not u.is_complex(), "u.dtype", u.dtype, "real")
    wanted = f"{held}, held, or {sampled}, one input for each step"
    require(u.shape in (held, sampled), "u.shape", tuple(u.shape), wanted)
    check_finite("u", u)
    return u.to(like).expand(sampled)
