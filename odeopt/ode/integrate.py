"""Solving ordinary differential equations: torchdiffeq's methods and ours under one call."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from odeopt.checks import require, require_flags
from odeopt.ode.checks import (
    State,
    check_choice,
    check_numbers,
    check_options,
    check_state,
    check_times,
    check_tolerances,
    tensors_of,
    time_dtype,
)
from odeopt.ode.grid import NEWTON_OPTIONS, STEP_OPTIONS, Times, explicit_steps, subintervals, system_steps, times_of
from odeopt.ode.implicit import Newton, must_not_synchronise
from odeopt.ode.inputs import FirstOrderHold, Input, ZeroOrderHold, checked_input, knots_of, piece_of
from odeopt.ode.recorder import Field, map_state
from odeopt.ode.solution import Solution, Status
from odeopt.ode.steps import EXPLICIT_METHODS, check_explicit, explicit_step
from odeopt.ode.structured import STRUCTURE_METHODS
from odeopt.ode.torchdiffeq import (
    ATOL,
    RTOL,
    accepted_options,
    available_methods,
    by_torchdiffeq,
    fill,
    message_of,
    reachable,
    reads_tolerances,
    unit_step,
)
from odeopt.physics import PhaseState, PortHamiltonianSystem

_UNIT_TIMES: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
BACKENDS = ("auto", "odeopt", "torchdiffeq")


def integrate(
    field: Field | PortHamiltonianSystem,
    x0: State,
    t: Tensor | Sequence[float],
    *,
    method: str = "rk4",
    backend: str = "auto",
    options: dict[str, Any] | None = None,
    rtol: float | Tensor | Sequence[float] = RTOL,
    atol: float | Tensor | Sequence[float] = ATOL,
    u: Tensor | Input | None = None,
    z: Any = None,
    adjoint: bool = False,
    adjoint_params: Iterable[Tensor] | None = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_rtol: float | Tensor | Sequence[float] | None = None,
    adjoint_atol: float | Tensor | Sequence[float] | None = None,
    event_fn: None = None,
    throw: bool = False,
) -> Solution:
    r"""Integrate an ordinary differential equation, or a port-Hamiltonian system with inputs.

    .. math:: \dot x = f(t, x), \quad x(t_0) = x_0 \qquad\text{or}\qquad
              \dot x = (J - R(x))\,\nabla H(x) + B(x)\,u(t)

    A solver that fails does not raise unless ``throw=True``: the :class:`Solution` says how far it came, why it stopped
    and what to do. So read ``solution.status``, or call ``solution.raise_for_status()``. Errors raised by the field
    itself pass through unchanged.

    Times are kept in double precision, whatever the state is in: the solution does not depend on where the clock
    starts. States keep their dtype, whatever the field returns. Gradients reach the state, the times, the parameters of
    the field and inputs; a method that would drop one which is recorded is refused.

    There are the methods of the installed torchdiffeq, and :data:`~odeopt.ode.STRUCTURE_METHODS` for systems, see
    :func:`~odeopt.ode.structure_step`. The explicit fixed-step ones are written here, too. Our own steps end at the
    output times (each interval is cut into the fewest equal ones of at most ``step_size``), can be differentiated any
    number of times, mapped (``torch.func``) and compiled (``fullgraph=True``) with ``t`` as a list of numbers, and
    do not synchronise with the host between the check of ``x0`` and the end; Newton iterations of structure-preserving
    steps do, unless they are mapped, compiled or captured by a CUDA graph.

    Outputs between the steps of torchdiffeq are interpolated: by the fixed-step methods linearly unless
    ``options={"interp": "cubic"}``, by the adaptive ones with a quartic (dopri8, at the default tolerances,
    is off by 1e-5 there and by 1e-10 at its steps); ``options={"step_t": t}`` ends steps at the outputs. Where ``t``
    requires grad, the adaptive ones always end steps. A system is solved anew from each output, or knot of its input,
    to the next: nothing is interpolated, and multistep methods never leave their first steps (pass
    ``lambda t, x: system.vector_field(PhaseState(*x))`` to have them go on).
    ``explicit_adams`` climbs to order 11 by default and is then unstable at steps where rk4 is at home:
    give it ``options={"max_order": 5}``.

    Args:
        field: Module or function ``(t, x) -> dx/dt`` with the structure of ``x``, which it must not write to; ``t`` is
            a 0-d tensor in the dtype of ``x``, or in double precision where that cannot tell the steps apart and
            the field takes it (a float32 network of ``t`` and ``x``, joined, does not).
            torchdiffeq's callbacks (``field.callback_step`` and so on) are honoured; those that a method does not
            have are warned of. Or a system.
        x0: State at ``t[0]``: a tensor of any shape, or a (named) tuple of tensors of one dtype. That of a system is a
            ``PhaseState`` of ``q`` and ``p``, each of shape ``(*batch, dof)``.
        t: Output times, shape ``(n_times,)``, strictly increasing or decreasing, at least two.
        method: A name out of :func:`available_methods` or :data:`~odeopt.ode.STRUCTURE_METHODS`.
        backend: Whose steps to take: ``"torchdiffeq"``; ``"odeopt"``, this library's own; or ``"auto"``, ours where
            they exist and give the same result (no option but a ``step_size`` that divides the intervals, no adjoint).
            They then equal torchdiffeq's to rounding, at about half the cost per step on small states.
        options: Options of the method, such as ``step_size`` for the fixed-step ones (without it they take
            one step per output time) or ``max_num_steps`` (between two outputs) for the adaptive ones; ``tol`` and
            ``max_iters`` of the Newton iterations of structure-preserving ones, see :class:`~odeopt.ode.Newton`.
        rtol: Relative tolerance of the adaptive methods; one per tensor if ``x0`` is a tuple. Tolerances under the
            rounding of ``x0`` are raised to it, with a warning.
        atol: Absolute tolerance, likewise.
        u: Input of a system: held all the time, shape ``(*batch, n_inputs)``; a :class:`~odeopt.ode.ZeroOrderHold` or
            :class:`~odeopt.ode.FirstOrderHold` of samples, whose knots no step reaches across; or a function of time.
        z: Modulating signal of a system, held.
        adjoint: Whether gradients come from the adjoint equation, solved backwards: less memory, but first
            derivatives only, and for fixed-step methods not the gradient of the discrete solution. A solver
            that fails in the backward pass raises there.
        adjoint_params: Tensors that the adjoint differentiates with respect to. Default:
            ``field.parameters()``, and for a system what ``u`` and ``z`` hold; refused if ``field`` depends on more.
        adjoint_method: Method of the backward pass. Default: ``method``.
        adjoint_options: Options of the backward pass. Default: ``options``.
        adjoint_rtol: Relative tolerance of the backward pass. Default: ``rtol``.
        adjoint_atol: Absolute tolerance of the backward pass. Default: ``atol``.
        event_fn: Not supported; the error says what to use.
        throw: Whether to raise a failure instead of returning it.

    Returns:
        States at every output time, with evaluations, steps, seconds and status.

    Raises:
        ValueError: If a parameter is wrong; the message names it and the value found. Also if a structure-preserving
            method is given a bare field.
        IntegrationError: With ``throw=True``, if any status but success would be returned.

    References:
        Chen, Rubanova, Bettencourt, Duvenaud (2018), Neural Ordinary Differential Equations.

    Example:
        >>> solution = integrate(lambda t, x: -x, torch.ones(2), torch.linspace(0.0, 1.0, 11), method="rk4")
        >>> solution.states.shape, solution.n_steps, solution.n_field_evals
        (torch.Size([11, 2]), 10, 40)
    """
    require(callable(field), "field", field, "a function of time and state")
    check_choice("backend", backend, BACKENDS)
    if method not in (*EXPLICIT_METHODS, *STRUCTURE_METHODS):  # torchdiffeq's own, which it has to be imported for
        check_choice("method", method, (*available_methods(), *STRUCTURE_METHODS))
    require_flags(adjoint=adjoint, throw=throw)
    system = field if isinstance(field, PortHamiltonianSystem) else None
    for_adjoint = {
        "adjoint_params": adjoint_params,
        "adjoint_method": adjoint_method,
        "adjoint_options": adjoint_options,
        "adjoint_rtol": adjoint_rtol,
        "adjoint_atol": adjoint_atol,
    }
    for name, value in for_adjoint.items():
        require(adjoint or value is None, name, value, "None with `adjoint = False`")
    if adjoint_method is not None:
        check_choice("adjoint_method", adjoint_method, available_methods())
    wanted = (
        "None, as the last time is the end: `torchdiffeq.odeint_event` takes the same field, and "
        "`odeopt.gradient_flow(..., until_norm=...)` ends where gradients are small"
    )
    require(event_fn is None, "event_fn", event_fn, wanted)
    x0 = _check_problem(field, x0, u, z, method)
    if isinstance(t, list | tuple) and any(isinstance(time, Tensor) for time in t):  # numbers would drop gradients
        like = next(time for time in t if isinstance(time, Tensor))
        t = torch.stack([torch.as_tensor(time, dtype=torch.float64, device=like.device) for time in t])
    times = times_of(t)
    is_ours = _is_ours(system, method, backend, options, times, adjoint=adjoint)
    own_options = STEP_OPTIONS | NEWTON_OPTIONS if method in STRUCTURE_METHODS else STEP_OPTIONS
    check_options("options", options, method, own_options if is_ours else accepted_options(method))
    tensors = tensors_of(x0)
    is_given = len(tensors) > 0 and all(isinstance(x, Tensor) for x in tensors)
    is_checked = not (is_ours and is_given and must_not_synchronise(tensors[0]))
    check_state(x0, has_numbers=is_checked)
    if is_checked:
        check_tolerances(rtol=rtol, atol=atol, adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol)
        t = check_times(t, tensors_of(x0)[0])
    else:
        check_numbers(t, times)
    if is_ours:
        solution = _own_steps(field, x0, t, times, method, options, u, z)
    else:
        if reads_tolerances(method):
            rtol, atol = reachable(rtol, atol, x0)
        if adjoint and reads_tolerances(adjoint_method or method):
            tolerances = rtol if adjoint_rtol is None else adjoint_rtol, atol if adjoint_atol is None else adjoint_atol
            names = "adjoint_rtol", "adjoint_atol"
            # the adjoint begins at zero
            for_adjoint |= zip(names, reachable(*tolerances, x0, names, has_zeros=True), strict=True)
        if adjoint and adjoint_params is None and system is not None:
            for_adjoint["adjoint_params"] = (*system.parameters(), *_trainable((u, z)))
        how = {"method": method, "options": options, "rtol": rtol, "atol": atol}
        how |= for_adjoint if adjoint else {}
        may_leave_out = adjoint_params is not None
        if system is None:
            solution = by_torchdiffeq(field, x0, t, how, may_leave_out=may_leave_out)
        else:
            solution = _by_subintervals(system, x0, t, times, u, z, how, may_leave_out=may_leave_out)
    if throw:
        solution.raise_for_status()
    return solution


def _trainable(values: Any) -> list[Tensor]:
    """The tensors that require grad in an input or a signal."""
    if isinstance(values, Tensor):
        return [values] if values.requires_grad else []
    if isinstance(values, nn.Module):
        return _trainable(tuple(values.parameters()))
    if isinstance(values, dict):
        values = tuple(values.values())
    if isinstance(values, tuple | list):
        return [x for value in values for x in _trainable(value)]
    return _trainable(values.values) if isinstance(values, ZeroOrderHold | FirstOrderHold) else []


def _check_problem(field: Field | PortHamiltonianSystem, x0: State, u: Any, z: Any, method: str) -> State:
    """Check what only a system has: its state, its input, its methods."""
    if not isinstance(field, PortHamiltonianSystem):
        takes_fields = method not in STRUCTURE_METHODS or method in available_methods()
        wanted = f"a `PortHamiltonianSystem` with method {method!r}, which takes its energy and its matrices apart"
        require(takes_fields, "field", field, wanted)
        for name, value in (("u", u), ("z", z)):
            require(value is None, name, value, "None unless `field` is a `PortHamiltonianSystem`")
        return x0
    is_state = isinstance(x0, tuple) and len(x0) == 2 and all(isinstance(x, Tensor) for x in x0)
    require(is_state, "x0", x0, "a `PhaseState` of tensors q and p")
    checked_input(u)
    field._check_state(PhaseState(*x0))
    return PhaseState(*x0)


def _is_ours(
    system: PortHamiltonianSystem | None, method: str, backend: str, options: Any, times: Times | None, *, adjoint: bool
) -> bool:
    """Return whether our own steps are taken; of a name that torchdiffeq has too, those for systems."""
    if method in STRUCTURE_METHODS and system is not None:
        is_ours = backend != "torchdiffeq" and not adjoint
        found = "backend = 'torchdiffeq'" if backend == "torchdiffeq" else "adjoint = True"
        require(is_ours or method in available_methods(), "method", method, f"one of torchdiffeq's with `{found}`")
        return is_ours
    if backend == "odeopt":
        check_explicit(method)
        require(not adjoint, "adjoint", adjoint, "False with `backend = 'odeopt'`")
    if backend != "auto":
        return backend == "odeopt"
    if method not in EXPLICIT_METHODS or adjoint or not (options is None or isinstance(options, dict)):
        return False
    return not options or (options.keys() <= STEP_OPTIONS and _divides(options.get("step_size"), times))


def _divides(step_size: Any, times: Times | None) -> bool:
    """Return whether steps of a given size from the first time on meet all output times, so that all grids are one."""
    if not isinstance(step_size, int | float) or not step_size > 0:
        return step_size is None
    if times is None or not all(map(math.isfinite, times.numbers)):
        return False
    counts, slack = [(time - times.numbers[0]) / step_size for time in times.numbers], times.slack(step_size)
    return all(abs(count - round(count)) <= slack for count in counts)


def _own_steps(
    field: Field, x0: State, t: Any, times: Times, method: str, options: dict[str, Any] | None, u: Any, z: Any
) -> Solution:
    """Take our own steps, and account for them."""
    options, has_newton = dict(options or {}), method in STRUCTURE_METHODS
    ignored = {name for name in CALLBACKS if hasattr(field, name)} - {"callback_step"}
    if ignored:  # in torchdiffeq's words
        warnings.warn(f"Solver '{method}' does not support callbacks {ignored}", UserWarning, stacklevel=3)
    step_size = options.pop("step_size", None)
    step_size = None if step_size is None else float(step_size)
    newton = Newton(**options).checked() if has_newton else None
    now = (lambda: math.nan) if torch.compiler.is_compiling() else time.perf_counter  # a trace has no clock
    start = now()
    if isinstance(field, PortHamiltonianSystem):
        states, outcome = system_steps(field, x0, times, method, step_size, u=u, z=z, newton=newton)
    else:
        states, outcome = explicit_steps(field, x0, times, method, step_size)
    seconds = now() - start
    n = len(times.numbers)
    if not isinstance(t, Tensor):
        like = tensors_of(x0)[0]
        # filled, as a graph that is being captured can copy nothing from the host
        kind = {"dtype": time_dtype(like.device), "device": like.device}
        t = torch.stack([torch.full((), x, **kind) for x in times.numbers])
    if outcome.n_finite < n:
        states = map_state(lambda x: fill(x[: outcome.n_finite], n), states)
    message = message_of(outcome.status, outcome.detail, t, outcome.n_finite)
    numbers = outcome.n_evals, outcome.n_steps, seconds
    return Solution(t, states, *numbers, outcome.status, message, method, outcome.n_iters)


def _by_subintervals(
    system: PortHamiltonianSystem,
    x0: PhaseState,
    t: Tensor,
    times: Times,
    u: Any,
    z: Any,
    keywords: dict,
    *,
    may_leave_out: bool,
) -> Solution:
    """Let torchdiffeq solve a system from knot to knot of its input."""
    n_evals, n_steps, seconds, states, message = 0, 0, 0.0, [x0], ""
    span = abs(times.numbers[-1] - times.numbers[0])
    outputs = dict(zip(times.numbers, t.unbind(), strict=True))  # with their gradients, which knots have none of
    for part in subintervals(times, None, knots_of(u)):
        effort = piece_of(u, part.start, part.end, x0.p.dtype)

        def field(time: Tensor, x: State, effort: Callable = effort) -> PhaseState:
            return system.vector_field(PhaseState(*x), effort(time), z)

        for name in CALLBACKS:
            if hasattr(system, name):
                setattr(field, name, getattr(system, name))
        ends = [outputs.get(end, t.new_tensor(end, dtype=time_dtype(t.device))) for end in (part.start, part.end)]
        ends = torch.stack([end.to(time_dtype(t.device)) for end in ends])
        solved = by_torchdiffeq(field, x0, ends, keywords, span, may_leave_out=may_leave_out)
        n_evals, seconds, message = n_evals + solved.n_field_evals, seconds + solved.seconds, solved.message
        n_steps = None if n_steps is None or solved.n_steps is None else n_steps + solved.n_steps
        if solved.status not in (Status.SUCCESS, Status.NOT_CONVERGED):
            break
        x0 = PhaseState(*(x[-1] for x in solved.states))
        if part.ends_at_output:
            states.append(x0)
    filled = PhaseState(*(fill(torch.stack(x), len(t)) for x in zip(*states, strict=True)))
    return Solution(t, filled, n_evals, n_steps, seconds, solved.status, message, keywords["method"])


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
    check_choice("backend", backend, BACKENDS)
    is_ours = backend == "odeopt" or (backend == "auto" and method in EXPLICIT_METHODS)
    if is_ours or method == "exponential":  # which is refused with the reason
        return explicit_step(field, _unit_times(x0)[0], 1.0, x0, method)
    return unit_step(field, x0, *_unit_times(x0), method)


def _unit_times(x0: Tensor) -> tuple[Tensor, Tensor]:
    """Return 0 and 1 as 0-d tensors; kept, because making them would cost two launches at every step."""
    real = x0.real if x0.is_complex() else x0
    key = (real.dtype, real.device)
    # A tensor of a trace must not outlive it; one of inference mode could not be saved for autograd later.
    is_compiling = torch.compiler.is_compiling()
    times = None if is_compiling else _UNIT_TIMES.get(key)
    if times is None:
        with nullcontext() if is_compiling else torch.inference_mode(False):
            # Not x0.new_zeros, which would be batched under vmap.
            times = torch.zeros((), dtype=key[0], device=key[1]), torch.ones((), dtype=key[0], device=key[1])
        if type(times[0]) is Tensor and not is_compiling:
            _UNIT_TIMES[key] = times
    return times
