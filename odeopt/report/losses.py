"""Figures of losses along the steps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from odeopt.report.figure import label_ends, line_styles, new_figure, save_figure, style, use_plain_numbers


def plot_losses(
    bands: Mapping[str, Tensor],
    is_learned: Mapping[str, bool],
    path: str | os.PathLike,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> Path:
    """Draw a loss with its interval against the step, on a logarithmic axis unless losses are negative, and save it.

    Args:
        bands: Mean and bounds of the loss by rule, each of shape ``(3, n_steps + 1)``.
        is_learned: Whether each rule is learned, by name.
        path: The image file.
        title: Title of the figure.
        xlabel: The step, in words.
        ylabel: The loss, in words.

    Returns:
        The path.
    """
    with style():
        figure, (axes,) = new_figure(7.2, 4.2)
        styles = line_styles(is_learned)
        finite = torch.cat([mean[mean.isfinite()] for mean, _, _ in bands.values()])
        first = torch.stack([mean[0] for mean, _, _ in bands.values()])
        finite = finite if len(finite) else torch.zeros(1)  # all have diverged, as the labels say
        first = first[first.isfinite()] if first.isfinite().any() else finite
        # a rule that diverges leaves the axis and may not squeeze the others
        has_logarithm = bool((finite >= 0).all() and (finite > 0).any())
        if has_logarithm:
            bottom, top = 0.9 * finite[finite > 0].min().item(), 1.5 * first.max().item()
        else:
            margin = 0.05 * (first.max() - finite.min()).item() or 1.0
            bottom, top = finite.min().item() - margin, first.max().item() + margin
        for name, (mean, low, high) in bands.items():
            steps = torch.arange(len(mean))
            axes.plot(steps, mean, **styles[name])
            axes.fill_between(steps, low, high, where=mean < top, color=styles[name]["color"], alpha=0.16, linewidth=0)
        last = max(len(mean) for mean, _, _ in bands.values()) - 1
        scale = "log" if has_logarithm else "linear"
        axes.set(yscale=scale, xlim=(0, last), ylim=(bottom, top), xlabel=xlabel, ylabel=ylabel, title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if has_logarithm:
            use_plain_numbers(axes.yaxis)
        label_ends(figure, axes, {name: mean[-1].item() for name, (mean, _, _) in bands.items()}, styles)
        return save_figure(figure, path)


def plot_escape(
    losses: Mapping[str, Mapping[str, Tensor]],
    thresholds: Mapping[str, float],
    is_learned: Mapping[str, bool],
    path: str | os.PathLike,
    *,
    title: str,
) -> Path:
    """Draw, per landscape, how many runs have left its saddle by each step, and save it.

    Args:
        losses: Losses by landscape and rule, each of shape ``(n_steps + 1, n_runs)``.
        thresholds: Loss below which a run has left, by landscape.
        is_learned: Whether each rule is learned, by name.
        path: The image file.
        title: Title of the figure.

    Returns:
        The path.
    """
    from matplotlib.ticker import FuncFormatter

    with style():
        figure, panels = new_figure(4.6 * len(losses) + 1.2, 3.8, len(losses))
        styles = line_styles(is_learned)
        for axes, (landscape, runs) in zip(panels, losses.items(), strict=True):
            for name, values in runs.items():
                has_left = (values < thresholds[landscape]).cummax(0).values.double().mean(1)
                # from step 1 on: a logarithmic axis has no 0, where no run has left
                steps = range(1, len(has_left))
                axes.step(steps, 100 * has_left[1:], where="post", label=name, **styles[name])
            axes.set(xscale="log", xlim=(1, max(2, len(has_left) - 1)), ylim=(-2, 102), xlabel="optimizer step")
            axes.set_title(landscape)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0].set_ylabel("runs that have left the saddle [%]")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
        return save_figure(figure, path)
