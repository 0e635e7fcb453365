"""Matrices that are skew, semi-definite or definite by construction.

A port-Hamiltonian system is passive because of the structure of its matrices, never because of their values.
The learned parts here have that structure for any weights.

Every part is called as ``part(q)`` or ``part(q, z)``, with ``z`` a modulating signal that learned parts of
``n_signals`` read and the others ignore.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeopt.checks import require, require_counts

Network = nn.Module | Sequence[int] | None


def symplectic_matrix(dof: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    r"""Canonical skew matrix :math:`J = \begin{pmatrix} 0 & I \\ -I & 0 \end{pmatrix}`.

    Args:
        dof: Number of degrees of freedom.
        dtype: Floating-point type; PyTorch's default when None.
        device: Where the matrix lives.

    Returns:
        J, shape ``(2 * dof, 2 * dof)``.

    Raises:
        ValueError: If ``dof`` is not a positive integer.
    """
    require_counts(dof=dof)
    identity = torch.eye(dof, dtype=dtype, device=device)
    zero = torch.zeros_like(identity)
    return torch.cat((torch.cat((zero, identity), dim=1), torch.cat((-identity, zero), dim=1)), dim=0)


def mlp(
    n_inputs: int, n_outputs: int, *, widths: Sequence[int] = (32,), activation: Callable[[], nn.Module] = nn.Tanh
) -> nn.Sequential:
    """Multilayer perceptron with a linear output layer.

    The default activation is smooth: where the network is a potential or a mass, the vector field holds its
    first derivative and training through it needs the second, which a ReLU does not have.

    Args:
        n_inputs: Length of the input's last axis.
        n_outputs: Length of the output's last axis.
        widths: Widths of the hidden layers; ``()`` gives one linear layer.
        activation: Makes the activation behind each hidden layer.

    Returns:
        The network, mapping ``(*batch, n_inputs)`` to ``(*batch, n_outputs)``.

    Raises:
        ValueError: If a size is not a positive integer.
    """
    require_counts(n_inputs=n_inputs, n_outputs=n_outputs)
    layers: list[nn.Module] = []
    for width in widths:
        require_counts(widths=width)
        layers += [nn.Linear(n_inputs, width), activation()]
        n_inputs = width
    return nn.Sequential(*layers, nn.Linear(n_inputs, n_outputs))


class ScaledSigmoid(nn.Module):
    r"""Bounded activation :math:`a \mapsto \ell\,\sigma(a)`, with values in ``[0, limit]``.

    As the activation of a friction it keeps the fastest decay rate under ``limit``, so that an explicit
    solver with steps of unit length stays stable.

    Args:
        limit: The supremum, positive.

    Raises:
        ValueError: If ``limit`` is not positive.
    """

    def __init__(self, limit: float) -> None:
        super().__init__()
        require(limit > 0, "limit", limit, "positive")
        self.limit = limit

    def forward(self, raw: Tensor) -> Tensor:
        return self.limit * torch.sigmoid(raw)

    def extra_repr(self) -> str:
        return f"limit={self.limit}"


class MatrixPart(nn.Module, ABC):
    """A matrix of a port-Hamiltonian system, called as ``part(q, z)``.

    Attributes:
        shape: Trailing shape of the output: ``(dof, dof)``, ``(dof, n_inputs)``, or ``(dof,)`` for a
            diagonal; None where it is only known once the part is called.
        is_diagonal: Whether the output holds the diagonal of a matrix instead of the matrix.
        depends_on_q: Whether the matrix changes with ``q``.
        n_signals: Length of the signal ``z`` that the part reads; 0 where it reads none.
        is_semidefinite: Whether ``v^T part v >= 0`` holds by construction.
        is_definite: Whether ``v^T part v > 0`` holds by construction, for ``v != 0``.
    """

    shape: tuple[int, ...] | None = None
    is_diagonal: bool = False
    depends_on_q: bool = False
    n_signals: int = 0
    is_semidefinite: bool = False
    is_definite: bool = False

    @abstractmethod
    def forward(self, q: Tensor | None, z: Any = None) -> Tensor:
        """Evaluate the matrix.

        Args:
            q: Positions, shape ``(*batch, dof)``; None is allowed where the part does not depend on them.
            z: Modulating signal of any kind.

        Returns:
            The matrix, shape ``(*batch, *shape)``, or ``shape`` where it is constant.
        """


class LearnedMatrix(MatrixPart):
    """Base of the learned parts: numbers from a network of ``q`` (and ``z``), or learnable constants.

    Args:
        dof: Number of degrees of freedom.
        n_numbers: How many numbers the network gives per state.
        network: Hidden widths of a tanh network, a module mapping ``(*batch, dof + n_signals)`` to
            ``(*batch, n_numbers)``, or None for learnable constants that start at zero.
        n_signals: Length of the tensor ``z`` that the network reads beside ``q``.

    Raises:
        ValueError: If a size is not positive, or if ``n_signals`` is given without a network.
    """

    def __init__(self, dof: int, n_numbers: int, *, network: Network, n_signals: int) -> None:
        super().__init__()
        require_counts(dof=dof)
        self.dof, self.n_numbers, self.n_signals = dof, n_numbers, n_signals
        self.depends_on_q = network is not None
        require(n_signals >= 0, "n_signals", n_signals, "at least 0")
        require(n_signals == 0 or network is not None, "n_signals", n_signals, "0 without a network")
        if network is None:
            self.numbers = nn.Parameter(torch.zeros(n_numbers))
            self.network = None
        elif isinstance(network, nn.Module):
            self.network = network
        else:
            self.network = mlp(dof + n_signals, n_numbers, widths=network)

    def _numbers(self, q: Tensor | None, z: Any) -> Tensor:
        if self.network is None:
            return self.numbers
        if q is None:
            raise ValueError("Parameter `q` should be given: the part is a network of it. Found `q = None`.")
        if self.n_signals:
            if not isinstance(z, Tensor) or z.shape[-1:] != (self.n_signals,):
                found = tuple(z.shape) if isinstance(z, Tensor) else z
                raise ValueError(
                    f"Parameter `z` should be a tensor of shape (*batch, {self.n_signals}). Found `{found}`."
                )
            q = torch.cat((q, z.expand(*q.shape[:-1], self.n_signals)), dim=-1)
        numbers = self.network(q)
        if numbers.shape[-1:] != (self.n_numbers,):
            raise ValueError(
                f"Parameter `network` should give {self.n_numbers} numbers per state. "
                f"Found an output of shape {tuple(numbers.shape)}."
            )
        return numbers

    def extra_repr(self) -> str:
        return f"dof={self.dof}, n_signals={self.n_signals}"


class PositiveDefinite(LearnedMatrix):
    r"""Inverse mass :math:`M^{-1}(q) = L L^\top + \epsilon I`, definite for any weights.

    .. math:: L = \sqrt{\text{start}}\; I + \mathrm{tril}(\text{numbers}(q))

    Args:
        dof: Number of degrees of freedom.
        network: Hidden widths, a module giving ``dof (dof + 1) / 2`` numbers (the lower triangle by rows), or
            None for a learnable constant.
        start: Multiple of the identity that the matrix has, beside ``eps``, where the numbers are zero.
        eps: Lower bound of the eigenvalues, positive.

    Raises:
        ValueError: If ``eps`` is not positive, ``start`` is negative, or a size is not positive.

    References:
        Zhong, Dey, Chakraborty (2020), Dissipative SymODEN.
    """

    is_semidefinite = True
    is_definite = True

    def __init__(self, dof: int, *, network: Network = None, start: float = 1.0, eps: float = 1e-3) -> None:
        n_numbers = dof * (dof + 1) // 2
        super().__init__(dof, n_numbers, network=network, n_signals=0)
        require(eps > 0, "eps", eps, "positive")
        require(start >= 0, "start", start, "at least 0")
        self.shape = (dof, dof)
        self.start, self.eps = start, eps
        # Entries above the diagonal point behind the numbers, at the zero that forward() pads.
        index = torch.full((dof, dof), n_numbers)
        index[*torch.tril_indices(dof, dof)] = torch.arange(n_numbers)
        self.register_buffer("_index", index, persistent=False)
        self.register_buffer("_identity", torch.eye(dof), persistent=False)

    def forward(self, q: Tensor | None, z: Any = None) -> Tensor:
        triangle = F.pad(self._numbers(q, z), (0, 1))[..., self._index]
        L = triangle + self.start**0.5 * self._identity
        return L @ L.mT + self.eps * self._identity


class PositiveSemidefinite(LearnedMatrix):
    r"""Dissipation :math:`D(q, z) = C C^\top`, semi-definite for any weights.

    .. math:: C = \sqrt{\text{start}}\; I + \text{numbers}(q, z)

    Args:
        dof: Number of degrees of freedom.
        network: Hidden widths, a module giving ``dof * dof`` numbers (by rows), or None for a learnable
            constant.
        start: Multiple of the identity that the matrix has where the numbers are zero. Positive for a
            constant: at C = 0 the derivative of C C^T vanishes, and nothing would ever be learned.
        n_signals: Length of the tensor ``z`` that the network reads beside ``q``.

    Raises:
        ValueError: If ``start`` is negative (or zero for a constant), or a size is not positive.
    """

    is_semidefinite = True

    def __init__(self, dof: int, *, network: Network = None, start: float = 0.1, n_signals: int = 0) -> None:
        super().__init__(dof, dof * dof, network=network, n_signals=n_signals)
        require(start >= 0, "start", start, "at least 0")
        require(network is not None or start > 0, "start", start, "positive for a constant")
        self.shape = (dof, dof)
        self.start = start
        self.register_buffer("_identity", torch.eye(dof), persistent=False)

    def forward(self, q: Tensor | None, z: Any = None) -> Tensor:
        C = self._numbers(q, z).unflatten(-1, self.shape) + self.start**0.5 * self._identity
        return C @ C.mT


class NonNegativeDiagonal(LearnedMatrix):
    r"""Diagonal :math:`\varphi(\text{numbers}(q, z)) + \epsilon`, non-negative for any weights.

    Args:
        dof: Number of degrees of freedom.
        network: Hidden widths, a module giving ``dof`` numbers, or None for a learnable constant.
        activation: Elementwise and non-negative: softplus, or :class:`ScaledSigmoid` for a bounded diagonal.
        eps: Lower bound of the entries. Positive where the diagonal is an inverse mass.
        n_signals: Length of the tensor ``z`` that the network reads beside ``q``.

    Raises:
        ValueError: If ``activation`` has negative values, ``eps`` is negative, or a size is not positive.
    """

    is_diagonal = True
    is_semidefinite = True

    def __init__(
        self,
        dof: int,
        *,
        network: Network = None,
        activation: Callable[[Tensor], Tensor] = F.softplus,
        eps: float = 0.0,
        n_signals: int = 0,
    ) -> None:
        super().__init__(dof, dof, network=network, n_signals=n_signals)
        require(eps >= 0, "eps", eps, "at least 0")
        check_activation(activation)
        self.shape = (dof,)
        self.is_definite = eps > 0
        self.activation, self.eps = activation, eps

    def forward(self, q: Tensor | None, z: Any = None) -> Tensor:
        diagonal = self.activation(self._numbers(q, z))
        return diagonal + self.eps if self.eps else diagonal


class PortMatrix(LearnedMatrix):
    r"""Input matrix :math:`g(q, z)`; any matrix will do, because it enters the effort and the output alike.

    Args:
        dof: Number of degrees of freedom.
        n_inputs: Number of ports.
        network: Hidden widths, a module giving ``dof * n_inputs`` numbers (by rows), or None for a learnable
            constant.
        start: The matrix where the numbers are zero; ones on the main diagonal by default.
        n_signals: Length of the tensor ``z`` that the network reads beside ``q``.

    Raises:
        ValueError: If ``start`` does not have shape ``(dof, n_inputs)``, or a size is not positive.
    """

    def __init__(
        self, dof: int, n_inputs: int, *, network: Network = None, start: Tensor | None = None, n_signals: int = 0
    ) -> None:
        require_counts(n_inputs=n_inputs)
        super().__init__(dof, dof * n_inputs, network=network, n_signals=n_signals)
        start = torch.eye(dof, n_inputs) if start is None else start
        self.shape = (dof, n_inputs)
        require(start.shape == self.shape, "start.shape", tuple(start.shape), f"{self.shape}")
        self.register_buffer("start", start)

    def forward(self, q: Tensor | None, z: Any = None) -> Tensor:
        return self._numbers(q, z).unflatten(-1, self.shape) + self.start


def apply(matrix: Tensor, vector: Tensor, *, diagonal: bool) -> Tensor:
    """Product with a vector: ``(*batch, n, m)`` or a diagonal ``(*batch, n)``, times ``(*batch, m)``."""
    if diagonal:
        return matrix * vector
    if matrix.dim() == 2:
        return vector @ matrix.mT
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def check_activation(activation: Callable[[Tensor], Tensor]) -> None:
    """Raise a ValueError where an activation is negative somewhere; the structure hangs on it."""
    lowest = activation(torch.linspace(-30.0, 30.0, 601)).min().item()
    if not lowest >= 0:
        raise ValueError(f"Parameter `activation` should be non-negative. Found a value of {lowest:.4g}.")
