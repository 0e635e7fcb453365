"""Antithetic evolution strategies over the full horizon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from odeopt.checks import require, require_counts, require_positive
from odeopt.meta.distributed import ALONE
from odeopt.meta.estimators.base import Estimator
from odeopt.meta.estimators.perturbations import Noise, differences_of_pairs, perturbed
from odeopt.meta.unroll import unroll


@dataclass(frozen=True, kw_only=True)
class EvolutionStrategies(Estimator):
    r"""Antithetic evolution strategies over the full horizon: the gradient of a smoothed meta-loss, from losses alone.

    .. math:: \hat g = \frac{1}{n} \sum_{k=1}^{n} \frac{L(w + \sigma\epsilon_k) - L(w - \sigma\epsilon_k)}{2\sigma}\,
              \epsilon_k, \qquad \epsilon_k \sim N(0, I), \qquad
              \mathbb{E}\,\hat g = \nabla_w\, \mathbb{E}_\epsilon L(w + \sigma\epsilon)

    Nothing is differentiated through the run, so that chaos in it costs neither memory nor a meta-gradient of 1e8: the
    smoothing averages over what is finer than ``sigma``. Every perturbation meets the same tasks, initialisations and
    batches. A perturbation is a function of the seed, the first task of the batch, the number of its pair and the name
    of the weight, so each rank draws all of them by itself; it runs them on its own tasks, and what ranks exchange is
    one number per task and perturbation.

    A loss :math:`f_t` of a task counts at most as :math:`f_0 + c\,|f_0|`, and so does one that is not a number;
    :math:`c` is the ``ceiling``. So runs that diverge count with a bounded loss. Leaving them out would bias the
    estimate: the runs that go well know nothing of the cliff.

    Args:
        n_pairs: Number of antithetic pairs, so half that of perturbations.
        sigma: Standard deviation of the perturbations, the same for every weight, in the units of the
            weights: absolute, not relative to their size.
        chunk: Perturbations that are run at a time, which bounds the memory; None for all. With 1 each runs by itself
            and nothing is mapped by ``torch.func.vmap``, which is how a rule is run that vmap cannot take. Rules whose
            solver chooses its step sizes run so whatever is said here. Batches save overhead, so they help most where
            tasks are small (a fifth of the time of single runs on the quadratics); the LSTM on networks is fastest
            with 1, its gates staying in cache.
        ceiling: What a loss counts at most, as above.
        clip: What the meta-losses of a pair are taken to differ by at most, in units of the meta-loss; None for no
            limit. Beyond the edge of stability the difference says which way is back, its size says nothing.
        subspace: Beginning of the names of the weights that are perturbed; all by default. Fewer dimensions need
            fewer pairs; the other weights get no gradient.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Salimans et al. (2017), Evolution strategies as a scalable alternative to reinforcement learning, Sec. 2.1.
        Metz et al. (2019), Understanding and correcting pathologies in the training of learned optimizers, Sec. 3.
    """

    key: ClassVar[str] = "es"

    n_pairs: int = 16
    sigma: float = 0.01
    chunk: int | None = None
    ceiling: float = 10.0
    clip: float | None = None
    subspace: str = ""

    def __post_init__(self) -> None:
        require_counts(n_pairs=self.n_pairs)
        require_counts(chunk=self.chunk, or_none=True)
        require_positive(sigma=self.sigma, ceiling=self.ceiling)
        require_positive(clip=self.clip, or_none=True)
        require(isinstance(self.subspace, str), "subspace", self.subspace, "the beginning of a name")

    def gradients(self, rule, task, objective, *, indices, horizon, seed, update_scale=1.0, tells_horizon=True,
                  world=ALONE):  # fmt: skip
        weights = {name: p for name, p in rule.named_parameters() if p.requires_grad and name.startswith(self.subspace)}
        require(len(weights) > 0, "subspace", self.subspace, "the beginning of the name of a weight of the rule")
        noise = Noise(weights, seed, world.broadcast(int(indices[0])))
        n_runs = 2 * self.n_pairs  # w + sigma eps and w - sigma eps of a pair come one after the other
        # an adaptive solver would choose its steps for all perturbations together
        length = min(self.chunk or n_runs, n_runs) if rule.has_fixed_step else 1
        options = {"n_steps": horizon, "seed": seed, "total_steps": horizon if tells_horizon else None}
        options |= {"update_scale": update_scale, "held_out": objective.held_out}
        losses = []
        for start in range(0, n_runs, length):
            runs = range(start, min(start + length, n_runs))
            stacked = perturbed(rule, noise.perturbed(runs, self.sigma))
            with torch.no_grad():
                run = unroll(stacked, task, indices=indices.repeat(len(runs)), **options)
            first = run.losses[0]
            meta_losses = objective(bounded(run.losses[1:], first, self.ceiling), start=0, horizon=horizon, first=first)
            losses.append(meta_losses.view(len(runs), len(indices)).mT)
        # in double precision: what follows are small differences
        losses = world.gather(torch.cat(losses, dim=1).double())
        slopes = differences_of_pairs(losses, self.clip).mean(0) / (2 * self.sigma)
        for name, grad in noise.combined(slopes / self.n_pairs, max(1, length // 2)).items():
            weights[name].grad = grad
        yield losses.mean().to(task.dtype)


def bounded(losses: Tensor, first: Tensor, ceiling: float) -> Tensor:
    """Losses that count at most as the first one of their run plus ``ceiling`` times its size.

    Args:
        losses: Shape ``(n_steps, n_tasks)``; numbers that are not one count as infinite.
        first: Shape ``(n_tasks,)``.
        ceiling: The factor.

    Returns:
        Shape ``(n_steps, n_tasks)``.
    """
    highest = first + ceiling * first.abs()
    return torch.where(losses <= highest, losses, highest)  # NaN is not below anything
