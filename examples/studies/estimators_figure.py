"""The figure of estimators of the meta-gradient."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from odeopt.report import PALETTE, label_ends, line_styles, new_figure, save_figure, style


def plot_estimators(
    measured: Mapping[str, Mapping[str, Sequence[float]]],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    path: str | os.PathLike,
    *,
    title: str,
) -> Path:
    """Draw bias and spread of estimates of a gradient, and what training by them leads to; and save it.

    Args:
        measured: By stage of training and estimator: bias, its standard error, standard deviation of an estimate
            (all three over the norm of the exact gradient), and what is not drawn.
        curves: Pairs of meta-step and validation loss by estimator.
        path: The image file.
        title: Title of the figure.

    Returns:
        The path.
    """
    with style():
        figure, (left, right) = new_figure(11.0, 4.2, 2)
        names = list(next(iter(measured.values())))
        floor = 1e-2  # the exact gradient has neither bias nor spread
        for i, (stage, numbers) in enumerate(measured.items()):
            heights = [-row + 0.22 * ((len(measured) - 1) / 2 - i) for row in range(len(names))]
            bias, error, spread = ([max(floor, numbers[name][k]) for name in names] for k in range(3))
            marks = {"color": PALETTE[i], "markersize": 5, "linestyle": "none", "clip_on": False}
            left.hlines(heights, floor, error, color=PALETTE[i], linewidth=4, alpha=0.25)
            left.plot(bias, heights, "osD^"[i % 4], label=f"bias, {stage}", **marks)
            left.plot(spread, heights, "|", markeredgewidth=1.8, label="standard deviation of one estimate", **marks)
        left.set(xscale="log", title="distance from the exact gradient")
        left.set_xlim(left=floor)
        left.set_yticks([-row for row in range(len(names))], names)
        left.set_xlabel(f"over the norm of the exact gradient (at the edge: {floor:g} or less)\n"
                        "pale bars: up to here a bias cannot be told from chance")  # fmt: skip
        styles = line_styles(dict.fromkeys(curves, True))
        for name, points in curves.items():
            right.plot(*zip(*points, strict=True), label=name, **styles[name])
        right.set_xlim(0, max(step for points in curves.values() for step, _ in points))
        # what diverges leaves the axis and may not squeeze the others
        finite = [loss for points in curves.values() for _, loss in points if loss < float("inf")]
        first = max(points[0][1] for points in curves.values())
        right.set_ylim(0.95 * min(finite), min(1.03 * max(finite), 1.5 * first))
        right.set(xlabel="meta-step", ylabel="validation loss, last tenth of the run", title="meta-training by them")
        label_ends(figure, right, {name: points[-1][1] for name, points in curves.items()}, styles)
        handles, labels = left.get_legend_handles_labels()
        order = [*range(0, len(labels), 2), 1]
        shown = [handles[i] for i in order], [labels[i] for i in order]
        figure.legend(*shown, loc="outside lower left", ncols=len(order), frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        return save_figure(figure, path)
