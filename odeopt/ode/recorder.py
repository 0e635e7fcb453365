"""The field as a solver sees it: counted, watched, and in the structure of the state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from odeopt.modes import is_traced
from odeopt.ode.checks import State, check_derivative, real_dtype, tensors_of
from odeopt.ode.solution import Status

Field = Callable[[Tensor, Any], Any]

# Evaluations that tell whether a field uses memory again: no step of fixed size that holds its stages has more.
_N_WATCHED = 4


class SolverFailureError(Exception):
    """A solver gave up; the text says where."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class UnresolvedTimesError(Exception):
    """Steps are so short that the times in the solver's precision do not tell them apart."""


class Timed:
    """A function of time, called with times in double precision only if it takes them.

    torchdiffeq calls fields with times in the dtype of the state, and a network of the two joined takes no others.
    Where the first call with a more precise time fails, all times are rounded to the dtype of the state.

    Args:
        function: Called with a time and further arguments.
        dtype: The (real) dtype of the state.
    """

    def __init__(self, function: Callable, dtype: torch.dtype) -> None:
        self.function, self.dtype = function, dtype
        self._is_rounded: bool | None = None

    def __call__(self, t: Tensor, *arguments: Any) -> Any:
        if t.dtype is self.dtype or self._is_rounded is False or torch.compiler.is_compiling():
            return self.function(t, *arguments)
        if self._is_rounded is None:
            with suppress(RuntimeError):  # which the second call raises again if the time is not its cause
                value = self.function(t, *arguments)
                self._is_rounded = False
                return value
        value = self.function(t.to(self.dtype), *arguments)
        self._is_rounded = True
        return value


class Recorder:
    """A field that counts its evaluations and steps, and tells the field's own errors from the solver's.

    It stands between the state of a solver, which may have another dtype and an axis where the caller's has none, and
    the state of the caller: what the field is called with has the structure, shapes and dtype of ``x0``.

    Attributes:
        n_evals: Evaluations of the field so far.
        user_error: The AssertionError that the field or a callback of the user raised, if any.
        timed: The field, called with times that it takes.
        time: How far the solver has come, by its own clock; None before the first step.
        is_reusing_memory: Whether the field returned the same memory twice, so that derivatives are copied.
    """

    def __init__(
        self,
        field: Field,
        x0: State,
        t: Tensor,
        *,
        callbacks: Collection[str],
        is_external: bool,
        work: torch.dtype | None = None,
        clock: torch.dtype | None = None,
        origin: Tensor | None = None,
        coarsest: float = 0.0,
        check_leaves: Callable[[list[Tensor]], None] | None = None,
        known: Sequence[Tensor] = (),
    ) -> None:
        self.field = field
        self.timed = Timed(field, real_dtype(tensors_of(x0)[0]))
        self.x0 = x0
        self.n_evals = 0
        self.user_error: AssertionError | None = None
        self.time: Tensor | None = None
        self._n_callbacks = dict.fromkeys(callbacks, 0)
        self._t = t
        self._clock = clock  # dtype of the times of the field; None for those of the solver
        self._origin = origin  # time of the field at which the solver's clock is at zero
        self._coarsest = coarsest  # steps shorter than this share of the time are not resolved
        self._check_leaves = check_leaves  # called once, with what requires grad and the field depends on
        self._known = known  # which are not looked behind: what they are computed from gets its gradient from theirs
        self._leaves: dict[int, Tensor] = {}
        self._last_dx: Any = ()
        self._dtype = tensors_of(x0)[0].dtype
        self._work = work or self._dtype  # dtype of the state of the solver
        self._has_axis = work is None or (isinstance(x0, Tensor) and x0.dim() > 0)
        self._has_versions = not is_traced()  # of tensors, and places in memory
        # Derivatives of one step are held by the solver together. The first ones are copied until it is known whether
        # they lie in memory of their own; a compiler, which sees no memory, does without a copy where it can.
        self.is_reusing_memory = torch.compiler.is_compiling()
        # They are kept alive meanwhile, so that no memory is given out twice.
        self._seen: list[Tensor] | None = [] if self._has_versions else None
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

    def lifted(self) -> State:
        """The first state as the solver's: in the dtype that it works in, with an axis, in memory of its own."""
        parts = [own(x.to(self._work)) for x in tensors_of(self.x0)]
        return tuple(parts) if isinstance(self.x0, tuple) else parts[0].reshape(self.x0.shape or 1)

    def settled(self, states: Iterable[Tensor]) -> list[Tensor]:
        """Solutions of the solver, time first, as those of the caller."""
        pairs = zip(states, tensors_of(self.x0), strict=True)
        return [x.to(self._dtype).reshape((len(x), *like.shape)) for x, like in pairs]

    def __call__(self, t: Tensor, x: State) -> Any:
        self.n_evals += 1
        x, parts, versions = self._given(x), (), []
        if self._has_versions:
            parts = tensors_of(x)
            if parts[0].is_inference():  # such tensors do not count who writes to them
                parts, x = (), map_state(torch.clone, x)
            versions = [part._version for part in parts]
        now = t if self._origin is None else self._origin + t
        if self._clock is not None and now.dtype is not self._clock:
            now = now.to(self._clock)
        if self._check_leaves is None:
            dx = self._call_user(self.timed, now, x)
        else:
            x = map_state(Tensor.detach, x)
            with torch.enable_grad():
                dx = self._call_user(self.timed, now.detach(), x)
        if self.n_evals == 1:
            check_derivative(dx, self.x0)
        derivatives = tensors_of(dx)
        if self._check_leaves is not None:
            self._look_at_leaves(derivatives)
            derivatives = [d.detach() for d in derivatives]
        if versions != [part._version for part in parts]:
            raise_written()
        dx = self._answered(derivatives)
        self._last_dx = dx
        if self._patience is not None:
            self._check_progress(t)
        return dx

    def _look_at_leaves(self, derivatives: Iterable[Tensor]) -> None:
        """Compare the graphs of two calls: a field may make leaves of its own, which are other ones in each."""
        leaves = leaves_of(derivatives, self._known)
        if self.n_evals == 1:
            self._leaves = leaves
        else:
            check, self._check_leaves = self._check_leaves, None
            check([leaf for key, leaf in leaves.items() if key in self._leaves])
            self._leaves = {}

    def _given(self, x: State) -> State:
        """A state of the solver as the caller's."""
        if isinstance(x, Tensor):
            x = x if self._has_axis else x.reshape(())
            return x if x.dtype is self._dtype else x.to(self._dtype)
        return restore(self.x0, [part.to(self._dtype) for part in x])

    def _answered(self, derivatives: Sequence[Tensor]) -> State:
        """Derivatives in the dtype and shape of the solver's state, and in memory that nobody fills again."""
        is_copied = self.is_reusing_memory
        if self._seen is not None:
            is_copied = True
            self.is_reusing_memory |= not _places(self._seen).isdisjoint(_places(derivatives))
            self._seen += derivatives
            if self.n_evals >= _N_WATCHED:
                self._seen = None
        derivatives = [(d.clone() if is_copied else d).to(self._work) for d in derivatives]
        if isinstance(self.x0, tuple):
            return tuple(derivatives)
        return derivatives[0] if self._has_axis else derivatives[0].reshape(1)

    def __getattr__(self, name: str) -> Any:
        # torchdiffeq looks its callbacks up on the field; ours are there for the solvers that call them.
        if name in self._n_callbacks:
            return partial(self._on_step, name)
        return getattr(self.field, name)

    def _on_step(self, name: str, t0: Tensor, x: State, dt: Tensor) -> None:
        self._n_callbacks[name] += 1
        if name == "callback_step" and self._coarsest and abs(t0.item()) * self._coarsest > abs(dt.item()):
            raise UnresolvedTimesError
        if name == "callback_step":
            self.time = t0.detach()
        elif name == "callback_accept_step":
            self.time = (t0 + self._direction * dt).detach()
        callback = getattr(self.field, name, None)
        if callback is not None:
            self._call_user(callback, t0, self._given(x), dt)

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


def _places(tensors: Iterable[Tensor]) -> set[int]:
    """Where plain tensors keep their numbers."""
    return {x.untyped_storage()._cdata for x in tensors if type(x) is Tensor and not x.is_sparse}


def leaves_of(tensors: Iterable[Tensor], known: Iterable[Tensor] = ()) -> dict[int, Tensor]:
    """The leaves of a graph, by their identity, but those behind tensors that are ``known``."""
    stack, inner = (
        [torch.autograd.graph.get_gradient_edge(x).node for x in some if x.requires_grad] for some in (tensors, known)
    )
    seen, leaves = set(inner), {}
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [other for other, _ in node.next_functions]
            if hasattr(node, "variable"):
                leaves[id(node.variable)] = node.variable
    return leaves


def own(x: Tensor) -> Tensor:
    """Copy a state for a solver, so that no field writes to the caller's; such that it counts who writes to it."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return x.clone()
    with torch.inference_mode(False):
        return x.detach().clone()


def raise_written() -> None:
    """Refuse a field that writes to the state it is called with."""
    raise ValueError(
        "Parameter `field` should not write to the state that it is called with, which the solver still needs. "
        "Found a state that was changed in place: compute on a copy."
    )


def restore(x0: State, parts: Sequence[Tensor]) -> State:
    """Give tensors the structure of ``x0``; torchdiffeq makes plain tuples of named ones."""
    if not isinstance(x0, tuple):
        return parts[0]
    return type(x0)._make(parts) if hasattr(x0, "_make") else tuple(parts)


def map_state(function: Callable[[Tensor], Tensor], x: State) -> State:
    """Apply a function to every tensor of a state, keeping its structure."""
    return restore(x, [function(part) for part in tensors_of(x)])
