"""Validation scores, by which weights are chosen: losses at the end of full runs on tasks that are never trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from odeopt.meta.distributed import ALONE, World
from odeopt.meta.unroll import unroll
from odeopt.rules.base import UpdateRule
from odeopt.tasks import Mixture, Task

_LEAST = 1e-3  # under a loss that is compared with the first one by its logarithm


@torch.no_grad()
def validation_score(
    rule: UpdateRule,
    task: Task | Mixture,
    *,
    indices: Tensor,
    horizon: int,
    seed: int,
    held_out: float = 0.0,
    world: World = ALONE,
) -> float:
    """Mean loss over the tasks and the last tenth of the full horizon; infinite where a run diverged.

    With a mixture the mean over draws of the logarithm of that loss over the first one of the run.
    """

    def losses_of(task: Task, indices: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
        """Losses at the start of a run, and those over the last tenth of its horizon."""
        options = {"n_steps": horizon, "seed": seed, "total_steps": horizon, "held_out": held_out}
        losses = unroll(rule, task, indices=indices, **options).losses
        return losses[0], losses[-max(1, horizon // 10) :]

    indices = indices[world.share(len(indices))]
    if isinstance(task, Mixture):
        draws = (task.draw(number, seed) for number in indices.tolist())
        scores = [_log_ratio(draw.task, *losses_of(draw.task, draw.indices, draw.horizon)) for draw in draws]
        scores = torch.stack(scores) if scores else torch.zeros(0, dtype=torch.float64, device=task.device)
    elif len(indices) > 0:
        scores = losses_of(task, indices, horizon)[1].mT
    else:  # more ranks than tasks
        scores = torch.zeros(0, max(1, horizon // 10), dtype=task.dtype, device=task.device)
    score = world.gather(scores).mean().item()
    return score if score == score else float("inf")


def _log_ratio(task: Task, first: Tensor, last: Tensor) -> Tensor:
    """Mean logarithm of the last losses over the first ones of the runs of a draw."""
    last = last.mean(0)
    ratio = last / first + _LEAST
    if (torch.stack((first, ratio)) < 0).any():
        raise ValueError(
            "Parameter `task` should have losses above zero: validation of a mixture compares their logarithms. "
            f"Found {first.tolist()} at the start and {last.tolist()} at the end, of {task!r}."
        )
    return ratio.log().mean().double()
