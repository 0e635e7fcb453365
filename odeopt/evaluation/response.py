"""Answers of a rule to gradients: its update against gradient and momentum, its step size over a run, its matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from odeopt.rules.base import UpdateRule

_PAST = {"all -1": -1.0, "-1 and +1 in turns": 0.0, "all +1": 1.0}  # gradients so far
_N_STEPS = 12  # that build up a momentum
_HORIZON = 300


class Response(NamedTuple):
    """Answers of a rule to gradients that are made up, in float64.

    Attributes:
        gradient: Gradients in units of the mean magnitude of those before, shape ``(n,)``.
        update: Updates of a vector by those, by what the gradients were before; each ``(n,)``.
        step: Numbers of steps, ``(n_steps,)``.
        step_size: Root mean square of the updates of a vector whose gradients are noise, told the length of the run and
            not; each ``(n_steps,)``.
        singular_value: Singular values of a gradient that a square matrix sees again and again, the largest one,
            descending, ``(k,)``.
        matrix_update: The update along the singular directions, ``(k,)``.
    """

    gradient: Tensor
    update: dict[str, Tensor]
    step: Tensor
    step_size: dict[str, Tensor]
    singular_value: Tensor
    matrix_update: Tensor


@torch.no_grad()
def response(rule: UpdateRule) -> Response:
    """Ask a rule for its updates.

    Args:
        rule: The rule, on the CPU.

    Returns:
        What it answers; the same each time.
    """
    generator = torch.Generator().manual_seed(0)
    gradient = torch.linspace(-3.0, 3.0, 61)
    updates = {name: _updates(rule, _past(past, gradient), (len(gradient),))[-1] for name, past in _PAST.items()}
    noise = torch.randn(_HORIZON, 64, generator=generator)
    sizes = {
        name: torch.stack([x.square().mean().sqrt() for x in _updates(rule, noise, (64,), is_told=is_told)])
        for name, is_told in {"length told": True, "not told": False}.items()
    }
    left, right = (torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q for _ in range(2))
    values = torch.logspace(0.0, -3.0, 32)
    matrix = (left * values) @ right.mT
    update = _updates(rule, [matrix.flatten()] * _N_STEPS, (32, 32))[-1].view(32, 32)
    along = -(left.mT @ update @ right).diagonal()
    step = torch.arange(1.0, _HORIZON + 1)
    return tree_map(Tensor.double, Response(gradient, updates, step, sizes, values, along))


def _past(past: float, gradient: Tensor) -> list[Tensor]:
    """Gradients of one sign, or of both in turns, and the last ones."""
    signs = [past or (-1.0) ** step for step in range(_N_STEPS)]
    return [*(torch.full_like(gradient, sign) for sign in signs), gradient]


def _updates(rule: UpdateRule, gradients, shape: tuple[int, ...], *, is_told: bool = False) -> list[Tensor]:
    # a parameter of the size that layers of this size begin with; it stays where it is
    param = torch.full((gradients[0].numel(),), shape[-1] ** -0.5)
    state, updates = rule.init_state(param), []
    for step, gradient in enumerate(gradients):
        progress = torch.tensor(step / len(gradients)) if is_told else None
        update, state = rule(gradient, state, param=param, shape=shape, progress=progress)
        updates.append(update)
    return updates
