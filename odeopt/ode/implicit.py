"""Implicit equations of a step: solved by Newton's method, differentiated by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from odeopt.checks import require_counts, require_positive
from odeopt.modes import is_in_forward_mode, is_traced

Residual = Callable[[Tensor], Tensor]

# Number of iterations of whole steps: exactly these where the host must not wait for a value (mapped, compiled or
# captured), of which the last ones change nothing, and at most these elsewhere. From an Euler predictor Newton's method
# needs three to five, and what it has not solved by then has run away.
_N_WHOLE = 8
# Iterations that an equation takes at least, unless the residual is small beside the state itself.
_N_AT_LEAST = 3
# A step of the second try that makes the residual larger is halved at most so often.
_N_HALVINGS = 8
# An iterate may be larger than the guess by this factor; beyond, its size no longer excuses a residual.
_GROWTH = 10


class Newton(NamedTuple):
    """Settings of the Newton iterations that solve implicit equations.

    Attributes:
        tol: Largest entry of the residual, or of Newton's correction, that counts as zero, in units of one plus the
            largest entry of the state, or, before three iterations were taken, of that entry alone; None for the three
            quarters power of the dtype's rounding, 2e-12 in double and 6e-6 in single precision.
        max_iters: Iterations at most of each try: of the first one, in whole steps, None for 8; of the second one, in
            halved steps, None for 20.
    """

    tol: float | None = None
    max_iters: int | None = None

    def checked(self) -> Newton:
        """Return these settings, having refused wrong ones."""
        require_positive(tol=self.tol, or_none=True)
        require_counts(max_iters=self.max_iters, or_none=True)
        return self


class Root(NamedTuple):
    """Result of a solve.

    Attributes:
        x: The root, shape ``(*batch, n)``.
        n_iters: Iterations that each sample took, shape ``(*batch,)``.
        is_converged: Whether its residual is small enough, shape ``(*batch,)``.
        n_evals: Evaluations of the residual, a Jacobian counting as one for each of its columns.
    """

    x: Tensor
    n_iters: Tensor
    is_converged: Tensor
    n_evals: int


def solve_implicit(residual: Residual, guess: Tensor, newton: Newton = Newton()) -> Root:  # noqa: B008
    r"""Solve :math:`F(x) = 0` for each sample of a batch.

    Newton's method without a graph, in whole steps, which may pass through larger residuals; samples that have
    converged stand still. Those that have not are tried again from the start, their steps halved while they make the
    residual larger. Then two steps with the Jacobian held,
    :math:`x \leftarrow x - J^{-1} F(x)`, are recorded: at a root, where J is the derivative of F, the first one has the
    derivative that the implicit function theorem gives, and the second one makes the second derivative right, too.
    So the iterations are not differentiated, and cost no memory.

    Eagerly, iterations go on until all samples have converged, which waits for the device; mapped (``torch.func``),
    compiled or captured by a CUDA graph, a fixed number of whole steps is taken, and there is no second try.

    Args:
        residual: Function of ``(*batch, n)`` with values of that shape, each sample by itself, that ``torch.func.vjp``
            can differentiate.
        guess: Where to start, shape ``(*batch, n)``.
        newton: Tolerance and number of iterations.

    Returns:
        The root; where it was not found, the last iterate.

    References:
        Bai, Kolter, Koltun (2019), Deep equilibrium models, Thm. 1: the derivative.
    """
    is_masked = must_not_synchronise(guess)
    tol = torch.finfo(guess.dtype).eps ** 0.75 if newton.tol is None else newton.tol
    n_whole = newton.max_iters or _N_WHOLE
    if not is_masked:
        n_whole = min(n_whole, _N_WHOLE)
    with torch.no_grad():
        root = _iterated(residual, guess.detach(), tol, n_whole, synchronises=not is_masked)
        if not is_masked and not root.is_converged.all():
            start = torch.where(root.is_converged.unsqueeze(-1), root.x, guess.detach())
            again = _iterated(residual, start, tol, newton.max_iters or 20, n_least=0, n_halvings=_N_HALVINGS)
            root = again._replace(n_iters=root.n_iters + again.n_iters, n_evals=root.n_evals + again.n_evals)
        x = root.x.detach()
    has_tangents = is_in_forward_mode()
    if torch.is_grad_enabled() or has_tangents:
        attached = residual(x)
        if attached.requires_grad or is_masked or has_tangents:  # then a tensor does not say what it depends on
            with torch.no_grad():
                held = jacobian(residual, x).detach()
            x = x - _solved(held, attached)
            x = x - _solved(held, residual(x))
    return root._replace(x=x)


def _iterated(
    residual: Residual,
    x: Tensor,
    tol: float,
    max_iters: int,
    *,
    synchronises: bool = True,
    n_least: int = _N_AT_LEAST,
    n_halvings: int = 0,
) -> Root:
    """Take steps of Newton's method, until all samples have converged or diverged if the host may wait for them."""
    r, n_iters = residual(x), torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    n_evals, start, is_settled = 1, x.abs().amax(-1), torch.zeros_like(n_iters, dtype=torch.bool)
    for _ in range(max_iters):
        limit = tol * _scale(x, start, is_early=n_iters < n_least)
        is_open = ~(is_settled | (r.abs().amax(-1) <= limit))  # NaN is not below anything
        if synchronises and not (is_open & x.isfinite().all(-1)).any():
            break
        step = torch.where(is_open.unsqueeze(-1), _solved(jacobian(residual, x), r), 0)
        # of stiff equations the rounding of the residual alone may be larger than the limit: the correction says more
        is_settled = is_settled | (is_open & (step.abs().amax(-1) <= limit))
        new, n_evals = residual(x - step), n_evals + x.shape[-1] + 1
        for _ in range(n_halvings):
            is_worse = is_open & ~is_settled & ~(new.abs().amax(-1) < r.abs().amax(-1))  # NaN is not below anything
            if not is_worse.any():
                break
            step = torch.where(is_worse.unsqueeze(-1), step / 2, step)
            new, n_evals = residual(x - step), n_evals + 1
        x, r, n_iters = x - step, new, n_iters + is_open
    is_small = r.abs().amax(-1) <= tol * _scale(x, start)
    return Root(x, n_iters, is_small | (is_settled & x.isfinite().all(-1)), n_evals)


def jacobian(function: Residual, x: Tensor) -> Tensor:
    """Derivative of a function that takes each sample by itself, shape ``(*batch, n, n)``."""
    value, pullback = torch.func.vjp(function, x)
    units = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    rows = torch.func.vmap(lambda unit: pullback(unit.expand_as(value))[0])(units)
    return rows.movedim(0, -2)


def must_not_synchronise(x: Tensor) -> bool:
    """Return whether a computation must not depend on values: mapped, compiled, or captured by a CUDA graph."""
    return is_traced() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _scale(x: Tensor, start: Tensor, *, is_early: Tensor | None = None) -> Tensor:
    """Size that residuals and corrections are compared with, of an iterate and the guess; NaN where it has run away.

    Of early iterates it is that of these alone.
    """
    size = x.abs().amax(-1)
    scale = 1 + torch.minimum(size, _GROWTH * (1 + start))
    if is_early is not None:
        # what is small beside one may be large beside a small state: the predictor itself, where no iteration follows
        scale = torch.where(is_early, torch.minimum(scale, torch.maximum(start, size)), scale)
    return torch.where(size.isfinite(), scale, torch.nan)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    # not `solve`, which waits for the device to see whether the matrix is singular; if so, what follows is not finite
    return torch.linalg.solve_ex(matrix, right.unsqueeze(-1))[0].squeeze(-1)
