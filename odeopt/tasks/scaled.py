"""A task whose loss and start are multiplied by constants."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from .base import Batch, Params, Task


class ScaledTask(Task):
    r"""A task in other units of the loss, from a start that is farther from zero or nearer to it.

    .. math:: f_t(\theta) = a\,\tilde f_t(\theta), \qquad \theta_0 = b\,\tilde\theta_0

    Args:
        task: The task.
        loss_scale: The factor :math:`a` on the loss, positive.
        init_scale: The factor :math:`b` on every initial parameter, positive.

    Raises:
        ValueError: If a factor is not a positive number.

    Example:
        >>> from odeopt.tasks import RandomQuadratic
        >>> task = ScaledTask(RandomQuadratic(dim=5), loss_scale=1e3, init_scale=0.1)
        >>> task.init_params(torch.arange(4), seed=0)["theta"].shape
        torch.Size([4, 5])
    """

    def __init__(self, task: Task, *, loss_scale: float = 1.0, init_scale: float = 1.0) -> None:
        for name, scale in (("loss_scale", loss_scale), ("init_scale", init_scale)):
            if not 0 < scale < float("inf"):
                raise ValueError(f"Parameter `{name}` should be a positive number. Found `{name} = {scale}`.")
        super().__init__(
            device=task.device, dtype=task.dtype, loss_scale=loss_scale, init_scale=init_scale, of=task.describe()
        )
        self.task, self.loss_scale, self.init_scale = task, loss_scale, init_scale
        self.tables = task.tables

    @property
    def param_shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter of one problem, by name."""
        return self.task.param_shapes

    def init_params(self, indices: Tensor, seed: int) -> Params:
        """Start at a multiple of the task's start; see :meth:`Task.init_params`."""
        return {name: self.init_scale * param for name, param in self.task.init_params(indices, seed).items()}

    def sample_batch(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Draw the batch of the task; see :meth:`Task.sample_batch`."""
        return self.task.sample_batch(indices, step, seed)

    def sample_held_out(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Draw a held-out batch of the task; see :meth:`Task.sample_held_out`."""
        return self.task.sample_held_out(indices, step, seed)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Evaluate the task, in the new units; see :meth:`Task.loss`."""
        return self.loss_scale * self.task.loss(params, batch)

    def to(self, device: torch.device | str) -> Self:
        """Move the task, in place; see :meth:`Task.to`."""
        self.task.to(device)
        return super().to(device)
