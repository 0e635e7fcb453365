"""Solving ordinary differential equations: the one door to torchdiffeq."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.solvers import AdaptiveStepsizeODESolver, FixedGridODESolver

from odeopt.ode.checks import (
    State,
    check_choice,
    check_options,
    check_state,
    check_times,
    check_tolerances,
    tensors_of,
)
from odeopt.ode.recorder import Field, Recorder, SolverFailureError, restore
from odeopt.ode.solution import ADVICE, Solution, Status
from odeopt.ode.steps import EXPLICIT_METHODS, check_explicit, explicit_step

# torchdiffeq's own defaults, passed explicitly because the solver classes have others.
_RTOL, _ATOL = 1e-7, 1e-9

_UNIT_TIMES: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

# What the solvers of torchdiffeq say in their asserts. Anything else they assert is about the options.
_ASSERTED = {
    "underflow in dt": Status.STEP_SIZE_UNDERFLOW,
    "non-finite values in state": Status.NON_FINITE_STATE,
    "max_num_steps exceeded": Status.MAX_STEPS_REACHED,
}


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
    return issubclass(_solver_class(method), FixedGridODESolver)


def _solver_class(method: str) -> type:
    check_choice("method", method, SOLVERS)
    return SOLVERS[method]


@cache
def _accepted_options(method: str) -> frozenset[str]:
    """Options that a solver reads: the named arguments of its constructor and of its bases' ones."""
    names = {
        parameter.name
        for base in _solver_class(method).__mro__
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
    if hasattr(solver, "order") and "max_order" not in _accepted_options(name)
}


def integrate(
    field: Field,
    x0: State,
    t: Tensor | Sequence[float],
    *,
    method: str = "rk4",
    options: dict[str, Any] | None = None,
    rtol: float | Tensor | Sequence[float] = _RTOL,
    atol: float | Tensor | Sequence[float] = _ATOL,
    adjoint: bool = False,
    adjoint_params: Iterable[Tensor] | None = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_rtol: float | Tensor | Sequence[float] | None = None,
    adjoint_atol: float | Tensor | Sequence[float] | None = None,
) -> Solution:
    r"""Integrate an ordinary differential equation with any method of the installed torchdiffeq.

    .. math:: \dot x = f(t, x), \quad x(t_0) = x_0

    A solver that fails does not raise: the :class:`Solution` says how far it came, why it stopped and what
    to do. Errors raised by the field itself pass through unchanged.

    Outputs between the steps are interpolated: by the fixed-step methods linearly unless
    ``options={"interp": "cubic"}``, by the adaptive ones with a quartic (dopri8, at the default tolerances,
    is off by 1e-5 there and by 1e-10 at its steps); ``options={"step_t": t}`` puts steps on the outputs.
    ``explicit_adams`` climbs to order 11 by default and is then unstable at steps where rk4 is at home:
    give it ``options={"max_order": 5}``.

    Args:
        field: Module or function ``(t, x) -> dx/dt`` with the structure of ``x``; ``t`` is a 0-d tensor.
            torchdiffeq's callbacks (``field.callback_step`` and so on) are honoured.
        x0: State at ``t[0]``: a tensor of any shape, or a (named) tuple of tensors of one dtype.
        t: Output times, shape ``(n_times,)``, strictly increasing or decreasing, at least two.
        method: A name out of :func:`available_methods`.
        options: Options of the method, such as ``step_size`` for the fixed-step ones (without it they take
            one step per output time) or ``max_num_steps`` (between two outputs) for the adaptive ones.
        rtol: Relative tolerance of the adaptive methods; one per tensor if ``x0`` is a tuple.
        atol: Absolute tolerance, likewise.
        adjoint: Whether gradients come from the adjoint equation, solved backwards: less memory, but first
            derivatives only, and for fixed-step methods not the gradient of the discrete solution. A solver
            that fails in the backward pass raises there.
        adjoint_params: Tensors that the adjoint differentiates with respect to. Default:
            ``field.parameters()``.
        adjoint_method: Method of the backward pass. Default: ``method``.
        adjoint_options: Options of the backward pass. Default: ``options``.
        adjoint_rtol: Relative tolerance of the backward pass. Default: ``rtol``.
        adjoint_atol: Absolute tolerance of the backward pass. Default: ``atol``.

    Returns:
        States at every output time, with evaluations, steps, seconds and status.

    Raises:
        ValueError: If a parameter is wrong; the message names it and the value found.

    References:
        Chen, Rubanova, Bettencourt, Duvenaud (2018), Neural Ordinary Differential Equations.

    Example:
        >>> solution = integrate(lambda t, x: -x, torch.ones(2), torch.linspace(0.0, 1.0, 11), method="rk4")
        >>> solution.states.shape, solution.n_steps, solution.n_field_evals
        (torch.Size([11, 2]), 10, 40)
    """
    if not callable(field):
        raise ValueError(f"Parameter `field` should be a function of time and state. Found `field = {field!r}`.")
    check_choice("method", method, SOLVERS)
    check_options("options", options, method, _accepted_options(method))
    check_state(x0)
    check_tolerances(rtol=rtol, atol=atol, adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol)
    t = check_times(t, tensors_of(x0)[0])
    solve = partial(odeint, rtol=rtol, atol=atol, method=method, options=options)
    for_adjoint = {
        "adjoint_params": adjoint_params,
        "adjoint_method": adjoint_method,
        "adjoint_options": adjoint_options,
        "adjoint_rtol": adjoint_rtol,
        "adjoint_atol": adjoint_atol,
    }
    if adjoint:
        for_adjoint["adjoint_params"] = _check_adjoint(
            field, method, options, adjoint_params, adjoint_method, adjoint_options
        )
        solve = partial(odeint_adjoint, **solve.keywords, **for_adjoint)
    elif given := [name for name, value in for_adjoint.items() if value is not None]:
        raise ValueError(f"Parameter `{given[0]}` should be None without the adjoint. Found `adjoint = False`.")
    elif _is_external(method) and torch.is_grad_enabled() and any(x.requires_grad for x in tensors_of(x0)):
        raise ValueError(
            f"Parameter `x0` should not require grad with method {method!r}, which passes no gradient on. "
            "Found `x0.requires_grad = True`. Set `adjoint=True`, or choose another method."
        )

    callbacks = SOLVERS[method].valid_callbacks()
    recorder = Recorder(field, x0, t, callbacks=callbacks, is_external=_is_external(method))
    start = time.perf_counter()
    try:
        states, status, detail = _attempt(solve, recorder, x0, t)
        account = recorder.n_evals, recorder.n_steps, time.perf_counter() - start
    except SolverFailureError as failure:
        status, detail = failure.status, str(failure)
        account = recorder.n_evals, recorder.n_steps, time.perf_counter() - start
        states = _reached_states(solve, recorder, x0, t)
    if status is not Status.SUCCESS:
        reached = f"reached t = {t[len(states[0]) - 1].item():g} of {t[-1].item():g}"
        detail = f"{status.capitalize()} ({reached}): {detail} {ADVICE[status]}"
    states = [_fill(x, len(t)) for x in states]
    states = restore(x0, states) if isinstance(x0, tuple) else states[0]
    return Solution(t, states, *account, status, detail)


def _attempt(
    solve: Callable[[Recorder, State, Tensor], State], recorder: Recorder, x0: State, t: Tensor
) -> tuple[list[Tensor], Status, str]:
    """Solve once. Return the finite states, the status and its detail; raise if no states came back."""
    method, options = solve.keywords["method"], solve.keywords["options"]
    warns = _is_external(method) or "max_iters" in _accepted_options(method)
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
        return states, *recorder.explain(Status.STOPPED_EARLY, "SciPy returned before the last time.")
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


def _is_external(method: str) -> bool:
    """Whether the steps are taken outside torch, where neither gradients nor callbacks reach."""
    return not issubclass(SOLVERS[method], (FixedGridODESolver, AdaptiveStepsizeODESolver))


def _fill(x: Tensor, n_times: int) -> Tensor:
    if len(x) == n_times:
        return x
    return torch.cat([x, x.new_full((n_times - len(x), *x.shape[1:]), torch.nan)])


def _check_adjoint(
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
    check_options("adjoint_options", adjoint_options, name, _accepted_options(name))
    if adjoint_params is not None:
        return tuple(adjoint_params)
    if not isinstance(field, nn.Module):
        raise ValueError(
            "Parameter `adjoint_params` should name the tensors that `field` depends on (`()` for none) when "
            "`adjoint = True` and `field` is not a module. Found `adjoint_params = None`."
        )
    return tuple(field.parameters())


def integrate_unit(field: Field, x0: Tensor, *, method: str = "rk4", backend: str = "auto") -> Tensor:
    r"""Integrate over the unit of time, in one step of a fixed-step method: the cheap entry for update rules.

    .. math:: \dot x = f(t, x), \quad x(0) = x_0 \;\mapsto\; x(1)

    With the backend ``"torchdiffeq"`` bit for bit ``torchdiffeq.odeint`` with ``options={"step_size": 1.0}`` and
    times in the dtype of ``x0``, without its checks and copies; with ``"odeopt"``, the steps of
    :func:`explicit_step`, equal to it to rounding at fewer operations. With a Runge-Kutta method nothing waits for
    the device, elementwise fields keep the memory layout of ``x0``, and the step can be differentiated any number
    of times, mapped (``torch.func``) and compiled. Adaptive methods are taken too, at ``rtol=1e-7, atol=1e-9``;
    they choose one step size for all coordinates, and so couple them.

    Args:
        field: Function ``(t, x) -> dx/dt`` with the shape of ``x``; ``t`` is a 0-d tensor to be read only.
        x0: State at time 0, any shape.
        method: A name out of :func:`available_methods`.
        backend: Whose steps to take: ``"odeopt"`` has :data:`EXPLICIT_METHODS`, ``"torchdiffeq"`` every method;
            ``"auto"`` takes ours where there is one.

    Returns:
        State at time 1, with the shape and dtype of ``x0``.

    Raises:
        ValueError: If there is no such backend or it has no such method, or if the method passes no gradient on
            where one is recorded.
    """
    check_choice("backend", backend, ("auto", "odeopt", "torchdiffeq"))
    if backend == "odeopt" or method == "exponential":
        check_explicit(method)
    if backend != "torchdiffeq" and method in EXPLICIT_METHODS:
        return explicit_step(field, _unit_times(x0)[0], 1.0, x0, method)
    solver = _solver_class(method)
    t0, t1 = _unit_times(x0)
    if _is_external(method) and torch.is_grad_enabled() and field(t0, x0).requires_grad:
        # the gradient would not be missing but silently wrong: what surrounds the step still passes its own
        raise ValueError(
            "Parameter `method` should pass gradients on where they are recorded; use `torch.no_grad`, or another "
            f"method. Found `method = {method!r}`."
        )
    if not issubclass(solver, FixedGridODESolver):
        return odeint(field, x0, torch.stack((t0, t1)), rtol=_RTOL, atol=_ATOL, method=method)[-1]

    def stage(t: Tensor, x: Tensor, perturb: Any = None) -> Tensor:
        return field(t, x)

    step = solver(func=stage, y0=x0, rtol=_RTOL, atol=_ATOL)._step_func
    return x0 + step(stage, t0, t1, t1, x0)[0]


def _unit_times(x0: Tensor) -> tuple[Tensor, Tensor]:
    """Return 0 and 1 as 0-d tensors; kept, because making them would cost two launches at every step."""
    real = x0.real if x0.is_complex() else x0
    key = (real.dtype, real.device)
    # A tensor of a trace must not outlive it; one of inference mode could not be saved for autograd later.
    is_traced = torch.compiler.is_compiling()
    times = None if is_traced else _UNIT_TIMES.get(key)
    if times is None:
        with nullcontext() if is_traced else torch.inference_mode(False):
            # Not x0.new_zeros, which would be batched under vmap.
            times = torch.zeros((), dtype=key[0], device=key[1]), torch.ones((), dtype=key[0], device=key[1])
        if type(times[0]) is Tensor and not is_traced:
            _UNIT_TIMES[key] = times
    return times
