r"""Kinetic energies K of a momentum, and the velocities dK/dP that they give.

The kinetic energy is the part of a port-Hamiltonian system that tells the great optimizers apart: with the
momentum damped linearly and the output :math:`y = g\, \partial K/\partial p`, the quadratic energy is heavy
ball, the relativistic one has sign momentum as its limit, and the spectral one is orthogonalised momentum (Muon).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from odeopt.checks import is_integer, is_list, is_number, require
from odeopt.physics.balance import PowerBalance

MUON_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5
SHORT_COEFFICIENTS = (  # found by a search for the widest range that three factors bring into a band like Muon's
    (6.4761, -15.6172, 9.5324),
    (3.8149, -3.6818, 0.9363),
    (2.5583, -2.2193, 0.5943),
)

Coefficients = Sequence[Sequence[float]] | Tensor

# The learned |b| stays below 2 sqrt(a c) by this factor, which leaves room for the rounding of a + b s^2 + c s^4.
_MARGIN = 1 - 2.0**-10


def frobenius_norm(x: Tensor) -> Tensor:
    """Frobenius norm of matrices, with zero as the derivative at zero and no overflow of the squares.

    Args:
        x: Matrices, shape ``(*batch, m, n)``.

    Returns:
        Norms, shape ``(*batch,)``.

    Raises:
        ValueError: If ``x`` is not a floating-point tensor of at least two axes.
    """
    _check_matrices("x", x)
    _, scale, norm = _scale_and_norm(x)
    return (torch.where(scale.isinf(), 0.0, scale) * norm).squeeze((-2, -1))


def newton_schulz(
    x: Tensor,
    norm: Tensor | None = None,
    coefficients: Coefficients = MUON_COEFFICIENTS,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Apply odd polynomials to the singular values of matrices, by matrix products only.

    .. math:: X_0 = x / \text{norm}, \qquad X_{k+1} = a_k X_k + (b_k A + c_k A A)\, X_k, \qquad A = X_k X_k^\top

    Each factor maps :math:`U \Sigma V^\top` to :math:`U (a \Sigma + b \Sigma^3 + c \Sigma^5) V^\top`. With the
    coefficients of Muon the singular values between .002 and 1 end between .68 and 1.21; with the short ones those
    between .0111 and 1.1 end between .65 and 1.13.

    A matrix whose norm is zero gives zeros, with zero derivatives; on a CPU, where no gradient is recorded, entries
    below 1e-15 of the norm count as zero. Without ``norm`` the result does not change,
    to the bit, when ``x`` is multiplied by a power of two.

    Args:
        x: Matrices, shape ``(*batch, m, n)``, of any floating-point type, which the result keeps.
        norm: Bound of the singular values that divides ``x``, shape ``(*batch,)`` or ``(*batch, 1, 1)``. It is
            a constant beside ``x``, so the result is a gradient with respect to ``x`` (:class:`SpectralEnergy`).
            None for the Frobenius norm of ``x``, with which the result is not a gradient.
        coefficients: One triple (a, b, c) for each factor, in the order of application: numbers, or a tensor
            of shape ``(n_factors, 3)``.
        dtype: Type of the products; None for that of ``x``.

    Returns:
        Matrices of the shape and type of ``x``.

    Raises:
        ValueError: If ``x`` is not a floating-point tensor of at least two axes, ``norm`` or
            ``coefficients`` does not have the right shape, or ``dtype`` is no floating-point type.

    References:
        Jordan et al. (2024), Muon: An optimizer for hidden layers in neural networks.
    """
    _check_matrices("x", x)
    _check_coefficients(coefficients)
    own_dtype, dtype = x.dtype, x.dtype if dtype is None else dtype
    is_type = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    require(is_type, "dtype", dtype, "a floating-point type, or None")
    if norm is None:
        x, _, norm = _scale_and_norm(x)
    else:
        norm = _divisor(norm, x)
    x = (x / norm).to(dtype)
    batch, is_tall = x.shape[:-2], x.size(-2) > x.size(-1)
    if is_tall:
        x = x.mT
    if len(batch) > 1:
        x = x.flatten(0, -3)
    for a, b, c in coefficients:
        x = _without_tiny(x)
        gram = _without_tiny(x @ x.mT)
        x = _add_product(x, _add_product(gram, gram, gram, b, c), x, a, 1.0)
    if len(batch) > 1:
        x = x.unflatten(0, batch)
    x = x.to(own_dtype)
    return x.mT if is_tall else x


class KineticEnergy(nn.Module, ABC):
    """A kinetic energy: bounded below, zero and least at zero momentum, even, with ``<dK/dp, p> >= 0``.

    The last property is what makes a linear damping of the momentum dissipate. Energies that need more than the
    momentum, such as the held norm of :class:`SpectralEnergy`, take it as a second argument.
    """

    @abstractmethod
    def energy(self, p: Tensor) -> Tensor:
        """Evaluate K, per coordinate or per matrix.

        Args:
            p: Momenta: coordinates, shape ``(*batch, n)``, or matrices, shape ``(*batch, m, n)``.

        Returns:
            Energy of each coordinate, shape ``(*batch, n)``, or of each matrix, shape ``(*batch,)``.
        """

    @abstractmethod
    def velocity(self, p: Tensor) -> Tensor:
        """Evaluate dK/dp, with the shape of ``p``."""

    def total(self, p: Tensor) -> Tensor:
        """Evaluate K of momenta ``(*batch, n)`` of one system, shape ``(*batch,)``."""
        return self.energy(p).sum(-1)


class QuadraticEnergy(KineticEnergy):
    r"""Kinetic energy :math:`K = \tfrac12 p^2` per coordinate: heavy ball, at unit mass."""

    def energy(self, p: Tensor) -> Tensor:
        return 0.5 * p.square()

    def velocity(self, p: Tensor) -> Tensor:
        return p


class RelativisticEnergy(KineticEnergy):
    r"""Kinetic energy :math:`K = c\,(\sqrt{p^2 + c^2} - c)` per coordinate, with velocities below c.

    .. math:: \frac{\partial K}{\partial p} = \frac{c\, p}{\sqrt{p^2 + c^2}}

    Small momenta see the quadratic energy. Large ones, and all of them as c goes to zero with the step size
    times c fixed, give sign momentum.

    Args:
        c: Speed limit, positive.
        learned: Whether c is learned, from the given value on; it stays positive for any weight.

    Raises:
        ValueError: If ``c`` is not a positive number.

    References:
        Maddison et al. (2018), Hamiltonian Descent Methods.
        Franca et al. (2020), Conformal symplectic and relativistic optimization.
    """

    def __init__(self, c: float = 1.0, *, learned: bool = False) -> None:
        super().__init__()
        require(is_number(c) and c > 0, "c", c, "a positive number")
        self.start = float(c)
        self.raw = nn.Parameter(torch.zeros(())) if learned else None

    @property
    def c(self) -> Tensor | float:
        """Speed limit; a 0-d tensor where it is learned."""
        return self.start if self.raw is None else self.start * _bounded_exp(self.raw)

    def energy(self, p: Tensor) -> Tensor:
        c, total = self._terms(p)
        return c * p * (p / (total + c))  # c (total - c) without its cancellation at small p

    def velocity(self, p: Tensor) -> Tensor:
        c, total = self._terms(p)
        return c * (p / total)

    def _terms(self, p: Tensor) -> tuple[Tensor, Tensor]:
        c = p.new_full((), self.start) if self.raw is None else self.c.to(p.dtype)
        return c, torch.hypot(p, c)

    def extra_repr(self) -> str:
        return f"c={float(self.c):.4g}, learned={self.raw is not None}"


class SpectralEnergy(KineticEnergy):
    r"""Kinetic energy of the singular values of a matrix, whose velocity is a Newton-Schulz iteration.

    .. math::
        K(P) = \text{norm} \sum_j k(\sigma_j(P) / \text{norm}), \qquad
        \frac{\partial K}{\partial P} = U\, k'(\Sigma / \text{norm})\, V^\top

    k' is a composition of factors :math:`a s + b s^3 + c s^5` with a, c > 0 and b^2 <= 4 a c. Hence k' >= 0 at
    any s >= 0, K is bounded below by its value 0 at P = 0, and :math:`\langle \partial K/\partial P, P \rangle =
    \sum_j k'(\sigma_j / \text{norm})\, \sigma_j \ge 0`: a damping of P by one number per matrix dissipates.

    The norm is a bound of the singular values, such as the Frobenius norm of P, that is held while the system
    moves: with a norm that follows P the velocity is not the gradient of any energy.

    With ``learned=True`` each factor has two weights, for c / a and b / sqrt(a c), and the given coefficients
    where these are zero. The factor's maximum on the range of its input is kept as given. So the conditions hold,
    and the operator norm of the velocity has the same bound, for any weights.

    Args:
        coefficients: One triple (a, b, c) for each factor; Muon's five equal ones by default.
        learned: Whether the shape of the factors is learned.

    Raises:
        ValueError: If a triple does not satisfy a, c > 0 and b^2 <= 4 a c (3.992 a c where the shape is learned).

    Example:
        >>> momentum = torch.diag(torch.tensor([3.0, 0.5]))
        >>> SpectralEnergy().velocity(momentum, torch.tensor(4.0)).diagonal()
        tensor([1.0467, 0.6881])

    References:
        Jordan et al. (2024), Muon: An optimizer for hidden layers in neural networks.
    """

    def __init__(self, coefficients: Coefficients = MUON_COEFFICIENTS, *, learned: bool = False) -> None:
        super().__init__()
        _check_coefficients(coefficients)
        if isinstance(coefficients, Tensor):
            coefficients = coefficients.tolist()
        self.start = tuple(tuple(map(float, factor)) for factor in coefficients)
        limit = 3.992 if learned else 4  # a learned b stays within its margin
        for a, b, c in self.start:
            is_passive = a > 0 and c > 0 and b * b <= limit * a * c
            require(is_passive, "coefficients", (a, b, c), f"triples with a, c > 0 and b^2 <= {limit} a c")
        self.raw = None
        if learned:
            self.raw = nn.Parameter(torch.zeros(len(self.start), 2))
            a, b, c = torch.tensor(self.start, dtype=torch.float64).unbind(-1)
            ranges = [a.new_ones(())]
            for factor in zip(a, b, c, strict=True):
                ranges.append(_peak(*factor, ranges[-1]))
            shape = torch.atanh(b / (2 * _MARGIN * (a * c).sqrt()))
            start = torch.stack((a, shape, c, torch.stack(ranges[:-1]), torch.stack(ranges[1:])))
            self._numbers = start.tolist()
            self.register_buffer("_start", start.to(self.raw.dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralEnergy:
        super()._apply(fn, recurse)
        if self.raw is not None:  # half types have no room for the margin
            dtype = torch.promote_types(self.raw.dtype, torch.float32)
            self._start = torch.tensor(self._numbers, dtype=dtype, device=self.raw.device)
        return self

    @property
    def coefficients(self) -> Coefficients:
        """Coefficients of the factors: triples of numbers, or a tensor ``(n_factors, 3)`` where they are learned."""
        if self.raw is None:
            return self.start
        a, shape, c, domain, peak = self._start
        raw = self.raw.to(self._start.dtype)
        c = c * _bounded_exp(raw[:, 0])
        b = 2 * _MARGIN * (a * c).sqrt() * torch.tanh(shape + raw[:, 1])
        return torch.stack((a, b, c), dim=-1) * (peak / _peak(a, b, c, domain)).unsqueeze(-1)

    def energy(self, p: Tensor, norm: Tensor) -> Tensor:
        """Evaluate K from singular values, in float64, by a Gauss-Legendre quadrature that is exact for k'.

        Args:
            p: Momenta as matrices, shape ``(*batch, m, n)``.
            norm: Held bound of the singular values, shape ``(*batch,)`` or ``(*batch, 1, 1)``.

        Returns:
            Energy of each matrix, shape ``(*batch,)``, in the type of ``p``; NaN where an entry is not finite.

        Raises:
            ValueError: As in :func:`newton_schulz`.
        """
        _check_matrices("p", p)
        is_finite = p.isfinite().all(-1).all(-1)
        sigma = torch.linalg.svdvals(torch.where(is_finite[..., None, None], p, 0.0).double())
        # k'(s) / s is a polynomial in s^2 = w, so in w half the nodes are enough: k(s) = s / 2 int_0^1 k'(s t) / t dw.
        t, weights = (torch.from_numpy(array).to(p.device) for array in _nodes(5 ** len(self.start)))
        s = (sigma / _divisor(norm, p.double()).squeeze(-1)).unsqueeze(-1) * t
        for a, b, c in self.coefficients:
            w = s * s
            s = s * (a + w * (b + w * c))
        return torch.where(is_finite, (sigma * (s @ weights)).sum(-1), torch.nan).to(p.dtype)

    def velocity(self, p: Tensor, norm: Tensor) -> Tensor:
        """Evaluate dK/dP by :func:`newton_schulz`.

        Args:
            p: Momenta as matrices, shape ``(*batch, m, n)``.
            norm: Held bound of the singular values, as in :meth:`energy`.

        Returns:
            Velocities, with the shape and type of ``p``.

        Raises:
            ValueError: As in :func:`newton_schulz`.
        """
        return newton_schulz(p, norm, self.coefficients)

    def extra_repr(self) -> str:
        return f"n_factors={len(self.start)}, learned={self.raw is not None}"


class MatrixEnergy(KineticEnergy):
    """Spectral energy of momenta that lie flat, under a norm that is held: a part of a system like any other.

    Args:
        shape: Shape (m, n) of the momenta as a matrix; the system has m n degrees of freedom.
        norm: Bound of the singular values that the momenta will have, positive. Beyond it Muon's polynomial, of degree
            3,125, explodes: at 1.3 times the norm the energy is no number in single precision, and an integration ends
            with the status of a state that is not finite. The short polynomial explodes from 1.1 times the norm on.
        spectral: The energy of the singular values; None for Muon's.

    Raises:
        ValueError: If the shape is not two positive integers, or the norm not positive.

    Example:
        >>> from odeopt.physics import PhaseState, PortHamiltonianSystem
        >>> system = PortHamiltonianSystem(6, kinetic=MatrixEnergy((2, 3), norm=10.0), dissipation=0.1)
        >>> system.power_balance(PhaseState(None, torch.tensor([3.0, 0.0, 0.0, 0.0, 4.0, 0.0]))).dissipated
        tensor(0.2345)
    """

    def __init__(self, shape: tuple[int, int], norm: float, spectral: SpectralEnergy | None = None) -> None:
        super().__init__()
        is_shape = is_list(shape) and len(shape) == 2 and all(is_integer(n) and n > 0 for n in shape)
        require(is_shape, "shape", shape, "two positive integers")
        require(is_number(norm) and norm > 0, "norm", norm, "a positive number")
        self.shape, self.norm = tuple(shape), float(norm)
        self.spectral = SpectralEnergy() if spectral is None else spectral

    def energy(self, p: Tensor) -> Tensor:
        return self.spectral.energy(p.unflatten(-1, self.shape), p.new_full(p.shape[:-1], self.norm))

    def velocity(self, p: Tensor) -> Tensor:
        return self.spectral.velocity(p.unflatten(-1, self.shape), p.new_full(p.shape[:-1], self.norm)).flatten(-2)

    def total(self, p: Tensor) -> Tensor:
        return self.energy(p)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, norm={self.norm:.4g}"


def spectral_power_balance(
    P: Tensor, u: Tensor, friction: Tensor | float, gain: Tensor | float, energy: SpectralEnergy, norm: Tensor
) -> PowerBalance:
    r"""Account for the power of a spectral mode.

    .. math:: \dot P = -\phi P + g\, u, \qquad y = g\, \partial K/\partial P

    The rate of the energy is the derivative of :meth:`SpectralEnergy.energy`, which is computed from singular
    values, along the field. The other powers use the velocity, so the residual checks one against the other.

    Args:
        P: Momenta as matrices, shape ``(*batch, m, n)``.
        u: Port effort, of the shape of ``P``.
        friction: Damping rate :math:`\phi \ge 0`, one number per matrix: a number, or shape ``(*batch,)``.
        gain: Port gain g, likewise one number per matrix.
        energy: The energy K.
        norm: Held bound of the singular values, shape ``(*batch,)`` or ``(*batch, 1, 1)``.

    Returns:
        Powers per matrix, each of shape ``(*batch,)``.

    Raises:
        ValueError: If ``u`` does not have the shape of ``P``, ``friction`` or ``gain`` is not one number per matrix,
            or as in :func:`newton_schulz`.
    """
    require(u.shape == P.shape, "u.shape", tuple(u.shape), f"that of `P`, {tuple(P.shape)}")
    gradient = torch.func.grad(lambda p: energy.energy(p, norm).sum())(P)
    v = energy.velocity(P, norm)
    friction, gain = _per_matrix("friction", friction, P), _per_matrix("gain", gain, P)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum((-2, -1))

    energy_rate = inner(gradient, gain * u - friction * P)
    dissipated, supplied = inner(v, friction * P), inner(u, gain * v)
    return PowerBalance(energy_rate, dissipated, supplied, energy_rate + dissipated - supplied)


def _add_product(x: Tensor, y: Tensor, z: Tensor, beta: float | Tensor, alpha: float | Tensor) -> Tensor:
    """Evaluate ``beta * x + alpha * y @ z`` of one matrix or of a batch."""
    if isinstance(beta, Tensor):
        x, beta = beta * x, 1.0
    if isinstance(alpha, Tensor):
        y, alpha = alpha * y, 1.0
    product = torch.addmm if x.dim() == 2 else torch.baddbmm
    return product(x, y, z, beta=beta, alpha=alpha)


def _without_tiny(x: Tensor) -> Tensor:
    """Zeros for entries far below the rounding of one, where no gradient is wanted.

    Their products are too small to be normal numbers, and a CPU is a hundred times slower on those.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled():
        return x
    return nn.functional.hardshrink(x, 1e-15)


def _scale_and_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices ``x / scale``; scales, powers of two near the largest entries; norms of ``x / scale``.

    The scale is infinite where x is zero. Quotients by a power of two are exact, and x / scale / norm does not depend
    on it, so nothing is lost by holding it constant. The norm is never zero: its root has no second derivative there.
    """
    if 0 in x.shape[-2:]:
        one = x.new_ones(*x.shape[:-2], 1, 1)
        return x, one, 0 * one
    # frexp does not know every half type on every device
    peak = x.detach().abs().amax((-2, -1), keepdim=True).to(torch.promote_types(x.dtype, torch.float32))
    is_zero = peak == 0
    scale = torch.where(is_zero, math.inf, peak / (2 * torch.frexp(peak).mantissa)).to(x.dtype)
    x = x / scale
    return x, scale, torch.linalg.vector_norm(torch.where(is_zero, 1.0, x), dim=(-2, -1), keepdim=True)


def _divisor(norm: Tensor, x: Tensor) -> Tensor:
    """A given norm as ``(*batch, 1, 1)`` in the type of x, infinite where it is zero."""
    shapes = tuple(x.shape[:-2]), (*x.shape[:-2], 1, 1)
    if norm.shape not in shapes:
        raise ValueError(
            f"Parameter `norm` should have shape {shapes[0]} or {shapes[1]}. Found `norm.shape = {tuple(norm.shape)}`."
        )
    return torch.where(norm == 0, math.inf, norm).to(x.dtype).reshape(shapes[1])


def _per_matrix(name: str, value: Tensor | float, P: Tensor) -> Tensor:
    """One number per matrix as ``(*batch, 1, 1)``; elementwise ones would leave the sign of the powers open."""
    value = torch.as_tensor(value, dtype=P.dtype, device=P.device)
    shape = tuple(P.shape[:-2])
    require(value.shape in ((), shape), f"{name}.shape", tuple(value.shape), f"that of a number or {shape}")
    return value[..., None, None]


def _bounded_exp(raw: Tensor) -> Tensor:
    """Positive and near ``exp(raw)`` around zero, within ``exp(-4)`` and ``exp(4)`` for any number."""
    return torch.exp(4 * torch.tanh(raw / 4))


def _peak(a: Tensor, b: Tensor, c: Tensor, domain: Tensor) -> Tensor:
    """Maximum of ``a s + b s^3 + c s^5`` for s between 0 and ``domain``."""
    discriminant = 9 * b * b - 20 * a * c
    has_peak = (b < 0) & (discriminant > 0)
    root = torch.where(has_peak, discriminant, 1.0).sqrt()
    w = torch.minimum(2 * a / (root - 3 * torch.where(has_peak, b, -1.0)), domain**2)
    interior = torch.where(has_peak, w, domain**2)
    values = (s.sqrt() * (a + s * (b + s * c)) for s in (interior, domain**2))
    return torch.maximum(*values)


@functools.lru_cache
def _nodes(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes t and weights with ``sum(weights * f(t)) = int_0^1 f(t) dt`` for odd polynomials f of a degree."""
    x, weights = np.polynomial.legendre.leggauss((degree + 4) // 4)
    t = np.sqrt((x + 1) / 2)
    return t, weights / (4 * t)


def _check_matrices(name: str, x: Tensor) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"Parameter `{name}` should be a floating-point tensor of shape (*batch, m, n). "
            f"Found shape {tuple(x.shape)} of type {x.dtype}."
        )


def _check_coefficients(coefficients: Coefficients) -> None:
    if isinstance(coefficients, Tensor):
        is_right, found = coefficients.dim() == 2 and coefficients.shape[1] == 3, tuple(coefficients.shape)
    else:
        found = coefficients
        is_right = is_list(found) and all(
            is_list(factor) and len(factor) == 3 and all(is_number(number) for number in factor) for factor in found
        )
    is_right = is_right and len(coefficients) > 0
    require(is_right, "coefficients", found, "triples (a, b, c), or a tensor of shape (n_factors, 3)")
