"""Rows of the tables of a comparison of solvers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from odeopt.checks import n_of
from odeopt.report import draw_table
from odeopt.solvers.runs import NOT_APPLICABLE, Runs, SolverRun

_NOT_AVAILABLE, _NEVER = "n/a", "-"
Table = tuple[list[tuple[str, str]], list[list[str]]]


def draw_tables(comparison: Runs, *, target: float | None, n_evals: int, markdown: bool) -> str:
    """Draw the tables of a comparison; see :meth:`odeopt.solvers.SolverComparison.table`."""
    parts = []
    for dtype in comparison.dtypes:
        error = attainable(comparison, dtype) if target is None else target
        at = f"to a relative error of {error:g}, {dtype}"
        parts += [
            (f"Evaluations {at}", _work(comparison, error, dtype, "n_evals")),
            (f"Milliseconds {at}", _work(comparison, error, dtype, "seconds")),
            (f"Relative errors at no more than {n_evals:,} evaluations, {dtype}", _errors(comparison, n_evals, dtype)),
        ]
    if comparison.orders:
        parts.append(("Orders", _orders(comparison)))
    if any(not run.is_success and run.status != NOT_APPLICABLE for run in comparison.runs):
        parts.append(("Runs without a result, or with a doubtful one", _failures(comparison)))
    separator = "  \n" if markdown else "\n"
    drawn = [f"{title}\n\n{draw_table(headers, rows, markdown=markdown)}" for title, (headers, rows) in parts]
    return "\n\n".join([*drawn, separator.join(_caption(comparison))])


def attainable(comparison: Runs, dtype: str) -> float:
    """Least power of ten, from 1e-6 on, that half of the methods reach on half of their problems; 1 at most."""
    reached = []
    for method in comparison.methods:
        problems = _applicable(comparison, method, dtype)
        runs = [comparison.select(problem=problem, method=method, dtype=dtype) for problem in problems]
        least = [min((run.error for run in of_one if run.error is not None), default=1.0) for of_one in runs]
        reached += [statistics.median(least)] if least else []
    middle = statistics.median(reached) if reached else 1.0
    return 10.0 ** math.ceil(math.log10(min(1.0, max(1e-6, middle))))


def _work(comparison: Runs, target: float, dtype: str, unit: str) -> Table:
    """Median over the problems of each group, with how many of them reach the error."""
    in_group = {group: comparison.distinct("problem", group=group) for group in comparison.groups}
    headers = [("method", ""), *((group, n_of(len(problems), "problem")) for group, problems in in_group.items())]
    rows = []
    for method in comparison.methods:
        row = [method]
        for group, problems in in_group.items():
            if comparison.distinct("status", group=group, method=method, dtype=dtype) == [NOT_APPLICABLE]:
                row.append(_NOT_AVAILABLE)
                continue
            works = [comparison.work(p, method, target=target, unit=unit, dtype=dtype) for p in problems]
            n_reached, middle = sum(work < math.inf for work in works), statistics.median(works)
            text = _NEVER if middle == math.inf else f"{middle:,.0f}" if unit == "n_evals" else f"{1e3 * middle:,.1f}"
            row.append(text if n_reached in (0, len(works)) else f"{text} ({n_reached}/{len(works)})")
        rows.append(row)
    return headers, rows


def _errors(comparison: Runs, n_evals: int, dtype: str) -> Table:
    """Errors of the run of most evaluations within a limit; of several problems the median."""
    systems = comparison.distinct("problem", group="mechanics")
    headers = [("method", ""), ("state", "median"), ("gradient", "median"), ("energy", "median")]
    headers += [("energy of", name) for name in systems]
    rows = []
    for method in comparison.methods:
        runs = [run for run in comparison.select(method=method, dtype=dtype) if (run.n_evals or math.inf) <= n_evals]
        applicable = _applicable(comparison, method, dtype)
        row = [method]
        for measure in ("error", "gradient_error", "energy_error"):
            measured = [p for p in applicable if _is_measured(comparison, p, measure)]
            row.append(_median([_best(runs, problem, measure) for problem in measured]))
        of_systems = [[_best(runs, p, "energy_error")] if p in applicable else [] for p in systems]
        rows.append(row + [_median(errors) for errors in of_systems])
    return headers, rows


def _best(runs: Sequence[SolverRun], problem: str, measure: str) -> float | None:
    """Error of the run of most evaluations on a problem, of those that have one."""
    known = [run for run in runs if run.problem == problem and getattr(run, measure) is not None]
    return getattr(max(known, key=lambda run: run.n_evals), measure) if known else None


def _applicable(comparison: Runs, method: str, dtype: str) -> list[str]:
    runs = comparison.select(method=method, dtype=dtype)
    return list(dict.fromkeys(run.problem for run in runs if run.status != NOT_APPLICABLE))


def _is_measured(comparison: Runs, problem: str, measure: str) -> bool:
    return any(getattr(run, measure) is not None for run in comparison.runs if run.problem == problem)


def _median(errors: Sequence[float | None]) -> str:
    """Median, a missing error counting as infinite."""
    if not errors:
        return _NOT_AVAILABLE
    middle = statistics.median(math.inf if error is None else error for error in errors)
    return _NEVER if middle == math.inf else f"{middle:.1e}"


def _orders(comparison: Runs) -> Table:
    problems = {row.problem: row.is_autonomous for row in comparison.orders}
    headers = [("method", ""), ("nominal", "")]
    headers += [(name, "autonomous" if is_autonomous else "depends on t") for name, is_autonomous in problems.items()]
    headers.append(("kept", ""))
    found = {(row.method, row.problem): row for row in comparison.orders}
    rows = []
    for method in dict.fromkeys(row.method for row in comparison.orders):
        mine = [found[method, problem] for problem in problems if (method, problem) in found]
        if all(row.observed is None and row.status.startswith(NOT_APPLICABLE) for row in mine):
            continue
        kept = [row.is_kept for row in mine]
        nominal = "not judged" if mine[0].nominal is None else str(mine[0].nominal)
        observed = [_NEVER if row.observed is None else f"{row.observed:.2f}" for row in mine]
        rows.append([method, nominal, *observed, "" if None in kept else "yes" if all(kept) else "no"])
    return headers, rows


def _failures(comparison: Runs) -> Table:
    counts = comparison.failures()
    headers = [("method, reason", ""), *((group, "") for group in comparison.groups)]
    rows = []
    reasons = dict.fromkeys((method, status) for method, status, _ in counts)
    for method, status in sorted(reasons, key=lambda reason: comparison.methods.index(reason[0])):
        if status != NOT_APPLICABLE:
            numbers = [counts[method, status, group] for group in comparison.groups]
            rows.append([f"{method}, {status}", *(str(number) if number else "" for number in numbers)])
    return headers, rows


def _caption(comparison: Runs) -> list[str]:
    settings = comparison.settings
    tolerances = ", ".join(f"{x:g}" for x in settings["tolerances"])
    return [
        "Error: the largest distance of an output from the reference, over the largest norm of the reference. Medians "
        "over the problems of a class, interpolated between runs; (n/m): n of m problems reach it; -: at most half do.",
        f"Adaptive methods at tolerances {tolerances} (relative and absolute alike); the others at "
        f"{', '.join(map(str, settings['n_steps']))} steps from one output to the next; at most "
        f"{settings['max_evals']:,} evaluations. The least time of up to {settings['n_repeats']} runs on "
        f"{settings['device']}, {settings['threads']} threads.",
        "torchdiffeq's adaptive methods end steps on the outputs; SciPy's interpolate there, and their gradients come "
        "from the adjoint equation.",
        f"torch {settings['torch']}, torchdiffeq {settings['torchdiffeq']}, SciPy {settings['scipy']}.",
    ]
