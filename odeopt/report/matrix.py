"""The figure of the matrix of cells."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path

from odeopt.report.figure import new_figure, save_figure, style


def plot_ratios(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]], path: str | os.PathLike, *, label: str, n_columns: int = 5
) -> Path:
    """Draw ratios as heat maps, one row per factor, with the numbers in the fields; and save them.

    Args:
        panels: Ratios by the title of the panel, by factor and by the factor's value; all with the same factors.
        path: The image file.
        label: What the ratio is, for the colour bar, which ends at one half and two.
        n_columns: Fields in a row; a factor of more values takes several rows.

    Returns:
        The path.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    with style():
        starts = {factor: range(0, len(values), n_columns) for factor, values in next(iter(panels.values())).items()}
        names = [factor if i == 0 else "" for factor, rows in starts.items() for i in rows]
        height = max(2.4, 0.52 * len(names) + 0.5)  # the label of the colour bar needs some
        figure, axes_of = new_figure(1.1 * n_columns * len(panels) + 1.6, height, len(panels))
        colours = ScalarMappable(LogNorm(0.5, 2), "PuOr_r")  # orange is worse
        for axes, (title, factors) in zip(axes_of, panels.items(), strict=True):
            rows = [
                list(values.items())[i : i + n_columns] for factor, values in factors.items() for i in starts[factor]
            ]
            for row, fields in enumerate(rows):
                for column, (value, ratio) in enumerate(fields):
                    colour = colours.to_rgba(min(max(ratio, 0.5), 2))
                    axes.add_patch(Rectangle((column, row), 0.97, 0.94, color=colour, linewidth=0))
                    ink = "black" if sum(colour[:3]) > 1.5 else "white"
                    at = {"ha": "center", "va": "center", "color": ink}
                    axes.text(column + 0.485, row + 0.3, "\n".join(textwrap.wrap(value, 21)), fontsize=6, **at)
                    axes.text(column + 0.485, row + 0.74, _number(ratio), fontsize=9, **at)
            axes.set(xlim=(0, n_columns), ylim=(len(names), 0), xticks=[], title=title)
            labels = names if axes is axes_of[0] else [""] * len(names)
            axes.set_yticks([row + 0.47 for row in range(len(names))], labels)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        ticks = (0.5, 0.7, 1, 1.4, 2)
        bar = figure.colorbar(colours, ax=axes_of, label=label, fraction=0.03)
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks], minor=False)
        bar.set_ticks([], minor=True)
        return save_figure(figure, path)


def _number(ratio: float) -> str:
    if ratio in (0, math.inf):
        return "diverged" if ratio else "other diverged"
    return "<0.01" if ratio < 0.005 else f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0e}"
