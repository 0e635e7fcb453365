"""Estimators of the meta-gradient, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from odeopt.meta.distributed import ALONE, World
from odeopt.meta.objective import MetaObjective
from odeopt.meta.unroll import detached, unroll
from odeopt.rules.base import UpdateRule, require
from odeopt.tasks.base import Task


class Estimator(ABC):
    """Fills the ``.grad`` of a rule's parameters with an estimate of the gradient of the meta-loss."""

    @abstractmethod
    def gradients(
        self,
        rule: UpdateRule,
        task: Task,
        objective: MetaObjective,
        *,
        indices: Tensor,
        horizon: int,
        seed: int,
        update_scale: float = 1.0,
        world: World = ALONE,
    ) -> Iterator[Tensor]:
        """Run one batch of tasks over ``horizon`` steps.

        Where several ranks work on the batch, each is given its own tasks, and the estimator decides what they
        exchange: gradient and meta-loss are those of the whole batch, the same on every rank.

        Args:
            rule: The rule; its gradients are set, its parameters left alone. The caller updates them and clears
                the gradients between two items.
            task: Where losses come from.
            objective: The meta-loss.
            indices: Global numbers of this rank's tasks, shape ``(n_tasks,)``.
            horizon: Number of optimizee steps.
            seed: Seed of initial parameters and batches.
            update_scale: Factor on the updates.
            world: The ranks that work on the batch.

        Yields:
            The mean meta-loss over the tasks of all ranks, a detached 0-d tensor, each time a gradient is ready.
        """


class Backpropagation(Estimator):
    """Backpropagation through the unrolled optimizee, over the full horizon or truncated.

    By default the gradient is exact: full horizon, second derivatives of the optimizee included. The cheaper
    choices are biased: with ``detach`` training improves and then drifts away while its curve still looks fine.
    Ranks exchange their gradients, which are averaged by numbers of tasks.

    Args:
        truncation: Number of steps per segment, after which a gradient is yielded and the graph is cut;
            None for the full horizon.
        detach: Whether the gradients that the rule sees count as constants (the paper's setting).
        checkpoint: Number of steps per checkpointed segment, whose ends alone stay in memory until the backward
            pass, which computes each segment again; None keeps every step. See
            :class:`~odeopt.meta.settings.MetaConfig` for how to choose it.

    Raises:
        ValueError: If ``truncation`` or ``checkpoint`` is not positive.

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Sec. 2.1.
    """

    def __init__(self, *, truncation: int | None = None, detach: bool = False, checkpoint: int | None = None) -> None:
        for name, value in (("truncation", truncation), ("checkpoint", checkpoint)):
            require(value is None or value >= 1, name, value, "positive")
        self.truncation, self.detach, self.checkpoint = truncation, detach, checkpoint

    def gradients(self, rule, task, objective, *, indices, horizon, seed, update_scale=1.0, world=ALONE):
        length = self.truncation or horizon
        params = states = None
        for start in range(0, horizon, length):
            n_steps = min(length, horizon - start)
            trajectory = unroll(
                rule,
                task,
                indices=indices,
                n_steps=n_steps,
                seed=seed,
                start=start,
                params=params,
                states=states,
                total_steps=horizon,
                detach=self.detach,
                update_scale=update_scale,
                checkpoint=self.checkpoint,
            )
            meta_loss = objective(trajectory.losses[1:], start=start, horizon=horizon).mean()
            # a segment's weights sum to its share of the horizon; gradients of segments should be comparable
            (meta_loss * (horizon / n_steps)).backward()
            _, params, states = detached(trajectory)
            meta_loss = meta_loss.detach() * (horizon / n_steps)
            yield meta_loss if world.size == 1 else _averaged(rule, meta_loss, len(indices), world)


def _averaged(rule: UpdateRule, meta_loss: Tensor, n_tasks: int, world: World) -> Tensor:
    """Replace each rank's gradients and meta-loss by those of the whole batch."""
    parameters = [p for p in rule.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    meta_loss, *grads = world.average([meta_loss, *grads], weight=n_tasks)
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad
    return meta_loss
