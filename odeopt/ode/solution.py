"""Results of an integration: states, counts, status and message."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from odeopt.ode.checks import State


class Status(StrEnum):
    """Reason why an integration ended."""

    SUCCESS = "success"
    NON_FINITE_STATE = "non-finite state"
    STEP_SIZE_UNDERFLOW = "step size underflow"
    MAX_STEPS_REACHED = "max steps reached"
    NOT_CONVERGED = "implicit iteration did not converge"
    STOPPED_EARLY = "solver stopped early"
    NOT_CHECKED = "not checked"


ADVICE = {
    Status.NON_FINITE_STATE: "Take smaller steps (`options={'step_size': ...}`), or check the field for "
    "division by zero and the solution for a blow-up in finite time.",
    Status.STEP_SIZE_UNDERFLOW: "The solution may blow up or jump there, or the tolerances may be under the "
    "rounding of the dtype: raise `rtol` and `atol`, use float64, name the times of jumps in "
    "`options={'jump_t': ...}`, or try `scipy_solver` if the system is stiff.",
    Status.MAX_STEPS_REACHED: "Raise `options={'max_num_steps': ...}`, raise `rtol` and `atol`, or try "
    "`scipy_solver` if the system is stiff.",
    Status.NOT_CONVERGED: "The states are complete but may be inaccurate: take smaller steps or raise "
    "`options={'max_iters': ...}`.",
    Status.NOT_CHECKED: "Look at the states yourself.",
    Status.STOPPED_EARLY: "The solution may blow up or jump there: raise `rtol` and `atol`, or name another "
    "method of SciPy in `options={'solver': ...}`.",
}


class IntegrationError(RuntimeError):
    """An integration that failed.

    Attributes:
        solution: The solution that it would have returned, with the states that it reached.
    """

    def __init__(self, solution: Solution) -> None:
        super().__init__(solution.message)
        self.solution = solution

    def __reduce__(self):  # by what it is made of, which is not its message
        return type(self), (self.solution,)


@dataclass(frozen=True, eq=False)
class Solution:
    """States at the output times, with the counts and the status of the integration.

    An integration that failed returns a solution, too: read ``status``, or call :meth:`raise_for_status`.

    Attributes:
        t: Output times, shape ``(n_times,)``.
        states: States at these times, in the structure of ``x0``, each of shape ``(n_times, *shape)``; NaN
            after the last output that was reached.
        n_field_evals: Evaluations of the field, without those of a later adjoint backward pass.
        n_steps: Steps taken (the accepted ones of an adaptive method); None for ``scipy_solver``, which
            hides them.
        seconds: Wall-clock seconds of the integration; NaN where it was compiled.
        status: Reason why it ended; equals its text, ``solution.status == "success"``.
        message: What happened and where, and what to do about it.
        method: The method that was used.
        n_iters: Newton iterations of an implicit method of ours, mean over the samples of the sum over the steps;
            None otherwise.
    """

    t: Tensor
    states: State
    n_field_evals: int
    n_steps: int | None
    seconds: float
    status: Status
    message: str
    method: str = ""
    n_iters: float | None = None

    @property
    def is_success(self) -> bool:
        """True if every output time was reached with a finite, converged state."""
        return self.status is Status.SUCCESS

    def raise_for_status(self) -> None:
        """Raise an error unless every output time was reached with a finite, converged state.

        Raises:
            IntegrationError: With the message, if the status is not success; also where nothing could be checked.
        """
        if not self.is_success:
            raise IntegrationError(self)
