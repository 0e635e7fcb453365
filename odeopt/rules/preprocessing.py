"""Preprocessing of raw gradients: by logarithm and sign, and by running moments that any scale leaves exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGEST_RATIO = 1e18  # whose square is a number in float32; step.c has the same


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


def averaging_weight(step: Tensor, decay: Tensor | float) -> Tensor:
    r"""Weight of the newest value in a bias-corrected exponential average.

    With :math:`w_t = (1 - \beta) / (1 - \beta^t)` the recursion
    :math:`\hat v_t = (1 - w_t)\,\hat v_{t-1} + w_t x_t` holds the corrected average itself; :math:`w_1 = 1`.

    Args:
        step: Number of values seen, the newest included; at least 1.
        decay: :math:`\beta` in ``[0, 1)``; several of them as a tensor that broadcasts against ``step``.

    Returns:
        The weight, of the broadcast shape.
    """
    # no copy from the host, which no CUDA graph would capture
    decay = decay.to(step) if isinstance(decay, Tensor) else step.new_full((), decay)
    # expm1: in float32, 1 - beta ** t loses digits where beta is close to one
    return (decay - 1) / torch.expm1(step * decay.log())


def running_scale(mean_abs: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Running mean magnitude of a tensor's gradient, in units of which its coordinates keep their squares.

    Multiplying every gradient by a power of two changes nothing but the scale, to the bit: division by the
    scale comes first and squares after, so that nothing overflows, underflows or meets an absolute eps.

    .. math:: a_t = (1 - w) a_{t-1} + w \overline{|g|}, \quad n_t = g_t / a_t, \quad
              v_t = (1 - w) (a_{t-1} / a_t)^2\, v_{t-1} + w\, n_t^2

    The ratio :math:`a_{t-1} / a_t` is at most :math:`1 / (1 - w)`; it is held below an overflow for w near 1.

    Args:
        mean_abs: Mean magnitude of the gradient over the tensor, shape ``(*batch, 1)``.
        scale: :math:`a_{t-1}`, shape ``(*batch, k)``, over ``k`` lengths of memory; zero before the first step.
        weight: :math:`w_t` of :func:`averaging_weight`, shape ``(*batch, k)``.

    Returns:
        :math:`a_t`; the divisor of the gradient, :math:`a_t` or one where that is zero; and the factor on
        :math:`v_{t-1}`. Each of shape ``(*batch, k)``.
    """
    keep = 1 - weight
    new_scale = keep * scale + weight * mean_abs
    divisor = torch.where(new_scale > 0, new_scale, 1.0)
    return new_scale, divisor, keep * (scale / divisor).clamp(max=_LARGEST_RATIO).square()


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
