"""The figures of a comparison of solvers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odeopt.plots import PALETTE, new_figure, save_figure, style, use_logarithms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from odeopt.ode.comparison import OrderRun, SolverComparison
    from odeopt.ode.ledger import EnergyLedger

Curves = Mapping[str, Sequence[tuple[float, float]]]

# The same colour for the same formulas, or for those that are nearest to them, whoever has written them; whose they
# are shows in the dashes, and no two methods of a figure have a marker and dashes in common.
_COLOURS = {
    "dopri8": 0, "scipy-DOP853": 0, "implicit_adams": 0, "fixed_adams": 0,
    "dopri5": 1, "scipy-RK45": 1, "rk4": 1,
    "bosh3": 2, "scipy-RK23": 2, "heun3": 2, "strang": 2,
    "fehlberg2": 3, "scipy-Radau": 3, "midpoint": 3, "implicit_midpoint": 3,
    "adaptive_heun": 4, "heun2": 4, "symplectic_euler": 4,
    "explicit_adams": 5, "scipy-LSODA": 5, "discrete_gradient": 5,
    "euler": 6, "scipy-BDF": 6,
}  # fmt: skip
_MARKERS = "osD^vPX"
_DASHES = {"scipy": (0, (4, 1.6)), "structure": (0, (1.2, 1.2)), "adams": (0, (6, 1.6, 1.2, 1.6))}
_FLOOR, _CEILING = 1e-13, 10.0
WORK_LABELS = {"n_evals": "evaluations of the field", "seconds": "seconds"}
_MEASURES = {"error": "error", "energy_error": "error of the energy", "gradient_error": "error of the gradient"}


def method_style(name: str, kind: str) -> dict[str, Any]:
    """Colour, marker and dashes of a method, the same in all figures.

    Args:
        name: Name of the method.
        kind: Its kind.

    Returns:
        Keyword arguments of ``Axes.plot``.
    """
    i = _COLOURS.get(name, sum(map(ord, name))) % len(PALETTE)
    family = "scipy" if name.startswith("scipy") else "adams" if "adams" in name else kind
    is_hollow = family in ("scipy", "structure")
    return {
        "color": PALETTE[i],
        "marker": _MARKERS[i],
        "markersize": 4,
        "markerfacecolor": "white" if is_hollow else PALETTE[i],
        "linestyle": _DASHES.get(family, "solid"),
        "linewidth": 1.8 if family == "structure" else 1.2,
    }


def plot_work_precision(
    comparison: SolverComparison, path: str | os.PathLike, *, kind: str, unit: str, dtype: str
) -> Path:
    """Draw error against work, one panel per group of problems, and save it.

    A point is the median error and the median work over the problems of the group at one setting of the sweep.

    Args:
        comparison: What to draw.
        path: The image file.
        kind: ``"adaptive"``, or ``"fixed"`` with the structure-preserving methods beside.
        unit: ``"n_evals"`` or ``"seconds"``.
        dtype: Precision.

    Returns:
        The path.
    """
    methods = _of_kind(comparison, kind)
    panels = {}
    for group in comparison.groups:
        problems = list(dict.fromkeys(run.problem for run in comparison.select(group=group)))
        title = f"{group}, median of {len(problems)}" if len(problems) > 1 else problems[0]
        panels[title] = {m: comparison.curve(problems, m, unit=unit, dtype=dtype) for m in methods}
    words = "chosen by tolerances" if kind == "adaptive" else "of a given size"
    title = f"Relative error against {WORK_LABELS[unit]}, steps {words}, {dtype}"
    return _grid(panels, methods, path, title=title, xlabel=WORK_LABELS[unit], ylabels=["error"], n_columns=4)


def plot_energies(comparison: SolverComparison, path: str | os.PathLike, *, dtype: str) -> Path:
    """Draw the error of the energy against evaluations, one column per mechanical problem, and save it.

    Args:
        comparison: What to draw.
        path: The image file.
        dtype: Precision.

    Returns:
        The path.
    """
    problems = list(dict.fromkeys(run.problem for run in comparison.select(group="mechanics")))
    return _by_kind(comparison, {name: [name] for name in problems}, path, "energy_error", dtype)


def plot_gradients(comparison: SolverComparison, path: str | os.PathLike, *, dtype: str) -> Path:
    """Draw the error of the gradient against evaluations, the median over all problems that have one, and save it.

    Args:
        comparison: What to draw.
        path: The image file.
        dtype: Precision.

    Returns:
        The path.
    """
    measured = {run.problem for run in comparison.runs if run.gradient_error is not None}
    problems = [name for name in comparison.problems if name in measured]
    return _by_kind(comparison, {f"median of {len(problems)} problems": problems}, path, "gradient_error", dtype)


def plot_orders(orders: Sequence[OrderRun], path: str | os.PathLike) -> Path:
    """Draw observed orders beside the nominal ones, one row per method, and save it.

    Args:
        orders: What was observed.
        path: The image file.

    Returns:
        The path.
    """
    with style():
        rows = [row for row in orders if row.observed is not None]
        names = list(dict.fromkeys(row.method for row in rows))
        figure, (axes,) = new_figure(6.4, 0.26 * len(names) + 1.5)
        nominal = {row.method: row.nominal for row in rows if row.nominal is not None}
        for name, order in nominal.items():
            height = -names.index(name)
            axes.plot([order, order], [height - 0.36, height + 0.36], color="#888888", linewidth=3, zorder=1)
        axes.plot([], [], color="#888888", linewidth=3, label="nominal")
        marks = ({"marker": "o", "color": PALETTE[0]}, {"marker": "D", "color": PALETTE[1]})
        problems = {row.problem: row.is_autonomous for row in rows}
        for i, (problem, is_autonomous) in enumerate(problems.items()):
            mine = [row for row in rows if row.problem == problem]
            heights = [-names.index(row.method) + 0.14 - 0.28 * i for row in mine]
            words = "autonomous" if is_autonomous else "depends on t"
            values = [row.observed for row in mine]
            axes.plot(values, heights, linestyle="none", markersize=5, label=f"{problem} ({words})", **marks[i % 2])
        axes.set_yticks([-i for i in range(len(names))], names)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, None)
        axes.set_xlabel("order")
        axes.set_title("Orders observed and nominal; the Adams methods have no nominal one")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        return save_figure(figure, path)


def _by_kind(
    comparison: SolverComparison, columns: Mapping[str, list[str]], path: str | os.PathLike, measure: str, dtype: str
) -> Path:
    """Two rows, of methods that take steps of a given size and of adaptive ones."""
    panels: dict[str, dict[str, Sequence[tuple[float, float]]]] = {}
    rows = {"steps of a given size": "fixed", "by tolerance": "adaptive"}
    rows = {words: methods for words, kind in rows.items() if (methods := _of_kind(comparison, kind))}
    for words, methods in rows.items():
        for name, problems in columns.items():
            curves = {m: comparison.curve(problems, m, dtype=dtype, measure=measure) for m in methods}
            panels[f"{name}, {words}"] = curves
    methods = {name: kind for names in rows.values() for name, kind in names.items()}
    label = WORK_LABELS["n_evals"]
    title = f"Relative {_MEASURES[measure]} against {label}, {dtype}"
    n_columns = len(columns) if len(columns) > 1 else len(rows)
    return _grid(panels, methods, path, title=title, xlabel=label, ylabels=[_MEASURES[measure]], n_columns=n_columns)


def _of_kind(comparison: SolverComparison, kind: str) -> dict[str, str]:
    """Methods of a kind, those that keep a structure with those of steps of a given size; no two with equal runs."""
    kinds = {run.method: run.kind for run in comparison.runs}
    wanted = ("adaptive",) if kind == "adaptive" else ("fixed", "structure")
    found: dict[str, str] = {}
    seen = set()
    for name, its_kind in kinds.items():
        # torchdiffeq has one method under two names
        mark = tuple(
            (run.problem, run.dtype, run.level, run.error, run.n_evals) for run in comparison.select(method=name)
        )
        if its_kind in wanted and mark not in seen:
            found[name] = its_kind
            seen.add(mark)
    return found


def _grid(
    panels: Mapping[str, Curves],
    methods: Mapping[str, str],
    path: str | os.PathLike,
    *,
    title: str,
    xlabel: str,
    ylabels: Sequence[str],
    n_columns: int,
) -> Path:
    """Draw panels with common axes and one legend."""
    with style():
        n_columns = max(1, min(n_columns, len(panels)))
        n_rows = max(1, -(-len(panels) // n_columns))
        figure, _ = new_figure(2.9 * n_columns + 1.4, 2.75 * n_rows + 1.1)
        figure.clear()
        cells = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
        flat = list(cells.flatten())
        for cell in flat[len(panels) :]:
            cell.set_axis_off()
        for axes, (name, curves) in zip(flat, panels.items(), strict=False):
            axes.set_title(name)
            _draw(axes, curves, methods)
        errors = [error for curves in panels.values() for points in curves.values() for _, error in points]
        flat[0].set_ylim(0.5 * max(min(errors, default=_FLOOR), _FLOOR), _CEILING)
        for i, axes in enumerate(flat[: len(panels)]):
            axes.tick_params(labelbottom=True, labelleft=i % n_columns == 0)
            if i + n_columns >= len(panels):
                axes.set_xlabel(xlabel)
            if i % n_columns == 0:
                axes.set_ylabel(ylabels[0])
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        handles = [flat[0].plot([], [], label=name, **method_style(name, kind))[0] for name, kind in methods.items()]
        n_in_row = max(2, min(6, 2 * n_columns))
        figure.legend(handles=handles, loc="outside lower center", ncols=n_in_row, frameon=False, handlelength=3)
        return save_figure(figure, path)


def _draw(axes: Axes, curves: Curves, methods: Mapping[str, str]) -> None:
    """Curves on logarithmic axes; errors beyond the ceiling are not drawn, those under the floor are drawn on it."""
    use_logarithms(axes)
    for name, points in curves.items():
        shown = [(work, max(error, _FLOOR)) for work, error in points if error <= _CEILING]
        if shown:
            axes.plot(*zip(*shown, strict=True), **method_style(name, methods[name]))
    if not axes.lines:
        axes.annotate("none gets here", (0.5, 0.5), xycoords="axes fraction", ha="center", color="#666666")


def plot_ledger(ledger: EnergyLedger, path: str | os.PathLike, *, title: str = "") -> Path:
    """Draw where the energy went, the mean over a batch: cumulated, and what the solver made out of nothing.

    Args:
        ledger: What :func:`odeopt.ode.energy_ledger` returned.
        path: The image file.
        title: Stands above.

    Returns:
        The path.
    """
    t = ledger.t.tolist()
    change, dissipated, supplied, residual = (
        part.reshape(len(part), -1).mean(1).cumsum(0).tolist()
        for part in (ledger.change, ledger.dissipated, ledger.supplied, ledger.residual)
    )
    with style():
        figure, (left, right) = new_figure(8.4, 3.2, n_columns=2)
        lines = {"gained by H": change, "dissipated": dissipated, "supplied": supplied}
        for i, (name, values) in enumerate(lines.items()):
            left.plot(
                t, [0.0, *values], color=PALETTE[i], label=name, linestyle=("solid", (0, (4, 1.6)), (0, (1, 1)))[i]
            )
        left.legend()
        left.set(xlabel="t", ylabel="energy since the start")
        right.plot(t, [0.0, *residual], color="#000000")
        right.set(xlabel="t", ylabel="residual since the start")
        if title:
            figure.suptitle(title)
        return save_figure(figure, path)
