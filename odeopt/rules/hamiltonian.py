"""The algebraic Hamiltonian rule of the student project that odeopt grew out of ("the seed")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from odeopt.checks import require_flags, require_positive
from odeopt.rules.base import UpdateRule, per_coordinate
from odeopt.rules.preprocessing import log_sign


class HamiltonianState(NamedTuple):
    """The carried scalar velocity, shape ``(*batch, n)``; zero before the first step."""

    velocity: Tensor


def _two_layers(n_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_channels, n_channels), nn.ReLU(), nn.Linear(n_channels, n_channels))


class HamiltonianUpdate(UpdateRule):
    r"""One algebraic pass through the expressions of a Hamiltonian system; no ODE is solved.

    Per coordinate, with channels :math:`q` (the gradient) and :math:`w` (the carried velocity):

    .. math:: (D_q, D_p) = D(v(q), w), \qquad h = (w - D_q,\ (-v(q) - D_p + g(q))\,M), \qquad M = L L^\top

    The update is a bias-free linear map of (first half of :math:`h`, :math:`q`), the next velocity a linear
    map of :math:`h`. It has 19 parameters with one channel, 55 with the two of the log-sign map.

    Args:
        preprocess: Whether gradient and velocity pass through :func:`odeopt.rules.preprocessing.log_sign`,
            which makes two channels of each.
        normalize: Whether the next velocity is divided by its norm over the tensor (the seed does so on
            the quadratics and not on MNIST); a zero norm divides by one.
        output_scale: Factor on the update, in units of the parameter; part of the trained rule.

    Raises:
        ValueError: If ``output_scale`` is not positive.

    References:
        Zhong, Dey, Chakraborty (2020), Dissipative SymODEN, whose matrices' names the seed borrows.
    """

    starts_at_zero = True

    def __init__(self, *, preprocess: bool = False, normalize: bool = False, output_scale: float = 0.1) -> None:
        require_flags(preprocess=preprocess, normalize=normalize)
        require_positive(output_scale=output_scale)
        super().__init__(preprocess=preprocess, normalize=normalize, output_scale=output_scale)
        self.preprocess, self.output_scale = preprocess, output_scale
        self.crosses_coordinates = self.normalize = normalize
        n_channels = 2 if preprocess else 1
        self.g = _two_layers(n_channels)
        self.v = _two_layers(n_channels)
        self.D = nn.Linear(2 * n_channels, 2 * n_channels, bias=False)
        self.L = nn.Linear(n_channels, n_channels)  # only the weight enters; the seed counts the bias too
        self.update_map = nn.Linear(2 * n_channels, 1, bias=False)
        self.velocity_map = nn.Linear(2 * n_channels, 1)

    def init_state(self, param: Tensor) -> HamiltonianState:
        return HamiltonianState(per_coordinate(param))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        channels = (log_sign(x) if self.preprocess else x.unsqueeze(-1) for x in (grad, state.velocity))
        q, w = (x.to(self.D.weight.dtype) for x in channels)
        v = self.v(q)
        D_q, D_p = self.D(torch.cat((v, w), dim=-1)).chunk(2, dim=-1)
        M = self.L.weight @ self.L.weight.T
        h_q, h_p = w - D_q, (-v - D_p + self.g(q)) @ M
        update = self.output_scale * self.update_map(torch.cat((h_q, q), dim=-1)).squeeze(-1)
        velocity = self.velocity_map(torch.cat((h_q, h_p), dim=-1)).squeeze(-1)
        if self.normalize:
            square = velocity.square().sum(-1, keepdim=True)
            velocity = velocity / torch.where(square > 0, square, 1.0).sqrt()
        return update.to(grad.dtype), HamiltonianState(velocity.to(state.velocity.dtype))
