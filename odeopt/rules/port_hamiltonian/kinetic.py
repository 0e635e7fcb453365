"""Kinetic energies of the rule's modes: of coordinates, and of matrices, whose step sizes are operator norms.

A matrix may consist of several blocks of rows, such as query, key and value, or the gates of a recurrent layer. Its
energy is the sum of those of its blocks then, whose shape the functions are given.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from odeopt.physics import (
    MUON_COEFFICIENTS,
    SHORT_COEFFICIENTS,
    PowerBalance,
    QuadraticEnergy,
    RelativisticEnergy,
    SpectralEnergy,
    frobenius_norm,
    newton_schulz,
)

CoordinateEnergy = QuadraticEnergy | RelativisticEnergy

_SMALL_ROW = 1e-4  # mean square of a row's momenta, over that of all, below which rows are not told apart


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Tell matrices (out, rest), which multiply inputs and are stepped as a whole, from one row that is added."""
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


def step_rms(shape: tuple[int, ...], kind: str = "transfer") -> float:
    """Root mean square of the entries of a step of :func:`operator_scale`, all singular values of which are alike."""
    out, rest = shape[0], math.prod(shape[1:])
    return operator_scale(shape, kind) * math.sqrt(min(out, rest) / (out * rest))


def as_matrix(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Flat momenta or efforts of a tensor as its blocks, ``(*batch, n)`` to ``(*batch, n_blocks, out, rest)``."""
    return x.unflatten(-1, (-1, shape[0], math.prod(shape[1:])))


def spectral_energy(polynomial: str) -> SpectralEnergy:
    """Make the energy of the rule's option ``matrix_polynomial``."""
    coefficients = SHORT_COEFFICIENTS if polynomial == "short" else MUON_COEFFICIENTS
    return SpectralEnergy(coefficients, learned=polynomial == "learned")


def held_norm(*momenta: Tensor) -> Tensor:
    """Norm that a step holds: the largest one of the momenta in it, of each block."""
    return functools.reduce(torch.maximum, map(frobenius_norm, momenta))


def spectral_velocity(
    energy: SpectralEnergy, x: Tensor, shape: tuple[int, ...], *others: Tensor, products: str = "full"
) -> Tensor:
    """Velocity of a spectral energy at ``x``, flat as it comes.

    Args:
        energy: The energy.
        x: Momenta, shape ``(*batch, n)``.
        shape: Shape of the parameter tensor, or of each of its blocks.
        others: Further momenta of the step, which the held norm bounds as well; without any the norm is that of ``x``,
            and the result is the orthogonalised matrix, but not the gradient of an energy.
        products: Precision of the products: ``"full"``, ``"bfloat16"`` or ``"auto"``, as ``matrix_products`` of the
            rule.
    """
    matrix, *others = (as_matrix(x, shape) for x in (x, *others))
    norm = held_norm(matrix, *others) if others else None
    is_narrow = products == "bfloat16" or (products == "auto" and x.is_cuda and x.dtype == torch.float32)
    dtype = torch.bfloat16 if is_narrow else None
    return newton_schulz(matrix, norm, energy.coefficients, dtype=dtype).flatten(-3)


def coherence(p: Tensor, u: Tensor, friction: Tensor, gain: Tensor) -> Tensor:
    """Momenta over what they would be if all efforts had been like the present one, in (0, 1], per mode.

    Gradients that agree give one, pure noise sqrt(friction / (2 - friction)). It is held over the step, as a factor of
    the energy, which is an energy again. The mean magnitude of efforts is one, so a gradient that vanishes for a moment
    does not count as disagreement of those before it.
    """
    rms = (p.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    effort = u.square().mean(-1, keepdim=True).clamp(min=1.0).sqrt()
    return (rms * friction / (gain * effort)).clamp(max=1.0)


def row_gains(p: Tensor, shape: tuple[int, ...], power: float, *, is_transposed: bool = False) -> Tensor:
    r"""Port gains of the rows of a matrix (out, rest), which fall with the rows' momenta.

    .. math:: d_i \propto (\rho_i + 10^{-4})^{-\text{power} / 2}, \qquad \rho_i = m\, |P_i|^2 / \textstyle\sum_j |P_j|^2

    for the m rows :math:`P_i`. The mean square of the gains of rows that have a momentum is one. A gain depends on the
    state and not on the effort, so that effort and output can share it.

    Args:
        p: Momenta of all modes that share the gains, shape ``(*batch, modes, n)``.
        shape: Shape of the parameter tensor, or of each of its blocks.
        power: The power, in [0, 1].
        is_transposed: Whether the matrix is stored (in, out), so that its columns are meant.

    Returns:
        Gain of each coordinate's row, shape ``(*batch, n)``.
    """
    matrices, along = as_matrix(p, shape), -2 if is_transposed else -1
    squares = matrices.square().sum((-4, along))
    mean = squares.mean(-1, keepdim=True)
    ratio = torch.where(mean > 0, squares / torch.where(mean > 0, mean, 1.0), 1.0)
    gains, weight = (ratio + _SMALL_ROW).pow(-power / 2), ratio / (ratio + _SMALL_ROW)
    gains = gains * (weight.sum(-1, keepdim=True) / (weight * gains.square()).sum(-1, keepdim=True)).sqrt()
    return gains.unsqueeze(along).expand(matrices[..., 0, :, :, :].shape).flatten(-3)


def coordinate_energy(p: Tensor, energies: Mapping[int, CoordinateEnergy]) -> Tensor:
    """Energies of coordinates, summed over modes, shape ``(*batch, n)``.

    Args:
        p: Momenta, shape ``(*batch, modes, n)``.
        energies: Energies of the modes that count, by number.
    """
    return sum((energy.energy(p[..., k, :]) for k, energy in energies.items()), torch.zeros_like(p[..., 0, :]))


def coordinate_balance(
    p: Tensor, u: Tensor, friction: Tensor, gain: Tensor, energies: Mapping[int, CoordinateEnergy]
) -> PowerBalance:
    """Account of the modes of :func:`coordinate_energy`, summed over them, each field ``(*batch, n)``."""
    velocity = torch.stack([energy.velocity(p[..., k, :]) for k, energy in energies.items()], dim=-2)
    p, friction, gain = (x[..., list(energies), :] for x in (p, friction, gain))
    rate, dissipated = velocity * (gain * u - friction * p), velocity * friction * p
    rate, dissipated, supplied = (x.sum(-2) for x in (rate, dissipated, u * gain * velocity))
    return PowerBalance(rate, dissipated, supplied, rate + dissipated - supplied)
