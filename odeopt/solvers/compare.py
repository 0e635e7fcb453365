"""Solvers beside each other: error, evaluations, seconds, energy, gradients and orders on common problems."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odeopt._version import __version__
from odeopt.checks import is_list, is_number, require
from odeopt.ode.checks import State, tensors_of
from odeopt.ode.integrate import integrate
from odeopt.ode.recorder import Field, map_state
from odeopt.ode.solution import Solution, Status
from odeopt.progress import tqdm
from odeopt.solvers.initial_value import Problem, flatten
from odeopt.solvers.methods import Method, select_methods
from odeopt.solvers.problems import select_problems
from odeopt.solvers.reference import gradient_of, loss_of, reference, reference_gradient
from odeopt.solvers.result import SolverComparison
from odeopt.solvers.runs import NOT_APPLICABLE, OVER_BUDGET, RAISED, OrderRun, SolverRun
from odeopt.timing import clock

TOLERANCES = (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)
N_STEPS = (1, 2, 4, 8, 16, 32, 64)
ORDER_PROBLEMS = ("pendulum", "driven-pendulum")
# Between these, errors show an order: above, steps are too large; below, rounding and the reference have the word.
_ROUNDING, _ASYMPTOTIC = 2e-12, 0.1
_MANY_SECONDS = 0.03  # of one setting, beyond which it is not repeated


class OverBudgetError(RuntimeError):
    """A run asked for more evaluations than it may have."""


class _Limited:
    """A field that may be evaluated so many times."""

    def __init__(self, field: Field, n_left: int) -> None:
        self.field, self.n_left = field, n_left

    def __call__(self, t: Tensor, x: State) -> State:
        self.n_left -= 1
        if self.n_left < 0:
            raise OverBudgetError
        return self.field(t, x)


class _Truth(NamedTuple):
    """Solution that the runs on a problem are measured against, in float64 on the CPU."""

    states: Tensor
    energies: Tensor | None
    gradient: Tensor | None


@torch.inference_mode(False)  # which also undoes `torch.no_grad()`: gradients are compared
def compare_solvers(
    problems: Iterable[str | Problem] | None = None,
    methods: Iterable[str | Method] | None = None,
    *,
    tolerances: Sequence[float] = TOLERANCES,
    n_steps: Sequence[int] = N_STEPS,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    device: torch.device | str = "cpu",
    max_evals: int = 3000,
    max_gradient_evals: int = 400,
    n_repeats: int = 3,
    with_orders: bool = True,
    progress_bar: bool = True,
) -> SolverComparison:
    """Run solvers on common problems, over tolerances or sizes of steps, and measure them against references.

    References are closed forms, or solutions near rounding in float64 (see :func:`odeopt.solvers.reference.reference`).
    Runs in another precision, time and tolerances included, are measured against the same ones. torchdiffeq's adaptive
    methods are given the output times, where they then end steps; SciPy's interpolate there. A run that fails is kept
    with its reason. Structure-preserving methods are not applicable where there is no system.

    Args:
        problems: Problems, or names of problems or groups; None for all that there are.
        methods: Methods, or names or kinds of methods; None for all that there are.
        tolerances: Relative and absolute tolerances of the adaptive methods, falling.
        n_steps: Steps from one output time to the next of the other methods, rising.
        dtypes: Precisions.
        device: Where to compute.
        max_evals: Evaluations that a run may have; tighter settings are then not tried.
        max_gradient_evals: Evaluations up to which a run is repeated for its gradient; 0 for no gradients.
        n_repeats: Repetitions for the time of a run that is short.
        with_orders: Whether to measure orders too.
        progress_bar: Whether to show one.

    Returns:
        The runs, for tables and figures.

    Raises:
        ValueError: If an argument is not as described, or a problem has no reference.

    Example:
        >>> comparison = compare_solvers(["A1"], ["rk4"], n_steps=(1, 2), with_orders=False, progress_bar=False)
        >>> [(run.setting, run.n_evals) for run in comparison.runs]
        [(2.0, 40), (1.0, 80)]
    """
    problems, methods = select_problems(problems), select_methods(methods)
    _check_sweep("tolerances", tolerances, (int, float), "falling")
    _check_sweep("n_steps", n_steps, int, "rising")
    is_right = is_list(dtypes, torch.dtype) and len(dtypes) > 0 and all(dtype.is_floating_point for dtype in dtypes)
    require(is_right, "dtypes", dtypes, "a list of floating-point dtypes")
    limits = {"max_evals": max_evals, "max_gradient_evals": max_gradient_evals, "n_repeats": n_repeats}
    for name, value in limits.items():
        least = 0 if name == "max_gradient_evals" else 1
        require(is_number(value) and value >= least, name, value, f"a number of at least {least}")
    runs, orders = [], []
    n_in_all = len(problems) * len(dtypes) * len(methods) + with_orders * len(ORDER_PROBLEMS) * len(methods)
    with tqdm(total=n_in_all, disable=not progress_bar, desc="solvers", unit=" sweeps") as bar:
        for problem in problems:
            bar.set_postfix_str(problem.name)
            truth = _truth(problem, with_gradient=max_gradient_evals > 0)
            for dtype in dtypes:
                moved = problem.to(dtype, device)
                for method in methods:
                    settings = tolerances if method.kind == "adaptive" else [moved.spacing / n for n in n_steps]
                    runs += _sweep(moved, method, settings, truth, **limits)
                    bar.update()
        for problem in select_problems(ORDER_PROBLEMS) if with_orders else ():
            bar.set_postfix_str(f"orders on {problem.name}")
            shorter = shortened(problem)
            states = flatten(reference(shorter))
            for method in methods:
                orders.append(observed_order(shorter, method, states=states))
                bar.update()
    settings = {
        "library_version": __version__,
        "torch": torch.__version__,
        "torchdiffeq": version("torchdiffeq"),
        "scipy": version("scipy"),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "tolerances": list(tolerances),
        "n_steps": list(n_steps),
        **limits,
    }
    return SolverComparison(tuple(runs), tuple(orders), settings)


def _check_sweep(name: str, values: Sequence[float], kind: Any, direction: str) -> None:
    sign = 1 if direction == "rising" else -1
    is_right = is_list(values, kind) and len(values) > 0 and all(is_number(x) and x > 0 for x in values)
    is_right = is_right and all(sign * b > sign * a for a, b in itertools.pairwise(values))
    require(is_right, name, values, f"a {direction} list of positive numbers")


def _truth(problem: Problem, *, with_gradient: bool) -> _Truth:
    states = reference(problem)
    energy = problem.to().energy
    with torch.no_grad():
        energies = None if energy is None else energy(states)
    return _Truth(flatten(states), energies, reference_gradient(problem) if with_gradient else None)


def _sweep(
    problem: Problem, method: Method, settings: Sequence[float], truth: _Truth, **limits: int
) -> list[SolverRun]:
    """Run a method over its settings, from loose to tight."""
    runs: list[SolverRun] = []
    dtype = str(tensors_of(problem.x0)[0].dtype).removeprefix("torch.")
    for level, setting in enumerate(settings):
        blank = SolverRun(problem.name, problem.group, method.name, method.kind, dtype, level, setting)
        if method.kind == "structure" and problem.system is None:
            reason = "the method keeps the structure of a port-Hamiltonian system, which the problem is not."
            runs.append(replace(blank, status=NOT_APPLICABLE, message=reason))
        elif _expected(runs) > 1.5 * limits["max_evals"]:
            reason = "not tried: more evaluations were to be expected, after looser settings."
            runs.append(replace(blank, status=OVER_BUDGET, message=reason))
        else:
            runs.append(_run(blank, problem, method, truth, **limits))
    return runs


def _expected(runs: Sequence[SolverRun]) -> float:
    """Evaluations that the next setting will take, should they grow as they did; 0 where nothing is known."""
    if runs and runs[-1].status == OVER_BUDGET:
        return math.inf  # the budget is spent
    if len(runs) < 2 or not (runs[-2].n_evals and runs[-1].n_evals):
        return 0.0
    return runs[-1].n_evals ** 2 / runs[-2].n_evals


def _run(
    blank: SolverRun,
    problem: Problem,
    method: Method,
    truth: _Truth,
    *,
    max_evals: int,
    max_gradient_evals: int,
    n_repeats: int,
) -> SolverRun:
    times: list[float] = []
    device = tensors_of(problem.x0)[0].device
    try:
        with torch.no_grad():
            while len(times) < n_repeats and sum(times) < _MANY_SECONDS:
                began = clock(device)
                solution = _solve(problem, method, blank.setting, problem.x0, max_evals)
                times.append(clock(device) - began)
    except OverBudgetError:
        return replace(blank, status=OVER_BUDGET, message=f"asked for more than {max_evals:,} evaluations.")
    except Exception as error:  # a solver may raise anything; the others should run all the same
        return replace(blank, status=RAISED, message=f"{type(error).__name__}: {error}")
    if solution.n_field_evals > max_evals:  # of methods that take a system, which cannot be stopped on the way
        return replace(blank, status=OVER_BUDGET, message=f"took {solution.n_field_evals:,} evaluations.")
    account = {"n_evals": solution.n_field_evals, "n_steps": solution.n_steps, "seconds": _rounded(min(times))}
    ran = replace(blank, **account, status=str(solution.status), message=solution.message)
    if not (solution.is_success or solution.status is Status.NOT_CONVERGED):  # whose states are complete
        return ran
    states = map_state(lambda x: x.cpu(), solution.states)
    error = relative_error(flatten(states), truth.states)
    if not math.isfinite(error):
        return replace(ran, status=str(Status.NON_FINITE_STATE), message="the error overflows.")
    return replace(
        ran,
        error=_rounded(error),
        energy_error=_energy_error(problem, solution.states, truth),
        gradient_error=_gradient_error(
            problem, method, blank.setting, truth, max_gradient_evals, solution.n_field_evals
        ),
        message="" if solution.is_success else solution.message,
    )


def _rounded(value: float) -> float | None:
    """Four digits: more of an error or a time mean nothing, and would fill files; None for what is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _solve(
    problem: Problem, method: Method, setting: float, x0: State, max_evals: int, *, is_step_size: bool = False
) -> Solution:
    """Solve with a tolerance, or with steps of a size, which adaptive methods can be held to."""
    options: dict[str, Any] = dict(method.options)
    if method.kind != "adaptive":
        options["step_size"] = setting
    if method.kind == "structure":
        return integrate(problem.system, x0, problem.t, method=method.method, options=options, u=problem.effort)
    tolerances = {}
    if method.kind == "adaptive":
        if not method.is_external:
            options["step_t"] = problem.t
        tolerances = {"rtol": setting, "atol": setting}
        if is_step_size:
            # at its least size a step is taken whatever its error; the tolerances no longer matter
            options |= {"first_step": setting, "min_step": setting, "max_step": setting}
            tolerances = {"rtol": 1e-6, "atol": 1e-6}
    needs_adjoint = method.is_external and tensors_of(x0)[0].requires_grad
    for_adjoint = {"adjoint": True, "adjoint_params": ()} if needs_adjoint else {}
    field = _Limited(problem.field, max_evals)
    return integrate(field, x0, problem.t, method=method.method, options=options, **tolerances, **for_adjoint)


def relative_error(states: Tensor, truth: Tensor) -> float:
    """Largest distance of rows from those of the truth, over the largest norm of the latter; zero if both are."""
    distance, size = (states - truth).norm(dim=1).max(), truth.norm(dim=1).max()
    return 0.0 if distance == 0 else (distance / size).item()


def _energy_error(problem: Problem, states: State, truth: _Truth) -> float | None:
    if problem.energy is None:
        return None
    with torch.no_grad():
        energies = problem.energy(states).double().cpu()
    return _rounded(((energies - truth.energies).abs().max() / truth.energies.abs().max()).item())


def _gradient_error(
    problem: Problem, method: Method, setting: float, truth: _Truth, max_evals: int, n_evals: int
) -> float | None:
    """Error of the gradient; None where it is not known, not wanted, or cannot be had."""
    if truth.gradient is None or n_evals > max_evals:
        return None
    x0 = map_state(lambda x: x.clone().requires_grad_(), problem.x0)
    try:
        # the adjoint equation is solved backwards at a price of its own; what SciPy says then of options that it does
        # not read goes past `integrate`, which holds it in the forward pass
        with warnings.catch_warnings(action="ignore"):
            loss = loss_of(_solve(problem, method, setting, x0, 10 * max_evals).states)
            gradient = gradient_of(loss, x0).cpu()
    except Exception:  # the run itself is good; a backward pass may fail in any way
        return None
    return _rounded(((gradient - truth.gradient).norm() / truth.gradient.norm()).item())


def shortened(problem: Problem) -> Problem:
    """Return a problem that ends at its third output, so that steps of moderate size already show their order."""
    return replace(problem, t=problem.t[:3], **({} if problem.system is None else {"field": None}))


def observed_order(
    problem: Problem, method: Method | str, *, n_steps: Sequence[int] = N_STEPS, states: Tensor | None = None
) -> OrderRun:
    """Measure the order of a method: the slope of its error against the size of its steps, in float64.

    Adaptive methods of torchdiffeq are held to steps of a size; SciPy's cannot be.

    Args:
        problem: The problem.
        method: The method, or its name.
        n_steps: Steps from one output time to the next, rising.
        states: Reference, rows as from :func:`odeopt.solvers.initial_value.flatten`; by default it is computed.

    Returns:
        The order, from the two finest runs whose errors lie between a tenth and 2e-12; None where there are none.

    Raises:
        ValueError: If there is no such method, or ``n_steps`` does not rise.
    """
    (method,) = select_methods(method)
    _check_sweep("n_steps", n_steps, int, "rising")
    blank = OrderRun(method.name, problem.name, problem.is_autonomous, method.order, None)
    if method.kind == "structure" and problem.system is None:
        return replace(blank, status=NOT_APPLICABLE)
    if method.is_external:
        return replace(blank, status=f"{NOT_APPLICABLE}: its steps have no given size")
    problem = problem.to()
    states = flatten(reference(problem)) if states is None else states
    sizes, errors = [problem.spacing / n for n in n_steps], []
    status = str(Status.SUCCESS)
    for h in sizes:
        try:
            with torch.no_grad():
                solution = _solve(problem, method, h, problem.x0, 10**6, is_step_size=True)
            error = relative_error(flatten(solution.states), states) if solution.is_success else math.nan
        except Exception as raised:  # as above
            error, status = math.nan, f"{RAISED}: {type(raised).__name__}: {raised}"
        errors.append(error if math.isfinite(error) else None)
    pairs = zip(sizes, errors, sizes[1:], errors[1:], strict=False)
    slopes = [
        math.log(e0 / e1) / math.log(h0 / h1)
        for h0, e0, h1, e1 in pairs
        if e0 is not None and e1 is not None and e0 < _ASYMPTOTIC and e1 > _ROUNDING
    ]
    observed = slopes[-1] if slopes else None
    return replace(blank, observed=observed, step_sizes=tuple(sizes), errors=tuple(errors), status=status)
