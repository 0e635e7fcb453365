"""Coefficients that a tensor's network emits once per step, and that its coordinates share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from odeopt.physics import mlp

_HELD_GROWTH = 1.5  # of the decay, before gradients have become small
_LEAST_OF_LONG_RUNS = 0.7  # of the decay: with less, examples are learned by heart
_REFERENCE, _SHORTEST, _ANYTIME = 500, 30, 100  # steps: of runs of factor one, of any run, of runs of unknown length


class Shared(NamedTuple):
    """Numbers that the coordinates of a tensor share over one step, each field of shape ``(*batch, k)``."""

    step: Tensor
    weight: Tensor  # of the newest gradient in the running moments
    scale: Tensor
    slow_scale: Tensor
    divisor: Tensor  # the scale, one where it is zero
    carried: Tensor  # weight of the running square, in the new units
    magnitudes: Tensor  # logs of the tensor's mean magnitude over its two running values
    per_mode: Tensor | None = None  # log gain, its slope, four numbers for the friction; those that there are
    kappa: Tensor | None = None
    memory: Tensor | None = None  # of the network, after the step
    matrix_kappa: Tensor | None = None  # step size of a square matrix where it moves, as an operator norm
    lookahead: Tensor | None = None  # evaluation point of the velocity of a matrix, in steps from the start
    coherence: Tensor | None = None  # power of the coherence of a matrix's momenta in the size of its step
    matrix_decay: Tensor | None = None  # decoupled decay of a matrix, per unit of its kappa
    log_rms: Tensor | None = None  # log rms of the tensor, which coordinates are compared with

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """Numbers that the state holds once per tensor after the step, in its order."""
        return self.scale, self.slow_scale, self.step, self.memory


class Outputs(NamedTuple):
    """Outputs of the network of a tensor, in their order, each of shape ``(*batch, k)``; or the numbers of them, k.

    A rule without a schedule or without spectral energies has none of the outputs for them: k is zero.
    """

    per_mode: Tensor | int
    log_kappa: Tensor | int
    memory_moves: Tensor | int  # through tanh, in units of the memory's rate
    log_exponent: Tensor | int  # of the schedule
    log_matrix_kappa: Tensor | int
    log_lookahead: Tensor | int
    log_matrix_decay: Tensor | int
    log_coherence: Tensor | int


def network_from_zero(n_inputs: int, n_outputs: int, widths: Sequence[int]) -> nn.Sequential:
    """Build a network that gives zeros until it is trained, so that the rule is the heavy-ball start."""
    network = mlp(n_inputs, n_outputs, widths=widths)
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    return network


def power_schedule(progress: Tensor, log_exponent: Tensor) -> Tensor:
    """Power of the remaining fraction of the run."""
    # the last step has some of the run before it, so the fraction is zero only beyond the end
    return ((1 - progress).clamp(min=1e-6).log() * log_exponent.exp()).exp()


def depth_factor(n_matrices: int, power: float) -> float:
    """Factor on the steps of each of ``n_matrices`` matrices in a network, by which they fall with the depth."""
    return (4 / (min(max(n_matrices, 1.25), 5) - 1)) ** power


def decay_growth(scale: Tensor, slow_scale: Tensor, bound: float, onset: float) -> Tensor:
    """Factor on the decay where gradients have become small, of their long-run magnitude over the present one.

    It is that ratio, between 1 and ``bound``, but held at 1.5 until the ratio comes to ``onset``; from there on it
    catches up with the square.
    """
    present = torch.maximum(scale, slow_scale / (bound * onset))
    ratio = slow_scale / torch.where(present > 0, present, 1.0)
    held = _HELD_GROWTH * (ratio / onset).clamp(min=1.0).square()
    return torch.minimum(ratio, held).clamp(1.0, bound)


def aligned_move(alignment: Tensor) -> Tensor:
    """Move of a log step size, up where gradients point along the momenta, down where each step overshoots.

    Between -.5 and .2 it is zero: there, at the edge of stability and where noise prevails, are the best step sizes.
    """
    return (alignment - 0.2).clamp(min=0) - (-alignment - 0.5).clamp(min=0)


def trust(mean_square: Tensor, step_rms: Tensor, ratio: float) -> Tensor:
    """Factor on steps of a matrix, between .1 and 1, by which their rms is at most ``ratio`` times that of the matrix.

    Args:
        mean_square: Mean square of the matrix's entries, shape ``(*batch, 1)``.
        step_rms: Root mean square of its step, likewise.
        ratio: Bound of the step, relative to the matrix.
    """
    return (ratio * (mean_square + 1e-12).sqrt() / step_rms).clamp(min=0.1, max=1.0)


def horizon_factor(step: Tensor, length: Tensor | None, power: float) -> Tensor:
    """Factor on step sizes by which they fall with the length of the run, if that is told, as ``power`` says."""
    if length is None:
        return 0.5 * (step.clamp(min=_ANYTIME) / _REFERENCE).pow(-power)
    # a tensor that got its first gradient in the midst of a run takes it for a shorter one, which is bounded
    return (length.clamp(min=_SHORTEST) / _REFERENCE).pow(-power).nan_to_num(1.0)


def long_run_factor(length: Tensor, horizon: float, power: float) -> Tensor:
    """Factor on the decay by which it falls with the length of a run, beyond ``horizon`` steps, to .7 and no less."""
    return (length / horizon).clamp(min=1).pow(-power).clamp(min=_LEAST_OF_LONG_RUNS).nan_to_num(1.0)
