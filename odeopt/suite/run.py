"""One run of a problem: a plain training loop around any optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from odeopt.suite.problems import Problem, to_device

_LAST = 0.05  # of the losses, whose mean judges a run
_N_NORM_BATCHES = 50  # that refresh the statistics of BatchNorm for averaged weights, as Schedule-Free asks for


class Steps(Protocol):
    """The part of an optimizer that a training loop uses."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def step(self) -> object:
        """Move the parameters."""


MakeOptimizer = Callable[[nn.Module, int], Steps]  # of a model, and the number of steps of the run


class Run(NamedTuple):
    """Losses and time of a run.

    Attributes:
        losses: Training loss of each step's batch before its update, float64, shape ``(n_steps,)``; infinite from the
            first on that is not finite, where the run stopped.
        held_out: Loss on the held-out examples after the last step; infinite if a run stopped.
        seconds: Time of the loop, without the held-out loss. On a CPU it is processor time, of all threads, which does
            not depend on what else the machine does.
    """

    losses: Tensor
    held_out: float
    seconds: float

    @property
    def train(self) -> float:
        """Mean of the last twentieth of the training losses."""
        return smoothed(self.losses)[-1].item()


def run(problem: Problem, make_optimizer: MakeOptimizer, seed: int, *, device: torch.device | str = "cpu") -> Run:
    """Train a problem's network once, as a user would.

    Runs of one seed have the same initial weights and the same batches, whatever the optimizer.

    Args:
        problem: The problem.
        make_optimizer: Builds the optimizer from the model and the number of steps. A schedule is a hook of its steps.
            An optimizer that has ``train`` and ``eval`` is put into either mode, as Schedule-Free asks for.
        seed: Seed of the initial weights and of the batches.
        device: Where to train.

    Returns:
        Losses and time.
    """
    model = problem.make_model(seed).to(device).train()
    optimizer = make_optimizer(model, problem.n_steps)
    _set_mode(optimizer, "train")
    losses = torch.full((problem.n_steps,), math.inf, dtype=torch.float64)
    clock = time.process_time if torch.device(device).type == "cpu" else time.perf_counter
    began = clock()
    for step in range(problem.n_steps):
        loss = problem.loss(model, to_device(problem.batch(step, seed), device))
        value = loss.item()
        if not math.isfinite(value):
            return Run(losses, math.inf, clock() - began)
        losses[step] = value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = clock() - began
    if _set_mode(optimizer, "eval"):
        _refresh_norms(problem, model, seed, device)
    held_out = problem.held_out_loss(model, seed, device)
    return Run(losses, held_out if math.isfinite(held_out) else math.inf, seconds)


def smoothed(losses: Tensor) -> Tensor:
    """Average each loss with those before it, as many as a twentieth of the run.

    Args:
        losses: Shape ``(n_steps,)``.

    Returns:
        The means, of the same shape; near the start of fewer losses, those that there are.
    """
    # no differences of running sums: a loss that once was huge would be missing from all that follow
    n = max(1, int(_LAST * len(losses)))
    first = [losses[:end].mean() for end in range(1, n)]
    return torch.cat((losses.new_tensor(first), losses.unfold(0, n, 1).mean(-1)))


def _set_mode(optimizer: Steps, mode: str) -> bool:
    """Call ``optimizer.train()`` or ``optimizer.eval()`` where there is one, and averages of the weights to show."""
    has_averages = getattr(optimizer, "averaging", True) is not None
    method = getattr(optimizer, mode, None) if has_averages else None
    if method is not None:
        method()
    return method is not None


@torch.no_grad()
def _refresh_norms(problem: Problem, model: nn.Module, seed: int, device: torch.device | str) -> None:
    """Let BatchNorm see batches under the weights that are evaluated, which are not those that were trained."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        for step in range(max(0, problem.n_steps - _N_NORM_BATCHES), problem.n_steps):
            model(*to_device(problem.batch(step, seed), device).inputs)
