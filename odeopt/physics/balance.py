"""What an account of power holds."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PowerBalance(NamedTuple):
    r"""Balance of the power: ``energy_rate = -dissipated + supplied`` up to rounding.

    Attributes:
        energy_rate: :math:`\nabla H \cdot \dot x`, energy per unit time, shape ``(*batch,)``.
        dissipated: :math:`(\partial H/\partial p)^\top D\, \partial H/\partial p \ge 0`.
        supplied: :math:`u^\top y`, the power that enters through the ports.
        residual: ``energy_rate + dissipated - supplied``.
    """

    energy_rate: Tensor
    dissipated: Tensor
    supplied: Tensor
    residual: Tensor
