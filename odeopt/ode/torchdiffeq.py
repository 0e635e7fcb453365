"""The one door to torchdiffeq: its methods, what they accept, and what became of an attempt to solve.

It is imported where it is first used: SciPy comes with it, and takes longer to import than the rest of this library.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from odeopt.checks import require
from odeopt.ode.checks import (
    State,
    check_choice,
    check_options,
    clock_dtype,
    digits_of,
    real_dtype,
    tensors_of,
    time_dtype,
)
from odeopt.ode.recorder import Field, Recorder, SolverFailureError, Timed, UnresolvedTimesError, restore
from odeopt.ode.solution import ADVICE, Solution, Status
from odeopt.ode.steps import EXPLICIT_METHODS

# torchdiffeq's own defaults, passed explicitly because the solver classes have others.
RTOL, ATOL = 1e-7, 1e-9

# What the solvers of torchdiffeq say in their asserts. Anything else they assert is about the options.
_ASSERTED = {
    "underflow in dt": Status.STEP_SIZE_UNDERFLOW,
    "non-finite values in state": Status.NON_FINITE_STATE,
    "max_num_steps exceeded": Status.MAX_STEPS_REACHED,
}

# An adaptive method takes the rounding of times for an error where its steps have fewer roundings than this.
_ROUNDINGS_OF_ESTIMATES = 100

_NO_GRADIENT = "set `adjoint=True`, choose another method or use `torch.no_grad`"
_SCIPY_STOPPED = "SciPy returned before the last time."


def available_methods() -> tuple[str, ...]:
    """Return the names of the methods that the installed torchdiffeq offers."""
    return tuple(_solvers())


def _solvers() -> dict[str, type]:
    """Classes of the methods by name. Whatever else is imported of torchdiffeq comes after a call of this."""
    if "torchdiffeq" not in sys.modules:  # whose tensors are to be real ones on the CPU, whatever the modes of the call
        with _disable_current_modes(), torch.device("cpu"):
            importlib.import_module("torchdiffeq")
    from torchdiffeq._impl.odeint import SOLVERS

    return SOLVERS


def is_fixed_step(method: str) -> bool:
    """Return whether a method takes steps of a given size, rather than choosing them by an error estimate.

    Args:
        method: A name out of :func:`available_methods`.

    Raises:
        ValueError: If there is no such method.
    """
    return solver_class(method).valid_callbacks() == {"callback_step"}  # adaptive ones accept and reject steps, too


def solver_class(method: str) -> type:
    """Return torchdiffeq's class of a method, or refuse the name."""
    solvers = _solvers()
    check_choice("method", method, solvers)
    return solvers[method]


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


def nominal_order(method: str) -> int | None:
    """Return the order of a method; None of one of variable order, as the Adams methods, or of SciPy's.

    Args:
        method: A name out of :func:`available_methods`.

    Raises:
        ValueError: If there is no such method.
    """
    order = getattr(solver_class(method), "order", None)
    return None if "max_order" in accepted_options(method) else order


def by_torchdiffeq(
    field: Field, x0: State, t: Tensor, keywords: dict[str, Any], span: float | None = None, *, may_leave_out: bool
) -> Solution:
    """Let torchdiffeq solve, and account for it.

    It calls fields with times in the dtype of the state. Where that is too coarse for the steps, or for the error
    estimates of an adaptive method, the solver gets the state in a finer one; the field never does.

    Args:
        field: As in :func:`odeopt.ode.integrate`.
        x0: The first state.
        t: Output times.
        keywords: Method, options and tolerances; for gradients by the adjoint those of the adjoint, too.
        span: From the first time to the last one, where ``t`` is a subinterval between them.
        may_leave_out: Whether the field may depend on more than the parameters of the adjoint, as they were chosen.
    """
    from torchdiffeq import odeint, odeint_adjoint

    method, options = keywords["method"], keywords["options"] or {}
    # what is interpolated has a coarse slope, and at a knot it spoils what follows
    is_adjoint = "adjoint_params" in keywords
    ends_at_outputs = span is not None or (t.requires_grad and not is_adjoint)
    if ends_at_outputs and "step_t" in accepted_options(method):
        keywords = keywords | {"options": _ending_at(t, options)}
    if is_adjoint:
        params = _check_adjoint(field, method, options, keywords)
        keywords = keywords | {"adjoint_params": params}
        if keywords["adjoint_options"] is None:
            own = {name: value for name, value in options.items() if name != "norm"}
            # the adjoint goes from output to output, and would take each from a coarser interpolation
            has_steps = "step_t" in accepted_options(keywords["adjoint_method"] or method)
            keywords["adjoint_options"] = _ending_at(t, own) if has_steps else own
        check_leaves = None if may_leave_out else partial(_refuse_left_out, params)
    else:
        _check_gradients(x0, t, method, options)
        check_leaves = _refuse_gradients if is_external(method) else None
    solve = partial(odeint_adjoint if is_adjoint else odeint, **keywords)
    like = tensors_of(x0)[0]
    numbers, callbacks = t.detach().tolist(), _solvers()[method].valid_callbacks()
    interval = min(abs(end - start) for start, end in pairwise(numbers))
    step = min(interval, float(options.get("step_size") or interval))
    clock = clock_dtype(like, max(map(abs, numbers)), step, span or abs(numbers[-1] - numbers[0]))
    is_steady, work, origin = is_fixed_step(method), like.dtype, None
    outputs, t = t, t.clone()  # a field may write to what it is called with
    if is_external(method):
        # computes in double precision anyway, and takes the size of times for that of steps
        work, origin = torch.promote_types(work, torch.float64), t[0].double()
        t = t.double() - origin
    elif not is_steady:
        work = torch.promote_types(work, torch.float32)
    n_evals, start = 0, time.perf_counter()
    while True:
        if clock is torch.float64:
            work, t = torch.promote_types(work, torch.float64), t.double()
        recorder = Recorder(
            field,
            x0,
            t,
            callbacks=callbacks,
            is_external=is_external(method),
            work=work,
            clock=clock,
            origin=origin,
            # the steps of an adaptive method are not known before
            coarsest=0.0 if is_steady or clock is torch.float64 else _ROUNDINGS_OF_ESTIMATES * torch.finfo(clock).eps,
            check_leaves=check_leaves if torch.is_grad_enabled() else None,
            known=params if is_adjoint else (),
        )
        try:
            states, status, detail = _attempt(solve, recorder, t)
            break
        except UnresolvedTimesError:
            n_evals, clock = n_evals + recorder.n_evals, torch.float64
        except SolverFailureError as failure:
            status, detail, states = failure.status, str(failure), None
            break
    account = n_evals + recorder.n_evals, recorder.n_steps, time.perf_counter() - start
    if states is None:
        states = _reached_states(solve, recorder, t)
    detail = message_of(status, detail, outputs, len(states[0]))
    states = restore(x0, [fill(x, len(t)) for x in recorder.settled(states)])
    return Solution(outputs, states, *account, status, detail, method)


def _ending_at(t: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Options with which an adaptive method ends steps at the outputs, beside where it is told to."""
    kind, t = {"dtype": time_dtype(t.device), "device": t.device}, t.detach().to(time_dtype(t.device))
    steps, jumps = (
        torch.as_tensor(() if options.get(name) is None else options[name], **kind) for name in ("step_t", "jump_t")
    )
    return options | {"step_t": torch.cat([steps, t[~torch.isin(t, jumps)]]).unique()}


def reachable(
    rtol: Any, atol: Any, x0: State, names: tuple[str, str] = ("rtol", "atol"), *, has_zeros: bool = False
) -> tuple[Any, Any]:
    """Raise tolerances that a state cannot resolve to what it can, with a warning.

    The rounding of the field passes for an error of the step, of about a rounding of what the step adds. Under a
    sixteenth of a rounding of the state steps become too short to change it, and the solver stands still. No tolerance
    at all for entries that are zero makes the error estimate 0/0.

    Args:
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        x0: The state; its largest entry is the scale.
        names: Names of the parameters.
        has_zeros: Whether entries of what is solved are zero whatever ``x0`` is.
    """
    tensors = tensors_of(x0)
    floor = torch.finfo(tensors[0].dtype).eps / 16
    scale = max((x.detach().abs().max().item() for x in tensors if x.numel()), default=0.0)
    has_zeros = has_zeros or any(bool((x == 0).any()) for x in tensors)
    relative, absolute = (
        [torch.as_tensor(v, dtype=torch.float64).cpu() for v in tensors_of(tol)] for tol in (rtol, atol)
    )
    n = max(len(relative), len(absolute))
    pairs = zip(relative * (n // len(relative)), absolute * (n // len(absolute)), strict=True)
    if not any(bool(((r < floor) & (a < floor * scale) | (a == 0) & has_zeros).any()) for r, a in pairs):
        return rtol, atol
    floors = floor, floor / 128 * (scale or 1.0)
    raised = tuple(_at_least(tol, floor) for tol, floor in zip((rtol, atol), floors, strict=True))
    warnings.warn(
        f"Parameters `{names[0]}` and `{names[1]}` are raised to what {tensors[0].dtype} resolves, {floors[0]:.2g} and "
        f"{floors[1]:.2g} at least. Found `{names[0]} = {rtol}`, `{names[1]} = {atol}`.",
        UserWarning,
        stacklevel=3,
    )
    return raised


def _at_least(tolerance: Any, floor: float) -> Any:
    if isinstance(tolerance, tuple | list):
        return tuple(_at_least(each, floor) for each in tolerance)
    return tolerance.clamp(min=floor) if isinstance(tolerance, Tensor) else max(tolerance, floor)


def reads_tolerances(method: str) -> bool:
    """Return whether a method of torchdiffeq depends on its tolerances: an adaptive one, or one that iterates."""
    return not is_fixed_step(method) or ("max_iters" in accepted_options(method) and method != "explicit_adams")


def message_of(status: Status, detail: str, t: Tensor, n_reached: int) -> str:
    """Say what happened, how far it came and what to do about it."""
    if status is Status.SUCCESS:
        return detail
    if status is Status.NOT_CHECKED:  # nor can a compiler trace much of what strings do
        return f"Not checked: {detail} {ADVICE[Status.NOT_CHECKED]}"
    reached = f"reached t = {digits_of(t[n_reached - 1])} of {digits_of(t[-1])}"
    return f"{status.capitalize()} ({reached}): {detail} {ADVICE[status]}"


def _attempt(
    solve: Callable[[Recorder, State, Tensor], State], recorder: Recorder, t: Tensor
) -> tuple[list[Tensor], Status, str]:
    """Solve once. Return the finite states, the status and its detail; raise if no states came back."""
    method, options = solve.keywords["method"], solve.keywords["options"]
    warns = is_external(method) or "max_iters" in accepted_options(method)
    with _held_warnings() if warns else nullcontext([]) as held:
        try:
            states = list(tensors_of(solve(recorder, recorder.lifted(), t)))
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
        states, n_finite = [x[None] for x in tensors_of(recorder.lifted())], 1
    elif n_finite < len(is_finite):
        return [x[:n_finite] for x in states], Status.NON_FINITE_STATE, "the next output has NaN or inf."
    if n_finite < len(t):
        return states, *recorder.explain(Status.STOPPED_EARLY, _SCIPY_STOPPED)
    if any("did not converge" in text for text in held):
        return states, Status.NOT_CONVERGED, "in at least one step."
    return states, Status.SUCCESS, "Reached the last time."


def _reached_states(solve: Callable[[Recorder, State, Tensor], State], recorder: Recorder, t: Tensor) -> list[Tensor]:
    """Repeat the part before a failure; steps do not depend on later outputs, so it comes out the same."""
    for n_times in range(recorder.n_reached(t), 1, -1):
        # A second failure means that the last of these outputs lies within rounding of the first one.
        with suppress(SolverFailureError):
            return _attempt(solve, recorder, t[:n_times])[0]
    return [x[None] for x in tensors_of(recorder.lifted())]


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
    """Return whether the steps are taken outside torch, where neither gradients nor callbacks reach."""
    return not solver_class(method).valid_callbacks()


def fill(x: Tensor, n_times: int) -> Tensor:
    """Fill up outputs that were not reached with NaN."""
    if len(x) == n_times:
        return x
    return torch.cat([x, x.new_full((n_times - len(x), *x.shape[1:]), torch.nan)])


def _check_adjoint(field: Field, method: str, options: dict[str, Any], for_adjoint: dict) -> tuple[Tensor, ...]:
    """Check the adjoint's parameters and return the tensors to differentiate with respect to."""
    name, adjoint_options = for_adjoint["adjoint_method"] or method, for_adjoint["adjoint_options"]
    is_clear = name == method or not options or adjoint_options is not None
    wanted = f"given when `options` are and `adjoint_method = {name!r}` differs from `method = {method!r}`"
    require(is_clear, "adjoint_options", adjoint_options, wanted)
    check_options("adjoint_options", adjoint_options, name, accepted_options(name))
    if for_adjoint["adjoint_params"] is not None:
        return tuple(for_adjoint["adjoint_params"])
    wanted = "the tensors that `field` depends on (`()` for none) when `adjoint = True` and `field` is not a module"
    require(isinstance(field, nn.Module), "adjoint_params", None, wanted)
    return tuple(field.parameters())


def _check_gradients(x0: State, t: Tensor, method: str, options: dict[str, Any]) -> None:
    """Refuse to drop a gradient that is recorded, where no adjoint is solved."""
    if not torch.is_grad_enabled():
        return
    for name, tensors in (("x0", tensors_of(x0)), ("t", (t,))):
        is_kept = not is_external(method) or not any(x.requires_grad for x in tensors)
        wanted = f"False with method {method!r}, which passes no gradient on ({_NO_GRADIENT})"
        require(is_kept, f"{name}.requires_grad", True, wanted)
    has_own_grid = is_fixed_step(method) and any(options.get(x) for x in ("step_size", "grid_constructor"))
    wanted = (
        f"False where {', '.join(map(repr, options))} decide where the steps of torchdiffeq lie, which then passes no "
        "gradient on to the times between (leave these options out, or set `backend='odeopt'`, which has "
        f"{', '.join(EXPLICIT_METHODS)})"
    )
    require(not (t.requires_grad and has_own_grid), "t.requires_grad", True, wanted)


def _refuse_gradients(leaves: list[Tensor]) -> None:
    """Refuse a field that depends on what requires grad, where the method passes no gradient on."""
    if leaves:
        raise ValueError(
            "Parameter `field` should not depend on what requires grad with method 'scipy_solver', which passes no "
            f"gradient on ({_NO_GRADIENT}). Found a tensor of shape {tuple(leaves[0].shape)} that does."
        )


def _refuse_left_out(adjoint_params: Iterable[Tensor], leaves: list[Tensor]) -> None:
    """Refuse an adjoint whose parameters, which were not given, leave out what the field depends on."""
    known = {id(x) for x in adjoint_params}
    left_out = [tuple(x.shape) for x in leaves if id(x) not in known]
    if left_out:
        raise ValueError(
            "Parameter `adjoint_params` should name all tensors that `field` depends on where not all of them are "
            f"parameters of the module. Found {len(left_out)} more that require grad, of shapes {left_out[:3]}."
        )


def unit_step(field: Field, x0: Tensor, t0: Tensor, t1: Tensor, method: str) -> Tensor:
    """Integrate from one time to another in one step; see :func:`odeopt.ode.integrate_unit`."""
    solver = solver_class(method)
    if is_external(method) and torch.is_grad_enabled() and field(t0, x0).requires_grad:
        # the gradient would not be missing but silently wrong: what surrounds the step still passes its own
        wanted = "one that passes gradients on where they are recorded; use `torch.no_grad`, or another method"
        require(False, "method", method, wanted)
    if not is_fixed_step(method):
        from torchdiffeq import odeint

        return odeint(field, x0, torch.stack((t0, t1)), rtol=RTOL, atol=ATOL, method=method)[-1]

    def stage(t: Tensor, x: Tensor, perturb: Any = None) -> Tensor:
        return field(t, x)

    step = solver(func=stage, y0=x0, rtol=RTOL, atol=ATOL)._step_func
    return x0 + step(stage, t0, t1, t1, x0)[0]


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
    _solvers()
    from torchdiffeq import odeint_event

    like = tensors_of(x0)[0]
    origin = torch.tensor(start, dtype=time_dtype(like.device), device=like.device)
    event, field = (Timed(function, real_dtype(like)) for function in (event, field))
    if event(origin, x0) <= 0:
        return start

    # counted from the start, as the solver rounds times to the dtype of the state
    def either(t: Tensor, x: State) -> Tensor:
        return torch.minimum(event(origin + t, restore(x0, tensors_of(x))), (end - start - t).to(like.dtype))

    def plain(t: Tensor, x: State) -> Any:
        return field(origin + t, restore(x0, tensors_of(x)))

    keywords = {"method": method, "options": options, "rtol": rtol, "atol": atol}
    x0 = x0.clone() if isinstance(x0, Tensor) else tuple(x0)
    found = odeint_event(plain, x0, torch.zeros_like(origin), event_fn=either, **keywords)[0].item()
    return start + found if found < end - start - 2 * max(atol, torch.finfo(like.dtype).eps * (end - start)) else None
