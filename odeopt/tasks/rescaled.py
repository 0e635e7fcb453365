"""Other parametrisations of a task."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from odeopt.checks import is_number, require

from .base import Batch, Params, Task
from .random import uniform


class Rescaled(Task):
    r"""A task in other units: each parameter tensor is multiplied by a factor of its own, new for each problem.

    .. math:: f_t(\phi) = \tilde f_t(e^{s_1}\phi_1, e^{s_2}\phi_2, \dots), \qquad \phi_0 = e^{-s}\theta_0, \quad
              s_k \sim U(-r, r)

    A rule whose steps have a length of their own (Adam's, say) meets steps that are up to :math:`e^r` times too long
    or too short, by tensor; so does a network whose initialisation is larger or smaller than usual.

    Args:
        task: The task.
        log_range: The range :math:`r`, positive.

    Raises:
        ValueError: If ``log_range`` is out of range.
    """

    def __init__(self, task: Task, log_range: float = 1.0) -> None:
        require(is_number(log_range) and log_range > 0, "log_range", log_range, "a positive number")
        super().__init__(device=task.device, dtype=task.dtype, log_range=log_range, of=task.describe())
        self.task, self.log_range, self.tables = task, log_range, task.tables

    @property
    def param_shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter of one problem, by name."""
        return self.task.param_shapes

    def init_params(self, indices: Tensor, seed: int) -> Params:
        """Start where the task does, in the new units; see :meth:`Task.init_params`."""
        params = self.task.init_params(indices, seed)
        factors = self._factors(indices, seed)
        return {name: param / _like(factors[:, k], param) for k, (name, param) in enumerate(params.items())}

    def sample_batch(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Return the factors, ``(n_tasks, n_tensors)``, and the batch of the task; see :meth:`Task.sample_batch`."""
        return self._factors(indices, seed), *self.task.sample_batch(indices, step, seed)

    def sample_held_out(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Return the factors and a held-out batch of the task; see :meth:`Task.sample_held_out`."""
        return self._factors(indices, seed), *self.task.sample_held_out(indices, step, seed)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Evaluate the task in its own units; see :meth:`Task.loss`."""
        factors, *batch = batch
        params = {name: param * _like(factors[:, k], param) for k, (name, param) in enumerate(params.items())}
        return self.task.loss(params, tuple(batch))

    def to(self, device: torch.device | str) -> Self:
        """Move the task, in place; see :meth:`Task.to`."""
        self.task.to(device)
        return super().to(device)

    def _factors(self, indices: Tensor, seed: int) -> Tensor:
        n = len(self.param_shapes)
        u = uniform(self._indices(indices), (n,), seed=seed, stream="rescaled/factors", dtype=self.dtype)
        return (self.log_range * (2 * u - 1)).exp()


def _like(factor: Tensor, param: Tensor) -> Tensor:
    """One number per problem, ready to multiply a parameter."""
    return factor.view(-1, *(1,) * (param.dim() - 1))
