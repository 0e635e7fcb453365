"""The field as a solver sees it: counted, watched, and in the structure of the state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from odeopt.ode.checks import State, check_derivative, tensors_of
from odeopt.ode.solution import Status

Field = Callable[[Tensor, Any], Any]


class SolverFailureError(Exception):
    """A solver gave up; the text says where."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Recorder:
    """A field that counts its evaluations and steps, and tells the field's own errors from the solver's.

    Attributes:
        n_evals: Evaluations of the field so far.
        user_error: The AssertionError that the field or a callback of the user raised, if any.
        time: How far the solver has come, in the time of the field; None before the first step.
    """

    def __init__(self, field: Field, x0: State, t: Tensor, *, callbacks: Collection[str], is_external: bool) -> None:
        self.field = field
        self.x0 = x0
        self.n_evals = 0
        self.user_error: AssertionError | None = None
        self.time: Tensor | None = None
        self._n_callbacks = dict.fromkeys(callbacks, 0)
        self._t = t
        self._last_dx: Any = ()
        # SciPy's solvers may evaluate at one time for ever once values overflow (LSODA on dx/dt = x^2). Their
        # one good reason to stay, a Jacobian by differences, takes an evaluation per number of the state.
        self._patience = 1000 + 10 * sum(x.numel() for x in tensors_of(x0)) if is_external else None
        self._n_evals_in_place = 0

    @property
    def _direction(self) -> int:
        return 1 if self._t[1] > self._t[0] else -1

    @property
    def n_steps(self) -> int | None:
        """Steps so far: accepted ones where the solver tells, None where it tells nothing."""
        return self._n_callbacks.get("callback_accept_step", self._n_callbacks.get("callback_step"))

    def __call__(self, t: Tensor, x: State) -> Any:
        self.n_evals += 1
        dx = self._call_user(self.field, t, restore(self.x0, x))
        if self.n_evals == 1:
            check_derivative(dx, self.x0)
        self._last_dx = dx
        if self._patience is not None:
            self._check_progress(t)
        return dx

    def __getattr__(self, name: str) -> Any:
        # torchdiffeq looks its callbacks up on the field; ours are there for the solvers that call them.
        if name in self._n_callbacks:
            return partial(self._on_step, name)
        return getattr(self.field, name)

    def _on_step(self, name: str, t0: Tensor, x: State, dt: Tensor) -> None:
        self._n_callbacks[name] += 1
        if name == "callback_step":
            self.time = t0.detach()
        elif name == "callback_accept_step":
            self.time = (t0 + self._direction * dt).detach()
        callback = getattr(self.field, name, None)
        if callback is not None:
            self._call_user(callback, t0, restore(self.x0, x), dt)

    def _call_user(self, function: Callable, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except AssertionError as error:
            self.user_error = error
            raise

    def _check_progress(self, t: Tensor) -> None:
        if t.isfinite() and (self.time is None or t != self.time):
            self.time = t
            self._n_evals_in_place = 0
        else:
            self._n_evals_in_place += 1
        if self._n_evals_in_place > self._patience:
            raise SolverFailureError(*self.explain(Status.STEP_SIZE_UNDERFLOW, "the solver does not move on."))

    def explain(self, status: Status, detail: str) -> tuple[Status, str]:
        """Return the cause of a failure: steps also shrink to nothing because the field is not finite."""
        if all(bool(dx.isfinite().all()) for dx in tensors_of(self._last_dx)):
            return status, detail
        return Status.NON_FINITE_STATE, "the field returned NaN or inf."

    def n_reached(self, t: Tensor) -> int:
        """Return how many of the output times lie behind the solver; the first always does."""
        if self.time is None:
            return 1
        return max(1, int(((self.time - t) * self._direction >= 0).sum()))


def restore(x0: State, x: Iterable[Tensor]) -> State:
    """Give a state the structure of ``x0``; torchdiffeq makes plain tuples of named ones."""
    if not isinstance(x0, tuple):
        return x
    return type(x0)._make(x) if hasattr(x0, "_make") else tuple(x)
