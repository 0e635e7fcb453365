"""Coordinates of a mechanical system, each of them on a line or on a circle."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from odeopt.checks import require


class Coordinates(nn.Module):
    r"""Kinds of the positions, on a line or angles, and the features by which networks and observers see them.

    A system is integrated in the angle itself, so that it cannot leave the circle; what reads positions sees angles as
    :math:`(\cos q, \sin q)`, so that it has their period. Derivatives by q are the chain rule's.

    Args:
        kinds: One letter for each degree of freedom: ``"R"`` on a line, ``"S"`` on a circle.

    Raises:
        ValueError: If ``kinds`` holds other letters, or none.

    Example:
        >>> Coordinates("RS")(torch.tensor([2.0, 0.0]))
        tensor([2., 1., 0.])
    """

    def __init__(self, kinds: str) -> None:
        super().__init__()
        is_right = isinstance(kinds, str) and kinds != "" and set(kinds) <= set("RS")
        require(is_right, "coordinates", kinds, "a letter R or S for each degree of freedom")
        self.kinds = kinds
        lines, circles = ([i for i, kind in enumerate(kinds) if kind == wanted] for wanted in "RS")
        self.n_lines, self.n_circles = len(lines), len(circles)
        order = torch.tensor(lines + circles)
        self.register_buffer("_order", order, persistent=False)
        self.register_buffer("_back", order.argsort(), persistent=False)
        self.register_buffer("_is_circle", torch.tensor([kind == "S" for kind in kinds]), persistent=False)
        self._is_sorted = lines + circles == list(range(len(kinds)))

    @property
    def dof(self) -> int:
        """Number of degrees of freedom."""
        return len(self.kinds)

    @property
    def n_features(self) -> int:
        """Numbers by which positions are seen: one for each line, two for each circle."""
        return self.n_lines + 2 * self.n_circles

    def forward(self, q: Tensor) -> Tensor:
        """Positions as they are seen.

        Args:
            q: Positions, shape ``(*batch, dof)``.

        Returns:
            Those on lines, then the cosines and then the sines of the angles, shape ``(*batch, n_features)``.
        """
        if not self.n_circles:
            return q
        if not self._is_sorted:
            q = q.index_select(-1, self._order)
        line, angle = q[..., : self.n_lines], q[..., self.n_lines :]
        return torch.cat((line, angle.cos(), angle.sin()), dim=-1)

    def positions(self, features: Tensor) -> Tensor:
        """Positions that are seen so; angles in [-pi, pi], whatever the distance of the cosine and sine to the circle.

        Args:
            features: Shape ``(*batch, n_features)``.

        Returns:
            Shape ``(*batch, dof)``.
        """
        line, cos, sin = features.split((self.n_lines, self.n_circles, self.n_circles), dim=-1)
        q = torch.cat((line, torch.atan2(sin, cos)), dim=-1)
        return q if self._is_sorted else q.index_select(-1, self._back)

    def shortest(self, difference: Tensor) -> Tensor:
        """Differences of positions, those of angles modulo 2 pi: the shortest way round.

        Args:
            difference: Shape ``(*batch, dof)``.

        Returns:
            Shape ``(*batch, dof)``; on circles in [-pi, pi], on lines as given. The derivative is one.
        """
        turns = (difference / (2 * math.pi)).round()
        return torch.where(self._is_circle, difference - 2 * math.pi * turns, difference)

    def drift(self, features: Tensor) -> float:
        r"""Largest :math:`|\cos^2 + \sin^2 - 1|`: how far off the circles it is; 0 where there are none.

        Args:
            features: Shape ``(*batch, n_features)``, or longer in the last axis, as observations are.

        Returns:
            The drift; NaN where a number is not finite.
        """
        if not self.n_circles:
            return 0.0
        seen = features[..., self.n_lines : self.n_features]
        return (seen.unflatten(-1, (2, -1)).square().sum(-2) - 1).abs().max().item()

    def extra_repr(self) -> str:
        return repr(self.kinds)
