"""The one door to torchdiffeq: its methods, what they accept, and what became of an attempt to solve."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint_event
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.solvers import AdaptiveStepsizeODESolver, FixedGridODESolver

from odeopt.ode.checks import State, check_choice, check_options, tensors_of
from odeopt.ode.recorder import Field, Recorder, SolverFailureError, restore
from odeopt.ode.solution import ADVICE, Solution, Status

# torchdiffeq's own defaults, passed explicitly because the solver classes have others.
RTOL, ATOL = 1e-7, 1e-9

# What the solvers of torchdiffeq say in their asserts. Anything else they assert is about the options.
_ASSERTED = {
    "underflow in dt": Status.STEP_SIZE_UNDERFLOW,
    "non-finite values in state": Status.NON_FINITE_STATE,
    "max_num_steps exceeded": Status.MAX_STEPS_REACHED,
}

_SCIPY_STOPPED = "SciPy returned before the last time."


def available_methods() -> tuple[str, ...]:
    """Return the names of the methods that the installed torchdiffeq offers."""
    return tuple(SOLVERS)


def is_fixed_step(method: str) -> bool:
    """Return whether a method takes steps of a given size, rather than choosing them by an error estimate.

    Args:
        method: A name out of :func:`available_methods`.

    Raises:
        ValueError: If there is no such method.
    """
    return issubclass(solver_class(method), FixedGridODESolver)


def solver_class(method: str) -> type:
    """Return torchdiffeq's class of a method, or refuse the name."""
    check_choice("method", method, SOLVERS)
    return SOLVERS[method]


@cache
def accepted_options(method: str) -> frozenset[str]:
    """Options that a solver reads: the named arguments of its constructor and of its bases' ones."""
    names = {
        parameter.name
        for base in solver_class(method).__mro__
        if "__init__" in vars(base)
        for parameter in inspect.signature(base.__init__).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    # The last one is decided by the name of the method: implicit_adams or explicit_adams.
    return frozenset(names - {"self", "func", "y0", "rtol", "atol", "implicit"})


# Nominal orders of the Runge-Kutta methods; the Adams methods (known by `max_order`) have a variable one.
ORDER: dict[str, int] = {
    name: solver.order
    for name, solver in SOLVERS.items()
    if hasattr(solver, "order") and "max_order" not in accepted_options(name)
}


def solved(solve: partial, field: Field, x0: State, t: Tensor, method: str) -> Solution:
    """Let torchdiffeq solve, and account for it."""
    callbacks = SOLVERS[method].valid_callbacks()
    recorder = Recorder(field, x0, t, callbacks=callbacks, is_external=is_external(method))
    start = time.perf_counter()
    try:
        states, status, detail = _attempt(solve, recorder, x0, t)
        account = recorder.n_evals, recorder.n_steps, time.perf_counter() - start
    except SolverFailureError as failure:
        status, detail = failure.status, str(failure)
        account = recorder.n_evals, recorder.n_steps, time.perf_counter() - start
        states = _reached_states(solve, recorder, x0, t)
    detail = message_of(status, detail, t, len(states[0]))
    states = [fill(x, len(t)) for x in states]
    states = restore(x0, states) if isinstance(x0, tuple) else states[0]
    return Solution(t, states, *account, status, detail, method)


def message_of(status: Status, detail: str, t: Tensor, n_reached: int) -> str:
    """Say what happened, how far it came and what to do about it."""
    if status is Status.SUCCESS:
        return detail
    if status is Status.NOT_CHECKED:  # nor can a compiler trace much of what strings do
        return f"Not checked: {detail} {ADVICE[Status.NOT_CHECKED]}"
    reached = f"reached t = {t[n_reached - 1].item():g} of {t[-1].item():g}"
    return f"{status.capitalize()} ({reached}): {detail} {ADVICE[status]}"


def _attempt(
    solve: Callable[[Recorder, State, Tensor], State], recorder: Recorder, x0: State, t: Tensor
) -> tuple[list[Tensor], Status, str]:
    """Solve once. Return the finite states, the status and its detail; raise if no states came back."""
    method, options = solve.keywords["method"], solve.keywords["options"]
    warns = is_external(method) or "max_iters" in accepted_options(method)
    with _held_warnings() if warns else nullcontext([]) as held:
        try:
            states = list(tensors_of(solve(recorder, x0, t)))
        except AssertionError as error:
            if error is recorder.user_error:
                raise
            status = next((status for text, status in _ASSERTED.items() if text in str(error)), None)
            if status is None:
                raise ValueError(
                    f"Parameter `options` should suit method {method!r}. Found `options = {options}`: {error}"
                ) from error
            detail = f"{str(error).partition(':')[0]}."
            raise SolverFailureError(*recorder.explain(status, detail)) from error
        except RuntimeError as error:
            # torchdiffeq gives what SciPy has of a tuple the shape of a whole solution
            if not (is_external(method) and "is invalid for input of size" in str(error)):
                raise
            raise SolverFailureError(*recorder.explain(Status.STOPPED_EARLY, _SCIPY_STOPPED)) from error
        except ValueError as error:
            if "array must not contain infs or NaNs" not in str(error):
                raise
            raise SolverFailureError(Status.NON_FINITE_STATE, "found by SciPy's linear algebra.") from error
    is_finite = torch.stack([x.detach().unsqueeze(-1).flatten(1).isfinite().all(1) for x in states]).all(0)
    n_finite = int(is_finite.cumprod(0).sum())
    if n_finite == 0:  # SciPy gives the initial state back wrong, or not at all, when its first step fails
        states, n_finite = [x[None] for x in tensors_of(x0)], 1
    elif n_finite < len(is_finite):
        return [x[:n_finite] for x in states], Status.NON_FINITE_STATE, "the next output has NaN or inf."
    if n_finite < len(t):
        return states, *recorder.explain(Status.STOPPED_EARLY, _SCIPY_STOPPED)
    if any("did not converge" in text for text in held):
        return states, Status.NOT_CONVERGED, "in at least one step."
    return states, Status.SUCCESS, "Reached the last time."


def _reached_states(
    solve: Callable[[Recorder, State, Tensor], State], recorder: Recorder, x0: State, t: Tensor
) -> list[Tensor]:
    """Repeat the part before a failure; steps do not depend on later outputs, so it comes out the same."""
    for n_times in range(recorder.n_reached(t), 1, -1):
        # A second failure means that the last of these outputs lies within rounding of the first one.
        with suppress(SolverFailureError):
            return _attempt(solve, recorder, x0, t[:n_times])[0]
    return [x[None] for x in tensors_of(x0)]


@contextmanager
def _held_warnings() -> Iterator[list[str]]:
    """Hold back what a solver says of itself, which becomes a status; let the field's warnings through."""
    solver_says = (
        "did not converge",  # torchdiffeq's implicit methods
        "for a chosen solver",  # torchdiffeq hands `min_step` to each method of SciPy; most do not read it
        "lsoda",
        "encountered in ",
        "x.T` on tensors",  # torchdiffeq transposes SciPy's empty result
    )
    held: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield held
    finally:
        for warning in caught:
            text = str(warning.message)
            if any(words in text for words in solver_says):
                held.append(text)
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def is_external(method: str) -> bool:
    """Whether the steps are taken outside torch, where neither gradients nor callbacks reach."""
    return not issubclass(SOLVERS[method], (FixedGridODESolver, AdaptiveStepsizeODESolver))


def fill(x: Tensor, n_times: int) -> Tensor:
    """Fill up outputs that were not reached with NaN."""
    if len(x) == n_times:
        return x
    return torch.cat([x, x.new_full((n_times - len(x), *x.shape[1:]), torch.nan)])


def check_adjoint(
    field: Field,
    method: str,
    options: dict[str, Any] | None,
    adjoint_params: Iterable[Tensor] | None,
    adjoint_method: str | None,
    adjoint_options: dict[str, Any] | None,
) -> tuple[Tensor, ...]:
    """Check the adjoint's parameters and return the tensors to differentiate with respect to."""
    if adjoint_method is not None:
        check_choice("adjoint_method", adjoint_method, SOLVERS)
        if adjoint_method != method and options and adjoint_options is None:
            raise ValueError(
                "Parameter `adjoint_options` should be given when `options` are and `adjoint_method` differs "
                f"from `method = {method!r}`. Found `adjoint_method = {adjoint_method!r}`."
            )
    name = adjoint_method or method
    check_options("adjoint_options", adjoint_options, name, accepted_options(name))
    if adjoint_params is not None:
        return tuple(adjoint_params)
    if not isinstance(field, nn.Module):
        raise ValueError(
            "Parameter `adjoint_params` should name the tensors that `field` depends on (`()` for none) when "
            "`adjoint = True` and `field` is not a module. Found `adjoint_params = None`."
        )
    return tuple(field.parameters())


@torch.no_grad()
def time_of_event(
    field: Field,
    x0: State,
    start: float,
    end: float,
    event: Callable[[Tensor, State], Tensor],
    *,
    method: str,
    options: dict[str, Any] | None = None,
    rtol: float = RTOL,
    atol: float = ATOL,
) -> float | None:
    """Find when an event happens first, by torchdiffeq's bisection on the interpolated solution.

    Args:
        field: As in :func:`odeopt.ode.integrate`.
        x0: State at ``start``.
        start: Time at which to begin.
        end: Later time at which to give up.
        event: Function of time and state, positive before the event and negative after it, a 0-d tensor.
        method: One of torchdiffeq's own methods.
        options: Options of the method; the fixed-step ones need a ``step_size``.
        rtol: Relative tolerance.
        atol: Absolute tolerance, of the time too.

    Returns:
        The time; ``start`` where the event has happened already, None where it does not happen before ``end``.
    """
    like = tensors_of(x0)[0]
    t0 = like.new_tensor(start)
    if event(t0, x0) <= 0:
        return start

    def either(t: Tensor, x: State) -> Tensor:
        return torch.minimum(event(t, restore(x0, x)), (end - t).to(like.dtype))

    def plain(t: Tensor, x: State) -> Any:
        return field(t, restore(x0, x))

    keywords = {"method": method, "options": options, "rtol": rtol, "atol": atol}
    found, _ = odeint_event(plain, x0 if isinstance(x0, Tensor) else tuple(x0), t0, event_fn=either, **keywords)
    return found.item() if found.item() < end - 2 * max(atol, torch.finfo(like.dtype).eps * abs(end)) else None
