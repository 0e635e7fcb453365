"""The figure of the suite."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from odeopt.report.figure import line_styles, new_figure, panel_grid, save_figure, style, use_plain_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = "osD^vP*Xd<>"
Bounded = tuple[float, float, float]
_WIDEST = 8.0  # ratio, and one over it, where the axis ends at the latest


def plot_suite(
    curves: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    ratios: Mapping[str, Mapping[str, Mapping[str, Bounded]]],
    is_learned: Mapping[str, bool],
    path: str | os.PathLike,
    *,
    title: str,
    known: Sequence[str] = (),
    n_columns: int = 3,
) -> Path:
    """Draw the loss against the step, a panel for each problem, and ratios to a reference below; and save it.

    Args:
        curves: Steps of shape ``(n_points,)`` and losses of shape ``(n_points, n_runs)``, by problem and optimizer; the
            geometric mean over the runs is drawn.
        ratios: Mean ratios and the bounds of their intervals by title of the panel, problem and optimizer.
        is_learned: Whether each optimizer is a learned one, by name.
        path: The image file.
        title: Title of the figure.
        known: See :func:`odeopt.report.line_styles`.
        n_columns: Panels in a row.

    Returns:
        The path.
    """
    styles = line_styles(is_learned, known)
    marks = dict(zip(is_learned, len(is_learned) * _MARKS, strict=False))
    with style():
        n_columns = min(n_columns, len(curves))
        n_rows = -(-len(curves) // n_columns)
        heights = (2.7 * n_rows, 0.24 * len(curves) * len(is_learned) ** 0.5 + 1.2)
        figure, _ = new_figure(max(9.6, 3.6 * n_columns), sum(heights) + 0.8, n_columns=0)
        upper, lower = figure.subfigures(2, 1, height_ratios=heights)
        cells = panel_grid(upper, len(curves), n_columns)
        for axes, (problem, by_name) in zip(cells, curves.items(), strict=False):
            axes.set(yscale="log", title=problem, xlabel="optimizer step")
            means = {name: losses.log().mean(1).exp() for name, (_, losses) in by_name.items()}
            for name, (steps, _) in by_name.items():
                axes.plot(steps, means[name], label=name, **styles[name])
            _zoom(axes, list(means.values()))
        for cell in cells[: len(curves) : n_columns]:
            cell.set_ylabel("loss, mean of 5 % of the steps")
        panels = lower.subplots(1, len(ratios), squeeze=False)[0]
        for axes, (label, by_problem) in zip(panels, ratios.items(), strict=True):
            _draw_ratios(axes, by_problem, styles, marks)
            axes.set_yticks([-row for row in range(len(by_problem))], [*by_problem] if axes is panels[0] else [])
            axes.set_xlabel(label)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        handles, labels = cells[0].get_legend_handles_labels()
        for handle, name in zip(handles, labels, strict=True):
            handle.set(marker=marks[name], markersize=4, markevery=[])
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
        return save_figure(figure, path)


def _zoom(axes: Axes, means: list[Tensor]) -> None:
    """Show what lies between the least loss and the worst end, or somewhat more; plain numbers at the ticks."""
    shown = torch.cat([mean[mean.isfinite() & (mean > 0)] for mean in means])  # on a logarithmic axis
    ends = [mean[-1].item() for mean in means if mean[-1].isfinite()]
    if ends and len(shown) > 0:
        lowest = shown.min().item()
        axes.set_ylim(0.93 * lowest, max(1.3 * max(ends), lowest * (shown.max().item() / lowest) ** 0.5))
    low, high = axes.get_ylim()
    if high < 1e3 * low:  # over more powers of ten their labels would cover each other
        use_plain_numbers(axes.yaxis, (1, 1.5, 2, 3, 5, 7))


def _draw_ratios(
    axes: Axes,
    by_problem: Mapping[str, Mapping[str, Bounded]],
    styles: Mapping[str, Mapping[str, object]],
    marks: Mapping[str, str],
) -> None:
    """Draw a mark and an interval per problem and optimizer, on a logarithmic axis; beyond it a number at its edge."""
    finite = [mean for ratios in by_problem.values() for mean, _, _ in ratios.values() if 0 < mean < math.inf]
    reach = min(_WIDEST, 1.15 * max(max(ratio, 1 / ratio) for ratio in [1.05, *finite]))
    axes.set(xscale="log", xlim=(1 / reach, reach), ylim=(-len(by_problem) + 0.5, 0.5))
    axes.axvline(1, color="#666666", linewidth=1, linestyle=(0, (4, 3)))
    for row, ratios in enumerate(by_problem.values()):
        for i, (name, (mean, low, high)) in enumerate(ratios.items()):
            height = -row + 0.7 * (0.5 - (i + 0.5) / len(ratios))
            bounds = [min(max(x, 1 / reach), reach) for x in (low, mean, high)]
            axes.hlines(height, bounds[0], bounds[2], color=styles[name]["color"], linewidth=1.2)
            axes.plot(bounds[1], height, marks[name], color=styles[name]["color"], markersize=4, clip_on=False)
            if not 1 / reach < mean < reach:
                is_above = mean > 1
                text = f"{mean:,.{0 if mean >= 100 else 1}f} →" if is_above else f"← {mean:.2g}"
                place = {"xytext": (-5 if is_above else 5, 0), "ha": "right" if is_above else "left", "va": "center"}
                look = {"fontsize": 6, "color": styles[name]["color"], "zorder": 4}
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                axes.annotate(text, (bounds[1], height), textcoords="offset points", **place, **look, bbox=box)
        axes.axhline(-row - 0.5, color="#DDDDDD", linewidth=0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    use_plain_numbers(axes.xaxis, (1, 1.5, 2, 3, 5, 7))
