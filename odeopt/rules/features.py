"""What rules compute from raw gradients: log-sign preprocessing and scale-free moments."""

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


def averaging_weight(step: Tensor, decay: float) -> Tensor:
    r"""Weight of the newest value in a bias-corrected exponential average.

    With :math:`w_t = (1 - \beta) / (1 - \beta^t)` the recursion
    :math:`\hat v_t = (1 - w_t)\,\hat v_{t-1} + w_t x_t` holds the corrected average itself; :math:`w_1 = 1`.

    Args:
        step: Number of values seen, the newest included; at least 1.
        decay: :math:`\beta` in ``[0, 1)``.

    Returns:
        The weight, with the shape of ``step``.
    """
    if decay == 0:
        return torch.ones_like(step)
    # expm1: in float32, 1 - beta ** t loses digits where beta is close to one
    return (decay - 1) / torch.expm1(step * math.log(decay))


def relative_moments(
    grad: Tensor, mean_abs: Tensor, scale: Tensor, square_avg: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradient and its running square in units of the tensor's running mean magnitude.

    Multiplying every gradient by a power of two changes nothing but ``scale``, to the bit: division by
    the scale comes first and squares after, so that nothing overflows, underflows or meets an absolute eps.

    .. math:: a_t = (1 - w) a_{t-1} + w \overline{|g|}, \quad n_t = g_t / a_t, \quad
              v_t = (1 - w) v_{t-1} (a_{t-1} / a_t)^2 + w\, n_t^2

    The ratio :math:`a_{t-1} / a_t` is at most :math:`1 / (1 - w)`, so it cannot overflow.

    Args:
        grad: Gradient, shape ``(*batch, n)``.
        mean_abs: Mean of its magnitude over the tensor, shape ``(*batch, 1)``.
        scale: :math:`a_{t-1}`, shape ``(*batch, 1)``; zero before the first step.
        square_avg: :math:`v_{t-1}`, in units of :math:`a_{t-1}^2`, shape ``(*batch, n)``.
        weight: :math:`w_t` of :func:`averaging_weight`, shape ``(*batch, 1)``.

    Returns:
        ``(n_t, a_t, v_t)``. A tensor whose gradients have all been zero gives zeros.
    """
    new_scale = (1 - weight) * scale + weight * mean_abs
    divisor = torch.where(new_scale > 0, new_scale, 1.0)
    relative = grad / divisor
    carried = (1 - weight) * (scale / divisor).square()
    return relative, new_scale, carried * square_avg + weight * relative.square()


def coordinate_rms(grad: Tensor, rms: Tensor, weight: Tensor) -> Tensor:
    r"""Running rms of each coordinate by itself, exact under powers of two and never under- or overflowing.

    .. math:: r_t = m \sqrt{(1 - w) (r_{t-1} / m)^2 + w (g_t / m)^2}, \qquad m = \max(|g_t|, r_{t-1})

    Args:
        grad: Gradient, shape ``(*batch, n)``.
        rms: :math:`r_{t-1}`, shape ``(*batch, n)``.
        weight: :math:`w_t` of :func:`averaging_weight`, shape ``(*batch, 1)``.

    Returns:
        :math:`r_t`; zero, with a zero derivative, where gradient and history are zero.
    """
    # the value does not depend on m, so m carries no derivative
    largest = torch.maximum(grad.abs(), rms).detach()
    is_zero = largest == 0
    divisor = torch.where(is_zero, 1.0, largest)
    mean_square = (1 - weight) * (rms / divisor).square() + weight * (grad / divisor).square()
    return largest * torch.where(is_zero, 1.0, mean_square).sqrt()
