"""The LSTM rule of Andrychowicz et al. (2016)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from odeopt.rules.base import UpdateRule, is_integer, is_number, require
from odeopt.rules.features import log_sign


class LSTMState(NamedTuple):
    """Hidden and cell states of both layers, each ``(*batch, n, hidden_size)``."""

    h1: Tensor
    c1: Tensor
    h2: Tensor
    c2: Tensor


class LSTMUpdate(UpdateRule):
    r"""Two LSTM cells per coordinate, their weights shared by all coordinates.

    .. math:: (h_t, c_t) = \mathrm{LSTM}^2(\nabla_t, h_{t-1}, c_{t-1}), \qquad
              \Delta_t = s\,(w^\top h_t^{(2)} + b)

    With the paper's sizes it has 5,221 parameters, or 5,301 with preprocessing.

    Args:
        preprocess: Whether the gradient passes through :func:`odeopt.rules.features.log_sign` (factor 10).
        hidden_size: Width of each cell; the paper's 20.
        output_scale: The factor :math:`s` on the update, in units of the parameter. It belongs to the
            trained weights: the rule is not the same rule under another scale.

    Raises:
        ValueError: If a size or the scale is not positive.

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Sec. 2.1, App. A.
    """

    def __init__(self, *, preprocess: bool = False, hidden_size: int = 20, output_scale: float = 0.1) -> None:
        require(is_integer(hidden_size) and hidden_size > 0, "hidden_size", hidden_size, "a positive integer")
        require(is_number(output_scale) and output_scale > 0, "output_scale", output_scale, "a positive number")
        super().__init__(preprocess=preprocess, hidden_size=hidden_size, output_scale=output_scale)
        self.preprocess, self.hidden_size, self.output_scale = preprocess, hidden_size, output_scale
        self.cell1 = nn.LSTMCell(2 if preprocess else 1, hidden_size)
        self.cell2 = nn.LSTMCell(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, 1)

    def init_state(self, param: Tensor) -> LSTMState:
        zeros = torch.zeros((*param.shape, self.hidden_size), dtype=self.output.weight.dtype, device=param.device)
        return LSTMState(zeros, zeros, zeros, zeros)

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        x = log_sign(grad) if self.preprocess else grad.unsqueeze(-1)
        # nn.LSTMCell takes one batch axis
        flat = LSTMState(*(s.reshape(-1, self.hidden_size) for s in state))
        h1, c1 = self.cell1(x.reshape(-1, x.shape[-1]).to(flat.h1.dtype), (flat.h1, flat.c1))
        h2, c2 = self.cell2(h1, (flat.h2, flat.c2))
        update = self.output_scale * self.output(h2).reshape(grad.shape).to(grad.dtype)
        return update, LSTMState(*(s.reshape(*grad.shape, self.hidden_size) for s in (h1, c1, h2, c2)))
