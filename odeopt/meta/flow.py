"""Optimization as one ordinary differential equation: parameters and rule integrated together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odeopt.checks import is_number, require, require_positive
from odeopt.modes import outside_inference_mode
from odeopt.ode import Solution, integrate, is_fixed_step
from odeopt.ode.checks import check_times, time_dtype
from odeopt.ode.torchdiffeq import ATOL, RTOL, time_of_event
from odeopt.physics import PhaseState, PortHamiltonianSystem
from odeopt.rules.port_hamiltonian import PortHamiltonianUpdate
from odeopt.rules.port_hamiltonian.system import Modulation
from odeopt.tasks.base import Batch, Params, Task, flattened


class FlowState(NamedTuple):
    """State of the closed loop of some problems of ``n`` parameters each.

    Attributes:
        theta: Parameters, shape ``(n_tasks, n)``.
        q: Positions of each coordinate's system, shape ``(n_tasks, n, dof)``.
        p: Momenta, of the same shape.
    """

    theta: Tensor
    q: Tensor
    p: Tensor


class GradientFlow(NamedTuple):
    """Result of a gradient flow.

    Attributes:
        t: Times, shape ``(n_times,)``: the outputs, up to the event and with it, if it happened.
        params: Parameters at them, each of shape ``(n_times, n_tasks, *shape)``.
        losses: Shape ``(n_times, n_tasks)``.
        gradient_norms: Euclidean norms of the whole gradient, shape ``(n_times, n_tasks)``.
        energy: Loss plus stored energy, which never rises along the flow, shape ``(n_times, n_tasks)``.
        event_time: When all gradients had come down to the tolerance; None if they did not, or none was given.
        solution: Result of the integration, with its status and number of field evaluations.
    """

    t: Tensor
    params: Params
    losses: Tensor
    gradient_norms: Tensor
    energy: Tensor
    event_time: float | None
    solution: Solution


@outside_inference_mode
def gradient_flow(
    task: Task,
    rule: PortHamiltonianUpdate | PortHamiltonianSystem,
    t: Tensor | Sequence[float],
    *,
    indices: Tensor,
    method: str = "dopri5",
    seed: int = 0,
    step: int = 0,
    scale: float = 1.0,
    kappa: float = 1.0,
    friction: float | Sequence[float] = 1.0,
    gain: float | Sequence[float] = 1.0,
    z: Any = None,
    until_norm: float | None = None,
    options: dict[str, Any] | None = None,
    rtol: float = RTOL,
    atol: float = ATOL,
    backend: str = "auto",
) -> GradientFlow:
    r"""Solve an optimization problem as one differential equation, its gradient evaluated wherever the solver asks.

    .. math:: \dot\theta = \kappa\, y, \quad \dot x = (J - R)\,\nabla H + B u, \quad u = -s\, \nabla f(\theta),
              \quad y = B^\top \nabla H

    Every coordinate of the parameters has a system of its own, at rest in the beginning. The scale s, kappa and the
    signals of friction and port are held, so that

    .. math:: W = f(\theta) + \frac{\kappa}{s} \sum_i H_i, \qquad
              \dot W = -\frac{\kappa}{s} \sum_i (\partial H / \partial p)_i^\top D\, (\partial H / \partial p)_i \le 0

    An adaptive method takes one step size for all problems. The batch is that of one step, held.

    Args:
        task: The problems.
        rule: A rule of quadratic modes, whose system is taken, or a system of one input. Other energies flow as those
            of a system, :class:`~odeopt.PortHamiltonianSystem` with ``kinetic``.
        t: Output times, shape ``(n_times,)``, rising.
        indices: Global numbers of the problems, shape ``(n_tasks,)``.
        method: A method of :func:`odeopt.ode.integrate`, but for the structure-preserving ones.
        seed: Seed of the problems.
        step: Number of the batch.
        scale: s, positive.
        kappa: Step size, positive, in units of the parameters.
        friction: Friction of a rule's modes, one number or one per mode, not negative.
        gain: Port gain of a rule's modes, likewise of any sign.
        z: Modulating signal of a system.
        until_norm: Stop when the norm of every problem's gradient is at most this; None to go on to the end. It is
            looked at where steps end: short steps (``max_step`` or ``step_size`` in ``options``) find it where the
            norm rises again, as that of oscillating parameters does.
        options: Options of the method.
        rtol: Relative tolerance of the adaptive methods.
        atol: Absolute tolerance.
        backend: As in :func:`odeopt.ode.integrate`.

    Returns:
        The flow.

    Raises:
        ValueError: If an argument is out of range, a system has more than one input, or a rule modes that are not
            quadratic.

    References:
        van der Schaft, Jeltsema (2014), Port-Hamiltonian systems theory, Ch. 2: passive systems in feedback.

    Example:
        >>> from odeopt.tasks import RandomQuadratic
        >>> system = PortHamiltonianSystem(1, dissipation=1.0)
        >>> flow = gradient_flow(RandomQuadratic(5), system, [0.0, 1.0, 5.0], indices=torch.arange(8))
        >>> bool((flow.losses[1:] < flow.losses[:-1]).all())
        True
    """
    require_positive(scale=scale, kappa=kappa)
    require_positive(until_norm=until_norm, or_none=True)
    is_rule = isinstance(rule, PortHamiltonianUpdate)
    system = rule.system if is_rule else rule
    require(isinstance(system, PortHamiltonianSystem), "rule", rule, "a port-Hamiltonian rule or system")
    require(system.n_inputs == 1, "rule", f"a system of {system.n_inputs} inputs", "a system of one input")
    params, batch = task.init_params(indices, seed), task.sample_batch(indices, step, seed)
    shapes = {name: value.shape[1:] for name, value in params.items()}
    theta = torch.cat([flattened(value) for value in params.values()], dim=1)
    rest = theta.new_zeros(*theta.shape, system.dof)
    if is_rule:
        wanted = "quadratic in all modes; a `PortHamiltonianSystem` takes other energies, by `kinetic`"
        require(set(rule.kinetic) == {"quadratic"} and rule.output == "sum", "rule.kinetic", rule.kinetic, wanted)
        require(z is None, "z", z, "None for a rule, which has `friction` and `gain`")
        rates = _of_modes("friction", friction, rest)
        require(bool((rates >= 0).all()), "friction", friction, "not negative")
        z = Modulation(rates, _of_modes("gain", gain, rest).unsqueeze(-1))

    def field(time: Tensor, x: FlowState) -> FlowState:
        x = FlowState(*x)
        _, gradient = _loss_and_gradient(task, x.theta, shapes, batch)
        rates, y = system.vector_field_and_output(PhaseState(x.q, x.p), -scale * gradient.unsqueeze(-1), z)
        return FlowState(kappa * y.squeeze(-1), rates.q, rates.p)

    def above(time: Tensor, x: FlowState) -> Tensor:
        _, gradient = _loss_and_gradient(task, x[0], shapes, batch)
        return gradient.norm(dim=1).max() - until_norm

    t = check_times(t, theta)
    require(bool(t[-1] > t[0]), "t", t.tolist(), "rising")
    x0, event_time = FlowState(theta, rest, rest.clone()), None
    solver = {"method": method, "options": options, "rtol": rtol, "atol": atol}
    if until_norm is not None:
        needs_step = is_fixed_step(method) and "step_size" not in (options or {})
        require(not needs_step, "options", options, f"given a `step_size` for an event with method {method!r}")
        # a straight line between two steps would meet the norm too early
        search = solver | ({"options": {"interp": "cubic"} | options} if is_fixed_step(method) else {})
        event_time = time_of_event(field, x0, t[0].item(), t[-1].item(), above, **search)
    if event_time is not None:
        t = t.to(time_dtype(t.device))  # in which no event falls together with the first time
        event_time = max(event_time, t[0].item() + 1e-6 * (t[1] - t[0]).item())  # there are two times at least
        t = torch.cat((t[t < event_time], t.new_tensor([event_time])))
    solution = integrate(field, x0, t, backend=backend, **solver)
    states = FlowState(*solution.states)
    losses, gradients = zip(*(_loss_and_gradient(task, x, shapes, batch) for x in states.theta), strict=True)
    losses, gradients = torch.stack(losses), torch.stack(gradients)
    stored = system.energy(PhaseState(states.q, states.p)).sum(-1)
    params = _unflattened(states.theta, shapes)
    norms = gradients.norm(dim=-1)
    return GradientFlow(t, params, losses, norms, losses + kappa / scale * stored, event_time, solution)


def _of_modes(name: str, value: Any, like: Tensor) -> Tensor:
    """Expand an argument, a number or one for each mode, to the momenta."""
    numbers, modes = [value] if is_number(value) else list(value), like.shape[-1]
    is_right = len(numbers) in (1, modes) and all(map(is_number, numbers))
    require(is_right, name, value, f"one number, or one for each of {modes} modes")
    return like.new_tensor(numbers).expand_as(like)


def _loss_and_gradient(task: Task, theta: Tensor, shapes: dict[str, torch.Size], batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses ``(n_tasks,)`` and gradients ``(n_tasks, n)``, with a graph where gradients are enabled outside."""
    keep_graph = torch.is_grad_enabled() and theta.requires_grad
    with torch.enable_grad():
        theta = theta if keep_graph else theta.detach().requires_grad_()
        losses = task.checked_loss(_unflattened(theta, shapes), batch)
        (gradient,) = torch.autograd.grad(losses.sum(), theta, create_graph=keep_graph)
    return (losses if keep_graph else losses.detach()), gradient


def _unflattened(theta: Tensor, shapes: dict[str, torch.Size]) -> Params:
    pieces = theta.split([shape.numel() for shape in shapes.values()], dim=-1)
    named = zip(shapes.items(), pieces, strict=True)
    return {name: piece.reshape(*theta.shape[:-1], *shape) for (name, shape), piece in named}
