"""The figure of generalisation."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from odeopt.report import line_styles, new_figure, panel_grid, save_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_generalisation(
    panels: Mapping[str, Mapping[str, Tensor]],
    is_learned: Mapping[str, bool],
    path: str | os.PathLike,
    *,
    title: str,
    n_columns: int = 2,
) -> Path:
    """Draw held-out loss against training loss, a panel for each column of the comparison, and save it.

    Args:
        panels: By the title of the panel and optimizer: levels of the training loss, mean held-out loss there and
            the bounds of its interval, shape ``(4, n_levels)``, as from ``held_out.by_level``.
        is_learned: Whether each optimizer is a learned one, by name.
        path: The image file.
        title: Title of the figure.
        n_columns: Panels in a row.

    Returns:
        The path.
    """
    styles = line_styles(is_learned)
    with style():
        n_columns = min(n_columns, len(panels))
        n_rows = -(-len(panels) // n_columns)
        figure, _ = new_figure(4.6 * n_columns + 0.4, 3.1 * n_rows + 0.7, n_columns=0)
        cells = panel_grid(figure, len(panels), n_columns)
        for axes, (name, curves) in zip(cells, panels.items(), strict=False):
            axes.set(xscale="log", yscale="log", title=name)
            drawn = {optimizer: curve for optimizer, curve in curves.items() if curve.numel()}
            for optimizer, (levels, mean, low, high) in drawn.items():
                axes.plot(levels, mean, label=optimizer, **styles[optimizer])
                axes.plot(levels[-1], mean[-1], "o", markersize=4, color=styles[optimizer]["color"], zorder=4)
                if low.isfinite().all():
                    axes.fill_between(levels, low, high, color=styles[optimizer]["color"], alpha=0.16, linewidth=0)
            if drawn:
                _zoom(axes, list(drawn.values()))
            axes.set(xlabel="training loss [nats], falling to the right", ylabel="held-out loss [nats]")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        # of all panels: what diverges in one of them is not drawn there
        lines = {line.get_label(): line for cell in cells for line in cell.get_legend_handles_labels()[0]}
        shown = [name for name in is_learned if name in lines]
        handles = [lines[name] for name in shown]
        figure.legend(handles, shown, loc="outside lower center", ncols=max(1, len(shown)), frameon=False)
        return save_figure(figure, path)


def _zoom(axes: Axes, curves: list[Tensor]) -> None:
    """Show the later half of what the runs cover, in the logarithm, or more, so that all ends are in sight."""
    first, ends = max(levels[0].item() for levels, *_ in curves), [levels[-1].item() for levels, *_ in curves]
    lowest = min(ends)
    highest = min(first, max((first * lowest) ** 0.5, 2 * max(ends)))
    shown = [mean[levels <= highest] for levels, mean, *_ in curves]
    heights = torch.cat([mean[mean.isfinite()] for mean in shown])
    axes.set_xlim(highest, 0.93 * lowest)
    if len(heights):
        axes.set_ylim(0.96 * heights.min().item(), 1.04 * heights.max().item())
    for limits, set_ticks in ((axes.get_xlim(), axes.set_xticks), (axes.get_ylim(), axes.set_yticks)):
        ticks = _ticks(min(limits), max(limits))
        set_ticks([], minor=True)
        set_ticks(ticks, [f"{tick:g}" for tick in ticks])


def _ticks(low: float, high: float, n_least: int = 3) -> list[float]:
    """Round numbers between two bounds, of the coarsest kind that has a few of them."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks = []
    for mantissas in ((10,), (10, 30), (10, 20, 50), (10, 15, 20, 30, 50, 70), range(10, 100, 5), range(10, 100)):
        ticks = [m * 10.0 ** (power - 1) for power in powers for m in mantissas]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= n_least:
            break
    return ticks
