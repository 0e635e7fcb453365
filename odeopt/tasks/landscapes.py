"""Analytic landscapes: a curved valley, and saddles to escape from."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from odeopt.checks import is_integer, require, require_flags, require_non_negative

from .base import Batch, DeclaredTask, FixedBatchTask, Params
from .random import normal, uniform


class Landscape(DeclaredTask, FixedBatchTask):
    """A function with a known minimum, of one parameter ``theta``; problems differ in where they start.

    Attributes:
        dim: Number of coordinates.
        minimum_value: Least value of the function.
    """

    dim: ClassVar[int]
    minimum_value: ClassVar[float]

    def draw(self, indices: Tensor, seed: int) -> Batch:
        """No data."""
        return ()


class Rosenbrock(Landscape):
    r"""Rosenbrock's valley, started uniformly in [-2, 2] x [-1, 3].

    .. math:: f(x, y) = (1 - x)^2 + 100\,(y - x^2)^2

    The minimum, 0, lies at (1, 1).

    References:
        Rosenbrock (1960), An automatic method for finding the greatest or least value of a function.
    """

    dim = 2
    minimum_value = 0.0

    def init_params(self, indices: Tensor, seed: int) -> Params:
        """Draw the starts; see :meth:`Task.init_params`."""
        u = uniform(self._indices(indices), (2,), seed=seed, stream="rosenbrock/start", dtype=self.dtype)
        corner = torch.tensor([-2.0, -1.0], device=self.device, dtype=self.dtype)
        return {"theta": 4 * u + corner}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Value of the function, shape ``(n_tasks,)``; see :meth:`Task.loss`."""
        x, y = params["theta"].unbind(-1)
        return (1 - x).square() + 100 * (y - x.square()).square()


@dataclass(eq=False, repr=False, kw_only=True)
class Saddle(Landscape):
    """A landscape with a saddle at the origin, started beside it in a random direction.

    Args:
        offset: Distance of the start from the saddle.
        device: See :class:`Task`.
        dtype: See :class:`Task`.

    Attributes:
        saddle_value: Value at the saddle.

    Raises:
        ValueError: If ``offset`` is negative.
    """

    saddle_value: ClassVar[float] = 0.0

    offset: float = 1e-3

    def __post_init__(self) -> None:
        require_non_negative(offset=self.offset)
        super().__post_init__()

    def init_params(self, indices: Tensor, seed: int) -> Params:
        """Draw starts at the distance ``offset`` from the saddle; see :meth:`Task.init_params`."""
        direction = _unit_vectors(self._indices(indices), self.dim, seed, "saddle/start", self.dtype)
        return {"theta": self.offset * direction}

    @property
    def escape_value(self) -> float:
        """Value below which the saddle counts as left: a tenth of the way from it down to the minimum."""
        return self.saddle_value + 0.1 * (self.minimum_value - self.saddle_value)

    def escape_step(self, losses: Tensor) -> Tensor:
        """First step at which the loss has fallen below :attr:`escape_value`.

        Args:
            losses: Loss after 0, 1, 2, ... steps along the first axis, shape ``(n_losses, *batch)``.

        Returns:
            int64, shape ``batch``; ``n_losses`` where it never falls so far (or is not a number).

        Raises:
            ValueError: If ``losses`` has no axis.
        """
        require(losses.ndim > 0, "losses", losses, "a tensor with an axis of steps")
        return ((losses < self.escape_value).cumsum(0) == 0).sum(0)


class MonkeySaddle(Saddle):
    r"""Three valleys that meet at a degenerate saddle: both eigenvalues of its Hessian are zero.

    .. math:: f(x, y) = x^3 - 3 x y^2 + \tfrac14 (x^2 + y^2)^2 = r^3 \cos 3\varphi + \tfrac14 r^4

    The minima, -27/4, lie at r = 3 where cos 3 phi = -1.
    """

    dim = 2
    minimum_value = -6.75

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Value of the function, shape ``(n_tasks,)``; see :meth:`Task.loss`."""
        x, y = params["theta"].unbind(-1)
        return x * (x.square() - 3 * y.square()) + (x.square() + y.square()).square() / 4


@dataclass(eq=False, repr=False)
class HighDimSaddle(Saddle):
    r"""A bowl in every direction but one, v, in which it descends until the quartic holds it.

    .. math:: f(\theta) = \tfrac12 \lVert\theta\rVert^2 - s^2 + \tfrac14 s^4, \qquad s = v^\top\theta

    The Hessian at the saddle has one eigenvalue -1 and ``dim - 1`` eigenvalues 1. The minima, -1/4, lie at v
    and -v.

    Args:
        dim: Number of coordinates.
        rotated: Whether v is a random direction, another one for each problem, rather than the last axis. On
            the axis, a rule that works coordinate by coordinate meets a problem in one dimension.
        offset: Distance of the start from the saddle.
        device: See :class:`Task`.
        dtype: See :class:`Task`.

    Raises:
        ValueError: If ``dim`` is below 2, which leaves no saddle, or ``offset`` negative.
    """

    minimum_value = -0.25

    dim: int = 100
    _: KW_ONLY
    rotated: bool = False

    def __post_init__(self) -> None:
        require(is_integer(self.dim) and self.dim >= 2, "dim", self.dim, "an integer of at least 2")
        require_flags(rotated=self.rotated)
        super().__post_init__()

    def draw(self, indices: Tensor, seed: int) -> Batch:
        """The descending direction v of each problem, shape ``(n_tasks, dim)``."""
        if self.rotated:
            return (_unit_vectors(self._indices(indices), self.dim, seed, "saddle/axis", self.dtype),)
        v = torch.zeros(len(indices), self.dim, device=self.device, dtype=self.dtype)
        v[:, -1] = 1
        return (v,)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Value of the function, shape ``(n_tasks,)``; see :meth:`Task.loss`."""
        theta, (v,) = params["theta"], batch
        s = (v * theta).sum(-1).square()
        return theta.square().sum(-1) / 2 - s + s.square() / 4


def _unit_vectors(indices: Tensor, dim: int, seed: int, stream: str, dtype: torch.dtype) -> Tensor:
    """Directions, uniform on the sphere, shape (n_tasks, dim)."""
    z = normal(indices, (dim,), seed=seed, stream=stream, dtype=dtype)
    return z / z.norm(dim=-1, keepdim=True)
