"""Matrices as the rule steps them: by spectral energies, with step sizes that are operator norms."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from odeopt.physics import PowerBalance, SpectralEnergy, frobenius_norm, newton_schulz, spectral_power_balance

_MUON = SpectralEnergy()


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a tensor is stepped as a matrix (out, rest): what multiplies inputs, not one row that is added."""
    return math.prod(shape) > 1 and (len(shape) == 2 or (len(shape) > 2 and shape[0] > 1))


def operator_scale(shape: tuple[int, ...], kind: str = "transfer") -> float:
    """Operator norm of the step of a matrix (out, rest), in units of that of a square one.

    Args:
        shape: Shape of the parameter tensor.
        kind: ``"transfer"`` for sqrt(out / rest), with which a step changes the output of a layer alike at any width;
            ``"muon"`` for sqrt(max(1, out / rest)), as in ``torch.optim.Muon``.

    References:
        Yang, Simon, Bernstein (2023), A spectral condition for feature learning, Condition 1.
    """
    aspect = shape[0] / math.prod(shape[1:])
    return math.sqrt(aspect if kind == "transfer" else max(1.0, aspect))


def velocity(x: Tensor, shape: tuple[int, ...], *others: Tensor) -> Tensor:
    """Velocity of a spectral energy at ``x``, flat as it comes.

    Args:
        x: Momenta, shape ``(*batch, n)``.
        shape: Shape of the parameter tensor.
        others: Further momenta of the step, which the held norm bounds as well; without any the norm is that of ``x``,
            and the result is the orthogonalised matrix, but not the gradient of an energy.
    """
    matrix = _as_matrix(x, shape)
    return newton_schulz(matrix, _held_norm(shape, x, *others) if others else None).flatten(-2)


def energy(p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Spectral energy of momenta ``(*batch, n)`` in units of their own norm, shape ``(*batch,)``."""
    return _MUON.energy(_as_matrix(p, shape), _held_norm(shape, p))


def power_balance(
    p: Tensor, u: Tensor, friction: Tensor, gain: Tensor, shape: tuple[int, ...], *others: Tensor
) -> PowerBalance:
    """Account of a spectral mode at the start of a step, each field of shape ``(*batch,)``; as :func:`velocity`."""
    norm = _held_norm(shape, p, *others)
    return spectral_power_balance(_as_matrix(p, shape), _as_matrix(u, shape), friction, gain, _MUON, norm)


def _as_matrix(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.unflatten(-1, (shape[0], -1))


def _held_norm(shape: tuple[int, ...], *momenta: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, (frobenius_norm(_as_matrix(x, shape)) for x in momenta))
