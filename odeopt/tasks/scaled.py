"""A task in other units of its loss and of its parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from odeopt.checks import check_class, require_non_negative, require_positive

from .base import Batch, Params, Task
from .random import uniform


class ScaledTask(Task):
    r"""A task in other units of the loss and of the parameters, from a start that is farther from zero or nearer to it.

    .. math:: f_t(\phi) = a\,\tilde f_t(e^{s_1}\phi_1, e^{s_2}\phi_2, \dots), \qquad \phi_0 = b\,e^{-s}\tilde\theta_0,
              \quad s_k \sim U(-r, r)

    Each parameter tensor of each problem has a unit of its own. A rule whose steps have a length of their own (Adam's,
    say) meets steps that are up to :math:`e^r` times too long or too short, by tensor; so does a network whose
    initialisation is larger or smaller than usual.

    Args:
        task: The task.
        loss_scale: The factor :math:`a` on the loss, positive.
        init_scale: The factor :math:`b` on every initial parameter, positive.
        log_range: The range :math:`r` of the units, at least 0.

    Raises:
        ValueError: If a factor is not a positive number, or ``log_range`` is negative.

    Example:
        >>> from odeopt.tasks import RandomQuadratic
        >>> task = ScaledTask(RandomQuadratic(dim=5), loss_scale=1e3, log_range=1.0)
        >>> task.init_params(torch.arange(4), seed=0)["theta"].shape
        torch.Size([4, 5])
    """

    def __init__(self, task: Task, *, loss_scale: float = 1.0, init_scale: float = 1.0, log_range: float = 0.0) -> None:
        check_class("task", task, Task)
        require_positive(loss_scale=loss_scale, init_scale=init_scale)
        require_non_negative(log_range=log_range)
        config = {"loss_scale": loss_scale, "init_scale": init_scale, "log_range": log_range}
        super().__init__(device=task.device, dtype=task.dtype, **config, of=task.describe())
        self.task, self.loss_scale, self.init_scale, self.log_range = task, loss_scale, init_scale, log_range
        self.tables, self._n_tensors = task.tables, len(task.param_shapes)
        # units of a task that is scaled already are drawn apart from its own
        self._stream = f"{task._stream}/again" if isinstance(task, ScaledTask) else "rescaled/factors"

    @property
    def param_shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter of one problem, by name."""
        return self.task.param_shapes

    def init_params(self, indices: Tensor, seed: int) -> Params:
        """Start at a multiple of the task's start, in the new units; see :meth:`Task.init_params`."""
        params = self.task.init_params(indices, seed)
        units = _by_tensor(self._units(indices, seed), params)
        return {name: self.init_scale * param / units[name] for name, param in params.items()}

    def sample_batch(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Return the units, ``(n_tasks, n_tensors)``, and the batch of the task; see :meth:`Task.sample_batch`."""
        return self._units(indices, seed), *self.task.sample_batch(indices, step, seed)

    def sample_held_out(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Return the units and a held-out batch of the task; see :meth:`Task.sample_held_out`."""
        return self._units(indices, seed), *self.task.sample_held_out(indices, step, seed)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Evaluate the task in its own units, and multiply; see :meth:`Task.loss`."""
        units, *batch = batch
        if self.log_range > 0:
            units = _by_tensor(units, params)
            params = {name: param * units[name] for name, param in params.items()}
        return self.loss_scale * self.task.loss(params, tuple(batch))

    def _units(self, indices: Tensor, seed: int) -> Tensor:
        shape = (self._n_tensors,)
        u = uniform(self._indices(indices), shape, seed=seed, stream=self._stream, dtype=self.dtype)
        return (self.log_range * (2 * u - 1)).exp()


def _by_tensor(units: Tensor, params: Params) -> Params:
    """The unit of each parameter, one number per problem, ready to multiply it."""
    return {name: units[:, k].view(-1, *(1,) * (param.dim() - 1)) for k, (name, param) in enumerate(params.items())}
