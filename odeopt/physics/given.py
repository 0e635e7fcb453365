"""Matrices that a user gives: constants, checked once when a system is built, and functions.

That a function gives a matrix with the structure it should have is the user's responsibility; only the shape
of its output is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from odeopt.checks import require
from odeopt.physics.structure import MatrixPart

Part = nn.Module | Tensor | float | Callable[..., Tensor]


class GivenMatrix(MatrixPart):
    """A known matrix: a constant tensor or a function.

    Systems wrap bare tensors and functions by themselves; this class is needed to declare that a function
    gives a diagonal.

    Args:
        value: A number (a multiple of the identity, in torch's default dtype: a 0-d tensor keeps its own), a 1-d tensor
            (a diagonal), a 2-d tensor (a matrix), or a function, called as ``value(q)`` without and as
            ``value(q, z)`` with a modulating signal.
        diagonal: Whether the function gives the diagonal, shape ``(*batch, dof)``, of its matrix. A tensor
            says so by its number of axes.

    Raises:
        ValueError: If a tensor is complex, not finite or has more than two axes, or if it is 2-d and declared
            diagonal.
        TypeError: If ``value`` is neither a tensor, a number nor callable.

    Example:
        >>> friction = GivenMatrix(lambda q, z: z.square(), diagonal=True)
        >>> friction(None, torch.tensor([1.0, 2.0]))
        tensor([1., 4.])
    """

    def __init__(self, value: Tensor | float | Callable[..., Tensor], *, diagonal: bool = False) -> None:
        super().__init__()
        if isinstance(value, int | float):
            value = torch.tensor(float(value))
        if isinstance(value, Tensor):
            self.function = None
            self._hold(value, diagonal)
        elif callable(value):
            self.function = value
            self.is_diagonal = diagonal
            self.depends_on_q = True
        else:
            found = type(value).__name__
            raise TypeError(f"Parameter `value` should be a tensor, a number or callable. Found `{found}`.")

    def _hold(self, value: Tensor, diagonal: bool) -> None:
        if value.dim() > 2 or (diagonal and value.dim() == 2):
            should = "be a diagonal with at most one axis" if diagonal else "have at most two axes"
            raise ValueError(f"Parameter `value` should {should}. Found `value.shape = {tuple(value.shape)}`.")
        if value.is_complex() or not bool(torch.isfinite(value).all()):
            raise ValueError(f"Parameter `value` should be real and finite. Found `value = {value.tolist()}`.")
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
        self.is_diagonal = value.dim() < 2
        self.shape = tuple(value.shape)
        if isinstance(value, nn.Parameter):
            self.value = value
        else:
            self.register_buffer("value", value)

    @property
    def is_constant(self) -> bool:
        """True if the matrix is a tensor instead of a function."""
        return self.function is None

    def forward(self, q: Tensor | None, z: Any = None) -> Tensor:
        if self.function is None:
            return self.value
        return self.function(q) if z is None else self.function(q, z)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, diagonal={self.is_diagonal}"


def as_matrix(value: Part | None, *, name: str, shape: tuple[int, int], should: str | None = None) -> MatrixPart | None:
    """Turn what a user gives as a matrix into a part, and check what can be checked before it is called.

    Args:
        value: A part, a constant, a function, or None.
        name: Name of the parameter, for errors.
        shape: Shape of the matrix.
        should: ``"positive definite"`` or ``"positive semi-definite"``, where diagonals and numbers are
            accepted too; None where any matrix, but only a matrix, will do.

    Returns:
        The part, or None for None.

    Raises:
        ValueError: If the shape or the structure is not the wanted one.
        TypeError: If ``value`` is neither a part, a tensor, a number nor callable.
    """
    if value is None:
        return None
    if not (isinstance(value, Tensor | int | float) or callable(value)):
        found = type(value).__name__
        raise TypeError(f"Parameter `{name}` should be a part, a tensor, a number or callable. Found `{found}`.")
    part = value if isinstance(value, MatrixPart) else GivenMatrix(value)
    if part.is_diagonal and should is None:
        raise ValueError(f"Parameter `{name}` should be a matrix of shape {shape}. Found a diagonal.")
    if part.shape is not None:
        _check_shape(part.shape, part.is_diagonal, name=name, shape=shape)
    if should is None:
        return part
    if isinstance(part, GivenMatrix):
        if part.is_constant:
            _check_constant(part.value, name=name, should=should)
    elif not (part.is_definite if should == "positive definite" else part.is_semidefinite):
        found = type(part).__name__
        raise ValueError(f"Parameter `{name}` should be {should} for any weights. Found a `{found}`.")
    return part


def evaluate(part: MatrixPart, q: Tensor | None, z: Any, *, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
    """Call a part and compare the trailing shape of its output, the hot path's one check; in the dtype of a vector."""
    matrix = part(q) if z is None else part(q, z)
    trailing = matrix.shape[-1:] if part.is_diagonal else matrix.shape[-2:]
    _check_shape(tuple(trailing), part.is_diagonal, name=name, shape=shape)
    return matrix.to(like.dtype)


def evaluate_full(part: MatrixPart, q: Tensor | None, z: Any, *, name: str, like: Tensor) -> Tensor:
    """Call a part and write a diagonal out as a matrix, in the size, dtype and device of a vector."""
    dof = like.shape[-1]
    value = evaluate(part, q, z, name=name, shape=(dof, dof), like=like)
    return value.unsqueeze(-1) * torch.eye(dof, dtype=like.dtype, device=like.device) if part.is_diagonal else value


def _check_shape(found: tuple[int, ...], is_diagonal: bool, *, name: str, shape: tuple[int, int]) -> None:
    if is_diagonal and found not in ((), shape[:1]):
        raise ValueError(f"Parameter `{name}` should be a diagonal of shape {shape[:1]}. Found shape {found}.")
    if not is_diagonal and found != shape:
        raise ValueError(f"Parameter `{name}` should be a matrix of shape {shape}. Found shape {found}.")


def _check_constant(value: Tensor, *, name: str, should: str) -> None:
    is_held = not isinstance(value, nn.Parameter)
    require(is_held, name, value, f"a learned part, which stays {should} while it is learned, or a constant")
    eigenvalues, slack = value.detach().cpu().double(), 0.0  # some devices have no double precision
    if value.dim() == 2:
        # A matrix that was computed carries a few roundings of its type.
        slack = 8 * torch.finfo(value.dtype).eps * eigenvalues.abs().max().item()
        skew = (eigenvalues - eigenvalues.mT).abs().max().item()
        if skew > slack:
            raise ValueError(f"Parameter `{name}` should be symmetric. Found max |A - A^T| = {skew:.4g}.")
        eigenvalues = torch.linalg.eigvalsh(eigenvalues)
    lowest = eigenvalues.min().item()
    if lowest <= slack if should == "positive definite" else lowest < -slack:
        raise ValueError(f"Parameter `{name}` should be {should}. Found a lowest eigenvalue of {lowest:.4g}.")
