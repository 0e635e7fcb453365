"""Figures of the benchmarks: memory of a meta-gradient, and cost of a step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odeopt.report import PALETTE, line_styles, new_figure, save_figure, style, use_plain_numbers


def plot_memory(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    path: str | os.PathLike,
    *,
    limit: float,
    title: str,
) -> Path:
    """Draw the memory of a meta-gradient against its horizon, on logarithmic axes, and save it.

    Args:
        curves: Pairs of horizon in steps and memory in bytes, by the name of the method.
        path: The image file.
        limit: Memory in bytes at which a line is drawn.
        title: Title of the figure.

    Returns:
        The path.
    """
    with style():
        figure, (axes,) = new_figure(5.6, 3.8)
        styles = line_styles(dict.fromkeys(curves, True))
        for (name, points), marker in zip(curves.items(), "osD^", strict=False):
            horizons, sizes = zip(*sorted(points), strict=True)
            axes.plot(horizons, [size / 1e6 for size in sizes], marker=marker, label=name, **styles[name])
        axes.axhline(limit / 1e6, color="#666666", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(f"{limit / 1e9:g} GB", (0.01, limit / 1e6), xycoords=("axes fraction", "data"), va="bottom")
        axes.set(xscale="log", yscale="log", title=title)
        axes.set(xlabel="horizon [optimizer steps]", ylabel="peak memory [MB]")
        ticks = sorted({horizon for points in curves.values() for horizon, _ in points})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.legend(frameon=False)
        return save_figure(figure, path)


def plot_step_cost(
    costs: Mapping[str, Mapping[int, Tensor]],
    ratios: Mapping[str, Mapping[str, Tensor]],
    is_learned: Mapping[str, bool],
    path: str | os.PathLike,
    *,
    reference: str,
    title: str,
) -> Path:
    """Draw what a step costs: per parameter against their number, and as a ratio to one optimizer; and save it.

    Medians, with their quartiles as a band or a line.

    Args:
        costs: Samples in nanoseconds per parameter, by optimizer and number of parameters.
        ratios: Samples of the ratio to the time of ``reference``, by workload and optimizer.
        is_learned: Whether each optimizer is a learned one, by name.
        path: The image file.
        reference: Name of the optimizer of ratio one.
        title: Title of the figure.

    Returns:
        The path.
    """

    def quartiles(samples: Mapping[Any, Tensor]) -> Tensor:
        return torch.stack([x.double().quantile(x.new_tensor((0.25, 0.5, 0.75)).double()) for x in samples.values()])

    with style():
        figure, (left, right) = new_figure(11.0, 4.6, 2)
        styles = line_styles(is_learned)
        for name, samples in costs.items():
            low, middle, high = quartiles(samples).T
            left.plot(list(samples), middle, marker=".", label=name, **styles[name])
            left.fill_between(list(samples), low, high, color=styles[name]["color"], alpha=0.16, linewidth=0)
        left.set(xscale="log", yscale="log")
        left.set(xlabel="parameters, in one tensor", ylabel="time of a step [ns per parameter]")
        shown = [name for name in is_learned if any(name in samples for samples in ratios.values())]
        rows = {name: -i for i, name in enumerate(shown)}
        for i, (workload, samples) in enumerate(ratios.items()):
            low, middle, high = quartiles(samples).T
            heights = [rows[name] + 0.5 * ((len(ratios) - 1) / 2 - i) / len(ratios) for name in samples]
            right.hlines(heights, low, high, color=PALETTE[i], linewidth=1.2)
            right.plot(middle, heights, "osD^v"[i % 5], color=PALETTE[i], markersize=4.5, label=workload)
        right.axvline(1, color="#666666", linewidth=1, linestyle=(0, (4, 3)))
        right.set_yticks(list(rows.values()), list(rows))
        right.set(xscale="log", xlabel=f"time of a step over that of {reference}")
        right.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(ratios), columnspacing=1.0)
        for axis in (left.yaxis, right.xaxis):
            use_plain_numbers(axis, (1, 2, 5))
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
        return save_figure(figure, path)
