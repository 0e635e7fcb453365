"""Backpropagation through the unrolled optimizee."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from odeopt.checks import is_number, require, require_counts
from odeopt.meta.distributed import ALONE, World
from odeopt.meta.estimators.base import Estimator
from odeopt.meta.unroll import unroll
from odeopt.rules.base import UpdateRule


@dataclass(frozen=True, kw_only=True)
class Backpropagation(Estimator):
    """Backpropagation through the unrolled optimizee, over the full horizon or truncated.

    By default the gradient is exact: full horizon, second derivatives of the optimizee included. The cheaper
    choices are biased: with ``detach`` training improves and then drifts away while its curve still looks fine.
    Ranks exchange their gradients, which are averaged by numbers of tasks.

    Args:
        truncation: Number of steps per segment, after which a gradient is yielded and the graph is cut;
            None for the full horizon.
        detach: Whether the gradients that the rule sees count as constants (the paper's setting).
        checkpoint_every: Steps per segment of activation checkpointing, for horizons that do not fit in memory; None
            keeps every step. ``horizon / checkpoint_every`` boundaries and ``checkpoint_every`` steps are in memory at
            once. With the port-Hamiltonian rule a boundary has 16 bytes per parameter and task, a step about 200, so
            ``sqrt(horizon / 12)`` needs the least. Every step is evaluated twice, whatever the length. The gradient is
            the same to rounding, and a run may be resumed with another length.
        damping: Factor, per step, on the meta-gradient on its way back; see
            :class:`~odeopt.meta.estimators.DampedBackpropagation`.

    Raises:
        ValueError: If ``truncation`` or ``checkpoint_every`` is no positive integer, or ``damping`` not in (0, 1].

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Sec. 2.1.
    """

    key: ClassVar[str] = "backpropagation"
    is_compilable: ClassVar[bool] = True

    truncation: int | None = None
    detach: bool = False
    checkpoint_every: int | None = None
    damping: float = 1.0

    def __post_init__(self) -> None:
        require_counts(truncation=self.truncation, checkpoint_every=self.checkpoint_every, or_none=True)
        require(isinstance(self.detach, bool), "detach", self.detach, "true or false")
        is_damping = is_number(self.damping) and 0 < self.damping <= 1
        require(is_damping, "damping", self.damping, "a number in (0, 1]")

    def gradients(self, rule, task, objective, *, indices, horizon, seed, update_scale=1.0, tells_horizon=True,
                  world=ALONE):  # fmt: skip
        length, params, states, first = self.truncation or horizon, None, None, None
        options = {"seed": seed, "total_steps": horizon if tells_horizon else None, "update_scale": update_scale}
        options |= {"detach": self.detach, "damping": self.damping, "held_out": objective.held_out}
        options |= {"indices": indices, "checkpoint_every": self.checkpoint_every}
        for start in range(0, horizon, length):
            n_steps = min(length, horizon - start)
            trajectory = unroll(rule, task, n_steps=n_steps, start=start, params=params, states=states, **options)
            first = trajectory.losses[0].detach() if first is None else first
            meta_loss = objective(trajectory.losses[1:], start=start, horizon=horizon, first=first).mean()
            # a segment's weights sum to its share of the horizon; gradients of segments should be comparable
            meta_loss = meta_loss * (horizon / n_steps)
            meta_loss.backward()
            params, states, meta_loss = tree_map(Tensor.detach, (trajectory.params, trajectory.states, meta_loss))
            yield meta_loss if world.size == 1 else _averaged(rule, meta_loss, len(indices), world)


def _averaged(rule: UpdateRule, meta_loss: Tensor, n_tasks: int, world: World) -> Tensor:
    """Replace each rank's gradients and meta-loss by those of the whole batch."""
    parameters = [p for p in rule.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    meta_loss, *grads = world.average([meta_loss, *grads], weight=n_tasks)
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad
    return meta_loss
