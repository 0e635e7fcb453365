"""Figures of solvers: panels of error against work, and orders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odeopt.report.figure import PALETTE, new_figure, panel_grid, save_figure, style, use_logarithms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def plot_orders(
    observed: Mapping[str, Mapping[str, float]], nominal: Mapping[str, float], path: str | os.PathLike
) -> Path:
    """Draw observed orders beside the nominal ones, one row per method, and save it.

    Args:
        observed: Orders by problem and method.
        nominal: Orders that the methods should have, as far as they are judged.
        path: The image file.

    Returns:
        The path.
    """
    with style():
        names = list(dict.fromkeys(name for by_method in observed.values() for name in by_method))
        figure, (axes,) = new_figure(6.4, 0.26 * len(names) + 1.5)
        for name, order in nominal.items():
            height = -names.index(name)
            axes.plot([order, order], [height - 0.36, height + 0.36], color="#888888", linewidth=3, zorder=1)
        axes.plot([], [], color="#888888", linewidth=3, label="nominal")
        marks = ({"marker": "o", "color": PALETTE[0]}, {"marker": "D", "color": PALETTE[1]})
        for i, (problem, by_method) in enumerate(observed.items()):
            heights = [-names.index(name) + 0.14 - 0.28 * i for name in by_method]
            axes.plot(list(by_method.values()), heights, linestyle="none", markersize=5, label=problem, **marks[i % 2])
        axes.set_yticks([-i for i in range(len(names))], names)
        axes.tick_params(axis="y", length=0)
        title = "Orders observed and nominal; the Adams methods have no nominal one"
        axes.set(xlim=(0, None), xlabel="order", title=title)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        return save_figure(figure, path)


def plot_panels(
    panels: Mapping[str, Curves],
    methods: Mapping[str, str],
    path: str | os.PathLike,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    n_columns: int,
) -> Path:
    """Draw error against work in panels with common axes and one legend, and save it.

    Args:
        panels: Pairs of work and error, by the title of the panel and the method.
        methods: Kind of each method, by name.
        path: The image file.
        title: Title of the figure.
        xlabel: The work, in words.
        ylabel: The error, in words.
        n_columns: Panels in a row, at most.

    Returns:
        The path.
    """
    with style():
        n_columns = max(1, min(n_columns, len(panels)))
        n_rows = max(1, -(-len(panels) // n_columns))
        figure, _ = new_figure(2.9 * n_columns + 1.4, 2.75 * n_rows + 1.1, n_columns=0)
        cells = panel_grid(figure, len(panels), n_columns, sharex=True, sharey=True)
        for axes, (name, curves) in zip(cells, panels.items(), strict=False):
            axes.set_title(name)
            _draw(axes, curves, methods)
        errors = [error for curves in panels.values() for points in curves.values() for _, error in points]
        cells[0].set_ylim(0.5 * max(min(errors, default=_FLOOR), _FLOOR), _CEILING)
        for i, axes in enumerate(cells[: len(panels)]):
            axes.tick_params(labelbottom=True, labelleft=i % n_columns == 0)
            if i + n_columns >= len(panels):
                axes.set_xlabel(xlabel)
            if i % n_columns == 0:
                axes.set_ylabel(ylabel)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        handles = [cells[0].plot([], [], label=name, **method_style(name, kind))[0] for name, kind in methods.items()]
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
