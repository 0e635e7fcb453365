"""Random least-squares problems: the seed project's first family of tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Batch, FixedBatchTask, Params
from .random import normal


class RandomQuadratic(FixedBatchTask):
    r"""Square linear least squares, a new matrix for each problem.

    .. math:: f(\theta) = \lVert W\theta - y \rVert^2, \qquad W_{ij}, y_i \sim N(0, 1), \quad \theta_0 = 0

    The data stay the same over a run. The minimum is 0, but reaching it takes long: the condition number of
    ``W`` is of the order of ``dim``, and that of the Hessian is its square.

    Args:
        dim: Number of coordinates, and of rows of ``W``.
        device: See :class:`Task`.
        dtype: See :class:`Task`.

    Raises:
        ValueError: If ``dim`` is not positive.

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Section 3.1.
    """

    def __init__(
        self, dim: int = 10, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if dim < 1:
            raise ValueError(f"Parameter `dim` should be positive. Found `dim = {dim}`.")
        super().__init__(device=device, dtype=dtype, dim=dim)
        self.dim = dim

    def init_params(self, indices: Tensor, seed: int) -> Params:
        """Start at zero: ``theta`` of shape ``(n_tasks, dim)``."""
        return {"theta": torch.zeros(len(indices), self.dim, device=self.device, dtype=self.dtype)}

    def draw(self, indices: Tensor, seed: int) -> Batch:
        """Draw ``W`` of shape ``(n_tasks, dim, dim)`` and ``y`` of shape ``(n_tasks, dim)``."""
        indices = self._indices(indices)
        W = normal(indices, (self.dim, self.dim), seed=seed, stream="quadratic/W", dtype=self.dtype)
        y = normal(indices, (self.dim,), seed=seed, stream="quadratic/y", dtype=self.dtype)
        return W, y

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Sum of squares of the residual, shape ``(n_tasks,)``; see :meth:`Task.loss`."""
        W, y = batch
        residual = torch.baddbmm(y.unsqueeze(-1), W, params["theta"].unsqueeze(-1), beta=-1)
        return residual.square().sum(dim=(1, 2))
