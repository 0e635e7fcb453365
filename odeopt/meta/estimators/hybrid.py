"""Backpropagation where the run is calm, evolution strategies where it is not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from odeopt.checks import require, require_positive
from odeopt.meta.distributed import ALONE
from odeopt.meta.estimators.damped import DampedBackpropagation
from odeopt.meta.estimators.es import EvolutionStrategies


@dataclass(frozen=True, kw_only=True)
class Hybrid(DampedBackpropagation):
    r"""Backpropagation where the run is calm, evolution strategies where it is not.

    At the edge of stability, where good step sizes lie, the exact gradient of a long run grows without bound and says
    nothing. If such runs were left out, training would only ever lengthen the steps, as all others ask for. So such a
    run is done again under perturbed weights, whose losses do say which way is back. Of several ranks the first does
    that, on its first task, which is the first of the whole batch, and tells the others; they wait. In between,
    gradients can be tried that are damped, as by :class:`~odeopt.meta.estimators.DampedBackpropagation`. Much damping
    is short-sighted, and on long runs it points the wrong way as often as not; what is chaotic under little of it is
    better left to the perturbations.

    Args:
        evolution: Evaluates the rest, on the first task of the batch only.
        threshold: Norm of a gradient up to which it counts.
        longest: Steps up to which the first damping is tried; longer runs begin with the second, or go to the
            perturbations at once if there is none.
        dampings: Factors per step, falling; 1 is the exact gradient.
        checkpoint_every: As that of :class:`~odeopt.meta.estimators.Backpropagation`.
        coordinates: Coordinates times perturbations at a time, of which there are fewer for larger tasks (two pairs at
            least).

    Raises:
        ValueError: If an argument is out of range.

    References:
        Metz et al. (2019), Understanding and correcting pathologies in the training of learned optimizers, Sec. 4:
        a combination of the two estimators, weighted by their variances.
    """

    key: ClassVar[str] = "hybrid"
    is_compilable: ClassVar[bool] = False

    evolution: EvolutionStrategies = field(default_factory=EvolutionStrategies)
    dampings: tuple[float, ...] = (1.0,)
    coordinates: float = 1.5e5

    def __post_init__(self) -> None:
        super().__post_init__()
        is_evolution = isinstance(self.evolution, EvolutionStrategies)
        require(is_evolution, "evolution", self.evolution, "evolution strategies")
        require_positive(coordinates=self.coordinates)

    def gradients(self, rule, task, objective, *, indices, world=ALONE, **options):
        attempts = self.attempts(options["horizon"])
        meta_loss, is_calm = self.first_calm(attempts, rule, task, objective, indices=indices, world=world, **options)
        if is_calm:
            yield meta_loss
            return
        weights = [p for p in rule.parameters() if p.requires_grad]
        rule.zero_grad()
        n, n_pairs = sum(shape.numel() for shape in task.param_shapes.values()), self.evolution.n_pairs
        while n_pairs > 2 and 2 * n_pairs * n > self.coordinates:
            n_pairs = max(2, n_pairs // 2)

        def perturbations() -> tuple[Tensor, list[Tensor | None]]:
            fewer = replace(self.evolution, n_pairs=n_pairs)
            (meta_loss,) = fewer.gradients(rule, task, objective, indices=indices[:1], **options)
            # where every rank can receive them
            return meta_loss.cpu(), [None if p.grad is None else p.grad.cpu() for p in weights]

        meta_loss, grads = world.broadcast_result(perturbations)
        for p, grad in zip(weights, grads, strict=True):
            p.grad = None if grad is None else grad.to(p.device)
        yield meta_loss.to(task.device)
