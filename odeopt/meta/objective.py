"""The meta-loss: what a rule is asked to make small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odeopt.rules.base import require

_WEIGHTS = ("uniform", "linear", "last")


@dataclass(frozen=True)
class MetaObjective:
    r"""Weighted sum of the losses along a run, or of their logarithms.

    .. math:: L = \sum_{t=1}^{T} w_t f_t(\theta_t) \quad\text{or}\quad \sum_t w_t \log(f_t(\theta_t) + \epsilon),
              \qquad \sum_t w_t = 1

    Args:
        weights: ``"uniform"``, ``"linear"`` (``w_t`` proportional to ``t``) or ``"last"``.
        log: Whether losses pass through a logarithm first, so that each task counts alike.
        eps: Added to the losses inside the logarithm, in units of the loss.

    Raises:
        ValueError: If ``weights`` is unknown or ``eps`` is not positive.

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Eq. (3).
    """

    weights: str = "linear"
    log: bool = True
    eps: float = 1e-8

    def __post_init__(self) -> None:
        require(self.weights in _WEIGHTS, "weights", self.weights, f"one of {', '.join(_WEIGHTS)}")
        require(self.eps > 0, "eps", self.eps, "positive")

    def __call__(self, losses: Tensor, *, start: int, horizon: int) -> Tensor:
        """Evaluate the part of the meta-loss that the steps ``start + 1 .. start + len(losses)`` contribute.

        Args:
            losses: Losses after those steps, shape ``(n_steps, n_tasks)``.
            start: Number of steps taken before the first of them.
            horizon: Length of the whole run, over which the weights sum to one.

        Returns:
            Meta-loss of each task, shape ``(n_tasks,)``.
        """
        t = torch.arange(1, horizon + 1, dtype=losses.dtype, device=losses.device)
        weights = {"uniform": torch.ones_like(t), "linear": t, "last": (t == horizon).to(t.dtype)}[self.weights]
        weights = (weights / weights.sum())[start : start + len(losses)]
        values = (losses + self.eps).log() if self.log else losses
        return (weights.unsqueeze(-1) * values).sum(0)
