"""Runs of solvers: error, evaluations, seconds and status of each, and medians over problems."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from odeopt.checks import require_one_of
from odeopt.ode.solution import Status

NOT_APPLICABLE, OVER_BUDGET, RAISED = "not applicable", "over the budget", "error"
WORKS = {"n_evals": "evaluations", "seconds": "seconds"}
_MEASURES = ("error", "energy_error", "gradient_error")
LOST_ORDER = 0.3  # by which an observed order may lie under the nominal one


@dataclass(frozen=True)
class SolverRun:
    """One run of one method on one problem; what is not known is None.

    A run whose implicit iterations did not converge has an error all the same, and a status that says so.

    Attributes:
        problem: Name of the problem.
        group: Its group.
        method: Name of the method.
        kind: Its kind, see :class:`odeopt.solvers.Method`.
        dtype: Precision of the run, ``"float64"``.
        level: Place of the setting in its sweep, from 0.
        setting: Relative and absolute tolerance, or size of the steps in the time of the problem.
        error: Largest distance of an output from the reference, over the largest norm of the reference.
        energy_error: Largest difference of an output's energy from that of the reference, over the largest of the
            latter.
        gradient_error: Norm of the difference of the gradient through the solver from that of the reference, over the
            norm of the latter.
        n_evals: Evaluations of the field.
        n_steps: Steps.
        seconds: Wall-clock seconds without gradients, the least of the repetitions.
        status: ``"success"``, what the solver says of its failure, or why there is no run.
        message: More of it.
    """

    problem: str
    group: str
    method: str
    kind: str
    dtype: str
    level: int
    setting: float
    error: float | None = None
    energy_error: float | None = None
    gradient_error: float | None = None
    n_evals: int | None = None
    n_steps: int | None = None
    seconds: float | None = None
    status: str = Status.SUCCESS.value
    message: str = ""

    @property
    def is_success(self) -> bool:
        """True if the run reached the last output."""
        return self.status == Status.SUCCESS.value


@dataclass(frozen=True)
class OrderRun:
    """The order that a method shows on a problem.

    Attributes:
        method: Name of the method.
        problem: Name of the problem.
        is_autonomous: Whether its field does not depend on the time.
        nominal: Order that the method should have; None if it is not judged.
        observed: Order that the errors show; None if they do not show one.
        step_sizes: Sizes of the steps.
        errors: Error at each, as in :class:`SolverRun`; None where the run failed.
        status: ``"success"``, or why there is no order.
    """

    method: str
    problem: str
    is_autonomous: bool
    nominal: int | None
    observed: float | None
    step_sizes: tuple[float, ...] = ()
    errors: tuple[float | None, ...] = ()
    status: str = Status.SUCCESS.value

    def __post_init__(self) -> None:
        for name in ("step_sizes", "errors"):  # lists in a file
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def is_kept(self) -> bool | None:
        """True if the order is at least the nominal one, to within .3; None where it is not judged or not known."""
        if self.nominal is None or self.observed is None:
            return None
        return self.observed >= self.nominal - LOST_ORDER


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of solvers beside each other.

    Attributes:
        runs: One for each problem, method, precision and setting.
        orders: One for each method that takes steps of a given size, or can be made to, and problem.
        settings: What the numbers depend on beside problem and method.
    """

    runs: tuple[SolverRun, ...]
    orders: tuple[OrderRun, ...]
    settings: Mapping[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """Every run as a dictionary, failures included."""
        return [asdict(run) for run in self.runs]

    def select(self, **wanted: Any) -> list[SolverRun]:
        """Runs whose attributes have the wanted values, such as ``method="rk4"``."""
        runs = self._by_method.get(wanted["method"], ()) if "method" in wanted else self.runs
        return [run for run in runs if all(getattr(run, name) == value for name, value in wanted.items())]

    @functools.cached_property
    def _by_method(self) -> Mapping[str, list[SolverRun]]:
        """Runs of each method: tables of them all select thousands of times."""
        found: dict[str, list[SolverRun]] = {}
        for run in self.runs:
            found.setdefault(run.method, []).append(run)
        return found

    def distinct(self, name: str, **wanted: Any) -> list[str]:
        """Values of an attribute over the runs of :meth:`select`, each once, in their order."""
        return list(dict.fromkeys(getattr(run, name) for run in self.select(**wanted)))

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in their order."""
        return list(dict.fromkeys([*self.distinct("method"), *(row.method for row in self.orders)]))

    @property
    def problems(self) -> list[str]:
        """Names of the problems, in their order."""
        return self.distinct("problem")

    @property
    def groups(self) -> list[str]:
        """Names of the groups of problems, in their order."""
        return self.distinct("group")

    @property
    def dtypes(self) -> list[str]:
        """Precisions, in their order."""
        return self.distinct("dtype")

    def work(
        self,
        problem: str,
        method: str,
        *,
        target: float = 1e-6,
        unit: str = "n_evals",
        dtype: str = "float64",
        measure: str = "error",
    ) -> float:
        """Work at which a method reaches an accuracy on a problem.

        Between two runs of the sweep it is interpolated in logarithms; of the runs that reach the accuracy the one of
        the least work counts.

        Args:
            problem: Name of the problem.
            method: Name of the method.
            target: The accuracy.
            unit: ``"n_evals"`` or ``"seconds"``.
            dtype: Precision.
            measure: ``"error"``, ``"energy_error"`` or ``"gradient_error"``.

        Returns:
            The work; infinite if no run reaches the accuracy.

        Raises:
            ValueError: If there is no run of such a problem, method or dtype, or no such unit or measure.
        """
        require_one_of(WORKS, unit=unit)
        require_one_of(_MEASURES, measure=measure)
        wanted = {"problem": problem, "method": method, "dtype": dtype}
        runs = self.select(**wanted)
        if not runs:
            for name, value in wanted.items():
                require_one_of(self.distinct(name), **{name: value})
        points = [(getattr(run, unit), getattr(run, measure)) for run in runs]
        points = [(work, error) for work, error in points if error is not None]
        best = min((work for work, error in points if error <= target), default=math.inf)
        for (w0, e0), (w1, e1) in itertools.pairwise(points):
            if e1 <= target < e0 and 0 < w0 < w1:
                share = math.log(e0 / target) / math.log(e0 / max(e1, 1e-17))
                best = min(best, w0 * (w1 / w0) ** share)
        return best

    def curve(
        self, problems: Collection[str], method: str, *, unit: str = "n_evals", dtype: str, measure: str = "error"
    ) -> list[tuple[float, float]]:
        """Median work and median error over problems, at each setting of the sweep.

        Args:
            problems: Names of the problems.
            method: Name of the method.
            unit: ``"n_evals"`` or ``"seconds"``.
            dtype: Precision.
            measure: As for :meth:`work`.

        Returns:
            Pairs of work and error; where there is none both count as infinite, and medians that are infinite are left
            out.
        """
        levels: dict[int, list[SolverRun]] = {}
        for run in self.select(method=method, dtype=dtype):
            if run.problem in problems:
                levels.setdefault(run.level, []).append(run)
        points = []
        for runs in levels.values():
            known = [run for run in runs if getattr(run, measure) is not None]
            missing = [math.inf] * (len(runs) - len(known))
            work = statistics.median([getattr(run, unit) for run in known] + missing)
            error = statistics.median([getattr(run, measure) for run in known] + missing)
            if error < math.inf:
                points.append((work, error))
        return points

    def failures(self) -> Counter[tuple[str, str, str]]:
        """Count runs that did not come to the last output, by method, status and group."""
        return Counter((run.method, run.status, run.group) for run in self.runs if not run.is_success)
