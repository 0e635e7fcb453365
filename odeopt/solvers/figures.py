"""Curves of work and error for the figures of a comparison of solvers."""

from __future__ import annotations

import os
from pathlib import Path

from odeopt.report import plot_orders, plot_panels
from odeopt.solvers.runs import Runs

WORK_LABELS = {"n_evals": "evaluations of the field", "seconds": "seconds"}
_MEASURES = {"energy_error": "error of the energy", "gradient_error": "error of the gradient"}


def draw_work_precision(runs: Runs, path: str | os.PathLike, *, kind: str, unit: str, dtype: str) -> Path:
    """Draw error against work, one panel per group of problems, and save it.

    A point is the median error and the median work over the problems of the group at one setting of the sweep.

    Args:
        runs: The runs to draw.
        path: The image file.
        kind: ``"adaptive"``, or ``"fixed"`` with the structure-preserving methods beside.
        unit: ``"n_evals"`` or ``"seconds"``.
        dtype: Precision.

    Returns:
        The path.
    """
    methods = _of_kind(runs, kind)
    panels = {}
    for group in runs.groups:
        problems = runs.distinct("problem", group=group)
        title = f"{group}, median of {len(problems)}" if len(problems) > 1 else problems[0]
        panels[title] = {m: runs.curve(problems, m, unit=unit, dtype=dtype) for m in methods}
    words = "chosen by tolerances" if kind == "adaptive" else "of a given size"
    title = f"Relative error against {WORK_LABELS[unit]}, steps {words}, {dtype}"
    return plot_panels(panels, methods, path, title=title, xlabel=WORK_LABELS[unit], ylabel="error", n_columns=4)


def draw_derived(runs: Runs, measure: str, dtype: str, path: str | os.PathLike) -> Path:
    """Draw the error of energies or gradients against evaluations and save it.

    Methods that take steps of a given size stand above adaptive ones.

    Args:
        runs: The runs to draw.
        measure: ``"energy_error"``, with one column per mechanical problem, or ``"gradient_error"``, as the median over
            all problems that have one.
        dtype: Precision.
        path: The image file.

    Returns:
        The path.
    """
    if measure == "energy_error":
        columns = {name: [name] for name in runs.distinct("problem", group="mechanics")}
    else:
        measured = {run.problem for run in runs.runs if run.gradient_error is not None}
        problems = [name for name in runs.problems if name in measured]
        columns = {f"median of {len(problems)} problems": problems}
    kinds = {"steps of a given size": _of_kind(runs, "fixed"), "by tolerance": _of_kind(runs, "adaptive")}
    rows = {words: methods for words, methods in kinds.items() if methods}
    panels = {
        f"{name}, {words}": {m: runs.curve(problems, m, dtype=dtype, measure=measure) for m in methods}
        for words, methods in rows.items()
        for name, problems in columns.items()
    }
    methods = {name: kind for names in rows.values() for name, kind in names.items()}
    ylabel, xlabel = _MEASURES[measure], WORK_LABELS["n_evals"]
    title = f"Relative {ylabel} against {xlabel}, {dtype}"
    n_columns = len(columns) if len(columns) > 1 else len(rows)
    return plot_panels(panels, methods, path, title=title, xlabel=xlabel, ylabel=ylabel, n_columns=n_columns)


def draw_orders(runs: Runs, path: str | os.PathLike) -> Path:
    """Draw observed orders beside the nominal ones, one row per method, and save it.

    Args:
        runs: The runs to draw.
        path: The image file.

    Returns:
        The path.
    """
    observed: dict[str, dict[str, float]] = {}
    nominal = {}
    for row in runs.orders:
        if row.observed is not None:
            label = f"{row.problem} ({'autonomous' if row.is_autonomous else 'depends on t'})"
            observed.setdefault(label, {})[row.method] = row.observed
            if row.nominal is not None:
                nominal[row.method] = row.nominal
    return plot_orders(observed, nominal, path)


def _of_kind(runs: Runs, kind: str) -> dict[str, str]:
    """Methods of a kind, those that keep a structure with those of steps of a given size; no two with equal runs."""
    kinds = {run.method: run.kind for run in runs.runs}
    wanted = ("adaptive",) if kind == "adaptive" else ("fixed", "structure")
    found: dict[str, str] = {}
    seen = set()
    for name, its_kind in kinds.items():
        # torchdiffeq has one method under two names
        mark = tuple((run.problem, run.dtype, run.level, run.error, run.n_evals) for run in runs.select(method=name))
        if its_kind in wanted and mark not in seen:
            found[name] = its_kind
            seen.add(mark)
    return found
