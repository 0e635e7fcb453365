"""The meta-loss, which training makes small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odeopt.checks import is_number, require, require_one_of, require_positive

_WEIGHTS = ("uniform", "linear", "late", "last")
_CEILING = 10.0  # of relative losses


@dataclass(frozen=True)
class MetaObjective:
    r"""Weighted sum of the losses along a run, or of their logarithms.

    .. math:: L = \sum_{t=1}^{T} w_t f_t(\theta_t) \quad\text{or}\quad \sum_t w_t \log(f_t(\theta_t) + \epsilon),
              \qquad \sum_t w_t = 1

    Args:
        weights: ``"uniform"``, ``"linear"`` (``w_t`` proportional to ``t``), ``"late"`` (half linear, half uniform over
            the last tenth) or ``"last"``.
        log: Whether losses pass through a logarithm first, so that each task counts alike; for losses above zero.
        eps: Added to the losses inside the logarithm, in units of the loss.
        relative: Whether losses are divided by the first loss of their run, and count at most ten then; for losses that
            begin above zero.
        held_out: Share of the loss on batches that the run does not train on in each loss.

    Raises:
        ValueError: If ``weights`` is unknown, ``log`` or ``relative`` no truth value, ``eps`` not positive, or
            ``held_out`` not in [0, 1].

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Eq. (3).
    """

    weights: str = "linear"
    log: bool = True
    eps: float = 1e-8
    relative: bool = False
    held_out: float = 0.0

    def __post_init__(self) -> None:
        require_one_of(_WEIGHTS, weights=self.weights)
        for name in ("log", "relative"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        require_positive(eps=self.eps)
        is_share = is_number(self.held_out) and 0 <= self.held_out <= 1
        require(is_share, "held_out", self.held_out, "a number in [0, 1]")

    def __call__(self, losses: Tensor, *, start: int, horizon: int, first: Tensor | None = None) -> Tensor:
        """Evaluate the part of the meta-loss that the steps ``start + 1 .. start + len(losses)`` contribute.

        Args:
            losses: Losses after those steps, shape ``(n_steps, n_tasks)``.
            start: Number of steps taken before the first of them.
            horizon: Length of the whole run, over which the weights sum to one.
            first: Loss before the first step of the run, shape ``(n_tasks,)``; needed where losses are relative.

        Returns:
            Meta-loss of each task, shape ``(n_tasks,)``.

        Raises:
            ValueError: If a loss is negative where it may not be: ``log`` and ``relative`` would turn its sign.
        """
        t = torch.arange(1, horizon + 1, dtype=losses.dtype, device=losses.device)
        is_late = (t > horizon - max(1, horizon // 10)).to(t.dtype)
        weights = {
            "uniform": torch.ones_like(t),
            "linear": t,
            "late": t / t.sum() + is_late / is_late.sum(),
            "last": (t == horizon).to(t.dtype),
        }[self.weights]
        if self.relative:
            _refuse_negative(first, "relative")
            losses = losses / first
            losses = torch.where(losses <= _CEILING, losses, _CEILING)  # NaN is not below anything
        weights = (weights / weights.sum())[start : start + len(losses)]
        if self.log:
            _refuse_negative(losses + self.eps, "log")
            losses = (losses + self.eps).log()
        return (weights.unsqueeze(-1) * losses).sum(0)


def _refuse_negative(losses: Tensor, name: str) -> None:
    """Refuse negative losses, which an option does not suit; one that is not a number has failed in other ways."""
    if (losses < 0).any():
        least = losses.detach().min().item()
        require(False, name, True, f"False where losses are negative, here {least:.4g}")
