"""Inputs u(t) of a system: constants, samples held or joined by lines, and functions of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from odeopt.checks import require
from odeopt.ode.implicit import must_not_synchronise
from odeopt.ode.recorder import Timed

Input = Callable[[Tensor], Tensor]


class _Sampled:
    """Samples at rising times, the knots."""

    def __init__(self, t: Tensor | Sequence[float], values: Tensor) -> None:
        has_gradient = isinstance(t, Tensor) and t.requires_grad
        require(not has_gradient, "t.requires_grad", True, "False, as no gradient is passed on to knots")
        t = torch.as_tensor(t, dtype=torch.float64).detach().cpu()
        is_rising = t.dim() == 1 and len(t) >= 1 and bool(t.isfinite().all()) and bool((t.diff() > 0).all())
        require(is_rising, "t", t.tolist(), "finite, one-dimensional and strictly increasing")
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        is_right = isinstance(values, Tensor) and values.dim() >= 2 and len(values) == len(t)
        require(is_right, "values.shape", found, f"({len(t)}, *batch, n_inputs), one sample per knot")
        if not must_not_synchronise(values) and not values.isfinite().all():
            at = int((~values.isfinite().flatten(1).all(1)).nonzero()[0])
            raise ValueError(f"Parameter `values` should be finite. Found `values[{at}] = {values[at].tolist()}`.")
        self.knots: tuple[float, ...] = tuple(t.tolist())
        self.values = values

    def _index(self, time: float) -> int:
        low, high = 0, len(self.knots)
        while low < high:  # as `bisect` does, which is not traced
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.knots[middle] <= time else (low, middle)
        return max(low - 1, 0)

    def _index_of(self, t: Tensor) -> Tensor:
        knots = torch.tensor(self.knots, dtype=t.dtype, device=t.device)
        return (torch.searchsorted(knots, t.detach(), right=True) - 1).clamp(0, len(self.knots) - 1)

    def piece(self, start: float, end: float) -> Input:
        """Return the input between two times without a knot in between; held, at both of them its value there."""
        value = self.values[self._index((start + end) / 2)]
        return lambda t: value


class ZeroOrderHold(_Sampled):
    """Samples that are held from their knot to the next one; the first also before, the last also after.

    Args:
        t: Knots, shape ``(n_knots,)``, strictly increasing.
        values: Samples, shape ``(n_knots, *batch, n_inputs)``, on the device and in the dtype of the state.

    Raises:
        ValueError: If knots do not rise, or samples are not finite or not as many as knots.

    Example:
        >>> ZeroOrderHold([0.0, 1.0], torch.tensor([[2.0], [3.0]]))(torch.tensor(0.5))
        tensor([2.])
    """

    def __call__(self, t: Tensor) -> Tensor:
        """Evaluate at a time, a 0-d tensor; at a knot the sample that begins there."""
        return self.values.index_select(0, self._index_of(t).reshape(1)).squeeze(0)


class FirstOrderHold(_Sampled):
    """Samples joined by straight lines; held before the first knot and after the last one.

    The arguments and errors are those of :class:`ZeroOrderHold`.

    Example:
        >>> FirstOrderHold([0.0, 1.0], torch.tensor([[2.0], [3.0]]))(torch.tensor(0.5))
        tensor([2.5000])
    """

    def __call__(self, t: Tensor) -> Tensor:
        """Evaluate at a time, a 0-d tensor."""
        if len(self.knots) == 1:
            return self.values[0]
        index = self._index_of(t).clamp(max=len(self.knots) - 2).reshape(1)
        knots = torch.tensor(self.knots, dtype=t.dtype, device=t.device)
        left, right = knots.index_select(0, index), knots.index_select(0, index + 1)
        share = ((t - left) / (right - left)).clamp(0, 1).to(self.values.dtype)
        first, last = (self.values.index_select(0, i).squeeze(0) for i in (index, index + 1))
        return first + share.squeeze(0) * (last - first)

    def piece(self, start: float, end: float) -> Input:
        """Return the input between two times without a knot in between."""
        if len(self.knots) == 1 or not self.knots[0] <= (start + end) / 2 <= self.knots[-1]:
            return super().piece(start, end)
        index = min(self._index((start + end) / 2), len(self.knots) - 2)
        left, right = self.knots[index : index + 2]
        first, slope = self.values[index], (self.values[index + 1] - self.values[index]) / (right - left)
        return lambda t: first + (t - left) * slope


def checked_input(u: Any) -> Tensor | Input | None:
    """Refuse what is neither a tensor (held all the time), a function of time nor None."""
    wanted = "None, a tensor of shape (*batch, n_inputs), a `ZeroOrderHold`, a `FirstOrderHold` or a function of time"
    require(u is None or isinstance(u, Tensor) or callable(u), "u", u, wanted)
    return u


def knots_of(u: Any) -> tuple[float, ...]:
    """Times at which an input jumps or turns, where no step should reach across."""
    return u.knots if isinstance(u, _Sampled) else ()


def piece_of(
    u: Tensor | Input | None, start: float, end: float, dtype: torch.dtype
) -> Callable[[Tensor], Tensor | None]:
    """Return an input as a function of time between two times, neighbouring knots at most; in the dtype of a state."""
    if u is None:
        return lambda t: None
    if isinstance(u, Tensor):
        u = u.to(dtype)
        return lambda t: u
    piece = u.piece(start, end) if isinstance(u, _Sampled) else Timed(u, dtype)

    def in_dtype(t: Tensor) -> Tensor | None:
        value = piece(t)
        return value.to(dtype) if isinstance(value, Tensor) else value  # what is no tensor, the system refuses

    return in_dtype
