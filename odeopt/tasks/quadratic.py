"""Random quadratics: the seed project's least squares, and quadratics of a given spectrum under noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odeopt.checks import is_number, require, require_counts

from .base import Batch, DeclaredTask, FixedBatchTask, Params
from .random import normal, uniform


@dataclass(eq=False, repr=False)
class _Quadratic(DeclaredTask, FixedBatchTask):
    """Problems of so many coordinates, which start at zero."""

    dim: int = 10

    def __post_init__(self) -> None:
        require_counts(dim=self.dim)
        super().__post_init__()

    def init_params(self, indices: Tensor, seed: int) -> Params:
        """Start at zero: ``theta`` of shape ``(n_tasks, dim)``."""
        return {"theta": torch.zeros(len(indices), self.dim, device=self.device, dtype=self.dtype)}


class RandomQuadratic(_Quadratic):
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


@dataclass(eq=False, repr=False)
class NoisyQuadratic(_Quadratic):
    r"""Quadratics whose eigenvalues spread over a given range, and whose minimum shakes from step to step.

    .. math:: f_t(\theta) = \tfrac12 (\theta - \theta_* - \sigma \varepsilon_t)^\top Q \Lambda Q^\top
              (\theta - \theta_* - \sigma \varepsilon_t), \qquad \ln \lambda_i \sim U(-\ln c, 0), \quad
              \theta_{*i}, \varepsilon_{ti} \sim N(0, 1), \quad \theta_0 = 0

    ``Q`` is a random rotation. With the Hessian :math:`H = Q \Lambda Q^\top` the noise of the gradient,
    :math:`-\sigma H \varepsilon_t`, has covariance :math:`\sigma^2 H^2` everywhere: largest where the curvature is, and
    quieter in flat directions than noise of covariance proportional to :math:`H`, which stands for that of minibatches.

    Args:
        dim: Number of coordinates.
        condition: The range :math:`c` of the eigenvalues, at least 1.
        noise: Standard deviation :math:`\sigma` of the minimum, 0 for none.
        device: See :class:`Task`.
        dtype: See :class:`Task`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Wu et al. (2018), Understanding short-horizon bias in stochastic meta-optimization, Section 2: a quadratic whose
        minimum is drawn anew at every step.
        Zhang et al. (2019), Which algorithmic choices matter at which batch sizes? Insights from a noisy quadratic
        model, Section 3: another model, whose gradients have the Hessian itself for covariance.
    """

    condition: float = 100.0
    noise: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("condition", 1), ("noise", 0)):
            value = getattr(self, name)
            require(is_number(value) and value >= least, name, value, f"a finite number of at least {least}")
        super().__post_init__()

    def draw(self, indices: Tensor, seed: int) -> Batch:
        r"""Draw ``A`` with :math:`A^\top A = Q \Lambda Q^\top`, ``(n_tasks, dim, dim)``, and the minimum."""
        indices, shape = self._indices(indices), (self.dim, self.dim)
        rotation, _ = torch.linalg.qr(normal(indices, shape, seed=seed, stream="noisy/Q", dtype=torch.float64))
        u = uniform(indices, (self.dim, 1), seed=seed, stream="noisy/spectrum", dtype=torch.float64)
        A = self.condition ** (-0.5 * u) * rotation.mT
        minimum = normal(indices, (self.dim,), seed=seed, stream="noisy/minimum", dtype=self.dtype)
        # rounded, because powers of a batch may differ in their last bit from those of one number
        return A.float().to(self.dtype), minimum

    def sample_batch(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Return ``A`` and the shaken minimum of a step, ``(n_tasks, dim)``; see :meth:`Task.sample_batch`."""
        A, minimum = super().sample_batch(indices, step, seed)
        if self.noise == 0:
            return A, minimum
        indices = self._indices(indices)
        eps = normal(indices, (self.dim,), seed=seed, stream="noisy/noise", step=step, dtype=self.dtype)
        return A, minimum + self.noise * eps

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Half the squared distance in the metric of the Hessian, ``(n_tasks,)``; see :meth:`Task.loss`."""
        A, minimum = batch
        return 0.5 * torch.bmm(A, (params["theta"] - minimum).unsqueeze(-1)).square().sum(dim=(1, 2))
