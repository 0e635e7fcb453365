"""The learned port-Hamiltonian rule: every coordinate owns a small system with energy, friction and port."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from odeopt.ode import available_methods, integrate_unit, is_fixed_step
from odeopt.physics import PhaseState, PortHamiltonianSystem, PowerBalance
from odeopt.rules.base import (
    UpdateRule,
    is_integer,
    is_number,
    per_coordinate,
    per_tensor,
    require,
    state_dtype,
)
from odeopt.rules.features import averaging_weight, coordinate_rms, relative_moments
from odeopt.rules.parts import HeldFriction, HeldPort, bounded_inverse_mass, potential_network

_EPS_EFFORT = 1e-10  # under v in u = -g / sqrt(v); v is relative to the tensor's scale, so this is 1e-5 of it
_EPS_SIGNAL = 1e-4  # under squares and ratios in logarithms, which it bounds from below
_SLOW_DECAY = 0.999


class PortHamiltonianState(NamedTuple):
    r"""State of the rule for one parameter tensor.

    Attributes:
        p: Momenta, shape ``(*batch, modes, n)``; the modes come first so that memory runs along coordinates.
        q: Positions, likewise; ``(*batch, 0, n)`` where no part of the system depends on them.
        second_moment: Running square of the gradient in units of ``scale`` squared, shape ``(*batch, n)``
            (coordinatewise variant: running rms, in units of the gradient).
        scale: Running mean magnitude of the tensor's gradient, shape ``(*batch, 1)``.
        slow_scale: The same over a long memory, shape ``(*batch, 1)``: what the gradient has fallen from.
        step: Number of steps taken, shape ``(*batch, 1)``.
    """

    p: Tensor
    q: Tensor
    second_moment: Tensor
    scale: Tensor
    slow_scale: Tensor
    step: Tensor


class Modulation(NamedTuple):
    """Friction, shape ``(*batch, n, modes)``, and port gain ``(*batch, n, modes, 1)``, held over one step."""

    friction: Tensor
    gain: Tensor


class Observation(NamedTuple):
    """What one gradient says about each coordinate, and about its tensor's scale."""

    u: Tensor  # port effort, (*batch, n)
    log_rms: Tensor  # log of the coordinate's running rms, (*batch, n)
    magnitudes: Tensor  # log of the tensor's mean magnitude over its running values, (*batch, 2)
    second_moment: Tensor
    scale: Tensor
    slow_scale: Tensor
    step: Tensor


class Coefficients(NamedTuple):
    """Output of the per-tensor network; modes first, shapes ``(*batch, modes, 1)`` or ``(*batch, 1)``."""

    log_gain: Tensor
    gain_slope: Tensor
    friction_logit: Tensor
    friction_log_rms: Tensor
    friction_power: Tensor
    friction_effort: Tensor
    kappa: Tensor
    log_rms: Tensor  # log rms of the tensor, which coordinates are compared with


class PortHamiltonianUpdate(UpdateRule):
    r"""A port-Hamiltonian system per coordinate, driven by the gradient, moving the parameter by its output.

    .. math::
        \dot x = (J - R)\,\nabla H(x) + B u, \quad y = B^\top \nabla H(x), \quad
        u = -g / \sqrt{v}, \quad \dot\theta = \kappa\, y

    Effort ``u``, friction, port gain and step size ``kappa`` are held over one step of unit length, which
    ``solver`` integrates. A small network per tensor reads statistics (or, coordinatewise, only time) and
    emits the coefficients by which friction and gain of each coordinate follow from
    ``log(rms_i / rms_tensor)``, ``u_i p_i`` and ``|u_i|``. The friction ``2 sigmoid(.)`` is non-negative for any
    weights, so each system is passive for any weights. The untrained rule is two heavy balls with a
    normalised gradient. The update does not change when the loss is multiplied by a constant.

    Args:
        modes: Degrees of freedom of each coordinate's system.
        solver: A method of :func:`odeopt.ode.integrate`. Adaptive methods choose one step size for all
            coordinates, and so couple them.
        coordinatewise: If True no signal crosses coordinates (the seed's setting).
        mass: ``"unit"``, or ``"network"`` for a mass that depends on ``q``.
        potential: ``"none"``, or ``"network"`` for a potential V(q) >= 0.
        friction: ``"modulated"``, or ``"network"`` to let it depend on ``q`` too.
        port: ``"modulated"``, or ``"network"`` to let it depend on ``q`` too.
        hidden: Widths of the per-tensor network.
        decay: Decay of the running moments, per step, in ``[0, 1)``.
        time_scales: Scales of the time signals ``tanh(t / tau)``, in steps.
        uses_progress: Whether the network sees ``progress`` (and whether it is known).
        initial_kappa: Step size of the untrained rule where the fan-in is one, in units of the parameter; it
            falls with the fourth root of the fan-in.

    Raises:
        ValueError: If an argument is out of range or ``solver`` is not among the installed methods.

    References:
        Zhong, Dey, Chakraborty (2020), Dissipative SymODEN, Eq. (8): the system.
        van der Schaft, Jeltsema (2014), Port-Hamiltonian systems theory, Ch. 2: passivity.
    """

    def __init__(
        self,
        *,
        modes: int = 2,
        solver: str = "rk4",
        coordinatewise: bool = False,
        mass: str = "unit",
        potential: str = "none",
        friction: str = "modulated",
        port: str = "modulated",
        hidden: tuple[int, ...] = (16, 16),
        decay: float = 0.95,
        time_scales: tuple[float, ...] = (3.0, 30.0, 300.0),
        uses_progress: bool = False,
        initial_kappa: float = 0.06,
    ) -> None:
        require(is_integer(modes) and modes >= 1, "modes", modes, "an integer of at least 1")
        require(solver in available_methods(), "solver", solver, f"one of {', '.join(available_methods())}")
        require(is_number(decay) and 0 <= decay < 1, "decay", decay, "in [0, 1)")
        require(all(is_integer(w) and w > 0 for w in hidden), "hidden", hidden, "positive widths")
        are_scales = len(time_scales) > 0 and all(is_number(s) and s > 0 for s in time_scales)
        require(are_scales, "time_scales", time_scales, "positive numbers")
        require(is_number(initial_kappa) and initial_kappa > 0, "initial_kappa", initial_kappa, "a positive number")
        for name, value in (("coordinatewise", coordinatewise), ("uses_progress", uses_progress)):
            require(isinstance(value, bool), name, value, "True or False")
        for name, value, plain in (
            ("mass", mass, "unit"),
            ("potential", potential, "none"),
            ("friction", friction, "modulated"),
            ("port", port, "modulated"),
        ):
            require(value in (plain, "network"), name, value, f"'{plain}' or 'network'")
        super().__init__(
            modes=modes,
            solver=solver,
            coordinatewise=coordinatewise,
            mass=mass,
            potential=potential,
            friction=friction,
            port=port,
            hidden=list(hidden),
            decay=decay,
            time_scales=list(time_scales),
            uses_progress=uses_progress,
            initial_kappa=initial_kappa,
        )
        self.modes, self.solver, self.decay = modes, solver, decay
        self.coordinatewise = coordinatewise
        self.crosses_coordinates = not (coordinatewise and is_fixed_step(solver))
        self.uses_progress, self.initial_kappa = uses_progress, initial_kappa
        self.stores_q = "network" in (mass, potential, friction, port)
        self.system = PortHamiltonianSystem(
            modes,
            inverse_mass=bounded_inverse_mass(modes) if mass == "network" else None,
            potential=potential_network(modes) if potential == "network" else None,
            dissipation=HeldFriction(modes, depends_on_q=friction == "network"),
            port=HeldPort(modes, depends_on_q=port == "network"),
        )
        self.register_buffer("time_scales", torch.tensor(time_scales), persistent=False)
        # per mode: log gain, its slope, and four numbers for the friction; then log kappa
        n_tensor_signals = 0 if coordinatewise else 6 + 2 * modes
        n_signals = n_tensor_signals + len(time_scales) + 2 * uses_progress
        widths = (n_signals, *hidden)
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.Tanh()]
        head = nn.Linear(widths[-1], 6 * modes + 1)
        nn.init.zeros_(head.weight)  # the untrained rule is exactly the heavy-ball start, whatever the seed
        nn.init.zeros_(head.bias)
        self.coefficient_network = nn.Sequential(*layers, head)
        frictions = torch.logspace(math.log10(0.1), math.log10(0.7), modes)
        self.register_buffer("initial_logit", torch.logit(frictions / 2).unsqueeze(-1), persistent=False)

    def init_state(self, param: Tensor) -> PortHamiltonianState:
        *batch, n = param.shape
        dtype = state_dtype(param.dtype)
        momenta = torch.zeros((*batch, self.modes, n), dtype=dtype, device=param.device)
        return PortHamiltonianState(
            p=momenta,
            q=torch.zeros_like(momenta) if self.stores_q else momenta[..., :0, :],
            second_moment=per_coordinate(param),
            scale=per_tensor(param),
            slow_scale=per_tensor(param),
            step=per_tensor(param),
        )

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        if grad.shape[-1] == 0:
            return grad, state
        observation, coefficients = self._prepare(grad, state, param, shape, progress)
        return self.advance(observation, state, coefficients)

    def _prepare(self, grad, state, param, shape, progress) -> tuple[Observation, Coefficients]:
        n = grad.shape[-1]
        shape = (n,) if shape is None else tuple(shape)
        # halved as often as the sum could double: the largest numbers do not overflow, and no bit changes
        shrink = 0.5 ** n.bit_length()
        mean_abs = (shrink * grad.abs()).sum(-1, keepdim=True) / (shrink * n)
        observation = self.observe(grad, state, mean_abs)
        means = None if self.coordinatewise else self.statistics(observation, state, param) / n
        return observation, self.coefficients(observation, means, shape, param is not None, progress)

    def observe(self, grad: Tensor, state: PortHamiltonianState, mean_abs: Tensor) -> Observation:
        """Normalise a gradient, shape ``(*batch, n)``, given its mean magnitude ``(*batch, 1)``."""
        step = state.step + 1
        weight = averaging_weight(step, self.decay)
        if self.coordinatewise:
            rms = coordinate_rms(grad, state.second_moment, weight)
            u = -grad / torch.where(rms > 0, rms, 1.0)
            # the coordinate's present magnitude beside its own history: the tensor is out of sight
            log_rms = 0.5 * (u.square() + _EPS_SIGNAL).log()
            return Observation(u, log_rms, step[..., :0], rms, state.scale, state.slow_scale, step)
        relative, scale, square = relative_moments(grad, mean_abs, state.scale, state.second_moment, weight)
        u = -relative * (square + _EPS_EFFORT).rsqrt()
        slow_weight = averaging_weight(step, _SLOW_DECAY)
        slow_scale = (1 - slow_weight) * state.slow_scale + slow_weight * mean_abs
        log_rms = 0.5 * (square + _EPS_SIGNAL).log()
        magnitudes = torch.cat((_log_ratio(mean_abs, scale), 0.5 * _log_ratio(mean_abs, slow_scale)), dim=-1)
        return Observation(u, log_rms, magnitudes, square, scale, slow_scale, step)

    def statistics(self, observation: Observation, state: PortHamiltonianState, param: Tensor | None) -> Tensor:
        """Sums over the coordinates of a tensor, which add up over segments and shards.

        Returns:
            Shape ``(*batch, 3 + 2 * modes)``: of ``v``, ``u^2``, ``theta^2``, ``u p_k`` and ``p_k^2``.
        """
        u, p = observation.u, state.p
        theta = torch.zeros_like(u) if param is None else param.to(u.dtype)
        squares = torch.stack((observation.second_moment, u * u, theta * theta), dim=-2)
        return torch.cat((squares, u.unsqueeze(-2) * p, p * p), dim=-2).sum(-1)

    def coefficients(
        self,
        observation: Observation,
        means: Tensor | None,
        shape: tuple[int, ...],
        has_param: bool,
        progress: Tensor | None,
    ) -> Coefficients:
        """Run the per-tensor network.

        Args:
            observation: What :meth:`observe` returned.
            means: :meth:`statistics` over the number of coordinates; None for the coordinatewise variant.
            shape: Shape of the parameter tensor, for fan-in and fan-out.
            has_param: Whether ``theta`` was seen; its rms counts as one otherwise.
            progress: Fraction of the run that is done, or None.

        Returns:
            The coefficients of the per-coordinate functions.
        """
        step = observation.step
        signals = [torch.tanh(step / self.time_scales.to(step.dtype))]
        if self.uses_progress:
            known = torch.ones_like(step) if progress is not None else torch.zeros_like(step)
            signals += [known, known * (0.0 if progress is None else progress)]
        log_rms = torch.zeros_like(step)
        if means is not None:
            d = self.modes
            v, u2, theta2 = means[..., 0:1], means[..., 1:2], means[..., 2:3]
            up, p2 = means[..., 3 : 3 + d], means[..., 3 + d :]
            log_rms = 0.5 * (v + _EPS_SIGNAL).log()
            alignment = up * (u2 * p2 + _EPS_SIGNAL).rsqrt()
            theta_signal = 0.25 * (theta2 + 1e-6).log() if has_param else torch.zeros_like(v)
            signals += [observation.magnitudes, alignment, 0.5 * (p2 + _EPS_SIGNAL).log(), theta_signal]
            signals += [torch.full_like(v, value) for value in _shape_signals(shape)]
        network = self.coefficient_network
        out = network(torch.cat(signals, dim=-1).to(network[-1].weight.dtype)).to(step.dtype)
        # a start that is stable for wide layers: their outputs sum the steps of fan-in many coordinates
        fan_in = 1 if self.coordinatewise else _fans(shape)[0]
        kappa = self.initial_kappa * fan_in**-0.25 * out[..., -1:].exp()
        per_mode = out[..., :-1].unflatten(-1, (6, self.modes)).unsqueeze(-1).unbind(-3)
        log_gain, gain_slope, logit, *slopes = per_mode
        return Coefficients(
            log_gain + math.log(0.35),
            gain_slope,
            logit + self.initial_logit.to(logit.dtype),
            *slopes,
            kappa,
            log_rms,
        )

    def advance(
        self, observation: Observation, state: PortHamiltonianState, coefficients: Coefficients
    ) -> tuple[Tensor, PortHamiltonianState]:
        """Integrate every coordinate's system over one step; return the update and the next state."""
        d, dtype = self.modes, state.p.dtype
        u, z = self._held(observation, state, coefficients)

        def field(t, y):
            dx, output = self.system.vector_field_and_output(self._phase(y[..., :d, :], y[..., d:-1, :]), u, z)
            rates = (dx.p.mT, output.mT) if dx.q is None else (dx.p.mT, dx.q.mT, output.mT)
            return torch.cat(rates, dim=-2)

        start = torch.cat((state.p, state.q, torch.zeros_like(state.p[..., :1, :])), dim=-2)
        end = integrate_unit(field, start.to(u.dtype), method=self.solver).to(dtype)
        p, q, delta = end.split((d, state.q.shape[-2], 1), dim=-2)
        _, _, _, *moments = observation
        new_state = PortHamiltonianState(p, q, *moments)
        return coefficients.kappa * delta.squeeze(-2), new_state

    def _held(self, observation, state, c: Coefficients) -> tuple[Tensor, Modulation]:
        """Effort, shape ``(*batch, n, 1)``, and modulation of one step."""
        u, log_ratio = observation.u.unsqueeze(-2), (observation.log_rms - c.log_rms).unsqueeze(-2)
        logit = (
            c.friction_logit
            + c.friction_log_rms * log_ratio
            + c.friction_power * (u * state.p)
            + c.friction_effort * u.abs()
        )
        # under 2 the friction stays inside rk4's stability region on a step of length one
        friction = 2 * torch.sigmoid(logit)
        gain = (c.log_gain + c.gain_slope * log_ratio).exp()
        dtype = self._system_dtype(state)
        z = Modulation(friction.mT.to(dtype), gain.mT.unsqueeze(-1).to(dtype))
        return observation.u.unsqueeze(-1).to(dtype), z

    def _system_dtype(self, state: PortHamiltonianState) -> torch.dtype:
        """Dtype that the system computes in: networks of q need that of their weights."""
        return self.coefficient_network[-1].weight.dtype if self.stores_q else state.p.dtype

    def _phase(self, p: Tensor, q: Tensor) -> PhaseState:
        return PhaseState(q.mT if self.stores_q else None, p.mT)

    def energy(self, state: PortHamiltonianState) -> Tensor:
        """Energy H stored in each coordinate's system, shape ``(*batch, n)``; dimensionless."""
        dtype = self._system_dtype(state)
        return self.system.energy(self._phase(state.p.to(dtype), state.q.to(dtype)))

    def power_balance(
        self,
        grad: Tensor,
        state: PortHamiltonianState,
        *,
        param: Tensor | None = None,
        shape: torch.Size | tuple[int, ...] | None = None,
        progress: Tensor | None = None,
    ) -> PowerBalance:
        """Where each coordinate's energy goes when ``grad`` arrives: at the start of that step.

        Args:
            grad: Gradient of the loss, shape ``(*batch, n)``.
            state: State before the step.
            param: As in :meth:`forward`.
            shape: As in :meth:`forward`.
            progress: As in :meth:`forward`.

        Returns:
            Energy rate, dissipated and supplied power and their residual, each ``(*batch, n)``, per step.
        """
        observation, coefficients = self._prepare(grad, state, param, shape, progress)
        u, z = self._held(observation, state, coefficients)
        x = self._phase(state.p.to(u.dtype), state.q.to(u.dtype))
        return self.system.power_balance(x, u, z)


def _log_ratio(magnitude: Tensor, reference: Tensor) -> Tensor:
    """Logarithm of a magnitude over a running mean of it; bounded below, and finite where both are zero."""
    return (magnitude / torch.where(reference > 0, reference, 1.0) + _EPS_SIGNAL).log()


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Fan-in and fan-out as torch.nn.init counts them; one and the size for biases."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    receptive_field = math.prod(shape[2:])
    return shape[1] * receptive_field, shape[0] * receptive_field


def _shape_signals(shape: tuple[int, ...]) -> tuple[float, float, float]:
    """Log fan-in and fan-out, scaled to order one, and whether the tensor is a bias."""
    fan_in, fan_out = _fans(shape)
    return math.log(fan_in) / 5, math.log(fan_out) / 5, float(len(shape) < 2)
