"""Integration by steps of our own, without host synchronisation before the end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad as fwAD

from odeopt.modes import is_traced
from odeopt.ode.checks import State, clock_dtype, real_dtype, tensors_of, time_dtype
from odeopt.ode.implicit import Newton, must_not_synchronise
from odeopt.ode.inputs import knots_of, piece_of
from odeopt.ode.recorder import Recorder, own, raise_written, restore
from odeopt.ode.solution import Status
from odeopt.ode.steps import TABLEAUX, checked_explicit_step
from odeopt.ode.structured import StructureStep, structure_step
from odeopt.physics import PhaseState, PortHamiltonianSystem

STEP_OPTIONS = frozenset({"step_size"})
NEWTON_OPTIONS = frozenset({"tol", "max_iters"})

Step = Callable[[Tensor, Tensor, Any], Tensor]  # from its start, the state there and its length to the state at its end


class Times(NamedTuple):
    """Output times as numbers.

    Attributes:
        numbers: The times, as precise as they were given.
        rounding: What their differences may be off by.
        tensors: The times as 0-d tensors, where a derivative with respect to them is wanted; None otherwise.
    """

    numbers: list[float]
    rounding: float
    tensors: tuple[Tensor, ...] | None = None

    def slack(self, step_size: float) -> float:
        """Share of a step by which intervals may be longer than steps of ``step_size`` without one step more."""
        return min(1e-3, 1e-9 + self.rounding / step_size)


def times_of(t: Any) -> Times | None:
    """Output times as numbers; None where they are none."""
    plain, dtype, tensors = t, torch.float64, None
    if isinstance(t, Tensor):
        dtype = t.dtype
        if not torch.compiler.is_compiling():
            plain = _unwrapped(t)
            is_differentiated = plain is not t or t.requires_grad or fwAD.unpack_dual(t).tangent is not None
            plain, tensors = plain.detach(), t.unbind() if is_differentiated and t.dim() else None
    try:
        numbers = plain.tolist() if isinstance(t, Tensor) else [float(time) for time in t]
        return Times(numbers, torch.finfo(dtype).eps * max(map(abs, numbers)), tensors)
    except (TypeError, ValueError):
        return None


def _unwrapped(t: Tensor) -> Tensor:
    """The values of a tensor that ``torch.func`` differentiates."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            raise ValueError(
                "Parameter `t` should be the same for all that `torch.func.vmap` maps over, as it decides how many "
                "steps are taken. Found a mapped tensor: scale the field instead."
            )
        t = torch._C._functorch.get_unwrapped(t)
    return t


class Subinterval(NamedTuple):
    """Interval between two neighbouring times that are outputs or knots, in steps of one length.

    Attributes:
        start: Time at its start.
        end: Time at its end.
        n_steps: Number of steps.
        ends_at_output: Whether the end is an output time.
    """

    start: float
    end: float
    n_steps: int
    ends_at_output: bool


class Outcome(NamedTuple):
    """Status and counts of the steps.

    Attributes:
        n_evals: Evaluations of the field.
        n_steps: Steps.
        n_iters: Newton iterations, the mean over samples of the sum over steps; None for explicit steps.
        status: How it ended.
        detail: What there is to say of it.
        n_finite: Outputs before the first one that is not finite.
    """

    n_evals: int
    n_steps: int
    n_iters: float | None
    status: Status
    detail: str
    n_finite: int


def subintervals(times: Times, step_size: float | None, knots: Sequence[float] = ()) -> list[Subinterval]:
    """Cut a time axis at outputs and knots, and each subinterval into the fewest steps of at most ``step_size``."""
    numbers = times.numbers
    sign, found = (1 if numbers[-1] > numbers[0] else -1), []
    slack = 0.0 if step_size is None else times.slack(step_size)
    for start, end in itertools.pairwise(numbers):
        # a knot that is an output to rounding is no knot more
        low, high = times.rounding, (end - start) * sign - times.rounding
        inner = sorted((knot for knot in knots if low < (knot - start) * sign < high), reverse=sign < 0)
        for left, right in itertools.pairwise([start, *inner, end]):
            # a length that divides it to rounding does not take one step more
            n_steps = 1 if step_size is None else max(1, math.ceil(abs(right - left) / step_size - slack))
            found.append(Subinterval(left, right, n_steps, right == end))
    return found


def explicit_steps(
    field: Callable[[Tensor, State], Any], x0: State, times: Times, method: str, step_size: float | None
) -> tuple[State, Outcome]:
    """Take explicit steps with any field; shapes and devices as in :func:`odeopt.ode.integrate`."""
    recorder = Recorder(field, x0, torch.tensor(times.numbers[:2]), callbacks={"callback_step"}, is_external=False)
    is_tuple = isinstance(x0, tuple)
    flat, vector_field = _flattened(recorder, x0) if is_tuple else (own(x0), recorder)
    has_versions = not is_traced() and not torch.is_inference_mode_enabled()

    def callback(start: Tensor, x: Tensor, dt: Tensor) -> None:
        recorder.callback_step(start, _unflattened(x, x0, 0) if is_tuple else x, dt)

    def step(start: Tensor, x: Tensor, dt: Tensor | float) -> Tensor:
        nonlocal vector_field
        before, version = x, x._version if has_versions else 0
        x = checked_explicit_step(vector_field, start, dt, x, method)
        if has_versions and before._version != version:
            raise_written()
        if not (is_tuple or recorder.is_reusing_memory):
            vector_field = recorder.timed  # once its derivatives are known to fit
        return x

    given = callback if hasattr(field, "callback_step") else None
    states, n_steps = _marched(flat, times, subintervals(times, step_size), lambda part: step, given)
    outcome = _outcome(states, n_steps * len(TABLEAUX[method].b), n_steps)
    return (_unflattened(states, x0, 1) if is_tuple else states), outcome


def system_steps(
    system: PortHamiltonianSystem,
    x0: PhaseState,
    times: Times,
    method: str,
    step_size: float | None,
    *,
    u: Any,
    z: Any,
    newton: Newton | None,
) -> tuple[PhaseState, Outcome]:
    """Take steps with a port-Hamiltonian system: structure-preserving ones, explicit ones where ``newton`` is None."""
    taken: list[StructureStep] = []
    sums: list[Tensor] = []

    def split(x: Tensor) -> PhaseState:
        return PhaseState(x[..., : system.dof], x[..., system.dof :])

    def stepper(part: Subinterval) -> Step:
        effort = piece_of(u, part.start, part.end, x0.p.dtype)

        def rates(t: Tensor, x: Tensor) -> Tensor:
            return torch.cat(system.vector_field(split(x), effort(t), z), -1)

        def explicit(start: Tensor, x: Tensor, dt: Tensor | float) -> Tensor:
            return checked_explicit_step(rates, start, dt, x, method)

        def structured(start: Tensor, x: Tensor, dt: Tensor | float) -> Tensor:
            def held(share: float) -> Tensor | None:
                return effort(start + share * dt if share else start)

            sums.append(x.detach().sum(-1))
            taken.append(structure_step(system, dt, split(x), method, u=held, z=z, newton=newton))
            return torch.cat(taken[-1].x, -1)

        return explicit if newton is None else structured

    given = getattr(system, "callback_step", None)
    callback = given and (lambda start, x, dt: given(start, split(x), dt))
    grid = subintervals(times, step_size, knots_of(u))
    states, n_steps = _marched(torch.cat(x0, -1), times, grid, stepper, callback)
    n_evals = sum(step.n_evals for step in taken) if newton is not None else n_steps * len(TABLEAUX[method].b)
    return split(states), _outcome(states, n_evals, n_steps, taken, sums)


def _marched(
    x: Tensor,
    times: Times,
    grid: Sequence[Subinterval],
    stepper: Callable[[Subinterval], Step],
    callback: Callable[[Tensor, Tensor, Any], None] | None,
) -> tuple[Tensor, int]:
    """Take all steps. Return the states at the output times, stacked, and the number of steps."""
    states, first, last = [x], grid[0].start, grid[-1].end
    shortest = min(abs(part.end - part.start) / part.n_steps for part in grid)
    clock = clock_dtype(x, max(abs(first), abs(last)), shortest, abs(last - first))
    for part in grid:
        step = stepper(part)
        dt, starts = _steps_of(part, times, clock, x)
        for start in starts:
            if callback is not None:
                callback(start, x, dt if isinstance(dt, Tensor) else torch.full_like(start, dt))
            x = step(start, x, dt)
        if part.ends_at_output:
            states.append(x)
    return torch.stack(states), sum(part.n_steps for part in grid)


def _steps_of(
    part: Subinterval, times: Times, clock: torch.dtype, x: Tensor
) -> tuple[Tensor | float, Sequence[Tensor]]:
    """Length of the steps of a subinterval, and the times at which they begin, as 0-d tensors."""
    n, dt = part.n_steps, (part.end - part.start) / part.n_steps
    if n == 1 and times.tensors is None:
        return dt, [torch.full((), part.start, dtype=clock, device=x.device)]
    fine = time_dtype(x.device)
    start = torch.full((), part.start, dtype=fine, device=x.device)
    if times.tensors is not None:
        ends = dict(zip(times.numbers, times.tensors, strict=True))  # a knot is a number
        start = ends[part.start].to(start) if part.start in ends else start
        end = ends[part.end].to(start) if part.end in ends else torch.full_like(start, part.end)
        dt = (end - start) / n
    starts = start + torch.arange(n, dtype=fine, device=x.device) * dt
    dt = dt.to(real_dtype(x)) if isinstance(dt, Tensor) else dt
    return dt, starts.to(clock).unbind()


def _outcome(
    states: Tensor, n_evals: int, n_steps: int, taken: Sequence[StructureStep] = (), sums: Sequence[Tensor] = ()
) -> Outcome:
    """Check the values, once and at the end, where that is allowed; sums are those of the states steps began at."""
    if must_not_synchronise(states):
        text = "the steps were mapped, compiled or captured, where no value can be checked."
        return Outcome(n_evals, n_steps, None, Status.NOT_CHECKED, text, len(states))
    is_finite = states.detach().reshape(len(states), -1).isfinite().all(1)
    n_finite = int(is_finite.cumprod(0).sum())
    n_iters, n_open, where = None, 0, ""
    if taken:
        n_iters = torch.stack([step.n_iters for step in taken]).sum(0).double().mean().item()
        # an equation that begins at NaN has no solution to be missed
        is_open = ~torch.stack([step.is_converged for step in taken]) & torch.stack(list(sums)).isfinite()
        is_open = is_open.reshape(len(taken), -1).any(1)
        n_open = int(is_open.sum())
        where = f"in {n_open} of {len(taken)} steps, first in step {int(is_open.int().argmax()) + 1}."
    status, text = Status.SUCCESS, "Reached the last time."
    if n_finite < len(states):
        status, text, n_finite = Status.NON_FINITE_STATE, "the next output has NaN or inf.", max(1, n_finite)
        if n_open:  # which is rather the cause than the step that is blamed
            text = f"{text[:-1]}, and the implicit iteration did not converge {where}"
    elif n_open:
        status, text = Status.NOT_CONVERGED, where
    return Outcome(n_evals, n_steps, n_iters, status, text, n_finite)


def _flattened(field: Recorder, x0: tuple[Tensor, ...]) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """A tuple of tensors as one vector, and the field on it."""

    def on_vector(t: Tensor, x: Tensor) -> Tensor:
        dx = field(t, tuple(_unflattened(x, x0, 0)))
        return torch.cat([d.reshape(-1) for d in tensors_of(dx)])

    return torch.cat([x.reshape(-1) for x in x0]), on_vector


def _unflattened(x: Tensor, x0: tuple[Tensor, ...], n_leading: int) -> State:
    parts = x.split([part.numel() for part in x0], dim=-1)
    return restore(x0, [p.reshape((*x.shape[:n_leading], *part.shape)) for p, part in zip(parts, x0, strict=True)])
