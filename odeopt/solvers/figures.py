"""Curves of work and error for the figures of a comparison of solvers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from odeopt.report import plot_orders, plot_panels
from odeopt.solvers.runs import Runs

WORK_LABELS = {"n_evals": "evaluations of the field", "seconds": "seconds"}
_MEASURES = {"error": "error", "energy_error": "error of the energy", "gradient_error": "error of the gradient"}


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
        problems = list(dict.fromkeys(run.problem for run in runs.select(group=group)))
        title = f"{group}, median of {len(problems)}" if len(problems) > 1 else problems[0]
        panels[title] = {m: runs.curve(problems, m, unit=unit, dtype=dtype) for m in methods}
    words = "chosen by tolerances" if kind == "adaptive" else "of a given size"
    title = f"Relative error against {WORK_LABELS[unit]}, steps {words}, {dtype}"
    return plot_panels(panels, methods, path, title=title, xlabel=WORK_LABELS[unit], ylabel="error", n_columns=4)


def draw_energies(runs: Runs, path: str | os.PathLike, *, dtype: str) -> Path:
    """Draw the error of the energy against evaluations, one column per mechanical problem, and save it.

    Args:
        runs: The runs to draw.
        path: The image file.
        dtype: Precision.

    Returns:
        The path.
    """
    problems = list(dict.fromkeys(run.problem for run in runs.select(group="mechanics")))
    return _by_kind(runs, {name: [name] for name in problems}, path, "energy_error", dtype)


def draw_gradients(runs: Runs, path: str | os.PathLike, *, dtype: str) -> Path:
    """Draw the error of the gradient against evaluations, the median over all problems that have one, and save it.

    Args:
        runs: The runs to draw.
        path: The image file.
        dtype: Precision.

    Returns:
        The path.
    """
    measured = {run.problem for run in runs.runs if run.gradient_error is not None}
    problems = [name for name in runs.problems if name in measured]
    return _by_kind(runs, {f"median of {len(problems)} problems": problems}, path, "gradient_error", dtype)


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


def _by_kind(runs: Runs, columns: Mapping[str, list[str]], path: str | os.PathLike, measure: str, dtype: str) -> Path:
    """Two rows, of methods that take steps of a given size and of adaptive ones."""
    panels: dict[str, dict[str, Sequence[tuple[float, float]]]] = {}
    rows = {"steps of a given size": "fixed", "by tolerance": "adaptive"}
    rows = {words: methods for words, kind in rows.items() if (methods := _of_kind(runs, kind))}
    for words, methods in rows.items():
        for name, problems in columns.items():
            curves = {m: runs.curve(problems, m, dtype=dtype, measure=measure) for m in methods}
            panels[f"{name}, {words}"] = curves
    methods = {name: kind for names in rows.values() for name, kind in names.items()}
    label = WORK_LABELS["n_evals"]
    title = f"Relative {_MEASURES[measure]} against {label}, {dtype}"
    n_columns = len(columns) if len(columns) > 1 else len(rows)
    return plot_panels(panels, methods, path, title=title, xlabel=label, ylabel=_MEASURES[measure], n_columns=n_columns)


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
