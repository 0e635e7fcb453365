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
    if isinstance(task, Mixture):
        return _mixture_score(rule, task, indices=indices, seed=seed, held_out=held_out, world=world)
    indices, n_last = indices[world.share(len(indices))], max(1, horizon // 10)
    if len(indices) > 0:
        options = {"n_steps": horizon, "seed": seed, "total_steps": horizon, "held_out": held_out}
        trajectory = unroll(rule, task, indices=indices, **options)
        losses = trajectory.losses[-n_last:]
    else:  # more ranks than tasks
        losses = torch.zeros(n_last, 0, dtype=task.dtype, device=task.device)
    score = world.gather(losses.mT).mT.mean().item()
    return score if score == score else float("inf")


def _mixture_score(
    rule: UpdateRule, mixture: Mixture, *, indices: Tensor, seed: int, held_out: float, world: World
) -> float:
    scores = []
    for number in indices[world.share(len(indices))].tolist():
        task, problems, horizon, _ = mixture.draw(number, seed)
        options = {"n_steps": horizon, "seed": seed, "total_steps": horizon, "held_out": held_out}
        losses = unroll(rule, task, indices=problems, **options).losses
        last = losses[-max(1, horizon // 10) :].mean(0)
        ratio = last / losses[0] + _LEAST
        if (torch.stack((losses[0], ratio)) < 0).any():
            raise ValueError(
                "Parameter `task` should have losses above zero: validation of a mixture compares their logarithms. "
                f"Found {losses[0].tolist()} at the start and {last.tolist()} at the end, of {task!r}."
            )
        scores.append(ratio.log().mean().double())
    scores = torch.stack(scores) if scores else torch.zeros(0, dtype=torch.float64, device=mixture.device)
    score = world.gather(scores).mean().item()
    return score if score == score else float("inf")
