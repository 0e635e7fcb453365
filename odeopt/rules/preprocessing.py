"""Preprocessing of raw gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_sign(x: Tensor, factor: float = 10.0) -> Tensor:
    r"""Split numbers of any magnitude into two bounded channels.

    .. math:: x \mapsto \begin{cases} (\log|x| / p,\ \operatorname{sgn} x) & |x| \ge e^{-p} \\
              (-1,\ e^p x) & \text{otherwise} \end{cases}

    Args:
        x: Any shape.
        factor: The paper's :math:`p`; magnitudes under :math:`e^{-p}` become linear.

    Returns:
        Shape ``(*x.shape, 2)``; the channels are log magnitude and sign.

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Appendix A.
    """
    threshold = math.exp(-factor)
    magnitude = x.abs()
    is_large = magnitude >= threshold
    # the clamp keeps the unused branch of `where` from sending NaN derivatives back at zero
    logarithm = torch.where(is_large, magnitude.clamp(min=threshold).log() / factor, -1.0)
    sign = torch.where(is_large, x.sign(), x * math.exp(factor))
    return torch.stack((logarithm, sign), dim=-1)
