"""Signals of the rule: scale-free moments of the gradient, features of a tensor's shape, and the length of the run."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_LARGEST_RATIO = 1e18  # whose square is a number in float32; step.c has the same


class Observation(NamedTuple):
    """One gradient, normalised, each field of shape ``(*batch, n)``."""

    u: Tensor  # port effort
    second_moment: Tensor  # by which coordinates are compared; the present square where no running one is kept
    is_tensor_wide: bool = False  # whether the effort is normalised by the tensor alone


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
    decay = torch.as_tensor(decay, dtype=step.dtype, device=step.device)
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


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Fan-in and fan-out as torch.nn.init counts them; one and the size for biases."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    receptive_field = math.prod(shape[2:])
    return shape[1] * receptive_field, shape[0] * receptive_field


class ShapeFeatures(NamedTuple):
    """Numbers that follow from the shape of a tensor: columns of shape ``(*batch, k)``, or the numbers themselves."""

    size: Tensor | float
    shrink: Tensor | float  # a power of two under the inverse of the size: what is summed cannot overflow
    kappa_factor: Tensor | float  # on the first step size
    theta_factor: Tensor | float  # on the mean square of the parameter, one over that of a common start
    step_rms: Tensor | float  # of a matrix's step of step size one; one where there is none
    signals: Tensor | tuple[float, ...]  # three of order one

    @classmethod
    def split(cls, features: Tensor) -> ShapeFeatures:
        """Split the features of :meth:`PortHamiltonianUpdate.features`, shape ``(*batch, 8)``, into fields."""
        return cls(*features.split((1, 1, 1, 1, 1, 3), dim=-1))

    def joined(self) -> tuple[float, ...]:
        """Join the numbers into one tuple, in the order that :meth:`split` reads."""
        return *self[:-1], *self.signals

    def of_size(self, n: int) -> ShapeFeatures:
        """The same features of a tensor of ``n`` coordinates, such as one of several blocks of the shape."""
        return self._replace(size=n, shrink=0.5 ** n.bit_length())


def fan_features(shape: tuple[int, ...]) -> ShapeFeatures:
    """Features of a shape whose signals are the logarithms of fan-in and fan-out, and whether it is a bias."""
    fan_in, fan_out = _fans(shape)
    signals = math.log(fan_in) / 5, math.log(fan_out) / 5, float(len(shape) < 2)
    return _features(shape, fan_in, 1.0, signals)


def transferring_features(shape: tuple[int, ...], *, is_table: bool) -> ShapeFeatures:
    """Features of a shape whose signals do not grow with the width.

    Nothing that is learned at some widths extends to others, so a network sees the aspect of a matrix, bounded, and
    whether the tensor is a vector or a table. The rows of a table are looked up, not multiplied: their fan-in is one.
    Parameters are seen in units of a common initialisation, whose size falls with the fan-in.
    """
    is_matrix = len(shape) >= 2 and not is_table
    fan_in = math.prod(shape[1:]) if is_matrix else 1
    aspect = math.tanh(math.log(shape[0] / fan_in) / 4) if is_matrix else 0.0
    return _features(shape, fan_in, fan_in, (aspect, float(len(shape) < 2), float(is_table)))


def _features(shape: tuple[int, ...], fan_in: int, theta_factor: float, signals: tuple[float, ...]) -> ShapeFeatures:
    n = math.prod(shape)
    return ShapeFeatures(n, 0.5 ** n.bit_length(), fan_in**-0.25, theta_factor, 1.0, signals)


def shape_features(rule, shape: tuple[int, ...], n_blocks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Features of so many blocks of a shape under a rule, as a tensor."""
    numbers = rule.features(shape, n_blocks)
    # what is made under a mode may be of it: a fake tensor, kept, would reach the steps that come after
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return torch.tensor(numbers, dtype=dtype, device=device)
    return _kept_features(numbers, dtype, device)


@lru_cache(maxsize=1024)
def _kept_features(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers on their device, kept: making them anew would wait for the device at every step."""
    with torch.inference_mode(False):  # a tensor of inference mode could not be saved for autograd later
        return torch.tensor(numbers, dtype=dtype, device=device)


def run_length(step: Tensor, progress: Tensor) -> Tensor:
    """Length of the run, in steps; not a number before the second one, when nothing tells it yet."""
    return (step - 1).clamp(min=1) / torch.where(progress > 0, progress, math.nan)


def length_signal(length: Tensor) -> Tensor:
    """Bounded signal of :func:`run_length`: zero at 100 steps, and while it is not known."""
    return torch.tanh((length / 100).log() / 4).nan_to_num(0.0)
