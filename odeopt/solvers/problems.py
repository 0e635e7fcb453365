"""Test problems by name: DETEST, mechanical systems, gradient flows and stiff equations."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from odeopt.physics import PhaseState, PortHamiltonianSystem
from odeopt.solvers.detest import LinearField, columns, detest, exact_orbit
from odeopt.solvers.initial_value import Problem
from odeopt.solvers.selection import select

_F64 = torch.float64


def _times(end: float) -> Tensor:
    return torch.linspace(0.0, end, 11, dtype=_F64)


# Mechanical systems


def _state(q: list[float], p: list[float]) -> PhaseState:
    return PhaseState(torch.tensor(q, dtype=_F64), torch.tensor(p, dtype=_F64))


def _exact_kepler(t: Tensor) -> PhaseState:
    return PhaseState(*exact_orbit(t, 0.6).chunk(2, -1))


def _henon_heiles(q: Tensor) -> Tensor:
    q1, q2 = q.unbind(-1)
    return 0.5 * q.square().sum(-1) + q1 * q1 * q2 - q2**3 / 3


def _swing(q: Tensor) -> Tensor:
    return 1 - torch.cos(q[..., 0])


def _drive(t: Tensor) -> Tensor:
    return 0.8 * torch.cos(1.5 * t).reshape(1)


def _mechanics() -> list[Problem]:
    kepler = PortHamiltonianSystem(2, potential=lambda q: -1 / q.norm(dim=-1))
    stars = PortHamiltonianSystem(2, potential=_henon_heiles)
    pendulum = PortHamiltonianSystem(1, potential=_swing, dissipation=torch.full((1,), 0.2, dtype=_F64))
    at_nearest = _state([0.4, 0.0], [0.0, 2.0])  # (1 - e, 0) and (0, sqrt((1 + e) / (1 - e))) at e = .6
    swinging = _state([1.5], [0.5])
    group = "mechanics"
    return [
        Problem("kepler", group, at_nearest, _times(20), system=kepler, exact=_exact_kepler),
        Problem("henon-heiles", group, _state([0.0, 0.1], [0.4, 0.0]), _times(40), system=stars),
        Problem("pendulum", group, swinging, _times(20), system=pendulum),
        Problem("driven-pendulum", group, swinging, _times(20), system=pendulum, effort=_drive, is_autonomous=False),
    ]


# Gradient flows: dx/dt = -grad f(x), with f as the energy


class SoftmaxFlow(nn.Module):
    """Gradient flow of softmax regression with a quadratic penalty, on 60 fixed random examples.

    Args:
        n_features: Numbers per example.
        n_classes: Number of classes.
    """

    PENALTY = 0.01

    def __init__(self, n_features: int = 8, n_classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(60) % n_classes
        centres = torch.randn(n_classes, n_features, generator=generator, dtype=_F64)
        noise = torch.randn(60, n_features, generator=generator, dtype=_F64)
        self.register_buffer("inputs", centres[labels] + noise)
        self.register_buffer("targets", nn.functional.one_hot(labels, n_classes).to(_F64))

    def loss(self, x: Tensor) -> Tensor:
        """Mean cross-entropy and penalty of weights of shape ``(*batch, n_features * n_classes)``."""
        logits = self.inputs @ x.unflatten(-1, (self.inputs.shape[1], -1))
        fit = torch.logsumexp(logits, -1) - (logits * self.targets).sum(-1)
        return fit.mean(-1) + 0.5 * self.PENALTY * x.square().sum(-1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        residual = torch.softmax(self.inputs @ x.view(self.inputs.shape[1], -1), -1) - self.targets
        return -(self.inputs.T @ residual).flatten() / len(self.inputs) - self.PENALTY * x


class QuadraticFlow(LinearField):
    """Gradient flow of a quadratic, whose Hessian is ``-A``."""

    def loss(self, x: Tensor) -> Tensor:
        """Value of the quadratic, shape ``batch``."""
        return -0.5 * (x * (x @ self.A)).sum(-1)


def _gradient_flows() -> list[Problem]:
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=_F64))[0]
    curvatures = torch.logspace(-1.5, 0.5, 10, dtype=_F64)  # condition 100
    A = (axes * curvatures) @ axes.T
    A = 0.5 * (A + A.T)
    start = axes.sum(1)  # one along every axis

    def exact(t: Tensor) -> Tensor:
        return torch.exp(-t[:, None] * curvatures) @ axes.T

    group, quadratic, softmax = "gradient flow", QuadraticFlow(-A), SoftmaxFlow()
    return [
        Problem("quadratic", group, start, _times(20), field=quadratic, exact=exact, energy=quadratic.loss),
        Problem("softmax", group, torch.zeros(24, dtype=_F64), _times(20), field=softmax, energy=softmax.loss),
    ]


# Stiff equations


def _relaxation(t: Tensor, y: Tensor) -> Tensor:
    return columns(y[1], 1e3 * (1 - y[0] * y[0]) * y[1] - y[0])


def _robertson(t: Tensor, y: Tensor) -> Tensor:
    y1, y2, y3 = y.unbind(-1)
    slow, fast = 1e4 * y2 * y3 - 0.04 * y1, 3e7 * y2 * y2
    return columns(slow, -slow - fast, fast)


def _stiff() -> list[Problem]:
    def state(*x: float) -> Tensor:
        return torch.tensor(x, dtype=_F64)

    return [
        Problem("van-der-pol", "stiff", state(2.0, 0.0), _times(2000), field=_relaxation, is_stiff=True),
        Problem("robertson", "stiff", state(1.0, 0.0, 0.0), _times(40), field=_robertson, is_stiff=True),
    ]


@cache
def _registry() -> dict[str, Problem]:
    others = [*_mechanics(), *_gradient_flows(), *_stiff()]
    return detest() | {problem.name: problem for problem in others}


def available_problems() -> dict[str, str]:
    """Return the group of each test problem, by its name."""
    return {name: problem.group for name, problem in _registry().items()}


def select_problems(problems: Iterable[str | Problem] | str | Problem | None = None) -> list[Problem]:
    """Look test problems up.

    Args:
        problems: Problems, names out of :func:`available_problems` or of groups, such as ``"A3"``, ``"kepler"`` or
            ``"DETEST A"``, one or several; None for all.

    Returns:
        The problems, one of each name; those out of :func:`available_problems` in float64 on the CPU.

    Raises:
        ValueError: If there is no such problem or group, or none is wanted.
    """
    return select("problems", problems, _registry(), "group")
