"""Style and parts of figures; the one door to matplotlib, which is imported inside the functions only.

No display, no pyplot and no global state: figures are drawn by matplotlib's Agg canvas, and the style holds
inside the functions here alone.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, FigureBase

# Okabe and Ito (2008), Color universal design; yellow is left out, which white paper swallows
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LINE_COLOURS = (*PALETTE, "#882255", "#999999", "#5E4FA2", "#8C6D31")  # where there are more lines than that
_LEARNED_DASHES = ("solid", (0, (6, 2)), (0, (2, 1.2)), (0, (7, 2, 2, 2)))
_HAND_DESIGNED_DASHES = ("solid", (0, (5, 2)), (0, (1.2, 1.2)), (0, (6, 2, 1.2, 2)), (0, (6, 2, 1.2, 2, 1.2, 2)))
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "savefig.dpi": 160,
}


def style() -> AbstractContextManager[None]:
    """Draw in the library's style inside the block; the caller's settings come back after it."""
    from matplotlib.style import context

    return context(_STYLE, after_reset=True)


def new_figure(width: float, height: float, n_columns: int = 1, *, title: str = "") -> tuple[Figure, list[Axes]]:
    """Make a figure without a window; call it inside :func:`style`.

    Args:
        width: In inches.
        height: In inches.
        n_columns: Number of axes side by side; 0 for a figure that is laid out by its caller.
        title: Stands above.

    Returns:
        The figure and its axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    return figure, panel_grid(figure, n_columns, n_columns) if n_columns else []


def panel_grid(figure: FigureBase, n_panels: int, n_columns: int, **options: Any) -> list[Axes]:
    """Lay out panels row by row; the rest of the last row stays empty.

    Args:
        figure: The figure, or a part of it.
        n_panels: Number of panels.
        n_columns: Panels in a row.
        options: Further arguments of ``Figure.subplots``.

    Returns:
        The axes of all cells, of one row at least; those beyond the panels are switched off.
    """
    n_rows = max(1, -(-n_panels // n_columns))
    cells = list(figure.subplots(n_rows, n_columns, squeeze=False, **options).flatten())
    for cell in cells[n_panels:]:
        cell.set_axis_off()
    return cells


def use_logarithms(axes: Axes) -> None:
    """Make both axes logarithmic, with a tick at every second power of ten of the vertical one."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(base=100, numticks=20))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())


def use_plain_numbers(axis: Axis, subs: Sequence[float] = (1, 2, 3, 5)) -> None:
    """Write plain numbers at a logarithmic axis, also between powers of ten, of which there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Write a figure, making its folder where there is none; the suffix chooses the format.

    Args:
        figure: The figure.
        path: The file.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def line_styles(is_learned: Mapping[str, bool], known: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Colour, dashes and width per rule: learned rules thick and dark, no two alike in grey print.

    Args:
        is_learned: Whether each rule is learned, by name.
        known: Names that have colours of their own, in this order, so that they look alike in several figures.

    Returns:
        Keyword arguments of ``Axes.plot``, by name.
    """
    styles: dict[str, dict[str, Any]] = {}
    places = {name: known.index(name) for name in is_learned if name in known}
    free = (i for i in itertools.count() if i not in places.values())
    for name, learned in is_learned.items():
        i = places[name] if name in places else next(free)
        colour, dashes = _LINE_COLOURS[i % len(_LINE_COLOURS)], _LEARNED_DASHES if learned else _HAND_DESIGNED_DASHES
        n = sum(is_learned[other] == learned for other in styles)
        turns = [dashes[(n + k) % len(dashes)] for k in range(len(dashes))]
        used = [style["linestyle"] for style in styles.values() if style["color"] == colour]  # colours come again
        styles[name] = {
            "color": colour,
            "linestyle": next((turn for turn in turns if turn not in used), turns[0]),
            "linewidth": 2.4 if learned else 1.1,
            "zorder": 3 if learned else 2,
        }
    return styles


def label_ends(figure: Figure, axes: Axes, ends: Mapping[str, float], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Write each curve's name at its right end, none over another, joined by a line in the curve's style.

    Args:
        figure: The figure.
        axes: Its axes, with their limits.
        ends: Last value of each curve, by name; infinite where it diverged.
        styles: Styles of the curves, as from :func:`line_styles`.
    """
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height  # before the layout: it only changes by the axes' labels
    wanted = {}
    for name, value in ends.items():
        is_inside = value < float("inf")
        point = axes.transData.transform((0, min(max(value, low), high) if is_inside else high))
        wanted[name] = axes.transAxes.inverted().transform(point)[1]
    gap = 13 * figure.dpi / 72 / height
    placed = _spread(wanted, gap)
    for name, y in placed.items():
        remark = "" if ends[name] < high else ", off the axis" if ends[name] < float("inf") else ", diverged"
        weight = "bold" if styles[name]["linewidth"] > 2 else "normal"
        axes.text(1.09, y, name + remark, transform=axes.transAxes, va="center", fontsize=8.5, fontweight=weight)
        line = styles[name] | {"linewidth": min(styles[name]["linewidth"], 1.8)}
        axes.plot([1.0, 1.03, 1.08], [wanted[name], y, y], transform=axes.transAxes, clip_on=False, **line)


def _spread(wanted: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights in [0, 1] at least a gap apart, in the order of the wanted ones and next to them in least squares."""
    names = sorted(wanted, key=wanted.get)
    # less the gaps below them heights only have to rise: isotonic regression, by its formula of maxima of minima
    free = [wanted[name] - i * gap for i, name in enumerate(names)]
    ends = range(1, len(names) + 1)
    placed = {}
    for i, name in enumerate(names):
        risen = max(min(fmean(free[start:end]) for end in ends[i:]) for start in range(i + 1))
        placed[name] = min(max(risen, 0.0), 1 - (len(names) - 1) * gap) + i * gap
    return placed
