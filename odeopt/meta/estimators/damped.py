"""Backpropagation that is damped where the run is chaotic."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from odeopt.checks import is_list, is_number, require, require_counts, require_positive
from odeopt.meta.distributed import ALONE, World
from odeopt.meta.estimators.backpropagation import Backpropagation
from odeopt.meta.estimators.base import Estimator
from odeopt.rules.base import UpdateRule


@dataclass(frozen=True, kw_only=True)
class DampedBackpropagation(Estimator):
    r"""Backpropagation over the full horizon that is damped where the run is chaotic.

    The gradient of a loss with respect to an update :math:`k` steps earlier is multiplied by :math:`\gamma^k` (that of
    the last loss, after which no step begins, by :math:`\gamma^{k-1}`): a soft truncation after about :math:`1 / (1 -
    \gamma)` steps, of one gradient over all parts of the run. At the edge of stability, where good step sizes lie, the
    exact gradient grows without bound and says nothing; its short-sighted part still says which updates lower the
    losses soon after them, for every weight of the rule. So the dampings are tried in turn, from the least, until the
    gradient is no longer than ``threshold``; the last one counts whatever its length. A calm run of at most ``longest``
    steps keeps its exact gradient.

    It is short-sighted: on runs much longer than its window it may point the wrong way. And a run that overflows gives
    no gradient at all, so that nothing leads back from weights under which most do:
    :class:`~odeopt.meta.estimators.Hybrid` knows what to do.

    Args:
        dampings: Factors per step, falling; 1 is the exact gradient.
        threshold: Norm of a gradient up to which it counts.
        longest: Steps up to which the first damping is tried; longer runs begin with the second, if there is one.
        checkpoint_every: As that of :class:`~odeopt.meta.estimators.Backpropagation`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Metz et al. (2021), Gradients are not all you need: why the gradients of long runs explode.
    """

    key: ClassVar[str] = "damped"
    is_compilable: ClassVar[bool] = True

    dampings: tuple[float, ...] = (1.0, 0.95, 0.85)
    threshold: float = 5.0
    longest: int = 150
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        dampings = self.dampings
        is_right = is_list(dampings) and len(dampings) > 0 and all(is_number(x) and 0 < x <= 1 for x in dampings)
        is_falling = is_right and all(a > b for a, b in itertools.pairwise(dampings))
        require(is_falling, "dampings", dampings, "one falling number in (0, 1] or more")
        object.__setattr__(self, "dampings", tuple(dampings))
        require_positive(threshold=self.threshold)
        require_counts(longest=self.longest)
        self.attempts(1)  # which checks the option that they share

    def attempts(self, horizon: int) -> list[Backpropagation]:
        """Return the gradients that are worth trying on a run of this length: a long one leaves out the first."""
        dampings = self.dampings if horizon <= self.longest else self.dampings[1:]
        return [Backpropagation(checkpoint_every=self.checkpoint_every, damping=damping) for damping in dampings]

    def first_calm(
        self, attempts: list[Backpropagation], rule: UpdateRule, *args, world: World, **options
    ) -> tuple[Tensor | None, bool]:
        """Meta-loss of the first attempt whose gradient is short enough, or of the last one; and whether it is."""
        weights, meta_loss = [p for p in rule.parameters() if p.requires_grad], None
        for attempt in attempts:
            for p in weights:
                p.grad = None
            (meta_loss,) = attempt.gradients(rule, *args, world=world, **options)
            norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None]).item()
            if world.broadcast(norm) <= self.threshold:  # NaN is not below anything
                return meta_loss, True
        return meta_loss, False

    def gradients(self, rule, task, objective, *, horizon, world=ALONE, **options):
        attempts = self.attempts(horizon) or self.attempts(1)
        meta_loss, _ = self.first_calm(attempts, rule, task, objective, horizon=horizon, world=world, **options)
        yield meta_loss
