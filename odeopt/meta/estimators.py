"""Estimators of the meta-gradient, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

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
    ) -> Iterator[Tensor]:
        """Run one batch of tasks over ``horizon`` steps.

        Args:
            rule: The rule; its gradients are set, its parameters left alone. The caller updates them and clears
                the gradients between two items.
            task: Where losses come from.
            objective: The meta-loss.
            indices: Global numbers of the tasks, shape ``(n_tasks,)``.
            horizon: Number of optimizee steps.
            seed: Seed of initial parameters and batches.
            update_scale: Factor on the updates.

        Yields:
            The mean meta-loss over the tasks, a detached 0-d tensor, each time a gradient is ready.
        """


class Backpropagation(Estimator):
    """Backpropagation through the unrolled optimizee, over the full horizon or truncated.

    By default the gradient is exact: full horizon, second derivatives of the optimizee included. The cheaper
    choices are biased: with ``detach`` training improves and then drifts away while its curve still looks fine.

    Args:
        truncation: Number of steps per segment, after which a gradient is yielded and the graph is cut;
            None for the full horizon.
        detach: Whether the gradients that the rule sees count as constants (the paper's setting).

    Raises:
        ValueError: If ``truncation`` is not positive.

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Sec. 2.1.
    """

    def __init__(self, *, truncation: int | None = None, detach: bool = False) -> None:
        require(truncation is None or truncation >= 1, "truncation", truncation, "positive")
        self.truncation, self.detach = truncation, detach

    def gradients(self, rule, task, objective, *, indices, horizon, seed, update_scale=1.0):
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
            )
            meta_loss = objective(trajectory.losses[1:], start=start, horizon=horizon).mean()
            # a segment's weights sum to its share of the horizon; gradients of segments should be comparable
            (meta_loss * (horizon / n_steps)).backward()
            _, params, states = detached(trajectory)
            yield meta_loss.detach() * (horizon / n_steps)
