"""Signals of the rule: the normalised gradient, features of a tensor's shape, and the length of the run."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


class Observation(NamedTuple):
    """One gradient, normalised, each field of shape ``(*batch, n)``."""

    u: Tensor  # port effort
    second_moment: Tensor  # by which coordinates are compared; the present square where no running one is kept
    is_tensor_wide: bool = False  # whether the effort is normalised by the tensor alone


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
